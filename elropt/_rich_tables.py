"""The tables that the `elropt` command prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from ._look import layer_colors, short
from .dynamics import elr_spread
from .inspection import ModelReport, WeightReport

__all__ = ["environment_table", "simulation_table", "summary_table", "weight_table"]

TABLE_ROWS = 25
SWATCH = "■ "


def weight_table(report: ModelReport, *, wide: bool, colored: bool) -> Table:
    """A row for each weight: all that was measured, or if not `wide` what fits into 80 columns.

    If `colored`, with the colour that the layer has in plots of a run.
    """
    fastest, slowest = (report.tracked[0], report.tracked[-1]) if len(report.tracked) > 1 else (None, None)
    title = (
        f"Weights of two or more dimensions: E = ‖g‖/‖w‖ (1/lr), ELR = lr·E = tan(angle) at lr {report.lr:g}"
    )
    table = Table("weight", title=title)
    if wide:
        table.add_column("shape")
    table.add_column("scale-invariant" if wide else "invariant")
    for header in (*(("‖w‖", "‖g‖") if wide else ()), "cos(w, g)", "E", "ELR"):
        table.add_column(header, justify="right", no_wrap=True)
    for column in table.columns:
        column.overflow = "fold"
    colors = layer_colors([weight.tracked for weight in report.weights], "dark")
    for weight, color in zip(report.weights, colors, strict=True):
        style = "bold red" if weight is fastest else "bold cyan" if weight is slowest else None
        numbers = [weight.radial_cosine, weight.relative_grad, weight.elr]
        cells = [weight.name, _verdict(weight, wide=wide)]
        if wide:
            cells.insert(1, "×".join(map(str, weight.shape)))
            numbers = [weight.weight_norm, weight.grad_norm, *numbers]
        name, *others = map(Text, (*cells, *map(short, numbers)))
        if colored:
            name = Text.assemble((SWATCH, color), name)
        table.add_row(name, *others, style=style)
    return table


def _verdict(weight: WeightReport, *, wide: bool) -> str:
    """Whether the weight is invariant, and why. Instead of a cosine in the reason the row has that of the loss."""
    if weight.reason.startswith("not:"):
        return "no: its scale matters" if wide else "no"
    if wide:
        return f"yes: {weight.reason}" if weight.invariance else f"no: {weight.reason}"
    if weight.invariance:
        return "by channel" if weight.invariance == "channel" else "as a whole"
    _, jointly, partner = weight.reason.partition("only jointly with ")
    return f"no: with {partner.strip(chr(39)).rpartition('.')[2]}" if jointly else f"no: {weight.reason}"


def summary_table(report: ModelReport) -> Table:
    """Spread and critical learning rates, for two or more tracked weights."""
    table = Table(show_header=False)
    for label, value in (
        ("ELR spread (max / min)", report.elr_spread),
        ("standard deviation of log ELR", report.log_elr_std),
        ("critical lr, balance: fastest and slowest layer swap", report.balance_lr),
        ("critical lr, monotone: the two fastest layers swap", report.monotone_lr),
    ):
        table.add_row(label, short(value))
    return table


def simulation_table(E: NDArray[np.float64], lr_of: Callable[[np.ndarray], float]) -> Table:
    """E [steps + 1, L] of `dynamics.simulate`: at most TABLE_ROWS steps, among them the first and the last."""
    table = Table("step", "lr", "largest E", "smallest E", "spread", title="E in 1/lr")
    for column in table.columns:
        column.justify = "right"
    steps = len(E) - 1
    spread = elr_spread(E)
    for step in np.unique(np.linspace(0, steps, min(steps + 1, TABLE_ROWS)).round().astype(int)):
        lr = short(lr_of(E[step])) if step < steps else ""
        table.add_row(
            str(step), lr, *map(short, (float(E[step].max()), float(E[step].min()), float(spread[step])))
        )
    return table


def environment_table(environment: Mapping[str, object]) -> Table:
    """What `env_report.collect` found."""
    table = Table(show_header=False)
    for key, value in environment.items():
        table.add_row(key, _in_one_line(value))
    return table


def _in_one_line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_in_one_line(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_in_one_line, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
