"""One ELRSGD step without an optimizer: measure → decide → update."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import foreach as foreach_backend
from . import kernels as triton_backend
from . import reference as reference_backend
from .rules import LayerControls, LayerStats, RowHyper, RuleState, decide
from .sharding import Reductions, Shard, sum_over_shards

__all__ = ["Group", "choose_backend", "measure", "measure_decide_update", "update_groups"]

SAME_BITS = {torch.float32, torch.float64}


@dataclasses.dataclass
class Group:
    """Tensors of one param group that have a gradient, on one device, and the group's hyper-parameters.

    Attributes:
        owners: the optimizer's parameters.
        params, grads: what lies here of them and of their gradients: plain tensors of equal shapes.
        shards: which part that is; None: all of it.
        momentum_buffers: one per parameter, None before its first step; `measure_decide_update` fills them in.
        row_counts: for each parameter the number of rows it has in the rule's vectors: 0 if the rule leaves it
            alone, 1, or with granularity "filter" the size of its dimension 0, of the whole tensor.
        lr, weight_decay: of all tensors, or a list with one for each.
        backend: a module with `measure` and `update`, see `choose_backend`.
        lr_ratio: of the learning rate of the rows that are found to be tracked to `lr`.
    """

    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    shards: list[Shard | None]
    momentum_buffers: list[Tensor | None]
    row_counts: list[int]
    lr: float | Tensor | list[float]
    momentum: float
    dampening: float
    weight_decay: float | Tensor | list[float]
    nesterov: bool
    maximize: bool
    backend: ModuleType
    lr_ratio: float = 1.0

    def rows_here(self, *, per_filter: bool) -> list[tuple[int, int]]:
        """Of the rows of each tensor, the (first, count) that something of lies here."""
        if not any(self.shards):
            return [(0, count) for count in self.row_counts]
        return [
            (0, count)
            if shard is None or count == 0
            else (shard.first, shard.count)
            if per_filter
            else (0, min(shard.count, 1))
            for count, shard in zip(self.row_counts, self.shards, strict=True)
        ]


def measure_decide_update(
    groups: Sequence[Group],
    state: RuleState,
    hyper: RowHyper,
    *,
    rule: str | None,
    granularity: str = "layer",
    project: bool = False,
    absent: Tensor | None = None,
    rows: slice | Tensor = slice(None),
    reductions: Reductions | None = None,
    with_tests: bool = True,
    with_dot: bool = True,
) -> tuple[LayerStats, LayerControls, RuleState]:
    """One step in place over all groups that share a rule. Rows are numbered through the groups in order.

    Args:
        groups: what to update.
        state, hyper: the rule's memory and the groups' hyper-parameters, by row.
        rule, granularity, project: as in `ELRSGD`.
        absent: whether rows that took part earlier have no gradient now (0-dim bool; None: no).
        rows: which of all rows these are, where only parts of tensors lie here.
        reductions: what makes the sums of all rows those of whole tensors.
        with_tests: whether a row may have radial tests before it.
        with_dot: whether ⟨w,g⟩ is measured, without which there can be neither tests nor `project`.

    Returns:
        What was measured, what was applied, and the rule's memory after the step.
    """
    per_filter = granularity == "filter"
    stats = measure(
        groups,
        state.radius.device,
        per_filter=per_filter,
        with_momentum=project,
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
        absent=absent,
        with_tests=with_tests,
    )
    update_groups(groups, controls, per_filter=per_filter)
    return stats, controls, state


def measure(
    groups: Sequence[Group],
    device: torch.device,
    *,
    per_filter: bool,
    with_momentum: bool,
    with_dot: bool = True,
    rows: slice | Tensor = slice(None),
    reductions: Reductions | None = None,
) -> LayerStats:
    """The sums over every row of all groups, gathered on one device, of whole tensors (`reductions`)."""
    sums = [torch.empty(4, 0, dtype=torch.float32, device=device)]
    for group in groups:
        here = group.rows_here(per_filter=per_filter)
        measured = [i for i, (_, count) in enumerate(here) if count]
        part = torch.zeros(4, 0, dtype=torch.float32, device=device)
        if measured:
            part = group.backend.measure(
                [group.params[i] for i in measured],
                [group.grads[i] for i in measured],
                [group.momentum_buffers[i] for i in measured] if with_momentum else None,
                per_filter=per_filter,
                with_dot=with_dot,
            )
            if group.maximize:
                part[2].neg_()
            part = part.to(device, non_blocking=True)
        sums += _with_rows_elsewhere(part, here, group.row_counts)
    total = sum_over_shards(torch.cat(sums, dim=1), reductions, rows, with_momentum=with_momentum)
    return LayerStats(*total)


def _with_rows_elsewhere(
    part: Tensor, rows: Sequence[tuple[int, int]], row_counts: Sequence[int]
) -> list[Tensor]:
    """The sums [4, n] of the rows that are here, with zeros for the others in between, to be concatenated."""
    if all(here == (0, count) for here, count in zip(rows, row_counts, strict=True)):
        return [part]
    pieces, taken = [], 0
    for (first, here), count in zip(rows, row_counts, strict=True):
        pieces += [part.new_zeros(4, first), part[:, taken : taken + here]]
        pieces += [part.new_zeros(4, count - first - here)]
        taken += here
    return pieces


def update_groups(groups: Sequence[Group], controls: LayerControls, *, per_filter: bool = False) -> None:
    """Update every group. Without controls this is plain SGD."""
    by_row = any(vector is not None for vector in controls)
    first = 0
    for group in groups:
        rows: list[tuple[int, int] | None] = []
        if by_row:
            for (begin, here), count in zip(
                group.rows_here(per_filter=per_filter), group.row_counts, strict=True
            ):
                rows.append((first + begin, here) if here else None)
                first += count
        factors = controls._asdict()
        if group.backend is triton_backend:  # which has no rows with a learning rate of their own
            del factors["lr_factor"]
        group.backend.update(
            group.params,
            group.grads,
            group.momentum_buffers,
            lr=group.lr,
            momentum=group.momentum,
            dampening=group.dampening,
            weight_decay=group.weight_decay,
            nesterov=group.nesterov,
            maximize=group.maximize,
            rows=rows if by_row else None,
            **factors,
        )


def choose_backend(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    foreach: bool | None,
    fused: bool | None,
    differentiable: bool = False,
    per_filter: bool = False,
    tensor_decay: bool = False,
    lr_by_row: bool = False,
) -> ModuleType:
    """The module that updates these tensors: what is asked for; else on CUDA fused where every tensor qualifies and
    foreach otherwise; on the CPU foreach, where its bits are those of one tensor after the other; else these.

    Raises:
        RuntimeError: ``fused=True`` but a tensor does not qualify.
    """
    tensors = params, grads, momentum_buffers
    if fused and not triton_backend.can_use(*tensors, per_filter=per_filter):
        unavailable = triton_backend.why_unavailable()
        raise RuntimeError(
            "fused=True needs triton and dense float32, bfloat16 or float16 parameters on one CUDA device, with "
            f"gradients of the same strides, but the group holds {_describe(params)}"
            f"{'' if unavailable is None else f'; {unavailable}'}. "
            "Use fused=None to let ELRSGD choose."
        )
    ours_to_choose = foreach is None and fused is None and not differentiable
    on_cuda = ours_to_choose and all(p.is_cuda for p in params)
    if fused or (
        on_cuda
        and not tensor_decay
        and not lr_by_row
        and triton_backend.can_use(*tensors, per_filter=per_filter)
    ):
        return triton_backend
    on_cpu = ours_to_choose and _has_same_bits(params, grads, momentum_buffers)
    if (foreach or on_cuda or on_cpu) and foreach_backend.can_use(*tensors, per_filter=per_filter):
        return foreach_backend
    return reference_backend


def _has_same_bits(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor | None]
) -> bool:
    """Whether `torch._foreach_*` and single operations give the same bits: on the CPU, where dtypes are not mixed."""
    dtypes = [p.dtype for p in params]
    return (
        all(p.is_cpu for p in params)
        and set(dtypes) <= SAME_BITS
        and dtypes == [g.dtype for g in grads]
        and dtypes == [d if m is None else m.dtype for m, d in zip(momentum_buffers, dtypes, strict=True)]
    )


def _describe(params: Sequence[Tensor]) -> str:
    kinds = sorted({f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in params})
    return ", ".join(kinds)
