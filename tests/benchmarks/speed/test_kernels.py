"""What of the kernel benchmark runs without a GPU: its check of the kernels, its constants, its tables."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.speed import kernels
from elropt import kernels as elr_kernels

if not elr_kernels.available():
    pytest.skip("triton is not installed", allow_module_level=True)

from elropt.kernels import tables

DEVICE = torch.device(tables.DEVICE_TYPE)


def printed(table: object) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_check_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernels.constants(CHUNK=16384, NUM_WARPS=4):
        assert kernels.is_correct(DEVICE)
    monkeypatch.setattr(elr_kernels, "update", lambda *_, **__: None)
    assert not kernels.is_correct(DEVICE)


def test_constants_are_put_back() -> None:
    before = {name: vars(tables)[name] for name in ("CHUNK", "NUM_WARPS")}
    changed = {"CHUNK": 64, "NUM_WARPS": 2}
    with kernels.constants(**changed):
        assert {name: vars(tables)[name] for name in changed} == changed
    assert {name: vars(tables)[name] for name in changed} == before


def test_cases_are_single_tensors_and_lists() -> None:
    cases = kernels.cases((4096,), ("resnet-56",))
    assert [(name, workload.elements) for name, workload in cases.items()] == [
        ("resnet-56", 853_018),
        ("4,096", 4096),
    ]


def test_tensors_are_not_zero() -> None:
    (workload,) = kernels.cases((4096,), ()).values()
    tensors = kernels.Tensors(workload, torch.bfloat16, torch.device("cpu"))
    for of in (tensors.params, tensors.grads, tensors.buffers):
        assert all(t is not None and t.dtype == torch.bfloat16 and t.any() for t in of)


def test_the_best_setting_is_the_fastest_right_one() -> None:
    def row(chunk: int, speed: float, correct: bool = True) -> dict[str, object]:
        timing = {"gb_per_s": speed}
        case = {"case": "made up", "dtype": "float32", "chunk": chunk, "warps": 8, "correct": correct}
        return case | {"measure": timing, "update": timing}

    table = printed(kernels.best_settings([row(11, 100.0), row(22, 300.0), row(33, 900.0, correct=False)]))
    assert "22" in table
    assert "300" in table
    assert "33 " not in table
    assert "none was right" in printed(kernels.best_settings([row(11, 100.0, correct=False)]))


def test_a_kernel_without_a_time_is_a_dash() -> None:
    rows = [
        {"case": "made up", "dtype": "float32", "kernel": "copy", "gb_per_s": 1234.0},
        {"case": "made up", "dtype": "float32", "kernel": "update", "error": "no"},
    ]
    table = printed(kernels.bandwidths(rows))
    assert "1,234" in table
    assert "–" in table


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"]])
def test_help_has_an_example(arguments: list[str]) -> None:
    result = CliRunner().invoke(kernels.app, arguments, env={"COLUMNS": "200"})
    assert "Example: python -m benchmarks.speed.kernels" in result.output
