"""LightningCLI: the YAML file of the example, and what the command line changes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import elropt

from . import plain_loop
from .conftest import EXAMPLES

lightning = pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")
from lightning.pytorch.cli import LightningCLI  # noqa: E402

CONFIG = f"--config={EXAMPLES / 'with_lightning_cli.yaml'}"


@pytest.fixture
def command(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., LightningCLI]:
    """The command of the example, with these arguments."""

    def start(*arguments: str) -> LightningCLI:
        monkeypatch.setattr("sys.argv", ["with_lightning_cli.py", *arguments])
        runs = arguments[0] == "fit"
        return LightningCLI(example("with_lightning_cli").Net, seed_everything_default=0, run=runs)

    return start


def test_the_example_has_the_bits_of_the_plain_loop(command: Callable[..., LightningCLI]) -> None:
    cli = command("fit", CONFIG)
    torch.manual_seed(0)
    net = type(cli.model)(optimizer=None)
    groups = elropt.param_groups(net, net.example_input_array, weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    inputs = cli.trainer.train_dataloader.dataset.tensors[0]
    plain_loop.train(net, optimizer, plain_loop.cycle(inputs, inputs[:, :4].argmax(1), 16))
    plain_loop.assert_same_state(cli.model, net)
    assert plain_loop.steps(Path(cli.trainer.log_dir, "elr.jsonl")) == [0, 4, 8, 12]


def test_the_command_line_changes_any_option(command: Callable[..., LightningCLI]) -> None:
    cli = command(
        CONFIG, "--model.optimizer.init_args.tracked_lr=0.003", "--model.optimizer.init_args.nesterov=true"
    )
    tracked = cli.model.configure_optimizers().param_groups[0]
    assert (tracked["tracked_lr"], tracked["nesterov"], tracked["lr"]) == (0.003, True, 0.1)


def test_elrsgd_by_its_path_needs_no_code(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(example("with_lightning_cli").Net):
        def __init__(self) -> None:
            super().__init__(optimizer=None)

        configure_optimizers = lightning.LightningModule.configure_optimizers

    arguments = ["--optimizer=elropt.ELRSGD", "--optimizer.lr=0.1", "--optimizer.rule=angle"]
    monkeypatch.setattr("sys.argv", ["main.py", *arguments, "--optimizer.tracked_lr=0.01"])
    optimizer = LightningCLI(Plain, run=False).model.configure_optimizers()
    assert isinstance(optimizer, elropt.ELRSGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["rule"], group["tracked_lr"]) == (0.1, "angle", 0.01)


def test_an_unknown_option_is_refused(
    command: Callable[..., LightningCLI], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command(CONFIG, "--model.optimizer.init_args.trackedlr=0.003")
    assert "trackedlr" in capsys.readouterr().err
