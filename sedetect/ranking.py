"""Ranking: which experts of a profile are super experts, and how sure that is.

rank gives the set of "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279, Eq. 6
in the reading of its Algorithm 1 and tool, ZunhaiSu/Super-Experts-Profilling at 573aead) unchanged, and beside it a
verdict per expert, because that rule names someone in nearly every population, a featureless random one included.

A is the population: out_max of every routed and shared expert in the layers l < round(0.75 * n_layers) of its stack
(the set L; Python's round, halves to even), experts that saw no row as 0. Dense MLPs are not in A. Expert (l, e) is
named iff

    a[l,e] > P99.5(A)   and   a[l,e] > max(A) / 10   and   l in L

The paper knows one stack. Of a model with several, A takes all stacks together, each cut at its own L.

Verdicts, each a test on top of the rule:

    super        in the paper's set, |y| >= min_value, >= min_ratio times its layer's median, and its first-token
                 signature present or not observed
    outlier      stands out by the same two thresholds, and is in the paper's set without the signature, or passes both
                 value tests over all layers of its stack without being in the set (most often: a late layer)
    unsupported  passes only because somebody must: too small, or too close to its layer's median
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sedetect.documents import Document
from sedetect.errors import SedetectError
from sedetect.files import finite
from sedetect.kernels.records import decode
from sedetect.place import BankId, Place, place_of
from sedetect.stats import BankStats, Header, ModelStats
from sedetect.stream import Residual


@dataclass(frozen=True)
class SuperExpert(Place):
    """An expert the rule names, or one beside the set, with the evidence; y is its down_proj output before the gate.

    value        out_max: largest |y| over all counted rows; sign (1 or -1) and output channel of that element
    position     of its token in its sequence, token_id, sequence_id: -1 where rows could not be mapped
    source       name of the calibration source of that sequence, None where the header names none
    gate         routing weight of that row (1 for shared)
    ratio        value / median out_max of the bank's finite experts that saw rows, itself included (shared: of the
                 routed experts of its layer); inf where that median is 0, None where there are none
    next_ratio   value / next largest value of the population; None where there is none, inf where it is 0
    first_gate, rest_gate   mean routing weight over the first tokens of sequences, and over all other tokens, 0 where a
                 token is not routed here; None for shared experts (no router) and where there were no such tokens
    first_max, rest_max     largest |y| on first tokens, and on all others; 0 where there was none
    signature    first-token signature, None: not observed (see rank)
    carried      whether it writes a massive activation that a later layer carries; None: the residual was not observed
    verdict      "super", "outlier" or "unsupported"
    """

    value: float
    sign: int
    channel: int
    position: int
    token_id: int
    sequence_id: int
    source: str | None
    gate: float
    ratio: float | None
    next_ratio: float | None
    first_gate: float | None
    rest_gate: float | None
    first_max: float
    rest_max: float
    signature: bool | None
    carried: bool | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """name (str(self)) and every field, ready for JSON: NaN is None, infinity is "inf"."""
        return {"name": str(self)} | {key: finite(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Ranking(Document):
    """What rank found.

    super_experts     the paper's set, by value, descending; not all of them have the verdict "super"
    others            experts outside the set that pass both value tests over all layers of their stack, likewise
    population        number of experts in A; its maximum, percentile_value and threshold (the fraction of the maximum);
                      the three are NaN for an empty population
    layer_limits      per stack, the first layer that is not in A
    unseen            routed and shared experts of all layers that saw no row
    nonfinite         experts and dense MLPs whose output had a NaN or Inf, in the order of the forward (other stacks
                      before the decoder; by layer, kind, expert): the first is where such values are born
    criteria          the arguments of rank by name
    notes             one line each on what the reader must know
    headline          the verdict in one sentence
    """

    FORMAT = "sedetect-ranking"

    model: str
    headline: str
    super_experts: list[SuperExpert]
    others: list[SuperExpert]
    population: int
    maximum: float
    percentile_value: float
    threshold: float
    layer_limits: dict[str, int]
    unseen: int
    nonfinite: list[Place]
    criteria: dict[str, Any]
    notes: list[str]

    @property
    def found(self) -> list[SuperExpert]:
        """The experts of the set with the verdict "super"."""
        return [expert for expert in self.super_experts if expert.verdict == "super"]

    @property
    def judged(self) -> list[SuperExpert]:
        """Every expert with a verdict: the set, then the others."""
        return self.super_experts + self.others

    def to_dict(self) -> dict[str, Any]:
        """The document super_experts.json; no NaN or infinity in it.

        format, version      "sedetect-ranking", "1"
        model, headline      strings
        super_experts        list of SuperExpert.to_dict(), by value, descending
        others               the same
        population, unseen   integers
        maximum, percentile_value, threshold    numbers, null for an empty population
        layer_limits         {stack: integer}
        nonfinite            list of names ("L1E28")
        criteria             {argument of rank: value}
        notes                list of strings
        """
        fields = {key: finite(value) for key, value in vars(self).items()}
        for key in ("super_experts", "others"):
            fields[key] = [expert.to_dict() for expert in fields[key]]
        return super().to_dict() | fields | {"nonfinite": [str(place) for place in self.nonfinite]}


def rank(
    stats: ModelStats,
    *,
    criterion: str = "paper",
    percentile: float = 99.5,
    fraction: float = 0.1,
    layers: float | str = 0.75,
    compat: str | None = None,
    rows: str = "all",
    min_value: float = 50.0,
    min_ratio: float = 10.0,
    min_gate_ratio: float = 3.0,
    residual: Residual | None = None,
) -> Ranking:
    """The paper's set of super experts (module docstring), each with a verdict.

    criterion: "paper", the only one. percentile in [0, 100) (NumPy's linear interpolation), fraction of max(A) in
    (0, 1), layers: L as a fraction of the stack's layers in (0, 1]; both value tests are strict.
    residual is what sedetect.residual.observe_residual saw of the same model: with it, "super" also needs the expert to
    write at least half of a massive activation that a later layer carries (its decoder stack only), which tells late
    outliers apart without a fixed L; and layers="data" takes for L the layers that form such activations. That is a
    few layers, so both value tests are then over the first three quarters (or up to the last of them, where that is
    later), and L only cuts the set.
    compat="published-tool" takes max(A) // 10, as the published tool does, and asks for fraction=0.1.
    rows="first" ranks routed experts by published_max, the value that the published tool records, instead of out_max;
    an expert's sign, channel, token and gate stay those of its out_max. The tool reads shared experts whole.

    The thresholds of the verdict, each >= 0. tiny-moe is the checkpoint in tests/data, its super expert L1E28.

    min_value, in units of y: the weakest published super expert (DeepSeek-R1's tenth) is 67. tiny-moe in training: 12.7
        before its residual stream has a massive activation (step 200), 131 with one (step 400); 1262 in the end.
    min_ratio, times the layer's median: tiny-moe 69, next best inside L 2.7 (its late outlier L9E7: 18.8). The paper
        prints no medians; where a layer's median is below the model's tenth largest value, the weakest super experts
        of Qwen3-30B-A3B, DeepSeek-V2-Lite and Mixtral have at least 35, 19 and 40. DeepSeek-R1's ten largest values
        are its ten super experts and give no bound.
    min_gate_ratio, mean routing weight on first tokens over that on the rest: an expert with a balanced load and all of
        the first token's weight has E, the number of experts: 8 in Mixtral, 32 in tiny-moe, 128 in Qwen3. 3 leaves
        room for one that is also used elsewhere.

    The signature is present when the largest value on first tokens passes both value tests by itself and, for routed
    experts, first_gate > min_gate_ratio * rest_gate. It is None (not observed, never counted as absent) where the bank
    saw no first token, or where the values agree and there is no other token to compare the routing with.

    Experts with a NaN or Inf are left out of every population and named in nonfinite.

    Raises SedetectError for an argument out of its range, for statistics whose header lacks a stack's number of layers
    or a bank's top_k, for rows="first" where they lack published_max, and for the residual stream of another
        model.
    """
    criteria = {
        "criterion": criterion,
        "percentile": percentile,
        "fraction": fraction,
        "layers": layers,
        "compat": compat,
        "rows": rows,
        "min_value": min_value,
        "min_ratio": min_ratio,
        "min_gate_ratio": min_gate_ratio,
        "residual": residual is not None,
    }
    _check(criteria)
    header = stats.header
    if residual is not None and residual.digest != header.digest:
        raise SedetectError(
            f"the residual stream is that of {residual.model} ({residual.digest}), the statistics are of {header.model} "
            f"({header.digest}); observe the same model"
        )
    banks = sorted(stats.banks, key=lambda bank: (bank.stack == "decoder", bank))
    views = {bank: _View(bank, stats.banks[bank], header, rows) for bank in banks}
    part = 0.75 if layers == "data" else layers
    limits = {stack: round(part * _layers_of(stack, header)) for stack in sorted({bank.stack for bank in banks})}
    writers = None if residual is None else residual.writers()
    formed = residual.forming_layers if layers == "data" else None
    if formed and "decoder" in limits:
        limits["decoder"] = max(limits["decoder"], formed[-1] + 1)

    ranked = [bank for bank in banks if bank.base != "dense"]
    experts = [(bank, e) for bank in ranked for e in range(len(views[bank].values))]
    values = np.array([views[bank].values[e] for bank, e in experts])
    finite = np.isfinite(values)
    inside = finite & np.array([bank.layer < limits[bank.stack] for bank, _ in experts], dtype=bool)
    # By the data, L is a few layers, whose percentile would admit one expert or two: it filters a population that stays.
    admitted = inside.copy()
    if formed is not None:
        admitted &= np.array([bank.stack == "decoder" and bank.layer in formed for bank, _ in experts], dtype=bool)
    medians = _medians(views)

    def judge(chosen: np.ndarray, tests: _Tests, in_set: bool) -> list[SuperExpert]:
        """The experts under the mask chosen, judged, by value, descending."""
        order = np.flatnonzero(chosen)
        order = order[np.argsort(-values[order], kind="stable")]
        found = []
        for bank, e in (experts[i] for i in order):
            evidence = views[bank].evidence(e, medians[bank], tests, min_gate_ratio)
            ratio = evidence["ratio"]
            # The residual stream is observed in the decoder only.
            carried = (
                None if writers is None or bank.stack != "decoder" else Place(*bank, views[bank].name(e)) in writers
            )
            if evidence["value"] < min_value or ratio is None or ratio < min_ratio:
                verdict = "unsupported"
            else:
                shown = evidence["signature"] is not False and carried is not False
                verdict = "super" if in_set and shown else "outlier"
            found.append(SuperExpert(*bank, views[bank].name(e), **evidence, carried=carried, verdict=verdict))
        return found

    tests = _Tests.of(values[inside], criteria)
    named = admitted & tests.passes(values)
    super_experts = judge(named, tests, in_set=True)

    others = []
    for stack in limits:
        mine = finite & np.array([bank.stack == stack for bank, _ in experts], dtype=bool)
        over_all = _Tests.of(values[mine], criteria)
        others += judge(mine & over_all.passes(values) & ~named, over_all, in_set=False)
    others.sort(key=lambda expert: -expert.value)

    # Experts that only the percentile keeps out of the set: where few are in A, or where the largest are tied.
    no_percentile = replace(tests, percentile_value=-math.inf)
    barred = judge(admitted & no_percentile.passes(values) & (values >= min_value) & ~named, no_percentile, in_set=True)
    barred = [expert for expert in barred if expert.verdict == "super"]

    unseen = sum(int((views[bank].rows == 0).sum()) for bank in ranked)
    nonfinite = [
        Place(*bank, view.name(e))
        for bank, view in views.items()
        for e in np.flatnonzero(~np.isfinite(view.values)).tolist()
    ]
    return Ranking(
        model=header.model,
        headline=_headline(super_experts, tests, len(experts), limits, formed, nonfinite, criteria),
        super_experts=super_experts,
        others=others,
        population=len(tests.population),
        maximum=tests.maximum,
        percentile_value=tests.percentile_value,
        threshold=tests.threshold,
        layer_limits=limits,
        unseen=unseen,
        nonfinite=nonfinite,
        criteria=criteria,
        notes=_notes(super_experts, barred, tests, len(experts), unseen, nonfinite, limits, formed, percentile),
    )


@dataclass(frozen=True)
class _Tests:
    """The two value tests of one population, sorted ascending; of an empty one nothing passes."""

    population: np.ndarray
    maximum: float
    percentile_value: float
    threshold: float

    @classmethod
    def of(cls, values: np.ndarray, criteria: dict[str, Any]) -> "_Tests":
        if not len(values):
            return cls(values, math.nan, math.nan, math.nan)
        maximum = float(values.max())
        # 1 / 0.1 is exactly 10: the paper divides, and 0.1 * maximum rounds differently.
        threshold = maximum // 10 if criteria["compat"] else maximum / (1 / criteria["fraction"])
        return cls(np.sort(values), maximum, float(np.percentile(values, criteria["percentile"])), threshold)

    def passes(self, values: np.ndarray | float) -> np.ndarray | bool:
        return (values > self.percentile_value) & (values > self.threshold)

    def next_below(self, value: float) -> float | None:
        """The value that follows one of value in descending order (equal where tied)."""
        last = int(np.searchsorted(self.population, value, side="right")) - 1
        return float(self.population[last - 1]) if last > 0 else None


class _View:
    """What ranking reads of one bank of E experts, as (E,) NumPy arrays."""

    def __init__(self, bank: BankId, state: BankStats, header: Header, rows: str):
        self.bank = bank
        values = state.published_max if rows == "first" and bank.routed else state.out_max
        if values is None:
            raise SedetectError(f"{bank}: the statistics lack the first rows; profile again with --first-rows")
        self.values = values.double().cpu().numpy()
        self.first_max, self.rest_max = state.first_max.cpu().numpy(), state.rest_max.cpu().numpy()
        self.rows, self.first_rows = state.rows.cpu().numpy(), state.first_rows.cpu().numpy()
        self.gate_sum, self.gate_first_sum = state.gate_sum.cpu().numpy(), state.gate_first_sum.cpu().numpy()
        self.peaks = decode(state.peak())
        self.sources = sorted(header.sources)
        self.top_k = header.banks[str(bank)].top_k if str(bank) in header.banks else None

    def name(self, e: int) -> int | str:
        """The expert as a Place has it."""
        return place_of(self.bank, e, len(self.values)).expert

    def evidence(self, e: int, median: float | None, tests: _Tests, min_gate_ratio: float) -> dict[str, Any]:
        """The fields of SuperExpert for expert e but its place and verdict."""
        value, first_max = float(self.values[e]), float(self.first_max[e])
        peak = self.peaks[e]
        first_gate, rest_gate = self.gates(e)
        if self.first_rows.sum() == 0:
            signature = None
        elif not tests.passes(first_max):
            signature = False
        elif not self.bank.routed:
            signature = True
        else:
            signature = None if rest_gate is None else first_gate > min_gate_ratio * rest_gate
        return {
            "value": value,
            "sign": peak.sign,
            "channel": peak.channel,
            "position": peak.position,
            "token_id": peak.token_id,
            "sequence_id": peak.sequence,
            "source": self.sources[peak.source] if peak.source < len(self.sources) else None,
            "gate": peak.gate,
            "ratio": _quotient(value, median),
            "next_ratio": _quotient(value, tests.next_below(value)),
            "first_gate": first_gate,
            "rest_gate": rest_gate,
            "first_max": first_max,
            "rest_max": float(self.rest_max[e]),
            "signature": signature,
        }

    def gates(self, e: int) -> tuple[float | None, float | None]:
        """first_gate and rest_gate of expert e: a token is top_k rows of the bank."""
        if not self.bank.routed:
            return None, None
        if not self.top_k:
            raise SedetectError(f"{self.bank}: the statistics give its top_k as {self.top_k}; profile the model again")
        first_tokens = self.first_rows.sum() / self.top_k
        rest_tokens = (self.rows.sum() - self.first_rows.sum()) / self.top_k
        return (
            float(self.gate_first_sum[e] / first_tokens) if first_tokens else None,
            float((self.gate_sum[e] - self.gate_first_sum[e]) / rest_tokens) if rest_tokens else None,
        )


def _medians(views: dict[BankId, _View]) -> dict[BankId, float | None]:
    """Per bank, the median value of the experts it is compared with: finite, and seen."""
    seen = {bank: view.values[(view.rows > 0) & np.isfinite(view.values)] for bank, view in views.items()}
    medians = {}
    for bank in views:
        if bank.routed:
            peers = seen[bank]
        else:
            layer = [seen[b] for b in views if b[:2] == bank[:2] and b.routed]
            peers = np.concatenate(layer) if layer else np.array([])
        medians[bank] = float(np.median(peers)) if len(peers) else None
    return medians


def _check(criteria: dict[str, Any]) -> None:
    """SedetectError for an argument of rank that is out of its range."""
    if criteria["criterion"] != "paper":
        raise SedetectError(f"criterion {criteria['criterion']!r} is not known; use 'paper'")
    if criteria["compat"] not in (None, "published-tool"):
        raise SedetectError(f"compat {criteria['compat']!r} is not known; use 'published-tool' or leave it out")
    if criteria["rows"] not in ("all", "first"):
        raise SedetectError(f"rows {criteria['rows']!r} is not known; use 'all' or 'first'")
    ranges = {
        "percentile": ("at least 0 and below 100", lambda x: 0 <= x < 100),
        "fraction": ("above 0 and below 1", lambda x: 0 < x < 1),
        **({} if criteria["layers"] == "data" else {"layers": ("above 0 and at most 1", lambda x: 0 < x <= 1)}),
        **dict.fromkeys(("min_value", "min_ratio", "min_gate_ratio"), ("at least 0", lambda x: 0 <= x < math.inf)),
    }
    for name, (wanted, holds) in ranges.items():
        value = criteria[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise SedetectError(f"{name} {value!r} is out of range; give a number {wanted}")
    if criteria["layers"] == "data" and not criteria["residual"]:
        raise SedetectError(
            "layers 'data' needs what was seen of the residual stream; pass residual= (--residual) as well"
        )
    if criteria["compat"] and criteria["fraction"] != 0.1:
        raise SedetectError(
            f"fraction {criteria['fraction']!r} does not go with compat 'published-tool', which takes maximum // 10; "
            "leave one of them out"
        )


def _layers_of(stack: str, header: Header) -> int:
    if stack not in header.layers:
        raise SedetectError(f"stack {stack!r}: the statistics do not say its number of layers; profile the model again")
    return header.layers[stack]


def _headline(
    named: list[SuperExpert],
    tests: _Tests,
    experts: int,
    limits: dict[str, int],
    formed: list[int] | None,
    nonfinite: list[Place],
    criteria: dict[str, Any],
) -> str:
    found = [expert for expert in named if expert.verdict == "super"]
    if found:
        text = f"{len(found)} super expert{'s' * (len(found) > 1)}: {_listed(found)}"
    elif not experts:
        text = "no super expert: the statistics hold no routed or shared experts"
    elif not len(tests.population):
        text = f"no super expert: no finite routed or shared expert in the layers below the limit ({_limits(limits)})"
    elif formed is not None and not formed:
        text = "no super expert: no layer forms a massive activation that later layers carry"
    elif tests.maximum == 0:
        text = f"no super expert: none of the {len(tests.population)} experts saw a row with an output other than 0"
    elif not named:
        at = _short(tests.percentile_value)
        text = f"no super expert: none of the {len(tests.population)} experts lies above the percentile, {at}"
    elif named[0].verdict == "outlier":
        largest = f"the largest the rule names, {_described(named[0])}"
        lacks = (
            "lacks the first-token signature" if named[0].signature is False else "writes nothing later layers carry"
        )
        text = f"no super expert: {largest}, {lacks}"
    else:
        needed = f"needs |y| {_short(criteria['min_value'])} and {_short(criteria['min_ratio'])}x"
        text = (
            f"no super expert: the rule names {len(named)} of {len(tests.population)} because it always names someone, "
            f"and the largest, {_described(named[0])}, does not stand out ({needed})"
        )
    return text + (f"; non-finite values from {nonfinite[0]} on" if nonfinite else "")


def _notes(
    named: list[SuperExpert],
    barred: list[SuperExpert],
    tests: _Tests,
    experts: int,
    unseen: int,
    nonfinite: list[Place],
    limits: dict[str, int],
    formed: list[int] | None,
    percentile: float,
) -> list[str]:
    notes = []
    population = len(tests.population)
    room = population - 1 - math.floor((population - 1) * percentile / 100)
    if population and room <= 1:
        notes.append(f"small population: percentile {percentile:g} of {population} experts admits {room} at most")
    if formed:
        notes.append(f"the set is of the layers that form massive activations: {', '.join(f'L{n}' for n in formed)}")
    if barred:
        notes.append(f"kept out of the set by the percentile alone: {_listed(barred)}")
    unobserved = sum(expert.signature is None for expert in named)
    if unobserved:
        notes.append(f"first-token signature not observed for {unobserved} of {len(named)} experts of the set")
    if unseen:
        notes.append(f"{unseen} of {experts} experts saw no row and count as 0; calibrate on more tokens")
    if nonfinite:
        notes.append(f"{len(nonfinite)} experts or dense MLPs gave NaN or Inf and are left out, first {nonfinite[0]}")
    if len(limits) > 1:
        notes.append(f"one population of all stacks, each below its own layer limit ({_limits(limits)})")
    return notes


def _listed(experts: list[SuperExpert], most: int = 10) -> str:
    more = f" and {len(experts) - most} more" if len(experts) > most else ""
    return ", ".join(map(_described, experts[:most])) + more


def _described(expert: SuperExpert) -> str:
    ratio = "" if expert.ratio is None else f", {_short(expert.ratio)}x its layer's median"
    return f"{expert} (|y| {_short(expert.value)}{ratio})"


def _limits(limits: dict[str, int]) -> str:
    return ", ".join(f"{stack} {limit}" for stack, limit in limits.items())


def _short(x: float) -> str:
    return f"{x:.0f}" if 100 <= x < math.inf else f"{x:.3g}"


def _quotient(value: float, base: float | None) -> float | None:
    if base is None:
        return None
    return value / base if base else math.inf
