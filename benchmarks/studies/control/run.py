"""Which form of control: of the gradient or the update, by layer or filter, of which optimizer; what is tuned best?"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.common import training
from benchmarks.common.optimizers import METHODS, PEERS, Method
from benchmarks.common.sweep import Row
from benchmarks.common.training import Run, Task
from benchmarks.studies import comparison
from benchmarks.studies.comparison import Plan
from benchmarks.studies.control.report import draw, tables
from benchmarks.studies.control.summarize import summarize
from benchmarks.studies.study import Stage, Study

BEHIND = ("adamh", "muonh")  # `elropt.control` behind AdamW and Muon
OURS = (
    *("uniform", "uniform-update"),
    *("angle", "angle-update", "angle-filter", "angle-update-filter"),
    *(
        "equilibrium-gradient",
        "equilibrium",
        "equilibrium+linear",
        "equilibrium-filter",
        "equilibrium-unprotected",
    ),
)
DECAY = 5e-4  # SGD's


class Grids(NamedTuple):
    """Learning rates by unit; "equilibrium" has SGD's unit, and its own."""

    sgd: tuple[float, ...]
    equilibrium: tuple[float, ...]
    radians: tuple[float, ...]
    adamw: tuple[float, ...]


WIDE = Grids(
    sgd=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    equilibrium=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    radians=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    adamw=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
)
RESIDUAL = Grids(
    sgd=(0.03, 0.1, 0.3, 1.0),
    equilibrium=(0.1, 0.3, 1.0, 3.0),
    radians=(0.003, 0.01, 0.03, 0.1),
    adamw=(0.001, 0.003, 0.01, 0.03),
)
SHORT = Grids(
    sgd=(0.03, 0.1, 0.3), equilibrium=(0.3, 1.0, 3.0), radians=(0.01, 0.03, 0.1), adamw=(0.003, 0.01, 0.03)
)
TINY = Grids((0.1, 0.3), (0.1, 0.3), (0.003, 0.01), (0.003, 0.01))


def methods(grids: Grids, names: Sequence[str]) -> list[Method]:
    """Methods by name, each with its grid."""
    of_unit = {"SGD's": grids.sgd, "radians": grids.radians, "AdamW's": grids.adamw}
    return [
        dataclasses.replace(
            METHODS[name], lrs=grids.equilibrium if "equilibrium" in name else of_unit[METHODS[name].unit]
        )
        for name in names
    ]


def text(model: str, device: str, steps: int) -> Task:
    """A GPT on so many batches of 16 windows, each seen once."""
    options = {"epochs": 1, "batch_size": 16, "limit": 16 * steps, "split": 1, "weight_decay": DECAY}
    return Task(model, "python", device=device, **options)


def tiny(device: str) -> list[Plan]:
    """Does it run?"""
    mlp = [dataclasses.replace(task, weight_decay=DECAY) for task in comparison.tiny_tasks(device)]
    few = methods(TINY, ("sgd", "muonh", "equilibrium"))
    return [Plan(mlp, few, 1, 2), Plan([text("olmo-1-w32", device, 20)], few, 1, 2)]


def small(device: str) -> list[Plan]:
    """A deep MLP with all methods; thin conv nets and a GPT, with fewer and shorter grids: an hour on one core.

    "gpt-4" is left out: in so few steps SGD at 0.1 and AdamW at 0.003 and 0.01 leave it at chance.
    """
    by_layer = ("angle", "angle-update", "equilibrium-gradient", "equilibrium", "equilibrium+linear")
    on_images = (*PEERS, *BEHIND, *by_layer, "equilibrium-filter")
    on_plain = ("sgd", "sgd+linear", "adamw", "muon", "muonh", *by_layer[:4], "equilibrium-filter")
    on_text = ("sgd+linear", "adamw", "adamw+linear", "muon", *BEHIND, "angle-update", *by_layer[2:4])
    recipe = {"image_size": 16, "limit": 10_000, "batch_size": 128, "epochs": 6, "augment": True}
    resnet, plain = (
        comparison.small_cifar(net, device, weight_decay=DECAY, **recipe)
        for net in ("resnet-20-w8", "plain-20-w8")
    )
    mlp = comparison.digits_mlp(30, device, weight_decay=DECAY)
    return [
        Plan([mlp], methods(WIDE, (*PEERS, *BEHIND, *OURS)), 2, 3),
        Plan([resnet], methods(RESIDUAL, on_images), 1, 2),
        Plan([text("olmo-4", device, 150)], methods(SHORT, on_text), 1, 2),
        Plan([plain], methods(SHORT, on_plain), 1, 2),
    ]


def full(device: str) -> list[Plan]:
    """The nets of the literature, and GPTs with a million parameters."""
    images = [comparison.full_cifar(net, device) for net in ("resnet-20", "plain-20", "plain-56")]
    texts = [text(net, device, 6000) for net in ("gpt-4-w160", "olmo-4-w160")]
    return [Plan([*images, *texts], methods(WIDE, (*PEERS, *BEHIND, *OURS)), 1, 3)]


PLANS: dict[str, Callable[[str], list[Plan]]] = {"tiny": tiny, "small": small, "full": full}


def stages(size: str, device: str) -> Sequence[Stage]:
    """Of each plan whose data are there: choose on the validation part, then read the test part."""
    result: list[Stage] = []
    for plan in PLANS[size](device):
        try:
            result += two_stages(plan)
        except FileNotFoundError as error:
            nets = ", ".join(task.model for task in plan.tasks)
            warnings.warn(f"without {nets}: {error}", stacklevel=2)
    return result


def two_stages(plan: Plan) -> Sequence[Stage]:
    """The two stages of one plan among others."""
    choose, _ = comparison.two_stages(plan)

    def finals(rows: list[Row]) -> Sequence[Run]:
        of_plan = [row for row in rows if Task(**row["spec"]["task"]) in plan.tasks]
        return comparison.finals(of_plan, plan.fresh_seeds)

    return choose, finals


CONTROL = Study(
    "control",
    "Control the gradient or the update, by layer or filter, behind which optimizer; against the best-tuned peers?",
    training.train,
    stages,
    summarize,
    tables,
    draw,
    comparison.describe,
    comparison.without_val_traces_and_layers,
)
