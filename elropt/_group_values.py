"""What the values of one param group mean: which groups share its rule, its rows, learning rates and momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from .rules import RULES, diffusion, growth_gain, settling

__all__ = [
    "RuleKey",
    "angle_of",
    "count_rows",
    "decay_of",
    "diffusion_of",
    "has_lr_by_row",
    "has_tensor_decay",
    "least_size",
    "lr_gain",
    "lr_of",
    "lr_ratio",
    "may_be_tracked",
    "momentum_coefficients",
    "reference_lr",
    "rule_key",
    "set_reference_lrs",
    "settling_of",
]


class RuleKey(NamedTuple):
    """What param groups that are decided together have in common. of_update: ``elr_of="update"``. protect: whether the
    rule also acts on what is not tracked."""

    rule: str | None
    granularity: str
    project: bool
    of_update: bool
    protect: bool


def rule_key(group: Mapping[str, Any]) -> RuleKey:
    """The `RuleKey` of a param group."""
    spec = RULES[group["rule"]]
    of_update = (group["elr_of"] or spec.elr_of) == "update"
    protect = spec.settles and group["protect"] is not False
    return RuleKey(group["rule"], group["granularity"], group["project"], of_update, protect)


def may_be_tracked(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a rule may take a parameter for scale-invariant. Never one without entries, or of a lazy module that has
    not run yet."""
    wanted = group.get("scale_invariant")
    if is_lazy(p) or p.numel() == 0 or wanted is False:
        return False
    return wanted is True or (p.dim() >= 2 and p.is_floating_point())


def count_rows(p: Tensor, group: Mapping[str, Any]) -> int:
    """Rows of a parameter in the rule's vectors; 0 if the rule never concerns it."""
    if may_be_tracked(p, group):
        return p.shape[0] if group["granularity"] == "filter" and p.dim() > 0 else 1
    is_protected = rule_key(group).protect and not is_lazy(p) and p.numel() > 0 and p.is_floating_point()
    return int(is_protected)


def least_size(p: Tensor) -> float:
    """What counts as the norm of a parameter at least where it is held back: that of ones for vectors and scalars, as
    gains begin, and that of PyTorch's default initialization for others, so that zeros get away from zero."""
    return math.sqrt(p.numel() if p.dim() < 2 else p.shape[0] / 3)


def lr_ratio(group: Mapping[str, Any]) -> float:
    """The learning rate of the tracked layers over `lr`."""
    return 1.0 if group["tracked_lr"] is None else group["tracked_lr"] / group["reference_lr"]


def lr_of(group: Mapping[str, Any]) -> float | Tensor:
    """λ of a group: that of the tracked layers, if the group says that its parameters are scale-invariant."""
    if group["tracked_lr"] is None or not group.get("scale_invariant"):
        return group["lr"]
    return group["lr"] * lr_ratio(group)


def decay_of(group: Mapping[str, Any]) -> float | Tensor:
    """ω as the update takes it. A layer whose norm is kept while its update is made tangential needs none."""
    key = rule_key(group)
    if key.of_update and RULES[key.rule].keeps_radius and group.get("scale_invariant"):
        return 0.0
    return group["weight_decay"]


def settling_of(group: Mapping[str, Any]) -> float | Tensor:
    """φ²/λ of rule "equilibrium", see `elropt.rules.settling`; 0 for other rules."""
    key = rule_key(group)
    if not RULES[key.rule].settles:
        return 0.0
    factor = settling(group["momentum"], group["dampening"], group["nesterov"], of_update=key.of_update)
    return factor * group["weight_decay"]


def diffusion_of(group: Mapping[str, Any]) -> float:
    """See `elropt.rules.diffusion`; 0 for rules that protect nothing."""
    key = rule_key(group)
    if not key.protect:
        return 0.0
    return diffusion(group["momentum"], group["dampening"], group["nesterov"], of_update=key.of_update)


def angle_of(group: Mapping[str, Any], lr: float) -> float | None:
    """What a rule turns tracked layers by at this learning rate of the group, in radians; None: known on the device
    alone, or not by this rule. With ``elr_of="gradient"`` it is that of a plain SGD step."""
    spec = RULES[group["rule"]]
    if spec.lr_unit == "rad per step":
        return lr * lr_ratio(group)
    if not spec.settles or isinstance(group["weight_decay"], Tensor):
        return None
    return math.sqrt(settling_of(group) * lr * lr_ratio(group))


def lr_gain(group: Mapping[str, Any]) -> float | Tensor:
    """λΓ of the tracked layers of a group."""
    lr = group["lr"] if group["tracked_lr"] is None else group["lr"] * lr_ratio(group)
    return lr * growth_gain(group["momentum"], group["dampening"], group["nesterov"])


def has_lr_by_row(group: Mapping[str, Any]) -> bool:
    """Whether only the device knows which of a group's layers have a learning rate of their own."""
    return group["tracked_lr"] is not None and group.get("scale_invariant") is None


def has_tensor_decay(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any weight decay is a tensor."""
    return any(issubclass(kind, Tensor) for kind in {type(group["weight_decay"]) for group in groups})


def set_reference_lrs(groups: Sequence[dict[str, Any]]) -> None:
    """Give each group the `lr` at which its `tracked_lr` holds, unless it has one. Reads tensors.

    Raises:
        ValueError: there is no proportion to an lr of 0; nothing has been changed then.
    """
    missing = [g for g in groups if g["tracked_lr"] is not None and "reference_lr" not in g]
    lrs = [reference_lr(group, group["lr"]) for group in missing]
    for group, lr in zip(missing, lrs, strict=True):
        group["reference_lr"] = lr


def reference_lr(group: Mapping[str, Any], lr: float | Tensor) -> float:
    """`lr` as the one that the `tracked_lr` of a group is in proportion to. Reads a tensor.

    Raises:
        ValueError: there is no proportion to an lr of 0.
    """
    if not 0 < float(lr) < math.inf:
        raise ValueError(
            f"tracked_lr={group['tracked_lr']} is kept in proportion to lr, so lr={lr} is not valid: it must be above "
            "0 when the optimizer is made; a schedule may bring it to 0 later"
        )
    return float(lr)


def momentum_coefficients(
    momentum: float, dampening: float, nesterov: bool, *, has_buffer: bool
) -> tuple[float, float, float]:
    """`elropt.rules.growth_gain`, ∂u/∂g̃ and ∂u/∂m for this step's update u."""
    μ, d = momentum, dampening
    if μ == 0:
        return growth_gain(0.0), 1.0, 0.0
    per_grad, per_momentum = (1 - d, μ) if has_buffer else (1.0, 0.0)
    if nesterov:
        per_grad, per_momentum = 1 + μ * per_grad, μ * per_momentum
    return growth_gain(μ, d, nesterov), per_grad, per_momentum
