"""Text for character models: the sources of Python's own standard library, as every Python installation has them."""

import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common.dataset import LOSS, Dataset, Metric

CONTEXT = 64  # characters
HELD_OUT = 1024  # windows at most of the validation and of the test part
TEST_SHARE = 0.1  # of the files
# Tests are no sources of the library, and the tables of "encodings" are no text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
CHARACTERS = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))  # all others are one symbol, number 0


@dataclass(frozen=True, eq=False)
class Text(Dataset):
    """Windows of `CONTEXT` characters, uint8 [n, CONTEXT], and what follows each character, int64 [n, CONTEXT].

    Batches are int64. The metric is the loss in nats per character.
    """

    metric: ClassVar[Metric] = LOSS
    items: ClassVar[str] = "windows"

    @property
    def chance(self) -> float:
        """Entropy of the characters of the training part, in nats."""
        counts = torch.bincount(self.train_y.flatten(), minlength=self.classes).double()
        return torch.distributions.Categorical(probs=counts).entropy().item()

    def preparation(
        self, inputs: Tensor, rng: np.random.Generator, *, augment: bool, channels_last: bool
    ) -> Callable[[Tensor], Tensor]:
        if augment or channels_last:
            raise ValueError("text has no pixels: leave out augment and channels_last")
        return lambda index: inputs[index].long()


def load(*, validation: float, seed: int, limit: int | None) -> Text:
    """The standard library of this Python, in windows that do not overlap.

    A tenth of the files is the test part, always the same. Of the others, in an order drawn with `seed`, the share
    `validation` is the validation part. The training part has at most `limit` windows. Of the test and of the
    validation part at most `HELD_OUT` windows are taken, equally far apart. Raises FileNotFoundError without sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in folder.rglob("*.py")
        if path.stat().st_size and not LEFT_OUT & set(path.relative_to(folder).parts)
    )
    if len(files) < 100:
        raise FileNotFoundError(f"{folder} has only {len(files)} .py files: is this Python's library zipped?")
    order = np.random.default_rng(0).permutation(len(files))
    n_test = round(TEST_SHARE * len(files))
    test, rest = order[:n_test], np.random.default_rng(seed).permutation(order[n_test:])
    n_val = round(validation * len(rest))
    parts = rest[n_val:], rest[:n_val], test
    streams = [encode(b"".join(files[i].read_bytes() for i in part)) for part in parts]
    pairs = [
        windows(streams[0], limit, spread=False),
        *(windows(s, HELD_OUT, spread=True) for s in streams[1:]),
    ]
    title = f"standard library of Python {platform.python_version()}, {len(files)} files, context {CONTEXT}"
    tensors = (tensor for pair in pairs for tensor in pair)
    return Text("python", title, ("other", *CHARACTERS), *tensors)


def encode(text: bytes) -> NDArray[np.uint8]:
    """The number of each byte among the classes."""
    table = np.zeros(256, np.uint8)
    table[[ord(c) for c in CHARACTERS]] = np.arange(1, len(CHARACTERS) + 1)
    return table[np.frombuffer(text, np.uint8)]


def windows(stream: NDArray[np.uint8], limit: int | None, *, spread: bool) -> tuple[Tensor, Tensor]:
    """At most `limit` windows of a stream, the first ones or equally far apart, and what follows each character."""
    count = max(0, len(stream) - 1) // CONTEXT
    taken = count if limit is None else min(count, limit)
    index = np.linspace(0, count - 1, taken).astype(int) if spread and taken else np.arange(taken)
    x, y = (stream[shift : shift + count * CONTEXT].reshape(count, CONTEXT)[index] for shift in (0, 1))
    return torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64))
