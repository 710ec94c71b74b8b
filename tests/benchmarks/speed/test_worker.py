"""Workers that fail are replaced."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.speed.worker import Worker


def perform(job: str) -> dict[str, Any]:
    """Die, hang, ask to be replaced, or say who it is."""
    if job == "dies":
        os._exit(3)
    if job == "hangs":
        time.sleep(3600)
    return {"pid": os.getpid(), "restart": job == "restart"}


def test_workers_that_die_or_hang_are_replaced() -> None:
    with Worker(perform) as worker:
        first = worker.ask("", 60)
        assert worker.ask("", 60) == first
        assert worker.ask("dies", 60) == {"error": "the process died with exit code 3"}
        second = worker.ask("restart", 60)
        third = worker.ask("", 60)
        assert len({first["pid"], second["pid"], third["pid"]}) == 3
        assert worker.ask("hangs", 0.2) == {"error": "took longer than 0 s"}
    assert worker.process is None
