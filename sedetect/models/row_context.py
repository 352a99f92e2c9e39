"""Row context: the token of each row of a forward, from the arguments of the model's own forward.

The experts see (T, H) rows and nothing else. RowTracker reads mask, positions and token ids off each top-level call
before the model runs, and follows sequences through the key-value cache and through generate(). Everything that depends
on values stays on the device: a forward is never synchronized with the host.

A first token is the first counted token of its sequence. A token counts unless the attention mask hides it, it is
padding by its id (profile(pad_token_id=...)), it follows the first generated end-of-sequence token of its sequence, or
the same generate() call has counted it before (use_cache=False feeds the whole prefix at every step). Its position is
the model's own position id where one is given, else the number of counted tokens before it.

A call continues its cache at the length that the cache has: one that was reset begins new sequences, one that was
cropped goes on from where it was cut. Tokens that a cropped cache lost (rejected drafts) stay in the statistics; their
number is noted. Texts flattened into one row begin where position ids or cumulative lengths begin again. Of
generate_batch() position and token are known, the sequence is not.

Rows that cannot be mapped (a 4-D mask alone, a cache filled elsewhere, a module that regroups tokens) all count, with
sequence, position and token -1 and no first tokens.

Tokens of images, video and audio stand in their sequence as text does. Where modalities are told apart, the rows of
each are also given alone, with the first tokens of its spans; see sedetect.models.modalities.

Beams of a beam search are followed by row, not by hypothesis. Encoder-decoder models: the rows of the decoder stack are
mapped, those of the encoder are not. Rows of a vision tower are its patches; see sedetect.models.patches.
"""

import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sedetect.errors import SedetectError
from sedetect.kernels.rows import Rows
from sedetect.models.caches import by_name, cached_length, caches_in, capacity, like_cache
from sedetect.models.modalities import by_modality, modality_of, placeholders
from sedetect.models.padding import Padding
from sedetect.models.patches import patch_rows
from sedetect.stats.model import ranges_of
from sedetect.stats.note import Note


def _unmapped(why: str) -> Note:
    return Note("unmapped", f"rows not mapped: {why}")


UNMAPPED_CALL = _unmapped("layers ran outside a forward of the model whose rows are known")
UNMAPPED_CACHE = _unmapped("a cache was filled where this profile could not see it")
UNMAPPED_INPUT = _unmapped("the model was called without input_ids or inputs_embeds")
UNMAPPED_SHAPE = _unmapped("the token ids are not (batch, length)")
UNMAPPED_MASK = _unmapped("the attention mask is not (batch, length), so padding was counted")
UNMAPPED_RESIZED = _unmapped("a cache was continued with another batch size")
UNMAPPED_PACKED = _unmapped("several sequences packed into one row; give prof.batch(sequence_ids=...) one per token")
PAGED = Note("paged", "continuous batching: positions and first tokens are known, the sequence of a token is not")
PAGED_GPU = Note(
    "warm_up", "continuous batching: its warm-up on a GPU was counted too; give generate_batch(warmup=False)"
)
LOST = (
    "counted tokens were taken out of a cache afterwards (rejected drafts, a cropped cache): they count as well as "
    "their replacements"
)
MIXED = (
    "texts flattened into one row may see each other's tokens: transformers separates them only without a cache; "
    "give use_cache=False"
)
NO_PREFIX = (
    "sequences do not begin with the prefix token their tokenizer adds; super experts may stay silent without it"
)

_TEXT_AXES = 4  # of rotary position ids of which the first axis is the position in the text

# Where the sequences of a flattened batch begin: (N + 1,) cumulative lengths, as flash attention takes them.
_CUMULATIVE = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")


def check_padded(name: str, value: Any) -> None:
    """Raise SedetectError for a tensor that does not hold a value for each row and column."""
    if isinstance(value, torch.Tensor) and (value.is_nested or value.layout is not torch.strided):
        kind = "nested" if value.is_nested else "sparse"
        raise SedetectError(
            f"{name}: is a {kind} tensor; give a padded one (torch.nested.to_padded_tensor, or to_dense) with an "
            "attention_mask"
        )


@dataclass
class Running:
    """B sequences under way, which a cache or a generate() call continues."""

    sequence: torch.Tensor  # (B,) int64 ids
    counted: torch.Tensor  # (B, C) bool: by column of the cache, whether its token counted
    ends: torch.Tensor  # (B, C) bool: a generated token that ended its sequence
    columns: "int | torch.Tensor" = 0  # seen so far; of a static cache () int64, at most C
    generation: "Generation | None" = None
    modality: torch.Tensor | None = None  # (B,) of the last tokens, where modalities are told apart


@dataclass(eq=False)
class Generation:
    """One generate() call: its prompt, and what ends a sequence."""

    prompt_columns: int
    prompt_mask: torch.Tensor | None  # (B, prompt_columns)
    eos: torch.Tensor  # (N,) int64
    pad: int | None  # what is appended to a sequence that has ended, where that is no end-of-sequence token
    draft: bool  # inside another one: the model drafts for itself
    given_cache: bool  # the caller passed a cache that may hold a prefix
    running: Running | None = None
    cache: Any = None  # held until its end, which takes out what was drafted last


@dataclass
class Batch:
    """The caller's description of the next forward; see Profile.batch."""

    sequence_ids: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass
class _Call:
    """The arguments of one forward that say what its rows are. tokens is input_ids, or -1 for inputs_embeds."""

    tokens: torch.Tensor  # (B, L) int64
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    cache: Any
    cumulative: torch.Tensor | None = None  # (N + 1,) where the sequences of a flattened batch begin
    numbers: torch.Tensor | None = None  # (B, L) which of the flattened sequences a token is of
    apart: bool = True  # flattened sequences do not see each other
    types: torch.Tensor | None = None  # (B, L) modality of each token, as processors number them
    groups: torch.Tensor | None = None  # (B, L) bool: by the experts of images and video, not by those of text

    @property
    def shape(self) -> tuple[int, int]:
        size, length = self.tokens.shape
        return size, length

    @property
    def device(self) -> torch.device:
        return self.tokens.device


class RowTracker:
    """Follows the forwards of one model: begin() before each, end() after each.

    Args:
        model: the top-level model, for the signature of its forward and the defaults of its generate().
        source: number of the calibration source its rows belong to.
        prefix: the token id every sequence should begin with, or None.
        pad: the token id of padding that no mask hides, or None.
        modalities: those to tell apart, of MODALITIES; none by default.

    grouped: (T,) bool, the groups of the call under way; None where all its tokens go to the same experts.
    patches: the rows of a vision tower in the call under way, by their number; see sedetect.models.patches.
    """

    def __init__(
        self,
        model: nn.Module,
        source: int = 0,
        prefix: int | None = None,
        pad: int | None = None,
        modalities: tuple[str, ...] = (),
    ):
        self.source = source
        self.prefix = prefix
        self.modalities = modalities
        self.grouped: torch.Tensor | None = None
        self.patches: dict[int, Rows] = {}
        self._placeholders = placeholders(getattr(model, "config", None))
        self.pending: Batch | None = None
        self.notes: set[Note] = set()
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._stack = "decoder_" if "decoder_input_ids" in self._names else ""
        self._config = getattr(model, "generation_config", None)
        self._text = _text_config(model)
        settings = (self._config, self._text)
        begins, ends = {prefix, *_ids_of(settings, "bos_token_id")}, _ids_of(settings, "eos_token_id")
        vocabulary = getattr(self._text, "vocab_size", None)
        self._padding = Padding(pad, begins, ends, vocabulary if isinstance(vocabulary, int) else None)
        self._generation: Generation | None = None
        self._running: Running | None = None
        self._cache: Any = None
        self._by_cache: weakref.WeakKeyDictionary[Any, Running] = weakref.WeakKeyDictionary()
        self._next_id: dict[torch.device, torch.Tensor] = {}
        self._given_ids: list[torch.Tensor] = []
        self._totals: dict[tuple[str, torch.device], torch.Tensor] = {}

    @torch.compiler.disable
    @torch.inference_mode(False)  # the state kept here may be advanced outside of it
    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Rows | None:
        """The rows of this call's (B, L) tokens, flattened to T = B * L; None where they cannot be mapped."""
        batch, self.pending = self.pending or Batch(), None
        self._cache = self._running = self.grouped = None
        arguments = {**dict(zip(self._names, args)), **kwargs}
        self.patches = patch_rows(arguments, self._placeholders, self.source, self.modalities)
        call = self._read(arguments)
        if isinstance(call, Note):
            self.notes.add(call)
            return None
        if not call.tokens.numel():
            return None
        ids = batch.sequence_ids
        if ids is not None and ids.dim() == 2:
            rows = self._explicit(call, batch, ids)
        elif call.cumulative is not None and call.cache is not None and not hasattr(call.cache, "get_seq_length"):
            rows = self._paged(call)
        else:
            rows = self._follow(call, batch)
        if rows is None:
            return None
        flat = Rows(*(t.expand(call.shape).reshape(-1).contiguous() for t in rows), source=self.source)
        self.grouped = None if call.groups is None else call.groups.reshape(-1)
        if self.modalities:
            flat.parts = self._parts(call, flat)
        return flat

    @torch.compiler.disable
    def end(self, output: Any) -> None:
        """Remember which cache continues the sequences of this call."""
        if self._running is not None:
            for cache in (self._cache, *caches_in(by_name(output))):
                if cache is not None:
                    self._by_cache[cache] = self._running
                    if self._generation is not None:
                        self._generation.cache = cache
        self._cache = self._running = None

    @contextmanager
    def generating(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        """Surround one generate() call of the model with these arguments."""
        prompt = kwargs.get("inputs_embeds")
        for candidate in (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]):
            prompt = candidate if prompt is None else prompt
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)

        def setting(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            own = getattr(config, name, None)
            return getattr(self._config, name, None) if own is None else own

        check_padded("input_ids", prompt)
        check_padded("attention_mask", kwargs.get("attention_mask"))
        eos, pad = setting("eos_token_id"), setting("pad_token_id")
        eos = torch.as_tensor([] if eos is None else eos, dtype=torch.int64).reshape(-1)
        mask = kwargs.get("attention_mask")
        if prompt is not None:
            pad = None if pad is None or pad in eos.tolist() else int(pad)
            eos = eos.to(prompt.device)
            if mask is None and prompt.dim() == 2 and pad is not None:
                # generate() infers its mask by the same rule.
                mask = (prompt != pad) | ~(prompt == pad).any()
        outer = self._generation
        columns = 0 if prompt is None else prompt.shape[1]
        if self._stack:  # an encoder-decoder: the prompt is the encoder's, the decoder begins with its start token
            begun = kwargs.get("decoder_input_ids")
            mask, columns = None, 1 if begun is None else begun.shape[1]
        self._generation = own = Generation(columns, mask, eos, pad, outer is not None, bool(caches_in(kwargs)))
        try:
            yield
        finally:
            self._generation = outer
            if own.cache is not None:
                with torch.inference_mode(False):
                    self._crop(self._by_cache[own.cache], cached_length(own.cache))
                own.cache = None

    def modality_totals(self, modality: str) -> tuple[int, int]:
        """(counted tokens of a modality, its spans begun). Synchronizes."""
        totals = self._summed()
        return totals.get(f"{modality} tokens", 0), totals.get(f"{modality} spans", 0)

    def totals(self) -> tuple[int, int]:
        """(counted tokens, sequences begun). Synchronizes, and completes notes."""
        totals = self._summed()
        tokens, sequences, bare, lost = (totals.get(name, 0) for name in ("tokens", "sequences", "bare", "lost"))
        self.notes = {note for note in self.notes if note.count is None}
        if totals.get("packed"):
            self.notes.add(UNMAPPED_PACKED)
        if totals.get("unseen"):
            self.notes.add(UNMAPPED_CACHE)
        if bare:
            self.notes.add(Note("no_prefix", f"{bare} of {sequences} {NO_PREFIX}", count=bare))
        if lost:
            self.notes.add(Note("lost", f"{lost} {LOST}", count=lost))
        if mixed := totals.get("mixed"):
            self.notes.add(Note("mixed", f"{mixed} {MIXED}", count=mixed))
        if unknown := totals.get("untyped"):
            text = f"{unknown} tokens given as embeddings have an unknown modality; give mm_token_type_ids"
            self.notes.add(Note("untyped", text, count=unknown))
        self.notes.update(self._padding.notes(sequences))
        return tokens, sequences

    def _summed(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for (name, _), total in self._totals.items():
            totals[name] = totals.get(name, 0) + int(total)
        return totals

    def ranges(self) -> list[list[int]]:
        """Half-open ranges of the sequence ids seen. Synchronizes."""
        ids = [t.cpu().reshape(-1) for t in self._given_ids]
        ids += [torch.arange(int(t)) for t in self._next_id.values()]
        seen = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)
        return ranges_of(seen[seen >= 0])

    def _note_ids(self, ids: torch.Tensor) -> None:
        if self._next_id:
            raise SedetectError("prof.batch: earlier forwards had no sequence_ids and this one has; give them to all")
        self._given_ids.append(ids)

    def _read(self, arguments: dict[str, Any]) -> _Call | Note:
        """The arguments of one forward, or the note that says why its rows cannot be mapped."""
        stack = self._stack
        for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
            check_padded(f"{stack}{name}", arguments.get(f"{stack}{name}"))
        tokens, embeds = arguments.get(f"{stack}input_ids"), arguments.get(f"{stack}inputs_embeds")
        if tokens is None:
            if embeds is None:
                return UNMAPPED_INPUT
            tokens = torch.full(embeds.shape[:2], -1, device=embeds.device)
        if tokens.dim() != 2:
            return UNMAPPED_SHAPE
        caches = caches_in(arguments)
        for name, value in arguments.items():
            if like_cache(name) and not any(value is known for known in (None, False, True, *caches)):
                return unmapped_unknown(name)
        mask, positions = arguments.get(f"{stack}attention_mask"), arguments.get(f"{stack}position_ids")
        cache = caches[0] if caches else None
        cumulative = next((arguments[name] for name in _CUMULATIVE if arguments.get(name) is not None), None)
        use_cache = arguments.get("use_cache")
        made = getattr(self._text, "use_cache", False) if use_cache is None else use_cache
        apart = "flash" in str(getattr(self._text, "_attn_implementation", "")) or (
            positions is not None and mask is None and cache is None and not made
        )
        types, groups = (
            _move(given, tokens.device)
            if isinstance(given := arguments.get(name), torch.Tensor) and given.shape == tokens.shape
            else None
            for name in ("mm_token_type_ids", "moe_mm_token_type_ids")
        )
        return _Call(
            tokens.to(torch.int64),
            mask,
            positions,
            cache,
            cumulative,
            arguments.get("seq_idx"),
            apart,
            types,
            None if groups is None else groups != 0,
        )

    def _parts(self, call: _Call, rows: Rows) -> tuple[Rows, ...]:
        """The rows of each modality."""
        modality = modality_of(call.tokens, call.types, self._placeholders)
        before = None if self._running is None else self._running.modality
        parts = by_modality(rows, modality, before, self.modalities)
        for name, part in zip(self.modalities, parts):
            self._add(f"{name} tokens", part.counted.sum())
            self._add(f"{name} spans", part.first.sum())
        self._add("untyped", (rows.counted & (modality.reshape(-1) < 0)).sum())
        if self._running is not None:
            self._running.modality = modality[:, -1].clone()
        return parts

    def _explicit(self, call: _Call, batch: Batch, ids: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Rows of a call whose every token was given its sequence id (B, L): whole sequences, in any arrangement."""
        counted = self._visible(call, batch, torch.arange(call.shape[1], device=call.device))
        if counted is None:
            self.notes.add(UNMAPPED_MASK)
            return None
        sequence = _move(ids, call.device).expand(call.shape)
        self._note_ids(sequence.masked_fill(~counted, -1))
        rank = _rank_in_sequence(sequence, counted)
        first = counted & (rank == 0)
        position = self._positions(call, batch)
        self._count(counted, first, call.tokens)
        return counted, first, sequence, rank if position is None else position, call.tokens

    def _paged(self, call: _Call) -> tuple[torch.Tensor, ...] | None:
        """Rows of a call of continuous batching: pieces of many texts in one row, told by their positions."""
        if call.cumulative is None or call.position_ids is None or call.tokens.shape[0] != 1:
            self.notes.add(UNMAPPED_CACHE)
            return None
        self.notes.update([PAGED] if call.device.type == "cpu" else [PAGED, PAGED_GPU])
        # Behind the last sequence is padding.
        counted = (torch.arange(call.shape[1], device=call.device) < call.cumulative[-1]).expand(call.shape)
        position = _move(call.position_ids, call.device).to(torch.int64).expand(call.shape)
        first = counted & (position == 0)
        self._count(counted, first, call.tokens)
        return counted, first, torch.full_like(position, -1), position, call.tokens

    def _follow(self, call: _Call, batch: Batch) -> tuple[torch.Tensor, ...] | None:
        """Rows of a call in which each row of the batch is one sequence, new or continued, or several new ones.

        What a static cache holds is known to the device alone: new, unseen and all that is made of start are then
        tensors, and Python values else.
        """
        size, length = call.shape
        held = cached_length(call.cache)
        running = self._resume(call, held)
        if running is not None and len(running.sequence) != size:
            self.notes.add(UNMAPPED_RESIZED)
            return None
        begins = running is None
        if running is None:
            none = torch.zeros(size, 0, dtype=torch.bool, device=call.device)
            running = Running(torch.full((size,), -1, device=call.device), none, none, generation=self._generation)
        # Without a cache generate() feeds the whole prefix again: the columns seen before do not count twice.
        again = running.columns if call.cache is None else 0
        start: Any = 0 if call.cache is None else running.columns if held is None else held
        if isinstance(start, torch.Tensor):
            start = _move(start, call.device)
        unseen: Any = start > running.columns
        # Of a prefix that is not fed again something else remembers.
        if unseen is True or isinstance(again, torch.Tensor) or (again and length <= again):
            self.notes.add(UNMAPPED_CACHE)
            return None
        new: Any = begins or (start == 0 if isinstance(start, torch.Tensor) else False)

        column = start + torch.arange(length, device=call.device)
        counted = self._visible(call, batch, column)
        if counted is None:
            self.notes.add(UNMAPPED_MASK)
            return None
        self._crop(running, again or start)
        counted = counted & (column >= again)
        if self._generation is not None and self._generation.draft:
            counted = torch.zeros_like(counted)
        before = running.counted.sum(1, keepdim=True)
        if new is not False and length > 1:
            counted = self._padding.left_out(call.tokens, counted, new)
        after, ends = self._ended(call, running, column, again)
        counted = counted & ~after
        through = before + counted.cumsum(1)

        position = self._positions(call, batch)
        restarts, packed = self._restarts(call, batch, counted, through, position), None
        texts = torch.zeros_like(counted, dtype=torch.int64)
        nth = through
        if restarts is not None:
            splits = restarts & new if batch.sequence_ids is None else torch.zeros_like(restarts)
            packed = (restarts & ~splits).any(1, keepdim=True)
            texts = splits.cumsum(1)
            nth = through - torch.where(splits, through - counted.to(torch.int64), 0).cummax(1).values
            if not call.apart:
                self._add("mixed", splits.sum() + splits.any(1).sum())
        sequence = self._sequences(running, batch, texts, new)
        first = counted & (nth == 1)
        unknown = packed
        if isinstance(unseen, torch.Tensor):
            self._add("unseen", unseen.to(torch.int64))
            first, unknown = first & ~unseen, unseen.expand(size, 1) if packed is None else packed | unseen
        self._count(counted, first, call.tokens, packed)
        last = (sequence[:, -1], counted & (texts == texts[:, -1:]), ends)
        self._remember(running, call, *last, again or start, again)
        self._running, self._cache = running, call.cache
        if begins and self._generation is not None:
            self._generation.running = running

        places = (sequence, nth - 1 if position is None else position, call.tokens)
        if unknown is None:
            return counted, first, *places
        return counted, first & ~unknown, *(torch.where(unknown, -1, place) for place in places)

    def _resume(self, call: _Call, held: "int | torch.Tensor | None") -> Running | None:
        """The sequences that this call continues, if any."""
        generation = self._generation
        if call.cache is None:
            return generation.running if generation is not None else None
        running = self._by_cache.get(call.cache)
        if running is None or (isinstance(held, int) and held == 0):
            return None
        if generation is not running.generation:
            # A cache from before this generate() call: its own old one, reset, unless the caller handed it in.
            if generation is not None and not generation.given_cache:
                return None
            running.generation = generation
            running.ends = torch.zeros_like(running.ends)
        return running

    def _crop(self, running: Running, start: Any) -> None:
        """Forget the columns from start on, which a cache does not hold any more, and count what was in them."""
        if start is None or (isinstance(start, int) and isinstance(running.columns, int) and start >= running.columns):
            return
        device = running.counted.device
        start = _move(start, device) if isinstance(start, torch.Tensor) else start
        stale = torch.arange(running.counted.shape[1], device=device) >= start
        lost = (running.counted & stale).sum()
        # A cache that was emptied is ready for the next texts, and lost none.
        self._add("lost", lost * (start > 0))
        if isinstance(start, int):
            running.columns = start
            running.counted, running.ends = running.counted[:, :start], running.ends[:, :start]
        else:
            running.counted &= ~stale
            running.ends &= ~stale

    def _remember(
        self,
        running: Running,
        call: _Call,
        sequence: torch.Tensor,
        counted: torch.Tensor,
        ends: torch.Tensor,
        start: Any,
        again: int,
    ) -> None:
        """Write the columns of this call, but the first again, behind the start columns that running has."""
        length = call.shape[1]
        if isinstance(start, int):
            running.counted = torch.cat((running.counted, counted[:, again:]), 1)
            running.ends = torch.cat((running.ends, ends[:, again:]), 1)
            running.columns, running.sequence = start + length - again, sequence
            return
        # Static as the cache: what is written in place is written by a replayed CUDA graph too.
        most, width = capacity(call.cache), running.counted.shape[1]
        room = max(most - width, 0) if most > 0 else length
        if room or isinstance(running.columns, int):
            running.counted, running.ends = F.pad(running.counted, (0, room)), F.pad(running.ends, (0, room))
            running.columns, running.sequence = torch.zeros_like(start) + running.columns, running.sequence.clone()
        index = (start + torch.arange(length, device=call.device)).clamp(max=width + room - 1)
        running.counted.index_copy_(1, index, counted)
        running.ends.index_copy_(1, index, ends)
        # What was filled elsewhere stays unseen.
        running.columns.copy_(torch.where(start > running.columns, running.columns, start + length))
        running.sequence.copy_(sequence)

    def _restarts(
        self,
        call: _Call,
        batch: Batch,
        counted: torch.Tensor,
        through: torch.Tensor,
        position: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """(B, L) bool: tokens with which a sequence begins inside a row that had one already; None: nothing says so."""
        given_2d = call.position_ids is not None and call.position_ids.dim() == 2
        found = []
        if position is not None and (batch.positions is not None or given_2d):
            falls = torch.zeros_like(counted)
            falls[:, 1:] = (position[:, 1:] < position[:, :-1]) & counted[:, :-1]
            found.append(falls | (position == 0))
        if call.cumulative is not None and call.shape[0] == 1:
            begins = torch.zeros(call.shape[1] + 1, dtype=torch.bool, device=call.device)
            where = _move(call.cumulative, call.device).to(torch.int64).clamp(max=call.shape[1])
            found.append(begins.index_fill(0, where, True)[None, :-1])
        if call.numbers is not None and call.numbers.shape == call.tokens.shape:
            changes = torch.zeros_like(counted)
            numbers = _move(call.numbers, call.device)
            changes[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
            found.append(changes)
        if not found:
            return None
        return torch.stack([f.expand(call.shape) for f in found]).any(0) & counted & (through > 1)

    def _sequences(self, running: Running, batch: Batch, texts: torch.Tensor, new: Any) -> torch.Tensor:
        """(B, L) int64 ids. texts: which of the sequences of its row a token is of."""
        given, device = batch.sequence_ids, texts.device
        old = running.sequence[:, None]
        if new is False:
            return old.expand(texts.shape)
        if given is not None:
            if len(given) != len(texts):
                raise SedetectError(
                    f"prof.batch: {len(given)} sequence_ids for a batch of {len(texts)}; give one per sequence"
                )
            ids = _move(given, device)[:, None]
            self._note_ids(ids if new is True else torch.where(new, ids, -1))
        elif self._given_ids:
            if new is True:
                raise SedetectError(
                    "prof.batch: earlier forwards had sequence_ids and this one has none; give them to all"
                )
            ids = torch.full_like(old, -1)
        else:
            # A device counter, advanced by an op: a replayed CUDA graph sees new ids.
            counter = self._next_id.setdefault(device, torch.zeros((), dtype=torch.int64, device=device))
            count = texts[:, -1:] + 1
            ids = counter + count.cumsum(0) - count + texts
            counter += count.sum() * new
        return (ids if new is True else torch.where(new, ids, old)).expand(texts.shape)

    def _visible(self, call: _Call, batch: Batch, column: torch.Tensor) -> torch.Tensor | None:
        """(B, L) bool: tokens that the mask shows; None where no mask says so per token. column: (L,) theirs."""
        size, length = call.shape
        mask = call.mask if batch.mask is None else batch.mask
        if self._generation is not None and not _per_token(mask):
            mask = self._generation.prompt_mask
            if mask is not None:
                mask = _move(mask.repeat_interleave(size // len(mask), 0), call.device)
                width = mask.shape[1]
                return (mask.index_select(1, column.clamp(max=width - 1)) != 0) | (column >= width)  # generated: shown
        if mask is None:
            return torch.ones(call.shape, dtype=torch.bool, device=call.device)
        if not _per_token(mask) or mask.shape[1] < length or len(mask) != size:
            return None
        # A mask over the whole cache begins with its first column; a shorter one covers these tokens alone.
        width = mask.shape[1]
        column = torch.where(column[-1] < width, column, torch.arange(width - length, width, device=call.device))
        return _move(mask, call.device).index_select(1, column) != 0

    def _ended(
        self, call: _Call, running: Running, column: torch.Tensor, again: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) bool twice: tokens after the end of their sequence, and those that end one.

        The first generated end-of-sequence token ends it and is not after it; the padding that generate() appends is.
        """
        generation = self._generation
        if generation is None:
            none = torch.zeros(call.shape, dtype=torch.bool, device=call.device)
            return none, none
        generated = column >= max(generation.prompt_columns, again)
        ends = torch.isin(call.tokens, generation.eos.to(call.device)) & generated
        over = (call.tokens == generation.pad) & generated if generation.pad is not None else torch.zeros_like(ends)
        ended = running.ends.any(1, keepdim=True)
        after = ended | (ends.cumsum(1) - ends.to(torch.int64) > 0) | (over.cumsum(1) > 0)
        return after & generated, ends | over

    def _positions(self, call: _Call, batch: Batch) -> torch.Tensor | None:
        positions = call.position_ids if batch.positions is None else batch.positions
        if positions is None:
            return None
        if positions.dim() == 3:  # multimodal rotary embeddings, (axes, B, L)
            if len(positions) != _TEXT_AXES:  # places in a picture are none in a sequence
                return None
            positions = positions[0]
        return _move(positions, call.device).to(torch.int64).expand(call.shape)

    def _count(self, counted, first, tokens, packed=None) -> None:
        self._add("tokens", counted.sum())
        self._add("sequences", first.sum())
        if packed is not None:
            self._add("packed", (packed & counted).sum())
        if self.prefix is not None:
            bare = first & (tokens != self.prefix) & (tokens >= 0)
            self._add("bare", (bare if packed is None else bare & ~packed).sum())

    def _add(self, name: str, count: torch.Tensor) -> None:
        total = self._totals.setdefault((name, count.device), torch.zeros_like(count))
        total.add_(count)


def unmapped_unknown(name: str) -> Note:
    return _unmapped(f"the model was called with {name}, which is not a known cache")


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _ids_of(configs: Iterable[Any], name: str) -> set[int]:
    """The token ids under a name of the first configuration that has any."""
    found: Any = next((ids for c in configs if (ids := getattr(c, name, None)) is not None), [])
    return set(found) if isinstance(found, (list, tuple)) else {found}


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To a GPU without waiting for what it computes.

    Not so to the host, which would read the copy before it is made, nor out of pinned memory, which the caller may
    write to before it is copied; any other is copied before this returns.
    """
    return tensor.to(device, non_blocking=device.type == "cuda" and not tensor.is_pinned())


def _per_token(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def _rank_in_sequence(sequence: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """(B, L) int64: how many counted tokens of the same sequence stand before each counted token."""
    flat = torch.where(counted, sequence, torch.iinfo(torch.int64).max).reshape(-1)
    ids, order = flat.sort(stable=True)
    index = torch.arange(len(flat), device=flat.device)
    starts = torch.cat((ids.new_ones(1, dtype=torch.bool), ids[1:] != ids[:-1]))
    begin = torch.where(starts, index, 0).cummax(0).values
    rank = torch.empty_like(flat)
    rank[order] = index - begin
    return rank.view(sequence.shape)
