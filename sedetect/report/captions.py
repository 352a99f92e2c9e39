"""What a chart shows, by its name: the page has it below the chart, the figures in a file beside them."""

from sedetect.ranking.coverage import FEW_ROWS
from sedetect.report.data import Records
from sedetect.report.evidence import Evidence
from sedetect.report.text import number, whole

_CAPTIONS = {
    "heatmap": "The largest |y| of every expert, on a logarithmic scale. Framed: the experts with a verdict. Gray: no "
    "row, or only zeros; black or white: NaN or infinity.",
    "ablation": "Change of perplexity, mean of the domains: each point is one run.",
    "frontier": "Each point is an allocation of formats to the routed experts: one for all, by layer, or by expert. "
    "Protected: the protected experts (by layer: all of their layers) stay as they are. At random: the same formats "
    "dealt out anew. Dotted: the rises of the table.",
    "by-layer": "The largest and the median expert of each layer.",
    "by-expert": "The largest |y| of each expert number over all layers, and over the layers of the rule.",
    "positions": "The strongest rows of the experts that stand out: up to 8 on first tokens of sequences, and 8 on "
    "other tokens.",
    "residual": "Largest and median |x| after each layer, over the observed sequences.",
    "sinks": "Attention to the first token of a sequence, averaged over the queries in its last three quarters.",
    "timeline": "Largest |y| of the experts in each state, and the median of their layers' experts.",
    "timeline-sinks": "Mean attention to the first token, over layers and heads, and what uniform attention has.",
    "coverage": "Rows of the routed experts of each layer: fewest to most, and the median. Dashed: "
    f"{FEW_ROWS} rows, below which a maximum says little.",
    "headroom": "The largest |y| and |h| of each layer, and the largest numbers that fp8 and fp16 can hold.",
    "kurtosis": "Excess kurtosis of max|y| over the experts of each layer. Dashed: the most that n values can have.",
}


def captions(evidence: Evidence, data: dict[str, Records]) -> dict[str, str]:
    """The caption of every chart that the report may have; those of the analyses say it in their text."""
    ranking = evidence.ranking
    limits = ", ".join(
        f"{'' if stack == 'decoder' else stack + ' '}layers below {limit}"
        for stack, limit in ranking.layer_limits.items()
    )
    lines = f": {number(ranking.percentile_value)} and {number(ranking.threshold)}" if ranking.population else ""
    tail = (
        f"All routed and shared experts by their largest |y|. Filled: in the population of the rule ({limits}), "
        f"{whole(ranking.population)} experts; hollow: in later layers. The rule names those above both of its lines"
        f"{lines}."
    )
    hidden = sum(not (record["first"] and record["rest"]) for record in data["experts"])
    first_rest = "An expert that fires on the first token of a sequence lies far above the diagonal."
    if hidden:
        first_rest += f" Not drawn: {whole(hidden)} experts without a finite |y| above 0 on both kinds of tokens."
    return _CAPTIONS | {"tail": tail, "first-rest": first_rest}
