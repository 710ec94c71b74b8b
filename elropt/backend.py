"""Backends: their common interface, and which of them computes a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import foreach as foreach_backend
from . import kernels as triton_backend
from . import reference as reference_backend

__all__ = ["Backend", "UpdateOptions", "choose_backend"]

SAME_BITS = {torch.float32, torch.float64}


class Backend(Protocol):
    """A module with these functions: `elropt.reference`, the specification, `elropt.foreach` or `elropt.kernels`.

    The kernels also have `FusedStep`, a whole step over the same tensors as the step before.
    """

    @property
    def can_use(self) -> Callable[..., bool]:
        """Whether it takes these tensors; see `elropt.reference.can_use`."""
        ...

    @property
    def measure(self) -> Callable[..., Tensor]:
        """Sums over each layer; see `elropt.reference.measure`."""
        ...

    @property
    def update(self) -> Callable[..., None]:
        """The step in place, with `UpdateOptions`; see `elropt.reference.update`."""
        ...


class UpdateOptions(NamedTuple):
    """The keyword arguments of `Backend.update` that come from a param group.

    lr, weight_decay: of all tensors, or a list with one for each.
    """

    lr: float | Tensor | list[float]
    momentum: float
    dampening: float
    weight_decay: float | Tensor | list[float]
    nesterov: bool
    maximize: bool


def choose_backend(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    foreach: bool | None,
    fused: bool | None,
    differentiable: bool = False,
    per_filter: bool = False,
    tensor_decay: bool = False,
    lr_by_row: bool = False,
) -> Backend:
    """The module that updates these tensors: what is asked for; else on CUDA fused where every tensor qualifies and
    foreach otherwise; on the CPU foreach, where the bits of its update are those of one tensor after the other; else
    these.

    Raises:
        RuntimeError: ``fused=True`` but a tensor does not qualify.
    """
    tensors = params, grads, momentum_buffers
    if fused and not triton_backend.can_use(*tensors, per_filter=per_filter):
        unavailable = triton_backend.why_unavailable()
        raise RuntimeError(
            "fused=True needs triton and dense float32, bfloat16 or float16 parameters on one CUDA device, with "
            f"gradients of the same strides, but the group holds {_describe(params)}"
            f"{'' if unavailable is None else f'; {unavailable}'}. "
            "Use fused=None to let ELRSGD choose."
        )
    ours_to_choose = foreach is None and fused is None and not differentiable
    on_cuda = ours_to_choose and all(p.is_cuda for p in params)
    if fused or (
        on_cuda
        and not tensor_decay
        and not lr_by_row
        and triton_backend.can_use(*tensors, per_filter=per_filter)
    ):
        return triton_backend
    on_cpu = ours_to_choose and _has_same_bits(params, grads, momentum_buffers)
    if (foreach or on_cuda or on_cpu) and foreach_backend.can_use(*tensors, per_filter=per_filter):
        return foreach_backend
    return reference_backend


def _has_same_bits(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor | None]
) -> bool:
    """Whether `torch._foreach_*` and single operations give the same bits: on the CPU, where dtypes are not mixed."""
    dtypes = [p.dtype for p in params]
    return (
        all(p.is_cpu for p in params)
        and set(dtypes) <= SAME_BITS
        and dtypes == [g.dtype for g in grads]
        and dtypes == [d if m is None else m.dtype for m, d in zip(momentum_buffers, dtypes, strict=True)]
    )


def _describe(params: Sequence[Tensor]) -> str:
    kinds = sorted({f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in params})
    return ", ".join(kinds)
