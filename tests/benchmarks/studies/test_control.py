"""The study of control: its numbers on rows made by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from benchmarks.common.optimizers import METHODS
from benchmarks.common.training import Run, Task
from benchmarks.studies import comparison
from benchmarks.studies.control import run as control
from benchmarks.studies.control.report import usable
from benchmarks.studies.control.summarize import PAIRS, summarize

IMAGES = Task("bn-mlp-4-w16", weight_decay=5e-4)
TEXT = Task("olmo-1-w32", "python", weight_decay=5e-4)


def row(
    task: Task, method: str, lr: float, seed: int, value: float | None, part: Any = "val"
) -> dict[str, Any]:
    spec = dataclasses.asdict(Run(task, METHODS[method], lr, seed, part))
    metric = {"accuracy": value} if task is IMAGES else {"nats_per_character": value, "chance": 3.0}
    trace = {"trace_steps": [0, 19, 20, 50], "angle_spread": [90.0, 80.0, 1.0 + seed, None]}
    return {"spec": spec, **metric, "classes": 10, "seconds": 1.0, **trace}


def test_a_loss_is_better_the_lower_it_is_and_not_finite_is_chance() -> None:
    rows = [
        *(row(TEXT, "adamw", lr, 0, value) for lr, value in ((0.001, 2.0), (0.01, 1.0), (0.1, None))),
        *(row(TEXT, "adamh", lr, 0, value) for lr, value in ((0.001, 1.2), (0.01, 1.9), (0.1, 2.5))),
        *(row(TEXT, "adamw", 0.01, 100 + i, 1.1 + 0.1 * i, "test") for i in range(2)),
        *(row(TEXT, "adamh", 0.001, 100 + i, 1.0 + 0.1 * i, "test") for i in range(2)),
    ]
    (found,) = summarize(rows).values()
    adamw, adamh = found["methods"]["adamw"], found["methods"]["adamh"]
    assert (adamw["best_lr"], adamw["validation"]) == (0.01, 1.0)
    assert (adamh["best_lr"], adamh["validation"], adamh["best_lr_at_edge"]) == (0.001, 1.2, True)
    assert adamw["test"]["mean"] == pytest.approx(1.15)
    bar = 3.0 - 0.9 * 2.0  # 90 % of AdamW's gain over chance: AdamH just reaches it
    assert bar == pytest.approx(1.2)
    log_low = math.log10(0.01) - 0.2 / 1.0  # linear in log lr between 2.0 and 1.0
    assert adamw["usable"]["low"] == pytest.approx(10**log_low)
    assert adamw["usable"]["high"] == pytest.approx(10 ** (-2 + 0.2 / 2.0))  # towards chance, 3.0, at 0.1
    (pair,) = found["pairs"]
    assert (pair["method"], pair["against"]) == ("adamh", "adamw")
    assert pair["better"]["mean"] == pytest.approx(0.1)


def test_angles_count_after_the_first_steps_of_the_runs_with_fresh_seeds() -> None:
    rows = [row(IMAGES, "sgd", 0.1, seed, 0.5, "test" if seed else "val") for seed in (0, 1, 3)]
    (found,) = summarize(rows).values()
    assert found["methods"]["sgd"]["angle_spread"] == {"median": 3.0, "worst": 4.0}


def test_usable_ranges_that_the_grid_ends() -> None:
    assert usable({"cut_low": True, "cut_high": False, "width": 12.3}) == "≥ ×12"
    assert usable({"cut_low": False, "cut_high": False, "width": 3.0}) == "×3"
    assert usable(None) == "–"


@pytest.mark.parametrize("size", ["tiny", "small", "full"])
def test_plans(size: str) -> None:
    plans = control.PLANS[size]("cpu")
    runs = [run for plan in plans for run in comparison.grid(plan)]
    assert len(set(runs)) == len(runs)
    assert all(run.task.weight_decay > 0 for run in runs)
    assert {run.task.data for run in runs} <= {"digits", "python", "cifar10"}


def test_pairs_are_of_methods_that_there_are() -> None:
    assert {name for _, *pair in PAIRS for name in pair} <= set(METHODS)


def test_without_data_a_plan_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("ELROPT_DATA", str(tmp_path))
    control.training._load.cache_clear()
    with pytest.warns(UserWarning, match="without (resnet|plain)-20-w8: cifar10") as caught:
        stages = control.stages("small", "cpu")
    assert len(caught) == 2
    models = {run.task.model for stage in stages[::2] for run in stage([])}
    assert models == {"bn-mlp-30-w64", "olmo-4"}


def test_finals_of_a_plan_are_of_its_own_tasks() -> None:
    plan = comparison.Plan([IMAGES], [METHODS["sgd"]], 1, 2)
    rows = [row(IMAGES, "sgd", 0.1, 0, 0.5), row(TEXT, "sgd", 0.1, 0, 2.0)]
    runs = control.two_stages(plan)[1](rows)
    assert [(run.task, run.seed, run.part) for run in runs] == [(IMAGES, 100, "test"), (IMAGES, 101, "test")]
