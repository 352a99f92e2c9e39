"""The torch backend: the reference for every stage, on any device."""

import torch

from sedetect.kernels.combine import combine_torch
from sedetect.kernels.down import down_torch
from sedetect.kernels.gate_up import gate_up_torch
from sedetect.kernels.plan import Plan, plan_torch
from sedetect.kernels.row_stats import RowStats, row_stats_torch
from sedetect.kernels.rows import Rows
from sedetect.kernels.update import update_torch
from sedetect.ops.contract import ExpertWeights, by_stages
from sedetect.stats.bank import BankStats


class TorchBackend:
    """The torch references. Synchronizes with the host in every experts call, to loop over experts."""

    name = "torch"

    def refusal(
        self, device: torch.device, dtype: torch.dtype, experts: int = 1, weights: ExpertWeights | None = None
    ) -> str | None:
        return None

    def plan(self, top_k_index: torch.Tensor, num_experts: int) -> Plan:
        return plan_torch(top_k_index, num_experts)

    def gate_up(self, x: torch.Tensor, plan: Plan, weights: ExpertWeights) -> torch.Tensor:
        return gate_up_torch(x, plan, weights.stacked, weights.gate_up_bias, weights.transposed)

    def down(self, h: torch.Tensor, plan: Plan, weights: ExpertWeights) -> tuple[torch.Tensor, RowStats]:
        return down_torch(h, plan, weights.down, weights.down_bias, weights.transposed)

    def experts(
        self, x: torch.Tensor, plan: Plan, weights: ExpertWeights, gates: torch.Tensor
    ) -> tuple[torch.Tensor, RowStats]:
        return by_stages(self, x, plan, weights, gates)

    def row_stats(self, y: torch.Tensor, h: torch.Tensor) -> RowStats:
        return row_stats_torch(y, h)

    def combine(self, y: torch.Tensor, plan: Plan, gates: torch.Tensor) -> torch.Tensor:
        return combine_torch(y, plan, gates)

    def update(self, state: BankStats, found: RowStats, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
        update_torch(state, found, plan, gates, rows)
