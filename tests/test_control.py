"""`elropt.control` against the same base optimizer without it, in float64, and against Hyperball."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import elropt
from elropt import ELRSGD, kernels
from elropt.controller import RADIUS, control
from tests.nets import backward, bn_mlp, invariant_weights, train
from tests.test_host_reads import no_host_reads
from tests.test_step_watch import heavyball, pytorch_optimizer

Make = Callable[..., torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "AdamW": lambda groups, **kw: torch.optim.AdamW(groups, weight_decay=0.1, **kw),
    "Muon": lambda groups, **kw: torch.optim.Muon(groups, **kw),
    "SGD": lambda groups, **kw: torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4, nesterov=True, **kw),
    "Adafactor": lambda groups, **kw: torch.optim.Adafactor(groups, **kw),
    "ELRSGD": lambda groups, **kw: ELRSGD(groups, momentum=0.9, rule=None, **kw),
}


def groups_of(net: nn.Sequential, lr: float | Tensor = 0.01, others: bool = True) -> list[dict[str, Any]]:
    tracked = invariant_weights(net)
    rest = [p for p in net.parameters() if all(p is not w for w in tracked)]
    groups = [{"params": tracked, "lr": lr, "scale_invariant": True}]
    return [*groups, {"params": rest, "lr": 3e-3, "scale_invariant": False}] if others else groups


def controlled(
    base: str = "AdamW", lr: float | Tensor = 0.01, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    net = bn_mlp(3, dtype=dtype)
    optimizer = BASES[base](groups_of(net, lr, others=base != "Muon"))
    control(optimizer, **options)
    return net, optimizer


def rows(t: Tensor, granularity: str) -> Tensor:
    t = t.detach().double()
    return t.flatten(1) if granularity == "filter" else t.reshape(1, -1)


def angles(before: Tensor, after: Tensor, granularity: str = "layer") -> Tensor:
    """Between the rows of two tensors; accurate also where they are small."""
    a, b = (rows(t, granularity) for t in (before, after))
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def turned(w: Tensor, change: Tensor, angle: Tensor | float, radius: Tensor) -> Tensor:
    """The definition, by row, in float64."""
    unit = w / w.norm(dim=1, keepdim=True)
    tangent = change - (unit * change).sum(1, keepdim=True) * unit
    tangent = tangent / tangent.norm(dim=1, keepdim=True)
    angle = torch.as_tensor(angle, dtype=torch.float64).reshape(-1, 1)
    return radius * (angle.cos() * unit + angle.sin() * tangent)


@pytest.mark.parametrize("granularity", ["layer", "filter", "network"])
@pytest.mark.parametrize("base", BASES)
def test_angle_is_the_definition_and_the_rest_is_the_base(base: str, granularity: str) -> None:
    """Each step from the same weights, without control and in float64: the same direction, the length of the rule."""
    lr = 0.02
    net, optimizer = controlled(base, lr, granularity=granularity)
    twin = bn_mlp(3)
    plain = BASES[base](groups_of(twin, lr, others=base != "Muon"))
    tracked, of_twin = invariant_weights(net), invariant_weights(twin)
    first = [rows(w, granularity) for w in tracked]
    radii = [w.norm(dim=1, keepdim=True) for w in first]
    whole_radius = torch.cat(first, 1).norm(dim=1, keepdim=True) if granularity == "network" else None
    for step in range(4):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.data.copy_(p)
        for a, b in zip(net.buffers(), twin.buffers(), strict=True):
            b.copy_(a)
        before = [rows(w, granularity) for w in tracked]
        backward(net, step)
        backward(twin, step)
        optimizer.step()
        plain.step()
        after = [rows(w, granularity) for w in tracked]
        changes = [rows(w, granularity) - b for w, b in zip(of_twin, before, strict=True)]
        if whole_radius is not None:
            whole = (torch.cat(ts, 1) for ts in (before, changes))
            want = list(turned(*whole, lr, whole_radius).split([w.numel() for w in tracked], 1))
        else:
            want = [turned(w, d, lr, r) for w, d, r in zip(before, changes, radii, strict=True)]
        for a, b in zip(after, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        others = [
            (p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True) if p not in set(tracked)
        ]
        assert all(torch.equal(p, q) for p, q in others)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            held = {key: value for key, value in optimizer.state.get(p, {}).items() if key != RADIUS}
            assert str(held) == str(plain.state.get(q, {}))


@pytest.mark.parametrize("granularity", ["layer", "filter"])
def test_uniform_is_the_geometric_mean_of_what_the_base_would_turn(granularity: str) -> None:
    net, optimizer = controlled("SGD", 0.1, rule="uniform", granularity=granularity)
    twin = copy.deepcopy(net)
    plain = BASES["SGD"](groups_of(twin, 0.1))
    before = [w.detach().clone() for w in invariant_weights(net)]
    for n, o in ((net, optimizer), (twin, plain)):
        train(n, o, range(1))
    own = torch.cat([angles(a, b, granularity) for a, b in zip(before, invariant_weights(twin), strict=True)])
    got = torch.cat([angles(a, b, granularity) for a, b in zip(before, invariant_weights(net), strict=True)])
    assert own.max() > 1.2 * own.min()
    torch.testing.assert_close(got, own.log().mean().exp().expand_as(got), rtol=2e-5, atol=0)
    for a, b in zip(before, invariant_weights(net), strict=True):
        torch.testing.assert_close(
            rows(b, granularity).norm(dim=1), rows(a, granularity).norm(dim=1), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("base", ["AdamW", "SGD"])
@pytest.mark.parametrize(("lr", "accuracy"), [(1e-5, 2e-3), (1e-3, 2e-5), (0.1, 2e-6)])
def test_angle_is_exact_also_if_it_is_small(base: str, lr: float, accuracy: float) -> None:
    """At 1e-5 the rounding of float32 weights shows, as it would if they were computed exactly and rounded once."""
    net, optimizer = controlled(base, lr)
    for step in range(3):
        before = [w.detach().clone() for w in invariant_weights(net)]
        train(net, optimizer, range(step, step + 1))
        for a, b in zip(before, invariant_weights(net), strict=True):
            assert float(angles(a, b)) == pytest.approx(lr, rel=accuracy)


@settings(deadline=None, max_examples=200)
@given(st.floats(1e-6, 1.5), st.floats(-0.999, 0.999), st.integers(2, 9), st.floats(1e-3, 1e3))
def test_hyperball_is_a_turn_by_this_angle(angle: float, cosine: float, n: int, radius: float) -> None:
    """W ← R·normalize(W − η·R·normalize(u)) in float64, for every u; η = tan φ if u is tangential."""
    generator = torch.Generator().manual_seed(n)
    w, other = torch.randn(2, n, generator=generator, dtype=torch.float64)
    w *= radius / w.norm()
    tangent = other - (w @ other) / (w @ w) * w
    sine = math.sqrt(1 - cosine**2)
    u = cosine * w / radius + sine * tangent / tangent.norm()
    denominator = sine * math.cos(angle) + cosine * math.sin(angle)
    if denominator <= 1e-3:  # η → ∞ turns w to −u: no η turns it further
        return
    η = math.sin(angle) / denominator
    hyperball = w - η * radius * u
    hyperball *= radius / hyperball.norm()
    want = turned(w[None], -u[None], angle, torch.tensor(radius, dtype=torch.float64))[0]
    torch.testing.assert_close(hyperball, want, rtol=1e-9, atol=1e-9 * radius)
    assert math.atan2(η * sine, 1 - η * cosine) == pytest.approx(angle, rel=1e-9)


@settings(deadline=None, max_examples=100)
@given(
    st.floats(1e-6, 1.5),
    st.integers(-6, 6),
    st.integers(-6, 6),
    st.floats(-30, 1),
    st.integers(0, 99),
    st.booleans(),
)
def test_any_change_of_any_weight(
    angle: float, weight: int, length: int, radial: float, seed: int, per_filter: bool
) -> None:
    """`radial`: the part of the change along the weight over the part across it."""
    generator = torch.Generator().manual_seed(seed)
    w, other = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    w *= 10.0**weight
    granularity = "filter" if per_filter else "layer"
    flat = rows(w, granularity)
    unit = flat / flat.norm(dim=1, keepdim=True)
    across = rows(other, granularity)
    across -= (across * unit).sum(1, keepdim=True) * unit
    across /= across.norm(dim=1, keepdim=True)
    change = 10.0**length * (across + radial * unit)
    p = nn.Parameter(w.clone())
    optimizer = torch.optim.SGD([{"params": [p], "scale_invariant": True}], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        control(optimizer, granularity=granularity)
        optimizer.param_groups[0]["lr"] = angle
        p.grad = -change.reshape(w.shape) / angle
        optimizer.step()
    change = rows(w.add(p.grad, alpha=-angle) - w, granularity)  # as the base stores it, rounded
    radius = flat.norm(dim=1, keepdim=True)
    error = (rows(p, granularity) - turned(flat, change, angle, radius)).norm(dim=1) / radius.squeeze(1)
    assert float(error.max()) < 1e-6 + 1e-6 * radial**2 * angle


def test_control_of_adamw_is_adamh() -> None:
    """Several steps of Hyperball around Adam, written out in float64."""
    φ, β1, β2, eps = 0.03, 0.9, 0.999, 1e-8
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    p = nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "scale_invariant": True}], lr=φ, betas=(β1, β2), eps=eps, weight_decay=0.1
    )
    control(optimizer)
    R, m, v = w.norm(), torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 8):
        g = torch.randn(5, 7, generator=generator, dtype=torch.float64) + 0.3 * w
        m, v = β1 * m + (1 - β1) * g, β2 * v + (1 - β2) * g * g
        u = (m / (1 - β1**t)) / ((v / (1 - β2**t)).sqrt() + eps)
        ρ = float((w * u).sum() / (w.norm() * u.norm()))
        η = math.sin(φ) / (math.sqrt(1 - ρ**2) * math.cos(φ) + ρ * math.sin(φ))
        w = w - η * R * u / u.norm()
        w = R * w / w.norm()
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-6)


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


def test_a_skipped_step_leaves_all_bits() -> None:
    """As torch.amp.GradScaler tells fused optimizers: found_inf; −0.0 stays −0.0."""
    w = nn.Parameter(torch.randn(6, 4))
    w.data[0, 0] = -0.0
    optimizer: Any = torch.optim.AdamW([{"params": [w], "scale_invariant": True}], lr=0.01, fused=True)
    control(optimizer)
    for found_inf in (1.0, 0.0, 1.0):
        before = w.detach().clone()
        w.grad = torch.full_like(w, math.inf) if found_inf else torch.randn_like(w)
        w.data[0, 0] = before[0, 0] = -0.0
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found_inf)
        optimizer.step()
        assert same_bits(w, before) == bool(found_inf)
    assert float(optimizer.state[w][RADIUS]) > 0


def test_no_gradient_or_a_radial_step_leaves_all_bits() -> None:
    frozen, decayed, late = (nn.Parameter(torch.randn(30, 20)) for _ in range(3))
    groups = [{"params": [frozen, decayed, late], "scale_invariant": True}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    control(optimizer)
    before = weights_of(optimizer)
    for step in range(4):
        decayed.grad = torch.zeros_like(decayed)
        late.grad = torch.randn_like(late) if step == 3 else None
        optimizer.step()
        assert same_bits(frozen, before[0])
        assert same_bits(decayed, before[1])
        assert same_bits(late, before[2]) == (step < 3)
    assert set(optimizer.state[late]) == {"step", "exp_avg", "exp_avg_sq", RADIUS}


def test_nan_stays_in_its_layer() -> None:
    nets = [controlled("SGD", 0.02, rule=rule) for rule in ("angle", "uniform")]
    for net, optimizer in nets:
        bad, *good = invariant_weights(net)
        backward(net, 0)
        assert bad.grad is not None
        bad.grad[0, 0] = math.nan
        before = [w.detach().clone() for w in good]
        optimizer.step()
        assert int(bad.isnan().sum()) == 1
        assert all(float(angles(a, b)) > 1e-4 for a, b in zip(before, good, strict=True))
        assert all(bool(p.isfinite().all()) for p in net.parameters() if p is not bad)


def test_a_change_far_longer_than_the_weight() -> None:
    w = nn.Parameter(torch.randn(40, 30))
    optimizer = torch.optim.SGD([{"params": [w], "scale_invariant": True}], lr=0.01)
    control(optimizer)
    before = w.detach().clone()
    w.grad = torch.randn_like(w) * 1e9
    optimizer.step()
    assert float(angles(before, w)) == pytest.approx(0.01, rel=1e-5)
    assert float(w.detach().norm()) == pytest.approx(float(before.norm()), rel=1e-6)


def test_state_of_a_base_that_skips_its_first_step() -> None:
    """It asks whether its state is empty, as many do, and so must not find ours there."""

    class Skips(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> None:
            self.steps += 1
            for group in self.param_groups:
                for p in group["params"]:
                    if self.steps > 2:
                        if p not in self.state:
                            self.state[p]["own"] = torch.zeros(())
                        self.state[p]["own"] += 1
                        p.data -= p.grad

    w = nn.Parameter(torch.randn(3, 4))
    optimizer = Skips([{"params": [w], "scale_invariant": True}], lr=0.01)
    control(optimizer)
    for _ in range(5):
        w.grad = torch.randn_like(w)
        optimizer.step()
    assert float(optimizer.state[w]["own"]) == 3
    assert set(optimizer.state[w]) == {"own", RADIUS}


def test_lr_is_read_at_the_step_and_may_be_a_tensor() -> None:
    net, optimizer = controlled("AdamW", torch.tensor(0.05))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for expected in (0.05, 0.025, 0.0125):
        before = [w.detach().clone() for w in invariant_weights(net)]
        train(net, optimizer, range(1))
        scheduler.step()
        for a, b in zip(before, invariant_weights(net), strict=True):
            assert float(angles(a, b)) == pytest.approx(expected, rel=1e-5)


def test_closure_that_is_called_several_times() -> None:
    w = nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.LBFGS([w], lr=0.02, max_iter=5)
    control(optimizer, tracked=[w])
    target = torch.randn(4, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(w * target).sum() / w.norm()
        loss.backward()
        return loss

    for _ in range(3):
        before = w.detach().clone()
        optimizer.step(closure)
        assert float(angles(before, w)) == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("base", ["AdamW", "SGD", "ELRSGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["layer", "filter", "network"])
def test_resumes_bit_for_bit(base: str, dtype: torch.dtype, granularity: str) -> None:
    options = {"dtype": dtype, "granularity": granularity}
    net, optimizer = controlled(base, **options)
    train(net, optimizer, range(3))
    saved = pickle.loads(pickle.dumps((net.state_dict(), optimizer.state_dict())))
    train(net, optimizer, range(3, 6))
    again, other = controlled(base, **options)
    train(again, other, range(2))
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(again, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    radius = optimizer.state[invariant_weights(net)[0]][RADIUS]
    assert radius.dtype == torch.float32
    assert torch.equal(radius, other.state[invariant_weights(again)[0]][RADIUS])


def test_an_ELRSGD_without_a_rule_is_told_what_is_tracked() -> None:
    net = bn_mlp(3)
    (first, *_) = invariant_weights(net)
    optimizer = ELRSGD(net.named_parameters(), lr=0.02, rule=None)
    control(optimizer, tracked=[first])
    before = first.detach().clone()
    train(net, optimizer, range(1))
    assert float(angles(before, first)) == pytest.approx(0.02, rel=1e-5)


WITH_STATE = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Adafactor",
    "SGD",
    "Muon",
]


@pytest.mark.parametrize("way", ["load", "load a file of before", "deepcopy", "pickle"])
@pytest.mark.parametrize("base", WITH_STATE)
def test_a_layer_that_has_not_moved_yet_does_not_keep_others_from_their_state(base: str, way: str) -> None:
    """torch's optimizers take a state that is not empty for one of their own."""
    options = {"momentum": 0.9} if base == "SGD" else {}

    def make(net: nn.Sequential) -> torch.optim.Optimizer:
        return getattr(torch.optim, base)(groups_of(net, others=base != "Muon"), **options)

    net = bn_mlp(3)
    optimizer = make(net)
    control(optimizer)
    late = invariant_weights(net)[1]
    late.requires_grad_(False)
    train(net, optimizer, range(2))
    assert base == "Adagrad" or not optimizer.state.get(late)  # Adagrad makes its state at the start
    if way == "deepcopy":
        again, other = copy.deepcopy((net, optimizer))
    elif way == "pickle":
        again, other = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        again = copy.deepcopy(net)
        other = make(again)
    control(other)
    if way.startswith("load"):
        saved = copy.deepcopy(optimizer.state_dict())
        if way == "load a file of before":
            params = [p for group in optimizer.param_groups for p in group["params"]]
            (index,) = [i for i, p in enumerate(params) if p is late]
            saved["state"].setdefault(index, {})[RADIUS] = late.detach().norm().reshape(1)
        other.load_state_dict(saved)
    for each in (net, again):
        for p in each.parameters():
            p.requires_grad_(True)
    before = invariant_weights(again)[1].detach().clone()
    train(net, optimizer, range(2, 4))
    train(again, other, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert not torch.equal(before, invariant_weights(again)[1])
    assert RADIUS in other.state[invariant_weights(again)[1]]


def test_loading_what_has_no_flags_and_no_radii_begins_anew() -> None:
    """A checkpoint of the base optimizer replaces its groups; what was tracked stays so."""
    net = bn_mlp(3)
    plain = torch.optim.AdamW([{"params": list(net.parameters())}], lr=0.02)
    train(net, plain, range(2))
    optimizer = torch.optim.AdamW([{"params": list(net.parameters())}], lr=0.5)
    control(optimizer, tracked=invariant_weights(net))
    optimizer.load_state_dict(plain.state_dict())
    before = [w.detach().clone() for w in invariant_weights(net)]
    train(net, optimizer, range(1))
    for a, b in zip(before, invariant_weights(net), strict=True):
        assert float(angles(a, b)) == pytest.approx(0.02, rel=1e-5)
        assert float(optimizer.state[b][RADIUS]) == pytest.approx(float(a.norm()), rel=1e-6)


def test_radii_that_were_cast_are_refused() -> None:
    net, optimizer = controlled("AdamW", dtype=torch.bfloat16)
    train(net, optimizer, range(1))
    other = BASES["AdamW"](groups_of(net))
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"call elropt\.control before load_state_dict"):
        control(other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_with_the_same_norms_once_it_is_controlled(copied: Callable[[Any], Any]) -> None:
    net, optimizer = controlled()
    train(net, optimizer, range(2))
    again, other = copied((net, optimizer))
    control(other)
    train(net, optimizer, range(2, 5))
    train(again, other, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_groups_that_are_added_later() -> None:
    net, optimizer = controlled()
    train(net, optimizer, range(2))
    radii = {p: optimizer.state[p][RADIUS].clone() for p in invariant_weights(net)}
    more = nn.Parameter(torch.randn(8, 8))
    optimizer.add_param_group({"params": [more], "lr": 0.03, "scale_invariant": True})
    before = more.detach().clone()
    more.grad = torch.randn_like(more)
    optimizer.step()
    assert float(angles(before, more)) == pytest.approx(0.03, rel=1e-5)
    assert all(torch.equal(optimizer.state[p][RADIUS], r) for p, r in radii.items())


def test_after_remove_it_is_the_base() -> None:
    net, twin = bn_mlp(3), bn_mlp(3)
    optimizer, plain = (BASES["AdamW"](groups_of(n)) for n in (net, twin))
    handle = control(optimizer)
    train(net, optimizer, range(2))
    handle.remove()
    handle.remove()
    assert all(RADIUS not in held for held in optimizer.state.values())
    twin.load_state_dict(net.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(2, 4))
    train(twin, plain, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    control(optimizer)


def test_hooks_of_others_see_the_weights_that_the_step_ends_with() -> None:
    net = bn_mlp(3)
    optimizer = BASES["AdamW"](groups_of(net))
    seen: list[list[Tensor]] = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(weights_of(o)))
    control(optimizer)
    optimizer.register_step_post_hook(lambda o, *_: seen.append(weights_of(o)))
    train(net, optimizer, range(1))
    for weights in seen:
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(optimizer), strict=True))
    assert len(seen) == 2


class Halving(torch.optim.SGD):
    """Calls the hooked step of its base class, and then moves the weights itself."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(0.1 * torch.ones_like(p))
        if getattr(self, "fails", False):
            raise RuntimeError("out of memory")
        return result


def test_a_step_within_a_step() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from now on its step runs hooks
    w = nn.Parameter(torch.randn(20, 10))
    optimizer: Any = Halving([{"params": [w], "scale_invariant": True}], lr=0.01)
    control(optimizer)
    radius = float(w.detach().norm())
    for step in range(5):
        optimizer.fails = step in (1, 2)
        before = w.detach().clone()
        w.grad = torch.randn_like(w)
        if optimizer.fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
            continue
        optimizer.step()
        assert float(angles(before, w)) == pytest.approx(0.01, rel=1e-5)
        assert float(w.detach().norm()) == pytest.approx(radius, rel=1e-6)


def test_the_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the group on CUDA; here in Triton's interpreter."""
    results = []
    for fused in (False, True):
        with monkeypatch.context() as patch:
            if fused:
                patch.setattr("elropt.controller.choose_backend", lambda *_, **__: kernels)
            for granularity in ("layer", "filter"):
                net, optimizer = controlled("SGD", 0.02, granularity=granularity)
                train(net, optimizer, range(1))
                results.append([w.detach() for w in invariant_weights(net)])
    for one, other in zip(results[:2], results[2:], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def errors() -> Iterator[Any]:
    def case(name: str, error: type[Exception], match: str, act: Callable[[], object]) -> Any:
        return pytest.param(error, match, act, id=name)

    def adamw(**group: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(3, 2))], "lr": 0.01, **group}])

    flagged: dict[str, Any] = {"scale_invariant": True}
    yield case("nothing", ValueError, "nothing is tracked.*param_groups", lambda: control(adamw()))
    yield case("none", ValueError, "nothing is tracked", lambda: control(adamw(), tracked={"w": None}))
    yield case(
        "rule",
        ValueError,
        "'warmup' is not one of 'uniform', 'angle'",
        lambda: control(adamw(**flagged), "warmup"),
    )  # type: ignore[arg-type]
    yield case(
        "granularity",
        ValueError,
        "granularity='network' has no meaning for rule='uniform'",
        lambda: control(adamw(**flagged), "uniform", granularity="network"),
    )
    yield case("lr", ValueError, "lr=3.0.*from 0 to π/2", lambda: control(adamw(**flagged, lr=3.0)))
    yield case("type", TypeError, "is no torch optimizer", lambda: control(object()))  # type: ignore[arg-type]
    yield case(
        "name",
        ValueError,
        "tracked has 'a', which is no parameter",
        lambda: control(adamw(), tracked=["a"]),
    )
    yield case(
        "string",
        ValueError,
        r"tracked is the string 'a'; pass an iterable of names, such as \['a'\]",
        lambda: control(adamw(), tracked="a"),
    )
    yield case(
        "stranger",
        ValueError,
        "a parameter of shape",
        lambda: control(adamw(), tracked=[nn.Parameter(torch.ones(2))]),
    )
    yield case(
        "complex",
        ValueError,
        "only real",
        lambda: control(adamw(params=[nn.Parameter(torch.ones(2, 2, dtype=torch.cfloat))], **flagged)),
    )
    yield case(
        "tracked_lr",
        ValueError,
        "is an option of ELRSGD.*group",
        lambda: control(adamw(**flagged, tracked_lr=0.1)),
    )
    yield case(
        "elrsgd",
        ValueError,
        "has a rule of its own.*rule=None",
        lambda: control(ELRSGD([{"params": [nn.Parameter(torch.ones(3, 2))], **flagged}], lr=0.1)),
    )


@pytest.mark.parametrize(("error", "match", "act"), list(errors()))
def test_errors(error: type[Exception], match: str, act: Callable[[], object]) -> None:
    with pytest.raises(error, match=match):
        act()


def test_twice_is_refused() -> None:
    _, optimizer = controlled()
    with pytest.raises(ValueError, match=r"controlled already.*remove"):
        control(optimizer)


@pytest.mark.parametrize("lr", [2.0, math.nan, math.inf, -0.1, None])
def test_a_schedule_out_of_range_is_refused_before_anything_changes(lr: Any) -> None:
    net, optimizer = controlled()
    train(net, optimizer, range(1))
    backward(net, 1)
    optimizer.param_groups[0]["lr"] = lr
    before, state = weights_of(optimizer), str(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match="is not valid"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(optimizer), strict=True))
    assert str(optimizer.state_dict()["state"]) == state


def test_warns_once_of_large_angles() -> None:
    net = bn_mlp(3)
    optimizer = BASES["AdamW"](groups_of(net, 0.3))
    with pytest.warns(UserWarning, match=r"lr=0\.3 radians per step") as caught:
        control(optimizer)
    assert caught[0].filename == __file__
    train(net, optimizer, range(2))


def test_names_and_what_find_scale_invariant_returns() -> None:
    net = bn_mlp(3)
    found = elropt.find_scale_invariant(net, torch.randn(16, 8))
    for tracked in (found, [name for name, kind in found.items() if kind], invariant_weights(net)):
        optimizer = torch.optim.AdamW(net.named_parameters(), lr=0.01)
        handle = control(optimizer, tracked=tracked)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        train(net, optimizer, range(1))
        held = {name for name, p in net.named_parameters() if RADIUS in optimizer.state[p]}
        assert held == {name for name, kind in found.items() if kind}
        for name in held:
            assert float(angles(before[name], net.get_parameter(name))) == pytest.approx(0.01, rel=1e-4)
        handle.remove()


class Lookahead(torch.optim.Optimizer):
    """Keeps hooks around its steps alone, as the wrappers of pytorch-optimizer do, and goes half of each step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.defaults = optimizer.defaults
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._patch_step_function()

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        slow = weights_of(self.optimizer)
        result = self.optimizer.step(closure)
        for p, old in zip((p for group in self.param_groups for p in group["params"]), slow, strict=True):
            p.data.lerp_(old, 0.5)
        return result


def test_a_wrapper_that_moves_the_weights_too() -> None:
    net = bn_mlp(3)
    base = BASES["AdamW"](groups_of(net))
    wrapper = Lookahead(base)
    handle = control(wrapper)
    for optimizer in (wrapper, base):
        with pytest.raises(ValueError, match="controlled already"):
            control(optimizer)
    for step in range(3):
        before = [w.detach().clone() for w in invariant_weights(net)]
        train(net, wrapper, range(step, step + 1))
        for a, b in zip(before, invariant_weights(net), strict=True):
            assert float(angles(a, b)) == pytest.approx(0.01, rel=1e-5)
            assert float(b.detach().norm()) == pytest.approx(float(base.state[b][RADIUS]), rel=1e-6)
    assert sum(RADIUS in held for held in base.state_dict()["state"].values()) == 3
    handle.remove()
    control(base)


def test_reads_nothing_back_to_the_host() -> None:
    for rule in ("angle", "uniform"):
        net, optimizer = controlled("SGD", 0.02, rule=rule)
        for step in range(2):
            backward(net, step)
            with no_host_reads():
                optimizer.step()


def test_in_inference_mode() -> None:
    net, optimizer = controlled()
    for step in range(3):
        before = [w.detach().clone() for w in invariant_weights(net)]
        backward(net, step)
        with torch.inference_mode(step == 1):
            optimizer.step()
        for a, b in zip(before, invariant_weights(net), strict=True):
            assert float(angles(a, b)) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("recorder_first", [True, False])
def test_recorder_sees_the_angle_of_the_rule(recorder_first: bool, tmp_path: Path) -> None:
    net = bn_mlp(3)
    optimizer = BASES["AdamW"](groups_of(net))
    if not recorder_first:
        control(optimizer)
    with elropt.Recorder(optimizer, tmp_path / "run.jsonl", every=1):
        if recorder_first:
            control(optimizer)
        train(net, optimizer, range(2))
        table = elropt.layer_stats(optimizer)
    tracked = table["tracked"].astype(bool)
    assert tracked.sum() == 3
    assert table["angle"][tracked] == pytest.approx([0.01] * 3, rel=1e-5)
    assert abs(table["radial_update"][tracked]).max() < 1e-6


def test_what_is_saved_after_a_step_that_failed() -> None:
    w = nn.Parameter(torch.randn(20, 10))
    optimizer: Any = Halving([{"params": [w], "scale_invariant": True}], lr=0.01)
    control(optimizer)
    optimizer.fails = False
    for fails in (False, True):
        optimizer.fails = fails
        w.grad = torch.randn_like(w)
        with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
            optimizer.step()
    assert RADIUS in optimizer.state_dict()["state"][0]


def test_if_control_itself_fails_the_tracked_weights_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = controlled()
    train(net, optimizer, range(1))
    before = [w.detach().clone() for w in invariant_weights(net)]
    backward(net, 1)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("elropt.controller.measure", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, invariant_weights(net), strict=True))
    train(net, optimizer, range(1, 2))
    for a, b in zip(before, invariant_weights(net), strict=True):
        assert float(angles(a, b)) == pytest.approx(0.01, rel=1e-5)


class Retriever(nn.Module):
    """Pairs of a key and a value, then a key: which value stands beside it? The queries and keys are normalized."""

    def __init__(self, vocabulary: int = 16, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.randn(9, width) * 0.02)
        self.mix = nn.Conv1d(width, width, 2, padding=1, groups=width, bias=False)
        self.mix_norm = nn.BatchNorm1d(width)
        self.norm = nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places
        h = h + self.mix_norm(self.mix(h.mT)[..., : h.shape[1]]).mT
        n = self.norm(h)
        q, k = (F.rms_norm(project(n), (n.shape[-1],)) for project in (self.query, self.key))
        attention = (3 * q @ k.mT / n.shape[-1] ** 0.5).softmax(-1)
        return self.head(self.norm(h + self.out(attention @ self.value(n))))[:, -1]

    @staticmethod
    def batch(seed: int, size: int = 64) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        keys = torch.rand(size, 8, generator=generator).argsort(1)[:, :4]
        values = torch.randint(8, 16, (size, 4), generator=generator)
        which = torch.randint(4, (size, 1), generator=generator)
        pairs = torch.stack([keys, values], 2).flatten(1)
        return torch.cat([pairs, keys.gather(1, which)], 1), values.gather(1, which)[:, 0]

    def train_controlled(self, tracked: list[str], lr: float = 0.01, steps: int = 150) -> float:
        """The loss on new data after training with learning rates that fall linearly to 0."""
        named = dict(self.named_parameters())
        groups = [
            {"params": [named.pop(name) for name in tracked], "lr": lr, "scale_invariant": True},
            {"params": list(named.values()), "lr": 3e-3},
        ]
        optimizer = torch.optim.AdamW(groups)
        control(optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for step in range(steps):
            x, y = self.batch(step)
            optimizer.zero_grad()
            F.cross_entropy(self(x), y).backward()
            optimizer.step()
            schedule.step()
        x, y = self.batch(-1, 2000)
        with torch.no_grad():
            return F.cross_entropy(self.eval()(x), y).item()


def test_the_number_of_dimensions_does_not_say_what_is_invariant() -> None:
    """It takes the embedding, the positions, the values and the head for invariant, and holds them at norms that they
    must leave."""
    losses = []
    for by_ndim in (False, True):
        torch.manual_seed(1)
        net = Retriever()
        found = elropt.find_scale_invariant(net, net.batch(0)[0])
        measured = [name for name, kind in found.items() if kind]
        matrices = [name for name, p in net.named_parameters() if p.ndim >= 2]
        assert set(measured) == {"query.weight", "key.weight", "mix.weight"}
        assert set(matrices) > set(measured)
        losses.append(net.train_controlled(matrices if by_ndim else measured))
    assert losses[0] < 0.5 * losses[1]


FOREIGN: dict[str, Make] = {
    "heavyball AdamW": heavyball("AdamW"),
    "heavyball Muon": heavyball("Muon"),
    "pytorch-optimizer Lion": pytorch_optimizer("Lion"),
    "pytorch-optimizer SOAP": pytorch_optimizer("SOAP"),  # its first step only collects
    "pytorch-optimizer Lookahead": lambda groups: pytorch_optimizer("Lookahead")(torch.optim.AdamW(groups)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_optimizers_of_other_packages(name: str) -> None:
    net = bn_mlp(3)
    optimizer = FOREIGN[name](groups_of(net))
    control(optimizer)
    for step in range(3):
        before = [w.detach().clone() for w in invariant_weights(net)]
        train(net, optimizer, range(step, step + 1))
        for a, b in zip(before, invariant_weights(net), strict=True):
            moved = step > 0 or "SOAP" not in name
            assert float(angles(a, b)) == pytest.approx(0.01 if moved else 0.0, rel=1e-5)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, range(3, 5))
    again = bn_mlp(3)
    other = FOREIGN[name](groups_of(again))
    control(other)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(again, other, range(3, 5))
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        if name != "heavyball Muon":  # which does not resume to the same bits by itself
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_code_of_the_docs_runs() -> None:
    page = Path(__file__).parents[1] / "docs" / "guide" / "control.md"
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        exec(compile(block, page.name, "exec"), namespace)
    model, weight = namespace["model"], namespace["model"][0].weight
    before = weight.detach().clone()
    model(torch.randn(16, 8)).square().mean().backward()
    namespace["optimizer"].step()
    assert float(angles(before, weight)) == pytest.approx(0.01, rel=1e-5)


def test_parameters_that_were_replaced_are_not_left_to_the_base_unnoticed() -> None:
    """As by sharding after control, and flattened as by DeepSpeed."""
    _, optimizer = controlled("AdamW")
    tracked = list(optimizer.param_groups[0]["params"])
    other = torch.optim.AdamW([{"params": list(tracked)}], lr=0.01)
    control(other, tracked=tracked)
    other.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in tracked]
    with pytest.raises(ValueError, match="have been replaced"):
        other.step()
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]
    with pytest.raises(ValueError, match="replaced by flattened ones"):
        optimizer.step()


@pytest.mark.parametrize(("lr", "accuracy"), [(0.1, 0.02), (0.03, 0.1)])
def test_bfloat16_weights(lr: float, accuracy: float) -> None:
    """The rounding of the weights is what limits the angle."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(200, 100, dtype=torch.bfloat16) * 0.05)
    optimizer = torch.optim.AdamW([{"params": [w], "scale_invariant": True}], lr=lr)
    control(optimizer)
    radius = w.detach().double().norm()
    for _ in range(20):
        before = w.detach().clone()
        w.grad = torch.randn_like(w)
        optimizer.step()
        assert float(angles(before, w)) == pytest.approx(lr, rel=accuracy)
    assert float(w.detach().double().norm() / radius) == pytest.approx(1, rel=2e-3)
