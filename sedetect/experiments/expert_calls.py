"""The calls of the experts in a forward, and the contribution of each to the residual stream."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from sedetect.adapters.listed import is_linear, linear_sizes
from sedetect.adapters.stacked import as_experts
from sedetect.models.attach import run_inner
from sedetect.models.banks import Bank
from sedetect.models.experts import expert_output
from sedetect.stats.place import Place


class Written(NamedTuple):
    """The contribution of one expert to one element: routing weight x down_proj output. gate is the routing weight."""

    expert: Place
    gate: float
    amount: float


class ExpertCalls:
    """Records, layer by layer, the calls of the experts in a one-sequence forward.

    calls hooks every bank for attach; written() gives the contribution of each expert to one element, by the module's
    own weights at that token; forget() releases a layer.
    """

    def __init__(self, model: nn.Module, banks: list[Bank]):
        self.calls = [(bank, partial(self._experts if bank.routed else self._down, bank)) for bank in banks]
        self._model = model
        self._routed: dict[int, list[tuple[Bank, tuple[torch.Tensor, ...]]]] = defaultdict(list)
        self._single: dict[int, list[tuple[Bank, torch.Tensor]]] = defaultdict(list)

    def written(self, layer: int, shape: tuple[int, int], token: int, channel: int) -> Iterator[Written]:
        """Everything the token visited, of a residual stream of shape (L, H).

        A bank whose call did not have L rows regroups its tokens, one of another width than H does not write into the
        residual stream's channels: both are left out.
        """
        length, width = shape
        routed = [(bank, call) for bank, call in self._routed[layer] if len(call[0]) == length]
        for bank, (x, index, gates) in routed:
            for expert, gate in zip(index[token].tolist(), gates[token].tolist()):
                if 0 <= expert < bank.experts and gate and bank.hidden == width:
                    y = expert_output(bank.module, x[token : token + 1], expert)
                    if getattr(bank.module, "has_post_expert_norm", False):
                        y = as_experts(bank.module).post_expert_norm(y)
                    yield Written(Place(*bank.id, expert), gate, gate * float(y[0, channel]))
        for bank, y in self._single[layer]:
            if y.shape == shape:
                gate = self._shared_gate(bank, routed[0][1][0][token]) if routed else 1.0
                yield Written(Place(*bank.id, bank.id.base), gate, gate * float(y[token, channel]))

    def forget(self, layer: int) -> None:
        self._routed.pop(layer, None)
        self._single.pop(layer, None)

    def _experts(
        self, bank: Bank, module: nn.Module, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        self._routed[bank.id.layer].append((bank, (x.reshape(-1, x.shape[-1]), index, gates)))
        return run_inner(module, x, index, gates)

    def _down(self, bank: Bank, original: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = original(x)
        self._single[bank.id.layer].append((bank, y.reshape(-1, y.shape[-1])))
        return y

    def _shared_gate(self, bank: Bank, x: torch.Tensor) -> float:
        """The factor of the block's shared expert: in Qwen's models the sigmoid of a linear with one output, else 1."""
        block = self._model.get_submodule(bank.path.rpartition(".")[0].rpartition(".")[0])
        ones = (child for child in block.children() if is_linear(child) and linear_sizes(child) == (1, x.shape[-1]))
        gate = next(ones, None)
        return 1.0 if gate is None or bank.id.base != "shared" else float(torch.sigmoid(gate(x)))
