"""The frontier: size of the routed experts against perplexity, with a suitable number of bits for each.

Every expert, or every layer's experts together, gets a weight format (sedetect.compression.simulated), stays as it is,
or is pruned, so that the model changes least at a given size. How much each would change it is measured:

    a layer    the mean KL divergence (nats per token) of the model's next-token distributions from those of the
               unchanged model, with the experts of this layer alone in this format; it is never negative, and needs
               less text than a difference of losses
    an expert  its part of that, in proportion to the squared error g^2 |y - y'|^2 of its outputs over all rows
    pruning    likewise, g^2 |y|^2; the layer is measured without the half of its experts that do least

Parts are taken to add up, and sedetect.compression.allocations chooses.

What counts is measured afterwards: the perplexity of every allocation on other text, beside that of all experts in one
format, and of the same formats dealt out at random.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from sedetect.calibration.windows import Windows
from sedetect.compression.allocations import KEPT, PRUNED, Costs, allocations, check_milp
from sedetect.compression.pruning import router_groups
from sedetect.compression.simulated import (
    GROUP,
    bits_of,
    expert_weights,
    mixed_experts,
    quantized_module,
    routed_banks,
    stored_bits,
)
from sedetect.documents import Document, Tabular, short_repr
from sedetect.errors import Argument, SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.experiments.divergence import LEVEL, kl_divergence
from sedetect.experiments.effects import effect
from sedetect.experiments.evaluation import next_logits, predictions, window_losses
from sedetect.experiments.targets import Target
from sedetect.files import finite
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank
from sedetect.models.experts import expert_output
from sedetect.models.layers import refuse_encoder_decoder, refuse_without_logits
from sedetect.stats.model import ModelStats
from sedetect.stats.place import BankId, Place
from sedetect.stats.proof import Effect

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEVELS = ("int8", "int4", "int3", "int2")
KEPT_BITS = 16  # bits of a kept expert, whatever its compute type
INCREASES = (0.01, 0.05)
_SHARE = 0.75  # the smallest size, of that of the smallest format; reached by pruning alone


@dataclass(frozen=True)
class Point:
    """One allocation.

    limit       bytes it was allowed (without protection, where all have one format); size: bytes of all routed experts,
                scales counted as 16 bits each
    plan        per bank, the format of each expert, "kept" (16 bits) or "pruned"
    predicted   KL divergence by the sum of its parts, nats per token; gap: of it, how far at most from the best
    perplexity  per domain; change: of all text, against the unchanged model, with an interval over windows
    beside      with protection: change against the allocation of the same size without
    """

    limit: float
    size: float
    plan: dict[str, list[str]]
    predicted: float | None
    gap: float | None
    perplexity: dict[str, float]
    change: Effect
    beside: Effect | None = None


@dataclass(frozen=True)
class Curve:
    """Allocations of one kind, by size, largest first.

    by         "expert" or "layer", what got one format; "model": all experts have the same
    protected  whether the protected experts (by layer: all experts of their layers) stay as they are
    seed       of formats dealt out at random, None of those that were chosen
    """

    by: str
    protected: bool
    seed: int | None
    points: list[Point]


@dataclass
class Frontier(Tabular, Document):
    """All curves.

    protected    experts (names)
    whole        bytes of all routed experts at 16 bits
    baseline     perplexity of the unchanged model per domain
    tokens       evaluated, per domain; sensitivity_tokens: of the text that sensitivity was measured on, in all
    sensitivity  per bank and format (and "pruned": without half of its experts), KL divergence in nats per token
    notes        what was left out, with the reason
    """

    FORMAT = "sedetect-frontier"
    REMEDY = "run `sedetect budget MODEL --frontier -o DIR` to make one"

    model: str
    digest: str
    dtype: str
    group: int
    protected: list[str]
    whole: float
    baseline: dict[str, float]
    tokens: dict[str, int]
    sensitivity_tokens: int
    sensitivity: dict[str, dict[str, float]]
    curves: list[Curve]
    notes: list[str]

    __repr__ = short_repr

    def records(self) -> list[dict[str, Any]]:
        """A row per allocation."""
        return [
            {"by": curve.by, "protected": curve.protected, "seed": curve.seed, "size": point.size}
            | {"rise": point.change.rise, "low": point.change.low, "high": point.change.high}
            for curve in self.curves
            for point in curve.points
        ]

    def curve(self, by: str, protected: bool = False) -> Curve | None:
        """The chosen allocations of a kind."""
        return next((c for c in self.curves if (c.by, c.protected, c.seed) == (by, protected, None)), None)

    def to_dict(self) -> dict[str, Any]:
        """For frontier.json; conclusion is conclusion(self)."""
        document: dict[str, Any] = finite(asdict(self))
        return super().to_dict() | document | {"conclusion": conclusion(self)}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Frontier":
        """The inverse of to_dict."""
        curves = [Curve(**{**one, "points": [_point(point) for point in one["points"]]}) for one in document["curves"]]
        names = ("model", "digest", "dtype", "group", "protected", "whole", "tokens", "sensitivity_tokens", "notes")
        return cls(
            **{name: document[name] for name in names},
            baseline={domain: float(value) for domain, value in document["baseline"].items()},
            sensitivity={b: {n: float(v) for n, v in one.items()} for b, one in document["sensitivity"].items()},
            curves=curves,
        )


def _point(document: dict[str, Any]) -> Point:
    def read(given: dict[str, Any] | None) -> Effect | None:
        if given is None:
            return None
        return Effect(float(given["rise"]), float(given["low"]), float(given["high"]), given["documents"])

    perplexity = {d: math.nan if value is None else float(value) for d, value in document["perplexity"].items()}
    effects: Any = {name: read(document[name]) for name in ("change", "beside")}
    return Point(**{**document, "perplexity": perplexity, **effects})


def make_frontier(
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    stats: ModelStats,
    experts: Sequence[Target],
    formats: Sequence[str] = LEVELS,
    *,
    prefix: int,
    group: int = GROUP,
    seeds: int = 3,
    batch_size: int = 8,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Frontier:
    """Measure sensitivity on half of the windows, and allocations at several sizes on the others.

    Args:
        domains: windows per domain, each beginning with prefix tokens of the tokenizer's prefix.
        stats: statistics of the model, for its name.
        experts: those that stay as they are in half of the curves; only whole routed ones count.
        formats: what experts may be stored in.
        group: inputs per scale.
        seeds: how often the chosen formats are dealt out at random.
    Raises:
        SedetectError: without scipy, for a domain of one window alone, and where formats are none.
    """
    check_milp()
    refuse_encoder_decoder(model, "perplexity")
    refuse_without_logits(model, "perplexity")
    formats = sorted(dict.fromkeys(formats), key=lambda one: (-bits_of(one), one))
    if not formats:
        raise SedetectError(Argument("formats"), ": none; give int8, int4, int3 or int2")
    banks = {bank.id: bank for bank in routed_banks(model)}
    protected = [place for place in experts if isinstance(place, Place) and place.bank.routed]
    for place in protected:
        if place.bank not in banks or place.number >= banks[place.bank].experts:
            raise SedetectError(f"{place}: {type(model).__name__} has no such expert; name another")
    seen, held = _halves(domains)
    notes = [f"{one} is not compressed by itself at any size" for one in experts if one not in protected]
    costs, layers = measure(model, seen, formats, group, prefix, batch_size, notes, progress)
    uniform = [costs.size[:, i].sum() for i in range(1, 1 + len(formats))]
    limits = sorted({*uniform, *(statistics.fmean(pair) for pair in itertools.pairwise(uniform))}, reverse=True)
    if PRUNED in costs.levels:
        limits.append(_SHARE * uniform[-1])
    safe = np.array([place in set(protected) for place in costs.places])
    wanted = allocations(costs, limits, uniform, safe, seeds)

    losses: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
    runs = {choice: None for curve in wanted for _, choice, _ in curve.chosen}
    base = _losses(model, held, prefix, batch_size)
    for done, choice in enumerate(runs):
        progress("allocations", done, len(runs))
        with _planned(model, costs.plan(np.array(choice)), group):
            losses[choice] = _losses(model, held, prefix, batch_size)
    progress("done", len(runs), len(runs))

    bare = {
        (c.by, limit): choice for c in wanted if not c.protected and c.seed is None for limit, choice, _ in c.chosen
    }
    curves = []
    for curve in wanted:
        points = []
        for limit, choice, gap in curve.chosen:
            array = np.array(choice)
            other = bare.get((curve.by, limit)) if curve.protected else None
            found = losses[choice]
            points.append(
                Point(
                    limit / 8,
                    float(costs.size[np.arange(len(array)), array].sum()) / 8,
                    {str(bank): levels for bank, levels in costs.plan(array).items()},
                    float(costs.cost[np.arange(len(array)), array].sum()),
                    gap,
                    {domain: _exp(values.mean()) for domain, values in found.items()},
                    _change(found, base),
                    None if other is None else _change(found, losses[other]),
                )
            )
        curves.append(Curve(curve.by, curve.protected, curve.seed, points))
    return Frontier(
        stats.header.model,
        stats.header.digest,
        str(next(model.parameters()).dtype).removeprefix("torch."),
        group,
        [str(place) for place in protected],
        float(costs.size[:, 0].sum()) / 8,
        {domain: _exp(values.mean()) for domain, values in base.items()},
        {domain: windows.ids.numel() for domain, windows in held.items()},
        sum(windows.ids.numel() for windows in seen.values()),
        {str(bank): dict(zip(costs.levels[1:], one[1:].tolist())) for bank, one in zip(banks, layers, strict=True)},
        curves,
        notes,
    )


def size_at(frontier: Frontier, curve: Curve | None, increase: float) -> float | None:
    """The smallest size (bytes) at which perplexity rises by no more, between points by a straight line.

    None where no point of the curve does.
    """
    if curve is None:
        return None
    points = [(point.size, point.change.rise) for point in curve.points]
    points = sorted([*points, (frontier.whole, 0.0)])
    for (size, rise), (below, more) in zip(points, [(math.nan, math.nan), *points]):
        if rise <= increase:
            part = (increase - rise) / (more - rise) if math.isfinite(more) else 0.0
            return size - part * (size - below) if part else size
    return None


def is_bound(curve: Curve, size: float) -> bool:
    """Whether a size_at is the smallest point's, so that an even smaller size may suffice."""
    return size == min((point.size for point in curve.points), default=None)


def conclusion(frontier: Frontier) -> list[str]:
    """At equal perplexity: the sizes with protection, without, and of one format for all, with a conclusion."""
    lines = []
    names = ", ".join(frontier.protected)
    for increase in INCREASES:
        parts = []
        for by in ("expert", "layer", "model"):
            bare, kept = (_size_of(frontier, frontier.curve(by, safe), increase) for safe in (False, True))
            label = "one format for all" if by == "model" else f"by {by}"
            text = f"{label} {bare}" + (f", with protection {kept}" if names else "")
            dealt = [size_at(frontier, c, increase) for c in frontier.curves if c.by == by and c.seed is not None]
            known = [size for size in dealt if size is not None]
            parts.append(text + (f", dealt out at random {_size(frontier, statistics.fmean(known))}" if known else ""))
        lines.append(f"size at {increase:+.0%}: {'; '.join(parts)}")
    if not names:
        return lines
    for by in ("expert", "layer", "model"):
        lines.append(_buys(frontier, by, names))
    free = frontier.curve("expert")
    if free is not None:
        for name in frontier.protected:
            levels = Counter(_level(point, name) for point in free.points)
            given = ", ".join(f"{level} {count} times" for level, count in levels.most_common())
            lines.append(f"without protection {name} gets, over {len(free.points)} sizes by expert: {given}")
    return lines


def _buys(frontier: Frontier, by: str, names: str) -> str:
    """The gain from protection where formats are chosen by expert, by layer or for the whole model."""
    what = "with one format for all" if by == "model" else f"by {by}"
    bare, kept = frontier.curve(by), frontier.curve(by, True)
    pairs = [(increase, size_at(frontier, bare, increase), size_at(frontier, kept, increase)) for increase in INCREASES]
    saved = {increase: 1 - with_ / without for increase, without, with_ in pairs if with_ and without}
    gains = [f"{share:.1%} of the size at {increase:+.0%}" for increase, share in saved.items() if share >= 0.001]
    text = f"{what}, protecting {names} buys {' and '.join(gains) or 'nothing at equal perplexity'}"
    besides = [point.beside for point in (kept.points if kept else []) if point.beside is not None]
    if not besides:
        return text
    better, worse = sum(e.high < 0 for e in besides), sum(e.low > 0 for e in besides)
    if by == "model":
        return f"{text}; perplexity in the same format is better in {better} of {len(besides)}, worse in {worse}"
    text = f"{text}; at equal size it is better at {better} of {len(besides)} sizes, worse at {worse}"
    return text if better else f"{text}: {'no more than noise' if gains else 'it buys nothing'}"


def _size_of(frontier: Frontier, curve: Curve | None, increase: float) -> str:
    size = size_at(frontier, curve, increase)
    if curve is None or size is None:
        return "none"
    return f"{'at most ' * is_bound(curve, size)}{_size(frontier, size)}"


def _size(frontier: Frontier, size: float) -> str:
    return f"{size / 1e6:.3g} MB ({KEPT_BITS * size / frontier.whole:.2f} bits)"


def _level(point: Point, name: str) -> str:
    for bank, levels in point.plan.items():
        for number, level in enumerate(levels):
            if str(Place(*BankId.parse(bank), number)) == name:
                return level
    raise KeyError(name)


def _halves(domains: dict[str, Windows]) -> tuple[dict[str, Windows], dict[str, Windows]]:
    """The windows of each domain in turn, for sensitivity and for evaluation."""
    few = next((domain for domain, windows in domains.items() if len(windows.ids) < 2), None)
    if few is not None:
        raise SedetectError(
            f"{few}: one window cannot serve both sensitivity and evaluation; give more ",
            Argument("tokens"),
            " or a smaller ",
            Argument("seq_len"),
        )
    parts: list[dict[str, Windows]] = [
        {d: replace(w, ids=w.ids[start::2], numbers=w.numbers[start::2]) for d, w in domains.items()}
        for start in (1, 0)
    ]
    return parts[0], parts[1]


def measure(
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    formats: Sequence[str],
    group: int,
    prefix: int,
    batch_size: int,
    notes: list[str],
    progress: Callable[[str, int, int], None],
) -> tuple[Costs, np.ndarray]:
    """The costs, and what was measured of each layer (banks, levels)."""
    banks = routed_banks(model)
    top_k: dict[BankId, int] = {}
    errors = {bank.id: torch.zeros(1 + len(formats), bank.experts, dtype=torch.float64) for bank in banks}
    calls = [(bank, partial(_errors, formats, group, errors[bank.id], top_k, bank)) for bank in banks]
    windows = _batches(domains, batch_size)
    restore = attach(model, calls)
    try:
        with torch.no_grad():
            for number, ids in enumerate(windows):
                progress("output errors", number, len(windows))
                next_logits(model, ids, prefix)
    finally:
        restore()
    idle = sum(int((error[-1] == 0).sum()) for error in errors.values())
    if idle:
        notes.append(f"{idle} experts had no effect on the sensitivity text: they cost nothing in any format")
    halves = {bank.id: min(bank.experts // 2, bank.experts - top_k[bank.id]) for bank in banks}
    least = {bank.id: errors[bank.id][-1].argsort()[: halves[bank.id]].tolist() for bank in banks}
    prunes = _prunes(model, banks, least, windows[0][:1], notes)
    levels = [KEPT, *formats, *([PRUNED] if prunes else [])]

    total = torch.zeros(len(banks), len(levels), dtype=torch.float64)
    steps = len(windows) * len(banks)
    with torch.no_grad():
        for number, ids in enumerate(windows):
            before = next_logits(model, ids, prefix)
            for row, bank in enumerate(banks):
                progress("sensitivity", number * len(banks) + row, steps)
                for column, level in enumerate(levels[1:], start=1):
                    with _planned(model, {bank.id: _of_layer(bank, level, least[bank.id])}, group):
                        after = next_logits(model, ids, prefix)
                    total[row, column] += sum(map(kl_divergence, before, after))
    layers = (total / sum(len(ids) * predictions(ids, prefix) for ids in windows)).numpy()
    bad = [str(bank.id) for bank, one in zip(banks, layers) if not np.isfinite(one).all()]
    if bad:
        raise SedetectError(
            f"{bad[0]}: the model's outputs are not finite with its experts in this format; leave it out"
        )

    places = [Place(*bank.id, e) for bank in banks for e in range(bank.experts)]
    cost = np.zeros((len(places), len(levels)))
    size = np.zeros_like(cost)
    start = 0
    for row, bank in enumerate(banks):
        mine = slice(start, start := start + bank.experts)
        error = errors[bank.id].numpy()
        shapes = {
            weight: (getattr(bank.module, weight)[0].numel(), getattr(bank.module, weight).shape[dim])
            for weight, dim in expert_weights(bank.module).items()
        }
        for column, level in enumerate(levels):
            if level == KEPT:
                size[mine, column] = KEPT_BITS * sum(numel for numel, _ in shapes.values())
            elif level == PRUNED:
                removed = error[-1][least[bank.id]].sum()
                cost[mine, column] = layers[row, column] * error[-1] / removed if removed else 0.0
            else:
                size[mine, column] = sum(n * stored_bits(level, inputs, group) for n, inputs in shapes.values())
                whole = error[column - 1].sum()
                cost[mine, column] = layers[row, column] * error[column - 1] / whole if whole else 0.0
    owners = np.repeat(np.arange(len(banks)), [bank.experts for bank in banks])
    most = [bank.experts - top_k[bank.id] for bank in banks]
    return Costs(levels, places, owners, cost, size, layers, most), layers


def _errors(
    formats: Sequence[str],
    group: int,
    sums: torch.Tensor,
    top_k: dict[BankId, int],
    bank: Bank,
    module: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
) -> torch.Tensor:
    """Add each expert's squared errors in every format, and its squared output, to sums (formats and 1, E)."""
    top_k[bank.id] = index.shape[-1]
    rows, outputs = {}, {}
    for e in range(bank.experts):
        token, slot = ((index == e) & (gates != 0)).nonzero(as_tuple=True)
        if len(token):
            rows[e] = (x[token], gates[token, slot].double() ** 2)
            outputs[e] = expert_output(module, rows[e][0], e)
            sums[-1, e] += float((rows[e][1] * outputs[e].double().square().sum(-1)).sum())
    for number, name in enumerate(formats):
        with quantized_module(module, {name: list(range(bank.experts))}, group):
            for e, (mine, weights) in rows.items():
                error = (expert_output(module, mine, e).double() - outputs[e].double()).square().sum(-1)
                sums[number, e] += float((weights * error).sum())
    return run_inner(module, x, index, gates)


def _prunes(
    model: "PreTrainedModel",
    banks: list[Bank],
    least: dict[BankId, list[int]],
    ids: torch.Tensor,
    notes: list[str],
) -> bool:
    """Whether layers can be pruned to different numbers of experts; if not, a note gives the reason."""
    if router_groups(model.config.to_dict()) > 1:
        notes.append("nothing is pruned: the router chooses groups of experts first")
        return False
    if not all(least.values()):
        notes.append("nothing is pruned: a layer has no more experts than its router chooses")
        return False
    try:
        with ablate(model, [Place(*bank.id, e) for bank in banks for e in least[bank.id]], how="remove"):
            next_logits(model, ids, 1)
    except SedetectError as error:
        notes.append(f"nothing is pruned: {error}")
        return False
    return True


def _of_layer(bank: Bank, level: str, least: list[int]) -> list[str]:
    if level != PRUNED:
        return [level] * bank.experts
    return [PRUNED if e in least else KEPT for e in range(bank.experts)]


@contextmanager
def _planned(model: "PreTrainedModel", plan: Mapping[BankId, list[str]], group: int) -> Iterator[None]:
    """Run the model with a plan applied; banks that it does not name are unchanged."""
    levels = {Place(*bank, e): level for bank, one in plan.items() for e, level in enumerate(one)}
    gone = [place for place, level in levels.items() if level == PRUNED]
    formats = {place: level for place, level in levels.items() if level not in (KEPT, PRUNED)}
    with ExitStack() as stack:
        stack.enter_context(mixed_experts(model, formats, group=group))
        if gone:
            stack.enter_context(ablate(model, gone, how="remove"))
        yield


def _batches(domains: dict[str, Windows], batch_size: int) -> Sequence[torch.Tensor]:
    """The windows of all domains in batches, across domains: each forward quantizes the experts anew."""
    return torch.split(torch.cat([windows.ids for windows in domains.values()]), batch_size)


@torch.no_grad()
def _losses(
    model: "PreTrainedModel", domains: dict[str, Windows], prefix: int, batch_size: int
) -> dict[str, np.ndarray]:
    """Per domain, the mean loss (nats per token) of each window."""
    found = [
        loss / predictions(ids, prefix)
        for ids in _batches(domains, batch_size)
        for loss in window_losses(model, ids, prefix)
    ]
    ends = itertools.accumulate(len(windows.ids) for windows in domains.values())
    return dict(zip(domains, np.split(np.array(found), list(ends)[:-1]), strict=True))


def _change(losses: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> Effect:
    differences = np.concatenate([losses[domain] - base[domain] for domain in base])
    if not np.isfinite(differences).all():
        return Effect(math.inf, -1.0, math.inf, len(differences))
    return effect(differences, LEVEL)


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf
