"""At a size that counts: which optimizer is how accurate, after how long, over which learning rates?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.table import Table

from benchmarks.common import training
from benchmarks.common.command_line import table_of
from benchmarks.common.sweep import Row
from benchmarks.common.training import TRACE_COLUMNS, Run, rounded, significant
from benchmarks.studies import comparison
from benchmarks.studies.comparison import FRESH_SEEDS
from benchmarks.studies.evidence import plan
from benchmarks.studies.evidence.plan import PLANS, Known, runs_of
from benchmarks.studies.evidence.report import draw, tables
from benchmarks.studies.evidence.summarize import summarize
from benchmarks.studies.study import Stage, Study


def train(run: Run) -> Row:
    """One run, with its `cpu_seconds`: on a busy machine they say better than seconds how long it takes. Only the first
    fresh seed keeps its trace, so that the rows stay small enough to be committed."""
    started = time.process_time()
    row = training.train(run)
    row |= {"curve": rounded(row["curve"]), "cpu_seconds": significant(time.process_time() - started)}
    return row if run.seed == FRESH_SEEDS else {k: v for k, v in row.items() if k not in TRACE_COLUMNS}


def stages(size: str, device: str) -> Sequence[Stage]:
    """One stage that goes on from what its rows show, see `plan.runs_of`."""
    blocks = PLANS[size](device)
    plan.check(blocks)
    return [lambda _: lambda rows: runs_of(blocks, rows)]


def left(size: str, device: str, rows: Sequence[Row]) -> Table:
    """What is left of the blocks that are not finished, and about how long it takes in core hours."""
    known = Known(rows)
    without = "" if plan.has_heavyball() else "; without heavyball, which is not installed"
    table = table_of(
        f"evidence, {size}: what is left",
        *("task", "block", "methods", "done", "to choose by", "with fresh seeds", "core hours"),
        caption="at the speed of the rows of the same task, else by a guess for a quiet machine; while a learning rate "
        f"is not chosen yet, its grid can grow{without}",
    )
    counted: set[Run] = set()
    hours_in_all = 0.0
    for block in PLANS[size](device):
        every = [*plan.choosing(block, known), *plan.finals(block, known), *plan.waiting(block, known)]
        new = [run for run in every if run not in counted]
        counted.update(new)
        missing = [run for run in new if run not in known.rows]
        names = list(dict.fromkeys(run.method.name for run in missing))
        choose = sum(run.part == "val" for run in missing)
        hours = sum(plan.estimated_seconds(run, known) for run in missing) / 3600
        hours_in_all += hours
        if not missing:
            continue
        table.add_row(
            comparison.label(vars(block.task)),
            block.question,
            names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more",
            str(len(new) - len(missing)),
            str(choose),
            str(len(missing) - choose),
            f"{hours:.1f}",
        )
    table.add_section()
    table.add_row("together", *[""] * 5, f"{hours_in_all:.1f}")
    return table


EVIDENCE = Study(
    "evidence",
    "At a size that counts: which optimizer is how accurate, after how long, over which learning rates?",
    train,
    stages,
    summarize,
    tables,
    draw,
    comparison.describe,
    sizes=("tiny", "medium", "full", "gpu"),
    left=left,
)
