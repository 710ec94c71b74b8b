"""fastai: the plain loop's bits under one cycle, tracked lr in proportion, and a run that goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from torch import nn

import elropt

from . import plain_loop

pytest.importorskip("fastai")


def test_the_example_has_the_bits_of_the_plain_loop(example: Callable[[str], ModuleType]) -> None:
    """With the learning rates and momenta that fastai's own recorder has noted."""
    learn = example("with_fastai").main("run")
    inputs, labels = plain_loop.data()
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    hypers = learn.recorder.hps
    assert len(hypers["lr"]) == 32
    assert np.ptp(hypers["lr"]) > 0.09
    for batch, lr, momentum in zip(
        plain_loop.cycle(inputs, labels, 32), hypers["lr"], hypers["mom"], strict=True
    ):
        for group in optimizer.param_groups:
            group["lr"], group["momentum"] = lr, momentum
        plain_loop.train(net, optimizer, [batch])
    plain_loop.assert_same_state(learn.model, net)
    for record in plain_loop.records("run/elr.jsonl"):
        elr = record["layers"]["0.weight"]["elr"]
        assert elr == pytest.approx(0.01 * hypers["lr"][record["step"]] / 0.1, rel=1e-5)


def test_the_example_killed_and_resumed_is_as_if_it_had_not_been(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("with_fastai")
    whole = module.main("whole")

    class Killed(module.SaveModelCallback):
        def after_batch(self) -> None:
            if self.epoch == 2 and self.training and self.iter == 5:
                raise ZeroDivisionError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(module, "SaveModelCallback", Killed)
        with pytest.raises(ZeroDivisionError):
            module.main("parts")
    assert plain_loop.steps("parts/elr.jsonl") == [*range(0, 24, 4)]
    resumed = module.main("parts")
    plain_loop.assert_same_state(resumed.model, whole.model)
    assert plain_loop.steps("parts/elr.jsonl") == plain_loop.steps("whole/elr.jsonl") == [*range(0, 32, 4)]
