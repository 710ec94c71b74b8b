"""What the text of a command-line option stands for: numbers, random inputs, learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from . import dynamics
from ._model_copy import Inputs

__all__ = ["initial_relative_grads", "lr_rule", "random_inputs"]

Number = TypeVar("Number", int, float)


def random_inputs(shapes: list[str], specs: list[str], model: nn.Module, target: str) -> Inputs:
    """The inputs that --input-shape and, after them, --input ask for.

    Raises:
        ValueError: there is neither, or one that cannot be read.
    """
    if not shapes and not specs:
        raise ValueError(
            f"{target} returns no inputs: give --input-shape, such as 64,3,32,32, or --input, such as "
            "int64:8,128:50257 for a token model, or return (model, inputs)"
        )
    like = next((param for param in model.parameters() if param.is_floating_point()), torch.empty(0))
    args: list[Tensor] = [torch.randn(_sizes("--input-shape", shape), dtype=like.dtype) for shape in shapes]
    kwargs = {}
    for spec in specs:
        name, given, rest = spec.rpartition("=")
        value = _random_input(spec, rest)
        if given and name in kwargs:
            raise ValueError(f"--input {spec}: {name} is given twice")
        if given:
            kwargs[name] = value
        else:
            args.append(value)
    return Inputs(tuple(args), kwargs)


def _random_input(spec: str, rest: str) -> Tensor:
    """What `spec`, [NAME=]DTYPE:SHAPE[:HIGH], asks for; `rest` is its part behind the name."""
    dtype_name, *parts = rest.split(":")
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype) or len(parts) not in (1, 2):
        raise ValueError(
            f"--input {spec}: not [NAME=]DTYPE:SHAPE[:HIGH], such as int64:8,128:50257 or float32:64,3,32,32"
        )
    sizes = _sizes(f"--input {spec}:", parts[0])
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        if len(parts) == 2:
            raise ValueError(f"--input {spec}: HIGH is for integers only")
        return torch.ones(sizes, dtype=dtype) if dtype == torch.bool else torch.randn(sizes, dtype=dtype)
    if len(parts) == 1:
        raise ValueError(
            f"--input {spec}: integers need a HIGH, above the largest, such as int64:8,128:50257"
        )
    high, *more = _numbers(f"--input {spec}:", parts[1], int)
    if more:
        raise ValueError(f"--input {spec}: HIGH is one number, not {parts[1]}")
    if not 0 < high <= torch.iinfo(dtype).max:
        raise ValueError(
            f"--input {spec}: HIGH must be between 1 and {torch.iinfo(dtype).max}, the largest {dtype_name}"
        )
    return torch.randint(high, sizes, dtype=dtype)


def _sizes(option: str, text: str) -> list[int]:
    sizes = _numbers(option, text, int)
    if min(sizes) < 1:
        raise ValueError(f"{option} {text}: every size must be at least 1")
    return sizes


def initial_relative_grads(e0: str | None, depth: int | None, factor: float | None) -> list[float]:
    """E of the layers at the start: those of --e0, or a geometric series from --depth and --factor.

    Raises:
        ValueError: both or neither of them, or values that are not allowed.
    """
    if e0 is not None:
        if depth is not None or factor is not None:
            raise ValueError("give either --e0 or --depth with --factor, not both")
        return _numbers("--e0", e0, float)
    if depth is None or factor is None:
        raise ValueError("give --e0, such as --e0 100,10,1, or --depth with --factor")
    if depth < 1 or not 0 < factor < math.inf:
        raise ValueError(
            f"--depth {depth} --factor {factor:g}: the depth must be at least 1, "
            "the factor positive and finite"
        )
    with np.errstate(over="ignore"):
        return list(factor ** np.arange(depth - 1.0, -1.0, -1.0))


def lr_rule(lr: str, momentum: float) -> Callable[[np.ndarray], float]:
    """The learning rate of a step as a function of E: --lr's number, balance or monotone.

    Raises:
        ValueError: another word, or several numbers.
    """
    critical = {"balance": dynamics.balance_lr, "monotone": dynamics.monotone_lr}.get(lr)
    if critical is not None:
        return lambda E: float((1 - momentum) * critical(E))
    constant, *more = _numbers("--lr", lr, float, "or balance or monotone")
    if more:
        raise ValueError(f"--lr {lr}: give one number, or balance or monotone")
    return lambda E: constant


def _numbers(option: str, text: str, kind: type[Number], otherwise: str = "") -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "64,3,32,32" if kind is int else "100,10,1"
        raise ValueError(
            f"{option} {text}: not comma-separated numbers such as {example}{otherwise and ', ' + otherwise}"
        ) from None
