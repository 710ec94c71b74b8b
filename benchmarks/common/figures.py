"""What figures share: panels, axes, legends, files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, NullFormatter

from elropt import plots

Where: TypeAlias = Literal["outside right upper", "outside right center"]

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


def grid(
    lines: int, columns: int, size: tuple[float, float], margin: tuple[float, float] = (0, 0), **options: Any
) -> tuple[Figure, Any]:
    """A figure and its panels, [lines, columns], each of about `size` inches; `options` of `Figure.subplots`."""
    (width, height), (right, below) = size, margin
    figure = Figure(figsize=(width * columns + right, height * lines + below), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False, **options)


def legend_key(label: str, **style: Any) -> Line2D:
    """A line that is seen in a legend only."""
    return Line2D([], [], label=label, **style)


def legend_below(figure: Figure, handles: Sequence[Any], columns: int | None = None) -> None:
    """One legend for all panels, below them, in one line unless `columns` says otherwise."""
    ncols = columns or max(len(handles), 1)
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)


def legend_beside(figure: Figure, ax: Axes, where: Where = "outside right upper", **options: Any) -> None:
    """The legend of one panel for all of them, to their right."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc=where, frameon=False, **options)


def save_all(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure to `folder/NAME.png`. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        plots.save(figure, path)
    return paths


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
