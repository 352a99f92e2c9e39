"""Down: apply each expert's down projection to its rows. h (S, I) -> y (S, H).

The statistics of a row are of y as stored. A tile sees only some channels of a row, and its epilogue keeps the tensor
cores waiting, so that combine takes them, which reads every row once more and waits for memory.
"""

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
from sedetect.kernels.launch import launch
from sedetect.kernels.plan import Plan, scheduled
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


@triton.jit
def _down(
    X,  # (S, I), or its descriptor
    W,  # (E, H, I) by strides, or its descriptor; as stored
    Scale,  # of a quantized W, else None
    Bias,  # (E, H) or None
    Y,  # (S, H) - output; rows of no expert are not written
    Tiles,  # (max_tiles, 4) int32
    TileCount,  # (1,) int32
    stride_we, stride_wn, stride_wk,
    H: tl.constexpr, I: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
    SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    COLUMN_TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    row_tiles = tl.load(TileCount)
    for index in tl.range(tl.program_id(0), row_tiles * COLUMN_TILES, tl.num_programs(0), flatten=FLATTEN):
        row_tile, tile = tile_at(index, row_tiles, COLUMN_TILES, GROUP)
        expert = tl.load(Tiles + 4 * row_tile)
        first = tl.load(Tiles + 4 * row_tile + 1)
        end = tl.load(Tiles + 4 * row_tile + 2)
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


def down(
    h: torch.Tensor,
    plan: Plan,
    weight: torch.Tensor | QuantizedWeights,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """The down projection of down_torch. Rows of no expert are not written."""
    h, schedule = h.to(weight.dtype).contiguous(), scheduled(plan).schedule
    bias = None if bias is None else bias.contiguous()
    slots, hidden = plan.slots, weight.shape[2 if transposed else 1]
    y = h.new_empty(slots, hidden)
    tile = choose_tile(tiles.DOWN, weight, schedule.rows, hidden, h.device)
    column_tiles = tiles.cdiv(hidden, tile.n)
    if slots == 0:
        return y
    operand = weight_operand(weight, transposed, tile)
    rows = row_operand(h, tile)
    grid = tiles.programs(tile, h.dtype, schedule.most * column_tiles, h.device)
    launch(
        _down,
        (grid, 1, 1),
        (rows, operand.data, operand.scale, bias, y, schedule.tiles, schedule.count, *operand.strides),
        {
            "H": hidden, "I": h.shape[1], "X_TMA": rows is not h, "W_TMA": operand.tma, "TRANSPOSED": transposed,
            "SCALES": operand.scales,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tiles.GROUP, "FLATTEN": tile.flatten,
        },
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
