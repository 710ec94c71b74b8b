"""What an ImageNet run trains with: the recipe, and settings made of a recipe and what the user asks for."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.common import models, optimizers
from benchmarks.common.optimizers import METHODS
from benchmarks.imagenet.data import Augmentation, Tree
from elropt import dynamics
from elropt.rules import RULES

OPTIMIZERS = ("sgd", "adamw", *filter(None, RULES))
MOMENTUM = 0.9
CROPS = Augmentation()


@dataclass(frozen=True)
class Recipe:
    """How a family of nets is trained. Learning rates are those at `batch_size` and in proportion to the batch.

    weight_decay: of SGD and elropt's rules, inside the gradient; adamw_weight_decay: of torch's AdamW, which
    multiplies it by the learning rate. Norm gains and biases are never decayed. mixup: of Beta(mixup, mixup);
    grad_clip: largest norm of all gradients together; 0 is without. qk_norm: a LayerNorm over queries and keys, which
    then have no bias.
    """

    batch_size: int
    sgd_lr: float
    warmup_epochs: float
    epochs: int = 90
    weight_decay: float = 1e-4
    adamw_lr: float | None = None
    adamw_weight_decay: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    grad_clip: float = 0.0
    augmentation: Augmentation = CROPS
    qk_norm: bool = False


# He et al., CVPR 2016: batch 256, lr 0.1, momentum 0.9, decay 1e-4. Goyal et al., 2017: 90 epochs, lr in proportion to
# the batch, 5 epochs of linear warm-up, no decay of norms. He et al., CVPR 2019: cosine schedule, label smoothing 0.1.
# Left out of the last two: zero gains in front of shortcuts, with which the weights behind them start without gradient.
RESNET_50 = Recipe(batch_size=256, sgd_lr=0.1, warmup_epochs=5, label_smoothing=0.1)

# Beyer, Zhai & Kolesnikov, 2022, "Better plain ViT baselines for ImageNet-1k": batch 1024, lr 1e-3, 10,000 steps of
# warm-up, cosine, clipping at 1, RandAugment(2, 10), mixup 0.2. Their decay, 1e-4, is not multiplied by the lr, 1e-3:
# in torch's AdamW it is 0.1. The net differs: ours has a class token and learned positions (decayed, too) instead of
# pooling and fixed ones, and QK-norm (Dehghani et al., ICML 2023), without which no weight of it is scale-invariant.
# For SGD and elropt's rules there is no such recipe: their learning rate and decay are ResNet-50's, untuned.
VIT_S_16 = Recipe(
    batch_size=1024,
    sgd_lr=0.4,
    warmup_epochs=8,
    adamw_lr=1e-3,
    adamw_weight_decay=0.1,
    mixup=0.2,
    grad_clip=1.0,
    augmentation=Augmentation(min_area=0.05, operations=2, magnitude=10),
    qk_norm=True,
)


def recipe_of(model: str) -> Recipe:
    """The recipe of ViT-S/16 for transformers, of ResNet-50 for all other nets."""
    return VIT_S_16 if model.startswith(("vit-", "ln-transformer-")) else RESNET_50


@dataclass(frozen=True)
class Settings:
    """All that decides what a run computes, in plain values; a run goes on only with the settings that it began with.

    lr: of all parameters; under "angle" and "sphere" of the tracked ones, in the unit of the rule, and `other_lr` that
    of the others. batch_size: of all `ranks` processes together. data: `Tree.digest`.
    """

    model: str
    optimizer: str
    lr: float
    other_lr: float
    epochs: int
    warmup_epochs: float
    batch_size: int
    image_size: int
    hold_out: float
    seed: int
    amp: bool
    compile: bool
    device: str
    ranks: int
    data: str
    train_images: int
    val_images: int
    classes: int

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the training images."""
        return self.train_images // self.batch_size

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch


def make_settings(
    tree: Tree,
    *,
    model: str,
    optimizer: str,
    lr: float | None,
    epochs: int | None,
    warmup_epochs: float | None,
    batch_size: int | None,
    ranks: int,
    **others: Any,
) -> Settings:
    """The settings of a run; None is what the recipe says. others: fields of `Settings`.

    The linear warm-up of the recipe keeps its share of the epochs, and is left out with the rule "warmup", which stands
    in for it. The default of "angle" is the angle that SGD of the recipe turns scale-invariant weights by in the
    equilibrium of weight decay (docs/theory.md §7, independent gradients), √(2·lr·decay·(1 − momentum)): derived, not
    tuned. Raises ValueError.
    """
    recipe = recipe_of(model)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")
    if optimizer == "adamw" and recipe.adamw_lr is None:
        raise ValueError(f"there is no recipe for adamw with {model}: choose another optimizer, or a ViT")
    rule = RULES.get(optimizer, RULES[None])  # torch's optimizers have none
    if rule.lr_unit == "sphere_lr" and lr is None:
        raise ValueError(f"the recipes have no learning rate for {optimizer}: give --lr, in its own unit")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive, got {lr}")
    epochs = recipe.epochs if epochs is None else epochs
    batch_size = recipe.batch_size if batch_size is None else batch_size
    if batch_size % ranks:
        raise ValueError(f"batch_size {batch_size} is not a multiple of the {ranks} processes that share it")
    if batch_size > len(tree.train):
        raise ValueError(
            f"batch_size {batch_size} is more than the {len(tree.train)} training images: take a smaller one"
        )
    if warmup_epochs is None:
        warmup_epochs = 0.0 if rule.ends else recipe.warmup_epochs / recipe.epochs * epochs
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(
            f"warmup_epochs {warmup_epochs} must be at least 0 and less than the {epochs} epochs"
        )
    scale = batch_size / recipe.batch_size
    sgd_lr = recipe.sgd_lr * scale
    default = sgd_lr
    if optimizer == "adamw" and recipe.adamw_lr is not None:
        default = recipe.adamw_lr * scale
    elif rule.lr_unit == "rad per step":
        E = dynamics.equilibrium_relative_grad(sgd_lr, recipe.weight_decay, MOMENTUM, gradients="independent")
        default = float(sgd_lr * E)
    lr = default if lr is None else lr
    return Settings(
        model=model,
        optimizer=optimizer,
        lr=lr,
        other_lr=sgd_lr if METHODS[optimizer].separate_lr else lr,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        batch_size=batch_size,
        ranks=ranks,
        data=tree.digest,
        train_images=len(tree.train),
        val_images=len(tree.val),
        classes=len(tree.class_names),
        **others,
    )


def make_model(settings: Settings) -> nn.Module:
    """The net, drawn from torch's random state. Raises ValueError, see `models.build`."""
    options: dict[str, object] = {}
    if recipe_of(settings.model).qk_norm:
        options = {"qk_norm": True, "qk_bias": False}
    side = settings.image_size
    return models.build(settings.model, in_shape=(3, side, side), classes=settings.classes, **options)


def make_optimizer(
    model: nn.Module, settings: Settings, images: Tensor
) -> tuple[Optimizer, dict[str, nn.Parameter]]:
    """The optimizer, and the scale-invariant weights by name, as measured on `images` float [n, 3, side, side]."""
    recipe, name = recipe_of(settings.model), settings.optimizer
    decay = recipe.adamw_weight_decay if name == "adamw" else recipe.weight_decay
    return optimizers.make_optimizer(
        METHODS[name],
        model,
        images,
        lr=settings.lr,
        other_lr=settings.other_lr,
        momentum=MOMENTUM,
        weight_decay=decay,
    )


def differences(ours: Settings, theirs: dict[str, Any]) -> str:
    """The settings in which another run differs from ours, in words; empty if there are none."""
    return ", ".join(
        f"{name} {theirs.get(name)!r}, not {value!r}"
        for name, value in dataclasses.asdict(ours).items()
        if theirs.get(name) != value
    )
