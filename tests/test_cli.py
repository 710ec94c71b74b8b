"""The `elropt` command, and elropt.report and elropt.env_report behind it."""

import datetime
import importlib
import io
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import elropt
from elropt import ELRSGD, Recorder, dynamics, effective_lrs, env_report, find_scale_invariant, param_groups
from elropt.cli import app
from elropt.inspection import inspect_model, random_label_loss
from elropt.run_history import read_run

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


def net(depth: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 5))


# inspect_model


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_report_agrees_with_autograd_in_float64(momentum: float) -> None:
    torch.manual_seed(0)
    model, x, y = net().double(), torch.randn(16, 12).double(), torch.randint(5, (16,))

    def loss(outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, y)

    report = inspect_model(model, x, loss=loss, lr=0.2, momentum=momentum)

    value = loss(model(x))
    value.backward()
    kinds = find_scale_invariant(model, x)
    expected = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    assert [weight.name for weight in report.weights] == list(expected)
    assert report.loss == pytest.approx(value.item())
    E = []
    for weight in report.weights:
        w, g = expected[weight.name].detach(), expected[weight.name].grad
        relative_grad = (g.norm() / w.norm()).item()
        assert weight.shape == tuple(w.shape)
        assert weight.invariance == kinds[weight.name]
        assert weight.tracked == (kinds[weight.name] is not None)
        assert weight.weight_norm == pytest.approx(w.norm().item())
        assert weight.grad_norm == pytest.approx(g.norm().item())
        assert weight.radial_cosine == pytest.approx(((w * g).sum() / w.norm() / g.norm()).item(), abs=1e-9)
        assert weight.relative_grad == pytest.approx(relative_grad)
        assert weight.elr == pytest.approx(0.2 * relative_grad)
        if weight.tracked:
            E.append(relative_grad)
    E.sort(reverse=True)
    assert len(E) == 3
    assert [weight.relative_grad for weight in report.tracked] == pytest.approx(E)
    assert report.elr_spread == pytest.approx(E[0] / E[-1])
    assert report.log_elr_std == pytest.approx(np.std(np.log(E)))
    assert report.balance_lr == pytest.approx((1 - momentum) / math.sqrt(E[0] * E[-1]))
    assert report.monotone_lr == pytest.approx((1 - momentum) / math.sqrt(E[0] * E[1]))


@pytest.mark.parametrize("lr", [1e-3, 0.3, 100.0])
def test_first_step_of_the_warmup_is_that_of_the_optimizer(lr: float) -> None:
    torch.manual_seed(0)
    model, x, y = net(depth=6), torch.randn(32, 12), torch.randint(5, (32,))

    def loss(outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, y)

    report = inspect_model(model, x, loss=loss, lr=lr, momentum=0.9)

    optimizer = ELRSGD(param_groups(model, x), lr=lr, momentum=0.9)
    loss(model(x)).backward()
    optimizer.step()
    elrs = effective_lrs(optimizer)
    assert elrs == pytest.approx(dict.fromkeys(elrs, report.warmup_elr), rel=1e-4)
    assert report.warmup_ends == bool(optimizer.state[model[0].weight]["handed_over"] > 0)


def test_inspection_leaves_no_trace() -> None:
    model = net()
    model[3].eval()
    x = torch.randn(16, 12)
    model(x).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)

    inspect_model(model, x, lr=0.1)

    assert torch.equal(torch.rand(3), expected_draw)
    assert model.training
    assert not model[3].training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


def test_frozen_and_dead_weights_are_left_out_and_named() -> None:
    model = net(depth=4)
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[4].weight.zero_()  # the gain behind model[3]
        model[4].bias.fill_(1.0)
    report = inspect_model(model, torch.randn(16, 12), lr=0.1)

    assert [weight.name for weight in report.weights if weight.tracked] == ["6.weight", "9.weight"]
    assert math.isnan(report.weights[0].grad_norm)
    assert report.weights[1].grad_norm == 0
    assert "frozen: 0.weight." in report.summary()
    assert "gradient is zero: 3.weight." in report.summary()


def test_one_tracked_weight_has_no_pair() -> None:
    report = inspect_model(net(depth=1), torch.randn(16, 12), lr=0.1)
    assert report.elr_spread == 1
    assert math.isnan(report.monotone_lr)
    assert "the only tracked weight" in report.summary()
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["monotone_lr"] is None


def test_summary_says_on_which_side_of_the_critical_learning_rates_lr_is() -> None:
    torch.manual_seed(0)
    model, x = net(depth=8), torch.randn(64, 12)

    def summary(lr: float) -> str:
        torch.manual_seed(1)
        return inspect_model(model, x, lr=lr).summary()

    torch.manual_seed(1)
    report = inspect_model(model, x, lr=0.1)
    assert report.monotone_lr < report.balance_lr
    below, between, above = (
        summary(lr) for lr in (report.monotone_lr / 2, math.sqrt(report.monotone_lr * report.balance_lr), 1e3)
    )
    assert "below both critical learning rates" in below
    assert "change places" in between
    assert "overshoots" in above
    turns = [float(turn) for turn in re.findall(r"by ([\d.]+) rad", above)]
    assert turns[0] == pytest.approx(math.atan(1e3 * report.tracked[0].relative_grad), abs=0.05)
    assert report.tracked[0].name in above
    assert report.tracked[-1].name in above


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (torch.randn(4, 1), r"\[4, 1\]"),
        (torch.randn(4), r"\[4\]"),
        (torch.randn(4, 3, 5, 5), r"\[4, 3, 5, 5\]"),
        (torch.ones(4, 3, dtype=torch.int64), "int64"),
        ({"loss": 3}, "no tensor"),
    ],
)
def test_default_loss_wants_logits(outputs: object, found: str) -> None:
    with pytest.raises(ValueError, match=f"{found}.*give a loss of your own"):
        random_label_loss(outputs)


def test_default_loss_is_cross_entropy_of_the_first_tensor() -> None:
    logits = torch.randn(6, 3)
    torch.manual_seed(3)
    labels = torch.randint(3, (6,))
    torch.manual_seed(3)
    value = random_label_loss({"logits": logits, "hidden": torch.ones(2)})
    assert value.item() == pytest.approx(-logits.log_softmax(1)[range(6), labels].mean().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum=1.0"),
        ({"lr": 0.1, "perturb": -1.0}, "perturb=-1.0"),
        ({"lr": 0.1, "loss": lambda y: y}, r"loss returned a tensor of shape \(16, 5\)"),
        ({"lr": 0.1, "loss": lambda y: 3.0}, "loss returned 3.0"),
    ],
)
def test_wrong_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inspect_model(net(), torch.randn(16, 12), **options)


# elropt inspect


def test_inspect_prints_the_report_and_writes_it(target: str, tmp_path: Path) -> None:
    output = run("inspect", f"{target}:with_loss", "--lr", 0.5, "--momentum", 0, "--json", "report.json")

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert list(report["weights"]) == ["1.weight", "4.weight", "7.weight", "10.weight"]
    assert [weight["tracked"] for weight in report["weights"].values()] == [True, True, True, False]
    assert (report["lr"], report["momentum"]) == (0.5, 0)
    for name, weight in report["weights"].items():
        assert name in output
        assert ("no" if weight["reason"].startswith("not:") else weight["reason"]) in output
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


# elropt simulate


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


# elropt plot and read_run


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A real run of 6 steps; three layers are tracked, the head is not."""
    torch.manual_seed(0)
    model, x, y = net(), torch.randn(16, 12), torch.randint(5, (16,))
    groups = param_groups(model, x)
    optimizer = ELRSGD(groups, lr=0.5, momentum=0.9)
    path = tmp_path / "run.jsonl"
    with Recorder(optimizer, path, every=2):
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return path


def record(step: int, **layers: dict) -> str:
    default = {"tracked": True, "elr": 0.1, "lr": 0.5, "grad_factor": 0.5}
    return json.dumps({"step": step, "layers": {k: default | v for k, v in layers.items()}}) + "\n"


def test_a_recorded_run_is_read_as_it_was_written(recorded: Path) -> None:
    history = read_run(recorded)
    records = [json.loads(line) for line in recorded.read_text().splitlines()]

    assert history.steps.tolist() == [0, 2, 4]
    assert history.names == ["0.weight", "3.weight", "6.weight"]
    assert history.notes == []
    for t, written in enumerate(records):
        layers = [written["layers"][name] for name in history.names]
        assert history.elr[t].tolist() == [layer["elr"] for layer in layers]
        assert history.applied_lr[t].tolist() == [layer["lr"] * layer["grad_factor"] for layer in layers]
        assert history.elr_spread[t] == pytest.approx(written["elr_spread"])


def test_plot_writes_beside_the_run_or_where_it_is_told(recorded: Path, tmp_path: Path) -> None:
    assert "wrote" in run("plot", recorded)
    assert recorded.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    run("plot", recorded, "--out", tmp_path / "new" / "run.svg")
    assert "<svg" in (tmp_path / "new" / "run.svg").read_text()


def test_null_is_nan_and_absent_layers_leave_gaps(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(
        record(0, a={}, b={"elr": None}, lost={"tracked": True})
        + record(1, a={"elr": 0.0}, b={"elr": 0.2, "grad_factor": None}, lost={"tracked": False})
        + record(2, b={"elr": 0.2}, late={"elr": 0.8})
        + record(3, a={"elr": None})
    )
    history = read_run(path)
    nan = math.nan
    assert history.names == ["a", "b", "late"]
    np.testing.assert_array_equal(
        history.elr, [[0.1, nan, nan], [nan, 0.2, nan], [nan, 0.2, 0.8], [nan, nan, nan]]
    )
    np.testing.assert_array_equal(history.applied_lr[1], [0.25, nan, nan])
    np.testing.assert_allclose(history.elr_spread, [1, 1, 4, nan])
    run("plot", path)


def test_lines_that_a_killed_run_cut_off_are_skipped_with_a_note(recorded: Path) -> None:
    whole = read_run(recorded)
    text = recorded.read_text()
    recorded.write_text(text[:-30])
    assert "note:" in (output := run("plot", recorded))
    assert "line 3: cut off, skipped" in output
    np.testing.assert_array_equal(read_run(recorded).elr, whole.elr[:2])

    recorded.write_text(text[:-30] + text)  # the next run appended to the broken line
    history = read_run(recorded)
    assert history.steps.tolist() == [2, 4]
    assert len(history.notes) == 2

    recorded.write_text(
        text + '{"st\n' + "\0" * 9 + "\n" + record(6, a={})
    )  # begun, and after a power failure
    history = read_run(recorded)
    assert history.steps.tolist() == [0, 2, 4, 6]
    assert [note.split(", ", 1)[1] for note in history.notes] == [
        f"line {n}: cut off, skipped" for n in (4, 5)
    ]


def test_of_several_runs_in_a_file_the_last_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(record(0, a={}) + record(5, a={}) + record(0, b={"elr": 0.3}))
    history = read_run(path)
    assert history.names == ["b"]
    assert history.steps.tolist() == [0]
    assert "holds 2 runs" in run("plot", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no complete record"),
        (b'{"step": 0, "lay', "holds no complete record"),
        (b"epoch,loss\n1,2.0\n", "line 1: not JSON"),
        (b'{"epoch": 1}\n', "line 1: not a record of elropt.Recorder"),
        (b"[1, 2]\n", "line 1: not a record"),
        (b'{"step": "0", "layers": {}}\n', "line 1: not a record"),
        (b'{"step": 0, "layers": {"a": {"elr": 1}}}\n', "line 1: not a record"),
        (b'{"step": 0, "layers": {"a": 3}}\n', "line 1: not a record"),
        (b"\x89PNG\r\n\x1a\n\xff", "is not a text file"),
        (record(0, a={"tracked": False}).encode(), "no layer that was tracked"),
    ],
)
def test_plot_says_what_is_wrong_with_a_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    assert message in run("plot", path, code=2)
    assert list(tmp_path.iterdir()) == [path]


def test_plot_says_what_is_wrong_with_the_options(recorded: Path, tmp_path: Path) -> None:
    assert "use one of .png, .svg, .pdf" in run("plot", recorded, "--out", "plot.gif", code=2)
    assert "does not exist" in run("plot", tmp_path / "nothing.jsonl", code=2)
    assert "cannot write" in run("plot", recorded, "--out", recorded / "plot.png", code=2)


# elropt env


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


def test_env_names_no_host_user_or_path() -> None:
    values = json.dumps(list(env_report.collect().values()))
    host = socket.gethostname()
    assert not re.search(rf"\b{re.escape(host)}\b", values) or host in platform.platform()
    assert str(Path.home()) not in values
    assert os.getcwd() not in values


def test_env_prints_a_table() -> None:
    output = run("env")
    assert f"torch │ {torch.__version__}" in output
    assert "reference: yes" in output


def git(*args: str) -> str:
    options = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *options, *args], check=True, capture_output=True, text=True).stdout.strip()


def test_env_names_the_commit_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = env_report.collect()
    assert (found["git_commit"], found["git_dirty"]) == (None, None)

    git("init", "-q")
    Path("file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one", "--no-verify")
    found = env_report.collect()
    assert (found["git_commit"], found["git_dirty"]) == (git("rev-parse", "HEAD"), False)

    Path("untracked").write_text("1")
    assert env_report.collect()["git_dirty"] is False
    Path("file").write_text("2")
    assert env_report.collect()["git_dirty"] is True


def test_env_describes_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "Some GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(env_report, "_triton_runs", lambda device: device == "cuda")
    monkeypatch.setattr(
        env_report, "_output", lambda *command: "1.2\n1.2" if command[0] == "nvidia-smi" else None
    )
    found = env_report.collect()
    assert found["gpus"] == [{"name": "Some GPU", "capability": "9.0", "memory_gib": 80.0}] * 2
    assert found["driver"] == "1.2"
    assert found["backends"] == {"reference": True, "foreach": True, "triton": True}
    assert found["git_commit"] is None


# the command as a whole


@pytest.mark.parametrize("command", ["inspect", "simulate", "plot", "env"])
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
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "elropt[cli]"' in run("plot", recorded, code=2)
    assert "spread" in run("simulate", "--e0", "10,1")
