"""run.json: date and device of a profile, and the texts of tokens that its statistics hold only by id.

Statistics merge; the day, the machine and the seconds of a run do not. So they stand here, beside the statistics,
together with the texts of tokens, which take the tokenizer and the calibration text to find again.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sedetect.calibration.chats import Chats
from sedetect.calibration.windows import Windows
from sedetect.documents import Document, short_repr
from sedetect.kernels.records import decode
from sedetect.ranking.result import Ranking

if TYPE_CHECKING:
    from sedetect.profiling.pipeline import ModelProfile

KEPT = 3  # of an expert's strongest rows on first tokens, and as many on all others
BEFORE, AFTER = 24, 12  # tokens of a context


@dataclass(frozen=True)
class Context:
    """A token of the calibration text with the text around it; source, sequence, position as in the statistics."""

    source: str
    sequence: int
    position: int
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Run(Document):
    """The facts of a profile that its statistics do not hold.

    digest      of the model, as in the statistics' header
    date        when it ended: ISO 8601, UTC, to the second
    device      name of the model's device
    seconds     in the model's forwards and the statistics
    asked       tokens asked for
    tokens      text of every token on which an expert's largest |y| appeared, by id
    contexts    the KEPT strongest first tokens and the KEPT strongest others of every expert that the ranking names
    """

    FORMAT = "sedetect-run"
    REMEDY = "run `sedetect profile MODEL -o DIR` to make one"

    digest: str
    date: str
    device: str
    seconds: float
    asked: int
    tokens: dict[int, str]
    contexts: list[Context]

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """The document run.json."""
        return super().to_dict() | asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Run":
        """The inverse of to_dict."""
        fields = {name: document[name] for name in cls.__dataclass_fields__}
        fields["tokens"] = {int(token_id): text for token_id, text in document["tokens"].items()}
        fields["contexts"] = [Context(**context) for context in document["contexts"]]
        return cls(**fields)


def describe_run(result: "ModelProfile", ranking: Ranking) -> Run:
    """The record of a profile that has a tokenizer; ranking names the experts whose contexts are kept."""
    tokenizer, banks = result.tokenizer, result.stats.banks
    assert tokenizer is not None  # profile_model gives its own

    def text_of(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    peaks = {peak.token_id for state in banks.values() for peak in decode(state.peak()) if peak is not None}
    places: dict[tuple[int, int, int], None] = {}
    for expert in ranking.judged:
        for row, _ in banks[expert.bank].strongest(expert.number, KEPT):
            places[row.source, row.sequence, row.position] = None
    sources = sorted(result.stats.header.sources)
    texts: list[Windows | Chats] = [*result.windows.values(), *result.chats.values()]
    sequences = {(one.source, int(number)): ids for one in texts for number, ids in zip(one.numbers, one.ids)}
    contexts = []
    for source, sequence, position in places:
        name = sources[source]
        if (ids := sequences.get((name, sequence))) is not None and 0 <= position < len(ids):
            contexts.append(Context(name, sequence, position, *_around(ids.tolist(), position, text_of)))
    return Run(
        digest=result.stats.header.digest,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=result.device,
        seconds=result.seconds,
        asked=result.asked,
        tokens={token_id: text_of([token_id]) for token_id in sorted(peaks) if token_id >= 0},
        contexts=contexts,
    )


def _around(ids: list[int], at: int, text_of: Callable[[list[int]], str]) -> tuple[str, str, str]:
    """Text before token number at, of it, and after it. A token that is a part of a character is given the whole."""
    ids, at = ids[max(at - BEFORE, 0) : at + 1 + AFTER], min(at, BEFORE)
    before, token, after, text = (text_of(part) for part in (ids[:at], [ids[at]], ids[at + 1 :], ids))
    before, after = before.rstrip("\ufffd"), after.lstrip("\ufffd")
    if len(before) + len(after) < len(text) and text.startswith(before) and text.endswith(after):
        token = text[len(before) : len(text) - len(after)]
    return before.lstrip("\ufffd"), token, after.rstrip("\ufffd")  # characters cut at the far ends
