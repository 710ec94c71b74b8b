"""The sums of the foreach backend on the CPU against float64, and what is left out of them."""

from __future__ import annotations

import pytest
import torch

from elropt import ELRSGD, foreach, layer_stats, reference
from elropt.rules import RADIAL_TESTS

from .nets import backward, bn_mlp


def test_sums_are_those_of_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (), (0, 4), (300, 1000), (4, 3, 5, 5), (64, 100)]
    ws, gs, ms = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3))
    gs[3] += 0.01 * ws[3]
    ws[4] = ws[4].contiguous(memory_format=torch.channels_last)
    ws[5], gs[5] = ws[5].t(), gs[5].t().contiguous()
    ms[5] = ms[5].t()
    buffers = [None if i == 0 else m for i, m in enumerate(ms)]
    sums = foreach.measure(ws, gs, buffers)
    for i, (w, g, m) in enumerate(zip(ws, gs, buffers, strict=True)):
        w, g, m = (torch.zeros(()) if t is None else t for t in (w, g, m))
        for row, (a, b) in enumerate(((w, w), (g, g), (w, g), (w, m))):
            a, b = a.double(), b.double()
            error = abs(sums[row, i] - (a * b).sum()) / max(float(a.norm() * b.norm()), 1e-30)
            assert error < 1e-6, f"row {row} of tensor {i} is off by {error:.1e}"


def test_sums_of_tensors_of_several_dtypes_are_those_of_float64() -> None:
    ws = [torch.randn(40, 7, dtype=torch.float64), torch.randn(40, 7)]
    gs = [torch.randn(40, 7), torch.randn(7, 40, dtype=torch.float64).t()]
    ms: list[torch.Tensor | None] = [torch.randn(40, 7), torch.randn(40, 7, dtype=torch.float64)]
    sums = foreach.measure(ws, gs, ms)
    for i, (w, g, m) in enumerate(zip(ws, gs, ms, strict=True)):
        assert m is not None
        w, g, m = w.double(), g.double(), m.double()
        expected = torch.stack([(a * b).sum() for a, b in ((w, w), (g, g), (w, g), (w, m))])
        torch.testing.assert_close(sums[:, i].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("given", [True, None])
def test_the_dot_product_is_measured_where_a_test_or_a_record_needs_it(given: bool | None) -> None:
    net = bn_mlp(depth=2, width=4)
    tracked = [p for p in net.parameters() if p.dim() == 2]
    group = {"params": tracked} if given is None else {"params": tracked, "scale_invariant": given}
    optimizer = ELRSGD([group], lr=1.0, rule="uniform")
    measured, expected = [], []
    for step in range(20):
        backward(net, step)
        if step == 19:
            optimizer.record_next_step()
        in_test = [0 <= float(optimizer.state[p]["tracked"]) < RADIAL_TESTS for p in tracked if step > 0]
        expected.append(step == 19 or (given is None and (step == 0 or any(in_test))))
        optimizer.step()
        cosines = torch.tensor([row.radial_cosine for row in layer_stats(optimizer)])
        measured.append(bool(torch.isfinite(cosines).all()))
        assert measured[-1] or bool(torch.isnan(cosines).all())
    assert measured == expected
    assert not measured[18]


def test_the_filters_of_a_large_tensor_keep_factors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is updated in pieces only where one factor holds for all of it."""
    monkeypatch.setattr(foreach, "PIECE", 1)
    start = torch.randn(30, 100)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [
        ELRSGD(
            [{"params": [w], "scale_invariant": True}],
            lr=0.1, momentum=0.9, rule="uniform", granularity="filter", foreach=mode,
        )
        for w, mode in zip(weights, (True, False), strict=True)
    ]  # fmt: skip
    for _ in range(2):
        grad = torch.randn(30, 100) * torch.logspace(-2, 2, 30)[:, None]
        for w, optimizer in zip(weights, optimizers, strict=True):
            w.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [reference, foreach])
@pytest.mark.parametrize("per_filter", [False, True])
def test_sums_with_a_missing_buffer_are_zero_whatever_weight_and_gradient_are(
    backend: object, per_filter: bool
) -> None:
    w, g = torch.full((2, 3), torch.inf), torch.full((2, 3), torch.nan)
    sums = backend.measure([w], [g], [None], per_filter=per_filter, with_update=True)  # type: ignore[attr-defined]
    assert torch.equal(sums[3:], torch.zeros(3, 2 if per_filter else 1))
