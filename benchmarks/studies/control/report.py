"""What the study shows: two tables of each task, and the metric against the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.figures import grid
from benchmarks.common.statistics import Interval
from benchmarks.common.sweep import Row
from benchmarks.studies import comparison
from benchmarks.studies.comparison import Entry, by_task, entries

UNITS = ("SGD's", "radians", "AdamW's")


def tables(rows: list[Row], summary: dict[str, Any]) -> Sequence[Table]:
    """Of every task: the methods, and the pairs."""
    return [
        table
        for task, of_task in by_task(entries(rows)).items()
        for table in (
            methods_table(task, of_task, summary[task]["methods"]),
            pairs_table(task, of_task, summary[task]["pairs"]),
        )
    ]


def methods_table(task: str, of_task: Sequence[Entry], found: dict[str, Any]) -> Table:
    """Results, usable learning rates and spread of the angles."""
    metric = of_task[0].metric
    spec = f".{metric.digits}f"
    table = table_of(
        f"{task}: {metric.title}",
        *("method", "best lr", "validation", "test", "Δ", "usable", "angles"),
        caption="lr chosen by validation; test with fresh seeds, mean [95 % bootstrap interval]; Δ: how much better "
        "than the best-tuned SGD, by seed; usable: largest / smallest lr with 90 % of the best gain over chance of all "
        "methods; angles: largest / smallest angle of the tracked layers in one step, median (worst) after the first "
        "20 steps; * the best lr is at the end of its grid",
    )
    for entry in of_task:
        it = found[entry.method]
        better, spread = it["better_than_best_sgd"], it["angle_spread"]
        table.add_row(
            entry.method,
            f"{it['best_lr']:g}{'*' if it['best_lr_at_edge'] else ''}",
            f"{it['validation']:{spec}}",
            "–" if it["test"] is None else f"{Interval(**it['test']):{spec}}",
            "–" if better is None else f"{Interval(**better):+{spec}}",
            usable(it["usable"]),
            "–" if spread is None else f"{spread['median']:.3g} ({spread['worst']:.3g})",
        )
    return table


def usable(found: dict[str, Any] | None) -> str:
    """A usable range as "×10", with ≥ where the grid ends it."""
    if found is None:
        return "–"
    return f"{'≥ ' if found['cut_low'] or found['cut_high'] else ''}{comparison.times(found['width'])}"


def pairs_table(task: str, of_task: Sequence[Entry], found: Sequence[dict[str, Any]]) -> Table:
    """Who is better, by question."""
    metric = of_task[0].metric
    table = table_of(
        f"{task}: how much better, in {metric.title}",
        *("question", "method", "against", "better by"),
        caption="at the best lr of each, test part, paired by seed, mean [95 % bootstrap interval]; above 0: the "
        "method is better",
    )
    for pair in found:
        better = Interval(**pair["better"])
        table.add_row(pair["question"], pair["method"], pair["against"], f"{better:+.{metric.digits}f}")
    return table


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """The metric against the learning rate: a line of panels for each task, a panel for each unit."""
    groups = by_task(entries(rows))
    figure, axes = grid(len(groups), len(UNITS), (4.5, 3.4), sharey="row")
    for line, (task, of_task) in zip(axes, groups.items(), strict=True):
        for ax, unit in zip(line, UNITS, strict=True):
            if any(entry.unit == unit for entry in of_task):
                comparison.draw_curves(ax, of_task, title=task if unit == UNITS[0] else "", unit=unit)
    return {"control": figure}
