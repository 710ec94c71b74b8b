"""All that the host can ask for compiles. Here kernels are interpreted, so other processes compile them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from . import specializations


def compiled(what: str, cache: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "tests.kernels.specializations", what]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def assert_all_compile(result: dict[str, Any], at_least: int) -> None:
    assert result["failed"] == {}
    assert result["compiled"].keys() == {"measure_kernel", "update_kernel", "cooperative_kernel"}
    assert min(result["compiled"].values()) >= at_least, result["compiled"]


def test_every_pair_of_options_compiles(tmp_path: Path) -> None:
    assert_all_compile(compiled("pairs", tmp_path), at_least=10)


@pytest.mark.slow
def test_every_combination_of_options_compiles(tmp_path: Path) -> None:
    assert_all_compile(compiled("all", tmp_path), at_least=1000)


@pytest.mark.slow
def test_no_register_is_spilled(tmp_path: Path) -> None:
    result = compiled("assembled", tmp_path)
    assert_all_compile(result, at_least=10)
    assert result["spilled"] == {}


@pytest.mark.parametrize(
    ("choices", "is_allowed"),
    [
        (specializations.CODE | specializations.TYPES, specializations.allowed),
        (specializations.FUNCTIONS, specializations.function_allowed),
    ],
    ids=["optimizer", "functions"],
)
def test_pairs_that_do_not_occur_are_refused(choices: dict[str, list[Any]], is_allowed: Any) -> None:
    rows = specializations.covering(choices, is_allowed)
    assert all(is_allowed(row) for row in rows)
    covered = set().union(*(specializations.pairs_in(row) for row in rows))
    rng = random.Random(1)
    for pair in set(specializations.all_pairs(choices)) - covered:
        others = [{name: rng.choice(of) for name, of in choices.items()} for _ in range(300)]
        assert not any(is_allowed(other | dict(pair)) for other in others), pair
