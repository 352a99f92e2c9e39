"""Gate: the activation between gate_up and down, as data that a kernel can fuse. z (N, 2I) -> (N, I).

The gate belongs to the model: a Gate is used only where it agrees with the module's own function (probe_gate).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class Gate:
    """act(min(g, limit)) * (clamp(u, -limit, limit) + shift), g and u the halves of z.

    activation   a name in ACTIVATIONS; with slope a, silu is g * sigmoid(a * g)
    gated        False: no u, the activation of the whole z (N, I)
    interleaved  g, u = z[:, ::2], z[:, 1::2] instead of the first and second half
    limit        None: no clamps
    """

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    limit: float | None = None
    slope: float = 1.0
    shift: float = 0.0


def gate_torch(gate: Gate, z: torch.Tensor) -> torch.Tensor:
    """The definition, in z's dtype: each operation rounds as torch's does."""
    if not gate.gated:
        return ACTIVATIONS[gate.activation](z)
    g, u = (z[..., ::2], z[..., 1::2]) if gate.interleaved else z.chunk(2, dim=-1)
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    g = g * torch.sigmoid(g * gate.slope) if gate.slope != 1.0 else ACTIVATIONS[gate.activation](g)
    return g * (u + gate.shift if gate.shift else u)


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
