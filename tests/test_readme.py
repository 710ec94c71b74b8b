"""README.md: its code runs, its figures are those of the result files, what it names exists, and it is short."""

from __future__ import annotations

import json
import os
import re
import statistics
from pathlib import Path

import pytest
import torch

from tests.docs_code import ROOT, run_page

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


def test_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop trains, and the recorder writes what AdamW does to the layer that is scale-invariant."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run_page("README.md", tmp_path)
    assert float(names["loss"].detach()) < 0.01  # ln 2 at the start
    loss = torch.nn.functional.cross_entropy(names["model"](names["images"]), names["labels"])
    loss.backward()
    names["adamw"].step()
    names["recorder"].close()
    (line,) = (tmp_path / "runs" / "elr.jsonl").read_text(encoding="utf-8").splitlines()
    layers = json.loads(line)["layers"]
    assert [name for name, layer in layers.items() if layer["tracked"]] == ["1.weight"]
    assert layers["1.weight"]["angle"] > 0


def test_the_loop_has_twelve_lines() -> None:
    block = re.findall(r"```python\n(.*?)```", README, flags=re.S)[0]
    assert len([line for line in block.splitlines() if line and not line.startswith("#")]) <= 12


def test_the_swap_is_one_line() -> None:
    block = re.findall(r"```python\n(.*?)```", README, flags=re.S)[0]
    old = re.search(r"^# optimizer = torch\.optim\.SGD\((.*)\)$", block, flags=re.M)
    new = re.search(r"^optimizer = ELRSGD\((.*)\)$", block, flags=re.M)
    assert old is not None
    assert new is not None
    assert old[1] == new[1]


def test_it_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 110] == []
    assert len(README.split()) <= 900


def test_links_and_images_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (?!PYTHON)(\w+)", README, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


METHODS = {
    "SGD": "sgd",
    "SGD + linear warm-up": "sgd+linear",
    "AdamW": "adamw",
    "Muon": "muon",
    'ELRSGD "warmup" (default)': "warmup",
    'ELRSGD "uniform"': "uniform",
    'ELRSGD "angle"': "angle",
    'ELRSGD "sphere"': "sphere",
}


def test_accuracies_are_those_of_the_result_file() -> None:
    result = json.loads((RESULTS / "accuracy-digits.json").read_text(encoding="utf-8"))
    shown = dict(re.findall(r"^\| (.*?) \| (\d.*) \|$", README, flags=re.M))
    for name, method in METHODS.items():
        tests = [result["summary"][task][method]["test_accuracy"] for task in result["summary"]]
        assert {test["n"] for test in tests} == {5}
        assert shown[name] == " | ".join(
            f"{test['mean']:.1f} [{test['low']:.1f}, {test['high']:.1f}]" for test in tests
        )
    env = result["env"]
    for text in (f"torch {env['torch'].split('+')[0]}", env["date"][:10], env["cpu"], "5 fresh seeds"):
        assert text in README


def test_spreads_are_those_of_the_result_file() -> None:
    """Geometric means over the fresh seeds of SGD, two digits."""
    rows = json.loads((RESULTS / "accuracy-digits.json").read_text(encoding="utf-8"))["rows"]
    spreads: dict[str, list[float]] = {}
    for row in rows:
        spec = row["spec"]
        if (spec["method"]["name"], spec["part"]) == ("sgd", "test"):
            spreads.setdefault(spec["task"]["model"], []).append(row["spread"][0])
    means = [float(f"{statistics.geometric_mean(values):.2g}") for values in spreads.values()]
    assert f"| ELR spread of SGD at step 0 | {means[0]:g} | {means[1]:g} |" in README
    assert f"starts {means[0]:g} times as fast" in README


def test_step_time_is_that_of_the_result_file() -> None:
    rows = json.loads((RESULTS / "step-time-h200.json").read_text(encoding="utf-8"))["rows"]
    us = {
        row["optimizer"]: row["graph"]["us"][1]
        for row in rows
        if row["workload"] == "resnet-50" and row["graph"]
    }
    assert f"takes {us['elr-warmup'] / us['torch-fused']:.2f} times" in README


def test_shares_are_those_of_the_result_file() -> None:
    summary = json.loads((RESULTS / "tracked-share.json").read_text(encoding="utf-8"))["summary"]
    families = {
        "conv nets, BN": ["conv nets with BatchNorm"],
        "graph nets, BN": ["graph nets with BatchNorm"],
        "LMs, norms on outputs": ["language models with norms on the outputs of blocks"],
        "LMs, QK-norm": ["language models, pre-norm with QK-norm"],
        "LMs and ViTs, pre-norm": ["language models, pre-norm", "ViTs, pre-norm"],
    }
    shown = []
    for of_column in families.values():
        shares = [round(100 * share) for family in of_column for share in summary[family]["share"]]
        least, largest = min(shares), max(shares)
        shown.append(f"{least} to {largest} %" if least < largest else f"{least} %")
    assert "| " + " | ".join(families) + " |" in README
    assert "| " + " | ".join(shown) + " |" in README
