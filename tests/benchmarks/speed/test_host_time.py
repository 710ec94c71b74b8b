"""The host-time benchmark runs, and launches nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed import host_time


def test_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "benchmarks.speed.host_time", "--turns", "2", "--out", str(out)]
    run = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "wrote" in run.stdout
    rows = json.loads(out.read_text())["rows"]
    assert {row["tensors"] for row in rows} == {160, 2000}
    assert "elr-uniform, 160 groups" in {row["optimizer"] for row in rows}
    assert all(row["us"][1] > 0 for row in rows)
    assert all(row["ratio"] == [1, 1, 1] for row in rows if row["optimizer"] == "torch-fused")


@pytest.mark.parametrize("part", [host_time.Part.CPU, host_time.Part.GROUPS])
def test_real_steps(part: host_time.Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = host_time.cases(part)[:1]
    monkeypatch.setattr(host_time, "cases", lambda _: small)
    threads = host_time.torch.get_num_threads()
    host_time.main(part, turns=2, out=tmp_path / "host.json")
    host_time.torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert {row["n"] for row in rows} == {2}
    names = {row["optimizer"].split(",")[0] for row in rows}
    assert {*host_time.TORCH, "elr-none", "elr-uniform"} <= names
    assert all(row["ratio"] == [1, 1, 1] for row in rows if row["optimizer"] == small[0].baseline)


def test_the_warm_up_stays_on_while_it_is_measured() -> None:
    made = host_time.real_steps(host_time.cut_down(host_time.WORKLOADS["resnet-50"]()))
    warmup = made["elr-warmup"]
    for _ in range(15):
        warmup.step()
    assert all(float(held["handed_over"]) == 0 for held in warmup.state.values())
