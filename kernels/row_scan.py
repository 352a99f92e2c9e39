"""Row scan: the largest element of a row and the other row statistics, inside a kernel.

Which element is the largest is found in two steps, because an index beside every element costs more than the search:
the largest |value| of every part of the row (one maximum an element), and later, for rows that enter a list of kept
records (kernels/update.py), where it stands in the first part that has it, by reading that part again.

Magnitudes are held as the bits of |value| as float32, which order as integers do; every NaN as ABOVE_INF.
"""

import struct

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.launch import launch
from sedetect.kernels.records import INF_BITS, NAN_BITS
from sedetect.kernels.row_stats import FP8_MAX, FP16_MAX, RowParts


def _bits(x: float) -> tl.constexpr:
    return tl.constexpr(struct.unpack("<i", struct.pack("<f", x))[0])


_INF, _NAN = tl.constexpr(INF_BITS), tl.constexpr(NAN_BITS)
ABOVE_INF = tl.constexpr(INF_BITS + 1)
_FP16_MAX_BITS, _FP8_MAX_BITS = _bits(FP16_MAX), _bits(FP8_MAX)
_NOWHERE = tl.constexpr(2**31 - 1)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):
    """The largest |value| along an axis, float32; NaN if there is one."""
    return tl.reduce(tl.abs(x.to(tl.float32)), axis, _larger)


@triton.jit
def magnitude(x):
    """Bits of |x|; ABOVE_INF for NaN."""
    return tl.minimum(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, ABOVE_INF)


@triton.jit
def row_peak(
    x,  # (rows, BLOCK), 0 beyond the row
    BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(best, part), both (rows,) int32: the largest magnitude of a row and the first part of PART columns with it."""
    bits = magnitude(largest(x.reshape(x.shape[0], BLOCK // PART, PART), 2))
    best = tl.max(bits, 1)
    part = tl.arange(0, bits.shape[1])[None, :]
    return best, tl.min(tl.where(bits == best[:, None], part, bits.shape[1]), 1)


@triton.jit
def stored_parts(
    Parts,  # (PARTS, S) float32: largest |value| of each
    row, kept,  # (rows,) each
    slots,  # S
    PARTS: tl.constexpr,
):  # fmt: skip
    """(best, part) of each row, as row_peak gives."""
    AT_ONCE: tl.constexpr = 8  # loads that wait together
    best, first = tl.full(row.shape, -1, tl.int32), tl.zeros(row.shape, tl.int32)
    at = Parts + row
    for start in range(0, PARTS, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            bits = magnitude(tl.load(at, mask=kept & (start + i < PARTS), other=0))
            first = tl.where(bits > best, start + i, first)
            best = tl.maximum(bits, best)
            at += slots
    return best, first


@triton.jit
def read_peak(
    X,  # (S, WIDTH)
    row, kept, best, part,  # (rows,) each
    WIDTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(value float32, signed, a NaN positive; channel int32), both (rows,): the first of the largest in that part."""
    COLUMNS: tl.constexpr = PART if PART < 16 else 16
    best = tl.minimum(best, ABOVE_INF)
    found = tl.full(row.shape, _NOWHERE, tl.int32)
    for start in range(0, PART, COLUMNS):
        column = part[:, None] * PART + start + tl.arange(0, COLUMNS)[None, :]
        x = tl.load(X + row[:, None] * WIDTH + column, mask=kept[:, None] & (column < WIDTH), other=0).to(tl.float32)
        # Zeros beyond the row stand behind those inside.
        here = tl.where(magnitude(x) == best[:, None], (column << 1) | (x.to(tl.int32, bitcast=True) < 0), _NOWHERE)
        found = tl.minimum(found, tl.min(here, 1))
    value = tl.where(best > _INF, _NAN, best | (found << 31))
    return value.to(tl.float32, bitcast=True), found >> 1


@triton.jit
def row_squares(x):
    """(rows,) float32 sums of squares of rows that are 0 beyond their width."""
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)


@triton.jit
def row_counts(x):
    """(rows,) int32 numbers of elements that are NaN or Inf; finite beyond float16; finite beyond float8."""
    bits = magnitude(x)
    nonfinite = tl.sum((bits >= _INF).to(tl.int32), 1)
    over_fp16 = tl.sum(((bits > _FP16_MAX_BITS) & (bits < _INF)).to(tl.int32), 1)
    over_fp8 = tl.sum(((bits > _FP8_MAX_BITS) & (bits < _INF)).to(tl.int32), 1)
    return nonfinite, over_fp16, over_fp8


@triton.jit
def some_to_count(best):
    """Whether row_counts would find anything in each row, whose largest magnitudes these are."""
    return best > _FP8_MAX_BITS


@triton.jit(do_not_specialize=["rows"])
def _row_parts(
    Y,  # (S, H)
    X,  # (S, WIDTH)
    Best, Part, Sqnorm,  # RowParts, (S,) each - output
    InParts,  # RowParts, (IN_PARTS, S) - output
    Offsets,  # (E + 1,) int64 or None: rows from Offsets[EXPERTS] on are of no expert and left alone
    rows,
    EXPERTS: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_X: tl.constexpr,
    PART: tl.constexpr, IN_PARTS: tl.constexpr, IN_PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    column, in_column = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_X)[None, :]
    if Offsets is None:
        kept = row < rows
    else:
        kept = row < tl.load(Offsets + EXPERTS)
    y = tl.load(Y + row[:, None] * H + column, mask=(column < H) & kept[:, None], other=0)
    x = tl.load(X + row[:, None] * WIDTH + in_column, mask=(in_column < WIDTH) & kept[:, None], other=0)
    best, part = row_peak(y, BLOCK_H, PART)
    tl.store(Best + row, best.to(tl.float32, bitcast=True), mask=kept)
    tl.store(Part + row, part, mask=kept)
    tl.store(Sqnorm + row, row_squares(y), mask=kept)
    in_part = tl.arange(0, BLOCK_X // IN_PART)[None, :]
    largest_of_parts = largest(x.reshape(BLOCK_S, BLOCK_X // IN_PART, IN_PART), 2)
    at = InParts + in_part.to(tl.int64) * rows + row[:, None]
    tl.store(at, largest_of_parts, mask=(in_part < IN_PARTS) & kept[:, None])


def row_parts(y: torch.Tensor, h: torch.Tensor, offsets: torch.Tensor | None = None) -> RowParts:
    """RowParts of y and h in one pass; with offsets (E + 1,), those of rows of no expert are left undefined."""
    y, h = ((t if t.dtype in _FLOATS else t.float()).contiguous() for t in (y, h))
    y_block, h_block = (tiles.next_power_of_2(t.shape[1]) for t in (y, h))
    in_part = min(h_block, 128)
    in_parts = tiles.cdiv(h.shape[1], in_part)
    found = RowParts.empty(y, h, y.new_empty(in_parts, len(y), dtype=torch.float32))
    if len(y):
        rows, block = tiles.row_block(max(y.shape[1], h.shape[1]), whole=True)
        launch(
            _row_parts,
            (tiles.cdiv(len(y), rows), 1, 1),
            (y, h, found.best, found.part, found.sqnorm, found.in_parts, offsets, len(y)),
            {
                "EXPERTS": 0 if offsets is None else len(offsets) - 1, "H": y.shape[1], "WIDTH": h.shape[1],
                "BLOCK_S": rows, "BLOCK_H": y_block, "BLOCK_X": h_block,
                "PART": found.y_part_width, "IN_PARTS": in_parts, "IN_PART": in_part,
            },
            num_warps=tiles.row_warps(rows * block),
        )  # fmt: skip
    return found
