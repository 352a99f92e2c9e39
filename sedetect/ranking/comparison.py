"""Compare: two or more profiles side by side. Base against tuned, bf16 against quantized, one language against
another, base against pruned, or a series of training checkpoints.

Models and precisions may differ; their banks (layers, kinds, numbers of experts) must not.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sedetect.documents import Document, short_repr
from sedetect.errors import SedetectError
from sedetect.files import finite
from sedetect.ranking.rule import rank
from sedetect.ranking.stability import Peak, check_banks, peak_of
from sedetect.stats.model import ModelStats, opened, several
from sedetect.stats.place import BankId, Place, parse_place

RELATED = 0.3  # mean rank correlation within layers: of two unrelated models it is near 0
Kept = dict[BankId, list[int]]


@dataclass(frozen=True)
class Run:
    """One profile: names of the paper's set, and of the candidates (Ranking.found), largest first."""

    name: str
    model: str
    dtype: str
    tokens: int
    named: tuple[str, ...]
    found: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """The change from one run to the next.

    joined, left              candidates that the next run gains or loses
    named_joined, named_left  the same of the paper's set
    correlation               Spearman's rank correlation of out_max over the routed and shared experts that saw rows
                              and stayed finite in both, ties at their average rank; None below 2 or without variance
    experts                   their number
    """

    joined: tuple[str, ...]
    left: tuple[str, ...]
    named_joined: tuple[str, ...]
    named_left: tuple[str, ...]
    correlation: float | None
    experts: int


@dataclass(frozen=True)
class Moved:
    """An expert of the paper's set of any run.

    values    its out_max in every run; NaN where it saw no row or was pruned
    channels  output channel of that value; None where it saw no row or was pruned
    found     whether it is a candidate, per run
    """

    name: str
    values: tuple[float, ...]
    channels: tuple[int | None, ...]
    found: tuple[bool, ...]

    @property
    def ratio(self) -> float | None:
        """Value in the last run over that in the first; None where that was 0 or one of them is not known."""
        known = not math.isnan(self.values[0]) and not math.isnan(self.values[-1])
        return self.values[-1] / self.values[0] if known and self.values[0] else None

    @property
    def channel_changed(self) -> bool:
        """Whether its largest output moved to another channel, over the runs in which it is a candidate; over all
        runs where it is one in fewer than two."""
        chosen = [channel for channel, found in zip(self.channels, self.found, strict=True) if found]
        return len({c for c in (chosen if len(chosen) > 1 else self.channels) if c is not None}) > 1


@dataclass(frozen=True)
class Comparison(Document):
    """The result of compare; steps[i] leads from runs[i] to runs[i + 1].

    moved       by the largest value in any run, descending
    formed      number of the first run from which on every run has the candidates of the last; None for fewer than
                three runs
    notes       facts that the reader must know: runs of models that seem unrelated
    """

    FORMAT = "sedetect-comparison"

    runs: tuple[Run, ...]
    steps: tuple[Step, ...]
    moved: tuple[Moved, ...]
    formed: int | None
    notes: tuple[str, ...] = ()

    __repr__ = short_repr

    @property
    def equal(self) -> bool:
        """Whether the candidates are the same in every run."""
        return len({frozenset(run.found) for run in self.runs}) == 1

    def to_dict(self) -> dict[str, Any]:
        """format, version, equal, formed, runs, steps, and moved with ratio and channel_changed, for JSON."""
        return super().to_dict() | {
            "equal": self.equal,
            "formed": self.formed,
            "notes": list(self.notes),
            "runs": [asdict(run) for run in self.runs],
            "steps": [asdict(step) for step in self.steps],
            "moved": [finite(asdict(m) | {"ratio": m.ratio, "channel_changed": m.channel_changed}) for m in self.moved],
        }


def compare(
    runs: Sequence[ModelStats | str | os.PathLike[str]],
    names: Sequence[str] | None = None,
    kept: Sequence[Kept | None] | None = None,
) -> Comparison:
    """Rank each run and compare sets, order and magnitudes. The order of the runs is that of a series.

    Args:
        runs: two or more, or their paths. names: one each; by default their models' names.
        kept: for each run of a pruned model, the experts of the original that it has, per bank (number i there was
            number `kept[bank][i]`), as its pruning.json says; names are then those of the original. None for the rest.
    Raises:
        SedetectError: for fewer than two runs, names that are not one each, and banks that do not match, by name.
    """
    states = [opened(run) for run in several(runs)]
    names = [run.header.model for run in states] if names is None else list(names)
    if len(states) < 2 or len(names) != len(states):
        raise SedetectError(
            f"compare: {len(states)} runs and {len(names)} names; give two or more runs and a name each"
        )
    maps = [one or {} for one in kept or [None] * len(states)]
    if len(maps) != len(states):
        raise SedetectError(f"compare: {len(states)} runs and {len(maps)} maps of kept experts; give one for each")
    whole = [(name, run) for name, run, one in zip(names, states, maps, strict=True) if not one]
    if whole:
        check_banks([run for _, run in whole], [name for name, _ in whole])
    sizes = {bank: state.num_experts for _, run in whole for bank, state in run.banks.items()}
    if not whole:  # all are pruned: as many as any of them had
        for bank, numbers in (pair for one in maps for pair in one.items()):
            sizes[bank] = max(sizes.get(bank, 0), max(numbers) + 1)
    for name, run, one in zip(names, states, maps, strict=True):
        _check_kept(name, run, one, sizes)
    rankings = [rank(run) for run in states]
    named, found = (
        [tuple(str(_original(e.place, one)) for e in chosen) for chosen, one in zip(experts, maps)]
        for experts in ([r.super_experts for r in rankings], [r.found for r in rankings])
    )
    described = [
        Run(name, run.header.model, run.header.dtype, run.header.tokens, *members)
        for name, run, *members in zip(names, states, named, found, strict=True)
    ]
    by_bank = [_values(run, one, sizes) for run, one in zip(states, maps)]
    values = [np.concatenate([np.empty(0), *parts]) for parts in by_bank]
    steps = []
    for before, after, a, b in zip(described, described[1:], values, values[1:]):
        both = np.isfinite(a) & np.isfinite(b)
        changes = (
            _without(after.found, before.found),
            _without(before.found, after.found),
            _without(after.named, before.named),
            _without(before.named, after.named),
        )
        steps.append(Step(*changes, spearman(a[both], b[both]), int(both.sum())))
    moved = []
    for name in dict.fromkeys(name for run in described for name in (*run.named, *run.found)):
        peaks = [_peak(run, parse_place(name), one) for run, one in zip(states, maps)]
        there = tuple(name in run.found for run in described)
        moved.append(Moved(name, tuple(p.value for p in peaks), tuple(p.channel for p in peaks), there))
    moved.sort(key=lambda m: -max(value for value in m.values if not math.isnan(value)))
    formed = len(described) - 1
    while formed and set(described[formed - 1].found) == set(described[-1].found):
        formed -= 1
    notes = []
    for last in range(1, len(states)):
        alike = _alike(by_bank[last - 1], by_bank[last])
        if states[last - 1].header.digest != states[last].header.digest and alike is not None and alike < RELATED:
            notes.append(
                f"{names[last]} and {names[last - 1]} seem unrelated: within a layer, the rank correlation of their "
                f"experts is {alike:.2f} on average, and equal numbers need not mean the same expert"
            )
    return Comparison(
        tuple(described), tuple(steps), tuple(moved), formed if len(described) > 2 else None, tuple(notes)
    )


def _check_kept(name: str, run: ModelStats, kept: Kept, sizes: dict[BankId, int]) -> None:
    """Raise SedetectError where the pruning of a run does not match the other models."""
    for bank, numbers in kept.items():
        mine = run.banks[bank].num_experts if bank in run.banks else 0
        if mine != len(numbers) or (bank in sizes and max(numbers, default=-1) >= sizes[bank]):
            raise SedetectError(
                f"{name}: its pruning.json keeps {len(numbers)} experts of {bank}, its statistics have {mine}, the "
                f"original {sizes.get(bank, 'unknown')}; give the profile of the pruned checkpoint and of its original"
            )


def _original(place: Place, kept: Kept) -> Place:
    """The expert with its number in the original model."""
    if place.bank not in kept:
        return place
    return Place(*place.bank, kept[place.bank][place.number])


def _peak(run: ModelStats, place: Place, kept: Kept) -> Peak:
    """peak_of of an expert of the original."""
    if place.bank not in kept:
        return peak_of(run, place)
    if place.number not in kept[place.bank]:
        return Peak(math.nan, None)
    return peak_of(run, Place(*place.bank, kept[place.bank].index(place.number)))


def _alike(a: list[np.ndarray], b: list[np.ndarray]) -> float | None:
    """Mean rank correlation within the banks of two runs: between layers, values grow with depth in every model."""
    both = [(x[np.isfinite(x) & np.isfinite(y)], y[np.isfinite(x) & np.isfinite(y)]) for x, y in zip(a, b, strict=True)]
    known = [one for one in (spearman(x, y) for x, y in both) if one is not None]
    return sum(known) / len(known) if known else None


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation of a and b (N,); None for N < 2 and where one of them is constant."""
    if len(a) < 2:
        return None
    ranks = np.stack([_average_ranks(a), _average_ranks(b)])
    ranks -= ranks.mean(1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1)
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.all() else None


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """(N,) float64: places in ascending order from 1; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[group]


def _values(stats: ModelStats, kept: Kept, sizes: dict[BankId, int]) -> list[np.ndarray]:
    """Per bank, (E,) float64: out_max of every routed and shared expert of the original; NaN for one that saw no row or
    was pruned."""
    values = []
    for bank, state in sorted(stats.banks.items()):
        if bank.base != "dense":
            seen = np.where(state.rows.numpy() > 0, state.out_max.double().numpy(), np.nan)
            if bank in kept and bank in sizes:
                whole = np.full(sizes[bank], np.nan)
                whole[kept[bank]] = seen
                seen = whole
            values.append(seen)
    return values


def _without(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)
