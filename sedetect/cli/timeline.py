"""sedetect timeline: when the super experts of a training run formed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sedetect.cli.shared import (
    MEASURE,
    BatchSize,
    Data,
    Device,
    Dtype,
    Output,
    SeqLen,
    Tokens,
    TrustRemoteCode,
    app,
    check_writable,
    plain_table,
    print_line,
    print_whole,
    progress_bar,
    saved_after,
)
from sedetect.errors import SedetectError
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.training.histories import Timeline

_EXPERTS = 6  # columns


@app.command("timeline", rich_help_panel=MEASURE)
def timeline_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="folder of an ExpertMonitor, a folder of checkpoints of one model, several checkpoints, or a hub name",
            metavar="DIR|CHECKPOINT...|NAME",
        ),
    ],
    output: Output = None,
    revisions: Annotated[
        str | None, typer.Option(help="revisions of the one hub model given: step1000,step2000,...")
    ] = None,
    data: Data = None,
    tokens: Tokens = 4096,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show when the super experts of a training run, or of a series of checkpoints, formed.

    Checkpoints are measured one after another on the same text; with -o each result is saved and not measured again.
    """
    if output is not None:
        check_writable(output)

    from sedetect.training.histories import timeline
    from sedetect.training.series import Series

    if len(sources) == 1 and revisions is None and Series(sources[0]).file.exists():
        if output is not None and output.resolve() != Path(sources[0]).resolve():
            raise SedetectError(f"-o {output}: the timeline of a series is written beside it; leave out -o")
        _show(timeline(sources[0]), Path(sources[0]))
        return

    from sedetect.calibration.windows import Text
    from sedetect.checkpoints.options import Loading
    from sedetect.training.checkpoints import follow

    with tempfile.TemporaryDirectory() as temporary, progress_bar("checkpoints") as bar:
        task = bar.add_task("", total=None)
        follow(
            sources,
            output or temporary,
            revisions=None if revisions is None else [one for one in revisions.split(",") if one],
            texts=data,
            text=Text(tokens, seq_len, batch_size),
            loading=Loading(device, dtype, None, None, trust_remote_code),
            progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        )
        bar.stop()
        _show(timeline(output or temporary), output)


def _show(found: Timeline, folder: Path | None) -> None:
    """Print, and write the document and the last state's statistics, which the other commands take."""

    def save(path: Path) -> None:
        from sedetect.training.series import Series

        found.save(path)
        Series(path.parent).stats(found.states[-1]).save(Results(path.parent).stats_path)

    with saved_after(None if folder is None else Results(folder).timeline_path, save):
        print_line(f"{found.model}: {found.headline}", "bold")
        for text in found.findings:
            print_line(text)
        shown = [*found.experts, *found.passing][:_EXPERTS]
        table = plain_table("step", "loss", "sinks", "residual max", *(f"{one.expert} |y|" for one in shown))
        for number in found.chosen():
            state = found.states[number]
            sinks = "-" if state.sink_mean is None else f"{state.sink_mean:.1%}"
            values = ["-" if (value := one.values[number]) is None else f"{value:.4g}" for one in shown]
            table.add_row(f"{state.step}", f"{state.loss:.3f}", sinks, f"{state.residual_max:.4g}", *values)
        print_whole(table)
        for note in found.notes:
            print_line(f"note: {note}")
