"""Weights layer by layer: a model on the meta device whose decoder layers are filled straight from safetensors.

The model is made by transformers' own from_pretrained, of which one step is replaced: instead of all weights, only
those outside the decoder layers are loaded. Everything else (class, precision, attention, names and conversions of
weights, quantization) is as in a resident model, and load() later uses the same conversion for one layer's weights.
Missing, unused or misshapen weights are found before a byte is read, by converting tensors without data.

What it takes of the internals of transformers (5.17 to 5.24): two static methods of PreTrainedModel, one of the FP8
quantizer, and transformers.core_model_loading.
"""

import copy
import ctypes
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, core_model_loading
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils import logging as transformers_logging

from sedetect.checkpoints.files import adapter_in
from sedetect.checkpoints.memory import choose_device
from sedetect.checkpoints.options import Loading
from sedetect.checkpoints.staging import DTYPES, Staging, StoredTensor, stored_tensors
from sedetect.errors import SedetectError
from sedetect.models.banks import find_banks
from sedetect.models.identity import checksum, join_digest, model_dtype, model_id, named_weights
from sedetect.models.layers import decoder_layers
from sedetect.models.loading import load_with_notes, quiet, ragged_blocks, replaced_method
from sedetect.stats.note import Note

if TYPE_CHECKING:
    from transformers.modeling_utils import LoadStateDictConfig


class StreamedModel:
    """A model of which one decoder layer at a time has weights.

    model    in eval mode; all but these layers is on device, but for an output embedding of its own (lm_head)
    layers   its decoder layers (or what else it was opened with), on the meta device but for buffers that no checkpoint
             holds; paths: where they are in the model
    files    the checkpoint's safetensors files
    stored   per layer, its tensors in the checkpoint; rest: those outside the layers
    targets  the model's name of every tensor in the checkpoint, or the first of them
    staging  brings a layer's tensors to a GPU; None on a CPU, where each is read when it is converted
    notes    on how it loaded
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: list[str],
        config: "LoadStateDictConfig",
        device: torch.device,
        layers: dict[str, nn.Module],
        first: float = 0.0,
    ):
        self.model, self.device, self.files = model, device, [Path(file) for file in files]
        self.notes: list[Note] = []
        self._config = replace(config, device_map={"": device})
        self.layers, self.paths = list(layers.values()), list(layers)
        stored = stored_tensors(self.files)
        self.stored: list[dict[str, StoredTensor]] = [{} for _ in self.layers]
        self.rest: dict[str, StoredTensor] = {}
        numbers = {path: number for number, path in enumerate(self.paths)}
        self.targets = _targets(model, stored, config)
        for key, target in self.targets.items():
            layer = next((numbers[path] for path in parents(target) if path in numbers), None)
            (self.rest if layer is None else self.stored[layer])[key] = stored[key]
        on_meta = replace(config, device_map={"": "meta"})
        # The conversion itself, on tensors without data: says all that a load of the weights would say.
        self.loading_info = self.convert({key: _without_data(tensor) for key, tensor in stored.items()}, on_meta)
        self._missing = frozenset(self.loading_info.missing_keys)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.staging = None if self._side is None else Staging(device, self._side, first)

    def load_rest(self) -> None:
        """Load what is outside the decoder layers, without an output embedding of its own: logits are never needed."""
        model, head = self.model, self.model.get_output_embeddings()
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        own = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        skipped = {name for name, parameter in model.named_parameters() if id(parameter) in own} - tied
        self.convert({key: tensor for key, tensor in self.rest.items() if self.targets[key] not in skipped})
        with quiet():
            model.tie_weights(missing_keys=set(self._missing), recompute_mapping=False)

    def checksum(self, layer: int) -> int | None:
        """The checksum (sedetect.models.identity) of the weights of a layer that is loaded."""
        path = f"{self.paths[layer]}."
        with torch.cuda.stream(self._side):
            return checksum(weight for name, weight in named_weights(self.model).items() if name.startswith(path))

    def rest_checksum(self) -> int | None:
        """The checksum of what is outside the layers; an output embedding that is not loaded is read for it alone."""
        weights = named_weights(self.model)
        inside = tuple(f"{path}." for path in self.paths)
        outside = {name: weight for name, weight in weights.items() if not name.startswith(inside)}
        unread = {weight.module for weight in outside.values() if weight.tensor.is_meta}
        paths = {path for path, module in self.model.named_modules() if module in unread}
        self.convert(
            {key: tensor for key, tensor in self.rest.items() if self.targets[key].rpartition(".")[0] in paths}
        )
        total = checksum(outside.values())
        for module in unread:
            to_meta(module)
        return total

    def load(self, layer: int) -> float:
        """Read and convert the weights of a layer; returns the seconds it took. May run in a thread beside a forward.

        Raises SedetectError where a weight of it cannot be made from the checkpoint.
        """
        start = time.perf_counter()
        tensors = self.stored[layer]
        staged = nullcontext() if self.staging is None else self.staging.bringing(tensors.values())
        with torch.cuda.stream(self._side), staged:  # of conversions too; free() says when the memory may go back
            info = self.convert(tensors)
        if self._side is not None:
            self._side.synchronize()
        empty = [name for name, t in self.layers[layer].state_dict(keep_vars=True).items() if t.is_meta]
        self.check(layer, info, empty)
        give_back_freed_memory()  # what the conversion took
        return time.perf_counter() - start

    def free(self, layer: int) -> None:
        """Give the weights of a layer back."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).synchronize()  # the next load may reuse the memory, on its stream
        to_meta(self.layers[layer])
        give_back_freed_memory()

    def check(self, layer: int, info: Any, empty: list[str]) -> None:
        """Raise SedetectError where convert says, or these weights show, that something could not be made."""
        if info.conversion_errors or info.mismatched_keys or empty:
            broken = next(iter([*info.conversion_errors, *(key for key, *_ in info.mismatched_keys), *empty]))
            raise SedetectError(
                f"{self.paths[layer]}: {broken} cannot be made from the checkpoint's weights; "
                "give a complete checkpoint with its own config"
            )

    def convert(self, tensors: dict[str, Any], config: "LoadStateDictConfig | None" = None) -> Any:
        """Make the model's weights of tensors of the checkpoint, on the device unless config says another."""
        with _sequential_and_silent(), _copied_once(), ragged_blocks():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config or self._config)
        return info


def layers_to_run(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder layers by path. Raises SedetectError for a model that cannot be run with one of them at a time."""
    banks = find_banks(model)
    layers = decoder_layers(model, banks)
    path = next(path for path, module in model.named_modules() if module is layers)
    name = type(model).__name__
    outside = next((bank.path for bank in banks if not bank.path.startswith(f"{path}.")), None)
    if outside is not None:
        raise SedetectError(f"{name}: {outside} is outside {path}, so it cannot be streamed; load it whole")
    owners: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            if owners.setdefault(id(parameter), number) != number:
                raise SedetectError(
                    f"{name}: {path}.{owners[id(parameter)]} and {path}.{number} share weights, so it cannot be "
                    "streamed; load it whole"
                )
    tied = [key for pair in model.all_tied_weights_keys.items() for key in pair if key.startswith(f"{path}.")]
    if tied:
        raise SedetectError(f"{name}: {tied[0]} is tied to another weight, so it cannot be streamed; load it whole")
    return {f"{path}.{number}": layer for number, layer in enumerate(layers)}


def open_streamed(
    path_or_name: str | os.PathLike[str],
    loading: Loading = Loading(),
    *,
    weights: bool = True,
    outside: bool = True,
    first: float = 0.0,
    layers_of: Callable[[PreTrainedModel], dict[str, nn.Module]] = layers_to_run,
) -> StreamedModel:
    """A StreamedModel of a checkpoint.

    first as in Staging. weights=False loads none at all,
    and the model is as a GPU holds it: FP8 stays FP8, which transformers dequantizes where there is none. outside=False
    is that too, for sedetect.models.chosen, which loads those that are used. layers_of
    gives, of the model without weights, the modules by path that are to be loaded one at a time.
    Warns and raises SedetectError as load_model does, and raises it for what layers_of refuses.
    """
    if what := adapter_in(path_or_name):
        raise SedetectError(f"{what}: a checkpoint with one cannot be read layer by layer")
    device = choose_device(loading.device)
    made: list[StreamedModel] = []

    def load_pretrained(
        model: PreTrainedModel, state_dict: Any, files: list[str], config: "LoadStateDictConfig", *_: Any
    ) -> tuple[Any, None]:
        made.append(StreamedModel(model, files, config, device, layers_of(model), first))
        return made[0].loading_info, None

    def finalize(model: PreTrainedModel, config: "LoadStateDictConfig", info: Any) -> Any:
        return original_finalize(model, replace(config, device_map={"": device}), info)

    original_finalize = PreTrainedModel._finalize_model_loading
    with ExitStack() as stack:
        stack.enter_context(replaced_method(PreTrainedModel, "_load_pretrained_model", staticmethod(load_pretrained)))
        stack.enter_context(replaced_method(PreTrainedModel, "_finalize_model_loading", staticmethod(finalize)))
        if not (weights and outside):
            stack.enter_context(
                replaced_method(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
            )
        _, made[0].notes = load_with_notes(path_or_name, replace(loading, device=device))
    for note in made[0].notes:
        warnings.warn(str(note), stacklevel=2)
    if weights and outside:
        made[0].load_rest()
    return made[0]


def folder_digest(folder: str | os.PathLike[str], dtype: str) -> str:
    """The digest (sedetect.models.identity) of a checkpoint folder's model, as it runs in dtype (of a header).

    Its weights are read once, one layer in memory at a time. Without a checksum where they are loaded here in another
    form than in dtype: dequantized, or quantized. Raises SedetectError for what load_model refuses.
    """
    loading = Loading("cpu", dtype.partition(" ")[0])
    with warnings.catch_warnings(action="ignore"):
        streamed = open_streamed(folder, loading, layers_of=_layers_or_all)
    model = streamed.model
    if model_dtype(model) != dtype:
        return join_digest(model_id(model), None)
    parts = [streamed.rest_checksum()]
    for layer in range(len(streamed.layers)):
        streamed.load(layer)
        parts.append(streamed.checksum(layer))
        streamed.free(layer)
    return join_digest(model_id(model), None if None in parts else sum(part for part in parts if part is not None))


def _layers_or_all(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder layers by path; none of a model of which they cannot be loaded one at a time."""
    try:
        return layers_to_run(model)
    except SedetectError:
        return {}


def to_meta(module: nn.Module) -> None:
    """Drop the weights of a module and of all that is in it."""
    for one in module.modules():
        for name, parameter in one._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                one._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in one._buffers.items():
            if buffer is not None and name not in one._non_persistent_buffers_set:
                one._buffers[name] = torch.empty_like(buffer, device="meta")


def give_back_freed_memory() -> None:
    """Let the C library (glibc; others do not need to be asked) hand freed tensors back to the system.

    By itself it keeps ever larger ones, up to 32 MiB: a layer's weights more than are needed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _sequential_and_silent() -> Iterator[None]:
    """Conversion in the calling thread (and on its CUDA stream), one weight after another, without a progress bar."""
    name, shown = "HF_DEACTIVATE_ASYNC_LOAD", transformers_logging.is_progress_bar_enabled()
    before = os.environ.get(name)
    os.environ[name] = "1"
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _copied_once() -> Iterator[None]:
    """A conversion copies a converter for every weight that it makes, not for every tensor that goes into one.

    transformers copies it for each tensor, and drops all but the first of a weight: of DeepSeek-R1 that is most of the
    time that its 90,000 tensors take.
    """
    spare: dict[int, Any] = {}

    def copied(converter: Any) -> Any:
        kept = spare.get(id(converter))
        if kept is None or kept.collected_tensors:  # a weight's by now
            kept = spare[id(converter)] = copy.deepcopy(converter)
        return kept

    with replaced_method(core_model_loading, "deepcopy", copied):
        yield


def _targets(model: PreTrainedModel, stored: dict[str, Any], config: "LoadStateDictConfig") -> dict[str, str]:
    """The model's name of every checkpoint key, or the first of them."""
    renamings = [entry for entry in config.weight_mapping or () if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in config.weight_mapping or () if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    targets = {}
    for key in sorted(stored, key=dot_natural_key):
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if target not in known and key in known:
            target, _ = rename_source_key(key, [], [], model.base_model_prefix, known)
        targets[key] = target
    return targets


def parents(name: str) -> Iterator[str]:
    """The paths of the modules around a weight, the innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _without_data(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
