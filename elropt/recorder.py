"""Writing down the layers of any torch optimizer every k steps, during training."""

from __future__ import annotations

import json
import operator
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import distributed

from ._json import to_json
from ._optimizer_options import describe_optimizer
from ._step_watch import StepWatch, record_of, watch_of
from ._unwrap import type_name, unwrap
from .layer_table import LayerTable, Tracked, check_tracked, last_records, table_of

__all__ = ["Recorder", "ScalarWriter"]


class ScalarWriter(Protocol):
    """What a `Recorder` needs of a writer; `torch.utils.tensorboard.SummaryWriter` has it."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object: ...


def whole_number(name: str, value: Any, *, at_least: int) -> int:
    """`value` as Python's own; NumPy's and one-element tensors of integers are taken too.

    Raises:
        ValueError: it is no whole number, or below `at_least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < at_least:
        raise ValueError(f"{name}={value!r} is not valid: it must be a whole number, at least {at_least}")
    return number


class Recorder:
    """Writes `layer_stats` every k steps, from hooks on the optimizer, with the angles that the weights turned by.

    Recording does not change what the optimizer computes. A step that is recorded costs a copy of the recorded weights,
    which is freed after it, and one host read; any other step a few comparisons. Steps are those that call the
    optimizer: one that `torch.amp.GradScaler` leaves out without calling it is not counted; one that the optimizer
    itself leaves out (fused optimizers, ELRSGD's kernels) is, and has angle 0. While a CUDA graph is captured, and when
    it is replayed, nothing is recorded. With a closure, gradients are those of its first evaluation.

    Each record is one line of JSON: ``{"step", "elr_spread", "log_elr_std", "angle_spread", "layers":
    {name: {column: value}}}``. The first record, and each one after a change, also has ``"optimizer"``: the class, and
    the options of the param groups with the names of their parameters, see `describe_optimizer`. If a killed run has
    left half a line at the end of the file, the next record starts on a new line.

    A failure after the step (a full disk, an exception in `writer` or `on_record`) does not stop the training: that
    record is lost there, and a RuntimeWarning says so: one for the file, one for `writer`, one for `on_record`.

    Under `torch.distributed` only rank 0 writes and calls. The other ranks take part in the sums over sharded
    parameters, so either every rank has a Recorder or none has.

    A copy (by `copy`, `pickle` or with the model that holds it) is a closed Recorder: it keeps `path`, `every` and
    `step`, watches no optimizer and writes nothing. A copy of the optimizer has no Recorder.

    Args:
        optimizer: any torch optimizer, or what wraps one.
        path: JSONL file; records are appended, and a missing folder is made.
        every: record the steps whose number is a multiple of it.
        first_step: number of the next step; after a resume, how many steps the run has made. Records of this step and
            of later ones at the end of the file, which a run that was killed after its last checkpoint has left, are
            removed: those steps are made again.
        writer: anything with ``add_scalar(tag, value, step)``, such as a `SummaryWriter`. It gets `elr/<name>`,
            `angle/<name>`, elr_spread, log_elr_std and angle_spread.
        on_record: called with the same scalars as ``on_record({tag: value}, step=step)``: `wandb.log`,
            `accelerator.log`, `mlflow.log_metrics`, `log_metrics` of Lightning's loggers, or a function of your own.
        tracked: for other optimizers than ELRSGD, which weights are scale-invariant, see `layer_stats`.

    Raises:
        ValueError: `every` is no whole number above 0, `first_step` none from 0 on, or `tracked` does not fit the
            optimizer.
        TypeError: `optimizer` is no torch optimizer and wraps none; `writer` or `on_record` is not as above.
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
        tracked: Tracked = None,
    ) -> None:
        watched = unwrap(optimizer)
        every = whole_number("every", every, at_least=1)
        first_step = whole_number("first_step", first_step, at_least=0)
        if writer is not None and not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                f"writer is a {type_name(writer)}, which has no add_scalar(tag, value, step): pass a SummaryWriter, "
                "or the logger's own function, called as on_record({tag: value}, step=step), as on_record"
            )
        if on_record is not None and not callable(on_record):
            raise TypeError(
                f"on_record is a {type_name(on_record)}: it must be a function that can be called as "
                "on_record({tag: value}, step=step), such as the log method of a logger"
            )
        self._tracked = check_tracked(watched, tracked)
        self.path = Path(path).absolute()  # the working directory may change
        self.every = every
        self.step = first_step
        self.writer = writer
        self.on_record = on_record
        self._described: dict[str, Any] = {}  # what the file says of the optimizer
        self._failed: set[str] = set()
        if _is_first_rank():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()
            if first_step > 0:
                _drop_records_from(self.path, first_step)
        self._watch: StepWatch | None = watch_of(watched)
        self._watch.add(self, watched)

    def wants_next_step(self) -> bool:
        """Whether the next step is to be recorded."""
        return self.step % self.every == 0

    def after_step(self, optimizer: Any, failure: Exception | None) -> None:
        """Count a step, and write its record if it has one. `failure`: why it could not be measured."""
        if self.step % self.every == 0:
            with self._going_on("measure the layers"):
                if failure is not None:
                    raise failure
                records = last_records(optimizer) if record_of(optimizer) is not None else []
                if records and _is_first_rank():
                    self._write(table_of(optimizer, records, self._tracked), describe_optimizer(optimizer))
        self.step += 1

    def _write(self, table: LayerTable, described: dict[str, Any]) -> None:
        scalars = {name: getattr(table, name) for name in ("elr_spread", "log_elr_std", "angle_spread")}
        layers = {row.name: {k: v for k, v in vars(row).items() if k != "name"} for row in table}
        changed = {} if described == self._described else {"optimizer": described}
        record = to_json({"step": self.step, **scalars, **changed, "layers": layers})
        scalars |= {
            f"{column}/{row.name}": getattr(row, column) for row in table for column in ("elr", "angle")
        }
        with self._going_on(f"write {self.path}"):
            _append_line(self.path, json.dumps(record, allow_nan=False))
            self._described = described
        if self.writer is not None:
            with self._going_on("use its writer"):
                for tag, value in scalars.items():
                    self.writer.add_scalar(tag, value, self.step)
        if self.on_record is not None:
            with self._going_on("call on_record"):
                self.on_record(scalars, step=self.step)

    @contextmanager
    def _going_on(self, action: str) -> Iterator[None]:
        """Make a warning of any error: the step has changed the weights, so the training must not stop here."""
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
        if self._watch is not None:
            self._watch.remove(self)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "every": self.every, "step": self.step}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state, writer=None, on_record=None, _failed=set(), _watch=None, _tracked=None, _described={}
        )


def _is_first_rank() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _append_line(path: Path, text: str) -> None:
    with path.open("ab") as file:
        file.write(b"\n" * _ends_in_mid_line(path) + text.encode() + b"\n")


def _drop_records_from(path: Path, step: int) -> None:
    """Remove the last records of the file, as far as they are of this step or of later ones."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = len(lines)
    for i in reversed(range(len(lines))):
        found = _step_of(lines[i])
        if found is not None and found < step:
            break
        if found is not None:
            kept = i
    if kept < len(lines):
        os.truncate(path, sum(map(len, lines[:kept])))


def _step_of(line: bytes) -> int | None:
    """The step of a record; None where the line is cut off or something else."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _ends_in_mid_line(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
