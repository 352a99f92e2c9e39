"""A budget: the cost of compressing the experts, and the gain from keeping a few of them.

Every row is one compression of the routed experts (a pruning ratio, or a simulated weight format), evaluated with no
expert kept, with chosen experts (the super experts) kept, and with as many random experts of the same layers kept in
their place. Everything happens in memory, and the model is restored afterwards.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sedetect.calibration.windows import Windows
from sedetect.compression.pruning import choose_kept, router_groups
from sedetect.compression.simulated import (
    FORMATS,
    GROUP,
    expert_sizes,
    expert_weights,
    quantized_experts,
    routed_banks,
    stored_bits,
)
from sedetect.documents import Document, Tabular, short_repr
from sedetect.errors import SedetectError, check_type
from sedetect.experiments.ablation import ablate
from sedetect.experiments.evaluation import perplexity
from sedetect.experiments.study import badness
from sedetect.experiments.targets import Target, random_controls, routed_experts
from sedetect.files import finite, restored
from sedetect.models.layers import run_tokens
from sedetect.stats.model import ModelStats
from sedetect.stats.place import BankId, Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATIOS = (0.125, 0.25, 0.5)
Sizes = dict[BankId, tuple[int, int]]  # per routed bank: weights of one expert, number of experts
LIMIT = 0.05  # the sentence on how far compression can go is about this change of perplexity


@dataclass
class Cost:
    """One evaluation.

    kept          experts left uncompressed (names)
    size          weights of the routed experts, relative to those of the unchanged model
    perplexity    per domain
    change        per domain, relative to the unchanged model (0.1 is 10% worse); mean_change their mean
    """

    kept: list[str]
    size: float
    perplexity: dict[str, float]
    change: dict[str, float]
    mean_change: float


@dataclass
class Row:
    """One compression, "prune 25%" or a format. kept is None without experts to keep, and random empty then."""

    name: str
    bare: Cost
    kept: Cost | None
    random: list[Cost]


@dataclass
class Budget(Tabular, Document):
    """All rows, in order of the weights left, largest first within their kind.

    kept       the chosen experts (names)
    baseline   the unchanged model
    tokens     evaluated, per domain
    notes      what was left out, with the reason
    """

    FORMAT = "sedetect-budget"
    REMEDY = "run `sedetect budget MODEL -o DIR` to make one"

    model: str
    dtype: str
    by: str
    group: int
    kept: list[str]
    baseline: Cost
    rows: list[Row]
    tokens: dict[str, int]
    notes: list[str]

    __repr__ = short_repr

    def records(self) -> list[dict[str, Any]]:
        """A row per compression, with each set of experts that was kept: none, these, and random ones."""
        return [
            {"compression": row.name, "kept": kept, "experts": ", ".join(cost.kept), "size": cost.size}
            | {"mean_change": cost.mean_change}
            | {f"perplexity, {domain}": value for domain, value in cost.perplexity.items()}
            for row in self.rows
            for kept, cost in (("none", row.bare), ("chosen", row.kept), *(("random", one) for one in row.random))
            if cost is not None
        ]

    def to_dict(self) -> dict[str, Any]:
        """For budget.json; conclusion is conclusion(self)."""
        document: dict[str, Any] = finite(asdict(self))
        return super().to_dict() | document | {"conclusion": conclusion(self)}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Budget":
        """The inverse of to_dict."""
        fields = {name: document[name] for name in cls.__dataclass_fields__}
        fields["baseline"] = _cost(document["baseline"])
        fields["rows"] = [
            Row(
                row["name"],
                _cost(row["bare"]),
                None if row["kept"] is None else _cost(row["kept"]),
                [_cost(cost) for cost in row["random"]],
            )
            for row in document["rows"]
        ]
        return cls(**fields)


def _cost(document: dict[str, Any]) -> Cost:
    perplexity, change = (
        {domain: restored(value) for domain, value in document[name].items()} for name in ("perplexity", "change")
    )
    return Cost(document["kept"], document["size"], perplexity, change, restored(document["mean_change"]))


@dataclass(frozen=True)
class Compressions:
    """The compressions that a budget compares.

    by       the saliency by which pruning chooses
    ratios   shares of each layer's experts to prune
    formats  of the weights; group: inputs per scale of them
    """

    by: str = "reap"
    ratios: Sequence[float] = RATIOS
    formats: Sequence[str] = FORMATS
    group: int = GROUP


def make_budget(
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    stats: ModelStats,
    experts: Sequence[Target],
    compressions: Compressions = Compressions(),
    *,
    prefix: int,
    controls: int = 3,
    batch_size: int = 8,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Budget:
    """Evaluate every compression with and without experts kept.

    Args:
        domains: evaluation windows per domain, each beginning with prefix tokens of the tokenizer's prefix.
        stats: statistics of the model, for the saliency by which pruning chooses.
        experts: those to keep; only whole routed ones count, as nothing else is compressed by itself.
        controls: how many random sets of the same size to keep instead, each in the same layers.
    """
    check_type("compressions", compressions, Compressions)
    sizes, groups = expert_sizes(model), router_groups(model.config.to_dict())
    by, group = compressions.by, compressions.group
    kept = [place for place in experts if isinstance(place, Place) and place.bank.routed]
    notes = [f"{one} is not compressed by itself in any row" for one in experts if one not in kept]
    for place in kept:
        if place.number >= sizes.get(place.bank, (0, 0))[1]:
            raise SedetectError(f"{place}: {type(model).__name__} has no such expert; name another")
    drawn = random_controls(model, kept, controls)["same layers"] if kept else []
    random = [[one for one in draw if isinstance(one, Place)] for draw in drawn]  # all, as no weight is to be kept
    sets = [[], *([kept] if kept else []), *random]
    plan = []
    for ratio in sorted(compressions.ratios):
        try:
            gone = [_gone(model, stats, by, ratio, safe, groups) for safe in sets]
            with ablate(model, gone[0], how="remove"):  # not every router can be masked
                run_tokens(model, next(iter(domains.values())).ids[:1])
        except SedetectError as error:
            notes.append(f"left out: {error}")
            continue
        plan.append([_pruned(model, ratio, *one, sizes) for one in zip(sets, gone, strict=True)])
    plan += [[_quantized(model, name, safe, group, sizes) for safe in sets] for name in compressions.formats]

    total = 1 + len({run.same for runs in plan for run in runs})
    seen: dict[Any, dict[str, float]] = {}

    def evaluate(run: _Run) -> Cost:
        if run.same not in seen:
            progress(run.name, len(seen), total)
            with run.compressed():
                measured = perplexity(model, domains, prefix=prefix, batch_size=batch_size)
            seen[run.same] = {domain: p.value for domain, p in measured.items()}
        values, base = seen[run.same], seen[None]
        change = {domain: values[domain] / base[domain] - 1 for domain in base}
        names = [str(place) for place in run.kept]
        return Cost(names, run.size, dict(values), change, statistics.fmean(change.values()))

    baseline = evaluate(_Run("unchanged", [], 1.0, None, nullcontext))
    rows = []
    for runs in plan:
        costs = [evaluate(run) for run in runs]
        rows.append(Row(runs[0].name, costs[0], costs[1] if kept else None, costs[2:]))
    progress("done", total, total)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    tokens = {domain: windows.ids.numel() for domain, windows in domains.items()}
    names = [str(place) for place in kept]
    return Budget(stats.header.model, dtype, by, group, names, baseline, rows, tokens, notes)


def conclusion(budget: Budget) -> list[str]:
    """A conclusion from the rows: the gain from keeping, and the strongest compression within LIMIT."""
    lines = []
    names = ", ".join(budget.kept)
    compared = [(row, row.kept) for row in budget.rows if row.kept is not None and row.random]
    changed = [(row, kept) for row, kept in compared if kept.perplexity != row.bare.perplexity]
    if compared and not changed:
        lines.append(f"keeping {names} changes nothing: no row compresses any of them")
    if changed:
        better = [row for row, kept in changed if _bad(kept) < min(map(_bad, row.random))]
        most, kept = max(changed, key=lambda pair: _gain(pair[0].bare, pair[1]))
        low, high = (f([c.mean_change for c in most.random], key=badness) for f in (min, max))
        rows = "the one row" if len(changed) == 1 else f"the {len(changed)} rows"
        buys = "buys most" if _bad(kept) < _bad(most.bare) else "buys nothing in any, and costs least"
        lines.append(
            f"keeping {names} beats every random choice in {len(better)} of {rows} that it changes; "
            f"it {buys} at {most.name}: {most.bare.mean_change:+.1%} without, {kept.mean_change:+.1%} with "
            f"(random experts of the same layers: {low:+.1%} to {high:+.1%})"
        )
    for what, of in (("nothing kept", "bare"), (f"{', '.join(budget.kept)} kept", "kept")):
        costs = [(row.name, getattr(row, of)) for row in budget.rows if getattr(row, of) is not None]
        if costs:
            within = [name for name, cost in costs if cost.mean_change <= LIMIT]
            lines.append(f"within {LIMIT:.0%} of the unchanged perplexity, {what}: {', '.join(within) or 'none'}")
    return lines


def _bad(cost: Cost) -> float:
    return badness(cost.mean_change)


def _gain(bare: Cost, kept: Cost) -> float:
    """The reduction in the change of perplexity by keeping; 0 where both are infinite."""
    return 0.0 if _bad(bare) == _bad(kept) else _bad(bare) - _bad(kept)


@dataclass(frozen=True)
class _Run:
    """One planned evaluation. Runs with equal same are identical (pruning that spares all kept experts anyway)."""

    name: str
    kept: list[Place]
    size: float
    same: Any
    compressed: Callable[[], AbstractContextManager[None]]


def _pruned(model: "PreTrainedModel", ratio: float, kept: list[Place], gone: list[Place], sizes: Sizes) -> _Run:
    name = f"prune {100 * ratio:g}%"
    run = partial(ablate, model, gone, how="remove")
    return _Run(name, kept, 1 - _share(sizes, gone), (name, frozenset(gone)), run)


def _quantized(model: "PreTrainedModel", name: str, kept: list[Place], group: int, sizes: Sizes) -> _Run:
    share = _share(sizes, kept)
    size = share + (1 - share) * _stored(model, name, group)
    return _Run(name, kept, size, (name, frozenset(kept)), partial(quantized_experts, model, name, kept, group=group))


def _gone(
    model: "PreTrainedModel", stats: ModelStats, by: str, ratio: float, safe: list[Place], groups: int
) -> list[Place]:
    kept = choose_kept(stats, by, ratio, safe, groups=groups)
    return [place for place in routed_experts(model) if place.expert not in kept[place.bank]]


def _share(sizes: Sizes, experts: list[Place]) -> float:
    """The share of all experts' weights that these experts hold."""
    return sum(sizes[p.bank][0] for p in experts) / sum(one * e for one, e in sizes.values())


def _stored(model: "PreTrainedModel", name: str, group: int) -> float:
    """Size of all routed experts in a format, relative to now."""
    before = after = 0.0
    for bank in routed_banks(model):
        for weight, dim in expert_weights(bank.module).items():
            tensor = getattr(bank.module, weight)
            before += tensor.numel() * tensor.itemsize * 8
            after += tensor.numel() * stored_bits(name, tensor.shape[dim], group)
    return after / before
