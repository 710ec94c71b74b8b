"""The orchestration of the GPU suite, with small commands and on the CPU."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Context, Part, run_part, run_suite

app = typer.Typer()
app.command()(gpu_suite.main)
QUIET = Console(quiet=True)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_exit_code_and_end_of_the_output(tmp_path: Path) -> None:
    code = "import sys; [print(i) for i in range(100)]; print('at the end', file=sys.stderr); sys.exit(3)"
    part = run_part(python(code), 30, tmp_path / "log")
    assert (part["rc"], part["timed_out"]) == (3, False)
    assert part["tail"][-1] == "at the end"
    assert len(part["tail"]) == gpu_suite.TAIL_LINES
    assert "\n0\n" in (tmp_path / "log").read_text()


def test_a_part_that_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
    child = f"import time; time.sleep(1); open({str(tmp_path / 'alive')!r}, 'w').close()"
    code = f"import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    part = run_part(python(code), 0.5, tmp_path / "log")
    assert (part["rc"], part["timed_out"], part["tail"][0]) == (None, True, "started")
    assert "KeyboardInterrupt" in part["tail"][-1]  # it was asked before it was killed
    time.sleep(1.2)
    assert not (tmp_path / "alive").exists()


def test_children_that_a_part_leaves_behind_are_ended(tmp_path: Path) -> None:
    child = f"import time; time.sleep(1); open({str(tmp_path / 'alive')!r}, 'w').close()"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    assert run_part(python(code), 30, tmp_path / "log")["rc"] == 0
    time.sleep(1.2)
    assert not (tmp_path / "alive").exists()


def test_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "good": Part(lambda _: python("print('fine')"), 1),
        "bad": Part(lambda _: python("raise SystemExit(7)"), 1),
        "for a gpu": Part(lambda _: python(""), 1, gpu_only=True),
    }
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    run_suite(list(parts), Context(tmp_path, "cpu", True), 1, QUIET)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["env"]["torch"] == torch.__version__
    assert [part.get("rc") for part in summary["parts"].values()] == [0, 7, None]
    assert summary["parts"]["good"]["tail"] == ["fine"]
    assert summary["parts"]["good"]["command"] == ["python", "-c", "print('fine')"]
    assert summary["parts"]["for a gpu"] == {"skipped": "needs a GPU"}
    log = (tmp_path / "suite.log").read_text()
    assert log.index("fine") < log.index("SystemExit")


def test_parts_for_which_no_time_is_left_are_skipped(tmp_path: Path) -> None:
    summary = run_suite(["tests", "host"], Context(tmp_path, "cpu", True), 0, QUIET)
    assert [part["skipped"] for part in summary["parts"].values()] == ["0 s were left"] * 2


def test_a_missing_sanitizer_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    context = Context(tmp_path, "cuda", False)
    assert gpu_suite.reason_to_skip("memcheck", context) == "compute-sanitizer is not on the PATH"
    assert gpu_suite.reason_to_skip("kernels", context) is None


def test_carried_packages_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "theirs")
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    assert gpu_suite.environment()["PYTHONPATH"] == f"{tmp_path}{os.pathsep}theirs"
    (tmp_path / ".vendor").mkdir()
    variables = gpu_suite.environment()
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / ".vendor"), str(tmp_path), "theirs"]
    assert "TRITON_INTERPRET" not in variables


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", gpu_suite.PARTS)
def test_commands_name_things_that_exist(name: str, tiny: bool, tmp_path: Path) -> None:
    command = gpu_suite.PARTS[name].command(Context(tmp_path, "cuda", tiny))
    for word in command:
        assert not word.startswith("tests/") or (gpu_suite.ROOT / word).exists()
        if word.startswith("benchmarks."):
            assert (gpu_suite.ROOT / "benchmarks" / f"{word.removeprefix('benchmarks.')}.py").exists()


def test_a_second_call_adds_to_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: Part(lambda _, name=name: python(f"print('{name}')"), 1) for name in ("one", "two")}
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    context = Context(tmp_path, "cpu", True)
    for name in parts:
        run_suite([name], context, 1, QUIET)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["parts"]) == ["one", "two"]
    assert "one" in (tmp_path / "suite.log").read_text()


@pytest.mark.slow
def test_the_suite_on_the_cpu(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--minutes", "5"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        *("summary.json", "suite.log", "step_time.json", "host.json", "end_to_end.json", "accuracy.json"),
    }


def test_unknown_parts(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--part", "nonsense"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "unknown part 'nonsense'" in result.output


def test_help_has_an_example() -> None:
    assert "Example: python -m benchmarks.gpu_suite" in CliRunner().invoke(app, ["--help"]).output
