"""Read weights while the libraries that will load them are still being imported.

Importing transformers takes longer than bringing 20 GB from the page cache to a GPU, and leaves the other cores and the
copy engine idle. The import holds the GIL, so the reader rarely takes it: it reads each file in large contiguous
pieces. This module needs only torch.
"""

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from sedetect.checkpoints.files import read_json, shards_of
from sedetect.checkpoints.memory import choose_device, free_memory
from sedetect.checkpoints.staging import DTYPES, Buffer, StoredTensor, read_bytes, stored_tensors, use_device
from sedetect.errors import SedetectError

# Of the free memory: the bytes of the files and the tensors made of them are there at the same time.
_SHARE = 0.4
_THREADS, _PIECE = 4, 2**25  # bytes; each thread has a pinned buffer of that size


class Prefetched(os.PathLike[str]):
    """A checkpoint folder whose weights are being copied to a GPU; usable wherever a folder is.

    load_model takes the weights from here, once; other functions see only the folder. first: the part of the bytes
    at which reading begins, see Staging.
    """

    def __init__(
        self, folder: str | os.PathLike[str], device: torch.device, tensors: dict[str, StoredTensor], first: float = 0.0
    ):
        self._folder = Path(folder)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # the threads have a current one of their own
        self._pool = ThreadPoolExecutor(_THREADS, "prefetch", use_device, (device,))
        self._buffers: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(_THREADS):
            self._buffers.put(Buffer(_PIECE, device))
        by_file: dict[Path, list[StoredTensor]] = {}
        for tensor in tensors.values():
            by_file.setdefault(tensor.file, []).append(tensor)
        arenas = {file: _Arena(file, stored, device) for file, stored in by_file.items()}
        pieces = [(arena, number) for arena in arenas.values() for number in range(len(arena.pieces))]
        begin = int(len(pieces) * first)
        for arena, number in pieces[begin:] + pieces[:begin]:
            arena.pieces[number] = self._pool.submit(self._carry, arena, number)
        self._tensors = {name: _Arrived(tensor, arenas[tensor.file]) for name, tensor in tensors.items()}

    def __fspath__(self) -> str:
        return str(self._folder)

    def __str__(self) -> str:
        return str(self._folder)

    @contextmanager
    def weights(self) -> "Iterator[dict[str, _Arrived]]":
        """The tensors by name, to be read once; they are freed here afterwards.

        Raises SedetectError, where a tensor is indexed or at the end, for a file that ends early.
        """
        tensors, self._tensors = self._tensors, {}
        pieces = {id(tensor.arena): tensor.arena.pieces for tensor in tensors.values()}
        try:
            yield tensors
        except BaseException:
            self.close()
            raise
        self._pool.shutdown()
        for piece in (piece for of_file in pieces.values() for piece in of_file if piece is not None):
            piece.result()

    @property
    def used(self) -> bool:
        """Whether the weights have been taken."""
        return not self._tensors

    def close(self) -> None:
        """Stop reading; weights already taken stay valid."""
        self._pool.shutdown(cancel_futures=True)

    def _carry(self, arena: "_Arena", number: int) -> None:
        start = number * _PIECE
        target = arena.bytes[start : start + _PIECE]
        buffer = self._buffers.get()
        try:
            buffer.wait()
            read_bytes(arena.file, arena.start + start, buffer.bytes[: len(target)])
            # On the default stream: what is made of the bytes there comes after the copy.
            buffer.send([(0, target)])
        finally:
            self._buffers.put(buffer)


class _Arena:
    """The bytes of a file's tensors on the device, as they lie in the file from byte start on, and their pieces."""

    def __init__(self, file: Path, tensors: list[StoredTensor], device: torch.device):
        self.file, self.start = file, min(tensor.start for tensor in tensors)
        end = max(tensor.start + tensor.nbytes for tensor in tensors)
        self.bytes = torch.empty(end - self.start, dtype=torch.uint8, device=device)
        self.pieces: list[Future[None] | None] = [None] * -(-len(self.bytes) // _PIECE)


class _Arrived:
    """A tensor of an arena, made where it is indexed (as transformers does with the slices of safetensors)."""

    def __init__(self, stored: StoredTensor, arena: _Arena):
        self.stored, self.arena = stored, arena

    def __getitem__(self, index: Any) -> torch.Tensor:
        start = self.stored.start - self.arena.start
        end = start + self.stored.nbytes
        for piece in self.arena.pieces[start // _PIECE : -(-end // _PIECE)]:
            if piece is not None:
                piece.result()
        # In separate, aligned memory: the arena is freed once all tensors are made.
        mine = self.arena.bytes[start:end].clone()
        return mine.view(DTYPES[self.stored.dtype]).reshape(self.stored.shape)[index]

    def get_shape(self) -> list[int]:
        return self.stored.get_shape()

    def get_dtype(self) -> str:
        return self.stored.get_dtype()


def prefetch(
    model: str | os.PathLike[str],
    device: str | torch.device | None,
    dtype: str | torch.dtype = "auto",
    first: float = 0.0,
) -> Prefetched | None:
    """Start copying the weights of a checkpoint folder to a GPU; first as in Staging. The caller must close the result.

    None where that gains nothing or is impossible: for hub names and damaged folders (which load_model refuses), for
    other devices and without accelerate (which puts weights straight on one), for quantized checkpoints and types other
    than the checkpoint's, which take more memory, for processes that share a GPU, and where memory is short.
    """
    if isinstance(model, Prefetched):
        return model
    if not Path(model).is_dir() or dtype != "auto" or importlib.util.find_spec("accelerate") is None:
        return None
    device = choose_device(device)
    if device.type != "cuda" or int(os.environ.get("WORLD_SIZE", 1)) > torch.cuda.device_count():
        return None
    try:
        if "quantization_config" in read_json(Path(model) / "config.json"):
            return None
        tensors = stored_tensors(shards_of(Path(model)))
    except (SedetectError, KeyError, TypeError, ValueError):  # load_model says what is wrong
        return None
    if sum(tensor.nbytes for tensor in tensors.values()) > _SHARE * free_memory(device):
        return None
    try:
        return Prefetched(model, device, tensors, first)
    except torch.OutOfMemoryError:
        return None
