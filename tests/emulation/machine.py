"""Executes a launch: CTAs of threads that run at the same time, interleaved at random.

The threads of a CTA move together, or each warp of 32 on its own (`Schedule.by_warp`). Which moves next, and for how
many instructions, is drawn from the schedule's seed. What is wrong becomes a report; what cannot go on is a `Fault`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import Array
from .memory import UNWRITTEN, Fault, GlobalMemory, SharedMemory
from .ptx import (
    PARAMETER_STRIDE,
    Address,
    Arithmetic,
    Atomic,
    Barrier,
    Branch,
    Exit,
    Instruction,
    Load,
    MatrixLoad,
    Program,
    Store,
)
from .races import ATOMIC, ATOMIC_READ, KINDS, READ, WRITE, Access, Event, History

WARP = 32
# A deadlock: all threads poll, and each has seen the same value so many times in a row.
PATIENCE = 10
# The share of turns in which a thread moves even if it would poll in vain.
RESTLESSNESS = 0.02
MOST_INSTRUCTIONS = 20_000_000


@dataclass(frozen=True)
class Schedule:
    """seed: of what is drawn. by_warp: whether warps move on their own. quantum: the most instructions in a row.
    resident: how many CTAs run at the same time (None: all if the launch is cooperative, else drawn)."""

    seed: int = 0
    by_warp: bool = False
    quantum: int = 200
    resident: int | None = None


@dataclass
class Group:
    """Threads that share arrays of registers."""

    threads: Array
    registers: list[Array]


@dataclass(eq=False)
class Strand:
    """Threads of a group that are at the same instruction. mask: which of the group, None: all.

    polled: the address and the value that its last atomic left as it was; polls: how often in a row.
    """

    group: Group
    position: int = 0
    mask: Array | None = None
    polled: tuple[int, int] | None = None
    polls: int = 0

    def would_poll_in_vain(self, values: dict[int, int]) -> bool:
        """values: what is known of memory already, by address."""
        if self.polled is None:
            return False
        address, value = self.polled
        if address not in values:
            values[address] = int(GlobalMemory.read(np.array([address]), 4)[0])
        return values[address] == value

    def saw(self, address: int, old: int, new: int) -> None:
        """An atomic, which may have been a poll."""
        self.polls = self.polls + 1 if self.polled == (address, new) else 1
        self.polled = (address, new) if new == old else None


class Cta:
    """One block of threads (a Triton program)."""

    def __init__(self, launch: Launch, number: int) -> None:
        self.launch, self.number, program = launch, number, launch.program
        self.shared = SharedMemory(launch.shared_bytes)
        size = WARP if launch.machine.schedule.by_warp else program.threads
        self.running = []
        for first in range(0, program.threads, size):
            threads = np.arange(first, first + size)
            registers = list(launch.registers)
            values = {
                "%tid.x": threads,
                "%ctaid.x": number,
                "%nctaid.x": launch.grid,
                "%ntid.x": program.threads,
            }
            for name, slot in program.special.items():
                registers[slot] = np.full(size, values.get(name, 0), np.uint32)
            self.running.append(Strand(Group(threads, registers)))
        self.waiting: list[Strand] = []
        self.some_have_ended = False
        self.phase = 0  # barriers passed
        self.accesses = 0  # since the last of them
        launch.history.start(number, 0)

    @property
    def is_finished(self) -> bool:
        return not self.running

    def run(self, strand: Strand, budget: int) -> None:
        """Up to `budget` instructions; fewer if the strand waits, ends, splits or has done an atomic."""
        code = self.launch.program.code
        registers = strand.group.registers
        left = budget
        while left > 0:
            left -= 1
            instruction = code[strand.position]
            mask = strand.mask
            if instruction.guard is not None:
                chosen = registers[instruction.guard]
                chosen = ~chosen if instruction.negated else chosen
                mask = chosen if mask is None else mask & chosen
            if type(instruction) is Arithmetic:
                if instruction.by_warp and mask is not None:
                    self.check_warps(mask, instruction)
                values = instruction.function(
                    *[registers[slot].view(dtype) for slot, dtype in instruction.arguments]
                )
                if len(instruction.results) == 1:
                    values = (values,)
                for slot, value in zip(instruction.results, values, strict=True):
                    if slot is not None:
                        bits = value.view(registers[slot].dtype)
                        registers[slot] = bits if mask is None else np.where(mask, bits, registers[slot])
                strand.position += 1
            elif EXECUTE[type(instruction)](self, strand, instruction, mask):
                break
        self.launch.machine.instructions += budget - left

    # Memory. Each returns whether the strand pauses.

    def addresses(self, strand: Strand, address: Address, mask: Array | None) -> tuple[Array, Array]:
        """The threads (as indices into their group) that take part, and the address of each."""
        lanes = np.arange(len(strand.group.threads)) if mask is None else np.flatnonzero(mask)
        base = strand.group.registers[address.slot][lanes]
        return lanes, base.astype(np.int64) + address.offset

    def load(self, strand: Strand, instruction: Load, mask: Array | None) -> bool:
        strand.position += 1
        lanes, addresses = self.addresses(strand, instruction.address, mask)
        if len(lanes) == 0:
            return False
        size, n = instruction.size, len(instruction.results)
        self.check(instruction, instruction.space, strand.group.threads[lanes], addresses, size * n)
        if instruction.space == "global":
            self.log(instruction, strand, lanes, addresses, size * n, READ)
        for i, slot in enumerate(instruction.results):
            at = addresses + i * size
            if instruction.space == "global":
                values = GlobalMemory.read(at, size)
                if size == 4 and (values == UNWRITTEN).any():
                    place = self.launch.machine.memory.describe(int(at[values == UNWRITTEN][0]))
                    self.report("unwritten memory is read", instruction, place)
            elif instruction.space == "param":
                values = self.launch.parameters.view(f"u{size}")[at // size]
            else:
                values = self.load_shared(instruction, strand, lanes, at, size)
            self.set(strand, slot, lanes, values)
        return False

    def load_shared(
        self, instruction: Instruction, strand: Strand, lanes: Array, addresses: Array, size: int
    ) -> Array:
        values, fault = self.shared.read(addresses, size, strand.group.threads[lanes], self.phase)
        if fault is not None:
            self.report(fault, instruction)
        return values

    def store(self, strand: Strand, instruction: Store, mask: Array | None) -> bool:
        strand.position += 1
        lanes, addresses = self.addresses(strand, instruction.address, mask)
        if len(lanes) == 0:
            return False
        size, n = instruction.size, len(instruction.values)
        threads = strand.group.threads[lanes]
        self.check(instruction, instruction.space, threads, addresses, size * n)
        if instruction.space == "global":
            self.log(instruction, strand, lanes, addresses, size * n, WRITE)
            strand.polled = None
        for i, slot in enumerate(instruction.values):
            values, at = strand.group.registers[slot][lanes], addresses + i * size
            if instruction.space == "global":
                GlobalMemory.write(at, size, values)
            elif fault := self.shared.write(at, size, values, threads, self.phase):
                self.report(fault, instruction)
        return False

    def load_matrix(self, strand: Strand, instruction: MatrixLoad, mask: Array | None) -> bool:
        strand.position += 1
        if mask is not None:
            self.check_warps(mask, instruction)
        lanes, rows = self.addresses(strand, instruction.address, mask)
        self.check(instruction, "shared", strand.group.threads[lanes], rows, 16)
        of_warp = np.arange(WARP)
        for i, slot in enumerate(instruction.results):
            rows_of_warps = rows.reshape(-1, WARP)[:, 8 * i + of_warp // 4] + 4 * (of_warp % 4)
            values = self.load_shared(instruction, strand, lanes, rows_of_warps.ravel(), 4)
            self.set(strand, slot, lanes, values)
        return False

    def atomic(self, strand: Strand, instruction: Atomic, mask: Array | None) -> bool:
        strand.position += 1
        lanes, addresses = self.addresses(strand, instruction.address, mask)
        self.check(instruction, "global", strand.group.threads[lanes], addresses, instruction.size)
        launch, size = self.launch, instruction.size
        for i in range(len(lanes)):
            lane, address = lanes[i : i + 1], addresses[i : i + 1]
            old = new = int(GlobalMemory.read(address, size)[0])
            if instruction.operation is None:
                self.log(instruction, strand, lane, address, size, ATOMIC_READ)
            else:
                self.log(instruction, strand, lane, address, size, ATOMIC)
                arguments = [int(strand.group.registers[slot][lane[0]]) for slot in instruction.arguments]
                new = instruction.operation(old, *arguments) & ((1 << 8 * size) - 1)
                GlobalMemory.write(address, size, np.array([new], f"u{size}"))
            if instruction.result is not None:
                self.set(strand, instruction.result, lane, np.array([old], f"u{size}"))
            thread = int(strand.group.threads[lane[0]])
            launch.history.synchronize(
                instruction.order, self.number, self.phase, thread, self.accesses, int(address[0])
            )
            strand.saw(int(address[0]), old, new)
        return True

    def set(self, strand: Strand, slot: int, lanes: Array, values: Array) -> None:
        """Registers are never changed in place: many slots may share an array."""
        old = strand.group.registers[slot]
        if len(lanes) == len(old) and old.dtype == values.dtype:
            strand.group.registers[slot] = values
        else:
            strand.group.registers[slot] = old.copy()
            strand.group.registers[slot][lanes] = values

    def check(
        self, instruction: Instruction, space: str, threads: Array, addresses: Array, size: int
    ) -> None:
        """
        Raises:
            Fault: an address that is not a multiple of the size of the access, or outside of what there is.
        """
        memory = self.launch.machine.memory
        if (addresses % size).any():
            bad, what = addresses % size != 0, f"an access of {size} bytes is not aligned"
        elif space == "global":
            bad, what = (
                memory.is_outside(addresses, size),
                f"an access of {size} bytes is outside of all tensors",
            )
        elif space == "shared":
            bad = self.shared.is_outside(addresses, size)
            what = f"an access of {size} bytes is outside of the {self.shared.size} of shared memory"
        else:
            bad = addresses + size > self.launch.parameters.nbytes
            what = "an access is outside of the parameters"
        if bad.any():
            address = int(addresses[bad][0])
            place = memory.describe(address) if space == "global" else f"byte {address}"
            raise Fault(
                f"{what}: {self.describe(instruction)}, CTA {self.number}, threads {threads[bad][:4]}…, {place}"
            )

    def log(
        self, instruction: Instruction, strand: Strand, lanes: Array, addresses: Array, size: int, kind: int
    ) -> None:
        self.accesses += 1
        position = strand.position - 1
        threads = strand.group.threads[lanes]
        self.launch.history.accesses.append(
            Access(self.number, self.phase, self.accesses, threads, addresses, size, kind, position)
        )

    # Control

    def branch(self, strand: Strand, instruction: Branch, mask: Array | None) -> bool:
        target = self.launch.program.targets[instruction.label]
        if instruction.guard is None:
            strand.position = target
            return False
        here = np.ones(len(strand.group.threads), np.bool_) if strand.mask is None else strand.mask
        assert mask is not None
        if (mask == here).all():
            strand.position = target
        elif not mask.any():
            strand.position += 1
        else:
            strand.mask, strand.position = here & ~mask, strand.position + 1
            self.running.append(Strand(strand.group, target, mask))
            return True
        return False

    def barrier(self, strand: Strand, instruction: Barrier, mask: Array | None) -> bool:
        strand.position += 1
        self.running.remove(strand)
        self.waiting.append(strand)
        self.pass_barrier()
        return True

    def exit(self, strand: Strand, instruction: Exit, mask: Array | None) -> bool:
        self.running.remove(strand)
        self.some_have_ended = True
        self.pass_barrier()
        return True

    def pass_barrier(self) -> None:
        """Called when all threads have arrived."""
        if self.running or not self.waiting:
            return
        barrier = self.launch.program.code[self.waiting[0].position - 1]
        if self.some_have_ended:
            self.report("threads end while others wait at a barrier", barrier)
        if len({strand.position for strand in self.waiting}) > 1:
            self.report("threads meet at different barriers", barrier)
        together: dict[tuple[int, int], Strand] = {}
        for strand in self.waiting:
            first = together.setdefault((id(strand.group), strand.position), strand)
            if first is not strand:
                assert first.mask is not None
                assert strand.mask is not None
                joined = first.mask | strand.mask
                first.mask = None if joined.all() else joined
        self.running, self.waiting = list(together.values()), []
        self.phase += 1
        self.accesses = 0
        self.launch.history.start(self.number, self.phase)

    def check_warps(self, mask: Array, instruction: Instruction) -> None:
        """
        Raises:
            Fault: an instruction for whole warps is met by a part of one.
        """
        warps = mask.reshape(-1, WARP)
        if (warps.any(axis=1) != warps.all(axis=1)).any():
            raise Fault(f"only a part of a warp is there: {self.describe(instruction)}")

    def describe(self, instruction: Instruction) -> str:
        return f"{self.launch.program.name} {instruction.source} `{instruction.text}`"

    def report(self, what: str, instruction: Instruction, place: str = "") -> None:
        self.launch.machine.reports[f"{what}: {self.describe(instruction)} {place}".strip()] += 1


EXECUTE = {
    Load: Cta.load,
    Store: Cta.store,
    MatrixLoad: Cta.load_matrix,
    Atomic: Cta.atomic,
    Branch: Cta.branch,
    Barrier: Cta.barrier,
    Exit: Cta.exit,
}


@dataclass
class Launch:
    """What the CTAs of a launch share. parameters: the bytes of all, each at a multiple of PARAMETER_STRIDE."""

    machine: Machine
    program: Program
    grid: int
    shared_bytes: int
    parameters: Array
    registers: list[Array]
    history: History = field(default_factory=History)


@dataclass
class Machine:
    """A GPU on which at most `capacity` CTAs run at the same time."""

    memory: GlobalMemory = field(default_factory=GlobalMemory)
    schedule: Schedule = field(default_factory=Schedule)
    capacity: int = 396
    reports: Counter[str] = field(default_factory=Counter)
    instructions: int = 0

    def launch(
        self,
        program: Program,
        grid: int,
        shared_bytes: int = 0,
        parameters: Sequence[bytes] = (),
        *,
        cooperative: bool = False,
    ) -> None:
        """Run all CTAs to their end, then look for races.

        Raises:
            Fault: it cannot go on; also where a cooperative launch does not fit the GPU.
        """
        random_ = random.Random(self.schedule.seed)
        if cooperative and grid > self.capacity:
            raise Fault(f"{program.name}: a cooperative launch of {grid} CTAs, {self.capacity} fit the GPU")
        resident = self.schedule.resident or (grid if cooperative else random_.choice([1, 2, 3, 8, grid]))
        resident = min(resident, self.capacity)
        width = program.threads if not self.schedule.by_warp else WARP
        padded = b"".join(parameter.ljust(PARAMETER_STRIDE, b"\0") for parameter in parameters)
        launch = Launch(
            self,
            program,
            grid,
            shared_bytes,
            np.frombuffer(padded, np.uint8),
            program.registers(width),
        )
        waiting = list(range(grid))
        random_.shuffle(waiting)
        resident_ctas: list[Cta] = []
        last = self.instructions + MOST_INSTRUCTIONS
        with np.errstate(all="ignore"):
            while waiting or resident_ctas:
                while waiting and len(resident_ctas) < resident:
                    resident_ctas.append(Cta(launch, waiting.pop()))
                cta, strand = self.choose(launch, resident_ctas, random_)
                cta.run(strand, random_.randint(1, self.schedule.quantum))
                if cta.is_finished:
                    resident_ctas.remove(cta)
                if self.instructions > last:
                    raise Fault(f"{program.name}: no end after {MOST_INSTRUCTIONS:,} instructions")
        self.report_races(launch)

    def choose(self, launch: Launch, ctas: Sequence[Cta], random_: random.Random) -> tuple[Cta, Strand]:
        """Any strand, but rarely one that polls what has not changed since its last poll.

        Raises:
            Fault: all of them have polled it again and again.
        """
        is_restless = random_.random() < RESTLESSNESS
        values: dict[int, int] = {}
        for _ in range(4):  # mostly one of the first draws will do
            cta = random_.choice(ctas)
            strand = random_.choice(cta.running)
            if is_restless or not strand.would_poll_in_vain(values):
                return cta, strand
        all_ = [(cta, strand) for cta in ctas for strand in cta.running]
        awake = [pair for pair in all_ if not pair[1].would_poll_in_vain(values)]
        if not awake and all(strand.polls >= PATIENCE for _, strand in all_):
            raise Fault(
                f"deadlock in {launch.program.name}: all {len(ctas)} CTAs that fit the GPU poll memory that nobody "
                f"changes, {launch.grid} were launched"
            )
        return random_.choice(awake or all_)

    def report_races(self, launch: Launch) -> None:
        def describe(event: Event) -> str:
            instruction = launch.program.code[event.position]
            return f"{KINDS[event.kind]} {instruction.source} `{instruction.text}`"

        for first, second, address in launch.history.races():
            where = "within a CTA" if first.cta == second.cta else "between CTAs"
            name = self.memory.describe(address).split(" byte")[0]
            self.reports[
                f"race {where}, {launch.program.name}: {describe(first)} and {describe(second)} on {name}"
            ] += 1
