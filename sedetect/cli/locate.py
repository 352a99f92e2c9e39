"""sedetect locate: find candidates from the first token, reading only the weights that it uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sedetect.cli.shared import (
    MEASURE,
    Anywhere,
    Dtype,
    Output,
    Revision,
    TrustRemoteCode,
    app,
    check_writable,
    plain_table,
    print_line,
    print_whole,
    stderr,
)
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.profiling.located import Located, LocatedExpert
    from sedetect.profiling.walk import Reading

_SHOWN = 6  # first tokens named in a cell


@app.command("locate", rich_help_panel=MEASURE)
def locate_command(
    model: Anywhere,
    output: Output = None,
    first_tokens: Annotated[
        str, typer.Option(help="also try other first tokens: how many, or a list of one-token texts: 'The,1,\\n'")
    ] = "0",
    text: Annotated[str | None, typer.Option(help="walk this short prompt instead of first tokens")] = None,
    all_layers: Annotated[bool, typer.Option("--all-layers", help="walk all layers, not the first 75%")] = False,
    cache: Annotated[Path | None, typer.Option(help="folder to cache the bytes read from a remote checkpoint")] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find candidates from the first token alone, reading only the weights of MODEL that it uses."""
    if output is not None:
        check_writable(output)

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from sedetect.checkpoints.options import Loading
    from sedetect.profiling.walk import locate

    shown = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*shown, TimeRemainingColumn(), console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task, layers = bar.add_task("headers", total=None), 0

        def told(reading: Reading) -> None:
            nonlocal layers
            layers = reading.layers
            print_line(_reading(reading))

        def show(layer: int, done: int, total: int) -> None:
            bar.update(task, description=f"layer {layer + 1} of {layers}", completed=done, total=total)

        found = locate(
            model,
            first_tokens=_first_tokens(first_tokens),
            text=text,
            all_layers=all_layers,
            cache=cache,
            loading=Loading(None, dtype, revision, None, trust_remote_code),
            told=told,
            found=print_line,
            progress=show,
        )
    try:
        _print(found)
    finally:  # the reader of stdout may have left
        if output is not None:
            _save(found, output)
    if output is not None:
        print_line(f"written to {output}")


def _first_tokens(value: str) -> int | list[str]:
    """A number alone, or a list with commas between, in which \\n is a line's end."""
    if value.isdigit():
        return int(value)
    return [one.replace("\\n", "\n") for one in value.split(",") if one]


def _reading(reading: Reading) -> str:
    from sedetect.checkpoints.memory import size

    return (
        f"{reading.layers} of {reading.of} layers: reads {size(reading.common)} that is not experts, and at most "
        f"{size(reading.experts)} of experts"
    )


def _print(found: Located) -> None:
    print_line(found.headline, "bold")
    if found.candidates:
        several = len(found.first_tokens) > 1
        table = plain_table(
            "expert",
            "max|y|",
            "/median",
            "channel",
            "token",
            "gate",
            "first",
            "carried",
            *["fires on"] * several,
            "verdict",
        )
        for one in found.candidates:
            table.add_row(*_cells(one, found, several))
        print_whole(table)
    residual = found.residual
    if residual is not None:
        print_line(residual.headline)
        best = max(residual.layers, key=lambda layer: layer.maximum)
        print_line(
            f"residual stream: largest |x| {best.maximum:.5g} after layer {best.layer}, in channel {best.channel} on "
            f"{found.tokens[best.token_id]!r}"
        )
    for one in found.candidates:
        if one.weight is not None:
            print_line(f"{one}: weight {one.weight} gives {one.share:.0%} of its outlier")
    print_line(f"{found.model}: {found.bytes_read} in {found.seconds:.1f} s")
    for note in (*found.notes, *found.unmeasured):
        print_line(f"note: {note}")
    if found.candidates:
        print_line(f"next: {_proving(found.source)} shows which of them the model depends on")


def _proving(source: str) -> str:
    from sedetect.checkpoints.source import is_address

    return "download it; sedetect prove FOLDER" if is_address(source) else f"sedetect prove {source}"


def _cells(one: LocatedExpert, found: Located, several: bool) -> list[str]:
    said = {True: "yes", False: "no", None: "-"}
    cells = [
        str(one),
        f"{one.value:.5g}",
        "-" if one.ratio is None else f"{one.ratio:.0f}",
        str(one.channel),
        repr(found.tokens[one.token_id]),
        f"{one.gate:.2g}",
        said[one.signature],
        said[one.carried],
    ]
    return [*cells, *[_fires(one, found)] * several, "candidate"]


def _fires(one: LocatedExpert, found: Located) -> str:
    """The first tokens on which it fires, in words."""
    on = one.on()
    if not on:
        return "-"  # its rows cannot be told apart
    if len(on) == len(found.first_tokens):
        return f"all {len(on)}"
    named = ", ".join(repr(found.tokens[token]) for token in on[:_SHOWN])
    more = f" and {len(on) - _SHOWN} more" if len(on) > _SHOWN else ""
    return f"{named}{more} alone" if len(on) == 1 else f"{len(on)} of {len(found.first_tokens)}: {named}{more}"


def _save(found: Located, output: Path) -> None:
    from sedetect.profiling.located import describe_walk

    results = Results(output)
    found.stats.save(results.stats_path)
    found.save(results.ranking_path)
    describe_walk(found).save(results.run_path)
    results.domains.save({})  # the old files are of another run, as below
    results.modalities.save({})
    results.rounds.save({})
    for path in (results.pruning_path, results.proof_path, results.residual_path):
        path.unlink(missing_ok=True)
    if found.residual is not None:
        found.residual.save(results.residual_path)
