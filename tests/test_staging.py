"""Bytes of safetensors files by way of buffers that are used again and again, beside reading each tensor by itself."""

import random
import threading
import time

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import OPTIONAL, SHORT, TEXTS, save_random
from support.compare import assert_same_profile
from support.models import CONFIGS

import sedetect
from sedetect import SedetectError
from sedetect.checkpoints import memory, staging
from sedetect.checkpoints.staging import Buffer, Staging, StoredTensor, read_bytes
from sedetect.models.streamed import StreamedModel, open_streamed

CPU = torch.device("cpu")


@pytest.fixture
def stored(tmp_path) -> list[StoredTensor]:
    """Tensors of many sizes and types in two files, neighbours and not, in no order."""
    rng, tensors = random.Random(0), []
    for name in ("a", "b"):
        content = bytearray(rng.randbytes(13))
        kinds = [((3, 5), "F32"), ((100, 31), "BF16"), ((), "F32"), ((0, 7), "BF16"), ((2, 3000), "F8_E4M3")]
        for shape, dtype in kinds:
            tensors.append(StoredTensor(tmp_path / name, len(content), shape, dtype))
            content += rng.randbytes(tensors[-1].nbytes)
            content += rng.randbytes(rng.choice((0, 0, 9)))
        (tmp_path / name).write_bytes(content)
    rng.shuffle(tensors)
    return tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def own_stream(device: str) -> torch.cuda.Stream | None:
    return torch.cuda.Stream() if device == "cuda" else None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("size", [16, 64, 1000, 2**20])
@pytest.mark.parametrize("threads", [1, 3])
def test_equal_to_reading_each(stored, device, size, threads):
    expected, stream = [bits(tensor[...]) for tensor in stored], own_stream(device)
    brought = Staging(torch.device(device), stream, first=0.4, threads=threads, size=size)
    for _ in range(3):
        with brought.bringing(stored):
            found = [tensor[...] for tensor in stored]
        if stream is not None:
            stream.synchronize()
        assert [bits(tensor) for tensor in found] == expected
        assert [t.shape for t in found] == [t.shape for t in stored] and {t.device.type for t in found} == {device}
        assert all(tensor.arriving is None for tensor in stored)


class LateBuffer(Buffer):
    """Copies some time after it was told to, as a GPU does."""

    def __init__(self, size: int, device: torch.device):
        super().__init__(size, device)
        self.copying = threading.Thread()
        self.copying.start()
        made.append(self)

    def wait(self) -> None:
        self.copying.join()

    def send(self, targets: list[tuple[int, torch.Tensor]]) -> None:
        def copy() -> None:
            time.sleep(0.002)
            Buffer.send(self, targets)

        self.copying = threading.Thread(target=copy)
        self.copying.start()


made: list[LateBuffer] = []


def test_nothing_is_read_over_what_was_not_copied_yet(stored, monkeypatch):
    expected = [bits(tensor[...]) for tensor in stored]
    monkeypatch.setattr(staging, "Buffer", LateBuffer)

    def bring() -> list[bytes]:
        made.clear()
        with Staging(CPU, None, threads=2, size=512).bringing(stored):
            found = [tensor[...] for tensor in stored]
        for buffer in made:
            buffer.copying.join()
        return [bits(tensor) for tensor in found]

    assert bring() == expected
    with monkeypatch.context() as patch:
        patch.setattr(LateBuffer, "wait", lambda self: None)
        assert bring() != expected  # so that this test would notice


def test_every_byte_is_read_once_and_reading_begins_elsewhere(stored, monkeypatch):
    """In any order of the tensors: neighbours in one read, and no read beyond a buffer."""
    reads: list[tuple[str, int, int]] = []

    def read(file, start, buffer):
        reads.append((file.name, start, len(buffer)))
        read_bytes(file, start, buffer)

    monkeypatch.setattr(staging, "read_bytes", read)
    wanted = {(t.file.name, t.start + i) for t in stored for i in range(t.nbytes)}
    firsts = set()
    for first in (0.0, 0.5):
        reads.clear()
        with Staging(CPU, None, first=first, threads=1, size=1000).bringing(stored):
            pass
        bytes_read = [(name, start + i) for name, start, count in reads for i in range(count)]
        assert len(bytes_read) == len(set(bytes_read)) and set(bytes_read) == wanted
        assert max(count for *_, count in reads) == 1000
        firsts.add(reads[0])
    assert len(firsts) == 2
    reads.clear()
    with Staging(CPU, None, threads=1, size=2**20).bringing(stored):
        pass
    assert len(reads) < sum(t.nbytes > 0 for t in stored)


def test_a_file_that_ends_early(stored):
    with stored[0].file.open("rb+") as file:
        file.truncate(max(t.start for t in stored if t.file == stored[0].file and t.nbytes) + 1)
    for take in (False, True):
        refused = pytest.raises(SedetectError, match="ends early, so it changed during the run")
        with refused, Staging(CPU, None, threads=2, size=512).bringing(stored):
            for tensor in stored if take else ():
                tensor[...]
        assert all(tensor.arriving is None for tensor in stored)


def test_a_tensor_is_given_out_when_it_is_there(stored, monkeypatch):
    """Before the others are; who waits for the last one waits for its pieces alone."""
    first, *_, last = sorted((t for t in stored if t.nbytes), key=lambda t: (t.file.name, t.start))
    held, expected = threading.Event(), [bits(first[...]), bits(last[...])]

    def read(file, start, buffer):
        if (file, start) >= (last.file, last.start):
            assert held.wait(20)
        read_bytes(file, start, buffer)

    monkeypatch.setattr(staging, "read_bytes", read)
    with Staging(CPU, None, threads=1, size=16).bringing(stored):
        found = first[...]
        assert bits(found) == expected[0] and not held.is_set()
        threading.Timer(0.05, held.set).start()
        assert bits(last[...]) == expected[1]


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["on the GPU", "in pinned memory", "on disk"])
def test_hidden_states_of_a_gpu(tmp_path, monkeypatch, place):
    folder = save_random(CONFIGS["qwen3_moe"](), tmp_path / "m")
    resident = sedetect.profile_model(folder, TEXTS, **SHORT, loading=sedetect.Loading(device="cuda"))
    shares = {"on the GPU": (0.25, 0.0), "in pinned memory": (0.0, 0.5), "on disk": (0.0, 0.0)}[place]
    monkeypatch.setattr(memory, "_HIDDEN_SHARE", dict(zip(("cuda", "cpu"), shares)))
    resume = tmp_path / "resume" if place == "on disk" else None
    streamed = sedetect.profile_model(
        folder, TEXTS, **SHORT, loading=sedetect.Loading(device="cuda"), stream=True, resume=resume
    )
    for bank, state in streamed.stats.banks.items():
        assert state.equal(resident.stats.banks[bank], sums_rtol=1e-12), bank


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_streamed_profile(tmp_path, monkeypatch, name, device):
    """The layers of a whole profile, brought so: bit for bit what the resident model gives."""
    folder = save_random(CONFIGS[name](), tmp_path, max_shard_size="200KB")
    resident = sedetect.profile_model(folder, TEXTS, **SHORT, **OPTIONAL, loading=sedetect.Loading(device=device))
    brought, original = [], StreamedModel.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.staging = Staging(self.device, self._side, first=0.3, size=10_000)
        bringing = self.staging.bringing
        self.staging.bringing = lambda tensors: brought.append(len(tensors)) or bringing(tensors)

    monkeypatch.setattr(StreamedModel, "__init__", init)
    streamed = sedetect.profile_model(
        folder, TEXTS, **SHORT, **OPTIONAL, loading=sedetect.Loading(device=device), stream=True
    )
    assert len(brought) == 3 and min(brought) > 5
    if device == "cpu":
        assert_same_profile(streamed, resident)
    for bank, state in streamed.stats.banks.items():  # a GPU adds up sums in any order
        assert state.equal(resident.stats.banks[bank], sums_rtol=1e-12), bank


def test_every_part_begins_to_read_elsewhere(tmp_path, monkeypatch):
    folder, firsts, original = save_random(CONFIGS["qwen3_moe"](), tmp_path), [], StreamedModel.__init__

    def init(self, model, files, config, device, layers, first):
        original(self, model, files, config, device, layers, first)
        firsts.append(first)

    monkeypatch.setattr(StreamedModel, "__init__", init)
    for part in ((0, 4), (3, 4)):
        sedetect.profile_model(folder, TEXTS, **SHORT, loading=sedetect.Loading(device="cpu"), stream=True, part=part)
    assert firsts == [0.0, 0.75]


def test_what_no_one_takes_is_given_back(tmp_path):
    """A tensor that the model has no place for does not stay."""
    folder = save_random(CONFIGS["qwen3_moe"](), tmp_path)
    streamed = open_streamed(folder, loading=sedetect.Loading(device="cpu"))
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    extra = StoredTensor(tmp_path / "x.safetensors", 0, (2,), "U8")
    streamed.stored[1]["model.layers.1.nothing"] = extra
    streamed.staging = Staging(CPU, None)
    streamed.load(1)
    assert extra.arriving is None
