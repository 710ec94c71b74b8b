"""The main job at a tiny size, its statistics on rows made by hand, and its errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import accuracy, data

app = typer.Typer()
app.command()(accuracy.main)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("run")
    arguments = [
        "--model",
        "bn-mlp-4-w16",
        "--seeds",
        "2",
        "--epochs",
        "2",
        "--lrs",
        "0.01,0.1",
        "--jobs",
        "1",
    ]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output, out


def test_writes_table_json_and_plots(finished: tuple[str, Path]) -> None:
    output, out = finished
    for name in accuracy.METHODS:
        assert name in output
    report = json.loads((out / "accuracy.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert len(report["rows"]) == len(accuracy.METHODS) * 2 * 2
    assert report["env"]["torch"] == torch.__version__
    assert report["config"]["epochs"] == 2
    for kind in ("accuracy", "spread", "layers"):
        assert (out / f"bn-mlp-4-w16-{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_rows_say_what_was_applied(finished: tuple[str, Path]) -> None:
    rows = json.loads((finished[1] / "accuracy.json").read_text())["rows"]
    for row in rows:
        assert row["finite"]
        assert 0 <= row["val_accuracy"] <= 1
        assert row["elr_steps"] == accuracy.recorded_steps(row["steps"])
        elrs = np.array(row["elrs"], dtype=float)
        assert elrs.shape == (len(row["elr_steps"]), 3)
        if row["method"] == "angle":
            assert elrs[0] == pytest.approx([row["lr"]] * 3, rel=1e-3)
        if row["method"] == "uniform":
            assert np.ptp(elrs[1]) < 1e-3 * elrs[1].mean()
        if row["method"] == "sgd":
            assert np.ptp(elrs[0]) > 1e-2 * elrs[0].mean()


def test_the_same_seed_gives_the_same_run() -> None:
    config = accuracy.Config("digits", epochs=1)
    dataset = data.load("digits")
    run = accuracy.Run("bn-mlp-4-w16", "warmup", 0.1, 0)
    first, second = (accuracy.train(run, config, dataset) for _ in range(2))
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in second.items() if k != "seconds"
    }
    other = accuracy.train(run._replace(seed=1), config, dataset)
    assert other["elrs"] != first["elrs"]


def row(lr: float, seed: int, val: float, test: float, elrs: list[list[float]]) -> dict[str, Any]:
    return {
        "lr": lr, "seed": seed, "val_accuracy": val, "test_accuracy": test,
        "elr_steps": [0, 10], "elrs": elrs, "seconds": 1.0,
    }  # fmt: skip


def test_summary_chooses_by_validation_and_reports_test() -> None:
    flat = [[1.0, 1.0], [1.0, 1.0]]
    rows = [
        row(0.01, 0, 0.50, 0.99, flat), row(0.01, 1, 0.50, 0.99, flat),
        row(0.1, 0, 0.895, 0.80, flat), row(0.1, 1, 0.895, 0.80, flat),
        row(0.3, 0, 0.88, 0.70, [[4.0, 1.0], [2.0, 1.0]]), row(0.3, 1, 0.92, 0.80, [[9.0, 1.0], [2.0, math.nan]]),
        row(1.0, 0, 0.80, 0.99, flat), row(1.0, 1, 0.80, 0.99, flat),
        row(3.0, 0, 0.895, 0.99, flat), row(3.0, 1, 0.895, 0.99, flat),
    ]  # fmt: skip
    s = accuracy.summarize(rows)
    assert s.lrs[s.best] == 0.3
    assert s.test_mean[s.best] == pytest.approx(0.75)
    assert s.test_std[s.best] == pytest.approx(np.std([0.7, 0.8], ddof=1))
    assert s.lr_range == pytest.approx(3)  # 0.1 … 0.3: a stretch without holes
    assert s.spreads == pytest.approx({0: 6.0, 10: math.sqrt(2)})


@pytest.mark.parametrize("steps", [1, 5, 11, 160])
def test_recorded_steps(steps: int) -> None:
    recorded = accuracy.recorded_steps(steps)
    assert recorded == sorted(set(recorded))
    assert {0, steps - 1} <= set(recorded) <= set(range(steps))
    assert 10 not in range(steps) or 10 in recorded


def test_linear_warmup_then_cosine() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    schedule = accuracy.make_schedule(optimizer, 100, linear_warmup=True)
    lrs = []
    for _ in range(100):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [(t + 1) / 10 if t < 10 else 0.5 * (1 + math.cos(math.pi * (t - 10) / 90)) for t in range(100)]
    np.testing.assert_allclose(lrs, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "lars"], "unknown optimizer 'lars'"),
        (["--data", "imagefolder"], "takes the PATH"),
        (["some/path"], "takes the PATH"),
        (["--seeds", "0"], "seeds"),
        (["--lrs", "fast"], "fast"),
        (["--model", "nope-3"], "nope-3"),
        (["--data", "nope"], "nope"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.filterwarnings("ignore:.*scale-invariant")
def test_nets_without_tracked_layers_train_too() -> None:
    dataset = data.load("digits")
    for method in ("sgd", "warmup", "angle"):
        run = accuracy.Run("mlp-3-w8", method, 0.01, 0)
        result = accuracy.train(run, accuracy.Config("digits", epochs=1), dataset)
        assert all(elrs == [] for elrs in result["elrs"])
        assert accuracy.summarize([result]).spreads == {}
