"""The whole SGD step, with the rule's factors, in one pass over w, g and m."""
# Triton's language looks like Python, but type checkers cannot follow it.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import NUM_WARPS, Row, load_chunk, tables_for, triples_of

__all__ = ["update", "update_kernel"]


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    lr_factor: Tensor | None = None,
    grad_factor: Tensor | None = None,
    weight_factor: Tensor | None = None,
    radial: Tensor | None = None,
    rows: Sequence[Row] | None = None,
) -> None:
    """One step, in place, computed in float32 and rounded once, on storing: the formula is `update_kernel`'s.

    Args:
        params, grads: tensors that `can_use` accepts.
        momentum_buffers: its None entries are filled in, with the gradient's dtype, when ``momentum != 0``.
        lr: a float, or a tensor of one element, which is not read on the host.
        lr_factor: 0-dim float32 on the device of the tensors; applies to all of them.
        grad_factor, weight_factor, radial: s, a and p, [R] float32 on that device; None stands for 1, 1 and 0
            and costs nothing. A factor of 1 gives the same bits as None.
        rows: for each tensor the (first, count) of its entries in these vectors: count 1 for the tensor as a
            whole, or one for every index of its dimension 0, which must be outermost in memory. None: the
            vectors do not concern this tensor.

    Raises:
        ValueError: a tensor that `can_use` refuses, an lr or a factor of another shape, dtype or device, rows
            that do not fit.
        TypeError: ``weight_decay`` is a tensor.
        Then nothing has been changed.
    """
    if not params:
        return
    device = params[0].device
    if isinstance(weight_decay, Tensor):
        raise TypeError("weight_decay is a tensor, the Triton backend needs a float; foreach takes both")
    lr_factor = _checked("lr_factor", lr_factor, 0, device)
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr has shape {tuple(lr.shape)}; as a tensor it must have one element")
        lr_tensor = lr.detach().reshape(()).to(device, torch.float32, non_blocking=True)
        lr, lr_factor = 1.0, lr_tensor if lr_factor is None else lr_tensor * lr_factor
    factors = {
        "grad_factor": _checked("grad_factor", grad_factor, 1, device),
        "weight_factor": _checked("weight_factor", weight_factor, 1, device),
        "radial": _checked("radial", radial, 1, device),
    }
    lengths = {name: len(factor) for name, factor in factors.items() if factor is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the factors have lengths {lengths}; each needs one entry per row")
    if rows is None or not lengths:
        factors, rows = dict.fromkeys(factors), [None] * len(params)

    # Without momentum there are no buffers, whatever the list holds.
    old = momentum_buffers if momentum != 0 else [None] * len(params)
    missing = [momentum != 0 and m is None for m in old]
    buffers = [torch.empty_like(g) if new else m for g, m, new in zip(grads, old, missing, strict=True)]
    tables = tables_for(
        triples_of(params, grads, buffers),
        rows=rows,
        n_rows=max(lengths.values(), default=0),
        new_buffers=missing,
    )
    with torch.cuda.device_of(params[0]):
        for table in tables:
            if table.n_chunks > 0:
                update_kernel[(table.n_chunks,)](
                    table.segments,
                    table.chunk_segment,
                    float(lr),
                    float(momentum) or None,
                    1.0 - dampening,
                    float(weight_decay) or None,
                    lr_factor,
                    **factors,
                    NESTEROV=bool(nesterov),
                    MAXIMIZE=bool(maximize),
                    **table.constexprs,
                    num_warps=NUM_WARPS,
                    # Rounding must not depend on which factors are given: sums are fused by tl.fma alone.
                    enable_fp_fusion=False,
                )
    if momentum != 0:
        momentum_buffers[:] = buffers
    # Autograd cannot see these writes.
    torch.autograd.graph.increment_version([*params, *(m for m in buffers if m is not None)])


def _checked(name: str, factor: Tensor | None, dim: int, device: torch.device) -> Tensor | None:
    if factor is None:
        return None
    if factor.dim() != dim or factor.dtype != torch.float32 or factor.device != device:
        raise ValueError(
            f"{name} is {factor.dim()}-dimensional, {factor.dtype}, on {factor.device}; "
            f"it must be {dim}-dimensional, torch.float32, on {device}"
        )
    return factor.detach().contiguous()


@triton.jit
def update_kernel(
    segments,
    chunk_segment,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    lr_factor,
    grad_factor,
    weight_factor,
    radial,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ŵ = a·w ;  g ← −g if maximize ;  g̃ = s·g + ω·ŵ ;  m ← g̃ in a new buffer, else μ·m + (1−d)·g̃
    u = g̃ without momentum, g̃ + μ·m if nesterov, else m ;  w ← ŵ − λ·(u − p·ŵ)  with λ = lr·lr_factor

    μ, ω, lr_factor, s, a and p may be None: then they cost neither arithmetic nor traffic.
    Bytes per element: read w, g and m, write w and m: 20 in float32 (16 with a new buffer, 12 without
    momentum). Source: torch.optim.SGD; the factors: derived, docs/theory.md.
    """
    w, g, m, left, row, _, aligned, new_buffer = load_chunk(segments, chunk_segment, W, G, M, CHUNK)
    has_row = row >= 0
    if lr_factor is not None:
        lr = lr * tl.load(lr_factor)
    s = None if grad_factor is None else tl.load(grad_factor + row, mask=has_row, other=1.0)
    a = None if weight_factor is None else tl.load(weight_factor + row, mask=has_row, other=1.0)
    p = None if radial is None else tl.load(radial + row, mask=has_row, other=0.0)
    # An aligned full chunk is a branch of its own: only without a mask do the accesses become 128 bits wide.
    if aligned & (left >= CHUNK):
        lanes = tl.arange(0, CHUNK)
        w_at = tl.multiple_of(w + lanes, 16)
        g_at = tl.multiple_of(g + lanes, 16)
        m_at = tl.multiple_of(m + lanes, 16)
        mask = tl.full([CHUNK], True, tl.int1)
        _update_block(
            w_at, g_at, m_at, mask, new_buffer,
            lr, momentum, one_minus_dampening, weight_decay, s, a, p, NESTEROV, MAXIMIZE,
        )  # fmt: skip
    else:
        for start in range(0, tl.minimum(left, CHUNK).to(tl.int32), CHUNK // 4):
            lanes = start + tl.arange(0, CHUNK // 4)
            _update_block(
                w + lanes, g + lanes, m + lanes, lanes < left, new_buffer,
                lr, momentum, one_minus_dampening, weight_decay, s, a, p, NESTEROV, MAXIMIZE,
            )  # fmt: skip


@triton.jit
def _update_block(
    w_at,
    g_at,
    m_at,
    mask,
    new_buffer,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    s,
    a,
    p,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
):
    w = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    if a is not None:
        w = a * w
    if MAXIMIZE:
        u = -u
    if s is not None:
        u = s * u
    if weight_decay is not None:
        u = tl.fma(weight_decay, w, u)
    if momentum is not None:
        m = tl.load(m_at, mask=mask & (new_buffer == 0), other=0.0).to(tl.float32)
        m = tl.where(new_buffer, u, tl.fma(momentum, m, one_minus_dampening * u))
        tl.store(m_at, m.to(m_at.dtype.element_ty), mask=mask)
        if NESTEROV:
            u = tl.fma(momentum, m, u)
        else:
            u = m
    if p is not None:
        u = tl.fma(-p, w, u)
    w = tl.fma(-lr, u, w)
    tl.store(w_at, w.to(w_at.dtype.element_ty), mask=mask)
