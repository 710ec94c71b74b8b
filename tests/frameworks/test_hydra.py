"""Hydra: the YAML file of the example, overrides, and a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

import elropt

from .. import nets
from . import plain_loop
from .conftest import EXAMPLES

hydra = pytest.importorskip("hydra")


def config(*overrides: str) -> object:
    with hydra.initialize_config_dir(str(EXAMPLES), version_base=None):
        return hydra.compose("with_hydra", list(overrides))


def test_the_example_has_the_bits_of_the_plain_loop(example: Callable[[str], ModuleType]) -> None:
    fitted = example("with_hydra").train(config("folder=run"))
    inputs, labels = plain_loop.data()
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    plain_loop.train(net, optimizer, plain_loop.cycle(inputs, labels, 40))
    plain_loop.assert_same_state(fitted, net)


def test_the_example_resumed_is_as_if_it_had_not_been_stopped(example: Callable[[str], ModuleType]) -> None:
    train = example("with_hydra").train
    whole = train(config("folder=whole"))
    train(config("folder=parts", "steps=18"))
    plain_loop.assert_same_state(train(config("folder=parts")), whole)
    assert plain_loop.records("parts/elr.jsonl")[-1] == plain_loop.records("whole/elr.jsonl")[-1]
    assert plain_loop.steps("parts/elr.jsonl") == plain_loop.steps("whole/elr.jsonl") == [*range(0, 40, 4)]


def test_the_command_line_changes_any_option() -> None:
    chosen = config("optimizer.rule=uniform", "optimizer.tracked_lr=null", "+optimizer.nesterov=true")
    net, batch = nets.bn_mlp(), torch.randn(16, 8)
    optimizer = hydra.utils.instantiate(chosen.optimizer)(elropt.param_groups(net, batch))
    group = optimizer.param_groups[0]
    assert (group["rule"], group["tracked_lr"], group["nesterov"]) == ("uniform", None, True)
