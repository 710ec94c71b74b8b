"""The rules as tests run through them: every form of each, what each must be given, and which have kernels."""

from __future__ import annotations

from typing import Any

import pytest

from elropt import kernels
from elropt.rules import RULES

# (rule, granularity, elr_of); elr_of is None for rules that have one form
FORMS: list[tuple[str | None, str, str | None]] = [
    (rule, granularity, elr_of)
    for rule, spec in RULES.items()
    for granularity in spec.granularities
    for elr_of in ((None,) if spec.decide_update is None else ("gradient", "update"))
]


def needs(rule: str | None, weight_decay: float = 1e-3) -> dict[str, Any]:
    """The arguments without which `ELRSGD` refuses a rule."""
    return {"weight_decay": weight_decay} if RULES[rule].settles else {}


def acts_on_update(rule: str | None, elr_of: str | None = None) -> bool:
    """Whether it controls the angle of the update, not of the gradient."""
    return (elr_of or RULES[rule].elr_of) == "update"


def has_kernels(rule: str | None, elr_of: str | None = None) -> bool:
    """Whether the Triton kernels can compute it."""
    return kernels.has_rule(rule, of_update=acts_on_update(rule, elr_of))


def skip_without_kernels(options: dict[str, Any], rule: str | None, elr_of: str | None = None) -> None:
    """Skip a test with ``fused=True`` in its options, of a form that has no kernels."""
    if options.get("fused") and not has_kernels(rule, elr_of):
        pytest.skip(f"there are no kernels for {rule!r}, elr_of={elr_of!r}")
