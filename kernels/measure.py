"""The sums over each layer, in one pass over w, g and m; the last program to finish decides the step."""
# Triton's language looks like Python, but type checkers cannot follow it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .args import Hypers, Rows, Scratch
from .decide import RADIAL_TESTS, decide, memory_of
from .tables import load_chunk, only_if, tables_for, triples_of

__all__ = ["measure", "measure_kernel", "register_limit"]

PARTIALS_PER_LOAD = tl.constexpr(256)
LOADS_PER_PASS = tl.constexpr(8)  # that are under way at the same time
MAX_REGISTERS_WITH_DAMPENING = 80  # without a limit the compiler takes 64 and spills some of them


def measure(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None] | None = None,
    *,
    per_filter: bool = False,
    with_dot: bool = True,
    with_update: bool = False,
) -> Tensor:
    """‖w‖², ‖g‖², ⟨w,g⟩, ⟨w,m⟩, and with `with_update` ‖m‖² and ⟨g,m⟩, the same bits on every run.

    Args:
        params, grads: tensors that `can_use` accepts.
        momentum_buffers: where given, the sums with m are measured too (0 for a buffer that is None); else they are 0
            and cost nothing.
        per_filter: one row per index of dimension 0 of every tensor, which must be outermost in memory,
            instead of one row per tensor.
        with_dot: whether ⟨w,g⟩ is needed. It costs nothing here, so it is always measured.
        with_update: whether ‖m‖² and ⟨g,m⟩ are needed.

    Returns:
        [4, R] float32 on the device of the tensors, [6, R] with `with_update`; on the CPU if there are none.

    Raises:
        ValueError: a tensor that `can_use` refuses, or with ``per_filter`` one whose dimension 0 is not
            outermost in memory.
    """
    n_sums = 6 if with_update else 4
    if not params:
        return torch.zeros(n_sums, 0)
    rows, n_rows = [], 0
    for w in params:
        count = w.shape[0] if per_filter and w.dim() > 0 else 1
        rows.append((n_rows, count))
        n_rows += count
    buffers = [None] * len(params) if momentum_buffers is None else momentum_buffers
    tables = tables_for(triples_of(params, grads, buffers), rows=rows, n_rows=n_rows)
    device = params[0].device
    sums = torch.empty(7, n_rows, dtype=torch.float32, device=device)
    counters = torch.zeros(n_rows + 1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(params[0]):
        for table in tables:
            if table.n_measured > 0:
                partials, of_momentum = (
                    torch.empty(table.n_measured, n, dtype=torch.float32, device=device) for n in (4, 2)
                )
                measure_kernel[(table.n_measured,)](
                    table.arguments,
                    Scratch(partials, sums, counters, of_momentum=of_momentum if with_update else None),
                    n_rows,
                    read_all=1,
                    read_momentum=1,
                    grad_scale=None,
                    found_inf=None,
                    n_deciding=0,
                    rows=Rows(),
                    lrs=None,
                    hypers=Hypers(),
                    RULE=None,
                    WHOLE=False,
                    PROJECT=False,
                    MAXIMIZE=False,
                    HAS_BUFFERS=any(m is not None for m in buffers),
                    **table.options,
                )
    return sums[:n_sums]


def register_limit(hypers: Hypers) -> dict[str, int]:
    """The option of a launch of `measure_kernel` that limits its registers."""
    return {} if hypers.one_minus_dampening is None else {"maxnreg": MAX_REGISTERS_WITH_DAMPENING}


@triton.jit(do_not_specialize=["n_rows", "read_all", "read_momentum", "n_deciding"])
def measure_kernel(
    tables,
    scratch,
    n_rows,
    read_all,
    read_momentum,
    grad_scale,
    found_inf,
    n_deciding,
    rows,
    lrs,
    hypers,
    RULE: tl.constexpr,
    WHOLE: tl.constexpr,
    PROJECT: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    HAS_BUFFERS: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """sums[:, row] = Σ w², Σ g², Σ w·g, Σ w·m, Σ m², Σ g·m over the row, and whether its buffer is new; then `decide`.

    Σ m² and Σ g·m only where `scratch.of_momentum` is given.

    tables, scratch, rows, hypers: see `args`. RULE: a function of `decide.RULES`; None where nobody decides.

    Each program sums a chunk as a tree, in float32, into partials[chunk, :]. The last program of a row adds its
    partials in a fixed order, in float64, so that the bits do not depend on which program that is. The last program
    of `n_deciding` rows decides (0: nobody does); it may be one of another launch, with its own table.

    Unless `read_all` is set, w is read only of rows that are in their radial tests: otherwise Σ w² is what the
    update of the step before left in the partials, and Σ w·g is NaN. Rows that failed these tests (unless they are held
    back, see `args.Rows`), and all rows after the hand-over of the warm-up, are not read; their sums are NaN.
    `read_momentum`: 0 where the update has left Σ w·m too; for Σ m² and Σ g·m, m is read wherever g is. Gradients are
    divided by `grad_scale`, if there is one.

    Bytes per element: read g (4 in float32), m where asked for (8), w unless its norm is known (12).
    Source: derived, docs/theory.md: the sums that its quantities are made of.
    """
    w, g, m, left, full, row, _, first, n_chunks, m_address = load_chunk(tables, W, G, M, CHUNK)
    wanted, read_w = True, True
    if rows.memory is not None:
        passed = tl.load(memory_of(rows, n_rows).tracked + row)
        over = False if rows.handed_over is None else tl.load(rows.handed_over) != 0
        wanted = (read_all != 0) | ((passed >= 0) & (over == 0))
        read_w = (read_all != 0) | (wanted & (passed < RADIAL_TESTS))
        if rows.least_size is not None:  # a rule that does not end
            wanted = True
    OF_MOMENTUM: tl.constexpr = scratch.of_momentum is not None
    if OF_MOMENTUM:
        read_m = wanted & (m_address != 0)
    else:
        read_m = (read_momentum != 0) & (m_address != 0)
    scale = 1.0
    if grad_scale is not None:
        scale = 1.0 / tl.load(grad_scale)
    if MAXIMIZE:
        scale = -scale
    # A full, aligned chunk is a branch of its own: only without a mask do the accesses become 128 bits wide.
    if full:
        lanes = tl.arange(0, CHUNK)
        w_at = tl.multiple_of(w + lanes, 16)
        g_at = tl.multiple_of(g + lanes, 16)
        m_at = tl.multiple_of(m + lanes, 16)
        mask = tl.full([CHUNK], True, tl.int1)
        whole = _products(w_at, g_at, m_at, mask, read_w, wanted, read_m, scale, HAS_BUFFERS, OF_MOMENTUM)
        _store_partials(scratch, whole, wanted, read_w, read_m, read_momentum, HAS_BUFFERS, OF_MOMENTUM)
    else:
        size = tl.minimum(left, CHUNK).to(tl.int32)
        part = _masked_products(
            w, g, m, size, read_w, wanted, read_m, scale, HAS_BUFFERS, OF_MOMENTUM, CHUNK // 4
        )
        _store_partials(scratch, part, wanted, read_w, read_m, read_momentum, HAS_BUFFERS, OF_MOMENTUM)
    finish(
        scratch, n_rows, row, first, n_chunks, m_address,
        n_deciding, rows, lrs, hypers, found_inf, RULE, WHOLE, PROJECT, HAS_BUFFERS, M,
    )  # fmt: skip


@triton.jit
def _masked_products(
    w, g, m, size, read_w, wanted, read_m, scale,
    HAS_BUFFERS: tl.constexpr, OF_MOMENTUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_products` of `size` elements, added up over blocks of BLOCK."""
    at = tl.arange(0, BLOCK)
    mask = at < size
    total = _products(w + at, g + at, m + at, mask, read_w, wanted, read_m, scale, HAS_BUFFERS, OF_MOMENTUM)
    for start in range(BLOCK, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < size
        more = _products(
            w + at, g + at, m + at, mask, read_w, wanted, read_m, scale, HAS_BUFFERS, OF_MOMENTUM
        )
        total = _added(total, more, OF_MOMENTUM)
    return total


@triton.jit
def _added(a, b, OF_MOMENTUM: tl.constexpr):
    if OF_MOMENTUM:
        total = a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5]
    else:
        total = a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]
    return total


@triton.jit
def _products(
    w_at, g_at, m_at, mask, read_w, wanted, read_m, scale,
    HAS_BUFFERS: tl.constexpr, OF_MOMENTUM: tl.constexpr,
):  # fmt: skip
    """w·w, g·g, w·g, w·m, and with OF_MOMENTUM m·m and g·m, in float32; 0 outside of the mask, and for what is not to
    be read."""
    w = tl.load(w_at, mask=only_if(read_w, mask), other=0.0).to(tl.float32)
    g = tl.load(g_at, mask=only_if(wanted, mask), other=0.0).to(tl.float32) * scale
    m_mask = only_if(read_m, mask)
    if HAS_BUFFERS:
        m = tl.load(m_at, mask=m_mask, other=0.0).to(tl.float32)
    else:
        m = tl.zeros_like(w)
    # 0·NaN is NaN: a sum without m does not depend on w and g
    products = w * w, g * g, w * g, tl.where(m_mask, w * m, 0.0)
    if OF_MOMENTUM:
        products += m * m, g * m
    return products


@triton.jit
def _store_partials(
    scratch, products, wanted, read_w, read_m, read_momentum,
    HAS_BUFFERS: tl.constexpr, OF_MOMENTUM: tl.constexpr,
):  # fmt: skip
    partial = scratch.partials + tl.program_id(0).to(tl.int64) * 4
    tl.store(partial, tl.sum(products[0]), mask=read_w)
    tl.store(partial + 1, tl.where(wanted, tl.sum(products[1]), float("nan")))
    tl.store(partial + 2, tl.where(read_w, tl.sum(products[2]), float("nan")))
    if HAS_BUFFERS:
        tl.store(partial + 3, tl.sum(products[3]), mask=read_momentum != 0)
    else:
        tl.store(partial + 3, 0.0)
    if OF_MOMENTUM:
        store_of_momentum(scratch, products[4], products[5], wanted, read_m)


@triton.jit
def store_of_momentum(scratch, mm, gm, wanted, read_m):
    partial = scratch.of_momentum + tl.program_id(0).to(tl.int64) * 2
    tl.store(partial, tl.where(wanted, tl.sum(mm), float("nan")))
    # without m there is no sum, whatever g is
    tl.store(partial + 1, tl.where(wanted, tl.where(read_m, tl.sum(gm), 0.0), float("nan")))


@triton.jit
def finish(
    scratch, n_rows, row, first, n_chunks, m_address,
    n_deciding, rows, lrs, hypers, found_inf,
    RULE: tl.constexpr, WHOLE: tl.constexpr, PROJECT: tl.constexpr,
    HAS_BUFFERS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The last program of a row sums its partials; the last of `n_deciding` decides. Counters return to 0."""
    counters = scratch.counters
    is_last = 1
    if row >= 0:
        # The barrier and the release of the atomic publish this program's stores, its acquire fetches the others'.
        tl.debug_barrier()
        is_last = (tl.atomic_add(counters + row, 1) == n_chunks - 1).to(tl.int32)
        if is_last != 0:
            tl.store(counters + row, 0)
            # The compiler's choice of registers: with as many as elsewhere it spills some of them.
            if (scratch.of_momentum is not None) & (scratch.gate is None):
                LOADS: tl.constexpr = LOADS_PER_PASS // 2
            else:
                LOADS: tl.constexpr = LOADS_PER_PASS
            _add_partials(scratch.partials, scratch.sums + row, first, n_chunks, n_rows, 4, LOADS)
            if scratch.of_momentum is not None:
                _add_partials(
                    scratch.of_momentum, scratch.sums + 4 * n_rows + row, first, n_chunks, n_rows, 2, LOADS
                )
            NEEDS_NEW: tl.constexpr = PROJECT | (scratch.of_momentum is not None)
            if NEEDS_NEW & HAS_BUFFERS & (hypers.one_minus_dampening is not None):
                m = tl.load(m_address.to(tl.pointer_type(M)), mask=m_address != 0, other=0.0)
                new = is_new(m.to(tl.float32))
                tl.store(scratch.sums + 6 * n_rows + row, new.to(tl.float32))
    if rows.memory is not None:
        if is_last != 0:
            tl.debug_barrier()
            if tl.atomic_add(counters + n_rows, 1) == n_deciding - 1:
                tl.store(counters + n_rows, 0)
                decide(scratch.sums, rows, lrs, hypers, found_inf, n_rows, RULE, WHOLE, PROJECT)
                if scratch.gate is not None:
                    tl.debug_barrier()
                    tl.atomic_add(scratch.gate, 1)


@triton.jit
def _add_partials(partials, sums, first, n_chunks, n_rows, COLUMNS: tl.constexpr, LOADS: tl.constexpr):
    """sums[column · n_rows] = the sum of a column of the partial sums [chunks, COLUMNS] of a row."""
    lanes = tl.arange(0, PARTIALS_PER_LOAD)[:, None]
    at = partials + first.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = _partials_from(0, at, lanes, n_chunks, COLUMNS)
    for start in range(PARTIALS_PER_LOAD, n_chunks, LOADS * PARTIALS_PER_LOAD):
        for i in tl.static_range(LOADS):
            total += _partials_from(start + i * PARTIALS_PER_LOAD, at, lanes, n_chunks, COLUMNS)
    at = sums + tl.arange(0, COLUMNS).to(tl.int64) * n_rows
    tl.store(at, tl.sum(total, axis=0).to(tl.float32))


@triton.jit
def _partials_from(start, at, lanes, n_chunks, COLUMNS: tl.constexpr):
    """float64 [PARTIALS_PER_LOAD, COLUMNS], 0 beyond the row. Read past the first cache, where other programs' stores
    are."""
    chunks = start + lanes
    here = at + chunks.to(tl.int64) * COLUMNS
    return tl.load(here, mask=chunks < n_chunks, other=0.0, cache_modifier=".cg").to(tl.float64)


@triton.jit
def is_new(m):
    """Whether an entry of a momentum buffer is −0.0: what buffers are made of, and no step stores if d ≠ 0."""
    return m.to(tl.int32, bitcast=True) == -2147483648
