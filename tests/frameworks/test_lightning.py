"""Lightning: the plain loop's bits, records once each after a stop, and what loggers and monitors get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import elropt

from . import plain_loop

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import EarlyStopping  # noqa: E402
from lightning.pytorch.loggers.logger import DummyLogger  # noqa: E402

from elropt.integrations.lightning import RecorderCallback  # noqa: E402


class Memory(DummyLogger):
    """A logger that keeps what it gets: {step: {tag: value}}."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.setdefault(step, {}).update(metrics)


class Net(lightning.LightningModule):
    def __init__(self, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        super().__init__()
        layers = [nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(16, 4))
        self.make_optimizer = optimizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self)


def elrsgd(net: nn.Module, rule: str | None = "angle") -> torch.optim.Optimizer:
    groups = elropt.param_groups(net, torch.randn(64, 8), tracked_lr=0.02)
    return elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule=rule)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*plain_loop.data()), batch_size=64)  # 8 steps an epoch


def trainer(*callbacks: Any, package: Any = lightning, **options: Any) -> Any:
    quiet = {
        "log_every_n_steps": 8,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return package.Trainer(accelerator="cpu", callbacks=[*callbacks], **{"logger": False, **quiet, **options})


def test_the_example_has_the_bits_of_the_plain_loop(example: Callable[[str], ModuleType]) -> None:
    module = example("with_lightning")
    fitted = module.main("run").lightning_module
    inputs, labels = plain_loop.data()
    net = module.Net()
    groups = elropt.param_groups(net, net.example_input_array, weight_decay=5e-4, tracked_lr=0.01)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, module.EPOCHS)
    for _ in range(module.EPOCHS):
        plain_loop.train(net, optimizer, plain_loop.cycle(inputs, labels, 8))
        schedule.step()
    plain_loop.assert_same_state(fitted, net)
    assert plain_loop.steps("run/elr.jsonl") == [*range(0, 32, 4)]


def test_the_example_killed_and_resumed_is_as_if_it_had_not_been(
    example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 22: the last checkpoint is of step 16, and the records of steps 16 and 20 are written again."""
    module = example("with_lightning")
    whole = module.main("whole")

    step_of_net = module.Net.training_step

    def killed(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == 22:
            raise ZeroDivisionError
        return step_of_net(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(module.Net, "training_step", killed)
        with pytest.raises(ZeroDivisionError):
            module.main("parts")
    assert plain_loop.steps("parts/elr.jsonl") == [0, 4, 8, 12, 16, 20]
    with Path("parts/elr.jsonl").open("a") as file:
        file.write('{"step": 2')  # and a line that is cut off
    resumed = module.main("parts")
    plain_loop.assert_same_state(resumed.lightning_module, whole.lightning_module)
    a, b = plain_loop.records("parts/elr.jsonl"), plain_loop.records("whole/elr.jsonl")
    assert [r["step"] for r in a] == [r["step"] for r in b] == [*range(0, 32, 4)]
    assert [r["layers"] for r in a] == [r["layers"] for r in b]


def test_loggers_and_file_have_the_angles_that_the_weights_turned_by() -> None:
    logger, callback = Memory(), RecorderCallback("elr.jsonl", every=3)
    angles: dict[int, float] = {}
    tables: dict[int, elropt.LayerTable] = {}

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, net: Any, *_: Any) -> None:
            self.before = net.layers[0].weight.detach().clone()

        def on_train_batch_end(self, trainer: Any, net: Any, outputs: Any, batch: Any, i: int) -> None:
            angles[i] = plain_loop.angle(self.before, net.layers[0].weight)
            tables[i] = elropt.layer_stats(trainer.optimizers[0])

    trainer(Watch(), callback, logger=[logger], max_epochs=1).fit(Net(elrsgd), loader())
    assert [*logger.logged] == plain_loop.steps("elr.jsonl") == [0, 3, 6]
    for record in plain_loop.records("elr.jsonl"):
        step = record["step"]
        logged = logger.logged[step]
        assert logged["angle/layers.0.weight"] == pytest.approx(angles[step], rel=1e-5)
        assert logged["elr/layers.0.weight"] == pytest.approx(0.02, rel=1e-5)
        assert logged["elr/layers.0.weight"] == record["layers"]["layers.0.weight"]["elr"]
        assert logged["angle_spread"] == record["angle_spread"]
        assert {row.name: row.angle for row in tables[step]} == {
            name: layer["angle"] for name, layer in record["layers"].items()
        }


def test_other_callbacks_can_monitor_the_spreads() -> None:
    stopping = EarlyStopping("elr_spread", stopping_threshold=1.5, patience=100)
    fit = trainer(RecorderCallback("elr.jsonl", every=1), stopping, max_epochs=5)
    fit.fit(Net(elrsgd), loader())
    assert fit.callback_metrics["elr_spread"].item() == pytest.approx(1.0)  # there is one tracked layer
    assert fit.current_epoch == 1  # of five


class TwoNets(lightning.LightningModule):
    """Two optimizers, by hand; the second steps with every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = Net(elrsgd).layers, Net(elrsgd).layers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for net, optimizer, every in zip((self.first, self.second), self.optimizers(), (1, 2), strict=True):
            if batch_idx % every == 0:
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [elrsgd(self.first), torch.optim.AdamW(self.second.parameters())]


def test_each_of_several_optimizers_counts_its_own_steps() -> None:
    """Also over a stop, although `trainer.global_step` is their sum."""
    logger = Memory()
    options: dict[str, Any] = {"logger": [logger], "enable_checkpointing": False}
    first = trainer(RecorderCallback("two.jsonl", every=3), max_epochs=1, **options)
    first.fit(TwoNets(), loader())
    first.save_checkpoint("two.ckpt")
    assert first.global_step == 8 + 4
    second = trainer(RecorderCallback("two.jsonl", every=3), max_epochs=2, **options)
    second.fit(TwoNets(), loader(), ckpt_path="two.ckpt")
    assert plain_loop.steps("two-0.jsonl") == [0, 3, 6, 9, 12, 15]
    assert plain_loop.steps("two-1.jsonl") == [0, 3, 6]
    assert "optimizer_0/elr/0.weight" in logger.logged[3]
    assert logger.logged[3]["optimizer_1/angle/0.0"] > 0
    assert "optimizer_1/elr/0.0" not in logger.logged[3]  # AdamW has no ELR
    assert {tag.partition("/")[0] for tags in logger.logged.values() for tag in tags} == {
        "optimizer_0",
        "optimizer_1",
    }


def test_a_step_that_the_grad_scaler_leaves_out_has_a_number_but_no_record() -> None:
    """As in `trainer.global_step`. Here a plugin leaves out the steps 2 and 3."""

    class LeavesOut(lightning.plugins.Precision):
        def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
            loss = closure()
            return loss if model.trainer.global_step in (2, 3) else optimizer.step(**kwargs)

    fit = trainer(RecorderCallback("elr.jsonl", every=1), max_epochs=1, plugins=[LeavesOut()])
    fit.fit(Net(elrsgd), loader())
    assert plain_loop.steps("elr.jsonl") == [0, 1, 4, 5, 6, 7]


def test_a_checkpoint_of_a_run_without_the_callback_says_the_step() -> None:
    plain = trainer(max_epochs=1)
    plain.fit(Net(elrsgd), loader())
    plain.save_checkpoint("plain.ckpt")
    callback = RecorderCallback("elr.jsonl", every=3)
    trainer(callback, max_epochs=2).fit(Net(elrsgd), loader(), ckpt_path="plain.ckpt")
    assert plain_loop.steps("elr.jsonl") == [9, 12, 15]
    assert callback.recorders[0].step == 16


def test_a_callback_can_be_used_again_and_without_a_path() -> None:
    """A second fit of a new trainer begins at 0; one of the same trainer goes on."""
    callback = RecorderCallback(every=4)
    for _ in range(2):
        fit = trainer(callback, max_epochs=1, default_root_dir="here")
        fit.fit(Net(elrsgd), loader())
    assert plain_loop.steps("here/elr.jsonl") == [0, 4, 0, 4]
    fit.fit_loop.max_epochs = 2
    fit.fit(fit.lightning_module, loader())
    assert plain_loop.steps("here/elr.jsonl") == [0, 4, 0, 4, 8, 12]


def test_pytorch_lightning_takes_the_callback() -> None:
    """Where both packages are there, the class is of one, and the trainer may be of the other."""
    other = pytest.importorskip("pytorch_lightning")

    class OtherNet(other.LightningModule):
        forward, training_step, configure_optimizers = (
            Net.forward,
            Net.training_step,
            Net.configure_optimizers,
        )

        def __init__(self) -> None:
            super().__init__()
            self.layers, self.make_optimizer = Net(elrsgd).layers, elrsgd

    fit = trainer(RecorderCallback("elr.jsonl", every=4), package=other, max_epochs=1)
    fit.fit(OtherNet(), loader())
    assert plain_loop.steps("elr.jsonl") == [0, 4]
    assert fit.callback_metrics["elr_spread"].item() == pytest.approx(1.0)


def test_two_processes_write_one_file_and_both_can_monitor() -> None:
    callback, stopping = RecorderCallback("elr.jsonl", every=3), EarlyStopping("elr_spread", patience=100)
    fit = trainer(callback, stopping, max_epochs=2, devices=2, strategy="ddp_fork")
    fit.fit(Net(elrsgd), loader())
    assert plain_loop.steps("elr.jsonl") == [0, 3, 6]  # half the batches for each


def test_steps_that_lightning_does_not_count_are_counted() -> None:
    class OwnSteps(Net):
        def __init__(self) -> None:
            super().__init__(elrsgd)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    fit = trainer(RecorderCallback("elr.jsonl", every=3), max_epochs=2)
    fit.fit(OwnSteps(), loader())
    assert fit.global_step == 0
    assert plain_loop.steps("elr.jsonl") == [0, 3, 6, 9, 12, 15]


def test_every_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match="every=0 is not valid"):
        RecorderCallback(every=0)
