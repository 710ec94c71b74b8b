"""What a run that was stopped has left in the file of its `Recorder`."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["drop_records_from"]


def drop_records_from(path: Path, step: int) -> None:
    """Remove the records at the end of a `Recorder`'s file that are of this step or of later ones.

    A run that is killed has gone on after its last checkpoint. Resumed from there it makes those steps, and writes
    their records, again. A line that is cut off goes with them. Records before them stay, also those of other runs.

    Raises:
        OSError: the file cannot be read or written. A file that does not exist is fine.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = len(lines)
    while kept and _step_of(lines[kept - 1], otherwise=step) >= step:
        kept -= 1
    if kept < len(lines):
        with path.open("ab") as file:
            file.truncate(sum(map(len, lines[:kept])))


def _step_of(line: bytes, otherwise: int) -> int:
    """The step of a record; `otherwise` where the line is none."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # cut off
        return otherwise
