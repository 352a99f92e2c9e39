"""The divergence of a second model from a first on the same text: losses, logits, routing, and expert outputs.

The first model runs alone and writes its outputs to a folder, one file per batch; the second runs afterwards and is
compared batch by batch. So memory holds one model and the logits of one batch of each.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sedetect.calibration.windows import Windows, batches
from sedetect.experiments.effects import effect
from sedetect.experiments.evaluation import Perplexity, logit_losses, next_logits, predictions
from sedetect.files import check_space
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank, find_banks
from sedetect.models.experts import expert_output
from sedetect.models.layers import refuse_encoder_decoder, refuse_without_logits
from sedetect.stats.place import BankId, Place
from sedetect.stats.proof import Effect

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEVEL = 0.05  # chance that an interval misses
_POSITIONS = 128  # whose distributions over the vocabulary are compared at once


@dataclass(frozen=True)
class Divergence:
    """The divergence of the second model from the first on one text.

    perplexity, other    of the first and the second model
    change               of perplexity, with an interval over windows at 1 - LEVEL
    kl                   mean over predictions of the KL divergence of the second's distribution from the first's, nats;
                         None where a runtime gave no logits
    agreement            share of predictions whose most likely token is the same
    predictions          tokens predicted
    """

    perplexity: float
    other: float
    change: Effect
    kl: float | None
    agreement: float
    predictions: int


class Given(NamedTuple):
    """The outputs of a model for windows (B, L) of a domain.

    logits of next tokens (B, P, V); routes: per bank the experts chosen (T, k), -1 for none
    """

    domain: str
    ids: torch.Tensor
    logits: torch.Tensor
    routes: dict[BankId, torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """The outputs of a runtime for the windows of one domain; P predictions in each of N windows.

    losses    (N,) float64: negative log-likelihood (nats) of each window, summed over its predictions
    likely    (N, P) int64: the most likely token at each prediction
    unloaded  names of the runtime's weights into which nothing from the checkpoint was loaded
    """

    losses: dict[str, torch.Tensor]
    likely: dict[str, torch.Tensor]
    unloaded: list[str]


class Outputs:
    """A model's outputs over the windows of a text.

    largest: the largest |y| of these experts in the batches that given() went through so far; 0 without a row.
    """

    def __init__(self, model: "PreTrainedModel", experts: Sequence[Place]):
        refuse_encoder_decoder(model, "verification")
        refuse_without_logits(model, "verification")
        self._model, self._banks = model, find_banks(model)
        self._routes: dict[BankId, list[torch.Tensor]] = defaultdict(list)
        self._largest = {place: torch.zeros(()) for place in experts}

    @property
    def largest(self) -> dict[Place, float]:
        return {place: float(value) for place, value in self._largest.items()}

    def given(
        self, domains: dict[str, Windows], prefix: int, batch_size: int, progress: Callable[[int], None]
    ) -> Iterator[Given]:
        """Batch by batch. progress: called with the number of tokens after each."""
        watched = {place.bank for place in self._largest}
        calls = [
            (bank, partial(self._routed if bank.routed else self._down, bank))
            for bank in self._banks
            if bank.id.routed or bank.id in watched
        ]
        undo = attach(self._model, calls)
        try:
            for domain, windows in domains.items():
                for ids, _ in batches(windows, batch_size):
                    self._routes.clear()
                    with torch.no_grad():
                        logits = next_logits(self._model, ids, prefix)
                    # A module that regroups its tokens does not say which of them it was called with.
                    routes = {bank: torch.cat(seen) for bank, seen in self._routes.items()}
                    routes = {bank: seen for bank, seen in routes.items() if len(seen) == ids.numel()}
                    yield Given(domain, ids, logits, routes)
                    progress(ids.numel())
        finally:
            undo()

    def _routed(
        self, bank: Bank, module: nn.Module, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        chosen = index.masked_fill(gates == 0, -1)
        if bank.id.routed:
            self._routes[bank.id].append(chosen)
        flat = x.reshape(-1, x.shape[-1])
        for place in self._largest:
            rows = (chosen == place.number).any(1) if place.bank == bank.id else chosen.new_zeros(0)
            if rows.any():
                self._see(place, expert_output(bank.module, flat[rows], place.number))
        return run_inner(module, x, index, gates)

    def _down(self, bank: Bank, original: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = original(x)
        for place in self._largest:
            if place.bank == bank.id:
                self._see(place, y)
        return y

    def _see(self, place: Place, y: torch.Tensor) -> None:
        self._largest[place] = torch.maximum(self._largest[place], y.abs().amax().float().cpu())  # NaN stays


def record(
    outputs: Outputs,
    domains: dict[str, Windows],
    folder: Path,
    *,
    prefix: int,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Run the first model and write its outputs to a folder. Raises SedetectError if they do not fit the disk."""
    for number, given in enumerate(outputs.given(domains, prefix, batch_size, progress)):
        if not number:
            windows = sum(len(one.ids) for one in domains.values())
            check_space(folder, given.logits.nbytes // len(given.ids) * windows)
        tensors = {str(bank): seen.cpu() for bank, seen in given.routes.items()}
        save_file({**tensors, "logits": given.logits.cpu().contiguous()}, folder / f"{number}.safetensors")


def compare_outputs(
    outputs: Outputs,
    domains: dict[str, Windows],
    folder: Path,
    *,
    prefix: int,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[dict[str, Divergence], Divergence, dict[BankId, float]]:
    """Run the second model on the same domains, in the same batches, and compare it with what record wrote.

    Returns:
        its divergence by domain, and over all text; and per bank of routed experts the share of the first model's
        choices (a token's k experts are k of them) that the second does not make. Differences caused by earlier layers
        count too. Banks whose module regroups its tokens are left out.
    """
    sums: dict[str, _Sums] = {domain: _Sums() for domain in domains}
    changed: dict[BankId, int] = defaultdict(int)
    made: dict[BankId, int] = defaultdict(int)
    for number, given in enumerate(outputs.given(domains, prefix, batch_size, progress)):
        with safe_open(folder / f"{number}.safetensors", framework="pt") as stored:
            names = set(stored.keys())
            sums[given.domain].add(stored.get_tensor("logits").to(given.logits.device), given, prefix)
            for bank, now in given.routes.items():
                if str(bank) in names:
                    before = stored.get_tensor(str(bank)).to(now.device)
                    kept = (before[:, :, None] == now[:, None]).any(-1)
                    changed[bank] += int((~kept & (before >= 0)).sum())
                    made[bank] += int((before >= 0).sum())
    flips = {bank: changed[bank] / count for bank, count in sorted(made.items()) if count}
    return {domain: one.divergence() for domain, one in sums.items()}, sum(sums.values(), _Sums()).divergence(), flips


def compare_scores(first: Scores, second: Scores) -> tuple[dict[str, Divergence], Divergence]:
    """The second's divergence from the first, by domain and over all text, without the logits' (kl)."""
    sums = {domain: _Sums() for domain in first.losses}
    for domain, one in sums.items():
        one.score(*((scores.losses[domain], scores.likely[domain]) for scores in (first, second)))
    found = {domain: one.divergence() for domain, one in sums.items()}
    overall = sum(sums.values(), _Sums()).divergence()
    return {domain: replace(one, kl=None) for domain, one in found.items()}, replace(overall, kl=None)


def kl_divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """Sum over predictions of KL(softmax(first) || softmax(second)), in nats, of logits (P, V)."""
    total = 0.0
    for one, other in zip(torch.split(first, _POSITIONS), torch.split(second, _POSITIONS)):
        p, q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).masked_fill(p == -torch.inf, 0).sum(dtype=torch.float64))
    return total


class _Sums:
    """Over the windows of one text."""

    def __init__(self) -> None:
        self._losses: list[tuple[float, float]] = []
        self._kl, self._same, self._predictions = 0.0, 0, 0

    def add(self, first: torch.Tensor, given: Given, prefix: int) -> None:
        self._losses += zip(logit_losses(first, given.ids), logit_losses(given.logits, given.ids))
        self._kl += sum(map(kl_divergence, first, given.logits))
        self._same += int((first.argmax(-1) == given.logits.argmax(-1)).sum())
        self._predictions += len(given.ids) * predictions(given.ids, prefix)

    def score(self, first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._losses += zip(first[0].tolist(), second[0].tolist())
        self._same += int((first[1] == second[1]).sum())
        self._predictions += first[1].numel()

    def __add__(self, other: "_Sums") -> "_Sums":
        both = _Sums()
        both._losses = self._losses + other._losses
        both._kl, both._same = self._kl + other._kl, self._same + other._same
        both._predictions = self._predictions + other._predictions
        return both

    def divergence(self) -> Divergence:
        losses, count = np.array(self._losses), self._predictions
        first, second = (Perplexity.of(total, count).value for total in losses.sum(0).tolist())
        change = effect((losses[:, 1] - losses[:, 0]) * len(losses) / count, LEVEL)
        return Divergence(first, second, change, self._kl / count, self._same / count, count)
