"""Bytes that interpreted kernels read and write."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor


@contextmanager
def bytes_touched(tensors: Sequence[Tensor]) -> Iterator[dict[tuple[str, int], int]]:
    """("read" or "write", index of the tensor): bytes, counted load by load until the context is left."""
    from triton.runtime import interpreter

    touched = dict.fromkeys(itertools.product(["read", "write"], range(len(tensors))), 0)

    def count(how: str, pointers: Any, mask: Any) -> None:
        for i, t in enumerate(tensors):
            inside = (pointers >= t.data_ptr()) & (pointers < t.data_ptr() + t.nbytes)
            touched[how, i] += int((inside & mask).sum()) * t.itemsize

    load, store = interpreter._interpreter.load, interpreter._interpreter.store

    def counting_load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        count("read", pointers, mask)
        return load(pointers, mask, other, dtype)

    def counting_store(pointers: Any, value: Any, mask: Any) -> Any:
        count("write", pointers, mask)
        return store(pointers, value, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter._interpreter, "load", counting_load)
        patch.setattr(interpreter._interpreter, "store", counting_store)
        yield touched
