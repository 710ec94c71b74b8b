"""What the values of one param group mean: which groups share its rule, its rows, learning rates and momentum."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .rules import RULES, growth_gain, settling

__all__ = [
    "RuleKey",
    "angle_of",
    "count_rows",
    "decay_of",
    "has_lr_by_row",
    "has_tensor_decay",
    "lr_gain",
    "lr_limit",
    "lr_of",
    "lr_ratio",
    "lr_ratio_by_row",
    "momentum_coefficients",
    "protects",
    "rule_key",
    "set_reference_lr",
    "settling_of",
]


class RuleKey(NamedTuple):
    """What param groups that are decided together have in common. of_update: ``elr_of="update"``."""

    rule: str | None
    granularity: str
    project: bool
    of_update: bool


def rule_key(group: Mapping[str, Any]) -> RuleKey:
    """The `RuleKey` of a param group."""
    of_update = (group["elr_of"] or RULES[group["rule"]].elr_of) == "update"
    return RuleKey(group["rule"], group["granularity"], group["project"], of_update)


def count_rows(p: Tensor, group: Mapping[str, Any]) -> int:
    """Rows of a parameter in the rule's vectors; 0 if the rule never concerns it: nothing depends on a tensor without
    entries, or on one of a lazy module that has not run yet."""
    if is_lazy(p) or p.numel() == 0:
        return 0
    wanted = group.get("scale_invariant")
    if wanted is False or (wanted is None and (p.dim() < 2 or not p.is_floating_point())):
        return 0
    return p.shape[0] if group["granularity"] == "filter" and p.dim() > 0 else 1


def lr_ratio(group: Mapping[str, Any]) -> float:
    """The learning rate of the tracked layers over `lr`."""
    return 1.0 if group["tracked_lr"] is None else group["tracked_lr"] / group["reference_lr"]


def lr_of(group: Mapping[str, Any], limit: float | Tensor | None = None) -> float | Tensor:
    """λ of a group: that of the tracked layers, if the group says that its parameters are scale-invariant; else at most
    `limit`, of `lr_limit`."""
    if group.get("scale_invariant"):
        return group["lr"] if group["tracked_lr"] is None else group["lr"] * lr_ratio(group)
    return group["lr"] if limit is None or not protects(group) else _smaller(group["lr"], limit)


def lr_ratio_by_row(group: Mapping[str, Any], limit: float | Tensor | None = None) -> float | Tensor:
    """The λ of the layers that are found to be tracked over `lr_of` the group, in groups that do not say which are."""
    if not has_lr_by_row(group):
        return 1.0
    lr, rest = group["lr"], lr_of(group, limit)
    if isinstance(lr, Tensor) or isinstance(rest, Tensor):
        lr, rest = torch.as_tensor(lr), torch.as_tensor(rest)
        return lr_ratio(group) * torch.where(rest > 0, lr / rest, 1.0)
    return lr_ratio(group) * (lr / rest if rest > 0 else 1.0)


def protects(group: Mapping[str, Any]) -> bool:
    """Whether the learning rate of the group's untracked parameters is limited, see `lr_limit`."""
    return RULES[group["rule"]].settles and group["protect"] is not False


def lr_limit(groups: Sequence[Mapping[str, Any]]) -> float | Tensor | None:
    """Of the untracked parameters beside the layers of rule "equilibrium": the largest angle that these turn by. Groups
    that share a rule; None: there is no such layer, or nothing to protect. Reads no tensor."""
    if not any(map(protects, groups)):
        return None
    angles = [
        (settling_of(group) * group["lr"] * lr_ratio(group)) ** 0.5
        for group in groups
        if any(count_rows(p, group) for p in group["params"])
    ]
    return functools.reduce(_larger, angles) if angles else None


def _smaller(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return min(a, b)


def _larger(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return max(a, b)


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
    has_two = group["tracked_lr"] is not None or protects(group)
    return has_two and group.get("scale_invariant") is None


def has_tensor_decay(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any weight decay is a tensor."""
    return any(issubclass(kind, Tensor) for kind in {type(group["weight_decay"]) for group in groups})


def set_reference_lr(group: dict[str, Any], lr: float | Tensor) -> None:
    """Give a group the `lr` at which its `tracked_lr` holds, unless it has one. Reads a tensor.

    Raises:
        ValueError: there is no proportion to an lr of 0.
    """
    if group["tracked_lr"] is None or "reference_lr" in group:
        return
    if not 0 < float(lr) < math.inf:
        raise ValueError(
            f"tracked_lr={group['tracked_lr']} is kept in proportion to lr, so lr={lr} is not valid: it must be above "
            "0 when the optimizer is made; a schedule may bring it to 0 later"
        )
    group["reference_lr"] = float(lr)


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
