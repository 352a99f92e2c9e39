"""Ranking: the super experts of a profile, and how strong the evidence is.

rank gives the set of "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv 2507.23279, Eq. 6
in the reading of its Algorithm 1 and tool, ZunhaiSu/Super-Experts-Profilling at 573aead) unchanged, and beside it a
verdict per expert, because that rule names at least one expert in nearly every population, even a featureless random
one.

A is the population: out_max of every routed and shared expert in the layers l < round(0.75 * n_layers) of its stack
(the set L; Python's round, halves to even), experts that saw no row as 0. Dense MLPs are not in A. Expert (l, e) is
named iff

    a[l,e] > P99.5(A)   and   a[l,e] > max(A) / 10   and   l in L

The paper knows one stack. Of a model with several, A takes all stacks together, each cut at its own L.

A verdict states how well it is shown that a model depends on an expert:

    candidate    as large as the rule wants (in its set, or above its fraction of max(A) in any layer) and it fires on
                 first tokens, or writes a massive activation that a later layer carries, or stands out by its value
    proved, refuted, undecided    what sedetect.experiments.proof found of it
    None         the rule names it, and nothing else does

What makes a candidate does not depend on the amount of text: an output on a trigger token is a constant, and is
compared with what other experts give on such tokens, and with the median of the experts that saw rows.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sedetect.errors import Argument, SedetectError, check_type
from sedetect.files import PROOF, RESIDUAL
from sedetect.ranking.coverage import FEW_ROWS
from sedetect.ranking.evidence import (
    FRACTION,
    MIN_RATIO,
    MIN_VALUE,
    BankView,
    ValueTests,
    is_candidate,
    layer_medians,
    stands_out,
)
from sedetect.ranking.result import Ranking, SuperExpert
from sedetect.ranking.wording import Judged, make_headline, make_notes
from sedetect.stats.model import Header, ModelStats, opened, same_model
from sedetect.stats.place import Place
from sedetect.stats.proof import Proof
from sedetect.stats.residual import Residual


def rank(
    stats: ModelStats | str | os.PathLike[str],
    *,
    criterion: str = "paper",
    percentile: float = 99.5,
    fraction: float = FRACTION,
    layers: float | str = 0.75,
    compat: str | None = None,
    rows: str = "all",
    min_value: float = MIN_VALUE,
    min_ratio: float = MIN_RATIO,
    residual: Residual | None = None,
    proof: Proof | None = None,
) -> Ranking:
    """The paper's set of super experts (module docstring), each with a verdict.

    stats may be the path of a statistics file, or of a folder of results, whose residual.json and proof.json are taken
    where residual and proof are not given.

    criterion: "paper", the only one. percentile in [0, 100) (NumPy's linear interpolation), fraction of max(A) in
    (0, 1), layers: L as a fraction of the stack's layers in (0, 1]; both value tests are strict.
    residual is the result of sedetect.experiments.residual_stream.observe_residual on the same model (decoder stack
    only). It shows which experts write at least half of a massive activation that a later layer carries; with
    layers="data", L is the layers that form such activations. That is a few layers, so both value tests are then over
    the first three quarters (or up to the last of them, where that is later), and L only cuts the set.
    proof is the result of sedetect.experiments.proof.prove on the same model. The experts it tried get its verdicts.
    compat="published-tool" takes max(A) // 10, as the published tool does, and asks for fraction=0.1.
    rows="first" ranks routed experts by published_max, the value that the published tool records, instead of out_max;
    an expert's sign, channel, token and gate stay those of its out_max. The tool reads shared experts whole.

    The thresholds of a candidate, each >= 0. tiny-moe is the checkpoint in tests/data, its super expert L1E28.

    min_value, in units of y: the weakest published super expert (DeepSeek-R1's tenth) is 67. tiny-moe in training: 12.7
        before its residual stream has a massive activation (step 200), 131 with one (step 400); 1262 in the end.
    min_ratio, times the layer's median: tiny-moe 69, next best inside L 2.7 (its late L9E7: 18.8). The paper prints no
        medians; where a layer's median is below the model's tenth largest value, the weakest super experts of
        Qwen3-30B-A3B, DeepSeek-V2-Lite and Mixtral have at least 35, 19 and 40. DeepSeek-R1's ten largest values are
        its ten super experts and give no bound.

    An expert stands out that reaches both. It fires on first tokens (signature) where it is as large there, and reaches
    min_ratio times the median of the layer's other experts that saw first tokens. None (not observed, never counted as
    absent) where the bank saw no first token, or no other expert did.

    Experts with a NaN or Inf are left out of every population and named in nonfinite.

    Raises SedetectError for an argument out of its range, for statistics whose header lacks a stack's number of layers
    or a bank's top_k, for rows="first" where they lack published_max, and for the residual stream or the proof of
        another model.
    """
    if isinstance(stats, (str, os.PathLike)):
        if residual is None and (Path(stats) / RESIDUAL).is_file():
            residual = Residual.load(stats)
        if proof is None and (Path(stats) / PROOF).is_file():
            proof = Proof.load(stats)
    for name, given, kind in (("residual", residual, Residual), ("proof", proof, Proof)):
        if given is not None:
            check_type(name, given, kind)
    stats = opened(stats)
    criteria = {
        "criterion": criterion,
        "percentile": percentile,
        "fraction": fraction,
        "layers": layers,
        "compat": compat,
        "rows": rows,
        "min_value": min_value,
        "min_ratio": min_ratio,
        "residual": residual is not None,
        "proof": proof is not None,
    }
    _check(criteria)
    header = stats.header
    for what, seen in (("residual stream", residual), ("proof", proof)):
        if seen is not None and not same_model(seen.digest, header.digest):
            raise SedetectError(
                f"the {what} is that of {seen.model} ({seen.digest}), the statistics are of {header.model} "
                f"({header.digest}); take the same model's"
            )
    banks = sorted(stats.banks, key=lambda bank: (bank.stack == "decoder", bank))
    views = {bank: BankView(bank, stats.banks[bank], header, rows) for bank in banks}
    share = 0.75 if isinstance(layers, str) else layers
    limits = {stack: round(share * _layers_of(stack, header)) for stack in sorted({bank.stack for bank in banks})}
    writers = None if residual is None else residual.writers()
    formed = residual.forming_layers if residual is not None and layers == "data" else None
    if formed and "decoder" in limits:
        limits["decoder"] = max(limits["decoder"], formed[-1] + 1)

    ranked = [bank for bank in banks if bank.base != "dense"]
    experts = [(bank, e) for bank in ranked for e in range(len(views[bank].values))]
    values = np.array([views[bank].values[e] for bank, e in experts])
    finite = np.isfinite(values)
    inside = finite & np.array([bank.layer < limits[bank.stack] for bank, _ in experts], dtype=bool)
    # By the data, L is a few layers, whose percentile would admit one expert or two: the population stays, L cuts it.
    admitted = inside.copy()
    if formed is not None:
        admitted &= np.array([bank.stack == "decoder" and bank.layer in formed for bank, _ in experts], dtype=bool)
    medians = layer_medians(views)

    tests = ValueTests.of(values[inside], criteria)

    def judged(place: Place, value: float) -> SuperExpert:
        bank, e = place.bank, place.number
        view, peers = views[bank], medians[bank]
        first = view if bank.routed else views.get(bank._replace(kind="routed"), view)
        late, large = bank.layer >= limits[bank.stack], large_from[bank.stack]
        among = over_all[bank.stack] if late else tests
        evidence = view.evidence(e, None if peers is None else peers[0], among, first, large, min_ratio)
        # The residual stream is observed in the decoder only.
        carried = None if writers is None or bank.stack != "decoder" else place in writers
        tried = None if proof is None else proof.of(place)
        outstanding = stands_out(value, evidence["ratio"], min_value, min_ratio)
        candidate = is_candidate(value > large or place in named, evidence["signature"], carried, outstanding)
        verdict = "candidate" if candidate else None
        return SuperExpert(
            *bank,
            view.name(e),
            **evidence,
            carried=carried,
            late=late,
            verdict=verdict if tried is None else tried.level,
            reason=None if tried is None else tried.reason,
        )

    # as large as the rule requires, also in a late layer: by the stack's part of A, or all
    over_all, large_from = {}, {}
    for stack in limits:
        mine = finite & np.array([bank.stack == stack for bank, _ in experts], dtype=bool)
        over_all[stack] = ValueTests.of(values[mine], criteria)
        part = mine & inside
        large_from[stack] = ValueTests.of(values[part], criteria).threshold if part.any() else over_all[stack].threshold
    order = np.argsort(-values, kind="stable")
    places = [Place(*bank, views[bank].name(e)) for bank, e in experts]
    named = {places[i]: float(values[i]) for i in order if admitted[i] and tests.passes(values[i])}
    super_experts = [judged(place, value) for place, value in named.items()]
    beside = (
        judged(places[i], float(values[i]))
        for i in order
        if finite[i]
        and places[i] not in named
        and (values[i] > large_from[places[i].stack] or (proof is not None and proof.of(places[i])))
    )
    others = [expert for expert in beside if expert.verdict is not None]

    unseen = sum(int((views[bank].rows == 0).sum()) for bank in ranked)
    nonfinite = [
        Place(*bank, view.name(e))
        for bank, view in views.items()
        for e in np.flatnonzero(~np.isfinite(view.values)).tolist()
    ]
    shown = [expert for expert in super_experts + others if expert.ratio is not None and expert.ratio >= min_ratio]
    thin = [str(expert) for expert in shown if (medians[expert.bank] or (0, 0))[1] < FEW_ROWS]
    found = Judged(
        super_experts, others, tests, len(experts), unseen, thin, nonfinite, limits, formed, criteria, residual
    )
    return Ranking(
        model=header.model,
        headline=make_headline(found),
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
        notes=make_notes(found),
    )


def _check(criteria: dict[str, Any]) -> None:
    """Raise SedetectError for an argument of rank that is out of its range."""
    if criteria["criterion"] != "paper":
        raise SedetectError(f"criterion {criteria['criterion']!r} is not known; use 'paper'")
    if criteria["compat"] not in (None, "published-tool"):
        raise SedetectError(f"compat {criteria['compat']!r} is not known; use 'published-tool' or leave it out")
    if criteria["rows"] not in ("all", "first"):
        raise SedetectError(f"rows {criteria['rows']!r} is not known; use 'all' or 'first'")
    ranges: dict[str, tuple[str, Callable[[float], bool]]] = {
        "percentile": ("at least 0 and below 100", lambda x: 0 <= x < 100),
        "fraction": ("above 0 and below 1", lambda x: 0 < x < 1),
        **({} if criteria["layers"] == "data" else {"layers": ("above 0 and at most 1", lambda x: 0 < x <= 1)}),
        **dict.fromkeys(("min_value", "min_ratio"), ("at least 0", lambda x: 0 <= x < math.inf)),
    }
    for name, (wanted, holds) in ranges.items():
        value = criteria[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise SedetectError(f"{name} {value!r} is out of range; give a number {wanted}")
    if criteria["layers"] == "data" and not criteria["residual"]:
        raise SedetectError(
            "layers 'data' needs what was seen of the residual stream; pass ", Argument("residual"), " as well"
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
