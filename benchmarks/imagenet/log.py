"""The folder of an ImageNet run: its lock, and a log that a stopped run goes on with."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.common.files import write_whole
from benchmarks.common.sweep import Row, without_nan
from benchmarks.common.training import significant

if sys.platform != "win32":
    import fcntl

REMEDY = "put back a whole copy, or begin anew with another --out"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder of a run, and keep other runs out of it; except on Windows.

    The lock, on the file `lock`, is the system's: it ends with this process, however that ends, and worker processes do
    not have it. Raises ValueError if another run has it; warns where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+", encoding="utf-8") as file:
        if sys.platform != "win32":
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise ValueError(
                    f"another run is at work in {folder} ({file.read().strip()}): wait for it, end it, or give "
                    "another --out"
                ) from error
            except OSError as error:
                warnings.warn(
                    f"{file.name} cannot be locked ({error}): see to it that no other run gets the same --out",
                    stacklevel=3,
                )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


class Log:
    """The rows of a run, in memory and as JSON lines in a file (with None only in memory).

    Begins with `rows`, those of the steps up to the checkpoint to go on from; others in the file are dropped.
    """

    def __init__(self, path: Path | None, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._file: IO[str] | None = None
        if path is not None:
            write_whole(path, lambda file: file.write("".join(map(_line, self.rows)).encode()))
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Add a row."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Wait until all rows are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_rows(path: Path, step: int, steps_per_epoch: int) -> list[Row]:
    """The rows of a log up to `step`, that of the checkpoint to go on from; what follows may be cut or damaged.

    Raises ValueError, which names the line, if one of these rows is damaged or missing.
    """
    rows: list[Row] = []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    steps = epochs = 0
    for number, line in enumerate(lines, start=1):
        if (steps, epochs) == (step, step // steps_per_epoch):
            break
        try:
            row = json.loads(line)
            steps += row["steps"] if row["kind"] == "steps" else 0
            epochs += row["kind"] == "epoch"
            in_place = row["step"] == steps <= step
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged: {REMEDY}") from error
        if not in_place:
            raise ValueError(f"{path} lacks rows before line {number}: {REMEDY}")
        rows.append(row)
    if (steps, epochs) != (step, step // steps_per_epoch):
        raise ValueError(f"{path} ends at step {steps}, the checkpoint is of step {step}: {REMEDY}")
    return rows


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `torch.save` has written with `write_whole`, on the CPU.

    Raises ValueError if the file is damaged: torch.load alone takes damaged tensors for good, and looks at no checksum.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes of the two readers is anybody's guess
        damaged = error
    raise ValueError(f"{path} is damaged ({damaged}): {REMEDY}")


def _line(row: Row) -> str:
    return json.dumps(without_nan(row), allow_nan=False) + "\n"


def epoch_summary(rows: Sequence[Row], epoch: int) -> Row:
    """Means over the steps of an epoch; seconds without validation and checkpoints."""
    of_epoch = [row for row in rows if row["kind"] == "steps" and row["epoch"] == epoch]

    def mean(key: str, weight: str) -> float:
        return sum(row[key] * row[weight] for row in of_epoch) / sum(row[weight] for row in of_epoch)

    return {
        "train_loss": mean("loss", "steps"),
        "train_seconds": round(sum(row["seconds"] for row in of_epoch), 3),
        "images_per_second": significant(mean("images_per_second", "seconds")),
        "data_wait": significant(mean("data_wait", "seconds")),
    }


def describe(row: Row) -> str:
    """A row of some steps, for people."""
    return (
        f"epoch {row['epoch']}, loss {row['loss']:.3f}, {row['images_per_second']:.0f} images/s, "
        f"{row['data_wait']:.0%} of the time waiting for images"
    )
