"""What commands share. It imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def one_of(known: Collection[str]) -> Callable[[list[str] | str | None], list[str] | str | None]:
    """The callback of an option that takes names, each of which must be known."""

    def check(names: list[str] | str | None) -> list[str] | str | None:
        for name in [names] if isinstance(names, str) else names or ():
            if name not in known:
                raise typer.BadParameter(f"{name!r} is not known; choose from {', '.join(known)}")
        return names

    return check


def progress_bar(console: Console) -> Progress:
    """A progress bar on a terminal, and nothing in a log."""
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def table_of(
    title: str,
    *columns: str,
    rows: Iterable[Sequence[str]] = (),
    caption: str | None = None,
    wrap: bool = False,
) -> Table:
    """A table; the first column is text and those after it are numbers. `wrap`: cells may take several lines."""
    table = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    table.pad_edge, table.padding = False, (0, 0, 0, 1)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not wrap)
    for row in rows:
        table.add_row(*row)
    return table


def show(value: float | None, spec: str) -> str:
    """A number for a table, or a dash."""
    return "–" if value is None else format(value, spec)
