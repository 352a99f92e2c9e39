"""Gate_up: gather each expert's tokens and apply its gate and up projections. x (T, H) -> (S, 2I).

With a known gate the kernel applies it to the float32 products: x (T, H) -> h (S, I), rounded once.
"""

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.kernels.gate import Gate
from sedetect.kernels.grouped import (
    choose_tile,
    grouped_linear_torch,
    multiply,
    tile_at,
    weight_columns,
    weight_operand,
)
from sedetect.kernels.launch import launch
from sedetect.kernels.plan import Plan, scheduled
from sedetect.kernels.row_scan import largest


def gate_up_torch(
    x: torch.Tensor,
    plan: Plan,
    weight: torch.Tensor | QuantizedWeights,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """The gate_up projection of every routed row, before the gate.

    Args:
        x: (T, H) tokens.
        weight: (E, 2I, H), or (E, H, 2I) when transposed; (E, I, H) for experts without a gate.
        bias: (E, 2I) or None.
    Returns:
        (S, 2I), sorted by expert.
    """
    return grouped_linear_torch(x[plan.order // plan.top_k], plan, weight, bias, transposed)


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) in half the instructions of a division and a base-e exponential: rsqrt is one, squared."""
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))
    return root * root


ACTIVATIONS = frozenset({"silu", "gelu", "gelu_tanh", "relu2"})


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    if ACTIVATION == "silu":
        return g * _sigmoid(g * SLOPE)
    elif ACTIVATION == "gelu":
        return 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(a)) = sigmoid(2a), without the cancellation.
        return g * _sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    else:
        tl.static_assert(ACTIVATION == "relu2")
        r = tl.maximum(g, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return r * r


@triton.jit
def _gate(
    z,  # (BLOCK_M, BLOCK_N) float32: the tile's gates then its ups, or in turns when INTERLEAVED
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr, SLOPE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    if GATED:
        if INTERLEAVED:
            g, u = tl.split(z.reshape(BLOCK_M, BLOCK_N // 2, 2))
        else:
            g, u = tl.split(z.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
        if LIMIT is not None:
            g = tl.minimum(g, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            u = tl.minimum(u, LIMIT, propagate_nan=tl.PropagateNan.ALL)
            u = tl.maximum(u, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        return _activate(g, ACTIVATION, SLOPE) * (u if SHIFT == 0 else u + SHIFT)
    else:
        return _activate(z, ACTIVATION, SLOPE)


@triton.jit(do_not_specialize=["slots"])
def _gate_up(
    X,  # (T, H)
    W,  # (E, COLUMNS, H) by strides, or its descriptor; as stored
    Scale,  # of a quantized W, else None
    Bias,  # (E, COLUMNS) or None
    Out,  # (S, I), (S, COLUMNS) without ACTIVATION - output; rows of no expert are not written
    Parts,  # (column tiles, S) float32 or None - output; largest |value| of each row in this tile
    Order,  # (S,) int64
    Tiles,  # (max_tiles, 4) int32
    TileCount,  # (1,) int32
    slots, stride_xm, stride_we, stride_wn, stride_wk,
    H: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr, SLOPE: tl.constexpr, SHIFT: tl.constexpr,
    W_TMA: tl.constexpr, TRANSPOSED: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    HALVED: tl.constexpr = GATED and ACTIVATION is not None
    PARTS: tl.constexpr = 2 if HALVED and not INTERLEAVED else 1
    WIDTH: tl.constexpr = COLUMNS // 2 if HALVED else COLUMNS
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if HALVED else BLOCK_N
    COLUMN_TILES: tl.constexpr = (WIDTH + BLOCK_OUT - 1) // BLOCK_OUT
    row_tiles = tl.load(TileCount)
    for index in tl.range(tl.program_id(0), row_tiles * COLUMN_TILES, tl.num_programs(0), flatten=FLATTEN):
        row_tile, tile = tile_at(index, row_tiles, COLUMN_TILES, GROUP)
        expert = tl.load(Tiles + 4 * row_tile)
        first = tl.load(Tiles + 4 * row_tile + 1)
        end = tl.load(Tiles + 4 * row_tile + 2)
        row = first + tl.arange(0, BLOCK_M)
        # Rows and columns past the end repeat a valid one: cheaper than masks, and never stored.
        x_row = tl.load(Order + tl.minimum(row, end - 1)) // TOP_K
        column, valid = weight_columns(tile, COLUMNS, BLOCK_N, PARTS)
        column = tl.where(valid, column, 0)
        z = multiply(
            X, stride_xm,
            W, stride_we, stride_wn, stride_wk, Scale,
            x_row, column, first, expert if W_TMA else expert.to(tl.int64), tile,
            H, BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
            False, W_TMA, TRANSPOSED, SCALES,
        )  # fmt: skip
        if Bias is not None:
            z += tl.load(Bias + expert.to(tl.int64) * COLUMNS + column).to(tl.float32)[None, :]
        if ACTIVATION is not None:
            z = _gate(z, BLOCK_M, BLOCK_N, ACTIVATION, GATED, INTERLEAVED, LIMIT, SLOPE, SHIFT)
        out = z.to(Out.dtype.element_ty)
        out_column = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        stored = (row < end)[:, None] & (out_column < WIDTH)[None, :]
        tl.store(Out + row.to(tl.int64)[:, None] * WIDTH + out_column[None, :], out, mask=stored)
        if Parts is not None:
            # Rounding keeps the order, so the largest of the row is rounded alone.
            part = largest(z if WIDTH % BLOCK_OUT == 0 else tl.where((out_column < WIDTH)[None, :], z, 0.0), 1)
            part = part.to(Out.dtype.element_ty).to(tl.float32)
            tl.store(Parts + tile.to(tl.int64) * slots + row, part, mask=row < end)


def gate_up(
    x: torch.Tensor,
    plan: Plan,
    weight: torch.Tensor | QuantizedWeights,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
    gate: Gate | None = None,
    parts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """gate_up_torch, followed by the gate if one is given: (z (S, 2I) or h (S, I), parts).

    parts, if asked for, are (column tiles, S) float32: the largest |value| of each row of the result in each of them
    (sedetect.kernels.row_scan). Rows of no expert are not written.
    """
    x, schedule = x.to(weight.dtype).contiguous(), scheduled(plan).schedule
    bias = None if bias is None else bias.contiguous()
    slots, columns = plan.slots, weight.shape[2 if transposed else 1]
    gate, activation = (Gate(gated=False), None) if gate is None else (gate, gate.activation)
    halved = gate.gated
    width = columns // 2 if halved else columns
    out = x.new_empty(slots, width)
    if slots == 0:
        return out, x.new_empty(1, 0, dtype=torch.float32) if parts else None
    interleaved = halved and gate.interleaved
    tile = choose_tile(tiles.GATE_UP, weight, schedule.rows, columns, x.device, interleaved)
    operand = weight_operand(weight, transposed, tile, 2 if halved and not interleaved else 1)
    column_tiles = tiles.cdiv(width, tile.n // 2 if halved else tile.n)
    found = x.new_empty(column_tiles, slots, dtype=torch.float32) if parts else None
    grid = tiles.programs(tile, x.dtype, schedule.most * column_tiles, x.device)
    launch(
        _gate_up,
        (grid, 1, 1),
        (
            x, operand.data, operand.scale, bias, out, found,
            plan.order, schedule.tiles, schedule.count,
            slots, x.stride(0), *operand.strides,
        ),
        {
            "H": x.shape[1], "COLUMNS": columns, "TOP_K": plan.top_k,
            "ACTIVATION": activation, "GATED": gate.gated, "INTERLEAVED": gate.interleaved,
            "LIMIT": gate.limit, "SLOPE": gate.slope, "SHIFT": gate.shift,
            "W_TMA": operand.tma, "TRANSPOSED": transposed, "SCALES": operand.scales,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": tiles.GROUP, "FLATTEN": tile.flatten,
        },
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, found
