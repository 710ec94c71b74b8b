"""Where the kernels cannot run, all else works, and they say why they do not."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from elropt import kernels

ROOT = Path(__file__).parents[2]

ASK = """
import torch
import elropt
from elropt import kernels
assert not kernels.available()
assert not kernels.can_use([torch.ones(3)], [torch.ones(3)], [None])
assert not hasattr(kernels, "update")
"""
STEP = """
def step(fused):
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    elropt.ELRSGD([p], lr=0.1, momentum=0.9, fused=fused).step()
    assert not (p == 1).all()

step(None)
try:
    step(True)
except RuntimeError as error:
    print(error)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done


def write_triton(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / "triton" / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / "triton" / name).write_text(text)


def test_the_folder_of_a_checkout_is_no_package_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    for name in ("kernels", "kernels.tables"):
        with pytest.raises(ImportError, match=r"write `from elropt import kernels`.*import elropt before"):
            importlib.import_module(name)
    assert kernels.__name__ == "elropt.kernels"


@pytest.mark.parametrize("theirs", [False, True])
def test_a_package_kernels_of_others_is_left_to_them(theirs: bool, tmp_path: Path) -> None:
    """With elropt imported, the folder of a checkout is not taken for it, as transformers would do."""
    if theirs:
        (tmp_path / "kernels.py").write_text("theirs = True")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code = "import sys; sys.path.remove(''); import elropt; from importlib.util import find_spec"
    found = run(f"{code}; print(find_spec('kernels'))", PYTHONPATH=path).stdout
    assert (str(tmp_path / "kernels.py") in found) if theirs else (found == "None\n")


def test_without_triton() -> None:
    done = run(f"import sys\nsys.modules['triton'] = None{ASK}{STEP}")
    assert "triton is not installed. Use fused=None" in done.stdout
    assert done.stderr == ""


def test_a_triton_that_does_not_load_gives_one_warning(tmp_path: Path) -> None:
    message = "DLL load failed while importing libtriton"
    write_triton(tmp_path, {"__init__.py": f'raise ImportError("{message}")'})
    done = run(ASK + STEP, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert f"triton is installed but does not load (ImportError: {message}). Use fused=None" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("language", "cause"),
    [
        ('raise OSError("libcuda.so.1: no such file")', "OSError: libcuda.so.1: no such file"),
        ("", "ImportError: cannot import name 'knobs'"),  # too old
    ],
    ids=["OSError", "old"],
)
def test_whatever_keeps_triton_from_loading_is_named(
    language: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, the package's module once more: torch itself makes no optimizers where triton has an OSError."""
    write_triton(tmp_path, {"__init__.py": "", "language/__init__.py": language})
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.find_spec("elropt.kernels")
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    with pytest.warns(RuntimeWarning, match="3.6 or newer") as caught:
        spec.loader.exec_module(kernels)
    assert len(caught) == 1
    assert cause in str(caught[0].message)
    assert cause in kernels.why_unavailable()
    assert not kernels.can_use([torch.ones(3)], [torch.ones(3)], [None])
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        del sys.modules[name]  # before the true ones come back


def test_on_rocm_the_kernels_are_not_used_and_say_why() -> None:
    done = run(f"import torch\ntorch.version.hip = '6.4'{ASK}{STEP}")
    assert "NVIDIA GPUs and this torch is built for ROCm 6.4" in done.stdout
    assert "Use fused=None" in done.stdout
    assert done.stderr == ""


def test_rocm_is_refused_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not kernels.can_use([torch.ones(3)], [torch.ones(3)], [None])
