"""The command line: one module per group of commands, each adding its commands to app.

Options, messages and tables. What is computed belongs in the packages below, which print nothing.
"""

import sys

import huggingface_hub.utils.logging as hub_logging
from transformers.utils import logging as transformers_logging

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


def main() -> None:
    """Entry point: SedetectError becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # tokens and paths may hold what the terminal cannot show
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        app()
    except SedetectError as error:
        if is_first_rank():
            stderr.print(f"sedetect: {error.told(flag)}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
