"""The Triton backend: every stage on the GPU, with the statistics taken as the experts are computed.

Its row statistics are RowParts (sedetect.ops.contract.Backend).
"""

from contextlib import AbstractContextManager, nullcontext
from threading import Thread

import torch
import triton

from sedetect.kernels.combine import combine
from sedetect.kernels.down import down
from sedetect.kernels.gate import Gate
from sedetect.kernels.gate_up import ACTIVATIONS, gate_up
from sedetect.kernels.plan import Plan, ScheduledPlan, plan, scheduled
from sedetect.kernels.row_scan import row_parts
from sedetect.kernels.row_stats import RowParts
from sedetect.kernels.rows import Rows
from sedetect.kernels.update import update
from sedetect.ops.contract import ExpertWeights, gate_refusal
from sedetect.stats.bank import BankStats

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, for tests


def prepare_launches() -> None:
    """Start early the work that the first launch would wait for: Triton hashes its own 200 MB in half a second."""
    Thread(target=triton.runtime.cache.triton_key, daemon=True).start()


class TritonBackend:
    """The kernels of sedetect.kernels. No stage synchronizes with the host; rows of no expert are left undefined."""

    name = "triton"
    activations = ACTIVATIONS

    def refusal(
        self, device: torch.device, dtype: torch.dtype, experts: int = 1, weights: ExpertWeights | None = None
    ) -> str | None:
        if device.type != "cuda" and not INTERPRETED:
            return f"it serves CUDA tensors, these are on {device}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it has no kernel for {dtype}"
        if weights is None:
            return None
        if not weights.storage <= {torch.float8_e4m3fn, torch.uint8}:
            return "it has no kernel for this quantization of the weights"
        fp8 = torch.float8_e4m3fn in weights.storage and device.type == "cuda"
        if fp8 and torch.cuda.get_device_capability(device) < (8, 9):
            return "the weights are FP8, which requires compute capability 8.9"
        return gate_refusal(weights, self.activations)

    def plan(self, top_k_index: torch.Tensor, num_experts: int) -> Plan:
        with on(top_k_index.device):
            return plan(top_k_index, num_experts)

    def gate_up(self, x: torch.Tensor, plan: Plan, weights: ExpertWeights) -> torch.Tensor:
        with on(x.device):
            return self._gate_up(x, scheduled(plan), weights)[0]

    def down(self, h: torch.Tensor, plan: Plan, weights: ExpertWeights) -> tuple[torch.Tensor, RowParts]:
        with on(h.device):
            h = h.to(weights.dtype)
            y = self._down(h, scheduled(plan), weights)
            return y, row_parts(y, h, plan.offsets)

    def experts(
        self, x: torch.Tensor, plan: Plan, weights: ExpertWeights, gates: torch.Tensor, statistics: bool = True
    ) -> tuple[torch.Tensor, RowParts | None]:
        """out in x's dtype; statistics=False leaves them out (None)."""
        with on(x.device):
            plan = scheduled(plan)
            h, in_parts = self._gate_up(x, plan, weights, weights.fused_gate, parts=statistics)
            y = self._down(h, plan, weights)
            return combine(y, plan, gates, x.dtype, *((h, in_parts) if statistics else ()))

    def row_stats(self, y: torch.Tensor, h: torch.Tensor) -> RowParts:
        with on(y.device):
            return row_parts(y, h)

    def combine(self, y: torch.Tensor, plan: Plan, gates: torch.Tensor) -> torch.Tensor:
        with on(y.device):
            return combine(y, plan, gates)[0]

    def update(self, state: BankStats, found: RowParts, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
        with on(gates.device):
            update(state, found, plan, gates, rows)

    # The GEMMs, which another GPU backend may override.

    def _gate_up(
        self,
        x: torch.Tensor,
        plan: ScheduledPlan,
        weights: ExpertWeights,
        gate: Gate | None = None,
        parts: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As sedetect.kernels.gate_up.gate_up, with this gate, None for none."""
        return gate_up(x, plan, weights.stacked, weights.gate_up_bias, weights.transposed, gate, parts)

    def _down(self, h: torch.Tensor, plan: ScheduledPlan, weights: ExpertWeights) -> torch.Tensor:
        """As sedetect.kernels.down.down."""
        return down(h, plan, weights.down, weights.down_bias, weights.transposed)


def on(device: torch.device) -> AbstractContextManager[None]:
    """Launches go to the current device; a model may be spread over several."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
