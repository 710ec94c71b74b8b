"""Which tensors of a step go into one launch, and what does not change from one of its launches to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import tables
from .args import Rounding, Scratch, Tables
from .tables import Row, Table, Triple, build_table, dtypes_of

__all__ = ["Launch", "LaunchKey", "make_launches"]


class LaunchKey(NamedTuple):
    """What the tensors of a param group must share with those of another to be updated in the same launch."""

    has_momentum: bool
    nesterov: bool
    maximize: bool
    seed: int | None  # of stochastic rounding


@dataclass(frozen=True)
class Launch:
    """What one launch covers.

    kind: what its param groups share. seed: of stochastic rounding, or None.
    members: the numbers of its tensors among those of the step.
    arguments, options: the tables, and what `Table.options` says.
    scratch: of `measure_kernel`; its partials are also what `update_kernel` leaves the norms in.
    """

    table: Table
    kind: LaunchKey
    seed: int | None
    members: np.ndarray
    arguments: Tables
    options: dict[str, Any]
    scratch: Scratch

    def rounding(self, step: Tensor | None) -> Rounding | None:
        return None if self.seed is None or step is None else Rounding(self.seed, step)

    def addresses_with(self, grad_pointers: Sequence[int]) -> np.ndarray:
        """The addresses of all segments if the gradients (of all tensors of the step) are there."""
        pointers = self.table.pointers.copy()
        pointers[:, 1] = np.array(grad_pointers, np.int64)[self.members]
        return self.table.addresses_of(pointers)


def make_launches(
    triples: Sequence[Triple],
    rows: Sequence[Row],
    groups: Sequence[int],
    kinds: Sequence[LaunchKey],
    *,
    sums: Tensor,
    counters: Tensor,
    number: int,
    of_update: bool = False,
) -> list[Launch]:
    """One launch for each combination of dtypes and `LaunchKey`, over tensors that have elements or rows.

    Args:
        triples, rows, groups: of each tensor its layouts, its rows and its param group.
        kinds: of each param group.
        sums, counters: of all rows, see `Scratch`.
        number: of this step among those of an optimizer: different steps draw different random bits.
        of_update: whether ‖m‖² and ⟨g,m⟩ are measured.
    """
    together: dict[Any, list[int]] = {}
    for i, (triple, group) in enumerate(zip(triples, groups, strict=True)):
        kind = kinds[group]
        if triple.w.dtype != torch.bfloat16:
            kind = kind._replace(seed=None)
        together.setdefault((dtypes_of(triple), kind), []).append(i)
    launches: list[Launch] = []
    for (_, kind), members in together.items():
        table = build_table(
            [triples[i] for i in members],
            [rows[i] for i in members],
            [groups[i] for i in members],
            tables.CHUNK,
        )
        if table.n_chunks > 0:
            # launches number their elements alike: their seeds must differ
            seed = None if kind.seed is None else _mixed(kind.seed, number, len(launches))
            partials, of_momentum = (
                torch.zeros(table.n_measured, n, dtype=torch.float32, device=sums.device) for n in (4, 2)
            )
            scratch = Scratch(partials, sums, counters, of_momentum=of_momentum if of_update else None)
            launches.append(
                Launch(table, kind, seed, np.array(members), table.arguments, table.options, scratch)
            )
    return launches


def _mixed(*numbers: int) -> int:
    """A seed of 63 bits that differs if one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
