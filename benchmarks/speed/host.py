"""What a step costs the host, with its launches: `step_time host`.

Optimizers take turns in short blocks of steps, in a random order each round, so that a drift of the machine hits all
alike. Times are in microseconds, as [20 %, 50 %, 80 %] quantiles over the rounds:

- `cpu`: time until `step()` returns, the device idle before it; the median of a block.
- `eager`: time per step of a block that is issued without waiting, until the device has done it.

`cpu_ratio` and `eager_ratio` are over torch's fused SGD in the same round, with 95 % intervals of their medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common.command_line import progress_bar, show, table_of
from benchmarks.common.files import write_json
from benchmarks.speed.optimizers import BASELINE, OPTIMIZERS
from benchmarks.speed.options import DeviceOption, check_device, workload_option
from benchmarks.speed.timing import (
    Row,
    build_all,
    median_interval,
    quantiles,
    synchronize,
    take_turns,
)
from benchmarks.speed.workloads import WORKLOADS
from elropt import env_report

COMPARED = (BASELINE, "torch-foreach", "elr-none", "elr-warmup", "elr-uniform")
DEFAULT_WORKLOADS = ("160x4", "2000x4", "resnet-50")
MODES = ("cpu", "eager")
WARM_UP_STEPS = 20
STEPS = 5  # of a block


def block(step: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """`cpu` and `eager` of a block of steps, in seconds."""
    apart = []
    for _ in range(STEPS):
        synchronize(device)
        started = time.perf_counter()
        step()
        apart.append(time.perf_counter() - started)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize(device)
    return float(np.median(apart)), (time.perf_counter() - started) / STEPS


def measure(name: str, device: torch.device, rounds: int, progress: Progress) -> list[Row]:
    """A row for each optimizer on a workload."""
    workload = WORKLOADS[name]()

    def build(optimizer: str) -> Callable[[], tuple[float, float]]:
        step = OPTIMIZERS[optimizer].build(workload.make(device), workload.tracked).step
        for _ in range(WARM_UP_STEPS):
            step()
        synchronize(device)
        return partial(block, step, device)

    task = progress.add_task(name, total=rounds)
    blocks, failed = build_all(COMPARED, build)
    seconds = take_turns(blocks, rounds, lambda _: progress.advance(task))
    size = {"workload": name, "tensors": len(workload.shapes), "elements": workload.elements}
    return [size | row for row in [*failed, *(row_of(optimizer, seconds) for optimizer in blocks)]]


def row_of(optimizer: str, seconds: dict[str, list[tuple[float, float]]]) -> Row:
    """What the blocks of one optimizer say."""
    row: Row = {"optimizer": optimizer}
    for mode, mine in zip(MODES, np.array(seconds[optimizer]).T, strict=True):
        row[mode] = quantiles(mine * 1e6)
        if BASELINE in seconds:
            ratios = mine / np.array(seconds[BASELINE]).T[MODES.index(mode)]
            row[f"{mode}_ratio"] = {"median": float(np.median(ratios)), "interval": median_interval(ratios)}
    return row


def results_table(rows: list[Row]) -> Table:
    """The rows of one workload."""
    caption = f"µs per step, median; ×: median ratio to {BASELINE} in the same round, and its 95 % interval"
    table = table_of(
        f"{rows[0]['workload']}: host", "optimizer", "CPU", "×", "95 %", "eager", "×", "95 %", caption=caption
    )
    for row in rows:
        cells = []
        for mode in MODES:
            ratio = row.get(f"{mode}_ratio") or {}
            interval = ratio.get("interval")
            cells += [
                show(row[mode]["us"][1] if mode in row else None, ",.1f"),
                show(ratio.get("median"), ".2f"),
                f"{interval[0]:.2f} … {interval[1]:.2f}" if interval else row.get("error", "–"),
            ]
        table.add_row(row["optimizer"], *cells)
    return table


def main(
    workload: Annotated[list[str] | None, workload_option(DEFAULT_WORKLOADS)] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each optimizer.")] = 100,
    device: DeviceOption = "cuda",
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/step-time/host.json"),
) -> None:
    """Host time of a step over 160 and 2,000 tensors of 4 elements, and those of ResNet-50.

    Example: python -m benchmarks.speed.step_time host --rounds 200
    """
    check_device(device)
    names = workload or DEFAULT_WORKLOADS
    console = Console()
    config = {"device": torch.device(device).type, "rounds": rounds, "steps": STEPS}
    report: dict[str, Any] = {"kind": "host", "env": env_report.collect(), "config": config, "rows": []}
    with progress_bar(console) as progress:
        for name in names:
            report["rows"] += measure(name, torch.device(device), rounds, progress)
            write_json(out, report)
    for name in names:
        console.print(results_table([row for row in report["rows"] if row["workload"] == name]))
    console.print(f"wrote {out}")
