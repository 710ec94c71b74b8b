"""Which warm-up closes the ELR spread fastest, and which trains best?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.figures import grid, legend_beside
from benchmarks.common.optimizers import METHODS, Method
from benchmarks.common.statistics import interval
from benchmarks.common.sweep import Row
from benchmarks.studies import comparison
from benchmarks.studies.comparison import Entry, Plan, by_task, entries, mean_over_runs
from elropt import plots

CLOSED = 2.0  # the spread below which a gap counts as closed
HORIZON = 100  # steps over which the logarithm of the spread is averaged


def linear(share: float) -> Method:
    """SGD with a linear warm-up over a share of the steps."""
    return dataclasses.replace(METHODS["sgd"].with_linear(share), name=f"sgd+linear {share:.0%}")


METHODS_COMPARED = [
    METHODS["sgd"],
    linear(0.1),
    linear(0.3),
    *(Method(name, "sgd", start=name) for name in ("monotone", "balance", "equalize", "fading-100")),
    METHODS["warmup"],
    METHODS["warmup+linear"],
]


def tiny(device: str) -> Plan:
    """Does it run?"""
    return Plan(comparison.tiny_tasks(device), comparison.with_lrs(METHODS_COMPARED, (0.03, 0.1)), 2, 2)


def small(device: str) -> Plan:
    """A deep MLP and a deep plain conv net on digits, and a residual net on small images of CIFAR-10."""
    tasks = [
        comparison.digits_mlp(30, device),
        comparison.digits_plain(56, device),
        comparison.small_cifar("resnet-20-w8", device),
    ]
    return Plan(tasks, comparison.with_lrs(METHODS_COMPARED, (0.01, 0.03, 0.1, 0.3)), 2, 3)


def full(device: str) -> Plan:
    """Plain and residual nets at the standard recipe."""
    tasks = [
        comparison.full_cifar(model, device) for model in ("plain-20", "plain-56", "resnet-20", "resnet-56")
    ]
    return Plan(tasks, comparison.with_lrs(METHODS_COMPARED, (0.01, 0.03, 0.1, 0.3, 1.0)), 2, 5)


PLANS = {"tiny": tiny, "small": small, "full": full}


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Accuracies, and how fast the spread closes, by task and method."""
    summary = comparison.conclusions(rows)
    for entry in entries(rows):
        summary[entry.task][entry.method] |= closing(entry)
    return summary


def closing(entry: Entry) -> dict[str, Any]:
    """How fast the spread of E = ‖g‖/‖w‖ closes in the runs with fresh seeds, at the best learning rate, and at every
    learning rate in the runs that choose it.

    log_spread: mean of ln(max E/min E) over the first `HORIZON` steps; log_spread_by_lr: its mean over seeds.
    steps_to_closed: first recorded step from which on, to the `HORIZON`, the spread stays below `CLOSED`; None if it
    does not. applied_log_spread: of the elr that is applied, which a rule can equalize at once.
    """
    runs = entry.test_rows
    return {
        "log_spread": interval([mean_log(row, "spread") for row in runs])._asdict(),
        "applied_log_spread": interval([mean_log(row, "applied_spread") for row in runs])._asdict(),
        "log_spread_by_lr": {
            f"{lr:g}": float(
                np.mean([mean_log(row, "spread") for row in entry.val_rows if row["spec"]["lr"] == lr])
            )
            for lr in entry.curve.lrs
        },
        "steps_to_closed": [first_closed(row) for row in runs],
        "spread_at_start": mean_over_runs(runs, "spread").get(0),
    }


def mean_log(row: Row, column: str) -> float:
    """Mean of the logarithm of a column over the first `HORIZON` steps, by the trapezoidal rule over the steps."""
    steps, values = horizon(row, column)
    if len(steps) < 2 or not np.isfinite(values).all():
        return np.nan
    return float(np.trapezoid(np.log(values), steps) / (steps[-1] - steps[0]))


def first_closed(row: Row) -> int | None:
    """The first recorded step from which on the spread stays below `CLOSED` up to the `HORIZON`."""
    steps, values = horizon(row, "spread")
    below = values < CLOSED
    if not len(below) or not below[-1]:
        return None
    above = np.flatnonzero(~below)
    return int(steps[above[-1] + 1 if above.size else 0])


def horizon(row: Row, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values up to the `HORIZON`."""
    steps = np.array(row["trace_steps"][: len(row[column])])
    values = np.array([np.nan if value is None else value for value in row[column]], dtype=float)
    return steps[steps <= HORIZON], values[steps <= HORIZON]


def tables(rows: list[Row], summary: dict[str, Any]) -> Sequence[Table]:
    """Accuracy, and closing, on every task."""
    result = []
    for task, of_task in by_task(entries(rows)).items():
        result += [comparison.accuracy_table(task, of_task), closing_table(task, summary[task])]
    return result


def closing_table(task: str, summary: dict[str, Any]) -> Table:
    """How fast the spread closes on one task."""
    table = table_of(
        f"{task}: the spread of E",
        *("method", "ln spread of E", "applied", "at every lr", "steps to closed"),
        caption=f"mean ln(max/min) over the first {HORIZON} steps, of E and of what is applied, at the best learning "
        f"rate, and of E at every learning rate of the grid; steps until max/min of E stays below {CLOSED:g}, by seed "
        f"(– : not within {HORIZON})",
    )
    for method, of_method in summary.items():
        steps = ["–" if step is None else str(step) for step in of_method["steps_to_closed"]]
        means = (of_method[key]["mean"] for key in ("log_spread", "applied_log_spread"))
        by_lr = " / ".join(f"{mean:.1f}" for mean in of_method["log_spread_by_lr"].values())
        table.add_row(method, *(f"{mean:.2f}" for mean in means), by_lr, " / ".join(steps))
    return table


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """Accuracy against lr, and spread over steps, a column for each task."""
    groups = by_task(entries(rows))
    figure, axes = grid(2, len(groups), (4.5, 3.75), (1.5, 0))
    for (task, of_task), (top, bottom) in zip(groups.items(), axes.T, strict=True):
        comparison.draw_curves(top, of_task, title=task)
        spreads = {e.method: mean_over_runs(e.test_rows, "spread") for e in of_task}
        lines = {name: (list(s), list(s.values())) for name, s in spreads.items() if s}
        plots.spread_over_steps(bottom, lines)
        bottom.set(xscale="symlog", ylabel="spread of E (max / min)")
        for ax in (top, bottom):
            ax.get_legend().remove()
    legend_beside(figure, axes[0, 0], "outside right center")
    return {"warmup": figure}


WARMUP = comparison.training_study(
    "warmup",
    "Which warm-up closes the ELR spread fastest, and which trains best?",
    PLANS,
    summarize,
    tables,
    draw,
    kept=comparison.without_layers,
)
