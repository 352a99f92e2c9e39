"""The folder of results: the files that commands write into it, their names, and reading them back."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sedetect.files import PROOF, RESIDUAL, STATS, TIMELINE

if TYPE_CHECKING:
    from sedetect.analysis.common import Analysis
    from sedetect.compression.budget import Budget
    from sedetect.compression.frontier import Frontier
    from sedetect.compression.pruning import Pruning
    from sedetect.compression.verification import Verification
    from sedetect.experiments.study import Experiment
    from sedetect.experiments.traces import Traces
    from sedetect.profiling.record import Run
    from sedetect.stats.model import ModelStats
    from sedetect.stats.proof import Proof
    from sedetect.stats.residual import Observation, Residual
    from sedetect.training.histories import Timeline

T = TypeVar("T")


class Parts:
    """A folder with one statistics file per part of a profile's text, by the part's name."""

    def __init__(self, path: Path):
        self.path = path

    def file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def load(self) -> "dict[str, ModelStats]":
        """Statistics by name of the part; empty without a folder. Raises SedetectError for a damaged file."""
        from sedetect.stats.model import ModelStats

        return {file.stem: ModelStats.load(file) for file in sorted(self.path.glob("*.safetensors"))}

    def save(self, parts: "dict[str, ModelStats]") -> None:
        """Write these, and delete the files of parts that no longer exist."""
        files = {self.file(name): stats for name, stats in parts.items()}
        for stale in set(self.path.glob("*.safetensors")) - files.keys():
            stale.unlink()
        for file, stats in files.items():
            stats.save(file)


class Results:
    """The results in a folder, or a statistics file without one.

    Paths need not exist. Methods that read a file return None where it is missing (stats raises SedetectError) and
    raise SedetectError where it is damaged. Nothing is cached: each call reads again.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.stats_path = self.path / STATS
        self.domains = Parts(self.path / "domains")
        self.modalities = Parts(self.path / "modalities")
        self.rounds = Parts(self.path / "rounds")
        self.ranking_path = self.path / "super_experts.json"
        self.run_path = self.path / "run.json"
        self.residual_path = self.path / RESIDUAL
        self.pruning_path = self.path / "pruning.json"
        self.proof_path = self.path / PROOF
        self.traces_path = self.path / "traces.json"
        self.timeline_path = self.path / TIMELINE
        self.ablation_path = self.path / "ablation.json"
        self.budget_path = self.path / "budget.json"
        self.frontier_path = self.path / "frontier.json"
        self.verification_path = self.path / "verification.json"
        self.report_path = self.path / "report.html"
        self.figures_path = self.path / "figures"
        self.resume_path = self.path / "resume"

    def stats(self) -> "ModelStats":
        from sedetect.stats.model import ModelStats

        return ModelStats.load(self.path)

    def run(self) -> "Run | None":
        from sedetect.profiling.record import Run

        return _read(self.run_path, Run.load)

    def residual(self) -> "Residual | None":
        """The residual stream of the model as it is."""
        from sedetect.stats.residual import Residual

        return _read(self.residual_path, Residual.load)

    def observation(self) -> "Observation | None":
        """residual(), and what was observed without some experts."""
        from sedetect.stats.residual import Observation

        return _read(self.residual_path, Observation.load)

    def pruning(self) -> "Pruning | None":
        """Which of the original's experts a pruned model keeps; None for other models."""
        if not self.pruning_path.is_file():
            return None
        from sedetect.compression.pruning import Pruning  # which imports transformers

        return Pruning.load(self.pruning_path)

    def proof(self) -> "Proof | None":
        from sedetect.stats.proof import Proof

        return _read(self.proof_path, Proof.load)

    def traces(self) -> "Traces | None":
        from sedetect.experiments.traces import Traces

        return _read(self.traces_path, Traces.load)

    def timeline(self) -> "Timeline | None":
        from sedetect.training.histories import Timeline

        return _read(self.timeline_path, Timeline.load)

    def ablation(self) -> "Experiment | None":
        from sedetect.experiments.study import Experiment

        return _read(self.ablation_path, Experiment.load)

    def budget(self) -> "Budget | None":
        if not self.budget_path.is_file():
            return None
        from sedetect.compression.budget import Budget  # which imports transformers

        return Budget.load(self.budget_path)

    def frontier(self) -> "Frontier | None":
        if not self.frontier_path.is_file():
            return None
        from sedetect.compression.frontier import Frontier  # likewise

        return Frontier.load(self.frontier_path)

    def verification(self) -> "Verification | None":
        if not self.verification_path.is_file():
            return None
        from sedetect.compression.verification import Verification  # likewise

        return Verification.load(self.verification_path)

    def analysis_path(self, kind: str) -> Path:
        """kind: one of sedetect.analysis.common.KINDS."""
        from sedetect.analysis.common import file_of

        return file_of(self.path, kind)

    def analyses(self) -> "dict[str, Analysis]":
        """The analyses that exist, by kind, in the order of KINDS."""
        from sedetect.analysis.common import KINDS, Analysis

        paths = {kind: self.analysis_path(kind) for kind in KINDS}
        return {kind: Analysis.load(path, kind) for kind, path in paths.items() if path.is_file()}


def _read(path: Path, load: Callable[[Path], T]) -> T | None:
    return load(path) if path.is_file() else None
