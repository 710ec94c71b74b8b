"""The studies: their statements on rows made by hand, and every one of them at its tiny size."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.accuracy import ACCURACY
from benchmarks.common.optimizers import METHODS, Method
from benchmarks.common.sweep import without_nan
from benchmarks.common.training import Run, Task
from benchmarks.studies import STUDIES, comparison
from benchmarks.studies.__main__ import app
from benchmarks.studies.radians import run as radians
from benchmarks.studies.spread import run as spread
from benchmarks.studies.swap_in import run as swap_in
from benchmarks.studies.warmup import run as warmup

ROOT = Path(__file__).resolve().parents[3]
TASK = Task("bn-mlp-4-w16")


def row(
    method: str | Method,
    lr: float,
    seed: int,
    accuracy: float,
    part: str = "val",
    task: Task = TASK,
    **values: Any,
) -> dict[str, Any]:

    of_method = METHODS[method] if isinstance(method, str) else method
    spec = dataclasses.asdict(Run(task, of_method, lr, seed, part))
    trace = {"trace_steps": [0, 10], "spread": [9.0, 4.0], "applied_spread": [1.0, 4.0]}
    return {"spec": spec, "accuracy": accuracy, "classes": 10, "seconds": 2.0, "curve": [], **trace, **values}


ROWS = [
    *(row("sgd", lr, seed, a) for lr, a in ((0.1, 0.5), (1.0, 0.4)) for seed in (0, 1)),
    *(row("sgd+linear", lr, 0, a) for lr, a in ((0.1, 0.3), (1.0, 0.6))),
    *(row("uniform", lr, 0, a) for lr, a in ((0.1, 0.7), (1.0, 0.65), (10.0, 0.2))),
    *(row("sgd+linear", 1.0, 100 + i, 0.6 + 0.02 * i, "test") for i in range(3)),
    *(row("uniform", 0.1, 100 + i, 0.65 + 0.01 * i, "test") for i in range(3)),
]


def test_the_baseline_is_the_better_of_sgd_with_and_without_warmup() -> None:
    of_task = comparison.entries(ROWS)
    sgd = comparison.best_sgd(of_task)
    assert sgd is not None
    assert sgd.method == "sgd+linear"
    uniform = next(entry for entry in of_task if entry.method == "uniform")
    difference = comparison.against_sgd(uniform, of_task)
    assert difference is not None
    assert difference.mean == pytest.approx(5 - 1)  # 65, 66, 67 minus 60, 62, 64, by seed
    assert difference.low == pytest.approx(3)


def test_a_learning_rate_is_usable_from_ninety_percent_of_sgds_gain_over_chance() -> None:
    usable = {entry.method: entry.usable for entry in comparison.entries(ROWS)}
    bar = 10 + 0.9 * (60 - 10)
    assert usable["sgd"] is None
    assert usable["uniform"] is not None
    assert (usable["uniform"].low, usable["uniform"].cut_low) == (0.1, True)
    assert math.log10(usable["uniform"].high) == pytest.approx((65 - bar) / 45)


def test_finals_take_the_best_learning_rate_and_fresh_seeds() -> None:
    runs = comparison.finals(ROWS, 2)
    assert [(run.method.name, run.lr, run.seed, run.part) for run in runs] == [
        ("sgd", 0.1, 100, "test"),
        ("sgd", 0.1, 101, "test"),
        ("sgd+linear", 1.0, 100, "test"),
        ("sgd+linear", 1.0, 101, "test"),
        ("uniform", 0.1, 100, "test"),
        ("uniform", 0.1, 101, "test"),
    ]
    assert runs[0].task == TASK
    assert runs[0].method == METHODS["sgd"]
    assert [run.layers for run in runs] == [True, False] * 3


@pytest.mark.parametrize(
    ("values", "closed"),
    [([9, 3, 1.5, 1.9, 30], 20), ([9, 3, 1.5, 2.1, 1], None), ([1.1, 1.2, 1.3, 1.4, 9], 0)],
)
def test_steps_to_closed(values: list[float], closed: int | None) -> None:
    of_run = {"trace_steps": [0, 10, 20, warmup.HORIZON, warmup.HORIZON + 1], "spread": values}
    assert warmup.first_closed(of_run) == closed


def test_area_under_the_logarithm_of_the_spread() -> None:
    of_run = {"trace_steps": [0, 10, 100, 150], "spread": [math.e**2, 1.0, 1.0, 1e9]}
    assert warmup.mean_log(of_run, "spread") == pytest.approx(0.1)
    assert math.isnan(warmup.mean_log({"trace_steps": [0, 10], "spread": [1.0, None]}, "spread"))


def test_accuracy_falls_with_the_spread() -> None:
    methods = [
        [
            row("sgd", 0.1, seed, 0.9 - 0.1 * i + 0.2 * seed, applied_spread=[2.0**i, 2.0**i])
            for seed in (0, 1)
        ]
        for i in range(4)
    ]
    found = spread.correlation(methods)
    assert found is not None
    assert found["rho"] == pytest.approx(-1)
    assert found["methods"] == 4
    assert spread.applied_spread(methods[3][0]) == pytest.approx(8)
    assert spread.correlation(methods[:2]) is None


def test_time_to_accuracy_is_that_of_the_mean_curve() -> None:
    curves = {"sgd": [(5, 1.0, 0.5), (10, 2.0, 0.8)], "uniform": [(5, 3.0, 0.77), (10, 6.0, 0.9)]}
    rows = []
    for name, points in curves.items():
        rows.append(row(name, 0.1, 0, 0.8))
        rows += [
            row(name, 0.1, 100 + i, 0.8, "test", curve=[(e, s, a + (-1) ** i * 0.1) for e, s, a in points])
            for i in range(2)
        ]
    found = swap_in.summarize(rows)[comparison.label(rows[0]["spec"]["task"])]
    assert found["sgd"]["epochs_to_accuracy"] == 10
    assert found["uniform"]["epochs_to_accuracy"] == 5
    assert found["uniform"]["seconds_to_accuracy"] == pytest.approx(3)


def test_time_to_accuracy_where_sgd_has_diverged() -> None:
    rows = [row("sgd", 0.1, 0, 0.1), row("sgd", 0.1, 100, 0.1, "test")]
    found = swap_in.summarize(rows)[comparison.label(rows[0]["spec"]["task"])]
    assert found["sgd"]["epochs_to_accuracy"] is None


@pytest.mark.parametrize("size", ["tiny", "small", "full"])
def test_every_task_of_the_radians_has_a_place_of_its_own(size: str) -> None:
    tasks = [dataclasses.asdict(task) for task in radians.PLANS[size]("cpu").tasks]
    places = [radians.differs(task, tasks[0]) for task in tasks]
    assert len(set(places)) == len(tasks)
    for task in tasks[1:]:
        assert sum(radians.aspect(task, axis) != radians.aspect(tasks[0], axis) for axis in radians.AXES) == 1


def test_axes_of_the_radians_are_read_from_the_tasks() -> None:
    base = Task("bn-mlp-12-w64", epochs=10)
    tasks = radians.around(
        base, model=["bn-mlp-6-w64", "bn-mlp-12-w16", "ln-mlp-12-w64"], batch_size=[32], epochs=[4, 10]
    )
    assert len(tasks) == 6  # epochs=10 is the base
    rows = [
        row(name, lr, seed, 0.9 - 0.1 * (math.log10(lr / best)) ** 2, task=task)
        for index, task in enumerate(tasks)
        for name, best in (("sgd", 10.0 ** (-index / 4 - 0.5)), ("angle", 0.1))
        for lr in (0.001, 0.01, 0.1, 1.0)
        for seed in (0, 1)
    ]
    summary = radians.summarize(rows)
    assert {axis: list(values) for axis, values in summary["axes"].items()} == {
        "depth": ["6", "12"],
        "width": ["16", "64"],
        "normalization": ["bn-mlp", "ln-mlp"],
        "batch size": ["32", "128"],
        "epochs": ["4", "10"],
    }
    assert summary["range"]["angle"] == pytest.approx(dict.fromkeys(summary["axes"], 1.0))
    assert summary["range"]["sgd"]["width"] == pytest.approx(10**0.5)
    assert summary["axes"]["depth"]["6"]["sgd"]["lr"] == pytest.approx(10**-0.75)
    assert summary["good_for_all"]["angle"]["width"] == pytest.approx(summary["good_for_all"]["angle"]["all"])
    assert summary["axes"]["depth"]["6"]["angle"]["good_high"] == pytest.approx(0.1 * 10**0.4)
    assert summary["one_lr_for_all"]["angle"] == {"lr": 0.1, "mean_loss": 0.0, "worst_loss": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(STUDIES) - {"dynamics"}))  # that one has a test of its own
def test_every_study_runs_resumes_and_draws_again(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    arguments = [name, "--size", "tiny", "--device", "cpu", "--jobs", "2", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    result_file = tmp_path / f"{name}-tiny.json"
    result = json.loads(result_file.read_text(), parse_constant=lambda c: pytest.fail(c))
    assert result["size"] == "tiny"
    assert result["rows"]
    assert result["env"]["python"]
    assert list(tmp_path.glob("*.png"))
    rows_file = tmp_path / f"{name}-tiny.rows.jsonl"
    rows = rows_file.read_text()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert rows_file.read_text() == rows
    again = CliRunner().invoke(app, ["report", str(result_file), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    assert list((tmp_path / "again").glob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*sorted(set(STUDIES) - {"evidence"}), "accuracy-digits", "accuracy-plain-56-cifar10-8px"]
)
def test_committed_results_can_be_drawn_and_their_summary_is_that_of_their_rows(
    name: str, tmp_path: Path
) -> None:
    file = ROOT / "benchmarks" / "results" / f"{name}-small.json"
    file = file if file.exists() else file.with_name(f"{name}.json")
    report = CliRunner().invoke(app, ["report", str(file), "--out", str(tmp_path)])
    assert report.exit_code == 0, report.output
    assert list(tmp_path.glob("*.png"))
    result = json.loads(file.read_text())
    study = {**STUDIES, "accuracy": ACCURACY}[result["study"]]
    again = json.loads(json.dumps(without_nan(study.summarize(result["rows"]))))
    assert_same_up_to_rounding(again, result["summary"])


def assert_same_up_to_rounding(found: Any, expected: Any, where: str = "summary") -> None:
    """Equal values; floats may differ in their last bits, since the BLAS behind a fit depends on the CPU."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same_up_to_rounding(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same_up_to_rounding(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-14), where
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["warmup", "--size", "huge"], "unknown size 'huge'"),
        (["warmup", "--device", "nope"], "--device nope cannot be used"),
        (["report", "missing.json"], "missing.json cannot be read: No such file"),
        (["report", "pyproject.toml"], "pyproject.toml is not the result of a study"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("name", STUDIES)
def test_help_has_an_example(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    size = STUDIES[name].sizes[1]
    assert f"python -m benchmarks.studies {name} --size {size}" in " ".join(result.output.split())


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("study", [warmup, spread, swap_in, radians], ids=lambda module: module.__name__)
def test_plans_have_no_run_twice(study: Any, size: str) -> None:
    runs = comparison.grid(study.PLANS[size]("cpu"))
    assert len(set(runs)) == len(runs)
    assert all(run.task.data in ("digits", "cifar10", "cifar100", "tinyimagenet40") for run in runs)
