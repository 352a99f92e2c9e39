"""Ablation experiments: what a set of experts is worth, beside controls of the same size.

Perplexity alone proves little in a small model, where first-layer experts can work as look-up tables of tokens and
cost much when they are missing. So three things are judged together: the perplexity beside that of random experts of
the same layers, the attention on the first token (sinks), and the largest value of the residual stream.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sedetect import hf
from sedetect.ablation import Weight, ablate, parse_target
from sedetect.calibration import Windows
from sedetect.errors import SedetectError
from sedetect.evaluation import Question, exact_match, perplexity
from sedetect.ranking import Place, rank
from sedetect.residual import observe_residual, sink_decay
from sedetect.stats import ModelStats


@dataclass
class Outcome:
    """One run over the evaluation text.

    label         what was done, for people; experts (or weights), how and tokens say it exactly (see ablate)
    perplexity    per domain
    change        per domain, relative to the unchanged model (0.1 is 10 % worse); mean_change their mean
    sink_mean     mean attention on the first token (residual.Residual); sinks: of each layer, mean over its heads
    sink_decay    D_sink of each layer against the unchanged model (stream.sink_decay)
    residual_max  largest |x| of the residual stream after any layer but the first and the last
    accuracy      share of questions answered exactly, None without questions
    """

    label: str
    experts: list[str]
    how: str
    tokens: str
    perplexity: dict[str, float]
    sink_mean: float | None
    sinks: list[float | None]
    sink_decay: list[float | None]
    residual_max: float
    accuracy: float | None = None
    change: dict[str, float] = field(default_factory=dict)
    mean_change: float = 0.0


@dataclass
class Experiment:
    """Experts or weights switched off in several ways, and controls of the same size.

    controls: "same layers" and "anywhere", one outcome per seed, all under "skip": as many random experts of the same
    banks, and of all; for a weight, a random weight of the same down_proj, and of any routed expert's.
    """

    baseline: Outcome
    outcomes: list[Outcome]
    controls: dict[str, list[Outcome]]
    sequences: int

    @property
    def sink_layer(self) -> int | None:
        """The layer whose sinks are the strongest in the unchanged model; its D_sink is the one to look at."""
        seen = [(sink, layer) for layer, sink in enumerate(self.baseline.sinks) if sink is not None]
        return max(seen)[1] if seen else None

    def to_dict(self) -> dict[str, Any]:
        """For ablation.json; conclusion is conclusion(self)."""
        document = {"format": "sedetect-ablation", "version": "1"} | asdict(self)
        return document | {"sink_layer": self.sink_layer, "conclusion": conclusion(self)}


Target = Place | Weight


def needs_statistics(spec: str) -> bool:
    """Whether choose_experts takes this choice from statistics."""
    return spec.partition(":")[0] in ("super", "top-frequency")


def choose_experts(spec: str, model: nn.Module, stats: ModelStats | None = None, seed: int = 0) -> list[Target]:
    """What a command line names.

    "super" (verdict super; an empty list where there is none) and "top-frequency:N" (most rows) take statistics of the
    model; "random:N" draws from the routed experts of all layers; else names separated by commas: experts ("L1E28",
    "L8shared") or single weights of a down_proj ("L1E28[101,14]"). Raises SedetectError for anything else.
    """
    kind, _, number = spec.partition(":")
    if spec == "super":
        found = [expert for expert in rank(stats).super_experts if expert.verdict == "super"]
        return [Place(e.stack, e.layer, e.kind, e.expert) for e in found]
    if kind not in ("random", "top-frequency"):
        return [parse_target(name.strip()) for name in re.split(r",(?![^\[]*\])", spec)]
    experts = routed_experts(model)
    if not number.isdecimal() or not 0 < int(number) <= len(experts):
        raise SedetectError(f"--experts {spec}: {number or 'nothing'} is no number from 1 to {len(experts)}")
    if kind == "random":
        return _draw(np.random.default_rng(seed), experts, int(number))
    rows = {place: int(stats.banks[place.stack, place.layer, place.kind].rows[place.expert]) for place in experts}
    return sorted(experts, key=lambda place: -rows[place])[: int(number)]


def routed_experts(model: nn.Module) -> list[Place]:
    """Every routed expert of a model, in order."""
    return [Place(*bank.id, e) for bank in hf.find_banks(model) if bank.routed for e in range(bank.experts)]


def run_experiment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: dict[str, Windows],
    experts: Sequence[Target],
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
        experts: at least one; experts, or single weights of a down_proj.
        hows: interventions of ablate for the experts; "skip" alone serves shared experts and weights.
        positions: also only at first tokens, and only at all others.
        controls: number of random sets of the same size, in the same layers and anywhere.
        sequences: how many sequences the residual stream and the attention are observed on.
        progress: called with (label, runs done, runs in all).
    """
    plain = all(isinstance(one, Place) and one.kind.startswith("routed") for one in experts)
    allowed = [how for how in hows if plain or how == "skip"]
    plan: list[tuple[str, list[Target], str, str]] = [("none", [], "skip", "all")]
    plan += [(how, list(experts), how, "all") for how in allowed]
    if positions:
        plan += [(f"skip, {tokens} only", list(experts), "skip", tokens) for tokens in ("first", "rest")]
    if len(plan) == 1:
        raise SedetectError(f"how {', '.join(hows)}: shared experts and single weights know only skip")
    drawn = {"same layers": [], "anywhere": []}
    for seed in range(controls):
        for place, targets in _controls(np.random.default_rng(seed), model, experts).items():
            if targets:
                drawn[place].append((f"random, {place}, seed {seed}", targets, "skip", "all"))
    runs = [*plan, *drawn["same layers"], *drawn["anywhere"]]

    outcomes, before = [], None
    for number, (label, targets, how, tokens) in enumerate(runs):
        progress(label, number, len(runs))
        with ablate(model, targets, how=how, tokens=tokens) if targets else nullcontext():
            measured = perplexity(model, domains, prefix=prefix, batch_size=batch_size)
            residual = observe_residual(model, domains, prefix=prefix, sequences=sequences)
            accuracy = exact_match(model, tokenizer, list(questions)) if questions else None
        before = before or residual
        outcomes.append(
            Outcome(
                label,
                [str(target) for target in targets],
                how,
                tokens,
                {domain: p.value for domain, p in measured.items()},
                residual.sink_mean,
                [layer.sink_mean for layer in residual.layers],
                sink_decay(before, residual),
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
        decay = main.sink_decay[experiment.sink_layer]
        text = f"attention on first tokens {base.sink_mean:.3f} to {main.sink_mean:.3f}"
        text += f" (D_sink {decay:.2f} in layer {experiment.sink_layer})"
        signs.append((main.sink_mean < base.sink_mean / 2, text))
    text = f"residual maximum {base.residual_max:.4g} to {main.residual_max:.4g}"
    signs.append((main.residual_max < base.residual_max / 2, text))
    shown = sum(sign for sign, _ in signs)
    verdict = {len(signs): "all signs of super experts", 0: "no sign of super experts"}.get(
        shown, f"{shown} of {len(signs)} signs of super experts"
    )
    names = ", ".join(main.experts)
    return f"without {names}: {verdict}: {'; '.join(text for _, text in signs)}"


def _controls(generator: np.random.Generator, model: nn.Module, experts: Sequence[Target]) -> dict[str, list[Target]]:
    """As many random targets of the same banks as there are chosen ones (all there are, where that is fewer), and of
    any bank. Shared experts have no peers."""
    banks = {(bank.id.stack, bank.id.layer, bank.id.kind): bank for bank in hf.find_banks(model)}
    others = [place for place in routed_experts(model) if place not in set(experts)]
    same: list[Target] = []
    counts = Counter(
        (p.stack, p.layer, p.kind) for p in experts if isinstance(p, Place) and p.kind.startswith("routed")
    )
    for key, number in sorted(counts.items()):
        peers = [place for place in others if (place.stack, place.layer, place.kind) == key]
        same += _draw(generator, peers, min(number, len(peers)))
    anywhere: list[Target] = _draw(generator, others, min(counts.total(), len(others)))
    for weight in (one for one in experts if isinstance(one, Weight)):
        for drawn, expert in ((same, weight.expert), (anywhere, *_draw(generator, others, 1))):
            bank = banks[expert.stack, expert.layer, expert.kind]
            drawn.append(Weight(expert, *(int(generator.integers(n)) for n in (bank.hidden, bank.intermediate))))
    return {"same layers": same, "anywhere": anywhere}


def _draw(generator: np.random.Generator, experts: list[Place], number: int) -> list[Place]:
    return [experts[i] for i in sorted(generator.choice(len(experts), number, replace=False).tolist())]
