"""Sharded parameters give what whole ones give: norms are of the whole tensor, by one all-reduce a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from elropt import ELRSGD, _rule_group, layer_stats
from elropt._warmup_end import WarmupEndPoll
from tests.distributed.conftest import Ranks
from tests.oracle import invariant_gradient

SHAPES = [(8, 6), (5, 4), (3, 7), (1, 9), (4, 2, 3, 3)]
STEPS = 14
PLACEMENTS = {
    "rows": ((4,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
    "copies": ((4,), (Replicate(),)),
    "hybrid": ((2, 2), (Replicate(), Shard(0))),
    "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    "rows twice": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
}
RULES: dict[str, dict[str, Any]] = {
    "none": {"rule": None},
    "warmup": {"rule": "warmup"},
    "uniform": {"rule": "uniform"},
    "angle": {"rule": "angle", "lr": 0.05},
    "sphere": {"rule": "sphere", "lr": 0.05},
    "network": {"rule": "angle", "granularity": "network", "lr": 0.05},
    "filter": {"rule": "angle", "granularity": "filter", "lr": 0.05},
    "uniform filter": {"rule": "uniform", "granularity": "filter"},
    "project": {"rule": "uniform", "project": True, "weight_decay": 0.01},
    "measured": {"rule": "uniform", "measured": True},
    "update": {"rule": "uniform", "elr_of": "update", "weight_decay": 0.01},
    "equilibrium": {"rule": "equilibrium", "weight_decay": 0.01},
    "network of updates": {"rule": "angle", "elr_of": "update", "granularity": "network", "lr": 0.05},
    "filter of updates": {"rule": "angle", "elr_of": "update", "granularity": "filter", "lr": 0.05},
}


def problem() -> tuple[list[Tensor], list[Any]]:
    """Weights whose gradients differ by orders of magnitude, and scale-invariant gradients."""
    rng = np.random.default_rng(0)
    weights = [torch.from_numpy(rng.normal(size=shape)).float() for shape in SHAPES]
    curvatures = [10.0**i * np.abs(rng.normal(size=shape)) for i, shape in enumerate(SHAPES, start=-2)]
    return weights, curvatures


def make(weights: list[Tensor], options: dict[str, Any]) -> ELRSGD:
    settings = {"lr": 0.1, "momentum": 0.9, **options}
    group = (
        {"params": weights}
        if settings.pop("measured", False)
        else {"params": weights, "scale_invariant": True}
    )
    return ELRSGD([group], **settings)


def run_whole(options: dict[str, Any]) -> list[Tensor]:
    weights, curvatures = problem()
    optimizer = make(weights, options)
    per_filter = options.get("granularity") == "filter"
    for _ in range(STEPS):
        for w, d in zip(weights, curvatures, strict=True):
            w.grad = torch.from_numpy(invariant_gradient(d, per_filter)(w.double().numpy())).float()
        optimizer.step()
    return weights


def distribute(mesh: DeviceMesh, placements: tuple[Any, ...]) -> tuple[list[DTensor], list[Any]]:
    weights, curvatures = problem()
    fitting = [
        tuple(Shard(0) if isinstance(q, _StridedShard) and w.shape[0] % 4 else q for q in placements)
        for w in weights
    ]
    if any(isinstance(q, _StridedShard) for q in placements):  # which torch wants to divide evenly
        fitting = [
            q if w.shape[0] % 4 == 0 else (Replicate(), Shard(0))
            for w, q in zip(weights, fitting, strict=True)
        ]
    return [distribute_tensor(w, mesh, q) for w, q in zip(weights, fitting, strict=True)], curvatures


def run_sharded(name: str, options: dict[str, Any]) -> tuple[list[Tensor], list[int], bool]:
    """Whole weights at the end, all-reduces of every step, and whether copies of a shard have the same bits."""
    sizes, placements = PLACEMENTS[name]
    mesh = init_device_mesh("cpu", sizes)
    weights, curvatures = distribute(mesh, placements)
    optimizer = make(list(weights), options)
    per_filter = options.get("granularity") == "filter"
    counts = []
    for _ in range(STEPS):
        for w, d in zip(weights, curvatures, strict=True):
            grad = torch.from_numpy(
                invariant_gradient(d, per_filter)(w.full_tensor().double().numpy())
            ).float()
            w.grad = distribute_tensor(grad, mesh, w.placements)
        with counted() as calls:
            optimizer.step()
        counts.append(len(calls))
    same = True
    for w in weights:
        copies: list[Any] = [None] * distributed.get_world_size()
        coordinate = [
            c for c, q in zip(mesh.get_coordinate(), w.placements, strict=True) if not q.is_replicate()
        ]
        distributed.all_gather_object(copies, (coordinate, w.to_local().numpy().tobytes()))
        same &= all(a[1] == b[1] for a in copies for b in copies if a[0] == b[0])
        buffer = optimizer.state[w].get("momentum_buffer")
        assert buffer is not None
        assert buffer.placements == w.placements
        assert buffer.shape == w.shape
    return [w.full_tensor() for w in weights], counts, same


class counted:
    """Counts the all-reduces that are called inside."""

    def __enter__(self) -> list[Any]:
        self.original = distributed.all_reduce
        calls: list[Any] = []

        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs.get("group"))
            return self.original(tensor, *args, **kwargs)

        distributed.all_reduce = all_reduce
        return calls

    def __exit__(self, *_: object) -> None:
        distributed.all_reduce = self.original


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("rule", RULES)
def test_sharded_is_whole(four_ranks: Ranks, name: str, rule: str) -> None:
    check_sharded_is_whole(four_ranks, name, rule, {})


@pytest.mark.parametrize(
    ("name", "rule", "backend"),
    [
        ("rows", "none", "foreach"),
        ("rows", "filter", "foreach"),
        ("rows", "none", "fused"),
        ("rows", "warmup", "fused"),
        ("rows", "filter", "fused"),
        ("rows and columns", "project", "fused"),
    ],
)
def test_backends_run_on_what_is_here(four_ranks: Ranks, name: str, rule: str, backend: str) -> None:
    check_sharded_is_whole(four_ranks, name, rule, {backend: True})


def check_sharded_is_whole(four_ranks: Ranks, name: str, rule: str, backend: dict[str, bool]) -> None:
    options = {**RULES[rule], **backend}
    expected = run_whole(options)
    results = four_ranks.run(run_sharded, name, options)
    for weights, counts, same in results:
        assert same
        for got, want in zip(weights, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
        groups = (
            0
            if name == "copies" or rule == "none"
            else 2
            if name in ("rows and columns", "rows twice")
            else 1
        )
        if rule != "warmup":
            assert counts == [groups] * STEPS


def after_the_hand_over() -> tuple[list[int], float]:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weights = [torch.randn(6, 4), torch.randn(3, 4)]
    sharded = [distribute_tensor(w, mesh, (Shard(0),)) for w in weights]
    optimizer = make(list(sharded), {"rule": "warmup", "momentum": 0.0, "lr": 1e-4})
    counts = []
    for lr in (*[1e-4] * 4, 5e-5, *[2e-4] * 3):
        optimizer.param_groups[0]["lr"] = lr
        for w in sharded:
            whole = w.full_tensor().double().numpy()
            grad = torch.from_numpy(invariant_gradient(np.ones(whole.shape) * np.arange(1, 5))(whole)).float()
            w.grad = distribute_tensor(grad / grad.norm() * w.full_tensor().norm(), mesh, (Shard(0),))
        with counted() as calls:
            optimizer.step()
        counts.append(len(calls))
    return counts, float(optimizer.state[sharded[0]]["handed_over"])


def test_nothing_is_reduced_after_the_hand_over_unless_the_lr_rises(two_ranks: Ranks) -> None:
    assert two_ranks.run(after_the_hand_over) == [([1, 0, 0, 0, 0, 1, 1, 0], 1.0)] * 2


def watches() -> list[bool]:
    """Whether ranks are to learn of the hand-over at the same step: with copies, shards, shards of the untracked."""
    mesh = init_device_mesh("cpu", (2,))
    asked: list[bool] = []

    def watch(_: Tensor, *, in_step: bool) -> Any:
        asked.append(in_step)
        return WarmupEndPoll(torch.zeros(()))

    original, _rule_group.WarmupEndPoll = _rule_group.WarmupEndPoll, watch  # type: ignore[misc, assignment]
    try:
        for placement, tracked in ((Replicate(), True), (Shard(0), True), (Shard(0), False)):
            w = distribute_tensor(torch.ones(4, 4), mesh, (placement,))
            ELRSGD([{"params": [w], "scale_invariant": tracked}], lr=0.1).step()
    finally:
        _rule_group.WarmupEndPoll = original  # type: ignore[misc]
    return asked


def test_ranks_that_measure_together_stop_together(two_ranks: Ranks) -> None:
    assert two_ranks.run(watches) == [[False, True, False]] * 2


def table_of_layers() -> tuple[list[float], list[float]]:
    mesh = init_device_mesh("cpu", (2,))
    weights, curvatures = problem()
    columns = []
    for tensors in (weights, [distribute_tensor(w, mesh, (Shard(0),)) for w in weights]):
        optimizer = make(list(tensors), {"rule": "uniform"})
        for w, whole, d in zip(tensors, weights, curvatures, strict=True):
            grad = torch.from_numpy(invariant_gradient(d)(whole.double().numpy())).float()
            w.grad = distribute_tensor(grad, mesh, (Shard(0),)) if isinstance(w, DTensor) else grad
        columns.append(layer_stats(optimizer)["relative_grad"].tolist())
    return columns[0], columns[1]


def test_layer_stats_are_of_whole_layers(two_ranks: Ranks) -> None:
    for whole, sharded in two_ranks.run(table_of_layers):
        assert sharded == pytest.approx(whole, rel=1e-6)


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    messages = []

    def note(make_it: Any) -> None:
        try:
            make_it()
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))

    partial = DTensor.from_local(torch.ones(2, 2), mesh, (Partial(),))
    note(lambda: ELRSGD([partial], rule=None))
    w = distribute_tensor(torch.ones(4, 4), mesh, (Shard(0),))
    optimizer = ELRSGD([w], lr=0.1, momentum=0.9)
    plain = ELRSGD([torch.ones(4, 4)], lr=0.1, momentum=0.9)
    plain.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    plain.step()
    note(lambda: optimizer.load_state_dict(plain.state_dict()))
    assert not optimizer.state
    return messages


def test_refusals(two_ranks: Ranks) -> None:
    for messages in two_ranks.run(refusals):
        assert len(messages) == 2
        assert "Partial" in messages[0]
        assert "redistribute" in messages[0]
        assert "set_optimizer_state_dict" in messages[1]


def faults() -> dict[str, object]:
    """What ranks must agree in, and do not."""
    rank = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, object] = {}

    def note(name: str, make_it: Any) -> None:
        try:
            make_it()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)

    weights = [distribute_tensor(torch.full((4, 2), 1.0 + i), mesh, (Shard(0),)) for i in range(3)]
    optimizer = make(list(weights), {"rule": "uniform", "momentum": 0.0})
    for i, w in enumerate(weights):
        if i != rank:  # only the last has a gradient everywhere
            w.grad = DTensor.from_local(torch.full((2, 2), 2.0 + i), mesh, (Shard(0),))
    with counted() as calls:
        optimizer.step()
    found["calls"] = len(calls)
    found["steps"] = [float(w.to_local()[0, 0]) for w in weights]
    found["version"] = weights[2]._version

    elsewhere = DeviceMesh("cpu", [[0], [1]])
    v = distribute_tensor(torch.ones(4, 4), elsewhere, (Shard(0), Replicate()))
    v.grad = distribute_tensor(torch.ones(4, 4), elsewhere, (Shard(0), Replicate()))
    note(
        "lr",
        lambda: ELRSGD([v], lr=distribute_tensor(torch.tensor(0.5), mesh, (Replicate(),)), rule=None).step(),
    )
    found["with lr"] = float(v.to_local()[0, 0])
    strided = distribute_tensor(torch.ones(8, 2), mesh, (_StridedShard(0, split_factor=2),))
    strided.grad = distribute_tensor(torch.ones(8, 2), mesh, (_StridedShard(0, split_factor=2),))
    note("strided", lambda: make([strided], {"rule": "angle", "granularity": "filter"}).step())
    only_first = DeviceMesh("cpu", [0])
    mine = DTensor.from_local(torch.ones(2, 2), only_first, (Shard(0),), run_check=False)
    note("outside", lambda: ELRSGD([mine], rule=None))
    return found


def test_where_ranks_do_not_agree(two_ranks: Ranks) -> None:
    for rank, found in enumerate(two_ranks.run(faults)):
        assert found["calls"] == 1
        # what has a gradient on one rank only is not judged anywhere: plain SGD there; the last is alone in the mean
        expected = [1.0 if rank == 0 else 1 - 0.1 * 2, 2.0 if rank == 1 else 2 - 0.1 * 3, 3 - 0.1 * 4]
        assert found["steps"] == pytest.approx(expected)
        assert found["version"] == 1
        assert "lr" not in found
        assert found["with lr"] == pytest.approx(0.5)
        assert "granularity='layer'" in str(found["strided"])
        assert ("this rank is not in" in str(found.get("outside"))) == (rank == 1)


def partial_gradient() -> tuple[Tensor, Tensor]:
    """As sequence parallelism leaves it: a parameter that every rank has, and a gradient that is yet to be added up."""
    mesh = init_device_mesh("cpu", (2,))
    w = distribute_tensor(torch.arange(6.0).view(3, 2) + 1, mesh, (Replicate(),))
    w.grad = DTensor.from_local(torch.full((3, 2), 1.0 + distributed.get_rank()), mesh, (Partial(),))
    ELRSGD([w], lr=0.1, rule=None).step()
    return w.to_local(), torch.arange(6.0).view(3, 2) + 1 - 0.1 * 3


def test_a_gradient_of_partial_sums_is_added_up(two_ranks: Ranks) -> None:
    for got, want in two_ranks.run(partial_gradient):
        torch.testing.assert_close(got, want)
