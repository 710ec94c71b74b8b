"""One training run: a net, data, an optimizer, a learning rate, a seed → a row of a result file.

Learning rates are chosen by runs that are judged on the validation images; the test images are read by runs of their
own, with other seeds, after the choice (`Run.part`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

import elropt
from benchmarks.common import data, models, optimizers, warmups
from benchmarks.common.dataset import Dataset
from benchmarks.common.optimizers import Method
from elropt.weight_change import Rows, weight_change

FIRST_STEPS = 20  # recorded one by one
TRACE_COLUMNS = (
    *(
        "trace_steps",
        "spread",
        "log_std",
        "mean_E",
        "applied_spread",
        "mean_elr",
        "angle_spread",
        "mean_angle",
    ),
    *("E", "elr", "angle"),
)


Part = Literal["val", "test"]


@dataclasses.dataclass(frozen=True)
class Task:
    """All of a run but its optimizer, learning rate and seed.

    Attributes:
        model, data, root, image_size, limit: see `models.build` and `data.load`.
        split: seed of the validation split.
        validation: share of the training part that becomes the validation part.
        weight_decay: SGD's, inside the gradient; others get `Entry.decay_factor` times as much, in their own way.
        other_lr: of the untracked parameters where the method has a separate one.
        curve: how often the metric is taken on the validation part on the way, at steps equally far apart.
        amp: bfloat16 autocast.
    """

    model: str
    data: str = "digits"
    root: str | None = None
    image_size: int | None = None
    limit: int | None = None
    split: int = 0
    validation: float = 0.2
    epochs: int = 25
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 0.0
    other_lr: float = 0.1
    augment: bool = False
    curve: int = 0
    device: str = "cpu"
    amp: bool = False
    channels_last: bool = False
    compile: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        part: what its metric is measured on at the end.
        layers: whether its row has E and the applied ELR of every layer.
        share: of the task's steps that are trained, with the whole schedule: a shorter run to choose by.
    """

    task: Task
    method: Method
    lr: float
    seed: int
    part: Part = "val"
    layers: bool = False
    share: float = 1.0


def run_of(spec: Mapping[str, Any]) -> Run:
    """The run of a row, from the row's "spec"."""
    method = Method(**{**spec["method"], "lrs": tuple(spec["method"]["lrs"])})
    return Run(**{**spec, "task": Task(**spec["task"]), "method": method})


def train(run: Run) -> dict[str, Any]:
    """Train once. Returns the row: the metric and the last loss, and E and the applied ELRs over the steps.

    If the loss is not finite, the run ends with that epoch, and the metric is that of its last weights.
    """
    task, method, dataset = run.task, run.method, load(run.task)
    torch.manual_seed(run.seed)
    model = models.build(task.model, in_shape=dataset.in_shape, classes=dataset.classes).to(task.device)
    if task.channels_last and method.entry.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    in_epoch = max(1, len(dataset.train_y) // task.batch_size)
    steps = max(1, round(in_epoch * task.epochs * run.share))
    optimizer, tracked = make_optimizer(model, run, dataset)
    if method.start is not None:
        warmups.WARMUPS[method.start](optimizer, list(tracked.values()))
    scheduler = make_schedule(optimizer, steps, method.linear, method.cosine_power)
    trace = Trace(optimizer, tracked, steps)
    forward = compiled(model, dataset, task) if task.compile else model
    points = round(task.curve * run.share)
    evaluated = {round((i + 1) * steps / points) for i in range(points)}
    curve: list[tuple[float, float, float]] = []
    losses, finite = torch.zeros(0), True
    step, seconds = 0, 0.0
    for epoch in range(math.ceil(steps / in_epoch)):
        started = time.perf_counter()
        of_epoch = []
        batches = dataset.batches(
            "train",
            task.batch_size,
            seed=(run.seed, epoch),
            augment=task.augment,
            channels_last=task.channels_last,
        )
        for images, labels in itertools.islice(batches, steps - step):
            if step == round(method.release * steps):
                for group in optimizer.param_groups:
                    group.update(rule=None, elr_of=None, granularity="layer")
            optimizer.zero_grad()
            with _autocast(task):
                loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            of_epoch.append(loss.detach())
            trace.before(step)
            optimizer.step()
            trace.after(step)
            scheduler.step()
            step += 1
            if step in evaluated and loss.isfinite():  # waits for the device
                seconds += time.perf_counter() - started
                curve.append((step / in_epoch, seconds, evaluate(model, dataset, "val", task)))
                started = time.perf_counter()
        losses = torch.stack(of_epoch).cpu()  # waits for the device
        seconds += time.perf_counter() - started
        finite = bool(losses.isfinite().all())
        if not finite:
            break
    return {
        dataset.metric.column: evaluate(model, dataset, run.part, task),
        "classes": dataset.classes,
        "chance": dataset.chance,
        "loss": losses.mean().item(),
        "finite": finite,
        "steps": step,
        "seconds": seconds,
        "curve": curve,
        **trace.result(run.layers),
    }


def compiled(model: nn.Module, dataset: Dataset, task: Task) -> Callable[[Tensor], Tensor]:
    """The net, compiled forward and backward before the clock starts; its own parameters and buffers do not change."""
    # torch counts every net and batch size of a sweep as a recompilation of the same code, and stops after 8.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 10000
    state = {name: value.clone() for name, value in model.state_dict().items()}
    forward = torch.compile(model, dynamic=False)
    images, labels = next(dataset.batches("train", task.batch_size, channels_last=task.channels_last))
    with _autocast(task):
        F.cross_entropy(forward(images), labels).backward()
    model.zero_grad()
    model.load_state_dict(state)
    return forward


def make_optimizer(model: nn.Module, run: Run, dataset: Dataset) -> tuple[Optimizer, dict[str, nn.Parameter]]:
    """The optimizer of a run, and its tracked weights by name, as found on some of the training images."""
    task, method = run.task, run.method
    images, _ = next(iter(dataset.batches("train", min(task.batch_size, 32))))
    return optimizers.make_optimizer(
        method,
        model,
        images,
        lr=run.lr,
        other_lr=task.other_lr,
        momentum=task.momentum,
        weight_decay=task.weight_decay * method.entry.decay_factor,
    )


def make_schedule(optimizer: Optimizer, steps: int, linear: float, cosine_power: float = 1.0) -> LRScheduler:
    """Half a cosine wave to zero, to the power `cosine_power`, after a linear warm-up over a share of the steps."""
    warmup = round(linear * steps)
    falling: LRScheduler
    if cosine_power == 1:
        falling = CosineAnnealingLR(optimizer, steps - warmup)
    else:
        falling = LambdaLR(
            optimizer, lambda step: (0.5 + 0.5 * math.cos(math.pi * step / (steps - warmup))) ** cosine_power
        )
    if not warmup:
        return falling
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return SequentialLR(optimizer, [rise, falling], milestones=[warmup])


class Trace:
    """Of the tracked weights at `recorded_steps`: E = ‖g‖/‖w‖, the ELR that is applied to them, and the angle that each
    of them turns by."""

    def __init__(self, optimizer: Optimizer, tracked: Mapping[str, Tensor], steps: int) -> None:
        self._optimizer, self._tracked = optimizer, tracked
        self._due = set(recorded_steps(steps)) if tracked else set()
        self._relative_grads: dict[int, Tensor] = {}
        self._elrs: dict[int, Tensor] = {}
        self._before: list[Tensor] = []
        self._angles: dict[int, Tensor] = {}

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Call it after backward, before the optimizer and its hooks change anything."""
        if step not in self._due:
            return
        self._relative_grads[step] = self._measure()
        self._before = [w.clone() for w in self._tracked.values()]
        if isinstance(self._optimizer, elropt.ELRSGD):
            self._optimizer.record_next_step()
        elif isinstance(self._optimizer, torch.optim.SGD):
            hook = self._optimizer.register_step_pre_hook(
                lambda *_: self._elrs.update({step: self._applied()})
            )
            self._remove = hook.remove

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Call it after the optimizer's step."""
        if step not in self._due:
            return
        weights = list(self._tracked.values())
        self._angles[step] = weight_change(self._before, weights, Rows(dict.fromkeys(weights, 1)))[0]
        if isinstance(self._optimizer, elropt.ELRSGD):
            applied = elropt.effective_lrs(self._optimizer)
            self._elrs[step] = torch.tensor([applied.get(name, math.nan) for name in self._tracked])
        elif isinstance(self._optimizer, torch.optim.SGD):
            self._remove()

    def result(self, layers: bool) -> dict[str, Any]:
        """`TRACE_COLUMNS` over the T recorded steps; "E", "elr" and "angle", [T, L], only with `layers`."""
        steps = sorted(self._relative_grads)
        E = [self._relative_grads[step].double().cpu().numpy() for step in steps]
        elr = [self._elrs[step].double().cpu().numpy() for step in steps if step in self._elrs]
        angle = [self._angles[step].cpu().numpy() for step in steps]
        columns: dict[str, Any] = {"trace_steps": steps}
        columns["spread"] = [spread(row) for row in E]
        columns["log_std"] = [log_std(row) for row in E]
        columns["mean_E"] = [geometric_mean(row) for row in E]
        columns["applied_spread"] = [spread(row) for row in elr]
        columns["mean_elr"] = [geometric_mean(row) for row in elr]
        columns["angle_spread"] = [spread(row) for row in angle]
        columns["mean_angle"] = [geometric_mean(row) for row in angle]
        if layers:
            columns |= {"E": E, "elr": elr, "angle": angle}
        return rounded(columns)

    def _measure(self) -> Tensor:
        """[L]; NaN where there is no gradient."""
        norms = [
            torch.full((), math.nan, device=w.device) if w.grad is None else w.grad.norm() / w.norm()
            for w in self._tracked.values()
        ]
        return torch.stack(norms)

    @torch.no_grad()
    def _applied(self) -> Tensor:
        return self._optimizer.param_groups[0]["lr"] * self._measure()


def recorded_steps(steps: int) -> list[int]:
    """The first `FIRST_STEPS` steps, step 100, the last, and some between: 24 at equal ratios, 12 equally far apart."""
    last = steps - 1
    between = [*np.geomspace(1, max(last, 1), 24), *np.linspace(0, last, 12)]
    chosen = {*range(FIRST_STEPS), 100, *np.rint(between).astype(int).tolist()}
    return sorted(step for step in chosen if step < steps)


def spread(values: NDArray[np.float64]) -> float:
    """max / min of the positive and finite values; NaN without any."""
    values = _usable(values)
    return float(values.max() / values.min()) if values.size else math.nan


def log_std(values: NDArray[np.float64]) -> float:
    """Standard deviation of the logarithms of the positive and finite values; NaN without any."""
    values = _usable(values)
    return float(np.log(values).std()) if values.size else math.nan


def geometric_mean(values: NDArray[np.float64]) -> float:
    """Of the positive and finite values; NaN without any."""
    values = _usable(values)
    return float(np.exp(np.log(values).mean())) if values.size else math.nan


def _usable(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values) & (values > 0)]


def significant(value: float) -> float:
    """Rounded to 4 significant digits."""
    return float(f"{value:.4g}")


def rounded(value: Any) -> Any:
    """The same as plain values for JSON, every float with 4 significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return significant(value) if isinstance(value, float) else value


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, part: Part, task: Task) -> float:
    """The data set's metric on a part, a mean over its labels."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=task.device)
    count = 0
    for inputs, labels in dataset.batches(part, 512, channels_last=task.channels_last):
        with _autocast(task):
            total += dataset.metric.total(model(inputs), labels)
        count += labels.numel()
    model.train()
    return total.item() / count


def _autocast(task: Task) -> torch.autocast:
    return torch.autocast(torch.device(task.device).type, dtype=torch.bfloat16, enabled=task.amp)


def load(task: Task) -> Dataset:
    """The data set of a task on its device, read once by a process."""
    return _load(task.data, task.root, task.image_size, task.limit, task.split, task.validation, task.device)


@functools.cache
def _load(
    name: str,
    root: str | None,
    image_size: int | None,
    limit: int | None,
    split: int,
    validation: float,
    device: str,
) -> Dataset:
    return data.load(
        name, root=root, image_size=image_size, limit=limit, seed=split, validation=validation
    ).to(device)
