"""What sharding costs a step of ELRSGD: steps of FSDP2-sharded parameters, and the all-reduce alone, in real processes.

    python -m benchmarks.distributed.all_reduce --ranks 2 --ranks 4 --out runs/all_reduce.json

Gloo on the CPU; NCCL where there are two or more GPUs. A step is timed on every rank from a barrier on, and the slowest
rank counts; optimizers take turns step by step, and ratios are those of one turn. Bare all-reduces run back to back in
blocks; the sizes take turns block by block. With more ranks than cores, processes wait for each other's time slices:
times compare only within a run. *Processor* time is how long the threads of a rank work on the host; in the rest of the
time they wait for other ranks, and on a CPU for other processes.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing.spawn import spawn
from torch.optim import SGD, Optimizer

from benchmarks.common.command_line import one_of, table_of
from benchmarks.common.files import write_json
from benchmarks.common.statistics import grouped
from benchmarks.speed.options import workload_option
from benchmarks.speed.timing import synchronize, take_turns
from benchmarks.speed.workloads import WORKLOADS, Workload, param_groups
from elropt import ELRSGD, env_report
from elropt.plots import COLORS, MARKERS, save

Row = dict[str, Any]

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
DEFAULT_WORKLOADS = ("160x4", "resnet-56", "resnet-50")
BASELINE = "torch-sgd"
ALONE = "uniform, shards alone"
MICROSECONDS = "µs (25, 50, 75 %)"
PROCESSOR = "processor µs"
QUARTILES = (0.25, 0.5, 0.75)
SIZES = (8, 64, 512, 4096, 32768, 262144, 1048576, 4194304)  # bytes
BYTES_PER_ROW = 4 * 8  # of the packed sums [4, R], float64
CALLS = 10  # in a block of bare all-reduces
STEPS_UNTIL_KNOWN = 32  # on a GPU, from the end of the warm-up until the host knows of it
LR, MOMENTUM = 1e-3, 0.9


class Fit(NamedTuple):
    """time = latency + bytes / bandwidth: in s and bytes/s; root mean square of the relative residuals; points."""

    latency: float
    bandwidth: float
    error: float
    n: int


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Least squares of the relative residuals, so that 8 bytes count as much as a megabyte.

    Raises:
        ValueError: fewer than three different sizes, which any line would fit.
    """
    if len(set(sizes)) < 3:
        raise ValueError(
            f"sizes {sorted(set(sizes))} are too few to fit a line and tell its error: give at least 3"
        )
    x, y = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    columns = np.stack([1 / y, x / y], axis=1)
    (latency, per_byte), *_ = np.linalg.lstsq(columns, np.ones_like(y))
    residuals = columns @ [latency, per_byte] - 1
    return Fit(float(latency), float(1 / per_byte), float(np.sqrt(np.mean(residuals**2))), len(x))


class Sharded(nn.Module):
    """Parameters of a workload, for `fully_shard`."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)


def shard(workload: Workload, device: torch.device, ranks: int) -> list[Tensor]:
    """Its tensors sharded by FSDP2, with their gradients; the same on all ranks."""
    whole = workload.make(device)
    grads = [p.grad for p in whole]
    for p in whole:
        p.grad = None
    module = Sharded(whole)
    fully_shard(module, mesh=init_device_mesh(device.type, (ranks,)))
    params: list[Tensor] = list(module.parameters())
    for p, grad in zip(params, grads, strict=True):
        if isinstance(p, DTensor) and grad is not None:
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
    return params


def shards_alone(params: Sequence[Tensor]) -> list[Tensor]:
    """This rank's parts as plain parameters in the same memory: as many bytes to step on, nothing to add up."""
    here = []
    for p in params:
        if isinstance(p, DTensor) and isinstance(p.grad, DTensor):
            part = nn.Parameter(p.to_local().detach())
            part.grad = p.grad.to_local()
            here.append(part)
    return here


def optimizers(workload: Workload, params: list[Tensor]) -> dict[str, Optimizer]:
    """What is compared. All share weights and gradients; each has momentum buffers of its own."""

    def elr(members: list[Tensor], rule: str | None) -> ELRSGD:
        return ELRSGD(param_groups(members, workload.tracked), lr=LR, momentum=MOMENTUM, rule=rule)

    return {
        BASELINE: SGD(params, lr=LR, momentum=MOMENTUM),
        "none": elr(params, None),
        "warmup": elr(params, "warmup"),
        "warmup, handed over": elr(params, "warmup"),
        "uniform": elr(params, "uniform"),
        ALONE: elr(shards_alone(params), "uniform"),
    }


def hand_over(optimizer: Optimizer) -> None:
    """End its warm-up now."""
    for state in optimizer.state.values():
        if "handed_over" in state:
            state["handed_over"].fill_(1)


class Stopwatch:
    """Seconds of calls on all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, function: Callable[[], object], calls: int = 1) -> tuple[float, float]:
        """Per call of `calls` in a row, on this rank, from a barrier on: the time that passes, and the time that the
        threads of this process work."""
        distributed.barrier()
        synchronize(self.device)
        started, worked = time.perf_counter(), time.process_time()
        for _ in range(calls):
            function()
        synchronize(self.device)
        return (time.perf_counter() - started) / calls, (time.process_time() - worked) / calls

    def of_the_slowest(self, seconds: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
        """[2, n]: both times of n samples, each the largest of all ranks."""
        samples = torch.tensor(seconds, dtype=torch.float64, device=self.device).T.contiguous()
        distributed.all_reduce(samples, op=distributed.ReduceOp.MAX)
        return samples.cpu().numpy()


def count_all_reduces(optimizer: Optimizer) -> int:
    """The all-reduces of one step."""
    with patch.object(distributed, "all_reduce", wraps=distributed.all_reduce) as all_reduce:
        optimizer.step()
    return all_reduce.call_count


def microseconds(samples: NDArray[np.float64]) -> Row:
    """Quartiles, from what `Stopwatch.of_the_slowest` returns."""
    elapsed, worked = 1e6 * np.quantile(samples, QUARTILES, axis=1).T
    return {"us": elapsed.tolist(), "processor_us": worked.tolist()}


def time_steps(name: str, turns: int, watch: Stopwatch, ranks: int) -> list[Row]:
    """A row for every optimizer."""
    workload = WORKLOADS[name]()
    made = optimizers(workload, shard(workload, watch.device, ranks))
    for key, optimizer in made.items():
        optimizer.step()
        if "handed over" in key:
            hand_over(optimizer)
        for _ in range(STEPS_UNTIL_KNOWN if watch.device.type == "cuda" else 2):
            optimizer.step()
    counts = {key: count_all_reduces(optimizer) for key, optimizer in made.items()}
    blocks = {key: functools.partial(watch.seconds, optimizer.step) for key, optimizer in made.items()}
    seconds = take_turns(blocks, turns)  # in the same order on all ranks
    samples = {key: watch.of_the_slowest(values) for key, values in seconds.items()}
    return [
        {
            "kind": "step",
            "ranks": ranks,
            "workload": name,
            "optimizer": key,
            "all_reduces": counts[key],
            "bytes": BYTES_PER_ROW * sum(workload.tracked) if counts[key] else 0,
            "n": turns,
            **microseconds(values),
            "ratio": np.quantile(values[0] / samples[BASELINE][0], QUARTILES).tolist(),
        }
        for key, values in samples.items()
    ]


def time_bare(sizes: Sequence[int], blocks: int, watch: Stopwatch, ranks: int) -> list[Row]:
    """A row for every size in bytes: all-reduces of float64 vectors over all ranks. The sizes take turns."""
    vectors = [torch.zeros(size // 8, dtype=torch.float64, device=watch.device) for size in sizes]
    calls = [functools.partial(distributed.all_reduce, vector) for vector in vectors]
    seconds = [[watch.seconds(call, CALLS) for call in calls] for _ in range(blocks + 1)]
    return [
        {
            "kind": "bare",
            "ranks": ranks,
            "bytes": size,
            "n": blocks,
            **microseconds(watch.of_the_slowest(samples[1:])),
        }
        for size, samples in zip(sizes, zip(*seconds, strict=True), strict=True)
    ]


def work(
    rank: int, ranks: int, kind: str, workloads: list[str], turns: int, blocks: int, folder: str
) -> None:
    """What one process does; rank 0 writes the rows into the folder."""
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        BACKENDS[kind],
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        device_id=device if kind == "cuda" else None,
    )
    watch = Stopwatch(device)
    payloads = [BYTES_PER_ROW * sum(WORKLOADS[name]().tracked) for name in workloads]
    rows = time_bare(sorted({*SIZES, *payloads}), blocks, watch, ranks)
    for name in workloads:
        rows += time_steps(name, turns, watch, ranks)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    distributed.barrier()
    distributed.destroy_process_group()


def measure(ranks: int, kind: str, workloads: list[str], turns: int, blocks: int) -> list[Row]:
    """The rows of `ranks` processes on "cpu" or "cuda"."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(ranks, kind, workloads, turns, blocks, folder), nprocs=ranks)
        return json.loads(Path(folder, "rows.json").read_text())


def fits(rows: Sequence[Row]) -> list[Row]:
    """For each number of ranks a line through the medians of the bare all-reduces.

    Vectors of fewer than two elements per rank are left out: gloo cuts a vector into two segments per rank and does not
    send empty ones, so these take fewer messages.
    """
    bare = [row for row in rows if row["kind"] == "bare" and row["bytes"] >= 2 * 8 * row["ranks"]]
    found = []
    for ranks, points in grouped(bare, lambda row: row["ranks"]).items():
        line = fit([row["bytes"] for row in points], [1e-6 * row["us"][1] for row in points])
        found.append({"ranks": ranks, **line._asdict()})
    return found


def tables(report: dict[str, Any]) -> list[Table]:
    """Steps for each workload and number of ranks; the bare all-reduces; the lines fitted to them."""
    steps, bare = ([row for row in report["rows"] if row["kind"] == kind] for kind in ("step", "bare"))
    made = []
    for (workload, ranks), rows in grouped(steps, lambda row: (row["workload"], row["ranks"])).items():
        title = f"steps of {workload} on {ranks} ranks"
        table = table_of(title, "optimizer", "all-reduced", MICROSECONDS, "ratio", PROCESSOR)
        for row in rows:
            reduced = f"{row['all_reduces']} × {row['bytes']:,} B" if row["all_reduces"] else "–"
            elapsed, worked = times_of(row)
            table.add_row(row["optimizer"], reduced, elapsed, f"{row['ratio'][1]:.2f}", worked)
        made.append(table)
    table = table_of("bare all-reduces, back to back", "ranks", "bytes", MICROSECONDS, PROCESSOR)
    for row in bare:
        table.add_row(str(row["ranks"]), f"{row['bytes']:,}", *times_of(row))
    made.append(table)
    table = table_of("time = latency + bytes / bandwidth", "ranks", "latency µs", "GB/s", "error", "n")
    for line in report["fits"]:
        numbers = f"{1e6 * line['latency']:.0f}", f"{1e-9 * line['bandwidth']:.2f}", f"{line['error']:.0%}"
        table.add_row(str(line["ranks"]), *numbers, str(line["n"]))
    return [*made, table]


def times_of(row: Row) -> tuple[str, str]:
    """Quartiles of the time that passed, and the median of the work on a processor."""
    return " ".join(f"{value:,.0f}" for value in row["us"]), f"{row['processor_us'][1]:,.0f}"


def draw(report: dict[str, Any]) -> Figure:
    """Time of a bare all-reduce against bytes, with quartiles, and the fitted lines."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for line, color, marker in zip(report["fits"], COLORS, MARKERS, strict=False):
        points = [row for row in report["rows"] if row["kind"] == "bare" and row["ranks"] == line["ranks"]]
        sizes = np.array([row["bytes"] for row in points])
        low, middle, high = np.array([row["us"] for row in points]).T
        formula = f"{1e6 * line['latency']:.0f} µs + bytes / ({1e-9 * line['bandwidth']:.2f} GB/s)"
        label = f"{line['ranks']} ranks: {formula}"
        ax.errorbar(
            sizes, middle, [middle - low, high - middle], fmt=marker, color=color, label=label, capsize=2
        )
        dense = np.geomspace(sizes.min(), sizes.max(), 100)
        ax.plot(dense, 1e6 * (line["latency"] + dense / line["bandwidth"]), color=color, linewidth=1)
    ax.set(
        xscale="log",
        yscale="log",
        title=f"all-reduce, {report['config']['backend']}",
        xlabel="bytes",
        ylabel="µs (median and quartiles)",
    )
    ax.legend(fontsize="small")
    ax.grid(alpha=0.3)
    return figure


def main(
    ranks: Annotated[
        list[int] | None, typer.Option(min=2, help="Processes; repeatable. Default: 2 and 4.")
    ] = None,
    workload: Annotated[list[str] | None, workload_option(DEFAULT_WORKLOADS)] = None,
    turns: Annotated[int, typer.Option(min=2, help="Timed steps of each optimizer.")] = 60,
    blocks: Annotated[
        int, typer.Option(min=2, help=f"Blocks of {CALLS} bare all-reduces of each size.")
    ] = 60,
    device: Annotated[
        str | None,
        typer.Option(callback=one_of(BACKENDS), help="cpu or cuda. Default: cuda if there are two GPUs."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Result file; the plot is put beside it.")] = Path(
        "runs/all_reduce.json"
    ),
) -> None:
    """Time steps of sharded parameters and bare all-reduces, in real processes.

    Example: python -m benchmarks.distributed.all_reduce --ranks 2 --ranks 4 --out runs/all_reduce.json
    """
    worlds, names = ranks or [2, 4], workload or list(DEFAULT_WORKLOADS)
    gpus = torch.cuda.device_count()
    kind = device or ("cuda" if gpus >= 2 else "cpu")
    if kind == "cuda" and max(worlds) > gpus:
        raise typer.BadParameter(
            f"{max(worlds)} ranks need a GPU each, and there are {gpus}: ask for fewer, or for --device cpu",
            param_hint="--ranks",
        )
    console = Console()
    rows: list[Row] = []
    for world in worlds:
        with console.status(f"{world} ranks on {kind} …"):
            rows += measure(world, kind, names, turns, blocks)
    config = {"ranks": worlds, "workloads": names, "turns": turns, "blocks": blocks, "calls": CALLS}
    config |= {"backend": BACKENDS[kind], "quartiles": QUARTILES}
    report = {"kind": "all-reduce", "env": env_report.collect(), "config": config, "fits": fits(rows)}
    report["rows"] = rows
    write_json(out, report, indent=1)
    for table in tables(report):
        console.print(table)
    save(draw(report), out.with_suffix(".png"))
    console.print(f"wrote {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    typer.run(main)
