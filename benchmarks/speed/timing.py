"""How long a step takes, on the host and on the device; what it launches and allocates.

Times are rows of a result file: `us`, [20 %, 50 %, 80 %] quantiles in microseconds, and the number `n` of samples.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from scipy import stats

QUANTILES = (0.2, 0.5, 0.8)
COPY_BYTES = 2**30

Row = dict[str, Any]
Step = Callable[[], object]
Built = TypeVar("Built")
Sample = TypeVar("Sample")


def quantiles(us: np.ndarray) -> Row:
    """`us` and `n` of samples in microseconds."""
    return {"us": [float(q) for q in np.quantile(us, QUANTILES)], "n": len(us)}


def median_interval(values: np.ndarray) -> list[float] | None:
    """A 95 % interval of the median; None for fewer than two values."""
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return [float(values[0])] * 2
    found = stats.bootstrap((values,), np.median, method="percentile", rng=0)
    return [float(bound) for bound in found.confidence_interval]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage before, and not while something is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def build_all(names: Iterable[str], build: Callable[[str], Built]) -> tuple[dict[str, Built], list[Row]]:
    """What `build(name)` returns, by name, and a row with `error` for each that fails."""
    built, failed = {}, []
    for name in names:
        try:
            built[name] = build(name)
        except Exception as error:
            failed.append({"optimizer": name, "error": f"{type(error).__name__}: {first_line(error)}"})
    return built, failed


def take_turns(
    blocks: Mapping[str, Callable[[], Sample]],
    rounds: int,
    after_round: Callable[[dict[str, list[Sample]]], object] = lambda samples: None,
) -> dict[str, list[Sample]]:
    """What each block returned in each round. In a round every block has one turn, in a random order, so that a drift
    of the machine hits all alike. `after_round` gets the samples so far."""
    samples: dict[str, list[Sample]] = {name: [] for name in blocks}
    order = np.random.default_rng(0)
    with no_garbage_collection():
        for _ in range(rounds):
            for name in order.permutation(list(blocks)).tolist():
                samples[name].append(blocks[name]())
            after_round(samples)
    return samples


def seconds_of(step: Step, device: torch.device) -> float:
    """Seconds of one step, the device idle before and after it."""
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started


def host_time(step: Step, device: torch.device, seconds: float) -> Row:
    """Time until the step returns, the device idle before it."""
    samples = []
    end = time.perf_counter() + seconds
    while len(samples) < 10 or (time.perf_counter() < end and len(samples) < 1000):
        synchronize(device)
        started = time.perf_counter()
        step()
        samples.append(time.perf_counter() - started)
    synchronize(device)
    return quantiles(np.array(samples) * 1e6)


def device_time(calls: Sequence[Step], seconds: float, *, steps: int | None = None) -> Row:
    """Time per step of passes through `calls`, issued without waiting. A pass makes `steps`; default: one per call."""
    steps = steps or len(calls)

    def run_passes(count: int) -> np.ndarray:
        """Seconds of each pass after the first, which fills the queue."""
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
    return quantiles(run_passes(passes) * 1e6 / steps)


def capture(steps: Sequence[Step], *, apart: bool) -> list[torch.cuda.CUDAGraph]:
    """The steps in one CUDA graph, or each in one of its own."""
    stream = torch.cuda.current_stream()
    graphs = []
    for members in [[step] for step in steps] if apart else [steps]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for step in members:
                step()
        graphs.append(graph)
    return graphs


def extra_bytes(step: Step) -> int:
    """Peak of the memory that a step allocates for itself."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def copy_bandwidth(device: torch.device) -> Row:
    """GB/s, read and written, of a large copy on the device."""
    free, _ = torch.cuda.mem_get_info(device)
    size = min(COPY_BYTES, free // 4 // 512 * 512)
    with on_stream(device):
        source = torch.randn(size // 4, device=device)
        target = torch.empty_like(source)
        for _ in range(10):
            target.copy_(source)
        row = device_time([lambda: target.copy_(source)], 0.5)
    return row | {"bytes": 2 * size, "gb_per_s": 2 * size / (row["us"][1] * 1e3)}


def launches_of(step: Step) -> Row:
    """Kernels, and copies and fills, of one step. Profiling slows a process for good: use one that times nothing."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:  # without it, torch warns
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


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
