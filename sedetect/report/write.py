"""Writing a report: the page, and the figures of its charts."""

import json
from collections.abc import Callable
from pathlib import Path

import vl_convert

from sedetect.files import write_atomic
from sedetect.report.charts import Charts
from sedetect.report.data import datasets
from sedetect.report.drawing import VEGA_LITE
from sedetect.report.evidence import Evidence
from sedetect.report.page import render_page

FORMATS = {
    "png": lambda spec: vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2),
    "svg": lambda spec: vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE).encode(),
    "pdf": lambda spec: vl_convert.vegalite_to_pdf(spec, vl_version=VEGA_LITE),
}


def write_report(evidence: Evidence, path: Path) -> None:
    """Write the page to path, atomically. Raises SedetectError where that fails."""
    data = datasets(evidence)
    # what UTF-8 has no bytes for (half a surrogate pair, which JSON can spell) becomes a question mark
    page = render_page(evidence, data, Charts(data, page=True).all()).encode("utf-8", "replace")
    write_atomic(path, lambda temporary: temporary.write_bytes(page))


def write_figures(
    evidence: Evidence, folder: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> int:
    """Write every chart as folder/<name>.png, .svg and .pdf, and return how many charts there are.

    progress is called with (charts done, charts in all). Raises SedetectError where a file cannot be written.
    """
    data = datasets(evidence)
    charts = Charts(data, page=False).all()
    for done, chart in enumerate(charts):
        progress(done, len(charts))
        spec = json.dumps(chart.spec | {"datasets": {name: data[name] for name in chart.data}})
        for form, convert in FORMATS.items():
            drawn = convert(spec)
            write_atomic(folder / f"{chart.name}.{form}", lambda temporary, drawn=drawn: temporary.write_bytes(drawn))
    return len(charts)
