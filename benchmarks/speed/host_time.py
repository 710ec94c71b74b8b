"""What a step of ELRSGD costs on the host, measured without a GPU.

    python -m benchmarks.speed.host_time cpu --out runs/host-time-cpu-steps.json

| part | what | peer of the ratios |
|---|---|---|
| `launches` | Python's work for a step of the kernels; 160, 2,000 tiny tensors, 160 param groups | torch's fused SGD |
| `cpu` | steps without kernels; the tensors of a 30-layer BN-MLP, of ResNet-50, and these cut down | torch's for-loop |
| `groups` | steps without kernels; 160 tensors of 4 elements in 1 and in 160 param groups | torch's for-loop, 1 group |

`launches`: on the CPU kernels run under the interpreter, and here nothing is done in place of each launch. What is left
is to find out whether tensors, state and options are those of the step before, and to prepare arguments. The peer is
the whole `step()` of torch's fused SGD on the CPU, which computes next to nothing. On a GPU,
`benchmarks.speed.step_time host` measures both with their launches.

Everything runs on one thread. Optimizers take turns step by step, in another order each turn; ratios are those of one
turn. In `cpu` and `groups` each optimizer has tensors of its own, and two sets of gradients that take turns, as after
`zero_grad` and `backward`; their times are CPU time of this process, which other processes disturb less.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.common import models
from benchmarks.common.command_line import progress_bar, table_of
from benchmarks.common.files import write_json
from benchmarks.speed.optimizers import HYPER, RULES_BY_NAME
from benchmarks.speed.timing import QUANTILES, Row, quantiles, take_turns
from benchmarks.speed.workloads import WORKLOADS, Workload, param_groups
from elropt import ELRSGD, env_report
from elropt.rules import RULES

TENSORS = (160, 2000)
GROUPS = 160
TORCH: dict[str, dict[str, Any]] = {
    "torch-loop": {"foreach": False},
    "torch-foreach": {"foreach": True},
    "torch-fused": {"fused": True},
}
CUT = 4  # elements of each dimension that are left of ResNet-50's tensors, cut down
KERNELS = ("measure_kernel", "update_kernel", "cooperative_kernel")


class Part(enum.StrEnum):
    """What is measured."""

    LAUNCHES = "launches"
    CPU = "cpu"
    GROUPS = "groups"


@dataclasses.dataclass(frozen=True)
class Case:
    """Optimizers that take turns on tensors of the same shapes, and the one that their times are divided by."""

    name: str
    tensors: int
    elements: int
    make: Callable[[], dict[str, Optimizer]]
    baseline: str
    slowdown: int = 1  # one turn for so many of the smallest case


class NoLaunch:
    """In the place of a kernel."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *arguments, **options: None


def no_launches() -> AbstractContextManager[Any]:
    """Leave the launches of kernels out."""
    module = importlib.import_module("elropt.kernels.fused_step")
    return patch.multiple(module, **dict.fromkeys(KERNELS, NoLaunch()))


def groups_of(tensors: int, count: int = 1) -> list[dict[str, Any]]:
    """Tensors of 4 elements with gradients in so many param groups, with learning rates of their own."""
    params = [nn.Parameter(torch.randn(2, 2)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(2, 2)
    size = tensors // count
    return [
        {"params": params[i * size : (i + 1) * size], "lr": HYPER["lr"] * (1 - i / 1000)}
        for i in range(count)
    ]


def tracked(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same groups, of scale-invariant tensors."""
    return [{**group, "scale_invariant": True} for group in groups]


def without_launches(count: int) -> dict[str, Optimizer]:
    """torch's SGD and ELRSGD's rules, each on `count` tensors of its own."""
    options: dict[str, Any] = {**HYPER, "fused": True}
    made: dict[str, Optimizer] = {
        name: SGD(groups_of(count), **HYPER, **TORCH[name]) for name in ("torch-fused", "torch-foreach")
    }
    for name, rule in RULES_BY_NAME.items():
        made[name] = ELRSGD(tracked(groups_of(count)), rule=rule, **options)
    if count == GROUPS:
        groups = tracked(groups_of(count, GROUPS))
        made[f"elr-uniform, {GROUPS} groups"] = ELRSGD(groups, rule="uniform", **options)
    return made


def bn_mlp() -> Workload:
    """The tensors of a 30-layer BN-MLP of width 128 on digits; a BatchNorm follows each matrix but the head."""
    net = models.build("bn-mlp-30", in_shape=(1, 8, 8), classes=10)
    shapes = tuple(tuple(p.shape) for p in net.parameters())
    matrices = [i for i, shape in enumerate(shapes) if len(shape) == 2]
    is_tracked = tuple(i in matrices[:-1] for i in range(len(shapes)))
    return Workload("bn-mlp-30", shapes, is_tracked)


def cut_down(workload: Workload) -> Workload:
    """As many tensors of as many dimensions, of at most `CUT` elements each way."""
    shapes = tuple(tuple(min(size, CUT) for size in shape) for shape in workload.shapes)
    return dataclasses.replace(workload, name=f"{workload.name}, cut down", shapes=shapes)


def real_steps(workload: Workload) -> dict[str, Optimizer]:
    """torch's SGD and ELRSGD's rules, as a user gets them, each on tensors of its own."""
    cpu = torch.device("cpu")
    made: dict[str, Optimizer] = {
        name: SGD(workload.make(cpu), **options, **HYPER) for name, options in TORCH.items()
    }
    for name, rule in RULES_BY_NAME.items():
        made[name] = ELRSGD(param_groups(workload.make(cpu), workload.tracked), rule=rule, **HYPER)
    return made


def in_groups() -> dict[str, Optimizer]:
    """torch's SGD and ELRSGD's rules with one and with 160 param groups."""
    made: dict[str, Optimizer] = {}
    for count in (1, GROUPS):
        for name, options in TORCH.items():
            made[f"{name}, {count}"] = SGD(groups_of(GROUPS, count), **HYPER, **options)
        for name, rule in RULES_BY_NAME.items():
            if not RULES[rule].ends:  # it would end while it is measured
                made[f"{name}, {count}"] = ELRSGD(tracked(groups_of(GROUPS, count)), rule=rule, **HYPER)
    return made


def cases(part: Part) -> list[Case]:
    """What a part measures."""
    if part == Part.LAUNCHES:
        return [
            Case(f"{count} x 4", count, 4 * count, lambda count=count: without_launches(count), "torch-fused")
            for count in TENSORS
        ]
    if part == Part.GROUPS:
        return [Case(f"{GROUPS} x 4", GROUPS, 4 * GROUPS, in_groups, "torch-loop, 1")]
    resnet = WORKLOADS["resnet-50"]()
    return [
        Case(w.name, len(w.shapes), w.elements, lambda w=w: real_steps(w), "torch-loop", slowdown)
        for w, slowdown in ((bn_mlp(), 1), (cut_down(resnet), 1), (resnet, 15))
    ]


def spare_gradients(optimizer: Optimizer) -> list[list[Tensor | None]]:
    """A copy of the gradients, by param group."""
    return [
        [None if p.grad is None else p.grad.clone() for p in group["params"]]
        for group in optimizer.param_groups
    ]


def swap_gradients(optimizer: Optimizer, spare: list[list[Tensor | None]]) -> None:
    """Exchange the gradients of the parameters for those in `spare`."""
    for group, held in zip(optimizer.param_groups, spare, strict=True):
        for i, p in enumerate(group["params"]):
            p.grad, held[i] = held[i], p.grad


def seconds_per_step(case: Case, turns: int, *, two_gradients: bool) -> dict[str, np.ndarray]:
    """For each optimizer, the seconds of each of its steps; `two_gradients`: of CPU time."""
    clock = time.process_time if two_gradients else time.perf_counter

    def timed_step(optimizer: Optimizer, spare: list[list[Tensor | None]]) -> float:
        if two_gradients:
            swap_gradients(optimizer, spare)
        started = clock()
        optimizer.step()
        return clock() - started

    steps = {}
    for name, optimizer in case.make().items():
        for _ in range(5):
            optimizer.step()
        steps[name] = partial(timed_step, optimizer, spare_gradients(optimizer))
    rounds = max(1, turns // case.slowdown)
    with progress_bar(Console()) as progress:
        task = progress.add_task(case.name, total=rounds)
        samples = take_turns(steps, rounds, lambda _: progress.advance(task))
    return {name: np.array(values) for name, values in samples.items()}


def rows_of(part: Part, turns: int) -> list[Row]:
    """A row per case and optimizer."""
    rows = []
    for case in cases(part):
        samples = seconds_per_step(case, turns, two_gradients=part != Part.LAUNCHES)
        for name, seconds in samples.items():
            row: Row = {"case": case.name, "tensors": case.tensors, "elements": case.elements}
            row |= {"optimizer": name, **quantiles(1e6 * seconds)}
            row["ratio"] = np.quantile(seconds / samples[case.baseline], QUANTILES).tolist()
            rows.append(row)
    return rows


def results_table(part: Part, rows: list[Row]) -> Table:
    """Medians, and ratios in one turn."""
    baseline = cases(part)[0].baseline
    ratios = f"ratio to {baseline} (20 %, 50 %, 80 %)"
    table = table_of(f"host time of a step: {part}", "optimizer", "tensors", "µs (median)", ratios)
    for row in rows:
        shown = ", ".join(f"{value:.2f}" for value in row["ratio"])
        table.add_row(row["optimizer"], row["case"], f"{row['us'][1]:,.0f}", shown)
    return table


def main(
    part: Annotated[Part, typer.Argument(help="What is measured.")] = Part.LAUNCHES,
    turns: Annotated[int, typer.Option(min=1, help="Steps of each optimizer (ResNet-50: a 15th).")] = 300,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/host_time.json"),
) -> None:
    """Host time of a step: of the Triton backend with launches left out, or whole steps on the CPU.

    Example: python -m benchmarks.speed.host_time cpu --turns 300
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with no_launches() if part == Part.LAUNCHES else contextlib.nullcontext():
        rows = rows_of(part, turns)
    config = {"part": part.value, "turns": turns, "quantiles": QUANTILES}
    report = {"kind": "host-time", "env": env_report.collect(), "config": config, "rows": rows}
    write_json(out, report, indent=1)
    console = Console()
    console.print(results_table(part, rows))
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
