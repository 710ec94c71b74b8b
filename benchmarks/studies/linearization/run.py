"""Partial linearization (source D of docs/theory.md): how accurate is a net of which only some units are nonlinear, if
they became linear during training or after it, and with which optimizer?

First each method's learning rate is chosen on the validation images, with ReLUs. Then, with fresh seeds that read the
test images:
- "during": a PReLU net under the slope penalty from the first step on, a run for each weight of the penalty;
- "after": the net is trained with ReLUs for the first half of the epochs; then from there, for each weight, under the
  penalty for the other half, by a new optimizer at the same learning rate.
- `Shallow`, to compare: a net that has had ReLUs in some layers only from the start, and nothing in the others.

All of them see the same number of batches, of one seed the same ones, and start from the same weights. The learning
rate falls by a cosine to zero, in "after" once in each half.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

import elropt
from benchmarks.common import data, models, training
from benchmarks.common.optimizers import METHODS, Method
from benchmarks.common.sweep import Row
from benchmarks.common.training import Run, Task, significant
from benchmarks.common.warmups import gradient
from benchmarks.studies import comparison
from benchmarks.studies.linearization.network import (
    ChannelPReLU,
    average_path_length,
    freeze_,
    replace_relus_,
    slope_penalty,
)
from benchmarks.studies.linearization.report import draw, tables
from benchmarks.studies.linearization.summarize import summarize
from benchmarks.studies.study import Stage, Study

GRADIENT_BATCH = 512  # training images on which E is measured


@dataclasses.dataclass(frozen=True)
class Linearized:
    """A net under the slope penalty, for each of the weights; `when`: "during" or "after" training."""

    task: Task
    method: Method
    lr: float
    seed: int
    when: Literal["during", "after"]
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Shallow:
    """A net with ReLUs in `nonlinear` of its layers, evenly spaced, the last among them; the others are linear."""

    task: Task
    method: Method
    lr: float
    seed: int
    nonlinear: int


Spec: TypeAlias = Run | Linearized | Shallow


def work(spec: Spec) -> Row:
    """The row of one spec."""
    works: dict[type, Callable[[Any], Row]] = {Run: training.train, Linearized: linearized, Shallow: shallow}
    return works[type(spec)](spec)


def linearized(spec: Linearized) -> Row:
    """A point for each weight; what the net was before it was linearized."""
    dataset = training.load(spec.task)
    model = build(spec, dataset)
    probe = Probe(spec.task, model, dataset)
    epochs = range(spec.task.epochs)
    finite = True
    if spec.when == "after":
        half = spec.task.epochs // 2
        finite = fit(model, spec, dataset, epochs[:half], {})
        epochs = epochs[half:]
    before = probe.state(model, {})
    points = []
    for weight in spec.weights:
        net = copy.deepcopy(model)
        layers = replace_relus_(net, probe.images)
        fitted = finite and fit(net, spec, dataset, epochs, layers, weight)
        points.append({"weight": weight, "finite": fitted, **probe.state(net, layers)})
    return {"classes": dataset.classes, "before": before, "points": points}


def shallow(spec: Shallow) -> Row:
    """One point; `log_std_at_start`: of ln E before the first step."""
    dataset = training.load(spec.task)
    model = build(spec, dataset)
    probe = Probe(spec.task, model, dataset)
    layers = replace_relus_(model, probe.images)
    kept = kept_layers(len(layers), spec.nonlinear)
    for index, layer in enumerate(layers.values()):
        layer.linear.fill_(index not in kept)
        layer.slope.requires_grad_(False)
    at_start = significant(training.log_std(probe.relative_grads(model)))
    finite = fit(model, spec, dataset, range(spec.task.epochs), {})
    point = {"finite": finite, **probe.state(model, layers)}
    return {"classes": dataset.classes, "log_std_at_start": at_start, "points": [point]}


def kept_layers(layers: int, kept: int) -> list[int]:
    """Which of the layers are kept: evenly spaced, the last among them."""
    if not 0 <= kept <= layers:
        raise ValueError(f"of {layers} layers 0 to {layers} can be kept, not {kept}")
    return [layers * (index + 1) // kept - 1 for index in range(kept)]


def build(spec: Linearized | Shallow, dataset: data.Dataset) -> nn.Module:
    """The net of a spec with its initial weights."""
    torch.manual_seed(spec.seed)
    model = models.build(spec.task.model, in_shape=dataset.in_shape, classes=dataset.classes)
    model = model.to(spec.task.device)
    if spec.task.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def fit(
    model: nn.Module,
    spec: Linearized | Shallow,
    dataset: data.Dataset,
    epochs: range,
    layers: dict[str, ChannelPReLU],
    weight: float = 0.0,
) -> bool:
    """Train over some epochs with a new optimizer, under `weight` times the penalty on the slopes of `layers`.

    Returns whether all losses were finite; training ends with the epoch in which one is not."""
    task = spec.task
    # Slopes have one dimension: they see neither weight decay nor the rule.
    optimizer, _ = training.make_optimizer(model, Run(task, spec.method, spec.lr, spec.seed), dataset)
    steps = len(dataset.train_y) // task.batch_size * len(epochs)
    scheduler = training.make_schedule(optimizer, steps, spec.method.linear)
    for epoch in epochs:
        losses = []
        for images, labels in dataset.batches(
            "train",
            task.batch_size,
            seed=(spec.seed, epoch),
            augment=task.augment,
            channels_last=task.channels_last,
        ):
            optimizer.zero_grad()
            with torch.autocast(torch.device(task.device).type, torch.bfloat16, enabled=task.amp):
                loss = F.cross_entropy(model(images), labels)
            if weight:
                loss = loss + weight * slope_penalty(layers.values())
            loss.backward()
            losses.append(loss.detach())
            optimizer.step()
            freeze_(layers.values())
            scheduler.step()
        if not bool(torch.stack(losses).isfinite().all()):
            return False
    return True


class Probe:
    """Measures nets that began as `model`. It changes neither their gradients nor their statistics."""

    def __init__(self, task: Task, model: nn.Module, dataset: data.Dataset) -> None:
        self.task, self.dataset = task, dataset
        self.images, _ = next(dataset.batches("train", 32))
        groups = elropt.param_groups(model, self.images)
        self.tracked: list[str] = next(group["param_names"] for group in groups if group["scale_invariant"])

    def state(self, model: nn.Module, layers: dict[str, ChannelPReLU]) -> Row:
        """Test accuracy, path lengths, the share of nonlinear channels of each of the layers, the spread of E."""
        E = self.relative_grads(model)
        columns = {
            "path_length": average_path_length(model, self.images, normalized=False),
            "normalized_path_length": average_path_length(model, self.images, normalized=True),
            "nonlinear": [1 - layer.linear.float().mean().item() for layer in layers.values()],
            "spread": training.spread(E),
            "log_std": training.log_std(E),
        }
        accuracy = training.evaluate(model, self.dataset, "test", self.task)
        return {"accuracy": accuracy, **training.rounded(columns)}

    def relative_grads(self, model: nn.Module) -> NDArray[np.float64]:
        """E = ‖g‖/‖w‖ of the tracked weights, of the loss without a penalty on the first training images, [L]."""
        model = copy.deepcopy(model).train()
        images, labels = next(
            self.dataset.batches("train", GRADIENT_BATCH, channels_last=self.task.channels_last)
        )
        F.cross_entropy(model(images), labels).backward()
        weights = dict(model.named_parameters())
        norms = [(gradient(weights[name]).norm(), weights[name].detach().norm()) for name in self.tracked]
        return np.array([float(g / w) for g, w in norms])


class Plan(NamedTuple):
    """What is compared: `seeds` choose learning rates, `fresh_seeds` read the test images."""

    tasks: Sequence[Task]
    methods: Sequence[Method]
    seeds: int
    fresh_seeds: int
    weights: tuple[float, ...]
    nonlinear: tuple[
        float, ...
    ]  # shares of the layers in `Shallow` nets, which are trained by the first method


def tiny(device: str) -> Plan:
    """Does it run?"""
    tasks = [Task(model, epochs=2, device=device) for model in ("bn-mlp-4-w16", "resnet-8-w2")]
    return Plan(tasks, methods((0.03, 0.1)), 1, 2, (0.0, 3.0), (0.0, 0.5))


def small(device: str) -> Plan:
    """A plain and a residual net of 8 layers on 8×8 images of CIFAR-10, 800 steps."""
    tasks = [
        comparison.small_cifar(f"{net}-8-w8", device, limit=16000, epochs=4) for net in ("plain", "resnet")
    ]
    weights = (0.0, 0.003, 0.005, 0.008, 0.015, 0.04)
    return Plan(tasks, methods((0.03, 0.1, 0.3)), 2, 3, weights, (0.0, 0.15, 0.45, 0.7))


def full(device: str) -> Plan:
    """A plain and a residual net of 56 layers on CIFAR-10: a day or more on a GPU, by the number of steps."""
    tasks = [
        comparison.full_cifar(f"{net}-56", device, epochs=60, compile=False) for net in ("plain", "resnet")
    ]
    weights = (0.0, 0.0001, 0.0003, 0.001, 0.003, 0.01)
    return Plan(tasks, methods((0.01, 0.03, 0.1, 0.3)), 1, 3, weights, (0.0, 0.125, 0.25, 0.5))


def methods(lrs: tuple[float, ...]) -> list[Method]:
    """SGD, and ELRSGD with its default rule."""
    return comparison.with_lrs([METHODS["sgd"], METHODS["warmup"]], lrs)


PLANS = {"tiny": tiny, "small": small, "full": full}


def stages(size: str, device: str) -> Sequence[Stage]:
    """Choose the learning rates, then linearize. Raises FileNotFoundError for data that are missing."""
    plan = PLANS[size](device)
    for task in plan.tasks:
        training.load(task)
    choosing = comparison.Plan(plan.tasks, plan.methods, plan.seeds, 0)
    return lambda rows: comparison.grid(choosing), lambda rows: finals(rows, plan)


def finals(rows: Sequence[Row], plan: Plan) -> list[Spec]:
    """Every net and method at its best learning rate, with fresh seeds; the longest first."""
    specs: list[Spec] = []
    best = {
        key: comparison.validation_curve(of_one).best_lr for key, of_one in comparison.by_method(rows).items()
    }
    for seed in range(comparison.FRESH_SEEDS, comparison.FRESH_SEEDS + plan.fresh_seeds):
        for task in plan.tasks:
            label = comparison.label(dataclasses.asdict(task))
            for method in plan.methods:
                lr = best[label, method.name]
                specs.append(Linearized(task, method, lr, seed, "after", plan.weights))
                specs += [Linearized(task, method, lr, seed, "during", (weight,)) for weight in plan.weights]
            first = plan.methods[0]
            count = relu_layers(task)
            specs += [
                Shallow(task, first, best[label, first.name], seed, round(share * count))
                for share in plan.nonlinear
            ]
    return specs


def relu_layers(task: Task) -> int:
    """How many ReLUs the net of a task has."""
    dataset = training.load(task)
    model = models.build(task.model, in_shape=dataset.in_shape, classes=dataset.classes)
    return sum(isinstance(module, nn.ReLU) for module in model.modules())


def describe(spec: Spec) -> str:
    """A few words for the progress bar."""
    kind = {Run: "lr", Linearized: "linearized", Shallow: "shallow"}[type(spec)]
    return f"{kind} {spec.task.model} {spec.method.name}"


def kept(row: Row) -> Row:
    """A row without the trace of the run that chose a learning rate."""
    return comparison.without_val_traces(row) if "part" in row["spec"] else row


LINEARIZATION = Study(
    name="linearization",
    question="How accurate is a net of which only some units are nonlinear, made linear during or after training?",
    work=work,
    stages=stages,
    summarize=summarize,
    tables=tables,
    draw=draw,
    describe=describe,
    kept=kept,
)
