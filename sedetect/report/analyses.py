"""The charts of the analyses: each Picture of sedetect.report.pictures as a Vega-Lite specification."""

import altair as alt

from sedetect.report.drawing import VERDICTS, Chart, Drawing, ordinal, spaced
from sedetect.report.pictures import Picture

_LEGEND = 24  # characters of a legend in one line, on a narrow page
_NAMED = 64  # points that carry their name
_LABELS = 12  # of an axis, beside those of marked experts


class Inside(Drawing):
    """The pictures of one or more analyses."""

    def __init__(self, pictures: list[Picture], *, page: bool):
        super().__init__({"experts": []}, page=page)
        self.pictures = pictures

    def all(self) -> list[Chart]:
        draw = {"lines": self._lines, "grid": self._grid, "points": self._points}
        return [draw[picture.form](picture) for picture in self.pictures]

    def _lines(self, of: Picture) -> Chart:
        series = list(dict.fromkeys(record["series"] for record in of.data[of.name]))
        colors = dict(zip(series, (self.color[c] for c in ("accent", "candidate", "undecided", "muted"))))
        long = self.width == "container" and sum(map(len, series)) > _LEGEND
        legend = alt.Legend(orient="top", symbolType="stroke", labelLimit=300, columns=1 if long else len(series))
        tips = [
            alt.Tooltip("row:N", title="layer"), alt.Tooltip("series:N"), alt.Tooltip("value:Q", format=".4~g"),
        ]  # fmt: skip
        base = self.on(of.name).encode(
            x=self.across("row", spaced(of.columns), of.x),
            y=alt.Y("value:Q", title=of.y, scale=alt.Scale(zero=False)),
            color=alt.Color("series:N", title=None, scale=ordinal(colors), legend=legend),
            tooltip=tips,
        )
        chart: alt.LayerChart | alt.FacetChart = self.dotted(
            base, alt.StrokeDash("series:N", title=None, scale=_solid(series), legend=legend)
        )
        if of.marked:
            marks = self.on(f"{of.name}-marks").encode(x="row:N")
            rule = marks.mark_rule(color=self.color["proved"], strokeDash=[3, 3])
            names = marks.mark_text(
                align="left", dx=4, dy=6, fontWeight="bold", fontSize=12, color=self.color["proved"]
            ).encode(text="expert:N", y=alt.value(0))
            chart = alt.layer(rule, chart, names)
        return self.chart(of.name, of.text, chart, 220)

    def _grid(self, of: Picture) -> Chart:
        values = [record["value"] for record in of.data[of.name]]
        low, high = min(values, default=0), max(values, default=1)
        scale = alt.Scale(
            type="log" if of.log else "linear", scheme="viridis", domain=[low, high if high > low else low + 1]
        )
        legend = alt.Legend(title=of.value, format=",.3~r", gradientLength=160, orient="top")
        x = alt.X("x:N", scale=alt.Scale(domain=of.columns), title=of.x, axis=self._axis(of.columns, of.marked))
        y = alt.Y(
            "y:N",
            scale=alt.Scale(domain=of.rows),
            title=of.y,
            axis=self._axis(of.rows, of.marked if of.rows == of.columns else {}),
        )
        tips = [
            alt.Tooltip("x:N", title=of.x),
            alt.Tooltip("y:N", title=of.y),
            alt.Tooltip("value:Q", title=of.value, format=".4~g"),
        ]
        base = self.on(of.name)
        layers = [
            base.mark_rect().encode(x=x, y=y, color=alt.Color("value:Q", scale=scale, legend=legend), tooltip=tips)
        ]
        for flag, channel in (("mx", "x"), ("my", "y")):
            for verdict in sorted({v for label, v in of.marked.items() if any(r[flag] for r in of.data[of.name])}):
                labels = [label for label, v in of.marked.items() if v == verdict]
                chosen = base.transform_filter(f"datum.{flag}").transform_filter(
                    alt.FieldOneOfPredicate(field=channel, oneOf=labels)
                )
                band = chosen.transform_aggregate(cells="count()", groupby=[channel])
                ring = band.mark_rect(fill=None, stroke=self.color[verdict], strokeWidth=1.5)
                layers.append(ring.encode(**{channel: x if channel == "x" else y}))
        for verdict in sorted({*VERDICTS[:-1]} & {record.get("verdict") for record in of.data[of.name]}):
            one = base.transform_filter(alt.datum.verdict == verdict)
            layers.append(one.mark_rect(fill=None, stroke=self.color[verdict], strokeWidth=2).encode(x=x, y=y))
        height = max(120, min(440, 14 * len(of.rows) + 40))
        return self.chart(of.name, of.text, alt.layer(*layers), height)

    def _points(self, of: Picture) -> Chart:
        there = {record["verdict"] for record in of.data[of.name]}
        colors = {verdict: self.color[verdict] for verdict in VERDICTS if verdict in there}
        tips = [alt.Tooltip("name:N", title="expert"), alt.Tooltip("verdict:N")]
        many = len(of.data[of.name]) > len(of.columns)
        base = self.on(of.name).encode(
            x=alt.X("x:Q", title=of.x, scale=alt.Scale(zero=False)),
            y=alt.Y("y:Q", title=of.y, scale=alt.Scale(zero=False)),
            tooltip=tips,
        )
        color = alt.Color("verdict:N", title=None, scale=ordinal(colors), legend=alt.Legend(orient="top"))
        if many:
            # Neurons: those of an expert share a color, and marked ones lie on top in theirs.
            scale = alt.Scale(domain=of.columns, scheme="spectral")
            rest = base.transform_filter("datum.verdict == 'other'").mark_circle(size=10, opacity=0.5)
            layers = [rest.encode(color=alt.Color("name:N", scale=scale, legend=None))]
            for verdict in colors:
                if verdict != "other":
                    top = base.transform_filter(alt.datum.verdict == verdict)
                    layers.append(top.mark_point(size=26, color=self.color[verdict], strokeWidth=1.5))
            return self.chart(of.name, of.text, alt.layer(*layers), 340)
        points = base.mark_point(size=60, strokeWidth=1.5).encode(
            color=color, fill=alt.condition("datum.stray", alt.value("transparent"), color)
        )
        named = base if len(of.columns) <= _NAMED else base.transform_filter("datum.verdict != 'other' || datum.stray")
        names = named.mark_text(dy=-10, fontSize=11).encode(text="name:N", color=color)
        return self.chart(of.name, of.text, alt.layer(points, names), 340)

    def _axis(self, labels: list[str], marked: dict[str, str]) -> alt.Axis:
        """thinned, with a label on every marked expert, in its color."""
        axis = self.thinned(labels, _LABELS)
        marks = {label: verdict for label, verdict in marked.items() if label in labels}
        if not marks:
            return axis
        tests = [
            {"test": f"datum.value == '{label}'", "value": self.color[verdict]} for label, verdict in marks.items()
        ]
        axis["values"] = [label for label in labels if label in marks or label in axis["values"]]
        axis["labelColor"] = {"condition": tests, "value": self.color["muted"]}
        axis["labelOverlap"] = False
        return axis


def _solid(series: list[str]) -> alt.Scale:
    return alt.Scale(domain=series, range=[[1, 0]] * len(series))
