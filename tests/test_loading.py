"""What cannot be loaded: the error names what is wrong and the remedy, and the optimizer goes on as if never asked."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elropt import ELRSGD
from elropt.rules import RULES as SPECS

from .every_rule import needs
from .nets import bn_mlp, train

State = dict[str, Any]
RULES = [(rule, granularity) for rule, spec in SPECS.items() for granularity in spec.granularities]


def make(rule: str | None = "angle", granularity: str = "layer", **kwargs: Any) -> tuple[nn.Module, ELRSGD]:
    """A net after three steps."""
    net = bn_mlp(depth=2)
    options = {"lr": 0.05, "momentum": 0.9, "rule": rule, "granularity": granularity, **needs(rule), **kwargs}
    optimizer = ELRSGD(net.parameters(), **options)
    train(net, optimizer, range(3))
    return net, optimizer


def state_of(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> State:
    """What another optimizer saves after two steps on the same net."""
    net = bn_mlp(depth=2)
    other = optimizer(list(net.parameters()))
    train(net, other, range(2))
    return other.state_dict()


class SGDP(torch.optim.SGD):
    """The options and the state of the SGDP of the pytorch-optimizer package, whose buffer is called `momentum`."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        for group in self.param_groups:
            group.update(eps=1e-8, delta=0.1, wd_ratio=0.1)

    def state_dict(self) -> State:
        saved = super().state_dict()
        saved["state"] = {i: {"momentum": s["momentum_buffer"]} for i, s in saved["state"].items()}
        return saved


def set_state(key: str, value: Any) -> Callable[[State], None]:
    return lambda saved: saved["state"][0].__setitem__(key, value)


def set_option(key: str, value: Any) -> Callable[[State], None]:
    return lambda saved: saved["param_groups"][0].__setitem__(key, value)


DAMAGES: dict[str, tuple[Callable[[State], Any], str]] = {
    "lr is NaN": (set_option("lr", math.nan), r"param group 0 of the state dict: lr=nan"),
    "lr is text": (set_option("lr", "0.1"), r"param group 0.*lr='0.1'.*must be a number"),
    "momentum is None": (set_option("momentum", None), r"momentum=None.*must be a number"),
    "a rule without the decay that it needs": (set_option("rule", "equilibrium"), "param group 0.*weight_decay=0"),
    "weight decay is infinite": (set_option("weight_decay", math.inf), "weight_decay=inf"),
    "lr is a NaN tensor": (set_option("lr", torch.tensor(math.nan)), "lr=nan"),
    "a future rule": (set_option("rule", "spiral"), "rule='spiral' is not known.*'warmup'"),
    "a future granularity": (set_option("granularity", "block"), "granularity='block'"),
    "Adam's state": (set_state("exp_avg", torch.ones(16, 8)), "exp_avg of parameter 0.*of another optimizer"),
    "a state that is no dict": (lambda saved: saved["state"].update({0: True}), "parameter 0 is True, not a dict"),
    "no lr": (lambda saved: saved["param_groups"][0].pop("lr"), "no lr.*SGD or ELRSGD"),
    "no groups": (lambda saved: saved.pop("param_groups"), "has state, not 'state' and 'param_groups'"),
    "a group too many": (lambda saved: saved["param_groups"].append(saved["param_groups"][0]), "groups, 2,.*1:"),
    "a parameter too few": (lambda saved: saved["param_groups"][0]["params"].pop(), "has 7 parameters.*has 8"),
    "state of nobody": (lambda saved: saved["state"].update({99: {}}), "parameter 99, which none"),
    "buffer of another shape": (set_state("momentum_buffer", torch.ones(16, 9)), r"\(16, 9\).*\(16, 8\)"),
    "integer buffer": (set_state("momentum_buffer", torch.ones(16, 8, dtype=torch.int32)), "dtype torch.int32"),
    "complex buffer": (set_state("momentum_buffer", torch.ones(16, 8) * 1j), "dtype torch.complex64"),
    "buffer without data": (set_state("momentum_buffer", torch.ones(16, 8, device="meta")), "map_location='cpu'"),
    "buffer that is a list": (set_state("momentum_buffer", [1.0]), "is a list, not a tensor"),
    "NaN radius": (set_state("radius", torch.tensor([math.nan])), "radius of parameter 0.*finite.*at least 0"),
    "negative c": (set_state("sphere_grad_norm", -torch.ones(1)), "sphere_grad_norm.*at least 0"),
    "too many tests": (set_state("tracked", torch.tensor([9.0])), "tracked.*at least -1, at most 8"),
    "integer radius": (set_state("radius", torch.ones(1, dtype=torch.int64)), "int64.*finite floats"),
    "radii of another shape": (set_state("radius", torch.ones(15)), "15 entries.*has 1, or with .* 16"),
    "Adam": (lambda saved: saved.update(state_of(torch.optim.Adam)), "betas.*no momentum.*SGD or ELRSGD"),
    "RMSprop": (lambda saved: saved.update(state_of(torch.optim.RMSprop)), "no dampening, nesterov"),
    "SGDP": (lambda saved: saved.update(state_of(SGDP)), "eps, delta, wd_ratio.*SGD or ELRSGD"),
    "SGDP's state": (
        lambda saved: saved.update(state=state_of(SGDP)["state"]), "has momentum of parameter 0.*another optimizer"
    ),
    "the model's": (
        lambda saved: (saved.clear(), saved.update(bn_mlp(depth=1).state_dict())), "has 0.weight, 1.weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_changes_nothing(damage: str) -> None:
    net, optimizer = make()
    other_net, never_asked = make()
    saved = copy.deepcopy(optimizer.state_dict())
    spoil, message = DAMAGES[damage]
    spoil(saved)
    options = copy.deepcopy(optimizer.state_dict()["param_groups"])
    state = {p: dict(s) for p, s in optimizer.state.items()}
    rule_groups = optimizer._rule_groups
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"] == options
    assert optimizer._rule_groups is rule_groups
    assert optimizer.state.keys() == state.keys()
    for p, held in state.items():
        assert all(optimizer.state[p][key] is value for key, value in held.items())
    train(net, optimizer, range(3, 6))
    train(other_net, never_asked, range(3, 6))
    for p, q in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in never_asked.state[q].items():
            assert torch.equal(optimizer.state[p][key], value)


def test_a_damaged_counter_of_stochastic_rounding_is_refused() -> None:
    _, optimizer = make("angle", stochastic_rounding=None)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["rounding_step"] = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"rounding_step.*integers"):
        optimizer.load_state_dict(saved)


def test_fused_and_foreach_in_the_state_are_not_what_is_checked() -> None:
    """They are not loaded, so whatever is saved there does no harm."""
    _, optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(fused=True, foreach=True)
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sgd_goes_on_as_sgd(momentum: float) -> None:
    ours, theirs = bn_mlp(depth=2), bn_mlp(depth=2)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum)
    train(theirs, sgd, range(3))
    ours.load_state_dict(theirs.state_dict())
    optimizer = ELRSGD(ours.parameters(), lr=1.0, rule=None)
    optimizer.load_state_dict(copy.deepcopy(sgd.state_dict()))  # torch's own would share the buffers
    train(theirs, sgd, range(3, 6))
    train(ours, optimizer, range(3, 6))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("rule", "granularity"), RULES, ids=str)
def test_what_is_saved_loads_with_weights_only(rule: str | None, granularity: str) -> None:
    _, optimizer = make(rule, granularity)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    expected = optimizer.state_dict()
    assert loaded["param_groups"] == expected["param_groups"]
    assert loaded["state"].keys() == expected["state"].keys()
    for index, held in expected["state"].items():
        assert loaded["state"][index].keys() == held.keys()
        assert all(torch.equal(loaded["state"][index][key], value) for key, value in held.items())
    make(rule, granularity)[1].load_state_dict(loaded)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused_by_torch(share: float, tmp_path: Path) -> None:
    _, optimizer = make()
    path = tmp_path / "checkpoint.pt"
    torch.save(optimizer.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises((RuntimeError, EOFError, OSError)):
        torch.load(path, weights_only=True)


def test_a_granularity_that_was_changed_since_the_last_step_loads() -> None:
    w = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = ELRSGD([{"params": [w], "scale_invariant": True}], lr=0.1, rule="uniform")
    w.grad = torch.randn(4, 3)
    optimizer.step()
    optimizer.param_groups[0]["granularity"] = "filter"
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert optimizer.state[w]["tracked"].numel() == 4


def named(names: str, **options: Any) -> tuple[dict[str, nn.Parameter], ELRSGD]:
    """Weights of equal shapes, called by letters, in that order."""
    params = {name: nn.Parameter(torch.full((4, 4), float(ord(name[-1])))) for name in names.split()}
    group = {"params": list(params.items()), "scale_invariant": True}
    return params, ELRSGD([group], lr=0.1, momentum=0.9, rule="angle", **options)


def stepped(names: str) -> tuple[dict[str, nn.Parameter], ELRSGD]:
    params, optimizer = named(names)
    for name, p in params.items():
        p.grad = torch.full((4, 4), float(ord(name[-1])))
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(
    "order", ["c a b", "module.c module.a module.b", "_orig_mod.b _orig_mod.c _orig_mod.a"]
)
def test_parameters_are_matched_by_name(order: str) -> None:
    params, optimizer = stepped("a b c")
    others, other = named(order)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == order.split()
    for name, q in others.items():
        held = optimizer.state[params[name[-1]]]
        assert other.state[q].keys() == held.keys()
        for key, value in held.items():
            assert torch.equal(other.state[q][key], value), key


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        ("a b", "a c", "the state dict has b, the optimizer has c.*delete 'param_names'"),
        ("a a b", "b a a", "another order of names that occur twice.*delete 'param_names'"),
    ],
)
def test_names_that_do_not_match_are_refused(saved: str, here: str, message: str) -> None:
    def make(names: str) -> ELRSGD:
        params = [(name, nn.Parameter(torch.ones(2, 2))) for name in names.split()]
        for _, p in params:
            p.grad = torch.ones(2, 2)
        optimizer = ELRSGD(params, lr=0.1, momentum=0.9)
        optimizer.step()
        return optimizer

    state, optimizer = make(saved).state_dict(), make(here)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    del state["param_groups"][0]["param_names"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["param_names"] == here.split()


def test_equal_names_in_the_same_order_load() -> None:
    _, optimizer = stepped("a b")
    optimizer.param_groups[0]["param_names"] = ["w", "w"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["param_names"] == ["w", "w"]


def test_another_rule_than_the_one_asked_for_warns_and_holds() -> None:
    saved = make("warmup")[1].state_dict()
    optimizer = ELRSGD(bn_mlp(depth=2).parameters(), lr=0.01, rule="angle", granularity="filter")
    message = "rule='warmup' in place of rule='angle', granularity='layer' in place of granularity='filter'"
    with pytest.warns(UserWarning, match=message):
        optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["rule"], group["granularity"], group["lr"]) == ("warmup", "layer", 0.05)


@pytest.mark.parametrize(("saved", "here"), [(None, 0.003), (0.003, None)])
def test_a_tracked_lr_that_comes_or_goes_with_a_state_dict_warns(
    saved: float | None, here: float | None
) -> None:
    state = ELRSGD(bn_mlp(depth=2).parameters(), lr=0.1, tracked_lr=saved).state_dict()
    optimizer = ELRSGD(bn_mlp(depth=2).parameters(), lr=0.1, tracked_lr=here)
    with pytest.warns(UserWarning, match=f"tracked_lr={saved} in place of tracked_lr={here}"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["tracked_lr"] == saved
