"""What the study of width scaling shows: tables and figures of what `summarize` concludes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.figures import finish, panels
from benchmarks.common.statistics import curve, grouped
from benchmarks.common.sweep import Row
from benchmarks.studies.widths.summarize import (
    LAYERS,
    NORMS,
    at_width,
    by_width,
    check_label,
    label,
    layer_rate,
    of_part,
)
from elropt import plots
from elropt.rules import RULES


def tables(rows: list[Row], summary: dict[str, Any]) -> list[Table]:
    """Learning rates, transfer, exponents of norms, exponents of E."""
    settings = summary["settings"]
    return [
        _lr_table(settings, "edge", "largest stable learning rate"),
        _lr_table(settings, "best", "best learning rate (top of a parabola through validation accuracies)"),
        _transfer_table(settings),
        _class_table(settings),
        _check_table(summary["checks"]),
        _layer_table(summary["checks"]),
    ]


def _widths(settings: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(width for it in settings.values() for width in it["widths"]))


def _lr_table(settings: dict[str, Any], key: str, title: str) -> Table:
    caption = (
        "exponent: of the width, over seeds, 95 % interval; * at the end of its grid, left out of the exponent; "
        "theory: of the largest stable one, docs/guide/width-scaling.md"
    )
    columns = ["setting", *_widths(settings), "exponent", "theory"]
    table = table_of(f"{title}, by width", *columns, caption=caption, wrap=True)
    for name, it in settings.items():
        cells = [
            _lr_cell(it["widths"][width], key) if width in it["widths"] else "" for width in _widths(settings)
        ]
        theory = "" if it["predicted"] is None else f"{it['predicted']:g}"
        table.add_row(name, *cells, _exponent(it[f"{key}_exponent"]), theory)
    return table


def _lr_cell(of_width: dict[str, Any], key: str) -> str:
    if key == "best":
        return f"{of_width['best']['lr']:.2g}{'*' if of_width['best']['at_edge'] else ''}"
    edge = of_width["edge"]
    return ("–" if edge is None else f"{edge.mean:.2g}") + ("*" if of_width["edge_open"] else "")


def _exponent(value: Any) -> str:
    return "–" if value.n == 0 else f"{value:.2f}"


def _transfer_table(settings: dict[str, Any]) -> Table:
    widths = _widths(settings)
    title = "test accuracy in % at a width's own best learning rate, and the base width's minus that (points)"
    table = table_of(title, "setting", *widths, caption="fresh seeds, mean [95 % interval]", wrap=True)
    for name, it in settings.items():
        if not it["transfer"]:
            continue
        cells = [it["transfer"].get(width) for width in widths]
        table.add_row(
            name,
            *("" if cell is None else f"{cell['own'].mean:.1f} {cell['difference']:+.1f}" for cell in cells),
        )
    return table


def _class_table(settings: dict[str, Any]) -> Table:
    widths = _widths(settings)
    title = "runs of the grid that are stable / in controlled divergence / catastrophic"
    caption = "each by its own norms, those at step 0 being 1"
    table = table_of(title, "setting", *widths, caption=caption, wrap=True)
    for name, it in settings.items():
        cells = [it["widths"].get(width) for width in widths]
        table.add_row(
            name, *("" if c is None else " / ".join(map(str, c["classes"].values())) for c in cells)
        )
    return table


def _check_table(checks: dict[str, Any]) -> Table:
    columns = [
        "lr·(width/base)^−α",
        "class",
        *(f"Δ{name}" for name in ("logits", "activations")),
        "∂ℓ/∂f",
        "∂ℓ/∂x",
    ]
    caption = "in brackets: theory for one step. Runs: how many are stable / controlled / catastrophic, each on its own"
    title = "exponents of the width after one step → after ten"
    table = table_of(title, *columns, "runs", caption=caption, wrap=True)
    for name, it in checks.items():
        first, last = it["first"], it["last"]
        cells = []
        for key in NORMS:
            predicted = f" ({it['predicted'][key]:g})" if key in it["predicted"] else ""
            cells.append(f"{_mean(first, key)}{predicted} → {_mean(last, key)}")
        classes = f"{first['class']} → {last['class']}"
        table.add_row(name, classes, *cells, " / ".join(map(str, it["runs"].values())))
    return table


def _mean(of_step: dict[str, Any], key: str) -> str:
    return f"{of_step['exponents'][key].mean:.2f}" if of_step["finite"] else "∞"


def _layer_table(checks: dict[str, Any]) -> Table:
    columns = ["lr·(width/base)^−α", *(f"{kind}, {layer}" for kind in ("E", "λE") for layer in LAYERS)]
    caption = "before the first step → after the last"
    table = table_of("exponents of E = ‖g‖/‖w‖ and of λE, by layer", *columns, caption=caption, wrap=True)
    for name, it in checks.items():
        layers = [*it["E"], *it["lr_E"]]
        table.add_row(name, *(f"{layer['first'].mean:.2f} → {layer['last'].mean:.2f}" for layer in layers))
    return table


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """Learning rates against width; accuracy against learning rate by width; λE by layer against width."""
    return {
        "widths-lrs": _draw_lrs(summary["settings"]),
        "widths-transfer": _draw_transfer(rows),
        "widths-elr": _draw_elrs(of_part(rows, "check")),
    }


def _finish_width(ax: Axes, ticks: Sequence[float]) -> None:
    ax.set(xscale="log", xlabel="width")
    finish(ax)
    ax.set_xticks(ticks)
    ax.xaxis.set_major_formatter(ScalarFormatter())


def _draw_lrs(settings: dict[str, Any]) -> Figure:
    """A panel for each optimizer and loss: a global learning rate filled, one scaled by layer hollow."""
    pairs = grouped(settings, lambda name: name.replace(", scaled", ""))
    figure, axes = panels(len(pairs))
    for ax, (title, names) in zip(axes, pairs.items(), strict=True):
        for name in names:
            scaled = ", scaled" if "scaled" in name else ""
            for index, (key, word) in enumerate((("edge", "largest stable"), ("best", "best"))):
                x, y = _points(settings[name]["widths"], key)
                color, marker = plots.COLORS[index], plots.MARKERS[index]
                exponent = settings[name][f"{key}_exponent"]
                text = f"{word}{scaled}: {exponent.mean:.2f}" if exponent.n else f"{word}{scaled}"
                face = "white" if scaled else color
                ax.plot(x, y, marker, color=color, markerfacecolor=face, label=text, markersize=5)
                if exponent.n and len(x):
                    fitted = np.exp(np.log(y).mean() + exponent.mean * (np.log(x) - np.log(x).mean()))
                    ax.plot(x, fitted, "--" if scaled else "-", color=color, linewidth=1)
        ax.set_yscale("log", base=2)
        ax.set(title=title, ylabel="learning rate")
        _finish_width(ax, [int(width) for width in settings[names[0]]["widths"]])
        ax.legend(frameon=False, fontsize="x-small")
    return figure


def _points(widths: dict[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Widths, and the learning rates that are not at the end of their grid."""
    points = [
        (int(width), it["best"]["lr"] if key == "best" else it["edge"].mean)
        for width, it in widths.items()
        if (not it["best"]["at_edge"] if key == "best" else it["edge"] is not None)
    ]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return x, y


def _draw_transfer(rows: list[Row]) -> Figure:
    """A panel for each setting, a line for each width."""
    groups = grouped(of_part(rows, "val"), lambda row: label(row["spec"]["setting"]))
    figure, axes = panels(len(groups))
    for ax, (name, of_one) in zip(axes, groups.items(), strict=True):
        lines = {}
        for width, of_width in by_width(of_one).items():
            c = curve([(row["spec"]["lr"], 100 * row["accuracy"]) for row in of_width])
            lines[str(width)] = (c.lrs, c.mean, c.low, c.high)
        plots.accuracy_against_lr(ax, lines, xlabel=_unit(of_one[0]["spec"]["setting"]))
        ax.set_xscale("log", base=2)
        ax.set(title=name, ylabel="validation accuracy (%)")
        ax.legend(
            frameon=False, fontsize="x-small", title="width", title_fontsize="x-small", loc="lower left"
        )
    return figure


def _unit(setting: dict[str, Any]) -> str:
    rule = RULES.get(setting["optimizer"], RULES[None])  # torch's optimizers have none
    if rule.lr_unit == "rad per step":
        return "angle (rad)"
    return "learning rate at the base width" if setting["scaled"] else "learning rate"


def _draw_elrs(rows: list[Row]) -> Figure:
    """λE of every layer against the width, under SGD: dots before the first step, lines after the last."""
    groups = {
        name: of_one
        for name, of_one in grouped(rows, check_label).items()
        if of_one[0]["spec"]["setting"]["optimizer"] == "sgd"
    }
    figure, axes = panels(len(groups))
    figure.suptitle("dots: at the first step; lines: after the last", fontsize="medium")
    for ax, (name, of_one) in zip(axes, groups.items(), strict=True):
        widths = list(by_width(of_one))
        for layer, word in enumerate(LAYERS):
            for index, style in ((0, "o"), (-1, "-")):
                by_seed = at_width(of_one, partial(layer_rate, "lr_E", index, layer))
                with np.errstate(invalid="ignore"):
                    values = np.exp(
                        np.mean([[np.log(of[w]) for w in widths] for of in by_seed.values()], axis=0)
                    )
                ax.plot(
                    widths,
                    values,
                    style,
                    color=plots.COLORS[layer],
                    label=word if index else None,
                    markersize=4,
                )
        ax.set(title=name, yscale="log", ylabel="λE (rad)")
        _finish_width(ax, widths)
        ax.legend(frameon=False, fontsize="x-small")
    return figure
