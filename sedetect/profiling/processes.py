"""Data parallel profiles: each process that torchrun starts runs a part of the batches, and their statistics merge.

    torchrun --nproc-per-node 4 -m sedetect profile MODEL -o DIR

Rank 0 reports and writes. Counts, maxima and kept rows are those of one process that runs the same batches,
bit for bit, and sums agree to 1e-12 relative (see sedetect.stats.bank).
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sedetect.errors import SedetectError
from sedetect.stats.model import ModelStats, join_domains, merge_all

if TYPE_CHECKING:
    from sedetect.profiling.pipeline import ModelProfile

_PATIENCE = timedelta(days=7)  # ranks wait for the slowest; a dead rank is noticed at once, by its closed connection


@dataclass(frozen=True)
class Ranks:
    """The processes of one torchrun, and this process's rank."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def name(self) -> str:
        return f"rank-{self.rank}-of-{self.count}"

    @property
    def part(self) -> tuple[int, int]:
        return self.rank, self.count

    def device(self, device: str | None) -> str | None:
        """The device of this rank: with several GPUs, each has its own, and makes it the current one.

        Otherwise every rank would also take some hundred MB of the first GPU, for streams and pinned memory.
        """
        cuda = torch.cuda.is_available() if device is None else device == "cuda"
        if self.count == 1 or not cuda:
            return device
        number = self.local % torch.cuda.device_count()
        torch.cuda.set_device(number)
        return f"cuda:{number}"

    def run(self, measure: Callable[[], "ModelProfile"]) -> "ModelProfile | None":
        """measure() on every rank: all of it merged on rank 0, None on the others.

        Raises SedetectError on every rank if one raises it or exits early.
        """
        if self.count == 1:
            return measure()
        result, error = None, None
        try:
            result = measure()
        except SedetectError as raised:
            error = raised.args
        mine = None if result is None else (result.domains, result.modalities, result.seconds, result.interrupted)
        gathered: list = [None] * self.count
        try:
            dist.all_gather_object(gathered, (error, mine))
        except RuntimeError:
            raise _ended() from None
        error = next((error for error, _ in gathered if error is not None), None)
        if error is not None:
            raise SedetectError(*error)
        if self.rank:
            return None
        assert result is not None  # no rank has an error
        domains, modalities, seconds, interrupted = zip(*(given for _, given in gathered))
        result.domains = _merged(domains, [*result.windows, *result.chats])
        result.modalities = _merged(modalities, dict.fromkeys(name for part in modalities for name in part))
        result.stats = join_domains(result.domains.values())
        result.seconds, result.interrupted = max(seconds), any(interrupted)
        return result


def _merged(parts: Sequence[dict[str, ModelStats]], names: Iterable[str]) -> dict[str, ModelStats]:
    """The parts of all ranks, by name; without those of which nothing was run."""
    merged = {name: merge_all(part[name] for part in parts if name in part) for name in names}
    return {name: stats for name, stats in merged.items() if stats.banks}


@contextmanager
def join() -> Iterator[Ranks]:
    """The ranks torchrun started, as long as the context lasts; a process of its own is the only one."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield Ranks()
        return
    # gloo: only statistics travel, from main memory, whatever device they were made on
    dist.init_process_group("gloo", timeout=_PATIENCE)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield Ranks(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", 0)))
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _end(number: int, frame: object) -> None:
    """What torchrun's SIGTERM does, which it sends to the ranks that are left when one has died."""
    raise _ended()


def _ended() -> SedetectError:
    return SedetectError("a rank exited early, so nothing was written; see its error and start again")
