"""Hugging Face Trainer: the plain loop's bits, groups, records once each after a stop, and what the logs get."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor, nn

import elropt

from . import plain_loop

transformers = pytest.importorskip("transformers")
from elropt.integrations.transformers import RecorderCallback, grouped_elrsgd  # noqa: E402

EXAMPLES = ("with_transformers_resnet", "with_transformers_qwen3")


class Killed(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise ZeroDivisionError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.hidden(x))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def trainer(folder: str = "run", net: nn.Module | None = None, **options: Any) -> Any:
    """8 batches of 64; without momentum and with a constant lr."""
    inputs, labels = plain_loop.data()
    data = [{"x": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    args = transformers.TrainingArguments(
        folder,
        max_steps=8,
        per_device_train_batch_size=64,
        report_to="none",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    return transformers.Trainer(net or Net(), args, train_dataset=data, **options)


def with_groups(**options: Any) -> Any:
    batch = {"x": plain_loop.data()[0][:64]}
    return grouped_elrsgd, {"batch": batch, "lr": 0.1, "rule": "angle", "tracked_lr": 0.02, **options}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_killed_and_resumed_are_as_if_they_had_not_been(
    name: str, example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after 15 steps: the last checkpoint is of 10, and the record of step 12 is written again."""
    module = example(name)
    whole = module.main("whole")
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    with monkeypatch.context() as patch:
        made = module.Trainer
        patch.setattr(module, "Trainer", lambda *a, **k: made(*a, **k, callbacks=[Killed(15)]))
        with pytest.raises(ZeroDivisionError):
            module.main("parts")
    resumed = module.main("parts")
    plain_loop.assert_same_state(resumed.model, whole.model)
    a, b = plain_loop.records("parts/elr.jsonl"), plain_loop.records("whole/elr.jsonl")
    assert [record["step"] for record in b] == [0, 4, 8, 12, 16]
    assert [r["step"] for r in a] == [r["step"] for r in b]
    assert [r["layers"] for r in a] == [r["layers"] for r in b]


def test_queries_and_keys_of_the_language_model_turn_by_the_lr(example: Callable[[str], ModuleType]) -> None:
    example("with_transformers_qwen3").main("run", steps=3)
    (record,) = plain_loop.records("run/elr.jsonl")
    names = [f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in "qk"]
    angles = {name: layer["angle"] for name, layer in record["layers"].items() if layer["tracked"]}
    assert angles == pytest.approx(dict.fromkeys(names, 0.01), rel=1e-3)


def test_the_trainer_has_the_bits_of_the_plain_loop_with_the_same_groups() -> None:
    net = Net()
    options = with_groups(momentum=0.9, weight_decay=1e-3)
    ours = trainer(net=copy.deepcopy(net), optimizer_cls_and_kwargs=options)
    ours.add_callback(RecorderCallback("elr.jsonl", every=3, log=ours.log))
    ours.train()

    inputs, labels = plain_loop.data()
    groups = elropt.param_groups(net, inputs[:64], weight_decay=1e-3, tracked_lr=0.02)
    optimizer = elropt.ELRSGD(groups, lr=0.1, momentum=0.9, rule="angle")
    angles = {}
    for step, (x, y) in enumerate(plain_loop.cycle(inputs, labels, 8)):
        optimizer.zero_grad()
        net(x, y)["loss"].backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # as the trainer does
        before = net.hidden[0].weight.detach().clone()
        optimizer.step()
        angles[step] = plain_loop.angle(before, net.hidden[0].weight)

    plain_loop.assert_same_state(ours.model, net)
    assert [group["name"] for group in ours.optimizer.param_groups] == [group["name"] for group in groups]
    assert plain_loop.steps("elr.jsonl") == [0, 3, 6]
    logged = {line["step"]: line for line in ours.state.log_history if "elr_spread" in line}
    assert [*logged] == [1, 4, 7]  # the trainer counts steps that have been made
    for step, line in logged.items():
        assert line["angle/hidden.0.weight"] == pytest.approx(angles[step - 1], rel=1e-5)
        assert line["elr/hidden.0.weight"] == pytest.approx(0.02, rel=1e-5)


def test_the_class_alone_gets_the_groups_of_the_trainer() -> None:
    """They say nothing of scale invariance, which is then measured in the first steps."""
    ours = trainer(optimizer_cls_and_kwargs=(elropt.ELRSGD, {"lr": 0.1, "rule": "uniform"}))
    ours.train()
    decays = [group["weight_decay"] for group in ours.optimizer.param_groups]
    assert decays == [0.0, 0.0]
    assert all("scale_invariant" not in group for group in ours.optimizer.param_groups)
    tracked = [row.name for row in elropt.layer_stats(ours.optimizer) if row.tracked]
    assert len(tracked) == 1


def test_a_recorder_without_log_leaves_the_logs_alone_and_ends_with_the_training() -> None:
    callback = RecorderCallback(every=4)
    ours = trainer(optimizer_cls_and_kwargs=with_groups(), callbacks=[callback])
    ours.train()
    assert plain_loop.steps("run/elr.jsonl") == [0, 4]  # in the folder of the trainer
    assert not any("elr_spread" in line for line in ours.state.log_history)
    ours.optimizer.step()
    assert plain_loop.steps("run/elr.jsonl") == [0, 4]
    assert callback.recorder is not None
    assert callback.recorder.step == 8


def test_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="every=0 is not valid"):
        RecorderCallback(every=0)
    with pytest.raises(TypeError, match="nestrov"):
        trainer(optimizer_cls_and_kwargs=with_groups(nestrov=True)).train()
    with pytest.raises(ValueError, match="tracked_lr"):
        trainer(optimizer_cls_and_kwargs=with_groups(tracked_lr=-1.0)).train()


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "elropt.integrations.transformers")
    with pytest.raises(ImportError, match="pip install 'transformers>=5'"):
        importlib.import_module("elropt.integrations.transformers")


def test_path_is_kept(tmp_path: Path) -> None:
    ours = trainer(
        optimizer_cls_and_kwargs=with_groups(), callbacks=[RecorderCallback(tmp_path / "a" / "b.jsonl")]
    )
    ours.train()
    assert plain_loop.steps(tmp_path / "a" / "b.jsonl") == [0]
