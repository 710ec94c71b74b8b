"""The hyper-parameters of all param groups, as the kernels take them: by value, or in a table on the device."""

# torch._foreach_* are functions of torch's own optimizers, not documented as public.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tables import upload

__all__ = ["MAX_BY_VALUE", "GroupArguments", "GroupHyper", "HyperArguments"]

# Each group that is passed by value adds arguments to every launch, and code that picks among them to the kernel.
MAX_BY_VALUE = 8


class GroupHyper(NamedTuple):
    """The hyper-parameters of one param group, but for its learning rate.

    gain, per_grad and per_momentum are what a rule needs to know of the momentum: how it makes ‖w‖² grow
    (`elropt.rules.growth_gain`), ∂u/∂g̃ and ∂u/∂m.
    """

    momentum: float
    dampening: float
    weight_decay: float
    gain: float
    per_grad: float
    per_momentum: float


Values = tuple[float | Tensor, ...] | Tensor


class GroupArguments(NamedTuple):
    """What a launch is given of the param groups: tuples with an entry per group, or float32 vectors by group.

    one_minus_dampening: 1−d; None if d is 0 in every group. is_decayed: whether ω is other than 0 in any group.
    """

    lrs: Values
    momenta: Values
    one_minus_dampening: Values | None
    decays: Values
    gains: Values
    per_grads: Values
    per_momenta: Values
    is_decayed: bool


_N_VECTORS = len(GroupArguments._fields) - 1


class HyperArguments:
    """Makes launch arguments of hyper-parameters, and keeps the table that many groups need.

    A launch over many groups then has as many arguments as over one, and the same compiled kernels serve any number.

    Args:
        n_groups: how many param groups there are. Up to `MAX_BY_VALUE` are passed by value.
        device: of the kernels.
    """

    def __init__(self, n_groups: int, device: torch.device) -> None:
        self.hypers: tuple[GroupHyper, ...] | None = None
        self.arguments: GroupArguments | None = None  # of these `hypers`; their lrs are those of any step
        self.table: Tensor | None = None
        if n_groups > MAX_BY_VALUE:
            # every row begins on a 16-byte boundary, so that kernels are compiled for one alignment
            self.table = torch.zeros(_N_VECTORS, -(-n_groups // 4) * 4, dtype=torch.float32, device=device)
            self.lr_cells = self.table[0].split(1)
            self.floats = np.zeros(
                self.table.shape, np.float32
            )  # what the table is to hold; NaN: a tensor's value
            self.uploaded: np.ndarray | None = None

    def of(
        self, lrs: Sequence[float | Tensor], hypers: tuple[GroupHyper, ...], pinned: Tensor | None = None
    ) -> GroupArguments:
        """The arguments of launches that follow on the current stream. Nothing waits for the device.

        In a table, floats are uploaded if one of them has changed, and learning rates that are tensors are copied on
        the device, at every call.

        Args:
            lrs: of each group, floats or 0-dim tensors on the device.
            hypers: of each group. The same object as at the last call stands for the same values.
            pinned: host memory of the table's shape, while a CUDA graph is captured: the graph uploads what it holds
                whenever it is replayed.

        Raises:
            RuntimeError: the graph has captured another step already, with other hyper-parameters.
        """
        is_new = hypers is not self.hypers
        if self.table is not None:
            self._fill(self.table, lrs, hypers if is_new else (), pinned)
        if is_new or self.arguments is None:
            vectors = (
                zip(*map(_columns, hypers), strict=True) if self.table is None else self.table[1:].unbind()
            )
            is_decayed = any(h.weight_decay != 0 for h in hypers)
            first: Values = () if self.table is None else self.table[0]
            self.arguments = GroupArguments._make((first, *vectors, is_decayed))
            if all(h.dampening == 0 for h in hypers):
                self.arguments = self.arguments._replace(one_minus_dampening=None)
            self.hypers = hypers
        return self.arguments if self.table is not None else self.arguments._replace(lrs=tuple(lrs))

    def _fill(
        self,
        table: Tensor,
        lrs: Sequence[float | Tensor],
        hypers: Sequence[GroupHyper],
        pinned: Tensor | None,
    ) -> None:
        """`hypers`: empty where they are those of the last call."""
        are_tensors = [isinstance(lr, Tensor) for lr in lrs]
        if hypers:
            self.floats[1:, : len(hypers)] = np.array(list(map(_columns, hypers))).T
        self.floats[0, : len(lrs)] = (
            [math.nan if isinstance(lr, Tensor) else lr for lr in lrs] if any(are_tensors) else lrs
        )
        changed = self.uploaded is None or not np.array_equal(self.floats, self.uploaded, equal_nan=True)
        if pinned is not None:
            if changed and self.uploaded is not None:
                raise RuntimeError(
                    f"hyper-parameters of more than {MAX_BY_VALUE} param groups have changed between two steps that "
                    "are captured in CUDA graphs: run one step between the captures, or give lr as a tensor"
                )
            pinned.numpy()[:] = self.floats
            table.copy_(pinned, non_blocking=True)
        elif changed:
            table.copy_(upload(self.floats, table.device), non_blocking=True)
        if changed:
            self.uploaded = self.floats.copy()
        if any(are_tensors):
            cells = [cell for cell, is_tensor in zip(self.lr_cells, are_tensors, strict=False) if is_tensor]
            torch._foreach_copy_(cells, [lr.reshape(1) for lr in lrs if isinstance(lr, Tensor)])


def _columns(h: GroupHyper) -> tuple[float, ...]:
    """In the order of `GroupArguments`, after the learning rate."""
    return h.momentum, 1 - h.dampening, h.weight_decay, h.gain, h.per_grad, h.per_momentum
