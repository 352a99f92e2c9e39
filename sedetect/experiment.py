"""Ablation experiments: what a set of experts is worth, beside controls of the same size.

Perplexity alone proves little in a small model, where first-layer experts can work as look-up tables of tokens and
cost much when they are missing. So three things are judged together: the perplexity beside that of random experts of
the same layers, the attention on the first token (sinks), and the largest value of the residual stream.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sedetect.ablation import ablate, parse_place
from sedetect.calibration import Windows
from sedetect.errors import SedetectError
from sedetect.evaluation import Question, exact_match, perplexity
from sedetect.ranking import Place, rank
from sedetect.residual import observe_residual
from sedetect.stats import ModelStats


@dataclass
class Outcome:
    """One run over the evaluation text.

    label         what was done, for people; experts, how and tokens say it exactly (see ablate)
    perplexity    per domain
    change        per domain, relative to the unchanged model (0.1 is 10 % worse); mean_change their mean
    sink_mean     mean attention on the first token (residual.Residual)
    residual_max  largest |x| of the residual stream after any layer but the first and the last
    accuracy      share of questions answered exactly, None without questions
    """

    label: str
    experts: list[str]
    how: str
    tokens: str
    perplexity: dict[str, float]
    sink_mean: float | None
    residual_max: float
    accuracy: float | None = None
    change: dict[str, float] = field(default_factory=dict)
    mean_change: float = 0.0


@dataclass
class Experiment:
    """A set of experts switched off in several ways, and controls of the same size.

    controls: "same layers" and "anywhere", one outcome per seed, all under "skip".
    """

    baseline: Outcome
    outcomes: list[Outcome]
    controls: dict[str, list[Outcome]]
    sequences: int

    def to_dict(self) -> dict[str, Any]:
        """For ablation.json; conclusion is conclusion(self)."""
        return {"format": "sedetect-ablation", "version": "1"} | asdict(self) | {"conclusion": conclusion(self)}


def choose_experts(spec: str, stats: ModelStats, seed: int = 0) -> list[Place]:
    """The experts that a command line names.

    "super" (verdict super), "random:N" and "top-frequency:N" (most rows) over the routed experts of all layers, or
    names separated by commas ("L1E28,L8shared"). Raises SedetectError where that gives no expert.
    """
    kind, _, number = spec.partition(":")
    if spec == "super":
        found = [expert for expert in rank(stats).super_experts if expert.verdict == "super"]
        if not found:
            raise SedetectError("--experts super: the profile found no super expert; name experts (L1E28) instead")
        return [Place(e.stack, e.layer, e.kind, e.expert) for e in found]
    if kind not in ("random", "top-frequency"):
        return [parse_place(name.strip()) for name in spec.split(",")]
    experts = routed_experts(stats)
    if not number.isdecimal() or not 0 < int(number) <= len(experts):
        raise SedetectError(f"--experts {spec}: {number or 'nothing'} is no number from 1 to {len(experts)}")
    if kind == "random":
        return _draw(np.random.default_rng(seed), experts, int(number))
    rows = {place: int(stats.banks[place.stack, place.layer, place.kind].rows[place.expert]) for place in experts}
    return sorted(experts, key=lambda place: -rows[place])[: int(number)]


def routed_experts(stats: ModelStats) -> list[Place]:
    """Every routed expert of a model, in order."""
    return [
        Place(*bank, e)
        for bank, state in stats.banks.items()
        if bank.kind.startswith("routed")
        for e in range(state.num_experts)
    ]


def run_experiment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: dict[str, Windows],
    experts: Sequence[Place],
    stats: ModelStats,
    *,
    prefix: int,
    hows: Sequence[str] = ("skip", "renormalize", "remove"),
    positions: bool = True,
    controls: int = 5,
    sequences: int = 8,
    batch_size: int = 8,
    questions: Sequence[Question] = (),
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Experiment:
    """Switch experts off, and as many others, and measure what it costs.

    Args:
        domains: evaluation windows per domain, each beginning with prefix tokens of the tokenizer's prefix.
        hows: interventions of ablate for the experts; the first serves the runs restricted by position.
        positions: also only at first tokens, and only at all others.
        controls: number of random sets of the same size, in the same layers and anywhere.
        sequences: how many sequences the residual stream and the attention are observed on.
        progress: called with (label, runs done, runs in all).
    """
    routed = [place for place in experts if place.kind.startswith("routed")]
    shared = [how for how in hows if how == "skip"] if len(routed) < len(experts) else list(hows)
    plan: list[tuple[str, list[Place], str, str]] = [("none", [], "skip", "all")]
    plan += [(how, list(experts), how, "all") for how in shared]
    if positions:
        plan += [(f"skip, {tokens} only", list(experts), "skip", tokens) for tokens in ("first", "rest")]
    others = [place for place in routed_experts(stats) if place not in set(experts)]
    drawn: dict[str, list[tuple[str, list[Place], str, str]]] = {"same layers": [], "anywhere": []}
    for seed in range(controls if routed else 0):
        generator = np.random.default_rng(seed)
        same = draw_like(generator, others, routed)
        drawn["same layers"].append((f"random, same layers, seed {seed}", same, "skip", "all"))
        anywhere = _draw(generator, others, min(len(routed), len(others)))
        drawn["anywhere"].append((f"random, anywhere, seed {seed}", anywhere, "skip", "all"))
    runs = [*plan, *drawn["same layers"], *drawn["anywhere"]]

    outcomes = []
    for number, (label, places, how, tokens) in enumerate(runs):
        progress(label, number, len(runs))
        with ablate(model, places, how=how, tokens=tokens) if places else nullcontext():
            measured = perplexity(model, domains, prefix=prefix, batch_size=batch_size)
            residual = observe_residual(model, domains, prefix=prefix, sequences=sequences)
            accuracy = exact_match(model, tokenizer, list(questions)) if questions else None
        outcomes.append(
            Outcome(
                label,
                [str(place) for place in places],
                how,
                tokens,
                {domain: p.value for domain, p in measured.items()},
                residual.sink_mean,
                residual.inner_max,
                accuracy,
            )
        )
    progress("done", len(runs), len(runs))
    base = outcomes[0]
    for outcome in outcomes:
        outcome.change = {d: outcome.perplexity[d] / base.perplexity[d] - 1 for d in base.perplexity}
        outcome.mean_change = statistics.fmean(outcome.change.values())
    same = outcomes[len(plan) : len(plan) + len(drawn["same layers"])]
    anywhere = outcomes[len(plan) + len(same) :]
    return Experiment(base, outcomes[1 : len(plan)], {"same layers": same, "anywhere": anywhere}, sequences)


def conclusion(experiment: Experiment) -> str:
    """One sentence on the first intervention: which of the three signs of a super expert it shows."""
    base, main = experiment.baseline, experiment.outcomes[0]
    same = [outcome.mean_change for outcome in experiment.controls["same layers"]]
    signs = []
    if same:
        worse = main.mean_change > max(same) and main.mean_change > 0
        beside = f"{max(same):+.1%} for the worst of {len(same)} random sets of the same layers"
        signs.append((worse, f"perplexity {main.mean_change:+.1%} (against {beside})"))
    if base.sink_mean:
        text = f"attention on first tokens {base.sink_mean:.3f} to {main.sink_mean:.3f}"
        signs.append((main.sink_mean < base.sink_mean / 2, text))
    text = f"residual maximum {base.residual_max:.4g} to {main.residual_max:.4g}"
    signs.append((main.residual_max < base.residual_max / 2, text))
    shown = sum(sign for sign, _ in signs)
    verdict = {len(signs): "all signs of super experts", 0: "no sign of super experts"}.get(
        shown, f"{shown} of {len(signs)} signs of super experts"
    )
    names = ", ".join(main.experts)
    return f"without {names}: {verdict}: {'; '.join(text for _, text in signs)}"


def _draw(generator: np.random.Generator, experts: list[Place], number: int) -> list[Place]:
    return [experts[i] for i in sorted(generator.choice(len(experts), number, replace=False).tolist())]


def draw_like(generator: np.random.Generator, others: list[Place], experts: list[Place]) -> list[Place]:
    """As many others per bank as there are experts in it (all there are, where that is fewer)."""
    drawn = []
    for bank, number in sorted(Counter((p.stack, p.layer, p.kind) for p in experts).items()):
        peers = [p for p in others if (p.stack, p.layer, p.kind) == bank]
        drawn += _draw(generator, peers, min(number, len(peers)))
    return drawn
