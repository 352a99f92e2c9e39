"""Which experts a model chooses: load, co-activation and entropy of every layer, and the choice for each token.

A token's choice is the routing with which its layer's experts were called. Slots of weight 0, and indices outside the
bank (skip and identity experts), count for no expert.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from sedetect.adapters.quantized import serve_linears
from sedetect.analysis.common import (
    Analysis,
    Group,
    LayerArrays,
    Standing,
    Text,
    groups_of,
    new_analysis,
    standing,
    text_settings,
)
from sedetect.calibration.windows import Windows, batches
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank, check_eval, find_banks
from sedetect.models.layers import run_tokens
from sedetect.models.routers import RouterWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPEATED = "{}: runs more than once in a forward; of the texts, its first pass is kept"


@torch.no_grad()
def analyze_routing(
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    *,
    texts: Sequence[Text] = (),
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    progress: Callable[[str, int], None] = lambda label, tokens: None,
) -> Analysis:
    """The routing of a model over text.

    Args:
        model: in eval mode; restored on exit.
        domains: windows as calibration_windows gives them.
        texts: whose tokens' choices are kept one by one.
        layers: numbers of the layers; None for all with routed experts.
        batch_size: windows per forward.
        progress: called with (domain, tokens in the batch) after every batch.
    Returns:
        an Analysis of the kind "routing"; of a layer with E experts, top-k and D domains, float32 unless it says
        otherwise: load (D, E) int64: tokens that chose the expert, tokens (D,) int64: of all
        coactivation (E, E) int64: tokens that chose both; the diagonal is the load over all domains
        weight (E,): mean routing weight of the tokens that chose it, NaN for none
        entropy (D,): of softmax(router logits), mean over tokens, in nats; NaN where no router was found
        text.index (T, k) int64 and text.weight (T, k): the choice of every token of the texts, one after another,
        the first time they pass through the layer
    Raises:
        SedetectError: for a layer without experts, a model in training mode, and what find_banks refuses.
    """
    check_eval(model)
    groups = groups_of(find_banks(model), layers)
    result = new_analysis("routing", model)
    result.settings = text_settings(domains, texts)
    counters = [_Counter(group.routed, len(domains)) for group in groups]
    with ExitStack() as stack:
        stack.callback(serve_linears(model)[0])
        watch = stack.enter_context(RouterWatch(model, [group.routed for group in groups]))
        calls = [(one.bank, partial(one.call, watch)) for one in counters]
        stack.callback(attach(model, calls))
        for number, (domain, windows) in enumerate(domains.items()):
            for ids, _ in batches(windows, batch_size):
                _run(model, counters, ids, number)
                progress(domain, ids.numel())
        for text in texts:
            _run(model, counters, text.ids[None], None)
    for group, counter in zip(groups, counters):
        result.layers[group.routed.id] = _result(group, counter)
        if watch.routers[group.routed.id] is None:
            result.notes.append(f"{group.routed.id}: no router found beside its experts, so its entropy is not known")
        if texts and counter.lost:
            result.notes.append(f"{group.routed.id}: regroups its tokens; those of the texts cannot be identified")
        if counter.repeated:
            result.notes.append(REPEATED.format(group.routed.id))
    return result


def _run(model: "PreTrainedModel", counters: list["_Counter"], ids: torch.Tensor, domain: int | None) -> None:
    for counter in counters:
        counter.domain, counter.length, counter.called = domain, ids.numel(), False
    run_tokens(model, ids)


def effective(load: torch.Tensor) -> float:
    """The effective number of experts of a load (E,): exp of its entropy, which is their number where the load is even.
    NaN without a load.
    """
    if not int(load.sum()):
        return math.nan
    share = load.double() / load.sum()
    return float(torch.special.entr(share).sum().exp())


def router_spread(layer: LayerArrays) -> float | None:
    """The effective number of experts of a token's routing probabilities: exp of their entropy, mean over all tokens;
    None if the entropy of a domain is unknown.
    """
    entropy, tokens = layer.arrays["entropy"].double(), layer.arrays["tokens"]
    return None if entropy.isnan().any() else float(((entropy * tokens).sum() / tokens.sum()).exp())


def distance(load: torch.Tensor) -> torch.Tensor:
    """(D,): how much of each domain's load (D, E) lies elsewhere than that of all domains (total variation); NaN for a
    domain without any."""
    share = load.double() / load.sum(1, keepdim=True)
    of_all = load.double().sum(0) / load.sum()
    return (share - of_all).abs().sum(1) / 2


def lift(coactivation: torch.Tensor, tokens: int) -> torch.Tensor:
    """(E, E): tokens that chose both experts, over what they would be if the two were chosen independently; NaN where
    one was never chosen, and on the diagonal."""
    load = coactivation.diagonal().double()
    found = coactivation.double() * tokens / (load[:, None] * load)
    return found.fill_diagonal_(torch.nan).masked_fill(~found.isfinite(), torch.nan)


def standings(layer: LayerArrays, expert: int) -> dict[str, Standing]:
    """The Standing of one expert in its layer: by tokens that chose it, and by their mean routing weight."""
    load = layer.arrays["load"].sum(0)
    share = load.double() / layer.arrays["tokens"].sum().clamp(min=1)
    return {
        "share of the tokens": standing(share, expert),
        "mean routing weight": standing(layer.arrays["weight"], expert),
    }


class _Counter:
    """What one bank was called with. domain: number of the text under way, None for a short one of length tokens;
    called: whether this forward has passed here already, as those of a layer in a loop do."""

    def __init__(self, bank: Bank, domains: int):
        self.bank, self.length, self.lost = bank, 0, False
        self.called = self.repeated = False
        self.domain: int | None = None
        experts = bank.experts
        self.load = torch.zeros(domains, experts, dtype=torch.int64)
        self.tokens = torch.zeros(domains, dtype=torch.int64)
        self.coactivation = torch.zeros(experts, experts, dtype=torch.int64)
        self.weights = torch.zeros(experts, dtype=torch.float64)
        self.entropy = torch.zeros(domains, 2, dtype=torch.float64)  # sum, tokens
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def call(
        self, watch: RouterWatch, module: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        logits = watch.take(self.bank, len(index))
        if self.domain is None:
            if self.called:
                self.repeated = True
            elif len(index) == self.length:
                self.kept.append((index.long().cpu(), weights.float().cpu()))
            else:
                self.lost = True
        else:
            self._count(index, weights, logits)
        self.called = True
        return run_inner(module, x, index, weights)

    def _count(self, index: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor | None) -> None:
        self._to(index.device)
        place = chosen_slots(index, weights, self.bank.experts)
        chosen = torch.zeros(len(index), self.bank.experts + 1, device=index.device).scatter_(1, place, 1)[:, :-1]
        load = chosen.sum(0).long()
        self.load[self.domain] += load
        self.tokens[self.domain] += len(index)
        self.coactivation += (chosen.t() @ chosen).long()
        sums = self.weights.new_zeros(self.bank.experts + 1)
        self.weights += sums.index_add_(0, place.flatten(), weights.double().flatten())[:-1]
        if logits is not None:
            shares = logits.softmax(-1)
            self.entropy[self.domain, 0] += torch.special.entr(shares).sum(-1).double().sum()
            self.entropy[self.domain, 1] += len(logits)

    def _to(self, device: torch.device) -> None:
        """On the device of the first call, and from then on there: no call waits for the host."""
        for name in ("load", "tokens", "coactivation", "weights", "entropy"):
            setattr(self, name, getattr(self, name).to(device))


def chosen_slots(index: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """(T, k) int64: the expert of every slot, and E for slots without one."""
    return index.long().masked_fill((index < 0) | (index >= experts) | (weights == 0), experts)


def _result(group: Group, counter: _Counter) -> LayerArrays:
    arrays = {name: getattr(counter, name).cpu() for name in ("load", "tokens", "coactivation")}
    load = arrays["load"].sum(0)
    arrays["weight"] = (counter.weights.cpu() / load).float()  # 0 / 0 is NaN
    entropy = counter.entropy.cpu()
    arrays["entropy"] = (entropy[:, 0] / entropy[:, 1]).float()
    if counter.kept:
        arrays |= {f"text.{name}": torch.cat(parts) for name, parts in zip(("index", "weight"), zip(*counter.kept))}
    return LayerArrays(group.routed.experts, group.members[: group.routed.experts], arrays)
