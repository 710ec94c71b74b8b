"""Plots of runs and of learning-rate sweeps, on axes that the caller gives. Works without a display.

fig = Figure(layout="constrained")
elr_over_steps(fig.subplots(), run.steps, run.elr)
save(fig, "elr.png")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._look import (
    APPLIED_LR,
    COLORS,
    ELR,
    HAND_OVER_COLOR,
    SPREAD,
    depth_colors,
    layer_quantities,
    shared_values,
)
from .run_history import RunHistory, rule_spans, spread_of

try:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError('elropt.plots needs matplotlib: pip install "elropt[cli]"') from error

__all__ = [
    "accuracy_against_lr",
    "elr_over_steps",
    "lr_over_steps",
    "relative_grad_figure",
    "run_figure",
    "save",
    "spread_over_steps",
]

SUFFIXES = (".png", ".svg", ".pdf")
MARKERS = "osD^vPX"
DEPTH = ListedColormap(depth_colors(256))


def elr_over_steps(ax: Axes, steps: ArrayLike, elrs: ArrayLike) -> None:
    """Effective learning rate of every layer over the steps, log scale, coloured by depth.

    Args:
        ax: where to draw; a colorbar is put beside it.
        steps: [T].
        elrs: [T, L], rad; L layers from the first to the last. What is not positive and finite leaves a gap.

    Raises:
        ValueError: shapes that do not fit.
    """
    steps, elrs = _columns(steps, elrs, ndim=2)
    depth = elrs.shape[1]
    ax.set_yscale("log")
    ax.set_prop_cycle(color=depth_colors(depth))
    ax.plot(steps, _positive(elrs), linewidth=1.2, marker=_marker(steps))
    _reach(ax, steps, elrs, below=1.3)
    ax.set_ylabel(ELR)
    _finish_steps(ax)
    if depth > 1:
        bar = ax.figure.colorbar(ScalarMappable(Normalize(1, depth), DEPTH), ax=ax, pad=0.02, aspect=30)
        bar.set_label("layer, first to last")
        bar.locator = MaxNLocator(6, integer=True)
        bar.outline.set_visible(False)


def spread_over_steps(ax: Axes, spreads: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
    """ELR spread over the steps, log scale, one line for each run.

    Args:
        ax: where to draw.
        spreads: name of a run → (steps [T], spreads [T]). With a single run there is no legend.

    Raises:
        ValueError: shapes that do not fit.
    """
    ax.set_yscale("log")
    for index, (name, (steps, spread)) in enumerate(spreads.items()):
        steps, spread = _columns(steps, spread, ndim=1)
        color, line = _style(index)
        ax.plot(steps, _positive(spread), line, label=name, color=color, marker=_marker(steps))
        _reach(ax, steps, spread, below=1)
    ax.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    ax.set_ylabel("ELR spread (max / min)")
    _plain_numbers(ax)
    _finish_steps(ax)
    if len(spreads) > 1:
        ax.legend(frameon=False)


def lr_over_steps(ax: Axes, steps: ArrayLike, lrs: ArrayLike) -> None:
    """Applied learning rate over the steps: one line if all layers have the same one, else coloured by depth.

    Args:
        ax: where to draw.
        steps: [T].
        lrs: [T, L], the group's lr times the factor of the rule.

    Raises:
        ValueError: shapes that do not fit.
    """
    steps, lrs = _columns(steps, lrs, ndim=2)
    shared = shared_values(lrs)
    ax.set_prop_cycle(color=["0.2"] if shared is not None else depth_colors(lrs.shape[1]))
    ax.plot(steps, lrs if shared is None else shared, linewidth=1.2, marker=_marker(steps))
    ax.set_ylim(bottom=0)
    ax.set_ylabel(APPLIED_LR)
    _finish_steps(ax)


def accuracy_against_lr(
    ax: Axes,
    results: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
    *,
    xlabel: str = "learning rate",
) -> None:
    """Accuracy against the learning rate, log scale, a line with a band for each optimizer.

    Draw learning rates of different units (see `ELRSGD`) on different axes.

    Args:
        ax: where to draw.
        results: name of an optimizer → (lrs, mean, low, high), each [N], in any order of lr. low and high bound the
            band, for example the worst and the best seed. NaN leaves a gap.
        xlabel: name and unit of the learning rates.

    Raises:
        ValueError: shapes that do not fit, or learning rates that are not positive.
    """
    ax.set_xscale("log")
    for index, (name, (lrs, *curves)) in enumerate(results.items()):
        curves = np.stack([np.asarray(curve, dtype=np.float64) for curve in curves], axis=-1)
        lrs, curves = _columns(lrs, curves, ndim=2)
        if not (lrs > 0).all():
            raise ValueError(
                f"the learning rates of {name!r} must be positive on a log axis, got {lrs.min()}"
            )
        order = np.argsort(lrs)
        lrs, (mean, low, high) = lrs[order], curves[order].T
        color, line = _style(index)
        ax.plot(
            lrs, mean, line, label=name, color=color, marker=MARKERS[index % len(MARKERS)], markersize=4.5
        )
        ax.fill_between(lrs, low, high, color=color, alpha=0.15, linewidth=0)
    ax.set(xlabel=xlabel, ylabel="test accuracy")
    _finish(ax)
    ax.legend(frameon=False)


def run_figure(run: RunHistory) -> Figure:
    """A recorded run, one panel above the other: ELR of every layer, the angle that it turned by, the spread of both,
    the weight norm, and the applied learning rate. A dashed line is where a rule had handed over. What was not recorded
    has no panel."""
    quantities = layer_quantities(run)
    turns = [quantity for quantity in quantities if quantity.turns]
    heights = [*[2] * len(turns), 1, *[2] * (len(quantities) - len(turns)), 1]
    fig = Figure(figsize=(7.5, 0.5 + 1.75 * sum(heights)), layout="constrained")
    axes = list(fig.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    middle, bottom = axes.pop(len(turns)), axes.pop()
    for ax, quantity in zip(axes, quantities, strict=True):
        elr_over_steps(ax, run.steps, quantity.values)
        ax.set_ylabel(quantity.title)
        _plain_numbers(ax)
    spread_over_steps(middle, {q.key: (run.steps, spread_of(q.values)) for q in turns})
    if any(q.title != ELR for q in turns):
        middle.set_ylabel(SPREAD)
    lr_over_steps(bottom, run.steps, run.applied_lr)
    for ax in (*axes, middle, bottom):
        for span in rule_spans(run):
            if span.handed_over is not None:
                ax.axvline(span.handed_over, color=HAND_OVER_COLOR, linewidth=1, linestyle="--")
    for ax in (*axes, middle):
        ax.set_xlabel("")
    fig.align_ylabels()
    return fig


def relative_grad_figure(relative_grads: ArrayLike) -> Figure:
    """What `elropt.dynamics.simulate` returns, [steps + 1, L]: E of every layer, and below it the spread."""
    E = np.asarray(relative_grads, dtype=np.float64)
    steps = np.arange(len(E))
    fig = Figure(figsize=(7.5, 6), layout="constrained")
    top, bottom = fig.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    elr_over_steps(top, steps, E)
    top.set(xlabel="", ylabel="E = ‖g‖ / ‖w‖ (1/lr)")
    spread_over_steps(bottom, {"run": (steps, E.max(axis=1) / E.min(axis=1))})
    fig.align_ylabels()
    return fig


def save(fig: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF; missing folders are made.

    Raises:
        ValueError: another suffix.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def check_suffix(path: Path) -> None:
    """Raises ValueError if `save` does not write files of this name."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path.name!r} has the suffix {path.suffix!r}; use one of {', '.join(SUFFIXES)}")


def _columns(
    x: ArrayLike, values: ArrayLike, *, ndim: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x [T] and values [T] or [T, L] as float64."""
    x, values = np.asarray(x, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or values.ndim != ndim or len(x) != len(values) or values.size == 0:
        wanted = "[T]" if ndim == 1 else "[T, L]"
        raise ValueError(
            f"need T > 0 points [T] and values {wanted}, got {list(x.shape)} and {list(values.shape)}"
        )
    return x, values


def _positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _reach(
    ax: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], *, below: float, above: float = 1.3
) -> None:
    """Let a log axis reach beyond the values by these factors: if all are equal, rounding errors would fill it."""
    shown = values[np.isfinite(values) & (values > 0)]
    if shown.size:
        ax.update_datalim([(steps[0], shown.min() / below), (steps[0], shown.max() * above)])


def _style(index: int) -> tuple[str, str]:
    """Colour and kind of the line. When the colours are used up, they come again, dashed."""
    return COLORS[index % len(COLORS)], ("-", "--", ":")[index // len(COLORS) % 3]


def _marker(steps: NDArray[np.float64]) -> str:
    """A marker for a single point, through which a line is invisible."""
    return "o" if len(steps) == 1 else ""


def _plain_numbers(ax: Axes) -> None:
    """Numbers such as 0.01 and 20 at a log axis, also between decades if there are few."""
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def _finish_steps(ax: Axes) -> None:
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _finish(ax)


def _finish(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.02)
