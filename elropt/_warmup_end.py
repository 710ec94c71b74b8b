"""How the host learns that the warm-up is over, which is decided on the device, and when it must ask again."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._group_values import lr_gain
from .rules import LR_RISE

__all__ = ["STEPS_PER_LOOK", "LargestLrs", "WarmupEndPoll", "is_readable"]

STEPS_PER_LOOK = 16  # between two copies of the flag from a GPU

_LR_OPTIONS = operator.itemgetter("lr", "momentum", "dampening", "nesterov", "tracked_lr")


class WarmupEndPoll:
    """Tells the host that the warm-up is over, without waiting for the device in the middle of training.

    On the CPU the flag is read in memory. On a GPU, every `STEPS_PER_LOOK` steps, `look` enqueues a copy of it into
    pinned memory. The first step after the copy has arrived knows the answer; steps before it measure without effect.
    With `in_step` the answer is known at the same step on all ranks, which measure together, and in every run: the next
    `look` waits for the copy of the one before, and steps from there on know the answer. Where the flag has no data
    (`is_readable`), the warm-up never ends.

    `warmup_is_over` only asks. A step calls `collect` at its beginning, and `look` once it has measured.
    """

    def __init__(self, flag: Tensor, *, in_step: bool = False) -> None:
        self.flag = flag
        self.is_readable = is_readable(flag)
        self.in_step = in_step
        self.over = False  # as far as copies have arrived
        self.copy = torch.zeros((), dtype=torch.float32, pin_memory=True) if flag.is_cuda else flag
        self.value = self.copy.numpy() if self.is_readable else np.zeros(())
        self.arrival: torch.cuda.Event | None = None  # of the copy, while it is under way
        self.steps = itertools.count(1)

    def warmup_is_over(self) -> bool:
        """Whether the flag is known to be set. Changes nothing."""
        if not self.flag.is_cuda:
            return bool(self.value > 0)
        return bool(self.value > 0) if self._has_arrived() else self.over

    def collect(self) -> None:
        """Note what the copy under way says, if it has arrived."""
        if self._has_arrived():
            self.arrival, self.over = None, bool(self.value > 0)

    def look(self, lr_has_risen: Callable[[], Tensor] | None = None) -> None:
        """Ask for the flag, now and then; at most one copy is under way.

        Args:
            lr_has_risen: 0-dim bool on the device: if so, the flag does not count. For an lr that the host cannot read.
        """
        if not self.is_readable or not self.flag.is_cuda or next(self.steps) % STEPS_PER_LOOK != 0:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self.in_step and self.arrival is not None:
            self.arrival.synchronize()
            self.arrival, self.over = None, bool(self.value > 0)
        self.collect()
        if self.arrival is None:
            flag = self.flag if lr_has_risen is None else torch.where(lr_has_risen(), 0.0, self.flag)
            self.copy.copy_(flag, non_blocking=True)
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(self.flag.device))

    def ask_again(self) -> None:
        """Forget the answer and the copy under way: this step may start the warm-up again. The next look comes
        `STEPS_PER_LOOK` steps later: by then some step has had finite gradients, under torch.amp.GradScaler too."""
        self.arrival, self.over = None, False
        self.steps = itertools.count(1)

    def read(self) -> None:
        """Read the flag and wait for it. For a state that was loaded, whose warm-up may be over."""
        if self.is_readable:
            self.copy.copy_(self.flag)
            self.over = bool(self.value > 0)

    def _has_arrived(self) -> bool:
        # an event must not be asked while a CUDA graph is captured
        if self.arrival is None or self.in_step or torch.cuda.is_current_stream_capturing():
            return False
        return self.arrival.query()


class LargestLrs:
    """The largest λΓ that each param group has had at a step of the warm-up, as far as the host can read the lr.

    `rules.lr_has_risen` decides on the device whether the warm-up starts again, and needs measured layers for it. This
    says at which steps the host has to measure. `has_risen` only asks; a step calls `follow`.

    Args:
        groups: the param groups.
        params: whose gradients may be missing when an lr rises: they are measured when they have one again.
        largest: of a state that was loaded.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], params: Sequence[Tensor], largest: float | None = None
    ) -> None:
        self.groups, self.params = groups, params
        self.missed: list[Tensor] = []  # those without a gradient since an lr has risen
        self.largest: list[float | None] = [largest] * len(groups)  # None: there was no step
        # of the last step, and which parameters had a gradient; None: one was a tensor
        self.options: tuple[list[tuple[Any, ...]], tuple[bool, ...] | None] | None = None
        self.are_readable = True  # at the last step, without waiting for a device

    def has_risen(self) -> bool:
        """Whether an lr is larger now than at the steps before with these gradients, by more than rounding. Changes
        nothing."""
        return self._exceeds(self._now())

    def follow(self, present: tuple[bool, ...] | None, *, acts: bool) -> bool:
        """What `has_risen` says of this step.

        Args:
            present: as in `RuleGroupPlan`.
            acts: whether the warm-up is not over.
        """
        lrs = [group["lr"] for group in self.groups]
        options = None
        if not any(isinstance(lr, Tensor) for lr in lrs):
            options = list(map(_LR_OPTIONS, self.groups)), present
        if options is not None and options == self.options:
            return False
        now = self._now()
        risen = self._exceeds(now)
        if acts or risen:
            before = self.largest
            self.largest = [
                max(lr, largest or 0.0) if lr is not None else largest
                for lr, largest in zip(now, before, strict=True)
            ]
            may_miss = self.params if self.largest != before else self.missed
            self.missed = [p for p in may_miss if p.grad is None]
        self.options, self.are_readable = options, None not in now
        return risen

    def _now(self) -> list[float | None]:
        return [_read(lr_gain(group)) for group in self.groups]

    def _exceeds(self, now: Sequence[float | None]) -> bool:
        # half as strict as the device, which decides in float32
        rise = (1 + LR_RISE) / 2
        return any(p.grad is not None for p in self.missed) or any(
            lr is not None and before is not None and lr > rise * before
            for lr, before in zip(now, self.largest, strict=True)
        )


def _read(value: float | Tensor) -> float | None:
    """The number; None if it is on another device, or has no data."""
    if not isinstance(value, Tensor):
        return float(value)
    if not value.is_cpu or not is_readable(value):
        return None
    return float(value.detach().float().numpy().reshape(())[()])


def is_readable(t: Tensor) -> bool:
    """Whether it has data: meta and fake tensors, as estimators of memory use them, have none."""
    return type(t) is Tensor and not t.is_meta
