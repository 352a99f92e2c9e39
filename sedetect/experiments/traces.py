"""When and where chosen experts fire: every row routed to them, by position and by token.

A row is one token routed to one expert. Its strength is max|y|, y the expert's down_proj output before the routing
weight, as in the statistics; only the rows of the chosen experts are computed a second time. All rows are kept until
the end of the run (eight numbers each), the strongest are kept in the result.

    positions   0, 1-15, 16-63, 64-255, ...: from 16 on, each bucket ends at the next power of 4
    kinds       every token is of one: "first" (of its sequence), "special" (a special token of the tokenizer elsewhere:
                where the text went through a chat template, these delimit the turns), "delimiter" (its text is white
                space and punctuation only, or nothing), "text" (everything else); "unknown" where rows are not mapped
"""

import math
import string
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from sedetect.calibration.windows import Windows, batches
from sedetect.documents import Document, Tabular, short_repr
from sedetect.errors import SedetectError
from sedetect.kernels.rows import Rows
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank, check_eval, find_banks
from sedetect.models.experts import expert_output
from sedetect.models.identity import model_name
from sedetect.models.layers import run_tokens
from sedetect.models.row_context import Batch
from sedetect.models.tracking import TrackedModel
from sedetect.models.wrappers import unwrap
from sedetect.stats.place import BankId, Place, parse_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("first", "special", "delimiter", "text", "unknown")
_TOKENS = 20


@dataclass(frozen=True)
class Fired:
    """One row: its token, routing weight (1 for a shared expert), max|y| (None: not finite) and the channel of that."""

    domain: str
    sequence: int
    position: int
    token_id: int
    text: str | None
    gate: float
    value: float | None
    channel: int


@dataclass(frozen=True)
class Group:
    """Rows of one kind, bucket or token.

    rows        how many; seen: tokens of that group in all the text, so that rows / seen of them come to this expert
    mean, maximum    of max|y| over the finite rows; None where there is none
    gate        mean routing weight over the rows
    """

    rows: int
    seen: int
    mean: float | None
    maximum: float | None
    gate: float | None


@dataclass(frozen=True)
class ExpertTrace:
    """One expert. top: its strongest rows; kinds, positions: groups that partition its rows, empty ones left out;
    tokens: the 20 token ids with the largest max|y|, {token_id: group}, strongest first, and their texts."""

    expert: Place
    rows: int
    nonfinite: int
    top: list[Fired]
    kinds: dict[str, Group]
    positions: dict[str, Group]
    tokens: dict[int, Group]
    texts: dict[int, str | None]

    __repr__ = short_repr

    def share(self, kind: str) -> float:
        """Share of the expert's rows that are of this kind; 0 without rows."""
        return self.kinds[kind].rows / self.rows if kind in self.kinds else 0.0


@dataclass(frozen=True)
class Traces(Tabular, Document):
    """What trace_experts saw: tokens and sequences (per domain) of text, and one ExpertTrace per expert asked for."""

    FORMAT = "sedetect-traces"
    REMEDY = "run `sedetect analyze trace MODEL -o DIR` to make one"

    model: str
    tokens: int
    sequences: dict[str, int]
    chat_template: bool
    experts: list[ExpertTrace]
    notes: list[str] = field(default_factory=list)

    __repr__ = short_repr

    def records(self) -> list[dict[str, Any]]:
        """A row per expert and group of its rows: kinds of tokens, then positions, then tokens."""
        return [
            {"expert": str(trace.expert), "by": by, "group": group} | asdict(found)
            for trace in self.experts
            for by, groups in (("kind", trace.kinds), ("position", trace.positions), ("token", trace.tokens))
            for group, found in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The document traces.json: every field, experts by name, tokens as a list; no NaN in it."""
        document = super().to_dict() | asdict(self)
        for trace, kept in zip(document["experts"], self.experts):
            texts = trace.pop("texts")
            trace |= {"expert": str(kept.expert), "shares": {kind: kept.share(kind) for kind in kept.kinds}}
            trace["tokens"] = [{"token_id": t, "text": texts[t]} | group for t, group in trace["tokens"].items()]
        return document

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Traces":
        """The inverse of to_dict."""
        fields = {name: document[name] for name in cls.__dataclass_fields__}

        def group(of: dict[str, Any]) -> Group:
            return Group(**{name: of[name] for name in Group.__dataclass_fields__})

        fields["experts"] = [
            ExpertTrace(
                expert=parse_place(trace["expert"]),
                rows=trace["rows"],
                nonfinite=trace["nonfinite"],
                top=[Fired(**row) for row in trace["top"]],
                kinds={name: group(of) for name, of in trace["kinds"].items()},
                positions={name: group(of) for name, of in trace["positions"].items()},
                tokens={of["token_id"]: group(of) for of in trace["tokens"]},
                texts={of["token_id"]: of["text"] for of in trace["tokens"]},
            )
            for trace in document["experts"]
        ]
        return cls(**fields)


@torch.no_grad()
def trace_experts(
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    experts: Iterable[Place],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    batch_size: int = 8,
    top: int = 100,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Traces:
    """Run all windows and record the rows of the chosen experts.

    Args:
        model: a Hugging Face MoE model in eval mode, restored on exit.
        domains: as calibration_windows gives them.
        experts: which; shared experts and dense MLPs see every token.
        tokenizer: for the texts of tokens; without one every token but the first is of the kind "text".
        batch_size: windows per forward.
        top: rows kept per expert.
        progress: called with the number of tokens after every batch.
    Raises:
        SedetectError: for an expert that the model does not have, and for a model in training mode.
    """
    model = unwrap(model)
    check_eval(model)
    experts = list(dict.fromkeys(experts))
    with ExitStack() as stack, TrackedModel(model) as tracked:
        tracer = _Tracer(model, experts, tracked)
        stack.callback(attach(model, tracer.calls))
        for tracer.domain, windows in enumerate(domains.values()):
            for ids, numbers in batches(windows, batch_size):
                tracked.tracker.pending = Batch(sequence_ids=numbers)
                run_tokens(model, ids)
                progress(ids.numel())
    texts = _Texts(domains, tokenizer)
    return Traces(
        model=model_name(model),
        tokens=sum(windows.ids.numel() for windows in domains.values()),
        sequences={domain: len(windows.ids) for domain, windows in domains.items()},
        chat_template=any(windows.info.get("chat_template") for windows in domains.values()),
        experts=[texts.trace(expert, tracer.rows(expert), top) for expert in experts],
        notes=sorted(map(str, tracked.tracker.notes)),
    )


class _Rows(NamedTuple):
    """Rows of one expert, (N,) each, on the CPU; domain is its number, value is max|y|."""

    domain: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    token_id: torch.Tensor
    first: torch.Tensor
    gate: torch.Tensor
    value: torch.Tensor
    channel: torch.Tensor


class _Tracer:
    """Hooks the banks of the chosen experts and collects their rows. domain: number of the current text."""

    def __init__(self, model: nn.Module, experts: list[Place], tracked: TrackedModel):
        self.tracked, self.domain = tracked, 0
        self._parts: dict[Place, list[_Rows]] = {expert: [] for expert in experts}
        banks = {bank.id: bank for bank in find_banks(model)}
        chosen: dict[BankId, list[Place]] = defaultdict(list)
        for expert in experts:
            bank = banks.get(expert.bank)
            if bank is None or expert.number >= bank.experts:
                raise SedetectError(f"{expert}: {type(model).__name__} has no such expert")
            chosen[bank.id].append(expert)
        self.calls = [
            (banks[bank], partial(self._experts if banks[bank].routed else self._down, banks[bank], places))
            for bank, places in chosen.items()
        ]

    def rows(self, expert: Place) -> _Rows:
        parts = self._parts[expert]
        return _Rows(*map(torch.cat, zip(*parts))) if parts else _Rows(*(torch.zeros(0) for _ in _Rows._fields))

    def _experts(
        self, bank: Bank, places: list[Place], module: nn.Module, x: torch.Tensor, *routing: torch.Tensor
    ) -> torch.Tensor:
        index, gates = routing
        flat = x.reshape(-1, x.shape[-1])
        rows = self.tracked.rows_of(bank, len(flat), x.device)
        for place in places:
            token, slot = ((index == place.number) & (gates != 0) & rows.counted[:, None]).nonzero(as_tuple=True)
            if len(token):
                self._add(place, rows, token, gates[token, slot], expert_output(module, flat[token], place.number))
        return run_inner(module, x, *routing)

    def _down(self, bank: Bank, places: list[Place], original: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = original(x)
        flat = y.reshape(-1, y.shape[-1])
        rows = self.tracked.rows_of(bank, len(flat), y.device)
        token = rows.counted.nonzero()[:, 0]
        self._add(places[0], rows, token, torch.ones(len(token)), flat[token])
        return y

    def _add(self, place: Place, rows: Rows, token: torch.Tensor, gate: torch.Tensor, y: torch.Tensor) -> None:
        value, channel = y.float().abs().max(1)
        domain = torch.full_like(token, self.domain)
        known = [part[token] for part in (rows.sequence, rows.position, rows.token_id, rows.first)]
        self._parts[place].append(_Rows(*(t.cpu() for t in (domain, *known, gate.float(), value, channel))))


class _Texts:
    """All the text that was run, and the kinds of its tokens: assigns rows to groups."""

    def __init__(self, domains: dict[str, Windows], tokenizer: "PreTrainedTokenizerBase | None"):
        self.domains, self.tokenizer = list(domains), tokenizer
        self.special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        if tokenizer is not None:
            self.special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.token_id = torch.cat([windows.ids.reshape(-1) for windows in domains.values()])
        position = torch.cat([torch.arange(w.ids.shape[1]).repeat(len(w.ids)) for w in domains.values()])
        self.kind, self.bucket = self._kinds(self.token_id, position == 0), _buckets(position)

    def trace(self, expert: Place, rows: _Rows, top: int) -> ExpertTrace:
        def groups(mine: torch.Tensor, all_of_text: torch.Tensor, names: list[int]) -> dict[int, Group]:
            return {name: _group(rows, mine == name, int((all_of_text == name).sum())) for name in names}

        kind, bucket = self._kinds(rows.token_id, rows.first != 0), _buckets(rows.position)
        order = rows.value.argsort(descending=True, stable=True)  # NaN first
        strongest = list(dict.fromkeys(rows.token_id[order].long().tolist()))[:_TOKENS]
        kinds = groups(kind, self.kind, torch.unique(kind).tolist())
        positions = groups(bucket, self.bucket, torch.unique(bucket).tolist())
        return ExpertTrace(
            expert=expert,
            rows=len(rows.value),
            nonfinite=int((~rows.value.isfinite()).sum()),
            top=[self._fired(rows, row) for row in order[:top].tolist()],
            kinds={KINDS[name]: group for name, group in kinds.items()},
            positions={bucket_name(name): group for name, group in positions.items()},
            tokens=groups(rows.token_id, self.token_id, strongest),
            texts={token_id: self.text(token_id) for token_id in strongest},
        )

    def text(self, token_id: int) -> str | None:
        return None if self.tokenizer is None or token_id < 0 else str(self.tokenizer.decode([token_id]))

    def _kinds(self, token_id: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """(N,) index into KINDS."""
        unique, inverse = torch.unique(token_id.long(), return_inverse=True)
        kinds = [KINDS.index(self._kind(t)) for t in unique.tolist()]
        return torch.tensor(kinds, dtype=torch.int64)[inverse].masked_fill(first, KINDS.index("first"))

    def _kind(self, token_id: int) -> str:
        if token_id < 0 or token_id in self.special:
            return "unknown" if token_id < 0 else "special"
        text = self.text(token_id)
        return "delimiter" if text is not None and is_delimiter(text) else "text"

    def _fired(self, rows: _Rows, row: int) -> Fired:
        token_id, value = int(rows.token_id[row]), float(rows.value[row])
        return Fired(
            domain=self.domains[int(rows.domain[row])],
            sequence=int(rows.sequence[row]),
            position=int(rows.position[row]),
            token_id=token_id,
            text=self.text(token_id),
            gate=float(rows.gate[row]),
            value=value if math.isfinite(value) else None,
            channel=int(rows.channel[row]),
        )


def is_delimiter(text: str) -> bool:
    """White space and punctuation only (Unicode's P, and ASCII's, which counts = or < too), or nothing."""
    return all(c.isspace() or c in string.punctuation or unicodedata.category(c)[0] in "PZC" for c in text)


def bucket_name(bucket: int) -> str:
    """Positions of bucket -1, 0, 1, 2, 3, ...: "unknown", "0", "1-15", "16-63", "64-255", ..."""
    names = {-1: "unknown", 0: "0", 1: "1-15"}
    return names.get(bucket, f"{4**bucket}-{4 ** (bucket + 1) - 1}")


def _buckets(position: torch.Tensor) -> torch.Tensor:
    """(N,) bucket of each position."""
    return torch.bucketize(position.long(), torch.tensor([0, 1, *(4**n for n in range(2, 16))]), right=True) - 1


def _group(rows: _Rows, mine: torch.Tensor, seen: int) -> Group:
    value, gate = rows.value[mine].double(), rows.gate[mine].double()
    finite = value[value.isfinite()]
    mean, maximum = (float(finite.mean()), float(finite.max())) if len(finite) else (None, None)
    return Group(len(value), seen, mean, maximum, float(gate.mean()) if len(gate) else None)
