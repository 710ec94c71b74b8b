"""Tables that tell one launch where all of its tensors are: built on the host, read by the kernels.

A *segment* is a run of elements that are adjacent in memory and share one row of results or factors: a whole
tensor, or one index of its dimension 0. Segments are cut into chunks of `CHUNK` elements (the last one may be
shorter) and each program of a launch takes one chunk. Tensors are walked in memory order, so that any dense
strides do, as long as a parameter, its gradient and its momentum buffer agree on them.
"""
# Triton's language looks like Python, but type checkers cannot follow it.
# pyright: reportArgumentType=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .args import Tables

CHUNK = 4096  # elements per program: a power of two, at least 8, so that full chunks keep 16-byte alignment
NUM_WARPS = 8

# Set at import, when `triton.jit` decides whether kernels are interpreted; interpreted ones need CPU tensors.
DEVICE_TYPE = "cpu" if knobs.runtime.interpret else "cuda"

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Row = tuple[int, int] | None


class Layout(NamedTuple):
    """Everything that the kernels need to know about a tensor: hashable, and without a reference to it."""

    pointer: int
    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    oddity: str | None = None  # what it is, if not a plain strided tensor


class Triple(NamedTuple):
    """The layouts of a parameter, its gradient and its momentum buffer (None without momentum)."""

    w: Layout
    g: Layout
    m: Layout | None


@dataclass(frozen=True)
class Table:
    """What one launch covers. The segments that have a row come first.

    addresses: int64 [n_segments, 3], of w, g and m (0 without a buffer).
    segments: int64 [n_segments, 4] with the columns 0 elements, 1 first chunk, 2 row (-1 for none), 3 param group.
    chunk_segment: int32 [n_chunks], the segment that each chunk belongs to.
    owner, shifts: on the host: the tensor that each segment belongs to, and where in it it begins, int64
        [n_segments] and, in bytes of w, g and m, [n_segments, 3].
    n_measured: chunks at the front that belong to rows.
    elements, measured: of all segments, and of those that have a row.
    pointers: on the host, int64 [n_tensors, 3], where w, g and m were when the table was made (0 without a buffer).
    constexprs: the element types W, G and M and the CHUNK of the launch.
    """

    addresses: Tensor
    segments: Tensor
    chunk_segment: Tensor
    owner: np.ndarray
    shifts: np.ndarray
    pointers: np.ndarray
    n_measured: int
    elements: int
    measured: int
    constexprs: dict[str, tl.dtype | int]

    @property
    def n_chunks(self) -> int:
        return self.chunk_segment.shape[0]

    def addresses_of(self, pointers: np.ndarray) -> np.ndarray:
        """What `addresses` has to hold for the pointers [n_tensors, 3] of w, g and m; 0 stays 0."""
        return _addresses(pointers, self.owner, self.shifts)

    @property
    def arguments(self) -> Tables:
        return Tables(self.addresses, self.segments, self.chunk_segment)

    @property
    def options(self) -> dict[str, Any]:
        """What every launch over this table has in common. Products and sums are fused by `tl.fma` alone: bits must not
        depend on which factors are given, nor on which kernel adds up a norm."""
        return {**self.constexprs, "num_warps": NUM_WARPS, "enable_fp_fusion": False}


@triton.jit
def load_chunk(
    tables,
    W: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What this program works on: pointers to its first element in w, g and m; the number of elements from there
    to the end of the segment; whether it is a full chunk on 16-byte boundaries; the segment's row, group, first chunk
    and number of chunks; the address of its buffer (0 if it has none, or no elements).

    Bytes: 60 per chunk. Offsets are int64.
    """
    chunk = tl.program_id(0)
    index = tl.load(tables.chunk_segment + chunk).to(tl.int64)
    w_address = tl.load(tables.addresses + index * 3)
    g_address = tl.load(tables.addresses + index * 3 + 1)
    elements = tl.load(tables.segments + index * 4)
    m_address = tl.where(elements > 0, tl.load(tables.addresses + index * 3 + 2), 0)
    first = tl.load(tables.segments + index * 4 + 1).to(tl.int32)
    row = tl.load(tables.segments + index * 4 + 2).to(tl.int32)
    group = tl.load(tables.segments + index * 4 + 3).to(tl.int32)
    offset = (chunk - first).to(tl.int64) * CHUNK
    left = elements - offset
    full = (((w_address | g_address | m_address) & 15) == 0) & (left >= CHUNK)
    w = w_address.to(tl.pointer_type(W)) + offset
    g = g_address.to(tl.pointer_type(G)) + offset
    m = m_address.to(tl.pointer_type(M)) + offset
    n_chunks = tl.maximum(tl.cdiv(elements, CHUNK), 1).to(tl.int32)
    return w, g, m, left, full, row, group, first, n_chunks, m_address


@triton.jit
def only_if(flag, mask):
    """The mask if the scalar flag is set, else nothing of it.

    `mask & flag` compiles to the same. But the interpreter gives a flag that it broadcasts the type of what was
    compared, and takes (since triton 3.9) nothing but bools for a mask.
    """
    return mask & tl.where(flag, True, False)


@triton.jit
def of_group(group, values):
    """The hyper-parameter of a param group, or of a block of groups.

    values: a tuple with an entry per group (floats, or pointers to one float), or a pointer to float32 values by group.
    """
    if isinstance(values, tl.tensor):
        value = tl.load(values + group)
    else:
        value = _as_float32(values[0])
        for i in tl.static_range(1, len(values)):
            value = tl.where(group == i, _as_float32(values[i]), value)
    return value


@triton.jit
def _as_float32(value):
    scalar = value  # the interpreter makes a tensor of a float when it is assigned
    if scalar.dtype.is_ptr():
        scalar = tl.load(scalar)
    return scalar.to(tl.float32)


def layout(t: Tensor) -> Layout:
    oddity = None
    if type(t) not in (Tensor, torch.nn.Parameter):
        oddity = f"a {type(t).__name__}"
    elif t.layout != torch.strided:
        oddity = f"a {t.layout} tensor"
    elif t.is_neg():
        oddity = "a lazily negated view"
    if oddity is not None:
        return Layout(0, t.dtype, t.device, tuple(t.shape), (), oddity)
    return Layout(t.data_ptr(), t.dtype, t.device, tuple(t.shape), t.stride())


def triples_of(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_buffers: Sequence[Tensor | None]
) -> tuple[Triple, ...]:
    """The layouts of all tensors, three by three.

    Raises:
        ValueError: the lists differ in length.
    """
    return tuple(
        Triple(layout(w), layout(g), None if m is None else layout(m))
        for w, g, m in zip(params, grads, momentum_buffers, strict=True)
    )


def memory_order(t: Layout) -> tuple[int, ...] | None:
    """The strides of the dimensions with more than one index; None if elements overlap or leave gaps."""
    if 0 in t.shape:
        return ()
    dims = [(stride, size) for stride, size in zip(t.stride, t.shape, strict=True) if size > 1]
    expected = 1
    for stride, size in sorted(dims):
        if stride != expected:
            return None
        expected *= size
    return tuple(stride for stride, _ in dims)


def why_not(triple: Triple, device: torch.device) -> str | None:
    """Why a launch on `device` cannot take these tensors, or None if it can."""
    w = triple.w
    for name, t in zip(("parameter", "gradient", "momentum buffer"), triple, strict=True):
        if t is None:
            continue
        if t.oddity is not None:
            return f"its {name} is {t.oddity}, not a plain strided tensor"
        if t.device.type != DEVICE_TYPE:
            return f"its {name} is on {t.device}, the kernels run on {DEVICE_TYPE}"
        if t.device != device:
            return f"its {name} is on {t.device}, the first parameter on {device}"
        dtypes = tuple(TRITON_DTYPES) if name == "parameter" else (w.dtype, torch.float32)
        if t.dtype not in dtypes:
            return f"its {name} has dtype {t.dtype}, allowed are {sorted({str(dtype) for dtype in dtypes})}"
        if t.shape != w.shape:
            return f"its {name} has shape {t.shape}, the parameter {w.shape}"
        if memory_order(t) is None:
            return f"its {name} is not dense: shape {t.shape}, strides {t.stride}"
        if memory_order(t) != memory_order(w):
            return f"its {name} has strides {t.stride}, the parameter {w.stride}"
    return None


def why_not_rows(w: Layout, row: Row, n_rows: int) -> str | None:
    """Why this tensor cannot have these rows of `n_rows`, or None if it can."""
    if row is None:
        return None
    first, count = row
    size = w.shape[0] if w.shape else 1
    if count not in (1, size):
        return f"it is given {count} rows, allowed are 1 or, by its dimension 0, {size}"
    if first < 0 or first + count > n_rows:
        return f"its rows {first} to {first + count - 1} are not among the {n_rows} that there are"
    if count > 1 and _is_interleaved(w):
        return f"a row per index of dimension 0 needs it outermost in memory, but the strides are {w.stride}"
    return None


def all_supported(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor | None],
    *,
    per_filter: bool,
) -> bool:
    """`can_use`, where triton is installed."""
    triples = triples_of(params, grads, momentum_buffers)
    return all(
        why_not(triple, triples[0].w.device) is None and not (per_filter and _is_interleaved(triple.w))
        for triple in triples
    )


def _is_interleaved(w: Layout) -> bool:
    """Whether indices of dimension 0 are not contiguous blocks of memory, one after the other."""
    return (
        len(w.shape) > 0
        and w.shape[0] > 1
        and 0 not in w.shape
        and w.stride[0] * w.shape[0] != math.prod(w.shape)
    )


def tables_for(triples: tuple[Triple, ...], *, rows: Sequence[Row], n_rows: int) -> tuple[Table, ...]:
    """The tables of a call, one for each combination of dtypes that occurs.

    They are cached, and uploaded without waiting, on the current stream, when a pointer, a shape or anything else
    that they hold is new. The cache is bounded and keeps no parameter alive.

    Args:
        triples: as from `triples_of`; at least one.
        rows: (first row, number of rows) of each tensor: one row for the tensor as a whole or one for each
            index of its dimension 0. None: no row.
        n_rows: the number of rows there are.

    Raises:
        ValueError: the kernels cannot take a tensor, or its rows do not fit.
        RuntimeError: a table would have to be uploaded while a CUDA graph is being captured.
    """
    stream = 0
    if DEVICE_TYPE == "cuda" and triples[0].w.device.type == "cuda":
        stream = torch.cuda.current_stream(triples[0].w.device).cuda_stream
    return _cached_tables(triples, tuple(rows), n_rows, CHUNK, stream)


@functools.lru_cache(maxsize=32)
def _cached_tables(
    triples: tuple[Triple, ...],
    rows: tuple[Row, ...],
    n_rows: int,
    chunk: int,
    stream: int,  # only a key: a table is sure to have arrived only on the stream that uploads it
) -> tuple[Table, ...]:
    for i, (triple, row) in enumerate(zip(triples, rows, strict=True)):
        reason = why_not(triple, triples[0].w.device) or why_not_rows(triple.w, row, n_rows)
        if reason is not None:
            raise ValueError(f"tensor {i}: {reason}; the reference and foreach backends take it")
    refuse_upload_in_capture(triples[0].w.device)
    combinations: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, triple in enumerate(triples):
        combinations.setdefault(dtypes_of(triple), []).append(i)
    return tuple(
        build_table([triples[i] for i in members], [rows[i] for i in members], [0] * len(members), chunk)
        for members in combinations.values()
    )


def dtypes_of(triple: Triple) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """The element types of w, g and m, which a launch has in common."""
    return triple.w.dtype, triple.g.dtype, (triple.m or triple.g).dtype


def refuse_upload_in_capture(device: torch.device) -> None:
    """Tables are made before a CUDA graph is captured.

    Raises:
        RuntimeError: the current stream is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a pointer table would have to be built during CUDA graph capture: run one step with the same "
            "parameters (its gradients may be other tensors), and one more after each capture, before capturing"
        )


def build_table(triples: Sequence[Triple], rows: Sequence[Row], groups: Sequence[int], chunk: int) -> Table:
    """The table of one launch, over tensors that share a combination of dtypes; those with rows come first."""
    order = sorted(range(len(triples)), key=lambda i: rows[i] is None)
    counts = [1 if (row := rows[i]) is None else row[1] for i in order]
    owner = np.repeat(order, counts).astype(np.int64)
    within = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, np.int64)
    sizes = np.array([math.prod(t.w.shape) for t in triples], np.int64)
    first_rows = np.array([-1 if row is None else row[0] for row in rows], np.int64)
    itemsizes = [dtype.itemsize for dtype in dtypes_of(triples[0])]

    elements = sizes[owner] // np.maximum(np.repeat(counts, counts), 1)
    has_row = first_rows[owner] >= 0
    chunks = np.maximum(-(-elements // chunk), has_row)  # a row without elements has one empty chunk
    segments = np.stack(
        [
            elements,
            np.cumsum(chunks) - chunks,
            np.where(has_row, first_rows[owner] + within, -1),
            np.array(groups, np.int64)[owner],
        ],
        axis=1,
    )
    shifts = np.multiply.outer(within * elements, itemsizes)
    pointers = np.array([[0 if t is None else t.pointer for t in triple] for triple in triples], np.int64)
    w, g, m = (TRITON_DTYPES[dtype] for dtype in dtypes_of(triples[0]))
    device = triples[0].w.device
    return Table(
        addresses=upload(_addresses(pointers, owner, shifts), device),
        segments=upload(segments, device),
        chunk_segment=upload(np.repeat(np.arange(len(segments), dtype=np.int32), chunks), device),
        owner=owner,
        shifts=shifts,
        pointers=pointers,
        n_measured=int(chunks[has_row].sum()),
        elements=int(elements.sum()),
        measured=int(elements[has_row].sum()),
        constexprs={"W": w, "G": g, "M": m, "CHUNK": chunk},
    )


def _addresses(pointers: np.ndarray, owner: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """int64 [n_segments, 3] from the pointers [n_tensors, 3] of w, g and m; 0 stays 0."""
    bases = pointers[owner]
    return np.where(bases == 0, 0, bases + shifts)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
