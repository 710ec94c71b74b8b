"""Weights & Biases, offline: the numbers of the Recorder's file, also after a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from . import plain_loop

pytest.importorskip("wandb")


def logged(folder: str) -> list[dict[str, float]]:
    """What the offline runs in a folder hold, in order."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    rows = []
    for path in sorted(Path(folder).rglob("*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while data := store.scan_data():
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items})
    return rows


def test_the_example_logs_what_the_file_has(example: Callable[[str], ModuleType]) -> None:
    main = example("with_wandb").main
    whole = main("whole")
    main("parts", steps=20)
    plain_loop.assert_same_state(main("parts"), whole)
    a, b = plain_loop.records("parts/elr.jsonl"), plain_loop.records("whole/elr.jsonl")
    assert [(r["step"], r["layers"]) for r in a] == [(r["step"], r["layers"]) for r in b]
    rows = logged("whole")
    assert [row["_step"] for row in rows if "loss" in row] == [*range(40)]
    angles = {row["_step"]: row["angle/0.weight"] for row in rows if "angle/0.weight" in row}
    assert angles == {record["step"]: record["layers"]["0.weight"]["angle"] for record in b}
    assert len(angles) == 10
