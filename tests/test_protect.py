"""Beside the rule "equilibrium" what is not tracked takes at most the angle of the tracked layers as learning rate."""

from __future__ import annotations

import math
from typing import Any

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


@pytest.mark.parametrize("kind", [as_number, torch.tensor])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("protect", [None, True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [0.1, 1e-3])
def test_the_rest_is_sgd_with_a_limited_learning_rate(
    lr: float, backend: str, protect: bool | None, bare: bool, kind: Any
) -> None:
    """Also as the schedule of lr goes on, of which the limit is the root; where lr is less than the angle, it is lr."""
    skip_without_kernels(BACKENDS[backend], "equilibrium")
    if backend == "triton" and bare:
        pytest.skip("refused")
    net, twin = bn_mlp(depth=2, width=8), bn_mlp(depth=2, width=8)
    params: Any = net.parameters() if bare else groups_of(net)
    optimizer = ELRSGD(params, lr=kind(lr), rule="equilibrium", protect=protect, **SGD, **BACKENDS[backend])
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rest = groups_of(twin)[1]["params"]
    sgd = torch.optim.SGD(rest, lr=1.0, **SGD)
    tracked = dict(zip(invariant_weights(net), invariant_weights(twin), strict=True))
    for step in range(3):
        backward(net, step)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        now = lr / (1 + step)
        sgd.param_groups[0]["lr"] = now if protect is False else min(now, angle(now))
        before = [w.detach().double() for w in tracked]
        optimizer.step()
        sgd.step()
        schedule.step()
        for w, v in zip(tracked, before, strict=True):
            turned = torch.acos(torch.cosine_similarity(w.detach().double().flatten(), v.flatten(), dim=0))
            assert turned.item() == pytest.approx(angle(now), rel=1e-3)
        others = [p for p in net.parameters() if not any(p is w for w in tracked)]
        for p, q in zip(others, rest, strict=True):
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
    torch.testing.assert_close(-others[0], torch.full((2,), math.sqrt(2 * 0.2 * 0.01)))
    torch.testing.assert_close(-others[1], torch.ones(2))


def test_nothing_is_limited_where_nothing_is_tracked() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = ELRSGD([p], lr=1.0, rule="equilibrium", weight_decay=0.01)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, -torch.ones(3))


def test_the_schedule_owns_lr_and_reports_say_what_was_applied() -> None:
    net = bn_mlp(depth=2)
    optimizer = ELRSGD(net.named_parameters(), lr=0.5, rule="equilibrium", **SGD)
    backward(net, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    (head,) = [row for row in layer_stats(optimizer) if not row.tracked]
    assert head.lr == pytest.approx(angle(0.5), rel=1e-6)


def test_the_kernels_refuse_bare_parameters_with_the_remedy() -> None:
    skip_without_kernels({"fused": True}, "equilibrium")
    p = nn.Parameter(torch.randn(3, 3))
    with pytest.raises(ValueError, match=r"protect.*scale_invariant.*foreach=True or fused=None"):
        ELRSGD([p], lr=0.1, rule="equilibrium", fused=True, **SGD)


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
