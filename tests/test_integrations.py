"""`elropt.integrations` where a framework is missing. What needs one is tested in tests/frameworks."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "elropt.integrations.lightning", raising=False)
    with pytest.raises(ImportError, match="pip install lightning"):
        importlib.import_module("elropt.integrations.lightning")
