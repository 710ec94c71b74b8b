"""The optimizers that are compared: one registry, by name, and what a run can do with each at its start.

To add an optimizer to all comparisons, add an entry to `OPTIMIZERS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import elropt
from benchmarks.common.muon import MuonWithAdamW, split_hidden
from elropt.rules import RULES

LINEAR_SHARE = 0.1  # of all steps, for "+linear"
UNITS = {
    "lr": "SGD's",
    "rad per step": "radians",
    "sphere_lr": "on the sphere",
}  # of RuleSpec.lr_unit, in words
LRS: dict[str, tuple[float, ...]] = {  # the grid that a learning rate is chosen from, by its unit
    "SGD's": (0.01, 0.03, 0.1, 0.3),
    "radians": (0.001, 0.003, 0.01, 0.03),
    "on the sphere": (0.0001, 0.001, 0.01, 0.1),
    "AdamW's": (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03),
    "of LARS": (1.0, 3.0, 10.0, 30.0),
}


class Entry(NamedTuple):
    """An optimizer of the comparisons.

    Attributes:
        build: makes it from parameters or groups, and from `lr`, `momentum` and, if groups have none, `weight_decay`.
        unit: of its learning rate, a key of `LRS`.
        separate_lr: the learning rate is that of the tracked weights alone, as no other weight has this unit.
        hidden: with `separate_lr`: it is that of all hidden weights, tracked or not, see `muon.is_hidden`.
        decay_factor: what SGD's weight decay is multiplied by to do about the same here.
        other_lr_factor: what SGD's learning rate is multiplied by for the weights that have a separate one.
        needs_decay: it is for tasks with weight decay only.
        channels_last: it can train weights in this memory format.
        package: the package, besides torch and elropt, that it comes from.
    """

    build: Callable[..., Optimizer]
    unit: str = "SGD's"
    separate_lr: bool = False
    hidden: bool = False
    decay_factor: float = 1.0
    other_lr_factor: float = 1.0
    needs_decay: bool = False
    channels_last: bool = True
    package: str | None = None


def imported(package: str, name: str) -> Callable[..., Optimizer]:
    """An optimizer whose package is imported when it is built."""
    return lambda *args, **options: getattr(importlib.import_module(package), name)(*args, **options)


def adamw(params: Any, *, momentum: float, **options: Any) -> Optimizer:
    """torch's AdamW; momentum is its first beta."""
    return torch.optim.AdamW(params, betas=(momentum, 0.999), **options)


def muon_with_adamw(params: Any, *, lr: float, momentum: float) -> Optimizer:
    """torch's Muon for the hidden weights and AdamW for the rest; momentum is AdamW's first beta."""
    return MuonWithAdamW(split_hidden(params), lr, (momentum, 0.999))


# AdamW multiplies its decay by its learning rate, as SGD does, and that is some 100 times smaller than SGD's. Where the
# rest of a net has a learning rate of its own, SGD's 0.1 becomes 0.003.
OF_ADAMW: dict[str, Any] = {"decay_factor": 100.0, "other_lr_factor": 0.03}


def by_angle(base: Callable[..., Optimizer]) -> Entry:
    """An optimizer whose tracked weights turn by the learning rate, and all others have AdamW's (`elropt.control`)."""

    def build(*args: Any, **options: Any) -> Optimizer:
        optimizer = base(*args, **options)
        elropt.control(optimizer, rule="angle")
        return optimizer

    return Entry(build, UNITS["rad per step"], separate_lr=True, **OF_ADAMW)


def hyperball(params: Any, *, momentum: float, **options: Any) -> Optimizer:
    """HeavyBall's AdamW whose matrices keep their norms, head and embedding too; momentum is its first beta."""
    heavyball = importlib.import_module("heavyball")
    heavyball.utils.compile_mode = None  # for a CPU without a compiler, and to compare times with the others'
    return heavyball.HyperBallAdamW(params, betas=(momentum, 0.999), **options)


def of_rule(rule: str, **options: Any) -> Entry:
    """ELRSGD with a rule, and more of its arguments."""
    spec = RULES[rule]
    build = partial(elropt.ELRSGD, rule=rule, **options)
    unit = UNITS[spec.lr_unit]
    return Entry(build, unit, separate_lr=spec.lr_unit != "lr", needs_decay=spec.settles)


OPTIMIZERS: dict[str, Entry] = {
    "sgd": Entry(torch.optim.SGD),
    "adamw": Entry(adamw, "AdamW's", **OF_ADAMW),
    "muon": Entry(muon_with_adamw, "AdamW's", separate_lr=True, hidden=True, **OF_ADAMW),
    "adamh": by_angle(adamw),  # the names in the literature: Wen et al., 2026
    "muonh": by_angle(muon_with_adamw),
    "lars": Entry(imported("pytorch_optimizer", "LARS"), "of LARS", package="pytorch_optimizer"),
    "hyperball": Entry(
        hyperball,
        UNITS["rad per step"],
        separate_lr=True,
        decay_factor=0.0,
        other_lr_factor=OF_ADAMW["other_lr_factor"],
        package="heavyball",
    ),
    # SGDP takes views of its weights.
    "sgdp": Entry(imported("pytorch_optimizer", "SGDP"), channels_last=False, package="pytorch_optimizer"),
    **{rule: of_rule(rule) for rule in RULES if rule is not None},
    "uniform-update": of_rule("uniform", elr_of="update"),
    "angle-filter": of_rule("angle", granularity="filter"),
    "angle-update": of_rule("angle", elr_of="update"),
    "angle-update-filter": of_rule("angle", elr_of="update", granularity="filter"),
    "equilibrium-gradient": of_rule("equilibrium", elr_of="gradient"),
    "equilibrium-filter": of_rule("equilibrium", granularity="filter"),
    "equilibrium-gradient-filter": of_rule("equilibrium", elr_of="gradient", granularity="filter"),
    "equilibrium-unprotected": of_rule("equilibrium", protect=False),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and what a run does with it at the start; a part of every row of a result file.

    Attributes:
        optimizer: "elrsgd" with a rule, or a name in `OPTIMIZERS`.
        linear: share of the steps over which the learning rate rises from zero.
        start: a name in `warmups.WARMUPS`, for "sgd".
        release: share of the steps after which the rule gives way to plain SGD.
        cosine_power: the learning rate falls as half a cosine wave to this power.
        separate_lr: the learning rate is that of the tracked weights; the others have `Task.other_lr`.
        unit: of the learning rate.
        lrs: the grid to choose the learning rate from.
    """

    name: str
    optimizer: str = "elrsgd"
    rule: str | None = None
    linear: float = 0.0
    start: str | None = None
    release: float = 1.0
    cosine_power: float = 1.0
    separate_lr: bool = False
    unit: str = "SGD's"
    lrs: tuple[float, ...] = LRS["SGD's"]

    @property
    def entry(self) -> Entry:
        """How the optimizer is built. Raises KeyError if it is not in `OPTIMIZERS`."""
        return OPTIMIZERS[self.rule or self.optimizer]

    def with_linear(self, share: float = LINEAR_SHARE) -> Method:
        """The same with a linear warm-up of the learning rate."""
        return dataclasses.replace(self, name=f"{self.name}+linear", linear=share)


def method_of(name: str) -> Method:
    """An optimizer by name, from the first step on and without a warm-up."""
    entry = OPTIMIZERS[name]
    optimizer, rule = ("elrsgd", name) if name in RULES else (name, None)
    return Method(name, optimizer, rule, separate_lr=entry.separate_lr, unit=entry.unit, lrs=LRS[entry.unit])


PEERS = (
    "sgd",
    "sgd+linear",
    "adamw",
    "adamw+linear",
    "muon",
    "muon+linear",
)  # in every comparison of accuracies

METHODS = {name: method_of(name) for name in OPTIMIZERS}
METHODS |= {method.name: method for method in [plain.with_linear() for plain in METHODS.values()]}


def make_optimizer(
    method: Method,
    model: nn.Module,
    inputs: Tensor,
    *,
    lr: float,
    other_lr: float,
    momentum: float,
    weight_decay: float,
) -> tuple[Optimizer, dict[str, nn.Parameter]]:
    """The optimizer of a method, and the tracked weights by name, as found on `inputs`, a batch.

    other_lr: SGD's, for the weights that the learning rate is not of, if the method has a separate one.
    weight_decay: as the optimizer takes it; norm gains and biases are not decayed.
    """
    groups = elropt.param_groups(model, inputs, weight_decay=weight_decay)
    if method.entry.hidden:
        groups = split_hidden(groups)
    if method.separate_lr:  # in the groups' "lr", which every optimizer has: schedules and logs see it
        key = "hidden" if method.entry.hidden else "scale_invariant"
        groups = [{**group, "lr": lr} if group[key] else group for group in groups]
    tracked = {
        name: p
        for group in groups
        if group["scale_invariant"]
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    rest = other_lr * method.entry.other_lr_factor if method.separate_lr else lr
    return method.entry.build(groups, lr=rest, momentum=momentum), tracked


def check_installed(methods: Iterable[Method]) -> None:
    """Raises ValueError if the package of an optimizer is missing."""
    missing: dict[str, list[str]] = {}
    for method in methods:
        package = method.entry.package
        if package is not None and importlib.util.find_spec(package) is None:
            missing.setdefault(package.replace("_", "-"), []).append(method.name)
    if missing:
        needs = "; ".join(f"{', '.join(names)}: pip install {package}" for package, names in missing.items())
        raise ValueError(f"{needs}, or leave them out")
