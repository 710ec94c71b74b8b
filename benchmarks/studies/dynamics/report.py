"""What the study of weight dynamics shows: tables and figures of what `summarize` concludes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table

from benchmarks.common.command_line import table_of
from benchmarks.common.figures import finish, grid, legend_below, legend_key, panels
from benchmarks.common.statistics import grouped
from benchmarks.common.sweep import Row
from benchmarks.studies.dynamics.summarize import BINS, SMOOTHING, TOLERANCE, model_of, of_kind, trajectories
from elropt.plots import COLORS, DEPTH, MARKERS

EXPLOSION = math.sqrt(math.pi / (math.pi - 1))  # of gradient norms, per BN-ReLU layer


def tables(rows: list[Row], summary: dict[str, Any]) -> list[RenderableType]:
    """A table for each question."""
    return [
        _trajectory_table(summary),
        _one_step_table(summary),
        _turn_table(summary),
        _c_table(summary),
        _critical_table(summary),
        _explosion_table(summary),
        _momentum_table(summary),
    ]


def _trajectory_table(summary: dict[str, Any]) -> Table:
    lines = []
    for model, by_lr in summary["trajectories"].items():
        for label, it in by_lr.items():
            early = f" ({it['ended_early']} of {it['runs']} ended early)" if it["ended_early"] else ""
            lines.append(
                [
                    f"{model}, {it['steps']} steps{early}",
                    label,
                    f"{it['max_lr_E'].mean:.2g}",
                    f"×{it['error'].mean:.2g}",
                    f"×{it['ratio_error'].mean:.2g}",
                    f"×{it['ratio_error_common'].mean:.2g}",
                    f"{it['log_std_start'].mean:.2f} → {it['log_std_end']:.2f}",
                    f"→ {it['model_log_std_end'].mean:.2f}",
                    f"{_steps(it['half_life'])} / {_steps(it['model_half_life'])}",
                ]
            )
    columns = ["net", "lr", "λE₁ at step 0", "error of E", "of ratios", "of ratios, common c(t)"]
    columns += ["std of ln E", "model", "halved at step: measured / model"]
    title = (
        "Does E follow the model, and do ratios of ELRs tend to 1 under a constant lr? "
        "(errors: root mean square over layers at the end, ×1.3 is 30 %; means of seeds, intervals 95 %)"
    )
    return table_of(title, *columns, rows=lines, wrap=True)


def _steps(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _one_step_table(summary: dict[str, Any]) -> Table:
    def cells(entries: list[dict[str, Any] | None], show: Callable[[dict[str, Any]], str]) -> list[str]:
        return ["–" if entry is None else show(entry) for entry in entries]

    lines = [
        [model, *cells(entries, lambda it: f"{it['turn'].mean:.2f} ({it['noise'].mean:.2f})")]
        for model, entries in summary["one_step"].items()
    ]
    for label, key in {"all, within 30 %": "within", "all, explained": "explained"}.items():
        entries = summary["one_step"]["all"]
        lines.append(
            [
                label,
                *cells(entries, lambda it, key=key: f"{it[key].mean if key == 'within' else it[key]:.0%}"),
            ]
        )
    columns = ["largest λE of the step", *(f"{low:g} – {high:g}" for low, high in itertools.pairwise(BINS))]
    title = (
        "Up to which angle does the ratio law hold over one step? Error of ln ratios on the same batch (what the next "
        "batch adds), medians; share of steps within 30 %; share of the change that the law explains"
    )
    return table_of(title, *columns, rows=lines, wrap=True)


def _turn_table(summary: dict[str, Any]) -> Table:
    angles = list(dict.fromkeys(angle for it in summary["turn"].values() for angle in it["angles"]))
    lines = []
    for model, it in summary["turn"].items():
        pairs = zip(it["own"], it["others"], strict=True)
        cells = dict(
            zip(it["angles"], (f"{own.mean:.2g} / {others.mean:.2g}" for own, others in pairs), strict=True)
        )
        reached = [f"{it[f'{key}_30_percent']:.2g}" for key in ("own", "all")]
        lines.append([model, *(cells.get(angle, "–") for angle in angles), *reached])
    columns = [
        "tangent of the angle",
        *(f"{angle:g}" for angle in angles),
        "30 %: it alone",
        "30 %: all turn",
    ]
    title = (
        "How constant is c? Change of ln c of a layer that turns alone / while all others turn, root mean square over "
        "layers; the angle from which c has changed by 30 %"
    )
    return table_of(title, *columns, rows=lines, wrap=True)


def _c_table(summary: dict[str, Any]) -> Table:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.0%}"

    lines = []
    for model, it in summary["change_of_c"].items():
        shares = [percent(it[key]) for key in ("turn", "noise", "run_small", "run_large")]
        lines.append([model, *shares, *(f"{value.mean:.2f}" for value in it["forecast"][1:])])
    columns = ["net", "one step", "next batch", "run, λE ≤ 1", "run, λE > 1"]
    columns += [f"c smoothed by {share:g}" for share in SMOOTHING[1:]]
    title = (
        "Can an extension mend it? Share of the change of ln c that all layers have in common; error of c one step "
        "ahead if smoothed, over not smoothed"
    )
    return table_of(title, *columns, rows=lines, wrap=True)


def _critical_table(summary: dict[str, Any]) -> Table:
    lines = []
    for model, it in summary["critical"].items():
        for key in (key for key in it if key.endswith((" 1", " 5")) and key != "same 5"):
            entry = it[key]
            grows = entry["grows_over_balance"]
            never = f"never in {entry['never_grows']}" if entry["never_grows"] else ""
            lines.append(
                [
                    f"{model}, spread {it['initial_spread'].mean:.2g}",
                    key,
                    f"{entry['best_over_balance']:.2g}",
                    f"{entry['model_best_over_balance'].mean:.2g}",
                    f"{entry['best_over_monotone'].mean:.2g}",
                    ", ".join([*([f"{grows:.2g}"] if grows.n else []), *([never] if never else [])]),
                    f"{entry['smallest'].mean:.2g}",
                    f"{entry['at_balance'].mean:.2g}",
                    f"{entry['at_monotone'].mean:.2g}",
                ]
            )
    columns = [
        "net",
        "batch, steps",
        "best lr / balance",
        "model's",
        "best lr / monotone",
        "grows from, / balance",
    ]
    columns += ["spread left: at the best lr", "at balance", "at monotone"]
    title = (
        "Which learning rate closes the spread best after 1 or 5 steps, and from which on does it grow? "
        "(same: one batch; fresh: new batches; alone: the same, only tracked weights trained)"
    )
    return table_of(title, *columns, rows=lines, wrap=True)


def _explosion_table(summary: dict[str, Any]) -> Table:
    lines = [
        [net, f"{it['gradient']:.4f}", f"{it['c']:.4f}", str(it["c"].n)]
        for net, it in summary["explosion"].items()
    ]
    title = (
        f"By which factor per layer do gradients grow towards the input? Theory: √(π/(π−1)) = {EXPLOSION:.4f}"
    )
    return table_of(title, "net", "‖∂L/∂z‖", "c", "seeds", rows=lines, wrap=True)


def _momentum_table(summary: dict[str, Any]) -> Table:
    lines = [
        [
            net,
            f"{it['cosine'].mean:.3f}",
            f"{it['measured_growth'].mean:.2g}",
            *(f"{it['growth'][name]:.3g}" for name in ("aligned", "independent", "cosine")),
            *(f"×{it['error'][name].mean:.2g}" for name in ("aligned", "independent")),
        ]
        for net, it in summary["momentum"].items()
    ]
    columns = ["net", "cos(g, m)", "ln ‖w‖² gained", "aligned / measured", "independent", "with the cosine"]
    columns += ["error of E, aligned", "independent"]
    title = "Momentum 0.9: which closure is closer to a real net?"
    return table_of(title, *columns, rows=lines, wrap=True)


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """The figures for which there are rows."""
    plain = trajectories(rows, momentum=False)
    return {
        "dynamics-layers": _layers_figure(plain),
        "dynamics-spread": _spread_figure(plain),
        "dynamics-one-step": _one_step_figure(plain, summary),
        "dynamics-critical": _critical_figure(rows),
        "dynamics-explosion-momentum": _explosion_momentum_figure(rows, summary),
    }


def _layers_figure(runs: list[Row]) -> Figure:
    """E of some layers over the steps, measured and predicted from the first step alone.

    Of every family of nets the deepest with at most 30 layers, at three learning rates that it survived.
    """
    drawn = grouped([row for row in runs if "E" in row and row["finite"]], model_of)
    chosen: dict[str, tuple[int, str]] = {}
    for model in drawn:
        ((family, depth),) = re.findall(r"^(.+?)-(\d+)", model)
        if int(depth) <= 30:
            chosen[family] = max(chosen.get(family, (0, "")), (int(depth), model))
    figure, axes = grid(max(len(chosen), 1), 3, (11 / 3, 2.7), (0, 0.6))
    for line, (_, model) in zip(axes, chosen.values(), strict=False):
        left = sorted(drawn[model], key=lambda row: row["lr"])
        for ax, target in zip(line, (0.05, 0.5, 5.0), strict=True):
            if not left:
                ax.set_visible(False)
                continue
            nearest = min(left, key=lambda row: abs(math.log(row["max_lr_E"][0] / target)))
            left = left[left.index(nearest) + 1 :]
            steps = np.array(nearest["at"][:-1]) + 1
            E, predicted = (
                nearest["lr"] * np.array(nearest[key], dtype=float)[:-1] for key in ("E", "model_E")
            )
            for layer, color in enumerate(DEPTH(np.linspace(0, 1, E.shape[1]))):
                ax.plot(steps, E[:, layer], color=color, linewidth=1.2)
                ax.plot(steps, predicted[:, layer], color=color, linewidth=0.9, linestyle="--")
            ax.set(xscale="log", yscale="log", title=f"{model}, lr {nearest['lr']:.2g}", xlabel="step + 1")
            finish(ax)
        line[0].set_ylabel("λE (rad)")
    handles = [legend_key("measured, first layer", color=DEPTH(0.0))]
    handles += [legend_key("measured, last layer", color=DEPTH(1.0))]
    handles += [legend_key("model, from step 0 alone", color="0.4", linestyle="--")]
    legend_below(figure, handles)
    return figure


def _spread_figure(runs: list[Row]) -> Figure:
    """Standard deviation of ln E over the steps, one colour for each learning rate."""
    absolute = grouped([row for row in runs if not row["spec"]["relative"]], model_of)
    figure, axes = _panels(absolute, xlabel="step + 1", ylabel="standard deviation of ln E")
    lrs = sorted({row["spec"]["lr"] for row in runs if not row["spec"]["relative"]})
    colors = dict(zip(lrs, itertools.cycle(COLORS), strict=False))
    for ax, of_model in zip(axes, absolute.values(), strict=True):
        for lr, of_lr in grouped(of_model, lambda row: row["spec"]["lr"]).items():
            longest = max(of_lr, key=lambda row: row["steps_measured"])
            alike = [row for row in of_lr if row["at"] == longest["at"]]
            for key, style in {"log_std": "-", "model_log_std": "--"}.items():
                mean = np.mean([row[key] for row in alike], axis=0)
                ax.plot(np.array(longest["at"][:-1]) + 1, mean[:-1], style, color=colors[lr], linewidth=1.2)
        ax.set(xscale="log", yscale="log")
        finish(ax)
    handles = [legend_key(f"lr {lr:g}", color=colors[lr]) for lr in lrs]
    handles += [legend_key("measured", color="0.4"), legend_key("model", color="0.4", linestyle="--")]
    legend_below(figure, handles)
    return figure


def _one_step_figure(runs: list[Row], summary: dict[str, Any]) -> Figure:
    """Error of the ratio law over one step, and change of c, against the angle."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    law, turn = figure.subplots(1, 2)
    looks = dict(
        zip(summary["one_step"], zip(itertools.cycle(COLORS), itertools.cycle(MARKERS)), strict=False)
    )
    decades = 10.0 ** np.arange(-6, 4)
    for model, of_model in grouped(runs, model_of).items():
        color, marker = looks[model]
        x, y = (
            np.concatenate([row[column] for row in of_model]).astype(float)
            for column in ("max_lr_E", "turn_individual")
        )
        law.scatter(x, y, s=5, alpha=0.15, linewidths=0, color=color, marker=marker)
        inside = [(x >= low) & (x < high) for low, high in itertools.pairwise(decades)]
        medians = [np.median(y[mask]) if mask.any() else math.nan for mask in inside]
        law.plot(decades[:-1] * 10**0.5, medians, color=color, marker=marker, markersize=4.5, label=model)
    law.axvline(1, color="0.3", linewidth=0.8, linestyle=":")
    law.text(0.02, TOLERANCE, "30 %", transform=law.get_yaxis_transform(), va="bottom", color="0.3")
    law.set(xlim=(decades[0], decades[-1]), ylim=(1e-3, 10), xlabel="largest λE of the step")
    law.set_ylabel("error of ln ratios in one step, same batch")
    law.legend(frameon=False, fontsize="x-small", loc="lower right")
    for model, it in summary["turn"].items():
        color, marker = looks.get(model, ("0.4", "o"))
        for key, line in {"own": "-", "others": "--"}.items():
            means = [value.mean for value in it[key]]
            turn.plot(it["angles"], means, line, color=color, marker=marker, markersize=4)
    turn.plot([], [], "-", color="0.4", label="the layer alone turns")
    turn.plot([], [], "--", color="0.4", label="all others turn")
    turn.set(xlabel="tangent of the angle", ylabel="change of ln c of a layer")
    turn.legend(frameon=False, fontsize="small")
    for ax in (law, turn):
        ax.axhline(TOLERANCE, color="0.3", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log")
        finish(ax)
    return figure


def _critical_figure(rows: list[Row]) -> Figure:
    """Spread after one and after five steps against the learning rate over balance."""
    found = grouped(of_kind(rows, "critical"), model_of)
    figure, axes = _panels(found, xlabel="lr / balance", ylabel="spread / initial spread")
    for ax, of_model in zip(axes, found.values(), strict=True):
        for row in of_model:
            x = np.array(row["lrs"]) / row["balance"]
            for index, after in enumerate(row["after"]):
                color = COLORS[index]
                ax.plot(x, np.array(row["fresh_spread"], dtype=float)[:, index], color=color, linewidth=1)
                if row is of_model[0]:
                    ax.plot(x, np.array(row["model_spread"])[:, index], "--", color=color, linewidth=0.9)
                    ax.plot([], [], color=color, label=f"after {after} step{'s' if after > 1 else ''}")
            ax.axvline(row["monotone"] / row["balance"], color="0.6", linewidth=0.6)
        ax.axvline(1, color="0.2", linewidth=0.8)
        ax.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
        ax.set(xscale="log", yscale="log")
        finish(ax)
    handles = [*axes[0].get_legend_handles_labels()[0]] if found else []
    handles += [legend_key("model, seed 0", color="0.4", linestyle="--")]
    handles += [legend_key("balance", color="0.2"), legend_key("monotone", color="0.6")]
    legend_below(figure, handles)
    return figure


def _explosion_momentum_figure(rows: list[Row], summary: dict[str, Any]) -> Figure:
    """Growth factors of gradients per layer; growth of norms with momentum by closure."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(summary["explosion"])
    for offset, (key, label) in enumerate({"gradient": "‖∂L/∂z‖", "c": "c"}.items()):
        values = [summary["explosion"][name][key] for name in names]
        y = np.arange(len(names)) + 0.2 * offset - 0.1
        means, lows, highs = (
            np.array([getattr(v, part) for v in values]) for part in ("mean", "low", "high")
        )
        style: dict[str, Any] = {
            "fmt": MARKERS[offset],
            "color": COLORS[offset],
            "markersize": 4.5,
            "label": label,
        }
        left.errorbar(means, y, xerr=(means - lows, highs - means), **style)
    left.axvline(EXPLOSION, color="0.2", linewidth=0.8, linestyle="--", label="√(π/(π−1))")
    left.set_yticks(range(len(names)), names, fontsize="small")
    left.invert_yaxis()
    left.set_xlabel("growth per layer towards the input")
    left.legend(frameon=False, fontsize="small")
    runs = trajectories(rows, momentum=True)
    measured = [row["growth"]["measured"] for row in runs]
    for offset, name in enumerate(("aligned", "independent")):
        y = np.array([row["growth"][name] for row in runs], dtype=float)
        right.scatter(measured, y, s=18, color=COLORS[offset], marker=MARKERS[offset], label=name)
    if runs:
        ends = [min(measured), max(measured)]
        right.plot(ends, ends, color="0.4", linewidth=0.8, linestyle=":", label="measured = predicted")
    right.set(xscale="log", yscale="log", xlabel="ln ‖w‖² gained, measured (median of layers)")
    right.set_ylabel("predicted from the measured E")
    right.set_title("momentum 0.9")
    right.legend(frameon=False, fontsize="small")
    for ax in (left, right):
        finish(ax)
    return figure


def _panels(titles: Collection[str], *, xlabel: str, ylabel: str) -> tuple[Figure, Sequence[Axes]]:
    """A panel for each title."""
    figure, axes = panels(len(titles))
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel=xlabel)
    for ax in axes[::4]:
        ax.set_ylabel(ylabel)
    return figure, axes
