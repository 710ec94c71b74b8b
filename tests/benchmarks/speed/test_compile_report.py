"""The table of the compile report: complete in kernels/README.md, and rewritten without touching its surroundings."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.speed import compile_report
from benchmarks.speed.compile_report import CAPABILITIES, CASES, programs_per_multiprocessor, split_at_table

RESULT = {
    "registers": 80,
    "stack": 0,
    "local": 0,
    "static_shared": 1024,
    "launch_shared": 128,
    "loaded": 12.0,
    "stored": 8.0,
    "threads": 256,
    "ptx": "",
}


def rows(table: str) -> dict[str, list[str]]:
    """{case: its cells}."""
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"
    ]
    return {first: rest for first, *rest in cells[2:]}


def test_the_committed_table_names_every_case() -> None:
    _, table, _ = split_at_table(compile_report.README.read_text(encoding="utf-8"))
    assert list(rows(table)) == list(CASES)
    header = table.splitlines()[0]
    assert re.match(r"triton \d+\.\d+\.\d+, \d{4}-\d\d-\d\d, ", header)
    assert all(f"sm_{capability}" in header for capability in CAPABILITIES)


def test_cells_name_what_differs_between_the_targets() -> None:
    report = {"a case": {str(c): {**RESULT, "registers": 40 + (c == 100) * 4} for c in CAPABILITIES}}
    table = compile_report.table_of(report, "3.7.1", datetime.date(2020, 1, 2))
    assert rows(table) == {"a case": ["40 / 40 / 44", "6 / 6 / 5", "0", "1,024+128", "12", "8"]}
    assert table.startswith("triton 3.7.1, 2020-01-02, for sm_80 / sm_90 / sm_100")


@pytest.mark.parametrize(
    ("registers", "threads", "programs"),
    [(80, 256, 3), (81, 256, 2), (64, 256, 4), (16, 256, 8), (255, 256, 1)],
)
def test_programs_per_multiprocessor(registers: int, threads: int, programs: int) -> None:
    assert programs_per_multiprocessor(registers, threads) == programs


def test_wide_accesses_are_counted_alone() -> None:
    ptx = """
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    ld.global.b32 %r5, [%rd2];
    ld.global.v2.b32 {%r1, %r2}, [%rd1];
    ld.global.cg.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    st.global.v2.b64 [%rd1], {%rd5, %rd6};
    """
    assert (compile_report.wide_bytes(ptx, "ld"), compile_report.wide_bytes(ptx, "st")) == (16, 16)


def run_main(monkeypatch: pytest.MonkeyPatch, readme: Path) -> str:
    """The command as it would run, with the compilation left out."""
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(
        compile_report, "compile_cases", lambda: {"case": {str(c): RESULT for c in CAPABILITIES}}
    )
    result = CliRunner().invoke(compile_report.app, ["--readme", str(readme)])
    return f"{result.exit_code} {' '.join(result.output.split())}"


def test_only_the_table_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"μ\n\n{compile_report.BEGIN}\nold\n{compile_report.END}\n\nend\n", encoding="utf-8")
    for _ in range(2):
        assert run_main(monkeypatch, readme).startswith("0 ")
        before, table, after = split_at_table(readme.read_text(encoding="utf-8"))
        assert before == f"μ\n\n{compile_report.BEGIN}"
        assert after == f"{compile_report.END}\n\nend\n"
        assert list(rows(table)) == ["case"]


def test_a_file_without_a_place_for_the_table_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    assert "belongs between" in run_main(monkeypatch, readme)
    assert readme.read_text() == "nothing\n"


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    result = CliRunner().invoke(compile_report.app, ["--json"])
    assert result.exit_code == 2
    assert "unset" in result.output


def test_help_has_an_example() -> None:
    assert "Example:" in CliRunner().invoke(compile_report.app, ["--help"]).output
