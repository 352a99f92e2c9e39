"""The development of experts in runs of examples/train_tiny_moe.py: the table and the figure of docs/formation.md.

    python examples/train_tiny_moe.py runs/qwen3-s0 --every 50          and so on, see docs/formation.md
    sedetect profile runs/qwen3-s0/model --prove -o runs/qwen3-s0/proved
    python benchmarks/formation.py runs --figure formation.png

Of each run: the loss at the end on the monitor's text, the expert with the largest |y| among the candidates (among all,
where there is none), when it came to lead its layer and when it became a candidate, the sinks and the largest
activation at the end, and what the proof found.
"""

import argparse
from pathlib import Path

import altair as alt
import vl_convert

from sedetect.ranking.rule import rank
from sedetect.stats.proof import Proof
from sedetect.training.histories import Timeline, timeline
from sedetect.training.series import Series

COLUMNS = (
    "run", "steps", "loss", "largest", "x median", "leads from", "candidate from", "sinks", "sinks from", "max x",
    "switched off", "sinks then", "verdict",
)  # fmt: skip


def row(folder: Path) -> list[str]:
    series = timeline(folder / "experts")
    last, proof = series.states[-1], None
    if (folder / "proved/proof.json").is_file():
        proof = Proof.load(folder / "proved")
    name, value, ratio, leads, since = largest(series, Series(folder / "experts"))
    return [
        folder.name, f"{last.step}", f"{last.loss:.3f}", f"{name} {value:.4g}", f"{ratio:.1f}", leads, since,
        "-" if last.sink_mean is None else f"{last.sink_mean:.1%}, best head {last.best_head:.0%}",
        "-" if series.sinks_from is None else f"{series.sinks_from}", f"{last.residual_max:.0f}", *proved(proof),
    ]  # fmt: skip


def largest(series: Timeline, states: Series) -> tuple[str, float, float, str, str]:
    """Name, |y|, ratio to the layer's median, and the steps from which on it leads and is a candidate."""
    if series.experts:
        one = max(series.experts, key=lambda one: one.values[-1] or 0.0)
        value, median = one.values[-1] or 0.0, one.medians[-1] or 1.0
        return str(one.expert), value, value / median, f"{one.leads_from}", f"{one.candidate_from}"
    found = rank(states.stats(series.states[-1]), min_value=0, min_ratio=0)
    one = max(found.judged, key=lambda one: one.value)
    return str(one), one.value, one.ratio or 0.0, "-", "never"


def proved(proof: Proof | None) -> list[str]:
    """Effect and sinks of the run that switches most off, and the verdicts."""
    if proof is None:
        return ["-", "-", "no candidate"]
    most = max(proof.runs, key=lambda run: len(run.experts))
    sinks = "-" if most.sink_mean is None else f"{proof.sink_mean:.1%} to {most.sink_mean:.1%}"
    verdicts = ", ".join(f"{one.expert} {one.level}" for one in proof.verdicts)
    return [f"{', '.join(most.experts)}: {most.effect}", sinks, verdicts]


def figure(folders: list[Path]) -> bytes:
    """|y| of each run's largest expert and of its layer's median, and the sinks, over the steps."""
    points = []
    for folder in folders:
        series = timeline(folder / "experts")
        one = max(series.experts or series.passing, key=lambda one: max(v or 0 for v in one.values), default=None)
        for number, state in enumerate(series.states):
            point = {"run": folder.name, "step": state.step, "attention on the first token": state.sink_mean}
            if one is not None:
                point |= {"largest |y|": one.values[number], "median of its layer": one.medians[number]}
            points.append(point)
    chart = alt.Chart(alt.InlineData(points))
    step, color = alt.X("step:Q"), alt.Color("run:N", scale=alt.Scale(scheme="tableau20"))
    values = chart.mark_line().encode(step, alt.Y("largest |y|:Q").scale(type="log"), color)
    medians = chart.mark_line(strokeDash=[2, 3]).encode(step, alt.Y("median of its layer:Q"), color)
    sinks = chart.mark_line().encode(step, alt.Y("attention on the first token:Q").axis(format="%"), color)
    size = {"width": 380, "height": 300}
    both = (values + medians).properties(**size) | sinks.properties(**size)
    return vl_convert.vegalite_to_png(both.to_json(), scale=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that contains one folder per run")
    parser.add_argument("--figure", type=Path, help="a PNG file")
    args = parser.parse_args()
    folders = sorted(folder.parent for folder in args.runs.glob("*/experts"))
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for folder in folders:
        print("| " + " | ".join(row(folder)) + " |")
    if args.figure is not None:
        args.figure.write_bytes(figure(folders))


if __name__ == "__main__":
    main()
