"""Shared by the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.common import sweep


@pytest.fixture
def threads_for_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sweeps work in threads: for tests of what comes before and after, a process costs seconds to import torch."""
    threads = torch.get_num_threads()  # which a sweep sets to 1 in its processes
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    yield
    torch.set_num_threads(threads)
