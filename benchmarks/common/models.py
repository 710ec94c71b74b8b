"""Nets of the benchmarks, in plain PyTorch, under their usual names and sizes.

    model = build("bn-mlp-30", in_shape=(1, 8, 8), classes=10)
    model = build("plain-56-w32", in_shape=dataset.in_shape, classes=dataset.classes, scale_invariant=True)

Hidden weights are He-normal (variance 2/fan_in; He et al., 2015) and have no bias; the classifier (`head`) is
normal with variance 1/fan_in, its bias zero. `VisionTransformer` says where it differs. ReLUs are modules of
their own and not in place, so that hooks can read what goes into them and a study can replace them.
With `scale_invariant=True` every trainable parameter is scale-invariant: normalizations have neither gain nor
bias, and the head is frozen at the norm `FROZEN_HEAD_NORM` and has no bias (source B of docs/theory.md).
"""

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "layer", "none"]
Shape = tuple[int, int, int]  # of an image: channels, side, side

FROZEN_HEAD_NORM = 10.0  # Frobenius norm, as in source B


def build(name: str, *, in_shape: tuple[int, ...], classes: int, **overrides: object) -> nn.Module:
    """Build a net by its name. It maps images float [n, *in_shape] to logits [n, classes], or characters
    int64 [n, *in_shape] to logits [n, classes, *in_shape] of what follows each of them.

    Names are the keys of `MODELS` with a number for N: layers with weights on the longest path (`mlp`,
    `conv`, `plain`, `resnet`), pixels of a patch's side (`vit`) or blocks (`ln-transformer`, `gpt`, `olmo`). Any
    may end in `-wW` for another width W, as `bn-mlp-30-w64`. `overrides` are keyword arguments of the net's function.
    Draws from torch's global random state. Raises ValueError for unknown names, depths or sizes that the
    architecture does not have, and overrides that the net does not take.
    """
    match = re.fullmatch(r"(?P<net>(?P<family>.+?)-(?P<number>\w+))(-w(?P<width>\d+))?", name)
    if match and match["net"] in MODELS and match["number"] != "N":
        factory, arguments = MODELS[match["net"]], ()
    elif match and match["number"].isdecimal() and f"{match['family']}-N" in MODELS:
        factory, arguments = MODELS[f"{match['family']}-N"], (int(match["number"]),)
    else:
        raise ValueError(
            f"unknown model {name!r}; choose one of {', '.join(MODELS)} with a number for N, if need be "
            "followed by -wW for width W, e.g. bn-mlp-30-w64"
        )
    if match["width"]:
        if "width" in overrides:
            raise ValueError(f"{name!r} sets the width: leave out width={overrides['width']}")
        overrides["width"] = int(match["width"])
    width = overrides.get("width", 1)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be a whole number, at least 1, got {width}")
    allowed = list(inspect.signature(factory).parameters)[2 + len(arguments) :]
    if unknown := sorted(set(overrides) - set(allowed)):
        raise ValueError(f"{name} takes no {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    of_text = f"{match['family']}-N" in TEXT_MODELS
    if of_text and len(in_shape) != 1:
        raise ValueError(f"{name} reads text: in_shape must be (context,), got {in_shape}")
    if min(in_shape) < 1 or (not of_text and (len(in_shape) != 3 or in_shape[1] != in_shape[2])):
        raise ValueError(f"in_shape must be (channels, side, side), got {in_shape}")
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    return factory(in_shape, classes, *arguments, **overrides)


def mlp(
    in_shape: Shape,
    classes: int,
    depth: int,
    *,
    width: int = 128,
    norm: Norm = "none",
    scale_invariant: bool = False,
) -> nn.Sequential:
    """`depth` linear layers, the head among them; each hidden one is followed by `norm` and ReLU."""
    if depth < 2:
        raise ValueError(f"an MLP has at least 2 layers, got {depth}")
    features = torch.Size(in_shape).numel()
    net = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    for index in range(1, depth):
        linear = nn.Linear(features, width, bias=False)
        net[f"layer{index}"] = _layer(linear, norm, scale_invariant)
        features = width
    net["head"] = _head(features, classes, scale_invariant)
    return nn.Sequential(net)


def conv_net(
    in_shape: Shape,
    classes: int,
    depth: int,
    *,
    width: int = 16,
    norm: Norm = "batch",
    scale_invariant: bool = False,
) -> nn.Sequential:
    """`depth` layers: 3×3 convolutions in four stages of 1, 2, 4 and 8 times `width` channels, and the head.

    The first stage is one layer, the others share the rest, the earlier ones the remainder. Max-pooling by 2
    follows the second and the third stage, over the whole image the fourth. `conv-5-w64` is the five-layer
    ConvNet of source B (after Nakkiran et al., "Deep Double Descent", 2020).
    """
    channels, side, _ = in_shape
    if depth < 5:
        raise ValueError(
            f"conv-N has a layer in each of its four stages and a head: N is at least 5, got {depth}"
        )
    if side < 4:
        raise ValueError(f"conv-N pools by 4: images need a side of at least 4, got {side}")
    net = OrderedDict[str, nn.Module]()
    layers = [1, *((depth - 2 + rest) // 3 for rest in (2, 1, 0))]
    for stage, count in enumerate(layers):
        for index in range(1, count + 1):
            out = width * 2**stage
            net[f"stage{stage + 1}_layer{index}"] = _conv(channels, out, 3, norm, scale_invariant)
            channels = out
        if stage > 0:
            net[f"stage{stage + 1}_pool"] = nn.MaxPool2d(2 if stage < 3 else side // 4)
    net["flatten"] = nn.Flatten()
    net["head"] = _head(channels, classes, scale_invariant)
    return nn.Sequential(net)


def cifar_net(
    in_shape: Shape,
    classes: int,
    depth: int,
    *,
    residual: bool,
    width: int = 16,
    norm: Norm = "batch",
    scale_invariant: bool = False,
) -> nn.Sequential:
    """The CIFAR nets of He et al. (2016), section 4.2, with shortcuts (`resnet-N`) or without (`plain-N`).

    A 3×3 stem, three stages of (depth − 2)/3 3×3 convolutions with 1, 2 and 4 times `width` channels, the
    first of the second and of the third stage with stride 2, global average pooling, the head. Shortcuts are
    option A, without parameters: every second pixel, new channels zero.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"plain-N and resnet-N at CIFAR size have N = 6n + 2 (8, 14, 20, …, 56, 110), got {depth}"
        )
    channels = width
    net = OrderedDict[str, nn.Module](stem=_conv(in_shape[0], channels, 3, norm, scale_invariant))
    for stage in range(3):
        for index in range(1, (depth - 2) // 6 + 1):
            out, stride = width * 2**stage, 2 if stage > 0 and index == 1 else 1
            branch = nn.Sequential(
                _conv(channels, out, 3, norm, scale_invariant, stride),
                _conv(out, out, 3, norm, scale_invariant, relu=not residual),
            )
            shortcut = PadShortcut(out - channels, stride) if stride > 1 else nn.Identity()
            net[f"stage{stage + 1}_block{index}"] = ResidualBlock(branch, shortcut) if residual else branch
            channels = out
    return _pool_and_head(net, channels, classes, scale_invariant)


def imagenet_resnet(
    in_shape: Shape,
    classes: int,
    *,
    blocks: tuple[int, int, int, int],
    bottleneck: bool,
    width: int = 64,
    norm: Norm = "batch",
    scale_invariant: bool = False,
) -> nn.Sequential:
    """The ResNets for ImageNet (He et al., 2016, table 1) with shortcuts of option B, 1×1 convolutions.

    Bottlenecks have their stride in the 3×3 convolution, as in torchvision ("v1.5"). Images of at most 64
    pixels a side get a 3×3 stem with stride 1, larger ones the 7×7 stem with stride 2 and max-pooling.
    """
    conv = partial(_conv, norm=norm, scale_invariant=scale_invariant)
    net = OrderedDict[str, nn.Module]()
    if in_shape[1] <= 64:
        net["stem"] = conv(in_shape[0], width, 3)
    else:
        net["stem"] = conv(in_shape[0], width, 7, stride=2)
        net["stem_pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    channels = width
    for stage, count in enumerate(blocks):
        for index in range(1, count + 1):
            inner, stride = width * 2**stage, 2 if stage > 0 and index == 1 else 1
            if bottleneck:
                out = 4 * inner
                branch = nn.Sequential(
                    conv(channels, inner, 1),
                    conv(inner, inner, 3, stride=stride),
                    conv(inner, out, 1, relu=False),
                )
            else:
                out = inner
                branch = nn.Sequential(conv(channels, out, 3, stride=stride), conv(out, out, 3, relu=False))
            same = stride == 1 and channels == out
            shortcut = nn.Identity() if same else conv(channels, out, 1, stride=stride, relu=False)
            net[f"stage{stage + 1}_block{index}"] = ResidualBlock(branch, shortcut)
            channels = out
    return _pool_and_head(net, channels, classes, scale_invariant)


def vgg_16(
    in_shape: Shape,
    classes: int,
    *,
    width: int = 64,
    norm: Norm = "batch",
    scale_invariant: bool = False,
) -> nn.Sequential:
    """The 13 convolutions of VGG-16 (Simonyan & Zisserman, 2015), global average pooling and one linear head.

    The head replaces the three linear layers of the original, as is usual on CIFAR.
    """
    channels, side, _ = in_shape
    if side < 32:
        raise ValueError(f"vgg-16-bn halves the image five times: it needs a side of at least 32, got {side}")
    net = OrderedDict[str, nn.Module]()
    for stage, (count, factor) in enumerate([(2, 1), (2, 2), (3, 4), (3, 8), (3, 8)], start=1):
        for index in range(1, count + 1):
            net[f"stage{stage}_layer{index}"] = _conv(channels, width * factor, 3, norm, scale_invariant)
            channels = width * factor
        net[f"stage{stage}_pool"] = nn.MaxPool2d(2)
    return _pool_and_head(net, channels, classes, scale_invariant)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., 2021): pre-LayerNorm blocks over square patches and a class token.

    Linear weights, positions and the class token are normal with standard deviation 0.02, the patch embedding
    is normal with variance 1/fan_in, biases are zero. `qk_norm` puts a LayerNorm over each head's queries and
    keys: in front of it their weights are scale-invariant, jointly with their biases, or, with `qk_bias=False`, on
    their own.
    """

    def __init__(
        self,
        in_shape: Shape,
        classes: int,
        patch: int,
        *,
        width: int,
        depth: int = 12,
        head_dim: int = 64,
        qk_norm: bool = False,
        qk_bias: bool = True,
    ) -> None:
        channels, side, _ = in_shape
        if patch < 1 or side % patch:
            raise ValueError(f"patches of side {patch} do not tile images of side {side}: choose a divisor")
        if width < 1 or width % head_dim:
            raise ValueError(f"width must be a multiple of head_dim {head_dim}, got {width}")
        if depth < 1:
            raise ValueError(f"a transformer has at least 1 block, got {depth}")
        super().__init__()
        self.patch_embedding = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, head_dim, qk_norm, qk_bias) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        nn.init.normal_(self.patch_embedding.weight, std=(channels * patch * patch) ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embedding(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.head(self.norm(self.blocks(tokens + self.position))[:, 0])


class TransformerBlock(nn.Module):
    """Attention, then a GELU MLP of four times the width; each behind a LayerNorm, with a shortcut around."""

    def __init__(self, width: int, head_dim: int, qk_norm: bool, qk_bias: bool = True) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, head_dim, qk_norm, qk_bias)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))


class Attention(nn.Module):
    """Multi-head self-attention; queries, keys and values each have a weight of their own."""

    def __init__(
        self,
        width: int,
        head_dim: int,
        qk_norm: bool,
        qk_bias: bool = True,
        *,
        bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.causal = causal
        self.query, self.key, self.value = (
            nn.Linear(width, width, bias=with_bias) for with_bias in (qk_bias, qk_bias, bias)
        )
        self.query_norm, self.key_norm = (
            nn.LayerNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.projection = nn.Linear(width, width, bias=bias)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            linear(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        query, key = self.query_norm(query), self.key_norm(key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.projection(mixed.transpose(1, 2).flatten(2))


def ln_transformer(
    in_shape: Shape,
    classes: int,
    depth: int,
    *,
    width: int = 128,
    head_dim: int = 32,
    qk_norm: bool = False,
    qk_bias: bool = True,
) -> VisionTransformer:
    """A small ViT of `depth` blocks with patches of an eighth of the side, but at least 2 pixels."""
    patch = max(2, in_shape[1] // 8)
    return VisionTransformer(
        in_shape,
        classes,
        patch,
        width=width,
        depth=depth,
        head_dim=head_dim,
        qk_norm=qk_norm,
        qk_bias=qk_bias,
    )


class GPT(nn.Module):
    """A decoder on characters with norms behind its layers and over each head's queries and keys, without biases.

    A block is attention and a ReLU MLP of four times the width. `norm_of` says what is normalized behind each of the
    two: "sum": x ← norm(x + layer(x)), as in Vaswani et al. (2017); then queries and keys are scale-invariant.
    "branch": x ← x + norm(layer(x)), as in OLMo 2 (2025), and a norm in front of the head; then all weights of the
    blocks are. Embeddings are standard normal, the other weights normal with variance 1/fan_in.
    """

    def __init__(
        self,
        in_shape: tuple[int],
        classes: int,
        depth: int,
        *,
        width: int = 96,
        head_dim: int = 32,
        norm_of: Literal["sum", "branch"] = "sum",
    ) -> None:
        if width < 1 or width % head_dim:
            raise ValueError(f"width must be a multiple of head_dim {head_dim}, got {width}")
        if depth < 1:
            raise ValueError(f"a transformer has at least 1 block, got {depth}")
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.position = nn.Parameter(torch.randn(*in_shape, width))
        self.blocks = nn.Sequential(*(GPTBlock(width, head_dim, norm_of) for _ in range(depth)))
        self.norm = nn.LayerNorm(width) if norm_of == "branch" else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        self.head = _head(width, classes, scale_invariant=False)

    def forward(self, characters: Tensor) -> Tensor:
        tokens = self.embedding(characters) + self.position
        return self.head(self.norm(self.blocks(tokens))).transpose(1, 2)


class GPTBlock(nn.Module):
    """A block of `GPT`."""

    def __init__(self, width: int, head_dim: int, norm_of: Literal["sum", "branch"]) -> None:
        super().__init__()
        self.of_sum = norm_of == "sum"
        self.attention = Attention(width, head_dim, qk_norm=True, qk_bias=False, bias=False, causal=True)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.ReLU(), nn.Linear(4 * width, width, bias=False)
        )
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer, norm in ((self.attention, self.attention_norm), (self.mlp, self.mlp_norm)):
            tokens = norm(tokens + layer(tokens)) if self.of_sum else tokens + norm(layer(tokens))
        return tokens


class ResidualBlock(nn.Module):
    """ReLU(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


class PadShortcut(nn.Module):
    """Option A of He et al. (2016): every `stride`-th pixel, and `new_channels` zero channels at the end."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def _conv(
    channels: int,
    out: int,
    kernel: int,
    norm: Norm,
    scale_invariant: bool,
    stride: int = 1,
    relu: bool = True,
) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return _layer(conv, norm, scale_invariant, relu)


def _layer(
    weight: nn.Linear | nn.Conv2d, norm: Norm, scale_invariant: bool, relu: bool = True
) -> nn.Sequential:
    """Weight, normalization (a "layer" norm of images is over channels and pixels), ReLU."""
    channels = weight.weight.shape[0]
    linear = isinstance(weight, nn.Linear)
    nn.init.kaiming_normal_(weight.weight, nonlinearity="relu")
    layer = OrderedDict[str, nn.Module]({"linear" if linear else "conv": weight})
    if norm == "batch":
        layer["norm"] = (nn.BatchNorm1d if linear else nn.BatchNorm2d)(channels, affine=not scale_invariant)
    elif norm == "layer":
        layer["norm"] = (
            nn.LayerNorm(channels, elementwise_affine=not scale_invariant)
            if linear
            else nn.GroupNorm(1, channels, affine=not scale_invariant)
        )
    elif norm != "none":
        raise ValueError(f"norm must be 'batch', 'layer' or 'none', got {norm!r}")
    elif scale_invariant:
        raise ValueError("scale_invariant=True needs normalization: choose norm 'batch' or 'layer'")
    if relu:
        layer["relu"] = nn.ReLU()
    return nn.Sequential(layer)


def _pool_and_head(
    net: OrderedDict[str, nn.Module], channels: int, classes: int, scale_invariant: bool
) -> nn.Sequential:
    net["pool"] = nn.AdaptiveAvgPool2d(1)
    net["flatten"] = nn.Flatten()
    net["head"] = _head(channels, classes, scale_invariant)
    return nn.Sequential(net)


def _head(features: int, classes: int, scale_invariant: bool) -> nn.Linear:
    """The classifier; in a scale-invariant net frozen, without bias, at `FROZEN_HEAD_NORM`."""
    head = nn.Linear(features, classes, bias=not scale_invariant)
    nn.init.normal_(head.weight, std=features**-0.5)
    if scale_invariant:
        head.weight.requires_grad_(False)
        head.weight.mul_(FROZEN_HEAD_NORM / head.weight.norm())
    else:
        nn.init.zeros_(head.bias)
    return head


# Functions (in_shape, classes[, N], …), by the pattern of the names that `build` knows them by.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp-N": mlp,
    "bn-mlp-N": partial(mlp, norm="batch"),
    "ln-mlp-N": partial(mlp, norm="layer"),
    "conv-N": conv_net,
    "plain-N": partial(cifar_net, residual=False),
    "resnet-N": partial(cifar_net, residual=True),
    "resnet-18": partial(imagenet_resnet, blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet-34": partial(imagenet_resnet, blocks=(3, 4, 6, 3), bottleneck=False),
    "resnet-50": partial(imagenet_resnet, blocks=(3, 4, 6, 3), bottleneck=True),
    "vgg-16-bn": vgg_16,
    "vit-s-N": partial(VisionTransformer, width=384),
    "vit-b-N": partial(VisionTransformer, width=768),
    "ln-transformer-N": ln_transformer,
    "gpt-N": GPT,
    "olmo-N": partial(GPT, norm_of="branch"),
}
TEXT_MODELS = ("gpt-N", "olmo-N")
