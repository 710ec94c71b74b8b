"""A recorded run as one HTML page: interactive plots, and in words what can be seen in them. Needs no network.

run = read_run("elr.jsonl", all_layers=True)
page = report_page(run, diagnose(run), title="elr.jsonl")
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._json import to_json
from ._look import (
    APPLIED_LR,
    COLORS,
    HAND_OVER_COLOR,
    SPREAD,
    layer_colors,
    layer_quantities,
    shared_values,
)
from .diagnosis import TITLES, Finding
from .run_history import RuleSpan, RunHistory, rule_spans, spread_of

try:
    from plotly.offline import get_plotlyjs
except ModuleNotFoundError as error:
    raise ImportError('elropt report needs plotly: pip install "elropt[cli]"') from error

__all__ = ["report_page"]

OPTIONS = ("rule", "momentum", "betas", "weight_decay")
ABOUT = {  # what is added to the titles of plots that look alike
    "ELR": "lr·‖g‖/‖w‖, the tangent of the angle that the gradient alone would turn a layer by",
    "angle": "measured between the weights before and after it, with all that the optimizer does",
}
VALUES_PER_PLOT = 300_000  # layers times records; of longer runs the page shows every k-th record


def report_page(run: RunHistory, found: Sequence[Finding], *, title: str) -> str:
    """The page, as HTML that contains all that it needs.

    Args:
        run: what `read_run` returned.
        found: what `diagnose` found in it.
        title: of the page, such as the name of the file.
    """
    shown = _shown_records(run, found)
    spans = rule_spans(run)
    notes = list(run.notes)
    if len(shown) < len(run.steps):
        notes.append(f"the plots show {len(shown)} of {len(run.steps)} records; what is seen comes from all")
    facts = [_optimizer_in_words(run), _layers_in_words(run), _steps_in_words(run.steps)]
    return _template("html").substitute(
        title=escape(title),
        facts=escape(" · ".join(filter(None, facts))),
        notes="".join(f"<li>{escape(note)}</li>" for note in notes),
        findings="\n".join(_finding(i, finding, run) for i, finding in enumerate(found)),
        layers="\n".join(_layers(run, found)),
        style=_template("css").template,
        plotly=get_plotlyjs(),
        data=_as_script(_data(run, found, spans, shown)),
        script=_template("js").template,
    )


def _optimizer_in_words(run: RunHistory) -> str:
    """The class, and those of `OPTIONS` that all layers have in common at the end of the run."""
    words = [run.optimizer.rpartition(".")[2]]
    if run.control:
        words.append(f"control {run.control!r}")
    for option in OPTIONS if run.options else ():
        first, *others = (of_layer.get(option) for of_layer in run.options[-1])
        if first is not None and all(other == first for other in others):
            words.append(f"{option.replace('_', ' ')} {first!r}")
    return ", ".join(filter(None, words))


def _layers_in_words(run: RunHistory) -> str:
    tracked = int(_tracked(run).sum())
    layers = _counted(len(run.names), "layer")
    return layers if tracked == len(run.names) else f"{layers}, {tracked} tracked as scale-invariant"


def _tracked(run: RunHistory) -> NDArray[np.bool_]:
    """[L]"""
    return run.tracked if run.tracked.size else np.ones(len(run.names), dtype=np.bool_)


def _steps_in_words(steps: NDArray[np.int64]) -> str:
    records = _counted(len(steps), "record")
    return f"{records}, step {steps[0]}" if len(steps) == 1 else f"{records}, steps {steps[0]} to {steps[-1]}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _finding(index: int, finding: Finding, run: RunHistory) -> str:
    """A finding as an entry of a list. A click on it shows its steps and layers."""
    first, last = finding.steps
    where = f"step {first}" if first == last else f"steps {first} to {last}"
    layers = _all_of(finding, run) or ", ".join(finding.layers[:3])
    if layers and len(finding.layers) > 3 and not _all_of(finding, run):
        layers += f" and {len(finding.layers) - 3} more"
    sign = "!" if finding.severity == "warning" else "i"
    return (
        f'<li><button type="button" class="finding {finding.severity}" data-finding="{index}">'
        f'<span class="sign" role="img" aria-label="{finding.severity}">{sign}</span>'
        f'<span class="title">{escape(TITLES[finding.kind])}</span>'
        f'<span class="what">{escape(finding.what)}</span>'
        f'<span class="advice">{escape(finding.advice)}</span>'
        f'<span class="where">{escape(" · ".join(filter(None, (where, layers))))}</span></button></li>'
    )


def _all_of(finding: Finding, run: RunHistory) -> str:
    """The layers of a finding in short if these are all; else nothing."""
    tracked = {name for name, each in zip(run.names, _tracked(run), strict=True) if each}
    if set(finding.layers) == set(run.names):
        return "all layers"
    return "all tracked layers" if set(finding.layers) == tracked else ""


def _layers(run: RunHistory, found: Sequence[Finding]) -> list[str]:
    """The layers as entries of a list, with the number of findings of each that are not of all. A click on one shows it
    alone."""
    tracked = _tracked(run)
    counts = Counter(name for finding in found if not _all_of(finding, run) for name in set(finding.layers))
    colors = zip(layer_colors(tracked), layer_colors(tracked, "dark"), strict=True)
    return [
        f'<li><button type="button" class="layer" data-layer="{i}" aria-pressed="false" '
        f'title="{escape(_hint(name, tracked[i]))}">'
        f'<span class="swatch" style="--light:{light};--dark:{dark}"></span>'
        f'<span class="name">{escape(name)}</span>'
        f'<span class="count">{counts[name] or ""}</span></button></li>'
        for i, (name, (light, dark)) in enumerate(zip(run.names, colors, strict=True))
    ]


def _hint(name: str, tracked: bool) -> str:
    return name if tracked else f"{name}: not tracked as scale-invariant"


def _shown_records(run: RunHistory, found: Sequence[Finding]) -> NDArray[np.int64]:
    """Indices of the records in the plots: all, or of a long run every k-th and the ends of what was found."""
    stride = -(-len(run.steps) * len(run.names) // VALUES_PER_PLOT)
    ends = [step for finding in found for step in finding.steps]
    found_there = np.flatnonzero(np.isin(run.steps, [run.steps[0], run.steps[-1], *ends]))
    return np.union1d(np.arange(0, len(run.steps), stride), found_there)


def _data(
    run: RunHistory, found: Sequence[Finding], spans: Sequence[RuleSpan], shown: NDArray[np.int64]
) -> dict[str, Any]:
    """What the script draws."""
    tracked = _tracked(run)
    place = {name: i for i, name in enumerate(run.names)}
    return {
        "steps": run.steps[shown].tolist(),
        "layers": list(run.names),
        "tracked": tracked.tolist(),
        "colors": {theme: layer_colors(tracked, theme) for theme in ("light", "dark")},
        "panels": _panels(run, shown),
        "handOverColor": HAND_OVER_COLOR,
        "rule": [span._asdict() for span in spans],
        "findings": [
            {"steps": finding.steps, "layers": sorted(place[name] for name in finding.layers)}
            for finding in found
        ],
    }


def _panels(run: RunHistory, shown: NDArray[np.int64]) -> list[dict[str, Any]]:
    """One plot each, in the order of `plots.run_figure`. `values` have a list for each layer, `lines` a name each."""
    quantities, tracked = layer_quantities(run), _tracked(run)
    panels: list[dict[str, Any]] = [
        {"title": q.title, "about": ABOUT.get(q.key), "log": True, "values": _rounded(q.values[shown].T)}
        for q in quantities
    ]
    turns = [q for q in quantities if q.turns]
    counted = tracked if tracked.any() else ~tracked
    if turns and counted.sum() > 1:
        lines = [
            {"name": q.key, "values": _rounded(spread_of(q.values[shown][:, counted])), "color": color}
            for q, color in zip(turns, COLORS, strict=False)
        ]
        title = f"{SPREAD} over {'all' if counted.all() else 'the tracked'} layers"
        panels.insert(len(turns), {"title": title, "log": True, "lines": lines})
    if np.isfinite(run.applied_lr).any():
        shared = shared_values(run.applied_lr[shown])
        if shared is None:
            drawn = {"values": _rounded(run.applied_lr[shown].T)}
        else:
            drawn = {"lines": [{"name": "all layers", "values": _rounded(shared), "color": None}]}
        panels.append({"title": APPLIED_LR, "log": False, **drawn})
    return panels


def _rounded(values: NDArray[np.float64]) -> list[Any]:
    """Nested lists of four significant digits; None for NaN and infinity."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [to_json(float(f"{value:.4g}")) for value in values]


def _as_script(data: dict[str, Any]) -> str:
    """JSON that ends no <script> element, whatever the names of layers are."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _template(suffix: str) -> Template:
    file = resources.files(__package__ or "elropt").joinpath(f"report_page.{suffix}")
    return Template(file.read_text(encoding="utf-8"))
