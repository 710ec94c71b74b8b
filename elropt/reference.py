"""The specification of one ELRSGD step in plain torch, one tensor after the other.

Every backend (`reference`, `foreach`, `kernels`) has these three functions with these signatures.
The symbols are those of docs/theory.md: w weight, g gradient, m momentum buffer, λ learning rate,
μ momentum, d dampening, ω weight decay, and per layer s, a, the radial coefficient p_l and f.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["can_use", "measure", "update"]

Rows = Sequence[tuple[int, int] | None]


def can_use(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    per_filter: bool = False,
) -> bool:
    """The reference takes every tensor that torch can add and multiply."""
    return True


def measure(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None] | None = None,
    *,
    per_filter: bool = False,
    with_dot: bool = True,
    with_update: bool = False,
) -> Tensor:
    """Sums over each layer: ‖w‖², ‖g‖², ⟨w,g⟩ and ⟨w,m⟩.

    Args:
        params, grads: tensors of equal shapes, any strides.
        momentum_buffers: where given, ⟨w,m⟩ is measured too (0 for a buffer that is None); else it is 0.
        per_filter: one row per index of dimension 0 of every tensor instead of one row per tensor.
        with_dot: whether ⟨w,g⟩ is needed; if not, it may be NaN.
        with_update: measure ‖m‖² and ⟨g,m⟩ too, which the length of the update is made of.

    Returns:
        [4, R] float32, `with_update` [6, R], on the device of the tensors. Sums are taken in float32, those of float64
        tensors in float64.
    """
    columns = []
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        m = None if momentum_buffers is None else momentum_buffers[i]
        w_rows, g_rows = _as_rows(w, per_filter), _as_rows(g, per_filter)
        sums = [w_rows.square().sum(1), g_rows.square().sum(1), (w_rows * g_rows).sum(1)]
        if m is None:  # 0·NaN is NaN: a sum without m does not depend on w and g
            sums += [w_rows.new_zeros(len(w_rows))] * (3 if with_update else 1)
        else:
            m_rows = _as_rows(m, per_filter)
            sums.append((w_rows * m_rows).sum(1))
            sums += [m_rows.square().sum(1), (g_rows * m_rows).sum(1)] if with_update else []
        columns.append(torch.stack(sums).float())
    return torch.cat(columns, dim=1)


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
    r"""One step, in place:

        ŵ = a·w ;  g̃ = s·g + ω·ŵ ;  m ← μ·m + (1−d)·g̃ ;  u = nesterov ? g̃ + μ·m : m
        u ← u − p_l·ŵ ;  w ← ŵ − lr·f·u

    At its first step (buffer None) m = g̃. Without factors this is `torch.optim.SGD`'s for-loop, operation for
    operation. With factors it is computed in float32 (float64 for float64 tensors) and rounded once.

    Args:
        params, grads: tensors of equal shapes, any strides.
        momentum_buffers: a list whose None entries are filled in when ``momentum != 0``.
        lr, weight_decay: one for all tensors, or one for each.
        grad_factor, weight_factor, radial, lr_factor: s, a, p_l and f, [R] float32; None stands for 1, 1, 0 and 1.
        rows: for each tensor the (first, count) of its entries in these vectors: count 1 for the tensor as a
            whole, or one for every index of its dimension 0. None: the vectors do not concern this tensor.
    """
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        row = None if rows is None else rows[i]
        s, a, p_l, f = (
            factor_for(w, row, vector) for vector in (grad_factor, weight_factor, radial, lr_factor)
        )
        λ = lr[i] if isinstance(lr, Sequence) else lr
        ω = weight_decay[i] if isinstance(weight_decay, Sequence) else weight_decay
        plain = all(factor is None for factor in (s, a, p_l, f)) and (
            not isinstance(λ, Tensor) or not is_low_precision(w)
        )
        buf = momentum_buffers[i]
        ŵ, g = (w, g) if plain else (upcast(w), upcast(g))

        if a is not None:
            ŵ = a * ŵ
        if maximize:
            g = -g
        if s is not None:
            g = s * g
        if isinstance(ω, Tensor):
            g = torch.addcmul(g, ŵ, ω)
        elif ω != 0:
            g = g.add(ŵ, alpha=ω)
        if momentum != 0:
            if buf is None:
                m = g.detach().clone()
                momentum_buffers[i] = m if plain else m.to(buffer_dtype(w, grads[i], ω))
            else:
                m = (buf if plain else upcast(buf)).mul_(momentum).add_(g, alpha=1 - dampening)
                store(m, buf)
            u = g.add(m, alpha=momentum) if nesterov else m
        else:
            u = g
        if p_l is not None:
            u = u - p_l * ŵ
        if f is not None:
            u = f * u
        if isinstance(λ, Tensor):
            ŵ.addcmul_(u, λ, value=-1)
        else:
            ŵ.add_(u, alpha=-λ)
        store(ŵ, w)


def is_low_precision(t: Tensor) -> bool:
    """Whether sums and products of this dtype are computed in float32."""
    return t.dtype in (torch.bfloat16, torch.float16)


def buffer_dtype(w: Tensor, grad: Tensor, weight_decay: float | Tensor) -> torch.dtype:
    """That of the first momentum buffer of `torch.optim.SGD`: of g + ω·w."""
    has_decay = isinstance(weight_decay, Tensor) or weight_decay != 0
    return torch.promote_types(grad.dtype, w.dtype) if has_decay else grad.dtype


def upcast(t: Tensor) -> Tensor:
    """`t` in the dtype that the arithmetic uses; `t` itself if it is that already."""
    return t.float() if is_low_precision(t) else t


def store(computed: Tensor, storage: Tensor) -> None:
    """Round `computed` into `storage`, unless it was computed there in place."""
    if computed is not storage:
        storage.copy_(computed)


def factor_for(w: Tensor, row: tuple[int, int] | None, vector: Tensor | None) -> Tensor | None:
    """The entries of a per-row vector that concern w, shaped to broadcast against it."""
    if vector is None or row is None:
        return None
    first, count = row
    if count == 1:
        return vector[first].to(w.device)
    return vector[first : first + count].to(w.device).view(count, *[1] * (w.dim() - 1))


def _as_rows(t: Tensor, per_filter: bool) -> Tensor:
    t = upcast(t.detach())
    return t.reshape(t.shape[0], -1) if per_filter and t.dim() > 0 else t.reshape(1, -1)
