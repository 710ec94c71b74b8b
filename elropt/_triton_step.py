"""One step by the kernels: all tensors of a rule group that have a gradient, measured and updated together."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernels
from ._eager_step import Group, LayerMeasurements, upload
from ._group_values import decay_of, diffusion_of, has_tensor_decay, lr_of, momentum_coefficients, settling_of
from ._rule_memory import State
from .rules import LayerControls, LayerStats

__all__ = ["TritonStep"]

_LAUNCH_OPTIONS = operator.itemgetter(
    "foreach", "fused", "differentiable", "nesterov", "maximize", "stochastic_rounding"
)
_HYPERS = operator.itemgetter("momentum", "dampening", "weight_decay", "nesterov")


class TritonStep:
    """How the kernels see the tensors of a rule group. Made once, and used as long as each step has the same tensors.

    Only `step` and `take_over_buffers` change anything.

    Args:
        groups: the param groups.
        tensors: the tensors that have a gradient, all of which the kernels take; new momentum buffers are made.
        row_counts: for each of the rule group's parameters how many rows it has.
        decision: of the rule; None: there is none.
        rounding_step: the counter of stochastic rounding.
        number: of the rule group among those of the optimizer.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        tensors: Sequence[Group],
        *,
        row_counts: Mapping[Tensor, int],
        decision: kernels.DecisionInputs | None,
        rounding_step: Tensor | None,
        number: int,
    ) -> None:
        self.groups = groups
        self.decision = decision
        self.rounding_step = rounding_step
        # what the launches, or the choice of this backend, depend on
        self.options = list(map(_LAUNCH_OPTIONS, groups))
        self.present_terms = _present_terms(map(_HYPERS, groups))
        self.has_own_lrs = any(group["tracked_lr"] is not None for group in groups)
        self.params = [p for group in tensors for p in group.params]
        self.row_counts = [count for group in tensors for count in group.row_counts]
        grads = [g for group in tensors for g in group.grads]
        held = [
            (g, m, group.options)
            for group in tensors
            for g, m in zip(group.grads, group.momentum_buffers, strict=True)
        ]
        self.buffers: list[Tensor | None] = [
            None if options.momentum == 0 else kernels.new_buffer(g) if m is None else m
            for g, m, options in held
        ]
        self._damped = [
            m for _, m, options in held if m is not None and options.momentum and options.dampening
        ]
        firsts = itertools.accumulate(row_counts.values(), initial=0)
        first_row = dict(zip(row_counts, firsts, strict=False))
        self.rows = [
            (first_row[p], count) if count else None
            for p, count in zip(self.params, self.row_counts, strict=True)
        ]
        number_of_group = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self.launches = kernels.FusedStep(
            self.params,
            grads,
            self.buffers,
            groups=[number_of_group[p] for p in self.params],
            kinds=[
                kernels.LaunchKey(
                    group["momentum"] != 0,
                    bool(group["nesterov"]),
                    bool(group["maximize"]),
                    group["stochastic_rounding"],
                )
                for group in groups
            ],
            rows=self.rows,
            rule=decision,
            number=number,
        )
        # the last values of the groups (None if one is a tensor, which may change in place), and their arguments
        self._values: list[tuple[Any, ...]] | None = None
        self._hypers: tuple[kernels.GroupHyper, ...] = ()

    def plan(self, grads: Sequence[Tensor]) -> kernels.StepPlan | None:
        """What the launches are to do with these gradients; None if they do not fit them or the options of the groups
        as they are now. Changes nothing.

        Raises:
            RuntimeError: a CUDA graph is being captured that cannot have tables of its own.
        """
        if has_tensor_decay(self.groups):  # the kernels have none; and comparing it would wait for the device
            return None
        values = list(map(_HYPERS, self.groups))
        if self.options != list(map(_LAUNCH_OPTIONS, self.groups)) or (
            values != self._values and self.present_terms != _present_terms(values)
        ):
            return None
        return self.launches.plan(grads)

    def step(
        self,
        plan: kernels.StepPlan,
        *,
        active: bool,
        read_all: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Do what `plan` says; see `kernels.FusedStep.step`."""
        device = self.launches.device
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, non_blocking=True)
        if found_inf is not None:
            found_inf = found_inf.to(device, non_blocking=True)
        lrs = list(map(lr_of, self.groups)) if self.has_own_lrs else [group["lr"] for group in self.groups]
        if set(map(type, lrs)) != {float}:
            lrs = [_kernel_lr(lr, device) for lr in lrs]
        values = list(map(_HYPERS, self.groups))
        if values != self._values:
            self._hypers = tuple(map(_kernel_hyper, self.groups))
            # a tensor may change in place
            has_tensors = any(isinstance(value, Tensor) for of_group in values for value in of_group)
            self._values = None if has_tensors else values
        self.launches.step(
            plan,
            lrs,
            self._hypers,
            active=active,
            read_all=read_all,
            grad_scale=grad_scale,
            found_inf=found_inf,
            rounding_step=self.rounding_step,
        )
        if self.rounding_step is not None:
            self.rounding_step.add_(1 if found_inf is None else (found_inf == 0).squeeze())

    def take_over_buffers(self) -> None:
        """Before the first step: −0.0 in buffers from other code marks no new buffer, so write +0.0 over it."""
        for buffer in self._damped:
            kernels.without_marks(buffer)

    def has_buffers_of(self, state: State) -> bool:
        """Whether its momentum buffers are those of the optimizer."""
        return all(
            m is None or state.get(p, {}).get("momentum_buffer") is m
            for p, m in zip(self.params, self.buffers, strict=True)
        )

    def buffers_not_in(self, state: State) -> dict[Tensor, Tensor]:
        """Its momentum buffers that the state of the optimizer does not hold."""
        return {
            p: m
            for p, m in zip(self.params, self.buffers, strict=True)
            if m is not None and state.get(p, {}).get("momentum_buffer") is not m
        }

    def record(self, tracked: Tensor, *, per_filter: bool) -> LayerMeasurements | None:
        """What the kernels measured and applied at the last step; NaN where the rule did not need it.

        Args:
            tracked: of all rows, [R].
            per_filter: granularity "filter".
        """
        launches, decision = self.launches, self.decision
        if decision is None or not any(self.row_counts):
            return None
        numbers = np.concatenate([np.arange(r[0], r[0] + r[1]) for r in self.rows if r is not None])
        rows = upload(numbers, launches.device)
        factors = launches.factors
        controls = LayerControls(*(None if factor is None else factor[rows] for factor in factors))
        lrs: list[float | Tensor] = [
            0.0 if row is None or row[1] == 0 else launches.lrs[row[0]].clone() for row in self.rows
        ]
        stats = LayerStats(*launches.sums[: 6 if decision.of_update else 4, rows])
        return LayerMeasurements(
            self.params, self.row_counts, lrs, per_filter, stats, controls, tracked[rows]
        )


def _present_terms(values: Iterable[tuple[Any, ...]]) -> list[tuple[bool, ...]]:
    """Of groups with these `_HYPERS`: whether there is momentum, and dampening."""
    return [(momentum != 0, dampening != 0) for momentum, dampening, *_ in values]


def _kernel_lr(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A tensor on the CPU is read here, one on a GPU by the kernels."""
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or device.type == "cpu"):
        return lr.to(device)
    return float(lr)


def _kernel_hyper(group: Mapping[str, Any]) -> kernels.GroupHyper:
    """What the kernels need of a param group, but for its learning rate."""
    momentum, dampening = float(group["momentum"]), float(group["dampening"])
    coefficients = momentum_coefficients(momentum, dampening, group["nesterov"], has_buffer=True)
    decay, settling = float(decay_of(group)), float(settling_of(group))
    return kernels.GroupHyper(momentum, dampening, decay, *coefficients, settling, diffusion_of(group))
