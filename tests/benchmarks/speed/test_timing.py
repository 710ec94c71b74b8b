"""Times per step, and what counts as a launch."""

from __future__ import annotations

from functools import partial
from itertools import chain

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


def test_every_block_has_one_turn_a_round_in_changing_order() -> None:
    turns: list[str] = []
    seen: list[int] = []

    def block(name: str) -> int:
        turns.append(name)
        return len(turns)

    blocks = {name: partial(block, name) for name in "abc"}
    samples = timing.take_turns(blocks, 20, lambda so_far: seen.append(len(so_far["a"])))
    rounds = [tuple(turns[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3
    assert sorted(chain(*samples.values())) == list(range(1, 61))
    assert seen == list(range(1, 21))


def test_what_cannot_be_built_is_a_row() -> None:
    built, failed = timing.build_all(["2", "x"], int)
    assert built == {"2": 2}
    assert [(row["optimizer"], row["error"][:10]) for row in failed] == [("x", "ValueError")]
