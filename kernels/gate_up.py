"""Gate_up: gather each expert's tokens and apply its gate and up projections. x (T, H) -> (S, 2I)."""

import torch

from sedetect.kernels.grouped import grouped_linear_torch
from sedetect.kernels.plan import Plan


def gate_up_torch(
    x: torch.Tensor, plan: Plan, weight: torch.Tensor, bias: torch.Tensor | None = None, transposed: bool = False
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
