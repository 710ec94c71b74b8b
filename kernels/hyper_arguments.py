"""From the hyper-parameters of param groups to launch arguments: by value, or in a table on the device."""

# torch._foreach_* are functions of torch's own optimizers, not documented as public.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .args import Hypers, Values
from .tables import upload

__all__ = ["MAX_BY_VALUE", "GroupArguments", "GroupHyper", "HyperArguments"]

# Each group that is passed by value adds arguments to every launch, and code that picks among them to the kernel.
MAX_BY_VALUE = 8


class GroupHyper(NamedTuple):
    """The hyper-parameters of one param group, but for its learning rate.

    gain, per_grad and per_momentum are what a rule needs to know of the momentum: how it makes ‖w‖² grow
    (`elropt.rules.growth_gain`), ∂u/∂g̃ and ∂u/∂m. settling: φ²/λ of the angle φ that SGD would settle at; 0 where the
    rule does not ask for it. diffusion: see `elropt.rules`; 0 where nothing is held back.
    """

    momentum: float
    dampening: float
    weight_decay: float
    gain: float
    per_grad: float
    per_momentum: float
    settling: float = 0.0
    diffusion: float = 0.0


class GroupArguments(NamedTuple):
    """What the launches of a step are given of the param groups, each no more than it needs.

    lrs: of all launches. measure: of `measure_kernel`. update, together: of `update_kernel` and `cooperative_kernel`,
    the first entry for tensors without momentum, the second for tensors with it.
    """

    lrs: Values
    measure: Hypers
    update: tuple[Hypers, Hypers]
    together: tuple[Hypers, Hypers]


_N_VECTORS = 1 + len(Hypers._fields)  # learning rates are the first


class HyperArguments:
    """Makes launch arguments of hyper-parameters, and keeps the table that many groups need.

    A launch over many groups then has as many arguments as over one, and the same compiled kernels serve any number.

    Args:
        n_groups: how many param groups there are. Up to `MAX_BY_VALUE` are passed by value.
        device: of the kernels.
    """

    def __init__(self, n_groups: int, device: torch.device) -> None:
        self.hypers: tuple[GroupHyper, ...] | None = None
        self.arguments: GroupArguments | None = None  # made of `hypers`; without a table, their lrs are empty
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
            hypers: of each group. The object of the last call must hold the values that it held then.
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
            lr_vector: Values = () if self.table is None else self.table[0]
            self.arguments = _arguments_of(lr_vector, Hypers(*vectors), hypers)
            self.hypers = hypers
        if self.table is not None:
            return self.arguments
        return GroupArguments(tuple(lrs), *self.arguments[1:])

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
    """In the order of `Hypers`."""
    of_update = h.gain, h.per_grad, h.per_momentum, h.settling, h.diffusion
    return h.momentum, 1 - h.dampening, h.weight_decay, *of_update


def _arguments_of(lrs: Values, every: Hypers, hypers: Sequence[GroupHyper]) -> GroupArguments:
    """What no group has is None: then it costs nothing."""
    if all(h.dampening == 0 for h in hypers):
        every = every._replace(one_minus_dampening=None)
    if all(h.settling == 0 for h in hypers):
        every = every._replace(settlings=None)
    if all(h.diffusion == 0 for h in hypers):
        every = every._replace(diffusions=None)
    without_momentum = every._replace(momenta=None)
    update = Hypers(
        every.momenta,
        every.one_minus_dampening,
        every.decays if any(h.weight_decay != 0 for h in hypers) else None,
    )
    return GroupArguments(
        lrs, without_momentum, (update._replace(momenta=None), update), (without_momentum, every)
    )
