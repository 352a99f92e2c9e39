"""sedetect prune: a checkpoint with fewer experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

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


@app.command("prune", rich_help_panel=COMPRESS)
def prune_command(
    model: Folder,
    output: Annotated[Path, typer.Option("-o", "--output", help="the new checkpoint folder")],
    ratio: Annotated[float, typer.Option(help="share of each layer's experts to prune")] = 0.25,
    by: By = "reap",
    protect: Annotated[
        Literal["candidates", "none"],
        typer.Option(help="candidates: keep them, and proved super experts, whatever their saliency"),
    ] = "candidates",
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
    from sedetect.calibration.windows import Text, check_text
    from sedetect.checkpoints.options import Loading
    from sedetect.compression.pruning import (
        check_folder,
        check_prunable,
        choose_kept,
        prunable_config,
        prune_checkpoint,
        router_groups,
    )
    from sedetect.profiling.pipeline import profile_model
    from sedetect.ranking.coverage import unseen, unseen_note
    from sedetect.ranking.rule import rank
    from sedetect.ranking.saliencies import found_places, saliency
    from sedetect.stats.place import Place

    check_prunable(model, ratio)
    check_new_folder(output)
    check_writable(output)
    if stats is None:
        check_text(data, Text(tokens, seq_len, batch_size))
    with progress_bar() as bar:
        task = bar.add_task("loading", total=None)

        def show(domain: str, done: int, total: int | None) -> None:
            bar.update(task, description=domain, completed=done, total=total)

        if stats is None:
            text, loading = Text(tokens, seq_len, batch_size), Loading(device, dtype, attn=attn)
            state = profile_model(model, data, text=text, loading=loading, progress=show).stats
            ranking = rank(state)
        else:
            state, ranking = load_ranked(stats)
            check_folder(model, state)
    found = found_places(ranking)
    groups = router_groups(prunable_config(model))
    kept = choose_kept(state, by, ratio, found if protect == "candidates" else (), groups=groups)
    unknown = [place for place in unseen(state) if place.number not in kept[place.bank]]
    facts = {
        "model": state.header.model,
        "digest": state.header.digest,
        "by": by,
        "ratio": ratio,
        "tokens": state.header.tokens,
        "super_experts": [str(place) for place in found],
        "unproved": [str(expert) for expert in ranking.found if expert.verdict != "proved"],
        "protected": protect == "candidates",
        "unseen": [str(place) for place in unknown],
    }
    with progress_bar("bytes") as bar:
        task = bar.add_task("writing", total=None)
        notes = prune_checkpoint(
            model, output, kept, facts=facts, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    experts, left = len(next(iter(saliency(state, by).values()))), len(next(iter(kept.values())))
    lost = [str(p) for p in found if p.kind == "routed" and p.expert not in kept[p.bank]]
    levels = ", ".join(f"{expert} ({expert.verdict})" for expert in ranking.found)
    print_line(f"{output}: {left} of {experts} experts in each of {len(kept)} layers, by {by}", "bold")
    if not found:
        print_line(f"nothing to protect: {ranking.headline}")
    elif protect == "candidates":
        alone = choose_kept(state, by, ratio, groups=groups)
        saved = [str(p) for p in found if p.kind == "routed" and p.expert not in alone[p.bank]]
        print_line(f"protected: {levels}; {by} alone would prune {', '.join(saved) or 'none of them'}")
    else:
        print_line(f"not protected: {levels}; pruned of them: {', '.join(lost) or 'none'}")
    moved = [(p, p.bank, kept[p.bank].index(p.number)) for p in found if p.bank in kept and p.number in kept[p.bank]]
    now = ", ".join(f"{place} is {Place(*bank, number)} now" for place, bank, number in moved)
    print_line(f"experts are renumbered, as pruning.json says{': ' if now else ''}{now}")
    if unknown:
        notes.append(unseen_note(unknown, "pruned", state.header.tokens))
    for note in notes:
        print_line(f"note: {note}")
