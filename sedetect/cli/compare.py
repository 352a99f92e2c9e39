"""sedetect compare: profiles side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from sedetect.cli.shared import FILES, app, check_file, console, print_line
from sedetect.errors import SedetectError
from sedetect.files import STATS
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.ranking.comparison import Comparison, Moved
    from sedetect.stats.model import ModelStats

_SHOWN = 20

Runs = Annotated[list[Path], typer.Argument(help="statistics files or folders of profiles", metavar="STATS|DIR...")]
Json = Annotated[Path | None, typer.Option("--json", help="write the result to this file")]


@app.command("compare", rich_help_panel=FILES)
def compare_command(stats: Runs, json: Json = None) -> None:
    """Compare the candidates of two or more profiles.

    Exit codes: 0 where all have the same candidates, 1 where they differ, 2 wrong arguments or input.
    """
    if json is not None:
        check_file("--json", json, stats)
    from sedetect.ranking.comparison import compare

    if len(stats) < 2:
        raise SedetectError(f"{stats[0]}: nothing to compare a single run with; give two or more")
    runs = load_runs(stats)
    kept = [None if pruning is None else pruning.kept for pruning in (_results(path).pruning() for path in stats)]
    comparison = compare(list(runs.values()), list(runs), kept)
    _print(comparison)
    parts = [_results(path).modalities.load() for path in stats]
    for modality in parts[0]:
        if all(modality in part for part in parts):
            alone = compare([part[modality] for part in parts], list(runs), kept)
            print_line(f"{modality} tokens alone: {_headline(alone)}")
            if not alone.equal:
                found = (f"{run.name} {', '.join(run.found) or 'none'}" for run in alone.runs)
                print_line(f"  {'; '.join(found)}")
    if json is not None:
        comparison.save(json)
    if not comparison.equal:
        raise typer.Exit(1)


def _results(path: Path) -> Results:
    """The folder of an argument, which is that folder or a statistics file in it."""
    return Results(path.parent if path.name == STATS else path)


def load_runs(paths: list[Path]) -> dict[str, ModelStats]:
    """Name -> statistics: the name of a folder or file (of its folder, for stats.safetensors), or where two share one
    their paths, or where two share a path a number after it.

    Raises SedetectError for what ModelStats.load refuses.
    """
    from sedetect.stats.model import ModelStats

    def short(path: Path) -> str:
        path = path.parent if path.name == STATS else path
        return (path.resolve() if path.name in ("", "..") else path).name.removesuffix(".safetensors")

    names = [short(path) for path in paths]
    names = [str(path) if names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]
    names = [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
    return {name: ModelStats.load(path) for name, path in zip(names, paths, strict=True)}


def _print(comparison: Comparison) -> None:
    runs, steps = comparison.runs, comparison.steps
    print_line(_headline(comparison), style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    for name in ("dtype", "tokens", "rank corr."):
        table.add_column(name, justify="right" if name != "dtype" else "left", no_wrap=True)
    table.add_column("candidates", overflow="fold")
    table.add_column("against the run before", overflow="fold")
    for number, run in enumerate(runs):
        step = steps[number - 1] if number else None
        correlation = "" if step is None else "-" if step.correlation is None else f"{step.correlation:.4f}"
        change = "" if step is None else _changes(step.joined, step.left)
        cells = (escape(run.name), run.dtype, f"{run.tokens:,}", correlation, ", ".join(run.found) or "none", change)
        table.add_row(*cells)
    console.print(table)
    if comparison.moved:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("expert", no_wrap=True)
        for name in ("first", "last", "last/first", "lowest", "highest", "channel", "candidate in"):
            table.add_column(name, justify="right", no_wrap=True)
        for moved in comparison.moved[:_SHOWN]:
            table.add_row(*_cells(moved))
        console.print(table)
        if len(comparison.moved) > _SHOWN:
            print_line(f"... and {len(comparison.moved) - _SHOWN} more")
    for step, run in zip(steps, runs[1:], strict=True):
        if step.named_joined != step.joined or step.named_left != step.left:
            print_line(f"note: the paper's set in {run.name}: {_changes(step.named_joined, step.named_left)}")
    for note in comparison.notes:
        print_line(f"note: {note}")


def _headline(comparison: Comparison) -> str:
    last = ", ".join(comparison.runs[-1].found) or "none"
    if comparison.equal and not comparison.runs[0].found:
        return f"no candidate in any of {len(comparison.runs)} runs"
    if comparison.equal:
        return f"the same candidates in all {len(comparison.runs)} runs: {last}"
    if comparison.formed is not None:
        formed = _formed(comparison, comparison.formed)
        if not comparison.runs[-1].found:
            return f"the candidates differ; none is left from {formed} on"
        return f"the candidates differ; those of the last run ({last}) stand from {formed} on"
    return "the candidates differ"


def _formed(comparison: Comparison, number: int) -> str:
    return f"{comparison.runs[number].name} (run {number + 1} of {len(comparison.runs)})"


def _changes(joined: tuple[str, ...], left: tuple[str, ...]) -> str:
    return ", ".join([f"+{name}" for name in joined] + [f"-{name}" for name in left]) or "same"


def _cells(moved: Moved) -> list[str]:
    first, last = ("-" if c is None else str(c) for c in (moved.channels[0], moved.channels[-1]))
    finite = [value for value in moved.values if not math.isnan(value)]
    return [
        moved.name,
        *("-" if math.isnan(value) else f"{value:.5g}" for value in (moved.values[0], moved.values[-1])),
        "-" if moved.ratio is None else f"{moved.ratio:.3g}",
        f"{min(finite):.5g}",
        f"{max(finite):.5g}",
        first if first == last and not moved.channel_changed else f"{first} > {last}",
        f"{sum(moved.found)}/{len(moved.found)}",
    ]
