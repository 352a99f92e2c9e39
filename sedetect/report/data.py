"""What the charts draw: named lists of records, shared by the page and the figures."""

import math
from dataclasses import asdict
from typing import Any

from sedetect.ranking.coverage import FEW_ROWS
from sedetect.ranking.result import Ranking
from sedetect.report.evidence import Evidence
from sedetect.report.numbers import FP8_MAX, FP16_MAX, OTHER, ExpertRow, LayerRow, expert_rows, layer_rows
from sedetect.report.text import interval

Records = list[dict[str, Any]]
FORMATS_OF = {"model": "one for all", "layer": "by layer", "expert": "by expert"}  # Curve.by as people read it
ELEMENTS = ("largest output |y|", "largest input |h|")
KURTOSIS = ("kurtosis of the layer", "most that it can be")
KEPT_ROWS = 8  # of an expert's strongest rows on first tokens, and as many on all others


def datasets(evidence: Evidence) -> dict[str, Records]:
    """Every list of records that some chart may name; empty where there is nothing to draw."""
    experts = expert_rows(evidence.stats, evidence.ranking)
    layers = layer_rows(evidence.stats)
    return {
        "experts": [_expert(evidence, row) for row in experts],
        "diagonal": _diagonal(experts),
        "thresholds": _thresholds(evidence.ranking),
        "layers": _by_layer(layers),
        "columns": _by_column(experts),
        "kept": _kept(evidence),
        "kurtosis": [
            r for layer in layers for r in _series(layer, dict(zip(KURTOSIS, (layer.kurtosis, layer.kurtosis_most))))
        ],
        "coverage": [{"row": row_name(one.stack, one.layer), "wanted": FEW_ROWS} | asdict(one) for one in layers],
        "headroom": _headroom(layers),
        "limits": [{"format": "fp8 (E4M3): 448", "value": FP8_MAX}, {"format": "fp16: 65504", "value": FP16_MAX}],
        "residual": _residual(evidence, "maximum", "median"),
        "sinks": _residual(evidence, "mean of the heads", "strongest head"),
        "ablation": _ablation(evidence),
        "zero": [{"change": 0}],
        "frontier": _frontier(evidence),
        "increases": _increases(evidence),
        "timeline": _timeline(evidence),
        "timeline_sinks": _timeline_sinks(evidence),
    }


def row_name(stack: str, layer: int) -> str:
    """A layer as people read it: "L1", "encoder.L1"."""
    return f"{'' if stack == 'decoder' else stack + '.'}L{layer}"


def _expert(evidence: Evidence, row: ExpertRow) -> dict[str, Any]:
    state = "non-finite" if row.value is None else "seen" if row.value > 0 else "unseen"
    return {
        "expert": row.name,
        "verdict": row.verdict,
        "row": row_name(row.stack, row.layer),
        "column": row.column,
        "state": state,
        "value": row.value,
        "first": row.first if math.isfinite(row.first) else None,
        "rest": row.rest if math.isfinite(row.rest) else None,
        "channel": "–" if row.channel is None else row.channel,
        "token": evidence.token(row.token_id) or "–",
        "position": "–" if row.position is None else row.position,
        "rows": row.rows,
        "inside": row.inside,
        "place": row.place,
    }


def _diagonal(experts: list[ExpertRow]) -> Records:
    """Both ends of the line first = rest within the ranges of both; empty where no expert has both values."""
    both = [(row.first, row.rest) for row in experts if row.first > 0 and row.rest > 0]
    both = [pair for pair in both if math.isfinite(sum(pair))]
    if not both:
        return []
    first, rest = zip(*both)
    ends = max(min(first), min(rest)), min(max(first), max(rest))
    return [{"rest": end, "first": end} for end in ends]


def _thresholds(ranking: Ranking) -> Records:
    criteria = ranking.criteria
    lines = {
        f"{criteria['percentile']:g}th percentile of the population": ranking.percentile_value,
        f"{criteria['fraction']:g} of its maximum": ranking.threshold,
        "least |y| of what stands out": criteria["min_value"],
    }
    return [{"test": name, "value": value} for name, value in lines.items() if value > 0]


def _series(layer: LayerRow, values: dict[str, float | None]) -> Records:
    row = row_name(layer.stack, layer.layer)
    return [{"row": row, "series": name, "value": value} for name, value in values.items() if value is not None]


def _by_layer(layers: list[LayerRow]) -> Records:
    found = [_series(layer, {"largest expert": layer.maximum, "median expert": layer.median}) for layer in layers]
    return [record for records in found for record in records if record["value"] > 0]


def _by_column(experts: list[ExpertRow]) -> Records:
    """Per column, the largest value over the layers, and over those in which the rule looks."""
    best: dict[tuple[str, str], tuple[float, str]] = {}  # value, and whose it is
    for row in experts:
        for series in ["all layers", *(["layers of the rule"] if row.inside else [])]:
            if row.value and row.value > best.get((row.column, series), (0.0, ""))[0]:
                best[row.column, series] = row.value, row.name
    return [
        {"column": column, "series": series, "value": value, "expert": name}
        for (column, series), (value, name) in best.items()
    ]


def _kept(evidence: Evidence) -> Records:
    contexts = {(c.source, c.sequence, c.position): c for c in evidence.run.contexts} if evidence.run else {}
    sources = sorted(evidence.stats.header.sources)
    records = []
    for expert in evidence.ranking.judged:
        for row, first in evidence.stats.banks[expert.bank].strongest(expert.number, KEPT_ROWS):
            if row.position < 0 or row.value <= 0:
                continue
            source = sources[row.source] if row.source < len(sources) else None
            context = None if source is None else contexts.get((source, row.sequence, row.position))
            info = evidence.stats.header.sources[source].info if source is not None else {}
            records.append(
                {
                    "expert": str(expert),
                    "verdict": expert.verdict or OTHER,
                    "tokens": "first token" if first else "other token",
                    "value": row.value,
                    "gate": row.gate,
                    "domain": info.get("domain", "–"),
                    "sequence": "–" if row.sequence < 0 else row.sequence,
                    "position": row.position,
                    "token": evidence.token(row.token_id) or (repr(context.token) if context else "–"),
                    "context": None if context is None else [context.before, context.token, context.after],
                }
            )
    return records


def _headroom(layers: list[LayerRow]) -> Records:
    found = [_series(layer, dict(zip(ELEMENTS, (layer.maximum, layer.in_max)))) for layer in layers]
    return [record for records in found for record in records if record["value"] > 0]


def _residual(evidence: Evidence, *names: str) -> Records:
    without = f"without {', '.join(evidence.ablated_experts)}"
    records = []
    for run, residual in (("as it is", evidence.residual), (without, evidence.ablated)):
        for layer in residual.layers if residual else ():
            strongest_head = max(layer.sinks) if layer.sinks else None
            of = {
                "maximum": layer.maximum,
                "median": layer.median,
                "mean of the heads": layer.sink_mean,
                "strongest head": strongest_head,
            }
            for name in names:
                if (value := of[name]) is not None and value > 0:
                    records.append({"row": f"L{layer.layer}", "run": run, "series": name, "value": value})
    return records


def _ablation(evidence: Evidence) -> Records:
    if evidence.ablation is None:
        return []
    without = [(f"without {', '.join(o.experts)}: {o.label}", "chosen", o) for o in evidence.ablation.outcomes]
    records = without
    for name, runs in evidence.ablation.controls.items():
        records += [(f"random, {name}", "control", run) for run in runs]
    return [
        {"set": label, "kind": kind, "experts": ", ".join(o.experts), "change": o.mean_change}
        for label, kind, o in records
        if math.isfinite(o.mean_change)
    ]


def _frontier(evidence: Evidence) -> Records:
    """Every allocation whose perplexity is finite."""
    return [
        {
            "formats": FORMATS_OF[curve.by],
            "allocation": "at random" if curve.seed is not None else "protected" if curve.protected else "chosen",
            "seed": curve.seed,
            "size": point.size / 1e6,
            "change": point.change.rise,
            "interval": interval(point.change),
        }
        for curve in (evidence.frontier.curves if evidence.frontier else ())
        for point in curve.points
        if math.isfinite(point.change.rise)
    ]


def _increases(evidence: Evidence) -> Records:
    if evidence.frontier is None:
        return []
    from sedetect.compression.frontier import INCREASES  # which imports transformers

    return [{"change": increase} for increase in INCREASES]


def _timeline(evidence: Evidence) -> Records:
    found = evidence.timeline
    histories = [] if found is None else [*found.experts, *found.passing]
    records = []
    for at, state in enumerate([] if found is None else found.states):
        for one in histories:
            for series, values in (("expert", one.values), ("median of its layer", one.medians)):
                if (value := values[at]) is not None and value > 0 and math.isfinite(value):
                    records.append({"step": state.step, "expert": str(one.expert), "series": series, "value": value})
    return records


def _timeline_sinks(evidence: Evidence) -> Records:
    states = [] if evidence.timeline is None else evidence.timeline.states
    return [
        {"step": state.step, "series": series, "value": value}
        for state in states
        for series, value in (("attention sinks", state.sink_mean), ("uniform attention", state.uniform))
        if state.sink_mean is not None and value is not None
    ]
