"""Weights as checkpoints ship them quantized: fine-grained FP8 and packed FP4, multiplied in the model's dtype.

Weight-only: an expert's matrix is dequantized for the moment it is used and the activations stay as they are. Engines
that quantize activations as well (transformers' own FP8 kernels among them) give slightly other numbers.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear, load_finegrained_fp8_kernel

from sedetect.forwards import replace_forward

# The values of e2m1, the 4-bit float: its sign bit is 8 (Open Compute Project, Microscaling Formats 1.0).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """weight * scale, multiplied in float32 and rounded once.

    Args:
        weight: (M, K) of an 8-bit float; or (M, K / 2) int8, two e2m1 values to a byte, the lower half first.
        scale: (ceil(M / block[0]), ceil(K / block[1])), one per block of the weight; any one number where block is None.
            For int8, one per block[1] = 32 columns of every row.
        block: rows and columns that share a scale.
    Returns:
        (M, K) in dtype.
    """
    if weight.dtype == torch.int8:
        values = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=weight.device)
        pairs = weight.view(torch.uint8).int()
        weight, block = values[torch.stack((pairs & 15, pairs >> 4), dim=-1)].flatten(-2), (1, 32)
    scale = scale.float()
    if block is not None:
        rows, columns = weight.shape
        scale = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() * scale).to(dtype)


class QuantizedWeights:
    """Stands for the (E, M, K) matrices of stacked experts: [e] dequantizes the matrix of one."""

    def __init__(self, stored: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype):
        self.stored, self.scale, self.block, self.dtype = stored, scale, block, dtype
        experts, rows, columns = stored.shape
        self.shape = torch.Size((experts, rows, columns * (2 if stored.dtype == torch.int8 else 1)))
        self.device, self.is_meta = stored.device, stored.is_meta

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, expert: int) -> torch.Tensor:
        return dequantize(self.stored[expert], self.scale[expert], self.block, self.dtype)

    def new_zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)


def serve_linears(model: nn.Module) -> tuple[Callable[[], None], int]:
    """Let the FP8 linears of a model compute with dequantized weights where no kernel of theirs runs.

    Returns what puts them back, and how many they are.
    """
    modules = [m for m in model.modules() if isinstance(m, FP8Linear) and m.weight.element_size() == 1]
    modules = [m for m in modules if not _has_kernel(m.weight.device.type)]
    with ExitStack() as undo:
        for module in modules:
            undo.callback(replace_forward(module, _Forward(module)))
        return undo.pop_all().close, len(modules)


class _Forward:
    """The forward of an FP8Linear, with its weight dequantized. x (..., K) -> (..., M)."""

    def __init__(self, module: FP8Linear):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        return F.linear(x, dequantize(module.weight, module.weight_scale_inv, module.block_size, x.dtype), module.bias)


@cache
def _has_kernel(device: str) -> bool:
    """Whether transformers' own kernel is there for a type of device. It may look for one on the hub, so asked once."""
    if device == "cpu":
        return False
    try:
        load_finegrained_fp8_kernel()
    except ImportError:
        return False
    return True
