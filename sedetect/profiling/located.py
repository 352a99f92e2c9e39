"""The result of a walk of first tokens: the document super_experts.json of `sedetect locate`, and its wording."""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from sedetect.checkpoints.memory import size
from sedetect.documents import Document, short_repr
from sedetect.files import finite
from sedetect.profiling.record import Run
from sedetect.stats.model import ModelStats
from sedetect.stats.note import Note
from sedetect.stats.place import Place
from sedetect.stats.residual import Residual


@dataclass(frozen=True)
class LocatedExpert(Place):
    """A candidate of a walk, as a profile has them (sedetect.ranking.rule) but for ratio; y is its down_proj output
    before the routing weight.

    value      largest |y| over the rows of the walk; sign and output channel of that element
    token_id, position    of its token; gate: the routing weight there
    ratio      value / median of the largest |y| of all experts of all layers that ran; None where that is 0
    fires      token id and largest |y| of every first token that visits the expert, in the order of the walk; empty
               where the module regroups its rows
    signature  whether it fires on first tokens against the others of its layer that ran; None: no other did
    carried    whether it writes at least half of a massive activation that a later layer carries; None: not known, the
               last layer that ran made it, or the residual stream was not observed
    weight     the element of down_proj behind the outlier, as "L1E28[101,14]", and share, the part of it that this one
               weight explains; None where the weights cannot be read
    """

    value: float
    sign: int
    channel: int
    token_id: int
    position: int
    gate: float
    ratio: float | None
    fires: tuple[tuple[int, float], ...]
    signature: bool | None
    carried: bool | None
    weight: str | None
    share: float | None

    __repr__ = short_repr

    def on(self) -> list[int]:
        """The first tokens on which it fires: |y| is at least half its largest."""
        return [token for token, value in self.fires if value >= self.value / 2]

    def to_dict(self) -> dict[str, Any]:
        """name and every field, ready for JSON."""
        return {"name": str(self)} | {key: finite(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Located(Document):
    """The result of locate.

    model, source     the model's name, and where it was read: as it was given to locate
    layers, of        decoder layers run, and in all
    tokens            text of every token of the walk, by its id
    first_tokens      ids of the first token of each sequence, the tokenizer's own first
    candidates        by value, descending
    ran               experts that a token visited; median and maximum of their largest |y|
    read, stored      bytes read, and bytes of the checkpoint's tensors
    seconds           from the first byte to the verdict
    unmeasured        experts of the checkpoint that are not in the walked model, a line each
    notes             facts that the reader must know, one line each
    stats, residual   what was measured, as of a profile; not in the document
    """

    FORMAT = "sedetect-located"
    REMEDY = "run `sedetect locate MODEL -o DIR` to make one"

    model: str
    source: str
    layers: int
    of: int
    tokens: dict[int, str]
    first_tokens: tuple[int, ...]
    candidates: list[LocatedExpert]
    ran: int
    median: float
    maximum: float
    read: int
    stored: int
    seconds: float
    unmeasured: list[str]
    notes: list[str]
    stats: ModelStats = field(compare=False)
    residual: Residual | None = field(compare=False)

    __repr__ = short_repr

    @property
    def headline(self) -> str:
        """The verdict in one sentence."""
        if found := self.candidates:
            names = ", ".join(f"{one} (|y| {one.value:.5g})" for one in found)
            return f"{len(found)} candidate{'s' * (len(found) > 1)}: {names}; not proved"
        return (
            f"no candidate: of the {self.ran} experts that ran, whose largest |y| is {self.maximum:.5g} (median "
            f"{self.median:.3g}), none has a sign of a super expert"
        )

    @property
    def bytes_read(self) -> str:
        """One line: bytes read of bytes there are."""
        return f"read {size(self.read)} of {size(self.stored)} ({self.read / self.stored:.1%})"

    def to_dict(self) -> dict[str, Any]:
        """The document super_experts.json: headline, and every field but stats and residual; the level of each."""
        fields = {name: finite(getattr(self, name)) for name in self.__dataclass_fields__}
        del fields["stats"], fields["residual"]
        candidates = [one.to_dict() | {"verdict": "candidate"} for one in self.candidates]
        return super().to_dict() | {"headline": self.headline} | fields | {"candidates": candidates}


def blind_spots(layers: int, of: int, text: bool) -> list[Note]:
    """Notes on the limits of a walk."""
    seen = "a short prompt" if text else "first tokens alone"
    unseen = f"a walk of {seen}: experts that fire later in a text are not seen"
    notes = [Note("located", f"{unseen}, there are no medians of layers and no percentile, and nothing is proved")]
    if layers < of:
        why = "the published rule does not consider them"
        notes.append(Note("located_layers", f"layers {layers} to {of - 1} did not run: {why}", count=of - layers))
    return notes


def describe_walk(found: Located) -> Run:
    """The run.json of a walk."""
    return Run(
        digest=found.stats.header.digest,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device="cpu",
        seconds=found.seconds,
        asked=found.stats.header.tokens,
        tokens=found.tokens,
        contexts=[],
    )
