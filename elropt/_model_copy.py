"""Running a copy of a user's model, so that the model itself does not change."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .sharding import is_dtensor

Outputs: TypeAlias = Callable[[Any], Any]  # picks from what a model returns the outputs that count


class Inputs(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def cloned(self, dtype: torch.dtype | None = None) -> Inputs:
        """All tensors cloned, the floating-point ones in `dtype`."""

        def clone(tensor: Tensor) -> Tensor:
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to(wanted, copy=True)

        return Inputs(*map_tensors(clone, tuple(self)))


def check_model(model: object) -> None:
    """Refuse what is no model that can run.

    Raises:
        TypeError: it is no module.
        ValueError: it has parameters without a shape, without data, or sharded ones (DTensors).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, not a torch.nn.Module"
            f"{'; pass its .module()' if hasattr(model, 'module') else ''}"
        )
    params = dict(model.named_parameters())
    if lazy := [name for name, param in params.items() if is_lazy(param)]:
        raise ValueError(
            f"lazy parameters have no shape yet: {', '.join(lazy)}; run model(*inputs) once first"
        )
    if sharded := [name for name, param in params.items() if is_dtensor(param)]:
        raise ValueError(
            f"{first_of(sharded)} are DTensors: measure the model before fully_shard or parallelize_module. Groups "
            "made before hold their names: afterwards set group['params'] = [model.get_parameter(name) for name in "
            "group['param_names']]"
        )
    if empty := [name for name, tensor in _named_tensors(model) if tensor.is_meta]:
        raise ValueError(
            f"{first_of(empty)}: on the meta device, without data. Materialize and initialize the model first: "
            "model.to_empty(device='cpu'), then its initialization or load_state_dict"
        )


def copied(model: nn.Module, *, dtype: torch.dtype | None = None, training: bool | None = None) -> nn.Module:
    """A deep copy, whose parameters require gradients where the model's do.

    Args:
        dtype: float64 or float32, for its real parameters and buffers. None: those of the model.
        training: whether it is in training mode. None: the modes that the modules of the model are in. So too with True
            if the model is in training mode: a BatchNorm in eval mode is frozen.
    """
    # torch.nn.utils.weight_norm and spectral_norm keep a computed weight, which deepcopy would refuse.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        with torch.no_grad():  # otherwise the copy of a ScriptModule is a function of the original
            twin = copy.deepcopy(model, computed)
    except Exception as error:
        error.add_note(
            "elropt runs a deep copy of the model: pass one that copy.deepcopy can copy; "
            "of one in a wrapper such as DistributedDataParallel, its .module"
        )
        raise
    if dtype is not None:  # twin.to(dtype) would make real numbers of complex ones
        twin = {torch.float64: twin.double, torch.float32: twin.float}[dtype]()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    if training is not None and not (training and model.training):
        with suppress(
            NotImplementedError
        ):  # a program of torch.export keeps the mode that it was exported in
            twin.train(training)
    return twin


def run(model: nn.Module, inputs: Inputs) -> Any:
    """model(*args, **kwargs), without torch.compile. An error gets a note that says how the model was called."""
    try:
        with torch.compiler.set_stance("force_eager"):
            return model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        dtypes = sorted({str(param.dtype).removeprefix("torch.") for param in model.parameters()})
        given = ", ".join(["*inputs"] * bool(inputs.args) + [f"{name}=…" for name in inputs.kwargs])
        error.add_note(
            f"elropt ran model({given}) on a copy in {'train' if model.training else 'eval'} mode, with "
            f"{' and '.join(dtypes)} parameters"
        )
        if "per channel" in str(error):  # BatchNorm's error
            error.add_note("In training mode BatchNorm needs more than one value: pass at least 8 samples")
        if any(isinstance(value, Mapping) for value in inputs.args):
            error.add_note("A batch that is a dict of keyword arguments is passed as **batch")
        raise


def backward_from_loss(model: nn.Module, inputs: Inputs, loss: Callable[[Any], Any]) -> Tensor:
    """loss(model(…)) of a copy of a model, and a backward pass from it, which sets the gradients of the copy.

    Raises:
        ValueError: the loss is no scalar tensor that depends on the parameters.
    """
    value = loss(run(model, inputs))
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"loss returned {found}; it must be a scalar tensor that depends on the parameters")
    value.sum().backward()
    return value.detach()


def owner_of(name: str) -> str:
    """The module that a parameter belongs to; for a parametrized one, the module that is parametrized."""
    owner, parametrized, _ = f".{name}".partition(".parametrizations.")
    return owner if parametrized else owner.rpartition(".")[0]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in `output`: in nested sequences, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors_in(getattr(output, field.name))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its tensors mapped, in new sequences, mappings and dataclasses; other objects are deep copies."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, MutableMapping):
        mapped = copy.copy(value)
        for key, item in value.items():
            mapped[key] = map_tensors(function, item)
        return mapped
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        mapped = copy.copy(value)
        for field in fields(value):
            object.__setattr__(mapped, field.name, map_tensors(function, getattr(value, field.name)))
        return mapped
    try:
        return copy.deepcopy(value)
    except Exception:  # a generator or a lock cannot be copied: pass it on
        return value


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch, Python and NumPy, and the gradients of `model`, at the end.

    The gradients, because a copy can hold a closure over parameters of the original; the backward pass of the copy
    then adds to their gradients.
    """
    params = list(model.parameters())
    grads = [param.grad for param in params]
    for param in params:
        param.grad = None
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


def seed_like(model: nn.Module) -> None:
    """Seed the generators of the CPU and of the model's devices. torch.manual_seed would seed every device."""
    torch.default_generator.manual_seed(0)
    for device in _cuda_devices(model):
        torch.cuda.default_generators[device].manual_seed(0)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({tensor.device.index for _, tensor in _named_tensors(model) if tensor.is_cuda})


def first_of(names: list[str]) -> str:
    """At most three of the names, in words."""
    return f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
