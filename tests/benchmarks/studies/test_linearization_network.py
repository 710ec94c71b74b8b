"""Partial linearization: the same function to begin with, slopes that stay once they are 1, and average path lengths
against hand counts and against all paths, listed one by one."""

from __future__ import annotations

import copy
import dataclasses
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial
from torch import Tensor, nn
from torch.nn import functional as F

import elropt
from benchmarks.common import models
from benchmarks.common.warmups import gradient
from benchmarks.studies.linearization.network import (
    THRESHOLD,
    ChannelPReLU,
    average_path_length,
    freeze_,
    replace_relus_,
    slope_penalty,
)

NETS = ("bn-mlp-5-w8", "plain-8-w4", "resnet-14-w4", "resnet-50-w4", "conv-5-w4")


def build(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 16, 16)
    return models.build(name, in_shape=(3, 16, 16), classes=10, **options), images


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_replacement_keeps_the_function_and_its_gradient(name: str, training: bool) -> None:
    model, images = build(name)
    replaced = copy.deepcopy(model)
    layers = replace_relus_(replaced, images)
    assert not any(isinstance(module, nn.ReLU) for module in replaced.modules())
    assert list(layers) == [n for n, module in model.named_modules() if isinstance(module, nn.ReLU)]
    outputs = []
    for net in (model, replaced):
        output = net.train(training)(images)
        output.square().sum().backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    theirs = dict(replaced.named_parameters())
    for key, parameter in model.named_parameters():
        assert torch.equal(gradient(parameter), gradient(theirs[key])), key


def test_slopes_belong_to_channels() -> None:
    layer = ChannelPReLU(3)
    layer.slope.data = torch.tensor([0.0, 0.5, 1.0])
    x = torch.tensor([-2.0, 3.0])[:, None, None].expand(2, 3, 4)
    assert layer(x)[0, :, 0].tolist() == [0, -1, -2]
    assert layer(x)[1].unique().tolist() == [3]
    layer.linear[0] = True
    assert layer(x)[0, :, 0].tolist() == [-2, -1, -2]


def test_penalty_and_its_force() -> None:
    first, second = ChannelPReLU(2), ChannelPReLU(3)
    first.slope.data = torch.tensor([0.0, 0.75])
    second.slope.data = torch.tensor([-3.0, 5.0, 0.3])
    second.linear[2] = True
    penalty = slope_penalty([first, second])
    assert penalty.item() == pytest.approx(1 + 0.5 + 2 + 2)
    penalty.backward()
    assert gradient(first.slope).tolist() == pytest.approx([-0.5, -1.0])
    assert gradient(second.slope).tolist() == pytest.approx([-0.25, 0.25, 0.0])


def test_the_penalty_of_a_net_that_is_linear_is_zero() -> None:
    layer = ChannelPReLU(2)
    layer.linear.fill_(True)
    penalty = slope_penalty([layer])
    penalty.backward()
    assert penalty.item() == 0
    assert gradient(layer.slope).tolist() == [0, 0]


def test_freezing_takes_what_is_near_one_or_past_it() -> None:
    layer = ChannelPReLU(5)
    layer.slope.data = torch.tensor([0.0, 1 - 2 * THRESHOLD, 1 - THRESHOLD / 2, 1.0, 1.3])
    freeze_([layer])
    assert layer.linear.tolist() == [False, False, True, True, True]
    layer.slope.data.zero_()
    freeze_([layer])
    assert layer.linear.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("optimizer", ["sgd", "warmup", "uniform", "angle"])
def test_no_optimizer_moves_a_linear_channel(optimizer: str) -> None:
    """Momentum from before, weight decay on the slopes too, and gradients that would turn them back."""
    model, images = build("plain-8-w4")
    layers = replace_relus_(model, images)
    frozen = layers["stem.relu"]
    options: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
    opt = (
        torch.optim.SGD(model.parameters(), **options)
        if optimizer == "sgd"
        else elropt.ELRSGD(model.parameters(), rule=optimizer, **options)
    )
    labels = torch.arange(16) % 10

    def step() -> None:
        opt.zero_grad()
        (F.cross_entropy(model(images), labels) + 0.1 * slope_penalty(layers.values())).backward()
        opt.step()
        freeze_(layers.values())

    for _ in range(3):
        step()
    moved = frozen.slope.detach().clone()
    assert bool((moved != 0).all())
    frozen.slope.data[:2] = 1.0
    freeze_([frozen])
    for _ in range(10):
        step()
        assert gradient(frozen.slope)[:2].tolist() == [0, 0]
        assert frozen.linear.tolist() == [True, True, False, False]
        x = torch.randn(3, 4, 2, 2)
        assert torch.equal(frozen(x)[:, :2], x[:, :2])
    assert bool((frozen.slope[2:] != moved[2:]).all())


def test_slopes_have_neither_decay_nor_rule() -> None:
    model, images = build("resnet-8-w4")
    plain = {name for group in elropt.param_groups(model, images) for name in group["param_names"]}
    layers = replace_relus_(model, images)
    groups = {group["name"]: group for group in elropt.param_groups(model, images, weight_decay=0.1)}
    slopes = {f"{name}.slope" for name in layers}
    assert slopes <= set(groups["no_decay"]["param_names"])
    assert groups["no_decay"]["weight_decay"] == 0
    assert not groups["no_decay"]["scale_invariant"]
    found = {name for group in groups.values() for name in group["param_names"]}
    assert found == plain | slopes
    tracked = [n for n, p in model.named_parameters() if p.ndim == 4]
    assert groups["scale_invariant"]["param_names"] == tracked


def test_relus_that_cannot_be_replaced() -> None:
    images = torch.randn(4, 3)
    shared = nn.ReLU()
    twice = nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 2), shared)
    with pytest.raises(ValueError, match="'1' is called 2 times"):
        replace_relus_(twice, images)
    assert twice[1] is shared
    with pytest.raises(ValueError, match="no nn"):
        replace_relus_(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), images)


# Average path length


def lengths(model: nn.Module, *inputs: Tensor) -> tuple[float, float]:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mode = model.training
    both = tuple(average_path_length(model, *inputs, normalized=normalized) for normalized in (False, True))
    assert model.training is mode
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return both[0], both[1]


class Skip(nn.Module):
    """body(x) + x, with the addition written in several ways."""

    def __init__(self, body: nn.Module, how: str = "+") -> None:
        super().__init__()
        self.body, self.how = body, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.how == "+=":
            y += x
            return y
        return {"+": y + x, "add": torch.add(y, x), ".add": y.add(x)}[self.how]


def chain(depth: int, width: int, ends: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(ends if index == 0 else width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, ends))


@pytest.mark.parametrize("depth", [0, 1, 7])
def test_a_chain_is_as_long_as_it_has_relus(depth: int) -> None:
    layers: list[nn.Module] = [nn.Linear(5, 5)]
    for _ in range(depth):
        layers += [nn.ReLU(), nn.Linear(5, 5)]
    assert lengths(nn.Sequential(*layers), torch.zeros(2, 5)) == (depth, depth)


@pytest.mark.parametrize("how", ["+", "+=", "add", ".add"])
def test_one_skip_over_four_small_layers(how: str) -> None:
    """Figure 1 of source D: 4⁴ paths through the layers and one beside them."""
    unnormalized, normalized = lengths(Skip(chain(4, 4, ends=1), how), torch.zeros(2, 1))
    assert unnormalized == 4 * 256 / 257
    assert normalized == 4 / 2


def test_a_deep_wide_net_has_more_paths_than_a_float_can_count() -> None:
    blocks = nn.Sequential(*(Skip(chain(4, 64, ends=64)) for _ in range(50)))
    unnormalized, normalized = lengths(blocks, torch.zeros(2, 64))
    through = 64**4  # paths through a block from all channels to one
    expected = 50 * Fraction(4 * 64 * through, 64 * through + 1)
    assert unnormalized == float(expected)
    assert normalized == 100


@pytest.mark.parametrize(
    ("name", "expected"), [("plain-20-w4", 19), ("bn-mlp-6-w8", 5), ("vgg-16-bn-w4", 13)]
)
def test_nets_without_skips(name: str, expected: int) -> None:
    model = models.build(name, in_shape=(3, 32, 32), classes=10)
    assert lengths(model, torch.zeros(2, 3, 32, 32)) == (expected, expected)


def cifar_resnet_paths(blocks: int, width: int) -> Polynomial:
    """Generating function Σ x^length over all paths of resnet-(6·blocks + 2): option A shortcuts pad with zeros."""
    x = Polynomial([0, 1])
    channels = [3 * x] * width
    for stage in range(3):
        for block in range(blocks):
            mid = x * sum(channels, Polynomial([0]))  # a channel between the two convolutions of the branch
            out = width * 2**stage
            shortcut = channels + [Polynomial([0])] * (out - len(channels) if block == 0 else 0)
            channels = [x * (out * mid + skip) for skip in shortcut]
    return sum(channels, Polynomial([0]))


@pytest.mark.parametrize(("blocks", "width"), [(1, 1), (1, 4), (3, 2)])
def test_cifar_resnets(blocks: int, width: int) -> None:
    model, images = build(f"resnet-{6 * blocks + 2}-w{width}")
    paths = cifar_resnet_paths(blocks, width)
    unnormalized, normalized = lengths(model, images)
    assert unnormalized == pytest.approx(float(paths.deriv()(1) / paths(1)), rel=1e-12)
    # Stem 1; each block 1 behind the addition and 1/2 · 1 within the branch; behind a padding shortcut the new half
    # of the channels has only the branch.
    assert normalized == 1 + 3 * blocks * 1.5 + 2 * 0.5 * 0.5


def test_projection_shortcuts_are_a_branch_of_their_own() -> None:
    """Bottleneck blocks of 2 + 1 ReLUs, all channels reached by both branches: each block counts 1 + ½ · 2."""
    model, images = build("resnet-50-w4")
    _, normalized = lengths(model, images)
    assert normalized == 1 + 16 * (1 + 0.5 * 2)


def test_dense_concatenation() -> None:
    """Each layer of 2 channels sees the input's 3 channels and all before: paths are counted by channels."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(5, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
            self.head = nn.Conv2d(7, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x, self.first(x)], dim=1)
            x = torch.cat((x, self.second(x)), 1)
            return self.head(x)

    unnormalized, normalized = lengths(Dense(), torch.zeros(2, 3, 4, 4))
    # Into a channel of `first` 3 paths (length 1); of `second` 3 (1) and 2·3 (2).
    # Into the head 3 (0), then 2·3 (1), then 2·3 (1) and 2·6 (2).
    assert unnormalized == (2 * 3 + 2 * 3 + 2 * 6 * 2) / (3 + 6 + 18)
    # A step back from the head: 3/7 input, 2/7 first (1), 2/7 second (1 + 2/5 · 1).
    assert normalized == pytest.approx(2 / 7 + 2 / 7 * 1.4, rel=1e-15)


def test_partly_linear_channels() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    layers = replace_relus_(model, torch.zeros(2, 2))
    layers["1"].linear[:3] = True  # 1 of 4 is left
    layers["3"].linear[0] = True  # 2 of 3
    assert lengths(model, torch.zeros(2, 2)) == pytest.approx((1 / 4 + 2 / 3, 1 / 4 + 2 / 3))


def test_grouped_convolutions_connect_within_their_group() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2))
    layers = replace_relus_(model, torch.zeros(2, 4, 2, 2))
    layers["1"].linear[:] = torch.tensor([True, True, True, False])
    picked = nn.Sequential(model, Keep(slice(0, 3)))
    with pytest.raises(ValueError, match="getitem"):
        lengths(picked, torch.zeros(2, 4, 2, 2))
    assert lengths(model, torch.zeros(2, 4, 2, 2)) == (1 / 4, 1 / 4)
    model.append(nn.ReLU())
    of_last = replace_relus_(model, torch.zeros(2, 4, 2, 2))
    of_last["3"].linear[3:] = True  # active only where the units of the first group come from
    assert lengths(model, torch.zeros(2, 4, 2, 2)) == (3 / 4, 3 / 4)


class Keep(nn.Module):
    def __init__(self, channels: slice) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.channels]


def test_flattening_repeats_channels() -> None:
    """An image of 2×2 has 4 features a channel; beside them, one feature of the mean."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.pool, self.flatten = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.flatten(self.relu(x), 1), self.pool(x).flatten(1)], 1)

    assert lengths(Flat(), torch.zeros(2, 3, 2, 2)) == (4 / 5, 4 / 5)


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation on earlier tensors (indices), and what it needs to know."""

    kind: str
    inputs: tuple[int, ...]
    channels: int = 0
    groups: int = 1
    active: tuple[bool, ...] = ()


class Graph(nn.Module):
    """Tensors one after the other, the input first; the last one is the output."""

    def __init__(self, ops: list[Op], widths: list[int]) -> None:
        super().__init__()
        self.ops, self.layers = ops, nn.ModuleList()
        for op in ops:
            width = widths[op.inputs[0]]
            layer: nn.Module = nn.Identity()
            if op.kind == "conv":
                layer = nn.Conv2d(width, op.channels, 1, groups=op.groups)
            if op.kind == "prelu":
                layer = ChannelPReLU(width)
                layer.linear[:] = ~torch.tensor(op.active)
            if op.kind == "pad":
                layer = models.PadShortcut(op.channels, 1)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        tensors = [x]
        for op, layer in zip(self.ops, self.layers, strict=True):
            inputs = [tensors[index] for index in op.inputs]
            if op.kind == "add":
                tensors.append(inputs[0] + inputs[1])
            elif op.kind == "cat":
                tensors.append(torch.cat(inputs, 1))
            else:
                tensors.append(layer(inputs[0]))
        return tensors[-1]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Op], list[int]]:
    widths, ops = [draw(st.integers(1, 3))], []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["conv", "prelu", "add", "cat", "pad"]))
        source = draw(st.integers(max(0, len(widths) - 2), len(widths) - 1))
        width = widths[source]
        if kind == "conv":
            groups = draw(st.sampled_from([g for g in (1, 2) if width % g == 0]))
            op = Op(kind, (source,), groups * draw(st.integers(1, 2)), groups)
            width = op.channels
        elif kind == "prelu":
            active = draw(st.lists(st.booleans(), min_size=width, max_size=width))
            op = Op(kind, (source,), active=tuple(active))
        elif kind == "pad":
            op = Op(kind, (source,), draw(st.integers(1, 2)))
            width += op.channels
        elif kind == "add":
            other = draw(st.sampled_from([i for i, w in enumerate(widths) if w == width]))
            op = Op(kind, (source, other))
        else:
            other = draw(st.integers(0, len(widths) - 1))
            op = Op(kind, (source, other))
            width += widths[other]
        if width > 6:
            break
        ops.append(op)
        widths.append(width)
    return ops, widths


def predecessors(ops: list[Op], widths: list[int], tensor: int, channel: int) -> list[tuple[int, int]]:
    """The channels that a channel of a tensor comes from, edge by edge."""
    op = ops[tensor - 1]
    if op.kind == "conv":
        fan_in, fan_out = widths[op.inputs[0]] // op.groups, op.channels // op.groups
        group = channel // fan_out
        return [(op.inputs[0], group * fan_in + index) for index in range(fan_in)]
    if op.kind == "add":
        return [(source, channel) for source in op.inputs]
    if op.kind == "cat":
        first, second = op.inputs
        return [(first, channel) if channel < widths[first] else (second, channel - widths[first])]
    return [(op.inputs[0], channel)] if channel < widths[op.inputs[0]] else []


def all_paths(ops: list[Op], widths: list[int], tensor: int, channel: int) -> list[tuple[int, Fraction]]:
    """Every path from the input to a channel, one by one: its length, and the chance of a walk back to take it."""
    if tensor == 0:
        return [(0, Fraction(1))]
    by_edge = [all_paths(ops, widths, *node) for node in predecessors(ops, widths, tensor, channel)]
    by_edge = [paths for paths in by_edge if paths]
    op = ops[tensor - 1]
    unit = int(op.kind == "prelu" and op.active[channel])
    return [(length + unit, chance / len(by_edge)) for paths in by_edge for length, chance in paths]


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_against_all_paths_of_small_graphs(graph: tuple[list[Op], list[int]]) -> None:
    ops, widths = graph
    model = Graph(ops, widths)
    ends = [all_paths(ops, widths, len(ops), channel) for channel in range(widths[-1])]
    ends = [paths for paths in ends if paths]
    every = [path for paths in ends for path in paths]
    unnormalized, normalized = lengths(model, torch.zeros(2, widths[0], 2, 2))
    assert unnormalized == float(Fraction(sum(length for length, _ in every), len(every)))
    assert sum(chance for _, chance in every) == len(ends)
    assert normalized == float(sum(length * chance for length, chance in every) / len(ends))


class Of(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), (2, 3), r"Softmax \('1'\)"),
        (Of(lambda _, x: torch.sin(x)), (2, 3), r"through sin\("),
        (Of(lambda _, x: x.mean(0)), (2, 3), r"through mean\("),
        (Of(lambda self, x: x + self.weight), (2, 3), "the tensor 'weight'"),
        (Of(lambda _, x: torch.cat([x, x], 0)), (2, 3), "along dimension 1 only"),
        (Of(lambda _, x: x + x[:, :1]), (2, 3), "getitem"),
        (Of(lambda _, x: (x, x)), (2, 3), "returns a tuple"),
        (nn.Flatten(2), (2, 3, 2, 2), "flattening"),
        (nn.Sequential(nn.Linear(3, 3)), (2, 5, 3), r"\[n, features\]"),
        (
            models.build("ln-transformer-1", in_shape=(3, 8, 8), classes=10),
            (2, 3, 8, 8),
            "cannot trace Vision",
        ),
    ],
)
def test_what_is_not_understood_is_named(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_path_length(model, torch.zeros(shape), normalized=True)


def test_a_channel_that_only_pads_has_no_path() -> None:
    padded = nn.Sequential(models.PadShortcut(2, 1), nn.ReLU())
    assert lengths(padded, torch.zeros(2, 3, 2, 2)) == (1, 1)
