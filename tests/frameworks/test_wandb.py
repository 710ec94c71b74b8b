"""Weights & Biases, offline: it gets the numbers of the Recorder's file, also after a stop."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from . import plain_loop

wandb = pytest.importorskip("wandb")


def test_the_example_logs_what_the_file_has(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[int, dict[str, float]] = {}
    log = wandb.Run.log

    def watched(run: Any, data: dict[str, float], step: int) -> None:
        log(run, data, step=step)
        assert run.offline
        assert run.step == step  # a step before the last one would have been left out
        logged.setdefault(step, {}).update(data)

    main = example("with_wandb").main
    whole = main("whole")
    monkeypatch.setattr(wandb.Run, "log", watched)
    main("parts", steps=20)
    plain_loop.assert_same_state(main("parts"), whole)
    a, b = plain_loop.records("parts/elr.jsonl"), plain_loop.records("whole/elr.jsonl")
    assert [(r["step"], r["layers"]) for r in a] == [(r["step"], r["layers"]) for r in b]
    assert [step for step, data in logged.items() if "loss" in data] == [*range(40)]
    angles = {step: data["angle/0.weight"] for step, data in logged.items() if "angle/0.weight" in data}
    assert angles == {record["step"]: record["layers"]["0.weight"]["angle"] for record in b}
    assert len(angles) == 10
