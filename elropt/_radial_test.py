"""The radial test: ⟨w, g⟩ of every parameter, for gradients g of random functions of a model's outputs.

It is zero, up to rounding, where w is scale-invariant (docs/theory.md §1).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._model_copy import Inputs, Outputs, run, seed_like, tensors_in, untouched

__all__ = ["PRECISIONS", "Precision", "RadialSums", "coarsest_dtype", "radial_sums"]

EPS_FACTOR = 1e-15


class Precision(NamedTuple):
    """Tolerances of the radial test in a dtype.

    rounding: the largest radial cosine that counts as zero, in units of 1/√n for a weight of n elements. That is the
        order of the cosine of a weight that is not scale-invariant. In float64 the cosine of an invariant weight is
        about 1e-12 in that unit, and 1e-7 where the model computes its norms in float32.
    no_effect: a parameter has no effect if its ‖w‖·‖g‖ is below this fraction of the largest in its module.
    rounds: number of random points at which the cosine must count as zero.
    """

    rounding: float
    no_effect: float
    rounds: int


PRECISIONS = {
    torch.float64: Precision(1e-4, 1e-6, 2),
    torch.float32: Precision(1e-2, 1e-4, 4),
    torch.bfloat16: Precision(0.2, 0.02, 8),
    torch.float16: Precision(0.1, 0.02, 8),
}


class RadialSums:
    """⟨w_i, g_i⟩ and ‖w_i‖·‖g_i‖ of each slice i along dim 0, [rounds, dim 0], and of the whole tensor, [rounds]."""

    def __init__(self, rounds: list[Tensor], numel: int, rounding: float, sparse: bool) -> None:
        self.radial, squared_weight, squared_grad = torch.stack(rounds, dim=1)
        self.size = (squared_weight * squared_grad).sqrt()
        self.total_radial = self.radial.sum(1)
        self.total_size = (squared_weight.sum(1) * squared_grad.sum(1)).sqrt()
        self.numel, self.rounding, self.sparse = numel, rounding, sparse

    def is_channel(self) -> bool:
        chance_cosine = math.sqrt(self.radial.shape[1] / self.numel)
        return bool((self.radial.abs() <= self.rounding * chance_cosine * self.size).all())

    def is_tensor(self) -> bool:
        chance_cosine = math.sqrt(1 / self.numel)
        return bool((self.total_radial.abs() <= self.rounding * chance_cosine * self.total_size).all())

    def cancels(self, other: "RadialSums") -> bool:
        joint = self.total_radial + other.total_radial
        return bool((joint.abs() < self.rounding * self.total_radial.abs()).all())


def radial_sums(
    model: nn.Module, twin: nn.Module, inputs: Inputs, outputs: Outputs | None, precision: Precision
) -> dict[str, RadialSums]:
    """The sums of every parameter that gets a gradient when `twin`, a copy of `model`, runs forward and backward."""
    params = {name: param for name, param in twin.named_parameters() if param.numel() > 0}
    if not params:
        return {}
    for param in params.values():
        param.requires_grad_(param.is_floating_point())
    _shrink_eps_attributes(twin)

    rounds: dict[str, list[Tensor]] = {name: [] for name in params}
    used, sparse = set(), set()
    generator = torch.Generator().manual_seed(0)
    with untouched(model), torch.enable_grad():
        seed_like(twin)
        for _ in range(precision.rounds):
            _move_to_generic_point(params.values(), generator)
            _backward_from_random_cotangents(twin, inputs.cloned(), outputs, generator)
            for name, param in params.items():
                if param.grad is not None:
                    used.add(name)
                    if param.grad.layout != torch.strided:
                        sparse.add(name)
                rounds[name].append(_slice_sums(param.detach(), param.grad))
                param.grad = None
    return {
        name: RadialSums(rounds[name], param.numel(), precision.rounding, name in sparse)
        for name, param in params.items()
        if name in used
    }


def _slice_sums(weight: Tensor, grad: Tensor | None) -> Tensor:
    """⟨w_i, g_i⟩, ‖w_i‖² and ‖g_i‖² of the slices along dim 0: [3, dim 0], float64 on the CPU."""
    w = weight.flatten(1) if weight.ndim > 1 else weight.reshape(-1, 1)
    g = torch.zeros_like(w) if grad is None else grad.to_dense().reshape(w.shape)
    w, g = w.cpu().double(), g.cpu().double()
    return torch.stack([(w * g).sum(1), w.square().sum(1), g.square().sum(1)])


def _backward_from_random_cotangents(
    model: nn.Module, inputs: Inputs, outputs: Outputs | None, generator: torch.Generator
) -> None:
    with _SmallEps():
        returned = run(model, inputs)
        leaves = [
            leaf
            for leaf in tensors_in(returned if outputs is None else outputs(returned))
            if leaf.is_floating_point() and leaf.requires_grad
        ]
        if not leaves:
            raise ValueError(
                f"{'model(*inputs) has' if outputs is None else 'what outputs() returns has'} no floating-point output "
                "that depends on a parameter; let it return what the loss is computed from, with gradients enabled"
            )
        draw = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
        torch.autograd.backward(leaves, [v.to(leaf) for v, leaf in zip(draw, leaves, strict=True)])


def _move_to_generic_point(params: Iterable[Tensor], generator: torch.Generator) -> None:
    """Move all entries a little: factors of 0.5 to 1.5. No entry of a weight stays near 0, no bias or gain constant."""

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        unit = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * unit).to(like)

    with torch.no_grad():
        for param in params:
            if not param.is_floating_point():
                continue
            param.mul_(uniform(param, 0.5, 1.5))
            if param.ndim < 2:
                param.add_(uniform(param, 0.1, 0.5))
                continue
            scale = param.double().square().mean().sqrt()
            if scale == 0:
                scale = torch.tensor(1 / math.sqrt(param[0].numel()))
            negligible = param.abs() <= 1e-3 * scale.to(param)
            if negligible.any():  # zeros on one side of a diagonal, of a pruned weight, …
                low = -0.5 if (param < 0).any() or negligible.all() else 0.1  # a weight ≥ 0 may have to be
                param.add_(uniform(param, low, 0.5) * scale.to(param) * negligible)


def _shrink_eps_attributes(model: nn.Module) -> None:
    """As `_SmallEps`, which does not reach layers that run again during backward (activation checkpointing)."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and not {"eps", "epsilon"}.isdisjoint(name.split("_")):
                setattr(module, name, EPS_FACTOR * value)


class _SmallEps(TorchFunctionMode):
    """Multiplies every eps by EPS_FACTOR: the float arguments of norms, and those up to 1e-3 of additions."""

    NORMS = frozenset({"batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"})
    ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # in an exported program the name is add.Tensor
        name = getattr(func, "__name__", "").partition(".")[0]
        limit = math.inf if name in self.NORMS else 1e-3 if name in self.ADDITIONS else 0.0

        def shrink(value: Any) -> Any:
            return EPS_FACTOR * value if isinstance(value, float) and abs(value) <= limit else value

        named = {k: v if k == "alpha" else shrink(v) for k, v in (kwargs or {}).items()}
        return func(*map(shrink, args), **named)


def coarsest_dtype(params: Iterable[Tensor]) -> torch.dtype:
    """The least exact of their dtypes; float64 if none of them is in PRECISIONS."""
    held = (param.dtype for param in params if param.dtype in PRECISIONS)
    return max(held, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)
