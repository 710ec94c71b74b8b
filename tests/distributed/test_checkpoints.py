"""Saved on 4 ranks, loaded on 2 or 1 (or the other way round): the run goes on as it would have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from elropt import ELRSGD
from elropt.rules import RULES
from tests.distributed.conftest import Ranks
from tests.distributed.test_training import agree, groups_of, ln_mlp, loss_of, optimizer_for, whole

BEFORE, AFTER = 5, 6


def make(rule: str | None, seed: int = 0, momentum: float = 0.9) -> tuple[nn.Module, ELRSGD]:
    net = ln_mlp()
    if seed:
        torch.manual_seed(seed)
        for p in net.parameters():
            nn.init.normal_(p)
    if distributed.is_initialized():
        fully_shard(net)
    return net, optimizer_for(groups_of(net, ln_mlp()), rule, momentum)


def train(net: nn.Module, optimizer: ELRSGD, steps: range) -> dict[str, Tensor]:
    parallel = distributed.is_initialized()
    share = (distributed.get_rank(), distributed.get_world_size()) if parallel else (0, 1)
    for step in steps:
        net.zero_grad()
        loss_of(net, step, *share).backward()
        optimizer.step()
    return {name: whole(p) for name, p in net.named_parameters()}


def uninterrupted(rule: str | None) -> dict[str, Tensor]:
    return train(*make(rule), range(BEFORE + AFTER))


def save(rule: str | None, folder: str) -> dict[str, Tensor]:
    """Save in the middle; what the same processes get when they go on."""
    net, optimizer = make(rule)
    train(net, optimizer, range(BEFORE))
    model, optim = get_state_dict(net, optimizer)
    checkpoint.save({"model": model, "optim": optim}, checkpoint_id=folder)
    return train(net, optimizer, range(BEFORE, BEFORE + AFTER))


def load(rule: str | None, folder: str) -> dict[str, Tensor]:
    net, optimizer = make(rule, seed=1)
    model, optim = get_state_dict(net, optimizer)
    state = {"model": model, "optim": optim}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return train(net, optimizer, range(BEFORE, BEFORE + AFTER))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_saved_on_4_loaded_on_4_2_and_1(
    four_ranks: Ranks, two_ranks: Ranks, rule: str | None, tmp_path: Path
) -> None:
    folder = str(tmp_path / "checkpoint")
    expected = uninterrupted(rule)
    went_on = four_ranks.run(save, rule, folder)
    again = four_ranks.run(load, rule, folder)
    for (key, a), b in zip(went_on[0].items(), again[0].values(), strict=True):
        assert torch.equal(a, b), key
    for got in (*two_ranks.run(load, rule, folder), load(rule, folder)):
        for key, want in expected.items():
            torch.testing.assert_close(got[key], want, rtol=2e-4, atol=2e-5)


def through_full_state(rule: str | None) -> tuple[dict[str, Tensor], bool]:
    """One rank holds the whole state, as for a file that one process reads; it is dealt out again."""
    net, optimizer = make(rule)
    train(net, optimizer, range(BEFORE))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optim = (
        get_model_state_dict(net, options=full),
        get_optimizer_state_dict(net, optimizer, options=full),
    )
    if distributed.get_rank() == 0:
        assert all(p.shape == w.shape for p, w in zip(ln_mlp().parameters(), model.values(), strict=True))
    else:
        model, optim = {}, {}
    net, optimizer = make(rule, seed=1)
    dealt = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, model, options=dealt)
    set_optimizer_state_dict(net, optimizer, optim, options=dealt)
    result = train(net, optimizer, range(BEFORE, BEFORE + AFTER))
    return result, agree(result)


@pytest.mark.parametrize("rule", RULES)
def test_full_state_is_dealt_out(two_ranks: Ranks, rule: str | None) -> None:
    expected = uninterrupted(rule)
    for got, same in two_ranks.run(through_full_state, rule):
        assert same
        for key, want in expected.items():
            torch.testing.assert_close(got[key], want, rtol=2e-4, atol=2e-5)


def without_momentum(rule: str | None) -> bool:
    """The default: then only a rule has a state, of which torch.distributed.checkpoint wants all or nothing."""
    net, optimizer = make(rule, momentum=0.0)
    train(net, optimizer, range(BEFORE))
    model, optim = copy.deepcopy(get_state_dict(net, optimizer))
    expected = train(net, optimizer, range(BEFORE, BEFORE + AFTER))
    net, optimizer = make(rule, seed=1, momentum=0.0)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=optim)
    got = train(net, optimizer, range(BEFORE, BEFORE + AFTER))
    return all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("rule", RULES)
def test_state_without_momentum(two_ranks: Ranks, rule: str | None) -> None:
    assert all(two_ranks.run(without_momentum, rule))


def own_state_dict(rule: str | None) -> bool:
    """`optimizer.state_dict()`, on the same ranks."""
    net, optimizer = make(rule)
    train(net, optimizer, range(BEFORE))
    weights, state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other, fresh = make(rule, seed=1)
    other.load_state_dict(weights)
    fresh.load_state_dict(state)
    expected: Any = train(net, optimizer, range(BEFORE, BEFORE + AFTER))
    got = train(other, fresh, range(BEFORE, BEFORE + AFTER))
    return all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("rule", RULES)
def test_own_state_dict_of_shards(two_ranks: Ranks, rule: str | None) -> None:
    assert all(two_ranks.run(own_state_dict, rule))
