"""Which accesses to global memory are ordered, and which of them race.

Time within a CTA: *phase* counts the barriers that it has passed, *number* its accesses since the last one. Two
accesses are ordered if one happens before the other:

- the same thread made it earlier, or the same CTA did in an earlier phase (`bar.sync` orders all threads of the CTA);
- or it is *known* to the thread of the other one. A release on an atomic publishes what its thread knows and has done,
  and what its CTA did in earlier phases; an acquire on the same location learns what has been published there; a
  barrier tells all threads of a CTA what one of them knows. A relaxed atomic neither publishes nor learns, but does not
  end a chain: it leaves at the location what others have published. (PTX ISA, chapter 8, "Memory Consistency Model".)

Two accesses by different threads that touch the same byte, at least one of which writes, race if they are not ordered,
unless both are atomic. Without a race every run is one of interleaved instructions, which is what `machine.py` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .arithmetic import Array

# CTA → (phase, {thread: number}): all that it did before this phase, and in it what these threads did up to a number.
Knowledge = dict[int, tuple[int, dict[int, int]]]

READ, WRITE, ATOMIC, ATOMIC_READ = range(4)
KINDS = ("read", "write", "atomic", "atomic read")


def conflict(a: int, b: int) -> bool:
    """Whether two accesses of these kinds must be ordered."""
    writes = {WRITE, ATOMIC} & {a, b}
    return bool(writes) and not {a, b} <= {ATOMIC, ATOMIC_READ}


def join(a: Knowledge, b: Knowledge) -> Knowledge:
    """What either of them says."""
    if a is b:
        return a
    joined = dict(a)
    for cta, (phase, numbers) in b.items():
        known_phase, known = joined.get(cta, (-1, {}))
        if known_phase < phase:
            joined[cta] = phase, numbers
        elif known_phase == phase and known is not numbers:
            threads = known.keys() | numbers.keys()
            joined[cta] = phase, {t: max(known.get(t, -1), numbers.get(t, -1)) for t in threads}
    return joined


@dataclass
class Context:
    """What the threads of a CTA know during a phase: all of them from its start, and what some learn at an access."""

    common: Knowledge
    learned: dict[int, list[tuple[int, Knowledge]]] = field(default_factory=dict)

    def of(self, thread: int, number: int) -> Knowledge:
        """What a thread knows at its access of this number."""
        known = self.common
        for since, knowledge in self.learned.get(thread, ()):
            if since <= number:
                known = knowledge
        return known

    def latest(self, thread: int) -> Knowledge:
        return self.learned[thread][-1][1] if thread in self.learned else self.common

    def after_barrier(self) -> Context:
        common = self.common
        for moments in self.learned.values():
            common = join(common, moments[-1][1])
        return Context(common)


class Access(NamedTuple):
    """One instruction's accesses: an address for each thread; position: of the instruction in the program."""

    cta: int
    phase: int
    number: int
    threads: Array
    addresses: Array
    size: int
    kind: int
    position: int


class Event(NamedTuple):
    """One thread's access."""

    cta: int
    phase: int
    kind: int
    thread: int
    number: int
    position: int


class Race(NamedTuple):
    first: Event
    second: Event
    address: int


def _read_then_written(columns: Array, starts: Array) -> Array:
    """The places, most of those of parameters, that one CTA reads and, in a later phase, one of its threads writes."""
    _, cta, phase, kind, thread = columns[:5]
    is_read, beyond = kind == READ, np.iinfo(np.int64).max
    least, most = np.minimum.reduceat, np.maximum.reduceat
    by_one_cta = least(cta, starts) == most(cta, starts)
    by_one_thread = least(np.where(is_read, beyond, thread), starts) == most(
        np.where(is_read, -1, thread), starts
    )
    later = most(np.where(is_read, phase, -1), starts) < least(np.where(is_read, beyond, phase), starts)
    return by_one_cta & by_one_thread & later


class History:
    """The accesses of a launch, and what everybody knew when they were made."""

    def __init__(self) -> None:
        self.accesses: list[Access] = []
        self.contexts: dict[tuple[int, int], Context] = {}
        self.published: dict[int, Knowledge] = {}  # by address

    def start(self, cta: int, phase: int) -> None:
        before = self.contexts.get((cta, phase - 1))
        self.contexts[cta, phase] = Context({}) if before is None else before.after_barrier()

    def synchronize(self, order: str, cta: int, phase: int, thread: int, number: int, address: int) -> None:
        """An atomic of one of `ptx.ORDERS`, at a moment at which it takes effect."""
        context = self.contexts[cta, phase]
        known = context.latest(thread)
        published = self.published.get(address, {})
        if order in ("acquire", "acq_rel"):
            known = join(known, published)
            context.learned.setdefault(thread, []).append((number, known))
        if order in ("release", "acq_rel"):
            own: Knowledge = {cta: (phase, {thread: number})}
            self.published[address] = join(join(published, known), own)

    def happens_before(self, first: Event, second: Event) -> bool:
        if first.cta == second.cta:
            if first.thread == second.thread:
                return (first.phase, first.number) < (second.phase, second.number)
            if first.phase < second.phase:
                return True
        knowledge = self.contexts[second.cta, second.phase].of(second.thread, second.number)
        phase, numbers = knowledge.get(first.cta, (-1, {}))
        return first.phase < phase or (first.phase == phase and first.number <= numbers.get(first.thread, -1))

    def races(self) -> Iterator[Race]:
        """At most one for each pair of phases of CTAs and each place."""
        if not self.accesses:
            return
        columns, grain = self._events_by_place()
        places, who = columns[0], columns[1] << 16 | columns[4]
        starts = np.flatnonzero(np.r_[True, places[1:] != places[:-1]])
        ends = np.r_[starts[1:], len(places)]
        several = np.minimum.reduceat(who, starts) != np.maximum.reduceat(who, starts)
        has = [np.maximum.reduceat((columns[3] == kind).astype(np.int8), starts) > 0 for kind in range(3)]
        suspicious = several & (has[WRITE] | (has[ATOMIC] & has[READ])) & ~_read_then_written(columns, starts)
        seen: set[bytes] = set()
        for start, end in zip(starts[suspicious], ends[suspicious], strict=True):
            events = np.unique(columns[1:, start:end], axis=1)
            signature = events.tobytes()
            if signature not in seen:  # the other bytes of a word have the same events
                seen.add(signature)
                for first, second in self._races_among(events):
                    yield Race(first, second, int(places[start]) * grain)

    def _events_by_place(self) -> tuple[Array, int]:
        """Rows (place, then those of `Event`), a column for each thread and place, by place; the bytes of a place."""
        grain = min(4, *(access.size for access in self.accesses), 4)
        columns = []
        for access in self.accesses:
            n = access.size // grain
            places = (access.addresses[:, None] // grain + np.arange(n)).ravel()
            block = np.empty((7, len(places)), np.int64)
            block[0], block[4] = places, np.repeat(access.threads, n)
            for row, value in zip(
                (1, 2, 3, 5, 6),
                (access.cta, access.phase, access.kind, access.number, access.position),
                strict=True,
            ):
                block[row] = value
            columns.append(block)
        joined = np.concatenate(columns, axis=1)
        return joined[:, np.argsort(joined[0], kind="stable")], grain

    def _races_among(self, events: Array) -> Iterator[tuple[Event, Event]]:
        """Between events at one place, rows as in `Event`, in order of CTA, phase and kind. Whole phases are compared
        first: mostly all that one CTA did in a phase is known to another."""
        changes = np.flatnonzero((events[:3, 1:] != events[:3, :-1]).any(axis=0)) + 1
        groups = [
            [Event(*event) for event in block.T.tolist()] for block in np.split(events, changes, axis=1)
        ]
        for i, some in enumerate(groups):
            for j, others in enumerate(groups[i:], i):
                if not conflict(some[0].kind, others[0].kind):
                    continue
                if i != j and (self._precedes(some[0], others[0]) or self._precedes(others[0], some[0])):
                    continue
                race = self._first_race(some, others)
                if race is not None:
                    yield race

    def _precedes(self, first: Event, second: Event) -> bool:
        """Whether all that a CTA did in a phase happens before all that another did in one, as far as barriers tell."""
        if first.cta == second.cta:
            return first.phase < second.phase
        return first.phase < self.contexts[second.cta, second.phase].common.get(first.cta, (-1, {}))[0]

    def _first_race(self, some: list[Event], others: list[Event]) -> tuple[Event, Event] | None:
        for x in some:
            for y in others:
                same = (x.cta, x.thread) == (y.cta, y.thread)
                if not same and not self.happens_before(x, y) and not self.happens_before(y, x):
                    return x, y
        return None
