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
from sedetect.adapters.stacked import Adapter, as_experts
from sedetect.errors import SedetectError
from sedetect.kernels.gate import Gate, gate_torch
from sedetect.models.banks import Bank
from sedetect.models.measure import gate_of
from sedetect.ops.contract import Halves

NAMES = ("gate", "up", "down")
# Input projections of an MLP that is not a routed expert: apart, the gate first, or in one linear.
_APART = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"))
_ONE = ("gate_up_proj", "input_linear", "up_proj", "w1", "fc1", "wi")
_STEP = 1 / 16  # values of the up half with which an unknown gate is decomposed


@torch.no_grad()
def expert_matrices(model: nn.Module, bank: Bank) -> dict[str, torch.Tensor]:
    """{"gate": (E, I, H), "up": ..., "down": ...} of one bank, in the precision it computes in; views where possible.

    Experts without a gate have no "gate". Raises SedetectError for weights that cannot be read.
    """
    if bank.routed:
        found = _of_experts(bank)
    else:
        mlp = model.get_submodule(bank.path.rpartition(".")[0])
        found = {name: matrix[None] for name, matrix in _of_mlp(bank, mlp).items()}
    return {name: found[name].detach() for name in NAMES if name in found}


def is_interleaved(bank: Bank) -> bool:
    """Whether gate and up of a bank's experts take turns in gate_up_proj, instead of one half each.

    Its gate tells: it is asked which channel the number in the middle of gate_up_proj's output belongs to. Raises
    SedetectError where that is another one than in either layout.
    """
    if isinstance(bank.module, Adapter):
        return not bank.module.is_concatenated
    own, width = as_experts(bank.module), bank.intermediate
    down: Any = own.down_proj
    z = torch.full((2, 2 * width), 0.5, device="cpu" if down.is_meta else down.device)
    z[1, width] = 0.75
    off, on = own._apply_gate(z)
    moved: list[int] = (off != on).nonzero().flatten().tolist()
    if moved not in ([0], [width // 2]):
        raise SedetectError(f"{bank.path}: the gate's half of its gate_up_proj is unknown; it cannot be compared")
    return moved == [width // 2]


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
        states.append(_act(gate, z.float(), bank))
    return torch.stack(states)


def _act(gate: Gate | Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, bank: Bank) -> torch.Tensor:
    """The activation of the gate half of z, of which a gate is a product with an affine function of the up half."""
    if not bank.module.has_gate:
        return gate_torch(gate, z) if isinstance(gate, Gate) else gate(z)
    z = z.clone()
    up = z[..., 1::2] if is_interleaved(bank) else z[..., z.shape[-1] // 2 :]
    up.zero_()
    if isinstance(gate, Gate):
        return gate_torch(replace(gate, shift=1.0), z)
    at_zero = gate(z)
    up.fill_(_STEP)
    return (gate(z) - at_zero) / _STEP


def _of_experts(bank: Bank) -> dict[str, torch.Tensor]:
    module = bank.module
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
    if is_interleaved(bank):
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
    own = bank.path.rpartition(".")[2]
    beside = {name: child for name, child in mlp.named_children() if is_linear(child) and name != own}
    for first, second in _APART:
        if beside.keys() == {first, second}:
            return found | {"gate": _weight(bank, beside[first]), "up": _weight(bank, beside[second])}
    for name in _ONE if len(beside) == 1 else ():
        linear = beside.get(name)
        if linear is None:
            continue
        if linear.out_features == bank.intermediate:
            return found | {"up": _weight(bank, linear)}
        if linear.out_features == 2 * bank.intermediate:
            gate, up = _weight(bank, linear).chunk(2)
            return found | {"gate": gate, "up": up}
    known = ", ".join(beside) or "nothing"
    raise SedetectError(
        f"{bank.path}: {known} beside it is not a known input projection; its matrices cannot be compared"
    )


def _weight(bank: Bank, linear: nn.Module) -> torch.Tensor:
    """(M, K) of a linear."""
    weight = linear_weight(linear)
    if weight is None or weight.dim() != 2:
        raise SedetectError(
            f"{bank.path} ({type(linear).__name__}): its weights cannot be read; give the unquantized checkpoint"
        )
    return weight
