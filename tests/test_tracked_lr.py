"""`tracked_lr`: tracked layers train as if the lr of their group were tracked_lr·lr/(lr at first), whoever sets lr."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import SWALR

from elropt import ELRSGD, effective_lrs, kernels, layer_stats, param_groups
from elropt.rules import RULES

from .every_rule import acts_on_update, skip_without_kernels
from .nets import backward, bn_mlp, invariant_weights, train
from .test_contract import BACKENDS

SCHEDULES: dict[str, Callable[[ELRSGD], LRScheduler]] = {
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, total_steps=9),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=3),
    "CyclicLR": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=4),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 0.7**step),
}
RATIO = 0.1


def groups_of(net: nn.Sequential, **options: Any) -> list[dict[str, Any]]:
    weights = invariant_weights(net)
    rest = [p for p in net.parameters() if all(p is not w for w in weights)]
    return [
        {"params": weights, "scale_invariant": True, **options},
        {"params": rest, "scale_invariant": False},
    ]


def assert_same(net: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_whatever_sets_one_lr_for_all_groups_keeps_the_proportion(schedule: str) -> None:
    net = bn_mlp(depth=2)
    groups = param_groups(net, torch.randn(16, 8), tracked_lr=0.01)
    optimizer = ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    scheduler = SCHEDULES[schedule](optimizer)

    def check() -> None:
        lr = optimizer.param_groups[0]["lr"]
        assert all(group["lr"] == lr for group in optimizer.param_groups)
        for row in layer_stats(optimizer):
            expected = RATIO * lr if row.tracked else lr
            assert row.lr == pytest.approx(expected, rel=1e-6)
        assert list(effective_lrs(optimizer).values()) == pytest.approx([RATIO * lr] * 2, rel=1e-5)
        scheduler.step()

    train(net, optimizer, range(8), check)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_group_that_says_it_is_tracked_has_a_learning_rate_of_its_own(
    rule: str | None, backend: str
) -> None:
    """Bit for bit what it would be with two groups and two values of lr, whether lr changes or is a tensor."""
    skip_without_kernels(BACKENDS[backend], rule)
    results = []
    for own in (False, True):
        net = bn_mlp(depth=2, width=4)
        options = {"momentum": 0.9, "weight_decay": 1e-3, "rule": rule, **BACKENDS[backend]}
        if own:
            optimizer = ELRSGD(groups_of(net), lr=0.25, tracked_lr=0.0625, **options)
        else:
            optimizer = ELRSGD(groups_of(net, lr=0.0625), lr=0.25, **options)
        schedule = LambdaLR(optimizer, lambda step: 0.5 ** (step > 1))
        train(net, optimizer, range(4), schedule.step)
        results.append(net)
    assert_same(*results)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("rule", "project"), [(r, p) for r in RULES if r for p in (False, True) if not (p and acts_on_update(r))]
)
def test_bare_parameters_train_as_groups_do(rule: str, project: bool, foreach: bool) -> None:
    """Also with momentum and weight decay, and on both sides of the hand-over of the warm-up. (Of the update only
    without momentum, in which the decay of bare parameters is.)"""
    nets, optimizers = [], []
    momentum = 0.0 if acts_on_update(rule) else 0.9
    for bare in (False, True):
        net = bn_mlp(depth=2)
        params: Any = net.parameters() if bare else groups_of(net)
        optimizer = ELRSGD(
            params, lr=0.2, tracked_lr=0.02, momentum=momentum, weight_decay=1e-2, rule=rule, project=project,
            foreach=foreach,
        )  # fmt: skip
        optimizer.step()  # without gradients: what follows knows from the first step on what is tracked
        for p in net.parameters():
            if "tracked" in optimizer.state.get(p, {}):
                optimizer.state[p]["tracked"].fill_(8 if any(p is w for w in invariant_weights(net)) else -1)
        train(net, optimizer, range(10))
        for held in optimizer.state.values():
            if rule == "warmup" and "handed_over" in held:
                held["handed_over"].fill_(1)
        train(net, optimizer, range(10, 14))
        nets.append(net)
        optimizers.append(optimizer)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)
    if acts_on_update(rule):  # which has a factor on lr
        return
    lrs = [{row.name: row.lr for row in layer_stats(o) if row.tracked}.values() for o in optimizers]
    assert list(lrs[0]) == pytest.approx([0.02] * 2, rel=1e-6)
    assert list(lrs[1]) == pytest.approx([0.02] * 2, rel=1e-6)


def test_every_filter_has_it() -> None:
    net, other = bn_mlp(depth=2), bn_mlp(depth=2)
    options = {"lr": 0.2, "tracked_lr": 0.02, "momentum": 0.9, "rule": "uniform", "granularity": "filter"}
    train(net, ELRSGD(groups_of(net), **options), range(3))
    train(other, ELRSGD(other.parameters(), **options), range(3))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)


def test_the_cap_of_the_warmup_is_that_of_the_tracked_learning_rate() -> None:
    """What is capped is λE of tracked layers; the lr of the rest, here infinite in comparison, does not count."""
    angles = []
    for lr in (0.05, 5e5):
        net = bn_mlp(depth=2)
        for p in net.parameters():
            p.requires_grad_(p.dim() == 2)
        optimizer = ELRSGD(invariant_weights(net), lr=lr, tracked_lr=0.05, momentum=0.9)
        train(net, optimizer, range(1))
        angles.append(effective_lrs(optimizer))
    assert angles[0] == pytest.approx(angles[1], rel=1e-5)


def test_lr_as_a_tensor() -> None:
    results = []
    for lr in (0.25, torch.tensor(0.25)):
        net = bn_mlp(depth=2)
        optimizer = ELRSGD(groups_of(net), lr=lr, tracked_lr=0.0625, momentum=0.9, rule="uniform")

        def halve(optimizer: ELRSGD = optimizer) -> None:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].mul_(0.5 if group is optimizer.param_groups[0] else 1)  # one tensor for both
                else:
                    group["lr"] *= 0.5

        train(net, optimizer, range(4), halve)
        results.append(net)
    for p, q in zip(*(net.parameters() for net in results), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule])
def test_tensors_beside_it_where_the_layers_are_found(rule: str, name: str) -> None:
    results = []
    for kind in (float, torch.tensor):
        net = bn_mlp(depth=2)
        options = {"lr": 0.2, "weight_decay": 1e-2} | {name: kind({"lr": 0.2, "weight_decay": 1e-2}[name])}
        train(net, ELRSGD(net.parameters(), tracked_lr=0.02, momentum=0.9, rule=rule, **options), range(3))
        results.append(net)
    for p, q in zip(*(net.parameters() for net in results), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_the_proportion_survives_a_stop_in_the_middle_of_a_schedule(way: str) -> None:
    net = bn_mlp(depth=2)
    optimizer = ELRSGD(net.parameters(), lr=0.1, tracked_lr=0.01, momentum=0.9, rule="angle")
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    train(net, optimizer, range(3), schedule.step)
    if way == "pickle":
        resumed, other = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        resumed = copy.deepcopy(net)
        # made as at the start, and with another value: what is loaded holds
        other = ELRSGD(resumed.parameters(), lr=0.3, tracked_lr=0.07, momentum=0.9, rule="angle")
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(3, 5))
    train(resumed, other, range(3, 5))
    assert_same(net, resumed)
    assert list(effective_lrs(other).values()) == pytest.approx([0.01 / 8] * 2, rel=1e-5)


def test_states_from_before_it_existed() -> None:
    """There the lr of the tracked group was that of its layers; SGD's says nothing about them."""
    net = bn_mlp(depth=2)
    groups = param_groups(net, torch.randn(16, 8), tracked_lr=0.01)
    optimizer = ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["tracked_lr"]
        group.pop("reference_lr", None)
    old["param_groups"][0]["lr"] = 0.02
    optimizer.load_state_dict(copy.deepcopy(old))
    train(net, optimizer, range(1))
    assert list(effective_lrs(optimizer).values()) == pytest.approx([0.02] * 2, rel=1e-5)

    optimizer = ELRSGD(param_groups(net, torch.randn(16, 8), tracked_lr=0.01), lr=0.1, rule="angle")
    for group in old["param_groups"]:
        del group["rule"]
        group["lr"] = 0.05
    optimizer.load_state_dict(old)
    train(net, optimizer, range(1))
    assert list(effective_lrs(optimizer).values()) == pytest.approx([0.005] * 2, rel=1e-5)


def test_groups_with_other_learning_rates_keep_them_apart() -> None:
    """What the constructor gives holds at its lr: a group at half of that has half of it, one that joins late too."""
    net, late = bn_mlp(depth=2), bn_mlp(depth=1)
    first, second = invariant_weights(net)
    flag = {"scale_invariant": True}
    optimizer = ELRSGD(
        [{"params": [first], "lr": 0.05, **flag}, {"params": [second], "tracked_lr": 0.03, "lr": 0.2, **flag}],
        lr=0.1, tracked_lr=0.01, rule="angle",
    )  # fmt: skip
    optimizer.add_param_group({"params": invariant_weights(late), "lr": 0.01, **flag})
    for n in (net, late):
        for p in n.parameters():
            p.grad = torch.randn_like(p)
    optimizer.step()
    assert list(effective_lrs(optimizer).values()) == pytest.approx([0.005, 0.03, 0.001], rel=1e-5)


@pytest.mark.parametrize("foreach", [False, True, None])
def test_bare_groups_that_differ_in_it_alone_keep_it_apart(foreach: bool | None) -> None:
    net = bn_mlp(depth=2)
    first, second = (
        {"params": [p], "tracked_lr": lr} for p, lr in zip(invariant_weights(net), (0.01, 0.02), strict=True)
    )
    optimizer = ELRSGD([first, second], lr=0.1, rule="angle", foreach=foreach)
    before = [p.detach().clone() for p in invariant_weights(net)]
    train(net, optimizer, range(1))
    turns = [
        float((p.detach() - q).norm() / q.norm()) for p, q in zip(invariant_weights(net), before, strict=True)
    ]
    assert turns == pytest.approx([0.01, 0.02], rel=1e-3)


def test_it_may_be_set_in_mid_run() -> None:
    net = bn_mlp(depth=2)
    optimizer = ELRSGD(net.parameters(), lr=0.1, rule="angle")
    train(net, optimizer, range(1))
    optimizer.param_groups[0]["tracked_lr"] = 0.01
    train(net, optimizer, range(1, 2))
    assert list(effective_lrs(optimizer).values()) == pytest.approx([0.01] * 2, rel=1e-5)
    optimizer.param_groups[0]["tracked_lr"] = -1.0
    with pytest.raises(ValueError, match=r"tracked_lr=-1\.0 is not valid"):
        train(net, optimizer, range(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tracked_lr": -0.1}, r"tracked_lr=-0\.1 is not valid"),
        ({"tracked_lr": float("nan")}, "tracked_lr=nan is not valid"),
        ({"tracked_lr": "0.1"}, "tracked_lr='0.1' is not valid"),
        ({"tracked_lr": 0.1, "lr": 0}, r"tracked_lr=0\.1 is kept in proportion to lr, so lr=0"),
        ({"tracked_lr": 0.1, "rule": None}, r"tracked_lr=0\.1 with rule=None needs groups that say"),
        ({"tracked_lr": 0.1, "fused": True}, r"tracked_lr=0\.1 with fused=True needs groups that say"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ELRSGD(bn_mlp(depth=1).parameters(), **{"lr": 0.1, **options})
    optimizer = ELRSGD(bn_mlp(depth=1).parameters(), lr=0.1, rule="uniform")
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": list(bn_mlp(depth=1).parameters()), "lr": 0.1, **options})
    assert len(optimizer.param_groups) == 1


def test_a_refused_group_leaves_the_references_of_all_as_they_were() -> None:
    first, second = bn_mlp(depth=1), bn_mlp(depth=1)
    optimizer = ELRSGD([{"params": list(net.parameters())} for net in (first, second)], lr=0.1, rule="angle")
    for group in optimizer.param_groups:
        group["tracked_lr"] = 0.01
    optimizer.param_groups[1]["lr"] = 0.0
    backward(first, 0)
    with pytest.raises(
        ValueError, match=r"tracked_lr=0\.01 is kept in proportion to lr, so lr=0\.0 is not valid"
    ):
        optimizer.step()
    assert not any("reference_lr" in group for group in optimizer.param_groups)
    taken = {"params": [first[0].weight], "tracked_lr": 0.01}
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group(taken)
    assert "reference_lr" not in taken


@pytest.mark.parametrize("reference_lr", [0, -0.1, float("nan"), float("inf"), "0.1", None])
def test_a_reference_that_gives_no_proportion_is_refused(reference_lr: Any) -> None:
    group = {"params": list(bn_mlp(depth=1).parameters()), "tracked_lr": 0.01, "reference_lr": reference_lr}
    with pytest.raises(ValueError, match=r"reference_lr=.* is not valid: it must be finite and above 0"):
        ELRSGD([group], lr=0.1, rule="angle")


@pytest.mark.parametrize("rule", ["warmup", "angle"])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_without_a_gradient_of_any_layer_is_sgd(rule: str, foreach: bool) -> None:
    """Of bare parameters: biases alone, or layers that get no gradient at a step after the warm-up."""
    net, alone, reference = bn_mlp(depth=2), bn_mlp(depth=2), bn_mlp(depth=2)
    biases = [p for p in alone.parameters() if p.dim() < 2]
    optimizers = [
        ELRSGD(net.parameters(), lr=0.1, tracked_lr=0.01, rule=rule, foreach=foreach),
        ELRSGD(biases, lr=0.1, tracked_lr=0.01, rule=rule, foreach=foreach),
        torch.optim.SGD([p for p in reference.parameters() if p.dim() < 2], lr=0.1),
    ]
    if rule == "warmup":
        backward(net, 0)
        for p in net.parameters():
            p.grad = None if p.dim() < 2 else p.grad
        optimizers[0].step()
        for p in net.parameters():
            if p.dim() >= 2:
                optimizers[0].state[p]["handed_over"].fill_(1)
    for p, q, r in zip(net.parameters(), alone.parameters(), reference.parameters(), strict=True):
        for t in (p, q, r):
            t.grad = torch.ones_like(t) if t.dim() < 2 else None
    for optimizer in optimizers:
        optimizer.step()
    for p, q, r in zip(net.parameters(), alone.parameters(), reference.parameters(), strict=True):
        if p.dim() < 2:
            assert torch.equal(p, r)
            assert torch.equal(q, r)


def test_an_angle_is_judged_by_it() -> None:
    with pytest.warns(UserWarning, match=r"by 0\.3 radians .*lr=0\.1, tracked_lr=0\.3"):
        ELRSGD(bn_mlp(depth=1).parameters(), lr=0.1, tracked_lr=0.3, rule="angle")


@pytest.mark.skipif(not kernels.available(), reason="needs triton")
def test_grad_scaler_is_told_who_unscales() -> None:
    """The kernels do, but they do not take layers whose own learning rate only the device knows."""
    with FakeTensorMode():
        w = nn.Parameter(torch.empty(4, 3, device="cuda"))
    for group, ours in (
        ({}, True),
        ({"tracked_lr": 0.1}, False),
        ({"tracked_lr": 0.1, "scale_invariant": True}, True),
    ):
        assert ELRSGD([{"params": [w], **group}], lr=0.1)._step_supports_amp_scaling == ours
