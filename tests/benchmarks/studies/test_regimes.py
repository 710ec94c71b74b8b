"""The study of the three regimes: naming a run on traces and problems with a known answer, and what is chosen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

import elropt
from benchmarks.common import models
from benchmarks.studies import study
from benchmarks.studies.regimes import run as regimes
from benchmarks.studies.regimes import summarize as regimes_summary
from benchmarks.studies.regimes.run import Net, Plan, Run
from benchmarks.studies.regimes.summarize import classify

Array = NDArray[np.float64]
NET = Net("conv-5-w4", 64, 40, epochs=8, batch_size=32, data="digits")

# Naming a run


def noise(length: int, seed: int = 0) -> Array:
    return np.exp(0.02 * np.random.default_rng(seed).normal(size=length))


def traces(length: int) -> dict[str, tuple[Array, Array, float]]:
    """loss, c and learning rate of runs of 10,000 steps of a net whose loss of guessing is 4, by their regime."""
    t = (np.arange(length) + 0.5) / length
    fall, rise = 4 * np.exp(-3 * t), 10 * np.exp(2 * t)
    return {
        "convergence, exponential": (4 * np.exp(-12 * t) * noise(length), 30 * np.exp(-8 * t), 1e-4),
        "convergence, as 1/t": (0.01 / t * noise(length), 0.5 / t * noise(length, 1), 1e-4),
        "convergence, at its floor": (4 * np.exp(-40 * t) + 0.02, 30 * np.exp(-40 * t) + 0.2, 1e-4),
        "convergence, late": (np.where(t < 0.8, 0.9, 0.01), np.where(t < 0.8, 30.0, 0.5), 1e-2),
        "chaotic equilibrium, low": (
            0.3 + fall * np.exp(-9 * t) * noise(length),
            30 * noise(length, 1),
            1e-2,
        ),
        "chaotic equilibrium, high": (2.9 * noise(length), 8 * noise(length, 1), 3e-2),
        "divergence, at chance": (4 * noise(length), 200 * noise(length, 1), 0.1),
        "divergence, above": (6 * noise(length), 1e9 * np.exp(9 * t), 1.0),
        "undecided, slow": (fall + 1, rise, 1e-5),
        "undecided, falls and c rises": (4 * np.exp(-5 * t), rise, 1e-4),
        "undecided, has not moved": (4 * noise(length), 200 * noise(length, 1), 1e-8),
        "undecided, falls out of chaos": (2 * np.exp(-t) * noise(length), 30 * noise(length, 1), 1e-2),
    }


@pytest.mark.parametrize("length", [8, 10, 57, 1000])
@pytest.mark.parametrize("name", traces(8))
def test_regime_of_traces_made_by_hand(name: str, length: int) -> None:
    loss, c, lr = traces(length)[name]
    assert classify(loss, 4.0, c, lr, 10_000) == name.split(",")[0]


@pytest.mark.parametrize("name", traces(8))
def test_regime_does_not_depend_on_units(name: str) -> None:
    loss, c, lr = traces(40)[name]
    chance = np.full(40, 4.0)
    expected = name.split(",")[0]
    assert classify(1e3 * loss, 1e3 * chance, c, lr, 10_000) == expected
    assert classify(loss, chance, 1e3 * c, lr / 1e3, 10_000) == expected
    outliers = np.isin(np.arange(40), (5, 24, 33))  # one bad epoch in a quarter names nothing
    assert (
        classify(np.where(outliers, 9 * loss, loss), chance, np.where(outliers, 9 * c, c), lr, 10_000)
        == expected
    )


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
@pytest.mark.parametrize("broken", ["loss", "c"])
def test_what_overflows_diverges(bad: float | None, broken: str) -> None:
    fine, overflown = [0.001] * 8, [0.001] * 7 + [bad]
    loss, c = (overflown, fine) if broken == "loss" else (fine, overflown)
    assert classify(loss, 4.0, c, 0.1, 1000) == "divergence"  # type: ignore[arg-type]


@pytest.mark.parametrize("lengths", [(7, 7, 7), (8, 8, 9), (8, 9, 8)])
def test_traces_that_do_not_fit(lengths: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 8"):
        classify(*(np.ones(length) for length in lengths), 0.1, 100)  # type: ignore[misc]


def test_what_is_left_of_the_first_weights() -> None:
    """Steps of tangent t in random directions in many dimensions: w₀ fades as the rule for "undecided" says."""
    t, steps, rng = 0.1, 200, np.random.default_rng(0)
    first = w = rng.normal(size=20_000) / 20_000**0.5
    first = w = w / np.linalg.norm(w)
    for _ in range(steps):
        g = rng.normal(size=w.size)
        g -= (g @ w) * w
        w = w - t * g / np.linalg.norm(g)
        w /= np.linalg.norm(w)
    left = first @ w
    assert left == pytest.approx(math.exp(-steps * math.log1p(t**2) / 2), abs=0.03)
    standing, c = np.full(8, 2.0), np.full(8, 10.0)
    enough = 2 / math.log1p(t**2)  # as many steps leave 1/e
    assert classify(standing, 4.0, c, t / 10, math.floor(enough)) == "undecided"
    assert classify(standing, 4.0, c, t / 10, math.ceil(enough)) == "chaotic equilibrium"


WELLS = 20


def run_toy(K: float, steps: int) -> tuple[Array, Array, float]:
    """f(w) = a·(1 − cos(20·angle of w)), a uniform in [½, 1½] at each step, by ELRSGD on the sphere, in float64.

    In φ = 20·angle a step is φ' = φ − 20·atan(K·a·sin φ / 20), K = 400·sphere_lr. Returns means over 100 stretches.
    """
    lr, rng = K / WELLS**2, np.random.default_rng(0)
    w = torch.tensor([3.0, 0.1], dtype=torch.float64, requires_grad=True)
    groups = [{"params": [w], "scale_invariant": True}]
    optimizer = elropt.ELRSGD(groups, lr=lr, rule="sphere", granularity="network")
    loss, c = [], []
    for a in rng.uniform(0.5, 1.5, size=steps):
        optimizer.zero_grad()
        value = 1 - torch.cos(WELLS * torch.atan2(w[1], w[0]))
        (a * value).backward()
        loss.append(value.item())
        c.append(regimes.sphere_grad_norm([w]).item())
        optimizer.step()
    return np.array(loss).reshape(100, -1).mean(1), np.array(c).reshape(100, -1).mean(1), lr


def mean_log_factor(K: float) -> float:
    """E ln|1 − K·a|, by which ln φ changes in a step near φ = 0."""

    def integral(a: float) -> float:
        x = 1 - K * a
        return -x * (math.log(abs(x)) - 1) / K

    return integral(1.5) - integral(0.5)


@pytest.mark.parametrize(
    ("K", "steps", "regime"),
    [
        (0.3, 1000, "convergence"),
        (1.9, 1000, "convergence"),
        (2.6, 1000, "chaotic equilibrium"),
        (30.0, 1000, "divergence"),
        (1e-4, 1000, "undecided"),
    ],
)
def test_toy_with_three_regimes(K: float, steps: int, regime: str) -> None:
    """It converges exactly if E ln|1 − K·a| < 0; above, φ stays in its well while K·a·|sin φ| is at most about π; with
    K much larger the angle is uniform, and the loss that of guessing, 1."""
    assert (mean_log_factor(K) < 0) == (regime in ("convergence", "undecided"))
    loss, c, lr = run_toy(K, steps)
    assert classify(loss, 1.0, c, lr, steps) == regime


# Measuring


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(NET.model, in_shape=(1, 8, 8), classes=10, scale_invariant=True)


@pytest.mark.parametrize("name", ["conv-5-w4", "resnet-18-w2"])
def test_all_that_trains_is_scale_invariant_and_on_one_sphere(name: str) -> None:
    torch.manual_seed(0)
    model = models.build(name, in_shape=(1, 8, 8), classes=10, scale_invariant=True)
    trained = {id(weight) for weight in regimes.make_optimizer(model, 0.1).param_groups[0]["params"]}
    images = torch.randn(16, 1, 8, 8)
    found = elropt.find_scale_invariant(model, images)
    invariant = {key for key, kind in found.items() if kind is not None}
    names = {key for key, weight in model.named_parameters() if weight.requires_grad}
    assert names == invariant
    assert trained == {id(weight) for key, weight in model.named_parameters() if key in names}


def test_training_is_that_of_the_whole_vector_on_its_sphere() -> None:
    """Against w ← w − lr·R²·g, then back to ‖w‖ = R, in float64, without what ε does to the invariance."""
    (model, reference), lr = (build().double() for _ in range(2)), 0.02
    for module in [*model.modules(), *reference.modules()]:
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-15
    optimizer = regimes.make_optimizer(model, lr)
    weights, expected = (
        [weight for weight in of.parameters() if weight.requires_grad] for of in (model, reference)
    )
    radius = torch.cat([weight.detach().flatten() for weight in expected]).norm()
    rng = torch.Generator().manual_seed(1)
    turns = []
    for _ in range(6):
        images = torch.randn(32, 1, 8, 8, dtype=torch.float64, generator=rng)
        labels = torch.randint(10, (32,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        c = regimes.sphere_grad_norm(weights)
        turns.append(lr * c.item())
        optimizer.step()
        grads = torch.autograd.grad(F.cross_entropy(reference(images), labels), expected)
        flat = torch.cat([grad.flatten() for grad in grads])
        assert c.item() == pytest.approx(float(flat.norm() * radius), rel=1e-5)
        with torch.no_grad():
            for weight, grad in zip(expected, grads, strict=True):
                weight -= lr * radius**2 * grad
            norm = torch.cat([weight.flatten() for weight in expected]).norm()
            for weight in expected:
                weight *= radius / norm
    w, e = (torch.cat([weight.detach().flatten() for weight in of]) for of in (weights, expected))
    assert min(turns) > 0.1
    torch.testing.assert_close(w / w.norm(), e / e.norm(), rtol=0, atol=1e-6)


def test_what_an_epoch_records() -> None:
    """At learning rate 0, against the same batches by hand; chance is the loss with labels of other images."""
    net, dataset, model = NET, regimes.load(NET), build()
    recorded = regimes.train_epoch(model, regimes.make_optimizer(model, 0.0), dataset, net, seed=(0, 3))
    losses, chances, errors = [], [], []
    for images, labels in dataset.batches("train", net.batch_size, seed=(0, 3)):
        outputs = model(images).detach().double().numpy()
        log_p = outputs - np.log(np.exp(outputs).sum(1, keepdims=True))
        of = labels.tolist()
        losses.append(np.mean([-log_p[i, label] for i, label in enumerate(of)]))
        chances.append(np.mean([-log_p[i, of[i - 1]] for i in range(len(of))]))
        errors.append(np.mean(outputs.argmax(1) != labels.numpy()))
    loss, chance, error, c = recorded.tolist()
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert chance == pytest.approx(np.mean(chances), rel=1e-5)
    assert error == pytest.approx(np.mean(errors))
    assert c > 0


def test_learning_rate_steps_down_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(
        regimes, "train_epoch", lambda _m, o, *_a, **_k: seen.append(o.param_groups[0]["lr"]) or torch.ones(4)
    )
    net = dataclasses.replace(NET, epochs=5)
    regimes.work(Run(net, 0, 0.1, 0.01))
    assert seen == [0.1, 0.1, 0.01, 0.01, 0.01]


def test_same_row_twice_and_the_test_images_only_if_asked() -> None:
    first, second = (regimes.work(Run(NET, 1, 1e-3, test=test)) for test in (False, True))
    assert "test_error" not in first
    assert 0 < second.pop("test_error") < 1
    assert first == second
    assert first["steps"] == 16
    assert len(first["loss"]) == 8


# Choosing and concluding

LOSSES = {"convergence": 0.001, "chaotic equilibrium": 1.0, "divergence": 4.0}


def row(lr: float, regime: str, seed: int = 0, after: float | None = None, **values: Any) -> dict[str, Any]:
    """Of a run that is clearly in a regime."""
    spec = dataclasses.asdict(Run(NET, seed, lr, after))
    trace = {
        "loss": [LOSSES[regime]] * 12,
        "chance": [4.0] * 12,
        "error": [0.5] * 12,
        "sphere_grad_norm": [1 / lr] * 12,
    }
    return {"spec": spec, "steps": 100, "classes": 10, "val_error": 0.5, "test_error": 0.5, **trace, **values}


def rows() -> list[dict[str, Any]]:
    """Seed 1 converges up to 0.1, the others up to 0.01; all diverge from 10 on."""
    found = []
    for seed in (0, 1, 2):
        for lr, val_error in ((0.01, 0.4), (0.1, 0.3), (1.0, 0.5), (10.0, 0.9), (100.0, 0.9)):
            regime = "divergence" if lr >= 10 else "chaotic equilibrium"
            regime = "convergence" if lr < 0.1 or (lr == 0.1 and seed == 1) else regime
            found.append(row(lr, regime, seed, val_error=val_error))
    return found


PLAN = Plan([NET], (0.01, 0.1, 1.0, 10.0, 100.0), 3, 2)


def test_more_learning_rates_at_the_borders() -> None:
    runs = regimes.border_runs(rows(), PLAN)
    assert [(run.seed, run.sphere_lr) for run in runs] == [
        (seed, lr) for seed in (0, 1, 2) for lr in (0.03162, 3.162)
    ]
    assert all(run.test and run.net == NET for run in runs)
    only = [of for of in rows() if of["spec"]["sphere_lr"] < 0.05]
    assert regimes.border_runs(only, PLAN) == []  # all converge: the grid has no border
    straight = [*only, *(row(10.0, "divergence", seed) for seed in (0, 1, 2))]
    assert {run.sphere_lr for run in regimes.border_runs(straight, PLAN)} == {0.3162}


def test_steps_down_to_the_largest_that_mostly_converges() -> None:
    runs = regimes.step_down_runs(rows(), PLAN)
    assert {(run.sphere_lr, run.sphere_lr_after) for run in runs} == {(0.1, 0.01), (1.0, 0.01)}
    assert len(runs) == 6
    assert not any(run.test for run in runs)
    diverging = [of for of in rows() if of["spec"]["sphere_lr"] >= 10]
    assert regimes.step_down_runs(diverging, PLAN) == []


def with_step_downs() -> list[dict[str, Any]]:
    down = [
        row(lr, "convergence", seed, 0.01, val_error=error)
        for lr, error in ((0.1, 0.25), (1.0, 0.2))
        for seed in (0, 1, 2)
    ]
    for of in down:
        del of["test_error"]
    return [*rows(), *down]


def test_finals_are_chosen_by_validation_and_have_fresh_seeds() -> None:
    runs = regimes.final_runs(with_step_downs(), PLAN)
    assert runs == [
        *(Run(NET, seed, 0.1, test=True) for seed in (100, 101)),
        *(Run(NET, seed, 1.0, 0.01, test=True) for seed in (100, 101)),
    ]


def test_summary_of_hand_made_rows() -> None:
    final = [row(0.1, "convergence", 100 + i, test_error=0.30 + 0.1 * i) for i in range(2)]
    final += [row(1.0, "convergence", 100 + i, 0.01, test_error=0.28 + 0.09 * i) for i in range(2)]
    summary = regimes_summary.summarize([*with_step_downs(), *final])[NET.model]
    assert list(summary["constant"]) == ["0.01", "0.1", "1", "10", "100"]
    middle = summary["constant"]["0.1"]
    assert middle["regimes"] == ["chaotic equilibrium", "convergence", "chaotic equilibrium"]
    assert middle["loss"].mean == pytest.approx(0.001 ** (1 / 3))
    assert middle["turn"].mean == pytest.approx(1)
    assert middle["val_error"].mean == pytest.approx(30)
    found = summary["borders"]
    assert found["disordered"] == 0
    assert found["convergence"]["at"].mean == pytest.approx((10**-1.5 * 10**-0.5 * 10**-1.5) ** (1 / 3))
    assert (found["convergence"]["low"], found["convergence"]["high"]) == (0.01, 1.0)
    assert found["divergence"]["at"].mean == pytest.approx(10**0.5)
    assert (found["divergence"]["low"], found["divergence"]["high"]) == (1.0, 10.0)
    assert summary["step_down"]["after"] == 0.01
    assert {lr: it["val_error"].mean for lr, it in summary["step_down"]["starts"].items()} == {
        "0.1": 25,
        "1": 20,
    }
    assert summary["final"]["step_down"]["sphere_lr"] == 1.0
    assert summary["gain"].mean == pytest.approx((2 + 3) / 2)


def test_how_far_names_depend_on_the_bounds() -> None:
    level = [
        row(1.0, "chaotic equilibrium", seed, loss=[share * 4.0] * 12)
        for seed, share in enumerate((0.85, 0.5))
    ]
    late = row(0.01, "convergence", loss=[1.0] * 9 + [0.001] * 3)
    found = regimes_summary.renamed([*level, late])
    assert found["unlearned 0.8"] == {"regime": 1, "undecided": 0, "of": 3}
    assert found["unlearned 0.95"] == {"regime": 0, "undecided": 0, "of": 3}
    assert found["3/4 of the run"] == {"regime": 1, "undecided": 0, "of": 3}  # the late one


def test_regimes_out_of_order_are_counted() -> None:
    strange = [row(0.1, "chaotic equilibrium"), row(1.0, "convergence"), row(10.0, "divergence")]
    found = regimes_summary.borders(strange)
    assert found["disordered"] == 1
    assert found["convergence"]["at"].mean == pytest.approx(10**0.5)
    undecided = {"loss": list(range(24, 12, -1)), "chance": [30.0] * 12}
    between = [row(0.1, "convergence"), row(1.0, "convergence", **undecided), row(10.0, "divergence")]
    found = regimes_summary.borders(between)
    assert found["convergence"]["at"].mean == pytest.approx(1)
    assert found["divergence"]["at"].mean == pytest.approx(10**0.5)
    none = regimes_summary.borders([row(0.1, "convergence")])
    assert math.isnan(none["divergence"]["at"].mean)
    assert none["divergence"]["low"] == 0.1
    assert math.isnan(none["divergence"]["high"])


@pytest.mark.parametrize("size", study.SIZES)
def test_plans(size: str) -> None:
    plan = regimes.PLANS[size]("cpu")
    runs = regimes.constant_runs(plan)
    assert len(set(runs)) == len(runs)
    assert all(regimes.describe(run) for run in runs)
    assert all(net.train_images % net.batch_size == 0 or size == "full" for net in plan.nets)
    if size != "tiny":
        assert max(plan.sphere_lrs) / min(plan.sphere_lrs) >= 0.999e4
        assert all(b / a < 10**0.5 * 1.1 for a, b in zip(plan.sphere_lrs, plan.sphere_lrs[1:], strict=False))
