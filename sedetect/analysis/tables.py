"""The analyses as tables of formatted cells, each with an explanatory sentence, for the console and the report."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from sedetect.analysis import outputs, routing, weights
from sedetect.analysis.common import Analysis, LayerArrays, Standing
from sedetect.analysis.routing import distance, effective, lift, router_spread
from sedetect.ranking.coverage import FEW_ROWS
from sedetect.ranking.result import Ranking
from sedetect.stats.place import BankId


@dataclass
class Cells:
    """columns, the first of which names its row; rows of cells; text: what the numbers are."""

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    text: str = ""


def layer_name(bank: BankId) -> str:
    """A bank of routed experts as a row of a table: "L1", "encoder.L1", "L1 vision"."""
    stack = "" if bank.stack == "decoder" else f"{bank.stack}."
    return f"{stack}L{bank.layer} {bank.kind.removeprefix('routed').removeprefix('_')}".rstrip()


def layers_table(result: Analysis) -> Cells:
    """A row per layer."""
    return {"weights": _weights, "outputs": _outputs, "routing": _routing}[result.kind](result)


def standings_tables(result: Analysis, marked: dict[str, str]) -> dict[str, Cells]:
    """Title -> the Standing of each marked expert in its layer. marked: name -> verdict."""
    of: dict[str, Callable[[LayerArrays, int], dict[str, Standing]]] = {
        "weights": weights.standings,
        "outputs": outputs.standings,
        "routing": routing.standings,
    }
    tables = {}
    for layer in result.layers.values():
        for expert, name in enumerate(layer.members[: layer.experts]):
            if name in marked:
                found = of[result.kind](layer, expert).items()
                rows = [[what, *_standing(one)] for what, one in found]
                title = f"{name} ({marked[name]}) among the {layer.experts} routed experts of its layer"
                tables[title] = Cells(["", "value", "median", "place"], rows)
    return tables


def _standing(one: Standing) -> list[str]:
    """Value, median and place; - for what is not known, of which there is no place."""
    known = math.isfinite(one.value)
    cells = [f"{value:.3g}" if math.isfinite(value) else "-" for value in (one.value, one.median)]
    return [*cells, str(one.place) if known else "-"]


def marked_experts(ranking: Ranking) -> dict[str, str]:
    """Verdict by name of the experts that pictures and tables mark."""
    return {str(e): e.verdict for e in ranking.judged if e.verdict is not None}


def _weights(result: Analysis) -> Cells:
    names = {"similarity": "matrices", "neuron_similarity": "mean neurons", "matched": "matched", "r2": "R2"}
    summaries = {bank: weights.summarize(layer) for bank, layer in result.layers.items()}
    shown = _shown(names, summaries)
    matrices = list(next(iter(summaries.values()))["similarity"])
    rows = [
        [layer_name(bank), *(_two(of.get(name, {}).get(one, math.nan)) for name in shown for one in matrices)]
        for bank, of in summaries.items()
    ]
    columns = [f"{one} {head}" for head in shown.values() for one in matrices]
    text = (
        f"Cosines of {', '.join(matrices)}, means over the pairs of routed experts of a layer: whole matrices; their "
        "mean neurons; whole matrices after their neurons were matched; R2: how much of the similarity of gate "
        "embeddings that of mean neurons explains."
    )
    chance = [v for of in summaries.values() for v in of.get("chance", {}).values() if math.isfinite(v)]
    if chance:
        text += f" Matched with random ones, matrices reach {min(chance):.2f} to {max(chance):.2f}."
    if "r2" in shown:
        known = {name: [of["r2"][name] for of in summaries.values() if "r2" in of] for name in matrices}
        means = [f"{name} {_two(_finite_mean(values))}" for name, values in known.items()]
        text += f" R2, mean of the layers: {', '.join(means)}."
    return Cells(["layer", *columns], rows, text)


def _outputs(result: Analysis) -> Cells:
    names = {"cosine": "cosine", "angular": "angular", "chosen": "chosen", "by_chance": "(chance)", "top": "top",
             "correlation": "correlation", "shared": "shared", "dense": "dense"}  # fmt: skip
    summaries = {bank: outputs.summarize(layer) for bank, layer in result.layers.items()}
    shown = _shown(names, summaries)
    rows = [[layer_name(bank), *(_three(of.get(name)) for name in shown)] for bank, of in summaries.items()]
    text = (
        f"All experts on {_tokens(result):,} tokens. cosine, angular: similarity of two experts' outputs, mean over "
        "tokens and pairs; chosen: share of the chosen experts that are among as many with the largest outputs, and by "
        "chance; top: tokens whose first expert has the largest; correlation: of the ranks of router logits and norms"
        + ("; shared: cosine of the shared expert and the routed ones" if "shared" in shown else "")
        + (f"; dense: that of F, the MLP of {result.settings['against']}" if "dense" in shown else "")
        + "."
    )
    return Cells(["layer", *shown.values()], rows, text)


def _routing(result: Analysis) -> Cells:
    domains = [f"{domain} off".replace(",", " ") for domain in result.settings["domains"]]
    rows = []
    for bank, layer in result.layers.items():
        load, together = layer.arrays["load"], layer.arrays["coactivation"]
        tokens = max(int(layer.arrays["tokens"].sum()), 1)
        if not int(load.sum()):  # nobody chose any: there is no busiest one
            rows.append([layer_name(bank), *["-"] * (6 + len(domains))])
            continue
        busiest = int(load.sum(0).argmax())
        as_busy = int((load.sum(0) == load[:, busiest].sum()).sum()) - 1
        pairs = lift(together, tokens).masked_fill(together < FEW_ROWS, torch.nan).nan_to_num(nan=-1)
        i, j = divmod(int(pairs.argmax()), layer.experts)
        as_often = int((pairs == pairs[i, j]).sum()) // 2 - 1
        spread = router_spread(layer)
        rows.append(
            [
                layer_name(bank),
                f"E{busiest}{_more(as_busy)}",
                f"{int(load[:, busiest].sum()) / tokens:.1%}",
                f"{effective(load.sum(0)):.1f}",
                "-" if spread is None else f"{spread:.1f}",
                *("-" if math.isnan(value) else f"{value:.0%}" for value in distance(load).tolist()),
                *((f"E{i} E{j}{_more(as_often)}", f"{float(pairs[i, j]):.2g}") if pairs[i, j] > 0 else ("-", "-")),
            ]
        )
    text = (
        f"{_tokens(result):,} tokens. busiest: the expert most tokens chose (+2: and two more as many); effective: "
        "experts over which the load spreads (exp of its entropy); router: over which a token's routing probabilities "
        "do, on average; off: share of a domain's load that lies on other experts than that of all domains; pair: "
        "chosen "
        f"together most, as a multiple of chance (of those with {FEW_ROWS} common tokens or more)."
    )
    return Cells(["layer", "busiest", "share", "effective", "router", *domains, "pair", "lift"], rows, text)


def _more(equals: int) -> str:
    """Of something that is the largest, and others with it."""
    return f" +{equals}" if equals else ""


def _tokens(result: Analysis) -> int:
    return sum(result.settings["domains"].values())


def _shown(names: dict[str, str], summaries: dict[BankId, dict[str, Any]]) -> dict[str, str]:
    """Those of the columns for which some layer has a number."""
    return {field: name for field, name in names.items() if any(field in of for of in summaries.values())}


def _two(value: float) -> str:
    """Two decimals, and no minus before a zero; - for what is not known."""
    return f"{round(value, 2) + 0.0:.2f}" if math.isfinite(value) else "-"


def _finite_mean(values: list[float]) -> float:
    """The mean of the known values; NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def _three(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
