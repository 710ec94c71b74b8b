"""Data sets of the benchmarks: images, held as uint8 tensors and normalised batch by batch on their device, and text.

    dataset = load("cifar10", validation=0.1).to("cuda")
    for epoch in range(epochs):
        for images, labels in dataset.batches("train", 128, seed=(run, epoch), augment=True):
            ...

Nothing is downloaded. `digits` comes with scikit-learn, `python` with Python (`text.py`). The other sets are looked for
in `root`, else in the folder that the environment variable ELROPT_DATA names, else in `../shared/data` or `shared/data`
of the repository.
"""

import codecs
import contextlib
import hashlib
import io
import lzma
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from benchmarks.common import text
from benchmarks.common.dataset import Dataset
from benchmarks.common.files import write_whole

if TYPE_CHECKING:
    from PIL import Image

IMAGEFOLDER_LIMIT = 4 * 2**30  # bytes of decoded images
_IMAGE_SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff"),
    ".webp",
}
_NAMED = 5  # files that are left out, in a warning


@dataclass(frozen=True, eq=False)
class Images(Dataset):
    """Images uint8 [n, C, H, W] and labels int64 [n]; batches are normalised, float32.

    `mean` and `std`, float32 [C], are those of the training images, in units of the stored pixels; `mirror` says
    whether a mirrored image keeps its class. `augment` crops at random from the image padded with the mean colour
    by an eighth of its side (4 pixels at 32×32; He et al., 2016, section 4.2) and mirrors every second one on
    average, where `mirror` allows it.
    """

    mirror: bool
    mean: Tensor
    std: Tensor

    items: ClassVar[str] = "images"

    def normalize(self, images: Tensor) -> Tensor:
        """Stored pixels [n, C, H, W] as float32, with mean 0 and variance 1 over the training images."""
        return (images.float() - self.mean[:, None, None]) / self.std[:, None, None]

    def preparation(
        self, inputs: Tensor, rng: np.random.Generator, *, augment: bool, channels_last: bool
    ) -> Callable[[Tensor], Tensor]:
        n, device = len(inputs), inputs.device
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        pad = inputs.shape[-1] // 8 if augment else 0
        corners = torch.from_numpy(rng.integers(2 * pad + 1, size=(n, 2))).to(device)
        mirrored = torch.from_numpy(rng.integers(2, size=n) == 1).to(device)

        def batch(index: Tensor) -> Tensor:
            x = self.normalize(inputs[index])
            if augment:
                x = _crop(x, pad, corners[index], mirrored[index] & self.mirror)
            return x.contiguous(memory_format=memory_format)

        return batch


def _crop(images: Tensor, pad: int, corners: Tensor, mirrored: Tensor) -> Tensor:
    """Cut images [n, C, H, W] at `corners` [n, 2] (top, left) out of themselves, zero-padded; mirror some."""
    n, _, height, width = images.shape
    image, row, column = (torch.arange(size, device=images.device) for size in (n, height, width))
    rows = corners[:, :1] + row
    columns = corners[:, 1:] + torch.where(mirrored[:, None], column.flip(0), column)
    padded = F.pad(images, (pad, pad, pad, pad))
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def load(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    validation: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
) -> Dataset:
    """Load a data set by its name in `DATASETS` to the CPU.

    `validation` is the share of the training part that becomes `val`, drawn by class with `seed`; `limit`
    first cuts the training part to at most that many images, also by class. The test part depends on neither:
    it is meant to be read once, at the end. `image_size` averages square blocks of pixels, so it must divide
    the side of the images. For `imagefolder`, the tree under `root` with a folder per class in `train/` and
    `test/` (or, without `test/`, in `val/`), it is the size to resize and center-crop to, 224 if not given;
    such a tree is loaded into memory, up to `IMAGEFOLDER_LIMIT` bytes. CIFAR is read from torchvision's
    extracted folders or from the compact .npz files. Raises ValueError for arguments out of range and for
    files that cannot be read (it names them), and FileNotFoundError where files are missing. Warns of what
    it leaves out of a tree. For `python` see `text.load`.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation is a share of the training images in [0, 1), got {validation}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if name == "python":
        for argument, value in (("root", root), ("image_size", image_size)):
            if value is not None:
                raise ValueError(
                    f"python is the text of this Python's library: drop {argument}={str(value)!r}"
                )
        return text.load(validation=validation, seed=seed, limit=limit)
    root = None if root is None else Path(root)
    if name == "imagefolder":
        image_size = image_size or 224
        source = _imagefolder(root, image_size)
    else:
        source = _READERS[name](root)
    images, title = source.images, source.title
    if image_size is not None:
        images, title = _shrink(images, image_size), f"{title}, {image_size}×{image_size}"

    order = stratified_order(source.labels[: source.n_train], np.random.default_rng(seed))[:limit]
    n_val = round(validation * len(order))
    if n_val == len(order) or (validation > 0 and n_val == 0):
        raise ValueError(
            f"validation={validation} of {len(order)} training images leaves {len(order) - n_val} to train "
            f"on and {n_val} to choose by; change validation or limit"
        )
    parts = order[n_val:], order[:n_val], np.arange(source.n_train, len(images))
    x = [torch.from_numpy(np.ascontiguousarray(images[part].transpose(0, 3, 1, 2))) for part in parts]
    y = [torch.from_numpy(source.labels[part]) for part in parts]
    pairs = x[0], y[0], x[1], y[1], x[2], y[2]
    return Images(name, title, source.class_names, *pairs, name != "digits", *_mean_std(x[0]))


def stratified_order(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of which every beginning holds the classes in their proportions, to rounding."""
    shuffled = rng.permutation(len(labels))
    quantile = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        quantile[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(quantile[shuffled], kind="stable")]


def _mean_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, float32 [C], from exact counts of the 256 pixel values."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    weights = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64)
    mean = weights @ values
    return mean.float(), (weights @ values**2 - mean**2).sqrt().float()


def _shrink(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    side = images.shape[1]
    if side % size:
        divisors = ", ".join(str(divisor) for divisor in range(1, side + 1) if side % divisor == 0)
        raise ValueError(f"image_size {size} does not divide {side}; choose one of {divisors}")
    if size == side:
        return images
    blocks = images.reshape(len(images), size, side // size, size, side // size, -1)
    return np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)


class _Source(NamedTuple):
    """Images [n, H, W, C] and labels [n], the `n_train` training images first, the test images after them."""

    title: str
    class_names: tuple[str, ...]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    n_train: int


def _digits(root: Path | None) -> _Source:
    if root is not None:
        raise ValueError(
            f"digits comes with scikit-learn and is read from no folder: drop root={str(root)!r}"
        )
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = stratified_order(labels, np.random.default_rng(0))
    images = pixels[order].reshape(-1, 8, 8, 1).astype(np.uint8)
    return _Source("digits", tuple("0123456789"), images, labels[order].astype(np.int64), len(order) * 4 // 5)


def _cifar10(root: Path | None) -> _Source:
    pickles = [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)]
    pickles += ["cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta"]
    compact = [f"cifar10-train-{i}.npz" for i in range(1, 6)] + ["cifar10-test.npz"]
    paths = _locate("cifar10", root, pickles, compact)
    if paths[0].suffix == ".npz":
        return _read_compact("CIFAR-10", paths, _decode_cifar10)
    return _read_pickles("CIFAR-10", paths, b"labels", b"label_names")


def _cifar10_20k(root: Path | None) -> _Source:
    compact = ["cifar10-train-1.npz", "cifar10-train-2.npz", "cifar10-test.npz"]
    return _read_compact(
        "CIFAR-10, 20,000 images to train on", _locate("cifar10-20k", root, compact), _decode_cifar10
    )


def _cifar10_quick(root: Path | None) -> _Source:
    return _read_compact(
        "CIFAR-10 quick", _locate("cifar10-quick", root, ["cifar10-quick.npz"]), _decode_cifar10
    )


def _cifar100(root: Path | None) -> _Source:
    pickles = [f"cifar-100-python/{file}" for file in ("train", "test", "meta")]
    paths = _locate("cifar100", root, pickles, ["cifar100-train.npz", "cifar100-test.npz"])
    if paths[0].suffix == ".npz":
        return _read_compact("CIFAR-100 (PSNR 40 dB)", paths, _decode_cifar100)
    return _read_pickles("CIFAR-100", paths, b"fine_labels", b"fine_label_names")


def _tinyimagenet40(root: Path | None) -> _Source:
    paths = _locate("tinyimagenet40", root, ["tinyimagenet40.npz"])
    return _read_compact("Tiny ImageNet, 40 classes", paths, _decode_jpegs)


_READERS: dict[str, Callable[[Path | None], _Source]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar10-20k": _cifar10_20k,
    "cifar10-quick": _cifar10_quick,
    "cifar100": _cifar100,
    "tinyimagenet40": _tinyimagenet40,
}
DATASETS = (*_READERS, "python", "imagefolder")


def _locate(name: str, root: Path | None, *choices: Sequence[str]) -> list[Path]:
    """Paths of the first of several lists of files that one of the data folders holds completely."""
    repository = Path(__file__).resolve().parents[2]
    if root is not None:
        folders = [root]
    elif "ELROPT_DATA" in os.environ:
        folders = [Path(os.environ["ELROPT_DATA"])]
    else:
        folders = [repository.parent / "shared" / "data", repository / "shared" / "data"]
    for folder in folders:
        for files in choices:
            paths = [folder / file for file in files]
            if all(path.is_file() for path in paths):
                return paths
    raise FileNotFoundError(
        f"{name}: found neither all of {' nor all of '.join(', '.join(files) for files in choices)} in "
        f"{' or '.join(str(folder) for folder in folders)}; name the folder by root (--root) or ELROPT_DATA"
    )


def _imagefolder(root: Path | None, size: int) -> _Source:
    if root is None:
        raise ValueError("imagefolder needs root: the folder that holds train/ and test/ (or val/)")
    held_out = "test" if (root / "test").is_dir() else "val"
    if not ((root / "train").is_dir() and (root / held_out).is_dir()):
        raise FileNotFoundError(f"{root} must hold train/ and test/ (or val/) with one folder per class")
    class_names = common_classes(root, held_out)
    train, test = (image_files(root / part, class_names) for part in ("train", held_out))
    files = train + test
    gibibytes = len(files) * size * size * 3 / 2**30
    if gibibytes > IMAGEFOLDER_LIMIT / 2**30:
        raise ValueError(
            f"{len(files):,} images of {size}×{size} take {gibibytes:.1f} GiB; at most "
            f"{IMAGEFOLDER_LIMIT / 2**30:.1f} GiB are loaded into memory: take a smaller image_size"
        )
    from PIL import Image, ImageOps

    def read(path: str) -> NDArray[np.uint8]:
        return np.asarray(ImageOps.fit(read_image(path), (size, size), Image.Resampling.BILINEAR))

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
        images = np.stack(list(pool.map(read, [path for path, _ in files])))
    return _Source(root.name, class_names, images, np.array([label for _, label in files]), len(train))


def common_classes(root: Path, held_out: str) -> tuple[str, ...]:
    """Sorted names of the folders in `root/train` and `root/held_out`: the classes of a tree.

    Warns of what else is there: files, and hidden folders. Raises FileNotFoundError if one of the two is
    missing, and ValueError if their folders differ.
    """
    parts = root / "train", root / held_out
    if not all(part.is_dir() for part in parts):
        raise FileNotFoundError(f"{root} must hold train/ and {held_out}/ with one folder per class")
    found: list[tuple[str, ...]] = []
    for part in parts:
        entries = {entry.name: entry.is_dir() and not _is_hidden(entry.name) for entry in os.scandir(part)}
        found.append(tuple(sorted(name for name, is_class in entries.items() if is_class)))
        _warn_left_out(part, [name for name, is_class in entries.items() if not is_class])
    train, other = found
    if train != other:
        differing = ", ".join(sorted(set(train) ^ set(other)))
        raise ValueError(
            f"{root}: train/ and {held_out}/ must hold the same classes; in one only: {differing}"
        )
    return train


def image_files(folder: Path, class_names: Sequence[str]) -> list[tuple[str, int]]:
    """Path and label of every image in a folder of a folder per class: by class, then by name.

    Folders inside a class belong to it. Warns of files with other suffixes, hidden files and folders, and
    links to folders: these are left out. Raises FileNotFoundError for a class without an image, and OSError
    for a folder that cannot be read.
    """
    files: list[tuple[str, int]] = []
    left_out: list[str] = []
    for label, name in enumerate(class_names):
        in_class = []
        for where, folders, names in os.walk(folder / name, onerror=_raise):
            entered = [n for n in folders if not (_is_hidden(n) or os.path.islink(os.path.join(where, n)))]
            used = [n for n in names if not _is_hidden(n) and _is_image(n)]
            in_class += [os.path.join(where, n) for n in used]
            unused = {*folders, *names}.difference(entered, used)
            left_out += [os.path.relpath(os.path.join(where, n), folder) for n in unused]
            folders[:] = entered
        if not in_class:
            raise FileNotFoundError(f"{folder / name} has no {', '.join(sorted(_IMAGE_SUFFIXES))} file")
        files += [(path, label) for path in sorted(in_class)]
    _warn_left_out(folder, left_out)
    return files


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _raise(error: OSError) -> NoReturn:
    raise error


def _warn_left_out(folder: Path, names: Sequence[str]) -> None:
    if not names:
        return
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    warnings.warn(
        f"{folder}: not used: {', '.join(sorted(names)[:_NAMED])}{more}. Classes are the folders in it, images "
        f"the files in these whose names end in {', '.join(sorted(_IMAGE_SUFFIXES))}; hidden files and "
        "folders, and links to folders inside a class, are left out",
        stacklevel=3,
    )


def read_image(path: str | Path) -> "Image.Image":
    """The image in a file, as RGB with 8 bits per channel; of several frames the first; without transparency.

    Grey values of 16 bits are scaled, so that 65535 becomes 255. Raises ValueError, which names the file, if
    it cannot be read, and for pixels whose white is not known: integers of 32 bits, signed ones, floats.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
                _require_16_bits(file)
                grey = (np.asarray(file).astype(np.uint32) + 128) // 257
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            if file.mode in ("I", "F"):
                raise ValueError(
                    "its pixels are 32-bit or signed integers or floats, of which it is not known what white "
                    "is: save it with 8 or 16 bits"
                )
            if file.mode == "P" and isinstance(file.info.get("transparency"), bytes):
                return file.convert("RGBA").convert("RGB")  # Pillow warns of the direct way
            return file.convert("RGB")
    except Exception as error:  # Pillow raises errors of many kinds
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _require_16_bits(file: "Image.Image") -> None:
    """Raises ValueError for a TIFF of 12 bits, or in which 0 is white: Pillow leaves their values as they are."""
    bits, zero_is_white = 258, 262  # tags of TIFF: BitsPerSample, PhotometricInterpretation
    tags = getattr(file, "tag_v2", {})
    if tags.get(bits, (16,)) != (16,) or tags.get(zero_is_white, 1) != 1:
        raise ValueError("its pixels are grey values of 12 bits, or 0 is white: save it with 8 or 16 bits")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns every error of the block that reads a file into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): put back a whole copy"
        ) from error


class _CifarUnpickler(pickle.Unpickler):
    """Reads dictionaries, lists, strings and NumPy arrays, and refuses everything else."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        make_array = np.empty(0).__reduce__()[0]
        allowed = {
            "numpy.core.multiarray._reconstruct": make_array,
            "numpy._core.multiarray._reconstruct": make_array,
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
            "_codecs.encode": codecs.encode,
        }
        name = f"{module_name}.{global_name}"
        if name not in allowed:
            raise pickle.UnpicklingError(f"{name} has no place in a CIFAR file: the file was not loaded")
        return allowed[name]


def _read_pickles(title: str, paths: Sequence[Path], label_key: bytes, names_key: bytes) -> _Source:
    """torchvision's extracted folders: pickled dictionaries, images as rows of 3·32·32 bytes.

    `paths` are the training files, the test file and the file with the names of the classes, in this order.
    """

    def unpickle(path: Path) -> dict:
        with path.open("rb") as file:
            return _CifarUnpickler(file, encoding="bytes").load()

    with _naming(paths[-1]):
        class_names = tuple(name.decode() for name in unpickle(paths[-1])[names_key])
    images, labels = [], []
    for path in paths[:-1]:
        with _naming(path):
            batch = unpickle(path)
            rows = np.asarray(batch[b"data"])
            images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels.append(_checked_labels(batch[label_key], images[-1], len(class_names)))
    n_train = sum(map(len, labels[:-1]))
    return _Source(title, class_names, np.concatenate(images), np.concatenate(labels), n_train)


def _checked_labels(labels: ArrayLike, images: NDArray, classes: int) -> NDArray[np.int64]:
    """Raises ValueError if `labels` are not one of the classes for every image, or images not of 8 bits."""
    checked = np.asarray(labels).astype(np.int64, casting="same_kind")
    if images.dtype != np.uint8:
        raise ValueError(f"images are uint8, not {images.dtype}")
    if checked.shape != (len(images),):
        raise ValueError(f"{len(images)} images with labels of the shape {checked.shape}")
    if checked.min() < 0 or checked.max() >= classes:
        raise ValueError(f"labels from {checked.min()} to {checked.max()} of {classes} classes")
    return checked


Archive = Mapping[str, NDArray]
Decoder = Callable[[Archive], NDArray[np.uint8]]


def _read_compact(title: str, paths: Sequence[Path], decode: Decoder) -> _Source:
    """Compact .npz files: one that holds both parts and says `n_train`, or several, the test file last."""
    images, labels, class_names, n_train = [], [], (), 0
    for path in paths:
        with _naming(path), path.open("rb") as file, np.load(file) as archive:
            named = tuple(str(name) for name in archive["class_names"])
            if path == paths[0]:
                class_names, n_train = named, int(archive.get("n_train", 0))
            if named != class_names:
                raise ValueError(f"its classes are not those of {paths[0].name}")
            images.append(_cached(path, archive, decode))
            labels.append(_checked_labels(archive["labels"], images[-1], len(class_names)))
            if len(paths) == 1 and not 0 < n_train < len(labels[0]):
                raise ValueError(f"n_train is {n_train} of {len(labels[0])} images")
    if len(paths) > 1:
        n_train = sum(map(len, labels[:-1]))
    return _Source(title, class_names, np.concatenate(images), np.concatenate(labels), n_train)


def _cached(path: Path, archive: Archive, decode: Decoder) -> NDArray[np.uint8]:
    """The images that `decode` makes of the file at `path`, kept in the user's cache folder under its SHA-256.

    They are kept as .npz, which has a checksum. A damaged one is decoded again.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elropt"
    cached = folder / f"{digest}.npz"
    with contextlib.suppress(Exception), cached.open("rb") as file, np.load(file) as kept:
        return kept["images"]
    images = decode(archive)
    with contextlib.suppress(OSError):  # without a writable cache the next call decodes again
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(cached, lambda file: np.savez(file, images=images))
    return images


def _decompress(archive: Archive, key: str, *shape: int) -> NDArray[np.uint8]:
    return np.frombuffer(lzma.decompress(archive[key].tobytes()), np.uint8).reshape(shape)


def _unfold(codes: NDArray[np.integer]) -> NDArray[np.integer]:
    """The signed numbers that codes stand for: 0, 1, 2, 3, … for 0, −1, 1, −2, …"""
    return (codes >> 1) ^ -(codes & 1)


def _decode_cifar10(archive: Archive) -> NDArray[np.uint8]:
    """Planes g, r − g + 128 and b − g + 128, each as folded residuals of the median predictor (LOCO-I)."""

    def plane(key: str) -> NDArray[np.integer]:
        codes = _decompress(archive, key, -1, 32, 32)
        pixels = _unfold(codes.transpose(1, 2, 0).astype(np.int16, order="C"))
        for row, column in np.ndindex(32, 32):
            left, above = pixels[row, column - 1], pixels[row - 1, column]
            if row and column:
                low, high = np.minimum(left, above), np.maximum(left, above)
                pixels[row, column] += np.clip(left + above - pixels[row - 1, column - 1], low, high)
            elif row or column:
                pixels[row, column] += above if row else left
            pixels[row, column] &= 255
        return pixels

    green, red, blue = (plane(key) for key in "grb")
    images = np.stack([red + green - 128, green, blue + green - 128], axis=-1)
    return images.transpose(2, 0, 1, 3).astype(np.uint8)


def _decode_cifar100(archive: Archive) -> NDArray[np.uint8]:
    """Rotated colours, 32×32 cosine transform, coefficients as folded multiples of `step` in two bytes each.

    Both transforms are whole numbers, together scaled by 2³⁴, and all sums stay below 2⁵³: exact everywhere.
    """
    n = len(archive["labels"])
    low, high = (_decompress(archive, key, 3, n, 1024) for key in ("lo", "hi"))
    raster = np.argsort(archive["order"])
    cosines, colours = archive["dct"].astype(np.float64), archive["color"] * 2.0**-34
    images = np.empty((n, 32, 32, 3), np.uint8)
    for start in range(0, n, 1000):
        chunk = slice(start, start + 1000)
        levels = _unfold(low[:, chunk] + high[:, chunk] * np.int32(256))[:, :, raster].reshape(3, -1, 32, 32)
        planes = np.tensordot(colours, cosines.T @ (levels * float(archive["step"])) @ cosines, 1)
        pixels = np.floor(planes.transpose(1, 2, 3, 0) + 0.5) + archive["mean"]
        images[chunk] = pixels.clip(0, 255)
    return images


def _decode_jpegs(archive: Archive) -> NDArray[np.uint8]:
    """JPEG files without their header, which is one of two."""
    from PIL import Image

    scans, offsets = archive["scans"].tobytes(), archive["offsets"]
    headers = archive["header0"].tobytes(), archive["header1"].tobytes()
    images = []
    for kind, start, end in zip(archive["header_kind"], offsets[:-1], offsets[1:], strict=True):
        with Image.open(io.BytesIO(headers[kind] + scans[start:end])) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images)
