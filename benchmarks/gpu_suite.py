"""Everything that needs a GPU, in two commands that end in time: tests, benchmarks, sanitizer.

    python -m benchmarks.gpu_suite --out DIR --call first                # 7 minutes, at most 8
    python -m benchmarks.gpu_suite --out DIR --call second               # at most 6
    python -m benchmarks.gpu_suite --out DIR --part tests --part kernels # some parts
    python -m benchmarks.gpu_suite --out DIR --device cpu --tiny         # try it without a GPU

It runs from a checkout. elropt need not be installed, and there need not be a network. Packages that the machine lacks
can be carried in a folder `.vendor` in the checkout (`pip install --target .vendor --no-deps …`), which comes first on
PYTHONPATH. A peer that is missing is a row that says so.

Each part is a process with a limit, ended with all its children when that is over; what it has written stays. Time that
a part does not use goes to the next. What is short or matters most comes first. DIR gets at most eight files:
`summary.json` (for each part its command, exit code, seconds, what failed and the end of what it printed; `trees` says
which code ran, whatever the commit of the checkout is), `suite.log` (all that was printed) and the result files of the
benchmarks. A later call with the same DIR adds its parts; one that runs again replaces its result.

Where the time goes, with 16 cores and an H200. *Measured*: a first call with torch 2.11 and triton 3.6. There `host`
had other steps, and `end-to-end` took 20 rounds of 11 steps where it now takes 100 of 3. The parts of the second call
were measured one by one.

| part | limit, s | measured, s | what it does |
|---|---:|---:|---|
| start | 12 | 10.1 | versions and GPU, in a process of its own |
| `compile` | 30 | 22.8 | 43 kernels of the benchmarks, in 12 processes |
| `tests` | 65 | 46.5 | tests/gpu and tests/kernels, in 12 processes |
| `step-time` | 60 | 45.8 | 12 rows on ResNet-50 and ViT-B/16 |
| `kernels` | 30 | 20.8 | 112 rows |
| `host` | 50 | – | optimizers in turns: 100 rounds of 10 steps on three workloads |
| `more-tests` | 60 | 45.3 | contract and host reads, in 12 processes |
| `end-to-end` | 75 | 56.3 | 4 · (10 + 100 · 3) steps of 27 ms = 33, cuDNN's choices, start |
| `more-steps` | 98 | 134.9 | 22 rows, as many as there is time for, those on the large tensors first |
| first call | 480 | about 425 | |
| start | 12 | | |
| `racecheck` | 75 | – | 6 tests, without the cooperative launch, which does not end under racecheck |
| `memcheck` | 50 | 39.1 | 7 tests |
| `compile-sweep` | 30 | 20.9 | 44 kernels |
| `sweep` | 45 | 30.2 | 88 settings of 2 kernels; the large tensors first |
| `evidence` | 148 | – | ResNet-20 and ResNet-18 at 32×32, 48 runs or more, 8 at a time; needs images, see below |
| second call | 360 | | |

`evidence` reads `cifar10-train-1.npz`, `cifar10-train-2.npz` and `cifar10-test.npz` from the folder that ELROPT_DATA
names, else from `.data` in the checkout. What it has measured when time is over is in `evidence-gpu.rows.jsonl`.
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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from benchmarks.common.command_line import one_of
from benchmarks.common.files import remove_unfinished, write_json

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("elropt", "kernels", "benchmarks", "tests")
TAIL_LINES = 40
SHOWN_LINES = 15  # of a part that failed
LINE_LENGTH = 300  # of what is kept in the summary
START_SECONDS = 12.0
LEAST_SECONDS = 12.0  # a part is not started with less than that left
GRACE_SECONDS = 5.0  # between asking a part to end and ending it
PROCESSES = 12

# PYTHONPATH is what counts: pytest must not put the checkout in front of it.
PYTEST = [
    *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=append"),
    *("--continue-on-collection-errors", "--tb=short", "-m", "not slow"),
    *("-W", "default"),  # what packages there warn of is not what is tested here
]
COOPERATIVE_TEST = "tests/gpu/test_device.py::test_one_launch_and_two_launches_agree[True-warmup-layer]"
SANITIZER_TESTS = [
    "tests/gpu/test_device.py::test_one_launch_and_two_launches_agree[False-uniform-layer]",
    "tests/gpu/test_device.py::test_runs_are_repeatable_to_the_bit",
    "tests/kernels/test_fused_step.py::test_a_launch_for_each_combination_of_dtypes",
    "tests/kernels/test_kernels.py::test_measure_gives_the_same_bits_every_time",
    "tests/kernels/test_kernels.py::test_non_finite_gradients_show_up_in_their_row_alone",
]
STEPS = ("torch-fused", "torch-foreach", "elr-none", "elr-warmup", "elr-uniform", "elr-project")
TINY_STEPS, MORE_TINY_STEPS = ("torch-fused", "elr-none"), ("timm-lars", "elr-angle")
MORE_STEPS = ("torch-fused", "elr-none", "elr-warmup", "elr-uniform")
MORE_WORKLOADS = ("decoder-1b", "resnet-56", "2000-tensors", "decoder-1b-bf16")
PEERS = ("timm-lars", "timm-sgdp", "elr-angle", "elr-sphere", "optimi-sgd", "pytorch-optimizer-lars")


class Context(NamedTuple):
    """What parts need to know; `seconds` is what the part at hand has."""

    out: Path
    device: str
    tiny: bool
    seconds: float = 60.0


class Part(NamedTuple):
    """A part of the suite: its commands, the seconds that it gets, and whether it needs a GPU."""

    commands: Callable[[Context], list[list[str]]]
    seconds: float
    gpu_only: bool = False


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of `benchmarks.speed`."""
    return [sys.executable, "-m", f"benchmarks.speed.{name}", *arguments]


def repeated(option: str, values: tuple[str, ...]) -> list[str]:
    """An option that is given once for each value."""
    return [word for value in values for word in (option, value)]


def compile_ahead(*arguments: str) -> Callable[[Context], list[list[str]]]:
    """The kernels of the benchmarks, into Triton's cache, by many processes."""
    return lambda _: [module("compile_ahead", "--processes", str(PROCESSES), *arguments)]


def tests(*paths: str) -> Callable[[Context], list[list[str]]]:
    """Tests of what runs on the device. Compiling is most of the work, and many processes can do it."""

    def commands(context: Context) -> list[list[str]]:
        if context.tiny:
            return [[*PYTEST, *paths[:1]]]
        parallel = ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
        # a kernel that hangs must not take the others' time
        limited = (
            ["--timeout=40", "--timeout-method=thread"] if importlib.util.find_spec("pytest_timeout") else []
        )
        return [["env", "OMP_NUM_THREADS=1", *PYTEST, *parallel, *limited, "--maxfail=100", *paths]]

    return commands


def sanitizer(tool: str, *more_tests: str) -> Callable[[Context], list[list[str]]]:
    """`SANITIZER_TESTS` and more under a tool of compute-sanitizer; its findings make the exit code 99.

    Every tensor is an allocation of the driver's, so that memcheck sees what runs over its end.
    """
    options = ["--tool", tool, "--error-exitcode", "99"]
    options += ["--report-api-errors", "no"]  # torch asks the driver for what may not be there

    def commands(_: Context) -> list[list[str]]:
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        program = sanitizer_program() or "compute-sanitizer"
        return [[*uncached, program, *options, *PYTEST, *SANITIZER_TESTS, *more_tests]]

    return commands


def sanitizer_program() -> str | None:
    """compute-sanitizer on the PATH, or where CUDA puts it."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )


def steps(context: Context, workloads: tuple[str, ...], optimizers: tuple[str, ...], *more: str) -> list[str]:
    """The command that times steps; with `tiny` they are those of a few small tensors."""
    if context.tiny:
        workloads, more = ("tiny",), ("--seconds", "0.05", *more)
    out = ["--device", context.device, "--out", str(context.out / "step_time.json")]
    chosen = repeated("--workload", workloads) + repeated("--optimizer", optimizers)
    return module("step_time", *out, *chosen, *more)


def step_time(context: Context) -> list[list[str]]:
    """Times of the steps that matter most."""
    return [steps(context, ("resnet-50", "vit-b-16"), TINY_STEPS if context.tiny else STEPS)]


def more_steps(context: Context) -> list[list[str]]:
    """Times of the other steps, added to the same file; no row is started that could not end."""
    if context.tiny:
        return [steps(context, (), MORE_TINY_STEPS, "--add")]
    # what is left for the peers once the other workloads are done, and at least a third
    others, peers = (f"{max(context.seconds * share - 12, 1):.0f}" for share in (2 / 3, 1 / 3))
    return [
        steps(context, MORE_WORKLOADS, MORE_STEPS, "--add", "--budget", others),
        steps(context, ("resnet-50",), PEERS, "--add", "--budget", peers),
    ]


def host(context: Context) -> list[list[str]]:
    """CPU time of the steps."""
    out = ["--device", context.device, "--out", str(context.out / "host.json")]
    tiny = ["--workload", "160x4", "--rounds", "2"] if context.tiny else []
    return [module("step_time", "host", *out, *tiny)]


def end_to_end(context: Context) -> list[list[str]]:
    """Training steps."""
    tiny = ["--tiny", "--rounds", "2", "--steps", "1"] if context.tiny else []
    out = ["--device", context.device, "--out", str(context.out / "end_to_end.json")]
    return [module("step_time", "end-to-end", *out, *tiny)]


def evidence(context: Context) -> list[list[str]]:
    """Accuracy at 32×32; rows of runs that are done stay when time is over."""
    size = ["--size", "tiny"] if context.tiny else ["--size", "gpu", "--jobs", "8"]
    return [
        [
            *(sys.executable, "-m", "benchmarks.studies", "evidence", *size),
            *("--device", context.device, "--out", str(context.out)),
        ]
    ]


PARTS = {
    "compile": Part(compile_ahead(), 30, gpu_only=True),
    "tests": Part(
        tests("tests/gpu", "tests/kernels/test_fused_step.py", "tests/kernels/test_kernels.py"), 65
    ),
    "step-time": Part(step_time, 60),
    "kernels": Part(lambda c: [module("kernels", "--out", str(c.out / "kernels.json"))], 30, gpu_only=True),
    "host": Part(host, 50),
    "more-tests": Part(tests("tests/test_host_reads.py", "tests/test_contract.py"), 60, gpu_only=True),
    "end-to-end": Part(end_to_end, 75),
    "more-steps": Part(more_steps, 98),
    # under racecheck the programs of a cooperative launch wait for one another without end
    "racecheck": Part(sanitizer("racecheck"), 75, gpu_only=True),
    "memcheck": Part(sanitizer("memcheck", COOPERATIVE_TEST), 50, gpu_only=True),
    "compile-sweep": Part(compile_ahead("--sweep"), 30, gpu_only=True),
    "sweep": Part(
        lambda c: [module("kernels", "sweep", "--out", str(c.out / "sweep.json"))], 45, gpu_only=True
    ),
    "evidence": Part(evidence, 148),
}
CALLS = {
    "first": (
        *("compile", "tests", "step-time", "kernels", "host", "more-tests", "end-to-end", "more-steps"),
    ),
    "second": ("racecheck", "memcheck", "compile-sweep", "sweep", "evidence"),
}
SANITIZERS = ("memcheck", "racecheck")


def environment() -> dict[str, str]:
    """Environment of the parts: `.vendor` and this checkout come before installed packages; images may be in `.data`;
    kernels are compiled."""
    paths = [str(ROOT / ".vendor")] if (ROOT / ".vendor").is_dir() else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",  # `python -m` leaves the working directory out
        "PYTHONUNBUFFERED": "1",
        "NVIDIA_TF32_OVERRIDE": "0",  # tests compare runs in float32
        "COLUMNS": "200",
    }
    if (ROOT / ".data").is_dir():
        variables.setdefault("ELROPT_DATA", str(ROOT / ".data"))
    variables.pop("TRITON_INTERPRET", None)
    return variables


def describe(variables: dict[str, str]) -> dict[str, Any]:
    """`elropt.env_report` of the parts' environment."""
    code = "import json; from elropt import env_report; print(json.dumps(env_report.collect()))"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if printed.returncode != 0:
        raise typer.BadParameter(f"elropt cannot be imported here:\n{printed.stderr}")
    return json.loads(printed.stdout.splitlines()[-1])


def trees() -> dict[str, str]:
    """git's ids of the folders as they are on the disk; empty without git.

    `git rev-parse COMMIT:kernels` gives the same for the commit that was measured, also where the checkout is of
    another commit and counts as changed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # an index and objects of its own: the checkout stays as it is
        own = {"GIT_INDEX_FILE": f"{folder}/index", "GIT_OBJECT_DIRECTORY": folder}

        def git(*arguments: str, **variables: str) -> str:
            command = ["git", *arguments]
            run = subprocess.run(
                command, cwd=ROOT, env=os.environ | variables, capture_output=True, check=True
            )
            return run.stdout.decode().strip()

        try:
            git("add", "--all", *SOURCES, **own)
            return {name: git("write-tree", f"--prefix={name}/", **own) for name in SOURCES}
        except (OSError, subprocess.CalledProcessError):
            return {}


def ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the end of a process, at most so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def run_part(commands: list[list[str]], limit: float, log: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Run commands one after the other for at most `limit` seconds, their output appended to the log.

    Ends their children too. When time is over, the last one is asked to end (so that pytest says what has failed so
    far) `GRACE_SECONDS` before it is ended.
    """
    started = time.monotonic()
    code, timed_out = 0, False
    with log.open("ab") as output:
        begin = output.tell()
        for command in commands:
            output.write(f"\n$ {' '.join(public(command))}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                left = limit - (time.monotonic() - started)
                timed_out = not ends_within(process, max(left - GRACE_SECONDS, 0))
                if timed_out:
                    process.send_signal(signal.SIGINT)
                    ends_within(process, GRACE_SECONDS)
            finally:
                end_group(process)
            if timed_out:
                break
            code = process.returncode or code
    with log.open("rb") as output:
        output.seek(begin)
        printed = output.read().decode(errors="replace")
    for folder in filter(None, [*variables.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)]):
        printed = printed.replace(f"{folder}{os.sep}", "").replace(folder, ".")
    lines = [line[:LINE_LENGTH] for line in printed.splitlines()]
    return {
        "commands": [public(command) for command in commands],
        "rc": None if timed_out else code,
        "timed_out": timed_out,
        "limit": round(limit, 1),
        "seconds": round(time.monotonic() - started, 1),
        "failed": [line for line in lines if line.startswith(("FAILED ", "ERROR "))],
        "tail": lines[-TAIL_LINES:],
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
    if name in SANITIZERS and sanitizer_program() is None:
        return "compute-sanitizer is not installed"
    return None


def run_suite(names: list[str], context: Context, seconds: float, console: Console) -> dict[str, Any]:
    """Run the parts one after the other; the summary is written after each.

    Each has to end by the time at which it would if all before it took their limits, and by `seconds` from now.
    """
    begin = time.monotonic()
    context.out.mkdir(parents=True, exist_ok=True)
    log = context.out / "suite.log"
    summary_file = context.out / "summary.json"
    parts: dict[str, dict[str, Any]] = {}
    if summary_file.exists():
        parts = json.loads(summary_file.read_text(encoding="utf-8"))["parts"]
    variables = environment()
    env = describe(variables)
    if context.device.startswith("cuda") and not env["gpus"]:
        raise typer.BadParameter("there is no CUDA device; --device cpu --tiny tries the suite without one")
    summary = {"kind": "suite", "env": env, "trees": trees(), "device": context.device, "parts": parts}
    scheduled = begin + START_SECONDS
    for name in names:
        scheduled += PARTS[name].seconds
        left = min(scheduled, begin + seconds) - time.monotonic()
        skipped = reason_to_skip(name, context)
        if skipped is None and left < LEAST_SECONDS:
            skipped = f"{max(left, 0):.0f} s were left"
        if skipped is not None:
            parts[name] = {"skipped": skipped}
            console.print(f"{name}: skipped, {skipped}")
        else:
            console.print(f"{name}: at most {left:.0f} s …")
            commands = PARTS[name].commands(context._replace(seconds=left))
            part = parts[name] = run_part(commands, left, log, variables)
            console.print(f"{name}: {outcome(part)}, {part['seconds']} s")
            if part["rc"] != 0:
                for line in [*part["failed"], *part["tail"][-SHOWN_LINES:]]:
                    console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)
        remove_unfinished(context.out)
        write_json(summary_file, summary, indent=1)
    return summary


def outcome(part: dict[str, Any]) -> str:
    """How a part ended."""
    return part.get("skipped") or ("time is over" if part["timed_out"] else f"exit code {part['rc']}")


def main(
    out: Annotated[Path, typer.Option(help="Folder for all results.")],
    call: Annotated[
        str,
        typer.Option(
            callback=one_of(CALLS), help="first or second: which parts, for at most 8 or 6 minutes."
        ),
    ] = "first",
    part: Annotated[
        list[str] | None,
        typer.Option(callback=one_of(PARTS), help=f"Repeatable, instead of --call; of {', '.join(PARTS)}."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="For all parts together; default: the sum of their limits.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="The least of everything, to try it.")] = False,
) -> None:
    """Run the GPU tests and benchmarks, each part with a time limit.

    Example: python -m benchmarks.gpu_suite --out runs/gpu --call first
    """
    names = list(part or CALLS[call])
    seconds = START_SECONDS + sum(PARTS[name].seconds for name in names) if minutes is None else 60 * minutes
    console = Console()
    summary = run_suite(names, Context(out.resolve(), device, tiny), seconds, console)
    for name in names:
        result = summary["parts"][name]
        console.print(f"{name:13} {result.get('seconds', 0):6.1f} s  {outcome(result)}")
    console.print(f"wrote {out}")
    if any(result.get("rc") != 0 for result in map(summary["parts"].get, names) if "skipped" not in result):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
