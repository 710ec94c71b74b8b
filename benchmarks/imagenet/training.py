"""Training on ImageNet: one process or several, from the beginning or from a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import benchmarks
import elropt
from benchmarks.common.files import remove_unfinished, write_json, write_whole
from benchmarks.common.sweep import Row, without_nan
from benchmarks.common.training import log_std, make_schedule, significant, spread
from benchmarks.imagenet.data import (
    EvalBatches,
    Images,
    ToDevice,
    TrainBatches,
    Tree,
    draws,
    eval_image,
    loader,
    train_image,
)
from benchmarks.imagenet.log import (
    REMEDY,
    Log,
    describe,
    epoch_summary,
    locked,
    read_checkpoint,
    read_rows,
)
from benchmarks.imagenet.recipe import Recipe, Settings, differences, make_model, make_optimizer, recipe_of
from benchmarks.imagenet.world import World
from elropt import env_report, kernels

MEASURED_IMAGES = 16  # on which scale invariance is measured


def versions() -> dict[str, str]:
    """Code and packages that decide what a run computes, and in which processes on several machines may differ."""
    sha = hashlib.sha256()
    for package in (elropt, kernels, benchmarks):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            sha.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return {
        "code": sha.hexdigest()[:16],
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


class Training:
    """All that changes in a run, and that a checkpoint holds: net, optimizer, schedule, random state, and `step`, the
    number of steps done."""

    def __init__(self, settings: Settings, tree: Tree, device: torch.device) -> None:
        self.settings, self.device, self.step = settings, device, 0
        torch.manual_seed(settings.seed)
        self.model = make_model(settings).to(device)
        if device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        some = Images(tree.train, partial(eval_image, size=settings.image_size), settings.seed)
        picked = np.linspace(0, len(some) - 1, min(len(some), MEASURED_IMAGES)).astype(int).tolist()
        pixels, labels = zip(*(some[0, index] for index in picked), strict=True)
        images, _ = ToDevice(device)(torch.stack(pixels), torch.tensor(labels))
        self.optimizer, self.tracked = make_optimizer(self.model, settings, images)
        self.schedule = make_schedule(
            self.optimizer, settings.steps, settings.warmup_epochs / settings.epochs
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        state = {
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": self._random_state(),
        }
        write_whole(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError if it is damaged, of something else, or of other settings; nothing
        has been changed then."""
        state = read_checkpoint(path)
        if not (isinstance(state, dict) and state.keys() >= {"settings", "step", "model", "optimizer"}):
            raise ValueError(f"{path} is no checkpoint of a run like this: give another --out")
        if differing := differences(self.settings, state["settings"]):
            raise ValueError(
                f"{path} is of a run with {differing}: give the arguments of that run, or another --out"
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)

    def _random_state(self) -> dict[str, Tensor]:
        """States of torch's generators, the same in all processes: draws that must differ have seeds of their own."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state


class Meter:
    """Loss and speed since the last reading."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.restart()

    def restart(self) -> None:
        """Forget what has been measured."""
        self._losses = torch.zeros((), dtype=torch.float64, device=self._world.device)
        self._steps, self._waited, self._started = 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What runs inside counts as waiting for images."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def add(self, loss: Tensor) -> None:
        """Add the loss of a step of this process."""
        self._losses += loss.detach()
        self._steps += 1

    def read(self, batch_size: int) -> Row:
        """steps, loss (mean over them and over processes), seconds, images_per_second (of all processes) and data_wait,
        the share of the time in which this process waited for images. Waits for the device."""
        loss = self._world.sum(self._losses).item() / self._world.ranks / self._steps
        seconds = time.perf_counter() - self._started
        row = {
            "steps": self._steps,
            "loss": loss,
            "seconds": round(seconds, 3),
            "images_per_second": significant(self._steps * batch_size / seconds),
            "data_wait": significant(self._waited / seconds),
        }
        self.restart()
        return row


class Pace(NamedTuple):
    """Workers of each process, and steps between rows of the log and between checkpoints: no part of the result."""

    workers: int
    log_every: int
    checkpoint_every: int


def train(settings: Settings, tree: Tree, out: Path, world: World, pace: Pace, console: Console) -> Training:
    """Train, or go on with training, until the end or until the loss is not finite; see the head of
    `benchmarks/imagenet/__main__.py`. A run that has left a result is only loaded.

    Raises Refused on all processes if they do not see the same, if another run is at work in `out`, or if what `out`
    holds is damaged, incomplete or of other settings.
    """
    rhythm = {"log_every": pace.log_every, "checkpoint_every": pace.checkpoint_every}
    world.compare(dataclasses.asdict(settings) | rhythm | versions())
    training = world.together(lambda: Training(settings, tree, world.device))
    with contextlib.ExitStack() as lock:
        world.together(lambda: lock.enter_context(locked(out)) if world.rank == 0 else None)
        rows = world.together(lambda: go_on(training, out))
        finished = (out / "result.json").exists()
        world.compare({"step of the checkpoint": training.step, "result": finished})
        if not finished:
            take_steps(training, rows, tree, out, world, pace, console)
        elif world.rank == 0:
            console.print(f"nothing to do: {out / 'result.json'} is the result of this run", soft_wrap=True)
    return training


def go_on(training: Training, out: Path) -> list[Row]:
    """Load the checkpoint that an earlier call has left, if any; returns the rows of its log.

    Raises ValueError where what is left is damaged, incomplete, or of other settings.
    """
    checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
    if checkpoint.exists():
        training.load(checkpoint)
        return read_rows(log, training.step, training.settings.steps_per_epoch)
    for path in (out / "result.json", log):
        if path.exists() and path.stat().st_size:
            raise ValueError(f"{path} is there, but the checkpoint of this run is not: {REMEDY}")
    return []


def take_steps(
    training: Training,
    rows: Sequence[Row],
    tree: Tree,
    out: Path,
    world: World,
    pace: Pace,
    console: Console,
) -> None:
    """Train from `training.step` on."""
    settings, checkpoint = training.settings, out / "checkpoint.pt"
    recipe = recipe_of(settings.model)
    forward: Callable[[Tensor], Tensor] = training.model
    if world.ranks > 1:
        forward = DistributedDataParallel(
            training.model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # BatchNorm's averages are needed in `evaluate` alone
        )
    if settings.compile:
        forward = torch.compile(forward, dynamic=False)
    main = world.rank == 0
    if main:
        remove_unfinished(out)
    log = Log(out / "log.jsonl" if main else None, rows)
    if main and not checkpoint.exists():
        training.save(checkpoint)
    env = env_report.collect() if main else {}
    commit = f"{env.get('git_commit')}{' with changes' if env.get('git_dirty') else ''}"

    batches = iter(train_loader(training, tree, world, pace.workers))
    to_device, meter, finite = ToDevice(world.device), Meter(world), True
    shown = main and console.is_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with contextlib.closing(log), Progress(*columns, console=console, disable=not shown) as progress:
        bar = progress.add_task("training", total=settings.steps, completed=training.step)
        while training.step < settings.steps:
            with meter.waiting():
                pixels, labels = next(batches)
            ends_epoch = (training.step + 1) % settings.steps_per_epoch == 0
            lr = training.optimizer.param_groups[0]["lr"]
            loss = backward(training, forward, *to_device(pixels, labels), recipe)
            meter.add(loss)
            spreads = take_step(training, measure=ends_epoch)
            training.schedule.step()
            training.step += 1
            saves = ends_epoch or training.step % pace.checkpoint_every == 0
            epoch = -(-training.step // settings.steps_per_epoch)
            at = {"epoch": epoch, "step": training.step}
            if not saves and training.step % pace.log_every:
                continue
            row = {"kind": "steps", **at, "lr": lr, **meter.read(settings.batch_size)}
            log.write(row)
            progress.update(bar, completed=training.step, description=describe(row))
            if not (finite := math.isfinite(row["loss"])):
                break
            if ends_epoch:
                accuracies = evaluate(training.model, tree, settings, world, pace.workers)
                summary = epoch_summary(log.rows, epoch) | memory(world.device)
                log.write({"kind": "epoch", **at, **accuracies, **spreads, **summary, "commit": commit})
                if main:
                    console.print(f"{describe(row)}, top-1 {accuracies['top1']:.2%}", soft_wrap=True)
            if saves and main:
                log.sync()
                training.save(checkpoint)
            meter.restart()
    if main:
        write_result(out / "result.json", training, recipe, log.rows, env, tree, finite)
        if not finite:
            console.print(
                f"the loss is not finite at step {training.step}: stopped; try a smaller --lr, with another --out",
                soft_wrap=True,
            )


def train_loader(training: Training, tree: Tree, world: World, workers: int) -> DataLoader[Any]:
    """The batches of this process, from the next step to the last."""
    settings, recipe = training.settings, recipe_of(training.settings.model)
    transform = partial(train_image, size=settings.image_size, augmentation=recipe.augmentation)
    images = Images(tree.train, transform, settings.seed)
    batches = TrainBatches(
        images=len(images),
        batch_size=settings.batch_size,
        seed=settings.seed,
        first=training.step,
        last=settings.steps,
        rank=world.rank,
        ranks=world.ranks,
    )
    return loader(images, batches, workers=workers, device=world.device)


def backward(
    training: Training, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, recipe: Recipe
) -> Tensor:
    """Leave the gradients of a step in `.grad`; returns the loss."""
    settings = training.settings
    share = 1.0
    if recipe.mixup:
        share = draws(settings.seed, "mixup", training.step).beta(recipe.mixup, recipe.mixup)
        images = torch.lerp(images.roll(1, 0), images, share)
    training.optimizer.zero_grad()
    with torch.autocast(training.device.type, torch.bfloat16, enabled=settings.amp):
        logits = forward(images)
        cross_entropy = partial(F.cross_entropy, logits, label_smoothing=recipe.label_smoothing)
        loss = cross_entropy(labels)
        if recipe.mixup:
            loss = share * loss + (1 - share) * cross_entropy(labels.roll(1))
    loss.backward()
    if recipe.grad_clip:
        nn.utils.clip_grad_norm_(training.model.parameters(), recipe.grad_clip)
    return loss


def take_step(training: Training, *, measure: bool) -> Row:
    """The optimizer's step. With `measure`, how far the tracked layers are apart at it: spread and log_std of E =
    ‖g‖/‖w‖, and with elropt's optimizer of the ELR as applied."""
    optimizer = training.optimizer
    if not measure:
        optimizer.step()
        return {}
    with torch.no_grad():
        E = [p.grad.norm() / p.norm() for p in training.tracked.values() if p.grad is not None]
        values = np.array([value.item() for value in E])
    row: Row = {"spread": significant(spread(values)), "log_std": significant(log_std(values))}
    if not isinstance(optimizer, elropt.ELRSGD):
        optimizer.step()
        return row
    optimizer.record_next_step()
    optimizer.step()
    table = elropt.layer_stats(optimizer)
    applied = {"applied_spread": table.elr_spread, "applied_log_std": table.log_elr_std}
    return row | {name: significant(value) for name, value in applied.items()}


@torch.no_grad()
def evaluate(model: nn.Module, tree: Tree, settings: Settings, world: World, workers: int) -> Row:
    """top1 and top5, the shares of the `val_images` whose class is among the largest 1 and 5 logits; every image counts
    once, however many processes share them, and all use the averages of BatchNorm that the first process has."""
    if world.ranks > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    images = Images(tree.val, partial(eval_image, size=settings.image_size), settings.seed)
    order = EvalBatches(len(images), settings.batch_size // world.ranks, world.rank, world.ranks)
    to_device = ToDevice(world.device)
    hits_1, hits_5 = torch.zeros(2, dtype=torch.int64, device=world.device)
    model.eval()
    for pixels, labels in loader(images, order, workers=workers, device=world.device):
        pixels, labels = to_device(pixels, labels)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=settings.amp):
            logits = model(pixels)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        hits_1 += hits[:, 0].sum()
        hits_5 += hits.sum()
    model.train()
    own = torch.tensor(len(range(world.rank, len(images), world.ranks)), device=world.device)
    top1, top5, total = world.sum(torch.stack([hits_1, hits_5, own])).tolist()
    return {"top1": top1 / total, "top5": top5 / total, "val_images": total}


def memory(device: torch.device) -> Row:
    """memory_gib: peak of the memory that torch has held on a GPU."""
    if device.type != "cuda":
        return {}
    return {"memory_gib": significant(torch.cuda.max_memory_allocated(device) / 2**30)}


def write_result(
    path: Path,
    training: Training,
    recipe: Recipe,
    rows: Sequence[Row],
    env: dict[str, Any],
    tree: Tree,
    finite: bool,
) -> None:
    """The result of a run: on what, with what, and a row for each epoch. No path of this machine."""
    epochs = [row for row in rows if row["kind"] == "epoch"]
    result = {
        "benchmark": "imagenet",
        "env": env,
        "commits": sorted({row["commit"] for row in epochs}),
        "settings": dataclasses.asdict(training.settings),
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "tracked_layers": len(training.tracked),
        "judged_on": "a part of train/ that was held out" if training.settings.hold_out else "val/",
        "class_names": tree.class_names if len(tree.class_names) <= 100 else None,
        "finite": finite,
        "top1": epochs[-1]["top1"] if epochs else math.nan,
        "top5": epochs[-1]["top5"] if epochs else math.nan,
        "rows": epochs,
    }
    write_json(path, without_nan(result), indent=1)
