"""sedetect budget: the cost of compression, and the gain from keeping a few experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from sedetect.cli.choices import GROUP, Saliency
from sedetect.cli.ranked import load_ranked
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
    from sedetect.compression.frontier import Curve, Frontier
    from sedetect.ranking.result import Ranking


@app.command("budget", rich_help_panel=COMPRESS)
def budget_command(
    model: Model,
    experts: Annotated[str, typer.Option(help="to keep: candidates, or names (L1E28,L9E7)")] = "candidates",
    ratio: Annotated[list[float] | None, typer.Option(help="pruning ratios (default: 0.125, 0.25, 0.5)")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="fp8, int2 to int8 (default: int8, fp8, int4, int3, int2)")
    ] = None,
    by: Annotated[Saliency | None, typer.Option(help="saliency to prune by (default: reap)")] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="choose a format for each expert, and for each layer, at several sizes")
    ] = False,
    group: Annotated[int, typer.Option(min=1, help="inputs per scale of the formats")] = GROUP,
    controls: Annotated[
        int, typer.Option(min=0, help="random sets of the same size to keep instead, or random allocations")
    ] = 3,
    stats: Annotated[Path | None, typer.Option(help="statistics of this model (default: profile it first)")] = None,
    output: Output = None,
    data: Data = None,
    tokens: Annotated[
        int,
        typer.Option(
            help="tokens of text: half are profiled, half evaluated; with --stats, all are evaluated, on text "
            "outside the statistics; --frontier measures sensitivity on half of the evaluated ones"
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
    from sedetect.compression.allocations import check_milp
    from sedetect.compression.budget import RATIOS, Compressions, make_budget
    from sedetect.compression.frontier import LEVELS, Frontier, make_frontier
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
    if frontier:
        check_milp()
        for name, given in (("--ratio", ratio), ("--by", by)):
            if given is not None:
                raise SedetectError(
                    f"{name}: --frontier prunes by measured sensitivity, expert by expert; leave it out"
                )
    if output is not None:
        check_writable(output)
    text = Text(tokens, seq_len, batch_size)
    check_text(data, text)
    state, ranking = (None, None) if stats is None else load_ranked(stats)
    prepared = prepare_model(model, loading=Loading(device, dtype, revision, attn, trust_remote_code))
    refuse_without_logits(prepared.empty, "perplexity")
    check_choice(experts, prepared.empty)
    expert_sizes(prepared.empty)  # refuse unsupported input before anything is measured
    if state is not None:
        check_statistics(state.header, prepared.empty, str(stats))
    # as much as was asked for, beyond the text of the statistics
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
        left = held_out(domains, state, None if stats is None else tokens)

        def progress(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)

        made: Budget | Frontier
        if frontier:
            made = make_frontier(
                loaded, left, state, chosen, LEVELS if formats is None else formats, prefix=len(prefix_ids(tokenizer)),
                group=group, seeds=controls, batch_size=batch_size, progress=progress,
            )  # fmt: skip
        else:
            made = make_budget(
                loaded,
                left,
                state,
                chosen,
                Compressions(
                    by or "reap", RATIOS if ratio is None else ratio, FORMATS if formats is None else formats, group
                ),
                prefix=len(prefix_ids(tokenizer)),
                controls=controls,
                batch_size=batch_size,
                progress=progress,
            )
    if not any(windows.source in state.header.sources for windows in domains.values()):
        made.notes.append("the statistics come from other windows and may include some of the evaluation text")
    results = Results(output or "")
    if isinstance(made, Frontier):
        with saved_after(None if output is None else results.frontier_path, made.save):
            _print_frontier(made, ranking)
    else:
        with saved_after(None if output is None else results.budget_path, made.save):
            _print(made, ranking)


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
    print_line(
        f"change of perplexity, mean over domains, on {sum(budget.tokens.values()):,} tokens that are not among the "
        f"calibrated windows; unchanged ({budget.dtype}): {base}"
    )
    last = budget.rows[-1] if budget.rows else None
    if last is not None and last.kept is not None:
        levels = {str(expert): f"{expert} ({expert.verdict})" for expert in ranking.judged if expert.verdict}
        kept = ", ".join(levels.get(name, name) for name in budget.kept)
        extra = f"{last.kept.size - last.bare.size:.2%}"
        print_line(f"kept: {kept}, which adds {extra} to the size of the routed experts at {last.name}")
    print_line(f"formats round to nearest, with one scale per output channel and {budget.group} inputs")
    print_line(f"pruning is by {budget.by}, the same number in each layer")
    for note in budget.notes:
        print_line(f"note: {note}")


def _print_frontier(frontier: Frontier, ranking: Ranking) -> None:
    from sedetect.compression.frontier import KEPT_BITS, conclusion

    print_line(ranking.headline, "bold")
    for line in conclusion(frontier):
        print_line(line)
    found = {(curve.by, curve.protected, curve.seed): curve for curve in frontier.curves}
    seeds = sorted({curve.seed for curve in frontier.curves if curve.seed is not None})
    kinds = [(by, protected) for by in ("model", "layer", "expert") for protected in (False, True)]
    kinds = [kind for kind in kinds if (*kind, None) in found]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names = {"model": "one", "layer": "layer", "expert": "expert"}
    heads = ["bits"]
    for by, protected in kinds:
        heads.append(names[by] + "+" * protected)
        if by != "model" and not protected and seeds:
            heads.append("random")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    limits = sorted({p.limit for c in frontier.curves for p in c.points}, reverse=True)
    for limit in limits:
        cells = [f"{KEPT_BITS * limit / frontier.whole:.2f}"]
        for by, protected in kinds:
            cells.append(_at(found[by, protected, None], limit))
            if by != "model" and not protected and seeds:
                dealt = [p.change.rise for seed in seeds for p in found[by, False, seed].points if p.limit == limit]
                cells.append(_rise(sum(dealt) / len(dealt)) if dealt else "-")
        table.add_row(*cells)
    console.print(table)
    base = ", ".join(f"{domain} {value:.2f}" for domain, value in frontier.baseline.items())
    print_line(
        f"change of perplexity by bits per weight of the routed experts, on {sum(frontier.tokens.values()):,} tokens; "
        f"unchanged ({frontier.dtype}): {base}"
    )
    print_line(f"the routed experts take {frontier.whole / 1e6:.3g} MB at {KEPT_BITS} bits")
    if frontier.protected:
        print_line(f"+: {', '.join(frontier.protected)} kept, beyond that size where one format is for all")
    if seeds:
        print_line(f"random: the same formats dealt out at random, {len(seeds)} times, on average")
    print_line(f"sensitivity was measured on {frontier.sensitivity_tokens:,} other tokens")
    print_line(f"formats round to nearest, with one scale per output channel and {frontier.group} inputs")
    for note in frontier.notes:
        print_line(f"note: {note}")


def _at(curve: Curve, limit: float) -> str:
    point = next((point for point in curve.points if point.limit == limit), None)
    return "-" if point is None else _rise(point.change.rise)


def _rise(rise: float) -> str:
    return f"{rise:+.1%}" if rise < 1 else f"{rise:+.0%}"


def _change(cost: Cost | None) -> str:
    return "-" if cost is None else f"{cost.mean_change:+.2%}"
