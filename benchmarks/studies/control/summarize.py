"""What the study concludes from its rows: results, usable learning rates, spread of the angles, pairs compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common.statistics import paired, usable_range
from benchmarks.common.sweep import Row
from benchmarks.common.training import FIRST_STEPS
from benchmarks.studies.comparison import USABLE, Entry, best_sgd, by_task, entries

# (question, method, what it is compared with)
PAIRS = (
    ("update against gradient", "uniform-update", "uniform"),
    ("update against gradient", "angle-update", "angle"),
    ("update against gradient", "equilibrium", "equilibrium-gradient"),
    ("filter against layer", "angle-filter", "angle"),
    ("filter against layer", "angle-update-filter", "angle-update"),
    ("filter against layer", "equilibrium-filter", "equilibrium"),
    ("equilibrium against others", "equilibrium", "equilibrium-unprotected"),
    ("equilibrium against others", "equilibrium", "angle-update"),
    ("equilibrium against others", "equilibrium", "sgd"),
    ("equilibrium against others", "equilibrium", "sgd+linear"),
    ("equilibrium against others", "equilibrium", "adamw+linear"),
    ("equilibrium against others", "equilibrium", "muon+linear"),
    ("with linear warm-up against without", "sgd+linear", "sgd"),
    ("with linear warm-up against without", "adamw+linear", "adamw"),
    ("with linear warm-up against without", "muon+linear", "muon"),
    ("with linear warm-up against without", "equilibrium+linear", "equilibrium"),
    ("controlled against not", "adamh", "adamw"),
    ("controlled against not", "adamh", "adamw+linear"),
    ("controlled against not", "muonh", "muon"),
    ("controlled against not", "muonh", "muon+linear"),
)


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """By task: every method, and every pair of which both are there."""
    return {
        task: {"methods": methods(of_task), "pairs": pairs(of_task)}
        for task, of_task in by_task(entries(rows)).items()
    }


def methods(of_task: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """By method: best lr, results, usable range, spread of the angles. A learning rate is usable if its validation
    score has `USABLE` of the best method's gain over chance."""
    best = max(float(entry.curve.mean.max()) for entry in of_task)
    sgd = best_sgd(of_task)
    result = {}
    for entry in of_task:
        usable = usable_range(entry.curve, entry.chance + USABLE * (best - entry.chance))
        better = (
            None if sgd is None or entry is sgd or not entry.test else paired(entry.test, sgd.test)._asdict()
        )
        result[entry.method] = {
            "unit": entry.unit,
            "best_lr": entry.best_lr,
            "best_lr_at_edge": entry.at_edge,
            "validation": entry.metric.value(float(entry.curve.mean.max())),
            "test": entry.result._asdict() if entry.test else None,
            "better_than_best_sgd": better,
            "usable": None if usable is None else {**usable._asdict(), "width": usable.width},
            "angle_spread": angle_spread(entry.test_rows),
            "seconds": float(np.mean([row["seconds"] for row in entry.test_rows or entry.val_rows])),
        }
    return result


def angle_spread(rows: Sequence[Row]) -> dict[str, float] | None:
    """Largest over smallest angle of the tracked layers at one step, at the recorded steps after the first
    `FIRST_STEPS`, of all runs: median and largest."""
    values = [
        value
        for row in rows
        for step, value in zip(row["trace_steps"], row["angle_spread"], strict=True)
        if step >= FIRST_STEPS and value is not None
    ]
    return {"median": float(np.median(values)), "worst": max(values)} if values else None


def pairs(of_task: Sequence[Entry]) -> list[dict[str, Any]]:
    """For every pair: how much better the first is, by seed, in the metric's unit (above 0: better)."""
    by_name = {entry.method: entry for entry in of_task}
    return [
        {
            "question": question,
            "method": method,
            "against": against,
            "better": paired(by_name[method].test, by_name[against].test)._asdict(),
        }
        for question, method, against in PAIRS
        if method in by_name and against in by_name and by_name[method].test and by_name[against].test
    ]
