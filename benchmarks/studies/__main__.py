"""python -m benchmarks.studies: every study is a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.accuracy import ACCURACY
from benchmarks.common.sweep import default_jobs, read_rows
from benchmarks.studies import STUDIES
from benchmarks.studies import study as studies
from benchmarks.studies.study import Study

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure the claims that elropt stands on. Example: python -m benchmarks.studies warmup --size small",
)


def command(study: Study) -> Callable[..., None]:
    """The command of one study."""

    def run(
        size: Annotated[
            str,
            typer.Option(
                help="tiny: does it run; small: minutes on 2 cores; medium: many hours on them; full: hours on a GPU; "
                "gpu: minutes on one."
            ),
        ] = study.sizes[1],
        device: Annotated[
            str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: a GPU if there is one.")
        ] = None,
        jobs: Annotated[
            int | None, typer.Option(min=1, help="Runs at a time. Default: the CPU's cores; 1 on a GPU.")
        ] = None,
        out: Annotated[Path, typer.Option(help="Folder for the rows, the JSON file and the plots.")] = Path(
            "runs/studies"
        ),
        fresh: Annotated[
            bool,
            typer.Option(
                "--fresh", help="Forget the rows of an earlier call, and those of benchmarks/results."
            ),
        ] = False,
        show_left: Annotated[
            bool, typer.Option("--list", help="Say what is left to run, and run nothing.")
        ] = False,
    ) -> None:
        if size not in study.sizes:
            others = [name for name, other in STUDIES.items() if size in other.sizes]
            hint = f"; {', '.join(others)} can be run at {size!r}" if others else ""
            raise typer.BadParameter(f"unknown size {size!r}; choose one of {', '.join(study.sizes)}{hint}")
        device = device or studies.default_device()
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise typer.BadParameter(f"--device {device} cannot be used: {error}") from error
        stem, console = f"{study.name}-{size}", studies.make_console()
        try:
            stages = study.stages(size, device)
        except (FileNotFoundError, ValueError) as error:  # data or a package is missing
            raise typer.BadParameter(str(error)) from error
        if show_left:
            known = {} if fresh else studies.known_rows(stem, out)
            if study.left is not None:
                console.print(study.left(size, device, list(known.values())))
            else:
                missing = studies.left(stages, known)
                console.print("\n".join(map(study.describe, missing)) or "nothing is left")
            return
        if fresh:
            (out / f"{stem}{studies.ROWS}").unlink(missing_ok=True)
        elif taken := studies.take_over(stem, out):
            console.print(f"{taken} rows of benchmarks/results are taken over")
        studies.run(study, stages, stem, out, jobs=jobs or default_jobs(device), console=console, size=size)

    run.__doc__ = (
        f"{study.question}\n\nSizes: {', '.join(study.sizes)}. A call that was stopped goes on where it stopped. "
        f"Example: python -m benchmarks.studies {study.name} --size {study.sizes[1]} --out runs/studies"
    )
    return run


for _study in STUDIES.values():
    app.command(_study.name)(command(_study))


@app.command()
def report(
    result: Annotated[
        Path,
        typer.Argument(help="The JSON file of a study, or STUDY-SIZE.rows.jsonl, what it has done so far."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path("runs/studies"),
    save: Annotated[
        Path | None,
        typer.Option(
            help="Of STUDY-SIZE.rows.jsonl: also write these rows as a result file, marked unfinished."
        ),
    ] = None,
) -> None:
    """Print and draw a result again, of a study or of benchmarks.accuracy.

    Example: python -m benchmarks.studies report benchmarks/results/warmup-small.json --out plots
    """
    is_rows = result.name.endswith(studies.ROWS)
    if save is not None and not is_rows:
        raise typer.BadParameter(
            f"--save is for a file {studies.ROWS}, not {result}: copy a result file instead"
        )
    if save is not None and not save.parent.is_dir():
        raise typer.BadParameter(f"--save {save}: there is no folder {save.parent}; make it first")
    name, _, size = result.name.removesuffix(studies.ROWS).rpartition("-")
    try:
        if is_rows:
            result.stat()  # read_rows takes a missing file for an empty one
            content = {"study": name, "rows": list(read_rows(result, mend=False).values())}
        else:
            content = json.loads(result.read_text(encoding="utf-8"))
        study = {**STUDIES, "accuracy": ACCURACY}[content["study"]]
    except OSError as error:
        raise typer.BadParameter(f"{result} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise typer.BadParameter(
            f'{result} is not the result of a study of this version (its field "study" must be one of '
            f"{', '.join(STUDIES)} or accuracy)"
        ) from error
    except ValueError as error:  # a line that is no row
        raise typer.BadParameter(str(error)) from error
    try:
        studies.report(study, content, out, studies.make_console())
    except ValueError as error:  # rows that do not belong together
        raise typer.BadParameter(f"{result}: {error}") from error
    if save is not None:
        saved = studies.result_of(study, content["rows"], size=size, unfinished=True)
        save.write_text(studies.dumps(saved), encoding="utf-8")


if __name__ == "__main__":
    app()
