"""The paper model of the all-reduce against hand counts, its simulation, and the tables of docs/guide/scaling.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmarks.distributed import scaling
from benchmarks.distributed.scaling import ALGORITHMS, Cluster, Decoder, Link, Round, simulate

DOC = (Path(__file__).parents[3] / "docs" / "guide" / "scaling.md").read_text(encoding="utf-8")
PROSE = " ".join(DOC.split())
REPORT = json.loads(scaling.RESULT.read_text())
SLOW, FAST = Link(5e-6, 5e9), Link(1e-6, 1e11)
UNIT = Cluster(Link(1.0, 1.0), Link(1.0, 1.0), 1)  # a message of n bytes takes 1 + n seconds


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("size", [0, 8, 15_392, 10**6])
@pytest.mark.parametrize("per_node", [1, 2, 8])
def test_closed_forms_are_what_is_simulated(name: str, size: int, per_node: int) -> None:
    cluster = Cluster(FAST, SLOW, per_node)
    for ranks in (8, 16, 64, 128):
        rounds, cost = ALGORITHMS[name]
        trace, expected = simulate(rounds(ranks, size, cluster), ranks), cost(ranks, size, cluster)
        assert trace.seconds.max() == pytest.approx(expected.seconds, rel=1e-12)
        assert trace.messages.max() == expected.messages
        assert trace.bytes.max() == pytest.approx(expected.bytes)


@pytest.mark.parametrize(
    ("name", "ranks", "seconds", "messages", "sent"),
    [
        ("ring", 2, 2 * (1 + 4), 2, 8),
        ("ring", 4, 6 * (1 + 2), 6, 12),
        ("ring", 5, 8 * (1 + 8 / 5), 8, 64 / 5),
        ("recursive doubling", 8, 3 * (1 + 8), 3, 24),
        ("double binary tree", 2, 2 * (1 + 4), 2, 8),
        ("double binary tree", 4, 2 * (1 + 4) + 2 * (1 + 8), 4, 16),
    ],
)
def test_counted_by_hand(name: str, ranks: int, seconds: float, messages: int, sent: float) -> None:
    assert ALGORITHMS[name].cost(ranks, 8, UNIT) == pytest.approx((seconds, messages, sent))


def test_latency_of_the_hierarchy_is_that_of_nccls_estimate() -> None:
    """2((n−1)·NVLink + log₂(nodes)·network), from its src/graph/tuning.cc, without what a launch costs."""
    seconds = ALGORITHMS["hierarchical"].cost(1024, 0, scaling.DGX_H100).seconds
    assert seconds == pytest.approx(2 * (7 * 0.6e-6 + 7 * 5.0e-6))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("ranks", [2, 4, 16, 32])
def test_every_rank_ends_up_with_the_sum(name: str, ranks: int) -> None:
    """Along the messages: what a rank has added up of each half of the vector (of each part, for the ring)."""
    rounds = ALGORITHMS[name].rounds(ranks, 1.0, UNIT)
    if name == "ring":
        has = np.eye(ranks, dtype=int)[:, None].repeat(ranks, axis=1)  # [rank, part, whose]
        for step, (source, target, *_) in enumerate(rounds):
            sent = has.copy()
            for a, b in zip(source, target, strict=True):
                part = (a - step) % ranks
                has[b, part] = sent[a, part] if step >= ranks - 1 else has[b, part] + sent[a, part]
    else:
        has = np.eye(ranks, dtype=int)[:, None].repeat(2, axis=1)
        for source, target, _, _, stream in rounds:
            halves = [0, 1] if stream is None else [stream]
            sent = has.copy()
            for a, b in zip(source, target, strict=True):
                for half in halves:
                    # a sum that is handed down replaces what it contains; two disjoint sums are added
                    disjoint = not (sent[a, half] & has[b, half]).any()
                    has[b, half] = sent[a, half] + disjoint * has[b, half]
    assert (has == 1).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_rank_is_twice_in_a_round(name: str) -> None:
    for source, target, *_ in ALGORITHMS[name].rounds(64, 1.0, scaling.DGX_H100):
        assert len(set(source)) == len(source) == len(set(target)) == len(target)
        assert (source != target).all()


def test_ports_take_one_message_at_a_time() -> None:
    """Two messages of 3 bytes, to one rank and then from one rank: 1 s of latency once, 3 s of the port each."""
    one, two, three = (np.array([rank]) for rank in range(3))
    link = Link(1.0, 1.0)
    into = simulate([Round(one, three, 3, link), Round(two, three, 3, link)], 3)
    assert into.seconds.tolist() == [3, 3, 7]
    out_of = simulate([Round(one, two, 3, link), Round(one, three, 3, link)], 3)
    assert out_of.seconds.tolist() == [6, 4, 7]
    assert out_of.messages.tolist() == [2, 0, 0]


def test_streams_do_not_wait_for_each_other() -> None:
    one, two, three = (np.array([rank]) for rank in range(3))
    link = Link(10.0, 1.0)
    chained = [Round(one, two, 1, link, stream=0), Round(two, three, 1, link, stream=0)]
    assert simulate(chained, 3).seconds[2] == 22
    apart = [chained[0], chained[1]._replace(stream=1)]
    assert simulate(apart, 3).seconds[2] == 11
    joined = [*chained, Round(three, one, 1, link)]
    assert simulate(joined, 3).seconds[0] == 33


def test_jitter_has_the_mean_that_theory_gives() -> None:
    """Of two ranks that exchange one message of latency 1, the later one is late by max(X, Y): 3/2 on average; a chain
    of ten messages by 10."""
    exchange = ALGORITHMS["recursive doubling"].rounds(2, 0.0, UNIT)
    late = [simulate(exchange, 2, jitter=1, seed=seed).seconds.max() - 1 for seed in range(3000)]
    assert np.mean(late) == pytest.approx(1.5, abs=5 * np.std(late) / np.sqrt(len(late)))
    chain = [Round(np.array([rank]), np.array([rank + 1]), 0, Link(1.0, 1.0)) for rank in range(10)]
    late = [simulate(chain, 11, jitter=1, seed=seed).seconds.max() - 10 for seed in range(3000)]
    assert np.mean(late) == pytest.approx(10, abs=5 * np.std(late) / np.sqrt(len(late)))
    assert (
        simulate(chain, 11, jitter=1, seed=3).seconds.max()
        == simulate(chain, 11, jitter=1, seed=3).seconds.max()
    )


def test_only_powers_of_two() -> None:
    for name in ("recursive doubling", "double binary tree"):
        with pytest.raises(ValueError, match=r"12 ranks or nodes.*use ring"):
            ALGORITHMS[name].cost(12, 8, UNIT)
        with pytest.raises(ValueError, match=r"12 ranks or nodes.*use ring"):
            ALGORITHMS[name].rounds(12, 8, UNIT)


def test_decoder() -> None:
    """GPT-3 (arXiv 2005.14165, Table 2.1): 96 layers of width 12,288 have 174.6 billion parameters."""
    gpt3 = Decoder(96, 12288)
    assert gpt3.elements == pytest.approx(174.6e9, rel=1e-3)
    small = Decoder(2, 4, vocabulary=10)
    shapes = [(10, 4), *2 * [*4 * [(4, 4)], (16, 4), (4, 16)]]
    assert small.elements == sum(a * b for a, b in shapes)
    assert list(small.rows.values()) == [0, 4, len(shapes), sum(a for a, _ in shapes)]


def test_what_fsdp_moves() -> None:
    """2 nodes of 2 GPUs, a parameter: 3 collectives of 2 bytes; a GPU sends 3/4 of that, a node receives half of it."""
    decoder = Decoder(1, 1, vocabulary=0)
    cost = scaling.fsdp_cost(decoder, 4, Cluster(FAST, Link(0.0, 10.0), 2))
    assert cost.bytes == pytest.approx(12 * 6 * 3 / 4)
    assert cost.seconds == pytest.approx(12 * 6 / 2 / 20)
    assert cost.messages == 3 * 2 * 3
    assert scaling.memory_seconds(decoder, 4) == pytest.approx(12 * 28 / 4 / 3.35e12)


def test_constants_of_a_link_give_back_the_line() -> None:
    """T = 300 µs + n / (2 GB/s) on 2 ranks: 2 messages of n/2 bytes; on 4 ranks then 6 of n/4."""
    fits = [{"ranks": 2, "latency": 3e-4, "bandwidth": 2e9}]
    for size in (8, 10**6):
        assert scaling.predicted({"fits": fits}, 2, size) == pytest.approx(3e-4 + size / 2e9)
        assert scaling.predicted({"fits": fits}, 4, size) == pytest.approx(9e-4 + 1.5 * size / 2e9)


def test_the_page_has_the_tables() -> None:
    for name, table in scaling.tables(REPORT).items():
        assert table in DOC, (
            f"table {name} of docs/guide/scaling.md is not what python -m benchmarks.distributed.scaling prints"
        )


def test_what_the_page_says_of_the_measurement() -> None:
    steps = {
        (row["workload"], row["ranks"], row["optimizer"]): row
        for row in REPORT["rows"]
        if row["kind"] == "step"
    }
    bare = [row for row in REPORT["rows"] if row["kind"] == "bare"]
    fits = {fit["ranks"]: fit for fit in REPORT["fits"]}

    def ratios(*optimizers: str) -> str:
        values = [row["ratio"][1] for (_, _, name), row in steps.items() if name in optimizers]
        return f"{min(values):.2f} to {max(values):.2f}"

    def added(key: str) -> str:
        differences = [
            steps[workload, 2, "uniform"][key][1] - steps[workload, 2, "uniform, shards alone"][key][1]
            for workload in REPORT["config"]["workloads"]
        ]
        first, second, third = (f"{1e-3 * value:.1f}" for value in differences)
        return f"{first}, {second} and {third} ms"

    over = [
        row["us"][1] / (1e6 * scaling.predicted(REPORT, 4, row["bytes"])) for row in bare if row["ranks"] == 4
    ]
    del over[0]  # 8 bytes
    worked = {n: [row["processor_us"][1] / 1e3 for row in bare if row["ranks"] == n][1:] for n in (2, 4)}
    sizes = {32 * 160, 32 * 55, 32 * 53}
    alike = [row["us"][1] / 1e3 for row in bare if row["ranks"] == 2 and row["bytes"] in sizes]
    line = fits[2]
    for claim in (
        f"a step takes {ratios('none', 'warmup, handed over')} of the time of torch's SGD",
        f'"uniform" takes {ratios("uniform")} of SGD\'s time',
        f'Sharding adds {added("us")} to "uniform" on 2 ranks, of which {added("processor_us")} are work',
        f"a bare all-reduce of that size takes {min(alike):.2f} to {max(alike):.2f} ms",
        f"2 ranks: {1e6 * line['latency']:.0f} µs + bytes / ({1e-9 * line['bandwidth']:.2f} GB/s), with a relative "
        f"residual of {100 * line['error']:.0f} % (root mean square over n = {line['n']} sizes)",
        f"4 ranks ({1e6 * fits[4]['latency']:,.0f} µs + bytes / ({1e-9 * fits[4]['bandwidth']:.2f} GB/s), "
        f"{100 * fits[4]['error']:.0f} %) take {min(over):.1f} to {max(over):.1f} times as long as simulated",
        f"works {min(worked[4]):.1f} to {max(worked[4]):.1f} ms on a processor",
        f"n = {REPORT['config']['turns']} steps",
        f"n = {REPORT['config']['blocks']} blocks of {REPORT['config']['calls']}",
    ):
        assert claim in PROSE, claim
    assert {f"{value:.1f}" for value in worked[2][:-2]} == {"0.2"}


def test_what_the_page_says_of_1024_gpus() -> None:
    decoder, cluster = scaling.DECODER, scaling.DGX_H100
    fsdp, memory = scaling.fsdp_cost(decoder, 1024, cluster).seconds, scaling.memory_seconds(decoder, 1024)
    layers = ALGORITHMS["hierarchical"].cost(1024, 32 * decoder.rows[scaling.TRACKED], cluster).seconds
    filters = ALGORITHMS["ring"].cost(1024, 32 * decoder.rows[scaling.FILTERS], cluster).seconds
    for claim in (
        f"with trees {100 * layers / fsdp:.2g} % of the least that FSDP2 takes, {100 * layers / memory:.0f} % of",
        f"{32e-6 * decoder.rows[scaling.FILTERS]:.0f} MB that every rank holds, adds up and sends",
        f"for {100 * filters / fsdp:.1f} % of FSDP2's time and {filters / memory:.0f} times that of the memory traffic",
        f"{1e6 * scaling.NVLINK.latency:.1f} µs within a node and {1e6 * scaling.NETWORK.latency:.0f} µs across",
        f"{scaling.STEP_BYTES} bytes per local parameter",
        f"{1e-12 * scaling.MEMORY_BANDWIDTH:.2f} TB/s",
        f"median of {scaling.SEEDS} simulations",
    ):
        assert claim in PROSE, claim
