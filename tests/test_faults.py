"""Every fault of docs/guide/faults.md: what becomes of the layer that is hit, and that no bit of the others changes."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elropt import ELRSGD, kernels, layer_stats

from .every_rule import has_kernels, needs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: dict[str, dict[str, Any]] = {"reference": {"foreach": False}, "foreach": {"foreach": True}}
if kernels.available():
    BACKENDS["triton"] = {"fused": True}
Case = tuple[Any, ...]
CASES: list[Case] = [  # rule, granularity, project, and elr_of if it is not the rule's own
    (None, "layer", True),
    ("warmup", "layer", False),
    ("warmup", "layer", True),
    ("uniform", "layer", False),
    ("uniform", "filter", True),
    ("angle", "layer", True),
    ("angle", "network", False),
    ("angle", "filter", False),
    ("sphere", "layer", False),
    ("sphere", "network", True),
    ("sphere", "filter", False),
    ("equilibrium", "layer", False),
    ("equilibrium", "filter", True, "gradient"),
    ("uniform", "layer", False, "update"),
    ("angle", "network", False, "update"),
    ("angle", "filter", False, "update"),
]


def cases(*fast: int) -> pytest.MarkDecorator:
    """Every case with every backend; of those that Triton's interpreter takes seconds for, all but a few are slow."""
    combined = [
        pytest.param(case, backend, marks=[pytest.mark.slow] if backend == "triton" and i not in fast else [])
        for backend in BACKENDS
        for i, case in enumerate(CASES)
        if backend != "triton" or has_kernels(case[0], *case[3:])
    ]
    return pytest.mark.parametrize(("case", "backend"), combined, ids=str)


every_backend = pytest.mark.parametrize("backend", BACKENDS)

pytestmark = pytest.mark.filterwarnings(  # of NumPy, which computes for Triton's interpreter
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)


def signs_times(value: float) -> Callable[[Tensor], object]:
    return lambda t: t.sign_().mul_(value)


def one_entry(value: float) -> Callable[[Tensor], object]:
    return lambda t: t[1, :1].fill_(value)


GRADIENTS: dict[str, Callable[[Tensor], object]] = {
    "NaN": lambda g: g.fill_(math.nan),
    "one NaN": one_entry(math.nan),
    "infinite": lambda g: g.fill_(math.inf),
    "one -infinite": one_entry(-math.inf),
    "zero": Tensor.zero_,
    "1e30": signs_times(1e30),
    "huge": signs_times(3e38),
    "1e-30": signs_times(1e-30),
    "denormal": signs_times(1e-40),
}
WEIGHTS: dict[str, Callable[[Tensor], object]] = {
    "NaN": lambda w: w.fill_(math.nan),
    "one NaN": one_entry(math.nan),
    "infinite": lambda w: w.fill_(math.inf),
    "zero": Tensor.zero_,
    "1e30": signs_times(1e30),
    "1e-30": signs_times(1e-30),
    "denormal": signs_times(1e-40),
}


class Net(nn.Module):
    """Two healthy layers, one for each fault (or just one) between them, and one that no rule concerns."""

    def __init__(self, every_fault: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter((scale * torch.randn(shape, generator=generator)).to(DEVICE))

        self.first = weight(3, 5)
        self.bad_gradients = nn.ParameterDict(
            {name: weight(2, 3) for name in (GRADIENTS if every_fault else ["one NaN"])}
        )
        self.bad_weights = nn.ParameterDict({name: weight(2, 3) for name in WEIGHTS if every_fault})
        self.last = weight(2, 3, 2, scale=20)
        self.head = weight(5)

    @property
    def tracked(self) -> list[nn.Parameter]:
        return [self.first, *self.hit.values(), self.last]

    @property
    def healthy(self) -> list[nn.Parameter]:
        return [self.first, self.last, self.head]

    @property
    def hit(self) -> dict[tuple[str, str], nn.Parameter]:
        """By what is at fault and how."""
        gradients = {("gradient", name): p for name, p in self.bad_gradients.items()}
        return gradients | {("weight", name): p for name, p in self.bad_weights.items()}

    @torch.no_grad()
    def spoil(self) -> None:
        for name, p in self.bad_gradients.items():
            GRADIENTS[name](p.grad)
        for name, p in self.bad_weights.items():
            WEIGHTS[name](p)


def make(case: Case, backend: str, *, every_fault: bool = False, **options: Any) -> tuple[Net, ELRSGD]:
    net, (rule, granularity, project, *elr_of) = Net(every_fault), case
    lr = 0.002 if rule == "sphere" else 0.02
    groups = [
        {"params": [net.first], "scale_invariant": True},
        # "equilibrium" holds the head back by the largest angle, which is to be the same without these layers
        {"params": list(net.hit.values()), "scale_invariant": True, "lr": lr if needs(rule) else 10 * lr},
        {"params": [net.last], "scale_invariant": True},
        {"params": [net.head], "scale_invariant": False},
    ]
    hyper = {"lr": lr, "momentum": 0.9, "rule": rule, "granularity": granularity, "project": project}
    hyper |= {"elr_of": elr_of[0] if elr_of else None, **needs(rule)}
    return net, ELRSGD(groups, **{**hyper, **BACKENDS[backend], **options})


def set_gradients(net: Net, step: int) -> None:
    """Random ones, which depend on the step alone: what reaches another layer has gone through the optimizer."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def run(net: Net, optimizer: ELRSGD, steps: range, fault: Callable[[Net], object] = lambda net: None) -> None:
    """Steps, each with the fault."""
    for step in steps:
        set_gradients(net, step)
        fault(net)
        optimizer.step()


def bits(optimizer: ELRSGD, params: list[nn.Parameter]) -> list[Tensor]:
    """Weights and all of their state."""
    held = [value for p in params for value in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*params, *held)]


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(a, b), i


def is_one(name: str) -> bool:
    return name.startswith("one")


@cases(1, 3, 6)
def test_a_fault_stays_in_its_layer(case: Case, backend: str) -> None:
    """The healthy layers are compared with those of the same run without faults, in which the rule is told that the
    layers to be hit are not scale-invariant (with granularity "filter", where one entry is at fault, that filter)."""
    by_filter = case[1] == "filter"
    net, optimizer = make(case, backend, every_fault=True)
    twin, twins_optimizer = make(case, backend, every_fault=True)
    run(net, optimizer, range(2))
    run(twin, twins_optimizer, range(2))
    for (_, name), p in twin.hit.items():
        tracked = twins_optimizer.state[p]["tracked"]
        (tracked[1:] if is_one(name) and by_filter else tracked).fill_(-1)
    for key in net.hit:  # what moves them from now on is the gradient
        for some, its_optimizer in ((net, optimizer), (twin, twins_optimizer)):
            its_optimizer.state[some.hit[key]]["momentum_buffer"].zero_()
    before = {key: p.detach().clone() for key, p in net.hit.items()}
    run(net, optimizer, range(2, 4), Net.spoil)
    run(twin, twins_optimizer, range(2, 4))
    assert_same_bits(bits(optimizer, net.healthy), bits(twins_optimizer, twin.healthy))
    after = {key: p.detach().clone() for key, p in net.hit.items()}
    run(net, optimizer, range(4, 5))
    for key, p in net.hit.items():
        assert_fate(*key, case[0], before[key].cpu(), after[key].cpu(), p.detach().cpu())


def assert_fate(kind: str, name: str, rule: str | None, before: Tensor, after: Tensor, later: Tensor) -> None:
    """What becomes of a layer that is hit for two steps, and then no more for one."""
    message = kind, name
    if "NaN" in name or "infinite" in name:
        wrong = torch.full((2, 3), not is_one(name))
        wrong[1, 0] = True
        assert torch.equal(~torch.isfinite(after), wrong), message
        assert torch.equal(~torch.isfinite(later), wrong), message
        return
    if kind == "gradient" and rule is None and name in ("1e30", "huge"):
        assert (after.abs() > 1e27).all(), message  # as under torch.optim.SGD
        return
    assert torch.isfinite(after).all(), message
    assert torch.isfinite(later).all(), message
    if kind == "weight":
        stays = torch.allclose(after, later, rtol=1e-2, atol=0)  # but for a weight decay
        assert stays == (name == "1e30"), message
    else:
        turned = (1 - torch.cosine_similarity(t.double(), before.double(), dim=1) for t in (after, later))
        assert [bool((t > 1e-10).any()) for t in turned] == [False, True], message


@cases(3)
def test_a_NaN_stays_in_the_momentum(case: Case, backend: str) -> None:
    """Mending the weights is not enough, as with torch.optim.SGD."""
    net, optimizer = make(case, backend)
    run(net, optimizer, range(2))
    good = copy.deepcopy(net.state_dict())
    p = net.bad_gradients["one NaN"]
    run(net, optimizer, range(2, 3), Net.spoil)
    assert torch.isnan(p[1, 0])
    net.load_state_dict(good)
    run(net, optimizer, range(3, 4))
    assert torch.isnan(p[1, 0])
    optimizer.state[p]["momentum_buffer"].zero_()
    net.load_state_dict(good)
    run(net, optimizer, range(4, 6))
    assert all(torch.isfinite(t).all() for t in bits(optimizer, list(net.parameters())))
    assert not torch.equal(p.detach(), good["bad_gradients.one NaN"])


@pytest.mark.parametrize("rule", ["uniform", "angle"])
@every_backend
@pytest.mark.parametrize("way", ["in place", "load_state_dict", "data"])
def test_weights_overwritten_between_steps(rule: str, backend: str, way: str) -> None:
    """They are measured anew, but the kernels notice a write through `.data` one step late, as PyTorch hides it."""
    net, optimizer = make((rule, "layer", False), backend)
    run(net, optimizer, range(2))
    new = 3 * net.first.detach().clone()
    if way == "in place":
        with torch.no_grad():
            net.first.copy_(new)
    elif way == "load_state_dict":
        net.load_state_dict({**net.state_dict(), "first": new})
    else:
        net.first.data.copy_(new)
    for late in (True, False):
        true_norm = net.first.detach().norm().item()
        run(net, optimizer, range(2, 3))
        seen = next(iter(layer_stats(optimizer))).weight_norm
        if late and way == "data" and backend == "triton":
            assert seen == pytest.approx(new.norm().item() / 3, rel=1e-5)
        else:
            assert seen == pytest.approx(true_norm, rel=1e-5)


@cases(3)
def test_a_parameter_that_joins_late(case: Case, backend: str) -> None:
    """As if it had been there from the start without a gradient."""
    there, optimizer = make(case, backend)
    joining, joined = make(case, backend)
    del joined.param_groups[2]

    def none_yet(net: Net) -> None:
        net.last.grad = None

    run(there, optimizer, range(2), none_yet)
    run(joining, joined, range(2), none_yet)
    joined.add_param_group(
        {"params": [joining.last], "scale_invariant": True, "lr": joined.param_groups[0]["lr"]}
    )
    run(there, optimizer, range(2, 4))
    run(joining, joined, range(2, 4))
    assert_same_bits(bits(joined, list(joining.parameters())), bits(optimizer, list(there.parameters())))


@cases(3)
def test_a_parameter_that_is_frozen(case: Case, backend: str) -> None:
    """It and its state stay as they are, and the others step as if the rule knew that it is not scale-invariant."""
    net, optimizer = make(case, backend)
    twin, twins_optimizer = make(case, backend)
    run(net, optimizer, range(2))
    run(twin, twins_optimizer, range(2))
    twins_optimizer.state[twin.first]["tracked"].fill_(-1)
    frozen = bits(optimizer, [net.first])
    net.first.requires_grad_(False)
    run(net, optimizer, range(2, 4), lambda net: setattr(net.first, "grad", None))
    run(twin, twins_optimizer, range(2, 4))
    kept = bits(optimizer, [net.first])
    if case[0] == "warmup":
        names = list(optimizer.state[net.first])
        del frozen[1 + names.index("sphere_grad_norm")], kept[1 + names.index("sphere_grad_norm")]
    assert_same_bits(kept, frozen)
    rest = [[p for name, p in some.named_parameters() if name != "first"] for some in (net, twin)]
    ours, expected = (
        [t for p in params for key, t in {"w": p, **its.state[p]}.items() if key != "handed_over"]
        for its, params in ((optimizer, rest[0]), (twins_optimizer, rest[1]))
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # sums over one row less are rounded otherwise


@every_backend
def test_the_warmup_waits_for_a_missing_gradient_but_not_for_a_frozen_layer(backend: str) -> None:
    for freeze in (False, True):
        generator = torch.Generator().manual_seed(0)
        ws = [nn.Parameter((torch.randn(8, 8, generator=generator) * s).to(DEVICE)) for s in (1, 1.2, 1.3)]
        optimizer = ELRSGD([{"params": ws, "scale_invariant": True}], lr=1e-3, **BACKENDS[backend])
        for step in range(20):
            for w in ws:
                w.grad = torch.randn(8, 8, generator=generator).to(w) / w.detach().norm()
            if step == 3:
                assert optimizer.state[ws[0]]["handed_over"] == 0
            if step >= 3:
                ws[2].grad = None
                ws[2].requires_grad_(not freeze)
            optimizer.step()
        assert bool(optimizer.state[ws[0]]["handed_over"] > 0) == freeze


@pytest.mark.parametrize("rule", ["warmup", "uniform", "angle", "sphere", None])
@pytest.mark.parametrize("backend", ["reference", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_another_dtype_in_mid_run(rule: str | None, backend: str, dtype: torch.dtype) -> None:
    """It goes on, with the momentum buffers it had; a reload of its own state converts them."""
    results = []
    for reload in (False, True):
        net, optimizer = make((rule, "layer", False), backend)
        run(net, optimizer, range(2))
        net.to(dtype)
        if reload:
            optimizer.load_state_dict(optimizer.state_dict())
        run(net, optimizer, range(2, 4))
        buffer = optimizer.state[net.first]["momentum_buffer"]
        assert buffer.dtype == (dtype if reload else torch.float32)
        if rule is not None:
            assert optimizer.state[net.first]["radius"].dtype == torch.float32
        results.append([p.detach().double() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        error = (a - b).norm() / b.norm()
        assert error < 4 * max(torch.finfo(dtype).eps, 1e-7)


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
@pytest.mark.parametrize("rule", [None, "angle"])
def test_the_kernels_refuse_a_dtype_before_anything_moves(rule: str | None) -> None:
    net, optimizer = make((rule, "layer", False), "triton")
    run(net, optimizer, range(2))
    net.double()
    before = bits(optimizer, list(net.parameters()))
    with pytest.raises(RuntimeError, match=r"float64.*fused=None"):
        run(net, optimizer, range(2, 3))
    assert_same_bits(bits(optimizer, list(net.parameters())), before)


@every_backend
@pytest.mark.parametrize("rule", [None, "warmup", "angle"])
def test_a_parameter_and_its_buffer_on_two_devices(rule: str | None, backend: str) -> None:
    """What `model.to(device)` leaves behind in mid-run."""
    net, optimizer = make((rule, "layer", False), backend, fused=None)
    run(net, optimizer, range(2))
    kept = bits(optimizer, [net.first])
    state = optimizer.state[net.last]
    state["momentum_buffer"] = state["momentum_buffer"].to("meta")
    set_gradients(net, 2)
    with pytest.raises(RuntimeError, match=r"its momentum buffer on meta.*load_state_dict"):
        optimizer.step()
    assert_same_bits(bits(optimizer, [net.first]), kept)


@every_backend
@pytest.mark.parametrize("rule", [None, "warmup", "angle"])
def test_a_step_in_inference_mode(rule: str | None, backend: str) -> None:
    """The same step; what it makes of state can be used outside."""
    inside, optimizer = make((rule, "layer", False), backend)
    outside, expected = make((rule, "layer", False), backend)
    with torch.inference_mode():
        run(inside, optimizer, range(1))  # the gradients are inference tensors
    run(inside, optimizer, range(1, 2))
    run(outside, expected, range(2))
    assert_same_bits(bits(optimizer, list(inside.parameters())), bits(expected, list(outside.parameters())))


def test_inference_tensors_are_refused() -> None:
    with torch.inference_mode():
        w = nn.Parameter(torch.ones(2, 2))
        b = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is an inference tensor.*outside"):
        ELRSGD([w])
    optimizer = ELRSGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"shape \(2,\) is an inference tensor"):
        optimizer.add_param_group({"params": [("b", b)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("rule", ["warmup", "uniform", "angle", "sphere"])
@every_backend
def test_two_optimizers_on_one_parameter(rule: str, backend: str) -> None:
    """Both step it, each with a state of its own; neither trusts a norm from before the other's step."""
    net, optimizer = make((rule, "layer", False), backend)
    other = ELRSGD([{"params": net.tracked, "scale_invariant": True}], lr=0.3, rule=None, **BACKENDS[backend])
    for step in range(3):
        set_gradients(net, step)
        norms = [p.detach().norm().item() for p in net.tracked]
        optimizer.step()
        assert list(layer_stats(optimizer)["weight_norm"]) == pytest.approx(norms, rel=1e-5)
        other.step()


@pytest.mark.parametrize("rule", [None, "warmup", "uniform", "angle"])
@pytest.mark.parametrize("foreach", [False, True])
def test_threads_that_step_one_optimizer_take_turns(rule: str | None, foreach: bool) -> None:
    def make_wide() -> tuple[nn.Parameter, ELRSGD]:
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(300, 300, generator=generator))
        w.grad = torch.randn(300, 300, generator=generator)
        groups = [{"params": [w], "scale_invariant": True}]
        return w, ELRSGD(groups, lr=1e-3, momentum=0.9, rule=rule, foreach=foreach)

    def steps(optimizer: ELRSGD, count: int) -> None:
        for _ in range(count):
            optimizer.step()

    w, optimizer = make_wide()
    in_threads([lambda: steps(optimizer, 25)] * 4)
    expected, alone = make_wide()
    steps(alone, 100)
    assert torch.equal(w, expected)


@pytest.mark.parametrize("backend", ["reference", "foreach"])
@pytest.mark.parametrize("rule", ["warmup", "uniform", "angle"])
def test_threads_with_optimizers_of_their_own(rule: str, backend: str) -> None:
    pairs = [make((rule, "layer", False), backend) for _ in range(4)]
    expected, alone = make((rule, "layer", False), backend)
    in_threads([lambda pair=pair: run(*pair, range(20)) for pair in pairs])
    run(expected, alone, range(20))
    for net, optimizer in pairs:
        assert_same_bits(bits(optimizer, list(net.parameters())), bits(alone, list(expected.parameters())))


def in_threads(jobs: list[Callable[[], object]]) -> None:
    """Run them at the same time; raises what one of them raises."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
