"""The observed residual stream and attention sinks of a model: layers, formations of massive activations, D_sink.

sedetect.experiments.residual_stream makes the observation; this module holds its parts, the document residual.json, and
the conclusions from them. x is the output of a decoder layer before any final norm; everything is in its units.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from sedetect.documents import Document, Tabular, short_repr
from sedetect.files import RESIDUAL
from sedetect.stats.place import Place, parse_place

SINK_MASS = 0.03
"""A model has attention sinks if the first token's share of all attention exceeds that of uniform attention by this.
Of nine small trained models in windows of 512 tokens, those with super experts have 0.05 to 0.11 of all attention
there, those with output gates or learned sinks 0.004 to 0.021; uniform attention has 0.004."""


@dataclass(frozen=True)
class Writer:
    """An expert's share of a jump: routing weight x down_proj output in that channel at that token, over the jump.

    gate is the routing weight; of a shared expert that of its gate where it has one, else 1. What the layer does to the
    sum of its experts afterwards (a norm, a factor) is not in share: see Formation.explained.
    """

    expert: Place
    share: float
    gate: float


@dataclass(frozen=True)
class Formation:
    """A layer that makes one element of the residual stream massive.

    kind         "formed": massive after the layer, less than half as large before it; "enlarged": more than that
                 before, but what the layer adds is massive by itself (several layers that write one channel)
    layer, channel; domain, sequence, position, token_id: the element and its token
    before, after, jump    x before and after the layer, and their difference, signed
    attention    share of the jump that the attention block's output has in that channel; None where none is found
    writers      the 3 largest of the layer's routed, shared and dense experts, by |share|
    explained    attention + the shares of all experts: 1 but for rounding where the layer adds their outputs as they
                 are; elsewhere (norms after a block, residual multipliers) shares compare only with each other, which
                 is what share_of does
    carried_to   last layer up to which the element stays massive without a gap; layer itself: no later layer does
    vanishes     the layer after which it is not massive any more; None where it lasts to the end
    undone_in    the first later layer that takes half of it away or more; None where none does. undone_by: the expert
                 that writes most against it there (step-down of arXiv 2603.05498), its share of what was carried; None
                 where no expert does, but attention, or what the layer does to its sum
    """

    kind: str
    layer: int
    channel: int
    domain: str
    sequence: int
    position: int
    token_id: int
    before: float
    after: float
    jump: float
    attention: float | None
    writers: list[Writer]
    explained: float
    carried_to: int
    vanishes: int | None
    undone_in: int | None = None
    undone_by: Writer | None = None

    @property
    def carried(self) -> bool:
        """Whether a later layer carries the element."""
        return self.carried_to > self.layer

    def share_of(self, expert: Place) -> float:
        """An expert's part of what is explained; 0 for an expert that is not among the writers."""
        shares = [writer.share for writer in self.writers if writer.expert == expert]
        return shares[0] / self.explained if shares and self.explained > 0 else 0.0


@dataclass(frozen=True)
class LayerResidual:
    """One decoder layer over all observed sequences.

    maximum      largest finite |x|, at channel, position, token_id, sequence, domain
    median       the median |x| over all elements of a sequence, averaged over sequences
    ratio        maximum / median; None where the median is 0
    massive      elements with a massive activation, all sequences together
    nonfinite    elements that are NaN or Inf; they count as 0 in everything else
    sinks        per head, the attention probability of the first token (key 0), averaged over the queries in the last
                 three quarters of a sequence (never its prefix), then over sequences; None without attention weights.
                 A layer whose window no longer holds the first token has sinks of 0 for those queries.
    """

    layer: int
    maximum: float
    channel: int
    position: int
    token_id: int
    sequence: int
    domain: str
    median: float
    ratio: float | None
    massive: int
    nonfinite: int
    sinks: list[float] | None

    @property
    def sink_mean(self) -> float | None:
        """Mean over heads."""
        return None if self.sinks is None else sum(self.sinks) / len(self.sinks)


@dataclass(frozen=True)
class Residual(Tabular, Document):
    """What observe_residual saw. digest: as in the header of statistics; sequences: how many of each domain; seq_len,
    prefix: tokens of each, and of its prefix.

    formations are in the order of the forward, at most 16 per layer and sequence (the largest |x|); found counts all.
    instead names the mechanisms of the attention blocks that replace sinks: "learned sinks", "output gates".
    """

    FORMAT = "sedetect-residual"
    FILE = RESIDUAL
    REMEDY = "run `sedetect analyze residual MODEL -o DIR` to make one"

    model: str
    digest: str
    sequences: dict[str, int]
    seq_len: int
    prefix: int
    min_value: float
    min_ratio: float
    layers: list[LayerResidual]
    formations: list[Formation]
    found: int
    notes: list[str] = field(default_factory=list)
    instead: list[str] = field(default_factory=list)

    __repr__ = short_repr

    def records(self) -> list[dict[str, Any]]:
        """A row per layer."""
        return [
            {name: value for name, value in asdict(layer).items() if name != "sinks"}
            | {"sink_mean": layer.sink_mean, "strongest_head": None if layer.sinks is None else max(layer.sinks)}
            for layer in self.layers
        ]

    @property
    def forming_layers(self) -> list[int]:
        """Layers with a formation that at least one later layer carries."""
        return sorted({f.layer for f in self.formations if f.carried})

    @property
    def sink_mean(self) -> float | None:
        """Mean over layers of the means over heads; None without attention weights."""
        means = [layer.sink_mean for layer in self.layers if layer.sink_mean is not None]
        return sum(means) / len(means) if means else None

    @property
    def best_head(self) -> float | None:
        """The largest sink mass of any head; None without attention weights."""
        return max((sink for layer in self.layers for sink in layer.sinks or ()), default=None)

    @property
    def uniform(self) -> float:
        """The sink mass of uniform attention, over the queries of LayerResidual.sinks."""
        return uniform_sinks(self.prefix, self.seq_len)

    @property
    def has_sinks(self) -> bool | None:
        """Whether the sink mass is SINK_MASS above that of uniform attention; None without attention weights."""
        return None if self.sink_mean is None else self.sink_mean >= self.uniform + SINK_MASS

    @property
    def sinks_line(self) -> str:
        """One sentence on the attention sinks, and on the mechanisms that replace them."""
        beside = f"; its attention has {' and '.join(self.instead)}" if self.instead else ""
        if self.sink_mean is None or self.best_head is None:
            return f"attention sinks not observed: the model gives no attention weights{beside}"
        text = "attention sinks" if self.has_sinks else "no notable attention sinks"
        return (
            f"{text}: {self.sink_mean:.1%} of the attention on the first token, {self.best_head:.0%} in the best head; "
            f"uniform attention has {self.uniform:.1%}{beside}"
        )

    @property
    def inner_max(self) -> float:
        """Largest |x| after any layer but the first and the last, which depend on the embedding and the output."""
        return max(layer.maximum for layer in self.layers[1:-1] or self.layers)

    @property
    def headline(self) -> str:
        """One sentence: in which layers massive activations form that later ones carry, and which experts write."""
        forming = ", ".join(f"L{layer}" for layer in self.forming_layers)
        writers = ", ".join(
            str(place) for place in sorted(self.writers(), key=lambda p: (p.layer, p.kind, str(p.expert)))
        )
        text = (
            f"massive activations form in {forming}" if forming else "no massive activation that a later layer carries"
        )
        return text + (f", written by {writers}" if writers else "")

    def carried_by(self, expert: Place) -> list[Formation]:
        """The formations that a later layer carries and of which the expert writes at least half (share_of)."""
        return [f for f in self.formations if f.carried and f.share_of(expert) >= 0.5]

    def writers(self) -> set[Place]:
        """Experts that write at least half of a formation that a later layer carries."""
        return {w.expert for f in self.formations for w in f.writers if self.carried_by(w.expert)}

    def to_dict(self) -> dict[str, Any]:
        """The document residual.json: every field, experts by name, forming_layers, sink_mean and inner_max; no NaN."""
        document = super().to_dict() | asdict(self)
        document |= {name: getattr(self, name) for name in ("forming_layers", "sink_mean", "inner_max")}
        for formation, kept in zip(document["formations"], self.formations):
            formation["writers"] = [_named(writer) for writer in kept.writers]
            formation["undone_by"] = None if kept.undone_by is None else _named(kept.undone_by)
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Residual":
        """The inverse of to_dict; keys beside its own are left out."""
        fields = {name: document[name] for name in cls.__dataclass_fields__ if name != "instead"}
        fields["instead"] = document.get("instead", [])  # absent from files of 0.1.0
        fields["layers"] = [LayerResidual(**layer) for layer in document["layers"]]
        fields["formations"] = [_formation(formation) for formation in document["formations"]]
        return cls(**fields)


def _named(writer: Writer) -> dict[str, Any]:
    return asdict(writer) | {"expert": str(writer.expert)}


def _formation(document: dict[str, Any]) -> Formation:
    """The inverse of asdict with _named; files of 0.1.0 lack the fields on what undoes a formation."""
    writers = [Writer(**w | {"expert": parse_place(w["expert"])}) for w in document["writers"]]
    undone = document.get("undone_by")
    by = None if undone is None else Writer(**undone | {"expert": parse_place(undone["expert"])})
    return Formation(**document | {"writers": writers, "undone_by": by})


@dataclass(frozen=True)
class Observation(Document):
    """The whole document residual.json: a residual stream and, if observed, that of the same model without some
    experts (their names). Residual.load reads the first alone."""

    FORMAT, FILE, REMEDY = Residual.FORMAT, Residual.FILE, Residual.REMEDY

    residual: Residual
    ablated: Residual | None = None
    experts: list[str] = field(default_factory=list)

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """Residual.to_dict(), and under "ablated" experts, residual and sink_decay."""
        document = self.residual.to_dict()
        if self.ablated is not None:
            without = {"experts": self.experts, "residual": self.ablated.to_dict()}
            document["ablated"] = without | {"sink_decay": sink_decay(self.residual, self.ablated)}
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Observation":
        """The inverse of to_dict."""
        without = document.get("ablated")
        if without is None:
            return cls(Residual.from_dict(document))
        return cls(Residual.from_dict(document), Residual.from_dict(without["residual"]), without["experts"])


def sink_queries(prefix: int, length: int) -> range:
    """The queries whose attention on the first token counts: the last three quarters of a sequence, no prefix."""
    return range(max(prefix, -(-length // 4)), length)


def uniform_sinks(prefix: int, length: int) -> float:
    """The sink mass of uniform attention over these queries, each of which sees itself and what is before it."""
    queries = sink_queries(prefix, length)
    return sum(1 / (query + 1) for query in queries) / len(queries) if queries else 1.0


def sink_decay(before: Residual, after: Residual) -> list[float | None]:
    """D_sink of each layer: 1 - mean over heads of (attention to the first token after / before).

    The decay of arXiv 2507.23279 with S = {first token}: about 1 where an intervention removes the sinks, 0 where it
    leaves them. The paper does not say which query it takes; ours is the average over queries and sequences of
    LayerResidual.sinks, taken before the quotient. Heads without any attention to the first token before are left out;
    a layer of such heads, or without attention weights, is None. Heads that were no sinks count like the others, so the
    decay of a layer whose sinks are near 1 / seq_len (uniform attention) says nothing.
    """
    decays = []
    for old, new in zip(before.layers, after.layers, strict=True):
        pairs = zip(old.sinks or (), new.sinks or ())
        ratios = [b / a for a, b in pairs if a > 0]
        decays.append(1 - sum(ratios) / len(ratios) if ratios else None)
    return decays
