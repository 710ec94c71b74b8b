import hashlib
import io
import lzma
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sklearn.datasets import load_digits

from benchmarks.common import data
from benchmarks.common.data import DATASETS, Images, image_files, load, read_image, stratified_order

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test reads or writes the user's cache or data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ELROPT_DATA", raising=False)


def make_dataset(n=40, shape=(3, 16, 16), mirror=True, seed=0):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(256, size=(n, *shape), dtype=np.uint8))
    labels = torch.arange(n)
    mean, std = torch.tensor([100.0, 120.0, 140.0])[: shape[0]], torch.tensor([30.0, 40.0, 50.0])[: shape[0]]
    parts = images, labels, images[:7], labels[:7], images[7:9], labels[7:9]
    return Images("random", "random", tuple(map(str, range(n))), *parts, mirror, mean, std)


def multiset(images):
    return sorted(image.tobytes() for image in np.asarray(images))


# Splits


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
    share=st.floats(0, 1),
)
def test_stratified_order_keeps_the_proportions_in_every_beginning(counts, seed, share):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = stratified_order(labels, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(labels)))
    m = round(share * len(labels))
    drawn = np.bincount(labels[order[:m]], minlength=len(counts))
    # The beginning is all quantiles up to some q: q·n_c ± ½ of class c, and so q·n = m ± (classes)/2.
    bound = 0.5 + np.array(counts) / len(labels) * len(counts) / 2
    assert (np.abs(drawn - m * np.array(counts) / len(labels)) <= bound + 1e-9).all()


def test_stratified_order_is_random_and_fixed_by_the_seed():
    labels = np.arange(200) % 5
    orders = [stratified_order(labels, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert len(set(labels[orders[0]][:5])) == 5


def test_digits_are_all_there_once():
    digits = load("digits")
    assert digits.in_shape == (1, 8, 8)
    assert digits.classes == 10
    assert digits.train_x.dtype == torch.uint8
    assert digits.train_y.dtype == torch.int64
    assert [len(digits.train_x), len(digits.val_x), len(digits.test_x)] == [1150, 287, 360]
    reference = load_digits()
    x = torch.cat([digits.train_x, digits.val_x, digits.test_x]).squeeze(1)
    y = torch.cat([digits.train_y, digits.val_y, digits.test_y])
    labelled = [bytes([label]) + image.tobytes() for label, image in zip(y, x.numpy(), strict=True)]
    expected = zip(reference.target, reference.images.astype(np.uint8), strict=True)
    assert sorted(labelled) == sorted(bytes([label]) + image.tobytes() for label, image in expected)
    for labels in (digits.train_y, digits.val_y, digits.test_y):
        share = len(labels) / 1797
        for label, count in enumerate(np.bincount(reference.target)):
            assert abs((labels == label).sum() - share * count) < 2


def test_test_part_depends_on_nothing():
    first, second = load("digits"), load("digits", seed=5, validation=0.4, limit=200)
    assert torch.equal(first.test_x, second.test_x)
    assert torch.equal(first.test_y, second.test_y)
    assert len(second.val_x) == 80
    assert len(second.train_x) == 120


def test_seed_chooses_the_validation_part_and_zero_leaves_none():
    one, same, other = (load("digits", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.val_x, same.val_x)
    assert not torch.equal(one.val_x, other.val_x)
    whole = load("digits", validation=0)
    assert len(whole.val_x) == 0
    assert list(whole.batches("val", 10)) == []
    assert multiset(whole.train_x) == multiset(torch.cat([one.train_x, one.val_x]))


def test_mean_and_std_are_those_of_the_training_images():
    digits = load("digits")
    pixels = digits.train_x.double()
    assert digits.mean.item() == pytest.approx(pixels.mean().item(), rel=1e-6)
    assert digits.std.item() == pytest.approx(pixels.std(correction=0).item(), rel=1e-6)
    images = digits.normalize(digits.train_x)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-6)
    assert images.var(correction=0).item() == pytest.approx(1, rel=1e-5)


def test_smaller_images_are_averages():
    large, small = load("digits"), load("digits", image_size=4)
    assert small.in_shape == (1, 4, 4)
    assert small.title == "digits, 4×4"
    averages = F.avg_pool2d(large.test_x.double(), 2).round().to(torch.uint8)
    assert torch.equal(small.test_x, averages)
    assert torch.equal(small.test_y, large.test_y)


# Batches


def test_unshuffled_pass_is_the_part_in_order():
    dataset = make_dataset()
    batches = list(dataset.batches("train", 16))
    assert [len(images) for images, _ in batches] == [16, 16, 8]
    assert torch.equal(torch.cat([labels for _, labels in batches]), dataset.train_y)
    images = torch.cat([images for images, _ in batches])
    mean, std = dataset.mean.double().view(3, 1, 1), dataset.std.double().view(3, 1, 1)
    torch.testing.assert_close(images.double(), (dataset.train_x.double() - mean) / std, atol=1e-6, rtol=1e-6)
    assert [labels.tolist() for _, labels in dataset.batches("test", 5)] == [[7, 8]]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 60), batch_size=st.integers(1, 60), seed=st.integers(0, 2**40))
def test_shuffled_pass_has_full_batches_of_different_images(n, batch_size, seed):
    dataset = make_dataset(n, (1, 2, 2))
    if batch_size > n:
        with pytest.raises(
            ValueError, match=f"batch_size {batch_size} is more than the {n} images of 'train'"
        ):
            dataset.batches("train", batch_size, seed=seed)
        return
    batches = list(dataset.batches("train", batch_size, seed=seed))
    assert [len(labels) for _, labels in batches] == [batch_size] * (n // batch_size)
    drawn = torch.cat([labels for _, labels in batches])
    assert len(drawn.unique()) == len(drawn)
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, dataset.normalize(dataset.train_x[drawn]))


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_fixed_by_the_seed(augment):
    dataset = make_dataset()

    def draw(seed):
        passes = list(dataset.batches("train", 8, seed=seed, augment=augment))
        return torch.cat([images for images, _ in passes])

    assert torch.equal(draw((3, 1)), draw((3, 1)))
    assert not torch.equal(draw((3, 1)), draw((3, 2)))
    assert not torch.equal(draw((3, 1)), draw((4, 1)))


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(make_dataset().batches("train", 8, seed=1, augment=True))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("augment", [False, True])
def test_memory_format(augment):
    dataset = make_dataset()
    plain = list(dataset.batches("train", 8, seed=1, augment=augment))
    nhwc = list(dataset.batches("train", 8, seed=1, augment=augment, channels_last=True))
    for (left, _), (right, _) in zip(plain, nhwc, strict=True):
        assert left.is_contiguous()
        assert right.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(left, right)


@pytest.mark.parametrize("mirror", [False, True])
def test_augmented_images_are_crops_of_the_padded_image(mirror):
    dataset = make_dataset(n=30, shape=(3, 16, 16), mirror=mirror)
    seen = set()
    for epoch in range(10):
        for images, labels in dataset.batches("train", 15, seed=(0, epoch), augment=True):
            for image, label in zip(images, labels, strict=True):
                padded = np.pad(dataset.normalize(dataset.train_x[label])[0].numpy(), 2)
                matches = [
                    (top, left, flipped)
                    for top in range(5)
                    for left in range(5)
                    for flipped in (False, True)
                    if np.array_equal(
                        image[0], padded[top : top + 16, left : left + 16][:, :: 1 - 2 * flipped]
                    )
                ]
                assert len(matches) == 1
                seen.update(matches)
                top, left, flipped = matches[0]
                # All channels of an image move together.
                channels = F.pad(dataset.normalize(dataset.train_x[label]), (2, 2, 2, 2))
                crop = channels[:, top : top + 16, left : left + 16]
                assert torch.equal(image, crop.flip(-1) if flipped else crop)
    # 300 draws of 25 corners, with or without 2 mirrorings.
    assert {(top, left) for top, left, _ in seen} == {(top, left) for top in range(5) for left in range(5)}
    assert {flipped for *_, flipped in seen} == ({False, True} if mirror else {False})


def test_a_mirrored_digit_is_not_a_digit():
    assert not load("digits").mirror


def test_to_moves_every_tensor():
    moved = make_dataset().to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert all(tensor.is_meta for tensor in tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_sees_the_same_batches():
    dataset = make_dataset()
    there = dataset.to("cuda").batches("train", 8, seed=1, augment=True, channels_last=True)
    for (left, y), (right, y_there) in zip(
        dataset.batches("train", 8, seed=1, augment=True), there, strict=True
    ):
        assert right.is_cuda
        torch.testing.assert_close(right.cpu(), left)
        assert torch.equal(y_there.cpu(), y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "unknown split 'dev'; choose one of train, val, test"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"augment": True}, "give a seed"),
    ],
)
def test_batches_reports_errors_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_dataset().batches(**{"split": "train", "batch_size": 8, **arguments})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mnist", {}, f"unknown data set 'mnist'; choose one of {', '.join(DATASETS)}"),
        ("digits", {"root": "somewhere"}, "is read from no folder: drop root='somewhere'"),
        ("digits", {"image_size": 3}, "image_size 3 does not divide 8; choose one of 1, 2, 4, 8"),
        ("digits", {"image_size": 0}, "image_size must be at least 1, got 0"),
        ("digits", {"validation": 1.0}, r"in \[0, 1\), got 1.0"),
        ("digits", {"validation": -0.1}, r"in \[0, 1\), got -0.1"),
        ("digits", {"validation": float("nan")}, r"in \[0, 1\), got nan"),
        ("digits", {"limit": 0}, "limit must be at least 1, got 0"),
        ("digits", {"limit": 2}, "leaves 2 to train on and 0 to choose by"),
        ("digits", {"limit": 2, "validation": 0.9}, "leaves 0 to train on and 2 to choose by"),
        ("imagefolder", {}, "imagefolder needs root"),
    ],
)
def test_load_reports_what_is_allowed(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(name, **arguments)


# Files


@pytest.mark.parametrize("name", ["cifar10", "cifar10-quick", "cifar100", "tinyimagenet40"])
def test_missing_files_are_named_with_the_remedy(name, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=rf"{name}: .*npz in .*{tmp_path.name}.*ELROPT_DATA"):
        load(name, root=tmp_path)
    monkeypatch.setenv("ELROPT_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load(name)


def fold(number):
    return 2 * number if number >= 0 else -2 * number - 1


def median_codes(plane):
    """Encode one plane [32, 32] pixel by pixel, straight from the format's description."""
    plane = plane.astype(int)
    codes = bytearray()
    for i in range(32):
        for j in range(32):
            left = plane[i, j - 1] if j else plane[i - 1, j] if i else 0
            above = plane[i - 1, j] if i else left
            corner = plane[i - 1, j - 1] if i and j else above
            prediction = sorted((left, above, left + above - corner))[1]
            codes.append(fold((plane[i, j] - prediction + 128) % 256 - 128))
    return bytes(codes)


def compress(raw):
    return np.frombuffer(lzma.compress(raw), np.uint8)


def write_compact_cifar10(path, images, labels, **more):
    red, green, blue = images.astype(int).transpose(3, 0, 1, 2)
    planes = {"g": green, "r": (red - green + 128) % 256, "b": (blue - green + 128) % 256}
    coded = {key: compress(b"".join(map(median_codes, plane))) for key, plane in planes.items()}
    np.savez(path, labels=labels.astype(np.uint8), class_names=np.array(["cat", "dog"]), **coded, **more)


def random_images(n, seed=0):
    """Half noise, half smooth, so that all branches of the predictor are taken."""
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(n, 32, 32, 3))
    ramp = np.add.outer(np.arange(32) * 5, np.arange(32) * 3)[None, :, :, None]
    images[n // 2 :] = (ramp + images[n // 2 :] // 32) % 256
    return images.astype(np.uint8), np.arange(n) % 2


def test_compact_cifar10_quick(tmp_path):
    images, labels = random_images(12)
    write_compact_cifar10(tmp_path / "cifar10-quick.npz", images, labels, n_train=np.int32(8))
    dataset = load("cifar10-quick", root=tmp_path, validation=0.25)
    assert dataset.class_names == ("cat", "dog")
    assert torch.equal(dataset.test_x, torch.from_numpy(images[8:]).permute(0, 3, 1, 2))
    assert dataset.test_y.tolist() == labels[8:].tolist()
    train = torch.cat([dataset.train_x, dataset.val_x]).permute(0, 2, 3, 1)
    assert multiset(train) == multiset(images[:8])
    assert dataset.val_y.tolist() in ([0, 1], [1, 0])


def test_compact_cifar10_20k_reads_two_training_files_and_the_test_file(tmp_path):
    images, labels = random_images(12)
    files = ("cifar10-train-1", "cifar10-train-2", "cifar10-test")
    for part, file in enumerate(files):
        chosen = slice(4 * part, 4 * part + 4)
        write_compact_cifar10(tmp_path / f"{file}.npz", images[chosen], labels[chosen])
    dataset = load("cifar10-20k", root=tmp_path, validation=0)
    assert (len(dataset.train_x), len(dataset.test_x)) == (8, 4)
    assert torch.equal(dataset.test_x, torch.from_numpy(images[8:]).permute(0, 3, 1, 2))


def test_compact_cifar10_in_six_files(tmp_path, monkeypatch):
    images, labels = random_images(12)
    for part in range(6):
        name = f"cifar10-train-{part + 1}.npz" if part < 5 else "cifar10-test.npz"
        chosen = slice(2 * part, 2 * part + 2)
        write_compact_cifar10(tmp_path / name, images[chosen], labels[chosen])
    monkeypatch.setenv("ELROPT_DATA", str(tmp_path))
    dataset = load("cifar10")
    assert torch.equal(dataset.test_x, torch.from_numpy(images[10:]).permute(0, 3, 1, 2))
    assert len(dataset.train_x) + len(dataset.val_x) == 10


def test_decoded_images_are_kept(tmp_path, monkeypatch):
    images, labels = random_images(8)
    path = tmp_path / "cifar10-quick.npz"
    write_compact_cifar10(path, images, labels, n_train=np.int32(6))
    first = load("cifar10-quick", root=tmp_path)
    (cached,) = (tmp_path / "cache" / "elropt").iterdir()
    assert cached.stem == hashlib.sha256(path.read_bytes()).hexdigest()
    assert np.array_equal(np.load(cached)["images"], images)

    def refuse(archive):
        raise AssertionError("decoded again")

    monkeypatch.setattr(data, "_decode_cifar10", refuse)
    again = load("cifar10-quick", root=tmp_path)
    assert torch.equal(again.train_x, first.train_x)
    write_compact_cifar10(path, images[::-1], labels, n_train=np.int32(6))
    with pytest.raises(ValueError, match="AssertionError: decoded again"):
        load("cifar10-quick", root=tmp_path)


@pytest.mark.parametrize("at", [0, 700])  # bytes that are kept; in the middle one is changed
def test_a_damaged_cache_is_made_anew(tmp_path, at):
    images, labels = random_images(8)
    write_compact_cifar10(tmp_path / "cifar10-quick.npz", images, labels, n_train=np.int32(6))
    first = load("cifar10-quick", root=tmp_path)
    (cached,) = (tmp_path / "cache" / "elropt").iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] if at else b"")
    again = load("cifar10-quick", root=tmp_path)
    assert torch.equal(again.train_x, first.train_x)
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    assert np.array_equal(np.load(cached)["images"], images)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    images, labels = random_images(8)
    write_compact_cifar10(tmp_path / "cifar10-quick.npz", images, labels, n_train=np.int32(6))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load("cifar10-quick", root=tmp_path).test_x) == 2


def test_an_interrupted_write_leaves_no_cache(tmp_path, monkeypatch):
    images, labels = random_images(8)
    write_compact_cifar10(tmp_path / "cifar10-quick.npz", images, labels, n_train=np.int32(6))

    def interrupt(file, images):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("cifar10-quick", root=tmp_path)
    assert list((tmp_path / "cache" / "elropt").iterdir()) == []
    assert len(load("cifar10-quick", root=tmp_path).test_x) == 2


def test_compact_cifar100(tmp_path):
    """Against the format's formula in whole numbers of any size."""
    rng = np.random.default_rng(0)
    n, step = 3, 10
    levels = rng.integers(-3, 4, size=(3, n, 32, 32))
    levels[:, :, 0, 0] *= 100
    order = rng.permutation(1024)
    k = np.arange(32)
    cosines = np.round(2**12 * np.sqrt(2 / 32) * np.cos(np.pi / 32 * np.outer(k, k + 0.5))).astype(int)
    colours = np.array([[577, -751, 390], [592, 21, -835], [604, 696, 446]])
    mean = np.array([129, 124, 112])
    folded = np.vectorize(fold)(levels.reshape(3, n, 1024)[:, :, order]).astype(np.uint16)
    for part in ("train", "test"):
        np.savez(
            tmp_path / f"cifar100-{part}.npz",
            labels=np.arange(n, dtype=np.uint8),
            class_names=np.array(["ant", "bee", "cow"]),
            lo=compress((folded & 255).astype(np.uint8).tobytes()),
            hi=compress((folded >> 8).astype(np.uint8).tobytes()),
            order=order.astype(np.int16),
            dct=cosines.astype(np.int16),
            color=colours.astype(np.int16),
            mean=mean.astype(np.int16),
            step=np.int16(step),
        )
    exact = np.einsum("ck,knij->nijc", colours, cosines.T @ (levels * step) @ cosines)
    expected = (((exact + 2**33) >> 34) + mean).clip(0, 255)
    assert len(np.unique(expected)) > 100
    dataset = load("cifar100", root=tmp_path, validation=0)
    assert dataset.title == "CIFAR-100 (PSNR 40 dB)"
    assert np.array_equal(dataset.test_x.permute(0, 2, 3, 1), expected)


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_tiny_imagenet(tmp_path):
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(256, size=(4, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    originals = [Image.fromarray(image) for image in pixels]
    originals[1], originals[2] = originals[1].convert("L"), originals[2].convert("L")
    files = [jpeg(image) for image in originals]
    kinds = [0, 1, 1, 0]
    starts = [file.index(b"\xff\xda") for file in files]  # the scan
    headers = files[0][: starts[0]], files[1][: starts[1]]
    scans = [file[start:] for file, start in zip(files, starts, strict=True)]
    np.savez(
        tmp_path / "tinyimagenet40.npz",
        labels=np.array([1, 0, 1, 0], np.uint8),
        class_names=np.array(["goldfish", "snail"]),
        n_train=np.int32(2),
        scans=np.frombuffer(b"".join(scans), np.uint8),
        offsets=np.cumsum([0, *map(len, scans)]),
        header_kind=np.array(kinds, np.uint8),
        header0=np.frombuffer(headers[0], np.uint8),
        header1=np.frombuffer(headers[1], np.uint8),
    )
    dataset = load("tinyimagenet40", root=tmp_path, validation=0.5)
    assert dataset.in_shape == (3, 64, 64)
    assert dataset.test_y.tolist() == [1, 0]
    decoded = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    assert np.array_equal(dataset.test_x.permute(0, 2, 3, 1), decoded[2:])
    assert multiset(torch.cat([dataset.train_x, dataset.val_x]).permute(0, 2, 3, 1)) == multiset(decoded[:2])


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 did, as in the original CIFAR files."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value):
        self.write(b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def write_python2_pickle(path, value):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core."))


def rewrite(path, value):
    """As a tool on Python 3 would write the file again."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=2))


def batch(images, labels, key):
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    return {
        b"batch_label": b"part",
        key: labels.tolist(),
        b"data": rows,
        b"filenames": [b"a.png"] * len(labels),
    }


@pytest.mark.parametrize("writer", [write_python2_pickle, rewrite])
def test_torchvisions_cifar10_folder(tmp_path, writer):
    images, labels = random_images(12)
    folder = tmp_path / "cifar-10-batches-py"
    for part in range(6):
        name, chosen = f"data_batch_{part + 1}" if part < 5 else "test_batch", slice(2 * part, 2 * part + 2)
        writer(folder / name, batch(images[chosen], labels[chosen], b"labels"))
    writer(folder / "batches.meta", {b"label_names": [b"cat", b"dog"], b"num_vis": 3072})
    dataset = load("cifar10", root=tmp_path, validation=0)
    assert dataset.class_names == ("cat", "dog")
    assert torch.equal(dataset.test_x, torch.from_numpy(images[10:]).permute(0, 3, 1, 2))
    assert dataset.test_y.tolist() == labels[10:].tolist()
    assert multiset(dataset.train_x.permute(0, 2, 3, 1)) == multiset(images[:10])


def write_cifar100_folder(root, images, labels):
    folder = root / "cifar-100-python"
    for name, chosen in (("train", slice(4, None)), ("test", slice(4))):
        contents = batch(images[chosen], labels[chosen], b"fine_labels")
        write_python2_pickle(folder / name, {**contents, b"coarse_labels": [0] * len(labels[chosen])})
    names = {b"fine_label_names": [b"apple", b"worm"], b"coarse_label_names": [b"things"]}
    write_python2_pickle(folder / "meta", names)


def test_torchvisions_cifar100_folder_comes_before_the_lossy_files(tmp_path):
    images, labels = random_images(12)
    write_cifar100_folder(tmp_path, images, labels)
    for part in ("train", "test"):
        (tmp_path / f"cifar100-{part}.npz").touch()
    dataset = load("cifar100", root=tmp_path)
    assert dataset.title == "CIFAR-100"
    assert dataset.class_names == ("apple", "worm")
    assert torch.equal(dataset.test_x, torch.from_numpy(images[:4]).permute(0, 3, 1, 2))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_pickles_that_run_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = random_images(12)
    write_cifar100_folder(tmp_path, images, labels)
    rewrite(tmp_path / "cifar-100-python" / "meta", {b"fine_label_names": Malicious()})
    with pytest.raises(ValueError, match=r"meta cannot be read .*mkdir has no place in a CIFAR file"):
        load("cifar100", root=tmp_path)
    assert not Path("hacked").exists()


# Damaged files


def cut(contents):
    return contents[: len(contents) // 2]


BYTES = [(lambda contents: b""), cut, (lambda contents: b"<html>404</html>")]


@pytest.mark.parametrize("change", BYTES, ids=["empty", "cut", "a web page"])
@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_damaged_cifar_batches_are_named(tmp_path, file, change):
    write_cifar100_folder(tmp_path, *random_images(12))
    path = tmp_path / "cifar-100-python" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        ValueError, match=rf"cifar-100-python.{file} cannot be read \(.*put back a whole copy"
    ):
        load("cifar100", root=tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({b"data": None}, "KeyError: b'data'"),
        ({b"data": np.zeros((4, 3000), np.uint8)}, "cannot reshape"),
        ({b"data": np.zeros((4, 3072))}, "images are uint8, not float64"),
        ({b"data": np.zeros((3, 3072), np.uint8)}, r"3 images with labels of the shape \(4,\)"),
        ({b"fine_labels": [0, 1, 2, 0]}, "labels from 0 to 2 of 2 classes"),
        ({b"fine_labels": [0.5, 1, 1, 0]}, "Cannot cast"),
    ],
)
def test_cifar_batches_that_do_not_fit_are_named(tmp_path, entries, message):
    images, labels = random_images(12)
    write_cifar100_folder(tmp_path, images, labels)
    contents = batch(images[:4], labels[:4], b"fine_labels") | entries
    path = tmp_path / "cifar-100-python" / "test"
    rewrite(path, {key: value for key, value in contents.items() if value is not None})
    with pytest.raises(ValueError, match=f"test cannot be read .*{message}"):
        load("cifar100", root=tmp_path)


@pytest.mark.parametrize("change", BYTES, ids=["empty", "cut", "a web page"])
def test_damaged_compact_files_are_named(tmp_path, change):
    images, labels = random_images(12)
    for part in range(6):
        name = f"cifar10-train-{part + 1}.npz" if part < 5 else "cifar10-test.npz"
        write_compact_cifar10(tmp_path / name, images[:2], labels[:2])
    path = tmp_path / "cifar10-train-3.npz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cifar10-train-3\.npz cannot be read \("):
        load("cifar10", root=tmp_path)


def test_compact_files_of_another_set_are_named(tmp_path):
    images, labels = random_images(12)
    for part in range(6):
        name = f"cifar10-train-{part + 1}.npz" if part < 5 else "cifar10-test.npz"
        write_compact_cifar10(tmp_path / name, images[:2], labels[:2])
    path = tmp_path / "cifar10-test.npz"
    whole = dict(np.load(path))
    for entries, message in (
        ({"class_names": np.array(["ant", "bee"])}, r"its classes are not those of cifar10-train-1\.npz"),
        ({"labels": whole["labels"][:1]}, r"2 images with labels of the shape \(1,\)"),
        ({"labels": np.array([0, 2], np.uint8)}, "labels from 0 to 2 of 2 classes"),
    ):
        np.savez(path, **whole | entries)
        with pytest.raises(ValueError, match=rf"cifar10-test\.npz cannot be read .*{message}"):
            load("cifar10", root=tmp_path)
    np.savez(path, **{key: value for key, value in whole.items() if key != "g"})
    with pytest.raises(ValueError, match=r"cifar10-test\.npz cannot be read .*KeyError"):
        load("cifar10", root=tmp_path)
    for n_train in (0, 2):
        write_compact_cifar10(
            tmp_path / "cifar10-quick.npz", images[:2], labels[:2], n_train=np.int32(n_train)
        )
        with pytest.raises(ValueError, match=rf"cifar10-quick\.npz .*n_train is {n_train} of 2 images"):
            load("cifar10-quick", root=tmp_path)


# Image folders


def write_tree(root, held_out="val", classes=("ant", "bee"), count=6, size=(20, 12)):
    rng = np.random.default_rng(0)
    for part in ("train", held_out):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(
                    root / part / name / f"{index}.{('png', 'PNG', 'jpeg')[index % 3]}"
                )


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_imagefolder(tmp_path, held_out):
    write_tree(tmp_path / "pets", held_out)
    (tmp_path / "pets" / "train" / "ant" / "notes.txt").touch()
    (tmp_path / "pets" / "train" / "README").touch()
    with pytest.warns(UserWarning, match="not used") as warned:
        dataset = load("imagefolder", root=tmp_path / "pets", image_size=8, validation=0.25)
    assert ["README" in str(w.message) for w in warned] == [True, False]
    assert os.path.join("ant", "notes.txt") in str(warned[1].message)
    assert dataset.class_names == ("ant", "bee")
    assert dataset.title == "pets, 8×8"
    assert dataset.in_shape == (3, 8, 8)
    assert [len(dataset.train_x), len(dataset.val_x), len(dataset.test_x)] == [9, 3, 12]
    assert dataset.test_y.tolist() == [0] * 6 + [1] * 6


def test_imagefolder_without_resizing_is_the_center(tmp_path):
    write_tree(tmp_path, size=(20, 12))
    dataset = load("imagefolder", root=tmp_path, image_size=12)
    original = np.asarray(Image.open(tmp_path / "val" / "ant" / "0.png"))
    assert np.array_equal(dataset.test_x[0].permute(1, 2, 0), original[:, 4:16])


def test_imagefolder_keeps_the_aspect_ratio_and_takes_any_mode(tmp_path):
    write_tree(tmp_path, count=1)
    stripes = np.zeros((40, 120), np.uint8)
    stripes[:, 40:80] = 255  # the central third is white
    Image.fromarray(stripes).save(tmp_path / "val" / "ant" / "0.png")
    dataset = load("imagefolder", root=tmp_path, validation=0)
    assert dataset.in_shape == (3, 224, 224)
    assert dataset.title == f"{tmp_path.name}, 224×224"
    assert (dataset.test_x[0, :, :, 3:-3] == 255).all()  # but for the interpolated border


def test_test_folder_comes_before_val(tmp_path):
    write_tree(tmp_path, "test", count=2)
    for name in ("ant", "bee"):
        (tmp_path / "val" / name).mkdir(parents=True)
    assert len(load("imagefolder", root=tmp_path, image_size=4, validation=0).test_x) == 4


def test_imagefolder_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"must hold train/ and test/ \(or val/\)"):
        load("imagefolder", root=tmp_path)
    write_tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(data, "IMAGEFOLDER_LIMIT", 24 * 8 * 8 * 3)
        load("imagefolder", root=tmp_path, image_size=8)
        with pytest.raises(ValueError, match=r"24 images of 9×9 take .* take a smaller image_size"):
            load("imagefolder", root=tmp_path, image_size=9)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match="must hold the same classes; in one only: cow"):
        load("imagefolder", root=tmp_path)
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(FileNotFoundError, match=r"cow has no \.bmp"):
        load("imagefolder", root=tmp_path)


def test_nothing_in_a_tree_is_left_out_without_a_word(tmp_path):
    write_tree(tmp_path / "pets", count=2)
    train, picture = tmp_path / "pets" / "train", Image.new("RGB", (9, 9), (1, 2, 3))
    (train / "ant" / "more" / "deep").mkdir(parents=True)
    (train / "bee" / ".ipynb_checkpoints").mkdir()
    (train / ".Trash").mkdir()
    for name in ("more/x.GIF", "more/deep/y.jfif", "z.jpe", "w.pgm"):  # images
        picture.convert("L").save(train / "ant" / name, None if "jf" not in name else "JPEG")
    left_out = ["bee/._0.png", "bee/boxes.txt", "bee/photo.heic"]
    for name in (*left_out, "bee/.ipynb_checkpoints/0.png", ".Trash/0.png"):
        (train / name).write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (train / "bee" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.warns(UserWarning, match="not used") as warned:
        dataset = load("imagefolder", root=tmp_path / "pets", image_size=8, validation=0)
    assert dataset.class_names == ("ant", "bee")
    assert dataset.train_y.bincount().tolist() == [6, 2]
    first, second = (str(w.message).replace(os.sep, "/") for w in warned)
    assert "pets/train: not used: .Trash. Classes" in first
    assert (
        "pets/train: not used: bee/._0.png, bee/.ipynb_checkpoints, bee/boxes.txt, bee/linked, bee/photo.heic. "
        in second
    )
    for index in range(3):
        (train / "bee" / f"{index}.txt").touch()
    with pytest.warns(UserWarning, match=r"bee/2\.txt and 3 more\. Classes"):
        image_files(train, ["bee"])


# Pixels


RAMP = np.linspace(0, 1, 40 * 40).reshape(40, 40)


@pytest.mark.parametrize("kind", ["16.png", "16.tif", "16-big-endian.tif", "16.pgm", "8.png", "1.png"])
def test_grey_values_of_any_depth_are_scaled_to_8_bits(tmp_path, kind):
    path = tmp_path / kind
    values = np.rint(RAMP * 65535).astype(np.uint16)
    expected = np.rint(values / 257)
    if kind == "16-big-endian.tif":
        path.write_bytes(tiff(values.astype(">u2").tobytes(), bits=16, order=">"))
    elif kind == "16.pgm":
        path.write_bytes(b"P5 40 40 65535 " + values.astype(">u2").tobytes())
    elif kind.startswith("16"):
        Image.fromarray(values).save(path)
    else:
        Image.fromarray(expected.astype(np.uint8)).convert("1" if kind == "1.png" else "L").save(path)
        expected = np.asarray(Image.open(path).convert("L"))
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.repeat(expected[..., None], 3, axis=2))


def tiff(pixels, *, bits, order="<", zero_is_white=False, kind=1):
    """Of 40 × 40 grey values; `kind` 1 is unsigned, 2 signed, 3 float."""
    tags = {256: 40, 257: 40, 258: bits, 259: 1, 262: int(not zero_is_white), 273: 8, 277: 1, 278: 40}
    tags |= {279: len(pixels), 339: kind}
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(pixels))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    return header + pixels + struct.pack(order + "H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        ((RAMP * (2**31 - 1)).astype("<i4"), {"bits": 32, "kind": 2}),
        ((RAMP * (2**32 - 1)).astype("<u4"), {"bits": 32}),
        (RAMP.astype("<f4"), {"bits": 32, "kind": 3}),
        ((RAMP * 32767).astype("<i2"), {"bits": 16, "kind": 2}),
        ((RAMP * 65535).astype("<u2"), {"bits": 16, "zero_is_white": True}),
        (np.zeros((40, 60), np.uint8), {"bits": 12}),
    ],
    ids=["int32", "uint32", "float32", "int16", "zero is white", "12 bits"],
)
def test_pixels_whose_white_is_not_known_are_refused(tmp_path, pixels, options):
    write_tree(tmp_path, count=1)
    (tmp_path / "train" / "ant" / "odd.tif").write_bytes(tiff(pixels.tobytes(), **options))
    with pytest.raises(
        ValueError, match=r"odd\.tif cannot be read as an image: .*: save it with 8 or 16 bits"
    ):
        load("imagefolder", root=tmp_path, image_size=8)


def test_transparent_palettes_are_read_without_a_warning(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "palette.png", transparency=b"\xff\x80")
    assert (np.asarray(read_image(tmp_path / "palette.png")) == [10, 20, 30]).all()


def truncated(path):
    noise = np.random.default_rng(0).integers(256, size=(60, 60, 3), dtype=np.uint8)
    path.write_bytes(cut(jpeg(Image.fromarray(noise))))


def huge(path):
    """The header of an image of 400 megapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    )


def long_text(path):
    info = PngInfo()
    info.add_text("comment", "a" * 3 * 2**20, zip=True)
    Image.new("L", (4, 4)).save(path, "PNG", pnginfo=info)


@pytest.mark.parametrize("damage", [truncated, huge, long_text, lambda path: path.write_bytes(b"")])
def test_an_image_that_cannot_be_read_is_named(tmp_path, damage):
    write_tree(tmp_path, count=1)
    damage(tmp_path / "train" / "bee" / "culprit.png")
    with pytest.raises(ValueError, match=r"culprit\.png cannot be read as an image: \w+"):
        load("imagefolder", root=tmp_path, image_size=8)


# The real files


@pytest.fixture(scope="module")
def real_files():
    for folder in (REPOSITORY.parent / "shared" / "data", REPOSITORY / "shared" / "data"):
        if (folder / "cifar10-test.npz").is_file():
            return folder
    return pytest.skip("the data folder is not here")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "decoder", "digest"),
    [
        ("cifar10-quick", "_decode_cifar10", "eb6d9ee0f2f4fa95"),
        ("cifar10-test", "_decode_cifar10", "1249626010949d8f"),
        ("cifar10-train-1", "_decode_cifar10", "fc115a3de050d667"),
        ("cifar10-train-2", "_decode_cifar10", "89e609b642f687bc"),
        ("cifar10-train-3", "_decode_cifar10", "93a365823e617294"),
        ("cifar10-train-4", "_decode_cifar10", "809eb95ecd057a36"),
        ("cifar10-train-5", "_decode_cifar10", "d05b7d66d216d6df"),
        ("cifar100-test", "_decode_cifar100", "5367a52a6199fa54"),
        ("cifar100-train", "_decode_cifar100", "9c8fb439f09507e1"),
    ],
)
def test_decoded_bytes(real_files, file, decoder, digest):
    with np.load(real_files / f"{file}.npz") as archive:
        images = getattr(data, decoder)(archive)
    assert images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest().startswith(digest)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
        ("cifar100", (0.50708, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
    ],
)
def test_published_means_and_deviations(real_files, name, mean, std):
    dataset = load(name, root=real_files, validation=0)
    assert [len(dataset.train_x), len(dataset.test_x)] == [50_000, 10_000]
    assert (torch.bincount(dataset.train_y) == 50_000 // dataset.classes).all()
    assert (torch.bincount(dataset.test_y) == 10_000 // dataset.classes).all()
    tolerance = 5.1e-6 if name == "cifar10" else 2e-3  # five decimals; the compact CIFAR-100 is lossy
    np.testing.assert_allclose(dataset.mean / 255, mean, atol=tolerance, rtol=0)
    np.testing.assert_allclose(dataset.std / 255, std, atol=tolerance, rtol=0)


@pytest.mark.slow
def test_real_tiny_imagenet(real_files):
    dataset = load("tinyimagenet40", root=real_files, validation=0.1)
    assert dataset.in_shape == (3, 64, 64)
    assert dataset.class_names[0].startswith("goldfish")
    assert (torch.bincount(dataset.train_y) == 405).all()
    assert (torch.bincount(dataset.val_y) == 45).all()
    assert (torch.bincount(dataset.test_y) == 50).all()
