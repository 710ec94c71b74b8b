"""A model from the name of the function that builds it, as `elropt inspect PKG.MODULE:FACTORY` gets it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ._model_copy import Inputs

__all__ = ["BuiltModel", "build_model", "in_words"]


class BuiltModel(NamedTuple):
    """What a factory returned; `inputs` and `loss` are None if it returned none."""

    model: nn.Module
    inputs: Inputs | None
    loss: Callable[[Any], Any] | None


def build_model(target: str) -> BuiltModel:
    """Import the factory that `target` names, PKG.MODULE:FACTORY or path/to/file.py:FACTORY, and call it.

    Raises:
        ValueError: `target` names none, importing or calling it fails, or it returns something else.
    """
    module_name, _, name = target.rpartition(":")
    if not module_name or not name:
        raise ValueError(f"{target!r} is not PKG.MODULE:FACTORY or path/to/file.py:FACTORY")
    try:
        module = _import(module_name)
    except Exception as error:
        raise ValueError(f"cannot import {module_name}: {in_words(error)}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        defined = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        what = "is not callable" if hasattr(module, name) else "does not exist"
        raise ValueError(
            f"{name} {what} in {module_name}, which has {', '.join(defined) or 'nothing to call'}"
        )
    try:
        built = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise ValueError(f"{target}() failed: {in_words(error)}") from error
    model, inputs, loss = (
        (*built, None, None)[:3] if isinstance(built, tuple) and built else (built, None, None)
    )
    if not isinstance(model, nn.Module) or (isinstance(built, tuple) and len(built) > 3):
        raise ValueError(
            f"{target}() returned {_types_in(built)}; it must return a model (torch.nn.Module), (model, inputs) "
            "or (model, inputs, loss)"
        )
    if loss is not None and not callable(loss):
        raise ValueError(
            f"{target}() returned a loss of type {type(loss).__name__}; it must be a function of the outputs"
        )
    return BuiltModel(model, None if inputs is None else _as_inputs(inputs), loss)


def _as_inputs(inputs: object) -> Inputs:
    """A mapping holds keyword arguments, a tuple or list positional ones, and anything else is the only argument."""
    if isinstance(inputs, Mapping):
        return Inputs((), {str(name): value for name, value in inputs.items()})
    return Inputs(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})


def _import(name: str) -> Any:
    """A module by its name, looked for in the working directory first, or a file by its path."""
    if not name.endswith(".py"):
        sys.path.insert(0, "")
        return importlib.import_module(name)
    path = Path(name).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {name}")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"_inspected_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} cannot be loaded as a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_words(error: BaseException) -> str:
    """The message of an exception and its notes; of one that elropt did not raise also its type and file."""
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = raised.parent == Path(__file__).parent
    place = f" in {raised.name}" if raised.suffix == ".py" else ""
    where = "" if ours else f"{type(error).__name__}{place}: "
    return "\n".join([f"{where}{error}", *getattr(error, "__notes__", [])])


def _types_in(built: object) -> str:
    if isinstance(built, tuple):
        return f"({', '.join(type(part).__name__ for part in built)})"
    return f"an object of type {type(built).__name__}"
