"""Bad input: the error names the value and the remedy, and nothing has been changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from elropt import ELRSGD


def make(**kwargs: Any) -> ELRSGD:
    return ELRSGD([nn.Parameter(torch.ones(2, 2))], **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -0.1}, "lr=-0.1"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\)"),
        ({"momentum": -0.9}, "momentum=-0.9"),
        ({"momentum": math.nan}, "momentum=nan"),
        ({"momentum": 1.0}, "below 1"),
        ({"dampening": math.nan}, "dampening=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"nesterov": True}, "momentum > 0"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0"),
        ({"rule": "lars"}, "'lars'.*'warmup'.*'sphere'"),
        ({"rule": ["warmup"]}, r"rule=\['warmup'\] is not known"),
        ({"granularity": "channel"}, "'channel'"),
        ({"granularity": "filter"}, "no meaning for rule='warmup'"),
        ({"rule": "uniform", "granularity": "network"}, "'layer', 'filter'"),
        ({"rule": None, "granularity": "filter"}, "no meaning for rule=None"),
        ({"momentum": torch.ones(2)}, r"momentum is a tensor of shape \(2,\)"),
        ({"lr": "0.1", "tracked_lr": 0.01}, "lr='0.1' is not valid: it must be a number"),
        ({"project": "no"}, "project='no' is not valid: it must be True or False"),
        ({"maximize": "no"}, "maximize='no'"),
        ({"nesterov": None}, "nesterov=None"),
        ({"foreach": "no"}, "foreach='no' is not valid: it must be True, False or None"),
        ({"fused": "yes"}, "fused='yes'"),
        ({"differentiable": True}, "rule=None"),
        ({"differentiable": True, "rule": None, "project": True}, "project=False"),
    ],
    ids=str,
)
def test_hyper_parameters(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
    optimizer = make()
    group = {"params": [nn.Parameter(torch.ones(3, 3))], **kwargs}
    given = dict(group)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert group.keys() == given.keys()


def test_fused_with_foreach_or_differentiable() -> None:
    with pytest.raises(RuntimeError, match="cannot both be True"):
        make(fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        make(fused=True, differentiable=True, rule=None)


def test_scale_invariant_flag() -> None:
    with pytest.raises(ValueError, match="scale_invariant='yes'"):
        ELRSGD([{"params": [nn.Parameter(torch.ones(2, 2))], "scale_invariant": "yes"}])


def test_hyper_parameters_broken_later_are_found_before_the_step() -> None:
    optimizer = make(lr=0.1)
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(2, 2)
    optimizer.param_groups[0]["rule"] = "nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2, 2))


@pytest.mark.parametrize("rule", ["warmup", "angle"])
def test_sparse_gradients_need_plain_sgd(rule: str) -> None:
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = ELRSGD(net.parameters(), lr=0.1, momentum=0.9, rule=rule)
    before = copy.deepcopy(net.state_dict())
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="rule=None"):
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all("momentum_buffer" not in s for s in optimizer.state.values())


def test_sparse_gradients_in_a_group_of_their_own() -> None:
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    groups = [{"params": net[0].parameters(), "rule": None}, {"params": net[1].parameters()}]
    optimizer = ELRSGD(groups, lr=0.1)
    before = copy.deepcopy(net.state_dict())
    net(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert not any(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_complex_parameter_cannot_be_tracked() -> None:
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    optimizer = ELRSGD([{"params": [p], "scale_invariant": True}], lr=0.1)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2, 2, dtype=torch.complex64))


def test_fused_where_a_tensor_does_not_qualify() -> None:
    p = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = ELRSGD([p], lr=0.1, fused=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"float64.*fused=None"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(2, 2, dtype=torch.float64))


def test_mismatching_state_dicts_change_nothing() -> None:
    def stepped(shape: tuple[int, ...], **kwargs: Any) -> ELRSGD:
        p = nn.Parameter(torch.ones(shape))
        optimizer = ELRSGD([p], momentum=0.9, **kwargs)
        p.grad = torch.ones(shape)
        optimizer.step()
        return optimizer

    optimizer = stepped((2, 2), lr=0.5)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"shape \(3, 2\)"):
        optimizer.load_state_dict(stepped((3, 2)).state_dict())
    two_groups = stepped((2, 2))
    two_groups.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two_groups.state_dict())
    broken = stepped((2, 2)).state_dict()
    broken["param_groups"][0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr=nan"):
        optimizer.load_state_dict(broken)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, value in before["state"][0].items():
        assert torch.equal(after["state"][0][key], value)
