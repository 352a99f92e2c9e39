"""sedetect prune: write a checkpoint with fewer experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sedetect.cli.choices import Merge, Spread
from sedetect.cli.ranked import By, load_ranked
from sedetect.cli.shared import (
    COMPRESS,
    Attn,
    BatchSize,
    Data,
    Device,
    Dtype,
    Folder,
    SeqLen,
    Tokens,
    app,
    check_writable,
    print_line,
    progress_bar,
)
from sedetect.files import check_new_folder
from sedetect.results import Results

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from sedetect.compression.merging import Groups
    from sedetect.stats.place import BankId, Place


@app.command("prune", rich_help_panel=COMPRESS)
def prune_command(
    model: Folder,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="the new checkpoint folder; a folder of them for several ratios")
    ],
    ratio: Annotated[
        list[float] | None, typer.Option(help="share of the experts to prune; may be repeated (default: 0.25)")
    ] = None,
    by: By = "reap",
    budget: Annotated[
        Spread, typer.Option(help="even: the same number in each layer; global: the lowest of all layers")
    ] = "even",
    floor: Annotated[
        int | None, typer.Option(help="fewest experts that the global budget leaves in a layer (default: top-k)")
    ] = None,
    protect: Annotated[
        Literal["candidates", "none"],
        typer.Option(help="candidates: keep candidates and proved super experts regardless of saliency"),
    ] = "candidates",
    merge: Annotated[
        Merge | None, typer.Option(help="average pruned experts into kept ones, in groups of this method")
    ] = None,
    stats: Annotated[Path | None, typer.Option(help="statistics of this model (default: profile it first)")] = None,
    data: Data = None,
    tokens: Tokens = 32768,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    attn: Attn = None,
) -> None:
    """Write a checkpoint of MODEL without each layer's least salient experts."""
    from sedetect.analysis.weights import check_installed
    from sedetect.calibration.windows import Text, calibration_windows, check_text
    from sedetect.checkpoints.options import Loading
    from sedetect.compression.merging import align_neurons, expert_distances, group_nearest, group_ream
    from sedetect.compression.pruning import (
        check_folder,
        check_prunable,
        choose_kept,
        prunable_config,
        prune_checkpoint,
        refuse_quantized,
        router_groups,
    )
    from sedetect.models.loading import open_model
    from sedetect.profiling.pipeline import profile_model
    from sedetect.ranking.coverage import unseen, unseen_note
    from sedetect.ranking.rule import rank
    from sedetect.ranking.saliencies import found_places, saliency
    from sedetect.stats.place import Place

    ratios = sorted(set(ratio or [0.25]))
    outputs = {one: output / f"{one:g}" if len(ratios) > 1 else output for one in ratios}
    for one in ratios:
        check_prunable(model, one, budget=budget, floor=floor)
    config = prunable_config(model)
    if merge is not None:
        refuse_quantized(model, config)
    if merge == "ream":
        check_installed()
    check_new_folder(output)
    check_writable(output)
    text, loading = Text(tokens, seq_len, batch_size), Loading(device, dtype, attn=attn)
    if stats is None or merge == "ream":
        check_text(data, text)
    opened = open_model(model, loading=loading) if merge == "ream" else None
    with progress_bar() as bar:
        task = bar.add_task("loading", total=None)

        def show(domain: str, done: int, total: int | None) -> None:
            bar.update(task, description=domain, completed=done, total=total)

        if stats is None:
            given, tokenizer = (model, None) if opened is None else (opened.model, opened.tokenizer)
            state = profile_model(given, data, text=text, loading=loading, tokenizer=tokenizer, progress=show).stats
            ranking = rank(state)
        else:
            state, ranking = load_ranked(stats)
            check_folder(model, state)
    found = found_places(ranking)
    fed_by = [] if stats is None or merge is None else _feeders(Results(stats), found)
    safe = [*found, *fed_by] if protect == "candidates" else []
    choose = partial(choose_kept, state, by, groups=router_groups(config), budget=budget, floor=floor)
    plans = {one: choose(one, safe) for one in ratios}
    groups: dict[float, Groups | None] = dict.fromkeys(ratios)
    exempt = [*found, *fed_by]
    if merge == "nearest":
        groups = {one: group_nearest(model, state, kept, exempt) for one, kept in plans.items()}
    elif opened is not None:
        banks = [bank for bank in opened.banks if bank.id.routed]
        windows = calibration_windows(opened.model, opened.tokenizer, data, text).domains
        with progress_bar() as bar:
            task = bar.add_task("comparing experts", total=sum(one.ids.numel() for one in windows.values()))
            near = expert_distances(
                opened.model, banks, windows, batch_size=batch_size, progress=lambda _, count: bar.advance(task, count)
            )
        for one, kept in plans.items():
            groups[one] = align_neurons(opened.model, banks, group_ream(near, state, by, kept, exempt))
    levels = ", ".join(f"{expert} ({expert.verdict})" for expert in ranking.found)
    sizes = {bank: len(values) for bank, values in saliency(state, by).items()}
    for one, kept in plans.items():
        unknown = [place for place in unseen(state) if place.number not in kept[place.bank]]
        facts = {
            "model": state.header.model,
            "digest": state.header.digest,
            "by": by,
            "ratio": one,
            "budget": budget,
            "tokens": state.header.tokens,
            "super_experts": [str(place) for place in found],
            "unproved": [str(expert) for expert in ranking.found if expert.verdict != "proved"],
            "protected": protect == "candidates",
            "unseen": [str(place) for place in unknown],
        } | ({} if merge is None else {"merge": merge})
        with progress_bar("bytes") as bar:
            task = bar.add_task("writing", total=None)

            def written(done: int, total: int, bar: Progress = bar, task: TaskID = task) -> None:
                bar.update(task, completed=done, total=total)

            notes = prune_checkpoint(model, outputs[one], kept, groups=groups[one], facts=facts, progress=written)
        lost = [str(p) for p in found if p.kind == "routed" and p.expert not in kept[p.bank]]
        print_line(f"{outputs[one]}: {_counted(kept, sizes)}, by {by}", "bold")
        if merge is not None:
            print_line(_merged(merge, groups[one] or {}, sum(sizes.values()) - sum(map(len, kept.values()))))
        if not found:
            print_line(f"nothing to protect: {ranking.headline}")
        elif protect == "candidates":
            alone = choose(one)
            saved = [str(p) for p in found if p.kind == "routed" and p.expert not in alone[p.bank]]
            print_line(f"protected: {levels}; {by} alone would prune {', '.join(saved) or 'none of them'}")
        else:
            print_line(f"not protected: {levels}; pruned of them: {', '.join(lost) or 'none'}")
        moved = [
            (p, p.bank, kept[p.bank].index(p.number)) for p in found if p.bank in kept and p.number in kept[p.bank]
        ]
        now = ", ".join(f"{place} is {Place(*bank, number)} now" for place, bank, number in moved)
        print_line(f"experts are renumbered, as pruning.json says{': ' if now else ''}{now}")
        if unknown:
            notes.append(unseen_note(unknown, "pruned", state.header.tokens))
        for note in notes:
            print_line(f"note: {note}")


def _feeders(results: Results, found: list[Place]) -> list[Place]:
    """The feeders of the experts found, where a proof looked for feeders."""
    from sedetect.stats.place import parse_place

    proof = results.proof()
    verdicts = [] if proof is None else [one for one in proof.verdicts if parse_place(one.expert) in found]
    named = dict.fromkeys(feeder.expert for verdict in verdicts for feeder in verdict.feeders or ())
    return [place for place in map(parse_place, named) if place not in found]


def _merged(merge: str, groups: Groups, gone: int) -> str:
    merged = [len(group.weights) - 1 for mine in groups.values() for group in mine.values()]
    return f"merged by {merge}: {sum(merged)} of {gone} pruned experts, into {len(merged)} others; the rest are dropped"


def _counted(kept: dict[BankId, list[int]], sizes: dict[BankId, int]) -> str:
    left = sorted(map(len, kept.values()))
    if left[0] == left[-1]:
        return f"{left[0]} of {max(sizes.values())} experts in each of {len(kept)} layers"
    return f"{sum(left)} of {sum(sizes.values())} experts, {left[0]} to {left[-1]} in each of {len(kept)} layers"
