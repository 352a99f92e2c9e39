"""Compare: two or more profiles side by side. Base against tuned, bf16 against quantized, one language against
another, or a series of training checkpoints.

The models and precisions may differ, that is the point; their banks (layers, kinds, numbers of experts) may not.
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
from sedetect.ranking.stability import check_banks, peak_of
from sedetect.stats.model import ModelStats, opened


@dataclass(frozen=True)
class Run:
    """One profile: names of the paper's set, and of those of it with the verdict "super", largest first."""

    name: str
    model: str
    dtype: str
    tokens: int
    named: tuple[str, ...]
    found: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """From one run to the next.

    joined, left              super experts (verdict "super") that the next run has more, or no more
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

    values    its out_max in every run; 0 where it saw nothing
    channels  output channel of that value; None where it saw nothing
    found     whether it has the verdict "super", per run
    """

    name: str
    values: tuple[float, ...]
    channels: tuple[int | None, ...]
    found: tuple[bool, ...]

    @property
    def ratio(self) -> float | None:
        """Value in the last run over that in the first; None where that was 0."""
        return self.values[-1] / self.values[0] if self.values[0] else None

    @property
    def channel_changed(self) -> bool:
        """Whether its largest output moved to another channel, over the runs in which it is a super expert; over all
        runs where it is one in fewer than two."""
        chosen = [channel for channel, found in zip(self.channels, self.found, strict=True) if found]
        return len({c for c in (chosen if len(chosen) > 1 else self.channels) if c is not None}) > 1


@dataclass(frozen=True)
class Comparison(Document):
    """What compare found; steps[i] leads from runs[i] to runs[i + 1].

    moved       by the largest value in any run, descending
    formed      number of the first run from which on every run has the super experts of the last; None for fewer than
                three runs
    """

    FORMAT = "sedetect-comparison"

    runs: tuple[Run, ...]
    steps: tuple[Step, ...]
    moved: tuple[Moved, ...]
    formed: int | None

    __repr__ = short_repr

    @property
    def equal(self) -> bool:
        """Whether the super experts (verdict "super") are the same in every run."""
        return len({frozenset(run.found) for run in self.runs}) == 1

    def to_dict(self) -> dict[str, Any]:
        """format, version, equal, formed, runs, steps, and moved with ratio and channel_changed, for JSON."""
        return super().to_dict() | {
            "equal": self.equal,
            "formed": self.formed,
            "runs": [asdict(run) for run in self.runs],
            "steps": [asdict(step) for step in self.steps],
            "moved": [finite(asdict(m) | {"ratio": m.ratio, "channel_changed": m.channel_changed}) for m in self.moved],
        }


def compare(runs: Sequence[ModelStats | str | os.PathLike[str]], names: Sequence[str] | None = None) -> Comparison:
    """Rank each run and compare sets, order and magnitudes. The order of the runs is that of a series.

    Args:
        runs: two or more, or their paths. names: one each; by default their models' names.
    Raises:
        SedetectError: for fewer than two runs, names that are not one each, and banks that do not match, by name.
    """
    runs = [opened(run) for run in runs]
    names = [run.header.model for run in runs] if names is None else list(names)
    if len(runs) < 2 or len(names) != len(runs):
        raise SedetectError(f"compare: {len(runs)} runs and {len(names)} names; give two or more runs and a name each")
    check_banks(list(runs), names)
    rankings = [rank(run) for run in runs]
    described = [
        Run(name, run.header.model, run.header.dtype, run.header.tokens,
            tuple(map(str, ranking.super_experts)), tuple(map(str, ranking.found)))
        for name, run, ranking in zip(names, runs, rankings, strict=True)
    ]  # fmt: skip
    values = [_values(run) for run in runs]
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
    for name, place in {str(e): e for ranking in rankings for e in ranking.super_experts}.items():
        peaks = [peak_of(run, place) for run in runs]
        found = tuple(name in run.found for run in described)
        moved.append(Moved(name, tuple(p.value for p in peaks), tuple(p.channel for p in peaks), found))
    moved.sort(key=lambda m: -max(value for value in m.values if not math.isnan(value)))
    formed = len(described) - 1
    while formed and set(described[formed - 1].found) == set(described[-1].found):
        formed -= 1
    return Comparison(tuple(described), tuple(steps), tuple(moved), formed if len(described) > 2 else None)


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


def _values(stats: ModelStats) -> np.ndarray:
    """(N,) float64: out_max of every routed and shared expert, by bank; NaN for one that saw no row."""
    values = [
        np.where(state.rows.numpy() > 0, state.out_max.double().numpy(), np.nan)
        for bank, state in sorted(stats.banks.items())
        if bank.base != "dense"
    ]
    return np.concatenate(values) if values else np.empty(0)


def _without(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)
