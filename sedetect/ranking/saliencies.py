"""Saliencies: the importance of experts as pruning methods measure it, from statistics alone.

Over the counted rows of expert j (n_j of them), with y its down_proj output and g its routing weight as the model's
own router gives it:

    frequency   n_j
    gate-sum    sum of g                          REAP's weighted_expert_frequency_sum
    ean-sum     sum of ||y||_2                    expert activation norm; ean_sum in REAP's code
    ean-mean    sum of ||y||_2 / n_j              ean_mean in REAP's code
    man         the same number as ean-mean, under its name in arXiv 2606.15716 (mean activation norm)
    msan        sum of ||y||_2^2 / n_j            mean squared activation norm, arXiv 2606.15716
    reap        sum of g ||y||_2 / n_j            arXiv 2510.13999
    max         largest |y|                       what super experts are found by, arXiv 2507.23279

Where a token takes one expert and its weight is renormalized, every g is 1: gate-sum is frequency then, reap is man.
An expert that saw no row has 0. Experts compare within a layer: a layer's norms grow with its depth. Sums of several
runs add up (ModelStats.merge), so the saliencies of merged statistics are those of all their text.

Where the code of REAP (CerebrasResearch/reap at 1970473) differs: its g is the softmax over all logits,
renormalized over the chosen experts where the config has norm_topk_prob (since its change #13; Mixtral's config has
not, though its router does renormalize), whatever else the model's router does (sigmoid, correction bias, groups,
scaling); its max_activations is signed, so that a large negative
output does not count; every expert is computed for every token, of which routed ones count; and with "frequency",
"ean_ca" and "max_activations" its switch to preserve super experts has no effect. Here pruning by any of these
saliencies keeps the protected experts (sedetect.compression.pruning).

Rows with a NaN or Inf are missing from the sums: the saliency of an expert that gave one is NaN (unknown).
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sedetect.documents import Document, short_repr
from sedetect.errors import Argument, SedetectError
from sedetect.ranking.result import Ranking
from sedetect.stats.bank import BankStats
from sedetect.stats.model import ModelStats, opened
from sedetect.stats.place import BankId, Place


def _mean(sums: torch.Tensor, state: BankStats) -> torch.Tensor:
    return sums / state.rows.clamp(min=1)


SALIENCIES: dict[str, Callable[[BankStats], torch.Tensor]] = {
    "frequency": lambda state: state.rows.double(),
    "gate-sum": lambda state: state.gate_sum,
    "ean-sum": lambda state: state.norm_sum,
    "ean-mean": lambda state: _mean(state.norm_sum, state),
    "man": lambda state: _mean(state.norm_sum, state),
    "msan": lambda state: _mean(state.sqnorm_sum, state),
    "reap": lambda state: _mean(state.gate_norm_sum, state),
    "max": lambda state: state.out_max.double(),
}


def check_saliency(by: str) -> None:
    """Raise SedetectError for a name that is not in SALIENCIES."""
    if by not in SALIENCIES:
        raise SedetectError(Argument("by"), f" {by}: is not a saliency; use one of {', '.join(SALIENCIES)}")


def saliency(stats: ModelStats | str | os.PathLike[str], by: str) -> dict[BankId, torch.Tensor]:
    """The saliency of every routed expert: bank -> (E,) float64; NaN for an expert with a NaN or Inf in its outputs.

    stats may be the path of a statistics file, or of a folder of results.

    Raises SedetectError for a name that is none of SALIENCIES.
    """
    check_saliency(by)
    stats = opened(stats)
    return {
        bank: SALIENCIES[by](state).masked_fill(state.nonfinite > 0, torch.nan)
        for bank, state in sorted(stats.banks.items())
        if bank.routed
    }


def ascending(values: torch.Tensor) -> list[int]:
    """Experts by saliency (E,), lowest first; equal ones by number, NaN last, so that experts of unknown saliency are
    not pruned.
    """
    return values.argsort(stable=True).tolist()


def found_places(ranking: Ranking) -> list[Place]:
    """Ranking.found as bare places: the experts to protect."""
    return [expert.place for expert in ranking.found]


@dataclass(frozen=True)
class Saliencies(Document):
    """The saliencies as a file to share, with which several ratios can be tried without the model.

    model, digest, dtype, tokens, sequences    as in the statistics' header
    by                 name of the saliency
    super_experts      experts to protect (Ranking.found): name, verdict, and their place (1 is the lowest) of so many
                       (of) in their layer by this saliency
    layers             per routed bank, in order: bank ("decoder.1.routed"), module, top_k, values (E numbers by expert,
                       null for unknown), rows (E integers), ascending (experts, lowest saliency first)
    """

    FORMAT = "sedetect-saliency"

    model: str
    digest: str
    dtype: str
    tokens: int
    sequences: int
    by: str
    super_experts: list[dict[str, Any]]
    layers: list[dict[str, Any]]

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """format, version and every field, for JSON."""
        return super().to_dict() | vars(self)


def saliency_document(stats: ModelStats, by: str, ranking: Ranking) -> Saliencies:
    """The saliencies of statistics, and where the experts that ranking says to protect stand among them."""
    header = stats.header
    values_of = saliency(stats, by)
    found = []
    for expert in ranking.found:
        values = values_of.get(expert.bank)
        if values is not None:  # shared experts are not ranked
            place = ascending(values).index(expert.number) + 1
            found.append({"name": str(expert), "verdict": expert.verdict, "place": place, "of": len(values)})
    layers = []
    for bank, values in values_of.items():
        known = header.banks[str(bank)]
        numbers = [None if math.isnan(value) else value for value in values.tolist()]
        layers.append(
            {
                "bank": str(bank),
                "module": known.module,
                "top_k": known.top_k,
                "values": numbers,
                "rows": stats.banks[bank].rows.tolist(),
                "ascending": ascending(values),
            }
        )
    return Saliencies(header.model, header.digest, header.dtype, header.tokens, header.sequences, by, found, layers)
