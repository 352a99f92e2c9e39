"""How the charts of the report look: colors, axes, legends, and the forms that several charts share."""

import re
import textwrap
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from sedetect.report.data import Records
from sedetect.report.style import FIGURE_FONT, LIGHT, PAGE_FONT, VARIABLES

_LAYER = re.compile(r"(.*?)L(\d+)")  # of "L1", "encoder.L1", "L1 vision"
VEGA_LITE = "6.4"  # what altair writes; vl_convert must have it
Scaling = Literal["linear", "log"]
VERDICTS = ("proved", "candidate", "undecided", "refuted", "other")
EXPERT = ("expert", "value", "channel", "token", "position", "rows", "first", "rest", "verdict")
_TITLES = {"value": "max|y|", "first": "max|y|, first tokens", "rest": "max|y|, other tokens", "row": "layer"}
_NUMBERS = {"value": ".5~g", "first": ".5~g", "rest": ".5~g", "gate": ".3~g", "rows": ",", "change": "+.2%"}
_DECADES = [10.0**n for n in range(-9, 10)]  # a log axis has a line at each, and no others
LOG = alt.Axis(format=",.9~f", values=_DECADES)
FINE_LOG = alt.Axis(format=",.9~f", values=[m * d for d in _DECADES for m in (1, 2, 5)], labelOverlap="greedy")
COUNTS = alt.Axis(format=",d", values=[0, *_DECADES[9:]])  # of a symlog axis
CHANGES = alt.Axis(format="+,~%", values=[-0.05, -0.01, 0, 0.01, 0.05, 0.2, 1, *_DECADES[10:]])  # likewise


@dataclass(frozen=True)
class Chart:
    """A chart: its name, what it shows in words, its specification, and the names of the records it draws."""

    name: str
    alt: str
    spec: dict[str, Any]
    data: list[str]


class Drawing:
    """What the charts over one set of records share: for the page, CSS variables and the width it is given; for files,
    light colors and a fixed width."""

    def __init__(self, data: dict[str, Records], *, page: bool):
        self.data, self.width = data, "container" if page else 860
        self.color = VARIABLES if page else LIGHT
        self.font = PAGE_FONT if page else FIGURE_FONT
        self.rows = list(dict.fromkeys(record["row"] for record in data["experts"]))
        self.columns = _columns(data["experts"])
        self.values = [r["value"] for r in data["experts"] if r["state"] == "seen"]

    def on(self, name: str) -> alt.Chart:
        return alt.Chart(alt.NamedData(name))

    def across(self, field: str, domain: list[str], title: str) -> alt.X:
        axis = self.thinned(domain, 32)
        return alt.X(f"{field}:N", scale=alt.Scale(domain=domain, type="point"), title=title, axis=axis)

    def thinned(self, labels: list[str], most: int) -> alt.Axis:
        """An axis with a label on every n-th of the labels, n as small as gives most of them or fewer, and on those
        that are words ("shared")."""
        numbers = [label for label in labels if not label.isalpha()]
        step = next(n for n in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 10**9) if len(numbers) / n <= most)
        return alt.Axis(
            values=[*numbers[::step], *(label for label in labels if label.isalpha())],
            labelAngle=0,
            labelOverlap="parity",
            ticks=len(labels) > most,
            domain=False,
            grid=False,
        )

    def verdicts(self, of: str = "experts") -> alt.Color:
        there = {record["verdict"] for record in self.data[of]}
        colors = {verdict: self.color[verdict] for verdict in VERDICTS if verdict in there}
        return alt.Color("verdict:N", title=None, scale=ordinal(colors), legend=alt.Legend(orient="top"))

    def two_series(
        self,
        name: str,
        x: alt.X,
        title: str,
        series: tuple[str, str],
        scale: Scaling = "log",
        extra: tuple[str, ...] = (),
    ) -> alt.LayerChart:
        """Two series: the first strong, the second faint."""
        scaled = alt.Scale(domain=list(series), range=[[1, 0], [5, 4]])
        colors = dict(zip(series, (self.color["accent"], self.color["muted"])))
        y = alt.Y("value:Q", scale=alt.Scale(type=scale), title=title, axis=LOG if scale == "log" else alt.Axis())
        legend = alt.Legend(orient="top", symbolType="stroke")
        field = x["shorthand"].partition(":")[0]
        tips = [alt.Tooltip(f"{field}:N", title=_TITLES.get(field, "expert")), *tooltips("series", *extra)]
        color = alt.Color("series:N", title=None, scale=ordinal(colors), legend=legend)
        dashes = alt.StrokeDash("series:N", title=None, scale=scaled, legend=legend)
        tips.append(alt.Tooltip("value:Q", format=".5~g"))
        return self.dotted(self.on(name).encode(x=x, y=y, color=color, tooltip=tips), dashes)

    def dotted(self, base: alt.Chart, dashes: alt.StrokeDash) -> alt.LayerChart:
        """A line with a dot at every value; dashes are the line's only, so that their legend shows lines."""
        return base.mark_line().encode(strokeDash=dashes) + base.mark_point(filled=True, size=24, opacity=1)

    def two_runs(self, name: str, title: str, series: tuple[str, str], scale: Scaling) -> alt.LayerChart:
        """Two series of one or two runs: color tells the run, dashes the series."""
        runs = list(dict.fromkeys(record["run"] for record in self.data[name]))
        rows = list(dict.fromkeys(record["row"] for record in self.data[name]))
        colors = dict(zip(runs, (self.color["accent"], self.color["proved"])))
        gray = self.color["muted"]
        legend = alt.Legend(orient="top", symbolType="stroke", labelLimit=300, columns=1)
        dashed = alt.Legend(orient="top", symbolType="stroke", symbolStrokeColor=gray, columns=1)
        y = alt.Y("value:Q", scale=alt.Scale(type=scale), title=title, axis=LOG if scale == "log" else alt.Axis())
        dashes = alt.Scale(domain=list(series), range=[[1, 0], [5, 4]])
        base = self.on(name).encode(
            x=self.across("row", spaced(rows), "layer"),
            y=y,
            color=alt.Color("run:N", title=None, scale=ordinal(colors), legend=legend),
            tooltip=[
                alt.Tooltip("row:N", title="layer"),
                *tooltips("run", "series"),
                alt.Tooltip("value:Q", format=".5~g"),
            ],
        )
        return self.dotted(base, alt.StrokeDash("series:N", title=None, scale=dashes, legend=dashed))

    def chart(self, name: str, text: str, chart: Any, height: int) -> Chart:
        axis = {"gridColor": self.color["line"], "domainColor": self.color["line"], "tickColor": self.color["line"]}
        words = {"labelColor": self.color["muted"], "titleColor": self.color["muted"], "labelFontSize": 12}
        config = {
            "font": self.font,
            "background": "transparent" if self.width == "container" else self.color["paper"],
            "aria": False,  # the page describes every chart, and has tables; a thousand marks read out help nobody
            "view": {"stroke": None},
            "axis": axis | words | {"titleFontWeight": "normal", "titleFontSize": 12},
            "legend": words
            | {
                "titleFontWeight": "normal",
                "titleFontSize": 12,
                "symbolSize": 120,
                "symbolStrokeColor": self.color["muted"],
            }
            | ({"layout": {"top": {"direction": "vertical"}}} if self.width == "container" else {}),
        }
        chart = chart.properties(
            width=self.width, height=height, autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
        )
        spec = chart.to_dict() | {"config": config}
        return Chart(name, text, spec, sorted(_used(spec)))


def _columns(experts: Records) -> list[str]:
    """The columns of the heatmap: numbers ascending, then what has a name."""
    found = dict.fromkeys(record["column"] for record in experts)
    numbers = [column for column in found if column.isdecimal()]
    return sorted(numbers, key=int) + [column for column in found if not column.isdecimal()]


def _used(spec: Any) -> set[str]:
    """The names of the records that a specification draws."""
    if isinstance(spec, list):
        return set().union(*map(_used, spec))
    if not isinstance(spec, dict):
        return set()
    own = {spec["data"]["name"]} if "data" in spec else set()
    return own.union(*map(_used, spec.values()))


def titled(model: str, text: str) -> dict[str, Any]:
    """The title of a chart that stands alone: the model, and what the chart shows."""
    look = {"anchor": "start", "offset": 14, "color": LIGHT["ink"], "subtitleColor": LIGHT["muted"], "fontSize": 16}
    return look | {"text": model, "subtitle": textwrap.wrap(text, 120), "subtitleFontSize": 13, "subtitlePadding": 5}


def spaced(rows: list[str]) -> list[str]:
    """Layers, with those between them that have no experts, so that an axis spaces them by their number."""
    stacks: dict[str, dict[int, list[str]]] = {}
    for row in rows:
        stack, number = _LAYER.match(row).groups()  # type: ignore[union-attr]
        stacks.setdefault(stack, {}).setdefault(int(number), []).append(row)
    return [
        row
        for stack, layers in stacks.items()
        for number in range(min(layers), max(layers) + 1)
        for row in layers.get(number, [f"{stack}L{number}"])
    ]


def ordinal(colors: dict[str, str]) -> alt.Scale:
    return alt.Scale(domain=list(colors), range=list(colors.values()))


def tooltips(*fields: str) -> list[alt.Tooltip]:
    types = {field: "Q" if field in _NUMBERS else "N" for field in fields}
    return [
        alt.Tooltip(f"{f}:{types[f]}", title=_TITLES.get(f, f), format=_NUMBERS.get(f, alt.Undefined)) for f in fields
    ]
