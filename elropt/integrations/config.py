"""An ELRSGD with the groups of `param_groups`, as one object that a configuration file describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..grouping import param_groups
from ..optimizer import ELRSGD

__all__ = ["ELRSGDFactory"]


class ELRSGDFactory:
    """Makes an `ELRSGD` with the groups of `param_groups`, once there is a model and a batch.

    For configuration files that name a class and its arguments, as those of LightningCLI (jsonargparse) and hydra do:
    groups need the model, which the file does not have.

    Args:
        lr, momentum, rule, options: as for `ELRSGD`.
        weight_decay, tracked_lr, exclude: as for `param_groups`: norm gains and biases have no weight decay.

    Raises:
        ValueError, TypeError: from `make`: those of `param_groups` and `ELRSGD`.

    Example:
        >>> factory = ELRSGDFactory(lr=0.1, momentum=0.9, rule="angle", tracked_lr=0.01)
        >>> optimizer = factory.make(model, images)
    """

    def __init__(
        self,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rule: str | None = "warmup",
        tracked_lr: float | None = None,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.weight_decay = weight_decay
        self.tracked_lr = tracked_lr
        self.exclude = exclude
        self.lr = lr
        self.momentum = momentum
        self.rule = rule
        self.options = options

    def make(self, model: nn.Module, *inputs: Any, **kwargs: Any) -> ELRSGD:
        """The optimizer for a model. `inputs` and `kwargs`: a batch, and `outputs`, as for `param_groups`."""
        groups = param_groups(
            model,
            *inputs,
            weight_decay=self.weight_decay,
            tracked_lr=self.tracked_lr,
            exclude=self.exclude,
            **kwargs,
        )
        return ELRSGD(groups, lr=self.lr, momentum=self.momentum, rule=self.rule, **self.options)
