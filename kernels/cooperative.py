"""Measure, decide and update in one launch, for nets whose w, g and m fit into the registers of the GPU."""
# Triton's language looks like Python, but type checkers cannot follow it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .measure import finish, store_of_momentum
from .tables import load_chunk, of_group
from .update import updated

__all__ = ["MAX_REGISTERS", "cooperative_kernel", "max_programs"]

# 80 registers × 256 threads: three programs share the 65,536 registers of a multiprocessor (sm_80 and later).
MAX_REGISTERS = 80
PROGRAMS_PER_MULTIPROCESSOR = 3


def max_programs(device: torch.device) -> int:
    """Programs that run at the same time, all of which the barrier needs; 0 where there is no such barrier."""
    if device.type != "cuda":
        return 0
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["n_rows", "n_deciding"])
def cooperative_kernel(
    tables,
    scratch,
    n_rows,
    n_deciding,
    rows,
    lrs,
    hypers,
    factors,
    rounding,
    grad_scale,
    found_inf,
    RULE: tl.constexpr,
    WHOLE: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_BUFFERS: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`measure_kernel` (with everything read) and `update_kernel`, w, g and m kept in registers in between.

    tables, scratch, rows, hypers, factors, rounding: see `args`. n_deciding: rows, and programs without a row.
    scratch.gate goes up by one at every step: every program waits for that, so all of them have to run at once
    (`launch_cooperative_grid`, at most `max_programs`). Under the interpreter it would wait forever.

    Bytes per element: read w, g and m, write w and m: 20 in float32 (12 without momentum). With PROJECT or
    `scratch.of_momentum`, all of it in float32, m is read once more, from the cache: 24.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    # The gate opens after all programs have been at `finish`, this one too: so this read comes before, without a fence.
    before = tl.atomic_add(scratch.gate, 0, sem="relaxed")
    w_first, g_first, m_first, left, full, row, group, first, n_chunks, m_address = load_chunk(
        tables, W, G, M, CHUNK
    )
    lanes = tl.arange(0, CHUNK)
    w = _load(w_first, lanes, left, full, CHUNK)
    g = _load(g_first, lanes, left, full, CHUNK)
    # w, g and m in float32 do not fit beside the decision: m is then read twice, the second time from the cache
    NEEDS_M: tl.constexpr = (PROJECT | (scratch.of_momentum is not None)) & HAS_BUFFERS
    KEEPS_M: tl.constexpr = NEEDS_M & (
        W.primitive_bitwidth + G.primitive_bitwidth + M.primitive_bitwidth < 96
    )
    if NEEDS_M:
        m = _load(m_first, lanes, left, full, CHUNK)
    if grad_scale is not None:
        g = (1.0 / tl.load(grad_scale)) * g.to(tl.float32)

    has_row = row >= 0
    if has_row:
        wide_w, wide_g = w.to(tl.float32), g.to(tl.float32)
        if MAXIMIZE:
            wide_g = -wide_g
        partial = scratch.partials + tl.program_id(0).to(tl.int64) * 4
        tl.store(partial, tl.sum(wide_w * wide_w))
        tl.store(partial + 1, tl.sum(wide_g * wide_g))
        tl.store(partial + 2, tl.sum(wide_w * wide_g))
        if NEEDS_M:
            wide_m = m.to(tl.float32)
            tl.store(partial + 3, tl.sum(wide_w * wide_m))
            if scratch.of_momentum is not None:
                store_of_momentum(scratch, wide_m * wide_m, wide_g * wide_m, True, True)
    finish(
        scratch, n_rows, row, first, n_chunks, m_address,
        n_deciding, rows, lrs, hypers, found_inf, RULE, WHOLE, PROJECT, HAS_BUFFERS, M,
    )  # fmt: skip
    if hypers.momenta is None:
        m = tl.zeros_like(w)
    elif not KEEPS_M:  # on its way while the program waits
        m = _load(m_first, lanes, left, full, CHUNK)
    opened = before
    while opened == before:
        opened = tl.atomic_add(scratch.gate, 0, sem="acquire")
    if (rows.handed_over is not None) & (W.primitive_bitwidth == 32):
        # Adds 0, which the compiler does not know: else it would compute the lanes before the loop, and spill them.
        lanes += (opened == before - 1).to(tl.int32)

    lr = of_group(group, lrs)
    momentum = None if hypers.momenta is None else of_group(group, hypers.momenta)
    keep = None if hypers.one_minus_dampening is None else of_group(group, hypers.one_minus_dampening)
    # read past the first cache: another program may have written them
    s, a, p = None, None, None
    if factors.grad_factor is not None:
        s = tl.load(factors.grad_factor + row, mask=has_row, other=1.0, cache_modifier=".cg")
    if factors.weight_factor is not None:
        a = tl.load(factors.weight_factor + row, mask=has_row, other=1.0, cache_modifier=".cg")
    if factors.radial is not None:
        p = tl.load(factors.radial + row, mask=has_row, other=0.0, cache_modifier=".cg")
    if factors.lr_factor is not None:
        lr = lr * tl.load(factors.lr_factor + row, mask=has_row, other=1.0, cache_modifier=".cg")
    seed = None if rounding is None else rounding.seed
    count = None if rounding is None else tl.load(rounding.step)
    w, m = updated(
        w, g, m, 0,
        lr, momentum, keep, of_group(group, hypers.decays), None, s, a, p, seed, count, NESTEROV, MAXIMIZE,
    )  # fmt: skip
    _store(w_first, lanes, left, full, w, CHUNK)
    if hypers.momenta is not None:
        _store(m_first, lanes, left, full, m, CHUNK)


@triton.jit
def _load(first, lanes, left, full, CHUNK: tl.constexpr):
    if full:
        t = tl.load(tl.multiple_of(first + lanes, 16), mask=tl.full([CHUNK], True, tl.int1), other=0.0)
    else:
        t = tl.load(first + lanes, mask=lanes < left, other=0.0)
    return t


@triton.jit
def _store(first, lanes, left, full, t, CHUNK: tl.constexpr):
    if full:
        tl.store(tl.multiple_of(first + lanes, 16), t, mask=tl.full([CHUNK], True, tl.int1))
    else:
        tl.store(first + lanes, t, mask=lanes < left)
