"""One step over tensors that stay the same from step to step: measure and decide in one launch, update in another."""
# Triton's launches look like calls of Python functions, but type checkers cannot follow them.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import tables
from .args import GroupArguments, GroupHyper, HyperArguments
from .cooperative import MAX_REGISTERS, cooperative_kernel, max_programs
from .graph_tables import GraphTables
from .measure import measure_kernel
from .tables import (
    Row,
    Table,
    build_table,
    dtypes_of,
    refuse_upload_in_capture,
    triples_of,
    upload,
)
from .update import update_kernel

__all__ = ["DecisionInputs", "FusedStep", "LaunchKey", "StepPlan"]

PLAIN_TYPES = {Tensor, torch.nn.Parameter}
_STRIDED = {torch.strided}


class LaunchKey(NamedTuple):
    """What the tensors of a param group must share with those of another to be updated in the same launch."""

    has_momentum: bool
    nesterov: bool
    maximize: bool
    seed: int | None  # of stochastic rounding


class DecisionInputs(NamedTuple):
    """What is decided, and where the rule remembers it: `memory` [3, R] c, radius and tests passed; `handed_over`."""

    name: str | None
    whole: bool
    project: bool
    memory: Tensor
    handed_over: Tensor


class StepPlan(NamedTuple):
    """What a step is to do about its tables: where the gradients are, and whether a CUDA graph captures the step."""

    grad_pointers: tuple[int, ...]
    in_capture: bool


class FusedStep:
    """The launches of a step: tables and scratch memory on the device, made once.

    `plan` says whether they still fit and changes nothing; `step` measures, decides and updates.

    Args:
        params, grads, buffers: tensors that `can_use` accepts; buffers are None in groups without momentum, and made by
            `new_buffer` where a tensor had none.
        groups: for each tensor the number of its param group.
        kinds: for each param group.
        rows: for each tensor the (first, count) of its rows in the memory of the rule, or None.
        rule: None where nothing is ever decided.
        number: of this step among those of an optimizer, for the random bits of stochastic rounding.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        buffers: Sequence[Tensor | None],
        *,
        groups: Sequence[int],
        kinds: Sequence[LaunchKey],
        rows: Sequence[Row],
        rule: DecisionInputs | None,
        number: int = 0,
    ) -> None:
        self.device = params[0].device
        refuse_upload_in_capture(self.device)
        self.params, self.buffers = list(params), [m for m in buffers if m is not None]
        self.rule = rule
        self.written = [*self.params, *self.buffers]
        self.written_pointers = _pointers(self.written)
        self.grad_layouts, self.grad_pointers = _layouts(grads), tuple(_pointers(grads))

        triples = triples_of(params, grads, buffers)
        together: dict[Any, list[int]] = {}
        for i, (triple, group) in enumerate(zip(triples, groups, strict=True)):
            kind = kinds[group]
            if triple.w.dtype != torch.bfloat16:
                kind = kind._replace(seed=None)
            together.setdefault((dtypes_of(triple), kind), []).append(i)
        self.launches: list[Launch] = []
        for (_, kind), members in together.items():
            chosen = [[of[i] for i in members] for of in (triples, rows, groups)]
            table = build_table(*chosen, tables.CHUNK)
            if table.n_chunks > 0:
                partials = torch.zeros(table.n_measured, 4, dtype=torch.float32, device=self.device)
                self.launches.append(Launch(table, kind, np.array(members), partials))
        # launches number their elements alike: their seeds must differ
        self.seeds = [
            None if launch.kind.seed is None else _mixed(launch.kind.seed, number, index)
            for index, launch in enumerate(self.launches)
        ]
        self.addresses = [launch.table.addresses for launch in self.launches]
        self.hypers = HyperArguments(len(kinds), self.device)
        self.graph_tables = GraphTables(len(kinds), self.device)
        self.graph_tables.make_ready(self.grad_pointers, self.addresses)
        self._prepare_rule(params, groups, rows, 0 if rule is None else rule.memory.shape[1])

    def _prepare_rule(
        self, params: Sequence[Tensor], groups: Sequence[int], rows: Sequence[Row], n_rows: int
    ) -> None:
        """Scratch memory of the decision. A row that nobody measures keeps its −1 in the sums."""
        numel, group_of_row = np.ones(n_rows, np.float32), np.zeros(n_rows, np.int32)
        self.n_deciding, self.measured = 0, []
        for p, group, row in zip(params, groups, rows, strict=True):
            if row is not None:
                first, count = row
                numel[first : first + count] = max(p.numel() / max(count, 1), 1)
                group_of_row[first : first + count] = group
                self.n_deciding += count
                self.measured.append(p)
        self.numel, self.group_of_row = upload(numel, self.device), upload(group_of_row, self.device)
        self.sums = torch.full((5, n_rows), -1.0, dtype=torch.float32, device=self.device)
        self.counters = torch.zeros(n_rows + 1, dtype=torch.int32, device=self.device)
        # parameters that are parts of one tensor may share its version counter, which then counts each of them
        self.shares_counters = len({p.untyped_storage().data_ptr() for p in self.measured}) < len(
            self.measured
        )
        self.controls = torch.ones(4 * n_rows, dtype=torch.float32, device=self.device)
        self.s, self.a, self.p, self.lrs = self.controls.view(4, n_rows)
        self.p.zero_()
        self.versions: tuple[list[int], list[int]] | None = None
        self.gate = torch.zeros((), dtype=torch.int32, device=self.device)
        self.cooperates = (
            len(self.launches) == 1
            and self.n_deciding > 0
            and self.launches[0].table.n_chunks <= max_programs(self.device)
        )

    def plan(self, grads: Sequence[Tensor]) -> StepPlan | None:
        """What `step` needs to know of these gradients; None if the launches do not fit them, or if a parameter or a
        buffer has moved. Gradients may have moved. Changes nothing.

        Raises:
            RuntimeError: a CUDA graph is being captured and no tables are ready for it.
        """
        if _pointers(self.written) != self.written_pointers or _layouts(grads) != self.grad_layouts:
            return None
        in_capture = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        plan = StepPlan(tuple(_pointers(grads)), in_capture)
        if in_capture:
            self.graph_tables.refuse(plan.grad_pointers)
        return plan

    def step(
        self,
        plan: StepPlan,
        lrs: Sequence[float | Tensor],
        hypers: tuple[GroupHyper, ...],
        *,
        active: bool,
        read_all: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        rounding_step: Tensor | None = None,
    ) -> None:
        """Update parameters and buffers in place.

        Args:
            plan: of this step, from `plan`.
            lrs, hypers: of each param group, see `HyperArguments.of`.
            active: whether the rule takes part; without it, this is SGD.
            read_all: measure every row in full, whatever the rule needs.
            grad_scale, found_inf: one-element float32 tensors on the device, as `torch.amp.GradScaler` gives them: the
                gradients are divided by the one, nothing is changed if the other is not 0.
            rounding_step: 0-dim int64 on the device, what the random bits of stochastic rounding are drawn for.
        """
        rule = self.rule if active else None
        amp = {"grad_scale": grad_scale, "found_inf": found_inf}
        together = rule is not None and self.cooperates
        try:
            with torch.cuda.device_of(self.params[0]):
                addresses, groups = self._follow(plan, lrs, hypers)
                if rule is not None and together:
                    self._cooperate(rule, addresses, groups, amp, rounding_step)
                else:
                    if rule is not None:
                        self._measure(rule, addresses, groups, read_all, amp)
                    self._update(rule, addresses, groups, amp, rounding_step)
        except BaseException:  # between launches: programs have been counted that will not be followed
            self.counters.zero_()
            self.versions = None
            raise
        # Autograd cannot see these writes (and keeps no momentum buffer for later).
        torch.autograd.graph.increment_version(self.params)
        if rule is None or together:  # no sums of the new weights: the cooperative kernel reads them anyway
            self.versions = None
        elif self.shares_counters and self.versions is not None:
            self.versions = [p._version for p in self.measured], self.versions[1]

    def _follow(
        self, plan: StepPlan, lrs: Sequence[float | Tensor], hypers: tuple[GroupHyper, ...]
    ) -> tuple[list[Tensor], GroupArguments]:
        """The address tables and the arguments of the groups for this step. Nothing waits for the device."""
        if plan.in_capture:
            of_graph = self.graph_tables.take(plan.grad_pointers, self._addresses_for)
            return of_graph.addresses, of_graph.hypers.of(lrs, hypers, of_graph.host_hypers)
        if plan.grad_pointers != self.grad_pointers:
            self.grad_pointers = plan.grad_pointers
            for array, addresses in zip(self._addresses_for(plan.grad_pointers), self.addresses, strict=True):
                host = torch.from_numpy(array)
                addresses.copy_(host.pin_memory() if addresses.is_cuda else host, non_blocking=True)
        self.graph_tables.make_ready(plan.grad_pointers, self.addresses)
        return self.addresses, self.hypers.of(lrs, hypers)

    def _addresses_for(self, grad_pointers: Sequence[int]) -> list[np.ndarray]:
        return [launch.addresses_with(grad_pointers) for launch in self.launches]

    def _measure(
        self,
        rule: DecisionInputs,
        addresses_of_launches: list[Tensor],
        groups: GroupArguments,
        read_all: bool,
        amp: dict[str, Tensor | None],
    ) -> None:
        # The sums that the last update left are those of the weights (and buffers) as they are, unless PyTorch knows
        # of a write since.
        weights = [p._version for p in self.measured]
        buffers = [m._version for m in self.buffers] if rule.project else []
        unknown = (weights, buffers) != self.versions
        self.versions = [version + 1 for version in weights], buffers  # after the update that follows
        for launch, addresses in zip(self.launches, addresses_of_launches, strict=True):
            if launch.table.n_measured > 0:
                measure_kernel[(launch.table.n_measured,)](
                    addresses,
                    launch.table.segments,
                    launch.table.chunk_segment,
                    launch.partials,
                    self.sums,
                    self.counters,
                    self.sums.shape[1],
                    read_all=int(unknown or read_all or rule.project),
                    read_momentum=int(unknown),
                    **self._decision(rule, groups),
                    one_minus_dampening=groups.one_minus_dampening,
                    **amp,
                    HAS_BUFFERS=rule.project and launch.kind.has_momentum,
                    MAXIMIZE=launch.kind.maximize,
                    **launch.table.options,
                )

    def _decision(
        self, rule: DecisionInputs, groups: GroupArguments, rowless_programs: int = 0
    ) -> dict[str, Any]:
        return {
            "n_deciding": self.n_deciding + rowless_programs,
            "memory": rule.memory,
            "handed_over": rule.handed_over if rule.name == "warmup" else None,
            "controls": self.controls,
            "numel": self.numel,
            "group_of_row": self.group_of_row,
            "lrs": groups.lrs,
            "decays": groups.decays,
            "gains": groups.gains,
            "per_grads": groups.per_grads,
            "per_momenta": groups.per_momenta,
            "RULE": rule.name,
            "WHOLE": rule.whole,
            "PROJECT": rule.project,
        }

    def _update(
        self,
        rule: DecisionInputs | None,
        addresses_of_launches: list[Tensor],
        groups: GroupArguments,
        amp: dict[str, Tensor | None],
        rounding_step: Tensor | None,
    ) -> None:
        for index, (launch, addresses) in enumerate(zip(self.launches, addresses_of_launches, strict=True)):
            update_kernel[(launch.table.n_chunks,)](
                addresses,
                launch.table.segments,
                launch.table.chunk_segment,
                lrs=groups.lrs,
                decays=groups.decays if groups.is_decayed else None,
                partials=launch.partials,
                **self._factors(rule),
                **amp,
                **self._momentum_and_rounding(launch, index, groups, rounding_step),
                SUMS=0 if rule is None else 2 if rule.project else 1,
                **launch.table.options,
            )

    def _cooperate(
        self,
        rule: DecisionInputs,
        addresses_of_launches: list[Tensor],
        groups: GroupArguments,
        amp: dict[str, Tensor | None],
        rounding_step: Tensor | None,
    ) -> None:
        (launch,), (addresses,) = self.launches, addresses_of_launches
        cooperative_kernel[(launch.table.n_chunks,)](
            addresses,
            launch.table.segments,
            launch.table.chunk_segment,
            launch.partials,
            self.sums,
            self.counters,
            self.gate,
            self.sums.shape[1],
            **self._decision(rule, groups, launch.table.n_chunks - launch.table.n_measured),
            **self._factors(rule),
            **amp,
            **self._momentum_and_rounding(launch, 0, groups, rounding_step),
            HAS_BUFFERS=launch.kind.has_momentum,
            **launch.table.options,
            **({"maxnreg": MAX_REGISTERS, "launch_cooperative_grid": True} if self.gate.is_cuda else {}),
        )

    def _factors(self, rule: DecisionInputs | None) -> dict[str, Tensor | None]:
        """The controls that the rule sets."""
        name = None if rule is None else rule.name
        return {
            "grad_factor": self.s if name is not None else None,
            "weight_factor": self.a if name in ("warmup", "angle", "sphere") else None,
            "radial": self.p if rule is not None and rule.project else None,
        }

    def _momentum_and_rounding(
        self, launch: Launch, index: int, groups: GroupArguments, rounding_step: Tensor | None
    ) -> dict[str, Any]:
        kind = launch.kind
        return {
            "momenta": groups.momenta if kind.has_momentum else None,
            "one_minus_dampening": groups.one_minus_dampening,
            "NESTEROV": kind.nesterov,
            "MAXIMIZE": kind.maximize,
            "seed": None if kind.seed is None else self.seeds[index],
            "step": None if kind.seed is None else rounding_step,
        }


@dataclass(frozen=True)
class Launch:
    """What one launch of the update covers.

    members: the numbers of its tensors among those of the step.
    partials: float32 [n_measured, 4], see `measure_kernel`.
    """

    table: Table
    kind: LaunchKey
    members: np.ndarray
    partials: Tensor

    def addresses_with(self, grad_pointers: Sequence[int]) -> np.ndarray:
        """The addresses of all segments if the gradients (of all tensors, not only these) are there."""
        pointers = self.table.pointers.copy()
        pointers[:, 1] = np.array(grad_pointers, np.int64)[self.members]
        return self.table.addresses_of(pointers)


def _mixed(*numbers: int) -> int:
    """A seed of 63 bits that differs if one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _layouts(grads: Sequence[Tensor]) -> object:
    """What must stay the same of the gradients; their shapes are those of their parameters (torch checks that)."""
    if not PLAIN_TYPES.issuperset(map(type, grads)):
        return None
    if any(map(Tensor.is_neg, grads)):  # lazily negated views
        return None
    layouts = [g.layout for g in grads]
    # only strided tensors have strides
    return (
        layouts,
        [g.dtype for g in grads],
        list(map(Tensor.stride, grads)) if _STRIDED.issuperset(layouts) else None,
    )
