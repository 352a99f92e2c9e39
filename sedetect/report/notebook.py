"""The charts of the report in a notebook."""

import os
from difflib import get_close_matches
from typing import TYPE_CHECKING

from sedetect.analysis.common import Analysis
from sedetect.errors import Argument, SedetectError
from sedetect.ranking.rule import rank
from sedetect.report.evidence import Evidence, load_evidence
from sedetect.stats.model import ModelStats

if TYPE_CHECKING:
    import altair as alt


def plot(results: "ModelStats | Analysis | str | os.PathLike[str]", chart: str | None = None) -> "alt.TopLevelMixin":
    """A chart of the report or of an analysis, for Altair, which a notebook shows.

    Args:
        results: statistics, whose candidates are marked; an analysis; or a folder of results, for all that the report
            draws of it.
        chart: its name, which is that of its file among the report's figures: "heatmap" (the first of statistics),
            "tail", "first-rest", "by-layer", ...; the first that there is by default.
    Raises:
        SedetectError: for a chart that is not there, and where the libraries that draw are missing.
    """
    try:
        import altair as alt

        from sedetect.report.write import figures_of, pictures_as_figures
    except ModuleNotFoundError as error:
        raise SedetectError(f"plot needs {error.name}; install it with: pip install 'sedetect[report]'") from None
    if isinstance(results, Analysis):
        figures = pictures_as_figures(results, {})
    elif isinstance(results, ModelStats):
        figures = figures_of(Evidence(results, rank(results)))
    elif isinstance(results, (str, os.PathLike)):
        figures = figures_of(load_evidence(results))
    else:
        raise SedetectError(f"results: a {type(results).__name__}; give statistics, an analysis or a folder of results")
    if not figures:
        raise SedetectError("results: nothing in them to draw; profile on more text")
    if chart is not None and chart not in figures:
        near = get_close_matches(chart, figures, n=6, cutoff=0) if len(figures) > 20 else list(figures)
        more = f" and {len(figures) - len(near)} others" if len(near) < len(figures) else ""
        raise SedetectError(Argument("chart"), f" {chart!r}: there is none; give one of {', '.join(near)}{more}")
    return alt.Chart.from_dict(next(iter(figures.values())) if chart is None else figures[chart])
