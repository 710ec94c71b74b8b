"""Tables of CUDA graphs. A graph that is replayed reads its tables again, so no later step may write to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .hyper_arguments import HyperArguments

__all__ = ["GraphTables", "TablesOfGraph"]

AddressesFor = Callable[[Sequence[int]], list[np.ndarray]]


class TablesOfGraph:
    """The tables of one CUDA graph.

    Args:
        grad_pointers: where the gradients are now.
        addresses: the address tables of all launches, for these pointers.
        hypers: makes the arguments of the param groups.
    """

    def __init__(
        self, grad_pointers: Sequence[int], addresses: Sequence[Tensor], hypers: HyperArguments
    ) -> None:
        self.grad_pointers = tuple(grad_pointers)
        self.addresses = [t.clone() for t in addresses]
        self.host_addresses = list(map(_pinned_like, addresses))
        self.uploads_addresses = False
        self.hypers = hypers
        self.host_hypers = None if hypers.table is None else _pinned_like(hypers.table)

    def point_to(self, grad_pointers: Sequence[int], addresses_for: AddressesFor) -> None:
        """Where the gradients have moved since these tables were made, the graph uploads their addresses at every
        replay."""
        if self.grad_pointers != grad_pointers:
            self.grad_pointers, self.uploads_addresses = tuple(grad_pointers), True
            for host, addresses in zip(self.host_addresses, addresses_for(grad_pointers), strict=True):
                host.numpy()[:] = addresses
        if self.uploads_addresses:
            for host, addresses in zip(self.host_addresses, self.addresses, strict=True):
                addresses.copy_(host, non_blocking=True)


class GraphTables:
    """The tables of all graphs that have captured a step, and a set that is ready for the next graph: during a capture
    no memory may be allocated for it."""

    def __init__(self, n_groups: int, device: torch.device) -> None:
        self.n_groups, self.device = n_groups, device
        self.ready: TablesOfGraph | None = None
        self.taken: list[TablesOfGraph] = []

    def refuse(self, grad_pointers: Sequence[int]) -> None:
        """Changes nothing.

        Raises:
            RuntimeError: no tables are ready for a step with these gradients.
        """
        if self.ready is None and not (self.taken and self.taken[-1].grad_pointers == grad_pointers):
            raise RuntimeError(
                "another CUDA graph has taken the tables that were ready: run one step between two captures"
            )

    def make_ready(self, grad_pointers: Sequence[int], addresses: Sequence[Tensor]) -> None:
        """For the next graph, outside of a capture."""
        if self.ready is None and self.device.type == "cuda":
            self.ready = TablesOfGraph(grad_pointers, addresses, HyperArguments(self.n_groups, self.device))

    def take(self, grad_pointers: Sequence[int], addresses_for: AddressesFor) -> TablesOfGraph:
        """For a step that is being captured. Without new ones it shares those of the step captured before it."""
        self.refuse(grad_pointers)
        if self.ready is not None:
            self.taken.append(self.ready)
            self.ready = None
        self.taken[-1].point_to(grad_pointers, addresses_for)
        return self.taken[-1]


def _pinned_like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
