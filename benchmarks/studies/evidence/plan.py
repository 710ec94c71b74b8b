"""What the study runs, in the order of what it is worth: blocks of one task and some methods.

Every row tells the block's question by its task, method, learning rate and part alone, so that blocks share runs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.common import training
from benchmarks.common.dataset import metric_of
from benchmarks.common.optimizers import METHODS, Method, check_installed
from benchmarks.common.sweep import Row
from benchmarks.common.training import Run, Task, run_of
from benchmarks.studies import comparison
from benchmarks.studies.comparison import FRESH_SEEDS, USABLE

SHARE = 1 / 3  # of the steps, in the runs that a learning rate is chosen by
MOST = 9  # learning rates of one method
DECAY = 5e-4  # SGD's
COSINE_SQUARED = "+cosine²"  # the angle of "equilibrium" is √lr, so it falls as a cosine with this one
RELEASED = "+release"  # SGD takes over after `RELEASE_AT` of the steps
RELEASE_AT = 0.7

# Where the grid begins; it goes on at both ends, see `lrs_to_try`.
STARTS: dict[str, tuple[float, ...]] = {
    "SGD's": (0.03, 0.1, 0.3),
    "radians": (0.003, 0.01, 0.03),
    "AdamW's": (0.003, 0.01, 0.03),
    "of LARS": (0.3, 1.0, 3.0),
}
START_OF_EQUILIBRIUM = (0.1, 0.3, 1.0)  # in SGD's unit

OURS = ("equilibrium-gradient", "equilibrium-filter")  # the forms that the small study chose
CORE = ("sgd", "sgd+linear", *OURS, "muon", "adamw", "warmup")
REST = ("muonh", "adamh", "angle", "lars+linear", "sgdp", "adamw+linear", "uniform")
WARMED = ("equilibrium-filter+linear", "muon+linear", "warmup+linear")
OF_TEXT_FIRST = ("adamw", "adamw+linear", "muon", "muonh")
OF_TEXT = (*OF_TEXT_FIRST, "adamh", "muon+linear", "equilibrium-gradient", "muonh+linear", "adamh+linear")
OF_DEEP = ("sgd", "sgd+linear", "equilibrium-filter", "muon", "warmup")
OF_BATCHES = ("sgd+linear", "lars+linear", "equilibrium-filter", "muon")
OF_TRANSFER = ("sgd+linear", "adamw", "adamh", "equilibrium-gradient")
OF_BUDGETS = ("sgd", "sgd+linear", *OURS, *(name + COSINE_SQUARED for name in OURS), "muon")
OF_HORIZON = (*OURS, "sgd+linear", "muon")
LEFT_OUT = {  # by what the small studies show, or the first rows of this one
    "sphere": "behind SGD on both nets of swap-in, and its learning rate has a unit of its own",
    "equilibrium": "on the update, by layer it is worse than by filter on all nets with both (control)",
    "uniform-update, angle-update": "equal true angles train no better than equal ELRs (control)",
    "angle-filter, angle-update-filter": "no better than by layer on a residual net (control)",
    "equilibrium-unprotected": "usable at SGD's learning rate alone (control)",
    "equilibrium-gradient-filter": "between two forms that were not told apart by the first rows",
}


class Block(NamedTuple):
    """Methods on one task.

    Attributes:
        question: of the study, a key of `summarize.QUESTIONS`, or "large".
        seeds: fresh seeds at full length, each read once on the test part; 0: learning rates only.
        lrs_from: the task whose runs a learning rate is chosen by; None: this one.
        lr_of: the method whose learning rate all take, in place of their own.
        by_steps: the learning rate is smaller by as much as the run is longer than those that it was chosen by.
        around: a task around whose best learning rates the grids begin, so that it is known what those lose here.
        ranges: learning rates go on until the usable range is known, not only until the best is between two others.
    """

    question: str
    task: Task
    methods: Sequence[str]
    seeds: int = 3
    lrs_from: Task | None = None
    lr_of: str | None = None
    by_steps: bool = False
    around: Task | None = None
    ranges: bool = False


def method_of(name: str) -> Method:
    """A method by name; it does not hold its grid, so that rows stay valid when a grid changes."""
    for ending, changes in (
        (COSINE_SQUARED, {"cosine_power": 2.0}),
        (RELEASED, {"release": RELEASE_AT}),
    ):
        if name.endswith(ending):
            return dataclasses.replace(method_of(name.removesuffix(ending)), name=name, **changes)
    return dataclasses.replace(METHODS[name], lrs=())


def chosen_as(name: str) -> str:
    """The method whose learning rate a method takes: the same without another end of the schedule."""
    return name.removesuffix(COSINE_SQUARED).removesuffix(RELEASED)


def start_of(name: str) -> tuple[float, ...]:
    """Where the grid of a method begins."""
    return START_OF_EQUILIBRIUM if "equilibrium" in name else STARTS[METHODS[name].unit]


def neighbour(lr: float, step: int) -> float:
    """The next learning rate up (1) or down (−1) among 1, 3, 10, 30 …"""
    place = round(2 * math.log10(lr)) + step
    return float(f"{(1, 3)[place % 2] * 10.0 ** (place // 2):.0e}")


def by_steps(lr: float, chosen_on: Task, task: Task) -> float:
    """A learning rate that was chosen on `SHARE` of the steps of `chosen_on`, for all of `task`: lr · steps stays, as
    far as the grid has it. In equilibrium weights forget where they were in 1/(lr · decay) steps: docs/theory.md §7."""
    return neighbour(lr * SHARE * chosen_on.epochs / task.epochs, 0)


def lrs_to_try(
    start: Sequence[float], scores: Mapping[float, float], chance: float, ranges: bool = False
) -> list[float]:
    """What to measure next, empty if there is enough: first the start, then on from an end as long as that end is the
    best; with `ranges` as long as it has `USABLE` of the best gain over chance, so that the usable range is not cut off
    either; at most `MOST`."""
    if missing := [lr for lr in start if lr not in scores]:
        return missing
    best = max(scores.values())
    usable = min(best, chance + USABLE * (best - chance))  # the best itself where all are worse than chance
    bar = usable if ranges else best
    beyond = [
        neighbour(end(scores), step) for end, step in ((max, 1), (min, -1)) if scores[end(scores)] >= bar
    ]
    return beyond[: max(0, MOST - len(scores))]


class Known:
    """Rows by run."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {run_of(row["spec"]): row for row in rows}
        self._scores: dict[tuple[Task, str], dict[float, float]] = {}
        self.chances: dict[tuple[Task, str], float] = {}
        for run, row in self.rows.items():
            if run.part == "val":
                key, metric = (run.task, run.method.name), metric_of(row)
                self._scores.setdefault(key, {})[run.lr] = metric.score(row)
                self.chances[key] = metric.chance(row)

    def scores(self, task: Task, method: str) -> dict[float, float]:
        """Validation score by learning rate, of the runs for choosing."""
        return self._scores.get((task, method), {})

    def next_lrs(
        self, task: Task, method: str, around: Task | None = None, ranges: bool = False
    ) -> list[float]:
        """What to measure next before the learning rate can be chosen, or the usable range be known; with `around` a
        grid begins there, once the best learning rate of that task is known."""
        start: Sequence[float] = start_of(method)
        if around is not None:
            best = self.best_lr(around, method)
            if best is None:
                return []
            start = neighbour(best, -1), best, neighbour(best, 1)
        scores = self.scores(task, method)
        return lrs_to_try(start, scores, self.chances.get((task, method), 0.0), ranges)

    def best_lr(self, task: Task, method: str, around: Task | None = None) -> float | None:
        """The chosen learning rate; None if it is not known yet."""
        scores = self.scores(task, method)
        if not scores or self.next_lrs(task, method, around):
            return None
        return max(scores, key=scores.__getitem__)

    def lr(self, block: Block, name: str) -> float | None:
        """The learning rate of a method in a block; None if it is not known yet."""
        chosen_on = block.lrs_from or block.task
        lr = self.best_lr(chosen_on, block.lr_of or chosen_as(name), block.around)
        return by_steps(lr, chosen_on, block.task) if block.by_steps and lr is not None else lr


def choosing(block: Block, known: Known) -> Iterator[Run]:
    """The runs that are known to be needed to choose the learning rates."""
    task = block.lrs_from or block.task
    for name in dict.fromkeys([block.lr_of] if block.lr_of else map(chosen_as, block.methods)):
        new = known.next_lrs(task, name, block.around, block.ranges)
        for lr in [*known.scores(task, name), *new]:
            yield Run(task, method_of(name), lr, 0, share=SHARE)


def finals(block: Block, known: Known) -> Iterator[Run]:
    """The runs with fresh seeds whose learning rate is known; seed by seed, so that methods can soon be compared."""
    for seed in range(FRESH_SEEDS, FRESH_SEEDS + block.seeds):
        for name in block.methods:
            if (lr := known.lr(block, name)) is not None:
                yield Run(block.task, method_of(name), lr, seed, "test", layers=False)


def runs_of(blocks: Sequence[Block], rows: Sequence[Row]) -> list[Run]:
    """All runs that are known to be needed, block by block."""
    known = Known(rows)
    return list(
        dict.fromkeys(run for block in blocks for part in (choosing, finals) for run in part(block, known))
    )


def waiting(block: Block, known: Known) -> list[Run]:
    """The runs with fresh seeds whose learning rate is not known yet, with 0 in its place."""
    return [
        Run(block.task, method_of(name), 0.0, FRESH_SEEDS + index, "test")
        for index in range(block.seeds)
        for name in block.methods
        if known.lr(block, name) is None
    ]


class Nets(NamedTuple):
    """The tasks of one size."""

    residual: Task
    plain: Task
    deep: Task
    text: Task | None
    budgets: tuple[int, int]
    batches: tuple[int, ...]
    models: tuple[str, ...]  # narrower, wider, shallower and deeper ones than the residual net
    large: Task | None  # images at full size


def has_heavyball() -> bool:
    """Whether HeavyBall, an optional check, is installed."""
    return importlib.util.find_spec("heavyball") is not None


def blocks(nets: Nets) -> list[Block]:
    """All blocks; the first are worth most. One with more seeds goes on with an earlier one of the same methods."""
    residual, plain = nets.residual, nets.plain
    untuned = (*OURS, "warmup")
    ends = [name + end for end in (COSINE_SQUARED, RELEASED) for name in OURS]
    ends.append("sgd+linear" + COSINE_SQUARED)  # is a steeper end better with SGD too?
    short, long = (dataclasses.replace(residual, epochs=epochs, curve=epochs) for epochs in nets.budgets)
    result = [
        Block("tuned", residual, CORE, ranges=True),
        Block("annealing", residual, ends),
        Block("untuned", residual, untuned, lr_of="sgd"),
        Block("tuned", plain, CORE, ranges=True),
        Block("untuned", plain, untuned, lr_of="sgd"),
        Block("horizon", plain, OF_HORIZON, by_steps=True),
        Block("horizon", residual, OF_HORIZON, by_steps=True),
        Block("annealing", residual, [name for name in ends if "filter" in name], by_steps=True),
        Block("budget", short, OF_BUDGETS, lrs_from=residual),
        Block("budget", short, OURS, lrs_from=residual, lr_of="sgd"),
    ]
    if nets.text is not None:
        result += [
            Block("text", nets.text, OF_TEXT, 1, ranges=True),
            Block("text", nets.text, OF_TEXT_FIRST, 2),
        ]
    result += [
        Block("tuned", residual, REST, 1),
        Block("budget", long, ("sgd+linear",), 2, lrs_from=residual),
        Block("budget", long, ("equilibrium-filter",), 2, lrs_from=residual, lr_of="sgd"),
        Block("budget", long, ("equilibrium-filter", "muon"), 1, lrs_from=residual, by_steps=True),
        Block("tuned", residual, WARMED, 2),
    ]
    *middle, largest = (
        Block("batch", dataclasses.replace(residual, batch_size=size), OF_BATCHES, 2, around=residual)
        for size in nets.batches
    )
    transfer = [
        Block("transfer", dataclasses.replace(residual, model=model), OF_TRANSFER, 0, around=residual)
        for model in nets.models
    ]
    result += transfer[:2]
    if has_heavyball():  # a check of AdamH by another implementation
        result += [
            Block("tuned", task, ("hyperball",), 1) for task in (residual, nets.text) if task is not None
        ]
    result.append(largest)
    for seeds in (1, 2):
        result += [
            Block("tuned", nets.deep, OF_DEEP, seeds),
            Block("untuned", nets.deep, ("equilibrium-filter",), seeds, lr_of="sgd"),
        ]
    for seeds in (1, 2):
        if nets.large is not None:
            result += [
                Block("large", nets.large, ("sgd+linear",), seeds, lrs_from=residual),
                Block("large", nets.large, ("equilibrium-filter",), seeds, lrs_from=residual, lr_of="sgd"),
            ]
        if seeds == 1:
            result += middle
    result += transfer[2:]
    return result


def tiny(device: str) -> list[Block]:
    """Does it run?"""
    task = dataclasses.replace(
        comparison.tiny_tasks(device)[0], epochs=3, curve=3, weight_decay=DECAY, limit=400
    )
    other = dataclasses.replace(task, model="bn-mlp-3-w16")
    text = Task(
        "olmo-1-w32", "python", batch_size=16, limit=96, split=1, epochs=1, weight_decay=DECAY, curve=3
    )
    nets = Nets(task, other, other, text, (1, 4), (64,), ("bn-mlp-4-w8",), None)
    few = ("sgd", "sgd+linear", *OURS)
    return [
        block._replace(
            methods=[name for name in block.methods if chosen_as(name) in (*few, "adamw", "adamw+linear")],
            seeds=min(block.seeds, 2),
        )
        for block in blocks(nets)
    ]


def medium(device: str) -> list[Block]:
    """CIFAR-10 at 16×16, 45,000 images to train on and 5,000 to choose by; nets of half the width."""
    recipe = {
        "data": "cifar10",
        "image_size": 16,
        "split": 1,
        "validation": 0.1,
        "batch_size": 128,
        "epochs": 15,
        "curve": 15,
        "weight_decay": DECAY,
        "augment": True,
        "channels_last": True,
        "device": device,
    }
    residual, plain = (Task(net, **recipe) for net in ("resnet-20-w8", "plain-20-w8"))
    deep = dataclasses.replace(plain, model="plain-56-w8", epochs=10, curve=10)
    text = Task(
        "olmo-4-w160",
        "python",
        batch_size=16,
        limit=16 * 1500,
        split=1,
        epochs=1,
        curve=15,
        weight_decay=DECAY,
        device=device,
    )
    large = dataclasses.replace(residual, model="resnet-20", image_size=None, epochs=10, curve=10)
    others = ("resnet-20-w4", "resnet-8-w8")
    return blocks(Nets(residual, plain, deep, text, (5, 40), (1024, 4096), others, large))


def full(device: str) -> list[Block]:
    """The nets of the literature at 32×32, three seeds of everything: for a GPU."""
    residual, plain, deep, large = (
        comparison.full_cifar(net, device, validation=0.1, curve=30)
        for net in ("resnet-20", "plain-20", "plain-56", "resnet-18")
    )
    text = Task(
        "olmo-4-w160", "python", batch_size=16, limit=96_000, split=1, epochs=1, curve=30, device=device
    )
    text = dataclasses.replace(text, weight_decay=DECAY)
    others = ("resnet-20-w8", "resnet-20-w32", "resnet-8", "resnet-56")
    every = blocks(Nets(residual, plain, deep, text, (10, 90), (1024, 4096), others, large))
    return [block._replace(seeds=3) if block.seeds else block for block in every]


def gpu(device: str) -> list[Block]:
    """Two minutes of a GPU: nets at 32×32 on part of the images, SGD with and without a warm-up against ours."""
    recipe = {"validation": 0.1, "split": 1, "epochs": 20, "curve": 20, "compile": False}
    nets = [
        comparison.full_cifar(net, device, data="cifar10-20k", **recipe) for net in ("resnet-20", "resnet-18")
    ]
    tuned = [Block("tuned", net, ("sgd", "sgd+linear", *OURS), 2) for net in nets]
    return [*tuned, *(Block("untuned", net, OURS, 2, lr_of="sgd") for net in nets)]


PLANS = {"tiny": tiny, "medium": medium, "full": full, "gpu": gpu}


def check(of_size: Sequence[Block]) -> None:
    """Raises ValueError or FileNotFoundError if a package or data are missing."""
    check_installed([METHODS[chosen_as(name)] for block in of_size for name in block.methods])
    for task in dict.fromkeys(block.task for block in of_size):
        training.load(task)


def estimated_seconds(run: Run, known: Known) -> float:
    """As long a step as those of the same task, whatever its epochs (on a CPU in its own time, not in that of others on
    the machine); else a guess from depth, width and size."""
    column = "cpu_seconds" if run.task.device == "cpu" else "seconds"
    like = [
        row[column] / row["steps"]
        for other, row in known.rows.items()
        if column in row and without_epochs(other.task) == without_epochs(run.task)
    ]
    return steps_of(run) * (sum(like) / len(like) if like else guess(run.task))


def without_epochs(task: Task) -> Task:
    """The same task whatever its budget."""
    return dataclasses.replace(task, epochs=0, curve=0)


def steps_of(run: Run) -> int:
    """How many steps a run has, about."""
    task = run.task
    examples = task.limit or {"cifar10": 50_000, "cifar10-20k": 20_000, "digits": 1437}.get(
        task.data, 100_000
    )
    if task.data != "python":  # its limit is that of the training part alone
        examples *= 1 - task.validation
    return round(examples / task.batch_size * task.epochs * run.share)


def guess(task: Task) -> float:
    """Seconds of a step on one quiet core, from a ResNet-20-w8 on 16×16 images."""
    if task.data == "python":
        return 0.15
    depth, width = (re.search(rf"-{mark}(\d+)", task.model) for mark in ("", "w"))
    relative = int(depth[1] if depth else 20) / 20 * (int(width[1] if width else 16) / 8) ** 1.5
    return 0.037 * relative * task.batch_size / 128 * ((task.image_size or 32) / 16) ** 2
