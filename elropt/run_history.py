"""Reading what a Recorder wrote down during a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._json import from_json
from .weight_change import CHANGES

__all__ = ["RunHistory", "read_run"]


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """What a `Recorder` wrote about the tracked layers during one run. What was not recorded is NaN.

    Attributes:
        steps: [T], increasing.
        names: names of the L layers. A layer counts if it is tracked in every record that has it.
        elr: applied effective learning rates, [T, L]. NaN for other optimizers than ELRSGD and `torch.optim.SGD`.
        applied_lr: lr·grad_factor of each layer, [T, L].
        elr_spread: max / min of `elr` over those layers, [T].
        notes: which parts of the file were left out, in words.
        angle: angles that the steps turned the layers by, in radians, [T, L].
        relative_update: ‖w' − w‖/‖w‖, [T, L].
        radial_update: ‖w'‖/‖w‖ − 1, [T, L].

    The last three are None for a file of an elropt that did not record them.
    """

    steps: NDArray[np.int64]
    names: list[str]
    elr: NDArray[np.float64]
    applied_lr: NDArray[np.float64]
    elr_spread: NDArray[np.float64]
    notes: list[str]
    angle: NDArray[np.float64] | None = None
    relative_update: NDArray[np.float64] | None = None
    radial_update: NDArray[np.float64] | None = None


def read_run(path: str | Path) -> RunHistory:
    """Read the JSONL file of a `Recorder`.

    A line that is cut off, because the run was killed, is skipped with a note. A Recorder appends, so a file may hold
    several runs: one begins where the step number does not grow. The last run is returned, with a note.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no complete record, or something else, or no layer that is tracked.
    """
    records, notes = _parse_records(Path(path))
    starts = [0] + [i for i in range(1, len(records)) if records[i]["step"] <= records[i - 1]["step"]]
    if len(starts) > 1:
        notes.append(f"{path} holds {len(starts)} runs; this is the last")
        records = records[starts[-1] :]

    tracked: dict[str, bool] = {}
    for record in records:
        for name, layer in record["layers"].items():
            tracked[name] = tracked.get(name, True) and layer["tracked"]
    names = [name for name, always in tracked.items() if always]
    if not names:
        raise ValueError(
            f"{path} has no layer that was tracked throughout: give the optimizer the groups of "
            "elropt.param_groups, and see `elropt inspect` for which weights are scale-invariant"
        )
    elr = _column(records, names, "elr")
    applied_lr = _column(records, names, "lr") * _column(records, names, "grad_factor")
    elr[~(elr > 0)] = np.nan
    has_elr = ~np.isnan(elr).all(axis=1)
    spread = np.full(len(records), np.nan)
    spread[has_elr] = np.nanmax(elr[has_elr], axis=1) / np.nanmin(elr[has_elr], axis=1)
    steps = np.array([record["step"] for record in records])
    has_changes = any("angle" in layer for record in records for layer in record["layers"].values())
    changes = [_column(records, names, key) if has_changes else None for key in CHANGES]
    return RunHistory(steps, names, elr, applied_lr, spread, notes, *changes)


def _column(records: list[dict[str, Any]], names: list[str], key: str) -> NDArray[np.float64]:
    """[T, L]: one value of every layer; NaN where there is none."""
    values = [[from_json(record["layers"].get(name, {}).get(key)) for name in names] for record in records]
    return np.array(values, dtype=np.float64)


def _parse_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text file; give the JSONL file that elropt.Recorder wrote"
        ) from error
    records = []
    notes = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines) and not _is_cut_off(line):
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); {_EXPECTED}") from error
            notes.append(f"{path}, line {number}: cut off, skipped")
            continue
        if not _is_record(record):
            raise ValueError(f"{path}, line {number}: not a record of elropt.Recorder; {_EXPECTED}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no complete record; {_EXPECTED}")
    return records, notes


def _is_cut_off(line: str) -> bool:
    """Whether it may be the rest of a killed run: the beginning of a record, or zeros after a power failure."""
    line = line.strip("\0")
    return line.startswith(_BEGINNING) or _BEGINNING.startswith(line)


_BEGINNING = '{"step":'
_EXPECTED = (
    'each line must be {"step": …, "layers": {name: {"elr": …, "lr": …, "grad_factor": …, "tracked": …}}}'
)


def _is_record(record: object) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    layers = record.get("layers")
    return isinstance(layers, dict) and all(
        isinstance(layer, dict)
        and isinstance(layer.get("tracked"), bool)
        and all(
            key in layer and isinstance(layer[key], int | float | None)
            for key in ("elr", "lr", "grad_factor")
        )
        and all(isinstance(layer.get(key), int | float | None) for key in CHANGES)
        for layer in layers.values()
    )
