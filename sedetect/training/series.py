"""A series in a folder: states of one model, one after another, as they are measured.

    DIR/series.jsonl              a line per state (State), appended and synced when its statistics are there
    DIR/states/<step>.safetensors the statistics of its experts

A process that is killed leaves whole states: a last line without its end is not read. States are of one model where
their digests have one id (sedetect.models.identity), whatever their weights.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from sedetect.errors import SedetectError
from sedetect.files import check_readable, write_atomic
from sedetect.stats.model import ModelStats


@dataclass(frozen=True)
class State:
    """One state of the model, on the text whose digest is source.

    step        of training, or the place in the series where there is none
    name        of the checkpoint; empty for a state that was measured in training
    digest      of the model with these weights
    uniform     the sink mass of uniform attention in these windows
    loss        mean negative log-likelihood, nats per predicted token
    sink_mean   mean over layers and heads of the attention on the first token (LayerResidual.sinks); None without
                attention weights. best_head: of the head with most
    residual_max    largest |x| after any layer but the first and the last (Residual.inner_max)
    seconds     the time it took
    """

    step: int
    name: str
    source: str
    digest: str
    uniform: float
    loss: float
    sink_mean: float | None
    best_head: float | None
    residual_max: float
    seconds: float


class Series:
    """The series in a folder, which need not exist yet."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder)
        self.file = self.path / "series.jsonl"

    def stats_path(self, step: int) -> Path:
        return self.path / "states" / f"{step:08}.safetensors"

    def stats(self, state: State) -> ModelStats:
        return ModelStats.load(self.stats_path(state.step))

    def states(self) -> list[State]:
        """States by step; empty if nothing was measured. A later line replaces an earlier one of the same step.

        Raises SedetectError for a file that cannot be read, or is not a series.
        """
        if not self.file.exists():
            return []
        check_readable(self.file)
        lines = self.file.read_bytes().split(b"\n")[:-1]  # text after the last newline is incomplete
        try:
            states = [State(**json.loads(line)) for line in lines]
            found = {state.step: state for state in states}
            return [found[step] for step in sorted(found)]
        except (TypeError, ValueError) as error:
            raise SedetectError(f"{self.file}: damaged ({error}); measure the series again into a new folder") from None

    def append(self, state: State, stats: ModelStats) -> None:
        """Save a state. Raises SedetectError where the folder cannot be written."""
        stats.save(self.stats_path(state.step))
        try:
            with self.file.open("ab") as file:
                file.write(json.dumps(asdict(state)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SedetectError(f"{self.file}: cannot be written ({error.strerror}); free space") from None

    def check(self, source: str, digest: str) -> None:
        """Raise SedetectError if the existing states are of another text or another model."""
        for state in self.states():
            if state.source != source:
                raise SedetectError(f"{self.path}: holds a series on other text; give a new folder, or the same text")
            if state.digest.partition("-")[0] != digest.partition("-")[0]:
                raise SedetectError(f"{self.path}: holds a series of another model; give a new folder")

    def cut(self, step: int) -> None:
        """Delete the states after a step, and a partial line of a killed process."""
        kept = [state for state in self.states() if state.step <= step]
        if not self.file.exists():
            return
        text = "".join(json.dumps(asdict(state)) + "\n" for state in kept)
        write_atomic(self.file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        steps = {self.stats_path(state.step) for state in kept}
        for stale in set((self.path / "states").glob("*.safetensors")) - steps:
            stale.unlink()
