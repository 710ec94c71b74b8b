"""One ELRSGD step with `torch._foreach_*`: few launches, any dtype, several devices at once.

Same functions and signatures as `elropt.reference`, which is the specification. On the CPU, where `torch._foreach_*`
are loops in C++, small tensors are updated together and large ones in pieces: then the result of one operation is
still in the cache when the next one reads it. In float32 and float64 the bits are those of one tensor after the other.
"""

# torch._foreach_* are functions of torch's own optimizers, not documented as public.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from .reference import Rows, buffer_dtype, factor_for, is_low_precision, upcast

__all__ = ["can_use", "measure", "update"]

PIECE = 1 << 17  # elements per thread that are updated together on the CPU: 2 MiB of w, g, m and a temporary
DOT = 1 << 15  # elements per thread in one `torch.dot`: sums right to about 4e-7

Tensors = list[Tensor]


class Batch(NamedTuple):
    """Tensors that share a device, a dtype and the kinds of factors, and where they are in the caller's lists."""

    indices: list[int]
    ws: Tensors
    gs: Tensors
    bufs: list[Tensor | None]
    s: Tensors | None
    a: Tensors | None
    radial: Tensors | None
    f: Tensors | None
    lr: float | Tensor | list[float]
    weight_decay: float | Tensor | list[float]


def can_use(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    per_filter: bool = False,
) -> bool:
    """Whether every tensor is a plain dense one (no subclass, no sparse gradient)."""
    present = [*params, *grads, *(m for m in momentum_buffers if m is not None)]
    kinds, layouts = set(map(type, present)), {t.layout for t in present}
    return kinds <= {Tensor, torch.nn.Parameter} and layouts <= {torch.strided}


def measure(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None] | None = None,
    *,
    per_filter: bool = False,
    with_dot: bool = True,
    with_update: bool = False,
) -> Tensor:
    """As `elropt.reference.measure`."""
    if not params:
        return torch.zeros(6 if with_update else 4, 0)
    bufs = [None] * len(params) if momentum_buffers is None else momentum_buffers
    ws, gs = ([upcast(t.detach()) for t in ts] for ts in (params, grads))
    ms = [None if m is None else upcast(m) for m in bufs]
    if params[0].is_cpu and not per_filter:
        return _dot_products(ws, gs, ms, with_dot=with_dot, with_update=with_update)
    sums = [_row_sums(torch._foreach_mul(a, b), per_filter) for a, b in ((ws, ws), (gs, gs), (ws, gs))]
    of_momentum = [_products_with_present(ws, ms)]
    if with_update:
        squares = [torch.zeros_like(w) if m is None else m.square() for w, m in zip(ws, ms, strict=True)]
        of_momentum += [squares, _products_with_present(gs, ms)]
    return torch.stack(sums + [_row_sums(products, per_filter) for products in of_momentum])


def update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None],
    *,
    lr: float | Tensor | Sequence[float],
    momentum: float,
    dampening: float,
    weight_decay: float | Tensor | Sequence[float],
    nesterov: bool,
    maximize: bool,
    grad_factor: Tensor | None = None,
    weight_factor: Tensor | None = None,
    radial: Tensor | None = None,
    lr_factor: Tensor | None = None,
    rows: Rows | None = None,
) -> None:
    """As `elropt.reference.update`; without factors it is `torch.optim.SGD`'s foreach path, operation for operation."""
    # by the parameters alone: torch 2.11 refuses gradients or buffers of another dtype here
    grouped = _group_tensors_by_device_and_dtype([list(params)], with_indices=True)
    vectors = grad_factor, weight_factor, radial, lr_factor
    for indices in (indices for _, indices in grouped.values()):
        for chosen, owned in _by_having_rows(indices, rows):
            ws = [params[i] for i in chosen]
            factors = [_factors(ws, owned, vector) for vector in vectors]
            batch = Batch(
                chosen,
                ws,
                [grads[i] for i in chosen],
                [momentum_buffers[i] for i in chosen],
                *factors,
                lr=[lr[i] for i in chosen] if isinstance(lr, Sequence) else lr,
                weight_decay=[weight_decay[i] for i in chosen]
                if isinstance(weight_decay, Sequence)
                else weight_decay,
            )
            for part in _in_cache(batch, creates_buffers=momentum != 0):
                _update_alike(
                    part, momentum=momentum, dampening=dampening, nesterov=nesterov, maximize=maximize
                )
                for i, m in zip(part.indices, part.bufs, strict=False):
                    momentum_buffers[i] = m


def _by_having_rows(indices: list[int], rows: Rows | None) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The tensors that no vector concerns, then the others with their rows."""
    if rows is None:
        return [(indices, [])]
    without: list[int] = []
    owners: list[int] = []
    owned: list[tuple[int, int]] = []
    for i in indices:
        row = rows[i]
        if row is None:
            without.append(i)
        else:
            owners.append(i)
            owned.append(row)
    return [(chosen, of_them) for chosen, of_them in ((without, []), (owners, owned)) if chosen]


def _factors(ws: Tensors, rows: Sequence[tuple[int, int]], vector: Tensor | None) -> list[Tensor] | None:
    """`factor_for` every tensor, with one call where each has one row."""
    if vector is None or not rows:
        return None
    if vector.device == ws[0].device and all(count == 1 for _, count in rows):
        begin, end = rows[0][0], rows[-1][0] + 1
        entries = vector[begin:end].unbind()
        return [entries[first - begin] for first, _ in rows]
    return [factor_for(w, row, vector) for w, row in zip(ws, rows, strict=True)]  # type: ignore[return-value]


def _in_cache(batch: Batch, *, creates_buffers: bool) -> Iterator[Batch]:
    """On the CPU: neighbours of at most `PIECE` elements together, and larger tensors in pieces of as many."""
    if not batch.ws[0].is_cpu or torch.compiler.is_compiling():
        yield batch
        return
    limit = PIECE * torch.get_num_threads()
    begin = elements = 0
    for end, size in enumerate([w.numel() for w in batch.ws]):
        if elements and elements + size > limit:
            yield from _pieces(_slice(batch, begin, end), limit, creates_buffers)
            begin = end
            elements = 0
        elements += size
    yield from _pieces(_slice(batch, begin, len(batch.ws)), limit, creates_buffers)


def _slice(batch: Batch, begin: int, end: int) -> Batch:
    return Batch(*(field[begin:end] if isinstance(field, list) else field for field in batch))  # type: ignore[arg-type]


def _pieces(batch: Batch, limit: int, creates_buffers: bool) -> Iterator[Batch]:
    """A tensor of more than `limit` elements as several of `limit`, where they are neighbours in memory."""
    tensors = batch.ws[0], batch.gs[0], batch.bufs[0]
    factors = [None if values is None else values[0] for values in (batch.s, batch.a, batch.radial, batch.f)]
    if (
        batch.ws[0].numel() <= limit
        or (creates_buffers and batch.bufs[0] is None)
        or any(factor is not None and factor.dim() for factor in factors)
        or not all(t is None or t.is_contiguous() for t in tensors)
    ):
        yield batch
        return
    of_tensor = [None if factor is None else [factor] for factor in factors]
    pieces = (itertools.repeat(None) if t is None else t.detach().view(-1).split(limit) for t in tensors)
    for w, g, m in zip(*pieces, strict=False):
        yield Batch([], [w], [g], [m], *of_tensor, batch.lr, batch.weight_decay)  # type: ignore[list-item]


def _update_alike(batch: Batch, *, momentum: float, dampening: float, nesterov: bool, maximize: bool) -> None:
    """The update of one batch. Fills in its `bufs`."""
    _, ws, gs, bufs, s, a, radial, f, lr, weight_decay = batch
    plain = all(factor is None for factor in (s, a, radial, f)) and (
        not isinstance(lr, Tensor) or not is_low_precision(ws[0])
    )
    ŵs, stored_gs = ws, gs
    if not plain:
        gs = [upcast(g) for g in gs]
        if is_low_precision(ws[0]):
            ŵs = [upcast(w) for w in ws]
    if a is not None:
        torch._foreach_mul_(ŵs, a)
    if maximize:
        gs = torch._foreach_neg(gs)
    if s is not None:
        gs = torch._foreach_mul(gs, s)
    if isinstance(weight_decay, list):
        gs = [g.add(w, alpha=ω) if ω != 0 else g for g, w, ω in zip(gs, ŵs, weight_decay, strict=True)]
    elif isinstance(weight_decay, Tensor):
        gs = torch._foreach_add(gs, torch._foreach_mul(ŵs, weight_decay))
    elif weight_decay != 0 and s is not None and all(g.dtype == w.dtype for g, w in zip(gs, ŵs, strict=True)):
        torch._foreach_add_(gs, ŵs, alpha=weight_decay)
    elif weight_decay != 0:
        gs = torch._foreach_add(gs, ŵs, alpha=weight_decay)
    if plain and maximize:  # there torch.optim.SGD adds in place
        gs = [g.to(stored.dtype) for g, stored in zip(gs, stored_gs, strict=True)]
    us = gs
    if momentum != 0:
        new = [i for i, m in enumerate(bufs) if m is None]
        us = ms = _advance_momentum(gs, bufs, momentum, dampening, in_place=plain)
        for i in () if plain else new:
            ω = weight_decay[i] if isinstance(weight_decay, list) else weight_decay
            bufs[i] = ms[i].to(buffer_dtype(ws[i], stored_gs[i], ω))
        if nesterov:  # rounded as in place
            us = [u.to(g.dtype) for u, g in zip(torch._foreach_add(gs, ms, alpha=momentum), gs, strict=True)]
    if radial is not None:
        us = torch._foreach_sub(us, torch._foreach_mul(ŵs, radial))
    if f is not None:
        us = torch._foreach_mul(us, f)
    if isinstance(lr, list):
        for w, u, λ in zip(ŵs, us, lr, strict=True):
            w.add_(u, alpha=-λ)
    elif isinstance(lr, Tensor):
        torch._foreach_sub_(ŵs, torch._foreach_mul(us, lr.to(ws[0].device, non_blocking=True)))
    else:
        torch._foreach_add_(ŵs, us, alpha=-lr)
    if ŵs is not ws:
        torch._foreach_copy_(ws, ŵs)


def _advance_momentum(
    gs: list[Tensor] | tuple[Tensor, ...],
    bufs: list[Tensor | None],
    momentum: float,
    dampening: float,
    *,
    in_place: bool,
) -> list[Tensor]:
    """m ← μ·m + (1−d)·g̃, m ← g̃ where there is no buffer; stored into `bufs`. Computed `in_place`, as in
    `torch.optim.SGD`, or else in the dtype of g̃."""
    old = bufs
    if not in_place:
        old = [m if m is None or m.dtype == g.dtype else m.to(g.dtype) for m, g in zip(bufs, gs, strict=True)]
    ms = [m for m in old if m is not None]
    if len(ms) == len(old):
        torch._foreach_mul_(ms, momentum)
        torch._foreach_add_(ms, gs, alpha=1 - dampening)
    else:
        ms = [
            g.detach().clone() if m is None else m.mul_(momentum).add_(g, alpha=1 - dampening)
            for m, g in zip(old, gs, strict=True)
        ]
    for i, (m, buf) in enumerate(zip(ms, bufs, strict=True)):
        if buf is None:
            bufs[i] = m
        elif m is not buf:
            buf.copy_(m)
    return ms


def _dot_products(
    ws: Tensors, gs: Tensors, ms: list[Tensor | None], *, with_dot: bool, with_update: bool
) -> Tensor:
    """`measure` on the CPU, a row per tensor."""
    limit = DOT * torch.get_num_threads()
    ws, gs = ([t.view(-1) if t.is_contiguous() else t for t in ts] for ts in (ws, gs))
    sums = [_dot(w, w, limit) for w in ws] + [_dot(g, g, limit) for g in gs]
    unknown, zero = torch.full((), torch.nan), torch.zeros(())
    sums += [_dot(w, g, limit) for w, g in zip(ws, gs, strict=True)] if with_dot else [unknown] * len(ws)
    sums += [zero if m is None else _dot(w, m, limit) for w, m in zip(ws, ms, strict=True)]
    if with_update:
        sums += [zero if m is None else _dot(m, m, limit) for m in ms]
        sums += [zero if m is None else _dot(g, m, limit) for g, m in zip(gs, ms, strict=True)]
    return torch.stack(sums).view(-1, len(ws)).float()


def _dot(a: Tensor, b: Tensor, limit: int) -> Tensor:
    """⟨a,b⟩ of equal shapes, or of a vector and a tensor of as many elements; at most `limit` elements in a row."""
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    if a.dim() == b.dim() == 1:
        if a.numel() <= limit:
            return torch.dot(a, b)
        return torch.stack(list(map(torch.dot, a.split(limit), b.split(limit)))).sum()
    if a.dim() != b.dim():
        return _dot(a.reshape(-1), b.reshape(-1), limit)
    return (a * b).sum()


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
