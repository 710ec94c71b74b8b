"""Looking at the layers of an ELRSGD: one host read per call, none in `step()`.

Wherever an optimizer is asked for, it may be what a framework wraps around an ELRSGD: an object that has it, or another
such object, as its ``.optimizer`` (accelerate, Lightning) or ``.opt`` (fastai).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import distributed

from ._rule_group import LayerMeasurements
from .optimizer import ELRSGD

__all__ = [
    "LayerRow",
    "LayerTable",
    "Recorder",
    "ScalarWriter",
    "effective_lrs",
    "layer_stats",
    "record_next_step",
]

WRAPPERS = ("optimizer", "opt")  # attributes behind which wrappers have the optimizer
MAX_WRAPPERS = 8  # one in the other


class ScalarWriter(Protocol):
    """What a `Recorder` needs of a writer; `torch.utils.tensorboard.SummaryWriter` has it."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object: ...


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One layer (or filter) at one step.

    Norms are those before the update. Where the step measured nothing (see `layer_stats`) the weight is the current
    one, so after a step the gradient is the previous weight's: there measure between `backward()` and `step()`, or
    with a `Recorder`.

    Attributes:
        name: the parameter's name, of several with the same name all but the first followed by ``@<group>.<index>``;
            with granularity "filter" followed by ``[index]``.
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


def layer_stats(optimizer: object) -> LayerTable:
    """What the last step measured and applied, layer by layer.

    Where that step measured nothing (``rule=None``, or after the hand-over of the warm-up) and before the first step,
    the weights and gradients are measured as they are now. One host read in all. Names are those of
    `model.named_parameters()` if these (or `elropt.param_groups`) were given to the optimizer, else
    "<group>.<index>".

    A step does not measure what its rule does not need: then the radial cosine of layers that are known to be tracked
    and, by the Triton kernels, the gradient of layers that are known not to be, are NaN here. A `Recorder` has
    everything measured, and so has `record_next_step`.

    The table is empty if the rule can concern no parameter.

    Args:
        optimizer: an ELRSGD, or what wraps one.

    Raises:
        RuntimeError: nothing was measured and there are no gradients now.
        TypeError: `optimizer` is no ELRSGD and wraps none.
    """
    optimizer = _unwrapped(optimizer)
    records = optimizer.layer_records()
    if not records:
        if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return LayerTable([])
        raise RuntimeError(
            "no layer has a gradient: call layer_stats after loss.backward(), or after a step and before zero_grad()"
        )
    return _table(records, _parameter_names(optimizer))


def effective_lrs(optimizer: object) -> dict[str, float]:
    """{name: applied ELR} of the tracked layers, as `layer_stats` reports it. One host read in all.

    Raises: as `layer_stats`.
    """
    return {row.name: row.elr for row in layer_stats(optimizer) if row.tracked}


def record_next_step(optimizer: object) -> None:
    """Have the next step measure the layers even where its rule does not need it. It computes the same.

    Raises:
        TypeError: `optimizer` is no ELRSGD and wraps none.
    """
    _unwrapped(optimizer).record_next_step()


class Recorder:
    """Writes `layer_stats` every k steps, from hooks on the optimizer.

    Recording does not change what the optimizer computes. Each record is one line of JSON:
    ``{"step", "elr_spread", "log_elr_std", "layers": {name: {column: value}}}``. It starts on a line of its own even
    where a killed run has left half of one.

    What goes wrong with a record after the step has been made (a full disk, an exception in `writer` or `on_record`)
    does not stop the training: it is a RuntimeWarning, once for each, and that record is lost there.

    Under `torch.distributed` only rank 0 writes and calls; the others still take part in the sums over sharded
    parameters, so every rank must have a Recorder, or none.

    A copy, by `copy`, `pickle` or with the model that holds it, is a closed Recorder: it knows `path`, `every` and
    `step`, watches no optimizer and writes nothing. Nor does a copy of the optimizer bring a Recorder along.

    Args:
        optimizer: the ELRSGD to watch, or what wraps it.
        path: JSONL file, appended to; its folder is made.
        every: record the steps whose number is a multiple of it.
        first_step: number of the next step; after a resume, how many steps the run has made.
        writer: anything with ``add_scalar(tag, value, step)``, such as a `SummaryWriter`: gets elr/<name>, elr_spread
            and log_elr_std too.
        on_record: called with the same scalars as ``on_record({tag: value}, step=step)``: `wandb.log`,
            `accelerator.log`, `mlflow.log_metrics`, `log_metrics` of Lightning's loggers, or a function of your own.

    Raises:
        ValueError: `every` is below 1.
        TypeError: `optimizer` is no ELRSGD and wraps none; `writer` or `on_record` is not as above.
        OSError: `path` cannot be written.

    Use as a context manager or call `close()`; ``elropt plot PATH`` draws the file.
    """

    def __init__(
        self,
        optimizer: object,
        path: str | Path,
        *,
        every: int = 100,
        first_step: int = 0,
        writer: ScalarWriter | None = None,
        on_record: Callable[..., object] | None = None,
    ) -> None:
        watched = _unwrapped(optimizer)
        if every < 1:
            raise ValueError(f"every={every} is not valid: it must be at least 1")
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                f"writer is a {_type_name(writer)}, which has no add_scalar(tag, value, step): pass a SummaryWriter, "
                "or the logger's own function, called as on_record({tag: value}, step=step), as on_record"
            )
        if on_record is not None and not callable(on_record):
            raise TypeError(
                f"on_record is a {_type_name(on_record)}: it must be a function that can be called as "
                "on_record({tag: value}, step=step), such as the log method of a logger"
            )
        self.path = Path(path).absolute()  # the working directory may change
        self.every = every
        self.step = first_step
        self.writer = writer
        self.on_record = on_record
        self._failed: set[str] = set()
        if _is_first_rank():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
        self._hooks = (
            watched.register_step_pre_hook(self._before),
            watched.register_step_post_hook(self._after),
        )

    def _before(self, optimizer: Any, *_: object) -> None:
        if self.step % self.every == 0:
            optimizer.record_next_step()

    def _after(self, optimizer: Any, *_: object) -> None:
        if self.step % self.every == 0:
            with self._going_on("measure the layers"):
                records = optimizer.layer_records()
                if records and _is_first_rank():
                    self._write(_table(records, _parameter_names(optimizer)))
        self.step += 1

    def _write(self, table: LayerTable) -> None:
        scalars = {"elr_spread": table.elr_spread, "log_elr_std": table.log_elr_std}
        layers = {row.name: dataclasses.asdict(row) for row in table}
        for values in layers.values():
            del values["name"]
        record = _finite({"step": self.step, **scalars, "layers": layers})
        scalars |= {f"elr/{row.name}": row.elr for row in table}
        with self._going_on(f"write {self.path}"):
            _append_line(self.path, json.dumps(record, allow_nan=False))
        if self.writer is not None:
            with self._going_on("use its writer"):
                for tag, value in scalars.items():
                    self.writer.add_scalar(tag, value, self.step)
        if self.on_record is not None:
            with self._going_on("call on_record"):
                self.on_record(scalars, step=self.step)

    @contextmanager
    def _going_on(self, action: str) -> Iterator[None]:
        """The weights have been changed: whatever fails now must not stop the training."""
        try:
            yield
        except Exception as error:
            if action not in self._failed:
                self._failed.add(action)
                warnings.warn(
                    f"elropt.Recorder could not {action} at step {self.step}: {type(error).__name__}: {error}. The "
                    "training goes on without this record; the next one is tried again, without another warning",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def close(self) -> None:
        """Stop watching the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "every": self.every, "step": self.step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, writer=None, on_record=None, _failed=set(), _hooks=())


def _unwrapped(optimizer: object) -> ELRSGD:
    """The innermost ELRSGD: Lightning's wrapper claims to be one, too, but what it is told is lost."""
    found, level = None, [optimizer]
    for _ in range(MAX_WRAPPERS + 1):
        found = next((x for x in level if isinstance(x, ELRSGD)), found)
        level = [y for x in level for name in WRAPPERS if (y := getattr(x, name, None)) is not None]
    if found is None:
        raise TypeError(
            f"a {_type_name(optimizer)} is no ELRSGD and has none as its .optimizer or .opt: pass the ELRSGD itself "
            "(ELRSGD(…, rule=None) is torch.optim.SGD that can be watched)"
        )
    return found


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _is_first_rank() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _append_line(path: Path, text: str) -> None:
    with path.open("ab") as file:
        file.write(b"\n" * _ends_in_mid_line(path) + text.encode() + b"\n")


def _ends_in_mid_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_matrix(record: LayerMeasurements) -> torch.Tensor:
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
    s, a, p, own_lr = record.controls
    if own_lr is not None:
        lr = lr * own_lr
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
    """A name of its own for every parameter. Of several with the same name the first keeps it, whoever joins."""
    names: dict[torch.Tensor, str] = {}
    taken = set()
    for i, group in enumerate(optimizer.param_groups):
        places = [f"{i}.{j}" for j in range(len(group["params"]))]
        own = group.get("param_names") or places
        for p, name, place in zip(group["params"], own, places, strict=True):
            names[p] = f"{name}@{place}" if name in taken else name
            taken.add(name)
    return names


def _table(records: list[LayerMeasurements], names: dict[torch.Tensor, str]) -> LayerTable:
    """One host read."""
    values = torch.cat([_as_matrix(record).to(records[0].stats.grad_sq.device) for record in records], dim=1)
    columns = values.double().cpu().numpy().T
    return LayerTable(
        [_row(name, column) for name, column in zip(_row_names(records, names), columns, strict=True)]
    )


def _row_names(records: list[LayerMeasurements], names: dict[torch.Tensor, str]) -> Iterator[str]:
    for record in records:
        for p, count in zip(record.params, record.row_counts, strict=True):
            if record.per_filter and count:
                yield from (f"{names[p]}[{i}]" for i in range(count))
            elif count:
                yield names[p]
