"""Does a spread of the ELRs hurt, and do uniform ELRs help?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from scipy import stats

from benchmarks.common.command_line import table_of
from benchmarks.common.figures import grid, legend_beside
from benchmarks.common.optimizers import LRS, METHODS, Method
from benchmarks.common.statistics import interval
from benchmarks.common.sweep import Row
from benchmarks.common.warmups import SPREADS
from benchmarks.studies import comparison
from benchmarks.studies.comparison import Plan, by_task, entries
from elropt import plots

RELEASED = 0.2  # share of the steps after which "uniform-released" is plain SGD

PLAIN = [
    METHODS["sgd"],
    METHODS["uniform"],
    dataclasses.replace(METHODS["uniform"], name="uniform-released", release=RELEASED),
    METHODS["warmup"],
    Method("equalize", "sgd", start="equalize"),
    METHODS["angle"],
    METHODS["sphere"],
]
COMPARED = [method for plain in PLAIN for method in (plain, plain.with_linear())]
AT_SPREAD = dict(sorted({1.0: "equalize", **{spread: f"spread {spread:g}" for spread in SPREADS}}.items()))
IMPOSED = [Method(f"spread {spread:g}", "sgd", start=f"spread {spread:g}") for spread in SPREADS]


def lrs(sgd: tuple[float, ...], angle: tuple[float, ...], sphere: tuple[float, ...]) -> list[Method]:
    """The methods with a grid for each unit."""
    grids = {"SGD's": sgd, "radians": angle, "on the sphere": sphere}
    return [dataclasses.replace(method, lrs=grids[method.unit]) for method in [*COMPARED, *IMPOSED]]


def tiny(device: str) -> Plan:
    """Does it run?"""
    return Plan(
        comparison.tiny_tasks(device), lrs((0.03, 0.1), LRS["radians"][:2], LRS["on the sphere"][:2]), 1, 2
    )


def small(device: str) -> Plan:
    """BN-MLPs on digits, of depths that seconds can train; learning rates over 4 decades."""
    tasks = [comparison.digits_mlp(depth, device) for depth in (10, 20, 30)]
    methods = lrs(
        (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0),
        (0.0001, 0.001, 0.003, 0.01, 0.03, 1.0),
        (0.00001, 0.0001, 0.001, 0.01, 0.1),
    )
    return Plan(tasks, methods, 2, 3)


def full(device: str) -> Plan:
    """Plain and residual nets of three depths on CIFAR-10."""
    nets = ("plain-20", "plain-56", "plain-110", "resnet-20", "resnet-56", "resnet-110")
    tasks = [comparison.full_cifar(net, device) for net in nets]
    methods = lrs(
        (0.001, 0.01, 0.1, 0.3, 1.0, 10.0),
        (0.0001, 0.001, 0.003, 0.01, 0.1, 1.0),
        (0.00001, 0.0001, 0.001, 0.01, 0.1),
    )
    return Plan(tasks, methods, 1, 3)


PLANS = {"tiny": tiny, "small": small, "full": full}


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Accuracies by task and method; accuracy against the applied spread."""
    summary: dict[str, Any] = {"tasks": comparison.conclusions(rows)}
    summary["rank_correlation"] = {
        task: correlation([entry.test_rows for entry in of_task if entry.test_rows])
        for task, of_task in by_task(entries(rows)).items()
    }
    return summary


def applied_spread(row: Row) -> float:
    """exp of the mean over the recorded steps of ln(max / min applied ELR): the spread under which a run trained."""
    values = [value for value in row["applied_spread"] if value is not None]
    return float(np.exp(np.log(values).mean())) if values else np.nan


def correlation(methods: Sequence[Sequence[Row]]) -> dict[str, float] | None:
    """Spearman's rank correlation of accuracy with the applied spread over methods, each at its best lr, means of its
    runs. None below 3 methods."""
    points = np.array(
        [np.mean([(np.log(applied_spread(r)), r["accuracy"]) for r in rows], axis=0) for rows in methods]
    )
    points = points[np.isfinite(points).all(axis=1)] if len(points) else points
    if len(points) < 3:
        return None
    rho, p = np.asarray(stats.spearmanr(points[:, 0], points[:, 1]))
    return {"rho": float(rho), "p": float(p), "methods": len(points)}


def tables(rows: list[Row], summary: dict[str, Any]) -> Sequence[Table]:
    """Accuracies of each task, then the imposed spreads."""
    groups = by_task(entries(rows))
    accuracies = [comparison.accuracy_table(task, of_task) for task, of_task in groups.items()]
    table = table_of(
        "the same function, another spread of E at step 0: plain SGD at its best lr",
        *("task", *(f"{spread:g}" for spread in AT_SPREAD), "ρ"),
        caption="test accuracy in %, mean [95 % interval]; below 1 the last layers are the fast ones; "
        "ρ: rank correlation of accuracy with the applied spread over all methods",
        wrap=True,
    )
    for task, of_task in groups.items():
        found = {entry.method: f"{entry.result:.1f}" for entry in of_task}
        rho = summary["rank_correlation"][task]
        table.add_row(
            task,
            *(found.get(name, "–") for name in AT_SPREAD.values()),
            "–" if rho is None else f"{rho['rho']:+.2f}",
        )
    return [*accuracies, table]


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """Robustness curves by unit of lr, and accuracy against spread; a row for each task."""
    groups = by_task(entries(rows))
    units = ("SGD's", "radians", "on the sphere")
    robustness, panels = grid(len(groups), len(units), (17 / len(units), 3.6), sharey="row")
    for axes, (task, of_task) in zip(panels, groups.items(), strict=True):
        shown = [entry for entry in of_task if not entry.method.startswith("spread")]
        for ax, unit in zip(axes, units, strict=True):
            comparison.draw_curves(ax, shown, title=task, unit=unit)
    for ax in panels[:, 0]:
        ax.get_legend().remove()
    legend_beside(robustness, panels[0, 0])
    scatter, axes = grid(1, len(groups), (5, 4))
    for ax, (task, of_task) in zip(axes[0], groups.items(), strict=True):
        for index, entry in enumerate(entry for entry in of_task if entry.test_rows):
            x = np.exp(np.log([applied_spread(row) for row in entry.test_rows]).mean())
            y = interval([100 * row["accuracy"] for row in entry.test_rows])
            color = plots.COLORS[index % len(plots.COLORS)]
            error = np.abs(np.array([[y.low], [y.high]]) - y.mean)
            ax.errorbar(
                x, y.mean, error, marker=plots.MARKERS[index // 7 % 7], color=color, label=entry.method
            )
        ax.set(
            xscale="log", title=task, xlabel="applied ELR spread, mean over steps", ylabel="test accuracy (%)"
        )
    legend_beside(scatter, axes[0, 0], fontsize="small")
    return {"spread-robustness": robustness, "spread-accuracy": scatter}


SPREAD = comparison.training_study(
    "spread",
    "Does a spread of the ELRs hurt, and do uniform ELRs help?",
    PLANS,
    summarize,
    tables,
    draw,
)
