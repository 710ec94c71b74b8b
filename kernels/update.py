"""The whole SGD step, with the rule's factors, in one pass over w, g and m."""
# Triton's language looks like Python, but type checkers cannot follow it.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .args import Factors, Hypers
from .measure import is_new
from .tables import Row, load_chunk, of_group, tables_for, triples_of

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
    grad_factor: Tensor | None = None,
    weight_factor: Tensor | None = None,
    radial: Tensor | None = None,
    lr_factor: Tensor | None = None,
    rows: Sequence[Row] | None = None,
) -> None:
    """One step, in place, computed in float32 and rounded once, on storing: the formula is `update_kernel`'s.

    Args:
        params, grads: tensors that `can_use` accepts.
        momentum_buffers: its None entries are filled in, with the gradient's dtype, when ``momentum != 0``.
            With ``dampening != 0`` an entry of −0.0 counts as not yet started (see `new_buffer`).
        lr: a float, or a tensor of one element, which is not read on the host.
        grad_factor, weight_factor, radial, lr_factor: s, a, p and f, [R] float32 on that device; None stands for 1,
            1, 0 and 1 and costs nothing. A factor of 1 gives the same bits as None.
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
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr has shape {tuple(lr.shape)}; as a tensor it must have one element")
        lr = lr.detach().reshape(()).to(device, torch.float32, non_blocking=True)
    else:
        lr = float(lr)
    factors = Factors(
        _checked("grad_factor", grad_factor, device),
        _checked("weight_factor", weight_factor, device),
        _checked("radial", radial, device),
        _checked("lr_factor", lr_factor, device),
    )
    lengths = {name: len(factor) for name, factor in factors._asdict().items() if factor is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the factors have lengths {lengths}; each needs one entry per row")
    if rows is None or not lengths:
        factors, rows = Factors(), [None] * len(params)

    # Without momentum there are no buffers, whatever the list holds.
    old = momentum_buffers if momentum != 0 else [None] * len(params)
    buffers = [new_buffer(g) if momentum != 0 and m is None else m for g, m in zip(grads, old, strict=True)]
    tables = tables_for(
        triples_of(params, grads, buffers), rows=rows, n_rows=max(lengths.values(), default=0)
    )
    hypers = Hypers(
        (float(momentum),) if momentum != 0 else None,
        (1.0 - dampening,) if dampening != 0 else None,
        (float(weight_decay),) if weight_decay != 0 else None,
    )
    with torch.cuda.device_of(params[0]):
        for table in tables:
            if table.n_chunks > 0:
                update_kernel[(table.n_chunks,)](
                    table.arguments,
                    (lr,),
                    hypers,
                    factors,
                    None,
                    None,
                    grad_scale=None,
                    found_inf=None,
                    SUMS=0,
                    NESTEROV=bool(nesterov),
                    MAXIMIZE=bool(maximize),
                    **table.options,
                )
    if momentum != 0:
        momentum_buffers[:] = buffers
    # Autograd cannot see these writes.
    torch.autograd.graph.increment_version([*params, *(m for m in buffers if m is not None)])


def new_buffer(grad: Tensor) -> Tensor:
    """A momentum buffer that has not seen a gradient: −0.0 everywhere.

    μ·(−0) + g̃ is g̃ in every bit. So no flag has to say that the next step is the first, and that step may be skipped,
    or replayed from a CUDA graph. Only with dampening does the kernel ask whether an entry is −0.0.
    """
    return torch.full_like(grad, -0.0)


def without_marks(buffer: Tensor) -> Tensor:
    """Write +0.0 over −0.0 in a momentum buffer from elsewhere, where −0.0 is a value and not the mark of a new entry.
    A buffer of nothing but −0.0 is left as it is: it is new. For dampening. Returns the buffer."""
    mark = (buffer == 0) & torch.signbit(buffer)
    return buffer.copy_(torch.where(mark & ~mark.all(), 0.0, buffer))


def _checked(name: str, factor: Tensor | None, device: torch.device) -> Tensor | None:
    if factor is None:
        return None
    if factor.dim() != 1 or factor.dtype != torch.float32 or factor.device != device:
        raise ValueError(
            f"{name} is {factor.dim()}-dimensional, {factor.dtype}, on {factor.device}; "
            f"it must be 1-dimensional, torch.float32, on {device}"
        )
    return factor.detach().contiguous()


@triton.jit
def update_kernel(
    tables,
    lrs,
    hypers,
    factors,
    partials,
    rounding,
    grad_scale,
    found_inf,
    SUMS: tl.constexpr,
    NESTEROV: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ŵ = a·w ;  g ← g/scale, −g if maximize ;  g̃ = s·g + ω·ŵ ;  m ← g̃ in a new buffer, else μ·m + (1−d)·g̃
    u = g̃ without momentum, g̃ + μ·m if nesterov, else m ;  w ← ŵ − lr·f·(u − p·ŵ)

    tables, hypers, factors, rounding: see `args`. lrs: floats or device scalars, an entry per param group.
    All of μ, d, ω, s, a, p, f, grad_scale and found_inf may be None: then they cost neither arithmetic nor
    traffic. A found_inf other than 0 ends the program before it has changed anything.
    SUMS: 1: Σ w² of the new, rounded w goes to partials[chunk, 0] for the next step; 2: Σ w·m to [chunk, 3] too.
    rounding: where given, w is rounded to bfloat16 stochastically (`round_stochastically`).

    Bytes per element: read w, g and m, write w and m: 20 in float32 (12 without momentum).
    Source: torch.optim.SGD; the factors: derived, docs/theory.md.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    w, g, m, left, full, row, group, _, _, _ = load_chunk(tables, W, G, M, CHUNK)
    has_row = row >= 0
    lr = of_group(group, lrs)
    momentum = None if hypers.momenta is None else of_group(group, hypers.momenta)
    keep = None if hypers.one_minus_dampening is None else of_group(group, hypers.one_minus_dampening)
    decay = None if hypers.decays is None else of_group(group, hypers.decays)
    scale = None if grad_scale is None else 1.0 / tl.load(grad_scale)
    s = None if factors.grad_factor is None else tl.load(factors.grad_factor + row, mask=has_row, other=1.0)
    a = (
        None
        if factors.weight_factor is None
        else tl.load(factors.weight_factor + row, mask=has_row, other=1.0)
    )
    p = None if factors.radial is None else tl.load(factors.radial + row, mask=has_row, other=0.0)
    if factors.lr_factor is not None:
        lr = lr * tl.load(factors.lr_factor + row, mask=has_row, other=1.0)
    seed = None if rounding is None else rounding.seed
    count = None if rounding is None else tl.load(rounding.step)
    # A full, aligned chunk is a branch of its own: only without a mask do the accesses become 128 bits wide.
    if full:
        lanes = tl.arange(0, CHUNK)
        w_at = tl.multiple_of(w + lanes, 16)
        g_at = tl.multiple_of(g + lanes, 16)
        m_at = tl.multiple_of(m + lanes, 16)
        mask = tl.full([CHUNK], True, tl.int1)
        m_old = load_buffer(m_at, mask, momentum)
        w_new, m_new = updated(
            tl.load(w_at, mask=mask), tl.load(g_at, mask=mask), m_old, 0,
            lr, momentum, keep, decay, scale, s, a, p, seed, count, NESTEROV, MAXIMIZE,
        )  # fmt: skip
        tl.store(w_at, w_new, mask=mask)
        if momentum is not None:
            tl.store(m_at, m_new, mask=mask)
        ww, wm = products(w_new, m_new, mask, SUMS)
        store_sums(partials, ww, wm, has_row, SUMS)
    else:
        ww_part = tl.zeros([CHUNK // 4], tl.float32)
        wm_part = ww_part
        for start in range(0, tl.minimum(left, CHUNK).to(tl.int32), CHUNK // 4):
            at = start + tl.arange(0, CHUNK // 4)
            here = at < left
            m_here = load_buffer(m + at, here, momentum)
            w_here, m_here = updated(
                tl.load(w + at, mask=here, other=0.0), tl.load(g + at, mask=here, other=0.0), m_here, start,
                lr, momentum, keep, decay, scale, s, a, p, seed, count, NESTEROV, MAXIMIZE,
            )  # fmt: skip
            tl.store(w + at, w_here, mask=here)
            if momentum is not None:
                tl.store(m + at, m_here, mask=here)
            ww_here, wm_here = products(w_here, m_here, here, SUMS)
            ww_part, wm_part = ww_part + ww_here, wm_part + wm_here
        store_sums(partials, ww_part, wm_part, has_row, SUMS)


@triton.jit
def load_buffer(m_at, mask, momentum):
    """The momentum buffer; anything of its type if there is none."""
    if momentum is None:
        m = tl.zeros_like(mask).to(m_at.dtype.element_ty)
    else:
        m = tl.load(m_at, mask=mask, other=0.0)
    return m


@triton.jit
def store_sums(partials, ww, wm, has_row, SUMS: tl.constexpr):
    if SUMS >= 1:
        partial = partials + tl.program_id(0).to(tl.int64) * 4
        tl.store(partial, tl.sum(ww), mask=has_row)
        if SUMS == 2:
            tl.store(partial + 3, tl.sum(wm), mask=has_row)


@triton.jit
def updated(
    w, g, m, start,
    lr, momentum, keep, decay, scale, s, a, p, seed, step,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """The new w and m of a block, in the types that they are stored in."""
    w_type: tl.constexpr = w.dtype
    m_type: tl.constexpr = m.dtype
    w = w.to(tl.float32)
    u = g.to(tl.float32)
    if a is not None:
        w = a * w
    if scale is not None:
        u = scale * u
    if MAXIMIZE:
        u = -u
    if s is not None:
        u = s * u
    if decay is not None:  # 0·w is no zero if w is infinite, or u is −0
        u = tl.where(decay == 0, u, tl.fma(decay, w, u))
    if momentum is not None:
        old = m.to(tl.float32)
        if keep is None:
            new = tl.fma(momentum, old, u)
            m = new.to(m_type)
        else:
            new = tl.where(is_new(old), u, tl.fma(momentum, old, keep * u))
            m = new.to(m_type)
            m = tl.where(m == 0, tl.zeros_like(m), m)  # never −0
        if NESTEROV:
            u = tl.fma(momentum, new, u)
        else:
            u = new
    if p is not None:
        u = tl.fma(-p, w, u)
    w = tl.fma(-lr, u, w)
    if seed is not None:
        w = round_stochastically(w, start, seed, step)
    return w.to(w_type), m


@triton.jit
def products(w, m, mask, SUMS: tl.constexpr):
    """w² and w·m in float32, as far as they are asked for; 0 outside of the mask."""
    zero = tl.zeros(mask.shape, tl.float32)
    ww, wm = zero, zero
    if SUMS >= 1:
        w = tl.where(mask, w.to(tl.float32), 0.0)
        ww = w * w
        if SUMS == 2:
            wm = w * m.to(tl.float32)
    return ww, wm


@triton.jit
def round_stochastically(w, start, seed, step):
    """A neighbour of w in bfloat16, the nearer the likelier, so that w is its mean.

    16 random bits are added below the last bit that bfloat16 keeps, then cut off. They come from Philox with the
    counters (element, program, step), 8 elements at a time. NaN stays NaN.
    """
    at = start // 8 + tl.arange(0, w.shape[0] // 8)
    zero = at * 0
    low = (step & 0xFFFFFFFF).to(tl.int32)
    high = (step >> 32).to(tl.int32)
    r0, r1, r2, r3 = tl.philox(seed, at, zero + tl.program_id(0), zero + low, zero + high)
    random = tl.join(tl.join(r0, r1), tl.join(r2, r3))
    random = tl.join(random & 0xFFFF, random >> 16).reshape(w.shape)
    bits = w.to(tl.uint32, bitcast=True)
    rounded = ((bits + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(w == w, rounded, w)
