"""Small training runs that several test files share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F


def bn_mlp(
    depth: int = 4, width: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Sequential:
    """Linear → BatchNorm → ReLU, `depth` times, and a linear head on 8 features and 4 classes."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(8 if i == 0 else width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4)).to(dtype)


def invariant_weights(net: nn.Sequential) -> list[nn.Parameter]:
    """The weights in front of a BatchNorm."""
    return [a.weight for a, b in zip(net, list(net)[1:], strict=False) if isinstance(b, nn.BatchNorm1d)]


def backward(net: nn.Module, step: int, scale: float = 1.0) -> torch.Tensor:
    """Gradients of the cross-entropy on the batch of that step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 8, generator=generator)
    y = x[:, :4].argmax(1)
    net.zero_grad()
    parameter = next(net.parameters())
    loss = F.cross_entropy(net(x.to(parameter)).float(), y.to(parameter.device)) * scale
    loss.backward()
    return loss.detach()


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after: Callable[[], object] = lambda: None
) -> None:
    for step in steps:
        backward(net, step)
        optimizer.step()
        after()
