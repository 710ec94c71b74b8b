"""The study of evidence: which runs it asks for, and what it concludes, on rows made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from scipy import stats
from typer.testing import CliRunner

from benchmarks.common.optimizers import METHODS
from benchmarks.common.sweep import spec_key
from benchmarks.common.training import Run, Task, run_of
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
    while missing := plan.lrs_to_try(start, scores, 10.0):
        scores |= {lr: 70 - 20 * math.log10(lr / 1.0) ** 2 for lr in missing}
    assert max(scores, key=scores.__getitem__) == 1.0
    bar = 10 + 0.9 * 60
    assert scores[min(scores)] < bar
    assert scores[max(scores)] < bar
    assert max(scores) == 10.0  # 3 is good, 10 is not
    below_chance = {0.03: -5.0, 0.1: -4.7, 0.3: -4.1}
    assert plan.lrs_to_try(start, below_chance, -3.3) == [1.0]
    flat: dict[float, float] = {}
    while missing := plan.lrs_to_try(start, flat, 10.0):
        flat |= dict.fromkeys(missing, 10.0)
    assert len(flat) == plan.MOST


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


ROWS = [
    *chosen(RESIDUAL, "sgd", {0.03: 50.0, 0.1: 60.0, 0.3: 50.0}),
    *chosen(RESIDUAL, "sgd+linear", {0.1: 61.0, 0.3: 62.0, 1.0: 40.0}),
    *chosen(RESIDUAL, "equilibrium-filter", {0.1: 60.0, 0.3: 63.0, 1.0: 61.0, 3.0: 59.0}),
    *final(RESIDUAL, "sgd", 0.1, [64.0, 65.0, 66.0]),
    *final(RESIDUAL, "sgd+linear", 0.3, [66.0, 66.5, 67.0]),
    *final(RESIDUAL, "equilibrium-filter", 0.3, [68.0, 68.4, 69.4]),
    *final(RESIDUAL, "equilibrium-filter", 0.1, [63.5, 65.0, 66.2]),  # at SGD's learning rate
    *final(RESIDUAL, "equilibrium-filter+cosine²", 0.3, [69.0, 69.5, 70.4]),
]


def test_differences_are_by_seed_with_students_interval() -> None:
    summary = summarize.summarize(ROWS)
    (found,) = summary["tasks"].values()
    ours = found["equilibrium-filter"]
    assert (ours["best_lr"], ours["validation"], ours["best_lr_at_edge"]) == (0.3, 63.0, False)
    gains = [2.0, 1.9, 2.4]  # against SGD with a linear warm-up, which validation prefers
    expected = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    gain = ours["better_than_best_sgd"]
    assert gain["mean"] == pytest.approx(2.1)
    assert (gain["low"], gain["high"]) == pytest.approx((expected.low, expected.high))
    assert found["sgd+linear"]["better_than_best_sgd"] is None
    tuned = summary["questions"]["tuned"]["found"][label(dataclasses.asdict(RESIDUAL))]
    assert tuned["baseline"] == "sgd+linear"
    assert "equilibrium-filter" in tuned["ahead"]
    assert tuned["behind"] == ["sgd"]
    noisy = summarize.summarize([*ROWS[:10], *final(RESIDUAL, "sgd", 0.1, [60.0, 66.0]), *ROWS[13:16]])
    (of_task,) = noisy["questions"]["tuned"]["found"].values()
    assert of_task["behind"] == []


def test_swapped_in_at_sgds_learning_rate() -> None:
    it = summarize.summarize(ROWS)["questions"]["untuned"]
    (of_task,) = it["found"].values()
    ours = of_task["equilibrium-filter"]
    assert (ours["lr"], ours["aim"], ours["met"]) == (0.1, -0.2, True)
    assert ours["better"]["mean"] == pytest.approx((-0.5 + 0 + 0.2) / 3)
    assert "met" in it["verdict"]
    plain = [
        *chosen(PLAIN, "sgd", {0.1: 60.0}),
        *final(PLAIN, "sgd", 0.1, [60.0, 61.0]),
        *final(PLAIN, "warmup", 0.1, [62.0, 62.0]),
    ]
    (of_plain,) = summarize.summarize(plain)["questions"]["untuned"]["found"].values()
    assert (of_plain["warmup"]["aim"], of_plain["warmup"]["met"]) == (3.0, False)


def test_ranges_and_ends_of_the_schedule() -> None:
    questions = summarize.summarize(ROWS)["questions"]
    (of_task,) = questions["range"]["found"].values()
    bar = 10 + 0.9 * 53
    sgd = 10 ** (math.log10(0.3 / 0.1) * (60 - bar) / 10 * 2)  # 0.03 is as far from 0.1 as 0.3 up to rounding
    assert of_task["widths"]["sgd"] == pytest.approx(sgd, rel=0.05)
    assert of_task["widths"]["equilibrium-filter"] == pytest.approx(30)  # all four are good
    assert of_task["sgd"] == of_task["widths"]["sgd+linear"]
    (ends,) = questions["annealing"]["found"].values()
    assert ends["better"]["equilibrium-filter+cosine²"]["mean"] == pytest.approx((1 + 1.1 + 1) / 3)
    assert ends["ahead"] == ["equilibrium-filter+cosine²"]
    (needed,) = questions["warm-up"]["found"].values()
    assert needed["better"]["sgd+linear"]["mean"] == pytest.approx(1.5)


def test_budgets_and_time_to_accuracy() -> None:
    rows = [r for r in ROWS if "cosine" not in r["spec"]["method"]["name"]]
    short = dataclasses.replace(RESIDUAL, epochs=5, curve=5)
    rows += [
        *final(short, "sgd+linear", 0.3, [50.0, 51.0]),
        *final(short, "equilibrium-filter", 0.3, [54.0, 54.0]),
    ]
    it = summarize.summarize(rows)["questions"]["budget"]
    assert list(it["found"]) == [label(dataclasses.asdict(task)) for task in (short, RESIDUAL)]
    of_short = it["found"][label(dataclasses.asdict(short))]
    assert of_short["better"]["equilibrium-filter"]["mean"] == pytest.approx(3.5)
    assert it["verdict"].endswith("equilibrium-filter")
    methods = summarize.summarize(rows)["tasks"][label(dataclasses.asdict(RESIDUAL))]
    assert methods["sgd+linear"]["epochs_to"] == [
        3.0,
        3.0,
        3.0,
        3.0,
    ]  # 80 % and more of the way from 10 to 66.5 %
    assert methods["sgd"]["epochs_to"][-1] is None


def test_transfer_loses_what_the_middle_nets_best_one_loses() -> None:
    tasks = [dataclasses.replace(RESIDUAL, model=f"resnet-20-w{width}") for width in (8, 4, 16)]
    rows = [
        r
        for task, best in zip(tasks, (0.1, 0.3, 0.03), strict=True)
        for r in chosen(task, "adamw", {lr: 70 - 20 * math.log10(lr / best) ** 2 for lr in (0.03, 0.1, 0.3)})
    ]
    (found,) = summarize.summarize(rows)["questions"]["transfer"]["found"].values()
    loss = 20 * math.log10(0.3 / 0.1) ** 2
    assert found["losses"]["resnet-20-w8"] == 0
    assert found["worst_loss"] == pytest.approx(20 * math.log10(0.1 / 0.03) ** 2)
    assert found["losses"]["resnet-20-w4"] == pytest.approx(loss)
    assert found["range"] == pytest.approx(10)


def test_large_batches_and_text() -> None:
    big = dataclasses.replace(RESIDUAL, batch_size=4096)
    text = Task("olmo-1-w32", "python", weight_decay=5e-4)
    rows = [
        *final(RESIDUAL, "lars+linear", 1.0, [66.0, 68.0]),
        *final(big, "lars+linear", 3.0, [60.0, 62.0]),
        *final(text, "adamw", 0.01, [-2.0, -2.2]),
        *final(text, "adamh", 0.01, [-1.9, -2.1]),
    ]
    questions = summarize.summarize(rows)["questions"]
    assert questions["batch"]["verdict"].endswith("lars+linear -6.0")
    (against,) = questions["text"]["found"].values()
    assert against["better"]["adamh"]["mean"] == pytest.approx(0.1)


def test_the_default_is_judged_on_all_nets() -> None:
    plain = [
        *chosen(PLAIN, "sgd", {0.1: 60.0}),
        *chosen(PLAIN, "equilibrium-filter", {0.1: 60.0}),
        *final(PLAIN, "sgd", 0.1, [60.0, 61.0]),
        *final(PLAIN, "equilibrium-filter", 0.1, [59.0, 61.0]),
        *chosen(PLAIN, "warmup", {0.1: 60.0}),
        *final(PLAIN, "warmup", 0.1, [70.0, 70.0]),
    ]
    it = summarize.summarize([*ROWS, *plain])["questions"]["default"]
    swapped_in = "equilibrium-filter at SGD's lr"
    assert list(it["found"]) == [
        "equilibrium-filter",
        swapped_in,
    ]  # "warmup" has no result on the residual net
    assert it["found"]["equilibrium-filter"]["mean"] == pytest.approx((2.1 - 0.5) / 2)
    # 64.9 − 66.5 on the residual net; on the plain net SGD's learning rate is its own
    assert it["found"][swapped_in]["mean"] == pytest.approx((-1.6 - 0.5) / 2)
    assert it["found"]["equilibrium-filter"]["worst"] == pytest.approx(-0.5)


def cells(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def test_tables_of_the_questions() -> None:
    large = dataclasses.replace(RESIDUAL, batch_size=1024)
    rows = [*ROWS, *chosen(large, "sgd", {0.3: 50.0}), *final(large, "sgd", 0.3, [55.0, 57.0])]
    for model, best in (("resnet-20-w8", 0.1), ("resnet-20-w4", 0.3), ("resnet-20-w16", 0.03)):
        task = dataclasses.replace(RESIDUAL, model=model, epochs=5)
        rows += chosen(task, "adamw", {lr: 70 - 20 * math.log10(lr / best) ** 2 for lr in (0.03, 0.1, 0.3)})
    made = {str(table.title): cells(table) for table in tables(rows, summarize.summarize(rows))}
    task = label(dataclasses.asdict(RESIDUAL))
    assert made["swapped in"] == [(task, "equilibrium-filter", "0.1", "-0.1 [-1.0, +0.8]", "-0.2")]
    (by_steps,) = made["lr ∝ 1/steps against the lr chosen on a third of them"]
    assert by_steps == (task, "equilibrium-filter at lr ∝ 1/steps", "-3.7 [-5.4, -2.0]")
    (squared,) = made["another end of the schedule against the plain cosine"]
    assert squared == (task, "equilibrium-filter+cosine²", "+1.0 [+0.9, +1.2]")
    assert made["a linear warm-up against none"] == [(task, "sgd+linear", "+1.5 [+0.3, +2.7]")]
    assert "on text against a peer" not in made
    (of_net,) = made["one learning rate for all nets"]
    assert (of_net[0], of_net[-2], of_net[-1]) == ("adamw", "×10", "5.5")
    assert made["batch sizes at equal epochs"] == [("sgd", "65.0 [62.5, 67.5]", "56.0 [43.3, 68.7]")]


def test_figures_have_a_panel_for_each_task_with_results() -> None:
    drawn = draw(ROWS, summarize.summarize(ROWS))
    assert {stem: len(figure.axes) for stem, figure in drawn.items()} == {
        "evidence-curves": 1,
        "evidence-lrs": 1,
    }
    assert len(drawn["evidence-curves"].axes[0].lines) == 5  # not another end of the schedule
    assert len(drawn["evidence-lrs"].axes[0].lines) == 3
    assert draw([], summarize.summarize([])) == {}


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
    assert "tuned     5            12" in listed.output
    fresh = CliRunner().invoke(app, [*arguments, "--fresh"], env={"COLUMNS": "200"})
    assert "tuned     0            15" in fresh.output
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
    assert "68.6 [66.8, 70.4]" in result.output
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
