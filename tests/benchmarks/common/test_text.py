"""Text: what the windows hold, and that the parts come from different files."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.common import data, text
from benchmarks.common.dataset import LOSS


def decoded(windows: torch.Tensor) -> list[str]:
    symbols = ("?", *text.CHARACTERS)
    return ["".join(symbols[i] for i in window) for window in windows.tolist()]


def test_windows_of_a_text_and_what_follows_each_character() -> None:
    source = "".join(chr(ord("a") + i % 26) for i in range(3 * text.CONTEXT + 1))
    x, y = text.windows(text.encode(source.encode()), None, spread=False)
    assert "".join(decoded(x)) == source[:-1]
    assert "".join(decoded(y)) == source[1:]
    assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
    assert decoded(text.windows(text.encode(source.encode()), 2, spread=True)[0]) == [
        source[: text.CONTEXT],
        source[2 * text.CONTEXT : -1],
    ]
    assert len(text.windows(text.encode(source.encode()[:-1]), None, spread=False)[0]) == 2


def test_rare_characters_are_one_symbol() -> None:
    np.testing.assert_array_equal(text.encode("a\té\nb".encode()), [67, 0, 0, 0, 1, 68])


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of 120 files of two windows; each repeats its own number."""
    for i in range(120):
        (tmp_path / f"m{i:03}.py").write_text(f"{i:03}," * (text.CONTEXT // 2))
    for folder in ("test", "site-packages"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.py").write_text("no source of the library" * 100)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_parts_are_of_different_files_and_the_test_part_is_always_the_same(library: Path) -> None:
    def files(part: torch.Tensor) -> set[str]:
        return {number for window in decoded(part) for number in window[1:-1].split(",") if len(number) == 3}

    first, second = (data.load("python", validation=0.25, seed=seed) for seed in (0, 1))
    assert (len(files(first.test_x)), len(files(first.val_x)), len(files(first.train_x))) == (12, 27, 81)
    assert not files(first.test_x) & files(first.val_x)
    assert not files(first.test_x) & files(first.train_x)
    assert not files(first.val_x) & files(first.train_x)
    assert files(first.test_x) == files(second.test_x)
    assert files(first.val_x) != files(second.val_x)
    assert len(data.load("python", limit=7).train_x) == 7


def test_chance_is_the_entropy_of_the_characters(library: Path) -> None:
    dataset = data.load("python")
    assert dataset.metric is LOSS
    counts = np.unique(dataset.train_y.numpy(), return_counts=True)[1]
    p = counts / counts.sum()
    assert dataset.chance == pytest.approx(-(p * np.log(p)).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"root": "x"}, "drop root='x'"), ({"image_size": 8}, "drop image_size='8'"), ({"limit": 0}, "limit")],
    ids=str,
)
def test_arguments_that_text_does_not_have(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load("python", **options)


def test_text_has_no_pixels(library: Path) -> None:
    with pytest.raises(ValueError, match="leave out augment and channels_last"):
        data.load("python").batches("train", 4, seed=0, augment=True)


def test_a_library_without_sources(library: Path) -> None:
    for path in library.glob("m0*.py"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has only \d+ \.py files"):
        data.load("python")
