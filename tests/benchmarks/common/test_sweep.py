"""A sweep keeps what is done: rows on disk, resumed after a kill, none twice."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.common import sweep as sweeps

QUIET = Console(quiet=True)


@dataclasses.dataclass(frozen=True)
class Spec:
    value: float
    folder: str = ""


def square(spec: Spec) -> dict[str, Any]:
    if spec.folder:
        with (Path(spec.folder) / "calls").open("a") as calls:
            calls.write(f"{spec.value}\n")
    return {"square": spec.value**2}


def fails_at_two(spec: Spec) -> dict[str, Any]:
    if spec.value == 2:
        raise ValueError("two")
    return square(spec)


def slow(spec: Spec) -> dict[str, Any]:
    (Path(spec.folder) / "worker").write_text(str(os.getpid()))
    time.sleep(0.2)
    return square(spec)


def run(specs: list[Spec], file: Path, work: Any = square) -> list[dict[str, Any]]:
    return sweeps.sweep(specs, work, file, jobs=1, console=QUIET)


@pytest.mark.usefixtures("threads_for_processes")
def test_rows_come_in_the_order_of_the_specs_and_no_spec_runs_twice(tmp_path: Path) -> None:
    specs = [Spec(value, str(tmp_path)) for value in (3.0, 1.0, 2.0, 1.0)]
    rows = run(specs, tmp_path / "out" / "rows.jsonl")
    assert [row["square"] for row in rows] == [9, 1, 4, 1]
    assert [row["spec"]["value"] for row in rows] == [3, 1, 2, 1]
    again = run([*specs, Spec(5.0, str(tmp_path))], tmp_path / "out" / "rows.jsonl")
    assert again[:4] == rows
    assert again[4]["square"] == 25
    assert sorted((tmp_path / "calls").read_text().split()) == ["1.0", "2.0", "3.0", "5.0"]


@pytest.mark.usefixtures("threads_for_processes")
def test_specs_can_be_chosen_by_what_earlier_runs_have_shown(tmp_path: Path) -> None:
    def until_thirty(rows: Sequence[dict[str, Any]]) -> list[Spec]:
        largest = max((row["spec"]["value"] for row in rows), default=0.0)
        go_on = all(row["square"] < 30 for row in rows)
        return [Spec(float(value), str(tmp_path)) for value in range(1, int(largest) + 1 + go_on)]

    for _ in range(2):
        rows = sweeps.sweep(until_thirty, square, tmp_path / "rows.jsonl", jobs=1, console=QUIET)
        assert [row["square"] for row in rows] == [1, 4, 9, 16, 25, 36]
    assert (tmp_path / "calls").read_text().split() == ["1.0", "2.0", "3.0", "4.0", "5.0", "6.0"]
    with pytest.raises(ValueError, match="two"):  # what fails is not tried again and again
        sweeps.sweep(lambda _: [Spec(2.0)], fails_at_two, tmp_path / "other", jobs=1, console=QUIET)


@pytest.mark.usefixtures("threads_for_processes")
def test_a_failing_run_costs_only_its_own_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="two") as raised:
        run([Spec(1.0), Spec(2.0), Spec(3.0)], file, fails_at_two)
    assert any("Spec(value=2.0" in note for note in raised.value.__notes__)
    assert [json.loads(line)["square"] for line in file.read_text().splitlines()] == [1, 9]


def test_a_killed_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    code = (
        "from pathlib import Path\n"
        "from tests.benchmarks.common.test_sweep import Spec, run, slow\n"
        "if __name__ == '__main__':\n"
        f"    run([Spec(float(i), {str(tmp_path)!r}) for i in range(50)], Path({str(file)!r}), slow)\n"
    )
    script = tmp_path / "killed.py"
    script.write_text(code)
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, script], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    while process.poll() is None and (not file.exists() or file.read_text().count("\n") < 2):
        time.sleep(0.05)  # however busy the machine is: the process ends by itself after 50 runs
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    worker = Path("/proc", (tmp_path / "worker").read_text(), "stat")
    while time.monotonic() < deadline and worker.exists() and ") Z " not in worker.read_text():
        time.sleep(0.05)
    assert not worker.exists() or ") Z " in worker.read_text(), (
        "the worker outlived the process that started it"
    )
    kept = sweeps.read_rows(file)
    assert 2 <= len(kept) < 50
    rows = run([Spec(float(i), str(tmp_path)) for i in range(4)], file)
    assert [row["square"] for row in rows] == [0, 1, 4, 9]
    calls = (tmp_path / "calls").read_text().split()
    assert calls.count("0.0") == calls.count("1.0") == 1


@pytest.mark.usefixtures("threads_for_processes")
def test_a_line_cut_short_is_dropped_and_others_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    run([Spec(1.0), Spec(2.0)], file)
    whole = file.read_text()
    file.write_text(whole[:-7])
    assert len(sweeps.read_rows(file)) == 1
    assert file.read_text() == whole.splitlines(keepends=True)[0]
    assert [row["square"] for row in run([Spec(1.0), Spec(2.0)], file)] == [1, 4]
    file.write_text(whole[:20])
    assert sweeps.read_rows(file) == {}
    assert file.read_text() == ""


def test_what_is_no_row_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"spec": {"value": 1}}\nnonsense\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is no row"):
        sweeps.read_rows(file)


def test_json_has_no_nan() -> None:
    value = {"a": [1.0, math.nan, (math.inf, 2)], "b": "nan"}
    assert sweeps.without_nan(value) == {"a": [1.0, None, [None, 2]], "b": "nan"}
