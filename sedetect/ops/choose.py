"""The choice of a backend for a call. Each implements the same stages (sedetect.ops.contract).

torch is the reference and runs anywhere. cpu is torch's GEMMs with the row statistics of csrc/, computed while the
output is in cache. triton is the kernels of kernels/, cuda those of csrc/cuda/ for Hopper GPUs. The torch reference in
each file of kernels/ documents the arguments and results of its stage.
"""

from typing import Any

import torch

from sedetect.errors import SedetectError
from sedetect.ops.contract import Backend, ExpertWeights
from sedetect.ops.cpu import CpuBackend
from sedetect.ops.cuda import CudaBackend
from sedetect.ops.reference import TorchBackend
from sedetect.ops.triton import TritonBackend

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
    """The backend for a call, and the reason if it is not the wanted one (None if it is, or none was named).

    Without experts and weights: the backend for a layer's calls, unless the calls themselves rule it out.

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
    """The reason why a device's own backend does not serve its layers of this dtype; None if it does.

    For a CPU, the only reason given is that it is not built.
    """
    cpu = BACKENDS["cpu"]
    if device.type == "cpu" and isinstance(cpu, CpuBackend) and cpu.built:
        return None
    reason = BACKENDS[device.type].refusal(device, dtype) if device.type in ("cpu", "cuda") else None
    return reason and f"the {device.type} backend served nothing: {reason}"


def check_backend(name: str | None) -> None:
    """Raise SedetectError for a backend that does not exist."""
    if name is not None and name not in BACKENDS:
        raise SedetectError(f"backend {name!r} does not exist; choose one of {', '.join(BACKENDS)}")
