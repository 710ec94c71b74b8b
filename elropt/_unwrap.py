"""Finding the optimizer in what a framework wraps around it."""

from __future__ import annotations

from typing import TypeGuard

from torch.optim import Optimizer

from .optimizer import ELRSGD

__all__ = ["type_name", "unwrap"]

WRAPPERS = ("optimizer", "opt")  # attributes in which wrappers keep the optimizer
MAX_WRAPPERS = 8  # around each other


def unwrap(optimizer: object) -> Optimizer:
    """The innermost ELRSGD, for Lightning's wrapper is an instance of the class that it wraps but ignores settings. If
    there is none, the outermost torch optimizer whose step runs hooks: a Lookahead itself moves the weights.

    Raises:
        TypeError: there is no such optimizer.
    """
    elrsgd: ELRSGD | None = None
    other: Optimizer | None = None
    level = [optimizer]
    for _ in range(MAX_WRAPPERS + 1):
        elrsgd = next((x for x in level if isinstance(x, ELRSGD)), elrsgd)
        other = other or next((x for x in level if _runs_hooks(x)), None)
        level = [y for x in level for name in WRAPPERS if (y := getattr(x, name, None)) is not None]
    found = elrsgd or other
    if found is None:
        raise TypeError(
            f"a {type_name(optimizer)} is no torch optimizer whose step runs hooks, and has none as its .optimizer or "
            ".opt: pass the optimizer itself"
        )
    return found


def _runs_hooks(x: object) -> TypeGuard[Optimizer]:
    """Whether torch has put hooks around its step, which it does when `Optimizer.__init__` runs."""
    return isinstance(x, Optimizer) and getattr(type(x).step, "hooked", False)


def type_name(value: object) -> str:
    """The name of its type, with the module where that is not Python itself."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
