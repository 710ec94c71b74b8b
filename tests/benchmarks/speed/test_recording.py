"""The benchmark of the Recorder: its numbers from steps made by hand, and that it runs."""

import json
from pathlib import Path

import pytest

from benchmarks.speed import recording
from benchmarks.speed.recording import Step, figures


def test_figures_of_steps_made_by_hand() -> None:
    samples = {
        "none": [Step(10_000, 1_000), Step(12_000, 3_000), Step(10_000, 1_000)],
        "waiting": [Step(10_001, 1_001), Step(12_001, 3_001), Step(50_000, 40_000)],
        "recorded": [Step(15_000, 6_000), Step(17_000, 8_000), Step(15_000, 6_000)],
    }
    none, waiting, recorded = figures(samples)
    assert [row["added_us"] for row in (none, waiting, recorded)] == [0, 1, 5000]
    assert recorded["us"][1] == 15_000
    assert recorded["cost"] == pytest.approx({"every=100": (50 + 0.99) / 10_000, "every=1": 0.5})
    assert none["cost"] is None


def test_it_runs(tmp_path: Path) -> None:
    threads = recording.torch.get_num_threads()
    recording.main(turns=2, out=tmp_path / "recording.json")
    recording.torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "recording.json").read_text())["rows"]
    assert [(row["optimizer"], row["step"]) for row in rows] == [
        (optimizer, kind) for optimizer in ("sgd", "adamw") for kind in ("none", "waiting", "recorded")
    ]
    assert all(row["us"][1] > 0 for row in rows)
