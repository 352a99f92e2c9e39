"""Combine: the routing-weighted sum of a token's k expert outputs, in float32. y (S, H) -> (T, H).

Every row of y passes through here once, in a kernel that waits for memory, so that its statistics can be taken here.
"""

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.plan import Plan, scheduled
from sedetect.kernels.row_scan import (
    first_part,
    magnitude,
    read_peak,
    row_counts,
    row_peak,
    row_squares,
    some_to_count,
)
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


@triton.jit
def _slot(Row, token, j, tokens, routed, TOP_K: tl.constexpr):
    """(sorted row int64, whether it has an expert) of the j-th choice of tokens."""
    row = tl.load(Row + token * TOP_K + j, mask=(token < tokens) & (j < TOP_K), other=2**31 - 1).to(tl.int64)
    return row, row < routed


@triton.jit
def _load_rows(Y, row, kept, column, H: tl.constexpr):
    return tl.load(Y + row[:, None] * H + column, mask=(column < H) & kept[:, None], other=0)


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    Y,  # (S, H)
    Gates,  # (T, k)
    Row,  # (S,) int32
    Offsets,  # (E + 1,) int64
    Out,  # (T, H) - output
    X,  # (S, WIDTH), the input of down, or None: no statistics
    InParts,  # (IN_PARTS, S) float32, of X
    Peak, Channel, Sqnorm, Nonfinite, OverFp16, OverFp8, InPeak, InChannel,  # RowStats, (S,) each - output
    tokens,
    EXPERTS: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    WIDTH: tl.constexpr, IN_PARTS: tl.constexpr, IN_PARTS_BLOCK: tl.constexpr, IN_PART: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    routed = tl.load(Offsets + EXPERTS)
    out = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for j in range(TOP_K):
        row, kept = _slot(Row, token, j, tokens, routed, TOP_K)
        y = _load_rows(Y, row, kept, column, H)
        gate = tl.load(Gates + token * TOP_K + j, mask=kept, other=0).to(tl.float32)
        out += gate[:, None] * y.to(tl.float32)
        if X is not None:
            # Until all k rows are worked out together, their Peak holds a magnitude and their Channel a part.
            best, part = row_peak(y, BLOCK_H, PART)
            tl.store(Peak + row, best.to(tl.float32, bitcast=True), mask=kept)
            tl.store(Channel + row, part, mask=kept)
            tl.store(Sqnorm + row, row_squares(y), mask=kept)
    tl.store(
        Out + token[:, None] * H + column, out.to(Out.dtype.element_ty), mask=(column < H) & (token < tokens)[:, None]
    )
    if X is not None:
        tl.debug_barrier()
        slot = tl.arange(0, BLOCK_T * SLOTS)
        slot_token = tl.program_id(0).to(tl.int64) * BLOCK_T + slot // SLOTS
        rows, keep = _slot(Row, slot_token, slot % SLOTS, tokens, routed, TOP_K)
        bests = tl.load(Peak + rows, mask=keep, other=0).to(tl.int32, bitcast=True)
        parts = tl.load(Channel + rows, mask=keep, other=0)
        in_part = tl.arange(0, IN_PARTS_BLOCK)[None, :]
        in_at = InParts + in_part.to(tl.int64) * (tokens * TOP_K) + rows[:, None]
        in_bits = magnitude(tl.load(in_at, mask=(in_part < IN_PARTS) & keep[:, None], other=0))
        in_bests, in_parts = first_part(in_bits)
        peak, channel = read_peak(Y, rows, keep, bests, parts, H, PART)
        in_peak, in_channel = read_peak(X, rows, keep, in_bests, in_parts, WIDTH, IN_PART)
        # Every thread has read what Peak and Channel held.
        tl.debug_barrier()
        tl.store(Peak + rows, peak, mask=keep)
        tl.store(Channel + rows, channel, mask=keep)
        tl.store(Nonfinite + rows, 0, mask=keep)
        tl.store(OverFp16 + rows, 0, mask=keep)
        tl.store(OverFp8 + rows, 0, mask=keep)
        tl.store(InPeak + rows, in_peak, mask=keep)
        tl.store(InChannel + rows, in_channel, mask=keep)
        # Hardly any row has something to count: those that do are read again.
        if some_to_count(bests):
            tl.debug_barrier()
            for j in range(TOP_K):
                row, kept = _slot(Row, token, j, tokens, routed, TOP_K)
                nonfinite, over_fp16, over_fp8 = row_counts(_load_rows(Y, row, kept, column, H))
                tl.store(Nonfinite + row, nonfinite, mask=kept)
                tl.store(OverFp16 + row, over_fp16, mask=kept)
                tl.store(OverFp8 + row, over_fp8, mask=kept)


def combine(
    y: torch.Tensor,
    plan: Plan,
    gates: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    h: torch.Tensor | None = None,
    in_parts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowStats | None]:
    """combine_torch, rounded to dtype; with h (S, I) and in_parts, both of gate_up, also the statistics of the rows.

    Statistics of rows of no expert are undefined.
    """
    plan, y, gates = scheduled(plan), y.contiguous(), gates.contiguous()
    tokens, hidden = len(gates), y.shape[1]
    out = torch.empty(tokens, hidden, dtype=dtype, device=y.device)
    stats = None if h is None else RowStats.empty(len(y), y.device)
    if tokens:
        width, parts = (1, 1) if h is None else (h.shape[1], len(in_parts))
        # The statistics of a row need the whole row in one program.
        rows, block = tiles.row_block(hidden, whole=h is not None)
        _combine[(triton.cdiv(tokens, rows), triton.cdiv(hidden, block))](
            y, gates, plan.schedule.row, plan.offsets, out,
            h, in_parts, *(8 * [None] if stats is None else stats.tensors()),
            tokens,
            EXPERTS=plan.num_experts, H=hidden, TOP_K=plan.top_k, SLOTS=triton.next_power_of_2(plan.top_k),
            WIDTH=width, IN_PARTS=parts, IN_PARTS_BLOCK=triton.next_power_of_2(parts),
            IN_PART=triton.next_power_of_2(triton.cdiv(width, parts)),
            BLOCK_T=rows, BLOCK_H=block, PART=tiles.part(block, y.dtype),
            num_warps=tiles.row_warps(rows * block, whole=h is not None),
        )  # fmt: skip
    return out, stats
