"""Compile the kernels of the speed benchmarks into Triton's cache, with many processes at a time.

    python -m benchmarks.speed.compile_ahead             # what step_time and kernels launch
    python -m benchmarks.speed.compile_ahead --sweep     # what `kernels sweep` launches

A kernel is compiled anew for each combination of dtypes, constants and number of param groups, but not for sizes: so
every optimizer takes some steps on few small tensors. Without this the first step of most rows would take seconds.
"""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console

from benchmarks.common.command_line import progress_bar
from benchmarks.speed import kernels
from benchmarks.speed.optimizers import OPTIMIZERS, OURS
from benchmarks.speed.options import check_device
from benchmarks.speed.step_time import Copy
from benchmarks.speed.timing import first_line, synchronize
from benchmarks.speed.workloads import Workload

DEVICE = "cuda"
STEPS = 3
# Numbers of tensors that are, and are not, few enough for one cooperative launch on a data-centre GPU.
TOGETHER, APART = 100, 1000


class Task(NamedTuple):
    """One thing to launch: steps of an optimizer, or else a kernel with a chunk size and a number of warps."""

    dtype: torch.dtype
    optimizer: str = ""
    groups: int = 1
    tensors: int = 1
    chunk: int = 0
    warps: int = 0


def step_tasks() -> list[Task]:
    """Steps as on the workloads: networks have tracked and other parameters, lists of tensors one param group."""
    kinds = [
        (torch.float32, 2, APART),
        (torch.float32, 1, APART),
        (torch.float32, 2, TOGETHER),
        (torch.float32, 1, TOGETHER),
        (torch.bfloat16, 2, APART),
    ]
    return [Task(kind[0], rule, *kind[1:]) for kind, rule in itertools.product(kinds, OURS)]


def kernel_tasks() -> list[Task]:
    """The kernels alone, as they are set."""
    return [Task(dtype) for dtype in kernels.DTYPES]


def sweep_tasks() -> list[Task]:
    """The kernels alone, with every setting of the sweep."""
    return [Task(dtype, chunk=c, warps=w) for dtype in kernels.DTYPES for c, w in kernels.settings()]


def workload_of(task: Task) -> Workload:
    """Tensors of 4 × 4 elements; all are tracked, with two param groups every second one."""
    n = task.tensors
    tracked = tuple(task.groups == 1 or i % 2 == 0 for i in range(n))
    return Workload("small", ((4, 4),) * n, tracked, task.dtype)


def perform(task: Task) -> tuple[str, float, str | None]:
    """Do a task. Returns its name, the seconds that it took, and what went wrong."""
    started = time.perf_counter()
    name = " ".join(str(value).removeprefix("torch.") for value in task if value)
    failure = None
    try:
        device = torch.device(DEVICE)
        workload = workload_of(task)
        if task.optimizer:
            Copy(workload, OPTIMIZERS[task.optimizer], workload.make(device)).warm_up(STEPS, device)
        else:
            tensors = kernels.Tensors(workload, task.dtype, device)
            changed = {"CHUNK": task.chunk, "NUM_WARPS": task.warps} if task.chunk else {}
            with kernels.constants(**changed):
                for kernel in kernels.SWEPT if task.chunk else kernels.KERNELS:
                    kernels.KERNELS[kernel][0](tensors)
        synchronize(device)
    except Exception as error:
        failure = f"{type(error).__name__}: {first_line(error)}"
    return name, time.perf_counter() - started, failure


def main(
    sweep: Annotated[bool, typer.Option("--sweep", help="Compile for `kernels sweep`.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="At a time.")] = min(12, os.cpu_count() or 1),
) -> None:
    """Compile the kernels of the speed benchmarks ahead.

    Example: python -m benchmarks.speed.compile_ahead --processes 8
    """
    check_device(DEVICE)
    tasks = sweep_tasks() if sweep else [*step_tasks(), *kernel_tasks()]
    console = Console()
    failed, slowest = 0, ("", 0.0)
    spawn = torch.multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(processes, len(tasks)), mp_context=spawn) as pool,
        progress_bar(console) as progress,
    ):
        for name, seconds, failure in progress.track(pool.map(perform, tasks), total=len(tasks)):
            slowest = max(slowest, (name, seconds), key=lambda pair: pair[1])
            if failure:
                failed += 1
                console.print(f"failed: {name}: {failure}", highlight=False, soft_wrap=True)
    done = f"{len(tasks) - failed} of {len(tasks)} tasks are compiled"
    console.print(f"{done}; the slowest, {slowest[0]}, took {slowest[1]:.1f} s")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
