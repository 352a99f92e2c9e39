"""The identity of a model: its name, for people, and a digest that is equal for all its runs.

A digest is an id and a checksum, "0123456789abcdef-0123456789abcdef". The id is of the text model's config and of which
of its modules have weights; the checksum is of all weights that run on text, taken where they are. Neither knows of
paths, files or revisions. Names are relative to the decoder, so that a text model has the digest that it has inside a
multimodal one. Quantized weights and what they are dequantized to share the id, and have checksums of their own.

The checksum is a sum modulo 2^64 of the words of every weight's values, each times an odd number that depends on the
name, the row and the place in it: any order and any split of the rows give the same sum, one changed value always
another, and weights that change places almost surely another. It is of values: bfloat16 weights and the same ones in
float32 are equal. 10 GB take 1.0 to 1.4 s on two cores of a CPU in bfloat16, 3.4 to 5.7 s in float32.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from sedetect.errors import Argument, SedetectError
from sedetect.models.wrappers import unwrap
from sedetect.stats.model import UNCHECKED, Header, digest, same_model
from sedetect.stats.note import Note

# Of a config: says nothing of what the model computes, or changes with the release or the options that read it. So does
# quantization_config, which goes where transformers dequantizes; how weights are stored is in their own checksum.
_VOLATILE = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "distributed_config", "quantization_config",
    "auto_map", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
    "problem_type", "base_model_ep_plan", "base_model_tp_plan", "base_model_pp_plan",
}  # fmt: skip
_COLUMNS = 2**16  # values of a row that are multiplied by one table: it stays in the cache
_BLOCK = {"cpu": 2**18, "cuda": 2**24}  # values at once; on a GPU a product of that size is held
_MASK = 2**64 - 1
# Values of float32 and float16 are summed as their upper half (which is all of a bfloat16) and their lower one.
_LOWER = 0x9E3779B97F4A7C15


def model_name(model: nn.Module) -> str:
    """The hub name, or the last part of a folder's path: files that travel do not tell where it lay."""
    config: Any = model.config
    name: str = config._name_or_path
    if not name:
        return type(model).__name__
    path = Path(name)
    if path.parent.name == "snapshots" and path.parts[-3].startswith("models--"):
        return path.parts[-3].removeprefix("models--").replace("--", "/")
    if path.is_dir():
        return path.resolve().name
    # A path that is no more a folder here; a hub name has one slash at most.
    return path.name if path.is_absolute() or name.startswith(".") or name.count("/") > 1 else name


def model_digest(model: nn.Module) -> str:
    """The digest that identifies runs of one model (module docstring).

    The checksum is "unchecked" where weights are nowhere to be read (on the meta device without accelerate's hooks, or
    in a form of a package's own). All ranks of an expert-parallel model call this together. Raises SedetectError for
    what is not a loaded model.
    """
    model = unwrap(model)
    weights = named_weights(model)
    return join_digest(_id(model, weights), None if _hidden(model) else checksum(weights.values()))


def join_digest(model_id: str, total: int | None) -> str:
    """The digest of an id and a checksum, None for unknown."""
    return f"{model_id}-{UNCHECKED if total is None else f'{total & _MASK:016x}'}"


def add_digests(parts: Iterable[str]) -> str:
    """The digest of a model from those of disjoint parts of its weights."""
    ids, sums = zip(*(part.split("-") for part in parts))
    return join_digest(ids[0], None if UNCHECKED in sums else sum(int(one, 16) for one in sums))


def model_id(model: nn.Module) -> str:
    """The id of a digest, for models without weights too."""
    return _id(model, named_weights(model))


def model_dtype(model: nn.Module) -> str:
    """What a model computes in, and where its weights are stored quantized, the type that they are stored in."""
    dtype: Any = model.dtype  # of every PreTrainedModel
    name = str(dtype).removeprefix("torch.")
    held = {parameter.dtype for parameter in model.parameters()}
    small = sorted(str(one).removeprefix("torch.") for one in held if one.itemsize == 1 and one != torch.bool)
    if _hidden(model):
        small = ["mxfp4"]
    return f"{name} ({small[0]} weights)" if small else name


def check_statistics(header: Header, model: nn.Module, name: str, remedy: str = "profile this one") -> None:
    """Raise SedetectError where the statistics of this header are not of that model. name: what they are called."""
    now, there, here = model_digest(model), header.dtype, model_dtype(model)
    if ("weights" in there) != ("weights" in here):  # one quantized, the other dequantized
        now = join_digest(now.partition("-")[0], None)
    if not same_model(header.digest, now):
        raise other_model(header, now, name, remedy, here)


def other_model(header: Header, found: str, name: str, remedy: str, dtype: str) -> SedetectError:
    """The refusal of statistics where another digest was found, of weights in dtype."""
    if "-" not in header.digest:
        return SedetectError(
            f"{name}: an earlier sedetect wrote these statistics of {header.model}, which do not say of which weights; "
            f"{remedy}"
        )
    if header.digest.partition("-")[0] != found.partition("-")[0]:
        return SedetectError(f"{name}: statistics of another model ({header.model}, {header.digest}); {remedy}")
    why = f"{name}: statistics of {header.model} with other weights ({header.digest}, here {found})"
    if header.dtype == dtype:
        return SedetectError(f"{why}: another revision, or edited or adapted ones; {remedy}")
    return SedetectError(
        f"{why}, which run in {dtype}, and ran in {header.dtype} then; give ",
        Argument("dtype"),
        f" {header.dtype.split()[0]}, or {remedy}",
    )


def digest_notes(model: nn.Module, found: str) -> list[Note]:
    """Notes on a digest."""
    if not found.endswith(UNCHECKED):
        return []
    text = (
        f"{type(model).__name__}: its weights have no checksum; statistics of other weights of this architecture "
        f"cannot be distinguished from these"
    )
    return [Note("unchecked_weights", text)]


class Weight(NamedTuple):
    """One weight of a model: its name in the checksum, and the module that has it, there called key."""

    name: str
    module: nn.Module
    key: str

    @property
    def tensor(self) -> torch.Tensor:
        """It, where it lies; one that accelerate offloads from wherever its hook keeps it."""
        found = self.module._parameters.get(self.key)
        tensor = self.module._buffers[self.key] if found is None else found
        assert tensor is not None
        if tensor.is_meta:
            hook = getattr(self.module, "_hf_hook", None)
            for one in getattr(hook, "hooks", [hook]):
                if getattr(one, "weights_map", None) is not None:
                    return one.weights_map[self.key]
        return tensor


def named_weights(model: nn.Module) -> dict[str, Weight]:
    """The weights that run on text by their paths in the model: parameters and stored buffers, tied ones once."""
    root, others = _text_part(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str, Weight] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        inside = not root or path == root or path.startswith(f"{root}.")
        if not inside and others is not None and module not in others:
            continue
        own = {key: p for key, p in module._parameters.items() if p is not None}
        own |= {
            key: buffer
            for key, buffer in module._buffers.items()
            if buffer is not None and key not in module._non_persistent_buffers_set
        }
        for key, tensor in own.items():
            full = f"{path}.{key}" if path else key
            if id(tensor) in seen or (full in tied and tensor.is_meta):
                continue
            seen.add(id(tensor))
            name = full[len(root) + 1 :] if inside and root else full
            found[full] = Weight(name.replace("_orig_mod.", ""), module, key)
    return found


def checksum(weights: Iterable[Weight]) -> int | None:
    """The checksum of these weights, to be added up with that of others; None where one cannot be read."""
    tensors = [(weight.name, part) for weight in weights for part in _plain(weight.tensor)]
    if any(tensor.is_meta for _, (tensor, *_) in tensors):
        return None
    here = [(name, tensor, first) for name, (tensor, first, _) in tensors]
    split = [group is not None for _, (_, _, group) in tensors]
    group = next((group for _, (_, _, group) in tensors if group is not None), None)
    if all(tensor.device.type == "cpu" for _, tensor, _ in here):
        with ThreadPoolExecutor(torch.get_num_threads(), "checksum") as pool:
            sums = list(pool.map(_of_tensor, here))
    else:
        sums = list(map(_of_tensor, here))
    values = [int(total) for total in sums]  # after all were started
    whole = sum(value for value, part in zip(values, split) if not part)
    mine = sum(value for value, part in zip(values, split) if part)
    if group is not None:
        parts: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, mine & _MASK, group=group)
        mine = sum(parts)
    return (whole + mine) & _MASK


def _id(model: nn.Module, weights: dict[str, Weight]) -> str:
    modules = sorted({weight.name.rpartition(".")[0] for weight in weights.values()})
    return digest(json.dumps([stable_config(model), modules], sort_keys=True, default=str))


def stable_config(model: nn.Module) -> dict[str, Any]:
    """The fields of the text model's config that affect its computation."""
    config: Any = model.config
    stable: dict[str, Any] = _stable(_text_config(config).to_dict())
    return stable


def _text_config(config: Any) -> Any:
    return config if config.is_encoder_decoder else config.get_text_config()


def _stable(config: Any) -> Any:
    """A config's dictionary without what is volatile, sub-configs too."""
    if isinstance(config, dict):
        return {key: _stable(value) for key, value in config.items() if key not in _VOLATILE}
    return config


def _text_part(model: nn.Module) -> tuple[str, set[nn.Module] | None]:
    """The path of the decoder in the model, and the modules beside it that run on text too; None: all of them."""
    outer: Any = model  # a PreTrainedModel
    config = outer.config
    if config.is_encoder_decoder or not hasattr(model, "get_decoder"):
        return "", None
    decoder = outer.get_decoder()
    while hasattr(decoder, "get_decoder") and (inner := decoder.get_decoder()) is not decoder:
        decoder = inner  # a multimodal model may hold a language model with a head
    root = next((path for path, module in model.named_modules() if module is decoder), "")
    if _text_config(config) is config:
        return root, None
    head = outer.get_output_embeddings()
    return root, set() if head is None else {head}


def _hidden(model: nn.Module) -> bool:
    """Whether weights lie in tensors of another package's, which no module names."""
    return any(type(module).__name__ == "Mxfp4GptOssExperts" for module in model.modules())


def _plain(tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, Any]]:
    """The plain tensors that a weight consists of: each with its first row, and the ranks that have the other rows."""
    if isinstance(tensor, DTensor):
        placement, mesh = tensor.placements, tensor.device_mesh
        rows = tensor.dim() > 1 and tensor.shape[0] % mesh.size() == 0  # a vector is one row
        if len(placement) == 1 and placement[0] == Shard(0) and rows:
            local = tensor.to_local()
            yield local, len(local) * mesh.get_local_rank(), mesh.get_group()
        else:
            whole = all(one == Replicate() for one in placement)
            yield tensor.to_local() if whole else tensor.full_tensor(), 0, None
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    else:
        yield tensor.detach().as_subclass(torch.Tensor), 0, None


@torch.no_grad()
def _of_tensor(named: tuple[str, torch.Tensor, int]) -> torch.Tensor | int:
    """The checksum of one tensor, rows along its first dimension, the first of them number first of the whole."""
    name, tensor, first = named
    if not tensor.numel():
        return 0
    rows = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(len(tensor), -1)
    if rows.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        rows = rows.view(torch.uint8)
    step = max(1, _BLOCK.get(rows.device.type, 2**24) // min(_COLUMNS, rows.shape[1]))
    by_row = _odd(1, first, first + len(rows), rows.device)
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    for number, columns in enumerate(rows.split(_COLUMNS, dim=1)):
        sums = [_row_sums(block) for block in columns.split(step)]
        total += (torch.cat(sums) * by_row).sum() * _signed(_mix(number) | 1)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") | 1
    return total * _signed(seed)


def _row_sums(block: torch.Tensor) -> torch.Tensor:
    """(R,) int64 sums over the words of a block's rows, each times the number of its place."""
    if block.dtype == torch.float16:
        block = block.float()
    if block.dtype == torch.float32:
        bits = block.contiguous().view(torch.int32)
        upper, lower = (bits >> 16).to(torch.int16), bits.to(torch.int16)
        return _dot(_words(upper)) + _dot(_words(lower)) * _signed(_LOWER)
    return _dot(_words(block))


def _words(block: torch.Tensor) -> torch.Tensor:
    """Rows (R, C) as 64-bit words, filled up with zeros."""
    width = 8 // block.element_size()
    if block.shape[1] % width or block.stride(1) != 1 or block.storage_offset() % width or block.stride(0) % width:
        block = F.pad(block.view(torch.int8 if width == 8 else torch.int16), (0, -block.shape[1] % width)).contiguous()
    return block.view(torch.int64)


def _dot(words: torch.Tensor) -> torch.Tensor:
    table = _table(words.device)[: words.shape[1]]
    if words.device.type == "cpu":
        return torch.mv(words, table)
    return (words * table).sum(1)


@lru_cache(maxsize=16)
def _table(device: torch.device) -> torch.Tensor:
    """The numbers by which the words of _COLUMNS values are multiplied; of bytes there are fewer words."""
    return _odd(2, 0, _COLUMNS // 4, device)


def _odd(kind: int, start: int, end: int, device: torch.device) -> torch.Tensor:
    """Odd pseudo-random numbers (N,) int64 for the places start to end: splitmix64 of them."""
    z = (torch.arange(start, end, device=device) + (kind << 40)) * _signed(_LOWER)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return z | 1


def _mix(number: int) -> int:
    return (number + 1) * _LOWER & _MASK


def _signed(number: int) -> int:
    """A number of 64 bits as torch's int64 has it."""
    number &= _MASK
    return number - (1 << 64) if number >> 63 else number
