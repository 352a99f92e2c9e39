"""The Triton backend: every stage on the GPU, the statistics taken while the experts are computed.

The stages take and give what sedetect.backends.TorchBackend's do, but for statistics, which are RowParts.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from sedetect.call import Call
from sedetect.kernels.combine import combine
from sedetect.kernels.down import down
from sedetect.kernels.gate_up import gate_up
from sedetect.kernels.plan import plan, scheduled
from sedetect.kernels.row_scan import row_parts
from sedetect.kernels.update import update

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, for tests


class TritonBackend:
    """The kernels of sedetect.kernels. No stage synchronises with the host; rows of no expert are left undefined."""

    name = "triton"

    def refusal(self, device: torch.device, dtype: torch.dtype, call: Call | None = None) -> str | None:
        """Why this backend cannot serve a layer of this device and weight dtype, or a call; None if it can."""
        if device.type != "cuda" and not INTERPRETED:
            return f"it serves CUDA tensors, these are on {device}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"it has no kernel for {dtype}"
        if call is None:
            return None
        if not call.storage <= {torch.float8_e4m3fn, torch.uint8}:
            return "the weights are quantized in a form that it has no kernel for"
        fp8 = torch.float8_e4m3fn in call.storage and device.type == "cuda"
        if fp8 and torch.cuda.get_device_capability(device) < (8, 9):
            return "the weights are FP8, which takes compute capability 8.9"
        return None

    def plan(self, top_k_index, num_experts):
        with on(top_k_index.device):
            return plan(top_k_index, num_experts)

    def gate_up(self, x, plan, weight, bias, transposed):
        with on(x.device):
            return self._gate_up(x, scheduled(plan), weight, bias, transposed)[0]

    def down(self, h, plan, weight, bias, transposed):
        with on(h.device):
            h = h.to(weight.dtype)
            y = self._down(h, scheduled(plan), weight, bias, transposed)
            return y, row_parts(y, h, plan.offsets)

    def experts(
        self, x, plan, gate_up_weight, gate_up_bias, gate, down_weight, down_bias, transposed, gates, statistics=True
    ):
        """As TorchBackend.experts, with out in x's dtype; statistics=False leaves them out (None)."""
        with on(x.device):
            plan = scheduled(plan)
            h, in_parts = self._gate_up(x, plan, gate_up_weight, gate_up_bias, transposed, gate, parts=statistics)
            y = self._down(h, plan, down_weight, down_bias, transposed)
            return combine(y, plan, gates, x.dtype, *((h, in_parts) if statistics else ()))

    def row_stats(self, y, h):
        with on(y.device):
            return row_parts(y, h)

    def combine(self, y, plan, gates):
        with on(y.device):
            return combine(y, plan, gates)[0]

    def update(self, state, found, plan, gates, rows):
        with on(gates.device):
            update(state, found, plan, gates, rows)

    # The GEMMs, of plans that have a schedule: what another backend on a GPU may do in another way.

    def _gate_up(self, x, plan, weight, bias, transposed, gate=None, parts=False):
        """As sedetect.kernels.gate_up.gate_up."""
        return gate_up(x, plan, weight, bias, transposed, gate, parts)

    def _down(self, h, plan, weight, bias, transposed):
        """As sedetect.kernels.down.down."""
        return down(h, plan, weight, bias, transposed)


def on(device: torch.device) -> AbstractContextManager:
    """Launches go to the current device; a model may be spread over several."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
