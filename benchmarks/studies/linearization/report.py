"""Tables and plots of the linearization study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.figures import finish, grid, legend_below
from benchmarks.common.statistics import Interval, grouped
from benchmarks.common.sweep import Row
from benchmarks.studies import comparison
from benchmarks.studies.linearization.summarize import SHARES, WHEN, Point, runs
from elropt import plots

# A colour for each method; nets linearized during training with a full line, after it with a broken one.
STYLES = {
    "sgd, during": (plots.COLORS[0], "o-"),
    "sgd, after": (plots.COLORS[0], "s--"),
    "warmup, during": (plots.COLORS[1], "o-"),
    "warmup, after": (plots.COLORS[1], "s--"),
    "sgd, shallow from the start": ("0.5", "^:"),
}


def tables(rows: list[Row], summary: dict[str, Any]) -> Sequence[Table]:
    """Accuracy and path length by weight; accuracy at equal path length; shallow nets; for each task."""
    return [
        table
        for task, found in summary.items()
        for table in (_by_weight(task, found), _at_share(task, found), _shallow(task, found))
    ]


def _by_weight(task: str, found: dict[str, Any]) -> Table:
    lrs = ", ".join(
        f"{method} {chosen['lr']:g}{'*' if chosen['at_edge'] else ''}"
        for method, chosen in found["learning_rates"].items()
    )
    table = table_of(
        task,
        "weight of the penalty",
        *(f"{method}, {when}" for method in found["points"] for when in WHEN),
        wrap=True,
        caption=f"average path length (of {found['full_path_length']:g}; normalized of "
        f"{found['full_normalized_path_length']:g} in brackets), test accuracy in %, standard deviation of ln E; "
        f"means over seeds; lr by validation: {lrs} (* the end of the grid)",
    )
    for weight in next(iter(found["points"].values()))["during"]:
        cells = []
        for of_method in found["points"].values():
            for when in WHEN:
                point = {column: value["mean"] for column, value in of_method[when][weight].items()}
                cells.append(
                    f"{point['path_length']:.2f} ({point['normalized_path_length']:.2f})  "
                    f"{point['accuracy']:.1f}  {point['log_std']:.2f}"
                )
        table.add_row(weight, *cells)
    return table


def _at_share(task: str, found: dict[str, Any]) -> Table:
    table = table_of(
        f"{task}: test accuracy in % at equal path length",
        "share of the full path length",
        *map(str, SHARES),
        wrap=True,
        caption="mean [95 % bootstrap interval] over seeds, differences paired by seed; linear between the weights",
    )
    methods = found["points"]
    values = {f"{method}, {when}": found["at_share"][method][when] for method in methods for when in WHEN}
    values["sgd, shallow from the start"] = found["at_share"]["sgd"]["shallow"]
    values |= {f"{method}: after − during": found["after_minus_during"][method] for method in methods}
    values |= {f"{when}: warmup − sgd": found["warmup_minus_sgd"][when] for when in WHEN}
    values |= {f"sgd: {when} − shallow": found["sgd_minus_shallow"][when] for when in WHEN}
    for name, by_share in values.items():
        table.add_row(name, *(_interval(value) for value in by_share.values()))
    return table


def _shallow(task: str, found: dict[str, Any]) -> Table:
    table = table_of(
        f"{task}: ReLUs in some layers from the start, the others linear",
        *("ReLU layers", "path length", "normalized", "test %"),
        *("std of ln E, at the start", "std of ln E, at the end"),
        wrap=True,
        caption="means over seeds, accuracy with its 95 % interval",
    )
    for layers, point in found["shallow"].items():
        table.add_row(
            layers,
            f"{point['path_length']['mean']:.2f}",
            f"{point['normalized_path_length']['mean']:.2f}",
            _interval(point["accuracy"]),
            f"{point['log_std_at_start']['mean']:.2f}",
            f"{point['log_std']['mean']:.2f}",
        )
    return table


def _interval(value: dict[str, Any]) -> str:
    return f"{Interval(**value):.1f}" if value["n"] else "–"


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """Accuracy and spread of E against path length; which layers stay nonlinear."""
    groups = grouped(rows, lambda row: comparison.label(row["spec"]["task"]))
    options: dict[str, Any] = {"sharex": "col", "sharey": "row", "height_ratios": (3, 2)}
    figure, panels = grid(2, len(groups), (3.6, 2.45), **options)
    for (above, below), (task, of_task) in zip(panels.T, groups.items(), strict=True):
        linearized, shallow = runs(of_task)
        by_run = grouped(linearized, _name)
        by_run |= {"sgd, shallow from the start": shallow}
        for name in STYLES:
            for ax, column in ((above, "accuracy"), (below, "log_std")):
                _against_path_length(ax, by_run[name], column, name)
        above.set(title=_wrapped(task))
        below.set(xlabel="average path length (nonlinear units)")
        for ax in (above, below):
            finish(ax)
    panels[0, 0].set_ylabel("test accuracy (%)")
    panels[1, 0].set_ylabel("std of ln E")
    legend_below(figure, panels[0, 0].get_legend_handles_labels()[0], columns=3)
    return {"linearization": figure, "linearization-layers": layers_figure(groups)}


def _against_path_length(ax: Axes, points: list[Point], column: str, name: str) -> None:
    """A marker for each weight (or number of layers) at the means over seeds, bars from the lowest to the highest."""
    by_setting = grouped(points, lambda point: point.get("weight", point.get("layers")))
    at = np.array(
        [[[p["path_length"], p[column]] for p in seeds] for seeds in by_setting.values()]
    )  # [W, n, 2]
    at = at[np.argsort(at[:, :, 0].mean(axis=1))]
    mean = at.mean(axis=1)
    bars = np.stack([mean - at.min(axis=1), at.max(axis=1) - mean])  # [2, W, 2]
    color, line = STYLES[name]
    ax.errorbar(
        *mean.T,
        xerr=bars[:, :, 0],
        yerr=bars[:, :, 1],
        label=name,
        color=color,
        fmt=line,
        markersize=4,
        linewidth=1.2,
        elinewidth=0.7,
    )


def layers_figure(groups: dict[str, list[Row]]) -> Figure:
    """Heat maps of the share of nonlinear channels by layer and weight: a row for each net, means over seeds."""
    maps = {}
    for task, rows in groups.items():
        for name, points in grouped(runs(rows)[0], _name).items():
            by_weight = grouped(points, lambda point: point["weight"])
            maps[task, name] = {
                weight: np.mean([p["nonlinear"] for p in by_weight[weight]], axis=0)
                for weight in sorted(by_weight)
            }
    columns = [name for name in STYLES if (next(iter(groups)), name) in maps]
    figure, panels = grid(len(groups), len(columns), (2.3, 2.2), (0.8, 0.4), sharex=True)
    for axes, task in zip(panels, groups, strict=True):
        for ax, name in zip(axes, columns, strict=True):
            of_one = maps[task, name]
            shares = np.stack(list(of_one.values()), axis=1)  # [layers, weights]
            ax.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
            ax.set_title(f"{task.split(',')[0]}: {name}", fontsize=7)
            ax.set_xticks(range(len(of_one)), [f"{weight:g}" for weight in of_one], fontsize=7)
            ax.set_yticks(range(len(shares)), [str(index + 1) for index in range(len(shares))], fontsize=7)
        axes[0].set_ylabel("ReLU, from the input")
    for ax in panels[-1]:
        ax.set_xlabel("weight of the penalty")
    bar = ScalarMappable(Normalize(0, 1), "viridis")
    figure.colorbar(bar, ax=panels, label="share of nonlinear channels", aspect=30)
    return figure


def _name(point: Point) -> str:
    return f"{point['method']}, {point['when']}"


def _wrapped(task: str) -> str:
    """A task in two lines."""
    model, _, rest = task.partition(", ")
    return f"{model}\n{rest}"
