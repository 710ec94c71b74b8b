"""The jobs of `python -m tests.emulation`, by name. Each gives a list of what it found wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from . import configurations, mutants, scenarios
from .driver import Emulator


def expand(names: Iterable[str]) -> Iterator[str]:
    """two-launches/3-5 stands for three jobs."""
    for name in names:
        match = re.fullmatch(r"(.*/)(\d+)-(\d+)", name)
        if match is None:
            yield name
        else:
            yield from (f"{match[1]}{number}" for number in range(int(match[2]), int(match[3]) + 1))


def run_job(emulator: Emulator, name: str) -> list[str]:
    """
    Raises:
        ValueError: there is no such job.
    """
    match = re.fullmatch(r"(small/)?(two-launches|cooperative)/(\d+)", name)
    if match is not None:
        cooperative = match[2] == "cooperative"
        configurations.attach(emulator, cooperative=cooperative)
        configuration = configurations.draw(
            int(match[3]), cooperative=cooperative, small=match[1] is not None
        )
        findings = configurations.run(emulator, configuration)
        return [f"{finding}\n  {configuration}" for finding in findings]
    if name.startswith("mutant/") and name[7:] in mutants.MUTANTS:
        return mutants.run(emulator, mutants.MUTANTS[name[7:]])
    scenario, _, kind = name.partition("/")
    if scenario in scenarios.SCENARIOS and kind in ("two-launches", "cooperative"):
        configurations.attach(emulator, cooperative=kind == "cooperative")
        return list(scenarios.SCENARIOS[scenario](emulator))
    if name.startswith("barriers/"):
        return list(mutants.barriers_that_nobody_misses(emulator, name[9:]))
    raise ValueError(f"no job is named {name!r}, see python -m tests.emulation --help")
