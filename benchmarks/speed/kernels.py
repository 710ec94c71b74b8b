"""Bandwidth of the Triton kernels: `measure`, `update` and a copy, by size, for the roofline.

    python -m benchmarks.speed.kernels                          # GB/s over sizes and workloads, float32 and bfloat16
    python -m benchmarks.speed.kernels sweep                    # which chunk size and number of warps are fastest

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
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.command_line import progress_bar, show, table_of
from benchmarks.common.files import write_json
from benchmarks.common.statistics import grouped
from benchmarks.speed.optimizers import HYPER
from benchmarks.speed.timing import QUANTILES, Row, first_line
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

SGD: dict[str, Any] = {**HYPER, "dampening": 0.0, "nesterov": False, "maximize": False}


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
    "update": (lambda t: elr_kernels.update(t.params, t.grads, t.buffers, **SGD), 5),
}
SWEPT = ("measure", "update")


def cases(sizes: Sequence[int], lists: Sequence[str]) -> dict[str, Workload]:
    """The workloads, and single tensors by their number of elements."""
    singles = {f"{size:,}": many(f"{size:,}", [size]) for size in sizes}
    return {name: WORKLOADS[name]() for name in lists} | singles


def bench(tensors: Tensors, kernel: str) -> Row:
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
def constants(**values: int) -> Iterator[None]:
    """The kernels' module constants, wherever a module has taken them over by name."""
    modules = [module for name, module in sys.modules.items() if name.startswith("elropt.kernels")]
    with contextlib.ExitStack() as patches:
        for name, module in itertools.product(values, modules):
            if hasattr(module, name):
                patches.enter_context(patch.object(module, name, values[name]))
        yield


def is_correct(device: torch.device) -> bool:
    """Whether `update` and `measure` are right on tensors with full chunks and rests."""
    tensors = Tensors(many("", [1, 63, 4096, 100_003]), torch.float32, device)
    tensors.grads = [torch.randn_like(g) for g in tensors.grads]
    momenta = [torch.randn_like(g) for g in tensors.grads]
    tensors.buffers = [*momenta]
    expected = []
    for w, g, m in zip(tensors.params, tensors.grads, momenta, strict=True):
        expected.append(w - SGD["lr"] * (SGD["momentum"] * m + g + SGD["weight_decay"] * w))
    sums = elr_kernels.measure(tensors.params, tensors.grads)
    norms = torch.stack([w.double().square().sum() for w in tensors.params])
    right = torch.allclose(sums[0].double(), norms, rtol=1e-5)
    elr_kernels.update(tensors.params, tensors.grads, tensors.buffers, **SGD)
    return right and all(
        torch.allclose(w, e, rtol=1e-5, atol=1e-9) for w, e in zip(tensors.params, expected, strict=True)
    )


def settings() -> list[tuple[int, int]]:
    """Chunk sizes and numbers of warps to try; 128 elements in a thread do not fit into registers."""
    return [(chunk, warps) for chunk, warps in itertools.product(CHUNKS, WARPS) if chunk <= 2048 * warps]


class Run:
    """A run of `kernels` or `sweep`: its result file, which grows by a row at a time."""

    def __init__(self, kind: str, out: Path) -> None:
        if not torch.cuda.is_available() or not elr_kernels.available():
            raise typer.BadParameter("this needs a CUDA device and triton")
        self.out, self.console, self.device = out, Console(), torch.device("cuda")
        self.report: dict[str, Any] = {"kind": kind, "env": env_report.collect(), "rows": []}

    def measure(
        self, every: dict[str, Workload], variants: Sequence[dict[str, Any]], row_of: Callable[..., Row]
    ) -> None:
        """For each workload, dtype and variant a row of what `row_of(tensors, **variant)` returns, or its error."""
        with progress_bar(self.console) as progress:
            task = progress.add_task("", total=len(every) * len(DTYPES) * len(variants))
            for (case, workload), dtype in itertools.product(every.items(), DTYPES):
                tensors = None
                for variant in variants:
                    row: Row = {"case": case, "dtype": str(dtype).removeprefix("torch."), **variant}
                    progress.update(task, description=" ".join(map(str, row.values())))
                    row |= {"tensors": len(workload.shapes), "elements": workload.elements}
                    try:
                        tensors = tensors or Tensors(workload, dtype, self.device)
                        row |= row_of(tensors, **variant)
                    except Exception as error:
                        row["error"] = f"{type(error).__name__}: {first_line(error)}"
                    self.report["rows"].append(row)
                    write_json(self.out, self.report)
                    progress.advance(task)
                del tensors
                torch.cuda.empty_cache()

    def finish(self, table: Callable[[Sequence[Row]], Table]) -> None:
        """Print what came out."""
        self.console.print(table(self.report["rows"]))
        self.console.print(f"wrote {self.out}")


def try_setting(tensors: Tensors, chunk: int, warps: int) -> Row:
    """Whether the kernels are right with a chunk size and a number of warps, and how fast they are."""
    with constants(CHUNK=chunk, NUM_WARPS=warps):
        row: Row = {"correct": is_correct(tensors.params[0].device)}
        return row | {kernel: bench(tensors, kernel) for kernel in SWEPT}


def best_settings(rows: Sequence[Row]) -> Table:
    """The fastest setting of each kernel on each case, beside the speed of the slowest."""
    columns = ("case", "kernel", "chunk", "warps", "GB/s", "slowest GB/s")
    table = table_of("fastest chunk size and number of warps", *columns)
    for (case, dtype), of_case in grouped(rows, lambda row: (row["case"], row["dtype"])).items():
        for kernel in SWEPT:
            right = [row for row in of_case if row.get("correct") and kernel in row]
            ranked = sorted(right, key=lambda row: row[kernel]["gb_per_s"])
            cells = ["–", "–", "–", "none was right"]
            if ranked:
                best = ranked[-1]
                speeds = [f"{row[kernel]['gb_per_s']:,.0f}" for row in (best, ranked[0])]
                cells = [f"{best['chunk']:,}", str(best["warps"]), *speeds]
            table.add_row(f"{case} {dtype}", kernel, *cells)
    return table


def bandwidths(rows: Sequence[Row]) -> Table:
    """GB/s by case and kernel."""
    table = table_of("GB/s, cold L2 cache", "case", *KERNELS)
    for (case, dtype), of_case in grouped(rows, lambda row: (row["case"], row["dtype"])).items():
        found = {row["kernel"]: row.get("gb_per_s") for row in of_case}
        table.add_row(f"{case} {dtype}", *(show(found.get(kernel), ",.0f") for kernel in KERNELS))
    return table


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


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
    run = Run("kernels", out)
    run.measure(cases(SIZES, LISTS), [{"kernel": kernel} for kernel in KERNELS], bench)
    run.finish(bandwidths)


@app.command()
def sweep(
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/kernels/sweep.json"),
) -> None:
    """Try chunk sizes and numbers of warps, and print the best.

    Example: python -m benchmarks.speed.kernels sweep --out runs/sweep.json
    """
    run = Run("sweep", out)
    variants = [{"chunk": chunk, "warps": warps} for chunk, warps in settings()]
    run.measure(cases((), SWEEP_LISTS), variants, try_setting)
    run.finish(best_settings)


if __name__ == "__main__":
    app()
