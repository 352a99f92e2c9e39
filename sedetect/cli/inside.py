"""sedetect analyze weights, outputs, routing: the analyses of "A Closer Look into Mixture-of-Experts"."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from sedetect.analysis import Analysis, LayerArrays, Standing, parse_layers
from sedetect.cli.analyze import analyze
from sedetect.cli.saliency import load_ranked
from sedetect.cli.shared import (
    Device,
    Dtype,
    Model,
    Output,
    Revision,
    TrustRemoteCode,
    check_writable,
    console,
    plain_table,
    print_line,
    print_whole,
    progress_bar,
)
from sedetect.errors import SedetectError
from sedetect.stats import BankId
from sedetect.weight_analysis import analyze_weights, standings, summarize

Layers = Annotated[str | None, typer.Option(help="numbers of layers: 0,5,10-12 (default: all with experts)")]
Stats = Annotated[Path | None, typer.Option(help="statistics of this model, to mark its super experts (default: DIR)")]


@analyze.command("weights")
def weights_command(
    model: Model,
    against: Annotated[str | None, typer.Option(help="a dense model of the same width: its MLPs take part as F")] = None,
    pairs: Annotated[int, typer.Option(help="pairs of experts per layer whose neurons are matched")] = 32,
    stats: Stats = None,
    layers: Layers = None,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """How alike the experts of MODEL are in their weights, layer by layer, without running it."""
    chosen = parse_layers(layers)
    if output is not None:
        check_writable(output)
    options = {"device": device, "dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    with progress_bar("layers") as bar:
        task = bar.add_task("reading", total=None)
        result = analyze_weights(
            model,
            against=against,
            layers=chosen,
            pairs=pairs,
            progress=lambda label, done, total: bar.update(task, description=label, completed=done, total=total),
            **options,
        )
    marked = _marked(result, stats, output)
    _print_weights(result)
    _print_standings(result, marked, standings)
    _finish(result, output)


def _print_weights(result: Analysis) -> None:
    names = {"similarity": "matrices", "neuron_similarity": "mean neurons", "matched": "matched", "r2": "R2"}
    summaries = {bank: summarize(layer) for bank, layer in result.layers.items()}
    shown = {field: name for field, name in names.items() if any(field in of for of in summaries.values())}
    table = plain_table("layer", *shown.values())
    for bank, of in summaries.items():
        table.add_row(layer_name(bank), *(" ".join(f"{v:.2f}" for v in of.get(field, {}).values()) for field in shown))
    print_whole(table)
    matrices = ", ".join(next(iter(summaries.values()))["similarity"])
    print_line(
        f"{result.model}: cosines of {matrices}, means over the pairs of routed experts of a layer: whole matrices; their "
        "mean neurons; whole matrices after their neurons were matched; R2: how much of the similarity of gate embeddings "
        "that of mean neurons explains"
    )
    chance = [v for of in summaries.values() for v in of.get("chance", {}).values()]
    if chance:
        print_line(f"matched neurons of random matrices give {min(chance):.2f} to {max(chance):.2f}")
    if "r2" in shown:
        means = {name: fmean(of["r2"][name] for of in summaries.values() if "r2" in of) for name in matrices.split(", ")}
        print_line(f"R2, mean of the layers: {', '.join(f'{name} {value:.2f}' for name, value in means.items())}")


def _print_standings(
    result: Analysis, marked: dict[str, str], of: Callable[[LayerArrays, int], dict[str, Standing]]
) -> None:
    """A table for every marked expert: its numbers, beside those of its layer."""
    for name, bank, expert in _places(result, marked):
        layer = result.layers[bank]
        print_line(f"{name} ({marked[name]}) among the {layer.experts} routed experts of its layer", "bold")
        table = plain_table("", "value", "median", "place")
        for what, one in of(layer, expert).items():
            table.add_row(what, f"{one.value:.3g}", f"{one.median:.3g}", str(one.place))
        console.print(table)


def layer_name(bank: BankId) -> str:
    """A bank of routed experts as a row of a table: "L1", "encoder.L1", "L1 vision"."""
    stack = "" if bank.stack == "decoder" else f"{bank.stack}."
    return f"{stack}L{bank.layer} {bank.kind.removeprefix('routed').removeprefix('_')}".rstrip()


def _marked(result: Analysis, stats: Path | None, output: Path | None) -> dict[str, str]:
    """Verdict of every super expert and outlier of the statistics; those in the folder of results where none are given."""
    if stats is None:
        if output is None or not (output / "stats.safetensors").is_file():
            return {}
        stats = output
    state, ranking = load_ranked(stats)
    if state.header.digest != result.digest:
        raise SedetectError(f"{stats}: statistics of another model ({state.header.model}); profile {result.model}")
    return {str(e): e.verdict for e in ranking.super_experts + ranking.others if e.verdict in ("super", "outlier")}


def _places(result: Analysis, marked: dict[str, str]) -> list[tuple[str, BankId, int]]:
    """(name, bank, place among the members) of the marked experts that the analysis is of."""
    return [
        (name, bank, place)
        for bank, layer in result.layers.items()
        for place, name in enumerate(layer.members[: layer.experts])
        if name in marked
    ]


def _finish(result: Analysis, output: Path | None) -> None:
    for note in result.notes:
        print_line(f"note: {note}")
    if output is not None:
        print_line(f"written to {result.save(output)}")
