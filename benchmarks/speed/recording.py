"""What a Recorder costs a training run, without a GPU.

    python -m benchmarks.speed.recording --out runs/recording-cpu.json

A 30-layer BN-MLP trains on digits, batches of 128, one thread, with torch's SGD (momentum) and with AdamW. Three kinds
of training steps take turns, step by step, in another order each turn, on the same net: without a Recorder (`none`),
with one that does not record this step (`waiting`), and with one that does (`recorded`). Times are CPU time of this
process, which other processes disturb less than they disturb the clock. A row has

- `us`: [20 %, 50 %, 80 %] quantiles of microseconds of a training step: forward, backward and `optimizer.step()`;
- `added_us`: the median of what such a step takes more than the step without a Recorder of the same turn, in
  microseconds of `optimizer.step()`, with its 95 % interval (bootstrap);
- `cost`: what follows for a run that records every 100th step, and every step: the mean of `added_us` over its steps as
  a share of the median training step without a Recorder.
"""

from __future__ import annotations

import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.common import data, models
from benchmarks.common.command_line import progress_bar, table_of
from benchmarks.common.files import write_json
from benchmarks.speed.timing import QUANTILES, Row, median_interval, quantiles, take_turns
from elropt import Recorder, env_report

EVERY = (100, 1)
KINDS: dict[str, int | None] = {
    "none": None,
    "waiting": 1,
    "recorded": 0,
}  # the number of the step; it records the 0th
NETS = ("bn-mlp-30",)
OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(SGD, lr=0.03, momentum=0.9, weight_decay=5e-4),
    "adamw": partial(AdamW, lr=1e-3, weight_decay=0.05),
}
BATCH = 128


class Step(NamedTuple):
    """CPU microseconds of a training step, and of `optimizer.step()` in it."""

    training: float
    stepping: float


class Run:
    """A training run that goes on from step to step."""

    def __init__(self, net: str, optimizer: str, folder: Path) -> None:
        torch.manual_seed(0)
        digits = data.load("digits")
        self.images, self.labels = digits.train_x.float() / 8 - 1, digits.train_y
        self.net = models.build(net, in_shape=digits.in_shape, classes=digits.classes)
        self.optimizer: Optimizer = OPTIMIZERS[optimizer](self.net.named_parameters())
        self.path = folder / "run.jsonl"

    def step(self, number: int | None) -> Step:
        """A step, which has this number for a Recorder; None: without a Recorder."""
        if number is None:
            return self.timed_step()
        with Recorder(self.optimizer, self.path, every=max(EVERY), first_step=number):
            return self.timed_step()

    def timed_step(self) -> Step:
        started = time.process_time()
        batch = torch.randint(len(self.images), (BATCH,))
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(self.images[batch]), self.labels[batch]).backward()
        before = time.process_time()
        self.optimizer.step()
        ended = time.process_time()
        return Step(1e6 * (ended - started), 1e6 * (ended - before))


def rows_of(net: str, optimizer: str, turns: int) -> list[Row]:
    """A row for each kind of step."""
    with tempfile.TemporaryDirectory() as folder, progress_bar(Console()) as progress:
        run = Run(net, optimizer, Path(folder))
        for number in 5 * list(KINDS.values()):
            run.step(number)
        task = progress.add_task(f"{net}, {optimizer}", total=turns)
        samples = take_turns(
            {kind: partial(run.step, number) for kind, number in KINDS.items()},
            turns,
            lambda _: progress.advance(task),
        )
    return [{"net": net, "optimizer": optimizer, **row} for row in figures(samples)]


def figures(samples: dict[str, list[Step]]) -> list[Row]:
    """The numbers of the rows, see above."""
    training, stepping = (
        {kind: np.array([getattr(step, part) for step in steps]) for kind, steps in samples.items()}
        for part in ("training", "stepping")
    )
    added = {kind: stepping[kind] - stepping["none"] for kind in KINDS}
    typical = {kind: float(np.median(values)) for kind, values in added.items()}
    whole = float(np.median(training["none"]))
    cost = {f"every={k}": (typical["recorded"] + (k - 1) * typical["waiting"]) / k / whole for k in EVERY}
    return [
        {
            "step": kind,
            **quantiles(training[kind]),
            "added_us": typical[kind],
            "added_interval": median_interval(added[kind]),
            "cost": cost if kind == "recorded" else None,
        }
        for kind in KINDS
    ]


def results_table(rows: list[Row]) -> Table:
    """Shares of the training time."""
    columns = ("µs (median)", "added by the Recorder", *(f"cost of every={k}" for k in EVERY))
    table = table_of("what a Recorder costs", "optimizer", "step", *columns)
    for row in rows:
        low, high = row["added_interval"] or (math.nan, math.nan)
        costs = [f"{100 * cost:.2f} %" for cost in (row["cost"] or {}).values()] or [""] * len(EVERY)
        added = f"{row['added_us']:,.0f} [{low:,.0f}, {high:,.0f}]"
        table.add_row(row["optimizer"], row["step"], f"{row['us'][1]:,.0f}", added, *costs)
    return table


def main(
    turns: Annotated[int, typer.Option(min=1, help="Steps of each kind.")] = 500,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/recording.json"),
) -> None:
    """What a Recorder costs a training run on the CPU, every 100 steps and at every step.

    Example: python -m benchmarks.speed.recording --turns 500
    """
    torch.set_num_threads(1)
    rows = [row for net in NETS for optimizer in OPTIMIZERS for row in rows_of(net, optimizer, turns)]
    config = {"turns": turns, "batch": BATCH, "quantiles": QUANTILES}
    write_json(
        out, {"kind": "recording", "env": env_report.collect(), "config": config, "rows": rows}, indent=1
    )
    console = Console()
    console.print(results_table(rows))
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
