"""What the study of weight dynamics concludes: from the rows of `dynamics` to numbers with intervals over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from benchmarks.common.statistics import Interval, geometric_interval, grouped, interval
from benchmarks.common.sweep import Row

SMOOTHING = (0.0, 0.5, 0.9)  # weights of the past in the forecasts of c
BINS = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, math.inf)  # of the largest λE of a step
TOLERANCE = math.log(1.3)  # a change of 30 %


def summarize(rows: list[Row]) -> dict[str, Any]:
    """All conclusions; see the tables for what they mean. Intervals are over seeds."""
    plain = trajectories(rows, momentum=False)
    return {
        "trajectories": {
            model: {label: summarize_runs(runs) for label, runs in grouped(of_model, _lr_label).items()}
            for model, of_model in grouped(plain, model_of).items()
        },
        "largest_rounding": max((row["rounding"] for row in plain), default=None),
        "one_step": one_step_law(plain),
        "change_of_c": change_of_c(plain),
        "turn": {
            model: summarize_turns(turns) for model, turns in grouped(of_kind(rows, "turn"), model_of).items()
        },
        "critical": {
            model: summarize_critical(found)
            for model, found in grouped(of_kind(rows, "critical"), model_of).items()
        },
        "explosion": {
            f"{model}, batch {batch}": {
                key: interval([row[f"{key}_factor"] for row in of_net]) for key in ("gradient", "c")
            }
            for (model, batch), of_net in grouped(
                of_kind(rows, "explosion"), lambda row: (model_of(row), row["spec"]["net"]["batch_size"])
            ).items()
        },
        "momentum": summarize_momentum(trajectories(rows, momentum=True)),
    }


def summarize_runs(runs: list[Row]) -> dict[str, Any]:
    """Of runs that differ in their seeds: start, end, and the model's end."""

    def end(key: str) -> Interval:
        return interval([row[key][-1] for row in runs])

    return {
        "runs": len(runs),
        "ended_early": sum(not row["finite"] for row in runs),
        "steps": max(row["steps_measured"] for row in runs),
        "max_lr_E": geometric_interval([row["max_lr_E"][0] for row in runs]),
        "of_monotone": geometric_interval([row["lr"] / row["monotone"] for row in runs]),
        "error": geometric_interval([error_at_end(row, "model") for row in runs]),
        "ratio_error": geometric_interval([math.exp(row["model_error_individual"][-1]) for row in runs]),
        "ratio_error_common": geometric_interval(
            [math.exp(row["common_error_individual"][-1]) for row in runs]
        ),
        "log_std_start": interval([row["log_std"][0] for row in runs]),
        "log_std_end": end("log_std"),
        "model_log_std_end": end("model_log_std"),
        "common_log_std_end": end("common_log_std"),
        "half_life": _median_or_none([half_life(row["at"], row["log_std"]) for row in runs]),
        "model_half_life": _median_or_none([half_life(row["at"], row["model_log_std"]) for row in runs]),
        "loss_end": end("loss"),
    }


def one_step_law(runs: list[Row]) -> dict[str, Any]:
    """The ratio law over one step, per net and for all, by the largest λE of the step (the intervals of `BINS`).

    Medians over steps, intervals over seeds: turn is the standard deviation over layers of ln E' − ln E'(model) on the
    same batch, noise what the next batch adds. within: share of steps with turn within 30 %. explained: share of the
    sum of squares of the changes of ln ratios (same batch) that the law explains; below 0 it were better to say that
    nothing changes. None where there are no steps.
    """
    names = ("max_lr_E", "turn_individual", "noise_individual", "step_individual")
    found = {}
    for model, of_model in {**grouped(runs, model_of), "all": runs}.items():
        by_seed = {
            seed: np.array([np.concatenate([row[name] for row in of_seed]) for name in names], dtype=float)
            for seed, of_seed in grouped(of_model, lambda row: row["spec"]["seed"]).items()
        }
        found[model] = []
        for low, high in itertools.pairwise(BINS):
            chosen = [steps[1:, (low <= steps[0]) & (steps[0] < high)] for steps in by_seed.values()]
            chosen = [steps for steps in chosen if steps.size]
            turn, _, whole = np.concatenate([np.zeros((3, 0)), *chosen], axis=1)
            found[model].append(
                {
                    "steps": turn.size,
                    "turn": interval([np.median(steps[0]) for steps in chosen]),
                    "noise": interval([np.median(steps[1]) for steps in chosen]),
                    "within": interval([np.mean(steps[0] <= TOLERANCE) for steps in chosen]),
                    "explained": float(1 - (turn**2).sum() / (whole**2).sum()),
                }
                if turn.size
                else None
            )
    return found


def change_of_c(runs: list[Row]) -> dict[str, Any]:
    """Per net: how much of the change of ln c all layers share, as a share of its mean square; over one step by turning
    ("turn"), from batch to batch ("noise"), and over whole runs, with λE ≤ 1 at every recorded step and others.
    forecast: error of ln c one step ahead by the weights of `SMOOTHING`, relative to the first of them.
    """

    def shared(pairs: Sequence[tuple[float, float]]) -> float | None:
        common, individual = np.square(np.array(pairs, dtype=float)).sum(0) if pairs else (0.0, 0.0)
        return float(common / (common + individual)) if common + individual > 0 else None

    found = {}
    for model, of_model in grouped(runs, model_of).items():
        columns: dict[str, Any] = {}
        for name in ("turn", "noise"):
            pairs = [
                pair
                for row in of_model
                for pair in zip(row[f"{name}_common"], row[f"{name}_individual"], strict=True)
            ]
            columns[name] = shared(pairs)
        ends = [(row["c_common"][-1], row["c_individual"][-1], max(row["max_lr_E"]) <= 1) for row in of_model]
        columns["run_small"] = shared([end[:2] for end in ends if end[2]])
        columns["run_large"] = shared([end[:2] for end in ends if not end[2]])
        relative = np.array([row["forecast"] for row in of_model], dtype=float)
        columns["forecast"] = [geometric_interval(column) for column in (relative / relative[:, :1]).T]
        found[model] = columns
    return found


def summarize_turns(turns: list[Row]) -> dict[str, Any]:
    """By angle, and the angle at which c of a layer that turns alone, and with all others, has changed by 30 %."""
    angles = turns[0]["spec"]["angles"]
    keys = ("own", "others", "all_common", "all_individual")
    found: dict[str, Any] = {"angles": angles}
    for key in keys:
        found[key] = [interval(values) for values in np.array([row[key] for row in turns], dtype=float).T]
    for key, columns in {"own": ["own"], "all": ["all_common", "all_individual"]}.items():
        reached = []
        for row in turns:
            total = np.sqrt(sum(np.square(np.array(row[column], dtype=float)) for column in columns))
            reached.append(first_crossing(angles, total, TOLERANCE))
        found[f"{key}_30_percent"] = geometric_interval(reached)
    return found


def summarize_critical(found: list[Row]) -> dict[str, Any]:
    """Per number of steps and kind of batches: the learning rate with the smallest spread, and the first above it at
    which the spread is larger than at the start; each over balance and over monotone, with the model's best."""
    result: dict[str, Any] = {
        "initial_spread": geometric_interval([row["initial_spread"] for row in found]),
        "balance_over_monotone": geometric_interval([row["balance"] / row["monotone"] for row in found]),
    }
    for name, (index, after) in itertools.product(("same", "fresh", "alone"), enumerate(found[0]["after"])):
        best, model_best, grows, smallest, at_formula = [], [], [], [], {"balance": [], "monotone": []}
        for row in found:
            lrs = np.array(row["lrs"])
            ratio, model = (np.array(row[key], float)[:, index] for key in (f"{name}_spread", "model_spread"))
            if np.isnan(ratio).all():  # no learning rate left a finite spread
                for values in (best, model_best, grows, smallest, *at_formula.values()):
                    values.append(np.nan)
                continue
            best.append(lrs[np.nanargmin(ratio)])
            smallest.append(np.nanmin(ratio))
            model_best.append(lrs[np.nanargmin(model)])
            from_best = slice(int(np.nanargmin(ratio)), None)
            grows.append(first_crossing(lrs[from_best], ratio[from_best], 1.0))
            for formula, values in at_formula.items():
                values.append(math.exp(np.interp(math.log(row[formula]), np.log(lrs), np.log(ratio))))
        balance, monotone = (np.array([row[formula] for row in found]) for formula in ("balance", "monotone"))
        result[f"{name} {after}"] = {
            "best_over_balance": geometric_interval(best / balance),
            "best_over_monotone": geometric_interval(best / monotone),
            "model_best_over_balance": geometric_interval(model_best / balance),
            "grows_over_balance": geometric_interval(grows / balance),
            "grows_over_monotone": geometric_interval(grows / monotone),
            "never_grows": int(np.isnan(grows).sum()),
            "smallest": geometric_interval(smallest),
            "at_balance": geometric_interval(at_formula["balance"]),
            "at_monotone": geometric_interval(at_formula["monotone"]),
        }
    return result


def summarize_momentum(runs: list[Row]) -> dict[str, Any]:
    """Per net and learning rate: ln ‖w‖² gained over the measured, and typical errors of E, by closure."""
    found: dict[str, Any] = {}
    for (model, label), of_net in grouped(runs, lambda row: (model_of(row), _lr_label(row))).items():
        growth = {
            name: np.array([row["growth"][name] for row in of_net], dtype=float)
            for name in ("measured", "aligned", "independent", "cosine")
        }
        measured = growth.pop("measured")
        errors = {"aligned": "model", "independent": "independent"}
        found[f"{model}, lr {label}"] = {
            "cosine": interval(np.array([row["cosine"] for row in of_net], dtype=float)),
            "growth": {name: geometric_interval(values / measured) for name, values in growth.items()},
            "measured_growth": geometric_interval(measured),
            "error": {
                name: geometric_interval([error_at_end(row, key) for row in of_net])
                for name, key in errors.items()
            },
            "log_std_end": interval([row["log_std"][-1] for row in of_net]),
            "aligned_log_std_end": interval([row["model_log_std"][-1] for row in of_net]),
            "independent_log_std_end": interval([row["independent_log_std"][-1] for row in of_net]),
        }
    return found


def half_life(steps: ArrayLike, values: ArrayLike) -> float:
    """The step from which on values stay at most half of the first; NaN if the last does not. Between steps linear."""
    steps, values = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if not 2 * values[-1] <= values[0] > 0:
        return math.nan
    above = int(np.flatnonzero(values > values[0] / 2)[-1])
    share = (values[above] - values[0] / 2) / (values[above] - values[above + 1])
    return float(steps[above] + share * (steps[above + 1] - steps[above]))


def first_crossing(x: ArrayLike, y: ArrayLike, level: float) -> float:
    """The first positive x, linear in ln x and ln y between the points, at which y exceeds `level`; NaN if none does.

    A y that is not finite counts as beyond the level, from its own x on.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    beyond = np.flatnonzero(~(y <= level))
    if not beyond.size:
        return math.nan
    index = int(beyond[0])
    if index == 0 or not np.isfinite(y[index]):
        return float(x[index])
    (x0, x1), (y0, y1) = np.log(x[index - 1 : index + 1]), np.log(y[index - 1 : index + 1])
    return float(np.exp(x0 + (x1 - x0) * (math.log(level) - y0) / (y1 - y0)))


def error_at_end(row: Row, name: str) -> float:
    """By which factor a prediction of E is off at the end, root mean square over layers."""
    return math.exp(math.hypot(row[f"{name}_error_common"][-1], row[f"{name}_error_individual"][-1]))


def trajectories(rows: list[Row], *, momentum: bool) -> list[Row]:
    """Runs that went on for at least one step, with or without momentum."""
    runs = [row for row in of_kind(rows, "trajectory") if "at" in row]
    return [row for row in runs if (row["spec"]["momentum"] > 0) == momentum]


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    """The rows of one kind of spec."""
    return [row for row in rows if row["spec"]["kind"] == kind]


def model_of(row: Row) -> str:
    """The net."""
    return row["spec"]["net"]["model"]


def _lr_label(row: Row) -> str:
    return f"{row['spec']['lr']:g}{' × monotone' if row['spec']['relative'] else ''}"


def _median_or_none(values: Sequence[float]) -> float | None:
    """The median, NaN (never reached) counting as infinite; None if the median is infinite."""
    median = float(np.median([math.inf if math.isnan(value) else value for value in values]))
    return median if math.isfinite(median) else None
