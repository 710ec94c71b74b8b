"""What ELRSGD refuses: values, parameters and gradients that it cannot work with. Nothing here changes anything."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ._group_values import count_rows, has_lr_by_row, may_be_tracked, rule_key
from .rules import RULES
from .sharding import check_placement

__all__ = [
    "check_decay",
    "check_params",
    "check_step_tensors",
    "refuse_capture",
    "refuse_duplicates",
    "refuse_flattened",
    "refuse_one_of_many",
    "validate",
    "validate_choices",
    "validate_numbers",
]


def validate(group: Mapping[str, Any]) -> None:
    """Check the hyper-parameters of one param group; reads tensors among them.

    Raises:
        ValueError: names the value, what is allowed and the remedy.
        RuntimeError: a combination of foreach, fused and differentiable that torch refuses too.
    """
    validate_numbers(group, read_tensors=True)
    validate_choices(group)


def validate_numbers(group: Mapping[str, Any], *, read_tensors: bool) -> None:
    """The part of `validate` that asks for numbers in their ranges. Same errors."""
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        if not isinstance(group[name], numbers.Real | Tensor):
            raise ValueError(f"{name}={group[name]!r} is not valid: it must be a number")
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name} is a tensor of shape {tuple(value.shape)}; it must be a float or have one element"
            )
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        value = group[name]
        lowest = -math.inf if name == "dampening" else 0
        if (read_tensors or not isinstance(value, Tensor)) and not (
            math.isfinite(value) and lowest <= float(value)
        ):
            raise ValueError(
                f"{name}={value} is not valid: it must be finite{' and at least 0' if lowest == 0 else ''}"
            )


def validate_choices(group: Mapping[str, Any]) -> None:
    """The part of `validate` that reads no tensor: the rule, and what goes together. Same errors."""
    for name in ("nesterov", "project", "maximize", "differentiable"):
        if group[name] not in (False, True):
            raise ValueError(f"{name}={group[name]!r} is not valid: it must be True or False")
    for name in ("foreach", "fused"):
        if group[name] not in (None, False, True):
            raise ValueError(f"{name}={group[name]!r} is not valid: it must be True, False or None")
    momentum, dampening = group["momentum"], group["dampening"]
    rule, granularity, flag = group["rule"], group["granularity"], group.get("scale_invariant")
    if group["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening=0, not momentum={momentum}, dampening={dampening}"
        )
    if not isinstance(rule, str | None) or rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known; choose one of {', '.join(map(repr, RULES))}")
    if granularity not in RULES[rule].granularities:
        allowed = ", ".join(map(repr, RULES[rule].granularities))
        raise ValueError(
            f"granularity={granularity!r} has no meaning for rule={rule!r}; choose one of {allowed}"
        )
    elr_of = group["elr_of"]
    if elr_of not in (None, "gradient", "update"):
        raise ValueError(
            f"elr_of={elr_of!r} is not valid: choose 'gradient', 'update' or None (the rule's own)"
        )
    if elr_of is not None and RULES[rule].decide_update is None:
        raise ValueError(
            f"elr_of={elr_of!r} has no meaning for rule={rule!r}; choose one of "
            f"{', '.join(repr(name) for name, spec in RULES.items() if spec.decide_update)}, or leave it out"
        )
    if group["project"] and rule_key(group).of_update:
        raise ValueError(
            "project=True goes without saying when a rule controls the update (elr_of='update'), which leaves its "
            "radial part out: leave project out, or use elr_of='gradient'"
        )
    protect = group["protect"]
    if protect is not None and not isinstance(protect, bool):
        raise ValueError(f"protect={protect!r} is not valid: True, False, or None (the rule's own)")
    if protect and not RULES[rule].settles:
        raise ValueError(
            f"protect=True has no meaning for rule={rule!r}: it holds untracked parameters back where they would move "
            "further than the angle of rule='equilibrium'; leave it out, or give them a smaller lr in their param group"
        )
    if RULES[rule].settles and momentum != 0 and dampening >= 1:
        raise ValueError(
            f"dampening={dampening} is not valid with rule={rule!r}: it must be below 1, where SGD has an equilibrium"
        )
    if rule is not None and momentum >= 1:
        raise ValueError(
            f"momentum={momentum} is not valid with rule={rule!r}: it must be below 1, or use rule=None"
        )
    tracked_lr = group["tracked_lr"]
    if tracked_lr is not None and not (
        isinstance(tracked_lr, numbers.Real) and 0 <= float(tracked_lr) < math.inf
    ):
        raise ValueError(
            f"tracked_lr={tracked_lr!r} is not valid: a finite number, at least 0, in the unit of the rule, or None"
        )
    reference = group.get("reference_lr", 1.0)
    if not isinstance(reference, numbers.Real) or not 0 < float(reference) < math.inf:
        raise ValueError(
            f"reference_lr={reference!r} is not valid: it must be finite and above 0, the lr at which tracked_lr "
            "holds; leave it out to have it be lr"
        )
    seed = group["stochastic_rounding"]
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(
            f"stochastic_rounding={seed!r} is not valid: a seed (an integer from 0 to 2⁶³−1), or None"
        )
    if flag is not None and not isinstance(flag, bool):
        raise ValueError(
            f"scale_invariant={flag!r} is not valid: True, False, or leave it out to have it measured"
        )
    if group["differentiable"] and (rule is not None or group["project"]):
        raise ValueError(
            "differentiable=True needs rule=None and project=False: rules do not take part in autograd"
        )
    if group["fused"] and isinstance(group["weight_decay"], Tensor):
        raise ValueError(
            "weight_decay as a tensor does not work with fused=True; give a float or use foreach=True"
        )
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("fused=True does not support differentiable=True; use fused=False")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("fused and foreach cannot both be True; choose one")


def refuse_duplicates(group: Mapping[str, Any]) -> None:
    """With a rule, refuse a parameter that is given twice.

    Raises:
        ValueError: names the remedy.
    """
    params = group["params"]
    if not isinstance(params, list | tuple) or (group["rule"] is None and not group["project"]):
        return
    tensors = list(map(_bare, params))
    if len({id(p) for p in tensors}) != len(tensors):
        raise ValueError(
            f"a param group with rule={group['rule']!r}, project={group['project']} holds the same parameter twice; "
            "give it once, or use rule=None and project=False"
        )


def check_params(group: Mapping[str, Any], *, inside_zero: bool) -> None:
    """Check the parameters of a param group against its options.

    Args:
        group: complete, with the defaults.
        inside_zero: whether a `ZeroRedundancyOptimizer` has made the optimizer.

    Raises:
        ValueError: a parameter that the rule cannot take, or a tracked_lr without tracked layers to be found.
    """
    params = group["params"]
    rule = _acting_rule(group)
    if has_lr_by_row(group) and (rule is None or group["fused"]):
        reason = (
            "rule=None needs groups that say which layers are tracked (scale_invariant, see "
            "elropt.param_groups): without a rule nothing finds out"
            if rule is None
            else "fused=True needs groups that say which layers are tracked (scale_invariant, see "
            "elropt.param_groups); bare parameters take foreach=True or fused=None"
        )
        raise ValueError(f"tracked_lr={group['tracked_lr']} with {reason}")
    params = params if isinstance(params, list | tuple) else [params]
    check_decay({**group, "params": params})
    for p in map(_bare, params):
        check_placement(p, rule, inside_zero=inside_zero)
        if isinstance(p, Tensor) and not is_lazy(p) and p.is_inference():
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is an inference tensor, which only torch.inference_mode "
                "can change: make the model outside of it"
            )


def check_decay(group: Mapping[str, Any]) -> None:
    """Of a rule that takes the angle from the weight decay. Reads no tensor.

    Raises:
        ValueError: layers that it may concern have none.
    """
    decay = group["weight_decay"]
    if not RULES[group["rule"]].settles or isinstance(decay, Tensor) or decay != 0:
        return
    if any(isinstance(p, Tensor) and may_be_tracked(p, group) for p in map(_bare, group["params"])):
        raise ValueError(
            f"rule={group['rule']!r} turns layers by the angle at which weight decay balances their growth, but "
            "weight_decay=0 has no such angle: give weight_decay=5e-4, say (also in elropt.param_groups), use "
            "rule='angle', whose lr is the angle, or say scale_invariant=False of a group whose layers are not "
            "invariant"
        )


def _bare(p: Any) -> Any:
    """A parameter without its name."""
    return p[1] if isinstance(p, tuple) else p


def refuse_flattened(groups: Sequence[Mapping[str, Any]], given: Mapping[int, bool]) -> None:
    """Refuse one-dimensional pieces of many parameters, which DeepSpeed ZeRO puts in the place of those of every group.

    Args:
        groups: as they are now.
        given: by id of the parameters that the optimizer was made with, whether they had other than one dimension.

    Raises:
        ValueError: names the rule and the remedy.
    """
    params = [p for group in groups for p in group["params"]]
    if (
        not any(given.values())
        or all(id(p) in given for p in params)
        or any(is_lazy(p) or p.dim() != 1 for p in params)
    ):
        return
    for group in groups:
        rule = _acting_rule(group)
        if rule is not None and any(id(p) not in given for p in group["params"]):
            raise ValueError(
                f"rule={rule!r} needs the norm of every layer, but the parameters that this optimizer was made "
                "with have been replaced by flattened ones, as DeepSpeed ZeRO and its fp16 and bf16 optimizers do: "
                "use stage 0, or torch.distributed.fsdp.fully_shard instead, or rule=None, project=False"
            )


def refuse_capture(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to make what a rule remembers while a CUDA graph is captured: each replay would make it anew.

    Raises:
        RuntimeError: names the remedy.
    """
    remembering = [
        group
        for group in groups
        if _acting_rule(group) is not None or group["stochastic_rounding"] is not None
    ]
    on_cuda = any(p.is_cuda for group in remembering for p in group["params"])
    if on_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the optimizer's state would have to be made during CUDA graph capture: run one step before it, also "
            "after load_state_dict or add_param_group"
        )


def _acting_rule(group: Mapping[str, Any]) -> str | None:
    """What needs norms of layers: the rule, or "project" alone; None: plain SGD."""
    return group["rule"] or ("project" if group["project"] else None)


def refuse_one_of_many(groups: Sequence[Mapping[str, Any]]) -> None:
    """Inside of a backward pass, refuse the groups of a rule group whose rule compares layers but is given one.

    Raises:
        ValueError: names the rule and the remedy.
    """
    if torch._C._current_graph_task_id() == -1:
        return
    rule, granularity, _, _, protect = rule_key(groups[0])
    compares = RULES[rule].compares_layers or granularity == "network"
    if (compares or protect) and sum(
        count_rows(p, group) > 0 for group in groups for p in group["params"]
    ) == 1:
        others = " or ".join(repr(name) for name, spec in RULES.items() if name and not spec.compares_layers)
        raise ValueError(
            f"rule={rule!r}, granularity={granularity!r}{', protect=True' if protect else ''} compares layers, but "
            "this optimizer has one, and is stepped inside of the backward pass, as if each parameter had an optimizer "
            f"of its own: give all parameters to one optimizer that is stepped afterwards, or use rule={others} with "
            f"granularity='layer' or 'filter'{' and protect=False' if protect else ''}, or rule=None"
        )


def check_step_tensors(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    row_counts: list[int],
    groups: list[Mapping[str, Any]],
) -> None:
    """Of tensors on one device.

    Raises:
        RuntimeError: a gradient or a buffer that cannot be applied; names it and the remedy.
    """
    if any(g.layout != torch.strided for g in grads):
        for p, group in zip(params, groups, strict=True):
            _refuse_gradient(p, group)
    for p, count in zip(params, row_counts, strict=True):
        if count and p.is_complex():
            raise RuntimeError(
                f"a complex parameter of shape {tuple(p.shape)} is in a group with scale_invariant=True; "
                "only real parameters can be tracked: move it to a group with scale_invariant=False"
            )
    device = params[0].device
    for p, m in zip(params, buffers, strict=True):
        if m is not None and m.device != device:
            _refuse_device(p, m)


def _refuse_device(p: Tensor, buffer: Tensor) -> None:
    raise RuntimeError(
        f"a parameter of shape {tuple(p.shape)} is on {p.device}, its momentum buffer on {buffer.device}: it has "
        "been moved between two steps; optimizer.load_state_dict(optimizer.state_dict()) brings the state along"
    )


def _refuse_gradient(p: Tensor, group: Mapping[str, Any]) -> None:
    grad = p.grad
    if grad is not None and grad.layout != torch.strided and (group["rule"] is not None or group["project"]):
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has a {grad.layout} gradient, which only plain SGD can apply: "
            "put it in a param group of its own with rule=None and project=False"
        )
    decays = isinstance(group["weight_decay"], Tensor) or group["weight_decay"] != 0
    if grad is not None and grad.layout != torch.strided and decays:
        raise RuntimeError(
            f"a parameter of shape {tuple(p.shape)} has a {grad.layout} gradient, which cannot take weight_decay: "
            "put it in a param group of its own with weight_decay=0"
        )
