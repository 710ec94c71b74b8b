"""The angle between a weight before and after a step, measured from the two in float64: what ``elr_of="update"`` and
the rule "equilibrium" set, whatever the momentum."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elropt import ELRSGD, dynamics, effective_lrs, param_groups

from .every_rule import FORMS, skip_without_kernels
from .nets import backward, bn_mlp, invariant_weights
from .test_contract import BACKENDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(6, 5), (4, 3, 3, 3), (3, 8)]
GRAD_SCALES = (30.0, 1.0, 0.1)
MOMENTA: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.8, "dampening": 0.3, "maximize": True},
]
FORMS_OF_UPDATE = [(rule, granularity) for rule, granularity, elr_of in FORMS if elr_of == "update"]
every_form = pytest.mark.parametrize(("rule", "granularity"), FORMS_OF_UPDATE, ids=str)
every_momentum = pytest.mark.parametrize("momentum", MOMENTA, ids=str)


def rows_of(tensors: list[Tensor], granularity: str) -> list[Tensor]:
    """What one norm is taken over, as vectors in float64."""
    flat = [t.detach().to("cpu", torch.float64, copy=True).flatten(1) for t in tensors]
    if granularity == "network":
        return [torch.cat([t.flatten() for t in flat])]
    return [row for t in flat for row in (t if granularity == "filter" else [t.flatten()])]


def angles_between(before: list[Tensor], after: list[Tensor]) -> np.ndarray:
    """Of each pair, exact for small ones too (Kahan)."""
    units = [(v / v.norm(), w / w.norm()) for v, w in zip(before, after, strict=True)]
    return np.array([2 * math.atan2((a - b).norm(), (a + b).norm()) for a, b in units])


class Problem:
    """Weights of different sizes, and gradients that are orthogonal to each filter, differ from layer to layer by
    orders of magnitude, and agree in part from step to step, so that momentum adds up to something else in each."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.params = [
            nn.Parameter((self.random(shape) * 3**i).to(dtype).to(DEVICE)) for i, shape in enumerate(SHAPES)
        ]
        self.drift = [self.random(shape) for shape in SHAPES]
        self.group = {"params": self.params, "scale_invariant": True}

    def random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def set_gradients(self) -> None:
        for i, (p, drift, scale) in enumerate(zip(self.params, self.drift, GRAD_SCALES, strict=True)):
            w = p.detach().double().cpu().flatten(1)
            g = (self.random(p.shape) + i * drift).flatten(1) * scale / w.norm()
            g -= w * ((w * g).sum(1) / (w * w).sum(1))[:, None]
            p.grad = g.view_as(p).to(p)


def sgd_steps(optimizer: ELRSGD, params: list[nn.Parameter], **options: Any) -> list[Tensor]:
    """Where torch's SGD would take the weights from here, with the same momentum, in float64."""
    twins = [nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in params]
    sgd = torch.optim.SGD(twins, **options)
    for p, q in zip(params, twins, strict=True):
        assert p.grad is not None
        q.grad = p.grad.double()
        if "momentum_buffer" in optimizer.state[p]:
            sgd.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].double().clone()
    sgd.step()
    return [q.detach() for q in twins]


def coefficients(
    momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, **_: object
) -> np.ndarray:
    """What torch's SGD multiplies a gradient by in the updates of the steps that follow, asked of torch itself."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    sgd = torch.optim.SGD([w], lr=1.0, momentum=momentum, dampening=dampening, nesterov=nesterov)
    w.grad = torch.zeros_like(w)
    sgd.step()  # its first step is not dampened
    positions = []
    for step in range(400):
        w.grad = torch.full_like(w, -1.0 if step == 0 else 0.0)
        sgd.step()
        positions.append(w.item())
    return np.diff(positions, prepend=0.0)


def settled_angle(lr: float, weight_decay: float, momentum: dict[str, Any]) -> float:
    """√(2λω·Σk²/Σk), k the `coefficients`: 2λω/(1+μ) without Nesterov momentum."""
    k = coefficients(**momentum)
    return math.sqrt(2 * lr * weight_decay * (k**2).sum() / k.sum())


@every_form
@pytest.mark.parametrize(
    ("backend", "dtype", "steps", "momentum"),
    [
        *[("reference", torch.float64, 10, momentum) for momentum in MOMENTA],
        *[("foreach", torch.float32, 10, momentum) for momentum in MOMENTA],
        ("triton", torch.float32, 3, MOMENTA[2]),  # its interpreter takes long
    ],
    ids=str,
)
def test_the_angle_is_exact_at_every_step(
    backend: str, dtype: torch.dtype, rule: str, granularity: str, steps: int, momentum: dict[str, Any]
) -> None:
    skip_without_kernels(BACKENDS[backend], rule, "update")
    lr, weight_decay = (0.3, 1e-3) if rule == "uniform" else (0.02, 0.05)
    problem = Problem(dtype)
    hyper = {"lr": lr, "weight_decay": weight_decay, **momentum}
    optimizer = ELRSGD(
        [problem.group], rule=rule, granularity=granularity, elr_of="update", **hyper, **BACKENDS[backend]
    )
    start = rows_of(problem.params, granularity)
    expected = {"angle": lr, "equilibrium": settled_angle(lr, weight_decay, momentum)}
    for _ in range(steps):
        before = rows_of(problem.params, granularity)
        problem.set_gradients()
        plain = rows_of(sgd_steps(optimizer, problem.params, **hyper), granularity)
        optimizer.step()
        after = rows_of(problem.params, granularity)
        turned = angles_between(before, after)
        if rule == "uniform":
            np.testing.assert_allclose(turned, turned.mean(), rtol=1e-5)
            of_sgd = angles_between(before, plain)
            assert of_sgd.max() > 5 * of_sgd.min()
            np.testing.assert_allclose(np.tan(turned), np.exp(np.log(np.tan(of_sgd)).mean()), rtol=1e-4)
            for w, new, of_plain in zip(before, after, plain, strict=True):  # the radial part is SGD's
                torch.testing.assert_close(w @ new, w @ of_plain, rtol=1e-6, atol=0)
        else:
            np.testing.assert_allclose(turned, expected[rule], rtol=1e-5)
            for w, new in zip(start, after, strict=True):
                torch.testing.assert_close(new.norm(), w.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["uniform", "angle", "equilibrium"])
def test_every_group_has_its_own_angle(rule: str, backend: str) -> None:
    """Those of "uniform" are in proportion to lr; a group that is not tracked is torch's SGD."""
    skip_without_kernels(BACKENDS[backend], rule, "update")
    problem = Problem(torch.float32)
    hypers: list[dict[str, Any]] = [
        {"lr": 0.02, "weight_decay": 0.05, "momentum": 0.9},
        {"lr": 0.05, "weight_decay": 0.01, "momentum": 0.5, "nesterov": True},
        {"lr": 0.01, "weight_decay": 0.02},
    ]
    other = nn.Parameter(problem.random((5,)).float().to(DEVICE))
    plain = nn.Parameter(other.detach().clone())
    groups = [
        {"params": [p], "scale_invariant": True, **hyper}
        for p, hyper in zip(problem.params, hypers, strict=True)
    ]
    groups += [{"params": [other], "scale_invariant": False, "weight_decay": 0.01, "momentum": 0.9}]
    protect = False if rule == "equilibrium" else None
    optimizer = ELRSGD(groups, lr=0.1, rule=rule, elr_of="update", protect=protect, **BACKENDS[backend])
    settled = [settled_angle(h["lr"], h["weight_decay"], {**h, "lr": 0}) for h in hypers]
    sgd = torch.optim.SGD([plain], lr=0.1, weight_decay=0.01, momentum=0.9)
    lrs = np.array([hyper["lr"] for hyper in hypers])
    for _ in range(4):
        before = rows_of(problem.params, "layer")
        problem.set_gradients()
        other.grad = problem.random((5,)).to(other)
        plain.grad = other.grad.clone()
        of_sgd = [
            sgd_steps(optimizer, [p], **hyper)[0] for p, hyper in zip(problem.params, hypers, strict=True)
        ]
        optimizer.step()
        sgd.step()
        turned = angles_between(before, rows_of(problem.params, "layer"))
        if rule == "uniform":
            per_lr = np.tan(angles_between(before, rows_of(of_sgd, "layer"))) / lrs
            np.testing.assert_allclose(np.tan(turned), lrs * np.exp(np.log(per_lr).mean()), rtol=1e-3)
        else:
            np.testing.assert_allclose(turned, lrs if rule == "angle" else settled, rtol=1e-5)
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(("lr", "weight_decay"), [(0.1, 5e-4), (1.0, 1e-4), (0.01, 0.05)])
def test_equilibrium_turns_as_the_model_settles(lr: float, weight_decay: float, momentum: float) -> None:
    """To first order in λω, of which theory knows the rest: cos φ = 1 − λω/(1+μ)."""
    problem = Problem()
    optimizer = ELRSGD(
        [problem.group], lr=lr, weight_decay=weight_decay, momentum=momentum, rule="equilibrium"
    )
    for _ in range(3):
        before = rows_of(problem.params, "layer")
        problem.set_gradients()
        optimizer.step()
        turned = angles_between(before, rows_of(problem.params, "layer"))
    np.testing.assert_allclose(turned, dynamics.equilibrium_angle(lr, weight_decay, momentum), rtol=1e-4)


def angles_with_independent_gradients(
    make: Any, momentum: dict[str, Any], steps: int, lr: float, weight_decay: float
) -> np.ndarray:
    """Of a layer with ‖g‖ = 1/‖w‖ that starts near the norm at which SGD settles; the last half of the run."""
    generator = torch.Generator().manual_seed(0)
    norm_sq = math.sqrt(lr * float(coefficients(**momentum).sum()) / (2 * weight_decay))
    w = nn.Parameter(torch.randn(40, 20, generator=generator, dtype=torch.float64))
    w.data *= math.sqrt(norm_sq) / w.data.norm()
    optimizer = make([{"params": [w]}], lr=lr, weight_decay=weight_decay, **momentum)
    turned = []
    for _ in range(steps):
        v = w.detach().clone()
        g = torch.randn(v.shape, generator=generator, dtype=torch.float64)
        g -= v * (g * v).sum() / v.square().sum()
        w.grad = g / (g.norm() * v.norm())
        optimizer.step()
        turned.append(angles_between([v.flatten()], [w.detach().flatten()])[0])
    return np.array(turned[steps // 2 :])


@every_momentum
def test_sgd_settles_at_the_angle_that_equilibrium_gives_at_once(momentum: dict[str, Any]) -> None:
    """Also where the gradient is what is controlled: then the angle fluctuates about it."""
    lr, weight_decay = 0.1, 0.02
    expected = settled_angle(lr, weight_decay, momentum)
    of_sgd = angles_with_independent_gradients(torch.optim.SGD, momentum, 1200, lr, weight_decay)
    assert np.sqrt((of_sgd**2).mean()) == pytest.approx(expected, rel=0.02)

    def rule_on(elr_of: str) -> Any:
        def make(groups: list[dict[str, Any]], **options: Any) -> ELRSGD:
            groups = [{**group, "scale_invariant": True} for group in groups]
            return ELRSGD(groups, rule="equilibrium", elr_of=elr_of, **options)

        return make

    of_gradient = angles_with_independent_gradients(rule_on("gradient"), momentum, 200, lr, weight_decay)
    assert np.sqrt((of_gradient**2).mean()) == pytest.approx(expected, rel=0.03)
    of_update = angles_with_independent_gradients(rule_on("update"), momentum, 6, lr, weight_decay)
    np.testing.assert_allclose(of_update, expected, rtol=1e-5)


@pytest.mark.parametrize("μ", [0.3, 0.9])
def test_the_formula_for_nesterov_momentum(μ: float) -> None:
    """φ² = 2λω(1−μ)·((1+μ)² + μ⁴/(1−μ²))."""
    of_update = (1 - μ) * ((1 + μ) ** 2 + μ**4 / (1 - μ**2))
    momentum = {"momentum": μ, "nesterov": True}
    assert settled_angle(0.1, 0.02, momentum) == pytest.approx(math.sqrt(2 * 0.1 * 0.02 * of_update))


@every_form
@pytest.mark.parametrize("foreach", [False, True])
def test_tensors_as_lr_and_weight_decay(rule: str, granularity: str, foreach: bool) -> None:
    """As floats, and a value that is changed in place holds from the next step on."""
    results = []
    for kind in (float, lambda value: torch.tensor(value, dtype=torch.float64)):
        problem = Problem()
        optimizer = ELRSGD(
            [problem.group],
            lr=kind(0.02), weight_decay=kind(0.05), momentum=0.9,
            rule=rule, granularity=granularity, elr_of="update", foreach=foreach,
        )  # fmt: skip
        turned = []
        for step in range(4):
            if step == 2:
                group = optimizer.param_groups[0]
                for key, value in (("lr", 0.04), ("weight_decay", 0.2)):
                    if isinstance(group[key], Tensor):
                        group[key].fill_(value)
                    else:
                        group[key] = value
            before = rows_of(problem.params, granularity)
            problem.set_gradients()
            optimizer.step()
            turned.append(angles_between(before, rows_of(problem.params, granularity)))
        results.append((turned, problem.params))
    (turned, params), (with_tensors, others) = results
    np.testing.assert_allclose(np.array(with_tensors), np.array(turned), rtol=1e-5)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
    if rule == "equilibrium":
        np.testing.assert_allclose(turned[2], math.sqrt(8) * turned[1], rtol=1e-5)


@every_form
def test_a_layer_without_a_gradient_stays_as_it_is(rule: str, granularity: str) -> None:
    """And the others turn as if it did not exist."""
    problem, alone = Problem(), Problem()
    options = {"lr": 0.02, "weight_decay": 0.05, "momentum": 0.9, "rule": rule, "granularity": granularity}
    optimizer = ELRSGD([problem.group], elr_of="update", **options)
    other = ELRSGD([{"params": alone.params[::2], "scale_invariant": True}], elr_of="update", **options)
    still = problem.params[1]
    before = still.detach().clone()
    for _ in range(3):
        problem.set_gradients()
        still.grad = None
        for p, q in zip(problem.params[::2], alone.params[::2], strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        other.step()
    assert torch.equal(still, before)
    for p, q in zip(problem.params[::2], alone.params[::2], strict=True):
        assert torch.equal(p, q)
    problem.set_gradients()
    optimizer.step()
    assert not torch.equal(still, before)


@every_form
@pytest.mark.parametrize(
    ("backend", "gradient"),
    [
        ("reference", 0.0),
        ("reference", 1e-30),
        ("reference", 1e30),
        *((b, 0.0) for b in ("foreach", "triton")),
    ],
)
def test_a_gradient_of_no_use_lets_a_layer_rest(
    backend: str, gradient: float, rule: str, granularity: str
) -> None:
    """Its momentum alone would turn it on by the whole angle. Under "uniform", where lr is SGD's, it is SGD's step."""
    skip_without_kernels(BACKENDS[backend], rule, "update")
    problem, hyper = Problem(torch.float32), {"lr": 0.02, "weight_decay": 0.05, "momentum": 0.9}
    options = {"granularity": granularity, "elr_of": "update", **BACKENDS[backend]}
    optimizer = ELRSGD([problem.group], rule=rule, **options, **hyper)
    for _ in range(2):
        problem.set_gradients()
        optimizer.step()
    problem.set_gradients()
    hit, others = problem.params[1], [problem.params[0], problem.params[2]]
    assert hit.grad is not None
    hit.grad.sign_().mul_(gradient)
    before, momentum = rows_of(others, granularity), optimizer.state[hit]["momentum_buffer"].double()
    was = hit.detach().double()
    optimizer.step()
    decays = 0.05 * was if rule == "uniform" else 0  # where the norm is kept there is no decay to add up
    torch.testing.assert_close(
        optimizer.state[hit]["momentum_buffer"].double(), 0.9 * momentum + decays, rtol=1e-5, atol=1e-6
    )
    plain = was - 0.02 * (0.9 * momentum + 0.05 * was)
    torch.testing.assert_close(hit.double(), plain if rule == "uniform" else was, rtol=1e-6, atol=1e-6)
    turned = angles_between(before, rows_of(others, granularity))
    if rule != "uniform":
        angle = 0.02 if rule == "angle" else settled_angle(0.02, 0.05, {"momentum": 0.9})
        np.testing.assert_allclose(turned, angle, rtol=1e-5)
    np.testing.assert_allclose(turned, turned.mean(), rtol=1e-3)


@every_form
def test_a_zero_learning_rate_turns_nothing(rule: str, granularity: str) -> None:
    problem = Problem()
    optimizer = ELRSGD(
        [problem.group],
        lr=0.02, weight_decay=0.05, momentum=0.9, rule=rule, granularity=granularity, elr_of="update",
    )  # fmt: skip
    for lr in (0.0, 0.02, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        before = [p.detach().clone() for p in problem.params]
        problem.set_gradients()
        optimizer.step()
        for p, w in zip(problem.params, before, strict=True):
            assert torch.allclose(p, w, rtol=1e-6, atol=0) == (lr == 0)


@every_form
def test_an_update_without_tangential_part_turns_nothing(rule: str, granularity: str) -> None:
    """Gradients of zero, without and with a momentum that only pulls along the weight."""
    for momentum in (0.0, 0.9):
        problem = Problem()
        optimizer = ELRSGD(
            [problem.group],
            lr=0.02, weight_decay=0.05, momentum=momentum, rule=rule, granularity=granularity, elr_of="update",
        )  # fmt: skip
        for _ in range(3):
            for p in problem.params:
                p.grad = torch.zeros_like(p)
            before = rows_of(problem.params, granularity)
            optimizer.step()
            np.testing.assert_array_less(angles_between(before, rows_of(problem.params, granularity)), 1e-7)


@pytest.mark.parametrize("rule", ["uniform", "angle", "equilibrium"])
def test_what_rounding_leaves_of_a_radial_update_gives_no_direction(rule: str) -> None:
    problem = Problem(torch.float32)
    optimizer = ELRSGD(
        [problem.group], lr=0.02, weight_decay=1e-3, rule=rule, granularity="filter", elr_of="update"
    )
    for _ in range(3):
        for p in problem.params:
            p.grad = 3 * p.detach()
        before = rows_of(problem.params, "filter")
        optimizer.step()
        np.testing.assert_array_less(angles_between(before, rows_of(problem.params, "filter")), 1e-6)


@pytest.mark.parametrize("foreach", [False, True])
def test_all_layers_together_turn_by_the_largest_angle_of_a_group(foreach: bool) -> None:
    problem = Problem()
    groups = [
        {"params": [p], "scale_invariant": True, "lr": lr}
        for p, lr in zip(problem.params, (0.01, 0.03, 0.02), strict=True)
    ]
    options = {"rule": "angle", "granularity": "network", "elr_of": "update", "foreach": foreach}
    optimizer = ELRSGD(groups, momentum=0.9, **options)
    for _ in range(3):
        before = rows_of(problem.params, "network")
        problem.set_gradients()
        optimizer.step()
        turned = angles_between(before, rows_of(problem.params, "network"))
        np.testing.assert_allclose(turned, 0.03, rtol=1e-5)


def training(
    rule: str, granularity: str, net: nn.Sequential | None = None, **options: Any
) -> tuple[nn.Sequential, ELRSGD]:
    """With groups that say which weights are tracked."""
    net = bn_mlp(depth=3) if net is None else net
    groups = param_groups(net, torch.randn(16, 8), weight_decay=5e-3)
    hyper = {"lr": 0.05, "momentum": 0.9, "rule": rule, "granularity": granularity}
    return net, ELRSGD(groups, **{**hyper, "elr_of": "update", **options})


@every_form
@pytest.mark.parametrize("bare", [False, True])
def test_layers_of_a_real_net_turn_by_it(rule: str, granularity: str, bare: bool) -> None:
    """Which are invariant but for the ε of their normalization, and whose bare weights decay inside the momentum."""
    net, optimizer = training(rule, granularity)
    if bare:
        options = {k: optimizer.param_groups[0][k] for k in optimizer.defaults}
        optimizer = ELRSGD(net.parameters(), **options)
    weights = invariant_weights(net)
    for step in range(12):
        before = rows_of(weights, granularity)
        backward(net, step)
        optimizer.step()
        turned = angles_between(before, rows_of(weights, granularity))
        expected = {"angle": 0.05, "equilibrium": math.sqrt(2 * 0.05 * 5e-3 / 1.9), "uniform": turned.mean()}
        np.testing.assert_allclose(turned, expected[rule], rtol=1e-4)


@pytest.mark.parametrize("rule", ["angle", "equilibrium"])
def test_filters_that_are_not_invariant_one_by_one_turn_by_it(rule: str) -> None:
    """Layer normalization makes a weight invariant as a whole: gradients of its rows have radial parts."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    _, optimizer = training(rule, "filter", net)
    start = rows_of([net[0].weight], "filter")
    expected = 0.05 if rule == "angle" else math.sqrt(2 * 0.05 * 5e-3 / 1.9)
    for step in range(5):
        before = rows_of([net[0].weight], "filter")
        backward(net, step)
        optimizer.step()
        after = rows_of([net[0].weight], "filter")
        np.testing.assert_allclose(angles_between(before, after), expected, rtol=1e-4)
        for w, new in zip(start, after, strict=True):
            torch.testing.assert_close(new.norm(), w.norm(), rtol=1e-6, atol=0)


def test_what_is_controlled_may_change_between_steps() -> None:
    problem = Problem()
    optimizer = ELRSGD([problem.group], lr=0.02, momentum=0.9, rule="angle")
    start = rows_of(problem.params, "layer")
    for elr_of in ("gradient", "update", "gradient", "update"):
        optimizer.param_groups[0]["elr_of"] = elr_of
        for _ in range(2):
            before = rows_of(problem.params, "layer")
            problem.set_gradients()
            optimizer.step()
        after = rows_of(problem.params, "layer")
        turned = angles_between(before, after)
        if elr_of == "update":
            np.testing.assert_allclose(turned, 0.02, rtol=1e-5)
            for w, new in zip(start, after, strict=True):
                torch.testing.assert_close(new.norm(), w.norm(), rtol=1e-6, atol=0)
        else:
            assert turned.max() > 1.2 * turned.min()


@every_form
def test_a_run_goes_on_bit_for_bit_after_a_load(rule: str, granularity: str) -> None:
    net, optimizer = training(rule, granularity, nesterov=True)
    for step in range(3):
        backward(net, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, resumed = training(rule, granularity, nesterov=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for n, o in ((net, optimizer), (other, resumed)):
        for step in range(3, 6):
            backward(n, step)
            o.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("here", [None, "gradient", "update"])
def test_a_state_of_before_elr_of_is_of_the_gradient(here: str | None) -> None:
    net, optimizer = training("angle", "layer", elr_of=None)
    backward(net, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["elr_of"], group["protect"]
    other, resumed = training("angle", "layer", elr_of=here)
    other.load_state_dict(net.state_dict())
    if here == "update":
        with pytest.warns(UserWarning, match="elr_of=None in place of elr_of='update'"):
            resumed.load_state_dict(saved)
    else:
        resumed.load_state_dict(saved)
    for n, o in ((net, optimizer), (other, resumed)):
        backward(n, 1)
        o.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "equilibrium"}, "weight_decay=0 has no such angle: give weight_decay=5e-4"),
        ({"rule": "equilibrium", "weight_decay": 1e-3, "momentum": 0.5, "dampening": 1.0}, "dampening=1.0.*below 1"),
        ({"rule": "equilibrium", "weight_decay": 1e-3, "project": True}, "project=True goes without saying"),
        ({"rule": "angle", "elr_of": "update", "project": True}, "project=True goes without saying.*'gradient'"),
        ({"rule": "sphere", "elr_of": "update"}, "elr_of='update' has no meaning for .*'uniform', 'angle'"),
        ({"rule": "warmup", "elr_of": "gradient"}, "elr_of='gradient' has no meaning for rule='warmup'"),
        ({"rule": None, "elr_of": "update"}, "elr_of='update' has no meaning for rule=None"),
        ({"rule": "angle", "elr_of": "momentum"}, "elr_of='momentum' is not valid: choose 'gradient', 'update'"),
        ({"rule": "equilibrium", "weight_decay": 1e-3, "protect": 0.1}, "protect=0.1 is not valid"),
        ({"rule": "angle", "protect": True}, "protect=True has no meaning for rule='angle'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    """At once, in a group that is added, and at the next step; there nothing moves."""
    w = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=message):
        ELRSGD([w], lr=0.1, **options)
    optimizer = ELRSGD([w], lr=0.1, rule=None)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], **options})
    optimizer.param_groups[0].update(options)
    w.grad = torch.ones_like(w)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(w, torch.ones_like(w))


def test_equilibrium_without_decay_is_fine_where_nothing_is_tracked() -> None:
    """As in the groups of parameters without decay that `param_groups` makes."""
    net, _ = training("angle", "layer")
    groups = param_groups(net, torch.randn(16, 8), weight_decay=1e-3)
    assert {group["weight_decay"] for group in groups} == {0.0, 1e-3}
    optimizer = ELRSGD(groups, lr=0.05, rule="equilibrium")
    backward(net, 0)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in net.parameters())


@every_form
def test_a_scaled_loss_gives_the_same_steps(rule: str, granularity: str) -> None:
    """torch.amp.GradScaler: a scale of a power of 2 changes no bit, and a step with an overflow is left out."""
    results = []
    for scaled in (False, True):
        net, optimizer = training(rule, granularity)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled, growth_interval=100)
        for step in range(5):
            scaler.scale(torch.ones(()))
            backward(net, step, scale=scaler.get_scale())
            if step == 3:
                if not scaled:
                    continue
                before = copy.deepcopy((list(net.parameters()), optimizer.state_dict()["state"]))
                next(net.parameters()).grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
            if step == 3:
                assert all(map(torch.equal, net.parameters(), before[0]))
                assert str(optimizer.state_dict()["state"]) == str(before[1])
        results.append(list(net.parameters()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_report_after_an_overflow_is_of_the_unscaled_gradients(backend: str) -> None:
    """Which torch.amp.GradScaler leaves scaled where it lets the optimizer skip the step."""
    skip_without_kernels(BACKENDS[backend], "uniform", "update")
    elrs = []
    for scale in (1.0, 1024.0):
        problem = Problem(torch.float32)
        optimizer = ELRSGD(
            [problem.group], lr=0.1, momentum=0.9, rule="uniform", elr_of="update", **BACKENDS[backend]
        )
        for step in range(3):
            problem.set_gradients()
            if step == 2:
                for p in problem.params:
                    assert p.grad is not None
                    p.grad *= scale
                optimizer.grad_scale = torch.tensor(scale, device=DEVICE)  # type: ignore[attr-defined]
                optimizer.found_inf = torch.tensor(1.0, device=DEVICE)  # type: ignore[attr-defined]
            optimizer.step()
        elrs.append(list(effective_lrs(optimizer).values()))
    np.testing.assert_allclose(elrs[1], elrs[0], rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from([form for form in FORMS_OF_UPDATE if form[0] != "uniform"]),
    lr=st.floats(1e-3, 0.5),
    weight_decay=st.floats(1e-3, 0.2),
    momentum=st.sampled_from(MOMENTA),
    sizes=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=2),
    seed=st.integers(0, 1000),
)
def test_any_size_of_weights_and_gradients(
    form: tuple[str, str],
    lr: float,
    weight_decay: float,
    momentum: dict[str, Any],
    sizes: list[float],
    seed: int,
) -> None:
    rule, granularity = form
    problem = Problem(torch.float32, seed)
    for p in problem.params:
        p.data *= sizes[0]
    optimizer = ELRSGD(
        [problem.group],
        lr=lr, weight_decay=weight_decay, rule=rule, granularity=granularity, elr_of="update", **momentum,
    )  # fmt: skip
    expected = lr if rule == "angle" else settled_angle(lr, weight_decay, momentum)
    for _ in range(4):
        before = rows_of(problem.params, granularity)
        problem.set_gradients()
        for p in problem.params:
            p.grad *= sizes[1]
        optimizer.step()
        turned = angles_between(before, rows_of(problem.params, granularity))
        np.testing.assert_allclose(turned, expected, rtol=1e-3)
