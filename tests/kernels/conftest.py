"""Checks of every kernel that these tests run."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

# Of the builder's methods that take a mask: which argument it is.
MASK_ARGUMENT = {"create_masked_load": 1, "create_masked_store": 2, "create_atomic_rmw": 3}


@pytest.fixture(autouse=True)
def masks_are_bool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter of triton 3.9 takes no others, and only it says so."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder

    def checked(name: str, position: int) -> None:
        original = getattr(builder, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            mask = args[position]
            assert mask is None or mask.data.dtype == np.bool_, f"{name}: the mask is {mask.data.dtype}"
            return original(self, *args, **kwargs)

        monkeypatch.setattr(builder, name, method)

    for name, position in MASK_ARGUMENT.items():
        checked(name, position)
