"""What is compiled ahead is what the benchmarks launch; under the interpreter the launches are only tried."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.speed import compile_ahead, kernels
from benchmarks.speed.compile_ahead import Task, perform, step_tasks, sweep_tasks, workload_of
from benchmarks.speed.optimizers import OURS
from benchmarks.speed.workloads import NETWORKS, WORKLOADS


@pytest.mark.parametrize("workload", [*NETWORKS, "160x4", "2000x4"])
def test_every_workload_has_its_like(workload: str) -> None:
    """In dtype and number of param groups, for every rule."""
    made = WORKLOADS[workload]()
    groups = len(set(made.tracked))
    rules = {t.optimizer for t in step_tasks() if (t.dtype, t.groups) == (made.dtype, groups)}
    assert rules == set(OURS)


def test_stand_ins() -> None:
    for task in step_tasks():
        workload = workload_of(task)
        assert (workload.dtype, len(set(workload.tracked))) == (task.dtype, task.groups)
        assert len(workload.shapes) in (compile_ahead.TOGETHER, compile_ahead.APART)
    assert {(t.chunk, t.warps) for t in sweep_tasks()} == set(kernels.settings())


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("on_the_cpu")
def test_tasks_are_performed(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for name, (run, moved) in list(kernels.KERNELS.items()):
        counted = lambda t, name=name, run=run: (launched.append(name), run(t))  # noqa: E731
        monkeypatch.setitem(kernels.KERNELS, name, (counted, moved))
    name, seconds, failure = perform(Task(torch.float32, "elr-uniform", 2, 4))
    assert (name, failure) == ("float32 elr-uniform 2 4", None)
    assert seconds > 0
    assert launched == []
    perform(Task(torch.bfloat16))
    assert launched == list(kernels.KERNELS)
    launched.clear()
    perform(Task(torch.float32, chunk=64, warps=4))
    assert launched == list(kernels.SWEPT)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_failure_is_named() -> None:
    name, _, failure = perform(Task(torch.float32, "nonsense", 1, 1))
    assert (name, failure) == ("float32 nonsense 1 1", "KeyError: 'nonsense'")


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(compile_ahead.main)
    result = CliRunner().invoke(app, [], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "there is no CUDA device" in result.output
    assert "Example: python -m benchmarks.speed.compile_ahead" in CliRunner().invoke(app, ["--help"]).output
