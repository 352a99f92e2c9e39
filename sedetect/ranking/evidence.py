"""The values of each bank that the rule and the verdicts use, the rule's two value tests, and the candidate test."""

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sedetect.errors import Argument, SedetectError
from sedetect.kernels.records import Record, decode
from sedetect.stats.bank import BankStats
from sedetect.stats.model import Header
from sedetect.stats.place import BankId, place_of

# Default thresholds of a candidate: see sedetect.ranking.rule.rank. FRACTION is the rule's.
MIN_VALUE, MIN_RATIO, FRACTION = 50.0, 10.0, 0.1


def is_candidate(large: bool, signature: bool | None, carried: bool | None, outstanding: bool) -> bool:
    """Whether an expert is a candidate: as large as the rule requires, with a further sign (sedetect.ranking.rule).

    None: not observed. Both rank and locate judge by this.
    """
    return large and bool(signature or carried or outstanding)


def stands_out(value: float, ratio: float | None, min_value: float = MIN_VALUE, min_ratio: float = MIN_RATIO) -> bool:
    """Whether an expert stands out by its value. ratio: value / median of the others; None without a median."""
    return value >= min_value and ratio is not None and ratio >= min_ratio


# For an expert without rows, which only a proof can name: it uses other text than the statistics.
_NO_ROW = Record(0.0, 1, -1, sys.maxsize, -1, -1, -1, 0.0, 0.0, -1)


@dataclass(frozen=True)
class ValueTests:
    """The two value tests of one population, sorted ascending; nothing passes in an empty one."""

    population: np.ndarray
    maximum: float
    percentile_value: float
    threshold: float

    @classmethod
    def of(cls, values: np.ndarray, criteria: dict[str, Any]) -> "ValueTests":
        if not len(values):
            return cls(values, math.nan, math.nan, math.nan)
        maximum = float(values.max())
        # 1 / 0.1 is exactly 10: the paper divides, and 0.1 * maximum rounds differently.
        threshold = maximum // 10 if criteria["compat"] else maximum / (1 / criteria["fraction"])
        return cls(np.sort(values), maximum, float(np.percentile(values, criteria["percentile"])), threshold)

    def passes(self, values: np.ndarray | float) -> np.ndarray | bool:
        return (values > self.percentile_value) & (values > self.threshold)

    def next_below(self, value: float) -> float | None:
        """The value that follows one of value in descending order (equal where tied)."""
        last = int(np.searchsorted(self.population, value, side="right")) - 1
        return float(self.population[last - 1]) if last > 0 else None


class BankView:
    """The values of one bank of E experts that ranking uses, as (E,) NumPy arrays."""

    def __init__(self, bank: BankId, state: BankStats, header: Header, rows: str):
        self.bank = bank
        values = state.published_max if rows == "first" and bank.routed else state.out_max
        if values is None:
            raise SedetectError(
                f"{bank}: the statistics lack the first rows; profile again with ", Argument("first_rows", True)
            )
        self.values = values.double().cpu().numpy()
        self.first_max, self.rest_max = state.first_max.cpu().numpy(), state.rest_max.cpu().numpy()
        self.rows, self.first_rows = state.rows.cpu().numpy(), state.first_rows.cpu().numpy()
        self.all_rows, self.all_first_rows = self.rows.sum(), self.first_rows.sum()
        self.gate_sum, self.gate_first_sum = state.gate_sum.cpu().numpy(), state.gate_first_sum.cpu().numpy()
        self.peaks = decode(state.peak())
        self.sources = sorted(header.sources)
        self.top_k = header.banks[str(bank)].top_k if str(bank) in header.banks else None

    def name(self, e: int) -> int | str:
        """The expert as a Place has it."""
        return place_of(self.bank, e, len(self.values)).expert

    def evidence(
        self, e: int, median: float | None, tests: ValueTests, first: "BankView", large: float, min_ratio: float
    ) -> dict[str, Any]:
        """The fields of SuperExpert for expert e but its place, carried, late and verdict.

        first: the bank of the experts that its largest value on first tokens is compared with; large: what it must
        exceed there.
        """
        value, first_max = float(self.values[e]), float(self.first_max[e])
        peak = self.peaks[e] or _NO_ROW
        first_gate, rest_gate = self.gates(e)
        first_ratio, signature = self.signature(e, first, large, min_ratio)
        return {
            "value": value,
            "sign": peak.sign,
            "channel": peak.channel,
            "position": peak.position,
            "token_id": peak.token_id,
            "sequence_id": peak.sequence,
            "source": self.sources[peak.source] if peak.source < len(self.sources) else None,
            "gate": peak.gate,
            "ratio": None if peak is _NO_ROW else _quotient(value, median),
            "next_ratio": None if peak is _NO_ROW else _quotient(value, tests.next_below(value)),
            "first_gate": first_gate,
            "rest_gate": rest_gate,
            "first_max": first_max,
            "rest_max": float(self.rest_max[e]),
            "first_ratio": first_ratio,
            "signature": signature,
        }

    def signature(
        self, e: int, first: "BankView", large: float, min_ratio: float = MIN_RATIO
    ) -> tuple[float | None, bool | None]:
        """first_ratio and signature of SuperExpert, of expert e; first and large as in evidence."""
        first_max = float(self.first_max[e])
        first_ratio = _quotient(first_max, first.first_median(e if first is self else None))
        if self.all_first_rows == 0 or not self.rows[e]:
            return first_ratio, None
        if not first_max > large:
            return first_ratio, False
        return first_ratio, None if first_ratio is None else first_ratio >= min_ratio

    @cached_property
    def _on_first(self) -> tuple[np.ndarray, np.ndarray]:
        """first_max of the experts that saw first tokens, ascending, and each expert's place there (-1: none)."""
        known = np.flatnonzero((self.first_rows > 0) & np.isfinite(self.first_max))
        order = known[np.argsort(self.first_max[known], kind="stable")]
        places = np.full(len(self.first_max), -1)
        places[order] = np.arange(len(order))
        return self.first_max[order], places

    def first_median(self, without: int | None) -> float | None:
        """The median of first_max over the experts that saw first tokens, of all or of all but one."""
        ordered, places = self._on_first
        left_out = -1 if without is None else places[without]
        count = len(ordered) - (left_out >= 0)
        if not count:
            return None
        low, high = (ordered[at + (0 <= left_out <= at)] for at in ((count - 1) // 2, count // 2))
        return float(low if count % 2 else (low + high) / 2)

    def gates(self, e: int) -> tuple[float | None, float | None]:
        """first_gate and rest_gate of expert e: a token is top_k rows of the bank."""
        if not self.bank.routed:
            return None, None
        if not self.top_k:
            raise SedetectError(f"{self.bank}: the statistics give its top_k as {self.top_k}; profile the model again")
        first_tokens = self.all_first_rows / self.top_k
        rest_tokens = (self.all_rows - self.all_first_rows) / self.top_k
        return (
            float(self.gate_first_sum[e] / first_tokens) if first_tokens else None,
            float((self.gate_sum[e] - self.gate_first_sum[e]) / rest_tokens) if rest_tokens else None,
        )


def layer_medians(views: dict[BankId, BankView]) -> dict[BankId, tuple[float, float] | None]:
    """Per bank, the median value of the experts it is compared with (finite, and seen), and of their rows."""
    seen = {}
    for bank, view in views.items():
        chosen = (view.rows > 0) & np.isfinite(view.values)
        seen[bank] = np.stack((view.values[chosen], view.rows[chosen]))
    medians: dict[BankId, tuple[float, float] | None] = {}
    for bank in views:
        layer = [seen[b] for b in views if (b == bank if bank.routed else b[:2] == bank[:2] and b.routed)]
        peers = np.concatenate(layer, axis=1) if layer else np.empty((2, 0))
        medians[bank] = (float(np.median(peers[0])), float(np.median(peers[1]))) if peers.size else None
    return medians


def _quotient(value: float, base: float | None) -> float | None:
    if base is None:
        return None
    return value / base if base else math.inf
