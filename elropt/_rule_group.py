"""The param groups that share a rule, and what the rule remembers of their layers."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import kernels
from ._eager_step import Group, choose_backend, measure, measure_decide_update, update_groups
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
    growth_gain,
    lr_factor,
    radial_test,
    step_turn,
)
from .sharding import (
    Shard,
    is_dtensor,
    like,
    local,
    local_grad,
    reductions,
    shard_of,
)

STATE_DTYPES = {**dict.fromkeys(RuleState._fields, torch.float32), "rounding_step": torch.int64}
KEPT_TRITON_STEPS = 8  # that a rule group keeps
STEPS_PER_LOOK = 16  # on a GPU, at whether the warm-up is over

_LAUNCH_OPTIONS = operator.itemgetter(
    "foreach", "fused", "differentiable", "nesterov", "maximize", "stochastic_rounding"
)
_HYPERS = operator.itemgetter("momentum", "dampening", "weight_decay", "nesterov")

State = MutableMapping[Tensor, dict[str, Any]]

_NOTHING: dict[str, Any] = {}


@dataclasses.dataclass
class LayerMeasurements:
    """What a step measured and applied: `params[i]` owns the next `row_counts[i]` rows of every vector."""

    params: list[Tensor]
    row_counts: list[int]
    lrs: Sequence[float | Tensor]
    per_filter: bool
    stats: LayerStats
    controls: LayerControls
    tracked: Tensor


def has_tensor_decay(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any weight decay is a tensor."""
    return any(issubclass(kind, Tensor) for kind in {type(group["weight_decay"]) for group in groups})


def rule_key(group: Mapping[str, Any]) -> tuple[str | None, str, bool]:
    """What the groups of one rule_group have in common."""
    return group["rule"], group["granularity"], group["project"]


def count_rows(p: Tensor, group: Mapping[str, Any]) -> int:
    """Rows of a parameter in the rule's vectors; 0 if the rule never concerns it: nothing depends on a tensor without
    entries, or on one of a lazy module that has not run yet."""
    if is_lazy(p) or p.numel() == 0:
        return 0
    wanted = group.get("scale_invariant")
    if wanted is False or (wanted is None and (p.dim() < 2 or not p.is_floating_point())):
        return 0
    return p.shape[0] if group["granularity"] == "filter" and p.dim() > 0 else 1


def refuse_one_of_many(groups: Sequence[Mapping[str, Any]]) -> None:
    """Inside of a backward pass, refuse the groups of a rule group whose rule compares layers but is given one.

    Raises:
        ValueError: names the rule and the remedy.
    """
    if torch._C._current_graph_task_id() == -1:
        return
    rule, granularity, _ = rule_key(groups[0])
    compares = RULES[rule].compares_layers or granularity == "network"
    if compares and sum(count_rows(p, group) > 0 for group in groups for p in group["params"]) == 1:
        others = " or ".join(repr(name) for name, spec in RULES.items() if name and not spec.compares_layers)
        raise ValueError(
            f"rule={rule!r}, granularity={granularity!r} compares layers, but this optimizer has one, and is stepped "
            "inside of the backward pass, as if each parameter had an optimizer of its own: give all parameters to "
            f"one optimizer that is stepped afterwards, or use rule={others} with granularity='layer' or "
            "'filter', or rule=None"
        )


def lr_ratio(group: Mapping[str, Any]) -> float:
    """Of the learning rate of the tracked layers to `lr`."""
    return 1.0 if group["tracked_lr"] is None else group["tracked_lr"] / group["reference_lr"]


def lr_of(group: Mapping[str, Any]) -> float | Tensor:
    """λ of a group: that of the tracked layers, if it says that it is made of them."""
    if group["tracked_lr"] is None or not group.get("scale_invariant"):
        return group["lr"]
    return group["lr"] * lr_ratio(group)


def has_lr_by_row(group: Mapping[str, Any]) -> bool:
    """Whether only the device knows which of a group's layers have a learning rate of their own."""
    return group["tracked_lr"] is not None and group.get("scale_invariant") is None


class RuleGroup:
    """Several param groups, decided jointly: one row per tracked tensor (or filter), numbered through the groups.

    The rule's memory lives in packed float32 vectors on one device; `optimizer.state` holds views of them, so
    that saving, loading and copying an optimizer need nothing of their own.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], state: State, number: int = 0) -> None:
        self.groups = list(groups)
        self.number = number  # among the rule_groups of an optimizer
        self.key = rule_key(self.groups[0])
        self.rule, self.granularity, self.project = self.key
        self.per_filter = self.granularity == "filter"
        self.has_lr_by_row = any(map(has_lr_by_row, self.groups))
        self.spec = RULES[self.rule]
        self._decision = {"rule": self.rule, "granularity": self.granularity, "project": self.project}
        self.row_counts = {p: count_rows(p, group) for group in self.groups for p in group["params"]}
        self.params = list(self.row_counts)
        self._row_counts = [[self.row_counts[p] for p in group["params"]] for group in self.groups]
        self._has_tests = any(
            any(counts) and not group.get("scale_invariant")
            for group, counts in zip(self.groups, self._row_counts, strict=True)
        )
        self.device = next((p.device for p, count in self.row_counts.items() if count), torch.device("cpu"))
        self._last: LayerMeasurements | None = None
        self._cache: dict[str, tuple[object, Any]] = {}
        self.has_rule = (self.rule is not None or self.project) and any(self.row_counts.values())
        self.memory, self._packed = self._remember(state)
        self.shards: dict[Tensor, Shard | None] = {
            p: shard_of(p, by_rows=self.per_filter and count > 0)
            for p, count in self.row_counts.items()
            if is_dtensor(p)
        }
        counts, shards = list(self.row_counts.values()), [self.shards.get(p) for p in self.params]
        self._reductions = reductions(self.params, counts, shards, self.device) if self.shards else None
        self._watch = WarmupEndPoll(self.memory.handed_over, in_step=self._reductions is not None)
        if self._has_old_state:
            self._watch.read()
        self._present: tuple[bool, ...] | None = None  # which parameters have a gradient, None: all
        self._fused: TritonStep | None = None  # of the last step
        self._all_fused: dict[tuple[bool, ...] | None, TritonStep] = {}  # by what is `present`
        self._decided = False  # whether the last step was fused and measured
        self._grad_scale: Tensor | None = None  # of the gradients as the last step has left them

    def _remember(self, state: State) -> tuple[RuleState, Tensor]:
        """Pack what `state` holds of each row (zeros where it holds nothing); with a rule, leave views there."""
        counts = {p: n for p, n in self.row_counts.items() if n}
        packed = torch.zeros(len(ROW_STATE), sum(counts.values()), dtype=torch.float32, device=self.device)
        handed_over = torch.zeros((), dtype=torch.float32, device=self.device)
        self._views: list[tuple[Tensor, str, Tensor]] = []
        always = {p for group in self.groups if group.get("scale_invariant") for p in group["params"]}
        first, seen = 0, False
        for p, count in counts.items():
            views = {key: packed[i, first : first + count] for i, key in enumerate(ROW_STATE)}
            held = state.get(p, {}) if self.has_rule else {}
            seen = seen or "tracked" in held
            for key, view in views.items():
                if key in held and held[key].numel() == count:
                    view.copy_(held[key].view(count), non_blocking=True)
            if "handed_over" in held:
                handed_over.copy_(torch.maximum(handed_over, held["handed_over"].to(self.device)))
            if p in always:
                views["tracked"].fill_(RADIAL_TESTS)
            if self.has_rule:
                self._leave(state, p, views)
            first += count
        if self.has_rule:  # all parameters: torch.distributed.checkpoint wants a state of all or of none
            for p in self.params:
                self._leave(state, p, {"handed_over": handed_over})
        self._remember_rounding(state)
        memory = RuleState(**dict(zip(ROW_STATE, packed, strict=True)), handed_over=handed_over)
        self._has_old_state = seen
        self._untested = self._tests_left(memory.tracked if seen else None, always)
        return memory, packed

    def _leave(self, state: State, p: Tensor, views: Mapping[str, Tensor]) -> None:
        state[p].update(views)
        self._views += [(p, key, view) for key, view in views.items()]

    def _tests_left(self, tracked: Tensor | None, always: set[Tensor]) -> dict[Tensor, int]:
        """How many more steps test the rows of a parameter, of those that any tests are left of. Reads `tracked`, given
        where a state has been taken over."""
        counts = {p: n for p, n in self.row_counts.items() if n}
        if tracked is None or not is_readable(tracked):
            return {p: RADIAL_TESTS for p in counts if p not in always}
        passed = tracked.cpu().numpy()
        done = np.split((passed < 0) | (passed == RADIAL_TESTS), np.cumsum(list(counts.values()))[:-1])
        return {p: RADIAL_TESTS for p, rows in zip(counts, done, strict=True) if not rows.all()}

    def _remember_rounding(self, state: State) -> None:
        """One counter of steps for all parameters that are rounded stochastically."""
        rounded = [
            p for group in self.groups if group["stochastic_rounding"] is not None for p in group["params"]
        ]
        self.rounding_step = None
        if rounded:
            held = [state[p]["rounding_step"] for p in rounded if "rounding_step" in state.get(p, {})]
            self.rounding_step = torch.zeros((), dtype=torch.int64, device=rounded[0].device)
            for count in held:
                self.rounding_step.copy_(torch.maximum(self.rounding_step, count.to(self.rounding_step)))
            for p in rounded:
                state[p]["rounding_step"] = self.rounding_step
                self._views.append((p, "rounding_step", self.rounding_step))

    def is_detached(self, state: State) -> bool:
        """Asked when anything in `state` has changed: whether it is what this left there. Forgets the fused steps that
        hold another momentum buffer."""
        self._all_fused = {
            key: fused for key, fused in self._all_fused.items() if fused.has_buffers_of(state)
        }
        return any(state.get(p, {}).get(key) is not view for p, key, view in self._views)

    def prepare(self, state: State) -> TritonStep | list[Group]:
        """The tensors that have a gradient: as one fused step, if all of them qualify for it. Changes nothing.

        Raises:
            RuntimeError: a gradient that the rule or the backend cannot take.
        """
        grads = [g for g in [p.grad for p in self.params] if g is not None]
        present = None
        if len(grads) < len(self.params):
            present = tuple(p.grad is not None for p in self.params)
        self._present = present
        self._fused = self._all_fused.get(present)
        if self._fused is not None and self._fused.fits(grads):
            return self._fused
        self._fused = None
        groups = self.prepare_groups(state)
        backends = {group.backend for group in groups}
        devices = {group.params[0].device for group in groups}
        on_one_device = len(devices) == 1 and (not self.has_rule or devices == {self.device})
        if backends == {kernels} and on_one_device and not self.shards and kernels.has_rule(self.rule):
            with torch.inference_mode(False):
                self._fused = TritonStep(self, groups)
                self._fused.present = present
            return self._fused
        if groups and self.rounding_step is not None:
            raise RuntimeError(
                "stochastic_rounding needs the Triton kernels, which take dense float32, bfloat16 or float16 "
                "parameters on one CUDA device, no DTensors; these groups are not of that kind: use "
                "stochastic_rounding=None"
            )
        return groups

    def prepare_groups(self, state: State) -> list[Group]:
        """`prepare`, for any backend. Where neighbours lie on different devices, a group becomes several."""
        runs: list[list[tuple[Any, ...]]] = []
        kind_before: object = None
        for group, row_counts in zip(self.groups, self._row_counts, strict=True):
            options, lr, decay = _options_of(group), lr_of(group), group["weight_decay"]
            for p, count in zip(group["params"], row_counts, strict=True):
                grad = p.grad
                if grad is None:
                    continue
                kind = p.device, options
                if kind != kind_before:
                    runs.append([])
                    kind_before = kind
                runs[-1].append((p, grad, count, lr, decay, group))
        return [self._prepare_group(state, *map(list, zip(*run, strict=True))) for run in runs]

    def _prepare_group(
        self,
        state: State,
        params: list[Tensor],
        grads: list[Tensor],
        row_counts: list[int],
        lrs: list[float | Tensor],
        decays: list[float | Tensor],
        groups: list[Mapping[str, Any]],
    ) -> Group:
        group, device = groups[0], params[0].device
        held: list[Tensor | None] = [None] * len(params)
        if group["momentum"] != 0:
            held = [state.get(p, _NOTHING).get("momentum_buffer") for p in params]
        _check_tensors(params, grads, held, row_counts, groups)
        row_counts = [
            count if g.layout == torch.strided else 0 for g, count in zip(grads, row_counts, strict=True)
        ]
        parts, buffers = params, held
        if self.shards and not group["differentiable"]:
            parts = list(map(local, params))
            grads = list(map(local_grad, params, grads))
            buffers = [None if m is None else local(m) for m in held]
        return Group(
            params,
            parts,
            grads,
            [self.shards.get(p) for p in params] if self.shards else [None] * len(params),
            buffers,
            row_counts,
            lr=_common(lrs, device),
            lr_ratio=lr_ratio(group) if has_lr_by_row(group) else 1.0,
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=_common(decays, device),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            backend=choose_backend(
                parts,
                grads,
                buffers,
                foreach=group["foreach"],
                fused=group["fused"],
                differentiable=group["differentiable"],
                per_filter=self.per_filter,
                tensor_decay=isinstance(group["weight_decay"], Tensor),
                lr_by_row=has_lr_by_row(group),
            ),
        )

    def step(
        self,
        prepared: TritonStep | list[Group],
        state: State,
        *,
        record: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> bool:
        """Update what `prepare` returned, in place, and say whether `state` has got new momentum buffers. `record` asks
        for a record where the rule itself measures nothing.

        `grad_scale` and `found_inf`, as `torch.amp.GradScaler` leaves them, are for a fused step alone.
        """
        self._last, self._decided, self._grad_scale = None, False, None
        if not prepared:
            return False
        if self.spec.ends and self._present is not None:
            self._forget_frozen(self._present)
        if isinstance(prepared, TritonStep):
            active = self.has_rule and not self._is_over()
            if not active and (record or self._has_untested()):
                groups = self.prepare_groups(state)
                self._last = self.measure_now(groups, remember=True, grad_scale=grad_scale)
            prepared.step(active=active, read_all=record, grad_scale=grad_scale, found_inf=found_inf)
            self._keep_fused(prepared)
            self._grad_scale = None if active or grad_scale is None else grad_scale.clone()
            self._decided = active
            if active:
                self._count_tests()
                self._watch.look()
            new = prepared.new_buffers(state)
        else:
            missing = [
                (p, group, i)
                for group in prepared
                if group.momentum != 0
                for i, (p, m) in enumerate(zip(group.owners, group.momentum_buffers, strict=True))
                if m is None
            ]
            self._step_groups(prepared, record=record)
            if self.shards:  # autograd cannot see that what lies here of them has been written
                written = [p for group in prepared for p in group.owners if is_dtensor(p)]
                torch.autograd.graph.increment_version(written)
            new = {}
            for p, group, i in missing:
                made = group.momentum_buffers[i]
                if made is not None:
                    new[p] = like(p, made)
        for p, buffer in new.items():
            state[p]["momentum_buffer"] = buffer
        return bool(new)

    def skip(self, grad_scale: Tensor | None) -> None:
        """The step was left out: there is no record of it, and the gradients are still multiplied by `grad_scale`."""
        self._last, self._decided, self._grad_scale = None, False, grad_scale

    def _forget_frozen(self, present: tuple[bool, ...]) -> None:
        """The warm-up does not wait for layers that require no gradient any more: as if they had never been seen."""
        frozen = [
            not has_grad and not p.requires_grad
            for p, has_grad in zip(self.params, present, strict=True)
            for _ in range(self.row_counts[p])
        ]
        if any(frozen):
            rows = self._cached("frozen", tuple(frozen), lambda: _upload(np.flatnonzero(frozen), self.device))
            self.memory.sphere_grad_norm.index_fill_(0, rows, 0)

    def _keep_fused(self, fused: TritonStep) -> None:
        """For the next step of these gradients; only what has been stepped has its buffers in the state."""
        if fused.present not in self._all_fused and len(self._all_fused) >= KEPT_TRITON_STEPS:
            del self._all_fused[next(iter(self._all_fused))]
        self._all_fused[fused.present] = fused

    def _step_groups(self, groups: list[Group], *, record: bool) -> None:
        if self.has_rule and not self._is_over() and any(sum(group.row_counts) for group in groups):
            rows, memory, absent = self._active_memory(groups)
            with_tests = self._may_test()
            stats, controls, after = measure_decide_update(
                groups,
                memory,
                self._hyper(groups),
                absent=absent,
                rows=rows,
                reductions=self._reductions,
                with_tests=with_tests,
                with_dot=record or self.project or with_tests,
                **self._decision,
            )
            self._keep(rows, after)
            self._last = self._record(groups, stats, controls, after.tracked)
            return
        if record or self._has_untested():
            self._last = self.measure_now(groups, remember=True)
        update_groups(groups, self._controls_without_rule(groups), per_filter=self.per_filter)

    def _may_test(self) -> bool:
        """Whether a layer may have radial tests before it. On a GPU, which is not asked, wherever a group does not say
        that its layers are scale-invariant."""
        if not self._has_tests or self.device.type != "cpu" or not is_readable(self.memory.tracked):
            return self._has_tests
        passed = self.memory.tracked.numpy()
        return bool(((passed >= 0) & (passed < RADIAL_TESTS)).any())

    def record(self, state: State) -> LayerMeasurements | None:
        """What the last step measured and applied; if it measured nothing, weights and gradients as they are now."""
        if self._last is None and self._decided and self._fused is not None:
            self._last = self._fused.record()
        return self._last or self.measure_now(self.prepare_groups(state), grad_scale=self._grad_scale)

    def measure_now(
        self, groups: list[Group], *, remember: bool = False, grad_scale: Tensor | None = None
    ) -> LayerMeasurements | None:
        """What a step would measure and apply now. Changes nothing that a step depends on; `remember` keeps the
        result of the radial tests where no rule does. `grad_scale`: what the gradients are to be divided by."""
        if not any(sum(group.row_counts) for group in groups):
            return None
        rows, state, absent = self._active_memory(groups)
        stats = measure(
            groups,
            self.device,
            per_filter=self.per_filter,
            with_momentum=self.project,
            rows=rows,
            reductions=self._reductions,
        )
        if grad_scale is not None:
            scale = grad_scale.to(self.device).squeeze()
            stats = stats._replace(
                grad_sq=stats.grad_sq / scale**2, weight_dot_grad=stats.weight_dot_grad / scale
            )
        if self.has_rule and self._is_over():
            hyper = self._hyper(groups)
            passed = radial_test(stats, state.tracked, hyper.numel)
            tracked = count_test(state.tracked, passed, step_turn(stats, hyper, LayerControls()))
            if remember:
                self.memory.tracked[rows] = tracked
                self._count_tests()
            controls = LayerControls(lr_factor=lr_factor(tracked, hyper))
            return self._record(groups, stats, controls, tracked)
        controls, after = decide(
            stats=stats, state=state, hyper=self._hyper(groups), absent=absent, **self._decision
        )
        if remember and not self.has_rule:
            self._keep(rows, after)
        return self._record(groups, stats, controls, after.tracked)

    def _record(
        self, groups: list[Group], stats: LayerStats, controls: LayerControls, tracked: Tensor
    ) -> LayerMeasurements:
        params = [p for group in groups for p in group.owners]
        counts = [count for group in groups for count in group.row_counts]
        lrs: list[float | Tensor] = []
        for group in groups:  # a tensor lr may change in place before the record is read
            lr = group.lr.clone() if isinstance(group.lr, Tensor) else group.lr
            lrs += lr if isinstance(lr, list) else [lr] * len(group.owners)
        return LayerMeasurements(params, counts, lrs, self.per_filter, stats, controls, tracked)

    def _is_over(self) -> bool:
        """Whether this rule has nothing left to do."""
        return self.spec.ends and not self.project and self._watch.warmup_is_over()

    def _has_untested(self) -> bool:
        """Layers that come after the end of the warm-up are tested too: reports want to know which are invariant."""
        return self.has_rule and any(p.grad is not None for p in self._untested)

    def _controls_without_rule(self, groups: list[Group]) -> LayerControls:
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

    def _active_memory(self, groups: list[Group]) -> tuple[slice | Tensor, RuleState, Tensor | None]:
        """Where the rows of the tensors that have a gradient lie in the memory, what it holds there, and whether
        other rows have been active before."""
        if sum(sum(group.row_counts) for group in groups) == len(self.memory.tracked):
            return slice(None), self.memory, None
        active = {p for group in groups for p, n in zip(group.owners, group.row_counts, strict=True) if n}
        mask = [p in active for p, count in self.row_counts.items() for _ in range(count)]
        rows = self._cached("rows", tuple(mask), lambda: _upload(np.flatnonzero(mask), self.device))
        others = self._cached(
            "others", tuple(mask), lambda: _upload(np.flatnonzero(np.logical_not(mask)), self.device)
        )
        active_memory = self.memory._replace(**{key: getattr(self.memory, key)[rows] for key in ROW_STATE})
        return rows, active_memory, (self.memory.sphere_grad_norm[others] > 0).any()

    def _keep(self, rows: slice | Tensor, after: RuleState) -> None:
        for key in ROW_STATE:
            kept, new = getattr(self.memory, key), getattr(after, key)
            if new is not kept:
                kept[rows] = new
        self.memory.handed_over.copy_(after.handed_over)
        self._count_tests()
        self._watch.look()

    def _count_tests(self) -> None:
        for p in [p for p in self._untested if p.grad is not None]:
            self._untested[p] -= 1
            if self._untested[p] == 0:
                del self._untested[p]

    def _hyper(self, groups: list[Group]) -> RowHyper:
        """The groups' hyper-parameters by row; uploaded only when one of them changed."""
        values = [
            (
                0.0 if isinstance(group.lr, Tensor) else group.lr,
                0.0 if isinstance(group.weight_decay, Tensor) else group.weight_decay,
                group.momentum,
                group.dampening,
                group.nesterov,
                group.lr_ratio,
                group.row_counts,
                [m is not None for m in group.momentum_buffers],
                [p.numel() for p in group.owners],
            )
            for group in groups
        ]
        hyper = self._cached("hyper", values, lambda: _hyper_vectors(values, self.device))
        if not self.has_lr_by_row:
            hyper = hyper._replace(lr_ratio=None)
        if any(isinstance(value, Tensor) for group in groups for value in (group.lr, group.weight_decay)):
            hyper = hyper._replace(lr=hyper.lr.clone(), weight_decay=hyper.weight_decay.clone())
        first = 0
        for group in groups:
            count = sum(group.row_counts)
            for row_values, value in ((hyper.lr, group.lr), (hyper.weight_decay, group.weight_decay)):
                if isinstance(value, Tensor):
                    row_values[first : first + count] = value
            first += count
        return hyper

    def _cached(self, name: str, key: object, build: Callable[[], Any]) -> Any:
        if self._cache.get(name, (None, None))[0] != key:
            self._cache[name] = key, build()
        return self._cache[name][1]


class TritonStep:
    """An rule_group whose tensors all go through the kernels in one step, and how the kernels see it."""

    def __init__(self, rule_group: RuleGroup, groups: list[Group]) -> None:
        self.rule_group = rule_group
        self.present: tuple[bool, ...] | None = None  # which parameters have a gradient, None: all
        # what the launches, or the choice of this backend, depend on
        self.options = list(map(_LAUNCH_OPTIONS, rule_group.groups))
        self.present_terms = _present_terms(map(_HYPERS, rule_group.groups))
        self.has_own_lrs = any(group["tracked_lr"] is not None for group in rule_group.groups)
        self._values: list[tuple[Any, ...]] | None = None  # of the groups, for which `_hypers` have been made
        self._hypers: tuple[kernels.GroupHyper, ...] = ()
        self.params = [p for group in groups for p in group.params]
        self.row_counts = [count for group in groups for count in group.row_counts]
        self.buffers: list[Tensor | None] = [
            buffer_for(g, m, group)
            for group in groups
            for g, m in zip(group.grads, group.momentum_buffers, strict=True)
        ]
        first = dict(
            zip(
                rule_group.params,
                itertools.accumulate(rule_group.row_counts.values(), initial=0),
                strict=False,
            )
        )
        self.rows = [
            (first[p], count) if count else None
            for p, count in zip(self.params, self.row_counts, strict=True)
        ]
        number = {p: i for i, group in enumerate(rule_group.groups) for p in group["params"]}
        grads = [g for group in groups for g in group.grads]
        self.kernels = kernels.FusedStep(
            self.params,
            grads,
            self.buffers,
            groups=[number[p] for p in self.params],
            kinds=[
                kernels.LaunchKey(
                    group["momentum"] != 0,
                    bool(group["nesterov"]),
                    bool(group["maximize"]),
                    group["stochastic_rounding"],
                )
                for group in rule_group.groups
            ],
            rows=self.rows,
            rule=kernels.DecisionInputs(
                rule_group.rule,
                rule_group.granularity == "network",
                rule_group.project,
                rule_group.spec.scales_weights,
                rule_group.spec.ends,
                rule_group._packed,
                rule_group.memory.handed_over,
            )
            if rule_group.has_rule
            else None,
            number=rule_group.number,
        )
        self.plan = self.kernels.plan(grads)  # of the next step
        self._are_new = any(
            m is None for group in groups if group.momentum != 0 for m in group.momentum_buffers
        )

    def fits(self, grads: Sequence[Tensor]) -> bool:
        """Whether this can take the next step too; then `plan` is what it is to do."""
        groups = self.rule_group.groups
        if has_tensor_decay(groups):  # the kernels have none; and comparing it would wait for the device
            return False
        values = list(map(_HYPERS, groups))
        if self.options != list(map(_LAUNCH_OPTIONS, groups)) or (
            values != self._values and self.present_terms != _present_terms(values)
        ):
            return False
        self.plan = self.kernels.plan(grads)
        return self.plan is not None

    def step(self, *, grad_scale: Tensor | None, found_inf: Tensor | None, **options: Any) -> None:
        device = self.kernels.device
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, non_blocking=True)
        if found_inf is not None:
            found_inf = found_inf.to(device, non_blocking=True)
        groups = self.rule_group.groups
        lrs = list(map(lr_of, groups)) if self.has_own_lrs else [group["lr"] for group in groups]
        if set(map(type, lrs)) != {float}:
            lrs = [_kernel_lr(lr, device) for lr in lrs]
        values = list(map(_HYPERS, groups))
        if values != self._values:
            self._hypers = tuple(_kernel_hyper(*of_group) for of_group in values)
            # a tensor may change in place
            has_tensors = any(isinstance(value, Tensor) for of_group in values for value in of_group)
            self._values = None if has_tensors else values
        step = self.rule_group.rounding_step
        assert self.plan is not None
        self.kernels.step(
            self.plan,
            lrs,
            self._hypers,
            grad_scale=grad_scale,
            found_inf=found_inf,
            rounding_step=step,
            **options,
        )
        if step is not None:
            step.add_(1 if found_inf is None else (found_inf == 0).squeeze())

    def has_buffers_of(self, state: State) -> bool:
        """Whether its momentum buffers are those of the optimizer."""
        return all(
            m is None or state.get(p, {}).get("momentum_buffer") is m
            for p, m in zip(self.params, self.buffers, strict=True)
        )

    def new_buffers(self, state: State) -> dict[Tensor, Tensor]:
        """The momentum buffers that are not in the optimizer's state yet."""
        if not self._are_new:
            return {}
        self._are_new = False
        return {
            p: m
            for p, m in zip(self.params, self.buffers, strict=True)
            if m is not None and state.get(p, {}).get("momentum_buffer") is not m
        }

    def record(self) -> LayerMeasurements | None:
        """What the kernels measured and applied at the last step; NaN where the rule did not need it."""
        k, rule_group = self.kernels, self.rule_group
        if not any(self.row_counts):
            return None
        rows = np.concatenate([np.arange(r[0], r[0] + r[1]) for r in self.rows if r is not None])
        chosen = _upload(rows, k.device)
        controls = LayerControls(
            k.s[chosen] if rule_group.rule is not None else None,
            k.a[chosen] if rule_group.spec.scales_weights else None,
            k.p[chosen] if rule_group.project else None,
        )
        lrs: list[float | Tensor] = [
            0.0 if row is None or row[1] == 0 else k.lrs[row[0]].clone() for row in self.rows
        ]
        stats = LayerStats(*k.sums[:4, chosen])
        tracked = rule_group.memory.tracked[chosen]
        return LayerMeasurements(
            self.params, self.row_counts, lrs, rule_group.per_filter, stats, controls, tracked
        )


def _present_terms(values: Iterable[tuple[Any, ...]]) -> list[tuple[bool, ...]]:
    """Of groups with these `_HYPERS`: whether there is momentum, and dampening."""
    return [(momentum != 0, dampening != 0) for momentum, dampening, *_ in values]


def _kernel_lr(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """A tensor on the CPU is read here, one on a GPU by the kernels."""
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or device.type == "cpu"):
        return lr.to(device)
    return float(lr)


def _kernel_hyper(
    momentum: float, dampening: float, weight_decay: float, nesterov: bool
) -> kernels.GroupHyper:
    """What the kernels need of a param group, but for its learning rate."""
    momentum, dampening = float(momentum), float(dampening)
    coefficients = momentum_coefficients(momentum, dampening, nesterov, has_buffer=True)
    return kernels.GroupHyper(momentum, dampening, float(weight_decay), *coefficients)


def buffer_for(grad: Tensor, buffer: Tensor | None, group: Group) -> Tensor | None:
    """The momentum buffer that the kernels are to use; theirs marks a new one by −0.0."""
    if group.momentum == 0:
        return None
    if buffer is None:
        return kernels.new_buffer(grad)
    return buffer if group.dampening == 0 else kernels.without_marks(buffer)


class WarmupEndPoll:
    """Tells the host that the warm-up is over, without waiting for the device in the middle of training.

    On the CPU the flag is read in memory. On a GPU each look enqueues a copy into pinned memory; the host learns of
    it at the first step after the copy has arrived, and until then measures without effect. With `in_step`, for ranks
    that must all stop measuring at the same step since they measure together, it learns of it at the next look,
    `STEPS_PER_LOOK` steps later; should the copy not have arrived even then, it is waited for. Where there is no data
    (`is_readable`), the warm-up never ends.
    """

    def __init__(self, flag: Tensor, *, in_step: bool = False) -> None:
        self.flag = flag
        self.is_readable = is_readable(flag)
        self.in_step = in_step and flag.is_cuda
        self.over_in_step = False
        self.copy = torch.zeros((), dtype=torch.float32, pin_memory=True) if flag.is_cuda else flag
        self.value = self.copy.numpy() if self.is_readable else np.zeros(())
        self.arrival: torch.cuda.Event | None = None
        self.steps = itertools.count(1)

    def read(self) -> None:
        """Wait for the flag, where a state is taken over and read anyway: it may be long set."""
        if self.is_readable:
            self.copy.copy_(self.flag)
            self.over_in_step = bool(self.value > 0)

    def look(self) -> None:
        """Ask for the flag, now and then; at most one question is under way."""
        if not self.is_readable or not self.flag.is_cuda or next(self.steps) % STEPS_PER_LOOK != 0:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self.in_step and self.arrival is not None:
            self.arrival.synchronize()
            self.arrival, self.over_in_step = None, bool(self.value > 0)
        if self.arrival is None:
            self.copy.copy_(self.flag, non_blocking=True)
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(self.flag.device))

    def warmup_is_over(self) -> bool:
        """Whether the flag is known to be set."""
        if self.in_step:
            return self.over_in_step
        if self.arrival is None or (self.flag.is_cuda and torch.cuda.is_current_stream_capturing()):
            return bool(
                self.value > 0
            )  # 0 until the copy has arrived, and an event must not be asked in a capture
        if self.arrival.query():
            self.arrival = None
        return self.arrival is None and bool(self.value > 0)


def is_readable(t: Tensor) -> bool:
    """Whether it has data: meta and fake tensors, as estimators of memory use them, have none."""
    return type(t) is Tensor and not t.is_meta


def momentum_coefficients(
    momentum: float, dampening: float, nesterov: bool, *, has_buffer: bool
) -> tuple[float, float, float]:
    """`elropt.rules.growth_gain`, ∂u/∂g̃ and ∂u/∂m for this step's update u."""
    μ, d = momentum, dampening
    if μ == 0:
        return growth_gain(0.0), 1.0, 0.0
    per_grad, per_momentum = (1 - d, μ) if has_buffer else (1.0, 0.0)
    if nesterov:
        per_grad, per_momentum = 1 + μ * per_grad, μ * per_momentum
    return growth_gain(μ, d, nesterov), per_grad, per_momentum


def _hyper_vectors(by_group: list[tuple[Any, ...]], device: torch.device) -> RowHyper:
    columns = [
        (lr, decay, *momentum_coefficients(*of_momentum, has_buffer=has_buffer), numel / count, ratio, count)
        for lrs, decays, *of_momentum, ratio, counts, have_buffers, numels in by_group
        for lr, decay, count, has_buffer, numel in zip(
            *(v if isinstance(v, list) else [v] * len(counts) for v in (lrs, decays)),
            counts,
            have_buffers,
            numels,
            strict=True,
        )
        if count
    ]
    *values, counts = np.array(columns, dtype=np.float32).T
    return RowHyper(*_upload(np.repeat(np.stack(values), counts.astype(np.int64), axis=1), device))


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
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


def _options_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What neighbouring groups must agree on to be updated together: in tensors, on the object; not in lr and decay.
    Only on the CPU, and not with `foreach=True`: elsewhere the bits of a tensor may depend on its neighbours."""
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


def _check_tensors(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    row_counts: list[int],
    groups: list[Mapping[str, Any]],
) -> None:
    """Of tensors on one device.

    Raises:
        RuntimeError: a gradient or a buffer that cannot be applied; names it and the remedy.
    """
    if any(g.layout != torch.strided for g in grads):
        for p, group in zip(params, groups, strict=True):
            _check_gradient(p, group)
    for p, count in zip(params, row_counts, strict=True):
        if count and p.is_complex():
            raise RuntimeError(
                f"a complex parameter of shape {tuple(p.shape)} is in a group with scale_invariant=True; "
                "only real parameters can be tracked: move it to a group with scale_invariant=False"
            )
    device = params[0].device
    for p, m in zip(params, buffers, strict=True):
        if m is not None and m.device != device:
            _refuse_device(p, m)


def _refuse_device(p: Tensor, buffer: Tensor) -> None:
    raise RuntimeError(
        f"a parameter of shape {tuple(p.shape)} is on {p.device}, its momentum buffer on {buffer.device}: it has "
        "been moved between two steps; optimizer.load_state_dict(optimizer.state_dict()) brings the state along"
    )


def _check_gradient(p: Tensor, group: Mapping[str, Any]) -> None:
    grad = p.grad
    if grad is not None and grad.layout != torch.strided and (group["rule"] is not None or group["project"]):
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has a {grad.layout} gradient, which only plain SGD can apply: "
            "put it in a param group of its own with rule=None and project=False"
        )
    decays = isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0
    if grad is not None and grad.layout != torch.strided and decays:
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has a {grad.layout} gradient, which cannot take weight_decay: "
            "put it in a param group of its own with weight_decay=0"
        )
