"""What the study concludes from its rows, and the verdict on each of its questions.

A seed decides the weights and the batches at the start, and two methods have parted after a few steps. So what counts
for an interval is how far the seeds of all methods of a task scatter, pooled: three seeds of one method say little of
it. Differences are by seed. Words such as "ahead" are corrected for the number of comparisons.

What a row is for is told by its own task, method, learning rate and part, so a result without some blocks is
summarized as far as it goes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.common.dataset import Metric, metric_of
from benchmarks.common.statistics import CONFIDENCE, curve, grouped, usable_range
from benchmarks.common.sweep import Row
from benchmarks.common.training import Task, run_of
from benchmarks.studies.comparison import USABLE, label, times, top
from benchmarks.studies.evidence.plan import (
    COSINE_SQUARED,
    OURS,
    RELEASED,
    by_steps,
    chosen_as,
    without_epochs,
)

# They end the name of a method that has another learning rate than its own: SGD's, or the one of `plan.by_steps`.
AT_SGDS, BY_STEPS = " at SGD's lr", " at lr ∝ 1/steps"
SWAPPED_IN = (*OURS, "warmup")  # are measured at SGD's learning rate
RULES = (
    *OURS,
    *(name + end for end in (AT_SGDS, BY_STEPS) for name in OURS),
    *("warmup", "uniform", "angle"),
)
BASELINES = ("sgd", "sgd+linear")
LEVELS = (0.8, 0.9, 0.95, 1.0)  # shares of the best SGD's last gain over chance, for the epochs to accuracy
NOT_YET = "not measured yet"
Scores = dict[int, float]  # by fresh seed
Point = tuple[float, float, float]  # epoch, seconds, metric


class Found(NamedTuple):
    """The rows of a study by what they are for. Scores are the metric's: more is better."""

    units: dict[str, str]  # of the learning rate, by method
    metric: dict[Task, Metric]
    chance: dict[Task, float]
    choosing: dict[Task, dict[str, dict[float, float]]]  # task → method → learning rate → score
    final: dict[Task, dict[tuple[str, float], Scores]]  # task → (method, learning rate) → seed → score
    curves: dict[Task, dict[tuple[str, float], list[list[Point]]]]  # … → a curve for each seed

    def chosen_on(self, task: Task) -> Task:
        """Where the learning rates of a task were chosen: on it, else on the same task with other epochs, else on the
        same net with other epochs, width and size of the images."""
        for like in (lambda it: it, without_epochs, family):
            for other in self.choosing:
                if like(other) == like(task):
                    return other
        return task

    def lr(self, task: Task, method: str) -> float | None:
        """The learning rate of a method: SGD's or the one of `plan.by_steps` if its name says so, else the best one of
        the runs for choosing; None if it is not known."""
        if method.endswith(AT_SGDS):
            return self.lr(task, "sgd")
        chosen_on = self.chosen_on(task)
        scores = self.choosing.get(chosen_on, {}).get(chosen_as(plain_name(method)))
        if not scores:
            return None
        best = max(scores, key=scores.__getitem__)
        return by_steps(best, chosen_on, task) if method.endswith(BY_STEPS) else best

    def scores(self, task: Task, method: str) -> Scores:
        """Test scores of a method by seed, at its learning rate; empty if there are none."""
        lr = self.lr(task, method)
        return {} if lr is None else self.final.get(task, {}).get((plain_name(method), lr), {})

    def methods(self, task: Task) -> list[str]:
        """The methods of a task that have rows, then those at another learning rate, if it is another."""
        names = dict.fromkeys([*self.choosing.get(task, {}), *(name for name, _ in self.final.get(task, {}))])
        result = [name for name in names if name in self.choosing.get(task, {}) or self.scores(task, name)]
        seen = {(name, self.lr(task, name)) for name in result}
        for ending in (AT_SGDS, BY_STEPS):
            for name in names:
                key = name, self.lr(task, name + ending)
                if self.is_other(task, name, ending) and key not in seen and self.scores(task, name + ending):
                    seen.add(key)
                    result.append(name + ending)
        return result

    def is_other(self, task: Task, method: str, ending: str) -> bool:
        """Whether a method is compared at the learning rate of `ending` too, and it is another than its own."""
        return (ending == BY_STEPS or method in SWAPPED_IN) and (
            self.lr(task, method + ending) != self.lr(task, method)
        )

    def best_sgd(self, task: Task) -> str | None:
        """SGD or SGD with a linear warm-up, the better one by validation, of those with test rows."""
        there = [name for name in BASELINES if self.scores(task, name)]
        chosen = self.choosing.get(self.chosen_on(task), {})
        return max(there, key=lambda name: max(chosen[name].values()), default=None)

    def noise(self, task: Task) -> tuple[float, int]:
        """The standard deviation of a test score over the seeds, pooled over all methods of a task, and its degrees of
        freedom; NaN without two seeds of any."""
        groups = [list(scores.values()) for scores in self.final.get(task, {}).values()]
        freedom = sum(len(group) - 1 for group in groups)
        squares = sum(np.var(group) * len(group) for group in groups)
        return (math.sqrt(squares / freedom) if freedom else math.nan), freedom

    def difference(self, task: Task, ours: str, theirs: str | None) -> dict[str, Any] | None:
        """How much better `ours` is: an interval, and `p`, how likely so large a difference is if there is none. By
        seed, with the pooled noise of the task; None without a common seed."""
        a, b = self.scores(task, ours), self.scores(task, theirs) if theirs else {}
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            return None
        mean = float(np.mean([a[seed] - b[seed] for seed in seeds]))
        deviation, freedom = self.noise(task)
        error = deviation * math.sqrt(2 / len(seeds))
        p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error > 0 else math.nan
        return {**around(mean, error, freedom, len(seeds)), "p": p}


def around(mean: float, error: float, freedom: int, n: int) -> dict[str, Any]:
    """Student's interval."""
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error if freedom else math.nan
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def plain_name(method: str) -> str:
    """The name of a method, whatever its learning rate."""
    return method.removesuffix(AT_SGDS).removesuffix(BY_STEPS)


def family(task: Task) -> Task:
    """The same net whatever its width, the size of the images and the epochs."""
    model = re.sub(r"-w\d+$", "", task.model)
    return dataclasses.replace(without_epochs(task), model=model, image_size=None)


def find(rows: Sequence[Row]) -> Found:
    """Sort rows by what they are for. Raises ValueError if two tasks have the same label: rows of a CPU and of a GPU,
    for example, do not belong into one result."""
    found = Found({}, {}, {}, {}, {}, {})
    for row in rows:
        run, metric = run_of(row["spec"]), metric_of(row)
        found.units[run.method.name] = run.method.unit
        found.metric[run.task], found.chance[run.task] = metric, metric.chance(row)
        if run.part == "val":
            of_method = found.choosing.setdefault(run.task, {}).setdefault(run.method.name, {})
            of_method[run.lr] = metric.score(row)
        else:
            key = run.method.name, run.lr
            found.final.setdefault(run.task, {}).setdefault(key, {})[run.seed] = metric.score(row)
            points = [(e, s, math.nan if value is None else value) for e, s, value in row["curve"]]
            found.curves.setdefault(run.task, {}).setdefault(key, []).append(points)
    for name, tasks in grouped(found.metric, lambda task: label(vars(task))).items():
        if len(tasks) > 1:
            different = [key for key in vars(tasks[0]) if len({getattr(task, key) for task in tasks}) > 1]
            raise ValueError(
                f"rows of {len(tasks)} tasks called {name!r}, which differ in {', '.join(different)}: "
                "keep them in files of their own"
            )
    return found


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """By task, every method; by question, what came out and the verdict."""
    found = find(rows)
    return {
        "tasks": {label(vars(task)): of_task(found, task) for task in found.metric},
        "questions": {name: {"asked": asked, **answer(found)} for name, (asked, answer) in QUESTIONS.items()},
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
        scores, lr = choosing.get(name, {}), found.lr(task, name)
        range_ = usable_range(curve(list(scores.items())), bar) if scores else None
        result[name] = {
            "lr": lr,
            "lr_at_edge": bool(scores) and lr in (min(scores), max(scores)),
            "validation": metric.value(max(scores.values())) if scores else None,
            "test": test_interval(found, task, name),
            "better_than_best_sgd": None if name == baseline else found.difference(task, name, baseline),
            "usable": None if range_ is None else {**range_._asdict(), "width": range_.width},
            "curve": mean_curve(found, task, name),
            "epochs_to": epochs_to.get(name),
        }
    return result


def test_interval(found: Found, task: Task, method: str) -> dict[str, Any] | None:
    """Mean and interval of the test metric, as it is shown; None without test rows."""
    values = [found.metric[task].value(score) for score in found.scores(task, method).values()]
    if not values:
        return None
    deviation, freedom = found.noise(task)
    return around(float(np.mean(values)), deviation / math.sqrt(len(values)), freedom, len(values))


def mean_curve(found: Found, task: Task, method: str) -> list[tuple[float, float]]:
    """(epoch, validation metric) at a method's learning rate, means over the fresh seeds; NaN from where on a seed has
    none, because its loss was no longer finite."""
    lr = found.lr(task, method)
    curves = [] if lr is None else found.curves.get(task, {}).get((plain_name(method), lr), [])
    factor = abs(found.metric[task].factor)
    means = [
        factor * float(np.mean([points[index][2] if index < len(points) else math.nan for points in curves]))
        for index in range(max(map(len, curves), default=0))
    ]
    longest = max(curves, key=len, default=[])
    return [(epoch, mean) for (epoch, *_), mean in zip(longest, means, strict=True)]


def epochs_to_levels(found: Found, task: Task, baseline: str) -> dict[str, list[float | None]]:
    """Of every method: the epochs until the mean validation metric first has each of `LEVELS` of the gain that the
    baseline has at the end."""
    metric, chance = found.metric[task], abs(found.chance[task])
    last = mean_curve(found, task, baseline)[-1:]
    if not last:
        return {}
    sign = np.sign(metric.factor)
    bars = [chance + level * (last[0][1] - chance) for level in LEVELS]
    return {
        name: [next((e for e, value in points if sign * value >= sign * bar), None) for bar in bars]
        for name in found.methods(task)
        if (points := mean_curve(found, task, name))
    }


def comparison(gains: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """Of differences: which are there, and whose p stays below 5 % after correction for their number (Benjamini and
    Hochberg, 1995), ahead and behind."""
    better = {name: gain for name, gain in gains.items() if gain}
    known = {name: gain["p"] for name, gain in better.items() if math.isfinite(gain["p"])}
    p = dict(zip(known, stats.false_discovery_control(list(known.values())) if known else [], strict=True))
    sure = [name for name in better if p.get(name, 1.0) < 1 - CONFIDENCE]
    return {
        "better": better,
        "ahead": [name for name in sure if better[name]["mean"] > 0],
        "behind": [name for name in sure if better[name]["mean"] < 0],
    }


def told_apart(result: Mapping[str, dict[str, Any]]) -> str:
    """By task: who is ahead and who is behind, in words; else how large a difference would have to be."""
    parts = []
    for task, it in result.items():
        words = [f"{side} {', '.join(it[side])}" for side in ("ahead", "behind") if it[side]]
        half = max((gain["high"] - gain["mean"] for gain in it["better"].values()), default=math.nan)
        parts.append(f"{task}: {'; '.join(words) or f'none told apart from 0 (±{half:.2g})'}")
    return ". ".join(parts) or NOT_YET


def tuned(found: Found) -> dict[str, Any]:
    """On every task with images that learning rates were chosen on: every method against the best-tuned SGD."""
    result = {}
    for task in image_tasks(found):
        baseline = found.best_sgd(task)
        others = [name for name in found.methods(task) if name != baseline]
        gains = {name: found.difference(task, name, baseline) for name in others}
        if task in found.choosing and any(gains.values()):
            result[label(vars(task))] = {"baseline": baseline, **comparison(gains)}
    return {"found": result, "verdict": told_apart(result)}


def untuned(found: Found) -> dict[str, Any]:
    """At SGD's own learning rate: surely at least SGD − 0.2 points on residual nets and + 3 on plain nets?"""
    result: dict[str, dict[str, Any]] = {}
    for task in image_tasks(found):
        aim = -0.2 if "resnet" in task.model else 3.0
        for name in SWAPPED_IN:
            gain = found.difference(task, name + AT_SGDS, "sgd")
            if gain is not None:
                outcome = "met" if gain["low"] >= aim else "missed" if gain["high"] < aim else "open"
                result.setdefault(label(vars(task)), {})[name] = {
                    "lr": found.lr(task, "sgd"),
                    "better": gain,
                    "better_than_linear": found.difference(task, name + AT_SGDS, "sgd+linear"),
                    "aim": aim,
                    "outcome": outcome,
                }
    words = [
        f"{task}: {name} {it['better']['mean']:+.1f} (aim {it['aim']:+g}), {it['outcome']}"
        for task, methods in result.items()
        for name, it in methods.items()
    ]
    return {"found": result, "verdict": "; ".join(words) or NOT_YET}


def budget(found: Found) -> dict[str, Any]:
    """Of a net at every number of epochs: how much better every method is than the best-tuned SGD."""
    result: dict[str, Any] = {}
    words = []
    for tasks in grouped(image_tasks(found), without_epochs).values():
        tasks = sorted((task for task in tasks if found.best_sgd(task)), key=lambda it: it.epochs)
        if len(tasks) < 2:
            continue
        plain = dict.fromkeys(plain_name(name) for task in tasks for name in found.methods(task))
        names = [
            name + end
            for end in ("", AT_SGDS, BY_STEPS)
            for name in plain
            if not end or any(found.is_other(task, name, end) for task in tasks)
        ]
        gains = {
            task: {name: found.difference(task, name, found.best_sgd(task)) for name in names}
            for task in tasks
        }
        for task in tasks:
            better = {
                name: gain for name, gain in gains[task].items() if gain and name != found.best_sgd(task)
            }
            result[label(vars(task))] = {"baseline": found.best_sgd(task), **comparison(better)}
        for name in names:
            means = [gain["mean"] for of_one in gains.values() if (gain := of_one[name])]
            if len(means) == len(tasks) and name not in BASELINES:
                words.append(f"{name} {', '.join(f'{mean:+.1f}' for mean in means)}")
        epochs = ", ".join(str(task.epochs) for task in tasks)
        words = [f"points at {epochs} epochs: {'; '.join(words) or 'no method has all of them'}"]
    return {"found": result, "verdict": ". ".join([*words, told_apart(result)] if result else [NOT_YET])}


def horizon(found: Found) -> dict[str, Any]:
    """A learning rate for the length of the run against the one that was chosen on a part of it, where the two are not
    the same."""
    result = {}
    for task, final in found.final.items():
        gains = {
            name: found.difference(task, name + BY_STEPS, name)
            for name in dict.fromkeys(name for name, _ in final)
            if found.is_other(task, name, BY_STEPS)
        }
        if any(gains.values()):
            result[label(vars(task))] = comparison(gains)
    return {"found": result, "verdict": told_apart(result)}


def annealing(found: Found) -> dict[str, Any]:
    """Another end of the schedule against the plain cosine, at the same learning rate."""
    return versus(found, (COSINE_SQUARED, RELEASED))


def warm_up(found: Found) -> dict[str, Any]:
    """With a linear warm-up against without, each at its own best learning rate."""
    return versus(found, ("+linear",))


def versus(found: Found, marks: Sequence[str]) -> dict[str, Any]:
    """Methods with one of these in their name, against those without: by task, how much better."""
    result = {}
    for task in found.final:
        gains = {
            name: found.difference(task, name, name.replace(mark, ""))
            for name in found.methods(task)
            for mark in marks
            if mark in name
        }
        if any(gains.values()):
            result[label(vars(task))] = comparison(gains)
    return {"found": result, "verdict": told_apart(result)}


def ranges(found: Found) -> dict[str, Any]:
    """How wide the range of usable learning rates is, of ours and of Muon, where that of SGD is not cut off."""
    result = {}
    for task in found.choosing:
        usable = {name: it["usable"] for name, it in of_task(found, task).items()}
        if any(usable.get(name) and is_cut(usable[name]) for name in BASELINES):
            continue
        widths = {name: it["width"] for name, it in usable.items() if it is not None}
        sgd = max((widths[name] for name in BASELINES if name in widths), default=None)
        if sgd is not None:
            shown = {name: widths.get(name) for name in (*OURS, "muon") if name in usable}
            result[label(vars(task))] = {"widths": widths, "sgd": sgd, "shown": shown}
    words = [
        f"{task}: SGD {times(it['sgd'])}; "
        + ", ".join(
            f"{name} {'none' if width is None else times(width)}" for name, width in it["shown"].items()
        )
        for task, it in result.items()
        if it["shown"]
    ]
    return {"found": result, "verdict": ". ".join(words) or NOT_YET}


def is_cut(usable: Mapping[str, Any]) -> bool:
    """Whether a usable range is only known to be at least so wide."""
    return usable["cut_low"] or usable["cut_high"]


def transfer(found: Found) -> dict[str, Any]:
    """Over nets that differ in width or depth: the range of a method's best learning rates (top of a parabola), and
    what the best one of the net with the most methods loses on the others, in points."""
    result: dict[str, Any] = {}
    nets = [task for task in found.choosing if re.match(r"resnet-\d+", task.model)]
    for tasks in grouped(nets, lambda task: dataclasses.replace(task, model="")).values():
        if len(tasks) < 3:
            continue
        tasks = sorted(tasks, key=lambda task: -len(found.choosing[task]))
        for name in found.choosing[tasks[0]]:
            if not all(name in found.choosing[task] for task in tasks):
                continue
            tops, losses = {}, {}
            middle = found.lr(tasks[0], name)
            for task in tasks:
                scores = found.choosing[task][name]
                lrs = sorted(scores)
                tops[task.model] = top(np.array(lrs), np.array([scores[lr] for lr in lrs]))
                if middle in scores:
                    losses[task.model] = max(scores.values()) - scores[middle]
            result[name] = {
                "lrs": tops,
                "range": max(tops.values()) / min(tops.values()),
                "losses": losses,
                "worst_loss": max(losses.values()) if len(losses) == len(tasks) else None,
            }
    words = [
        f"{name} {times(it['range'])}, "
        f"{'not measured' if it['worst_loss'] is None else format(it['worst_loss'], '.1f')} points"
        for name, it in result.items()
    ]
    verdict = "range of the best learning rates, and most that one for all loses: " + "; ".join(words)
    return {"found": result, "verdict": verdict if result else NOT_YET}


def batch(found: Found) -> dict[str, Any]:
    """Test accuracy at every batch size of one net, at equal epochs, of the methods that have all sizes."""
    result: dict[str, Any] = {}
    for tasks in grouped(image_tasks(found), lambda task: dataclasses.replace(task, batch_size=0)).values():
        if len(tasks) < 2:
            continue
        tasks = sorted(tasks, key=lambda it: it.batch_size)
        for name in found.methods(tasks[0]):
            of_size = {str(task.batch_size): test_interval(found, task, name) for task in tasks}
            if all(of_size.values()):
                result[name] = of_size
    kept = {name: list(of_size.values()) for name, of_size in result.items()}
    changes = {name: tests[-1]["mean"] - tests[0]["mean"] for name, tests in kept.items()}
    words = [f"{name} {change:+.1f}" for name, change in sorted(changes.items(), key=lambda it: -it[1])]
    verdict = "points from the smallest to the largest: " + ", ".join(words)
    return {"found": result, "verdict": verdict if words else NOT_YET}


def language(found: Found) -> dict[str, Any]:
    """The tuned methods on text, against AdamW and Muon, in nats: above 0 is better."""
    result = {}
    for task in found.final:
        for peer in ("adamw", "muon") if task.data == "python" else ():
            others = [name for name in found.methods(task) if name != peer]
            gains = {name: found.difference(task, name, peer) for name in others}
            if any(gains.values()):
                result[f"{label(vars(task))}, against {peer}"] = comparison(gains)
    return {"found": result, "verdict": told_apart(result)}


def default(found: Found) -> dict[str, Any]:
    """Of our rules: how much better than the best-tuned SGD, in the mean over the nets with images and at worst. The
    best of several is by chance somewhat better than it will be again."""
    tasks = [task for task in image_tasks(found) if task in found.choosing and found.best_sgd(task)]
    batch_size = min((task.batch_size for task in tasks), default=0)
    tasks = [task for task in tasks if task.batch_size == batch_size]
    result, missing = {}, []
    for name in RULES:
        gains = {label(vars(task)): found.difference(task, name, found.best_sgd(task)) for task in tasks}
        means = [gain["mean"] for gain in gains.values() if gain]
        if means and len(means) == len(tasks):
            result[name] = {"mean": float(np.mean(means)), "worst": min(means), "tasks": list(gains)}
        elif means:
            missing.append(name)
    ordered = sorted(result, key=lambda name: -result[name]["mean"])
    words = ", ".join(
        f"{name} {result[name]['mean']:+.1f} (worst {result[name]['worst']:+.1f})" for name in ordered
    )
    without = f"; not on all: {', '.join(missing)}" if missing else ""
    verdict = f"points to the best-tuned SGD, mean of {len(tasks)} nets: {words or 'none'}{without}"
    return {"found": result, "verdict": verdict if tasks else NOT_YET}


def image_tasks(found: Found) -> list[Task]:
    """The tasks with images that have runs with fresh seeds."""
    return [task for task in found.final if task.data != "python"]


QUESTIONS: dict[str, tuple[str, Callable[[Found], dict[str, Any]]]] = {  # what is asked, and who answers
    "tuned": ("against the best-tuned SGD", tuned),
    "untuned": ("swapped in at SGD's own learning rate and decay", untuned),
    "budget": ("ahead of SGD at every budget", budget),
    "horizon": ("does a learning rate chosen on a third of the steps suit all of them", horizon),
    "annealing": ("which end of the schedule keeps the early gain", annealing),
    "range": ("three times SGD's range of usable learning rates (a third of the steps, one seed)", ranges),
    "warm-up": ("is a linear warm-up of the learning rate still needed", warm_up),
    "transfer": ("one learning rate for all widths and depths", transfer),
    "batch": ("large batches at equal epochs", batch),
    "text": ("a language model: AdamH and MuonH against AdamW and Muon", language),
    "default": ("which rule to recommend first where weight decay is on", default),
}
