"""The registry of optimizers: what it builds, and that result files of before still mean the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import elropt
from benchmarks.common import models, training
from benchmarks.common.muon import MuonWithAdamW
from benchmarks.common.optimizers import (
    LRS,
    METHODS,
    OPTIMIZERS,
    Entry,
    check_installed,
    make_optimizer,
    method_of,
)
from benchmarks.common.training import Run, Task, run_of
from elropt.rules import RULES

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
OPTIONS = {"lr": 0.01, "other_lr": 0.2, "momentum": 0.8, "weight_decay": 1e-3}


def groups_of(name: str) -> tuple[torch.optim.Optimizer, dict, dict]:
    """An optimizer on a small net, its group of tracked weights, and one of its others."""
    model = models.build("bn-mlp-3-w8", in_shape=(1, 8, 8), classes=10)
    optimizer, tracked = make_optimizer(METHODS[name], model, torch.randn(16, 1, 8, 8), **OPTIONS)
    assert list(tracked) == ["layer1.linear.weight", "layer2.linear.weight"]
    by_kind = {bool(group["scale_invariant"]): group for group in optimizer.param_groups}
    assert set(map(id, by_kind[True]["params"])) == set(map(id, tracked.values()))
    return optimizer, by_kind[True], by_kind[False]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule is not None])
def test_every_rule_is_in_the_comparison_with_its_unit(rule: str) -> None:
    optimizer, tracked, other = groups_of(rule)
    assert isinstance(optimizer, elropt.ELRSGD)
    assert (tracked["rule"], tracked["momentum"], tracked["lr"]) == (rule, 0.8, 0.01)
    assert other["lr"] == (0.01 if RULES[rule].lr_unit == "lr" else 0.2)
    assert METHODS[rule].lrs == LRS[METHODS[rule].unit]
    assert (METHODS[rule].unit == "SGD's") == (RULES[rule].lr_unit == "lr")


@pytest.mark.parametrize("name", ["sgd", "adamw", "sgd+linear"])
def test_optimizers_of_torch(name: str) -> None:
    optimizer, tracked, other = groups_of(name)
    assert type(optimizer) is (torch.optim.AdamW if name == "adamw" else torch.optim.SGD)
    momentum = tracked["betas"][0] if name == "adamw" else tracked["momentum"]
    assert (momentum, tracked["lr"], tracked["weight_decay"], other["lr"]) == (0.8, 0.01, 1e-3, 0.01)


def test_muon_trains_hidden_weights_and_adamw_the_rest() -> None:
    model = models.build("olmo-2-w32", in_shape=(8,), classes=11)
    optimizer, tracked = make_optimizer(METHODS["muon"], model, torch.randint(11, (16, 8)), **OPTIONS)
    lrs = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    hidden = {name for name, lr in lrs.items() if lr == 0.01}
    assert hidden == {name for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2}
    assert hidden == set(tracked)
    rest = [lr for name, lr in lrs.items() if name not in hidden]
    assert rest == pytest.approx([0.2 * 0.03] * len(rest))
    assert len(lrs) == len(list(model.parameters()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_kernels_as_torchs_muon_steps_matrices(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    kernel, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    grads = [(torch.randn(6, 4, 3, 3), torch.randn(6)) for _ in range(3)]
    ours = [nn.Parameter(kernel.clone().to(memory_format=memory_format)), nn.Parameter(bias.clone())]
    groups = [
        {"params": ours[:1], "hidden": True, "lr": 0.02, "weight_decay": 0.1},
        {"params": ours[1:], "hidden": False},
    ]
    together = MuonWithAdamW(groups, lr=0.003, betas=(0.9, 0.999))
    theirs = [nn.Parameter(kernel.flatten(1).clone()), nn.Parameter(bias.clone())]
    apart = (
        torch.optim.Muon(theirs[:1], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[1:], lr=0.003, weight_decay=0.0),
    )
    for step, (of_kernel, of_bias) in enumerate(grads):
        for optimizer in (together, *apart):
            for group in optimizer.param_groups:
                group["lr"] *= 1 - step / 10  # a schedule
        ours[0].grad, ours[1].grad = of_kernel.clone(), of_bias.clone()
        theirs[0].grad, theirs[1].grad = of_kernel.flatten(1), of_bias.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    torch.testing.assert_close(
        ours[0].flatten(1), theirs[0], rtol=0.02, atol=2e-3
    )  # Muon computes in bfloat16
    torch.testing.assert_close(ours[1], theirs[1])
    assert (ours[0].flatten(1) - kernel.flatten(1)).norm() > 0.1


def test_a_task_decays_weights_as_much_with_adamw_as_with_sgd() -> None:
    """lr·decay is what both take off a weight in a step; AdamW's learning rate is a hundredth."""
    task = Task("bn-mlp-3-w8", weight_decay=5e-4)
    dataset = training.load(task)
    model = models.build(task.model, in_shape=dataset.in_shape, classes=dataset.classes)
    taken_off = []
    for name, lr in (("sgd", 0.1), ("adamw", 0.001)):
        optimizer, _ = training.make_optimizer(model, Run(task, METHODS[name], lr, 0), dataset)
        taken_off.append(max(group["lr"] * group["weight_decay"] for group in optimizer.param_groups))
    assert taken_off[0] == pytest.approx(taken_off[1]) == pytest.approx(5e-5)


def test_one_entry_is_enough_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def adagrad(params: object, *, lr: float, momentum: float) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(params, lr=lr)  # type: ignore[arg-type]

    monkeypatch.setitem(OPTIMIZERS, "adagrad", Entry(adagrad))
    row = training.train(Run(Task("bn-mlp-4-w16", epochs=5), method_of("adagrad"), 0.03, 0))
    assert row["finite"]
    assert row["accuracy"] > 0.5


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed([METHODS["sgd"], METHODS["warmup"]])
    with pytest.raises(ValueError, match=r"^lars, sgdp: pip install pytorch-optimizer, or leave them out$"):
        check_installed([METHODS["sgd"], METHODS["lars"], METHODS["sgdp"]])


@pytest.mark.parametrize("name", ["accuracy-digits", "swap-in-small"])
def test_rows_of_committed_results_are_of_these_methods(name: str) -> None:
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    committed = {run_of(row["spec"]).method for row in rows}
    assert len(committed) >= 6
    for method in committed:
        assert method == METHODS[method.name]
