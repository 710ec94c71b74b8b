"""What the pages on benchmarks name is there: files, and modules to run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_rooms_and_result_files_exist() -> None:
    first_columns = re.findall(r"^\| (`[^|]+) \|", README, flags=re.M)
    named = [path for column in first_columns for path in re.findall(r"`([^`]+/[^`]*|\w+\.py)`", column)]
    assert {"accuracy.py", "common/", "results/accuracy-digits.json"} <= set(named)
    assert [path for path in named if not list(FOLDER.glob(path))] == []


def test_every_room_is_named() -> None:
    rooms = [path for path in FOLDER.iterdir() if path.name[0] not in "_." and path.suffix != ".md"]
    assert len(rooms) > 6
    assert [path.name for path in rooms if f"`{path.name}{'/' if path.is_dir() else ''}" not in README] == []


def test_commands_are_modules() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        FOLDER / "README.md",
    ]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    modules = set(re.findall(r"-m (benchmarks[.\w]*\w)", text))
    assert {"benchmarks.accuracy", "benchmarks.figures", "benchmarks.studies"} <= modules
    for module in modules:
        found = importlib.util.find_spec(module)
        assert found is not None, module
        assert not found.submodule_search_locations or importlib.util.find_spec(f"{module}.__main__"), module
