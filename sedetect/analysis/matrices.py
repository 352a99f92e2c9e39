"""The matrices of a bank's experts with one row per neuron, whatever their layout.

A neuron is one intermediate channel: a row of the gate and of the up projection, and a column of down. E experts, I
neurons, H width of their input and output; every matrix is given as (E, I, H), of which down is the transpose of what
is stored.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sedetect.adapters.listed import is_linear
from sedetect.adapters.quantized import linear_weight
from sedetect.errors import SedetectError
from sedetect.kernels.gate import Gate, gate_torch
from sedetect.models.banks import Bank
from sedetect.models.measure import gate_of
from sedetect.ops.contract import Halves

NAMES = ("gate", "up", "down")
# Input projections of an MLP that is no routed expert: apart, the gate first, or in one linear.
_APART = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))
_ONE = ("gate_up_proj", "input_linear", "up_proj", "w1", "fc1", "wi")
_STEP = 1 / 16  # of the up half, by which a gate that is not known is taken apart


@torch.no_grad()
def expert_matrices(model: nn.Module, bank: Bank) -> dict[str, torch.Tensor]:
    """{"gate": (E, I, H), "up": ..., "down": ...} of one bank, in the precision it computes in; views where possible.

    Experts without a gate have no "gate". Raises SedetectError for weights that cannot be read.
    """
    if bank.routed:
        found = _of_experts(bank.module)
    else:
        mlp = model.get_submodule(bank.path.rpartition(".")[0])
        found = {name: matrix[None] for name, matrix in _of_mlp(bank, mlp).items()}
    return {name: found[name].detach() for name in NAMES if name in found}


def is_interleaved(module: nn.Module) -> bool:
    """Whether gate and up of an experts module take turns in gate_up_proj, instead of one half each."""
    return not getattr(module, "is_concatenated", True)


@torch.no_grad()
def gate_states(bank: Bank, x: torch.Tensor) -> torch.Tensor:
    """act(W_gate x) of every expert of a routed bank, before the product with up: x (T, H) -> (E, T, I) float32.

    With the clamps and the slope of the model's gate; of experts without a gate, act(W_up x).
    """
    module = bank.module
    up = "gate_up_proj" if module.has_gate else "up_proj"
    weight, gate = getattr(module, up), gate_of(bank)
    states = []
    for expert in range(bank.experts):
        matrix = weight[expert].t() if module.is_transposed else weight[expert]
        z = nn.functional.linear(x.to(matrix.dtype), matrix)
        if module.has_bias:
            z = z + getattr(module, f"{up}_bias")[expert]
        states.append(_act(gate, z.float(), module))
    return torch.stack(states)


def _act(gate: Gate | Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The activation of the gate half of z, of which a gate is a product with an affine function of the up half."""
    if not module.has_gate:
        return gate_torch(gate, z) if isinstance(gate, Gate) else gate(z)
    z = z.clone()
    up = z[..., 1::2] if is_interleaved(module) else z[..., z.shape[-1] // 2 :]
    up.zero_()
    if isinstance(gate, Gate):
        return gate_torch(replace(gate, shift=1.0), z)
    at_zero = gate(z)
    up.fill_(_STEP)
    return (gate(z) - at_zero) / _STEP


def _of_experts(module: nn.Module) -> dict[str, torch.Tensor]:
    own = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    stored = getattr(module, "stored_gate_up", own)
    down = _stack(module.down_proj)
    found = {"down": down if module.is_transposed else down.transpose(1, 2)}
    if isinstance(stored, Halves):
        return found | {"gate": stored.gate, "up": stored.up}
    stored = _stack(stored)
    stored = stored.transpose(1, 2) if module.is_transposed else stored
    if not module.has_gate:
        return found | {"up": stored}
    if is_interleaved(module):
        return found | {"gate": stored[:, ::2], "up": stored[:, 1::2]}
    gate, up = stored.chunk(2, dim=1)
    return found | {"gate": gate, "up": up}


def _stack(matrices: Any) -> torch.Tensor:
    """(E, M, K): stacked weights as they are; those of a list, or quantized ones, put together."""
    if isinstance(matrices, torch.Tensor):
        return matrices
    return torch.stack([matrices[expert] for expert in range(len(matrices))])


def _of_mlp(bank: Bank, mlp: nn.Module) -> dict[str, torch.Tensor]:
    found = {"down": _weight(bank, bank.module).t()}
    for first, second in _APART:
        if is_linear(getattr(mlp, first, None)) and is_linear(getattr(mlp, second, None)):
            return found | {"gate": _weight(bank, getattr(mlp, first)), "up": _weight(bank, getattr(mlp, second))}
    for name in _ONE:
        linear = getattr(mlp, name, None)
        if linear is None or not is_linear(linear):
            continue
        if linear.out_features == bank.intermediate:
            return found | {"up": _weight(bank, linear)}
        if linear.out_features == 2 * bank.intermediate:
            gate, up = _weight(bank, linear).chunk(2)
            return found | {"gate": gate, "up": up}
    raise SedetectError(f"{bank.path}: no input projection found beside it; its matrices cannot be compared")


def _weight(bank: Bank, linear: nn.Module) -> torch.Tensor:
    """(M, K) of a linear."""
    weight = linear_weight(linear)
    if weight is None or weight.dim() != 2:
        raise SedetectError(
            f"{bank.path} ({type(linear).__name__}): its weights cannot be read; give the unquantized checkpoint"
        )
    return weight
