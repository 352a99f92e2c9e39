"""What the commands have written into a folder, read for the report."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sedetect.analysis.common import Analysis
from sedetect.errors import SedetectError
from sedetect.experiments.study import Experiment
from sedetect.experiments.traces import Traces
from sedetect.profiling.record import Run
from sedetect.ranking.result import Ranking
from sedetect.ranking.rule import rank
from sedetect.report.text import token_text
from sedetect.results import Results
from sedetect.stats.model import ModelStats, same_model
from sedetect.stats.proof import Proof
from sedetect.stats.residual import Residual
from sedetect.training.histories import Timeline

if TYPE_CHECKING:
    from sedetect.compression.budget import Budget
    from sedetect.compression.frontier import Frontier
    from sedetect.compression.verification import Verification


@dataclass(frozen=True)
class Evidence:
    """The results in one folder; what was not run is None or empty.

    folder, model        of the results, as commands name it; of the checkpoint, whose shapes give sizes in bytes
    ranking              of stats under rank's defaults, with the residual stream where it was observed
    domains              statistics and ranking of each domain alone
    modalities           likewise of the tokens of each modality alone
    rounds               statistics of each round of a profile --until-stable
    ablated, ablated_experts    the residual stream without these experts
    analyses             by kind, in the order of analysis.KINDS
    """

    stats: ModelStats
    ranking: Ranking
    domains: dict[str, tuple[ModelStats, Ranking]] = field(default_factory=dict)
    modalities: dict[str, tuple[ModelStats, Ranking]] = field(default_factory=dict)
    run: Run | None = None
    residual: Residual | None = None
    ablated: Residual | None = None
    ablated_experts: list[str] = field(default_factory=list)
    ablation: Experiment | None = None
    traces: Traces | None = None
    timeline: Timeline | None = None
    analyses: dict[str, Analysis] = field(default_factory=dict)
    proof: Proof | None = None
    budget: "Budget | None" = None
    frontier: "Frontier | None" = None
    verification: "Verification | None" = None
    rounds: dict[str, ModelStats] = field(default_factory=dict)
    folder: str = "DIR"
    model: Path | None = None

    def token(self, token_id: int | None) -> str | None:
        """The token as people read it, see token_text; None for no token."""
        if token_id is None or token_id < 0:
            return None
        return token_text(token_id, None if self.run is None else self.run.tokens.get(token_id))


def load_evidence(folder: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Evidence:
    """Read stats.safetensors, and beside it domains/*.safetensors, modalities/*.safetensors, rounds/*.safetensors,
    *-analysis.safetensors, run.json, residual.json, proof.json, ablation.json, budget.json, frontier.json,
    verification.json, traces.json and timeline.json.

    model: the checkpoint's folder, for sizes.
    Raises SedetectError for a folder without statistics, and for a file that is damaged or of another model.
    """
    results = Results(folder)
    if not results.path.is_dir():
        raise SedetectError(f"{folder}: is not a folder; give one that `sedetect profile MODEL -o DIR` wrote")
    stats = results.stats()
    if not stats.banks:
        raise SedetectError(f"{results.stats_path}: holds no experts; profile the model again")
    domains = results.domains.load()
    rounds, modalities = results.rounds.load(), results.modalities.load()
    for where, parts in ((results.domains, domains), (results.modalities, modalities), (results.rounds, rounds)):
        for name, part in parts.items():
            _same(where.file(name), part.header.digest, stats.header.digest)
    ran, observed, ablation, traced = results.run(), results.observation(), results.ablation(), results.traces()
    residual, proof = None if observed is None else observed.residual, results.proof()
    frontier = results.frontier()
    documents = {
        results.run_path: ran,
        results.residual_path: residual,
        results.proof_path: proof,
        results.ablation_path: ablation,
        results.frontier_path: frontier,
    }
    for path, found in documents.items():
        if found is not None:
            _same(path, found.digest, stats.header.digest)
    verification = results.verification()
    if verification is not None and verification.digest:  # "" where the quantized one could not be opened
        _same(results.verification_path, verification.digest, stats.header.digest)
    timeline = results.timeline()
    if timeline is not None:
        _same(results.timeline_path, timeline.states[-1].digest, stats.header.digest)
    budget = results.budget()
    for path, named in ((results.traces_path, traced), (results.budget_path, budget)):
        if named is not None:
            _same(path, named.model, stats.header.model)
    analyses = results.analyses()
    for kind, result in analyses.items():
        _same(results.analysis_path(kind), result.digest, stats.header.digest)
    return Evidence(
        stats=stats,
        ranking=rank(stats, residual=residual, proof=proof),
        domains={name: (part, rank(part, residual=residual, proof=proof)) for name, part in domains.items()},
        modalities={name: (part, rank(part, residual=residual, proof=proof)) for name, part in modalities.items()},
        run=ran,
        residual=residual,
        ablated=None if observed is None else observed.ablated,
        ablated_experts=[] if observed is None else observed.experts,
        ablation=ablation,
        traces=traced,
        timeline=timeline,
        analyses=analyses,
        proof=proof,
        budget=budget,
        frontier=frontier,
        verification=verification,
        rounds=rounds,
        folder=str(folder),
        model=None if model is None else Path(model),
    )


def _same(path: Path, found: str, wanted: str) -> None:
    if not same_model(found, wanted):
        raise SedetectError(
            f"{path}: is of model {found}, the statistics beside it of {wanted}; keep one folder per model"
        )
