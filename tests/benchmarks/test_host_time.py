"""The host-time benchmark runs, and launches nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "benchmarks.host_time", "--turns", "2", "--out", str(out)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "wrote" in run.stdout
    rows = json.loads(out.read_text())["rows"]
    assert {row["tensors"] for row in rows} == {160, 2000}
    assert all(row["us"][1] > 0 for row in rows)
    assert all(row["ratio"] == [1, 1, 1] for row in rows if row["optimizer"] == "torch-fused")
