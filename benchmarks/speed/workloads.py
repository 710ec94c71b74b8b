"""Lists of tensors to step on: those of real networks, by shape, without the networks.

    workload = WORKLOADS["resnet-50"]()
    params = workload.make(torch.device("cuda"))

| name | tensors | parameters | tracked by ELRSGD |
|---|---:|---:|---|
| `resnet-56` | 167 | 0.85 M | the convolutions: a BatchNorm follows each |
| `resnet-50` | 161 | 25.6 M | the convolutions |
| `vit-b-16` | 152 | 86.6 M | every tensor of two or more dimensions |
| `decoder-1b`, `decoder-1b-bf16` | 201 | 1.1 B | every tensor of two dimensions |
| `2000-tensors` | 2,000 | 1.2 M | all; 4 … 4,096 elements, evenly in the logarithm |
| `160x4`, `2000x4` | 160, 2,000 | | all; 4 elements each: what a step costs the host |
| `tiny` | 6 | | the convolutions; to try the benchmarks without a GPU |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import models

WEIGHT_STD = 0.02
RELATIVE_GRADS = (1e-6, 1e-4)  # range of ‖g‖/‖w‖: thousands of steps hardly turn a weight


Shapes = dict[str, tuple[int, ...]]  # of tensors by name


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tensors of a network in the order of its parameters."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    tracked: tuple[bool, ...]
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        """Parameters in all tensors together."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def footprint(self) -> int:
        """Bytes of weights, gradients and momentum buffers."""
        return 3 * self.elements * self.dtype.itemsize

    def make(self, device: torch.device, seed: int = 0) -> list[Tensor]:
        """Random weights with gradients, each an allocation of its own.

        Gradients are orthogonal to their weight at every index of dimension 0, as in front of a BatchNorm, and differ
        in ‖g‖/‖w‖ by decades. That of the smallest tracked tensor is zero: a layer that cannot be judged keeps
        ELRSGD's "warmup" from handing over, however long it is measured.
        """
        generator = torch.Generator(device).manual_seed(seed)
        spread = np.random.default_rng(seed).permutation(np.geomspace(*RELATIVE_GRADS, len(self.shapes)))
        tracked = [i for i, tracked in enumerate(self.tracked) if tracked]
        still = min(tracked, key=lambda i: math.prod(self.shapes[i])) if len(tracked) > 1 else None
        params = []
        for index, shape in enumerate(self.shapes):
            w = WEIGHT_STD * torch.randn(shape, generator=generator, device=device)
            g = torch.zeros_like(w)
            if index != still:
                g.normal_(generator=generator)
                rows, row_grads = w.view(shape[0], -1), g.view(shape[0], -1)
                if rows.shape[1] > 1:
                    along = (rows * row_grads).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True)
                    row_grads -= along * rows
                g *= WEIGHT_STD * spread[index]
            p = torch.nn.Parameter(w.to(self.dtype))
            p.grad = g.to(self.dtype)
            params.append(p)
        return params


def param_groups(params: Sequence[Tensor], tracked: Sequence[bool]) -> list[dict[str, object]]:
    """Param groups for ELRSGD that say which tensors are scale-invariant."""
    groups = {
        flag: [p for p, is_tracked in zip(params, tracked, strict=True) if is_tracked == flag]
        for flag in (True, False)
    }
    return [{"params": members, "scale_invariant": flag} for flag, members in groups.items() if members]


def clone(params: list[Tensor]) -> list[Tensor]:
    """A copy of weights and gradients in memory of its own."""
    copies = []
    for p in params:
        copy = torch.nn.Parameter(p.detach().clone())
        copy.grad = None if p.grad is None else p.grad.clone()
        copies.append(copy)
    return copies


def of_model(name: str, model: str, side: int, classes: int) -> Workload:
    """A net of `benchmarks.common.models` whose convolutions are all followed by a BatchNorm."""
    with torch.device("meta"):
        net = models.build(model, in_shape=(3, side, side), classes=classes)
    shapes = [tuple(p.shape) for p in net.parameters()]
    return workload_of(name, shapes, tracked=lambda shape: len(shape) == 4)


def vit_b_16() -> Workload:
    """ViT-B/16 for 224 × 224 pixels and 1,000 classes; queries, keys and values share one weight, as in torchvision."""
    d, hidden = 768, 3072
    first = {"class_token": (1, 1, d), "conv_proj.weight": (d, 3, 16, 16), "conv_proj.bias": (d,)}
    first["pos_embedding"] = (1, 197, d)
    block = {
        "ln_1.weight": (d,),
        "ln_1.bias": (d,),
        "attention.in_proj.weight": (3 * d, d),
        "attention.in_proj.bias": (3 * d,),
        "attention.out_proj.weight": (d, d),
        "attention.out_proj.bias": (d,),
        "ln_2.weight": (d,),
        "ln_2.bias": (d,),
        "mlp.0.weight": (hidden, d),
        "mlp.0.bias": (hidden,),
        "mlp.3.weight": (d, hidden),
        "mlp.3.bias": (d,),
    }
    last = {"ln.weight": (d,), "ln.bias": (d,), "head.weight": (1000, d), "head.bias": (1000,)}
    return in_blocks("vit-b-16", first, block, 12, last)


def decoder_1b(dtype: torch.dtype = torch.float32) -> Workload:
    """A decoder with TinyLlama-1.1B's sizes: 22 blocks of width 2,048, 32 heads of which 4 for keys and values, SwiGLU
    of width 5,632, 32,000 tokens, the head not tied to the embedding, RMSNorm and no biases."""
    d, kv, hidden, vocabulary = 2048, 256, 5632, 32000
    block = {
        "query": (d, d),
        "key": (kv, d),
        "value": (kv, d),
        "projection": (d, d),
        "gate": (hidden, d),
        "up": (hidden, d),
        "down": (d, hidden),
        "attention_norm": (d,),
        "mlp_norm": (d,),
    }
    name = "decoder-1b-bf16" if dtype == torch.bfloat16 else "decoder-1b"
    first, last = {"embedding": (vocabulary, d)}, {"norm": (d,), "head": (vocabulary, d)}
    return in_blocks(name, first, block, 22, last, dtype)


def in_blocks(
    name: str, first: Shapes, block: Shapes, blocks: int, last: Shapes, dtype: torch.dtype = torch.float32
) -> Workload:
    """A net of alike blocks, with every tensor of two or more dimensions tracked."""
    shapes = [*first.values(), *(blocks * [*block.values()]), *last.values()]
    return workload_of(name, shapes, tracked=lambda shape: len(shape) > 1, dtype=dtype)


def many(name: str, sizes: Iterable[int]) -> Workload:
    """Matrices of one row, all tracked."""
    return workload_of(name, [(1, size) for size in sizes], tracked=lambda shape: True)


def workload_of(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    *,
    tracked: Callable[[tuple[int, ...]], bool],
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """A workload of shapes, and whether tensors of a shape are tracked."""
    return Workload(name, tuple(shapes), tuple(map(tracked, shapes)), dtype)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "resnet-56": lambda: of_model("resnet-56", "resnet-56", 32, 10),
    "resnet-50": lambda: of_model("resnet-50", "resnet-50", 224, 1000),
    "vit-b-16": vit_b_16,
    "decoder-1b": decoder_1b,
    "decoder-1b-bf16": lambda: decoder_1b(torch.bfloat16),
    "2000-tensors": lambda: many("2000-tensors", np.geomspace(4, 4096, 2000).round().astype(int).tolist()),
    "160x4": lambda: many("160x4", [4] * 160),
    "2000x4": lambda: many("2000x4", [4] * 2000),
    "tiny": lambda: Workload(
        "tiny",
        ((8, 3, 3, 3), (8,), (8,), (5, 8, 3, 3), (10, 5), (10,)),
        (True, False, False, True, False, False),
    ),
}
NETWORKS = ("resnet-56", "resnet-50", "vit-b-16", "decoder-1b", "decoder-1b-bf16", "2000-tensors")
