"""Which weights are scale-invariant, by measurement, and what follows for groups and initialization.

A weight w is scale-invariant if f(α·w) = f(w) for every α > 0 and all values of the other parameters. Euler's
theorem then gives ⟨w, g⟩ = 0 for the gradient g of every function of the outputs (docs/theory.md §1), so one
backward pass tests all the parameters of a model at once.
"""

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .distributed import is_dtensor

__all__ = ["Invariance", "equalize_", "explain_scale_invariance", "find_scale_invariant", "param_groups"]

Kind: TypeAlias = Literal["channel", "tensor"] | None

# A weight of n elements that is not scale-invariant has a radial cosine of order 1/√n. Counted in that unit,
# float64 leaves about 1e-12 for an invariant weight, and 1e-7 where a model computes its norms in float32.
ROUNDING = 1e-4
# A parameter has no effect if its ‖w‖·‖g‖ is below a fraction of the largest in its module or in the
# model; between the layers of a deep network it differs by factors of up to 1e9.
NO_EFFECT_IN_MODULE = 1e-6
NO_EFFECT_IN_MODEL = 1e-12
EPS_FACTOR = 1e-15
ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Invariance:
    """What a measurement says about one parameter: its `kind` and, in words, the `reason`."""

    kind: Kind
    reason: str


def find_scale_invariant(model: nn.Module, *inputs: Any) -> dict[str, Kind]:
    """Find, by measurement, the parameters that `model(*inputs)` is scale-invariant in during training.

    Returns a dict with a key for every name in `model.named_parameters()` (a shared parameter once):
    "channel" if each slice along dim 0 can be rescaled on its own, "tensor" if only the whole can, else None.
    None is also the answer for a parameter without any effect, like a bias in front of BatchNorm: it has no
    direction to turn in. `explain_scale_invariance` adds the reason.

    A deep copy of the model, in float64, is run forward and backward from random cotangents on its outputs,
    and ⟨w, g⟩ = 0 is tested for all parameters at once, frozen ones included.
    - Training mode: the copy is measured as `model.train()` would run it, whatever the mode of `model`. (In
      eval mode BatchNorm divides by a constant, and nothing in front of it is scale-invariant.)
    - At two random points near the parameters, so that neither chance nor a bias or gain that is still at its
      initial 0 hides a dependence.
    - With every eps multiplied by 1e-15, since it breaks the invariance by about eps / (σ² + eps), where σ²
      is the variance being normalized. That covers attributes named eps, eps arguments of torch's norms, and
      added constants up to 1e-3; a norm that hides its eps counts while eps is below about 1e-4·σ².
    - The answer is the same at every call: dropout and all draws are seeded.

    `model` itself is never run: parameters, buffers, gradients, modes and the random state (torch's, Python's
    and NumPy's) stay as they are. Forward hooks are copied with the model, and do run.

    A transposed convolution has its output channels along dim 1, so in front of BatchNorm it is "tensor".

    Args:
        model: any module on CPU or CUDA; outputs may be nested tuples, lists, dicts, dataclasses.
        inputs: the positional arguments of `model`; real data, a batch of at least 8 different samples.
            Floating-point tensors in them, also in tuples, lists and dicts, are cast to float64.

    Raises:
        ValueError: lazy parameters without a shape, sharded ones (DTensors), or no floating-point output that depends
            on a parameter.
        Exception: what `model(*inputs)` raises, with a note on how it was called.

    Source: derived, docs/theory.md §1.
    """
    return {name: found.kind for name, found in explain_scale_invariance(model, *inputs).items()}


def explain_scale_invariance(model: nn.Module, *inputs: Any) -> dict[str, Invariance]:
    """Find the scale-invariant parameters like `find_scale_invariant`, each with the reason in words.

    The reasons: "each output channel on its own", "only as a whole", "only jointly with 'conv.bias'",
    "not: radial cosine 0.12" (the larger of the two measured), "no effect on the output",
    "unused: no gradient", "not measured: ..." (its gradient is not finite, or it is not real floating point).
    Arguments and errors are those of `find_scale_invariant`.
    """
    return _explain(model, inputs, training=True)


def param_groups(
    model: nn.Module,
    *inputs: Any,
    weight_decay: float = 0.0,
    tracked_lr: float | None = None,
    exclude: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups for ELRSGD, or any other torch optimizer.

    Returns plain dicts with the keys `name`, `params`, `param_names`, `scale_invariant` (bool) and
    `weight_decay`; empty groups are left out:
    - "scale_invariant": what `find_scale_invariant` finds, if it has 2 or more dimensions;
    - "other": all else with 2 or more dimensions, for example the head;
    - "no_decay": norm gains and biases (fewer than 2 dimensions, or the magnitude of
      `torch.nn.utils.parametrizations.weight_norm`), with weight decay 0.

    Args:
        model, inputs: as for `find_scale_invariant`.
        weight_decay: weight decay of the first two groups, per step and unit of lr; not negative.
        tracked_lr: becomes `tracked_lr` of the "scale_invariant" group, in the unit of the optimizer's rule (rad for
            "angle", `sphere_lr` for "sphere"): see `ELRSGD`, the only optimizer that reads it. None: no group has the
            key, the optimizer's own holds.
        exclude: names or `fnmatch` patterns ("head.*") of parameters that are never tracked.

    Warns:
        UserWarning: nothing is tracked.

    Raises:
        ValueError: a number that is negative or not finite, an entry of `exclude` that matches no parameter,
            a model without trainable parameters; and those of `find_scale_invariant`.
        TypeError: `exclude` is a single string.
    """
    for argument, value in (("weight_decay", weight_decay), ("tracked_lr", tracked_lr)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{argument} is {value}; it must be finite and >= 0")
    if isinstance(exclude, str):
        raise TypeError(
            f"exclude is the string {exclude!r}; pass an iterable of names or patterns: [{exclude!r}]"
        )
    names = [name for name, _ in model.named_parameters()]
    excluded = set()
    for pattern in exclude:
        matches = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(
                f"exclude has {pattern!r}, which matches no parameter; give a name from "
                f"model.named_parameters() or a pattern such as {pattern + '.*'!r}"
            )
        excluded.update(matches)
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if not trainable:
        raise ValueError("model has no parameter with requires_grad=True, so there is nothing to optimize")

    kinds = find_scale_invariant(model, *inputs)
    members: dict[str, list[str]] = {"scale_invariant": [], "other": [], "no_decay": []}
    for name, param in trainable.items():
        if param.ndim < 2 or (name.endswith(".original0") and param.numel() == param.shape[0]):
            members["no_decay"].append(name)
        elif kinds[name] is not None and name not in excluded:
            members["scale_invariant"].append(name)
        else:
            members["other"].append(name)
    if not members["scale_invariant"]:
        warnings.warn(
            "no parameter is tracked: none that is trainable and not excluded is a scale-invariant weight. "
            "explain_scale_invariance(model, *inputs) says why for each; pass real data, at least 8 samples, "
            "as inputs, and put a normalization behind the weights to be tracked",
            UserWarning,
            stacklevel=2,
        )

    groups: list[dict[str, Any]] = []
    for group_name, param_names in members.items():
        if not param_names:
            continue
        tracked = group_name == "scale_invariant"
        group = {
            "name": group_name,
            "params": [trainable[name] for name in param_names],
            "param_names": param_names,
            "scale_invariant": tracked,
            "weight_decay": 0.0 if group_name == "no_decay" else weight_decay,
        }
        if tracked and tracked_lr is not None:
            group["tracked_lr"] = tracked_lr
        groups.append(group)
    return groups


def equalize_(model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor]) -> dict[str, float]:
    """Rescale the scale-invariant weights in place so that all have the same E = ‖g‖/‖w‖; the outputs stay.

    One forward and backward pass of `loss(model(*inputs))`, on a copy in the model's own mode and dtype,
    gives E_l for every trainable scale-invariant weight of 2 or more dimensions. That weight is multiplied by
    √(E_l/Ē), where Ē is their geometric mean, and then has E = Ē. Gradients, buffers, modes and the random
    state stay as they are.

    The outputs stay equal to rounding in the model's dtype, and to eps: multiplying a weight by α changes
    what a norm with variance σ² returns by a fraction of about ½·(eps/σ²)·|1 − 1/α²|, which is 5e-4 for
    eps/σ² = 1e-5 and α = 0.1. A deep network can amplify it, and the E are equal to the same accuracy.

    Invariance, too, is measured in the model's own mode. In training mode, the running statistics of
    BatchNorm belong to the old weights afterwards, and only training adapts them: equalize before training.
    In eval mode, weights in front of BatchNorm with running statistics are not scale-invariant and left out.

    Args:
        model, inputs: as for `find_scale_invariant`.
        loss: maps the outputs of `model` to a scalar tensor, like `lambda y: F.cross_entropy(y, target)`.

    Returns:
        The factor of every such weight, by name; 1.0 for one that was left alone.

    Warns:
        UserWarning: weights with a norm or gradient that is zero or not finite; they are left alone and do
            not count in Ē. Or: there is no weight to rescale.

    Raises:
        ValueError: `loss` does not return a scalar that depends on the parameters; and what
            `find_scale_invariant` raises.

    Source: derived, docs/theory.md §1, from g(α·w) = g(w)/α.
    """
    found = _explain(model, inputs, training=False)
    weights = {
        name: param
        for name, param in model.named_parameters()
        if param.requires_grad and param.ndim >= 2 and found[name].kind is not None
    }
    if not weights:
        warnings.warn(
            "equalize_ changed nothing: no trainable weight is scale-invariant in the model's current mode; "
            "call model.train() first, or see explain_scale_invariance(model, *inputs) for the reasons",
            UserWarning,
            stacklevel=2,
        )
        return {}

    twin = _deepcopy(model)
    with _random_state_kept(twin), torch.enable_grad():
        value = loss(_run(twin, tree_map_only(Tensor, torch.clone, inputs)))
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                f"loss returned {_describe(value)}; it must be a scalar tensor that depends on the parameters"
            )
        twins = dict(twin.named_parameters())
        grads = torch.autograd.grad(value.sum(), [twins[name] for name in weights], allow_unused=True)

    relative_grad = {
        name: 0.0 if grad is None else float(_norm(grad) / _norm(param))
        for (name, param), grad in zip(weights.items(), grads, strict=True)
    }
    usable = [name for name, e in relative_grad.items() if e > 0 and math.isfinite(e)]
    left_alone = [name for name in weights if name not in usable]
    if left_alone:
        warnings.warn(
            f"left alone, because their norm or gradient is zero or not finite: {', '.join(left_alone)}. "
            "Check the loss and the inputs, or initialize these weights",
            UserWarning,
            stacklevel=2,
        )
    factors = dict.fromkeys(weights, 1.0)
    if usable:
        mean_log = sum(math.log(relative_grad[name]) for name in usable) / len(usable)
        with torch.no_grad():
            for name in usable:
                factors[name] = math.exp((math.log(relative_grad[name]) - mean_log) / 2)
                weights[name].mul_(factors[name])
    return factors


class _RadialSums:
    """⟨w_i, g_i⟩ and ‖w_i‖·‖g_i‖ of each slice i along dim 0, [rounds, dim 0], and of the whole, [rounds]."""

    def __init__(self, rounds: list[Tensor], numel: int) -> None:
        self.radial, squared_weight, squared_grad = torch.stack(rounds, dim=1)
        self.size = (squared_weight * squared_grad).sqrt()
        self.total_radial = self.radial.sum(1)
        self.total_size = (squared_weight.sum(1) * squared_grad.sum(1)).sqrt()
        self.numel = numel

    def is_channel(self) -> bool:
        chance_cosine = math.sqrt(self.radial.shape[1] / self.numel)
        return bool((self.radial.abs() <= ROUNDING * chance_cosine * self.size).all())

    def is_tensor(self) -> bool:
        chance_cosine = math.sqrt(1 / self.numel)
        return bool((self.total_radial.abs() <= ROUNDING * chance_cosine * self.total_size).all())

    def cancels(self, other: "_RadialSums") -> bool:
        joint = self.total_radial + other.total_radial
        return bool((joint.abs() < ROUNDING * self.total_radial.abs()).all())


def _explain(model: nn.Module, inputs: tuple[Any, ...], *, training: bool) -> dict[str, Invariance]:
    """Measure in training mode, or in the modes that the modules are in if `training` is False."""
    if sharded := [name for name, param in model.named_parameters() if is_dtensor(param)]:
        raise ValueError(
            f"{', '.join(sharded[:3])}{' …' if len(sharded) > 3 else ''} are DTensors: measure the model before "
            "fully_shard or parallelize_module. Groups made before hold their names: afterwards set group['params'] = "
            "[model.get_parameter(name) for name in group['param_names']]"
        )
    measured = _measure(model, inputs, training=training)
    modules: dict[str, dict[str, _RadialSums]] = {}
    for name, sums in measured.items():
        modules.setdefault(_owner(name), {})[name] = sums
    largest = {owner: _largest_size(members) for owner, members in modules.items()}
    largest_of_all = _largest_size(measured) if measured else torch.zeros(ROUNDS)

    explained = {}
    for name, param in model.named_parameters():
        if name not in measured:
            real = param.is_floating_point()
            reason = "unused: no gradient" if real else f"not measured: dtype {param.dtype}"
            explained[name] = Invariance(None, reason)
            continue
        sums, owner = measured[name], _owner(name)
        negligible = torch.maximum(NO_EFFECT_IN_MODULE * largest[owner], NO_EFFECT_IN_MODEL * largest_of_all)
        if not sums.total_size.isfinite().all():
            explained[name] = Invariance(None, "not measured: its gradient is not finite")
        elif (sums.total_size <= negligible).all():
            explained[name] = Invariance(None, "no effect on the output")
        elif partner := next((other for other, its in modules[owner].items() if sums.cancels(its)), None):
            explained[name] = Invariance(None, f"only jointly with {partner!r}")
        elif sums.is_channel():
            explained[name] = Invariance("channel", "each output channel on its own")
        elif sums.is_tensor():
            explained[name] = Invariance("tensor", "only as a whole")
        else:
            cosine = (sums.total_radial.abs() / sums.total_size).nan_to_num().max().item()
            explained[name] = Invariance(None, f"not: radial cosine {cosine:.2g}")
    return explained


def _largest_size(params: Mapping[str, _RadialSums]) -> Tensor:
    return torch.stack([sums.total_size for sums in params.values()]).nan_to_num(0, 0, 0).amax(0)


def _measure(model: nn.Module, inputs: tuple[Any, ...], *, training: bool) -> dict[str, _RadialSums]:
    """Run a float64 copy forward and backward; the sums of every parameter that has a gradient."""
    lazy = [name for name, param in model.named_parameters() if is_lazy(param)]
    if lazy:
        raise ValueError(
            f"lazy parameters have no shape yet: {', '.join(lazy)}; run model(*inputs) once first"
        )
    twin = _deepcopy(model).double()
    if training:
        twin.train()
    params = {name: param for name, param in twin.named_parameters() if param.numel() > 0}
    if not params:
        return {}
    for param in params.values():
        param.requires_grad_(param.is_floating_point())
    _shrink_eps_attributes(twin)

    rounds: dict[str, list[Tensor]] = {name: [] for name in params}
    used = set()
    generator = torch.Generator().manual_seed(0)
    with _random_state_kept(twin), torch.enable_grad():
        _seed_like(twin)
        for _ in range(ROUNDS):
            _move_to_generic_point(params.values(), generator)
            _backward_from_random_cotangents(twin, tree_map_only(Tensor, _double_clone, inputs), generator)
            for name, param in params.items():
                if param.grad is not None:
                    used.add(name)
                rounds[name].append(_radial_sums(param.detach(), param.grad))
                param.grad = None
    return {name: _RadialSums(rounds[name], params[name].numel()) for name in params if name in used}


def _radial_sums(weight: Tensor, grad: Tensor | None) -> Tensor:
    """⟨w_i, g_i⟩, ‖w_i‖² and ‖g_i‖² of the slices along dim 0: [3, dim 0], on the CPU."""
    w = weight.flatten(1) if weight.ndim > 1 else weight.reshape(-1, 1)
    g = torch.zeros_like(w) if grad is None else grad.to_dense().reshape(w.shape)
    return torch.stack([(w * g).sum(1), w.square().sum(1), g.square().sum(1)]).cpu()


def _backward_from_random_cotangents(
    model: nn.Module, inputs: tuple[Any, ...], generator: torch.Generator
) -> None:
    with _SmallEps():
        outputs = [
            leaf
            for leaf in _tensors_in(_run(model, inputs))
            if leaf.is_floating_point() and leaf.requires_grad
        ]
        if not outputs:
            raise ValueError(
                "model(*inputs) has no floating-point output that depends on a parameter; "
                "let it return what the loss is computed from, with gradients enabled"
            )
        draw = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in outputs]
        torch.autograd.backward(outputs, [v.to(leaf) for v, leaf in zip(draw, outputs, strict=True)])


def _move_to_generic_point(params: Iterable[Tensor], generator: torch.Generator) -> None:
    """Multiply all entries by 0.5 ... 1.5; let no bias, gain or other tensor stay zero or constant."""

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
            elif not param.any():
                param.add_(uniform(param, -1, 1) / math.sqrt(param[0].numel()))


def _shrink_eps_attributes(model: nn.Module) -> None:
    """Do what `_SmallEps` does for layers that run again during backward (activation checkpointing)."""
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
        name = getattr(func, "__name__", "")
        limit = math.inf if name in self.NORMS else 1e-3 if name in self.ADDITIONS else 0.0

        def shrink(value: Any) -> Any:
            return EPS_FACTOR * value if isinstance(value, float) and abs(value) <= limit else value

        return func(*map(shrink, args), **{key: shrink(value) for key, value in (kwargs or {}).items()})


def _deepcopy(model: nn.Module) -> nn.Module:
    # torch.nn.utils.weight_norm and spectral_norm keep a computed weight that deepcopy would refuse.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:
        error.add_note(
            "elropt runs a deep copy of the model: pass one that copy.deepcopy can copy; "
            "of one in a wrapper such as DistributedDataParallel, its .module"
        )
        raise


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    try:
        return model(*inputs)
    except Exception as error:
        dtypes = sorted({str(param.dtype).removeprefix("torch.") for param in model.parameters()})
        error.add_note(
            f"elropt ran model(*inputs) on a copy in {'train' if model.training else 'eval'} mode, with "
            f"{' and '.join(dtypes)} parameters. In training mode BatchNorm needs more than one value per "
            "channel: pass at least 8 samples. If dtypes clash, the model's forward may name one of its own"
        )
        raise


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in nested sequences, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors_in(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from _tensors_in(getattr(output, field.name))


def _double_clone(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _owner(name: str) -> str:
    """The module that a parameter belongs to; for a parametrized one, the module that is parametrized."""
    owner, parametrized, _ = f".{name}".partition(".parametrizations.")
    return owner if parametrized else owner.rpartition(".")[0]


def _cuda_devices(model: nn.Module) -> list[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})


def _seed_like(model: nn.Module) -> None:
    """Seed the generators that a model draws from, and no other device's: torch.manual_seed would."""
    torch.default_generator.manual_seed(0)
    for device in _cuda_devices(model):
        torch.cuda.default_generators[device].manual_seed(0)


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
