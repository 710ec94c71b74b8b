"""Every image that README.md and docs/ show is drawn again by one command."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from benchmarks import figures
from benchmarks.figures import FIGURES, RESULTS, ROOT

QUICK = ("all-reduce", "linearization")
IMAGES = ROOT / "docs" / "img"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_every_image_that_is_shown_has_an_entry_and_its_results_are_committed() -> None:
    shown = [
        (page, target)
        for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"))
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        if not target.startswith("http")
    ]
    assert {(page.parent / target).resolve() for page, target in shown} == {
        IMAGES / f"{name}.png" for name in FIGURES
    }
    for source in FIGURES.values():
        for result in source.results:
            assert (RESULTS / f"{result}.json").is_file()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FIGURES]
)
def test_a_figure_is_drawn_again_as_it_was(name: str, tmp_path: Path) -> None:
    figures.redraw([name], tmp_path)
    (drawn,) = tmp_path.iterdir()
    now, committed = pixels(drawn), pixels(IMAGES / drawn.name)
    assert now.shape == committed.shape
    # Of 255. Colours are rounded, and other versions of matplotlib may move a line.
    assert np.abs(now - committed).mean() < 3


def test_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(figures.main)
    result = CliRunner().invoke(app, ["all-reduce", "--out", str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["all-reduce.png"]
    refused = CliRunner().invoke(app, ["nope"], env={"COLUMNS": "200"})
    assert refused.exit_code == 2
    assert "'nope' is not known" in refused.output
