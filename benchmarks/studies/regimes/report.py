"""What the study of the three regimes shows: tables and figures of what `summarize` concludes."""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.figures import finish, grid, legend_below, legend_key
from benchmarks.common.statistics import grouped
from benchmarks.common.sweep import Row
from benchmarks.studies.regimes.summarize import (
    constant,
    end,
    is_final,
    key_of,
    model_of,
    regime_of,
    sphere_lr_of,
)
from elropt.plots import COLORS, DEPTH

# colour, marker and line of a regime
LOOKS: dict[str, tuple[str, str, Any]] = {
    "convergence": (COLORS[0], "o", "-"),
    "chaotic equilibrium": (COLORS[1], "s", "--"),
    "divergence": (COLORS[6], "X", ":"),
    "undecided": ("0.6", "D", "-."),
}
XLABEL = "learning rate on the sphere"
DRAWN_UP_TO = 1e6  # of gradient norms; those of diverging runs go on to overflow


def tables(rows: list[Row], summary: dict[str, Any]) -> list[RenderableType]:
    """For every net the levels by learning rate, and stepping down; the borders of all."""
    result: list[RenderableType] = []
    for model, of_net in summary.items():
        result += [_levels_table(model, of_net["constant"])]
        if of_net["step_down"]["starts"]:
            result.append(_step_down_table(model, of_net))
    return [*result, _borders_table(summary), _renamed_table(summary)]


def _levels_table(model: str, constant: dict[str, Any]) -> Table:
    table = table_of(
        f"{model}: constant learning rates",
        *("sphere_lr", "regime", "train loss", "/ chance", "train error %", "val %", "test %", "c", "turn"),
        caption="medians of the last quarter of the run, means of seeds (loss, c, turn: geometric); chance: "
        "the loss of the same outputs against the labels of other images; turn: sphere_lr · c in rad, if small",
        wrap=True,
    )
    for lr, it in constant.items():
        counts = collections.Counter(it["regimes"])
        table.add_row(
            lr,
            ", ".join(f"{count} {regime}" for regime, count in counts.items()),
            f"{it['loss'].mean:.2g}",
            f"{it['loss'].mean / it['chance'].mean:.2g}",
            f"{it['train_error'].mean:.1f}",
            f"{it['val_error'].mean:.1f}",
            f"{it['test_error'].mean:.1f}",
            f"{it['sphere_grad_norm'].mean:.2g}",
            f"{it['turn'].mean:.2g}",
        )
    return table


def _step_down_table(model: str, of_net: dict[str, Any]) -> Table:
    final, gain = of_net["final"], of_net["gain"]
    table = table_of(
        f"{model}: down to {of_net['step_down']['after']:g} half-way",
        *("from sphere_lr", "train loss", "validation error %", "of it constant"),
        caption=f"fresh seeds, test images: best constant ({final['constant']['sphere_lr']:g}) "
        f"{final['constant']['test_error']:.1f} %, best step-down (from {final['step_down']['sphere_lr']:g}) "
        f"{final['step_down']['test_error']:.1f} %, gain {gain:+.1f} points",
        wrap=True,
    )
    for lr, it in of_net["step_down"]["starts"].items():
        table.add_row(
            lr,
            f"{it['loss'].mean:.2g}",
            f"{it['val_error']:.1f}",
            f"{of_net['constant'][lr]['val_error'].mean:.1f}",
        )
    return table


def _borders_table(summary: dict[str, Any]) -> Table:
    table = table_of(
        "where the regimes end",
        *("net", "convergence up to", "divergence from", "disordered"),
        caption="[95 % interval over seeds] (learning rates measured on both sides, smallest and largest of all "
        "seeds); disordered: seeds in which the regimes do not follow each other",
        wrap=True,
    )
    for model, of_net in summary.items():
        found = of_net["borders"]
        ends = [
            f"{it['at']:.2g} ({it['low']:.2g} … {it['high']:.2g})"
            for it in (found["convergence"], found["divergence"])
        ]
        table.add_row(model, *ends, str(found["disordered"]))
    return table


def _renamed_table(summary: dict[str, Any]) -> Table:
    table = table_of(
        "how far the names depend on where the lines are drawn",
        *("changed", *summary),
        caption="constant runs that get the name of another regime, and that become or are no longer undecided, "
        "if one bound of classify is another, or the run had ended after three quarters",
        wrap=True,
    )
    for change in next(iter(summary.values()))["renamed"]:
        found = [of_net["renamed"][change] for of_net in summary.values()]
        cells = [f"{it['regime']} and {it['undecided']} of {it['of']}" for it in found]
        table.add_row(change, *cells)
    return table


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """Levels against the learning rate, traces, and stepping down."""
    return {
        "regimes": _levels_figure(rows, summary),
        "regimes-traces": _traces_figure(rows, summary),
        "regimes-step-down": _step_down_figure(summary),
    }


def _levels_figure(rows: list[Row], summary: dict[str, Any]) -> Figure:
    """Training loss, test error and c against the learning rate: a point for each seed, coloured by its regime."""
    columns = {
        "loss": "training loss",
        "test_error": "test error (%)",
        "sphere_grad_norm": "gradient norm c",
    }
    figure, axes = grid(len(summary), len(columns), (3.9, 2.9), (0, 0.4))
    for line, (model, of_net) in zip(axes, summary.items(), strict=True):
        runs = [row for row in constant(rows) if model_of(row) == model and not is_final(row)]
        lrs = [float(lr) for lr in of_net["constant"]]
        for ax, (key, label) in zip(line, columns.items(), strict=True):
            means = [it[key].mean for it in of_net["constant"].values()]
            ax.plot(lrs, _drawn(means), color="0.75", linewidth=1, zorder=1)
            for row in runs:
                value = 100 * row[key] if key == "test_error" else end(row[key])
                color, marker, _ = LOOKS[regime_of(row)]
                ax.plot(sphere_lr_of(row), _drawn([value]), marker, color=color, markersize=5, alpha=0.8)
            ax.set(xscale="log", title=model, ylabel=label, xlabel=XLABEL)
            if key != "test_error":
                ax.set_yscale("log")
        guessing = {"color": "0.4", "linewidth": 0.8, "linestyle": ":", "zorder": 0}
        line[0].plot(lrs, [it["chance"].mean for it in of_net["constant"].values()], **guessing)
        line[1].axhline(100 - 100 / runs[0]["classes"], **guessing)
        for ax in line:
            finish(ax)
    handles = [
        legend_key(regime, color=color, marker=marker, linestyle="")
        for regime, (color, marker, _) in LOOKS.items()
    ]
    handles.append(legend_key("guessing", color="0.4", linewidth=0.8, linestyle=":"))
    legend_below(figure, handles)
    return figure


def _traces_figure(rows: list[Row], summary: dict[str, Any]) -> Figure:
    """Training loss and c over the epochs, first seed: of each regime the smallest and the largest learning rate."""
    columns = {"loss": "training loss", "sphere_grad_norm": "gradient norm c"}
    figure, axes = grid(len(summary), len(columns), (4.6, 2.9), (0, 0.4))
    for line, model in zip(axes, summary, strict=True):
        runs = [row for row in constant(rows) if model_of(row) == model and row["spec"]["seed"] == 0]
        runs.sort(key=sphere_lr_of)
        ends = {sphere_lr_of(of_name[i]) for of_name in grouped(runs, regime_of).values() for i in (0, -1)}
        few = [row for row in runs if sphere_lr_of(row) in ends]
        for row, color in zip(few, DEPTH(np.linspace(0, 1, len(few))), strict=True):
            style = {"color": color, "linestyle": LOOKS[regime_of(row)][2], "linewidth": 1.2}
            for ax, key in zip(line, columns, strict=True):
                epochs = np.arange(1, len(row[key]) + 1)
                ax.plot(epochs, _drawn(row[key]), **style, label=key_of(sphere_lr_of(row)))
        for ax, label in zip(line, columns.values(), strict=True):
            ax.set(yscale="log", title=model, ylabel=label, xlabel="epoch")
            finish(ax)
        line[-1].legend(
            title="sphere_lr", frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
        )
    handles = [legend_key(name, color="0.3", linestyle=style) for name, (*_, style) in LOOKS.items()]
    legend_below(figure, handles)
    return figure


def _step_down_figure(summary: dict[str, Any]) -> Figure:
    """Validation error against the learning rate: constant, and as the one that is stepped down from."""
    figure, axes = grid(1, len(summary), (4.6, 2.9), (0, 0.4))
    for ax, (model, of_net) in zip(axes[0], summary.items(), strict=True):
        after = of_net["step_down"]["after"]
        curves = {"constant": of_net["constant"]}
        if after is not None:
            curves[f"first half, then {after:g}"] = of_net["step_down"]["starts"]
        for (name, points), color in zip(curves.items(), COLORS, strict=False):
            lrs = [float(lr) for lr in points]
            mean, low, high = np.array([it["val_error"][:3] for it in points.values()]).T
            ax.plot(lrs, mean, color=color, marker="o", markersize=4.5, label=name)
            ax.fill_between(lrs, low, high, color=color, alpha=0.15, linewidth=0)
        for name, style in {"convergence": "--", "divergence": ":"}.items():
            at = of_net["borders"][name]["at"].mean
            if math.isfinite(at):
                ax.axvline(at, color="0.4", linewidth=0.9, linestyle=style, label=f"border of {name}")
        ax.set(xscale="log", title=model, xlabel=XLABEL, ylabel="validation error (%)")
        ax.legend(frameon=False, fontsize="small")
        finish(ax)
    return figure


def _drawn(values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What fits on an axis; the rest leaves a gap."""
    values = np.array(values, dtype=np.float64)
    return np.where(values < DRAWN_UP_TO, values, np.nan)
