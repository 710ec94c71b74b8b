"""The figures of README.md and docs/, drawn from the committed result files.

    python -m benchmarks.figures                    # all of them, into docs/img
    python -m benchmarks.figures warmup radians

To add a figure, add an entry to `FIGURES`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from PIL import Image
from rich.console import Console

from benchmarks.accuracy import ACCURACY
from benchmarks.common.command_line import one_of, progress_bar
from benchmarks.common.figures import save_all
from benchmarks.common.statistics import grouped
from benchmarks.distributed import all_reduce
from benchmarks.studies import STUDIES
from benchmarks.studies.study import Study
from elropt import plots

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Source(NamedTuple):
    """Where a figure comes from.

    Attributes:
        results: its result files in `RESULTS`, without .json.
        draw: draws PNG files into a folder; it gets the content of the result files.
        drawn: which of these files it is, without .png.
        width: of the image in pixels, at the most; a wider one is shrunk.
    """

    results: tuple[str, ...]
    draw: Callable[[list[Any], Path], object]
    drawn: str
    width: int = 1800


def of_study(study: Study, result: str, drawn: str, width: int = 1800) -> Source:
    """A plot of a study."""

    def draw(reports: list[Any], folder: Path) -> object:
        (report,) = reports
        return save_all(study.draw(report["rows"], study.summarize(report["rows"])), folder)

    return Source((result,), draw, drawn, width)


def draw_all_reduce(reports: list[Any], folder: Path) -> None:
    """Its only plot."""
    (report,) = reports
    plots.save(all_reduce.draw(report), folder / "all-reduce.png")


FIGURES = {  # by the name of the image, without .png
    "digits-bn-mlp-30-layers": of_study(ACCURACY, "accuracy-digits", "bn-mlp-30-layers"),
    **{
        drawn: of_study(STUDIES[study], f"{study}-small", drawn, width)
        for study, drawn, width in (
            ("warmup", "warmup", 1800),
            ("spread", "spread-accuracy", 1800),
            ("dynamics", "dynamics-one-step", 1800),
            ("dynamics", "dynamics-spread", 1800),
            ("radians", "radians", 1800),
            ("regimes", "regimes", 1800),
            ("regimes", "regimes-traces", 1800),
            ("regimes", "regimes-step-down", 1800),
            ("widths", "widths-lrs", 1600),
            ("widths", "widths-transfer", 1600),
            ("widths", "widths-elr", 1600),
            ("linearization", "linearization", 1800),
            ("linearization", "linearization-layers", 1800),
        )
    },
    **{
        drawn: of_study(STUDIES["evidence"], "evidence-medium", drawn)
        for drawn in ("evidence-curves", "evidence-lrs")
    },
    "all-reduce": Source(("all-reduce-gloo-cpu",), draw_all_reduce, "all-reduce"),
}


def redraw(names: list[str], out: Path, advance: Callable[[], object] = lambda: None) -> None:
    """Draw figures into a folder; `advance` is called after each."""
    out.mkdir(parents=True, exist_ok=True)
    for results, of_results in grouped(names, lambda name: FIGURES[name].results).items():
        reports = [json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8")) for result in results]
        with tempfile.TemporaryDirectory() as folder:
            FIGURES[of_results[0]].draw(reports, Path(folder))
            for name in of_results:
                source = FIGURES[name]
                shrink(Path(folder, f"{source.drawn}.png"), out / f"{name}.png", source.width)
                advance()


def shrink(drawn: Path, image_file: Path, width: int) -> None:
    """Copy an image, at most `width` pixels wide and with 256 colours: a third of the bytes."""
    with Image.open(drawn) as image:
        height = round(image.height * width / image.width)
        small = image.convert("RGB")
        if width < image.width:
            small = small.resize((width, height), Image.Resampling.LANCZOS)
        small.quantize(256).save(image_file, optimize=True)


def main(
    name: Annotated[
        list[str] | None,
        typer.Argument(callback=one_of(FIGURES), help=f"Of {', '.join(FIGURES)}. Default: all."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = ROOT / "docs" / "img",
) -> None:
    """Draw the figures of README.md and docs/ from benchmarks/results.

    Example: python -m benchmarks.figures warmup radians --out runs/figures
    """
    names, console = name or list(FIGURES), Console()
    with progress_bar(console) as progress:
        task = progress.add_task("drawing", total=len(names))
        redraw(names, out, lambda: progress.advance(task))
    console.print(f"wrote {', '.join(f'{name}.png' for name in names)} to {out}")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
