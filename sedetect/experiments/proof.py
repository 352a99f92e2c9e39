"""Proof: test whether a model depends on the candidates of its statistics.

An expert may have every statistical sign of a super expert (arXiv 2507.23279) and no function: two may stand in for
each other, a gate or a learned sink may have taken the work away. So outputs are switched off where they are extreme,
and only there: at an expert's trigger tokens (triggers.py), as they are in the unchanged model. Up to three runs speak
of each candidate: all candidates off, this one alone, all but this one. Beside them stand controls: the other experts
that the same tokens visit in the same layers. What all of them cost at every token is said, and decides nothing.

    proved     switching it off raises perplexity by the smallest effect that matters or more, beyond the worst control,
               and the sinks, or the largest activation of the residual stream, fall by half or more, in a model whose
               sinks are well above uniform attention. Alone, or as a set: what it adds to switching off all others,
               where all together cost anything.
    refuted    alone and within the set, the whole interval lies below the smallest effect that matters
    undecided  anything else

Intervals are over documents (windows of text), each at level / number of candidates (Bonferroni).

The smallest effect, 2% of perplexity, stands between what nine small trained models showed on 36 to 64 windows of 512
tokens: experts without a function cost 1.1% at most at their trigger tokens (their intervals end at 1.5%); of those
with one, the weakest member of a set adds 2.1%, the weakest that works alone costs 9% (on Chinese alone, of which
the models saw little in training, 2.4%). What counts as attention sinks: sedetect.stats.residual.SINK_MASS.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from sedetect.calibration.windows import Windows
from sedetect.errors import Argument, SedetectError
from sedetect.experiments.ablation import resolve
from sedetect.experiments.chain import find_feeders
from sedetect.experiments.effects import effect
from sedetect.experiments.evaluation import predictions, window_losses
from sedetect.experiments.judgment import ALL, EVERYWHERE, Evidence, all_but, alone, judge
from sedetect.experiments.residual_stream import observe_residual
from sedetect.experiments.switching import Below, WindowWatch, switched_off
from sedetect.experiments.triggers import Triggers
from sedetect.models.attach import attach
from sedetect.models.banks import find_banks
from sedetect.models.identity import model_digest, model_name
from sedetect.models.layers import decoder_layers, refuse_encoder_decoder
from sedetect.models.wrappers import unwrap
from sedetect.ranking.rule import rank
from sedetect.stats.model import ModelStats
from sedetect.stats.place import PREDICTORS, Place, parse_place
from sedetect.stats.proof import Proof, Switching
from sedetect.stats.residual import Residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST = 0.02
_CHAIN_TEXTS = 8


def check_numbers(smallest: float, level: float) -> None:
    """Raise SedetectError for arguments of prove that are out of range."""
    if not 0 < smallest < math.inf:
        raise SedetectError(Argument("smallest"), f" {smallest:g}: must be above 0, as 0.02 for 2%")
    if not 0 < level < 1:
        raise SedetectError(Argument("level"), f" {level:g}: must be above 0 and below 1")


def check_names(model: nn.Module, names: str | None) -> None:
    """Raise the errors of candidates_of before anything is measured."""
    if names is not None:
        resolve(model, [parse_place(name.strip()) for name in names.split(",")])


def candidates_of(stats: ModelStats, residual: Residual, names: str | None = None) -> dict[Place, float]:
    """Experts to prove, and the largest |y| of each: those of these names (separated by commas), or the candidates of
    statistics and residual stream.

    Raises SedetectError for a name that the statistics do not have.
    """
    if names is None:
        found = rank(stats, residual=residual).found
        return {expert.place: expert.value for expert in found if expert.stack != PREDICTORS}
    chosen = {}
    for name in names.split(","):
        place = parse_place(name.strip())
        state = stats.banks.get(place.bank)
        if state is None or place.number >= state.num_experts:
            raise SedetectError(f"{place}: the statistics have no such expert; layers and experts count from 0")
        if place.stack == PREDICTORS:
            raise SedetectError(f"{place}: is in a head that the model does not run; name experts of its layers")
        chosen[place] = float(state.out_max[place.number])
    return chosen


@torch.no_grad()
def prove(
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    candidates: Mapping[Place, float],
    *,
    prefix: int,
    smallest: float = SMALLEST,
    level: float = 0.05,
    chain: bool = False,
    controls: int = 5,
    seed: int = 0,
    batch_size: int = 8,
    sequences: int = 8,
    progress: Callable[[str, int, int, float], None] = lambda label, done, total, seconds: None,
) -> Proof:
    """Switch candidates off at their trigger tokens and judge the effect (module docstring).

    Args:
        model: in eval mode, unchanged.
        domains: evaluation windows, all of one length, each beginning with prefix tokens of the tokenizer's prefix;
            not those that the statistics are of.
        candidates: routed or shared experts, and the largest |y| of each in the statistics.
        smallest: relative rise of perplexity that matters.
        level: chance that any of the intervals misses.
        chain: look for the experts that feed each candidate, too (chain.py).
        controls: draws of other experts, at most; no more than the router chooses beside the candidates. seed: of
            the draws.
        sequences: windows on which sinks and the residual stream are observed.
        progress: called with (label, runs done, runs in all, estimated seconds for all) before every run.
    Raises:
        SedetectError: for numbers out of range, an expert that the model does not have, an encoder-decoder model, and
            a bank that regroups its tokens.
    """
    check_numbers(smallest, level)
    model = unwrap(model)
    refuse_encoder_decoder(model, "proof")
    begun = time.perf_counter()
    banks = {place: bank for place, bank in resolve(model, candidates).items() if isinstance(place, Place)}
    ids = torch.cat([windows.ids for windows in domains.values()])
    digest = model_digest(model)
    observe = partial(observe_residual, model, domains, prefix=prefix, sequences=sequences, digest=digest)
    marks: list[float] = []
    plain = observe(progress=lambda tokens: marks.append(time.perf_counter()))
    ready = time.perf_counter()
    # The first sequence also starts the kernels.
    observing = (marks[-1] - marks[0]) * len(marks) / (len(marks) - 1) if len(marks) > 1 else ready - begun
    with WindowWatch(model, ids) as watch:
        triggers = Triggers(banks, candidates, watch, ids.shape[1])
        first = min((place.layer for place in banks), default=0)
        below = Below(decoder_layers(model, find_banks(model)), first, watch)
        text = _Text(model, ids, prefix, batch_size)
        undo = attach(model, triggers.calls)
        try:
            with below.record():
                base = text.losses()
        finally:
            undo()
        measuring = time.perf_counter() - ready
        text.skip(below, base)

        fired = [place for place in banks if triggers.tokens[place]]
        runs = _plan(fired)
        offs = {label: triggers.off(places, len(ids)) for label, places in runs.items()}
        if fired:
            runs[EVERYWHERE], offs[EVERYWHERE] = fired, triggers.everywhere(fired, len(ids))
        draws = triggers.controls(len(ids), controls, seed)
        total = len(runs) + len(draws)
        estimate = (ready - begun) + measuring * (1 + total * text.share) + observing * len(runs)
        changes: dict[str, np.ndarray] = {}
        observed: dict[str, Residual] = {}
        for done, (label, off) in enumerate(offs.items()):
            progress(label, done, total, estimate)
            with switched_off(model, list(banks.values()), watch, off):
                changes[label] = text.losses() - base
                observed[label] = observe()
        drawn = []
        for number, off in enumerate(draws):
            progress(f"control {number + 1}", len(runs) + number, total, estimate)
            with switched_off(model, list(banks.values()), watch, off):
                drawn.append(text.losses() - base)
        progress("done", total, total, estimate)

    evidence = Evidence(changes, drawn, plain, observed)
    each = level / max(1, len(banks))
    verdicts = []
    for place in banks:
        tokens = triggers.tokens[place]
        firsts = sum(position < max(prefix, 1) for _, position in tokens)
        verdict = judge(place, fired, evidence, smallest=smallest, level=each, triggers=len(tokens), firsts=firsts)
        if chain:
            before = [ids[window, : position + 1] for window, position in tokens[:_CHAIN_TEXTS]]
            verdict = replace(verdict, feeders=find_feeders(model, place, before))
        verdicts.append(verdict)
    return Proof(
        model=model_name(model),
        digest=digest,
        tokens=ids.numel(),
        documents=len(ids),
        smallest=smallest,
        level=level,
        sink_mean=plain.sink_mean,
        best_head=plain.best_head,
        residual_max=plain.inner_max,
        uniform=plain.uniform,
        verdicts=verdicts,
        runs=[
            Switching(
                label,
                [str(place) for place in places],
                effect(changes[label], each),
                observed[label].sink_mean,
                observed[label].inner_max,
            )
            for label, places in runs.items()
        ],
        controls=[Switching(f"control {n + 1}", [], effect(change, each)) for n, change in enumerate(drawn)],
        seconds=time.perf_counter() - begun,
        sinks=plain.sinks_line,
        notes=[] if drawn else ["no controls: the router chooses no other expert at the trigger tokens"],
    )


def _plan(fired: list[Place]) -> dict[str, list[Place]]:
    """The runs by label, and the experts switched off in each."""
    runs = {ALL: fired} if len(fired) > 1 else {}
    runs |= {alone(place): [place] for place in fired}
    if len(fired) > 2:
        runs |= {all_but(place, fired): [other for other in fired if other != place] for place in fired}
    return runs


class _Text:
    """The text of a proof, and its losses under the current interventions. share: fraction of the layers that run."""

    def __init__(self, model: "PreTrainedModel", ids: torch.Tensor, prefix: int, batch_size: int):
        self._model, self._ids, self._prefix, self._batch_size = model, ids, prefix, batch_size
        self._below: Below | None = None
        self.share = 1.0

    def losses(self, batches: int | None = None) -> np.ndarray:
        """(N,) mean loss of each window in nats per token; with batches, of the first batches only."""
        sums: list[float] = []
        with nullcontext() if self._below is None else self._below.replay():
            for ids in torch.split(self._ids, self._batch_size)[:batches]:
                sums += window_losses(self._model, ids, self._prefix)
        return np.array(sums) / predictions(self._ids, self._prefix)

    def skip(self, below: Below, base: np.ndarray) -> None:
        """From now on skip these layers, if that reproduces the losses of base."""
        if not below.usable:
            return
        self._below = below
        again = self.losses(1)
        if (again == base[: len(again)]).all():
            self.share = below.share
        else:
            self._below = None
