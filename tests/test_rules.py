"""The other rules against the model and against their own definition; which layers are tracked; faulty layers."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import elropt
from elropt import ELRSGD, dynamics, effective_lrs, layer_stats
from elropt.rules import (
    RADIAL_TESTS,
    TEST_TURN,
    LayerControls,
    LayerStats,
    RowHyper,
    RuleState,
    count_test,
    decide,
    radial_test,
    step_turn,
)
from elropt.rules import RULES as SPECS

from .every_rule import FORMS, acts_on_update, needs, skip_without_kernels
from .nets import backward, bn_mlp, invariant_weights, train
from .test_warmup import plane_weights, relative_grads, turning

RULES = [rule for rule in SPECS if rule]


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rule", [None, "uniform"])
def test_trajectory_of_the_model(rule: str | None, momentum: float, weight_decay: float) -> None:
    c, lr, steps = 0.7, 0.05, 20
    weights = plane_weights([4.0, 1.0, 0.3], c)
    optimizer = ELRSGD(
        [{"params": weights, "scale_invariant": True}],
        lr=lr, momentum=momentum, weight_decay=weight_decay, rule=rule,
    )  # fmt: skip

    def uniform(e: np.ndarray) -> tuple[float, np.ndarray]:
        return lr, np.exp(np.log(e).mean()) / e

    start = relative_grads(weights, c)
    expected = dynamics.simulate(
        start, uniform if rule else lr, steps, momentum=momentum, weight_decay=weight_decay
    )
    for step in range(steps):
        np.testing.assert_allclose(relative_grads(weights, c), expected[step], rtol=2e-5)
        for w in weights:
            w.grad = turning(w.detach(), c)
        optimizer.step()


@settings(deadline=None, max_examples=50)
@given(
    e=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
    lr=st.floats(1e-4, 1.0),
    norm=st.floats(1e-2, 1e2),
)
def test_angle_turns_by_lr_and_keeps_the_norm(e: list[float], lr: float, norm: float) -> None:
    """The plain step turns by atan(lr) whatever the gradient; the norm stays that of the start."""
    weights = plane_weights(e, norm)
    optimizer = ELRSGD([{"params": weights, "scale_invariant": True}], lr=lr, rule="angle")
    norms = [w.norm().item() for w in weights]
    for _ in range(4):
        before = [math.atan2(*w.detach().flip(0)) for w in weights]
        for w in weights:
            w.grad = turning(w.detach(), norm)
        optimizer.step()
        for w, angle, n in zip(weights, before, norms, strict=True):
            turned = (angle - math.atan2(*w.detach().flip(0))) % (2 * math.pi)
            assert turned == pytest.approx(math.atan(lr), rel=1e-5)
            assert w.norm().item() == pytest.approx(n * math.sqrt(1 + lr**2), rel=1e-5)


def test_sphere_follows_the_gradient() -> None:
    c, lr = 0.7, 0.1
    weights = plane_weights([4.0, 1.0, 0.3], c)
    optimizer = ELRSGD([{"params": weights, "scale_invariant": True}], lr=lr, rule="sphere")
    for i, w in enumerate(weights):
        w.grad = turning(w.detach(), c * (i + 1))
    optimizer.step()
    np.testing.assert_allclose(
        list(effective_lrs(optimizer).values()), lr * c * np.array([1, 2, 3]), rtol=1e-5
    )
    for i, w in enumerate(weights):
        assert -math.atan2(*w.detach().flip(0)) == pytest.approx(math.atan(lr * c * (i + 1)), rel=1e-5)


@pytest.mark.parametrize("rule", ["uniform", "warmup", "angle"])
def test_applied_elrs_are_uniform_at_the_first_step(rule: str) -> None:
    net = bn_mlp(depth=6)
    optimizer = ELRSGD(net.named_parameters(), lr=0.01, momentum=0.9, rule=rule)
    train(net, optimizer, range(1))
    assert layer_stats(optimizer).elr_spread == pytest.approx(1, rel=1e-4)
    if rule == "angle":
        assert all(elr == pytest.approx(0.01, rel=1e-4) for elr in effective_lrs(optimizer).values())


@pytest.mark.parametrize("rule", ["uniform", "angle", "sphere"])
def test_untracked_parameters_see_plain_sgd(rule: str) -> None:
    net = bn_mlp()
    tracked = set(invariant_weights(net))
    others = [p for p in net.parameters() if p not in tracked]
    groups = [
        {"params": list(tracked), "scale_invariant": True},
        {"params": others, "scale_invariant": False},
    ]
    optimizer = ELRSGD(groups, lr=0.1, rule=rule)
    backward(net, 0)
    expected = [p.detach() - 0.1 * p.grad for p in others if p.grad is not None]
    optimizer.step()
    for p, e in zip(others, expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_which_layers_are_tracked_is_measured(dtype: torch.dtype, autocast: bool) -> None:
    """Bare parameters: exactly those whose gradient was orthogonal in float64, which are the weights in front of a
    normalization, also with half-precision gradients. A CPU without AVX-512 rounds more in bfloat16 convolutions: there
    an invariant weight may fail by chance."""
    halves = autocast or dtype == torch.bfloat16
    rounds_more = halves and torch.backends.cpu.get_cpu_capability() != "AVX512"
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, groups=32, bias=False), nn.GroupNorm(4, 32), nn.ReLU(),
            nn.Conv2d(32, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        ).to(dtype)  # fmt: skip
        optimizer = ELRSGD(net.named_parameters(), lr=0.01, momentum=0.9, rule="uniform")
        failed: set[str] = set()
        for _ in range(RADIAL_TESTS):
            x, y = torch.randn(32, 3, 12, 12).to(dtype), torch.randint(10, (32,))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(net(x).float(), y)
            loss.backward()
            for name, p in net.named_parameters():
                assert p.grad is not None
                n, w = p.numel(), p.detach().double().flatten()
                cosine = F.cosine_similarity(w, p.grad.double().flatten(), 0)
                if p.dim() < 2 or abs(float(cosine)) >= min(0.02 / n**0.5 + 1e-4, 0.1 / n**0.5):
                    failed.add(name)
            optimizer.step()
        passed = {name for name, p in net.named_parameters() if optimizer.state[p].get("tracked", -1) > 0}
        assert passed == {name for name, _ in net.named_parameters()} - failed
        invariant = {"0.weight", "3.weight", "6.weight"}
        assert passed <= invariant if rounds_more else passed == invariant


@pytest.mark.parametrize("n", [10**k for k in range(1, 11)])
def test_the_radial_test_tells_chance_from_zero_at_every_size(n: int) -> None:
    """Cosines of unrelated vectors are normal with deviation 1/√n; ε/σ² = 0.003 leaves that share of it."""
    rows = 100_000
    generator = torch.Generator().manual_seed(n)
    ones, numel = torch.ones(rows), torch.full((rows,), float(n))
    unrelated = invariant = torch.zeros(rows)
    for _ in range(RADIAL_TESTS):
        cosine = torch.randn(rows, generator=generator) / math.sqrt(n)
        unrelated = radial_test(LayerStats(ones, ones, cosine, ones), unrelated, numel)
        invariant = radial_test(LayerStats(ones, ones, 0.003 * cosine, ones), invariant, numel)
    assert (unrelated == -1).all()
    assert (invariant > 0).double().mean() > 1 - 1e-3


def test_a_test_counts_by_the_angle_of_the_step() -> None:
    ones = torch.ones(5)
    stats = LayerStats(4 * ones, 36 * ones, 0 * ones, 0 * ones)  # E = 3
    lr = TEST_TURN * torch.tensor([1 / 12, 1 / 12, 1 / 2, 0.0, 1 / 12])
    hyper = RowHyper(lr, 0 * ones, 2 * ones, ones, 0 * ones, ones)
    factors = LayerControls(torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0]))
    before = torch.tensor([0.0, 2.0, 7.5, 1.0, 8.0])
    passed = torch.tensor([0.01, 2.01, 7.51, 1.01, 8.0])
    after = count_test(before, passed, step_turn(stats, hyper, factors))
    torch.testing.assert_close(after, torch.tensor([0.5, 2.25, 8.0, 1.01, 8.0]))


@pytest.mark.parametrize("over", [0.0, 1.0])
@pytest.mark.parametrize("λΓ", [0.002, 0.02, 3.0])
def test_under_warmup_all_tests_count_by_the_turn_that_all_layers_make(λΓ: float, over: float) -> None:
    ones = torch.ones(2)
    stats = LayerStats(ones, torch.tensor([1.0, 16.0]), 0 * ones, 0 * ones)  # E = 1 and 4: Ē = 2
    hyper = RowHyper(λΓ / 2 * ones, 0 * ones, 2 * ones, ones, 0 * ones, 100 * ones)
    state = RuleState(0 * ones, 0 * ones, 3 * ones, torch.tensor(over), torch.tensor(0.0))
    _, after = decide("warmup", stats, state, hyper)
    torch.testing.assert_close(after.tracked, 3 + ones * min(max(min(2 * λΓ, 1) / TEST_TURN, 0.01), 1))


@pytest.mark.parametrize(("lr", "ramp"), [(0.01, 1), (0.1, 1), (0.1, 100)])
def test_a_weight_that_is_invariant_only_with_its_zero_bias_is_not_tracked(lr: float, ramp: int) -> None:
    """Before its bias has moved, ⟨w,g⟩ is 0. It must not be rescaled; without the bias it is invariant."""
    for bias in (True, False):
        torch.manual_seed(0)
        first = nn.Conv2d(3, 16, 3, bias=bias)
        net = nn.Sequential(first, nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 5))
        if first.bias is not None:
            nn.init.zeros_(first.bias)
        optimizer = ELRSGD(net.named_parameters(), lr=lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / ramp))
        for step in range(60):
            x = torch.randn(32, 3, 6, 6)
            optimizer.zero_grad()
            F.cross_entropy(net(x), x.mean((2, 3)).argmax(1)).backward()
            optimizer.step()
            schedule.step()
            if bias:
                assert next(iter(layer_stats(optimizer))).weight_factor == 1, step
        tracked = optimizer.state[first.weight]["tracked"].item()
        assert tracked == -1 if bias else tracked > 0


@pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)  # NumPy, in the interpreter
@pytest.mark.parametrize(("rule", "elr_of"), [(r, e) for r, g, e in FORMS if r and g == "layer"])
@pytest.mark.parametrize("fault", [math.nan, math.inf, 1e30, 0.0])
@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_faulty_gradient_stays_in_its_layer(
    rule: str, elr_of: str | None, fault: float, backend: dict[str, bool]
) -> None:
    """The other layers step as if the faulty one were not tracked; it itself gets SGD's update, as torch would, but is
    not moved by a gradient too large for its norm, nor by an update without tangential part whose angle is set."""
    skip_without_kernels(backend, rule, elr_of)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def step(flags: list[bool]) -> list[nn.Parameter]:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(4, 4, device=device) * 3**i) for i in range(4)]
        groups = [{"params": [w], "scale_invariant": flag} for w, flag in zip(weights, flags, strict=True)]
        optimizer = ELRSGD(groups, lr=0.05, momentum=0.9, rule=rule, elr_of=elr_of, **needs(rule), **backend)
        for _ in range(2):
            for i, w in enumerate(weights):
                g = torch.randn(4, 4, generator=torch.Generator().manual_seed(i)).to(device)
                w.grad = g * fault if i == 1 else g
            optimizer.step()
        return weights

    torch.manual_seed(0)
    start = [torch.randn(4, 4, device=device) * 3**i for i in range(4)]
    ours, expected = step([True] * 4), step([True, False, True, True])
    for i in (0, 2, 3):
        assert torch.isfinite(ours[i]).all()
        torch.testing.assert_close(ours[i], expected[i], rtol=1e-5, atol=1e-6)
    if math.isinf(fault):
        assert not torch.isfinite(ours[1]).any()
    elif math.isnan(fault):
        assert torch.isnan(ours[1]).all()
    else:
        layer = ours[1].detach()
        if needs(rule) and not acts_on_update(rule, elr_of):  # decays until the next step restores its norm
            layer = layer * (start[1].norm() / layer.norm())
        torch.testing.assert_close(layer, start[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_zero_weights_start_as_under_sgd(rule: str) -> None:
    """A weight without direction gets SGD's update; its radius is taken once it has one."""
    zero, other = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.ones(3, 3))
    group = {"params": [zero, other], "scale_invariant": True}
    optimizer = ELRSGD([group], lr=0.1, rule=rule, **needs(rule))
    g = torch.arange(9.0).reshape(3, 3) + 1
    zero.grad, other.grad = g.clone(), torch.tensor([[1.0, -1, 0], [0, 0, 0], [0, 0, 0]])
    optimizer.step()
    torch.testing.assert_close(zero.detach(), -0.1 * g)
    optimizer.step()
    assert torch.isfinite(zero).all()
    assert torch.isfinite(other).all()


@pytest.mark.parametrize("rule", RULES)
def test_accumulation_and_clipping_compose(rule: str) -> None:
    """Two half batches give the step of the whole one; a clipped gradient keeps "angle" and "warmup"'s first turn."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 8, dtype=torch.float64), torch.randint(4, (32,))
    nets = [
        nn.Sequential(nn.Linear(8, 16, bias=False), nn.LayerNorm(16), nn.Linear(16, 4)).double()
        for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, parts in zip(nets, ([slice(0, 32)], [slice(0, 16), slice(16, 32)]), strict=True):
        optimizer = ELRSGD(net.parameters(), lr=0.01, momentum=0.9, rule=rule, **needs(rule))
        for _ in range(3):
            optimizer.zero_grad()
            for part in parts:
                (F.cross_entropy(net(x[part]), y[part]) / len(parts)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_groups_with_different_rules_are_decided_apart() -> None:
    net = bn_mlp(depth=4)
    weights = invariant_weights(net)
    groups = [
        {"params": weights[:2], "scale_invariant": True, "rule": "angle", "lr": 0.02},
        {"params": weights[2:], "scale_invariant": True, "rule": "uniform"},
    ]
    optimizer = ELRSGD(groups, lr=0.1)
    train(net, optimizer, range(1))
    elrs = list(effective_lrs(optimizer).values())
    assert elrs[:2] == pytest.approx([0.02, 0.02], rel=1e-4)
    assert elrs[2] == pytest.approx(elrs[3], rel=1e-4)
    assert elrs[2] != pytest.approx(0.02, rel=1e-2)


def test_a_rule_changed_between_steps_is_noticed() -> None:
    net = bn_mlp()
    optimizer = ELRSGD(net.named_parameters(), lr=0.02, momentum=0.9, rule=None)
    train(net, optimizer, range(2))
    optimizer.param_groups[0]["rule"] = "angle"
    train(net, optimizer, range(2, 3))
    tracked = layer_stats(optimizer)
    assert [row.elr for row in tracked if row.tracked] == pytest.approx([0.02] * 4, rel=1e-4)


@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("rule", [None, "uniform"])
@pytest.mark.parametrize(
    "hyper",
    [{}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}],
    ids=str,
)
def test_projection_removes_whatever_is_radial(
    backend: dict[str, bool], rule: str | None, hyper: dict[str, Any]
) -> None:
    """Also of gradients that have a radial part themselves, of momentum, and of the decay."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(6, 5, device=device) * 3**i) for i in range(3)]
    groups = [{"params": weights, "scale_invariant": True}]
    optimizer = ELRSGD(groups, lr=0.05, rule=rule, project=True, **hyper, **backend)
    for step in range(4):
        before = [w.detach().double().clone() for w in weights]
        for w in weights:
            w.grad = torch.randn_like(w) + 0.5 * w.detach()
        optimizer.step()
        for w, old in zip(weights, before, strict=True):
            moved = w.detach().double() - old
            assert moved.norm() > 1e-3 * old.norm()
            assert abs((moved * old).sum() / (moved.norm() * old.norm())) < 1e-5, step


@pytest.mark.parametrize("rule", ["angle", "sphere"])
def test_the_whole_sphere_survives_missing_gradients(rule: str) -> None:
    """granularity="network": whoever sits a step out keeps its weight, and the radius of all does not drift."""
    rng = np.random.default_rng(0)
    weights = plane_weights([4.0, 1.0, 0.3, 2.0], 0.7)
    radius = math.sqrt(sum(w.square().sum().item() for w in weights))
    optimizer = ELRSGD(
        [{"params": weights, "scale_invariant": True}], lr=0.02, rule=rule, granularity="network"
    )
    for step in range(60):
        present = rng.random(4) < (0.6 if step < 59 else 2)
        before = [w.detach().clone() for w in weights]
        for w, here in zip(weights, present, strict=True):
            w.grad = turning(w.detach(), 0.7) if here else None
        optimizer.step()
        for w, old, here in zip(weights, before, present, strict=True):
            assert torch.equal(w.detach(), old) != here
    held = math.sqrt(sum(optimizer.state[w]["radius"].square().sum().item() for w in weights))
    assert held == pytest.approx(radius, rel=1e-4)
    assert math.sqrt(sum(w.square().sum().item() for w in weights)) == pytest.approx(radius, rel=1e-2)


@pytest.mark.parametrize("rule", ["angle", "sphere"])
def test_the_radius_of_a_network_that_stays_as_it_is_keeps_its_bits(rule: str) -> None:
    """Rounding at each of many small steps would add up: to 1e-5 of the radius in 8,000 steps."""
    rng = np.random.default_rng(0)
    norms = np.array([2.3, 1.7, 0.4])
    ones, rest = torch.ones(3), torch.tensor(0.0)
    state = RuleState(torch.zeros(3), torch.tensor(norms).float(), torch.full((3,), 8.0), rest, rest)
    for _ in range(500):
        weight_sq = torch.tensor((norms * (1.01 + rng.normal(size=3) * 1e-3)) ** 2).float()
        stats = LayerStats(weight_sq, ones, torch.zeros(3), torch.zeros(3))
        hyper = RowHyper(ones, ones, ones, ones, ones, ones)
        controls, after = decide(rule, stats, state, hyper, granularity="network")
        assert controls.weight_factor is not None
        held = (controls.weight_factor.double().square() * weight_sq.double()).sum().sqrt().item()
        assert held == pytest.approx(np.linalg.norm(norms), rel=1e-6)
        assert torch.equal(after.radius, state.radius)
        state = after


@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("rule", ["angle", "sphere"])
@pytest.mark.parametrize("which", ["weights", "gradients"])
@pytest.mark.filterwarnings("ignore:overflow encountered")  # by the interpreter
def test_a_network_whose_square_overflows_sees_plain_sgd(
    rule: str, backend: dict[str, bool], which: str
) -> None:
    """The norm of each of its layers is finite in float32, that of all of them is not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"weights": 1.0, "gradients": 1.0, which: 9e18}
    weights = [nn.Parameter(torch.full((2, 2), sizes["weights"], device=device)) for _ in range(2)]
    optimizer = ELRSGD(
        [{"params": weights, "scale_invariant": True}], lr=0.5, rule=rule, granularity="network", **backend
    )
    signs = torch.tensor([[1.0, -1.0], [1.0, -1.0]], device=device)
    for w in weights:
        w.grad = sizes["gradients"] * signs
    optimizer.step()
    for w in weights:
        torch.testing.assert_close(w.detach(), sizes["weights"] - 0.5 * sizes["gradients"] * signs)


def test_a_flag_changed_between_steps_is_noticed() -> None:
    weights = plane_weights([4.0, 2.5], 0.7)
    groups = [{"params": [w], "scale_invariant": True} for w in weights]
    optimizer = ELRSGD(groups, lr=0.02, rule="angle")
    for flag in (True, False):
        optimizer.param_groups[1]["scale_invariant"] = flag
        for w in weights:
            w.grad = turning(w.detach(), 0.7)
        plain = weights[1].detach() - 0.02 * turning(weights[1].detach(), 0.7)
        optimizer.step()
        assert torch.allclose(weights[1].detach(), plain) != flag


def rule_names_that_decide(source: str) -> Iterator[int]:
    """The lines at which something is compared with a rule's name, or looked up by it. ("angle" is a column of tables
    too, which may stand in a collection or be looked for in one.)"""
    for node in ast.walk(ast.parse(source)):
        parts: list[Any] = []
        names = set(RULES) - {"angle"}
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            if not (isinstance(node.left, ast.Constant) and isinstance(node.ops[0], ast.In | ast.NotIn)):
                names = set(RULES)
        elif isinstance(node, ast.Dict):
            parts = [*node.keys]
        elif isinstance(node, ast.MatchValue):
            parts, names = [node.value], set(RULES)
        elif isinstance(node, ast.List | ast.Tuple | ast.Set):
            parts = [node]
        within = [leaf for part in parts if part is not None for leaf in ast.walk(part)]
        if any(isinstance(leaf, ast.Constant) and leaf.value in names for leaf in within):
            yield node.lineno


def test_no_name_of_a_rule_decides_anything_outside_of_the_rules() -> None:
    assert list(rule_names_that_decide('rule == "angle"; rule in ("warmup", x); {"uniform": 1}; f("angle")'))
    for file in Path(elropt.__file__).parent.glob("*.py"):
        if file.name != "rules.py":
            assert not list(rule_names_that_decide(file.read_text())), file.name
