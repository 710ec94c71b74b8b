"""Images of a tree: which, in which order, cropped how; against counts, exact pixels and distributions."""

from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from benchmarks.imagenet.data import (
    OPERATIONS,
    Augmentation,
    EvalBatches,
    Images,
    ToDevice,
    TrainBatches,
    crop_box,
    draws,
    eval_image,
    load_tree,
    loader,
    train_image,
)
from tests.benchmarks.photos import TRAIN, VAL, write_photos

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def rngs(count):
    return [np.random.default_rng(seed) for seed in range(count)]


def ramp(width, height):
    """Red is the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8))


# The tree


def test_the_files_of_a_tree_by_class_and_name(photos):
    tree = load_tree(photos)
    assert tree.class_names == ("flower", "temple")
    assert len(tree.train) == 2 * TRAIN - 1
    assert tree.train.labels.tolist() == [0] * (TRAIN - 1) + [1] * TRAIN
    assert tree.val.labels.tolist() == [0] * (VAL - 1) + [1] * VAL
    expected = sorted(str(path.relative_to(photos / "train")) for path in (photos / "train").glob("*/*"))
    assert [path.decode() for path in tree.train.paths] == expected


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_held_out_images_are_a_share_of_every_class_and_not_trained_on(photos, share):
    whole, tree = load_tree(photos), load_tree(photos, share)
    together = np.concatenate([tree.train.paths, tree.val.paths])
    assert sorted(together) == sorted(whole.train.paths)
    assert len(tree.val) == round(share * len(whole.train))
    counts = np.bincount(tree.val.labels, minlength=2)
    assert abs(counts - share * np.bincount(whole.train.labels)).max() <= 1
    assert load_tree(photos, share).digest == tree.digest != whole.digest


def test_digest_tells_other_files_and_other_labels(tmp_path):
    root = write_photos(tmp_path / "tree", 4, 3)
    before = load_tree(root).digest
    moved = next((root / "val" / "temple").iterdir())
    moved.rename(root / "val" / "flower" / f"other-{moved.name}")
    assert load_tree(root).digest != before


def test_errors_of_a_tree(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold train/ and val/"):
        load_tree(tmp_path)
    for share in (0.001, 1.0, -0.5):
        with pytest.raises(ValueError, match="take a share between 0 and 1 that leaves some of both"):
            load_tree(photos, share)


# Crops


def test_area_aspect_and_place_of_crops_are_uniform():
    side = 3000  # rounding to pixels does not show
    boxes = np.array([crop_box(side, side, 0.1, rng) for rng in rngs(2000)])
    left, top, right, bottom = boxes.T
    assert boxes.min() >= 0
    assert boxes.max() <= side
    width, height = right - left, bottom - top
    area, log_aspect = width * height / side**2, np.log(width / height)
    assert area.min() > 0.099
    assert abs(log_aspect).max() < np.log(4 / 3) + 0.003
    always_fits = area < 0.75  # wider ones can be wider than the image, and are drawn again
    assert stats.kstest(area[always_fits], stats.uniform(0.1, 0.65).cdf).pvalue > 0.001
    whole = 2 * np.log(4 / 3)
    for values in (log_aspect, -log_aspect):
        assert stats.kstest(values[always_fits], stats.uniform(-whole / 2, whole).cdf).pvalue > 0.001
    for start, room in ((left, side - width), (top, side - height)):
        assert stats.kstest(start[always_fits] / room[always_fits], stats.uniform().cdf).pvalue > 0.001


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 12), (492, 0, 508, 12)), ((12, 1000), (0, 492, 12, 508))],
)
def test_where_no_crop_fits_it_is_the_center(size, box):
    assert crop_box(*size, 0.9, np.random.default_rng(0)) == box


@settings(deadline=None, max_examples=100)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    area=st.floats(0.01, 1),
    seed=st.integers(0, 2**32),
)
def test_every_crop_lies_in_the_image(width, height, area, seed):
    left, top, right, bottom = crop_box(width, height, area, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_training_images_are_their_crop_mirrored_every_second_time():
    image, mirrored = ramp(200, 150), []
    for seed in range(200):
        box = crop_box(*image.size, 0.3, np.random.default_rng(seed))
        out = train_image(
            image, np.random.default_rng(seed), size=32, augmentation=Augmentation(min_area=0.3)
        )
        pixels = np.asarray(out).astype(float)
        red, green = pixels[16, :, 0], pixels[:, 16, 1]
        centers = (np.arange(32) + 0.5) / 32
        mirrored.append(red[0] > red[-1])
        columns = box[0] + centers * (box[2] - box[0]) - 0.5
        rows = box[1] + centers * (box[3] - box[1]) - 0.5
        inner = slice(2, -2)  # at the border the interpolation has fewer pixels
        assert abs(red - (columns[::-1] if mirrored[-1] else columns))[inner].max() <= 1
        assert abs(green - rows)[inner].max() <= 1
    assert stats.binomtest(sum(mirrored), 200).pvalue > 0.001


def test_images_to_judge_by_are_the_center_at_seven_eighths_of_the_shorter_side():
    image = ramp(250, 128)
    out = np.asarray(eval_image(image, np.random.default_rng(0), size=112))  # 128 · 7/8: no resizing
    assert np.array_equal(out, np.asarray(image)[8:120, 69:181])
    doubled = np.asarray(
        eval_image(image.resize((500, 256), Image.Resampling.NEAREST), np.random.default_rng(0), size=112)
    )
    assert abs(doubled.astype(int) - out)[2:-2, 2:-2].max() <= 1


@pytest.mark.parametrize("size", [(7, 300), (300, 7), (5, 5)])
def test_small_and_narrow_images_fill_the_square(size):
    assert eval_image(ramp(*size), np.random.default_rng(0), size=32).size == (32, 32)


# RandAugment


def test_operations_without_strength_change_nothing():
    image = ramp(64, 48)
    unchanged = [np.array_equal(operation(image, 0.0), image) for operation in OPERATIONS]
    assert unchanged == [True, False, False] + 11 * [True]  # autocontrast and equalize have no strength


def test_operations_at_full_strength():
    _, autocontrast, equalize, rotate, solarize, posterize, color, contrast, brightness, sharpness = (
        OPERATIONS[:10]
    )
    shear_x, shear_y, translate_x, translate_y = OPERATIONS[10:]
    image = ramp(100, 80)
    pixels = np.asarray(image).astype(int)
    assert np.array_equal(solarize(image, 1.0), 255 - pixels)
    assert np.array_equal(posterize(image, -1.0), pixels & 0b11110000)
    for strength, factor in ((1.0, 1.9), (-1.0, 0.1)):
        assert abs(np.asarray(brightness(image, strength)) - (pixels * factor).clip(0, 255)).max() <= 1
    grey = np.asarray(image.convert("L")).astype(float)[..., None]
    assert abs(np.asarray(color(image, -1.0)) - (0.1 * pixels + 0.9 * grey)).max() <= 1
    mean = round(grey.mean())
    assert abs(np.asarray(contrast(image, -1.0)) - (0.1 * pixels + 0.9 * mean)).max() <= 1
    stretched = np.asarray(autocontrast(image, 1.0)).astype(int)[0, :, 0]
    assert abs(stretched - np.linspace(0, 255, 100)).max() <= 1.5
    assert np.asarray(equalize(image, 1.0))[..., 1].max() > 240
    assert np.array_equal(np.asarray(sharpness(image, 1.0))[5:-5, 5:-5], pixels[5:-5, 5:-5])  # no edges
    # translated by 45 %, grey where nothing is
    moved = np.asarray(translate_x(image, 1.0)).astype(int)
    assert np.array_equal(moved[:, :55], pixels[:, 45:])
    assert (moved[:, 55:] == 128).all()
    moved = np.asarray(translate_y(image, -1.0)).astype(int)
    assert np.array_equal(moved[36:], pixels[:44])
    assert (moved[:36] == 128).all()
    # sheared by 0.3 pixels a row or column
    sheared = np.asarray(shear_x(image, 1.0)).astype(float)
    assert abs(sheared[40, 10:80, 0] - (pixels[40, 10:80, 0] + 0.3 * 40)).max() < 1.3  # Pillow truncates
    sheared = np.asarray(shear_y(image, -1.0)).astype(float)
    assert abs(sheared[40, 10:80, 1] - (40 - 0.3 * np.arange(10, 80))).max() < 1.3  # Pillow truncates
    # turned by 30° against the clock around the center
    turned = np.asarray(rotate(image, 1.0)).astype(float)[40, 50 - 20 : 50 + 20, 0]
    assert np.gradient(turned).mean() == pytest.approx(np.cos(np.pi / 6), abs=0.03)


def test_two_operations_are_drawn_from_all():
    assert len(OPERATIONS) == 14
    image, drawn = ramp(16, 16), []
    recorded = [lambda image, s, i=i: drawn.append((i, s)) or image for i in range(14)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.imagenet.data.OPERATIONS", tuple(recorded))
        for rng in rngs(700):
            train_image(image, rng, size=16, augmentation=Augmentation(operations=2, magnitude=5))
    indices, strengths = zip(*drawn, strict=True)
    assert len(drawn) == 1400
    assert stats.chisquare(np.bincount(indices, minlength=14)).pvalue > 0.001
    assert set(strengths) == {-0.5, 0.5}
    assert stats.binomtest(strengths.count(0.5), 1400).pvalue > 0.001


# What a run sees


def make_images(photos, seed=0, operations=2):
    augmentation = Augmentation(operations=operations)
    return Images(load_tree(photos).train, partial(train_image, size=24, augmentation=augmentation), seed)


def test_an_image_depends_on_seed_epoch_and_index_alone(photos):
    images = make_images(photos)
    first, label = images[3, 5]
    assert first.dtype == torch.uint8
    assert first.shape == (24, 24, 3)
    assert label == 0
    for _ in range(2):
        assert torch.equal(images[3, 5][0], first)
        images[3, 6]
    for other in (images[4, 5], make_images(photos, seed=1)[3, 5]):
        assert not torch.equal(other[0], first)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # fork, from Python 3.12 on
def test_workers_do_not_change_what_a_step_sees(photos):
    images = make_images(photos)
    order = TrainBatches(len(images), 10, seed=0, first=0, last=5)
    passes = [list(loader(images, order, workers=workers, device=CPU)) for workers in (0, 1, 2)]
    assert [len(batches) for batches in passes] == [5, 5, 5]
    for batches in passes[1:]:
        for (pixels, labels), (expected, expected_labels) in zip(batches, passes[0], strict=True):
            assert torch.equal(pixels, expected)
            assert torch.equal(labels, expected_labels)


def test_loading_leaves_torchs_random_state_alone(photos):
    images = make_images(photos)
    state = torch.get_rng_state()
    list(loader(images, TrainBatches(len(images), 10, 0, 0, 2), workers=0, device=CPU))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_mode_becomes_rgb_and_a_broken_file_is_named(tmp_path):
    root = write_photos(tmp_path / "tree", 3, 2)
    folder = root / "train" / "flower"
    Image.new("L", (40, 40), 77).save(folder / "00.png")
    Image.fromarray(np.full((40, 40), 77 * 257, np.uint16)).save(folder / "02.png")
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(folder / "01.jpg")
    images = Images(load_tree(root).train, partial(eval_image, size=8), 0)
    assert (images[0, 0][0] == 77).all()
    assert (images[0, 2][0] == 77).all()
    red = images[0, 1][0].float().mean((0, 1))
    assert red[0] > 200
    assert red[1:].max() < 60
    for broken in (b"no image", (folder / "01.jpg").read_bytes()[:400]):
        (folder / "01.jpg").write_bytes(broken)
        with pytest.raises(ValueError, match=r"01\.jpg cannot be read as an image"):
            images[0, 1]


@settings(deadline=None, max_examples=50)
@given(
    images=st.integers(1, 60),
    share=st.integers(1, 5),
    ranks=st.integers(1, 4),
    first=st.integers(0, 30),
)
def test_batches_of_training(images, share, ranks, first):
    batch_size = share * ranks
    per_epoch = images // batch_size
    if per_epoch == 0:
        return
    last = 2 * per_epoch
    whole = list(TrainBatches(images, batch_size, 7, 0, last))
    for epoch in (0, 1):
        batches = whole[epoch * per_epoch : (epoch + 1) * per_epoch]
        keys = [key for batch in batches for key in batch]
        assert [len(batch) for batch in batches] == [batch_size] * per_epoch
        assert {of for of, _ in keys} == {epoch}
        seen = [index for _, index in keys]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(images))
    # what the processes see is the whole, however often and wherever they were stopped
    first = min(first, last)
    parts = [list(TrainBatches(images, batch_size, 7, first, last, rank, ranks)) for rank in range(ranks)]
    together = [list(chain(*batches)) for batches in zip(*parts, strict=True)]
    assert together == whole[first:]
    assert [len(TrainBatches(images, batch_size, 7, first, last))] == [len(whole[first:])]


def test_epochs_and_seeds_have_orders_of_their_own():
    batch = partial(TrainBatches, 1000, 1000)
    orders = [[index for _, index in next(iter(batch(seed, step, 9)))] for seed in (0, 1) for step in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(1000))] * 4
    for i, order in enumerate(orders):
        for other in orders[:i]:
            assert (np.array(order) == other).mean() < 0.02


@given(images=st.integers(0, 40), batch_size=st.integers(1, 9), ranks=st.integers(1, 5))
def test_images_to_judge_by_count_once(images, batch_size, ranks):
    parts = [EvalBatches(images, batch_size, rank, ranks) for rank in range(ranks)]
    seen = [index for part in parts for batch in part for _, index in batch]
    assert sorted(seen) == list(range(images))
    for part in parts:
        sizes = [len(batch) for batch in part]
        assert len(part) == len(sizes)
        assert all(0 < size <= batch_size for size in sizes)


def test_draws_of_different_purposes_places_and_seeds_differ():
    places = [(0, "order", 1), (0, "image", 1, 0), (0, "mixup", 1), (1, "order", 1), (0, "image", 0, 1)]
    first = [draws(*place).random() for place in places]
    assert len(set(first)) == len(places)
    assert first == [draws(*place).random() for place in places]


def test_normalization():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(256, size=(4, 6, 6, 3), dtype=np.uint8))
    images, labels = ToDevice(CPU)(pixels, torch.arange(4))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (pixels.numpy() / 255 - mean) / std
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), expected, atol=1e-6)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [0, 1, 2, 3]
