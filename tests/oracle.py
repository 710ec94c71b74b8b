"""A second ELRSGD, in NumPy float64, written from docs/theory.md alone.

After a step of a rule in `KEEPS_NORM` its weights have their norm; the package restores the norm in the next step. So
both are brought to the same norm before they are compared (`Oracle.same_norm`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Norms = Sequence[Array]
Factors = list[tuple[Array, Array]]


def invariant_gradient(curvature: Array, per_filter: bool = False) -> Callable[[Array], Array]:
    """Gradient of the scale-invariant f(w) = ½ ŵᵀ D ŵ, ŵ = w/‖w‖, whose c is not constant. D = diag(`curvature`)."""

    def of_one(w: Array, d: Array) -> Array:
        direction = w / np.linalg.norm(w)
        pull = d * direction
        return (pull - (direction * pull).sum() * direction) / np.linalg.norm(w)

    if per_filter:
        return lambda w: np.stack([of_one(row, d) for row, d in zip(w, curvature, strict=True)])
    return lambda w: of_one(w, curvature)


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
    "sphere": sphere,
}
KEEPS_NORM = {"angle", "sphere"}  # rules that bring each weight back to the norm that it had at first


class Oracle:
    """SGD with a rule, for weights that are all tracked."""

    def __init__(
        self,
        weights: Sequence[Array],
        *,
        rule: str | None,
        granularity: str = "layer",
        project: bool = False,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        self.weights = [np.array(w, dtype=np.float64) for w in weights]
        self.rule, self.granularity, self.project = rule, granularity, project
        self.momentum, self.dampening, self.weight_decay = momentum, dampening, weight_decay
        self.nesterov, self.maximize = nesterov, maximize
        self.buffers: list[Array | None] = [None] * len(self.weights)
        self.radii = self.norms(self.weights)

    def norms(self, tensors: Sequence[Array]) -> list[Array]:
        """The norm that the rule sees, shaped to broadcast against each tensor."""
        if self.granularity == "filter":
            return [
                np.linalg.norm(t.reshape(len(t), -1), axis=1).reshape(-1, *[1] * (t.ndim - 1))
                for t in tensors
            ]
        if self.granularity == "network":
            return [np.sqrt(sum((t**2).sum() for t in tensors))] * len(tensors)
        return [np.linalg.norm(t) for t in tensors]

    def step(self, grads: Sequence[Array], lr: float) -> None:
        updated = []
        factors = FACTORS[self.rule](self.norms(self.weights), self.norms(grads))
        for i, (w, g, (s, a)) in enumerate(zip(self.weights, grads, factors, strict=True)):
            w = a * w
            g = s * (-g if self.maximize else g) + self.weight_decay * w
            u = g
            if self.momentum:
                m = self.buffers[i]
                m = g if m is None else self.momentum * m + (1 - self.dampening) * g
                self.buffers[i] = m
                u = g + self.momentum * m if self.nesterov else m
            if self.project:
                axes = tuple(range(1, w.ndim)) if self.granularity == "filter" else None
                u = u - (w * u).sum(axes, keepdims=True) / (w * w).sum(axes, keepdims=True) * w
            updated.append(w - lr * u)
        if self.rule in KEEPS_NORM:
            updated = [w * r / n for w, r, n in zip(updated, self.radii, self.norms(updated), strict=True)]
        self.weights = updated

    def same_norm(self, weights: Sequence[Array]) -> list[Array]:
        """`weights` of the package, with the norm that its next step would restore."""
        if self.rule not in KEEPS_NORM:
            return list(weights)
        return [w * r / n for w, r, n in zip(weights, self.radii, self.norms(weights), strict=True)]
