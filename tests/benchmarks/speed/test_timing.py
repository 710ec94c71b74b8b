"""Times per step, and what counts as a launch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.speed import timing


class FakeEvent:
    """A CUDA event on a clock that only steps move."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at: float | None = None

    def record(self) -> None:
        assert self.at is None
        self.at = FakeEvent.now

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.at is not None
        assert other.at is not None
        return other.at - self.at


def test_device_time_is_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call() -> None:
        FakeEvent.now += 0.5  # ms

    measured = timing.device_time([call] * 4, 0.1)
    assert measured["n"] == 50
    assert measured["us"] == pytest.approx([500.0] * 3)
    assert timing.device_time([call], 0.0, steps=5) == {"us": pytest.approx([100.0] * 3), "n": 5}


def test_launches_are_kernels_and_not_copies_or_ranges() -> None:
    names = ["measure_kernel", "Memcpy HtoD (Pinned -> Device)", "update_kernel", "Memset (Device)"]
    names += ["Optimizer.step#SGD.step", "ProfilerStep#1"]
    assert timing.launches_among(names) == {"launches": 2, "memory_ops": 2}


def test_quantiles() -> None:
    assert timing.quantiles(np.arange(101.0)) == {"us": [20.0, 50.0, 80.0], "n": 101}
