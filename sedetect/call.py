"""Call: what a backend is told of an experts call before it says whether it serves it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.kernels.gate import Gate


class Call(NamedTuple):
    """Beside device and dtype.

    experts     E
    weights     those that the backend multiplies with; quantized ones are no tensors
    transposed  they are (E, K, M)
    biases      those there are
    gate        the one to be fused, if any
    """

    experts: int
    weights: Sequence[torch.Tensor | QuantizedWeights] = ()
    transposed: bool = False
    biases: Sequence[torch.Tensor] = ()
    gate: Gate | None = None

    @property
    def quantized(self) -> bool:
        return not all(isinstance(weight, torch.Tensor) for weight in self.weights)

    @property
    def storage(self) -> set[torch.dtype]:
        """The types that quantized weights are stored in."""
        return {weight.storage for weight in self.weights if isinstance(weight, QuantizedWeights)}
