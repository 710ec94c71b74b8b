"""The param groups that share a rule: what their next step is to do, and the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import kernels
from ._eager_step import (
    Group,
    LayerMeasurements,
    hyper_of_rows,
    measure,
    measure_decide_update,
    tensors_with_gradients,
    update_groups,
    upload,
    values_of_rows,
)
from ._group_values import count_rows, has_lr_by_row, least_size, lr_gain, may_be_tracked, rule_key
from ._rule_memory import RuleMemory, State
from ._triton_step import TritonStep
from ._warmup_end import LargestLrs, WarmupEndPoll, is_readable
from .reference import is_low_precision
from .rules import (
    RADIAL_TESTS,
    ROW_STATE,
    RULES,
    LayerControls,
    LayerStats,
    RowHyper,
    RuleState,
    count_test,
    decide,
    lr_factor,
    lr_has_risen,
    radial_test,
    step_turn,
)
from .sharding import Shard, is_dtensor, like, local, reductions, shard_of

__all__ = ["LastStep", "RuleGroup", "RuleGroupPlan"]

KEPT_TRITON_STEPS = 8  # that a rule group keeps


class RuleGroupPlan(NamedTuple):
    """What the next step of a rule group is to do. Nothing changes it.

    present: for each parameter whether it has a gradient; None: all have one.
    groups: the tensors that have a gradient; empty if the kernels take all of them in one step.
    triton_step, triton_plan: that step, and what it is to do; else None.
    """

    present: tuple[bool, ...] | None
    groups: Sequence[Group] = ()
    triton_step: TritonStep | None = None
    triton_plan: kernels.StepPlan | None = None

    @property
    def has_tensors(self) -> bool:
        """Whether any parameter has a gradient."""
        return self.triton_step is not None or len(self.groups) > 0


class LastStep(NamedTuple):
    """What the last step has left for reports.

    measurements: what it measured and applied; None if it measured nothing, or if the kernels hold it.
    triton_step: the fused step, if it was one. has_decided: whether the kernels measured and decided in it.
    grad_scale: what the gradients are still multiplied by.
    """

    measurements: LayerMeasurements | None = None
    triton_step: TritonStep | None = None
    has_decided: bool = False
    grad_scale: Tensor | None = None


class RuleGroup:
    """Several param groups, decided jointly: one row per tracked tensor (or filter), numbered through the groups.

    `plan` and `record` ask and change nothing. `step`, `skip` and `forget_triton_steps` act; what they write:

    - `memory`: the rule's memory, by the step;
    - `warmup_end`, `largest_lrs`: how the host learns of the hand-over, and when it must ask again, by the step;
    - `last`: the `LastStep`, by the step, or by `skip` where it was left out;
    - `_triton_steps`: fused steps for the next time, by the step, and by `forget_triton_steps`;
    - `_untested`: how many radial tests are left, by the step;
    - `_cache`: uploaded vectors, each with the values that it was made of, by whoever needs one.

    Args:
        groups: param groups with the same `rule_key`.
        state: of the optimizer; takes the memory of the rule.
        number: among the rule groups of an optimizer.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], state: State, number: int = 0) -> None:
        self.groups = list(groups)
        self.number = number
        key = rule_key(self.groups[0])
        self.rule, self.granularity, self.project, self.of_update, self.protect = key
        self.spec = RULES[self.rule]
        self.per_filter = self.granularity == "filter"
        self.has_lr_by_row = any(map(has_lr_by_row, self.groups))
        self._decision = key._asdict()
        self._acts_on_dot = self.project or (self.of_update and self.per_filter)  # needs ⟨w,g⟩ at every step
        self.row_counts = {p: count_rows(p, group) for group in self.groups for p in group["params"]}
        self.params = list(self.row_counts)
        self._row_counts = [[self.row_counts[p] for p in group["params"]] for group in self.groups]
        self._has_tests = any(
            not group.get("scale_invariant") and any(may_be_tracked(p, group) for p in group["params"])
            for group in self.groups
        )
        self.device = next((p.device for p, count in self.row_counts.items() if count), torch.device("cpu"))
        self.has_rule = (self.rule is not None or self.project) and any(self.row_counts.values())
        self.memory = RuleMemory(self.groups, self.row_counts, state, self.device, is_kept=self.has_rule)
        self.shards: dict[Tensor, Shard | None] = {
            p: shard_of(p, by_rows=self.per_filter and count > 1)
            for p, count in self.row_counts.items()
            if is_dtensor(p)
        }
        counts, shards = list(self.row_counts.values()), [self.shards.get(p) for p in self.params]
        self._reductions = reductions(self.params, counts, shards, self.device) if self.shards else None
        self.warmup_end = WarmupEndPoll(self.memory.rows.handed_over, in_step=self._reductions is not None)
        with_rows = [
            group
            for group, counts in zip(self.groups, self._row_counts, strict=True)
            if self.spec.ends and any(counts)
        ]
        # ranks that hold parts of tensors must agree on when to measure: there the lr alone decides
        may_miss = [] if self.shards else [p for p, count in self.row_counts.items() if count]
        self.largest_lrs = LargestLrs(with_rows, may_miss)
        if self.memory.was_found and self.warmup_end.is_readable:
            self.warmup_end.read()
            self.largest_lrs = LargestLrs(with_rows, may_miss, float(self.memory.rows.largest_lr))
        self.last = LastStep()
        self._triton_steps: dict[tuple[bool, ...] | None, TritonStep] = {}  # by what is `present`
        self._untested = self.memory.tests_left()
        self._cache: dict[str, tuple[object, Any]] = {}

    # Questions: these methods change nothing.

    def plan(self, state: State) -> RuleGroupPlan:
        """What to do with the gradients as they are: one fused step, if all tensors qualify for it.

        Raises:
            RuntimeError: a gradient that the rule or the backend cannot take.
        """
        grads = [g for g in [p.grad for p in self.params] if g is not None]
        present = None
        if len(grads) < len(self.params):
            present = tuple(p.grad is not None for p in self.params)
        triton_step = self._triton_steps.get(present)
        if triton_step is not None:
            triton_plan = triton_step.plan(grads)
            if triton_plan is not None:
                return RuleGroupPlan(present, (), triton_step, triton_plan)
        groups = self.tensors(state)
        backends = {group.backend for group in groups}
        devices = {group.params[0].device for group in groups}
        on_one_device = len(devices) == 1 and (not self.has_rule or devices == {self.device})
        has_rule = kernels.has_rule(self.rule, of_update=self.of_update, protect=self.protect)
        if backends == {kernels} and on_one_device and not self.shards and has_rule:
            with torch.inference_mode(False):
                triton_step = self._new_triton_step(groups)
            return RuleGroupPlan(present, (), triton_step, triton_step.launches.plan(grads))
        if groups and self.memory.rounding_step is not None:
            raise RuntimeError(
                "stochastic_rounding needs the Triton kernels, which take dense float32, bfloat16 or float16 "
                "parameters on one CUDA device, no DTensors; these groups are not of that kind: use "
                "stochastic_rounding=None"
            )
        return RuleGroupPlan(present, groups)

    def tensors(self, state: State) -> list[Group]:
        """The tensors that have a gradient, for any backend.

        Raises:
            RuntimeError: a gradient that the rule or the backend cannot take.
        """
        return tensors_with_gradients(
            self.groups, self._row_counts, self.shards, state, per_filter=self.per_filter
        )

    def is_detached(self, state: State) -> bool:
        """Whether `state` holds something else than the memory of this rule group."""
        return self.memory.is_detached(state)

    def record(self, state: State) -> LayerMeasurements | None:
        """What the last step measured and applied; if it measured nothing, weights and gradients as they are now."""
        if self.last.triton_step is not None and self.last.has_decided:
            return self.last.triton_step.record(self.memory.rows.tracked, per_filter=self.per_filter)
        if self.last.measurements is not None:
            return self.last.measurements
        return self.measure_now(self.tensors(state), grad_scale=self.last.grad_scale)

    def measure_now(
        self, groups: Sequence[Group], *, grad_scale: Tensor | None = None
    ) -> LayerMeasurements | None:
        """What a step would measure and apply now, with the radial tests passed after it; None if it concerns no layer.

        Args:
            groups: the tensors that have a gradient.
            grad_scale: what the gradients are to be divided by.
        """
        if not any(sum(group.row_counts) for group in groups):
            return None
        rows, state, absent = self._active_memory(groups)
        stats = measure(
            groups,
            self.device,
            per_filter=self.per_filter,
            with_momentum=self.project,
            with_update=self.of_update or self.protect,
            rows=rows,
            reductions=self._reductions,
        )
        if grad_scale is not None:
            scale = grad_scale.to(self.device).squeeze()
            stats = stats._replace(
                grad_sq=stats.grad_sq / scale**2, weight_dot_grad=stats.weight_dot_grad / scale
            )
            if stats.grad_dot_momentum is not None:
                stats = stats._replace(grad_dot_momentum=stats.grad_dot_momentum / scale)
        hyper = self._hyper(groups)
        if self.has_rule and self._is_over() and not self.largest_lrs.has_risen():
            passed = radial_test(stats, state.tracked, hyper.numel)
            tracked = count_test(state.tracked, passed, step_turn(stats, hyper, LayerControls()))
            return self._measurements(
                groups, stats, LayerControls(lr_factor=lr_factor(tracked, hyper)), tracked
            )
        controls, after = decide(stats=stats, state=state, hyper=hyper, absent=absent, **self._decision)
        return self._measurements(groups, stats, controls, after.tracked)

    def _measurements(
        self, groups: Sequence[Group], stats: LayerStats, controls: LayerControls, tracked: Tensor
    ) -> LayerMeasurements:
        params = [p for group in groups for p in group.owners]
        counts = [count for group in groups for count in group.row_counts]
        lrs: list[float | Tensor] = []
        for group in groups:  # a tensor lr may change in place before the record is read
            lr = group.options.lr
            lr = lr.clone() if isinstance(lr, Tensor) else lr
            lrs += lr if isinstance(lr, list) else [lr] * len(group.owners)
        return LayerMeasurements(params, counts, lrs, self.per_filter, stats, controls, tracked)

    def _new_triton_step(self, groups: Sequence[Group]) -> TritonStep:
        decision = None
        if self.has_rule:
            decision = kernels.DecisionInputs(
                self.rule,
                self.granularity == "network",
                self._acts_on_dot,
                self.spec.scales_weights,
                self.spec.ends,
                self.memory.packed,
                self.memory.warmup,
                self.of_update,
                self._least_sizes() if self.protect else None,
            )
        return TritonStep(
            self.groups,
            groups,
            row_counts=self.row_counts,
            decision=decision,
            rounding_step=self.memory.rounding_step,
            number=self.number,
        )

    def _least_sizes(self) -> Tensor:
        """Of all rows, float32 [R]."""
        counts = list(self.row_counts.values())
        sizes = [least_size(p) if count else 0.0 for p, count in self.row_counts.items()]
        return upload(np.repeat(sizes, counts).astype(np.float32), self.device)

    def _is_over(self) -> bool:
        """Whether this rule has nothing left to do, unless the lr has risen."""
        return self.spec.ends and not self.project and self.warmup_end.warmup_is_over()

    def _has_untested(self) -> bool:
        """Layers that come after the end of the warm-up are tested too: reports want to know which are invariant."""
        return self.has_rule and any(p.grad is not None for p in self._untested)

    def _may_test(self) -> bool:
        """Whether a layer may have radial tests before it. On a GPU, which is not asked, wherever a group does not say
        that its layers are scale-invariant."""
        tracked = self.memory.rows.tracked
        if not self._has_tests or self.device.type != "cpu" or not is_readable(tracked):
            return self._has_tests
        passed = tracked.numpy()
        return bool(((passed >= 0) & (passed < RADIAL_TESTS)).any())

    def _controls_without_rule(self, groups: Sequence[Group]) -> LayerControls:
        """Plain SGD. On a GPU the step at which the host learns of the hand-over depends on timing, so there the
        arithmetic of the steps before it is kept, with factors of one, where it rounds in another way: in half
        precision."""
        controls = LayerControls()
        if self.has_lr_by_row and any(sum(group.row_counts) for group in groups):
            _, memory, _ = self._active_memory(groups)
            controls = LayerControls(lr_factor=lr_factor(memory.tracked, self._hyper(groups)))
        if not self.has_rule or self.device.type == "cpu":
            return controls
        if not any(is_low_precision(t) for group in groups for t in (*group.params, *group.grads)):
            return controls
        rows = sum(count for group in groups for count in group.row_counts)
        return controls._replace(grad_factor=torch.ones(rows, dtype=torch.float32, device=self.device))

    def _active_memory(self, groups: Sequence[Group]) -> tuple[slice | Tensor, RuleState, Tensor | None]:
        """Which rows of the memory are those of the tensors that have a gradient, what it holds there, and whether
        other rows have been active before."""
        memory = self.memory.rows
        if sum(sum(group.row_counts) for group in groups) == len(memory.tracked):
            return slice(None), memory, None
        active = {p for group in groups for p, n in zip(group.owners, group.row_counts, strict=True) if n}
        mask = [p in active for p, count in self.row_counts.items() for _ in range(count)]
        rows = self._cached("rows", tuple(mask), lambda: upload(np.flatnonzero(mask), self.device))
        others = self._cached(
            "others", tuple(mask), lambda: upload(np.flatnonzero(np.logical_not(mask)), self.device)
        )
        of_rows = memory._replace(**{key: getattr(memory, key)[rows] for key in ROW_STATE})
        return rows, of_rows, (memory.sphere_grad_norm[others] > 0).any()

    def _hyper(self, groups: Sequence[Group]) -> RowHyper:
        """The groups' hyper-parameters by row; uploaded only when one of them changed."""
        values = values_of_rows(groups)
        hyper = self._cached("hyper", values, lambda: hyper_of_rows(values, self.device))
        if not self.has_lr_by_row:
            hyper = hyper._replace(lr_ratio=None)
        tensors = [(group.options.lr, group.options.weight_decay, group.settling) for group in groups]
        if any(isinstance(value, Tensor) for of_group in tensors for value in of_group):
            names = "lr", "weight_decay", "settling"
            vectors = {name: getattr(hyper, name).clone() for name in names}
            hyper = hyper._replace(**vectors)
            first = 0
            for group, of_group in zip(groups, tensors, strict=True):
                count = sum(group.row_counts)
                for name, value in zip(names, of_group, strict=True):
                    if isinstance(value, Tensor):
                        vectors[name][first : first + count] = value
                first += count
        return hyper

    def _cached(self, name: str, key: object, build: Callable[[], Any]) -> Any:
        if self._cache.get(name, (None, None))[0] != key:
            self._cache[name] = key, build()
        return self._cache[name][1]

    # Actions: these methods change the state.

    def step(
        self,
        plan: RuleGroupPlan,
        state: State,
        *,
        record: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> bool:
        """Do what `plan` says, in place, and say whether `state` has got new momentum buffers.

        Args:
            plan: what `plan` returned since the last change of gradients, options and state.
            state: of the optimizer.
            record: have a record where the rule itself measures nothing.
            grad_scale, found_inf: as `torch.amp.GradScaler` leaves them; for a fused step alone.
        """
        self.last = LastStep()
        if not plan.has_tensors:
            return False
        risen = False
        if self.spec.ends:
            self.warmup_end.collect()
            if plan.present is not None:
                self._forget_frozen(plan.present)
            risen = self.largest_lrs.follow(plan.present, acts=not self._is_over())
            if risen:
                self.warmup_end.ask_again()
        active = self.has_rule and (risen or not self._is_over())
        if plan.triton_step is not None:
            new = self._step_fused(
                plan, plan.triton_step, state, record, active, record or risen, grad_scale, found_inf
            )
        else:
            new = self._step_groups(plan.groups, active=active, record=record)
        if self.spec.ends:
            self._look(active)
        for p, buffer in new.items():
            state[p]["momentum_buffer"] = buffer
        return bool(new)

    def skip(self, grad_scale: Tensor | None) -> None:
        """The step was left out: there is no record of it, and the gradients are still multiplied by `grad_scale`."""
        self.last = LastStep(grad_scale=grad_scale)

    def forget_triton_steps(self, state: State) -> None:
        """Drop the fused steps with other momentum buffers than `state` has, after something in it was replaced."""
        self._triton_steps = {
            present: step for present, step in self._triton_steps.items() if step.has_buffers_of(state)
        }

    def _step_fused(
        self,
        plan: RuleGroupPlan,
        triton_step: TritonStep,
        state: State,
        record: bool,
        active: bool,
        read_all: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> dict[Tensor, Tensor]:
        """Returns new momentum buffers."""
        assert plan.triton_plan is not None
        is_new = self._triton_steps.get(plan.present) is not triton_step
        measured = None
        if not active and (record or self._has_untested()):
            measured = self._measure_and_test(self.tensors(state), grad_scale=grad_scale)
        if is_new:
            triton_step.take_over_buffers()
        triton_step.step(
            plan.triton_plan,
            active=active,
            read_all=read_all,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        if is_new:
            self._keep_triton_step(plan.present, triton_step)
        still_scaled = None if active or grad_scale is None else grad_scale.clone()
        self.last = LastStep(measured, triton_step, active, still_scaled)
        if active:
            self._count_tests()
        return triton_step.buffers_not_in(state) if is_new else {}

    def _keep_triton_step(self, present: tuple[bool, ...] | None, triton_step: TritonStep) -> None:
        """Keep a fused step for later. Call it after `step`: before, the optimizer does not have its buffers."""
        if present not in self._triton_steps and len(self._triton_steps) >= KEPT_TRITON_STEPS:
            del self._triton_steps[next(iter(self._triton_steps))]
        self._triton_steps[present] = triton_step

    def _step_groups(self, groups: Sequence[Group], *, active: bool, record: bool) -> dict[Tensor, Tensor]:
        """Returns new momentum buffers."""
        if active and any(sum(group.row_counts) for group in groups):
            rows, memory, absent = self._active_memory(groups)
            with_tests = self._may_test()
            stats, controls, after, buffers = measure_decide_update(
                groups,
                memory,
                self._hyper(groups),
                absent=absent,
                rows=rows,
                reductions=self._reductions,
                with_tests=with_tests,
                with_dot=record or with_tests or self._acts_on_dot,
                **self._decision,
            )
            self._remember(rows, after)
            self.last = LastStep(self._measurements(groups, stats, controls, after.tracked))
        else:
            if record or self._has_untested():
                self.last = LastStep(self._measure_and_test(groups))
            buffers = update_groups(groups, self._controls_without_rule(groups), per_filter=self.per_filter)
        if self.shards:  # autograd cannot see the writes to the local parts
            written = [p for group in groups for p in group.owners if is_dtensor(p)]
            torch.autograd.graph.increment_version(written)
        return {
            p: like(p, made)
            for group, of_group in zip(groups, buffers, strict=True)
            for p, held, made in zip(group.owners, group.momentum_buffers, of_group, strict=True)
            if held is None and made is not None
        }

    def _measure_and_test(
        self, groups: Sequence[Group], *, grad_scale: Tensor | None = None
    ) -> LayerMeasurements | None:
        """`measure_now`, and remember the radial tests, where the rule does nothing."""
        measured = self.measure_now(groups, grad_scale=grad_scale)
        if measured is not None:
            rows, _, _ = self._active_memory(groups)
            self.memory.rows.tracked[rows] = measured.tracked
            self._count_tests()
        return measured

    def _remember(self, rows: slice | Tensor, after: RuleState) -> None:
        memory = self.memory.rows
        for key in ROW_STATE:
            kept, new = getattr(memory, key), getattr(after, key)
            if new is not kept:
                kept[rows] = new
        memory.handed_over.copy_(after.handed_over)
        memory.largest_lr.copy_(after.largest_lr)
        self._count_tests()

    def _look(self, active: bool) -> None:
        """Ask for the end of the warm-up; after it, on and on where only the device knows whether the lr has risen."""
        if self.device.type != "cuda" or not self.has_rule:
            return
        if self.largest_lrs.are_readable:
            if active:
                self.warmup_end.look()
        else:
            self.warmup_end.in_step = True
            self.warmup_end.look(self._lr_has_risen)

    def _lr_has_risen(self) -> Tensor:
        """`lr_has_risen` of all rows; 0-dim bool on the device."""
        gains = torch.empty_like(self.memory.rows.tracked)
        first = 0
        for group, counts in zip(self.groups, self._row_counts, strict=True):
            gain, count = lr_gain(group), sum(counts)
            gains[first : first + count] = local(gain).squeeze() if isinstance(gain, Tensor) else gain
            first += count
        return lr_has_risen(self.memory.rows, gains)

    def _count_tests(self) -> None:
        for p in [p for p in self._untested if p.grad is not None]:
            self._untested[p] -= 1
            if self._untested[p] == 0:
                del self._untested[p]

    def _forget_frozen(self, present: tuple[bool, ...]) -> None:
        """The warm-up does not wait for layers that require no gradient any more: as if they had never been seen."""
        frozen = [
            not has_grad and not p.requires_grad
            for p, has_grad in zip(self.params, present, strict=True)
            for _ in range(self.row_counts[p])
        ]
        if any(frozen):
            rows = self._cached("frozen", tuple(frozen), lambda: upload(np.flatnonzero(frozen), self.device))
            self.memory.rows.sphere_grad_norm.index_fill_(0, rows, 0)
