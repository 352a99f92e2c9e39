"""Notes: facts about a run that readers of its statistics must know."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sedetect.stats.place import BankId

_OF_A_BANK = re.compile(r"(\w+\.\d+\.\w+): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Note:
    """One fact about a run.

    code   the kind of note: "unmapped", "fallback", "unused_weights", ...; "text" where only the text is known
    text   one line for people
    bank   the bank that text is about; str puts it before text
    count  the number in text, if text counts something
    """

    code: str
    text: str
    bank: BankId | None = None
    count: int | None = None

    def __str__(self) -> str:
        return self.text if self.bank is None else f"{self.bank}: {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """Every field, for JSON; the bank by its name."""
        return vars(self) | {"bank": None if self.bank is None else str(self.bank)}

    @classmethod
    def read(cls, stored: dict[str, Any] | str) -> "Note":
        """The inverse of to_dict; from a header with lines of text only, a note of code "text"."""
        if isinstance(stored, str):
            found = _OF_A_BANK.fullmatch(stored)
            return cls("text", stored) if found is None else cls("text", found[2], BankId.parse(found[1]))
        bank = stored["bank"]
        return cls(**stored | {"bank": None if bank is None else BankId.parse(bank)})


def sorted_notes(notes: Iterable[Note]) -> list[Note]:
    """The notes sorted by line, without duplicates."""
    by_line = {str(note): note for note in notes}
    return [by_line[line] for line in sorted(by_line)]
