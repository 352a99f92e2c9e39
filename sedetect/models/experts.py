"""One expert of a live module by itself: the input and the output of its down_proj."""

import torch
from torch import nn

from sedetect.kernels.grouped import expert_linear


def expert_hidden(module: nn.Module, x: torch.Tensor, expert: int) -> torch.Tensor:
    """The input of one expert's down_proj: x (T, H) -> (T, I), by the module's own gate."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    bias = getattr(module, f"{up}_bias")[expert] if module.has_bias else None
    z = expert_linear(x, getattr(module, up)[expert], bias, module.is_transposed)
    return module._apply_gate(z) if module.has_gate else module.act_fn(z)


def expert_output(module: nn.Module, x: torch.Tensor, expert: int) -> torch.Tensor:
    """down_proj output of one expert as the layer stores it: x (N, H) -> (N, H), before post norm and routing weight."""
    bias = module.down_proj_bias[expert] if module.has_bias else None
    return expert_linear(expert_hidden(module, x, expert), module.down_proj[expert], bias, module.is_transposed)
