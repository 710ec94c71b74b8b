"""The main job at a tiny size, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import accuracy
from benchmarks.studies.comparison import FRESH_SEEDS

app = typer.Typer()
app.command()(accuracy.main)
ARGUMENTS = [
    "--model",
    "bn-mlp-4-w16",
    "--seeds",
    "1",
    "--fresh-seeds",
    "2",
    "--epochs",
    "2",
    "--lrs",
    "0.01,0.1",
]


pytestmark = pytest.mark.xdist_group("accuracy")  # the job runs once


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("run")
    result = CliRunner().invoke(app, [*ARGUMENTS, "--jobs", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return result.output, out


def test_writes_tables_json_and_plots(finished: tuple[str, Path]) -> None:
    output, out = finished
    for name in accuracy.default_methods(0.0):
        assert name in output
    report = json.loads((out / "accuracy.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert report["env"]["torch"] == torch.__version__
    assert report["data"] == "digits"
    for kind in ("accuracy", "spread", "layers"):
        assert (out / f"bn-mlp-4-w16-{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_the_learning_rate_is_chosen_by_validation_and_the_test_images_are_read_by_fresh_seeds(
    finished: tuple[str, Path],
) -> None:
    report = json.loads((finished[1] / "accuracy.json").read_text())
    for name in accuracy.default_methods(0.0):
        rows = [row for row in report["rows"] if row["spec"]["method"]["name"] == name]
        val = {row["spec"]["lr"]: row["accuracy"] for row in rows if row["spec"]["part"] == "val"}
        test = [row["spec"] for row in rows if row["spec"]["part"] == "test"]
        assert set(val) == {0.01, 0.1}
        assert [spec["lr"] for spec in test] == [max(val, key=lambda lr: val[lr])] * 2
        assert [spec["seed"] for spec in test] == [FRESH_SEEDS, FRESH_SEEDS + 1]
    (task,) = report["summary"].values()
    shown = task["warmup"]["test_accuracy"]
    of_warmup = [
        100 * row["accuracy"]
        for row in report["rows"]
        if row["spec"]["part"] == "test" and row["spec"]["method"]["name"] == "warmup"
    ]
    assert shown["mean"] == pytest.approx(sum(of_warmup) / 2)
    assert shown["n"] == 2


def test_a_second_call_runs_nothing_again(finished: tuple[str, Path]) -> None:
    rows = (finished[1] / "accuracy.rows.jsonl").read_text()
    result = CliRunner().invoke(app, [*ARGUMENTS, "--jobs", "1", "--out", str(finished[1])])
    assert result.exit_code == 0, result.output
    assert (finished[1] / "accuracy.rows.jsonl").read_text() == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "adam"], "'adam' is not known; choose from sgd, adamw"),
        (["--data", "imagefolder"], "takes the PATH"),
        (["some/path"], "takes the PATH"),
        (["--seeds", "0"], "seeds"),
        (["--lrs", "fast"], "--lrs takes positive numbers"),
        (["--lrs", "0.1,0"], "--lrs takes positive numbers"),
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
@pytest.mark.usefixtures("threads_for_processes")
def test_nets_without_tracked_layers_train_and_are_drawn(tmp_path: Path) -> None:
    arguments = [
        *ARGUMENTS,
        "--model",
        "mlp-3-w8",
        "--optimizer",
        "sgd",
        "--optimizer",
        "warmup",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, [*arguments[2:], "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "mlp-3-w8-layers.png").exists()
