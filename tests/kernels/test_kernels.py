"""The Triton backend against float64 and torch.optim.SGD: compiled where there is CUDA, else interpreted."""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from elropt import kernels

if not kernels.available():
    pytest.skip("triton is not installed", allow_module_level=True)

from elropt.kernels import tables
from elropt.kernels.args import Factors, Hypers, Rows, Scratch
from elropt.kernels.update import update_kernel

from .counting import bytes_touched

measure_module = importlib.import_module("elropt.kernels.measure")  # the package's `measure` is the function
DEVICE = tables.DEVICE_TYPE
INTERPRETED = DEVICE == "cpu"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a CUDA device nor TRITON_INTERPRET=1", allow_module_level=True)

GUARD, GUARD_VALUE = (
    8,
    1e4,
)  # before and after every tensor: sums would show a read there, and a comparison a write
SIZES = [0, 1, 2, 27, 63, 64, 65, 200]  # around CHUNK = 64

# Relative error of one rounding on storing; the interpreter truncates to bfloat16.
STORE_EPS = {
    torch.float32: 2**-24,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
}
FLOAT32_EPS = 2**-23
ARITHMETIC_ROUNDINGS = 12  # at most, in one step, each relative to the sum of the magnitudes of all terms

PLAIN: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
}
DTYPES = [
    (w, g, m)
    for w in (torch.float32, torch.bfloat16, torch.float16)
    for g in dict.fromkeys((w, torch.float32))
    for m in dict.fromkeys((w, torch.float32))
]


@contextlib.contextmanager
def chunks_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "CHUNK", size)
        yield


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Shape:
    """A shape in some memory order, `shift` elements off a 16-byte boundary."""

    size: tuple[int, ...]
    order: str = "contiguous"
    shift: int = 0

    def random(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """A normal tensor amid guard values."""
        n = math.prod(self.size)
        start = GUARD + self.shift
        storage = torch.full((start + n + GUARD,), GUARD_VALUE, dtype=dtype, device=DEVICE)
        flat = storage[start : start + n]
        flat.copy_(torch.randn(n, generator=generator))
        if self.order == "transposed":
            return flat.view(self.size[::-1]).permute(*reversed(range(len(self.size))))
        if self.order == "channels_last":
            n, c, h, w = self.size
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(self.size)

    @property
    def dim0_outermost(self) -> bool:
        return self.order != "transposed" or len(self.size) < 2


def assert_guards_are_intact(*ts: Tensor | None) -> None:
    for t in ts:
        if t is not None:
            storage = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
            start, n = t.storage_offset(), t.numel()
            guards = torch.cat([storage[:start], storage[start + n :]])
            assert (guards == storage.new_tensor(GUARD_VALUE)).all()


shapes = st.one_of(
    st.builds(lambda n, k: Shape((n,), shift=k), st.sampled_from(SIZES), st.integers(0, 5)),
    st.builds(lambda k: Shape((), shift=k), st.integers(0, 5)),
    st.builds(
        lambda a, b, order, k: Shape((a, b), order, k),
        st.integers(0, 5),
        st.sampled_from([0, 1, 3, 16, 65]),
        st.sampled_from(["contiguous", "transposed"]),
        st.sampled_from([0, 1]),
    ),
    st.builds(
        lambda size, order: Shape(size, order),
        st.tuples(st.integers(1, 4), st.sampled_from([1, 3, 16]), st.integers(1, 3), st.integers(1, 3)),
        st.sampled_from(["contiguous", "transposed", "channels_last"]),
    ),
)


def sgd_float64(
    w, g, m, *, lr, momentum, dampening, weight_decay, nesterov, maximize, s=1.0, a=1.0, p=0.0, f=1.0
) -> tuple[Tensor, Tensor]:
    """The specification in float64: the new w and the new m (without momentum, m means nothing)."""
    w, g = a * w.double(), (-g if maximize else g).double()
    g = s * g + weight_decay * w
    m = g if m is None else momentum * m.double() + (1 - dampening) * g
    u = g if momentum == 0 else g + momentum * m if nesterov else m
    return w - lr * f * (u - p * w), m


def assert_one_step(
    actual_w, actual_m, w, g, m, *, lr, momentum, maximize, s=1.0, a=1.0, p=0.0, f=1.0, **hyper
) -> None:
    """Each element is as close to float64 as float32 arithmetic and one rounding allow."""
    expected = sgd_float64(w, g, m, lr=lr, momentum=momentum, maximize=maximize, s=s, a=a, p=p, f=f, **hyper)
    magnitude = sgd_float64(
        w.abs(),
        g.abs(),
        None if m is None else m.abs(),
        lr=-lr,
        momentum=momentum,
        maximize=False,
        s=abs(s),
        a=abs(a),
        p=-abs(p),
        f=abs(f),
        **hyper,
    )
    pairs = [(actual_w, expected[0], magnitude[0])]
    if momentum != 0:
        pairs.append((actual_m, expected[1], magnitude[1]))
    for name, (actual, exact, size) in zip("wm", pairs, strict=False):
        bound = STORE_EPS[actual.dtype] * (exact.abs() + torch.finfo(actual.dtype).smallest_normal)
        bound += ARITHMETIC_ROUNDINGS * FLOAT32_EPS * size
        error = (actual.double() - exact).abs()
        assert (error <= bound).all(), (
            f"{name}: error {error.max():.2e}, {(error / bound).nan_to_num().max():.2f}×"
        )


@st.composite
def update_cases(draw: st.DrawFn) -> dict[str, Any]:
    some_shapes = draw(st.lists(shapes, min_size=1, max_size=4))
    momentum = draw(st.sampled_from([0.0, 0.9]))
    vectors = draw(st.sets(st.sampled_from(["grad_factor", "weight_factor", "radial", "lr_factor"])))
    return {
        "shapes": some_shapes,
        "dtypes": draw(
            st.lists(st.sampled_from(DTYPES), min_size=len(some_shapes), max_size=len(some_shapes))
        ),
        "have_buffer": draw(st.lists(st.booleans(), min_size=len(some_shapes), max_size=len(some_shapes))),
        "rows": draw(
            st.lists(
                st.sampled_from(["none", "whole", "filters"]),
                min_size=len(some_shapes),
                max_size=len(some_shapes),
            )
        ),
        "vectors": vectors,
        "lr_as": draw(st.sampled_from(["float", "float32", "float64"])),
        "hyper": {
            "lr": draw(st.sampled_from([1e-3, 0.1, 1.7])),
            "momentum": momentum,
            "dampening": draw(st.sampled_from([0.0, 0.3])),
            "weight_decay": draw(st.sampled_from([0.0, 5e-4, 0.1])),
            "nesterov": momentum != 0 and draw(st.booleans()),
            "maximize": draw(st.booleans()),
        },
        "chunk": draw(st.sampled_from([16, 64, 4096])),
        "seed": draw(st.integers(0, 2**20)),
    }


@settings(deadline=None, max_examples=50 if INTERPRETED else 15)  # each is compiled anew on a GPU
@given(update_cases())
def test_update_agrees_with_float64(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    ws, gs, ms = [], [], []
    for shape, dtypes, have in zip(case["shapes"], case["dtypes"], case["have_buffer"], strict=True):
        w, g, m = (shape.random(generator, dtype) for dtype in dtypes)
        ws, gs, ms = [*ws, w], [*gs, g], [*ms, m if have else None]

    # Rows in reverse order with a gap before each; entries that belong to no tensor are NaN.
    rows, n_rows = [], 0
    for shape, kind in reversed(list(zip(case["shapes"], case["rows"], strict=True))):
        count = shape.size[0] if kind == "filters" and shape.size and shape.dim0_outermost else 1
        rows.insert(0, None if kind == "none" else (n_rows + 1, count))
        n_rows += 1 + count
    factors: dict[str, Tensor] = {}
    for name in sorted(case["vectors"]):
        values = 1 + 0.5 * torch.rand(n_rows, generator=generator)
        factors[name] = torch.full((n_rows,), torch.nan)
        for row in rows:
            if row is not None:
                factors[name][row[0] : sum(row)] = values[row[0] : sum(row)]

    hyper, lr = case["hyper"], case["hyper"]["lr"]
    if case["lr_as"] != "float":
        lr = torch.tensor(lr, dtype=getattr(torch, case["lr_as"]), device=DEVICE)
    before = [[None if t is None else t.clone() for t in ts] for ts in (ws, gs, ms)]
    buffers = list(ms)
    with chunks_of(case["chunk"]), poisoned_allocations():
        kernels.update(
            ws,
            gs,
            buffers,
            **{**hyper, "lr": lr},
            **{name: vector.to(DEVICE) for name, vector in factors.items()},
            rows=rows,
        )

    assert_guards_are_intact(*ws, *gs, *ms)
    symbols = {"grad_factor": "s", "weight_factor": "a", "radial": "p", "lr_factor": "f"}
    for i, row in enumerate(rows):
        w, g, m = (ts[i] for ts in before)
        sapf = {}
        if row is not None:
            view = (row[1], *[1] * (w.dim() - 1)) if row[1] != 1 else ()
            sapf = {
                symbols[k]: v[row[0] : sum(row)].view(view).double().to(DEVICE) for k, v in factors.items()
            }
        assert_one_step(ws[i], buffers[i], w, g, m, **hyper, **sapf)
        torch.testing.assert_close(gs[i], g, rtol=0, atol=0)
        if hyper["momentum"] == 0:
            assert buffers[i] is ms[i]
            assert m is None or torch.equal(ms[i], m)
        else:
            assert buffers[i].dtype == (g if m is None else m).dtype
            assert m is None or buffers[i] is ms[i]


@settings(deadline=None, max_examples=25 if INTERPRETED else 10)
@given(
    st.lists(st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([16, 64, 4096]),
    st.integers(0, 2**20),
)
@example([(Shape((n,)), DTYPES[0], True) for n in SIZES], False, True, True, 64, 0)
@example([(Shape((n, 27)), DTYPES[0], True) for n in (0, 1, 5, 17)], True, True, False, 64, 0)
def test_measure_agrees_with_float64(
    specs, per_filter: bool, with_buffers: bool, with_update: bool, chunk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if per_filter:
        specs = [spec for spec in specs if spec[0].dim0_outermost]
    ws = [shape.random(generator, w) for shape, (w, _, _), _ in specs]
    gs = [shape.random(generator, g) for shape, (_, g, _), _ in specs]
    ms = [shape.random(generator, m) if have else None for shape, (_, _, m), have in specs]
    with chunks_of(chunk), poisoned_allocations():
        sums = kernels.measure(
            ws, gs, ms if with_buffers else None, per_filter=per_filter, with_update=with_update
        )

    expected, size = [], []
    for w, g, m in zip(ws, gs, ms, strict=True):
        n = w.shape[0] if per_filter and w.dim() > 0 else 1
        m = torch.zeros_like(w) if m is None or not with_buffers else m
        w, g, m = (t.double().reshape(n, w.numel() // max(n, 1)) for t in (w, g, m))
        pairs = [(w, w), (g, g), (w, g), (w, m), *([(m, m), (g, m)] if with_update else [])]
        expected.append(torch.stack([(x * y).sum(1) for x, y in pairs]))
        size.append(torch.stack([(x * y).abs().sum(1) for x, y in pairs]))
    assert sums.dtype == torch.float32
    assert sums.is_contiguous()
    if expected:
        assert sums.shape == torch.cat(expected, 1).shape
        assert ((sums.double() - torch.cat(expected, 1)).abs() <= 1e-6 * torch.cat(size, 1)).all()


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, True), (0.9, 0.0, False), (0.9, 0.5, False)],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_three_steps_agree_with_torch_sgd(momentum, dampening, nesterov, weight_decay, maximize) -> None:
    hyper = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov, "weight_decay": weight_decay}
    generator = torch.Generator().manual_seed(0)
    ws = [Shape(size).random(generator) for size in [(4097,), (3, 5), ()]]
    theirs = [w.clone().requires_grad_() for w in ws]
    optimizer = torch.optim.SGD(theirs, lr=0.1, maximize=maximize, foreach=False, **hyper)
    buffers: list[Tensor | None] = [None] * len(ws)
    for step in range(3):
        grads = [torch.randn(w.shape, generator=generator).to(DEVICE) for w in ws]
        chosen = [0, 1] if step == 1 else [0, 1, 2]  # no gradient for the last one at the second step
        mine = [buffers[i] for i in chosen]
        kernels.update(
            [ws[i] for i in chosen], [grads[i] for i in chosen], mine, lr=0.1, maximize=maximize, **hyper
        )
        for i, m in zip(chosen, mine, strict=True):
            buffers[i] = m
        for i, w in enumerate(theirs):
            w.grad = grads[i] if i in chosen else None
        optimizer.step()
    for i, w in enumerate(theirs):
        torch.testing.assert_close(ws[i], w.detach(), rtol=1e-6, atol=1e-6)
        if momentum != 0:
            torch.testing.assert_close(
                buffers[i], optimizer.state[w]["momentum_buffer"], rtol=1e-6, atol=1e-6
            )


def test_neutral_factors_and_lr_tensors_change_no_bit() -> None:
    zero = torch.zeros(3, device=DEVICE)
    lr = torch.tensor(0.1, device=DEVICE)
    variants: list[dict[str, Any]] = [
        {},
        {"lr": lr},
        {"lr": lr.double()},
        {"lr": torch.tensor([0.1])},
        {"grad_factor": zero + 1},
        {"weight_factor": zero + 1},
        {"radial": zero},
        {"lr_factor": zero + 1},
        {"lr": lr, "grad_factor": zero + 1, "weight_factor": zero + 1, "radial": zero, "lr_factor": zero + 1},
        {"grad_factor": torch.stack([zero + 1, zero], 1)[:, 0]},
    ]
    results = []
    for variant in variants:
        generator = torch.Generator().manual_seed(0)
        ws, gs, ms = ([Shape((65, 64)).random(generator), Shape((3,)).random(generator)] for _ in range(3))
        kernels.update(ws, gs, ms, **{**PLAIN, "weight_decay": 0.01, **variant}, rows=[(1, 1), None])
        results.append([*ws, *ms])
    for variant, result in zip(variants, results, strict=True):
        assert all(map(torch.equal, result, results[0])), variant


def test_integer_hyper_parameters_mean_floats() -> None:
    w, g = torch.ones(5, device=DEVICE), torch.full((5,), 2.0, device=DEVICE)
    kernels.update([w], [g], [None], **{**PLAIN, "lr": 1, "momentum": 0, "dampening": 0, "weight_decay": 1})
    assert w.tolist() == [1.0 - (2.0 + 1.0)] * 5


def test_measure_gives_the_same_bits_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    ws, gs = ([Shape((n,)).random(generator) for n in (5000, 1001, 64)] for _ in range(2))
    with chunks_of(64), pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:  # 79, 16 and 1 partial sums: full passes and a rest, full passes alone, a rest alone
            patch.setattr(measure_module, "PARTIALS_PER_LOAD", 4)
            patch.setattr(measure_module, "LOADS_PER_PASS", 2)
        first, second = kernels.measure(ws, gs), kernels.measure(ws, gs)
    assert torch.equal(first, second)
    exact = [
        torch.stack([(a.double() * b.double()).sum() for a, b in zip(x, y, strict=True)])
        for x, y in ((ws, ws), (gs, gs), (ws, gs))
    ]
    torch.testing.assert_close(first[:2].double(), torch.stack(exact[:2]), rtol=1e-6, atol=0)
    scale = (exact[0] * exact[1]).sqrt()
    torch.testing.assert_close(first[2].double() / scale, exact[2] / scale, rtol=0, atol=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="changes constants that are compiled in")
def test_the_order_of_the_partial_sums_does_not_depend_on_how_many_are_loaded_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    w, g = (Shape((16 * 301,)).random(generator) for _ in range(2))
    monkeypatch.setattr(measure_module, "PARTIALS_PER_LOAD", 4)
    results = []
    with chunks_of(16):
        for loads in (1, 2, 8):
            monkeypatch.setattr(measure_module, "LOADS_PER_PASS", loads)
            results.append(kernels.measure([w], [g]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.slow
def test_sums_over_1e8_elements_are_accurate() -> None:
    w, g = (torch.rand(100_000_007, device=DEVICE) for _ in range(2))
    sums = kernels.measure([w], [g]).double().flatten()
    for i, (x, y) in enumerate([(w, w), (g, g), (w, g)]):
        exact = sum(
            (a.double() * b.double()).sum() for a, b in zip(x.split(2**22), y.split(2**22), strict=True)
        )
        assert abs(sums[i] / exact - 1) < 1e-6


@pytest.mark.parametrize("chunk", [16, 4096])
def test_many_tiny_tensors(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [Shape((n % 6,), shift=n % 3) for n in range(120)]
    ws, gs, ms = ([shape.random(generator) for shape in shapes] for _ in range(3))
    before = [[t.clone() for t in ts] for ts in (ws, gs, ms)]
    with chunks_of(chunk), poisoned_allocations():
        sums = kernels.measure(ws, gs, ms)
        kernels.update(ws, gs, ms, **PLAIN)
    assert_guards_are_intact(*ws, *gs, *ms)
    for i, (w, g, m) in enumerate(zip(*before, strict=True)):
        assert_one_step(ws[i], ms[i], w, g, m, **PLAIN)
        pairs = ((w, w), (g, g), (w, g), (w, m))
        exact = torch.stack([(a.double() * b.double()).sum() for a, b in pairs])
        torch.testing.assert_close(sums[:, i].double(), exact, rtol=1e-5, atol=1e-6)


def test_non_finite_gradients_show_up_in_their_row_alone() -> None:
    w, m = (torch.ones(3, 70, device=DEVICE) for _ in range(2))
    g = w.clone()
    g[0, 3], g[2, 65] = torch.nan, torch.inf
    sums = kernels.measure([w], [g], [m], per_filter=True, with_update=True)
    assert sums[[0, 3, 4]].tolist() == [[70.0] * 3] * 3
    for row in sums[[1, 2, 5]]:
        assert row[0].isnan()
        assert row[1] == 70
        assert row[2] == torch.inf


def test_empty_lists() -> None:
    assert kernels.can_use([], [], [])
    assert kernels.measure([], []).shape == (4, 0)
    assert kernels.measure([], [], with_update=True).shape == (6, 0)
    kernels.update([], [], [], **PLAIN)


def test_writes_are_visible_to_autograd() -> None:
    w, g, m = (torch.ones(3, device=DEVICE) for _ in range(3))
    versions = w._version, g._version, m._version
    kernels.measure([w], [g], [m])
    assert (w._version, g._version, m._version) == versions
    kernels.update([w.requires_grad_()], [g], [m], **PLAIN)
    assert w._version > versions[0]
    assert g._version == versions[1]
    assert m._version > versions[2]


@pytest.mark.skipif(not INTERPRETED, reason="counts the interpreter's loads and stores")
@pytest.mark.parametrize(
    ("call", "dtype", "expected"),
    [  # bytes per element that are read of (w, g, m) and written to (w, m)
        ("update", torch.float32, (4, 4, 4, 4, 4)),
        ("update with factors", torch.float32, (4, 4, 4, 4, 4)),
        ("update without momentum", torch.float32, (4, 4, 0, 4, 0)),
        ("update, new buffer", torch.float32, (4, 4, 4, 4, 4)),
        ("update", torch.bfloat16, (2, 2, 2, 2, 2)),
        ("measure", torch.float32, (4, 4, 0, 0, 0)),
        ("measure with buffers", torch.float32, (4, 4, 4, 0, 0)),
        ("measure with buffers and update", torch.float32, (4, 4, 4, 0, 0)),
        ("measure per filter", torch.bfloat16, (2, 2, 0, 0, 0)),
    ],
)
def test_bytes_moved(call: str, dtype: torch.dtype, expected: tuple[int, ...], monkeypatch) -> None:
    w, g, m = (torch.ones(7, 65, dtype=dtype) for _ in range(3))
    buffers: list[Tensor | None] = [None if call == "update, new buffer" else m]
    monkeypatch.setattr(torch, "full_like", lambda t, value: m.fill_(value))
    monkeypatch.setattr(tables, "CHUNK", 64)
    with bytes_touched([w, g, m]) as touched:
        if call.startswith("measure"):
            kernels.measure(
                [w],
                [g],
                [m] if "buffers" in call else None,
                per_filter="filter" in call,
                with_update="update" in call,
            )
        else:
            vectors = (
                dict.fromkeys(["grad_factor", "weight_factor", "radial", "lr_factor"], torch.ones(1))
                if "factors" in call
                else {}
            )
            momentum = 0.0 if "without" in call else 0.9
            kernels.update([w], [g], buffers, **{**PLAIN, "momentum": momentum}, **vectors, rows=[(0, 1)])
    n = w.numel()
    reads = [touched["read", i] / n for i in range(3)]
    writes = [touched["write", i] / n for i in (0, 2)]
    assert (*reads, *writes) == expected
    assert touched["write", 1] == 0
    if call.startswith("update"):
        has = [None if "without" in call else m]
        assert sum(touched.values()) == kernels.bytes_moved([w], [g], has)
    else:
        measured = "all" if "buffers" in call else "both"
        both = kernels.bytes_moved([w], [g], [m], measure=measured)
        assert sum(touched.values()) == both - kernels.bytes_moved([w], [g], [m])


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.ones(*shape, dtype=dtype, device=DEVICE) for _ in range(3)]


def refused() -> dict[str, tuple[list[Tensor | None], str]]:
    """[w, g, m] that the kernels refuse, and what the message says."""
    w, g, m = tensors(4, 6)
    gaps = torch.ones(4, 12, device=DEVICE)[:, ::2]
    return {
        "float64": ([w.double(), g.double(), m.double()], "parameter has dtype torch.float64"),
        "integer": ([w.int(), g, m], "parameter has dtype torch.int32"),
        "complex": ([w.cfloat(), g, m], "parameter has dtype torch.complex64"),
        "bfloat16 gradient": ([w, g.bfloat16(), m], "gradient has dtype torch.bfloat16"),
        "float16 buffer": ([w.bfloat16(), g.bfloat16(), m.half()], "buffer has dtype torch.float16"),
        "shape": ([w, g[:3].contiguous(), m], "gradient has shape"),
        "transposed gradient": ([w, torch.ones(6, 4, device=DEVICE).t(), m], "gradient has strides"),
        "transposed buffer": ([w, g, torch.ones(6, 4, device=DEVICE).t()], "buffer has strides"),
        "gaps": ([gaps, gaps.clone(), m], "parameter is not dense"),
        "overlapping": ([w, g[:1].expand(4, 6), m], "gradient is not dense"),
        "sparse": ([w, g.to_sparse(), m], "gradient is a torch.sparse_coo tensor"),
        "subclass": ([w, g.as_subclass(Odd), m], "gradient is a Odd"),
        "negated view": ([w, torch._neg_view(g), m], "gradient is a lazily negated"),
        "device": ([w.to("meta"), g.to("meta"), m.to("meta")], "parameter is on meta"),
        "gradient's device": ([w, g.to("meta"), m], "gradient is on meta"),
    }


class Odd(Tensor):
    pass


@pytest.mark.parametrize("case", sorted(refused()))
def test_refused_tensors(case: str) -> None:
    (w, g, m), words = refused()[case]
    fine = tensors(3)
    assert not kernels.can_use([w], [g], [m])
    assert not kernels.can_use([fine[0], w], [fine[1], g], [fine[2], m])
    buffers = [fine[2], m]
    before = [t.clone() for t in fine]
    with pytest.raises(ValueError, match=f"tensor 1: .*{words}"):
        kernels.update([fine[0], w], [fine[1], g], buffers, **PLAIN)
    with pytest.raises(ValueError, match=f"tensor 1: .*{words}"):
        kernels.measure([fine[0], w], [fine[1], g], buffers)
    assert all(map(torch.equal, fine, before))
    assert buffers[1] is m


@pytest.mark.parametrize("dtypes", DTYPES)
def test_accepted_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    w, g, m = (torch.ones(3, device=DEVICE, dtype=dtype) for dtype in dtypes)
    assert kernels.can_use([w], [g], [m])
    assert kernels.can_use([torch.nn.Parameter(w)], [g], [None])


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t.view(2, 2, 3, 2).to(memory_format=torch.channels_last),
        lambda t: t.flatten()[1:],
        lambda t: t[:0],
        lambda t: t[0, 0],
        lambda t: t[:, :1].contiguous().as_strided((4, 1), (1, 99)),
    ],
    ids=[
        "contiguous",
        "transposed",
        "channels_last",
        "odd offset",
        "empty",
        "0-dim",
        "any stride for size 1",
    ],
)
def test_accepted_strides(view) -> None:
    w, g, m = map(view, tensors(4, 6))
    assert kernels.can_use([w], [g], [m])
    kernels.update([w], [g], [m], **{**PLAIN, "momentum": 0.0})
    torch.testing.assert_close(w, torch.full_like(w, 0.9))


def test_lists_of_different_length_are_refused() -> None:
    w, g, m = tensors(3)
    for call in (
        lambda: kernels.update([w], [g, g], [m], **PLAIN),
        lambda: kernels.update([w], [g], [m, m], **PLAIN),
        lambda: kernels.measure([w], []),
        lambda: kernels.can_use([w], [g], []),
    ):
        with pytest.raises(ValueError, match=r"zip\(\) argument"):
            call()
    assert w.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lr": torch.ones(2)}, ValueError, r"lr has shape \(2,\)"),
        ({"weight_decay": torch.tensor(0.1)}, TypeError, "weight_decay is a tensor"),
        ({"radial": torch.ones(4, 1)}, ValueError, "radial is 2-dimensional"),
        ({"grad_factor": torch.ones(4, dtype=torch.bfloat16)}, ValueError, "grad_factor is .*bfloat16"),
        ({"weight_factor": torch.ones(4, device="meta")}, ValueError, "weight_factor is .*meta"),
        (
            {"grad_factor": torch.ones(4), "radial": torch.ones(5)},
            ValueError,
            "lengths {'grad_factor': 4, 'radial': 5}",
        ),
        ({"grad_factor": torch.ones(4), "rows": [(0, 3)]}, ValueError, "given 3 rows, allowed are 1 or.* 4"),
        ({"grad_factor": torch.ones(4), "rows": [(1, 4)]}, ValueError, "rows 1 to 4 are not among the 4"),
        ({"grad_factor": torch.ones(4), "rows": [(-1, 1)]}, ValueError, "rows -1 to -1 are not among the 4"),
        ({"grad_factor": torch.ones(4), "rows": [(0, 1), (0, 1)]}, ValueError, r"zip\(\) argument"),
    ],
)
def test_refused_arguments_change_nothing(change: dict[str, Any], error: type[Exception], words: str) -> None:
    w, g, _ = tensors(4, 6)
    moved = {
        k: v.to(DEVICE) if isinstance(v, Tensor) and v.device.type == "cpu" else v for k, v in change.items()
    }
    buffers: list[Tensor | None] = [None]
    with pytest.raises(error, match=words):
        kernels.update([w], [g], buffers, **{**PLAIN, **moved})
    assert buffers == [None]
    assert (w == 1).all()


def test_rows_per_filter_need_dimension_0_outermost() -> None:
    w, g, m = (t.t() for t in tensors(4, 6))
    assert kernels.can_use([w], [g], [m])
    assert not kernels.can_use([w], [g], [m], per_filter=True)
    assert kernels.can_use([w.t()], [g.t()], [m.t()], per_filter=True)
    with pytest.raises(ValueError, match="tensor 0: a row per index of dimension 0 needs it outermost"):
        kernels.measure([w], [g], per_filter=True)
    with pytest.raises(ValueError, match="tensor 0: a row per index of dimension 0 needs it outermost"):
        kernels.update([w], [g], [m], **PLAIN, grad_factor=torch.ones(6, device=DEVICE), rows=[(0, 6)])
    assert (w == 1).all()


def test_tables_are_built_again_only_if_something_changed() -> None:
    storage = torch.arange(1.0, 25.0, device=DEVICE)
    other = torch.full((24,), 2.0, device=DEVICE)
    w, g = storage.view(4, 6), other.view(4, 6)
    tables._cached_tables.cache_clear()

    def misses_of(call) -> int:
        before = tables._cached_tables.cache_info().misses
        call()
        return tables._cached_tables.cache_info().misses - before

    def filter_norms(w: Tensor, g: Tensor) -> list[float]:
        return kernels.measure([w], [g], per_filter=True)[0].tolist()

    assert misses_of(lambda: filter_norms(w, g)) == 1
    assert misses_of(lambda: filter_norms(storage.view(4, 6), g)) == 0
    # the same addresses with another shape, then a smaller one
    assert (
        filter_norms(storage.view(2, 12), other.view(2, 12)) == storage.view(2, 12).square().sum(1).tolist()
    )
    assert filter_norms(storage[:6].view(2, 3), other[:6].view(2, 3)) == [14.0, 77.0]
    # the same shape and parameter, another gradient
    assert misses_of(lambda: filter_norms(w, g.clone())) == 1
    # the same memory as another dtype
    halves = storage.view(torch.bfloat16)
    expected = halves.double().nan_to_num().square().sum()
    measured = kernels.measure([halves], [halves])[0, 0].double()
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=0)
    # a buffer is made at the first step
    buffers: list[Tensor | None] = [None]
    step = lambda: kernels.update([w], [g], buffers, **PLAIN)  # noqa: E731
    assert [misses_of(step) for _ in range(3)] == [1, 0, 0]
    torch.testing.assert_close(buffers[0], torch.full_like(g, 2 * (1 + 0.9 + 0.81)))


def test_a_gradient_that_is_none_for_a_step() -> None:
    ws, gs = ([torch.ones(5, device=DEVICE), torch.ones(7, device=DEVICE)] for _ in range(2))
    buffers: list[Tensor | None] = [None, None]
    kernels.update(ws, gs, buffers, **PLAIN)
    last = [buffers[1]]
    kernels.update(ws[1:], gs[1:], last, **PLAIN)
    assert last[0] is buffers[1]
    kernels.update(ws, gs, buffers, **PLAIN)
    assert buffers[0] is not None
    assert buffers[1] is not None
    torch.testing.assert_close(buffers[0], torch.full((5,), 1.9, device=DEVICE))
    torch.testing.assert_close(buffers[1], torch.full((7,), 2.71, device=DEVICE))


def test_the_cache_is_bounded_and_keeps_no_tensor_alive() -> None:
    w, g, m = tensors(5)
    kernels.measure([w], [g], [m])
    kernels.update([w], [g], [m], **PLAIN)
    alive = [weakref.ref(t) for t in (w, g, m)]
    del w, g, m
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]
    maxsize = tables._cached_tables.cache_info().maxsize
    assert maxsize is not None
    for n in range(maxsize + 3):
        kernels.measure(tensors(n)[:1], tensors(n)[:1])
    assert tables._cached_tables.cache_info().currsize == maxsize


def test_offsets_beyond_32_bits() -> None:
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    rows, length = 3, 2**31
    layout = tables.Layout(4096, torch.float32, device, (rows, length), (length, 1))
    (table,) = tables.tables_for((tables.Triple(layout, layout, None),), rows=[(0, rows)], n_rows=rows)
    per_row = length // tables.CHUNK
    assert table.addresses.tolist() == [
        [4096 + i * length * 4, 4096 + i * length * 4, 0] for i in range(rows)
    ]
    assert table.segments.tolist() == [[length, i * per_row, i, 0] for i in range(rows)]
    assert table.n_chunks == table.n_measured == rows * per_row
    assert table.elements == rows * length
    assert table.chunk_segment[[0, per_row - 1, per_row, -1]].tolist() == [0, 0, 1, 2]
    tables._cached_tables.cache_clear()


def test_offsets_beyond_32_bits_in_the_kernels() -> None:
    """The last chunk of a tensor of 2³¹ + 100 elements. Only this chunk is in memory."""
    n = 2**31 + 100
    w, g = (Shape((n % tables.CHUNK,)).random(torch.Generator().manual_seed(i)) for i in range(2))
    before, missing = w.clone(), (n // tables.CHUNK) * tables.CHUNK * 4
    layouts = [tables.Layout(t.data_ptr() - missing, t.dtype, t.device, (n,), (1,)) for t in (w, g)]
    table = tables.build_table([tables.Triple(*layouts, None)], [(0, 1)], [0], tables.CHUNK)
    table.segments[0, 1] = -(table.n_chunks - 1)  # the one program that is launched works on the last chunk
    partials = torch.full((1, 4), torch.nan, device=DEVICE)
    sums, counters = torch.empty(7, 1, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    measure_module.measure_kernel[(1,)](
        table.arguments, Scratch(partials, sums, counters), 1, 1, 0, None, None, 0, Rows(), None, Hypers(),
        RULE=None, WHOLE=False, PROJECT=False, MAXIMIZE=False, HAS_BUFFERS=False,
        **table.constexprs, num_warps=tables.NUM_WARPS,
    )  # fmt: skip
    torch.testing.assert_close(partials[0, 0], w.square().sum())
    torch.testing.assert_close(partials[0, 2], (w * g).sum())
    update_kernel[(1,)](
        table.arguments, (0.5,), Hypers(), Factors(), None, None, None, None,
        SUMS=0, NESTEROV=False, MAXIMIZE=False, **table.constexprs, num_warps=tables.NUM_WARPS,
    )  # fmt: skip
    torch.testing.assert_close(w, before - 0.5 * g)
    assert_guards_are_intact(w, g)
