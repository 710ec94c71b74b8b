"""Finds the kernels: a checkout has them beside this folder, an installed elropt inside it.

In the folder of a checkout, Python would also find them under the name `kernels`, which belongs to another package.
transformers looks for that one and imports what it finds, so the folder is hidden from it.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
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
    found = find_spec("kernels")
    if found is not None and found.origin == str(BESIDE):
        sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's mark for "there is none"
