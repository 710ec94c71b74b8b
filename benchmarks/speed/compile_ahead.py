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
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console

from benchmarks.speed import kernels
from benchmarks.speed.step_time import OPTIMIZERS, Copy, check_device, first_line
from benchmarks.speed.workloads import Workload

DEVICE = "cuda"
STEPS = 3
# So many chunks go in one cooperative launch on a data-centre GPU, and so many do not.
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
    """Those of the workloads: networks have tracked and other parameters, `2000-tensors` and its like one group."""
    rules = [name for name in OPTIMIZERS if name.startswith("elr-")]
    kinds = [
        (torch.float32, 2, APART),
        (torch.float32, 1, APART),
        (torch.float32, 2, TOGETHER),
        (torch.float32, 1, TOGETHER),
        (torch.bfloat16, 2, APART),
    ]
    return [Task(kind[0], rule, *kind[1:]) for kind, rule in itertools.product(kinds, rules)]


def kernel_tasks() -> list[Task]:
    """The kernels alone, as they are set."""
    return [Task(dtype) for dtype in kernels.DTYPES]


def sweep_tasks() -> list[Task]:
    """The kernels alone, with every setting of the sweep."""
    return [Task(dtype, chunk=c, warps=w) for dtype in kernels.DTYPES for c, w in kernels.settings()]


def workload_of(task: Task) -> Workload:
    """Tensors of 4 × 4 elements, with two groups every other one tracked."""
    n = task.tensors
    tracked = tuple(task.groups == 1 or i % 2 == 0 for i in range(n))
    return Workload("small", tuple(map(str, range(n))), ((4, 4),) * n, tracked, task.dtype)


def perform(task: Task) -> str:
    """Launch it; says what took how long, or went wrong."""
    started = time.perf_counter()
    name = " ".join(str(value).removeprefix("torch.") for value in task if value)
    try:
        device = torch.device(DEVICE)
        workload = workload_of(task)
        if task.optimizer:
            copy = Copy(workload, OPTIMIZERS[task.optimizer], workload.make(device))
            for _ in range(STEPS):
                copy.step()
        else:
            tensors = kernels.Tensors(workload, task.dtype, device)
            changed = {"CHUNK": task.chunk, "NUM_WARPS": task.warps} if task.chunk else {}
            with kernels.constants(**changed):
                for kernel in kernels.SWEPT if task.chunk else kernels.KERNELS:
                    kernels.KERNELS[kernel][0](tensors)
        torch.cuda.synchronize()
    except Exception as error:
        return f"failed: {name}: {type(error).__name__}: {first_line(error)}"
    return f"{name}: {time.perf_counter() - started:.1f} s"


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
    failed = 0
    with torch.multiprocessing.get_context("spawn").Pool(min(processes, len(tasks))) as pool:
        for done, line in enumerate(pool.imap_unordered(perform, tasks), start=1):
            failed += line.startswith("failed")
            console.print(f"{done}/{len(tasks)} {line}", highlight=False)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
