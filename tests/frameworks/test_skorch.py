"""skorch: the plain loop's bits, the net's history, and a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from torch import nn

import elropt

from . import plain_loop

pytest.importorskip("skorch")


def test_the_example_has_the_bits_of_the_plain_loop(example: Callable[[str], ModuleType]) -> None:
    fitted = example("with_skorch").main("run")
    inputs, labels = plain_loop.data()
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    plain_loop.train(net, optimizer, plain_loop.cycle(inputs, labels, 32))
    plain_loop.assert_same_state(fitted.module_, net)
    assert plain_loop.steps("run/elr.jsonl") == [*range(0, 32, 4)]
    spreads = [row.get("elr_spread") for epoch in fitted.history for row in epoch["batches"]]
    assert [i for i, spread in enumerate(spreads) if spread is not None] == [*range(0, 32, 4)]
    assert spreads[0] == pytest.approx(1.0)  # there is one tracked layer


def test_the_example_resumed_is_as_if_it_had_not_been_stopped(example: Callable[[str], ModuleType]) -> None:
    main = example("with_skorch").main
    whole = main("whole")
    main("parts", epochs=2)
    resumed = main("parts", epochs=2)
    plain_loop.assert_same_state(resumed.module_, whole.module_)
    assert len(resumed.history) == 4
    assert plain_loop.steps("parts/elr.jsonl") == plain_loop.steps("whole/elr.jsonl")
