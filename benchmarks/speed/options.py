"""Options that the speed benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer

from benchmarks.common.command_line import one_of
from benchmarks.speed.workloads import WORKLOADS

DeviceOption = Annotated[str, typer.Option(help="cuda, cuda:1 … or cpu.")]


def workload_option(default: Sequence[str]) -> Any:
    """`--workload`, a list of names; None stands for `default`."""
    names, otherwise = ", ".join(WORKLOADS), ", ".join(default)
    return typer.Option(callback=one_of(WORKLOADS), help=f"Repeatable; of {names}. Default: {otherwise}.")


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device; --device cpu measures CPU time alone")
