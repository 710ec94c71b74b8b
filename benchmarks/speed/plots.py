"""Plots and verdicts from the result files of `step_time` and `kernels`.

    python -m benchmarks.speed.plots runs/step_time.json runs/kernels.json runs/end_to_end.json --out runs/plots

Draws a bar chart for each workload (time per step over that of torch's fused SGD, quantiles as error bars) and a
roofline (GB/s over the bytes of a step, with the bandwidth of the copy), and prints which targets were met.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.speed.optimizers import BASELINE, OURS
from benchmarks.speed.step_time import MODES, median
from benchmarks.speed.timing import Row
from elropt.plots import COLORS, MARKERS, save

LARGE = ("resnet-50", "vit-b-16", "decoder-1b", "decoder-1b-bf16")
WIDE = 8  # largest over smallest ratio of a linear axis
ELEMENTS_FOR_BANDWIDTH = 25_000_000


class Verdict(NamedTuple):
    """A target and what was measured; None where it was not."""

    target: str
    mode: str
    limit: float
    measured: float | None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target was met."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


class Results:
    """The rows of the result files, found by workload and optimizer."""

    def __init__(self, reports: Iterable[dict[str, Any]]) -> None:
        by_kind: dict[str, list[Row]] = {}
        self.copy_gb_per_s: float | None = None
        for report in reports:
            by_kind.setdefault(report["kind"], []).extend(report["rows"])
            if report["kind"] == "step-time" and report["copy"]:
                self.copy_gb_per_s = report["copy"].get("gb_per_s")
        self.steps = by_kind.get("step-time", [])
        self.kernels = by_kind.get("kernels", [])
        self.end_to_end = by_kind.get("end-to-end", [])
        self.workloads = list(dict.fromkeys(row["workload"] for row in self.steps))

    def row(self, workload: str, optimizer: str) -> Row:
        """The row, or an empty one. A warm-up that had ended while it was measured is not one."""
        for row in self.steps:
            if (row["workload"], row["optimizer"]) == (workload, optimizer) and not row.get("handed_over"):
                return row
        return {}

    def ratio(self, workload: str, optimizer: str, mode: str, over: str = BASELINE) -> float | None:
        """Median time over that of another optimizer in the same run."""
        mine, theirs = (median(self.row(workload, name), mode) for name in (optimizer, over))
        return mine / theirs if mine and theirs else None


def verdicts(results: Results) -> list[Verdict]:
    """Every target, with and without CUDA graph, for the workloads that were measured."""
    found = []
    for mode in MODES:
        for workload in results.workloads:
            limits = {"elr-none": 0.7 if workload in ("resnet-56", "2000-tensors") else 1.0}
            if workload in LARGE or workload == "resnet-56":
                limit = 1.0 if workload == "resnet-56" else 1.25
                limits |= {"elr-warmup": limit, "elr-uniform": limit}
            for optimizer, limit in limits.items():
                ratio = results.ratio(workload, optimizer, mode)
                found.append(Verdict(f"{workload}: {optimizer} / {BASELINE}", mode, limit, ratio))
        if "resnet-50" in results.workloads:
            for peer in ("timm-lars", "timm-sgdp"):
                # The slowest rule is to be that much faster.
                ratios = [results.ratio("resnet-50", peer, mode, over=rule) for rule in OURS]
                least = min((ratio for ratio in ratios if ratio is not None), default=None)
                found.append(Verdict(f"resnet-50: {peer} / slowest rule", mode, 8.0, least, at_least=True))
    for workload in results.workloads:
        for rule in OURS:
            row = results.row(workload, rule)
            if row.get("elements", 0) >= ELEMENTS_FOR_BANDWIDTH:
                share = (row.get("graph") or {}).get("of_copy")
                found.append(
                    Verdict(f"{workload}: {rule} of copy bandwidth", "graph", 0.9, share, at_least=True)
                )
    for row in results.end_to_end:
        if row["optimizer"] != BASELINE and not row.get("handed_over"):
            ratio = row["ratio"][1] if row.get("ratio") else None
            found.append(Verdict(f"training step: {row['optimizer']} / {BASELINE}", "eager", 1.01, ratio))
    return found


def verdict_table(found: Sequence[Verdict]) -> Table:
    """The targets with their marks."""
    table = table_of("targets", "target", "mode", "limit", "measured", "")
    marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: "–"}
    for verdict in found:
        measured = "not measured" if verdict.measured is None else f"{verdict.measured:.3f}"
        limit = f"{'≥' if verdict.at_least else '≤'} {verdict.limit:g}"
        table.add_row(verdict.target, verdict.mode, limit, measured, marks[verdict.met])
    return table


def bar_chart(ax: Axes, results: Results, workload: str) -> None:
    """Time per step of each optimizer over the median of torch's fused SGD, with and without CUDA graph."""
    optimizers = list(dict.fromkeys(row["optimizer"] for row in results.steps if row["workload"] == workload))
    shown, drawn = [], []
    for offset, mode in enumerate(MODES):
        base = median(results.row(workload, BASELINE), mode)
        times = [results.row(workload, name).get(mode) for name in optimizers]
        measured = [(y, time["us"]) for y, time in enumerate(times) if time]
        if not base or not measured:
            continue
        low, mid, high = np.array([us for _, us in measured]).T / base
        at = np.array([y for y, _ in measured]) + 0.4 * (offset - 0.5)
        errors = np.stack([mid - low, high - mid])
        ax.barh(
            at, mid, height=0.38, xerr=errors, color=COLORS[offset], label=mode, error_kw={"linewidth": 0.8}
        )
        for y, value, end in zip(at, mid, high, strict=True):
            ax.annotate(f"{value:.2f}", (end, y), (3, 0), textcoords="offset points", va="center", fontsize=7)
        shown += mid.tolist()
        drawn.append(mode)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(optimizers)), optimizers)
    ax.invert_yaxis()
    if shown and max(shown) / min(shown) > WIDE:
        ax.set_xscale("log")
    ax.margins(x=0.12)
    ax.set_xlabel(f"time per step / {BASELINE}")
    ax.set_title(workload)
    if drawn:
        ax.legend(frameon=False)


def roofline(ax: Axes, results: Results) -> None:
    """GB/s over the bytes of a step: optimizers on the workloads (CUDA graph) as points, kernels by size as lines."""
    for index, optimizer in enumerate(dict.fromkeys(row["optimizer"] for row in results.steps)):
        every = [results.row(workload, optimizer) for workload in results.workloads]
        rows = [row for row in every if "gb_per_s" in (row.get("graph") or {})]
        if rows:
            ax.plot(
                [row["bytes"] for row in rows],
                [row["graph"]["gb_per_s"] for row in rows],
                linestyle="none",
                marker=MARKERS[index % len(MARKERS)],
                color=COLORS[(index + index // len(MARKERS)) % len(COLORS)],
                markerfacecolor=None if optimizer in OURS else "none",
                label=optimizer,
            )
    single = [
        row for row in results.kernels if row["tensors"] == 1 and row["dtype"] == "float32" and "bytes" in row
    ]
    for index, kernel in enumerate(dict.fromkeys(row["kernel"] for row in single)):
        rows = sorted((row for row in single if row["kernel"] == kernel), key=lambda row: row["bytes"])
        ax.plot(
            [row["bytes"] for row in rows],
            [row["gb_per_s"] for row in rows],
            color=COLORS[index % len(COLORS)],
            linewidth=1,
            linestyle="--" if kernel == "copy" else "-",
            label=f"{kernel}, one float32 tensor",
        )
    if results.copy_gb_per_s:
        ax.axhline(results.copy_gb_per_s, color="black", linewidth=0.8, label="copy of 1 GiB")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("bytes of a step")
    ax.set_ylabel("GB/s")
    ax.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def draw(results: Results, out: Path) -> list[Path]:
    """All figures of the results; returns their files."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for workload in results.workloads:
        rows = sum(row["workload"] == workload for row in results.steps)
        figure = Figure(figsize=(7, 1 + 0.4 * rows), layout="constrained")
        bar_chart(figure.subplots(), results, workload)
        paths.append(out / f"step-time-{workload}.png")
        save(figure, paths[-1])
    if any(row.get("graph") for row in results.steps) or results.kernels:
        figure = Figure(figsize=(9, 5), layout="constrained")
        roofline(figure.subplots(), results)
        paths.append(out / "roofline.png")
        save(figure, paths[-1])
    return paths


def main(
    result: Annotated[list[Path], typer.Argument(help="Files that step_time and kernels wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path("runs/step-time"),
) -> None:
    """Draw the results, and say which targets were met.

    Example: python -m benchmarks.speed.plots runs/gpu/step_time.json runs/gpu/end_to_end.json --out runs/gpu
    """
    reports = []
    for path in result:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"{path} cannot be read: {error}") from error
        if not isinstance(report, dict) or not {"kind", "rows"} <= report.keys():
            raise typer.BadParameter(f"{path} is not a result file of step_time or kernels")
        reports.append(report)
    results = Results(reports)
    console = Console()
    paths = draw(results, out)
    found = verdicts(results)
    if found:
        console.print(verdict_table(found))
    console.print(f"wrote {', '.join(map(str, paths)) or 'nothing: there is no row to draw'}")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
