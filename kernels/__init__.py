"""The Triton backend: one launch over all tensors to measure them, one to update them.

`can_use`, `measure` and `update` have the signatures of the plain torch specification; `FusedStep` is a whole step
over tensors that stay. Where triton is not installed this package still imports, `can_use` is always False, and the
rest is absent.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

from torch import Tensor

__all__ = [
    "FusedStep",
    "Hyper",
    "Kind",
    "Rule",
    "available",
    "bytes_moved",
    "can_use",
    "measure",
    "new_buffer",
    "update",
    "without_marks",
]


@functools.cache
def available() -> bool:
    """Whether triton is installed. Whether given tensors can be handled is `can_use`'s answer."""
    return importlib.util.find_spec("triton") is not None


def can_use(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    per_filter: bool = False,
) -> bool:
    """Whether the kernels take these tensors.

    They do if all of them are plain strided tensors on one CUDA device (on the CPU under TRITON_INTERPRET=1),
    each parameter is float32, bfloat16 or float16, its gradient and its buffer have its dtype or float32, and
    the three have equal shapes and the same dense memory order (contiguous, channels_last, transposed, …).
    With `per_filter` (a row per index of dimension 0) dimension 0 must also be the outermost in memory.
    """
    if not available():
        return False
    from .tables import all_supported

    return all_supported(params, grads, momentum_buffers, per_filter=per_filter)


if available():
    from .measure import measure
    from .step import FusedStep, Hyper, Kind, Rule
    from .traffic import bytes_moved
    from .update import new_buffer, update, without_marks
