"""The proof of the report's findings: what it plants, how it judges, and that its result file says what follows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.common import data
from benchmarks.findings_proof import (
    CHOSEN_ON,
    FALSE_ALARMS_AT_MOST,
    FAULTS,
    NAMED_AT_LEAST,
    Case,
    cases,
    judge,
    summary,
    train,
)
from benchmarks.results_pages import RESULTS
from elropt.diagnosis import Finding, Kind, Severity, diagnose
from elropt.run_history import read_run

CASE = Case("bn-mlp-12-w40", "sgd", 200, 0.1, 1e-3, steps=120, every=5)
NOTHING = {"layer": None, "step": None, "handed_over": None}


def finding(
    kind: Kind,
    severity: Severity = "warning",
    layers: tuple[str, ...] = (),
    steps: tuple[int, int] = (0, 0),
) -> Finding:
    return Finding(kind, steps, layers, "", "", severity)


def test_the_proof_is_on_other_nets_and_seeds_and_has_each_fault() -> None:
    runs = cases(200)
    assert len(runs) == 60
    assert not {case.net for case in runs} & set(CHOSEN_ON)
    assert sorted(case.seed for case in runs) == list(range(200, 260))
    kinds = [FAULTS[case.fault].kind for case in runs if case.fault]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("large_angle", "small_angle", "update_spike", "norm_growth", "idle_decay", "uneven_angles"), 6
    )
    assert len({case.optimizer for case in runs if case.fault is None}) == 10


def test_a_fault_is_named_by_its_kind_layer_and_step() -> None:
    layer = dataclasses.replace(CASE, fault="slow layer")
    known = {**NOTHING, "layer": "b"}
    assert judge(layer, known, [finding("uneven_angles", layers=("b", "a"))])["named"] is True
    assert judge(layer, known, [finding("uneven_angles", layers=("a",))])["named"] is False
    assert judge(layer, known, [finding("uneven_angles", "note", layers=("b",))])["named"] is False
    assert judge(layer, known, [finding("small_angle", layers=("b",))])["named"] is False

    step = dataclasses.replace(CASE, fault="bad batch")
    known = {**NOTHING, "step": 60}
    assert judge(step, known, [finding("update_spike", steps=(60, 70))])["named"] is True
    assert judge(step, known, [finding("update_spike", steps=(65, 70))])["named"] is False
    assert judge(CASE, NOTHING, [])["named"] is None


def test_what_neither_was_planted_nor_follows_is_a_false_alarm() -> None:
    said = [finding("update_spike"), finding("norm_growth"), finding("idle_decay", "note")]
    assert judge(CASE, NOTHING, said)["false_alarms"] == ["norm_growth", "update_spike"]
    planted = dataclasses.replace(CASE, fault="bad batch")  # a spike may lengthen weights
    assert judge(planted, {**NOTHING, "step": 0}, said)["false_alarms"] == []


def test_notes_are_checked() -> None:
    settles = dataclasses.replace(CASE, settles=True)
    assert judge(settles, NOTHING, [finding("in_equilibrium", "note")])["settled_right"] is True
    assert judge(settles, NOTHING, [finding("transient", "note")])["settled_right"] is False
    known = {**NOTHING, "handed_over": 12}  # the first plain step is 13, the first recorded one after it 15
    for step, right in ((15, True), (20, False)):
        assert judge(CASE, known, [finding("rule", steps=(0, step))])["handed_over_right"] is right


@pytest.mark.parametrize("fault", ["layer with tiny lr", "bad batch"])
def test_a_run_from_the_fault_to_its_name(tmp_path: Path, fault: str) -> None:
    case = dataclasses.replace(CASE, fault=fault)
    known = train(case, data.load("digits"), tmp_path / "run.jsonl")
    judged = judge(case, known, diagnose(read_run(tmp_path / "run.jsonl", all_layers=True)))
    assert (judged["named"], judged["false_alarms"]) == (True, [])


def test_the_result_file_says_what_follows_from_its_rows() -> None:
    report = json.loads((RESULTS / "report-findings.json").read_text(encoding="utf-8"))
    rows, counts = report["rows"], report["summary"]
    assert counts == summary(rows)
    assert counts["passed"] == (
        counts["named"] >= NAMED_AT_LEAST * counts["planted"]
        and counts["runs_with_false_alarms"] <= FALSE_ALARMS_AT_MOST * counts["runs"]
    )
    assert (NAMED_AT_LEAST, FALSE_ALARMS_AT_MOST) == (0.8, 0.05)
    assert [Case(**row["case"]) for row in rows] == cases(report["config"]["first_seed"])
    for row in rows:
        said = [
            Finding(**{**said, "steps": tuple(said["steps"]), "layers": tuple(said["layers"])})
            for said in row["findings"]
        ]
        judged = judge(Case(**row["case"]), row, said)
        assert {key: row[key] for key in judged} == judged
