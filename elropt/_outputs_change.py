"""How much rescaling the weights changes the outputs of a model, where an eps breaks the invariance."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ._model_copy import Inputs, Outputs, copied, run, seed_like, tensors_in, untouched
from ._radial_test import coarsest_dtype

__all__ = ["OutputsChange", "outputs_change"]

EPS_MATTERS = 0.01  # a change of the outputs beyond it is worth a warning


@dataclass(frozen=True)
class OutputsChange:
    """Relative change of the outputs, ‖new − old‖/‖old‖, by rescaling all weights, and by rescaling each one alone."""

    of_all: float
    of_each: dict[str, float]

    @property
    def matters(self) -> bool:
        return bool(self.of_each)

    def in_words(self, verb: str) -> str:
        worst = sorted(self.of_each, key=lambda name: -self.of_each[name])[:3]
        return (
            f"{verb} the outputs by {self.of_all:.1%}: these weights are scale-invariant only up to the eps of a "
            "normalization, which is not small beside the variance that it is added to. By weight: "
            f"{', '.join(f'{name} {self.of_each[name]:.1%}' for name in worst)}. A smaller eps, or larger weights "
            "there at the start, make them so"
        )


def outputs_change(
    model: nn.Module,
    inputs: Inputs,
    factors: Mapping[str, float],
    *,
    outputs: Outputs | None = None,
    training: bool,
    dtype: torch.dtype | None = None,
) -> OutputsChange:
    """The change of the outputs of the model as it is, with its own eps, when its weights are multiplied by `factors`.

    `of_each` is empty if all together change them by no more than EPS_MATTERS (or 30 roundings).
    """
    twin = copied(model, dtype=dtype, training=training or None)
    params = dict(twin.named_parameters())
    for (
        param
    ) in params.values():  # outputs that depend on no parameter then require no gradient, and are left out
        param.requires_grad_(param.is_floating_point())

    def result() -> Tensor:
        with untouched(twin), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user has seen them in the measurement
            seed_like(twin)
            returned = run(twin, inputs.cloned(dtype))
            counted = tensors_in(returned if outputs is None else outputs(returned))
            vectors = [
                leaf.detach().flatten().double().cpu()
                for leaf in counted
                if leaf.is_floating_point() and leaf.requires_grad
            ]
        return torch.cat(vectors) if vectors else torch.zeros(0)

    before = result()

    def change(names: Iterable[str]) -> float:
        kept = {name: params[name].detach().clone() for name in names}
        with torch.no_grad():
            for name in kept:
                params[name].mul_(factors[name])
        found = float((result() - before).norm() / before.norm())
        with torch.no_grad():
            for name, value in kept.items():
                params[name].copy_(value)
        return found

    of_all = change(factors)
    rounding = torch.finfo(coarsest_dtype(params.values())).eps
    matters = max(EPS_MATTERS, 30 * rounding) < of_all < math.inf
    return OutputsChange(of_all, {name: change([name]) for name in factors} if matters else {})
