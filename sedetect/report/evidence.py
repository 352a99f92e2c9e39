"""What the commands have written into a folder, read for the report."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sedetect import experiment, run, stream, traces
from sedetect.analysis import KINDS, Analysis, file_of
from sedetect.errors import SedetectError
from sedetect.experiment import Experiment
from sedetect.files import read_document
from sedetect.ranking import Ranking, rank
from sedetect.report.text import token_text
from sedetect.run import Run
from sedetect.stats import ModelStats
from sedetect.stream import Residual
from sedetect.traces import Traces


@dataclass(frozen=True)
class Evidence:
    """The results in one folder; what was not run is None or empty.

    ranking              of stats under rank's defaults, with the residual stream where it was observed
    domains              statistics and ranking of each domain alone
    ablated, ablated_experts    the residual stream without these experts
    analyses             by kind, in the order of analysis.KINDS
    """

    stats: ModelStats
    ranking: Ranking
    domains: dict[str, tuple[ModelStats, Ranking]] = field(default_factory=dict)
    run: Run | None = None
    residual: Residual | None = None
    ablated: Residual | None = None
    ablated_experts: list[str] = field(default_factory=list)
    ablation: Experiment | None = None
    traces: Traces | None = None
    analyses: dict[str, Analysis] = field(default_factory=dict)

    def token(self, token_id: int | None) -> str | None:
        """The token as people read it, see token_text; None for no token."""
        if token_id is None or token_id < 0:
            return None
        return token_text(token_id, None if self.run is None else self.run.tokens.get(token_id))


def load_evidence(folder: str | os.PathLike) -> Evidence:
    """Read stats.safetensors, and beside it domains/*.safetensors, *-analysis.safetensors, run.json, residual.json,
    ablation.json and traces.json.

    Raises SedetectError for a folder without statistics, and for a file that is damaged or of another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SedetectError(f"{folder}: is no folder; give one that `sedetect profile MODEL -o DIR` wrote")
    stats = ModelStats.load(folder)
    if not stats.banks:
        raise SedetectError(f"{folder / 'stats.safetensors'}: holds no experts; profile the model again")
    domains = {path.stem: ModelStats.load(path) for path in sorted(folder.glob("domains/*.safetensors"))}
    for name, part in domains.items():
        _same(folder / "domains" / f"{name}.safetensors", part.header.digest, stats.header.digest)
    ran = _document(folder / "run.json", run, Run.from_dict)
    if ran is not None:
        _same(folder / "run.json", ran.digest, stats.header.digest)
    path = folder / "residual.json"
    observed = _document(path, stream, _observed)
    residual, ablated, without = observed or (None, None, [])
    ablation = _document(folder / "ablation.json", experiment, Experiment.from_dict)
    traced = _document(folder / "traces.json", traces, Traces.from_dict)
    for name, found in (("residual.json", residual), ("ablation.json", ablation)):
        if found is not None:
            _same(folder / name, found.digest, stats.header.digest)
    if traced is not None:
        _same(folder / "traces.json", traced.model, stats.header.model)
    analyses = {kind: Analysis.load(path, kind) for kind in KINDS if (path := file_of(folder, kind)).is_file()}
    for kind, found in analyses.items():
        _same(file_of(folder, kind), found.digest, stats.header.digest)
    return Evidence(
        stats=stats,
        ranking=rank(stats, residual=residual),
        domains={name: (part, rank(part, residual=residual)) for name, part in domains.items()},
        run=ran,
        residual=residual,
        ablated=ablated,
        ablated_experts=without,
        ablation=ablation,
        traces=traced,
        analyses=analyses,
    )


def _observed(document: dict[str, Any]) -> tuple[Residual, Residual | None, list[str]]:
    without = document.get("ablated")
    ablated = None if without is None else Residual.from_dict(without["residual"])
    return Residual.from_dict(document), ablated, [] if without is None else without["experts"]


def _document(path: Path, module: Any, parse: Callable[[dict[str, Any]], Any]) -> Any:
    """The parsed document of module.FORMAT and module.VERSION; None where there is no such file."""
    return read_document(path, module.FORMAT, module.VERSION, parse) if path.exists() else None


def _same(path: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise SedetectError(
            f"{path}: is of model {found}, the statistics beside it of {wanted}; keep one folder per model"
        )
