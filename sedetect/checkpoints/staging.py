"""The tensors of safetensors files, copied to a GPU while it computes.

    file  --read, several threads-->  pinned buffer  --copied by the GPU itself, on a stream of its own-->  tensor

Pinning memory takes about a second per GB, so the buffers are made once and used for one layer after another. A thread
that takes a buffer waits until the GPU has copied what was in it before.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from sedetect.checkpoints.files import read_header
from sedetect.errors import SedetectError

# The types of safetensors that torch can hold, by the format's names.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_ALIGNMENT = 64  # bytes; of what torch allocates
_ONE_READ = 2**30  # bytes; Linux reads at most 2 GiB at once
_BUFFER = 2**24  # bytes read at once by a thread; some ten times what makes a disk or the copy engine slow
_THREADS = min(8, os.cpu_count() or 1)  # one copies some 5 to 10 GB/s out of the page cache, less than the bus takes


@dataclass(eq=False)
class StoredTensor:
    """One tensor of a safetensors file, read where it is indexed (as transformers does with the library's slices).

    arriving: the tensor where Staging brings it, and the pieces it comes in; given out once, so that nothing keeps it.
    """

    file: Path
    start: int  # byte in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    arriving: tuple[torch.Tensor, list[Future[None]]] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self.arriving is not None:
            (tensor, pieces), self.arriving = self.arriving, None
            for piece in pieces:
                piece.result()
            return tensor[index]
        buffer = self.buffer()
        if self.nbytes:
            read_bytes(self.file, self.start, buffer)
        return self.shaped(buffer)[index]

    def buffer(self) -> torch.Tensor:
        """Memory (nbytes,) uint8 for its bytes: pages of its own, which go back to the system with the tensor."""
        # The place within a cache line is that of the file, as in a mapped tensor, so that no kernel can choose
        # otherwise. The file itself is not mapped: its pages would count as the process's.
        skip = self.start % _ALIGNMENT if self.start % DTYPES[self.dtype].itemsize == 0 else 0
        if not self.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(mmap.mmap(-1, skip + self.nbytes), dtype=torch.uint8)[skip:]

    def shaped(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor over a buffer that holds its bytes."""
        return buffer.view(DTYPES[self.dtype]).reshape(self.shape)

    def rows(self, first: int, count: int) -> "StoredTensor":
        """count of its rows (along the first dimension), from first on."""
        each = self.nbytes // self.shape[0]
        return StoredTensor(self.file, self.start + first * each, (count, *self.shape[1:]), self.dtype)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype


class Piece(NamedTuple):
    """Consecutive bytes of a file that are read at once, of these tensors, and where they go: (byte, uint8 tensor)."""

    file: Path
    start: int
    length: int
    tensors: list[StoredTensor]
    targets: list[tuple[int, torch.Tensor]]


class Buffer:
    """Pinned memory to read into, from which a device copies asynchronously. bytes: (N,) uint8."""

    def __init__(self, size: int, device: torch.device):
        cuda = device.type == "cuda"
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
        self._copied = torch.cuda.Event(blocking=True) if cuda else None

    def wait(self) -> None:
        """Wait until the device has received the last copy."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self, targets: list[tuple[int, torch.Tensor]]) -> None:
        """Have the bytes copied to their targets, on the current stream."""
        for place, target in targets:
            target.copy_(self.bytes[place : place + len(target)], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class Staging:
    """Brings stored tensors to a device, on a stream (of a GPU; None elsewhere).

    first: the part of the bytes, from 0 to 1, at which reading begins. Processes that want the same tensors at the same
    time each begin elsewhere and find the rest in the page cache, read from disk by the others.
    """

    def __init__(
        self,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        first: float = 0.0,
        threads: int = _THREADS,
        size: int = _BUFFER,
    ):
        self._device, self._stream, self._first, self._size = device, stream, first, size
        self._pool = ThreadPoolExecutor(threads, "staging", use_device, (device,))
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        with torch.cuda.stream(stream):
            for _ in range(2 * threads):  # a thread reads into one while the device copies from another
                self._free.put(Buffer(size, device))

    @contextmanager
    def bringing(self, tensors: Iterable[StoredTensor]) -> Iterator[None]:
        """Inside the context, tensors arrive one after another; indexing one waits until it is sent to the device.

        What the caller then does on the stream finds its bytes there. Tensors never indexed are freed at the end.
        Raises SedetectError, where a tensor is indexed or at the end, as read_bytes does.
        """
        tensors = list(tensors)
        made, targets = None, {}
        with torch.cuda.stream(self._stream):
            for tensor in tensors:
                made = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=self._device)
                tensor.arriving = (made, [])
                targets[tensor] = made.reshape(-1).view(torch.uint8)
        running = self._start(pieces_of(targets, self._size))
        del made, targets  # from here on, only the taker holds each tensor
        try:
            yield
        finally:
            wait(running)
            for tensor in tensors:
                tensor.arriving = None
        for done in running:
            done.result()

    def _start(self, pieces: Iterable[Piece]) -> list[Future[None]]:
        pieces, running = list(pieces), []
        begin = int(len(pieces) * self._first)
        for piece in pieces[begin:] + pieces[:begin]:
            running.append(self._pool.submit(self._carry, piece.file, piece.start, piece.length, piece.targets))
            for tensor in piece.tensors:
                assert tensor.arriving is not None  # no tensor is indexed before all threads have begun
                tensor.arriving[1].append(running[-1])
        return running

    def _carry(self, file: Path, start: int, count: int, targets: list[tuple[int, torch.Tensor]]) -> None:
        buffer = self._free.get()
        try:
            buffer.wait()
            read_bytes(file, start, buffer.bytes[:count])
            with torch.cuda.stream(self._stream):  # of this thread
                buffer.send(targets)
        finally:
            self._free.put(buffer)


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by name. Raises SedetectError for a type that torch cannot hold."""
    stored = named_tensors(files)
    for key, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            raise SedetectError(
                f"{tensor.file}: {key} is stored as {tensor.dtype}, which cannot be streamed; load it whole"
            )
    return stored


def named_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by name, from their headers, of whatever type."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(file)
        for key, entry in json.loads(header).items():
            if key != "__metadata__":
                start = 8 + len(header) + entry["data_offsets"][0]
                found[key] = StoredTensor(file, start, tuple(entry["shape"]), entry["dtype"])
    return found


def use_device(device: torch.device) -> None:
    """Bind this thread to one GPU; otherwise it would also initialize the first one, taking some 100 MB there."""
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)


def pieces_of(targets: dict[StoredTensor, torch.Tensor], size: int) -> Iterator[Piece]:
    """The bytes of all tensors in file order: neighbors together, large tensors in parts."""
    piece: Piece | None = None
    for tensor, target in sorted(targets.items(), key=lambda item: (str(item[0].file), item[0].start)):
        done = 0
        while done < len(target):
            start = tensor.start + done
            if piece is not None and (
                piece.length == size or (piece.file, piece.start + piece.length) != (tensor.file, start)
            ):
                yield piece
                piece = None
            if piece is None:
                piece = Piece(tensor.file, start, 0, [], [])
            count = min(len(target) - done, size - piece.length)
            piece.tensors.append(tensor)
            piece.targets.append((piece.length, target[done : done + count]))
            piece = piece._replace(length=piece.length + count)
            done += count
    if piece is not None:
        yield piece


def read_bytes(file: Path, start: int, buffer: torch.Tensor) -> None:
    """Fill buffer (N,) uint8 from byte start of a file."""
    view = buffer.numpy().data
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while view:
            count = opened.readinto(view[:_ONE_READ])
            if not count:
                raise SedetectError(f"{file}: ends early, so it changed during the run; copy or download it again")
            view = view[count:]
