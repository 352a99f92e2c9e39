"""The headline and the notes of a ranking."""

import math
from dataclasses import dataclass
from typing import Any

from sedetect.ranking.coverage import FEW_ROWS
from sedetect.ranking.evidence import ValueTests
from sedetect.ranking.result import SuperExpert
from sedetect.stats.place import Place
from sedetect.stats.residual import Residual


@dataclass(frozen=True)
class Judged:
    """The input of headline and notes.

    named      the set; others: candidates and what a proof tried beside it
    tests      the value tests of the population
    experts    their number, and unseen: how many of them saw no row
    thin       of what is judged, the names of those whose layer's median is of experts with few rows
    nonfinite  experts and dense MLPs that gave NaN or Inf
    limits     per stack, the layer below which the set is
    formed     with layers="data", the layers that form massive activations
    criteria   the arguments of rank
    residual   what was seen of the residual stream, where it was
    """

    named: list[SuperExpert]
    others: list[SuperExpert]
    tests: ValueTests
    experts: int
    unseen: int
    thin: list[str]
    nonfinite: list[Place]
    limits: dict[str, int]
    formed: list[int] | None
    criteria: dict[str, Any]
    residual: Residual | None


def make_headline(judged: Judged) -> str:
    """One line: the proved super experts and the candidates, or the reason why there are none."""
    found = sorted(judged.named + judged.others, key=lambda expert: -expert.value)
    by_verdict = {word: [e for e in found if e.verdict == word] for word in ("proved", *_UNPROVED, "refuted")}
    parts = []
    if proved := by_verdict["proved"]:
        parts.append(f"{len(proved)} super expert{'s' * (len(proved) > 1)}, proved: {_listed(proved)}")
    for word, counted in _UNPROVED.items():
        if chosen := by_verdict[word]:
            parts.append(f"{len(chosen)} {counted[len(chosen) > 1]}: {_listed(chosen)}")
    if refuted := by_verdict["refuted"]:
        parts.append(f"{len(refuted)} refuted: {_listed(refuted)}")
        if len(parts) == 1:
            parts.insert(0, "no super expert")
    text = "; ".join(parts) or f"no candidate: {_why_none(judged)}"
    # a proof observes sinks itself
    if judged.residual is not None and judged.residual.has_sinks is False and not proved:
        text += "; no notable attention sinks"
    return text + (f"; non-finite values from {judged.nonfinite[0]} on" if judged.nonfinite else "")


_UNPROVED = {"candidate": ("candidate", "candidates"), "undecided": ("undecided", "undecided")}


def _why_none(judged: Judged) -> str:
    named, tests, limits, formed = judged.named, judged.tests, judged.limits, judged.formed
    if not judged.experts:
        return "the statistics hold no routed or shared experts"
    if not len(tests.population):
        return f"no finite routed or shared expert in the layers below the limit ({_limits(limits)})"
    if formed is not None and not formed:
        return "no layer forms a massive activation that later layers carry"
    if tests.maximum == 0:
        return f"none of the {len(tests.population)} experts saw a row with an output other than 0"
    if not named and formed:
        where = ", ".join(f"L{layer}" for layer in formed)
        return f"none of the experts of the layers that form massive activations ({where}) is in the set"
    if not named:
        at = _short(tests.percentile_value)
        return f"none of the {len(tests.population)} experts lies above the percentile, {at}"
    needed = (
        f"|y| {_short(judged.criteria['min_value'])} and {_short(judged.criteria['min_ratio'])}x its layer's median"
    )
    return (
        f"the rule names {len(named)} of {len(tests.population)} because it always names at least one expert; the "
        f"largest, "
        f"{_described(named[0])}, has no sign of a super expert (to stand out it needs {needed})"
    )


def make_notes(judged: Judged) -> list[str]:
    """Facts that the reader of a ranking must know, one line each."""
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
    barred = [e for e in judged.others if not e.late and judged.tests.threshold < e.value and e.verdict is not None]
    if barred and judged.formed is None:
        notes.append(f"kept out of the set by the percentile alone: {_listed(barred)}")
    if any(expert.verdict == "candidate" for expert in named + judged.others):
        notes.append("a candidate is unproved; switch it off to see whether the model depends on it (sedetect prove)")
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


def _listed(experts: list[SuperExpert], most: int = 10) -> str:
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return ", ".join(map(_described, experts[:most])) + more


def _described(expert: SuperExpert) -> str:
    if not expert.seen:
        return f"{expert} (no row)"
    ratio = "" if expert.ratio is None else f", {_short(expert.ratio)}x its layer's median"
    return f"{expert} (|y| {_short(expert.value)}{ratio})"


def _limits(limits: dict[str, int]) -> str:
    return ", ".join(f"{stack} {limit}" for stack, limit in limits.items())


def _short(x: float) -> str:
    return f"{x:.0f}" if 100 <= x < math.inf else f"{x:.3g}"
