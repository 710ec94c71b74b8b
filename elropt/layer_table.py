"""The layers of any torch optimizer at one step: norms, gradients, effective learning rates, what the rule of an
ELRSGD applied, and the angles that the weights turned by.

Wherever an optimizer is asked for, it may be what a framework wraps around one: an object that has it, or another
such object, as its ``.optimizer`` (accelerate, Lightning) or ``.opt`` (fastai).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ._eager_step import LayerMeasurements
from ._step_watch import measure_now, record_of, watch_of
from ._unwrap import unwrap
from .optimizer import ELRSGD
from .weight_change import CHANGES

__all__ = [
    "LayerRow",
    "LayerTable",
    "Tracked",
    "check_tracked",
    "effective_lrs",
    "last_records",
    "layer_stats",
    "parameter_names",
    "params_of",
    "record_next_step",
    "table_of",
]

Tracked: TypeAlias = Mapping[str, object] | Iterable[str | Tensor] | None


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer (or filter) at one step.

    Norms are those before the update. Where the step measured nothing (see `layer_stats`) they are those of now: after
    such a step the weight is new and the gradient is that of the old weight. There, call `layer_stats` between
    `backward()` and `step()`, or use a `Recorder`.

    Attributes:
        name: the parameter's name. If several have the same name, ``@<group>.<index>`` follows for all but the first.
            With granularity "filter", ``[index]`` follows.
        tracked: whether it counts as scale-invariant: for an ELRSGD, whether its rule treats it so; else see
            `layer_stats`.
        weight_norm, grad_norm: ‖w‖, ‖g‖.
        radial_cosine: cos(w, g); zero for a scale-invariant weight.
        relative_grad: E = ‖g‖/‖w‖, in 1/lr.
        elr: applied effective learning rate λ·s·‖g‖/(a·‖w‖), in radians while small: the tangent of the angle of one
            SGD step without momentum and decay. Where a rule controls the update, `angle` is what counts. NaN for other
            optimizers than ELRSGD and `torch.optim.SGD`: there the size of the gradient does not say how long the step
            is.
        angle: the angle ∠(w, w') between the weight before and after the step, measured from the two, in radians.
        relative_update: ‖w' − w‖/‖w‖.
        radial_update: ‖w'‖/‖w‖ − 1.
        lr: λ of the layer as applied, with what the rule multiplies it by (where it controls or holds back the update);
            NaN if its group has none.
        grad_factor, weight_factor, radial: the s, a and p that the rule applied; 1, 1 and 0 for other optimizers.
    """

    name: str
    tracked: bool
    weight_norm: float
    grad_norm: float
    radial_cosine: float
    relative_grad: float
    elr: float
    angle: float
    relative_update: float
    radial_update: float
    lr: float
    grad_factor: float
    weight_factor: float
    radial: float


class LayerTable:
    """The layers of one step, in the order of the parameters; groups with different rules one after the other.

    A row is a tensor of two or more dimensions, or of a group that says ``scale_invariant=True``. For an ELRSGD, which
    tracks either tensors or filters, tensors of groups that say ``scale_invariant=False`` are left out; beside a rule
    that holds the others back (`protect`) every tensor is a row.

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

    def _of_tracked(self, column: str) -> np.ndarray:
        """What is positive and finite of a column, in the tracked layers."""
        values = self[column][self["tracked"].astype(bool)]
        return values[np.isfinite(values) & (values > 0)]

    def _spread(self, column: str) -> float:
        values = self._of_tracked(column)
        return float(values.max() / values.min()) if len(values) else math.nan

    @property
    def elr_spread(self) -> float:
        """max / min of the applied ELR over the tracked layers; NaN without any."""
        return self._spread("elr")

    @property
    def angle_spread(self) -> float:
        """max / min of the angle over the tracked layers; NaN without any."""
        return self._spread("angle")

    @property
    def log_elr_std(self) -> float:
        """Standard deviation of the log of the applied ELR over the tracked layers; NaN without any."""
        elrs = self._of_tracked("elr")
        return float(np.log(elrs).std()) if len(elrs) else math.nan

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows], default=4)
        columns = (
            "weight_norm",
            "grad_norm",
            "radial_cosine",
            "relative_grad",
            "elr",
            *CHANGES,
            "grad_factor",
            "weight_factor",
        )
        lines = [f"{'name':<{width}}  tracked  " + "  ".join(f"{c:>13}" for c in columns)]
        for row in self.rows:
            values = "  ".join(f"{getattr(row, c):>13.4g}" for c in columns)
            lines.append(f"{row.name:<{width}}  {'yes' if row.tracked else 'no':<7}  {values}")
        lines.append(
            f"elr_spread {self.elr_spread:.4g}, log_elr_std {self.log_elr_std:.4g}, "
            f"angle_spread {self.angle_spread:.4g}"
        )
        return "\n".join(lines)


def layer_stats(optimizer: object, *, tracked: Tracked = None) -> LayerTable:
    """What the last step measured and applied, layer by layer.

    Before the first step, and where the last step measured nothing, it measures the weights and gradients as they are
    now. An ELRSGD measures at every step while its rule acts; other optimizers only at steps that a `Recorder` or
    `record_next_step` asks for. One host read in all. Names are those of `model.named_parameters()` if the optimizer
    was given these (or `elropt.param_groups`), else `<group>.<index>`.

    `angle`, `relative_update` and `radial_update` need the weights from before the step: they are NaN unless the last
    step was recorded, by a `Recorder` or after `record_next_step`. A step that `torch.amp.GradScaler` leaves out
    changes no weight: recorded, its angle is 0.

    A step of ELRSGD measures only what its rule needs. What it left out is NaN here: the radial cosine of layers that
    are known to be tracked and, with the Triton kernels, the gradient of layers that are known not to be tracked. A
    recorded step measures everything.

    Which layers are tracked: with another optimizer than ELRSGD those in `tracked`, else those of param groups with
    ``scale_invariant=True`` (as `elropt.param_groups` makes them), and in groups without that key those whose gradient
    was orthogonal to them at every step that was recorded (`elropt.rules.radial_test`).

    The table is empty if no parameter can be a row.

    Args:
        optimizer: any torch optimizer, or what wraps one.
        tracked: what `find_scale_invariant` returned, or names or parameters. None: as above. Names need an optimizer
            that knows the names of its parameters; of a dict, those that it does not have are left out.

    Raises:
        RuntimeError: nothing was measured and there are no gradients now.
        TypeError: `optimizer` is no torch optimizer and wraps none.
        ValueError: `tracked` is given for an ELRSGD, which has its own answer, or has an entry that is no row here.
    """
    watched = unwrap(optimizer)
    is_tracked = check_tracked(watched, tracked)
    records = last_records(watched)
    if records:
        return table_of(watched, records, is_tracked)
    if any(p.grad is not None for group in watched.param_groups for p in group["params"]):
        return LayerTable([])
    raise RuntimeError(
        "no layer has a gradient: call layer_stats after loss.backward(), or after a step and before zero_grad()"
    )


def effective_lrs(optimizer: object, *, tracked: Tracked = None) -> dict[str, float]:
    """{name: applied ELR} of the tracked layers, as `layer_stats` reports it. One host read in all.

    Arguments and errors are those of `layer_stats`. For other optimizers than ELRSGD and `torch.optim.SGD` the values
    are NaN: look at the `angle` of a recorded step.
    """
    return {row.name: row.elr for row in layer_stats(optimizer, tracked=tracked) if row.tracked}


def record_next_step(optimizer: object) -> None:
    """Have the next step measure every layer, and the angle that it turns by. The training does not change.

    Until the end of that step there is a copy of the recorded weights.

    Raises:
        TypeError: `optimizer` is no torch optimizer and wraps none.
    """
    watched = unwrap(optimizer)
    watch_of(watched).request(watched)
    if isinstance(watched, ELRSGD):
        watched.record_next_step()


def check_tracked(optimizer: Optimizer, tracked: Tracked) -> frozenset[Tensor] | None:
    """The parameters that `tracked` names, see `layer_stats`; None if it is None.

    Raises:
        ValueError: as `layer_stats`.
    """
    if tracked is not None and isinstance(optimizer, ELRSGD):
        raise ValueError(
            "tracked is for other optimizers: an ELRSGD says itself what it tracks; give it the groups of "
            "elropt.param_groups, or groups with the key scale_invariant"
        )
    return params_of(optimizer, tracked)


def params_of(optimizer: Optimizer, tracked: Tracked) -> frozenset[Tensor] | None:
    """The parameters that `tracked` names, of any optimizer; None if it is None.

    Raises:
        ValueError: it has an entry that is no row here.
    """
    if tracked is None:
        return None
    if isinstance(tracked, str):
        raise ValueError(
            f"tracked is the string {tracked!r}; pass an iterable of names, such as [{tracked!r}]"
        )
    names = parameter_names(optimizer)
    by_name = {name: p for p, name in names.items()}
    if isinstance(tracked, Mapping):
        wanted = [str(name) for name, kind in tracked.items() if kind]
        found = [by_name[name] for name in wanted if name in by_name]
        if wanted and not found:
            raise ValueError(_no_row(wanted[0], by_name))
        return frozenset(p for p in found if p.dim() >= 2)
    chosen = set()
    for entry in tracked:
        p = by_name.get(entry) if isinstance(entry, str) else entry
        if p is None or p not in names or p.dim() < 2:
            raise ValueError(_no_row(entry, by_name))
        chosen.add(p)
    return frozenset(chosen)


def _no_row(entry: object, known: Mapping[str, Tensor]) -> str:
    shown = f"a parameter of shape {list(entry.shape)}" if isinstance(entry, Tensor) else repr(entry)
    return (
        f"tracked has {shown}, which is no parameter of two or more dimensions of this optimizer; it has "
        f"{', '.join(list(known)[:8])}{' …' if len(known) > 8 else ''}. Give parameters, or make the optimizer with "
        "model.named_parameters() so that it knows their names"
    )


def last_records(optimizer: Optimizer) -> list[LayerMeasurements]:
    """What the last step measured and applied; if it measured nothing, weights and gradients as they are now."""
    if isinstance(optimizer, ELRSGD):
        return optimizer.layer_records()
    recorded = record_of(optimizer)
    measured = measure_now(optimizer) if recorded is None else recorded.measured
    return [] if measured is None else [measured]


def table_of(
    optimizer: Optimizer, records: list[LayerMeasurements], tracked: frozenset[Tensor] | None = None
) -> LayerTable:
    """The table of what `last_records` returned, at least one record. One host read. `tracked`: of `check_tracked`."""
    recorded = record_of(optimizer)
    changes = {} if recorded is None else recorded.changes
    device = records[0].stats.grad_sq.device
    matrices = [torch.cat([_as_matrix(record).double(), _changes(record, changes)]) for record in records]
    columns = torch.cat([matrix.to(device) for matrix in matrices], dim=1).cpu().numpy().T
    has_elr = isinstance(optimizer, ELRSGD | torch.optim.SGD)
    names = _row_names(records, parameter_names(optimizer))
    return LayerTable(
        [
            _row(name, column, has_elr, None if tracked is None else p in tracked)
            for (p, name), column in zip(names, columns, strict=True)
        ]
    )


def _changes(record: LayerMeasurements, changes: Mapping[Tensor, Tensor]) -> Tensor:
    """[3, R] on the device: `CHANGES`, NaN where they are not known."""
    like = record.stats.grad_sq
    of_params = [
        changes[p].to(like.device)
        if p in changes and changes[p].shape[1] == count
        else like.new_full((3, count), math.nan, dtype=torch.float64)
        for p, count in zip(record.params, record.row_counts, strict=True)
    ]
    return torch.cat(of_params, dim=1)


def _as_matrix(record: LayerMeasurements) -> Tensor:
    """[8, R] on the device: ‖w‖², ‖g‖², ⟨w,g⟩, λ, s, a, p, tracked."""
    stats, controls = record.stats, record.controls
    like = torch.ones_like(stats.weight_sq)
    lr = torch.cat(
        [
            like.new_empty(count).copy_(value)
            if isinstance(value, Tensor)
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


def _row(name: str, column: np.ndarray, has_elr: bool, tracked: bool | None) -> LayerRow:
    weight_sq, grad_sq, weight_dot_grad, lr, s, a, p, tests, *changes = column
    weight_norm, grad_norm = np.sqrt(weight_sq), np.sqrt(grad_sq)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative_grad = grad_norm / weight_norm
        cosine = weight_dot_grad / (weight_norm * grad_norm)
        elr = lr * s * grad_norm / (a * weight_norm) if has_elr else math.nan
    values = (weight_norm, grad_norm, cosine, relative_grad, elr, *changes, lr, s, a, p)
    return LayerRow(name, bool(tests > 0) if tracked is None else tracked, *map(float, values))


def parameter_names(optimizer: Optimizer) -> dict[Tensor, str]:
    """A different name for every parameter. Of several with the same name the first keeps it, also when groups are
    added later."""
    names: dict[Tensor, str] = {}
    taken = set()
    for i, group in enumerate(optimizer.param_groups):
        places = [f"{i}.{j}" for j in range(len(group["params"]))]
        own = group.get("param_names") or places
        for p, name, place in zip(group["params"], own, places, strict=True):
            names[p] = f"{name}@{place}" if name in taken else name
            taken.add(name)
    return names


def _row_names(records: list[LayerMeasurements], names: dict[Tensor, str]) -> Iterator[tuple[Tensor, str]]:
    for record in records:
        for p, count in zip(record.params, record.row_counts, strict=True):
            if record.per_filter and count > 1:
                yield from ((p, f"{names[p]}[{i}]") for i in range(count))
            elif count:
                yield p, names[p]
