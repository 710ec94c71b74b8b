"""Finds the kernels: a checkout has them beside this folder, an installed elropt inside it."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

HERE = Path(__file__).resolve().parent
BESIDE = HERE.parent / "kernels" / "__init__.py"


class KernelsOfCheckout:
    """Finds elropt.kernels. It comes before the finder of an editable install, which may belong to another checkout."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(name, BESIDE) if name == f"{__package__}.kernels" else None


if BESIDE.exists() and not (HERE / "kernels" / "__init__.py").exists():
    sys.meta_path.insert(0, KernelsOfCheckout)
