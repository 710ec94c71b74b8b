"""What a Recorder costs a training run, without a GPU.

    python -m benchmarks.speed.recording --out runs/recording-cpu.json

A 30-layer BN-MLP trains on digits, batches of 128, one thread, with torch's SGD (momentum) and with AdamW: without a
Recorder, with one that records every 100th step, and with one that records every step: three in turns of 100 training
steps, in another order each turn, on the same net. Times are CPU time of this process, which other processes
disturb less than they disturb the clock. A row has, as [20 %, 50 %, 80 %] quantiles over the turns:

- `share`: (time of the turn) / (time of the same turn without a Recorder) − 1;
- `step_us`: microseconds of `optimizer.step()` where it is not recorded; `recorded_us`: where it is.

`cost` is the share once more, from the medians of single steps, which a busy machine disturbs least: what the recorded
and the other steps of a turn take more than those without a Recorder, over the median of a turn without one.
"""

from __future__ import annotations

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
from benchmarks.speed.timing import QUANTILES, Row, median_interval, take_turns
from elropt import Recorder, env_report

STEPS = 100  # of a turn, of which a Recorder with every=100 records one
EVERY: dict[str, int | None] = {"none": None, "every=100": 100, "every=1": 1}
NETS = ("bn-mlp-30",)
OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(SGD, lr=0.03, momentum=0.9, weight_decay=5e-4),
    "adamw": partial(AdamW, lr=1e-3, weight_decay=0.05),
}
BATCH = 128


class Turn(NamedTuple):
    """CPU seconds of the steps of one turn, [STEPS]: whole training steps, and `optimizer.step()` alone."""

    training: np.ndarray
    stepping: np.ndarray


class Run:
    """A training run that goes on from turn to turn."""

    def __init__(self, net: str, optimizer: str, folder: Path) -> None:
        torch.manual_seed(0)
        digits = data.load("digits")
        self.images, self.labels = digits.train_x.float() / 8 - 1, digits.train_y
        self.net = models.build(net, in_shape=digits.in_shape, classes=digits.classes)
        self.optimizer: Optimizer = OPTIMIZERS[optimizer](self.net.named_parameters())
        self.folder = folder

    def turn(self, every: int | None) -> Turn:
        """Train for `STEPS` steps, with a Recorder if `every` is a number."""
        if every is None:
            return self.steps()
        with Recorder(self.optimizer, self.folder / f"{every}.jsonl", every=every):
            return self.steps()

    def steps(self) -> Turn:
        training, stepping = np.zeros(STEPS), np.zeros(STEPS)
        for i in range(STEPS):
            started = time.process_time()
            batch = torch.randint(len(self.images), (BATCH,))
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(self.images[batch]), self.labels[batch]).backward()
            before = time.process_time()
            self.optimizer.step()
            ended = time.process_time()
            training[i], stepping[i] = ended - started, ended - before
        return Turn(training, stepping)


def rows_of(net: str, optimizer: str, turns: int) -> list[Row]:
    """A row for each Recorder."""
    with tempfile.TemporaryDirectory() as folder, progress_bar(Console()) as progress:
        run = Run(net, optimizer, Path(folder))
        run.turn(1)
        task = progress.add_task(f"{net}, {optimizer}", total=turns)
        samples = take_turns(
            {name: partial(run.turn, every) for name, every in EVERY.items()},
            turns,
            lambda _: progress.advance(task),
        )
    return [
        {
            "net": net,
            "optimizer": optimizer,
            "recorder": name,
            **figures(of_run, samples["none"], EVERY[name]),
        }
        for name, of_run in samples.items()
    ]


def figures(turns: list[Turn], without: list[Turn], every: int | None) -> Row:
    """The numbers of a row, see above; `without`: the same turns without a Recorder."""
    shares = np.array([a.training.sum() / b.training.sum() for a, b in zip(turns, without, strict=True)]) - 1
    stepping = np.stack([turn.stepping for turn in turns])
    is_recorded = np.arange(STEPS) % every == 0 if every else np.zeros(STEPS, dtype=bool)
    plain = float(np.median([turn.stepping for turn in without]))
    row: Row = {
        "turn_ms": (1e3 * np.quantile([turn.training.sum() for turn in turns], QUANTILES)).tolist(),
        "share": np.quantile(shares, QUANTILES).tolist(),
        "share_interval": median_interval(shares),
        "n": len(turns),
    }
    added = 0.0
    for name, of_kind in (("step_us", ~is_recorded), ("recorded_us", is_recorded)):
        row[name] = (1e6 * np.quantile(stepping[:, of_kind], QUANTILES)).tolist() if of_kind.any() else None
        if of_kind.any():
            added += of_kind.sum() * (float(np.median(stepping[:, of_kind])) - plain)
    row["cost"] = added / float(np.median([turn.training.sum() for turn in without]))
    return row


def results_table(rows: list[Row]) -> Table:
    """Shares of the training time."""
    columns = ("µs of a step", "recorded", "cost", "share (20 %, 50 %, 80 %)")
    table = table_of("what a Recorder costs", "net", "optimizer", "Recorder", *columns)
    for row in rows:
        steps = [f"{row[name][1]:,.0f}" if row[name] else "–" for name in ("step_us", "recorded_us")]
        shares = ", ".join(f"{100 * share:+.1f} %" for share in row["share"])
        table.add_row(
            row["net"], row["optimizer"], row["recorder"], *steps, f"{100 * row['cost']:.2f} %", shares
        )
    return table


def main(
    turns: Annotated[int, typer.Option(min=1, help=f"Turns of {STEPS} training steps of each run.")] = 40,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/recording.json"),
) -> None:
    """What a Recorder costs a training run on the CPU, every 100 steps and at every step.

    Example: python -m benchmarks.speed.recording --turns 40
    """
    torch.set_num_threads(1)
    rows = [row for net in NETS for optimizer in OPTIMIZERS for row in rows_of(net, optimizer, turns)]
    config = {"turns": turns, "steps": STEPS, "batch": BATCH, "quantiles": QUANTILES}
    write_json(
        out, {"kind": "recording", "env": env_report.collect(), "config": config, "rows": rows}, indent=1
    )
    console = Console()
    console.print(results_table(rows))
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
