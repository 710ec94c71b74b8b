"""In the place of hypothesis where it is not installed: its decorators skip the tests that need it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

__all__ = ["install"]


class Anything:
    """A strategy, or whatever is asked of one."""

    def __call__(self, *_: Any, **__: Any) -> Anything:
        return self

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


def given(*_: Any, **__: Any) -> Any:
    """A test that is skipped."""
    return pytest.mark.skip(reason="hypothesis is not installed")


def unchanged(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """A decorator that does nothing."""
    return lambda function: function


def install() -> None:
    """From here on, `import hypothesis` finds this."""
    hypothesis, strategies = ModuleType("hypothesis"), ModuleType("hypothesis.strategies")
    for module in (hypothesis, strategies):
        module.__spec__ = ModuleSpec(module.__name__, None)
        vars(module)["__getattr__"] = Anything().__getattr__
    vars(hypothesis).update(given=given, settings=unchanged, example=unchanged, strategies=strategies)
    sys.modules |= {"hypothesis": hypothesis, "hypothesis.strategies": strategies}
