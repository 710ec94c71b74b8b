"""rule="warmup" equalizes without changing the function, follows its law in the model, and hands over to SGD."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elropt import ELRSGD, dynamics, effective_lrs, rules
from elropt import reference as reference_backend
from elropt._warmup_end import WarmupEndPoll

from .nets import backward, bn_mlp, invariant_weights, train


def turning(w: Tensor, c: float) -> Tensor:
    """Gradient of f(w) = c·(angle of w) on the plane: ‖g‖ = c/‖w‖, orthogonal to w."""
    return c * torch.stack([-w[1], w[0]]).reshape(w.shape) / w.square().sum()


def plane_weights(e: list[float], c: float) -> list[nn.Parameter]:
    """Weights [2, 1] in float64 with ‖g‖/‖w‖ = c/‖w‖² = e."""
    return [nn.Parameter(torch.tensor([[math.sqrt(c / x)], [0.0]], dtype=torch.float64)) for x in e]


def relative_grads(weights: list[nn.Parameter], c: float) -> np.ndarray:
    return np.array([c / w.detach().square().sum().item() for w in weights])


@pytest.mark.parametrize(("lr", "momentum"), [(1e-3, 0.0), (0.05, 0.0), (3.0, 0.0), (3.0, 0.9)])
def test_law_in_the_model(lr: float, momentum: float) -> None:
    """E' = E★·(E/E★)^(1-rate) / (1+(λE★)²) at every step, E★ = min(Ē, 1/(λ·gain)); then E' = E/(1+(λE)²)."""
    c = 0.7
    weights = plane_weights([100.0, 10.0, 0.3, 5.0, 1.0], c)
    optimizer = ELRSGD([{"params": weights, "scale_invariant": True}], lr=lr, momentum=momentum)
    for step in range(60 if momentum == 0 else 1):  # with momentum the turn of later steps is not λE
        e = relative_grads(weights, c)
        target = min(np.exp(np.log(e).mean()), math.sqrt((1 - momentum) ** 3 / (1 + momentum)) / lr)
        over = bool(optimizer.state and optimizer.state[weights[0]]["handed_over"] > 0)
        ends = math.sqrt((np.log(e / target) ** 2).mean()) < rules.EQUALIZED_STD
        share = 1.0 if ends else rules.EQUALIZATION_RATE
        expected = target * (e / target) ** (1 - share) / (1 + (lr * target) ** 2)
        if over:
            expected = dynamics.one_step(e, lr)
        for w in weights:
            w.grad = turning(w.detach(), c)
        optimizer.step()
        np.testing.assert_allclose(relative_grads(weights, c), expected, rtol=1e-5, err_msg=f"step {step}")
    if momentum == 0:
        assert optimizer.state[weights[0]]["handed_over"] == 1
        assert dynamics.elr_spread(relative_grads(weights, c)) < 1 + 1e-5


@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}], ids=str)
def test_function_is_preserved_and_elrs_end_equal(backend: dict[str, bool]) -> None:
    """With lr=0 only the rescaling is left: the outputs stay, and E measured by autograd ends up uniform."""
    net = bn_mlp(depth=8, dtype=torch.float64)
    with torch.no_grad():
        for i, w in enumerate(invariant_weights(net)):
            w.mul_(3.0 ** (i % 3))
    x = torch.randn(32, 8, dtype=torch.float64)
    weights = invariant_weights(net)  # named: where nothing turns, no test says which they are
    rest = [p for p in net.parameters() if all(p is not w for w in weights)]
    groups = [{"params": weights, "scale_invariant": True}, {"params": rest, "scale_invariant": False}]
    optimizer = ELRSGD(groups, lr=0.0, momentum=0.9, **backend)
    net.train()
    before = net(x).detach()

    def e_of_all() -> np.ndarray:
        backward(net, 0)
        return np.array(
            [(w.grad.norm() / w.norm()).item() for w in invariant_weights(net) if w.grad is not None]
        )

    start = e_of_all()
    norms = math.prod(w.norm().item() for w in invariant_weights(net))
    for _ in range(60):
        e_of_all()
        optimizer.step()
    assert dynamics.elr_spread(start) > 5
    assert dynamics.elr_spread(e_of_all()) < 1.01
    assert math.prod(w.norm().item() for w in invariant_weights(net)) == pytest.approx(norms, rel=1e-4)
    torch.testing.assert_close(net(x).detach(), before, rtol=1e-3, atol=1e-3)  # ε of the BatchNorms


def test_after_the_hand_over_it_is_sgd() -> None:
    net = bn_mlp()
    optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    head = net[-1].weight
    steps = 0
    while not (optimizer.state and optimizer.state[net[0].weight]["handed_over"] > 0):
        train(net, optimizer, range(steps, steps + 1))
        steps += 1
        assert steps < 100
    assert steps >= rules.RADIAL_TESTS
    assert optimizer.state[head]["tracked"] == -1
    twin = copy.deepcopy(net)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    sgd.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(steps, steps + 5))
    train(twin, sgd, range(steps, steps + 5))
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_after_the_hand_over_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    net = bn_mlp()
    optimizer = ELRSGD(net.parameters(), lr=0.05)
    train(net, optimizer, range(60))
    assert optimizer.state[net[0].weight]["handed_over"] == 1

    def forbidden(*_: object, **__: object) -> Tensor:
        raise AssertionError("measured after the hand-over")

    monkeypatch.setattr(reference_backend, "measure", forbidden)
    train(net, optimizer, range(60, 63))


def test_the_cap_binds_at_a_huge_learning_rate() -> None:
    """No tracked layer turns by more than the critical angle; what is not tracked sees plain SGD."""
    net = bn_mlp()
    lr, momentum = 1e4, 0.9
    optimizer = ELRSGD(net.named_parameters(), lr=lr, momentum=momentum)
    head = net[-1].bias
    backward(net, 0)
    assert head.grad is not None
    before, g = head.detach().clone(), head.grad.clone()
    optimizer.step()
    elrs = np.array([elr for name, elr in effective_lrs(optimizer).items() if name != "12.weight"])
    np.testing.assert_allclose(elrs, math.sqrt((1 - momentum) ** 3 / (1 + momentum)), rtol=1e-4)
    torch.testing.assert_close(head.detach(), before - lr * g)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_growth_gain_is_that_of_the_model(momentum: float) -> None:
    """Under steady gradients ‖w‖² grows by (λ·gain·E)² a step, once momentum has settled and while that is small."""
    e, lr, steps = 2.0, 1e-7, 500
    path = dynamics.simulate(e, lr, steps, momentum=momentum, gradients="aligned")[:, 0]
    growth = path[-2] / path[-1] - 1
    assert growth == pytest.approx((lr * rules.growth_gain(momentum) * e) ** 2, rel=1e-2)


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.5, False), (0.5, 0.0, True), (0.9, 0.0, True)],
)
def test_growth_gain_is_that_of_torch_sgd(momentum: float, dampening: float, nesterov: bool) -> None:
    """A weight that keeps turning in the plane lengthens by as much, once its momentum has settled."""
    lr, c = 1e-4, 1.0
    (w,) = plane_weights([1.0], c)
    options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    optimizer = torch.optim.SGD([w], lr=lr, **options)
    for _ in range(300):
        w.grad = turning(w.detach(), c)
        before = w.detach().square().sum().item()
        optimizer.step()
    growth = w.detach().square().sum().item() / before - 1
    gain = rules.growth_gain(momentum, dampening, nesterov)
    assert growth == pytest.approx((lr * gain * c / before) ** 2, rel=2e-2)


def test_the_cap_is_that_of_the_largest_learning_rate() -> None:
    inputs = vectors([8.0, 2.0, 1.0], [True] * 3)
    stats = inputs.stats
    lr, gain = torch.tensor([1.0, 10.0, 5.0]), torch.tensor([1.0, 1.0, 4.0])
    inputs = inputs._replace(hyper=inputs.hyper._replace(lr=lr, growth_gain=gain))
    controls, _ = rules.warmup(inputs)
    assert controls.grad_factor is not None
    assert controls.weight_factor is not None
    applied = controls.grad_factor * stats.grad_sq.sqrt() / controls.weight_factor
    torch.testing.assert_close(applied, torch.full((3,), 1 / 20))
    still = torch.tensor([True, True, False])  # that of a layer that does not move does not count
    controls, _ = rules.warmup(inputs._replace(moving=still))
    assert controls.grad_factor is not None
    assert controls.weight_factor is not None
    applied = controls.grad_factor * stats.grad_sq.sqrt() / controls.weight_factor
    torch.testing.assert_close(applied[:2], torch.full((2,), 1 / 10))


def test_a_large_learning_rate_lengthens_the_weights_until_sgd_turns_by_the_critical_angle() -> None:
    net = bn_mlp(depth=8, dtype=torch.float64)
    x = torch.randn(32, 8, dtype=torch.float64)
    net.train()
    before = net(x).detach()
    weights = invariant_weights(net)
    groups = [{"params": weights, "scale_invariant": True}]
    optimizer = ELRSGD(groups, lr=1e5, momentum=0.9)
    # Gradients of the first batch with no step on the sphere: only the rescaling is left.
    norms = [w.norm().item() for w in weights]
    for _ in range(200):
        backward(net, 0)
        directions = [w.detach() / w.norm() for w in weights]
        optimizer.step()
        with torch.no_grad():
            for w, direction in zip(weights, directions, strict=True):
                w.copy_(direction * w.norm())
                optimizer.state[w]["momentum_buffer"].zero_()
        if optimizer.state[weights[0]]["handed_over"] > 0:
            break
    assert optimizer.state[weights[0]]["handed_over"] == 1
    assert all(w.norm().item() > 10 * norm for w, norm in zip(weights, norms, strict=True))
    backward(net, 0)
    for w in weights:
        assert w.grad is not None
        elr = 1e5 * (w.grad.norm() / w.norm()).item()
        assert elr == pytest.approx(1 / rules.growth_gain(0.9), rel=0.05)
    torch.testing.assert_close(net(x).detach(), before, rtol=1e-3, atol=1e-3)


def test_nothing_tracked_is_plain_sgd() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    twin = copy.deepcopy(net)
    ours = ELRSGD([{"params": net.parameters(), "scale_invariant": False}], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    train(net, ours, range(5))
    train(twin, theirs, range(5))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_late_layers_do_not_restart_it() -> None:
    net = bn_mlp()
    weights = invariant_weights(net)
    optimizer = ELRSGD([{"params": weights[1:], "scale_invariant": True}], lr=0.05)
    train(net, optimizer, range(60))
    assert optimizer.state[weights[1]]["handed_over"] == 1
    optimizer.add_param_group({"params": weights[:1], "scale_invariant": True})
    backward(net, 60)
    expected = [w.detach() - 0.05 * w.grad for w in weights if w.grad is not None]
    optimizer.step()
    for w, e in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.detach(), e)


def vectors(
    e: list[float], tested: list[bool], *, lr: float = 1e-3, c: list[float] | None = None
) -> rules.RuleInputs:
    """Arguments of `rules.warmup`: weights of norm 1 with these E, a smoothed c, and which layers passed all tests."""
    n = len(e)
    zeros, ones = torch.zeros(n), torch.ones(n)
    stats = rules.LayerStats(ones, torch.tensor(e).square(), zeros, zeros)
    passed = torch.where(torch.tensor(tested), float(rules.RADIAL_TESTS), 3.0)
    smoothed = zeros if c is None else torch.tensor(c)
    state = rules.RuleState(smoothed, zeros, passed, torch.zeros(()), torch.tensor(lr))
    hyper = rules.RowHyper(lr * ones, zeros, ones, ones, zeros, ones)
    return rules.RuleInputs(stats, state, hyper, ones > 0, ones > 0)


def test_it_ends_only_when_all_conditions_hold() -> None:
    def over(*args: Any, **kwargs: Any) -> bool:
        return bool(rules.warmup(vectors(*args, **kwargs))[1].handed_over > 0)

    equal, unequal, yes = [1.0, 1.01, 0.99], [4.0, 1.0, 1.0], [True] * 3
    assert over(equal, yes)
    assert not over(equal, [True, True, False])  # a layer is still being tested
    assert not over(equal, yes, lr=10.0)  # the cap binds
    assert not over(unequal, yes)
    assert not over(equal, yes, c=unequal)  # equal by chance: the smoothed c says otherwise
    assert over([1.3, 1.0, 1.0], yes, c=equal)  # unequal by chance: one noisy gradient does not matter


def test_only_tested_layers_are_rescaled_and_all_turn_alike() -> None:
    e = [4.0, 1.0, 0.5]
    inputs = vectors(e, [True, True, False])
    controls, _ = rules.warmup(inputs)
    s, a = controls.grad_factor, controls.weight_factor
    assert s is not None
    assert a is not None
    mean = np.exp(np.log(e).mean())
    expected = (np.array(e) / mean) ** (rules.EQUALIZATION_RATE / 2)
    np.testing.assert_allclose(a.numpy(), [*expected[:2], 1.0], rtol=1e-6)
    np.testing.assert_allclose((s * inputs.stats.grad_sq.sqrt() / a).numpy(), mean, rtol=1e-6)


def test_the_last_rescaling_uses_the_smoothed_c() -> None:
    controls, after = rules.warmup(vectors([1.3, 1.0, 1.0], [True] * 3, c=[1.0, 1.05, 1.0]))
    assert controls.weight_factor is not None
    c = np.array([1.03, 1.045, 1.0])  # 0.9 of the old, 0.1 of the new
    np.testing.assert_allclose(after.sphere_grad_norm.numpy(), c, rtol=1e-6)
    offset = np.log(c) - np.log(c).mean()
    np.testing.assert_allclose(controls.weight_factor.numpy(), np.exp(offset / 2), rtol=1e-5)


@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}], ids=str)
def test_a_host_that_learns_late_that_it_is_over_leaves_the_same_state(
    backend: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the rule is asked some steps longer, and in a CUDA graph for good."""
    results = []
    for late in (False, True):
        net = bn_mlp()
        optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9, **backend)
        train(net, optimizer, range(60))
        assert optimizer.state[net[0].weight]["handed_over"] == 1
        if late:
            monkeypatch.setattr(WarmupEndPoll, "warmup_is_over", lambda self: False)
        train(net, optimizer, range(60, 65))
        state = [t for p in net.parameters() for t in optimizer.state[p].values()]
        results.append([t.detach() for t in (*net.parameters(), *state)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("dampening", "nesterov"), [(0.0, False), (0.5, False), (0.0, True)])
def test_the_cap_counts_momentum_and_dampening(dampening: float, nesterov: bool) -> None:
    c, lr, momentum = 0.7, 50.0, 0.9
    weights = plane_weights([3.0, 1.0], c)
    groups = [{"params": weights, "scale_invariant": True}]
    optimizer = ELRSGD(groups, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)
    for w in weights:
        w.grad = turning(w.detach(), c)
    optimizer.step()
    for elr in effective_lrs(optimizer).values():
        growth = 1 - momentum + 2 * momentum**2 if nesterov else 1 + momentum
        gain = (1 - dampening) * math.sqrt(growth / (1 - momentum) ** 3)
        assert elr * gain == pytest.approx(1, rel=1e-5)


def test_lr_as_a_tensor_gives_the_same_warmup() -> None:
    nets = [bn_mlp(dtype=torch.float64) for _ in range(2)]
    lrs: tuple[float | Tensor, ...] = (20.0, torch.tensor([20.0], dtype=torch.float64))
    for net, lr in zip(nets, lrs, strict=True):  # large, so that the cap binds
        train(net, ELRSGD(net.parameters(), lr=lr, momentum=0.5), range(3))
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
