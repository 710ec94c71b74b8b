"""`elropt.integrations` where a framework is missing. What needs one is tested in tests/frameworks."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "elropt.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module("elropt.integrations.lightning")


def test_every_example_is_on_the_page_and_tested() -> None:
    page = (ROOT / "docs" / "guide" / "frameworks.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    examples = sorted((ROOT / "examples").glob("with_*"))
    assert len(examples) > 10
    for path in examples:
        assert f'--8<-- "examples/{path.name}"' in page
        assert path.stem in tests


def test_the_overview_of_the_page_has_a_row_for_each_section() -> None:
    page = (ROOT / "docs" / "guide" / "frameworks.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)$", page, flags=re.M)
    rows = re.findall(r"^\| \[(.*?)\]", page, flags=re.M)
    assert rows == sections
