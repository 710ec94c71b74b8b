"""Image folders too large for memory: decoded and augmented by workers, normalised on the device.

    tree = load_tree(Path("imagenet"))
    images = Images(tree.train, partial(train_image, size=224), seed=0)
    batches = TrainBatches(len(images), 256, seed=0, first=steps_done, last=steps)
    for pixels, labels in loader(images, batches, workers=8, device=device):
        ...

Every draw is a function of the seed, the epoch and the image: which images a step sees, and how they are cropped, does
not depend on the number of workers, nor on whether the run was stopped on the way. Between Pillow's versions a pixel
may differ.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.common.data import common_classes, image_files, read_image, stratified_order

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, in [0, 1]
ASPECTS = (3 / 4, 4 / 3)  # width over height of a training crop
CROP_TRIES = 10
EVAL_SHARE = 224 / 256  # side of the central crop, as a share of the shorter side

Rng: TypeAlias = np.random.Generator
Key: TypeAlias = tuple[int, int]  # epoch, image


def draws(seed: int, purpose: str, *at: int) -> Rng:
    """The random numbers of one purpose ("order", "image" or "mixup") at one place: the same at every call."""
    return np.random.default_rng((seed, ("order", "image", "mixup").index(purpose), *at))


@dataclass(frozen=True, eq=False)
class Part:
    """Images of a tree: paths below `folder` as bytes [n] (one array, which forked workers share), labels int64 [n]."""

    folder: Path
    paths: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: NDArray[np.int64]) -> Part:
        return Part(self.folder, self.paths[index], self.labels[index])


class Tree(NamedTuple):
    """Images to train on, and images to judge by."""

    class_names: tuple[str, ...]
    train: Part
    val: Part

    @property
    def digest(self) -> str:
        """Equal for trees with the same files and labels, in the same order, in the same parts."""
        sha = hashlib.sha256()
        for part in (self.train, self.val):
            sha.update(part.paths.tobytes() + part.labels.tobytes())
        return sha.hexdigest()[:16]


def load_tree(root: Path, hold_out: float = 0.0) -> Tree:
    """Find the images of a tree with a folder per class in `train/` and in `val/`; reads none of them.

    With `hold_out` the images to judge by are that share of `train/`, the same at every call and by class, and the
    rest is trained on: for choosing hyper-parameters without a look at `val/`. Warns of files and folders that are left
    out. Raises FileNotFoundError where folders or images are missing, and ValueError if the classes differ or
    `hold_out` leaves a part empty.
    """
    class_names = common_classes(root, "val")
    train = _part(root / "train", class_names)
    if hold_out == 0:
        return Tree(class_names, train, _part(root / "val", class_names))
    held_out = round(hold_out * len(train))
    if not 0 < held_out < len(train):
        raise ValueError(
            f"hold_out={hold_out} of {len(train)} training images leaves {len(train) - held_out} to train on and "
            f"{held_out} to judge by: take a share between 0 and 1 that leaves some of both"
        )
    order = stratified_order(train.labels, np.random.default_rng(0))
    return Tree(class_names, train[np.sort(order[held_out:])], train[np.sort(order[:held_out])])


def _part(folder: Path, class_names: tuple[str, ...]) -> Part:
    files = image_files(folder, class_names)
    paths = np.array([os.fsencode(os.path.relpath(path, folder)) for path, _ in files])
    return Part(folder, paths, np.array([label for _, label in files]))


# What is done to an image


@dataclass(frozen=True)
class Augmentation:
    """Random crops, mirrored images, and RandAugment.

    min_area: smallest share of the image that a crop may have. operations, magnitude: of RandAugment (Cubuk et al.,
    NeurIPS workshops 2020), the magnitude from 0 to 10; no operations, no RandAugment.
    """

    min_area: float = 0.08
    operations: int = 0
    magnitude: float = 10.0


def train_image(image: Image.Image, rng: Rng, *, size: int, augmentation: Augmentation) -> Image.Image:
    """A random crop (`crop_box`) of an RGB image, resized to `size`, mirrored or not, then RandAugment."""
    box = crop_box(*image.size, augmentation.min_area, rng)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for index in rng.integers(len(OPERATIONS), size=augmentation.operations):
        sign = 1 if rng.random() < 0.5 else -1
        image = OPERATIONS[index](image, sign * augmentation.magnitude / 10)
    return image


def eval_image(image: Image.Image, rng: Rng, *, size: int) -> Image.Image:
    """The central square of `size` pixels after resizing the shorter side to size/`EVAL_SHARE` (256 for 224)."""
    scale = round(size / EVAL_SHARE) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_box(width: int, height: int, min_area: float, rng: Rng) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop (Szegedy et al., 2015, section 6).

    Its share of the area is uniform in [min_area, 1], the logarithm of its aspect uniform within `ASPECTS`, its place
    uniform. If none of `CROP_TRIES` draws fits, it is the largest central crop within `ASPECTS`.
    """
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(min_area, 1)
        aspect = np.exp(rng.uniform(*np.log(ASPECTS)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * ASPECTS[1]))
    h = min(height, round(width / ASPECTS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _affine(image: Image.Image, *row_by_row: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, row_by_row, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))


# (image, strength from −1 to 1) → image: the 14 operations of RandAugment with the ranges of AutoAugment (Cubuk et al.,
# CVPR 2019). The sign is that of the direction, where there is one. Solarize inverts all at full strength.
OPERATIONS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, _: image,
    lambda image, _: ImageOps.autocontrast(image),
    lambda image, _: ImageOps.equalize(image),
    lambda image, strength: _rotate(image, 30 * strength),
    lambda image, strength: ImageOps.solarize(image, round(256 * (1 - abs(strength)))),
    lambda image, strength: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
    lambda image, strength: ImageEnhance.Color(image).enhance(1 + 0.9 * strength),
    lambda image, strength: ImageEnhance.Contrast(image).enhance(1 + 0.9 * strength),
    lambda image, strength: ImageEnhance.Brightness(image).enhance(1 + 0.9 * strength),
    lambda image, strength: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * strength),
    lambda image, strength: _affine(image, 1, 0.3 * strength, 0, 0, 1, 0),
    lambda image, strength: _affine(image, 1, 0, 0, 0.3 * strength, 1, 0),
    lambda image, strength: _affine(image, 1, 0, 0.45 * strength * image.width, 0, 1, 0),
    lambda image, strength: _affine(image, 1, 0, 0, 0, 1, 0.45 * strength * image.height),
)


# Which images, and how they get to the device


class Images(Dataset[tuple[Tensor, int]]):
    """Pixels uint8 [size, size, 3] and the label of `(epoch, image)`; `transform` gets the RGB image and its draws.

    Raises ValueError, which names the file, for one that cannot be read, see `data.read_image`.
    """

    def __init__(self, part: Part, transform: Callable[[Image.Image, Rng], Image.Image], seed: int) -> None:
        self.part, self.transform, self.seed = part, transform, seed

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        image = read_image(self.part.folder / os.fsdecode(self.part.paths[index]))
        image = self.transform(image, draws(self.seed, "image", epoch, index))
        return torch.from_numpy(np.array(image)), int(self.part.labels[index])


@dataclass(frozen=True)
class TrainBatches:
    """What the steps `first` … `last` − 1, counted from 0, train on: `batch_size` images each, shuffled anew in each
    epoch, without the incomplete last batch. Of `ranks` processes, each yields its own `batch_size / ranks` of them.
    """

    images: int
    batch_size: int
    seed: int
    first: int
    last: int
    rank: int = 0
    ranks: int = 1

    def __iter__(self) -> Iterator[list[Key]]:
        steps, share = self.images // self.batch_size, self.batch_size // self.ranks
        order, order_of = np.empty(0, np.int64), -1
        for step in range(self.first, self.last):
            epoch, at = divmod(step, steps)
            if epoch != order_of:
                order, order_of = draws(self.seed, "order", epoch).permutation(self.images), epoch
            start = at * self.batch_size + self.rank * share
            yield [(epoch, index) for index in order[start : start + share].tolist()]

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class EvalBatches:
    """Every image once, every `ranks`-th by each process; the last batch may be smaller."""

    images: int
    batch_size: int
    rank: int = 0
    ranks: int = 1

    def __iter__(self) -> Iterator[list[Key]]:
        own = range(self.rank, self.images, self.ranks)
        for start in range(0, len(own), self.batch_size):
            yield [(0, index) for index in own[start : start + self.batch_size]]

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.images, self.ranks)) // self.batch_size)


def loader(
    images: Images, batches: Iterable[list[Key]], *, workers: int, device: torch.device
) -> DataLoader[Any]:
    """Batches of pixels uint8 [n, size, size, 3] and labels int64 [n], in page-locked memory for a GPU."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it would draw from torch's global random state
    )


class ToDevice:
    """Moves a batch, without waiting, and normalises it: float32 [n, 3, size, size] in channels-last order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._mean, self._std = (255 * torch.tensor(value, device=device) for value in (MEAN, STD))

    def __call__(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        pixels, labels = (tensor.to(self._device, non_blocking=True) for tensor in (pixels, labels))
        return ((pixels.float() - self._mean) / self._std).permute(0, 3, 1, 2), labels
