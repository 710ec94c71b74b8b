"""What the study of width scaling concludes from its rows: classes, edges, exponents, transfer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common.statistics import Interval, geometric_interval, grouped, interval, paired
from benchmarks.common.sweep import Row
from benchmarks.studies.comparison import accuracy_matrix, best_lr, top

STABLE, CONTROLLED, CATASTROPHIC = CLASSES = ("stable", "controlled divergence", "catastrophic")
GROWTH = (
    10.0  # times its value at step 0, beyond which a norm has diverged; below 1/GROWTH, activations have died
)
EXPONENT = 0.2  # of the width, beyond which a norm counts as growing with it
MIN_WIDTHS = 3  # for an exponent

# Exponent of the largest stable global learning rate, docs/guide/width-scaling.md §4; with scaled groups it is 0.
PREDICTED = {
    ("sgd", "cross_entropy"): -0.5,
    ("sgd", "mse"): -1.0,
    ("adam", "cross_entropy"): -1.0,
    ("adam", "mse"): -1.5,
}
LAYERS = ("input", "hidden", "output")


def classify(columns: Mapping[str, Sequence[Any]]) -> str:
    """The class of one run, from its norms at the recorded steps against those at step 0 (`widths.Probe`).

    "catastrophic": at the last recorded step something is not finite; or the activations of a layer, the gradients with
    respect to them or those with respect to the logits have grown more than `GROWTH`-fold; or the activations of a
    layer have shrunk as much, as those of dead ReLUs do. "controlled divergence": else, if at any recorded step the
    logits had grown more than `GROWTH`-fold; they often come back as training goes on. Else "stable". Thresholds are
    the same at every width.
    """
    end = {name: np.array(columns[name][-1], dtype=np.float64) for name in columns}
    start = {name: np.array(columns[name][0], dtype=np.float64) for name in columns}
    if not all(np.isfinite(value).all() for value in end.values()):
        return CATASTROPHIC
    grown = ("activations", "activation_grads", "logit_grad")
    if any((end[name] > GROWTH * start[name]).any() for name in grown):
        return CATASTROPHIC
    if (end["activations"] < start["activations"] / GROWTH).any():
        return CATASTROPHIC
    return CONTROLLED if max(columns["logits"]) > GROWTH * start["logits"] else STABLE


def classify_exponents(exponents: Mapping[str, float]) -> str:
    """The class of a way to scale the learning rate with the width, from the exponents that norms then have.

    NaN, where runs have overflowed, counts as growing.
    """
    growing = {name for name, value in exponents.items() if not value <= EXPONENT}
    if growing & {"activation_change", "activation_grads", "logit_grad"}:
        return CATASTROPHIC
    return CONTROLLED if "logit_change" in growing else STABLE


class Edge(NamedTuple):
    """The largest learning rate of a grid below the first catastrophic one; open: none was catastrophic."""

    lr: float
    open: bool


def largest_stable(rows: Sequence[Row]) -> Edge | None:
    """Of the runs of one seed; None if even the smallest learning rate is catastrophic."""
    ascending = sorted(rows, key=lambda row: row["spec"]["lr"])
    fine = list(itertools.takewhile(lambda row: row["class"] != CATASTROPHIC, ascending))
    return Edge(fine[-1]["spec"]["lr"], len(fine) == len(ascending)) if fine else None


def of_part(rows: Sequence[Row], part: str) -> list[Row]:
    """The rows of a stage."""
    return [row for row in rows if row["spec"]["part"] == part]


def best_pilot(rows: Sequence[Row]) -> float:
    """The learning rate of the least loss at the end; the smallest if all runs are catastrophic."""
    ascending = sorted(rows, key=lambda row: row["spec"]["lr"])
    fine = [row for row in ascending if row["class"] != CATASTROPHIC] or ascending[:1]
    return min(fine, key=lambda row: math.inf if row["loss"] is None else row["loss"])["spec"]["lr"]


def open_ends(rows: Sequence[Row], *, has_edge: bool) -> tuple[bool, bool]:
    """Whether the grid of one width should reach further down, up: the best mean accuracy or an edge is at its end."""
    lrs, accuracies = accuracy_matrix(rows)
    best = int(accuracies.mean(axis=0).argmax())
    edges = [largest_stable(of_seed) for of_seed in by_seed(rows).values()]
    below = best == 0 or any(edge is None for edge in edges)
    above = best == len(lrs) - 1 or (has_edge and any(edge is not None and edge.open for edge in edges))
    return below, above


def by_seed(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Rows by their seed."""
    return grouped(rows, lambda row: row["spec"]["seed"])


def by_width(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Rows by width, ascending."""
    return grouped(sorted(rows, key=lambda row: row["spec"]["width"]), lambda row: row["spec"]["width"])


def label(setting: Mapping[str, Any]) -> str:
    """A setting in words."""
    name = {"sgd": "SGD", "adam": "Adam"}.get(setting["optimizer"], f'"{setting["optimizer"]}"')
    loss = {"cross_entropy": "CE", "mse": "MSE"}[setting["loss"]]
    net = "" if setting["model"].startswith("mlp") else f", {setting['model']}"
    return f"{name}, {loss}{', scaled' if setting['scaled'] else ''}{net}"


def chosen_lrs(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """From the validation runs of one setting: for every width its "own" best learning rate, and that of the "base"."""
    own = {}
    for width, of_width in by_width(rows).items():
        lrs, accuracies = accuracy_matrix(of_width)
        own[width] = float(lrs[accuracies.mean(axis=0).argmax()])
    base = own[rows[0]["spec"]["task"]["base_width"]]
    return {width: {"own": lr, "base": base} for width, lr in own.items()}


def slope(widths: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of the width: least squares of ln value over ln width.

    NaN below `MIN_WIDTHS` positive and finite values.
    """
    x, y = np.array(widths, dtype=np.float64), np.array(values, dtype=np.float64)
    usable = np.isfinite(y) & (y > 0)
    if usable.sum() < MIN_WIDTHS:
        return math.nan
    return float(np.polyfit(np.log(x[usable]), np.log(y[usable]), 1)[0])


def exponent(by_place: Mapping[int, Mapping[int, float]]) -> Interval:
    """Over seeds, from seed → width → value."""
    slopes = [slope(list(values), list(values.values())) for values in by_place.values()]
    return interval([value for value in slopes if math.isfinite(value)])


def summarize(rows: list[Row]) -> dict[str, Any]:
    """By setting: learning rates and their exponents, and transfer; exponents of norms by setting and α."""
    searched = grouped(of_part(rows, "val"), lambda row: label(row["spec"]["setting"]))
    fresh = grouped(of_part(rows, "test"), lambda row: label(row["spec"]["setting"]))
    return {
        "settings": {
            name: summarize_setting(of_one, fresh.get(name, [])) for name, of_one in searched.items()
        },
        "checks": summarize_checks(of_part(rows, "check")),
    }


def summarize_setting(rows: Sequence[Row], fresh: Sequence[Row]) -> dict[str, Any]:
    """Edge and best learning rate of every width, their exponents, and the test accuracies of the fresh seeds.

    A width whose mean best learning rate, or edge, is at an end of its grid is left out of the exponents.
    """
    chosen = chosen_lrs(rows)
    widths: dict[str, dict[str, Any]] = {}
    edges: dict[int, dict[int, float]] = {}
    tops: dict[int, dict[int, float]] = {}
    for width, of_width in by_width(rows).items():
        lrs, accuracies = accuracy_matrix(of_width)
        best = best_lr(lrs, accuracies, 100 / of_width[0]["classes"])
        found = {seed: largest_stable(of_seed) for seed, of_seed in by_seed(of_width).items()}
        closed = {seed: edge.lr for seed, edge in found.items() if edge is not None and not edge.open}
        at_best = [row for row in of_width if row["spec"]["lr"] == chosen[width]["own"]]
        widths[str(width)] = {
            "edge": geometric_interval(list(closed.values())) if closed else None,
            "edge_open": len(found) - len(closed),
            "best": best._asdict(),
            "classes": count_classes(of_width),
            "classes_at_best": count_classes(at_best),
        }
        for seed, lr in closed.items():
            edges.setdefault(seed, {})[width] = lr
        if not best.at_edge:
            for seed, of_seed in zip(sorted(found), accuracies, strict=True):
                tops.setdefault(seed, {})[width] = top(lrs, of_seed)
    return {
        "widths": widths,
        "edge_exponent": exponent(edges),
        "best_exponent": exponent(tops),
        "predicted": predicted(rows[0]["spec"]["setting"]),
        "transfer": transfer(fresh, chosen),
    }


def count_classes(rows: Sequence[Row]) -> dict[str, int]:
    """How many runs are of which class."""
    return {name: sum(row["class"] == name for row in rows) for name in CLASSES}


def predicted(setting: Mapping[str, Any]) -> float | None:
    """Exponent of the largest stable learning rate in theory; None for rules and nets that it does not cover."""
    if setting["scaled"]:
        return 0.0
    covered = setting["model"].startswith("mlp")
    return PREDICTED.get((setting["optimizer"], setting["loss"])) if covered else None


def transfer(fresh: Sequence[Row], chosen: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Test accuracies in percent of every width at its own best learning rate and at the base width's."""
    result = {}
    for width, of_width in by_width(fresh).items():
        at = {
            which: {row["spec"]["seed"]: 100 * row["accuracy"] for row in of_width if row["spec"]["lr"] == lr}
            for which, lr in chosen[width].items()
        }
        result[str(width)] = {
            **{f"{which}_lr": lr for which, lr in chosen[width].items()},
            **{which: interval(list(values.values())) for which, values in at.items()},
            "difference": paired(at["base"], at["own"]),
        }
    return result


def summarize_checks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """By setting and α: exponents of norms after the first and the last step, and the classes that they say; classes of
    the single runs; exponents of E and λE before the first and after the last step."""
    result = {}
    for name, of_one in grouped(rows, check_label).items():
        found: dict[str, Any] = {"predicted": predicted_change(of_one[0]["spec"])}
        found["runs"] = count_classes(of_one)
        for when, index in (("first", 1), ("last", -1)):
            exponents = {key: exponent(at_width(of_one, partial(norm, key, index))) for key in NORMS}
            finite = all(norm(key, index, row) is not None for row in of_one for key in NORMS)
            means = {key: value.mean if finite else math.nan for key, value in exponents.items()}
            found[when] = {"exponents": exponents, "finite": finite, "class": classify_exponents(means)}
        for kind in ("E", "lr_E"):
            found[kind] = [
                {
                    when: exponent(at_width(of_one, partial(layer_rate, kind, index, layer)))
                    for when, index in (("first", 0), ("last", -1))
                }
                for layer in range(len(LAYERS))
            ]
        result[name] = found
    return result


def check_label(row: Row) -> str:
    """Setting and α of a check."""
    spec = row["spec"]
    return label(spec["setting"]) + ("" if spec["setting"]["scaled"] else f", α = {spec['alpha']:g}")


def predicted_change(spec: Mapping[str, Any]) -> dict[str, float]:
    """Exponents in theory of the change of activations in the last hidden layer and of the logits (§3 and §4)."""
    setting = spec["setting"]
    if setting["scaled"]:
        bounded = (setting["optimizer"], setting["loss"]) == ("sgd", "mse")
        return {"activation_change": -0.5 if bounded else 0.0, "logit_change": 0.0 if bounded else 0.5}
    free = 0.5 if setting["optimizer"] == "sgd" else 1.0
    return {"activation_change": free - spec["alpha"], "logit_change": free + 0.5 - spec["alpha"]}


def at_width(rows: Sequence[Row], pick: Callable[[Row], float | None]) -> dict[int, dict[int, float]]:
    """seed → width → a number of the row; NaN for what is missing."""
    result: dict[int, dict[int, float]] = {}
    for row in rows:
        value = pick(row)
        result.setdefault(row["spec"]["seed"], {})[row["spec"]["width"]] = (
            math.nan if value is None else value
        )
    return result


NORMS = ("logit_change", "activation_change", "logit_grad", "activation_grads")


def norm(name: str, index: int, row: Row) -> float | None:
    """A norm at a recorded step; None if it is not finite, or the run ended before.

    Of activations in the last hidden layer; of gradients how much it has grown since step 0, at least 1, so that a
    gradient that falls as training goes on is not taken for one that grows with the width; with respect to
    activations, in the first layer.
    """
    if index >= len(row["at"]):
        return None
    values, start = row[name][index], row[name][0]
    if isinstance(values, list):
        layer = 0 if name == "activation_grads" else -1
        values, start = values[layer], start[layer]
    if values is None or name in ("logit_change", "activation_change"):
        return values
    return max(1.0, values / start)


def layer_rate(kind: str, index: int, layer: int, row: Row) -> float | None:
    """E or λE of the first, a middle or the last layer at a recorded step."""
    values = row["E"][index]
    position = (0, len(values) // 2, len(values) - 1)[layer]
    value = values[position]
    return value if kind == "E" or value is None else value * row["lr"][position]
