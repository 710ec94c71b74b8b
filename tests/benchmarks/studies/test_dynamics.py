"""The study of weight dynamics: its arithmetic on problems with a known answer, and the whole of it at a tiny size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.studies import study
from benchmarks.studies.dynamics import run as study_dynamics
from benchmarks.studies.dynamics.report import EXPLOSION
from benchmarks.studies.dynamics.run import DYNAMICS, Bench, Net, Trajectory
from benchmarks.studies.dynamics.summarize import first_crossing, half_life, one_step_law, summarize_critical
from elropt import dynamics

C = np.array([3.0, 0.5, 0.1])
STEPS = 40


def run_toy(lr: float, momentum: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """‖w‖ and ‖g‖ [STEPS + 1, 3] of layers f(w) = c·atan2(w₂, w₁), whose c is constant, under torch's SGD."""
    weights = [torch.tensor([1.0, 0.3 * i], dtype=torch.float64, requires_grad=True) for i in range(len(C))]
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=momentum)
    w, g = [], []
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        sum(c * torch.atan2(weight[1], weight[0]) for c, weight in zip(C, weights, strict=True)).backward()  # type: ignore[union-attr]
        w.append([float(weight.detach().norm()) for weight in weights])
        g.append([float(weight.grad.norm()) for weight in weights])  # type: ignore[union-attr]
        optimizer.step()
    return np.array(w), np.array(g)


def on_same(w: NDArray[np.float64], g: NDArray[np.float64]) -> dict[int, NDArray[np.float64]]:
    """There is one batch only: the norms after a step are those before the next."""
    return {step: np.stack([w[step + 1], g[step + 1]]) for step in study_dynamics.recorded_steps(len(w) - 1)}


@pytest.mark.parametrize("lr", [0.01, 0.5, 5.0])
def test_no_error_where_the_model_is_exact(lr: float) -> None:
    w, g = run_toy(lr)
    columns = study_dynamics.compare(w, g, on_same(w, g), lr, keep_layers=True)
    assert columns["at"] == [*study_dynamics.recorded_steps(STEPS), STEPS]
    zero = ("model_error", "common_error", "c", "turn", "noise")
    for key in [f"{name}_{part}" for name in zero for part in ("common", "individual")]:
        np.testing.assert_allclose(columns[key], 0, atol=1e-12, err_msg=key)
    assert columns["rounding"] < 1e-12
    assert max(columns["forecast"]) < 1e-12
    np.testing.assert_allclose(columns["model_E"], columns["E"], rtol=1e-12)
    np.testing.assert_allclose(columns["model_spread"], columns["spread"], rtol=1e-12)
    E = (g / w)[columns["at"][:-1]]
    np.testing.assert_allclose(columns["step_individual"], columns["law_individual"], atol=1e-12)
    np.testing.assert_allclose(columns["max_lr_E"], lr * E.max(axis=1))


def test_common_and_individual_changes_of_c() -> None:
    """c of all layers falls by 5 % a step, and that of one by 1 % more: the first is common."""
    w, g = run_toy(0.5)
    steps = np.arange(STEPS + 1)[:, None]
    g = g * 0.95**steps  # the norms stay those of the other run: only what is said of c is looked at
    columns = study_dynamics.compare(w, g, on_same(w, g), 0.5)
    np.testing.assert_allclose(columns["c_common"], np.log(0.95) * np.array(columns["at"]), atol=1e-12)
    np.testing.assert_allclose(columns["c_individual"], 0, atol=1e-12)
    np.testing.assert_allclose(columns["turn_common"], np.log(0.95))
    g[:, 0] *= 0.99 ** steps[:, 0]
    columns = study_dynamics.compare(w, g, on_same(w, g), 0.5)
    np.testing.assert_allclose(columns["turn_individual"], -np.log(0.99) * math.sqrt(2) / 3)


def test_batch_noise_is_not_the_turn() -> None:
    w, g = run_toy(0.5)
    same = on_same(w, g)
    g[1::2, 0] *= math.exp(0.3)  # every second batch has a larger gradient
    columns = study_dynamics.compare(w, g, {0: same[0]}, 0.5)
    np.testing.assert_allclose(columns["turn_individual"], 0, atol=1e-12)
    np.testing.assert_allclose(columns["noise_common"], 0.1)
    np.testing.assert_allclose(columns["noise_individual"], 0.3 * math.sqrt(2) / 3)


def test_model_with_given_c() -> None:
    E0 = np.array([2.0, 0.3])
    flat = study_dynamics.with_sphere_grads(E0, np.ones((11, 2)), 0.4)
    np.testing.assert_allclose(flat, dynamics.simulate(E0, 0.4, 10), rtol=1e-12)
    c = np.exp(np.random.default_rng(0).normal(size=(4, 2)))
    c[0] = 1
    expected = [E0]
    for step in range(3):
        expected.append(expected[-1] * c[step + 1] / c[step] / (1 + (0.4 * expected[-1]) ** 2))
    np.testing.assert_allclose(study_dynamics.with_sphere_grads(E0, c, 0.4), expected)


def test_growth_with_aligned_gradients_is_exact_on_the_toy() -> None:
    lr, momentum = 0.02, 0.9
    w, g = run_toy(lr, momentum)
    predicted = study_dynamics.log_growth((g / w)[:-1], lr, momentum, 1.0)
    np.testing.assert_allclose(predicted, 2 * np.log(w / w[0]), atol=1e-12)
    columns = study_dynamics.compare(w, g, on_same(w, g), lr, momentum, cosine=1.0)
    np.testing.assert_allclose(columns["model_error_common"], 0, atol=1e-12)
    assert columns["growth"]["aligned"] == pytest.approx(columns["growth"]["measured"])
    assert columns["growth"]["cosine"] == pytest.approx(columns["growth"]["measured"])
    assert columns["growth"]["independent"] < columns["growth"]["measured"] / 2


@pytest.mark.parametrize("cosine", [1.0, 0.6, 0.0, -0.5])
def test_growth_for_any_direction_of_the_gradients(cosine: float) -> None:
    """Against vectors in three dimensions whose gradients are turned by hand."""
    lr, momentum, E = 0.1, 0.8, np.array([[1.0], [0.4], [2.0], [0.7]])
    w, m = np.array([2.0, 0, 0]), np.zeros(3)
    expected = [0.0]
    for (relative_grad,) in E:
        tangential = m - (m @ w) / (w @ w) * w
        along = tangential / np.linalg.norm(tangential) if tangential.any() else np.array([0.0, 1, 0])
        across = np.cross(w, along) / np.linalg.norm(w)
        direction = along if not tangential.any() else cosine * along + math.sqrt(1 - cosine**2) * across
        m = momentum * m + relative_grad * np.linalg.norm(w) * direction
        w = w - lr * m
        expected.append(2 * math.log(np.linalg.norm(w) / 2))
    np.testing.assert_allclose(study_dynamics.log_growth(E, lr, momentum, cosine)[:, 0], expected, atol=1e-12)


def test_tangential_cosines() -> None:
    w = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
    w.grad = torch.tensor([[0.0, 1.0, 1.0]])
    m = torch.tensor([[-7.0, 3.0, 0.0]])  # its radial part does not count
    torch.testing.assert_close(study_dynamics.tangential_cosines([w], [m]), torch.tensor([0.5**0.5]))


def test_growth_factor_finds_the_slope_of_the_middle() -> None:
    shapes = [(8, 4), *[(8, 8)] * 12, *[(16, 16)] * 8, (4, 16), (4, 4)]
    logs = -0.2 * np.arange(len(shapes))
    logs[13:21] += 5.0 - 0.1 * np.arange(8)  # the second stretch is higher, and steeper
    logs[[0, 1, 2, 11, 12, 13, 20, 21, 22]] += 3.0  # what is not in the middle does not count
    expected = math.exp((12 * 0.2 + 8 * 0.3) / 20)
    assert study_dynamics.growth_factor(np.exp(logs), shapes) == pytest.approx(expected)
    assert math.isnan(study_dynamics.growth_factor(np.ones(5), [(8, 8)] * 5))


def test_theory_of_explosion() -> None:
    """Per BN-ReLU layer: the mean of φ'² over the variance of φ, φ = ReLU of a standard normal variable, sampled."""
    z = np.random.default_rng(0).normal(size=2_000_000)
    relu = np.maximum(z, 0)
    factor = math.sqrt(np.mean(z > 0) / relu.var())
    assert factor == pytest.approx(EXPLOSION, rel=2e-3)


def test_half_life() -> None:
    assert half_life([0, 1, 2, 4, 8], [8.0, 6, 5, 3, 1]) == pytest.approx(3)
    assert half_life([0, 1, 2, 4], [8.0, 1, 5, 3]) == pytest.approx(3)  # below half by chance at first
    assert half_life([0, 5], [8.0, 4]) == 5
    assert math.isnan(half_life([0, 1, 2], [8.0, 3, 5]))
    assert math.isnan(half_life([0, 1], [0.0, 0.0]))


def test_first_crossing() -> None:
    x = [0.1, 1.0, 10.0, 100.0]
    assert first_crossing(x, [0.01, 0.1, 10.0, 0.1], 1.0) == pytest.approx(10**0.5)
    assert math.isnan(first_crossing(x, [0.1] * 4, 1.0))
    assert first_crossing(x, [2.0] * 4, 1.0) == 0.1
    assert first_crossing(x, [0.5, math.nan, 0.5, 0.5], 1.0) == 1.0


@pytest.mark.parametrize("steps", [1, 2, 12, 50, 600])
def test_recorded_steps(steps: int) -> None:
    recorded = study_dynamics.recorded_steps(steps)
    assert recorded[0] == 0
    assert recorded[-1] == steps - 1
    assert recorded == sorted(set(recorded))
    assert len(recorded) <= 16


def test_critical_learning_rates_of_two_layers() -> None:
    """Two layers in the model: balance and monotone are one, and one step at it leaves no spread at all."""
    E0 = np.array([4.0, 0.25])
    lrs = 2.0 ** np.arange(-4, 5)
    spreads = np.array([[dynamics.elr_spread(dynamics.one_step(E0, lr)) / 16] for lr in lrs])
    worse = np.where(lrs[:, None] > 4, 2.0, spreads)
    row: dict[str, Any] = {"lrs": lrs, "balance": 1.0, "monotone": 1.0, "initial_spread": 16.0, "after": [1]}
    row |= {"same_spread": spreads, "fresh_spread": worse, "alone_spread": spreads, "model_spread": spreads}
    found = summarize_critical([row, row])
    assert found["same 1"]["best_over_balance"].mean == pytest.approx(1)
    assert found["same 1"]["smallest"].mean == pytest.approx(1 / 16)
    assert found["same 1"]["at_monotone"].mean == pytest.approx(1 / 16)
    assert found["same 1"]["never_grows"] == 2
    assert found["fresh 1"]["never_grows"] == 0
    assert 4 < found["fresh 1"]["grows_over_balance"].mean < 8


def test_one_step_law_by_angle() -> None:
    row = {
        "spec": {"net": {"model": "net"}, "seed": 0},
        "max_lr_E": [0.02, 0.05, 2.0],
        "turn_individual": [0.1, 0.3, 0.5],
        "noise_individual": [0.0, 0.4, 1.2],
        "step_individual": [0.1, 0.3, 1.0],
    }
    other = {**row, "spec": {**row["spec"], "seed": 1}}
    found = one_step_law([row, other])
    assert found["net"] == found["all"]
    none, small, *_, large, _, _ = found["net"]
    assert none is None
    assert small["steps"] == 4
    assert small["turn"].mean == pytest.approx(0.2)
    assert small["noise"].mean == pytest.approx(0.2)
    assert small["within"].mean == 0.5
    assert small["explained"] == pytest.approx(0)
    assert large["noise"].mean == pytest.approx(1.2)
    assert large["explained"] == pytest.approx(0.75)


def test_transformer_is_tracked_in_queries_and_keys() -> None:
    bench = Bench(Net("ln-transformer-2-w32", 16), seed=0)
    assert [tuple(weight.shape) for weight in bench.weights] == [(32, 32)] * 4
    norms = bench.norms(next(bench.batches()))
    assert norms.shape == (2, 5)
    for weight in bench.weights:
        cosine = torch.nn.functional.cosine_similarity(weight.flatten(), weight.grad.flatten(), dim=0)  # type: ignore[union-attr]
        assert abs(float(cosine.detach())) < 1e-3


def test_a_run_that_blows_up_is_cut_off() -> None:
    row = study_dynamics.work(Trajectory(Net("bn-mlp-8-w16", 64), 0, 1e30, 6))
    assert not row["finite"]
    assert row["steps_measured"] < 6
    json.dumps(row)


def test_same_row_twice() -> None:
    spec = Trajectory(Net("bn-mlp-8-w16", 64), 3, 0.1, 5)
    first, second = (json.dumps(study_dynamics.work(spec)) for _ in range(2))
    assert first == second


def test_turn_by_nothing_changes_nothing() -> None:
    row = study_dynamics.work(study_dynamics.Turn(Net("bn-mlp-8-w16", 64), 0, (1e-7, 0.5), 3))
    assert row["own"][0] < 1e-3 < row["own"][1]
    assert row["all_individual"][0] < 1e-3


@pytest.mark.parametrize("size", study.SIZES)
def test_plan_has_no_spec_twice(size: str) -> None:
    specs = study_dynamics.plan(size, "cpu")
    assert len(set(specs)) == len(specs)
    assert all(DYNAMICS.describe(spec) for spec in specs)


@pytest.mark.slow
def test_whole_study(tmp_path: Path) -> None:
    console = Console(width=200, record=True)
    stages = DYNAMICS.stages("tiny", "cpu")
    result_file = study.run(DYNAMICS, stages, "dynamics-tiny", tmp_path, jobs=1, console=console, size="tiny")
    result = json.loads(result_file.read_text(), parse_constant=lambda constant: pytest.fail(constant))
    assert len(result["rows"]) == len(study_dynamics.plan("tiny", "cpu"))
    summary = result["summary"]
    assert summary["largest_rounding"] < 1e-4
    assert summary["explosion"]["bn-mlp-8-w16, batch 64"]["gradient"][3] == 2
    for name in ("layers", "spread", "one-step", "critical", "explosion-momentum"):
        assert (tmp_path / f"dynamics-{name}.png").read_bytes().startswith(b"\x89PNG")
    again = study.report(DYNAMICS, result, tmp_path / "again", Console(width=200))
    assert len(again) == 5
