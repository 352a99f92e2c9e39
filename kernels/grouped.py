"""Grouped linear: every expert's matrix on its own rows. The reference and the main loop of the gate_up and down GEMMs.

Triton kernels of this family are persistent: a fixed number of programs walks over all tiles, whose number only the
device knows. Tiles run in groups of tiles.GROUP row tiles with the columns outermost: the row tiles of one expert then
share a block of its weights while it is in L2.
"""

import math
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sedetect.kernels.dequantize import QuantizedWeights, dequantize_tile
from sedetect.kernels.plan import Plan
from sedetect.kernels.tiles import QUANTIZED, Tile, choose, limits


def expert_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    """One expert's linear: x (N, K) with weight (M, K), or (K, M) when transposed -> (N, M)."""
    return F.linear(x.to(weight.dtype), weight.t() if transposed else weight, bias)


def grouped_linear_torch(
    rows: torch.Tensor,
    plan: Plan,
    weight: torch.Tensor | QuantizedWeights,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """y[r] = W[e(r)] @ rows[r] + bias[e(r)] for the sorted rows of a plan.

    Args:
        rows: (S, K), sorted by expert; converted to the weight's dtype.
        weight: (E, M, K), or (E, K, M) when transposed.
        bias: (E, M) or None.
    Returns:
        (S, M) in the weight's dtype; rows of no expert (sentinels) are zero.
    """
    y = weight.new_zeros(rows.shape[0], weight.shape[2] if transposed else weight.shape[1])
    offsets = plan.offsets.tolist()
    for e, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            y[start:end] = expert_linear(rows[start:end], weight[e], None if bias is None else bias[e], transposed)
    return y


@triton.jit
def tile_at(index, row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of the index-th tile to run."""
    first = index // (GROUP * COLUMN_TILES) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = index % (GROUP * COLUMN_TILES)
    return first + within % size, within // size


@triton.jit
def weight_columns(tile, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Where a tile's BLOCK_N outputs stand among the weight's COLUMNS outputs: PARTS runs, one in each part of them."""
    column = tl.arange(0, BLOCK_N)
    run: tl.constexpr = BLOCK_N // PARTS
    part: tl.constexpr = COLUMNS // PARTS
    within = tile * run + column % run
    return column // run * part + within, within < part


@triton.jit
def multiply(
    X, stride_xm,  # (rows, K), or its descriptor
    W, stride_we, stride_wn, stride_wk,  # (E, COLUMNS, K) by strides, or its descriptor; as stored
    Scale,  # (E, SCALE_ROWS, SCALE_COLUMNS) of a quantized W, else None
    x_row, column,  # row of X and column of the weight of each output: what pointers need
    row, expert, tile,  # first row, expert and column tile: what descriptors need
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, TRANSPOSED: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """The (BLOCK_M, BLOCK_N) float32 product of a tile. Rows and columns beyond the matrices hold anything."""
    # A dequantized weight is the left operand, which tensor cores take from the registers it is made in.
    SWAPPED: tl.constexpr = SCALES is not None
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if X_TMA:
            x = X.load([row, start])
        elif K % BLOCK_K == 0:
            x = tl.load(X + x_row[:, None] * stride_xm + k[None, :])
        else:
            x = tl.load(X + x_row[:, None] * stride_xm + k[None, :], mask=k[None, :] < K, other=0)
        if SWAPPED:
            w = _quantized_tile(
                W, stride_we, stride_wn, Scale, column, expert, tile, start, K, BLOCK_N, BLOCK_K, PARTS, W_TMA, SCALES
            )
            acc = tl.dot(w.to(x.dtype), x.T, acc, input_precision="ieee")
        else:
            if not W_TMA:
                w_at = W + expert * stride_we + k[:, None] * stride_wk + column[None, :] * stride_wn
                if K % BLOCK_K == 0:
                    w = tl.load(w_at)
                else:
                    w = tl.load(w_at, mask=k[:, None] < K, other=0)
            elif TRANSPOSED:
                w = W.load([expert, start, tile * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            else:
                w = W.load([expert, 0, tile * (BLOCK_N // PARTS), start]).reshape(BLOCK_N, BLOCK_K).T
            acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc.T if SWAPPED else acc


@triton.jit
def _quantized_tile(
    W, stride_we, stride_wn, Scale, column, expert, tile, start,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, W_TMA: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_K) float32 weights of the tile from column start on."""
    PACKED: tl.constexpr = SCALES[5]
    PER_BYTE: tl.constexpr = 2 if PACKED else 1
    WIDTH: tl.constexpr = BLOCK_K // PER_BYTE
    if W_TMA:
        w = W.load([expert, 0, tile * (BLOCK_N // PARTS), start // PER_BYTE]).reshape(BLOCK_N, WIDTH)
    else:
        k = start // PER_BYTE + tl.arange(0, WIDTH)
        w_at = W + expert * stride_we + column[:, None] * stride_wn + k[None, :]
        if K % BLOCK_K == 0:
            w = tl.load(w_at)
        else:
            w = tl.load(w_at, mask=k[None, :] < K // PER_BYTE)
    scales = Scale + expert.to(tl.int64) * (SCALES[0] * SCALES[1])
    w = dequantize_tile(w, scales, column, start, BLOCK_N, BLOCK_K, SCALES[1], SCALES[2], SCALES[3], SCALES[4], PACKED)
    if not W_TMA and K % BLOCK_K != 0:
        w = tl.where((start + tl.arange(0, BLOCK_K))[None, :] < K, w, 0.0)  # what was not loaded holds anything
    return w


def choose_tile(
    gemm: str,
    weight: torch.Tensor | QuantizedWeights,
    rows: int,
    width: int,
    device: torch.device,
    interleaved: bool = False,
) -> Tile:
    """The tile of a GEMM with this weight, whose output is width wide; interleaved: that its gate takes in turns."""
    if isinstance(weight, QuantizedWeights):
        # Neighbours along the transposed side of the product meet in shared memory, in float32.
        scratch = 4 if interleaved else None
        tile = choose(QUANTIZED, rows, weight.dtype, width, device, 0.5 if weight.packed else 1.0, scratch)
        # What no copy engine brings is staged as it stands in registers, wider than it is stored.
        return tile if _copyable(weight.stored) else replace(tile, stages=min(tile.stages, 2))
    return choose(gemm, rows, weight.dtype, width, device)


def row_operand(x: torch.Tensor, tile: Tile) -> torch.Tensor | TensorDescriptor:
    """x (S, K) as the kernels take it: a descriptor where the copy engine can read it."""
    return TensorDescriptor.from_tensor(x, [tile.m, tile.k]) if _copyable(x) else x


class WeightOperand(NamedTuple):
    """A weight as the kernels take it.

    data     the matrices as stored, or their descriptor
    strides  of E, outputs and K
    scale    of quantized weights, else None
    scales   what is known of these before the launch: rows, columns, how many rows and columns of the weight share one,
             how many columns of every aligned tile do, and whether two values share a byte
    """

    data: torch.Tensor | TensorDescriptor
    strides: tuple[int, int, int]
    scale: torch.Tensor | None = None
    scales: tuple[int, int, int, int, int, bool] | None = None

    @property
    def tma(self) -> bool:
        return isinstance(self.data, TensorDescriptor)


def weight_operand(
    weight: torch.Tensor | QuantizedWeights, transposed: bool, tile: Tile, parts: int = 1
) -> WeightOperand:
    """The operand of a weight whose tiles take parts runs."""
    if isinstance(weight, QuantizedWeights):
        return _quantized_operand(weight, tile, parts)
    stride_e, stride_n, stride_k = weight.stride()
    if transposed:
        stride_n, stride_k = stride_k, stride_n
    strides = (stride_e, stride_n, stride_k)
    # Runs of a transposed weight would lie side by side in shared memory, which the tensor cores do not read.
    if not _copyable(weight) or (transposed and parts > 1):
        return WeightOperand(weight, strides)
    if transposed:
        return WeightOperand(TensorDescriptor.from_tensor(weight, [1, tile.k, tile.n]), strides)
    return WeightOperand(_by_parts(weight, parts, tile.n, tile.k), strides)


def _quantized_operand(weight: QuantizedWeights, tile: Tile, parts: int) -> WeightOperand:
    stored, (high, wide) = weight.stored.contiguous(), weight.block
    stride_e, stride_n, stride_k = stored.stride()
    scales = (*weight.scale.shape[1:], high, wide, math.gcd(wide, tile.k), weight.packed)
    width = tile.k // 2 if weight.packed else tile.k
    data = stored
    if _copyable(stored) and width * stored.itemsize >= 16:  # the least that the copy engine moves
        data = _by_parts(stored, parts, tile.n, width)
    return WeightOperand(data, (stride_e, stride_n, stride_k), weight.scale.contiguous(), scales)


def _by_parts(weight: torch.Tensor, parts: int, n: int, k: int) -> TensorDescriptor:
    """A descriptor of (E, M, K) weights that reads n outputs, in as many runs as there are parts, and k columns."""
    experts, outputs, columns = weight.shape
    stride_e, stride_n, _ = weight.stride()
    shape, steps = (experts, parts, outputs // parts, columns), (stride_e, outputs // parts * stride_n, stride_n, 1)
    return TensorDescriptor(weight, shape, steps, [1, parts, n // parts, k])


def _copyable(x: torch.Tensor) -> bool:
    """Whether the device has a copy engine and it takes x: the last dimension dense, all else on 16-byte boundaries."""
    *outer, inner = x.stride()
    aligned = inner == 1 and x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in outer)
    return aligned and limits(x.device).major >= 9 and x.numel() > 0
