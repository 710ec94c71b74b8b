"""The `elropt` command."""

import datetime
import importlib
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import elropt
from elropt import dynamics
from elropt.cli import app

from .test_run_history import record, record_run

TARGET = """
import torch
from torch import nn
import torch.nn.functional as F

def net(depth=3):
    layers = [nn.Flatten(), nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 5))

def with_inputs():
    return net(), torch.randn(16, 12)

def with_loss():
    return net(), (torch.randn(16, 12),), lambda y: y.square().mean()

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, a, b):
        return self.net(torch.cat([a, b], 1))

def images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def half():
    return net().bfloat16()

def plain():
    return nn.Linear(12, 5)

def fails():
    raise KeyError("no such thing")

def four():
    return 1, 2, 3, 4

def text():
    return "a model"

def bad_loss():
    return net(), torch.randn(16, 12), "mse"

model = net()
number = 3
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file with factories; imports leave no trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_models.py").write_text(TARGET)
    yield "my_models.py"
    for name in ("my_models", "_inspected_my_models"):
        sys.modules.pop(name, None)


def run(*args: object, code: int = 0) -> str:
    """What the command prints on both streams, in one line."""
    result = CliRunner().invoke(app, list(map(str, args)), env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


def test_inspect_prints_the_report_and_writes_it(target: str, tmp_path: Path) -> None:
    output = run("inspect", f"{target}:with_loss", "--lr", 0.5, "--momentum", 0, "--json", "report.json")

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert list(report["weights"]) == ["1.weight", "4.weight", "7.weight", "10.weight"]
    assert [weight["tracked"] for weight in report["weights"].values()] == [True, True, True, False]
    assert (report["lr"], report["momentum"]) == (0.5, 0)
    for name, weight in report["weights"].items():
        assert name in output
        reason = "no: its scale matters" if weight["reason"].startswith("not:") else weight["reason"]
        assert reason in output
        for key in ("weight_norm", "grad_norm", "relative_grad", "elr"):
            assert f"{weight[key]:.3g}" in output
    for key in ("elr_spread", "log_elr_std", "balance_lr", "monotone_lr"):
        assert f"{report[key]:.3g}" in output
    assert "At lr = 0.5 the first step of SGD turns the fastest layer" in output


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("net", ["--input-shape", "16,12"]),
        ("net", ["--input-shape", "16,3,2,2"]),
        ("model", ["--input-shape", "16,12"]),
        ("half", ["--input-shape", "16,12"]),
        ("TwoInputs", ["--input-shape", "16,4", "--input-shape", "16,8"]),
        ("with_inputs", []),
    ],
)
def test_inspect_takes_what_the_help_says(target: str, factory: str, options: list[str]) -> None:
    assert "ELR spread" in run("inspect", f"{target}:{factory}", *options)


def test_inspect_takes_a_module_by_name(target: str) -> None:
    assert "ELR spread" in run("inspect", "my_models:with_inputs")


def test_inspect_is_seeded(target: str) -> None:
    def inspect(seed: int) -> str:
        return run("inspect", f"{target}:net", "--input-shape", "16,12", "--seed", seed)

    assert inspect(3) == inspect(3)
    assert inspect(3) != inspect(4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["my_models.py"], "'my_models.py' is not PKG.MODULE:FACTORY"),
        (["nowhere.models:net"], "cannot import nowhere.models: ModuleNotFoundError"),
        (["other.py:net"], "there is no file other.py"),
        (["my_models.py:nets"], "nets does not exist in my_models.py, which has TwoInputs, bad_loss"),
        (["my_models.py:number"], "number is not callable in my_models.py"),
        (["my_models.py:fails"], "my_models.py:fails() failed: KeyError in my_models.py: 'no such thing'"),
        (["my_models.py:text"], "returned an object of type str; it must return a model"),
        (["my_models.py:four"], "returned (int, int, int, int); it must return a model"),
        (["my_models.py:bad_loss"], "a loss of type str"),
        (["my_models.py:net"], "returns no inputs: give --input-shape"),
        (["my_models.py:with_inputs", "--input-shape", "16,12"], "leave out --input-shape"),
        (["my_models.py:net", "--input-shape", "16x12"], "--input-shape 16x12: not comma-separated numbers"),
        (["my_models.py:net", "--input-shape", "16,0"], "every size must be at least 1"),
        (["my_models.py:net", "--input-shape", "16,13"], "shapes cannot be multiplied"),
        (["my_models.py:net", "--input", "int64:16,12"], "integers need a HIGH"),
        (["my_models.py:net", "--input", "float32:16,12:3"], "HIGH is for integers only"),
        (["my_models.py:net", "--input", "uint8:16,12:300"], "HIGH must be between 1 and 255"),
        (["my_models.py:net", "--input", "text:16,12"], "text:16,12: not [NAME=]DTYPE:SHAPE[:HIGH]"),
        (["my_models.py:net", "--input", "int64:16,12:5,9"], "HIGH is one number, not 5,9"),
        (
            ["my_models.py:net", "--input", "x=float32:16,12", "--input", "x=float32:16,12"],
            "x is given twice",
        ),
        (["my_models.py:net", "--input", "x=float32:16,12"], "unexpected keyword argument 'x'"),
        (["my_models.py:with_inputs", "--input", "float32:16,12"], "leave out --input"),
        (["my_models.py:images", "--input-shape", "8,3,6,6"], "give a loss of your own"),
        (["my_models.py:with_inputs", "--lr", "-1"], "lr=-1.0 is not valid"),
        (["my_models.py:with_inputs", "--momentum", "1"], "momentum=1.0 is not valid"),
        (["my_models.py:with_inputs", "--device", "toaster"], "--device toaster"),
        (["my_models.py:with_inputs", "--json", "no/such/folder.json"], "cannot write no/such/folder.json"),
    ],
)
def test_inspect_says_what_is_wrong(target: str, args: list[str], message: str) -> None:
    assert message in run("inspect", *args, code=2)


def test_that_nothing_is_scale_invariant_is_an_answer(target: str) -> None:
    output = run("inspect", f"{target}:plain", "--input-shape", "16,12", code=0)
    assert "No weight is scale-invariant" in output
    assert "error" not in output
    assert "spread" not in output


LANGUAGE_MODEL = """
class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, 16), nn.LayerNorm(16)
        self.a_projection_with_a_long_name = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 50)
    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.norm(self.embedding(input_ids))
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        logits = self.head(self.norm(self.a_projection_with_a_long_name(x)))
        if labels is None:
            return {"hidden": x, "logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

def with_batch():
    ids = torch.randint(50, (4, 8))
    return LanguageModel(), {"input_ids": ids, "labels": ids}

def zero_gain():
    model = net(4)
    nn.init.zeros_(model[8].weight)
    return model
"""


@pytest.mark.parametrize(
    ("factory", "inputs"),
    [
        ("LanguageModel", ["int64:4,8:50"]),
        ("LanguageModel", ["input_ids=int32:4,8:50", "attention_mask=bool:4,8"]),
        ("with_batch", []),
    ],
)
def test_inspect_takes_token_models(target: str, factory: str, inputs: list[str]) -> None:
    path = Path(target)
    path.write_text(path.read_text() + LANGUAGE_MODEL)
    options = [option for spec in inputs for option in ("--input", spec)]
    output = run("inspect", f"{target}:{factory}", *options, "--json", "report.json")
    assert "ELR spread" in output
    weights = json.loads(Path("report.json").read_text())["weights"]
    assert {name: weight["invariance"] for name, weight in weights.items()} == {
        "embedding.weight": "channel",
        "a_projection_with_a_long_name.weight": "tensor",
        "head.weight": None,
    }
    assert "token ids by --input" in run("inspect", f"{target}:LanguageModel", "--input-shape", "4,8", code=2)


def test_weights_behind_a_zero_gain_are_named_and_measured_with_noise(target: str) -> None:
    path = Path(target)
    path.write_text(path.read_text() + LANGUAGE_MODEL)
    options = ["inspect", f"{target}:zero_gain", "--input-shape", "16,12"]
    output = run(*options)
    assert re.search(r"their gradient is zero: [^:]*7\.weight.*initialized to zero.*--perturb", output)
    assert "gradient is zero" not in run(*options, "--perturb", "0.1")


WIDE_MODEL = """
class WideModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a_block_with_a_name_that_is_so_long_that_it_wraps = nn.Linear(12, 512)
        self.head = nn.Linear(512, 5)
        self.first = nn.Linear(12, 12, bias=False)
        self.norm, self.last = nn.BatchNorm1d(12), nn.LayerNorm(512)
    def forward(self, x):
        hidden = self.a_block_with_a_name_that_is_so_long_that_it_wraps(self.norm(self.first(x)).relu())
        return self.head(self.last(hidden))
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_inspect_is_readable_at_80_columns(
    target: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(target)
    path.write_text(path.read_text() + LANGUAGE_MODEL)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        app(["inspect", f"{target}:with_batch"])
    assert exit_.value.code == 0
    stream.flush()
    lines = stream.buffer.getvalue().decode(encoding).splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert any("a_projection_with_a_long_name" in line and "as a whole" in line for line in lines)
    assert not any("?" in line for line in lines)


@pytest.mark.parametrize("columns", [120, 135, 150])
def test_the_reason_why_a_weight_is_not_tracked_wraps(target: str, columns: int) -> None:
    path = Path(target)
    path.write_text(path.read_text() + WIDE_MODEL)
    options = ["inspect", f"{target}:WideModel", "--input-shape", "16,12"]
    result = CliRunner().invoke(app, options, env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= columns
    cells = [[cell.strip() for cell in line.split("│")[1:4]] for line in lines if line.startswith("│")]
    said = "".join(reason + " " for _, _, reason in filter(lambda row: len(row) == 3, cells))
    name = "a_block_with_a_name_that_is_so_long_that_it_wraps"
    assert "".join(said.split()) == "".join(
        f"no: only jointly with '{name}.bias' no: its scale matters yes: each output channel on its own".split()
    )


def table_rows(output: str) -> list[list[float | None]]:
    """The rows of numbers of a rich table that was printed in one line."""
    cells = [[cell.strip() for cell in row.split("│")[1:6]] for row in re.findall(r"(?:│[^│]*){5}│", output)]
    return [[float(cell) if cell else None for cell in row] for row in cells]


@pytest.mark.parametrize(
    ("options", "lr"),
    [
        (["--lr", "0.02"], 0.02),
        ([], lambda E: dynamics.balance_lr(E)),
        (["--lr", "monotone"], lambda E: dynamics.monotone_lr(E)),
        (["--lr", "balance", "--momentum", "0.9"], lambda E: 0.1 * dynamics.balance_lr(E)),
    ],
)
def test_simulate_prints_the_model(options: list[str], lr: float | Callable) -> None:
    momentum = 0.9 if "--momentum" in options else 0.0
    E = dynamics.simulate([100, 10, 1], lr, 4, momentum)
    rows = table_rows(run("simulate", "--e0", "100,10,1", "--steps", 4, *options))
    assert [row[0] for row in rows] == [0, 1, 2, 3, 4]
    for row, e in zip(rows, E, strict=True):
        assert row[2:] == pytest.approx([e.max(), e.min(), e.max() / e.min()], rel=6e-3)
        if row[1] is not None:
            assert row[1] == pytest.approx(lr(e) if callable(lr) else lr, rel=6e-3)
    assert rows[-1][1] is None


def test_simulate_builds_layers_from_depth_and_factor() -> None:
    by_factor = run("simulate", "--depth", 4, "--factor", 3, "--weight-decay", 0.01)
    assert by_factor == run("simulate", "--e0", "27,9,3,1", "--weight-decay", 0.01)
    assert by_factor != run("simulate", "--e0", "27,9,3,1")


def test_simulate_shortens_long_runs_and_keeps_their_ends() -> None:
    steps = [row[0] for row in table_rows(run("simulate", "--e0", "9,1", "--lr", "0.1", "--steps", 1000))]
    assert len(steps) <= 30
    assert (steps[0], steps[-1]) == (0, 1000)
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("name", ["spread.png", "spread.svg"])
def test_simulate_plots(tmp_path: Path, name: str) -> None:
    output = run("simulate", "--e0", "100,1", "--out", tmp_path / name)
    assert f"wrote {tmp_path / name}" in output
    assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --e0"),
        (["--depth", "3"], "--depth with --factor"),
        (["--e0", "3,1", "--depth", "3"], "not both"),
        (["--e0", "3;1"], "--e0 3;1: not comma-separated numbers"),
        (["--e0", "3,-1"], "E0 must be positive and finite, got -1.0"),
        (["--depth", "0", "--factor", "2"], "--depth 0"),
        (["--depth", "3", "--factor", "-2"], "--factor -2"),
        (["--depth", "9999", "--factor", "20"], "positive and finite, got inf"),
        (["--e0", "3,1", "--lr", "fast"], "--lr fast: not comma-separated numbers"),
        (["--e0", "3,1", "--lr", "0.1,0.2"], "--lr 0.1,0.2: give one number"),
        (["--e0", "3,1", "--lr", "-1"], "finite and 0 or more, got -1.0"),
        (["--e0", "3", "--lr", "monotone"], "at least 2 layers"),
        (["--e0", "3,1", "--steps", "-1"], "steps must be 0 or more"),
        (["--e0", "3,1", "--momentum", "1"], "momentum must be below 1"),
        (["--e0", "3,1", "--out", "plot.jpg"], "'plot.jpg' has the suffix '.jpg'"),
    ],
)
def test_simulate_says_what_is_wrong(options: list[str], message: str) -> None:
    assert message in run("simulate", *options, code=2)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return record_run(tmp_path / "run.jsonl")


def test_plot_writes_beside_the_run_or_where_it_is_told(recorded: Path, tmp_path: Path) -> None:
    assert "wrote" in run("plot", recorded)
    assert recorded.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    run("plot", recorded, "--out", tmp_path / "new" / "run.svg")
    assert "<svg" in (tmp_path / "new" / "run.svg").read_text()


def test_plot_draws_gaps_and_says_what_it_left_out(recorded: Path) -> None:
    recorded.write_text(record(9, a={}) + record(0, a={"elr": None}) + record(5, a={}, b={}) + '{"st')
    output = run("plot", recorded)
    assert "note: " in output
    assert "line 4: cut off, skipped" in output
    assert "holds 2 runs" in output


def test_plot_says_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("epoch,loss\n1,2.0\n")
    assert "error: " in (output := run("plot", path, code=2))
    assert "line 1: not JSON" in output
    assert list(tmp_path.iterdir()) == [path]


def test_plot_says_what_is_wrong_with_the_options(recorded: Path, tmp_path: Path) -> None:
    assert "use one of .png, .svg, .pdf" in run("plot", recorded, "--out", "plot.gif", code=2)
    assert "does not exist" in run("plot", tmp_path / "nothing.jsonl", code=2)
    assert "cannot write" in run("plot", recorded, "--out", recorded / "plot.png", code=2)


def test_env_is_strict_json_with_the_versions() -> None:
    found = json.loads(run("env", "--json"), parse_constant=pytest.fail)
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert found["backends"]["reference"] is True
    assert found["backends"]["foreach"] is True
    assert isinstance(found["backends"]["triton"], bool)
    assert len(found["gpus"]) == torch.cuda.device_count()
    written = datetime.datetime.fromisoformat(found["date"])
    assert written.utcoffset() == datetime.timedelta(0)
    assert abs((datetime.datetime.now(datetime.UTC) - written).total_seconds()) < 60


def test_env_prints_a_table() -> None:
    output = run("env")
    assert f"torch │ {torch.__version__}" in output
    assert "reference: yes" in output


@pytest.mark.parametrize("command", ["inspect", "simulate", "plot", "report", "env"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert command in run("--help")
    output = run(command, "--help")
    assert f"Example: elropt {command}" in output


def test_version() -> None:
    assert run("--version").strip() == f"elropt {elropt.__version__}"


def test_python_m_elropt_is_the_command() -> None:
    command = [sys.executable, "-m", "elropt", "simulate", "--help"]
    plain = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | plain)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Usage: elropt simulate" in done.stdout
    assert b"E = |g|/|w| of the layers at the start" in b" ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("encoding", "norm"), [("utf-8", "‖g‖/‖w‖"), ("cp1252", "|g|/|w|"), ("latin-1", "|g|/|w|")]
)
def test_help_can_be_read_in_any_encoding(encoding: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    monkeypatch.setenv("COLUMNS", "200")
    app(["simulate", "--help"], standalone_mode=False)
    assert f"E = {norm} of the layers at the start" in " ".join(written.getvalue().decode(encoding).split())


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_typer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delitem(sys.modules, "elropt.cli")
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)  # loaded already, it would be found
    with pytest.raises(ImportError, match=r'pip install "elropt\[cli\]"$'):
        importlib.import_module("elropt.cli")


def test_without_matplotlib_plot_says_what_to_install(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "elropt.plots", raising=False)
    for name in ("matplotlib", "matplotlib.axes"):  # loaded already, the second would be found
        monkeypatch.setitem(sys.modules, name, None)
    assert 'pip install "elropt[cli]"' in run("plot", recorded, code=2)
    assert "spread" in run("simulate", "--e0", "10,1")
