"""sedetect report: the results in a folder as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from sedetect.cli.shared import FILES, app, check_writable, print_line, progress_bar
from sedetect.errors import SedetectError
from sedetect.results import Results


@app.command("report", rich_help_panel=FILES)
def report_command(
    folder: Annotated[Path, typer.Argument(help="folder of a profile (profile -o DIR)", metavar="DIR")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the page (default: DIR/report.html)")] = None,
    model: Annotated[Path | None, typer.Option(help="checkpoint folder, for sizes in bytes")] = None,
    figures: Annotated[
        bool,
        typer.Option(
            "--figures", help="also write the charts as PNG, SVG and PDF, with captions, to figures/ beside the page"
        ),
    ] = False,
) -> None:
    """Write one HTML page of everything in a folder of results; it opens offline.

    The page shows the profile in DIR and the results that prove, ablate, budget, verify, timeline and analyze wrote
    beside it.
    """
    from sedetect.report.make import make_report

    page = Results(folder).report_path if output is None else output
    if page.is_dir():
        raise SedetectError(f"-o {page}: is a folder; give the name of a file in it")
    check_writable(page.parent)
    with progress_bar("charts") as bar:
        task = bar.add_task("figures", total=None, visible=figures)
        made = make_report(
            folder, page, model=model, figures=figures, progress=lambda n, of: bar.update(task, completed=n, total=of)
        )
    print_line(made.headline, "bold")
    print_line(f"written to {page} ({page.stat().st_size / 1e6:.1f} MB)")
    if figures:
        print_line(f"{made.charts} charts as PNG, SVG and PDF in {made.figures}")
