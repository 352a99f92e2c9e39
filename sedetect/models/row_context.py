"""Row context: which row of a forward is which token, learned from the arguments of the model's own forward.

The experts see (T, H) rows and nothing else. RowTracker reads mask, positions and token ids off each top-level call
before the model runs, and follows sequences through the key-value cache and through generate(). Everything that depends
on values stays on the device: a forward is never synchronised with the host.

A first token is the first counted token of its sequence. A token counts unless the attention mask hides it, it follows
the first generated end-of-sequence token of its sequence, or the same generate() call has counted it before
(use_cache=False feeds the whole prefix at every step). Its position is the model's own position id where one is
given, else the number of counted tokens before it. Rows that cannot be mapped (a 4-D mask alone, several sequences
packed into one row without sequence ids, a module that regroups tokens) all count, with sequence, position and token -1
and no first tokens.

Beams of a beam search are followed by row, not by hypothesis. Encoder-decoder models: the rows of the decoder stack are
mapped, those of the encoder are not.
"""

import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sedetect.errors import SedetectError
from sedetect.kernels.rows import Rows
from sedetect.stats.model import ranges_of
from sedetect.stats.note import Note


def _unmapped(why: str) -> Note:
    return Note("unmapped", f"rows not mapped: {why}")


UNMAPPED_CALL = _unmapped("layers ran outside a forward of the model whose rows are known")
UNMAPPED_CACHE = _unmapped("a cache was filled where this profile could not see it")
UNMAPPED_INPUT = _unmapped("the model was called without input_ids or inputs_embeds")
UNMAPPED_MASK = _unmapped("the attention mask is not (batch, length), so padding was counted")
UNMAPPED_RESIZED = _unmapped("a cache was continued with another batch size")
UNMAPPED_PACKED = _unmapped("several sequences packed into one row; give prof.batch(sequence_ids=...)")
NO_PREFIX = (
    "sequences do not begin with the prefix token their tokenizer adds; super experts may stay silent without it"
)

# What releases of transformers call the cache, in a forward's arguments as in its output: cache since 5.24.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# Arguments whose names speak of a cache and whose values are none.
_NO_CACHES = ("use_cache", "cache_position")


@dataclass
class Running:
    """B sequences under way, which a cache or a generate() call continues."""

    sequence: torch.Tensor  # (B,) int64 ids
    counted: torch.Tensor  # (B,) int64: tokens counted so far
    ended: torch.Tensor  # (B,) bool: the end-of-sequence token was generated
    columns: int = 0  # token columns seen so far
    generation: "Generation | None" = None


@dataclass(eq=False)
class Generation:
    """One generate() call: its prompt, and what ends a sequence."""

    prompt_columns: int
    prompt_mask: torch.Tensor | None  # (B, prompt_columns)
    eos: torch.Tensor  # (N,) int64
    given_cache: bool  # the caller passed a cache that may hold a prefix
    running: Running | None = None


@dataclass
class Batch:
    """What the caller said of the next forward; see Profile.batch."""

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
    """

    def __init__(self, model: nn.Module, source: int = 0, prefix: int | None = None):
        self.source = source
        self.prefix = prefix
        self.pending: Batch | None = None
        self.notes: set[Note] = set()
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._stack = "decoder_" if "decoder_input_ids" in self._names else ""
        self._config = getattr(model, "generation_config", None)
        self._generation: Generation | None = None
        self._running: Running | None = None
        self._cache: Any = None
        self._by_cache: weakref.WeakKeyDictionary[Any, Running] = weakref.WeakKeyDictionary()
        self._next_id: dict[torch.device, torch.Tensor] = {}
        self._given_ids: list[torch.Tensor] = []
        self._totals: dict[torch.device, torch.Tensor] = {}

    @torch.compiler.disable
    def begin(self, args: tuple, kwargs: dict[str, Any]) -> Rows | None:
        """The rows of this call's (B, L) tokens, flattened to T = B * L; None where they cannot be mapped."""
        batch, self.pending = self.pending or Batch(), None
        self._cache = self._running = None
        call = self._read(args, kwargs)
        if isinstance(call, Note):
            self.notes.add(call)
            return None
        ids = batch.sequence_ids
        rows = self._explicit(call, batch, ids) if ids is not None and ids.dim() == 2 else self._follow(call, batch)
        if rows is None:
            return None
        flat = [t.expand(call.shape).reshape(-1).contiguous() for t in rows]
        return Rows(*flat, source=self.source)

    @torch.compiler.disable
    def end(self, output: Any) -> None:
        """Remember which cache continues the sequences of this call."""
        if self._running is not None:
            for cache in (self._cache, *_caches(_named(output))):
                if cache is not None:
                    self._by_cache[cache] = self._running
        self._cache = self._running = None

    @contextmanager
    def generating(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        """Surround one generate() call of the model with these arguments."""
        prompt = kwargs.get("inputs_embeds")
        for candidate in (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]):
            prompt = candidate if prompt is None else prompt
        config = kwargs.get("generation_config")

        def setting(name: str) -> Any:
            if name in kwargs:
                return kwargs[name]
            own = getattr(config, name, None)
            return getattr(self._config, name, None) if own is None else own

        eos, pad = setting("eos_token_id"), setting("pad_token_id")
        eos = torch.as_tensor([] if eos is None else eos, dtype=torch.int64).reshape(-1)
        mask = kwargs.get("attention_mask")
        if prompt is not None:
            eos = eos.to(prompt.device)
            if mask is None and prompt.dim() == 2 and pad is not None and pad not in eos.tolist():
                # generate() infers its mask by the same rule.
                mask = (prompt != pad) | ~(prompt == pad).any()
        outer = self._generation
        columns = 0 if prompt is None else prompt.shape[1]
        if self._stack:  # an encoder-decoder: the prompt is the encoder's, the decoder begins with its start token
            begun = kwargs.get("decoder_input_ids")
            mask, columns = None, 1 if begun is None else begun.shape[1]
        self._generation = Generation(columns, mask, eos, bool(_caches(kwargs)))
        try:
            yield
        finally:
            self._generation = outer

    def totals(self) -> tuple[int, int]:
        """(counted tokens, sequences begun). Synchronises, and completes notes."""
        totals = sum((t.cpu() for t in self._totals.values()), torch.zeros(4, dtype=torch.int64))
        tokens, sequences, packed, bare = totals.tolist()
        if packed:
            self.notes.add(UNMAPPED_PACKED)
        if bare:
            self.notes.add(Note("no_prefix", f"{bare} of {sequences} {NO_PREFIX}", count=bare))
        return tokens, sequences

    def ranges(self) -> list[list[int]]:
        """Half-open ranges of the sequence ids seen. Synchronises."""
        ids = [t.cpu().reshape(-1) for t in self._given_ids]
        ids += [torch.arange(int(t)) for t in self._next_id.values()]
        seen = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)
        return ranges_of(seen[seen >= 0])

    def _note_ids(self, ids: torch.Tensor) -> None:
        if self._next_id:
            raise SedetectError("prof.batch: earlier forwards had no sequence_ids and this one has; give them to all")
        self._given_ids.append(ids)

    def _read(self, args: tuple, kwargs: dict[str, Any]) -> _Call | Note:
        """The arguments of one forward, or the note that says why its rows cannot be mapped."""
        arguments = {**dict(zip(self._names, args)), **kwargs}
        stack = self._stack
        tokens, embeds = arguments.get(f"{stack}input_ids"), arguments.get(f"{stack}inputs_embeds")
        if tokens is None:
            if embeds is None:
                return UNMAPPED_INPUT
            tokens = torch.full(embeds.shape[:2], -1, device=embeds.device)
        caches = _caches(arguments)
        for name, value in arguments.items():
            if _like_cache(name) and not any(value is known for known in (None, False, True, *caches)):
                return unmapped_unknown(name)
        mask, positions = arguments.get(f"{stack}attention_mask"), arguments.get(f"{stack}position_ids")
        return _Call(tokens, mask, positions, caches[0] if caches else None)

    def _explicit(self, call: _Call, batch: Batch, ids: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Rows of a call whose every token was given its sequence id (B, L): whole sequences, in any arrangement."""
        counted = self._visible(call, batch, 0)
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

    def _follow(self, call: _Call, batch: Batch) -> tuple[torch.Tensor, ...] | None:
        """Rows of a call in which each row of the batch is one sequence, new or continued."""
        size, length = call.shape
        running = self._resume(call)
        if running is None and _cached_length(call.cache):
            self.notes.add(UNMAPPED_CACHE)
            return None
        if running is None:
            running = self._start(call, batch.sequence_ids)
        if len(running.sequence) != size:
            self.notes.add(UNMAPPED_RESIZED)
            return None
        # Without a cache generate() feeds the whole prefix again: the columns seen before do not count twice.
        again = running.columns if call.cache is None else 0
        if again and length <= again:  # not the whole prefix: something else remembers it
            self.notes.add(UNMAPPED_CACHE)
            return None
        start = 0 if call.cache is None else running.columns
        counted = self._visible(call, batch, start)
        if counted is None:
            self.notes.add(UNMAPPED_MASK)
            return None
        counted = (
            counted & (torch.arange(length, device=call.device) >= again) & ~self._ended(call, running, start, again)
        )
        nth = running.counted[:, None] + counted.cumsum(1)
        first = counted & (nth == 1)
        running.counted = running.counted + counted.sum(1)
        running.columns = start + length
        self._running, self._cache = running, call.cache

        position = self._positions(call, batch)
        packed = torch.zeros(size, 1, dtype=torch.bool, device=call.device)
        given_2d = call.position_ids is not None and call.position_ids.dim() == 2
        if position is not None and (batch.positions is not None or given_2d):
            # A position 0 that is not the first token: sequences packed together, which cannot be told apart here.
            packed = (counted & ~first & (position == 0)).any(1, keepdim=True)
        self._count(counted, first, call.tokens, packed)
        places = (running.sequence[:, None], nth - 1 if position is None else position, call.tokens)
        return counted, first & ~packed, *(torch.where(packed, -1, place) for place in places)

    def _resume(self, call: _Call) -> Running | None:
        """The sequences that this call continues, if any."""
        generation = self._generation
        if call.cache is None:
            return generation.running if generation is not None else None
        running = self._by_cache.get(call.cache)
        if running is None or _cached_length(call.cache) == 0:
            return None
        if generation is not running.generation:
            # A cache from before this generate() call: its own old one, reset, unless the caller handed it in.
            if generation is not None and not generation.given_cache:
                return None
            running.generation = generation
            running.ended = torch.zeros_like(running.ended)
        return running

    def _start(self, call: _Call, given: torch.Tensor | None) -> Running:
        size, device = call.shape[0], call.device
        if given is not None:
            if len(given) != size:
                raise SedetectError(
                    f"prof.batch: {len(given)} sequence_ids for a batch of {size}; give one per sequence"
                )
            ids = _move(given, device)
            self._note_ids(ids)
        else:
            if self._given_ids:
                raise SedetectError(
                    "prof.batch: earlier forwards had sequence_ids and this one has none; give them to all"
                )
            # A device counter, advanced by an op: a replayed CUDA graph sees new ids.
            counter = self._next_id.setdefault(device, torch.zeros((), dtype=torch.int64, device=device))
            ids = counter + torch.arange(size, device=device)
            counter += size
        none = torch.zeros(size, dtype=torch.int64, device=device)
        running = Running(ids, none, none.to(torch.bool), generation=self._generation)
        if self._generation is not None:
            self._generation.running = running
        return running

    def _visible(self, call: _Call, batch: Batch, start: int) -> torch.Tensor | None:
        """(B, L) bool: tokens that the mask shows; None where no mask says so per token. start: their first column."""
        size, length = call.shape
        mask = call.mask if batch.mask is None else batch.mask
        if self._generation is not None and not _per_token(mask):
            mask = self._generation.prompt_mask
            if mask is not None:
                mask = mask.repeat_interleave(size // len(mask), 0)
                generated = mask.new_ones(size, max(0, start + length - mask.shape[1]))
                mask = torch.cat((mask, generated), 1)[:, : start + length]
        if mask is None:
            return torch.ones(call.shape, dtype=torch.bool, device=call.device)
        if not _per_token(mask) or mask.shape[1] < length or len(mask) != size:
            return None
        # A mask over the whole cache begins with its first column; a shorter one covers these tokens alone.
        begin = start if mask.shape[1] >= start + length else mask.shape[1] - length
        return _move(mask[:, begin : begin + length], call.device) != 0

    def _ended(self, call: _Call, running: Running, start: int, again: int) -> torch.Tensor:
        """(B, L) bool: tokens after the first generated end-of-sequence token, which itself is not among them."""
        generation = self._generation
        if generation is None or not len(generation.eos):
            return torch.zeros(call.shape, dtype=torch.bool, device=call.device)
        column = start + torch.arange(call.shape[1], device=call.device)
        fresh = column >= max(generation.prompt_columns, again)
        ends = torch.isin(call.tokens, generation.eos.to(call.device)) & fresh
        after = running.ended[:, None] | (ends.cumsum(1) - ends.to(torch.int64) > 0)
        running.ended = running.ended | ends.any(1)
        return after & fresh

    def _positions(self, call: _Call, batch: Batch) -> torch.Tensor | None:
        positions = call.position_ids if batch.positions is None else batch.positions
        if positions is None:
            return None
        if positions.dim() == 3:  # multimodal rotary embeddings: (axes, B, L), time first
            positions = positions[0]
        return _move(positions, call.device).to(torch.int64).expand(call.shape)

    def _count(self, counted, first, tokens, packed=None) -> None:
        bare = first & (tokens != self.prefix) & (tokens >= 0) if self.prefix is not None else first & False
        packed = bare if packed is None else packed
        totals = torch.stack([counted.sum(), first.sum(), (packed & counted).sum(), (bare & ~packed).sum()])
        device = tokens.device
        self._totals.setdefault(device, torch.zeros_like(totals)).add_(totals)


def unmapped_unknown(name: str) -> Note:
    return _unmapped(f"the model was called with {name}, which is no cache that is known here")


def unknown_caches(names: Iterable[str]) -> list[str]:
    """Those of a forward's arguments that are called like a cache, and not as any that is known."""
    return [name for name in names if _like_cache(name) and name not in CACHE_NAMES]


def _like_cache(name: str) -> bool:
    return ("cache" in name or "past" in name) and name not in _NO_CACHES


def _caches(named: Mapping[Any, Any]) -> list[Any]:
    """The values that are caches: under a known name, these first, or because they count their tokens as caches do."""
    known = [named.get(name) for name in CACHE_NAMES]
    # A tuple or dictionary of tensors, of old models, is another object at every call.
    known = [value for value in known if value is not None and not isinstance(value, (bool, tuple, list, dict))]
    return known + [value for value in named.values() if hasattr(value, "get_seq_length")]


def _named(output: Any) -> dict[Any, Any]:
    """What a forward returned, by name, or by number in the tuple of return_dict=False."""
    if isinstance(output, tuple):
        return dict(enumerate(output))
    return dict(output.items() if isinstance(output, dict) else getattr(output, "__dict__", {}))


def _cached_length(cache: Any) -> int | None:
    """Tokens in a cache; None where only the device knows (static caches) or it keeps no count."""
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    return length if isinstance(length, int) else None


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
