"""Simulated weight formats: the experts' weights after a round trip through fewer bits.

    int8, int4, int3, ... int2    symmetric integers: scale = max|w| / (2**(bits - 1) - 1),
                                  w -> round(w / scale) * scale, halves to even; no zero point
    fp8                           float8 e4m3 with scale = max|w| / 448, rounded to nearest even

One scale per output channel and group of GROUP consecutive inputs, the last group shorter where GROUP does not divide
them. Scales are not rounded, and count as 16 bits. The result is rounded to the weight's own type. Nothing calibrates:
this is round to nearest, which GPTQ, AWQ and their like improve on.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from sedetect.errors import Argument, SedetectError
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank, find_banks
from sedetect.stats.place import BankId, Place

GROUP = 128
FORMATS = ("int8", "fp8", "int4", "int3", "int2")
_FP8 = torch.float8_e4m3fn


def bits_of(name: str) -> int:
    """Bits per weight of a format, scales apart. Raises SedetectError for an unknown name."""
    if name == "fp8":
        return 8
    if name[:3] == "int" and name[3:] in ("2", "3", "4", "5", "6", "7", "8"):
        return int(name[3:])
    raise SedetectError(Argument("format"), f" {name}: is not known; use fp8, or int2 to int8")


def stored_bits(name: str, inputs: int, group: int = GROUP) -> float:
    """Bits per weight of a matrix with so many inputs per output channel, scales counted as 16 bits each."""
    return bits_of(name) + 16 * -(-inputs // group) / inputs


def fake_quantize(weight: torch.Tensor, name: str, *, dim: int = -1, group: int = GROUP) -> torch.Tensor:
    """weight after a round trip through a format; its inputs are along dim. A copy of the same shape and type."""
    bits = bits_of(name)
    w = weight.float().movedim(dim, -1)
    inputs = w.shape[-1]
    w = torch.unflatten(nn.functional.pad(w, (0, -inputs % group)), -1, (-1, group))
    largest = w.abs().amax(-1, keepdim=True)
    if name == "fp8":
        scale = (largest / torch.finfo(_FP8).max).clamp(min=1e-12)
        w = (w / scale).to(_FP8).float() * scale
    else:
        scale = (largest / (2 ** (bits - 1) - 1)).clamp(min=1e-12)
        w = (w / scale).round() * scale
    return w.flatten(-2)[..., :inputs].movedim(-1, dim).to(weight.dtype)


def expert_weights(module: nn.Module) -> dict[str, int]:
    """The matrices of a routed experts module, with the dimension of their inputs; biases are not among them.

    Raises SedetectError where they are no parameters of the module, one (E, ., .) each.
    """
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if not all(isinstance(module._parameters.get(name), nn.Parameter) for name in names):
        raise SedetectError(
            f"{type(module).__name__}: the storage of its experts has no simulated compression; prune or quantize a "
            f"checkpoint of it instead"
        )
    return dict.fromkeys(names, 1 if module.is_transposed else 2)


def routed_banks(model: nn.Module) -> list[Bank]:
    """The banks whose compression is simulated: routed experts, not shared ones."""
    return [bank for bank in find_banks(model) if bank.id.routed]


def expert_sizes(model: nn.Module) -> dict[BankId, tuple[int, int]]:
    """Per routed bank of a model (with or without its weights): weights of one expert, and number of experts."""
    return {
        bank.id: (sum(getattr(bank.module, name)[0].numel() for name in expert_weights(bank.module)), bank.experts)
        for bank in routed_banks(model)
    }


@contextmanager
def quantized_experts(model: nn.Module, name: str, kept: Iterable[Place] = (), *, group: int = GROUP) -> Iterator[None]:
    """Context manager: run the model with the weights of its routed experts in a simulated format.

    The kept experts stay as they are, as do shared experts and everything else. No parameter is edited: each layer is
    quantized for the length of its own call, so that no copy of the model is needed.
    """
    bits_of(name)
    kept = set(kept)
    places = (Place(*bank.id, e) for bank in routed_banks(model) for e in range(bank.experts))
    with mixed_experts(model, {place: name for place in places if place not in kept}, group=group):
        yield


@contextmanager
def mixed_experts(model: nn.Module, formats: Mapping[Place, str], *, group: int = GROUP) -> Iterator[None]:
    """quantized_experts with a format for each routed expert; those without one stay as they are."""
    numbers: dict[BankId, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, name in formats.items():
        numbers[place.bank][name].append(place.number)
    calls = [
        (bank, partial(_run_quantized, numbers[bank.id], group)) for bank in routed_banks(model) if bank.id in numbers
    ]
    restore = attach(model, calls)
    try:
        yield
    finally:
        restore()


@contextmanager
def quantized_module(module: nn.Module, formats: Mapping[str, list[int]], group: int) -> Iterator[None]:
    """A routed experts module with the weights of some experts, by number, in formats, while the context lasts."""
    originals = {weight: module.get_parameter(weight) for weight in expert_weights(module)}
    try:
        for weight, dim in expert_weights(module).items():
            mixed = originals[weight].detach().clone()
            for name, numbers in formats.items():
                mixed[numbers] = fake_quantize(mixed[numbers], name, dim=dim, group=group)
            module._parameters[weight] = nn.Parameter(mixed, requires_grad=False)
        yield
    finally:
        module._parameters.update(originals)


@torch.no_grad()
def _run_quantized(
    formats: Mapping[str, list[int]],
    group: int,
    module: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
) -> torch.Tensor:
    with quantized_module(module, formats, group):
        return run_inner(module, x, index, gates)
