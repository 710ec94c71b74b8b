"""Tables and numbers of README.md and docs/ are those of the result files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import results_pages
from benchmarks.common.command_line import table_of
from benchmarks.results_pages import RESULTS, ROOT, claims, fill, markdown, outdated, seeds

pytestmark = pytest.mark.xdist_group("results_pages")  # a file is read and concluded from once
PAGE = ROOT / "docs" / "results" / "page.md"


def test_every_page_is_up_to_date() -> None:
    found = [str(page.relative_to(ROOT)) for page in outdated()]
    assert found == [], "run python -m benchmarks.results_pages"


def test_a_number_that_was_changed_by_hand_is_found() -> None:
    page = ROOT / "docs" / "results" / "warmup.md"
    text = page.read_text(encoding="utf-8")
    changed = re.sub(r"(\| warmup \| 0\.1 \| 80)\.3", r"\1.4", text)
    assert changed != text
    assert fill(changed, page) == text


def test_a_value_is_that_of_the_rows() -> None:
    rows = json.loads((RESULTS / "warmup-small.json").read_text(encoding="utf-8"))["rows"]
    accuracies = [
        row["accuracy"]
        for row in rows
        if row["spec"]["part"] == "test"
        and row["spec"]["task"]["model"] == "plain-56-w8"
        and row["spec"]["method"]["name"] == "warmup"
    ]
    assert len(accuracies) == 3
    marker = "<!-- value: warmup-small | plain-56* / warmup / test_accuracy / mean | .2f -->"
    filled = fill(f"It is {marker}?<!-- end --> %.", PAGE)
    assert filled == f"It is {marker}{100 * sum(accuracies) / 3:.2f}<!-- end --> %."


def test_a_table_says_where_it_is_from() -> None:
    filled = fill("<!-- table: step-time-h200 | resnet-50:* | graph & of copy -->\nold\n<!-- end -->", PAGE)
    assert "old" not in filled
    assert "\n| optimizer | graph | of copy |\n|---|---:|---:|\n" in filled
    assert "[step-time-h200.json](../../benchmarks/results/step-time-h200.json): n = " in filled
    assert re.search(r"torch 2\.11\S+, triton 3\.6\.0, Python 3\.12\.3; 2026-11-28</small>\n", filled)
    of_study = fill("<!-- table: control-small | resnet-20*: accuracy* -->\n<!-- end -->", ROOT / "README.md")
    assert "[control-small.json](benchmarks/results/control-small.json): size small; " in of_study
    assert "seeds: 1 to choose the learning rate, 2 fresh; 2 cores, AMD EPYC, no GPU;" in of_study


def test_seeds_are_counted_by_method() -> None:
    def row(method: str, seed: int, part: str) -> dict[str, Any]:
        return {"spec": {"method": {"name": method}, "seed": seed, "part": part}}

    chosen = [row(method, 0, "val") for method in ("sgd", "muon") for _ in range(3)]  # learning rates
    tests = [row("sgd", 100, "test"), row("sgd", 101, "test"), row("muon", 100, "test")]
    assert seeds({"rows": [*chosen, *tests]}, []) == "seeds: 1 to choose the learning rate, 1 to 2 fresh"
    assert seeds({"rows": [*chosen, *tests[:2]]}, []) == "seeds: 1 to choose the learning rate, 2 fresh"


def test_markdown_of_a_table() -> None:
    table = table_of(
        "a|b", "method", "x", "y", rows=[("sgd", "0.3*", "-1.5 [-2.0, 3e-05], 1.6e+03"), ("< 1", "–", "")]
    )
    assert markdown(table) == (
        "**a\\|b**\n\n| method | x | y |\n|---|---:|---:|\n"
        "| sgd | 0.3\\* | −1.5 [−2.0, 3·10⁻⁵], 1600 |\n| \\< 1 | – |  |"
    )
    assert markdown(table, "y").splitlines()[2] == "| method | y |"
    assert "\n|---|---|\n" in markdown(table_of("", "question", "answer", rows=[("a", 80 * "b")]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nope -->\n<!-- end -->", "there is no nope.json"),
        (
            "<!-- table: warmup-small | nope* -->\n<!-- end -->",
            r"'nope\*'; there are\n  bn-mlp-30-w64, digits",
        ),
        (
            "<!-- table: warmup-small | *epochs | nope -->\n<!-- end -->",
            "nope is none of the columns method &",
        ),
        (
            "a <!-- value: warmup-small | nope / sgd -->1<!-- end -->",
            "'nope' of .* fits 0 of bn-mlp-30-w64, dig",
        ),
        ("<!-- value: warmup-small | x -->1<!-- end --> %", "must not begin a line"),
        ("- <!-- value: warmup-small | x -->1<!-- end --> %", "must not begin a line"),
        ("<!-- table: warmup-small -->\n| a |", "1 markers and 0 ends"),
        ("<!-- claims: nope -->\n<!-- end -->", "no page of docs/results is called nope"),
    ],
)
def test_a_wrong_marker_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(text, PAGE)


def test_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_pages, "ROOT", tmp_path)
    folder = tmp_path / "docs" / "results"
    folder.mkdir(parents=True)
    head = "\n\n| claim | verdict |\n|---|---|\n"
    (folder / "a.md").write_text(
        f"# First?{head}| It helps | holds |\n\n## More\n\n| x | y |\n|---|---|\n| 1 | 2 |\n"
    )
    (folder / "b.md").write_text(
        f"# Second{head}| It is fast | **does not hold** |\n| At size | not measured |\n"
    )
    rows = [
        "| It is fast | **does not hold** | [b](b.md) |",
        "| At size | **not measured** | [b](b.md) |",
        "| It helps | **holds** | [a](a.md) |",
    ]
    assert claims(["b"]).splitlines()[2:] == rows
    (folder / "b.md").write_text(f"# Second{head}| It is fast | perhaps |\n")
    with pytest.raises(ValueError, match=r"b\.md needs a table of claims, each .*; it has perhaps"):
        claims([])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_pages, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("It takes <!-- value: host-h200 | config / rounds --><!-- end --> rounds.")
    app = typer.Typer()
    app.command()(results_pages.main)
    stale = CliRunner().invoke(app, ["--check"])
    assert (stale.exit_code, "not up to date: README.md" in stale.output) == (1, True)
    assert CliRunner().invoke(app, []).exit_code == 0
    assert page.read_text() == "It takes <!-- value: host-h200 | config / rounds -->60<!-- end --> rounds."
    assert CliRunner().invoke(app, ["--check"]).output == "all pages are up to date\n"


def test_sentences_about_the_swapped_in_rule_have_the_numbers_of_the_study() -> None:
    """Points of "equilibrium" by filter at SGD's learning rate, on the residual net after 5, 15 and 40 epochs."""
    found = json.loads((RESULTS / "evidence-medium.json").read_text(encoding="utf-8"))["summary"]
    tasks = [f"resnet-20-w8, cifar10 16×16, batch 128, {epochs} epochs" for epochs in (5, 15, 40)]
    name = "equilibrium-filter at SGD's lr"
    to_best = [found["tasks"][task][name]["better_than_best_sgd"]["mean"] for task in tasks]
    untuned = found["questions"]["untuned"]["found"]
    to_plain = [untuned[task]["equilibrium-filter"]["better"]["mean"] for task in tasks[:2]]
    a, b, c, d, e = (f"{points:.1f}" for points in (*to_plain, *to_best))
    ahead = f"{a} points ahead of SGD after 5 epochs and {b} after 15; ahead of SGD with a warm-up"
    for page, sentence in {
        "docs/index.md": f"{ahead} by {c} and {d}, and by {e} after 40",
        "docs/guide/rules.md": f"{ahead} {c} and {d}",
        "docs/results/index.md": f"it was {b} points ahead of SGD on the residual net. "
        f"Ahead of SGD with a warm-up it was by {d}, and by {e} after 40 epochs",
    }.items():
        assert sentence in " ".join((ROOT / page).read_text(encoding="utf-8").split()), page


def test_sentences_of_the_page_of_evidence_have_the_numbers_of_the_study() -> None:
    """Where a verdict can change with a row: usable ranges, the rule to recommend, large batches."""
    found = json.loads((RESULTS / "evidence-medium.json").read_text(encoding="utf-8"))["summary"]
    questions = {name: it["found"] for name, it in found["questions"].items()}
    residual, plain = (
        questions["range"][f"{net}-20-w8, cifar10 16×16, batch 128, 15 epochs"] for net in ("resnet", "plain")
    )
    ranges = [
        f"{width:.2g}"
        for width in (
            *(residual["widths"][name] for name in ("equilibrium-gradient", "equilibrium-filter")),
            residual["sgd"],
            plain["widths"]["equilibrium-filter"],
            plain["sgd"],
        )
    ]
    rules = questions["default"]
    means = [
        f"{-rules[name][key]:.1f}"
        for name in ("equilibrium-filter at SGD's lr", "equilibrium-filter", "warmup")
        for key in ("mean", "worst")
    ]
    of_batch = {
        size: found["tasks"][f"resnet-20-w8, cifar10 16×16, batch {size}, 15 epochs"] for size in (1024, 4096)
    }
    at_1024, ahead = (
        of_batch[1024]["equilibrium-filter"]["test"]["mean"],
        [of_batch[size]["equilibrium-filter"]["better_than_best_sgd"]["mean"] for size in of_batch],
    )
    page = " ".join((ROOT / "docs/results/evidence.md").read_text(encoding="utf-8").split())
    a, b, c, d, e = ranges
    f, g, h, i, j, k = means
    for sentence in (
        f"a range of {a} (by gradient) and {b} (by filter), for SGD {c} with a warm-up",
        f"On plain-20 {d} by filter, against {e};",
        f"at SGD's learning rate is {f} points behind (worst {g}), at its own {h} (worst {i}), "
        f'"warmup" {j} (worst {k})',
        f'At 1,024 "equilibrium-filter" has {at_1024:.1f} %',
        f'"equilibrium-filter" is {ahead[0]:.1f} points (±6.7) ahead of SGD there',
        f'There "equilibrium-filter" and Muon are {ahead[1]:.1f} and ',
    ):
        assert sentence in page, sentence
