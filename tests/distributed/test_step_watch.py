"""Recorded steps of sharded parameters: angles and norms are those of the whole tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from elropt import ELRSGD, Recorder, layer_stats

from .conftest import Ranks

COLUMNS = (
    "weight_norm",
    "grad_norm",
    "radial_cosine",
    "angle",
    "relative_update",
    "radial_update",
    "tracked",
)
SHAPES = ((5, 3), (4, 6), (1, 7), (3, 4))
PLACEMENTS = (Shard(0), Shard(1), Shard(0), Replicate())  # of (1, 7) one rank has nothing


def train(kind: str, path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Of every column what whole tensors have, and what sharded ones have."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    data = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4)]
    tables = []
    for sharded in (False, True):

        def made(tensors: list[Tensor], sharded: bool = sharded) -> list[Tensor]:
            if not sharded:
                return [t.clone() for t in tensors]
            return [
                distribute_tensor(t, mesh, (where,)) for t, where in zip(tensors, PLACEMENTS, strict=True)
            ]

        params = [torch.nn.Parameter(p) for p in made(data[0])]
        if kind == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
        else:
            group = {"params": params, "scale_invariant": True}
            optimizer = ELRSGD([group], lr=0.01, momentum=0.9, rule="angle", granularity=kind)
        with Recorder(optimizer, path, every=1):
            for grads in data[1:]:
                for p, g in zip(params, made(grads), strict=True):
                    p.grad = g
                optimizer.step()
            tables.append(layer_stats(optimizer))
    return {column: (tables[0][column].tolist(), tables[1][column].tolist()) for column in COLUMNS}


@pytest.mark.parametrize("kind", ["adamw", "layer", "filter"])
def test_angles_are_of_whole_tensors(two_ranks: Ranks, kind: str, tmp_path: Path) -> None:
    for columns in two_ranks.run(train, kind, tmp_path / "run.jsonl"):
        for name, (whole, sharded) in columns.items():
            assert sharded == pytest.approx(whole, rel=1e-5, abs=1e-6, nan_ok=True), name  # float32
        assert (np.array(columns["angle"][1]) > 0).all()
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 6  # one rank writes


def train_without_a_gradient_on_one_rank() -> tuple[list[float], list[float]]:
    mesh = init_device_mesh("cpu", (2,))
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, (Shard(0),))) for _ in range(2)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    params[0].grad = distribute_tensor(torch.ones(4, 4), mesh, (Shard(0),))
    if distributed.get_rank() == 0:
        params[1].grad = torch.zeros_like(params[1])
    table = layer_stats(optimizer)
    return table["grad_norm"].tolist(), table["weight_norm"].tolist()


def test_a_gradient_that_one_rank_has_is_not_known(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(train_without_a_gradient_on_one_rank)
    assert first[0] == pytest.approx([4, np.nan], nan_ok=True)
    assert second[0] == pytest.approx([4])
