"""sedetect stability: does the set depend on the thresholds, or on the text?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from sedetect.cli.compare import Json, Runs, load_runs
from sedetect.cli.shared import PROVE, app, check_file, console, print_line
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.ranking.stability import Agreement, Grid

_SHOWN = 20


@app.command("stability", rich_help_panel=PROVE)
def stability_command(stats: Runs, json: Json = None) -> None:
    """Show whether the candidates change with the thresholds or with the text.

    Each argument gets a grid of thresholds. A single profile folder is compared across its domains and, if it was made
    with --until-stable, across its rounds (disjoint shards of the text). Several arguments (profiles of one model on
    different text) are compared with each other.
    """
    if json is not None:
        check_file("--json", json, stats)
    from sedetect.ranking.stability import Stability, agreement, margins, sensitivity, verdict_sensitivity

    runs = load_runs(stats)
    grids = {name: sensitivity(run) for name, run in runs.items()}
    verdicts = {name: verdict_sensitivity(run) for name, run in runs.items()}
    distances = {name: margins(run) for name, run in runs.items()}
    results = Results(stats[0])
    alone = {"domains": results.domains, "rounds": results.rounds}
    parts = {"runs": runs} if len(runs) > 1 else {name: some.load() for name, some in alone.items()}
    agreed = {name: agreement(some) for name, some in parts.items() if len(some) > 1}
    for name, grid in grids.items():
        _print_grid(name, grid)
        _print_verdicts(verdicts[name])
        _print_margins(distances[name])
    for name, one in agreed.items():
        _print_agreement(name, one)
    if not agreed:
        print_line(
            "agreement: needs at least two parts; give a folder with several domains or rounds, or several profiles"
        )
    if json is not None:
        Stability(grids, verdicts, agreed, distances).save(json)


def _print_grid(name: str, grid: Grid) -> None:
    total = len(grid.cells)
    if grid.constant:
        found = ", ".join(grid.cells[0].found)
        said = f"the candidates are the same under all {total} pairs of thresholds: {found}"
        print_line(f"{name}: {said if found else f'no candidate under any of {total} pairs of thresholds'}", "bold")
    else:
        print_line(f"{name}: the candidates depend on the thresholds", "bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("percentile", no_wrap=True)
    table.add_column("experts", no_wrap=True)
    for fraction in grid.fractions:
        table.add_column(f"{fraction:g} of max", justify="right", no_wrap=True)
    for percentile in grid.percentiles:
        row = grid.row(percentile)
        table.add_row(f"P{percentile:g}", "candidates", *(str(len(cell.found)) for cell in row))
        table.add_row("", "in the set", *(str(len(cell.named)) for cell in row))
    console.print(table)
    if not grid.constant:
        for names in dict.fromkeys(cell.found for cell in grid.cells):
            pairs = [f"P{c.percentile:g} and {c.fraction:g}" for c in grid.cells if c.found == names]
            more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
            print_line(f"{', '.join(names) or 'none'}: {', '.join(pairs[:3])}{more}")


def _print_verdicts(verdicts: dict[str, dict[float, tuple[str, ...]]]) -> None:
    """Print one line per threshold of the verdict."""
    for name, by_value in verdicts.items():
        values = list(by_value)
        usual = by_value[values[len(values) // 2]]
        others = [
            f"{', '.join(found) or 'none'} at {value:g}"
            for value, found in by_value.items()
            if set(found) != set(usual)
        ]
        said = f"{', '.join(usual) or 'none'} at {values[len(values) // 2]:g}, " + "; ".join(others)
        same = f"the same candidates from {values[0]:g} to {values[-1]:g}"
        print_line(f"--{name.replace('_', '-')}: {said if others else same}")


def _print_margins(distances: dict[str, dict[str, float]]) -> None:
    """Print one line per expert: the factor by which it passes or misses each threshold."""
    for expert, by in list(distances.items())[:_SHOWN]:
        print_line(f"{expert} by threshold: {', '.join(f'{what} {x:.3g}' for what, x in by.items())}")


def _print_agreement(name: str, agreed: Agreement) -> None:
    found = ", ".join(agreed.found[0])
    count = len(agreed.parts)
    if agreed.same:
        said = f"the same candidates in each of {count} {name} alone: {found}"
        print_line(said if found else f"no candidate in any of {count} {name} alone", "bold")
    else:
        print_line(f"the candidates differ over {count} {name}, mean Jaccard {agreed.mean_jaccard:.2f}", "bold")
        for part, names in zip(agreed.parts, agreed.found, strict=True):
            print_line(f"  {part}: {', '.join(names) or 'none'}")
    if not agreed.experts:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("expert", no_wrap=True)
    for column in ("candidate in", "in set of", "lowest max|y|", "highest", "highest/lowest"):
        table.add_column(column, justify="right", no_wrap=True)
    for expert in agreed.experts[:_SHOWN]:
        spread = f"{expert.highest / expert.lowest:.2f}" if expert.lowest else "-"
        sets = (f"{expert.found}/{count}", f"{expert.named}/{count}")
        table.add_row(escape(expert.name), *sets, f"{expert.lowest:.5g}", f"{expert.highest:.5g}", spread)
    console.print(table)
    if len(agreed.experts) > _SHOWN:
        print_line(f"... and {len(agreed.experts) - _SHOWN} more")
