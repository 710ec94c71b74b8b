"""elropt.env_report: versions, hardware and commit, and nothing private."""

import json
import os
import platform
import re
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from elropt import env_report


def test_it_names_no_host_user_or_path() -> None:
    values = json.dumps(list(env_report.collect().values()))
    host = socket.gethostname()
    assert not re.search(rf"\b{re.escape(host)}\b", values) or host in platform.platform()
    assert str(Path.home()) not in values
    assert os.getcwd() not in values


def git(*args: str) -> str:
    options = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *options, *args], check=True, capture_output=True, text=True).stdout.strip()


def test_it_names_the_commit_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = env_report.collect()
    assert (found["git_commit"], found["git_dirty"]) == (None, None)

    git("init", "-q")
    Path("file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one", "--no-verify")
    found = env_report.collect()
    assert (found["git_commit"], found["git_dirty"]) == (git("rev-parse", "HEAD"), False)

    Path("untracked").write_text("1")
    assert env_report.collect()["git_dirty"] is False
    Path("file").write_text("2")
    assert env_report.collect()["git_dirty"] is True


def test_it_describes_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "Some GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(env_report, "_triton_runs", lambda device: device == "cuda")
    monkeypatch.setattr(
        env_report, "_output", lambda *command: "1.2\n1.2" if command[0] == "nvidia-smi" else None
    )
    found = env_report.collect()
    assert found["gpus"] == [{"name": "Some GPU", "capability": "9.0", "memory_gib": 80.0}] * 2
    assert found["driver"] == "1.2"
    assert found["backends"] == {"reference": True, "foreach": True, "triton": True}
    assert found["git_commit"] is None
