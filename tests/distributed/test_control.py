"""`elropt.control` over FSDP2: as in one process, the same bits on all ranks, and resumable."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import elropt
from elropt.controller import RADIUS
from tests.distributed.conftest import Ranks
from tests.distributed.test_training import agree, groups_of, ln_mlp, loss_of, whole

STEPS = 6
CASES = [("AdamW", "layer"), ("AdamW", "filter"), ("SGD", "network")]


def make(base: str, granularity: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = ln_mlp()
    if seed:
        torch.manual_seed(seed)
        for p in net.parameters():
            nn.init.normal_(p)
    if distributed.is_initialized():
        fully_shard(net)
    groups = groups_of(net, ln_mlp())
    for group in groups:
        group["lr"] = 0.02 if group["scale_invariant"] else 1e-3
    optimizer = torch.optim.AdamW(groups) if base == "AdamW" else torch.optim.SGD(groups)
    elropt.control(optimizer, granularity=granularity)
    return net, optimizer


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
    parallel = distributed.is_initialized()
    share = (distributed.get_rank(), distributed.get_world_size()) if parallel else (0, 1)
    for step in steps:
        net.zero_grad()
        loss_of(net, step, *share).backward()
        optimizer.step()
    return {name: whole(p) for name, p in net.named_parameters()}


def sharded(base: str, granularity: str) -> tuple[dict[str, Tensor], bool]:
    result = train(*make(base, granularity), range(STEPS))
    return result, agree(result)


@pytest.mark.parametrize(("base", "granularity"), CASES)
def test_fsdp_is_as_one_process(two_ranks: Ranks, base: str, granularity: str) -> None:
    expected = train(*make(base, granularity), range(STEPS))
    for got, same in two_ranks.run(sharded, base, granularity):
        assert same
        for key, want in expected.items():
            torch.testing.assert_close(got[key], want, rtol=2e-4, atol=2e-5)


def saved(base: str, granularity: str, folder: str) -> dict[str, Tensor]:
    net, optimizer = make(base, granularity)
    train(net, optimizer, range(3))
    state: Any = get_state_dict(net, optimizer)
    model, optim = state
    assert any(RADIUS in held for held in optim["state"].values())
    checkpoint.save({"model": model, "optim": optim}, checkpoint_id=folder)
    return train(net, optimizer, range(3, STEPS))


def loaded(base: str, granularity: str, folder: str) -> dict[str, Tensor]:
    net, optimizer = make(base, granularity, seed=1)
    before = {name: whole(p) for name, p in net.named_parameters()}
    model, optim = get_state_dict(
        net, optimizer
    )  # takes a step without gradients, to have a state to load into
    assert all(torch.equal(whole(p), before[name]) for name, p in net.named_parameters())
    state = {"model": model, "optim": optim}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return train(net, optimizer, range(3, STEPS))


@pytest.mark.parametrize(("base", "granularity"), CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_saved_on_2_loaded_on_2_and_1(two_ranks: Ranks, base: str, granularity: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    went_on = two_ranks.run(saved, base, granularity, folder)[0]
    again = two_ranks.run(loaded, base, granularity, folder)[0]
    assert all(torch.equal(again[key], want) for key, want in went_on.items())
    one = loaded(base, granularity, folder)
    for key, want in went_on.items():
        torch.testing.assert_close(one[key], want, rtol=2e-4, atol=2e-5)


def flattened(base: str, full: bool) -> bool:
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    one_rank = StateDictOptions(full_state_dict=True, cpu_offload=True)
    dealt_out = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    net, optimizer = make(base, "layer")
    train(net, optimizer, range(3))
    state: Any = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=one_rank if full else flat))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    expected = train(net, optimizer, range(3, STEPS))
    other, fresh = make(base, "layer", seed=1)
    state = state if not full or distributed.get_rank() == 0 else {}
    set_optimizer_state_dict(other, fresh, state, options=dealt_out if full else flat)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name])
    got = train(other, fresh, range(3, STEPS))
    return all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("base", ["AdamW", "SGD"])
def test_flattened_and_full_state(two_ranks: Ranks, base: str, full: bool) -> None:
    assert all(two_ranks.run(flattened, base, full))


def inside_zero() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer

    net = ln_mlp()
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, lr=0.01)
    with pytest.raises(ValueError, match="rule='angle'") as caught:
        elropt.control(optimizer, tracked=[net[0].weight])
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_optimizer_that_deals_out_the_layers_is_refused(two_ranks: Ranks) -> None:
    for message in two_ranks.run(inside_zero):
        assert "ZeroRedundancyOptimizer" in message
        assert "fully_shard" in message
