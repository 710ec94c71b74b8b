"""What the study shows: a table of every task, the verdicts, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.dataset import Metric
from benchmarks.common.figures import finish, legend_below, legend_key, panels
from benchmarks.common.statistics import Interval
from benchmarks.common.sweep import Row
from benchmarks.studies.comparison import label
from benchmarks.studies.control.report import usable
from benchmarks.studies.evidence.summarize import LEVELS, find
from elropt import plots


def tables(rows: list[Row], summary: dict[str, Any]) -> Sequence[Table]:
    """The methods on every task, then the verdicts."""
    metrics = {label(vars(task)): metric for task, metric in find(rows).metric.items()}
    verdicts = [(it["asked"], it["verdict"]) for it in summary["questions"].values()]
    return [
        *(of_task(task, metric, summary["tasks"][task]) for task, metric in metrics.items()),
        table_of("questions", "question", "verdict", rows=verdicts, wrap=True),
    ]


def of_task(title: str, metric: Metric, methods: dict[str, Any]) -> Table:
    """Results of every method on a task."""
    spec = f".{metric.digits}f"
    table = table_of(
        f"{title}: {metric.title}",
        *("method", "best lr", "validation", "test", "Δ", "usable", "epochs to"),
        caption="lr chosen by validation with one seed and a third of the steps; test with fresh seeds, mean [95 % by "
        "Student's t]; Δ: how much better than the best-tuned SGD, by seed; usable: largest / smallest lr with 90 % of "
        "the best gain over chance of all methods; epochs to: until the mean of the fresh seeds on the validation part "
        f"has {', '.join(f'{level:.0%}' for level in LEVELS)} of the gain that the best-tuned SGD ends with; * the "
        "best lr is at the end of its grid",
    )
    for name, it in methods.items():
        table.add_row(
            name,
            "–" if it["best_lr"] is None else f"{it['best_lr']:g}{'*' if it['best_lr_at_edge'] else ''}",
            "–" if it["validation"] is None else f"{it['validation']:{spec}}",
            shown(it["test"], spec),
            shown(it["better_than_best_sgd"], f"+{spec}"),
            usable(it["usable"]),
            "–"
            if not it["epochs_to"]
            else ", ".join("–" if e is None else f"{e:.2g}" for e in it["epochs_to"]),
        )
    return table


def shown(values: dict[str, Any] | None, spec: str) -> str:
    """An interval; the mean alone of one seed; a dash of none."""
    if values is None:
        return "–"
    return f"{values['mean']:{spec}} (1 seed)" if values["n"] < 2 else f"{Interval(**values):{spec}}"


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """The metric on the validation part, a panel for each task: over the epochs at each method's own learning rate, and
    against the learning rate, of the methods with SGD's unit."""
    found = find(rows)
    metrics = {label(vars(task)): metric for task, metric in found.metric.items()}
    names = list(dict.fromkeys(name for of_one in summary["tasks"].values() for name in of_one))
    curves = {
        task: {name: it["curve"] for name, it in of_one.items() if it["curve"]}
        for task, of_one in summary["tasks"].items()
    }
    lrs = {
        label(vars(task)): {
            name: sorted((lr, found.metric[task].value(score)) for lr, score in scores.items())
            for name, scores in choosing.items()
            if found.units[name] == "SGD's"
        }
        for task, choosing in found.choosing.items()
    }
    figures = {"evidence-curves": (curves, "epoch", "linear"), "evidence-lrs": (lrs, "learning rate", "log")}
    return {
        stem: lines_figure(
            {task: of_one for task, of_one in lines.items() if of_one}, names, metrics, xlabel, xscale
        )
        for stem, (lines, xlabel, xscale) in figures.items()
        if any(lines.values())
    }


def lines_figure(
    lines: dict[str, dict[str, Sequence[tuple[float, float]]]],
    names: Sequence[str],
    metrics: dict[str, Metric],
    xlabel: str,
    xscale: str,
) -> Figure:
    """task → method → points, a panel for each task; a method looks the same in all."""
    figure, axes = panels(len(lines), columns=3, size=(4.6, 3.4))
    for ax, (task, of_one) in zip(axes, lines.items(), strict=True):
        for name, points in of_one.items():
            ax.plot(*zip(*points, strict=True), **style(names.index(name)))
        ax.set(title=task, xlabel=xlabel, xscale=xscale, ylabel=f"validation {metrics[task].title}")
        finish(ax)
    shown = [name for name in names if any(name in of_one for of_one in lines.values())]
    keys = [legend_key(name, **style(names.index(name))) for name in shown]
    legend_below(figure, keys, columns=5)
    return figure


def style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the index-th method."""
    return {
        "color": plots.COLORS[index % len(plots.COLORS)],
        "marker": plots.MARKERS[index % len(plots.MARKERS)],
        "markersize": 3,
        "linestyle": ("-", "--", ":", "-.")[index // len(plots.COLORS) % 4],
    }
