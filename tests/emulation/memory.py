"""The memories of the emulated GPU. Global memory is this process's own, so that tensors on the CPU are in it."""

from __future__ import annotations

import ctypes

import numpy as np

from .arithmetic import Array

# What memory holds that nobody has written: a NaN that no computation gives.
UNWRITTEN = 0x7FA5DEAD
_LOWEST, _BEYOND = 1 << 16, 1 << 47  # of addresses of a process; an array cannot begin at address 0


def _everything() -> dict[int, Array]:
    """All memory of this process, as arrays of 1, 2, 4 and 8 bytes. A read where no memory is ends the process."""
    data = np.ctypeslib.as_array((ctypes.c_uint8 * (_BEYOND - _LOWEST)).from_address(_LOWEST))
    return {size: data.view(f"u{size}") for size in (1, 2, 4, 8)}


_MEMORY = _everything()


class Fault(Exception):
    """An error that stops a GPU too: an address outside of all tensors or not aligned, a deadlock."""


class GlobalMemory:
    """The tensors that a launch may touch, by name."""

    def __init__(self) -> None:
        self.names: list[tuple[int, int, str]] = []  # start, end, name
        self._starts = self._ends = np.zeros(0, np.int64)
        self._merged = True

    def clear(self) -> None:
        self.__init__()

    def add(self, name: str, address: int, n_bytes: int) -> None:
        if n_bytes > 0:
            self.names.append((address, address + n_bytes, name))
            self._merged = False

    def is_outside(self, addresses: Array, size: int) -> Array:
        """Which accesses of `size` bytes are not within one tensor (or several that overlap)."""
        if not self._merged:
            intervals: list[list[int]] = []
            for start, end, _ in sorted(self.names):
                if intervals and start < intervals[-1][1]:
                    intervals[-1][1] = max(end, intervals[-1][1])
                else:
                    intervals.append([start, end])
            self._starts, self._ends = np.array(intervals, np.int64).T.copy()
            self._merged = True
        if len(self._starts) == 0:
            return np.ones(len(addresses), np.bool_)
        index = np.searchsorted(self._starts, addresses, side="right") - 1
        return (index < 0) | (addresses + size > self._ends[index])

    def describe(self, address: int) -> str:
        """The tensor and the byte in it, or the tensor that ends or begins nearest."""
        for start, end, name in self.names:
            if start <= address < end:
                return f"{name} byte {address - start}"
        near = [
            (address - end, f"{address - end} bytes past the end of {name}") for _, end, name in self.names
        ]
        near += [(start - address, f"{start - address} bytes before {name}") for start, _, name in self.names]
        return min((x for x in near if x[0] >= 0), default=(0, f"{address:#x}"))[1]

    @staticmethod
    def read(addresses: Array, size: int) -> Array:
        return _MEMORY[size][(addresses - _LOWEST) // size]

    @staticmethod
    def write(addresses: Array, size: int, values: Array) -> None:
        _MEMORY[size][(addresses - _LOWEST) // size] = values


class SharedMemory:
    """The shared memory of one CTA, and for every byte who touched it last, between which barriers.

    Only barriers order accesses here. Threads may store the same value to the same place, as Triton's reductions do.
    """

    SEVERAL = -2

    def __init__(self, size: int) -> None:
        self.size = size
        padded = -(-size // 8) * 8
        self.data = np.zeros(padded, np.uint8)
        self.views = {n: self.data.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.is_written = np.zeros(padded, np.bool_)
        self.writer, self.reader = np.full((2, padded), -1, np.int32)
        self.write_phase, self.read_phase = np.full((2, padded), -1, np.int32)

    def is_outside(self, addresses: Array, size: int) -> Array:
        return (addresses < 0) | (addresses + size > self.size)

    def read(self, addresses: Array, size: int, threads: Array, phase: int) -> tuple[Array, str | None]:
        """The values, and what is wrong about reading them now."""
        at = addresses[:, None] + np.arange(size)
        by = np.broadcast_to(threads[:, None], at.shape)
        fault = None
        if not self.is_written[at].all():
            fault = "unwritten shared memory is read"
        if ((self.write_phase[at] == phase) & (self.writer[at] != by)).any():
            fault = (
                "race in shared memory: another thread has written what is read, with no barrier in between"
            )
        other = (self.read_phase[at] == phase) & (self.reader[at] != by)
        self.reader[at] = np.where(other, self.SEVERAL, by)
        self.reader[at[self.reader[at] != by]] = self.SEVERAL  # several threads of this instruction
        self.read_phase[at] = phase
        return self.views[size][addresses // size], fault

    def write(self, addresses: Array, size: int, values: Array, threads: Array, phase: int) -> str | None:
        """What is wrong about writing them now."""
        at = addresses[:, None] + np.arange(size)
        by = np.broadcast_to(threads[:, None], at.shape)
        view, fault = self.views[size], None
        if ((self.read_phase[at] == phase) & (self.reader[at] != by)).any():
            fault = "race in shared memory: another thread has read what is overwritten, with no barrier in between"
        written = ((self.write_phase[at] == phase) & (self.writer[at] != by)).any(axis=1)
        if written.any() and (view[addresses // size] != values)[written].any():
            fault = "race in shared memory: two threads write different values, with no barrier in between"
        view[addresses // size] = values
        if (view[addresses // size] != values).any():
            fault = "race in shared memory: threads write different values to one place"
        self.writer[at], self.write_phase[at], self.is_written[at] = by, phase, True
        return fault
