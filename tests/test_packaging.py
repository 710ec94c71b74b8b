"""The wheel, built from the sdist, installed into an empty environment."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, **kwargs: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files, as a zip or a clone without symbolic links has them."""
    folder = tmp_path_factory.mktemp("source") / "elropt-main"
    files = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, files):
        assert not (ROOT / name).is_symlink(), name
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    assert len(list(out.glob("*.tar.gz"))) == 1
    return next(out.glob("*.whl"))


def test_contents(wheel: Path) -> None:
    """Every module, and nothing else: no stub that stands for the kernels in a checkout."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {
        "elropt/py.typed",
        *(f"elropt/report_page.{suffix}" for suffix in ("css", "html", "js")),
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "elropt").rglob("*.py")),
        *(f"elropt/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")),
    }


def test_a_checkout_needs_no_installation_and_uses_its_own_kernels(source: Path, tmp_path: Path) -> None:
    """Where these tests run, another checkout is installed."""
    code = """
import sys, elropt, elropt.kernels.tables
print(elropt.__file__, elropt.kernels.__file__, elropt.kernels.tables.__file__, sep="\\n")
assert sys.modules.get("kernels") is None  # absent, or hidden
"""
    files = run(sys.executable, "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(source)})
    names = ("elropt/__init__.py", "kernels/__init__.py", "kernels/tables.py")
    assert [Path(line).resolve() for line in files.splitlines()] == [(source / n).resolve() for n in names]


def test_install_and_import(wheel: Path, tmp_path: Path) -> None:
    """Only torch and NumPy are there, by a path of their own: neither triton nor any extra, nor this checkout."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    code = f"""
import importlib.util, sys
for path in {sorted({str(Path(m.__file__).parents[1]) for m in (torch, np)})!r}:
    sys.path.append(path)
for name in ("triton", "typer", "rich", "matplotlib", "scipy", "sklearn", "tensorboard"):
    sys.modules[name] = None  # as if only torch and NumPy were installed there
import elropt, elropt.kernels, elropt.inspection, elropt.run_history
assert "env" in elropt.__file__, elropt.__file__
assert importlib.util.find_spec("kernels") is None
w = elropt.optimizer.torch.nn.Parameter(elropt.optimizer.torch.ones(2, 2))
w.grad = w.detach().clone()
elropt.ELRSGD([w], lr=0.1).step()
print(elropt.__version__)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    version = run(python, "-c", code, cwd=tmp_path, env=environment).strip()
    assert version == "0.2.0"
    assert f"-{version}-" in wheel.name
