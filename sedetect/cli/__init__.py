"""The command line: one module per group of commands, each adding its commands to app.

Options, messages and tables. All computation belongs in the packages below, which print nothing.
"""

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import cleandoc
from typing import Any, NoReturn

import typer

from sedetect.cli.shared import app, flag, is_first_rank, stderr
from sedetect.errors import SedetectError

# Command modules, in the order of the help. Only the modules that the given command needs are imported.
COMMANDS = {
    "profile": ("profile",),
    "locate": ("locate",),
    "plan": ("plan",),
    "watch": ("watch",),
    "timeline": ("timeline",),
    "analyze": ("analyze_residual", "analyze_experts"),
    "super-weights": ("super_weights",),
    "prove": ("prove",),
    "ablate": ("ablate",),
    "stability": ("stability",),
    "export": ("export",),
    "prune": ("prune",),
    "budget": ("budget",),
    "verify": ("verify",),
    "rank": ("profile",),
    "merge": ("profile",),
    "compare": ("compare",),
    "report": ("report",),
}
UsageError: Any = typer.BadParameter.__base__  # typer vendors its own click


def load(command: str | None = None) -> typer.Typer:
    """The application with the named command, or with all commands where the name is unknown."""
    chosen = [command] if command in COMMANDS else COMMANDS
    for module in dict.fromkeys(module for name in chosen for module in COMMANDS[name]):
        import_module(f"sedetect.cli.{module}")
    places = {name: place for place, name in enumerate(COMMANDS)}
    app.registered_commands.sort(key=lambda one: places[one.name or ""])  # a module may hold several
    groups = (group.typer_instance for group in app.registered_groups)
    commands = [*app.registered_commands, *(one for group in groups if group for one in group.registered_commands)]
    for one in (app.registered_callback, *commands):
        if one is not None and one.callback is not None:
            one.help = _unwrapped(one.callback.__doc__ or "")
    return app


def _unwrapped(text: str) -> str:
    """A docstring with a line per paragraph, for the terminal to wrap."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in cleandoc(text).split("\n\n"))


def main() -> None:
    """Entry point: wrong arguments and SedetectError become one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # tokens and paths may hold characters that the terminal cannot show
    # Read when the libraries are imported: their bars and messages do not come between ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        command = next(iter(sys.argv[1:]), None)
        with warnings.catch_warnings():
            warnings.showwarning = partial(_note, warnings.showwarning)
            sys.exit(load(command)(prog_name="sedetect", standalone_mode=False) or 0)
    except UsageError as error:
        text = _said(error).rstrip(".")
        if text:  # without arguments the help was shown
            _refuse(text if error.ctx is None else f"{text}; see {error.ctx.command_path} --help")
        sys.exit(2)
    except SedetectError as error:
        _refuse(error.told(flag))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _note(show: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Print a warning of sedetect as a note; warnings from elsewhere keep their origin."""
    if category is UserWarning:
        stderr.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
    else:
        show(message, category, *where)


def _said(error: Any) -> str:
    """The message of a usage error with the given value, which pydantic (it validates the options) leaves out."""
    text: str = error.format_message().replace(": Value error, ", ": ")
    if hasattr(error.__cause__, "errors") and ": Input should " in text:
        value = error.__cause__.errors()[0]["input"]
        text = text.replace(": Input should ", f": {value} should ").partition(", unable to parse")[0]
    return text


def _refuse(line: str) -> NoReturn:
    if is_first_rank():
        stderr.print(f"sedetect: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)
