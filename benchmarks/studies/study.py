"""What a study is, and how one is run: rows by a resumable sweep, then a summary, tables and plots from the rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console, RenderableType

from benchmarks.common.figures import save_all
from benchmarks.common.sweep import Row, missing_specs, read_rows, row_key, spec_key, sweep, without_nan
from elropt import env_report

SIZES = ("tiny", "small", "full")
ROWS = ".rows.jsonl"  # the end of the name of a file with rows
RESULTS = Path(__file__).resolve().parents[1] / "results"

# The specs to measure next, given the rows so far; or a function that gives them anew after every run, see `sweep`.
Stage = Callable[[list[Row]], Sequence[Any] | Callable[[Sequence[Row]], Sequence[Any]]]


class Study(NamedTuple):
    """A question and how it is answered.

    work: measures one spec, in a process of its own.
    stages: (size, device) → the stages; a later one can depend on what an earlier one has chosen.
    summarize: rows → what is concluded, as plain values for JSON.
    tables: (rows, summary) → what to print.
    draw: (rows, summary) → the figures, by the names of their files without .png.
    kept: what of a row the result file keeps; enough for the other functions.
    sizes: that it can be run at; the second is the default.
    left: (size, device, rows) → a table of what is left to run; None: a list of the runs.
    """

    name: str
    question: str
    work: Callable[[Any], Row]
    stages: Callable[[str, str], Sequence[Stage]]
    summarize: Callable[[list[Row]], dict[str, Any]]
    tables: Callable[[list[Row], dict[str, Any]], Sequence[RenderableType]]
    draw: Callable[[list[Row], dict[str, Any]], Mapping[str, Figure]]
    describe: Callable[[Any], str] = str
    kept: Callable[[Row], Row] = dict
    sizes: tuple[str, ...] = SIZES
    left: Callable[[str, str, Sequence[Row]], RenderableType] | None = None


def run(
    study: Study, stages: Sequence[Stage], stem: str, out: Path, *, jobs: int, console: Console, **about: Any
) -> Path:
    """Measure, write `out/STEM.json` with `about` in it, print and draw; returns that file.

    Rows are kept in `out/STEM.rows.jsonl`: the same command goes on where it was stopped.
    """
    started = time.perf_counter()
    rows: list[Row] = []
    for stage in stages:
        specs, rows_file = stage(rows), out / f"{stem}{ROWS}"
        rows += sweep(specs, study.work, rows_file, jobs=jobs, console=console, describe=study.describe)
    seconds = round(time.perf_counter() - started, 1)
    result = result_of(study, rows, **about, jobs=jobs, command_seconds=seconds)
    if len(result["commits"]) > 1:
        console.print(
            f"rows are from {len(result['commits'])} states of the code, {', '.join(result['commits'])}: "
            "--fresh measures all of them again"
        )
    result_file = out / f"{stem}.json"
    result_file.write_text(dumps(result), encoding="utf-8")
    report(study, result, out, console)
    console.print(f"{len(rows)} runs; wrote {result_file}")
    return result_file


def result_of(study: Study, rows: Sequence[Row], **about: Any) -> dict[str, Any]:
    """The content of a result file, with `about` in it; the hardware and versions are those of this machine."""
    return {
        "study": study.name,
        "question": study.question,
        **about,
        "env": env_report.collect(),
        "commits": sorted({str(row["commit"]) for row in rows}),
        "summary": study.summarize(list(rows)),
        "rows": [study.kept(row) for row in rows],
    }


def known_rows(stem: str, out: Path) -> dict[str, Row]:
    """The rows of `STEM` by their spec: those of a committed result that is not finished, and those in `out`."""
    committed = RESULTS / f"{stem}.json"
    result = json.loads(committed.read_text(encoding="utf-8")) if committed.is_file() else {}
    rows = result["rows"] if result.get("unfinished") else []
    return {row_key(row): row for row in rows} | read_rows(out / f"{stem}{ROWS}", mend=False)


def take_over(stem: str, out: Path) -> int:
    """Adds the committed rows that `out` does not have to its rows file; how many they were."""
    rows_file = out / f"{stem}{ROWS}"
    have = read_rows(rows_file)
    new = [row for key, row in known_rows(stem, out).items() if key not in have]
    if new:
        out.mkdir(parents=True, exist_ok=True)
        with rows_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
    return len(new)


def left(stages: Sequence[Stage], known: Mapping[str, Row]) -> list[Any]:
    """The specs without a row, of the first stage that has some; later stages depend on their rows."""
    rows: list[Row] = []
    for stage in stages:
        specs = stage(rows)
        given = specs if callable(specs) else lambda _, specs=specs: specs
        if missing := missing_specs(given, known):
            return missing
        rows += [known[spec_key(spec)] for spec in given(list(known.values()))]
    return []


def report(study: Study, result: dict[str, Any], out: Path, console: Console) -> list[Path]:
    """Print the tables of a result and draw its plots; the summary is made again from the rows."""
    summary = study.summarize(result["rows"])
    for table in study.tables(result["rows"], summary):
        console.print(table)
    written = save_all(study.draw(result["rows"], summary), out)
    console.print(f"drew {', '.join(map(str, written))}")
    return written


def dumps(result: dict[str, Any]) -> str:
    """JSON without NaN, one row a line."""
    head = {key: value for key, value in result.items() if key != "rows"}
    rows = ",\n".join(json.dumps(without_nan(row), allow_nan=False) for row in result["rows"])
    return json.dumps(without_nan(head), allow_nan=False, indent=1)[:-2] + f',\n "rows": [\n{rows}\n]}}\n'


def make_console() -> Console:
    """A console wide enough for the tables where nobody looks at it, as in a log file."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
