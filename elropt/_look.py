"""What the tables, plots and pages of the `elropt` command share: the colour of a layer, the names of quantities, and
how numbers are written."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .run_history import RunHistory

__all__ = [
    "ANGLE",
    "APPLIED_LR",
    "COLORS",
    "ELR",
    "HAND_OVER_COLOR",
    "SPREAD",
    "WEIGHT_NORM",
    "LayerQuantity",
    "depth_colors",
    "layer_colors",
    "layer_quantities",
    "shared_values",
    "short",
]

ELR = "effective learning rate (rad)"
ANGLE = "angle of the step (rad)"
SPREAD = "spread (max / min)"
WEIGHT_NORM = "weight norm ‖w‖"
APPLIED_LR = "applied learning rate"

# Okabe & Ito, "Color Universal Design" (2008), without its yellow, which is too pale for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Ten equidistant colours of viridis (Smith & van der Walt, 2015).
VIRIDIS = (
    *("#440154", "#482878", "#3e4989", "#31688e", "#26828e"),
    *("#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
)
Background = Literal["light", "dark"]
# Without what is too pale for lines on white, or too dark on black.
DEPTH_COLORS: dict[Background, tuple[str, ...]] = {"light": VIRIDIS[:-1], "dark": VIRIDIS[3:]}
HAND_OVER_COLOR = "#D55E00"
UNTRACKED_COLOR = "#8c959f"  # visible on both


def layer_colors(tracked: ArrayLike, background: Background = "light") -> list[str]:
    """Colours of layers as "#rrggbb": by depth, the first one dark; grey if they are not tracked.

    Args:
        tracked: whether each layer is tracked, [L], from the first to the last. If none is, all are by depth.
        background: what they are drawn on.
    """
    tracked = np.asarray(tracked, dtype=np.bool_)
    if not tracked.any():
        tracked = ~tracked
    by_depth = iter(depth_colors(int(tracked.sum()), background))
    return [next(by_depth) if each else UNTRACKED_COLOR for each in tracked]


def depth_colors(count: int, background: Background = "light") -> list[str]:
    """The colours of `count` layers that are all tracked."""
    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in DEPTH_COLORS[background]])
    places = np.linspace(0, len(anchors) - 1, count)
    channels = [np.interp(places, np.arange(len(anchors)), channel) for channel in anchors.T]
    return ["#" + "".join(f"{round(value):02x}" for value in rgb) for rgb in zip(*channels, strict=True)]


def short(value: float) -> str:
    """Three significant digits; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3g}"


class LayerQuantity(NamedTuple):
    """A quantity that every layer has, over a run.

    Attributes:
        key: its short name.
        title: its name with its unit.
        values: [T, L]; NaN where it was not recorded.
        turns: whether it says how far a layer turns, so that its spread over the layers is drawn, too.
    """

    key: str
    title: str
    values: NDArray[np.float64]
    turns: bool = True


def layer_quantities(run: RunHistory) -> list[LayerQuantity]:
    """What is drawn on a log axis, in this order; first what has a spread. What was not recorded is left out."""
    angle = np.zeros((0, 0)) if run.angle is None else run.angle
    quantities = (
        LayerQuantity("ELR", ELR, run.elr),
        LayerQuantity("angle", ANGLE, angle),
        LayerQuantity("norm", WEIGHT_NORM, run.weight_norm, turns=False),
    )
    return [quantity for quantity in quantities if np.isfinite(quantity.values).any()]


def shared_values(values: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """[T] if all layers of values [T, L] have the same ones, up to rounding, where they have any; else None."""
    recorded = np.ma.masked_invalid(values)
    mean = recorded.mean(axis=1, keepdims=True)
    if not np.ma.allclose(recorded, mean, rtol=1e-6, atol=0):
        return None
    return np.ma.filled(mean, np.nan)[:, 0]
