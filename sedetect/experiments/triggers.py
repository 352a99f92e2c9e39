"""Trigger tokens of experts in known text, and the other experts that these tokens visit in the same banks."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

from sedetect.experiments.switching import Off, WindowWatch
from sedetect.models.attach import run_inner
from sedetect.models.banks import Bank
from sedetect.models.experts import expert_output
from sedetect.stats.place import BankId, Place

Token = tuple[int, int]
"""Number of the window, position in it."""

_TRIGGER = 0.5  # of an expert's value


class Triggers:
    """The trigger tokens of experts: those at which |y| reaches half the expert's value; seen in one run over windows.

    Args:
        found: the experts, and their banks; values: the largest |y| of each.
        length: tokens per window.
    calls are for attach; the rest is known when all windows have run.
    """

    def __init__(self, found: Mapping[Place, Bank], values: Mapping[Place, float], watch: WindowWatch, length: int):
        self._values, self._watch, self._length = values, watch, length
        self._in_bank: dict[BankId, list[Place]] = {}
        for place in found:
            self._in_bank.setdefault(place.bank, []).append(place)
        self.tokens: dict[Place, list[Token]] = {place: [] for place in found}
        self._visited: dict[BankId, dict[Token, list[int]]] = {bank: {} for bank in self._in_bank}
        banks = {bank.id: bank for bank in found.values()}
        self.calls = [(bank, partial(self._routed if bank.routed else self._down, bank)) for bank in banks.values()]

    def _routed(
        self, bank: Bank, module: nn.Module, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        for place in self._in_bank[bank.id]:
            rows = ((index == place.number) & (gates != 0)).any(1).nonzero()[:, 0]
            if not len(rows):
                continue
            y = expert_output(bank.module, flat[rows], place.number)
            for row in self._add(place, rows, y):
                chosen = zip(index[row].tolist(), gates[row].tolist())
                self._visited[bank.id][self._at(row)] = [e for e, gate in chosen if gate and 0 <= e < bank.experts]
        return run_inner(module, x, index, gates)

    def _down(self, bank: Bank, original: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = original(x)
        flat = y.reshape(-1, y.shape[-1])
        for place in self._in_bank[bank.id]:
            self._add(place, torch.arange(len(flat), device=flat.device), flat)
        return y

    def _add(self, place: Place, rows: torch.Tensor, y: torch.Tensor) -> list[int]:
        fired: list[int] = rows[y.abs().amax(-1) >= _TRIGGER * self._values[place]].tolist()
        self.tokens[place] += map(self._at, fired)
        return fired

    def _at(self, row: int) -> Token:
        return int(self._watch.numbers[row // self._length]), row % self._length

    def off(self, places: list[Place], windows: int) -> Off:
        """Off: these experts at their trigger tokens."""
        plans: dict[BankId, torch.Tensor] = {}
        for bank, mine in self._in_bank.items():
            chosen = [place for place in mine if place in places]
            if chosen:
                plans[bank] = torch.full((windows, self._length, len(chosen)), -1)
            for m, place in enumerate(chosen):
                for token in self.tokens[place]:
                    plans[bank][(*token, m)] = place.number
        return plans

    def everywhere(self, places: list[Place], windows: int) -> Off:
        """Off: these experts at every token."""
        plans: dict[BankId, torch.Tensor] = {}
        for bank, mine in self._in_bank.items():
            numbers = [place.number for place in mine if place in places]
            if numbers:
                plans[bank] = torch.tensor(numbers).expand(windows, self._length, -1)
        return plans

    def controls(self, windows: int, most: int, seed: int) -> list[Off]:
        """At most so many disjoint draws from the other experts that trigger tokens visit in the same banks: at each
        token as many as fire there. Fewer, or none, where the router chooses no more."""
        generator = np.random.default_rng(seed)
        draws: list[dict[BankId, torch.Tensor]] = []
        for bank, mine in self._in_bank.items():
            fires: dict[Token, int] = {}
            for token in (token for place in mine for token in self.tokens[place]):
                fires[token] = fires.get(token, 0) + 1
            for token, number in fires.items():
                visited = set(self._visited[bank].get(token, ()))
                others = generator.permutation(sorted(visited - {place.number for place in mine}))
                for draw in range(min(most, len(others) // number)):
                    if draw == len(draws):
                        draws.append({})
                    empty = torch.full((windows, self._length, len(mine)), -1)
                    part = torch.from_numpy(others[draw * number : (draw + 1) * number])
                    draws[draw].setdefault(bank, empty)[token][:number] = part
        return list(draws)
