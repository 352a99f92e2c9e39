"""sedetect export: protect lists and channel statistics in the forms that other tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sedetect.cli.choices import Granularity, Runtime, Target
from sedetect.cli.ranked import load_ranked
from sedetect.cli.shared import COMPRESS, app, console, stderr
from sedetect.errors import SedetectError
from sedetect.files import write_atomic
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.stats.model import ModelStats


@app.command("export", rich_help_panel=COMPRESS)
def export_command(
    stats: Annotated[Path, typer.Argument(help="a statistics file, or the folder of a profile", metavar="STATS")],
    to: Annotated[Target, typer.Option(help="imatrix: of profile --channels")],
    runtime: Annotated[
        Runtime | None,
        typer.Option("--for", help="what is to load the quantized checkpoint; only what was seen to load is written"),
    ] = None,
    granularity: Annotated[
        Granularity, typer.Option(help="expert, or layer: all experts of a protected expert's layer")
    ] = "expert",
    neighbours: Annotated[int, typer.Option(help="also protect the N routed experts with the next largest |y|")] = 0,
    with_feeders: Annotated[
        bool, typer.Option("--with-feeders", help="also the experts that feed them (prove --chain)")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="checkpoint folder, for group sizes and sizes in bytes")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="file (default: print the list)")] = None,
) -> None:
    """Export the experts that a quantizer should skip, in its config format: all but refuted candidates."""
    from sedetect.compression.channels import write_imatrix
    from sedetect.compression.protect import export, protect_list
    from sedetect.ranking.coverage import unseen, unseen_note

    if to == "imatrix" and output is None:
        raise SedetectError("--to imatrix: writes a binary file; give it a name with -o")
    if to == "imatrix" and runtime is not None:
        raise SedetectError(f"--for {runtime}: an imatrix is for llama.cpp alone; leave it out")
    state, ranking = load_ranked(stats)
    if output is not None and to == "imatrix":
        count = write_imatrix(state, output)
        _say(f"{output}: {count} entries, of the inputs of down_proj; other matrices were not measured")
        if unknown := unseen(state):
            _say(f"note: {unseen_note(unknown, 'routed', state.header.tokens)}")
        return
    proof = Results(stats).proof() if with_feeders else None
    if with_feeders and proof is None:
        raise SedetectError(f"--with-feeders: {stats} has no proof.json; run `sedetect prove MODEL --chain -o {stats}`")
    experts = protect_list(state, neighbours, ranking, proof)
    sizes = _sizes(state, experts, model)
    document, notes = export(state, experts, to, granularity, runtime, model)
    text = document if isinstance(document, str) else json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    quiet = output is None  # standard output is the document alone
    _say(f"protected: {', '.join(f'{expert.place} ({expert.why})' for expert in experts)}, by {granularity}", quiet)
    _say(sizes, quiet)
    for note in notes:
        _say(f"note: {note}", quiet)


def _sizes(state: ModelStats, experts: list, model: Path | None) -> str:
    """One line: what each granularity costs, where the experts are otherwise stored in 4 bits."""
    from sedetect.compression.protect import GRANULARITIES, kept_experts
    from sedetect.compression.simulated import expert_sizes

    total = sum(s.num_experts for bank, s in state.banks.items() if bank.routed)
    sizes = None
    if model is not None:
        from sedetect.models.identity import join_digest, model_id
        from sedetect.models.loading import empty_model
        from sedetect.stats.model import same_model

        empty = empty_model(model)
        if not same_model(state.header.digest, join_digest(model_id(empty), None)):  # sizes are all that is read of it
            raise SedetectError(
                f"--model {model}: the statistics are of another model ({state.header.model}); give the folder of that "
                "one"
            )
        sizes = expert_sizes(empty)
    parts = []
    for granularity in GRANULARITIES:
        kept = kept_experts(state, experts, granularity)
        count = sum(kept.values())
        text = f"{granularity}: {count} of {total} routed experts"
        if sizes is None:
            text += f", {12 / 4 * count / total:+.2%}"
        else:
            extra = sum(sizes[bank][0] * number for bank, number in kept.items()) * 12 / 8
            whole = sum(one * number for one, number in sizes.values()) * 4 / 8
            text += f", {extra:+,.0f} bytes ({extra / whole:+.2%})"
        parts.append(text)
    return f"size at 16 bits, where all routed experts would have 4: {'; '.join(parts)}"


def _say(text: str, quiet: bool = False) -> None:
    (stderr if quiet else console).print(text, markup=False, highlight=False, soft_wrap=True)
