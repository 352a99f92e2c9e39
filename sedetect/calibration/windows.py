"""Calibration: texts in, windows of token ids out.

A corpus is a dictionary of domains, each a list of documents. A domain's documents are tokenised without special
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jinja2 import TemplateError

from sedetect.calibration.texts import Document, load_texts
from sedetect.errors import Argument, SedetectError, shorten
from sedetect.stats.model import digest
from sedetect.stats.note import Note

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Text:
    """How much calibration text is taken, and how it is cut and run.

    tokens         at most so many, prefixes counted; see make_windows
    seq_len        tokens per window, prefix included
    batch_size     windows per forward
    seed           None takes the first windows of each domain, an integer a random choice of them
    chat_template  put every document through the tokenizer's chat template
    """

    tokens: int = 32768
    seq_len: int = 512
    batch_size: int = 8
    seed: int | None = None
    chat_template: bool = False


@dataclass(eq=False)
class Windows:
    """Windows of one domain; N windows of L tokens.

    ids      (N, L) int64 token ids, each row beginning with the tokenizer's prefix
    numbers  (N,) int64, ascending; places of the windows in text order: their sequence ids
    source   digest of the domain's text, the tokens it gives, the prefix, L and chat_template. Equal windows of equal
             sources have equal numbers, so that merging the same window twice can be refused; the seed is left out
             because numbers do not depend on it
    info     domain, corpus, window (L), chat_template, for people
    """

    ids: torch.Tensor
    numbers: torch.Tensor
    source: str
    info: dict[str, Any]


@dataclass
class Calibration:
    """Windows per domain. asked: tokens asked for. notes: on each domain left out, and where text ran short."""

    domains: dict[str, Windows]
    asked: int
    notes: list[Note] = field(default_factory=list)

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
    texts: Mapping[str, Sequence[Document]],
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
            over the domains (what does not divide goes to the first ones); what a domain lacks the others give. Text
            is never repeated: Calibration.used says what came of it.
        seq_len: tokens per window, prefix included.
        seed: None takes the first windows of each domain, an integer a random choice of them.
        chat_template: put every document through the tokenizer's chat template; a text is one turn of the user.
        corpus: name of the data, for the windows' info.
        max_positions: longest sequence the model can take, if it is known.

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
    streams = {
        domain: _stream(tokenizer, domain, documents, prefix, chat_template) for domain, documents in texts.items()
    }
    room = {domain: len(stream) // body for domain, stream in streams.items() if len(stream) >= body}
    if not room:
        longest = max(map(len, streams.values()), default=0)
        raise SedetectError(
            f"{corpus}: no domain fills a window, the longest has {longest} tokens and ",
            Argument("seq_len"),
            f" {seq_len} needs {body}; give more text or shorter windows",
        )
    notes = [
        Note("left_out", f"{domain}: left out, its {len(stream)} tokens do not fill one window of {seq_len}")
        for domain, stream in streams.items()
        if domain not in room
    ]
    domains: dict[str, Windows] = {}
    by_source: dict[str, str] = {}
    for domain, count in _share(tokens // seq_len, room).items():
        # the tokens stand for the tokenizer: whatever else it may be called, it gave these
        stream = hashlib.sha256(streams[domain].tobytes()).hexdigest()
        identity = [_text_digest(texts[domain]), stream, prefix, seq_len, chat_template]
        source = digest(json.dumps(identity))
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
        numbers = _choose(room[domain], count, seed)
        windows = streams[domain][: room[domain] * body].reshape(-1, body)[numbers]
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


def _share(total: int, room: dict[str, int]) -> dict[str, int]:
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


def _tokenise(tokenizer: "PreTrainedTokenizerBase", documents: list[str]) -> list[list[int]]:
    # verbose=False: no warning about texts longer than the model's window, they are cut afterwards
    encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _stream(
    tokenizer: "PreTrainedTokenizerBase",
    domain: str,
    documents: Sequence[Document],
    prefix: list[int],
    chat_template: bool,
) -> np.ndarray:
    """(n,) int64: the tokens of all documents, one after another, without the tokenizer's prefix."""
    if chat_template:
        texts = [_render(tokenizer, domain, document) for document in documents]
    else:
        texts = [document for document in documents if isinstance(document, str)]
        if len(texts) < len(documents):
            raise SedetectError(f"{domain}: holds chats (messages); pass ", Argument("chat_template", True))
    if not texts:
        return np.empty(0, np.int64)
    per_document = _tokenise(tokenizer, texts)
    if chat_template and prefix:
        # most templates write the prefix themselves; every window gets one anyway
        per_document = [ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids for ids in per_document]
    return np.fromiter(chain.from_iterable(per_document), np.int64)


def _render(tokenizer: "PreTrainedTokenizerBase", domain: str, document: Document) -> str:
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False))  # one chat, not as tokens
    except (TemplateError, TypeError, ValueError) as error:
        raise SedetectError(f"{domain}: no chat for the template ({shorten(error)}); mend or drop it") from None


def _text_digest(documents: Sequence[Document]) -> str:
    return digest(json.dumps(documents, sort_keys=True, default=str))


def calibration_windows(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Document]] | None,
    text: Text = Text(),
) -> Calibration:
    """make_windows of texts (as profile_model takes them), checked against the model's vocabulary and positions."""
    named = "embedded" if texts is None else "texts" if isinstance(texts, dict) else str(texts)
    if isinstance(texts, dict):
        for domain, documents in texts.items():
            if not isinstance(documents, (list, tuple)):
                raise SedetectError(f"texts[{domain!r}]: is a {type(documents).__name__}; give a list of documents")
    elif texts is None or isinstance(texts, (str, os.PathLike)):
        texts = load_texts(texts)
    else:
        raise SedetectError(f"texts: is a {type(texts).__name__}; give a path, or a dictionary of lists of documents")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    calibration = make_windows(
        tokenizer,
        texts,
        tokens=text.tokens,
        seq_len=text.seq_len,
        seed=text.seed,
        chat_template=text.chat_template,
        corpus=named,
        max_positions=positions,
    )
    for windows in calibration.domains.values():
        check_vocabulary(tokenizer, windows, model.get_input_embeddings().get_parameter("weight").shape[0])
    return calibration
