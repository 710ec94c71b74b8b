"""Where torch.optim.SGD works, so does ELRSGD; with a rule it does, or refuses before anything changes.

What hooks keep in the state, parameters without data or entries, values that schedules set, wrappers that replace
parameters or step them one by one.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from elropt import ELRSGD, layer_stats
from elropt.rules import RULES as SPECS

from .every_rule import needs
from .nets import backward, bn_mlp, invariant_weights, train

RULES = list(SPECS)
BACKENDS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True},
    "triton": {"fused": True},
}


@pytest.mark.parametrize("rule", RULES)
def test_what_hooks_keep_in_the_state_passes_through(rule: str | None) -> None:
    """As timm's Lookahead and TRAC do: an entry of a parameter, a tensor or not, and global ones."""
    results = []
    for hooked in (False, True):
        net = bn_mlp(depth=2)
        optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, rule=rule, **needs(rule))
        p = net[0].weight

        def keep(optimizer: Any, *_: object, p: nn.Parameter = p) -> None:
            optimizer.state["ran_hook"] = True
            optimizer.state["trac"] = {"s": torch.ones(3)}
            optimizer.state[p]["slow_weights"] = p.detach().clone()
            optimizer.state[p]["count"] = optimizer.state[p].get("count", 0) + 1

        if hooked:
            optimizer.register_step_post_hook(keep)
        train(net, optimizer, range(3))
        other_net = bn_mlp(depth=2, seed=1)
        other_net.load_state_dict(net.state_dict())
        other = ELRSGD(other_net.parameters(), lr=0.05, momentum=0.9, rule=rule, **needs(rule))
        other.load_state_dict(optimizer.state_dict())
        train(other_net, other, range(3, 5))
        results.append(list(other_net.parameters()))
        if hooked:
            held = other.state[other_net[0].weight]
            assert torch.equal(held["slow_weights"], optimizer.state[p]["slow_weights"])
            assert held["count"] == 3
            assert other.state["ran_hook"] is True
            assert torch.equal(other.state["trac"]["s"], torch.ones(3))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_what_hooks_keep_costs_the_kernels_no_new_tables() -> None:
    net = bn_mlp(depth=1, width=4)
    optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, fused=True)

    def keep(*_: object) -> None:
        optimizer.state[net[0].weight]["slow_weights"] = net[0].weight.detach().clone()

    optimizer.register_step_post_hook(keep)
    train(net, optimizer, range(1))
    (rule_group,) = optimizer._rule_groups or []
    fused = rule_group.last.triton_step
    train(net, optimizer, range(1, 3))
    assert fused is not None
    assert rule_group.last.triton_step is fused
    optimizer.state[net[0].weight]["momentum_buffer"] = torch.zeros(4, 8)  # but another buffer is used
    train(net, optimizer, range(3, 4))
    assert rule_group.last.triton_step is not fused
    assert optimizer.state[net[0].weight]["momentum_buffer"].any()


def two_steps(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(2, 3)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_parameters_without_data(rule: str | None, foreach: bool) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "rule": rule, "foreach": foreach, **needs(rule)}
    with torch.device("meta"):
        net = nn.Linear(3, 4)
        two_steps(net, ELRSGD(net.parameters(), **options))
    with FakeTensorMode():
        net = nn.Linear(3, 4)
        optimizer = ELRSGD(net.parameters(), **options)
        two_steps(net, optimizer)
        assert optimizer.state[net.weight]["momentum_buffer"].shape == (4, 3)


@pytest.mark.parametrize("rule", [None, "warmup"])
def test_the_memory_tracker_of_torch(rule: str | None) -> None:
    peaks = []
    for make in (torch.optim.SGD, lambda params, **kw: ELRSGD(params, rule=rule, **kw)):
        with FakeTensorMode():
            net = nn.Linear(64, 3)
            optimizer = make(net.parameters(), lr=0.1, momentum=0.9)
            tracker = MemTracker()
            tracker.track_external(net, optimizer)
            with tracker:
                net(torch.randn(2, 64)).sum().backward()
                optimizer.step()
            peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")])
    sgd, ours = ({str(kind): n for kind, n in peak.items()} for peak in peaks)
    assert ours.keys() == sgd.keys()
    for kind, size in sgd.items():  # what a report or a rule remembers of a layer is a few numbers
        assert size <= ours[kind] <= size + (100 if rule is None else 3000), kind


@pytest.mark.parametrize("rule", RULES)
def test_lazy_parameters(rule: str | None) -> None:
    """A step before the first forward pass does nothing; from then on it is as if the module had never been lazy."""
    results = []
    for lazy in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LazyLinear(6) if lazy else nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, rule=rule, **needs(rule))
        optimizer.step()
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
        net(x)
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        assert ("tracked" in optimizer.state[net[0].weight]) == (rule is not None)
        results.append(list(net.parameters()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_warmup_does_not_wait_for_empty_tensors(backend: str, flagged: bool) -> None:
    net = bn_mlp(depth=2, width=4)
    empty = [nn.Parameter(torch.empty(shape)) for shape in ((0, 4), (4, 0), (0,))]
    weights = invariant_weights(net)
    groups: list[dict[str, Any]] = [{"params": [*weights, *empty]}]
    if flagged:
        groups[0]["scale_invariant"] = True
    optimizer = ELRSGD(groups, lr=1.0, rule="warmup", **BACKENDS[backend])  # turns by 0.1: 8 steps test
    gradients = [
        torch.randn(w.shape, generator=torch.Generator().manual_seed(i)) for i, w in enumerate(weights)
    ]
    with torch.no_grad():  # equal E, so that nothing but the empty tensors could hold it up
        for w in weights:
            w.div_(w.norm())
    for _ in range(12):
        for w, g in zip(weights, gradients, strict=True):
            tangent = g - (g * w.detach()).sum() / w.detach().square().sum() * w.detach()
            w.grad = 0.1 * tangent / (tangent.norm() * w.detach().norm())
        for p in empty:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.state[weights[0]]["handed_over"] == 1


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("momentum", 1.0, "momentum=1.0.*below 1"),
        ("momentum", -0.1, "momentum=-0.1.*at least 0"),
        ("lr", -0.1, "lr=-0.1.*at least 0"),
        ("lr", math.nan, "lr=nan"),
        ("weight_decay", math.inf, "weight_decay=inf"),
        ("dampening", math.nan, "dampening=nan.*finite"),
        ("momentum", 0, "nesterov=True needs momentum > 0"),
    ],
)
def test_values_that_become_invalid_change_nothing(rule: str, key: str, value: float, message: str) -> None:
    net, never = bn_mlp(depth=2), bn_mlp(depth=2)
    optimizer, other = (
        ELRSGD(n.parameters(), lr=0.05, momentum=0.9, nesterov=True, rule=rule, **needs(rule))
        for n in (net, never)
    )
    for n, o in ((net, optimizer), (never, other)):
        train(n, o, range(2))
    (group,) = optimizer.param_groups
    right, group[key] = group[key], value
    for _ in range(2):
        backward(net, 2)
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    group[key] = right
    train(net, optimizer, range(2, 4))
    train(never, other, range(2, 4))
    for p, q in zip(net.parameters(), never.parameters(), strict=True):
        assert torch.equal(p, q)
        for name, held in other.state[q].items():
            assert torch.equal(optimizer.state[p][name], held), name


def test_a_schedule_of_the_momentum_that_reaches_one() -> None:
    net = bn_mlp(depth=2)
    optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9)
    schedule = OneCycleLR(optimizer, 0.05, total_steps=8, base_momentum=0.85, max_momentum=1.0)
    with pytest.raises(ValueError, match=r"momentum=1\.0 is not valid with rule='warmup'"):
        train(net, optimizer, range(8), schedule.step)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_sgd_takes_what_sgd_takes_in_mid_run() -> None:
    results = []
    for make in (torch.optim.SGD, lambda params, **kw: ELRSGD(params, rule=None, **kw)):
        net = bn_mlp(depth=2)
        optimizer = make(net.parameters(), lr=0.05, momentum=0.9)
        train(net, optimizer, range(2))
        optimizer.param_groups[0].update(momentum=1.0, lr=-0.01)
        train(net, optimizer, range(2, 4))
        results.append(list(net.parameters()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


ANGLE = r"rule='angle' is to turn every tracked layer by 0\.5 radians.*lr=0\.5, .*give tracked_lr=0\.01"


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_an_angle_that_was_the_lr_of_sgd_warns_once(lr: float | torch.Tensor) -> None:
    net = bn_mlp(depth=2)
    with pytest.warns(UserWarning, match=ANGLE):
        optimizer = ELRSGD(net.parameters(), lr=lr, momentum=0.9, rule="angle")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.param_groups[0]["lr"] = 0.7
        backward(net, 0)
        optimizer.step()


def test_an_angle_that_a_schedule_sets_warns(recwarn: pytest.WarningsRecorder) -> None:
    net = bn_mlp(depth=2)
    optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, rule="angle")
    schedule = LambdaLR(optimizer, lambda step: 10.0 if step > 1 else 1.0)
    train(net, optimizer, range(2), schedule.step)
    assert not [w for w in recwarn if "radians" in str(w.message)]
    with pytest.warns(UserWarning, match=ANGLE):
        train(net, optimizer, range(2, 4), schedule.step)


def test_only_tracked_layers_have_an_angle(recwarn: pytest.WarningsRecorder) -> None:
    net = bn_mlp(depth=2)
    weights = invariant_weights(net)
    rest = [p for p in net.parameters() if all(p is not w for w in weights)]
    groups = [
        {"params": weights, "scale_invariant": True, "lr": 0.01},
        {"params": rest, "scale_invariant": False},
    ]
    train(net, ELRSGD(groups, lr=0.5, rule="angle"), range(1))
    assert not [w for w in recwarn if "radians" in str(w.message)]


def one_optimizer_each(net: nn.Module, rule: str | None, granularity: str = "layer") -> None:
    def follow(p: nn.Parameter) -> None:
        optimizer = ELRSGD([p], lr=0.01, rule=rule, granularity=granularity)

        def step(_: torch.Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)

    for p in net.parameters():
        follow(p)


@pytest.mark.parametrize(
    ("rule", "granularity"), [("warmup", "layer"), ("uniform", "layer"), ("angle", "network")]
)
def test_rules_that_compare_layers_refuse_an_optimizer_for_each(rule: str, granularity: str) -> None:
    net = bn_mlp(depth=2)
    one_optimizer_each(net, rule, granularity)
    before = [p.detach().clone() for p in net.parameters() if p.dim() > 1]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"rule='{rule}', granularity='{granularity}' compares layers"):
            backward(net, 0)
    for p, q in zip([p for p in net.parameters() if p.dim() > 1], before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("rule", [None, "angle", "sphere"])
def test_other_rules_may_have_an_optimizer_for_each(rule: str | None) -> None:
    net, other = bn_mlp(depth=2), bn_mlp(depth=2)
    one_optimizer_each(net, rule)
    optimizer = ELRSGD(other.parameters(), lr=0.01, rule=rule)
    for step in range(2):
        backward(net, step)
    train(other, optimizer, range(2))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def flatten(optimizer: torch.optim.Optimizer) -> None:
    """What DeepSpeed ZeRO makes of the groups of an optimizer, on one rank."""
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(nn.utils.parameters_to_vector(group["params"]).detach())]
        group["params"][0].grad = torch.ones_like(group["params"][0])


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize(
    "options", [{"rule": "warmup"}, {"rule": "angle"}, {"rule": None, "project": True}], ids=str
)
def test_flattened_parameters_are_refused(options: dict[str, Any], flagged: bool) -> None:
    net = bn_mlp(depth=2)
    groups: list[dict[str, Any]] = [{"params": invariant_weights(net)}]
    if flagged:
        groups[0]["scale_invariant"] = True
    optimizer = ELRSGD(groups, lr=0.01, **options)
    flatten(optimizer)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match="replaced by flattened ones, as DeepSpeed ZeRO"):
            optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)


def test_sgd_takes_flattened_parameters() -> None:
    optimizer = ELRSGD(bn_mlp(depth=2).parameters(), lr=0.5, rule=None)
    flatten(optimizer)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], before - 0.5)


def test_a_new_bias_in_a_group_of_biases_is_not_flattened() -> None:
    net, new = bn_mlp(depth=2), nn.Parameter(torch.ones(3))
    biases = [p for p in net.parameters() if p.dim() == 1]
    optimizer = ELRSGD([{"params": invariant_weights(net)}, {"params": biases}], lr=0.01)
    optimizer.param_groups[1]["params"].append(new)
    backward(net, 0)
    new.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(new, torch.full((3,), 0.99))


def test_a_group_that_keeps_its_vectors_is_not_flattened() -> None:
    net = bn_mlp(depth=2)
    optimizer = ELRSGD(net.parameters(), lr=0.01)
    vectors = [p for p in net.parameters() if p.dim() == 1]
    optimizer.param_groups[0]["params"] = vectors
    backward(net, 0)
    expected = [p.detach() - 0.01 * p.grad for p in vectors if p.grad is not None]
    optimizer.step()
    assert len(expected) == len(vectors)
    torch.testing.assert_close([p.detach() for p in vectors], expected)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["add_param_group", "unfreeze"])
def test_layers_that_come_after_the_warmup_are_in_every_report(way: str, backend: str, flagged: bool) -> None:
    """And are updated by SGD, bit for bit."""
    net = bn_mlp(depth=3, width=4)
    late, *early = invariant_weights(net)
    with torch.no_grad():
        late.mul_(30)  # E is 900 times smaller than that of the others
    flag = {"scale_invariant": True} if flagged else {}
    optimizer = ELRSGD([{"params": early, **flag}], lr=0.01, **BACKENDS[backend])
    if way == "unfreeze":
        optimizer.add_param_group({"params": [late], **flag})
        late.requires_grad_(False)
    train(net, optimizer, range(1))
    for p in early:  # as if the warm-up had ended
        optimizer.state[p]["handed_over"].fill_(1)
        optimizer.state[p]["tracked"].fill_(8)
    if way == "add_param_group":
        optimizer.add_param_group({"params": [late], **flag})
    late.requires_grad_(True)
    for step in range(1, 11):
        backward(net, step)
        expected = [p.detach().add(p.grad, alpha=-0.01) for p in (late, *early) if p.grad is not None]
        optimizer.step()
        for p, q in zip((late, *early), expected, strict=True):
            assert torch.equal(p, q) if backend != "triton" else torch.allclose(p, q, atol=1e-7)
    assert sum(row.tracked for row in layer_stats(optimizer)) == 3
    e = [(p.grad.norm() / p.norm()).item() for p in (late, *early) if p.grad is not None]
    assert layer_stats(optimizer).elr_spread == pytest.approx(max(e) / min(e), rel=1e-4)
