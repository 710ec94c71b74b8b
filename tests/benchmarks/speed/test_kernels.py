"""What of the kernel benchmark runs without a GPU: its check of the kernels, its constants, its tables."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.speed import kernels
from benchmarks.speed.timing import seconds_of
from benchmarks.speed.workloads import WORKLOADS, many
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


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> kernels.Run:
    """One that takes the CPU for the device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.env_report, "collect", dict)
    made = kernels.Run("kernels", tmp_path / "kernels.json")
    made.device = torch.device("cpu")
    return made


def test_a_row_for_each_case_dtype_and_kernel(run: kernels.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    variants = [{"kernel": kernel} for kernel in ("copy", "update")]
    measured = lambda tensors, kernel: {"gb_per_s": 1.0} if kernel == "copy" else 1 / 0  # noqa: E731
    run.measure(kernels.cases((4096,), ()), variants, measured)
    rows = json.loads(run.out.read_text())["rows"]
    assert [(row["case"], row["dtype"], row["kernel"]) for row in rows] == [
        ("4,096", dtype, kernel) for dtype in ("float32", "bfloat16") for kernel in ("copy", "update")
    ]
    assert [row.get("error") for row in rows] == [None, "ZeroDivisionError: division by zero"] * 2
    assert (rows[0]["tensors"], rows[0]["elements"], rows[0]["gb_per_s"]) == (1, 4096, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("case", ["4,096", f"{2**24:,}", *kernels.LISTS])
def test_benchmark(benchmark: Any, case: str, kernel: str) -> None:
    """Wall-clock time of a call in float32, with the device idle before and after it: run with --benchmark-only."""
    workload = WORKLOADS[case]() if case in WORKLOADS else many(case, [int(case.replace(",", ""))])
    tensors = kernels.Tensors(workload, torch.float32, DEVICE)
    call = partial(kernels.KERNELS[kernel][0], tensors)
    call()
    benchmark.group = case
    benchmark(seconds_of, call, DEVICE)
