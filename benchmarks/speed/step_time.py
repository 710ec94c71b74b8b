"""What a step costs: ELRSGD's rules, torch's SGD and other packages' optimizers on the tensors of real networks.

    python -m benchmarks.speed.step_time                                       # everything, one GPU, some minutes
    python -m benchmarks.speed.step_time --workload resnet-50 --optimizer torch-fused --optimizer elr-warmup
    python -m benchmarks.speed.step_time end-to-end                            # ResNet-50 training steps
    python -m benchmarks.speed.step_time host                                  # what a step costs the host
    python -m benchmarks.speed.step_time --device cpu --workload tiny          # try it without a GPU: CPU time alone
    python -m pytest benchmarks/speed/step_time.py --benchmark-only            # the same steps under pytest-benchmark

Each (workload, optimizer) is a row of the result file, with times in microseconds as [20 %, 50 %, 80 %] quantiles:

- `graph`: device time of a step replayed from a CUDA graph. The L2 cache is cold: the graph steps through as many
  copies of weights, gradients and buffers as fill it three times over (`cold`: false where there are fewer, for
  compiled and for very slow steps). None where the step cannot be captured (`graph_error`).
- `eager`: time per step of steps issued one after the other without waiting, through the same copies: the larger of
  what the device and what the host need.
- `cpu`: time until `step()` returns, the device idle before it.
- `launches`, `memory_ops`: kernels, and copies and fills, of one step, counted by the profiler.
- `extra_bytes`: peak of the device memory allocated during a step, over what was allocated before.
- `bytes`: what ELRSGD reads and writes; for the others what SGD with momentum has to: w, g and m read, w and m
  written. `gb_per_s` is that over the time, `of_copy` its share of the bandwidth of a 1 GiB copy in the same run.
- `handed_over`: for "warmup", whether it ended and what was measured is plain SGD.

A worker process measures; one that fails or hangs costs its row and is replaced.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.optim import SGD, Optimizer

from benchmarks.speed.workloads import NETWORKS, WORKLOADS, Workload, clone
from elropt import ELRSGD, env_report, kernels

LR, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4
QUANTILES = (0.2, 0.5, 0.8)
WARM_UP_STEPS = 10
COLD_FACTOR = 3  # the copies' bytes over those of the L2 cache
MAX_COPIES = 64
START_LIMIT = 300.0  # seconds until a process that does not even import torch is given up
ROW_LIMIT = 30.0  # and one that does not finish a row
COMPILED_ROW_LIMIT = 120.0
COPY_BYTES = 2**30
STEPS_PER_PASS = 8  # at least, between two events
LONG_STEP = 2e-3  # seconds; such a step is a pass, and a CUDA graph, of its own
SLOW_STEP = 20e-3  # seconds; such a step is measured on a single copy

Row = dict[str, Any]


class Entry(NamedTuple):
    """An optimizer to measure."""

    build: Callable[[Workload, list[Tensor]], Optimizer]
    compiled: bool = False
    measured: Literal["grad", "both"] | None = None  # what an ELRSGD rule reads before the update
    capturable: bool = True  # False: it reads values back to the host


def elr(rule: str | None, *, project: bool = False) -> Callable[[Workload, list[Tensor]], Optimizer]:
    """ELRSGD, told which tensors are scale-invariant; Triton on a GPU, foreach on the CPU."""

    def build(workload: Workload, params: list[Tensor]) -> Optimizer:
        options: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
        options |= {"fused": True} if params[0].is_cuda else {"foreach": True}
        return ELRSGD(workload.param_groups(params), rule=rule, project=project, **options)

    return build


def torch_sgd(**backend: bool) -> Callable[[Workload, list[Tensor]], Optimizer]:
    """torch.optim.SGD."""
    return lambda _, params: SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **backend)


def peer(module: str, name: str, **options: Any) -> Callable[[Workload, list[Tensor]], Optimizer]:
    """An optimizer of another package, imported when it is built."""

    def build(_: Workload, params: list[Tensor]) -> Optimizer:
        optimizer = getattr(importlib.import_module(module), name)
        return optimizer(params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **options)

    return build


# pytorch-optimizer's LARS writes into the gradients: they grow from step to step, which costs no time.
OPTIMIZERS = {
    "torch-fused": Entry(torch_sgd(fused=True)),
    "torch-foreach": Entry(torch_sgd(foreach=True)),
    "torch-for-loop": Entry(torch_sgd(foreach=False)),
    "torch-compiled": Entry(torch_sgd(foreach=True), compiled=True),
    "elr-none": Entry(elr(None)),
    "elr-warmup": Entry(elr("warmup"), measured="grad"),
    "elr-uniform": Entry(elr("uniform"), measured="grad"),
    "elr-angle": Entry(elr("angle"), measured="grad"),
    "elr-sphere": Entry(elr("sphere"), measured="grad"),
    "elr-project": Entry(elr(None, project=True), measured="both"),
    "timm-lars": Entry(peer("timm.optim", "Lars")),
    "timm-sgdp": Entry(peer("timm.optim", "SGDP"), capturable=False),
    "optimi-sgd": Entry(peer("optimi", "SGD", triton=True, kahan_sum=False)),
    "pytorch-optimizer-lars": Entry(peer("pytorch_optimizer", "LARS")),
    "bitsandbytes-sgd": Entry(peer("bitsandbytes.optim", "SGD")),
    "bitsandbytes-lars": Entry(peer("bitsandbytes.optim", "LARS")),
}
BASELINE = "torch-fused"
HOST_OPTIMIZERS = (BASELINE, "torch-foreach", "elr-none", "elr-warmup", "elr-uniform")


class Job(NamedTuple):
    """One thing that a worker does."""

    kind: Literal["copy", "time", "cpu", "launches"]
    device: str
    seconds: float
    workload: str = ""
    optimizer: str = ""


def perform(job: Job) -> Row:
    """Do it; a failure is a row with `error`, and `restart` where this process is not to be trusted any more."""
    try:
        device = torch.device(job.device)
        if job.kind == "copy":
            return copy_bandwidth(device)
        workload = WORKLOADS[job.workload]()
        if job.kind == "launches":
            return count_launches(workload, OPTIMIZERS[job.optimizer], device)
        return time_row(workload, OPTIMIZERS[job.optimizer], device, job.seconds, cpu_only=job.kind == "cpu")
    except ImportError as error:
        return {"error": f"not installed: {first_line(error)}"}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"error": f"{type(error).__name__}: {first_line(error)}", "restart": True}
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError):  # a lost context
                torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class Copy:
    """One copy of a workload's tensors and the optimizer that steps on them."""

    def __init__(self, workload: Workload, entry: Entry, params: list[Tensor]) -> None:
        self.params = params
        self.optimizer = entry.build(workload, params)
        self.step: Callable[[], object] = (
            torch.compile(self.optimizer.step) if entry.compiled else self.optimizer.step
        )


def time_row(
    workload: Workload, entry: Entry, device: torch.device, seconds: float, *, cpu_only: bool = False
) -> Row:
    """Every time of one optimizer on one workload; each of the three is sampled for a third of `seconds`."""
    cuda = device.type == "cuda" and not cpu_only
    row: Row = dict.fromkeys(("graph", "eager", "launches", "memory_ops", "extra_bytes", "cold"))
    # Everything runs on the stream that graphs are captured on: what the warm-up prepares for a stream is there.
    with on_stream(device), no_garbage_collection():
        copies = [Copy(workload, entry, workload.make(device))]
        per_step = warm_up(copies[0], WARM_UP_STEPS, device)
        if cuda:
            wanted = copies_for(workload, device)
            # Each copy would be compiled anew.
            single = entry.compiled or per_step > SLOW_STEP
            copies += [
                Copy(workload, entry, clone(copies[0].params)) for _ in range(0 if single else wanted - 1)
            ]
            row["cold"] = len(copies) * workload.footprint >= COLD_FACTOR * l2_bytes(device)
            for copy in copies[1:]:
                warm_up(copy, 3, device)
        row["copies"] = len(copies)
        row["cpu"] = cpu_time(copies[0].step, device, seconds / 3 if cuda else seconds)
        row["bytes"] = bytes_of(workload, entry, copies[0]) if cuda else None
        repeats = 1 if per_step > LONG_STEP else -(-STEPS_PER_PASS // len(copies))
        if cuda:
            row["extra_bytes"] = extra_bytes(copies[0].step)
            row["eager"] = device_time([copy.step for copy in copies] * repeats, seconds / 3)
        row["handed_over"] = handed_over(copies)
        if cuda and not entry.capturable:
            row["graph_error"] = "it reads values back to the host"
        elif cuda:
            try:
                graphs = capture(copies * repeats, apart=per_step > LONG_STEP)
                steps = len(copies) * repeats
                row["graph"] = device_time([graph.replay for graph in graphs], seconds / 3, steps=steps)
                row["handed_over"] = handed_over(copies)
            except Exception as error:  # the device may be unusable from here on
                cause = error.__context__ or error  # a failed capture fails once more when it ends
                row |= {"graph_error": f"{type(cause).__name__}: {first_line(cause)}", "restart": True}
        if (
            cuda and entry.compiled and "restart" not in row
        ):  # too slow to compile once more in another process
            row |= launches_of(copies[0].step) | {"restart": True}
    for mode in ("graph", "eager"):
        if row[mode] is not None:
            row[mode]["gb_per_s"] = row["bytes"] / (row[mode]["us"][1] * 1e3)
    return row


def warm_up(copy: Copy, steps: int, device: torch.device) -> float:
    """Some steps; returns the seconds of the last one, the device idle before and after it."""
    seconds = 0.0
    for _ in range(steps):
        synchronize(device)
        started = time.perf_counter()
        copy.step()
        synchronize(device)
        seconds = time.perf_counter() - started
    return seconds


def copies_for(workload: Workload, device: torch.device) -> int:
    """How many copies it takes for each to be gone from the L2 cache when its turn comes again."""
    return min(MAX_COPIES, max(1, math.ceil(COLD_FACTOR * l2_bytes(device) / workload.footprint)))


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


@contextlib.contextmanager
def on_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own on a GPU."""
    if device.type != "cuda":
        yield
        return
    if device.index is not None:
        torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """So that none falls into a sample."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def cpu_time(step: Callable[[], object], device: torch.device, seconds: float) -> Row:
    """Time until the step returns, the device idle before it."""
    samples = []
    end = time.perf_counter() + seconds
    while len(samples) < 10 or (time.perf_counter() < end and len(samples) < 1000):
        synchronize(device)
        started = time.perf_counter()
        step()
        samples.append(time.perf_counter() - started)
    synchronize(device)
    return timing(np.array(samples) * 1e6)


def device_time(calls: Sequence[Callable[[], object]], seconds: float, *, steps: int | None = None) -> Row:
    """Time per step of passes through `calls`, which make `steps` (default: one each), issued without waiting."""
    steps = steps or len(calls)

    def run_passes(count: int) -> np.ndarray:
        """Seconds of each pass after the first, during which the queue fills."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 2)]
        for event in events[:-1]:
            event.record()
            for call in calls:
                call()
        events[-1].record()
        torch.cuda.synchronize()
        return np.array([a.elapsed_time(b) for a, b in itertools.pairwise(events[1:])]) / 1e3

    per_pass = float(np.median(run_passes(2)))
    passes = min(500, max(5, round(seconds / max(per_pass, 1e-6))))
    return timing(run_passes(passes) * 1e6 / steps)


def timing(us: np.ndarray) -> Row:
    """Quantiles of samples in microseconds, and their number."""
    return {"us": [float(q) for q in np.quantile(us, QUANTILES)], "n": len(us)}


def capture(copies: Sequence[Copy], *, apart: bool) -> list[torch.cuda.CUDAGraph]:
    """A step of each copy, in one CUDA graph, or in one for each."""
    stream = torch.cuda.current_stream()
    graphs = []
    for members in [[copy] for copy in copies] if apart else [copies]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for copy in members:
                copy.step()
        graphs.append(graph)
    return graphs


def extra_bytes(step: Callable[[], object]) -> int:
    """Peak of the memory that a step allocates for itself."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bytes_of(workload: Workload, entry: Entry, copy: Copy) -> int:
    """Bytes that ELRSGD's kernels read and write; for others the least that SGD with momentum has to."""
    if not isinstance(copy.optimizer, ELRSGD):
        return 5 * workload.elements * workload.dtype.itemsize
    (rule_group,) = copy.optimizer._current_rule_groups()
    fused = rule_group._fused
    together = fused is not None and rule_group.has_rule and fused.kernels.cooperates
    return sum(
        kernels.bytes_moved(
            group["params"],
            [p.grad for p in group["params"]],
            [copy.optimizer.state[p].get("momentum_buffer") for p in group["params"]],
            # one cooperative launch reads everything once
            measure=entry.measured if group["scale_invariant"] and not together else None,
        )
        for group in copy.optimizer.param_groups
    )


def handed_over(copies: Sequence[Copy]) -> bool | None:
    """Whether the warm-up of any copy has ended; None for optimizers that have none."""
    flags = [
        state["handed_over"]
        for copy in copies
        if isinstance(copy.optimizer, ELRSGD) and copy.optimizer.defaults["rule"] == "warmup"
        for state in copy.optimizer.state.values()
        if "handed_over" in state
    ]
    return bool(torch.stack([flag.reshape(()) for flag in flags]).any()) if flags else None


def copy_bandwidth(device: torch.device) -> Row:
    """GB/s, read and written, of a large copy on the device."""
    free, _ = torch.cuda.mem_get_info(device)
    size = min(COPY_BYTES, free // 4 // 512 * 512)
    with on_stream(device):
        source = torch.randn(size // 4, device=device)
        target = torch.empty_like(source)
        for _ in range(WARM_UP_STEPS):
            target.copy_(source)
        row = device_time([lambda: target.copy_(source)], 0.5)
    return row | {"bytes": 2 * size, "gb_per_s": 2 * size / (row["us"][1] * 1e3)}


def count_launches(workload: Workload, entry: Entry, device: torch.device) -> Row:
    """`launches_of` an optimizer on a workload."""
    with on_stream(device):
        copy = Copy(workload, entry, workload.make(device))
        warm_up(copy, 3, device)
        return launches_of(copy.step)


def launches_of(step: Callable[[], object]) -> Row:
    """Kernels, and copies and fills, of one step. Profiling slows a process for good: use one that times nothing."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return launches_among(
        event.name
        for event in profiler.events() or []
        if str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
    )


def launches_among(names: Iterable[str]) -> Row:
    """Counts of the profiler's device events: kernels apart from copies and fills, without the ranges of optimizers."""
    names = [name for name in names if not name.startswith(("Optimizer.", "ProfilerStep"))]
    memory = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"launches": len(names) - memory, "memory_ops": memory}


def serve(connection: Connection) -> None:
    """The worker: say that it is there, then perform jobs until the other end closes."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        connection.send(None)
        while True:
            connection.send(perform(connection.recv()))


class Worker:
    """A process that performs jobs, replaced when it fails, dies or takes too long."""

    def __init__(self) -> None:
        self.process: Any = None
        self.connection: Any = None
        self.is_ready = False

    def ask(self, job: Job, limit: float = ROW_LIMIT) -> Row:
        """The row of a job. Never raises for what the job does."""
        if self.process is None:
            spawn = torch.multiprocessing.get_context("spawn")
            self.connection, theirs = spawn.Pipe()
            self.process = spawn.Process(target=serve, args=(theirs,), daemon=False)
            self.process.start()
            theirs.close()
            self.is_ready = False
        try:
            if not self.is_ready:
                if not self.connection.poll(START_LIMIT):
                    self.stop()
                    return {"error": f"did not start within {START_LIMIT:.0f} s"}
                self.connection.recv()
                self.is_ready = True
            self.connection.send(job)
            if not self.connection.poll(limit):
                self.stop()
                return {"error": f"took longer than {limit:.0f} s"}
            row = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            self.stop()
            return {"error": f"the process died with exit code {code}"}
        if row.pop("restart", False):
            self.stop()
        return row

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
            self.process = self.connection = None


@contextlib.contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    """Workers that are gone at the end."""
    started = [Worker() for _ in range(count)]
    try:
        yield started
    finally:
        for worker in started:
            worker.stop()


def write(path: Path, report: dict[str, Any]) -> None:
    """Replace the result file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(report, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def bar(console: Console) -> Progress:
    """The progress bar of every command."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def measure_all(
    names: Sequence[str],
    optimizers: Sequence[str],
    device: str,
    seconds: float,
    out: Path,
    console: Console,
    *,
    kind: Literal["step-time", "host"] = "step-time",
    budget: float = math.inf,
    add: bool = False,
) -> dict[str, Any]:
    """Measure every optimizer on every workload; the result file grows by a row at a time.

    No row is started after `budget` seconds. `add`: keep the rows of a result file that is there, but for those that
    are measured again.
    """
    began = time.monotonic()
    cuda = torch.device(device).type == "cuda"
    report: dict[str, Any] = {
        "kind": kind,
        "env": env_report.collect(),
        "config": {
            "device": torch.device(device).type,
            "seconds": seconds,
            "lr": LR,
            "momentum": MOMENTUM,
            "weight_decay": WEIGHT_DECAY,
            "cold_factor": COLD_FACTOR,
        },
        "copy": None,
        "rows": [],
    }
    if add and out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        report |= {"copy": before["copy"], "rows": before["rows"]}
    with workers(2) as (timer, profiler), bar(console) as progress:
        # Last what is slow to build, lest it take the time of the others.
        jobs = sorted(itertools.product(names, optimizers), key=lambda job: OPTIMIZERS[job[1]].compiled)
        task = progress.add_task("copy", total=len(jobs))
        hung: set[str] = set()  # workloads
        if cuda and kind == "step-time" and report["copy"] is None:
            report["copy"] = timer.ask(Job("copy", device, seconds))
        for index, (name, optimizer) in enumerate(jobs):
            if time.monotonic() - began > budget:
                console.print(f"{len(jobs) - index} rows were not started: {budget:g} s are over")
                break
            progress.update(task, description=f"{name} {optimizer}")
            started = time.perf_counter()
            workload = WORKLOADS[name]()
            row: Row = {
                "workload": name,
                "optimizer": optimizer,
                "dtype": str(workload.dtype).removeprefix("torch."),
                "tensors": len(workload.shapes),
                "elements": workload.elements,
            }
            job = Job("time" if kind == "step-time" else "cpu", device, seconds, name, optimizer)
            # a kernel that waits for ever would do so in every row like it
            hangs = OPTIMIZERS[optimizer].measured is not None and name in hung
            limit = COMPILED_ROW_LIMIT if OPTIMIZERS[optimizer].compiled else ROW_LIMIT
            row |= {"error": "not tried after one that hung"} if hangs else timer.ask(job, limit)
            if OPTIMIZERS[optimizer].measured is not None and "took longer" in row.get("error", ""):
                hung.add(name)
            if cuda and kind == "step-time" and "error" not in row and row["launches"] is None:
                counted = profiler.ask(job._replace(kind="launches"))
                if "error" in counted:
                    counted = {"launches_error": counted["error"]}
                row |= counted
            for mode in ("graph", "eager"):
                if row.get(mode) and (report["copy"] or {}).get("gb_per_s"):
                    row[mode]["of_copy"] = row[mode]["gb_per_s"] / report["copy"]["gb_per_s"]
            row["seconds"] = time.perf_counter() - started
            others = [r for r in report["rows"] if (r["workload"], r["optimizer"]) != (name, optimizer)]
            report["rows"] = [*others, row]
            write(out, report)
            progress.advance(task)
    return report


def results_table(report: dict[str, Any], workload: str) -> Table:
    """The rows of one workload; what could not be measured is said below."""
    rows = [row for row in report["rows"] if row["workload"] == workload]
    copied = (report["copy"] or {}).get("gb_per_s")
    notes = [
        "µs per step, median; ×: over torch-fused; launches: kernels + copies and fills; MiB: extra memory"
    ]
    notes += [f"of copy: share of {copied:,.0f} GB/s (graph)"] if copied else []
    table = Table(
        title=f"{workload}: {rows[0]['tensors']:,} tensors, {rows[0]['elements']:,} parameters, {rows[0]['dtype']}",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("optimizer", no_wrap=True)
    for column in ("graph", "×", "eager", "×", "CPU", "launches", "MiB", "of copy"):
        table.add_column(column, justify="right", no_wrap=True)
    baseline = next((row for row in rows if row["optimizer"] == BASELINE), {})
    for row in rows:
        cells = []
        for mode in ("graph", "eager"):
            mine, theirs = median(row, mode), median(baseline, mode)
            cells += [show(mine, ",.1f"), show(mine / theirs if mine and theirs else None, ".2f")]
        extra = row.get("extra_bytes")
        table.add_row(
            row["optimizer"],
            *cells,
            show(median(row, "cpu"), ",.1f"),
            "–" if row.get("launches") is None else f"{row['launches']:,} + {row['memory_ops']:,}",
            show(None if extra is None else extra / 2**20, ",.1f"),
            show((row.get("graph") or {}).get("of_copy"), ".0%"),
        )
        notes += [
            f"{row['optimizer']}: {row[key]}"
            for key in ("error", "graph_error", "launches_error")
            if key in row
        ]
        if row.get("handed_over"):
            notes.append(f"{row['optimizer']}: the warm-up ended, what was measured is plain SGD")
        if row.get("cold") is False:
            notes.append(f"{row['optimizer']}: warm L2 cache")
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    return table


def median(row: Row, mode: str) -> float | None:
    """Median time of a row in microseconds, or None if it has none."""
    return row[mode]["us"][1] if row.get(mode) else None


def show(value: float | None, spec: str) -> str:
    """A number for a table."""
    return "–" if value is None else format(value, spec)


def build_resnet(tiny: bool) -> tuple[str, torch.nn.Module, tuple[int, int, int, int]]:
    """ResNet-50 of torchvision, else of `benchmarks.common.models`, and the shape of a batch; `tiny`: ResNet-8."""
    from benchmarks.common import models

    if tiny:
        return (
            "benchmarks.common.models resnet-8",
            models.build("resnet-8", in_shape=(3, 32, 32), classes=10),
            (4, 3, 32, 32),
        )
    try:
        from torchvision.models import resnet50  # type: ignore[import-not-found]
    except ImportError:
        net = models.build("resnet-50", in_shape=(3, 224, 224), classes=1000)
        return "benchmarks.common.models resnet-50", net, (64, 3, 224, 224)
    return "torchvision resnet50", resnet50(), (64, 3, 224, 224)


class Training:
    """A model that trains on one batch, with torch's fused SGD or a rule of ELRSGD."""

    def __init__(self, optimizer: str, device: torch.device, tiny: bool) -> None:
        torch.manual_seed(0)
        self.model_name, model, shape = build_resnet(tiny)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        classes = 10 if tiny else 1000
        self.images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(classes, (shape[0],), device=device)
        self.device = device
        convolutions = [p for p in self.model.parameters() if p.dim() == 4]
        others = [p for p in self.model.parameters() if p.dim() != 4]
        # A layer without a gradient cannot be judged, and so keeps the warm-up going.
        still = torch.nn.Parameter(torch.ones(4, device=device))
        still.grad = torch.zeros_like(still)
        groups = [
            {"params": [*convolutions, still], "scale_invariant": True},
            {"params": others, "scale_invariant": False},
        ]
        options: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
        if optimizer == BASELINE:
            self.optimizer: Optimizer = SGD(groups, **options, fused=True)
        else:
            rule = optimizer.removeprefix("elr-")
            options |= {"fused": True} if device.type == "cuda" else {"foreach": True}
            self.optimizer = ELRSGD(groups, **options, rule=None if rule == "none" else rule)

    def step(self) -> None:
        """Forward, backward, update."""
        self.model.zero_grad()  # and not the layer without a gradient
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()


def timed_block(training: Training, steps: int) -> float:
    """Seconds per step of some steps in a row."""
    if training.device.type != "cuda":
        started = time.perf_counter()
        for _ in range(steps):
            training.step()
        return (time.perf_counter() - started) / steps
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    training.step()  # fills the queue
    start.record()
    for _ in range(steps):
        training.step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / steps


def end_to_end_rows(
    optimizers: Sequence[str],
    device: torch.device,
    rounds: int,
    steps: int,
    tiny: bool,
    progress: Progress,
    keep: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:
    """Interleaved blocks of steps, in an order that turns round each time, so that a drift hits all alike.

    `ratio` is over torch's fused SGD in the same round. `keep` is called with the rows so far after each round.
    """
    torch.backends.cudnn.benchmark = True
    trainings: dict[str, Training] = {}
    failed: list[Row] = []
    task = progress.add_task("end to end", total=rounds)
    for name in optimizers:
        progress.update(task, description=f"warm-up of {name}")
        try:
            trainings[name] = Training(name, device, tiny)
            for _ in range(WARM_UP_STEPS if device.type == "cuda" else 2):
                trainings[name].step()
            synchronize(device)
        except Exception as error:
            trainings.pop(name, None)
            failed.append({"optimizer": name, "error": f"{type(error).__name__}: {first_line(error)}"})
    progress.update(task, description="end to end")
    blocks: dict[str, list[float]] = {name: [] for name in trainings}
    rows = failed
    with no_garbage_collection():
        for index in range(rounds):
            order = list(trainings) if index % 2 == 0 else list(reversed(trainings))
            for name in order:
                blocks[name].append(timed_block(trainings[name], steps))
            rows = failed + [training_row(name, trainings[name], blocks, steps) for name in trainings]
            keep(rows)
            progress.advance(task)
    return rows


def training_row(name: str, training: Training, blocks: dict[str, list[float]], steps: int) -> Row:
    """What the blocks of one optimizer say."""
    seconds = np.array(blocks[name])
    baseline = np.array(blocks.get(BASELINE, []))
    flags = [s["handed_over"] for s in training.optimizer.state.values() if "handed_over" in s]
    return {
        "optimizer": name,
        "model": training.model_name,
        "batch": list(training.images.shape),
        "step": timing(seconds * 1e6),
        "ratio": np.quantile(seconds / baseline, QUANTILES).tolist() if len(baseline) else None,
        "steps_per_block": steps,
        "handed_over": bool(flags[0]) if name == "elr-warmup" and flags else None,
    }


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
DeviceOption = Annotated[str, typer.Option(help="cuda, cuda:1 … or cpu.")]
OutOption = Annotated[Path, typer.Option(help="Result file.")]


def check(names: Sequence[str], known: Iterable[str], what: str) -> None:
    """Refuse unknown names."""
    known = list(known)
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"unknown {what} {name!r}; choose of {', '.join(known)}")


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device; --device cpu measures CPU time alone")


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    workload: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeatable; of {', '.join(WORKLOADS)}. Default: {', '.join(NETWORKS)}."),
    ] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable; of {', '.join(OPTIMIZERS)}. Default: all.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of samples per row.")] = 1.0,
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds after which no row is started.", show_default="none")
    ] = math.inf,
    add: Annotated[bool, typer.Option("--add", help="Add the rows to a result file that is there.")] = False,
    device: DeviceOption = "cuda",
    out: OutOption = Path("runs/step-time/step_time.json"),
) -> None:
    """Time a step of every optimizer on every workload, or what a command below says.

    Example: python -m benchmarks.speed.step_time --workload resnet-50 --workload vit-b-16 --out runs/step_time.json
    """
    if context.invoked_subcommand:
        return
    names, optimizers = workload or list(NETWORKS), optimizer or list(OPTIMIZERS)
    check(names, WORKLOADS, "workload")
    check(optimizers, OPTIMIZERS, "optimizer")
    check_device(device)
    console = Console()
    report = measure_all(names, optimizers, device, seconds, out, console, budget=budget, add=add)
    for name in names:
        if any(row["workload"] == name for row in report["rows"]):
            console.print(results_table(report, name))
    console.print(f"wrote {out}")


@app.command()
def host(
    seconds: Annotated[float, typer.Option(min=0, help="Of samples per row.")] = 1.0,
    device: DeviceOption = "cuda",
    out: OutOption = Path("runs/step-time/host.json"),
) -> None:
    """CPU time of a step over 160 and 2,000 tensors of 4 elements.

    Example: python -m benchmarks.speed.step_time host --device cpu
    """
    check_device(device)
    console = Console()
    names = ("160x4", "2000x4")
    report = measure_all(names, HOST_OPTIMIZERS, device, seconds, out, console, kind="host")
    for name in names:
        console.print(results_table(report, name))
    console.print(f"wrote {out}")


@app.command()
def end_to_end(
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each optimizer.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a block.")] = 10,
    device: DeviceOption = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A ResNet-8 on 4 images, to try it.")] = False,
    out: OutOption = Path("runs/step-time/end_to_end.json"),
) -> None:
    """Training steps of ResNet-50: 64 synthetic images of 224 pixels, bf16 autocast, channels-last.

    Example: python -m benchmarks.speed.step_time end-to-end --rounds 40
    """
    check_device(device)
    console = Console()
    config = {"device": torch.device(device).type, "rounds": rounds, "steps": steps, "tiny": tiny}
    report = {"kind": "end-to-end", "env": env_report.collect(), "config": config}
    optimizers = (BASELINE, "elr-none", "elr-warmup", "elr-uniform")
    with bar(console) as progress:
        rows = end_to_end_rows(
            optimizers,
            torch.device(device),
            rounds,
            steps,
            tiny,
            progress,
            keep=lambda rows: write(out, report | {"rows": rows}),
        )
    write(out, report | {"rows": rows})
    table = Table(title="training step, end to end", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("optimizer", "ms", "ratio to torch-fused (20 %, 50 %, 80 %)", "note"):
        table.add_column(column)
    for row in rows:
        ratio = row.get("ratio")
        table.add_row(
            row["optimizer"],
            show(row["step"]["us"][1] / 1e3 if "step" in row else None, ".2f"),
            ", ".join(f"{value:.4f}" for value in ratio) if ratio else "–",
            row.get("error") or ("handed over" if row.get("handed_over") else ""),
        )
    console.print(table)
    console.print(f"wrote {out}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # of other packages
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", NETWORKS)
def test_step(benchmark: Any, workload: str, optimizer: str) -> None:
    """Wall-clock time of a step, with the device idle before and after it."""
    device = torch.device("cuda")
    tensors = WORKLOADS[workload]()
    try:
        copy = Copy(tensors, OPTIMIZERS[optimizer], tensors.make(device))
        for _ in range(WARM_UP_STEPS):
            copy.step()
    except Exception as error:  # other packages: missing, or without this dtype
        if optimizer.startswith(("torch-", "elr-")):
            raise
        pytest.skip(first_line(error))
    torch.cuda.synchronize()

    def step() -> None:
        copy.step()
        torch.cuda.synchronize()

    benchmark.group = workload
    benchmark(step)


if __name__ == "__main__":
    app()
