"""Imports run downwards, in the order of ARCHITECTURE.md. It and CONTRIBUTING.md name what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import elropt
from elropt.rules import RULES

from .import_rules import Sources, foreign_packages, rooms_in, violations

ROOT = Path(__file__).parents[1]
EXTRAS = {  # the only modules of elropt that need more than torch and NumPy, or triton in kernels/
    "elropt/cli.py": {"typer", "rich"},
    "elropt/_rich_tables.py": {"rich"},
    "elropt/plots.py": {"matplotlib"},
    "elropt/report_page.py": {"plotly"},
    "elropt/integrations/timm.py": {"timm"},
    "elropt/integrations/transformers.py": {"transformers"},
}


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(ROOT)


def test_imports_run_downwards(sources: Sources) -> None:
    assert violations(sources, rooms_in((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))) == []


def test_elropt_needs_torch_and_numpy_alone(sources: Sources) -> None:
    """What `import elropt` imports at once; kernels/ imports its modules only where it has found triton."""
    needed = foreign_packages(sources, sources.needed_at_once("elropt/__init__.py"))
    assert set(needed) == {"torch", "numpy", "triton"}
    assert {path.partition("/")[0] for path in needed["triton"]} == {"kernels"}


def test_extras_are_imported_where_they_are_used(sources: Sources) -> None:
    library = [path for path in sources.trees if path.startswith("elropt/")]
    needed = foreign_packages(sources, library)
    for package in ("torch", "numpy"):
        needed.pop(package)
    assert {
        path: {p for p, users in needed.items() if path in users} for path in set().union(*needed.values())
    } == EXTRAS


def test_no_module_has_the_name_of_something_that_elropt_exports() -> None:
    """Else `elropt.name` would be the module or the function, by what was imported last."""
    modules = {path.stem for path in (ROOT / "elropt").glob("*.py")}
    exported = {
        name for name, value in vars(elropt).items() if getattr(value, "__module__", "") != "builtins"
    }
    functions_and_classes = {name for name in exported if callable(getattr(elropt, name))}
    assert "param_groups" in functions_and_classes
    assert not modules & functions_and_classes


def test_rules_are_listed_once(sources: Sources) -> None:
    """All others ask `RULES`. A benchmark may choose among the rules."""
    library = [path for path in sources.trees if path.startswith(("elropt/", "kernels/", "examples/"))]
    lists = {path: lists_of_rules(sources.trees[path]) for path in library}
    assert {path for path, lines in lists.items() if lines} == {"elropt/rules.py"}


def lists_of_rules(tree: ast.Module) -> list[int]:
    """Lines of literal tuples, lists, sets and dicts that name two rules or more."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
            values = node.keys if isinstance(node, ast.Dict) else node.elts
            names = [v.value for v in values if isinstance(v, ast.Constant) and v.value is not None]
            if len(set(names) & set(RULES)) > 1:
                found.append(node.lineno)
    return found


# The checker itself, on small trees with a planted fault.

ROOMS = """
```rooms
elropt/rules.py elropt/dynamics.py    arithmetic
kernels/                              the kernels
elropt/_host.py                       state
elropt/__init__.py
benchmarks/
```
"""
SOUND = {
    "elropt/__init__.py": "from ._host import Host as Host\n",
    "elropt/rules.py": "import math\nimport torch\n\ndef decide(): pass\ndef _mean(): pass\n",
    "elropt/dynamics.py": "import numpy as np\n",
    "elropt/_host.py": "from . import kernels, rules\nfrom .rules import decide\nclass Host:\n    _state = 0\n",
    "kernels/__init__.py": "from .tables import Tables\n",
    "kernels/tables.py": "class Tables: pass\n",
    "benchmarks/run.py": "import elropt\nfrom elropt.kernels import tables\nfrom torch.utils import _pytree\n",
}


def planted(root: Path, path: str, text: str) -> list[str]:
    for name, sound in (SOUND | {path: SOUND.get(path, "") + text}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(sound)
    return violations(Sources(root), rooms_in(ROOMS))


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    assert planted(tmp_path, "elropt/rules.py", "") == []


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("elropt/rules.py", "from ._host import Host\n", "elropt/rules.py:6 imports elropt/_host.py"),
        ("elropt/rules.py", "from . import dynamics\n", "elropt/rules.py:6 imports elropt/dynamics.py"),
        ("elropt/rules.py", "def late():\n    import elropt\n", "elropt/rules.py:7 imports elropt/__init__"),
        ("kernels/tables.py", "from .. import _host\n", "kernels/tables.py:2 imports elropt/_host.py"),
        ("kernels/tables.py", "import elropt._host\n", "kernels/tables.py:2 imports elropt/_host.py"),
        ("kernels/tables.py", "from . import Tables\n", "a circle of imports: kernels/"),
        (
            "elropt/_host.py",
            "from .rules import _mean\n",
            "elropt/_host.py:5 imports _mean from elropt/rules",
        ),
        ("elropt/_host.py", "rules._mean()\n", "elropt/_host.py:5 uses rules._mean"),
        ("benchmarks/run.py", "elropt.Host()._state\n", "benchmarks/run.py:4 uses elropt.Host()._state"),
        ("benchmarks/run.py", "from elropt import _host\n", "a private module of another package"),
        (
            "benchmarks/run.py",
            "from kernels import tables\n",
            "imports kernels, a second copy of elropt.kernels",
        ),
        ("elropt/new.py", "", "elropt/new.py is in no room"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, path: str, text: str, found: str) -> None:
    assert any(found in violation for violation in planted(tmp_path, path, text))


def test_a_room_without_a_file_is_found(tmp_path: Path) -> None:
    planted(tmp_path, "elropt/rules.py", "")
    (tmp_path / "elropt/dynamics.py").unlink()
    assert violations(Sources(tmp_path), rooms_in(ROOMS)) == [
        "elropt/dynamics.py is a room, but there is no such file"
    ]


def test_what_is_imported_later_is_told_from_what_is_needed_at_once(tmp_path: Path) -> None:
    text = "def draw():\n    import matplotlib\nif TYPE_CHECKING:\n    import rich\nimport typer\n"
    planted(tmp_path, "elropt/rules.py", text)
    found = Sources(tmp_path)
    needed = foreign_packages(found, found.needed_at_once("elropt/__init__.py"))
    assert needed == {"torch": {"elropt/rules.py"}, "typer": {"elropt/rules.py"}}


# What ARCHITECTURE.md and CONTRIBUTING.md name in backticks.

PATH = re.compile(r"`([\w.]+(?:/[\w.]*)+|\w+\.(?:py|md|toml|txt|pyi))`")


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_documents_name_what_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    named = PATH.findall(text)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []
    commands = re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", text)
    modules = [command.replace(".", "/") for command in commands]
    assert [m for m in modules if not ((ROOT / m).is_dir() or (ROOT / f"{m}.py").exists())] == []
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)", text)) <= set(targets)
