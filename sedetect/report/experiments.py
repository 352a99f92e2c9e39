"""What the page says of experiments, as template variables: proof, residual stream, ablation, traces, analyses."""

import statistics
from collections import defaultdict
from functools import partial
from typing import Any

from sedetect.analysis.tables import Cells, layers_table, marked_experts, standings_tables
from sedetect.experiments.study import Experiment, Outcome, badness, conclusion
from sedetect.report.evidence import Evidence
from sedetect.report.table import MOST, NONE, Named, Table, make_table
from sedetect.report.text import interval, number, percent, share, token_text, whole
from sedetect.stats.residual import Formation


def proof_section(evidence: Evidence) -> dict[str, Any]:
    proof = evidence.proof
    if proof is None:
        return {"proof": None}
    rows: list[list[str]] = []
    for one in proof.verdicts:
        fed = None if one.feeders is None else ", ".join(f"{f.expert} ({f.left:.0%} left)" for f in one.feeders)
        alone = [NONE, NONE] if one.alone is None else [percent(one.alone.rise, 2), interval(one.alone)]
        within = [NONE, NONE] if one.within is None else [percent(one.within.rise, 2), interval(one.within)]
        named: list[str] = [Named(one.expert, one.level), Named(one.level, one.level), *alone, *within]
        rows.append(
            [*named, whole(one.triggers), whole(one.firsts), fed or ("not followed" if fed is None else "none")]
        )
    head = "expert,verdict,#alone,#interval,#beside the others,#interval,#fires on tokens,#of them first,fed by"
    runs = [["nothing", "", "", number(proof.sink_mean, 3), number(proof.residual_max)]]
    runs += [
        [run.label, percent(run.effect.rise, 2), interval(run.effect), number(run.sink_mean, 3),
         number(run.residual_max)]
        for run in [*proof.runs, *proof.controls]
    ]  # fmt: skip
    text = (
        f"Each is switched off only at the tokens where it fires, on {whole(proof.tokens)} tokens in "
        f"{whole(proof.documents)} windows that the statistics did not see; a rise of perplexity by "
        f"{share(proof.smallest)} matters. {proof.sinks[:1].upper()}{proof.sinks[1:]}."
    )
    return {
        "proof": proof,
        "proof_text": text,
        "proof_verdicts": make_table(head, rows),
        "proof_runs": make_table("switched off,#perplexity,#interval,#attention sink,#residual stream", runs),
    }


def residual_section(evidence: Evidence) -> dict[str, Any]:
    residual, ablated = evidence.residual, evidence.ablated
    if residual is None:
        return {"residual": None}
    forming = ", ".join(f"L{layer}" for layer in residual.forming_layers)
    text = f"Massive activations form in {forming}" if forming else "No massive activation that a later layer carries"
    writers = ", ".join(sorted(map(str, residual.writers())))
    text += f", written by {writers}." if writers else "."
    text += f" {residual.sinks_line[0].upper()}{residual.sinks_line[1:]}."
    if ablated is not None:
        text += (
            f" Without {', '.join(evidence.ablated_experts)} the largest |x| between the first and the last layer "
            f"goes from {number(residual.inner_max)} to {number(ablated.inner_max)}, the mean attention to the first "
            f"token from {number(residual.sink_mean, 3)} to {number(ablated.sink_mean, 3)}."
        )
    text += f" Seen on {sum(residual.sequences.values())} sequences of {residual.seq_len} tokens; massive: |x| above "
    text += f"{number(residual.min_value)} and {number(residual.min_ratio)} times the median."
    rows = [
        [f"L{layer.layer}", number(layer.maximum), number(layer.ratio, 3), str(layer.channel), str(layer.position),
         evidence.token(layer.token_id) or NONE, whole(layer.massive), number(layer.sink_mean, 3),
         number(max(layer.sinks) if layer.sinks else None, 3)]
        for layer in residual.layers
    ]  # fmt: skip
    head = "layer,#max|x|,#over the median,#channel,#position,token,#massive elements,#attention sink,#strongest head"
    return {
        "residual": residual,
        "residual_text": text,
        "residual_layers": make_table(head, rows),
        "formations": _formations(residual.formations),
    }


def _formations(formations: list[Formation]) -> Table:
    """One row per layer, channel, position and token: the largest, and how many sequences have it."""
    places: dict[tuple[int, ...], list[Formation]] = defaultdict(list)
    for one in formations:
        places[one.layer, one.channel, one.position, one.token_id].append(one)
    rows = []
    for (layer, channel, position, _), same in list(places.items())[:MOST]:
        one = max(same, key=lambda f: abs(f.after))
        writers = ", ".join(f"{w.expert} {w.share:.0%}" for w in one.writers if abs(w.share) >= 0.05)
        attention = NONE if one.attention is None else f"{one.attention:.0%}"
        row = [f"L{layer}", str(channel), str(position), str(len(same)), number(one.before), number(one.after)]
        rows.append([*row, attention, writers or NONE, f"L{one.carried_to}"])
    return make_table("formed in,#channel,#position,#sequences,#x before,#x after,#attention,experts,carried to", rows)


def ablation_section(experiment: Experiment | None) -> dict[str, Any]:
    if experiment is None:
        return {"ablation": None}
    base = experiment.baseline
    domains, asked = list(base.perplexity), base.accuracy is not None

    layer = experiment.sink_layer

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    def rest(runs: list[Outcome]) -> list[str]:
        cells = [number(mean([run.sink_mean for run in runs]), 3)]
        if layer is not None:
            cells.append(number(mean([run.sink_decay[layer] for run in runs]), 2))
        cells.append(number(mean([run.residual_max for run in runs])))
        known = [run.accuracy for run in runs if run.accuracy is not None]
        return cells + ([f"{statistics.fmean(known):.0%}"] if asked else [])

    rows = [["nothing", *(f"{base.perplexity[d]:.2f}" for d in domains), "", *rest([base])]]
    for one in experiment.outcomes:
        label = f"{', '.join(one.experts)}: {one.label}"
        rows.append([label, *(percent(one.change[d]) for d in domains), percent(one.mean_change), *rest([one])])
    for name, runs in experiment.controls.items():
        for what, of in (("mean", statistics.fmean), ("worst", partial(max, key=badness))) if runs else ():
            cells = [percent(of([run.change[d] for run in runs])) for d in domains]
            cells.append(percent(of([run.mean_change for run in runs])))
            rest_of = rest(runs) if what == "mean" else [""] * len(rest(runs))
            rows.append([f"{len(runs)} random, {name}: {what}", *cells, *rest_of])
    decay = [] if layer is None else [f"#D_sink L{layer}"]
    head = ",".join(
        [
            "switched off",
            *(f"#{d.replace(',', ' ')}" for d in domains),
            "#mean",
            "#attention sink",
            *decay,
            "#residual stream",
        ]
    )
    text = conclusion(experiment)
    return {"ablation": make_table(head + ",#exact" * asked, rows), "ablation_text": text[:1].upper() + text[1:]}


def traces_section(evidence: Evidence) -> dict[str, Any]:
    traces = evidence.traces
    if traces is None:
        return {"traces": None}

    def cells(group: Any) -> list[str]:
        return [
            whole(group.rows),
            whole(group.seen),
            number(group.maximum),
            number(group.mean),
            number(group.gate, 3),
        ]

    shown = []
    for trace in traces.experts[:MOST]:
        groups = trace.kinds | {f"position {name}": group for name, group in trace.positions.items()}
        tokens = []
        for token, group in list(trace.tokens.items())[:12]:
            tokens.append([token_text(token, trace.texts[token]), *cells(group)])
        columns = ",#rows,#of all,#max|y|,#mean,#routing weight"
        kinds = make_table("tokens" + columns, [[name, *cells(group)] for name, group in groups.items()])
        shown.append(
            {
                "expert": trace.expert,
                "rows": whole(trace.rows),
                "groups": kinds,
                "tokens": make_table("token" + columns, tokens),
            }
        )
    sequences = whole(sum(traces.sequences.values()))
    text = (
        f"Rows of these experts in {whole(traces.tokens)} tokens of {sequences} sequences: so many of all such tokens "
        "came to the expert; the largest |y| of a row, at most and on average; the mean routing weight."
    )
    return {"traces": shown, "traces_text": text}


def timeline_section(evidence: Evidence) -> dict[str, Any]:
    found = evidence.timeline
    if found is None:
        return {"timeline": None}
    experts = [*found.experts, *found.passing][:6]
    rows = []
    for at in found.chosen():
        state = found.states[at]
        seen = [number(state.loss), number(state.sink_mean, 3), number(state.residual_max)]
        rows.append([whole(state.step), *seen, *(number(one.values[at]) for one in experts)])
    head = ",".join(["#step,#loss,#attention sink,#residual stream", *(f"#{one.expert} |y|" for one in experts)])
    return {"timeline": make_table(head, rows), "timeline_text": [found.headline, *found.findings, *found.notes]}


def inside_section(evidence: Evidence) -> dict[str, Any]:
    """The analyses, each with its table by layer and the tables of the marked experts; the page adds their charts."""
    titles = {"weights": "The experts' weights", "outputs": "The experts' outputs", "routing": "The routing"}
    marked, shown = marked_experts(evidence.ranking), []
    for kind, result in evidence.analyses.items():
        layers = layers_table(result)
        special = {title: _table(cells) for title, cells in standings_tables(result, marked).items()}
        shown.append(
            {"kind": kind, "title": titles[kind], "text": layers.text, "layers": _table(layers)}
            | {"special": special, "notes": result.notes}
        )
    return {"inside": shown}


def _table(cells: Cells) -> Table:
    return make_table(",".join([cells.columns[0], *(f"#{name}" for name in cells.columns[1:])]), cells.rows)
