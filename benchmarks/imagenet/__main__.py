"""ResNet-50 and ViT-S/16 on ImageNet, or any net of `models.build` on any tree of images.

    python -m benchmarks.imagenet DATA --model resnet-50 --optimizer warmup --out runs/imagenet-r50
    torchrun --nproc-per-node 8 -m benchmarks.imagenet DATA --model resnet-50 --optimizer warmup --out runs/imagenet-r50

A run that was stopped, in whatever way, goes on from its last checkpoint when the same command is given again. On the
CPU, with one or two processes, its losses and weights are then bit for bit those of a run that was not stopped.

A damaged or incomplete folder of a run is refused and left as it is; so is a second run at the same time, until the
first one ends or is killed (`lock`), and processes that do not see the same images, arguments, code and checkpoint. A
run that has left a result is not run again.

In the folder of a run, which all processes need to see: `checkpoint.pt`; at the end `result.json`; and `log.jsonl` with
two kinds of rows, each with `epoch` and `step`, the number of steps done:
- "steps": since the last such row, loss (the mean), images_per_second, data_wait (share of the time in which the first
  process waited for images) and seconds; lr is that of the first param group, the tracked weights if there are any;
- "epoch": top1 and top5 of val/, and the spread (max / min) and log_std of E = ‖g‖/‖w‖ and of the applied ELR over the
  tracked weights at the last step.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.imagenet.data import load_tree
from benchmarks.imagenet.recipe import OPTIMIZERS, make_settings
from benchmarks.imagenet.training import Pace, train
from benchmarks.imagenet.world import Refused, join_world


def main(
    data: Annotated[Path, typer.Argument(help="A tree with a folder per class in train/ and in val/.")],
    model: Annotated[
        str, typer.Option(help="resnet-50, vit-s-16, or any net of benchmarks/common/models.py.")
    ] = "resnet-50",
    optimizer: Annotated[
        str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}; adamw for ViTs only.")
    ] = "warmup",
    lr: Annotated[
        float | None,
        typer.Option(
            help="At the whole batch; angle, sphere: of the tracked weights. Default: the recipe's."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's, 90.")] = None,
    warmup_epochs: Annotated[
        float | None,
        typer.Option(
            help="Linear warm-up. Default: the recipe's share of the epochs; 0 for the rule warmup."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of all processes together. Default: the recipe's.")
    ] = None,
    image_size: Annotated[int, typer.Option(min=1)] = 224,
    hold_out: Annotated[
        float, typer.Option(help="Judge by this share of train/, and not by val/: to choose a learning rate.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Of each process, for reading images. Default: its share of the cores."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    amp: Annotated[
        bool | None, typer.Option(help="bfloat16 autocast. Default: on a GPU.", show_default=False)
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the net.")] = False,
    log_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 50,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps; and after each epoch.")] = 1000,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/imagenet-MODEL-OPTIMIZER.")
    ] = None,
) -> None:
    """Train a net on ImageNet; a run that was stopped goes on when the same command is given again.

    Example: torchrun --nproc-per-node 8 -m benchmarks.imagenet DATA --model resnet-50 --optimizer warmup

    Elropt's rules act on scale-invariant weights: all but the head of ResNet-50, and only the queries and keys of ViTs,
    which therefore have QK-norm here.
    """
    try:
        with join_world(device) as world:
            torch.backends.cudnn.benchmark = world.device.type == "cuda"
            with warnings.catch_warnings():
                if world.rank > 0:
                    warnings.simplefilter("ignore")  # the first process warns for all
                tree = world.together(lambda: load_tree(data, hold_out))
            settings = world.together(
                lambda: make_settings(
                    tree,
                    model=model,
                    optimizer=optimizer,
                    lr=lr,
                    epochs=epochs,
                    warmup_epochs=warmup_epochs,
                    batch_size=batch_size,
                    image_size=image_size,
                    hold_out=hold_out,
                    seed=seed,
                    amp=world.device.type == "cuda" if amp is None else amp,
                    compile=compile,
                    device=world.device.type,
                    ranks=world.ranks,
                )
            )
            if workers is None:
                workers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            folder = out or Path("runs") / f"imagenet-{model}-{optimizer}"
            train(settings, tree, folder, world, Pace(workers, log_every, checkpoint_every), Console())
    except Refused as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
