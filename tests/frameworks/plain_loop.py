"""What the tests compare frameworks with: the plain torch loop, and the angle between two weights in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Weights = dict[str, Tensor]


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    after: Callable[[int, Weights], object] = lambda step, before: None,
) -> None:
    """Cross-entropy on each batch. `after` gets the number of the step and the parameters from before it."""
    net.train()
    for step, (inputs, labels) in enumerate(batches):
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer.step()
        after(step, before)


def cycle(inputs: Tensor, labels: Tensor, steps: int, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Batches of neighbours, from the front again and again."""
    chosen = [torch.arange(size * i, size * (i + 1)) % len(inputs) for i in range(steps)]
    return [(inputs[i], labels[i]) for i in chosen]


def data() -> tuple[Tensor, Tensor]:
    """Inputs [512, 8] and labels of four classes, as the examples draw them from seed 0."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 8)
    return inputs, inputs[:, :4].argmax(1)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """All parameters and buffers to the bit, by their order."""
    ours, theirs = a.state_dict().values(), b.state_dict().values()
    assert len(ours) == len(theirs)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def angle(before: Tensor, after: Tensor) -> float:
    """∠(before, after) in radians, in float64."""
    a, b = (x.detach().double().flatten().numpy() for x in (before, after))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b)))


def records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a Recorder's file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def steps(path: str | Path) -> list[int]:
    return [record["step"] for record in records(path)]
