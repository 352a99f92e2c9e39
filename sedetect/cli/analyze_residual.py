"""sedetect analyze residual, trace: where massive activations form and who writes them, when and where experts fire."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sedetect.cli.shared import (
    MEASURE,
    Attn,
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
    app,
    check_writable,
    console,
    plain_table,
    print_line,
    progress_bar,
    saved_after,
)
from sedetect.cli.targets import check_choices, choose
from sedetect.errors import SedetectError
from sedetect.results import Results

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sedetect.calibration.windows import Windows
    from sedetect.experiments.residual_stream import Residual
    from sedetect.experiments.targets import Target
    from sedetect.experiments.traces import ExpertTrace, Group
    from sedetect.stats.note import Note
    from sedetect.stats.residual import Formation

analyze = typer.Typer(
    no_args_is_help=True, help="Look inside the experts: residual stream, traces, weights, outputs, routing."
)
app.add_typer(analyze, name="analyze", rich_help_panel=MEASURE)

ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="apply the tokenizer's chat template")]
_SHOWN = 12


@analyze.command("residual")
def residual_command(
    model: Model,
    ablated: Annotated[
        str | None,
        typer.Option(
            "--ablate",
            help="also observe with these switched off: candidates, names (L1E28,L8shared), random:N, top-frequency:N",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="sequences to observe, one at a time")] = 8,
    min_ratio: Annotated[
        float, typer.Option(help="smallest multiple of the median that counts as a massive activation")
    ] = 100.0,
    output: Output = None,
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
    """Observe the residual stream of MODEL, layer by layer, and its attention sinks.

    --tokens sets the text for the profile that 'candidates' needs; the observation itself uses --sequences windows.
    """
    from sedetect.calibration.windows import Text, calibration_windows, check_text, prefix_ids
    from sedetect.checkpoints.options import Loading
    from sedetect.experiments.ablation import ablate
    from sedetect.models.loading import prepare_model
    from sedetect.stats.residual import Observation

    if output is not None:
        check_writable(output)
    text = Text(tokens, seq_len, batch_size, chat_template=chat_template)
    check_text(data, text)
    prepared = prepare_model(model, loading=Loading(device, dtype, revision, attn, trust_remote_code))
    observed = replace(text, tokens=sequences * seq_len)
    domains = calibration_windows(prepared.empty, prepared.tokenizer, data, observed).domains
    if ablated is not None:
        check_choices("--ablate", ablated, prepared.empty)
    loaded, tokenizer, notes, _ = prepared.load()
    settings = {"prefix": len(prefix_ids(tokenizer)), "sequences": sequences, "min_ratio": min_ratio}
    experts: list[Target] = []
    if ablated is not None:
        experts = choose("--ablate", ablated, loaded, tokenizer, data, text)
    before = _observe("observing", loaded, domains, settings)
    after = None
    if experts:
        with ablate(loaded, experts):
            after = _observe("without them", loaded, domains, settings)
    observation = Observation(before, after, [str(e) for e in experts])
    with saved_after(None if output is None else Results(output).residual_path, observation.save):
        _print_residual(before, tokenizer, notes)
        if after is not None:
            _print_ablated(before, after, experts)


@analyze.command("trace")
def trace_command(
    model: Model,
    experts: Annotated[
        str, typer.Option(help="candidates, names (L1E28,L8shared), random:N or top-frequency:N")
    ] = "candidates",
    top: Annotated[int, typer.Option(min=1, help="strongest rows to keep of each expert")] = 100,
    output: Output = None,
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
    """Show at which positions and tokens chosen experts of MODEL fire, and how strongly."""
    from sedetect.calibration.windows import Text, calibration_windows, check_text
    from sedetect.checkpoints.options import Loading
    from sedetect.experiments.targets import choose_experts, needs_statistics
    from sedetect.experiments.traces import trace_experts
    from sedetect.models.loading import prepare_model
    from sedetect.stats.place import Weight

    if output is not None:
        check_writable(output)
    text = Text(tokens, seq_len, batch_size, chat_template=chat_template)
    check_text(data, text)
    prepared = prepare_model(model, loading=Loading(device, dtype, revision, attn, trust_remote_code))
    calibration = calibration_windows(prepared.empty, prepared.tokenizer, data, text)
    check_choices("--experts", experts, prepared.empty)
    named = [] if needs_statistics(experts) else choose_experts(experts, prepared.empty)
    single = next((one for one in named if isinstance(one, Weight)), None)
    if single is not None:
        raise SedetectError(f"--experts {single}: is a single weight; name experts to trace")
    loaded, tokenizer, notes, _ = prepared.load()
    chosen = choose("--experts", experts, loaded, tokenizer, data, text)
    if not chosen:
        return
    with progress_bar() as bar:
        task = bar.add_task("tracing", total=calibration.used)
        traces = trace_experts(
            loaded,
            calibration.domains,
            [one for one in chosen if not isinstance(one, Weight)],
            tokenizer=tokenizer,
            batch_size=batch_size,
            top=top,
            progress=lambda done: bar.advance(task, done),
        )
    with saved_after(None if output is None else Results(output).traces_path, traces.save):
        print_line(
            f"{traces.model}: {traces.tokens:,} tokens in {sum(traces.sequences.values()):,} sequences; the rows of "
            "each expert, of all such tokens"
        )
        for trace in traces.experts:
            _print_trace(trace)
        for note in [*notes, *calibration.notes, *traces.notes]:
            print_line(f"note: {note}")


def _observe(label: str, model: PreTrainedModel, domains: dict[str, Windows], settings: dict[str, Any]) -> Residual:
    from sedetect.experiments.residual_stream import observe_residual

    windows = min(settings["sequences"], sum(len(windows.ids) for windows in domains.values()))
    length = max(windows.ids.shape[1] for windows in domains.values())
    with progress_bar() as bar:
        task = bar.add_task(label, total=windows * length)
        return observe_residual(model, domains, **settings, progress=lambda done: bar.advance(task, done))


def _print_residual(residual: Residual, tokenizer: PreTrainedTokenizerBase, notes: list[Note]) -> None:
    print_line(residual.headline, "bold")
    table = plain_table(
        "layer", "max|x|", "/median", "channel", "pos", "token", "massive", "sink", "head max", left="token"
    )
    for layer in residual.layers:
        table.add_row(
            str(layer.layer),
            f"{layer.maximum:.5g}",
            "-" if layer.ratio is None else f"{layer.ratio:.0f}",
            str(layer.channel),
            str(layer.position),
            _text(str(tokenizer.decode([layer.token_id]))),
            str(layer.massive),
            _number(layer.sink_mean),
            _number(None if layer.sinks is None else max(layer.sinks)),
        )
    console.print(table)
    if residual.formations:
        _print_formations(residual.formations)
    shown = ", ".join(f"{domain} {count}" for domain, count in residual.sequences.items())
    print_line(f"{residual.model}: {sum(residual.sequences.values())} sequences of {residual.seq_len} tokens ({shown})")
    print_line(f"massive: |x| > {residual.min_value:g} and at least {residual.min_ratio:g} times the median")
    print_line("sink: attention to the first token, over the queries in the last three quarters of the sequences")
    for note in [*notes, *residual.notes]:
        print_line(f"note: {note}")


def _print_formations(formations: list[Formation]) -> None:
    """One line per layer, channel, position and token: the largest, and how many sequences have it."""
    places: dict[tuple[int, ...], list[Formation]] = defaultdict(list)
    for one in formations:
        places[one.layer, one.channel, one.position, one.token_id].append(one)
    table = plain_table(
        "formed in", "channel", "pos", "seqs", "before", "after", "attn", "writers", "up to", "undone", left="writers"
    )
    for (layer, channel, position, _), same in list(places.items())[:_SHOWN]:
        one = max(same, key=lambda f: abs(f.after))
        shares = [f"{w.expert} {w.share:.0%}" for w in one.writers if abs(w.share) >= 0.05]
        values = (f"{one.before:.4g}", f"{one.after:.4g}", "-" if one.attention is None else f"{one.attention:.0%}")
        place = (f"L{layer}", str(channel), str(position), str(len(same)))
        table.add_row(*place, *values, escape("\n".join(shares) or "-"), f"L{one.carried_to}", _undone(one))
    console.print(table)
    if len(places) > _SHOWN:
        print_line(f"... and {len(places) - _SHOWN} more")


def _undone(one: Formation) -> str:
    """The layer that removes at least half of it again, and the expert that does."""
    if one.undone_in is None:
        return "-"
    return f"L{one.undone_in}" if one.undone_by is None else f"{one.undone_by.expert} {one.undone_by.share:.0%}"


def _print_ablated(before: Residual, after: Residual, experts: list[Target]) -> None:
    from sedetect.experiments.residual_stream import sink_decay

    print_line(f"without {', '.join(map(str, experts))}", "bold")
    table = plain_table("layer", "max|x|", "without", "sink", "without", "D_sink")
    for old, new, decay in zip(before.layers, after.layers, sink_decay(before, after), strict=True):
        values = (f"{old.maximum:.5g}", f"{new.maximum:.5g}", _number(old.sink_mean), _number(new.sink_mean))
        table.add_row(str(old.layer), *values, _number(decay))
    console.print(table)
    print_line(
        f"mean sink {_number(before.sink_mean)} to {_number(after.sink_mean)}; largest |x| between the first and the "
        f"last layer {before.inner_max:.5g} to {after.inner_max:.5g}"
    )
    print_line("D_sink: the share of a layer's sink that is lost, which means nothing in a layer without sinks")


def _print_trace(trace: ExpertTrace) -> None:
    print_line(f"{trace.expert}: {trace.rows:,} rows", "bold")
    if not trace.rows:
        return
    table = plain_table("tokens", "rows", "of all", "max|y|", "mean", "routing weight")
    for name, group in {
        **trace.kinds,
        **{f"position {name}": group for name, group in trace.positions.items()},
    }.items():
        table.add_row(name, *_cells(group))
    for token in list(trace.tokens)[:_SHOWN]:
        table.add_row(f"#{token} {_text(trace.texts[token])}", *_cells(trace.tokens[token]))
    console.print(table)


def _cells(group: Group) -> list[str]:
    return [
        f"{group.rows:,}",
        f"{group.seen:,}",
        _number(group.maximum, 5),
        _number(group.mean, 4),
        _number(group.gate),
    ]


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _text(text: str | None) -> str:
    shown = repr(text or "")
    return escape(shown if len(shown) <= 12 else f"{shown[:11]}…")
