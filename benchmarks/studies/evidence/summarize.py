"""What the study concludes from its rows, and the verdict on each of its questions.

Differences are paired by seed; intervals are Student's at 95 %. What a row is for is told by its own task, method,
learning rate and part, so a result without some blocks is summarized as far as it goes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.dataset import Metric, metric_of
from benchmarks.common.statistics import (
    curve,
    grouped,
    paired,
    student_interval,
    usable_range,
)
from benchmarks.common.sweep import Row
from benchmarks.common.training import Task, run_of
from benchmarks.studies.comparison import USABLE, label, top
from benchmarks.studies.evidence.plan import (
    COSINE_SQUARED,
    OURS,
    RELEASED,
    by_steps,
    chosen_as,
    without_epochs,
)

QUESTIONS = {
    "tuned": "at its own best learning rate, against the best-tuned SGD",
    "untuned": "swapped in at SGD's own learning rate and decay",
    "budget": "ahead of SGD at every budget",
    "horizon": "does a learning rate chosen on a third of the steps suit all of them, or a third of it",
    "annealing": "which end of the schedule keeps the early gain",
    "range": "three times SGD's range of usable learning rates",
    "warm-up": "is a linear warm-up of the learning rate still needed",
    "transfer": "one learning rate for all widths and depths",
    "batch": "large batches at equal epochs",
    "text": "a language model: AdamH and MuonH against AdamW and Muon",
    "default": "which rule to recommend first where weight decay is on",
}
BASELINES = ("sgd", "sgd+linear")
# They end the name of a method that has another learning rate than its own: SGD's, or the one of `plan.by_steps`.
AT_SGDS, BY_STEPS = " at SGD's lr", " at lr ∝ 1/steps"
RULES = (
    *OURS,
    *(name + end for end in (AT_SGDS, BY_STEPS) for name in OURS),
    "equilibrium-gradient-filter",
    "warmup",
    "uniform",
    "angle",
)
LEVELS = (0.8, 0.9, 0.95, 1.0)  # shares of the best SGD's last gain over chance, for the epochs to accuracy
Scores = dict[int, float]  # by fresh seed


class Found(NamedTuple):
    """The rows of a study by what they are for. Scores are the metric's: more is better."""

    units: dict[str, str]  # of the learning rate, by method
    metric: dict[Task, Metric]
    chance: dict[Task, float]
    choosing: dict[Task, dict[str, dict[float, float]]]  # task → method → learning rate → score
    final: dict[Task, dict[tuple[str, float], Scores]]  # task → (method, learning rate) → seed → score
    curves: dict[
        Task, dict[tuple[str, float], list[list[Sequence[float]]]]
    ]  # … → of each seed: (epoch, seconds, value)

    def chosen_on(self, task: Task) -> Task:
        """Where the learning rates of a task were chosen: on it, or on the same task with other epochs (a budget)."""
        same = (other for other in self.choosing if without_epochs(other) == without_epochs(task))
        return task if task in self.choosing else next(same, task)

    def best_lr(self, task: Task, method: str) -> float | None:
        """The learning rate that was chosen for a method; without runs for choosing, the only one that there is."""
        if method.endswith(AT_SGDS):
            return self.best_lr(task, "sgd")
        if method.endswith(BY_STEPS):
            lr = self.best_lr(task, plain_name(method))
            return None if lr is None else by_steps(lr, self.chosen_on(task), task)
        if scores := self.choosing.get(self.chosen_on(task), {}).get(chosen_as(method)):
            return max(scores, key=scores.__getitem__)
        lrs = {lr for name, lr in self.final.get(task, {}) if name == method}
        return lrs.pop() if len(lrs) == 1 else None

    def tuned(self, task: Task, method: str) -> Scores:
        """Test scores by seed at the method's own learning rate; empty if there are none."""
        lr = self.best_lr(task, method)
        return {} if lr is None else self.final.get(task, {}).get((plain_name(method), lr), {})

    def methods(self, task: Task) -> list[str]:
        """All methods with a row on a task."""
        final = self.final.get(task, {})
        others = [
            name + ending
            for ending in (AT_SGDS, BY_STEPS)
            for name, lr in final
            if lr == self.best_lr(task, name + ending) != self.best_lr(task, name)
        ]
        return list(dict.fromkeys([*self.choosing.get(task, {}), *(name for name, _ in final), *others]))

    def best_sgd(self, task: Task) -> str | None:
        """SGD or SGD with a linear warm-up, the better one by validation, of those with test rows."""
        there = [name for name in BASELINES if self.tuned(task, name)]
        chosen = self.choosing.get(self.chosen_on(task), {})
        return max(there, key=lambda name: max(chosen.get(name, {0: -np.inf}).values()), default=None)


def plain_name(method: str) -> str:
    """The name of a method, whatever its learning rate."""
    return method.removesuffix(AT_SGDS).removesuffix(BY_STEPS)


def find(rows: Sequence[Row]) -> Found:
    """Sort rows by what they are for."""
    found = Found({}, {}, {}, {}, {}, {})
    for row in rows:
        run, metric = run_of(row["spec"]), metric_of(row)
        found.units[run.method.name] = run.method.unit
        found.metric[run.task], found.chance[run.task] = metric, metric.chance(row)
        if run.part == "val":
            found.choosing.setdefault(run.task, {}).setdefault(run.method.name, {})[run.lr] = metric.score(
                row
            )
        else:
            key = run.method.name, run.lr
            found.final.setdefault(run.task, {}).setdefault(key, {})[run.seed] = metric.score(row)
            found.curves.setdefault(run.task, {}).setdefault(key, []).append(row["curve"])
    return found


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """By task, every method; by question, what came out and the verdict."""
    found = find(rows)
    return {
        "tasks": {label(vars(task)): of_task(found, task) for task in found.metric},
        "questions": {
            name: {"asked": asked, **answer(found)}
            for (name, asked), answer in zip(QUESTIONS.items(), ANSWERS, strict=True)
        },
    }


def of_task(found: Found, task: Task) -> dict[str, Any]:
    """method → what came out. A learning rate is usable if it has `USABLE` of the best method's gain over chance."""
    metric, choosing = found.metric[task], found.choosing.get(task, {})
    best = max((max(scores.values()) for scores in choosing.values()), default=np.nan)
    bar = found.chance[task] + USABLE * (best - found.chance[task])
    baseline = found.best_sgd(task)
    epochs_to = epochs_to_levels(found, task, baseline) if baseline else {}
    result = {}
    for name in found.methods(task):
        scores = choosing.get(name, {})
        test, lr = found.tuned(task, name), found.best_lr(task, name)
        range_ = usable_range(curve(list(scores.items())), bar) if scores else None
        result[name] = {
            "best_lr": lr,
            "best_lr_at_edge": bool(scores) and lr in (min(scores), max(scores)),
            "validation": metric.value(max(scores.values())) if scores else None,
            "test": metric_interval(metric, test),
            "better_than_best_sgd": None
            if name == baseline
            else difference(test, found.tuned(task, baseline or "")),
            "usable": None if range_ is None else {**range_._asdict(), "width": range_.width},
            "curve": mean_curve(found, task, name),
            "epochs_to": epochs_to.get(name),
        }
    return result


def metric_interval(metric: Metric, scores: Scores) -> dict[str, Any] | None:
    """Mean and interval of test scores as they are shown."""
    return student_interval([metric.value(score) for score in scores.values()])._asdict() if scores else None


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """How much better, by seed; None without a common seed."""
    return paired(ours, theirs, student_interval)._asdict() if ours.keys() & theirs.keys() else None


def mean_curve(found: Found, task: Task, method: str) -> list[tuple[float, float]]:
    """(epoch, validation metric) at a method's own learning rate, means over the fresh seeds."""
    lr = found.best_lr(task, method)
    curves = [] if lr is None else found.curves.get(task, {}).get((plain_name(method), lr), [])
    metric = found.metric[task]
    points = [np.mean(at, axis=0) for at in zip(*curves, strict=False)]
    return [(float(epoch), float(abs(metric.factor) * value)) for epoch, _, value in points]


def tuned(found: Found) -> dict[str, Any]:
    """On every task with images that learning rates were chosen on: who is surely better or worse than the best-tuned
    SGD."""
    result = {}
    for task in image_tasks(found):
        baseline = found.best_sgd(task)
        if baseline is None or task not in found.choosing:
            continue
        better = {
            name: gain
            for name in found.methods(task)
            if name != baseline and (gain := difference(found.tuned(task, name), found.tuned(task, baseline)))
        }
        if better:
            result[label(vars(task))] = {"baseline": baseline, "better": better, **told_apart(better)}
    return {"found": result, "verdict": verdict_by_task(result)}


def told_apart(better: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The methods whose interval does not hold 0, on either side."""
    return {
        "ahead": [name for name, gain in better.items() if gain["low"] > 0],
        "behind": [name for name, gain in better.items() if gain["high"] < 0],
    }


def verdict_by_task(result: Mapping[str, dict[str, Any]]) -> str:
    """Who is ahead and who is behind, in words."""
    parts = []
    for task, it in result.items():
        words = [f"{side} {', '.join(it[side])}" for side in ("ahead", "behind") if it[side]]
        parts.append(f"{task}: {'; '.join(words) or 'no difference beyond the noise'}")
    return ". ".join(parts) or NOT_YET


NOT_YET = "not measured yet"


def untuned(found: Found) -> dict[str, Any]:
    """At SGD's own learning rate: at least SGD − 0.2 points on residual nets and + 3 on plain nets?"""
    result = {}
    for task in image_tasks(found):
        lr, sgd = found.best_lr(task, "sgd"), found.tuned(task, "sgd")
        aim = -0.2 if "resnet" in task.model else 3.0
        for name in (*OURS, "warmup"):
            gain = difference(found.tuned(task, name + AT_SGDS), sgd)
            if gain is not None:
                of_one = {"lr": lr, "better": gain, "aim": aim, "met": gain["mean"] >= aim}
                result.setdefault(label(vars(task)), {})[name] = of_one
    words = [
        f"{task}: {name} {it['better']['mean']:+.1f} (aim {it['aim']:+g}), {'met' if it['met'] else 'missed'}"
        for task, methods in result.items()
        for name, it in methods.items()
    ]
    return {"found": result, "verdict": "; ".join(words) or NOT_YET}


def budget(found: Found) -> dict[str, Any]:
    """Of the residual net at every number of epochs: how much better than the better one of SGD with and without
    warm-up."""
    result: dict[str, Any] = {}
    for tasks in grouped(image_tasks(found), without_epochs).values():
        if len({task.epochs for task in tasks}) < 2:
            continue
        for task in sorted(tasks, key=lambda it: it.epochs):
            baseline = found.best_sgd(task)
            if baseline is None:
                continue
            sgd = found.tuned(task, baseline)
            gains = {name: difference(found.tuned(task, name), sgd) for name in found.methods(task)}
            result[label(vars(task))] = {
                "baseline": baseline,
                "better": {name: gain for name, gain in gains.items() if gain and name != baseline},
            }
    every = [{name for name, gain in it["better"].items() if gain["mean"] > 0} for it in result.values()]
    ahead = sorted(set.intersection(*every)) if len(every) > 1 else []
    words = f"ahead in the mean at all {len(every)} budgets so far: {', '.join(ahead) or 'none'}"
    return {"found": result, "verdict": words if len(every) > 1 else NOT_YET}


def epochs_to_levels(found: Found, task: Task, baseline: str) -> dict[str, list[float | None]]:
    """Of every method: the epochs until the mean validation accuracy first has each of `LEVELS` of the gain that the
    baseline has at the end."""
    metric, chance = found.metric[task], abs(found.chance[task])
    last = mean_curve(found, task, baseline)[-1:]
    if not last:
        return {}
    result = {}
    for name in found.methods(task):
        points = mean_curve(found, task, name)
        if points:
            sign = np.sign(metric.factor)
            bars = [chance + level * (last[0][1] - chance) for level in LEVELS]
            result[name] = [
                next((e for e, value in points if sign * value >= sign * bar), None) for bar in bars
            ]
    return result


def horizon(found: Found) -> dict[str, Any]:
    """A learning rate for the length of the run against the one that was chosen on a part of it."""
    return versus(found, (BY_STEPS,))


def annealing(found: Found) -> dict[str, Any]:
    """Another end of the schedule against the plain cosine, at the same learning rate."""
    return versus(found, (COSINE_SQUARED, RELEASED))


def warm_up(found: Found) -> dict[str, Any]:
    """With a linear warm-up against without, each at its own best learning rate."""
    return versus(found, ("+linear",))


def versus(found: Found, endings: Sequence[str]) -> dict[str, Any]:
    """Methods whose names end in one of these, against those without: by task, how much better."""
    result: dict[str, Any] = {}
    for task in found.final:
        pairs = {
            name: gain
            for name in found.methods(task)
            for ending in endings
            if name.endswith(ending)
            and (gain := difference(found.tuned(task, name), found.tuned(task, name.removesuffix(ending))))
        }
        if pairs:
            result[label(vars(task))] = {"better": pairs, **told_apart(pairs)}
    return {"found": result, "verdict": verdict_by_task(result)}


def ranges(found: Found) -> dict[str, Any]:
    """How many times as wide as the best SGD's range of usable learning rates every method's is."""
    result = {}
    for task in found.choosing:
        usable = {name: it["usable"] for name, it in of_task(found, task).items()}
        widths = {name: it["width"] for name, it in usable.items() if it is not None}
        baseline = max((widths[name] for name in BASELINES if name in widths), default=None)
        if baseline is not None:
            of_ours = {name: widths.get(name) for name in OURS if name in usable}
            result[label(vars(task))] = {"widths": widths, "sgd": baseline, "ours": of_ours}
    words = [
        f"{task}: SGD ×{it['sgd']:.2g}; "
        + ", ".join(
            f"{name} {'none' if width is None else f'×{width:.2g}'}" for name, width in it["ours"].items()
        )
        for task, it in result.items()
        if it["ours"]
    ]
    return {"found": result, "verdict": ". ".join(words) or NOT_YET}


def transfer(found: Found) -> dict[str, Any]:
    """Over nets that differ in width or depth: the range of a method's best learning rates (top of a parabola), and
    what the best one of the middle net loses on the others, in points."""
    result: dict[str, Any] = {}
    family = [task for task in found.choosing if re.match(r"resnet-\d+", task.model)]
    for tasks in grouped(family, lambda task: dataclasses.replace(task, model="")).values():
        names = [
            name for name in found.methods(tasks[0]) if all(name in found.choosing[task] for task in tasks)
        ]
        if len(tasks) < 3:
            continue
        for name in names:
            tops, losses = {}, {}
            middle = found.best_lr(tasks[0], name)
            for task in tasks:
                scores = found.choosing[task][name]
                lrs = sorted(scores)
                tops[task.model] = top(np.array(lrs), np.array([scores[lr] for lr in lrs]))
                if middle in scores:
                    losses[task.model] = max(scores.values()) - scores[middle]
            result[name] = {
                "best_lrs": tops,
                "range": max(tops.values()) / min(tops.values()),
                "losses": losses,
                "worst_loss": max(losses.values(), default=None),
            }
    words = [f"{name} ×{it['range']:.2g}, {it['worst_loss']:.1f} points" for name, it in result.items()]
    verdict = "range of the best learning rates, and most that one for all loses: " + "; ".join(words)
    return {"found": result, "verdict": verdict if result else NOT_YET}


def batch(found: Found) -> dict[str, Any]:
    """Test accuracy of every method at every batch size of one net, at equal epochs."""
    result: dict[str, Any] = {}
    for tasks in grouped(image_tasks(found), lambda task: dataclasses.replace(task, batch_size=0)).values():
        if len(tasks) < 2:
            continue
        for task in sorted(tasks, key=lambda it: it.batch_size):
            for name in found.methods(task):
                if test := metric_interval(found.metric[task], found.tuned(task, name)):
                    result.setdefault(name, {})[str(task.batch_size)] = test
    kept = {
        name: of_size[max(of_size, key=int)]["mean"] - of_size[min(of_size, key=int)]["mean"]
        for name, of_size in result.items()
        if len(of_size) > 1
    }
    words = [f"{name} {change:+.1f}" for name, change in sorted(kept.items(), key=lambda it: -it[1])]
    return {
        "found": result,
        "verdict": "points from the smallest to the largest: " + ", ".join(words) if words else NOT_YET,
    }


def language(found: Found) -> dict[str, Any]:
    """The tuned methods on text, against AdamW and Muon, in nats: above 0 is better."""
    result: dict[str, Any] = {}
    for task in found.final:
        if task.data != "python":
            continue
        for peer in ("adamw", "muon"):
            theirs = found.tuned(task, peer)
            gains = {
                name: difference(found.tuned(task, name), theirs)
                for name in found.methods(task)
                if name != peer
            }
            if kept := {name: gain for name, gain in gains.items() if gain}:
                result[f"{label(vars(task))}, against {peer}"] = {"better": kept, **told_apart(kept)}
    return {"found": result, "verdict": verdict_by_task(result)}


def default(found: Found) -> dict[str, Any]:
    """Of our rules with results on every net with images: how much better than the best-tuned SGD, in the mean over the
    nets and at worst, each at its own learning rate."""
    tasks = [task for task in image_tasks(found) if task in found.choosing and found.best_sgd(task)]
    batch_size = min((task.batch_size for task in tasks), default=0)
    tasks = [task for task in tasks if task.batch_size == batch_size]
    result = {}
    for name in RULES:
        gains = {
            label(vars(task)): difference(
                found.tuned(task, name), found.tuned(task, found.best_sgd(task) or "")
            )
            for task in tasks
        }
        means = [gain["mean"] for gain in gains.values() if gain]
        if means and len(means) == len(tasks):
            result[name] = {"mean": float(np.mean(means)), "worst": min(means), "tasks": list(gains)}
    ordered = sorted(result, key=lambda name: -result[name]["mean"])
    words = [f"{name} {result[name]['mean']:+.1f} (worst {result[name]['worst']:+.1f})" for name in ordered]
    verdict = (
        f"points to the best-tuned SGD, mean of {len(tasks)} tasks: {', '.join(words)}" if words else NOT_YET
    )
    return {"found": result, "verdict": verdict}


def image_tasks(found: Found) -> list[Task]:
    """The tasks with images that have runs with fresh seeds."""
    return [task for task in found.final if task.data != "python"]


ANSWERS = (tuned, untuned, budget, horizon, annealing, ranges, warm_up, transfer, batch, language, default)
