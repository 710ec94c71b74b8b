"""Other ways to start: warm-ups that the study compares with ELRSGD's, as hooks on `torch.optim.SGD`.

Each gets the optimizer and the tracked weights, and acts between backward and step. They are written for clarity, not
for speed: they read values back to the host. The one that won is built into `elropt.rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from elropt import dynamics

SPREADS = (1e-4, 1e-2, 1e2, 1e4)  # that the study of spreads imposes, besides 1
Critical = Callable[[np.ndarray], np.ndarray]


def capped(optimizer: Optimizer, weights: list[Tensor], critical: Critical) -> None:
    """lr = min(lr, critical learning rate) for all parameters until the cap no longer binds (docs/theory.md §4).

    With momentum μ the cap is (1 - μ) times as large: in the long run a single gradient counts 1/(1 - μ) times (§6).
    """

    def before(*_: object) -> None:
        nonlocal over
        if over:
            return
        group = optimizer.param_groups[0]
        cap = float(critical(log_relative_grads(weights).exp().numpy())) * (1 - group["momentum"])
        if group["lr"] <= cap:
            over = True
        else:
            restored[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= cap / restored[0]

    def after(*_: object) -> None:
        for group, lr in zip(optimizer.param_groups, restored, strict=False):
            group["lr"] = lr
        restored.clear()

    over, restored = False, list[float]()
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def faded(optimizer: Optimizer, weights: list[Tensor], steps: int) -> None:
    """Gradient factors (Ē/E)^p, as under rule="uniform" with p = 1, where p falls from 1 to 0 within `steps` steps."""
    count = 0

    @torch.no_grad()
    def before(*_: object) -> None:
        nonlocal count
        if count == steps:
            return
        log_e = log_relative_grads(weights)
        for w, s in zip(weights, ((log_e.mean() - log_e) * (1 - count / steps)).exp(), strict=True):
            gradient(w).mul_(s)
        count += 1

    optimizer.register_step_pre_hook(before)


def imposed(optimizer: Optimizer, weights: list[Tensor], spread: float) -> None:
    """Rescale the weights once, at the first step: then E of the first layer is `spread` times E of the last, and E is
    geometric between them. With spread 1 all E are equal, as after `elropt.equalize_`. The network's function is the
    same for every spread; only the ELRs differ."""
    done = False

    @torch.no_grad()
    def before(*_: object) -> None:
        nonlocal done
        if done:
            return
        log_e = log_relative_grads(weights)
        target = log_e.mean() + math.log(spread) * torch.linspace(0.5, -0.5, len(weights))
        for w, a in zip(weights, ((log_e - target) / 2).exp(), strict=True):
            w.mul_(a)
            gradient(w).div_(a)
        done = True

    optimizer.register_step_pre_hook(before)


def gradient(w: Tensor) -> Tensor:
    """The gradient of a weight that has one."""
    if w.grad is None:
        raise RuntimeError(
            "a tracked weight has no gradient: the studies' warm-ups and measurements need one at every step"
        )
    return w.grad


@torch.no_grad()
def log_relative_grads(weights: list[Tensor]) -> Tensor:
    """log E of each weight, [L], on the CPU."""
    return torch.stack([gradient(w).norm() / w.norm() for w in weights]).log().cpu()


WARMUPS: dict[str, Callable[[Optimizer, list[Tensor]], None]] = {
    "monotone": partial(capped, critical=dynamics.monotone_lr),
    "balance": partial(capped, critical=dynamics.balance_lr),
    "equalize": partial(imposed, spread=1.0),
    **{f"spread {spread:g}": partial(imposed, spread=spread) for spread in SPREADS},
    "fading-100": partial(faded, steps=100),
}
