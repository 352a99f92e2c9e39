"""Sort rows: the tokens' inputs in the order of the experts. x (T, H) -> (S, H)."""

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.launch import launch
from sedetect.kernels.plan import Plan, ScheduledPlan


def sort_rows_torch(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Row r is x[order[r] // k]."""
    return x[plan.order // plan.top_k]


@triton.jit
def _sort_rows(
    X,  # (T, H)
    Row,  # (S,) int32
    Offsets,  # (E + 1,) int64
    Out,  # (S, H) - output
    EXPERTS: tl.constexpr, H: tl.constexpr, TOP_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    routed = tl.load(Offsets + EXPERTS)
    x = tl.load(X + token * H + column, mask=column < H)
    for j in range(TOP_K):
        row = tl.load(Row + token * TOP_K + j).to(tl.int64)
        tl.store(Out + row * H + column, x, mask=(column < H) & (row < routed))


def sort_rows(x: torch.Tensor, plan: ScheduledPlan) -> torch.Tensor:
    """sort_rows_torch, reading every token once; rows of no expert are not written."""
    x = x.contiguous()
    out = x.new_empty(plan.slots, x.shape[1])
    if len(out):
        block = min(tiles.next_power_of_2(x.shape[1]), tiles.ROW_ELEMENTS)
        launch(
            _sort_rows,
            (len(out) // plan.top_k, tiles.cdiv(x.shape[1], block), 1),
            (x, plan.schedule.row, plan.offsets, out),
            {"EXPERTS": plan.num_experts, "H": x.shape[1], "TOP_K": plan.top_k, "BLOCK_H": block},
            num_warps=8,
        )
    return out
