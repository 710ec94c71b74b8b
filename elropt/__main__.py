"""`python -m elropt`: the `elropt` command, wherever its script is not on the PATH."""

from .cli import app

app(prog_name="elropt")
