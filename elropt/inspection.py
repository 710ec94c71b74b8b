"""What a model's layers look like before training, and what that means for a learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._json import to_json
from ._model_copy import Inputs, backward_from_loss, check_model, copied, tensors_in, untouched
from ._outputs_change import outputs_change
from .dynamics import balance_lr, elr_spread, monotone_lr
from .rules import RADIAL_TESTS, LayerStats, RowHyper, RuleState, decide, growth_gain
from .scale_invariance import InvarianceKind, explain_for_loss

__all__ = ["ModelReport", "WeightReport", "inspect_model", "random_label_loss"]


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """One weight of two or more dimensions, as `inspect_model` found it. What cannot be measured is NaN.

    Attributes:
        name, shape: as in `model.named_parameters()`.
        invariance: "channel", "tensor" or None, see `elropt.find_scale_invariant`.
        reason: why, in words.
        tracked: whether it counts in the spread and in the critical learning rates: it is scale-invariant and
            trainable, and its weight and gradient are neither zero nor infinite.
        weight_norm, grad_norm: ‖w‖, ‖g‖.
        radial_cosine: cos(w, g); zero for a scale-invariant weight.
        relative_grad: E = ‖g‖/‖w‖, in 1/lr.
        elr: λE, the effective learning rate of plain SGD, the tangent of the angle that its first step turns
            w by.
        trainable: whether it requires a gradient.
    """

    name: str
    shape: tuple[int, ...]
    invariance: InvarianceKind
    reason: str
    tracked: bool
    weight_norm: float
    grad_norm: float
    radial_cosine: float
    relative_grad: float
    elr: float
    trainable: bool


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """What `inspect_model` found. A value that needs more tracked weights than there are is NaN.

    Attributes:
        weights: all weights of two or more dimensions, in the order of `model.named_parameters()`.
        loss: value of the loss.
        lr, momentum: the λ and μ asked about.
        elr_spread: max E / min E over the tracked weights.
        log_elr_std: standard deviation of log E over the tracked weights.
        balance_lr, monotone_lr: (1−μ)/√(E_max·E_min) and (1−μ)/√(E_(1)·E_(2)), the critical learning rates of
            `elropt.dynamics` for heavy-ball momentum, which acts like λ/(1−μ) in the long run.
        warmup_elr: the effective learning rate, the same for all tracked weights, at the first step of
            ``ELRSGD(lr=λ, momentum=μ)``.
        warmup_ends: whether the warm-up of that optimizer finds nothing to do and ends at its first step.
        dtype: the dtype that the invariance was measured in: float64, if the model runs in it.
        eps: if the eps of normalizations makes the invariance approximate, by how much, in words; else None.
    """

    weights: list[WeightReport]
    loss: float
    lr: float
    momentum: float
    elr_spread: float
    log_elr_std: float
    balance_lr: float
    monotone_lr: float
    warmup_elr: float
    warmup_ends: bool
    dtype: str = "float64"
    eps: str | None = None

    @property
    def tracked(self) -> list[WeightReport]:
        """The weights that count in the spread, the largest E first."""
        return sorted((w for w in self.weights if w.tracked), key=lambda w: -w.relative_grad)

    def to_dict(self) -> dict[str, Any]:
        """Everything as strict JSON has it: `weights` as a dict by name, None for NaN and infinity."""
        values = dataclasses.asdict(self)
        values["weights"] = {weight.pop("name"): weight for weight in values["weights"]}
        return to_json(values)

    def summary(self) -> str:
        """What the numbers mean for the chosen learning rate, in a few sentences."""
        return " ".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        tracked = self.tracked
        invariant = [weight for weight in self.weights if weight.invariance]
        if not tracked and not invariant:
            yield (
                "No weight is scale-invariant, so there is no effective learning rate to control: ELRSGD is plain SGD "
                "here. Put a normalization behind the weights to be tracked."
            )
        elif not tracked:
            yield "No scale-invariant weight has a usable gradient, so there is no effective learning rate to report."
        elif len(tracked) == 1:
            yield (
                f"At lr = {self.lr:.3g} the first step of SGD turns {tracked[0].name}, the only tracked "
                f"weight, by {math.atan(tracked[0].elr):.2g} rad, the arctangent of its ELR."
            )
        else:
            fast, slow = tracked[0], tracked[-1]
            yield (
                f"At lr = {self.lr:.3g} the first step of SGD turns the fastest layer, {fast.name}, by "
                f"{math.atan(fast.elr):.2g} rad and the slowest, {slow.name}, by "
                f"{math.atan(slow.elr):.2g} rad, the arctangents of their ELRs; their effective learning rates "
                f"are a factor of {self.elr_spread:.3g} apart."
            )
            if self.momentum:
                yield (
                    f"In the long run momentum {self.momentum:g} turns them up to {1 / (1 - self.momentum):.3g} "
                    "times as far per step, which the critical learning rates allow for."
                )
            if self.lr > self.balance_lr:
                yield (
                    f"The chosen lr is {self.lr / self.balance_lr:.3g} times the critical learning rate "
                    f"{self.balance_lr:.3g}: the model predicts that the fastest layer overshoots and falls "
                    "behind the slowest."
                )
            elif self.lr > self.monotone_lr:
                yield (
                    f"The chosen lr is below the critical learning rate {self.balance_lr:.3g}, so the spread "
                    f"shrinks, but above {self.monotone_lr:.3g}, where fast layers begin to change places."
                )
            else:
                yield (
                    f"The chosen lr is below both critical learning rates, {self.balance_lr:.3g} and "
                    f"{self.monotone_lr:.3g}: one gradient's turn lets no layer overtake another, and the spread "
                    "shrinks by itself, the slower the smaller lr is."
                )
        if self.warmup_ends:
            yield "ELRSGD's warm-up would find nothing to do and end at its first step."
        elif tracked:
            yield (
                f"ELRSGD's warm-up would start by turning every tracked layer by "
                f"{math.atan(self.warmup_elr):.2g} rad."
            )
        if self.eps:
            yield f"Halving the tracked weights {self.eps}."
        if self.dtype != "float64":
            yield (
                f"The model does not run in float64; which weights are invariant was measured in {self.dtype}, where "
                "weak dependences cannot be seen."
            )
        if frozen := [weight.name for weight in invariant if not weight.trainable]:
            yield f"Left out, since frozen: {', '.join(frozen)}."
        left_out = [weight for weight in invariant if weight.trainable and not weight.tracked]
        if cut_off := [weight.name for weight in left_out if weight.grad_norm == 0]:
            yield (
                f"Left out, since their gradient is zero: {', '.join(cut_off)}. This is so behind a gain, scale or "
                "last layer that is initialized to zero, until that has moved. To measure there, inspect the model "
                "after a few steps of training, or with such parameters replaced by noise (--perturb 0.1)."
            )
        if rest := [weight.name for weight in left_out if weight.grad_norm != 0]:
            yield f"Left out, since their weight or gradient is zero, missing or not finite: {', '.join(rest)}."


def random_label_loss(outputs: Any) -> Tensor:
    """The loss that `outputs` holds, or else cross-entropy against labels drawn from torch's global random state.

    The loss is the entry `loss`, which Hugging Face's models return if their inputs have labels. The logits for the
    cross-entropy are the entry `logits`, or else the first tensor: [batch, classes] or, of token models,
    [batch, positions, classes].

    Raises:
        ValueError: there is no such tensor, or it has less than 2 classes.
    """
    entries = outputs if isinstance(outputs, Mapping) else {}
    given = entries.get("loss")
    if isinstance(given, Tensor) and given.numel() == 1:
        return given
    logits = next(tensors_in(entries.get("logits")), None)
    if logits is None:
        logits = next(tensors_in(outputs), None)
    if logits is None or logits.ndim not in (2, 3) or logits.shape[-1] < 2 or not logits.is_floating_point():
        found = "no tensor" if logits is None else f"a {logits.dtype} tensor of shape {list(logits.shape)}"
        raise ValueError(
            "the default loss, cross-entropy against random labels, needs logits of shape [batch, classes] or [batch, "
            f"positions, classes], classes at least 2, but the model returns {found}: give a loss of your own"
        )
    labels = torch.randint(logits.shape[-1], logits.shape[:-1]).to(logits.device)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def inspect_model(
    model: nn.Module,
    /,
    *inputs: Any,
    loss: Callable[[Any], Tensor] = random_label_loss,
    lr: float,
    momentum: float = 0.0,
    perturb: float = 0.0,
    **kwargs: Any,
) -> ModelReport:
    """Measure every weight of two or more dimensions on one batch, and what that means for a learning rate.

    `elropt.explain_scale_invariance` says which weights are scale-invariant, for the outputs that the loss depends on.
    Norms and gradients come from one forward and backward pass of ``loss(model(*inputs, **kwargs))`` in training mode.
    Both run on copies: parameters, buffers, gradients, modes and the random state stay as they are.

    Args:
        model: any module.
        *inputs: the arguments of `model`: a batch of at least 8 different samples, best real data.
        **kwargs: the same by name. If the model has an argument of the same name as this function, pass it by position.
        loss: maps the outputs of `model` to a scalar.
        lr: learning rate λ > 0 to judge.
        momentum: μ, 0 ≤ μ < 1.
        perturb: standard deviation of normal noise that replaces parameters that are all zero, such as the last gain
            of a residual branch: no gradient flows through it until it has moved. 0: no noise.

    Raises:
        ValueError: lr, momentum, perturb or what `loss` returns is not as above.
        Exception: what `elropt.find_scale_invariant` raises.

    Source: derived, docs/theory.md §1 (invariance), §4 (critical learning rates) and §6 (momentum).
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr} is not valid: it must be finite and above 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} is not valid: it must be at least 0 and below 1")
    if not 0 <= perturb < math.inf:
        raise ValueError(f"perturb={perturb} is not valid: it must be finite and at least 0")
    check_model(model)
    call = Inputs(inputs, kwargs)
    twin = copied(model, training=True)
    with untouched(model), torch.enable_grad():
        if perturb:
            _perturb(twin, perturb)
        value = backward_from_loss(twin, call.cloned(), loss)
    named = {name: param for name, param in twin.named_parameters() if param.ndim >= 2}
    explained = explain_for_loss(model, call, loss, training=True)

    weights = []
    for name, param in named.items():
        weight_norm, grad_norm, radial_cosine = _norms_and_cosine(param.detach(), param.grad)
        relative_grad = grad_norm / weight_norm if weight_norm > 0 else math.nan
        invariance = explained[name].kind
        tracked = invariance is not None and 0 < relative_grad < math.inf
        weights.append(
            WeightReport(
                name,
                tuple(param.shape),
                invariance,
                explained[name].reason,
                tracked,
                weight_norm,
                grad_norm,
                radial_cosine,
                relative_grad,
                lr * relative_grad,
                param.requires_grad,
            )
        )
    halved = {weight.name: 0.5 for weight in weights if weight.tracked}
    change = outputs_change(twin, call, halved, training=True) if halved else None
    E = np.array([weight.relative_grad for weight in weights if weight.tracked])
    return ModelReport(
        weights,
        loss=value.item(),
        lr=lr,
        momentum=momentum,
        elr_spread=float(elr_spread(E)) if len(E) else math.nan,
        log_elr_std=float(np.log(E).std()) if len(E) else math.nan,
        balance_lr=float((1 - momentum) * balance_lr(E)) if len(E) else math.nan,
        monotone_lr=float((1 - momentum) * monotone_lr(E)) if len(E) > 1 else math.nan,
        **_first_warmup_step([weight for weight in weights if weight.tracked], lr, momentum),
        dtype=str(next((found.dtype for found in explained.values()), torch.float64)).removeprefix("torch."),
        eps=change.in_words("changes") if change and change.matters else None,
    )


def _perturb(model: nn.Module, std: float) -> None:
    """Normal noise in place of every floating-point parameter that is all zero."""
    with torch.no_grad():
        for param in model.parameters():
            if param.is_floating_point() and not param.any():
                param.normal_(0, std)


def _norms_and_cosine(weight: Tensor, grad: Tensor | None) -> tuple[float, float, float]:
    w = weight.double().flatten()
    if grad is None:
        return float(w.norm()), math.nan, math.nan
    g = grad.to_dense().double().flatten()
    weight_norm, grad_norm, dot = torch.stack([w.norm(), g.norm(), w @ g]).tolist()
    size = weight_norm * grad_norm
    return weight_norm, grad_norm, dot / size if size > 0 else math.nan


def _first_warmup_step(tracked: list[WeightReport], lr: float, momentum: float) -> dict[str, Any]:
    """`warmup_elr` and `warmup_ends` of a ModelReport: what the rule "warmup" decides at its first step."""
    if not tracked:
        return {"warmup_elr": math.nan, "warmup_ends": False}
    weight_norm, grad_norm, numel = (
        torch.tensor(column, dtype=torch.float64)
        for column in zip(*((w.weight_norm, w.grad_norm, math.prod(w.shape)) for w in tracked), strict=True)
    )
    zero, one = torch.zeros_like(numel), torch.ones_like(numel)
    controls, after = decide(
        "warmup",
        LayerStats(weight_norm**2, grad_norm**2, zero, zero),
        RuleState(
            sphere_grad_norm=zero,
            radius=zero,
            tracked=RADIAL_TESTS * one,
            handed_over=torch.zeros(()),
            largest_lr=torch.zeros(()),
        ),
        RowHyper(lr * one, zero, growth_gain(momentum) * one, one, zero, numel),
    )
    s, a = (one if factor is None else factor for factor in (controls.grad_factor, controls.weight_factor))
    elr = lr * s * grad_norm / (a * weight_norm)
    return {
        "warmup_elr": float(elr.mean()),
        "warmup_ends": bool(after.handed_over > 0),
    }
