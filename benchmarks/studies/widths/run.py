"""Width scaling (source C of docs/guide/width-scaling.md): how do the largest stable and the best learning rate move
with the width of a net in standard parameterization, and does one tuned on a narrow net serve a wide one?

Short runs of plain MLPs at a constant learning rate; what is asked is an exponent, not an accuracy. Pilot runs find
where training breaks, for each width on its own; a grid in factors of 2 around that is judged on validation images;
where the best learning rate or an edge lies at the grid's end, it is extended; then fresh seeds at the best learning
rates read the test images. Checks go a few steps at lr·(width/base width)^−α, for the exponents of logits, activations
and gradients.

This module measures. `summarize` draws the conclusions from the rows, `report` makes tables and figures of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import elropt
from benchmarks.common import models, optimizers, training
from benchmarks.common.optimizers import METHODS
from benchmarks.common.statistics import grouped
from benchmarks.common.sweep import Row
from benchmarks.studies.study import Stage, Study
from benchmarks.studies.widths.report import draw, tables
from benchmarks.studies.widths.summarize import (
    NORMS,
    best_pilot,
    chosen_lrs,
    classify,
    largest_stable,
    of_part,
    open_ends,
    summarize,
)
from elropt.rules import RULES

Part: TypeAlias = Literal["pilot", "val", "test", "check"]

PILOT_SHARE = 0.25  # of the steps
PILOT_FACTOR = 4.0  # of the grid of the pilot runs
FACTOR = 2.0  # of the grid
BEYOND = 4.0  # how far the grid reaches below the best pilot run and above the pilot runs' edge
EXTENSION = 2  # points by which an end is moved
EXTENSIONS = 2
FRESH = 1000  # first seed of the runs that read the test images
RECORDED = (0, 1, 2, 4, 10, 30, 100, 300, 1000, 3000)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is compared: the net without its width (`models.build`), the optimizer and the loss.

    optimizer: "sgd" (no momentum), "adam", or a rule of ELRSGD, "warmup" or "angle"; with "angle" lr is that of the
    tracked layers, in rad, and all else trains with `OTHER_LR`. scaled: by `elropt.width_scaled_groups`.
    """

    optimizer: str
    loss: str = "cross_entropy"
    scaled: bool = False
    model: str = "mlp-3"


@dataclasses.dataclass(frozen=True)
class Task:
    """All that the runs of a size share; see `data.load`. base_width: where learning rates are tuned."""

    steps: int
    base_width: int = 64
    data: str = "cifar10"
    image_size: int | None = 4  # 48 inputs: few against the widths
    limit: int | None = 12_500
    batch_size: int = 64
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. part: what it is for, and which images its accuracy is measured on. alpha: of a check, whose
    `lr` is that at the base width."""

    task: Task
    setting: Setting
    width: int
    lr: float
    seed: int
    part: Part = "val"
    alpha: float | None = None


OTHER_LR = 0.1
CHECK_STEPS = 10
CHECK_LRS = {"sgd": 0.05, "adam": 0.001}  # at the base width
ALPHAS = {"sgd": (0.0, 0.5, 1.0), "adam": (0.5, 1.0, 1.5)}
PILOT_LRS = {  # first and last of the grid of the pilot runs
    "sgd": (2.0**-10, 2.0**6),
    "adam": (2.0**-18, 2.0**-2),
    "warmup": (2.0**-8, 2.0**8),
    "angle": (2.0**-10, 2.0**2),
}


# Measuring


def work(run: Run) -> Row:
    """Train once: norms on the way (`Probe`), class, losses and accuracy."""
    task, setting = run.task, run.setting
    dataset = training.load(
        training.Task(
            setting.model, task.data, image_size=task.image_size, limit=task.limit, device=task.device
        )
    )
    torch.manual_seed(run.seed)
    model = models.build(
        f"{setting.model}-w{run.width}", in_shape=dataset.in_shape, classes=dataset.classes
    ).to(task.device)
    loss_of = LOSSES[setting.loss]
    batches = _endless(lambda epoch: dataset.batches("train", task.batch_size, seed=(run.seed, epoch)))
    probe = Probe(model, next(batches), loss_of)
    optimizer = make_optimizer(model, run, probe.images)
    steps = {"pilot": max(4, round(PILOT_SHARE * task.steps)), "check": CHECK_STEPS}.get(run.part, task.steps)
    due = {step for step in RECORDED if step < steps} | {steps}
    probe.record(0)
    losses: list[Tensor] = []
    for step in range(1, steps + 1):
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step in due and not probe.record(step):
            break
    row: Row = {
        "class": classify(probe.columns),
        "classes": dataset.classes,
        "loss": _rounded(torch.stack(losses[-(steps // 10 or 1) :]).mean()),
    }
    if run.part in ("val", "test"):
        of_training = training.Task(setting.model, batch_size=task.batch_size, device=task.device)
        row["accuracy"] = training.evaluate(model, dataset, run.part, of_training)
    return row | probe.columns | {"lr": _layer_lrs(optimizer, probe.weights)}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch."""
    return F.cross_entropy(logits, labels)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """½‖f − one-hot‖², mean over the batch: its gradient with respect to the logits is f − one-hot."""
    return 0.5 * (logits - F.one_hot(labels, logits.shape[1])).square().sum(1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": cross_entropy, "mse": squared_error}


class Probe:
    """Norms of a net on one batch, at some steps.

    columns, over the recorded steps [T]: `at`; `loss_at`; root mean squares over all coordinates of the `logits`, of
    their change since step 0 `logit_change` and of `logit_grad` (∂ℓ/∂f, ℓ the loss of one image); the same of the
    outputs of the hidden layers [T, L], `activations`, `activation_change` and `activation_grads` (∂ℓ/∂x); and of the
    weight matrices [T, L + 1] `E` = ‖g‖/‖w‖.
    """

    def __init__(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], loss_of: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.model, self.loss_of = model, loss_of
        self.images, self.labels = batch
        self.weights = [p for p in model.parameters() if p.ndim >= 2]
        self.columns: dict[str, list[Any]] = {}
        self._relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
        self._first: list[Tensor] = []

    def record(self, step: int) -> bool:
        """Measure, and add a line to the columns. Returns whether all of it is finite."""
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs.append(output)

        hooks = [relu.register_forward_hook(keep) for relu in self._relus]
        logits = self.model(self.images)
        for hook in hooks:
            hook.remove()
        loss = self.loss_of(logits, self.labels)
        of_outputs = torch.autograd.grad(loss, [logits, *outputs, *self.weights])
        chi, grads = of_outputs[0], of_outputs[1 : len(outputs) + 1]
        with torch.no_grad():
            self._first = self._first or [x.clone() for x in (logits, *outputs)]
            changes = [_rms(x - first) for x, first in zip((logits, *outputs), self._first, strict=True)]
            pairs = zip(of_outputs[len(outputs) + 1 :], self.weights, strict=True)
            line = {
                "loss_at": loss,
                "logits": _rms(logits),
                "logit_change": changes[0],
                "logit_grad": len(chi) * _rms(chi),
                "activations": torch.stack([_rms(x) for x in outputs]),
                "activation_change": torch.stack(changes[1:]),
                "activation_grads": torch.stack([len(chi) * _rms(x) for x in grads]),
                "E": torch.stack([grad.norm() / weight.norm() for grad, weight in pairs]),
            }
        self.columns.setdefault("at", []).append(step)
        for name, value in line.items():
            self.columns.setdefault(name, []).append(_rounded(value))
        return all(bool(value.isfinite().all()) for value in line.values())


def make_optimizer(model: nn.Module, run: Run, images: Tensor) -> Optimizer:
    """The optimizer of a run, its learning rates scaled by the width if the setting or a check says so."""
    setting, base = run.setting, run.task.base_width
    lr = run.lr * (run.width / base) ** -(run.alpha or 0.0)
    if setting.optimizer in RULES:
        method, options = METHODS[setting.optimizer], {"momentum": 0.0, "weight_decay": 0.0}
        return optimizers.make_optimizer(method, model, images, lr=lr, other_lr=OTHER_LR, **options)[0]
    params: Any = model.parameters()
    if setting.scaled:
        params = elropt.width_scaled_groups(
            model,
            base,
            lr=lr,
            loss=setting.loss,  # type: ignore[arg-type]
            optimizer=setting.optimizer,  # type: ignore[arg-type]
        )
    return {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[setting.optimizer](params, lr=lr)


def _layer_lrs(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[float]:
    by_param = {param: group["lr"] for group in optimizer.param_groups for param in group["params"]}
    return training.rounded([by_param[weight] for weight in weights])


def _endless(epoch: Callable[[int], Iterator[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    return itertools.chain.from_iterable(map(epoch, itertools.count()))


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _rounded(value: Tensor) -> Any:
    return training.rounded(value.detach().double().cpu().tolist())


# What to measure


def pilots(task: Task, settings: Sequence[Setting], widths: Sequence[int]) -> list[Run]:
    """One seed, few steps, the same wide grid at every width."""
    return [
        Run(task, setting, width, lr, 0, "pilot")
        for setting in settings
        for width in sorted(widths, reverse=True)
        for lr in geometric(*PILOT_LRS[setting.optimizer], PILOT_FACTOR)
    ]


def grid(rows: list[Row], seeds: int) -> list[Run]:
    """A finer grid: from below the best pilot run to above the pilot runs' edge, or above the best if there is none."""
    runs = []
    for of_one in grouped(of_part(rows, "pilot"), _place).values():
        edge, best = largest_stable(of_one), best_pilot(of_one)
        last = best if edge is None or edge.open else edge.lr
        runs += _on(of_one, geometric(best / BEYOND, last * BEYOND, FACTOR), seeds)
    return runs


def extended(rows: list[Row], seeds: int) -> list[Run]:
    """More points where the best learning rate, or an edge that the pilot runs have found, is at the end of a grid."""
    runs = []
    pilots = grouped(of_part(rows, "pilot"), _place)
    for place, of_one in grouped(of_part(rows, "val"), _place).items():
        edge = largest_stable(pilots[place])
        below, above = open_ends(of_one, has_edge=edge is not None and not edge.open)
        lrs = sorted({row["spec"]["lr"] for row in of_one})
        more = [lrs[0] / FACTOR ** (i + 1) for i in range(EXTENSION) if below]
        more += [lrs[-1] * FACTOR ** (i + 1) for i in range(EXTENSION) if above]
        runs += _on(of_one, more, seeds)
    return runs


def finals(rows: list[Row], settings: Sequence[Setting], seeds: int) -> list[Run]:
    """Fresh seeds at each width's own best learning rate and at that of the base width, for some settings."""
    runs = []
    for of_setting in grouped(of_part(rows, "val"), lambda row: str(row["spec"]["setting"])).values():
        task, setting = _task_and_setting(of_setting[0])
        if setting not in settings:
            continue
        for width, lrs in chosen_lrs(of_setting).items():
            runs += [
                Run(task, setting, width, lr, FRESH + seed, "test")
                for lr in dict.fromkeys(lrs.values())
                for seed in range(seeds)
            ]
    return runs


def checks(task: Task, settings: Sequence[Setting], widths: Sequence[int], seeds: int) -> list[Run]:
    """A few steps at lr·(width/base)^−α for every α, or with learning rates scaled by layer."""
    return [
        Run(task, setting, width, CHECK_LRS[setting.optimizer], seed, "check", alpha)
        for setting in settings
        for alpha in ((0.0,) if setting.scaled else ALPHAS[setting.optimizer])
        for width in sorted(widths, reverse=True)
        for seed in range(seeds)
    ]


def geometric(first: float, last: float, factor: float) -> list[float]:
    """first, first·factor, … up to last."""
    return [first * factor**i for i in range(round(math.log(last / first, factor)) + 1)]


def _on(of_one: list[Row], lrs: Sequence[float], seeds: int) -> list[Run]:
    task, setting = _task_and_setting(of_one[0])
    width = of_one[0]["spec"]["width"]
    return [Run(task, setting, width, lr, seed) for lr in lrs for seed in range(seeds)]


def _task_and_setting(row: Row) -> tuple[Task, Setting]:
    return Task(**row["spec"]["task"]), Setting(**row["spec"]["setting"])


def _place(row: Row) -> tuple[str, int]:
    return str(row["spec"]["setting"]), row["spec"]["width"]


PLAIN = [Setting(*pair) for pair in itertools.product(("sgd", "adam"), ("cross_entropy", "mse"))]
SETTINGS = [dataclasses.replace(setting, scaled=scaled) for setting in PLAIN for scaled in (False, True)]


def stages(size: str, device: str) -> list[Stage]:
    """Pilot runs and checks; the grid; its extensions; fresh seeds."""
    settings, normalized = SETTINGS, [Setting(name, model="bn-mlp-3") for name in ("sgd", "warmup", "angle")]
    if size == "tiny":
        task = Task(12, base_width=8, data="digits", image_size=None, limit=None, device=device)
        widths = check_widths = (8, 16, 32)
        settings, normalized, seeds, fresh = SETTINGS[:2], normalized[2:], 2, 2
    elif size == "small":
        task = Task(100, device=device)
        widths, check_widths, seeds, fresh = (64, 128, 256, 512, 1024), (64, 128, 256, 512, 1024, 2048), 3, 5
    else:
        task = Task(2000, base_width=256, image_size=None, limit=None, device=device)
        widths = check_widths = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
        settings, normalized = (
            [dataclasses.replace(setting, model=model) for setting in of]
            for of, model in ((settings, "mlp-8"), (normalized, "bn-mlp-8"))
        )
        seeds, fresh = 5, 5
    normalized_widths = widths[::2]
    return [
        lambda _rows: checks(task, settings, check_widths, seeds),
        lambda _rows: pilots(task, settings, widths) + pilots(task, normalized, normalized_widths),
        lambda rows: grid(rows, seeds),
        *[lambda rows: extended(rows, seeds)] * EXTENSIONS,
        lambda rows: finals(rows, settings, fresh),
    ]


def describe(run: Run) -> str:
    """A few words for the progress bar."""
    setting = run.setting
    return f"{run.part} {setting.model}-w{run.width} {setting.optimizer} {setting.loss}, lr {run.lr:.2g}"


def kept(row: Row) -> Row:
    """Of a check what exponents are made of; of the other runs the class and the accuracy."""
    columns = ("at", *NORMS, "E", "lr") if row["spec"]["part"] == "check" else ("classes", "accuracy")
    return {key: row[key] for key in ("spec", "class", *columns) if key in row}


WIDTHS = Study(
    name="widths",
    question="How do the largest stable and the best learning rate move with the width, and do they transfer?",
    work=work,
    stages=stages,
    summarize=summarize,
    tables=tables,
    draw=draw,
    describe=describe,
    kept=kept,
)
