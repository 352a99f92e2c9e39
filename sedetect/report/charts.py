"""The charts of the report, as Vega-Lite specifications over the records of sedetect.report.data."""

from collections.abc import Callable
from itertools import product
from typing import Any

import altair as alt

from sedetect.report.data import ELEMENTS, FORMATS_OF, KURTOSIS
from sedetect.report.drawing import (
    CHANGES,
    COUNTS,
    EXPERT,
    FINE_LOG,
    LOG,
    VERDICTS,
    Chart,
    Drawing,
    ordinal,
    spaced,
    tooltips,
)


class Charts(Drawing):
    """The charts of one report."""

    def all(self) -> list[Chart]:
        """The charts that have something to draw, in the order of the page."""
        makers: list[tuple[str, Callable[[], Chart]]] = [
            ("experts", self.heatmap),
            ("ablation", self.ablation),
            ("frontier", self.frontier),
            ("experts", self.tail),
            ("diagonal", self.first_rest),
            ("layers", self.by_layer),
            ("columns", self.by_expert),
            ("kept", self.positions),
            ("residual", self.residual),
            ("sinks", self.sinks),
            ("timeline", self.timeline),
            ("timeline_sinks", self.timeline_sinks),
            ("coverage", self.coverage),
            ("headroom", self.headroom),
            ("kurtosis", self.kurtosis),
        ]
        return [make() for name, make in makers if self.data[name] and (name != "experts" or self.values)]

    def heatmap(self) -> Chart:
        x = alt.X("column:N", scale=alt.Scale(domain=self.columns), title="expert", axis=self.thinned(self.columns, 32))
        y = alt.Y("row:N", scale=alt.Scale(domain=self.rows), title="layer", axis=self.thinned(self.rows, 24))
        base = self.on("experts").encode(x=x, y=y, tooltip=tooltips(*EXPERT))
        low, high = min(self.values), max(self.values)
        scale = alt.Scale(type="log", scheme="viridis", domain=[low, high if high > low else low * 10])
        legend = alt.Legend(title="largest output |y|", format=",", tickCount=5, gradientLength=220, orient="top")
        color = alt.Color("value:Q", scale=scale, legend=legend)
        layers = [base.transform_filter(alt.datum.state == "seen").mark_rect().encode(color=color)]
        for state, name in (("unseen", "unseen"), ("non-finite", "broken")):
            if any(record["state"] == state for record in self.data["experts"]):
                layers.append(base.transform_filter(alt.datum.state == state).mark_rect(color=self.color[name]))
        for verdict in VERDICTS[:-1]:
            chosen = base.transform_filter(alt.datum.verdict == verdict)
            layers.append(chosen.mark_rect(fill=None, stroke=self.color[verdict], strokeWidth=2, tooltip=None))
        edge = self.columns[len(self.columns) // 2 :]
        beside = 6 + 500 // len(self.columns)  # half a cell of a chart some 1000 pixels wide
        for verdict, right in product(VERDICTS[:-1], (False, True)):
            inside = alt.FieldOneOfPredicate(field="column", oneOf=edge)
            chosen = base.transform_filter(alt.datum.verdict == verdict).transform_filter(
                inside if right else alt.LogicalNotPredicate(**{"not": inside})
            )
            where: dict[str, Any] = {"align": "right", "dx": -beside} if right else {"align": "left", "dx": beside}
            halo: dict[str, Any] = {
                "stroke": self.color["paper"],
                "strokeWidth": 4,
                "strokeJoin": "round",
                "color": self.color["paper"],
            }
            for look in (halo, {"color": self.color[verdict]}):
                layers.append(chosen.mark_text(fontWeight="bold", fontSize=13, **where, **look).encode(text="expert:N"))
        height = max(160, min(560, 22 * len(self.rows)))
        text = f"Heatmap of the largest output of {len(self.data['experts'])} experts, layers down, experts across."
        return self.chart("heatmap", text, alt.layer(*layers), height)

    def tail(self) -> Chart:
        base = self.on("experts").transform_filter("datum.value > 0")
        x = alt.X("place:Q", scale=alt.Scale(type="log", nice=False), title="rank by largest output", axis=FINE_LOG)
        y = alt.Y("value:Q", scale=alt.Scale(type="log"), title="largest output |y|", axis=LOG)
        points = base.mark_point(size=36, strokeWidth=1.3).encode(
            x=x,
            y=y,
            color=self.verdicts(),
            fill=alt.condition("datum.inside", self.verdicts(), alt.value("transparent")),
            tooltip=tooltips("place", *EXPERT),
        )
        rule = self.on("thresholds").mark_rule(color=self.color["muted"], strokeWidth=1.5)
        rules = rule.encode(
            y="value:Q",
            strokeDash=alt.StrokeDash(
                "test:N",
                title=None,
                scale=alt.Scale(domain=[r["test"] for r in self.data["thresholds"]], range=[[8, 4], [2, 3], [1, 0]]),
                legend=alt.Legend(orient="top", symbolType="stroke", labelLimit=400, columns=1),
            ),
            tooltip=[alt.Tooltip("test:N"), alt.Tooltip("value:Q", format=".5~g")],
        )
        text = "Experts sorted by their largest output, with the thresholds of the rule as horizontal lines."
        return self.chart("tail", text, alt.layer(rules, points), 300)

    def first_rest(self) -> Chart:
        x = alt.X("rest:Q", scale=alt.Scale(type="log"), title="largest output |y| on other tokens", axis=FINE_LOG)
        y = alt.Y("first:Q", scale=alt.Scale(type="log"), title="largest output |y| on first tokens", axis=LOG)
        base = self.on("experts").transform_filter("datum.first > 0 && datum.rest > 0")
        points = base.mark_point(filled=True, size=40, opacity=0.85).encode(
            x=x, y=y, color=self.verdicts(), tooltip=tooltips(*EXPERT)
        )
        line = self.on("diagonal").mark_line(color=self.color["muted"], strokeDash=[4, 4])
        diagonal = line.encode(x="rest:Q", y="first:Q")
        text = "Each expert's largest output on first tokens of sequences against that on all other tokens."
        return self.chart("first-rest", text, alt.layer(diagonal, points), 320)

    def by_layer(self) -> Chart:
        chart = self.two_series(
            "layers",
            self.across("row", spaced(self.rows), "layer"),
            "largest output |y|",
            ("largest expert", "median expert"),
        )
        text = "The largest and the median of the experts' largest outputs in every layer."
        return self.chart("by-layer", text, self._with_names(chart, "row"), 240)

    def by_expert(self) -> Chart:
        x = self.across("column", self.columns, "expert")
        chart = self.two_series(
            "columns", x, "largest output |y|", ("all layers", "layers of the rule"), extra=("expert",)
        )
        text = "The largest output of every expert number, over all layers and over those in which the rule looks."
        return self.chart("by-expert", text, self._with_names(chart, "column"), 240)

    def positions(self) -> Chart:
        x = alt.X(
            "position:Q",
            scale=alt.Scale(type="symlog", nice=False),
            title="position in its sequence or image",
            axis=COUNTS,
        )
        y = alt.Y("value:Q", scale=alt.Scale(type="log"), title="largest output |y| of the row", axis=LOG)
        kinds = alt.Shape(
            "tokens:N",
            title=None,
            scale=alt.Scale(domain=["first token", "other token"], range=["circle", "cross"]),
            legend=alt.Legend(orient="top", symbolStrokeColor=self.color["muted"]),
        )
        tips = tooltips("expert", "value", "gate", "token", "position", "domain", "sequence")
        points = self.on("kept").mark_point(size=60, strokeWidth=1.6).encode(
            x=x, y=y, color=self.verdicts("kept"), shape=kinds, tooltip=tips
        )  # fmt: skip
        text = "The strongest rows of the experts that stand out, by their position in the text, or in the image."
        return self.chart("positions", text, points, 260)

    def residual(self) -> Chart:
        chart = self.two_runs("residual", "element |x| of the residual stream", ("maximum", "median"), "log")
        text = "The largest and the median element of the residual stream after every layer."
        return self.chart("residual", text, chart, 240)

    def sinks(self) -> Chart:
        chart = self.two_runs(
            "sinks", "attention to the first token", ("strongest head", "mean of the heads"), "linear"
        )
        text = "Attention to the first token in every layer: the strongest head, and the mean of the heads."
        return self.chart("sinks", text, chart, 240)

    def ablation(self) -> Chart:
        sets = list(dict.fromkeys(record["set"] for record in self.data["ablation"]))
        x = alt.X(
            "change:Q", title=["change of perplexity,", "mean of the domains"], axis=alt.Axis(format="+~%", tickCount=6)
        )
        y = alt.Y("set:N", scale=alt.Scale(domain=sets), title=None, axis=alt.Axis(labelLimit=320))
        kinds = {"chosen": self.color["proved"], "control": self.color["other"]}
        color = alt.Color("kind:N", title=None, scale=ordinal(kinds), legend=None)
        points = self.on("ablation").mark_point(filled=True, size=80, opacity=0.85).encode(
            x=x, y=y, color=color, tooltip=tooltips("set", "experts", "change")
        )  # fmt: skip
        zero = self.on("zero").mark_rule(color=self.color["muted"]).encode(x="change:Q")
        text = "Change of perplexity without the chosen experts, beside that without random experts."
        return self.chart("ablation", text, alt.layer(zero, points), 28 * len(sets) + 20)

    def frontier(self) -> Chart:
        x = alt.X("size:Q", scale=alt.Scale(type="log", nice=False), title="MB of the routed experts", axis=FINE_LOG)
        scale = alt.Scale(type="symlog", constant=0.01, nice=False, padding=8)
        y = alt.Y("change:Q", scale=scale, title="change of perplexity", axis=CHANGES)
        colors = dict(zip(FORMATS_OF.values(), (self.color[name] for name in ("candidate", "undecided", "accent"))))
        legend = alt.Legend(orient="top", symbolType="stroke", symbolStrokeColor=self.color["muted"])
        there = {record["allocation"] for record in self.data["frontier"]}
        dashes = {"chosen": [1, 0], "protected": [6, 3], "at random": [1, 4]}
        dashes = {name: dash for name, dash in dashes.items() if name in there}
        base = self.on("frontier").encode(
            x=x,
            y=y,
            color=alt.Color("formats:N", title=None, scale=ordinal(colors), legend=alt.Legend(orient="top")),
            detail="seed:N",
            order="size:Q",
            tooltip=[
                *tooltips("formats", "allocation"),
                alt.Tooltip("size:Q", title="MB", format=",.3~r"),
                *tooltips("change", "interval"),
            ],
        )
        range_ = alt.Scale(domain=list(dashes), range=list(dashes.values()))
        lines = self.dotted(base, alt.StrokeDash("allocation:N", title=None, scale=range_, legend=legend))
        rules = self.on("increases").mark_rule(color=self.color["muted"], strokeDash=[2, 3]).encode(y="change:Q")
        text = "Change of perplexity against the size of the routed experts, by how their formats were chosen."
        return self.chart("frontier", text, alt.layer(rules, lines), 340)

    def timeline(self) -> Chart:
        x = alt.X("step:Q", title="training step", axis=alt.Axis(format=",d", grid=False))
        y = alt.Y("value:Q", scale=alt.Scale(type="log"), title="largest output |y|", axis=LOG)
        legend = alt.Legend(orient="top", symbolType="stroke")
        dashes = alt.Scale(domain=["expert", "median of its layer"], range=[[1, 0], [5, 4]])
        tips = [alt.Tooltip("step:Q", format=",d"), *tooltips("expert", "series", "value")]
        base = self.on("timeline").encode(
            x=x, y=y, color=alt.Color("expert:N", title=None, legend=legend), tooltip=tips
        )
        lines = self.dotted(base, alt.StrokeDash("series:N", title=None, scale=dashes, legend=legend))
        text = "The largest output of the candidates over training, and the median of the experts of their layers."
        return self.chart("timeline", text, lines, 260)

    def timeline_sinks(self) -> Chart:
        x = alt.X("step:Q", title="training step", axis=alt.Axis(format=",d", grid=False))
        names = ("attention sinks", "uniform attention")
        lines = self.two_series("timeline_sinks", x, "attention to the first token", names, "linear")
        text = "Attention to the first token over training, the mean of layers and heads."
        return self.chart("timeline-sinks", text, lines, 260)

    def coverage(self) -> Chart:
        x = self.across("row", spaced(self.rows), "layer")
        scale = alt.Scale(type="symlog", constant=10)
        tips = [
            alt.Tooltip("row:N", title="layer"),
            *(alt.Tooltip(f"rows_{n}:Q", title=f"rows, {n}", format=",") for n in ("min", "median", "max")),
        ]
        base = self.on("coverage").encode(x=x)
        low = alt.Y("rows_min:Q", scale=scale, title="rows of an expert", axis=COUNTS)
        band = base.mark_bar(color=self.color["other"], opacity=0.55, size=8).encode(
            y=low, y2="rows_max:Q", tooltip=tips
        )
        middle = base.mark_point(filled=True, color=self.color["accent"], opacity=1, size=40)
        few = self.on("coverage").mark_rule(color=self.color["proved"], strokeDash=[6, 4]).encode(y="mean(wanted):Q")
        layers = alt.layer(few, band, middle.encode(y="rows_median:Q", tooltip=tips))
        text = "Rows of the routed experts in every layer: fewest, median and most, and the least an expert should see."
        return self.chart("coverage", text, layers, 220)

    def headroom(self) -> Chart:
        x = self.across("row", spaced(self.rows), "layer")
        lines = self.two_series("headroom", x, "largest element", ELEMENTS)
        limits = self.on("limits").encode(y="value:Q")
        rules = limits.mark_rule(color=self.color["proved"], strokeDash=[6, 4])
        labels = limits.mark_text(align="left", dx=4, dy=-7, color=self.color["proved"], fontSize=12).encode(
            x=alt.value(0), text="format:N"
        )
        text = (
            "Largest input and output of the experts' down projections in every layer, and the limits of fp8 and fp16."
        )
        return self.chart("headroom", text, alt.layer(rules, lines, labels), 240)

    def kurtosis(self) -> Chart:
        x = self.across("row", spaced(self.rows), "layer")
        chart = self.two_series("kurtosis", x, "excess kurtosis", KURTOSIS, "linear")
        text = "Excess kurtosis of the experts' largest outputs in every layer, and the most it can be."
        return self.chart("kurtosis", text, chart, 220)

    def _with_names(self, chart: alt.LayerChart, field: str) -> alt.LayerChart | alt.FacetChart:
        """The chart, and in it the experts with a verdict by name where they stand."""
        there = {record["verdict"] for record in self.data["experts"]}
        layers = [chart]
        for verdict in (one for one in VERDICTS[:-1] if one in there):  # the colors of the chart have their own scale
            base = self.on("experts").transform_filter(alt.datum.verdict == verdict)
            color = alt.value(self.color[verdict])
            base = base.encode(x=f"{field}:N", y="value:Q", color=color, tooltip=tooltips(*EXPERT))
            names = base.mark_text(dy=-11, fontWeight="bold", fontSize=12).encode(text="expert:N")
            layers += [base.mark_point(filled=True, size=70, opacity=1), names]
        return chart if len(layers) == 1 else alt.layer(*layers)
