"""How the host learns that the warm-up is over: the rule decides it on the device."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

__all__ = ["STEPS_PER_LOOK", "WarmupEndPoll", "is_readable"]

STEPS_PER_LOOK = 16  # between two copies of the flag from a GPU


class WarmupEndPoll:
    """Tells the host that the warm-up is over, without waiting for the device in the middle of training.

    On the CPU the flag is read in memory. On a GPU, every `STEPS_PER_LOOK` steps, `look` enqueues a copy of it into
    pinned memory. The first step after the copy has arrived knows the answer; steps before it measure without effect.
    With `in_step` all ranks must stop measuring at the same step, since they measure together: then the next `look`
    waits for the copy of the one before, and steps from there on know the answer. Where the flag has no data
    (`is_readable`), the warm-up never ends.

    `warmup_is_over` only asks. A step calls `collect` at its beginning, and `look` once it has measured.
    """

    def __init__(self, flag: Tensor, *, in_step: bool = False) -> None:
        self.flag = flag
        self.is_readable = is_readable(flag)
        self.in_step = in_step and flag.is_cuda
        self.over_in_step = False
        self.copy = torch.zeros((), dtype=torch.float32, pin_memory=True) if flag.is_cuda else flag
        self.value = self.copy.numpy() if self.is_readable else np.zeros(())
        self.arrival: torch.cuda.Event | None = None  # of the copy, while it is under way
        self.steps = itertools.count(1)

    def warmup_is_over(self) -> bool:
        """Whether the flag is known to be set. Changes nothing."""
        if self.in_step:
            return self.over_in_step
        # an event must not be asked while a CUDA graph is captured; the value is 0 until the copy has arrived
        has_arrived = self.arrival is None or self._is_captured() or self.arrival.query()
        return has_arrived and bool(self.value > 0)

    def collect(self) -> None:
        """Note that the copy under way has arrived, if it has."""
        if self.arrival is not None and not self.in_step and not self._is_captured() and self.arrival.query():
            self.arrival = None

    def look(self) -> None:
        """Ask for the flag, now and then; at most one copy is under way."""
        if not self.is_readable or not self.flag.is_cuda or next(self.steps) % STEPS_PER_LOOK != 0:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self.in_step and self.arrival is not None:
            self.arrival.synchronize()
            self.arrival, self.over_in_step = None, bool(self.value > 0)
        self.collect()
        if self.arrival is None:
            self.copy.copy_(self.flag, non_blocking=True)
            self.arrival = torch.cuda.Event()
            self.arrival.record(torch.cuda.current_stream(self.flag.device))

    def read(self) -> None:
        """Read the flag and wait for it. For a state that was loaded, whose warm-up may be over."""
        if self.is_readable:
            self.copy.copy_(self.flag)
            self.over_in_step = bool(self.value > 0)

    def _is_captured(self) -> bool:
        return self.flag.is_cuda and torch.cuda.is_current_stream_capturing()


def is_readable(t: Tensor) -> bool:
    """Whether it has data: meta and fake tensors, as estimators of memory use them, have none."""
    return type(t) is Tensor and not t.is_meta
