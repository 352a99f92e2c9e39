"""The numbers of the report that no other module gives: the table of all experts, coverage, headroom, kurtosis."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedetect.kernels.records import column, decode
from sedetect.ranking.coverage import FEW_ROWS, more_tokens
from sedetect.ranking.result import Ranking
from sedetect.stats.model import ModelStats
from sedetect.stats.place import BankId, Place, place_of

FP16_MAX = 65504.0
FP8_MAX = 448.0  # of E4M3; E5M2 reaches 57344
OTHER = "other"  # the verdict of an expert that the ranking does not name


@dataclass(frozen=True)
class ExpertRow:
    """One routed or shared expert.

    name, verdict      as ranking has them; OTHER for an expert without one
    stack, layer; column: its place in a layer's row of the heatmap, the expert's number or "shared"
    value              out_max; None where it is not finite. first, rest: first_max, rest_max
    channel, position, token_id, gate    of the row that value comes from; None where unknown
    rows               counted rows
    inside             whether it is in the population of the paper's rule
    place              1 for the largest value of all experts; ties in the order of the model
    """

    name: str
    verdict: str
    stack: str
    layer: int
    column: str
    value: float | None
    first: float
    rest: float
    channel: int | None
    position: int | None
    token_id: int | None
    gate: float | None
    rows: int
    inside: bool
    place: int


def expert_rows(stats: ModelStats, ranking: Ranking) -> list[ExpertRow]:
    """Every routed and shared expert, in the order of the model."""
    verdicts = {str(expert): expert.verdict or OTHER for expert in ranking.judged}
    found: list[dict[str, Any]] = []
    for bank in _ordered(stats):
        state = stats.banks[bank]
        columns = (values.tolist() for values in (state.out_max, state.first_max, state.rest_max, state.rows))
        for e, (peak, value, first, rest, rows) in enumerate(zip(decode(state.peak()), *columns)):
            place = place_of(bank, e, state.num_experts)
            finite = math.isfinite(value)
            found.append(
                {
                    "name": str(place),
                    "verdict": verdicts.get(str(place), OTHER),
                    "stack": bank.stack,
                    "layer": bank.layer,
                    "column": _column(place),
                    "value": value if finite else None,
                    "first": first,
                    "rest": rest,
                    "channel": peak and peak.channel,
                    "position": peak.position if peak and peak.position >= 0 else None,
                    "token_id": peak.token_id if peak and peak.token_id >= 0 else None,
                    "gate": peak and peak.gate,
                    "rows": rows,
                    "inside": finite and bank.layer < ranking.layer_limits[bank.stack],
                }
            )
    order = sorted(range(len(found)), key=lambda i: -math.inf if found[i]["value"] is None else -found[i]["value"])
    places = {number: at + 1 for at, number in enumerate(order)}
    return [ExpertRow(**row, place=places[number]) for number, row in enumerate(found)]


@dataclass(frozen=True)
class LayerRow:
    """The routed and shared experts of one layer that saw rows and stayed finite.

    maximum, median    of their out_max; kurtosis of it (see kurtosis), and the most it can be for so many experts
    rows_min, rows_median, rows_max    of the counted rows of the routed experts, those that saw none too
    in_max             largest finite max|h| of the same experts
    None where there is nothing to take it from.
    """

    stack: str
    layer: int
    experts: int
    maximum: float | None
    median: float | None
    kurtosis: float | None
    kurtosis_most: float | None
    rows_min: int | None
    rows_median: float | None
    rows_max: int | None
    in_max: float | None


def layer_rows(stats: ModelStats) -> list[LayerRow]:
    """Every layer with experts, in the order of the model."""
    layers: dict[tuple[str, int], list[BankId]] = {}
    for bank in _ordered(stats):
        layers.setdefault((bank.stack, bank.layer), []).append(bank)
    result = []
    for (stack, layer), banks in layers.items():
        states = [stats.banks[bank] for bank in banks]
        values = np.concatenate([np.where(s.rows > 0, s.out_max.double(), np.nan) for s in states])
        values = values[np.isfinite(values)]
        hidden = np.concatenate([column(s.in_max, "value")[:, 0].double().numpy() for s in states])
        hidden = hidden[np.isfinite(hidden) & (hidden >= 0)]
        routed = [stats.banks[bank].rows.numpy() for bank in banks if bank.routed]
        rows = np.concatenate(routed) if routed else np.array([])
        result.append(
            LayerRow(
                stack,
                layer,
                experts=len(values),
                maximum=float(values.max()) if len(values) else None,
                median=float(np.median(values)) if len(values) else None,
                kurtosis=kurtosis(values),
                kurtosis_most=kurtosis_most(len(values)),
                rows_min=int(rows.min()) if len(rows) else None,
                rows_median=float(np.median(rows)) if len(rows) else None,
                rows_max=int(rows.max()) if len(rows) else None,
                in_max=float(hidden.max()) if len(hidden) else None,
            )
        )
    return result


def kurtosis(values: np.ndarray) -> float | None:
    """Excess kurtosis of values (N,): their fourth central moment over the square of their variance (both over N), less
    3, which is what the published tool plots. 0 for a normal distribution; None without variance."""
    if not len(values) or values.min() == values.max():  # whose mean may differ from them by a rounding
        return None
    centered = values - values.mean()
    variance = (centered**2).mean()
    return float((centered**4).mean() / variance**2 - 3) if variance > 0 else None


def kurtosis_most(n: int) -> float | None:
    """The excess kurtosis of n values of which one stands alone and all others are equal: no n values have more."""
    return n - 5 + 1 / (n - 1) if n > 1 else None


@dataclass(frozen=True)
class Thin:
    """A routed expert with few rows. more: further tokens of such text until FEW_ROWS rows are expected; for an expert
    without rows the least that can be said, see more_tokens."""

    name: str
    rows: int
    more: int


def thin_experts(stats: ModelStats) -> list[Thin]:
    """Routed experts with fewer than FEW_ROWS counted rows, fewest first."""
    tokens = stats.header.tokens
    thin = [
        Thin(str(place_of(bank, e, state.num_experts)), rows, more_tokens(rows, tokens))
        for bank in _ordered(stats)
        if bank.routed
        for state in [stats.banks[bank]]
        for e, rows in enumerate(state.rows.tolist())
        if rows < FEW_ROWS
    ]
    return sorted(thin, key=lambda one: one.rows)


@dataclass(frozen=True)
class Headroom:
    """The banks of one kind ("routed", "shared", "dense").

    out_max, out_name    largest finite |y| and its expert, None where all are 0; in_max, in_name: the same of |h|;
                         None: nothing seen that is finite
    over_fp8, over_fp16, nonfinite    elements of y: finite above 448, above 65504; NaN or Inf
    out_over_fp8, in_over_fp8         experts whose max|y|, max|h| is above 448; likewise fp16; not finite counts
    """

    kind: str
    experts: int
    out_max: float | None
    out_name: str | None
    in_max: float | None
    in_name: str | None
    over_fp8: int
    over_fp16: int
    nonfinite: int
    out_over_fp8: int
    out_over_fp16: int
    in_over_fp8: int
    in_over_fp16: int


def headroom(stats: ModelStats) -> list[Headroom]:
    """Per kind of bank, in the order routed, shared, dense."""
    result = []
    for kind in ("routed", "shared", "dense"):
        banks = [bank for bank in _ordered(stats, dense=True) if bank.base == kind]
        if not banks:
            continue
        states = [stats.banks[bank] for bank in banks]
        names = [str(place_of(b, e, s.num_experts)) for b, s in zip(banks, states) for e in range(s.num_experts)]
        out = np.concatenate([column(s.peak(), "value").double().numpy() for s in states])  # -1: saw no row
        hidden = np.concatenate([column(s.in_max, "value")[:, 0].double().numpy() for s in states])
        counts = {
            name: sum(int(getattr(s, name).sum()) for s in states) for name in ("over_fp8", "over_fp16", "nonfinite")
        }
        over = {
            f"{side}_over_{form}": int((~(values <= limit)).sum())
            for side, values in (("out", out), ("in", hidden))
            for form, limit in (("fp8", FP8_MAX), ("fp16", FP16_MAX))
        }
        (out_max, out_name), (in_max, in_name) = _largest(out, names), _largest(hidden, names)
        result.append(Headroom(kind, len(names), out_max, out_name, in_max, in_name, **counts, **over))
    return result


def _largest(values: np.ndarray, names: list[str]) -> tuple[float | None, str | None]:
    finite = np.where(np.isfinite(values), values, -1)
    at = int(finite.argmax())
    return (float(finite[at]), names[at] if finite[at] else None) if finite[at] >= 0 else (None, None)


def _ordered(stats: ModelStats, dense: bool = False) -> list[BankId]:
    """The banks in the order of the forward: other stacks before the decoder."""
    banks = [bank for bank in stats.banks if dense or bank.base != "dense"]
    return sorted(banks, key=lambda bank: (bank.stack == "decoder", bank))


def _column(place: Place) -> str:
    """The part of a name after the layer: "28", "28_vision", "shared", "sharedE2"."""
    name = str(place).rpartition(f"L{place.layer}")[2]
    return name.removeprefix("E")
