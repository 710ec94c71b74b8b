"""PyTorch Ignite: the plain loop's bits, the engine's metrics, and a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from torch import nn

import elropt

from . import plain_loop

pytest.importorskip("ignite")


def test_the_example_has_the_bits_of_the_plain_loop(example: Callable[[str], ModuleType]) -> None:
    trainer, fitted = example("with_ignite").main("run")
    inputs, labels = plain_loop.data()
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    angles = {}

    def look(step: int, before: plain_loop.Weights) -> None:
        angles[step] = plain_loop.angle(before["0.weight"], net[0].weight)

    plain_loop.train(net, optimizer, plain_loop.cycle(inputs, labels, 32), look)
    plain_loop.assert_same_state(fitted, net)
    assert trainer.state.metrics["angle/0.weight"] == pytest.approx(angles[28], rel=1e-5)


def test_the_example_resumed_is_as_if_it_had_not_been_stopped(example: Callable[[str], ModuleType]) -> None:
    main = example("with_ignite").main
    _, whole = main("whole")
    main("parts", epochs=2)
    trainer, resumed = main("parts")
    plain_loop.assert_same_state(resumed, whole)
    assert trainer.state.iteration == 32
    assert plain_loop.steps("parts/elr.jsonl") == plain_loop.steps("whole/elr.jsonl") == [*range(0, 32, 4)]
