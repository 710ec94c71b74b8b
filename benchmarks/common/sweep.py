"""Many runs, some at a time; a sweep that was killed goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console

from benchmarks.common.command_line import progress_bar
from elropt import env_report

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Spec = TypeVar("Spec", bound="DataclassInstance")  # frozen, with plain values
Row = dict[str, Any]


def sweep(
    specs: Sequence[Spec] | Callable[[Sequence[Row]], Sequence[Spec]],
    work: Callable[[Spec], Row],
    rows_file: Path,
    *,
    jobs: int,
    console: Console,
    describe: Callable[[Spec], str] = str,
) -> list[Row]:
    """Calls `work(spec)` for every spec, in `jobs` processes at a time, each with one thread on the CPU.

    A row is the spec under "spec", the commit, and what `work` returned. It is appended to `rows_file` (JSON lines) as
    soon as its run is done; a spec with a row in that file is not run again. `work` is a function of a module, as other
    processes import it. If it raises, the other runs are done first, and then the first error is raised.

    Args:
        specs: in the order in which they are run; or a function that gives them, from all rows of the file. It is
            called again after every run, so it can choose by what the runs before have shown.

    Returns:
        The rows, in the order of `specs`.
    """
    done = read_rows(rows_file)
    given = specs if callable(specs) else lambda rows: specs
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    if missing_specs(given, done):
        _run_missing(given, work, done, rows_file, jobs, console, describe)
    wanted = [spec_key(spec) for spec in given(list(done.values()))]
    return [done[key] for key in wanted]


def missing_specs(specs: Callable[[Sequence[Row]], Sequence[Spec]], done: Mapping[str, Row]) -> list[Spec]:
    """The specs without a row among those of `read_rows`, each once."""
    wanted = dict.fromkeys(specs(list(done.values())))
    return [spec for spec in wanted if spec_key(spec) not in done]


def _run_missing(
    specs: Callable[[Sequence[Row]], Sequence[Spec]],
    work: Callable[[Spec], Row],
    done: dict[str, Row],
    rows_file: Path,
    jobs: int,
    console: Console,
    describe: Callable[[Spec], str],
) -> None:
    """Runs what is missing, adds the rows to `done` and to the file, and raises the first error at the end."""
    env = env_report.collect()
    commit = f"{env['git_commit']}{' with changes' if env['git_dirty'] else ''}"
    with (
        progress_bar(console) as progress,
        rows_file.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_parent) as pool,
    ):
        task = progress.add_task("running", total=None)
        running: dict[Future[Row], Spec] = {}
        failed: dict[Spec, Exception] = {}
        count = 0
        try:
            while True:
                busy = {*running.values(), *failed}
                ready = [spec for spec in missing_specs(specs, done) if spec not in busy]
                progress.update(task, total=count + len(running) + len(ready))
                for spec in ready[: jobs - len(running)]:
                    running[pool.submit(_work_on_one_thread, work, spec)] = spec
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    spec = running.pop(future)
                    count += 1
                    if (error := future.exception()) is not None:
                        if not isinstance(error, Exception) or isinstance(error, BrokenProcessPool):
                            raise error
                        error.add_note(f"in the run {spec}")
                        failed[spec] = error
                        continue
                    row = {"spec": dataclasses.asdict(spec), "commit": commit, **future.result()}
                    file.write(json.dumps(without_nan(row), allow_nan=False) + "\n")
                    file.flush()
                    done[row_key(row)] = json.loads(json.dumps(without_nan(row)))
                    progress.update(task, advance=1, description=describe(spec))
        except BaseException as error:
            pool.shutdown(cancel_futures=True)  # the end of `with` alone would wait for all runs in the queue
            if isinstance(error, KeyboardInterrupt):
                console.print(f"{len(done)} rows are in {rows_file}: the same command goes on from there")
            raise
    if failed:
        console.print(f"{len(failed)} of {count} runs failed; the others are in {rows_file}")
        raise next(iter(failed.values()))


def read_rows(rows_file: Path, *, mend: bool = True) -> dict[str, Row]:
    """The rows of a sweep by their spec. If a killed process left a last line that is cut short, the file loses it,
    unless `mend` is False: while another process writes, such a line is about to be whole.

    Raises ValueError if another line is not a row.
    """
    if not rows_file.exists():
        return {}
    text = rows_file.read_text(encoding="utf-8")
    complete, _, cut = text.rpartition("\n")
    if cut and mend:
        os.truncate(rows_file, len((complete + "\n").encode()) if complete else 0)
    rows = {}
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row_key(row)] = row
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{rows_file}, line {number} is no row of a sweep: remove the file, or start over"
            ) from error
    return rows


def without_nan(value: Any) -> Any:
    """A copy with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_jobs(device: str) -> int:
    """The CPU's cores; 1 on a GPU."""
    return (os.cpu_count() or 1) if device == "cpu" else 1


def _end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone: killed, it cannot end it itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_end() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def _work_on_one_thread(work: Callable[[Spec], Row], spec: Spec) -> Row:
    torch.set_num_threads(1)
    return work(spec)


def spec_key(spec: DataclassInstance) -> str:
    """What `read_rows` knows a spec's row by."""
    return _key(dataclasses.asdict(spec))


def row_key(row: Row) -> str:
    """What `read_rows` knows a row by: that of its spec."""
    return _key(row["spec"])


def _key(spec: Any) -> str:
    return json.dumps(spec, sort_keys=True)
