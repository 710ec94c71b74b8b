"""What the study shows: a table of every task, the verdicts, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.dataset import Metric
from benchmarks.common.figures import grid, legend_beside
from benchmarks.common.statistics import Interval
from benchmarks.common.sweep import Row
from benchmarks.studies.comparison import label
from benchmarks.studies.control.report import usable
from benchmarks.studies.evidence.summarize import find
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
        *("method", "best lr", "validation", "test", "Δ", "usable"),
        caption="lr chosen by validation with one seed and a third of the steps; test with fresh seeds, mean [95 % by "
        "Student's t]; Δ: how much better than the best-tuned SGD, by seed; usable: largest / smallest lr with 90 % of "
        "the best gain over chance of all methods; * the best lr is at the end of its grid",
    )
    for name, it in methods.items():
        table.add_row(
            name,
            "–" if it["best_lr"] is None else f"{it['best_lr']:g}{'*' if it['best_lr_at_edge'] else ''}",
            "–" if it["validation"] is None else f"{it['validation']:{spec}}",
            shown(it["test"], spec),
            shown(it["better_than_best_sgd"], f"+{spec}"),
            usable(it["usable"]),
        )
    return table


def shown(values: dict[str, Any] | None, spec: str) -> str:
    """An interval; the mean alone of one seed; a dash of none."""
    if values is None:
        return "–"
    return f"{values['mean']:{spec}} (1 seed)" if values["n"] < 2 else f"{Interval(**values):{spec}}"


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """The metric on the validation part over the epochs, at each method's own learning rate: a panel for each task."""
    found = find(rows)
    panels = {
        label(vars(task)): metric
        for task, metric in found.metric.items()
        if any(it["curve"] for it in summary["tasks"][label(vars(task))].values())
    }
    if not panels:
        return {}
    figure, axes = grid(1, len(panels), (5, 4), (1.5, 0))
    for ax, (task, metric) in zip(axes[0], panels.items(), strict=True):
        lines = {name: it["curve"] for name, it in summary["tasks"][task].items() if it["curve"]}
        for index, (name, points) in enumerate(lines.items()):
            style: dict[str, Any] = {"color": plots.COLORS[index % 7], "marker": plots.MARKERS[index % 7]}
            ax.plot(*zip(*points, strict=True), ("-", "--", ":")[index // 7 % 3], label=name, **style)
        ax.set(title=task, xlabel="epoch", ylabel=f"validation {metric.title}")
    legend_beside(figure, axes[0, 0])
    return {"evidence": figure}
