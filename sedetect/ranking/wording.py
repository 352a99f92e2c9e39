"""The headline and the notes of a ranking."""

import math
from dataclasses import dataclass
from typing import Any

from sedetect.ranking.coverage import FEW_ROWS
from sedetect.ranking.evidence import ValueTests
from sedetect.ranking.result import SuperExpert
from sedetect.stats.place import Place


@dataclass(frozen=True)
class Judged:
    """What headline and notes are told of.

    named      the set; barred: what only the percentile keeps out of it
    tests      the value tests of the population
    experts    their number, and unseen: how many of them saw no row
    thin       of what is judged, the names of those whose layer's median is of experts with few rows
    nonfinite  experts and dense MLPs that gave NaN or Inf
    limits     per stack, the layer below which the set is
    formed     with layers="data", the layers that form massive activations
    criteria   the arguments of rank
    """

    named: list[SuperExpert]
    barred: list[SuperExpert]
    tests: ValueTests
    experts: int
    unseen: int
    thin: list[str]
    nonfinite: list[Place]
    limits: dict[str, int]
    formed: list[int] | None
    criteria: dict[str, Any]


def make_headline(judged: Judged) -> str:
    """One line: the super experts, or why there is none."""
    named, tests, limits, formed = judged.named, judged.tests, judged.limits, judged.formed
    found = [expert for expert in named if expert.verdict == "super"]
    if found:
        text = f"{len(found)} super expert{'s' * (len(found) > 1)}: {_listed(found)}"
    elif not judged.experts:
        text = "no super expert: the statistics hold no routed or shared experts"
    elif not len(tests.population):
        text = f"no super expert: no finite routed or shared expert in the layers below the limit ({_limits(limits)})"
    elif formed is not None and not formed:
        text = "no super expert: no layer forms a massive activation that later layers carry"
    elif tests.maximum == 0:
        text = f"no super expert: none of the {len(tests.population)} experts saw a row with an output other than 0"
    elif not named and formed:
        where = ", ".join(f"L{layer}" for layer in formed)
        text = (
            f"no super expert: none of the experts of the layers that form massive activations ({where}) is in the set"
        )
    elif not named:
        at = _short(tests.percentile_value)
        text = f"no super expert: none of the {len(tests.population)} experts lies above the percentile, {at}"
    elif outlier := next((expert for expert in named if expert.verdict == "outlier"), None):
        which = "the largest the rule names" if outlier is named[0] else "the largest that stands out"
        lacks = "lacks the first-token signature" if outlier.signature is False else "writes nothing later layers carry"
        text = f"no super expert: {which}, {_described(outlier)}, {lacks}"
    elif lacking := _nearly(named[0], judged.criteria):
        text = (
            f"no super expert: the rule names {len(named)} of {len(tests.population)}, and the largest, "
            f"{_described(named[0])}, has all signs of one but {lacking}"
        )
    else:
        needed = f"needs |y| {_short(judged.criteria['min_value'])} and {_short(judged.criteria['min_ratio'])}x"
        text = (
            f"no super expert: the rule names {len(named)} of {len(tests.population)} because it always names someone, "
            f"and the largest, {_described(named[0])}, does not stand out ({needed})"
        )
    return text + (f"; non-finite values from {judged.nonfinite[0]} on" if judged.nonfinite else "")


def make_notes(judged: Judged) -> list[str]:
    """What the reader of a ranking must know, one line each."""
    named, percentile, nonfinite = judged.named, judged.criteria["percentile"], judged.nonfinite
    notes = []
    population = len(judged.tests.population)
    room = population - 1 - math.floor((population - 1) * percentile / 100)
    if population and room <= 1:
        notes.append(f"small population: percentile {percentile:g} of {population} experts admits {room} at most")
    if judged.formed:
        notes.append(
            f"the set is of the layers that form massive activations: {', '.join(f'L{n}' for n in judged.formed)}"
        )
    if judged.barred:
        notes.append(f"kept out of the set by the percentile alone: {_listed(judged.barred)}")
    unobserved = sum(expert.signature is None for expert in named)
    if unobserved:
        notes.append(f"first-token signature not observed for {unobserved} of {len(named)} experts of the set")
    if judged.unseen:
        count = "counts" if judged.unseen == 1 else "count"
        notes.append(
            f"{judged.unseen} of {judged.experts} experts saw no row and {count} as 0; calibrate on more tokens"
        )
    if judged.thin:
        names = ", ".join(judged.thin[:10]) + (f" and {len(judged.thin) - 10} more" if len(judged.thin) > 10 else "")
        notes.append(
            f"half of the experts beside {names} saw fewer than {FEW_ROWS} rows: their median grows with more "
            "tokens, and multiples of it shrink"
        )
    if len(nonfinite) == 1:
        notes.append(f"{nonfinite[0]} gave NaN or Inf and is left out")
    elif nonfinite:
        notes.append(f"{len(nonfinite)} experts or dense MLPs gave NaN or Inf and are left out, first {nonfinite[0]}")
    if len(judged.limits) > 1:
        notes.append(f"one population of all stacks, each below its own layer limit ({_limits(judged.limits)})")
    return notes


def _nearly(expert: SuperExpert, criteria: dict[str, Any]) -> str | None:
    """What an expert lacks that has more than half of the signs of a super expert; None where it has fewer."""
    signs = {
        f"|y| {_short(criteria['min_value'])}": expert.value >= criteria["min_value"],
        f"{_short(criteria['min_ratio'])}x its layer's median": (expert.ratio or 0) >= criteria["min_ratio"],
        "the first-token signature": expert.signature,
        "a massive activation that later layers carry": expert.carried,
    }
    known = [shown for shown in signs.values() if shown is not None]
    lacking = [name for name, shown in signs.items() if shown is False]
    return " and ".join(lacking) if 2 * sum(known) > len(known) else None


def _listed(experts: list[SuperExpert], most: int = 10) -> str:
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return ", ".join(map(_described, experts[:most])) + more


def _described(expert: SuperExpert) -> str:
    ratio = "" if expert.ratio is None else f", {_short(expert.ratio)}x its layer's median"
    return f"{expert} (|y| {_short(expert.value)}{ratio})"


def _limits(limits: dict[str, int]) -> str:
    return ", ".join(f"{stack} {limit}" for stack, limit in limits.items())


def _short(x: float) -> str:
    return f"{x:.0f}" if 100 <= x < math.inf else f"{x:.3g}"
