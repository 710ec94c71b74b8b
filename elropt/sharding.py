"""Sharded parameters (`torch.distributed.tensor.DTensor`): the part that this rank holds, and sums over all shards.

The backends only ever see plain local tensors. A norm is that of the whole tensor: the local sums of all layers are
packed into one matrix and added up by one all-reduce per process group.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

__all__ = [
    "Reductions",
    "Shard",
    "all_reduce_rows",
    "check_placement",
    "is_dtensor",
    "is_inside_zero",
    "is_zero",
    "like",
    "local",
    "local_grad",
    "reductions",
    "shard_of",
    "sum_over_shards",
]

ZERO = "torch.distributed.optim.zero_redundancy_optimizer"


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that this rank holds: `count` indices of its dimension 0, from `first` on. The other parts
    are on the other ranks of `groups`: a sum over the tensor is the sum over these ranks."""

    first: int
    count: int
    groups: tuple[ProcessGroup, ...]


def rows_here(shard: Shard | None, count: int, *, by_rows: bool) -> tuple[int, int]:
    """(first, count) of the `count` rows of a tensor that this rank has a part of. `by_rows`: one row for each index of
    dimension 0."""
    if shard is None or count == 0:
        return 0, count
    return (shard.first, shard.count) if by_rows else (0, min(shard.count, 1))


class Reduction(NamedTuple):
    """One all-reduce: the columns `columns` [n] of the packed sums, over `group`, on `device`."""

    group: ProcessGroup
    columns: Tensor
    device: torch.device


class Reductions(NamedTuple):
    """What makes sums over local parts those of whole tensors: the all-reduces, and for every row the number of ranks
    that have a part of it, `shares` [R] float64."""

    steps: list[Reduction]
    shares: Tensor


def is_dtensor(t: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; if nobody has imported their module, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def _shards(placement: Placement) -> bool:
    """Also where FSDP and tensor parallelism divide the same dimension, which torch does not call a `Shard`."""
    return not placement.is_replicate() and not placement.is_partial()


def local(t: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, as a plain tensor that shares its memory; a plain tensor itself."""
    if not is_dtensor(t):
        return t
    here = t._local_tensor
    if type(here) is Tensor:
        return here
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return here.wait() if isinstance(here, AsyncCollectiveTensor) else here


def local_grad(p: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the part of p that this rank holds.

    A gradient that is placed in another way than its parameter, as sequence parallelism leaves those of norms (partial
    sums), is brought to the placement of the parameter first, as every optimizer of torch does.

    Raises:
        RuntimeError: they are on different meshes.
    """
    if is_dtensor(p) and is_dtensor(grad) and grad.device_mesh != p.device_mesh:
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} is on {p.device_mesh}, its gradient on {grad.device_mesh}: both "
            "must be on the same mesh"
        )
    if is_dtensor(p) and is_dtensor(grad) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local(grad)


def like(p: Tensor, here: Tensor) -> Tensor:
    """A local part as a tensor of the same kind and placement as p: what undoes `local`."""
    if not is_dtensor(p) or is_dtensor(here):
        return here
    return type(p).from_local(
        here, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def shard_of(p: Tensor, *, by_rows: bool) -> Shard | None:
    """Which part of p this rank holds; None if it holds all of p.

    Raises:
        ValueError: `by_rows`, and the indices of dimension 0 on this rank are not neighbours.
    """
    if not is_dtensor(p) or not any(map(_shards, p.placements)):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = p.device_mesh
    if by_rows and not _is_in_one_piece(p):
        raise ValueError(
            f"granularity='filter' needs neighbouring filters on a rank, but a parameter of shape {tuple(p.shape)} has "
            f"placements {p.placements}: use granularity='layer', or another placement"
        )
    shape, offset = compute_local_shape_and_global_offset(p.shape, mesh, p.placements)
    groups = tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(p.placements)
        if _shards(placement) and mesh.size(dim) > 1
    )
    count = shape[0] if p.numel() and all(shape) else 0
    return Shard(offset[0] if count else 0, count, groups)


def _is_in_one_piece(p: DTensor) -> bool:
    """Whether each rank has neighbouring indices: strided shards are, if later dimensions of the mesh divide theirs."""
    sizes, placements = p.device_mesh.shape, p.placements
    return all(
        math.prod(
            size
            for size, other in zip(sizes[dim + 1 :], placements[dim + 1 :], strict=True)
            if _shards(other) and getattr(other, "dim", None) == getattr(placement, "dim", None)
        )
        == getattr(placement, "split_factor", None)
        for dim, placement in enumerate(placements)
        if hasattr(placement, "split_factor")
    )


def reductions(
    params: Sequence[Tensor], row_counts: Sequence[int], shards: Sequence[Shard | None], device: torch.device
) -> Reductions | None:
    """The all-reduces for rows of which `params[i]` owns the next `row_counts[i]`; None if all tensors are whole. The
    same on all ranks whose parameters have the same placements, in the same order."""
    columns: dict[ProcessGroup, list[int]] = {}
    comm_device: dict[ProcessGroup, torch.device] = {}
    shares: list[int] = []
    for p, count, shard in zip(params, row_counts, shards, strict=True):
        first, ranks = len(shares), 1
        if shard is not None and is_dtensor(p):
            for group in shard.groups:
                columns.setdefault(group, []).extend(range(first, first + count))
                ranks *= group.size()
                kind = p.device_mesh.device_type  # with CPU offload, not where the parameter is
                comm_device[group] = device if device.type == kind else torch.device(kind)
        shares += [ranks] * count
    if not any(columns.values()):
        return None
    steps = [
        Reduction(group, torch.tensor(indices, dtype=torch.int64).to(device), comm_device[group])
        for group, indices in columns.items()
        if indices
    ]
    return Reductions(steps, torch.tensor(shares, dtype=torch.float64).to(device))


def sum_over_shards(
    sums: Tensor, needed: Reductions | None, rows: slice | Tensor, *, with_momentum: bool
) -> Tensor:
    """Sums [k, n] of local parts, of the rows `rows` of all → of the whole tensors, float32; None: what it was given.

    They are added in float64: then the order in which the network adds them does not show in the rounded result, and
    ranks that hold copies of the same shard, and reduce over different groups, get the same bits. All rows are sent,
    and a count: where only some ranks have a gradient of a row, its sums are NaN on all ranks. The
    last sum of four, ⟨w,m⟩, is sent `with_momentum` only.
    """
    if needed is None:
        return sums
    sent = sums if with_momentum else sums[:-1]
    total = sums.new_zeros(len(sent) + 1, len(needed.shares), dtype=torch.float64)
    total[:-1, rows], total[-1, rows] = sent.double(), 1.0
    all_reduce_rows(total, needed)
    complete = total[-1] == needed.shares
    whole = torch.where(complete, total[:-1], torch.nan)[:, rows].float()
    return torch.cat([whole, sums[len(sent) :]])


def all_reduce_rows(sums: Tensor, needed: Reductions | None) -> None:
    """Add up sums [k, R] of all rows over the ranks that have parts of them, in place; None: these are whole."""
    if needed is None:
        return
    from torch import distributed

    for group, columns, device in needed.steps:
        part = sums[:, columns].to(device)
        distributed.all_reduce(part, group=group)
        sums[:, columns] = part.to(sums.device)


def is_zero(value: object) -> bool:
    """Whether it is a `ZeroRedundancyOptimizer`, which deals out the layers to the ranks."""
    module = sys.modules.get(ZERO)
    return module is not None and isinstance(value, module.ZeroRedundancyOptimizer)


def is_inside_zero() -> bool:
    """Whether a `ZeroRedundancyOptimizer` is making this optimizer, for the layers of one rank."""
    frame = sys._getframe(1) if ZERO in sys.modules else None
    while frame is not None:
        if is_zero(frame.f_locals.get("self")):
            return True
        frame = frame.f_back
    return False


def check_placement(p: Any, rule: object, *, inside_zero: bool) -> None:
    """Refuse parameters whose norm cannot be known here. `rule`: None if there is none.

    Raises:
        ValueError: a DTensor that is a partial sum or that this rank has no part in; with a rule, a parameter flattened
            by FSDP1 or dealt out by ZeroRedundancyOptimizer.
    """
    if not isinstance(p, Tensor):
        return
    if is_dtensor(p) and any(placement.is_partial() for placement in p.placements):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} has placements {p.placements}: a partial sum is no weight to "
            "update; parameters must be Shard or Replicate, so call p.redistribute(...) first"
        )
    if is_dtensor(p) and p.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is on {p.device_mesh}, which this rank is not in: give the "
            "optimizer of a rank only the parameters that the rank has a part of"
        )
    if rule is not None and hasattr(p, "_fsdp_flattened"):
        raise ValueError(
            f"rule={rule!r} needs the norm of every layer, but FullyShardedDataParallel has flattened these parameters "
            "into pieces of many: use torch.distributed.fsdp.fully_shard (FSDP2), or rule=None, project=False"
        )
    if rule is not None and inside_zero:
        raise ValueError(
            f"rule={rule!r}: ZeroRedundancyOptimizer gives each rank some of the layers, and a rule needs all of them: "
            "shard the model by torch.distributed.fsdp.fully_shard instead, or pass rule=None"
        )
