"""The page: one HTML file with everything in it.

All text goes through the template's escaping. Beside that a content security policy lets run only the two scripts whose
digests it names, and lets nothing be fetched.
"""

import base64
import hashlib
import importlib.resources

import jinja2
import vl_convert
from markupsafe import Markup

from sedetect.report.data import Records
from sedetect.report.drawing import VEGA_LITE, Chart
from sedetect.report.evidence import Evidence
from sedetect.report.glossary import HEADS, TERMS
from sedetect.report.sections import sections
from sedetect.report.style import DARK, LIGHT, PAGE_FONT, css_variables
from sedetect.report.table import Named
from sedetect.report.text import number, visible
from sedetect.version import __version__


def render_page(evidence: Evidence, data: dict[str, Records], charts: list[Chart], inside: list[Chart]) -> str:
    """The HTML of a report; charts are those of Charts(data, page=True), inside those of the analyses."""
    sections_of_page = sections(evidence, data)
    for one in sections_of_page["inside"]:
        one["charts"] = [chart for chart in inside if chart.name.startswith(one["kind"])]
    charts = charts + inside
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    terms = _Terms()
    environment.filters |= {"num": number, "visible": visible, "term": terms.button}
    environment.tests["verdict"] = lambda cell: isinstance(cell, Named)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    css = jinja2.Template(_file("page.css")).render(
        light=css_variables(LIGHT), dark=css_variables(DARK), font=PAGE_FONT
    )
    # Its stub asks for the snippet that it has a default for.
    bundle = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]
    script = _file("page.js")
    used = sorted({name for chart in charts for name in chart.data})
    return environment.from_string(_file("page.html")).render(
        sections_of_page,
        version=__version__,
        charts={chart.name: chart for chart in charts},
        terms=terms,
        css=Markup(css),
        bundle=Markup(bundle),
        script=Markup(script),
        scripts=[_digest(bundle), _digest(script)],
        payload={
            "charts": {chart.name: chart.spec | {"datasets": chart.data} for chart in charts},
            "data": {name: _columnar(data[name]) for name in used},
        },
    )


class _Terms:
    """Terms of the glossary on a page: button is the template's filter, used the terms that it has made buttons of."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    @jinja2.pass_context  # so that it runs where the page is rendered, not where the template is compiled
    def button(self, _: jinja2.runtime.Context, shown: str, name: str | None = None) -> str:
        """shown, as it is where the glossary has no such term. name: the term, where it is shown in other words."""
        term = name or HEADS.get(shown, shown)
        if term not in TERMS:
            return shown
        self.used.add(term)
        made = Markup('<button type="button" class="term" popovertarget="{}">{}</button>')
        return made.format(self.anchor(term), shown.replace("÷ ", "÷\u00a0"))

    def anchor(self, term: str) -> str:
        return f"term-{list(TERMS).index(term)}"

    def definitions(self) -> list[tuple[str, str]]:
        """The terms that were used, and what they mean."""
        return [(term, text) for term, text in TERMS.items() if term in self.used]


def _columnar(records: Records) -> dict[str, list]:
    """The records without their keys: {"columns": names, "rows": lists of values}."""
    columns = list(records[0]) if records else []
    return {"columns": columns, "rows": [[record[name] for name in columns] for record in records]}


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _file(name: str) -> str:
    return (importlib.resources.files("sedetect.report") / "template" / name).read_text(encoding="utf-8")
