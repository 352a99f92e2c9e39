"""Grouped linear: every expert's matrix on its own rows. The reference and the main loop of the gate_up and down GEMMs.

Triton kernels of this family are persistent: a fixed number of programs walks over all tiles, whose number only the
device knows. Tiles run in groups of tiles.GROUP row tiles with the columns outermost: the row tiles of one expert then
share a block of its weights while it is in L2.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sedetect.kernels.plan import Plan
from sedetect.kernels.tiles import Tile, limits


def expert_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    """One expert's linear: x (N, K) with weight (M, K), or (K, M) when transposed -> (N, M)."""
    return F.linear(x.to(weight.dtype), weight.t() if transposed else weight, bias)


def grouped_linear_torch(
    rows: torch.Tensor, plan: Plan, weight: torch.Tensor, bias: torch.Tensor | None = None, transposed: bool = False
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
    for e, (start, end) in enumerate(zip(offsets, offsets[1:])):
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
    W, stride_we, stride_wn, stride_wk,  # (E, COLUMNS, K) by strides, or its descriptor
    x_row, column,  # row of X and column of the weight of each output: what pointers need
    row, expert, tile,  # first row, expert and column tile: what descriptors need
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The (BLOCK_M, BLOCK_N) float32 product of a tile. Rows and columns beyond the matrices hold anything."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if X_TMA:
            x = X.load([row, start])
        elif K % BLOCK_K == 0:
            x = tl.load(X + x_row[:, None] * stride_xm + k[None, :])
        else:
            x = tl.load(X + x_row[:, None] * stride_xm + k[None, :], mask=k[None, :] < K, other=0)
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
    return acc


def row_operand(x: torch.Tensor, tile: Tile) -> torch.Tensor | TensorDescriptor:
    """x (S, K) as the kernels take it: a descriptor where the copy engine can read it."""
    return TensorDescriptor.from_tensor(x, [tile.m, tile.k]) if _copyable(x) else x


def weight_operand(
    weight: torch.Tensor, transposed: bool, tile: Tile, parts: int = 1
) -> tuple[torch.Tensor | TensorDescriptor, bool, tuple[int, int, int]]:
    """(operand, whether it is a descriptor, strides of E, outputs and K) of a weight whose tiles take parts runs."""
    stride_e, stride_n, stride_k = weight.stride()
    if transposed:
        stride_n, stride_k = stride_k, stride_n
    strides = (stride_e, stride_n, stride_k)
    # Runs of a transposed weight would lie side by side in shared memory, which the tensor cores do not read.
    if not _copyable(weight) or (transposed and parts > 1):
        return weight, False, strides
    if transposed:
        return TensorDescriptor.from_tensor(weight, [1, tile.k, tile.n]), True, strides
    experts, outputs, k = weight.shape
    shape, steps = (experts, parts, outputs // parts, k), (stride_e, outputs // parts * stride_n, stride_n, stride_k)
    return TensorDescriptor(weight, shape, steps, [1, parts, tile.n // parts, tile.k]), True, strides


def _copyable(x: torch.Tensor) -> bool:
    """Whether the device has a copy engine and it takes x: the last dimension dense, all else on 16-byte boundaries."""
    *outer, inner = x.stride()
    aligned = inner == 1 and x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in outer)
    return aligned and limits(x.device).major >= 9 and x.numel() > 0
