"""The optional statistics, enabled by name: per-channel maxima and squares, co-activation, and the first rows.

These torch definitions serve every backend. The channels read the down_proj output and its input once more; the
others need only the routing and the row statistics.
"""

from itertools import pairwise

import torch

from sedetect.kernels.plan import Plan
from sedetect.kernels.records import bits_float, float_bits
from sedetect.kernels.rows import Rows


def update_channels_torch(state, y: torch.Tensor, h: torch.Tensor, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
    """Per expert and channel: max|y| (E, H), max|h| (E, I), and sum of h^2 over finite rows (E, I), in place.

    Args:
        y: (S, H) and h: (S, I), sorted by expert.
        gates: (T, k) routing weights.
    """
    gate = gates.reshape(-1)[plan.order].float()
    counted = rows.counted[plan.order // plan.top_k] & (gate != 0)
    offsets = plan.offsets.tolist()
    for e, (start, end) in enumerate(pairwise(offsets)):
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
    chosen = torch.zeros(len(gates), experts + 1, dtype=torch.float32, device=gates.device)
    chosen.scatter_(1, torch.where(used, top_k_index, experts), 1.0)
    # float32 products of 0 and 1 are exact below 2^24 tokens a call.
    state.coactivation += (chosen[:, :-1].T @ chosen[:, :-1]).to(torch.int64)


def update_published_torch(state, best: torch.Tensor, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
    """The published tool's value per expert, max|y| of the first row it is given (E,), in place.

    ZunhaiSu/Super-Experts-Profilling (573aead) hooks the down_proj of each expert and reads output[0], one sequence per
    forward. In transformers 4.51 (Qwen3MoeSparseMoeBlock, MixtralSparseMoeBlock) an expert's rows stand in the order
    (top-k slot, token): its first row is the first token that chose it as top-1, if any did, else as top-2, and so on.
    Here a sequence of the batch takes the place of its forward; of rows that could not be mapped (sequence -1), the
    whole call does. A sequence that goes on in another forward (decoding) begins anew there, as it does in the tool.

    Example: tokens 0, 1, 2 choose (a, b), (b, a), (b, c): the first row of a is token 0, of b token 1, of c token 2.

    Args:
        best: (S,) largest |y| of the sorted rows.
        gates: (T, k) routing weights; slot j of a token is its j-th choice, as the router orders them.
    """
    slots, tokens = plan.order, len(gates)
    token = slots // plan.top_k
    row = torch.arange(len(slots), device=slots.device)
    expert = torch.searchsorted(plan.offsets[1:].contiguous(), row, right=True)  # E for sentinels
    counted = rows.counted[token] & (gates.reshape(-1)[slots] != 0) & (expert < plan.num_experts)
    expert = torch.where(counted, expert, plan.num_experts)
    sequence = rows.sequence[token]
    # Sorted by (expert, sequence, slot, token), least significant key first.
    order = (slots % plan.top_k * tokens + token).argsort()
    for key in (sequence, expert):
        order = order[key[order].argsort(stable=True)]
    expert, sequence = expert[order], sequence[order]
    leads = torch.ones_like(counted)
    leads[1:] = (expert[1:] != expert[:-1]) | (sequence[1:] != sequence[:-1])
    # As integers, which order NaN above Inf.
    bits = torch.where(leads, float_bits(best)[order], 0)
    largest = torch.zeros(plan.num_experts + 1, dtype=torch.int64, device=bits.device)
    largest.scatter_reduce_(0, expert, bits, "amax")
    state.published_max.copy_(torch.maximum(state.published_max, bits_float(largest[:-1])))
