"""Many runs, some at a time; a sweep that was killed goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from elropt import env_report

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Spec = TypeVar("Spec", bound="DataclassInstance")  # frozen, of plain values
Row = dict[str, Any]


def sweep(
    specs: Sequence[Spec],
    work: Callable[[Spec], Row],
    rows_file: Path,
    *,
    jobs: int,
    console: Console,
    describe: Callable[[Spec], str] = str,
) -> list[Row]:
    """`work(spec)` of every spec, `jobs` processes at a time, each with one thread on the CPU.

    A finished row is appended to `rows_file` (JSON lines, with the spec and the commit) at once, and a spec whose row
    is there already is not run again. `work` is a function of a module. Returns the rows in the order of `specs`: the
    spec under "spec", the commit, and what `work` returned. What `work` raises is raised when all other runs are done:
    one failure costs one row.
    """
    done = read_rows(rows_file)
    missing = [spec for spec in dict.fromkeys(specs) if _key(dataclasses.asdict(spec)) not in done]
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    if not missing:
        return [done[_key(dataclasses.asdict(spec))] for spec in specs]
    env = env_report.collect()
    commit = f"{env['git_commit']}{' with changes' if env['git_dirty'] else ''}"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=console) as progress,
        rows_file.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        task = progress.add_task("running", total=len(missing))
        futures = {pool.submit(_work_on_one_thread, work, spec): spec for spec in missing}
        failed: list[Exception] = []
        try:
            for future in as_completed(futures):
                spec = futures[future]
                if (error := future.exception()) is not None:
                    if not isinstance(error, Exception) or isinstance(error, BrokenProcessPool):
                        raise error
                    error.add_note(f"in the run {spec}")
                    failed.append(error)
                    continue
                row = {"spec": dataclasses.asdict(spec), "commit": commit, **future.result()}
                file.write(json.dumps(without_nan(row), allow_nan=False) + "\n")
                file.flush()
                done[_key(row["spec"])] = json.loads(json.dumps(without_nan(row)))
                progress.update(task, advance=1, description=describe(spec))
        except BaseException as error:
            pool.shutdown(cancel_futures=True)  # what the end of `with` alone would wait for
            if isinstance(error, KeyboardInterrupt):
                console.print(f"{len(done)} rows are in {rows_file}: the same command goes on from there")
            raise
    if failed:
        console.print(f"{len(failed)} of {len(missing)} runs failed; the others are in {rows_file}")
        raise failed[0]
    return [done[_key(dataclasses.asdict(spec))] for spec in specs]


def read_rows(rows_file: Path) -> dict[str, Row]:
    """The rows of a sweep by their spec; a last line that a kill cut short is cut off the file.

    Raises ValueError if another line is not a row.
    """
    if not rows_file.exists():
        return {}
    text = rows_file.read_text(encoding="utf-8")
    complete, _, cut = text.rpartition("\n")
    if cut:
        os.truncate(rows_file, len((complete + "\n").encode()) if complete else 0)
    rows = {}
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[_key(row["spec"])] = row
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{rows_file}, line {number} is no row of a sweep: remove the file, or start over"
            ) from error
    return rows


def without_nan(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_jobs(device: str) -> int:
    """The CPU's cores; 1 on a GPU."""
    return (os.cpu_count() or 1) if device == "cpu" else 1


def _work_on_one_thread(work: Callable[[Spec], Row], spec: Spec) -> Row:
    torch.set_num_threads(1)
    return work(spec)


def _key(spec: Any) -> str:
    return json.dumps(spec, sort_keys=True)
