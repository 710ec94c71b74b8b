"""Methods compared over learning rates: what the studies that train have in common.

The first stage trains every method at every learning rate of its grid and is judged on the validation images. The
second trains each method at its best learning rate with fresh seeds and reads the test images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import RenderableType
from rich.table import Table
from scipy import stats

from benchmarks.common.command_line import table_of
from benchmarks.common.dataset import Metric, metric_of
from benchmarks.common.optimizers import Method, check_installed
from benchmarks.common.statistics import (
    Curve,
    Interval,
    UsableRange,
    curve,
    grouped,
    interval,
    paired,
    usable_range,
)
from benchmarks.common.sweep import Row
from benchmarks.common.training import TRACE_COLUMNS, Run, Task, load, run_of, train
from benchmarks.studies.study import Stage, Study
from elropt import plots

FRESH_SEEDS = 100  # the seeds of the second stage start here
GOOD = 0.95  # share of the best gain over chance at which a learning rate counts as good
USABLE = 0.9  # share of the gain over chance (of the best-tuned SGD, or of the best method) that is enough


class Entry(NamedTuple):
    """A method on a task. Scores are the metric's: accuracies in percent, or losses with a minus."""

    task: str
    metric: Metric
    chance: float  # score of guessing
    method: str
    unit: str
    is_sgd: bool  # with or without a linear warm-up: a baseline
    curve: Curve  # of validation scores
    best_lr: float
    usable: UsableRange | None
    test: dict[int, float]  # scores by fresh seed, at the best learning rate
    val_rows: list[Row]
    test_rows: list[Row]

    @property
    def result(self) -> Interval:
        """The metric on the test part at the best learning rate."""
        return interval([self.metric.value(score) for score in self.test.values()])

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the first or the last of its grid."""
        return self.curve.best in (0, len(self.curve.lrs) - 1)


class Plan(NamedTuple):
    """What is compared on what, with how many seeds in the first and in the second stage."""

    tasks: Sequence[Task]
    methods: Sequence[Method]
    seeds: int
    fresh_seeds: int


def two_stages(plan: Plan) -> Sequence[Stage]:
    """Choose on the validation images, then read the test images.

    Raises ValueError or FileNotFoundError for packages or data that are missing, and ValueError for a method that
    needs weight decay on a task without.
    """
    check_installed(plan.methods)
    if any(task.weight_decay == 0 for task in plan.tasks):
        needs = [method.name for method in plan.methods if method.entry.needs_decay]
        if needs:
            raise ValueError(f"{', '.join(needs)}: give a weight decay, 5e-4 for example, or leave them out")
    for task in plan.tasks:
        load(task)  # data that are missing raise here, not in the middle of the study
    return lambda rows: grid(plan), lambda rows: finals(rows, plan.fresh_seeds)


def without_val_traces(row: Row) -> Row:
    """A row without its trace if it was for choosing only: nothing is concluded from that trace."""
    return row if row["spec"]["part"] == "test" else {k: v for k, v in row.items() if k not in TRACE_COLUMNS}


def without_layers(row: Row) -> Row:
    """A row without E, ELR and angle of every layer."""
    return {key: value for key, value in row.items() if key not in ("E", "elr", "angle")}


def without_val_traces_and_layers(row: Row) -> Row:
    """What most studies keep of a row."""
    return without_layers(without_val_traces(row))


def training_study(
    name: str,
    question: str,
    plans: dict[str, Callable[[str], Plan]],
    summarize: Callable[[list[Row]], dict[str, Any]],
    tables: Callable[[list[Row], dict[str, Any]], Sequence[RenderableType]],
    draw: Callable[[list[Row], dict[str, Any]], Mapping[str, Figure]],
    kept: Callable[[Row], Row] = without_val_traces_and_layers,
) -> Study:
    """A study that trains, in two stages. plans: by size, functions of the device."""

    def stages(size: str, device: str) -> Sequence[Stage]:
        return two_stages(plans[size](device))

    return Study(name, question, train, stages, summarize, tables, draw, describe, kept)


def with_lrs(methods: Sequence[Method], lrs: tuple[float, ...]) -> list[Method]:
    """The same methods with another grid."""
    return [dataclasses.replace(method, lrs=lrs) for method in methods]


def grid(plan: Plan) -> list[Run]:
    """First stage: every method at every learning rate of its grid on every task."""
    return [
        Run(task, method, lr, seed)
        for seed in range(plan.seeds)
        for task in plan.tasks
        for method in plan.methods
        for lr in method.lrs
    ]


def finals(rows: Sequence[Row], seeds: int) -> list[Run]:
    """Second stage: every method of the first at its best learning rate, read on the test images.

    The first seed's row has E of every layer.
    """
    runs = []
    for of_one in by_method(row for row in rows if row["spec"]["part"] == "val").values():
        best = validation_curve(of_one).best_lr
        first = run_of(of_one[0]["spec"])
        runs += [
            Run(first.task, first.method, best, FRESH_SEEDS + index, "test", layers=index == 0)
            for index in range(seeds)
        ]
    return runs


def by_method(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (task, method), in the order of the first rows."""
    return grouped(rows, lambda row: (label(row["spec"]["task"]), row["spec"]["method"]["name"]))


def label(task: dict[str, Any]) -> str:
    """A task in a few words, such as "plain-38-w8, cifar10 8×8, batch 64, 5 epochs"."""
    size = "" if task["image_size"] is None else " {0}×{0}".format(task["image_size"])
    return f"{task['model']}, {task['data']}{size}, batch {task['batch_size']}, {task['epochs']} epochs"


def times(ratio: float) -> str:
    """A ratio with two digits, as "×250"."""
    return f"×{float(f'{ratio:.2g}'):g}"


def validation_curve(rows: Iterable[Row]) -> Curve:
    """Validation score against the learning rate."""
    return curve(
        [(row["spec"]["lr"], metric_of(row).score(row)) for row in rows if row["spec"]["part"] == "val"]
    )


def accuracy_matrix(rows: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Learning rates [N], ascending, and validation scores [seeds, N]."""
    at = {(row["spec"]["seed"], row["spec"]["lr"]): metric_of(row).score(row) for row in rows}
    seeds, lrs = (sorted({key[i] for key in at}) for i in (0, 1))
    return np.array(lrs), np.array([[at[seed, lr] for lr in lrs] for seed in seeds])


class Best(NamedTuple):
    """A method's best learning rate on a task: the top of a parabola, and its percentile bootstrap interval.

    good_low, good_high: the stretch around it on which accuracy keeps `GOOD` of its gain over chance; where the
    top is flat this says more than the top.
    """

    lr: float
    low: float
    high: float
    good_low: float
    good_high: float
    accuracy: float  # mean validation accuracy at the best point of the grid, in percent
    at_edge: bool  # the best point is the first or the last of the grid


def best_lr(lrs: NDArray[np.float64], accuracies: NDArray[np.float64], chance: float) -> Best:
    """From accuracies [seeds, N] in percent at lrs [N], ascending; chance: that of guessing."""
    mean = accuracies.mean(axis=0)
    low = high = np.nan
    if len(accuracies) > 1:
        result = stats.bootstrap(
            (np.arange(len(accuracies)),),
            lambda chosen: np.log(top(lrs, accuracies[chosen].mean(axis=0))),
            vectorized=False,
            n_resamples=999,
            method="percentile",
            rng=0,
        )
        low, high = np.exp(result.confidence_interval)
    best = int(mean.argmax())
    good = usable_range(Curve(lrs, mean, mean, mean), chance + GOOD * (mean[best] - chance))
    good_low, good_high = (np.nan, np.nan) if good is None else (good.low, good.high)
    at_edge = best in (0, len(lrs) - 1)
    return Best(top(lrs, mean), float(low), float(high), good_low, good_high, float(mean[best]), at_edge)


def top(lrs: NDArray[np.float64], accuracy: NDArray[np.float64]) -> float:
    """The maximum of the parabola in log lr through the best point and its neighbours; at an end, that point."""
    best = int(accuracy.argmax())
    if best in (0, len(lrs) - 1):
        return float(lrs[best])
    x, y = np.log(lrs[best - 1 : best + 2]), accuracy[best - 1 : best + 2]
    a, b, _ = np.polyfit(x - x[1], y, 2)
    return float(lrs[best] if a >= 0 else np.exp(x[1] - b / (2 * a)))


def entries(rows: Sequence[Row]) -> list[Entry]:
    """Every method on every task."""
    groups = by_method(rows)
    curves = {key: validation_curve(of_one) for key, of_one in groups.items()}
    result = []
    for (task, method), of_one in groups.items():
        mine = curves[task, method]
        baselines = [c for key, c in curves.items() if key[0] == task and _is_sgd(groups[key])]
        sgd = max((c.mean.max() for c in baselines), default=np.nan)
        metric = metric_of(of_one[0])
        chance = metric.chance(of_one[0])
        val, test = ([row for row in of_one if row["spec"]["part"] == part] for part in ("val", "test"))
        result.append(
            Entry(
                task,
                metric,
                chance,
                method,
                of_one[0]["spec"]["method"]["unit"],
                _is_sgd(of_one),
                mine,
                mine.best_lr,
                usable_range(mine, chance + USABLE * (sgd - chance)),
                {row["spec"]["seed"]: metric.score(row) for row in test},
                val,
                test,
            )
        )
    return result


def _is_sgd(rows: Sequence[Row]) -> bool:
    method = rows[0]["spec"]["method"]
    return method["optimizer"] == "sgd" and method["start"] is None


def best_sgd(of_task: Sequence[Entry]) -> Entry | None:
    """The best-tuned SGD: with or without linear warm-up, by validation."""
    candidates = [entry for entry in of_task if entry.is_sgd]
    return max(candidates, key=lambda entry: entry.curve.mean.max(), default=None)


def against_sgd(entry: Entry, of_task: Sequence[Entry]) -> Interval | None:
    """Test score minus that of the best-tuned SGD, paired by seed."""
    sgd = best_sgd(of_task)
    return None if sgd is None or not entry.test else paired(entry.test, sgd.test)


def by_task(every: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by task."""
    return grouped(every, lambda entry: entry.task)


def conclusions(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """task → method → what came out, as plain values."""
    return {
        task: {entry.method: _conclusion(entry, of_task) for entry in of_task}
        for task, of_task in by_task(entries(rows)).items()
    }


def _conclusion(entry: Entry, of_task: Sequence[Entry]) -> dict[str, Any]:
    difference = against_sgd(entry, of_task)
    sgd = best_sgd(of_task)
    return {
        "best_lr": entry.best_lr,
        "best_lr_at_edge": entry.at_edge,
        f"val_{entry.metric.column}": entry.metric.value(float(entry.curve.mean.max())),
        f"test_{entry.metric.column}": entry.result._asdict() if entry.test else None,
        "against_best_sgd": None if difference is None or entry is sgd else difference._asdict(),
        "usable_lrs": None
        if entry.usable is None
        else {**entry.usable._asdict(), "width": entry.usable.width},
        "seconds": float(np.mean([row["seconds"] for row in entry.test_rows or entry.val_rows])),
    }


def accuracy_table(task: str, of_task: Sequence[Entry]) -> Table:
    """The comparison on one task."""
    metric = of_task[0].metric
    spec = f".{metric.digits}f"
    table = table_of(
        task,
        *("method", "best lr", "validation", "test", "Δ", "usable"),
        caption=f"{metric.title}; lr chosen by validation; test part with fresh seeds, mean [95 % bootstrap interval]; "
        "Δ: how much better than the best-tuned SGD, paired by seed; usable: largest / smallest lr that reaches 90 % "
        "of SGD's gain over chance; * the best lr is at the end of its grid",
    )
    sgd = best_sgd(of_task)
    for entry in of_task:
        difference = against_sgd(entry, of_task)
        table.add_row(
            entry.method,
            f"{entry.best_lr:g}{'*' if entry.at_edge else ''}",
            f"{metric.value(float(entry.curve.mean.max())):{spec}}",
            f"{entry.result:{spec}}" if entry.test else "–",
            "–" if difference is None or entry is sgd else f"{difference:+{spec}}",
            "–" if entry.usable is None else str(entry.usable),
        )
    return table


def draw_curves(ax: Axes, of_task: Sequence[Entry], *, title: str, unit: str = "SGD's") -> None:
    """The metric on the validation part against the learning rate, for the methods with learning rates of one unit."""
    value = of_task[0].metric.value
    lines = {
        e.method: (e.curve.lrs, value(e.curve.mean), value(e.curve.low), value(e.curve.high))
        for e in of_task
        if e.unit == unit
    }
    plots.accuracy_against_lr(ax, lines, xlabel=f"learning rate ({unit})")
    ax.set(title=title, ylabel=f"validation {of_task[0].metric.title}")


def mean_over_runs(rows: Sequence[Row], column: str) -> dict[int, float]:
    """step → geometric mean over runs of a column of `training.Trace`, at the steps that all recorded."""
    steps = sorted(set.intersection(*(set(row["trace_steps"]) for row in rows))) if rows else []
    result = {}
    for step in steps:
        values = [row[column][row["trace_steps"].index(step)] for row in rows if row[column]]
        values = np.array([np.nan if value is None else value for value in values])
        if values.size and (values > 0).all():
            result[step] = float(np.exp(np.log(values).mean()))
    return result


def tiny_tasks(device: str) -> list[Task]:
    """To see whether a study runs."""
    return [Task("bn-mlp-4-w16", epochs=2, device=device)]


def digits_mlp(depth: int, device: str, **changes: Any) -> Task:
    """A BN-MLP on digits: seconds on a CPU."""
    return Task(**{"model": f"bn-mlp-{depth}-w64", "epochs": 20, "split": 1, "device": device, **changes})


def digits_plain(depth: int, device: str, **changes: Any) -> Task:
    """A thin plain conv net on digits."""
    options = {"epochs": 15, "split": 1, "channels_last": True, "device": device}
    return Task(**{"model": f"plain-{depth}-w8", **options, **changes})


def small_cifar(model: str, device: str, **changes: Any) -> Task:
    """A thin conv net on 8×8 images of CIFAR-10, 250 steps: a comparison of starts, not of final accuracies."""
    options = {"data": "cifar10", "image_size": 8, "limit": 4000, "split": 1, "epochs": 5, "batch_size": 64}
    return Task(**{"model": model, **options, "channels_last": True, "device": device, **changes})


def full_cifar(model: str, device: str, **changes: Any) -> Task:
    """The standard recipe (crop, flip, cosine, weight decay 5e-4), fast: bfloat16, channels last, compiled."""
    options = {"data": "cifar10", "epochs": 30, "weight_decay": 5e-4, "augment": True}
    fast = {"amp": True, "channels_last": True, "compile": True, "device": device}
    return Task(**{"model": model, **options, **fast, **changes})


def describe(run: Run) -> str:
    """A run in a few words, for the progress bar."""
    return f"{run.task.model} {run.method.name} lr={run.lr:g}"
