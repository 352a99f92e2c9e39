"""How many rows the experts saw, and notes of several banks folded into one."""

import re
from collections.abc import Sequence

from sedetect.stats.model import ModelStats

FEW_ROWS = 32  # an expert that saw fewer has no maximum to speak of
_OF_A_BANK = re.compile(r"(\w+\.\d+\.\w+): (.*)", re.DOTALL)


def folded(notes: Sequence[str]) -> list[str]:
    """The notes, where several banks say the same as one."""
    by_text: dict[str, list[str]] = {}
    for note in notes:
        bank, text = found.groups() if (found := _OF_A_BANK.fullmatch(note)) else ("", note)
        by_text.setdefault(text, []).append(bank)
    heads = [bank + (f" and {len(more)} more" if more else "") for bank, *more in by_text.values()]
    return [f"{head}: {text}" if head else text for head, text in zip(heads, by_text)]


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
