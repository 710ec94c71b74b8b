"""rule="warmup" starts again when λΓ exceeds the largest that it has acted at, and only then."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LinearLR

from elropt import ELRSGD, foreach, rules
from elropt._warmup_end import LargestLrs, WarmupEndPoll

from .nets import backward, bn_mlp, invariant_weights, train
from .oracle import Oracle, invariant_gradient
from .test_host_reads import no_host_reads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"reference": {"foreach": False}, "foreach": {"foreach": True}, "triton": {"fused": True}}
RAMP = [0.02 * (i + 1) for i in range(12)]
# a ramp and what follows it, a rise by rounding, and a real one
SCHEDULE = [*RAMP, *[0.24] * 16, *[0.1] * 3, 0.24 * (1 + 1e-6), *[0.3] * 24, 0.2, 0.3]
SHORT = [0.02, 0.12, *[0.24] * 14, 0.1, 0.3, 0.3]


def is_over(optimizer: ELRSGD) -> bool:
    return bool(optimizer.state[optimizer.param_groups[0]["params"][0]]["handed_over"] > 0)


def run_oracle(
    lrs: Iterable[float], momentum: float, seed: int = 0, **options: Any
) -> tuple[list[bool], list[bool], list[np.ndarray], list[np.ndarray]]:
    """At which steps it is over, of the package and of the oracle, and the weights at the end."""
    rng = np.random.default_rng(seed)
    weights = [
        rng.normal(size=shape) * s for shape, s in zip([(4, 6), (5, 3), (7,)], (0.7, 1.0, 1.2), strict=True)
    ]
    gradients = [invariant_gradient(5 * rng.normal(size=w.shape)) for w in weights]
    dtype = torch.float32 if options.get("fused") else torch.float64
    params = [torch.nn.Parameter(torch.tensor(w).to(DEVICE, dtype)) for w in weights]
    lrs = list(lrs)
    optimizer = ELRSGD([{"params": params, "scale_invariant": True}], lr=lrs[0], momentum=momentum, **options)
    oracle = Oracle(weights, rule="warmup", momentum=momentum)
    ours, expected = [], []
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = torch.tensor(gradient(p.detach().double().cpu().numpy())).to(p)
        optimizer.step()
        oracle.step([gradient(w) for w, gradient in zip(oracle.weights, gradients, strict=True)], lr)
        ours.append(is_over(optimizer))
        expected.append(oracle.warmup.over)
    return ours, expected, [p.detach().double().cpu().numpy() for p in params], oracle.weights


@pytest.mark.parametrize(
    ("backend", "momentum"),
    [("reference", 0.0), ("reference", 0.9), ("foreach", 0.0), ("foreach", 0.9), ("triton", 0.0)],
)
def test_it_is_that_of_the_oracle(backend: str, momentum: float) -> None:
    schedule = SHORT if backend == "triton" else SCHEDULE
    ours, expected, weights, oracle_weights = run_oracle(schedule, momentum, **BACKENDS[backend])
    assert ours == expected
    changes = [over for over, _ in itertools.groupby(map(bool, expected))]
    assert changes == [False, True, False, True][: 3 if backend == "triton" else 4]
    for w, e in zip(weights, oracle_weights, strict=True):
        np.testing.assert_allclose(w, e, rtol=1e-3 if backend == "triton" else 1e-5, atol=1e-6)


def ramped(optimizer: ELRSGD, step: int, peak: float, steps: int) -> None:
    """A linear warm-up, and a fall after it."""
    lr = peak * min((step + 1) / steps, 1.0) * 0.99 ** max(step - steps - 20, 0)
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def trained(
    steps: Iterable[int], net: torch.nn.Module | None = None, optimizer: ELRSGD | None = None, **options: Any
) -> tuple[Any, ELRSGD, list[bool]]:
    """A net, its optimizer and whether it was over after every step of a linear warm-up over 20 steps."""
    net = bn_mlp() if net is None else net
    optimizer = (
        ELRSGD(net.parameters(), momentum=0.9, **{"lr": 0.5, **options}) if optimizer is None else optimizer
    )
    over = []
    for step in steps:
        ramped(optimizer, step, 0.5, 20)
        backward(net, step)
        optimizer.step()
        over.append(is_over(optimizer))
    return net, optimizer, over


def all_tensors(net: Any, optimizer: ELRSGD) -> list[Tensor]:
    return [t for p in net.parameters() for t in (p.detach(), *optimizer.state[p].values())]


@pytest.mark.parametrize("foreach", [False, True])
def test_it_acts_through_a_linear_warmup_and_ends_after_it(foreach: bool) -> None:
    _, optimizer, over = trained(range(80), foreach=foreach)
    assert not any(over[:20])
    assert over[-1]
    assert sum(a != b for a, b in itertools.pairwise(over)) == 1
    largest = optimizer.state[optimizer.param_groups[0]["params"][0]]["largest_lr"]
    assert largest.item() == pytest.approx(0.5 * rules.growth_gain(0.9), rel=1e-5)


def test_the_critical_angle_holds_after_a_rise() -> None:
    """A step at 1e4 times the lr of the hand-over turns no tracked layer by more than the critical angle."""
    net = bn_mlp()
    optimizer = ELRSGD(net.named_parameters(), lr=0.05, momentum=0.9)
    train(net, optimizer, range(60))
    assert is_over(optimizer)
    weights = invariant_weights(net)
    optimizer.param_groups[0]["lr"] = 500.0
    for p in net.parameters():
        optimizer.state[p]["momentum_buffer"].zero_()
    backward(net, 60)
    before = [w.detach().clone() for w in weights]
    optimizer.step()
    for w, old in zip(weights, before, strict=True):
        turn = torch.atan2(
            (w - old * (w * old).sum() / old.square().sum()).norm(), (w * old).sum() / old.norm()
        )
        assert turn.item() == pytest.approx(1 / rules.growth_gain(0.9), rel=1e-3)
    assert not is_over(optimizer)


def test_a_tensor_lr_gives_the_same() -> None:
    runs = [trained(range(60), lr=lr, foreach=True) for lr in (0.5, torch.tensor(0.5), torch.tensor([0.5]))]
    for net, _, over in runs[1:]:
        assert over == runs[0][2]
        for p, q in zip(net.parameters(), runs[0][0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_while_the_lr_does_not_rise_nothing_is_measured(
    tensor_lr: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, optimizer, over = trained(range(45), lr=torch.tensor(0.5) if tensor_lr else 0.5, foreach=True)
    assert over[-1]
    measured = []
    measure = foreach.measure
    monkeypatch.setattr(foreach, "measure", lambda *a, **k: measured.append(1) or measure(*a, **k))
    for step in range(45, 60):
        ramped(optimizer, step, 0.5, 20)
        backward(net, step)
        with no_host_reads():
            optimizer.step()
    assert not measured
    ramped(optimizer, 20, 0.501, 20)
    with no_host_reads():
        optimizer.step()
    assert len(measured) == 1
    assert not is_over(optimizer)


@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}], ids=str)
def test_a_host_that_learns_late_leaves_the_same(
    backend: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for late in (False, True):
        net, optimizer, over = trained(range(45), **backend)
        if late:
            monkeypatch.setattr(WarmupEndPoll, "warmup_is_over", lambda self: False)
        for lr in (0.5, 0.4, 0.5, 0.50001, 0.7, 0.7, 0.6):
            optimizer.param_groups[0]["lr"] = lr
            train(net, optimizer, range(45, 46))
            over.append(is_over(optimizer))
        runs.append((all_tensors(net, optimizer), over))
    assert runs[0][1][-7:-3] == [True] * 4
    assert not runs[0][1][-3]
    assert runs[0][1] == runs[1][1]
    assert all(map(torch.equal, runs[0][0], runs[1][0]))


@pytest.mark.parametrize("at", [10, 25, 45])
def test_it_resumes_bit_for_bit(at: int) -> None:
    net, optimizer, over = trained(range(at))
    twin = copy.deepcopy(net)
    resumed = ELRSGD(twin.parameters(), lr=1.0, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    *_, over = trained(range(at, 60), net, optimizer)
    *_, over_resumed = trained(range(at, 60), twin, resumed)
    assert over == over_resumed
    for end in (optimizer, resumed):
        end.param_groups[0]["lr"] = 2.0
    train(net, optimizer, range(60, 62))
    train(twin, resumed, range(60, 62))
    assert not is_over(resumed)
    assert all(map(torch.equal, all_tensors(net, optimizer), all_tensors(twin, resumed)))


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=str)
def test_a_checkpoint_of_a_version_without_largest_lr(lr: float | Tensor) -> None:
    """The lr that it was saved with counts as the largest so far."""
    net, optimizer, over = trained(range(45), lr=copy.deepcopy(lr))
    assert over[-1]
    saved = copy.deepcopy(optimizer.state_dict())
    for held in saved["state"].values():
        del held["largest_lr"]
    resumed = ELRSGD(net.parameters(), lr=1.0, momentum=0.9)
    resumed.load_state_dict(saved)
    train(net, resumed, range(45, 47))
    assert is_over(resumed)
    for group in resumed.param_groups:
        group["lr"] = group["lr"] * 1.01
    train(net, resumed, range(47, 48))
    assert not is_over(resumed)


def test_a_restart_at_the_same_lr_is_no_rise() -> None:
    net = bn_mlp()
    optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.9)
    scheduler = CosineAnnealingWarmRestarts(optimizer, 40)
    over = []
    train(net, optimizer, range(100), lambda: (scheduler.step(), over.append(is_over(optimizer))))
    assert over[-1]
    assert sum(a != b for a, b in itertools.pairwise(over)) == 1


def test_a_larger_lr_of_what_is_not_tracked_neither_hides_a_rise_nor_costs_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = bn_mlp()
    head = net[-1]
    body = [p for p in net.parameters() if all(p is not q for q in head.parameters())]
    optimizer = ELRSGD(
        [{"params": body}, {"params": list(head.parameters()), "lr": 0.5}], lr=0.05, foreach=True
    )
    train(net, optimizer, range(60))
    assert is_over(optimizer)
    measured = []
    measure = foreach.measure
    monkeypatch.setattr(foreach, "measure", lambda *a, **k: measured.append(1) or measure(*a, **k))
    for lr in (0.05, 0.04, 0.05):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, 10 * lr
        train(net, optimizer, range(1))
    assert not measured
    optimizer.param_groups[0]["lr"] = 0.1
    train(net, optimizer, range(1))
    assert measured
    assert not is_over(optimizer)


def test_a_rise_of_momentum_is_one_of_the_angle() -> None:
    net = bn_mlp()
    optimizer = ELRSGD(net.parameters(), lr=0.05, momentum=0.5)
    train(net, optimizer, range(60))
    for momentum, over in ((0.4, True), (0.5, True), (0.9, False)):
        optimizer.param_groups[0]["momentum"] = momentum
        train(net, optimizer, range(1))
        assert is_over(optimizer) == over


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_rise_while_the_layers_have_no_gradient(tensor_lr: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts again when they have one; then steps without some of them measure nothing."""
    lr = torch.tensor(0.05) if tensor_lr else 0.05
    net = bn_mlp()
    optimizer = ELRSGD(net.parameters(), lr=lr, momentum=0.9, foreach=True)
    train(net, optimizer, range(60))
    assert is_over(optimizer)
    weights = invariant_weights(net)

    def step_without(left_out: Sequence[Tensor]) -> None:
        backward(net, 0)
        for w in left_out:
            w.grad = None
        optimizer.step()

    optimizer.param_groups[0]["lr"] = lr * 10
    step_without(weights)
    assert is_over(optimizer)
    step_without(weights[:1])
    assert not is_over(optimizer)
    train(net, optimizer, range(100))
    assert is_over(optimizer)
    measured = []
    measure = foreach.measure
    monkeypatch.setattr(foreach, "measure", lambda *a, **k: measured.append(1) or measure(*a, **k))
    for left_out in (weights, weights[:1], weights[1:], []):
        step_without(left_out)
    assert not measured


def test_a_question_sees_a_rise_before_the_step_and_changes_nothing() -> None:
    net, optimizer, over = trained(range(45))
    assert over[-1]
    optimizer.param_groups[0]["lr"] = 100.0
    held = [t.clone() for t in all_tensors(net, optimizer)]
    records = optimizer.layer_records()
    factors = records[0].controls.grad_factor
    assert factors is not None
    assert bool((factors[:-1] < 1).all())  # all but the head's
    assert all(map(torch.equal, held, all_tensors(net, optimizer)))


def test_largest_lrs_follow_only_what_the_warmup_acted_at() -> None:
    group = {"lr": 1.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, "tracked_lr": None}
    lrs = LargestLrs([group], [])
    risen = []
    for lr, acts in [(1.0, True), (1.5, True), (1.0, True), (1.5, False), (1.50002, False), (1.50004, False),
                     (1.5002, False), (1.5002, False), (2.0, True)]:  # fmt: skip
        group["lr"] = lr
        asked = lrs.has_risen()
        assert lrs.follow(None, acts=acts) == asked
        risen.append(asked)
    assert risen == [False, True, False, False, False, False, True, False, True]


def test_a_linear_lr_scheduler_and_a_restart_from_zero() -> None:
    """The first step of a warm-up from 0 does not count as the largest lr for good."""
    net = bn_mlp(depth=2)
    weights = invariant_weights(net)
    optimizer = ELRSGD([{"params": weights, "scale_invariant": True}], lr=0.1)
    scheduler = LinearLR(optimizer, start_factor=1e-9, total_iters=10)
    over: list[bool] = []
    train(net, optimizer, range(12), lambda: (scheduler.step(), over.append(is_over(optimizer))))
    assert not any(over[1:11])


def test_where_the_host_cannot_ask_the_kernels_start_again_a_step_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a CUDA graph: no gradient is read at the step at which lr rises, so this one is plain SGD."""
    c, lr = 0.7, 1e-3
    w = torch.nn.Parameter(torch.tensor([[1.0], [0.0]], device=DEVICE))
    optimizer = ELRSGD([{"params": [w], "scale_invariant": True}], lr=lr, fused=True)

    def step() -> float:
        """The angle of the step, over that of SGD."""
        before = w.detach().clone()
        w.grad = c * torch.stack([-before[1], before[0]]) / before.square().sum()
        optimizer.step()
        tangent = (w[0] * before[1] - w[1] * before[0]) / (w * before).sum()
        return tangent.item() / (optimizer.param_groups[0]["lr"] * c / before.square().sum().item())

    for _ in range(2):
        assert step() == pytest.approx(1, rel=1e-4)
    assert is_over(optimizer)
    monkeypatch.setattr(LargestLrs, "follow", lambda *_, **__: False)
    monkeypatch.setattr(WarmupEndPoll, "warmup_is_over", lambda _: False)
    step()
    optimizer.param_groups[0]["lr"] = 10.0
    assert step() == pytest.approx(1, rel=1e-4)
    assert not is_over(optimizer)
    with torch.no_grad():
        w.copy_(torch.tensor([[1.0], [0.0]]))
    assert step() == pytest.approx(1 / 7, rel=1e-4)  # the critical angle, λE★ = 1


@pytest.mark.parametrize("tracked_lr", [None, 0.1])
def test_what_the_device_is_asked_about_a_tensor_lr(tracked_lr: float | None) -> None:
    """As on a GPU, where the host does not read it."""
    _, optimizer, over = trained(range(45), lr=torch.tensor(0.5), tracked_lr=tracked_lr)
    assert over[-1]
    (rule_group,) = optimizer._rule_groups or []
    for lr, risen in [(0.4, False), (0.5, False), (0.501, True)]:
        optimizer.param_groups[0]["lr"].fill_(lr)
        with no_host_reads():
            answer = rule_group._lr_has_risen()
        assert bool(answer) == risen
