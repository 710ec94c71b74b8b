"""Which modules import which, read from their source: the rooms that ARCHITECTURE.md lists from the ground up.

A module is named by its path from the root of the repository, such as `elropt/rules.py`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGES = ("elropt", "kernels", "benchmarks", "examples")
IMPORTED_AS = {"kernels": "elropt.kernels"}  # the folder → the package that it is installed as


@dataclass(frozen=True)
class Import:
    """One name that a module imports: a module of ours or, if `module` is None, something of another project.

    Attributes:
        module: path of the module that is imported, or that the name is imported from.
        package: the first part of the dotted name.
        name: what is imported from the module; None if it is the module itself.
        line: where it stands.
        at_once: whether it runs when the importing module is imported, so not inside a function or for type checkers.
    """

    module: str | None
    package: str
    name: str | None
    line: int
    at_once: bool


class Sources:
    """The modules below a root folder, parsed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trees: dict[str, ast.Module] = {}
        self.paths: dict[str, str] = {}  # dotted name → path
        for package in PACKAGES:
            for file in sorted((root / package).rglob("*.py")):
                path = file.relative_to(root).as_posix()
                self.trees[path] = ast.parse(file.read_text(encoding="utf-8"), path)
                self.paths[dotted(path)] = path

    @cached_property
    def imports(self) -> dict[str, list[Import]]:
        return {path: list(self._imports_of(path)) for path in self.trees}

    def _imports_of(self, path: str) -> Iterator[Import]:
        for node, at_once in _with_at_once(self.trees[path]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield self._import(alias.name, None, node.lineno, at_once)
            elif isinstance(node, ast.ImportFrom):
                base = _absolute(path, node)
                for alias in node.names:
                    whole = f"{base}.{alias.name}"
                    if whole in self.paths:
                        yield self._import(whole, None, node.lineno, at_once)
                    else:
                        yield self._import(base, alias.name, node.lineno, at_once)

    def _import(self, module: str, name: str | None, line: int, at_once: bool) -> Import:
        return Import(self.paths.get(module), module.partition(".")[0], name, line, at_once)

    def needed_at_once(self, path: str) -> set[str]:
        """The modules that are imported when this one is, and it itself."""
        needed, waiting = set(), [path]
        while waiting:
            if (module := waiting.pop()) not in needed:
                needed.add(module)
                waiting += [i.module for i in self.imports[module] if i.module and i.at_once]
        return needed


def dotted(path: str) -> str:
    """`kernels/tables.py` → elropt.kernels.tables."""
    first, *rest = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join([IMPORTED_AS.get(first, first), *rest])


def _absolute(path: str, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = dotted(path).split(".")
    above = node.level - path.endswith("/__init__.py")
    return ".".join([*parts[: len(parts) - above], *([node.module] if node.module else [])])


def _with_at_once(tree: ast.AST, at_once: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        yield node, at_once
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types
        yield from _with_at_once(node, at_once and not later)


def rooms_in(text: str) -> list[list[str]]:
    """The lines of the block ```rooms in a document: paths of modules, and of folders with a slash at the end.

    The paths of a line end before the first two spaces in a row; behind them is a description.
    """
    block = re.search(r"^```rooms\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    if block is None:
        raise ValueError("there is no block ```rooms")
    lines = [line.partition("  ")[0].split() for line in block[1].splitlines()]
    return [line for line in lines if line]


def violations(sources: Sources, rooms: list[list[str]]) -> list[str]:
    """What is against the rules, in words."""
    return [
        *_misplaced(sources, rooms),
        *_wrong_imports(sources, rooms),
        *_circles(sources),
        *_underscores(sources),
    ]


def _level(path: str, rooms: list[list[str]]) -> tuple[int, str] | None:
    """The line and the entry of a module; the longest entry counts: a file's own before that of its folder."""
    found = [
        (i, room)
        for i, line in enumerate(rooms)
        for room in line
        if path == room or (room.endswith("/") and path.startswith(room))
    ]
    return max(found, key=lambda entry: len(entry[1]), default=None)


def _misplaced(sources: Sources, rooms: list[list[str]]) -> Iterator[str]:
    for path in sources.trees:
        if _level(path, rooms) is None:
            yield f"{path} is in no room: add it to the list in ARCHITECTURE.md, below all that imports it"
    for room in (room for line in rooms for room in line):
        if not any(path.startswith(room) for path in sources.trees):
            yield f"{room} is a room, but there is no such file"


def _wrong_imports(sources: Sources, rooms: list[list[str]]) -> Iterator[str]:
    for path, imports in sources.imports.items():
        for found in imports:
            if found.package in IMPORTED_AS:
                yield f"{path}:{found.line} imports {found.package}, a second copy of {IMPORTED_AS[found.package]}"
            mine = _level(path, rooms)
            theirs = _level(found.module, rooms) if found.module else None
            if mine and theirs and theirs != mine and theirs[0] >= mine[0]:
                yield f"{path}:{found.line} imports {found.module}, which is not below it"


def _circles(sources: Sources) -> Iterator[str]:
    graph = {path: {i.module for i in imports if i.module} for path, imports in sources.imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"a circle of imports: {' → '.join(reversed(error.args[1]))}"


def _underscores(sources: Sources) -> Iterator[str]:
    """Names with an underscore that are defined in another module, imported or taken from it with a dot."""
    defined = {path: set(_definitions(tree)) for path, tree in sources.trees.items()}
    elsewhere = set().union(*defined.values())
    for path, tree in sources.trees.items():
        for found in sources.imports[path]:
            if found.module and found.name and _is_private(found.name):
                yield f"{path}:{found.line} imports {found.name} from {found.module}"
            private = found.module and _is_private(Path(found.module).stem)
            if private and Path(found.module).parts[0] != Path(path).parts[0]:  # type: ignore[arg-type]
                yield f"{path}:{found.line} imports {found.module}, a private module of another package"
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not _is_private(node.attr):
                continue
            if node.attr not in defined[path] and node.attr in elsewhere:
                yield f"{path}:{node.lineno} uses {ast.unparse(node)}, which another module defines"


def _definitions(tree: ast.AST) -> Iterator[str]:
    """Names that functions, classes and assignments define, also as attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def foreign_packages(sources: Sources, paths: Iterable[str]) -> dict[str, set[str]]:
    """Package of another project → the modules among `paths` that need it as soon as they are imported."""
    needed: dict[str, set[str]] = {}
    for path in paths:
        for found in sources.imports[path]:
            ours = found.package in {dotted(package).partition(".")[0] for package in PACKAGES}
            if found.at_once and not ours and found.package not in sys.stdlib_module_names:
                needed.setdefault(found.package, set()).add(path)
    return needed
