"""What the study shows: a table of every task and of every question, the verdicts, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.dataset import Metric
from benchmarks.common.figures import finish, legend_below, legend_key, panels
from benchmarks.common.statistics import Interval
from benchmarks.common.sweep import Row
from benchmarks.studies.comparison import label, times
from benchmarks.studies.control.report import usable
from benchmarks.studies.evidence.plan import OURS
from benchmarks.studies.evidence.summarize import AT_SGDS, BASELINES, BY_STEPS, LEVELS, find
from elropt import plots

# over the epochs: more curves cannot be told apart
DRAWN = (
    *BASELINES,
    "adamw",
    "muon",
    "muonh",
    "warmup",
    *OURS,
    *(name + end for end in (AT_SGDS, BY_STEPS) for name in OURS),
    "muon" + BY_STEPS,
)


def tables(rows: list[Row], summary: dict[str, Any]) -> Sequence[Table]:
    """The methods on every task, the questions that have numbers of their own, then the verdicts."""
    metrics = {label(vars(task)): metric for task, metric in find(rows).metric.items()}
    found = {name: it["found"] for name, it in summary["questions"].items()}
    verdicts = [(it["asked"], it["verdict"]) for it in summary["questions"].values()]
    of_questions = (
        untuned(found["untuned"]),
        pairs("lr ∝ 1/steps", "the lr chosen on a third of them", found["horizon"], metrics),
        pairs("another end of the schedule", "the plain cosine", found["annealing"], metrics),
        pairs("a linear warm-up", "none", found["warm-up"], metrics),
        pairs("on text", "a peer", found["text"], metrics),
        transfer(found["transfer"]),
        batch(found["batch"]),
    )
    return [
        *(of_task(task, metric, summary["tasks"][task]) for task, metric in metrics.items()),
        *(table for table in of_questions if table.rows),
        table_of("questions", "question", "verdict", rows=verdicts, wrap=True),
    ]


def untuned(found: dict[str, Any]) -> Table:
    """Our rules in place of SGD, at its own learning rate."""
    table = table_of(
        "swapped in",
        *("task", "method", "lr", "better than sgd", "than sgd+linear", "aim", "outcome"),
        caption="at the learning rate that is best for SGD without a warm-up; points of test accuracy, by seed; met or "
        "missed if the whole interval says so",
    )
    for task, methods in found.items():
        for name, it in methods.items():
            gains = (interval_cell(it[key], "+.1f") for key in ("better", "better_than_linear"))
            table.add_row(task, name, f"{it['lr']:g}", *gains, f"{it['aim']:+g}", it["outcome"])
    return table


def pairs(question: str, against: str, found: dict[str, Any], metrics: dict[str, Metric]) -> Table:
    """How much better each method is than the one it is compared with."""
    table = table_of(
        f"{question} against {against}",
        *("task", "method", "better by"),
        caption="on the test part, by seed; above 0: better",
    )
    for task, it in found.items():
        metric = next(metric for name, metric in metrics.items() if task.startswith(name))
        for name, gain in it["better"].items():
            table.add_row(task, name, interval_cell(gain, f"+.{metric.digits}f"))
    return table


def transfer(found: dict[str, Any]) -> Table:
    """The best learning rate on nets of other widths and depths."""
    nets = list(dict.fromkeys(net for it in found.values() for net in it["lrs"]))
    table = table_of(
        "one learning rate for all nets",
        *("method", *nets, "range", "most that is lost"),
        caption="best learning rate by validation (top of a parabola); range: largest / smallest; lost: points of "
        f"validation accuracy, with the best one of {nets[0] if nets else 'the first'} on the others",
    )
    for name, it in found.items():
        lost = it["worst_loss"]
        lrs = [f"{it['lrs'][net]:.2g}" for net in nets]
        table.add_row(name, *lrs, times(it["range"]), "–" if lost is None else f"{lost:.1f}")
    return table


def batch(found: dict[str, Any]) -> Table:
    """Test accuracy by batch size."""
    sizes = sorted({size for of_size in found.values() for size in of_size}, key=int)
    table = table_of(
        "batch sizes at equal epochs",
        *("method", *sizes),
        caption="test accuracy (%), each with its own best learning rate, mean [95 % by Student's t, pooled scatter]",
    )
    for name, of_size in found.items():
        table.add_row(name, *(interval_cell(of_size[size], ".1f") for size in sizes))
    return table


def of_task(title: str, metric: Metric, methods: dict[str, Any]) -> Table:
    """Results of every method on a task."""
    spec = f".{metric.digits}f"
    table = table_of(
        f"{title}: {metric.title}",
        *("method", "best lr", "validation", "test", "Δ", "usable", "epochs to"),
        caption="lr chosen by validation with one seed and a third of the steps; test with fresh seeds, mean [95 % by "
        "Student's t, scatter pooled over the methods]; Δ: how much better than the best-tuned SGD, by seed; usable: "
        "largest / smallest lr with 90 % of the best gain over chance of all methods; epochs to: until the mean of the "
        f"fresh seeds on the validation part has {', '.join(f'{level:.0%}' for level in LEVELS)} of the gain that the "
        "best-tuned SGD ends with; * the best lr is at the end of its grid",
    )
    for name, it in methods.items():
        table.add_row(
            name,
            "–" if it["lr"] is None else f"{it['lr']:g}{'*' if it['lr_at_edge'] else ''}",
            "–" if it["validation"] is None else f"{it['validation']:{spec}}",
            interval_cell(it["test"], spec),
            interval_cell(it["better_than_best_sgd"], f"+{spec}"),
            usable(it["usable"]),
            "–"
            if not it["epochs_to"]
            else ", ".join("–" if e is None else f"{e:.2g}" for e in it["epochs_to"]),
        )
    return table


def interval_cell(values: dict[str, Any] | None, spec: str) -> str:
    """An interval, as far as the scatter is known, and whether it is of one seed; a dash of none."""
    if values is None:
        return "–"
    interval = Interval(*(values[key] for key in Interval._fields))
    text = f"{interval:{spec}}" if math.isfinite(interval.low) else f"{interval.mean:{spec}}"
    return f"{text} (1 seed)" if interval.n < 2 else text


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """The metric on the validation part, a panel for each task: over the epochs, of the methods in `DRAWN`, and against
    the learning rate, of the methods with SGD's unit."""
    found = find(rows)
    metrics = {label(vars(task)): metric for task, metric in found.metric.items()}
    curves = {
        task: {name: it["curve"] for name, it in of_one.items() if it["curve"] and name in DRAWN}
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
    names = list(dict.fromkeys(name for of_one in (*curves.values(), *lrs.values()) for name in of_one))
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
    legend_below(figure, keys, columns=int(1.5 * min(len(lines), 3)))
    return figure


def style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the index-th method."""
    return {
        "color": plots.COLORS[index % len(plots.COLORS)],
        "marker": plots.MARKERS[index % len(plots.MARKERS)],
        "markersize": 3,
        "linestyle": ("-", "--", ":", "-.")[index // len(plots.COLORS) % 4],
    }
