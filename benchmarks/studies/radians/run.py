"""Is the best learning rate of rule="angle", in radians, the same for every net, where SGD's is not?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.figures import grid
from benchmarks.common.optimizers import METHODS, Method
from benchmarks.common.sweep import Row
from benchmarks.common.training import Task
from benchmarks.studies import comparison
from benchmarks.studies.comparison import GOOD, Plan, accuracy_matrix, best_lr
from elropt import plots

AXES = ("depth", "width", "normalization", "data", "batch size", "epochs")


def methods(sgd: Sequence[float], angle: Sequence[float]) -> list[Method]:
    """SGD without a rule and with the default one, and a fixed angle, each with its grid."""
    grids = {"sgd": sgd, "warmup": sgd, "angle": angle}
    return [dataclasses.replace(METHODS[name], lrs=tuple(grid)) for name, grid in grids.items()]


def around(base: Task, **axes: Sequence[Any]) -> list[Task]:
    """The base task, then the tasks that differ from it in one field each."""
    varied = [
        dataclasses.replace(base, **(value if isinstance(value, dict) else {field: value}))
        for field, values in axes.items()
        for value in values
    ]
    return list(dict.fromkeys([base, *varied]))


def tiny(device: str) -> Plan:
    """Does it run?"""
    base = dataclasses.replace(comparison.tiny_tasks(device)[0], model="bn-mlp-4-w16")
    return Plan(
        around(base, model=["bn-mlp-6-w16"], batch_size=[64]), methods((0.03, 0.1), (0.003, 0.01)), 2, 0
    )


def small(device: str) -> Plan:
    """BN-MLPs around one of 12 layers on digits."""
    base = Task("bn-mlp-12-w64", epochs=10, split=2, device=device)
    tasks = around(
        base,
        model=[
            *(f"bn-mlp-{depth}-w64" for depth in (6, 24, 48)),
            *(f"bn-mlp-12-w{width}" for width in (16, 256)),
            "ln-mlp-12-w64",
        ],
        data=[{"data": name, "image_size": 8, "limit": 1800} for name in ("cifar10", "cifar100")],
        batch_size=[32, 256],
        epochs=[4, 30],
    )
    sgd = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    return Plan(tasks, methods(sgd, (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128)), 3, 0)


def full(device: str) -> Plan:
    """Plain nets around one of 20 layers on CIFAR-10."""
    base = comparison.full_cifar("plain-20-w16", device, epochs=15)
    tasks = around(
        base,
        model=[
            *(f"plain-{depth}-w16" for depth in (8, 56, 110)),
            *(f"plain-20-w{width}" for width in (8, 64)),
            "resnet-20-w16",
        ],
        data=["cifar100", "tinyimagenet40"],
        batch_size=[32, 512],
        epochs=[5, 60],
    )
    sgd, angle = np.geomspace(1e-3, 10, 9), np.geomspace(2.5e-4, 6.4e-2, 9)
    return Plan(tasks, methods(*([float(f"{lr:.3g}") for lr in grid] for grid in (sgd, angle))), 3, 0)


PLANS = {"tiny": tiny, "small": small, "full": full}


def differs(task: dict[str, Any], base: dict[str, Any]) -> tuple[str, Any]:
    """In which respect a task differs from the base, and its value there."""
    for axis in AXES:
        if aspect(task, axis) != aspect(base, axis):
            return axis, aspect(task, axis)
    return "base", "base"


def aspect(task: dict[str, Any], axis: str) -> Any:
    """The value of a task on an axis."""
    name = re.fullmatch(r"(?P<family>.+?)-(?P<depth>\d+)-w(?P<width>\d+)", task["model"])
    if name is None:
        raise ValueError(f"model {task['model']!r} does not end in its depth and width, as bn-mlp-12-w64")
    return {
        "depth": int(name["depth"]),
        "width": int(name["width"]),
        "normalization": name["family"],
        "data": task["data"],
        "batch size": task["batch_size"],
        "epochs": task["epochs"],
    }[axis]


def summarize(rows: list[Row]) -> dict[str, Any]:
    """Best lr by axis, value and method; how far it moves along an axis; what one lr for all tasks costs."""
    base = rows[0]["spec"]["task"]
    found: dict[str, dict[str, dict[str, Any]]] = {axis: {} for axis in AXES}
    curves: dict[str, list[dict[float, float]]] = {}
    for (_, method), of_one in comparison.by_method(rows).items():
        lrs, accuracies = accuracy_matrix(of_one)
        best = best_lr(lrs, accuracies, 100 / of_one[0]["classes"])._asdict()
        curves.setdefault(method, []).append(
            dict(zip(lrs.tolist(), accuracies.mean(axis=0).tolist(), strict=True))
        )
        axis, value = differs(of_one[0]["spec"]["task"], base)
        for name in AXES if axis == "base" else (axis,):
            at_value = str(aspect(base, name) if axis == "base" else value)
            found[name].setdefault(at_value, {})[method] = best
    return {
        "axes": {
            axis: dict(sorted(values.items(), key=_numerically))
            for axis, values in found.items()
            if len(values) > 1
        },
        "range": {method: ranges(found, method) for method in curves},
        "one_lr_for_all": {method: one_for_all(of_method) for method, of_method in curves.items()},
        "good_for_all": {method: good_for_all(found, method) for method in curves},
    }


def _numerically(item: tuple[str, Any]) -> tuple[float, str]:
    return float(item[0]) if item[0].isdecimal() else 0.0, item[0]


def ranges(found: dict[str, dict[str, dict[str, Any]]], method: str) -> dict[str, float]:
    """Largest over smallest best lr along each axis."""
    result = {}
    for axis, values in found.items():
        best = [of_value[method]["lr"] for of_value in values.values()]
        if len(best) > 1:
            result[axis] = max(best) / min(best)
    return result


def good_for_all(found: dict[str, dict[str, dict[str, Any]]], method: str) -> dict[str, list[float] | None]:
    """Along each axis, and "all": the learning rates that are good at every value; None if there is none."""
    stretches = {
        axis: [(of_value[method]["good_low"], of_value[method]["good_high"]) for of_value in values.values()]
        for axis, values in found.items()
        if len(values) > 1
    }
    stretches["all"] = [stretch for of_axis in stretches.values() for stretch in of_axis]
    common = {axis: [max(low for low, _ in s), min(high for _, high in s)] for axis, s in stretches.items()}
    return {axis: [low, high] if low <= high else None for axis, (low, high) in common.items()}


def one_for_all(curves: Sequence[dict[float, float]]) -> dict[str, float]:
    """The one learning rate that costs least on average over the tasks, against the best of each task, in points."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    losses = np.array([[max(curve.values()) - curve[lr] for lr in shared] for curve in curves])
    chosen = int(losses.mean(axis=0).argmin())
    return {
        "lr": shared[chosen],
        "mean_loss": losses[:, chosen].mean(),
        "worst_loss": losses[:, chosen].max(),
    }


def tables(rows: list[Row], summary: dict[str, Any]) -> Sequence[Table]:
    """Best learning rates along every axis, and one for all."""
    names = list(summary["range"])
    table = table_of(
        "best learning rate (top of a parabola), where it is good, and validation accuracy in %",
        *("axis", "value", *names),
        caption=f"* at the end of the grid; in brackets: where accuracy keeps {GOOD:.0%} of its gain over chance; "
        "“range”: largest / smallest best along the axis, and which learning rates are good at all its values",
        wrap=True,
    )
    for axis, values in summary["axes"].items():
        for value, by_name in values.items():
            table.add_row(axis, value, *(_cell(by_name[name]) for name in names))
        shared = [summary["good_for_all"][name][axis] for name in names]
        cells = [
            f"×{summary['range'][name][axis]:.2g} [{'none' if good is None else f'{good[0]:.2g}–{good[1]:.2g}'}]"
            for name, good in zip(names, shared, strict=True)
        ]
        table.add_row(axis, "range", *cells, end_section=True)
    one = table_of(
        "one learning rate for all these tasks", "method", "lr", "points lost, mean", "points lost, worst"
    )
    for name, cost in summary["one_lr_for_all"].items():
        one.add_row(name, f"{cost['lr']:g}", f"{cost['mean_loss']:.1f}", f"{cost['worst_loss']:.1f}")
    return [table, one]


def _cell(best: dict[str, Any]) -> str:
    star = "*" if best["at_edge"] else ""
    return f"{best['lr']:.2g}{star} [{best['good_low']:.2g}–{best['good_high']:.2g}] {best['accuracy']:.1f}"


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """Accuracy against lr: a line of panels for each method, a panel for each axis, a colour for each value."""
    base = rows[0]["spec"]["task"]
    names, axes_names = list(summary["range"]), list(summary["axes"])
    figure, panels = grid(len(names), len(axes_names), (3.6, 3), (0, 0.5), sharey="col")
    groups = comparison.by_method(rows)
    for line, name in zip(panels, names, strict=True):
        for ax, axis in zip(line, axes_names, strict=True):
            values = list(summary["axes"][axis])
            lines: dict[str, Any] = {}
            for (_, method), of_one in groups.items():
                where, value = differs(of_one[0]["spec"]["task"], base)
                if method == name and where in (axis, "base"):
                    at = str(aspect(base, axis) if where == "base" else value)
                    c = comparison.validation_curve(of_one)
                    lines[at] = (c.lrs, c.mean, c.low, c.high)
            lines = {value: lines[value] for value in values}
            unit = METHODS[name].unit
            plots.accuracy_against_lr(ax, lines, xlabel=f"learning rate ({unit})")
            ax.set(title=f"{name}: {axis}", ylabel="validation accuracy (%)" if axis == axes_names[0] else "")
    return {"radians": figure}


RADIANS = comparison.training_study(
    "radians",
    'Is the best learning rate of rule="angle", in radians, the same for every net, where SGD\'s is not?',
    PLANS,
    summarize,
    tables,
    draw,
)
