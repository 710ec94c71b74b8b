"""The bytes that the kernels move, counted from their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from .tables import Table, tables_for, triples_of

__all__ = ["bytes_moved", "measure_bytes", "update_bytes"]

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def bytes_moved(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    measure: Literal["grad", "momentum", "both", "all"] | None = None,
) -> int:
    """Bytes of tensors that one step reads and writes. Tables and sums, about 100 bytes per chunk, are left out.

    Args:
        params, grads, momentum_buffers: as the step sees them; without buffers there is no momentum.
        measure: what is read of every tensor before the update: nothing (None: no rule, or a warm-up that is over), the
            gradient ("grad": while a rule acts), gradient and buffer ("momentum": while a rule acts on the update),
            gradient and weight ("both": during the radial tests, after other code has written to a parameter, and with
            ``project``), or all three ("all": during the radial tests and after such a write where the rule acts on the
            update; the first step with ``project``).

    Returns:
        For float32 with momentum, per parameter: 20, 24, 28, 28 and 32.
    """
    tables = tables_for(
        triples_of(params, grads, momentum_buffers),
        rows=[(i, 1) for i in range(len(params))],
        n_rows=len(params),
    )
    has_momentum = any(m is not None for m in momentum_buffers)
    total = sum(update_bytes(table, has_momentum=has_momentum) for table in tables)
    if measure is not None:
        weights, momentum = measure in ("both", "all"), has_momentum and measure in ("momentum", "all")
        total += sum(measure_bytes(table, weights=weights, momentum=momentum) for table in tables)
    return total


def update_bytes(table: Table, *, has_momentum: bool) -> int:
    """Read w, g and m, write w and m."""
    w, g, m = _sizes(table)
    return table.elements * (2 * w + g + (2 * m if has_momentum else 0))


def measure_bytes(table: Table, *, weights: bool, momentum: bool) -> int:
    """Read g, and w and m where asked for, of the tensors that have rows."""
    w, g, m = _sizes(table)
    return table.measured * (g + weights * w + momentum * m)


def _sizes(table: Table) -> tuple[int, int, int]:
    w, g, m = (ELEMENT_BYTES[str(table.constexprs[name])] for name in "WGM")
    return w, g, m
