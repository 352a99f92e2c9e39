"""Calibration: texts in, windows of token ids out.

A corpus is a dictionary of domains, each a list of documents. A domain's documents are tokenized without special
tokens, concatenated, and cut into consecutive windows; each window begins with what the tokenizer itself puts before a
text (BOS, for most), because that is what the model saw in training and what triggers most super experts:

    stream   t0 t1 t2 t3 t4 t5 t6          the domain's tokens
    windows  [BOS t0 t1 t2]  number 0      seq_len 4, prefix of 1
             [BOS t3 t4 t5]  number 1      t6 is left over

A window's number is its place in text order, whatever the seed and the budget. It is the sequence id of the window in
the statistics, within the source that the window's text, tokenizer, length and template name.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jinja2 import TemplateError

from sedetect.calibration.records import Document, Pair, characters, media, messages
from sedetect.calibration.texts import HEAD, Documents, load_texts, pieces
from sedetect.documents import short_repr
from sedetect.errors import Argument, SedetectError, shorten
from sedetect.stats.model import digest
from sedetect.stats.note import Note

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ALL, IMAGES = "text", "images"  # names for all domains of a text, and for the drawn images
_CHUNK = 2**18  # characters of a long domain that are tokenized at once
_CHOICE = 8  # in a long domain, a seed chooses among this many times the windows needed


@dataclass(frozen=True)
class Text:
    """The amount of calibration text, and how it is cut into windows and run.

    tokens         upper limit, prefixes counted; see make_windows
    seq_len        tokens per window, prefix included
    batch_size     windows per forward
    seed           None takes the first windows of each domain, an integer a random choice of them, see make_windows
    chat_template  put every document through the tokenizer's chat template
    domains        those of the text that are taken, by name: "text" for all of them, "images" for the drawn ones; None
                   for all, and the drawn images where the text is the embedded one and the model takes images. Only
                   profile_model draws images
    """

    tokens: int = 32768
    seq_len: int = 512
    batch_size: int = 8
    seed: int | None = None
    chat_template: bool = False
    domains: tuple[str, ...] | None = None


@dataclass(eq=False)
class Windows:
    """Windows of one domain; N windows of L tokens.

    ids      (N, L) int64 token ids, each row beginning with the tokenizer's prefix
    numbers  (N,) int64, ascending; places of the windows in text order: their sequence ids
    source   digest of the domain's text (its first HEAD characters), the tokens they give, the prefix, L and
             chat_template. Equal windows of equal sources have equal numbers, so that merging the same window twice
             can be refused; the seed is left out because numbers do not depend on it
    info     domain, corpus, window (L), chat_template, for people
    """

    ids: torch.Tensor
    numbers: torch.Tensor
    source: str
    info: dict[str, Any]

    __repr__ = short_repr


@dataclass
class Calibration:
    """Windows per domain. asked: tokens requested. notes: domains left out, and domains short of text."""

    domains: dict[str, Windows]
    asked: int
    notes: list[Note] = field(default_factory=list)

    __repr__ = short_repr

    @property
    def used(self) -> int:
        """Tokens in all windows, prefixes counted."""
        return sum(windows.ids.numel() for windows in self.domains.values())


def prefix_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids the tokenizer itself puts before a text: [bos] for most, [] for some.

    Raises SedetectError for a tokenizer that changes the text's own ids when it adds special tokens.
    """
    bare = _tokenise(tokenizer, ["a"])[0]
    full: list[int] = tokenizer("a", verbose=False)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise SedetectError(
        f"tokenizer {tokenizer.name_or_path}: 'a' is {bare} alone and {full} with special tokens; use another tokenizer"
    )


def make_windows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Mapping[str, Iterable[Document]],
    *,
    tokens: int,
    seq_len: int,
    seed: int | None = None,
    chat_template: bool = False,
    corpus: str = "texts",
    max_positions: int | None = None,
) -> Calibration:
    """Cut texts (as load_texts gives them) into windows.

    Args:
        tokens: budget, prefixes counted. It buys tokens // seq_len windows, at least one per domain, shared evenly
            over the domains (the remainder goes to the first ones); other domains fill in for one short of text. Text
            is never repeated: Calibration.used gives the tokens in fact used.
        seq_len: tokens per window, prefix included.
        seed: None takes the first windows of each domain, an integer a random choice of them: of all that begin in the
            first HEAD characters, or of eight times as many as are taken, where that is more. A note says where the
            text goes on.
        chat_template: put every document through the tokenizer's chat template; a text is one turn of the user.
        corpus: name of the data, for the windows' info.
        max_positions: longest sequence that the model supports, if known.

    A domain shorter than one window is left out, with a note.
    Raises SedetectError for a number out of range, a missing chat template, chats without chat_template, two domains
    with the same text, and where no domain fills a window.
    """
    prefix = prefix_ids(tokenizer)
    _check_numbers(tokens, seq_len, seed, len(prefix), max_positions)
    if chat_template and not tokenizer.chat_template:
        raise SedetectError(
            f"tokenizer {tokenizer.name_or_path}: has no chat template; leave out ", Argument("chat_template")
        )
    body = seq_len - len(prefix)
    streams = {domain: _Stream(tokenizer, domain, texts[domain], prefix, chat_template) for domain in texts}
    filling = {domain: stream for domain, stream in streams.items() if stream.read(body) >= body}
    if not filling:
        longest = max((stream.length for stream in streams.values()), default=0)
        raise SedetectError(
            f"{corpus}: no domain fills a window, the longest has {longest} tokens and ",
            Argument("seq_len"),
            f" {seq_len} needs {body}; give more text or shorter windows",
        )
    notes = [
        Note("left_out", f"{domain}: left out, its {stream.length} tokens do not fill one window of {seq_len}")
        for domain, stream in streams.items()
        if domain not in filling
    ]
    domains: dict[str, Windows] = {}
    by_source: dict[str, str] = {}
    for domain, count in _fill(filling, tokens // seq_len, body).items():
        stream = streams[domain]
        source = digest(json.dumps([*stream.head, prefix, seq_len, chat_template]))
        if source in by_source:
            first = by_source[source]
            raise SedetectError(f"{corpus}: domains {first!r} and {domain!r} hold the same text; leave one out")
        by_source[source] = domain
        info = {
            "domain": domain,
            "corpus": corpus,
            "window": seq_len,
            "chat_template": chat_template,
        }
        room = count
        if seed is not None:
            most = _CHOICE * count * body
            room = max(stream.head_length, min(stream.read(most), most)) // body
            if stream.length // body > room or not stream.ended:
                text = f"{domain}: windows chosen among its first {room:,} of {seq_len} tokens"
                notes.append(Note("chosen_among", text, count=room))
        numbers = _choose(room, count, seed)
        windows = stream.ids()[: room * body].reshape(-1, body)[numbers]
        ids = np.concatenate((np.tile(np.array(prefix, np.int64), (count, 1)), windows), axis=1)  # (N, seq_len)
        domains[domain] = Windows(torch.from_numpy(ids), torch.from_numpy(numbers), source, info)
    calibration = Calibration(domains, tokens, notes)
    why = None
    if tokens - calibration.used >= seq_len:
        why = "the text has no more (it is never repeated)"
    elif calibration.used > tokens:
        why = "every domain gives at least one window"
    if why is not None:
        text = f"{tokens} tokens asked, {calibration.used} used: {why}"
        notes.append(Note("tokens_used", text, count=calibration.used))
    return calibration


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", windows: Windows, vocab_size: int) -> None:
    """Raise SedetectError where a token id has no row in the model's embedding of vocab_size rows."""
    largest = int(windows.ids.max())
    if largest >= vocab_size:
        raise SedetectError(
            f"tokenizer {tokenizer.name_or_path}: token {tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, "
            f"the model's embedding has {vocab_size} rows; use the tokenizer that was saved with the model"
        )


def batches(windows: Windows, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids (B, L) and numbers (B,), in order, the last batch possibly smaller."""
    if batch_size < 1:
        raise SedetectError(Argument("batch_size"), f" {batch_size}: must be at least 1")
    yield from zip(torch.split(windows.ids, batch_size), torch.split(windows.numbers, batch_size))


def _check_numbers(tokens: int, seq_len: int, seed: int | None, prefix: int, max_positions: int | None) -> None:
    if tokens < 1:
        raise SedetectError(Argument("tokens"), f" {tokens}: must be at least 1")
    if seq_len < prefix + 1:
        raise SedetectError(
            Argument("seq_len"), f" {seq_len}: must be at least {prefix + 1}, of which {prefix} are the prefix"
        )
    if max_positions is not None and seq_len > max_positions:
        raise SedetectError(
            Argument("seq_len"), f" {seq_len}: the model has {max_positions} positions; choose at most that"
        )
    if seed is not None and seed < 0:
        raise SedetectError(Argument("seed"), f" {seed}: must be at least 0")


def share_windows(total: int, room: dict[str, int]) -> dict[str, int]:
    """Windows per domain: total (at least one per domain) shared evenly, within the room of each."""
    given = dict.fromkeys(room, 0)
    left, open_domains = max(total, len(room)), list(room)
    while left and open_domains:
        each, extra = divmod(left, len(open_domains))
        for place, domain in enumerate(open_domains):
            count = min(each + (place < extra), room[domain] - given[domain])
            given[domain] += count
            left -= count
        open_domains = [domain for domain in open_domains if given[domain] < room[domain]]
    return given


def _choose(room: int, count: int, seed: int | None) -> np.ndarray:
    if seed is None:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(room)[:count])


def _fill(streams: "dict[str, _Stream]", total: int, body: int) -> dict[str, int]:
    """share_windows over the windows of the streams, reading each no further than needed."""
    while True:
        # for a stream that has not ended, more than any domain can be given
        room = {domain: stream.length // body if stream.ended else total + 1 for domain, stream in streams.items()}
        given = share_windows(total, room)
        lacking = [domain for domain, count in given.items() if streams[domain].length < count * body]
        if not lacking:
            return given
        for domain in lacking:
            streams[domain].read(given[domain] * body)


def _tokenise(tokenizer: "PreTrainedTokenizerBase", documents: list[str]) -> list[list[int]]:
    # verbose=False: no warning about texts longer than the model's window, they are cut afterwards
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


class _Stream:
    """The concatenated tokens of a domain's documents without the tokenizer's prefix; n read so far.

    The first documents, of HEAD characters in all, are always read, and name the domain: two that begin alike have the
    same windows there.

    length, ended   tokens that were read (n), and whether these are all
    head            digests of the first documents and of their tokens, of which there are head_length
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        domain: str,
        documents: Iterable[Document],
        prefix: list[int],
        chat_template: bool,
    ):
        self._tokenizer, self._domain, self._prefix, self._chat = tokenizer, domain, prefix, chat_template
        self._documents = chain.from_iterable(pieces(one) if isinstance(one, str) else [one] for one in documents)
        self._parts: list[np.ndarray] = []
        self.length, self.ended = 0, False
        first = self._next(HEAD)
        # the tokens identify the tokenizer, whatever its name
        self.head = (digest(json.dumps(first, sort_keys=True, default=str)), _hash(self.ids()))
        self.head_length = self.length

    def read(self, tokens: int) -> int:
        """Read on until that many tokens are there or the text ends; return length."""
        while self.length < tokens and not self.ended:
            self._next(_CHUNK)
        return self.length

    def ids(self) -> np.ndarray:
        """(n,) int64."""
        self._parts = [np.concatenate([np.empty(0, np.int64), *self._parts])]
        return self._parts[0]

    def _next(self, most: int) -> list[Document]:
        """Tokenize the next documents, until they exceed that many characters; return their ids."""
        taken: list[Document] = []
        length = 0
        self.ended = True
        for document in self._documents:
            taken.append(document)
            length += characters(document)
            if length > most:
                self.ended = False
                break
        ids = self._tokens(taken)
        self._parts.append(ids)
        self.length += len(ids)
        return taken

    def _tokens(self, documents: list[Document]) -> np.ndarray:
        if held := next((part["type"] for document in documents for part in media(document)), None):
            raise SedetectError(
                f"{self._domain}: holds chats with {held}, which profile takes if the first of them do; give text alone"
            )
        if self._chat:
            texts = [_render(self._tokenizer, self._domain, document) for document in documents]
        else:
            plain = [document.text if isinstance(document, Pair) else document for document in documents]
            texts = [text for text in plain if isinstance(text, str)]
            if len(texts) < len(plain):
                raise SedetectError(f"{self._domain}: holds chats (messages); pass ", Argument("chat_template", True))
        if not texts:
            return np.empty(0, np.int64)
        per_document = _tokenise(self._tokenizer, texts)
        if self._chat and (size := len(self._prefix)):
            # most templates write the prefix themselves; every window gets one anyway
            per_document = [ids[size:] if ids[:size] == self._prefix else ids for ids in per_document]
        return np.fromiter(chain.from_iterable(per_document), np.int64)


def _hash(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()


def _render(tokenizer: "PreTrainedTokenizerBase", domain: str, document: Document) -> str:
    chat = messages(document)
    contents = [message.get("content") for message in chat]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if not parts or not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        return _templated(tokenizer, domain, chat)
    # Templates of text models may print a list as it is, or leave it out.
    try:
        rendered = _templated(tokenizer, domain, chat)
    except SedetectError:
        rendered = ""
    printed = any(str(content) in rendered for content in contents if isinstance(content, list))
    if printed or not all(part["text"].strip() in rendered for part in parts):
        joined = (c if not isinstance(c, list) else "\n".join(part["text"] for part in c) for c in contents)
        return _templated(tokenizer, domain, [message | {"content": c} for message, c in zip(chat, joined)])
    return rendered


def _templated(tokenizer: "PreTrainedTokenizerBase", domain: str, chat: list[dict[str, Any]]) -> str:
    try:
        return cast(str, tokenizer.apply_chat_template(chat, tokenize=False))  # one chat, not as tokens
    except (TemplateError, TypeError, ValueError) as error:
        raise SedetectError(f"{domain}: no chat for the template ({shorten(error)}); fix or remove it") from None


def check_text(
    texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Document]] | None, text: Text
) -> Mapping[str, Iterable[Document]]:
    """The documents per domain. Raises SedetectError for every fault that shows without a tokenizer."""
    _check_numbers(text.tokens, text.seq_len, text.seed, 0, None)
    if text.batch_size < 1:
        raise SedetectError(Argument("batch_size"), f" {text.batch_size}: must be at least 1")
    if isinstance(texts, dict):
        for domain, documents in texts.items():
            if not isinstance(documents, (list, tuple, Documents)):
                raise SedetectError(f"texts[{domain!r}]: is a {type(documents).__name__}; give a list of documents")
        return _chosen(texts, text.domains)
    if texts is not None and not isinstance(texts, (str, os.PathLike)):
        raise SedetectError(f"texts: is a {type(texts).__name__}; give a path, or a dictionary of lists of documents")
    return _chosen(load_texts(texts), text.domains)


def _chosen(documents: Mapping[str, Iterable[Document]], domains: tuple[str, ...] | None) -> Mapping[str, Any]:
    if domains is None:
        return documents
    for name in domains or ("",):
        if name not in documents and name not in (ALL, IMAGES):
            known = ", ".join(dict.fromkeys([*documents, ALL, IMAGES]))
            raise SedetectError(Argument("domains"), f": there is no {name!r}; give some of {known}")
    everything = ALL in domains and ALL not in documents
    return {name: found for name, found in documents.items() if everything or name in domains}


def corpus_name(texts: object) -> str:
    """The name of profile_model's texts in a header."""
    return "embedded" if texts is None else "texts" if isinstance(texts, dict) else str(texts)


def calibration_windows(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Document]] | None,
    text: Text = Text(),
    *,
    without: Collection[str] = (),
) -> Calibration:
    """make_windows of texts (as profile_model takes them), checked against the model's vocabulary and positions.

    without: domains that are read in another way; if these are all, there are no windows.
    """
    documents = {domain: found for domain, found in check_text(texts, text).items() if domain not in without}
    if without and not documents:
        return Calibration({}, text.tokens)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    calibration = make_windows(
        tokenizer,
        documents,
        tokens=text.tokens,
        seq_len=text.seq_len,
        seed=text.seed,
        chat_template=text.chat_template,
        corpus=corpus_name(texts),
        max_positions=positions,
    )
    for windows in calibration.domains.values():
        check_vocabulary(tokenizer, windows, model.get_input_embeddings().get_parameter("weight").shape[0])
    return calibration
