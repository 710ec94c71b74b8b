"""Whole training steps of ResNet-50, with torch's fused SGD and with rules of ELRSGD: `step_time end-to-end`.

Optimizers take turns in short blocks of steps, in a random order each round, so that a drift of the machine hits all
alike. Each row has `step`, the time of a step in microseconds, and over torch's fused SGD in the same round `ratio`,
its [20 %, 50 %, 80 %] quantiles over the rounds, and `ratio_interval`, a 95 % interval of its median (percentile
bootstrap over the rounds).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.optim import Optimizer

from benchmarks.common import models
from benchmarks.common.command_line import progress_bar, show, table_of
from benchmarks.common.files import write_json
from benchmarks.speed.optimizers import BASELINE, OPTIMIZERS
from benchmarks.speed.options import DeviceOption, check_device
from benchmarks.speed.timing import (
    QUANTILES,
    Row,
    build_all,
    median_interval,
    quantiles,
    synchronize,
    take_turns,
)
from elropt import env_report

COMPARED = (BASELINE, "elr-none", "elr-warmup", "elr-uniform")
WARM_UP_STEPS = {"cuda": 10, "cpu": 2}
ROUNDS_PER_WRITE = 10


def build_resnet(tiny: bool) -> tuple[str, torch.nn.Module, tuple[int, int, int, int]]:
    """ResNet-50 of torchvision, else of `benchmarks.common.models`, and the shape of a batch; `tiny`: ResNet-8."""
    if tiny:
        net = models.build("resnet-8", in_shape=(3, 32, 32), classes=10)
        return "benchmarks.common.models resnet-8", net, (4, 3, 32, 32)
    shape = (64, 3, 224, 224)
    try:
        from torchvision.models import resnet50  # type: ignore[import-not-found]
    except ImportError:
        net = models.build("resnet-50", in_shape=shape[1:], classes=1000)
        return "benchmarks.common.models resnet-50", net, shape
    return "torchvision resnet50", resnet50(), shape


class Training:
    """A model that trains on one batch."""

    def __init__(self, optimizer: str, device: torch.device, tiny: bool) -> None:
        torch.manual_seed(0)
        self.model_name, model, shape = build_resnet(tiny)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(10 if tiny else 1000, (shape[0],), device=device)
        self.device = device
        # A layer without a gradient cannot be judged, and so keeps the warm-up going.
        still = torch.nn.Parameter(torch.ones(4, device=device))
        still.grad = torch.zeros_like(still)
        params = [still, *self.model.parameters()]
        tracked = [p is still or p.dim() == 4 for p in params]
        self.optimizer: Optimizer = OPTIMIZERS[optimizer].build(params, tracked)

    def step(self) -> None:
        """Forward, backward, update."""
        self.model.zero_grad()  # and not the layer without a gradient
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()


def timed_block(training: Training, steps: int) -> float:
    """Seconds per step of some steps in a row; on a GPU one more goes before, which fills the queue."""
    if training.device.type != "cuda":
        started = time.perf_counter()
        for _ in range(steps):
            training.step()
        return (time.perf_counter() - started) / steps
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    training.step()
    start.record()
    for _ in range(steps):
        training.step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / steps


def measure(
    optimizers: Sequence[str],
    device: torch.device,
    rounds: int,
    steps: int,
    tiny: bool,
    progress: Progress,
    keep: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:
    """A row for each optimizer. `keep` gets the rows so far now and then."""
    torch.backends.cudnn.benchmark = True
    task = progress.add_task("warm-up", total=rounds)

    def build(name: str) -> Training:
        training = Training(name, device, tiny)
        for _ in range(WARM_UP_STEPS[device.type]):
            training.step()
        synchronize(device)
        return training

    def rows_of(seconds: dict[str, list[float]]) -> list[Row]:
        return failed + [row_of(name, training, seconds, steps) for name, training in trainings.items()]

    def after_round(seconds: dict[str, list[float]]) -> None:
        progress.update(task, advance=1, description="end to end")
        if any(len(taken) % ROUNDS_PER_WRITE == 0 for taken in seconds.values()):
            keep(rows_of(seconds))

    trainings, failed = build_all(optimizers, build)
    blocks = {name: partial(timed_block, training, steps) for name, training in trainings.items()}
    return rows_of(take_turns(blocks, rounds, after_round))


def row_of(name: str, training: Training, seconds: dict[str, list[float]], steps: int) -> Row:
    """What the blocks of one optimizer say."""
    mine = np.array(seconds[name])
    flags = [s["handed_over"] for s in training.optimizer.state.values() if "handed_over" in s]
    row: Row = {
        "optimizer": name,
        "model": training.model_name,
        "batch": list(training.images.shape),
        "step": quantiles(mine * 1e6),
        "ratio": None,
        "ratio_interval": None,
        "steps_per_block": steps,
        "handed_over": bool(flags[0]) if name == "elr-warmup" and flags else None,
    }
    if BASELINE in seconds:
        ratios = mine / np.array(seconds[BASELINE])
        row |= {"ratio": np.quantile(ratios, QUANTILES).tolist(), "ratio_interval": median_interval(ratios)}
    return row


def results_table(rows: Sequence[Row]) -> Table:
    """Time of a step, and its ratio."""
    caption = f"ratio: median over the rounds, to {BASELINE}; 95 %: interval of the median; 20 to 80 %: of the rounds"
    columns = ("optimizer", "ms", "ratio", "95 %", "20 to 80 %", "note")
    table = table_of("training step, end to end", *columns, caption=caption)
    for row in rows:
        low, middle, high = row.get("ratio") or (None,) * 3
        interval = row.get("ratio_interval")
        table.add_row(
            row["optimizer"],
            show(row["step"]["us"][1] / 1e3 if "step" in row else None, ".2f"),
            show(middle, ".4f"),
            f"{interval[0]:.4f} … {interval[1]:.4f}" if interval else "–",
            f"{show(low, '.4f')} … {show(high, '.4f')}",
            row.get("error") or ("handed over" if row.get("handed_over") else ""),
        )
    return table


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each optimizer.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a block.")] = 2,
    device: DeviceOption = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A ResNet-8 on 4 images, to try it.")] = False,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/step-time/end_to_end.json"),
) -> None:
    """Training steps of ResNet-50: 64 synthetic images of 224 pixels, bf16 autocast, channels-last.

    Example: python -m benchmarks.speed.step_time end-to-end --rounds 200
    """
    check_device(device)
    console = Console()
    config = {"device": torch.device(device).type, "rounds": rounds, "steps": steps, "tiny": tiny}
    report: dict[str, Any] = {"kind": "end-to-end", "env": env_report.collect(), "config": config}

    def keep(rows: list[Row]) -> None:
        write_json(out, report | {"rows": rows})

    with progress_bar(console) as progress:
        rows = measure(COMPARED, torch.device(device), rounds, steps, tiny, progress, keep)
    keep(rows)
    console.print(results_table(rows))
    console.print(f"wrote {out}")
