"""What a recorded run shows, in words: findings with the steps, the layers and the figures.

Thresholds were chosen on training runs whose nets and seeds are not those of `benchmarks.findings_proof`, which counts
what is named and what is a false alarm. "Healthy" runs are those on which they were chosen, without a fault.

| threshold | value | reason |
|---|---:|---|
| `DEAD` | 1e-6 | of ‖g‖·‖w‖ at first, which no rescaling of w changes; healthy layers stayed above 4e-4 |
| `STILL` | 0.1 | of the usual angle per lr before; the steps of an Adam can outlive its gradients |
| `LARGE_ANGLE` | 0.3 rad | healthy layers stayed below 0.04; after 0.24 rad gradients have changed by 30 % |
| `SAFE_ANGLE` | 0.1 rad | what a proposed learning rate would turn such a layer by |
| `SMALL_PATH` | 0.02 rad | all angles of a run added up; in 300 steps healthy layers came to 0.14 and more |
| `SHORT_RUN` | 100 steps | in less it says nothing that a layer hardly turns or that decay does nothing |
| `SPIKE` | 5 | times what is usual just before and after; healthy layers stayed below 4.1 |
| `SPIKE_IN_RUN` | 2 | times the layer's median over the run: late in a run small steps vary, without harm |
| `UNEVEN` | 100 | between medians over the second half of a run; healthy layers differed by up to 6 |
| `GROWTH` | 1.5 | times the norm at the start, half the ELR of SGD; healthy layers grew by up to 1.2 |
| `GROWS_ON` | 1.05 | times, in the second half of the run (by the sum of λ), where there is a decay |
| `UNBOUNDED` | 0.1 | share of the growth in that half that decay takes back at most: the norm could still triple |
| `IDLE_DECAY` | 0.02 | the share of a weight that decay takes away over the whole run |
| `LONGEST_RUN` | 500,000 steps | decay that needs more to shorten a weight e-fold matters in no usual run |
| `BALANCED` | 0.5 | change of ln‖w‖ over what decay takes from it; where it is b the angle is √(1+b)·φ |
| `WINDOW` | 0.25 | what decay takes from ln‖w‖ in the stretch of steps that `BALANCED` is judged over |
| `ANNEALED` | 0.1 | of the largest learning rate: below it nothing is said of an equilibrium |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._decay_model import Decay, decay_of, rule_of
from .rules import RuleSpec
from .run_history import RunHistory, rule_acts, spread_of

__all__ = ["TITLES", "Finding", "Kind", "Severity", "diagnose"]

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]  # of records or of layers
Severity: TypeAlias = Literal["note", "warning"]
Kind: TypeAlias = Literal[
    "died",
    "not_finite",
    "large_angle",
    "update_spike",
    "small_angle",
    "uneven_angles",
    "norm_growth",
    "idle_decay",
    "in_equilibrium",
    "transient",
    "rule",
]
TITLES: dict[Kind, str] = {
    "died": "The run has died",
    "not_finite": "Weights are not finite",
    "large_angle": "A layer turns too far",
    "update_spike": "An update spike",
    "small_angle": "A layer hardly turns",
    "uneven_angles": "Layers turn by very different angles",
    "norm_growth": "Norms grow without bound",
    "idle_decay": "Weight decay does nothing",
    "in_equilibrium": "Equilibrium",
    "transient": "Not in equilibrium",
    "rule": "What the rule did",
}

DEAD = 1e-6
STILL = 0.1
LARGE_ANGLE = 0.3
SAFE_ANGLE = 0.1
SMALL_PATH = 0.02
SHORT_RUN = 100
SPIKE = 5.0
SPIKE_IN_RUN = 2.0
UNEVEN = 100.0
GROWTH = 1.5
GROWS_ON = 1.05
UNBOUNDED = 0.1
IDLE_DECAY = 0.02
LONGEST_RUN = 500_000.0
BALANCED = 0.5
WINDOW = 0.25
ANNEALED = 0.1

DEAD_RECORDS = 3  # at least, at the end of a run that has died
BEFORE_SPIKE = 8, 16  # records at least and at most that say what was usual before
AFTER_SPIKE = 8, 40  # and after; a tenth of these must be much smaller, as momentum goes on for some steps
SPIKE_GAP = 5  # records between two spikes at least; momentum spreads one over several
USEFUL_DECAY = 0.5  # what a proposed decay takes from ln‖w‖ in a run
MOST = 0.8  # of the tracked layers, for "most"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that a run shows.

    Attributes:
        kind: a key of `TITLES`.
        steps: the first and the last recorded step concerned.
        layers: names of the layers concerned, those that have it most first.
        what: one or two sentences, with the steps and figures.
        advice: what to do, with a learning rate or decay as a number where one follows; may be empty.
        severity: a "warning" is worth a change of the run, a "note" is not.
    """

    kind: Kind
    steps: tuple[int, int]
    layers: tuple[str, ...]
    what: str
    advice: str
    severity: Severity


def diagnose(run: RunHistory) -> list[Finding]:
    """What the run shows: that it has died, then other warnings, then notes, each by its first step.

    Most of it is said of tracked layers. Others count where their angle or decay means something too: for layers that
    turn too far, spikes, a decay that does nothing, and weights that are not finite. A file of an elropt that recorded
    no angles has no findings.

    Args:
        run: of `read_run`, best with ``all_layers=True``.
    """
    if run.angle is None or not len(run.tracked):
        return []
    with np.errstate(
        divide="ignore", invalid="ignore", over="ignore"
    ):  # of runs that end in NaN and infinity
        seen = _Seen(run, run.angle, decay_of(run))
        found = [finding for look in _LOOKS for finding in look(seen)]
    return sorted(found, key=_place)


def _place(finding: Finding) -> tuple[bool, bool, tuple[int, int]]:
    return finding.severity != "warning", finding.kind != "died", finding.steps


class _Seen:
    """A run of T records of L layers, and what several findings need of it.

    Attributes:
        angle: [T, L] in radians.
        tracked: the tracked layers.
        gap: [T] steps that each record stands for.
        duration: steps in all.
        taken: [T + 1, L] what decay has taken from ln‖w‖ before each record and in all; NaN where it is not known.
        path: [L] the angles of all steps added up, each record standing for the steps up to the next.
    """

    def __init__(self, run: RunHistory, angle: Array, decay: Decay) -> None:
        self.run, self.angle, self.decay, self.steps = run, angle, decay, run.steps
        self.tracked = np.flatnonzero(run.tracked)
        gap = np.diff(run.steps)
        self.gap = np.append(gap, gap[-1] if len(gap) else 1).astype(np.float64)
        self.duration = float(self.gap.sum())
        shares = decay.share * self.gap[:, None]
        self.taken = np.concatenate([np.zeros((1, len(run.names))), np.cumsum(shares, axis=0)])
        self.path = np.nansum(angle * self.gap[:, None], axis=0)

    @property
    def all_records(self) -> Indices:
        return np.arange(len(self.steps))

    def option(self, layer: int, name: str) -> object:
        """Of the layer's param group at the last record."""
        return self.run.options[-1][layer].get(name) if self.run.options else None

    def rule(self, layer: int) -> RuleSpec:
        """The rule of ELRSGD that the layer trains with, see `rule_of`."""
        return rule_of(self.run.options[-1][layer] if self.run.options else {})

    def named(self, layers: Indices) -> str:
        """Layers in words, of which the first has it most."""
        first = self.run.names[layers[0]]
        return first if len(layers) == 1 else f"{len(layers)} layers, {first} most of all,"

    def finding(
        self,
        kind: Kind,
        records: Indices,
        layers: Indices,
        what: str,
        advice: str = "",
        severity: Severity = "warning",
    ) -> Finding:
        steps = int(self.steps[records[0]]), int(self.steps[records[-1]])
        names = tuple(self.run.names[layer] for layer in layers)
        return Finding(kind, steps, names, what, advice, severity)


def _died(seen: _Seen) -> list[Finding]:
    run, records = seen.run, _dead_records(seen)
    if not len(records):
        return []
    layers = seen.tracked
    gradients = run.grad_norm[records][:, layers]
    decays = np.nanmax(run.weight_decay[records][:, layers], initial=0) > 0
    what = (
        f"By step {seen.steps[records[0]]} the gradients of all {len(layers)} tracked layers are "
        f"{'zero' if np.nanmax(gradients) == 0 else 'practically zero'}, and stay so to the end: "
        f"{'only weight decay moves these weights' if decays else 'nothing moves these weights any more'}."
    )
    lr = float(_peak(run.lr[: records[0], layers].ravel()))
    such_as = f", such as {_show(lr / 10, 1)} instead of {_show(lr)}," if lr > 0 else ""
    advice = (
        f"Start again with a smaller learning rate{such_as} or with a warm-up. Only if the loss is 0, too, nothing is "
        "wrong: all data are fitted."
    )
    return [seen.finding("died", records, layers, what, advice)]


def _dead_records(seen: _Seen) -> Indices:
    """Those from which on no tracked layer has a gradient or turns; none if the run is alive."""
    run, tracked = seen.run, seen.tracked
    layers = tracked[np.isfinite(run.grad_norm[:, tracked]).any(axis=0)]  # without those that are frozen
    size = (run.grad_norm * run.weight_norm)[:, layers]
    first = size[(size > 0).argmax(axis=0), np.arange(len(layers))]
    alive = np.flatnonzero(~(size <= DEAD * first).all(axis=1))
    start = alive[-1] + 1 if len(alive) else 0
    if start == 0 or len(size) - start < DEAD_RECORDS:
        return seen.all_records[:0]
    turn = (seen.angle / np.where(run.lr > 0, run.lr, 1.0))[:, layers]
    is_still = (_quantile(turn[start:]) <= STILL * _quantile(turn[:start])).all()
    return seen.all_records[start:] if is_still else seen.all_records[:0]


def _not_finite(seen: _Seen) -> list[Finding]:
    norm = seen.run.weight_norm
    was_finite = np.logical_or.accumulate(np.isfinite(norm), axis=0)
    is_there = np.isfinite(seen.run.grad_factor)  # a layer that has no gradient is not in the record
    broken = ~np.isfinite(norm) & was_finite & is_there
    layers = np.flatnonzero(broken.any(axis=0))
    if not len(layers):
        return []
    layers = layers[np.argsort(broken[:, layers].argmax(axis=0), kind="stable")]
    records = np.flatnonzero(broken.any(axis=1))
    start = seen.steps[records[0]]
    what = f"At step {start} the weights of {len(layers)} layers are not finite, first of {seen.run.names[layers[0]]}."
    advice = "Look at the angles before that step; a smaller learning rate or clipped gradients may help."
    return [seen.finding("not_finite", records, layers, what, advice)]


def _large_angles(seen: _Seen) -> list[Finding]:
    run, angle = seen.run, seen.angle
    # a weight that starts near zero turns far at first, and no harm is done
    starts_small = ~run.tracked & (run.weight_norm < np.nanmax(run.weight_norm, axis=0, initial=0) / 2)
    large = (angle > LARGE_ANGLE) & ~starts_small
    layers = np.flatnonzero(large.any(axis=0))
    if not len(layers):
        return []
    angles = np.where(large, angle, 0.0)
    layers = layers[np.argsort(-angles[:, layers].max(axis=0), kind="stable")]
    worst = layers[0]
    t = int(angles[:, worst].argmax())
    records = np.flatnonzero(large.any(axis=1))
    what = (
        f"{run.names[worst]} turns by {_show(angles[t, worst])} rad in step {seen.steps[t]}. {_of(len(layers), run)} "
        f"turned by more than {LARGE_ANGLE} rad, in {len(records)} of {len(seen.steps)} recorded steps."
    )
    too_long = math.tan(min(angles[t, worst], 1.5)) / SAFE_ANGLE
    if seen.rule(worst).settles:  # there the angle is as √lr
        too_long = too_long**2
    lr = run.lr[t, worst]
    advice = (
        f"A learning rate of about {_show(lr / too_long, 1)} instead of {_show(lr)} turns it by {SAFE_ANGLE} rad there."
        if np.isfinite(lr)
        else f"A learning rate {_show(too_long)} times smaller turns it by {SAFE_ANGLE} rad there."
    )
    return [seen.finding("large_angle", records, layers, what, advice)]


def _spikes(seen: _Seen) -> list[Finding]:
    run, angle = seen.run, seen.angle
    ratio = np.zeros(angle.shape)
    lr = np.where(run.lr > 0, run.lr, 1.0)  # what is usual is so in proportion to the learning rate
    for t in range(BEFORE_SPIKE[0], len(angle)):
        after = angle[t + 1 : t + 1 + AFTER_SPIKE[1]]
        lr_here = np.fmin(
            lr[t], lr[min(t + 1, len(angle) - 1)]
        )  # a learning rate that rises to stay is no spike
        usual = _quantile((angle / lr)[_before(t)]) * lr_here
        if len(after) >= AFTER_SPIKE[0]:  # nor is an angle that does
            usual = np.fmax(usual, _quantile(after, 0.1))
        ratio[t] = np.where(usual > 0, angle[t] / np.where(usual > 0, usual, 1.0), 0.0)
    spiking = (ratio > SPIKE) & (angle > SPIKE_IN_RUN * _quantile(angle))
    if len(seen.tracked):  # others spike with these: norms' gains and biases that start at zero also do alone
        spiking[~spiking[:, seen.tracked].any(axis=1)] = False
    return [
        _spike(seen, records, spiking, ratio) for records in _stretches(np.any(spiking, axis=1), SPIKE_GAP)
    ]


def _before(t: int) -> slice:
    """The records before t that say what was usual."""
    return slice(max(0, t - BEFORE_SPIKE[1]), t)


def _spike(seen: _Seen, records: Indices, spiking: NDArray[np.bool_], ratio: Array) -> Finding:
    """One spike, with what is known of its cause."""
    run = seen.run
    layers = np.flatnonzero(spiking[records].any(axis=0))
    ratios = np.where(spiking, ratio, 0.0)[records]
    layers = layers[np.argsort(-ratios[:, layers].max(axis=0), kind="stable")]
    worst = layers[0]
    t = int(records[ratios[:, worst].argmax()])
    before = _before(t)
    what = (
        f"In step {seen.steps[t]} {run.names[worst]} turns by {_show(seen.angle[t, worst])} rad, "
        f"{_show(ratio[t, worst])} times as far as usual. {_of(len(layers), run)} spiked."
    )
    advice = ""
    lr_rise = run.lr[t, worst] / _quantile(run.lr[before])[worst]
    usual_grad = _quantile(run.grad_norm[before])
    grad_rise = run.grad_norm[t, worst] / usual_grad[worst]
    if lr_rise > 2:
        what += f" The learning rate was {_show(lr_rise)} times the usual one."
        advice = f"Look at the schedule of the learning rate around step {seen.steps[t]}."
    elif 2 < grad_rise < math.inf:
        what += f" Its gradient was {_show(grad_rise)} times as long as usual."
        norm = 2 * math.sqrt(np.nansum(usual_grad**2))
        advice = (
            f"Look at the batch of step {seen.steps[t]}. Gradients clipped at a norm of about {_show(norm, 1)} for all "
            "layers together, twice the usual one, would have held it back."
        )
    return seen.finding("update_spike", records, layers, what, advice)


def _small_angles(seen: _Seen) -> list[Finding]:
    run, usual = seen.run, _quantile(seen.angle)
    layers = _hardly_turn(seen)
    if not len(layers):
        return []
    least = layers[0]
    others = np.array(
        [layer for layer in seen.tracked if layer not in layers and usual[layer] > 0], dtype=int
    )
    lr = _peak(run.lr)[least]
    if lr == 0:
        what = f"{seen.named(layers)} does not turn: the learning rate is 0."
        return [seen.finding("small_angle", seen.all_records, layers, what, severity="note")]
    what = (
        f"{seen.named(layers)} cannot have turned by more than {_show(seen.path[least], 1)} rad in all "
        f"{seen.duration:,.0f} steps; its usual angle is {_show(usual[least], 1)} rad per step"
        + (f", that of the other tracked layers {_show(_mean(usual[others]), 1)}." if len(others) else ".")
    )
    aim = _mean(usual[others]) if len(others) else 1e-3
    advice = []
    norm = _quantile(run.weight_norm)
    if len(others) and norm[least] > 30 * np.median(norm[others]):
        advice.append(
            f"Its norm is {_show(norm[least])}, that of the others {_show(np.median(norm[others]))}. Start it smaller: "
            "what a scale-invariant layer computes does not change. elropt.equalize_ does that too."
        )
    if usual[least] > 0 and lr > 0:
        new = lr * aim / usual[least]
        advice.append(
            f"A learning rate of about {_show(new, 1)} instead of {_show(lr)} turns it by {_show(aim, 1)} rad per step."
        )
    return [seen.finding("small_angle", seen.all_records, layers, what, " ".join(advice))]


def _hardly_turn(seen: _Seen) -> Indices:
    """Tracked layers that hardly turn in the whole run, the least first."""
    if seen.duration < SHORT_RUN:
        return np.zeros(0, dtype=np.intp)
    recorded = np.isfinite(seen.angle).mean(axis=0) > 0.5
    layers = np.flatnonzero(seen.run.tracked & recorded & (seen.path < SMALL_PATH))
    return layers[np.argsort(seen.path[layers], kind="stable")]


def _uneven_angles(seen: _Seen) -> list[Finding]:
    run, tracked = seen.run, seen.tracked
    angle = np.where(seen.angle > 0, seen.angle, np.nan)[:, tracked]
    half = len(angle) // 2
    usual = _quantile(angle[half:])
    if np.isfinite(usual).sum() < 2:
        return []
    order = np.argsort(usual, kind="stable")[: np.isfinite(usual).sum()]
    slow, fast = order[0], order[-1]
    spread = usual[fast] / usual[slow]
    if spread > UNEVEN:
        behind = order[usual[order] < usual[fast] / UNEVEN]
        aim = _mean(np.delete(usual, behind))
        lr = _peak(run.lr)[tracked[slow]]
        what = (
            f"In the second half of the run {run.names[tracked[slow]]} turns by {_show(usual[slow], 1)} rad per step "
            f"and {run.names[tracked[fast]]} by {_show(usual[fast], 1)}, {_show(spread)} times as far. Tracked layers "
            f"that turn by less than {1 / UNEVEN:.0%} of the largest angle: {len(behind)} of {len(tracked)}."
        )
        advice = (
            f"Give {run.names[tracked[slow]]} a learning rate of about {_show(lr * aim / usual[slow], 1)} instead of "
            f'{_show(lr)}, or use a rule that makes layers alike: "warmup" or "uniform" of ELRSGD, "uniform" of '
            "elropt.control."
        )
        layers = tracked[[*behind, fast]]
        return [seen.finding("uneven_angles", seen.all_records[half:], layers, what, advice)]
    spreads = spread_of(angle)
    early = _stretches(spreads > UNEVEN, 1)
    if not early or early[0][0] > 0:
        return []
    records = early[0]
    t = int(records[spreads[records].argmax()])
    what = (
        f"At first tracked layers turn by angles that differ by a factor of up to {_show(spreads[t])}, in step "
        f"{seen.steps[t]}; after step {seen.steps[records[-1]]} by less than {UNEVEN:.0f}."
    )
    layers = tracked[[int(np.nanargmin(angle[t])), int(np.nanargmax(angle[t]))]]
    return [seen.finding("uneven_angles", records, layers, what, severity="note")]


def _norm_growth(seen: _Seen) -> list[Finding]:
    run = seen.run
    growth, later, taken, taken_later = np.zeros((4, len(run.names)))
    start, end = np.zeros((2, len(run.names)), dtype=np.intp)
    in_steps = np.zeros(len(run.names), dtype=bool)  # the growth is not that of one record
    decayed = np.nan_to_num(seen.taken)
    for layer in seen.tracked[~seen.decay.keeps_norm[seen.tracked]]:
        records = np.flatnonzero(np.isfinite(run.weight_norm[:, layer]) & (run.weight_norm[:, layer] > 0))
        rescaled = np.flatnonzero(run.weight_factor[:, layer] != 1)  # by a warm-up
        records = records[records > rescaled[-1]] if len(rescaled) else records
        if len(records) < 4:
            continue
        lr_sum = np.nan_to_num(run.lr[records, layer] * seen.gap[records]).cumsum()
        middle = int(np.searchsorted(lr_sum, lr_sum[-1] / 2))
        log_norm, off = np.log(run.weight_norm[records, layer]), decayed[records, layer]
        start[layer], end[layer] = records[0], records[-1]
        growth[layer], taken[layer] = log_norm[-1] - log_norm[0], off[-1] - off[0]
        later[layer], taken_later[layer] = log_norm[-1] - log_norm[middle], off[-1] - off[middle]
        in_steps[layer] = np.diff(log_norm).max() < growth[layer] / 2
    goes_on = (later > math.log(GROWS_ON)) & (taken_later <= UNBOUNDED * (later + taken_later))
    no_decay = _peak(run.weight_decay) == 0
    known = no_decay | np.isfinite(seen.taken[-1])
    layers = np.flatnonzero((growth > math.log(GROWTH)) & known & np.where(no_decay, in_steps, goes_on))
    if not len(layers):
        return []
    layers = layers[np.argsort(-growth[layers], kind="stable")]
    worst = layers[0]
    records = seen.all_records[start[worst] : end[worst] + 1]
    against = (
        f"takes back {_show(100 * taken[worst] / (growth[worst] + taken[worst]))} % of it"
        if taken[worst] > 0
        else "is 0"
    )
    what = (
        f"The norm of {seen.named(layers)} grows by a factor of {_show(math.exp(growth[worst]))} from step "
        f"{seen.steps[records[0]]} to {seen.steps[records[-1]]}. Weight decay {against}, so nothing bounds it, and the "
        "longer a weight is, the less a step turns it."
    )
    return [seen.finding("norm_growth", records, layers, what, _decay_for_angle(seen, worst, records))]


def _decay_for_angle(seen: _Seen, layer: int, records: Indices) -> str:
    """The decay whose equilibrium is the angle that a layer turns by in the middle of the records."""
    middle = records[len(records) // 3 : len(records) // 3 + max(1, len(records) // 3)]
    angle, lr, settling = (
        _quantile(values[middle])[layer] for values in (seen.angle, seen.run.lr, seen.decay.settling)
    )
    if not (angle > 0 and lr * settling > 0):
        return "A weight decay would bound it."
    return (
        f"A weight decay of about {_show(angle**2 / (lr * settling), 1)} has its equilibrium at {_show(angle, 1)} rad "
        "per step, the angle in the middle of the run."
    )


def _idle_decay(seen: _Seen) -> list[Finding]:
    run, decay = seen.run, _quantile(seen.run.weight_decay)
    found = []
    settles = np.array([seen.rule(layer).settles for layer in range(len(run.names))])
    kept = np.flatnonzero(seen.decay.keeps_norm & (decay > 0) & ~settles)
    if len(kept):
        what = f"The weight decay of {len(kept)} tracked layers has no effect: a rule keeps their norms."
        found.append(seen.finding("idle_decay", seen.all_records, kept, what, severity="note"))
    total = seen.taken[-1]
    idle = (decay > 0) & (total < IDLE_DECAY) & ~seen.decay.keeps_norm
    idle[_hardly_turn(seen)] = False  # their learning rate is the matter
    if seen.duration < SHORT_RUN:
        return found
    pace = seen.duration / total  # steps in which ln‖w‖ falls by 1
    order = np.argsort(total, kind="stable")
    layers = order[idle[order]]
    alike = layers[pace[layers] > LONGEST_RUN], layers[pace[layers] <= LONGEST_RUN]
    return [*found, *(_idle(seen, layers, decay, pace) for layers in alike if len(layers))]


def _idle(seen: _Seen, layers: Indices, decay: Array, pace: Array) -> Finding:
    """Of layers that are alike in whether a run could be long enough for their decay."""
    least = layers[0]
    total = seen.duration / pace[least]
    what = (
        f"The weight decay of {_show(decay[least])} shortens {seen.named(layers)} by {_show(100 * total)} % in "
        f"all {seen.duration:,.0f} steps together."
    )
    if total == 0:
        return seen.finding("idle_decay", seen.all_records, layers, what, "Leave it out, or make it larger.")
    new = f"About {_show(decay[least] * USEFUL_DECAY / total, 1)} would matter in a run as short as this one"
    if pace[least] > LONGEST_RUN:
        advice = f"It needs about {_show(pace[least])} steps to matter. {new}; else leave it out."
        return seen.finding("idle_decay", seen.all_records, layers, what, advice)
    advice = (
        f"The run is short: this decay needs about {_show(pace[least])} steps to matter. In a run of that length leave "
        f"it as it is. {new}."
    )
    return seen.finding("idle_decay", seen.all_records, layers, what, advice, "note")


def _equilibrium(seen: _Seen) -> list[Finding]:
    layers = seen.tracked[np.nan_to_num(seen.taken[-1, seen.tracked]) > 0]
    if not len(layers):
        return []
    balanced, start = _balanced(seen, layers)
    share = balanced.mean(axis=1)
    taken = np.median(seen.taken[:-1, layers], axis=1)
    found = []
    stretches = [at for at in _stretches(share >= MOST, 3) if taken[at[-1]] - taken[at[0]] >= WINDOW]
    if stretches:
        at = max(stretches, key=lambda at: taken[at[-1]] - taken[at[0]])
        records = seen.all_records[start[at[0]].max() : at[-1] + 1]
        what = (
            f"From step {seen.steps[records[0]]} to {seen.steps[records[-1]]} growth and weight decay balance: the "
            f"norms of {'all' if share[at].min() == 1 else 'most of'} {len(layers)} tracked layers hardly change. They "
            f"turn by {_range(_quantile(seen.angle[at][:, layers]))} rad per step{_against(seen, at, layers)}."
        )
        found.append(seen.finding("in_equilibrium", records, layers, what, severity="note"))
    # at the end of an annealing nothing is in equilibrium, and nothing moves
    lr = np.nanmax(np.where(np.isfinite(seen.run.lr), seen.run.lr, -np.inf)[:, layers], axis=1)
    high = np.flatnonzero(lr >= ANNEALED * lr.max())
    away = layers[~balanced[high[-1]]]
    if not len(away) or len(_dead_records(seen)):
        return found
    last = high[-max(1, len(high) // 10) :]
    what = (
        f"Tracked layers that are not in equilibrium at step {seen.steps[last[-1]]}: {len(away)} of {len(layers)}. "
        f"They turn by {_range(_quantile(seen.angle[last][:, away]))} rad per step{_against(seen, last, away)}."
    )
    settled = _quantile(seen.decay.angle[last][:, away])
    near = np.abs(np.log(_quantile(seen.angle[last][:, away]) / settled)) < math.log(1 + BALANCED) / 2
    if near.any():
        what += (
            f" Already at about this angle: {near.sum()} of {len(away)}. That is chance so far: their norms still "
            "move, or have not kept still for long enough."
        )
    pace = _mean(_quantile(seen.decay.share[high])[away])
    if pace > 0:
        way = seen.taken[last[-1] + 1, away].max()
        what += f" At the usual learning rate and decay it takes about {_show(1 / pace)} steps to get there"
        what += f"; the run has made {way:.0%} of the way by then." if way < 1 else "."
    return [*found, seen.finding("transient", last, away, what, severity="note")]


def _balanced(seen: _Seen, layers: Indices) -> tuple[NDArray[np.bool_], Indices]:
    """[T, L] of `layers`: whether growth and decay balance in the `WINDOW` before each record, and where it starts."""
    norm = seen.run.weight_norm[:, layers]
    log_norm, taken = np.log(np.where(norm > 0, norm, np.nan)), seen.taken[:-1, layers]
    start = np.zeros(taken.shape, dtype=np.intp)
    balance = np.full(taken.shape, np.nan)
    for i in range(len(layers)):
        start[:, i] = np.searchsorted(taken[:, i], taken[:, i] - WINDOW, side="right") - 1
        t = np.flatnonzero(start[:, i] >= 0)
        balance[t, i] = (log_norm[t, i] - log_norm[start[t, i], i]) / (taken[t, i] - taken[start[t, i], i])
    return np.abs(balance) < BALANCED, start


def _against(seen: _Seen, records: Indices, layers: Indices) -> str:
    """The angle of the equilibrium, in words; nothing where no formula is known."""
    settled = _quantile(seen.decay.angle[records][:, layers])
    if not np.isfinite(settled).any():
        return ""
    optimizer = seen.run.optimizer.rpartition(".")[2]
    formula = "for independent gradients"
    if optimizer in ("Adam", "AdamW"):
        formula = "√(2λω(1−β₁)/(1+β₁))"
    elif optimizer in ("SGD", "ELRSGD") and not any(
        seen.option(int(layers[0]), option) for option in ("nesterov", "dampening")
    ):
        formula = "√(2λω/(1+μ))"
    return f"; at the equilibrium of this learning rate and decay it is {_range(settled)} rad ({formula})"


def _rule(seen: _Seen) -> list[Finding]:
    run, tracked = seen.run, seen.tracked
    if run.control is not None:
        what = (
            f'elropt.control with the rule "{run.control}" decides how far {len(tracked)} tracked layers turn'
        )
        return [_kept(seen, tracked, what)]
    found = []
    rules = [seen.option(int(layer), "rule") for layer in tracked]
    for rule in dict.fromkeys(rule for rule in rules if isinstance(rule, str)):
        layers = tracked[[other == rule for other in rules]]
        s = run.grad_factor[:, layers]
        spec = seen.rule(int(layers[0]))
        if spec.ends:
            found.append(_ending_rule(seen, rule, layers))
        elif spec.keeps_radius:
            found.append(
                _kept(seen, layers, f'The rule "{rule}" decides how far {len(layers)} tracked layers turn')
            )
        else:
            what = (
                f'The rule "{rule}" gives {len(layers)} tracked layers the same ELR: it multiplies their gradients by '
                f"{_range(s[s > 0])}."
            )
            found.append(seen.finding("rule", seen.all_records, layers, what, severity="note"))
    return found


def _kept(seen: _Seen, layers: Indices, what: str) -> Finding:
    what += f", {_range(_quantile(seen.angle[:, layers].T))} rad per step, and keeps their norms."
    return seen.finding("rule", seen.all_records, layers, what, severity="note")


def _ending_rule(seen: _Seen, rule: str, layers: Indices) -> Finding:
    """From the records at which the factors of the rule are not 1."""
    run = seen.run
    acts = np.flatnonzero(rule_acts(run, layers))
    if not len(acts):
        what = f'The rule "{rule}" had handed over to plain SGD before the first record.'
        return seen.finding("rule", seen.all_records, layers, what, severity="note")
    spread = spread_of(run.grad_norm[:, layers] / run.weight_norm[:, layers])
    after = acts[-1] + 1
    ends = after < len(run.steps)
    what = (
        f'The rule "{rule}" acts on {len(layers)} tracked layers from step {seen.steps[acts[0]]} on, where their '
        f"‖g‖/‖w‖ differ by a factor of {_show(spread[acts[0]])}. "
    )
    if ends:
        what += (
            f"It handed over to plain SGD by step {seen.steps[after]}, at a factor of {_show(spread[after])}."
        )
    else:
        what += f"It has not handed over by the last record; there the factor is {_show(spread[-1])}."
    records = seen.all_records[acts[0] : after + 1]
    return seen.finding("rule", records, layers, what, severity="note")


def _show(value: ArrayLike, digits: int = 2) -> str:
    """With so many digits, and without an exponent where that is easier to read."""
    rounded = float(f"{float(np.asarray(value)):.{digits}g}")
    if 1e3 <= abs(rounded) < 1e7:
        return f"{rounded:,.0f}"
    return f"{rounded:.0f}" if 10 <= abs(rounded) < 1e3 else f"{rounded:g}"


def _of(count: int, run: RunHistory) -> str:
    return f"{count} of {len(run.names)} layers"


def _range(values: Array) -> str:
    values = values[np.isfinite(values)]
    if not len(values):
        return "nan"
    low, high = _show(values.min()), _show(values.max())
    return low if low == high else f"{low} to {high}"


def _mean(values: Array) -> float:
    """Geometric, of what is positive; NaN without any."""
    positive = values[values > 0]
    return float(np.exp(np.log(positive).mean())) if len(positive) else math.nan


def _peak(values: Array) -> Array:
    """The largest over the first axis; NaN where nothing is finite."""
    return _quantile(values, 1.0)


def _quantile(values: Array, at: float = 0.5) -> Array:
    """Over the first axis, of what is finite; NaN where nothing is. `np.nanquantile` takes 100 times as long."""
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)  # NaN comes last
    last = np.maximum(np.isfinite(ordered).sum(axis=0) - 1, 0)
    place = at * last
    below = np.floor(place).astype(np.intp)
    above = np.minimum(below + 1, last)
    low, high = (np.take_along_axis(ordered, index[None], axis=0)[0] for index in (below, above))
    return low + (place - below) * (high - low)


def _stretches(holds: ArrayLike, gap: int) -> list[Indices]:
    """The records at which something holds, parted where more than `gap` records lie between two of them."""
    at = np.flatnonzero(holds)
    return np.split(at, np.flatnonzero(np.diff(at) > gap) + 1) if len(at) else []


_LOOKS: tuple[Callable[[_Seen], Sequence[Finding]], ...] = (
    _died,
    _not_finite,
    _large_angles,
    _spikes,
    _small_angles,
    _uneven_angles,
    _norm_growth,
    _idle_decay,
    _equilibrium,
    _rule,
)
