"""Identify a module's gate as one of the fused gates: by probing it, never by its name."""

from collections.abc import Callable, Iterable

import torch

from sedetect.kernels.gate import ACTIVATIONS, Gate, gate_torch


def probe_gate(
    apply: Callable[[torch.Tensor], torch.Tensor],
    width: int,
    candidates: Iterable[Gate],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Gate | None:
    """The first candidate that agrees with apply, a module's own gate for I = width; None if none does.

    It must agree to 1e-5 in float32, and to the last bit in a dtype of 16 bits: a gate of another precision does not.

    Gate and up sweep both signs and magnitudes from 1e-3 to 1e4 independently, in either layout, so that a clamp or a
    shift cannot hide.
    """
    magnitudes = torch.logspace(-3, 4, 22, device=device)
    values = torch.cat((-magnitudes, magnitudes.new_zeros(1), magnitudes))
    pairs = torch.cartesian_prod(values, values)
    pairs = pairs[torch.arange(-(-len(pairs) // width) * width, device=device) % len(pairs)].view(-1, width, 2)
    z = torch.cat((pairs.transpose(1, 2).reshape(-1, 2 * width), pairs.reshape(-1, 2 * width)))
    with torch.no_grad():
        for gate in candidates:
            x = z if gate.gated else z[:, :width]
            own, mine = apply(x.clone()), gate_torch(gate, x)
            if mine.shape != own.shape or not torch.allclose(mine, own.to(mine.dtype), rtol=1e-5, atol=1e-30):
                continue
            x = x.to(dtype)
            if dtype.itemsize > 2 or torch.equal(apply(x.clone()).nan_to_num(), gate_torch(gate, x).nan_to_num()):
                return gate
    return None


def candidate_gates(gated: bool, limits: Iterable[float]) -> list[Gate]:
    """The family for a module whose attributes name these clamp limits, the commonest first."""
    plain = [Gate(activation, gated) for activation in ACTIVATIONS]
    if not gated:
        return plain
    limits = sorted(set(limits))
    clamped = [Gate(limit=limit) for limit in limits]
    # gpt-oss: up + 1, gate slope 1.702, limit 7 (transformers, modeling_gpt_oss).
    shifted = [
        Gate(limit=limit, slope=1.702, shift=1.0, interleaved=i) for limit in {7.0, *limits} for i in (True, False)
    ]
    return plain + clamped + shifted
