"""Loading a state dict: it is checked as a whole before anything in it is used."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._group_values import rule_key
from ._rule_memory import STATE_DTYPES, State
from ._validate import check_decay, validate
from .rules import RADIAL_TESTS
from .sharding import is_dtensor

__all__ = ["complete_state_dict", "restore_memory"]

KNOWN_STATE = {"momentum_buffer", *STATE_DTYPES}
FOREIGN_STATE = {  # of Adam and its kind, RMSprop, Adadelta, SGDP; what hooks and wrappers keep is their own concern
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "acc_delta",
    "momentum",
}
WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}  # in names of parameters
REQUIRED = ("params", "lr", "momentum", "dampening", "weight_decay", "nesterov")  # in every group of SGD
FOREIGN = ("betas", "eps")  # of optimizers that have all of these and more
SGD_KEYS = (
    "params",
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "foreach",
    "differentiable",
    "fused",
)
OPTIONS_OF_OLDER = {"elr_of": None, "protect": None}  # an older ELRSGD has neither
REMEDY = "load what SGD or ELRSGD has saved, or start ELRSGD without loading"


def complete_state_dict(
    state_dict: dict[str, Any], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> None:
    """Check a state dict and complete it in place. Options that it lacks, and `foreach` and `fused` always, are those
    of the optimizer. Parameters that have names on both sides are brought into the optimizer's order.

    Args:
        state_dict: with entries of its own, which are replaced.
        groups: the param groups of the optimizer.
        defaults: of the optimizer.

    Warns:
        UserWarning: the rule is not the optimizer's, see `warn_of_other_rules`.

    Raises:
        ValueError: it does not fit; nothing has been changed then.
    """
    check_groups(state_dict, groups)
    named = [
        matched_by_name(theirs, mine, number)
        for number, (mine, theirs) in enumerate(zip(groups, state_dict["param_groups"], strict=True))
    ]
    completed = [
        {
            **{key: value for key, value in mine.items() if key not in SGD_KEYS},
            **(OPTIONS_OF_OLDER if "rule" in theirs else {}),
            **theirs,
            "foreach": mine["foreach"],
            "fused": mine["fused"],
        }
        for mine, theirs in zip(groups, named, strict=True)
    ]
    for number, (mine, group) in enumerate(zip(groups, completed, strict=True)):
        try:
            validate({**defaults, **group})
            check_decay({**defaults, **group, "params": mine["params"]})
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"param group {number} of the state dict: {error}") from None
    check_state(state_dict["state"], params_by_index(completed, groups))
    warn_of_other_rules(completed, groups)
    for theirs, group in zip(named, completed, strict=True):
        if "rule" in theirs and "tracked_lr" not in theirs:  # of an ELRSGD that did not have it
            group["tracked_lr"] = None
    state_dict["param_groups"] = completed


def restore_memory(state: State, loaded: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Put what a rule remembers into the state of the optimizer in its own dtypes, whatever those of the parameters."""
    for index, p in params_by_index(loaded["param_groups"], groups):
        for key, dtype in STATE_DTYPES.items():
            value = loaded["state"].get(index, {}).get(key)
            if value is not None:
                state[p][key] = value.detach().to(p.device, dtype, copy=True)


def params_by_index(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> list[tuple[Any, Tensor]]:
    """(index in a state dict, parameter here), by position."""
    indices = itertools.chain.from_iterable(group["params"] for group in saved)
    params = itertools.chain.from_iterable(group["params"] for group in groups)
    return list(zip(indices, params, strict=True))


def check_groups(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that a state dict is one of SGD or ELRSGD, with as many groups and parameters as there are here.

    Raises:
        ValueError: it is not; names what differs and the remedy.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"this is no state dict of an optimizer: it has {_names(state_dict)}, not 'state' and 'param_groups'; pass "
            "the entry of the checkpoint that optimizer.state_dict() went into"
        )
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"the state dict has a different number of parameter groups, {len(saved)}, than the optimizer, "
            f"{len(groups)}: make the optimizer with the same groups as the one that was saved"
        )
    for number, (theirs, mine) in enumerate(zip(saved, groups, strict=True)):
        missing = [key for key in REQUIRED if key not in theirs]
        foreign = [key for key in FOREIGN if key in theirs]
        if missing or foreign:
            raise ValueError(
                f"param group {number} of the state dict is not one of SGD or ELRSGD: it has {_names(theirs)}"
                f"{f', but no {_names(missing)}' if missing else ''}; {REMEDY}"
            )
        if len(theirs["params"]) != len(mine["params"]):
            raise ValueError(
                f"param group {number} of the state dict has {len(theirs['params'])} parameters, the optimizer's has "
                f"{len(mine['params'])}: make the optimizer with the same groups as the one that was saved"
            )


def matched_by_name(theirs: Mapping[str, Any], mine: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A param group of a state dict with its parameters in the order that they have here, if both know their names.

    What DistributedDataParallel, torch.compile and the like put into names does not count.

    Raises:
        ValueError: the names differ.
    """
    if not (theirs.get("param_names") and mine.get("param_names")):
        return dict(theirs)
    saved, here = ([_bare(name) for name in group["param_names"]] for group in (theirs, mine))
    if saved != here:
        index_of = dict(zip(saved, theirs["params"], strict=True))
        differ = Counter(saved) != Counter(here)
        if differ or len(index_of) < len(saved):
            only = [
                f"the {where} has {_names((a - b) or a)}"
                for where, a, b in (
                    ("state dict", Counter(saved), Counter(here)),
                    ("optimizer", Counter(here), Counter(saved)),
                )
            ]
            raise ValueError(
                f"the parameters of param group {number} have other names in the state dict than here"
                f"{'' if differ else ', or another order of names that occur twice'}: {', '.join(only)}; load it into "
                "the same model, or delete 'param_names' from its param groups to have parameters matched by position"
            )
        theirs = {**theirs, "params": [index_of[name] for name in here]}
    return {**theirs, "param_names": list(mine["param_names"])}


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def warn_of_other_rules(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn if a state dict replaces the rule that the optimizer was made with. It replaces every option, as in torch.
    Another tracked_lr is no reason to warn, as another lr is none; only one in place of None, or None of one."""
    changes = {
        f"{key}={theirs[key]!r} in place of {key}={mine[key]!r}": None
        for theirs, mine in zip(saved, groups, strict=True)
        for key in ("rule", "granularity", "project", "elr_of", "protect", "tracked_lr")
        if theirs.get(key, mine[key]) != mine[key]
        and (key != "tracked_lr" or None in (theirs[key], mine[key]))
        and (
            key != "elr_of"
            or rule_key(theirs).of_update != rule_key({**mine, "rule": theirs["rule"]}).of_update
        )
    }
    if changes:
        warnings.warn(
            f"loading a state dict brought {', '.join(changes)}, which ELRSGD was made with: what is loaded holds. To "
            "keep the other, set it in optimizer.param_groups after loading",
            UserWarning,
            stacklevel=4,
        )


def check_state(state: Mapping[Any, Mapping[str, Any]], owners: Iterable[tuple[Any, Tensor]]) -> None:
    """Check what is kept of every parameter against the parameters here. Reads tensors on their device.

    Args:
        state: of a state dict.
        owners: (index in it, parameter here).

    Raises:
        ValueError: something is of another optimizer, of another shape, dtype, layout or placement, or out of its
            range; names it and the remedy. What hooks and wrappers have put there, also under keys that are no
            parameters, is not looked at.
    """
    params = dict(owners)
    for index, held in state.items():
        if index not in params and not isinstance(index, int):
            continue
        if index not in params:
            raise ValueError(
                f"the state dict has a state of parameter {index!r}, which none of its param groups names: it is "
                f"damaged; {REMEDY}"
            )
        if not isinstance(held, Mapping):
            raise ValueError(
                f"the state of parameter {index} is {held!r}, not a dict: it is damaged; {REMEDY}"
            )
        foreign = set(held) & FOREIGN_STATE
        if foreign:
            raise ValueError(
                f"the state dict has {_names(sorted(foreign))} of parameter {index}: it is of another optimizer; "
                f"{REMEDY}"
            )
        p = params[index]
        for key, value in held.items():
            if key in KNOWN_STATE and value is not None:
                _check_tensor(f"the loaded {key} of parameter {index}", value)
                if key == "momentum_buffer":
                    _check_buffer(value, p, index)
                else:
                    _check_memory(key, value, p, index)


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, not a tensor: it is damaged; {REMEDY}")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device, without data: load with map_location='cpu'")


def _check_buffer(buffer: Tensor, p: Tensor, index: object) -> None:
    if buffer.shape != p.shape:
        raise ValueError(
            f"the loaded momentum_buffer of parameter {index} has shape {tuple(buffer.shape)}, the parameter "
            f"{tuple(p.shape)}: the state dict belongs to another model, or its parameters are in another order"
        )
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (buffer, p)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the loaded momentum_buffer of parameter {index} has dtype {buffer.dtype}, the parameter {p.dtype}: "
            f"it is damaged, or the state dict belongs to another model; {REMEDY}"
        )
    placements = [(t.placements, t.device_mesh) if is_dtensor(t) else None for t in (buffer, p)]
    if placements[0] != placements[1]:
        raise ValueError(
            f"the loaded momentum_buffer of parameter {index} has placements {placements[0]}, the parameter "
            f"{placements[1]} (None: it is no DTensor); load with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which shards it"
        )


def _check_memory(key: str, value: Tensor, p: Tensor, index: object) -> None:
    """What a rule remembers of a parameter, or the counter of stochastic rounding."""
    filters = p.shape[0] if p.dim() and key not in ("handed_over", "largest_lr", "rounding_step") else 1
    # what is of another granularity than the group's is made anew at the next step
    if value.numel() not in (1, filters):
        raise ValueError(
            f"the loaded {key} of parameter {index} has {value.numel()} entries, but a parameter of shape "
            f"{tuple(p.shape)} has 1, or with granularity='filter' {filters}: the state dict belongs to another model; "
            f"{REMEDY}"
        )
    lowest = -1 if key == "tracked" else 0
    highest = RADIAL_TESTS if key == "tracked" else torch.inf
    is_counter = STATE_DTYPES[key] == torch.int64
    if (
        value.is_complex()
        or value.is_floating_point() == is_counter
        or not bool(((value >= lowest) & (value <= highest) & torch.isfinite(value)).all())
    ):
        raise ValueError(
            f"the loaded {key} of parameter {index} ({value.dtype}) has entries that no ELRSGD writes: they must be "
            f"{'integers' if is_counter else 'finite floats'}, at least {lowest}"
            f"{f', at most {highest}' if key == 'tracked' else ''}; it is damaged, so load an older checkpoint"
        )


def _names(keys: Iterable[object]) -> str:
    return ", ".join(map(str, keys)) or "nothing"
