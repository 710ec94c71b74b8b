"""Versions, hardware and commit, for beside a result; no host name, user name or path."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from . import __version__, kernels

__all__ = ["collect"]


def collect() -> dict[str, object]:
    """Describe this machine and installation, ready for `json.dump`.

    Returns a dict with the keys:

    - date: now, ISO 8601 in UTC;
    - elropt, python, torch, numpy, triton: versions; None if triton is not installed;
    - os, cpu, cpu_count, torch_threads;
    - cuda: the version that torch was built for, or None;
    - gpus: name, capability and memory_gib of each; empty without CUDA;
    - driver: version of the GPUs' driver, or None;
    - backends: name → whether it can run here;
    - git_commit, git_dirty: the commit of the working directory, and whether tracked files in it were changed; None
      outside a checkout.
    """
    cuda = torch.cuda.is_available()
    commit = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "elropt": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "triton": _triton_version(),
        "os": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "driver": _driver() if cuda else None,
        "backends": {"reference": True, "foreach": True, "triton": _triton_runs("cuda" if cuda else "cpu")},
        "git_commit": commit,
        "git_dirty": None if commit is None else bool(changes),
    }


def _triton_version() -> str | None:
    if not kernels.available():
        return None
    import triton

    return triton.__version__


def _triton_runs(device: str) -> bool:
    tensor = torch.empty(1, device=device)
    return kernels.can_use([tensor], [tensor], [None])


def _gpu(index: int) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _driver() -> str | None:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def _cpu_name() -> str:
    """The processor's name from Linux or macOS, or else from Python."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints; None if it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
