"""One training run: schedules, what is recorded, and the warm-ups that are compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.common import text, training, warmups
from benchmarks.common.optimizers import LINEAR_SHARE, METHODS, Method
from benchmarks.common.training import Run, Task
from elropt import dynamics
from tests.nets import backward, bn_mlp, invariant_weights

TASK = Task("bn-mlp-4-w16", epochs=2)


@pytest.fixture
def few_sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Held-out parts of a few windows, so that a run takes less than a second."""
    monkeypatch.setattr(text, "HELD_OUT", 32)
    training._load.cache_clear()
    yield
    training._load.cache_clear()


def train(method: Method | str, task: Task = TASK, lr: float = 0.1, **changes: Any) -> dict[str, Any]:
    method = METHODS[method] if isinstance(method, str) else method
    return training.train(Run(task, method, lr, 0, **changes))


@pytest.mark.parametrize("steps", [1, 5, 21, 160])
def test_recorded_steps(steps: int) -> None:
    recorded = training.recorded_steps(steps)
    assert recorded == sorted(set(recorded))
    assert {0, steps - 1} <= set(recorded) <= set(range(steps))
    assert set(range(min(steps, training.FIRST_STEPS))) <= set(recorded)
    assert 100 not in range(steps) or 100 in recorded


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_linear_warmup_then_cosine(share: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = training.make_schedule(optimizer, 100, share)
    lrs = []
    for _ in range(100):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    n = round(100 * share)
    expected = [
        (t + 1) / n if t < n else 0.5 * (1 + math.cos(math.pi * (t - n) / (100 - n))) for t in range(100)
    ]
    np.testing.assert_allclose(lrs, expected, atol=1e-9)


def test_cosine_to_a_power() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = training.make_schedule(optimizer, 40, 0.25, 2.0)
    lrs = []
    for _ in range(40):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [
        0.5 * ((t + 1) / 10 if t < 10 else (0.5 + 0.5 * math.cos(math.pi * (t - 10) / 30)) ** 2)
        for t in range(40)
    ]
    np.testing.assert_allclose(lrs, expected, atol=1e-9)


def test_a_share_of_the_steps_has_the_whole_schedule() -> None:
    task = dataclasses.replace(TASK, epochs=3, curve=6)
    third = train("sgd", task, share=1 / 3)
    alone = train("sgd", dataclasses.replace(task, epochs=1, curve=2))
    in_epoch = alone["steps"]
    assert third["steps"] == in_epoch
    timed = {"seconds", "curve"}
    assert {k: v for k, v in third.items() if k not in timed} == {
        k: v for k, v in alone.items() if k not in timed
    }
    assert [(p[0], p[2]) for p in third["curve"]] == [(p[0], p[2]) for p in alone["curve"]]
    half = train("sgd", task, share=0.5)
    assert half["steps"] == round(1.5 * in_epoch)
    assert [point[0] for point in half["curve"]] == pytest.approx([0.5, 1.0, 1.5], abs=1 / in_epoch)


def test_the_validation_part_has_the_share_that_the_task_says() -> None:
    sizes = {s: len(training.load(dataclasses.replace(TASK, validation=s)).val_y) for s in (0.1, 0.2)}
    assert sizes[0.2] == pytest.approx(2 * sizes[0.1], abs=1)


@pytest.mark.parametrize("name", ["equilibrium-gradient", "equilibrium-filter"])
def test_every_form_of_a_rule_can_be_released(name: str) -> None:
    task = dataclasses.replace(TASK, weight_decay=5e-4)
    method = dataclasses.replace(METHODS[name], release=0.5)
    assert train(method, task)["finite"]


def test_the_same_run_gives_the_same_row() -> None:
    first, second = (train("warmup") for _ in range(2))
    del first["seconds"], second["seconds"]
    assert first == second
    other = training.train(Run(TASK, METHODS["warmup"], 0.1, 1))
    assert other["spread"] != first["spread"]


def test_a_row_says_what_was_applied() -> None:
    steps = 2 * (len(training.load(TASK).train_y) // 128)
    for name in ("sgd", "uniform", "angle", "sgd+linear"):
        row = train(name, lr=0.01, layers=True)
        assert row["trace_steps"] == training.recorded_steps(steps)
        assert set(training.TRACE_COLUMNS) <= set(row)
        assert row["steps"] == steps
        assert row["finite"]
        E, elr = np.array(row["E"]), np.array(row["elr"])
        assert E.shape == elr.shape == (len(row["trace_steps"]), 3)
        np.testing.assert_allclose(row["spread"], E.max(1) / E.min(1), rtol=2e-3)
        np.testing.assert_allclose(row["applied_spread"], elr.max(1) / elr.min(1), rtol=2e-3)
        np.testing.assert_allclose(row["mean_elr"], np.exp(np.log(elr).mean(1)), rtol=2e-3)
        np.testing.assert_allclose(row["log_std"], np.log(E).std(1), rtol=1e-2, atol=2e-3)
        if name == "angle":
            np.testing.assert_allclose(elr[0], 0.01, rtol=1e-3)
        if name == "uniform":
            np.testing.assert_allclose(row["applied_spread"], 1, rtol=1e-3)
            assert row["spread"][0] > 1.2
        if name == "sgd":
            np.testing.assert_allclose(elr[0], 0.01 * E[0], rtol=2e-3)
        if name == "sgd+linear":
            rise = round(LINEAR_SHARE * steps)
            np.testing.assert_allclose(elr[0], 0.01 / rise * E[0], rtol=2e-3)


def test_validation_and_test_images_are_different_ones() -> None:
    val, test = train("sgd"), train("sgd", part="test")
    assert val["spread"] == test["spread"]  # the same training
    assert val["accuracy"] != test["accuracy"]
    data = training.load(TASK)
    assert round(test["accuracy"] * len(data.test_y), 6).is_integer()


def test_curve_is_evaluated_on_the_way_without_changing_the_run() -> None:
    task = dataclasses.replace(TASK, epochs=4, curve=2)
    row, plain = train("warmup", task), train("warmup", dataclasses.replace(task, curve=0))
    assert [epoch for epoch, _, _ in row["curve"]] == [2, 4]
    assert row["curve"][-1][2] == row["accuracy"] == plain["accuracy"]
    assert row["curve"][0][1] < row["curve"][1][1] <= row["seconds"]


def test_release_ends_the_rule() -> None:
    method = dataclasses.replace(METHODS["uniform"], release=0.5)
    row, uniform = train(method), train("uniform")
    half = row["steps"] // 2
    for step, applied, always in zip(
        row["trace_steps"], row["applied_spread"], uniform["applied_spread"], strict=True
    ):
        assert always == pytest.approx(1, abs=1e-3)
        assert applied == pytest.approx(1, abs=1e-3) if step < half else applied > 1.05


@pytest.mark.filterwarnings("ignore:no parameter is tracked")
def test_a_run_that_diverges_ends_and_says_so() -> None:
    row = train("sgd", Task("mlp-3-w8", epochs=30), lr=1e12)
    assert not row["finite"]
    assert row["steps"] < 30 * 8
    assert row["trace_steps"] == []


def test_the_spread_is_that_before_a_start_has_acted_and_what_is_applied_that_after() -> None:
    natural, row = train("sgd"), train(Method("equalize", "sgd", start="equalize"))
    assert row["spread"][0] == natural["spread"][0] > 1.2
    assert row["applied_spread"][0] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["adamw", "muon", "lars", "sgdp"])
def test_peers_train(name: str) -> None:
    if METHODS[name].entry.package is not None:
        pytest.importorskip(METHODS[name].entry.package)
    row = train(name, lr=METHODS[name].lrs[1])
    assert row["finite"]
    assert row["spread"][0] > 1
    assert row["applied_spread"] == []


def test_a_text_net_learns_and_is_judged_by_its_loss(few_sources: None) -> None:
    task = Task("olmo-1-w32", "python", epochs=2, batch_size=16, limit=320)
    row = train("adamw", task, lr=0.01)
    assert "accuracy" not in row
    assert 0 < row["nats_per_character"] < row["chance"] < math.log(row["classes"])
    held_out = train("adamw", task, lr=0.01, part="test")
    assert held_out["nats_per_character"] != row["nats_per_character"]


# Warm-ups


def sgd_on_a_net(lr: float = 0.5, momentum: float = 0.0) -> tuple[Any, list[Tensor], torch.optim.SGD]:
    torch.manual_seed(0)
    model = bn_mlp()
    weights = invariant_weights(model)
    return model, weights, torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def relative_grads(weights: list[Tensor]) -> np.ndarray:
    return np.array([(w.grad.double().norm() / w.double().norm()).item() for w in weights])


@pytest.mark.parametrize("name", ["monotone", "balance"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_capped_steps_have_the_critical_learning_rate(name: str, momentum: float) -> None:
    model, weights, optimizer = sgd_on_a_net(lr=1e4, momentum=momentum)
    warmups.WARMUPS[name](optimizer, weights)
    backward(model, 0)
    E, before = relative_grads(weights), [w.detach().clone() for w in weights]
    critical = (dynamics.monotone_lr if name == "monotone" else dynamics.balance_lr)(E) * (1 - momentum)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 1e4
    for w, w0 in zip(weights, before, strict=True):
        torch.testing.assert_close(w0 - w, float(critical) * w.grad, rtol=1e-4, atol=1e-6)


def test_the_cap_ends_for_good_once_it_does_not_bind() -> None:
    model, weights, optimizer = sgd_on_a_net(lr=1e-6)
    warmups.WARMUPS["monotone"](optimizer, weights)
    backward(model, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e4
    backward(model, 0)
    before = weights[0].detach().clone()
    optimizer.step()
    torch.testing.assert_close(weights[0], before - 1e4 * weights[0].grad)


def test_equalized_weights_have_equal_relative_gradients_and_the_same_function() -> None:
    model, weights, optimizer = sgd_on_a_net(lr=0.0)
    warmups.WARMUPS["equalize"](optimizer, weights)
    before = backward(model, 0)
    E = relative_grads(weights)
    optimizer.step()
    after = backward(model, 0)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(relative_grads(weights), np.exp(np.log(E).mean()), rtol=0.02)


@pytest.mark.parametrize("spread", [1e-2, 1e4])
def test_an_imposed_spread_is_there_and_the_function_the_same(spread: float) -> None:
    model, weights, optimizer = sgd_on_a_net(lr=0.0)
    warmups.WARMUPS[f"spread {spread:g}"](optimizer, weights)
    before = backward(model, 0)
    optimizer.step()
    after = backward(model, 0)
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-3)
    E = relative_grads(weights)
    assert E[0] / E[-1] == pytest.approx(spread, rel=0.1)


def test_fading_factors_go_from_uniform_to_sgd() -> None:
    model, weights, optimizer = sgd_on_a_net(lr=0.0)
    warmups.WARMUPS["fading-100"](optimizer, weights)
    for step in range(102):
        backward(model, 0)
        E = relative_grads(weights)
        optimizer.step()
        share = max(0.0, 1 - step / 100)
        log_e = np.log(E)
        expected = log_e + share * (log_e.mean() - log_e)
        np.testing.assert_allclose(np.log(relative_grads(weights)), expected, atol=1e-4)
