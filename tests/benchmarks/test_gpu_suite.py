"""The orchestration of the GPU suite, with small commands and on the CPU."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import gpu_suite
from benchmarks.gpu_suite import Context, Part, run_part, run_suite
from benchmarks.speed.optimizers import OPTIMIZERS
from benchmarks.speed.workloads import WORKLOADS

pytest_plugins = ["pytester"]

app = typer.Typer()
app.command()(gpu_suite.main)
QUIET = Console(quiet=True)
HERE = dict(os.environ)
FAR = 600.0  # seconds: a limit that no part reaches
ENV = {"torch": torch.__version__, "gpus": []}


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process that looks at the versions."""
    monkeypatch.setattr(gpu_suite, "describe", lambda variables: ENV)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


class Witness:
    """A FIFO that ends when the last process that has it open for writing is gone."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(self.reader, True)

    def child(self) -> str:
        """Code that starts a child which holds the FIFO open for ever, and has said so when it is through."""
        sleeper = "import os, sys, time; os.write(int(sys.argv[1]), b'!'); time.sleep(3600)"
        return (
            f"import os, subprocess, sys; fifo = os.open({str(self.path)!r}, os.O_WRONLY); "
            f"child = subprocess.Popen([sys.executable, '-c', {sleeper!r}, str(fifo)], pass_fds=[fifo]); "
        )

    def read(self) -> bytes:
        """What comes next; empty if nobody is left to write. A minute without either is a failure."""
        assert select.select([self.reader], [], [], 60.0)[0], "a child is still there"
        return os.read(self.reader, 1)


@pytest.fixture
def witness(tmp_path: Path) -> Iterator[Witness]:
    made = Witness(tmp_path / "fifo")
    yield made
    os.close(made.reader)


def test_exit_code_and_end_of_the_output(tmp_path: Path) -> None:
    code = "import sys; [print(i) for i in range(100)]; print('at the end', file=sys.stderr); sys.exit(3)"
    part = run_part([python(code)], FAR, tmp_path / "log", HERE)
    assert (part["rc"], part["timed_out"]) == (3, False)
    assert part["tail"][-1] == "at the end"
    assert len(part["tail"]) == gpu_suite.TAIL_LINES
    assert "\n0\n" in (tmp_path / "log").read_text()


def test_the_commands_of_a_part_run_one_after_the_other(tmp_path: Path) -> None:
    commands = [python("print('one'); raise SystemExit(3)"), python("print('FAILED two')")]
    part = run_part(commands, FAR, tmp_path / "log", HERE)
    assert (part["rc"], part["failed"], part["tail"][-1]) == (3, ["FAILED two"], "FAILED two")
    assert part["tail"].index("one") < len(part["tail"]) - 1


def test_a_part_that_takes_too_long_ends_with_its_children(
    tmp_path: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is over as soon as the child is there, however long that takes."""
    asked = []

    def ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
        asked.append(seconds)
        if len(asked) == 1:
            assert witness.read() == b"!"
            return False
        process.wait()
        return True

    monkeypatch.setattr(gpu_suite, "ends_within", ends_within)
    # started in the background of a shell, the tests would ignore SIGINT, and their children too
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heeds}; print('started', flush=True); {witness.child()}child.wait()"
    commands = [python(code), python("print('never')")]
    part = run_part(commands, FAR, tmp_path / "log", HERE)
    assert (part["rc"], part["timed_out"], part["tail"][2]) == (None, True, "started")
    assert "KeyboardInterrupt" in part["tail"][-1]  # it was asked before it was killed
    assert FAR - gpu_suite.GRACE_SECONDS - 60 < asked[0] <= FAR - gpu_suite.GRACE_SECONDS
    assert asked[1:] == [gpu_suite.GRACE_SECONDS]
    assert witness.read() == b""


def test_a_part_that_does_not_end_when_asked_is_killed(
    tmp_path: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []

    def ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
        answers.append(witness.read() if not answers else process.poll())
        return False

    monkeypatch.setattr(gpu_suite, "ends_within", ends_within)
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {witness.child()}child.wait()"
    part = run_part([python(code)], FAR, tmp_path / "log", HERE)
    assert (part["rc"], part["timed_out"]) == (None, True)
    assert answers == [b"!", None]  # the second time it was still there
    assert witness.read() == b""


def test_children_that_a_part_leaves_behind_are_ended(tmp_path: Path, witness: Witness) -> None:
    part = run_part([python(witness.child())], FAR, tmp_path / "log", HERE)
    assert part["rc"] == 0
    while witness.read():
        pass


def test_long_lines_are_cut_in_the_summary_alone(tmp_path: Path) -> None:
    part = run_part([python("print('FAILED ' + 'x' * 5000)")], FAR, tmp_path / "log", HERE)
    assert [len(line) for line in part["failed"]] == [gpu_suite.LINE_LENGTH]
    assert part["tail"][-1] == part["failed"][0]
    assert "x" * 5000 in (tmp_path / "log").read_text()


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("code", [0, 7])
def test_only_what_failed_is_shown(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(lambda _: [python(f"print('what it says'); raise SystemExit({code})")], FAR)
    monkeypatch.setattr(gpu_suite, "PARTS", {"part": part})
    console = Console(width=100)
    with console.capture() as captured:
        run_suite(["part"], Context(tmp_path, "cpu", True), FAR, console)
    assert f"part: exit code {code}, " in captured.get()
    assert ("what it says" in captured.get()) == (code != 0)


def test_trees_are_those_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a checkout that knows another commit, as long as the files are those."""

    def git(*arguments: str) -> str:
        options = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        command = ["git", *options, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert gpu_suite.trees() == {}
    git("init", "--quiet")
    for name in gpu_suite.SOURCES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.py").write_text(f"{name} = 1\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "before")
    (tmp_path / "kernels" / "file.py").write_text("kernels = 2\n")
    (tmp_path / "kernels" / "new.py").write_text("")
    found = gpu_suite.trees()
    assert git("status", "--porcelain").split() == ["M", "kernels/file.py", "??", "kernels/new.py"]
    git("add", ".")
    git("commit", "--quiet", "--message", "after")
    assert found == {name: git("rev-parse", f"HEAD:{name}") for name in gpu_suite.SOURCES}


@pytest.mark.usefixtures("described")
def test_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "good": Part(lambda _: [python("print('fine')")], FAR),
        "bad": Part(lambda _: [python("raise SystemExit(7)")], FAR),
        "for a gpu": Part(lambda _: [python("")], FAR, gpu_only=True),
    }
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    run_suite(list(parts), Context(tmp_path, "cpu", True), FAR, QUIET)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["env"]["torch"] == torch.__version__
    assert [part.get("rc") for part in summary["parts"].values()] == [0, 7, None]
    assert summary["parts"]["good"]["tail"][-1] == "fine"
    assert summary["parts"]["good"]["commands"] == [["python", "-c", "print('fine')"]]
    assert summary["parts"]["for a gpu"] == {"skipped": "needs a GPU"}
    log = (tmp_path / "suite.log").read_text()
    assert log.index("fine") < log.index("SystemExit")


@pytest.mark.usefixtures("described")
def test_parts_for_which_no_time_is_left_are_skipped(tmp_path: Path) -> None:
    summary = run_suite(["tests", "host"], Context(tmp_path, "cpu", True), 0, QUIET)
    assert [part["skipped"] for part in summary["parts"].values()] == ["0 s were left"] * 2


@pytest.mark.usefixtures("described")
def test_time_that_a_part_does_not_use_goes_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only parts move."""
    now = [1000.0]
    monkeypatch.setattr(gpu_suite.time, "monotonic", lambda: now[0])
    limits = {}

    def run_part(commands: list[list[str]], limit: float, *_: object) -> dict[str, object]:
        ((name, takes),) = commands
        limits[name] = limit
        now[0] += float(takes)
        return {"rc": 0, "timed_out": False, "seconds": 0.0, "failed": [], "tail": []}

    monkeypatch.setattr(gpu_suite, "run_part", run_part)
    takes = {"early": 20, "late": 145, "last": 1}
    parts = {n: Part(lambda _, n=n, t=t: [[n, str(t)]], 100) for n, t in takes.items()}
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    run_suite(list(parts), Context(tmp_path, "cpu", True), 250, QUIET)
    assert limits == {"early": 112, "late": 192, "last": 85}  # 250 s, not 312, for all


def test_the_calls_fit_their_time() -> None:
    """And do what matters most first."""
    sums = {
        call: gpu_suite.START_SECONDS + sum(gpu_suite.PARTS[name].seconds for name in names)
        for call, names in gpu_suite.CALLS.items()
    }
    assert sums["first"] <= 8 * 60
    assert sums["second"] <= 6 * 60
    for call, seconds in sums.items():
        assert f"| {call} call | {seconds:.0f} |" in (gpu_suite.__doc__ or "")
    for name, part in gpu_suite.PARTS.items():
        if any(name in names for names in gpu_suite.CALLS.values()):
            assert f"| `{name}` | {part.seconds:.0f} |" in (gpu_suite.__doc__ or "")


def test_at_most_eight_files_come_out(tmp_path: Path) -> None:
    for names in gpu_suite.CALLS.values():
        written = {"summary.json", "suite.log"}
        for name in names:
            for command in gpu_suite.PARTS[name].commands(Context(tmp_path, "cuda", False)):
                written |= {word for word in command if word.startswith(f"{tmp_path}/")}
        if "evidence" in names:
            stem = tmp_path / "evidence-gpu"
            written |= {f"{stem}{end}" for end in (".json", ".rows.jsonl", "-curves.png", "-lrs.png")}
        assert len(written) <= 8
        assert all(Path(path).parent in (tmp_path, Path()) for path in written)


def test_a_missing_sanitizer_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(tmp_path, "cuda", False)
    monkeypatch.setattr(gpu_suite, "sanitizer_program", lambda: None)
    assert gpu_suite.reason_to_skip("memcheck", context) == "compute-sanitizer is not installed"
    assert gpu_suite.reason_to_skip("kernels", context) is None


def test_the_tests_for_the_sanitizer_are_there() -> None:
    for test in gpu_suite.SANITIZER_TESTS:
        path, name = test.split("[")[0].split("::")
        assert f"def {name}(" in (gpu_suite.ROOT / path).read_text(encoding="utf-8")


def test_carried_packages_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "theirs")
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    paths = lambda: gpu_suite.environment()["PYTHONPATH"].split(os.pathsep)  # noqa: E731
    assert paths() == [str(tmp_path), "theirs"]
    (tmp_path / ".vendor").mkdir()
    assert paths() == [str(tmp_path / ".vendor"), str(tmp_path), "theirs"]
    assert "TRITON_INTERPRET" not in gpu_suite.environment()


def bare_checkout(folder: Path) -> Path:
    """A checkout of which nothing is installed."""
    for name in ("elropt", "kernels", "benchmarks", "tests"):
        source = gpu_suite.ROOT / name
        (folder / name).mkdir()
        for entry in source.iterdir():
            if entry.is_file():
                (folder / name / entry.name).write_bytes(entry.read_bytes())
    return folder


def test_a_bare_checkout_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """elropt and the benchmarks come from it; `-S` because elropt may be installed here."""
    checkout = bare_checkout(tmp_path)
    (checkout / "pyproject.toml").write_text("[tool.pytest.ini_options]\n", encoding="utf-8")
    (checkout / "tests" / "conftest.py").unlink()
    (checkout / "tests" / "test_import.py").write_text(
        "import elropt.kernels, benchmarks\n\n\n"
        "def test_it():\n    print(elropt.__file__, elropt.kernels.__file__, benchmarks.__file__)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu_suite, "ROOT", checkout)
    installed = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    monkeypatch.setenv("PYTHONPATH", installed)
    command = [sys.executable, "-S", *gpu_suite.PYTEST[1:], "-s", "tests/test_import.py"]
    part = run_part([command], FAR, tmp_path / "log", gpu_suite.environment())
    assert part["rc"] == 0, part["tail"]
    printed = (tmp_path / "log").read_text(encoding="utf-8")
    for name in ("elropt", "kernels", "benchmarks"):
        assert f"{checkout / name}{os.sep}" in printed
    assert not any(str(checkout) in line for line in part["tail"])


def test_tests_are_collected_without_hypothesis(pytester: pytest.Pytester) -> None:
    """Property tests are skipped, whatever their strategies look like; the others run."""
    stand_in = (gpu_suite.ROOT / "tests" / "without_hypothesis.py").read_text(encoding="utf-8")
    pytester.makepyfile(without_hypothesis=stand_in)
    pytester.makeconftest("import without_hypothesis\nwithout_hypothesis.install()\n")
    pytester.makepyfile(
        """
        import importlib.util, sys
        import pytest
        from hypothesis import example, given, settings
        from hypothesis import strategies as st

        numbers = st.one_of(st.integers(0, 3), st.builds(lambda n: n, st.sampled_from([1]))).map(abs)

        @st.composite
        def cases(draw):
            return draw(numbers)

        @pytest.mark.parametrize("k", [1, 2])
        @settings(deadline=None)
        @given(cases(), st.lists(numbers))
        @example(1, [])
        def test_property(k, case, numbers):
            raise AssertionError

        def test_other():
            for module in list(sys.modules.values()):  # as torch.library does
                assert isinstance(getattr(module, "__file__", None), str | None)
            assert importlib.util.find_spec("hypothesis").origin is None  # as torch._dynamo does
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, skipped=2)


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", gpu_suite.PARTS)
def test_commands_name_things_that_exist(name: str, tiny: bool, tmp_path: Path) -> None:
    for command in gpu_suite.PARTS[name].commands(Context(tmp_path, "cuda", tiny)):
        for word in command:
            assert not word.startswith("tests/") or (gpu_suite.ROOT / word.split("::")[0]).exists()
            if word.startswith("benchmarks."):
                module = gpu_suite.ROOT / word.replace(".", "/")
                assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    chosen = {*gpu_suite.STEPS, *gpu_suite.MORE_STEPS, *gpu_suite.PEERS}
    assert chosen <= set(OPTIMIZERS)
    assert set(gpu_suite.MORE_WORKLOADS) <= set(WORKLOADS)


@pytest.mark.usefixtures("described")
def test_a_second_call_adds_to_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: Part(lambda _, name=name: [python(f"print('{name}')")], FAR) for name in ("one", "two")}
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    context = Context(tmp_path, "cpu", True)
    for name in parts:
        run_suite([name], context, FAR, QUIET)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["parts"]) == ["one", "two"]
    assert "one" in (tmp_path / "suite.log").read_text()


@pytest.mark.slow
def test_the_suite_on_the_cpu(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--tiny"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"summary.json", "suite.log", "step_time.json", "host.json", "end_to_end.json"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["env"]["torch"] == torch.__version__
    rows = json.loads((tmp_path / "step_time.json").read_text())["rows"]
    names = [row["optimizer"] for row in rows]
    assert names == ["torch-fused", "elr-none", "timm-lars", "elr-angle"]


def test_unknown_parts(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--part", "nonsense"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "'nonsense' is not known; choose from compile" in result.output
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--call", "third"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "'third' is not known; choose from first, second" in result.output


def test_help_has_an_example() -> None:
    assert "Example: python -m benchmarks.gpu_suite" in CliRunner().invoke(app, ["--help"]).output
