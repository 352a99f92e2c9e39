"""Combine: the routing-weighted sum of a token's k expert outputs, in float32. y (S, H) -> (T, H).

Every row of y passes through here once, in a kernel that waits for memory, so that its statistics can be taken here:
the sum of squares, and the largest |y| with the part of the row that holds it.
"""

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.launch import launch
from sedetect.kernels.plan import Plan, scheduled
from sedetect.kernels.row_scan import row_peak, row_squares
from sedetect.kernels.row_stats import RowParts


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


def combine(
    y: torch.Tensor,
    plan: Plan,
    gates: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    h: torch.Tensor | None = None,
    in_parts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowParts | None]:
    """combine_torch, rounded to dtype; with h (S, I) and in_parts, both of gate_up, also the statistics of the rows.

    Statistics of rows of no expert are undefined.
    """
    schedule = scheduled(plan).schedule
    y, gates = y.contiguous(), gates.contiguous()
    tokens, hidden = gates.shape[0], y.shape[1]
    out = torch.empty(tokens, hidden, dtype=dtype, device=y.device)
    found = None if h is None or in_parts is None else RowParts.empty(y, h, in_parts)
    if tokens:
        # The statistics of a row need the whole row in one program.
        rows, block = tiles.row_block(hidden, whole=h is not None)
        launch(
            _combine,
            (tiles.cdiv(tokens, rows), tiles.cdiv(hidden, block), 1),
            (
                y, gates, schedule.row, plan.offsets, out,
                *(3 * [None] if found is None else (found.best, found.part, found.sqnorm)),
                tokens,
            ),
            {
                "EXPERTS": plan.num_experts, "H": hidden, "TOP_K": plan.top_k, "BLOCK_T": rows, "BLOCK_H": block,
                "PART": None if found is None else found.y_part_width,
            },
            num_warps=tiles.row_warps(rows * block, whole=h is not None),
        )  # fmt: skip
    return out, found
