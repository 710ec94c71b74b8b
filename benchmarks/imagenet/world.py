"""The processes of an ImageNet run: what they share, and how all of them stop when one cannot go on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")


class Refused(ValueError):
    """A run that cannot begin or go on, and why. No file has been changed, and no other process is left waiting."""


@dataclasses.dataclass(frozen=True)
class World:
    """This process among those of a run, and its device; with `store`, what the processes exchange words through."""

    rank: int
    ranks: int
    device: torch.device
    store: Store | None = None
    _exchanges: Iterator[int] = dataclasses.field(default_factory=itertools.count, repr=False)

    def sum(self, values: Tensor) -> Tensor:
        """Add up over all processes, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; plain values. They go through the store, so that this works on any
        device and at any time."""
        if self.store is None:
            return [value]
        exchange = next(self._exchanges)
        self.store.set(f"{exchange}/{self.rank}", json.dumps(value))
        values = [json.loads(self.store.get(f"{exchange}/{rank}")) for rank in range(self.ranks)]
        self.store.set(f"{exchange}/{self.rank}/read", "")
        if self.rank == 0:  # the store may be in this process: it stays until the others have read
            self.store.wait([f"{exchange}/{rank}/read" for rank in range(self.ranks)])
        return values

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns. Where it fails on one process, all raise: Refused for ValueError and OSError."""
        failure = result = None
        try:
            result = work()
        except Exception as error:
            failure = error
        messages = self.gather(None if failure is None else f"{failure}" or type(failure).__name__)
        if isinstance(failure, ValueError | OSError):
            raise Refused(str(failure)) from failure
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise Refused(f"on rank {rank}: {message}")
        return result  # type: ignore[return-value]

    def compare(self, seen: Mapping[str, Any]) -> None:
        """Raises Refused on all processes if they do not see the same, plain values by name."""
        first, *others = self.gather(seen)
        for rank, theirs in enumerate(others, start=1):
            if theirs != first:
                differing = [name for name in first | theirs if first.get(name) != theirs.get(name)]
                here, there = (
                    ", ".join(f"{name} {of.get(name)!r}" for name in differing) for of in (theirs, first)
                )
                raise Refused(
                    f"rank {rank} sees {here}, but rank 0 {there}: give all processes the same arguments, images, code "
                    "and folder of the run"
                )


@contextlib.contextmanager
def join_world(device: str | None) -> Iterator[World]:
    """Join the processes that torchrun has started; alone without it. None is a GPU if there is one.

    Raises Refused on all processes if a device cannot be used, or if they have not all the same kind.
    """
    if "RANK" not in os.environ:
        alone = World(0, 1, torch.device("cpu"))
        yield dataclasses.replace(alone, device=torch.device(alone.together(lambda: usable(device))))
        return
    store, rank, ranks = next(rendezvous("env://"))
    world = World(rank, ranks, torch.device("cpu"), PrefixStore("elropt", store))
    kind = world.together(lambda: usable(device))
    world.compare({"device": kind})  # with two kinds of backends, the processes would wait without an end
    if kind == "cuda":
        world = dataclasses.replace(world, device=torch.device(kind, int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(world.device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=ranks)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def usable(device: str | None) -> str:
    """cpu or cuda. Raises ValueError if it cannot be used here."""
    gpu = torch.cuda.is_available()
    if device is None:
        return "cuda" if gpu else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not gpu):
        raise ValueError(f"--device {device} cannot be used here: cpu, or cuda where there is a GPU")
    return device
