"""Result files are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common.files import write_json


def test_a_result_file_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, {"rows": [1]})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"rows": [float("nan")]})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]
