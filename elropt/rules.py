"""decide: from the sums over each layer to the factors of its update.

Vectors in, vectors out. Nothing here sees a weight tensor or reads a value back to the host, so every branch
on a measured value is a `torch.where`. A *row* is what one norm is taken over: a tensor, or with
granularity "filter" one index of its dimension 0. Derivations: docs/theory.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args, Literal

import torch
from torch import Tensor

Rule = Literal["warmup", "uniform", "angle", "sphere"]
Granularity = Literal["layer", "network", "filter"]
RULES: tuple[str | None, ...] = (None, *get_args(Rule))
GRANULARITIES: dict[str | None, tuple[str, ...]] = {
    None: ("layer",),
    "warmup": ("layer",),
    "uniform": ("layer", "filter"),
    "angle": ("layer", "network", "filter"),
    "sphere": ("layer", "network", "filter"),
}

SMOOTHING = 0.9
RADIAL_TESTS = 8


class LayerStats(NamedTuple):
    """Sums over each row, [R] float32: ‖w‖², ‖g‖², ⟨w,g⟩, ⟨w,m⟩."""

    weight_sq: Tensor
    grad_sq: Tensor
    weight_dot_grad: Tensor
    weight_dot_momentum: Tensor


class LayerControls(NamedTuple):
    """What the update applies to each row, [R] float32; None stands for the identity."""

    lr_factor: Tensor | None = None  # 0-dim, for every parameter: λ = lr · lr_factor
    grad_factor: Tensor | None = None  # s
    weight_factor: Tensor | None = None  # a
    radial: Tensor | None = None  # p


class RuleState(NamedTuple):
    """What a rule remembers from step to step, float32. Zero means "not yet seen"."""

    sphere_grad_norm: Tensor  # [R] c = ‖g‖·‖w‖, smoothed over steps
    radius: Tensor  # [R] ‖w‖ when it was first seen
    tracked: Tensor  # [R] radial-cosine tests passed so far, up to RADIAL_TESTS; -1 once one has failed
    handed_over: Tensor  # 0-dim: 1 once the warm-up has ended


class Hyper(NamedTuple):
    """The param-group values that a rule needs, [R] float32."""

    lr: Tensor
    weight_decay: Tensor
    momentum_gain: Tensor  # (1-d)/(1-μ): what a constant gradient is multiplied by in the long run
    update_per_grad: Tensor  # ∂u/∂g̃
    update_per_momentum: Tensor  # ∂u/∂m, m the buffer before the step
    numel: Tensor


def decide(
    rule: str | None,
    stats: LayerStats,
    state: RuleState,
    hyper: Hyper,
    *,
    granularity: str = "layer",
    project: bool = False,
) -> tuple[LayerControls, RuleState]:
    """The factors of this step and the state after it.

    Rows that cannot be judged (not tracked, ‖w‖ or ‖g‖ zero or not finite) get the factors of plain SGD and
    have no influence on the others.
    """
    tracked = radial_test(stats, state.tracked, hyper.numel)
    has_direction = (tracked > 0) & torch.isfinite(stats.weight_sq) & (stats.weight_sq > 0)
    moves = has_direction & torch.isfinite(stats.grad_sq) & (stats.grad_sq > 0)
    weight_norm, grad_norm = stats.weight_sq.sqrt(), stats.grad_sq.sqrt()
    radius = torch.where((state.radius == 0) & has_direction, weight_norm, state.radius)
    c = torch.where(moves, smooth(state.sphere_grad_norm, weight_norm * grad_norm), state.sphere_grad_norm)
    log_relative_grad = torch.where(moves, c.log() - stats.weight_sq.log(), 0.0)
    handed_over = state.handed_over
    lr_factor = s = a = p = None

    if rule == "warmup":
        lr_factor, handed_over = warmup_factor(
            log_relative_grad + (hyper.lr * hyper.momentum_gain).log(), moves, handed_over
        )
    elif rule == "uniform":
        s = uniform_factor(log_relative_grad, moves)
    elif rule in ("angle", "sphere"):
        if granularity == "network":
            weight_norm, grad_norm, radius_now = (
                torch.where(mask, norm, 0.0).square().sum().sqrt().expand_as(norm)
                for norm, mask in ((weight_norm, has_direction), (grad_norm, moves), (radius, has_direction))
            )
        else:
            radius_now = radius
        a = torch.where(has_direction, radius_now / weight_norm, 1.0)
        s = torch.where(moves, radius_now / grad_norm if rule == "angle" else radius_now * weight_norm, 1.0)

    if project:
        p = radial_coefficient(stats, hyper, s, a)
        p = torch.where(has_direction & torch.isfinite(p), p, 0.0)
    return LayerControls(lr_factor, s, a, p), RuleState(c, radius, tracked, handed_over)


def radial_test(stats: LayerStats, passed: Tensor, numel: Tensor) -> Tensor:
    """Count the steps at which ⟨w,g⟩ was zero to rounding, as it is for a scale-invariant weight (Euler).

    The cosine of two unrelated vectors of n entries is of order 1/√n; rounding, also of half precision,
    averages out over the entries and stays far below that. So a row passes with |cos| < 0.05/√n + 1e-4 (the
    constant allows for the ε of the normalization); it is tracked while it has passed every one of its first
    RADIAL_TESTS steps, which an unrelated gradient does with a probability below 1e-10.
    """
    cosine = stats.weight_dot_grad / (stats.weight_sq * stats.grad_sq).sqrt()
    zero = cosine.abs() < 0.05 / numel.sqrt() + 1e-4
    testing = torch.isfinite(cosine) & (passed >= 0) & (passed < RADIAL_TESTS)
    return torch.where(testing, torch.where(zero, passed + 1, -1.0), passed)


def smooth(average: Tensor, value: Tensor) -> Tensor:
    """Exponential moving average that starts at the first value."""
    return torch.where(average == 0, value, torch.lerp(value, average, SMOOTHING))


def warmup_factor(log_elr: Tensor, ok: Tensor, handed_over: Tensor) -> tuple[Tensor, Tensor]:
    """Cap of the learning rate at the critical one, as a factor ≤ 1 (0-dim), and the latch.

    Args:
        log_elr: log λE of each row, [R].
        ok: rows that count, [R] bool.
        handed_over: 1 if the warm-up has ended, 0-dim.
    """
    log_critical = balance(log_elr, ok)
    binding = ok.any() & (log_critical < 0) & (handed_over == 0)
    ended = torch.where(ok.any() & ~binding, 1.0, handed_over)
    return torch.where(binding, log_critical.exp(), 1.0), ended


def balance(log_elr: Tensor, ok: Tensor) -> Tensor:
    """log of the factor 1/√(λE_max · λE_min): the largest and the smallest swap places."""
    high = torch.where(ok, log_elr, -math.inf).amax()
    low = torch.where(ok, log_elr, math.inf).amin()
    return -(high + low) / 2


def monotone(log_elr: Tensor, ok: Tensor) -> Tensor:
    """log of the factor 1/√(λE_(1) · λE_(2)) of the two largest: the largest at which no pair swaps."""
    top = torch.where(ok, log_elr, -math.inf).topk(min(2, log_elr.numel())).values
    return -(top[0] + torch.where(torch.isfinite(top[-1]), top[-1], top[0])) / 2


def uniform_factor(log_relative_grad: Tensor, ok: Tensor) -> Tensor:
    """s = Ē/E with Ē the geometric mean over the rows that count; 1 elsewhere."""
    log_mean = torch.where(ok, log_relative_grad, 0.0).sum() / ok.sum().clamp(min=1)
    return torch.where(ok, (log_mean - log_relative_grad).exp(), 1.0)


def radial_coefficient(stats: LayerStats, hyper: Hyper, s: Tensor | None, a: Tensor | None) -> Tensor:
    """p = ⟨ŵ,u⟩/‖ŵ‖², from the sums alone: u is linear in g, m and ŵ = a·w.  Derived, docs/theory.md §9."""
    s = torch.ones_like(stats.weight_sq) if s is None else s
    a = torch.ones_like(stats.weight_sq) if a is None else a
    radial_grad = s * stats.weight_dot_grad / (a * stats.weight_sq) + hyper.weight_decay
    radial_momentum = stats.weight_dot_momentum / (a * stats.weight_sq)
    return hyper.update_per_grad * radial_grad + hyper.update_per_momentum * radial_momentum
