"""How many rows the experts saw, and notes of several banks folded into one."""

from collections.abc import Sequence

from sedetect.stats.model import ModelStats
from sedetect.stats.note import Note
from sedetect.stats.place import BankId

FEW_ROWS = 32  # an expert that saw fewer has no maximum to speak of


def folded(notes: Sequence[Note]) -> list[str]:
    """The lines of the notes, where several banks say the same as one."""
    said_of: dict[tuple[str, str, bool], list[BankId | None]] = {}
    for note in notes:
        said_of.setdefault((note.code, note.text, note.bank is None), []).append(note.bank)
    return [
        text if alone else f"{banks[0]}{f' and {len(banks) - 1} more' if banks[1:] else ''}: {text}"
        for (_, text, alone), banks in said_of.items()
    ]


def coverage(stats: ModelStats) -> str:
    """One line: how many rows the experts saw, and how many saw none or few."""
    rows = [count for bank, state in stats.banks.items() if bank.routed for count in state.rows.tolist()]
    if not rows:
        return "coverage: no routed experts"
    unseen, few = sum(n == 0 for n in rows), sum(0 < n < FEW_ROWS for n in rows)
    text = f"coverage: {len(rows)} routed experts saw {min(rows):,} to {max(rows):,} rows"
    if unseen or few:
        text += f"; {unseen} saw none, {few} others fewer than {FEW_ROWS}"
        return f"{text}: calibrate on more tokens before trusting them"
    return f"{text}, none fewer than {FEW_ROWS}"
