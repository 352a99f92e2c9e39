"""Exceptions for errors that the user can fix, and quoting other libraries' errors in them."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """The name of a Python argument in a message, or the argument with a value; the command line has a flag for it."""

    name: str
    value: str | bool | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


class SedetectError(Exception):
    """Bad input: one line that names the file or module, the value, and the way out.

    The line joins its parts. str names an Argument as Python does; the command line names it by its flag, prints the
    line without a traceback and exits with 2.
    """

    def __init__(self, *parts: str | Argument):
        super().__init__(*parts)

    def __str__(self) -> str:
        return self.told(str)

    def told(self, naming: Callable[[Argument], str]) -> str:
        """The line with its arguments named by this function."""
        return "".join(part if isinstance(part, str) else naming(part) for part in self.args)


class WeightsError(SedetectError):
    """The weights of a checkpoint do not fit its model: some are missing, misshapen, or cannot be joined."""


def check_type(name: str, value: object, kind: type) -> None:
    """Raise SedetectError for an argument of another type."""
    if not isinstance(value, kind):
        raise SedetectError(Argument(name), f": is a {type(value).__name__}; give a {kind.__name__}")


def shorten(error: Exception) -> str:
    """An exception as one short line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
