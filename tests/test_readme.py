"""README.md: its code runs, its figures are those of the result files, what it names exists, and it is short."""

from __future__ import annotations

import json
import os
import re
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.studies.evidence import plan
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


METHODS = {  # of the study of evidence, on the residual net and on the plain ones of 20 and 56 layers
    "SGD": ("sgd", "sgd", "sgd"),
    "SGD + linear warm-up": ("sgd+linear", "sgd+linear", "sgd+linear"),
    "AdamW": ("adamw", "adamw", None),
    "AdamW + linear warm-up": ("adamw+linear", None, None),
    "Muon": ("muon", "muon", "muon"),
    "… at a third of its `lr`": ("muon at lr ∝ 1/steps", "muon at lr ∝ 1/steps", None),
    "Muon behind `elropt.control`": ("muonh", None, None),
    'ELRSGD "warmup" (default)': ("warmup", "warmup", "warmup"),
    'ELRSGD "equilibrium", by filter': ("equilibrium-filter",) * 3,
    # On the plain net of 20 layers SGD's learning rate is its own.
    "… at SGD's `lr`": (
        "equilibrium-filter at SGD's lr",
        "equilibrium-filter",
        "equilibrium-filter at SGD's lr",
    ),
}


def test_accuracies_are_those_of_the_result_files() -> None:
    """Intervals with a pooled scatter are as wide on both sides, those of a bootstrap are not."""
    evidence, digits = (
        json.loads((RESULTS / name).read_text(encoding="utf-8"))
        for name in ("evidence-medium.json", "accuracy-digits.json")
    )
    residual, plain, plain_56 = (
        evidence["summary"]["tasks"][f"{net}-w8, cifar10 16×16, batch 128, {epochs} epochs"]
        for net, epochs in (("resnet-20", 15), ("plain-20", 15), ("plain-56", 10))
    )
    (deep,) = (of_task for task, of_task in digits["summary"].items() if task.startswith("bn-mlp-30"))
    assert plain["sgd"]["lr"] == plain["equilibrium-filter"]["lr"]
    shown = dict(re.findall(r"^\| (.*?) \| (\d.*) \|$", README, flags=re.M))
    for name, methods in METHODS.items():
        cells = []
        for of_task, method in zip((residual, plain, plain_56), methods, strict=True):
            test = of_task[method]["test"] if method else None
            mark = {3: "", 2: "†", 1: "\\*"}[test["n"]] if test else ""
            cells.append(f"{test['mean']:.1f}{mark} ± {test['high'] - test['mean']:.1f}" if test else "–")
        of_digits = deep[methods[0]]["test_accuracy"] if methods[0] in deep else None
        if of_digits:
            assert of_digits["n"] == 5
            cells.append(f"{of_digits['mean']:.1f} [{of_digits['low']:.1f}, {of_digits['high']:.1f}]")
        assert shown[name] == " | ".join(cells if of_digits else [*cells, "–"])
    for of_task in (residual, plain):
        assert of_task["muon at lr ∝ 1/steps"]["lr"] == plan.neighbour(of_task["muon"]["lr"], -1)
    large = evidence["summary"]["tasks"]["resnet-20, cifar10, batch 128, 10 epochs"]
    sgd, ours = (large[name]["test"] for name in ("sgd+linear", "equilibrium-filter at SGD's lr"))
    assert (sgd["n"], ours["n"]) == (2, 2)
    words = f'{sgd["mean"]:.1f} with SGD + warm-up, {ours["mean"]:.1f} with "equilibrium" (2 seeds)'
    assert words in " ".join(README.split())
    for env in (evidence["env"], digits["env"]):
        for text in (f"torch {env['torch'].split('+')[0]}", env["date"][:10], env["cpu"]):
            assert text in README


def test_spread_is_that_of_the_result_file() -> None:
    """Geometric mean over the fresh seeds of SGD on the net of the figure, two digits."""
    rows = json.loads((RESULTS / "accuracy-digits.json").read_text(encoding="utf-8"))["rows"]
    spreads = [
        row["spread"][0]
        for row in rows
        if (row["spec"]["method"]["name"], row["spec"]["part"]) == ("sgd", "test")
        and row["spec"]["task"]["model"] == "bn-mlp-30"
    ]
    assert len(spreads) == 5
    two_digits = float(f"{statistics.geometric_mean(spreads):.2g}")
    assert f"starts {two_digits:g} times as fast" in README


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
