"""Weights that are read while the libraries that will load them are still being imported.

Importing transformers takes longer than bringing 20 GB from the page cache to a GPU, and leaves the other cores and the
copy engine idle. This module needs torch alone.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from sedetect.checkpoints.files import read_json, shards_of
from sedetect.checkpoints.memory import choose_device, free_memory
from sedetect.checkpoints.staging import Staging, StoredTensor, stored_tensors
from sedetect.errors import SedetectError

# Of the free memory: the weights as stored and the experts' stacked copies are there at the same time.
_SHARE = 0.4


class Prefetched(os.PathLike[str]):
    """A checkpoint folder whose weights are on their way to a GPU; goes wherever a folder goes.

    load_model takes the weights from here, once; whoever else is given it sees the folder.
    """

    def __init__(
        self, folder: str | os.PathLike[str], device: torch.device, tensors: dict[str, StoredTensor], first: float = 0.0
    ):
        self._folder, self._tensors = Path(folder), tensors
        self._arriving = ExitStack()
        # No stream of its own: who takes a tensor computes on the default one, after the copies.
        self._arriving.enter_context(Staging(device, None, first).bringing(tensors.values()))

    def __fspath__(self) -> str:
        return str(self._folder)

    def __str__(self) -> str:
        return str(self._folder)

    @contextmanager
    def weights(self) -> Iterator[dict[str, StoredTensor]]:
        """The tensors by name, each given out once; afterwards nothing is left of them.

        Raises SedetectError, where a tensor is indexed or at the end, for a file that ends early.
        """
        with self._arriving:
            yield self._tensors


def prefetch(model: str | os.PathLike[str], device: str | torch.device | None, first: float = 0.0) -> Prefetched | None:
    """Begin to bring the weights of a checkpoint folder to a GPU; first as in Staging.

    None where that is no gain or not possible: for hub names and damaged folders (which load_model refuses), for other
    devices, for quantized checkpoints (which may be dequantized on the way), and where memory is short.
    """
    if isinstance(model, Prefetched):
        return model
    if not Path(model).is_dir():
        return None
    device = choose_device(device)
    if device.type != "cuda":
        return None
    try:
        if "quantization_config" in read_json(Path(model) / "config.json"):
            return None
        tensors = stored_tensors(shards_of(Path(model)))
    except SedetectError:
        return None
    if sum(tensor.nbytes for tensor in tensors.values()) > _SHARE * free_memory(device):
        return None
    return Prefetched(model, device, tensors, first)
