"""Backends: the same five stages, computed in different ways.

torch is the definition and runs anywhere. cpu is torch's GEMMs with the row statistics of csrc/, taken while the
output is in cache. triton are the kernels of kernels/, cuda those of csrc/cuda/ for Hopper GPUs. Every stage takes and
gives what the torch reference of its file in kernels/ documents.
"""

import math

import torch

from sedetect import _C
from sedetect.call import Call
from sedetect.cuda_backend import CudaBackend
from sedetect.errors import SedetectError
from sedetect.kernels.combine import combine_torch
from sedetect.kernels.gate import Gate, gate_torch
from sedetect.kernels.gate_up import gate_up_torch
from sedetect.kernels.grouped import grouped_linear_torch
from sedetect.kernels.plan import Plan, plan_torch
from sedetect.kernels.row_stats import RowStats, row_stats_torch
from sedetect.kernels.rows import Rows
from sedetect.kernels.update import update_torch
from sedetect.stats import BankStats
from sedetect.triton_backend import TritonBackend


class TorchBackend:
    """The torch references. Synchronises with the host in every experts call, to loop over experts."""

    name = "torch"

    def refusal(self, device: torch.device, dtype: torch.dtype, call: Call | None = None) -> str | None:
        """Why this backend cannot serve a layer of this device and weight dtype, or a call; None if it can."""
        return None

    def plan(self, top_k_index: torch.Tensor, num_experts: int) -> Plan:
        return plan_torch(top_k_index, num_experts)

    def gate_up(self, x, plan, weight, bias, transposed) -> torch.Tensor:
        return gate_up_torch(x, plan, weight, bias, transposed)

    def down(self, h, plan, weight, bias, transposed) -> tuple[torch.Tensor, RowStats]:
        """(y (S, H), statistics of its rows)."""
        h = h.to(weight.dtype)
        y = grouped_linear_torch(h, plan, weight, bias, transposed)
        return y, row_stats_torch(y, h)

    def experts(
        self, x, plan, gate_up, gate_up_bias, gate: Gate, down, down_bias, transposed, gates
    ) -> tuple[torch.Tensor, RowStats]:
        """The whole experts call with a known gate: (out (T, H) float32, statistics of the down_proj rows)."""
        h = gate_torch(gate, self.gate_up(x, plan, gate_up, gate_up_bias, transposed))
        y, stats = self.down(h, plan, down, down_bias, transposed)
        return self.combine(y, plan, gates), stats

    def row_stats(self, y, h) -> RowStats:
        return row_stats_torch(y, h)

    def combine(self, y, plan, gates) -> torch.Tensor:
        return combine_torch(y, plan, gates)

    def update(self, state: BankStats, stats: RowStats, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
        update_torch(state, stats, plan, gates, rows)


class CpuBackend(TorchBackend):
    """torch's GEMMs, expert by expert and in chunks that stay in cache, with the statistics of csrc/."""

    name = "cpu"

    def refusal(self, device, dtype, call=None):
        if device.type != "cpu":
            return f"it serves CPU tensors, these are on {device}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it has no kernel for {dtype}"
        return None

    def plan(self, top_k_index, num_experts):
        order, offsets = _C.plan_cpu(top_k_index, num_experts)
        return Plan(order, offsets, top_k_index.shape[1])

    def gate_up(self, x, plan, weight, bias, transposed):
        if not isinstance(weight, torch.Tensor):  # quantized: one expert's matrix at a time
            return super().gate_up(x, plan, weight, bias, transposed)
        return _C.gate_up_cpu(x.to(weight.dtype), plan.order, plan.offsets, plan.top_k, weight, bias, transposed)

    def down(self, h, plan, weight, bias, transposed):
        h = h.to(weight.dtype).contiguous()
        if not isinstance(weight, torch.Tensor):
            y = grouped_linear_torch(h, plan, weight, bias, transposed)
            return y, self.row_stats(y, h)
        y = weight.new_zeros(len(h), weight.shape[2 if transposed else 1])
        stats = RowStats.empty(len(h))
        _C.down_cpu(h, plan.offsets, weight, bias, transposed, stats.tensors(), y)
        return y, stats

    def experts(self, x, plan, gate_up, gate_up_bias, gate, down, down_bias, transposed, gates):
        if not isinstance(down, torch.Tensor):
            return super().experts(x, plan, gate_up, gate_up_bias, gate, down, down_bias, transposed, gates)
        out = torch.zeros(len(x), down.shape[2 if transposed else 1], dtype=torch.float32)
        stats = RowStats.empty(len(plan.order))
        limit = math.inf if gate.limit is None else gate.limit
        spec = (gate.activation, gate.gated, gate.interleaved, limit, gate.slope, gate.shift)
        routing = (plan.order, plan.offsets, plan.top_k)
        weights = (gate_up, gate_up_bias, spec, down, down_bias, transposed)
        _C.experts_cpu(x.to(down.dtype), *routing, *weights, gates.float().contiguous(), stats.tensors(), out)
        return out, stats

    def row_stats(self, y, h):
        stats = RowStats.empty(len(y))
        _C.row_stats_cpu(y.contiguous(), h.contiguous(), stats.tensors())
        return stats

    def update(self, state, stats, plan, gates, rows):
        tables = [state.counts, state.sums, state.outliers, state.first_outliers, state.in_max]
        gates = gates.float().contiguous()
        _C.update_cpu(tables, stats.tensors(), plan.order, plan.offsets, plan.top_k, gates, rows.tensors(), rows.source)


# In the order of preference.
BACKENDS = {backend.name: backend for backend in (CpuBackend(), CudaBackend(), TritonBackend(), TorchBackend())}


def choose_backend(
    device: torch.device, dtype: torch.dtype, wanted: str | None = None, call: Call | None = None
) -> tuple[TorchBackend, str | None]:
    """The backend that serves a call, and why it is not the wanted one (None if it is, or none was named).

    Without a call: the backend that serves calls of a layer, where nothing about them stands against it.

    Raises SedetectError for an unknown name.
    """
    check_backend(wanted)
    why = None
    if wanted is not None:
        reason = BACKENDS[wanted].refusal(device, dtype, call)
        if reason is None:
            return BACKENDS[wanted], None
        why = f"backend {wanted} does not serve {dtype} on {device}: {reason}"
    return next(b for b in BACKENDS.values() if b.refusal(device, dtype, call) is None), why


def missing_fast_path(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the cuda backend does not serve a GPU's layers of this dtype; None where it does, and on other devices."""
    reason = BACKENDS["cuda"].refusal(device, dtype) if device.type == "cuda" else None
    return reason and f"the cuda backend served nothing: {reason}"


def check_backend(name: str | None) -> None:
    """Raise SedetectError for a backend that does not exist."""
    if name is not None and name not in BACKENDS:
        raise SedetectError(f"backend {name!r} does not exist; choose one of {', '.join(BACKENDS)}")
