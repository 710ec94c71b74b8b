"""The Triton backend: one launch over all tensors to measure them, one to update them.

`can_use`, `measure` and `update` have the signatures of `elropt.reference`. `FusedStep` is a whole step, made once for
tensors that do not change from step to step. Without a triton that loads, or with a torch for ROCm, this package can
still be imported: `can_use` is always False, the kernels are absent, and `why_unavailable` says why.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package elropt.kernels, and imported as `kernels` its modules would exist twice: write "
        "`from elropt import kernels`. If another package wants its own `kernels`, as transformers does, import elropt "
        "before it"
    )

__all__ = [
    "DecisionInputs",
    "FusedStep",
    "GroupHyper",
    "LaunchKey",
    "StepPlan",
    "available",
    "bytes_moved",
    "can_use",
    "has_rule",
    "measure",
    "new_buffer",
    "update",
    "why_unavailable",
    "without_marks",
]


def _why_triton_does_not_load() -> str | None:
    """Import what the kernels need of triton. An installed triton may lack a library, or be too old."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        import triton.language  # noqa: F401
        from triton import knobs  # noqa: F401
    except Exception as error:
        reason = f"triton is installed but does not load ({type(error).__name__}: {error})"
        warnings.warn(
            f"{reason}; elropt works without its fused kernels. Reinstall triton (3.6 or newer), or uninstall it to be "
            "rid of this warning.",
            RuntimeWarning,
            stacklevel=3,
        )
        return reason
    return None


_TRITON_DOES_NOT_LOAD = None if torch.version.hip is not None else _why_triton_does_not_load()


def why_unavailable() -> str | None:
    """Why no tensor can be handled in this process, or None if some can."""
    if torch.version.hip is not None:
        return (
            f"the kernels are made for NVIDIA GPUs and this torch is built for ROCm {torch.version.hip} "
            "(warps of 32 threads, a limit on registers)"
        )
    return _TRITON_DOES_NOT_LOAD


def available() -> bool:
    """Whether the kernels can run here at all. Whether given tensors can be handled is `can_use`'s answer."""
    return why_unavailable() is None


def has_rule(name: str | None, *, of_update: bool = False, protect: bool = False) -> bool:
    """Whether `FusedStep` can decide by the rule of this name, see `decide.RULES`; with `of_update`, by its form for
    ``elr_of="update"``, which alone can `protect` what is not tracked."""
    if not available() or (protect and not of_update):
        return False
    from .decide import RULES, UPDATE_RULES

    return name in (UPDATE_RULES if of_update else RULES)


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
    from .bytes_moved import bytes_moved
    from .fused_step import DecisionInputs, FusedStep, StepPlan
    from .hyper_arguments import GroupHyper
    from .launches import LaunchKey
    from .measure import measure
    from .update import new_buffer, update, without_marks
