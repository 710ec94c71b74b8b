"""Finding the ELRSGD in what a framework wraps around it."""

from __future__ import annotations

from .optimizer import ELRSGD

__all__ = ["type_name", "unwrap"]

WRAPPERS = ("optimizer", "opt")  # attributes in which wrappers keep the optimizer
MAX_WRAPPERS = 8  # around each other


def unwrap(optimizer: object) -> ELRSGD:
    """The innermost ELRSGD. Lightning's wrapper is an instance of the class that it wraps, but ignores settings.

    Raises:
        TypeError: `optimizer` is no ELRSGD and wraps none.
    """
    found, level = None, [optimizer]
    for _ in range(MAX_WRAPPERS + 1):
        found = next((x for x in level if isinstance(x, ELRSGD)), found)
        level = [y for x in level for name in WRAPPERS if (y := getattr(x, name, None)) is not None]
    if found is None:
        raise TypeError(
            f"a {type_name(optimizer)} is no ELRSGD and has none as its .optimizer or .opt: pass the ELRSGD itself "
            "(ELRSGD(…, rule=None) is torch.optim.SGD that can be watched)"
        )
    return found


def type_name(value: object) -> str:
    """The name of its type, with the module where that is not Python itself."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
