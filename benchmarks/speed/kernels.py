"""Bandwidth of the Triton kernels: `measure`, `update` and a copy, by size, for the roofline.

    python -m benchmarks.speed.kernels                          # GB/s over sizes and workloads, float32 and bfloat16
    python -m benchmarks.speed.kernels sweep                    # which chunk size and number of warps are fastest
    python -m pytest benchmarks/speed/kernels.py --benchmark-only

Times are `triton.testing.do_bench`'s, milliseconds as [20 %, 50 %, 80 %] quantiles of `n` calls, the L2 cache flushed
before each. They include what the host cannot hide behind that flush. `bytes` are those that have to move: w and g read
("measure"), m too ("measure-momentum"); w, g, m read and w, m written ("update"); read and written ("copy").
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.speed.step_time import (
    LR,
    MOMENTUM,
    QUANTILES,
    WEIGHT_DECAY,
    Row,
    bar,
    first_line,
    show,
    write,
)
from benchmarks.speed.workloads import WORKLOADS, Workload, many
from elropt import env_report
from elropt import kernels as elr_kernels

# What matters most comes first: a run may end before it is through.
LISTS = ("resnet-50", "vit-b-16", "decoder-1b", "resnet-56", "2000-tensors")
SIZES = tuple(2**k for k in range(28, 11, -2))
DTYPES = (torch.float32, torch.bfloat16)
CHUNKS = (2048, 4096, 8192, 16384)
WARPS = (4, 8, 16)
SWEEP_LISTS = ("resnet-50", "vit-b-16", "resnet-56", "2000-tensors")

HYPER: dict[str, Any] = {
    "lr": LR,
    "momentum": MOMENTUM,
    "dampening": 0.0,
    "weight_decay": WEIGHT_DECAY,
    "nesterov": False,
    "maximize": False,
}


class Tensors:
    """Weights, gradients and momentum buffers of a workload, with a dtype of choice."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        made = workload.make(device)
        self.params = [p.detach().to(dtype) for p in made]
        self.grads = [p.grad.to(dtype) for p in made if p.grad is not None]
        self.buffers: list[Tensor | None] = [g.clone() for g in self.grads]
        self.elements, self.itemsize = workload.elements, dtype.itemsize


def copy(targets: Sequence[Tensor | None], sources: Sequence[Tensor]) -> None:
    """torch's copy of all tensors in as few launches as it can."""
    torch._foreach_copy_(targets, sources)  # type: ignore[attr-defined]


# What each one runs, and the tensors' worth of bytes that it has to move.
KERNELS: dict[str, tuple[Callable[[Tensors], object], int]] = {
    "copy": (lambda t: copy(t.buffers, t.grads), 2),
    "measure": (lambda t: elr_kernels.measure(t.params, t.grads), 2),
    "measure-momentum": (lambda t: elr_kernels.measure(t.params, t.grads, t.buffers), 3),
    "update": (lambda t: elr_kernels.update(t.params, t.grads, t.buffers, **HYPER), 5),
}
SWEPT = ("measure", "update")


def cases(sizes: Sequence[int], lists: Sequence[str]) -> dict[str, Workload]:
    """The workloads, and single tensors by their number of elements."""
    singles = {f"{size:,}": many(f"{size:,}", [size]) for size in sizes}
    return {name: WORKLOADS[name]() for name in lists} | singles


def bench(kernel: str, tensors: Tensors) -> Row:
    """Time and GB/s of one kernel on some tensors: replayed from a CUDA graph, as what the host does takes longer."""
    from triton.testing import do_bench

    run, tensors_moved = KERNELS[kernel]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(tensors)  # makes the tables, which belong to a stream
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run(tensors)
        times = do_bench(graph.replay, warmup=20, rep=60, return_mode="all")
    assert isinstance(times, list)
    ms = np.quantile(np.array(times), QUANTILES).tolist()
    moved = tensors_moved * tensors.elements * tensors.itemsize
    return {"ms": ms, "n": len(times), "bytes": moved, "gb_per_s": moved / (ms[1] * 1e6)}


@contextlib.contextmanager
def recorded(row: Row, report: dict[str, Any], out: Path) -> Iterator[None]:
    """Add the row to the result file once it is complete, or with what went wrong."""
    try:
        yield
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {first_line(error)}"
    report["rows"].append(row)
    write(out, report)


def all_rows(device: torch.device, report: dict[str, Any], out: Path, console: Console) -> None:
    """Every kernel on every case; the result file grows by a row at a time."""
    every = cases(SIZES, LISTS)
    with bar(console) as progress:
        task = progress.add_task("kernels", total=len(every) * len(DTYPES) * len(KERNELS))
        for (case, workload), dtype in itertools.product(every.items(), DTYPES):
            tensors = None
            for kernel in KERNELS:
                row: Row = {"kernel": kernel, "case": case, "dtype": str(dtype).removeprefix("torch.")}
                row |= {"tensors": len(workload.shapes), "elements": workload.elements}
                progress.update(task, description=f"{case} {row['dtype']} {kernel}")
                with recorded(row, report, out):
                    tensors = tensors or Tensors(workload, dtype, device)
                    row |= bench(kernel, tensors)
                progress.advance(task)
            del tensors
            torch.cuda.empty_cache()


@contextlib.contextmanager
def constants(**values: int) -> Iterator[None]:
    """The kernels' module constants, wherever a module has taken them over by name."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            for module_name, module in list(sys.modules.items()):
                if module_name.startswith("elropt.kernels") and hasattr(module, name):
                    patch.setattr(module, name, value)
        yield


def is_correct(device: torch.device) -> bool:
    """Whether `update` and `measure` are right on tensors with full chunks and rests."""
    tensors = Tensors(many("", [1, 63, 4096, 100_003]), torch.float32, device)
    tensors.grads = [torch.randn_like(g) for g in tensors.grads]
    momenta = [torch.randn_like(g) for g in tensors.grads]
    tensors.buffers = [*momenta]
    expected = []
    for w, g, m in zip(tensors.params, tensors.grads, momenta, strict=True):
        expected.append(w - LR * (MOMENTUM * m + g + WEIGHT_DECAY * w))
    sums = elr_kernels.measure(tensors.params, tensors.grads)
    norms = torch.stack([w.double().square().sum() for w in tensors.params])
    right = torch.allclose(sums[0].double(), norms, rtol=1e-5)
    elr_kernels.update(tensors.params, tensors.grads, tensors.buffers, **HYPER)
    return right and all(
        torch.allclose(w, e, rtol=1e-5, atol=1e-9) for w, e in zip(tensors.params, expected, strict=True)
    )


def settings() -> list[tuple[int, int]]:
    """Chunk sizes and numbers of warps to try; 128 elements in a thread do not fit into registers."""
    return [(chunk, warps) for chunk, warps in itertools.product(CHUNKS, WARPS) if chunk <= 2048 * warps]


def sweep_rows(device: torch.device, report: dict[str, Any], out: Path, console: Console) -> None:
    """Every chunk size and number of warps on the workloads, in float32 and bfloat16."""
    every = cases((), SWEEP_LISTS)
    with bar(console) as progress:
        task = progress.add_task("sweep", total=len(settings()) * len(every) * len(DTYPES))
        for (case, workload), dtype in itertools.product(every.items(), DTYPES):
            tensors = Tensors(workload, dtype, device)
            for chunk, warps in settings():
                progress.update(task, description=f"{case} chunk {chunk} warps {warps}")
                row: Row = {
                    "case": case,
                    "dtype": str(dtype).removeprefix("torch."),
                    "chunk": chunk,
                    "warps": warps,
                }
                with recorded(row, report, out), constants(CHUNK=chunk, NUM_WARPS=warps):
                    row["correct"] = is_correct(device)
                    row |= {kernel: bench(kernel, tensors) for kernel in SWEPT}
                progress.advance(task)
            del tensors
            torch.cuda.empty_cache()


def best_settings(rows: Sequence[Row]) -> Table:
    """The fastest setting of each kernel on each case, beside all the others' range."""
    table = Table(title="fastest chunk size and number of warps", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("case", "kernel", "chunk", "warps", "GB/s", "slowest GB/s"):
        table.add_column(column)
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        for kernel in SWEPT:
            of_case = [
                row
                for row in rows
                if (row["case"], row["dtype"]) == (case, dtype) and row.get("correct") and kernel in row
            ]
            if not of_case:
                table.add_row(f"{case} {dtype}", kernel, "–", "–", "–", "none was right")
                continue
            ranked = sorted(of_case, key=lambda row: row[kernel]["gb_per_s"])
            best = ranked[-1]
            table.add_row(
                f"{case} {dtype}",
                kernel,
                f"{best['chunk']:,}",
                str(best["warps"]),
                f"{best[kernel]['gb_per_s']:,.0f}",
                f"{ranked[0][kernel]['gb_per_s']:,.0f}",
            )
    return table


def bandwidths(rows: Sequence[Row]) -> Table:
    """GB/s by case and kernel."""
    table = Table(title="GB/s, cold L2 cache", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for kernel in KERNELS:
        table.add_column(kernel, justify="right")
    for case, dtype in dict.fromkeys((row["case"], row["dtype"]) for row in rows):
        found = {
            row["kernel"]: row.get("gb_per_s") for row in rows if (row["case"], row["dtype"]) == (case, dtype)
        }
        table.add_row(f"{case} {dtype}", *(show(found.get(kernel), ",.0f") for kernel in KERNELS))
    return table


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def start(kind: str) -> tuple[torch.device, dict[str, Any]]:
    """The device and an empty report; refuses to go on without a GPU."""
    if not torch.cuda.is_available() or not elr_kernels.available():
        raise typer.BadParameter("this needs a CUDA device and triton")
    return torch.device("cuda"), {"kind": kind, "env": env_report.collect(), "rows": []}


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/kernels/kernels.json"),
) -> None:
    """Measure the bandwidth of each kernel over sizes and workloads, or what a command below says.

    Example: python -m benchmarks.speed.kernels --out runs/kernels.json
    """
    if context.invoked_subcommand:
        return
    device, report = start("kernels")
    console = Console()
    all_rows(device, report, out, console)
    console.print(bandwidths(report["rows"]))
    console.print(f"wrote {out}")


@app.command()
def sweep(
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/kernels/sweep.json"),
) -> None:
    """Try chunk sizes and numbers of warps, and print the best.

    Example: python -m benchmarks.speed.kernels sweep --out runs/sweep.json
    """
    device, report = start("sweep")
    console = Console()
    sweep_rows(device, report, out, console)
    console.print(best_settings(report["rows"]))
    console.print(f"wrote {out}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["4,096", f"{2**24:,}", *LISTS])
def test_kernel(benchmark: Any, case: str, kernel: str) -> None:
    """Wall-clock time of a call in float32, with the device idle before and after it."""
    workload = WORKLOADS[case]() if case in WORKLOADS else many(case, [int(case.replace(",", ""))])
    tensors = Tensors(workload, torch.float32, torch.device("cuda"))

    def call() -> None:
        KERNELS[kernel][0](tensors)
        torch.cuda.synchronize()

    call()
    benchmark.group = case
    benchmark(call)


if __name__ == "__main__":
    app()
