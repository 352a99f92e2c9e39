"""Print a profile: the table of candidates, the coverage line, and super_experts.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sedetect.ranking.result import Ranking, SuperExpert
    from sedetect.stats.model import ModelStats
    from sedetect.stats.residual import Residual


_SHOWN = 12
_SAID = {True: "yes", False: "no", None: "-"}
_STYLES = {"proved": "bold green", "candidate": "yellow", "undecided": "yellow", "refuted": "dim", None: "dim"}


def ranking_document(ranking: Ranking, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """super_experts.json: Ranking.to_dict(), and for every expert "token", the text of its token_id (None: unknown)."""
    document = ranking.to_dict()
    for expert in document["super_experts"] + document["others"]:
        expert["token"] = _token(tokenizer, expert["token_id"])
    return document


def print_ranking(
    console: Console,
    ranking: Ranking,
    tokenizer: PreTrainedTokenizerBase | None = None,
    residual: Residual | None = None,
) -> None:
    """The headline, a table of the paper's set and of the candidates beside it, and the evidence."""
    console.print(ranking.headline, style="bold", markup=False, highlight=False, soft_wrap=True)
    experts = ranking.judged
    if experts:
        console.print(ranking_table(ranking, tokenizer))
        if len(experts) > _SHOWN:
            console.print(f"... and {len(experts) - _SHOWN} more")
        for expert in experts[:_SHOWN]:
            if expert.verdict is not None:
                _line(console, evidence(expert, residual))
    if residual is not None:
        number = sum(residual.sequences.values())
        _line(console, f"{residual.headline} ({number} sequence{'s' * (number != 1)} observed)")
        _line(console, residual.sinks_line)
    for note in ranking.notes:
        _line(console, f"note: {note}")


def ranking_table(ranking: Ranking, tokenizer: PreTrainedTokenizerBase | None = None) -> Table:
    """The paper's set and the candidates beside it, the first of them."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("expert", no_wrap=True)
    for name in ("max|y|", "/median", "chan", "pos"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("token", overflow="fold")
    for name in ("set", "first", *(["carried"] if ranking.criteria["residual"] else []), "verdict"):
        table.add_column(name, no_wrap=True)
    for expert in ranking.judged[:_SHOWN]:
        table.add_row(*_cells(expert, tokenizer, expert in ranking.super_experts, ranking.criteria["residual"]))
    return table


def evidence(expert: SuperExpert, residual: Residual | None = None) -> str:
    """One sentence on an expert: its proof; output and routing on first tokens and on the rest; what later layers
    carry.
    """
    parts = [] if expert.reason is None else [f"{expert.verdict}: {expert.reason}"]
    if not expert.seen:
        parts.append("no row in the statistics")
    elif expert.signature is None and not expert.first_max:
        parts.append("first tokens not observed")
    else:
        pairs = ((expert.first_max, expert.first_gate), (expert.rest_max, expert.rest_gate))
        first, rest = (f"{value:.4g}" if value or gate else "no row" for value, gate in pairs)
        parts.append(f"|y| {first} on first tokens, {rest} on the rest")
    if expert.first_gate is not None and expert.rest_gate is not None:
        parts.append(f"mean routing weight {expert.first_gate:.2g} and {expert.rest_gate:.2g}")
    if residual is not None:
        carried = residual.carried_by(expert.place)
        if carried:
            one = max(carried, key=lambda formation: abs(formation.jump))
            parts.append(
                f"writes {one.share_of(expert.place):.0%} of a massive activation in channel {one.channel}, carried to "
                f"L{one.carried_to}"
            )
        else:
            parts.append("writes no massive activation that later layers carry")
    return f"{expert}: {'; '.join(parts)}"


def print_domains(console: Console, domains: dict[str, Ranking]) -> None:
    """One line: the experts to protect by each domain alone."""
    found = {name: ", ".join(str(e) for e in r.found) for name, r in domains.items()}
    if len(set(found.values())) == 1:
        _line(console, f"each domain alone ({', '.join(found)}): {next(iter(found.values())) or 'none'}")
    else:
        _line(console, "by domain: " + "; ".join(f"{name} {experts or 'none'}" for name, experts in found.items()))


def print_modalities(
    console: Console, stats: ModelStats, modalities: dict[str, ModelStats], found: dict[str, Ranking], by: str = "reap"
) -> None:
    """For each modality: the experts to protect by its tokens alone, their coverage, the experts it uses more than
    text, and those that text alone would prune by a saliency. found: the ranking of each.
    """
    from sedetect.ranking.coverage import coverage
    from sedetect.ranking.modalities import RATIO, TIMES, uses

    if not modalities:
        return
    named = (f"{name} {', '.join(str(e) for e in ranking.found) or 'none'}" for name, ranking in found.items())
    _line(console, "by modality: " + "; ".join(named))
    for name, part in modalities.items():
        header, of = part.header, "sequences" if name == "text" else "spans"
        _line(console, f"{name}: {header.tokens:,} tokens in {header.sequences:,} {of}; {coverage(part)}")
    used = uses(stats, modalities, by)
    for name in modalities:
        own = [
            f"{use.place} ({use.share:.0%} of the layer's rows, of text {use.text:.0%})"
            for use in used
            if use.own and use.modality == name
        ]
        if own:
            _line(console, f"{name} tokens use {TIMES} times as much as text does, or more: {_few(own)}")
    if "text" in modalities and len(modalities) > 1:
        lost = _few([str(use.place) for use in used if use.lost])
        _line(
            console,
            f"text alone would prune ({RATIO:.0%} of each layer, by {by}), but all tokens would not: {lost or 'none'}",
        )


def _few(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def print_run(console: Console, stats: ModelStats, seconds: float | None = None) -> None:
    """Print a summary of the run: tokens, speed, backends, coverage, and the notes of the header."""
    from sedetect.ranking.coverage import coverage, folded

    header = stats.header
    speed = f" in {seconds:.1f} s ({header.tokens / seconds:,.0f} tokens/s)" if seconds else ""
    served = sorted({backend for bank in header.banks.values() for backend in bank.backends})
    _line(
        console,
        f"{header.model} ({header.dtype}): {header.tokens:,} tokens in {header.sequences:,} sequences{speed}, "
        f"backend {', '.join(served) or 'none'}",
    )
    _line(console, coverage(stats))
    for note in folded(header.notes):
        _line(console, f"note: {note}")


def _line(console: Console, text: str) -> None:
    """Print plain text and leave the wrapping to the terminal."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _cells(expert: SuperExpert, tokenizer: PreTrainedTokenizerBase | None, named: bool, observed: bool) -> list[str]:
    token = _token(tokenizer, expert.token_id)
    partial = token is None or "\ufffd" in token  # part of a multi-byte character: the id says more
    shown = "-" if expert.token_id < 0 else f"#{expert.token_id}" if partial else f"{token!r}"
    style = _STYLES[expert.verdict]
    return [
        f"[{style}]{escape(str(expert))}[/]",
        f"{expert.value:.5g}" if expert.seen else "-",
        "-" if expert.ratio is None else f"{expert.ratio:.1f}",
        str(expert.channel) if expert.seen else "-",
        "-" if expert.position < 0 else str(expert.position),
        escape(shown),
        "yes" if named else "late" if expert.late else "no",
        _SAID[expert.signature],
        *([_SAID[expert.carried]] if observed else []),
        f"[{style}]{expert.verdict or '-'}[/]",
    ]


def _token(tokenizer: PreTrainedTokenizerBase | None, token_id: int) -> str | None:
    return None if tokenizer is None or token_id < 0 else str(tokenizer.decode([token_id]))
