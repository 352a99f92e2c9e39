"""The result of ranking: the set and the candidates, with their evidence and verdicts."""

from dataclasses import asdict, dataclass
from typing import Any

from sedetect.documents import SHOWN, Document, data_frame, html_table, short_repr
from sedetect.files import finite
from sedetect.stats.place import Place

PROTECTED = ("proved", "candidate", "undecided")
"""The verdicts of experts that pruning and quantization leave alone: all but refuted."""


@dataclass(frozen=True)
class SuperExpert(Place):
    """An expert that the rule names, or a candidate beside the set; y is its down_proj output before the gate.

    value        out_max: largest |y| over all counted rows; sign (1 or -1) and output channel of that element; 0 and
                 channel -1 for an expert that saw no row, which a proof alone can name
    position     of its token in its sequence, token_id, sequence_id: -1 where rows could not be mapped
    source       name of the calibration source of that sequence, None where the header names none
    gate         routing weight of that row (1 for shared)
    ratio        value / median out_max of the bank's finite experts that saw rows, itself included (shared: of the
                 routed experts of its layer); inf where that median is 0, None where there are none
    next_ratio   value / next largest value of the population; None where there is none, inf where it is 0
    first_gate, rest_gate   mean routing weight over the first tokens of sequences, and over all other tokens, 0 where a
                 token is not routed here; None for shared experts (no router) and where there were no such tokens
    first_max, rest_max     largest |y| on first tokens, and on all others; 0 where there was none
    first_ratio  first_max / median first_max of the other routed experts of its layer that saw first tokens; inf where
                 that median is 0, None where there are none
    signature    whether it fires on first tokens, None: not observed (see rank)
    carried      whether it writes a massive activation that a later layer carries; None: the residual was not observed
    late         whether its layer is beyond the rule's layers
    verdict      "candidate", "proved", "refuted" or "undecided" (sedetect.stats.proof); None where only the rule names
    it
    reason       the sentence of a proof; None without a proof
    """

    value: float
    sign: int
    channel: int
    position: int
    token_id: int
    sequence_id: int
    source: str | None
    gate: float
    ratio: float | None
    next_ratio: float | None
    first_gate: float | None
    rest_gate: float | None
    first_max: float
    rest_max: float
    first_ratio: float | None
    signature: bool | None
    carried: bool | None
    late: bool
    verdict: str | None
    reason: str | None = None

    @property
    def seen(self) -> bool:
        """Whether it saw a row."""
        return self.channel >= 0

    __repr__ = short_repr

    def _repr_html_(self) -> str:
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return html_table(str(self), ("field", "value"), list(fields.items()))

    def to_dict(self) -> dict[str, Any]:
        """name (str(self)) and every field, ready for JSON: NaN is None, infinity is "inf"."""
        return {"name": str(self)} | {key: finite(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Ranking(Document):
    """The result of rank.

    super_experts     the paper's set, by value, descending; not all of them have a verdict
    others            candidates outside the set, and other experts that a proof tried, by value, descending
    population        number of experts in A; its maximum, percentile_value and threshold (the fraction of the maximum);
                      the three are NaN for an empty population
    layer_limits      per stack, the first layer that is not in A
    unseen            routed and shared experts of all layers that saw no row
    nonfinite         experts and dense MLPs whose output had a NaN or Inf, in the order of the forward (other stacks
                      before the decoder; by layer, kind, expert): the first is where such values are born
    criteria          the arguments of rank by name
    notes             facts that the reader must know, one line each
    headline          the verdict in one sentence
    """

    FORMAT = "sedetect-ranking"

    model: str
    headline: str
    super_experts: list[SuperExpert]
    others: list[SuperExpert]
    population: int
    maximum: float
    percentile_value: float
    threshold: float
    layer_limits: dict[str, int]
    unseen: int
    nonfinite: list[Place]
    criteria: dict[str, Any]
    notes: list[str]

    __repr__ = short_repr

    def _repr_html_(self) -> str:
        columns = ("expert", "verdict", "max|y|", "÷ median", "÷ next", "channel", "position", "in set")
        rows = [
            (str(e), e.verdict, e.value, e.ratio, e.next_ratio, e.channel if e.seen else None,
             e.position if e.position >= 0 else None, "yes" if e in self.super_experts else "no")
            for e in self.judged[:SHOWN]
        ]  # fmt: skip
        more = f" (the first {SHOWN} of {len(self.judged)})" if len(self.judged) > SHOWN else ""
        return html_table(f"{self.model}: {self.headline}{more}", columns, rows)

    def to_dataframe(self) -> Any:
        """A pandas.DataFrame: a row per expert of judged, with its name and every field."""
        return data_frame([{"name": str(expert)} | asdict(expert) for expert in self.judged])

    @property
    def found(self) -> list[SuperExpert]:
        """The experts to protect, by value, descending: proved super experts, and candidates that nothing refutes."""
        chosen = [expert for expert in self.judged if expert.verdict in PROTECTED]
        return sorted(chosen, key=lambda expert: -expert.value)

    @property
    def proved(self) -> list[SuperExpert]:
        """The experts that a proof showed the model to depend on: its super experts."""
        return [expert for expert in self.judged if expert.verdict == "proved"]

    @property
    def judged(self) -> list[SuperExpert]:
        """Every expert that is shown: the set, then the others."""
        return self.super_experts + self.others

    def to_dict(self) -> dict[str, Any]:
        """The document super_experts.json; no NaN or infinity in it.

        format, version      "sedetect-ranking", "1"
        model, headline      strings
        super_experts        list of SuperExpert.to_dict(), by value, descending
        others               the same
        population, unseen   integers
        maximum, percentile_value, threshold    numbers, null for an empty population
        layer_limits         {stack: integer}
        nonfinite            list of names ("L1E28")
        criteria             {argument of rank: value}
        notes                list of strings
        """
        fields = {key: finite(value) for key, value in vars(self).items()}
        for key in ("super_experts", "others"):
            fields[key] = [expert.to_dict() for expert in fields[key]]
        return super().to_dict() | fields | {"nonfinite": [str(place) for place in self.nonfinite]}
