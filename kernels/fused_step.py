"""A step over the same tensors as the step before: one launch measures and decides, another updates."""
# Triton's launches look like calls of Python functions, but type checkers cannot follow them.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .args import Factors, Rows, Tables
from .cooperative import MAX_REGISTERS, cooperative_kernel, max_programs
from .decide import RULES, UPDATE_RULES
from .graph_tables import GraphTables
from .hyper_arguments import GroupArguments, GroupHyper, HyperArguments
from .launches import LaunchKey, make_launches
from .measure import measure_kernel, register_limit
from .tables import Row, refuse_upload_in_capture, triples_of, upload
from .update import update_kernel

__all__ = ["DecisionInputs", "FusedStep", "StepPlan"]

PLAIN_TYPES = {Tensor, torch.nn.Parameter}
_STRIDED = {torch.strided}
_NO_FACTORS = Factors()


class DecisionInputs(NamedTuple):
    """What is decided, and where the rule remembers it.

    name: of the rule, as in `decide.RULES` (with `of_update`, `decide.UPDATE_RULES`); None: SGD, whose layers are
        measured (and projected) all the same.
    whole: granularity "network". project: whether the radial part of the update is removed.
    scales_weights: whether the rule sets a. ends: whether it sets `handed_over`, after which it does nothing.
    memory: float32 [3, R], the rule's c, radius and tracked. handed_over: float32 [2], with the largest λΓ behind it.
    of_update: whether the rule is about the update and not the gradient. Its radial part is then removed anyhow, and
        `project` says that ⟨w,g⟩ counts even after the radial tests.
    least_size: float32 [R], where rows that are not tracked are held back, see `args.Rows`. For rules about the update.
    """

    name: str | None
    whole: bool
    project: bool
    scales_weights: bool
    ends: bool
    memory: Tensor
    handed_over: Tensor
    of_update: bool = False
    least_size: Tensor | None = None

    @property
    def needs_momentum(self) -> bool:
        """Whether ⟨w,m⟩ is needed before the update."""
        return self.project or self.of_update


class StepPlan(NamedTuple):
    """What a step is to do about its tables: where the gradients are, and whether a CUDA graph captures the step."""

    grad_pointers: tuple[int, ...]
    in_capture: bool


class FusedStep:
    """The launches of a step, with tables and scratch memory on the device that are made once.

    `plan` says whether they still fit and changes nothing; `step` measures, decides and updates.

    Args:
        params, grads, buffers: tensors that `can_use` accepts; buffers are None in groups without momentum, and made by
            `new_buffer` where a tensor had none.
        groups: for each tensor the number of its param group.
        kinds: for each param group.
        rows: for each tensor the (first, count) of its rows in the memory of the rule; None: it has none.
        rule: None: nothing is measured and decided.
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

        self._make_memory(params, groups, rows)
        self.launches = make_launches(
            triples_of(params, grads, buffers),
            rows,
            groups,
            kinds,
            sums=self.sums,
            counters=self.counters,
            number=number,
            of_update=rule is not None and rule.of_update,
        )
        self.tables = [launch.arguments for launch in self.launches]
        self.cooperates = (
            len(self.launches) == 1
            and self.n_deciding > 0
            and self.launches[0].table.n_chunks <= max_programs(self.device)
            # beside the sums of an update rule, wide gradients of narrow weights do not fit into registers
            and not (rule is not None and rule.of_update and grads[0].dtype != params[0].dtype)
        )
        if self.cooperates:
            self.scratch_with_gate = self.launches[0].scratch._replace(gate=self.gate)
        self.addresses = [launch.table.addresses for launch in self.launches]
        self.hypers = HyperArguments(len(kinds), self.device)
        self.graph_tables = GraphTables(len(kinds), self.device)
        self.graph_tables.make_ready(self.grad_pointers, self.addresses)

    def _make_memory(self, params: Sequence[Tensor], groups: Sequence[int], rows: Sequence[Row]) -> None:
        """All that has an entry per row. A row that no launch measures keeps ‖g‖² = −1: no gradient."""
        self.n_rows = n_rows = 0 if self.rule is None else self.rule.memory.shape[1]
        numel, group_of_row = np.ones(n_rows, np.float32), np.zeros(n_rows, np.int32)
        self.n_deciding, self.measured = 0, []
        for p, group, row in zip(params, groups, rows, strict=True):
            if row is not None:
                first, count = row
                numel[first : first + count] = max(p.numel() / max(count, 1), 1)
                group_of_row[first : first + count] = group
                self.n_deciding += count
                self.measured.append(p)
        self.sums = torch.full((7, n_rows), -1.0, dtype=torch.float32, device=self.device)
        self.counters = torch.zeros(n_rows + 1, dtype=torch.int32, device=self.device)
        # parameters that are parts of one tensor may share its version counter, which then counts each of them
        self.shares_counters = len({p.untyped_storage().data_ptr() for p in self.measured}) < len(
            self.measured
        )
        self.controls = torch.ones(5 * n_rows, dtype=torch.float32, device=self.device)
        self.s, self.a, self.p, self.lrs, self.f = self.controls.view(5, n_rows)
        self.p.zero_()
        self.versions: tuple[list[int], list[int]] | None = None
        self.gate = torch.zeros((), dtype=torch.int32, device=self.device)
        rule = self.rule
        if rule is not None:
            self.rows = Rows(
                rule.memory,
                rule.handed_over if rule.ends else None,
                self.controls,
                upload(numel, self.device),
                upload(group_of_row, self.device),
                rule.least_size,
            )
            self.decision = {
                "RULE": (UPDATE_RULES if rule.of_update else RULES)[rule.name],
                "WHOLE": rule.whole,
                "PROJECT": rule.project,
            }
            self.factors = Factors(
                self.s if rule.name is not None else None,
                self.a if rule.scales_weights or rule.of_update else None,
                self.p if rule.needs_momentum else None,
                self.f if rule.of_update else None,
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
                tables, groups = self._follow(plan, lrs, hypers)
                if together:
                    self._cooperate(tables, groups, amp, rounding_step)
                else:
                    if rule is not None:
                        self._measure(rule, tables, groups, read_all, amp)
                    self._update(rule, tables, groups, amp, rounding_step)
        except (
            BaseException
        ):  # after the first launch, the counters count programs whose step has been given up
            self.counters.zero_()
            self.versions = None
            raise
        # Autograd cannot see these writes. It never saves momentum buffers, so theirs are not counted.
        torch.autograd.graph.increment_version(self.params)
        if rule is None or together:  # the update has left no sums of the new weights
            self.versions = None
        elif self.shares_counters and self.versions is not None:
            self.versions = [p._version for p in self.measured], self.versions[1]

    def _follow(
        self, plan: StepPlan, lrs: Sequence[float | Tensor], hypers: tuple[GroupHyper, ...]
    ) -> tuple[list[Tables], GroupArguments]:
        """The tables of each launch and the arguments of the groups, for this step. Nothing waits for the device."""
        if plan.in_capture:
            of_graph = self.graph_tables.take(plan.grad_pointers, self._addresses_for)
            tables = [
                of_launch._replace(addresses=addresses)
                for of_launch, addresses in zip(self.tables, of_graph.addresses, strict=True)
            ]
            return tables, of_graph.hypers.of(lrs, hypers, of_graph.host_hypers)
        if plan.grad_pointers != self.grad_pointers:
            self.grad_pointers = ()  # what the tables hold is unknown until all of them have been written
            for array, addresses in zip(self._addresses_for(plan.grad_pointers), self.addresses, strict=True):
                host = torch.from_numpy(array)
                addresses.copy_(host.pin_memory() if addresses.is_cuda else host, non_blocking=True)
            self.grad_pointers = plan.grad_pointers
        self.graph_tables.make_ready(plan.grad_pointers, self.addresses)
        return self.tables, self.hypers.of(lrs, hypers)

    def _addresses_for(self, grad_pointers: Sequence[int]) -> list[np.ndarray]:
        return [launch.addresses_with(grad_pointers) for launch in self.launches]

    def _measure(
        self,
        rule: DecisionInputs,
        tables: list[Tables],
        groups: GroupArguments,
        read_all: bool,
        amp: dict[str, Tensor | None],
    ) -> None:
        # The sums that the last update left are those of the weights (and buffers) as they are, unless PyTorch knows
        # of a write since.
        weights = [p._version for p in self.measured]
        buffers = [m._version for m in self.buffers] if rule.needs_momentum else []
        unknown = (weights, buffers) != self.versions
        self.versions = [version + 1 for version in weights], buffers  # after the update that follows
        for launch, tables_of_launch in zip(self.launches, tables, strict=True):
            if launch.table.n_measured > 0:
                measure_kernel[(launch.table.n_measured,)](
                    tables_of_launch,
                    launch.scratch,
                    self.n_rows,
                    read_all=int(unknown or read_all or rule.project),
                    read_momentum=int(unknown),
                    **amp,
                    n_deciding=self.n_deciding,
                    rows=self.rows,
                    lrs=groups.lrs,
                    hypers=groups.measure,
                    **self.decision,
                    HAS_BUFFERS=rule.needs_momentum and launch.kind.has_momentum,
                    MAXIMIZE=launch.kind.maximize,
                    **launch.options,
                    **register_limit(groups.measure),
                )

    def _update(
        self,
        rule: DecisionInputs | None,
        tables: list[Tables],
        groups: GroupArguments,
        amp: dict[str, Tensor | None],
        rounding_step: Tensor | None,
    ) -> None:
        factors = _NO_FACTORS if rule is None else self.factors
        for launch, tables_of_launch in zip(self.launches, tables, strict=True):
            update_kernel[(launch.table.n_chunks,)](
                tables_of_launch,
                groups.lrs,
                groups.update[launch.kind.has_momentum],
                factors,
                launch.scratch.partials,
                launch.rounding(rounding_step),
                **amp,
                SUMS=0 if rule is None else 2 if rule.needs_momentum else 1,
                NESTEROV=launch.kind.nesterov,
                MAXIMIZE=launch.kind.maximize,
                **launch.options,
            )

    def _cooperate(
        self,
        tables: list[Tables],
        groups: GroupArguments,
        amp: dict[str, Tensor | None],
        rounding_step: Tensor | None,
    ) -> None:
        (launch,), (tables_of_launch,) = self.launches, tables
        table, has_momentum = launch.table, launch.kind.has_momentum
        cooperative_kernel[(table.n_chunks,)](
            tables_of_launch,
            self.scratch_with_gate,
            self.n_rows,
            self.n_deciding + table.n_chunks - table.n_measured,  # and the programs without a row
            self.rows,
            groups.lrs,
            groups.together[has_momentum],
            self.factors,
            launch.rounding(rounding_step),
            **amp,
            **self.decision,
            HAS_BUFFERS=has_momentum,
            NESTEROV=launch.kind.nesterov,
            MAXIMIZE=launch.kind.maximize,
            **launch.options,
            **({"maxnreg": MAX_REGISTERS, "launch_cooperative_grid": True} if self.gate.is_cuda else {}),
        )


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _layouts(grads: Sequence[Tensor]) -> object:
    """All that launches depend on, beside addresses. Shapes are those of the parameters: torch checks that."""
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
