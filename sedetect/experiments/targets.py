"""The targets of an experiment: names as on the command line, and random controls."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import nn

from sedetect.errors import Argument, SedetectError
from sedetect.experiments.ablation import resolve
from sedetect.experiments.residual_stream import Residual
from sedetect.models.banks import find_banks
from sedetect.ranking.rule import rank
from sedetect.stats.model import ModelStats
from sedetect.stats.place import Place, Weight
from sedetect.stats.proof import Proof

Target = Place | Weight


def needs_statistics(spec: str) -> bool:
    """Whether choose_experts takes this choice from statistics."""
    return spec == "candidates" or spec.startswith("top-frequency:")


def check_choice(spec: str, model: nn.Module) -> None:
    """Raise the errors of choose_experts before anything is measured."""
    if spec != "candidates" and _number(spec, model) is None:
        resolve(model, _names(spec))


def choose_experts(
    spec: str,
    model: nn.Module,
    stats: ModelStats | None = None,
    seed: int = 0,
    residual: Residual | None = None,
    proof: Proof | None = None,
) -> list[Target]:
    """The experts or weights that a command-line choice names.

    "candidates" (proved ones too, refuted ones not; by residual stream and proof where they are given; an empty list
    where there is none) and
    "top-frequency:N" (most rows) take statistics of the model; "random:N" draws from the routed experts of all layers;
    else names separated by commas: experts ("L1E28", "L8shared") or single weights of a down_proj ("L1E28[101,14]").
    Raises SedetectError for anything else, and for what the model does not have.
    """
    if spec == "candidates":
        return [expert.place for expert in rank(_given(spec, stats), residual=residual, proof=proof).found]
    number = _number(spec, model)
    if number is None:
        return list(resolve(model, _names(spec)))
    experts = routed_experts(model)
    if spec.startswith("random:"):
        return _draw(np.random.default_rng(seed), experts, number)
    banks = _given(spec, stats).banks
    rows = {place: int(banks[place.bank].rows[place.number]) for place in experts}
    return list[Target](sorted(experts, key=lambda place: -rows[place])[:number])


def _given(spec: str, stats: ModelStats | None) -> ModelStats:
    if stats is None:
        raise SedetectError(f"--experts {spec}: needs statistics; give those of the model")
    return stats


def _names(spec: str) -> list[str]:
    return [name.strip() for name in re.split(r",(?![^\[]*\])", spec)]


def _number(spec: str, model: nn.Module) -> int | None:
    """N of random:N and top-frequency:N, None for other choices."""
    kind, _, number = spec.partition(":")
    if kind not in ("random", "top-frequency"):
        return None
    most = len(routed_experts(model))
    if not number.isdecimal() or not 0 < int(number) <= most:
        raise SedetectError(
            Argument("spec"), f" {spec}: {number or 'nothing'} is not a number; give one from 1 to {most}"
        )
    return int(number)


def routed_experts(model: nn.Module) -> list[Place]:
    """Every routed expert of a model, in order."""
    banks = [bank for bank in find_banks(model) if bank.id.routed]
    return [Place(*bank.id, e) for bank in banks for e in range(bank.experts)]


def random_controls(model: nn.Module, experts: Sequence[Target], number: int) -> dict[str, list[list[Target]]]:
    """Up to number disjoint sets of random targets, as many as experts: of the same banks, and of any routed bank.

    Keys "same layers" and "anywhere". Fewer sets, or none, if too few experts are left. Shared
    experts have no peers.
    """
    generator = np.random.default_rng(0)
    others = [place for place in routed_experts(model) if place not in set(experts)]
    others = [others[i] for i in generator.permutation(len(others))]
    weights = [one for one in experts if isinstance(one, Weight)]
    counts = Counter(p.bank for p in experts if isinstance(p, Place) and p.bank.routed)
    peers = {key: [p for p in others if p.bank == key] for key in counts}
    banks = {bank.id: bank for bank in find_banks(model)}

    def weight_of(expert: Place) -> Weight:
        bank = banks[expert.bank]
        return Weight(expert, int(generator.integers(bank.hidden)), int(generator.integers(bank.intermediate)))

    same: list[list[Target]] = []
    anywhere: list[list[Target]] = []
    for draw in range(number):
        parts = [peers[key][draw * count : (draw + 1) * count] for key, count in sorted(counts.items())]
        if sum(map(len, parts)) == counts.total() and (parts or weights):
            same.append([*(place for part in parts for place in part), *(weight_of(one.expert) for one in weights)])
        size = counts.total() + len(weights)
        part = others[draw * size : (draw + 1) * size]
        if part and len(part) == size:
            anywhere.append([*part[: counts.total()], *map(weight_of, part[counts.total() :])])
    return {"same layers": same, "anywhere": anywhere}


def _draw(generator: np.random.Generator, experts: list[Place], number: int) -> list[Target]:
    return [experts[i] for i in sorted(generator.choice(len(experts), number, replace=False).tolist())]
