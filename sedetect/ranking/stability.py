"""Stability: do the candidates depend on the thresholds, or on the text?

verdict_sensitivity asks the first over the thresholds of the verdict, margins how far from them each expert is, and
sensitivity over the grid of "Unveiling Super
Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279, table 9 of the ICLR 2026 text), where
Qwen3-30B-A3B keeps 3 super experts, DeepSeek-V2-Lite 2 and Mixtral-8x7B 1 in every cell. agreement asks the second,
over domains or over disjoint shards of the calibration text:

    result = sedetect.profile_model(model, keep_rounds=True)
    agreement(result.domains)
    agreement({str(number): shard for number, shard in enumerate(result.shards)})
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from sedetect.documents import Document, short_repr
from sedetect.errors import SedetectError
from sedetect.files import finite
from sedetect.ranking.rule import rank
from sedetect.stats.model import ModelStats, opened
from sedetect.stats.place import Place

PERCENTILES = (95.0, 99.0, 99.5, 99.9)
FRACTIONS = (0.07, 0.08, 0.09, 0.1)
VERDICT = {"min_value": 50.0, "min_ratio": 10.0, "fraction": 0.1}  # rank's defaults, which decide who is a candidate
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Cell:
    """One pair of thresholds: names of the paper's set, and of the candidates (Ranking.found), largest first."""

    percentile: float
    fraction: float
    named: tuple[str, ...]
    found: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """The set under every pair of thresholds; cells by percentile, then by fraction, in the given order."""

    percentiles: tuple[float, ...]
    fractions: tuple[float, ...]
    cells: tuple[Cell, ...]

    __repr__ = short_repr

    @property
    def constant(self) -> bool:
        """Whether the candidates are the same in every cell."""
        return len({frozenset(cell.found) for cell in self.cells}) <= 1

    @property
    def rule_constant(self) -> bool:
        """Whether the paper's set is the same in every cell."""
        return len({frozenset(cell.named) for cell in self.cells}) <= 1

    def row(self, percentile: float) -> list[Cell]:
        """The cells of one percentile, by fraction."""
        return [cell for cell in self.cells if cell.percentile == percentile]

    def to_dict(self) -> dict[str, Any]:
        """constant, rule_constant, and cells with percentile, fraction, named and found (lists of names), for JSON."""
        return {
            "constant": self.constant,
            "rule_constant": self.rule_constant,
            "cells": [asdict(cell) for cell in self.cells],
        }


def sensitivity(
    stats: ModelStats | str | os.PathLike[str],
    percentiles: Sequence[float] = PERCENTILES,
    fractions: Sequence[float] = FRACTIONS,
) -> Grid:
    """Rank statistics, or those of a path, once per pair of thresholds, everything else at rank's defaults.

    Args:
        percentiles: in [0, 100). fractions: of the largest value, in (0, 1).
    Raises:
        SedetectError: for what rank refuses.
    """
    stats = opened(stats)
    cells = []
    for percentile in percentiles:
        for fraction in fractions:
            ranking = rank(stats, percentile=percentile, fraction=fraction)
            named = tuple(map(str, ranking.super_experts))
            cells.append(Cell(percentile, fraction, named, tuple(map(str, ranking.found))))
    return Grid(tuple(percentiles), tuple(fractions), tuple(cells))


def verdict_sensitivity(stats: ModelStats | str | os.PathLike[str]) -> dict[str, dict[float, tuple[str, ...]]]:
    """The candidates under other thresholds of the verdict, each alone at FACTORS of its default.

    Returns:
        name in VERDICT -> threshold, ascending -> names, largest first.
    Raises:
        SedetectError: for what rank refuses.
    """
    stats = opened(stats)
    return {
        name: {default * f: tuple(map(str, rank(stats, **{name: default * f}).found)) for f in FACTORS}  # type: ignore[arg-type]
        for name, default in VERDICT.items()
    }


def margins(stats: ModelStats | str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """How far each expert that rank shows is from the thresholds that make it a candidate: its value over each of them.

    Returns:
        name, largest first -> threshold -> quotient, at least 1 where it passes; without what was not observed.
        "set": |y| over the rule's fraction of the maximum; "stands out": |y| over min_value; "median" and "first
        tokens": its multiple of what its layer's others reach, in the median and on first tokens, over min_ratio.
    Raises:
        SedetectError: for what rank refuses.
    """
    ranking = rank(stats)
    distances = {}
    for expert in sorted(ranking.judged, key=lambda expert: -expert.value):
        compared = {
            "set": (expert.value, ranking.threshold),
            "stands out": (expert.value, ranking.criteria["min_value"]),
            "median": (expert.ratio, ranking.criteria["min_ratio"]),
            "first tokens": (expert.first_ratio, ranking.criteria["min_ratio"]),
        }
        distances[str(expert)] = {
            name: value / wanted for name, (value, wanted) in compared.items() if value is not None and wanted > 0
        }
    return distances


@dataclass(frozen=True)
class Agreed:
    """An expert that is in the set of some part, or a candidate in it.

    named, found     number of parts in which it is in the paper's set, and a candidate
    values           its out_max in every part, in the order of the parts; NaN where it gave one or saw no row
    lowest, highest  of the others
    """

    name: str
    named: int
    found: int
    values: tuple[float, ...]

    @property
    def lowest(self) -> float:
        return min(value for value in self.values if not math.isnan(value))

    @property
    def highest(self) -> float:
        return max(value for value in self.values if not math.isnan(value))


@dataclass(frozen=True)
class Agreement:
    """How far the sets of several parts of the text agree.

    parts    their names; tokens of each
    found    the candidates of each part, largest first
    experts  every expert of the paper's set of any part, and every candidate: those of most parts first, then by their
             highest value
    jaccard  of the candidates of each pair of parts, |A and B| / |A or B|, 1 for two empty sets
    """

    parts: tuple[str, ...]
    tokens: tuple[int, ...]
    found: tuple[tuple[str, ...], ...]
    experts: tuple[Agreed, ...]
    jaccard: dict[tuple[str, str], float]

    __repr__ = short_repr

    @property
    def same(self) -> bool:
        """Whether every part alone gives the same candidates."""
        return len({frozenset(names) for names in self.found}) <= 1

    @property
    def mean_jaccard(self) -> float:
        return sum(self.jaccard.values()) / len(self.jaccard) if self.jaccard else 1.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON: same, mean_jaccard; parts with name, tokens, found; experts with lowest and highest; jaccard."""
        parts = zip(self.parts, self.tokens, self.found, strict=True)
        return {
            "same": self.same,
            "mean_jaccard": self.mean_jaccard,
            "parts": [{"name": name, "tokens": tokens, "found": list(found)} for name, tokens, found in parts],
            "experts": [finite(asdict(e) | {"lowest": e.lowest, "highest": e.highest}) for e in self.experts],
            "jaccard": [{"parts": list(pair), "jaccard": value} for pair, value in self.jaccard.items()],
        }


def agreement(parts: Mapping[str, ModelStats | str | os.PathLike[str]]) -> Agreement:
    """Rank each part alone (domain or shard name -> statistics of one model) and compare the sets.

    Raises SedetectError for no parts, and for parts whose banks differ.
    """
    if not isinstance(parts, Mapping):
        raise SedetectError(f"parts: is a {type(parts).__name__}; give a dictionary of names and ModelStats or paths")
    runs = {name: opened(stats) for name, stats in parts.items()}
    check_banks(list(runs.values()), list(runs))
    rankings = {name: rank(stats) for name, stats in runs.items()}
    found = {name: tuple(map(str, ranking.found)) for name, ranking in rankings.items()}
    members = {
        str(expert): expert for ranking in rankings.values() for expert in (*ranking.super_experts, *ranking.found)
    }
    experts = [
        Agreed(
            name,
            sum(name in map(str, ranking.super_experts) for ranking in rankings.values()),
            sum(name in names for names in found.values()),
            tuple(peak_of(stats, place).value for stats in runs.values()),
        )
        for name, place in members.items()
    ]
    experts.sort(key=lambda e: (-e.found, -e.named, -e.highest))
    pairs = {(a, b): _jaccard(set(found[a]), set(found[b])) for a, b in combinations(runs, 2)}
    tokens = tuple(stats.header.tokens for stats in runs.values())
    return Agreement(tuple(runs), tokens, tuple(found.values()), tuple(experts), pairs)


@dataclass(frozen=True)
class Stability(Document):
    """Both answers: a grid, the verdicts and the margins per profile, and the agreement of each kind of parts, by
    name."""

    FORMAT = "sedetect-stability"

    grids: dict[str, Grid]
    verdicts: dict[str, dict[str, dict[float, tuple[str, ...]]]]
    agreement: dict[str, Agreement]
    margins: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """For JSON: format, version, grids, margins, agreement, verdicts (lists of threshold and found, by name)."""
        return super().to_dict() | {
            "grids": {name: grid.to_dict() for name, grid in self.grids.items()},
            "verdicts": {
                name: {
                    threshold: [{"threshold": value, "found": list(found)} for value, found in by_value.items()]
                    for threshold, by_value in verdicts.items()
                }
                for name, verdicts in self.verdicts.items()
            },
            "agreement": {name: one.to_dict() for name, one in self.agreement.items()},
            "margins": {
                name: {expert: {what: finite(x) for what, x in by.items()} for expert, by in of.items()}
                for name, of in self.margins.items()
            },
        }


class Peak(NamedTuple):
    """out_max of one expert and its output channel; NaN and None for an expert without rows."""

    value: float
    channel: int | None


def peak_of(stats: ModelStats, place: Place) -> Peak:
    """The largest |y| of an expert, wherever it ranks. Raises KeyError for a bank that the statistics lack."""
    record = stats.banks[place.bank].peak_of(place.number)
    return Peak(math.nan, None) if record is None else Peak(record.value, record.channel)


def check_banks(runs: list[ModelStats], names: list[str]) -> None:
    """Raise SedetectError for no runs, and where two do not have the same banks with the same numbers of experts."""
    if not runs:
        raise SedetectError("no statistics to compare; give at least one run")
    shapes = [{str(bank): state.num_experts for bank, state in run.banks.items()} for run in runs]
    for name, shape in zip(names[1:], shapes[1:], strict=True):
        differ = [bank for bank in {**shapes[0], **shape} if shapes[0].get(bank) != shape.get(bank)]
        if differ:
            bank = differ[0]
            each = [f"{s[bank]} experts" if bank in s else "no such bank" for s in (shapes[0], shape)]
            more = f" (and {len(differ) - 1} more banks)" if len(differ) > 1 else ""
            raise SedetectError(
                f"bank {bank}{more}: {names[0]} has {each[0]}, {name} has {each[1]}; "
                "unrelated models, or one pruned whose profile lacks pruning.json; give runs of models with the same "
                "layers and experts"
            )


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0
