"""PTX text → `Program`: a list of instructions that `machine.py` executes.

A register is a *slot* in a list of arrays, one element per thread. Constants have slots too, so that every operand is a
slot. What arithmetic opcodes mean is in `arithmetic.py`; the others (memory, atomics, barriers, branches) are here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import DTYPES, OPERATIONS, Array, bits_of

# Where the parameters of a kernel lie in its parameter memory: far enough apart for any type.
PARAMETER_STRIDE = 16
SPECIAL_REGISTERS = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%ntid.x")
ORDERS = ("relaxed", "acquire", "release", "acq_rel")
SPACES = ("global", "shared", "param")


class UnknownPTX(NotImplementedError):
    """The emulator does not know an opcode or an operand: the message names it, and where to add it."""


class Address(NamedTuple):
    slot: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """text, source: as in the PTX, and the line of the kernel that it came from. guard: the slot of the predicate that
    says which threads take part (None: all), or, if `negated`, which do not."""

    text: str
    source: str
    guard: int | None
    negated: bool


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Instruction):
    """arguments: (slot, type to view its bits as); results: slots, None for one that is thrown away."""

    function: Callable[..., Array | tuple[Array, ...]]
    arguments: tuple[tuple[int, np.dtype], ...]
    results: tuple[int | None, ...]
    by_warp: bool


@dataclass(frozen=True, kw_only=True)
class Load(Instruction):
    space: str
    address: Address
    size: int  # bytes of each value
    results: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Store(Instruction):
    space: str
    address: Address
    size: int
    values: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MatrixLoad(Instruction):
    """ldmatrix: 8 threads of a warp name rows of 16 bytes for each result; thread t gets 4 bytes of row t // 4."""

    address: Address
    results: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Atomic(Instruction):
    """order: one of ORDERS. operation: what is stored, from what was there and the arguments; None for a load."""

    order: str
    operation: Callable[..., int] | None
    address: Address
    size: int
    arguments: tuple[int, ...]
    result: int | None


@dataclass(frozen=True, kw_only=True)
class Barrier(Instruction):
    pass


@dataclass(frozen=True, kw_only=True)
class Branch(Instruction):
    label: str


@dataclass(frozen=True, kw_only=True)
class Exit(Instruction):
    pass


ATOMIC_OPERATIONS: dict[str, Callable[..., int]] = {
    "add": lambda old, x: old + x,
    "exch": lambda old, x: x,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "cas": lambda old, expected, new: new if old == expected else old,
}


@dataclass
class Program:
    """A kernel. dtypes: of all slots. constants: the bits of those that are constant. special: register → slot.
    parameters: the PTX types, in order."""

    name: str
    threads: int
    parameters: dict[str, str]
    dtypes: list[np.dtype] = field(default_factory=list)
    constants: dict[int, int] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    targets: dict[str, int] = field(default_factory=dict)

    def registers(self, n_threads: int) -> list[Array]:
        """Values of all slots at the start: garbage, except for constants."""
        garbage = {
            dtype: np.frombuffer(b"\xa5" * dtype.itemsize * n_threads, dtype) for dtype in set(self.dtypes)
        }
        garbage[DTYPES["pred"]] = np.zeros(n_threads, np.bool_)
        return [
            np.full(n_threads, self.constants[slot], dtype) if slot in self.constants else garbage[dtype]
            for slot, dtype in enumerate(self.dtypes)
        ]


def parse(text: str) -> Program:
    """The one kernel of a PTX module.

    Raises:
        UnknownPTX: it uses something that the emulator does not know.
    """
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{(.*?)\n\}", text, re.DOTALL)
    if entry is None:
        raise UnknownPTX("no `.visible .entry NAME( … ) { … }` in the module, see tests/emulation/ptx.py")
    name, parameters, directives, body = entry.groups()
    threads = re.search(r"\.(?:req|max)ntid (\d+)", directives)
    if threads is None:
        raise UnknownPTX(f"{name} has no .reqntid, see tests/emulation/ptx.py")
    named = re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+_param_\d+)", parameters)
    program = Program(name, int(threads[1]), {parameter: type_ for type_, parameter in named})
    _Translator(program).translate(body)
    return program


class _Translator:
    """Fills a program, statement by statement."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.slots: dict[object, int] = {}
        self.register_dtypes: dict[str, np.dtype] = {}
        self.common: dict[str, Any] = {}  # of the instruction at hand: the fields of `Instruction`

    def translate(self, body: str) -> None:
        source = ""
        for line in body.splitlines():
            if match := re.match(r"\s*\.loc\s.*//\s*(.*)$", line):
                source = match[1]
            line = line.split("//")[0].strip()
            if match := re.match(r"\.reg\s+\.(\w+)\s+%(\w+)<\d+>;", line):
                self.register_dtypes[match[2]] = DTYPES[match[1]]
            elif match := re.fullmatch(r"([\w$]+):", line):
                self.program.targets[match[1]] = len(self.program.code)
            elif line and not line.startswith("."):
                for statement in filter(None, map(str.strip, line.split(";"))):
                    self.program.code.append(self.instruction(statement, source))

    def instruction(self, text: str, source: str) -> Instruction:
        guarded = re.match(r"@(!?)(%\w+)\s+(.*)$", text)
        negated, predicate, rest = guarded.groups() if guarded else ("", None, text)
        opcode, _, operands = rest.partition("\t") if "\t" in rest else rest.partition(" ")
        opcode = opcode.strip().replace("shared::cta", "shared")  # the two mean the same
        self.common = {
            "text": re.sub(r"\s+", " ", text),
            "source": source,
            "guard": None if predicate is None else self.slot(predicate),
            "negated": negated == "!",
        }
        listed = (
            [operand.strip() for operand in re.split(r",(?![^{]*\})", operands)] if operands.strip() else []
        )
        kind = opcode.split(".")[0]
        translate = {
            "ld": self.load,
            "st": self.store,
            "ldmatrix": self.matrix_load,
            "atom": self.atomic,
            "red": self.atomic,
            "bar": self.barrier,
            "bra": self.branch,
            "ret": self.exit,
        }.get(kind, self.arithmetic)
        return translate(opcode, listed)

    def unknown(self, opcode: str, file: str = "ptx.py") -> UnknownPTX:
        return UnknownPTX(
            f"the emulator does not know {opcode!r} (in `{self.common['text']}`, {self.program.name}, "
            f"{self.common['source']}): add it to tests/emulation/{file}"
        )

    # Operands

    def new_slot(self, key: object, dtype: np.dtype) -> int:
        if key not in self.slots:
            self.slots[key] = len(self.program.dtypes)
            self.program.dtypes.append(dtype)
        return self.slots[key]

    def slot(self, operand: str, type_: str = "b32") -> int:
        """The slot of a register, or of a constant in the given type."""
        if operand in SPECIAL_REGISTERS:
            self.program.special[operand] = self.new_slot(operand, DTYPES["u32"])
            return self.program.special[operand]
        register = re.fullmatch(r"%([a-z]+)\d+", operand)
        if register and register[1] in self.register_dtypes:
            return self.new_slot(operand, self.register_dtypes[register[1]])
        value = self.constant(operand)
        dtype = np.dtype(f"u{DTYPES[type_].itemsize}")
        if type_ == "pred":
            dtype = DTYPES["pred"]
        value &= (1 << 8 * dtype.itemsize) - 1
        slot = self.new_slot((dtype, value), dtype)
        self.program.constants[slot] = value
        return slot

    def constant(self, operand: str) -> int:
        """The bits of a number, or the address of a parameter or of shared memory, which begins at 0."""
        if match := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", operand):
            return int(match[1], 16)
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
            return int(operand, 0)
        if match := re.fullmatch(r"global_smem(?:\+(\d+))?", operand):
            return int(match[1] or 0)
        if operand in self.program.parameters:
            return list(self.program.parameters).index(operand) * PARAMETER_STRIDE
        raise self.unknown(f"the operand {operand}")

    def address(self, operand: str, space: str) -> Address:
        inside = operand.strip("[] ")
        match = re.fullmatch(r"(\S+?)\s*\+\s*(-?\d+)", inside)
        base, offset = (match[1], int(match[2])) if match else (inside, 0)
        return Address(self.slot(base, "b32" if space == "shared" else "b64"), offset)

    @staticmethod
    def several(operand: str) -> list[str]:
        """The members of `{a, b}`, or the one operand."""
        return [member.strip() for member in operand.strip("{} ").split(",")]

    # Opcodes

    def arithmetic(self, opcode: str, operands: list[str]) -> Instruction:
        if opcode.startswith("mov.") and len(operands) == 2:
            if operands[0].startswith("{"):
                opcode += " unpack"
            elif operands[1].startswith("{"):
                opcode += " pack"
        operation = OPERATIONS.get(opcode)
        if operation is None:
            raise self.unknown(opcode, "arithmetic.py")
        results = self.several(operands[0]) if "{" in operands[0] else operands[0].split("|")
        arguments = [member for operand in operands[1:] for member in self.several(operand)]
        if (len(results), len(arguments)) != (len(operation.results), len(operation.arguments)):
            raise self.unknown(
                f"{opcode} with {len(results)} results and {len(arguments)} arguments", "arithmetic.py"
            )
        return Arithmetic(
            **self.common,
            function=operation.function,
            arguments=tuple(
                (self.slot(operand, type_), DTYPES[type_])
                for operand, type_ in zip(arguments, operation.arguments, strict=True)
            ),
            results=tuple(None if result == "_" else self.slot(result) for result in results),
            by_warp=operation.by_warp,
        )

    def memory(self, opcode: str, allowed: set[str]) -> tuple[str, int, int]:
        """Space, number of values and bytes of each of `ld.SPACE[.cg][.vN].TYPE`."""
        _, space, *modifiers, type_ = opcode.split(".")
        number = 1
        for modifier in modifiers:
            if re.fullmatch(r"v[248]", modifier):
                number = int(modifier[1:])
            elif modifier not in allowed:
                raise self.unknown(opcode)
        if space not in SPACES or type_ not in DTYPES:
            raise self.unknown(opcode)
        return space, number, bits_of(type_) // 8

    def load(self, opcode: str, operands: list[str]) -> Instruction:
        if ".gpu." in opcode:
            return self.atomic_load(opcode, operands)
        # .ca and .cg say in which cache it may be found: without a race the value is the same
        space, number, size = self.memory(opcode, {"ca", "cg"})
        results = self.several(operands[0])
        if len(results) != number:
            raise self.unknown(f"{opcode} of {len(results)} values")
        return Load(
            **self.common,
            space=space,
            address=self.address(operands[1], space),
            size=size,
            results=tuple(map(self.slot, results)),
        )

    def atomic_load(self, opcode: str, operands: list[str]) -> Instruction:
        """ld.global.gpu.ORDER.TYPE: what Triton makes of an atomic that adds 0."""
        match = re.fullmatch(r"ld\.global\.gpu\.(relaxed|acquire)\.(b32|b64)", opcode)
        if match is None:
            raise self.unknown(opcode)
        return Atomic(
            **self.common,
            order=match[1],
            operation=None,
            address=self.address(operands[1], "global"),
            size=bits_of(match[2]) // 8,
            arguments=(),
            result=self.slot(operands[0]),
        )

    def store(self, opcode: str, operands: list[str]) -> Instruction:
        space, number, size = self.memory(opcode, set())
        values = self.several(operands[1])
        if len(values) != number:
            raise self.unknown(f"{opcode} of {len(values)} values")
        return Store(
            **self.common,
            space=space,
            address=self.address(operands[0], space),
            size=size,
            values=tuple(self.slot(value, f"b{8 * size}") for value in values),
        )

    def matrix_load(self, opcode: str, operands: list[str]) -> Instruction:
        results = self.several(operands[0])
        if opcode != f"ldmatrix.sync.aligned.m8n8.x{len(results)}.shared.b16":
            raise self.unknown(opcode)
        return MatrixLoad(
            **self.common,
            address=self.address(operands[1], "shared"),
            results=tuple(map(self.slot, results)),
        )

    def atomic(self, opcode: str, operands: list[str]) -> Instruction:
        """atom.global.gpu.ORDER.OPERATION.TYPE; red is the same without a result."""
        kind, *modifiers, operation, type_ = opcode.split(".")
        orders = [order for order in ORDERS if order in modifiers]
        known = set(modifiers) - set(orders) <= {"global", "gpu", "sys"} and len(orders) <= 1
        if (
            not known
            or "global" not in modifiers
            or operation not in ATOMIC_OPERATIONS
            or type_[0] not in "bu"
        ):
            raise self.unknown(opcode)
        result, *rest = operands if kind == "atom" else [None, *operands]
        assert rest[0] is not None
        return Atomic(
            **self.common,
            order=orders[0] if orders else "relaxed",
            operation=ATOMIC_OPERATIONS[operation],
            address=self.address(rest[0], "global"),
            size=bits_of(type_) // 8,
            arguments=tuple(self.slot(str(argument), type_) for argument in rest[1:]),
            result=None if result in (None, "_") else self.slot(result),
        )

    def barrier(self, opcode: str, operands: list[str]) -> Instruction:
        if opcode != "bar.sync" or operands != ["0"] or self.common["guard"] is not None:
            raise self.unknown(opcode)
        return Barrier(**self.common)

    def branch(self, opcode: str, operands: list[str]) -> Instruction:
        if opcode not in ("bra", "bra.uni"):
            raise self.unknown(opcode)
        return Branch(**self.common, label=operands[0])

    def exit(self, opcode: str, operands: list[str]) -> Instruction:
        if opcode != "ret" or self.common["guard"] is not None:
            raise self.unknown(opcode)
        return Exit(**self.common)
