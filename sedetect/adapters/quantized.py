"""Quantized checkpoints as they ship: adapters of their experts, and FP8 linears where their kernels are missing.

Weights are dequantized where they are multiplied (sedetect.kernels.dequantize), and the activations stay as they are.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sedetect.adapters.forwards import forward_of, replace_forward
from sedetect.adapters.stacked import Adapter
from sedetect.errors import SedetectError
from sedetect.kernels.dequantize import QuantizedWeights, dequantize


class FP8Experts(Adapter):
    """Experts stored in FP8, or in packed FP4, with a scale per block."""

    dtype = torch.bfloat16  # the activations', known when they come
    reads = ("module.block_size",)

    @property
    def gate_up_proj(self):
        return self._weights("gate_up_proj" if self.has_gate else "up_proj")

    up_proj = gate_up_proj

    @property
    def down_proj(self):
        return self._weights("down_proj")

    @property
    def has_gate(self):
        return self.module.has_gate

    def _weights(self, name: str) -> QuantizedWeights:
        module: Any = self.module  # the block's size is a pair of numbers
        stored, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
        return QuantizedWeights(stored, scale, module.block_size, self.dtype)

    def _apply_gate(self, z):
        return self.module._apply_gate(z) if self.has_gate else self.act_fn(z)

    def translate(self, own_forward, hidden_states, top_k_index, top_k_weights):
        self.dtype = hidden_states.dtype
        return self(hidden_states, top_k_index, top_k_weights)


class Mxfp4GptOssExperts(Adapter):
    """GPT-OSS in MXFP4, as transformers loads it where the package kernels is installed: gate and up in turns, biases.

    The block routes and computes in its kernels' own terms, so its whole forward is stood in for. The weights lie in
    these kernels' order; each call puts those of its layer back into the checkpoint's, in memory that it then frees.
    """

    has_bias, is_concatenated = True, False
    dtype = torch.bfloat16  # the activations', known when they come
    reads = ("module.alpha", "module.limit", "parent.router")

    @property
    def redirected(self):
        return self.parent

    @property
    def gate_up_proj(self):
        module = self.module
        return self._weights("gate_up_proj", 2 * module.intermediate_size, module.hidden_size)

    @property
    def down_proj(self):
        return self._weights("down_proj", self.module.hidden_size, self.module.intermediate_size)

    @property
    def gate_up_proj_bias(self):
        return self.module.gate_up_proj_bias.to(self.dtype)

    @property
    def down_proj_bias(self):
        return self.module.down_proj_bias.to(self.dtype)

    def _weights(self, name: str, rows: int, columns: int) -> "_KernelWeights":
        module: Any = self.module  # the number of its experts is one
        data, precision = getattr(module, name), getattr(module, f"{name}_precision_config")
        if precision is None:
            raise SedetectError(f"Mxfp4GptOssExperts: {name} has no scales; load the model with from_pretrained")
        return _KernelWeights(data, precision.weight_scale, (module.num_experts, rows, columns), self.dtype)

    def _apply_gate(self, z):
        gate, up = z[..., ::2].clamp(max=self.module.limit), z[..., 1::2].clamp(-self.module.limit, self.module.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.module.alpha))

    def translate(self, own_forward, hidden_states):
        self.dtype = hidden_states.dtype
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, weights, index = self.parent.router(x)
        return self(x, index, weights).view(hidden_states.shape), logits


class _KernelWeights(QuantizedWeights):
    """MXFP4 weights in the order of the kernels they were loaded for, reordered when they are asked for."""

    def __init__(self, data: Any, scale: Any, shape: tuple[int, int, int], dtype: torch.dtype):
        self._data, self._scale = data, scale
        self.shape, self.block, self.storage, self.dtype = torch.Size(shape), (1, 32), torch.uint8, dtype
        self.device, self.is_meta = data.storage.data.device, data.storage.data.is_meta

    # mypy takes a cached_property for one that cannot be set, which the base's attributes can.
    @cached_property
    def stored(self) -> torch.Tensor:  # type: ignore[override]
        return self._in_order(self._data, 2)

    @cached_property
    def scale(self) -> torch.Tensor:  # type: ignore[override]
        return self._in_order(self._scale, 32)

    def _in_order(self, tensor: Any, columns: int) -> torch.Tensor:
        """(E, M, K / columns) uint8. The kernels hold the last two dimensions the other way round."""
        plain = tensor.storage.layout.unswizzle_data(tensor.storage.data).transpose(-1, -2).contiguous()
        expected = (*self.shape[:-1], -(-self.shape[-1] // columns))
        if plain.shape != expected or plain.dtype != torch.uint8:
            raise SedetectError(
                f"Mxfp4GptOssExperts: weights {plain.dtype} {tuple(plain.shape)}, expected bytes {expected}; "
                "load it with Mxfp4Config(dequantize=True)"
            )
        return plain


def fp8_layers() -> ModuleType | None:
    """transformers' module of FP8 layers; None where nothing has imported it yet, so that no model has any."""
    return sys.modules.get("transformers.integrations.finegrained_fp8")


def serve_linears(model: nn.Module) -> tuple[Callable[[], None], int]:
    """Let the FP8 linears of a model compute with dequantized weights where no kernel of theirs runs.

    Returns what puts them back, and how many they are; those that are served already stay so.
    """
    fp8 = fp8_layers()
    if fp8 is None:
        return lambda: None, 0
    modules = [m for m in model.modules() if isinstance(m, fp8.FP8Linear) and m.weight.element_size() == 1]
    modules = [m for m in modules if not has_kernel(m.weight.device.type)]
    with ExitStack() as undo:
        for module in modules:
            if not isinstance(forward_of(module), _Forward):
                undo.callback(replace_forward(module, _Forward(module, isinstance(module, fp8.FP8GroupedLinear))))
        return undo.pop_all().close, len(modules)


def linear_weight(module: nn.Module) -> torch.Tensor | None:
    """The matrix (M, K) that a linear multiplies with; None where its type does not tell."""
    fp8 = fp8_layers()
    if fp8 is not None and isinstance(module, fp8.FP8Linear) and module.weight.element_size() == 1:
        return dequantize(module.weight, module.weight_scale_inv, module.block_size, torch.float32)
    weight = module._parameters.get("weight")  # its own: what PEFT and others show adds to that of another module
    if not isinstance(weight, torch.Tensor) or weight.dtype.itemsize == 1 or not weight.is_floating_point():
        return None
    return weight


class _Forward:
    """The forward of an FP8Linear, with its weight dequantized. x (..., K) -> (..., M).

    Of an FP8GroupedLinear: x (..., groups, K) -> (..., groups, M / groups), each group with rows of its own.
    """

    def __init__(self, module: nn.Module, grouped: bool):
        self.module, self.grouped = module, grouped

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self.module  # the block's size is a pair of numbers
        weight = dequantize(module.weight, module.weight_scale_inv, module.block_size, x.dtype)
        if not self.grouped:
            return F.linear(x, weight, module.bias)
        y = torch.einsum("...gk,gmk->...gm", x, weight.unflatten(0, (module.n_groups, -1)))
        return y if module.bias is None else y + module.bias.view(module.n_groups, -1)


@cache
def has_kernel(device_type: str) -> bool:
    """Whether transformers' FP8 kernels run on devices of this type. The first call may ask the hub for them."""
    from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

    if device_type == "cpu":
        return False
    try:
        load_finegrained_fp8_kernel()
    except (ImportError, OSError):  # no package kernels; no such kernel for this torch, or no way to fetch it
        return False
    return True
