"""Row scan: the largest element of a row and what else the statistics need, inside a kernel.

A row key says which element of a row is the largest: one int64, whose maximum over parts of a row is that of the row.

    bits 63..32  |value| as float32; every NaN has the bits NAN_BITS
    bits 31..1   2^31 - 1 - channel: among equals the lowest channel wins
    bit 0        sign of the value
"""

import struct

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.records import INF_BITS, NAN_BITS
from sedetect.kernels.row_stats import FP8_MAX, FP16_MAX, RowStats


def _bits(x: float) -> tl.constexpr:
    return tl.constexpr(struct.unpack("<i", struct.pack("<f", x))[0])


_INF, _NAN = tl.constexpr(INF_BITS), tl.constexpr(NAN_BITS)
_FP16_MAX_BITS, _FP8_MAX_BITS = _bits(FP16_MAX), _bits(FP8_MAX)
_LAST_CHANNEL = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(-1)


@triton.jit
def row_key(
    x,  # (rows, BLOCK), as stored
    first, width,  # channel of its first column, channels of the whole row
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(rows,) int64 keys of this part of the rows; NO_KEY where no column lies in the row."""
    column = tl.arange(0, BLOCK)
    inside = (first + column < width)[None, :]
    if x.dtype.primitive_bitwidth == 16:
        # |value| and the place within the block fit 32 bits, so that one integer maximum finds both.
        tl.static_assert(BLOCK <= 32768)
        infinity: tl.constexpr = 0x7F80 if x.dtype == tl.bfloat16 else 0x7C00
        raw = x.to(tl.int16, bitcast=True).to(tl.int32)
        magnitude = tl.minimum(raw & 0x7FFF, infinity + 1)
        packed = (magnitude << 16) | ((BLOCK - 1 - column) << 1)[None, :] | ((raw >> 15) & 1)
        best = tl.max(tl.where(inside, packed, -1), 1)
        bits = ((best >> 16).to(tl.int16).to(x.dtype, bitcast=True)).to(tl.float32).to(tl.int32, bitcast=True)
        channel = first + BLOCK - 1 - ((best >> 1) & 0x7FFF)
        key = _pack(tl.where(bits > _INF, _NAN, bits), channel, best & 1)
        return tl.where(best < 0, NO_KEY, key)
    else:
        raw = x.to(tl.int32, bitcast=True)
        bits = raw & 0x7FFFFFFF
        key = _pack(tl.where(bits > _INF, _NAN, bits), (first + column)[None, :], (raw >> 31) & 1)
        return tl.max(tl.where(inside, key, NO_KEY), 1)


@triton.jit
def _pack(bits, channel, sign):
    return (bits.to(tl.int64) << 32) | ((-channel + _LAST_CHANNEL).to(tl.int64) << 1) | sign.to(tl.int64)


@triton.jit
def unpack_key(key):
    """(value float32, signed, a NaN positive; channel int32)."""
    bits = (key >> 32).to(tl.int32)
    sign = tl.where(bits > _INF, 0, (key & 1).to(tl.int32))
    channel = (-((key >> 1) & _LAST_CHANNEL) + _LAST_CHANNEL).to(tl.int32)
    return (bits | (sign << 31)).to(tl.float32, bitcast=True), channel


@triton.jit
def row_squares(x, first, width, BLOCK: tl.constexpr):
    """(rows,) float32 sums of squares of this part of the rows."""
    inside = (first + tl.arange(0, BLOCK) < width)[None, :]
    x = tl.where(inside, x.to(tl.float32), 0.0)
    return tl.sum(x * x, 1)


@triton.jit
def row_counts(x, key, first, width, BLOCK: tl.constexpr, SKIP: tl.constexpr):
    """(rows,) int32 numbers of elements that are NaN or Inf; finite beyond float16; finite beyond float8.

    With SKIP nothing is counted where the keys of the rows say that there is nothing to count, as in most tiles.
    """
    nonfinite = tl.zeros((x.shape[0],), tl.int32)
    over_fp16 = tl.zeros((x.shape[0],), tl.int32)
    over_fp8 = tl.zeros((x.shape[0],), tl.int32)
    some = True
    if SKIP:
        some = tl.max((key >> 32).to(tl.int32), 0) > _FP8_MAX_BITS
    if some:
        inside = (first + tl.arange(0, BLOCK) < width)[None, :]
        bits = tl.where(inside, x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        nonfinite = tl.sum((bits >= _INF).to(tl.int32), 1)
        over_fp16 = tl.sum(((bits > _FP16_MAX_BITS) & (bits < _INF)).to(tl.int32), 1)
        over_fp8 = tl.sum(((bits > _FP8_MAX_BITS) & (bits < _INF)).to(tl.int32), 1)
    return nonfinite, over_fp16, over_fp8


@triton.jit
def store_row_stats(
    row, mask, y_key, squares, nonfinite, over_fp16, over_fp8, h_key,
    Peak, Channel, Sqnorm, Nonfinite, OverFp16, OverFp8, InPeak, InChannel,  # RowStats, (S,) each - output
):  # fmt: skip
    peak, channel = unpack_key(y_key)
    in_peak, in_channel = unpack_key(h_key)
    tl.store(Peak + row, peak, mask=mask)
    tl.store(Channel + row, channel, mask=mask)
    tl.store(Sqnorm + row, squares, mask=mask)
    tl.store(Nonfinite + row, nonfinite, mask=mask)
    tl.store(OverFp16 + row, over_fp16, mask=mask)
    tl.store(OverFp8 + row, over_fp8, mask=mask)
    tl.store(InPeak + row, in_peak, mask=mask)
    tl.store(InChannel + row, in_channel, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _row_stats(
    Y,  # (S, H)
    X,  # (S, WIDTH)
    Peak, Channel, Sqnorm, Nonfinite, OverFp16, OverFp8, InPeak, InChannel,  # RowStats, (S,) each - output
    Offsets,  # (E + 1,) int64 or None: rows from Offsets[EXPERTS] on are of no expert and left alone
    rows,
    EXPERTS: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    column, in_column = tl.arange(0, BLOCK_H)[None, :], tl.arange(0, BLOCK_X)[None, :]
    if Offsets is None:
        kept = row < rows
    else:
        kept = row < tl.load(Offsets + EXPERTS)
    y = tl.load(Y + row[:, None] * H + column, mask=(column < H) & kept[:, None], other=0)
    key = row_key(y, 0, H, BLOCK_H)
    squares = row_squares(y, 0, H, BLOCK_H)
    nonfinite, over_fp16, over_fp8 = row_counts(y, key, 0, H, BLOCK_H, True)
    x = tl.load(X + row[:, None] * WIDTH + in_column, mask=(in_column < WIDTH) & kept[:, None], other=0)
    store_row_stats(
        row, kept, key, squares, nonfinite, over_fp16, over_fp8, row_key(x, 0, WIDTH, BLOCK_X),
        Peak, Channel, Sqnorm, Nonfinite, OverFp16, OverFp8, InPeak, InChannel,
    )  # fmt: skip


def row_stats(y: torch.Tensor, h: torch.Tensor, offsets: torch.Tensor | None = None) -> RowStats:
    """row_stats_torch in one pass; with offsets (E + 1,), the statistics of rows of no expert are left undefined."""
    y, h = y.contiguous(), h.contiguous()
    stats = RowStats.empty(len(y), y.device)
    if len(y):
        rows, block = tiles.row_block(max(y.shape[1], h.shape[1]), whole=True)
        _row_stats[(triton.cdiv(len(y), rows),)](
            y, h, *stats.tensors(), offsets, len(y),
            EXPERTS=0 if offsets is None else len(offsets) - 1, H=y.shape[1], WIDTH=h.shape[1],
            BLOCK_S=rows, BLOCK_H=triton.next_power_of_2(y.shape[1]), BLOCK_X=triton.next_power_of_2(h.shape[1]),
            num_warps=tiles.row_warps(rows * block),
        )  # fmt: skip
    return stats
