"""ELRSGD swapped in for SGD, LARS and SGDP at a standard recipe: final accuracy, and time to accuracy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.figures import grid, legend_beside
from benchmarks.common.optimizers import METHODS, PEERS, Method
from benchmarks.common.sweep import Row
from benchmarks.studies import comparison
from benchmarks.studies.comparison import Entry, Plan, best_sgd, by_task, entries
from elropt import plots
from elropt.rules import RULES

NAMES = (*PEERS, "lars", "sgdp", *filter(None, RULES), "warmup+linear")
REACHED = 0.95  # share of the best-tuned SGD's final validation accuracy that "time to accuracy" waits for


def methods(count: int | None = None) -> list[Method]:
    """What is compared, with the first `count` learning rates of every grid."""
    return [dataclasses.replace(METHODS[name], lrs=METHODS[name].lrs[:count]) for name in NAMES]


def tiny(device: str) -> Plan:
    """Does it run?"""
    tasks = [dataclasses.replace(task, curve=2, weight_decay=5e-4) for task in comparison.tiny_tasks(device)]
    return Plan(tasks, methods(2), 1, 2)


def small(device: str) -> Plan:
    """A residual and a plain net on small images, with the recipe's decay, crops and mirrored images."""
    recipe = {"weight_decay": 5e-4, "augment": True, "curve": 5}
    tasks = [comparison.small_cifar(net, device, **recipe) for net in ("resnet-20-w8", "plain-20-w8")]
    return Plan(tasks, methods(), 1, 3)


def full(device: str) -> Plan:
    """The nets and data of the literature."""
    nets = ("resnet-20", "resnet-56", "plain-20", "plain-56", "vgg-16-bn", "resnet-18")
    tasks = [
        comparison.full_cifar(net, device, data=name, curve=15)
        for net in nets
        for name in ("cifar10", "cifar100")
    ]
    return Plan(tasks, methods(), 1, 3)


PLANS = {"tiny": tiny, "small": small, "full": full}


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Accuracies and time to accuracy, by task and method."""
    summary = comparison.conclusions(rows)
    for task, of_task in by_task(entries(rows)).items():
        for entry in of_task:
            summary[task][entry.method] |= time_to_accuracy(entry, best_sgd(of_task))
    return summary


def time_to_accuracy(entry: Entry, sgd: Entry | None) -> dict[str, Any]:
    """Epochs and seconds until the mean validation accuracy of the fresh seeds first reaches `REACHED` of what the
    best-tuned SGD has at the end; None if it does not."""
    mean = validation_over_epochs(entry)
    of_sgd = [] if sgd is None else validation_over_epochs(sgd)
    if not mean or not of_sgd:
        return {"epochs_to_accuracy": None, "seconds_to_accuracy": None}
    bar = REACHED * of_sgd[-1][2]
    epoch, seconds, _ = next((point for point in mean if point[2] >= bar), (None, None, None))
    return {"epochs_to_accuracy": epoch, "seconds_to_accuracy": seconds, "bar": bar}


def validation_over_epochs(entry: Entry) -> list[tuple[int, float, float]]:
    """(epoch, seconds, validation accuracy), means over the fresh seeds, at the epochs that all have reached."""
    curves = [row["curve"] for row in entry.test_rows]
    if not curves:
        return []
    points = [np.mean(at, axis=0) for at in zip(*curves, strict=False)]
    return [(int(epoch), float(seconds), float(accuracy)) for epoch, seconds, accuracy in points]


def tables(rows: list[Row], summary: dict[str, Any]) -> Sequence[Table]:
    """Accuracy, and time to accuracy, on every task."""
    result = []
    for task, of_task in by_task(entries(rows)).items():
        table = table_of(
            f"{task}: time to accuracy",
            *("method", "epochs", "seconds", "seconds in all"),
            caption=f"until the mean validation accuracy reaches {REACHED:.0%} of the best-tuned SGD's at the end; "
            "seconds compare only within one run of the study",
        )
        for method, found in summary[task].items():
            reached = (found["epochs_to_accuracy"], found["seconds_to_accuracy"], found["seconds"])
            table.add_row(method, *("–" if value is None else f"{value:.3g}" for value in reached))
        result += [comparison.accuracy_table(task, of_task), table]
    return result


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """Validation accuracy over epochs at the best lr, a panel for each task."""
    groups = by_task(entries(rows))
    figure, axes = grid(1, len(groups), (5, 4), (1.5, 0))
    for ax, (task, of_task) in zip(axes[0], groups.items(), strict=True):
        for index, entry in enumerate(of_task):
            points = validation_over_epochs(entry)
            style: dict[str, Any] = {"color": plots.COLORS[index % 7], "marker": plots.MARKERS[index % 7]}
            line = "-" if index < 7 else "--"
            ax.plot([p[0] for p in points], [100 * p[2] for p in points], line, label=entry.method, **style)
        ax.set(title=task, xlabel="epoch", ylabel="validation accuracy (%)")
    legend_beside(figure, axes[0, 0])
    return {"swap-in": figure}


SWAP_IN = comparison.training_study(
    "swap-in",
    "ELRSGD swapped in for SGD, LARS and SGDP at a standard recipe: how accurate, how fast?",
    PLANS,
    summarize,
    tables,
    draw,
)
