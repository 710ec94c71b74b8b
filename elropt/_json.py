"""Numbers as strict JSON has them: NaN and infinity, which it does not know, are null."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["from_json", "to_json"]


def to_json(value: Any) -> Any:
    """`value` with None for each float in it, also in dicts, that is NaN or infinite."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: float | None) -> float:
    """NaN for None."""
    return math.nan if value is None else value
