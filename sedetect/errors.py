"""The one exception that is the user's to mend, and how other libraries' errors are quoted in it."""

import textwrap


class SedetectError(Exception):
    """Bad input: one line that names the file or module, the value, and the way out.

    The command line prints it without a traceback and exits with 2.
    """


def shorten(error: Exception) -> str:
    """An exception as one short line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
