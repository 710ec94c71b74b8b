"""What a step costs: ELRSGD's rules, torch's SGD and other packages' optimizers on the tensors of real networks.

    python -m benchmarks.speed.step_time                                       # everything, one GPU, some minutes
    python -m benchmarks.speed.step_time --workload resnet-50 --optimizer torch-fused --optimizer elr-warmup
    python -m benchmarks.speed.step_time end-to-end                            # ResNet-50 training steps
    python -m benchmarks.speed.step_time host                                  # what a step costs the host
    python -m benchmarks.speed.step_time --device cpu --workload tiny          # try it without a GPU: CPU time alone

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
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.command_line import one_of, progress_bar, show, table_of
from benchmarks.common.files import write_json
from benchmarks.speed import end_to_end, host
from benchmarks.speed.optimizers import BASELINE, HYPER, OPTIMIZERS, Entry
from benchmarks.speed.options import DeviceOption, check_device, workload_option
from benchmarks.speed.timing import (
    Row,
    capture,
    copy_bandwidth,
    device_time,
    extra_bytes,
    first_line,
    host_time,
    l2_bytes,
    launches_of,
    no_garbage_collection,
    on_stream,
    seconds_of,
)
from benchmarks.speed.worker import Worker
from benchmarks.speed.workloads import NETWORKS, WORKLOADS, Workload, clone
from elropt import ELRSGD, env_report, kernels
from elropt.rules import RULES

WARM_UP_STEPS = 10
COLD_FACTOR = 3  # the copies' bytes over those of the L2 cache
MAX_COPIES = 64
ROW_LIMIT = 30.0  # seconds until a process that does not finish a row is given up
COMPILED_ROW_LIMIT = 120.0
STEPS_PER_PASS = 8  # at least, between two events
LONG_STEP = 2e-3  # seconds; such a step is a pass, and a CUDA graph, of its own
SLOW_STEP = 20e-3  # seconds; such a step is measured on a single copy
MODES = ("graph", "eager")


class Job(NamedTuple):
    """One thing that a worker does."""

    kind: Literal["copy", "time", "count"]
    device: str
    seconds: float
    workload: str = ""
    optimizer: str = ""


def perform(job: Job) -> Row:
    """Do a job. A failure is a row with `error`, and with `restart` where it may have left this process unusable."""
    try:
        device = torch.device(job.device)
        if job.kind == "copy":
            return copy_bandwidth(device)
        workload, entry = WORKLOADS[job.workload](), OPTIMIZERS[job.optimizer]
        if job.kind == "count":
            return count_row(workload, entry, device)
        return time_row(workload, entry, device, job.seconds)
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


class Copy:
    """One copy of a workload's tensors, and the optimizer that steps on them."""

    def __init__(self, workload: Workload, entry: Entry, params: list[Tensor]) -> None:
        self.params = params
        self.optimizer = entry.build(params, workload.tracked)
        self.step: Callable[[], object] = self.optimizer.step
        if entry.compiled:
            self.step = torch.compile(self.optimizer.step)

    def warm_up(self, steps: int, device: torch.device) -> float:
        """Take some steps; returns the seconds of the last one."""
        return [seconds_of(self.step, device) for _ in range(steps)][-1]


def time_row(workload: Workload, entry: Entry, device: torch.device, seconds: float) -> Row:
    """The times of one optimizer on one workload; each of the three is sampled for a third of `seconds`."""
    row: Row = dict.fromkeys((*MODES, "launches", "memory_ops", "extra_bytes", "bytes", "cold"))
    # Everything runs on the stream that graphs are captured on: what the warm-up prepares for a stream is there.
    with on_stream(device), no_garbage_collection():
        copies = [Copy(workload, entry, workload.make(device))]
        per_step = copies[0].warm_up(WARM_UP_STEPS, device)
        if device.type != "cuda":
            row["cpu"] = host_time(copies[0].step, device, seconds)
        else:
            # Each copy would be compiled anew.
            single = entry.compiled or per_step > SLOW_STEP
            for _ in range(0 if single else copies_for(workload, device) - 1):
                copies.append(Copy(workload, entry, clone(copies[0].params)))
                copies[-1].warm_up(3, device)
            row["cold"] = len(copies) * workload.footprint >= COLD_FACTOR * l2_bytes(device)
            row["cpu"] = host_time(copies[0].step, device, seconds / 3)
            row["extra_bytes"] = extra_bytes(copies[0].step)
            repeats = 1 if per_step > LONG_STEP else -(-STEPS_PER_PASS // len(copies))
            steps = [copy.step for copy in copies] * repeats
            row["eager"] = device_time(steps, seconds / 3)
            row |= graph_time(steps, entry, seconds / 3, apart=per_step > LONG_STEP)
            if entry.compiled and "restart" not in row:  # too slow to compile once more in another process
                row |= counts(copies[0], workload, entry) | {"restart": True}
        row |= {"copies": len(copies), "handed_over": handed_over(copies)}
    return row


def graph_time(steps: Sequence[Callable[[], object]], entry: Entry, seconds: float, *, apart: bool) -> Row:
    """`graph`, the time per step of CUDA graphs, or `graph_error`; `apart`: a graph for each step."""
    if not entry.capturable:
        return {"graph_error": "it reads values back to the host"}
    try:
        graphs = capture(steps, apart=apart)
        return {"graph": device_time([graph.replay for graph in graphs], seconds, steps=len(steps))}
    except Exception as error:  # the device may be unusable from here on
        cause = error.__context__ or error  # a failed capture fails once more when it ends
        return {"graph_error": f"{type(cause).__name__}: {first_line(cause)}", "restart": True}


def copies_for(workload: Workload, device: torch.device) -> int:
    """How many copies it takes for each to be gone from the L2 cache when its turn comes again."""
    return min(MAX_COPIES, max(1, math.ceil(COLD_FACTOR * l2_bytes(device) / workload.footprint)))


def handed_over(copies: Sequence[Copy]) -> bool | None:
    """Whether the rule of any copy has ended; None for those that do not end."""
    flags = [
        state["handed_over"]
        for copy in copies
        if isinstance(copy.optimizer, ELRSGD) and RULES[copy.optimizer.defaults["rule"]].ends
        for state in copy.optimizer.state.values()
        if "handed_over" in state
    ]
    return bool(torch.stack([flag.reshape(()) for flag in flags]).any()) if flags else None


def count_row(workload: Workload, entry: Entry, device: torch.device) -> Row:
    """`counts` of an optimizer on a workload."""
    with on_stream(device):
        copy = Copy(workload, entry, workload.make(device))
        copy.warm_up(3, device)
        return counts(copy, workload, entry)


def counts(copy: Copy, workload: Workload, entry: Entry) -> Row:
    """`launches`, `memory_ops` and `bytes` of a step."""
    row = launches_of(copy.step)
    return row | {"bytes": bytes_of(copy, workload, entry, together=row["launches"] == 1)}


def bytes_of(copy: Copy, workload: Workload, entry: Entry, *, together: bool) -> int:
    """Bytes that ELRSGD's kernels read and write; for others the least that SGD with momentum has to.

    together: the step is one cooperative launch, which reads everything once.
    """
    if not isinstance(copy.optimizer, ELRSGD):
        return 5 * workload.elements * workload.dtype.itemsize
    return sum(
        kernels.bytes_moved(
            group["params"],
            [p.grad for p in group["params"]],
            [copy.optimizer.state[p].get("momentum_buffer") for p in group["params"]],
            measure=entry.measures
            if (group["scale_invariant"] or RULES[group["rule"]].settles)
            and not together  # it holds back the others
            else None,
        )
        for group in copy.optimizer.param_groups
    )


def measure_all(
    names: Sequence[str],
    optimizers: Sequence[str],
    device: str,
    seconds: float,
    out: Path,
    console: Console,
    *,
    budget: float = math.inf,
    add: bool = False,
) -> dict[str, Any]:
    """Measure every optimizer on every workload; the result file grows by a row at a time.

    No row is started after `budget` seconds. `add`: keep the rows of a result file that is there, but for those that
    are measured again.
    """
    began = time.monotonic()
    on_device = torch.device(device).type == "cuda"
    config = {"device": torch.device(device).type, "seconds": seconds, **HYPER, "cold_factor": COLD_FACTOR}
    report = {"kind": "step-time", "env": env_report.collect(), "config": config, "copy": None, "rows": []}
    if add and out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        report |= {"copy": before["copy"], "rows": before["rows"]}
    with Worker(perform) as timer, Worker(perform) as counter, progress_bar(console) as progress:
        # What is slow to build comes last, so that it takes no time from the others.
        pairs = sorted(itertools.product(names, optimizers), key=lambda pair: OPTIMIZERS[pair[1]].compiled)
        task = progress.add_task("copy", total=len(pairs))
        if on_device and report["copy"] is None:
            report["copy"] = timer.ask(Job("copy", device, seconds), ROW_LIMIT)
        hung: set[str] = set()  # workloads
        for index, (name, optimizer) in enumerate(pairs):
            if time.monotonic() - began > budget:
                console.print(f"{len(pairs) - index} rows were not started: {budget:g} s are over")
                break
            progress.update(task, description=f"{name} {optimizer}")
            started = time.perf_counter()
            workload, entry = WORKLOADS[name](), OPTIMIZERS[optimizer]
            row: Row = {
                "workload": name,
                "optimizer": optimizer,
                "dtype": str(workload.dtype).removeprefix("torch."),
                "tensors": len(workload.shapes),
                "elements": workload.elements,
            }
            job = Job("time", device, seconds, name, optimizer)
            # a kernel that waits for ever would do so in every row like it
            if entry.measures and name in hung:
                row["error"] = "not tried after one that hung"
            else:
                row |= timer.ask(job, COMPILED_ROW_LIMIT if entry.compiled else ROW_LIMIT)
            if entry.measures and "took longer" in row.get("error", ""):
                hung.add(name)
            if on_device and "error" not in row and row["launches"] is None:
                counted = counter.ask(job._replace(kind="count"), ROW_LIMIT)
                row |= {"launches_error": counted["error"]} if "error" in counted else counted
            add_rates(row, (report["copy"] or {}).get("gb_per_s"))
            row["seconds"] = time.perf_counter() - started
            others = [r for r in report["rows"] if (r["workload"], r["optimizer"]) != (name, optimizer)]
            report["rows"] = [*others, row]
            write_json(out, report)
            progress.advance(task)
    return report


def add_rates(row: Row, copy_gb_per_s: float | None) -> None:
    """Add `gb_per_s`, and `of_copy` where the copy was measured, to the times of a row whose bytes are known."""
    for mode in MODES:
        if row.get(mode) and row["bytes"]:
            row[mode]["gb_per_s"] = row["bytes"] / (row[mode]["us"][1] * 1e3)
            if copy_gb_per_s:
                row[mode]["of_copy"] = row[mode]["gb_per_s"] / copy_gb_per_s


def results_table(report: dict[str, Any], workload: str) -> Table:
    """The rows of one workload; what could not be measured is said below."""
    rows = [row for row in report["rows"] if row["workload"] == workload]
    title = (
        f"{workload}: {rows[0]['tensors']:,} tensors, {rows[0]['elements']:,} parameters, {rows[0]['dtype']}"
    )
    table = table_of(title, "optimizer", "graph", "×", "eager", "×", "CPU", "launches", "MiB", "of copy")
    notes = [
        f"µs per step, median; ×: over {BASELINE}; launches: kernels + copies and fills; MiB: extra memory"
    ]
    if copied := (report["copy"] or {}).get("gb_per_s"):
        notes.append(f"of copy: share of {copied:,.0f} GB/s (graph)")
    baseline = next((row for row in rows if row["optimizer"] == BASELINE), {})
    for row in rows:
        cells = []
        for mode in MODES:
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
        said = [row[key] for key in ("error", "graph_error", "launches_error") if key in row]
        if row.get("handed_over"):
            said.append("the warm-up ended, what was measured is plain SGD")
        if row.get("cold") is False:
            said.append("warm L2 cache")
        notes += [f"{row['optimizer']}: {note}" for note in said]
    table.caption = "\n".join(notes)
    return table


def median(row: Row, mode: str) -> float | None:
    """Median time of a row in microseconds, or None if it has none."""
    return row[mode]["us"][1] if row.get(mode) else None


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command("end-to-end")(end_to_end.main)
app.command("host")(host.main)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    workload: Annotated[list[str] | None, workload_option(NETWORKS)] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            callback=one_of(OPTIMIZERS), help=f"Repeatable; of {', '.join(OPTIMIZERS)}. Default: all."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of samples per row.")] = 1.0,
    budget: Annotated[
        float, typer.Option(min=0, help="Seconds after which no row is started.", show_default="none")
    ] = math.inf,
    add: Annotated[bool, typer.Option("--add", help="Add the rows to a result file that is there.")] = False,
    device: DeviceOption = "cuda",
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("runs/step-time/step_time.json"),
) -> None:
    """Time a step of every optimizer on every workload, or what a command below says.

    Example: python -m benchmarks.speed.step_time --workload resnet-50 --workload vit-b-16 --out runs/step_time.json
    """
    if context.invoked_subcommand:
        return
    names, optimizers = workload or NETWORKS, optimizer or list(OPTIMIZERS)
    command(names, optimizers, device, seconds, out, budget=budget, add=add)


def command(
    names: Sequence[str],
    optimizers: Sequence[str],
    device: str,
    seconds: float,
    out: Path,
    **how: Any,
) -> None:
    """Measure, and print what came out."""
    check_device(device)
    console = Console()
    report = measure_all(names, optimizers, device, seconds, out, console, **how)
    for name in names:
        if any(row["workload"] == name for row in report["rows"]):
            console.print(results_table(report, name))
    console.print(f"wrote {out}")


if __name__ == "__main__":
    app()
