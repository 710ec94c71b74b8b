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
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

CHUNK = 4096  # elements per program: a power of two, at least 8, so that full chunks keep 16-byte alignment
NUM_WARPS = 8

# Kernels are decorated when they are imported, and for good: interpreted ones cannot follow device pointers.
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
    """The layouts of a parameter, its gradient and its momentum buffer."""

    w: Layout
    g: Layout
    m: Layout | None


@dataclass(frozen=True)
class Table:
    """What one launch covers.

    segments: int64 [n_segments, 8] with the columns
        0-2 addresses of w, g and m (0 without a buffer), 3 elements, 4 first chunk, 5 row (-1 for none),
        6 whether w, g and m lie on 16-byte boundaries, 7 whether m is new (written without being read).
    chunk_segment: int32 [n_chunks], the segment that each chunk belongs to.
    constexprs: the element types W, G and M and the CHUNK of the launch.
    """

    segments: Tensor
    chunk_segment: Tensor
    constexprs: dict[str, tl.dtype | int]

    @property
    def n_segments(self) -> int:
        return self.segments.shape[0]

    @property
    def n_chunks(self) -> int:
        return self.chunk_segment.shape[0]


@triton.jit
def load_chunk(
    segments, chunk_segment, W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr
):
    """What this program works on: pointers to its first element in w, g and m, the number of elements from
    there to the end of the segment, and the segment's row, has-buffer, aligned and new-buffer entries.

    Bytes: 68 per chunk. Offsets are int64.
    """
    chunk = tl.program_id(0)
    segment = segments + tl.load(chunk_segment + chunk).to(tl.int64) * 8
    w = tl.load(segment).to(tl.pointer_type(W))
    g = tl.load(segment + 1).to(tl.pointer_type(G))
    m_address = tl.load(segment + 2)
    m = m_address.to(tl.pointer_type(M))
    offset = (chunk - tl.load(segment + 4)) * CHUNK
    left = tl.load(segment + 3) - offset
    row = tl.load(segment + 5)
    aligned = tl.load(segment + 6) != 0
    new_buffer = tl.load(segment + 7) != 0
    return w + offset, g + offset, m + offset, left, row, m_address != 0, aligned, new_buffer


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


def tables_for(
    triples: tuple[Triple, ...], *, rows: Sequence[Row], n_rows: int, new_buffers: Sequence[bool]
) -> tuple[Table, ...]:
    """The tables of a call, one for each combination of dtypes that occurs.

    They are cached under all that they hold, and uploaded asynchronously on the current stream only when some
    of it (a pointer, a shape, a first-step flag, …) is new. The cache is bounded and keeps no tensor alive.

    Args:
        triples: as from `triples_of`; at least one.
        rows: (first row, number of rows) of each tensor: one row for the tensor as a whole or one for each
            index of its dimension 0. None: no row.
        n_rows: the number of rows there are.
        new_buffers: for each tensor, whether its momentum buffer is uninitialized.

    Raises:
        ValueError: the kernels cannot take a tensor, or its rows do not fit.
        RuntimeError: a table would have to be uploaded while a CUDA graph is being captured.
    """
    stream = 0
    if DEVICE_TYPE == "cuda" and triples[0].w.device.type == "cuda":
        stream = torch.cuda.current_stream(triples[0].w.device).cuda_stream
    return _build(triples, tuple(rows), n_rows, tuple(new_buffers), CHUNK, stream)


@functools.lru_cache(maxsize=32)
def _build(
    triples: tuple[Triple, ...],
    rows: tuple[Row, ...],
    n_rows: int,
    new_buffers: tuple[bool, ...],
    chunk: int,
    stream: int,  # only a key: a table is sure to have arrived only on the stream that uploads it
) -> tuple[Table, ...]:
    device = triples[0].w.device
    segments: dict[tuple[torch.dtype, ...], list[np.ndarray]] = {}
    for i, (triple, row, new_buffer) in enumerate(zip(triples, rows, new_buffers, strict=True)):
        reason = why_not(triple, device) or why_not_rows(triple.w, row, n_rows)
        if reason is not None:
            raise ValueError(f"tensor {i}: {reason}; the reference and foreach backends take it")
        dtypes = triple.w.dtype, triple.g.dtype, (triple.m or triple.g).dtype
        segments.setdefault(dtypes, []).append(_segments_of(triple, row, new_buffer))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a pointer table would have to be uploaded during CUDA graph capture; before capturing a step, "
            "run it at least twice on the same stream and with the same gradient tensors"
        )
    return tuple(_upload(np.concatenate(parts), dtypes, chunk, device) for dtypes, parts in segments.items())


def _segments_of(triple: Triple, row: Row, new_buffer: bool) -> np.ndarray:
    """[count, 8] as `Table.segments`; the first chunks are filled in once all segments are known."""
    first, count = (-1, 1) if row is None else row
    elements = math.prod(triple.w.shape) // max(count, 1)
    segments = np.zeros((count, 8), np.int64)
    for column, t in enumerate(triple):
        if t is not None:
            segments[:, column] = t.pointer + np.arange(count) * elements * t.dtype.itemsize
    segments[:, 3] = elements
    segments[:, 5] = -1 if row is None else first + np.arange(count)
    segments[:, 6] = (segments[:, :3] % 16 == 0).all(axis=1)
    segments[:, 7] = new_buffer
    return segments


def _upload(segments: np.ndarray, dtypes: tuple[torch.dtype, ...], chunk: int, device: torch.device) -> Table:
    chunks = -(-segments[:, 3] // chunk)
    segments[:, 4] = np.cumsum(chunks) - chunks
    chunk_segment = np.repeat(np.arange(len(segments), dtype=np.int32), chunks)
    tensors = [torch.from_numpy(array) for array in (segments, chunk_segment)]
    if device.type == "cuda":
        tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    w, g, m = (TRITON_DTYPES[dtype] for dtype in dtypes)
    return Table(*tensors, constexprs={"W": w, "G": g, "M": m, "CHUNK": chunk})
