"""The chain to an expert's outlier: upstream experts without which it falls silent at its trigger tokens.

A trigger token reaches a super expert through the outputs of earlier experts. They show no outlier themselves, but a
model that loses one loses the super expert too. Each upstream expert that the token visits is switched off there, one
by one, and the value of the expert in question is read again. Only the text up to the trigger is run, and only the
layers up to the expert: for a BOS token, one token through a few layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank, find_banks
from sedetect.models.experts import expert_output
from sedetect.models.layers import run_tokens
from sedetect.stats.place import Place, place_of
from sedetect.stats.proof import Feeder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SILENT = 0.5  # share of the value below which an expert counts as silent


class _Read(Exception):
    """The value has been read; no later layer matters."""


class _Chain:
    """Runs a text whose last token is the trigger, and finds the experts it visits upstream and the |y| at the
    trigger.
    """

    def __init__(self, model: "PreTrainedModel", expert: Place):
        self._model, self._expert = model, expert
        banks = [bank for bank in find_banks(model) if bank.id.stack == expert.stack]
        self.above = [bank for bank in banks if bank.id.layer < expert.layer and bank.id.base != "dense"]
        self._own = next(bank for bank in banks if bank.id == expert.bank)

    def run(self, ids: torch.Tensor, off: Place | None) -> tuple[float, list[Place]]:
        """|y| of the expert at the last token of ids (L,), and the upstream experts that this token visits."""
        self._off, self._value, self._visited = off, 0.0, list[Place]()
        calls: list[tuple[Bank, Callable[..., torch.Tensor]]] = [
            (bank, partial(self._pass_routed if bank.routed else self._pass_down, bank)) for bank in self.above
        ]
        calls.append((self._own, self._read_routed if self._own.routed else self._read_down))
        undo = attach(self._model, calls)
        try:
            run_tokens(self._model, ids[None])
        except _Read:
            pass
        finally:
            undo()
        return self._value, self._visited

    def _off_in(self, bank: Bank) -> Place | None:
        return self._off if self._off is not None and self._off.bank == bank.id else None

    def _pass_routed(
        self, bank: Bank, module: nn.Module, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        chosen = [e for e, gate in zip(index[-1].tolist(), gates[-1].tolist()) if gate and 0 <= e < bank.experts]
        self._visited += [place_of(bank.id, e, bank.experts) for e in chosen]
        off = self._off_in(bank)
        if off is not None:
            gates = gates.clone()
            gates[-1] = gates[-1].masked_fill(index[-1] == off.number, 0)
        return run_inner(module, x, index, gates)

    def _pass_down(self, bank: Bank, original: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = original(x)
        self._visited.append(place_of(bank.id, 0, 1))
        if self._off_in(bank) is not None:
            y = y.clone()
            y.view(-1, y.shape[-1])[-1] = 0
        return y

    def _read_routed(
        self, module: nn.Module, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        if bool(((index[-1] == self._expert.number) & (gates[-1] != 0)).any()):
            last = x.reshape(-1, x.shape[-1])[-1:]
            self._value = float(expert_output(self._own.module, last, self._expert.number).abs().max())
        raise _Read

    def _read_down(self, original: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = original(x)
        self._value = float(y.reshape(-1, y.shape[-1])[-1].abs().max())
        raise _Read


@torch.no_grad()
def find_feeders(model: "PreTrainedModel", expert: Place, texts: Sequence[torch.Tensor]) -> list[Feeder]:
    """Upstream experts without which an expert falls silent, strongest first.

    Args:
        texts: (L,) ids each, ending with a trigger token of the expert. Equal texts are run once.
    Returns:
        those whose absence takes its |y| below half in every text; empty for an expert of the first layer.
    """
    chain = _Chain(model, expert)
    left: dict[Place, list[float]] = {}
    unique = list({tuple(text.tolist()): text for text in texts}.values())
    for text in unique:
        value, visited = chain.run(text, None)
        for upstream in visited:
            left.setdefault(upstream, []).append(chain.run(text, upstream)[0] / value if value else 1.0)
    found = [Feeder(str(place), max(shares)) for place, shares in left.items() if len(shares) == len(unique)]
    return sorted((one for one in found if one.left < _SILENT), key=lambda one: one.left)
