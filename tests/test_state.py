"""State: what it holds, that it survives, and that going on after a load gives the same bits as going on."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from elropt import ELRSGD, param_groups
from elropt.rules import RULES as SPECS
from elropt.rules import RuleState

from .every_rule import needs
from .nets import backward, bn_mlp, train


def test_which_backend_computes_is_not_loaded() -> None:
    net = bn_mlp(depth=2)
    saved = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    train(net, saved, range(2))
    optimizer = ELRSGD(net.parameters(), lr=0.3, foreach=True)
    optimizer.load_state_dict(saved.state_dict())
    assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["foreach"]) == (None, True)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.1, 0.9)
    train(net, optimizer, range(2, 4))


RULES = [(rule, granularity) for rule, spec in SPECS.items() for granularity in spec.granularities]


def make(net: nn.Module, rule: str | None, granularity: str = "layer", **kwargs: Any) -> ELRSGD:
    defaults: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    return ELRSGD(net.parameters(), rule=rule, granularity=granularity, **{**defaults, **kwargs})


def assert_same_bits(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("way", ["torch.save", "pickle", "deepcopy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rule", "granularity"), RULES, ids=str)
@pytest.mark.parametrize("stop", [1, 5, 30])
def test_going_on_after_a_stop(
    rule: str | None, granularity: str, dtype: torch.dtype, way: str, stop: int
) -> None:
    net = bn_mlp(dtype=dtype)
    optimizer = make(net, rule, granularity)
    train(net, optimizer, range(stop))
    if way == "torch.save":
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = bn_mlp(dtype=dtype, seed=1)
        resumed.load_state_dict(saved["net"])
        resumed_optimizer = make(resumed, rule, granularity)
        resumed_optimizer.load_state_dict(saved["optimizer"])
    elif way == "pickle":
        resumed, resumed_optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        resumed, resumed_optimizer = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(stop, stop + 20))
    train(resumed, resumed_optimizer, range(stop, stop + 20))
    assert_same_bits(net, resumed)


@pytest.mark.parametrize("rule", [rule for rule in SPECS if rule])
def test_rule_state_stays_float32_on_bfloat16_parameters(rule: str) -> None:
    net = bn_mlp(dtype=torch.bfloat16)
    optimizer = make(net, rule)
    train(net, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    other = make(bn_mlp(dtype=torch.bfloat16), rule)
    other.load_state_dict(saved)
    held = [
        (other.state[p], saved["state"][i])
        for i, p in enumerate(other.param_groups[0]["params"])
        if p.dim() > 1
    ]
    assert len(held) == 5
    for state, expected in held:
        assert state["momentum_buffer"].dtype == torch.bfloat16
        for key in RuleState._fields:
            assert state[key].dtype == torch.float32
            assert torch.equal(state[key], expected[key])


def test_loading_does_not_alias_the_rule_state() -> None:
    net = bn_mlp()
    optimizer = make(net, "warmup")
    train(net, optimizer, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other_net = bn_mlp()
    other = make(other_net, "warmup")
    other.load_state_dict(saved)
    train(other_net, other, range(2, 6))
    for key in RuleState._fields:
        assert torch.equal(saved["state"][0][key], kept["state"][0][key])


def test_older_states_load() -> None:
    net = bn_mlp()
    optimizer = make(net, "uniform")
    train(net, optimizer, range(2))
    saved = optimizer.state_dict()
    for key in ("rule", "project", "granularity", "fused", "foreach", "differentiable", "maximize"):
        del saved["param_groups"][0][key]
    resumed = copy.deepcopy(net)
    other = make(resumed, "uniform")
    other.load_state_dict(copy.deepcopy(saved))
    assert other.param_groups[0]["rule"] == "uniform"
    train(net, optimizer_with(net, saved), range(2, 4))
    train(resumed, other, range(2, 4))
    assert_same_bits(net, resumed)
    old_pickle = make(bn_mlp(), "uniform")
    del old_pickle.param_groups[0]["granularity"]
    del old_pickle.defaults["granularity"]
    assert pickle.loads(pickle.dumps(old_pickle)).param_groups[0]["granularity"] == "layer"


def optimizer_with(net: nn.Module, state: dict[str, Any]) -> ELRSGD:
    optimizer = make(net, "uniform")
    optimizer.load_state_dict(state)
    return optimizer


def test_groups_keep_their_flags_when_an_sgd_state_is_loaded() -> None:
    net = bn_mlp()
    sgd = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    train(net, sgd, range(2))
    groups = param_groups(net, torch.randn(16, 8))
    saved = torch.optim.SGD([{"params": g["params"]} for g in groups], lr=0.2, momentum=0.9).state_dict()
    optimizer = ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    optimizer.load_state_dict(saved)
    assert [g["scale_invariant"] for g in optimizer.param_groups] == [g["scale_invariant"] for g in groups]
    assert [g["name"] for g in optimizer.param_groups] == [g["name"] for g in groups]
    assert all(g["rule"] == "angle" and g["lr"] == 0.2 for g in optimizer.param_groups)


def test_user_hooks_on_load_are_honoured() -> None:
    net = bn_mlp()
    optimizer = make(net, "angle")
    train(net, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    other = make(bn_mlp(), "angle")

    def double_radius(_: object, state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        state["state"][0]["radius"] *= 2
        return state

    other.register_load_state_dict_pre_hook(double_radius)
    other.load_state_dict(saved)
    p = other.param_groups[0]["params"][0]
    assert torch.equal(other.state[p]["radius"], 2 * saved["state"][0]["radius"])


@pytest.mark.parametrize("rule", SPECS)
def test_the_scheduler_owns_lr(rule: str | None) -> None:
    net = bn_mlp()
    optimizer = make(net, rule)
    schedule = CosineAnnealingLR(optimizer, 10)
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.05)
    reference_schedule = CosineAnnealingLR(reference, 10)

    def both() -> None:
        schedule.step()
        reference.step()
        reference_schedule.step()
        assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]

    train(net, optimizer, range(8), both)


@pytest.mark.parametrize("rule", [rule for rule in SPECS if rule])
def test_late_groups_and_missing_gradients(rule: str) -> None:
    """A parameter that joins late or skips a step ends where it would if only its own steps existed."""
    net = bn_mlp()
    first, last = net[0], net[-1]
    optimizer = ELRSGD(
        [p for p in net.parameters() if p is not first.weight],
        lr=0.05,
        momentum=0.9,
        rule=rule,
        **needs(rule),
    )
    train(net, optimizer, range(3))
    optimizer.add_param_group({"params": [first.weight], "lr": 0.02})
    train(net, optimizer, range(3, 6))
    assert {p.shape for p in optimizer.state} >= {first.weight.shape, last.weight.shape}
    before = {name: p.clone() for name, p in net.named_parameters()}
    state = {key: value.clone() for key, value in optimizer.state[first.weight].items()}
    for _ in range(2):
        backward(net, 7)
        first.weight.grad = None
        optimizer.step()
    assert torch.equal(first.weight, before["0.weight"])
    for key in ("momentum_buffer", "sphere_grad_norm", "radius", "tracked"):
        assert torch.equal(optimizer.state[first.weight][key], state[key]), key
    assert not torch.equal(last.weight, before["12.weight"])
    backward(net, 8)
    optimizer.step()
    assert not torch.equal(first.weight, before["0.weight"])
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_a_copy_knows_which_parameters_it_was_given() -> None:
    vector, matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 3))
    optimizer = copy.deepcopy(ELRSGD([{"params": [vector], "scale_invariant": False}], rule="uniform"))
    optimizer.add_param_group({"params": [matrix]})
    (of_the_copy,) = optimizer.param_groups[0]["params"]
    for p in (of_the_copy, matrix):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(of_the_copy, torch.full((3,), 1 - optimizer.defaults["lr"]))
    assert not torch.equal(matrix, torch.ones(3, 3))
    assert torch.equal(vector, torch.ones(3))
