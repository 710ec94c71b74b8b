"""Tables and numbers of README.md and docs/, from the result files.

    python -m benchmarks.results_pages             # fill in all pages
    python -m benchmarks.results_pages --check     # say which pages are not what the result files say

A page holds markers, which GitHub and the site do not show; what stands between a marker and its end is written here:

    <!-- table: control-small | resnet-20*: accuracy* -->
    <!-- end -->
    It reached <!-- value: control-small | resnet-20* / methods / muon / test | .1f --><!-- end --> %.
    <!-- claims: control warmup -->
    <!-- end -->

`table`: a file of benchmarks/results, without .json, and which of its tables (those that the command of its benchmark
prints), by their titles; `*` stands for anything, and without a title all are shown. After another `|`, the columns
that are shown beside the first one, with `&` between them. `value`: a file, the keys that lead to the number in its
summary (or in the file, if it has none; `*` stands for anything, [0] for the first of a list), and its format.
`claims`: the claims at the head of the pages of docs/results; the named pages come first.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import findings_proof, tracked_share
from benchmarks.accuracy import ACCURACY
from benchmarks.common.statistics import Interval, grouped
from benchmarks.distributed import all_reduce
from benchmarks.speed import end_to_end, host, host_time, kernels, recording, step_time
from benchmarks.studies import STUDIES, comparison

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
VERDICTS = ("holds", "holds in part", "does not hold", "not measured")

LONGEST_NUMBER = 60  # characters of a cell, with intervals, that is not a sentence
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Report = dict[str, Any]  # the content of a result file

TABLES: dict[
    str, Callable[[Report], Sequence[Table]]
] = {  # of files that are not of a study, by their "kind"
    "all-reduce": all_reduce.tables,
    "end-to-end": lambda report: [end_to_end.results_table(report["rows"])],
    "host": lambda report: [host.results_table(rows) for rows in by_workload(report).values()],
    "host-time": lambda report: [host_time.results_table(part_of(report), report["rows"])],
    "kernels": lambda report: [kernels.bandwidths(report["rows"])],
    "report-findings": lambda report: findings_proof.results_tables(report["rows"], report["summary"]),
    "recording": lambda report: [recording.results_table(report["rows"])],
    "step-time": lambda report: [
        step_time.results_table(report, workload) for workload in by_workload(report)
    ],
    "sweep": lambda report: [kernels.best_settings(report["rows"])],
    "tracked-share": lambda report: [
        tracked_share.families_table(report["summary"]),
        tracked_share.results_table(report["rows"]),
    ],
}

BLOCK = re.compile(r"(<!-- (table|claims)\b:? ?(.*?) ?-->\n)(.*?)(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value: (.*?) ?-->)(.*?)(<!-- end -->)")
CLAIMS = re.compile(r"^\| claim \| verdict \|\n\|---\|---\|\n((?:\|.*\|\n)+)", re.MULTILINE)
CLAIM = re.compile(r"^\| (.+) \| \**(.+?)\** \|$", re.MULTILINE)


def pages() -> list[Path]:
    """Where markers may be."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fill(text: str, page: Path) -> str:
    """The text of a page, with all markers filled in.

    Raises ValueError for a marker that is wrong: an unknown file, title or key, or a value at the start of a line,
    where Markdown takes a marker for a paragraph of its own.
    """

    def block(match: re.Match[str]) -> str:
        made = claims(match[3].split()) if match[2] == "claims" else tables(match[3], page)
        return f"{match[1]}\n{made}\n\n{match[5]}"

    def value(match: re.Match[str]) -> str:
        before = text[: match.start()].rpartition("\n")[2]
        if not before.strip(" >*-"):
            raise ValueError(f"a value must not begin a line or a list item: {match[1]}")
        return f"{match[1]}{number(match[2])}{match[4]}"

    try:
        text = BLOCK.sub(block, text)
        text = VALUE.sub(value, text)
    except ValueError as error:
        error.add_note(f"in {page}")
        raise
    opened, closed = (
        len(re.findall(mark, text)) for mark in ("<!-- (?:table|claims|value)\\b", "<!-- end -->")
    )
    if opened != closed:
        raise ValueError(f"{page}: {opened} markers and {closed} ends")
    return text


class Result(NamedTuple):
    """A result file: its content, its tables, and what values can be taken from."""

    report: Report
    tables: list[Table]
    summary: Any


@functools.cache
def result_of(name: str) -> Result:
    """A result file by its name without .json."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"there is no {name}.json in benchmarks/results")
    report = json.loads(file.read_text(encoding="utf-8"))
    if "study" in report:
        study = {**STUDIES, "accuracy": ACCURACY}[report["study"]]
        summary = study.summarize(report["rows"])
        made = [table for table in study.tables(report["rows"], summary) if isinstance(table, Table)]
        return Result(report, made, summary)
    if report.get("kind") not in TABLES:
        return Result(report, [], report)
    return Result(report, list(TABLES[report["kind"]](report)), report)


def tables(marker: str, page: Path) -> str:
    """The tables of a marker, in Markdown, and below them where they are from."""
    name, title, chosen = (*(part.strip() for part in marker.split("|")), "", "")[:3]
    result = result_of(name)
    found = [table for table in result.tables if fnmatchcase(str(table.title), title or "*")]
    if not found:
        titles = "\n  ".join(str(table.title) for table in result.tables)
        raise ValueError(f"no table of {name} is called {title!r}; there are\n  {titles}")
    up = "../" * len(page.relative_to(ROOT).parent.parts)
    source = f"[{name}.json]({up}benchmarks/results/{name}.json)"
    captions = [caption_of(table) for table in found]
    shown = []
    for index, table in enumerate(found):
        shown.append(markdown(table, chosen))
        if (
            captions[index] and captions[index] not in captions[index + 1 :]
        ):  # once, below the last that has it
            shown.append(f"<small>{captions[index]}</small>")
    return "\n\n".join(
        [*shown, f"<small>{source}: {origin(result.report, [str(t.title) for t in found])}</small>"]
    )


def caption_of(table: Table) -> str:
    """A table's caption, in a line."""
    return "; ".join(plain(line) for line in str(table.caption or "").splitlines())


def markdown(table: Table, chosen: str = "") -> str:
    """A table of rich in Markdown: its title and its rows."""
    names = [str(column.header) for column in table.columns]
    wanted = [name.strip() for name in chosen.split("&")] if chosen else ["*"]
    if unknown := [want for want in wanted if not any(fnmatchcase(name, want) for name in names)]:
        raise ValueError(f"{', '.join(unknown)} is none of the columns {' & '.join(names)}")
    shown = [
        column
        for index, column in enumerate(table.columns)
        if not index or any(fnmatchcase(names[index], want) for want in wanted)
    ]
    columns = [[plain(column.header), *map(plain, column.cells)] for column in shown]
    head, *rows = zip(*columns, strict=True)
    rule = [
        "---:" if column.justify == "right" and max(map(len, cells)) < LONGEST_NUMBER else "---"
        for column, cells in zip(shown, columns, strict=True)
    ]
    lines = ["| " + " | ".join(line) + " |" for line in (head, rule, *rows)]
    lines[1] = "|" + "|".join(rule) + "|"
    return "\n".join([f"**{plain(table.title)}**", "", *lines] if table.title else lines)


def plain(cell: Any) -> str:
    """A cell as text of Markdown, with a true minus sign, and 1.7e+02 as 170, 4e-05 as 4·10⁻⁵."""
    text = Text.from_markup(cell).plain if isinstance(cell, str) and "[/" in cell else str(cell)
    text = re.sub(r"(\d(?:\.\d+)?)e([+-]\d+)", without_e, text.strip().replace("\n", " "))
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return re.sub(r"([|*<])", r"\\\1", text)


def without_e(match: re.Match[str]) -> str:
    """A number as it is read."""
    exponent = int(match[2])
    if 0 < exponent < 6:
        return f"{float(match[0]):.0f}"
    return f"{match[1]}·10{str(exponent).translate(SUPERSCRIPTS)}"


def origin(report: Report, titles: Sequence[str]) -> str:
    """Size, number of seeds, hardware, versions and date."""
    env = report["env"]
    gpus = [gpu["name"] for gpu in env["gpus"]]
    on_gpu = bool(gpus) and report.get("config", {}).get("device") != "cpu"
    cores = f"{env['cpu_count']} cores, {env['cpu']}, no GPU"
    versions = [f"torch {env['torch']}", f"triton {env['triton']}" if on_gpu else f"NumPy {env['numpy']}"]
    parts = [
        f"size {report['size']}" if "size" in report else "",
        "not finished" if report.get("unfinished") else "",
        seeds(report, titles) if "study" in report else samples(report),
        ", ".join(gpus) if on_gpu else cores,
        ", ".join([*versions, f"Python {env['python']}"]),
        env["date"][:10],
    ]
    return "; ".join(part for part in parts if part)


def seeds(report: Report, titles: Sequence[str]) -> str:
    """How many seeds the methods behind these tables have: on the tasks that the titles name, else on all."""
    rows = report["rows"]
    named = [row for row in rows if any(t.startswith(task_of(row)) for t in titles if task_of(row))]
    chosen, fresh = [], []
    for of_one in grouped(named or rows, method_of).values():
        is_fresh = [
            row["spec"].get("part") == "test" or row["spec"]["seed"] >= comparison.FRESH_SEEDS
            for row in of_one
        ]
        for counts, wanted in ((chosen, False), (fresh, True)):
            found = {
                row["spec"]["seed"] for row, it_is in zip(of_one, is_fresh, strict=True) if it_is == wanted
            }
            counts += [len(found)] if found else []
    if not fresh:
        return f"{from_to(chosen)} seeds"
    to_choose = f"{from_to(chosen)} to choose the learning rate, " if chosen else ""
    return f"seeds: {to_choose}{from_to(fresh)} fresh"


def method_of(row: Report) -> tuple[object, ...]:
    """What a row is one seed of, whatever its learning rate."""
    spec = row["spec"]
    return task_of(row), spec.get("kind"), json.dumps(spec.get("method"))


def from_to(counts: Sequence[int]) -> str:
    """As "3", or "3 to 5"."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def samples(report: Report) -> str:
    """How many times a row was measured, where the rows say so."""

    def found(value: Any) -> list[int]:
        if isinstance(value, dict):
            own = [value["n"]] if isinstance(value.get("n"), int) else []
            return own + [n for inner in value.values() for n in found(inner)]
        return [n for inner in value for n in found(inner)] if isinstance(value, list) else []

    counts = found(report["rows"]) or [
        number for key, number in report.get("config", {}).items() if key in ("turns", "rounds")
    ]
    return f"n = {from_to(counts)}" if counts else ""


def task_of(row: dict[str, Any]) -> str:
    """The task of a row, as titles name it; empty in studies without tasks."""
    task = row["spec"].get("task")
    return comparison.label(task) if isinstance(task, dict) and "model" in task else ""


def number(marker: str) -> str:
    """A value of a marker, in its format."""
    name, path, spec = (*(part.strip() for part in marker.split("|")), "")[:3]
    value: Any = result_of(name).summary
    for key in path.split(" / "):
        value = step_into(value, key.strip(), marker)
    if isinstance(value, dict) and {"mean", "low", "high", "n"} <= value.keys():
        value = Interval(*(value[key] for key in Interval._fields))
    return plain(format(value, spec))


def step_into(value: Any, key: str, marker: str) -> Any:
    """The value under a key."""
    if isinstance(value, Sequence) and not isinstance(value, str) and re.fullmatch(r"\[\d+\]", key):
        return value[int(key[1:-1])]
    if isinstance(value, tuple) and key in getattr(value, "_fields", ()):
        return getattr(value, key)
    known = list(value) if isinstance(value, dict) else []
    found = [k for k in known if str(k) == key] or [k for k in known if fnmatchcase(str(k), key)]
    if len(found) != 1:
        raise ValueError(f"{key!r} of {marker!r} fits {len(found)} of {'; '.join(map(str, known)) or value}")
    return value[found[0]]


def claims(first: Sequence[str]) -> str:
    """What the pages of docs/results claim, in one table: the named pages first, then the others by name."""
    found = {
        page.stem: page for page in sorted((ROOT / "docs" / "results").glob("*.md")) if page.stem != "index"
    }
    if missing := [name for name in first if name not in found]:
        raise ValueError(f"no page of docs/results is called {', '.join(missing)}")
    lines = ["| claim | verdict | page |", "|---|---|---|"]
    for name in dict.fromkeys([*first, *found]):
        text = re.sub(r"<!--.*?-->", "", found[name].read_text(encoding="utf-8"))
        of_page = CLAIM.findall("".join(CLAIMS.findall(text)))
        wrong = [verdict for _, verdict in of_page if verdict not in VERDICTS]
        if not of_page or wrong:
            raise ValueError(
                f"docs/results/{name}.md needs a table of claims, each with a verdict of {', '.join(VERDICTS)}; it "
                f"has {', '.join(wrong) or 'none'}"
            )
        lines += [f"| {claim} | **{verdict}** | [{name}]({name}.md) |" for claim, verdict in of_page]
    return "\n".join(lines)


def by_workload(report: Report) -> dict[str, list[dict[str, Any]]]:
    """The rows of each workload."""
    return grouped(report["rows"], lambda row: row["workload"])


def part_of(report: Report) -> host_time.Part:
    """What a file of benchmarks.speed.host_time has measured."""
    return host_time.Part(report["config"].get("part", host_time.Part.LAUNCHES))


def outdated() -> dict[Path, str]:
    """Pages that are not what the result files say, and what they should be."""
    found = {}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if "<!-- " in text and (filled := fill(text, page)) != text:
            found[page] = filled
    return found


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing, and fail if a page would change.")
    ] = False,
) -> None:
    """Fill in the tables and numbers of README.md and docs/ from benchmarks/results.

    Example: python -m benchmarks.results_pages
    """
    console = Console()
    try:
        found = outdated()
    except ValueError as error:
        raise typer.BadParameter("\n".join([str(error), *getattr(error, "__notes__", [])])) from error
    for page, text in found.items():
        if not check:
            page.write_text(text, encoding="utf-8")
        console.print(f"{'not up to date:' if check else 'wrote'} {page.relative_to(ROOT)}")
    if not found:
        console.print("all pages are up to date")
    raise typer.Exit(int(check and bool(found)))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
