"""The hyper-parameters of all param groups, as the kernels take them: by value, or in a table on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tables import upload

__all__ = ["MAX_BY_VALUE", "GroupArguments", "Hyper", "HyperArguments"]

# Each group that is passed by value adds arguments to every launch, and code that picks among them to the kernel.
MAX_BY_VALUE = 8


class Hyper(NamedTuple):
    """The hyper-parameters of one param group; `lr` may be a 0-dim tensor on the device.

    gain, per_grad and per_momentum are what a rule needs to know of the momentum: how it makes ‖w‖² grow
    (`elropt.rules.growth_gain`), ∂u/∂g̃ and ∂u/∂m.
    """

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    gain: float
    per_grad: float
    per_momentum: float


Values = tuple[float | Tensor, ...] | Tensor


class GroupArguments(NamedTuple):
    """What a launch is given of the param groups: tuples with an entry per group, or float32 vectors by group.

    keeps: 1−d. is_damped, is_decayed: whether d, or ω, is other than 0 in any group.
    """

    lrs: Values
    momenta: Values
    keeps: Values
    decays: Values
    gains: Values
    per_grads: Values
    per_momenta: Values
    is_damped: bool
    is_decayed: bool


_N_VECTORS = len(GroupArguments._fields) - 2


class HyperArguments:
    """Makes launch arguments of hyper-parameters, and keeps the table that many groups need.

    A launch over many groups then has as many arguments as over one, and the same compiled kernels serve any number.

    Args:
        n_groups: how many param groups there are. Up to `MAX_BY_VALUE` are passed by value.
        device: of the kernels.
    """

    def __init__(self, n_groups: int, device: torch.device) -> None:
        self.hypers: tuple[Hyper, ...] | None = None
        self.arguments: GroupArguments | None = None  # for these `hypers`
        self.table: Tensor | None = None
        if n_groups > MAX_BY_VALUE:
            # every row begins on a 16-byte boundary, so that kernels are compiled for one alignment
            self.table = torch.zeros(_N_VECTORS, -(-n_groups // 4) * 4, dtype=torch.float32, device=device)
            self.lr_cells = self.table[0].split(1)
            self.uploaded: np.ndarray | None = None

    def of(self, hypers: tuple[Hyper, ...], pinned: Tensor | None = None) -> GroupArguments:
        """The arguments of launches that follow on the current stream. Nothing waits for the device.

        In a table, floats are uploaded if one of them has changed, and learning rates that are tensors are copied on the
        device, at every call.

        Args:
            hypers: of each group.
            pinned: host memory of the table's shape, while a CUDA graph is captured: the graph uploads what it holds
                whenever it is replayed.

        Raises:
            RuntimeError: the graph has captured another step already, with other hyper-parameters.
        """
        if self.table is not None:
            lrs = [h.lr for h in hypers if isinstance(h.lr, Tensor)]
            if hypers is not self.hypers or pinned is not None:
                self._upload(self.table, _floats(hypers, self.table.shape), pinned)
            if lrs:
                cells = [cell for cell, h in zip(self.lr_cells, hypers, strict=False) if isinstance(h.lr, Tensor)]
                torch._foreach_copy_(cells, [lr.reshape(1) for lr in lrs])
        if hypers is not self.hypers or self.arguments is None:
            vectors = zip(*map(_columns, hypers), strict=True) if self.table is None else self.table.unbind()
            is_damped = any(h.dampening != 0 for h in hypers)
            self.arguments = GroupArguments(*vectors, is_damped, any(h.weight_decay != 0 for h in hypers))
            self.hypers = hypers
        return self.arguments

    def _upload(self, table: Tensor, floats: np.ndarray, pinned: Tensor | None) -> None:
        changed = self.uploaded is None or not np.array_equal(floats, self.uploaded, equal_nan=True)
        if pinned is not None:
            if changed and self.uploaded is not None:
                raise RuntimeError(
                    f"hyper-parameters of more than {MAX_BY_VALUE} param groups have changed between two steps that "
                    "are captured in CUDA graphs: run one step between the captures, or give lr as a tensor"
                )
            pinned.numpy()[:] = floats
            table.copy_(pinned, non_blocking=True)
        elif changed:
            table.copy_(upload(floats, table.device), non_blocking=True)
        self.uploaded = floats


def _floats(hypers: Sequence[Hyper], shape: Sequence[int]) -> np.ndarray:
    """The table [7, n], float32; NaN where an lr is a tensor, and beyond the groups."""
    floats = np.full(shape, np.nan, np.float32)
    floats[0, : len(hypers)] = [np.nan if isinstance(h.lr, Tensor) else h.lr for h in hypers]
    floats[1:, : len(hypers)] = np.array([_columns(h)[1:] for h in hypers]).T
    return floats


def _columns(h: Hyper) -> tuple[float | Tensor, ...]:
    """In the order of `GroupArguments`."""
    return h.lr, h.momentum, 1 - h.dampening, h.weight_decay, h.gain, h.per_grad, h.per_momentum
