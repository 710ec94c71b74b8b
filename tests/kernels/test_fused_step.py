"""A whole step in the kernels: what is measured, decided, carried over, skipped and rounded."""

from __future__ import annotations

import copy
import gc
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elropt import ELRSGD, _rule_group, effective_lrs, kernels, layer_stats, rules
from elropt.rules import RADIAL_TESTS, LayerStats, RowHyper, RuleState
from elropt.rules import decide as specified

if not kernels.available():
    pytest.skip("triton is not installed", allow_module_level=True)

from elropt.kernels import tables
from elropt.kernels.args import Hypers, Rows
from elropt.kernels.decide import decide

from ..nets import backward, bn_mlp, invariant_weights
from .counting import bytes_touched

hyper_module = importlib.import_module("elropt.kernels.hyper_arguments")
step_module = importlib.import_module("elropt.kernels.fused_step")
launches_module = importlib.import_module("elropt.kernels.launches")
decide_module = importlib.import_module("elropt.kernels.decide")
DEVICE = tables.DEVICE_TYPE
INTERPRETED = DEVICE == "cpu"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("neither a CUDA device nor TRITON_INTERPRET=1", allow_module_level=True)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter does")

RULES = [
    (rule, granularity)
    for rule, spec in rules.RULES.items()
    for granularity in spec.granularities
    if granularity != "filter"
]
UPDATE_RULES = [(rule, granularity) for rule, granularity in RULES if rules.RULES[rule].decide_update]
# equilibrium acts on the gradient as angle does
GRADIENT_RULES = [(rule, granularity) for rule, granularity in RULES if rule != "equilibrium"]


def test_the_kernel_has_the_constants_of_the_rules() -> None:
    names = (
        "RADIAL_TESTS",
        "TEST_TURN",
        "LEAST_TEST",
        "SMOOTHING",
        "TINY",
        "EQUALIZATION_RATE",
        "EQUALIZED_STD",
        "LR_RISE",
        "SHARE_CHANGE",
        "LEAST_TANGENT",
        "LEAST_SHRINK",
    )
    constants = {name: getattr(decide_module, name).value for name in names}
    assert constants == {name: getattr(rules, name) for name in names}
    near_zero = (decide_module.NEAR_ZERO_BY_SIZE, decide_module.NEAR_ZERO, decide_module.NEAR_ZERO_AT_MOST)
    assert tuple(constant.value for constant in near_zero) == rules.NEAR_ZERO


@st.composite
def decisions(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.sampled_from([1, 2, 7, 255, 256, 257, 600]))
    of_update = draw(st.booleans())
    return {
        "n": n,
        "rule": draw(st.sampled_from(UPDATE_RULES if of_update else RULES)),
        "of_update": of_update,
        "project": draw(st.booleans()),
        "protect": draw(st.booleans()),
        "lrs": draw(st.lists(st.sampled_from([0.0, 1e-3, 0.1, 30.0]), min_size=1, max_size=3)),
        "spread": draw(st.sampled_from([0.0, 0.01, 1.0, 4.0])),
        "odd": draw(st.sampled_from([0.0, 0.3])),
        "seen": draw(st.booleans()),
        "over": draw(st.booleans()),
        "largest": draw(st.sampled_from([0.0, 0.5, 1e3])),
        "seed": draw(st.integers(0, 2**20)),
    }


@settings(deadline=None, max_examples=80 if INTERPRETED else 30)
@given(decisions())
def test_the_kernel_decides_as_the_rules_do(case: dict[str, Any]) -> None:
    n, (rule, granularity), project, of_update = (case[k] for k in ("n", "rule", "project", "of_update"))
    if of_update and project and granularity == "layer":
        granularity = "filter"  # which needs ⟨w,g⟩ at every step
    protect = case["protect"] and of_update and rule == "equilibrium"
    generator = torch.Generator().manual_seed(case["seed"])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def sometimes(share: float) -> Tensor:
        return torch.rand(n, generator=generator) < share

    weight_sq, grad_sq = (10 ** (case["spread"] * random(n)) for _ in range(2))
    for vector, odd in ((weight_sq, math.inf), (grad_sq, math.nan), (grad_sq, math.inf), (grad_sq, 0.0)):
        vector[sometimes(case["odd"] / 4)] = odd
    numel = torch.where(sometimes(0.5), 400.0, 1e9)
    cosine = torch.where(sometimes(case["odd"]), torch.where(sometimes(0.5), 0.5, 5e-5), 1e-6)
    dot_grad = torch.where(
        torch.isfinite(weight_sq * grad_sq), cosine * (weight_sq * grad_sq).sqrt(), torch.nan
    )
    momentum_sq = 10 ** (case["spread"] * random(n))
    dot_momentum = 0.3 * torch.sin(random(n)) * (weight_sq.clamp(max=1e6) * momentum_sq).sqrt()
    grad_dot_momentum = 0.9 * torch.sin(3 * random(n)) * (grad_sq * momentum_sq).sqrt()
    stats = LayerStats(weight_sq, grad_sq, dot_grad, dot_momentum, momentum_sq, grad_dot_momentum)
    passed = torch.full((n,), float(RADIAL_TESTS))
    passed[sometimes(case["odd"])] = 3.0
    passed[sometimes(case["odd"])] = 7.7
    passed[sometimes(case["odd"] / 2)] = -1.0
    zero = torch.zeros(n)
    seen = 10 ** random(n) if case["seen"] else zero
    radius = (1 + random(n).abs()) * (1.0 if case["seen"] else 0.0)
    of_all = torch.tensor([float(case["over"]), case["largest"]])
    state = RuleState(seen, radius, passed, *of_all)
    group = torch.randint(len(case["lrs"]), (n,), generator=generator)
    lr = torch.tensor(case["lrs"])[group]
    hyper = RowHyper(
        lr, 0.01 * (group + 1), 9.7 - group, 1.0 - 0.1 * group, 0.9 - 0.1 * group, numel,
        settling=0.002 * (group + 1), diffusion=0.2 + 0.1 * group, least_size=2.0 * sometimes(0.5),
    )  # fmt: skip
    absent = sometimes(case["odd"])
    if absent.all():
        absent[0] = False

    of_rows = (*stats, *state[:3], *hyper[:6], hyper.settling, hyper.diffusion, hyper.least_size)
    chosen = [vector[~absent].double() for vector in of_rows]
    controls, after = specified(
        rule,
        LayerStats(*chosen[:6]),
        RuleState(*chosen[6:9], *of_all.double()),
        RowHyper(*chosen[9:15], None, *chosen[15:]),
        granularity=granularity,
        project=project and not of_update,
        of_update=of_update,
        protect=protect,
        absent=(seen[absent] > 0).any() if absent.any() else None,
    )

    sums = torch.stack([*stats, zero])
    sums[1, absent] = -1.0
    memory, actual_over = torch.stack(state[:3]), of_all.clone()
    sums, memory, actual_over, group, numel = (
        t.to(DEVICE) for t in (sums, memory, actual_over, group.int(), numel)
    )
    actual = torch.full((5, n), torch.nan, device=DEVICE)
    per_group = range(len(case["lrs"]))
    hypers = Hypers(
        decays=tuple(0.01 * (i + 1) for i in per_group),
        gains=tuple(9.7 - i for i in per_group),
        per_grads=tuple(1.0 - 0.1 * i for i in per_group),
        per_momenta=tuple(0.9 - 0.1 * i for i in per_group),
        settlings=tuple(0.002 * (i + 1) for i in per_group),
        diffusions=tuple(0.2 + 0.1 * i for i in per_group),
    )
    least_size = hyper.least_size.to(DEVICE) if protect else None
    functions = decide_module.UPDATE_RULES if of_update else decide_module.RULES
    decide[(1,)](
        sums, Rows(memory, actual_over, actual, numel, group, least_size), tuple(case["lrs"]), hypers, None, n,
        RULE=functions[rule], WHOLE=granularity == "network",
        PROJECT=granularity == "filter" if of_update else project,
    )  # fmt: skip

    names = ["grad_factor", "weight_factor", "radial", "lr", "lr_factor"]
    factors = dict(zip(names, actual.cpu(), strict=True))
    for name, expected in controls._asdict().items():
        if expected is not None:
            torch.testing.assert_close(
                factors[name][~absent].double(),
                expected.double(),
                rtol=3e-5,
                atol=1e-6,
                equal_nan=True,
                msg=name,
            )
    for name, kept, before, expected in zip(
        after._fields, memory.cpu(), torch.stack(state[:3]), after, strict=False
    ):
        torch.testing.assert_close(
            kept[~absent].double(), expected, rtol=3e-5, atol=0, equal_nan=True, msg=name
        )
        torch.testing.assert_close(kept[absent], before[absent], rtol=0, atol=0, msg=name)
    torch.testing.assert_close(actual_over.cpu().double(), torch.stack(after[3:]), rtol=1e-5, atol=0)


def net_and_optimizer(
    fused: bool, *, flagged: bool = False, depth: int = 4, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Sequential, ELRSGD]:
    net = bn_mlp(depth=depth, width=8, dtype=dtype).to(DEVICE)
    tracked = invariant_weights(net)
    params: Any = list(net.parameters())
    if flagged:
        rest = [p for p in params if all(p is not w for w in tracked)]
        params = [
            {"params": tracked, "scale_invariant": True},
            {"params": rest, "scale_invariant": False, "lr": 0.02, "weight_decay": 0.0},
        ]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, **options}
    return net, ELRSGD(params, foreach=False if not fused else None, fused=fused or None, **options)


def assert_same_nets(a: nn.Module, b: nn.Module, rtol: float = 2e-4) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        error = (p - q).norm() / q.norm()
        assert error < rtol, f"{name} differs by {error:.1e}"


OPTIONS: list[dict[str, Any]] = [
    {},
    {"flagged": True},
    {"project": True, "dampening": 0.3},
    {"flagged": True, "momentum": 0.0},
    {"nesterov": True},
]


@pytest.fixture(params=["two launches"] if INTERPRETED else ["two launches", "one launch"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU these small nets would otherwise always go in one cooperative launch."""
    if request.param == "two launches":
        monkeypatch.setattr(step_module, "max_programs", lambda device: 0)


UPDATE_OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("uniform", "layer", {"elr_of": "update"}),
    ("uniform", "layer", {"elr_of": "update", "flagged": True, "nesterov": True}),
    ("angle", "layer", {"elr_of": "update", "flagged": True, "momentum": 0.0}),
    ("angle", "network", {"elr_of": "update", "dampening": 0.3}),
    ("equilibrium", "layer", {"flagged": True, "dampening": 0.3}),
    ("equilibrium", "network", {"elr_of": "gradient", "flagged": True}),
]


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(
    ("rule", "granularity", "options"),
    [*((*rule, options) for rule in GRADIENT_RULES for options in OPTIONS), *UPDATE_OPTIONS],
    ids=str,
)
def test_twelve_steps_agree_with_the_reference(
    rule: str | None, granularity: str, options: dict[str, Any]
) -> None:
    """Long enough for the radial tests to end; one gradient is missing now and then, all move in memory."""
    nets = []
    for fused in (True, False):
        lr = 0.05 if rules.RULES[rule].lr_unit == "lr" else 0.01
        net, optimizer = net_and_optimizer(fused, rule=rule, granularity=granularity, lr=lr, **options)
        kept = []
        for step in range(12):
            backward(net, step)
            kept.append([p.grad for p in net.parameters()])  # so that the next ones are elsewhere
            if step in (3, 7, 10):
                net[3].weight.grad = None
            optimizer.step()
        nets.append(net)
    assert_same_nets(*nets)


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("options", [{"flagged": True}, {"project": True, "dampening": 0.3}], ids=str)
@pytest.mark.parametrize(("rule", "granularity"), [*GRADIENT_RULES[1:4], GRADIENT_RULES[-1]], ids=str)
def test_rows_of_several_chunks_agree_with_the_reference(
    rule: str, granularity: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial sums, carried ones too, are found by row and chunk; the last chunk of each tensor is not full."""
    monkeypatch.setattr(tables, "CHUNK", 16)
    nets = []
    for fused in (True, False):
        net = bn_mlp(depth=3, width=9).to(DEVICE)
        tracked = invariant_weights(net)
        rest = [p for p in net.parameters() if all(p is not w for w in tracked)]
        groups = [{"params": rest, "scale_invariant": False}, {"params": tracked, "scale_invariant": True}]
        chosen = {k: v for k, v in options.items() if k != "flagged"}
        optimizer = ELRSGD(
            groups, lr=0.01, momentum=0.9, rule=rule, granularity=granularity, **chosen,
            fused=fused or None, foreach=None if fused else False,
        )  # fmt: skip
        for step in range(4):
            backward(net, step)
            optimizer.step()
        nets.append(net)
    assert_same_nets(*nets)


@pytest.mark.parametrize("rule", [None, "uniform", "angle"])
def test_projected_nesterov_steps_beside_a_group_with_dampening(rule: str | None) -> None:
    """A new buffer takes the whole of its first gradient: with dampening, which Nesterov momentum does not have, more
    than at later steps."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(6, 7, device=DEVICE)) for _ in range(4)]
        kinds = [{"nesterov": True}, {"dampening": 0.5}, {}, {"dampening": -0.5}]
        groups = [
            {"params": [p], "scale_invariant": True, **kind} for p, kind in zip(params, kinds, strict=True)
        ]
        optimizer = ELRSGD(
            groups, lr=0.05, momentum=0.9, rule=rule, project=True,
            fused=fused or None, foreach=None if fused else False,
        )  # fmt: skip
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results)


def test_the_warmup_ends_at_the_same_step_as_in_the_reference() -> None:
    """Both take the gradients of one net: with its own each would sooner or later have another sign at some ReLU, which
    is a difference of 1 % at once (a last bit of the initial weights does the same to the reference alone)."""
    nets, optimizers = zip(*(net_and_optimizer(fused, depth=6) for fused in (True, False)), strict=True)
    ends = [0, 0]
    for step in range(70):
        backward(nets[0], step)
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            q.grad = p.grad.clone()
        for i, optimizer in enumerate(optimizers):
            optimizer.step()
            ends[i] += int(optimizer.state[nets[i][0].weight]["handed_over"].item() == 0)
    assert ends[0] == ends[1]
    assert 8 < ends[0] < 70
    assert_same_nets(*nets, rtol=1e-5)


def test_layers_that_join_after_the_warmup_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a host asks a GPU for its end only now and then: taking over a state, it reads that of the warm-up too."""

    class OnAGPU(_rule_group.WarmupEndPoll):
        def __init__(self, flag: Tensor, **options: Any) -> None:
            super().__init__(flag, **options)
            if INTERPRETED:  # there it would look at the flag itself
                self.copy = torch.zeros(())
                self.value = self.copy.numpy()

    monkeypatch.setattr(_rule_group, "WarmupEndPoll", OnAGPU)
    net = bn_mlp(depth=4, width=8).to(DEVICE)
    first, *others = invariant_weights(net)
    optimizer = ELRSGD([{"params": others, "scale_invariant": True}], lr=0.05, momentum=0.9, fused=True)
    backward(net, 0)
    optimizer.step()
    optimizer.state[others[0]]["handed_over"].fill_(1.0)
    optimizer.add_param_group({"params": [first, net[-1].weight]})
    for step in range(1, RADIAL_TESTS + 1):
        backward(net, step)
        optimizer.step()
    assert optimizer.state[first]["tracked"] == RADIAL_TESTS
    assert optimizer.state[net[-1].weight]["tracked"] == -1


def test_layer_stats_are_those_of_the_reference() -> None:
    tables_of = []
    for fused in (True, False):
        net, optimizer = net_and_optimizer(fused, rule="uniform", flagged=True)
        for step in range(3):
            backward(net, step)
            optimizer.step()
        tables_of.append((effective_lrs(optimizer), layer_stats(optimizer)))
    (elrs, rows), (expected_elrs, expected_rows) = tables_of
    assert elrs.keys() == expected_elrs.keys()
    for name, elr in elrs.items():
        assert elr == pytest.approx(expected_elrs[name], rel=1e-4)
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.weight_norm == pytest.approx(expected.weight_norm, rel=1e-5)
        assert row.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


def bytes_of_step(net: nn.Sequential, optimizer: ELRSGD, step: int) -> dict[str, float]:
    """Bytes per element that a step reads of and writes to the weight of the first layer, and of the head."""
    backward(net, step)
    weights = {"layer": net[0].weight, "head": net[-1].weight}
    parts = {name: [p, p.grad, optimizer.state[p]["momentum_buffer"]] for name, p in weights.items()}
    with bytes_touched([t for ts in parts.values() for t in ts]) as touched:
        optimizer.step()
    counts = [touched["read", i] + touched["write", i] for i in range(6)]
    return {name: sum(counts[3 * i : 3 * i + 3]) / p.numel() for i, (name, p) in enumerate(weights.items())}


@interpreted
@pytest.mark.parametrize("rule", ["warmup", "uniform", "angle", "sphere"])
def test_24_bytes_once_the_norm_is_carried(rule: str) -> None:
    net, optimizer = net_and_optimizer(True, flagged=True, rule=rule, lr=0.01)
    backward(net, 0)
    optimizer.step()
    assert bytes_of_step(net, optimizer, 1) == {"layer": 24, "head": 20}
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    assert bytes_of_step(net, optimizer, 2)["layer"] == 28  # somebody wrote to it
    assert bytes_of_step(net, optimizer, 3)["layer"] == 24
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert bytes_of_step(net, optimizer, 4)["layer"] == 28
    net[0].weight.data = net[0].weight.data.clone()
    assert bytes_of_step(net, optimizer, 5)["layer"] == 28
    params = [p for p in net.parameters() if p.dim() > 1][:1]
    grads = [p.grad for p in params]
    assert kernels.bytes_moved(params, grads, grads, measure="grad") == 24 * params[0].numel()


@interpreted
@pytest.mark.parametrize("rule", ["uniform", "angle", "equilibrium"])
def test_28_bytes_on_the_update_once_the_norm_is_carried(rule: str) -> None:
    net, optimizer = net_and_optimizer(True, flagged=True, rule=rule, elr_of="update", lr=0.01)
    backward(net, 0)
    optimizer.step()
    head = 28 if rule == "equilibrium" else 20  # its size and its update are measured too: `protect`
    assert bytes_of_step(net, optimizer, 1) == {"layer": 28, "head": head}
    with torch.no_grad():
        optimizer.state[net[0].weight]["momentum_buffer"].mul_(0.5)
    assert bytes_of_step(net, optimizer, 2)["layer"] == 32  # somebody wrote to it
    assert bytes_of_step(net, optimizer, 3)["layer"] == 28
    params = [net[0].weight]
    grads = [p.grad for p in params]
    assert kernels.bytes_moved(params, grads, grads, measure="momentum") == 28 * params[0].numel()


@interpreted
def test_on_the_update_the_radial_tests_read_weights_and_failed_layers_are_never_read_again() -> None:
    net, optimizer = net_and_optimizer(
        True, rule="uniform", elr_of="update", lr=1.0
    )  # each test counts in full
    backward(net, 0)
    optimizer.step()
    counts = [bytes_of_step(net, optimizer, step) for step in range(1, RADIAL_TESTS + 2)]
    assert [c["layer"] for c in counts] == [32] * (RADIAL_TESTS - 1) + [28] * 2
    assert counts[-1]["head"] == 20


@interpreted
def test_28_bytes_with_project() -> None:
    net, optimizer = net_and_optimizer(True, flagged=True, rule="uniform", project=True)
    backward(net, 0)
    optimizer.step()
    assert bytes_of_step(net, optimizer, 1) == {"layer": 28, "head": 20}
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    assert bytes_of_step(net, optimizer, 2)["layer"] == 32


@interpreted
def test_20_bytes_without_a_rule_and_after_the_warmup() -> None:
    net, optimizer = net_and_optimizer(True, rule=None)
    backward(net, 0)
    optimizer.step()
    assert bytes_of_step(net, optimizer, 1) == {"layer": 20, "head": 20}
    net, optimizer = net_and_optimizer(True, rule="warmup")
    for step in range(RADIAL_TESTS):  # what is left of them is measured even after the warm-up
        backward(net, step)
        optimizer.step()
    optimizer.state[net[0].weight]["handed_over"].fill_(1.0)
    assert bytes_of_step(net, optimizer, RADIAL_TESTS) == {"layer": 20, "head": 20}


@interpreted
def test_the_radial_tests_read_weights_for_8_steps_and_failed_layers_never_again() -> None:
    net, optimizer = net_and_optimizer(True, rule="uniform")
    counts = []
    for step in range(RADIAL_TESTS + 2):
        if step == 0:
            backward(net, 0)
            optimizer.step()
        else:
            counts.append(bytes_of_step(net, optimizer, step))
    assert [c["layer"] for c in counts] == [28] * (RADIAL_TESTS - 1) + [24] * 2
    assert counts[-1]["head"] == 20


@interpreted
def test_a_write_that_no_version_counter_sees_is_noticed_one_step_late() -> None:
    """A documented limit: writes through `.data`."""
    net, optimizer = net_and_optimizer(True, flagged=True, rule="angle", lr=0.01)
    for step in range(2):
        backward(net, step)
        optimizer.step()
    weight = net[0].weight
    radius = optimizer.state[weight]["radius"].item()
    weight.data.mul_(3.0)
    norms = []
    for step in range(2, 4):
        backward(net, step)
        optimizer.step()
        norms.append(weight.norm().item() / radius)
    assert norms[0] == pytest.approx(3.0, rel=1e-2)
    assert norms[1] == pytest.approx(1.0, rel=1e-2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [16, 4096])
@pytest.mark.parametrize("options", [{}, {"project": True}, {"elr_of": "update"}], ids=str)
def test_the_carried_sums_are_those_that_would_be_measured(
    options: dict[str, Any], chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is stored: rounded."""
    monkeypatch.setattr(tables, "CHUNK", chunk)
    results = []
    for forget in (False, True):
        net, optimizer = net_and_optimizer(True, flagged=True, rule="uniform", dtype=dtype, **options)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            if forget and step > 0:
                optimizer._rule_groups[0].last.triton_step.launches.versions = None  # type: ignore[index,union-attr]
            optimizer.step()
        results.append(list(net.parameters()))
    assert all(map(torch.equal, *results))


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    launches: list[str] = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(step_module, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(self.name)
            return self.kernel[grid]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("measure_kernel", "update_kernel", "cooperative_kernel"):
            patch.setattr(step_module, name, Counting(name))
        yield launches


def test_one_launch_to_measure_and_one_to_update_whatever_the_groups() -> None:
    net = bn_mlp(depth=5, width=8).to(DEVICE)
    groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(net.parameters())]
    optimizer = ELRSGD(groups, lr=0.1, momentum=0.9, rule="uniform", fused=True)
    with counted_launches() as launches:
        for step in range(2):
            backward(net, step)
            optimizer.step()
    expected = (
        ["cooperative_kernel"] if "cooperative_kernel" in launches else ["measure_kernel", "update_kernel"]
    )
    assert launches == expected * 2


def steps_of_many_groups(
    rule: str | None, project: bool, dampening: float, lr_as: str, steps: int = 4
) -> list[Tensor]:
    """Weights and buffers after some steps with 12 groups, none like another, half of whose learning rates change."""
    net = bn_mlp(depth=5, width=8).to(DEVICE)
    lrs = [0.01 * (i + 1) for i in range(12)]
    groups: list[dict[str, Any]] = [
        {
            "params": [p],
            "lr": torch.tensor(lr, device=DEVICE) if lr_as == "tensor" or (lr_as == "both" and i % 3) else lr,
            "weight_decay": 1e-3 * (i % 3),
            "momentum": 0.5 + 0.03 * i,
            "dampening": dampening * (i % 2),
        }
        for i, (p, lr) in enumerate(zip(net.parameters(), lrs, strict=False))
    ]
    assert len(groups) == 12
    optimizer = ELRSGD(groups, rule=rule, project=project, fused=True)
    for step in range(steps):
        for i, group in enumerate(optimizer.param_groups[::2]):
            lr = lrs[2 * i] / (step // 2 + 1)  # changes at every second step
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        backward(net, step)
        optimizer.step()
    buffers = [optimizer.state[p]["momentum_buffer"] for group in groups for p in group["params"]]
    return [p.detach() for group in groups for p in group["params"]] + buffers


@pytest.mark.parametrize("lr_as", ["float", "both"])
@pytest.mark.parametrize(
    ("rule", "project", "dampening"),
    [(None, False, 0.0), (None, True, 0.5), ("warmup", True, 0.3), ("uniform", False, 0.0)],
)
def test_many_groups_give_the_bits_that_they_give_by_value(
    rule: str | None, project: bool, dampening: float, lr_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_table = steps_of_many_groups(rule, project, dampening, lr_as)
    monkeypatch.setattr(hyper_module, "MAX_BY_VALUE", 12)
    by_value = steps_of_many_groups(rule, project, dampening, "float")
    assert all(map(torch.equal, by_table, by_value))


def test_the_table_of_many_groups_is_uploaded_when_a_value_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uploads = []
    upload = hyper_module.upload
    monkeypatch.setattr(
        hyper_module, "upload", lambda array, device: uploads.append(array) or upload(array, device)
    )
    steps_of_many_groups("uniform", False, 0.0, "float", steps=6)
    assert len(uploads) == 3  # learning rates change at every second step
    uploads.clear()
    steps_of_many_groups("uniform", False, 0.0, "tensor", steps=6)
    assert len(uploads) == 1


def test_a_captured_step_uploads_the_table_from_memory_of_its_own() -> None:
    hypers = tuple(kernels.GroupHyper(0.9, 0.0, 1e-3 * i, 1.0, 1.0, 0.9) for i in range(9))
    lrs: list[float | Tensor] = [0.1 * i for i in range(8)]
    lrs.append(torch.tensor(0.25, device=DEVICE))
    of_graph = hyper_module.HyperArguments(9, torch.device(DEVICE))
    pinned = torch.empty(of_graph.table.shape)
    for _ in range(2):  # the same step once more
        arguments = of_graph.of(lrs, hypers, pinned)
    torch.testing.assert_close(arguments.lrs[:9].cpu(), torch.tensor([float(lr) for lr in lrs]))
    torch.testing.assert_close(
        arguments.measure.decays[:9].cpu(), torch.tensor([h.weight_decay for h in hypers])
    )
    torch.testing.assert_close(pinned[0, :8], torch.tensor(lrs[:8]))
    with pytest.raises(RuntimeError, match="changed between two steps that are captured"):
        of_graph.of([0.5, *lrs[1:]], hypers, pinned)


@pytest.mark.parametrize("value", ["a float", "a tensor"])
def test_a_learning_rate_of_many_that_becomes_a_tensor_or_a_float_again(value: str) -> None:
    params = [nn.Parameter(torch.ones(3, device=DEVICE)) for _ in range(9)]
    optimizer = ELRSGD([{"params": [p]} for p in params], lr=0.5, rule=None, fused=True)
    group = optimizer.param_groups[4]
    expected = 1.0
    lrs = [0.5, torch.tensor(0.25, device=DEVICE), 0.0, 0.5]
    for lr in lrs if value == "a tensor" else reversed(lrs):
        group["lr"] = lr
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        expected -= float(lr)
        assert params[4].tolist() == [expected] * 3


def test_a_launch_for_each_combination_of_dtypes() -> None:
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.randn(3, 40, device=DEVICE).to(dtype))
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32)
        ]
        for p in params:
            p.grad = torch.randn(3, 40, device=DEVICE).to(p.dtype)
        optimizer = ELRSGD(
            [{"params": params, "scale_invariant": True}],
            lr=0.01, rule="uniform", foreach=False if not fused else None, fused=fused or None,
        )  # fmt: skip
        with counted_launches() as launches:
            optimizer.step()
        if fused:
            assert sorted(launches) == ["measure_kernel"] * 3 + ["update_kernel"] * 3
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 if a.dtype == torch.bfloat16 else 2e-3)
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b)


@interpreted
@pytest.mark.parametrize(
    ("rule", "granularity", "options"),
    [
        *(
            (*rule, options)
            for rule in GRADIENT_RULES[1:]
            for options in [*OPTIONS[:3], {"maximize": True, "momentum": 0.0}]
        ),
        ("uniform", "layer", {"elr_of": "update", "maximize": True}),
        ("angle", "network", {"elr_of": "update", "momentum": 0.0}),
        ("equilibrium", "layer", {"dampening": 0.3}),
    ],
    ids=str,
)
def test_the_cooperative_kernel_computes_the_same(
    rule: str, granularity: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one program: the interpreter runs them one after the other, and each would wait for the next."""
    results = []
    options = {k: v for k, v in options.items() if k != "flagged"}
    for cooperates in (False, True):
        monkeypatch.setattr(step_module, "max_programs", lambda device, yes=cooperates: int(yes))
        w = nn.Parameter(torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE))
        optimizer = ELRSGD(
            [{"params": [w], "scale_invariant": True}], lr=0.1, rule=rule, granularity=granularity,
            **{"momentum": 0.9, "weight_decay": 0.01, **options}, fused=True,
        )  # fmt: skip
        with counted_launches() as launches:
            for step in range(3):
                w.grad = torch.randn(30, 20, generator=torch.Generator().manual_seed(step + 1)).to(DEVICE)
                optimizer.step()
            optimizer.grad_scale = torch.tensor(64.0, device=DEVICE)  # type: ignore[attr-defined]
            w.grad *= 64  # type: ignore[operator]
            for found_inf in (1.0, 0.0):
                optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)  # type: ignore[attr-defined]
                before = w.detach().clone()
                optimizer.step()
                assert torch.equal(before, w) == (found_inf == 1.0)
        assert ("cooperative_kernel" in launches) == cooperates
        if cooperates:
            tensors = [
                w,
                w.grad,
                *([optimizer.state[w]["momentum_buffer"]] if options.get("momentum", 1) else []),
            ]
            with bytes_touched(tensors) as touched:
                optimizer.step()
            extra = 4 if options.get("dampening") else 0  # one element of m, to see whether it is new
            of_update = options.get("elr_of") == "update" or rule == "equilibrium"
            if (options.get("project") or of_update) and len(tensors) == 3:  # m again, from the cache
                extra += 4 * w.numel()
            assert sum(touched.values()) == (4 + 4 + 4 + (8 if len(tensors) == 3 else 0)) * w.numel() + extra
        else:
            optimizer.step()
        results.append([w.detach(), *optimizer.state[w].values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("tracked_first", [True, False])
def test_the_gate_opens_when_the_last_program_has_arrived(
    tracked_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it has rows or not. Here the programs do not wait, so only their arrivals are looked at."""
    from triton.runtime import interpreter

    monkeypatch.setattr(step_module, "max_programs", lambda device: 1000)
    monkeypatch.setattr(tables, "CHUNK", 64)
    net = bn_mlp(depth=3, width=12).to(
        DEVICE
    )  # several programs for some tensors; biases and gains without rows
    tracked = invariant_weights(net)
    rest = [p for p in net.parameters() if all(p is not w for w in tracked)]
    groups = [{"params": tracked, "scale_invariant": True}, {"params": rest, "scale_invariant": False}]
    optimizer = ELRSGD(groups[:: 1 if tracked_first else -1], lr=0.1, rule="uniform", fused=True)
    backward(net, 0)
    opened_after: list[int] = []
    reads = 0
    atomic_rmw, step = interpreter._interpreter.atomic_rmw, step_module.FusedStep.step
    stepping: list[Any] = []

    def noted(fused_step: Any, *arguments: Any, **options: Any) -> None:
        stepping.append(fused_step)
        step(fused_step, *arguments, **options)

    def without_waiting(op: Any, pointers: Any, values: Any, mask: Any, sem: Any) -> Any:
        nonlocal reads
        result = atomic_rmw(op, pointers, values, mask, sem)
        if int(pointers[0]) == stepping[-1].gate.data_ptr():
            reads += int(values[0]) == 0
            if int(values[0]) == 1:
                opened_after.append((reads + 1) // 2)  # each program reads it before and after
            elif reads % 2 == 0:
                result = result + 2  # anything else than before
        return result

    with monkeypatch.context() as patch, counted_launches() as launches:
        patch.setattr(interpreter._interpreter, "atomic_rmw", without_waiting)
        patch.setattr(step_module.FusedStep, "step", noted)
        for _ in range(2):
            optimizer.step()
    kernels_of = optimizer._rule_groups[0].last.triton_step.launches  # type: ignore[index,union-attr]
    programs = kernels_of.launches[0].table.n_chunks
    assert launches == ["cooperative_kernel"] * 2
    assert programs > kernels_of.launches[0].table.n_measured > len(tracked)
    assert opened_after == [programs, 2 * programs]
    assert kernels_of.gate.item() == 2
    assert (kernels_of.counters == 0).all()


def test_pointers_that_stay_upload_nothing_and_moved_parameters_are_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uploads = []
    addresses_with = launches_module.Launch.addresses_with
    monkeypatch.setattr(
        launches_module.Launch, "addresses_with", lambda *args: uploads.append(1) or addresses_with(*args)
    )
    net, optimizer = net_and_optimizer(True, rule="uniform", flagged=True)
    backward(net, 0)
    optimizer.step()
    fused = optimizer._rule_groups[0].last.triton_step  # type: ignore[index]
    assert fused is not None
    grads = [p.grad for p in net.parameters()]
    optimizer.step()
    assert uploads == []
    for p in net.parameters():
        p.grad = p.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    assert uploads == [1]
    assert optimizer._rule_groups[0].last.triton_step is fused  # type: ignore[index]
    del grads
    for p in net.parameters():
        p.data = p.data.clone()
    backward(net, 2)
    before = net[0].weight.clone()
    optimizer.step()
    assert not torch.equal(before, net[0].weight)
    assert optimizer._rule_groups[0].last.triton_step is not fused  # type: ignore[index]
    # a replaced buffer
    weight = net[0].weight
    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    backward(net, 3)
    grad = weight.grad.clone()
    optimizer.step()
    direction = optimizer.state[weight]["momentum_buffer"].flatten()
    assert torch.cosine_similarity(direction, grad.flatten(), dim=0) > 0.99


def test_a_plan_changes_nothing() -> None:
    net, optimizer = net_and_optimizer(True, rule="uniform", flagged=True)
    backward(net, 0)
    optimizer.step()
    step = optimizer._rule_groups[0].last.triton_step.launches  # type: ignore[index,union-attr]
    held, addresses = dict(vars(step)), [t.clone() for t in step.addresses]
    grads = [p.grad for p in step.params]
    moved = [g.clone() for g in grads]  # type: ignore[union-attr]
    assert step.plan(grads) == kernels.StepPlan(step.grad_pointers, in_capture=False)
    assert step.plan(moved) == kernels.StepPlan(tuple(g.data_ptr() for g in moved), in_capture=False)
    assert step.plan([g.double() for g in moved]) is None
    assert vars(step) == held
    assert all(map(torch.equal, step.addresses, addresses))


def everything(net: nn.Module, optimizer: ELRSGD) -> list[Tensor]:
    state = [t.clone() for p in net.parameters() for t in optimizer.state[p].values()]
    return [*(p.detach().clone() for p in net.parameters()), *state]


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("dampening", [0.0, 0.3])
@pytest.mark.parametrize(
    ("rule", "project"), [(None, False), ("warmup", False), ("uniform", True), ("angle", False)]
)
def test_grad_scaler(rule: str | None, project: bool, dampening: float) -> None:
    """Overflows at the first and at a later step: as if these steps had not been there."""
    results = []
    for amp in (True, False):
        net, optimizer = net_and_optimizer(True, rule=rule, project=project, dampening=dampening, lr=0.01)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=amp, growth_interval=3)
        scaler.scale(torch.ones((), device=DEVICE))  # makes the scale
        for step in range(6):
            overflows = step in (0, 3)
            if overflows and not amp:
                continue
            backward(net, step, scale=scaler.get_scale())
            if overflows:
                net[3].weight.grad[0, 0] = math.inf
                before = everything(net, optimizer)
            scaler.step(optimizer)
            scaler.update()
            if overflows and step > 0:
                assert all(map(torch.equal, everything(net, optimizer), before))
            if step == 0:
                for p, value in zip(net.parameters(), before, strict=False):
                    assert torch.equal(p, value)
                    assert (optimizer.state[p]["momentum_buffer"] == 0).all()
        results.append(net)
        assert optimizer._step_supports_amp_scaling
    assert_same_nets(*results, rtol=1e-6)


def test_grad_scaler_with_the_other_backends() -> None:
    results = []
    for amp in (True, False):
        net, optimizer = net_and_optimizer(False, rule="uniform")
        assert not optimizer._step_supports_amp_scaling
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=amp)
        scaler.scale(torch.ones((), device=DEVICE))
        for step in range(3):
            backward(net, step, scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        results.append(net)
    assert_same_nets(*results, rtol=1e-6)


def test_grad_scaler_where_only_some_groups_qualify_for_the_kernels() -> None:
    """The scaler leaves unscaling to the optimizer, which then does it for all."""
    results = []
    for amp in (True, False):
        net = bn_mlp(depth=2, width=8).to(DEVICE)
        fused, rest = list(net[0].parameters()), list(net[1:].parameters())
        optimizer = ELRSGD(
            [{"params": fused, "fused": True, "rule": None}, {"params": rest, "foreach": True, "rule": "uniform"}],
            lr=0.05, momentum=0.9,
        )  # fmt: skip
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=amp)
        scaler.scale(torch.ones((), device=DEVICE))
        type_of = type(optimizer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type_of, "_step_supports_amp_scaling", True)
            for step in range(4):
                if step == 1 and not amp:
                    continue
                backward(net, step, scale=scaler.get_scale())
                if step == 1:
                    net[0].weight.grad[0, 0] = math.nan
                scaler.step(optimizer)
                scaler.update()
        results.append(net)
    assert_same_nets(*results, rtol=1e-6)


@pytest.mark.parametrize("rule", [None, "uniform", "warmup"])
def test_a_tensor_lr_gives_the_bits_of_a_float(rule: str | None) -> None:
    results = []
    for as_tensor in (False, True):
        net, optimizer = net_and_optimizer(True, rule=rule)
        if as_tensor:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.05, device=DEVICE)
        for step in range(4):
            lr = 0.05 / (step + 1)
            if as_tensor:
                optimizer.param_groups[0]["lr"].fill_(lr)
            else:
                optimizer.param_groups[0]["lr"] = lr
            backward(net, step)
            optimizer.step()
        results.append(list(net.parameters()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dampening", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_new_buffer_takes_the_whole_gradient_in_every_bit(dtype: torch.dtype, dampening: float) -> None:
    g = torch.tensor([1.0, -2.5, 0.0, -0.0, 1e-7, torch.inf, -torch.inf], device=DEVICE).to(dtype)
    buffers: list[Tensor | None] = [None]
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    kernels.update([torch.zeros_like(g)], [g], buffers, dampening=dampening, **hyper)
    assert torch.equal(buffers[0], g)  # type: ignore[arg-type]
    if dampening == 0:
        assert torch.equal(torch.signbit(buffers[0]), torch.signbit(g))  # type: ignore[arg-type]
    kernels.update([torch.zeros_like(g)], [g], buffers, dampening=dampening, **hyper)
    expected = (1.9 - dampening) * g[:2].float()
    torch.testing.assert_close(buffers[0][:2].float(), expected, rtol=2e-3, atol=0)  # type: ignore[index]
    if dampening != 0:  # an entry that has seen a gradient of zero is not new
        kernels.update([torch.zeros_like(g)], [torch.ones_like(g)], buffers, dampening=dampening, **hyper)
        assert buffers[0][2:4].tolist() == [0.5, 0.5]  # type: ignore[index]


def rounded_run(seed: int | None, steps: int, resume_at: int | None = None, value: float = 1.0) -> Tensor:
    p = nn.Parameter(torch.full((64, 64), value, dtype=torch.bfloat16, device=DEVICE))
    make = lambda: ELRSGD([p], lr=1.0, rule=None, fused=True, stochastic_rounding=seed)  # noqa: E731
    optimizer = make()
    for step in range(steps):
        if step == resume_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make()
            optimizer.load_state_dict(state)
        p.grad = torch.full_like(p, 2.0**-10)  # an eighth of the distance between neighbours below 1
        optimizer.step()
    return p.detach()


def test_stochastic_rounding_is_unbiased() -> None:
    steps, spacing = 16, 2.0**-8
    if not INTERPRETED:  # which does not round to the nearest
        ones = torch.ones(64, 64, device=DEVICE).bfloat16()
        assert torch.equal(rounded_run(None, steps), ones)  # every update is lost
    result = rounded_run(0, steps).double()
    once = rounded_run(0, 1).double()
    assert set(once.unique().tolist()) == {1.0, 1.0 - spacing}
    # the first step is Bernoulli: down with probability 1/4; all entries independent
    share, n = (once < 1).double().mean().item(), once.numel()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    error = (result.mean().item() - (1 - steps * 2.0**-10)) / spacing
    assert abs(error) < 4 * math.sqrt(steps * 0.25 / n)
    neighbours = torch.corrcoef(torch.stack([once[:, :-1].flatten(), once[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(n)


def test_stochastic_rounding_can_be_repeated_and_resumed() -> None:
    first = rounded_run(3, 4)
    assert torch.equal(first, rounded_run(3, 4))
    assert torch.equal(first, rounded_run(3, 4, resume_at=2))
    assert not torch.equal(first, rounded_run(4, 4))
    once, twice = rounded_run(3, 1), rounded_run(3, 2)
    assert not torch.equal(once < 1, twice < once)  # other bits at every step


@pytest.mark.parametrize("value", [0.0, -3.0, 1e38, math.inf, -math.inf, math.nan])
def test_stochastic_rounding_of_special_values(value: float) -> None:
    result = rounded_run(0, 1, value=value).float()
    if math.isfinite(value):
        assert (result - value).abs().max() <= max(abs(value) * 2**-7, 2.0**-9)
    else:
        assert torch.equal(result, torch.full_like(result, value)) or result.isnan().all()


def test_stochastic_rounding_leaves_other_dtypes_alone() -> None:
    results = []
    for seed in (None, 0):
        net, optimizer = net_and_optimizer(True, rule="uniform", stochastic_rounding=seed)
        backward(net, 0)
        optimizer.step()
        results.append(list(net.parameters()))
    assert all(map(torch.equal, *results))


def test_stochastic_rounding_where_nothing_has_a_gradient() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ELRSGD([p], lr=0.1, stochastic_rounding=1).step()
    assert (p == 1).all()


def test_stochastic_rounding_without_the_kernels_is_refused() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = ELRSGD([p], lr=0.1, foreach=True, stochastic_rounding=1)
    with pytest.raises(RuntimeError, match="stochastic_rounding needs the Triton kernels"):
        optimizer.step()
    assert (p == 1).all()
    for seed in (-1, 2**63, 0.5, True):
        with pytest.raises(ValueError, match=r"stochastic_rounding=.* is not valid"):
            ELRSGD([p], stochastic_rounding=seed)  # type: ignore[arg-type]


def single(shape: tuple[int, ...] = (6, 5), seed: int = 0, **options: Any) -> tuple[nn.Parameter, ELRSGD]:
    """One tracked parameter with a gradient, and its optimizer."""
    generator = torch.Generator().manual_seed(seed)
    p = nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE))
    p.grad = torch.randn(shape, generator=generator).to(DEVICE)
    options = {"lr": 0.1, "momentum": 0.9, "fused": True, **options}
    return p, ELRSGD([{"params": [p], "scale_invariant": True}], **options)


@pytest.mark.filterwarnings("ignore:invalid value")  # 0·inf, which is then not used
@pytest.mark.parametrize("rule", [None, "uniform"])
def test_a_group_without_decay_beside_one_with_it(rule: str | None) -> None:
    """0·w would make NaN of an infinite weight, and +0 of −0."""
    results = []
    for fused in (True, False):
        params = [single(seed=i)[0] for i in range(2)]
        with torch.no_grad():
            params[1][0, 0] = torch.inf
        params[1].grad[1] = -0.0  # type: ignore[index]
        groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(params, (0.1, 0.0), strict=True)]
        optimizer = ELRSGD(
            groups, lr=0.1, momentum=0.9, rule=rule, fused=fused or None, foreach=None if fused else False
        )
        optimizer.step()
        results.append([t.detach() for p in params for t in (p, optimizer.state[p]["momentum_buffer"])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(torch.signbit(a), torch.signbit(b))


def test_a_tracked_parameter_without_elements() -> None:
    p, optimizer = single((0, 3), rule="uniform", project=True, dampening=0.5)
    for _ in range(2):
        optimizer.step()
    assert p.shape == (0, 3)


@pytest.mark.parametrize("rule", ["warmup", "uniform", "angle", "sphere"])
@pytest.mark.parametrize("size", [1e-23, 0.0])
def test_a_gradient_whose_square_is_no_normal_float_counts_as_zero(rule: str, size: float) -> None:
    for fused in (True, False):
        p, optimizer = single(rule=rule, fused=fused or None, foreach=None if fused else False, momentum=0.0)
        p.grad.fill_(size)  # type: ignore[union-attr]
        before = p.detach().clone()
        for _ in range(2):
            optimizer.step()
        torch.testing.assert_close(p.detach(), before)


def test_a_launch_that_is_interrupted_leaves_nothing_counted() -> None:
    results = []
    for interrupted in (False, True):
        params = [single((8, 9), seed=i)[0] for i in range(2)]
        params[1].data, params[1].grad = params[1].data.bfloat16(), params[1].grad.bfloat16()  # type: ignore[union-attr]
        optimizer = ELRSGD([{"params": params, "scale_invariant": True}], lr=0.01, rule="angle", fused=True)
        optimizer.step()
        if interrupted:
            before = [p.detach().clone() for p in params]
            kernel, calls = step_module.measure_kernel, []

            class Interrupted:
                def __getitem__(self, grid: Any, kernel: Any = kernel, calls: list[int] = calls) -> Any:
                    calls.append(1)
                    if len(calls) == 2:
                        raise KeyboardInterrupt
                    return kernel[grid]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(step_module, "measure_kernel", Interrupted())
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step()
            assert all(map(torch.equal, params, before))
        for _ in range(3):
            optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_that_was_prepared_but_not_taken_leaves_no_buffers() -> None:
    """An overflow at the first step, in the path in which the optimizer itself looks at it; then other gradients."""
    results = []
    for overflow in (True, False):
        params = [single(seed=i)[0] for i in range(3)]
        groups = [
            {"params": params[:2], "fused": True, "rule": None},
            {"params": params[2:], "foreach": True, "rule": "uniform", "scale_invariant": True},
        ]
        optimizer = ELRSGD(groups, lr=0.1, momentum=0.9)
        if overflow:
            optimizer.found_inf = torch.ones((), device=DEVICE)  # type: ignore[attr-defined]
            optimizer.step()
            assert all("momentum_buffer" not in optimizer.state[p] for p in params)
            del optimizer.found_inf
        grads = [p.grad for p in params]
        for present in ((0, 1, 2), (0, 2), (0, 1, 2), (1, 2), (0, 1, 2)):
            for i, p in enumerate(params):
                p.grad = grads[i] if i in present else None
            optimizer.step()
        results.append([t.detach() for p in params for t in (p, optimizer.state[p]["momentum_buffer"])])
    assert all(map(torch.equal, *results))


def test_gradients_of_untracked_parameters_alone() -> None:
    for fused in (True, False):
        net, optimizer = net_and_optimizer(fused, flagged=True, rule="uniform")
        for step in range(3):
            backward(net, step)
            if step == 1:
                for p in invariant_weights(net):
                    p.grad = None
                before = net[-1].weight.clone()
            optimizer.step()
            if step == 1:
                assert not torch.equal(before, net[-1].weight)
                assert len(layer_stats(optimizer)) == 0


def test_grad_scaler_without_any_gradient() -> None:
    p, optimizer = single(rule="uniform")
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(torch.ones((), device=DEVICE))
    p.grad = None
    optimizer.found_inf, optimizer.grad_scale = 0, scaler._scale  # type: ignore[attr-defined]
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("when", ["recorded", "after the step"])
def test_what_is_recorded_under_amp_is_not_scaled(when: str) -> None:
    elrs = []
    for scale in (1.0, 1024.0):
        net, optimizer = net_and_optimizer(True, flagged=True, rule=None)
        backward(net, 0, scale=scale)
        optimizer.grad_scale = torch.tensor(scale, device=DEVICE)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.zeros((), device=DEVICE)  # type: ignore[attr-defined]
        if when == "recorded":
            optimizer.record_next_step()
        optimizer.step()
        elrs.append(effective_lrs(optimizer))
    assert elrs[0].keys() == elrs[1].keys()
    for name, elr in elrs[0].items():
        assert elrs[1][name] == pytest.approx(elr, rel=1e-4)


def test_a_record_does_not_change_with_the_next_step() -> None:
    net, optimizer = net_and_optimizer(True, flagged=True, rule="warmup", lr=5.0)
    backward(net, 0)
    optimizer.step()
    (record,) = optimizer.layer_records()
    before = copy.deepcopy((record.controls, record.stats, record.lrs))
    optimizer.param_groups[0]["lr"] = 0.5
    backward(net, 1)
    optimizer.step()
    for a, b in zip(before[0], record.controls, strict=True):
        assert a is b is None or torch.equal(a, b)
    for a, b in zip(before[1], record.stats, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert [float(lr) for lr in before[2]] == [float(lr) for lr in record.lrs]


@pytest.mark.parametrize("rule", [None, "uniform"])
def test_minus_zero_in_a_buffer_of_somebody_else_is_a_value(rule: str | None) -> None:
    """After an SGD checkpoint, and after a change of the dampening in mid-run."""
    results = []
    for fused in (True, False):
        p, optimizer = single(rule=rule, fused=fused or None, foreach=None if fused else False)
        p.grad[0] = -0.0  # type: ignore[index]
        optimizer.step()
        optimizer.param_groups[0]["dampening"] = 0.5
        p.grad.fill_(1.0)  # type: ignore[union-attr]
        optimizer.step()
        results.append(optimizer.state[p]["momentum_buffer"])
    torch.testing.assert_close(*results)


def test_parameters_that_are_rounded_alike_do_not_share_random_bits() -> None:
    flat = [nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device=DEVICE)) for _ in range(2)]
    groups = [{"params": [p], "rule": rule} for p, rule in zip(flat, (None, "uniform"), strict=True)]
    optimizer = ELRSGD(groups, lr=1.0, fused=True, stochastic_rounding=0, rule=None)
    for p in flat:
        p.grad = torch.full_like(p, 2.0**-10)
    optimizer.step()
    down = [(p < 1).double().flatten() for p in flat]
    assert 0.1 < down[0].mean() < 0.4
    assert abs(torch.corrcoef(torch.stack(down))[0, 1]) < 0.1


def test_a_net_that_becomes_bfloat16_in_mid_run_is_rounded_from_then_on() -> None:
    net, optimizer = net_and_optimizer(True, rule="uniform", stochastic_rounding=1)
    backward(net, 0)
    optimizer.step()
    net.bfloat16()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
        optimizer.state[p]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].bfloat16()
    optimizer.step()
    assert optimizer.state[net[0].weight]["rounding_step"] == 2


@interpreted
def test_parameters_that_share_a_version_counter_carry_their_norms() -> None:
    flat = torch.randn(60, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(flat[:30]), nn.Parameter(flat[30:])]
    optimizer = ELRSGD([{"params": params, "scale_invariant": True}], lr=0.1, rule="uniform", fused=True)
    for step in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        with bytes_touched(params) as touched:
            optimizer.step()
        assert touched["read", 0] == (2 if step == 0 else 1) * 4 * 30


@interpreted
@pytest.mark.parametrize("shared", [False, True])
def test_a_norm_is_not_carried_over_steps_without_the_rule(shared: bool) -> None:
    """The warm-up is over for a step, then armed again: that step left no sums."""
    flat = torch.randn(60, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(t if shared else t.clone()) for t in (flat[:30], flat[30:])]
    optimizer = ELRSGD([{"params": params, "scale_invariant": True}], lr=0.1, fused=True)
    reads = []
    for over in (0.0, 0.0, 1.0, 0.0):
        for p in params:
            p.grad = torch.ones_like(p)
            if p in optimizer.state:
                optimizer.state[p]["handed_over"].fill_(over)
        with bytes_touched(params) as touched:
            optimizer.step()
        reads.append(touched["read", 0] / (4 * 30))
    assert reads == [2, 1, 1, 2]


def test_nothing_of_an_optimizer_stays_alive() -> None:
    import weakref

    net, optimizer = net_and_optimizer(True, rule="uniform")
    backward(net, 0)
    optimizer.step()
    alive = [weakref.ref(optimizer), weakref.ref(net[0].weight)]
    del net, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_a_table_that_could_not_be_written_is_written_by_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = nn.Parameter(torch.randn(3, 4, device=DEVICE))
    optimizer = ELRSGD([weight], lr=0.1, rule=None, fused=True)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    before, weight.grad = weight.detach().clone(), torch.ones_like(weight)

    def fails(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(launches_module.Launch, "addresses_with", fails)
        with pytest.raises(MemoryError):
            optimizer.step()
    assert torch.equal(weight, before)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.1)
