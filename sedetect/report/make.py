"""The report of a folder of results, as a file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sedetect.errors import SedetectError
from sedetect.report.evidence import load_evidence
from sedetect.results import Results


class Report(NamedTuple):
    """The page that was written, the headline of its ranking, and how many charts are drawn in which folder."""

    page: Path
    headline: str
    figures: Path
    charts: int


def make_report(
    folder: str | os.PathLike[str],
    page: str | os.PathLike[str] | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    figures: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Report:
    """Write the page of what was measured of a model: a file that opens offline.

    Args:
        folder: of a profile, and of what the other commands have written beside it.
        page: the file; by default report.html in that folder.
        model: the checkpoint's folder, for the size in bytes of what is to be protected.
        figures: write every chart as figures/<name>.png, .svg and .pdf beside the page too.
        progress: called with (charts done, charts in all).
    Raises:
        SedetectError: for what is not a folder of results, damaged files, a page that cannot be written, and where the
            libraries that draw are missing, and for a checkpoint of another model.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise SedetectError(f"folder: is a {type(folder).__name__}; give the path of a folder of results")
    if page is not None and not isinstance(page, (str, os.PathLike)):
        raise SedetectError(f"page: is a {type(page).__name__}; give the path of a file")
    try:
        from sedetect.report.write import write_figures, write_report
    except ModuleNotFoundError as error:
        raise SedetectError(f"report needs {error.name}; install it with: pip install 'sedetect[report]'") from None
    path = Results(folder).report_path if page is None else Path(page)
    evidence = load_evidence(folder, model)
    write_report(evidence, path)
    drawn = Results(path.parent).figures_path
    count = write_figures(evidence, drawn, progress) if figures else 0
    return Report(path, evidence.ranking.headline, drawn, count)
