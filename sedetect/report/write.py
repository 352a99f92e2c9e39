"""Writing a report: the page, and the figures of its charts."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import vl_convert

from sedetect.analysis.common import Analysis
from sedetect.analysis.tables import marked_experts
from sedetect.files import write_atomic
from sedetect.report.analyses import Inside
from sedetect.report.captions import captions
from sedetect.report.charts import Charts
from sedetect.report.data import Records, datasets
from sedetect.report.drawing import VEGA_LITE, Chart, titled
from sedetect.report.evidence import Evidence
from sedetect.report.page import render_page
from sedetect.report.pictures import Picture, pictures_of, telling_layers
from sedetect.report.text import whole
from sedetect.stats.place import BankId

FORMATS: dict[str, Callable[[str], bytes]] = {
    "png": lambda spec: vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2),
    "svg": lambda spec: vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE).encode(),
    "pdf": lambda spec: vl_convert.vegalite_to_pdf(spec, vl_version=VEGA_LITE),
}


def write_report(evidence: Evidence, path: Path) -> None:
    """Write the page to path, atomically. Raises SedetectError where that fails."""
    data, pictures = _inside(evidence)
    charts = Charts(data, page=True).all()
    # what UTF-8 has no bytes for (half a surrogate pair, which JSON can spell) becomes a question mark
    page = render_page(evidence, data, charts, Inside(pictures, page=True).all()).encode("utf-8", "replace")
    write_atomic(path, lambda temporary: temporary.write_bytes(page))


def write_figures(
    evidence: Evidence, folder: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> int:
    """Write every chart as folder/<name>.png, .svg and .pdf, its caption as .txt, and return how many charts there are.

    progress is called with (charts done, charts in all). Raises SedetectError where a file cannot be written.
    """
    header, known = evidence.stats.header, captions(evidence, datasets(evidence))
    run = f"{header.model} ({header.dtype}): {whole(header.tokens)} tokens in {whole(header.sequences)} sequences."
    return _write(figures_of(evidence), folder, list(FORMATS), known, run, progress)


def write_pictures(
    result: Analysis,
    marked: dict[str, str],
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
    *,
    every: bool = False,
) -> int:
    """Write the pictures of an analysis as folder/<name>.png and .svg, with captions as .txt; returns how many there
    are.

    Of single layers, those of telling_layers; every: of all. marked: verdict by name of the experts to mark. progress
    and errors as in write_figures.
    """
    figures = pictures_as_figures(result, marked, None if every else telling_layers(result, marked))
    return _write(figures, folder, ["png", "svg"], {}, f"{result.model} ({result.dtype}).", progress)


def figures_of(evidence: Evidence) -> dict[str, dict[str, Any]]:
    """The specification of every chart by its name, with the records that it draws."""
    data, pictures = _inside(evidence)
    charts = Charts(data, page=False).all() + Inside(pictures, page=False).all()
    return _alone(charts, data, evidence.stats.header.model)


def pictures_as_figures(
    result: Analysis, marked: dict[str, str], layers: list[BankId] | None = None
) -> dict[str, dict[str, Any]]:
    """figures_of the pictures of an analysis, of all layers or of these."""
    pictures = pictures_of(result, marked, page=False, layers=layers)
    data = {name: records for picture in pictures for name, records in picture.data.items()}
    return _alone(Inside(pictures, page=False).all(), data, result.model)


def _alone(charts: list[Chart], data: dict[str, Records], model: str) -> dict[str, dict[str, Any]]:
    """The charts with their records, and a title: what a chart needs away from the page."""
    return {
        chart.name: chart.spec
        | {"title": titled(model, chart.alt), "datasets": {name: data[name] for name in chart.data}}
        for chart in charts
    }


def _inside(evidence: Evidence) -> tuple[dict[str, Records], list[Picture]]:
    """The records of all charts of the page, and its pictures of the analyses."""
    marked = marked_experts(evidence.ranking)
    found = [p for one in evidence.analyses.values() for p in pictures_of(one, marked, page=True)]
    return datasets(evidence) | {name: records for p in found for name, records in p.data.items()}, found


def _write(
    figures: dict[str, dict[str, Any]],
    folder: Path,
    forms: list[str],
    known: dict[str, str],
    run: str,
    progress: Callable[[int, int], None],
) -> int:
    """known: captions by name; where there is none, the subtitle says it. run: what all figures are of."""
    for done, (name, figure) in enumerate(figures.items()):
        progress(done, len(figures))
        spec = json.dumps(figure)
        for form in forms:
            drawn = FORMATS[form](spec)
            write_atomic(folder / f"{name}.{form}", partial(Path.write_bytes, data=drawn))
        caption = known.get(name, " ".join(figure["title"]["subtitle"]))
        text = f"{caption}\n{run}\n".encode("utf-8", "replace")
        write_atomic(folder / f"{name}.txt", partial(Path.write_bytes, data=text))
    return len(figures)
