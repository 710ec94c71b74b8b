"""Other ways to start: warm-ups that the study compares with ELRSGD's, as hooks on `torch.optim.SGD`.

Each gets the optimizer and the tracked weights, and acts between backward and step. They read values back to the host
and are written for clarity; what wins is built into `elropt.rules`.
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

SPREADS = (1e-4, 1e-2, 1.0, 1e2, 1e4)  # that the study of spreads imposes
Critical = Callable[[np.ndarray], np.ndarray]


def capped(optimizer: Optimizer, weights: list[Tensor], critical: Critical) -> None:
    """lr = min(lr, critical learning rate) for all parameters until the cap no longer binds (docs/theory.md §4).

    Of momentum the cap takes the gain 1/(1-μ) of a single gradient in the long run (§6).
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


def equalized(optimizer: Optimizer, weights: list[Tensor], steps: int) -> None:
    """At each of the first `steps` steps rescale the weights so that all E are equal, as `elropt.equalize_` does."""
    count = 0

    @torch.no_grad()
    def before(*_: object) -> None:
        nonlocal count
        if count == steps:
            return
        log_e = log_relative_grads(weights)
        for w, a in zip(weights, ((log_e - log_e.mean()) / 2).exp(), strict=True):
            rescale(optimizer, w, a)
        count += 1

    optimizer.register_step_pre_hook(before)


def released(optimizer: Optimizer, weights: list[Tensor], steps: int, fade: bool) -> None:
    """Gradient factors Ē/E as under rule="uniform" for `steps` steps; with `fade` they go to 1 as a power does."""
    count = 0

    @torch.no_grad()
    def before(*_: object) -> None:
        nonlocal count
        if count == steps:
            return
        log_e = log_relative_grads(weights)
        share = 1 - count / steps if fade else 1.0
        for w, s in zip(weights, ((log_e.mean() - log_e) * share).exp(), strict=True):
            gradient(w).mul_(s)
        count += 1

    optimizer.register_step_pre_hook(before)


def imposed(optimizer: Optimizer, weights: list[Tensor], spread: float) -> None:
    """Rescale the weights once, at the first step, so that E falls geometrically from the first layer to the last, by
    `spread` in all (below 1: rises). The function is the same for every spread: only the ELRs differ."""
    done = False

    @torch.no_grad()
    def before(*_: object) -> None:
        nonlocal done
        if done:
            return
        log_e = log_relative_grads(weights)
        target = log_e.mean() + math.log(spread) * torch.linspace(0.5, -0.5, len(weights))
        for w, a in zip(weights, ((log_e - target) / 2).exp(), strict=True):
            rescale(optimizer, w, a)
        done = True

    optimizer.register_step_pre_hook(before)


def rescale(optimizer: Optimizer, w: Tensor, a: Tensor) -> None:
    """w ← a·w with all that depends on it: for a scale-invariant weight the function stays, E changes by 1/a²."""
    w.mul_(a)
    gradient(w).div_(a)
    if "momentum_buffer" in optimizer.state[w]:
        optimizer.state[w]["momentum_buffer"].div_(a)


def gradient(w: Tensor) -> Tensor:
    """The gradient of a weight that has one."""
    if w.grad is None:
        raise RuntimeError(
            "a tracked weight has no gradient: the warm-ups compared here need one at every step"
        )
    return w.grad


@torch.no_grad()
def log_relative_grads(weights: list[Tensor]) -> Tensor:
    """log E of each weight, [L], on the CPU."""
    return torch.stack([gradient(w).norm() / w.norm() for w in weights]).log().cpu()


WARMUPS: dict[str, Callable[[Optimizer, list[Tensor]], None]] = {
    "monotone": partial(capped, critical=dynamics.monotone_lr),
    "balance": partial(capped, critical=dynamics.balance_lr),
    "equalize": partial(equalized, steps=1),
    "equalize-20": partial(equalized, steps=20),
    **{f"spread {spread:g}": partial(imposed, spread=spread) for spread in SPREADS},
    "fading-100": partial(released, steps=100, fade=True),
}
