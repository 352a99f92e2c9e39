"""What the commands share: the application, consoles, common options, progress, and stopping politely."""

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from sedetect.checkpoints.files import source_name
from sedetect.errors import Argument, SedetectError
from sedetect.files import STATS, file_in
from sedetect.results import Results
from sedetect.version import __version__

if TYPE_CHECKING:
    from rich.progress import Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Panels of the help, in this order.
MEASURE, PROVE, COMPRESS, FILES = "Measure", "Prove", "Compress", "Files"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader closed the pipe (`| head`): exit as a shell reports it, not with 1, which means that sets
        differ.
        """
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise SystemExit(141) from None


console = _Console(emoji=False)  # user text must not turn into emoji
stderr = _Console(stderr=True, emoji=False)


def folder_of(name: str) -> str:
    """A folder, or that of a hub model in the cache. Raises SedetectError where there is none."""
    name = source_name(name)
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, local_files_only=True)
    except Exception:  # of many kinds, all of which mean that it is missing
        raise SedetectError(
            f"{name}: no such folder, and no hub model in the cache; download it first (hf download {name})"
        ) from None


Model = Annotated[str, typer.Argument(help="checkpoint folder or hub name", metavar="MODEL", callback=source_name)]
Folder = Annotated[
    str,
    typer.Argument(help="checkpoint folder, or hub name of one in the cache", metavar="MODEL", callback=folder_of),
]
Anywhere = Annotated[
    str, typer.Argument(help="checkpoint folder, hub name, or http(s) address of a folder", metavar="MODEL")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="folder for the results")]
Data = Annotated[str | None, typer.Option(help=".txt, .json, .jsonl, .parquet, a folder of them, or a hub dataset")]
Tokens = Annotated[int, typer.Option(help="calibration tokens")]
SeqLen = Annotated[int, typer.Option(help="tokens per window")]
BatchSize = Annotated[int, typer.Option(help="windows per forward")]
Seed = Annotated[int | None, typer.Option(help="choose windows at random (default: text order)")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda if there is one)")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16, float32")]
Backend = Annotated[
    str | None, typer.Option(help="cpu, cuda, triton or torch (default: the fastest that supports the model)")
]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub model")]
Attn = Annotated[str | None, typer.Option(help="attention implementation of transformers")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]


# Library arguments whose flags have other names.
_FLAGS = {"protected": "--protect", "resume": "-o DIR", "runtime": "--for", "spec": "--experts", "tool": "--to"}


def flag(argument: Argument) -> str:
    """The flag of a library argument."""
    name, value = argument.name.replace("_", "-"), argument.value
    if argument.name in _FLAGS:
        return _FLAGS[argument.name]
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}" if value is None else f"--{name} {value}"


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    """Find the super experts of Mixture-of-Experts models.

    Exit codes: 0 done, 1 compare found different candidates or verify a failure, 2 wrong arguments or input, 130
    stopped by Ctrl-C.
    """
    if version:
        console.print(__version__, highlight=False)
        raise typer.Exit


def is_first_rank() -> bool:
    """Whether this process reports: the only process, or the first that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0"


def check_writable(folder: Path) -> None:
    """Check the folder before the work starts, without creating it: bad input should leave no folder behind."""
    nearest = Results(folder).domains.path
    try:
        while not nearest.exists():
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        why = f"{nearest} cannot be written ({error.strerror})"
        raise SedetectError(f"-o {folder}: {why}; choose another folder") from None


def check_file(option: str, path: Path, inputs: Sequence[Path] = ()) -> None:
    """Check before the work starts that a file can be written and does not replace an input."""
    if path.is_dir():
        raise SedetectError(f"{option} {path}: is a folder; give the name of a file in it")
    if path.exists() and not path.is_file():
        raise SedetectError(f"{option} {path}: exists and is not a file; give another name")
    for one in inputs:
        if path.exists() and file_in(one, STATS).exists() and path.samefile(file_in(one, STATS)):
            raise SedetectError(f"{option} {path}: is one of the inputs; give the name of another file")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise SedetectError(f"{option} {path}: {nearest} cannot be written; choose another folder")


@contextmanager
def uncollected() -> Iterator[None]:
    """Temporarily disable garbage collection: imports create a million permanent objects, and scanning them takes a
    fifth of the import time. Objects that exist at the end are never scanned again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Temporarily hide packages that are not imported yet.

    transformers imports scikit-learn (5.17, for assisted generation) and scipy (for the losses of object detectors)
    where they are installed; no command uses them, and each takes a second.
    """
    missing = {package: None for package in packages if package not in sys.modules}
    sys.modules.update(missing)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in missing:
            del sys.modules[package]


@contextmanager
def interruptible(until: str = "stopping after this batch") -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks to stop at the next batch, so that every layer sees the same tokens; the second kills."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        stderr.print(f"{until}; press Ctrl-C again to abort")
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


def print_line(text: str, style: str | None = None) -> None:
    """Plain text on stdout, left to the terminal to wrap."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def saved_after(path: Path | None, save: Callable[[Path], object]) -> Iterator[None]:
    """Save to path, if given, after the output inside was printed, so that a full disk costs only the file. It is
    saved even if the reader of stdout has left.
    """
    try:
        yield
    finally:
        if path is not None:
            save(path)
    if path is not None:
        print_line(f"written to {path}")


def print_whole(table: Table) -> None:
    """Print a table of numbers; one too wide for the terminal wraps, and numbers are never cut."""
    _Console(width=max(console.width, 200), emoji=False).print(table)


def plain_table(*columns: str, left: str = "") -> Table:
    """An empty table: numbers right-aligned; the first column and the one named by left, left-aligned."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if name == left or not number else "right", no_wrap=True)
    return table


def progress_bar(unit: str = "tokens") -> "Progress":
    """A progress bar on stderr if that is a terminal; elsewhere it would only leave an empty line."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    quiet = not stderr.is_terminal or not is_first_rank()
    return Progress(TextColumn("{task.description}"), *done, console=stderr, transient=True, disable=quiet)
