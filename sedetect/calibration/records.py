"""Records of calibration data: which fields hold the text, in the layouts that data sets have."""

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sedetect.errors import SedetectError


class Pair(NamedTuple):
    """A prompt and its answer: a text without a chat template, a turn of the user and one of the assistant with it."""

    prompt: str
    between: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.between + self.answer

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.answer}]


Document = str | list[dict[str, Any]] | Pair  # a text, the messages of a chat, or a prompt with its answer
LAYOUTS = (
    "'text', 'messages' of role and content, 'conversations' of from and value, 'instruction' and 'output', or "
    "'prompt' and 'completion'"
)
CHATS = ("messages", "conversations", "conversation")
_PAIRS = (  # prompt, what the prompt is about, answer
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
)
FIELDS = {"text", "content", *CHATS, "system", *(name for pair in _PAIRS for name in pair if name is not None)}
MEDIA = ("image", "audio")  # types of parts of a message that are read beside text
_UNREAD = ("video", "image_url", "video_url", "audio_url", "input_audio")
MEDIA_FIELDS = {"image", "images", "audio", "audios"}  # fields of a record that fill the places in its messages
_OPENED = 2**16  # characters that an opened image or sound counts as: it is held in memory
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


def read_record(record: Any, where: str, folder: Path = Path()) -> Document:
    """The document of one record. Raises SedetectError, naming the place and the fields, for a record without one.

    folder: base of the relative paths of its images and sounds.
    """
    if not isinstance(record, dict):
        raise SedetectError(f"{where} is not an object; every record needs {LAYOUTS}")
    document = _find(record)
    if document is None:
        raise SedetectError(f"{where} has no text, only {named(record)}; give {LAYOUTS}")
    try:
        json.dumps(document, ensure_ascii=False, default=lambda held: type(held).__name__).encode("utf-8")
    except UnicodeEncodeError:
        raise SedetectError(f"{where} holds a lone surrogate, which UTF-8 cannot express; fix or remove it") from None
    return filled(document, record, where, folder) if isinstance(document, list) and media(document) else document


def named(fields: Iterable[Any]) -> str:
    """The names of fields, as one short line."""
    return textwrap.shorten(", ".join(map(repr, fields)) or "an empty record", 200, placeholder=" ...")


def characters(document: Document) -> int:
    """Its length in characters; for a chat, that of its contents."""
    if isinstance(document, str):
        return len(document)
    if media(document):
        contents = [message["content"] for message in messages(document)]
        parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
        return sum(_length(held) for part in parts for held in (part.values() if isinstance(part, dict) else [part]))
    return sum(len(str(message.get("content"))) for message in messages(document))


def media(document: Document) -> list[dict[str, Any]]:
    """The parts of a chat's messages that are not text (images, sound, video), in order."""
    if not isinstance(document, list):
        return []
    contents = [message["content"] for message in document if isinstance(message.get("content"), list)]
    parts = [part for content in contents for part in content if isinstance(part, dict)]
    return [part for part in parts if part.get("type") in (*MEDIA, *_UNREAD)]


def messages(document: Document) -> list[dict[str, Any]]:
    """A document as a chat; a text is one turn of the user."""
    if isinstance(document, str):
        return [{"role": "user", "content": document}]
    return document.messages if isinstance(document, Pair) else document


def _find(record: dict[str, Any]) -> Document | None:
    if isinstance(record.get("text"), str):
        return str(record["text"])
    for name in CHATS:
        if chat := _chat(record.get(name)):
            system = record.get("system")
            leads = isinstance(system, str) and system.strip() and chat[0]["role"] != "system"
            return [{"role": "system", "content": system}, *chat] if leads else chat
    for name, about, answer in _PAIRS:
        asked, more, answered = record.get(name), record.get(about or ""), record.get(answer)
        if isinstance(asked, str) and isinstance(answered, str):
            if about is None:
                return Pair(asked, "" if name == "prompt" else "\n", answered)
            return Pair(f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked, "\n\n", answered)
        if (first := _chat(asked)) and (last := _chat(answered)):
            return first + last
    return str(record["content"]) if isinstance(record.get("content"), str) else None


def _chat(turns: Any) -> list[dict[str, Any]] | None:
    """Messages with role and content; None for a record without a chat."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    if all({"role", "content"} <= turn.keys() for turn in turns):
        return turns
    if all({"from", "value"} <= turn.keys() for turn in turns):
        return [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
    return None


def filled(
    chat: list[dict[str, Any]], record: dict[str, Any], where: str, folder: Path = Path()
) -> list[dict[str, Any]]:
    """A chat whose images and sounds are {"type": kind, kind: path, bytes or what is opened}.

    A part that has only a type takes the next item of the record's own field ("images").
    """
    unread = [str(part["type"]) for part in media(chat) if part["type"] not in MEDIA]
    if unread:
        raise SedetectError(f"{where} has a part of type {unread[0]!r}; give text, image and audio")
    given = {kind: _listed(record.get(f"{kind}s", record.get(kind))) for kind in MEDIA}
    waiting = {kind: list(held) for kind, held in given.items()}

    def fill(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in MEDIA:
            return part if kind is None else {name: value for name, value in part.items() if value is not None}
        held = next((part[name] for name in (kind, "path", "url", "bytes") if part.get(name) is not None), None)
        if held is None and waiting[kind]:
            held = waiting[kind].pop(0)
        if isinstance(held, dict) and "array" not in held:  # as data sets store them
            held = held.get("bytes") or held.get("path")
        if held is None:
            raise SedetectError(f"{where} has an empty place for {kind}; give its path as {kind!r}")
        return {"type": kind, kind: _path(held, where, folder) if isinstance(held, str) else held}

    filled = []
    for message in chat:
        content = message["content"]
        filled.append(message | {"content": [fill(part) for part in content] if isinstance(content, list) else content})
    for kind, left in waiting.items():
        if 0 < len(left) < len(given[kind]):
            places = len(given[kind]) - len(left)
            raise SedetectError(f"{where} has {len(given[kind])} of {kind} and places for {places}; give as many")
    return filled


def _length(held: Any) -> int:
    return len(held) if isinstance(held, str | bytes) else 0 if held is None else _OPENED


def _listed(held: Any) -> list[Any]:
    return [] if held is None else list(held) if isinstance(held, (list, tuple)) else [held]


def _path(given: str, where: str, folder: Path) -> str:
    """A path as it stands in a file that is in folder."""
    if "://" in given[:20] or given.startswith("data:"):
        raise SedetectError(f"{where} has {given[:60]!r} as a file; download it and give its path")
    found = next((path for path in (folder / given, Path(given)) if path.is_file()), None)
    if found is None:
        raise SedetectError(f"{where}: {folder / given}: no such file; give paths from the file that names them")
    return str(found)
