"""sedetect budget: what compression costs, and what keeping a few experts buys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from sedetect.cli.choices import GROUP
from sedetect.cli.ranked import By, load_ranked
from sedetect.cli.shared import (
    COMPRESS,
    Attn,
    BatchSize,
    Data,
    Device,
    Dtype,
    Model,
    Output,
    Revision,
    SeqLen,
    TrustRemoteCode,
    app,
    check_writable,
    console,
    print_line,
    progress_bar,
    saved_after,
)
from sedetect.errors import SedetectError
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.compression.budget import Budget, Cost
    from sedetect.ranking.result import Ranking


@app.command("budget", rich_help_panel=COMPRESS)
def budget_command(
    model: Model,
    experts: Annotated[str, typer.Option(help="to keep: candidates, or names (L1E28,L9E7)")] = "candidates",
    ratio: Annotated[list[float] | None, typer.Option(help="pruning ratios (default: 0.125, 0.25, 0.5)")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="fp8, int2 to int8 (default: int8, fp8, int4, int3, int2)")
    ] = None,
    by: By = "reap",
    group: Annotated[int, typer.Option(min=1, help="inputs per scale of the formats")] = GROUP,
    controls: Annotated[int, typer.Option(min=0, help="random sets of the same size to keep instead")] = 3,
    stats: Annotated[Path | None, typer.Option(help="statistics of this model (default: profile it first)")] = None,
    output: Output = None,
    data: Data = None,
    tokens: Annotated[
        int,
        typer.Option(
            help="tokens of text: half are profiled, half evaluated; with --stats all, on text they did not see"
        ),
    ] = 32768,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    attn: Attn = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure perplexity against compression of the experts, with and without protection."""
    from sedetect.calibration.held_out import held_out
    from sedetect.calibration.windows import Text, calibration_windows, check_text, prefix_ids
    from sedetect.checkpoints.options import Loading
    from sedetect.compression.budget import RATIOS, Compressions, make_budget
    from sedetect.compression.pruning import check_ratio
    from sedetect.compression.simulated import FORMATS, bits_of, expert_sizes
    from sedetect.experiments.targets import check_choice, choose_experts
    from sedetect.models.identity import check_statistics
    from sedetect.models.layers import refuse_without_logits
    from sedetect.models.loading import prepare_model
    from sedetect.profiling.pipeline import profile_model
    from sedetect.ranking.rule import rank
    from sedetect.ranking.saliencies import found_places

    for name in formats or ():
        bits_of(name)
    for number in ratio or ():
        check_ratio(number)
    if output is not None:
        check_writable(output)
    text = Text(tokens, seq_len, batch_size)
    check_text(data, text)
    state, ranking = (None, None) if stats is None else load_ranked(stats)
    prepared = prepare_model(model, loading=Loading(device, dtype, revision, attn, trust_remote_code))
    refuse_without_logits(prepared.empty, "perplexity")
    check_choice(experts, prepared.empty)
    expert_sizes(prepared.empty)  # refuse what cannot be compressed before anything is measured
    if state is not None:
        check_statistics(state.header, prepared.empty, str(stats))
    # beyond what the statistics saw, as much as is asked for
    seen = 0 if state is None else state.header.tokens
    more = replace(text, tokens=tokens + seen)
    calibration = calibration_windows(prepared.empty, prepared.tokenizer, data, more)
    domains = calibration.domains
    if stats is None and all(len(windows.ids) < 2 for windows in domains.values()):
        raise SedetectError(
            f"--tokens {tokens}: one window of {seq_len} tokens in each domain, which cannot be both profiled and "
            "evaluated; give more text, more --tokens or a smaller --seq-len"
        )
    loaded, tokenizer, _, _ = prepared.load()
    expert_sizes(loaded)  # quantized ones may not be
    if state is not None:
        check_statistics(state.header, loaded, str(stats))
    with progress_bar("runs") as bar:
        task = bar.add_task("profile", total=None)
        if state is None or ranking is None:
            half = replace(text, tokens=calibration.used // 2)
            state = profile_model(loaded, data, text=half, tokenizer=tokenizer).stats
            ranking = rank(state)
        chosen = found_places(ranking) if experts == "candidates" else choose_experts(experts, loaded, state)
        budget = make_budget(
            loaded,
            held_out(domains, state, None if stats is None else tokens),
            state,
            chosen,
            Compressions(by, RATIOS if ratio is None else ratio, FORMATS if formats is None else formats, group),
            prefix=len(prefix_ids(tokenizer)),
            controls=controls,
            batch_size=batch_size,
            progress=lambda label, done, total: bar.update(task, description=label, completed=done, total=total),
        )
    if not any(windows.source in state.header.sources for windows in domains.values()):
        budget.notes.append("the statistics are of other windows; they may have seen some of the evaluation text")
    with saved_after(None if output is None else Results(output).budget_path, budget.save):
        _print(budget, ranking)


def _print(budget: Budget, ranking: Ranking) -> None:
    from sedetect.compression.budget import conclusion
    from sedetect.experiments.study import badness

    print_line(ranking.headline, "bold")
    for line in conclusion(budget):
        print_line(line)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("experts", no_wrap=True)
    for name in ("size", "nothing kept", "kept", "random kept", "worst", "best"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in budget.rows:
        changes = sorted((cost.mean_change for cost in row.random), key=badness)
        random = (sum(changes) / len(changes), changes[-1], changes[0]) if changes else ()
        cells = [f"{row.bare.size:.1%}", f"{row.bare.mean_change:+.2%}", _change(row.kept)]
        table.add_row(row.name, *cells, *(f"{change:+.2%}" for change in random))
    console.print(table)
    base = ", ".join(f"{domain} {value:.2f}" for domain, value in budget.baseline.perplexity.items())
    more = ""
    last = budget.rows[-1] if budget.rows else None
    if last is not None and last.kept is not None:
        extra = last.kept.size - last.bare.size
        levels = {str(expert): f"{expert} ({expert.verdict})" for expert in ranking.judged if expert.verdict}
        kept = ", ".join(levels.get(name, name) for name in budget.kept)
        more = f"; kept: {kept}, which adds {extra:.2%} to the size at {last.name}"
    print_line(
        "size: of the routed experts' weights; change of perplexity, mean over domains, on "
        f"{sum(budget.tokens.values()):,} tokens that are not among the calibrated windows; unchanged "
        f"({budget.dtype}): {base}{more}. Formats: round to nearest, one scale per output channel and {budget.group} "
        f"inputs. Pruning: by {budget.by}, the same number in each layer."
    )
    for note in budget.notes:
        print_line(f"note: {note}")


def _change(cost: Cost | None) -> str:
    return "-" if cost is None else f"{cost.mean_change:+.2%}"
