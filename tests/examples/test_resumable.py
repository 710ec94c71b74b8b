"""The example loop, killed at random moments and started again, ends with the bits of one that is left alone."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "resumable.py"
RULES: dict[str, dict[str, Any]] = {"warmup": {}, "angle": {"tracked_lr": 0.01}}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_resumable", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(out: Path, rule: str, **options: Any) -> subprocess.Popen[bytes]:
    settings = {"rule": rule, "out": out, **RULES[rule], **options}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def kill(process: subprocess.Popen[bytes], out: Path, step: int, delay: float, *, while_saving: bool) -> bool:
    """kill -9 once the curve has `step` lines: after a delay in seconds, or in the middle of the next checkpoint.
    Whether it was in the middle."""
    curve, temporary = out / "curve.jsonl", out / "checkpoint.tmp"
    temporary.unlink(missing_ok=True)
    while process.poll() is None and not (curve.exists() and curve.read_bytes().count(b"\n") >= step):
        time.sleep(0.001)
    time.sleep(0 if while_saving else delay)
    while while_saving and process.poll() is None and not temporary.exists():
        pass
    assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    process.communicate()
    return temporary.exists()


def assert_same_run(ours: Path, expected: Path) -> None:
    assert (ours / "curve.jsonl").read_bytes() == (expected / "curve.jsonl").read_bytes()
    a, b = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (ours, expected))
    assert all(torch.equal(a["model"][name], value) for name, value in b["model"].items())
    for index, held in b["optimizer"]["state"].items():
        assert all(torch.equal(a["optimizer"]["state"][index][key], value) for key, value in held.items())
    assert a["random"]["python"] == b["random"]["python"]
    assert a["random"]["numpy"] == b["random"]["numpy"]
    assert torch.equal(a["random"]["torch"], b["random"]["torch"])


def test_one_kill(example: ModuleType, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "save_every": 5}
    example.main(out=tmp_path / "whole", **settings)
    process = start(tmp_path / "killed", "warmup", **settings)
    kill(process, tmp_path / "killed", 17, 0, while_saving=False)
    saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert 15 <= saved["epoch"] * 28 + saved["batch"] < 56
    example.main(out=tmp_path / "killed", **settings)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_ten_kills_at_random_moments(rule: str, tmp_path: Path) -> None:
    """Half of them in the middle of a checkpoint; with "warmup" before and after it has handed over."""
    settings = {"epochs": 8, "save_every": 4}
    steps = 8 * 28
    out = tmp_path / "killed"
    whole = start(tmp_path / "whole", rule, **settings)
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    print("seed", seed)  # shown if it fails
    early = draw.sample(range(5, 13), 3)  # "warmup" hands over at about step 14
    moments = sorted([*early, *draw.sample(range(20, steps - 20), 7)])
    handed_over, saving = set(), 0
    for i, step in enumerate(moments):
        while_saving = i % 2 == 1
        delay = draw.uniform(0, 0.02)
        saving += kill(start(out, rule, **settings), out, step, delay, while_saving=while_saving)
        with contextlib.suppress(FileNotFoundError):
            saved = torch.load(out / "checkpoint.pt", weights_only=True)
            handed_over.add(saved["optimizer"]["state"][0]["handed_over"].item())
    finish(start(out, rule, **settings))
    finish(whole)
    assert_same_run(out, tmp_path / "whole")
    assert saving > 0
    assert handed_over == ({0.0, 1.0} if rule == "warmup" else {0.0})


def test_a_damaged_checkpoint_is_never_trained_on(example: ModuleType, tmp_path: Path) -> None:
    """Any flipped bit is found, or changes nothing that is loaded (torch pads its files)."""
    path = tmp_path / "checkpoint.pt"
    expected = {"model": {"w": torch.arange(100.0)}, "step": 3, "name": "x"}
    example.save(expected, path)
    whole = path.read_bytes()
    outcomes = {"refused": 0, "harmless": 0}
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            loaded = example.load(path)
        except typer.BadParameter:
            outcomes["refused"] += 1
            continue
        outcomes["harmless"] += 1
        assert torch.equal(loaded["model"]["w"], expected["model"]["w"])
        assert (loaded["step"], loaded["name"]) == (3, "x")
    assert outcomes["refused"] > 100
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(typer.BadParameter, match=r"checkpoint.pt is damaged .*delete it"):
            example.load(path)


def test_what_does_not_belong_together_is_refused(example: ModuleType, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"out": tmp_path, "epochs": 1, "batch_size": 256, "save_every": 3}
    example.main(**settings)
    before = (tmp_path / "curve.jsonl").read_bytes()
    assert before.count(b"\n") == 7
    example.main(**settings)  # nothing is left to do
    with pytest.raises(typer.BadParameter, match=r"'lr': 0.1.*another --out"):
        example.main(**settings, lr=0.2)
    assert (tmp_path / "curve.jsonl").read_bytes() == before
    (tmp_path / "curve.jsonl").unlink()
    with pytest.raises(typer.BadParameter, match="has lost lines"):
        example.main(**settings)


def test_an_interrupted_save_leaves_the_last_checkpoint(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    example.save({"step": 1}, path)
    with pytest.raises(AttributeError, match="pickle"):
        example.save({"step": lambda: 2}, path)
    assert example.load(path) == {"step": 1}
