"""What the study of the three regimes concludes: a run's regime from its trace, borders, what stepping down gains."""

from __future__ import annotations

import collections
import math
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from benchmarks.common.statistics import geometric_interval, grouped, interval, paired
from benchmarks.common.sweep import Row

Regime: TypeAlias = Literal["convergence", "chaotic equilibrium", "divergence", "undecided"]
ORDER = ("convergence", "chaotic equilibrium", "divergence")  # as the learning rate rises

FRESH_SEEDS = 100  # the seeds of the last stage start here


class Bounds(NamedTuple):
    """What `classify` compares with. Levels of a loss are in units of the loss of guessing.

    falling: in units of the third quarter's level; the last quarter's is still falling if it is below.
    small: of a loss that is on its way to zero, if it is falling and the gradient norm is, too.
    arrived: of a loss that is there, falling or not.
    unlearned: of a loss from which on the outputs say next to nothing about the labels.
    forgotten: −ln of the first weights' share in the last ones from which on standing still means equilibrium.
    """

    falling: float = 0.9
    small: float = 0.1
    arrived: float = 0.01
    unlearned: float = 0.9
    forgotten: float = 1.0


BOUNDS = Bounds()
OTHER_BOUNDS = {  # tried one at a time, to see how much hangs on each
    "falling": (0.8, 0.95),
    "small": (0.05, 0.2),
    "arrived": (0.005, 0.02),
    "unlearned": (0.8, 0.95),
    "forgotten": (0.5, 2.0),
}


def classify(
    loss: ArrayLike,
    chance: ArrayLike,
    sphere_grad_norm: ArrayLike,
    sphere_lr: float,
    steps: int,
    bounds: Bounds = BOUNDS,
) -> Regime:
    """The regime of a run at a constant learning rate, from its trace.

    What counts is the level of the last quarter of the run, its median, against that of the third:
    - "convergence": the loss has come near zero, or is small and keeps falling, and the gradient norm with it;
    - "divergence": the loss is that of guessing, or something overflowed;
    - "chaotic equilibrium": the loss stands still in between;
    - "undecided": cut short. The loss is still falling and not yet small, or the run has not turned far enough for
      standing still to mean anything. A step of tangent t leaves 1/√(1 + t²) of the weights in the next ones, so of the
      first weights exp(−½·Σ ln(1 + t²)) is left in the last; that has to be less than 1/e.

    Only ratios of losses and angles enter, so units, the length of the trace and the width of the net do not.

    Args:
        loss, sphere_grad_norm: means over equal stretches of the run, [T] with T ≥ 8. What is not finite (or None) is
            divergence.
        chance: the loss of guessing, > 0, [T] or one number.
        sphere_lr: the learning rate on the unit sphere.
        steps: of the whole run.
        bounds: how near is near.

    Raises:
        ValueError: shapes that do not fit, or fewer than 8 points.

    Source: the regimes are those of source B (Kodryan et al., NeurIPS 2022); the rule that names them is ours.
    """
    loss, c = np.asarray(loss, dtype=np.float64), np.asarray(sphere_grad_norm, dtype=np.float64)
    chance = np.asarray(chance, dtype=np.float64)
    if loss.ndim != 1 or c.shape != loss.shape or chance.shape not in ((), loss.shape) or len(loss) < 8:
        raise ValueError(
            f"need loss and sphere_grad_norm of the same length of at least 8, and chance of that length or a number; "
            f"got shapes {loss.shape}, {c.shape} and {chance.shape}: record more stretches of the run"
        )
    if not (np.isfinite(loss).all() and np.isfinite(c).all() and np.isfinite(chance).all()):
        return "divergence"
    level = end(loss) / end(np.broadcast_to(chance, loss.shape))
    loss_falls, c_falls = (is_falling(trace, bounds.falling) for trace in (loss, c))
    if level < bounds.arrived or (level < bounds.small and loss_falls and c_falls):
        return "convergence"
    if steps * np.log1p((sphere_lr * c) ** 2).mean() / 2 < bounds.forgotten:
        return "undecided"
    if level > bounds.unlearned:
        return "divergence"
    return "undecided" if loss_falls else "chaotic equilibrium"


def end(trace: ArrayLike) -> float:
    """The median of the last quarter."""
    return quarter_levels(trace)[-1]


def is_falling(trace: ArrayLike, bound: float) -> bool:
    """Whether the last quarter's level is below `bound` times the third's."""
    *_, third, last = quarter_levels(trace)
    return last < bound * third


def quarter_levels(trace: ArrayLike) -> list[float]:
    """The medians of the four quarters."""
    quarters = np.array_split(np.asarray(trace, dtype=np.float64), 4)
    return [float(np.median(quarter)) for quarter in quarters]


def regime_of(row: Row, bounds: Bounds = BOUNDS, share: float = 1.0) -> Regime:
    """The regime of a row, or of the first `share` of its run."""
    length = math.ceil(share * len(row["loss"]))
    loss, chance, c = (row[key][:length] for key in ("loss", "chance", "sphere_grad_norm"))
    return classify(loss, chance, c, sphere_lr_of(row), round(share * row["steps"]), bounds)


def summarize(rows: list[Row]) -> dict[str, Any]:
    """For every net: levels and regimes by learning rate, the borders, and what stepping down gains. Errors in %."""
    return {model: summarize_net(of_net) for model, of_net in grouped(rows, model_of).items()}


def summarize_net(rows: list[Row]) -> dict[str, Any]:
    """Conclusions on one net.

    after: the learning rate that is stepped down to. gain: test error of the best constant learning rate minus that of
    the best step-down, fresh seeds, paired."""
    first, final = ([row for row in rows if is_final(row) == last] for last in (False, True))
    chosen = {"constant": constant(final), "step_down": step_downs(final)}
    tests = {
        name: {row["spec"]["seed"]: 100 * row["test_error"] for row in of_name}
        for name, of_name in chosen.items()
    }
    return {
        "constant": {key_of(lr): levels(of_lr) for lr, of_lr in sorted(by_lr(constant(first)).items())},
        "borders": borders(constant(first)),
        "renamed": renamed(constant(first)),
        "step_down": {
            "after": next((row["spec"]["sphere_lr_after"] for row in step_downs(first)), None),
            "starts": {
                key_of(lr): {
                    "loss": geometric_interval([end(row["loss"]) for row in of_lr]),
                    "val_error": interval([100 * row["val_error"] for row in of_lr]),
                }
                for lr, of_lr in sorted(by_lr(step_downs(first)).items())
            },
        },
        "final": {
            name: {
                "sphere_lr": sphere_lr_of(of_name[0]),
                "test_error": interval([*tests[name].values()]),
            }
            for name, of_name in chosen.items()
            if of_name
        },
        "gain": paired(tests["constant"], tests["step_down"]),
    }


def levels(rows: list[Row]) -> dict[str, Any]:
    """At the end of runs that differ in their seeds only; loss, c and turn as geometric means."""
    c = [end(row["sphere_grad_norm"]) for row in rows]
    return {
        "regimes": [regime_of(row) for row in rows],
        "loss": geometric_interval([end(row["loss"]) for row in rows]),
        "chance": geometric_interval([end(row["chance"]) for row in rows]),
        "train_error": interval([100 * end(row["error"]) for row in rows]),
        "val_error": interval([100 * row["val_error"] for row in rows]),
        "test_error": interval([100 * row["test_error"] for row in rows]),
        "sphere_grad_norm": geometric_interval(c),
        "turn": geometric_interval([sphere_lr_of(row) * value for row, value in zip(rows, c, strict=True)]),
    }


def borders(rows: list[Row]) -> dict[str, Any]:
    """Learning rates at which regimes change, with intervals over seeds.

    convergence: between the largest that converges and the next above it that is named otherwise; divergence: between
    the largest that does not diverge and the next. An undecided run is on neither side of the first border, and below
    the second: it has learned something, or hardly moved. at: the geometric mean of both sides, by seed. low, high: the
    smallest learning rate below and the largest above it, over all seeds. disordered: seeds in which a regime comes
    after one of larger learning rates.
    """
    found: dict[str, list[tuple[float, float]]] = {"convergence": [], "divergence": []}
    disordered = 0
    for of_seed in grouped(rows, lambda row: row["spec"]["seed"]).values():
        named = {sphere_lr_of(row): regime_of(row) for row in of_seed}
        ranks = [ORDER.index(named[lr]) for lr in sorted(named) if named[lr] != "undecided"]
        disordered += ranks != sorted(ranks)
        sides = {
            "convergence": (["convergence"], ["chaotic equilibrium", "divergence"]),
            "divergence": (["convergence", "chaotic equilibrium", "undecided"], ["divergence"]),
        }
        for name, (low_side, high_side) in sides.items():
            below = max((lr for lr in named if named[lr] in low_side), default=math.nan)
            above = min((lr for lr in named if lr > below and named[lr] in high_side), default=math.nan)
            found[name].append((below, above))
    result: dict[str, Any] = {"disordered": disordered}
    for name, pairs in found.items():
        ends = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        result[name] = {
            "at": geometric_interval(np.sqrt(ends.prod(1))),
            "low": float(np.fmin.reduce(ends[:, 0])),  # fmin and fmax leave NaN out
            "high": float(np.fmax.reduce(ends[:, 1])),
        }
    return result


def renamed(rows: list[Row]) -> dict[str, dict[str, int]]:
    """How far names depend on the bounds, and on the length of the run: of how many runs they change to another regime,
    and from or to "undecided", with one bound as given, or if the run had ended after three quarters."""
    names = {"3/4 of the run": [regime_of(row, share=0.75) for row in rows]}
    for bound, values in OTHER_BOUNDS.items():
        for value in values:
            names[f"{bound} {value:g}"] = [regime_of(row, BOUNDS._replace(**{bound: value})) for row in rows]
    given = [regime_of(row) for row in rows]
    result = {}
    for change, others in names.items():
        pairs = [pair for pair in zip(given, others, strict=True) if pair[0] != pair[1]]
        undecided = sum("undecided" in pair for pair in pairs)
        result[change] = {"regime": len(pairs) - undecided, "undecided": undecided, "of": len(rows)}
    return result


def main_regimes(rows: list[Row]) -> dict[float, str]:
    """The most frequent regime at each constant learning rate, ascending."""
    return {
        lr: collections.Counter(map(regime_of, of_lr)).most_common(1)[0][0]
        for lr, of_lr in sorted(by_lr(constant(rows)).items())
    }


def by_lr(rows: list[Row]) -> dict[float, list[Row]]:
    """Rows by their (first) learning rate."""
    return grouped(rows, sphere_lr_of)


def constant(rows: list[Row]) -> list[Row]:
    """The runs at a constant learning rate."""
    return [row for row in rows if row["spec"]["sphere_lr_after"] is None]


def step_downs(rows: list[Row]) -> list[Row]:
    """The runs whose learning rate steps down."""
    return [row for row in rows if row["spec"]["sphere_lr_after"] is not None]


def is_final(row: Row) -> bool:
    """Whether a row is of the last stage, whose seeds are fresh."""
    return row["spec"]["seed"] >= FRESH_SEEDS


def model_of(row: Row) -> str:
    """The net's name."""
    return row["spec"]["net"]["model"]


def sphere_lr_of(row: Row) -> float:
    """The (first) learning rate."""
    return row["spec"]["sphere_lr"]


def key_of(sphere_lr: float) -> str:
    """A learning rate as the key of a JSON object."""
    return f"{sphere_lr:g}"


def mean(rows: list[Row], key: str) -> float:
    """Mean over the rows of one of their numbers."""
    return float(np.mean([row[key] for row in rows]))
