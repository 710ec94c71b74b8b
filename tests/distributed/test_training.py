"""DDP, FSDP2, tensor parallelism and both: the run is that of one process, and ranks agree to the bit."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import elropt
from elropt import ELRSGD
from elropt.run_history import read_run
from tests.distributed.conftest import Ranks
from tests.every_rule import needs

STEPS, BATCH, WIDTH = 12, 16, 12


def ln_mlp(width: int = WIDTH) -> nn.Sequential:
    """Linear → LayerNorm → ReLU, three times (no batch statistics: what the ranks do adds up), and a head."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(3):
        linear = nn.Linear(8 if i == 0 else width, width, bias=False)
        layers += [linear, nn.LayerNorm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def loss_of(
    net: nn.Module, step: int, rank: int = 0, world: int = 1, part: int = 0, parts: int = 1
) -> Tensor:
    """Of a rank's share of a batch, of which it takes one of several parts."""
    x = torch.randn(BATCH, 8, generator=torch.Generator().manual_seed(step))
    x = x.to(next(net.parameters()).device)
    mine = slice(None) if world * parts == 1 else slice(rank * parts + part, None, world * parts)
    return F.cross_entropy(net(x[mine]).float(), x[mine, :4].argmax(1))


def groups_of(net: nn.Module, whole: nn.Module) -> list[dict[str, Any]]:
    """The groups of the whole net, with the parameters that a parallel one has under these names."""
    groups = elropt.param_groups(whole, torch.randn(8, 8), weight_decay=1e-3)
    for group in groups:
        group["params"] = [net.get_parameter(name) for name in group["param_names"]]
    return groups


def optimizer_for(groups: list[dict[str, Any]], rule: str | None, momentum: float = 0.9) -> ELRSGD:
    lr = 0.02 if rule == "angle" else 0.1
    return ELRSGD(groups, lr=lr, momentum=momentum, rule=rule, **needs(rule))


def alone(rule: str | None, bare: bool = False, clip: bool = False) -> dict[str, Tensor]:
    net = ln_mlp()
    groups = elropt.param_groups(net, torch.randn(8, 8), weight_decay=1e-3)
    optimizer = optimizer_for([{"params": list(net.parameters())}] if bare else groups, rule)
    for step in range(STEPS):
        net.zero_grad()
        loss_of(net, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def whole(p: Tensor) -> Tensor:
    full = getattr(p, "full_tensor", None)
    return (p if full is None else full()).detach().clone()


def agree(tensors: dict[str, Tensor]) -> bool:
    """Whether all ranks have the same bits."""
    blob = b"".join(t.numpy().tobytes() for t in tensors.values())
    blobs: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(blobs, blob)
    return all(other == blob for other in blobs)


DDP: dict[str, dict[str, Any]] = {
    "plain": {},
    "autocast": {"amp": True},
    "accumulation": {"parts": 2},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
}


def train_ddp(
    rule: str | None, amp: bool = False, parts: int = 1, **options: Any
) -> tuple[dict[str, Tensor], bool]:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    net = ln_mlp()
    if "find_unused_parameters" in options:
        net.append(Skipped(nn.Linear(4, 4)))
    groups = elropt.param_groups(net, torch.randn(8, 8), weight_decay=1e-3)
    parallel = DistributedDataParallel(net, **options)
    optimizer = optimizer_for(groups, rule)
    for step in range(STEPS):
        net.zero_grad()
        for part in range(parts):
            with parallel.no_sync() if part + 1 < parts else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    loss = loss_of(parallel, step, rank, world, part, parts)
                (loss / parts).backward()
        optimizer.step()
    result = {name: whole(p) for name, p in net.named_parameters() if "skipped" not in name}
    return result, agree(result)


class Skipped(nn.Module):
    """A module whose parameters take no part."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.skipped = module

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("rule", [None, "warmup", "uniform", "angle"])
@pytest.mark.parametrize("name", DDP)
@pytest.mark.filterwarnings("ignore:.*find_unused_parameters")
def test_ddp(two_ranks: Ranks, name: str, rule: str | None) -> None:
    expected = alone(rule)
    for got, same in two_ranks.run(ddp, rule, DDP[name]):
        assert same
        for key, want in expected.items():
            tolerance = {"rtol": 0.1, "atol": 0.05} if "amp" in DDP[name] else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(got[key], want, **tolerance)


def ddp(rule: str | None, options: dict[str, Any]) -> tuple[dict[str, Tensor], bool]:
    return train_ddp(rule, **options)


def train_sharded(how: str, rule: str | None, bare: bool) -> tuple[dict[str, Tensor], bool]:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    net, reference = ln_mlp(), ln_mlp()
    share = rank, world
    if how == "fsdp":
        for layer in net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(net)
    elif how == "columns":
        fully_shard(net, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else Shard(0))
    elif how == "bfloat16":
        fully_shard(net, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    elif how == "hsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards")))
    else:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
        if how == "tensor":
            mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
            share = 0, 1
        else:
            share = mesh["data"].get_local_rank(), 2
        net = tensor_parallel(net, mesh["tensor"])
        if how == "2d":
            fully_shard(net, mesh=mesh["data"])
    groups = [{"params": list(net.parameters())}] if bare else groups_of(net, reference)
    optimizer = optimizer_for(groups, rule)
    for step in range(STEPS):
        net.zero_grad()
        loss_of(net, step, *share).backward()
        optimizer.step()
    result = {name: whole(p) for name, p in net.named_parameters()}
    return result, agree(result)


def tensor_parallel(net: nn.Sequential, mesh: Any) -> nn.Sequential:
    """Columns, then rows, in turn; the norm behind rows sees the samples divided among the ranks."""
    plan: dict[str, Any] = {
        "0": ColwiseParallel(output_layouts=Shard(0)),  # divided by sample for the norm
        "1": SequenceParallel(sequence_dim=0, use_local_output=True),
        "3": RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)),
        "4": SequenceParallel(sequence_dim=0, use_local_output=True),
        "6": ColwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)),
        "7": SequenceParallel(sequence_dim=0, use_local_output=True),
        "9": RowwiseParallel(input_layouts=Shard(0)),
    }
    parallelize_module(net, mesh, plan)
    return net


@pytest.mark.parametrize("rule", [None, "warmup", "uniform", "angle", "equilibrium"])
@pytest.mark.parametrize("how", ["fsdp", "columns", "hsdp", "tensor", "2d", "bfloat16"])
def test_sharded_training(four_ranks: Ranks, how: str, rule: str | None) -> None:
    expected = alone(rule)
    for got, same in four_ranks.run(train_sharded, how, rule, False):
        assert same
        tolerance = {"rtol": 0.1, "atol": 0.05} if how == "bfloat16" else {"rtol": 2e-4, "atol": 2e-5}
        for key, want in expected.items():
            torch.testing.assert_close(got[key], want, **tolerance)


@pytest.mark.parametrize("rule", ["uniform", "equilibrium"])
def test_bare_parameters_of_fsdp_are_tested_as_whole_tensors(two_ranks: Ranks, rule: str) -> None:
    expected = alone(rule, bare=True)
    for got, _ in two_ranks.run(train_sharded, "fsdp", rule, True):
        for key, want in expected.items():
            torch.testing.assert_close(got[key], want, rtol=2e-4, atol=2e-5)


def train_in_parts(rule: str, path: Path) -> tuple[dict[str, Tensor], int]:
    """FSDP2 with gradients accumulated without communication, clipped, watched by a Recorder on every rank."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    net, reference = ln_mlp(), ln_mlp()
    fully_shard(net)
    optimizer = optimizer_for(groups_of(net, reference), rule)
    with elropt.Recorder(optimizer, path, every=5) as recorder:
        for step in range(STEPS):
            net.zero_grad()
            for part in range(2):
                net.set_requires_gradient_sync(part == 1)
                (loss_of(net, step, rank, world, part, 2) / 2).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    return {name: whole(p) for name, p in net.named_parameters()}, recorder.step


@pytest.mark.parametrize("rule", ["warmup", "uniform", "equilibrium"])
def test_accumulated_clipped_and_recorded(two_ranks: Ranks, rule: str, tmp_path: Path) -> None:
    expected = alone(rule, clip=True)
    for got, steps in two_ranks.run(train_in_parts, rule, tmp_path / "run.jsonl"):
        assert steps == STEPS
        for key, want in expected.items():
            torch.testing.assert_close(got[key], want, rtol=2e-4, atol=2e-5)
    assert read_run(tmp_path / "run.jsonl").steps.tolist() == list(range(0, STEPS, 5))


def overflow_on_one_rank(rule: str) -> tuple[bool, float, list[float]]:
    """torch.amp.GradScaler: what overflows on one rank is skipped by all, and nothing is recorded of it."""
    net = ln_mlp()
    fully_shard(net)
    optimizer = optimizer_for(groups_of(net, ln_mlp()), rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    spreads = []
    for step in range(3):
        net.zero_grad()
        scaler.scale(loss_of(net, step)).backward()
        before = {name: whole(p) for name, p in net.named_parameters()}
        if step == 1 and distributed.get_rank() == 0:
            next(net.parameters()).grad.to_local().fill_(torch.inf)  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        skipped = all(torch.equal(whole(p), before[name]) for name, p in net.named_parameters())
        spreads.append(float(skipped))
    return agree({name: whole(p) for name, p in net.named_parameters()}), scaler.get_scale(), spreads


@pytest.mark.parametrize("rule", ["warmup", "uniform", "equilibrium"])
def test_an_overflow_is_skipped_by_all_ranks(two_ranks: Ranks, rule: str) -> None:
    assert two_ranks.run(overflow_on_one_rank, rule) == [(True, 4.0, [0.0, 1.0, 0.0])] * 2


def refusals() -> list[str]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    messages = []
    grouped = [{"params": list(ln_mlp().parameters()), "rule": "uniform"}]
    for make in (
        lambda: ZeroRedundancyOptimizer(grouped, optimizer_class=ELRSGD, lr=0.1, rule=None),
        lambda: ELRSGD(
            FullyShardedDataParallel(ln_mlp(), device_id=torch.device("cpu")).parameters(), lr=0.1
        ),
        lambda: ELRSGD(
            FullyShardedDataParallel(
                ln_mlp(), device_id=torch.device("cpu"), use_orig_params=True
            ).parameters(),
            lr=0.1,
        ),
        lambda: ZeroRedundancyOptimizer(ln_mlp().parameters(), optimizer_class=ELRSGD, lr=0.1),
    ):
        try:
            make()
        except ValueError as error:
            messages.append(str(error))
    return messages


def measure_sharded() -> str:
    net = ln_mlp()
    fully_shard(net)
    with pytest.raises(ValueError, match="DTensors") as error:
        elropt.find_scale_invariant(net, torch.randn(8, 8))
    return str(error.value)


def test_sharded_models_are_measured_before(two_ranks: Ranks) -> None:
    for message in two_ranks.run(measure_sharded):
        assert "0.weight, 1.weight, 1.bias …" in message
        assert "before fully_shard" in message


def test_fsdp1_and_zero_are_refused_with_a_remedy(two_ranks: Ranks) -> None:
    for messages in two_ranks.run(refusals):
        assert len(messages) == 4
        assert all("fully_shard" in message and "rule=None" in message for message in messages)


def train_zero() -> tuple[dict[str, Tensor], bool]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank, world = distributed.get_rank(), distributed.get_world_size()
    net = ln_mlp()
    parallel = DistributedDataParallel(net)
    groups = elropt.param_groups(net, torch.randn(8, 8), weight_decay=1e-3)
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=ELRSGD, lr=0.1, momentum=0.9, rule=None)
    for step in range(STEPS):
        net.zero_grad()
        loss_of(parallel, step, rank, world).backward()
        optimizer.step()
    result = {name: whole(p) for name, p in net.named_parameters()}
    return result, agree(result)


def test_zero_without_a_rule(two_ranks: Ranks) -> None:
    expected = alone(None)
    for got, same in two_ranks.run(train_zero):
        assert same
        for key, want in expected.items():
            torch.testing.assert_close(got[key], want, rtol=1e-4, atol=1e-5)


def run_the_documented_lines() -> int:
    text = (Path(__file__).parents[2] / "docs" / "guide" / "distributed.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    namespace: dict[str, Any] = {"model": ln_mlp(), "images": torch.randn(8, 8), "fully_shard": fully_shard}
    exec(block, namespace)
    loss_of(namespace["model"], 0).backward()
    namespace["optimizer"].step()
    return sum(len(group["params"]) for group in namespace["optimizer"].param_groups)


def test_the_documented_lines(two_ranks: Ranks) -> None:
    assert two_ranks.run(run_the_documented_lines) == [11, 11]
