"""The option `--device` of the speed benchmarks."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

DeviceOption = Annotated[str, typer.Option(help="cuda, cuda:1 … or cpu.")]


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device; --device cpu measures CPU time alone")
