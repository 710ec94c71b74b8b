"""Reading what a Recorder wrote down during a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._json import from_json
from .weight_change import CHANGES

__all__ = ["RuleSpan", "RunHistory", "read_run", "rule_acts", "rule_spans", "spread_of"]

FACTOR_TOLERANCE = 1e-6  # up to which a factor of a rule counts as 1

COLUMNS = ("lr", "weight_norm", "grad_norm", "radial_cosine", "grad_factor", "weight_factor")


def _absent() -> NDArray[np.float64]:
    return np.zeros((0, 0))


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """What a `Recorder` wrote about the layers during one run. What was not recorded is NaN.

    Attributes:
        steps: [T], increasing.
        names: names of the L layers. A layer is tracked if it is so in every record that has it.
        elr: applied effective learning rates, [T, L]. NaN for other optimizers than ELRSGD and `torch.optim.SGD`.
        applied_lr: lr·grad_factor of each layer, [T, L].
        elr_spread: max / min of `elr` over the tracked layers, [T].
        notes: which parts of the file were left out, in words.
        angle: angles that the steps turned the layers by, in radians, [T, L].
        relative_update: ‖w' − w‖/‖w‖, [T, L].
        radial_update: ‖w'‖/‖w‖ − 1, [T, L].

        tracked: which layers are tracked, [L].
        lr: λ of each layer as applied, [T, L].
        weight_norm, grad_norm: ‖w‖ before the step and ‖g‖, [T, L].
        radial_cosine: cos(w, g), [T, L].
        grad_factor, weight_factor: the s and a of a rule, [T, L]; 1 without one.
        weight_decay: ω of each layer's param group, [T, L].
        optimizer: the class, such as "torch.optim.adamw.AdamW".
        control: the rule of `elropt.control`, None without.
        options: by record and layer, the options of the layer's param group, such as "momentum", "betas" and "rule".

    `angle`, `relative_update` and `radial_update` are None for a file of an elropt that did not record them, and
    `optimizer` is "", `options` empty for one that did not describe the optimizer.
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
    tracked: NDArray[np.bool_] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    lr: NDArray[np.float64] = dataclasses.field(default_factory=_absent)
    weight_norm: NDArray[np.float64] = dataclasses.field(default_factory=_absent)
    grad_norm: NDArray[np.float64] = dataclasses.field(default_factory=_absent)
    radial_cosine: NDArray[np.float64] = dataclasses.field(default_factory=_absent)
    grad_factor: NDArray[np.float64] = dataclasses.field(default_factory=_absent)
    weight_factor: NDArray[np.float64] = dataclasses.field(default_factory=_absent)
    weight_decay: NDArray[np.float64] = dataclasses.field(default_factory=_absent)
    optimizer: str = ""
    control: str | None = None
    options: Sequence[Sequence[Mapping[str, Any]]] = ()


def spread_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """max / min of each row [T] of what is positive and finite, [T, L]; NaN where nothing is."""
    shown = np.ma.masked_where(~(np.isfinite(values) & (values > 0)), values)
    return np.ma.filled(shown.max(axis=1) / shown.min(axis=1), np.nan)


def rule_acts(run: RunHistory, layers: NDArray[np.intp] | slice = slice(None)) -> NDArray[np.bool_]:
    """[T] whether the factors of a rule, those of the gradient and of the weight, were not 1 in one of the layers."""
    acts = np.zeros(len(run.steps), dtype=np.bool_)
    for factors in (run.grad_factor, run.weight_factor):
        if factors.size:
            acts |= (np.abs(factors[:, layers] - 1) > FACTOR_TOLERANCE).any(axis=1)
    return acts


class RuleSpan(NamedTuple):
    """Recorded steps, one after the other, at which a rule acted.

    Attributes:
        first, last: the first and the last of them.
        handed_over: the recorded step after them, by which the rule had handed over; None at the end of the run.
    """

    first: int
    last: int
    handed_over: int | None


def rule_spans(run: RunHistory) -> list[RuleSpan]:
    """When a rule acted, see `rule_acts`."""
    edges = np.flatnonzero(np.diff(rule_acts(run).astype(np.int64), prepend=0, append=0))
    steps = run.steps.tolist()
    return [
        RuleSpan(steps[begin], steps[end - 1], steps[end] if end < len(steps) else None)
        for begin, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def read_run(path: str | Path, *, all_layers: bool = False) -> RunHistory:
    """Read the JSONL file of a `Recorder`: the tracked layers, or all that it holds.

    A line that is cut off, because the run was killed, is skipped with a note. A Recorder appends, so a file may hold
    several runs: one begins where the step number does not grow. The last run is returned, with a note.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no complete record, or something else, or no layer that is tracked (with
            `all_layers`: no layer at all).
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
    names = [name for name, always in tracked.items() if always or all_layers]
    if not names and not all_layers:
        raise ValueError(
            f"{path} has no layer that was tracked throughout: give the optimizer the groups of "
            "elropt.param_groups, and see `elropt inspect` for which weights are scale-invariant; `elropt report` "
            "shows the other layers, too"
        )
    if not names:
        raise ValueError(f"{path} has no layer: only weights of two or more dimensions are recorded")
    is_tracked = np.array([tracked[name] for name in names])
    elr = _column(records, names, "elr")
    elr[~(elr > 0)] = np.nan
    columns = {key: _column(records, names, key) for key in COLUMNS}
    has_changes = any("angle" in layer for record in records for layer in record["layers"].values())
    described = _descriptions(records)
    if all_layers:
        notes += _not_measured(names, described[-1])
    options: list[list[dict[str, Any]]] = []
    decay = np.full((len(records), len(names)), np.nan)
    for t, description in enumerate(described):
        if t > 0 and description is described[t - 1]:
            options.append(options[-1])
            decay[t] = decay[t - 1]
        else:
            options.append(_options_of(names, description))
            decay[t] = [_number(of_layer.get("weight_decay")) for of_layer in options[-1]]
    return RunHistory(
        steps=np.array([record["step"] for record in records]),
        names=names,
        elr=elr,
        applied_lr=columns["lr"] * columns["grad_factor"],
        elr_spread=spread_of(np.where(is_tracked, elr, np.nan)),
        notes=notes,
        **{key: _column(records, names, key) if has_changes else None for key in CHANGES},
        tracked=is_tracked,
        **columns,
        weight_decay=decay,
        optimizer=described[-1].get("class", ""),
        control=described[-1].get("control"),
        options=options if any(described) else (),
    )


def _descriptions(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each record says of the optimizer, or the last one before it that did; {} where none has."""
    described, last = [], {}
    for record in records:
        last = record.get("optimizer", last)
        described.append(last)
    return described


def _not_measured(names: list[str], description: dict[str, Any]) -> list[str]:
    """What an ELRSGD leaves out of a record, in words; other optimizers record every weight of two dimensions."""
    if description.get("class", "").rpartition(".")[2] != "ELRSGD":
        return []
    groups = [group for group in description["groups"] if group.get("scale_invariant") is False]
    missing = [name for group in groups for name in group["layers"] if name not in names]
    if not missing:
        return []
    others = f" and {len(missing) - 1} other parameters" if len(missing) > 1 else ""
    return [
        f"not in the record: {missing[0]}{others}. They are in groups with scale_invariant=False, which ELRSGD trains "
        "as plain SGD does, and does not measure"
    ]


def _options_of(names: list[str], description: dict[str, Any]) -> list[dict[str, Any]]:
    """[L] the options of each layer's param group. The rows of a layer's filters are named "layer[index]"."""
    groups: dict[str, dict[str, Any]] = {}
    for group in description.get("groups", []):
        options = {key: value for key, value in group.items() if key != "layers"}
        groups |= dict.fromkeys(group["layers"], options)
    return [groups.get(name) or groups.get(name.rsplit("[", 1)[0], {}) for name in names]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


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
    if not (records or notes):
        raise ValueError(
            f"{path} is empty: no step was recorded. The run made none, or none of them measured a layer: without a "
            "tracked layer ELRSGD measures nothing, and elropt.explain_scale_invariance(model, *inputs) says why a "
            "layer is not tracked"
        )
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
    layers, described = record.get("layers"), record.get("optimizer", {"groups": []})
    if not (isinstance(described, dict) and isinstance(described.get("groups"), list)):
        return False
    if not all(
        isinstance(group, dict) and isinstance(group.get("layers"), list) for group in described["groups"]
    ):
        return False
    return isinstance(layers, dict) and all(
        isinstance(layer, dict)
        and isinstance(layer.get("tracked"), bool)
        and all(
            key in layer and isinstance(layer[key], int | float | None)
            for key in ("elr", "lr", "grad_factor")
        )
        and all(isinstance(layer.get(key), int | float | None) for key in (*CHANGES, *COLUMNS))
        for layer in layers.values()
    )
