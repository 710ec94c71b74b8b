"""Which weights are scale-invariant, by measurement, and what follows for groups and initialization.

A weight w is scale-invariant if f(α·w) = f(w) for every α > 0 and all values of the other parameters. Euler's
theorem then gives ⟨w, g⟩ = 0 for the gradient g of every function of the outputs (docs/theory.md §1), so one
backward pass tests all the parameters of a model at once.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._model_copy import (
    Inputs,
    backward_from_loss,
    check_model,
    copied,
    run,
    seed_like,
    tensors_in,
    untouched,
)

__all__ = [
    "Invariance",
    "equalize_",
    "explain_for_loss",
    "explain_scale_invariance",
    "find_scale_invariant",
    "outputs_change",
    "param_groups",
]

Kind: TypeAlias = Literal["channel", "tensor"] | None
Outputs: TypeAlias = Callable[[Any], Any]


class Precision(NamedTuple):
    """How exactly ⟨w, g⟩ = 0 can be told in a dtype, and how often it must be so that chance does not count.

    rounding: a weight of n elements that is not scale-invariant has a radial cosine of order 1/√n. Counted in that
        unit, float64 leaves about 1e-12 for an invariant weight, and 1e-7 where a model computes its norms in float32.
    no_effect: a parameter has none if its ‖w‖·‖g‖ is below this fraction of the largest in its module.
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
NO_EFFECT_IN_MODEL = 1e-12  # between the layers of a deep network ‖w‖·‖g‖ differs by factors of up to 1e9
EPS_FACTOR = 1e-15
EPS_MATTERS = 0.01  # change of the outputs from which on a warning says that eps breaks the invariance


@dataclass(frozen=True, slots=True)
class Invariance:
    """What a measurement says about one parameter.

    Attributes:
        kind: "channel", "tensor" or None, see `find_scale_invariant`.
        reason: why, in words.
        dtype: what it was measured in: float64, or where the model does not run in that a dtype that it does run in.
        sparse_grad: whether its gradient is sparse, as that of ``nn.Embedding(sparse=True)``.
    """

    kind: Kind
    reason: str
    dtype: torch.dtype = torch.float64
    sparse_grad: bool = False


def find_scale_invariant(
    model: nn.Module, /, *inputs: Any, outputs: Outputs | None = None, **kwargs: Any
) -> dict[str, Kind]:
    """Find, by measurement, the parameters that `model(*inputs, **kwargs)` is scale-invariant in during training.

    Returns a dict with a key for every name in `model.named_parameters()` (a shared parameter once):
    "channel" if each slice along dim 0 can be rescaled on its own, "tensor" if only the whole can, else None.
    None is also the answer for a parameter without any effect, like a bias in front of BatchNorm: it has no
    direction to turn in. `explain_scale_invariance` adds the reason.

    A deep copy of the model, in float64, is run forward and backward from random cotangents on its outputs,
    and ⟨w, g⟩ = 0 is tested for all parameters at once, frozen ones included.
    - Training mode: the copy is measured as `model.train()` would run it, whatever the mode of `model`. (In
      eval mode BatchNorm divides by a constant, and nothing in front of it is scale-invariant.)
    - At two random points near the parameters, so that neither chance nor an entry that is still at its
      initial 0 hides a dependence.
    - With every eps multiplied by 1e-15, since it breaks the invariance by about eps / (σ² + eps), where σ²
      is the variance being normalized. That covers attributes named eps, eps arguments of torch's norms, and
      added constants up to 1e-3; a norm that hides its eps counts while eps is below about 1e-4·σ² (1e-2·σ² in
      TorchScript, whose eps are out of reach). If eps matters in the model as it is, a warning says how much.
    - Where the model does not run in float64 (casts of its own, kernels for float32 only, quantization), in float32
      or in its own dtype, at more points, and with a tolerance that fits: weak dependences may then be missed.
      `Invariance.dtype` says which it was.
    - The answer is the same at every call: dropout and all draws are seeded.

    `model` itself is never run: parameters, buffers, gradients, modes and the random state (torch's, Python's
    and NumPy's) stay as they are. Forward hooks are copied with the model, and do run.

    A transposed convolution has its output channels along dim 1, so in front of BatchNorm it is "tensor".

    Args:
        model: any module on CPU or CUDA, also a ScriptModule or the `.module()` of an exported program; outputs may
            be nested tuples, lists, dicts, dataclasses.
        inputs, kwargs: the arguments of `model`, ``find_scale_invariant(model, **batch)`` for a batch that is a dict;
            real data, at least 8 different samples. Floating-point tensors in them, also in tuples, lists, dicts and
            dataclasses, are cast to float64. A keyword argument of the model that is called like one of this function
            (`outputs`) must be passed by position.
        outputs: maps what `model` returns to what counts, for models that return more than the loss uses:
            ``lambda out: out["logits"]``, or the loss itself. None: all tensors count.

    Warns:
        UserWarning: halving the invariant weights of the model as it is changes the outputs by more than 1 %: the
            eps of a normalization is not small beside the variance that it is added to.

    Raises:
        TypeError: `model` is no module.
        ValueError: lazy parameters without a shape, on the meta device, or sharded ones (DTensors); or no
            floating-point output that depends on a parameter.
        Exception: what `model(*inputs, **kwargs)` raises, with a note on how it was called.

    Source: derived, docs/theory.md §1.
    """
    call = Inputs(inputs, kwargs)
    explained = _explain(model, call, outputs, training=True)
    _warn_of_eps(model, call, outputs, explained)
    return {name: found.kind for name, found in explained.items()}


def explain_scale_invariance(
    model: nn.Module, /, *inputs: Any, outputs: Outputs | None = None, **kwargs: Any
) -> dict[str, Invariance]:
    """Find the scale-invariant parameters like `find_scale_invariant`, each with the reason in words.

    The reasons: "each output channel on its own", "only as a whole", "only jointly with 'conv.bias'",
    "not: radial cosine 0.12" (the largest measured), "no effect on the output",
    "unused: no gradient", "not measured: ..." (its gradient is not finite, or it is not real floating point).
    Arguments, warnings and errors are those of `find_scale_invariant`.
    """
    call = Inputs(inputs, kwargs)
    explained = _explain(model, call, outputs, training=True)
    _warn_of_eps(model, call, outputs, explained)
    return explained


def explain_for_loss(
    model: nn.Module, inputs: Inputs, loss: Callable[[Any], Tensor], *, training: bool
) -> dict[str, Invariance]:
    """`explain_scale_invariance` for a known loss: what only outputs that it does not use depend on counts as
    invariant too. In training mode, or in the modes that the modules are in if `training` is False."""
    explained = _explain(model, inputs, None, training=training)
    if all(explained[name].kind for name, param in model.named_parameters() if param.ndim >= 2):
        return explained
    by_loss = _explain(model, inputs, loss, training=training)
    return {
        name: by_loss[name] if found.kind is None and by_loss[name].kind else found
        for name, found in explained.items()
    }


def param_groups(
    model: nn.Module,
    /,
    *inputs: Any,
    weight_decay: float = 0.0,
    tracked_lr: float | None = None,
    exclude: Iterable[str] = (),
    outputs: Outputs | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups for ELRSGD, or any other torch optimizer.

    Returns plain dicts with the keys `name`, `params`, `param_names`, `scale_invariant` (bool) and
    `weight_decay`; empty groups are left out:
    - "scale_invariant": what `find_scale_invariant` finds, if it has 2 or more dimensions;
    - "other": all else with 2 or more dimensions, for example the head;
    - "no_decay": norm gains and biases (fewer than 2 dimensions, or the magnitude of
      `torch.nn.utils.parametrizations.weight_norm`), with weight decay 0;
    - "sparse": weights with sparse gradients, which only plain SGD without decay can apply: ``rule=None``,
      ``project=False``, weight decay 0.

    Args:
        model, inputs, outputs, kwargs: as for `find_scale_invariant`, ``param_groups(model, **batch)`` for a batch
            that is a dict. An argument of the model that is called like one of this function is passed by position.
        weight_decay: weight decay of the first two groups, per step and unit of lr; not negative.
        tracked_lr: becomes `tracked_lr` of the "scale_invariant" group, in the unit of the optimizer's rule (rad for
            "angle", `sphere_lr` for "sphere"): see `ELRSGD`, the only optimizer that reads it. None: no group has the
            key, the optimizer's own holds.
        exclude: names or `fnmatch` patterns ("head.*") of parameters that are never tracked.

    Warns:
        UserWarning: nothing is tracked. Or: the invariance is only approximate, see `find_scale_invariant`.

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

    call = Inputs(inputs, kwargs)
    explained = _explain(model, call, outputs, training=True)
    members: dict[str, list[str]] = {"scale_invariant": [], "other": [], "no_decay": [], "sparse": []}
    for name, param in trainable.items():
        if explained[name].sparse_grad:
            members["sparse"].append(name)
        elif param.ndim < 2 or (name.endswith(".original0") and param.numel() == param.shape[0]):
            members["no_decay"].append(name)
        elif explained[name].kind is not None and name not in excluded:
            members["scale_invariant"].append(name)
        else:
            members["other"].append(name)
    _warn_of_eps(model, call, outputs, {name: explained[name] for name in members["scale_invariant"]})
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
            "weight_decay": 0.0 if group_name in ("no_decay", "sparse") else weight_decay,
        }
        if group_name == "sparse":
            group |= {"rule": None, "project": False}
        if tracked and tracked_lr is not None:
            group["tracked_lr"] = tracked_lr
        groups.append(group)
    return groups


def equalize_(
    model: nn.Module, /, *inputs: Any, loss: Callable[[Any], Tensor], **kwargs: Any
) -> dict[str, float]:
    """Rescale the scale-invariant weights in place so that all have the same E = ‖g‖/‖w‖; the outputs stay.

    One forward and backward pass of `loss(model(*inputs, **kwargs))`, on a copy in the model's own mode and dtype,
    gives E_l for every trainable weight of 2 or more dimensions that the outputs, or the loss, are scale-invariant
    in. That weight is multiplied by √(E_l/Ē), where Ē is their geometric mean, and then has E = Ē. Gradients,
    buffers, modes and the random state stay as they are.

    The outputs stay equal to rounding in the model's dtype, and to eps: multiplying a weight by α changes
    what a norm with variance σ² returns by a fraction of about ½·(eps/σ²)·|1 − 1/α²|, which is 5e-4 for
    eps/σ² = 1e-5 and α = 0.1. A deep network can amplify it, and the E are equal to the same accuracy. A warning
    says by how much the outputs have changed where that is more than 1 % (in half precision, 30 roundings).

    Invariance, too, is measured in the model's own mode. In training mode, the running statistics of
    BatchNorm belong to the old weights afterwards, and only training adapts them: equalize before training.
    In eval mode, weights in front of BatchNorm with running statistics are not scale-invariant and left out.

    Args:
        model, inputs, kwargs: as for `find_scale_invariant`; an argument of the model that is called `loss` is
            passed by position.
        loss: maps the outputs of `model` to a scalar tensor, like `lambda y: F.cross_entropy(y, target)`.

    Returns:
        The factor of every such weight, by name; 1.0 for one that was left alone.

    Warns:
        UserWarning: weights with a norm or gradient that is zero or not finite; they are left alone and do
            not count in Ē. Or: there is no weight to rescale. Or: the outputs change, see above.

    Raises:
        ValueError: `loss` does not return a scalar that depends on the parameters; and what
            `find_scale_invariant` raises.

    Source: derived, docs/theory.md §1, from g(α·w) = g(w)/α.
    """
    check_model(model)
    call = Inputs(inputs, kwargs)
    twin = copied(model)
    with untouched(model), torch.enable_grad():
        backward_from_loss(twin, call.cloned(), loss)
    grads = {name: param.grad for name, param in twin.named_parameters()}
    found = explain_for_loss(model, call, loss, training=False)
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

    relative_grad = {
        name: 0.0 if (grad := grads[name]) is None else float(_norm(grad) / _norm(param))
        for name, param in weights.items()
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
        factors |= {name: math.exp((math.log(relative_grad[name]) - mean_log) / 2) for name in usable}
        change = outputs_change(model, call, factors, training=False)
        if change.matters:
            warnings.warn(f"equalize_ {change.in_words('changed')}", UserWarning, stacklevel=2)
        with torch.no_grad():
            for name in usable:
                weights[name].mul_(factors[name])
    return factors


@dataclass(frozen=True)
class OutputsChange:
    """Relative change of the outputs, ‖new − old‖/‖old‖, when weights are rescaled: of all, and of each alone."""

    of_all: float
    of_each: dict[str, float]

    @property
    def matters(self) -> bool:
        return bool(self.of_each)

    def in_words(self, verb: str) -> str:
        worst = sorted(self.of_each, key=lambda name: -self.of_each[name])[:3]
        return (
            f"{verb} the outputs by {self.of_all:.1%}: these weights are scale-invariant only up to the eps of a "
            "normalization, which is not small beside the variance that it is added to. By weight: "
            f"{', '.join(f'{name} {self.of_each[name]:.1%}' for name in worst)}. A smaller eps, or larger weights "
            "there at the start, make them so"
        )


def outputs_change(
    model: nn.Module,
    inputs: Inputs,
    factors: Mapping[str, float],
    *,
    outputs: Outputs | None = None,
    training: bool,
    dtype: torch.dtype | None = None,
) -> OutputsChange:
    """How much the outputs of the model as it is, with its own eps, change with the weights multiplied by `factors`.

    `of_each` is empty while they change by no more than EPS_MATTERS (or rounding).
    """
    twin = copied(model, dtype=dtype, training=training or None)
    params = dict(twin.named_parameters())
    for param in params.values():
        param.requires_grad_(
            param.is_floating_point()
        )  # so that outputs that do not depend on any are left out

    def result() -> Tensor:
        with untouched(twin), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the measurement has given them already
            seed_like(twin)
            returned = run(twin, inputs.cloned(dtype))
            counted = tensors_in(returned if outputs is None else outputs(returned))
            vectors = [
                leaf.detach().flatten().double().cpu()
                for leaf in counted
                if leaf.is_floating_point() and leaf.requires_grad
            ]
        return torch.cat(vectors) if vectors else torch.zeros(0)

    before = result()

    def change(names: Iterable[str]) -> float:
        kept = {name: params[name].detach().clone() for name in names}
        with torch.no_grad():
            for name in kept:
                params[name].mul_(factors[name])
        found = float((result() - before).norm() / before.norm())
        with torch.no_grad():
            for name, value in kept.items():
                params[name].copy_(value)
        return found

    of_all = change(factors)
    rounding = torch.finfo(_coarsest(params.values())).eps
    matters = max(EPS_MATTERS, 30 * rounding) < of_all < math.inf
    return OutputsChange(of_all, {name: change([name]) for name in factors} if matters else {})


def _warn_of_eps(
    model: nn.Module, inputs: Inputs, outputs: Outputs | None, explained: Mapping[str, Invariance]
) -> None:
    """Warn, on behalf of the caller's caller, if the model as it is is far from invariant in these weights."""
    params = dict(model.named_parameters())
    halved = {n: 0.5 for n, found in explained.items() if found.kind and params[n].ndim >= 2}
    if not halved:
        return
    measured = explained[next(iter(halved))].dtype
    dtype = None if measured == _coarsest(params.values()) else measured  # None: as it is, maybe of several
    change = outputs_change(model, inputs, halved, outputs=outputs, training=True, dtype=dtype)
    if change.matters:
        warnings.warn(
            "rule='warmup' and equalize_ rescale the scale-invariant weights, which is to leave the outputs as they "
            f"are. In this model, halving all of them {change.in_words('changes')}; or exclude them",
            UserWarning,
            stacklevel=3,
        )


class _RadialSums:
    """⟨w_i, g_i⟩ and ‖w_i‖·‖g_i‖ of each slice i along dim 0, [rounds, dim 0], and of the whole, [rounds]."""

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

    def cancels(self, other: "_RadialSums") -> bool:
        joint = self.total_radial + other.total_radial
        return bool((joint.abs() < self.rounding * self.total_radial.abs()).all())


def _explain(
    model: nn.Module, inputs: Inputs, outputs: Outputs | None, *, training: bool
) -> dict[str, Invariance]:
    """Measure in training mode, or in the modes that the modules are in if `training` is False."""
    check_model(model)
    own = [param.dtype for param in model.parameters() if param.is_floating_point()]
    attempts: list[torch.dtype | None] = [torch.float64]
    if any(dtype in (torch.bfloat16, torch.float16) for dtype in own):
        attempts.append(torch.float32)
    if any(dtype != torch.float64 for dtype in own):
        attempts.append(None)  # as it is
    for dtype in attempts[:-1]:
        try:
            return _explain_in(dtype, model, inputs, outputs, training=training)
        except Exception:  # whatever a model raises that does not run in this dtype
            continue
    return _explain_in(attempts[-1], model, inputs, outputs, training=training)


def _explain_in(
    dtype: torch.dtype | None,
    model: nn.Module,
    inputs: Inputs,
    outputs: Outputs | None,
    *,
    training: bool,
) -> dict[str, Invariance]:
    twin = copied(model, dtype=dtype, training=training or None)
    coarsest = _coarsest(twin.parameters())
    precision = PRECISIONS[coarsest]
    if any(isinstance(module, torch.jit.ScriptModule) for module in twin.modules()):
        precision = max(precision, PRECISIONS[torch.float32])
    measured = _measure(model, twin, inputs.cloned(dtype), outputs, precision)
    modules: dict[str, dict[str, _RadialSums]] = {}
    for name, sums in measured.items():
        modules.setdefault(owner_of(name), {})[name] = sums
    largest = {owner: _largest_size(members) for owner, members in modules.items()}
    largest_of_all = _largest_size(measured) if measured else torch.zeros(precision.rounds)

    explained = {}
    for name, param in model.named_parameters():
        if name not in measured:
            real = param.is_floating_point()
            reason = "unused: no gradient" if real else f"not measured: dtype {param.dtype}"
            explained[name] = Invariance(None, reason, coarsest)
            continue
        sums, owner = measured[name], owner_of(name)
        negligible = torch.maximum(precision.no_effect * largest[owner], NO_EFFECT_IN_MODEL * largest_of_all)
        kind: Kind = None
        if not sums.total_size.isfinite().all():
            reason = "not measured: its gradient is not finite"
        elif (sums.total_size <= negligible).all():
            reason = "no effect on the output"
        elif partner := next((other for other, its in modules[owner].items() if sums.cancels(its)), None):
            reason = f"only jointly with {partner!r}"
        elif sums.is_channel():
            kind, reason = "channel", "each output channel on its own"
        elif sums.is_tensor():
            kind, reason = "tensor", "only as a whole"
        else:
            cosine = (sums.total_radial.abs() / sums.total_size).nan_to_num().max().item()
            reason = f"not: radial cosine {cosine:.2g}"
        explained[name] = Invariance(kind, reason, coarsest, sums.sparse)
    return explained


def _coarsest(params: Iterable[Tensor]) -> torch.dtype:
    """The dtype among them in which the most is rounded away."""
    held = (param.dtype for param in params if param.dtype in PRECISIONS)
    return max(held, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def owner_of(name: str) -> str:
    """The module that a parameter belongs to; for a parametrized one, the module that is parametrized."""
    owner, parametrized, _ = f".{name}".partition(".parametrizations.")
    return owner if parametrized else owner.rpartition(".")[0]


def _largest_size(params: Mapping[str, _RadialSums]) -> Tensor:
    return torch.stack([sums.total_size for sums in params.values()]).nan_to_num(0, 0, 0).amax(0)


def _measure(
    model: nn.Module, twin: nn.Module, inputs: Inputs, outputs: Outputs | None, precision: Precision
) -> dict[str, _RadialSums]:
    """Run `twin`, a copy of `model`, forward and backward; the sums of every parameter that has a gradient."""
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
                rounds[name].append(_radial_sums(param.detach(), param.grad))
                param.grad = None
    return {
        name: _RadialSums(rounds[name], param.numel(), precision.rounding, name in sparse)
        for name, param in params.items()
        if name in used
    }


def _radial_sums(weight: Tensor, grad: Tensor | None) -> Tensor:
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
    """Multiply all entries by 0.5 ... 1.5; let no entry of a weight stay near 0, and no bias or gain be constant."""

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
        name = getattr(func, "__name__", "").partition(".")[
            0
        ]  # those of exported programs are called add.Tensor
        limit = math.inf if name in self.NORMS else 1e-3 if name in self.ADDITIONS else 0.0

        def shrink(value: Any) -> Any:
            return EPS_FACTOR * value if isinstance(value, float) and abs(value) <= limit else value

        named = {k: v if k == "alpha" else shrink(v) for k, v in (kwargs or {}).items()}
        return func(*map(shrink, args), **named)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach().to_dense(), dtype=torch.float64)
