"""What a recorded run shows, in words: findings with the steps, the layers and the figures. With NumPy alone."""

from __future__ import annotations

import dataclasses
from typing import Literal

from .run_history import RunHistory

__all__ = ["TITLES", "Finding", "Kind", "Severity", "diagnose"]

Severity = Literal["note", "warning"]
Kind = Literal[
    "not_finite",
    "large_angle",
    "update_spike",
    "small_angle",
    "uneven_angles",
    "norm_growth",
    "idle_decay",
    "equilibrium",
    "transient",
    "rule",
]
TITLES: dict[Kind, str] = {
    "not_finite": "Not finite",
    "large_angle": "A layer turns too far",
    "update_spike": "An update spike",
    "small_angle": "A layer hardly turns",
    "uneven_angles": "Layers turn by very different angles",
    "norm_growth": "Norms grow without bound",
    "idle_decay": "Weight decay does nothing",
    "equilibrium": "Equilibrium",
    "transient": "Not in equilibrium",
    "rule": "What the rule did",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a run shows.

    Attributes:
        kind: a key of `TITLES`.
        steps: the first and the last step concerned.
        layers: names of the layers concerned.
        what: one or two sentences, with the steps and figures.
        advice: what to do, with a learning rate or decay as a number where one follows; may be empty.
        severity: a "warning" is worth a change of the run, a "note" is not.
    """

    kind: Kind
    steps: tuple[int, int]
    layers: tuple[str, ...]
    what: str
    advice: str
    severity: Severity


def diagnose(run: RunHistory) -> list[Finding]:
    """What the run shows: warnings first, then notes, each by its first step.

    Args:
        run: of `read_run`, best with ``all_layers=True``.
    """
    found = [*_large_angles(run)]
    return sorted(found, key=lambda finding: (finding.severity != "warning", finding.steps))


def _large_angles(run: RunHistory) -> list[Finding]:
    if run.angle is None:
        return []
    found = []
    for name, angles in zip(run.names, run.angle.T, strict=True):
        large = angles > 0.3
        if large.any():
            steps = run.steps[large]
            what = f"{name} turns by up to {angles[large].max():.2g} rad in a step, at step {steps[0]}."
            found.append(
                Finding("large_angle", (int(steps[0]), int(steps[-1])), (name,), what, "", "warning")
            )
    return found
