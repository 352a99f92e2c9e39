"""The state of a streamed profile between layers: the hidden states, and a folder with all that resuming needs.

    FOLDER/progress.json                  what is being run, and how many layers are finished; written last
    FOLDER/statistics/<layer>.<domain>.safetensors
    FOLDER/hidden-<0 or 1>/<batch>.safetensors

The hidden states that enter layer n lie in hidden-<n % 2>, those that leave it are written to the other folder, by a
thread. They and the layer's statistics are synced before progress.json names the layer, so that a process that dies at
any moment leaves a folder from which the last finished layer can be continued.
"""

import json
import os
import re
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sedetect.documents import Document
from sedetect.errors import SedetectError
from sedetect.stats.model import ModelStats

_UNWRITTEN = 2  # batches that may wait to be written; each is kept in memory meanwhile
_OURS = re.compile(r"statistics|hidden-[01]|\.progress\.json\..*")  # what a start that was killed early leaves


@dataclass(frozen=True)
class Finished(Document):
    """The document progress.json: what is being run, the layers that are finished, and the seconds they took."""

    FORMAT = "sedetect-progress"
    FILE = "progress.json"
    REMEDY = "delete its folder to start over"

    layers: int
    computed: float
    run: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Finished":
        """The inverse of to_dict."""
        return cls(int(document["layers"]), float(document["computed"]), dict(document["run"]))


class Progress:
    """A streamed profile's folder.

    run: what must be equal for a run to go on, as JSON values. layers: how many are finished, computed: seconds they
    took, over all starts. seconds: spent writing by this start, waited: the part of `seconds` that stalled computation.
    Raises SedetectError where the folder holds another run, or something other than a run.
    """

    def __init__(self, folder: Path, run: dict[str, Any]):
        self.folder, self._run = folder, json.loads(json.dumps(run))
        self.layers, self.computed, self.seconds, self.waited = 0, 0.0, 0.0, 0.0
        self._writer, self._writing = ThreadPoolExecutor(1, "hidden states"), deque[Future]()
        if not (folder / Finished.FILE).is_file():
            if folder.exists() and not all(_OURS.fullmatch(entry.name) for entry in folder.iterdir()):
                raise SedetectError(f"{folder}: holds something else than an unfinished profile; choose another folder")
            self._save()
            return
        found = Finished.load(folder)
        before, self.layers, self.computed = found.run, found.layers, found.computed
        for name in {**before, **self._run}:
            if before.get(name) != self._run.get(name):
                raise SedetectError(
                    f"{folder}: an unfinished profile is there with {name} {_short(before.get(name))}, now it is "
                    f"{_short(self._run.get(name))}; repeat the first command, or delete that folder to begin anew"
                )

    def finish(self, layer: int, stats: list[ModelStats], seconds: float, last: bool) -> None:
        """Keep the statistics of a layer, one per domain; its hidden states are written. last: no layer follows."""
        start = time.perf_counter()
        self._wait(0)
        drained = time.perf_counter()
        for number, part in enumerate(stats):
            part.save(self._statistics(layer, number))
        self.layers, self.computed = layer + 1, self.computed + seconds
        self._save()
        if last:
            for parity in (0, 1):
                shutil.rmtree(self.folder / f"hidden-{parity}", ignore_errors=True)
        self.seconds += time.perf_counter() - drained
        self.waited += time.perf_counter() - start

    def statistics(self, domains: int) -> list[list[ModelStats]]:
        """The statistics of each domain, for every finished layer."""
        return [[ModelStats.load(self._statistics(i, d)) for d in range(domains)] for i in range(self.layers)]

    def write_hidden(self, layer: int, batch: int, hidden: torch.Tensor) -> None:
        """Keep a batch of the hidden states that enter layer, which stay as they are until that layer runs."""
        start, copied = time.perf_counter(), None
        self._wait(_UNWRITTEN - 1)
        if hidden.device.type == "cuda":
            copied, stream = torch.cuda.Event(blocking=True), torch.cuda.current_stream(hidden.device)
            hidden = _to_pinned(hidden)
            copied.record(stream)
        self._writing.append(self._writer.submit(self._write, self._hidden(layer, batch), layer, hidden, copied))
        self.waited += time.perf_counter() - start

    def close(self) -> None:
        """Wait until all writes have ended, successful or not."""
        self._writer.shutdown()

    def read_hidden(self, layer: int, batch: int) -> torch.Tensor:
        file = self._hidden(layer, batch)
        try:
            # A copy: what is mapped would change when the file is written again, and lies unaligned.
            return load_file(file)["hidden"].clone()
        except (OSError, KeyError, SafetensorError) as error:
            raise SedetectError(f"{file}: cannot be read ({error}); delete {self.folder} to begin anew") from None

    def _write(self, file: Path, layer: int, hidden: torch.Tensor, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        start = time.perf_counter()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"hidden": hidden.contiguous()}, file, {"enters": str(layer)})
            _sync(file)
        except (OSError, SafetensorError) as error:
            raise SedetectError(f"{file}: cannot be written ({error}); free space and repeat the command") from None
        self.seconds += time.perf_counter() - start

    def _wait(self, left: int) -> None:
        """Wait until at most this many batches are left to write. Raises the error of a failed write."""
        while len(self._writing) > left:
            self._writing.popleft().result()

    def _save(self) -> None:
        try:
            (self.folder / "statistics").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SedetectError(f"{self.folder}: cannot be made ({error.strerror}); choose another folder") from None
        for folder in (self.folder / "hidden-0", self.folder / "hidden-1", self.folder / "statistics"):
            if folder.is_dir():
                _sync(folder)
        Finished(self.layers, self.computed, self._run).save(self.folder / Finished.FILE)
        _sync(self.folder)

    def _statistics(self, layer: int, domain: int) -> Path:
        return self.folder / "statistics" / f"{layer:03}.{domain}.safetensors"

    def _hidden(self, layer: int, batch: int) -> Path:
        return self.folder / f"hidden-{layer % 2}" / f"{batch:05}.safetensors"


def discard(folder: Path) -> None:
    """Delete the folder of a profile, or one per rank, whose results are safe; killed within, the next begins anew."""
    for file in [*folder.glob(Finished.FILE), *folder.glob(f"*/{Finished.FILE}")]:
        file.unlink()
    shutil.rmtree(folder)


class HiddenStates:
    """The hidden states of every batch on their way through the layers; (B, L, H) each for most models.

    memory: the device on which they are kept, None for on disk alone. progress: where they are written too.
    """

    def __init__(self, memory: torch.device | None, progress: Progress | None):
        self._memory, self._progress = memory, progress
        self._kept: dict[int, torch.Tensor] = {}

    def close(self) -> None:
        """Stop all writer threads."""
        if self._progress is not None:
            self._progress.close()

    def read(self, layer: int, batch: int, device: torch.device) -> torch.Tensor:
        """Those that enter layer. Each batch is read once per layer."""
        kept = self._kept.pop(batch, None)
        if kept is None:
            assert self._progress is not None  # what memory does not keep is there
            kept = self._progress.read_hidden(layer, batch)
        return kept.to(device, non_blocking=True)

    def write(self, layer: int, batch: int, hidden: torch.Tensor) -> None:
        """Those that enter layer, from the one before."""
        if self._memory is not None:
            pinned = self._memory.type == "cpu" and hidden.device.type == "cuda"
            self._kept[batch] = _to_pinned(hidden) if pinned else hidden.to(self._memory)
        if self._progress is not None:
            self._progress.write_hidden(layer, batch, hidden)


def _to_pinned(hidden: torch.Tensor) -> torch.Tensor:
    """A copy in pinned main memory of a tensor on a GPU, which nobody waits for: it is made on the current stream.

    So is the copy back. torch gives pinned memory out again only when the GPU is done with it.
    """
    return torch.empty_like(hidden, device="cpu", pin_memory=True).copy_(hidden, non_blocking=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
