"""The number of rows that experts saw, and merging equal notes of several banks."""

import math
from collections.abc import Sequence

from sedetect.stats.model import ModelStats
from sedetect.stats.note import Note
from sedetect.stats.place import BankId, Place

FEW_ROWS = 32  # the maximum of an expert that saw fewer means little


def folded(notes: Sequence[Note]) -> list[str]:
    """The lines of the notes, with equal notes of several banks merged."""
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
    if not unseen and not few:
        return f"{text}, none fewer than {FEW_ROWS}"
    parts = [f"{unseen} saw none"] if unseen else []
    parts += [f"{few} {'others' if unseen else 'of them'} fewer than {FEW_ROWS}"] if few else []
    if not stats.header.tokens:
        return f"{text}; no text was profiled"
    more = more_tokens(min(rows), stats.header.tokens)
    at = "at least" if unseen else "about"
    return (
        f"{text}; {', '.join(parts)}: calibrate on more tokens before trusting them ({at} {more:,} more of such text)"
    )


def unseen(stats: ModelStats) -> list[Place]:
    """The routed experts that saw no row, so that nothing was measured."""
    return [
        Place(*bank, number)
        for bank, state in sorted(stats.banks.items())
        if bank.routed
        for number, rows in enumerate(state.rows.tolist())
        if not rows
    ]


def unseen_note(places: Sequence[Place], what: str, tokens: int) -> str:
    """One line: which experts ("pruned", say) saw no row in so many tokens, and how many more they need."""
    more = f"at least {more_tokens(0, tokens):,} more tokens" if tokens else "text"
    names = ", ".join(map(str, places[:10])) + (f" and {len(places) - 10} more" if len(places) > 10 else "")
    return (
        f"{len(places)} {what} expert{'s' * (len(places) > 1)} saw no row, so that nothing was measured ({names}); "
        f"profile {more}"
    )


def more_tokens(rows: int, tokens: int, wanted: int = FEW_ROWS) -> int:
    """Further tokens until an expert that saw rows < wanted rows in so many tokens is expected to have wanted.

    The rate is rows / tokens. An expert that saw none gets 3 / tokens, the rate above which it would have been seen
    with 95% probability (rule of three): its true need is probably larger.
    """
    return math.ceil((wanted - rows) * tokens / (rows or 3))
