"""Print a proof: a sentence for each candidate, the runs, and the attention sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from sedetect.cli.shared import console, print_line

if TYPE_CHECKING:
    from sedetect.stats.proof import Effect, Proof, Verdict


def print_proof(proof: Proof) -> None:
    """Print the verdicts, then the details (print_runs)."""
    for verdict in proof.verdicts:
        print_line(f"{verdict.expert}: {verdict.level}: {verdict.reason}", "bold")
        for line in _more(verdict):
            print_line(f"  {line}")
    print_runs(proof)
    print_line(proof.sinks)


def print_runs(proof: Proof) -> None:
    """Print the table of runs, and the conditions under which experts were switched off."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("switched off", no_wrap=True)
    for name in ("perplexity", "interval", "sink", "residual"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("nothing", "", "", _number(proof.sink_mean, ".3f"), f"{proof.residual_max:.4g}")
    for run in [*proof.runs, *proof.controls]:
        seen = _number(run.sink_mean, ".3f"), _number(run.residual_max, ".4g")
        table.add_row(run.label, f"{run.effect.rise:+.2%}", _interval(run.effect), *seen)
    console.print(table)
    print_line(
        f"each at its trigger tokens alone, on {proof.tokens:,} tokens in {proof.documents} windows that the "
        f"statistics did not see; a rise of perplexity by {proof.smallest:.0%} matters; controls: other experts that "
        f"the same tokens visit; {proof.seconds:.0f} s"
    )
    for note in proof.notes:
        print_line(f"note: {note}")


def _more(verdict: Verdict) -> list[str]:
    lines = []
    if verdict.triggers:
        begin = f", {verdict.firsts:,} of which begin a sequence" if verdict.firsts else ""
        lines.append(f"fires on {verdict.triggers:,} tokens{begin}")
    if verdict.feeders:
        fed = ", ".join(f"{one.expert} ({one.left:.0%} of |y| left without it)" for one in verdict.feeders)
        lines.append(f"fed by {fed}")
    elif verdict.feeders is not None:
        lines.append("no upstream expert silences it when switched off")
    return lines


def _interval(effect: Effect) -> str:
    return f"{effect.low:+.2%} to {effect.high:+.2%}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
