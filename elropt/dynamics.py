"""The model behind the rules: how E = ‖g‖/‖w‖ of L scale-invariant layers evolves under SGD.

A scale-invariant layer has ⟨w,g⟩ = 0 and ‖g‖ ∝ 1/‖w‖. The model adds that c = ‖g‖·‖w‖ does not change, so
that E = c/‖w‖² alone describes a layer. NumPy only and in float64; layers are the last axis. Elsewhere in elropt E is
called `relative_grad`. Its unit is 1/lr, so lr·E is an angle. Derivations: docs/theory.md.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "adamw_equilibrium_angle",
    "balance_lr",
    "critical_lr",
    "elr_spread",
    "equilibrium_angle",
    "equilibrium_relative_grad",
    "lion_equilibrium_angle",
    "monotone_lr",
    "muon_equilibrium_angle",
    "one_step",
    "simulate",
    "small_step",
]

Array: TypeAlias = NDArray[np.float64]
# E [L] → learning rate, or (learning rate, factor on the gradient)
ModelRule: TypeAlias = Callable[[Array], ArrayLike | tuple[ArrayLike, ArrayLike]]
Gradients: TypeAlias = Literal["aligned", "independent"]


def one_step(E: ArrayLike, lr: ArrayLike) -> Array:
    """E after one step of plain SGD: E/(1 + (lr·E)²).

    Args:
        E: relative gradients, positive, any shape.
        lr: learning rates ≥ 0, broadcast against E.

    Raises:
        ValueError: E not positive and finite, or lr negative or not finite.

    Source: derived, docs/theory.md §2.
    """
    E = _positive("E", E)
    return E / (1 + (_non_negative("lr", lr) * E) ** 2)


def critical_lr(E_i: ArrayLike, E_j: ArrayLike) -> Array:
    """The learning rate at which one step of plain SGD makes two layers equal: 1/√(E_i·E_j).

    Below it the layer with the larger E keeps it, above it the two change places.

    Args:
        E_i: relative gradients, positive.
        E_j: the same of the other layers, broadcast against `E_i`.

    Raises:
        ValueError: E_i or E_j not positive and finite.

    Source: derived, docs/theory.md §3.
    """
    return 1 / (np.sqrt(_positive("E_i", E_i)) * np.sqrt(_positive("E_j", E_j)))


def balance_lr(E: ArrayLike) -> Array:
    """The critical learning rate of the largest and the smallest E: 1/√(E_max·E_min).

    One step with it takes a spread R to at most cosh(½·ln R), whatever the layers in between; no other
    learning rate guarantees less.

    Args:
        E: relative gradients, positive, [..., L] with L ≥ 1 (for one layer it is 1/E).

    Returns:
        [...]

    Raises:
        ValueError: E not positive and finite, or no layers.

    Source: derived, docs/theory.md §4.
    """
    E = _layers(E, at_least=1)
    return critical_lr(E.max(axis=-1), E.min(axis=-1))


def monotone_lr(E: ArrayLike) -> Array:
    """The critical learning rate of the two largest E: 1/√(E_(1)·E_(2)).

    No pair of layers changes places in one step with it, and with any larger one the two largest do, if they
    differ. It takes a spread R to at most cosh(ln R) = (R + 1/R)/2.

    Args:
        E: relative gradients, positive, [..., L] with L ≥ 2. Equal values count separately.

    Returns:
        [...]

    Raises:
        ValueError: E not positive and finite, or fewer than two layers.

    Source: derived, docs/theory.md §4.
    """
    largest = np.partition(_layers(E, at_least=2), -2, axis=-1)
    return critical_lr(largest[..., -1], largest[..., -2])


def elr_spread(E: ArrayLike) -> Array:
    """max E / min E over the layers; 1 where all are equal.

    Args:
        E: relative gradients or effective learning rates, positive, [..., L] with L ≥ 1.

    Returns:
        [...]

    Raises:
        ValueError: E not positive and finite, or no layers.
    """
    E = _layers(E, at_least=1)
    return E.max(axis=-1) / E.min(axis=-1)


def simulate(
    E0: ArrayLike,
    lr: ArrayLike | ModelRule,
    steps: int,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    gradients: Gradients = "aligned",
) -> Array:
    """E of every layer over `steps` steps of SGD, updating in the order of `torch.optim.SGD`.

    Per layer m ← μ·m + s·g + ω·w, then w ← w − lr·m, with m = 0 before the first step. Without momentum and
    weight decay every step is `one_step`. The radial and the tangential part of m are tracked exactly. Momentum needs
    one more assumption: how the gradients of successive steps are directed.

    - "aligned": each gradient points along the tangential part of m. Exact for layers that keep turning in
      one plane, such as f(w) = c·atan2(w₂, w₁).
    - "independent": each gradient is orthogonal to m, as random ones are in expectation and, in many
      dimensions, up to small fluctuations.

    Args:
        E0: relative gradients before the first step, positive, [L] (a number counts as one layer).
        lr: learning rate ≥ 0, as a number, as a schedule [steps], or as a rule, called with E [L] before each
            step. A rule returns the learning rate, or the tuple (learning rate, s) with s ≥ 0 the factor on
            the gradient; each is a number or [L]. s scales the gradient alone, lr the weight decay too.
        steps: number of steps ≥ 0.
        momentum: μ, 0 ≤ μ < 1 (heavy ball, no dampening).
        weight_decay: ω ≥ 0, added to the gradient (L2).
        gradients: "aligned" or "independent"; they differ only with momentum.

    Returns:
        [steps + 1, L], the first row being E0.

    Raises:
        ValueError: a value outside the ranges above, an array of another shape, or an E that leaves the range
            of float64 on the way (a rule without a cap can get there).

    Source: derived, docs/theory.md §6 and §7.
    """
    E = _layers(E0, at_least=1, name="E0")
    if E.ndim != 1:
        raise ValueError(f"E0 must have the shape [L], got {list(E.shape)}: simulate one set at a time")
    steps = operator.index(steps)
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    momentum = float(_momentum(momentum))
    weight_decay = float(_non_negative("weight_decay", weight_decay))
    add = np.add if _is_aligned(gradients) else np.hypot
    rule = lr if callable(lr) else _schedule(lr, steps)

    trajectory = np.empty((steps + 1, E.size))
    trajectory[0] = E
    radial = tangential = np.zeros_like(E)  # parts of m/‖w‖
    for step in range(steps):
        lr_step, grad_factor = _decide(rule, step, E) if callable(rule) else (rule[step], 1.0)
        update_radial = momentum * radial + weight_decay
        update_tangential = add(momentum * tangential, grad_factor * E)
        growth = (1 - lr_step * update_radial) ** 2 + (lr_step * update_tangential) ** 2  # of ‖w‖²
        radial = (update_radial - lr_step * (update_radial**2 + update_tangential**2)) / growth
        tangential = update_tangential / growth
        E = E / growth
        if not (np.isfinite(E) & (E > 0)).all():
            raise ValueError(
                f"E left the range of float64 at step {step}: ‖w‖ grows or shrinks without bound; lower lr "
                "or cap the rule, for example `lambda E: np.minimum(0.1, balance_lr(E))`"
            )
        trajectory[step + 1] = E
    return trajectory


def small_step(E0: ArrayLike, lr_sq_sum: ArrayLike) -> Array:
    """E after many small steps of plain SGD: E0/√(1 + 2·E0²·Σlr²).

    The limit of `simulate` for max lr → 0 at fixed Σlr²; in terms of the norm ‖w‖⁴ = ‖w₀‖⁴ + 2c²·Σlr². It is
    never below the exact value, and its relative error shrinks with lr².

    Args:
        E0: relative gradients before the first step, positive.
        lr_sq_sum: Σlr² ≥ 0 of the steps, broadcast against E0 (of a schedule ``np.cumsum(lr**2)[:, None]``).
            With momentum μ pass Σlr²/(1−μ)² for independent gradients and Σlr²·(1+μ)/(1−μ)³ for aligned ones.

    Raises:
        ValueError: E0 not positive and finite, or lr_sq_sum negative or not finite.

    Source: derived, docs/theory.md §5 and §6.
    """
    E0 = _positive("E0", E0)
    return E0 / np.sqrt(1 + 2 * E0**2 * _non_negative("lr_sq_sum", lr_sq_sum))


def equilibrium_angle(lr: ArrayLike, weight_decay: ArrayLike, momentum: ArrayLike = 0.0) -> Array:
    """The angle per step when weight decay balances the growth of ‖w‖: arccos(1 − λω/(1+μ)) ≈ √(2λω/(1+μ)).

    It holds for every c and for any directions of successive gradients, and so for every rule that only scales
    the gradient by a factor. The update must be that of `simulate`: heavy ball without Nesterov or dampening,
    L2 decay added to the gradient, no projection, and no rescaling of w.

    Args:
        lr: λ ≥ 0.
        weight_decay: ω ≥ 0, with λω < 2(1+μ); beyond that the decay alone diverges.
        momentum: μ, 0 ≤ μ < 1.

    Returns:
        radians per step, the arguments broadcast against each other; 0 where λω = 0 (there nothing balances the
        growth, and the angle becomes smaller for ever).

    Raises:
        ValueError: a value outside the ranges above.

    Source: derived, docs/theory.md §7; to leading order it is the angular update of Wan et al., NeurIPS 2021.
    """
    lr, weight_decay = _non_negative("lr", lr), _non_negative("weight_decay", weight_decay)
    momentum = _momentum(momentum)
    decay = lr * weight_decay / (1 + momentum)
    if (decay >= 2).any():
        raise ValueError(
            f"lr·weight_decay/(1 + momentum) must be below 2, got {decay.max()}: beyond it the decay alone "
            "makes the weights diverge; lower lr or weight_decay"
        )
    return 2 * np.arcsin(np.sqrt(decay / 2))


def equilibrium_relative_grad(
    lr: ArrayLike, weight_decay: ArrayLike, momentum: ArrayLike = 0.0, *, gradients: Gradients = "aligned"
) -> Array:
    """The E of that equilibrium, the fixed point of `simulate`: k·sin(angle)/lr.

    k = 1−μ for aligned gradients and √(1−μ²) for independent ones. The norm follows as ‖w‖ = √(c/E).

    Args:
        lr: λ > 0.
        weight_decay: as for `equilibrium_angle`.
        momentum: as for `equilibrium_angle`.
        gradients: as for `simulate`.

    Returns:
        E in 1/lr, the arguments broadcast against each other; 0 where ω = 0 (‖w‖ grows for ever).

    Raises:
        ValueError: a value outside the ranges above.

    Source: derived, docs/theory.md §7.
    """
    lr, momentum = _non_negative("lr", lr), _momentum(momentum)
    if (lr == 0).any():
        raise ValueError("lr must be positive, got 0: weights that do not move reach no equilibrium")
    k = 1 - momentum if _is_aligned(gradients) else np.sqrt(1 - momentum**2)
    return k * np.sin(equilibrium_angle(lr, weight_decay, momentum)) / lr


def adamw_equilibrium_angle(lr: ArrayLike, weight_decay: ArrayLike, beta1: ArrayLike = 0.9) -> Array:
    """The angle per step at the equilibrium of AdamW: √(2λω(1−β₁)/(1+β₁)).

    For independent gradients, decoupled decay, small λω and β₂ close to 1. Gradients that agree from step to step
    turn the weight by less, since they lengthen it faster.

    Args:
        lr: λ ≥ 0.
        weight_decay: ω ≥ 0.
        beta1: β₁, 0 ≤ β₁ < 1.

    Returns:
        radians per step, the arguments broadcast against each other.

    Raises:
        ValueError: a value outside the ranges above.

    Source: Kosson et al., ICML 2024; derived again in docs/theory.md §7.
    """
    beta1 = _momentum(beta1)
    return _decoupled_angle(lr, weight_decay, (1 - beta1) / (1 + beta1))


def lion_equilibrium_angle(
    lr: ArrayLike, weight_decay: ArrayLike, beta1: float = 0.9, beta2: float = 0.99
) -> Array:
    """The angle per step at the equilibrium of Lion: √(2λω/(1 + 2·Σₖ (2/π)·arcsin ρₖ)).

    ρₖ is the correlation of the averages β₁m + (1−β₁)g, whose signs Lion steps by, k steps apart. For independent
    normal gradients, decoupled decay and small λω. With the arcsin linearized it is √(πλω·Q) of Kosson et al.,
    Q = (1−β₁)² + β₁²(1−β₂)/(1+β₂).

    Args:
        lr: λ ≥ 0.
        weight_decay: ω ≥ 0.
        beta1: β₁, 0 ≤ β₁ < 1.
        beta2: β₂, 0 ≤ β₂ < 1.

    Returns:
        radians per step, the arguments broadcast against each other.

    Raises:
        ValueError: a value outside the ranges above.

    Source: derived, docs/theory.md §7.
    """
    beta1, beta2 = float(_momentum(beta1)), float(_momentum(beta2))
    share = beta1 * (1 - beta2)  # of the gradient before the last one in the average
    squares = (1 - beta1) ** 2 + share**2 / (1 - beta2**2)
    first = (1 - beta1) * share + share**2 * beta2 / (1 - beta2**2)
    steps = 1 + math.ceil(math.log(1e-4) / math.log(beta2)) if beta2 > 0 else 1
    correlations = first / squares * beta2 ** np.arange(steps)
    total = 1 + 2 * (2 / math.pi * np.arcsin(np.minimum(correlations, 1.0))).sum()
    return _decoupled_angle(lr, weight_decay, 1 / total)


def muon_equilibrium_angle(
    lr: ArrayLike, weight_decay: ArrayLike, momentum: ArrayLike = 0.95, *, nesterov: bool = True
) -> Array:
    """The angle per step at the equilibrium of Muon: √(2λωQ), Q the squares of the weights of past gradients.

    Q = (1−μ)²·((1+μ)² + μ⁴/(1−μ²)) with Nesterov momentum, else (1−μ)/(1+μ). For independent gradients, decoupled
    decay and small λω. Exact for matrices that are much wider than high; orthogonalizing a square random one makes the
    angle 1.2 times as large, and one of low rank more.

    Args:
        lr: λ ≥ 0.
        weight_decay: ω ≥ 0.
        momentum: μ, 0 ≤ μ < 1.

    Returns:
        radians per step, the arguments broadcast against each other.

    Raises:
        ValueError: a value outside the ranges above.

    Source: derived, docs/theory.md §7.
    """
    momentum = _momentum(momentum)
    squares = (1 + momentum) ** 2 + momentum**4 / (1 - momentum**2) if nesterov else 1 / (1 - momentum**2)
    return _decoupled_angle(lr, weight_decay, (1 - momentum) ** 2 * squares)


def _decoupled_angle(lr: ArrayLike, weight_decay: ArrayLike, squares: Array | float) -> Array:
    """√(2λωQ): see docs/theory.md §7."""
    lr, weight_decay = _non_negative("lr", lr), _non_negative("weight_decay", weight_decay)
    return np.sqrt(2 * lr * weight_decay * squares)


def _decide(rule: ModelRule, step: int, E: Array) -> tuple[Array, Array]:
    """Learning rate and gradient factor that the rule returns for this step, each a number or [L]."""
    decision = rule(E)
    lr, grad_factor = decision if isinstance(decision, tuple) else (decision, 1.0)
    lr = _non_negative(f"the learning rate that the rule returned at step {step}", lr)
    grad_factor = _non_negative(f"the gradient factor that the rule returned at step {step}", grad_factor)
    for name, value in (("learning rate", lr), ("gradient factor", grad_factor)):
        if value.shape not in ((), E.shape):
            raise ValueError(
                f"the {name} that the rule returned at step {step} must be a number or have the shape "
                f"{list(E.shape)}, got {list(value.shape)}"
            )
    return lr, grad_factor


def _schedule(lr: ArrayLike, steps: int) -> Array:
    lr = _non_negative("lr", lr)
    if lr.shape not in ((), (steps,)):
        raise ValueError(
            f"lr must be a number, a schedule of {steps} values (one per step) or a rule, got the shape "
            f"{list(lr.shape)}; for one learning rate per layer pass a rule such as `lambda E: lr`"
        )
    return np.broadcast_to(lr, (steps,))


def _layers(E: ArrayLike, *, at_least: int, name: str = "E") -> Array:
    E = np.atleast_1d(_positive(name, E))
    if E.shape[-1] < at_least:
        raise ValueError(f"{name} must hold at least {at_least} layers in its last axis, got {E.shape[-1]}")
    return E


def _positive(name: str, value: ArrayLike) -> Array:
    value = np.asarray(value, dtype=np.float64)
    bad = ~(np.isfinite(value) & (value > 0))
    if bad.any():
        raise ValueError(
            f"{name} must be positive and finite, got {value[bad][0]}: leave out layers whose weight or "
            "gradient is zero or not finite"
        )
    return value


def _non_negative(name: str, value: ArrayLike) -> Array:
    value = np.asarray(value, dtype=np.float64)
    bad = ~(np.isfinite(value) & (value >= 0))
    if bad.any():
        raise ValueError(f"{name} must be finite and 0 or more, got {value[bad][0]}")
    return value


def _momentum(momentum: ArrayLike) -> Array:
    value = _non_negative("momentum", momentum)
    if (value >= 1).any():
        raise ValueError(f"momentum must be below 1, got {value.max()}: the momentum would never fade")
    return value


def _is_aligned(gradients: Gradients) -> bool:
    if gradients not in ("aligned", "independent"):
        raise ValueError(f"gradients must be 'aligned' or 'independent', got {gradients!r}")
    return gradients == "aligned"
