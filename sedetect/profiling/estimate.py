"""The size of a checkpoint and the cost of profiling it, from its config and safetensors headers alone."""

import os
import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sedetect.checkpoints.files import checked_path, shards_of
from sedetect.checkpoints.layout import TOP_K
from sedetect.checkpoints.options import Loading
from sedetect.checkpoints.source import Source, open_source
from sedetect.checkpoints.staging import read_bytes
from sedetect.documents import short_repr
from sedetect.errors import check_type
from sedetect.models.banks import find_banks
from sedetect.models.chosen import ChosenWeights
from sedetect.models.streamed import StreamedModel, open_streamed
from sedetect.stats.note import Note

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SAMPLE = 2**28  # bytes read to measure the bandwidth


@dataclass
class Plan:
    """A checkpoint by numbers.

    model         class of the model; files: how many safetensors files hold it
    dtype         the precision it is loaded in and computes in unless another is asked for
    held          the type that takes the most of its layers' memory on a GPU: dtype, or that of quantized weights
    layers        decoder layers, dense ones counted; experts: routed experts of each layer that has some
    top_k         experts per token, where the config says so
    routed, shared, rest      parameters of routed experts, of shared experts, and of all else
    stored        bytes in the files; layer_bytes: of them, those of each decoder layer; rest_bytes: outside the layers
    layer_parameters, rest_parameters    likewise, parameters in memory, scales of quantized weights among them
    layer_memory, rest_memory            likewise, their bytes in memory on a GPU
    width         of the hidden states
    located       bytes that locate reads of the layers, of one first token
    notes         facts that the reader must know: weights without a place in the model
    """

    model: str
    files: int
    dtype: torch.dtype
    held: torch.dtype
    layers: int
    experts: dict[int, int]
    top_k: int | None
    routed: int
    shared: int
    rest: int
    stored: int
    layer_bytes: list[int]
    rest_bytes: int
    layer_parameters: list[int]
    rest_parameters: int
    layer_memory: list[int]
    rest_memory: int
    width: int
    located: int
    notes: list[Note]

    __repr__ = short_repr

    @property
    def parameters(self) -> int:
        return self.routed + self.shared + self.rest

    @property
    def active(self) -> int | None:
        """Parameters that compute one token, embeddings counted whole."""
        if self.top_k is None:
            return None
        total = sum(self.experts.values())
        return self.parameters - self.routed + round(self.routed * self.top_k * len(self.experts) / total)

    def weights(self, dtype: torch.dtype) -> int:
        """Bytes of all weights in this precision; in the precision `held`, quantized weights as they are held."""
        return self.rest_memory + sum(self.layer_memory) if dtype == self.held else self.parameters * dtype.itemsize

    def streamed(self, dtype: torch.dtype) -> int:
        """The most bytes of weights that streaming holds: those outside the layers, and three times the largest
        layer.
        """
        if dtype == self.held:
            return self.rest_memory + 3 * max(self.layer_memory)
        return (self.rest_parameters + 3 * max(self.layer_parameters)) * dtype.itemsize


def make_plan(model: str | os.PathLike[str], loading: Loading = Loading()) -> Plan:
    """Plan of a checkpoint (a folder, a hub name, the http(s) address of a folder), whatever the device.

    Raises SedetectError for what open_source, check_checkpoint, load_model and find_banks refuse.
    """
    checked_path(model, "a checkpoint, a hub name or an address")
    check_type("loading", loading, Loading)
    with open_source(model, revision=loading.revision, code=loading.trust_remote_code) as source:
        with warnings.catch_warnings(action="ignore"):  # they are notes of the plan
            streamed = open_streamed(source.folder, replace(loading, device="cpu", revision=None), weights=False)
        return _plan_of(streamed, source)


def _plan_of(streamed: StreamedModel, source: Source) -> Plan:
    model, banks = streamed.model, find_banks(streamed.model)
    routed = sum(_count(bank.stored_in) for bank in banks if bank.routed)
    shared_mlps = {bank.path.rpartition(".")[0] for bank in banks if bank.id.base == "shared"}
    shared = sum(_count(model.get_submodule(path)) for path in shared_mlps)
    experts: dict[int, int] = {}
    for bank in banks:
        if bank.routed:
            experts[bank.id.layer] = experts.get(bank.id.layer, 0) + bank.experts
    layer_bytes = [sum(tensor.nbytes for tensor in layer.values()) for layer in streamed.stored]
    layer_parameters = [_count(layer) for layer in streamed.layers]
    layer_memory = [_nbytes(layer) for layer in streamed.layers]
    rest_bytes = sum(tensor.nbytes for tensor in streamed.rest.values())
    top_k = top_k_of(model.config.get_text_config())
    sizes: Counter[torch.dtype] = Counter()
    for parameter in (parameter for layer in streamed.layers for parameter in layer.parameters()):
        sizes[parameter.dtype] += parameter.nbytes
    return Plan(
        model=type(model).__name__,
        files=len(streamed.files),
        dtype=model.dtype,
        held=max(sizes, key=lambda dtype: sizes[dtype]),
        layers=len(streamed.layers),
        experts=experts,
        top_k=top_k,
        routed=routed,
        shared=shared,
        rest=_count(model) - routed - shared,
        stored=sum(layer_bytes) + rest_bytes,
        layer_bytes=layer_bytes,
        rest_bytes=rest_bytes,
        layer_parameters=layer_parameters,
        rest_parameters=_count(model) - sum(layer_parameters),
        layer_memory=layer_memory,
        rest_memory=_nbytes(model) - sum(layer_memory),
        width=model.get_input_embeddings().get_parameter("weight").shape[1],
        located=sum(ChosenWeights(streamed, banks, source).bytes_of(layers_of_rule(len(streamed.layers)), top_k or 8)),
        notes=[replace(note, text=source.named(note.text)) for note in streamed.notes],
    )


def layers_of_rule(layers: int) -> int:
    """How many of the decoder's layers locate walks: the first 75%, in which the published rule looks."""
    return max(1, round(0.75 * layers))


def measure_read(folder: str | Path, limit: int = SAMPLE) -> tuple[float, int]:
    """(bytes per second, bytes read) of one thread that reads the start of a checkpoint's largest file from disk.

    Where possible, the pages are first dropped from the system's cache, because cached pages would read faster.
    """
    file = max(shards_of(Path(folder)), key=lambda file: file.stat().st_size)
    count = min(limit, file.stat().st_size)
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, count, os.POSIX_FADV_DONTNEED)
    buffer = torch.zeros(count, dtype=torch.uint8)
    start = time.perf_counter()
    read_bytes(file, 0, buffer)
    return count / (time.perf_counter() - start), count


def _count(module: torch.nn.Module) -> int:
    """Parameters of a module, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _nbytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def top_k_of(config: "PreTrainedConfig") -> int | None:
    """Experts per token, where a config says so."""
    found = (getattr(config, name, None) for name in TOP_K)
    return next((value for value in found if isinstance(value, int)), None)
