"""What a record says of the optimizer: its class and the options of its param groups."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .controller import controller_of
from .layer_table import parameter_names

__all__ = ["describe_optimizer"]

LEFT_OUT = ("params", "param_names", "layers", "lr", "step")  # the learning rate is in every record, by layer


def describe_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """``{"class": "torch.optim.adamw.AdamW", "control": rule, "groups": [{"layers": [name, …], option: value, …}]}``.

    `control` is the rule of `elropt.control`, None without. Options are those of the param group that JSON can hold:
    numbers, text, None, and tuples and lists of these; a number that is a tensor only if it is on the CPU, so that
    nothing waits for the device. NaN and infinity are None. The learning rate is left out, and an option "layers".
    """
    names = parameter_names(optimizer)
    controller = controller_of(optimizer)
    kind = type(optimizer)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "control": None if controller is None else controller.rule,
        "groups": [
            {"layers": [names[p] for p in group["params"]], **_options(group)}
            for group in optimizer.param_groups
        ],
    }


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    values = {
        key: _plain(value) for key, value in group.items() if isinstance(key, str) and key not in LEFT_OUT
    }
    return {key: value for key, value in values.items() if value is not _UNKNOWN}


_UNKNOWN = object()


def _plain(value: Any) -> Any:
    """`value` as JSON has it, or `_UNKNOWN`."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 and value.device.type == "cpu" else _UNKNOWN
    if isinstance(value, tuple | list):
        items = [_plain(item) for item in value]
        return _UNKNOWN if any(item is _UNKNOWN for item in items) else items
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return _UNKNOWN
