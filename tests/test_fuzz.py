"""Random sequences of what users do to an optimizer, each step against the reference backend.

Before every step a new reference optimizer gets the state dict of the one under test, and after it both must agree. So
a state dict must hold all that matters, and nothing that the fast paths keep besides it (norms that are carried over,
tables, caches) may show. Loading, looking and mistakes must not change a bit of it.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from elropt import ELRSGD, effective_lrs, kernels, layer_stats

from .every_rule import FORMS, acts_on_update, has_kernels, needs

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # by Triton's interpreter
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float64: 2e-6, torch.float32: 2e-5, torch.bfloat16: 3e-2}  # factors are float32
SHAPES = [(4, 3), (3, 2, 2, 2), (5, 2), (7,), (2, 1), (), (0, 3)]
RULES = [*FORMS, *[("warmup", "layer", None)] * 2]  # which takes longer than the others to get anywhere
GRADIENTS = ["orthogonal", "random", "none", "as before", "zero", "tiny", "huge", "nan", "inf"]
SIZES = {"tiny": 1e-25, "huge": 1e10}

flags = st.sampled_from([{"scale_invariant": True}, {}, {"scale_invariant": False}])
seeds = st.integers(0, 2**16)
places = st.integers(0, 7)


@st.composite
def hypers(draw: st.DrawFn) -> dict[str, Any]:
    """Hyper-parameters of a param group that go together."""
    rule, granularity, elr_of = draw(st.sampled_from(RULES))
    momentum, dampening = draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from([0.0, 0.3]))
    return {
        "lr": draw(st.sampled_from([0.01, 0.1, 0.5, 0.0])),
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": draw(st.sampled_from([0.0, 1e-3, 0.1][bool(needs(rule)) :])),
        "nesterov": momentum > 0 and dampening == 0 and draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "rule": rule,
        "granularity": granularity,
        "elr_of": elr_of,
        "project": not acts_on_update(rule, elr_of) and draw(st.booleans()),
    }


def random_like(p: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def orthogonal(p: Tensor, g: Tensor) -> Tensor:
    """The part of g that is orthogonal to each filter of p, and so to p."""
    if p.dim() == 0 or p.numel() == 0:
        return torch.zeros_like(g)
    w, d = p.detach().double().reshape(len(p), -1), g.double().reshape(len(p), -1)
    if p.dim() == 1:
        w, d = w.view(1, -1), d.view(1, -1)
    along = (w * d).sum(1, keepdim=True) / w.square().sum(1, keepdim=True).clamp(min=1e-300)
    return torch.empty_like(g).copy_((d - along * w).view(g.shape))


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal, NaN to NaN."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return bool(a == b)


def assert_close(a: Tensor, b: Tensor, before: Tensor | None, rtol: float, what: object) -> None:
    """Equal up to rounding, relative to the norm of b (or 1 % of the norm before, if most of it has cancelled)."""
    a, b = a.detach().double(), b.detach().double()
    finite = a.isfinite()
    assert torch.equal(finite, b.isfinite()), (what, a, b)
    assert same(a[~finite], b[~finite]), (what, a, b)
    scale = b[finite].norm()
    if before is not None:
        scale = scale + 0.01 * before.double()[finite].nan_to_num(0, 0, 0).norm()
    error = (a - b)[finite].norm()
    assert error <= rtol * scale + 1e-30, f"{what} is off by {error / scale:.1e}: {a} for {b}"


class Fuzz(RuleBasedStateMachine):
    """An optimizer in the hands of a user."""

    backend: ClassVar[dict[str, Any]]
    dtypes: ClassVar = [torch.float32]

    @initialize(dtype=st.data(), hyper=hypers(), flag=flags, seed=seeds)
    def start(self, dtype: st.DataObject, hyper: dict[str, Any], flag: dict[str, bool], seed: int) -> None:
        self.dtype = dtype.draw(st.sampled_from(self.dtypes))
        self.schedule: LambdaLR | None = None
        self.steps = 0  # since the schedule was made
        params = [self.new_parameter(shape, seed + i) for i, shape in enumerate(SHAPES[:4])]
        self.optimizer = ELRSGD([{"params": params, **flag}], **self.possible(hyper), **self.backend)

    def possible(self, hyper: dict[str, Any]) -> dict[str, Any]:
        """What this backend takes."""
        if "fused" in self.backend and not has_kernels(hyper["rule"], hyper["elr_of"]):
            return {**hyper, "rule": "uniform", "granularity": "layer", "elr_of": None}
        return hyper

    def new_parameter(self, shape: tuple[int, ...], seed: int) -> nn.Parameter:
        values = torch.empty(shape, dtype=self.dtype, device=DEVICE)
        return nn.Parameter(random_like(values, seed) * (1 + seed % 3 / 4))

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def at(self, place: int) -> Tensor:
        return self.params[place % len(self.params)]

    def group_at(self, place: int) -> dict[str, Any]:
        return self.optimizer.param_groups[place % len(self.optimizer.param_groups)]

    def group_of(self, index: int) -> dict[str, Any]:
        return [group for group in self.optimizer.param_groups for _ in group["params"]][index]

    def visible(self) -> tuple[list[Tensor], dict[str, Any]]:
        """All that a user can save."""
        return copy.deepcopy(([p.detach() for p in self.params], self.optimizer.state_dict()))

    def settled(self) -> tuple[list[Tensor], dict[str, Any]]:
        """The same, after a first look has brought into the state what has changed in the groups."""
        self.optimizer._update_rule_groups()
        return self.visible()

    def new_optimizer(self, params: Sequence[Tensor], **backend: bool) -> ELRSGD:
        """Another one with these options, and with the state that this one has."""
        rest = iter(params)
        groups = [
            {**copy.deepcopy({k: v for k, v in group.items() if k != "params"}), **backend}
            | {"params": [next(rest) for _ in group["params"]]}
            for group in self.optimizer.param_groups
        ]
        optimizer = ELRSGD(groups)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return optimizer

    @rule(
        kinds=st.lists(st.sampled_from(GRADIENTS), min_size=1, max_size=5),
        size=st.sampled_from([1.0, 1e-3, 30.0]),
        seed=seeds,
        moved=st.booleans(),
        record=st.booleans(),
        scale=st.sampled_from([None, 1024.0]),
    )
    def step(
        self, kinds: list[str], size: float, seed: int, moved: bool, record: bool, scale: float | None
    ) -> None:
        self.set_gradients(kinds, size, seed, moved)
        twins = [nn.Parameter(p.detach().clone()) for p in self.params]
        for p, q in zip(self.params, twins, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        reference = self.new_optimizer(twins, foreach=False, fused=False)
        self.drop_new_buffers(reference)
        weights, state = self.visible()
        lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        if scale is not None:
            self.scale_gradients(scale)
        for optimizer in (self.optimizer, reference):
            if record:
                optimizer.record_next_step()
            optimizer.step()
        for name in ("grad_scale", "found_inf"):
            self.optimizer.__dict__.pop(name, None)
        self.steps += 1

        assert lrs == [float(group["lr"]) for group in self.optimizer.param_groups]
        rtol = TOLERANCES[self.dtype]
        for i, (p, q, before) in enumerate(zip(self.params, twins, weights, strict=True)):
            if (
                q.grad is not None and self.group_of(i)["project"]
            ):  # which may have cancelled all of an update
                before = before.double() + 1e2 * float(self.group_of(i)["lr"]) * q.grad.double()
            assert_close(p, q, before, rtol, f"weight {i}")
            held, expected = self.optimizer.state.get(p, {}), reference.state.get(q, {})
            assert held.keys() == expected.keys()
            for key, value in held.items():
                if key == "handed_over":
                    assert torch.equal(value, expected[key]), (key, i)
                elif key == "tracked":  # tests are counted by the angle of a step, which is rounded
                    torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=0, msg=f"{key} {i}")
                    assert torch.equal(value < 0, expected[key] < 0), (key, i)
                elif key == "momentum_buffer":
                    before = state["state"].get(i, {}).get(key)
                    assert_close(value, expected[key], before, rtol, f"{key} {i}")
                else:
                    assert_close(value, expected[key], None, 2e-5, f"{key} {i}")
        if record and any(p.grad is not None for p in self.params) and scale is None:
            self.compare_tables(reference)
        self.replace_the_enormous(seed)

    @rule(
        steps=st.sampled_from([1, 4, 20]), seed=seeds, moved=st.booleans(), active=st.sampled_from([9, 3, 1])
    )
    def train(self, steps: int, seed: int, moved: bool, active: int) -> None:
        """As it usually goes, perhaps with some parameters frozen."""
        kinds = ["orthogonal"] * active + ["none"] * (9 - active)
        for i in range(steps):
            self.step(kinds, 1.0, seed + 10 * i, moved, False, None)

    @rule(seed=seeds)
    def train_in_place(self, seed: int) -> None:
        for i in range(3):
            self.step(["orthogonal"], 1.0, seed + 10 * i, False, False, None)

    def set_gradients(self, kinds: list[str], size: float, seed: int, moved: bool) -> None:
        for i, p in enumerate(self.params):
            kind = kinds[i % len(kinds)]
            if kind == "none":
                p.grad = None
            if kind in ("none", "as before"):
                continue
            g = random_like(p, seed + i) * SIZES.get(kind, size)
            if kind == "orthogonal":
                g = orthogonal(p, g)
                g *= size / (g.norm() * p.detach().norm()).clamp(1e-6, 1e6).nan_to_num(1.0)
            elif kind == "zero":
                g = torch.zeros_like(p)
            elif kind in ("nan", "inf") and p.numel() > 0:
                g.view(-1)[seed % p.numel()] = float(kind)
            if moved or p.grad is None:
                p.grad = g
            else:
                p.grad.copy_(g)

    def drop_new_buffers(self, reference: ELRSGD) -> None:
        """What the kernels call a new buffer (one that is −0.0, made for a skipped step) is to the reference none."""
        if "fused" not in self.backend:
            return
        for q in (q for group in reference.param_groups if group["momentum"] for q in group["params"]):
            m = reference.state.get(q, {}).get("momentum_buffer")
            if q.grad is not None and m is not None and bool(((m == 0) & m.signbit()).all()):
                del reference.state[q]["momentum_buffer"]

    def scale_gradients(self, scale: float) -> None:
        """What torch.amp.GradScaler does."""
        for p in self.params:
            if p.grad is not None:
                p.grad.mul_(scale)
        self.optimizer.grad_scale = torch.tensor(scale, device=DEVICE)  # type: ignore[attr-defined]
        self.optimizer.found_inf = torch.tensor(0.0, device=DEVICE)  # type: ignore[attr-defined]

    def compare_tables(self, reference: ELRSGD) -> None:
        rows, expected = layer_stats(self.optimizer), layer_stats(reference)
        assert len(rows) == len(expected)
        for row, other in zip(rows, expected, strict=True):
            assert (row.name, row.tracked) == (other.name, other.tracked)
            group = self.optimizer.param_groups[int(row.name.split(".")[0])]
            has_factor = acts_on_update(group["rule"], group["elr_of"]) or group["rule"] == "equilibrium"
            # a factor that was measured is as exact as the sums: less, the more of the update is radial
            assert row.lr == pytest.approx(other.lr, rel=1e-3 if has_factor else 1e-6)
            for column in ("weight_norm", "grad_norm", "elr", "grad_factor", "weight_factor"):
                value, wanted = getattr(row, column), getattr(other, column)
                assert value == pytest.approx(wanted, rel=1e-3, nan_ok=True), (column, row, other)

    def replace_the_enormous(self, seed: int) -> None:
        """Before float32 overflows in one order of operations and not in another."""
        for p in self.params:
            m = self.optimizer.state.get(p, {}).get("momentum_buffer", p)
            if (
                max(
                    (t.detach().nan_to_num(0, 0, 0).abs().max().item() for t in (p, m) if t.numel()),
                    default=0,
                )
                > 1e8
            ):
                with torch.no_grad():
                    p.copy_(random_like(p, seed))
                self.optimizer.state.get(p, {}).pop("momentum_buffer", None)

    @rule()
    def overflow(self) -> None:
        """A step that torch.amp.GradScaler skips, where it leaves that to the optimizer."""
        weights, state = self.settled()
        self.optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)  # type: ignore[attr-defined]
        self.optimizer.found_inf = torch.tensor(1.0, device=DEVICE)  # type: ignore[attr-defined]
        self.optimizer.step()
        for name in ("grad_scale", "found_inf"):
            del self.optimizer.__dict__[name]
        self.steps += 1
        after, state_after = self.visible()
        assert same(weights, after)
        for i, held in state_after["state"].items():
            for key, value in held.items():
                if key == "momentum_buffer" and key not in state["state"].get(i, {}):
                    assert not value.any()
                elif key in state["state"].get(i, {}):
                    assert same(value, state["state"][i][key]), key

    @rule(what=st.sampled_from(["tripled", "shrunk", "overwritten", "moved"]), place=places, seed=seeds)
    def touch_weight(self, what: str, place: int, seed: int) -> None:
        p = self.at(place)
        with torch.no_grad():
            if what == "tripled":
                p.mul_(3.0)
            elif what == "shrunk":
                p.mul_(1e-3)
            elif what == "overwritten":
                p.copy_(random_like(p, seed))
            else:
                p.data = p.data.clone()

    @rule(what=st.sampled_from(["zeroed", "replaced", "removed"]), place=places)
    def touch_momentum(self, what: str, place: int) -> None:
        state = self.optimizer.state.get(self.at(place), {})
        if "momentum_buffer" not in state:
            return
        if what == "zeroed":
            state["momentum_buffer"].zero_()
        elif what == "replaced":
            state["momentum_buffer"] = torch.ones_like(state["momentum_buffer"])
        else:
            del state["momentum_buffer"]

    @rule(place=places, hyper=hypers(), keep_rule=st.booleans(), tensors=st.booleans())
    def change(self, place: int, hyper: dict[str, Any], keep_rule: bool, tensors: bool) -> None:
        hyper = self.possible(hyper)
        if keep_rule:
            kept = ("rule", "granularity", "elr_of", "project", "protect")
            hyper = {k: v for k, v in hyper.items() if k not in kept}
            hyper["weight_decay"] = hyper["weight_decay"] or needs(self.group_at(place)["rule"]).get(
                "weight_decay", 0.0
            )
        if tensors:
            hyper["lr"] = torch.tensor(hyper["lr"], device=DEVICE)
            if "fused" not in self.backend:
                hyper["weight_decay"] = torch.tensor(hyper["weight_decay"], device=DEVICE)
        self.group_at(place).update(hyper)

    @rule(place=places, flag=flags)
    def flag(self, place: int, flag: dict[str, bool]) -> None:
        group = self.group_at(place)
        group.pop("scale_invariant", None)
        group.update(flag)

    @precondition(lambda self: self.steps > 0 or self.schedule is None)
    @rule()
    def advance_schedule(self) -> None:
        if self.schedule is None:
            self.schedule, self.steps = LambdaLR(self.optimizer, lambda t: 1 / (1 + t)), 0
        else:
            self.schedule.step()

    @precondition(lambda self: len(self.optimizer.param_groups) < 4)
    @rule(
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
        hyper=hypers(),
        flag=flags,
        seed=seeds,
    )
    def add_group(
        self, shapes: list[tuple[int, ...]], hyper: dict[str, Any], flag: dict[str, bool], seed: int
    ) -> None:
        params = [self.new_parameter(shape, seed + i) for i, shape in enumerate(shapes)]
        _, before = self.visible()
        self.optimizer.add_param_group({"params": params, **flag, **self.possible(hyper)})
        assert same(self.visible()[1]["state"], before["state"])
        self.schedule = None

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none)

    @rule(way=st.sampled_from(["aliases", "copies", "another", "file", "deepcopy", "pickle"]))
    def save_and_load(self, way: str) -> None:
        before = self.visible()
        if way == "aliases":
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        elif way == "copies":
            self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        elif way == "another":
            self.optimizer = self.new_optimizer(self.params)
        elif way == "file":
            file = io.BytesIO()
            torch.save(self.optimizer.state_dict(), file)
            file.seek(0)
            self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        elif way == "deepcopy":
            self.optimizer = copy.deepcopy(self.optimizer)
        else:
            self.optimizer = pickle.loads(pickle.dumps(self.optimizer))
        self.schedule = None
        assert same(self.visible(), before)

    @rule()
    def read(self) -> None:
        before, versions = self.settled(), [p._version for p in self.params]
        if any(p.grad is not None for p in self.params):
            layer_stats(self.optimizer)
            effective_lrs(self.optimizer)
        repr(self.optimizer)
        assert same(self.visible(), before)
        assert versions == [p._version for p in self.params]

    @rule(
        mistake=st.sampled_from(
            ["lr", "rule", "twice", "groups", "shape", "loaded lr", "nonsense", "sparse"]
        ),
        place=places,
    )
    def mistake(self, mistake: str, place: int) -> None:
        """Is refused, and changes nothing."""
        before = self.settled()
        group, p = self.group_at(place), self.group_at(place)["params"][0]
        new = self.new_parameter((2, 2), 0)
        saved = self.optimizer.state_dict()
        if mistake in ("lr", "rule", "twice"):
            wrong = {"lr": {"lr": -0.1}, "rule": {"rule": "lars"}, "twice": {"params": [p]}}[mistake]
            self.refused(lambda: self.optimizer.add_param_group({"params": [new], **wrong}))
        elif mistake in ("groups", "loaded lr", "shape"):
            saved = copy.deepcopy(saved)
            if mistake == "groups":
                saved["param_groups"].append(saved["param_groups"][0])
            elif mistake == "loaded lr":
                saved["param_groups"][-1]["lr"] = float("nan")
            else:
                saved["state"].setdefault(0, {})["momentum_buffer"] = torch.ones(11, 11)
            self.refused(lambda: self.optimizer.load_state_dict(saved))
        elif mistake == "nonsense":
            right, group["rule"] = group["rule"], "nonsense"
            self.refused(self.optimizer.step)
            group["rule"] = right
        elif (group["rule"] is not None or group["project"]) and p.dim() == 2:
            kept, p.grad = p.grad, torch.ones_like(p).to_sparse()
            self.refused(self.optimizer.step)
            p.grad = kept
        assert same(self.visible(), before)

    def refused(self, call: Callable[..., object]) -> None:
        with pytest.raises((ValueError, RuntimeError)):
            call()


class Foreach(Fuzz):
    backend: ClassVar[dict[str, Any]] = {"foreach": True}
    dtypes: ClassVar = [torch.float32, torch.float64, torch.bfloat16]


class Triton(Fuzz):
    backend: ClassVar[dict[str, Any]] = {"fused": True}


class TestForeach(Foreach.TestCase):
    settings = settings(deadline=None, max_examples=30, stateful_step_count=20)


@pytest.mark.skipif(not kernels.available(), reason="triton is not installed")
class TestTriton(Triton.TestCase):
    settings = settings(deadline=None, max_examples=6, stateful_step_count=12)


@pytest.mark.slow
class TestForeachInDepth(Foreach.TestCase):
    settings = settings(deadline=None, max_examples=120, stateful_step_count=40)


@pytest.mark.slow
@pytest.mark.skipif(not kernels.available(), reason="triton is not installed")
class TestTritonInDepth(Triton.TestCase):
    settings = settings(deadline=None, max_examples=10, stateful_step_count=30)
