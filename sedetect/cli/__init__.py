"""The command line: one module per group of commands, each adding its commands to app.

Options, messages and tables. What is computed belongs in the packages below, which print nothing.
"""

import os
import sys
from typing import NoReturn

import typer

from sedetect.cli import (
    ablate,
    analyze_experts,
    analyze_residual,
    budget,
    compare,
    export,
    plan,
    profile,
    prune,
    report,
    stability,
    super_weights,
)
from sedetect.cli.shared import app, flag, is_first_rank, stderr
from sedetect.errors import SedetectError

__all__ = [
    "ablate",
    "analyze_experts",
    "analyze_residual",
    "app",
    "budget",
    "compare",
    "export",
    "main",
    "plan",
    "profile",
    "prune",
    "report",
    "stability",
    "super_weights",
]


UsageError = typer.BadParameter.__base__  # typer brings its own click


def main() -> None:
    """Entry point: wrong arguments and SedetectError become one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # tokens and paths may hold what the terminal cannot show
    # Read when the libraries are imported: their bars and messages do not come between ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        text = error.format_message().rstrip(".")
        if text:  # without arguments the help was shown
            _refuse(text if error.ctx is None else f"{text}; see {error.ctx.command_path} --help")
        sys.exit(2)
    except SedetectError as error:
        _refuse(error.told(flag))


def _refuse(line: str) -> NoReturn:
    if is_first_rank():
        stderr.print(f"sedetect: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)
