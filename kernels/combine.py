"""Combine: the routing-weighted sum of a token's k expert outputs, in float32. y (S, H) -> (T, H).

Every row of y passes through here once, in a kernel that waits for memory, so that its statistics can be taken here:
the sum of squares, and the largest |y| with the part of the row that holds it. Where in that part it stands is looked
up by a second kernel, which takes the rows in sorted order, so that what it reads and writes lies together.
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
    some_in_row,
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


@triton.jit(do_not_specialize=["tokens"])
def _combine(
    Y,  # (S, H)
    Gates,  # (T, k)
    Row,  # (S,) int32
    Offsets,  # (E + 1,) int64
    Out,  # (T, H) - output
    Best, Part, Sqnorm,  # (S,) - output, or None: bits of each row's largest |y| as float32, the part with it
    tokens,
    EXPERTS: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, PART: tl.constexpr,
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
        if Best is not None:
            best, part = row_peak(y, BLOCK_H, PART)
            tl.store(Best + row, best.to(tl.float32, bitcast=True), mask=kept)
            tl.store(Part + row, part, mask=kept)
            tl.store(Sqnorm + row, row_squares(y), mask=kept)
    tl.store(
        Out + token[:, None] * H + column, out.to(Out.dtype.element_ty), mask=(column < H) & (token < tokens)[:, None]
    )


@triton.jit(do_not_specialize=["slots"])
def _find_peaks(
    Y,  # (S, H)
    X,  # (S, WIDTH), the input of down
    InParts,  # (IN_PARTS, S) float32, of X
    Offsets,  # (E + 1,) int64
    Peak, Channel,  # (S,) - in place: from what _combine left to what RowStats means
    Nonfinite, OverFp16, OverFp8, InPeak, InChannel,  # RowStats, (S,) each - output
    slots,
    EXPERTS: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
    IN_PARTS: tl.constexpr, IN_PARTS_BLOCK: tl.constexpr, IN_PART: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = row < tl.load(Offsets + EXPERTS)
    best = tl.load(Peak + row, mask=kept, other=0).to(tl.int32, bitcast=True)
    peak, channel = read_peak(Y, row, kept, best, tl.load(Channel + row, mask=kept, other=0), H, PART)
    in_part = tl.arange(0, IN_PARTS_BLOCK)[None, :]
    in_at = InParts + in_part.to(tl.int64) * slots + row[:, None]
    in_best, in_part = first_part(magnitude(tl.load(in_at, mask=(in_part < IN_PARTS) & kept[:, None], other=0)))
    in_peak, in_channel = read_peak(X, row, kept, in_best, in_part, WIDTH, IN_PART)
    nonfinite = tl.zeros((BLOCK,), tl.int32)
    over_fp16 = tl.zeros((BLOCK,), tl.int32)
    over_fp8 = tl.zeros((BLOCK,), tl.int32)
    # Hardly any row has something to count: those that do are read again.
    if some_to_count(best):
        for start in range(0, H, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)[None, :]
            read = (column < H) & (kept & some_in_row(best))[:, None]
            more = row_counts(tl.load(Y + row[:, None] * H + column, mask=read, other=0))
            nonfinite += more[0]
            over_fp16 += more[1]
            over_fp8 += more[2]
    # Every thread has read what Peak and Channel held.
    tl.debug_barrier()
    tl.store(Peak + row, peak, mask=kept)
    tl.store(Channel + row, channel, mask=kept)
    tl.store(Nonfinite + row, nonfinite, mask=kept)
    tl.store(OverFp16 + row, over_fp16, mask=kept)
    tl.store(OverFp8 + row, over_fp8, mask=kept)
    tl.store(InPeak + row, in_peak, mask=kept)
    tl.store(InChannel + row, in_channel, mask=kept)


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
        # The statistics of a row need the whole row in one program.
        rows, block = tiles.row_block(hidden, whole=h is not None)
        part = tiles.part(block, y.dtype)
        _combine[(triton.cdiv(tokens, rows), triton.cdiv(hidden, block))](
            y, gates, plan.schedule.row, plan.offsets, out,
            *(3 * [None] if stats is None else (stats.peak, stats.channel, stats.sqnorm)),
            tokens,
            EXPERTS=plan.num_experts, H=hidden, TOP_K=plan.top_k, BLOCK_T=rows, BLOCK_H=block, PART=part,
            num_warps=tiles.row_warps(rows * block, whole=h is not None),
        )  # fmt: skip
        if stats is not None:
            width, parts = h.shape[1], len(in_parts)
            _find_peaks[(triton.cdiv(len(y), tiles.PEAK_ROWS),)](
                y, h, in_parts, plan.offsets,
                stats.peak, stats.channel, stats.nonfinite, stats.over_fp16, stats.over_fp8,
                stats.in_peak, stats.in_channel,
                len(y),
                EXPERTS=plan.num_experts, H=hidden, WIDTH=width, PART=part,
                IN_PARTS=parts, IN_PARTS_BLOCK=triton.next_power_of_2(parts),
                IN_PART=triton.next_power_of_2(triton.cdiv(width, parts)),
                BLOCK=tiles.PEAK_ROWS, BLOCK_H=128,
            )  # fmt: skip
    return out, stats
