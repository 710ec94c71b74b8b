"""Every version that elropt supports, one session each: docs/development/compatibility.md holds the outcome.

    pipx run nox                              # all of it; torch downloads gigabytes of CUDA libraries
    pipx run nox -s triton -- -k pairs        # the versions of triton, only some of the tests
    pipx run nox -s "torch(version='2.15')"   # one entry
    pipx run nox -s package -- torch==2.13.0  # wheel, sdist, git and zip in empty environments, with this torch

A Python that is not there is skipped. Each environment is removed when its tests have passed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = False
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.11", "3.12", "3.13"]
TRITONS = ["3.6.0", "3.7.1", "3.8.0", "3.9.0"]
TORCHES = ["2.11", "2.12", "2.13", "2.14", "2.15"]
# The interpreter of triton 3.6 makes scalars of arrays, of which NumPy warns, and which it refuses from 2.4 on.
NUMPY = {"3.6.0": "numpy<2.4"}

# The contract of the backends, parity with torch.optim.SGD, and the kernels.
TESTS = [
    "tests/test_contract.py",
    "tests/test_sgd_parity.py",
    "tests/kernels/test_kernels.py",
    "tests/kernels/test_fused_step.py",
    "tests/kernels/test_availability.py",
    "tests/kernels/test_specializations.py",
]
TOOLS = ["pytest>=8.3", "hypothesis>=6.110", "typer>=0.15", "rich>=13.7", "matplotlib>=3.9"]


# What each extra is for, tried in an environment that has nothing else.
EXTRAS = {
    "": "import elropt, sys; assert 'typer' not in sys.modules and 'matplotlib' not in sys.modules",
    "triton": "import elropt.kernels as k; assert 'triton' not in (k.why_unavailable() or ''), k.why_unavailable()",
    "cli": "import elropt.cli, elropt.plots",
    "tensorboard": "import torch.utils.tensorboard",
}

VERSIONS = """
import sys, torch, triton, numpy
print("python", sys.version.split()[0], *(f"{m.__name__} {m.__version__}" for m in (torch, triton, numpy)))
"""


STEP = """
import sys, torch, elropt
w = torch.nn.Parameter(torch.ones(2, 2))
w.grad = w.detach().clone()
elropt.ELRSGD([w], lr=0.1).step()
print("python", sys.version.split()[0], "torch", torch.__version__, "elropt", elropt.__version__, elropt.__file__)
"""


def run(session: nox.Session, torch: str, numpy: str = "numpy", triton: str | None = None) -> None:
    """Installs these versions and runs the tests. A torch for CUDA wants a triton of its own: another replaces it."""
    session.install("-e", ".[triton]", *TOOLS, torch, numpy)
    if triton is not None:
        session.install("--no-deps", triton)
    session.run("python", "-c", VERSIONS)
    options = session.posargs or ["-m", "not slow"]
    warnings = ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    command = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *warnings, *TESTS, *options]
    session.run(*command, env={"OMP_NUM_THREADS": "1"})
    shutil.rmtree(session.virtualenv.location)


@nox.session(python="3.11")
@nox.parametrize("version", TRITONS)
def triton(session: nox.Session, version: str) -> None:
    """A triton, with the torch that the tests run with otherwise."""
    run(session, "torch==2.13.0", NUMPY.get(version, "numpy"), f"triton=={version}")


@nox.session(python="3.11")
@nox.parametrize("version", TORCHES)
def torch(session: nox.Session, version: str) -> None:
    """A torch, with the triton that it brings along."""
    run(session, f"torch=={version}.*", "numpy<2.4" if version == "2.11" else "numpy")


@nox.session(python=PYTHONS)
def python(session: nox.Session) -> None:
    """A Python, with the newest of everything."""
    run(session, "torch>=2.11")


@nox.session(python=PYTHONS)
@nox.parametrize("source", ["wheel", "sdist", "git", "zip"])
def package(session: nox.Session, source: str) -> None:
    """What users install, with each extra in an empty environment (sdist, git and zip: without extras)."""
    folder = Path(session.create_tmp()).resolve()
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(folder), ".", silent=True)
    session.run("git", "archive", "--format=zip", f"--output={folder}/main.zip", "HEAD", external=True)
    address = {
        "wheel": f"elropt{{}} @ {next(folder.glob('*.whl')).as_uri()}",
        "sdist": f"elropt{{}} @ {next(folder.glob('*.tar.gz')).as_uri()}",
        "git": f"git+{Path.cwd().as_uri()}",  # a name in front takes addresses with a host only
        "zip": f"elropt{{}} @ {(folder / 'main.zip').as_uri()}",
    }[source]
    for extra, code in EXTRAS.items():
        if extra and source != "wheel":
            continue
        environment = folder / f"env-{extra}"
        session.run("python", "-m", "venv", "--clear", str(environment))
        python = str(environment / "bin" / "python")
        wanted = address.format(f"[{extra}]" if extra else "")
        session.run(python, "-m", "pip", "install", "--quiet", *session.posargs, wanted, external=True)
        with session.chdir(folder):  # not where the checkout would be imported
            session.run(python, "-W", "error", "-c", code, external=True)
            session.run(python, "-c", STEP, external=True)
            if extra == "cli":
                session.run(python, "-m", "elropt", "--version", external=True)
                session.run(str(environment / "bin" / "elropt"), "simulate", "--e0", "10,1", external=True)
        shutil.rmtree(environment)
    shutil.rmtree(session.virtualenv.location)
