"""Files that are never half written."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file: at any moment the one at `path` is the old one or the new one, complete and on the disk.

    Until then the new file has a name of its own, which ends in .unfinished.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with unfinished.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except Exception as error:
        error.add_note(f"while {path} was written")  # "No space left on device" alone does not say where
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    if sys.platform != "win32":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path: Path, report: dict[str, Any], *, indent: int | None = None) -> None:
    """Replace a result file, and make its folder. Raises ValueError for NaN and infinity."""
    text = json.dumps(report, allow_nan=False, indent=indent) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(text.encode()))


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes had not finished writing in a folder."""
    for path in folder.glob("*.unfinished"):
        path.unlink()
