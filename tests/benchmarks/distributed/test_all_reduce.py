"""What the all-reduce benchmark fits, times and counts; and its committed result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib")

from benchmarks.distributed import all_reduce
from benchmarks.speed.workloads import WORKLOADS, param_groups
from elropt.optimizer import ELRSGD

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "benchmarks" / "results" / "all-reduce-gloo-cpu.json"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads(RESULT.read_text())


def test_a_line_is_fitted_exactly() -> None:
    sizes = [8, 100, 5000, 10**6]
    line = all_reduce.fit(sizes, [3e-4 + size / 2e9 for size in sizes])
    assert line.latency == pytest.approx(3e-4, rel=1e-9)
    assert line.bandwidth == pytest.approx(2e9, rel=1e-9)
    assert line.error < 1e-9
    assert line.n == 4


def test_small_sizes_count_as_much_as_large_ones() -> None:
    """A megabyte that takes twice as long as on the line hardly moves the latency, but 8 bytes that do, do."""
    sizes = [8, 16, 32, 64, 10**6, 2 * 10**6]
    seconds = np.array([1e-4 + size / 1e9 for size in sizes])
    late = all_reduce.fit(sizes, (seconds * [1, 1, 1, 1, 2, 2]).tolist())
    assert late.latency == pytest.approx(1e-4, rel=1e-3)
    uneven = all_reduce.fit(sizes, (seconds * [0.9, 1.1, 0.9, 1.1, 0.9, 1.1]).tolist())
    assert 0.05 < uneven.error < 0.15


def test_too_few_sizes() -> None:
    with pytest.raises(ValueError, match=r"\[8, 16\] are too few .* at least 3"):
        all_reduce.fit([8, 16, 8], [1, 2, 1])


def test_only_what_is_armed_is_handed_over() -> None:
    workload = WORKLOADS["tiny"]()
    made = {}
    for rule in ("warmup", None):
        params = workload.make(all_reduce.torch.device("cpu"))
        made[rule] = ELRSGD(param_groups(params, workload.tracked), rule=rule, momentum=0.9)
        made[rule].step()
        all_reduce.hand_over(made[rule])
    flags = [state["handed_over"].item() for state in made["warmup"].state.values()]
    assert flags == [1] * len(workload.shapes)
    assert not any("handed_over" in state for state in made[None].state.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "choose from cpu, cuda"),
        (["--device", "cuda", "--ranks", "4096"], "4096 ranks need a GPU each"),
        (["--workload", "alexnet"], "choose from"),
        (["--ranks", "1"], "--ranks"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: list[str], message: str) -> None:
    app = all_reduce.typer.Typer()
    app.command()(all_reduce.main)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert message in result.output


def test_committed_result(report: dict[str, Any]) -> None:
    """All-reduces per step and their bytes are what the optimizer promises, whatever the times were."""
    assert report["env"]["git_dirty"] is False
    per_step = {"uniform": 1, "warmup": 1}
    for row in report["rows"]:
        low, middle, high = row["us"]
        assert 0 < low <= middle <= high
        if row["kind"] == "step":
            tracked = {"160x4": 160, "resnet-56": 55, "resnet-50": 53}[row["workload"]]
            assert row["all_reduces"] == per_step.get(row["optimizer"], 0)
            assert row["bytes"] == (32 * tracked if row["all_reduces"] else 0)
    for held, made in zip(report["fits"], all_reduce.fits(report["rows"]), strict=True):
        assert held == pytest.approx(
            made, rel=1e-12
        )  # least squares round differently from machine to machine
    assert {row["ranks"] for row in report["rows"]} == {2, 4}


def test_committed_result_is_drawn_with_a_line_for_each_fit(report: dict[str, Any]) -> None:
    (ax,) = all_reduce.draw(report).axes
    labels = ax.get_legend_handles_labels()[1]
    assert len(labels) == len(report["fits"])
    assert sum(table.row_count for table in all_reduce.tables(report)) == len(report["rows"]) + len(labels)


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "all_reduce.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.distributed.all_reduce",
        "--ranks",
        "2",
        "--workload",
        "tiny",
    ]
    run = subprocess.run(
        [*command, "--turns", "2", "--blocks", "2", "--device", "cpu", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(out.read_text())
    counts = {row["optimizer"]: row["all_reduces"] for row in report["rows"] if row["kind"] == "step"}
    assert {name for name, count in counts.items() if count} == {"warmup", "uniform"}
    assert len(counts) == 6
    assert out.with_suffix(".png").stat().st_size > 10_000
