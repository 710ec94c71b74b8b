"""Weights with random gradients that are orthogonal to them, as those of scale-invariant weights are."""

import torch
from torch import nn

from elropt import ELRSGD

SHAPES = ((7, 3), (5, 2, 3, 3), (4, 7))
GRAD_SCALES = (30.0, 1.0, 0.1)


def weights(
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    *,
    scales: tuple[float, ...] = GRAD_SCALES,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Random weights whose gradients are orthogonal to them, index by index of dimension 0."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape, scale in zip(shapes, scales, strict=True):
        w = torch.randn(shape, generator=generator, dtype=torch.float64)
        params.append(nn.Parameter(w.to(dtype)))
        set_gradient(params[-1], scale, generator)
    return params


def set_gradient(p: nn.Parameter, scale: float, generator: torch.Generator) -> None:
    """A random gradient of about that size per entry, orthogonal to the weight index by index of dimension 0."""
    w = p.detach().double().flatten(1)
    g = scale * torch.randn(w.shape, generator=generator, dtype=torch.float64)
    g -= w * ((w * g).sum(1) / (w * w).sum(1))[:, None]
    p.grad = g.view_as(p).to(p.dtype)


def tracked_group(params: list[nn.Parameter], **options: object) -> list[dict[str, object]]:
    """One group, all of it tracked."""
    return [{"params": params, "scale_invariant": True, **options}]


def named(params: list[nn.Parameter]) -> list[dict[str, object]]:
    """One group, all of it tracked, with the names a, b, c."""
    return [{"params": [(str(s), p) for s, p in zip("abc", params, strict=True)], "scale_invariant": True}]


def train(optimizer: ELRSGD, params: list[nn.Parameter], steps: int) -> None:
    """Steps with the gradients that a function of w/‖w‖ would have: the longer w, the smaller."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p, scale in zip(params, GRAD_SCALES, strict=True):
            set_gradient(p, scale / float(p.detach().norm()), generator)
        optimizer.step()
