"""The optimizers whose steps are timed, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.optim import SGD, Optimizer

from benchmarks.common.optimizers import imported
from benchmarks.speed.workloads import param_groups
from elropt import ELRSGD
from elropt.rules import RULES

HYPER: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
Build = Callable[[list[Tensor], Sequence[bool]], Optimizer]  # params, which of them are tracked


class Entry(NamedTuple):
    """An optimizer to time.

    measures: the tensors of tracked layers that ELRSGD reads before the update, as in `kernels.bytes_moved`.
    capturable: False where it reads values back to the host.
    """

    build: Build
    compiled: bool = False
    measures: Literal["grad", "momentum", "both"] | None = None
    capturable: bool = True


def elr(rule: str | None, **own: Any) -> Build:
    """ELRSGD, told which tensors are scale-invariant; Triton on a GPU, foreach on the CPU."""

    def build(params: list[Tensor], tracked: Sequence[bool]) -> Optimizer:
        options: dict[str, Any] = {**HYPER, "rule": rule, **own}
        options["fused" if params[0].is_cuda else "foreach"] = True
        return ELRSGD(param_groups(params, tracked), **options)

    return build


def torch_sgd(**backend: bool) -> Build:
    """torch.optim.SGD."""
    return lambda params, _: SGD(params, **HYPER, **backend)


def peer(module: str, name: str, **options: Any) -> Build:
    """An optimizer of another package, imported when it is built."""
    return lambda params, _: imported(module, name)(params, **HYPER, **options)


def measured(rule: str | None) -> Literal["grad", "momentum"] | None:
    """What a rule reads before the update, once it has carried the norms."""
    if rule is None:
        return None
    return "momentum" if RULES[rule].elr_of == "update" else "grad"


RULES_BY_NAME = {f"elr-{rule or 'none'}": rule for rule in RULES}
# pytorch-optimizer's LARS writes into the gradients: they grow from step to step, which costs no time.
OPTIMIZERS = {
    "torch-fused": Entry(torch_sgd(fused=True)),
    "torch-foreach": Entry(torch_sgd(foreach=True)),
    "torch-for-loop": Entry(torch_sgd(foreach=False)),
    "torch-compiled": Entry(torch_sgd(foreach=True), compiled=True),
    **{name: Entry(elr(rule), measures=measured(rule)) for name, rule in RULES_BY_NAME.items()},
    "elr-angle-update": Entry(elr("angle", elr_of="update"), measures="momentum"),
    "elr-project": Entry(elr(None, project=True), measures="both"),
    "timm-lars": Entry(peer("timm.optim", "Lars")),
    "timm-sgdp": Entry(peer("timm.optim", "SGDP"), capturable=False),
    "optimi-sgd": Entry(peer("optimi", "SGD", triton=True, kahan_sum=False)),
    "pytorch-optimizer-lars": Entry(peer("pytorch_optimizer", "LARS")),
    "bitsandbytes-sgd": Entry(peer("bitsandbytes.optim", "SGD")),
    "bitsandbytes-lars": Entry(peer("bitsandbytes.optim", "LARS")),
}
BASELINE = "torch-fused"
OURS = (*RULES_BY_NAME, "elr-angle-update", "elr-project")  # ELRSGD's
