"""Looking at the layers of an ELRSGD: one host read per call, none in `step()`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from .ensemble import StepRecord
from .optimizer import ELRSGD

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["LayerRow", "LayerTable", "Recorder", "effective_lrs", "layer_stats"]


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer (or filter) at one step.

    Norms are those before the update. Where the step measured nothing (see `layer_stats`) the weight is the current
    one, so after a step the gradient is the previous weight's: there measure between `backward()` and `step()`, or
    with a `Recorder`.

    Attributes:
        name: the parameter's name; with granularity "filter" followed by ``[index]``.
        tracked: whether the rule treats it as scale-invariant.
        weight_norm, grad_norm: ‖w‖, ‖g‖.
        radial_cosine: cos(w, g); zero for a scale-invariant weight.
        relative_grad: E = ‖g‖/‖w‖, in 1/lr.
        elr: applied effective learning rate λ·s·‖g‖/(a·‖w‖), in radians while small.
        lr: λ of the layer's param group.
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

    It holds the tensors that a rule may concern: two or more dimensions and no ``scale_invariant=False``, or
    ``scale_invariant=True``.

    Iterates over `LayerRow`; ``table["elr"]`` is a column as a NumPy array; ``print(table)`` shows it.
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


def layer_stats(optimizer: ELRSGD) -> LayerTable:
    """What the last step measured and applied, layer by layer.

    Where that step measured nothing (``rule=None``, or after the hand-over of the warm-up) and before the first step,
    the weights and gradients are measured as they are now. One host read in all. Names are those of
    `model.named_parameters()` if these (or `elropt.param_groups`) were given to the optimizer, else
    "<group>.<index>".

    The Triton kernels do not measure what the rule does not need: then the radial cosine of layers that are known to be
    tracked, and the gradient of layers that are known not to be, are NaN here. A `Recorder` has everything measured.

    The table is empty if the rule can concern no parameter.

    Raises:
        RuntimeError: nothing was measured and there are no gradients now.
    """
    records = optimizer.layer_records()
    if not records:
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return LayerTable([])
        raise RuntimeError(
            "no layer has a gradient: call layer_stats after loss.backward(), or after a step and before zero_grad()"
        )
    names = _parameter_names(optimizer)
    values = torch.cat([_as_matrix(record).to(records[0].stats.grad_sq.device) for record in records], dim=1)
    columns = values.double().cpu().numpy().T
    return LayerTable(
        [_row(name, column) for name, column in zip(_row_names(records, names), columns, strict=True)]
    )


def effective_lrs(optimizer: ELRSGD) -> dict[str, float]:
    """{name: applied ELR} of the tracked layers, as `layer_stats` reports it. One host read in all."""
    return {row.name: row.elr for row in layer_stats(optimizer) if row.tracked}


class Recorder:
    """Writes `layer_stats` every k steps, from hooks on the optimizer.

    Recording does not change what the optimizer computes. Each record is one line of JSON:
    ``{"step", "elr_spread", "log_elr_std", "layers": {name: {column: value}}}``.

    Args:
        optimizer: the ELRSGD to watch.
        path: JSONL file, appended to; its folder is made.
        every: record the steps whose number is a multiple of it.
        first_step: number of the next step; after a resume, how many steps the run has made.
        writer: a `SummaryWriter` that gets elr/<name>, elr_spread and log_elr_std too.

    Use as a context manager or call `close()`; ``elropt plot PATH`` draws the file.
    """

    def __init__(
        self,
        optimizer: ELRSGD,
        path: str | Path,
        *,
        every: int = 100,
        first_step: int = 0,
        writer: SummaryWriter | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} is not valid: it must be at least 1")
        self.every = every
        self.writer = writer
        self.step = first_step
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 (close() closes it)
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def _before(self, optimizer: Any, *_: object) -> None:
        if self.step % self.every == 0:
            optimizer.record_next_step()

    def _after(self, optimizer: Any, *_: object) -> None:
        if self.step % self.every == 0 and optimizer.layer_records():
            self._write(layer_stats(optimizer))
        self.step += 1

    def _write(self, table: LayerTable) -> None:
        layers = {row.name: dataclasses.asdict(row) for row in table}
        for values in layers.values():
            del values["name"]
        summary = {"step": self.step, "elr_spread": table.elr_spread, "log_elr_std": table.log_elr_std}
        self._file.write(json.dumps(_finite({**summary, "layers": layers}), allow_nan=False) + "\n")
        self._file.flush()
        if self.writer is not None:
            for name in ("elr_spread", "log_elr_std"):
                self.writer.add_scalar(name, summary[name], self.step)
            for row in table:
                self.writer.add_scalar(f"elr/{row.name}", row.elr, self.step)

    def close(self) -> None:
        """Remove the hooks and close the file."""
        for hook in self._hooks:
            hook.remove()
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_matrix(record: StepRecord) -> torch.Tensor:
    """[8, R] on the device: ‖w‖², ‖g‖², ⟨w,g⟩, λ, s, a, p, tracked."""
    weight_sq, grad_sq, weight_dot_grad, _ = record.stats
    like = torch.ones_like(weight_sq)
    lr = torch.cat(
        [
            like.new_empty(count).copy_(value)
            if isinstance(value, torch.Tensor)
            else like.new_full((count,), value)
            for value, count in zip(record.lrs, record.row_counts, strict=True)
        ]
    )
    s, a, p = record.controls
    factors = [like if value is None else value for value in (s, a)]
    radial = torch.zeros_like(like) if p is None else p
    return torch.stack([weight_sq, grad_sq, weight_dot_grad, lr, *factors, radial, record.tracked])


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
    names = {}
    for i, group in enumerate(optimizer.param_groups):
        own = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
        names.update(zip(group["params"], own, strict=True))
    return names


def _row_names(records: list[StepRecord], names: dict[torch.Tensor, str]) -> Iterator[str]:
    for record in records:
        for p, count in zip(record.params, record.row_counts, strict=True):
            if record.per_filter and count:
                yield from (f"{names[p]}[{i}]" for i in range(count))
            elif count:
                yield names[p]
