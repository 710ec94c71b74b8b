"""The examples of plain torch: the bits of the same training written down again, and of a run that was stopped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import elropt

from ..frameworks import plain_loop

Load = Callable[[str], ModuleType]
STOPS: dict[
    str, tuple[dict[str, Any], dict[str, Any]]
] = {  # arguments of a whole run, and of one that is stopped
    "with_clip_grad_norm": ({}, {"steps": 20}),
    "with_grad_scaler": ({}, {"steps": 20}),
    "with_one_cycle": ({}, {"steps": 20}),
    "with_ema_swa": ({}, {"epochs": 3}),
    "with_gradual_unfreezing": ({}, {"epochs": 1}),
    "with_torch_compile": ({"backend": "eager"}, {"steps": 20, "backend": "eager"}),
    "with_tensorboard": ({}, {"steps": 20}),
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def steps_of_the_plain_loop() -> tuple[nn.Sequential, elropt.ELRSGD, Iterator[Tensor]]:
    """Net, optimizer and gradients: each item is the loss of the next batch, after its backward pass."""
    inputs, labels = plain_loop.data()
    hidden = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    net = nn.Sequential(*hidden, nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4))
    groups = elropt.param_groups(net, inputs[:64], weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")

    def losses() -> Iterator[Tensor]:
        for x, y in plain_loop.cycle(inputs, labels, 1000):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            yield loss

    return net, optimizer, losses()


Plain = tuple[nn.Sequential, elropt.ELRSGD, Iterator[Tensor]]


@pytest.mark.parametrize("name", STOPS)
def test_resumed_is_as_if_it_had_not_been_stopped(name: str, example: Load) -> None:
    main = example(name).main
    options, stop = STOPS[name]
    whole = main("whole", **options)
    main("parts", **stop)
    parts = main("parts", **options)
    if name == "with_ema_swa":
        for average in ("ema", "swa"):
            plain_loop.assert_same_state(parts[1][average], whole[1][average])
        parts, whole = parts[0], whole[0]
    plain_loop.assert_same_state(parts, whole)
    a, b = plain_loop.records("parts/elr.jsonl"), plain_loop.records("whole/elr.jsonl")
    assert [(r["step"], r["layers"]) for r in a] == [(r["step"], r["layers"]) for r in b]
    assert len({r["step"] for r in b}) == len(b) > 3


def test_clipping(example: Load, steps_of_the_plain_loop: Plain) -> None:
    """Head, gains and biases are clipped; under "angle" the tracked layers take the same step for any gradient norm."""
    fitted = example("with_clip_grad_norm").main("run", steps=8)
    net, optimizer, losses = steps_of_the_plain_loop
    tracked = [net[0].weight, net[3].weight]
    for _, _ in zip(range(8), losses, strict=False):
        others = [p for p in net.parameters() if all(p is not t for t in tracked)]
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in others if p.grad is not None))
        assert norm > 0.1
        for p in others:
            assert p.grad is not None
            p.grad.mul_(0.1 / (norm + 1e-6))
        for p in tracked:
            assert p.grad is not None
            p.grad.mul_(8.0)
        optimizer.step()
    for ours, theirs in zip(fitted.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_one_cycle_keeps_the_tracked_layers_at_a_tenth(example: Load, steps_of_the_plain_loop: Plain) -> None:
    fitted = example("with_one_cycle").main("run")
    net, optimizer, losses = steps_of_the_plain_loop
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)
    lrs = []
    for _, _ in zip(range(40), losses, strict=False):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    plain_loop.assert_same_state(fitted, net)
    assert max(lrs) == pytest.approx(0.1, rel=0.01)
    for record in plain_loop.records("run/elr.jsonl"):
        elrs = [record["layers"][name]["elr"] for name in ("0.weight", "3.weight")]
        assert elrs == pytest.approx([0.1 * lrs[record["step"]]] * 2, rel=1e-4)


def test_averages(example: Load, steps_of_the_plain_loop: Plain) -> None:
    """In float64 from the plain loop's weights; BatchNorm has the statistics of the averaged net."""
    fitted, averages = example("with_ema_swa").main("run")
    net, optimizer, losses = steps_of_the_plain_loop
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
    weight = net[0].weight
    ema, swa = None, []
    for step, _ in zip(range(32), losses, strict=False):
        optimizer.step()
        now = weight.detach().double()
        ema = now if ema is None else 0.9 * ema + 0.1 * now
        if step in (23, 31):
            swa.append(now.clone())
            schedule.step()
    plain_loop.assert_same_state(fitted, net)
    torch.testing.assert_close(averages["ema"].module[0].weight.double(), ema, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(averages["swa"].module[0].weight.double(), sum(swa) / 2, rtol=1e-5, atol=1e-7)
    inputs, _ = plain_loop.data()
    for average in averages.values():
        hidden = inputs @ average.module[0].weight.T
        torch.testing.assert_close(average.module[1].running_mean, hidden.mean(0), rtol=1e-3, atol=1e-5)


def test_frozen_layers_stay_and_turn_once_they_are_thawed(example: Load) -> None:
    main = example("with_gradual_unfreezing").main
    torch.manual_seed(0)
    nets = [main("run", epochs=epochs) for epochs in (0, 1, 2, 3)]
    moved = [
        [not torch.equal(before[i].weight, after[i].weight) for i in (0, 3, 5)]
        for before, after in itertools.pairwise(nets)
    ]
    assert moved == [[False, False, True], [False, True, True], [True, True, True]]
    angles = {
        record["step"]: [record["layers"].get(name, {}).get("angle") for name in ("0.weight", "3.weight")]
        for record in plain_loop.records("run/elr.jsonl")
    }
    assert angles[8][1] == pytest.approx(0.01, rel=1e-3)  # the first step of each, without momentum
    assert angles[16][0] == pytest.approx(0.01, rel=1e-3)


def test_mixed_precision_counts_the_steps_of_the_loop(example: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps overflow, until the scale is small enough: their numbers are missing, and no others."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**30))
    example("with_grad_scaler").main("run")
    records = plain_loop.records("run/elr.jsonl")
    steps = [record["step"] for record in records]
    assert steps == [*range(steps[0], 40)]
    assert steps[0] > 3
    for record in records:
        assert record["layers"]["3.weight"]["elr"] == pytest.approx(0.01, rel=1e-3)


def test_compiled_has_the_bits_of_the_plain_loop(example: Load, steps_of_the_plain_loop: Plain) -> None:
    fitted = example("with_torch_compile").main("run", backend="eager")
    net, optimizer, losses = steps_of_the_plain_loop
    for _, _ in zip(range(40), losses, strict=False):
        optimizer.step()
    plain_loop.assert_same_state(fitted, net)


def test_tensorboard_has_the_angles(example: Load, steps_of_the_plain_loop: Plain) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main = example("with_tensorboard").main
    main("run", steps=20)
    main("run")
    net, optimizer, losses = steps_of_the_plain_loop
    angles = {}
    for step, _ in zip(range(40), losses, strict=False):
        before = net[0].weight.detach().clone()
        optimizer.step()
        angles[step] = plain_loop.angle(before, net[0].weight)
    events = EventAccumulator("run").Reload()
    logged = {event.step: event.value for event in events.Scalars("angle/0.weight")}
    assert logged == pytest.approx({step: angles[step] for step in range(0, 40, 4)}, rel=1e-5)
    assert [event.step for event in events.Scalars("loss")] == [*range(40)]
