"""Kernels with one thing broken on purpose, in their PTX, which the emulator must notice.

Each names what it must find. A mutation that changes nothing is an error, so that none goes out of date unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import configurations
from .configurations import Configuration
from .driver import Emulator
from .machine import Schedule

ATOMIC = re.compile(r"\batom\.global\.gpu\.\w+\.add\.u32 (%r\d+), \[ (%rd\d+) \+ 0 \], (%r\d+);")


def _configuration(*, unaligned: bool = False) -> Configuration:
    """Layers of two chunks, a part of one, a bit more than one, and one."""
    shapes = [(2, 4096), (3, 7), (5000,), (64, 64)]
    group: dict[str, Any] = {
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "scale_invariant": True,
        "shapes": shapes,
        "dtypes": [torch.float32] * len(shapes),
    }
    return Configuration(
        number=0,
        rule="uniform",
        granularity="layer",
        project=False,
        elr_of=None,
        groups=[group],
        amp=False,
        float32_gradients=False,
        odd=False,
        unaligned=unaligned,
    )


ALIGNED, UNALIGNED = _configuration(), _configuration(unaligned=True)
INTERLEAVED = Schedule(seed=1, quantum=50)


@dataclass(frozen=True)
class Mutant:
    """kernel: which one is changed, and so whether the step is cooperative. finds: a pattern of one of the findings."""

    kernel: str
    mutate: Callable[[str], str]
    finds: str
    why: str
    configuration: Configuration = ALIGNED
    schedule: Schedule = INTERLEAVED
    launched_cooperatively: bool = True

    @property
    def is_cooperative(self) -> bool:
        return self.kernel == "cooperative_kernel"


def replaced(pattern: str, by: str, count: int = 0) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, by, text, count=count)


def counting(order: str) -> Callable[[str], str]:
    """Another memory order for the atomics that count."""
    return replaced(r"\.gpu\.acq_rel\.add", f".gpu.{order}.add")


def without_resets(text: str) -> str:
    """Without the stores to where atomics count."""
    for match in ATOMIC.finditer(text):
        text = re.sub(rf"@%p\d+ st\.global\.b32 \[ {match[2]} \+ 0 \], \{{ %r\d+ \}};", "", text)
    return text


def barriers(text: str) -> list[int]:
    """Where the barriers are in the text."""
    return [match.start() for match in re.finditer(r"bar\.sync\s+0;", text)]


def without_barrier(number: int) -> Callable[[str], str]:
    def mutate(text: str) -> str:
        at = barriers(text)[number]
        return text[:at] + text[text.index(";", at) + 1 :]

    return mutate


def unchanged(text: str) -> str:
    return text


RACE = "race between CTAs"
MUTANTS = {
    "programs-count-without-order": Mutant(
        "measure_kernel",
        counting("relaxed"),
        f"{RACE}, measure_kernel.*partials",
        "the last program of a row reads what others have not published",
    ),
    "programs-count-without-release": Mutant(
        "measure_kernel", counting("acquire"), RACE, "nothing is ever published"
    ),
    "programs-count-without-acquire": Mutant(
        "measure_kernel", counting("release"), RACE, "nobody learns what is published"
    ),
    "gate-is-polled-without-acquire": Mutant(
        "cooperative_kernel",
        replaced(r"\.gpu\.acquire\.", ".gpu.relaxed."),
        f"{RACE}.*controls",
        "programs go on without having learned what was decided",
    ),
    "gate-is-opened-without-release": Mutant(
        "cooperative_kernel", counting("acquire"), RACE, "what was decided is not published"
    ),
    "grid-larger-than-resident": Mutant(
        "cooperative_kernel",
        unchanged,
        "deadlock in cooperative_kernel",
        "those that run wait for those that cannot start",
        schedule=Schedule(seed=1, resident=3),
        launched_cooperatively=False,
    ),
    "cooperative-grid-too-large": Mutant(
        "cooperative_kernel",
        unchanged,
        "a cooperative launch of 6 CTAs, 3 fit",
        "the driver refuses such a launch",
        schedule=Schedule(seed=1, resident=3),
    ),
    "counters-stay": Mutant(
        "measure_kernel",
        without_resets,
        "wrong result",
        "the counters are not taken back to 0, so the next step is never decided",
    ),
    "store-off-by-one": Mutant(
        "update_kernel",
        replaced(r"(st\.global\.b32 \[ %rd\d+) \+ 0 \]", r"\1 + 4 ]"),
        "outside of all tensors",
        "an element is stored one too far, past the end of the last tensor",
    ),
    "load-without-mask": Mutant(
        "update_kernel",
        replaced(r"@%p\d+ (ld\.global\.b32 \{ %r\d+ \})", r"\1"),
        "outside of all tensors",
        "what lies past the end of a tensor is read",
    ),
    "alignment-not-checked": Mutant(
        "update_kernel",
        replaced(r"(and\.b64\s+%rd\d+, %rd\d+), 15;", r"\1, 0;"),
        "not aligned",
        "tensors that begin anywhere are accessed 16 bytes at a time",
        configuration=UNALIGNED,
    ),
    "partials-of-another-program": Mutant(
        "measure_kernel",
        replaced(r"(shl\.b64\s+%rd\d+, %rd\d+), 4;", r"\1, 5;"),
        "outside of all tensors|wrong result|race",
        "partial sums go to twice the place",
    ),
    "wrong-constant": Mutant(
        "measure_kernel",
        replaced("0f3EAAAA78", "0f3EBAAA78"),
        "wrong result",
        "a coefficient of the logarithm is off by 9 %",
    ),
    "sum-left-out": Mutant(
        "update_kernel",
        replaced(r"(fma\.rn\.f32\s+%r\d+, %r\d+, %r\d+), %r\d+;", r"\1, 0f00000000;"),
        "wrong result",
        "the update adds nothing to the weight, nor to the old momentum",
    ),
}


def run(emulator: Emulator, mutant: Mutant, *, steps: int = 3) -> list[str]:
    """What the emulator finds wrong with it.

    Raises:
        ValueError: the mutation changes nothing.
    """
    changed: set[bool] = set()

    def mutate(text: str) -> str:
        if f".entry {mutant.kernel}(" not in text:
            return text
        mutated = mutant.mutate(text)
        changed.add(mutated != text)
        return mutated

    configurations.attach(emulator, cooperative=mutant.is_cooperative)
    if not mutant.launched_cooperatively:
        emulator.cooperative = set()
    capacity, emulator.machine.capacity = emulator.machine.capacity, mutant.schedule.resident or 396
    emulator.mutation = mutate
    try:
        findings = configurations.run(
            emulator, mutant.configuration, schedules=[mutant.schedule], steps=steps
        )
    finally:
        emulator.mutation = None
        emulator.machine.capacity = capacity
    if mutant.mutate is not unchanged and changed != {True}:
        raise ValueError(f"the mutation changes nothing in {mutant.kernel}: its pattern is out of date")
    return findings


def barriers_that_nobody_misses(emulator: Emulator, kernel: str) -> Iterator[str]:
    """Every `bar.sync` of a kernel that can be removed without a finding. (Only barriers order the threads of a CTA, so
    a race within it is found with any schedule.)"""
    run(emulator, Mutant(kernel, unchanged, "", ""), steps=1)
    for number in range(len(barriers(emulator.compiled[kernel]))):
        if not run(emulator, Mutant(kernel, without_barrier(number), "", ""), steps=1):
            before = emulator.compiled[kernel][: barriers(emulator.compiled[kernel])[number]]
            source = re.findall(r"\.loc\s.*//\s*(.*)", before)[-1]
            yield f"barrier {number} of {kernel}, {source}"
