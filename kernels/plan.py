"""Plan: which routed rows belong to which expert, as one sort and one prefix sum.

T tokens, k experts per token, S = T*k slots, E experts. Slot s is the (s % k)-th choice of token s // k.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """Routing of one experts call, sorted by expert.

    order    (S,) int64: slot of each sorted row; stable, so an expert's rows stand in token order
    offsets  (E + 1,) int64: expert e owns sorted rows offsets[e] .. offsets[e + 1] - 1
    top_k    k

    Slots whose index is outside [0, E) (expert-parallel sentinels) sort to the tail, beyond offsets[E].

    Example: E = 3, k = 2, top_k_index = [[2, 0], [2, 3], [0, 2]] (3 is a sentinel)
        slots    0->2  1->0  2->2  3->3  4->0  5->2
        order    [1, 4, 0, 2, 5, 3]
        offsets  [0, 2, 2, 5]
    """

    order: torch.Tensor
    offsets: torch.Tensor
    top_k: int

    @property
    def num_experts(self) -> int:
        return len(self.offsets) - 1


def plan_torch(top_k_index: torch.Tensor, num_experts: int) -> Plan:
    """Sort the routing (T, k) int by expert. Runs without host synchronisation."""
    experts = top_k_index.reshape(-1).to(torch.int64)
    experts = torch.where((experts >= 0) & (experts < num_experts), experts, num_experts)
    order = experts.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    offsets[1:] = counts[:-1].cumsum(0)
    return Plan(order, offsets, top_k_index.shape[1])


def single_plan(tokens: int, device: torch.device) -> Plan:
    """The plan of a bank with one expert that every token visits (shared experts, dense MLPs)."""
    return Plan(torch.arange(tokens, device=device), torch.tensor([0, tokens], device=device), 1)
