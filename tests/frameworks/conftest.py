"""Tests with training frameworks: all have the marker `frameworks`, and `make frameworks` runs them.

A file skips itself with ``pytest.importorskip`` where its framework is not installed. Warnings are errors here too,
except those in THIRD_PARTY_WARNINGS.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
THIRD_PARTY_WARNINGS = [  # as in `filterwarnings` of pyproject.toml
    "ignore:.isinstance.treespec, LeafSpec.:FutureWarning",  # Lightning, of torch
    "ignore:.*does not have many workers:UserWarning",  # Lightning: data loaders without processes
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",  # Lightning, of a resumed run
    r"ignore:\s*(By default only one Jsonargparse|.*was deprecated in v4):DeprecationWarning",  # LightningCLI
    "ignore:.torch.jit.script:FutureWarning",  # fastai, of torch
    "ignore:numpy.core is deprecated:DeprecationWarning",  # fastai
    "ignore:The 'mode.chained_assignment' option:DeprecationWarning",  # fastai, of pandas
    "ignore:'pin_memory' argument is set as true but no accelerator:UserWarning",  # torch, of transformers
]


def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("frameworks")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test works in a folder of its own, from seed 0, and leaves no process group behind."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`example("with_lightning")` imports examples/with_lightning.py anew, without running its main."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load
