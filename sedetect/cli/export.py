"""sedetect export: protect lists and channel statistics in the formats of other tools."""

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
    from sedetect.compression.protect import Extra
    from sedetect.stats.model import ModelStats


@app.command("export", rich_help_panel=COMPRESS)
def export_command(
    stats: Annotated[Path, typer.Argument(help="a statistics file, or the folder of a profile", metavar="STATS")],
    to: Annotated[Target, typer.Option(help="imatrix: of profile --channels")],
    runtime: Annotated[
        Runtime | None,
        typer.Option(
            "--for",
            help="runtime that will load the quantized checkpoint; only formats tested to load there are written",
        ),
    ] = None,
    granularity: Annotated[
        Granularity, typer.Option(help="expert, or layer: all experts of a protected expert's layer")
    ] = "expert",
    neighbours: Annotated[int, typer.Option(help="also protect the N routed experts with the next largest |y|")] = 0,
    with_feeders: Annotated[
        bool, typer.Option("--with-feeders", help="also the experts that feed them (prove --chain)")
    ] = False,
    plan: Annotated[
        Path | None,
        typer.Option(help="frontier.json of budget --frontier: its smallest plan that loads, in place of 4 bits"),
    ] = None,
    increase: Annotated[
        float | None, typer.Option(min=0, help="of perplexity, at most, by the plan (default: 0.05, which is 5%)")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="checkpoint folder, for group sizes and sizes in bytes")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="file (default: print the list)")] = None,
) -> None:
    """Export the experts that a quantizer should skip, in its config format: all but refuted candidates."""
    from sedetect.compression.channels import write_imatrix
    from sedetect.compression.protect import export, extra_sizes, protect_list
    from sedetect.ranking.coverage import unseen, unseen_note

    if to == "imatrix" and output is None:
        raise SedetectError("--to imatrix: writes a binary file; give it a name with -o")
    if to == "imatrix" and plan is not None:
        raise SedetectError(f"--plan {plan}: an imatrix holds no formats; leave it out")
    if to == "imatrix" and runtime is not None:
        raise SedetectError(f"--for {runtime}: an imatrix is for llama.cpp alone; leave it out")
    if plan is None and increase is not None:
        raise SedetectError(f"--increase {increase:g}: chooses among plans; give --plan, or leave it out")
    if plan is not None and (neighbours or with_feeders):
        option = "--with-feeders" if with_feeders else f"--neighbours {neighbours}"
        raise SedetectError(f"{option}: a plan already sets the format of every expert; leave it out")
    state, ranking = load_ranked(stats)
    if output is not None and to == "imatrix":
        count = write_imatrix(state, output)
        _say(f"{output}: {count} entries, of the inputs of down_proj; other matrices were not measured")
        if unknown := unseen(state):
            _say(f"note: {unseen_note(unknown, 'routed', state.header.tokens)}")
        return
    if plan is not None:
        _export_plan(state, plan, to, runtime, granularity, model, 0.05 if increase is None else increase, output)
        return
    proof = Results(stats).proof() if with_feeders else None
    if with_feeders and proof is None:
        raise SedetectError(f"--with-feeders: {stats} has no proof.json; run `sedetect prove MODEL --chain -o {stats}`")
    experts = protect_list(state, neighbours, ranking, proof)
    sizes = _sizes(extra_sizes(state, experts, model))
    document, notes = export(state, experts, to, granularity, runtime, model)
    _write(document, output)
    quiet = output is None  # standard output is the document alone
    _say(f"protected: {', '.join(f'{expert.place} ({expert.why})' for expert in experts)}, by {granularity}", quiet)
    _say(sizes, quiet)
    for note in notes:
        _say(f"note: {note}", quiet)


def _export_plan(
    state: ModelStats,
    plan: Path,
    to: Target,
    runtime: Runtime | None,
    granularity: Granularity,
    model: Path | None,
    increase: float,
    output: Path | None,
) -> None:
    from sedetect.compression.frontier import Frontier
    from sedetect.compression.plans import export_plan

    if runtime is None:
        raise SedetectError("--plan: a plan needs a runtime that is tested to load it; name one with --for")
    document, notes = export_plan(Frontier.load(plan), state, to, runtime, granularity, model, increase)
    _write(document, output)
    for note in notes:
        _say(f"note: {note}", output is None)


def _write(document: dict | str, output: Path | None) -> None:
    text = document if isinstance(document, str) else json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(output, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _sizes(extra: list[Extra]) -> str:
    """One line: the size that each granularity adds where all other experts are stored in 4 bits."""
    parts = []
    for one in extra:
        size = f"{one.share:+.2%}" if one.nbytes is None else f"{one.nbytes:+,.0f} bytes ({one.share:+.2%})"
        parts.append(f"{one.granularity}: {one.kept} of {one.experts} routed experts, {size}")
    return f"size at 16 bits, where all routed experts would have 4: {'; '.join(parts)}"


def _say(text: str, quiet: bool = False) -> None:
    (stderr if quiet else console).print(text, markup=False, highlight=False, soft_wrap=True)
