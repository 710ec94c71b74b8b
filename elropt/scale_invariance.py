"""Which weights are scale-invariant, by measurement, and an initialization in which all have the same E = ‖g‖/‖w‖.

A weight w is scale-invariant if f(α·w) = f(w) for every α > 0 and all values of the other parameters. Euler's
theorem then gives ⟨w, g⟩ = 0 for the gradient g of every function of the outputs (docs/theory.md §1), so one
backward pass tests all the parameters of a model at once.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ._model_copy import (
    Inputs,
    Outputs,
    backward_from_loss,
    check_model,
    copied,
    first_of,
    owner_of,
    untouched,
)
from ._outputs_change import outputs_change
from ._radial_test import PRECISIONS, RadialSums, coarsest_dtype, radial_sums

__all__ = [
    "Invariance",
    "InvarianceKind",
    "equalize_",
    "explain",
    "explain_for_loss",
    "explain_scale_invariance",
    "find_scale_invariant",
    "warn_of_eps",
    "warn_of_frozen_norms",
]

InvarianceKind: TypeAlias = Literal["channel", "tensor"] | None
NO_EFFECT_IN_MODEL = 1e-12  # between the layers of a deep network ‖w‖·‖g‖ differs by factors of up to 1e9


@dataclass(frozen=True, slots=True)
class Invariance:
    """What a measurement says about one parameter.

    Attributes:
        kind: "channel", "tensor" or None, see `find_scale_invariant`.
        reason: why, in words.
        dtype: the dtype it was measured in: float64, or another one if the model does not run in float64.
        sparse_grad: whether its gradient is sparse, as that of ``nn.Embedding(sparse=True)``.
    """

    kind: InvarianceKind
    reason: str
    dtype: torch.dtype = torch.float64
    sparse_grad: bool = False


def find_scale_invariant(
    model: nn.Module, /, *inputs: Any, outputs: Outputs | None = None, **kwargs: Any
) -> dict[str, InvarianceKind]:
    """Find, by measurement, the parameters that `model(*inputs, **kwargs)` is scale-invariant in during training.

    Returns a dict with a key for every name in `model.named_parameters()` (a shared parameter once):
    "channel" if each slice along dim 0 can be rescaled on its own, "tensor" if only the whole can, else None.
    None is also the answer for a parameter without any effect, like a bias in front of BatchNorm: it has no
    direction to turn in. `explain_scale_invariance` adds the reason.

    A deep copy of the model, in float64, runs forward, and backward from random gradients of its outputs. Then
    ⟨w, g⟩ = 0 is tested for all parameters at once, also for frozen ones.

    - Mode: the copy of a model in eval mode runs as after `model.train()`, that of one in training mode in the modes of
      its modules: a BatchNorm that is frozen, in eval mode, divides by a constant, and nothing in front of it is
      scale-invariant. So freeze it before.
    - Points: the test is made at two random points near the parameters. At a single point ⟨w, g⟩ may be zero by
      chance, and an entry that is still at its initial 0 may hide a dependence.
    - eps: it breaks the invariance by about eps / (σ² + eps), where σ² is the variance that is normalized. So every
      eps is multiplied by 1e-15: attributes named eps, eps arguments of torch's norms, and added constants up to 1e-3.
      A norm whose eps cannot be found still counts while eps is below about 1e-4·σ² (in TorchScript, whose eps cannot
      be changed, 1e-2·σ²). A warning says how much eps matters in the model as it is.
    - Precision: a model that does not run in float64 (casts of its own, kernels for float32 only, quantization) is
      measured in float32 or in its own dtype, at more points and with a larger tolerance. Weak dependences may then be
      missed. `Invariance.dtype` says which dtype it was.
    - The answer is the same at every call: dropout and all draws are seeded.

    `model` itself does not run: parameters, buffers, gradients, modes and the random state (torch's, Python's
    and NumPy's) stay as they are. Forward hooks are copied with the model, and do run.

    A transposed convolution has its output channels along dim 1, so in front of BatchNorm it is "tensor".

    Args:
        model: any module on CPU or CUDA, also a ScriptModule or the `.module()` of an exported program; outputs may
            be nested tuples, lists, dicts, dataclasses.
        *inputs: the arguments of `model`: real data, at least 8 different samples. Floating-point tensors in them, also
            in tuples, lists, dicts and dataclasses, are cast to float64.
        **kwargs: the same by name. If a batch is a dict: ``find_scale_invariant(model, **batch)``. If the model has an
            argument named `outputs`, pass it by position.
        outputs: a function that picks what counts from what `model` returns, for models that return more than the loss
            uses: ``lambda out: out["logits"]``, or the loss itself. None: all tensors count.

    Warns:
        UserWarning: in the model as it is, halving the invariant weights changes the outputs by more than 1 %: the
            eps of a normalization is not small beside the variance that it is added to. Or: the model is in eval mode,
            and gain and bias of a BatchNorm are frozen, as if it were to stay in eval mode.

    Raises:
        TypeError: `model` is no module.
        ValueError: lazy parameters without a shape, on the meta device, or sharded ones (DTensors); or no
            floating-point output that depends on a parameter.
        Exception: what `model(*inputs, **kwargs)` raises, with a note on how it was called.

    Source: derived, docs/theory.md §1.
    """
    call = Inputs(inputs, kwargs)
    explained = explain(model, call, outputs, training=True)
    warn_of_frozen_norms(model)
    warn_of_eps(model, call, outputs, explained)
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
    explained = explain(model, call, outputs, training=True)
    warn_of_frozen_norms(model)
    warn_of_eps(model, call, outputs, explained)
    return explained


def explain_for_loss(
    model: nn.Module, inputs: Inputs, loss: Callable[[Any], Tensor], *, training: bool
) -> dict[str, Invariance]:
    """`explain_scale_invariance` for a known loss: a parameter that the outputs are not invariant in, but the loss is,
    counts as invariant. In training mode, or if `training` is False in the modes that the modules are in."""
    explained = explain(model, inputs, None, training=training)
    if all(explained[name].kind for name, param in model.named_parameters() if param.ndim >= 2):
        return explained
    by_loss = explain(model, inputs, loss, training=training)
    return {
        name: by_loss[name] if found.kind is None and by_loss[name].kind else found
        for name, found in explained.items()
    }


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

    Invariance is measured in the model's own mode, too. In training mode: the running statistics of BatchNorm still
    belong to the old weights afterwards, and only training adapts them, so equalize before training. In eval mode:
    weights in front of BatchNorm with running statistics are not scale-invariant and are left out.

    Args:
        model: any module, as for `find_scale_invariant`.
        *inputs: the arguments of `model`, as for `find_scale_invariant`.
        **kwargs: the same by name; an argument of the model that is called `loss` is passed by position.
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


def warn_of_frozen_norms(model: nn.Module) -> None:
    """Warn if the model is in eval mode and a norm with running statistics looks as if it were to stay so.

    The warning points to the line that called the function that calls this one.
    """
    if model.training or not any(param.requires_grad for param in model.parameters()):
        return
    frozen = [
        name
        for name, module in model.named_modules()
        if getattr(module, "running_mean", None) is not None
        and (own := list(module.parameters(recurse=False)))
        and not any(param.requires_grad for param in own)
    ]
    if frozen:
        warnings.warn(
            "the model is in eval mode, so it was measured as after model.train(), its norms with it. But gain and "
            f"bias of {len(frozen)} of them are frozen ({first_of(frozen)}). A norm that stays in eval mode in "
            "training divides by a constant, and the weights in front of it are not scale-invariant: call "
            "model.train(), then .eval() of these norms, before you measure",
            UserWarning,
            stacklevel=3,
        )


def warn_of_eps(
    model: nn.Module, inputs: Inputs, outputs: Outputs | None, explained: Mapping[str, Invariance]
) -> None:
    """Warn if the model as it is, with its own eps, is far from invariant in the weights of `explained`.

    The warning points to the line that called the function that calls this one.
    """
    params = dict(model.named_parameters())
    halved = {n: 0.5 for n, found in explained.items() if found.kind and params[n].ndim >= 2}
    if not halved:
        return
    measured = explained[next(iter(halved))].dtype
    dtype = (
        None if measured == coarsest_dtype(params.values()) else measured
    )  # None: as it is, maybe of several
    change = outputs_change(model, inputs, halved, outputs=outputs, training=True, dtype=dtype)
    if change.matters:
        warnings.warn(
            "rule='warmup' and equalize_ rescale the scale-invariant weights, which is to leave the outputs as they "
            f"are. In this model, halving all of them {change.in_words('changes')}; or exclude them",
            UserWarning,
            stacklevel=3,
        )


def explain(
    model: nn.Module, inputs: Inputs, outputs: Outputs | None, *, training: bool
) -> dict[str, Invariance]:
    """What `explain_scale_invariance` returns, measured in float64, or if the model does not run so in its own dtypes.

    In training mode, or if `training` is False in the modes that the modules are in.
    """
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
        except Exception:  # a model that does not run in this dtype may raise anything
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
    coarsest = coarsest_dtype(twin.parameters())
    precision = PRECISIONS[coarsest]
    if any(isinstance(module, torch.jit.ScriptModule) for module in twin.modules()):
        precision = max(precision, PRECISIONS[torch.float32])
    measured = radial_sums(model, twin, inputs.cloned(dtype), outputs, precision)
    modules: dict[str, dict[str, RadialSums]] = {}
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
        kind: InvarianceKind = None
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


def _largest_size(params: Mapping[str, RadialSums]) -> Tensor:
    return torch.stack([sums.total_size for sums in params.values()]).nan_to_num(0, 0, 0).amax(0)


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.detach().to_dense(), dtype=torch.float64)
