"""Accuracy of ELRSGD's rules against SGD, over learning rates and seeds: the main job of this repository.

    python -m benchmarks.accuracy                                   # digits, two nets, a few minutes on 2 cores
    python -m benchmarks.accuracy --data cifar10 --model resnet-20 --epochs 30 --device cuda --amp --channels-last

Trains every optimizer at every learning rate of its grid, and chooses each one's best by validation accuracy. Then it
trains there with fresh seeds, and reads the test accuracy. Prints tables, writes a JSON file and draws plots. A call
that was stopped goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.common import data, models, training
from benchmarks.common.command_line import one_of, show, table_of
from benchmarks.common.optimizers import METHODS, OPTIMIZERS, PEERS
from benchmarks.common.sweep import Row, default_jobs
from benchmarks.common.training import Task
from benchmarks.studies import comparison, study
from benchmarks.studies.comparison import Entry, Plan, by_task, entries, mean_over_runs
from elropt import plots
from elropt.rules import RULES

DEFAULT_MODELS = ["bn-mlp-30", "plain-8-w8"]
DEFAULT_METHODS = [*PEERS, *filter(None, RULES)]


def default_methods(weight_decay: float) -> list[str]:
    """`DEFAULT_METHODS`, without decay less those that need it."""
    return [name for name in DEFAULT_METHODS if weight_decay or not METHODS[name].entry.needs_decay]


def spread_table(of_task: Sequence[Entry]) -> Table:
    """The spread of the applied ELRs at the best learning rate, and the seconds of a run."""
    table = table_of(
        "spread of the applied ELRs (max / min)",
        *("optimizer", "step 0", "10", "100", "last", "seconds"),
        caption="geometric mean over the fresh seeds; seconds compare only within one call",
    )
    for entry in of_task:
        spreads = mean_over_runs(entry.test_rows, "applied_spread")
        values = [spreads.get(step) for step in (0, 10, 100, max(spreads, default=0))]
        cells = [show(value, ".1f" if value is None or value < 10 else ".0f") for value in values]
        table.add_row(entry.method, *cells, f"{np.mean([row['seconds'] for row in entry.test_rows]):.1f}")
    return table


def tables(rows: list[Row], summary: dict[str, Any]) -> Sequence[Table]:
    """Accuracies and spreads of every net."""
    return [
        table
        for task, of_task in by_task(entries(rows)).items()
        for table in (comparison.accuracy_table(task, of_task), spread_table(of_task))
    ]


def draw(rows: list[Row], summary: dict[str, Any]) -> dict[str, Figure]:
    """Three figures of each net: accuracy against lr, spread over steps, ELR per layer over steps."""
    figures = {}
    for of_task in by_task(entries(rows)).values():
        model = of_task[0].val_rows[0]["spec"]["task"]["model"]
        figures[f"{model}-accuracy"] = accuracy_figure(of_task)
        figures[f"{model}-spread"] = spread_figure(of_task)
        figures[f"{model}-layers"] = layers_figure(of_task)
    return figures


def accuracy_figure(of_task: Sequence[Entry]) -> Figure:
    """Validation accuracy against the learning rate, a panel for each unit."""
    units = list(dict.fromkeys(entry.unit for entry in of_task))
    figure = Figure(figsize=(4 * len(units) + 1, 4), layout="constrained")
    for ax, unit in zip(figure.subplots(1, len(units), sharey=True, squeeze=False)[0], units, strict=True):
        comparison.draw_curves(ax, of_task, title="", unit=unit)
        ax.label_outer()
    return figure


def spread_figure(of_task: Sequence[Entry]) -> Figure:
    """Spread of the applied ELRs over the steps."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    spreads = {entry.method: mean_over_runs(entry.test_rows, "applied_spread") for entry in of_task}
    plots.spread_over_steps(
        figure.subplots(), {name: (list(s), list(s.values())) for name, s in spreads.items() if s}
    )
    return figure


def layers_figure(of_task: Sequence[Entry]) -> Figure:
    """Applied ELR of each layer over the steps, a panel for each optimizer that has one: of AdamW and the like the
    gradient does not say how long a step is."""
    rows = [next(row for row in entry.test_rows if row["spec"]["layers"]) for entry in of_task]
    shown = [
        (entry, row)
        for entry, row in zip(of_task, rows, strict=True)
        if np.isfinite(np.array(row["elr"], dtype=float)).any()
    ]
    columns = max(1, min(3, len(shown)))
    grid = max(1, -(-len(shown) // columns)), columns
    figure = Figure(figsize=(4 * columns, 3 * grid[0] + 0.5), layout="constrained")
    axes = figure.subplots(*grid, sharex=True, sharey=True, squeeze=False).flatten()
    for ax, (entry, row) in zip(axes, shown, strict=False):
        plots.elr_over_steps(ax, row["trace_steps"], row["elr"])
        ax.set_title(f"{entry.method}, lr {entry.best_lr:g}")
        ax.label_outer()
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    return figure


def positive(lrs: str) -> tuple[float, ...]:
    """The learning rates in a text with commas between them. Raises ValueError."""
    try:
        values = tuple(float(value) for value in lrs.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(0 < value < math.inf for value in values):
        raise ValueError(f"--lrs takes positive numbers with commas between them, got {lrs!r}")
    return values


ACCURACY = study.Study(
    "accuracy",
    "How accurate is a net after training with each optimizer at its best learning rate?",
    training.train,
    lambda size, device: (),
    comparison.conclusions,
    tables,
    draw,
    comparison.describe,
    comparison.without_val_traces,
)


def main(
    data_name: Annotated[str, typer.Option("--data", help=f"One of {', '.join(data.DATASETS)}.")] = "digits",
    path: Annotated[
        str | None, typer.Argument(help="The tree of --data imagefolder.", show_default=False)
    ] = None,
    root: Annotated[str | None, typer.Option(help="Folder of the data set's files.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Repeatable; of {', '.join(models.MODELS)}, each with -wW for width W if you like. "
            f"Default: {' and '.join(DEFAULT_MODELS)}."
        ),
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            callback=one_of(METHODS),
            help=f"Repeatable; of {', '.join(OPTIMIZERS)} (lars and sgdp need pytorch-optimizer, hyperball needs "
            "heavyball), each with "
            f"+linear for a linear warm-up of its lr. Default: {', '.join(DEFAULT_METHODS)}; those that need weight "
            "decay only with it.",
        ),
    ] = None,
    lrs: Annotated[
        str | None, typer.Option(help="Comma-separated; for every optimizer. Default: a grid of each.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for choosing the learning rate.")] = 2,
    fresh_seeds: Annotated[int, typer.Option(min=1, help="Other seeds, for the test accuracy.")] = 5,
    split: Annotated[int, typer.Option(help="Seed of the split into training and validation images.")] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 25,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    momentum: Annotated[float, typer.Option(min=0)] = 0.9,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.0,
    other_lr: Annotated[
        float, typer.Option(min=0, help="lr of untracked parameters under angle and sphere.")
    ] = 0.1,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many training images.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Shrink (imagefolder: crop) images to this side.")
    ] = None,
    augment: Annotated[bool, typer.Option(help="Random crops and mirrored images.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the net.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: the CPU's cores; 1 on a GPU.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the rows, the JSON file and the plots.")] = Path(
        "runs/accuracy"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the rows of an earlier call.")] = False,
) -> None:
    """Compare ELRSGD's rules with SGD over learning rates and seeds.

    Example: python -m benchmarks.accuracy --data cifar10-quick --model plain-20 --epochs 10
    """
    model, optimizer = model or DEFAULT_MODELS, optimizer or default_methods(weight_decay)
    if (path is not None) != (data_name == "imagefolder"):
        raise typer.BadParameter("--data imagefolder takes the PATH of its tree; other data sets take --root")
    tasks = [
        Task(
            name,
            data_name,
            root=path or root,
            image_size=image_size,
            limit=limit,
            split=split,
            epochs=epochs,
            batch_size=batch_size,
            momentum=momentum,
            weight_decay=weight_decay,
            other_lr=other_lr,
            augment=augment,
            device=device,
            amp=amp,
            channels_last=channels_last,
            compile=compile,
        )
        for name in model
    ]
    try:
        chosen = [METHODS[name] for name in optimizer]
        if lrs is not None:
            chosen = comparison.with_lrs(chosen, positive(lrs))
        dataset = training.load(tasks[0])
        for task in tasks:
            models.build(task.model, in_shape=dataset.in_shape, classes=dataset.classes)
        stages = comparison.two_stages(Plan(tasks, chosen, seeds, fresh_seeds))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    if fresh:
        (out / "accuracy.rows.jsonl").unlink(missing_ok=True)
    study.run(
        ACCURACY,
        stages,
        "accuracy",
        out,
        jobs=jobs or default_jobs(device),
        console=study.make_console(),
        data=dataset.title,
    )


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
