"""What Python does for a step of ELRSGD's Triton backend, measured without a GPU: launches are left out.

    python -m benchmarks.host_time --out runs/host_time.json

Kernels run under the interpreter on the CPU, and here each launch is replaced by nothing. What is left is the host's
work: finding out whether tensors, state and options are those of the step before, and preparing arguments. The peer is
the whole `step()` of torch's fused SGD on the CPU, on tensors of 4 elements, so that it computes next to nothing.
Optimizers take turns step by step; ratios are those of one turn. On a GPU, `benchmarks.step_time host` measures both
with their launches.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.optim import SGD, Optimizer

from elropt import ELRSGD, env_report

TENSORS = (160, 2000)
BASELINE = "torch-fused"
QUANTILES = (0.2, 0.5, 0.8)
RULES = {"elr-none": None, "elr-warmup": "warmup", "elr-uniform": "uniform", "elr-angle": "angle"}


class NoLaunch:
    """In the place of a kernel."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *arguments, **options: None


def tensors(count: int) -> list[nn.Parameter]:
    """Parameters of 4 elements with gradients."""
    params = [nn.Parameter(torch.randn(2, 2)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(2, 2)
    return params


def optimizers(count: int) -> dict[str, Optimizer]:
    """torch's SGD and ELRSGD's rules, each on `count` tensors of its own, all of them tracked."""
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
    made: dict[str, Optimizer] = {
        BASELINE: SGD(tensors(count), fused=True, **options),
        "torch-foreach": SGD(tensors(count), foreach=True, **options),
    }
    for name, rule in RULES.items():
        groups = [{"params": tensors(count), "scale_invariant": True}]
        made[name] = ELRSGD(groups, rule=rule, fused=True, **options)
    return made


def seconds_per_step(count: int, turns: int) -> dict[str, np.ndarray]:
    """For each optimizer, the seconds of each of its steps."""
    made = optimizers(count)
    samples: dict[str, list[float]] = {name: [] for name in made}
    for optimizer in made.values():
        for _ in range(5):
            optimizer.step()
    gc.collect()
    gc.disable()
    try:
        for _ in track(range(turns), description=f"{count:,} tensors"):
            for name, optimizer in made.items():
                started = time.perf_counter()
                optimizer.step()
                samples[name].append(time.perf_counter() - started)
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in samples.items()}


def main(
    turns: Annotated[int, typer.Option(min=1, help="Steps of each optimizer.")] = 300,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/host_time.json"),
) -> None:
    """Host time of a step over 160 and 2,000 small tensors, launches left out.

    Example: python -m benchmarks.host_time --turns 1000
    """
    torch.set_num_threads(1)
    step_module = importlib.import_module("elropt.kernels.step")
    no_launches = dict.fromkeys(("measure_kernel", "update_kernel", "cooperative_kernel"), NoLaunch())
    rows = []
    with patch.multiple(step_module, **no_launches):
        for count in TENSORS:
            samples = seconds_per_step(count, turns)
            for name, seconds in samples.items():
                rows.append(
                    {
                        "tensors": count,
                        "optimizer": name,
                        "n": turns,
                        "us": (1e6 * np.quantile(seconds, QUANTILES)).tolist(),
                        "ratio": np.quantile(seconds / samples[BASELINE], QUANTILES).tolist(),
                    }
                )
    report = {
        "kind": "host-time",
        "env": env_report.collect(),
        "config": {"turns": turns, "quantiles": QUANTILES},
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    table = Table(title="host time of a step, without launches", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("tensors", "optimizer", "µs (median)", "ratio to torch-fused (20 %, 50 %, 80 %)"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in rows:
        ratios = ", ".join(f"{value:.2f}" for value in row["ratio"])
        table.add_row(f"{row['tensors']:,}", row["optimizer"], f"{row['us'][1]:.0f}", ratios)
    console.print(table)
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
