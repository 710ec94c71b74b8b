"""The model against its own identities, and against scale-invariant problems run with torch.optim.SGD."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elropt import dynamics

quick = settings(deadline=None, max_examples=60)
log_uniform = st.floats(-15, 15).map(math.exp)
layers = st.lists(log_uniform, min_size=2, max_size=8).map(np.array)
LOG_SPREADS = (1e-3, 0.3, 2.0, math.log(1e9))


class Toy:
    """L scale-invariant functions with a constant c = ‖g‖·‖w‖, minimized by torch.optim.SGD in float64.

    aligned: f(w) = c·atan2(w₂, w₁) on R², which turns the same way for ever.
    independent: f(w) = c·⟨v, w/‖w‖⟩ with a new unit vector v at every step, orthogonal to w and the momentum.
    random: as independent, but v is orthogonal to w alone.
    """

    def __init__(self, E0, momentum, weight_decay, gradients="aligned", *, dim=6, nesterov=False):
        self.random = np.random.default_rng(0)
        self.gradients = gradients
        self.c = torch.from_numpy(np.exp(self.random.normal(size=len(E0))))
        directions = self.random.normal(size=(len(E0), 2 if gradients == "aligned" else dim))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        norms = np.sqrt(self.c.numpy() / np.asarray(E0, dtype=np.float64))
        self.weights = [torch.tensor(w, requires_grad=True) for w in directions * norms[:, None]]
        groups = [{"params": [w]} for w in self.weights]
        self.sgd = torch.optim.SGD(
            groups, lr=1.0, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )

    def values(self):
        """The L function values of this step."""
        if self.gradients == "aligned":
            return self.c * torch.stack([torch.atan2(w[1], w[0]) for w in self.weights])
        values = []
        for c, w in zip(self.c, self.weights, strict=True):
            avoid = [w.detach()]
            m = self.sgd.state[w].get("momentum_buffer")
            if m is not None and self.gradients == "independent":
                avoid.append(m)
            basis = torch.linalg.qr(torch.stack(avoid, 1)).Q
            v = torch.from_numpy(self.random.normal(size=w.numel()))
            for _ in range(2):  # twice is enough for orthogonality to rounding
                v = v - basis @ (basis.T @ v)
            values.append(c * torch.dot(v / v.norm(), w / w.norm()))
        return torch.stack(values)

    def relative_grads(self, values):
        grads = torch.autograd.grad(values.sum(), self.weights, retain_graph=True)
        return np.array([(g.norm() / w.norm()).item() for g, w in zip(grads, self.weights, strict=True)])

    def run(self, lr, steps):
        """E [steps+1, L] and the angle of every step [steps, L]; lr as in `simulate`."""
        E, angles = [], []
        for step in range(steps):
            values = self.values()
            E.append(self.relative_grads(values))
            decision = lr(E[-1]) if callable(lr) else np.broadcast_to(lr, (steps,))[step]
            lr_step, s = decision if isinstance(decision, tuple) else (decision, 1.0)
            for group, lr_layer in zip(
                self.sgd.param_groups, np.broadcast_to(lr_step, len(self.weights)), strict=True
            ):
                group["lr"] = float(lr_layer)
            self.sgd.zero_grad()
            (values * torch.as_tensor(s)).sum().backward()
            before = [w.detach().clone() for w in self.weights]
            self.sgd.step()
            angles.append([angle_between(a, b) for a, b in zip(before, self.weights, strict=True)])
        return np.array([*E, self.relative_grads(self.values())]), np.array(angles)


def angle_between(a, b):
    a, b = a / a.norm(), b.detach() / b.detach().norm()
    return 2 * math.atan2((a - b).norm().item(), (a + b).norm().item())


@quick
@given(log_uniform, log_uniform)
def test_one_step_adds_to_the_inverse_square(E, lr):
    next_E = dynamics.one_step(E, lr)
    assert 1 / next_E**2 == pytest.approx(1 / E**2 + 2 * lr**2 + lr**4 * E**2, rel=1e-14)


@quick
@given(log_uniform, log_uniform)
def test_one_step_is_half_a_sech_in_log_coordinates(E, lr):
    next_elr = lr * dynamics.one_step(E, lr)
    assert next_elr == pytest.approx(0.5 / math.cosh(math.log(lr * E)), rel=1e-12)
    assert next_elr <= 0.5
    assert lr * dynamics.one_step(1 / (lr * E) / lr, lr) == pytest.approx(next_elr, rel=1e-13)


@quick
@given(log_uniform, log_uniform, log_uniform)
def test_two_layers_follow_the_ratio_law(E_i, E_j, lr):
    ratio = dynamics.one_step(E_i, lr) / dynamics.one_step(E_j, lr)
    assert ratio == pytest.approx(E_i / E_j * (1 + (lr * E_j) ** 2) / (1 + (lr * E_i) ** 2), rel=1e-14)


@quick
@given(log_uniform, log_uniform, st.floats(1e-3, 0.999))
def test_critical_lr_divides_keeping_from_swapping(E_i, E_j, fraction):
    assume(abs(math.log(E_i / E_j)) > 1e-3)
    E = np.array([max(E_i, E_j), min(E_i, E_j)])
    lr = dynamics.critical_lr(*E)
    at = dynamics.one_step(E, lr)
    assert at[0] == pytest.approx(at[1], rel=1e-14)
    kept = dynamics.one_step(E, fraction * lr)
    assert kept[0] > kept[1]
    swapped = dynamics.one_step(E, lr / fraction)
    assert swapped[0] < swapped[1]


@quick
@given(layers)
def test_balance_keeps_its_bound(E):
    spread = dynamics.elr_spread(E)
    after = dynamics.elr_spread(dynamics.one_step(E, dynamics.balance_lr(E)))
    assert after <= math.cosh(math.log(spread) / 2) * (1 + 1e-12)


@pytest.mark.parametrize("log_spread", LOG_SPREADS)
def test_balance_bound_is_reached_at_the_geometric_mean_and_ties_two_layers(log_spread):
    E = 0.3 * np.exp([0, log_spread / 2, log_spread])
    after = dynamics.one_step(E, dynamics.balance_lr(E))
    assert dynamics.elr_spread(after) == pytest.approx(math.cosh(log_spread / 2), rel=1e-12)
    assert after[0] == pytest.approx(after[2], rel=1e-12)


@pytest.mark.parametrize("log_spread", LOG_SPREADS)
@pytest.mark.parametrize("factor", [0.01, 0.5, 0.9, 1.1, 2, 100])
def test_no_other_lr_guarantees_less_than_balance(log_spread, factor):
    E = np.exp(np.linspace(0, log_spread, 2001))  # dense enough to hold every lr's worst case
    lr = dynamics.balance_lr(E)
    balanced, other = (dynamics.elr_spread(dynamics.one_step(E, x)) for x in (lr, factor * lr))
    assert other > balanced


@quick
@given(st.lists(st.floats(0, 1), max_size=20))
def test_balance_closes_nine_orders_of_magnitude_in_five_steps(between):
    E0 = 1e9 ** np.array([0.0, 1.0, *between])
    spread = dynamics.elr_spread(dynamics.simulate(E0, dynamics.balance_lr, 5))
    assert spread[0] == pytest.approx(1e9)
    assert spread[5] < 1.01


@quick
@given(layers)
def test_monotone_swaps_no_pair_and_any_larger_lr_does(E):
    E = np.sort(E)[::-1]
    lr = dynamics.monotone_lr(E)
    after = dynamics.one_step(E, lr)
    assert (after[1:] <= after[:-1] * (1 + 1e-12)).all()
    if E[0] > 1.001 * E[1]:
        beyond = dynamics.one_step(E, 1.001 * lr)
        assert beyond[0] < beyond[1]


@quick
@given(layers)
def test_monotone_reduces_the_spread_as_derived(E):
    log_spread = math.log(dynamics.elr_spread(E))
    second, first = np.sort(E)[-2:]
    head_start = math.log(first / second) / 2
    after = dynamics.elr_spread(dynamics.one_step(E, dynamics.monotone_lr(E)))
    assert after == pytest.approx(math.cosh(log_spread - head_start) / math.cosh(head_start), rel=1e-11)
    assert after <= math.cosh(log_spread) * (1 + 1e-12)


def test_monotone_takes_the_two_largest_with_ties_counted_separately():
    assert dynamics.monotone_lr([1, 4, 4]) == 1 / 4
    spread = dynamics.elr_spread(dynamics.one_step([1, 4, 4], 1 / 4))
    assert spread == pytest.approx((4 + 1 / 4) / 2)  # a tie on top is the slowest case


@quick
@given(layers, log_uniform)
def test_constant_lr_swaps_only_at_the_first_step_and_closes_the_spread(E0, lr):
    E = dynamics.simulate(E0, lr, 400)
    order = np.argsort(E[1], kind="stable")
    assert (np.diff(E[1:, order]) >= -1e-12 * E[1:, order][:, 1:]).all()
    assert (np.diff(dynamics.elr_spread(E[1:])) <= 1e-12).all()


def test_small_step_limit_is_approached_with_the_square_of_the_lr():
    E0, lr_sq_sum = np.array([0.2, 1.0, 5.0]), 0.7
    errors = []
    for steps in (100, 400, 1600):
        schedule = np.linspace(1, 0.2, steps)
        schedule *= math.sqrt(lr_sq_sum / (schedule**2).sum())
        E = dynamics.simulate(E0, schedule, steps)[-1]
        errors.append(dynamics.small_step(E0, lr_sq_sum) / E - 1)
    assert (np.array(errors) > 0).all()  # the limit lies above
    # four times the steps: half the learning rate, a quarter of the error
    assert np.array(errors[:-1]) / np.array(errors[1:]) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("gradients", ["aligned", "independent"])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_small_step_limit_with_momentum(momentum, gradients):
    E0, lr_sq_sum, errors = np.array([0.3, 2.0]), 0.5, []
    gain = (1 + momentum) / (1 - momentum) ** 3 if gradients == "aligned" else (1 - momentum) ** -2
    for steps in (5_000, 20_000):
        lr = math.sqrt(lr_sq_sum / (gain * steps))
        E = dynamics.simulate(E0, lr, steps, momentum, gradients=gradients)[-1]
        errors.append(abs(dynamics.small_step(E0, lr_sq_sum) / E - 1))
    assert max(errors[1]) < 2e-3
    assert np.array(errors[0]) / errors[1] == pytest.approx(4, rel=0.1)


def test_small_step_in_terms_of_the_norm():
    c, norm0, lr_sq_sum = 3.0, 0.7, 0.4
    norm = (norm0**4 + 2 * c**2 * lr_sq_sum) ** 0.25
    assert dynamics.small_step(c / norm0**2, lr_sq_sum) == pytest.approx(c / norm**2, rel=1e-14)


E0, STEPS = np.array([0.05, 0.4, 3.0, 40.0]), 30
HYPER = [(0.0, 0.0), (0.0, 0.1), (0.9, 0.0), (0.9, 0.02), (0.99, 0.005)]
LRS = {
    "constant": 0.2,
    "large": 3.0,
    "schedule": 0.3 * np.cos(np.linspace(0, math.pi / 2, STEPS)) ** 2,
    "capped balance": lambda E: np.minimum(1.0, dynamics.balance_lr(E)),
    "capped monotone": lambda E: np.minimum(0.1, dynamics.monotone_lr(E)),
    "lr per layer": lambda E: np.minimum(0.5, 0.05 / E),
    "gradient factor": lambda E: (0.1, np.exp(np.log(E).mean()) / E),
}


@pytest.mark.parametrize("gradients", ["aligned", "independent"])
@pytest.mark.parametrize(("momentum", "weight_decay"), HYPER)
@pytest.mark.parametrize("lr", LRS.values(), ids=LRS)
def test_simulate_is_sgd_on_scale_invariant_functions(lr, momentum, weight_decay, gradients):
    expected, _ = Toy(E0, momentum, weight_decay, gradients).run(lr, STEPS)
    actual = dynamics.simulate(E0, lr, STEPS, momentum, weight_decay, gradients=gradients)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_independent_gradients_are_the_mean_of_random_ones():
    E0, lr, steps, momentum, weight_decay = [0.3, 1.0, 4.0], 0.1, 60, 0.9, 0.01
    expected, _ = Toy(E0, momentum, weight_decay, "random", dim=4000).run(lr, steps)
    independent, aligned = (
        dynamics.simulate(E0, lr, steps, momentum, weight_decay, gradients=gradients)
        for gradients in ("independent", "aligned")
    )
    assert independent == pytest.approx(expected, rel=0.1)
    assert abs(np.log(aligned[-1] / expected[-1])).max() > 0.5


@quick
@given(layers, log_uniform)
def test_simulate_without_momentum_and_decay_iterates_one_step(E0, lr):
    for gradients in ("aligned", "independent"):
        E = dynamics.simulate(E0, lr, 5, gradients=gradients)
        for step in range(5):
            assert (E[step + 1] == dynamics.one_step(E[step], lr)).all()


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_a_single_gradient_whose_momentum_runs_out_is_one_step_of_the_amplified_lr(momentum):
    lr, kick = 0.3, iter([1.0])
    E = dynamics.simulate(E0, lambda E: (lr, next(kick, 0.0)), 600, momentum)
    assert E[-1] == pytest.approx(dynamics.one_step(E0, lr / (1 - momentum)), rel=1e-12)


def test_the_rule_is_called_with_E_before_each_step():
    seen = []

    def rule(E):
        seen.append(E)
        return 0.1

    E = dynamics.simulate([1.0, 2.0], rule, 4, momentum=0.9)
    assert np.array_equal(seen, E[:-1])


def test_shapes_and_dtypes():
    assert dynamics.simulate([1, 2, 3], 1, 4).shape == (5, 3)
    assert dynamics.simulate([1, 2], [], 0).tolist() == [[1.0, 2.0]]
    assert dynamics.simulate(2.0, 0.5, 1).tolist() == [[2.0], [1.0]]
    E = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 4)
    for function in (dynamics.balance_lr, dynamics.monotone_lr, dynamics.elr_spread):
        batched = function(E)
        assert batched.shape == (2, 3)
        assert batched.dtype == np.float64
        assert np.array_equal(batched, [[function(row) for row in block] for block in E])
    assert dynamics.one_step(E, [[0.1], [0.2], [0.3]]).shape == E.shape
    assert dynamics.critical_lr([[1], [4]], [1, 4, 9]).tolist() == [[1, 1 / 2, 1 / 3], [1 / 2, 1 / 4, 1 / 6]]
    assert float(dynamics.balance_lr([4])) == 1 / 4
    assert dynamics.elr_spread([7]) == 1
    assert dynamics.equilibrium_angle([[0.1], [0.2]], [1e-3, 1e-2, 0.1]).shape == (2, 3)


EQUILIBRIA = [(0.1, 0.2, 0.0), (0.1, 0.2, 0.5), (0.3, 0.02, 0.9), (2.0, 0.35, 0.9)]


@pytest.mark.parametrize("gradients", ["aligned", "independent"])
@pytest.mark.parametrize(("lr", "weight_decay", "momentum"), EQUILIBRIA)
def test_sgd_settles_at_the_equilibrium(lr, weight_decay, momentum, gradients):
    expected = dynamics.equilibrium_relative_grad(lr, weight_decay, momentum, gradients=gradients)
    start = expected * np.array([0.1, 1.0, 10.0])
    steps = math.ceil(6 * (1 - momentum) / (lr * weight_decay) + 50 / (1 - momentum))
    E, angles = Toy(start, momentum, weight_decay, gradients).run(lr, steps)
    assert E[-1] == pytest.approx(expected, rel=1e-7)
    assert angles[-1] == pytest.approx(dynamics.equilibrium_angle(lr, weight_decay, momentum), rel=1e-7)
    simulated = dynamics.simulate(start, lr, steps, momentum, weight_decay, gradients=gradients)
    assert simulated[-1] == pytest.approx(expected, rel=1e-7)


@quick
@given(st.floats(1e-3, 10), st.floats(1e-8, 1e-4), st.floats(0, 0.99))
def test_equilibrium_angle_is_the_square_root_to_leading_order(lr, weight_decay, momentum):
    small = 2 * lr * weight_decay / (1 + momentum)
    angle = dynamics.equilibrium_angle(lr, weight_decay, momentum)
    assert angle == pytest.approx(math.sqrt(small), rel=small)
    assert 1 - math.cos(angle) == pytest.approx(small / 2, abs=1e-15)


@pytest.mark.parametrize("correlation", [0.0, 0.7, 0.95])
def test_equilibrium_angle_does_not_depend_on_how_gradients_are_directed(correlation):
    """One layer in many dimensions whose gradient direction is a slowly changing random vector."""
    random = np.random.default_rng(1)
    lr, weight_decay, momentum, dim, c = 1.0, 0.01, 0.8, 2000, 3.0
    w = torch.tensor(random.normal(size=dim) / math.sqrt(dim), requires_grad=True)
    w.data *= math.sqrt(c / dynamics.equilibrium_relative_grad(lr, weight_decay, momentum))
    sgd = torch.optim.SGD([w], lr=lr, momentum=momentum, weight_decay=weight_decay)
    v = torch.from_numpy(random.normal(size=dim))
    squares = []
    for step in range(900):
        fresh = torch.from_numpy(random.normal(size=dim))
        v = correlation * v + math.sqrt(1 - correlation**2) * fresh
        before = w.detach().clone()
        sgd.zero_grad()
        (c * torch.dot(v / v.norm(), w / w.norm())).backward()
        sgd.step()
        if step >= 400:
            squares.append(angle_between(before, w) ** 2)
    expected = dynamics.equilibrium_angle(lr, weight_decay, momentum)
    assert math.sqrt(np.mean(squares)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("gradients", ["aligned", "independent"])
def test_nesterov_has_the_equilibrium_angles_of_the_theory_page(gradients):
    lr, weight_decay, momentum = 0.1, 0.01, 0.8
    E = dynamics.equilibrium_relative_grad(lr, weight_decay, momentum, gradients=gradients)
    _, angles = Toy([E], momentum, weight_decay, gradients, nesterov=True).run(lr, 600)
    if gradients == "aligned":
        per_decay = 1 / (1 - momentum + 2 * momentum**2)
    else:
        per_decay = ((1 - momentum**2) * (1 + momentum) ** 2 + momentum**4) / (1 + momentum)
    assert angles[-1] == pytest.approx(math.sqrt(2 * lr * weight_decay * per_decay), rel=0.01)


def settled_angle(direction, shape, lr, weight_decay, steps=2500):
    """Root mean square of the angles of w ← (1 − λω)w − λ·u, u = direction(g) from random gradients orthogonal to w.

    From random weights, in float64; the first half of the steps is left out.
    """
    random = np.random.default_rng(2)
    w = random.normal(size=shape) * 0.05
    squares = []
    for _ in range(steps):
        g = random.normal(size=shape)
        g -= (g * w).sum() / (w * w).sum() * w
        new = (1 - lr * weight_decay) * w - lr * direction(g)
        cosine = (w * new).sum() / np.linalg.norm(w) / np.linalg.norm(new)
        squares.append(math.acos(min(cosine, 1.0)) ** 2)
        w = new
    return math.sqrt(np.mean(squares[steps // 2 :]))


@pytest.mark.parametrize("beta1", [0.5, 0.9])
def test_adamw_settles_at_its_equilibrium(beta1):
    m, v = 0.0, 1.0  # v has settled

    def direction(g):
        nonlocal m, v
        m, v = beta1 * m + (1 - beta1) * g, 0.999 * v + 0.001 * g**2
        return m / np.sqrt(v)

    expected = dynamics.adamw_equilibrium_angle(0.01, 0.3, beta1)
    assert expected == pytest.approx(math.sqrt(2 * 0.01 * 0.3 * (1 - beta1) / (1 + beta1)))
    assert settled_angle(direction, 400, 0.01, 0.3) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.0, 0.9), (0.9, 0.9), (0.95, 0.98)])
def test_lion_settles_at_its_equilibrium(beta1, beta2):
    m = 0.0

    def direction(g):
        nonlocal m
        u = np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
        return u

    expected = dynamics.lion_equilibrium_angle(0.003, 0.8, beta1, beta2)
    assert settled_angle(direction, 400, 0.003, 0.8) == pytest.approx(expected, rel=0.05)
    if beta1 == beta2 == 0.9:  # linearized, as Kosson et al. have it
        squares = (1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2)
        assert expected == pytest.approx(math.sqrt(math.pi * 0.003 * 0.8 * squares), rel=0.06)


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_settles_at_its_equilibrium(nesterov):
    """With the exact polar factor in place of Newton-Schulz steps."""
    m = 0.0

    def direction(g):
        nonlocal m
        m = 0.9 * m + 0.1 * g
        u, _, v = np.linalg.svd(0.9 * m + 0.1 * g if nesterov else m, full_matrices=False)
        return u @ v

    expected = dynamics.muon_equilibrium_angle(0.01, 0.3, 0.9, nesterov=nesterov)
    assert settled_angle(direction, (4, 64), 0.01, 0.3) == pytest.approx(expected, rel=0.05)


def test_without_decay_there_is_no_equilibrium():
    assert dynamics.equilibrium_angle(0.1, 0.0, 0.9) == 0
    assert dynamics.equilibrium_relative_grad(0.1, 0.0, 0.9) == 0
    assert dynamics.adamw_equilibrium_angle(0.1, 0.0) == dynamics.lion_equilibrium_angle(0.1, 0.0) == 0
    assert dynamics.muon_equilibrium_angle(0.1, 0.0) == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_relative_grads_must_be_positive_and_finite(bad):
    for call in (
        lambda: dynamics.one_step([1, bad], 0.1),
        lambda: dynamics.critical_lr(1, bad),
        lambda: dynamics.critical_lr(bad, 1),
        lambda: dynamics.balance_lr([1, bad]),
        lambda: dynamics.monotone_lr([1, bad]),
        lambda: dynamics.elr_spread([1, bad]),
        lambda: dynamics.simulate([1, bad], 0.1, 1),
        lambda: dynamics.small_step([1, bad], 0.1),
    ):
        with pytest.raises(ValueError, match=f"must be positive and finite, got {bad}"):
            call()


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_hyper_parameters_must_be_finite_and_not_negative(bad):
    for call in (
        lambda: dynamics.one_step(1, bad),
        lambda: dynamics.small_step(1, bad),
        lambda: dynamics.simulate([1], bad, 1),
        lambda: dynamics.simulate([1], [0.1, bad], 2),
        lambda: dynamics.simulate([1], lambda E: bad, 1),
        lambda: dynamics.simulate([1], lambda E: (0.1, bad), 1),
        lambda: dynamics.simulate([1], 0.1, 1, momentum=bad),
        lambda: dynamics.simulate([1], 0.1, 1, weight_decay=bad),
        lambda: dynamics.equilibrium_angle(bad, 0.1),
        lambda: dynamics.equilibrium_angle(0.1, bad),
        lambda: dynamics.equilibrium_angle(0.1, 0.1, bad),
        lambda: dynamics.equilibrium_relative_grad(bad, 0.1),
    ):
        with pytest.raises(ValueError, match=f"must be finite and 0 or more, got {bad}"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dynamics.simulate([1], 0.1, 1, momentum=1.0), "momentum must be below 1, got 1.0"),
        (lambda: dynamics.simulate([1], 0.1, -1), "steps must be 0 or more, got -1"),
        (lambda: dynamics.simulate([1], [0.1, 0.1], 3), r"a schedule of 3 values .* got the shape \[2\]"),
        (lambda: dynamics.simulate([[1]], 0.1, 1), r"E0 must have the shape \[L\], got \[1, 1\]"),
        (lambda: dynamics.simulate([], 0.1, 1), "E0 must hold at least 1 layer"),
        (lambda: dynamics.simulate([1, 2], lambda E: [1, 1, 1], 1), r"learning rate .* \[2\], got \[3\]"),
        (lambda: dynamics.simulate([1, 2], lambda E: (1, [1]), 1), r"gradient factor .* \[2\], got \[1\]"),
        (lambda: dynamics.simulate([1], 0.1, 1, gradients="x"), "'aligned' or 'independent', got 'x'"),
        (lambda: dynamics.balance_lr([]), "at least 1 layer"),
        (lambda: dynamics.elr_spread([]), "at least 1 layer"),
        (lambda: dynamics.monotone_lr([1]), "at least 2 layers .* got 1"),
        (lambda: dynamics.equilibrium_angle(2.0, 1.0), "below 2, got 2.0"),
        (lambda: dynamics.equilibrium_relative_grad(0.0, 0.1), "lr must be positive, got 0"),
        (lambda: dynamics.equilibrium_relative_grad(1, 1, gradients="x"), "'aligned' or 'independent', got"),
    ],
)
def test_errors_name_the_value_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_rule_without_a_cap_is_stopped_when_E_vanishes():
    with pytest.raises(ValueError, match=r"E left the range of float64 at step .* cap the rule"):
        dynamics.simulate([1, 2], dynamics.balance_lr, 2000, momentum=0.9)


def test_steps_must_be_a_whole_number():
    with pytest.raises(TypeError, match="integer"):
        dynamics.simulate([1], 0.1, 1.5)


def test_inputs_are_left_as_they_are():
    E0, schedule = np.array([1.0, 2.0]), np.array([0.1, 0.2])
    dynamics.simulate(E0, schedule, 2, 0.9, 0.1)
    assert E0.tolist() == [1.0, 2.0]
    assert schedule.tolist() == [0.1, 0.2]


def test_numpy_is_all_it_imports():
    code = f"""
import runpy, sys
runpy.run_path({dynamics.__file__!r})
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
