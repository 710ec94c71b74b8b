"""What figures share: panels, axes."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter

DECADES_WITHOUT_MINOR_LABELS = 30  # largest / smallest value, from which only decades are labelled


def panels(
    count: int, *, columns: int = 4, size: tuple[float, float] = (3.4, 3.0)
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most `columns` in a line, each of about `size` inches."""
    columns = min(columns, max(count, 1))
    lines = math.ceil(max(count, 1) / columns)
    width, height = size
    figure = Figure(figsize=(width * columns, height * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax in axes[count:]:
        ax.set_visible(False)
    return figure, list(axes[:count])


def finish(ax: Axes) -> None:
    """A light grid, no box, and few labels on a logarithmic axis. Call it when everything is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.title.set_fontsize("medium")
    if ax.get_xscale() == "log":
        ax.xaxis.set_minor_formatter(NullFormatter())
    if ax.get_yscale() == "log":
        low, high = ax.get_ylim()
        few = high / low < DECADES_WITHOUT_MINOR_LABELS
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)) if few else NullFormatter())
