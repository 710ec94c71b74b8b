"""Everything that needs a GPU, in one command that ends in time: tests, sanitizer, benchmarks.

    python -m benchmarks.gpu_suite --out DIR --minutes 30                       # all parts
    python -m benchmarks.gpu_suite --out DIR --part tests --part sanitizer
    python -m benchmarks.gpu_suite --out DIR --device cpu --tiny                # try it without a GPU

It runs from a checkout, elropt need not be installed, nor need there be a network. Packages that the machine lacks can
be carried in a folder `.vendor` in the checkout, into which pure-Python
wheels (hypothesis, sortedcontainers, torch_optimi, pytorch_optimizer …) were unpacked, as by
`pip install --target .vendor --no-deps …`: it is put in front of PYTHONPATH. Tests whose modules are missing count as
failed and do not keep the others from running.

Each part is a process with a time limit, ended with all its children when that is over; what it has written stays. DIR
gets `summary.json` (for each part its command, exit code, seconds and the end of what it printed), `suite.log` (all of
that) and the result files of the benchmarks. A later call with the same DIR adds its parts; one that runs again
replaces its result.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from benchmarks.step_time import OPTIMIZERS, check, check_device, write
from elropt import env_report

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 40
LEAST_SECONDS = 15.0  # a part is not started with less than that left

PYTEST = [
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"),
    *("-W", "default"),  # what packages there warn of is not what is tested here
]
SANITIZER_TESTS = [
    "tests/kernels/test_kernels.py",
    "tests/kernels/test_step.py",
    "-k",
    "three_steps or same_bits or non_finite or autograd or launch_for_each_combination or whatever_the_groups",
]


class Context(NamedTuple):
    """What parts need to know."""

    out: Path
    device: str
    tiny: bool


class Part(NamedTuple):
    """A part of the suite: its command, the minutes that it gets, and whether it needs a GPU."""

    command: Callable[[Context], list[str]]
    minutes: float
    gpu_only: bool = False


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of the benchmarks."""
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


def tests(context: Context) -> list[str]:
    """The tests of what runs on the device."""
    if context.tiny:
        return [*PYTEST, "tests/gpu"]
    # compiling is most of the work, and many processes can do it
    parallel = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    # a kernel that hangs must not take the others' time
    limited = (
        ["--timeout=60", "--timeout-method=thread"] if importlib.util.find_spec("pytest_timeout") else []
    )
    return [
        *("env", "OMP_NUM_THREADS=1"),
        *PYTEST,
        *parallel,
        *limited,
        "--tb=short",
        "--maxfail=100",
        "--ignore=tests/kernels/test_compile.py",  # needs no GPU, and compiles in each process
        "tests/gpu",
        "tests/kernels",
        "tests/test_contract.py",
        "tests/test_host_reads.py",
    ]


def sanitizer(tool: str) -> Callable[[Context], list[str]]:
    """Some of the kernel tests under a tool of compute-sanitizer; its findings make the exit code 99.

    Every tensor is an allocation of the driver's, so that memcheck sees what runs over its end.
    """
    sanitize = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "99"]
    sanitize += ["--report-api-errors", "no"]  # torch asks the driver for what may not be there
    return lambda _: ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *sanitize, *PYTEST, *SANITIZER_TESTS]


def step_time(context: Context) -> list[str]:
    """Times of the steps."""
    tiny = [
        "--workload",
        "tiny",
        "--optimizer",
        "torch-fused",
        "--optimizer",
        "elr-none",
        "--seconds",
        "0.05",
    ]
    out = ["--device", context.device, "--out", str(context.out / "step_time.json")]
    some = [word for name in OPTIMIZERS if name != "torch-compiled" for word in ("--optimizer", name)]
    return module("step_time", *out, *(tiny if context.tiny else some))


def compiled(context: Context) -> list[str]:
    """Times of torch's compiled SGD beside its fused one: slow to compile, so apart from the others."""
    chosen = ["--optimizer", "torch-fused", "--optimizer", "torch-compiled", "--workload", "resnet-50"]
    return module("step_time", "--out", str(context.out / "compiled.json"), *chosen)


def host(context: Context) -> list[str]:
    """CPU time of the steps."""
    out = ["--device", context.device, "--out", str(context.out / "host.json")]
    return module("step_time", "host", *out, "--seconds", "0.05" if context.tiny else "1")


def end_to_end(context: Context) -> list[str]:
    """Training steps."""
    tiny = ["--tiny", "--rounds", "2", "--steps", "1"] if context.tiny else []
    out = ["--device", context.device, "--out", str(context.out / "end_to_end.json")]
    return module("step_time", "end-to-end", *out, *tiny)


def accuracy(context: Context) -> list[str]:
    """A few short training runs on digits."""
    size = ["--seeds", "1", "--fresh-seeds", "1", "--lrs", "0.03", "--epochs", "1" if context.tiny else "10"]
    tiny = ["--model", "bn-mlp-4-w16", "--optimizer", "warmup", "--jobs", "1"] if context.tiny else []
    return module(
        "accuracy", "--device", context.device, "--out", str(accuracy_folder(context)), *size, *tiny
    )


def cifar(context: Context) -> list[str]:
    """ResNet-18 on CIFAR-10 as fast as it goes, one learning rate each: how long an epoch takes."""
    recipe = ["--data", "cifar10", "--model", "resnet-18", "--epochs", "8", "--batch-size", "512"]
    recipe += ["--augment", "--weight-decay", "5e-4", "--amp", "--channels-last", "--compile"]
    recipe += ["--seeds", "1", "--fresh-seeds", "1", "--fresh"]
    methods = [word for name in ("sgd", "warmup", "uniform") for word in ("--optimizer", name)]
    out = ["--device", context.device, "--out", str(context.out / "cifar")]
    return module("accuracy", *recipe, "--lrs", "0.2", *methods, *out)


def accuracy_folder(context: Context) -> Path:
    """Where `accuracy` writes; only its result file is kept."""
    return context.out / "accuracy"


PARTS = {
    "tests": Part(tests, 4),
    "memcheck": Part(sanitizer("memcheck"), 2, gpu_only=True),
    "racecheck": Part(sanitizer("racecheck"), 2, gpu_only=True),
    "kernels": Part(lambda c: module("kernels", "--out", str(c.out / "kernels.json")), 2, gpu_only=True),
    "sweep": Part(lambda c: module("kernels", "sweep", "--out", str(c.out / "sweep.json")), 4, gpu_only=True),
    "host": Part(host, 1),
    "end-to-end": Part(end_to_end, 2),
    "accuracy": Part(accuracy, 2),
    "cifar": Part(cifar, 5, gpu_only=True),
    "step-time": Part(step_time, 7),
    "compiled": Part(compiled, 3, gpu_only=True),
}
GROUPS = {"sanitizer": ("memcheck", "racecheck")}


def environment() -> dict[str, str]:
    """That of the parts: this checkout and `.vendor` come first on PYTHONPATH, kernels are not interpreted."""
    paths = [str(ROOT / ".vendor")] if (ROOT / ".vendor").is_dir() else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    variables.pop("TRITON_INTERPRET", None)
    return variables


def run_part(command: list[str], limit: float, log: Path) -> dict[str, Any]:
    """Run a command for at most `limit` seconds, its output appended to the log; ends its children too."""
    started = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(public(command))}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code, timed_out = process.wait(limit), False
        except subprocess.TimeoutExpired:
            code, timed_out = None, True
            process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
        finally:
            end_group(process)
    with log.open("rb") as output:
        output.seek(begin)
        printed = output.read().decode(errors="replace").replace(f"{ROOT}{os.sep}", "")
    return {
        "command": public(command),
        "rc": code,
        "timed_out": timed_out,
        "seconds": round(time.monotonic() - started, 1),
        "tail": printed.splitlines()[-TAIL_LINES:],
    }


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process and of the children in its group, which it leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def public(command: list[str]) -> list[str]:
    """A command without the paths of this machine."""
    shown = ["python" if word == sys.executable else word for word in command]
    return [Path(word).name if os.path.isabs(word) else word for word in shown]


def reason_to_skip(name: str, context: Context) -> str | None:
    """Why a part cannot run here, or None if it can."""
    if PARTS[name].gpu_only and not context.device.startswith("cuda"):
        return "needs a GPU"
    if name in GROUPS["sanitizer"] and shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on the PATH"
    return None


def run_suite(names: list[str], context: Context, minutes: float, console: Console) -> dict[str, Any]:
    """Run the parts one after the other; the summary is written after each."""
    deadline = time.monotonic() + 60 * minutes
    context.out.mkdir(parents=True, exist_ok=True)
    log = context.out / "suite.log"
    parts: dict[str, dict[str, Any]] = {}
    if (context.out / "summary.json").exists():
        parts = json.loads((context.out / "summary.json").read_text(encoding="utf-8"))["parts"]
    summary = {"kind": "suite", "env": env_report.collect(), "device": context.device, "parts": parts}
    for name in names:
        left = deadline - time.monotonic()
        skipped = reason_to_skip(name, context)
        if skipped is None and left < LEAST_SECONDS:
            skipped = f"{max(left, 0):.0f} s were left"
        if skipped is not None:
            parts[name] = {"skipped": skipped}
            console.print(f"{name}: skipped, {skipped}")
        else:
            limit = min(60 * PARTS[name].minutes, left)
            console.print(f"{name}: at most {limit:.0f} s …")
            part = parts[name] = run_part(PARTS[name].command(context), limit, log)
            end = "time is over" if part["timed_out"] else f"exit code {part['rc']}"
            for line in part["tail"]:
                console.print(f"    {line}", markup=False, highlight=False)
            console.print(f"{name}: {end}, {part['seconds']} s")
        if name == "accuracy":
            keep_accuracy(context)
        for unfinished in context.out.glob("*.part"):
            unfinished.unlink()
        write(context.out / "summary.json", summary)
    return summary


def keep_accuracy(context: Context) -> None:
    """Keep the result file of `accuracy`, not its plots."""
    folder = accuracy_folder(context)
    if (folder / "accuracy.json").exists():
        shutil.copy(folder / "accuracy.json", context.out / "accuracy.json")
    shutil.rmtree(folder, ignore_errors=True)


def main(
    out: Annotated[Path, typer.Option(help="Folder for all results.")],
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeatable; of {', '.join([*PARTS, *GROUPS])}. Default: all, in this order."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="For all parts together.")] = 9,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="The least of everything, to try it.")] = False,
) -> None:
    """Run the GPU tests and benchmarks, each part with a time limit.

    Example: python -m benchmarks.gpu_suite --out runs/gpu --part tests --part sanitizer --minutes 5
    """
    check(part or [], [*PARTS, *GROUPS], "part")
    check_device(device)
    names = [name for wanted in part or PARTS for name in GROUPS.get(wanted, (wanted,))]
    console = Console()
    summary = run_suite(names, Context(out.resolve(), device, tiny), minutes, console)
    for name, result in ((name, summary["parts"][name]) for name in names):
        state = result.get("skipped") or (
            "time is over" if result["timed_out"] else f"exit code {result['rc']}"
        )
        console.print(f"{name:12} {result.get('seconds', 0):6.1f} s  {state}")
    console.print(f"wrote {out}")
    if any(result.get("rc") != 0 for result in map(summary["parts"].get, names) if "skipped" not in result):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
