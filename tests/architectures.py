"""Tiny models. For each, somebody has worked out by hand which parameters are scale-invariant.

`ARCHITECTURES` maps a name to an `Architecture`: `build()` returns a new float32 model in training mode, `inputs()`
its positional arguments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

BATCH = 8


@dataclass(frozen=True)
class Architecture:
    """A model, its inputs, and the names of its parameters by kind.

    Attributes:
        channel: scale-invariant, each channel alone.
        tensor: scale-invariant, but only as a whole.
        no_effect: in training mode the outputs do not depend on them.
        jointly: pairs that are scale-invariant only together.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    channel: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()
    no_effect: tuple[str, ...] = ()
    jointly: tuple[tuple[str, str], ...] = ()

    def build(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()

    def kinds(self) -> dict[str, Literal["channel", "tensor"] | None]:
        """The expected kind of every parameter."""
        names = [name for name, _ in self.build().named_parameters()]
        assert {*self.channel, *self.tensor, *self.no_effect} <= {*names}
        return {n: "channel" if n in self.channel else "tensor" if n in self.tensor else None for n in names}


def _images() -> tuple[Tensor]:
    return (torch.randn(BATCH, 3, 6, 6, generator=torch.Generator().manual_seed(1)),)


def _vectors() -> tuple[Tensor]:
    return (torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(2)),)


def _sequences() -> tuple[Tensor]:
    return (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3)),)


def _tokens() -> tuple[Tensor]:
    return (torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(4)),)


def _conv_net(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(
        *layers, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * features, 3)
    )


class SharedWeight(nn.Module):
    """One weight in two places: behind both there is a norm, or with `plain_use` behind the first only."""

    def __init__(self, plain_use: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(1 if plain_use else 2))
        self.plain_use = plain_use

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.first(x)))
        x = self.second(x)
        return x.square() if self.plain_use else self.norms[1](x).square()


class PreActivationBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


class PreActivationResNet(nn.Module):
    """Only conv1 of a block has a norm to itself; the stem and conv2 are added up in the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.block1 = PreActivationBlock(4)
        self.block2 = PreActivationBlock(4)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.block2(self.block1(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class PostNormBlock(nn.Module):
    """Behind x + conv3(x) is a norm, but the skip does not scale along. The gain of bn2 starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.conv3 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(3)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.bn3(x + self.conv3(x))).mean((2, 3))


class RootMeanSquareNorm(nn.Module):
    """RMSNorm written out, as in many language models: an eps that no torch function is told about."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


class Attention(nn.Module):
    """Pre-norm self-attention with two heads; `qk_norm` normalizes queries and keys per head."""

    def __init__(self, qk_norm: bool, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=bias) for _ in range(3))
        self.out = nn.Linear(8, 8, bias=False)
        self.qk_norm = RootMeanSquareNorm() if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (proj(y).unflatten(-1, (2, 4)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.qk_norm(q), self.qk_norm(k), v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class StandardizedConv(nn.Conv2d):
    """Weight standardization: each filter is normalized, not what it computes."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(input, (self.weight - mean) / (std + 1e-5), self.bias)


class Embedded(nn.Module):
    """Token embeddings plus positions, then LayerNorm; a second table with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.positions = nn.Parameter(torch.randn(5, 6))
        self.types = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6, elementwise_affine=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.tokens(tokens) + self.positions) + self.norm(self.types(tokens))
        return x.square()


@dataclass
class Prediction:
    logits: Tensor
    hidden: list[Tensor]
    label: str = "none"


class Structured(nn.Module):
    """Takes (image, {"scale": number}); returns a dataclass and integers. One parameter is in no output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 3, bias=False)
        self.unused = nn.Linear(2, 2, bias=False)

    def forward(self, batch: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Prediction | Tensor]:
        image, options = batch
        y = F.relu(self.norm(self.conv(image * options["scale"])))
        logits = self.head(y.mean((2, 3)))
        return {"prediction": Prediction(logits, [y]), "best": logits.argmax(1)}


def _mlp_block() -> tuple[nn.Module, ...]:
    return nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU()


def _weight_norm_net(*after: nn.Module) -> nn.Sequential:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), *after, nn.Tanh(), nn.Linear(5, 2))


def _frozen_net() -> nn.Sequential:
    frozen = nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False)
    return _conv_net(frozen, nn.BatchNorm2d(4), features=4)


def _zero_biased_net() -> nn.Sequential:
    first = nn.Linear(6, 6)
    nn.init.zeros_(first.bias)
    return nn.Sequential(first, nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))


WEIGHT_NORM = "0.parametrizations.weight.original"

ARCHITECTURES: dict[str, Architecture] = {
    "plain": Architecture(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), _vectors),
    "conv + BatchNorm": Architecture(
        lambda: _conv_net(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5, affine=False),
            features=5,
        ),
        _images,
        channel=("0.weight", "3.weight"),
        no_effect=("3.bias",),
    ),
    "linear + BatchNorm": Architecture(
        lambda: nn.Sequential(*_mlp_block(), *_mlp_block(), *_mlp_block(), *_mlp_block(), nn.Linear(6, 3)),
        _vectors,
        channel=("0.weight", "3.weight", "6.weight", "9.weight"),
    ),
    "BatchNorm without running statistics": Architecture(
        lambda: nn.Sequential(
            nn.Linear(6, 6, bias=False),
            nn.BatchNorm1d(6, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(6, 3),
        ),
        _vectors,
        channel=("0.weight",),
    ),
    "conv + GroupNorm": Architecture(
        lambda: _conv_net(nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4), features=4),
        _images,
        tensor=("0.weight",),
    ),
    "biased conv + GroupNorm": Architecture(
        lambda: _conv_net(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), features=4),
        _images,
        jointly=(("0.weight", "0.bias"),),
    ),
    "zero-biased linear + LayerNorm": Architecture(
        _zero_biased_net, _vectors, jointly=(("0.weight", "0.bias"),)
    ),
    "conv + InstanceNorm": Architecture(
        lambda: _conv_net(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.InstanceNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, bias=False),
            nn.InstanceNorm2d(4, affine=True),
            features=4,
        ),
        _images,
        channel=("0.weight", "3.weight"),
        no_effect=("0.bias",),
    ),
    "linear + LayerNorm": Architecture(
        lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)),
        _vectors,
        tensor=("0.weight",),
    ),
    "linear + RMSNorm": Architecture(
        lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.RMSNorm(6), nn.GELU(), nn.Linear(6, 3)),
        _vectors,
        tensor=("0.weight",),
    ),
    "gain in front of a norm": Architecture(
        lambda: nn.Sequential(
            nn.Linear(6, 6, bias=False),
            nn.RMSNorm(6),
            nn.ReLU(),
            nn.Linear(6, 6, bias=False),
            nn.RMSNorm(6),
            nn.Linear(6, 2),
        ),
        _vectors,
        tensor=("0.weight", "1.weight", "3.weight"),
    ),
    "shared weight": Architecture(SharedWeight, _vectors, channel=("first.weight",)),
    "weight shared with a plain layer": Architecture(lambda: SharedWeight(plain_use=True), _vectors),
    "pre-activation ResNet": Architecture(
        PreActivationResNet, _images, channel=("block1.conv1.weight", "block2.conv1.weight")
    ),
    "norm behind the addition": Architecture(
        PostNormBlock, _images, channel=("conv1.weight", "conv2.weight")
    ),
    "attention": Architecture(lambda: Attention(qk_norm=False, bias=True), _sequences, no_effect=("k.bias",)),
    "attention with QK-norm": Architecture(
        lambda: Attention(qk_norm=True), _sequences, tensor=("q.weight", "k.weight")
    ),
    "weight_norm": Architecture(_weight_norm_net, _vectors, channel=(f"{WEIGHT_NORM}1",)),
    "weight_norm + BatchNorm": Architecture(
        lambda: _weight_norm_net(nn.BatchNorm1d(5)),
        _vectors,
        channel=(f"{WEIGHT_NORM}1",),
        no_effect=("0.bias", f"{WEIGHT_NORM}0"),
    ),
    "weight_norm + LayerNorm": Architecture(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(6, 5, bias=False)), nn.LayerNorm(5), nn.Tanh()
        ),
        _vectors,
        channel=(f"{WEIGHT_NORM}1",),
        tensor=(f"{WEIGHT_NORM}0",),
    ),
    "weight standardization": Architecture(
        lambda: nn.Sequential(StandardizedConv(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)),
        _images,
        channel=("0.weight",),
    ),
    "depthwise conv": Architecture(
        lambda: _conv_net(
            nn.Conv2d(3, 3, 3, groups=3, bias=False),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Conv2d(3, 3, 1, groups=3, bias=False),
            nn.BatchNorm2d(3),
            features=3,
        ),
        _images,
        channel=("0.weight",),
        no_effect=("3.weight",),
    ),
    "transposed conv + BatchNorm": Architecture(
        lambda: _conv_net(nn.ConvTranspose2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), features=4),
        _images,
        tensor=("0.weight",),
    ),
    "dropout": Architecture(
        lambda: nn.Sequential(
            nn.Dropout(0.3),
            nn.Linear(6, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(6, 3, bias=False),
        ),
        _vectors,
        channel=("1.weight",),
    ),
    "frozen layer": Architecture(_frozen_net, _images, channel=("0.weight",)),
    "embeddings": Architecture(Embedded, _tokens, channel=("types.weight",)),
    "structured inputs and outputs": Architecture(
        Structured,
        lambda: ((_images()[0], {"scale": torch.tensor(2.0)}),),
        channel=("conv.weight",),
        no_effect=("unused.weight",),
    ),
}
