"""The code of README.md and the documentation, in order, as a reader would run it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from elropt.cli import app

ROOT = Path(__file__).parents[1]


def run_page(page: str, folder: Path) -> dict[str, Any]:
    """Run the Python blocks and the `elropt` commands of a page in `folder`, the working directory.

    Python blocks share one namespace, which is returned. A block that begins with a comment `# name.py` is also
    written to that file. Of `sh` blocks, lines that begin with `elropt` are run; "printed" holds what they print.
    """
    namespace: dict[str, Any] = {"__name__": page, "printed": []}
    text = (ROOT / page).read_text(encoding="utf-8")
    for language, code in re.findall(r"^```(python|sh)\n(.*?)^```", text, flags=re.M | re.S):
        if language == "python":
            if name := re.match(r"# (\w+\.py)\n", code):
                (folder / name[1]).write_text(code, encoding="utf-8")
            exec(compile(code, page, "exec"), namespace)
        else:
            for line in code.splitlines():
                if line.startswith("elropt "):
                    result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
                    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
                    namespace["printed"].append(result.output)
    return namespace
