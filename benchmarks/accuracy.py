"""Accuracy of ELRSGD's rules against SGD, over learning rates and seeds: the main job of this repository.

    python -m benchmarks.accuracy                                   # digits, two nets, a few minutes on 2 cores
    python -m benchmarks.accuracy --data cifar10 --model resnet-20 --epochs 30 --device cuda --amp --channels-last

Trains every optimizer at every learning rate with every seed. The learning rate of an optimizer is the one with
the best mean validation accuracy; test accuracy is reported there. Writes a JSON file and plots, prints a table.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import elropt
from benchmarks import data, models
from elropt import env_report, plots

SGD_LRS = (0.01, 0.03, 0.1, 0.3)
ANGLE_LRS = (0.001, 0.003, 0.01, 0.03)
SPHERE_LRS = (0.0001, 0.001, 0.01, 0.1)
WARMUP_SHARE = 0.1  # of all steps, for "sgd+warmup"


class Method(NamedTuple):
    """One line of the comparison."""

    rule: str | None
    lrs: tuple[float, ...]
    linear_warmup: bool = False
    unit: str = "SGD's"
    separate_lr: bool = False  # lr means something else for tracked layers: the others keep `Config.other_lr`


METHODS = {
    "sgd": Method(None, SGD_LRS),
    "sgd+warmup": Method(None, SGD_LRS, linear_warmup=True),
    "warmup": Method("warmup", SGD_LRS),
    "uniform": Method("uniform", SGD_LRS),
    "angle": Method("angle", ANGLE_LRS, unit="radians", separate_lr=True),
    "sphere": Method("sphere", SPHERE_LRS, unit="on the sphere", separate_lr=True),
}


DEFAULT_MODELS = ["bn-mlp-30", "plain-8-w8"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What all runs of one call share; picklable, and written to the result file."""

    data: str
    root: str | None = None
    image_size: int | None = None
    limit: int | None = None
    epochs: int = 25
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 0.0
    other_lr: float = 0.1
    augment: bool = False
    device: str = "cpu"
    amp: bool = False
    channels_last: bool = False


class Run(NamedTuple):
    """One training run."""

    model: str
    method: str
    lr: float
    seed: int


def train(run: Run, config: Config, dataset: data.Dataset) -> dict[str, Any]:
    """Train once; returns a row of the result file.

    A run whose loss stops being finite ends there and counts with the accuracy of its last weights.
    """
    started = time.perf_counter()
    torch.manual_seed(run.seed)
    model = models.build(run.model, in_shape=dataset.in_shape, classes=dataset.classes).to(config.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps_per_epoch = len(dataset.train_y) // config.batch_size
    steps = steps_per_epoch * config.epochs
    optimizer, tracked = make_optimizer(model, run, config, dataset)
    scheduler = make_schedule(optimizer, steps, METHODS[run.method].linear_warmup)
    recorded = set(recorded_steps(steps))
    elrs: dict[int, list[float]] = {}
    step, finite = 0, torch.ones((), dtype=torch.bool, device=config.device)
    for epoch in range(config.epochs):
        batches = dataset.batches(
            "train",
            config.batch_size,
            seed=(run.seed, epoch),
            augment=config.augment,
            channels_last=config.channels_last,
        )
        for images, labels in batches:
            optimizer.zero_grad()
            with torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16, enabled=config.amp):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            finite &= loss.isfinite()
            if step in recorded and isinstance(optimizer, elropt.ELRSGD):
                optimizer.record_next_step()
            elif step in recorded:
                elrs[step] = plain_elrs(tracked, optimizer)
            optimizer.step()
            if step in recorded and isinstance(optimizer, elropt.ELRSGD):
                applied = elropt.effective_lrs(optimizer)
                elrs[step] = [applied.get(name, math.nan) for name in tracked]
            scheduler.step()
            step += 1
        if not finite:
            break
    return {
        **run._asdict(),
        "val_accuracy": accuracy(model, dataset, "val", config),
        "test_accuracy": accuracy(model, dataset, "test", config),
        "finite": bool(finite),
        "steps": step,
        "elr_steps": sorted(elrs),
        "elrs": [[float(f"{elr:.4g}") for elr in elrs[s]] for s in sorted(elrs)],
        "seconds": time.perf_counter() - started,
    }


def make_optimizer(
    model: nn.Module, run: Run, config: Config, dataset: data.Dataset
) -> tuple[Optimizer, dict[str, Tensor]]:
    """The optimizer of a run, and its tracked weights by name."""
    method = METHODS[run.method]
    images, _ = next(iter(dataset.batches("train", min(config.batch_size, 32))))
    groups = elropt.param_groups(
        model, images, weight_decay=config.weight_decay, tracked_lr=run.lr if method.separate_lr else None
    )
    tracked = {
        name: p
        for group in groups
        if group["scale_invariant"]
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    lr = config.other_lr if method.separate_lr else run.lr
    if method.rule is None:
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum), tracked
    return elropt.ELRSGD(groups, lr=lr, momentum=config.momentum, rule=method.rule), tracked


def make_schedule(optimizer: Optimizer, steps: int, linear_warmup: bool) -> LRScheduler:
    """Cosine to zero, after a linear warm-up over `WARMUP_SHARE` of the steps if asked for."""
    warmup = round(WARMUP_SHARE * steps) if linear_warmup else 0
    cosine = CosineAnnealingLR(optimizer, steps - warmup)
    if not warmup:
        return cosine
    linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])


def recorded_steps(steps: int) -> list[int]:
    """Steps at which the ELRs are recorded: 0, 10, 100, the last, and between them some evenly in the logarithm and
    some evenly."""
    last = steps - 1
    between = [*np.geomspace(1, max(last, 1), 12), *np.linspace(0, last, 12)]
    return sorted({step for step in (10, 100, *np.rint(between).astype(int).tolist()) if step < steps})


def plain_elrs(tracked: dict[str, Tensor], optimizer: Optimizer) -> list[float]:
    """λE of each tracked weight under plain SGD, one host read in all."""
    ratios = [w.grad.norm() / w.norm() for w in tracked.values() if w.grad is not None]
    return (optimizer.param_groups[0]["lr"] * torch.stack(ratios)).tolist() if ratios else []


@torch.no_grad()
def accuracy(model: nn.Module, dataset: data.Dataset, split: str, config: Config) -> float:
    """Share of the images of a part whose class has the largest logit."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=config.device)
    total = 0
    for images, labels in dataset.batches(split, 512, channels_last=config.channels_last):  # type: ignore[arg-type]
        with torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16, enabled=config.amp):
            correct += (model(images).argmax(1) == labels).sum()
        total += len(labels)
    return correct.item() / total


_loaded: dict[Config, data.Dataset] = {}


def _train_in_worker(run: Run, config: Config) -> dict[str, Any]:
    """`train` on the data that this process has loaded once."""
    if config not in _loaded:
        torch.set_num_threads(1 if config.device == "cpu" else torch.get_num_threads())
        _loaded[config] = load(config)
    return train(run, config, _loaded[config])


def load(config: Config) -> data.Dataset:
    """The data set of a configuration, on its device."""
    dataset = data.load(config.data, root=config.root, image_size=config.image_size, limit=config.limit)
    return dataset.to(config.device)


def train_all(runs: Sequence[Run], config: Config, jobs: int, console: Console) -> list[dict[str, Any]]:
    """All runs, `jobs` at a time, with a progress bar; rows in the order of `runs`."""
    rows: dict[Run, dict[str, Any]] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    spawn = torch.multiprocessing.get_context("spawn")
    with Progress(*columns, console=console) as progress, ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        task = progress.add_task("training", total=len(runs))
        futures = {pool.submit(_train_in_worker, run, config): run for run in runs}
        try:
            for future in as_completed(futures):
                run = futures[future]
                rows[run] = future.result()
                progress.update(task, advance=1, description=f"{run.model} {run.method} lr={run.lr:g}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [rows[run] for run in runs]


class Summary(NamedTuple):
    """A method on a model. Accuracies are in [0, 1]; arrays are over `lrs`."""

    lrs: np.ndarray
    val_mean: np.ndarray
    test_mean: np.ndarray
    test_std: np.ndarray
    best: int  # index of the best mean validation accuracy
    lr_range: float  # largest / smallest lr of the stretch around the best within 1 point of it
    spreads: dict[
        int, float
    ]  # step → geometric mean over the seeds of the applied ELR spread, at the best lr
    seconds: float


def summarize(rows: Iterable[dict[str, Any]]) -> Summary:
    """Mean over the seeds, the learning rate chosen by validation accuracy."""
    rows = list(rows)
    lrs = sorted({row["lr"] for row in rows})
    by_lr = [[row for row in rows if row["lr"] == lr] for lr in lrs]
    val = np.array([np.mean([row["val_accuracy"] for row in group]) for group in by_lr])
    test = [np.array([row["test_accuracy"] for row in group]) for group in by_lr]
    best = int(val.argmax())
    first = last = best
    while first > 0 and val[first - 1] >= val[best] - 0.01:
        first -= 1
    while last < len(lrs) - 1 and val[last + 1] >= val[best] - 0.01:
        last += 1
    return Summary(
        np.array(lrs),
        val,
        np.array([t.mean() for t in test]),
        np.array([t.std(ddof=1) if len(t) > 1 else 0.0 for t in test]),
        best,
        lrs[last] / lrs[first],
        spreads_over_steps(by_lr[best]),
        float(np.mean([row["seconds"] for row in rows])),
    )


def spreads_over_steps(rows: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Geometric mean over runs of max/min of the applied ELRs, at every step that all of them recorded."""
    steps = set.intersection(*(set(row["elr_steps"]) for row in rows))
    spreads = {}
    for step in sorted(steps):
        elrs = np.array([row["elrs"][row["elr_steps"].index(step)] for row in rows], dtype=float)
        elrs = np.where(np.isfinite(elrs) & (elrs > 0), elrs, np.nan)
        if not np.isnan(elrs).all(axis=1).any():
            spreads[step] = float(np.exp(np.log(np.nanmax(elrs, 1) / np.nanmin(elrs, 1)).mean()))
    return spreads


def results_table(model: str, summaries: dict[str, Summary], title: str) -> Table:
    """The comparison on one model."""
    table = Table(
        title=f"{model} on {title}",
        caption="lr chosen by validation accuracy; range: largest / smallest lr within 1 % of it; "
        "spread: max / min applied ELR at steps 0, 10, 100 and the last",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("optimizer", no_wrap=True)
    for column in ("best lr", "test accuracy", "range", "spread", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, s in summaries.items():
        spreads = [s.spreads.get(step) for step in (0, 10, 100, max(s.spreads, default=0))]
        table.add_row(
            name,
            f"{s.lrs[s.best]:g}",
            f"{100 * s.test_mean[s.best]:.1f} ± {100 * s.test_std[s.best]:.1f} %",
            f"×{s.lr_range:.3g}",
            " / ".join("–" if value is None else f"{value:.{0 if value >= 10 else 1}f}" for value in spreads),
            f"{s.seconds:.1f}",
        )
    return table


def draw(out: Path, model: str, summaries: dict[str, Summary], rows: Sequence[dict[str, Any]]) -> list[Path]:
    """The three figures of one model: accuracy against lr, spread over steps, ELR per layer over steps."""
    from matplotlib.figure import Figure

    units = sorted({METHODS[name].unit for name in summaries}, key=[m.unit for m in METHODS.values()].index)
    accuracies = Figure(figsize=(4 * len(units) + 1, 4), layout="constrained")
    for ax, unit in zip(np.atleast_1d(accuracies.subplots(1, len(units), sharey=True)), units, strict=True):
        lines = {
            name: (
                s.lrs,
                100 * s.test_mean,
                100 * (s.test_mean - s.test_std),
                100 * (s.test_mean + s.test_std),
            )
            for name, s in summaries.items()
            if METHODS[name].unit == unit
        }
        plots.accuracy_against_lr(ax, lines, xlabel=f"learning rate ({unit})")
        ax.set_ylabel("test accuracy (%)")
        ax.label_outer()
    spread = Figure(figsize=(6, 4), layout="constrained")
    plots.spread_over_steps(
        spread.subplots(),
        {name: (list(s.spreads), list(s.spreads.values())) for name, s in summaries.items() if s.spreads},
    )
    columns = min(3, len(summaries))
    grid = -(-len(summaries) // columns), columns
    layers = Figure(figsize=(4 * columns, 3 * grid[0] + 0.5), layout="constrained")
    axes = layers.subplots(*grid, sharex=True, sharey=True, squeeze=False).flatten()
    for ax, (name, s) in zip(axes, summaries.items(), strict=False):
        row = next(r for r in rows if r["method"] == name and r["lr"] == s.lrs[s.best])
        if row["elrs"] and row["elrs"][0]:
            plots.elr_over_steps(ax, row["elr_steps"], row["elrs"])
        ax.set_title(f"{name}, lr {s.lrs[s.best]:g}")
        ax.label_outer()
    for ax in axes[len(summaries) :]:
        ax.set_visible(False)
    paths = []
    for kind, figure in (("accuracy", accuracies), ("spread", spread), ("layers", layers)):
        paths.append(out / f"{model}-{kind}.png")
        plots.save(figure, paths[-1])
    return paths


def main(
    data_name: Annotated[str, typer.Option("--data", help=f"One of {', '.join(data.DATASETS)}.")] = "digits",
    path: Annotated[
        str | None, typer.Argument(help="The tree of --data imagefolder.", show_default=False)
    ] = None,
    root: Annotated[str | None, typer.Option(help="Folder of the data set's files.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Repeatable; of {', '.join(models.MODELS)}. Default: {' and '.join(DEFAULT_MODELS)}."
        ),
    ] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable; of {', '.join(METHODS)}. Default: all.")
    ] = None,
    lrs: Annotated[
        str | None, typer.Option(help="Comma-separated; for every optimizer. Default: a grid of each.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 … N-1.")] = 3,
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
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: the CPU's cores; 1 on a GPU.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the plots.")] = Path(
        "runs/accuracy"
    ),
) -> None:
    """Compare ELRSGD's rules with SGD over learning rates and seeds.

    Example: python -m benchmarks.accuracy --data cifar10-quick --model plain-20 --epochs 10 --seeds 3
    """
    console = Console()
    model, optimizer = model or DEFAULT_MODELS, optimizer or list(METHODS)
    unknown = [name for name in optimizer if name not in METHODS]
    if unknown:
        raise typer.BadParameter(f"unknown optimizer {unknown[0]!r}; choose one of {', '.join(METHODS)}")
    if (path is not None) != (data_name == "imagefolder"):
        raise typer.BadParameter("--data imagefolder takes the PATH of its tree; other data sets take --root")
    config = Config(
        data_name, path or root, image_size, limit, epochs, batch_size, momentum, weight_decay, other_lr, augment,
        device, amp, channels_last,
    )  # fmt: skip
    try:
        grid = None if lrs is None else [float(value) for value in lrs.split(",")]
        dataset = load(config)
        for net in model:
            models.build(net, in_shape=dataset.in_shape, classes=dataset.classes)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error
    runs = [
        Run(net, name, lr, seed)
        for net, name, seed in itertools.product(model, optimizer, range(seeds))
        for lr in grid or METHODS[name].lrs
    ]
    started = time.perf_counter()
    rows = train_all(runs, config, jobs or ((os.cpu_count() or 1) if device == "cpu" else 1), console)
    seconds = time.perf_counter() - started

    out.mkdir(parents=True, exist_ok=True)
    title = dataset.title
    described = {key: value for key, value in dataclasses.asdict(config).items() if key != "root"}
    report: dict[str, Any] = {
        "env": env_report.collect(),
        "config": described,
        "data": title,
    }
    report |= {"command_seconds": seconds, "seeds": seeds, "rows": rows}
    result_file = out / "accuracy.json"
    result_file.write_text(json.dumps(_without_nan(report), allow_nan=False) + "\n", encoding="utf-8")
    written = [result_file]
    for net in model:
        of_net = [row for row in rows if row["model"] == net]
        summaries = {name: summarize(row for row in of_net if row["method"] == name) for name in optimizer}
        console.print(results_table(net, summaries, title))
        written += draw(out, net, summaries, of_net)
    console.print(f"{len(rows)} runs in {seconds:.0f} s; wrote {', '.join(map(str, written))}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
