"""The param groups that share a rule, and what the rule remembers of their layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .functional import Group, apply, choose_backend, elr_sgd, measure
from .rules import RADIAL_TESTS, Hyper, LayerControls, LayerStats, RuleState, decide

ROW_STATE_KEYS = RuleState._fields[:-1]
RULE_STATE_KEYS = RuleState._fields

State = MutableMapping[Tensor, dict[str, Any]]


@dataclasses.dataclass
class StepRecord:
    """What a step measured and applied: `params[i]` owns the next `row_counts[i]` rows of every vector."""

    params: list[Tensor]
    row_counts: list[int]
    lrs: list[float | Tensor]
    per_filter: bool
    stats: LayerStats
    controls: LayerControls
    tracked: Tensor


def rule_key(group: Mapping[str, Any]) -> tuple[str | None, str, bool]:
    """What the groups of one ensemble have in common."""
    return group["rule"], group["granularity"], group["project"]


def count_rows(p: Tensor, group: Mapping[str, Any]) -> int:
    """Rows of a parameter in the rule's vectors; 0 if the rule never concerns it."""
    wanted = group.get("scale_invariant")
    if wanted is False or (wanted is None and (p.dim() < 2 or not p.is_floating_point())):
        return 0
    return p.shape[0] if group["granularity"] == "filter" and p.dim() > 0 else 1


class Ensemble:
    """Several param groups, decided jointly: one row per tracked tensor (or filter), numbered through the groups.

    The rule's memory lives in packed float32 vectors on one device; `optimizer.state` holds views of them, so
    that saving, loading and copying an optimizer need nothing of their own.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], state: State) -> None:
        self.groups = list(groups)
        self.key = rule_key(self.groups[0])
        self.rule, self.granularity, self.project = self.key
        self.per_filter = self.granularity == "filter"
        self._decision = {"rule": self.rule, "granularity": self.granularity, "project": self.project}
        self.row_counts = {p: count_rows(p, group) for group in self.groups for p in group["params"]}
        self.device = next((p.device for p, count in self.row_counts.items() if count), torch.device("cpu"))
        self.last: StepRecord | None = None
        self._cache: dict[str, tuple[object, Any]] = {}
        self.has_rule = (self.rule is not None or self.project) and any(self.row_counts.values())
        self.memory = self._remember(state)
        self._watch = HandOverWatch(self.memory.handed_over)

    def is_detached(self, state: State) -> bool:
        """Whether somebody replaced or removed what this left in `state`."""
        return any(state.get(p, {}).get(key) is not view for p, key, view in self._views)

    def _remember(self, state: State) -> RuleState:
        """Pack what `state` holds of each row (zeros where it holds nothing); with a rule, leave views there."""
        counts = {p: n for p, n in self.row_counts.items() if n}
        packed = torch.zeros(
            len(ROW_STATE_KEYS), sum(counts.values()), dtype=torch.float32, device=self.device
        )
        handed_over = torch.zeros((), dtype=torch.float32, device=self.device)
        self._views: list[tuple[Tensor, str, Tensor]] = []
        always = {p for group in self.groups if group.get("scale_invariant") for p in group["params"]}
        first = 0
        for p, count in counts.items():
            views = {key: packed[i, first : first + count] for i, key in enumerate(ROW_STATE_KEYS)}
            held = state.get(p, {}) if self.has_rule else {}
            for key, view in views.items():
                if key in held and held[key].numel() == count:
                    view.copy_(held[key].view(count), non_blocking=True)
            if "handed_over" in held:
                handed_over.copy_(torch.maximum(handed_over, held["handed_over"].to(self.device)))
            if p in always:
                views["tracked"].fill_(RADIAL_TESTS)
            if self.has_rule:
                views["handed_over"] = handed_over
                state[p].update(views)
                self._views += [(p, key, view) for key, view in views.items()]
            first += count
        c, radius, tracked = packed
        return RuleState(c, radius, tracked, handed_over)

    def prepare(self, state: State) -> list[Group]:
        """The groups' tensors that have a gradient. Changes nothing.

        Raises:
            RuntimeError: a gradient that the rule or the backend cannot take.
        """
        prepared = []
        for group in self.groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                _check_gradient(p, group, has_rows=self.row_counts[p] > 0)
            row_counts = [
                self.row_counts[p] if g.layout == torch.strided else 0
                for p, g in zip(params, grads, strict=True)
            ]
            buffers = [
                state.get(p, {}).get("momentum_buffer") if group["momentum"] != 0 else None for p in params
            ]
            prepared.append(
                Group(
                    params,
                    grads,
                    buffers,
                    row_counts,
                    lr=_scalar(group["lr"], params[0].device),
                    momentum=group["momentum"],
                    dampening=group["dampening"],
                    weight_decay=_scalar(group["weight_decay"], params[0].device),
                    nesterov=group["nesterov"],
                    maximize=group["maximize"],
                    backend=choose_backend(
                        params,
                        grads,
                        buffers,
                        foreach=group["foreach"],
                        fused=group["fused"],
                        differentiable=group["differentiable"],
                        per_filter=self.per_filter,
                        tensor_decay=isinstance(group["weight_decay"], Tensor),
                    ),
                )
            )
        return prepared

    def step(self, groups: list[Group], *, record: bool) -> None:
        """Update the prepared groups in place. `record` asks for `last` where the rule itself measures nothing."""
        self.last = None
        if not groups:
            return
        if self.has_rule and not self._is_over():
            rows, state, absent = self._active_memory(groups)
            stats, controls, after = elr_sgd(
                groups, state, self._hyper(groups), absent=absent, **self._decision
            )
            self._keep(rows, after)
            self.last = self._record(groups, stats, controls, after.tracked)
            return
        if record:
            self.last = self.measure_now(groups, remember=True)
        apply(groups, self._controls_without_rule())

    def measure_now(self, groups: list[Group], *, remember: bool = False) -> StepRecord | None:
        """What a step would measure and apply now. Changes nothing that a step depends on; `remember` keeps the
        result of the radial tests where no rule does."""
        if not any(sum(group.row_counts) for group in groups):
            return None
        stats = measure(groups, self.device, per_filter=self.per_filter, with_momentum=self.project)
        rows, state, absent = self._active_memory(groups)
        if self.has_rule and self._is_over():
            return self._record(groups, stats, LayerControls(), state.tracked)
        controls, after = decide(
            stats=stats, state=state, hyper=self._hyper(groups), absent=absent, **self._decision
        )
        if remember and not self.has_rule:
            self._keep(rows, after)
        return self._record(groups, stats, controls, after.tracked)

    def _record(
        self, groups: list[Group], stats: LayerStats, controls: LayerControls, tracked: Tensor
    ) -> StepRecord:
        params = [p for group in groups for p in group.params]
        counts = [count for group in groups for count in group.row_counts]
        lrs: list[float | Tensor] = []
        for group in groups:  # a tensor lr may change in place before the record is read
            lr = group.lr.clone() if isinstance(group.lr, Tensor) else group.lr
            lrs += [lr] * len(group.params)
        return StepRecord(params, counts, lrs, self.per_filter, stats, controls, tracked)

    def _is_over(self) -> bool:
        """Whether this rule has nothing left to do."""
        return self.rule == "warmup" and not self.project and self._watch.warmup_is_over()

    def _controls_without_rule(self) -> LayerControls:
        """Plain SGD. On a GPU the step at which the host learns of the hand-over depends on timing, so there the
        arithmetic of the steps before it is kept, with a factor of one."""
        if not self.has_rule or self.device.type == "cpu":
            return LayerControls()
        return LayerControls(lr_factor=torch.ones((), dtype=torch.float32, device=self.device))

    def _active_memory(self, groups: list[Group]) -> tuple[slice | Tensor, RuleState, Tensor | None]:
        """Where the rows of the tensors that have a gradient lie in the memory, what it holds there, and whether
        other rows have been active before."""
        active = {p for group in groups for p, n in zip(group.params, group.row_counts, strict=True) if n}
        mask = [p in active for p, count in self.row_counts.items() for _ in range(count)]
        c, radius, tracked, handed_over = self.memory
        if all(mask):
            return slice(None), self.memory, None
        rows = self._cached("rows", tuple(mask), lambda: _upload(np.flatnonzero(mask), self.device))
        others = self._cached(
            "others", tuple(mask), lambda: _upload(np.flatnonzero(np.logical_not(mask)), self.device)
        )
        return rows, RuleState(c[rows], radius[rows], tracked[rows], handed_over), (c[others] > 0).any()

    def _keep(self, rows: slice | Tensor, after: RuleState) -> None:
        for kept, new in zip(self.memory[:-1], after[:-1], strict=True):
            kept[rows] = new
        self.memory.handed_over.copy_(after.handed_over)
        self._watch.look()

    def _hyper(self, groups: list[Group]) -> Hyper:
        """The groups' hyper-parameters by row; uploaded only when one of them changed."""
        columns = [
            (
                0.0 if isinstance(group.lr, Tensor) else group.lr,
                0.0 if isinstance(group.weight_decay, Tensor) else group.weight_decay,
                *momentum_coefficients(group, has_buffer=m is not None),
                p.numel() / count,
                count,
            )
            for group in groups
            for p, m, count in zip(group.params, group.momentum_buffers, group.row_counts, strict=True)
            if count
        ]
        hyper = self._cached("hyper", tuple(columns), lambda: _hyper_vectors(columns, self.device))
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


class HandOverWatch:
    """Tells the host that the warm-up is over, without ever waiting for the device.

    On the CPU the flag is read in memory. On a GPU each look enqueues a copy into pinned memory; the host learns of
    it at the first step after the copy has arrived, and until then measures without effect.
    """

    def __init__(self, flag: Tensor) -> None:
        self.flag = flag
        self.copy = torch.zeros((), dtype=torch.float32, pin_memory=True) if flag.is_cuda else flag
        self.value = self.copy.numpy()
        self.arrival: torch.cuda.Event | None = None

    def look(self) -> None:
        """Ask for the flag; at most one question is under way."""
        if self.flag.is_cuda and self.arrival is None and not torch.cuda.is_current_stream_capturing():
            self.copy.copy_(self.flag, non_blocking=True)
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    def warmup_is_over(self) -> bool:
        """Whether the flag is known to be set."""
        if self.arrival is not None and self.arrival.query():
            self.arrival = None
        return self.arrival is None and bool(self.value > 0)


def momentum_coefficients(group: Group, *, has_buffer: bool) -> tuple[float, float, float]:
    """Long-run gain of a constant gradient, ∂u/∂g̃ and ∂u/∂m for this step's update u."""
    μ, d = group.momentum, group.dampening
    if μ == 0:
        return 1.0, 1.0, 0.0
    per_grad, per_momentum = (1 - d, μ) if has_buffer else (1.0, 0.0)
    if group.nesterov:
        per_grad, per_momentum = 1 + μ * per_grad, μ * per_momentum
    return abs(1 - d) / (1 - μ) if μ < 1 else math.inf, per_grad, per_momentum


def _hyper_vectors(columns: list[tuple[float, ...]], device: torch.device) -> Hyper:
    *values, counts = np.array(columns, dtype=np.float32).T
    return Hyper(*_upload(np.repeat(np.stack(values), counts.astype(np.int64), axis=1), device))


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _scalar(value: float | Tensor, device: torch.device) -> float | Tensor:
    """A tensor hyper-parameter as a 0-dim tensor on the device of the parameters."""
    if not isinstance(value, Tensor):
        return value
    return value.squeeze().to(device, non_blocking=True)


def _check_gradient(p: Tensor, group: Mapping[str, Any], has_rows: bool) -> None:
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
    if p.is_complex() and has_rows:
        raise RuntimeError(
            f"a complex parameter of shape {tuple(p.shape)} is in a group with scale_invariant=True; "
            "only real parameters can be tracked: move it to a group with scale_invariant=False"
        )
