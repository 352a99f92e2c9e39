"""The optional statistics, asked for by name: per-channel maxima and squares, and co-activation.

These torch definitions serve every backend; they read the down_proj output and its input once more.
"""

import torch

from sedetect.kernels.plan import Plan
from sedetect.kernels.update import Rows


def update_channels_torch(state, y: torch.Tensor, h: torch.Tensor, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
    """Per expert and channel: max|y| (E, H), max|h| (E, I), and sum of h^2 over finite rows (E, I), in place.

    Args:
        y: (S, H) and h: (S, I), sorted by expert.
        gates: (T, k) routing weights.
    """
    gate = gates.reshape(-1)[plan.order].float()
    counted = rows.counted[plan.order // plan.top_k] & (gate != 0)
    offsets = plan.offsets.tolist()
    for e, (start, end) in enumerate(zip(offsets, offsets[1:])):
        taken = counted[start:end].nonzero().flatten() + start
        if len(taken):
            ys, hs = y[taken].float(), h[taken].float()
            state.channel_max[e] = torch.maximum(state.channel_max[e], ys.abs().amax(0))
            state.in_channel_max[e] = torch.maximum(state.in_channel_max[e], hs.abs().amax(0))
            finite = ys.isfinite().all(1) & gate[taken].isfinite()
            state.in_channel_sq[e] += hs[finite].double().square().sum(0)


def update_coactivation_torch(state, top_k_index: torch.Tensor, gates: torch.Tensor, rows: Rows) -> None:
    """Counted tokens routed to both experts (E, E), in place; the diagonal counts the tokens of one expert."""
    experts = state.num_experts
    used = rows.counted[:, None] & (gates != 0) & (top_k_index >= 0) & (top_k_index < experts)
    chosen = torch.zeros(len(gates), experts + 1, device=gates.device)
    chosen.scatter_(1, torch.where(used, top_k_index, experts), 1.0)
    # float32 products of 0 and 1 are exact below 2^24 tokens a call.
    state.coactivation += (chosen[:, :-1].T @ chosen[:, :-1]).to(torch.int64)
