"""Beside the rule "equilibrium" what is not tracked moves by a limited share of its size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from elropt import ELRSGD, layer_stats

from .every_rule import skip_without_kernels
from .nets import backward, bn_mlp, invariant_weights
from .test_contract import BACKENDS

SGD = {"momentum": 0.9, "weight_decay": 5e-3}


def angle(lr: float) -> float:
    return math.sqrt(2 * lr * SGD["weight_decay"] / (1 + SGD["momentum"]))


def groups_of(net: nn.Sequential) -> list[dict[str, Any]]:
    tracked = invariant_weights(net)
    rest = [p for p in net.parameters() if not any(p is w for w in tracked)]
    return [{"params": tracked, "scale_invariant": True}, {"params": rest, "scale_invariant": False}]


def as_number(value: float) -> float:
    return value


class Protected:
    """One untracked parameter in float64: SGD whose displacement has a largest length."""

    def __init__(self, p: Tensor) -> None:
        self.p = p.detach().double().clone()
        self.m = torch.zeros_like(self.p)

    def step(self, grad: Tensor, lr: float, φ: float, *, nesterov: bool) -> float:
        """Returns how much of SGD's step it made."""
        μ, ω, w = SGD["momentum"], SGD["weight_decay"], self.p
        self.m = μ * self.m + grad.double() + ω * w
        u = grad.double() + ω * w + μ * self.m if nesterov else self.m
        own_decay = (1 + μ if nesterov else 1) * ω * w  # this step's decay is not counted
        size = max(w.norm().item(), math.sqrt(w.shape[0] / 3 if w.dim() >= 2 else w.numel()))
        share = min(1.0, float(φ * diffusion(nesterov) * size / (lr * (u - own_decay).norm())))
        self.p = w - lr * share * u
        return share


@pytest.mark.parametrize("kind", [as_number, torch.tensor])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("granularity", "nesterov"), [("layer", False), ("filter", True), ("network", False)]
)
@pytest.mark.parametrize("elr_of", ["update", "gradient"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rest_is_sgd_with_limited_displacements(
    backend: str, elr_of: str, granularity: str, nesterov: bool, bare: bool, kind: Any
) -> None:
    """Also as a schedule brings lr down. Some steps are held back, some are SGD's."""
    skip_without_kernels(BACKENDS[backend], "equilibrium")
    if bare and granularity == "filter":
        pytest.skip("there the head is held back filter by filter")
    options = {"nesterov": nesterov, "granularity": granularity, "elr_of": elr_of}
    net = bn_mlp(depth=2, width=8)
    params: Any = net.parameters() if bare else groups_of(net)
    optimizer = ELRSGD(params, lr=kind(1.0), rule="equilibrium", **SGD, **options, **BACKENDS[backend])
    schedule = LambdaLR(optimizer, lambda step: 10.0**-step)
    rest = [p for p in net.parameters() if not any(p is w for w in invariant_weights(net))]
    expected = [Protected(p) for p in rest]
    shares = []
    for step in range(4):
        now = 10.0**-step
        backward(net, step)
        for p, reference in zip(rest, expected, strict=True):
            assert p.grad is not None
            shares.append(reference.step(p.grad, now, angle_of(now, nesterov), nesterov=nesterov))
        optimizer.step()
        schedule.step()
        for p, reference in zip(rest, expected, strict=True):
            torch.testing.assert_close(p.double(), reference.p, rtol=1e-5, atol=1e-7)
            reference.p = p.detach().double().clone()
    assert min(shares) < 0.5
    assert max(shares) == 1


def coefficients(nesterov: bool) -> np.ndarray:
    """What an update gives to the gradients before it."""
    μ = SGD["momentum"]
    of_buffer = μ ** np.arange(2000)
    return μ * of_buffer + (np.arange(2000) == 0) if nesterov else of_buffer


def angle_of(lr: float, nesterov: bool) -> float:
    c = coefficients(nesterov)
    return math.sqrt(2 * lr * SGD["weight_decay"] * (c**2).sum() / c.sum())


def diffusion(nesterov: bool) -> float:
    """How far independent steps lead in relation to updates of the same length that momentum makes."""
    c = coefficients(nesterov)
    return np.linalg.norm(c) / c.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_switched_off_the_rest_is_sgd(backend: str) -> None:
    skip_without_kernels(BACKENDS[backend], "equilibrium")
    net, twin = bn_mlp(depth=2, width=8), bn_mlp(depth=2, width=8)
    optimizer = ELRSGD(groups_of(net), lr=1.0, rule="equilibrium", protect=False, **SGD, **BACKENDS[backend])
    rest, of_twin = groups_of(net)[1]["params"], groups_of(twin)[1]["params"]
    sgd = torch.optim.SGD(of_twin, lr=1.0, **SGD)
    for step in range(3):
        backward(net, step)
        for p, q in zip(rest, of_twin, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        sgd.step()
        for p, q in zip(rest, of_twin, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_the_largest_angle_is_the_limit_and_only_of_its_rule() -> None:
    weights = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    others = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    options: dict[str, Any] = {"rule": "equilibrium", "weight_decay": 0.01, "scale_invariant": True}
    groups = [
        {"params": [weights[0]], "lr": 0.1, **options},
        {"params": [weights[1]], "lr": 0.3, "tracked_lr": 0.2, **options},
        {"params": [weights[2]], "lr": 5.0, **options, "rule": "uniform"},
        {"params": [others[0]], **options, "scale_invariant": False},
        {"params": [others[1]], "scale_invariant": False, "rule": "uniform"},
    ]
    optimizer = ELRSGD(groups, lr=1.0)
    for p in (*weights, *others):
        p.grad = torch.ones_like(p)
    optimizer.step()
    # of a vector of size √2, whose gradient has that length too
    torch.testing.assert_close(-others[0], torch.full((2,), math.sqrt(2 * 0.2 * 0.01)))
    torch.testing.assert_close(-others[1], torch.ones(2))


def test_nothing_is_limited_where_nothing_is_tracked() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = ELRSGD([p], lr=1.0, rule="equilibrium", weight_decay=0.01)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, -torch.ones(3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_faulty_gradient_stays_in_its_parameter(value: float) -> None:
    def run(faulty: bool) -> list[Tensor]:
        net = bn_mlp(depth=2, width=8)
        optimizer = ELRSGD(groups_of(net), lr=1.0, rule="equilibrium", **SGD)
        for step in range(2):
            backward(net, step)
            if faulty:
                head = list(net.parameters())[-1]
                assert head.grad is not None
                head.grad.fill_(value)
            optimizer.step()
            if step == 0:  # only this parameter differs after one step
                break
        return [p.detach() for p in net.parameters()]

    for p, q in list(zip(run(True), run(False), strict=True))[:-1]:
        assert torch.equal(p, q)


def test_the_schedule_owns_lr_and_reports_say_what_was_applied() -> None:
    net = bn_mlp(depth=2)
    optimizer = ELRSGD(net.named_parameters(), lr=5.0, rule="equilibrium", **SGD)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    backward(net, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 5.0
    rest = [row for row in layer_stats(optimizer) if not row.tracked]
    assert {row.name for row in rest} == {
        name for name, p in net.named_parameters() if not any(p is w for w in invariant_weights(net))
    }
    after = dict(net.named_parameters())
    for row in rest:
        grad = after[row.name].grad
        assert grad is not None
        moved = (after[row.name].detach() - before[row.name]).norm().item()
        decayed = (grad + SGD["weight_decay"] * before[row.name]).norm().item()
        assert moved == pytest.approx(row.lr * decayed, rel=1e-4)
    assert min(row.lr for row in rest) < 5.0


def test_a_load_brings_it_along() -> None:
    def make(protect: bool | None) -> tuple[list[Tensor], ELRSGD]:
        net = bn_mlp(depth=2)
        optimizer = ELRSGD(net.parameters(), lr=0.5, rule="equilibrium", protect=protect, **SGD)
        backward(net, 0)
        optimizer.step()
        return list(net.parameters()), optimizer

    _, optimizer = make(False)
    _, other = make(None)
    with pytest.warns(UserWarning, match="protect=False in place of protect=None"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["protect"] is False


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_get_away_from_zero(backend: str) -> None:
    """A head that starts at zero has no size of its own."""
    skip_without_kernels(BACKENDS[backend], "equilibrium")
    w, head = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(3, 4))
    groups = [{"params": [w], "scale_invariant": True}, {"params": [head], "scale_invariant": False}]
    optimizer = ELRSGD(groups, lr=1.0, rule="equilibrium", **SGD, **BACKENDS[backend])
    w.grad, head.grad = torch.randn(4, 4), torch.ones(3, 4)
    optimizer.step()
    moved = angle_of(1.0, False) * diffusion(False) * 1.0  # √(3/3) is its least size
    assert head.norm().item() == pytest.approx(moved, rel=1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # by Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_too_large_for_its_norm_moves_nothing(backend: str) -> None:
    skip_without_kernels(BACKENDS[backend], "equilibrium")
    w, head = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3, 4))
    groups = [{"params": [w], "scale_invariant": True}, {"params": [head], "scale_invariant": False}]
    optimizer = ELRSGD(groups, lr=1.0, rule="equilibrium", **SGD, **BACKENDS[backend])
    before = head.detach().clone()
    w.grad, head.grad = torch.randn(4, 4), torch.full((3, 4), 1e30)
    optimizer.step()
    assert torch.equal(head, before)
