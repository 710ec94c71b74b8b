"""A training loop that may be killed at any moment: started again, it ends with the same bits as without the kill.

It trains a small conv net on scikit-learn's digits (`pip install "elropt[benchmarks]"`), in about 20 seconds on a CPU:

    python examples/resumable.py --rule angle --tracked-lr 0.01 --out runs/example

The same command goes on from the last checkpoint; `curve.jsonl` in that folder has one line per step. On a GPU the same
bits need `torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import json
import os
import random
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import elropt
from elropt.rules import RULES


def conv_net() -> nn.Sequential:
    """Images [n, 1, 8, 8] → logits [n, 10]. Only the head is not in front of a normalization."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10))


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] from 0 to 1, and labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()


def augment(images: Tensor, numbers: np.random.Generator) -> Tensor:
    """Shift a batch by up to one pixel and erase a square of it, with the generators of Python and NumPy."""
    images = images.roll((random.randint(-1, 1), random.randint(-1, 1)), dims=(2, 3))
    top, left = numbers.integers(0, 7, size=2)
    images[:, :, top : top + 2, left : left + 2] = 0
    return images


def random_states(numbers: np.random.Generator) -> dict[str, Any]:
    """The states of all generators that training draws from, of types that `torch.load(weights_only=True)` reads."""
    return {
        "python": random.getstate(),
        "numpy": numbers.bit_generator.state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_states(states: dict[str, Any], numbers: np.random.Generator) -> None:
    random.setstate(states["python"])
    numbers.bit_generator.state = states["numpy"]
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint. Killed at any moment, also by a power failure, it leaves a whole one: this or the last."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` has written. torch.load alone would not notice damaged tensors: it ignores the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the two readers raise anything
        damaged = error
    raise typer.BadParameter(f"{path} is damaged ({damaged}): put back a copy, or delete it to start anew")


def main(
    out: Annotated[Path, typer.Option(help="Folder of curve.jsonl and checkpoint.pt.")] = Path(
        "runs/example"
    ),
    rule: Annotated[str, typer.Option(help=f"{', '.join(filter(None, RULES))}.")] = "warmup",
    lr: Annotated[float, typer.Option(min=0)] = 0.1,
    tracked_lr: Annotated[
        float | None, typer.Option(help="lr of the tracked layers, in the unit of the rule. Default: --lr.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 25,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
) -> None:
    """Train a conv net on digits, or go on from the last checkpoint of a killed run.

    Example: python examples/resumable.py --rule angle --tracked-lr 0.01 --out runs/example
    """
    settings = {"rule": rule, "lr": lr, "tracked_lr": tracked_lr, "epochs": epochs, "batch_size": batch_size}
    settings |= {"save_every": save_every, "seed": seed}
    random.seed(seed)
    torch.manual_seed(seed)
    numbers = np.random.default_rng(seed)
    shuffling = torch.Generator().manual_seed(seed)

    images, labels = (t.to(device) for t in digits())
    batches = len(images) // batch_size
    model = conv_net().to(device)
    groups = elropt.param_groups(model, images[:batch_size], weight_decay=5e-4, tracked_lr=tracked_lr)
    optimizer = elropt.ELRSGD(groups, lr=lr, momentum=0.9, rule=rule)
    schedule = CosineAnnealingLR(optimizer, epochs * batches)

    out.mkdir(parents=True, exist_ok=True)
    path = out / "checkpoint.pt"
    first_epoch, first_batch, curve_bytes = 0, 0, 0
    if path.exists():
        checkpoint = load(path)
        if checkpoint["settings"] != settings:
            raise typer.BadParameter(f"{path} is of {checkpoint['settings']}: use these, or another --out")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        schedule.load_state_dict(checkpoint["schedule"])
        set_random_states(checkpoint["random"], numbers)
        shuffling.set_state(checkpoint["shuffling"])
        first_epoch, first_batch = checkpoint["epoch"], checkpoint["batch"]
        curve_bytes = checkpoint["curve_bytes"]

    with (out / "curve.jsonl").open("ab") as curve:
        if curve.tell() < curve_bytes:
            raise typer.BadParameter(f"{curve.name} has lost lines: delete it and {path} to start anew")
        curve.truncate(curve_bytes)  # steps after the checkpoint are taken again
        for epoch in range(first_epoch, epochs):
            shuffling_then = shuffling.get_state()
            order = torch.randperm(len(images), generator=shuffling).to(device)
            for batch in range(first_batch, batches):
                chosen = order[batch * batch_size : (batch + 1) * batch_size]
                loss = F.cross_entropy(model(augment(images[chosen], numbers)), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step = epoch * batches + batch + 1
                spread = elropt.layer_stats(optimizer).elr_spread
                line = {"step": step, "loss": loss.item(), "lr": schedule.get_last_lr()[0], "spread": spread}
                schedule.step()
                curve.write(json.dumps(line).encode() + b"\n")
                curve.flush()
                if step % save_every == 0 or step == epochs * batches:
                    os.fsync(curve.fileno())
                    checkpoint = {
                        "settings": settings,
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "random": random_states(numbers),
                        "shuffling": shuffling_then,
                        "epoch": epoch,
                        "batch": batch + 1,
                        "curve_bytes": curve.tell(),
                    }
                    save(checkpoint, path)
            first_batch = 0
    print(f"{epochs * batches} steps are in {curve.name}")


if __name__ == "__main__":
    typer.run(main)
