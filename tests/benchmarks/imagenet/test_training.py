"""Training on image folders: what a recipe sets, what a step computes, and that a stopped run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import nn
from torch.distributed import HashStore
from torch.nn import functional as F
from typer.testing import CliRunner

import benchmarks.imagenet.training as training_module
from benchmarks.common import models
from benchmarks.common.files import write_whole
from benchmarks.imagenet.__main__ import main
from benchmarks.imagenet.data import Augmentation, load_tree
from benchmarks.imagenet.log import Log, epoch_summary, locked, read_rows
from benchmarks.imagenet.recipe import (
    OPTIMIZERS,
    RESNET_50,
    VIT_S_16,
    make_model,
    make_optimizer,
    make_settings,
)
from benchmarks.imagenet.training import Pace, Training, backward, evaluate, take_step, train
from benchmarks.imagenet.world import Refused, World
from tests.benchmarks.photos import TRAIN, VAL, write_photos

ROOT = Path(__file__).resolve().parents[3]
ALONE = World(0, 1, torch.device("cpu"))
TIMES = ("seconds", "images_per_second", "data_wait", "train_seconds")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def settings_of(tree, model="bn-mlp-3-w16", **changes):
    asked: dict[str, Any] = {
        "optimizer": "warmup",
        "lr": None,
        "epochs": 2,
        "warmup_epochs": None,
        "batch_size": 8,
        "image_size": 16,
        "hold_out": 0.0,
        "seed": 0,
        "amp": False,
        "compile": False,
        "device": "cpu",
        "ranks": 1,
    }
    return make_settings(tree, model=model, **{**asked, **changes})


def run(tree, out, settings=None, world=ALONE, **options):
    console = options.pop("console", Console(quiet=True))
    pace = Pace(**{"workers": 0, "log_every": 2, "checkpoint_every": 2, **options})
    return train(settings or settings_of(tree), tree, out, world, pace, console)


def rows_of(out):
    """Of the log, without what a clock has measured."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# Recipes and settings


@pytest.mark.parametrize(
    ("model", "optimizer", "batch_size", "lr", "other_lr", "warmup_epochs"),
    [
        ("resnet-50", "sgd", 256, 0.1, 0.1, 5),
        ("resnet-50", "uniform", 1024, 0.4, 0.4, 5),
        ("resnet-50", "warmup", 256, 0.1, 0.1, 0),
        ("resnet-50", "angle", 256, (2 * 0.1 * 1e-4 * 0.1) ** 0.5, 0.1, 5),
        ("vit-s-16", "adamw", 1024, 1e-3, 1e-3, 8),
        ("vit-s-16", "adamw", 256, 2.5e-4, 2.5e-4, 8),
        ("vit-s-16", "sgd", 1024, 0.4, 0.4, 8),
    ],
)
def test_learning_rates_of_the_recipes(photos, model, optimizer, batch_size, lr, other_lr, warmup_epochs):
    tree = load_tree(photos)
    many = tree._replace(train=tree.train[np.zeros(2000, np.int64)])
    settings = settings_of(many, model, optimizer=optimizer, batch_size=batch_size, epochs=None)
    assert settings.epochs == 90
    assert settings.lr == pytest.approx(lr, rel=1e-3)
    assert settings.other_lr == pytest.approx(other_lr)
    assert settings.warmup_epochs == warmup_epochs
    assert settings.steps == 90 * (2000 // batch_size)


def test_what_is_asked_for_wins_and_the_warm_up_keeps_its_share(photos):
    tree = load_tree(photos)
    settings = settings_of(tree, "resnet-50", optimizer="angle", lr=0.02, epochs=18)
    assert (settings.lr, settings.other_lr, settings.warmup_epochs) == (0.02, 0.1 * 8 / 256, 1.0)
    assert settings_of(tree, optimizer="warmup", epochs=9, warmup_epochs=2.5).warmup_epochs == 2.5
    assert settings_of(tree, optimizer="sphere", lr=0.001).lr == 0.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; choose one of sgd, adamw, warmup"),
        ({"optimizer": "adamw"}, "no recipe for adamw with bn-mlp-3-w16: choose another optimizer, or a ViT"),
        ({"optimizer": "sphere"}, "give --lr, in its own unit"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"batch_size": 26}, "26 is more than the 25 training images"),
        ({"batch_size": 9, "ranks": 2}, "9 is not a multiple of the 2 processes"),
        ({"warmup_epochs": 2.0}, "2.0 must be at least 0 and less than the 2 epochs"),
    ],
)
def test_errors_of_settings(photos, changes, message):
    with pytest.raises(ValueError, match=message):
        settings_of(load_tree(photos), **changes)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_groups_of_the_optimizers(photos, optimizer):
    settings = settings_of(load_tree(photos), "ln-transformer-2-w32", optimizer=optimizer, lr=0.01)
    torch.manual_seed(0)
    model = make_model(settings)
    made, tracked = make_optimizer(model, settings, torch.randn(8, 3, 16, 16))
    assert set(tracked) == {
        f"blocks.{block}.attention.{name}.weight" for block in (0, 1) for name in ("query", "key")
    }
    names = {p: name for name, p in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in made.param_groups for p in group["params"]}
    lrs = {names[p]: group["lr"] for group in made.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    for name, value in decay.items():
        is_matrix = dict(model.named_parameters())[name].ndim >= 2
        assert value == ((0.1 if optimizer == "adamw" else 1e-4) if is_matrix else 0.0), name
        other = 0.4 * 8 / 1024 if optimizer in ("angle", "sphere") and name not in tracked else 0.01
        assert lrs[name] == pytest.approx(other), name
    rules = {group.get("rule") for group in made.param_groups}
    assert rules == {None if optimizer in ("sgd", "adamw") else optimizer}
    if optimizer != "adamw":
        assert {group["momentum"] for group in made.param_groups} == {0.9}


def test_the_recipes_train_all_weights_but_the_head_of_resnet_50_and_the_queries_and_keys_of_vit(photos):
    tree = load_tree(photos)
    counts = {}
    for name in ("resnet-50-w4", "vit-s-16-w64"):
        torch.manual_seed(0)
        settings = settings_of(tree, name, image_size=64, lr=0.1)
        _, tracked = make_optimizer(make_model(settings), settings, torch.randn(8, 3, 64, 64))
        counts[name] = len(tracked)
    assert counts == {"resnet-50-w4": 53, "vit-s-16-w64": 24}


# One step


class Flat(nn.Module):
    """A linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, images):
        return self.linear(images.flatten(1))


def test_loss_and_gradients_of_a_step():
    """Against soft targets and mixed images written out in float64."""
    torch.manual_seed(0)
    model = Flat()
    settings = dataclasses.make_dataclass("Settings", ["seed", "amp"])(5, False)
    images, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 2, 1, 0])
    recipe = dataclasses.replace(RESNET_50, mixup=0.7, label_smoothing=0.2, grad_clip=0.05)
    norms, shares = [], []
    for at in range(4):
        state = Training.__new__(Training)
        state.settings, state.device, state.step, state.model = settings, torch.device("cpu"), at, model
        state.optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loss = backward(state, model, images, labels, recipe)
        share = np.random.default_rng((5, 2, at)).beta(0.7, 0.7)
        x, onehot = images.double().flatten(1), F.one_hot(labels, 3).double()
        mixed = share * x + (1 - share) * x[[5, 0, 1, 2, 3, 4]]
        targets = share * onehot + (1 - share) * onehot[[5, 0, 1, 2, 3, 4]]
        targets = 0.8 * targets + 0.2 / 3
        weight, bias = model.linear.weight.detach().double(), model.linear.bias.detach().double()
        logits = mixed @ weight.T + bias
        expected = -(targets * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        residual = (logits.softmax(1) - targets) / 6
        grads = residual.T @ mixed, residual.sum(0)
        norm = sum(grad.square().sum() for grad in grads).sqrt()
        for p, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad.double(), grad * (0.05 / norm), rtol=1e-4, atol=1e-7)
        norms.append(norm.item())
        shares.append(share)
    assert min(norms) > 0.05
    assert len(set(shares)) == 4


def test_spreads_of_a_step():
    torch.manual_seed(0)
    model = models.build("bn-mlp-4-w16", in_shape=(3, 4, 4), classes=3)
    images, labels = torch.randn(32, 3, 4, 4), torch.arange(32) % 3
    weights = [p for name, p in model.named_parameters() if p.ndim == 2 and "head" not in name]
    F.cross_entropy(model(images), labels).backward()
    E = np.array([(p.grad.norm() / p.norm()).item() for p in weights])
    for name, applied in (("sgd", None), ("uniform", 1.0), ("angle", 1.0)):
        settings = dataclasses.make_dataclass("S", ["model", "optimizer", "lr", "other_lr"])(
            "resnet-50", name, 0.01, 0.1
        )
        state = Training.__new__(Training)
        state.model = model
        state.optimizer, state.tracked = make_optimizer(model, settings, images)
        before = [p.detach().clone() for p in weights]
        row = take_step(state, measure=True)
        assert row["spread"] == pytest.approx(E.max() / E.min(), rel=1e-3)
        assert row["log_std"] == pytest.approx(np.log(E).std(), rel=1e-3)
        assert row.get("applied_spread") == (applied and pytest.approx(applied, rel=1e-3))
        assert not any(torch.equal(p, old) for p, old in zip(weights, before, strict=True))
        with torch.no_grad():
            for p, old in zip(weights, before, strict=True):
                p.copy_(old)
    state.tracked = {}
    assert take_step(state, measure=False) == {}


# Validation


def test_accuracies_are_exact(photos, monkeypatch):
    """A net whose logits are known colours of the image, against a loop over the files."""

    class Colours(nn.Module):
        def forward(self, images):
            assert not self.training
            means = images.mean((2, 3))
            return torch.cat([means, -means], 1)[:, :6]

    tree = load_tree(photos)
    settings = settings_of(tree, image_size=32, batch_size=4)
    model = Colours()
    hits = np.zeros(2)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for label, name in enumerate(tree.class_names):
        for path in (photos / "val" / name).iterdir():
            image = Image.open(path).convert("RGB")
            image = image.resize((round(100 * 37 / 80), 37), Image.Resampling.BILINEAR)
            left = (image.width - 32) // 2
            pixels = np.asarray(image.crop((left, 2, left + 32, 34))) / 255
            means = ((pixels - mean) / std).mean((0, 1))
            order = np.argsort(-np.concatenate([means, -means]))
            hits += [order[0] == label, label in order[:5]]
    row = evaluate(model, tree, settings, ALONE, workers=0)
    assert row == {
        "top1": hits[0] / (2 * VAL - 1),
        "top5": hits[1] / (2 * VAL - 1),
        "val_images": 2 * VAL - 1,
    }
    assert 0 < row["top1"] < row["top5"]
    assert model.training


# Runs


def test_a_net_learns_to_tell_two_photographs_apart_and_leaves_a_result(photos, tmp_path):
    tree = load_tree(photos)
    settings = settings_of(tree, "ln-mlp-3-w32", optimizer="sgd", lr=0.02, epochs=12, image_size=24)
    training = run(tree, tmp_path, settings)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["top1"] >= 0.9
    assert result["top1"] == evaluate(training.model, tree, settings, ALONE, 0)["top1"]
    assert [row["epoch"] for row in result["rows"]] == list(range(1, 13))
    assert result["rows"][0]["train_loss"] > result["rows"][-1]["train_loss"]
    assert result["settings"] == dataclasses.asdict(settings)
    assert result["recipe"]["label_smoothing"] == 0.1
    assert result["parameters"] == sum(p.numel() for p in training.model.parameters())
    assert result["tracked_layers"] == 2
    assert result["finite"] is True
    assert {row["val_images"] for row in result["rows"]} == {2 * VAL - 1}
    text = (tmp_path / "result.json").read_text() + (tmp_path / "log.jsonl").read_text()
    assert str(photos) not in text
    assert str(tmp_path) not in text
    rows = [row for row in rows_of(tmp_path) if row["kind"] == "steps"]
    assert [row["step"] for row in rows] == sorted({*range(2, 37, 2), *range(3, 37, 3)})
    assert [row["steps"] for row in rows[:4]] == [2, 1, 1, 2]
    # five of ninety epochs of linear warm-up, then a cosine to zero
    warmup = round(36 * 5 / 90)
    assert rows[0]["lr"] == pytest.approx(0.02)
    assert warmup == 2
    for row in rows[1:]:
        progress = (row["step"] - 1 - warmup) / (36 - warmup)
        assert row["lr"] == pytest.approx(0.01 * (1 + np.cos(np.pi * progress)), rel=1e-6)


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(
    ("optimizer", "stops"), [("warmup", (0, 1, 2, 3, 4, 5)), ("angle", (3,)), ("adamw", (1, 4))]
)
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not(photos, tmp_path, monkeypatch, optimizer, stops):
    """With dropout, so that the random state counts too; stopped at a row, before or after it is written."""
    tree = load_tree(photos)
    name = "ln-transformer-1-w32" if optimizer == "adamw" else "bn-mlp-3-w16"
    settings = settings_of(tree, name, optimizer=optimizer, seed=3)
    build = make_model

    def with_dropout(settings):
        return nn.Sequential(nn.Dropout(0.2), build(settings))

    monkeypatch.setattr(training_module, "make_model", with_dropout)
    whole = run(tree, tmp_path / "whole", settings)
    expected = rows_of(tmp_path / "whole")
    assert [row["step"] for row in expected] == [2, 3, 3, 4, 6, 6]
    write, stopped = Log.write, tmp_path / "stopped"
    for stop in stops:
        calls = itertools.count()

        def interrupt(log, row, stop=stop, calls=calls):
            last = next(calls) == stop
            if not last or stop % 2:
                write(log, row)
            if last:
                raise Interrupted

        out = stopped / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(Log, "write", interrupt)
            with pytest.raises(Interrupted):
                run(tree, out, settings)
        assert not (out / "result.json").exists()
        saved = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
        assert saved == [0, 2, 2, 3, 4, 4][stop]
        torch.manual_seed(stop)  # a new process would have another state, too
        resumed = run(tree, out, settings)
        assert rows_of(out) == expected
        assert_same_state(resumed.model.state_dict(), whole.model.state_dict())
    states = [training.optimizer.state_dict()["state"] for training in (whole, resumed)]
    for index, state in states[0].items():
        assert_same_state(state, states[1][index])


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """The folder of a run that has ended: 6 steps in 2 epochs."""
    out = tmp_path_factory.mktemp("finished")
    run(load_tree(photos), out)
    return out


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_finished_run_is_left_as_it_is(photos, tmp_path, finished, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    result = json.loads((out / "result.json").read_text())
    (out / "result.json").write_text(json.dumps(result | {"top1": "kept"}))
    before = contents(out)
    again = run(load_tree(photos), out, console=Console(width=200))
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert_same_state(again.model.state_dict(), state["model"])
    assert contents(out) == before
    assert f"nothing to do: {out / 'result.json'} is the result of this run" in capsys.readouterr().out


# What has happened to the folder of a run


def change_tensor(path):
    """Of one byte, in the middle of the largest: torch.load alone does not see it."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        with archive.open(largest) as file:
            tensor = file.read()
    whole = path.read_bytes()
    at = whole.index(tensor) + len(tensor) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    torch.load(path, weights_only=True)


def change_line(number, line):
    def change(path):
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number - 1] = line
        path.write_bytes(b"".join(lines))

    return change


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


DAMAGED = [
    ("checkpoint.pt", cut, r"checkpoint\.pt is damaged \(File is not a zip file\)"),
    ("checkpoint.pt", lambda path: path.write_bytes(b""), r"checkpoint\.pt is damaged"),
    ("checkpoint.pt", change_tensor, r"checkpoint\.pt is damaged \(.*/data/"),
    (
        "checkpoint.pt",
        lambda path: torch.save({"model": 1}, path),
        r"checkpoint\.pt is no checkpoint of a run",
    ),
    ("checkpoint.pt", Path.unlink, r"result\.json is there, but the checkpoint of this run is not"),
    ("log.jsonl", change_line(3, b'{"kind": "ste\n'), r"log\.jsonl, line 3 is damaged"),
    ("log.jsonl", change_line(2, b"\0\0\0\n"), r"log\.jsonl, line 2 is damaged"),
    ("log.jsonl", change_line(2, b"[1]\n"), r"log\.jsonl, line 2 is damaged"),
    ("log.jsonl", change_line(2, b""), r"log\.jsonl lacks rows before line 2"),
    ("log.jsonl", change_line(6, b""), r"log\.jsonl ends at step 6, .*"),
    ("log.jsonl", Path.unlink, r"log\.jsonl ends at step 0, the checkpoint is of step 6"),
]


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGED)
def test_a_damaged_folder_is_refused_and_left_as_it_is(photos, tmp_path, finished, file, damage, message):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    damage(out / file)
    before = contents(out)
    with pytest.raises(
        Refused, match=f"{message}.*: (put back a whole copy, or begin anew|give another --out)"
    ):
        run(load_tree(photos), out)
    assert contents(out) == before


def test_a_log_without_a_checkpoint_is_not_overwritten(photos, tmp_path, finished):
    shutil.copy(finished / "log.jsonl", tmp_path)
    with pytest.raises(Refused, match=r"log\.jsonl is there, but the checkpoint of this run is not"):
        run(load_tree(photos), tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == (finished / "log.jsonl").read_bytes()


def test_what_a_kill_has_left_behind_the_checkpoint_is_cleared_away(photos, tmp_path, finished):
    """Rows of later steps, a torn one and zeros after a power cut; a checkpoint half written."""
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "result.json").unlink()
    with (out / "log.jsonl").open("ab") as file:
        file.write(b'{"kind": "steps", "epoch": 3, "step": 8, "steps": 2}\n\0\0\0\n{"kind": "st')
    (out / "checkpoint.pt.0123.unfinished").write_bytes(b"ha")
    run(load_tree(photos), out)
    assert (out / "log.jsonl").read_bytes() == (finished / "log.jsonl").read_bytes()
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "lock", "log.jsonl", "result.json"}


# Two runs in one folder


def hold_lock(out, orphan, said):
    """Of a process with a worker of its own, as the loader has them, which outlives it."""
    with locked(out):
        worker = multiprocessing.get_context("fork").Process(target=orphan.wait, args=(60,))
        worker.start()
        said.set()
        time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # fork, from Python 3.12 on
@pytest.mark.skipif(sys.platform == "win32", reason="no lock there")
def test_a_second_run_in_a_folder_is_refused_until_the_first_one_ends_or_is_killed(
    photos, tmp_path, finished
):
    tree, out = load_tree(photos), Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "result.json").unlink()
    fork = multiprocessing.get_context("fork")
    orphan, said = fork.Event(), fork.Event()
    first = fork.Process(target=hold_lock, args=(out, orphan, said))
    first.start()
    try:
        assert said.wait(60)
        before = contents(out)
        expected = (
            rf"another run is at work in .*run \(process {first.pid} on .+\): wait for it, end it, or give"
        )
        with pytest.raises(Refused, match=expected):
            run(tree, out)
        assert contents(out) == before
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    run(tree, out)  # while the worker of the first one still is there
    assert (out / "result.json").exists()
    orphan.set()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.warns(UserWarning, match=r"lock cannot be locked .*: see to it that no other run"),
        locked(tmp_path),
    ):
        pass


def test_two_writers_of_one_file_do_not_tear_it(tmp_path):
    path = tmp_path / "checkpoint.pt"

    def first(file):
        file.write(b"first, ")
        write_whole(path, lambda other: other.write(b"second"))
        assert path.read_bytes() == b"second"
        file.write(b"whole")

    write_whole(path, first)
    assert path.read_bytes() == b"first, whole"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_says_which_file(tmp_path):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space") as raised:
        write_whole(tmp_path / "checkpoint.pt", full)
    assert raised.value.__notes__ == [f"while {tmp_path / 'checkpoint.pt'} was written"]


# What several processes agree on


def on_two_ranks(work):
    """What `work(world)` raises on each of two ranks, which are threads here."""
    store = HashStore()
    worlds = [World(rank, 2, torch.device("cpu"), store) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        return [future.exception(timeout=60) for future in [pool.submit(work, world) for world in worlds]]


def test_processes_exchange_values_and_fail_together():
    gathered = {}

    def exchange(world):
        gathered[world.rank] = [world.gather({"rank": world.rank}), world.gather(None)]
        assert world.together(lambda: world.rank) == world.rank
        world.compare({"steps": 3})

    assert on_two_ranks(exchange) == [None, None]
    assert gathered == {rank: [[{"rank": 0}, {"rank": 1}], [None, None]] for rank in (0, 1)}

    def fail(error):
        def work(world):
            if world.rank == 1:
                raise error

        return on_two_ranks(lambda world: world.together(lambda: work(world)))

    for error in (FileNotFoundError("no val/"), ValueError("no val/")):
        refused = fail(error)
        assert [str(e) for e in refused] == ["on rank 1: no val/", "no val/"]
        assert {type(e) for e in refused} == {Refused}
    first, second = fail(KeyError())
    assert isinstance(first, Refused)
    assert str(first) == "on rank 1: KeyError"
    assert isinstance(second, KeyError)


def test_processes_that_do_not_see_the_same_are_refused_before_the_first_step(photos, tmp_path, monkeypatch):
    tree = load_tree(photos)
    renamed = tree._replace(train=dataclasses.replace(tree.train, paths=tree.train.paths[::-1]))
    settings = [settings_of(each, ranks=2) for each in (tree, renamed)]
    out = tmp_path / "run"

    def refused(settings, **options):
        each = on_two_ranks(
            lambda world: run(
                tree, out, settings[world.rank], world, **{name: v[world.rank] for name, v in options.items()}
            )
        )
        assert len({str(error) for error in each}) == 1
        assert {type(error) for error in each} == {Refused}
        return str(each[0])

    assert (
        f"rank 1 sees data '{renamed.digest}', but rank 0 data '{tree.digest}': give all processes the same"
        in refused(settings)
    )
    same = [settings[0], settings[0]]
    assert "rank 1 sees log_every 3, but rank 0 log_every 2" in refused(same, log_every=(2, 3))
    assert "checkpoint_every 9, but" in refused(same, checkpoint_every=(2, 9))
    assert "rank 1 sees epochs 3, warmup_epochs 0.1" in refused(
        [settings[0], settings_of(tree, ranks=2, epochs=3, warmup_epochs=0.1)]
    )
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "versions", iter([{"code": "a"}, {"code": "b"}]).__next__)
        assert "rank 1 sees code '" in refused(same)
    assert not out.exists()


def test_processes_with_different_folders_do_not_go_on_from_different_steps(photos, tmp_path, finished):
    """A folder that only one of two machines sees."""
    tree = load_tree(photos)
    (tmp_path / "0").mkdir()
    shutil.copy(finished / "checkpoint.pt", tmp_path / "0")
    shutil.copy(finished / "log.jsonl", tmp_path / "0")
    each = on_two_ranks(lambda world: run(tree, tmp_path / str(world.rank), world=world))
    assert len({str(error) for error in each}) == 1
    assert "rank 1 sees step of the checkpoint 0, but rank 0 step of the checkpoint 6" in str(each[0])


# Other settings, and the log


def test_another_run_is_not_continued(photos, tmp_path):
    tree = load_tree(photos)
    run(tree, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = settings_of(tree, lr=0.5, seed=1)
    with pytest.raises(
        ValueError, match=r"run with lr 0\.003125, not 0\.5, .*seed 0, not 1: give the arguments"
    ):
        run(tree, tmp_path, other)
    with pytest.raises(ValueError, match=r"hold_out 0\.0, not 0\.2, data '"):
        run(load_tree(photos, 0.2), tmp_path, settings_of(load_tree(photos, 0.2), hold_out=0.2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_that_was_cut_short_does_not_replace_the_last_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_whole(path, lambda file: file.write(b"whole"))

    def cut(file):
        file.write(b"ha")
        raise Interrupted

    with pytest.raises(Interrupted):
        write_whole(path, cut)
    assert path.read_bytes() == b"whole"
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_log_goes_on_after_the_step_of_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"kind": "steps", "step": step, "steps": 1} for step in (1, 2, 3)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"st')
    assert read_rows(path, 2, 10) == rows[:2]
    with contextlib.closing(Log(path, rows[:2])) as log:
        assert log.rows == rows[:2]
        log.write(rows[2] | {"loss": float("inf")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        *rows[:2],
        rows[2] | {"loss": None},
    ]
    assert read_rows(path, 0, 10) == []
    with contextlib.closing(Log(path, [])) as log:
        assert log.rows == []
    assert path.read_text() == ""


def test_means_of_an_epoch():
    keys = ("epoch", "steps", "loss", "seconds", "images_per_second", "data_wait")
    values = [(1, 9, 7.0, 9.0, 1.0, 1.0), (2, 3, 1.0, 1.0, 30.0, 0.5), (2, 1, 5.0, 3.0, 10.0, 0.1)]
    rows = [{"kind": "steps", **dict(zip(keys, row, strict=True))} for row in values]
    rows.append({"kind": "epoch", "epoch": 2})
    expected = {"train_loss": 2.0, "train_seconds": 4.0, "images_per_second": 15.0, "data_wait": 0.2}
    assert epoch_summary(rows, 2) == expected


def test_a_run_that_diverges_stops_and_says_so(photos, tmp_path, capsys):
    tree = load_tree(photos)
    settings = settings_of(tree, "mlp-3-w16", optimizer="sgd", lr=1e30, epochs=4)
    with pytest.warns(UserWarning, match="no parameter is tracked"):
        training = run(tree, tmp_path, settings, console=Console(width=200))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["finite"] is False
    assert training.step < settings.steps
    assert (
        f"the loss is not finite at step {training.step}: stopped; try a smaller --lr"
        in capsys.readouterr().out
    )
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] < training.step


# The command


@pytest.fixture
def invoke():
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "300"})


def test_the_command_from_images_to_a_result(photos, tmp_path, invoke):
    arguments = [photos, "--model", "ln-transformer-1-w32", "--optimizer", "uniform", "--image-size", 16]
    arguments += ["--batch-size", 8, "--epochs", 1, "--workers", 0, "--hold-out", 0.2, "--out", tmp_path]
    result = invoke(*arguments, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "epoch 1, loss" in result.output
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["judged_on"] == "a part of train/ that was held out"
    assert content["settings"]["train_images"] + content["settings"]["val_images"] == 2 * TRAIN - 1
    assert content["recipe"]["grad_clip"] == VIT_S_16.grad_clip == 1.0
    assert content["recipe"]["augmentation"] == dataclasses.asdict(Augmentation(0.05, 2, 10))
    assert content["tracked_layers"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "must hold train/ and val/"),
        ([None, "--device", "tpu"], "--device tpu cannot be used here"),
        ([None, "--optimizer", "adam"], "unknown optimizer 'adam'"),
        ([None, "--model", "resnet-7b", "--batch-size", "8"], "unknown model 'resnet-7b'"),
        ([None, "--model", "vit-s-15", "--batch-size", "8"], "patches of side 15 do not tile"),
        ([None], "batch_size 256 is more than the 25 training images"),
        ([None, "--hold-out", "1.5"], "hold_out=1.5"),
    ],
)
def test_errors_of_the_command(photos, tmp_path, invoke, arguments, message):
    arguments = [photos if argument is None else argument for argument in arguments]
    out = tmp_path / "run"
    result = invoke(*arguments, "--out", out)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not out.exists()


# Kills, in processes of their own


def command(photos, out, *options, ranks=0):
    launcher = (
        ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks else []
    )
    return [
        *(sys.executable, "-m", *launcher, "benchmarks.imagenet", str(photos), "--image-size", "32"),
        *("--batch-size", "8", "--log-every", "1", "--workers", "1", "--device", "cpu", "--out", str(out)),
        *map(str, options),
    ]


def start(arguments, **variables):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(arguments):
    process = start(arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def wait_for_rows(process, out, count):
    """Until the run has written so many rows."""
    log = out / "log.jsonl"
    for _ in range(1200):
        if log.exists() and log.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("the run has written no rows")


def children(pid):
    """Process ids whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def assert_same_runs(ours, theirs):
    assert rows_of(ours) == rows_of(theirs)
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (ours, theirs)]
    assert_same_state(states[0]["model"], states[1]["model"])
    assert states[0]["step"] == states[1]["step"] > 0


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_for_bit(photos, tmp_path):
    options = ["--model", "resnet-50-w4", "--epochs", "12", "--checkpoint-every", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(command(photos, whole, *options))
    process = start(command(photos, killed, *options))
    wait_for_rows(process, killed, 7)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    finish(command(photos, killed, *options))
    assert_same_runs(killed, whole)
    assert len(rows_of(whole)) == 12 * 4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes of torchrun in /proc")
def test_two_processes_of_which_one_is_killed_go_on_bit_for_bit(photos, tmp_path):
    options = ["--model", "resnet-50-w4", "--epochs", "12", "--checkpoint-every", "4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(command(photos, whole, *options, ranks=2))
    process = start(command(photos, killed, *options, ranks=2))
    wait_for_rows(process, killed, 7)
    one = children(process.pid)[0]
    os.kill(one, signal.SIGSTOP)  # the other waits for it: the run does not end before the second one asks
    second = start(command(photos, killed, *options, ranks=2))
    output, _ = second.communicate(timeout=120)
    assert second.returncode != 0
    assert output.count("another run is at work in") == 2, output
    os.kill(one, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (killed / "result.json").exists()
    finish(command(photos, killed, *options, ranks=2))
    assert_same_runs(killed, whole)
    assert {row["val_images"] for row in rows_of(whole) if row["kind"] == "epoch"} == {2 * VAL - 1}


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(photos, tmp_path):
    """Without BatchNorm, whose averages are over the images of one process."""
    options = ["--model", "ln-mlp-4-w16", "--epochs", "2", "--optimizer", "sgd"]
    finish(command(photos, tmp_path / "two", *options, ranks=2))
    tree = load_tree(photos)
    settings = settings_of(tree, "ln-mlp-4-w16", optimizer="sgd", image_size=32)
    run(tree, tmp_path / "one", settings, log_every=1, checkpoint_every=1000)
    for ours, theirs in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), key


@pytest.mark.slow
@pytest.mark.parametrize("differs", ["images", "device"])
def test_two_processes_that_do_not_see_the_same_both_end_with_the_reason(photos, tmp_path, differs):
    """Started without torchrun, which would end one when the other has failed."""
    other = shutil.copytree(photos, tmp_path / "other")
    (other / "train" / "temple" / "00.png").rename(other / "train" / "temple" / "renamed.png")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "COLUMNS": "300"}
    arguments = [(photos, "cpu"), (other, "cpu") if differs == "images" else (photos, "tpu")]
    processes = [
        start(
            command(data, tmp_path / "run", "--model", "ln-mlp-3-w16", "--device", device),
            **address,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank, (data, device) in enumerate(arguments)
    ]
    reason = "rank 1 sees data" if differs == "images" else "--device tpu cannot be used here"
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2, output
        assert reason in output
    assert not (tmp_path / "run").exists()
