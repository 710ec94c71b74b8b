"""What weight decay does to the layers of a recorded run: how fast it shortens them, and the angle that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import dynamics
from .rules import RULES, RuleSpec, momentum_sums
from .run_history import RunHistory

__all__ = ["Decay", "decay_of", "rule_of"]

Array = NDArray[np.float64]
T = TypeVar("T")
# torch's optimizers whose decay is L2 unless a param group says otherwise
COUPLED = ("Adadelta", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")


class Decay(NamedTuple):
    """What decay does, [T, L]. NaN: not known.

    share: of ‖w‖ that decay takes away per step, in the long run; 0 where the norm is kept anyway.
    settling: φ²/(λω), with φ the angle per step at the equilibrium of these λ and ω. NaN too where no formula is known
        and while a warm-up rescales the weight.
    angle: φ, in radians; NaN too without decay.
    keeps_norm: [L] whether a rule keeps the norm, so that decay has no effect on it.
    """

    share: Array
    settling: Array
    angle: Array
    keeps_norm: NDArray[np.bool_]


class _Coefficients(NamedTuple):
    """share/(λω) and φ²/(λω); NaN: not known."""

    share: float
    settling: float


UNKNOWN = _Coefficients(math.nan, math.nan)


def decay_of(run: RunHistory) -> Decay:
    """What decay does in a run, by the class and the options of its optimizer. Derived, docs/theory.md §7."""
    share, settling = np.full(run.lr.shape, np.nan), np.full(run.lr.shape, np.nan)
    keeps = np.zeros(len(run.names), dtype=bool)
    optimizer = run.optimizer.rpartition(".")[2]
    for of_record, rows in _same(run.options):
        for options, columns in _same(of_record):
            here = np.ix_(rows, columns)
            share[here], settling[here] = _coefficients(optimizer, options)
    if run.options:
        kept = [run.control is not None or _keeps_norm(options) for options in run.options[-1]]
        keeps = np.array(kept) & run.tracked
    settling[(run.weight_factor != 1) | keeps] = np.nan
    λω = run.lr * run.weight_decay
    share = np.where(keeps, 0.0, share * λω)
    angle = np.sqrt(settling * np.where(λω > 0, λω, np.nan))
    return Decay(share, settling, angle, keeps)


def _same(items: Sequence[T]) -> Iterator[tuple[T, list[int]]]:
    """Each object in a sequence once, with its places."""
    places: dict[int, list[int]] = {}
    for i, item in enumerate(items):
        places.setdefault(id(item), []).append(i)
    return ((items[at[0]], at) for at in places.values())


def rule_of(options: Mapping[str, Any]) -> RuleSpec:
    """The rule of ELRSGD in the options of a param group; plain SGD's if there is none."""
    name = options.get("rule")  # other optimizers may have an option of that name
    return RULES.get(name, RULES[None]) if isinstance(name, str) else RULES[None]


def _keeps_norm(options: Mapping[str, Any]) -> bool:
    return options.get("project") is True or rule_of(options).keeps_radius


def _coefficients(optimizer: str, options: Mapping[str, Any]) -> _Coefficients:
    betas = options.get("betas") or ()
    momentum = options.get("momentum") or 0.0
    nesterov = bool(options.get("nesterov"))
    if optimizer in ("SGD", "ELRSGD"):
        total, squares = momentum_sums(momentum, options.get("dampening") or 0.0, nesterov)
        return _Coefficients(total, 2 * squares / total)
    if not options or options.get("fixed_decay"):
        return UNKNOWN
    decoupled = options.get("weight_decouple", options.get("decoupled_weight_decay"))
    if decoupled is False or (decoupled is None and optimizer in COUPLED):
        return UNKNOWN  # L2, divided by the second moment
    settling = math.nan
    if optimizer in ("Adam", "AdamW") and len(betas) == 2:
        settling = float(dynamics.adamw_equilibrium_angle(1, 1, betas[0])) ** 2
    elif optimizer == "Lion" and len(betas) == 2:
        settling = float(dynamics.lion_equilibrium_angle(1, 1, *betas)) ** 2
    elif optimizer == "Muon":
        settling = float(dynamics.muon_equilibrium_angle(1, 1, momentum, nesterov=nesterov)) ** 2
    return _Coefficients(1.0, settling)
