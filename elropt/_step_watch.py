"""Recording single steps of any torch optimizer, from hooks around them.

A step that nobody records costs two calls. One that is recorded costs a copy of the recorded weights until its end.
"""

from __future__ import annotations

import functools
import numbers
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ._eager_step import LayerMeasurements
from ._group_values import count_rows
from .optimizer import ELRSGD
from .rules import RADIAL_TESTS, LayerControls, LayerStats, count_test, radial_test
from .sharding import local
from .weight_change import Rows, gradient_sums, weight_change

__all__ = ["StepObserver", "StepRecord", "measure_now", "watch_of"]


class StepRecord(NamedTuple):
    """What a recorded step has left.

    changes: of each weight, `weight_change.CHANGES` by row, [3, rows].
    measured: what was measured before the step; None for an ELRSGD, which does that itself.
    """

    changes: dict[Tensor, Tensor]
    measured: LayerMeasurements | None


class StepObserver(Protocol):
    """Whoever wants records of steps."""

    def wants_next_step(self) -> bool: ...

    def after_step(self, optimizer: Optimizer, failure: Exception | None) -> None: ...


class _Snapshot:
    """The weights before a step, and the sums over the gradients that the step got."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        counts, per_filter = _row_counts(optimizer)
        self.rows = Rows(counts, per_filter)
        self.weights = [local(p).detach().clone() for p in self.rows.params]
        self.sums: Tensor | None = None
        self.has_grad: list[bool] = []

    def measure_gradients(self) -> None:
        """Measure the gradients as they are now. ELRSGD does that itself."""
        grads = [p.grad for p in self.rows.params]
        self.has_grad = [grad is not None for grad in grads]
        if not isinstance(self.optimizer, ELRSGD):
            self.sums = gradient_sums(self.weights, grads, self.rows, _grad_scale(self.optimizer))

    def after_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure; the gradients of its first evaluation are measured."""

        @functools.wraps(closure)
        def measured() -> Any:
            loss = closure()
            if not self.has_grad:
                with torch.no_grad():
                    self.measure_gradients()
            return loss

        return measured


class StepWatch:
    """Records those steps of one optimizer that an observer, or `request`, asks for.

    Where a step calls the `step` of its base class and both run hooks, the inner one is recorded.

    Attributes:
        record: what the last step has left; None if it was not recorded.
        tests: radial tests that weights of other optimizers than ELRSGD have passed, as `RuleState.tracked`, 0-dim.
    """

    def __init__(self) -> None:
        self.record: StepRecord | None = None
        self.tests: dict[Tensor, Tensor] = {}
        self._observers: list[StepObserver] = []
        self._requested = False
        self._snapshot: _Snapshot | None = None
        self._failure: Exception | None = None
        self._in_step = False
        self._hooks: list[Any] = []

    def request(self, optimizer: Optimizer) -> None:
        """Record the next step."""
        self._requested = True
        self._register(optimizer)

    def add(self, observer: StepObserver, optimizer: Optimizer) -> None:
        """Ask `observer` before every step, and tell it after."""
        self._observers.append(observer)
        self._register(optimizer)

    def remove(self, observer: StepObserver) -> None:
        """Forget `observer`, and everything if it was the last. During a step, and after one that raised, the hooks
        stay, and do nothing: torch may be going through them."""
        if observer in self._observers:
            self._observers.remove(observer)
        if self._observers or self._requested:
            return
        self.record = self._snapshot = None
        if not self._in_step:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def _register(self, optimizer: Optimizer) -> None:
        if not self._hooks:
            self._hooks = [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]

    @torch.compiler.disable()
    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.record = self._snapshot = self._failure = None
        self._in_step = True
        wanted = [observer.wants_next_step() for observer in self._observers]
        if not (self._requested or any(wanted)) or _is_capturing():
            return None
        self._requested = False
        # hooks of others may change the weights after the step: look after these
        self._hooks.pop().remove()
        self._hooks.append(optimizer.register_step_post_hook(self._after))
        if isinstance(optimizer, ELRSGD):
            optimizer.record_next_step()
        try:
            return self._begin(optimizer, args, kwargs)
        except Exception as error:  # never stop a training
            self._snapshot, self._failure = None, error
            return None

    @torch.no_grad()
    def _begin(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        snapshot = _Snapshot(optimizer)
        self._snapshot = snapshot
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            snapshot.measure_gradients()
            return None
        if len(args) > 1:
            return (args[0], snapshot.after_closure(closure), *args[2:]), kwargs
        return args, {**kwargs, "closure": snapshot.after_closure(closure)}

    @torch.compiler.disable()
    def _after(self, optimizer: Any, *_: object) -> None:
        if not self._in_step:
            return
        snapshot, self._snapshot = self._snapshot, None
        try:
            if snapshot is not None:
                self.record = self._finish(snapshot)
        except Exception as error:
            self._failure = error
        for observer in list(self._observers):
            observer.after_step(optimizer, self._failure)
        self._in_step = False

    @torch.no_grad()
    def _finish(self, snapshot: _Snapshot) -> StepRecord | None:
        if not snapshot.has_grad:  # a closure that was not called
            snapshot.measure_gradients()
        rows = snapshot.rows
        changes = weight_change(snapshot.weights, [local(p) for p in rows.params], rows)
        measured = None
        if snapshot.sums is not None:
            tracked = self._tracked(snapshot.optimizer, rows, snapshot.sums, changes[0])
            measured = _measurements(snapshot.optimizer, rows, snapshot.sums, tracked, snapshot.has_grad)
        return StepRecord(dict(rows.by_param(changes)), measured)

    def _tracked(self, optimizer: Optimizer, rows: Rows, sums: Tensor, turn: Tensor) -> Tensor:
        """[R] > 0: scale-invariant, by the groups or else by the radial tests; remembers these."""
        before = _tests_before(optimizer, rows, self.tests)
        after = count_test(before, _test(rows, sums, before), turn)
        self.tests |= dict(zip(rows.params, after.unbind(), strict=True))
        return after


_watches: weakref.WeakKeyDictionary[Optimizer, StepWatch] = weakref.WeakKeyDictionary()


def watch_of(optimizer: Optimizer) -> StepWatch:
    """The one watch of this optimizer, made if there is none."""
    return _watches.setdefault(optimizer, StepWatch())


def record_of(optimizer: Optimizer) -> StepRecord | None:
    """What the last step has left, if it was recorded."""
    watch = _watches.get(optimizer)
    return None if watch is None else watch.record


@torch.no_grad()
def measure_now(optimizer: Optimizer) -> LayerMeasurements | None:
    """Weights and gradients as they are now, of another optimizer than ELRSGD; None if there are no rows. Changes
    nothing. Rows that recorded steps have tested are not tested here: after a step the gradient is that of an older
    weight."""
    rows = Rows(_row_counts(optimizer)[0])
    grads = [p.grad for p in rows.params]
    sums = gradient_sums([local(p) for p in rows.params], grads, rows)
    watch = _watches.get(optimizer)
    before = _tests_before(optimizer, rows, {} if watch is None else watch.tests)
    tracked = torch.where(before == 0, _test(rows, sums, before), before)
    return _measurements(optimizer, rows, sums, tracked, [grad is not None for grad in grads])


def _row_counts(optimizer: Optimizer) -> tuple[dict[Tensor, int], set[Tensor]]:
    """Rows of the parameters that have any, and those with one for each filter. ELRSGD: see `count_rows`. Others: a row
    for a tensor of two or more dimensions, or in a group with ``scale_invariant=True``."""
    counts, per_filter = {}, set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if isinstance(optimizer, ELRSGD):
                counts[p] = count_rows(p, group)
                if group["granularity"] == "filter" and counts[p] > 1:
                    per_filter.add(p)
            elif not is_lazy(p) and p.is_floating_point():
                counts[p] = int(p.numel() > 0 and (p.dim() >= 2 or group.get("scale_invariant") is True))
    return {p: count for p, count in counts.items() if count}, per_filter


def _tests_before(optimizer: Optimizer, rows: Rows, tests: dict[Tensor, Tensor]) -> Tensor:
    """[R] radial tests passed; all of them, or failed, where the param group says what is scale-invariant."""
    said = {p: group.get("scale_invariant") for group in optimizer.param_groups for p in group["params"]}
    zero = torch.zeros((), device=rows.device)
    values = [
        tests.get(p, zero) if said[p] is None else zero + (RADIAL_TESTS if said[p] else -1)
        for p in rows.params
    ]
    return torch.stack(values) if values else zero.new_zeros(0)


def _test(rows: Rows, sums: Tensor, before: Tensor) -> Tensor:
    """[R] radial tests passed with that of these sums."""
    numel = torch.tensor([p.numel() for p in rows.params], dtype=torch.float32).to(rows.device)
    weight_sq, grad_sq, weight_dot_grad = sums
    return radial_test(
        LayerStats(weight_sq, grad_sq, weight_dot_grad, torch.zeros_like(grad_sq)), before, numel
    )


def _measurements(
    optimizer: Optimizer, rows: Rows, sums: Tensor, tracked: Tensor, has_grad: Sequence[bool]
) -> LayerMeasurements | None:
    """As ELRSGD's, of the rows that have a gradient, for a step without a rule."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    kept = [i for i, present in enumerate(has_grad) if present]
    if not kept:
        return None
    params = [rows.params[i] for i in kept]
    weight_sq, grad_sq, dot = sums[:, kept]
    signs = [-1.0 if groups[p].get("maximize") else 1.0 for p in params]
    dot = dot * torch.tensor(signs, dtype=torch.float64).to(dot.device)
    stats = LayerStats(weight_sq, grad_sq, dot, torch.zeros_like(dot))
    lrs = _lrs(groups[p].get("lr") for p in params)
    return LayerMeasurements(params, [1] * len(kept), lrs, False, stats, LayerControls(), tracked[kept])


def _lrs(values: Iterable[object]) -> list[float | Tensor]:
    """Learning rates as they are now; NaN where a group has none."""
    return [
        local(value).detach().clone()
        if isinstance(value, Tensor)
        else float(value)
        if isinstance(value, numbers.Real)
        else torch.nan
        for value in values
    ]


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _grad_scale(optimizer: Optimizer) -> Tensor | None:
    """What the gradients are still multiplied by: `torch.amp.GradScaler` sets it where the step divides by it."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None
