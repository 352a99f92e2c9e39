"""Records of calibration data: which fields hold the text, in the layouts that data sets have."""

import json
import textwrap
from collections.abc import Iterable
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
_CHATS = ("messages", "conversations", "conversation")
_PAIRS = (  # prompt, what the prompt is about, answer
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
)
FIELDS = {"text", "content", *_CHATS, "system", *(name for pair in _PAIRS for name in pair if name is not None)}
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


def read_record(record: Any, where: str) -> Document:
    """The document of one record; SedetectError naming where it stands if it has none, with the fields it has."""
    if not isinstance(record, dict):
        raise SedetectError(f"{where} is not an object; every record needs {LAYOUTS}")
    document = _find(record)
    if document is None:
        raise SedetectError(f"{where} has no text, only {named(record)}; give {LAYOUTS}")
    try:
        json.dumps(document, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise SedetectError(f"{where} holds a lone surrogate, which UTF-8 cannot express; fix or remove it") from None
    return document


def named(fields: Iterable[Any]) -> str:
    """The names of fields, as one short line."""
    return textwrap.shorten(", ".join(map(repr, fields)) or "an empty record", 200, placeholder=" ...")


def characters(document: Document) -> int:
    """How long it is; of a chat, its contents."""
    if isinstance(document, str):
        return len(document)
    return sum(len(str(message.get("content"))) for message in messages(document))


def messages(document: Document) -> list[dict[str, Any]]:
    """A document as a chat; a text is one turn of the user."""
    if isinstance(document, str):
        return [{"role": "user", "content": document}]
    return document.messages if isinstance(document, Pair) else document


def _find(record: dict[str, Any]) -> Document | None:
    if isinstance(record.get("text"), str):
        return str(record["text"])
    for name in _CHATS:
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
    """Messages of role and content; None for what holds no chat."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    if all({"role", "content"} <= turn.keys() for turn in turns):
        return turns
    if all({"from", "value"} <= turn.keys() for turn in turns):
        return [{"role": _ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]
    return None
