"""The compiled kernels in the emulator, see README.md, in processes of their own: pytest's has the interpreter.

Jobs of a group share a process, since starting one takes seconds, and all processes Triton's cache.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from elropt import kernels

from .driver import environment, why_not

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)
if not kernels.available():
    pytest.skip("triton does not load", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU, on which tests/kernels runs the kernels", allow_module_level=True)

from .mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
KINDS = ("two-launches", "cooperative")
NUMBERS = (
    *range(70, 80),
    104,
    110,
)  # each rule once, nearly each other option, more than 8 param groups; updates
RANGES = [f"{kind}/{first}-{first + 19}" for kind in KINDS for first in range(0, 120, 20)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the stub and Triton's cache, of all workers."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulation"


def run_jobs(folder: Path, jobs: Iterable[str]) -> dict[str, list[str]]:
    """What each job found."""
    command = [sys.executable, "-m", "tests.emulation", "--json", "--folder", str(folder), *jobs]
    run = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {result["job"]: result["findings"] for result in map(json.loads, run.stdout.splitlines())}


def in_group(kind: str, *jobs: str) -> list[Any]:
    mark = pytest.mark.xdist_group(f"emulation-{kind}")
    return [pytest.param(kind, job, marks=mark, id=job) for job in jobs]


def kind_of(mutant: Mutant) -> str:
    return "cooperative" if mutant.is_cooperative else "two-launches"


Findings = Callable[[str, str], list[str]]


@pytest.fixture(scope="session")
def findings(request: pytest.FixtureRequest, folder: Path) -> Findings:
    """Of a job; the first one of a kind runs all that are selected."""

    @functools.cache
    def run_kind(kind: str) -> dict[str, list[str]]:
        chosen = [getattr(item, "callspec", None) for item in request.session.items]
        jobs = [
            spec.params["job"]
            for spec in chosen
            if spec and spec.params.get("kind") == kind and "job" in spec.params
        ]
        return run_jobs(folder, jobs)

    return lambda kind, job: run_kind(kind)[job]


@pytest.mark.parametrize(
    ("kind", "job"),
    [param for kind in KINDS for param in in_group(kind, *(f"small/{kind}/{n}" for n in NUMBERS))],
)
def test_a_random_configuration_is_right_and_without_races(findings: Findings, kind: str, job: str) -> None:
    assert findings(kind, job) == []


@pytest.mark.parametrize(
    ("kind", "job"),
    [param for name, mutant in MUTANTS.items() for param in in_group(kind_of(mutant), f"mutant/{name}")],
)
def test_a_mutant_is_caught(findings: Findings, kind: str, job: str) -> None:
    mutant = MUTANTS[job.removeprefix("mutant/")]
    found = findings(kind, job)
    assert any(re.search(mutant.finds, finding) for finding in found), (mutant.why, found)


@pytest.mark.parametrize(
    ("kind", "job"),
    [
        *in_group("two-launches", "barriers/measure_kernel", "barriers/update_kernel"),
        *in_group("cooperative", "barriers/cooperative_kernel"),
    ],
)
def test_no_barrier_can_be_left_out(findings: Findings, kind: str, job: str) -> None:
    """Triton puts a barrier only where threads exchange something. If this names one, say here why nobody misses it."""
    assert findings(kind, job) == []


@pytest.mark.parametrize(
    ("kind", "job"), [param for kind in KINDS for param in in_group(kind, f"late-news/{kind}")]
)
def test_a_host_that_learns_late_that_the_warmup_is_over_changes_no_bit(
    findings: Findings, kind: str, job: str
) -> None:
    assert findings(kind, job) == []


@pytest.mark.parametrize(
    ("kind", "job"), [param for kind in KINDS for param in in_group(kind, f"bytes-on-updates/{kind}")]
)
def test_a_step_on_the_update_moves_the_bytes_that_it_says(findings: Findings, kind: str, job: str) -> None:
    assert findings(kind, job) == []


@pytest.mark.slow
@pytest.mark.parametrize("jobs", RANGES)
def test_many_configurations(folder: Path, jobs: str) -> None:
    found = run_jobs(folder, [jobs])
    assert len(found) == 20
    assert {job: findings for job, findings in found.items() if findings} == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", ["hand-over", "rounding"])
def test_the_end_of_the_warmup_and_stochastic_rounding(folder: Path, scenario: str, kind: str) -> None:
    assert run_jobs(folder, [f"{scenario}/{kind}"]) == {f"{scenario}/{kind}": []}
