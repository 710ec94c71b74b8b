"""The all-reduce of ELRSGD on 1,024 GPUs, on paper: closed forms, and a simulation that checks them.

    python -m benchmarks.distributed.scaling

prints the tables of docs/guide/scaling.md. The model: a message of n bytes is `latency` + n / `bandwidth` on its way; a
rank sends one message at a time and receives one at a time, both at once, and each holds its port for n / `bandwidth`.
An algorithm is a list of rounds; `simulate` sends their messages one by one on a clock per rank, and the closed forms
give the same where nothing is late. Numbers of ranks and of nodes are powers of two, but for the ring.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.common.statistics import grouped
from benchmarks.distributed.all_reduce import BYTES_PER_ROW

RESULT = Path(__file__).parents[1] / "results" / "all-reduce-gloo-cpu.json"

GPUS, GPUS_PER_NODE = 1024, 8
MEMORY_BANDWIDTH = 3.35e12  # bytes/s, H100 SXM: NVIDIA's data sheet
STEP_BYTES = 28  # of the optimizer's own memory traffic per parameter: float32, momentum, both norms measured
ELEMENT_BYTES = 2  # bfloat16 parameters and gradients on the network
STATE_BYTES_PER_ROW = 3 * 4  # sphere_grad_norm, radius, tracked
SEEDS = 5


class Link(NamedTuple):
    """Seconds that a message of no bytes is on its way, and bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        """Time of one message."""
        return self.latency + size / self.bandwidth


# Latencies: what NCCL itself expects of trees with its LL protocol (src/graph/tuning.cc, hwLatencies). Bandwidths, in
# one direction: NVLink of the H100, half of the 900 GB/s of NVIDIA's data sheet; a 400 Gb/s adapter per GPU (DGX H100).
NVLINK = Link(0.6e-6, 450e9)
NETWORK = Link(5.0e-6, 50e9)


class Cluster(NamedTuple):
    """Nodes of `per_node` ranks. Algorithms that know of no nodes send every message `across`."""

    within: Link
    across: Link
    per_node: int


DGX_H100 = Cluster(NVLINK, NETWORK, GPUS_PER_NODE)
ONE_SECOND_EACH = Cluster(Link(1.0, 1.0), Link(1.0, 1.0), GPUS_PER_NODE)  # for messages of no bytes


class Cost(NamedTuple):
    """Cost of an all-reduce: seconds until all ranks are done; messages and bytes that the busiest rank sends."""

    seconds: float
    messages: int
    bytes: float


class Round(NamedTuple):
    """Messages `source[i]` → `target[i]` of `size` bytes; no rank is twice among the sources, or among the targets.

    A message waits for all that its sender has received in earlier rounds of the same stream; None: of all streams.
    """

    source: NDArray[np.int64]
    target: NDArray[np.int64]
    size: float
    link: Link
    stream: int | None = None


def ring(ranks: int, size: float, cluster: Cluster) -> list[Round]:
    """Reduce-scatter, then all-gather: in each of 2(N−1) rounds every rank sends 1/N of the vector to the next."""
    everyone = np.arange(ranks)
    return 2 * (ranks - 1) * [Round(everyone, (everyone + 1) % ranks, size / ranks, cluster.across)]


def ring_cost(ranks: int, size: float, cluster: Cluster) -> Cost:
    rounds, chunk = 2 * (ranks - 1), size / ranks
    return Cost(rounds * cluster.across.seconds(chunk), rounds, rounds * chunk)


def recursive_doubling(ranks: int, size: float, cluster: Cluster) -> list[Round]:
    """In round k rank r exchanges the whole vector with rank r XOR 2ᵏ."""
    everyone = np.arange(ranks)
    return [Round(everyone, everyone ^ (1 << k), size, cluster.across) for k in range(_log2(ranks))]


def recursive_doubling_cost(ranks: int, size: float, cluster: Cluster) -> Cost:
    rounds = _log2(ranks)
    return Cost(rounds * cluster.across.seconds(size), rounds, rounds * size)


def double_tree(ranks: int, size: float, cluster: Cluster) -> list[Round]:
    """Two binary trees, each adds up half of the vector and hands the sum down; what is a leaf in one is an inner node
    in the other (Sanders, Speck & Träff, Parallel Computing 35, 2009), as in NCCL."""
    return _double_tree(np.arange(ranks), size, cluster.across)


def double_tree_cost(ranks: int, size: float, cluster: Cluster) -> Cost:
    levels, half, link = _log2(ranks), size / 2, cluster.across
    if levels == 0:
        return Cost(0.0, 0, 0.0)
    messages = 4 if levels > 1 else 2
    # at every level but the top one the second of two children waits until the first is served
    seconds = 2 * (link.seconds(half) + (levels - 1) * link.seconds(size))
    return Cost(seconds, messages, messages * half)


def hierarchical(ranks: int, size: float, cluster: Cluster) -> list[Round]:
    """NCCL's tree: along a chain to the first rank of each node, a double tree of these, and back."""
    leaders = np.arange(0, ranks, cluster.per_node)
    up = [
        Round(leaders + position, leaders + position - 1, size, cluster.within)
        for position in range(cluster.per_node - 1, 0, -1)
    ]
    return [*up, *_double_tree(leaders, size, cluster.across), *map(_reversed, reversed(up))]


def hierarchical_cost(ranks: int, size: float, cluster: Cluster) -> Cost:
    hops = 2 * (cluster.per_node - 1)
    tree = double_tree_cost(ranks // cluster.per_node, size, cluster)
    first = tree.messages + min(hops, 1), tree.bytes + min(hops, 1) * size
    others = min(hops // 2, 2)
    messages, sent = max(first, (others, others * size))
    return Cost(hops * cluster.within.seconds(size) + tree.seconds, messages, sent)


class Algorithm(NamedTuple):
    """The rounds of an algorithm, and what they cost."""

    rounds: Callable[[int, float, Cluster], list[Round]]
    cost: Callable[[int, float, Cluster], Cost]


ALGORITHMS = {
    "ring": Algorithm(ring, ring_cost),
    "recursive doubling": Algorithm(recursive_doubling, recursive_doubling_cost),
    "double binary tree": Algorithm(double_tree, double_tree_cost),
    "hierarchical": Algorithm(hierarchical, hierarchical_cost),
}


def _double_tree(ranks: NDArray[np.int64], size: float, link: Link) -> list[Round]:
    """Position 0 is the root; below it, i with lowest set bit b hangs under (i XOR b) OR 2b. The other tree is the
    mirror image."""
    count = len(ranks)
    up = []
    for level in range(_log2(count)):
        bit = 1 << level
        left, right = np.arange(bit, count, 4 * bit), np.arange(3 * bit, count, 4 * bit)
        pairs = (left, (left + bit) % count), (right, right - bit)
        for source, target in pairs:
            if len(source):
                up.append(Round(ranks[source], ranks[target], size / 2, link, stream=0))
                up.append(
                    Round(ranks[count - 1 - source], ranks[count - 1 - target], size / 2, link, stream=1)
                )
    return [*up, *map(_reversed, reversed(up))]


def _reversed(messages: Round) -> Round:
    return messages._replace(source=messages.target, target=messages.source)


def _log2(count: int) -> int:
    """Logarithm of a power of two. Raises ValueError for other numbers."""
    if count < 1 or count & (count - 1):
        raise ValueError(
            f"{count} ranks or nodes: this algorithm is modelled for powers of two alone; use ring"
        )
    return count.bit_length() - 1


class Trace(NamedTuple):
    """When each rank is done, and how many messages and bytes it has sent, [N] each."""

    seconds: NDArray[np.float64]
    messages: NDArray[np.int64]
    bytes: NDArray[np.float64]


def simulate(rounds: Iterable[Round], ranks: int, *, jitter: float = 0.0, seed: int = 0) -> Trace:
    """Send the messages. Each is late by an exponentially distributed time, on average `jitter` times its latency."""
    rng = np.random.default_rng(seed)
    ready = np.zeros((2, ranks))  # of each stream, when a rank has what it was sent so far
    sending, receiving = np.zeros(ranks), np.zeros(ranks)  # until when the ports are busy
    messages, sent = np.zeros(ranks, np.int64), np.zeros(ranks)
    for source, target, size, link, stream in rounds:
        streams = slice(None) if stream is None else slice(stream, stream + 1)
        busy = size / link.bandwidth
        leaves = np.maximum(ready[streams, source].max(axis=0), sending[source])
        sending[source] = leaves + busy
        late = jitter * link.latency * rng.exponential(size=len(source))
        arrives = np.maximum(leaves + link.latency + late, receiving[target]) + busy
        receiving[target] = arrives
        ready[streams, target] = np.maximum(ready[streams, target], arrives)
        messages[source] += 1
        sent[source] += size
    return Trace(np.maximum(ready.max(axis=0), sending), messages, sent)


@dataclass(frozen=True)
class Decoder:
    """Blocks with matrices for queries, keys, values, their projection, and two of an MLP four times as wide; one
    embedding, tied to the head."""

    blocks: int
    width: int
    vocabulary: int = 50257

    @property
    def elements(self) -> int:
        """Parameters, without norm gains and biases."""
        return 12 * self.blocks * self.width**2 + self.vocabulary * self.width

    @property
    def rows(self) -> dict[str, int]:
        """Rows R of the packed sums, by what is tracked."""
        return {
            "pre-LN, no QK-norm": 0,
            "QK-norm: queries and keys": 2 * self.blocks,
            "every matrix": 6 * self.blocks + 1,
            'every matrix, `granularity="filter"`': 9 * self.width * self.blocks + self.vocabulary,
        }


DECODERS = (Decoder(80, 10240), Decoder(96, 12288))
DECODER, TRACKED, FILTERS = DECODERS[0], "every matrix", 'every matrix, `granularity="filter"`'


def fsdp_cost(decoder: Decoder, gpus: int, cluster: Cluster) -> Cost:
    """What FSDP2 moves in a step: two all-gathers of all parameters and a reduce-scatter of all gradients, each block
    (and the embedding) by a ring. The time is a lower bound: what a node must receive, at full bandwidth."""
    nodes, collectives = gpus // cluster.per_node, 3
    share = collectives * ELEMENT_BYTES * decoder.elements
    return Cost(
        share * (nodes - 1) / nodes / (cluster.per_node * cluster.across.bandwidth),
        collectives * (decoder.blocks + 1) * (gpus - 1),
        share * (gpus - 1) / gpus,
    )


def memory_seconds(decoder: Decoder, gpus: int) -> float:
    """What the optimizer itself reads and writes in a step."""
    return STEP_BYTES * decoder.elements / gpus / MEMORY_BANDWIDTH


def link_of(fit: dict[str, Any]) -> Link:
    """Latency and bandwidth of the messages of a ring, from the line fitted to its all-reduces."""
    ranks = fit["ranks"]
    rounds = 2 * (ranks - 1)
    return Link(fit["latency"] / rounds, fit["bandwidth"] * rounds / ranks)


def predicted(report: dict[str, Any], ranks: int, size: float) -> float:
    """Seconds of a ring, simulated with the constants that the all-reduces of 2 ranks have given."""
    (link,) = [link_of(fit) for fit in report["fits"] if fit["ranks"] == 2]
    return float(simulate(ring(ranks, size, Cluster(link, link, 1)), ranks).seconds.max())


def tables(report: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/guide/scaling.md, in Markdown, by name."""
    return {
        "steps": _steps(report),
        "gloo": _gloo(report),
        "rows": _rows(),
        "algorithms": _algorithms(),
        "step": _step(),
    }


def _steps(report: dict[str, Any]) -> str:
    steps = [row for row in report["rows"] if row["kind"] == "step"]
    names = dict.fromkeys(row["optimizer"] for row in steps)
    lines = []
    for (workload, ranks), rows in grouped(steps, lambda row: (row["workload"], row["ranks"])).items():
        elapsed = (_quartiles(row["us"], 1e-3) for row in rows)
        worked = (f"{1e-3 * row['processor_us'][1]:.1f}" for row in rows)
        lines += [(f"{workload}, {ranks} ranks", *elapsed), ("… on a processor", *worked)]
    return _markdown(("ms", *names), lines)


def _gloo(report: dict[str, Any]) -> str:
    bare = [row for row in report["rows"] if row["kind"] == "bare"]
    lines = []
    for size, rows in grouped(bare, lambda row: row["bytes"]).items():
        line = [f"{size:,}"]
        for row in rows:
            expected = 1e6 * predicted(report, row["ranks"], size)
            line += [_quartiles(row["us"]), f"{expected:,.0f}", f"{row['us'][1] / expected:.2f}"]
        lines.append(line)
    heads = [head for ranks in report["config"]["ranks"] for head in (f"{ranks} ranks", "simulated", "ratio")]
    return _markdown(("bytes", *heads), lines)


def _quartiles(values: Sequence[float], scale: float = 1.0) -> str:
    low, middle, high = (
        f"{scale * value:,.3g}" if scale * value < 1000 else f"{scale * value:,.0f}" for value in values
    )
    return f"{middle} [{low}, {high}]"


def _rows() -> str:
    lines = []
    for decoder in DECODERS:
        name = f"{decoder.blocks} × {decoder.width:,}: {decoder.elements / 1e9:,.0f} billion"
        for tracked, rows in decoder.rows.items():
            sizes = _size(BYTES_PER_ROW * rows), _size(STATE_BYTES_PER_ROW * rows)
            lines.append((name, tracked, f"{rows:,}", *sizes))
    return _markdown(("blocks × width: parameters", "tracked", "R", "all-reduced", "state per rank"), lines)


def _algorithms() -> str:
    size = BYTES_PER_ROW * DECODER.rows[TRACKED]
    lines = []
    for name, (rounds, cost) in ALGORITHMS.items():
        seconds, messages, sent = cost(GPUS, size, DGX_H100)
        schedule = rounds(GPUS, size, DGX_H100)
        traces = (simulate(schedule, GPUS, jitter=1, seed=seed) for seed in range(SEEDS))
        late = float(np.median([trace.seconds.max() for trace in traces]))
        times = map(_duration, (cost(GPUS, 0, DGX_H100).seconds, seconds, late))
        in_a_row = cost(GPUS, 0, ONE_SECOND_EACH).seconds
        lines.append((name, f"{in_a_row:,.0f}", f"{messages:,}", _size(sent), *times))
    counts, times = (
        ("messages in a row", "sent", "bytes sent"),
        ("latency alone", "time", "with late messages"),
    )
    return _markdown(("algorithm", *counts, *times), lines)


def _step() -> str:
    fsdp, memory = fsdp_cost(DECODER, GPUS, DGX_H100), memory_seconds(DECODER, GPUS)
    traffic = _size(memory * MEMORY_BANDWIDTH)
    lines = [
        ("FSDP2: parameters twice, gradients once", f"{fsdp.messages:,}", _size(fsdp.bytes), fsdp.seconds),
        ("the optimizer's own memory traffic", "–", traffic, memory),
    ]
    lines = [(*cells, _duration(seconds), "", "") for *cells, seconds in lines]
    for name, tracked in (("hierarchical", TRACKED), ("ring", TRACKED), ("ring", FILTERS)):
        seconds, messages, sent = ALGORITHMS[name].cost(GPUS, BYTES_PER_ROW * DECODER.rows[tracked], DGX_H100)
        shares = _percent(seconds / fsdp.seconds), _percent(seconds / memory)
        cells = f"{messages:,}", _size(sent), _duration(seconds)
        lines.append((f"all-reduce, {tracked}: {name}", *cells, *shares))
    columns = "messages", "bytes", "time", "of FSDP2", "of the memory traffic"
    return _markdown(("per step and GPU", *columns), lines)


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    words = {"ms", "tracked", "algorithm", "per step and GPU", "blocks × width: parameters"}
    rules = ["---" if head in words else "---:" for head in heads]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (heads, rules, *lines))


def _size(count: float) -> str:
    """Bytes, in powers of 1,000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


def _duration(seconds: float) -> str:
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def main() -> None:
    """Print the tables of docs/guide/scaling.md, from the committed result of benchmarks/distributed/all_reduce.py.

    Example: python -m benchmarks.distributed.scaling
    """
    for name, table in tables(json.loads(RESULT.read_text())).items():
        print(f"\n{name}\n\n{table}")


if __name__ == "__main__":
    typer.run(main)
