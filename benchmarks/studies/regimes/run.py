"""Three regimes (source B of docs/theory.md): what does training on the sphere at a constant learning rate come to?

Every trainable weight of these nets is scale-invariant, and all of them together are kept on one sphere by
`ELRSGD(rule="sphere", granularity="network")`, without momentum, weight decay or augmentation. What source B calls the
effective learning rate (ELR) and the effective gradient norm are our `sphere_lr` and `sphere_grad_norm` (c = ‖g‖·‖w‖ of
the whole vector). A step turns the whole vector by atan(sphere_lr·c); `turn` is sphere_lr·c, in radians if small.

First constant learning rates, then one more at each border between regimes; then runs that step down, half-way, to a
learning rate that converges; last, the best constant one and the best step-down with fresh seeds.

This module measures, and plans what is run after what. `summarize` names the regimes and draws the conclusions from the
rows, `report` makes tables and figures of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

import elropt
from benchmarks.common import data, models, training
from benchmarks.common.statistics import grouped
from benchmarks.common.sweep import Row
from benchmarks.common.warmups import gradient
from benchmarks.studies.regimes.report import draw, tables
from benchmarks.studies.regimes.summarize import (
    FRESH_SEEDS,
    by_lr,
    constant,
    main_regimes,
    mean,
    model_of,
    step_downs,
    summarize,
)
from benchmarks.studies.study import Stage, Study

TRACE = ("loss", "chance", "error", "sphere_grad_norm")


@dataclasses.dataclass(frozen=True)
class Net:
    """A net (`models.build`, scale-invariant) and what it is trained on; the images are drawn by class."""

    model: str
    train_images: int
    val_images: int
    epochs: int
    batch_size: int
    data: str = "cifar10"
    image_size: int | None = None
    split: int = 0
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run at `sphere_lr`; the second half of its epochs at `sphere_lr_after`, if that is given.

    test: whether its row has the error on the test images, too."""

    net: Net
    seed: int
    sphere_lr: float
    sphere_lr_after: float | None = None
    test: bool = False


# Measuring


def work(run: Run) -> Row:
    """Train once; the row has means over every epoch of what `train_epoch` records, and errors at the end.

    For these errors, the batch norms measure their statistics again at the last weights. Large steps have moved the
    weights far away from those that the old statistics belong to.
    """
    dataset, net = load(run.net), run.net
    torch.manual_seed(run.seed)
    model = models.build(
        net.model, in_shape=dataset.in_shape, classes=dataset.classes, scale_invariant=True
    ).to(net.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, run.sphere_lr)
    trace = []
    for epoch in range(net.epochs):
        if run.sphere_lr_after is not None and epoch == net.epochs // 2:
            optimizer.param_groups[0]["lr"] = run.sphere_lr_after
        trace.append(train_epoch(model, optimizer, dataset, net, seed=(run.seed, epoch)))
    columns = torch.stack(trace, dim=1).tolist()
    row: Row = {
        "steps": net.epochs * (net.train_images // net.batch_size),
        "classes": dataset.classes,
        **training.rounded(dict(zip(TRACE, columns, strict=True))),
    }
    update_bn((images for images, _ in dataset.batches("train", net.batch_size, seed=run.seed)), model)
    task = training.Task(net.model, device=net.device, channels_last=True)
    row["val_error"] = 1 - training.evaluate(model, dataset, "val", task)
    if run.test:
        row["test_error"] = 1 - training.evaluate(model, dataset, "test", task)
    return row


def make_optimizer(model: nn.Module, sphere_lr: float) -> elropt.ELRSGD:
    """SGD on the sphere of all trainable weights together."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": weights, "scale_invariant": True}]
    return elropt.ELRSGD(groups, lr=sphere_lr, rule="sphere", granularity="network")


def train_epoch(
    model: nn.Module, optimizer: elropt.ELRSGD, dataset: data.Dataset, net: Net, seed: tuple[int, int]
) -> Tensor:
    """One epoch; means over its steps, in the order of `TRACE`, [4].

    loss, error: of each batch before its step, with its own statistics. chance: the loss of the same outputs against
    the labels of other images: the loss of outputs that say nothing about their own images. sphere_grad_norm: of
    the gradient of one batch.
    """
    weights, steps = optimizer.param_groups[0]["params"], []
    for images, labels in dataset.batches("train", net.batch_size, seed=seed, channels_last=True):
        optimizer.zero_grad()
        outputs = model(images)
        loss = F.cross_entropy(outputs, labels)
        loss.backward()
        with torch.no_grad():
            chance = F.cross_entropy(outputs, labels.roll(1))
            error = (outputs.argmax(1) != labels).float().mean()
            steps.append(torch.stack([loss, chance, error, sphere_grad_norm(weights)]))
        optimizer.step()
    return torch.stack(steps).mean(0)


def sphere_grad_norm(weights: Sequence[Tensor]) -> Tensor:
    """c = ‖g‖·‖w‖ of all weights together."""
    w, g = (
        torch.stack([part.detach().norm() for part in of]).norm() for of in (weights, map(gradient, weights))
    )
    return w * g


@functools.cache
def load(net: Net) -> data.Dataset:
    """The images of a net on its device, read once by a process."""
    count = net.train_images + net.val_images
    return data.load(
        net.data,
        image_size=net.image_size,
        limit=count,
        validation=net.val_images / count,
        seed=net.split,
    ).to(net.device)


# Planning


class Plan(NamedTuple):
    """Nets, their learning rates on the sphere, how many seeds choose, and how many fresh ones read the test part."""

    nets: Sequence[Net]
    sphere_lrs: Sequence[float]
    seeds: int
    fresh_seeds: int


def tiny(device: str) -> Plan:
    """Does it run?"""
    sizes = {"train_images": 64, "val_images": 40, "epochs": 12, "batch_size": 32}
    net = Net("conv-5-w4", **sizes, data="digits", device=device)
    return Plan([net, dataclasses.replace(net, model="resnet-18-w2")], (1e-3, 3e-2, 1.0), 2, 2)


def small(device: str) -> Plan:
    """Thin nets on some hundred images of 8×8 pixels, which they learn without an error in 1,500 and 960 steps."""
    options: dict[str, Any] = {"val_images": 2000, "image_size": 8, "device": device}
    conv = Net("conv-5-w8", 960, epochs=100, batch_size=64, **options)
    resnet = Net("resnet-18-w8", 384, epochs=80, batch_size=32, **options)
    return Plan([conv, resnet], half_decades(-5, -1), 3, 5)


def full(device: str) -> Plan:
    """CIFAR-10 with batches of 128 for 1,000 epochs, as in the code of source B, whose ConvNet has width 32, too."""
    nets = [
        Net(model, 45_000, 5_000, epochs=1000, batch_size=128, device=device)
        for model in ("conv-5-w32", "resnet-18-w32")
    ]
    return Plan(nets, half_decades(-5, 0), 3, 5)


PLANS = {"tiny": tiny, "small": small, "full": full}


def half_decades(first: int, last: int) -> tuple[float, ...]:
    """From 10^first to 10^last, two in each decade: 1 and 3."""
    return (*(float(f"{digit}e{power}") for power in range(first, last) for digit in (1, 3)), 10.0**last)


def stages(size: str, device: str) -> Sequence[Stage]:
    """Constant learning rates; the borders; step-downs; the best of each with fresh seeds."""
    plan = PLANS[size](device)
    for net in plan.nets:
        load(net)  # data that are missing raise here, not in the middle of the study
    return (
        lambda rows: constant_runs(plan),
        lambda rows: border_runs(rows, plan),
        lambda rows: step_down_runs(rows, plan),
        lambda rows: final_runs(rows, plan),
    )


def constant_runs(plan: Plan) -> list[Run]:
    """Every net at every constant learning rate. Nothing is chosen by their test error, so it may be drawn."""
    return [
        Run(net, seed, lr, test=True)
        for seed in range(plan.seeds)
        for net in plan.nets
        for lr in plan.sphere_lrs
    ]


def border_runs(rows: list[Row], plan: Plan) -> list[Run]:
    """Between the last learning rate that mostly converges and the next, and between the first of those that all
    diverge and the one before."""
    runs = []
    for net, of_net in by_net(rows, plan):
        regimes = main_regimes(of_net)
        lrs = list(regimes)
        converging = [i for i, regime in enumerate(regimes.values()) if regime == "convergence"]
        others = [i for i, regime in enumerate(regimes.values()) if regime != "divergence"]
        pairs = {(i, i + 1) for i in (max(converging, default=-1), max(others, default=-1))}
        between = [math.sqrt(lrs[a] * lrs[b]) for a, b in sorted(pairs) if a >= 0 and b < len(lrs)]
        runs += [
            Run(net, seed, training.significant(lr), test=True)
            for seed in range(plan.seeds)
            for lr in between
        ]
    return runs


def step_down_runs(rows: list[Row], plan: Plan) -> list[Run]:
    """To the largest learning rate that mostly converges, from every larger one that does not mostly diverge."""
    runs = []
    for net, of_net in by_net(rows, plan):
        regimes = main_regimes(of_net)
        after = max((lr for lr, regime in regimes.items() if regime == "convergence"), default=math.inf)
        starts = [lr for lr, regime in regimes.items() if lr > after and regime != "divergence"]
        runs += [Run(net, seed, lr, after) for seed in range(plan.seeds) for lr in starts]
    return runs


def final_runs(rows: list[Row], plan: Plan) -> list[Run]:
    """The constant learning rate and the step-down of least validation error, with fresh seeds, on the test images."""
    runs = []
    for net, of_net in by_net(rows, plan):
        for candidates in (constant(of_net), step_downs(of_net)):
            if not candidates:
                continue
            of_best = min(by_lr(candidates).values(), key=lambda of_lr: mean(of_lr, "val_error"))
            spec = of_best[0]["spec"]
            runs += [
                Run(net, FRESH_SEEDS + index, spec["sphere_lr"], spec["sphere_lr_after"], test=True)
                for index in range(plan.fresh_seeds)
            ]
    return runs


def by_net(rows: list[Row], plan: Plan) -> list[tuple[Net, list[Row]]]:
    """The nets of a plan with their rows."""
    groups = grouped(rows, model_of)
    return [(net, groups[net.model]) for net in plan.nets]


def describe(run: Run) -> str:
    """A run in a few words, for the progress bar."""
    after = "" if run.sphere_lr_after is None else f" → {run.sphere_lr_after:g}"
    return f"{run.net.model} {run.sphere_lr:g}{after}"


REGIMES = Study(
    "regimes",
    "Training on the sphere at a constant learning rate: convergence, chaotic equilibrium or divergence, and what does "
    "stepping down gain?",
    work,
    stages,
    summarize,
    tables,
    draw,
    describe,
)
