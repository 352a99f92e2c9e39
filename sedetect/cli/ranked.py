"""Shared by the commands that read statistics for compression: the option --by, loading, and the table by layer."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from sedetect.cli.choices import Saliency
from sedetect.cli.shared import console
from sedetect.results import Results

if TYPE_CHECKING:
    from sedetect.ranking.result import Ranking
    from sedetect.ranking.saliencies import Saliencies
    from sedetect.stats.model import ModelStats

_SHOWN = 3  # experts at each end of a layer

By = Annotated[Saliency, typer.Option(help="a saliency")]


def load_ranked(stats: Path) -> tuple[ModelStats, Ranking]:
    """Statistics and their ranking, which uses the residual stream and the proof where the profile's folder holds
    them.
    """
    from sedetect.ranking.rule import rank

    results = Results(stats)
    state = results.stats()
    return state, rank(state, residual=results.residual(), proof=results.proof())


def print_saliency(known: Saliencies) -> None:
    """Print the ranks of the experts to protect, and a table of the lowest and highest experts of each layer."""
    found = [
        f"{one['name']} ({one['verdict']}; {one['place']} of {one['of']} from below)" for one in known.super_experts
    ]
    headline = f"{known.model} by {known.by}; to protect, in their layers: {', '.join(found) or 'none'}"
    console.print(headline, style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("layer", "lowest", "median", "highest"):
        table.add_column(name, justify="right" if name == "median" else "left")
    for layer in known.layers:
        stack, number, kind = layer["bank"].split(".")
        name = f"{'' if stack == 'decoder' else stack + '.'}L{number}{kind.removeprefix('routed')}"
        order, values, rows = layer["ascending"], layer["values"], layer["rows"]
        measured = [value for value, seen in zip(values, rows) if value is not None and seen]
        middle = _short(statistics.median(measured)) if measured else "-"
        low, high = order[: min(_SHOWN, len(order) // 2)], order[::-1][: min(_SHOWN, (len(order) + 1) // 2)]
        table.add_row(escape(name), _listed(low, values, rows), middle, _listed(high, values, rows))
    console.print(table)
    text = (
        "each layer's experts with the lowest and the highest saliency, and the median of those that saw rows; "
        "values of different layers are not comparable"
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _listed(experts: list[int], values: list[float | None], rows: list[int]) -> str:
    # No break between an expert and its number.
    def shown(value: float | None, seen: int) -> str:
        return "no\u00a0row" if not seen else "unknown" if value is None else _short(value)

    return "  ".join(f"E{e}\u00a0{shown(values[e], rows[e])}" for e in experts)


def _short(value: float) -> str:
    return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"
