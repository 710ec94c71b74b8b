"""A data set in three parts, the passes over them, and the number that a net is judged by."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Part = Literal["train", "val", "test"]
Number = TypeVar("Number", float, NDArray[np.float64])


class Metric(NamedTuple):
    """What a net is judged by on held-out data.

    Attributes:
        column: the column of a row that has its value, a mean over labels.
        title: its name and unit for axes and tables.
        factor: factor·value is the score, in the unit of `title` but for the sign; a higher score is better.
        digits: decimal places that are shown.
        total: (logits [n, classes, …], labels int64 [n, …]) → the sum over the labels.
    """

    column: str
    title: str
    factor: float
    digits: int
    total: Callable[[Tensor, Tensor], Tensor]

    def score(self, row: dict[str, Any]) -> float:
        """The score of a row; that of chance if the value is not finite."""
        value = row[self.column]
        return self.chance(row) if value is None else self.factor * value

    def chance(self, row: dict[str, Any]) -> float:
        """The score of the best guess that ignores the input."""
        return self.factor * row.get("chance", 1 / row["classes"])  # rows before 2026-11-28 have no "chance"

    def value(self, score: Number) -> Number:
        """Scores as they are shown: losses without the minus."""
        return score if self.factor > 0 else -score


ACCURACY = Metric(
    "accuracy", "accuracy (%)", 100.0, 1, lambda logits, labels: (logits.argmax(1) == labels).sum()
)
LOSS = Metric(
    "nats_per_character",
    "loss (nats per character)",
    -1.0,
    3,
    lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum"),
)


def metric_of(row: dict[str, Any]) -> Metric:
    """The metric of the data set that a row was trained on."""
    return ACCURACY if ACCURACY.column in row else LOSS


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs [n, …] as they are stored and labels int64 [n, …] of three disjoint parts, all on one device.

    `title` says in words what was loaded, for results to name it. `items` are its inputs in the plural.
    """

    metric: ClassVar[Metric] = ACCURACY
    items: ClassVar[str] = "inputs"

    name: str
    title: str
    class_names: tuple[str, ...]
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train_x.shape[1:])

    @property
    def chance(self) -> float:
        """The metric's value for the best guess that ignores the input."""
        return 1 / self.classes

    def to(self, device: torch.device | str) -> Self:
        """The same data set with its tensors on `device`."""
        return replace(self, **{key: v.to(device) for key, v in vars(self).items() if isinstance(v, Tensor)})

    def batches(
        self,
        split: Part,
        batch_size: int,
        *,
        seed: int | Sequence[int] | None = None,
        augment: bool = False,
        channels_last: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over a part: inputs as a net takes them and labels int64, [batch_size, …] each.

        Without `seed` the inputs come in their stored order and the last batch may be smaller. With a seed,
        such as `(run, epoch)`, they are shuffled and an incomplete last batch is dropped; the same seed gives
        the same batches on every device. `augment` and `channels_last` are of images, see `data.Images`.
        Raises ValueError for an unknown part, a batch size that the part cannot fill and `augment` without
        `seed`.
        """
        parts = {
            "train": (self.train_x, self.train_y),
            "val": (self.val_x, self.val_y),
            "test": (self.test_x, self.test_y),
        }
        if split not in parts:
            raise ValueError(f"unknown split {split!r}; choose one of {', '.join(parts)}")
        inputs, labels = parts[split]
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed is not None and batch_size > len(inputs):
            raise ValueError(
                f"batch_size {batch_size} is more than the {len(inputs)} {self.items} of {split!r}: shuffled "
                "passes hold full batches only; take a smaller batch_size"
            )
        if augment and seed is None:
            raise ValueError("augment=True draws crops and mirrorings at random: give a seed")

        n = len(inputs)
        # Drawn on the host and moved once per pass, so that every device sees the same draws.
        rng = np.random.default_rng(seed)
        order = np.arange(n) if seed is None else rng.permutation(n)[: n - n % batch_size]
        prepare = self.preparation(inputs, rng, augment=augment, channels_last=channels_last)
        indices = torch.from_numpy(order).to(inputs.device).split(batch_size)
        return ((prepare(index), labels[index]) for index in indices if len(index))

    def preparation(
        self, inputs: Tensor, rng: np.random.Generator, *, augment: bool, channels_last: bool
    ) -> Callable[[Tensor], Tensor]:
        """For one pass over `inputs`: what makes a net's inputs of those with the given indices, int64 [n]."""
        raise NotImplementedError
