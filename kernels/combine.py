"""Combine: the routing-weighted sum of a token's k expert outputs, in float32. y (S, H) -> (T, H)."""

import torch

from sedetect.kernels.plan import Plan


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
