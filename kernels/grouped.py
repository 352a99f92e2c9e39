"""Grouped linear: every expert's matrix on its own rows. The reference of the gate_up and down GEMMs."""

import torch
import torch.nn.functional as F

from sedetect.kernels.plan import Plan


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
