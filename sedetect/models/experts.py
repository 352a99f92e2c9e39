"""A single expert of a live module: the input and the output of its down_proj."""

import torch
from torch import nn

from sedetect.adapters.listed import ListedExperts
from sedetect.adapters.stacked import as_experts
from sedetect.kernels.grouped import expert_linear


def expert_hidden(module: nn.Module, x: torch.Tensor, expert: int) -> torch.Tensor:
    """The input of one expert's down_proj: x (T, H) -> (T, I), by the module's own gate."""
    if isinstance(module, ListedExperts):
        return module.run_expert(module.experts, expert, x)[2]
    own = as_experts(module)
    up = "gate_up_proj" if own.has_gate else "up_proj"
    if getattr(module, up) is None:  # the module is given h
        return x
    bias = getattr(module, f"{up}_bias")[expert] if own.has_bias else None
    z = expert_linear(x, getattr(module, up)[expert], bias, own.is_transposed)
    return own._apply_gate(z) if own.has_gate else own.act_fn(z)


def expert_output(module: nn.Module, x: torch.Tensor, expert: int) -> torch.Tensor:
    """One expert's down_proj output as the layer stores it: x (N, H) -> (N, H), before post norm and routing weight."""
    if isinstance(module, ListedExperts):
        return module.run_expert(module.experts, expert, x)[1]
    own = as_experts(module)
    bias = own.down_proj_bias[expert] if own.has_bias else None
    return expert_linear(expert_hidden(module, x, expert), own.down_proj[expert], bias, own.is_transposed)
