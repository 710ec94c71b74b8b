"""Training steps: the command on the CPU, and the interval of a median."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.common.command_line import progress_bar
from benchmarks.speed import end_to_end
from benchmarks.speed.step_time import app


def test_end_to_end_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[set[int]] = []
    write = end_to_end.write_json

    def watched(path: Path, report: dict[str, Any]) -> None:
        written.append({row["step"]["n"] for row in report["rows"]})
        write(path, report)

    monkeypatch.setattr(end_to_end, "write_json", watched)
    monkeypatch.setattr(end_to_end, "ROUNDS_PER_WRITE", 2)
    out = tmp_path / "end_to_end.json"
    words = "end-to-end --device cpu --tiny --rounds 3 --steps 1 --out"
    result = CliRunner().invoke(app, [*words.split(), str(out)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    rows = {row["optimizer"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["torch-fused", "elr-none", "elr-warmup", "elr-uniform"]
    assert rows["torch-fused"]["ratio"] == [1.0, 1.0, 1.0]
    assert rows["elr-warmup"]["handed_over"] is False
    assert rows["torch-fused"]["ratio_interval"] == [1.0, 1.0]
    low, high = rows["elr-none"]["ratio_interval"]
    assert low <= rows["elr-none"]["ratio"][1] <= high
    assert written == [{2}, {3}]  # on the way, and at the end


def test_an_optimizer_that_fails_is_a_row() -> None:
    with progress_bar(Console(quiet=True)) as progress:
        optimizers = ["elr-nonsense", "elr-none"]
        rows = end_to_end.measure(optimizers, torch.device("cpu"), 1, 1, True, progress)
    assert "nonsense" in rows[0]["error"]
    assert rows[1]["ratio"] is None


def test_the_interval_of_a_median_covers_it() -> None:
    """95 % of such intervals do; of 40, fewer than 34 would do so once in 1,300 times."""
    draws = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        low, high = end_to_end.median_interval(draws.standard_normal(80)) or (1, -1)
        covered += low <= 0 <= high
    assert covered >= 34
    assert end_to_end.median_interval(np.ones(1)) is None
