"""Super weights: the single weight of a super expert's down_proj behind its outlier.

An element of a down_proj output is a sum over the intermediate channels j, y[c] = sum_j W[c, j] h[j] (+ bias[c]). For
the super experts of Qwen3-30B-A3B the published account (arXiv 2507.23279) names one (c, j) each. super_weights runs
the sequence that gave an expert its largest output once more, takes h of that one token from the expert's own weights,
and divides the outlier among the products:

    result = sedetect.profile_model(model, tokenizer=tokenizer)
    for found in find_super_weights(model, sedetect.rank(result.stats), result.windows):
        print(found, found.share)

Switching off that weight alone (sedetect.stats.place.Weight) takes exactly its share from the outlier.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sedetect.adapters.quantized import linear_weight
from sedetect.adapters.stacked import as_experts
from sedetect.calibration.windows import Windows
from sedetect.documents import Document, short_repr
from sedetect.errors import SedetectError
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank, find_banks
from sedetect.models.experts import expert_hidden, expert_output
from sedetect.models.layers import run_tokens
from sedetect.ranking.result import Ranking, SuperExpert
from sedetect.stats.place import BankId, Place, place_of

_ROUNDING = 0.02  # error of a 16-bit output, relative to its summands

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Contribution:
    """One product of the sum: intermediate channel j, W[c, j], h[j], and W[c, j] h[j] / y[c].

    The shares of all channels add to 1 (less the bias), but some are negative: a share may exceed 1. cumulative is the
    sum of the shares down to this one, largest first.
    """

    intermediate: int
    weight: float
    hidden: float
    share: float
    cumulative: float


@dataclass(frozen=True)
class SuperWeight:
    """The products behind the largest output of one expert.

    expert       where it is; str: "L1E28[101,14]", the output and the intermediate channel of its super weight
    channel      output channel c
    position, token_id, sequence_id, source    of the token, as in SuperExpert
    value        y[c] of that token, summed in float64 from the weights as stored and h as the layer computes it
    profiled     |y[c]| as the profile saw it, in another batch and rounded to the model's precision
    gate         the token's routing weight (1 for shared experts)
    top          the products with the largest shares, descending; the first is the super weight
    """

    expert: Place
    channel: int
    position: int
    token_id: int
    sequence_id: int
    source: str | None
    value: float
    profiled: float
    gate: float
    top: tuple[Contribution, ...]

    def __str__(self) -> str:
        return f"{self.expert}[{self.channel},{self.intermediate}]"

    @property
    def intermediate(self) -> int:
        """The intermediate channel of the super weight."""
        return self.top[0].intermediate

    @property
    def weight(self) -> float:
        return self.top[0].weight

    @property
    def hidden(self) -> float:
        """h of that channel."""
        return self.top[0].hidden

    @property
    def share(self) -> float:
        """The share of the outlier that this weight explains."""
        return self.top[0].share

    def to_dict(self) -> dict[str, Any]:
        """name (of the expert), every field but expert, and those of the super weight, ready for JSON."""
        own = {name: getattr(self, name) for name in ("intermediate", "weight", "hidden", "share")}
        fields = asdict(self)
        del fields["expert"]
        return {"name": str(self.expert)} | own | fields


@dataclass(frozen=True)
class SuperWeights(Document):
    """The super weights of a model's super experts; headline: of their ranking."""

    FORMAT = "sedetect-super-weights"

    model: str
    headline: str
    found: list[SuperWeight]

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """format, version, model, headline, and super_weights as a list of SuperWeight.to_dict()."""
        known = {"model": self.model, "headline": self.headline}
        return super().to_dict() | known | {"super_weights": [one.to_dict() for one in self.found]}


@torch.no_grad()
def find_super_weights(
    model: "PreTrainedModel",
    experts: Ranking | Iterable[SuperExpert],
    windows: Mapping[str, Windows] | Iterable[Windows],
    *,
    top: int = 3,
) -> list[SuperWeight]:
    """The weight behind the largest output of each expert, by one forward of each sequence they come from.

    Args:
        model: the profiled model, in eval mode; it may run under a profile or an ablation, which stay as they are.
        experts: a ranking, of which those to protect are taken, or any experts of one.
        windows: those that were profiled (ModelProfile.windows, or calibration_windows with the same arguments).
        top: how many products to keep of each expert.
    Returns:
        one per expert, in their order.
    Raises:
        SedetectError: for an expert whose sequence is not among the windows or whose token is not known (rows that were
            not mapped), one that the model does not have, weights that cannot be read, and where the token does not
            visit the expert in this run (another model, or another precision).
    """
    if top < 1:
        raise SedetectError(f"top {top}: must be at least 1")
    chosen = experts.found if isinstance(experts, Ranking) else list(experts)
    every = list(windows.values() if isinstance(windows, Mapping) else windows)
    banks = {bank.id: bank for bank in find_banks(model)}
    by_sequence: dict[tuple[str | None, int], list[SuperExpert]] = defaultdict(list)
    for expert in chosen:
        bank = banks.get(expert.bank)
        if bank is None or expert.number >= bank.experts:
            raise SedetectError(
                f"{expert}: {type(model).__name__} has no such expert; give the model that was profiled"
            )
        if not expert.seen:
            raise SedetectError(f"{expert}: saw no row; profile more text, or give the others alone")
        if expert.position < 0 or expert.sequence_id < 0:
            raise SedetectError(f"{expert}: the token of its largest output is not known; profile with mapped rows")
        by_sequence[expert.source, expert.sequence_id].append(expert)
    results: dict[Place, SuperWeight] = {}
    for (source, number), here in by_sequence.items():
        ids = _window(every, source, number, here[0])
        by_bank: dict[BankId, list[SuperExpert]] = defaultdict(list)
        for expert in here:
            by_bank[expert.bank].append(expert)
        calls = [
            (banks[key], partial(_step_in, banks[key], mine, len(ids), top, results.__setitem__))
            for key, mine in by_bank.items()
        ]
        undo = attach(model, calls)
        try:
            run_tokens(model, ids[None])
        finally:
            undo()
    missing = [expert for expert in chosen if expert.place not in results]
    if missing:
        raise SedetectError(f"{missing[0]}: its bank did not run; give the model that was profiled")
    return [results[expert.place] for expert in chosen]


def _window(windows: list[Windows], source: str | None, number: int, expert: SuperExpert) -> torch.Tensor:
    """(L,) int64: the token ids of one sequence."""
    for one in windows:
        if one.source == source:
            found = (one.numbers == number).nonzero().flatten()
            if len(found):
                return one.ids[found[0]]
    raise SedetectError(
        f"{expert}: sequence {number} of source {source} is not among the windows; "
        "give the text, window length, seed and number of tokens of the profile"
    )


def _step_in(
    bank: Bank,
    experts: list[SuperExpert],
    length: int,
    top: int,
    keep: Callable[[Place, SuperWeight], None],
    module: nn.Module,
    x: torch.Tensor,
    *routing: torch.Tensor,
) -> torch.Tensor:
    """Resolve these experts of one bank, then compute the module as it would have been."""
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) != length:
        raise SedetectError(
            f"{bank.path}: regroups its tokens, {len(flat)} rows for {length} tokens; give another model"
        )
    for expert in experts:
        keep(expert.place, _resolve(bank, module, expert, flat, routing, top))
    return run_inner(module, x, *routing) if bank.routed else module(x)


def _resolve(
    bank: Bank,
    module: nn.Module,
    expert: SuperExpert,
    x: torch.Tensor,
    routing: tuple[torch.Tensor, ...],
    top: int,
) -> SuperWeight:
    """x (L, H) are the module's rows; of a shared expert's down_proj, (L, I)."""
    row, channel = expert.position, expert.channel
    if row >= len(x):
        raise SedetectError(f"{expert}: position {row} is outside its window of {len(x)} tokens; profile again")
    gate = 1.0
    if bank.routed:
        index, gates = routing
        gate = float((gates[row] * (index[row] == expert.number)).sum())
        if not gate:
            raise SedetectError(
                f"{expert}: token {row} of sequence {expert.sequence_id} does not visit it in this run; "
                "give the model and precision that were profiled"
            )
    value, contributions = products_of(bank, module, expert.number, x[row : row + 1], channel, top)
    place = (expert.position, expert.token_id, expert.sequence_id, expert.source)
    return SuperWeight(expert.place, channel, *place, value, expert.value, gate, contributions)


def products_of(
    bank: Bank, module: nn.Module, number: int, x: torch.Tensor, channel: int, top: int
) -> tuple[float, tuple[Contribution, ...]]:
    """One channel of an expert's output y of one row, and the products of it with the largest shares, descending.

    x is the row of the module, (1, H); of a shared expert's down_proj, (1, I). Raises SedetectError for weights that
    cannot be read.
    """
    if bank.routed:
        h = expert_hidden(module, x, number)[0]
        experts = as_experts(module)
        weight = experts.down_proj[number]
        weight = weight[:, channel] if experts.is_transposed else weight[channel]
        bias = experts.down_proj_bias[number][channel] if experts.has_bias else None
        own = expert_output(module, x, number)[0, channel]
    else:
        h, own = x[0], module(x)[0, channel]
        weight, bias = _linear_row(bank, module, channel)
    weight, h = weight.double().cpu(), h.to(weight.dtype).double().cpu()
    products = weight * h  # (I,)
    value = products.sum() + (0 if bias is None else bias.double().cpu())
    if abs(float(own) - float(value)) > _ROUNDING * float(products.abs().sum()):
        raise SedetectError(
            f"{place_of(bank.id, number, bank.experts)}: its weights add up to {float(value):g} and its output is "
            f"{float(own):g}; what else is added to it is not known"
        )
    shares = products / value
    order = shares.argsort(descending=True, stable=True)[:top]
    cumulative = shares[order].cumsum(0)
    found = zip(order.tolist(), cumulative, strict=True)
    return float(value), tuple(
        Contribution(j, float(weight[j]), float(h[j]), float(shares[j]), float(total)) for j, total in found
    )


def _linear_row(bank: Bank, module: nn.Module, channel: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One row (I,) of a linear's weight, and its bias. Raises SedetectError for weights stored in another way."""
    weight, bias = linear_weight(module), getattr(module, "bias", None)
    if weight is None or weight.shape != (bank.hidden, bank.intermediate):
        raise SedetectError(f"{bank.path} ({type(module).__name__}): its weights cannot be read; load them unquantized")
    return weight[channel], None if bias is None else bias[channel]
