"""The study of evidence: which runs it asks for, and what it concludes, on rows made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from scipy import stats
from typer.testing import CliRunner

from benchmarks.common.optimizers import METHODS
from benchmarks.common.sweep import spec_key, without_nan
from benchmarks.common.training import Run, Task, run_of
from benchmarks.figures import RESULTS
from benchmarks.studies import study
from benchmarks.studies.__main__ import app
from benchmarks.studies.comparison import FRESH_SEEDS, label
from benchmarks.studies.evidence import plan, run, summarize
from benchmarks.studies.evidence.plan import Block, Known, method_of, runs_of
from benchmarks.studies.evidence.report import draw, tables

RESIDUAL = Task("resnet-8-w4", "cifar10", epochs=15, curve=15, weight_decay=5e-4)
PLAIN = dataclasses.replace(RESIDUAL, model="plain-8-w4")
Row = dict[str, Any]


def row(of_run: Run, score: float) -> Row:
    """A row as a sweep has it; `score`: accuracy in percent, or a loss with a minus."""
    text = of_run.task.data == "python"
    metric = {"nats_per_character": -score, "chance": 3.0} if text else {"accuracy": score / 100}
    value = -score if text else score / 100
    curve = [(float(epoch), 1.0, value * epoch / 3) for epoch in (1, 2, 3)]
    spec = json.loads(spec_key(of_run))
    return {"spec": spec, "commit": "c", **metric, "classes": 10, "seconds": 2.0, "steps": 4, "curve": curve}


def simulate(blocks: Sequence[Block], score: Callable[[Run], float], at_once: int = 2) -> list[Row]:
    """The rows after all runs that the plan asks for, if a run scores so."""
    done: dict[Run, Row] = {}
    while missing := [r for r in runs_of(blocks, list(done.values())) if r not in done]:
        done |= {r: row(r, score(r)) for r in missing[:at_once]}
    return list(done.values())


def peak(best_lr: float, top: float = 70.0) -> Callable[[Run], float]:
    return lambda r: top - 20 * math.log10(r.lr / best_lr) ** 2 + 0.1 * (r.seed - FRESH_SEEDS)


@pytest.mark.parametrize("lr", [1e-4, 0.003, 0.3, 1.0, 30.0])
def test_neighbours_are_a_factor_of_about_three_apart(lr: float) -> None:
    up = plan.neighbour(lr, 1)
    assert plan.neighbour(up, -1) == lr
    assert up / lr == pytest.approx(3, rel=0.12)


def test_a_grid_goes_on_until_it_holds_the_best_and_the_whole_usable_range() -> None:
    start = (0.03, 0.1, 0.3)
    scores: dict[float, float] = {}
    assert plan.lrs_to_try(start, scores, 10.0) == list(start)
    while missing := plan.lrs_to_try(start, scores, 10.0, ranges=True):
        scores |= {lr: 70 - 20 * math.log10(lr / 1.0) ** 2 for lr in missing}
    assert max(scores, key=scores.__getitem__) == 1.0
    bar = 10 + 0.9 * 60
    assert scores[min(scores)] < bar
    assert scores[max(scores)] < bar
    assert max(scores) == 10.0  # 3 is good, 10 is not
    between = {lr: score for lr, score in scores.items() if lr <= 3.0}
    assert plan.lrs_to_try(start, between, 10.0) == []  # the best is between two others
    assert plan.lrs_to_try(start, {lr: score for lr, score in scores.items() if lr <= 1.0}, 10.0) == [3.0]
    below_chance = {0.03: -5.0, 0.1: -4.7, 0.3: -4.1}
    assert plan.lrs_to_try(start, below_chance, -3.3) == [1.0]
    flat: dict[float, float] = {}
    while missing := plan.lrs_to_try(start, flat, 10.0, ranges=True):
        flat |= dict.fromkeys(missing, 10.0)
    assert len(flat) == plan.MOST


@pytest.mark.parametrize(("ranges", "lrs"), [(False, [0.03, 0.1, 0.3]), (True, [0.03, 0.1, 0.3, 1.0])])
def test_a_block_goes_on_for_the_range_only_if_it_asks(ranges: bool, lrs: list[float]) -> None:
    rows = simulate([Block("tuned", RESIDUAL, ("sgd",), 0, ranges=ranges)], peak(0.1))
    assert (
        sorted(r["spec"]["lr"] for r in rows) == lrs
    )  # 60 is best, the bar at 55; 0.03 has 54.5 and 0.3 has 55.4


def test_a_method_waits_for_its_learning_rate_and_others_do_not_wait_for_it() -> None:
    block = Block("tuned", RESIDUAL, ("sgd", "adamw"), 3)
    first = runs_of([block], [])
    assert {r.part for r in first} == {"val"}
    assert {r.share for r in first} == {plan.SHARE}
    of_sgd = simulate([block._replace(methods=("sgd",))], peak(0.1))
    rows = [r for r in of_sgd if r["spec"]["part"] == "val"]
    wanted = runs_of([block], rows)
    finals = [r for r in wanted if r.part == "test"]
    assert [(r.method.name, r.lr, r.seed) for r in finals] == [("sgd", 0.1, 100 + i) for i in range(3)]
    assert all(r.share == 1 for r in finals)
    assert {r.method.name for r in plan.waiting(block, Known(rows))} == {"adamw"}


def test_blocks_share_runs_and_take_the_learning_rate_that_they_name() -> None:
    short = dataclasses.replace(RESIDUAL, epochs=5, curve=5)
    blocks = [
        Block("tuned", RESIDUAL, ("sgd", "equilibrium-filter"), 2),
        Block("untuned", RESIDUAL, ("equilibrium-filter",), 2, lr_of="sgd"),
        Block("budget", short, ("equilibrium-filter+cosine²",), 2, lrs_from=RESIDUAL),
    ]
    best = {"sgd": 0.1, "equilibrium-filter": 1.0}
    rows = simulate(blocks, lambda r: peak(best[plan.chosen_as(r.method.name)])(r))
    tests = [run_of(r["spec"]) for r in rows if r["spec"]["part"] == "test"]
    assert sorted({(r.task.epochs, r.method.name, r.lr) for r in tests}) == [
        (5, "equilibrium-filter+cosine²", 1.0),
        (15, "equilibrium-filter", 0.1),
        (15, "equilibrium-filter", 1.0),
        (15, "sgd", 0.1),
    ]
    (squared,) = {r.method for r in tests if r.task == short}
    assert (squared.cosine_power, squared.optimizer) == (2.0, "equilibrium-filter")


def test_a_learning_rate_by_steps_falls_as_the_run_gets_longer() -> None:
    long = dataclasses.replace(RESIDUAL, epochs=40, curve=40)
    blocks = [
        Block("horizon", task, ("equilibrium-filter",), 1, lrs_from=RESIDUAL, by_steps=True)
        for task in (RESIDUAL, long, dataclasses.replace(RESIDUAL, epochs=5, curve=5))
    ]
    rows = simulate(blocks, peak(1.0))
    tests = {r.task.epochs: r.lr for r in map(run_of, (r["spec"] for r in rows)) if r.part == "test"}
    assert tests == {15: 0.3, 40: 0.1, 5: 1.0}  # chosen at a third of 15 epochs: 1, 1/3, 1/8


def test_a_grid_that_changes_does_not_forget_rows() -> None:
    assert all(method_of(name).lrs == () for name in METHODS)


@pytest.mark.parametrize("size", ["tiny", "medium", "full", "gpu"])
def test_whole_plan(size: str) -> None:
    blocks = plan.PLANS[size]("cpu")
    assert {block.question for block in blocks} <= {*summarize.QUESTIONS, "large"}
    best = {"SGD's": 0.3, "radians": 0.01, "AdamW's": 0.01, "of LARS": 1.0}

    def score(r: Run) -> float:
        loss = 70 - peak(best[r.method.unit])(r)
        return -2 - loss / 30 if r.task.data == "python" else 70 - loss

    rows = simulate(blocks, score, 50)
    assert not [r for block in blocks for r in plan.waiting(block, Known(rows))]
    summary = summarize.summarize(rows)
    json.dumps(summary)
    assert all(it["verdict"] for it in summary["questions"].values())
    if size in ("medium", "full"):
        verdicts = {name: it["verdict"] for name, it in summary["questions"].items()}
        assert summarize.NOT_YET not in verdicts.values()
    assert not set(plan.LEFT_OUT) & {name for block in blocks for name in block.methods}
    of_questions = {"medium": 8, "full": 8, "gpu": 3}  # with their verdicts
    if size in of_questions:
        assert len(tables(rows, summary)) == len(summary["tasks"]) + of_questions[size]


def test_without_rows_nothing_is_concluded() -> None:
    summary = summarize.summarize([])
    assert summary["tasks"] == {}
    assert {it["verdict"] for it in summary["questions"].values()} == {summarize.NOT_YET}


def final(task: Task, name: str, lr: float, scores: Sequence[float]) -> list[Row]:
    return [row(Run(task, method_of(name), lr, FRESH_SEEDS + i, "test"), s) for i, s in enumerate(scores)]


def chosen(task: Task, name: str, scores: dict[float, float]) -> list[Row]:
    return [row(Run(task, method_of(name), lr, 0, share=plan.SHARE), s) for lr, s in scores.items()]


def name_of(task: Task) -> str:
    return label(dataclasses.asdict(task))


ROWS = [
    *chosen(RESIDUAL, "sgd", {0.03: 50.0, 0.1: 60.0, 0.3: 50.0}),
    *chosen(RESIDUAL, "sgd+linear", {0.03: 50.0, 0.3: 62.0, 1.0: 40.0}),
    *chosen(RESIDUAL, "equilibrium-filter", {0.1: 60.0, 0.3: 63.0, 1.0: 61.0, 3.0: 59.0}),
    *final(RESIDUAL, "sgd", 0.1, [64.0, 65.0, 66.0]),
    *final(RESIDUAL, "sgd+linear", 0.3, [66.0, 66.5, 67.0]),
    *final(RESIDUAL, "equilibrium-filter", 0.3, [68.0, 68.4, 69.4]),
    *final(RESIDUAL, "equilibrium-filter", 0.1, [63.5, 65.0, 66.2]),  # at SGD's learning rate
    *final(RESIDUAL, "equilibrium-filter+cosine²", 0.3, [69.0, 69.5, 70.4]),
]


def test_the_difference_of_two_methods_is_that_of_students_test() -> None:
    sgd, ours = [66.0, 67.5, 66.3], [68.0, 68.4, 69.4]
    rows = [
        *chosen(RESIDUAL, "sgd", {0.1: 60.0}),
        *chosen(RESIDUAL, "muon", {0.1: 60.0}),
        *final(RESIDUAL, "sgd", 0.1, sgd),
        *final(RESIDUAL, "muon", 0.1, ours),
    ]
    (found,) = summarize.summarize(rows)["tasks"].values()
    gain = found["muon"]["better_than_best_sgd"]
    expected: Any = stats.ttest_ind(ours, sgd)
    low, high = expected.confidence_interval(0.95)
    assert (gain["low"], gain["high"], gain["p"]) == pytest.approx((low, high, expected.pvalue))
    assert found["sgd"]["better_than_best_sgd"] is None


def test_the_scatter_is_that_of_all_methods_and_the_baseline_the_better_one_by_validation() -> None:
    (found,) = summarize.summarize(ROWS)["tasks"].values()
    ours = found["equilibrium-filter"]
    assert (ours["lr"], ours["validation"], ours["lr_at_edge"]) == (0.3, 63.0, False)
    groups = [[r["accuracy"] * 100 for r in ROWS[i : i + 3]] for i in range(10, 25, 3)]
    deviation = math.sqrt(sum(statistics.variance(group) for group in groups) / len(groups))
    half = stats.t.ppf(0.975, 10) * deviation
    gain = ours["better_than_best_sgd"]  # SGD with a linear warm-up
    assert gain["mean"] == pytest.approx(2.1)
    assert gain["high"] - gain["mean"] == pytest.approx(half * math.sqrt(2 / 3))
    assert ours["test"]["mean"] - ours["test"]["low"] == pytest.approx(half / math.sqrt(3))
    assert found["sgd+linear"]["better_than_best_sgd"] is None

    worse = [
        *chosen(PLAIN, "sgd", {0.1: 61.0}),
        *chosen(PLAIN, "sgd+linear", {0.1: 60.0}),
        *final(PLAIN, "sgd", 0.1, [50.0, 51.0]),
        *final(PLAIN, "sgd+linear", 0.1, [60.0, 61.0]),
    ]
    (it,) = summarize.summarize(worse)["questions"]["tuned"]["found"].values()
    assert it["baseline"] == "sgd"  # whatever the test part says


def test_ahead_is_corrected_for_the_number_of_comparisons() -> None:
    def gain(mean: float, p: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 3, "p": p}

    assert summarize.comparison({"a": gain(1, 0.04)})["ahead"] == ["a"]
    three = summarize.comparison({"a": gain(1, 0.04), "b": gain(1, 0.3), "c": gain(-1, 0.001), "d": None})
    assert list(three["better"]) == ["a", "b", "c"]
    assert (three["ahead"], three["behind"]) == ([], ["c"])  # 0.04 · 3 / 2 is above 5 %
    assert summarize.comparison({"a": gain(1, math.nan)})["ahead"] == []
    verdict = summarize.told_apart({"net": three | {"behind": []}})
    assert verdict == "net: none told apart from 0 (±1)"


def test_swapped_in_at_sgds_learning_rate() -> None:
    it = summarize.summarize(ROWS)["questions"]["untuned"]
    ours = it["found"][name_of(RESIDUAL)]["equilibrium-filter"]
    assert (ours["lr"], ours["aim"], ours["outcome"]) == (0.1, -0.2, "open")
    assert ours["better"]["mean"] == pytest.approx((-0.5 + 0 + 0.2) / 3)
    assert ours["better_than_linear"]["mean"] == pytest.approx(64.9 - 66.5)
    plain = [
        *chosen(PLAIN, "sgd", {0.1: 60.0}),
        *final(PLAIN, "sgd", 0.1, [60.0, 60.1]),
        *final(PLAIN, "warmup", 0.1, [62.0, 62.1]),
        *final(PLAIN, "equilibrium-gradient", 0.1, [64.0, 64.1]),
    ]
    (of_plain,) = summarize.summarize(plain)["questions"]["untuned"]["found"].values()
    assert {name: (one["aim"], one["outcome"]) for name, one in of_plain.items()} == {
        "equilibrium-gradient": (3.0, "met"),
        "warmup": (3.0, "missed"),
    }


def test_methods_at_another_learning_rate_have_names_of_their_own() -> None:
    rows = [
        *ROWS,
        *chosen(RESIDUAL, "muon", {0.03: 61.0, 0.3: 64.0}),
        *final(RESIDUAL, "muon", 0.3, [68.0, 69.0]),
        *final(RESIDUAL, "muon", 0.1, [67.0, 68.0]),  # by steps, and by chance SGD's
    ]
    (found,) = summarize.summarize(rows)["tasks"].values()
    at_sgds = "equilibrium-filter at SGD's lr"  # which is the one by steps, too: once is enough
    others = [name for name in found if " at " in name]
    assert others == [at_sgds, "muon at lr ∝ 1/steps"]
    assert [found[name]["lr"] for name in others] == [0.1, 0.1]
    assert found[at_sgds]["test"]["mean"] == pytest.approx(64.9)
    better = summarize.summarize(rows)["questions"]["horizon"]["found"][name_of(RESIDUAL)]["better"]
    assert {name: round(gain["mean"], 2) for name, gain in better.items()} == {
        "equilibrium-filter": -3.7,
        "muon": -1.0,
    }


def test_a_net_at_full_size_takes_the_learning_rates_of_its_narrow_one() -> None:
    narrow = dataclasses.replace(RESIDUAL, model="resnet-20-w8", image_size=16)
    full = dataclasses.replace(RESIDUAL, model="resnet-20", epochs=10)
    rows = [
        *chosen(dataclasses.replace(narrow, model="plain-20-w8"), "sgd", {1.0: 60.0}),
        *chosen(narrow, "sgd", {0.1: 60.0}),
        *chosen(narrow, "equilibrium-filter", {1.0: 60.0}),
        *final(full, "sgd", 0.1, [80.0, 81.0]),
        *final(full, "equilibrium-filter", 0.1, [82.0, 83.0]),
    ]
    summary = summarize.summarize(rows)
    found = summary["tasks"][name_of(full)]
    assert {name: it["lr"] for name, it in found.items()} == {
        "sgd": 0.1,
        "equilibrium-filter at SGD's lr": 0.1,
    }
    assert summary["questions"]["untuned"]["found"][name_of(full)]["equilibrium-filter"]["aim"] == -0.2


def test_ranges_and_ends_of_the_schedule() -> None:
    questions = summarize.summarize(ROWS)["questions"]
    (of_task,) = questions["range"]["found"].values()
    bar = 10 + 0.9 * 53
    sgd = 10 ** (math.log10(0.3 / 0.1) * (60 - bar) / 10 * 2)  # 0.03 is as far from 0.1 as 0.3 up to rounding
    assert of_task["widths"]["sgd"] == pytest.approx(sgd, rel=0.05)
    assert of_task["widths"]["equilibrium-filter"] == pytest.approx(30)  # all four are good
    assert of_task["sgd"] == of_task["widths"]["sgd+linear"]
    for end in (0.03, 1.0):
        cut_off = [r for r in ROWS if (r["spec"]["method"]["name"], r["spec"]["lr"]) != ("sgd+linear", end)]
        assert (
            summarize.summarize(cut_off)["questions"]["range"]["found"] == {}
        )  # SGD's would look too narrow
    (ends,) = questions["annealing"]["found"].values()
    assert list(ends["better"]) == ["equilibrium-filter+cosine²"]
    assert ends["better"]["equilibrium-filter+cosine²"]["mean"] == pytest.approx((1 + 1.1 + 1) / 3)
    (needed,) = questions["warm-up"]["found"].values()
    assert list(needed["better"]) == ["sgd+linear"]
    assert needed["better"]["sgd+linear"]["mean"] == pytest.approx(1.5)


def test_another_end_of_the_schedule_at_another_learning_rate() -> None:
    rows = [*ROWS, *final(RESIDUAL, "equilibrium-filter+cosine²", 0.1, [65.5, 67.0, 68.2])]
    (ends,) = summarize.summarize(rows)["questions"]["annealing"]["found"].values()
    at_third = ends["better"]["equilibrium-filter+cosine² at lr ∝ 1/steps"]
    assert at_third["mean"] == pytest.approx(2.0)


def test_budgets() -> None:
    short = dataclasses.replace(RESIDUAL, epochs=5, curve=5)
    rows = [
        *ROWS,
        *final(short, "sgd+linear", 0.3, [50.0, 51.0]),
        *final(short, "equilibrium-filter", 0.3, [54.0, 54.0]),
    ]
    it = summarize.summarize(rows)["questions"]["budget"]
    assert list(it["found"]) == [name_of(short), name_of(RESIDUAL)]
    assert it["found"][name_of(short)]["better"]["equilibrium-filter"]["mean"] == pytest.approx(3.5)
    by_steps = "equilibrium-filter at lr ∝ 1/steps"  # at 5 epochs the same as its own, at 15 a third of it
    assert it["found"][name_of(short)]["better"][by_steps]["mean"] == pytest.approx(3.5)
    points, *_ = it["verdict"].split(". ")
    assert points == f"points at 5, 15 epochs: equilibrium-filter +3.5, +2.1; {by_steps} +3.5, -1.6"
    assert f"5 epochs: ahead equilibrium-filter, {by_steps}. " in it["verdict"]  # after correction


def with_curve(values: Sequence[float | None], name: str, task: Task = RESIDUAL) -> list[Row]:
    (made,) = final(task, name, 0.1, [50.0 if task is RESIDUAL else -2.0])
    return [{**made, "curve": [[epoch, 1.0, value] for epoch, value in enumerate(values, start=1)]}]


def test_epochs_to_shares_of_the_gain_over_chance() -> None:
    rows = [
        *(row for name in ("sgd", "warmup", "muon") for row in chosen(RESIDUAL, name, {0.1: 60.0})),
        *with_curve([0.54, 0.56, 0.665], "sgd"),  # 80 % of the gain from 10 to 66.5 % are 55.2 %
        *with_curve([0.62, 0.63, 0.64], "warmup"),
        *with_curve([0.3, None], "muon"),  # its loss was not finite any more
    ]
    (found,) = summarize.summarize(rows)["tasks"].values()
    assert found["sgd"]["epochs_to"] == [2, 3, 3, 3]
    assert found["warmup"]["epochs_to"] == [1, 1, 3, None]
    assert found["muon"]["epochs_to"] == [None] * 4
    assert found["muon"]["curve"][0] == (1, 30.0)
    json.dumps(without_nan(found))

    text = Task("olmo-1-w32", "python", weight_decay=5e-4)
    rows = [*chosen(text, "sgd", {0.1: -2.0}), *with_curve([2.5, 2.2, 2.0], "sgd", text)]
    (of_text,) = summarize.summarize(rows)["tasks"].values()
    assert of_text["sgd"]["epochs_to"] == [2, 3, 3, 3]  # 3 − 0.8 are 2.2


def test_a_mean_curve_ends_where_a_seed_ends() -> None:
    first, second = with_curve([0.5, 0.6, 0.7], "sgd"), with_curve([0.3], "sgd")
    second[0]["spec"]["seed"] = FRESH_SEEDS + 1
    (found,) = summarize.summarize([*chosen(RESIDUAL, "sgd", {0.1: 60.0}), *first, *second])["tasks"].values()
    epochs, values = zip(*found["sgd"]["curve"], strict=True)
    assert epochs == (1, 2, 3)
    assert values[0] == pytest.approx(40.0)
    assert all(map(math.isnan, values[1:]))
    assert found["sgd"]["epochs_to"] == [None] * 4  # its own end is not known


def test_rows_of_two_tasks_that_look_alike_are_refused() -> None:
    on_gpu = dataclasses.replace(RESIDUAL, device="cuda")
    rows = [*chosen(RESIDUAL, "sgd", {0.1: 60.0}), *chosen(on_gpu, "sgd", {0.1: 61.0})]
    with pytest.raises(ValueError, match=r"rows of 2 tasks called 'resnet-8-w4, .* which differ in device"):
        summarize.summarize(rows)


def test_transfer_loses_what_the_middle_nets_best_one_loses() -> None:
    tasks = [dataclasses.replace(RESIDUAL, model=f"resnet-20-w{width}") for width in (4, 8, 16)]
    lrs = (0.03, 0.1, 0.3)
    rows = [
        r
        for task, best in zip(tasks, (0.3, 0.1, 0.03), strict=True)
        for r in chosen(task, "adamw", {lr: 70 - 20 * math.log10(lr / best) ** 2 for lr in lrs})
    ]
    rows += chosen(tasks[1], "sgd", {0.1: 60.0})  # the net with the most methods is the one in the middle
    (found,) = summarize.summarize(rows)["questions"]["transfer"]["found"].values()
    assert found["losses"]["resnet-20-w8"] == 0
    assert found["worst_loss"] == pytest.approx(20 * math.log10(0.1 / 0.03) ** 2)
    assert found["losses"]["resnet-20-w4"] == pytest.approx(20 * math.log10(0.3 / 0.1) ** 2)
    assert found["range"] == pytest.approx(10)
    unknown = [r for r in rows if r["spec"]["task"]["model"] != "resnet-20-w16" or r["spec"]["lr"] != 0.1]
    it = summarize.summarize(unknown)["questions"]["transfer"]
    assert it["found"]["adamw"]["worst_loss"] is None
    assert it["verdict"].endswith("adamw ×10, not measured points")


def test_a_grid_can_begin_around_the_best_learning_rate_of_another_task() -> None:
    other = dataclasses.replace(RESIDUAL, model="resnet-56-w4")
    transfer = Block("transfer", other, ("adamw",), 1, around=RESIDUAL)
    blocks = [Block("tuned", RESIDUAL, ("adamw",), 0), transfer]
    assert not [r for r in runs_of(blocks, []) if r.task == other]  # there is no best one yet
    assert len(plan.waiting(transfer, Known([]))) == 1
    rows = simulate(blocks, lambda r: peak(1.0 if r.task == RESIDUAL else 0.1)(r))
    runs = [r for r in map(run_of, (r["spec"] for r in rows)) if r.task == other]
    assert sorted(r.lr for r in runs if r.part == "val") == [0.03, 0.1, 0.3, 1.0, 3.0]
    assert [r.lr for r in runs if r.part == "test"] == [0.1]


def test_large_batches() -> None:
    big = dataclasses.replace(RESIDUAL, batch_size=4096)
    rows = [
        *chosen(RESIDUAL, "lars+linear", {1.0: 60.0}),
        *chosen(big, "lars+linear", {3.0: 60.0}),
        *chosen(big, "muon", {3.0: 60.0}),
        *final(RESIDUAL, "lars+linear", 1.0, [66.0, 68.0]),
        *final(big, "lars+linear", 3.0, [60.0, 62.0]),
        *final(big, "muon", 3.0, [60.0, 62.0]),
    ]
    it = summarize.summarize(rows)["questions"]["batch"]
    assert list(it["found"]) == ["lars+linear"]  # Muon has no result at 128
    assert it["verdict"] == "points from the smallest to the largest: lars+linear -6.0"


def test_text_has_two_peers() -> None:
    text = Task("olmo-1-w32", "python", weight_decay=5e-4)
    names = {"adamw": [-2.0, -2.2], "adamh": [-1.9, -2.1], "muon": [-1.8, -2.1]}
    rows = [
        r
        for name, s in names.items()
        for r in (*chosen(text, name, {0.01: -2.0}), *final(text, name, 0.01, s))
    ]
    summary = summarize.summarize(rows)
    found = summary["questions"]["text"]["found"]
    assert found[f"{name_of(text)}, against adamw"]["better"]["adamh"]["mean"] == pytest.approx(0.1)
    assert found[f"{name_of(text)}, against muon"]["better"]["adamh"]["mean"] == pytest.approx(-0.05)
    of_text = summary["tasks"][name_of(text)]
    assert of_text["adamh"]["test"]["mean"] == pytest.approx(2.0)  # a loss, without the minus
    assert summary["questions"]["tuned"]["verdict"] == summarize.NOT_YET


def test_the_default_is_judged_on_all_nets_with_images_at_one_batch_size() -> None:
    plain = [
        *chosen(PLAIN, "sgd", {0.1: 60.0}),
        *chosen(PLAIN, "equilibrium-filter", {0.1: 60.0}),
        *chosen(PLAIN, "warmup", {0.1: 60.0}),
        *final(PLAIN, "sgd", 0.1, [60.0, 61.0]),
        *final(PLAIN, "equilibrium-filter", 0.1, [59.0, 61.0]),
        *final(PLAIN, "warmup", 0.1, [70.0, 70.0]),
    ]
    big = dataclasses.replace(RESIDUAL, batch_size=4096)
    large = [
        *chosen(big, "sgd", {0.1: 60.0}),
        *chosen(big, "equilibrium-filter", {0.1: 60.0}),
        *final(big, "sgd", 0.1, [60.0, 61.0]),
        *final(big, "equilibrium-filter", 0.1, [20.0, 20.0]),
    ]
    it = summarize.summarize([*ROWS, *plain, *large])["questions"]["default"]
    swapped_in = "equilibrium-filter at SGD's lr"
    assert list(it["found"]) == ["equilibrium-filter", swapped_in]
    assert it["found"]["equilibrium-filter"]["mean"] == pytest.approx((2.1 - 0.5) / 2)
    # 64.9 − 66.5 on the residual net; on the plain net SGD's learning rate is its own
    assert it["found"][swapped_in]["mean"] == pytest.approx((-1.6 - 0.5) / 2)
    assert it["found"]["equilibrium-filter"]["worst"] == pytest.approx(-0.5)
    missing = "not on all: equilibrium-filter at lr ∝ 1/steps, warmup"  # a third of 0.1 is not measured
    assert it["verdict"].endswith(missing)


def cells(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def test_tables() -> None:
    large = dataclasses.replace(RESIDUAL, batch_size=1024)
    rows = [*ROWS, *chosen(large, "sgd", {0.3: 50.0}), *final(large, "sgd", 0.3, [55.0, 57.0])]
    for model, best in (("resnet-20-w8", 0.1), ("resnet-20-w4", 0.3), ("resnet-20-w16", 0.03)):
        task = dataclasses.replace(RESIDUAL, model=model, epochs=5)
        rows += chosen(task, "adamw", {lr: 70 - 20 * math.log10(lr / best) ** 2 for lr in (0.03, 0.1, 0.3)})
    rows += [*chosen(RESIDUAL, "muon", {0.1: 60.0}), *final(RESIDUAL, "muon", 0.1, [64.0])]
    made = {str(table.title): cells(table) for table in tables(rows, summarize.summarize(rows))}
    task = name_of(RESIDUAL)
    of_method = {line[0]: line[1:] for line in made[f"{task}: accuracy (%)"]}
    # the pooled standard deviation is 0.906, with 10 degrees of freedom
    assert of_method["equilibrium-filter"] == (
        *("0.3", "63.0", "68.6 [67.4, 69.8]", "+2.1 [+0.5, +3.7]", "≥ ×30", "3, 3, 3, 3"),
    )
    assert of_method["equilibrium-filter+cosine²"][0] == "0.3"
    assert of_method["muon"][2] == "64.0 [62.0, 66.0] (1 seed)"  # the scatter is that of the others
    untuned = (*("-0.1 [-1.7, +1.5]", "-1.6 [-3.2, +0.0]"), "-0.2", "open")
    assert made["swapped in"] == [(task, "equilibrium-filter", "0.1", *untuned)]
    (by_steps,) = made["lr ∝ 1/steps against the lr chosen on a third of them"]
    assert by_steps == (task, "equilibrium-filter", "-3.7 [-5.3, -2.1]")
    (squared,) = made["another end of the schedule against the plain cosine"]
    assert squared == (task, "equilibrium-filter+cosine²", "+1.0 [-0.6, +2.7]")
    assert made["a linear warm-up against none"] == [(task, "sgd+linear", "+1.5 [-0.1, +3.1]")]
    assert "on text against a peer" not in made
    (of_net,) = made["one learning rate for all nets"]
    assert (of_net[0], of_net[-2], of_net[-1]) == ("adamw", "×10", "5.5")
    # two seeds at 1,024 scatter by 1.41 and have a single degree of freedom
    assert made["batch sizes at equal epochs"] == [("sgd", "65.0 [63.8, 66.2]", "56.0 [43.3, 68.7]")]


def test_without_a_second_seed_of_any_method_there_is_no_interval() -> None:
    rows = [*chosen(RESIDUAL, "sgd", {0.1: 60.0}), *final(RESIDUAL, "sgd", 0.1, [64.0])]
    (line,) = cells(tables(rows, summarize.summarize(rows))[0])
    assert line[3] == "64.0 (1 seed)"


def test_figures_have_a_panel_for_each_task_with_results() -> None:
    drawn = draw(ROWS, summarize.summarize(ROWS))
    assert {stem: len(figure.axes) for stem, figure in drawn.items()} == {
        "evidence-curves": 1,
        "evidence-lrs": 1,
    }
    assert len(drawn["evidence-curves"].axes[0].lines) == 4  # not another end of the schedule
    assert len(drawn["evidence-lrs"].axes[0].lines) == 3
    assert draw([], summarize.summarize([])) == {}


def test_what_is_finished_is_not_listed_as_left() -> None:
    rows = simulate(plan.tiny("cpu"), peak(0.1), at_once=50)
    assert cells(run.left("tiny", "cpu", rows)) == [("together", *[""] * 5, "0.0")]


def test_every_method_in_the_committed_figures_has_a_look_of_its_own() -> None:
    result = json.loads((RESULTS / "evidence-medium.json").read_text(encoding="utf-8"))
    drawn = draw(result["rows"], summarize.summarize(result["rows"]))
    looks: dict[str, set[Any]] = {}
    for figure in drawn.values():
        for key in figure.legends[0].get_lines():
            look = (key.get_color(), key.get_marker(), key.get_linestyle())
            looks.setdefault(str(key.get_label()), set()).add(look)
    assert len(looks) > 7
    assert all(len(its) == 1 for its in looks.values())
    assert len(set.union(*looks.values())) == len(looks)


def test_only_the_first_fresh_seed_keeps_its_trace() -> None:
    task = Task("bn-mlp-2-w4", epochs=1, limit=400, curve=1)
    kept, dropped = (run.train(Run(task, method_of("sgd"), 0.1, seed, "test")) for seed in (FRESH_SEEDS, 101))
    assert "mean_angle" in kept
    assert set(kept) - set(dropped) == set(kept) & set(run.TRACE_COLUMNS)
    assert len(dropped["curve"]) == 1
    assert dropped["cpu_seconds"] > 0


def test_estimates_are_those_of_the_same_task_whatever_its_epochs() -> None:
    known = Known([{**r, "cpu_seconds": 8.0} for r in final(RESIDUAL, "sgd", 0.1, [60.0])])  # 4 steps
    long = dataclasses.replace(RESIDUAL, epochs=30, curve=30)
    a_run = Run(long, method_of("adamw"), 0.1, 0, share=0.5)
    assert plan.steps_of(a_run) == round(50_000 * 0.8 / 128 * 15)
    assert plan.estimated_seconds(a_run, known) == pytest.approx(2.0 * plan.steps_of(a_run))
    text = Run(Task("olmo-4-w160", "python", batch_size=16, limit=1600, epochs=1), method_of("sgd"), 0.1, 0)
    assert plan.estimated_seconds(text, known) == pytest.approx(100 * 0.15)


def test_committed_rows_are_listed_taken_over_and_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    monkeypatch.setattr(study, "RESULTS", results)
    wanted = runs_of(plan.tiny("cpu"), [])
    committed, file = results / "evidence-tiny.json", out / "evidence-tiny.rows.jsonl"
    committed.write_text(json.dumps({"unfinished": True, "rows": [row(r, 50.0) for r in wanted[:5]]}))
    arguments = ["evidence", "--size", "tiny", "--device", "cpu", "--out", str(out), "--list"]
    listed = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert listed.exit_code == 0, listed.output
    assert re.search(r"tuned +\S+ and 4 more +5 +12", listed.output)
    fresh = CliRunner().invoke(app, [*arguments, "--fresh"], env={"COLUMNS": "200"})
    assert re.search(r"tuned +sgd and 4 more +0 +15", fresh.output)
    assert not out.exists()  # a list changes nothing

    out.mkdir()
    own = json.dumps(row(wanted[4], 60.0)) + "\n"
    file.write_text(own + own[:20])  # a line that a killed process has cut short
    assert study.take_over("evidence-tiny", out) == 4
    assert study.take_over("evidence-tiny", out) == 0
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["accuracy"] for r in kept] == [0.6, 0.5, 0.5, 0.5, 0.5]

    committed.write_text(
        json.dumps({"rows": [row(r, 50.0) for r in wanted]})
    )  # a finished result is measured anew
    assert study.take_over("evidence-tiny", tmp_path / "other") == 0


def test_a_report_of_what_is_done_so_far(tmp_path: Path) -> None:
    file = tmp_path / "evidence-medium.rows.jsonl"
    text = "".join(json.dumps(r) + "\n" for r in ROWS) + '{"spec": {"ta'  # the sweep is writing
    file.write_text(text)
    result = CliRunner().invoke(app, ["report", str(file), "--out", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "68.6 [67.4, 69.8]" in result.output
    assert file.read_text() == text

    save = ["--save", str(tmp_path / "evidence-medium.json"), "--out", str(tmp_path)]
    saved = CliRunner().invoke(app, ["report", str(file), *save], env={"COLUMNS": "200"})
    assert saved.exit_code == 0, saved.output
    content = json.loads((tmp_path / "evidence-medium.json").read_text())
    assert (content["size"], content["unfinished"], content["rows"]) == (
        "medium",
        True,
        json.loads(json.dumps(ROWS)),
    )
    again = CliRunner().invoke(app, ["report", save[1], *save], env={"COLUMNS": "200"})
    assert again.exit_code == 2
    assert "--save is for a file .rows.jsonl" in " ".join(again.output.split())

    nowhere = CliRunner().invoke(
        app, ["report", str(file), "--save", "no/where.json"], env={"COLUMNS": "200"}
    )
    assert nowhere.exit_code == 2
    assert "there is no folder no; make it first" in " ".join(nowhere.output.split())

    other = json.dumps(chosen(dataclasses.replace(RESIDUAL, device="cuda"), "sgd", {0.1: 60.0})[0])
    for lines, message in ((other + "\n", "which differ in device"), ("nonsense\n", "is no row of a sweep")):
        mixed = tmp_path / "evidence-tiny.rows.jsonl"
        mixed.write_text(json.dumps(ROWS[0]) + "\n" + lines)
        refused = CliRunner().invoke(
            app, ["report", str(mixed), "--out", str(tmp_path)], env={"COLUMNS": "200"}
        )
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.replace("│", " ").split())

    missing = CliRunner().invoke(app, ["report", "nothing-tiny.rows.jsonl"], env={"COLUMNS": "200"})
    assert "cannot be read: No such file" in " ".join(missing.output.split())


def test_a_study_without_this_size_says_which_it_has() -> None:
    result = CliRunner().invoke(app, ["control", "--size", "medium"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert "unknown size 'medium'; choose one of tiny, small, full; evidence can be run at 'medium'" in text


def test_list_of_another_study(tmp_path: Path) -> None:
    arguments = ["warmup", "--size", "tiny", "--device", "cpu", "--out", str(tmp_path), "--list"]
    listed = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert listed.exit_code == 0, listed.output
    assert "bn-mlp-4-w16 sgd lr=0.03" in listed.output
    assert not list(tmp_path.glob("*.png"))
