"""A process that measures: one that fails, dies or hangs costs one row and is replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

START_LIMIT = 300.0  # seconds that a process may take to start

Row = dict[str, Any]
Perform = Callable[[Any], Row]


def serve(connection: Connection, perform: Perform) -> None:
    """In the process: say that it is there, then perform jobs until the other end closes."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        connection.send(None)
        while True:
            connection.send(perform(connection.recv()))


class Worker:
    """Makes rows of jobs by `perform`, a function of a module, in a process of its own.

    The process starts with the first job, and ends with the `with` block. A row with `restart` ends it too: what
    failed in it may have left it unusable.
    """

    def __init__(self, perform: Perform) -> None:
        self.perform = perform
        self.process: Any = None  # of the context "spawn", and its end of a pipe
        self.connection: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def ask(self, job: Any, limit: float) -> Row:
        """The row of a job, which may take `limit` seconds. A failure is a row with `error`; nothing is raised."""
        try:
            if self.process is None:
                self._start()
                if not self.connection.poll(START_LIMIT):
                    self.stop()
                    return {"error": f"did not start within {START_LIMIT:.0f} s"}
                self.connection.recv()
            self.connection.send(job)
            if not self.connection.poll(limit):
                self.stop()
                return {"error": f"took longer than {limit:.0f} s"}
            row = self.connection.recv()
        except (EOFError, OSError):
            return {"error": f"the process died with exit code {self.stop(wait=10)}"}
        if row.pop("restart", False):
            self.stop()
        return row

    def stop(self, wait: float = 0) -> int | None:
        """End the process, if there is one, after `wait` seconds to end by itself; returns its exit code."""
        if self.process is None:
            return None
        self.connection.close()
        self.process.join(wait)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.process = self.connection = None
        return code

    def _start(self) -> None:
        spawn = torch.multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, self.perform), daemon=False)
        self.process.start()
        theirs.close()
