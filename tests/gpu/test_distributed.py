"""Sharded parameters on GPUs: the kernels run on what is here, and with two GPUs NCCL adds up the norms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from elropt import ELRSGD

from ..distributed.test_training import groups_of, ln_mlp, loss_of, whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RULES = (None, "warmup", "uniform", "angle")
# With "warmup" the hand-over is noticed on the way. Few for the others: what one rounding of the gradients grows to is
# far below the tolerance after 20 steps of "angle", and above it after 80.
STEPS = {None: 20, "warmup": 40, "uniform": 20, "angle": 20}


def train(
    rule: str | None, *, sharded: bool, rank: int = 0, world: int = 1
) -> tuple[dict[str, Tensor], ELRSGD]:
    from torch.distributed.fsdp import fully_shard

    net = ln_mlp(width=64)
    groups = groups_of(net, net)
    net.cuda()
    if sharded:
        fully_shard(net)
        for group in groups:
            group["params"] = [net.get_parameter(name) for name in group["param_names"]]
    optimizer = ELRSGD(groups, lr=0.02 if rule == "angle" else 0.1, momentum=0.9, rule=rule)
    for step in range(STEPS[rule]):
        net.zero_grad()
        loss_of(net, step, rank, world).backward()
        optimizer.step()
    return {name: whole(p).cpu() for name, p in net.named_parameters()}, optimizer


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("alone")
def test_fsdp_on_one_gpu(rule: str | None) -> None:
    expected, _ = train(rule, sharded=False)
    got, optimizer = train(rule, sharded=True)
    for key, want in expected.items():
        torch.testing.assert_close(got[key], want, rtol=2e-4, atol=2e-5)
    for rule_group in optimizer._rule_groups or []:
        for group in rule_group.tensors(optimizer.state):
            assert group.backend.__name__ == "elropt.kernels"


def work(rank: int, world: int, rule: str | None, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    got, _ = train(rule, sharded=True, rank=rank, world=world)
    torch.save(got, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("rule", RULES)
def test_fsdp_on_two_gpus(rule: str | None, tmp_path: Path) -> None:
    expected, _ = train(rule, sharded=False)
    multiprocessing.spawn(work, (2, rule, str(tmp_path)), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        for key, want in expected.items():
            torch.testing.assert_close(got[key], want, rtol=2e-4, atol=2e-5)
