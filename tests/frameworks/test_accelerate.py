"""Accelerate: the plain loop's bits, a stop, the trackers, and what the Recorder sees through the wrapper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import elropt

from . import plain_loop

pytest.importorskip("accelerate")


def test_the_example_has_the_bits_of_the_plain_loop(example: Callable[[str], ModuleType]) -> None:
    fitted = example("with_accelerate").main("run")
    inputs, labels = plain_loop.data()
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    angles: dict[int, float] = {}
    weight = net[0].weight

    def look(step: int, before: dict[str, torch.Tensor]) -> None:
        angles[step] = plain_loop.angle(before["0.weight"], weight)

    plain_loop.train(net, optimizer, plain_loop.cycle(inputs, labels, 32), look)
    plain_loop.assert_same_state(fitted, net)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in Path("run").rglob("events.out.*")}
    events = EventAccumulator(str(folder)).Reload()
    logged = {event.step: event.value for event in events.Scalars("angle/0.weight")}
    assert logged == pytest.approx({step: angles[step] for step in range(0, 32, 4)}, rel=1e-5)


def test_the_example_resumed_is_as_if_it_had_not_been_stopped(example: Callable[[str], ModuleType]) -> None:
    main = example("with_accelerate").main
    whole = main("whole")
    main("parts", epochs=2)
    plain_loop.assert_same_state(main("parts"), whole)
    a, b = plain_loop.records("parts/elr.jsonl"), plain_loop.records("whole/elr.jsonl")
    assert [(r["step"], r["layers"]) for r in a] == [(r["step"], r["layers"]) for r in b]
    assert plain_loop.steps("whole/elr.jsonl") == [*range(0, 32, 4)]
