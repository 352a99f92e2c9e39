"""The results of interventions on candidates: effects with intervals and the verdicts from them, as in proof.json.

sedetect.experiments.proof makes it. Levels, one vocabulary everywhere:

    candidate  the most that statistics alone can show of an expert
    proved     the model depends on it: by itself, or with others that stand in for it
    refuted    the model does not depend on it, whatever the statistics suggest
    undecided  the text of the proof was not enough, or shows a dependence of another kind
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sedetect.documents import Document, Tabular, short_repr
from sedetect.files import PROOF, finite

LEVELS = ("candidate", "proved", "refuted", "undecided")


@dataclass(frozen=True)
class Effect:
    """A relative change of perplexity (0.1 is 10% worse), and the interval it lies in. documents: their number."""

    rise: float
    low: float
    high: float
    documents: int

    def __str__(self) -> str:
        return f"{_percent(self.rise)} ({_percent(self.low)} to {_percent(self.high)})"


def _percent(value: float) -> str:
    return f"{value:+.1%}".replace("-0.0%", "+0.0%")


@dataclass(frozen=True)
class Switching:
    """One run with outputs switched off at trigger tokens.

    experts         those switched off; in a control, others that the trigger tokens visit
    sink_mean       mean attention on the first token, residual_max: largest |x| of the residual stream inside; None
    where not observed
    """

    label: str
    experts: list[str]
    effect: Effect
    sink_mean: float | None = None
    residual_max: float | None = None


@dataclass(frozen=True)
class Feeder:
    """An upstream expert, and what is left of the fed expert's |y| without it (0.1: a tenth), the most of any text."""

    expert: str
    left: float


@dataclass(frozen=True)
class Verdict:
    """Of one candidate.

    level      "proved", "refuted" or "undecided"; reason: a sentence
    alone      effect of switching it off by itself; within: what it adds to switching off all others; None where it did
               not fire, or was the only one
    triggers   its trigger tokens in the text; firsts: those of them that begin a sequence
    partners   the experts it is proved with, where alone it is not
    feeders    None where prove did not look for them
    """

    expert: str
    level: str
    reason: str
    alone: Effect | None
    within: Effect | None
    triggers: int
    firsts: int
    partners: list[str] = field(default_factory=list)
    feeders: list[Feeder] | None = None


@dataclass(frozen=True)
class Proof(Tabular, Document):
    """What prove found.

    model, digest   as in the header of statistics
    tokens          of the text; documents: windows of it
    smallest        relative rise of perplexity that matters; level: chance that any interval misses
    sink_mean, best_head, residual_max      of the unchanged model; the first two None without attention weights
    uniform         sink mass of uniform attention in windows of this length; sinks: a sentence on them
    seconds         the time it took
    """

    FORMAT = "sedetect-proof"
    FILE = PROOF
    REMEDY = "run `sedetect prove MODEL -o DIR` to make one"

    model: str
    digest: str
    tokens: int
    documents: int
    smallest: float
    level: float
    sink_mean: float | None
    best_head: float | None
    residual_max: float
    uniform: float
    verdicts: list[Verdict]
    runs: list[Switching]
    controls: list[Switching]
    seconds: float
    sinks: str = ""
    notes: list[str] = field(default_factory=list)

    __repr__ = short_repr

    def records(self) -> list[dict[str, Any]]:
        """A row per verdict, with the effect alone and within all that were switched off."""
        return [
            {"expert": one.expert, "level": one.level}
            | _columns("alone", one.alone)
            | _columns("within", one.within)
            | {"triggers": one.triggers, "firsts": one.firsts, "reason": one.reason}
            for one in self.verdicts
        ]

    def of(self, expert: object) -> Verdict | None:
        """The verdict of an expert, a Place or its name; None where it was not tried."""
        return next((verdict for verdict in self.verdicts if verdict.expert == str(expert)), None)

    def to_dict(self) -> dict[str, Any]:
        """The document proof.json: every field; infinity is "inf"."""
        document: dict[str, Any] = finite(asdict(self))
        return super().to_dict() | document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Proof":
        """The inverse of to_dict; unknown keys are ignored."""
        fields = {name: document[name] for name in cls.__dataclass_fields__}
        fields["verdicts"] = [_verdict(one) for one in document["verdicts"]]
        for name in ("runs", "controls"):
            fields[name] = [Switching(**one | {"effect": read_effect(one["effect"])}) for one in document[name]]
        return cls(**fields)


def _columns(name: str, effect: Effect | None) -> dict[str, float | None]:
    return {f"{name}_{end}": None if effect is None else getattr(effect, end) for end in ("rise", "low", "high")}


def read_effect(document: Mapping[str, Any] | None) -> Effect | None:
    """The inverse of asdict and finite."""
    if document is None:
        return None
    rise, low, high = (float(document[name]) for name in ("rise", "low", "high"))
    return Effect(rise, low, high, document["documents"])


def _verdict(document: Mapping[str, Any]) -> Verdict:
    effects = {name: read_effect(document[name]) for name in ("alone", "within")}
    feeders = None if document["feeders"] is None else [Feeder(**one) for one in document["feeders"]]
    return Verdict(**{**document, **effects, "feeders": feeders})
