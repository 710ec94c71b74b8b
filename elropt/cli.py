"""The `elropt` command: inspect a model, simulate layers, plot a run or report on it, describe the machine."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import __version__, dynamics, env_report
from ._build_model import build_model, in_words
from ._options import initial_relative_grads, lr_rule, random_inputs
from .diagnosis import TITLES, diagnose
from .inspection import inspect_model, random_label_loss
from .run_history import read_run

try:
    import typer
    from rich.console import Console
    from rich.text import Text

    from ._rich_tables import environment_table, simulation_table, summary_table, weight_table
except ModuleNotFoundError as error:
    raise ImportError('the elropt command needs typer and rich: pip install "elropt[cli]"') from error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
WIDE = 120  # columns from which on the table of `inspect` has norms and reasons in full
PLAIN = {
    "‖": "|",
    "–": "-",
    "−": "-",
    "×": "x",
    "·": "*",
    "…": "...",
    "■": "#",
}  # for terminals and files whose encoding lacks these characters


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"elropt {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """See and control the effective learning rate (ELR) of every layer."""
    codecs.register_error("elropt.plain", _in_plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="elropt.plain")


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Replacements for what the stream cannot encode: without them the output would end with a UnicodeEncodeError."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


@app.command(
    epilog="Example: elropt inspect mypackage.models:build --input-shape 64,3,32,32 --lr 0.1 --momentum 0.9; "
    "for a token model: elropt inspect mypackage.models:lm --input input_ids=int64:8,128:50257"
)
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="PKG.MODULE:FACTORY or path/to/file.py:FACTORY. FACTORY is a model, or is called without "
            "arguments and returns a model, (model, inputs) or (model, inputs, loss): inputs a tensor, a tuple of the "
            "model's positional arguments or a dict of its keyword arguments; loss a function of its outputs.",
        ),
    ],
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,…",
            help="Shape of a standard normal input, batch first, for a FACTORY that returns no inputs. "
            "Repeat it for further inputs. Real data tell more.",
        ),
    ] = None,
    random_input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]DTYPE:N,…[:HIGH]",
            help="The same for inputs of any dtype, given by NAME or by position: int64:8,128:50257 is of token ids "
            "from 0 to 50256, float32:8,3,32,32 normal, bool:8,128 all true. Repeat it for further inputs.",
        ),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate to judge.")] = 0.1,
    momentum: Annotated[float, typer.Option(help="Momentum to judge it with.")] = 0.9,
    perturb: Annotated[
        float,
        typer.Option(
            help="Standard deviation of noise in place of parameters that are all zero: behind a last gain or layer "
            "that starts at zero, gradients vanish and nothing can be measured."
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Seeds initialization, random inputs and random labels.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Where to measure, such as cpu or cuda.")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report to FILE, too.")
    ] = None,
) -> None:
    """Show which weights of a model are scale-invariant, how far a step turns them, and what that means.

    If FACTORY returns no loss, the loss is the one that the model returns, or else cross-entropy against random labels,
    for models that return a logit for each sample (or position) and class.
    """
    with _messages().status(Text(f"measuring {target} …")), _errors_printed():
        torch.manual_seed(seed)
        model, inputs, loss = build_model(target)
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device}: {error}") from error
        if (input_shape or random_input) and inputs is not None:
            option = "--input-shape" if input_shape else "--input"
            raise ValueError(f"{target} returns inputs itself: leave out {option}")
        if inputs is None:
            inputs = random_inputs(input_shape or [], random_input or [], model, target)
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), tuple(inputs))
        try:
            found = inspect_model(
                model,
                *args,
                loss=loss or random_label_loss,
                lr=lr,
                momentum=momentum,
                perturb=perturb,
                **kwargs,
            )
        except Exception as error:
            if input_shape and any(isinstance(module, nn.Embedding) for module in model.modules()):
                error.add_note(
                    "--input-shape is of floats: give token ids by --input, such as int64:8,128:50257"
                )
            raise ValueError(f"cannot measure {target}: {in_words(error)}") from error
    if json_file is not None:
        with _writing(json_file):
            json_file.write_text(
                json.dumps(found.to_dict(), allow_nan=False, indent=2) + "\n", encoding="utf-8"
            )
    console = _console()
    colored = console.is_terminal and not console.no_color
    console.print(weight_table(found, wide=console.width >= WIDE, colored=colored))
    if len(found.tracked) > 1:
        console.print(summary_table(found))
    console.print(Text(found.summary()))


@app.command(epilog='Example: elropt simulate --e0 "100,10,1" --lr balance --steps 6 --out spread.png')
def simulate(
    e0: Annotated[
        str | None,
        typer.Option(metavar="E,…", help="E = ‖g‖/‖w‖ of the layers at the start, comma-separated."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Number of layers, instead of --e0; needs --factor.")
    ] = None,
    factor: Annotated[
        float | None, typer.Option(help="E of a layer divided by that of the next; the last has E = 1.")
    ] = None,
    lr: Annotated[
        str, typer.Option(help="A number, or the critical learning rate of each step: balance or monotone.")
    ] = "balance",
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 10,
    momentum: Annotated[float, typer.Option(help="Heavy-ball momentum.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="L2 weight decay.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plot E and the spread; .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Simulate how the spread of effective learning rates closes, by the model of elropt.dynamics."""
    with _errors_printed():
        E0 = initial_relative_grads(e0, depth, factor)
        save_plot = _plot_writer(out) if out else None
        lr_of = lr_rule(lr, momentum)
        E = dynamics.simulate(E0, lr_of, steps, momentum, weight_decay)
    _console().print(simulation_table(E, lr_of))
    if save_plot:
        from .plots import relative_grad_figure

        save_plot(relative_grad_figure(E))


@app.command(epilog="Example: elropt plot runs/elr.jsonl --out runs/elr.png")
def plot(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN.jsonl", exists=True, dir_okay=False, help="What elropt.Recorder wrote."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A .png, .svg or .pdf file. [default: RUN.png]", show_default=False
        ),
    ] = None,
) -> None:
    """Draw a recorded run: ELR and angle of every layer, their spread and the applied learning rate, over the steps."""
    out = out or run.with_suffix(".png")
    with _errors_printed():
        save_plot = _plot_writer(out)
        history = read_run(run)
    for note in history.notes:
        _messages().print(Text(f"note: {note}"), soft_wrap=True)
    from .plots import run_figure

    save_plot(run_figure(history))


@app.command(epilog="Example: elropt report runs/elr.jsonl --out runs/elr.html")
def report(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN.jsonl", exists=True, dir_okay=False, help="What elropt.Recorder wrote."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A .html file. [default: RUN.html]", show_default=False),
    ] = None,
) -> None:
    """Make a web page of a recorded run: interactive plots of every layer, and in words what can be seen in them.

    The page is one file that needs no network. A click on a layer shows it alone, a click on a finding its steps.
    The words are printed, too.
    """
    out = out or run.with_suffix(".html")
    try:
        from .report_page import report_page
    except ImportError as error:
        _fail(str(error))
    with _messages().status(Text(f"reading {run} …")), _errors_printed():
        if out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"{out.name!r} has the suffix {out.suffix!r}; use .html")
        history = read_run(run, all_layers=True)
        found = diagnose(history)
        page = report_page(history, found, title=run.name)
    for note in history.notes:
        _messages().print(Text(f"note: {note}"), soft_wrap=True)
    with _writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    for finding in found:
        advice = f"\n  → {finding.advice}" if finding.advice else ""
        _console().print(Text(f"{finding.severity}: {TITLES[finding.kind]}. {finding.what}{advice}"))
    _messages().print(Text(f"wrote {out}"), soft_wrap=True)


@app.command(epilog="Example: elropt env --json > environment.json")
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, hardware and usable backends: what to put into a bug report or beside a result."""
    found = env_report.collect()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    _console().print(environment_table(found))


def _console() -> Console:
    """Standard output, as wide as the terminal or as COLUMNS says; for a file or pipe 240 columns."""
    given = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if given else 240, highlight=False)


def _messages() -> Console:
    return Console(stderr=True, highlight=False)


def _fail(message: str) -> NoReturn:
    _messages().print(Text(f"error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def _errors_printed() -> Iterator[None]:
    """What elropt refuses, and files that cannot be read or written: a message instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        _fail(str(error))


def _plot_writer(out: Path) -> Callable[[Figure], None]:
    """A function that saves a figure to `out` and says so. Without matplotlib, or if `out` has a suffix that matplotlib
    cannot write, the command ends here, before any work is done."""
    try:
        from .plots import check_suffix, save

        check_suffix(out)
    except (ImportError, ValueError) as error:
        _fail(str(error))

    def write(figure: Figure) -> None:
        with _writing(out):
            save(figure, out)
        _messages().print(Text(f"wrote {out}"), soft_wrap=True)

    return write


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A message instead of a traceback if a file cannot be written."""
    try:
        yield
    except OSError as error:
        _fail(f"cannot write {path}: {error}")
