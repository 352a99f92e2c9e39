"""sedetect analyze weights, outputs, routing: the analyses of "A Closer Look into Mixture-of-Experts"."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from sedetect.cli.analyze_residual import ChatTemplate, analyze
from sedetect.cli.ranked import load_ranked
from sedetect.cli.shared import (
    Attn,
    Backend,
    BatchSize,
    Data,
    Device,
    Dtype,
    Model,
    Output,
    Revision,
    SeqLen,
    Tokens,
    TrustRemoteCode,
    check_writable,
    plain_table,
    print_line,
    print_whole,
    progress_bar,
    saved_after,
)
from sedetect.errors import SedetectError
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.analysis.common import Analysis, LayerArrays
    from sedetect.analysis.tables import Cells
    from sedetect.calibration.windows import Text
    from sedetect.checkpoints.options import Loading
    from sedetect.ranking.result import Ranking
    from sedetect.stats.model import ModelStats

    _Known = tuple[Path, ModelStats, Ranking]  # statistics to mark experts by, and where they lie

DEFAULT_TEXT = "As an open source alternative to"  # the published analysis's
_TEXT_LAYERS = 8  # layers that a table by token shows
Against = Annotated[str | None, typer.Option(help="a dense model of the same width, whose MLPs are compared as F")]
Layers = Annotated[str | None, typer.Option(help="layer numbers: 0,5,10-12 (default: all with experts)")]
Texts = Annotated[
    list[str] | None,
    typer.Option(help=f"a short text to show token by token; may be repeated (default: '{DEFAULT_TEXT}')"),
]
Stats = Annotated[
    Path | None,
    typer.Option(help="statistics of this model, to mark its candidates (default: those in the folder of -o)"),
]
Figures = Annotated[
    bool,
    typer.Option(
        "--figures",
        help="with -o: also draw the layers with candidates and one without, or all of --layers, as PNG and SVG",
    ),
]


@analyze.command("weights")
def weights_command(
    model: Model,
    against: Against = None,
    pairs: Annotated[int, typer.Option(help="pairs of experts per layer whose neurons are matched")] = 32,
    stats: Stats = None,
    layers: Layers = None,
    output: Output = None,
    figures: Figures = False,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare the experts' weights, layer by layer, without running MODEL."""
    from sedetect.analysis.common import parse_layers
    from sedetect.analysis.weights import analyze_weights
    from sedetect.checkpoints.options import Loading

    known = _check(stats, output, figures)
    with progress_bar("layers") as bar:
        task = bar.add_task("reading", total=None)
        result = analyze_weights(
            model,
            against=against,
            layers=parse_layers(layers),
            pairs=pairs,
            loading=Loading(device, dtype, revision, trust_remote_code=trust_remote_code),
            progress=lambda label, done, total: bar.update(task, description=label, completed=done, total=total),
        )
    _finish(result, known, output, figures, layers)


@analyze.command("outputs")
def outputs_command(
    model: Model,
    texts: Texts = None,
    against: Against = None,
    stats: Stats = None,
    layers: Layers = None,
    output: Output = None,
    figures: Figures = False,
    data: Data = None,
    tokens: Tokens = 8192,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    chat_template: ChatTemplate = False,
    device: Device = None,
    dtype: Dtype = "auto",
    backend: Backend = None,
    revision: Revision = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare all experts' outputs on all tokens, and the routers' choices with them."""
    from sedetect.analysis.common import parse_layers
    from sedetect.analysis.outputs import analyze_outputs
    from sedetect.calibration.windows import Text
    from sedetect.checkpoints.options import Loading
    from sedetect.ops.choose import check_backend

    known = _check(stats, output, figures)
    check_backend(backend)
    run = partial(analyze_outputs, against=against, batch_size=batch_size, backend=backend)
    text = Text(tokens, seq_len, batch_size, chat_template=chat_template)
    loading = Loading(device, dtype, revision, attn, trust_remote_code)
    result = _over_text(run, model, known, texts, parse_layers(layers), data, text, loading, against)
    _finish(result, known, output, figures, layers)


@analyze.command("routing")
def routing_command(
    model: Model,
    texts: Texts = None,
    stats: Stats = None,
    layers: Layers = None,
    output: Output = None,
    figures: Figures = False,
    data: Data = None,
    tokens: Tokens = 8192,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    chat_template: ChatTemplate = False,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which experts MODEL chooses: load by layer and domain, co-activation, token by token."""
    from sedetect.analysis.common import parse_layers
    from sedetect.analysis.routing import analyze_routing
    from sedetect.calibration.windows import Text
    from sedetect.checkpoints.options import Loading

    known = _check(stats, output, figures)
    run = partial(analyze_routing, batch_size=batch_size)
    text = Text(tokens, seq_len, batch_size, chat_template=chat_template)
    loading = Loading(device, dtype, revision, attn, trust_remote_code)
    result = _over_text(run, model, known, texts, parse_layers(layers), data, text, loading)
    _finish(result, known, output, figures, layers)


def _check(stats: Path | None, output: Path | None, figures: bool) -> _Known | None:
    """Check the outputs before the work starts, and return the statistics to mark experts by: by default those of the
    folder of results.
    """
    if output is not None:
        check_writable(output)
    elif figures:
        raise SedetectError("--figures: needs a folder; give one with -o DIR")
    if figures:
        _write_figures()
    if stats is None and output is not None and Results(output).stats_path.is_file():
        stats = output
    return None if stats is None else (stats, *load_ranked(stats))


def _check_statistics(known: _Known | None, result: Analysis) -> None:
    """Raise SedetectError for statistics of another model."""
    from sedetect.models.identity import other_model
    from sedetect.stats.model import same_model

    if known is not None and not same_model(known[1].header.digest, result.digest):
        raise other_model(known[1].header, result.digest, str(known[0]), _remedy(result.model), result.dtype)


def _remedy(name: str) -> str:
    return f"give those of {name} with --stats, or another folder with -o"


def _write_figures() -> Callable[..., int]:
    try:
        from sedetect.report.write import write_pictures
    except ModuleNotFoundError as error:
        raise SedetectError(f"--figures needs {error.name}; install it with: pip install 'sedetect[report]'") from None
    return write_pictures


def _over_text(
    run: Callable[..., Analysis],
    model: str,
    known: _Known | None,
    texts: list[str] | None,
    layers: list[int] | None,
    data: str | None,
    text: Text,
    loading: Loading,
    against: str | None = None,
) -> Analysis:
    """Load a model, cut the text, and run an analysis over both. against: what run will be."""
    from sedetect.analysis.common import groups_of, read_texts
    from sedetect.analysis.dense import DenseModel
    from sedetect.calibration.windows import calibration_windows, check_text
    from sedetect.checkpoints.options import Loading
    from sedetect.models.banks import find_banks
    from sedetect.models.identity import check_statistics, model_name
    from sedetect.models.loading import prepare_model

    check_text(data, text)
    prepared = prepare_model(model, loading=loading)
    groups = groups_of(find_banks(prepared.empty), layers)
    if against is not None:
        DenseModel(against, Loading("cpu")).check(groups)
    short = read_texts(prepared.tokenizer, [DEFAULT_TEXT] if texts is None else texts)
    calibration = calibration_windows(prepared.empty, prepared.tokenizer, data, text)
    if known is not None:
        header, name = known[1].header, str(known[0])
        check_statistics(header, prepared.empty, name, _remedy(model_name(prepared.empty)))
    loaded, _, notes, _ = prepared.load()
    if known is not None:
        check_statistics(header, loaded, name, _remedy(model_name(loaded)))
    with progress_bar() as bar:
        task = bar.add_task("running", total=calibration.used)
        result = run(
            loaded,
            calibration.domains,
            texts=short,
            layers=layers,
            progress=lambda domain, done: bar.update(task, description=domain, advance=done),
        )
    result.notes += map(str, [*notes, *calibration.notes])
    return result


def _finish(result: Analysis, known: _Known | None, output: Path | None, figures: bool, layers: str | None) -> None:
    """Print the tables, and write what there is a folder for. layers: those asked for, all of which are drawn."""
    from sedetect.analysis.tables import marked_experts

    marked = {} if known is None else marked_experts(known[2])
    path = None if output is None else Results(output).analysis_path(result.kind)
    with saved_after(path, lambda path: result.save(path.parent)):
        _check_statistics(known, result)
        print_line(f"{result.model}: {result.kind}", "bold")
        _print(result, marked)
    if figures and output is not None:
        drawn = Results(output).figures_path
        with progress_bar("pictures") as bar:
            task = bar.add_task("figures", total=None)
            count = _write_figures()(
                result,
                marked,
                drawn,
                lambda n, of: bar.update(task, completed=n, total=of),
                every=layers is not None,
            )
        print_line(f"{count} pictures as PNG and SVG in {drawn}")


def _print(result: Analysis, marked: dict[str, str]) -> None:
    from sedetect.analysis.tables import layers_table, standings_tables

    layers = layers_table(result)
    _print_cells(layers)
    print_line(layers.text)
    for title, cells in standings_tables(result, marked).items():
        print_line(title, "bold")
        _print_cells(cells)
    if result.kind != "weights":
        _print_tokens(result, set(marked))
    for note in result.notes:
        print_line(f"note: {note}")


def _print_cells(cells: Cells) -> None:
    table = plain_table(*cells.columns)
    for row in cells.rows:
        table.add_row(*map(escape, row))
    print_whole(table)


def _print_tokens(result: Analysis, marked: set[str]) -> None:
    """A table for every text: a row per token, a column per layer."""
    from sedetect.analysis.tables import Cells, layer_name

    known = [(bank, layer) for bank, layer in result.layers.items() if "text.index" in layer.arrays]
    start, shown = 0, known[:_TEXT_LAYERS]
    of, columns = (_choice, [""]) if result.kind == "routing" else (_largest, ["", " norm", " place"])
    for text in result.settings["texts"] if shown else ():
        cells = Cells(["token", *(f"{layer_name(bank)}{column}" for bank, _ in shown for column in columns)])
        for place, token in enumerate(text["tokens"], start):
            cells.rows.append([repr(token), *(cell for _, layer in shown for cell in of(layer, place, marked))])
        start += len(text["tokens"])
        _print_cells(cells)
    if not result.settings["texts"] or not shown:
        return
    what = {
        "routing": "experts chosen for each token, by routing weight",
        "outputs": "for each token the expert with the largest output, with its norm and its place among the chosen",
    }[result.kind]
    more = f"; the first {len(shown)} of {len(known)} layers (--layers chooses)" if len(known) > len(shown) else ""
    print_line(what + more + ("; *: an expert marked above" if marked else ""))


def _choice(layer: LayerArrays, token: int, marked: set[str]) -> list[str]:
    return [" ".join(f"{e}{'*' * (layer.members[e] in marked)}" for e in _chosen(layer, token))]


def _largest(layer: LayerArrays, token: int, marked: set[str]) -> list[str]:
    """The expert, its norm, and its place among the chosen."""
    norms = layer.arrays["text.norm"][token, : layer.experts]
    if not norms.isfinite().all():
        return ["-", "NaN or Inf", "-"]
    if len(norms) > 1 and norms.min() == norms.max():
        return ["-", "all equal", "-"]
    largest, chosen = int(norms.argmax()), _chosen(layer, token)
    place = str(chosen.index(largest) + 1) if largest in chosen else "-"
    return [f"{largest}{'*' * (layer.members[largest] in marked)}", f"{float(norms[largest]):.3g}", place]


def _chosen(layer: LayerArrays, token: int) -> list[int]:
    """Experts that a token of the texts chose, the one with the largest routing weight first."""
    index, weight = (layer.arrays[f"text.{name}"][token] for name in ("index", "weight"))
    order = weight.argsort(descending=True, stable=True).tolist()
    return [int(index[slot]) for slot in order if weight[slot] and 0 <= index[slot] < layer.experts]
