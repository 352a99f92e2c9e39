"""What the page says, section by section: tables of ready cells, and a few sentences. The template lays them out."""

from typing import Any

from sedetect.experiments.study import badness
from sedetect.ranking.coverage import FEW_ROWS, coverage
from sedetect.ranking.modalities import RATIO, TIMES, uses
from sedetect.ranking.result import Ranking, SuperExpert
from sedetect.ranking.stability import agreement, margins
from sedetect.report.answer import answer_section
from sedetect.report.captions import captions
from sedetect.report.compression import budget_section, frontier_section, verification_section
from sedetect.report.data import Records, row_name
from sedetect.report.evidence import Evidence
from sedetect.report.experiments import (
    ablation_section,
    inside_section,
    proof_section,
    residual_section,
    timeline_section,
    traces_section,
)
from sedetect.report.numbers import FP8_MAX, FP16_MAX, OTHER, headroom, layer_rows, thin_experts
from sedetect.report.table import MOST, NONE, Named, Table, make_table
from sedetect.report.text import number, percent, share, whole
from sedetect.stats.model import ModelStats


def sections(evidence: Evidence, data: dict[str, Records]) -> dict[str, Any]:
    """The variables of the template."""
    ranking, header = evidence.ranking, evidence.stats.header
    experts = ranking.judged
    anchors = {
        "todo": "What to do",
        "experts": "Experts",
        "proof": "Proof",
        "ablation": "Without them",
        "budget": "Budget",
        "frontier": "Frontier",
        "verification": "Verification",
        "evidence": "Evidence",
        "modalities": "Modalities",
        "stability": "Stability",
        "residual": "Residual stream",
        "traces": "When they fire",
        "timeline": "Over training",
        "inside": "Inside the layers",
        "details": "Details",
        "run": "What was run",
        "glossary": "Glossary",
    }
    answer, stability, domains = answer_section(evidence), _stability(evidence), _parts(evidence.domains, "domain")
    if answer["todo"] is None:
        del anchors["todo"]
    if not (domains.rows or stability["margins"].rows or stability["rounds"].rows):
        del anchors["stability"]
    optional = ("proof", "budget", "frontier", "verification", "modalities", "residual", "ablation", "traces")
    for name in (*optional, "timeline", "inside"):
        if not getattr(evidence, "analyses" if name == "inside" else name):
            del anchors[name]
    return {
        "sections": list(anchors.items()),
        "header": header,
        "ranking": ranking,
        "found": bool(ranking.proved),
        **answer,
        "facts": _facts(evidence),
        "named": _experts(evidence, experts[:MOST]),
        "modules": _modules(evidence, experts[:MOST]),
        "more_named": max(len(experts) - MOST, 0),
        "captions": captions(evidence, data),
        "largest": _largest(data["experts"]),
        "contexts": [r for r in data["kept"] if r["context"]],
        "domains": domains,
        **stability,
        **_modalities(evidence),
        **proof_section(evidence),
        **ablation_section(evidence.ablation),
        **budget_section(evidence),
        **frontier_section(evidence),
        **verification_section(evidence),
        **residual_section(evidence),
        **traces_section(evidence),
        **timeline_section(evidence),
        **inside_section(evidence),
        "coverage_text": coverage(evidence.stats).removeprefix("coverage: ") + ".",
        "thin": _thin(evidence),
        "headroom": _headroom(evidence),
        "layers": _layers(evidence),
        "run": _run(evidence),
        "sources": _sources(evidence),
    }


def _facts(evidence: Evidence) -> list[dict[str, str]]:
    stats, ranking = evidence.stats, evidence.ranking
    rooms = headroom(stats)
    tops = [(room.out_max, room.out_name) for room in rooms if room.out_max is not None]
    largest, whose = max(tops, key=lambda top: top[0], default=(None, None))
    routed = [s for bank, s in stats.banks.items() if bank.routed]
    rows = [n for state in routed for n in state.rows.tolist()]
    few = sum(n < FEW_ROWS for n in rows)
    over = {"fp16": sum(r.over_fp16 for r in rooms), "fp8": sum(r.over_fp8 for r in rooms)}
    layers = len({(bank.stack, bank.layer) for bank in stats.banks if bank.routed})
    facts = [
        ("routed experts", whole(len(rows)), f"in {layers} layers, {stats.header.dtype}"),
        ("calibration tokens", whole(stats.header.tokens), f"in {whole(stats.header.sequences)} sequences"),
        ("largest |y|", number(largest), "" if whose is None else f"{whose}, before the routing weight"),
        ("y beyond fp16", whole(over["fp16"]), f"elements above 65504; above 448 (fp8): {whole(over['fp8'])}"),
    ]  # fmt: skip
    if rows:
        value, more = "complete", f"every expert saw {whole(min(rows))} rows or more"
        if few:
            value, more = f"{whole(few)} thin", f"experts with fewer than {FEW_ROWS} rows"
        facts.insert(2, ("coverage", value, more))
    if evidence.ablation is not None and evidence.ablation.outcomes:
        main = evidence.ablation.outcomes[0]
        same = [run.mean_change for run in evidence.ablation.controls.get("same layers", ())]
        beside = f"perplexity without {', '.join(main.experts)}"
        if same:
            beside += f"; random of its layers: {percent(max(same, key=badness))} at most"
        facts.append(("what they are worth", percent(main.mean_change), beside))
    if ranking.nonfinite:
        facts.append(("NaN or infinity", f"{len(ranking.nonfinite)} experts", f"first {ranking.nonfinite[0]}"))
    return [{"name": name, "value": value, "more": more} for name, value, more in facts]


def _experts(evidence: Evidence, experts: list[SuperExpert]) -> Table:
    seen = evidence.residual is not None
    rows = []
    for e in experts:
        row: list[str] = [Named(e, e.verdict or OTHER), Named(e.verdict or NONE, e.verdict or OTHER)]
        row += [number(e.value if e.seen else None), number(e.ratio, 3), number(e.next_ratio, 3)]
        row += [str(e.channel) if e.seen else NONE]
        row += [evidence.token(e.token_id) or NONE, NONE if e.position < 0 else str(e.position)]
        row += [number(e.first_max), number(e.rest_max), number(e.first_gate, 3), number(e.rest_gate, 3)]
        rows.append([*row, _yes(e in evidence.ranking.super_experts), *([_yes(e.carried)] if seen else [])])
    head = "expert,verdict,#max|y|,#÷ median,#÷ next,#channel,token,#position,#|y| on first tokens,#on others"
    head += ",#routing weight on first tokens,#on others,in set"
    return make_table(head + (",carried" if seen else ""), rows)


def _modules(evidence: Evidence, experts: list[SuperExpert]) -> list[str]:
    """Where the experts are in the model: "L1E28 in model.layers.1.mlp.experts"."""
    banks = evidence.stats.header.banks
    return [f"{e} in {banks[str(e.bank)].module}" for e in experts]


def _largest(experts: Records) -> Table:
    chosen = sorted((r for r in experts if r["value"]), key=lambda r: r["place"])[:MOST]
    rows = [
        [Named(r["expert"], r["verdict"]), number(r["value"]), number(r["first"]), number(r["rest"]),
         str(r["channel"]), r["token"], str(r["position"]), whole(r["rows"]), r["verdict"], _yes(r["inside"])]
        for r in chosen
    ]  # fmt: skip
    return make_table(
        "expert,#max|y|,#|y| on first tokens,#on others,#channel,token,#position,#rows,verdict,in population", rows
    )


def _parts(parts: dict[str, tuple[ModelStats, Ranking]], kind: str) -> Table:
    """What the parts of the statistics say alone, which are of one domain each, say (kind)."""
    rows = []
    for name, (stats, ranking) in parts.items():
        top = max((room.out_max for room in headroom(stats) if room.out_max is not None), default=None)
        names = ", ".join(f"{e} ({number(e.value)})" for e in ranking.found) or "none"
        thin = thin_experts(stats)
        few = [whole(len(thin)), whole(sum(one.rows == 0 for one in thin))]
        rows.append([name, names, number(top), whole(stats.header.tokens), *few])
    return make_table(
        f"{kind},candidates,#largest |y|,#tokens,#experts with fewer than {FEW_ROWS} rows,#with none", rows
    )


def _modalities(evidence: Evidence) -> dict[str, Any]:
    """Each modality alone, and the experts that are its own or that text alone would prune."""
    used = uses(evidence.stats, {name: stats for name, (stats, _) in evidence.modalities.items()})
    rows = [
        [str(use.place), use.modality, whole(use.rows), share(use.share), share(use.text), _yes(use.lost)]
        for use in sorted(used, key=lambda use: not use.lost)[:MOST]
    ]
    head = "expert,modality,#rows,#share of its rows in the layer,#share of text's,text alone would prune"
    return {
        "modalities": _parts(evidence.modalities, "modality"),
        "uses": make_table(head, rows),
        "more_uses": max(len(used) - MOST, 0),
        "pruned_part": share(RATIO),
        "times": TIMES,
    }


def _stability(evidence: Evidence) -> dict[str, Any]:
    """By what factor each expert passes the thresholds, and the candidates of each round alone."""
    verdicts = {str(expert): expert.verdict or OTHER for expert in evidence.ranking.judged}
    passed = list(margins(evidence.stats).items())[:MOST]
    kinds = list(dict.fromkeys(kind for _, by in passed for kind in by))
    rows: list[list[str]] = [
        [Named(name, verdicts.get(name, OTHER)), *(number(by.get(kind), 3) for kind in kinds)] for name, by in passed
    ]
    agreed = agreement(evidence.rounds) if len(evidence.rounds) > 1 else None
    parts = [] if agreed is None else zip(agreed.parts, agreed.tokens, agreed.found, strict=True)
    return {
        "margins": make_table(",".join(["expert", *(f"#{kind}" for kind in kinds)]), rows),
        "rounds": make_table("round,#tokens,candidates", [[n, whole(t), ", ".join(f) or "none"] for n, t, f in parts]),
    }


def _thin(evidence: Evidence) -> Table:
    thin = thin_experts(evidence.stats)[:MOST]
    rows = [
        [one.name, whole(one.rows), ("" if one.rows else "at least ") + whole(one.more) if one.more else NONE]
        for one in thin
    ]
    return make_table("expert,#rows,#more tokens", rows)


def _headroom(evidence: Evidence) -> Table:
    rows = []
    for room in headroom(evidence.stats):
        for what, largest, name, fp8, fp16 in (
            ("output y", room.out_max, room.out_name, room.out_over_fp8, room.out_over_fp16),
            ("input h", room.in_max, room.in_name, room.in_over_fp8, room.in_over_fp16),
        ):
            output = what.startswith("output")
            spaces = [number(limit / largest, 3) if largest else NONE for limit in (FP16_MAX, FP8_MAX)]
            counts = [whole(n) if output else NONE for n in (room.over_fp16, room.over_fp8, room.nonfinite)]
            beyond = [f"{whole(fp16)} of {whole(room.experts)}", f"{whole(fp8)} of {whole(room.experts)}"]
            rows.append([f"{room.kind}, {what}", number(largest), name or NONE, *spaces, *beyond, *counts])
    head = "experts,#largest,expert,#headroom fp16,#headroom fp8,#experts over 65504,#experts over 448"
    return make_table(head + ",#elements over 65504,#elements over 448,#NaN or infinite", rows)


def _layers(evidence: Evidence) -> Table:
    rows = [
        [row_name(r.stack, r.layer), whole(r.experts), number(r.maximum), number(r.median), number(r.in_max),
         number(r.kurtosis, 3), number(r.kurtosis_most, 3), whole(r.rows_min), number(r.rows_median, 6),
         whole(r.rows_max)]
        for r in layer_rows(evidence.stats)
    ]  # fmt: skip
    head = "layer,#experts seen,#max|y|,#median,#max|h|,#kurtosis,#at most,#rows: fewest,#rows: median,#rows: most"
    return make_table(head, rows)


def _run(evidence: Evidence) -> list[tuple[str, str]]:
    header, run = evidence.stats.header, evidence.run
    backends = sorted({backend for bank in header.banks.values() for backend in bank.backends})
    layers = ", ".join(f"{count} {stack} layers" for stack, count in header.layers.items())
    text = f"{whole(header.tokens)} tokens in {whole(header.sequences)} sequences"
    found = [
        ("Model", header.model),
        ("Digest of config and weights", header.digest),
        ("Precision", header.dtype),
        ("Layers", layers),
        ("Text", text + (f", windows of {header.window}" if header.window else "")),
        ("Backend", ", ".join(backends) or NONE),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(header.versions.items()))),
    ]
    if run is not None:
        when = run.date.replace("T", " ").replace("+00:00", " UTC")
        speed = f" ({whole(round(header.tokens / run.seconds))} tokens/s)" if run.seconds else ""
        found[1:1] = [
            ("Profiled", when),
            ("Device", run.device),
            ("Time in the forwards", f"{run.seconds:.1f} s{speed}"),
        ]
    criteria = evidence.ranking.criteria
    rule = f"percentile {criteria['percentile']:g}, fraction {criteria['fraction']:g}"
    rule += f", first {criteria['layers']:g} of the layers"
    stands = f"|y| at least {criteria['min_value']:g} and {criteria['min_ratio']:g} times the layer's median"
    return [*found, ("Rule", rule), ("Stands out", stands)]


def _sources(evidence: Evidence) -> Table:
    rows = []
    for name, source in evidence.stats.header.sources.items():
        info = source.info
        sequences = sum(end - start for start, end in source.ranges)
        template = "yes" if info.get("chat_template") else "no"
        known = [str(info.get("domain", NONE)), str(info.get("corpus", NONE)), str(info.get("window", NONE))]
        rows.append([known[0], known[1], whole(sequences), known[2], template, name])
    return make_table("domain,corpus,#sequences,#window,chat template,source", rows)


def _yes(value: bool | None) -> str:
    return "not observed" if value is None else "yes" if value else "no"
