"""The reference is the definition : rescale a parameter in float64 and see whether the outputs change."""

import copy
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from elropt import equalize_, explain_scale_invariance, find_scale_invariant, param_groups
from tests.architectures import ARCHITECTURES, Prediction

# With every eps at 1e-30, rescaling an invariant weight moves the outputs by rounding or, where an eps is
# written into the forward of a test model, by about 1e-5; any other weight here moves them by 1e-2 or more.
UNCHANGED = 1e-4


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def leaves(output: Any) -> Iterator[Tensor]:
    match output:
        case Tensor():
            yield output.detach().double()
        case dict():
            for value in output.values():
                yield from leaves(value)
        case tuple() | list():
            for value in output:
                yield from leaves(value)
        case Prediction():
            yield from leaves([output.logits, output.hidden])


def as_double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """All outputs as one float64 vector, with the same dropout masks at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return torch.cat([leaf.flatten() for leaf in leaves(model(*inputs))])


def without_eps(model: nn.Module) -> nn.Module:
    """A float64 copy in which every norm has a negligible eps."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "eps"):
            setattr(module, "eps", 1e-30)  # noqa: B010
    return model


def somewhere_else(model: nn.Module, seed: int = 3) -> nn.Module:
    """The model with normal noise on all parameters: no bias or gain has its special initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn(param.shape, generator=generator, dtype=param.dtype))
    return model


def change(model: nn.Module, inputs: tuple[Any, ...], factors: dict[str, Tensor]) -> float:
    """Relative change of the outputs when parameters are multiplied by factors."""
    before = run(model, inputs)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for name, factor in factors.items():
            scaled.get_parameter(name).mul_(factor)
    return float((run(scaled, inputs) - before).norm() / before.norm())


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that must not change, with the bits of tensors."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
    }


def assert_same(after: Any, before: Any, path: str = "") -> None:
    if isinstance(before, dict):
        assert after.keys() == before.keys(), path
        for key in before:
            assert_same(after[key], before[key], f"{path}/{key}")
    elif isinstance(before, list | tuple):
        assert len(after) == len(before), path
        for i, (a, b) in enumerate(zip(after, before, strict=True)):
            assert_same(a, b, f"{path}/{i}")
    elif isinstance(before, Tensor | np.ndarray):
        torch.testing.assert_close(
            torch.as_tensor(after), torch.as_tensor(before), rtol=0, atol=0, equal_nan=True, msg=path
        )
    else:
        assert after == before, path


def disturbed(model: nn.Module) -> nn.Module:
    """Some gradients, one submodule in the other mode: a state in which a change would show."""
    for i, param in enumerate(model.parameters()):
        if i % 2:
            param.grad = torch.full_like(param, 0.25)
    next(m for m in model.modules() if m is not model).eval()
    return model


@every_architecture
def test_finds_what_was_worked_out_by_hand(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    found = find_scale_invariant(model, *architecture.inputs())
    assert found == architecture.kinds()
    assert list(found) == [n for n, _ in model.named_parameters()]


@every_architecture
def test_claims_invariance_exactly_where_rescaling_changes_nothing(name: str) -> None:
    architecture = ARCHITECTURES[name]
    inputs = architecture.inputs()
    explained = explain_scale_invariance(architecture.build(), *inputs)
    model, inputs = somewhere_else(without_eps(architecture.build())), as_double(inputs)
    generator = torch.Generator().manual_seed(7)
    for param_name, param in model.named_parameters():
        whole = max(change(model, inputs, {param_name: torch.tensor(k)}) for k in (0.5, 3.0))
        rows = 0.3 + 3 * torch.rand(param.shape[:1], generator=generator, dtype=torch.float64)
        by_row = change(model, inputs, {param_name: rows.reshape(-1, *[1] * (param.ndim - 1))})
        found = explained[param_name]
        if found.kind == "channel" or found.reason in ("no effect on the output", "unused: no gradient"):
            assert whole < UNCHANGED, param_name
            assert by_row < UNCHANGED, param_name
        elif found.kind == "tensor":
            assert whole < UNCHANGED < by_row, param_name
        else:
            assert whole > UNCHANGED, param_name
        if found.reason.startswith("only jointly with"):
            partner = found.reason.split("'")[1]
            both = {param_name: torch.tensor(3.0), partner: torch.tensor(3.0)}
            assert change(model, inputs, both) < UNCHANGED, param_name


@every_architecture
def test_reasons(name: str) -> None:
    architecture = ARCHITECTURES[name]
    explained = explain_scale_invariance(architecture.build(), *architecture.inputs())
    ineffective = {
        n
        for n, found in explained.items()
        if found.reason in ("no effect on the output", "unused: no gradient")
    }
    assert ineffective == set(architecture.no_effect)
    for first, second in architecture.jointly:
        assert explained[first].reason == f"only jointly with {second!r}"
        assert explained[second].reason == f"only jointly with {first!r}"
    for found in explained.values():
        if found.kind is None and found.reason.startswith("not: radial cosine "):
            assert 0 < float(found.reason.split()[-1]) <= 1


@every_architecture
def test_nothing_is_changed(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = disturbed(architecture.build()), architecture.inputs()
    before, inputs_before = state_of(model), copy.deepcopy(inputs)
    find_scale_invariant(model, *inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        param_groups(model, *inputs)
    assert_same(state_of(model), before)
    assert_same(inputs, inputs_before)


@every_architecture
def test_the_mode_does_not_matter(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build().eval()
    assert find_scale_invariant(model, *architecture.inputs()) == architecture.kinds()
    assert not any(module.training for module in model.modules())


@every_architecture
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_dtype_does_not_matter(name: str, dtype: torch.dtype) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build().to(dtype)
    inputs = tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, architecture.inputs()
    )
    assert find_scale_invariant(model, *inputs) == architecture.kinds()
    assert {p.dtype for p in model.parameters()} == {dtype}


NORMS = {
    "channel": lambda width, eps: nn.BatchNorm1d(width, eps=eps),
    "tensor": lambda width, eps: nn.LayerNorm(width, eps=eps),
    None: lambda width, eps: nn.Identity(),
}


@given(
    kind=st.sampled_from(list(NORMS)),
    depth=st.integers(1, 6),
    width=st.integers(3, 17),
    samples=st.integers(6, 20),
    weight_scale=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    eps=st.sampled_from([1e-12, 1e-5, 1e-2]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
@pytest.mark.filterwarnings("ignore:rule='warmup' and equalize_:UserWarning")  # eps may matter here
def test_neither_depth_nor_scales_nor_eps_decide(
    kind: str | None,
    depth: int,
    width: int,
    samples: int,
    weight_scale: float,
    offset: float,
    eps: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            linear.weight.copy_(weight_scale * torch.randn(width, width, generator=generator))
        layers += [linear, NORMS[kind](width, eps), nn.Softplus()]
    model = nn.Sequential(*layers, nn.Linear(width, 2))
    found = find_scale_invariant(model, offset + torch.randn(samples, width, generator=generator))
    assert {n: k for n, k in found.items() if k} == (
        {f"{3 * i}.weight": kind for i in range(depth)} if kind else {}
    )


class RadialZeroByChance(nn.Module):
    """f = (‖w‖² − 1)² + ⟨x, w/‖w‖⟩: at ‖w‖ = 1 the radial derivative is exactly zero, only there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.arange(1.0, 13.0), dim=0).reshape(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.weight.norm()
        return (norm**2 - 1) ** 2 + (x * self.weight / norm).sum()


def test_a_radial_zero_at_the_present_weights_alone_does_not_count() -> None:
    model = RadialZeroByChance()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model(x).backward()
    assert model.weight.grad is not None
    assert (
        abs(float((model.weight.detach() * model.weight.grad).sum())) < 1e-6 < float(model.weight.grad.norm())
    )
    assert find_scale_invariant(model, x) == {"weight": None}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 255.0, 1e5])
def test_a_bias_counts_however_small_it_is_beside_the_activations(scale: float) -> None:
    model = nn.Sequential(nn.Linear(20, 10), nn.LayerNorm(10), nn.Linear(10, 2))
    explained = explain_scale_invariance(model, scale * torch.rand(8, 20))
    assert explained["0.weight"].reason == "only jointly with '0.bias'"
    assert explained["0.bias"].reason == "only jointly with '0.weight'"


def test_the_answer_does_not_depend_on_the_random_state() -> None:
    architecture = ARCHITECTURES["dropout"]
    model = architecture.build()
    answers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        answers.append(explain_scale_invariance(model, *architecture.inputs()))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 6)
            linear = nn.Linear(6, 6)
            with torch.no_grad():
                linear.weight.mul_(scale)
            self.block = nn.Sequential(linear, nn.BatchNorm1d(6), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.stem(x), use_reentrant=use_reentrant)

    inputs = ARCHITECTURES["plain"].inputs()
    with pytest.warns(UserWarning, match="halving all of them changes the outputs"):  # eps is larger than σ²
        found = find_scale_invariant(Checkpointed(0.01), *inputs)
    assert found["block.0.weight"] == "channel"
    assert equalize_(Checkpointed(1.0), *inputs, loss=lambda y: y.square().mean()).keys() == {
        "stem.weight",
        "block.0.weight",
    }


class Float32Inside(nn.Module):
    """Attention whose RMSNorm and softmax compute in float32 whatever comes in, like many language models."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).float()
        q = (q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        scores = q @ self.k(x).transpose(1, 2)
        return scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ x


def test_norms_computed_in_float32() -> None:
    explained = explain_scale_invariance(Float32Inside(), *ARCHITECTURES["attention"].inputs())
    assert explained["q.weight"].kind == "tensor"
    assert explained["k.weight"].reason.startswith("not: radial cosine")
    assert explained["k.bias"].reason == "no effect on the output"


class StochasticDepth(nn.Module):
    """Draws from the generators of Python, NumPy and torch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        scale = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return scale * self.norm(self.linear(x)).relu()


def test_no_random_generator_is_advanced() -> None:
    model, x = StochasticDepth(), torch.randn(8, 6)
    before = state_of(model)
    find_scale_invariant(model, x)
    assert_same(state_of(model), before)
    equalize_(model, x, loss=lambda y: y.sum())
    assert_same(state_of(model)["random"], before["random"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    for name, architecture in ARCHITECTURES.items():
        model = architecture.build().cuda()
        inputs = tree_map_only(Tensor, Tensor.cuda, architecture.inputs())
        before, cuda_random_state = state_of(model), torch.cuda.get_rng_state()
        assert find_scale_invariant(model, *inputs) == architecture.kinds(), name
        assert_same(state_of(model), before)
        assert torch.equal(torch.cuda.get_rng_state(), cuda_random_state), name


def test_weight_norm_by_hooks_after_a_forward_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        first = nn.utils.weight_norm(nn.Linear(6, 5))
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(8, 6)
    model(x)
    found = find_scale_invariant(model, x)
    assert {name for name, kind in found.items() if kind} == {"0.weight_v"}


def test_outputs_that_are_integers_or_detached_are_ignored() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.linear(x)
            return [y.argmax(1), y.detach(), F.normalize(y, dim=1)]

    assert find_scale_invariant(Head(), torch.randn(8, 6)) == {"linear.weight": "tensor"}


def test_hooks_on_parameters_are_not_fired() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    fired = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(fired.append)
    x = torch.randn(8, 6)
    find_scale_invariant(model, x)
    equalize_(model, x, loss=lambda y: y.exp().sum())
    assert not fired


@pytest.mark.parametrize(
    "context", [torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16)], ids=["no_grad", "autocast"]
)
def test_works_in_contexts(context: Any) -> None:
    architecture = ARCHITECTURES["conv + BatchNorm"]
    with context():
        assert find_scale_invariant(architecture.build(), *architecture.inputs()) == architecture.kinds()


def test_embeddings_with_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.LayerNorm(6), nn.Linear(6, 2))
    found = find_scale_invariant(model, torch.arange(5).reshape(1, 5))
    assert {name: kind for name, kind in found.items() if kind} == {"0.weight": "channel"}


def test_a_model_without_parameters() -> None:
    assert find_scale_invariant(nn.ReLU(), torch.ones(2)) == {}


def test_inputs_without_variety_give_no_effect() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert explain_scale_invariance(model, torch.zeros(8, 6))["0.weight"].reason == "no effect on the output"


def test_a_non_finite_gradient_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4))
    found = explain_scale_invariance(model, torch.full((8, 6), math.nan))["0.weight"]
    assert found.kind is None
    assert found.reason == "not measured: its gradient is not finite"


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"lazy parameters have no shape yet: 0\.weight, 0\.bias; run model"):
        find_scale_invariant(nn.Sequential(nn.LazyLinear(3)), torch.ones(8, 2))
    with pytest.raises(ValueError, match="no floating-point output that depends on a parameter"):
        find_scale_invariant(nn.Sequential(nn.Linear(2, 2), nn.Flatten(), _Argmax()), torch.ones(8, 2))
    with pytest.raises(ValueError, match="more than 1 value per channel") as one_value:
        find_scale_invariant(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.ones(1, 2))
    assert "pass at least 8 samples" in one_value.value.__notes__[1]
    with pytest.raises(RuntimeError, match="mat1 and mat2") as other_shape:
        find_scale_invariant(nn.Sequential(nn.Linear(2, 2)), torch.ones(8, 3))
    assert len(other_shape.value.__notes__) == 1  # no remedy for what did not happen
    uncopyable = nn.Linear(2, 2)
    uncopyable.register_forward_hook(_Uncopyable().hook)
    with pytest.raises(TypeError, match="not me") as not_copied:
        find_scale_invariant(uncopyable, torch.ones(8, 2))
    assert "copy.deepcopy" in not_copied.value.__notes__[0]


class _Argmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class _Uncopyable:
    def hook(self, *_: object) -> None: ...

    def __deepcopy__(self, memo: object) -> "_Uncopyable":
        raise TypeError("not me")


def loss_of(output: Any) -> Tensor:
    """A loss with a different gradient for every output."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in leaves_with_grad(output):
        target = torch.linspace(-1, 1, leaf.numel(), dtype=torch.float64).reshape(leaf.shape)
        total = total + (leaf.double() - target).square().mean()
    return total


def leaves_with_grad(output: Any) -> list[Tensor]:
    match output:
        case Tensor():
            return [output] if output.requires_grad else []
        case dict():
            return [leaf for value in output.values() for leaf in leaves_with_grad(value)]
        case Prediction():
            return [output.logits, *output.hidden]
    raise TypeError(type(output))


def relative_grads(model: nn.Module, inputs: tuple[Any, ...], names: Any) -> dict[str, float]:
    """E = ‖g‖/‖w‖ by plain autograd on a copy."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        loss_of(model(*inputs)).backward()
    params = dict(model.named_parameters())
    return {
        name: float(
            torch.as_tensor(params[name].grad).double().norm() / params[name].detach().double().norm()
        )
        for name in names
    }


def tracked_names(name: str) -> set[str]:
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    return {
        n
        for n in (*architecture.channel, *architecture.tensor)
        if model.get_parameter(n).ndim >= 2 and model.get_parameter(n).requires_grad
    }


WITH_TRACKED = [name for name in ARCHITECTURES if tracked_names(name)]


@pytest.mark.parametrize("name", WITH_TRACKED)
def test_equalize_makes_all_relative_gradients_equal_and_keeps_the_outputs(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model, inputs = somewhere_else(without_eps(architecture.build())), as_double(architecture.inputs())
    names = tracked_names(name)
    with torch.no_grad():
        for i, param_name in enumerate(sorted(names)):
            model.get_parameter(param_name).mul_(10.0**i)
    before, outputs = relative_grads(model, inputs, names), run(model, inputs)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}

    factors = equalize_(model, *inputs, loss=loss_of)

    assert factors.keys() == names
    mean = math.exp(sum(map(math.log, before.values())) / len(before))
    assert factors == pytest.approx({n: math.sqrt(e / mean) for n, e in before.items()}, rel=1e-9)
    assert relative_grads(model, inputs, names) == pytest.approx(dict.fromkeys(names, mean), rel=1e-3)
    assert float((run(model, inputs) - outputs).norm()) < UNCHANGED * float(outputs.norm())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[n] * factors.get(n, 1.0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WITH_TRACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equalize_as_a_user_calls_it(name: str, dtype: torch.dtype) -> None:
    """With the usual eps and precision: outputs equal to rounding, and nothing else touched."""
    architecture = ARCHITECTURES[name]
    model = somewhere_else(architecture.build()).to(dtype)
    inputs = tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, architecture.inputs()
    )
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.25)
    before, outputs = state_of(model), run(copy.deepcopy(model), inputs)

    factors = equalize_(model, *inputs, loss=loss_of)

    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    assert float((run(copy.deepcopy(model), inputs) - outputs).norm()) < tolerance * float(outputs.norm())
    after = state_of(model)
    for n, tensor in model.state_dict(keep_vars=True).items():
        factor = next((f for tracked, f in factors.items() if model.get_parameter(tracked) is tensor), None)
        if factor is not None:
            rescaled = (before["state"].pop(n).double() * factor).to(dtype)
            torch.testing.assert_close(
                after["state"].pop(n), rescaled, rtol=2 * torch.finfo(dtype).eps, atol=0
            )
    assert_same(after, before)


def test_equalize_closes_a_large_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(12):
        linear = nn.Linear(16, 16)
        with torch.no_grad():
            linear.weight.copy_(10 ** (i / 4 - 1) * torch.randn(16, 16, generator=generator))
        layers += [linear, nn.BatchNorm1d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(16, 3)).double()
    x = torch.randn(32, 16, generator=generator, dtype=torch.float64)
    names = [f"{3 * i}.weight" for i in range(12)]
    before = relative_grads(model, (x,), names).values()
    assert max(before) / min(before) > 1e4
    assert equalize_(model, x, loss=loss_of).keys() == set(names)
    after = relative_grads(model, (x,), names).values()
    assert max(after) / min(after) < 1.01


class TwoBranches(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.loud = nn.Linear(32, 32, bias=False)
        self.soft = nn.Linear(32, 32, bias=False)
        self.norm = nn.LayerNorm(32, eps=eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(self.loud(x)), self.norm(self.soft(x))


@pytest.mark.parametrize("eps", [1e-5, 1e-4])
def test_eps_moves_the_outputs_of_equalize_as_documented(eps: float) -> None:
    torch.manual_seed(0)
    model, x = TwoBranches(eps).double(), torch.randn(16, 32, dtype=torch.float64)
    variance = model.soft(x).var(1, correction=0, keepdim=True).detach()
    target = torch.randn(2, 16, 32, dtype=torch.float64)
    before = model(x)[1].detach()
    matters = pytest.warns(UserWarning, match=r"changed the outputs by 1\.\d%.*soft\.weight 1\.\d%")
    with matters if eps == 1e-4 else nullcontext():
        factors = equalize_(
            model, x, loss=lambda y: (y[0] * target[0]).sum() + (y[1] * target[1]).sum() / 1e4
        )
    assert factors["soft.weight"] < 0.2
    relative = model(x)[1].detach() / before - 1
    predicted = (0.5 * eps / variance * (1 - 1 / factors["soft.weight"] ** 2)).expand_as(relative)
    torch.testing.assert_close(relative, predicted, rtol=0.1, atol=0)


def test_equalize_in_eval_mode_keeps_the_outputs_of_eval_mode() -> None:
    batch_norm, layer_norm = ARCHITECTURES["linear + BatchNorm"], ARCHITECTURES["attention with QK-norm"]
    model, inputs = somewhere_else(batch_norm.build()).eval(), batch_norm.inputs()
    before = state_of(model)
    with pytest.warns(UserWarning, match=r"equalize_ changed nothing.*call model\.train\(\) first"):
        assert equalize_(model, *inputs, loss=loss_of) == {}
    assert_same(state_of(model), before)

    model, inputs = layer_norm.build().eval(), layer_norm.inputs()
    outputs = run(model, inputs)
    assert equalize_(model, *inputs, loss=loss_of).keys() == {"q.weight", "k.weight"}
    torch.testing.assert_close(run(model, inputs), outputs, rtol=1e-3, atol=1e-5)


def test_equalize_leaves_zero_weights_and_zero_gradients_alone() -> None:
    torch.manual_seed(0)
    branches = TwoBranches(1e-5)
    with pytest.warns(UserWarning, match=r"left alone.*: soft\.weight\. "):
        assert equalize_(branches, torch.randn(8, 32), loss=lambda y: y[0].exp().sum()) == {
            "loud.weight": 1.0,
            "soft.weight": 1.0,
        }
    nn.init.zeros_(branches.loud.weight)
    before = state_of(branches)
    with pytest.warns(UserWarning, match=r"left alone.*: loud\.weight, soft\.weight\. "):
        equalize_(branches, torch.randn(8, 32), loss=lambda y: (y[0] + math.nan * y[1]).sum())
    before["random"] = state_of(branches)["random"]
    assert_same(state_of(branches), before)


def test_equalize_leaves_alone_what_a_zero_gain_cuts_off() -> None:
    architecture = ARCHITECTURES["norm behind the addition"]
    model = architecture.build()
    before = state_of(model)
    with pytest.warns(UserWarning, match=r"left alone.*: conv1\.weight, conv2\.weight\. "):
        factors = equalize_(model, *architecture.inputs(), loss=loss_of)
    assert factors == {"conv1.weight": 1.0, "conv2.weight": 1.0}
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda y: y, r"loss returned a tensor of shape \(8, 3\); it must be a scalar"),
        (
            lambda y: y.detach().sum(),
            r"loss returned a tensor of shape \(\); it must be a scalar tensor that depends",
        ),
        (lambda y: 1.5, r"loss returned 1\.5; it must be a scalar"),
    ],
)
def test_equalize_rejects_a_loss_before_it_changes_anything(loss: Any, message: str) -> None:
    architecture = ARCHITECTURES["linear + BatchNorm"]
    model = architecture.build()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        equalize_(model, *architecture.inputs(), loss=loss)
    assert_same(state_of(model), before)


class Skew(nn.Module):
    """x·(A − Aᵀ), A the strict triangle of a weight that starts as the identity: the triangle is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        triangle = self.weight.triu(1)
        return (x @ (triangle - triangle.mT)).tanh() + x


def test_entries_that_are_still_zero_hide_no_dependence() -> None:
    x = torch.randn(16, 8)
    assert find_scale_invariant(Skew(), x) == {"weight": None}
    for orthogonal_map in ("matrix_exp", "cayley", "householder"):
        linear = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map=orthogonal_map)
        assert set(find_scale_invariant(linear, x).values()) == {None}, orthogonal_map
    found = find_scale_invariant(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)), x)
    assert {name for name, kind in found.items() if kind} == {"parametrizations.weight.original"}


class SmallBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return torch.add(F.normalize(h, dim=1), self.b(h), alpha=1e-3)


def test_a_small_alpha_is_no_eps() -> None:
    assert find_scale_invariant(SmallBranch(), torch.randn(8, 6))["a.weight"] is None


def programs(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and of its end
        return {
            "script": torch.jit.script(model),
            "trace": torch.jit.trace(model, x, check_trace=False),
            "export": torch.export.export(model, (x,)).module(),
        }


@pytest.mark.filterwarnings("ignore:`isinstance.treespec:FutureWarning")  # copies of exported programs
def test_programs_are_measured_like_modules_and_left_alone() -> None:
    """The deep copy of a ScriptModule is connected with the original where gradients are recorded."""
    x = torch.randn(32, 8)
    net = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    for name, model in programs(net, x).items():
        for i, param in enumerate(model.parameters()):
            param.grad = torch.full_like(param, 0.25) if i % 2 else None
        before = state_of(model)
        found = find_scale_invariant(model, x)
        assert {n: kind for n, kind in found.items() if kind} == {"0.weight": "channel"}, name
        assert_same(state_of(model), before, name)
        assert equalize_(model, x, loss=lambda y: y.square().mean()).keys() == {"0.weight"}, name
        assert_same({**state_of(model), "state": None}, {**before, "state": None}, name)


def test_a_copy_that_reaches_the_original_leaves_its_gradients_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    original = model[0]
    model.register_forward_hook(lambda module, inputs, output: output + original(inputs[0]))
    original.weight.grad = torch.ones(4, 6)
    x, before = torch.randn(8, 6), state_of(model)
    find_scale_invariant(model, x)
    assert_same(state_of(model), before)


class InFloat32(nn.Module):
    """Runs in float32 only, as many kernels do. With `bias`, the weight is invariant only jointly with it."""

    def __init__(self, norm: nn.Module, bias: bool = False) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(8, 12, bias=bias), norm, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear.weight.dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return self.head(self.norm(self.linear(x)).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_that_do_not_run_in_float64_are_measured_in_another_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(32, 8).to(dtype)

    def explain(norm: nn.Module, bias: bool = False) -> dict[str, Any]:
        explained = explain_scale_invariance(InFloat32(norm, bias).to(dtype), x)
        assert {found.dtype for found in explained.values()} == {torch.float32}
        return {n: found for n, found in explained.items() if "norm" not in n}

    bn, ln = explain(nn.BatchNorm1d(12), bias=True), explain(nn.LayerNorm(12))
    assert {n: found.kind for n, found in bn.items() if found.kind} == {"linear.weight": "channel"}
    assert bn["linear.bias"].reason == "no effect on the output"
    assert {n: found.kind for n, found in ln.items() if found.kind} == {"linear.weight": "tensor"}
    assert explain(nn.LayerNorm(12), bias=True)["linear.weight"].reason == "only jointly with 'linear.bias'"
    assert not any(found.kind for found in explain(nn.Identity()).values())


class InBfloat16(InFloat32):
    def forward(self, x: Tensor) -> Tensor:
        if self.linear.weight.dtype != torch.bfloat16:
            raise RuntimeError("expected BFloat16")
        return self.head(self.norm(self.linear(x)).relu())


def test_a_model_of_bfloat16_alone() -> None:
    x = torch.randn(64, 8).bfloat16()
    for norm, kind in ((nn.BatchNorm1d(12), "channel"), (nn.LayerNorm(12), "tensor"), (nn.Identity(), None)):
        explained = explain_scale_invariance(InBfloat16(norm).bfloat16(), x)
        assert explained["linear.weight"].kind == kind
        assert explained["linear.weight"].dtype == torch.bfloat16
        assert explained["head.weight"].kind is None


class InSeveral(nn.Module):
    """As many language models: matrices in bfloat16, normalization and head in float32, casts in between."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12, bias=False, dtype=torch.bfloat16)
        self.norm, self.head = nn.LayerNorm(12, eps=eps), nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.linear(x.bfloat16()).float()).relu())


def test_a_model_of_several_dtypes_with_casts_of_its_own() -> None:
    x = torch.randn(64, 8)
    (tracked, *_) = param_groups(InSeveral(eps=1e-5), x)
    assert tracked["param_names"] == ["linear.weight"]
    with pytest.warns(UserWarning, match="halving all of them changes the outputs"):
        assert find_scale_invariant(InSeveral(eps=1.0), x)["linear.weight"] == "tensor"


class Rotary(nn.Module):
    """Rotary position embedding by complex numbers."""

    turns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)
        angles = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.5, 0.25, 0.125]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: Tensor) -> Tensor:
        assert self.turns.is_complex()
        pairs = torch.view_as_complex(self.linear(x).unflatten(-1, (4, 2)))
        return self.head(self.norm(torch.view_as_real(pairs * self.turns).flatten(-2)))


def test_complex_buffers_stay_complex() -> None:
    found = explain_scale_invariance(Rotary(), torch.randn(16, 5, 8))["linear.weight"]
    assert (found.kind, found.dtype) == ("tensor", torch.float64)


class Keywords(nn.Module):
    """Called like a language model of Hugging Face: keyword arguments in, a dataclass or a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8, bias=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 20)

    def forward(
        self, *, input_ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        hidden = self.inner(self.tokens(input_ids))
        logits = self.head(self.norm(hidden)) * (1 if mask is None else mask[..., None])
        outputs = {"logits": logits, "hidden": hidden}
        if labels is not None:
            outputs["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return outputs


def test_keyword_arguments_and_which_outputs_count() -> None:
    ids = torch.randint(20, (8, 6))
    batch = {"input_ids": ids, "mask": torch.ones(8, 6), "labels": ids.roll(1, 1)}
    model = Keywords()
    expected = {"tokens.weight": "channel", "inner.weight": "tensor"}
    assert set(find_scale_invariant(model, **batch).values()) == {None}  # hidden is an output
    for outputs in (lambda out: out["logits"], lambda out: out["loss"]):
        found = find_scale_invariant(model, **batch, outputs=outputs)
        assert {name: kind for name, kind in found.items() if kind} == expected
    tracked, *_ = param_groups(model, **batch, outputs=lambda out: out["loss"], weight_decay=0.1)
    assert tracked["param_names"] == list(expected)
    assert equalize_(model, **batch, loss=lambda out: out["loss"]).keys() == set(expected)
    with pytest.raises(TypeError, match="takes 1 positional argument") as error:
        find_scale_invariant(model, batch)
    assert "**batch" in error.value.__notes__[1]


def test_what_cannot_be_measured_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"0\.weight.*on the meta device.*to_empty"):
        find_scale_invariant(model, torch.ones(8, 4))
    program = torch.export.export(nn.Linear(4, 4), (torch.ones(8, 4),))
    with pytest.raises(TypeError, match=r"ExportedProgram.*\.module\(\)"):
        find_scale_invariant(program, torch.ones(8, 4))  # type: ignore[arg-type]
