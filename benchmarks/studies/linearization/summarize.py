"""What is concluded from the rows of the linearization study: accuracy at equal path length, and the spread of E."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.common.statistics import Interval, grouped, interval, paired
from benchmarks.common.sweep import Row
from benchmarks.studies import comparison

SHARES = (0.75, 0.5, 0.25, 0.1)  # of the full path length, at which accuracies are compared
COLUMNS = ("accuracy", "path_length", "normalized_path_length", "log_std", "spread")
WHEN = ("during", "after")

Point = dict[
    str, Any
]  # of a run: method, seed, when, weight or layers, accuracy in percent, and what `state` measures


def summarize(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """What came out, by task; accuracies are in percent, path lengths not normalized unless it is said.

    learning_rates: the chosen ones by method, and whether they are at the end of their grid.
    relu: the trained ReLU nets that "after" starts from, by method.
    points: by method, when and weight; shallow: by number of ReLU layers.
    at_share: accuracy at shares of the full path length, interpolated, by method, when ("shallow", too) and share, over
    the seeds that reach it. after_minus_during by method, warmup_minus_sgd and sgd_minus_shallow by when: differences
    of these, paired by seed.
    log_std_change: by method and when, standard deviation of ln E under the heaviest penalty minus that without one,
    paired by seed.
    """
    groups = grouped(rows, lambda row: comparison.label(row["spec"]["task"]))
    return {task: _of_task(of_one) for task, of_one in groups.items()}


def _of_task(rows: list[Row]) -> dict[str, Any]:
    linearized, shallow = runs(rows)
    full = linearized[0]["full"]
    by_run = grouped(linearized, lambda point: (point["method"], point["when"]))
    methods = list(dict.fromkeys(method for method, _ in by_run))
    by_run["sgd", "shallow"] = shallow
    reached = {key: at_shares(of_one, full) for key, of_one in by_run.items()}
    chosen = {
        method: comparison.validation_curve(of_one)
        for (_, method), of_one in comparison.by_method(r for r in rows if "part" in r["spec"]).items()
    }
    relu = [{**row["spec"], **row["before"]} for row in rows if row["spec"].get("when") == "after"]
    by_method = grouped(relu, lambda row: row["method"]["name"])
    return {
        "full_path_length": full,
        "full_normalized_path_length": relu[0]["normalized_path_length"],
        "learning_rates": {
            method: {"lr": curve.best_lr, "at_edge": curve.best in (0, len(curve.lrs) - 1)}
            for method, curve in chosen.items()
        },
        "relu": {
            method: means([{**row, "accuracy": 100 * row["accuracy"]} for row in of_one])
            for method, of_one in by_method.items()
        },
        "points": {
            method: {when: _by(by_run[method, when], "weight") for when in WHEN} for method in methods
        },
        "shallow": _by(shallow, "layers", (*COLUMNS, "log_std_at_start")),
        "at_share": {
            method: {
                when: {share: interval(list(v.values()))._asdict() for share, v in of_one.items()}
                for (of_method, when), of_one in reached.items()
                if of_method == method
            }
            for method in methods
        },
        "after_minus_during": {
            method: _differences(reached[method, "after"], reached[method, "during"]) for method in methods
        },
        "warmup_minus_sgd": {
            when: _differences(reached["warmup", when], reached["sgd", when]) for when in WHEN
        },
        "sgd_minus_shallow": {
            when: _differences(reached["sgd", when], reached["sgd", "shallow"]) for when in WHEN
        },
        "log_std_change": {
            method: {when: log_std_change(by_run[method, when])._asdict() for when in WHEN}
            for method in methods
        },
    }


def runs(rows: Iterable[Row]) -> tuple[list[Point], list[Point]]:
    """The points of linearized nets, each with the full path length of its net, and those of shallow ones."""
    linearized: list[Point] = []
    shallow: list[Point] = []
    for row in rows:
        spec = row["spec"]
        for point in row.get("points", ()):
            about = {"method": spec["method"]["name"], "seed": spec["seed"]}
            percent = {**point, "accuracy": 100 * point["accuracy"]}
            if "when" in spec:
                full = row["before"]["path_length"]
                linearized.append({**about, "when": spec["when"], "full": full, **percent})
            else:
                start = {"log_std_at_start": row["log_std_at_start"]}
                shallow.append({**about, "layers": spec["nonlinear"], **start, **percent})
    return linearized, shallow


def means(points: Sequence[Point], columns: Sequence[str] = COLUMNS) -> dict[str, dict[str, float]]:
    """Mean and interval over seeds of each column."""
    return {column: interval([point[column] for point in points])._asdict() for column in columns}


def _by(points: Sequence[Point], key: str, columns: Sequence[str] = COLUMNS) -> dict[str, dict[str, Any]]:
    return {
        f"{value:g}": means(of_one, columns) for value, of_one in grouped(points, lambda p: p[key]).items()
    }


def at_shares(points: Sequence[Point], full: float) -> dict[str, dict[int, float]]:
    """share → seed → accuracy at that share of the full path length, linear between the points of a seed; seeds whose
    points do not lie on both sides are left out. Points of equal path length count with their mean."""
    found: dict[str, dict[int, float]] = {f"{share:g}": {} for share in SHARES}
    for seed, of_seed in grouped(points, lambda point: point["seed"]).items():
        by_length = grouped(of_seed, lambda point: point["path_length"])
        lengths = sorted(by_length)
        accuracies = [np.mean([point["accuracy"] for point in by_length[length]]) for length in lengths]
        for share in SHARES:
            if lengths[0] <= share * full <= lengths[-1]:
                found[f"{share:g}"][seed] = float(np.interp(share * full, lengths, accuracies))
    return found


def log_std_change(points: Sequence[Point]) -> Interval:
    """Standard deviation of ln E under the heaviest penalty minus that under the lightest, paired by seed."""
    weights = sorted({point["weight"] for point in points})
    lightest, heaviest = (
        {point["seed"]: point["log_std"] for point in points if point["weight"] == weight}
        for weight in (weights[0], weights[-1])
    )
    return paired(heaviest, lightest)


def _differences(
    ours: dict[str, dict[int, float]], theirs: dict[str, dict[int, float]]
) -> dict[str, dict[str, float]]:
    return {share: paired(ours[share], theirs[share])._asdict() for share in ours}
