"""The step benchmark on the CPU: rows, failures of other packages, the command line; with a GPU, pytest-benchmark."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.speed import host, kernels, step_time
from benchmarks.speed.optimizers import OPTIMIZERS, OURS, Entry, peer
from benchmarks.speed.step_time import Job, perform
from benchmarks.speed.timing import first_line, seconds_of
from benchmarks.speed.worker import Worker
from benchmarks.speed.workloads import NETWORKS, WORKLOADS, Workload

CPU = torch.device("cpu")


def job(optimizer: str, kind: Any = "time") -> Job:
    return Job(kind, "cpu", 0.01, "tiny", optimizer)


@pytest.mark.parametrize("optimizer", OURS)
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
    for optimizer, together, expected in (
        ("torch-fused", False, 20 * workload.elements),
        ("elr-uniform", False, 2),
        ("elr-uniform", True, 2),
    ):
        entry = OPTIMIZERS[optimizer]
        copy = step_time.Copy(workload, entry, workload.make(CPU))
        copy.step()
        assert step_time.bytes_of(copy, workload, entry, together=together) == expected
    assert asked == [(2, "grad"), (4, None), (2, None), (4, None)]


def test_one_launch_reads_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, entry = WORKLOADS["tiny"](), OPTIMIZERS["elr-uniform"]
    copy = step_time.Copy(workload, entry, workload.make(CPU))
    copy.step()
    found = []
    for launches in (1, 2):
        counted = {"launches": launches, "memory_ops": 0}
        monkeypatch.setattr(step_time, "launches_of", lambda _, counted=counted: counted)
        found.append(step_time.counts(copy, workload, entry)["bytes"])
    read_again = 4 * sum(p.numel() for p in copy.optimizer.param_groups[0]["params"])
    assert found == [20 * workload.elements, 20 * workload.elements + read_again]


def test_rates() -> None:
    row = {"bytes": 3000, "graph": {"us": [1, 1.5, 2]}, "eager": None}
    step_time.add_rates(row, copy_gb_per_s=8.0)
    assert row["graph"] == {"us": [1, 1.5, 2], "gb_per_s": 2.0, "of_copy": 0.25}
    uncounted = {"bytes": None, "graph": {"us": [1, 1.5, 2]}, "eager": None}
    step_time.add_rates(uncounted, copy_gb_per_s=8.0)
    assert uncounted["graph"] == {"us": [1, 1.5, 2]}


def test_copies_fill_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "l2_bytes", lambda _: 50_000_000)
    assert step_time.copies_for(WORKLOADS["resnet-50"](), CPU) == 1
    small = WORKLOADS["resnet-56"]()
    copies = step_time.copies_for(small, CPU)
    assert copies * small.footprint >= 3 * 50_000_000 > (copies - 1) * small.footprint
    assert step_time.copies_for(WORKLOADS["tiny"](), CPU) == step_time.MAX_COPIES


class Gpu:
    """A device that counts as a GPU, with tensors on the CPU."""

    type, index = "cuda", None
    measured: dict[str, list[int]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Everything that needs a GPU is taken for granted; `measured` has the steps of each graph, or of a pass."""
    made = Gpu()
    made.measured = {"eager": [], "graph": []}

    def device_time(calls: Any, seconds: float, *, steps: int | None = None) -> dict[str, Any]:
        made.measured["graph" if steps else "eager"].append(steps or len(calls))
        return {"us": [1.0, 2.0, 3.0], "n": 5}

    workload, make = WORKLOADS["tiny"](), Workload.make
    monkeypatch.setattr(Workload, "make", lambda self, _: make(self, CPU))
    monkeypatch.setattr(step_time, "on_stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(step_time, "device_time", device_time)
    monkeypatch.setattr(step_time, "extra_bytes", lambda _: 512)
    monkeypatch.setattr(step_time, "l2_bytes", lambda _: 2 * workload.footprint)
    monkeypatch.setattr(
        step_time, "capture", lambda steps, apart: [Graph() for _ in (steps if apart else [0])]
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return made


class Graph:
    def replay(self) -> None:
        pass


@pytest.mark.parametrize(("per_step", "passes"), [(1e-4, 12), (5e-3, 6), (0.1, 1)])
def test_rows_of_a_gpu(per_step: float, passes: int, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short steps are repeated in one graph, long ones have a graph each, slow ones a single copy."""
    monkeypatch.setattr(step_time, "seconds_of", lambda step, device: step() or per_step)
    row = step_time.time_row(WORKLOADS["tiny"](), OPTIMIZERS["elr-uniform"], gpu, 0.0)
    assert gpu.measured == {"eager": [passes], "graph": [passes]}
    assert (row["copies"], row["cold"]) == ((1, False) if per_step == 0.1 else (6, True))
    assert row["graph"] == row["eager"] == {"us": [1.0, 2.0, 3.0], "n": 5}
    assert (row["extra_bytes"], row["bytes"], row["launches"], "graph_error" in row) == (
        512,
        None,
        None,
        False,
    )


def test_what_cannot_be_captured_says_why(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Any:
        try:
            raise RuntimeError("the cause")
        finally:
            raise RuntimeError("ending the capture")

    monkeypatch.setattr(step_time, "capture", fails)
    row = step_time.time_row(WORKLOADS["tiny"](), OPTIMIZERS["torch-foreach"], gpu, 0.0)
    assert (row["graph"], row["graph_error"], row["restart"]) == (None, "RuntimeError: the cause", True)
    reads = OPTIMIZERS["torch-foreach"]._replace(capturable=False)
    row = step_time.time_row(WORKLOADS["tiny"](), reads, gpu, 0.0)
    assert (row["graph"], row["graph_error"]) == (None, "it reads values back to the host")
    assert "restart" not in row


def test_a_missing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(peer("no_such_package", "SGD"))
    monkeypatch.setitem(OPTIMIZERS, "absent", entry)
    row = perform(job("absent"))
    assert row == {"error": "not installed: No module named 'no_such_package'"}


def test_a_failing_package_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("the first line\nthe second")

    monkeypatch.setitem(OPTIMIZERS, "broken", Entry(fails))
    row = perform(job("broken"))
    assert row == {"error": "RuntimeError: the first line", "restart": True}


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

    def ask(_: Worker, asked: Job, limit: float) -> dict[str, Any]:
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
    monkeypatch.setattr(host, "COMPARED", ("torch-fused", "timm-sgdp-of-nobody", "elr-none"))
    out = tmp_path / "host.json"
    options = [
        "--device",
        "cpu",
        "--workload",
        "160x4",
        "--workload",
        "tiny",
        "--rounds",
        "3",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(step_time.app, ["host", *options], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    rows = {(row["workload"], row["optimizer"]): row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 6
    assert rows["160x4", "torch-fused"]["eager_ratio"] == {"median": 1.0, "interval": [1.0, 1.0]}
    mine = rows["160x4", "elr-none"]
    low, high = mine["cpu_ratio"]["interval"]
    assert mine["cpu"]["n"] == 3
    assert 0 < low <= mine["cpu_ratio"]["median"] <= high
    assert "KeyError" in rows["tiny", "timm-sgdp-of-nobody"]["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "nonsense", "--device", "cpu"], "'nonsense' is not known; choose from resnet-56"),
        (["--optimizer", "nonsense", "--device", "cpu"], "'nonsense' is not known; choose from torch-fused"),
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # of other packages
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("workload", NETWORKS)
def test_benchmark(benchmark: Any, workload: str, optimizer: str) -> None:
    """Wall-clock time of a step, with the device idle before and after it: run with --benchmark-only."""
    device = torch.device("cuda")
    tensors = WORKLOADS[workload]()
    try:
        copy = step_time.Copy(tensors, OPTIMIZERS[optimizer], tensors.make(device))
        copy.warm_up(step_time.WARM_UP_STEPS, device)
    except Exception as error:  # other packages: missing, or without this dtype
        if optimizer.startswith(("torch-", "elr-")):
            raise
        pytest.skip(first_line(error))
    benchmark.group = workload
    benchmark(seconds_of, copy.step, device)
