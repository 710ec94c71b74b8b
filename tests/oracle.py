"""A second ELRSGD, in NumPy float64, written from docs/theory.md alone.

After a step of a rule in `KEEPS_NORM` on the gradient its weights have their norm; the package restores the norm in the
next step. So both are brought to the same norm before they are compared (`Oracle.same_norm`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Norms = Sequence[Array]
Factors = list[tuple[Array, Array]]

LEAST_SHRINK = 0.1  # to which the radial part of an update may shrink a weight under "uniform" on the update


def invariant_gradient(curvature: Array, per_filter: bool = False) -> Callable[[Array], Array]:
    """Gradient of the scale-invariant f(w) = ½ ŵᵀ D ŵ, ŵ = w/‖w‖, whose c is not constant. D = diag(`curvature`)."""

    def of_one(w: Array, d: Array) -> Array:
        direction = w / np.linalg.norm(w)
        pull = d * direction
        return (pull - (direction * pull).sum() * direction) / np.linalg.norm(w)

    if per_filter:
        return lambda w: np.stack([of_one(row, d) for row, d in zip(w, curvature, strict=True)])
    return lambda w: of_one(w, curvature)


def coefficients(momentum: float, dampening: float, nesterov: bool) -> Array:
    """What momentum multiplies the gradients of this step, the one before … by, in the long run."""
    ages = np.arange(1 if momentum == 0 else 2000)
    of_buffer = (1 if momentum == 0 else 1 - dampening) * momentum**ages
    return (ages == 0) + momentum * of_buffer if nesterov else of_buffer


def equilibrium_angle(
    lr: float, weight_decay: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False
) -> float:
    """By which SGD's update turns a layer once decay balances growth, for independent gradients and a small λω.

    With coefficients k of successive gradients, ‖u‖² is Σk²·‖g‖². Over many steps each gradient lengthens w by what
    its sum of coefficients makes of it, (λΣk)²·‖g‖² of ‖w‖², and decay shortens it by 2λω·Σk·‖w‖².
    """
    k = coefficients(momentum, dampening, nesterov)
    relative_grad_sq = 2 * lr * weight_decay * k.sum() / (lr * k.sum()) ** 2 if lr > 0 else 0.0
    return float(lr * np.sqrt((k**2).sum() * relative_grad_sq))


def no_factors(w_norms: Norms, g_norms: Norms) -> Factors:
    return [(np.ones(()), np.ones(()))] * len(w_norms)


def uniform(w_norms: Norms, g_norms: Norms) -> Factors:
    e = [g / w for w, g in zip(w_norms, g_norms, strict=True)]
    mean = np.exp(np.concatenate([np.log(x).ravel() for x in e]).mean())
    return [(mean / x, np.ones(())) for x in e]


def angle(w_norms: Norms, g_norms: Norms) -> Factors:
    return [(w / g, np.ones(())) for w, g in zip(w_norms, g_norms, strict=True)]


def sphere(w_norms: Norms, g_norms: Norms) -> Factors:
    return [(w**2, np.ones(())) for w in w_norms]


# From ‖w‖ and ‖g‖ of every tensor, shaped to broadcast against it, to its s and a.
FACTORS: dict[str | None, Callable[[Norms, Norms], Factors]] = {
    None: no_factors,
    "uniform": uniform,
    "angle": angle,
    "equilibrium": angle,  # times the angle over λ: `Oracle.turn_per_lr`
    "sphere": sphere,
}
KEEPS_NORM = {"angle", "equilibrium", "sphere"}  # rules that bring each weight back to its first norm


class Warmup:
    """The rule "warmup" for layers that have passed all tests: its factors and what it remembers."""

    def __init__(self, gain: float) -> None:
        self.gain = gain
        self.c: Array | None = None
        self.over, self.largest = False, 0.0

    def factors(self, w_norms: Norms, g_norms: Norms, lr: float) -> Factors:
        w, g, lr_gain = np.array(w_norms), np.array(g_norms), lr * self.gain
        rises = self.c is not None and lr_gain > 1.0001 * self.largest
        if self.over and not rises:
            return no_factors(w_norms, g_norms)
        c = g * w if self.c is None or self.over else 0.9 * self.c + 0.1 * g * w
        offset, smooth_offset = (
            x - min(x.mean(), -np.log(lr_gain)) for x in (np.log(g / w), np.log(c / w**2))
        )
        ends = not rises and np.sqrt((smooth_offset**2).mean()) < 0.1
        self.c, self.over, self.largest = c, ends, max(self.largest, lr_gain)
        log_a = smooth_offset / 2 if ends else 0.1 * offset / 2
        return list(zip(np.exp(log_a - offset), np.exp(log_a), strict=True))


class Oracle:
    """SGD with a rule, for weights that are all tracked.

    elr_of: as in `ELRSGD`, None standing for "gradient". flagged: whether the group says that its weights are
    scale-invariant; such a weight is not decayed where its norm is kept while its update is made tangential.
    """

    def __init__(
        self,
        weights: Sequence[Array],
        *,
        rule: str | None,
        granularity: str = "layer",
        elr_of: str | None = None,
        project: bool = False,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        flagged: bool = True,
    ) -> None:
        self.weights = [np.array(w, dtype=np.float64) for w in weights]
        self.rule, self.granularity, self.project = rule, granularity, project
        self.of_update = elr_of == "update"
        self.momentum, self.dampening, self.weight_decay = momentum, dampening, weight_decay
        self.nesterov, self.maximize = nesterov, maximize
        undecayed = self.of_update and rule in KEEPS_NORM and flagged
        self.decay_in_gradient = 0.0 if undecayed else weight_decay
        self.buffers: list[Array | None] = [None] * len(self.weights)
        self.radii = self.norms(self.weights)
        growth = 1 - momentum + 2 * momentum**2 if nesterov else 1 + momentum
        self.warmup = Warmup((1 - dampening) * np.sqrt(growth / (1 - momentum) ** 3))

    def norms(self, tensors: Sequence[Array]) -> list[Array]:
        """The norm that the rule sees, shaped to broadcast against each tensor."""
        return [np.sqrt(total) for total in self.dots(tensors, tensors)]

    def dots(self, a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
        """The inner products over the same rows, shaped in the same way."""
        products = [x * y for x, y in zip(a, b, strict=True)]
        if self.granularity == "filter":
            return [t.reshape(len(t), -1).sum(1).reshape(-1, *[1] * (t.ndim - 1)) for t in products]
        if self.granularity == "network":
            return [np.asarray(sum(t.sum() for t in products))] * len(products)
        return [np.asarray(t.sum()) for t in products]

    def turn_per_lr(self, lr: float) -> float:
        """What "equilibrium" sets in the place of λ, over λ."""
        if self.rule != "equilibrium" or lr == 0:
            return 1.0
        of_momentum = self.momentum, self.dampening, self.nesterov
        angle = equilibrium_angle(lr, self.weight_decay, *of_momentum)
        if not self.of_update:  # the turn of a plain step whose update turns by that angle
            angle /= np.linalg.norm(coefficients(*of_momentum))
        return angle / lr

    def advance(self, i: int, w: Array, g: Array, *, store: bool) -> Array:
        """u, what momentum makes of the gradient g of weight i, whose decay is that of w."""
        g = g + self.decay_in_gradient * w
        if not self.momentum:
            return g
        m = self.buffers[i]
        m = g if m is None else self.momentum * m + (1 - self.dampening) * g
        if store:
            self.buffers[i] = m
        return g + self.momentum * m if self.nesterov else m

    def step(self, grads: Sequence[Array], lr: float) -> None:
        grads = [-g if self.maximize else g for g in grads]
        if self.of_update:
            self.turn(grads, lr)
            return
        updated = []
        norms = self.norms(self.weights), self.norms(grads)
        factors = self.warmup.factors(*norms, lr) if self.rule == "warmup" else FACTORS[self.rule](*norms)
        for i, (w, g, (s, a)) in enumerate(zip(self.weights, grads, factors, strict=True)):
            w = a * w
            u = self.advance(i, w, self.turn_per_lr(lr) * s * g, store=True)
            if self.project:
                axes = tuple(range(1, w.ndim)) if self.granularity == "filter" else None
                u = u - (w * u).sum(axes, keepdims=True) / (w * w).sum(axes, keepdims=True) * w
            updated.append(w - lr * u)
        if self.rule in KEEPS_NORM:
            updated = [w * r / n for w, r, n in zip(updated, self.radii, self.norms(updated), strict=True)]
        self.weights = updated

    def turn(self, grads: Sequence[Array], lr: float) -> None:
        """``elr_of="update"``: the angle itself, whatever the length of the update, without its radial part."""
        weights = self.weights
        us = [self.advance(i, w, g, store=False) for i, (w, g) in enumerate(zip(weights, grads, strict=True))]
        w_sq, w_norms = self.dots(weights, weights), self.norms(weights)
        p = [dot / sq for dot, sq in zip(self.dots(weights, us), w_sq, strict=True)]
        tangents = [u - of_w * w for u, of_w, w in zip(us, p, weights, strict=True)]
        t_norms = self.norms(tangents)
        if self.rule == "uniform":
            a = [np.maximum(1 - lr * of_w, LEAST_SHRINK) for of_w in p]
            turns = [lr * t / (of_w * n) for t, of_w, n in zip(t_norms, a, w_norms, strict=True)]
            common = np.exp(np.concatenate([np.log(turn).ravel() for turn in turns]).mean())
            along = [of_w * n for of_w, n in zip(a, w_norms, strict=True)]
            across = [common * length for length in along]
        else:
            angle = lr * self.turn_per_lr(lr)
            a = [np.cos(angle) * r / n for r, n in zip(self.radii, w_norms, strict=True)]
            along = [np.cos(angle) * r for r in self.radii]
            across = [np.sin(angle) * r for r in self.radii]
        for i, (w, g, of_w) in enumerate(zip(weights, grads, a, strict=True)):
            self.advance(i, of_w * w, g, store=True)  # the buffer keeps the decay of ŵ = a·w
        self.weights = [
            x * w / n - y * t / t_n
            for w, n, t, t_n, x, y in zip(weights, w_norms, tangents, t_norms, along, across, strict=True)
        ]

    def same_norm(self, weights: Sequence[Array]) -> list[Array]:
        """`weights` of the package, with the norm that its next step would restore; the update keeps it at once."""
        if self.rule not in KEEPS_NORM or self.of_update:
            return list(weights)
        return [w * r / n for w, r, n in zip(weights, self.radii, self.norms(weights), strict=True)]
