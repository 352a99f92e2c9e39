"""Gate: the activation between gate_up and down, as data that a kernel can fuse. z (N, 2I) -> (N, I).

The gate belongs to the model: a Gate is used only where it agrees with the module's own function (probe_gate).
"""

from collections.abc import Callable
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
