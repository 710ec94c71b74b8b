"""What a step does to the weights: the angle they turn by and how their length changes, from the weights before and
after it. Pure functions of any tensors; sums are taken in float64, over whole tensors where these are sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set

import torch
from torch import Tensor

from .sharding import Shard, all_reduce_rows, is_dtensor, local, local_grad, reductions, rows_here, shard_of

__all__ = ["CHANGES", "Rows", "gradient_sums", "weight_change"]

CHANGES = ("angle", "relative_update", "radial_update")  # the rows of what `weight_change` returns
CHUNK = 2**22  # entries that are converted to float64 at a time


class Rows:
    """The rows of some tensors, numbered through them: what one norm is taken over.

    Args:
        counts: rows of each tensor: 1, or one for each index of its dimension 0.
        per_filter: the tensors that have one for each index.

    Attributes:
        params: the tensors.
        device: where vectors with an entry per row are.
    """

    def __init__(self, counts: Mapping[Tensor, int], per_filter: Set[Tensor] = frozenset()) -> None:
        self.params = list(counts)
        self.counts = list(counts.values())
        self.device = self.params[0].device if self.params else torch.device("cpu")
        self._shards: list[Shard | None] = [
            shard_of(p, by_rows=p in per_filter) if is_dtensor(p) else None for p in self.params
        ]
        self._here = [
            rows_here(shard, count, by_rows=p in per_filter)
            for p, count, shard in zip(self.params, self.counts, self._shards, strict=True)
        ]
        longest = max((local(p).numel() for p in self.params), default=0)
        self._scratch_size = min(longest, max(CHUNK, *self.counts, 0))
        self._scratch: dict[tuple[torch.device, int], Tensor] = {}
        self._reductions = None
        if any(self._shards):
            self._reductions = reductions(self.params, self.counts, self._shards, self.device)

    def sums(self, measure: Callable[[int, int], Tensor | None], k: int) -> Tensor:
        """[k, R] float64: k sums over every row.

        Args:
            measure: number of a tensor, and the number of its rows that this rank has a part of → the sums over these
                parts, [k, rows] float64; None where nothing is known of the tensor: NaN.
            k: number of sums.
        """
        columns, known = [torch.empty(k, 0, dtype=torch.float64, device=self.device)], []
        for i, (count, (first, here)) in enumerate(zip(self.counts, self._here, strict=True)):
            part = measure(i, here)
            known += [part is not None] * count
            total = columns[0].new_zeros(k, count) if part is None or here < count else part.to(self.device)
            if part is not None and here < count:
                total[:, first : first + here] = part.to(self.device)
            columns.append(total)
        total = torch.cat(columns, dim=1)
        if self._reductions is None and all(known):
            return total
        shares = torch.tensor([known], dtype=torch.float64).to(self.device)
        total = torch.cat([total, shares])
        all_reduce_rows(total, self._reductions)
        complete = total[-1] == (1 if self._reductions is None else self._reductions.shares)
        return torch.where(complete, total[:-1], torch.nan)

    def part_here(self, i: int, values: Tensor) -> Tensor:
        """Of `values`, an entry for each row of tensor i, those of the rows that this rank has a part of."""
        first, here = self._here[i]
        return values[first : first + here]

    def sums_here(
        self, here: int, k: int, measure: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
    ) -> Tensor:
        """[k, here]: `measure`'s k sums over the parts of a tensor on this rank. It gets them in float64 as [here, n],
        some columns at a time, in memory that is used again, and may write to them."""
        if here == 0:
            return torch.zeros(k, 0, dtype=torch.float64, device=tensors[0].device)
        columns = max(1, CHUNK // here)
        split = (t.detach().reshape(here, -1).split(columns, dim=1) for t in tensors)
        total = [
            torch.stack(measure(*(self._float64(j, part) for j, part in enumerate(parts))))
            for parts in zip(*split, strict=True)
        ]
        return total[0] if len(total) == 1 else torch.stack(total).sum(0)

    def _float64(self, k: int, part: Tensor) -> Tensor:
        scratch = self._scratch.get((part.device, k))
        if scratch is None:
            scratch = torch.empty(self._scratch_size, dtype=torch.float64, device=part.device)
            self._scratch[part.device, k] = scratch
        return scratch[: part.numel()].view(part.shape).copy_(part)

    def by_param(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor with its columns of `values`, [k, R]."""
        return zip(self.params, values.split(self.counts, dim=1), strict=True)


def weight_change(before: Sequence[Tensor], after: Sequence[Tensor], rows: Rows) -> Tensor:
    """`CHANGES` of every row, [3, R] float64, to about 1e-12 of their value, however small.

    With Δ = w' − w and Δ⊥ = Δ − p·w, p = ⟨w,Δ⟩/‖w‖²: the angle ∠(w, w') = atan2(‖Δ⊥‖, (1+p)·‖w‖) in radians,
    ‖Δ‖/‖w‖, and ‖w'‖/‖w‖ − 1. A weight that did not change has exactly 0 in all three; a weight of norm 0 has NaN.

    Args:
        before, after: the parts of `rows.params` on this rank, as plain tensors.
        rows: what to sum over.
    """

    def of_radius(w: Tensor, new: Tensor) -> tuple[Tensor, ...]:
        return _dot(w, w), _dot(w, new.sub_(w))

    weight_sq, radial = rows.sums(lambda i, here: rows.sums_here(here, 2, of_radius, before[i], after[i]), 2)
    p = radial / weight_sq
    p_of = [p_here[0] for _, p_here in rows.by_param(p[None])]

    def change_sums(i: int, here: int) -> Tensor:
        p_here = rows.part_here(i, p_of[i]).to(after[i].device)[:, None]

        def of_change(w: Tensor, new: Tensor) -> tuple[Tensor, ...]:
            change = new.sub_(w)
            change_sq = _dot(change, change)
            across = change.addcmul_(p_here, w, value=-1)
            return change_sq, _dot(across, across)

        return rows.sums_here(here, 2, of_change, before[i], after[i])

    weight_norm = weight_sq.sqrt()
    change_norm, across_norm = rows.sums(change_sums, 2).sqrt()
    growth = 2 * p + p**2 + (across_norm / weight_norm) ** 2  # ‖w'‖²/‖w‖² − 1
    return torch.stack(
        [
            torch.atan2(across_norm, (1 + p) * weight_norm),
            change_norm / weight_norm,
            growth / (1 + (1 + growth).sqrt()),
        ]
    )


def gradient_sums(
    weights: Sequence[Tensor], grads: Sequence[Tensor | None], rows: Rows, scale: Tensor | None = None
) -> Tensor:
    """‖w‖², ‖g‖² and ⟨w,g⟩ of every row, [3, R] float64; NaN where only some ranks have the gradient.

    Args:
        weights: the parts of `rows.params` on this rank, as plain tensors.
        grads: the gradients of `rows.params`, also sparse ones.
        rows: what to sum over.
        scale: what the gradients are to be divided by.
    """

    def part(i: int, here: int) -> Tensor | None:
        grad = grads[i]
        if grad is None:
            return None
        grad = local_grad(rows.params[i], grad)
        grad = grad if grad.layout == torch.strided else grad.to_dense()
        return rows.sums_here(here, 3, _products, weights[i], grad)

    weight_sq, grad_sq, weight_dot_grad = rows.sums(part, 3)
    if scale is not None:
        scale = local(scale).to(rows.device).double().squeeze()
        grad_sq, weight_dot_grad = grad_sq / scale**2, weight_dot_grad / scale
    return torch.stack([weight_sq, grad_sq, weight_dot_grad])


def _products(w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    return _dot(w, w), _dot(g, g), _dot(w, g)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a,b⟩ by row; of one row by BLAS, which is faster."""
    return torch.dot(a[0], b[0])[None] if len(a) == 1 else torch.linalg.vecdot(a, b)
