"""Chats with images or sound: choosing them for calibration and reading them by the model's own processor.

A chat is a sequence of its own, as long as the processor makes it; chats are not cut into windows. Its number is its
place in the domain, as a window's is.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sedetect.calibration.records import MEDIA, Document, filled, media, messages
from sedetect.calibration.windows import Text
from sedetect.documents import short_repr
from sedetect.errors import SedetectError, shorten
from sedetect.stats.model import digest
from sedetect.stats.note import Note

if TYPE_CHECKING:
    from transformers import ProcessorMixin

_MOST = 4096  # chats of a domain that are looked at
_NAMING = 64  # of them, the first ones, which name the source


@dataclass(eq=False)
class Chats:
    """The N chats of one domain to run.

    documents  their messages
    ids        token ids (L,) int64 of each
    numbers    (N,) int64, ascending; their places in the domain: their sequence ids
    source     digest of the domain's first chats, images and sounds included, and of the tokens that they give
    info       domain, corpus, chat_template, for people
    processor  of the model
    """

    documents: list[list[dict[str, Any]]]
    ids: list[torch.Tensor]
    numbers: torch.Tensor
    source: str
    info: dict[str, Any]
    processor: "ProcessorMixin"

    __repr__ = short_repr

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def batches(self, batch_size: int) -> "list[Chats]":
        """Batches in order, of neighbors with equal length: with padding, some models choose other experts."""
        batches: list[list[int]] = []
        lengths: list[int] = []
        for number, ids in zip(self.numbers.tolist(), self.ids):
            if batches and len(batches[-1]) < batch_size and lengths[-1] == len(ids):
                batches[-1].append(number)
            else:
                batches.append([number])
                lengths.append(len(ids))
        return [self.among(torch.tensor(batch)) for batch in batches]

    def among(self, numbers: torch.Tensor) -> "Chats":
        """The chats with these numbers."""
        places = torch.isin(self.numbers, numbers).nonzero().flatten().tolist()
        documents, ids = [self.documents[place] for place in places], [self.ids[place] for place in places]
        return replace(self, documents=documents, ids=ids, numbers=numbers)

    def inputs(self) -> dict[str, torch.Tensor]:
        """The processor's output for all of them: the arguments of the model's forward."""
        where = f"{self.info['domain']}: chats {self.numbers.tolist()}"
        return _processed(self.processor, self.documents, where)


def has_media(documents: Iterable[Document]) -> bool:
    """Whether a domain has images or sound, by its first chats."""
    return any(media(document) for document in islice(documents, _MOST))


def make_chats(
    processor: "ProcessorMixin",
    domains: Mapping[str, Iterable[Document]],
    text: Text,
    placeholders: dict[str, int],
    *,
    corpus: str = "texts",
    vocab_size: int,
    max_positions: int | None = None,
) -> tuple[dict[str, Chats], list[Note]]:
    """The chats of each domain within text.tokens, shared evenly over the domains; at least one of each.

    Args:
        placeholders: of the model's config, the token of each modality; see sedetect.models.modalities.
        text: a seed chooses among the first chats of a domain.
    Raises:
        SedetectError: for a chat that the processor cannot read, or whose template leaves an image or sound out.
    """
    found, notes = {}, []
    for domain, documents in domains.items():
        chats = [_chat(document, f"{domain}: chat {at}") for at, document in enumerate(islice(documents, _MOST))]
        order = np.arange(len(chats)) if text.seed is None else np.random.default_rng(text.seed).permutation(len(chats))
        chosen: dict[int, torch.Tensor] = {}
        long = 0
        for at in order.tolist():
            ids = _read(processor, chats[at], f"{domain}: chat {at}", placeholders, vocab_size)
            if max_positions is not None and len(ids) > max_positions:
                long += 1
                continue
            if chosen and sum(map(len, chosen.values())) + len(ids) > text.tokens // len(domains):
                break
            chosen[at] = ids
        if long:
            left_out = f"{domain}: {long} chats left out, longer than the model's {max_positions} positions"
            notes.append(Note("left_out", left_out, count=long))
        if not chosen:
            continue
        first = chosen.get(0)
        if first is None:
            first = _read(processor, chats[0], f"{domain}: chat 0", placeholders, vocab_size)
        # as of windows: the tokens stand for the processor, whatever else it may be called
        named = [[_stored(message) for message in chat] for chat in chats[:_NAMING]]
        source = digest(json.dumps([named, first.tolist()], default=_hash, sort_keys=True))
        places = sorted(chosen)
        found[domain] = Chats(
            [chats[at] for at in places],
            [chosen[at] for at in places],
            torch.tensor(places),
            source,
            {"domain": domain, "corpus": corpus, "chat_template": True},
            processor,
        )
    return found, notes


def _chat(document: Document, where: str) -> list[dict[str, Any]]:
    chat = messages(document)
    return filled(chat, {}, where) if media(chat) else chat


def _read(
    processor: "ProcessorMixin",
    chat: list[dict[str, Any]],
    where: str,
    placeholders: dict[str, int],
    vocab_size: int,
) -> torch.Tensor:
    """The token ids (L,) of one chat; each of its images and sounds must have a placeholder."""
    ids = _processed(processor, [chat], where)["input_ids"][0].to(torch.int64)
    for kind in {part["type"] for part in media(chat)}:
        if kind not in placeholders or not bool((ids == placeholders[kind]).any()):
            raise SedetectError(
                f"{where}: holds {kind} and {type(processor).__name__} makes no {kind} token of it; give chats without"
            )
    if int(ids.max()) >= vocab_size:
        raise SedetectError(
            f"{where}: has token {int(ids.max())}, the model's embedding has {vocab_size} rows; use the processor that "
            "was saved with the model"
        )
    return ids


def _processed(processor: "ProcessorMixin", chats: list[list[dict[str, Any]]], where: str) -> dict[str, torch.Tensor]:
    rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", None)
    opened = [[_opened(message, rate, where) for message in chat] for chat in chats]
    try:
        made: Any = processor.apply_chat_template(opened, tokenize=True, return_dict=True, return_tensors="pt")
        return dict(made)
    except Exception as error:  # from the template, a backend that is not installed, or an empty image
        raise SedetectError(
            f"{where}: {type(processor).__name__} cannot read it ({shorten(error)}); fix or remove it"
        ) from error


def _opened(message: dict[str, Any], rate: int | None, where: str) -> dict[str, Any]:
    """A copy of a message with its images and sounds opened. rate: sampling rate of the processor, in Hz."""
    content = message["content"]
    if not isinstance(content, list):
        return dict(message)
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            part = {"type": kind, kind: _image(part[kind], where)}
        elif kind == "audio":
            part = {"type": kind, kind: _sound(part[kind], rate, where)}
        parts.append(part)
    return message | {"content": parts}


def _image(held: Any, where: str) -> Any:
    """A PIL image in RGB from a path, bytes, or an opened image."""
    if not isinstance(held, str | bytes):
        return held.convert("RGB") if hasattr(held, "convert") else held
    try:
        from PIL import Image
    except ImportError:
        raise SedetectError(f"{where}: reading images needs Pillow; pip install 'sedetect[images]'") from None
    try:
        return Image.open(io.BytesIO(held) if isinstance(held, bytes) else held).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        name = held if isinstance(held, str) else f"{len(held)} bytes"
        raise SedetectError(f"{where}: {name}: not a readable image ({shorten(error)}); fix or remove it") from None


def _sound(held: Any, rate: int | None, where: str) -> np.ndarray:
    """Samples (n,) at the processor's rate from a path, bytes, or opened sound, which must have that rate."""
    if rate is None:
        raise SedetectError(f"{where}: holds audio and the model's processor takes none; give chats without")
    if isinstance(held, np.ndarray | list):
        return np.asarray(held, np.float32)
    if not isinstance(held, str | bytes):  # as datasets opens it
        try:
            samples, given = np.asarray(held["array"], np.float32), held["sampling_rate"]
        except Exception as error:  # of whichever library opens it
            raise SedetectError(f"{where}: not a readable sound ({shorten(error)}); fix or remove it") from None
        if given != rate:
            raise SedetectError(f"{where}: sampled at {given} Hz, the processor takes {rate}; resample")
        return samples
    from transformers.audio_utils import load_audio

    try:
        if isinstance(held, str):
            return load_audio(held, sampling_rate=rate)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "sound")
            with open(path, "wb") as file:
                file.write(held)
            return load_audio(path, sampling_rate=rate)
    except Exception as error:  # of whichever library transformers reads sound by
        name = held if isinstance(held, str) else f"{len(held)} bytes"
        raise SedetectError(f"{where}: {name}: not a readable sound ({shorten(error)}); fix or remove it") from None


def _stored(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the bytes of its files, for a digest."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    parts = [{**part} if isinstance(part, dict) else part for part in content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in MEDIA and isinstance(part[kind], str):
            with open(part[kind], "rb") as file:
                part[kind] = file.read()
    return message | {"content": parts}


def _hash(held: Any) -> str:
    data = held if isinstance(held, bytes) else np.ascontiguousarray(held).tobytes()
    return hashlib.sha256(data).hexdigest()
