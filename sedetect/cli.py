"""The command line. Exit codes: 0 done, 2 wrong arguments or input, 130 stopped by Ctrl-C."""

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging

from sedetect.errors import SedetectError
from sedetect.files import write_json
from sedetect.pipeline import ModelProfile, profile_model
from sedetect.ranking import rank
from sedetect.report import print_domains, print_ranking, print_run, ranking_document
from sedetect.stats import ModelStats

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
stderr = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="checkpoint folder or hub name", metavar="MODEL")]
Percentile = Annotated[float, typer.Option(help="percentile of the population an expert must exceed")]
Fraction = Annotated[float, typer.Option(help="fraction of the largest value an expert must exceed")]
Layers = Annotated[float, typer.Option(help="the first layers, as a fraction, that may hold super experts")]
Compat = Annotated[str | None, typer.Option(help="'published-tool' for its floor division")]


@app.command("profile")
def profile_command(
    model: Model,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="folder for the statistics")] = None,
    data: Annotated[str | None, typer.Option(help=".txt, .jsonl, .parquet, a folder of them, or a hub data set")] = None,
    tokens: Annotated[int, typer.Option(help="calibration tokens")] = 32768,
    seq_len: Annotated[int, typer.Option(help="tokens per window")] = 512,
    batch_size: Annotated[int, typer.Option(help="windows per forward")] = 8,
    seed: Annotated[int | None, typer.Option(help="choose windows at random (default: text order)")] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="put the texts through it")] = False,
    channels: Annotated[bool, typer.Option("--channels", help="keep per-channel statistics")] = False,
    coactivation: Annotated[bool, typer.Option("--coactivation", help="count experts chosen together")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda if there is one)")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), bfloat16, float16, float32")] = "auto",
    backend: Annotated[str | None, typer.Option(help="cpu or torch (default: the fastest that serves)")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub model")] = None,
    attn: Annotated[str | None, typer.Option(help="attention implementation of transformers")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the model's own code")] = False,
) -> None:
    """Run calibration text through MODEL and say which experts are super experts."""
    if output is not None:
        _check_writable(output)
    with _interruptible() as stop, _progress() as bar:
        task = bar.add_task("loading", total=None)

        def show(domain: str, done: int, total: int) -> None:
            bar.update(task, description=domain, completed=done, total=total)

        result = profile_model(
            model,
            data,
            tokens=tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            chat_template=chat_template,
            channels=channels,
            coactivation=coactivation,
            device=device,
            dtype=dtype,
            backend=backend,
            revision=revision,
            attn=attn,
            trust_remote_code=trust_remote_code,
            progress=show,
            stop=stop,
        )
    if result.stats.banks:
        _show(result, output)
    if result.interrupted:
        saved = "nothing saved (no -o)" if output is None else f"saved to {output}" if result.stats.banks else "nothing to save"
        text = f"interrupted after {result.stats.header.tokens:,} of {tokens:,} tokens; {saved}"
        stderr.print(text, markup=False, soft_wrap=True)
        raise typer.Exit(130)


@app.command("rank")
def rank_command(
    stats: Annotated[Path, typer.Argument(help="a statistics file", metavar="STATS")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write the ranking as JSON")] = None,
    percentile: Percentile = 99.5,
    fraction: Fraction = 0.1,
    layers: Layers = 0.75,
    compat: Compat = None,
) -> None:
    """Rank the experts of a statistics file under other thresholds."""
    state = ModelStats.load(stats)
    ranking = rank(state, percentile=percentile, fraction=fraction, layers=layers, compat=compat)
    print_run(console, state)
    print_ranking(console, ranking)
    if output is not None:
        write_json(output, ranking_document(ranking, None))


@app.command("merge")
def merge_command(
    stats: Annotated[list[Path], typer.Argument(help="statistics files of one model", metavar="STATS...")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the merged statistics file")],
) -> None:
    """Merge statistics of one model on different texts."""
    merged = ModelStats.empty()
    for file in stats:
        state = ModelStats.load(file)
        try:
            merged = merged.merge(state)
        except SedetectError as error:
            raise SedetectError(f"{file}: {error}") from None
    merged.save(output)
    print_run(console, merged)
    print_ranking(console, rank(merged))


def main() -> None:
    """Entry point: SedetectError becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # tokens and paths may hold what the terminal cannot show
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        app()
    except SedetectError as error:
        stderr.print(f"sedetect: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _show(result: ModelProfile, output: Path | None) -> None:
    """Save first, then print."""
    ranking = rank(result.stats)
    if output is not None:
        result.stats.save(output / "stats.safetensors")
        for stale in set(output.glob("domains/*.safetensors")) - {_domain_file(output, d) for d in result.domains}:
            stale.unlink()
        for domain, stats in result.domains.items():
            stats.save(_domain_file(output, domain))
        write_json(output / "super_experts.json", ranking_document(ranking, result.tokenizer))
    print_ranking(console, ranking, result.tokenizer)
    print_domains(console, {domain: rank(stats) for domain, stats in result.domains.items()})
    print_run(console, result.stats, result.seconds)
    if output is not None:
        console.print(f"written to {output}", markup=False, soft_wrap=True)


def _domain_file(output: Path, domain: str) -> Path:
    return output / "domains" / f"{domain}.safetensors"


def _check_writable(folder: Path) -> None:
    """Fail before the work, not after it, and make no folder that bad input would leave behind."""
    nearest = folder / "domains"
    try:
        while not nearest.exists():
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        why = f"{nearest} cannot be written ({error.strerror})"
        raise SedetectError(f"-o {folder}: {why}; choose another folder") from None


@contextmanager
def _interruptible() -> Iterator:
    """The first Ctrl-C asks to stop at the next batch, so that every layer has seen the same tokens; the second kills."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        stderr.print("stopping after this batch; Ctrl-C again to give up")
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    # elsewhere than on a terminal it would show nothing, and leave an empty line
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
