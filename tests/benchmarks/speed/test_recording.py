"""The benchmark of the Recorder: its numbers from turns made by hand, and that it runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import recording
from benchmarks.speed.recording import STEPS, Turn, figures


def turn(training: float, stepping: float, recorded: float = 0.0, every: int | None = None) -> Turn:
    extra = np.zeros(STEPS) if every is None else recorded * (np.arange(STEPS) % every == 0)
    return Turn(training + extra, stepping + extra)


def test_figures_of_turns_made_by_hand() -> None:
    without = [turn(0.010, 0.002), turn(0.020, 0.002)]
    some = figures([turn(0.010, 0.002, 0.005, 100), turn(0.020, 0.002, 0.005, 100)], without, 100)
    assert some["share"][1] == pytest.approx((0.005 + 0.0025) / 2)
    assert some["step_us"][1] == pytest.approx(2000)
    assert some["recorded_us"][1] == pytest.approx(7000)
    assert some["cost"] == pytest.approx(0.005 / 1.5)
    every = figures([turn(0.010, 0.002, 0.005, 1), turn(0.020, 0.002, 0.005, 1)], without, 1)
    assert every["step_us"] is None
    assert every["cost"] == pytest.approx(0.5 / 1.5)
    none = figures(without, without, None)
    assert (none["recorded_us"], none["cost"], none["share"]) == (None, 0, [0, 0, 0])


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "STEPS", 2)
    threads = recording.torch.get_num_threads()
    recording.main(turns=1, out=tmp_path / "recording.json")
    recording.torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "recording.json").read_text())["rows"]
    assert [(row["optimizer"], row["recorder"]) for row in rows] == [
        (optimizer, name) for optimizer in ("sgd", "adamw") for name in ("none", "every=100", "every=1")
    ]
    assert all((row["recorded_us"] is None) == (row["recorder"] == "none") for row in rows)
