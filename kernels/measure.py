"""Four sums over each layer, in one pass over w, g and m."""
# Triton's language looks like Python, but type checkers cannot follow it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import NUM_WARPS, load_chunk, tables_for, triples_of

__all__ = ["finalize_kernel", "measure", "measure_kernel"]

PARTIALS_PER_PASS = 512


def measure(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None] | None = None,
    *,
    per_filter: bool = False,
) -> Tensor:
    """‖w‖², ‖g‖², ⟨w,g⟩ and ⟨w,m⟩ of each layer, the same bits on every run.

    Args:
        params, grads: tensors that `can_use` accepts.
        momentum_buffers: where given, ⟨w,m⟩ is measured too (0 for a buffer that is None); else it is 0 and
            costs nothing.
        per_filter: one row per index of dimension 0 of every tensor, which must be outermost in memory,
            instead of one row per tensor.

    Returns:
        [4, R] float32 on the device of the tensors; [4, 0] on the CPU if there are none.

    Raises:
        ValueError: a tensor that `can_use` refuses, or with ``per_filter`` one whose dimension 0 is not
            outermost in memory.
    """
    if not params:
        return torch.zeros(4, 0)
    rows, n_rows = [], 0
    for w in params:
        count = w.shape[0] if per_filter and w.dim() > 0 else 1
        rows.append((n_rows, count))
        n_rows += count
    buffers = [None] * len(params) if momentum_buffers is None else momentum_buffers
    tables = tables_for(
        triples_of(params, grads, buffers), rows=rows, n_rows=n_rows, new_buffers=[False] * len(params)
    )
    sums = torch.empty(4, n_rows, dtype=torch.float32, device=params[0].device)
    with torch.cuda.device_of(params[0]):
        for table in tables:
            partials = torch.empty(table.n_chunks, 4, dtype=torch.float32, device=sums.device)
            if table.n_chunks > 0:
                measure_kernel[(table.n_chunks,)](
                    table.segments,
                    table.chunk_segment,
                    partials,
                    HAS_BUFFERS=any(m is not None for m in buffers),
                    **table.constexprs,
                    num_warps=NUM_WARPS,
                )
            if table.n_segments > 0:
                finalize_kernel[(table.n_segments,)](
                    table.segments,
                    partials,
                    sums,
                    n_rows,
                    CHUNK=table.constexprs["CHUNK"],
                    BLOCK=PARTIALS_PER_PASS,
                )
    return sums


@triton.jit
def measure_kernel(
    segments,
    chunk_segment,
    partials,
    HAS_BUFFERS: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """partials[chunk] = (Σ w², Σ g², Σ w·g, Σ w·m) over the chunk, in float32 as a tree.

    Bytes per element: read w and g (8 in float32), and m where there is a buffer (12).
    Source: derived, docs/theory.md: the sums that its quantities are made of.
    """
    w, g, m, left, _, has_buffer, aligned, _ = load_chunk(segments, chunk_segment, W, G, M, CHUNK)
    # An aligned full chunk is a branch of its own: only without a mask do the accesses become 128 bits wide.
    if aligned & (left >= CHUNK):
        lanes = tl.arange(0, CHUNK)
        w_at = tl.multiple_of(w + lanes, 16)
        g_at = tl.multiple_of(g + lanes, 16)
        m_at = tl.multiple_of(m + lanes, 16)
        mask = tl.full([CHUNK], True, tl.int1)
        _store_sums(partials, _products(w_at, g_at, m_at, mask, has_buffer, HAS_BUFFERS), HAS_BUFFERS)
    else:
        here = tl.minimum(left, CHUNK).to(tl.int32)
        _store_sums(
            partials, _masked_products(w, g, m, here, has_buffer, HAS_BUFFERS, CHUNK // 4), HAS_BUFFERS
        )


@triton.jit
def _masked_products(w, g, m, size, has_buffer, HAS_BUFFERS: tl.constexpr, BLOCK: tl.constexpr):
    """`_products` of `size` elements, added up over blocks of BLOCK."""
    lanes = tl.arange(0, BLOCK)
    ww, gg, wg, wm = _products(w + lanes, g + lanes, m + lanes, lanes < size, has_buffer, HAS_BUFFERS)
    for start in range(BLOCK, size, BLOCK):
        at = start + lanes
        ww_, gg_, wg_, wm_ = _products(w + at, g + at, m + at, at < size, has_buffer, HAS_BUFFERS)
        ww, gg, wg, wm = ww + ww_, gg + gg_, wg + wg_, wm + wm_
    return ww, gg, wg, wm


@triton.jit
def _products(w_at, g_at, m_at, mask, has_buffer, HAS_BUFFERS: tl.constexpr):
    """w·w, g·g, w·g and w·m in float32, 0 outside of the mask. m is not read where there is no buffer."""
    w = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BUFFERS:
        m = tl.load(m_at, mask=mask & has_buffer, other=0.0).to(tl.float32)
    else:
        m = tl.zeros_like(w)
    return w * w, g * g, w * g, tl.where(has_buffer, w * m, 0.0)


@triton.jit
def _store_sums(partials, products, HAS_BUFFERS: tl.constexpr):
    ww, gg, wg, wm = products
    partial = partials + tl.program_id(0).to(tl.int64) * 4
    tl.store(partial, tl.sum(ww))
    tl.store(partial + 1, tl.sum(gg))
    tl.store(partial + 2, tl.sum(wg))
    tl.store(partial + 3, tl.sum(wm) if HAS_BUFFERS else 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def finalize_kernel(segments, partials, sums, n_rows, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """sums[:, row] = Σ over the row's chunks of partials[chunk, :], in a fixed order (no atomics).

    Bytes: 16 per chunk. One program per segment; lane k adds chunks k, k + BLOCK, …, then the lanes are added
    as a tree.
    """
    segment = segments + tl.program_id(0).to(tl.int64) * 8
    n_chunks = tl.cdiv(tl.load(segment + 3), CHUNK)
    first = tl.load(segment + 4)
    row = tl.load(segment + 5)
    lanes = tl.arange(0, BLOCK)[:, None]
    quantities = tl.arange(0, 4)[None, :]
    total = tl.zeros([BLOCK, 4], tl.float32)
    for start in range(0, n_chunks, BLOCK):
        chunks = start + lanes
        total += tl.load(partials + (first + chunks) * 4 + quantities, mask=chunks < n_chunks, other=0.0)
    tl.store(sums + tl.arange(0, 4).to(tl.int64) * n_rows + row, tl.sum(total, axis=0))
