"""The README's Python blocks run, in order and in one namespace, and the names that it promises exist."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 3
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    model, optimizer = namespace["model"], namespace["optimizer"]
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    assert namespace["effective_lrs"](optimizer)["0.weight"] == pytest.approx(0.003, rel=1e-3)
    namespace["recorder"].close()
    assert (tmp_path / "runs" / "elr.jsonl").read_text().count("\n") == 1


def test_the_swap_is_one_line() -> None:
    block = re.findall(r"```python\n(.*?)```", README, flags=re.S)[0]
    old = re.search(r"^# optimizer = torch\.optim\.SGD\((.*)\)$", block, flags=re.M)
    new = re.search(r"^optimizer = ELRSGD\((.*)\)$", block, flags=re.M)
    assert old is not None
    assert new is not None
    assert old[1] == new[1]


def test_links_and_images_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (?!PYTHON)(\w+)", README, flags=re.M)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
