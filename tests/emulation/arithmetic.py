"""What the arithmetic opcodes of PTX compute, as a table: `OPERATIONS[opcode]`.

Every function takes one NumPy array per operand, an element per thread, typed as the operation says, and returns one
per result. Rounding is that of the PTX ISA manual, chapter 9.7; numpy rounds float32 and float16 to nearest even too.

To add an opcode, add an entry: `python -m tests.emulation` names the opcode that is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

# PTX type → how NumPy sees it. NumPy has no bfloat16: such values are their 16 bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(np.bool_),
    "bf16": np.dtype(np.uint16),
    "bf16x2": np.dtype(np.uint32),
    "f16x2": np.dtype(np.uint32),
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
}


class Operation(NamedTuple):
    """An opcode: the PTX types of its results and arguments, and the function from these to those.

    by_warp: threads see the values of the others of their warp, so all of them must take part.
    """

    function: Callable[..., Any]
    results: tuple[str, ...]
    arguments: tuple[str, ...]
    by_warp: bool = False


OPERATIONS: dict[str, Operation] = {}


def bits_of(type_: str) -> int:
    return 8 * DTYPES[type_].itemsize


def _define(opcode: str, function: Callable[..., Any], result: str, *arguments: str) -> None:
    OPERATIONS[opcode] = Operation(function, (result,), arguments)


# Moves and selections


def _first(x: Array) -> Array:
    return x


def _select(a: Array, b: Array, condition: Array) -> Array:
    return np.where(condition, a, b)


for _type in ("pred", "b16", "u16", "s16", "f16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
    _define(f"mov.{_type}", _first, _type, _type)
    _define(f"selp.{_type}", _select, _type, _type, _type, "pred")

# Logic

for _type in ("pred", "b16", "b32", "b64"):
    _define(f"and.{_type}", np.bitwise_and, _type, _type, _type)
    _define(f"or.{_type}", np.bitwise_or, _type, _type, _type)
    _define(f"xor.{_type}", np.bitwise_xor, _type, _type, _type)
    _define(f"not.{_type}", np.invert, _type, _type)


def _shift_left(x: Array, by: Array) -> Array:
    bits = 8 * x.itemsize
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), x.dtype.type(0))


def _shift_right(x: Array, by: Array) -> Array:
    """Shifts by the width or more leave only the sign, or 0 of unsigned numbers."""
    bits = 8 * x.itemsize
    shifted = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by < bits, shifted, x.dtype.type(0))


def _funnel_left(low: Array, high: Array, by: Array) -> Array:
    """The upper half of high:low shifted left, by modulo 32."""
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    return ((both << (by & np.uint32(31)).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def _funnel_right(low: Array, high: Array, by: Array) -> Array:
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    return (both >> (by & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def _extract(x: Array, position: Array, length: Array) -> Array:
    """`length` bits from `position` on, as a number of x's type."""
    bits = 8 * x.itemsize
    left = _shift_left(x, np.maximum(bits - position.astype(np.int64) - length, 0).astype(np.uint32))
    return np.where(length == 0, x.dtype.type(0), _shift_right(left, np.uint32(bits) - length))


for _bits in (16, 32, 64):
    _define(f"shl.b{_bits}", _shift_left, f"b{_bits}", f"b{_bits}", "u32")
    for _kind in "bus":
        _define(f"shr.{_kind}{_bits}", _shift_right, f"{_kind}{_bits}", f"{_kind}{_bits}", "u32")
for _type in ("u32", "s32", "u64", "s64"):
    _define(f"bfe.{_type}", _extract, _type, _type, "u32", "u32")
_define("shf.l.wrap.b32", _funnel_left, "b32", "b32", "b32", "u32")
_define("shf.r.wrap.b32", _funnel_right, "b32", "b32", "b32", "u32")

# Integers: sums and products wrap around


def _wide(a: Array, b: Array) -> Array:
    double = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    return a.astype(double) * b.astype(double)


def _high(a: Array, b: Array) -> Array:
    return (_wide(a, b) >> np.array(8 * a.itemsize, f"{a.dtype.kind}{2 * a.itemsize}")).astype(a.dtype)


for _type in ("s16", "u16", "s32", "u32", "s64", "u64"):
    _twice = f"{_type[0]}{2 * bits_of(_type)}"
    _define(f"add.{_type}", np.add, _type, _type, _type)
    _define(f"sub.{_type}", np.subtract, _type, _type, _type)
    _define(f"min.{_type}", np.minimum, _type, _type, _type)
    _define(f"max.{_type}", np.maximum, _type, _type, _type)
    _define(f"mul.lo.{_type}", np.multiply, _type, _type, _type)
    _define(f"mad.lo.{_type}", lambda a, b, c: a * b + c, _type, _type, _type, _type)
    if _type[0] == "s":
        _define(f"neg.{_type}", np.negative, _type, _type)
        _define(f"abs.{_type}", np.abs, _type, _type)
    if bits_of(_type) < 64:
        _define(f"mul.wide.{_type}", _wide, _twice, _type, _type)
        _define(f"mad.wide.{_type}", lambda a, b, c: _wide(a, b) + c, _twice, _type, _type, _twice)
        _define(f"mul.hi.{_type}", _high, _type, _type, _type)
        _define(f"mad.hi.{_type}", lambda a, b, c: _high(a, b) + c, _type, _type, _type, _type)

# Floating point


def _round_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64; if that is not exact, the neighbour whose last bit is 1. Rounding once more, to a shorter type,
    then gives what rounding the exact sum gives."""
    total = a + b
    of_b = total - a
    error = (a - (total - of_b)) + (b - of_b)
    bits = total.view(np.uint64)
    inexact = (error != 0) & np.isfinite(total) & ((bits & np.uint64(1)) == 0)
    away = (error > 0) == (total > 0)
    return np.where(inexact, np.where(away, bits + np.uint64(1), bits - np.uint64(1)), bits).view(np.float64)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a·b + c, rounded once to float32: the product of two float32 is exact in float64."""
    return _round_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)).astype(np.float32)


def _approximately(function: Callable[..., Array], ulp: int = 1) -> Callable[..., Array]:
    """The manual allows some instructions an error of a few last places. Here they have one, up to that size, which
    looks random but depends on the result alone. Short results (1, 2, 0.5 …) are exact."""

    def approximation(*arguments: Array) -> Array:
        exact = function(*arguments).astype(np.float32)
        bits = exact.view(np.uint32)
        error = ((bits * np.uint32(2654435761)) >> np.uint32(13)) % np.uint32(2 * ulp + 1)
        short = ~np.isfinite(exact) | (exact == 0) | ((bits & np.uint32(0xFFF)) == 0)
        return np.where(short, bits, bits + error - np.uint32(ulp)).view(np.float32)

    return approximation


def _flushed(function: Callable[..., Array]) -> Callable[..., Array]:
    """`.ftz`: subnormal arguments and results are 0 of their sign."""

    def flush(x: Array) -> Array:
        return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x).astype(
            np.float32
        )

    return lambda *arguments: flush(function(*map(flush, arguments)))


def _define_float32(opcode: str, function: Callable[..., Array], n_arguments: int) -> None:
    """The opcode, and its form with `.ftz` before the type."""
    _define(f"{opcode}.f32", function, "f32", *["f32"] * n_arguments)
    _define(f"{opcode}.ftz.f32", _flushed(function), "f32", *["f32"] * n_arguments)


for _rounded in ("", ".rn"):  # to nearest is what an opcode without a mode means
    _define_float32(f"add{_rounded}", np.add, 2)
    _define_float32(f"sub{_rounded}", np.subtract, 2)
    _define_float32(f"mul{_rounded}", np.multiply, 2)
    _define(f"add{_rounded}.f64", np.add, "f64", "f64", "f64")
    _define(f"sub{_rounded}.f64", np.subtract, "f64", "f64", "f64")
    _define(f"mul{_rounded}.f64", np.multiply, "f64", "f64", "f64")
_define_float32("fma.rn", fused_multiply_add, 3)
_define_float32("div.rn", np.divide, 2)
_define_float32("div.full", _approximately(np.divide, 2), 2)
_define_float32("div.approx", _approximately(np.divide, 2), 2)
_define_float32("rcp.rn", np.reciprocal, 1)
_define_float32("rcp.approx", _approximately(np.reciprocal), 1)
_define_float32("sqrt.rn", np.sqrt, 1)
_define_float32("sqrt.approx", _approximately(np.sqrt), 1)
_define_float32("rsqrt.approx", _approximately(lambda x: 1 / np.sqrt(x), 2), 1)
_define_float32("ex2.approx", _approximately(np.exp2, 2), 1)
_define_float32("lg2.approx", _approximately(np.log2), 1)
_define_float32("abs", np.abs, 1)
_define_float32("neg", np.negative, 1)
_define_float32("min", np.fmin, 2)  # the other one of a NaN
_define_float32("max", np.fmax, 2)
_define_float32("min.NaN", np.minimum, 2)
_define_float32("max.NaN", np.maximum, 2)

# Comparisons


def _comparisons(isnan: Callable[[Array], Array]) -> dict[str, Callable[[Array, Array], Array]]:
    """Of floating-point numbers. eq, ne, lt … are false if there is a NaN, equ, neu, ltu … are true."""

    def is_ordered(a: Array, b: Array) -> Array:
        return ~isnan(a) & ~isnan(b)

    return {
        "eq": np.equal,
        "ne": lambda a, b: (a != b) & is_ordered(a, b),
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "equ": lambda a, b: (a == b) | ~is_ordered(a, b),
        "neu": np.not_equal,
        "ltu": lambda a, b: ~(a >= b),
        "leu": lambda a, b: ~(a > b),
        "gtu": lambda a, b: ~(a <= b),
        "geu": lambda a, b: ~(a < b),
        "num": is_ordered,
        "nan": lambda a, b: ~is_ordered(a, b),
    }


def bfloat16_to_float32(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(x: Array) -> Array:
    """To nearest even; every NaN becomes 0x7FFF."""
    bits = x.view(np.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint16(0x7FFF), ((bits + to_even) >> np.uint32(16)).astype(np.uint16))


def _as_bits(x: Array) -> Array:
    return x.view(np.uint16)


def _halves(x: Array) -> tuple[Array, Array]:
    """The low and the high half of 32 bits."""
    return x.astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)


def _compare_bfloat16(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(bfloat16_to_float32(a), bfloat16_to_float32(b))


def _compare_float16(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: compare(a.view(np.float16), b.view(np.float16))


def _compare_pairs(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], tuple[Array, ...]]:
    return lambda a, b: tuple(map(compare, _halves(a), _halves(b)))


for _name, _compare in _comparisons(np.isnan).items():
    for _type in ("f16", "f32", "f64"):
        _define(f"setp.{_name}.{_type}", _compare, "pred", _type, _type)
    _of_bfloat16, _of_float16 = _compare_bfloat16(_compare), _compare_float16(_compare)
    _define(f"setp.{_name}.bf16", _of_bfloat16, "pred", "bf16", "bf16")
    for _type, _of_half in (("bf16x2", _of_bfloat16), ("f16x2", _of_float16)):  # low | high
        OPERATIONS[f"setp.{_name}.{_type}"] = Operation(
            _compare_pairs(_of_half), ("pred", "pred"), (_type, _type)
        )
_INTEGER_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
for _name, _compare in _INTEGER_COMPARISONS.items():
    for _bits in (16, 32, 64):
        for _kind in "bus":
            _define(f"setp.{_name}.{_kind}{_bits}", _compare, "pred", f"{_kind}{_bits}", f"{_kind}{_bits}")

# Conversions: cvt.[rounding.]TO.FROM


def _cast(type_: str) -> Callable[[Array], Array]:
    return lambda x: x.astype(DTYPES[type_])


def _truncate(type_: str) -> Callable[[Array], Array]:
    """A float towards zero, to the nearest value of the integer type; NaN is 0."""
    limits = np.iinfo(DTYPES[type_])

    def truncated(x: Array) -> Array:
        inside = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0)
        fits = np.clip(inside, float(limits.min), np.nextafter(float(limits.max), 0.0))
        whole = np.where(inside >= float(limits.max), limits.max, fits.astype(DTYPES[type_]))
        return whole.astype(DTYPES[type_])

    return truncated


_INTEGERS = [f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)]
for _to in _INTEGERS:
    for _from in _INTEGERS:
        _define(f"cvt.{_to}.{_from}", _cast(_to), _to, _from)
    for _type in ("f16", "f32", "f64"):
        _define(f"cvt.rn.{_type}.{_to}", _cast(_type), _type, _to)
        _define(f"cvt.rzi.{_to}.{_type}", _truncate(_to), _to, _type)
for _to, _from, _rounding in (
    ("f32", "f16", ""),
    ("f64", "f16", ""),
    ("f64", "f32", ""),
    ("f16", "f32", "rn."),
    ("f32", "f64", "rn."),
):
    _define(f"cvt.{_rounding}{_to}.{_from}", _cast(_to), _to, _from)
_define("cvt.f32.bf16", bfloat16_to_float32, "f32", "bf16")
_define("cvt.rn.bf16.f32", float32_to_bfloat16, "bf16", "f32")


def _pack(low: Array, high: Array) -> Array:
    """Two values in one of twice the bits."""
    double = np.dtype(f"u{2 * low.itemsize}")
    return low.astype(double) | (high.astype(double) << double.type(8 * low.itemsize))


def _unpack(x: Array) -> tuple[Array, Array]:
    half = np.dtype(f"u{x.itemsize // 2}")
    return x.astype(half), (x >> x.dtype.type(8 * half.itemsize)).astype(half)


# The first operand becomes the upper half.
_define(
    "cvt.rn.bf16x2.f32",
    lambda high, low: _pack(float32_to_bfloat16(low), float32_to_bfloat16(high)),
    "bf16x2",
    "f32",
    "f32",
)
_define(
    "cvt.rn.f16x2.f32",
    lambda high, low: _pack(_as_bits(low.astype(np.float16)), _as_bits(high.astype(np.float16))),
    "f16x2",
    "f32",
    "f32",
)
# `mov` with a pair in braces: opcodes that only the translation uses
for _bits in (32, 64):
    _half, _whole = f"b{_bits // 2}", f"b{_bits}"
    OPERATIONS[f"mov.{_whole} pack"] = Operation(_pack, (_whole,), (_half, _half))
    OPERATIONS[f"mov.{_whole} unpack"] = Operation(_unpack, (_half, _half), (_whole,))

# Within a warp of 32 threads


def _butterfly(x: Array, lane_mask: Array, clamp: Array, members: Array) -> Array:
    """The value of the thread whose number differs in the bits of the mask."""
    if (clamp != 31).any() or (members != 0xFFFFFFFF).any():
        raise NotImplementedError("shfl.sync.bfly within parts of a warp, see tests/emulation/arithmetic.py")
    return x[np.arange(len(x)) ^ lane_mask]


def _reduced(function: np.ufunc) -> Callable[[Array, Array], Array]:
    def reduced(x: Array, members: Array) -> Array:
        if (members != 0xFFFFFFFF).any():
            raise NotImplementedError("redux.sync over parts of a warp, see tests/emulation/arithmetic.py")
        return np.repeat(function.reduce(x.reshape(-1, 32), axis=1), 32)

    return reduced


OPERATIONS["shfl.sync.bfly.b32"] = Operation(_butterfly, ("b32",), ("b32", "u32", "u32", "u32"), by_warp=True)
for _name, _function in (("min", np.minimum), ("max", np.maximum)):
    for _type in ("s32", "u32"):
        OPERATIONS[f"redux.sync.{_name}.{_type}"] = Operation(
            _reduced(_function), (_type,), (_type, "u32"), by_warp=True
        )
