"""The `elropt` command: inspect a model, simulate layers, plot a run, describe the machine."""

from __future__ import annotations

import codecs
import importlib
import importlib.util
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import __version__, dynamics, env_report
from .report import ModelReport, WeightReport, inspect_model, random_label_loss, read_run

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
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
TABLE_ROWS = 25
WIDE = 120  # columns from which on the table of `inspect` has norms and reasons in full
PLAIN = {
    "‖": "|",
    "–": "-",
    "−": "-",
    "×": "x",
    "·": "*",
    "…": "...",
}  # where the terminal, or a file, has no such characters
Number = TypeVar("Number", int, float)
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # of a model: by position and by name


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
    """Instead of a UnicodeEncodeError, and of the output that would be lost with it."""
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

    If FACTORY returns no loss, it is the one that the model returns, or cross-entropy against random labels, for models
    that return a logit for each sample (or position) and class.
    """
    with _messages().status(Text(f"measuring {target} …")):
        torch.manual_seed(seed)
        model, inputs, loss = _build(target)
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            _fail(f"--device {device}: {error}")
        if (input_shape or random_input) and inputs is not None:
            _fail(
                f"{target} returns inputs itself: leave out {'--input-shape' if input_shape else '--input'}"
            )
        if inputs is None:
            inputs = _random_inputs(input_shape or [], random_input or [], model, target)
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
        try:
            report = inspect_model(
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
            _fail(f"cannot measure {target}: {_in_words(error)}")
    if json_file is not None:
        _write(json_file, json.dumps(report.to_dict(), allow_nan=False, indent=2) + "\n")
    console = _console()
    console.print(_weight_table(report, wide=console.width >= WIDE))
    if len(report.tracked) > 1:
        console.print(_summary_table(report))
    console.print(Text(report.summary()))


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
    E0 = _initial_relative_grads(e0, depth, factor)
    save_plot = _plot_writer(out) if out else None
    try:
        rule = _lr_rule(lr, momentum)
        E = dynamics.simulate(E0, rule, steps, momentum, weight_decay)
    except ValueError as error:
        _fail(str(error))
    spread = dynamics.elr_spread(E)
    table = Table("step", "lr", "largest E", "smallest E", "spread", title="E in 1/lr")
    for column in table.columns:
        column.justify = "right"
    for step in np.unique(np.linspace(0, steps, min(steps + 1, TABLE_ROWS)).round().astype(int)):
        lr_text = _short(rule(E[step])) if step < steps else ""
        extremes = float(E[step].max()), float(E[step].min()), float(spread[step])
        table.add_row(str(step), lr_text, *map(_short, extremes))
    _console().print(table)
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
    """Draw a recorded run: ELR of every layer, their spread and the applied learning rate, over the steps."""
    out = out or run.with_suffix(".png")
    save_plot = _plot_writer(out)
    try:
        history = read_run(run)
    except (ValueError, OSError) as error:
        _fail(str(error))
    for note in history.notes:
        _messages().print(Text(f"note: {note}"), soft_wrap=True)
    from .plots import run_figure

    save_plot(run_figure(history))


@app.command(epilog="Example: elropt env --json > environment.json")
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, hardware and usable backends: what to put into a bug report or beside a result."""
    found = env_report.collect()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(show_header=False)
    for key, value in found.items():
        table.add_row(key, _in_one_line(value))
    _console().print(table)


def _console() -> Console:
    """Standard output; what is not a terminal gets lines as long as they need to be, or as COLUMNS says."""
    given = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if given else 240, highlight=False)


def _messages() -> Console:
    return Console(stderr=True, highlight=False)


def _fail(message: str) -> NoReturn:
    _messages().print(Text(f"error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(2)


def _in_words(error: BaseException) -> str:
    """An exception that somebody's code may have raised: what, where, and the notes on it."""
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = raised.parent == Path(__file__).parent
    place = f" in {raised.name}" if raised.suffix == ".py" else ""
    where = "" if ours else f"{type(error).__name__}{place}: "
    return "\n".join([f"{where}{error}", *getattr(error, "__notes__", [])])


def _build(target: str) -> tuple[nn.Module, Arguments | None, Callable[[Any], Any] | None]:
    """Import TARGET's factory and call it: model, inputs and loss."""
    module_name, _, name = target.rpartition(":")
    if not module_name or not name:
        _fail(f"{target!r} is not PKG.MODULE:FACTORY or path/to/file.py:FACTORY")
    try:
        module = _import(module_name)
    except Exception as error:
        _fail(f"cannot import {module_name}: {_in_words(error)}")
    factory = getattr(module, name, None)
    if not callable(factory):
        defined = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        what = "is not callable" if hasattr(module, name) else "does not exist"
        _fail(f"{name} {what} in {module_name}, which has {', '.join(defined) or 'nothing to call'}")
    try:
        built = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        _fail(f"{target}() failed: {_in_words(error)}")
    model, inputs, loss = (
        (*built, None, None)[:3] if isinstance(built, tuple) and built else (built, None, None)
    )
    if not isinstance(model, nn.Module) or (isinstance(built, tuple) and len(built) > 3):
        _fail(
            f"{target}() returned {_kinds(built)}; it must return a model (torch.nn.Module), (model, inputs) "
            "or (model, inputs, loss)"
        )
    if loss is not None and not callable(loss):
        _fail(
            f"{target}() returned a loss of type {type(loss).__name__}; it must be a function of the outputs"
        )
    if inputs is None:
        return model, None, loss
    if isinstance(inputs, Mapping):
        return model, ((), {str(name): value for name, value in inputs.items()}), loss
    return model, (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}), loss


def _import(name: str) -> Any:
    """A module by its name, looked for in the working directory first, or a file by its path."""
    if not name.endswith(".py"):
        sys.path.insert(0, "")
        return importlib.import_module(name)
    path = Path(name).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {name}")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"_inspected_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} cannot be loaded as a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _random_inputs(shapes: list[str], specs: list[str], model: nn.Module, target: str) -> Arguments:
    """Inputs for --input-shape, then those for --input."""
    if not shapes and not specs:
        _fail(
            f"{target} returns no inputs: give --input-shape, such as 64,3,32,32, or --input, such as "
            "int64:8,128:50257 for a token model, or return (model, inputs)"
        )
    like = next((param for param in model.parameters() if param.is_floating_point()), torch.empty(0))
    args: list[Tensor] = [torch.randn(_sizes("--input-shape", shape), dtype=like.dtype) for shape in shapes]
    kwargs = {}
    for spec in specs:
        name, given, rest = spec.rpartition("=")
        value = _random_input(spec, rest)
        if given:
            kwargs[name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def _random_input(spec: str, rest: str) -> Tensor:
    dtype_name, *parts = rest.split(":")
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype) or len(parts) not in (1, 2):
        _fail(
            f"--input {spec}: not [NAME=]DTYPE:SHAPE[:HIGH], such as int64:8,128:50257 or float32:64,3,32,32"
        )
    sizes = _sizes(f"--input {spec}:", parts[0])
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        if len(parts) == 2:
            _fail(f"--input {spec}: HIGH is for integers only")
        return torch.ones(sizes, dtype=dtype) if dtype == torch.bool else torch.randn(sizes, dtype=dtype)
    if len(parts) == 1:
        _fail(f"--input {spec}: integers need a HIGH, above the largest, such as int64:8,128:50257")
    (high,) = _numbers(f"--input {spec}:", parts[1], int)[:1]
    if not 0 < high <= torch.iinfo(dtype).max:
        _fail(
            f"--input {spec}: HIGH must be between 1 and {torch.iinfo(dtype).max}, the largest {dtype_name}"
        )
    return torch.randint(high, sizes, dtype=dtype)


def _sizes(option: str, text: str) -> list[int]:
    sizes = _numbers(option, text, int)
    if min(sizes) < 1:
        _fail(f"{option} {text}: every size must be at least 1")
    return sizes


def _initial_relative_grads(e0: str | None, depth: int | None, factor: float | None) -> list[float]:
    if e0 is not None:
        if depth is not None or factor is not None:
            _fail("give either --e0 or --depth with --factor, not both")
        return _numbers("--e0", e0, float)
    if depth is None or factor is None:
        _fail("give --e0, such as --e0 100,10,1, or --depth with --factor")
    if depth < 1 or not 0 < factor < math.inf:
        _fail(
            f"--depth {depth} --factor {factor:g}: the depth must be at least 1, "
            "the factor positive and finite"
        )
    with np.errstate(over="ignore"):
        return list(factor ** np.arange(depth - 1.0, -1.0, -1.0))


def _lr_rule(lr: str, momentum: float) -> Callable[[np.ndarray], float]:
    """The learning rate of a step as a function of E."""
    critical = {"balance": dynamics.balance_lr, "monotone": dynamics.monotone_lr}.get(lr)
    if critical is not None:
        return lambda E: float((1 - momentum) * critical(E))
    constant, *more = _numbers("--lr", lr, float, "or balance or monotone")
    if more:
        _fail(f"--lr {lr}: give one number, or balance or monotone")
    return lambda E: constant


def _numbers(option: str, text: str, kind: type[Number], otherwise: str = "") -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "64,3,32,32" if kind is int else "100,10,1"
        _fail(
            f"{option} {text}: not comma-separated numbers such as {example}{otherwise and ', ' + otherwise}"
        )


def _plot_writer(out: Path) -> Callable[[Figure], None]:
    """Saves a figure to `out` and says so; what would prevent that is found before any work is done."""
    try:
        from .plots import check_suffix, save

        check_suffix(out)
    except (ImportError, ValueError) as error:
        _fail(str(error))

    def write(figure: Figure) -> None:
        try:
            save(figure, out)
        except OSError as error:
            _fail(f"cannot write {out}: {error}")
        _messages().print(Text(f"wrote {out}"), soft_wrap=True)

    return write


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"cannot write {path}: {error}")


def _weight_table(report: ModelReport, *, wide: bool) -> Table:
    """All that was measured, or what fits into 80 columns."""
    fastest, slowest = (report.tracked[0], report.tracked[-1]) if len(report.tracked) > 1 else (None, None)
    title = f"Weights of two or more dimensions: E = ‖g‖/‖w‖, ELR = lr·E at lr {report.lr:g}"
    table = Table("weight", title=title)
    if wide:
        table.add_column("shape")
    table.add_column("scale-invariant" if wide else "invariant")
    for header in (*(("‖w‖", "‖g‖") if wide else ()), "cos(w, g)", "E", "ELR"):
        table.add_column(header, justify="right", no_wrap=True)
    for column in table.columns:
        column.overflow = "fold"
    for weight in report.weights:
        style = "bold red" if weight is fastest else "bold cyan" if weight is slowest else None
        numbers = [weight.radial_cosine, weight.relative_grad, weight.elr]
        cells = [weight.name, _verdict(weight, wide=wide)]
        if wide:
            cells.insert(1, "×".join(map(str, weight.shape)))
            numbers = [weight.weight_norm, weight.grad_norm, *numbers]
        table.add_row(*(Text(cell) for cell in (*cells, *map(_short, numbers))), style=style)
    return table


def _verdict(weight: WeightReport, *, wide: bool) -> str:
    """The measured cosine of a weight that is not invariant is left out: the row has that of the loss."""
    if weight.reason.startswith("not:"):
        return "no"
    if wide:
        return f"yes: {weight.reason}" if weight.invariance else f"no: {weight.reason}"
    if weight.invariance:
        return "by channel" if weight.invariance == "channel" else "as a whole"
    _, jointly, partner = weight.reason.partition("only jointly with ")
    return f"no: with {partner.strip(chr(39)).rpartition('.')[2]}" if jointly else f"no: {weight.reason}"


def _summary_table(report: ModelReport) -> Table:
    """What two or more tracked weights have in common."""
    table = Table(show_header=False)
    for label, value in (
        ("ELR spread (max / min)", report.elr_spread),
        ("standard deviation of log ELR", report.log_elr_std),
        ("critical lr, balance: fastest and slowest layer swap", report.balance_lr),
        ("critical lr, monotone: the two fastest layers swap", report.monotone_lr),
    ):
        table.add_row(label, _short(value))
    return table


def _short(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _kinds(built: object) -> str:
    if isinstance(built, tuple):
        return f"({', '.join(type(part).__name__ for part in built)})"
    return f"an object of type {type(built).__name__}"


def _in_one_line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_in_one_line(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_in_one_line, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
