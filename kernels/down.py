"""Down: apply each expert's down projection to its rows, and measure the result. h (S, I) -> y (S, H).

The statistics of a row are of y as stored. A tile sees only some channels of a row, so the kernel leaves partials per
(column tile, row), and merge_partials joins them in the order of the tiles.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.kernels.grouped import (
    choose_tile,
    grouped_linear_torch,
    multiply,
    row_operand,
    tile_at,
    weight_columns,
    weight_operand,
)
from sedetect.kernels.plan import Plan, scheduled
from sedetect.kernels.row_scan import NO_KEY, row_counts, row_key, row_squares, store_row_stats
from sedetect.kernels.row_stats import RowStats, row_stats_torch


def down_torch(
    h: torch.Tensor,
    plan: Plan,
    weight: torch.Tensor | QuantizedWeights,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> tuple[torch.Tensor, RowStats]:
    """The down projection of every sorted row and its statistics.

    Args:
        h: (S, I), sorted by expert.
        weight: (E, H, I), or (E, I, H) when transposed.
        bias: (E, H) or None.
    """
    h = h.to(weight.dtype)
    y = grouped_linear_torch(h, plan, weight, bias, transposed)
    return y, row_stats_torch(y, h)


@dataclass
class Partials:
    """Statistics of the part of a row that a column tile holds; all (column tiles, S).

    keys     int64: row_key
    squares  float32: sum of y^2
    counts   int32: nonfinite | over_fp16 << 10 | over_fp8 << 20, each at most 512
    """

    keys: torch.Tensor
    squares: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(cls, column_tiles: int, slots: int, device: torch.device) -> "Partials":
        types = (torch.int64, torch.float32, torch.int32)
        return cls(*(torch.empty(column_tiles, slots, dtype=dtype, device=device) for dtype in types))


@triton.jit(do_not_specialize=["slots"])
def _down(
    X,  # (S, I), or its descriptor
    W,  # (E, H, I) by strides, or its descriptor; as stored
    Scale,  # of a quantized W, else None
    Bias,  # (E, H) or None
    Y,  # (S, H) - output; rows of no expert are not written
    Keys, Squares, Counts,  # Partials - output; Keys None: no statistics
    Offsets,  # (E + 1,) int64
    Tiles,  # (max_tiles, 2) int32
    TileCount,  # (1,) int32
    slots, stride_we, stride_wn, stride_wk,
    H: tl.constexpr, I: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
    SKIP: tl.constexpr,
):  # fmt: skip
    COLUMN_TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    row_tiles = tl.load(TileCount)
    for index in tl.range(tl.program_id(0), row_tiles * COLUMN_TILES, tl.num_programs(0), flatten=FLATTEN):
        row_tile, tile = tile_at(index, row_tiles, COLUMN_TILES, GROUP)
        expert = tl.load(Tiles + 2 * row_tile)
        first = tl.load(Tiles + 2 * row_tile + 1)
        end = tl.load(Offsets + expert + 1).to(tl.int32)
        row = first + tl.arange(0, BLOCK_M)
        column, valid = weight_columns(tile, H, BLOCK_N, 1)
        y = multiply(
            X, I,
            W, stride_we, stride_wn, stride_wk, Scale,
            tl.minimum(row, end - 1).to(tl.int64), tl.where(valid, column, 0),
            first, expert if W_TMA else expert.to(tl.int64), tile,
            I, BLOCK_M, BLOCK_N, BLOCK_K, 1,
            X_TMA, W_TMA, TRANSPOSED, SCALES,
        )  # fmt: skip
        if Bias is not None:
            y += tl.load(Bias + expert.to(tl.int64) * H + column, mask=valid, other=0).to(tl.float32)[None, :]
        y = y.to(Y.dtype.element_ty)
        tl.store(Y + row.to(tl.int64)[:, None] * H + column[None, :], y, mask=(row < end)[:, None] & valid[None, :])
        if Keys is not None:
            key = row_key(y, tile * BLOCK_N, H, BLOCK_N)
            nonfinite, over_fp16, over_fp8 = row_counts(y, key, tile * BLOCK_N, H, BLOCK_N, SKIP)
            at = tile.to(tl.int64) * slots + row
            tl.store(Keys + at, key, mask=row < end)
            tl.store(Squares + at, row_squares(y, tile * BLOCK_N, H, BLOCK_N), mask=row < end)
            tl.store(Counts + at, nonfinite | (over_fp16 << 10) | (over_fp8 << 20), mask=row < end)


def down(
    h: torch.Tensor,
    plan: Plan,
    weight: torch.Tensor | QuantizedWeights,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
    statistics: bool = True,
) -> tuple[torch.Tensor, Partials | None]:
    """The down projection of down_torch, with the partials of its statistics if asked for. Rows of no expert are not
    written."""
    h, plan = h.to(weight.dtype).contiguous(), scheduled(plan)
    bias = None if bias is None else bias.contiguous()
    slots, hidden = len(plan.order), weight.shape[2 if transposed else 1]
    y = h.new_empty(slots, hidden)
    tile = choose_tile(tiles.DOWN, weight, plan.schedule.rows, hidden, h.device)
    column_tiles = triton.cdiv(hidden, tile.n)
    partials = Partials.empty(column_tiles, slots, h.device) if statistics else None
    if slots == 0:
        return y, partials
    operand = weight_operand(weight, transposed, tile)
    rows = row_operand(h, tile)
    grid = tiles.programs(tile, h.dtype, len(plan.schedule.tiles) * column_tiles, h.device)
    found = (partials.keys, partials.squares, partials.counts) if statistics else (None, None, None)
    _down[(grid,)](
        rows, operand.data, operand.scale, bias, y, *found, plan.offsets, plan.schedule.tiles, plan.schedule.count,
        slots, *operand.strides,
        H=hidden, I=h.shape[1], X_TMA=rows is not h, W_TMA=operand.tma, TRANSPOSED=transposed,
        SCALES=operand.scales,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=tiles.GROUP, FLATTEN=tile.flatten,
        # Triton 3.6 does not compile the condition behind the tensor memory of sm_100.
        SKIP=tiles.limits(h.device).major < 10,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y, partials


@triton.jit(do_not_specialize=["slots"])
def _merge_partials(
    Keys, Squares, Counts,  # (column tiles, S) of y
    InKeys,  # (in tiles, S) of h
    Peak, Channel, Sqnorm, Nonfinite, OverFp16, OverFp8, InPeak, InChannel,  # RowStats, (S,) each - output
    slots,
    COLUMN_TILES: tl.constexpr, IN_TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < slots
    key = tl.full((BLOCK,), NO_KEY, tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.int64)
    for tile in range(COLUMN_TILES):
        at = tl.cast(tile, tl.int64) * slots + row
        key = tl.maximum(key, tl.load(Keys + at, mask=inside, other=NO_KEY))
        squares += tl.load(Squares + at, mask=inside, other=0)
        packed = tl.load(Counts + at, mask=inside, other=0).to(tl.int64)
        counts += (packed & 1023) | ((packed & 0xFFC00) << 10) | ((packed >> 20) << 40)
    in_key = tl.full((BLOCK,), NO_KEY, tl.int64)
    for tile in range(IN_TILES):
        in_key = tl.maximum(in_key, tl.load(InKeys + tl.cast(tile, tl.int64) * slots + row, mask=inside, other=NO_KEY))
    store_row_stats(
        row, inside, key, squares, (counts & 0xFFFFF).to(tl.int32), ((counts >> 20) & 0xFFFFF).to(tl.int32),
        (counts >> 40).to(tl.int32), in_key, Peak, Channel, Sqnorm, Nonfinite, OverFp16, OverFp8, InPeak, InChannel,
    )  # fmt: skip


def merge_partials(partials: Partials, in_keys: torch.Tensor) -> RowStats:
    """The statistics of whole rows from those of their tiles; undefined for rows of no expert."""
    column_tiles, slots = partials.keys.shape
    stats = RowStats.empty(slots, partials.keys.device)
    if slots:
        _merge_partials[(triton.cdiv(slots, tiles.MERGE_ROWS),)](
            partials.keys, partials.squares, partials.counts, in_keys,
            *stats.tensors(),
            slots,
            COLUMN_TILES=column_tiles, IN_TILES=len(in_keys), BLOCK=tiles.MERGE_ROWS,
        )  # fmt: skip
    return stats
