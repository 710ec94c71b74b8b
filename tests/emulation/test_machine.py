"""The emulator itself, on kernels of a few lines: what it must report, and what it must not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from .arithmetic import OPERATIONS, bfloat16_to_float32, float32_to_bfloat16, fused_multiply_add
from .machine import Machine, Schedule
from .memory import UNWRITTEN, Fault
from .ptx import ORDERS, Program, UnknownPTX, parse

SEEDS = range(6)


def kernel(body: str, *, parameters: int = 1, threads: int = 32) -> Program:
    """Registers %r, %rd, %f, %rs and %p; parameter i is a pointer, p_param_i; %r0 the thread, %r1 the CTA."""
    declared = ",\n".join(f".param .u64 .ptr .global .align 1 p_param_{i}" for i in range(parameters))
    loads = "\n".join(f"ld.param.b64 %rd{90 + i}, [p_param_{i}];" for i in range(parameters))
    return parse(
        f".visible .entry p(\n{declared}\n)\n.reqntid {threads}\n{{\n.reg .pred %p<9>;\n.reg .b16 %rs<9>;\n"
        f".reg .b32 %r<99>;\n.reg .b64 %rd<99>;\nmov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\n{loads}\n"
        f"{body}\nret;\n}}\n"
    )


def launch(
    program: Program,
    *arrays: np.ndarray,
    grid: int = 1,
    shared: int = 0,
    schedule: Schedule | None = None,
    cooperative: bool = False,
) -> list[str]:
    """The reports."""
    machine = Machine(schedule=schedule or Schedule())
    parameters = []
    for i, array in enumerate(arrays):
        address = array.ctypes.data
        machine.memory.add(f"array {i}", address, array.nbytes)
        parameters.append(address.to_bytes(8, "little"))
    machine.launch(program, grid, shared, parameters, cooperative=cooperative)
    return list(machine.reports)


def test_every_thread_stores_its_number() -> None:
    out = np.zeros((3, 64), np.uint32)
    program = kernel(
        "mad.lo.u32 %r2, %r1, 64, %r0;\nmad.wide.u32 %rd1, %r2, 4, %rd90;\nst.global.b32 [ %rd1 + 0 ], { %r2 };",
        threads=64,
    )
    assert launch(program, out, grid=3, schedule=Schedule(seed=3, by_warp=True, quantum=2)) == []
    np.testing.assert_array_equal(out.ravel(), np.arange(192))


# CTA 0 writes data, then counts at a flag; the CTA that finds the flag counted reads the data.
MESSAGE = """
setp.ne.b32 %p1, %r0, 0;
@%p1 bra $end;
setp.ne.b32 %p2, %r1, 0;
@%p2 bra $receive;
mov.b32 %r2, 7;
st.global.b32 [%rd90], %r2;
atom.global.gpu.SENT.add.u32 %r3, [%rd91], 1;
bra.uni $end;
$receive:
atom.global.gpu.RECEIVED.add.u32 %r4, [%rd91], 0;
setp.eq.b32 %p3, %r4, 0;
@%p3 bra $receive;
ld.global.b32 %r5, [%rd90];
st.global.b32 [%rd90+4], %r5;
$end:
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("received", ORDERS)
@pytest.mark.parametrize("sent", ORDERS)
def test_a_message_needs_a_release_and_an_acquire(sent: str, received: str, seed: int) -> None:
    data, flag = np.array([1, 2], np.uint32), np.zeros(1, np.uint32)
    program = kernel(MESSAGE.replace("SENT", sent).replace("RECEIVED", received), parameters=2)
    reports = launch(program, data, flag, grid=2, schedule=Schedule(seed=seed, resident=2, quantum=4))
    is_ordered = sent in ("release", "acq_rel") and received in ("acquire", "acq_rel")
    assert any("race between CTAs" in report for report in reports) == (not is_ordered)
    assert data.tolist() == [7, 7]


@pytest.mark.parametrize("order", ["relaxed", "acquire"])
def test_a_flag_may_be_polled_by_loads(order: str) -> None:
    body = MESSAGE.replace("SENT", "release").replace(
        "atom.global.gpu.RECEIVED.add.u32 %r4, [%rd91], 0;", f"ld.global.gpu.{order}.b32 %r4, [%rd91];"
    )
    data, flag = np.array([1, 2], np.uint32), np.zeros(1, np.uint32)
    reports = launch(kernel(body, parameters=2), data, flag, grid=2, schedule=Schedule(resident=2, quantum=4))
    assert any("race between CTAs" in report for report in reports) == (order == "relaxed")


# CTA 0 sends, CTA 1 counts on in between with some order, CTA 2 receives at the second count.
CHAIN = (
    MESSAGE.replace("SENT", "release")
    .replace("RECEIVED", "acquire")
    .replace(
        "setp.ne.b32 %p2, %r1, 0;", "setp.eq.b32 %p4, %r1, 1;\n@%p4 bra $between;\nsetp.ne.b32 %p2, %r1, 0;"
    )
    .replace("setp.eq.b32 %p3, %r4, 0;", "setp.ne.b32 %p3, %r4, 2;")
    .replace(
        "$receive:", "$between:\natom.global.gpu.relaxed.add.u32 %r6, [%rd91], 1;\nbra.uni $end;\n$receive:"
    )
)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_relaxed_atomic_in_between_does_not_end_a_chain(seed: int) -> None:
    data, flag = np.array([1, 2], np.uint32), np.zeros(1, np.uint32)
    schedule = Schedule(seed=seed, resident=3, quantum=4)
    assert launch(kernel(CHAIN, parameters=2), data, flag, grid=3, schedule=schedule) == []


# As the message, but thread 0 receives for thread 33, with or without a barrier in between.
FOR_OTHERS = """
setp.ne.b32 %p2, %r1, 0;
@%p2 bra $receive;
setp.ne.b32 %p1, %r0, 33;
@%p1 bra $stored;
mov.b32 %r2, 7;
st.global.b32 [%rd90], %r2;
$stored:
FIRST
setp.eq.b32 %p1, %r0, 0;
@%p1 atom.global.gpu.acq_rel.add.u32 %r3, [%rd91], 1;
bra.uni $end;
$receive:
setp.eq.b32 %p1, %r0, 0;
@%p1 atom.global.gpu.acq_rel.add.u32 %r4, [%rd91], 0;
@%p1 st.shared.b32 [global_smem], %r4;
bar.sync 0;
ld.shared.b32 %r4, [global_smem];
SECOND
setp.eq.b32 %p3, %r4, 0;
@%p3 bra $receive;
setp.eq.b32 %p1, %r0, 33;
@%p1 ld.global.b32 %r5, [%rd90];
$end:
"""


@pytest.mark.parametrize("by_warp", [False, True])
@pytest.mark.parametrize(("first", "second"), [(True, True), (False, True), (True, False)])
def test_a_barrier_passes_on_what_one_thread_publishes_or_learns(
    first: bool, second: bool, by_warp: bool
) -> None:
    body = FOR_OTHERS.replace("FIRST", "bar.sync 0;" if first else "")
    program = kernel(body.replace("SECOND", "bar.sync 0;" if second else ""), parameters=2, threads=64)
    data, flag = np.array([1, 2], np.uint32), np.zeros(1, np.uint32)
    schedule = Schedule(seed=5, resident=2, quantum=4, by_warp=by_warp)
    reports = launch(program, data, flag, grid=2, shared=4, schedule=schedule)
    assert any("race between CTAs" in report for report in reports) == (not first)
    assert any("race in shared memory" in report for report in reports) == (not second)


def test_threads_of_a_cta_race_without_a_barrier() -> None:
    body = "mad.wide.u32 %rd1, %r0, 4, %rd90;\nst.global.b32 [%rd1], %r0;\nWAIT\nxor.b32 %r2, %r0, 1;\n"
    body += "mad.wide.u32 %rd2, %r2, 4, %rd90;\nld.global.b32 %r3, [%rd2];\n"
    data = np.zeros(32, np.uint32)
    assert launch(kernel(body.replace("WAIT", "bar.sync 0;")), data) == []
    (report,) = launch(kernel(body.replace("WAIT", "")), data)
    assert "race within a CTA" in report
    assert "array 0" in report


def test_what_a_thread_overwrites_after_a_barrier_others_may_have_read_before() -> None:
    body = "xor.b32 %r2, %r0, 1;\nmad.wide.u32 %rd1, %r0, 4, %rd90;\nmad.wide.u32 %rd2, %r2, 4, %rd90;\n"
    body += "ld.global.b32 %r3, [%rd2];\nWAIT\nst.global.b32 [%rd1], %r0;"
    data = np.zeros(32, np.uint32)
    assert launch(kernel(body.replace("WAIT", "bar.sync 0;")), data) == []
    (report,) = launch(kernel(body.replace("WAIT", "")), data)
    assert "race within a CTA" in report


def test_bytes_of_their_own_do_not_race() -> None:
    """Two CTAs write the halves of a word."""
    body = "cvt.u16.u32 %rs1, %r1;\nmad.wide.u32 %rd1, %r1, 2, %rd90;\nsetp.eq.b32 %p1, %r0, 0;\n"
    body += "@%p1 st.global.b16 [%rd1], %rs1;"
    data = np.full(2, 9, np.uint16)
    assert launch(kernel(body), data, grid=2) == []
    assert data.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%rd90+128], %r0;", "outside of all tensors.*0 bytes past the end of array 0"),
        ("ld.global.b64 %rd1, [%rd90+124];", "not aligned"),
        ("ld.global.b32 %r2, [%rd90+-4];", "outside of all tensors.*4 bytes before array 0"),
        ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd90+120];", "16 bytes is not aligned"),
        ("st.shared.b32 [global_smem+8], %r0;", "outside of the 8 of shared memory"),
        (
            "setp.eq.b32 %p1, %r0, 3;\n@%p1 bra $b;\nshfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;\n$b:",
            "part of a warp",
        ),
    ],
)
def test_what_a_gpu_stops_at_is_a_fault(body: str, message: str) -> None:
    data = np.zeros(36, np.uint32)[:32]
    with pytest.raises(Fault, match=message):
        launch(kernel(body), data[-data.ctypes.data % 16 // 4 :][:32], shared=8)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r2, [%rd90];", "unwritten memory is read"),
        ("ld.shared.b32 %r2, [global_smem];", "unwritten shared memory is read"),
        ("st.shared.b32 [global_smem], %r0;", "threads write different values to one place"),
        ("setp.eq.b32 %p1, %r0, 3;\n@%p1 bra $b;\nbar.sync 0;\n$b:", "threads end while others wait"),
    ],
)
def test_what_may_go_unnoticed_on_a_gpu_is_reported(body: str, message: str) -> None:
    (report,) = launch(kernel(body), np.array([UNWRITTEN], np.uint32), shared=8)
    assert message in report


# Everybody arrives, then waits for all.
GRID_BARRIER = """
setp.ne.b32 %p1, %r0, 0;
@%p1 bra $end;
atom.global.gpu.acq_rel.add.u32 %r2, [%rd90], 1;
$wait:
atom.global.gpu.acquire.add.u32 %r3, [%rd90], 0;
setp.lt.u32 %p2, %r3, 5;
@%p2 bra $wait;
$end:
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_grid_that_does_not_fit_deadlocks(seed: int) -> None:
    count = np.zeros(1, np.uint32)
    assert launch(kernel(GRID_BARRIER), count, grid=5, cooperative=True, schedule=Schedule(seed=seed)) == []
    with pytest.raises(Fault, match=r"deadlock.*all 4 CTAs"):
        launch(kernel(GRID_BARRIER), 0 * count, grid=5, schedule=Schedule(seed=seed, resident=4))


def test_a_cooperative_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(Fault, match="cooperative launch of 500 CTAs, 396 fit"):
        launch(kernel(GRID_BARRIER), np.zeros(1, np.uint32), grid=500, cooperative=True)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sin.approx.f32 %r2, %r0;", r"'sin\.approx\.f32' .*tests/emulation/arithmetic\.py"),
        ("ld.global.nc.b32 %r2, [%rd90];", r"'ld\.global\.nc\.b32' .*tests/emulation/ptx\.py"),
        ("atom.global.cta.acq_rel.add.u32 %r2, [%rd90], 1;", r"atom\.global\.cta.*tests/emulation/ptx\.py"),
        ("bar.sync 1;", r"'bar\.sync'.*tests/emulation/ptx\.py"),
        ("mov.u32 %r2, %clock;", r"operand %clock.*tests/emulation/ptx\.py"),
    ],
)
def test_what_it_does_not_know_is_named(body: str, message: str) -> None:
    with pytest.raises(UnknownPTX, match=message):
        kernel(body)


# Arithmetic, against other ways to compute it


def test_products_and_sums_are_rounded_once() -> None:
    """Against exact fractions, for cases in which rounding twice gives something else."""
    from fractions import Fraction

    random = np.random.default_rng(0)
    a, b = (random.standard_normal(2000).astype(np.float32) for _ in range(2))
    c = (-a * b * (1 + 2.0**-24 * random.integers(-3, 4, 2000))).astype(np.float32)
    c[1000:] = (a * 2.0 ** random.integers(-30, 30, 2000)).astype(np.float32)[1000:]
    for x, y, z, actual in zip(a, b, c, fused_multiply_add(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below, above = np.nextafter(actual, np.float32(-np.inf)), np.nextafter(actual, np.float32(np.inf))
        error = abs(Fraction(float(actual)) - exact)
        assert error <= min(abs(Fraction(float(n)) - exact) for n in (below, above))


def test_bfloat16_is_rounded_as_torch_does() -> None:
    import torch

    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    x = bits.view(np.float32)
    expected = torch.from_numpy(x.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(bfloat16_to_float32(float32_to_bfloat16(x)), expected)


U32, S32 = np.uint32, np.int32


@pytest.mark.parametrize(
    ("opcode", "arguments", "expected"),
    [
        ("shl.b32", (U32(1), U32(31)), 1 << 31),
        ("shl.b32", (U32(1), U32(32)), 0),
        ("shr.s32", (S32(-8), U32(40)), -1),
        ("shr.u32", (U32(2**31), U32(31)), 1),
        ("bfe.u32", (U32(0xABCD), U32(4), U32(8)), 0xBC),
        ("bfe.s32", (S32(0x0F0), U32(4), U32(4)), -1),
        ("mul.hi.u32", (U32(2**31), U32(6)), 3),
        ("mul.wide.s32", (S32(-3), S32(5)), -15),
        ("cvt.rzi.s32.f32", (np.float32(-2.7),), -2),
        ("cvt.rzi.s32.f32", (np.float32(1e20),), 2**31 - 1),
        ("cvt.rzi.u32.f32", (np.float32(-3),), 0),
        ("cvt.rzi.s32.f32", (np.float32(np.nan),), 0),
        ("setp.ltu.f32", (np.float32(np.nan), np.float32(0)), True),
        ("setp.ne.f32", (np.float32(np.nan), np.float32(0)), False),
        ("min.f32", (np.float32(np.nan), np.float32(2)), 2),
        ("mul.ftz.f32", (np.float32(1e-30), np.float32(1e-10)), 0),
        ("cvt.rn.bf16x2.f32", (np.float32(1), np.float32(-2)), 0x3F80C000),
        ("shf.l.wrap.b32", (U32(0x80000000), U32(1), U32(1)), 3),
    ],
)
def test_opcodes(opcode: str, arguments: tuple[np.generic, ...], expected: float) -> None:
    with np.errstate(all="ignore"):
        actual = OPERATIONS[opcode].function(*[np.array([x]) for x in arguments])
    assert actual[0] == expected


def test_approximations_are_off_by_the_last_places_only() -> None:
    x = np.random.default_rng(0).uniform(1, 8, 1000).astype(np.float32)
    functions: dict[str, Callable[..., np.ndarray]] = {"sqrt.approx.f32": np.sqrt, "ex2.approx.f32": np.exp2}
    for opcode, function in functions.items():
        actual = OPERATIONS[opcode].function(x)
        error = np.abs(actual - function(x.astype(np.float64))) / np.spacing(actual)
        assert 0.6 < error.max() < 3


def test_a_butterfly_exchanges_within_the_warp() -> None:
    out = np.zeros(64, np.uint32)
    body = "shfl.sync.bfly.b32 %r2, %r0, 5, 31, -1;\nmad.wide.u32 %rd1, %r0, 4, %rd90;\nst.global.b32 [%rd1], %r2;"
    assert launch(kernel(body, threads=64), out) == []
    np.testing.assert_array_equal(out, np.arange(64) ^ 5)


def test_a_matrix_is_loaded_row_by_row() -> None:
    """ldmatrix.x1: threads 0 to 7 name rows of 16 bytes, thread t gets 4 bytes of row t // 4."""
    out = np.zeros(32, np.uint32)
    body = (
        "shl.b32 %r2, %r0, 2;\nst.shared.b32 [%r2], %r0;\nbar.sync 0;\nand.b32 %r3, %r0, 7;\nxor.b32 %r3, %r3, 7;\n"
        "shl.b32 %r3, %r3, 4;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3];\n"
        "mad.wide.u32 %rd1, %r0, 4, %rd90;\nst.global.b32 [%rd1], %r4;"
    )
    assert launch(kernel(body), out, shared=128) == []
    np.testing.assert_array_equal(out.reshape(8, 4), np.arange(32).reshape(8, 4)[::-1])
