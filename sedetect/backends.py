"""Backends: the same stages (sedetect.contract), computed in different ways.

torch is the definition and runs anywhere. cpu is torch's GEMMs with the row statistics of csrc/, taken while the
output is in cache. triton are the kernels of kernels/, cuda those of csrc/cuda/ for Hopper GPUs. Every stage takes and
gives what the torch reference of its file in kernels/ documents.
"""

import importlib.util
import math
from types import ModuleType
from typing import Any

import torch

from sedetect.contract import Backend, ExpertWeights, by_stages, gate_refusal
from sedetect.cuda_backend import CudaBackend
from sedetect.errors import SedetectError
from sedetect.kernels.combine import combine_torch
from sedetect.kernels.down import down_torch
from sedetect.kernels.gate_up import gate_up_torch
from sedetect.kernels.grouped import grouped_linear_torch
from sedetect.kernels.plan import Plan, plan_torch
from sedetect.kernels.row_stats import RowStats, row_stats_torch
from sedetect.kernels.rows import Rows
from sedetect.kernels.update import update_torch
from sedetect.stats import BankStats
from sedetect.triton_backend import TritonBackend

_C = importlib.import_module("sedetect._C") if importlib.util.find_spec("sedetect._C") is not None else None


class TorchBackend:
    """The torch references. Synchronises with the host in every experts call, to loop over experts."""

    name = "torch"

    def refusal(
        self, device: torch.device, dtype: torch.dtype, experts: int = 1, weights: ExpertWeights | None = None
    ) -> str | None:
        return None

    def plan(self, top_k_index: torch.Tensor, num_experts: int) -> Plan:
        return plan_torch(top_k_index, num_experts)

    def gate_up(self, x: torch.Tensor, plan: Plan, weights: ExpertWeights) -> torch.Tensor:
        return gate_up_torch(x, plan, weights.gate_up, weights.gate_up_bias, weights.transposed)

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


class CpuBackend:
    """torch's GEMMs, expert by expert and in chunks that stay in cache, with the statistics of csrc/.

    extension: sedetect._C, None where it is not built.
    """

    name = "cpu"
    activations = frozenset({"silu", "gelu", "gelu_tanh", "relu2"})  # csrc/experts_cpu.cpp

    def __init__(self, extension: ModuleType | None = _C):
        self._c: Any = extension

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
            return gate_up_torch(x, plan, weights.gate_up, weights.gate_up_bias, weights.transposed)
        return self._c.gate_up_cpu(x.to(weights.gate_up.dtype), _plan(plan), _gate_up(weights))

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
        stats = RowStats.empty(len(plan.order))
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


# As csrc/cpu.h takes them.


def _plan(plan: Plan) -> tuple[torch.Tensor, torch.Tensor, int]:
    return plan.order, plan.offsets, plan.top_k


def _gate_up(weights: ExpertWeights) -> tuple[Any, torch.Tensor | None, bool]:
    return weights.gate_up, weights.gate_up_bias, weights.transposed


def _down(weights: ExpertWeights) -> tuple[Any, torch.Tensor | None, bool]:
    return weights.down, weights.down_bias, weights.transposed


# In the order of preference.
BACKENDS: dict[str, Backend[Any]] = {
    "cpu": CpuBackend(),
    "cuda": CudaBackend(),
    "triton": TritonBackend(),
    "torch": TorchBackend(),
}


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    wanted: str | None = None,
    experts: int = 1,
    weights: ExpertWeights | None = None,
) -> tuple[Backend[Any], str | None]:
    """The backend that serves a call, and why it is not the wanted one (None if it is, or none was named).

    Without experts and weights: the backend that serves calls of a layer, where nothing about them stands against it.

    Raises SedetectError for an unknown name.
    """
    check_backend(wanted)
    call, why = (device, dtype, experts, weights), None
    if wanted is not None:
        reason = BACKENDS[wanted].refusal(*call)
        if reason is None:
            return BACKENDS[wanted], None
        why = f"backend {wanted} does not serve {dtype} on {device}: {reason}"
    return next(b for b in BACKENDS.values() if b.refusal(*call) is None), why


def missing_fast_path(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the cuda backend does not serve a GPU's layers of this dtype; None where it does, and on other devices."""
    reason = BACKENDS["cuda"].refusal(device, dtype) if device.type == "cuda" else None
    return reason and f"the cuda backend served nothing: {reason}"


def check_backend(name: str | None) -> None:
    """Raise SedetectError for a backend that does not exist."""
    if name is not None and name not in BACKENDS:
        raise SedetectError(f"backend {name!r} does not exist; choose one of {', '.join(BACKENDS)}")
