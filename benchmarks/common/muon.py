"""Muon as it is used: torch's for the hidden weights of a net, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Parts of the names of weights that are no hidden ones in `models`: what comes first and last.
NOT_HIDDEN = ("head", "embedding", "position", "class_token")


def is_hidden(name: str, weight: Tensor) -> bool:
    """Whether Muon trains a parameter: weights of hidden layers with 2 or more dimensions."""
    return weight.ndim >= 2 and not any(part in NOT_HIDDEN for part in name.split("."))


def split_hidden(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of `elropt.param_groups`, each split in two: "hidden" is True or False."""
    result = []
    for group in groups:
        named = list(zip(group["param_names"], group["params"], strict=True))
        for hidden in (True, False):
            part = [(name, p) for name, p in named if is_hidden(name, p) == hidden]
            if part:
                names, params = map(list, zip(*part, strict=True))
                result.append({**group, "params": params, "param_names": names, "hidden": hidden})
    return result


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon for groups with "hidden", torch.optim.AdamW for the others.

    Muon takes matrices: a kernel [out, in, k, k] is one of [out, in·k·k]. Its step is scaled to the size of AdamW's
    (Liu et al., 2025, "Muon is Scalable for LLM Training"), so that both take learning rates and decay of one unit.
    Each group has "lr", in that unit, and "weight_decay", decoupled.

    Args:
        groups: dicts with "params" and "hidden".
        lr: of groups without their own.
        betas: AdamW's. Muon has torch's defaults, momentum 0.95 with Nesterov.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        self._parts: list[tuple[dict[str, Any], Optimizer]] = []
        for group in self.param_groups:
            options = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            part: Optimizer
            if group["hidden"]:
                views = [as_matrix(p.detach()) for p in group["params"]]
                self._views += zip(group["params"], views, strict=True)
                part = torch.optim.Muon(views, adjust_lr_fn="match_rms_adamw", **options)
            else:
                part = torch.optim.AdamW(group["params"], betas=betas, **options)
            self._parts.append((group, part))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else as_matrix(parameter, parameter.grad)
        for group, part in self._parts:
            part.param_groups[0].update(lr=group["lr"], weight_decay=group["weight_decay"])
            part.step()
        return loss


def as_matrix(weight: Tensor, grad: Tensor | None = None) -> Tensor:
    """A weight [out, …] as a view [out, n], or its gradient with the columns in the same order: that of the weight's
    memory, as to Muon they are all alike."""
    matrix = weight if grad is None else grad
    if weight.ndim == 4 and not weight.is_contiguous():
        matrix = matrix.permute(0, 2, 3, 1)  # channels_last
    return matrix.view(len(matrix), -1) if grad is None else matrix.flatten(1)
