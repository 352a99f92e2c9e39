"""What the pictures of the analyses draw: lines by layer, grids of numbers, and points. analyses.py draws them."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from sedetect.analysis import outputs, weights
from sedetect.analysis.common import Analysis, LayerArrays, without
from sedetect.analysis.matrices import NAMES
from sedetect.analysis.routing import effective, lift, router_spread
from sedetect.analysis.tables import layer_name
from sedetect.ranking.result import PROTECTED
from sedetect.report.data import Records
from sedetect.stats.place import BankId

_CELLS = 8192  # of a grid that a page shows
_NEURONS = 128  # of a picture of states
_OTHER = "other"
_LAYER = re.compile(r"^(.*\.)?L\d+")


@dataclass
class Picture:
    """One chart over lists of records.

    form     "lines" (row, series, value), "grid" (x, y, value; mx, my: whether the column or the row is marked; a
             verdict where cells are marked one by one) or "points" (x, y, name, verdict, stray)
    text     what it shows, in words
    x, y, value    titles
    columns, rows  the labels of the axes, in order (lines: columns alone)
    marked   label -> verdict; lines: layer -> the names of those in it
    log      whether the colors of a grid follow the logarithm
    """

    name: str
    form: str
    text: str
    data: dict[str, Records]
    x: str = "expert"
    y: str = "expert"
    value: str = "cosine"
    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    marked: dict[str, str] = field(default_factory=dict)
    log: bool = False


def pictures_of(
    result: Analysis, marked: dict[str, str], *, page: bool, layers: Iterable[BankId] | None = None
) -> list[Picture]:
    """The pictures of all layers together, and of single ones: all of them, or these. marked: name -> verdict.

    For a page, of layers only the first with an expert to protect (or the middle one), as far as they are small enough.
    """
    whole = {"weights": _weights, "outputs": _outputs, "routing": _routing}[result.kind]
    found = [picture for picture in whole(result, marked) if picture.data[picture.name]]
    of_layer = {"weights": _weights_of, "outputs": _outputs_of, "routing": _routing_of}[result.kind]
    for bank in telling_layers(result, marked)[:1] if page else result.layers if layers is None else layers:
        layer = result.layers[bank]
        if layer.arrays:
            found += of_layer(result, f"{result.kind}-{layer_name(bank).replace(' ', '-')}", bank, layer, marked, page)
    return [picture for picture in found if not page or len(picture.data[picture.name]) <= _CELLS]


def telling_layers(result: Analysis, marked: dict[str, str]) -> list[BankId]:
    """The layers with an expert to protect, and behind them one without for comparison: the middle one of those."""
    special = [
        bank
        for bank, layer in result.layers.items()
        if any(marked.get(member) in PROTECTED for member in layer.members)
    ]
    others = [bank for bank in result.layers if bank not in special]
    return special + others[len(others) // 2 :][:1]


def _weights(result: Analysis, marked: dict[str, str]) -> Iterator[Picture]:
    summaries = {bank: weights.summarize(layer) for bank, layer in result.layers.items()}
    for field_name, title, text in (
        ("similarity", "cosine of matrices", "Mean cosine of the routed experts' matrices in every layer."),
        (
            "neuron_similarity",
            "cosine of mean neurons",
            "Mean cosine of the routed experts' mean neurons in every layer.",
        ),
        (
            "matched",
            "cosine of matched matrices",
            "Mean cosine of two experts' matrices after their neurons were matched.",
        ),
        (
            "r2",
            "share explained (R²)",
            "How much of the similarity of gate embeddings that of mean neurons explains, in every layer.",
        ),
    ):
        values = {bank: of.get(field_name, {}) for bank, of in summaries.items()}
        yield _lines(f"weights-{field_name.replace('_', '-')}", result, marked, values, title, text)


def _outputs(result: Analysis, marked: dict[str, str]) -> Iterator[Picture]:
    summaries = {bank: outputs.summarize(layer) for bank, layer in result.layers.items()}
    chosen = {"chosen": "chosen experts", "by_chance": "by chance", "top": "first choice is the largest"}
    alike = {"cosine": "routed experts", "shared": "shared with routed", "dense": "F with routed"}
    for name, title, series, text in (
        ("cosine", "cosine of outputs", alike, "Mean cosine of two routed experts' outputs in every layer."),
        ("norms", "share", chosen, "How many of the chosen experts are among as many with the largest outputs."),
        ("correlation", "rank correlation", {"correlation": "logit and norm"}, "Do router logits follow output norms?"),
    ):
        values = {bank: {series[n]: v for n, v in of.items() if n in series} for bank, of in summaries.items()}
        yield _lines(f"outputs-{name}", result, marked, values, title, text)
    counts = [layer.arrays["rank_counts"] for layer in result.layers.values() if "rank_counts" in layer.arrays]
    if len({count.shape for count in counts}) == 1:
        yield _rank_counts("outputs-ranks", sum(counts[1:], counts[0]), "over all layers")


def _routing(result: Analysis, marked: dict[str, str]) -> Iterator[Picture]:
    values = {}
    for bank, layer in result.layers.items():
        values[bank] = {"load": effective(layer.arrays["load"].sum(0))}
        if (spread := router_spread(layer)) is not None:
            values[bank]["router of a token"] = spread
    text = "Experts over which the load of a layer spreads, and over which the routing probabilities of a token do."
    yield _lines("routing-effective", result, marked, values, "effective experts", text)
    yield _load(result, marked)


def _load(result: Analysis, marked: dict[str, str]) -> Picture:
    experts = max(layer.experts for layer in result.layers.values())
    names, rows = [str(e) for e in range(experts)], [layer_name(bank) for bank in result.layers]
    records = []
    for row, layer in zip(rows, result.layers.values()):
        share = layer.arrays["load"].sum(0) / layer.arrays["tokens"].sum().clamp(min=1)
        cells = _cells(share[None], names[: layer.experts], [row], {})
        records += [cell | {"verdict": marked.get(name, _OTHER)} for cell, name in zip(cells, layer.members)]
    text = "Share of the tokens that chose each expert, layers down, experts across."
    value = "share of the tokens"
    return Picture("routing-load", "grid", text, {"routing-load": records}, "expert", "layer", value, names, rows)


def _weights_of(
    result: Analysis, name: str, bank: BankId, layer: LayerArrays, marked: dict[str, str], page: bool
) -> Iterator[Picture]:
    where = f"in {layer_name(bank)}"
    if "router.similarity" in layer.arrays:
        text = f"Cosine of the gate embeddings of two experts {where}."
        yield _square(f"{name}-gate-embeddings", layer, weights.known(layer, "router", "similarity"), marked, text)
    matrices = [one for one in NAMES if f"{one}.norm" in layer.arrays]
    for one in matrices:
        text = f"Cosine of the mean {one} neurons of two experts {where}."
        yield _square(f"{name}-{one}-neurons", layer, weights.known(layer, one, "neuron_similarity"), marked, text)
    if page:
        return
    for one in matrices:
        text = f"Cosine of the {one} matrices of two experts {where}."
        yield _square(f"{name}-{one}-matrices", layer, weights.known(layer, one, "similarity"), marked, text)
        scores, shares = layer.arrays[f"{one}.scores"], layer.arrays[f"{one}.explained"]
        text = f"First two principal components of the {one} matrices {where}; hollow: in no cluster."
        yield _points(f"{name}-{one}-projection", scores, shares, layer, marked, text, layer.arrays[f"{one}.stray"])
        scores, shares = layer.arrays[f"{one}.neuron_scores"], layer.arrays[f"{one}.neuron_explained"]
        text = f"First two principal components of the {one} neurons {where}, up to {scores.shape[1]} of each expert."
        yield _points(f"{name}-{one}-neuron-projection", scores, shares, layer, marked, text)
        if not len(layer.arrays["pairs"]):
            continue
        for array, value, what in (
            ("matched", "cosine", "Cosine of the matrices"),
            ("tau", "Kendall's tau", "Kendall's tau"),
        ):
            text = f"{what} after matching the {one} neurons of two experts {where}; blank: not matched."
            table = _of_pairs(layer, layer.arrays[f"{one}.{array}"])
            yield _square(f"{name}-{one}-{array}", layer, table, marked, text, value)


def _outputs_of(
    result: Analysis, name: str, bank: BankId, layer: LayerArrays, marked: dict[str, str], page: bool
) -> Iterator[Picture]:
    where, arrays = f"in {layer_name(bank)}", layer.arrays
    yield _square(
        f"{name}-cosine",
        layer,
        outputs.known(layer, "cosine"),
        marked,
        f"Mean cosine of the outputs of two experts {where}.",
    )
    if not page:
        text = f"Mean angular similarity of the outputs of two experts {where}."
        yield _square(f"{name}-angular", layer, outputs.known(layer, "angular"), marked, text, "angular")
        if "rank_counts" in arrays:
            yield _rank_counts(f"{name}-ranks", arrays["rank_counts"], where)
    if "text.norm" not in arrays:
        return
    labels, tokens = _labels(layer), _tokens(result)
    text = f"Norm of every expert's output for each token {where}."
    norms = _by_token(f"{name}-text-norms", arrays["text.norm"], labels, tokens, layer, marked, text, "norm")
    norms.log = bool((arrays["text.norm"] > 0).all())
    yield norms
    if "text.score" in arrays:
        text = f"Gate score (softmax) of every expert for each token {where}."
        yield _by_token(
            f"{name}-text-scores", arrays["text.score"], labels[: layer.experts], tokens, layer, marked, text, "score"
        )
    if page:
        return
    for place, token in enumerate(tokens):
        text = f"Cosine of the outputs of two experts {where} for token {token}."
        yield _square(
            f"{name}-token-{place}-cosine",
            layer,
            without(arrays["text.cosine"][place], arrays["text.norm"][place] == 0),
            marked,
            text,
        )
        if "text.states" not in arrays:
            continue
        states = arrays["text.states"][place].t()
        kept = weights.kept_neurons(len(states), _NEURONS)
        text = f"Intermediate states act(W_gate x) of every expert {where} for token {token}"
        text += "." if len(kept) == len(states) else f", {len(kept)} of {len(states)} neurons."
        yield _grid(
            f"{name}-token-{place}-states", states[kept], [*labels[: layer.experts], *labels[-1:]][: states.shape[1]],
            [str(n) for n in kept.tolist()],
            _marks(layer, marked), text, "neuron", "state",
        )  # fmt: skip


def _routing_of(
    result: Analysis, name: str, bank: BankId, layer: LayerArrays, marked: dict[str, str], page: bool
) -> Iterator[Picture]:
    where, arrays, labels = f"in {layer_name(bank)}", layer.arrays, _labels(layer)
    if "text.index" in arrays:
        tokens, index = _tokens(result), arrays["text.index"]
        table = torch.full((len(index), layer.experts + 1), torch.nan)
        known = index.masked_fill((index < 0) | (index >= layer.experts), layer.experts)
        table.scatter_(1, known, arrays["text.weight"])
        text = f"Routing weight of the experts that each token chose {where}."
        yield _by_token(f"{name}-choice", table[:, :-1], labels, tokens, layer, marked, text, "weight")
    domains = list(result.settings["domains"])
    share = arrays["load"] / arrays["tokens"].clamp(min=1)[:, None]
    text = f"Share of each domain's tokens that chose each expert {where}."
    yield _grid(f"{name}-domains", share, labels, domains, _marks(layer, marked), text, "domain", "share of the tokens")
    if not page:
        found = lift(arrays["coactivation"], int(arrays["tokens"].sum()))
        text = f"Tokens that chose both experts {where}, as a multiple of chance."
        yield _square(f"{name}-coactivation", layer, found, marked, text, "multiple of chance")


def _lines(
    name: str,
    result: Analysis,
    marked: dict[str, str],
    values: dict[BankId, dict[str, float]],
    title: str,
    text: str,
) -> Picture:
    records = [
        {"row": layer_name(bank), "series": series, "value": value}
        for bank, of in values.items()
        for series, value in of.items()
        if math.isfinite(value)
    ]
    here = {
        layer_name(bank): ", ".join(m for m in layer.members if marked.get(m) in PROTECTED)
        for bank, layer in result.layers.items()
    }
    here = {row: names for row, names in here.items() if names}
    marks = [{"row": row, "expert": names} for row, names in here.items()]
    columns = [layer_name(bank) for bank in result.layers]
    return Picture(
        name, "lines", text, {name: records, f"{name}-marks": marks}, "layer", title, title, columns, [], here
    )


def _square(
    name: str, layer: LayerArrays, table: torch.Tensor, marked: dict[str, str], text: str, value: str = "cosine"
) -> Picture:
    """A table of pairs, without its diagonal."""
    labels = _labels(layer)[: len(table)]
    return _grid(
        name, table.clone().fill_diagonal_(torch.nan), labels, labels, _marks(layer, marked), text, "expert", value
    )


def _of_pairs(layer: LayerArrays, values: torch.Tensor) -> torch.Tensor:
    """(N, N) of the values (P,) of the pairs, NaN for all others."""
    first, second = layer.arrays["pairs"].unbind(1)
    table = values.new_full((len(layer.members), len(layer.members)), torch.nan)
    table[first, second] = table[second, first] = values
    return table


def _by_token(
    name: str,
    table: torch.Tensor,
    labels: list[str],
    tokens: list[str],
    layer: LayerArrays,
    marked: dict[str, str],
    text: str,
    value: str,
) -> Picture:
    return _grid(name, table, labels, tokens, _marks(layer, marked), text, "token", value)


def _rank_counts(name: str, counts: torch.Tensor, where: str) -> Picture:
    labels = [str(n + 1) for n in range(len(counts))]
    share = counts.double() / counts.sum(1, keepdim=True)
    text = (
        f"How often an expert of each rank by router logit has each rank by norm, {where}; {len(counts)}: the largest."
    )
    picture = _grid(name, share, labels, labels, {}, text, f"rank of the logit ({len(counts)}: largest)", "share")
    picture.x = f"rank of the norm ({len(counts)}: largest)"
    return picture


def _grid(
    name: str,
    table: torch.Tensor,
    columns: list[str],
    rows: list[str],
    marks: dict[str, str],
    text: str,
    y: str,
    value: str,
) -> Picture:
    """table (len(rows), len(columns)); NaN is not drawn. Rows are marked where they are experts too."""
    of_rows = marks if rows == columns else {}
    records = list(_cells(table, columns, rows, marks, of_rows))
    return Picture(name, "grid", text, {name: records}, "expert", y, value, columns, rows, marks)


def _cells(
    table: torch.Tensor, columns: list[str], rows: list[str], marks: dict[str, str], of_rows: Iterable[str] = ()
) -> Iterator[dict[str, Any]]:
    for row, values in zip(rows, table.tolist(), strict=True):
        for column, value in zip(columns, values, strict=True):
            if math.isfinite(value):
                yield {
                    "x": column,
                    "y": row,
                    "value": float(f"{value:.4g}"),
                    "mx": column in marks,
                    "my": row in of_rows,
                }


def _points(
    name: str,
    scores: torch.Tensor,
    shares: torch.Tensor,
    layer: LayerArrays,
    marked: dict[str, str],
    text: str,
    stray: torch.Tensor | None = None,
) -> Picture:
    """scores (N, 3), or (N, n, 3) of n neurons each."""
    labels, records = _labels(layer), []
    for place, member in enumerate(layer.members):
        alone = stray is not None and bool(stray[place])
        for x, y, *_ in scores[place].reshape(-1, scores.shape[-1]).tolist():
            if math.isfinite(x):
                verdict = marked.get(member, _OTHER)
                records.append(
                    {
                        "x": float(f"{x:.4g}"),
                        "y": float(f"{y:.4g}"),
                        "name": labels[place],
                        "verdict": verdict,
                        "stray": alone,
                    }
                )
    across, up = (f"component {n + 1} ({float(share):.1%} of the variance)" for n, share in enumerate(shares[:2]))
    return Picture(name, "points", text, {name: records}, across, up, marked=_marks(layer, marked), columns=labels)


def _labels(layer: LayerArrays) -> list[str]:
    """Members as an axis has them: "28", "shared", "F"."""
    return [_LAYER.sub("", name).removeprefix("E") for name in layer.members]


def _marks(layer: LayerArrays, marked: dict[str, str]) -> dict[str, str]:
    return {label: marked[name] for label, name in zip(_labels(layer), layer.members) if name in marked}


def _tokens(result: Analysis) -> list[str]:
    """The tokens of the texts as labels, told apart by their place."""
    every = [token for text in result.settings["texts"] for token in text["tokens"]]
    return [f"{place} {token!r}" for place, token in enumerate(every)]
