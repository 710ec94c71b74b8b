"""The layers of an ELRSGD at one step: norms, gradients, effective learning rates, and what its rule applied.

Wherever an optimizer is asked for, it may be what a framework wraps around an ELRSGD: an object that has it, or another
such object, as its ``.optimizer`` (accelerate, Lightning) or ``.opt`` (fastai).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from ._eager_step import LayerMeasurements
from ._unwrap import unwrap
from .optimizer import ELRSGD

__all__ = ["LayerRow", "LayerTable", "effective_lrs", "layer_stats", "record_next_step", "table_of"]


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer (or filter) at one step.

    Norms are those before the update. Where the step measured nothing (see `layer_stats`) they are those of now: after
    such a step the weight is new and the gradient is that of the old weight. There, call `layer_stats` between
    `backward()` and `step()`, or use a `Recorder`.

    Attributes:
        name: the parameter's name. If several have the same name, ``@<group>.<index>`` follows for all but the first.
            With granularity "filter", ``[index]`` follows.
        tracked: whether the rule treats it as scale-invariant.
        weight_norm, grad_norm: ‖w‖, ‖g‖.
        radial_cosine: cos(w, g); zero for a scale-invariant weight.
        relative_grad: E = ‖g‖/‖w‖, in 1/lr.
        elr: applied effective learning rate λ·s·‖g‖/(a·‖w‖), in radians while small.
        lr: λ of the layer.
        grad_factor, weight_factor, radial: the s, a and p that the rule applied.
    """

    name: str
    tracked: bool
    weight_norm: float
    grad_norm: float
    radial_cosine: float
    relative_grad: float
    elr: float
    lr: float
    grad_factor: float
    weight_factor: float
    radial: float


class LayerTable:
    """The layers of one step, in the order of the parameters; groups with different rules one after the other.

    A row is a tensor (or one filter of it) that a rule may track: it has two or more dimensions and its group does not
    say ``scale_invariant=False``, or its group says ``scale_invariant=True``.

    Iterating gives a `LayerRow` at a time; ``table["elr"]`` is a column as a NumPy array; ``print(table)`` shows it.
    """

    def __init__(self, rows: list[LayerRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __getitem__(self, column: str) -> np.ndarray:
        if column not in LayerRow.__dataclass_fields__:
            raise KeyError(
                f"no column {column!r}; the columns are {', '.join(LayerRow.__dataclass_fields__)}"
            )
        return np.array([getattr(row, column) for row in self.rows])

    def _tracked_elrs(self) -> np.ndarray:
        elrs = self["elr"][self["tracked"].astype(bool)]
        return elrs[np.isfinite(elrs) & (elrs > 0)]

    @property
    def elr_spread(self) -> float:
        """max / min of the applied ELR over the tracked layers; NaN without any."""
        elrs = self._tracked_elrs()
        return float(elrs.max() / elrs.min()) if len(elrs) else float("nan")

    @property
    def log_elr_std(self) -> float:
        """Standard deviation of the log of the applied ELR over the tracked layers; NaN without any."""
        elrs = self._tracked_elrs()
        return float(np.log(elrs).std()) if len(elrs) else float("nan")

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows], default=4)
        columns = (
            "weight_norm",
            "grad_norm",
            "radial_cosine",
            "relative_grad",
            "elr",
            "grad_factor",
            "weight_factor",
        )
        lines = [f"{'name':<{width}}  tracked  " + "  ".join(f"{c:>13}" for c in columns)]
        for row in self.rows:
            values = "  ".join(f"{getattr(row, c):>13.4g}" for c in columns)
            lines.append(f"{row.name:<{width}}  {'yes' if row.tracked else 'no':<7}  {values}")
        lines.append(f"elr_spread {self.elr_spread:.4g}, log_elr_std {self.log_elr_std:.4g}")
        return "\n".join(lines)


def layer_stats(optimizer: object) -> LayerTable:
    """What the last step measured and applied, layer by layer.

    Before the first step, and where the last step measured nothing (``rule=None``, or after the warm-up has ended),
    it measures the weights and gradients as they are now. One host read in all. Names are those of
    `model.named_parameters()` if the optimizer was given these (or `elropt.param_groups`), else "<group>.<index>".

    A step measures only what its rule needs. What it left out is NaN here: the radial cosine of layers that are known
    to be tracked and, with the Triton kernels, the gradient of layers that are known not to be tracked. After
    `record_next_step`, and for a `Recorder`, the step measures everything.

    The table is empty if the rule can concern no parameter.

    Args:
        optimizer: an ELRSGD, or what wraps one.

    Raises:
        RuntimeError: nothing was measured and there are no gradients now.
        TypeError: `optimizer` is no ELRSGD and wraps none.
    """
    optimizer = unwrap(optimizer)
    records = optimizer.layer_records()
    if not records:
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return LayerTable([])
        raise RuntimeError(
            "no layer has a gradient: call layer_stats after loss.backward(), or after a step and before zero_grad()"
        )
    return table_of(optimizer, records)


def effective_lrs(optimizer: object) -> dict[str, float]:
    """{name: applied ELR} of the tracked layers, as `layer_stats` reports it. One host read in all.

    Raises: as `layer_stats`.
    """
    return {row.name: row.elr for row in layer_stats(optimizer) if row.tracked}


def record_next_step(optimizer: object) -> None:
    """Have the next step measure every layer, also where its rule does not need it. The training does not change.

    Raises:
        TypeError: `optimizer` is no ELRSGD and wraps none.
    """
    unwrap(optimizer).record_next_step()


def table_of(optimizer: ELRSGD, records: list[LayerMeasurements]) -> LayerTable:
    """The table of what `ELRSGD.layer_records` returned, at least one record. One host read."""
    device = records[0].stats.grad_sq.device
    columns = torch.cat([_as_matrix(record).to(device) for record in records], dim=1).double().cpu().numpy().T
    names = _row_names(records, _parameter_names(optimizer))
    return LayerTable([_row(name, column) for name, column in zip(names, columns, strict=True)])


def _as_matrix(record: LayerMeasurements) -> torch.Tensor:
    """[8, R] on the device: ‖w‖², ‖g‖², ⟨w,g⟩, λ, s, a, p, tracked."""
    stats, controls = record.stats, record.controls
    like = torch.ones_like(stats.weight_sq)
    lr = torch.cat(
        [
            like.new_empty(count).copy_(value)
            if isinstance(value, torch.Tensor)
            else like.new_full((count,), value)
            for value, count in zip(record.lrs, record.row_counts, strict=True)
        ]
    )
    if controls.lr_factor is not None:
        lr = lr * controls.lr_factor
    s, a = (like if value is None else value for value in (controls.grad_factor, controls.weight_factor))
    p = torch.zeros_like(like) if controls.radial is None else controls.radial
    sums = stats.weight_sq, stats.grad_sq, stats.weight_dot_grad
    return torch.stack([*sums, lr, s, a, p, record.tracked])


def _row(name: str, column: np.ndarray) -> LayerRow:
    weight_sq, grad_sq, weight_dot_grad, lr, s, a, p, tracked = column
    weight_norm, grad_norm = np.sqrt(weight_sq), np.sqrt(grad_sq)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_grad = grad_norm / weight_norm
        cosine = weight_dot_grad / (weight_norm * grad_norm)
        elr = lr * s * grad_norm / (a * weight_norm)
    values = (weight_norm, grad_norm, cosine, relative_grad, elr, lr, s, a, p)
    return LayerRow(name, bool(tracked > 0), *map(float, values))


def _parameter_names(optimizer: ELRSGD) -> dict[torch.Tensor, str]:
    """A different name for every parameter. Of several with the same name the first keeps it, also when groups are
    added later."""
    names: dict[torch.Tensor, str] = {}
    taken = set()
    for i, group in enumerate(optimizer.param_groups):
        places = [f"{i}.{j}" for j in range(len(group["params"]))]
        own = group.get("param_names") or places
        for p, name, place in zip(group["params"], own, places, strict=True):
            names[p] = f"{name}@{place}" if name in taken else name
            taken.add(name)
    return names


def _row_names(records: list[LayerMeasurements], names: dict[torch.Tensor, str]) -> Iterator[str]:
    for record in records:
        for p, count in zip(record.params, record.row_counts, strict=True):
            if record.per_filter and count:
                yield from (f"{names[p]}[{i}]" for i in range(count))
            elif count:
                yield names[p]
