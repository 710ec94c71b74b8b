"""The code of the documentation runs, and does what the text beside it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elropt import diagnosis
from elropt.run_history import read_run
from tests.docs_code import ROOT, run_page

Run = Callable[[str], dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a page in an empty folder, whose modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    return lambda page: run_page(page, tmp_path)


def test_index(run: Run) -> None:
    names = run("docs/index.md")
    answers = names["elropt"].explain_scale_invariance(names["model"], names["inputs"])
    assert answers["3.weight"].reason == "only jointly with '3.bias'"
    names["adamw"].step()
    turned = names["elropt"].layer_stats(names["adamw"])
    assert turned.rows


def test_start(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    report = run("docs/start.md")["printed"][0]
    assert round(float(re.findall(r"ELR spread .*?([\d.]+) ", report)[0])) == 36
    assert round(float(re.findall(r"balance: .*?([\d.]+) ", report)[0]), 2) == 0.13
    assert "elr_spread" in capsys.readouterr().out
    history = read_run("runs/elr.jsonl")
    assert np.allclose(history.elr_spread[history.steps <= 20], 1, atol=1e-3)  # one line while "warmup" acts
    assert np.ptp(history.applied_lr[-1]) == 0  # then plain SGD
    assert history.elr_spread[-1] < 3
    assert Path("elr.png").stat().st_size > 0
    assert "<html" in Path("runs/elr.html").read_text(encoding="utf-8")


def test_rules(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/guide/rules.md")
    assert float(capsys.readouterr().out.strip("[]\n ")) == pytest.approx(0.01, rel=1e-4)


def test_groups(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("docs/guide/groups.md")
    out = capsys.readouterr().out
    assert "scale_invariant 0.0005 ['0.weight']" in out
    assert "3.weight: only jointly with '3.bias'" in out
    assert "'sum.weight': None, 'branch.weight': 'tensor'" in out
    assert list(names["factors"]) == ["0.weight"]


def test_a_second_optimizer_takes_what_the_first_wrote_into_the_groups(run: Run) -> None:
    """What docs/guide/groups.md warns of, and what it says of weight decay."""
    names = run("docs/guide/groups.md")
    elropt = names["elropt"]
    groups = elropt.param_groups(names["model"], names["images"])
    first = elropt.ELRSGD(groups, lr=0.1, weight_decay=5e-4)
    assert [group["weight_decay"] for group in first.param_groups] == [5e-4, 5e-4, 0]
    second = elropt.ELRSGD(groups, lr=0.2, rule="uniform")
    assert [(group["lr"], group["rule"]) for group in second.param_groups] == 3 * [(0.1, "warmup")]


def test_learning_rates(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    names = run("docs/guide/learning-rates.md")
    equilibrium, critical, adamw_settles, muon_settles, muon, adamw = re.findall(
        r"\d\.\d+", capsys.readouterr().out
    )
    assert float(equilibrium) == pytest.approx(0.00725, abs=5e-6)
    assert float(critical) == pytest.approx((4.58 * 0.128) ** -0.5)
    assert [f"{float(angle):.2g}" for angle in (adamw_settles, muon_settles)] == ["0.0018", "0.0035"]
    assert 0.014 < float(muon) < 0.017  # of lr 0.01
    assert float(adamw) == pytest.approx(1e-3 * (3 * 512) ** 0.5, rel=0.02)
    optimizer = names["optimizer"]  # after half of a cosine
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    names["model"](names["inputs"]).square().mean().backward()
    optimizer.step()
    assert names["elropt"].effective_lrs(optimizer)["0.weight"] == pytest.approx(0.0015, rel=1e-3)


@pytest.mark.parametrize(("m", "n"), [(64, 32), (128, 1024)])
def test_how_far_other_optimizers_turn_a_layer(m: int, n: int) -> None:
    """The table of docs/guide/learning-rates.md."""
    torch.manual_seed(0)
    start = torch.nn.Linear(n, m, bias=False).weight.detach()
    gradient = torch.randn(m, n)
    for make, expected, accuracy in (
        (lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0), 0.015, 0.1),
        (
            lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
            0.003 * n**0.5,
            0.1,
        ),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0), 1e-3 * (3 * n) ** 0.5, 0.02),
    ):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        make([weight]).step()
        turned = float((weight.detach() - start).norm() / start.norm())
        assert turned == pytest.approx(expected, rel=accuracy)


def test_report(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/guide/report.md")
    out = capsys.readouterr().out
    assert "warning idle_decay (0, 195)" in out
    assert re.search(r"by 0\.02 % in all 200 steps", out)


def test_watching(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("docs/guide/watching.md")
    assert re.search(r"step 0: 0\.weight turned by 0\.\d+ rad", capsys.readouterr().out)
    assert Path("adamw.png").stat().st_size > 0


def test_what_recording_costs() -> None:
    """The figures of docs/guide/watching.md."""
    path = ROOT / "benchmarks" / "results" / "recording-cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    cost = {row["optimizer"]: row["cost"] for row in rows if row["cost"]}
    text = " ".join((ROOT / "docs" / "guide" / "watching.md").read_text(encoding="utf-8").split())
    sgd, adamw = (f"{cost[name]['every=1']:.0%}".replace("%", " %") for name in ("sgd", "adamw"))
    assert f"took {sgd} longer than a training step of SGD without it (AdamW: {adamw})" in text
    assert [f"{of_optimizer['every=100']:.0%}" for of_optimizer in cost.values()] == ["1%", "1%"]


def test_code_fits_the_page() -> None:
    """On the site a line has room for about 84 characters."""
    for path in (ROOT / "docs").rglob("*.md"):
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S):
            assert [line for line in block.splitlines() if len(line) > 84] == [], path


def test_what_a_report_sees_is_explained() -> None:
    """docs/guide/watching.md has every title, and the thresholds."""
    text = (ROOT / "docs" / "guide" / "watching.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|`]+) \| (.+) \|$", text.split("| it says |")[1].split("##")[0], flags=re.M)
    explained = {title: row[1] for row in rows for title in row[0].split(", ")}
    assert set(diagnosis.TITLES.values()) <= set(explained)
    for kind, threshold in (
        ("large_angle", f"more than {diagnosis.LARGE_ANGLE:g} rad"),
        ("update_spike", f"{diagnosis.SPIKE:g} times as far"),
        ("small_angle", f"less than {diagnosis.SMALL_PATH:g} rad"),
        ("uneven_angles", f"a factor of {diagnosis.UNEVEN:g}"),
        ("norm_growth", f"a factor of {diagnosis.GROWTH:g}"),
        ("idle_decay", f"less than {100 * diagnosis.IDLE_DECAY:g} %"),
    ):
        assert threshold in explained[diagnosis.TITLES[kind]]


def test_checkpoints(run: Run) -> None:
    names = run("docs/guide/checkpoints.md")
    assert names["optimizer"].state_dict()["state"]


def test_width_scaling(run: Run) -> None:
    """Exponents of the row "angle" of the page: 0 for the input layer, −1/2 for hidden ones; twice the width."""
    names = run("docs/guide/width-scaling.md")
    lrs = {group["name"]: group["lr"] for group in names["optimizer"].param_groups}
    assert lrs["input"] == pytest.approx(0.01)
    assert lrs["hidden"] == pytest.approx(0.01 / 2**0.5)


def summary_of(name: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["summary"]


def test_the_angles_of_the_first_page() -> None:
    """Its figures on how large a step should be, and on what transfers, are those of the studies."""
    axes = summary_of("radians-small")["axes"]
    best = {depth: task["angle"]["lr"] for depth, task in axes["depth"].items()}
    assert [f"{best[depth]:.1g}" for depth in ("6", "12", "48")] == ["0.03", "0.03", "0.005"]
    assert 6 < best["6"] / best["48"] < 7
    by_norm = {norm: task["angle"]["lr"] for norm, task in axes["normalization"].items()}
    assert by_norm["bn-mlp"] / by_norm["ln-mlp"] == pytest.approx(10, abs=0.5)

    settings = summary_of("widths-small")["settings"]
    angle = settings['"angle", CE, bn-mlp-3']["widths"]
    assert angle["64"]["best"]["lr"] / angle["1024"]["best"]["lr"] == pytest.approx(25, abs=0.5)
    lost = {
        name: -round(setting["transfer"]["1024"]["difference"][0], 1)
        for name, setting in settings.items()
        if setting["transfer"]
    }
    assert lost.pop("Adam, MSE, scaled") == 3.1
    assert max(value for name, value in lost.items() if "scaled" in name) == 0.9
    unscaled = [value for name, value in lost.items() if "scaled" not in name]
    assert (min(unscaled), max(unscaled)) == (3.5, 11.3)


def test_the_optimizers_of_the_first_page() -> None:
    """What it says of exact angles, and of Muon."""
    tasks = [task["methods"] for task in summary_of("control-small").values()]
    assert len(tasks) == 4
    exact = ("angle-update", "adamh", "muonh")
    best = [(name, methods[name]["best_lr"]) for methods in tasks for name in exact if name in methods]
    assert [pair for pair in best if pair[1] not in (0.01, 0.03)] == [("muonh", 0.1)]
    gain = [
        {
            name: method["better_than_best_sgd"]["mean"]
            for name, method in methods.items()
            if "sgd" not in name
        }
        for methods in tasks
    ]
    assert all(of_task["muonh"] > of_task["muon"] for of_task in gain)
    others = ("adamw", "muon", "adamh")
    ours = [max(g for name, g in of_task.items() if not name.startswith(others)) for of_task in gain]
    assert sum(of_task["muon"] > best for of_task, best in zip(gain, ours, strict=True)) == 3

    residual = next(
        task["methods"] for name, task in summary_of("control-small").items() if "resnet-20" in name
    )
    by_filter, muon = residual["equilibrium-filter"], residual["muon"]
    assert round(by_filter["better_than_best_sgd"]["mean"], 1) == 7.3
    assert round(muon["test"]["mean"] - by_filter["test"]["mean"], 1) == 1.8
    mlp = next(iter(summary_of("accuracy-digits").values()))
    assert round(mlp["warmup"]["against_best_sgd"]["mean"], 1) == 5.6
    assert abs(mlp["warmup"]["test_accuracy"]["mean"] - mlp["muon"]["test_accuracy"]["mean"]) < 0.5
    warm_up = {
        (i, name): of_task[f"{name}+linear"] - of_task[name]
        for i, of_task in enumerate(gain)
        for name in ("adamw", "muon")
        if f"{name}+linear" in of_task
    }
    gpt = next(i for i, name in enumerate(summary_of("control-small")) if "olmo-4" in name)
    assert [key for key, gained in warm_up.items() if gained > 0] == [(gpt, "adamw")]


ELSEWHERE = {
    "docs/guide/distributed.md": "tests/distributed/test_training.py",
    "docs/guide/control.md": "tests/test_control.py",
    "docs/guide/frameworks.md": "tests/frameworks",
}


def test_every_page_with_code_is_run() -> None:
    """By a test here, or by one that is named above."""
    here = (ROOT / "tests" / "test_docs_code.py").read_text(encoding="utf-8")
    for path in (*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guide").glob("*.md")):
        page = path.relative_to(ROOT).as_posix()
        if "```python" in path.read_text(encoding="utf-8"):
            assert f'run("{page}")' in here or (ROOT / ELSEWHERE.get(page, page + "?")).exists(), page
