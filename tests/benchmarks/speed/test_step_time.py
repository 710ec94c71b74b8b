"""The step benchmark on the CPU: rows, failures of other packages and of workers, counting, the command line."""

from __future__ import annotations

import json
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.speed import kernels, step_time
from benchmarks.speed.step_time import Job, Worker, perform
from benchmarks.speed.workloads import WORKLOADS

CPU = torch.device("cpu")


def job(optimizer: str, kind: Any = "time") -> Job:
    return Job(kind, "cpu", 0.01, "tiny", optimizer)


@pytest.mark.parametrize("optimizer", [name for name in step_time.OPTIMIZERS if name.startswith("elr-")])
def test_rows_of_the_rules(optimizer: str) -> None:
    row = perform(job(optimizer))
    assert "error" not in row
    assert row["cpu"]["n"] >= 10
    assert 0 < row["cpu"]["us"][0] <= row["cpu"]["us"][1] <= row["cpu"]["us"][2]
    assert row["handed_over"] is (False if optimizer == "elr-warmup" else None)
    for name in ("graph", "eager", "launches", "memory_ops", "extra_bytes", "cold"):
        assert row[name] is None


def test_rows_of_torch() -> None:
    for optimizer in ("torch-fused", "torch-foreach", "torch-for-loop"):
        row = perform(job(optimizer))
        assert row["cpu"]["us"][1] > 0


def test_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def bytes_moved(params: Any, grads: Any, buffers: Any, *, measure: str | None) -> int:
        assert len(params) == len(grads) == len(buffers)
        asked.append((len(params), measure))
        return 1

    monkeypatch.setattr(step_time.kernels, "bytes_moved", bytes_moved, raising=False)
    workload = WORKLOADS["tiny"]()
    for optimizer, expected in (("torch-fused", 20 * workload.elements), ("elr-uniform", 2)):
        entry = step_time.OPTIMIZERS[optimizer]
        copy = step_time.Copy(workload, entry, workload.make(CPU))
        copy.step()
        assert step_time.bytes_of(workload, entry, copy) == expected
    assert asked == [(2, "grad"), (4, None)]


class FakeEvent:
    """A CUDA event on a clock that only steps move."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at: float | None = None

    def record(self) -> None:
        assert self.at is None
        self.at = FakeEvent.now

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.at is not None
        assert other.at is not None
        return other.at - self.at


def test_device_time_is_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call() -> None:
        FakeEvent.now += 0.5  # ms

    timing = step_time.device_time([call] * 4, 0.1)
    assert timing["n"] == 50
    assert timing["us"] == pytest.approx([500.0] * 3)
    assert step_time.device_time([call], 0.0, steps=5) == {"us": pytest.approx([100.0] * 3), "n": 5}


def test_copies_fill_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "l2_bytes", lambda _: 50_000_000)
    assert step_time.copies_for(WORKLOADS["resnet-50"](), CPU) == 1
    small = WORKLOADS["resnet-56"]()
    copies = step_time.copies_for(small, CPU)
    assert copies * small.footprint >= 3 * 50_000_000 > (copies - 1) * small.footprint
    assert step_time.copies_for(WORKLOADS["tiny"](), CPU) == step_time.MAX_COPIES


def test_a_missing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = step_time.Entry(step_time.peer("no_such_package", "SGD"))
    monkeypatch.setitem(step_time.OPTIMIZERS, "absent", entry)
    row = perform(job("absent"))
    assert row == {"error": "not installed: No module named 'no_such_package'"}


def test_a_failing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("the first line\nthe second")

    monkeypatch.setitem(step_time.OPTIMIZERS, "broken", step_time.Entry(fails))
    row = perform(job("broken"))
    assert row == {"error": "RuntimeError: the first line", "restart": True}


def test_other_packages_get_the_same_hyper_parameters() -> None:
    params = WORKLOADS["tiny"]().make(CPU)
    optimizer = step_time.peer("torch.optim", "SGD", nesterov=True)(WORKLOADS["tiny"](), params)
    (group,) = optimizer.param_groups
    expected = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    assert {name: group[name] for name in expected} == expected


def serve_badly(connection: Connection) -> None:
    """A worker that dies, hangs, wants to be replaced, or says who it is."""
    connection.send(None)
    while True:
        optimizer = connection.recv().optimizer
        if optimizer == "dies":
            os._exit(3)
        if optimizer == "hangs":
            time.sleep(3600)
        connection.send({"pid": os.getpid(), "restart": optimizer == "restart"})


def test_workers_that_die_or_hang_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "serve", serve_badly)
    with step_time.workers(1) as (worker,):
        first = worker.ask(job(""))
        assert worker.ask(job("")) == first
        assert worker.ask(job("dies")) == {"error": "the process died with exit code 3"}
        second = worker.ask(job("restart"))
        third = worker.ask(job(""))
        assert len({first["pid"], second["pid"], third["pid"]}) == 3
        assert worker.ask(job("hangs"), limit=0.2) == {"error": "took longer than 0 s"}
    assert worker.process is None


def test_launches_are_kernels_and_not_copies_or_ranges() -> None:
    names = ["measure_kernel", "Memcpy HtoD (Pinned -> Device)", "update_kernel", "Memset (Device)"]
    names += ["Optimizer.step#SGD.step", "ProfilerStep#1"]
    assert step_time.launches_among(names) == {"launches": 2, "memory_ops": 2}


def test_quantiles() -> None:
    assert step_time.timing(np.arange(101.0)) == {"us": [20.0, 50.0, 80.0], "n": 101}


def test_a_result_file_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    step_time.write(path, {"rows": [1]})
    with pytest.raises(ValueError, match="JSON"):
        step_time.write(path, {"rows": [float("nan")]})
    assert json.loads(path.read_text()) == {"rows": [1]}


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "step_time.json"
    arguments = ["--device", "cpu", "--workload", "tiny", "--seconds", "0.01", "--out", str(out)]
    arguments += ["--optimizer", "torch-fused", "--optimizer", "elr-uniform"]
    result = CliRunner().invoke(step_time.app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert [row["optimizer"] for row in report["rows"]] == ["torch-fused", "elr-uniform"]
    assert report["kind"] == "step-time"
    assert report["copy"] is None
    assert report["env"]["torch"] == torch.__version__
    assert "elr-uniform" in result.output


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No worker is started; the optimizers that were measured."""
    measured: list[str] = []

    def ask(_: Worker, asked: Job, limit: float = 0) -> dict[str, Any]:
        measured.append(asked.optimizer)
        return perform(asked)

    monkeypatch.setattr(Worker, "ask", ask)
    return measured


def test_rows_are_added_to_a_file_that_is_there(tmp_path: Path, in_this_process: list[str]) -> None:
    out = tmp_path / "step_time.json"
    arguments = ["--device", "cpu", "--workload", "tiny", "--seconds", "0", "--out", str(out)]
    for chosen in (["torch-fused", "elr-none"], ["elr-none", "elr-angle"]):
        before = json.loads(out.read_text()) if out.exists() else None
        words = [word for name in chosen for word in ("--optimizer", name)]
        result = CliRunner().invoke(step_time.app, [*arguments, *words, "--add"], env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["optimizer"] for row in rows] == ["torch-fused", "elr-none", "elr-angle"]
    assert before is not None
    assert rows[0] == before["rows"][0]
    assert rows[1] != before["rows"][1]
    assert "torch-fused" in result.output  # what was there is in the table


def test_no_row_is_started_when_the_budget_is_spent(
    tmp_path: Path, in_this_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only rows move."""
    monkeypatch.setattr(step_time.time, "monotonic", lambda: 10.0 * len(in_this_process))
    names = ("torch-fused", "torch-foreach", "elr-none", "elr-angle")
    arguments = ["--device", "cpu", "--workload", "tiny", "--seconds", "0", "--budget", "15"]
    arguments += [word for name in names for word in ("--optimizer", name)]
    out = tmp_path / "step_time.json"
    result = CliRunner().invoke(step_time.app, [*arguments, "--out", str(out)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert in_this_process == ["torch-fused", "torch-foreach"]
    assert "2 rows were not started: 15 s are over" in result.output
    assert len(json.loads(out.read_text())["rows"]) == 2


def test_host_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "ask", lambda _, asked, limit=0: perform(asked))
    monkeypatch.setattr(step_time, "HOST_OPTIMIZERS", ("torch-fused", "elr-none"))
    out = tmp_path / "host.json"
    result = CliRunner().invoke(
        step_time.app, ["host", "--device", "cpu", "--seconds", "0", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert {row["tensors"] for row in rows} == {160, 2000}
    assert all(row["cpu"]["us"][1] > 0 for row in rows)


def test_end_to_end_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[set[int]] = []
    write = step_time.write

    def watched(path: Path, report: dict[str, Any]) -> None:
        written.append({row["step"]["n"] for row in report["rows"]})
        write(path, report)

    monkeypatch.setattr(step_time, "write", watched)
    out = tmp_path / "end_to_end.json"
    arguments = [
        "end-to-end",
        "--device",
        "cpu",
        "--tiny",
        "--rounds",
        "2",
        "--steps",
        "1",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(step_time.app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    rows = {row["optimizer"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["torch-fused", "elr-none", "elr-warmup", "elr-uniform"]
    assert rows["torch-fused"]["ratio"] == [1.0, 1.0, 1.0]
    assert rows["elr-warmup"]["handed_over"] is False
    assert written == [{1}, {2}, {2}]  # after each round, and at the end


def test_an_optimizer_that_fails_end_to_end_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    with step_time.bar(Console(quiet=True)) as progress:
        rows = step_time.end_to_end_rows(["elr-nonsense", "elr-none"], CPU, 1, 1, True, progress)
    assert "nonsense" in rows[0]["error"]
    assert rows[1]["ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "nonsense", "--device", "cpu"], "unknown workload 'nonsense'"),
        (["--optimizer", "nonsense", "--device", "cpu"], "unknown optimizer 'nonsense'"),
    ],
)
def test_unknown_names(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(step_time.app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("app", [step_time.app, kernels.app], ids=["step_time", "kernels"])
def test_without_a_gpu_it_says_so(app: Any) -> None:
    result = CliRunner().invoke(app, [], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "CUDA device" in result.output


@pytest.mark.parametrize("arguments", [["--help"], ["host", "--help"], ["end-to-end", "--help"]])
def test_help_has_an_example(arguments: list[str]) -> None:
    result = CliRunner().invoke(step_time.app, arguments, env={"COLUMNS": "200"})
    assert "Example: python -m benchmarks.speed.step_time" in result.output
