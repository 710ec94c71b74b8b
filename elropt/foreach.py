"""One ELRSGD step with `torch._foreach_*`: few launches, any dtype, several devices at once.

Same functions and signatures as `elropt.reference`, which is the specification.
"""

# torch._foreach_* are functions of torch's own optimizers, not documented as public.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from .reference import Rows, buffer_dtype, factor_for, is_low_precision, upcast

__all__ = ["can_use", "measure", "update"]

Tensors = list[Tensor] | tuple[Tensor, ...]


def can_use(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    per_filter: bool = False,
) -> bool:
    """Whether every tensor is a plain dense one (no subclass, no sparse gradient)."""
    plain = (Tensor, torch.nn.Parameter)
    present = [*params, *grads, *(m for m in momentum_buffers if m is not None)]
    return all(type(t) in plain and t.layout == torch.strided for t in present)


def measure(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None] | None = None,
    *,
    per_filter: bool = False,
) -> Tensor:
    """As `elropt.reference.measure`."""
    if not params:
        return torch.zeros(4, 0)
    bufs = [None] * len(params) if momentum_buffers is None else momentum_buffers
    ws, gs = ([upcast(t.detach()) for t in ts] for ts in (params, grads))
    ms = [None if m is None else upcast(m) for m in bufs]
    sums = [_row_sums(torch._foreach_mul(a, b), per_filter) for a, b in ((ws, ws), (gs, gs), (ws, gs))]
    return torch.stack([*sums, _row_sums(_products_with_present(ws, ms), per_filter)])


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    maximize: bool,
    grad_factor: Tensor | None = None,
    weight_factor: Tensor | None = None,
    radial: Tensor | None = None,
    lr_factor: Tensor | None = None,
    rows: Rows | None = None,
) -> None:
    """As `elropt.reference.update`; without factors it is `torch.optim.SGD`'s foreach path, operation for operation."""
    everything: list[list[Tensor | None]] = [list(params), list(grads), momentum_buffers]
    grouped = _group_tensors_by_device_and_dtype(everything, with_indices=True)  # type: ignore[arg-type]
    for indices in (indices for _, indices in grouped.values()):
        has_row = [rows is not None and rows[i] is not None for i in indices]
        for wanted in (False, True):
            chosen = [i for i, has in zip(indices, has_row, strict=True) if has == wanted]
            if not chosen:
                continue
            factors = [
                [factor_for(params[i], rows[i], vector) for i in chosen]
                if wanted and rows is not None and vector is not None
                else None
                for vector in (grad_factor, weight_factor, radial, lr_factor)
            ]
            bufs = [momentum_buffers[i] for i in chosen]
            _update_alike(
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                bufs,
                lr,
                *factors,  # type: ignore[arg-type]
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
                maximize=maximize,
            )
            for i, m in zip(chosen, bufs, strict=True):
                momentum_buffers[i] = m


def _update_alike(
    ws: Tensors,
    gs: Tensors,
    bufs: list[Tensor | None],
    lr: float | Tensor,
    s: list[Tensor] | None,
    a: list[Tensor] | None,
    p: list[Tensor] | None,
    f: list[Tensor] | None,
    *,
    momentum: float,
    dampening: float,
    weight_decay: float | Tensor,
    nesterov: bool,
    maximize: bool,
) -> None:
    """The update of tensors that share a device, a dtype and the kinds of factors. Fills in `bufs`."""
    plain = all(factor is None for factor in (s, a, p, f)) and (
        not isinstance(lr, Tensor) or not is_low_precision(ws[0])
    )
    dtypes = [
        None if plain else buffer_dtype(w, g, weight_decay) for w, g in zip(ws, gs, strict=True)
    ]  # of new buffers
    grad_dtypes = [g.dtype for g in gs]
    ŵs, gs = (ws, gs) if plain else ([upcast(w) for w in ws], [upcast(g) for g in gs])
    if a is not None:
        ŵs = torch._foreach_mul(ŵs, a)
    if maximize:
        gs = torch._foreach_neg(gs)
    if s is not None:
        gs = torch._foreach_mul(gs, s)
    if isinstance(weight_decay, Tensor):
        gs = torch._foreach_add(gs, torch._foreach_mul(ŵs, weight_decay))
    elif weight_decay != 0:
        gs = torch._foreach_add(gs, ŵs, alpha=weight_decay)
        if plain and maximize:  # there torch.optim.SGD adds in place
            gs = [g.to(dtype) for g, dtype in zip(gs, grad_dtypes, strict=True)]
    us = gs
    if momentum != 0:
        ms = _advance_momentum(gs, bufs, dtypes, momentum, dampening)
        us = ms
        if nesterov:  # rounded as in place
            us = [u.to(g.dtype) for u, g in zip(torch._foreach_add(gs, ms, alpha=momentum), gs, strict=True)]
    if p is not None:
        us = torch._foreach_sub(us, torch._foreach_mul(ŵs, p))
    if f is not None:
        us = torch._foreach_mul(us, f)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(ŵs, torch._foreach_mul(us, lr.to(ws[0].device, non_blocking=True)))
    else:
        torch._foreach_add_(ŵs, us, alpha=-lr)
    if ŵs is not ws:
        torch._foreach_copy_(ws, ŵs)


def _advance_momentum(
    gs: Tensors,
    bufs: list[Tensor | None],
    dtypes: list[torch.dtype | None],
    momentum: float,
    dampening: float,
) -> list[Tensor]:
    """m ← μ·m + (1−d)·g̃, m ← g̃ where there is no buffer; stored into `bufs`.

    As in `torch.optim.SGD` where `dtypes` has None: in place, and new buffers have the dtype of g̃. Else in the dtype
    of g̃, and `dtypes` has those of new buffers."""
    old = [
        m if m is None or dtype is None or m.dtype == g.dtype else m.to(g.dtype)
        for m, g, dtype in zip(bufs, gs, dtypes, strict=True)
    ]
    ms = [m for m in old if m is not None]
    if len(ms) == len(old):
        torch._foreach_mul_(ms, momentum)
        torch._foreach_add_(ms, gs, alpha=1 - dampening)
    else:
        ms = [
            g.detach().clone() if m is None else m.mul_(momentum).add_(g, alpha=1 - dampening)
            for m, g in zip(old, gs, strict=True)
        ]
    for i, (m, buf, dtype) in enumerate(zip(ms, bufs, dtypes, strict=True)):
        if buf is None:
            bufs[i] = m if dtype is None else m.to(dtype)
        elif m is not buf:
            buf.copy_(m)
    return ms


def _products_with_present(ws: list[Tensor], ms: list[Tensor | None]) -> list[Tensor]:
    """w·m for every pair, zeros where there is no m."""
    pairs = [(w, m) for w, m in zip(ws, ms, strict=True) if m is not None]
    products = iter(torch._foreach_mul([w for w, _ in pairs], [m for _, m in pairs]) if pairs else [])
    return [torch.zeros_like(w) if m is None else next(products) for w, m in zip(ws, ms, strict=True)]


def _row_sums(ts: Sequence[Tensor], per_filter: bool) -> Tensor:
    sums = [
        t.reshape(t.shape[0], -1).sum(1) if per_filter and t.dim() > 0 else t.sum().reshape(1) for t in ts
    ]
    return torch.cat(sums).float()
