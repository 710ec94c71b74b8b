"""Lightning Fabric: the plain loop's bits, and a run that was stopped."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import elropt

from . import plain_loop

pytest.importorskip("lightning.fabric")


def test_the_example_has_the_bits_of_the_plain_loop(example: Callable[[str], ModuleType]) -> None:
    fitted = example("with_fabric").main("run")
    inputs, labels = plain_loop.data()
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    angles: dict[int, float] = {}
    weight = net[0].weight

    def look(step: int, before: dict[str, torch.Tensor]) -> None:
        angles[step] = plain_loop.angle(before["0.weight"], weight)

    plain_loop.train(net, optimizer, plain_loop.cycle(inputs, labels, 40), look)
    plain_loop.assert_same_state(fitted, net)
    with next(Path("run").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [*range(0, 40, 4)]
    for row in rows:
        assert float(row["angle/0.weight"]) == pytest.approx(angles[int(row["step"])], rel=1e-5)


def test_the_example_resumed_is_as_if_it_had_not_been_stopped(example: Callable[[str], ModuleType]) -> None:
    main = example("with_fabric").main
    whole = main("whole", steps=40)
    main("parts", steps=20)
    plain_loop.assert_same_state(main("parts", steps=40), whole)
    assert plain_loop.steps("parts/elr.jsonl") == plain_loop.steps("whole/elr.jsonl") == [*range(0, 40, 4)]
