"""Numbers and foreign text as people read them."""

import math

from sedetect.stats.proof import Effect


def number(value: float | None, digits: int = 4) -> str:
    """value with so many significant digits, without exponents up to a million; a dash for None."""
    if value is None:
        return "–"
    if math.isfinite(value) and 10**digits <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("inf", "∞")


def whole(value: int | None) -> str:
    """An integer with separators; a dash for None."""
    return "–" if value is None else f"{value:,}"


def percent(change: float, digits: int = 1) -> str:
    """A relative change: 0.105 is "+10.5%"."""
    return f"{round(change * 100, digits) + 0.0:+.{digits}f}%"  # + 0.0: no minus before a zero


def share(value: float) -> str:
    """A part of a whole: 0.105 is "10.5%"."""
    return f"{value * 100:.1f}%"


def interval(effect: Effect) -> str:
    """The interval of a relative change; a dash where there are too few documents for one."""
    known = math.isfinite(effect.low) and math.isfinite(effect.high)
    return f"{percent(effect.low, 2)} to {percent(effect.high, 2)}" if known else "–"


def visible(text: str) -> str:
    """text with everything seen: line ends as ⏎, what does not print (controls, marks of direction) as its escape."""
    shown = ("⏎" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def token_text(token_id: int, text: str | None) -> str:
    """A token's text quoted, what does not print escaped; "#5" where the text is unknown or a part of a character."""
    return f"#{token_id}" if text is None or "\ufffd" in text else repr(text)
