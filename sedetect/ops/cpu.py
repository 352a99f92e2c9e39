"""The CPU backend: torch's GEMMs with the row statistics of csrc/."""

import importlib.util
import math
from types import ModuleType
from typing import Any

import torch

from sedetect.kernels.combine import combine_torch
from sedetect.kernels.gate_up import gate_up_torch
from sedetect.kernels.grouped import grouped_linear_torch
from sedetect.kernels.plan import Plan
from sedetect.kernels.row_stats import RowStats
from sedetect.kernels.rows import Rows
from sedetect.ops.contract import ExpertWeights, by_stages, gate_refusal
from sedetect.stats.bank import BankStats

_C = importlib.import_module("sedetect._C") if importlib.util.find_spec("sedetect._C") is not None else None


class CpuBackend:
    """torch's GEMMs, expert by expert and in chunks that stay in cache, with the statistics of csrc/.

    extension: sedetect._C, None where it is not built.
    """

    name = "cpu"
    activations = frozenset({"silu", "gelu", "gelu_tanh", "relu2"})  # csrc/experts_cpu.cpp

    def __init__(self, extension: ModuleType | None = _C):
        self._c: Any = extension

    @property
    def built(self) -> bool:
        return self._c is not None

    def refusal(
        self, device: torch.device, dtype: torch.dtype, experts: int = 1, weights: ExpertWeights | None = None
    ) -> str | None:
        if device.type != "cpu":
            return f"it serves CPU tensors, these are on {device}"
        if self._c is None:
            return "sedetect._C is not built; install sedetect again where a C++ compiler is found"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it has no kernel for {dtype}"
        return None if weights is None else gate_refusal(weights, self.activations)

    def plan(self, top_k_index: torch.Tensor, num_experts: int) -> Plan:
        order, offsets = self._c.plan_cpu(top_k_index, num_experts)
        return Plan(order, offsets, top_k_index.shape[1])

    def gate_up(self, x: torch.Tensor, plan: Plan, weights: ExpertWeights) -> torch.Tensor:
        if weights.storage:  # quantized: one expert's matrix at a time
            return gate_up_torch(x, plan, weights.stacked, weights.gate_up_bias, weights.transposed)
        z: torch.Tensor = self._c.gate_up_cpu(x.to(weights.stacked.dtype), _plan(plan), _gate_up(weights))
        return z

    def down(self, h: torch.Tensor, plan: Plan, weights: ExpertWeights) -> tuple[torch.Tensor, RowStats]:
        h = h.to(weights.dtype).contiguous()
        if weights.storage:
            y = grouped_linear_torch(h, plan, weights.down, weights.down_bias, weights.transposed)
            return y, self.row_stats(y, h)
        y = h.new_zeros(len(h), weights.hidden)
        stats = RowStats.empty(len(h))
        self._c.down_cpu(h, _plan(plan), _down(weights), stats.tensors(), y)
        return y, stats

    def experts(
        self, x: torch.Tensor, plan: Plan, weights: ExpertWeights, gates: torch.Tensor
    ) -> tuple[torch.Tensor, RowStats]:
        gate = weights.fused_gate
        if weights.storage or gate is None:
            return by_stages(self, x, plan, weights, gates)
        out = torch.zeros(len(x), weights.hidden, dtype=torch.float32)
        stats = RowStats.empty(plan.slots)
        limit = math.inf if gate.limit is None else gate.limit
        spec = (gate.activation, gate.gated, gate.interleaved, limit, gate.slope, gate.shift)
        x, gates = x.to(weights.dtype), gates.float().contiguous()
        self._c.experts_cpu(x, _plan(plan), _gate_up(weights), spec, _down(weights), gates, stats.tensors(), out)
        return out, stats

    def row_stats(self, y: torch.Tensor, h: torch.Tensor) -> RowStats:
        stats = RowStats.empty(len(y))
        self._c.row_stats_cpu(y.contiguous(), h.contiguous(), stats.tensors())
        return stats

    def combine(self, y: torch.Tensor, plan: Plan, gates: torch.Tensor) -> torch.Tensor:
        return combine_torch(y, plan, gates)

    def update(self, state: BankStats, found: RowStats, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
        tables = [state.counts, state.sums, state.outliers, state.first_outliers, state.in_max]
        gates = gates.float().contiguous()
        self._c.update_cpu(tables, found.tensors(), _plan(plan), gates, rows.tensors(), rows.source)


def _plan(plan: Plan) -> tuple[torch.Tensor, torch.Tensor, int]:
    return plan.order, plan.offsets, plan.top_k


def _gate_up(weights: ExpertWeights) -> tuple[Any, torch.Tensor | None, bool]:
    return weights.gate_up, weights.gate_up_bias, weights.transposed


def _down(weights: ExpertWeights) -> tuple[Any, torch.Tensor | None, bool]:
    return weights.down, weights.down_bias, weights.transposed
