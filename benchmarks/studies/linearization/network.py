"""Partial linearization (source D of docs/theory.md): channels whose activation a penalty can make linear, and how deep
in nonlinear units a net is that has some of them.

    layers = replace_relus_(model, images)       # the same function: all slopes are 0
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels) + weight * slope_penalty(layers.values())
        ...
        optimizer.step()
        freeze_(layers.values())                 # a slope that has come to 1 stays 1
    average_path_length(model, images, normalized=False)

Of source D the abstract, the introduction and the caption of figure 1 were at hand, not the section on its method. From
them are PReLUs by channel, a sparsity prior on 1 − slope, and the two weightings of paths; the exponent 1/2, the
threshold and how paths are counted through each kind of layer are chosen here.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError
from torch.nn import functional as F

from benchmarks.common.models import PadShortcut

EXPONENT = 0.5  # of the penalty; below 1, so that some slopes go all the way and the others hardly move
THRESHOLD = 0.01  # distance of a slope from 1 at which its channel becomes linear

Paths: TypeAlias = list[
    tuple[int, int | Fraction]
]  # by channel: paths that end there, the sum of their lengths


class ChannelPReLU(nn.Module):
    """x where x > 0, else slope·x, with a slope for each channel (dimension 1): at 0 it is ReLU, at 1 linear.

    `slope`, [channels], is what is trained. `linear`, bool [channels], marks channels that `freeze_` has made linear:
    their slope is 1 whatever an optimizer does to `slope`, and their gradient is 0.
    """

    slope: nn.Parameter
    linear: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(channels))
        self.register_buffer("linear", torch.zeros(channels, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(x, torch.where(self.linear, 1.0, self.slope).to(x.dtype))


def replace_relus_(model: nn.Module, *example_inputs: Tensor) -> dict[str, ChannelPReLU]:
    """Put a `ChannelPReLU` of slope 0 in the place of every `nn.ReLU`: the function stays, to the sign of zeros.

    Args:
        model: changed in place. A copy of it is run in eval mode, to see how many channels there are.
        example_inputs: of the model.

    Returns:
        the new modules by name, in the order of `named_modules`. Optimizers that were made before do not know
        their slopes.

    Raises:
        ValueError: there is no ReLU, or one is called never or several times; nothing has been changed then.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    if not names:
        raise ValueError("the model has no nn.ReLU: build its activations as modules, not by functions")
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    probe = copy.deepcopy(model).eval()
    for name, seen in inputs.items():
        hook = functools.partial(_keep_input, seen)
        probe.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        probe(*example_inputs)
    for name, seen in inputs.items():
        if len(seen) != 1:
            raise ValueError(
                f"the ReLU {name!r} is called {len(seen)} times: give each call a module of its own"
            )
    layers = {name: ChannelPReLU(x.shape[1]).to(x.device) for name, (x,) in inputs.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def _keep_input(seen: list[Tensor], _module: nn.Module, inputs: tuple[Tensor]) -> None:
    seen.append(inputs[0])


def slope_penalty(layers: Iterable[ChannelPReLU]) -> Tensor:
    """Σ |1 − slope|^(1/2) over the channels that are not linear: a sparsity prior on the number of nonlinear units.

    It pulls every slope towards 1, by a force that does not depend on the size of the net and grows near 1. At a
    slope of exactly 1 it has no gradient: `freeze_` comes first.
    """
    distances = [(1 - layer.slope[~layer.linear]).abs() for layer in layers]
    return torch.cat(distances).pow(EXPONENT).sum()


@torch.no_grad()
def freeze_(layers: Iterable[ChannelPReLU]) -> None:
    """Make the channels linear whose slope is within `THRESHOLD` of 1 or past it.

    Call it after every step: slopes start at 0, so one past 1 has crossed it in that step.
    """
    for layer in layers:
        layer.linear |= layer.slope >= 1 - THRESHOLD


def average_path_length(model: nn.Module, *example_inputs: Tensor, normalized: bool) -> float:
    """How many active nonlinear units are met, on average, on a path from the input to the output of a net.

    Nodes are the channels (dimension 1) of every tensor. A convolution or linear layer connects each output channel
    with all input channels of its group, an addition each channel with the same one of all terms, a concatenation
    passes channels on, flattening repeats them. Normalizations, pooling and dropout are taken channel by channel and
    do not count. An active unit is a channel of a ReLU, or of a `ChannelPReLU` that is not linear. Zeros that pad
    channels have no path.

    - not normalized: all paths are equally likely, so wide branches outweigh narrow ones and skip connections.
    - normalized: a random walk from a random output channel back to the input takes each incoming edge with equal
      chance, among those that a path from the input arrives by. An addition is such a choice between its terms: a skip
      connection around any branch has the chance 1/2.

    Args:
        model: one that `torch.fx` can trace. A copy of it is run in eval mode.
        example_inputs: of the model, [n, channels, …]; only their shapes matter.

    Raises:
        ValueError: an operation whose paths are not defined here, by name; or a model that cannot be traced.

    Source: Mehmeti-Göpel & Disselhoff, ICML 2023 (arXiv 2211.17180), figure 1; on channels, derived here. Counts are
    exact: of 64 channels and 110 layers, too, which has more paths than a float holds.
    """
    model = copy.deepcopy(model).eval()
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except (TraceError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__}, so it has no graph of paths: {error}"
        ) from error
    counter = _PathCounter(fx.GraphModule(model, graph), normalized)
    counter.extra_traceback = False
    with torch.no_grad():
        output = counter.run(*example_inputs)
    if not isinstance(output, _Value):
        raise ValueError(f"the model returns a {type(output).__name__}: paths are counted to a single tensor")
    count, length = sum(n for n, _ in output.paths), sum(length for _, length in output.paths)
    if count == 0:
        raise ValueError("no path leads from the input to the output")
    return float(Fraction(length) / count)


@dataclasses.dataclass(frozen=True)
class _Value:
    tensor: Tensor
    paths: Paths


_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_CHANNELWISE = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Identity),
)
_LEAVES = (*_WEIGHTED, *_CHANNELWISE, nn.ReLU, nn.Flatten, ChannelPReLU, PadShortcut)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


class _PathCounter(fx.Interpreter):
    """Runs a graph with the paths of every channel beside its tensor."""

    def __init__(self, module: fx.GraphModule, normalized: bool) -> None:
        super().__init__(module)
        self.normalized = normalized

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> _Value:
        tensor = super().placeholder(target, args, kwargs)
        return _Value(tensor, [(1, 0)] * tensor.shape[1])

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise ValueError(
            f"average_path_length does not know what the tensor {target!r} of the model does to paths"
        )

    def call_module(self, target: Any, args: Any, kwargs: Any) -> _Value:
        module = self.fetch_attr(target)
        if not isinstance(module, _LEAVES):
            raise ValueError(
                f"average_path_length does not know the paths through {type(module).__name__} ({target!r}); it knows "
                f"{', '.join(leaf.__name__ for leaf in _LEAVES)}, additions, concatenations and ReLUs"
            )
        (value,) = args
        tensor = module(value.tensor)
        return _Value(tensor, self._through(module, value, tensor))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> _Value:
        through = _FUNCTIONS.get(target)
        if through is None:
            raise ValueError(f"average_path_length does not know the paths through {target.__name__}(…)")
        paths: list[Paths] = []

        def tensor_of(argument: Any) -> Any:
            if not isinstance(argument, _Value):
                return argument
            paths.append(argument.paths)
            return argument.tensor

        args, kwargs = map_aggregate((args, kwargs), tensor_of)
        tensor = target(*args, **kwargs)
        return _Value(tensor, through(self, paths, tensor))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> _Value:
        return self.call_function(getattr(Tensor, target), args, kwargs)

    def _through(self, module: nn.Module, value: _Value, tensor: Tensor) -> Paths:
        paths = value.paths
        if isinstance(module, _WEIGHTED):
            if isinstance(module, nn.Linear) and tensor.ndim != 2:
                raise ValueError(
                    f"paths through Linear need an input [n, features], got {list(value.tensor.shape)}"
                )
            groups = 1 if isinstance(module, nn.Linear) else module.groups
            width, out = len(paths) // groups, tensor.shape[1] // groups
            return [
                joined
                for group in range(groups)
                for joined in [self._join(paths[group * width : (group + 1) * width])] * out
            ]
        if isinstance(module, nn.ReLU):
            return _pass_units(paths, [True] * len(paths))
        if isinstance(module, ChannelPReLU):
            return _pass_units(paths, (~module.linear).tolist())
        if isinstance(module, nn.Flatten):
            return _repeat(paths, tensor)
        if isinstance(module, PadShortcut):
            return [*paths, *[(0, 0)] * module.new_channels]
        return paths

    def _join(self, edges: Sequence[tuple[int, int | Fraction]]) -> tuple[int, int | Fraction]:
        count, length = sum(n for n, _ in edges), sum(length for _, length in edges)
        return (1, Fraction(length) / count) if self.normalized and count else (count, length)

    def _add(self, terms: list[Paths], tensor: Tensor) -> Paths:
        if any(len(paths) != tensor.shape[1] for paths in terms):
            raise ValueError(
                f"paths through an addition need equal channels, got {[len(term) for term in terms]}"
            )
        return [self._join(edges) for edges in zip(*terms, strict=True)]

    def _cat(self, parts: list[Paths], tensor: Tensor) -> Paths:
        paths = [path for part in parts for path in part]
        if len(paths) != tensor.shape[1]:
            raise ValueError(
                f"paths through a concatenation are known along dimension 1 only, got {list(tensor.shape)}"
            )
        return paths

    def _flatten(self, inputs: list[Paths], tensor: Tensor) -> Paths:
        return _repeat(inputs[0], tensor)

    def _relu(self, inputs: list[Paths], tensor: Tensor) -> Paths:
        return _pass_units(inputs[0], [True] * len(inputs[0]))


_FUNCTIONS: dict[Any, Callable[[_PathCounter, list[Paths], Tensor], Paths]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, Tensor.add, Tensor.add_), _PathCounter._add),
    **dict.fromkeys((torch.cat, torch.concat), _PathCounter._cat),
    **dict.fromkeys((torch.flatten, Tensor.flatten), _PathCounter._flatten),
    **dict.fromkeys((torch.relu, F.relu, Tensor.relu, Tensor.relu_), _PathCounter._relu),
}


def _pass_units(paths: Paths, active: Sequence[bool]) -> Paths:
    return [(n, length + n * unit) for (n, length), unit in zip(paths, active, strict=True)]


def _repeat(paths: Paths, flat: Tensor) -> Paths:
    if flat.ndim != 2 or flat.shape[1] % len(paths):
        raise ValueError(
            f"paths through a flattening are known for one to [n, features], got {list(flat.shape)}"
        )
    return [path for path in paths for _ in range(flat.shape[1] // len(paths))]
