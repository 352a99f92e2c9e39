"""Combine: the routing-weighted sum of a token's k expert outputs, in float32. y (S, H) -> (T, H).

Every row of y passes through here once, in a kernel that waits for memory, so that its statistics can be taken here.
"""

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.plan import Plan, scheduled
from sedetect.kernels.row_scan import NO_KEY, row_counts, row_key, row_squares, store_row_stats
from sedetect.kernels.row_stats import RowStats


def combine_torch(y: torch.Tensor, plan: Plan, gates: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over j of gates[t, j] * y[row of slot (t, j)], added in the order of j.

    Args:
        y: (S, H) sorted by expert; rows of no expert are not read.
        gates: (T, k) routing weights.
    Returns:
        (T, H) float32; float64 for y in float64.
    """
    tokens, k = gates.shape
    routed = plan.offsets[-1]
    by_slot = torch.empty_like(y)
    by_slot[plan.order] = torch.where(torch.arange(len(y), device=y.device)[:, None] < routed, y, 0)
    by_slot = by_slot.view(tokens, k, y.shape[1])
    dtype = torch.promote_types(y.dtype, torch.float32)
    out = torch.zeros(tokens, y.shape[1], dtype=dtype, device=y.device)
    for j in range(k):
        out += gates[:, j, None].to(dtype) * by_slot[:, j].to(dtype)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    Y,  # (S, H)
    Gates,  # (T, k)
    Row,  # (S,) int32
    Offsets,  # (E + 1,) int64
    Out,  # (T, H) - output
    InKeys,  # (IN_TILES, S) int64 of h, or None: no statistics
    Peak, Channel, Sqnorm, Nonfinite, OverFp16, OverFp8, InPeak, InChannel,  # RowStats, (S,) each - output
    tokens,
    EXPERTS: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, IN_TILES: tl.constexpr, BLOCK_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    routed = tl.load(Offsets + EXPERTS)
    out = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for j in range(TOP_K):
        row = tl.load(Row + token * TOP_K + j, mask=token < tokens, other=2**31 - 1).to(tl.int64)
        kept = row < routed
        y = tl.load(Y + row[:, None] * H + column, mask=(column < H) & kept[:, None], other=0)
        gate = tl.load(Gates + token * TOP_K + j, mask=kept, other=0).to(tl.float32)
        out += gate[:, None] * y.to(tl.float32)
        if InKeys is not None:
            key = row_key(y, 0, H, BLOCK_H)
            nonfinite, over_fp16, over_fp8 = row_counts(y, key, 0, H, BLOCK_H, True)
            tile = tl.arange(0, BLOCK_TILES).to(tl.int64)[None, :]
            in_at = InKeys + tile * (tokens * TOP_K) + row[:, None]
            in_key = tl.max(tl.load(in_at, mask=(tile < IN_TILES) & kept[:, None], other=NO_KEY), 1)
            store_row_stats(
                row, kept, key, row_squares(y, 0, H, BLOCK_H), nonfinite, over_fp16, over_fp8, in_key,
                Peak, Channel, Sqnorm, Nonfinite, OverFp16, OverFp8, InPeak, InChannel,
            )  # fmt: skip
    tl.store(
        Out + token[:, None] * H + column, out.to(Out.dtype.element_ty), mask=(column < H) & (token < tokens)[:, None]
    )


def combine(
    y: torch.Tensor,
    plan: Plan,
    gates: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    in_keys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowStats | None]:
    """combine_torch, rounded to dtype; with in_keys, which gate_up found, also the statistics of the rows of y.

    Statistics of rows of no expert are undefined.
    """
    plan, y, gates = scheduled(plan), y.contiguous(), gates.contiguous()
    tokens, hidden = len(gates), y.shape[1]
    out = torch.empty(tokens, hidden, dtype=dtype, device=y.device)
    stats = None if in_keys is None else RowStats.empty(len(y), y.device)
    if tokens:
        in_tiles = 1 if in_keys is None else len(in_keys)
        # The statistics of a row need the whole row in one program.
        rows, block = tiles.row_block(hidden, whole=in_keys is not None)
        _combine[(triton.cdiv(tokens, rows), triton.cdiv(hidden, block))](
            y, gates, plan.schedule.row, plan.offsets, out,
            in_keys, *(8 * [None] if stats is None else stats.tensors()),
            tokens,
            EXPERTS=plan.num_experts, H=hidden, TOP_K=plan.top_k,
            IN_TILES=in_tiles, BLOCK_TILES=triton.next_power_of_2(in_tiles),
            BLOCK_T=rows, BLOCK_H=block, num_warps=tiles.row_warps(rows * block),
        )  # fmt: skip
    return out, stats
