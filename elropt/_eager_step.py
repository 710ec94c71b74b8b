"""One step on any backend: measure → decide → update, over groups of tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._group_values import (
    decay_of,
    diffusion_of,
    has_lr_by_row,
    least_size,
    lr_of,
    lr_ratio,
    momentum_coefficients,
    settling_of,
)
from ._validate import check_step_tensors
from .backend import Backend, UpdateOptions, choose_backend
from .rules import LayerControls, LayerStats, RowHyper, RuleState, decide
from .sharding import Reductions, Shard, local, local_grad, rows_here, sum_over_shards

__all__ = [
    "Group",
    "LayerMeasurements",
    "hyper_of_rows",
    "measure",
    "measure_decide_update",
    "tensors_with_gradients",
    "update_groups",
    "upload",
    "values_of_rows",
]

_NOTHING: dict[str, Any] = {}


class LayerMeasurements(NamedTuple):
    """What a step measured and applied: `params[i]` owns the next `row_counts[i]` rows of every vector."""

    params: Sequence[Tensor]
    row_counts: Sequence[int]
    lrs: Sequence[float | Tensor]
    per_filter: bool
    stats: LayerStats
    controls: LayerControls
    tracked: Tensor


class Group(NamedTuple):
    """Tensors of neighbouring param groups that have a gradient and are updated together, on one device.

    Attributes:
        owners: the optimizer's parameters.
        params, grads: the parts of the owners and of their gradients on this rank: plain tensors of equal shapes.
        shards: which parts these are; None: all of the tensor.
        momentum_buffers: one per parameter, None before its first step.
        row_counts: for each parameter the number of rows it has in the rule's vectors: 0 if the rule leaves it
            alone, 1, or with granularity "filter" the size of its dimension 0, of the whole tensor.
        options: of the update.
        backend: who computes it, see `choose_backend`.
        lr_ratio: of the learning rate of the rows that are found to be tracked to `lr`.
        settling: as `options.weight_decay`, of rule "equilibrium"; 0 for others.
        diffusion: with `RuleKey.protect`, see `elropt.rules.diffusion`.
    """

    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    shards: list[Shard | None]
    momentum_buffers: list[Tensor | None]
    row_counts: list[int]
    options: UpdateOptions
    backend: Backend
    lr_ratio: float = 1.0
    settling: float | Tensor | list[float] = 0.0
    diffusion: float = 0.0

    def rows_here(self, *, per_filter: bool) -> list[tuple[int, int]]:
        """For each tensor the (first, count) of its rows that this rank has a part of."""
        if not any(self.shards):
            return [(0, count) for count in self.row_counts]
        return [
            rows_here(shard, count, by_rows=per_filter and count > 1)
            for count, shard in zip(self.row_counts, self.shards, strict=True)
        ]


def tensors_with_gradients(
    groups: Sequence[Mapping[str, Any]],
    row_counts: Sequence[Sequence[int]],
    shards: Mapping[Tensor, Shard | None],
    state: Mapping[Tensor, Mapping[str, Any]],
    *,
    per_filter: bool,
) -> list[Group]:
    """The tensors of param groups that have a gradient. Changes nothing.

    Neighbouring param groups become one `Group` where their bits do not depend on it, and a param group becomes several
    where neighbouring tensors are on different devices.

    Args:
        groups: param groups.
        row_counts: of each group, for each of its parameters.
        shards: of the parameters that are DTensors.
        state: of the optimizer, whose momentum buffers are used.
        per_filter: granularity "filter".

    Raises:
        RuntimeError: a gradient or a buffer that cannot be applied; names it and the remedy.
    """
    runs: list[list[tuple[Any, ...]]] = []
    key_before: object = None
    for group, counts in zip(groups, row_counts, strict=True):
        options = _options_in_common(group)
        lr, decay, settling = lr_of(group), decay_of(group), settling_of(group)
        for p, count in zip(group["params"], counts, strict=True):
            grad = p.grad
            if grad is None:
                continue
            key = p.device, options
            if key != key_before:
                runs.append([])
                key_before = key
            runs[-1].append((p, grad, count, lr, decay, settling, group))
    return [_group_of(shards, state, per_filter, *map(list, zip(*run, strict=True))) for run in runs]


def _group_of(
    shards: Mapping[Tensor, Shard | None],
    state: Mapping[Tensor, Mapping[str, Any]],
    per_filter: bool,
    params: list[Tensor],
    grads: list[Tensor],
    row_counts: list[int],
    lrs: list[float | Tensor],
    decays: list[float | Tensor],
    settlings: list[float | Tensor],
    groups: list[Mapping[str, Any]],
) -> Group:
    """Of tensors on one device: `groups` are the param groups of each."""
    group, device = groups[0], params[0].device
    held: list[Tensor | None] = [None] * len(params)
    if group["momentum"] != 0:
        held = [state.get(p, _NOTHING).get("momentum_buffer") for p in params]
    check_step_tensors(params, grads, held, row_counts, groups)
    row_counts = [
        count if g.layout == torch.strided else 0 for g, count in zip(grads, row_counts, strict=True)
    ]
    parts, buffers = params, held
    if shards and not group["differentiable"]:
        parts = list(map(local, params))
        grads = list(map(local_grad, params, grads))
        buffers = [None if m is None else local(m) for m in held]
    return Group(
        params,
        parts,
        grads,
        [shards.get(p) for p in params] if shards else [None] * len(params),
        buffers,
        row_counts,
        UpdateOptions(
            lr=_common(lrs, device),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=_common(decays, device),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        ),
        choose_backend(
            parts,
            grads,
            buffers,
            foreach=group["foreach"],
            fused=group["fused"],
            differentiable=group["differentiable"],
            per_filter=per_filter,
            tensor_decay=isinstance(group["weight_decay"], Tensor),
            lr_by_row=has_lr_by_row(group),
        ),
        lr_ratio(group) if has_lr_by_row(group) else 1.0,
        _common(settlings, device),
        diffusion_of(group),
    )


def measure_decide_update(
    groups: Sequence[Group],
    state: RuleState,
    hyper: RowHyper,
    *,
    rule: str | None,
    granularity: str = "layer",
    project: bool = False,
    of_update: bool = False,
    protect: bool = False,
    absent: Tensor | None = None,
    rows: slice | Tensor = slice(None),
    reductions: Reductions | None = None,
    with_tests: bool = True,
    with_dot: bool = True,
) -> tuple[LayerStats, LayerControls, RuleState, list[list[Tensor | None]]]:
    """One step in place over all groups that share a rule. Rows are numbered through the groups in order.

    Args:
        groups: what to update.
        state, hyper: the rule's memory and the groups' hyper-parameters, by row.
        rule, granularity, project: as in `ELRSGD`. of_update, protect: see `RuleKey`.
        absent: whether rows that took part earlier have no gradient now (0-dim bool; None: no).
        rows: which of all rows these are, where this rank has only parts of tensors.
        reductions: what makes the sums of all rows those of whole tensors.
        with_tests: whether a row may have radial tests before it.
        with_dot: whether ⟨w,g⟩ is measured, without which there can be neither tests nor `project`.

    Returns:
        What was measured, what was applied, the rule's memory after the step, and of each group the momentum buffers.
    """
    per_filter = granularity == "filter"
    stats = measure(
        groups,
        state.radius.device,
        per_filter=per_filter,
        with_momentum=project,
        with_update=of_update or protect,
        with_dot=with_dot,
        rows=rows,
        reductions=reductions,
    )
    controls, state = decide(
        rule,
        stats,
        state,
        hyper,
        granularity=granularity,
        project=project,
        of_update=of_update,
        protect=protect,
        absent=absent,
        with_tests=with_tests,
    )
    buffers = update_groups(groups, controls, per_filter=per_filter)
    return stats, controls, state, buffers


def measure(
    groups: Sequence[Group],
    device: torch.device,
    *,
    per_filter: bool,
    with_momentum: bool,
    with_update: bool = False,
    with_dot: bool = True,
    rows: slice | Tensor = slice(None),
    reductions: Reductions | None = None,
) -> LayerStats:
    """The sums over every row of all groups, gathered on one device, of whole tensors (`reductions`)."""
    with_momentum = with_momentum or with_update
    sums = [torch.empty(6 if with_update else 4, 0, dtype=torch.float32, device=device)]
    for group in groups:
        here = group.rows_here(per_filter=per_filter)
        parts = [torch.zeros(len(sums[0]), 0, dtype=torch.float32, device=device)]
        for by_filter, indices in _alike(here, group.row_counts, per_filter=per_filter):
            part = group.backend.measure(
                [group.params[i] for i in indices],
                [group.grads[i] for i in indices],
                [group.momentum_buffers[i] for i in indices] if with_momentum else None,
                per_filter=by_filter,
                with_dot=with_dot,
                with_update=with_update,
            )
            if group.options.maximize:
                part[2::3].neg_()  # ⟨w,g⟩, ⟨g,m⟩
            parts.append(part.to(device, non_blocking=True))
        part = parts[-1] if len(parts) <= 2 else torch.cat(parts, dim=1)
        sums += _with_rows_elsewhere(part, here, group.row_counts)
    total = sum_over_shards(torch.cat(sums, dim=1), reductions, rows, with_momentum=with_momentum)
    return LayerStats(*total)


def _alike(
    rows: Sequence[tuple[int, int]], row_counts: Sequence[int], *, per_filter: bool
) -> list[tuple[bool, list[int]]]:
    """The tensors with rows, in runs of neighbours that have a row per filter, or one each."""
    measured = [i for i, (_, count) in enumerate(rows) if count]
    runs = itertools.groupby(measured, lambda i: per_filter and row_counts[i] > 1)
    return [(by_filter, list(run)) for by_filter, run in runs]


def _with_rows_elsewhere(
    part: Tensor, rows: Sequence[tuple[int, int]], row_counts: Sequence[int]
) -> list[Tensor]:
    """The sums [k, n] of the rows on this rank, with zeros for those on other ranks, in pieces to concatenate."""
    if all(here == (0, count) for here, count in zip(rows, row_counts, strict=True)):
        return [part]
    pieces, taken = [], 0
    for (first, here), count in zip(rows, row_counts, strict=True):
        pieces += [part.new_zeros(len(part), first), part[:, taken : taken + here]]
        pieces += [part.new_zeros(len(part), count - first - here)]
        taken += here
    return pieces


def update_groups(
    groups: Sequence[Group], controls: LayerControls, *, per_filter: bool = False
) -> list[list[Tensor | None]]:
    """Update every group in place, and return its momentum buffers. Without controls this is plain SGD."""
    factors = {name: vector for name, vector in controls._asdict().items() if vector is not None}
    first = 0
    buffers_of_groups = []
    for group in groups:
        rows: list[tuple[int, int] | None] = []
        if factors:
            for (begin, here), count in zip(
                group.rows_here(per_filter=per_filter), group.row_counts, strict=True
            ):
                rows.append((first + begin, here) if here else None)
                first += count
        buffers = list(group.momentum_buffers)
        group.backend.update(
            group.params,
            group.grads,
            buffers,
            **group.options._asdict(),
            **factors,
            rows=rows if factors else None,
        )
        buffers_of_groups.append(buffers)
    return buffers_of_groups


def values_of_rows(groups: Sequence[Group]) -> list[tuple[Any, ...]]:
    """The values of each group that `hyper_of_rows` depends on, with 0 in place of a tensor."""
    return [
        (
            *(0.0 if isinstance(v, Tensor) else v for v in (group.options.lr, group.options.weight_decay)),
            0.0 if isinstance(group.settling, Tensor) else group.settling,
            group.options.momentum,
            group.options.dampening,
            group.options.nesterov,
            group.lr_ratio,
            group.diffusion,
            group.row_counts,
            [m is not None for m in group.momentum_buffers],
            [p.numel() for p in group.owners],
            list(map(least_size, group.owners)),
        )
        for group in groups
    ]


def hyper_of_rows(values: Sequence[tuple[Any, ...]], device: torch.device) -> RowHyper:
    """The hyper-parameters of groups with these `values_of_rows`, by row."""
    columns = [
        (
            *(lr, decay),
            *momentum_coefficients(*of_momentum, has_buffer=has_buffer),
            *(numel / count, ratio, settling, diffusion, least_size, count),
        )
        for lrs, decays, settlings, *of_momentum, ratio, diffusion, counts, have_buffers, numels, least_sizes in values
        for lr, decay, settling, count, has_buffer, numel, least_size in zip(
            *(v if isinstance(v, list) else [v] * len(counts) for v in (lrs, decays, settlings)),
            counts,
            have_buffers,
            numels,
            least_sizes,
            strict=True,
        )
        if count
    ]
    *by_row, counts = np.array(columns, dtype=np.float32).T
    return RowHyper(*upload(np.repeat(np.stack(by_row), counts.astype(np.int64), axis=1), device))


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _scalar(value: float | Tensor, device: torch.device) -> float | Tensor:
    """A tensor hyper-parameter as a 0-dim tensor on the device of the parameters."""
    if not isinstance(value, Tensor):
        return value
    return local(value).squeeze().to(device, non_blocking=True)


def _common(values: list[Any], device: torch.device) -> float | Tensor | list[float]:
    """The value of all tensors, or if these differ, all values."""
    if isinstance(values[0], Tensor):
        return _scalar(values[0], device)
    return values if any(value != values[0] for value in values) else values[0]


def _options_in_common(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What neighbouring groups must have in common to be updated together. Numbers lr and decay may differ, tensors
    must be the same object. Only on the CPU, and not with `foreach=True`: elsewhere the bits of a tensor may depend on
    its neighbours."""
    lr, decay = group["lr"], group["weight_decay"]
    values: tuple[object, ...] = ()
    if isinstance(lr, Tensor) or isinstance(decay, Tensor):
        values = id(lr), id(decay), lr_ratio(group), group.get("scale_invariant")
    if group["fused"] or group["foreach"] or not all(p.is_cpu for p in group["params"]):
        values = (id(group),)
    return (
        values,
        lr_ratio(group) if has_lr_by_row(group) else 1.0,
        group["momentum"],
        group["dampening"],
        group["nesterov"],
        group["maximize"],
        group["foreach"],
        group["fused"],
        group["differentiable"],
    )
