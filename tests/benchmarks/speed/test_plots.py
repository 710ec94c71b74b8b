"""Plots and verdicts of made-up times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.speed import plots as speed_plots
from benchmarks.speed.plots import Results, verdicts

app = typer.Typer()
app.command()(speed_plots.main)


def row(workload: str, optimizer: str, us: float | None, **more: Any) -> dict[str, Any]:
    timing = (
        None if us is None else {"us": [0.9 * us, us, 1.2 * us], "n": 5, "gb_per_s": 5e4 / us, "of_copy": 0.5}
    )
    return {
        "workload": workload,
        "optimizer": optimizer,
        "elements": 30_000_000,
        "bytes": 600_000_000,
        "graph": timing,
        "eager": timing,
        **more,
    }


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "step-time", "copy": {"gb_per_s": 1000.0}, "rows": list(rows)}


MADE_UP = report(
    row("resnet-50", "torch-fused", 100.0),
    row("resnet-50", "elr-none", 90.0),
    row("resnet-50", "elr-warmup", 130.0),
    row("resnet-50", "timm-lars", 2000.0),
    row("resnet-50", "timm-sgdp", None),
    row("resnet-50", "optimi-sgd", None, error="not installed"),
    row("resnet-56", "torch-fused", 10.0),
    row("resnet-56", "elr-none", 8.0),
)


def by_target(*reports: dict[str, Any]) -> dict[tuple[str, str], speed_plots.Verdict]:
    return {(v.target, v.mode): v for v in verdicts(Results(reports))}


def test_targets() -> None:
    found = by_target(MADE_UP)
    none = found["resnet-50: elr-none / torch-fused", "graph"]
    assert (none.limit, none.measured, none.met) == (1.0, 0.9, True)
    warmup = found["resnet-50: elr-warmup / torch-fused", "eager"]
    assert (warmup.limit, warmup.measured, warmup.met) == (1.25, 1.3, False)
    assert found["resnet-50: elr-uniform / torch-fused", "graph"].met is None
    small = found["resnet-56: elr-none / torch-fused", "graph"]
    assert (small.limit, small.met) == (0.7, False)
    lars = found["resnet-50: timm-lars / slowest rule", "graph"]
    assert lars.measured == pytest.approx(2000 / 130)
    assert lars.met
    assert found["resnet-50: timm-sgdp / slowest rule", "graph"].met is None
    bandwidth = found["resnet-50: elr-none of copy bandwidth", "graph"]
    assert (bandwidth.limit, bandwidth.measured, bandwidth.met) == (0.9, 0.5, False)


def test_a_warm_up_that_ended_is_not_a_measurement() -> None:
    rows = [row("resnet-50", "torch-fused", 100.0), row("resnet-50", "elr-warmup", 90.0, handed_over=True)]
    assert by_target(report(*rows))["resnet-50: elr-warmup / torch-fused", "graph"].met is None


def test_end_to_end_targets() -> None:
    rows = [
        {"optimizer": "torch-fused", "ratio": [1.0, 1.0, 1.0]},
        {"optimizer": "elr-none", "ratio": [0.9, 1.005, 1.1]},
        {"optimizer": "elr-uniform", "error": "RuntimeError: no"},
    ]
    found = by_target({"kind": "end-to-end", "rows": rows})
    assert found["training step: elr-none / torch-fused", "eager"].met
    assert found["training step: elr-uniform / torch-fused", "eager"].met is None
    assert len(found) == 2


def test_command_draws_everything(tmp_path: Path) -> None:
    kernel_rows = [
        {
            "kernel": kernel,
            "case": "n",
            "dtype": "float32",
            "tensors": 1,
            "bytes": 10**k,
            "gb_per_s": 10.0 * k,
        }
        for kernel in ("copy", "update")
        for k in (4, 6, 8)
    ]
    files = {"steps.json": MADE_UP, "kernels.json": {"kind": "kernels", "rows": kernel_rows}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    out = tmp_path / "plots"
    arguments = [*(str(tmp_path / name) for name in files), "--out", str(out)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "✓" in result.output
    assert "✗" in result.output
    for name in ("step-time-resnet-50.png", "step-time-resnet-56.png", "roofline.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_rows_of_a_cpu_run_have_nothing_to_draw_but_do_not_fail(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"kind": "step-time", "copy": None, "rows": [row("tiny", "elr-none", None)]}))
    result = CliRunner().invoke(app, [str(path), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "roofline.png").exists()


@pytest.mark.parametrize("content", ["not json", "[]", '{"kind": "suite"}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    result = CliRunner().invoke(app, [str(path)], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "other.json" in result.output
