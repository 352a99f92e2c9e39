"""sedetect report: the results in a folder as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from sedetect.cli.shared import app, check_writable, console, progress_bar
from sedetect.errors import SedetectError
from sedetect.results import Results


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="folder of a profile (profile -o DIR)", metavar="DIR")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="the page (default: DIR/report.html)")] = None,
    figures: Annotated[bool, typer.Option("--figures", help="also figures/*.png, .svg, .pdf beside the page")] = False,
) -> None:
    """Show what was measured of a model on one page: a file that opens offline, to read and to send on.

    It shows the profile in DIR, and what ablate, analyze residual and analyze trace have written beside it.
    """
    from sedetect.report.evidence import load_evidence

    try:
        from sedetect.report.write import write_figures, write_report
    except ModuleNotFoundError as error:
        raise SedetectError(f"report needs {error.name}; install it with: pip install 'sedetect[report]'") from None
    page = Results(folder).report_path if output is None else output
    if page.is_dir():
        raise SedetectError(f"-o {page}: is a folder; give the name of a file in it")
    evidence = load_evidence(folder)
    check_writable(page.parent)
    write_report(evidence, page)
    console.print(evidence.ranking.headline, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"written to {page} ({page.stat().st_size / 1e6:.1f} MB)", markup=False, highlight=False, soft_wrap=True
    )
    if figures:
        drawn = Results(page.parent).figures_path
        with progress_bar("charts") as bar:
            task = bar.add_task("figures", total=None)
            count = write_figures(evidence, drawn, lambda n, of: bar.update(task, completed=n, total=of))
        text = f"{count} charts as PNG, SVG and PDF in {drawn}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
