"""Runs jobs in the emulator, each by its name; see README.md."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from .driver import environment, install, why_not

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    names: Annotated[list[str], typer.Argument(metavar="JOB …", help="E.g. cooperative/17, see below.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="For the stub and Triton's cache.", show_default="in the temporary one"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each job.")] = False,
) -> None:
    """Run compiled kernels without a GPU, and print what is wrong.

    Jobs: two-launches/N and cooperative/N, random configuration number N (small/two-launches/N: of the small ones;
    N may be a range, 0-9; from 100 on with elr_of="update"); hand-over/KIND, late-news/KIND, rounding/KIND and
    bytes-on-updates/KIND, KIND being two-launches or cooperative; mutant/NAME, of `mutants.py`; barriers/KERNEL, each
    barrier left out in turn.

    Example: python -m tests.emulation small/cooperative/0-9 mutant/no-acquire
    """
    if (reason := why_not()) is not None:
        raise typer.BadParameter(reason)
    if folder is None:
        folder = Path(tempfile.gettempdir()) / f"elropt-emulation-{os.getuid()}-triton-{version('triton')}"
    needed = environment(folder.resolve())
    if os.environ.get("TRITON_LIBCUDA_PATH") != needed["TRITON_LIBCUDA_PATH"]:
        # The dynamic loader reads LD_LIBRARY_PATH when a process starts.
        command = [sys.executable, "-m", __package__ or "tests.emulation", *sys.argv[1:]]
        os.execve(sys.executable, command, needed)

    from .jobs import expand, run_job

    emulator = install()
    wrong = 0
    for name in expand(names):
        start = time.perf_counter()
        instructions = emulator.machine.instructions
        try:
            findings = run_job(emulator, name)
        except Exception:  # the other jobs are still worth running
            findings = [traceback.format_exc()]
        seconds = round(time.perf_counter() - start, 1)
        wrong += bool(findings)
        if as_json:
            print(json.dumps({"job": name, "findings": findings, "seconds": seconds}), flush=True)
        else:
            done = emulator.machine.instructions - instructions
            print(
                f"{name}: {seconds} s, {done:,} instructions, {'; '.join(findings) or 'nothing'}", flush=True
            )
    if wrong and not as_json:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
