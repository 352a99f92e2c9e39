"""Ablation experiments: the effect of a set of experts, beside controls of the same size.

Perplexity alone proves little in a small model, where first-layer experts can work as look-up tables of tokens and
cost much when they are missing. So three things are judged together: the perplexity beside that of random experts of
the same layers, the attention on the first token (sinks), and the largest value of the residual stream.
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sedetect.calibration.windows import Windows
from sedetect.documents import Document, Tabular, short_repr
from sedetect.errors import SedetectError, check_type
from sedetect.experiments.ablation import ablate, resolve
from sedetect.experiments.evaluation import Question, exact_match, perplexity
from sedetect.experiments.residual_stream import observe_residual, sink_decay
from sedetect.experiments.targets import Target, random_controls
from sedetect.files import finite, restored
from sedetect.stats.place import Place
from sedetect.stats.residual import Residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Outcome:
    """One run over the evaluation text.

    label         the run in words; experts (or weights), how and tokens state it exactly (see ablate)
    perplexity    per domain
    change        per domain, relative to the unchanged model (0.1 is 10% worse); mean_change their mean
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
class Experiment(Tabular, Document):
    """Experts or weights switched off in several ways, and controls of the same size.

    model, digest, dtype: as in the header of statistics; tokens: of evaluation text, per domain; sequences: how many
    the residual stream was observed on.
    controls: "same layers" and "anywhere", one outcome per draw, all under "skip": as many random experts of the same
    banks, and of all; for a weight, a random weight of the same down_proj, and of any routed expert's.
    """

    FORMAT = "sedetect-ablation"
    REMEDY = "run `sedetect ablate MODEL -o DIR` to make one"

    model: str
    digest: str
    dtype: str
    tokens: dict[str, int]
    baseline: Outcome
    outcomes: list[Outcome]
    controls: dict[str, list[Outcome]]
    sequences: int

    __repr__ = short_repr

    def records(self) -> list[dict[str, Any]]:
        """A row per run, controls included."""
        runs = [("baseline", self.baseline), *(("chosen", run) for run in self.outcomes)]
        runs += [(f"random, {name}", run) for name, drawn in self.controls.items() for run in drawn]
        return [
            {"runs": kind, "label": run.label, "experts": ", ".join(run.experts), "mean_change": run.mean_change}
            | {f"perplexity, {domain}": value for domain, value in run.perplexity.items()}
            | {"sink_mean": run.sink_mean, "residual_max": run.residual_max, "accuracy": run.accuracy}
            for kind, run in runs
        ]

    @property
    def sink_layer(self) -> int | None:
        """Of the layers that the ablation can change, the one with the strongest sinks in the unchanged model."""
        places = (re.search(r"L(\d+)", name) for name in self.outcomes[0].experts)
        first = min(int(place[1]) for place in places if place)
        seen = [(sink, n) for n, sink in enumerate(self.baseline.sinks) if sink is not None and n > first]
        return max(seen)[1] if seen else None

    def to_dict(self) -> dict[str, Any]:
        """For ablation.json; conclusion is conclusion(self)."""
        document: dict[str, Any] = super().to_dict() | finite(asdict(self))
        return document | {"sink_layer": self.sink_layer, "conclusion": conclusion(self)}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Experiment":
        """The inverse of to_dict."""
        return cls(
            model=document["model"],
            digest=document["digest"],
            dtype=document["dtype"],
            tokens=document["tokens"],
            baseline=_outcome(document["baseline"]),
            outcomes=[_outcome(outcome) for outcome in document["outcomes"]],
            controls={name: [_outcome(run) for run in runs] for name, runs in document["controls"].items()},
            sequences=document["sequences"],
        )


def _outcome(document: dict[str, Any]) -> Outcome:
    """The inverse of finite: None is NaN, "inf" is infinity, where there must be a number."""
    outcome = Outcome(**document)
    outcome.perplexity, outcome.change = (
        {domain: restored(value) for domain, value in of.items()} for of in (outcome.perplexity, outcome.change)
    )
    outcome.mean_change, outcome.residual_max = restored(outcome.mean_change), restored(outcome.residual_max)
    return outcome


@dataclass(frozen=True)
class Trials:
    """The runs of an experiment.

    hows       interventions of ablate for the experts; "skip" alone serves shared experts and weights
    positions  also only at first tokens, and only at all others
    controls   number of random sets of the same size, in the same layers and anywhere
    sequences  number of sequences in which the residual stream and the attention are observed
    questions  answered in each run
    """

    hows: Sequence[str] = ("skip", "renormalize", "remove")
    positions: bool = True
    controls: int = 5
    sequences: int = 8
    questions: Sequence[Question] = ()


def run_experiment(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    domains: dict[str, Windows],
    experts: Sequence[Target],
    trials: Trials = Trials(),
    *,
    prefix: int,
    batch_size: int = 8,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Experiment:
    """Switch experts off, and random controls of the same size, and measure the cost.

    Args:
        domains: evaluation windows per domain, each beginning with prefix tokens of the tokenizer's prefix.
        experts: at least one; experts, or single weights of a down_proj.
        progress: called with (label, runs done, runs in all).
    """
    check_type("trials", trials, Trials)
    experts = list(resolve(model, experts))
    plain = all(isinstance(one, Place) and one.bank.routed for one in experts)
    allowed = [how for how in trials.hows if plain or how == "skip"]
    if not allowed:
        raise SedetectError(f"how {', '.join(trials.hows)}: shared experts and single weights know only skip; use that")
    plan: list[tuple[str, list[Target], str, str]] = [("none", [], "skip", "all")]
    plan += [(how, list(experts), how, "all") for how in allowed]
    if trials.positions:
        plan += [(f"skip, {tokens} only", list(experts), "skip", tokens) for tokens in ("first", "rest")]
    drawn = {
        place: [(f"random, {place}, draw {n}", targets, "skip", "all") for n, targets in enumerate(draws)]
        for place, draws in random_controls(model, experts, trials.controls).items()
    }
    runs = [*plan, *drawn["same layers"], *drawn["anywhere"]]

    outcomes: list[Outcome] = []
    observed: list[Residual] = []
    for number, (label, targets, how, tokens) in enumerate(runs):
        progress(label, number, len(runs))
        with ablate(model, targets, how=how, tokens=tokens) if targets else nullcontext():
            measured = perplexity(model, domains, prefix=prefix, batch_size=batch_size)
            residual = observe_residual(model, domains, prefix=prefix, sequences=trials.sequences)
            accuracy = exact_match(model, tokenizer, list(trials.questions)) if trials.questions else None
        observed.append(residual)
        outcomes.append(
            Outcome(
                label,
                [str(target) for target in targets],
                how,
                tokens,
                {domain: p.value for domain, p in measured.items()},
                residual.sink_mean,
                [layer.sink_mean for layer in residual.layers],
                sink_decay(observed[0], residual),
                residual.inner_max,
                accuracy,
            )
        )
    progress("done", len(runs), len(runs))
    base, before = outcomes[0], observed[0]
    for outcome in outcomes:
        outcome.change = {d: outcome.perplexity[d] / base.perplexity[d] - 1 for d in base.perplexity}
        outcome.mean_change = statistics.fmean(outcome.change.values())
    same = outcomes[len(plan) : len(plan) + len(drawn["same layers"])]
    anywhere = outcomes[len(plan) + len(same) :]
    return Experiment(
        model=before.model,
        digest=before.digest,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        tokens={domain: windows.ids.numel() for domain, windows in domains.items()},
        baseline=base,
        outcomes=outcomes[1 : len(plan)],
        controls={"same layers": same, "anywhere": anywhere},
        sequences=sum(before.sequences.values()),
    )


def badness(change: float) -> float:
    """A change of perplexity as a sort key: NaN (a broken model) is worse than any number."""
    return math.inf if math.isnan(change) else change


def conclusion(experiment: Experiment) -> str:
    """One sentence on the first intervention: which of the three signs of a super expert it shows.

    perplexity: worse than every random set of the same layers; sinks: attention on first tokens less than half;
    residual: its maximum less than half. An expert that feeds a super expert shows them too.
    """
    base, main = experiment.baseline, experiment.outcomes[0]
    same = [outcome.mean_change for outcome in experiment.controls["same layers"]]
    shown, texts = [], []
    if same:
        worst = max(same, key=badness)
        if badness(main.mean_change) > max(0, badness(worst)):
            shown.append("perplexity")
        drawn = "a random set" if len(same) == 1 else f"the worst of {len(same)} random sets"
        beside = f"{worst:+.1%} for {drawn} of the same layers"
        texts.append(f"perplexity {main.mean_change:+.1%} (against {beside})")
    else:
        texts.append(f"perplexity {main.mean_change:+.1%} (not judged: no controls)")
    both = [pair for pair in zip(base.sinks, main.sinks, strict=True) if None not in pair]
    if both:
        old, new = map(statistics.fmean, zip(*both))
        text = f"attention on first tokens {old:.3f} to {new:.3f}"
        layer = experiment.sink_layer
        if layer is not None and main.sink_decay[layer] is not None:
            text += f" (D_sink {main.sink_decay[layer]:.2f} in layer {layer})"
        texts.append(text)
        if new < old / 2:
            shown.append("sinks")
    else:
        texts.append("attention not observed")
    texts.append(f"residual maximum {base.residual_max:.4g} to {main.residual_max:.4g}")
    if main.residual_max < base.residual_max / 2:
        shown.append("residual")
    verdict = {3: "all signs of super experts", 0: "no sign of super experts"}.get(
        len(shown), f"{len(shown)} of 3 signs of super experts ({', '.join(shown)})"
    )
    return f"without {', '.join(main.experts)}: {verdict}: {'; '.join(texts)}"
