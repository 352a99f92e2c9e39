"""The files of a checkpoint: verified and told apart by their headers, before any weight is read."""

import hashlib
import json
import math
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from sedetect.errors import SedetectError

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ADAPTER = "adapter_config.json"
_MERGE = "merge_and_unload and save_pretrained of peft"
_SOURCE = "give the checkpoint that it was made from"
# What else is taken for a checkpoint: names of files and folders, what they are, and the way out.
_FOREIGN = (
    (r".*\.gguf", "GGUF weights, which llama.cpp computes with", _SOURCE),
    (
        r".*\.distcp|pytorch_model_fsdp.*",
        "a part of a sharded checkpoint (torch.distributed, FSDP)",
        "write it as safetensors with `accelerate merge-weights`",
    ),
    (
        r"global_step\d+|zero_to_fp32\.py|.*_optim_states\.pt",
        "a part of a DeepSpeed checkpoint",
        "write it as safetensors with `python zero_to_fp32.py FOLDER OUT --safe_serialization`",
    ),
    (r".*\.onnx(_data)?", "ONNX weights", _SOURCE),
    (r".*\.npz", "weights of MLX", _SOURCE),
    (
        r"consolidated.*|params\.json|original",
        "weights in the publisher's own form",
        "give the folder with config.json and model*.safetensors, in transformers' form",
    ),
    (r".*\.(h5|msgpack)", "weights of TensorFlow or Flax", "convert them to safetensors"),
    (
        r"(?!training_args|optimizer|scheduler|rng_state).*\.(bin|pt|pth|ckpt)(\.index\.json)?",
        "pickled weights are not read, they can run code",
        "convert the checkpoint with save_pretrained of transformers, which writes safetensors",
    ),
)
# Of the safetensors format: bits per value.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= dict.fromkeys(("U16", "I16", "F16", "BF16"), 16) | dict.fromkeys(("U32", "I32", "F32"), 32)
_BITS |= dict.fromkeys(("U64", "I64", "F64"), 64)
_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def source_name(path_or_name: str | os.PathLike[str]) -> str:
    """The name to give to transformers: an existing folder, or what can only be a hub name.

    Raises SedetectError for a file and for a path that does not exist.
    """
    name = str(path_or_name)
    if name.endswith(".gguf"):
        raise SedetectError(_foreign(Path(name).parent, [Path(name).name]) or name)
    if Path(name).is_file():
        raise SedetectError(f"{name}: is a file; give the folder of the checkpoint")
    if not Path(name).is_dir() and not _HUB_NAME.fullmatch(name):
        raise SedetectError(f"{name}: no such folder; give a checkpoint folder or a hub name (owner/name)")
    return name


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Verify a checkpoint folder without reading its weights.

    Raises SedetectError where the folder or its config.json is missing or not valid, the weights are pickled, a shard
    that the index names is absent, a safetensors header cannot be read, a file is not as long as its header says, or
    matrices are stored as integers though the config names no quantization.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise SedetectError(f"{path}: {what}; give the folder of a checkpoint (config.json and *.safetensors)")
    plain = "quantization_config" not in read_config(folder)
    for shard in shards_of(folder):
        tensors = json.loads(read_header(shard))
        for name, entry in tensors.items() if plain else ():
            matrix = name.endswith((".weight", "_proj")) and len(entry["shape"]) > 1
            if name != "__metadata__" and matrix and entry["dtype"] in _INTEGERS:
                raise SedetectError(
                    f"{shard}: {name} is stored as {entry['dtype']}, and config.json has no quantization_config that "
                    "says what its values stand for; give the checkpoint with its own config"
                )


def weights_digest(path: str | Path) -> str | None:
    """16 hexadecimal digits that tell checkpoints apart: over the names and headers of all safetensors files, and over
    4096 samples of 4 KiB of each file's weights (two fine-tunes of one model have equal headers).

    None where path is no checkpoint folder. Raises SedetectError as check_checkpoint does.
    """
    folder = Path(path)
    if not (path and (folder / "config.json").is_file()):
        return None
    shards = shards_of(folder)
    return _digest_of(tuple((shard, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards))


@lru_cache(maxsize=8)
def _digest_of(shards: tuple[tuple[Path, int, int], ...]) -> str:
    """weights_digest of these files; size and time of change tell when it must be taken again."""
    state = hashlib.sha256()
    for shard, size, _ in shards:
        header = read_header(shard)
        state.update(shard.name.encode() + b"\0" + header)
        start = 8 + len(header)
        with shard.open("rb") as opened:
            for sample in range(4096):
                opened.seek(start + (size - start) * sample // 4096)
                state.update(opened.read(4096))
    return state.hexdigest()[:16]


def read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SedetectError(f"{file}: missing; give the folder of a complete checkpoint")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SedetectError(f"{file}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(document, dict):
        raise SedetectError(f"{file}: a JSON {type(document).__name__}, not an object; copy or download it again")
    return document


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises SedetectError that says what a folder without it is."""
    file = folder / "config.json"
    if folder.is_dir() and not file.is_file() and (what := _foreign(folder, sorted(os.listdir(folder)))):
        raise SedetectError(what)
    config = read_json(file)
    if isinstance(mlx := config.get("quantization"), dict) and "bits" in mlx:
        raise SedetectError(
            f"{folder}: quantized by MLX ({mlx['bits']} bits), which only MLX computes with; give the checkpoint that "
            "it was made from"
        )
    return config


def adapter_in(folder: str | os.PathLike[str]) -> str | None:
    """What to do about an adapter that lies beside the weights of a checkpoint folder; None where there is none.

    transformers loads it into the model, where peft is installed.
    """
    file = Path(folder) / ADAPTER
    if not file.is_file():
        return None
    return f"{file}: an adapter beside the weights; merge it into them ({_MERGE}), or move the adapter's files away"


def _foreign(folder: Path, names: list[str]) -> str | None:
    """What a folder is that holds these files and folders and no weights that are read, and the way out."""
    if ADAPTER in names:
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        return f"{folder}: an adapter without its model ({base}); merge it into that ({_MERGE}) and give the result"
    for pattern, what, remedy in _FOREIGN:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return f"{folder / found[0]}: {what}; {remedy}"
    inside = [name for name in names if (folder / name / "config.json").is_file()]
    if inside:
        return f"{folder}: no checkpoint, but {len(inside)} folders in it are; give one of them, such as {inside[-1]}"
    return None


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted; the ones transformers would read. All of them exist."""
    named = read_config(folder).get("transformers_weights")
    names = [named] if named else ["model.safetensors", "model.safetensors.index.json"]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        entries = sorted(os.listdir(folder))
        if parts := [name for name in entries if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]:
            raise SedetectError(
                f"{folder / parts[0]}: {len(parts)} shards without {names[-1]}, which says what is in which; copy or "
                "download it"
            )
        if what := _foreign(folder, entries):
            raise SedetectError(what)
        if others := [name for name in entries if name.endswith(".safetensors")]:
            raise SedetectError(f"{folder / others[0]}: not read under this name; the weights go into {names[0]}")
        raise SedetectError(f"{folder}: no {' or '.join(names)} in it; download the weights")
    if found.suffix != ".json":
        return [found]
    weight_map = read_json(found).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SedetectError(f"{found}: names no weights (weight_map); copy or download it again")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise SedetectError(f"{missing[0]}: missing ({len(missing)} of {len(shards)} shards are); download it")
    return shards


def read_header(file: Path) -> bytes:
    """The header of a safetensors file. SedetectError where it is damaged or the file's size is not what it says."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > _MAX_HEADER:
            raise SedetectError(
                f"{file}: not a safetensors file ({size} bytes, header length {length}); "
                "download it again (it may be a git-lfs pointer)"
            )
        header = opened.read(length)
    expected = 8 + length
    if len(header) == length:
        try:
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            expected += _checked_length(file, tensors)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise SedetectError(f"{file}: its header of {length} bytes cannot be read; download it again") from None
    if size != expected:
        least = "at least " if len(header) < length else ""
        raise SedetectError(f"{file}: {size} bytes where its header says {least}{expected}; download or copy it again")
    return header


def _checked_length(file: Path, tensors: dict[str, Any]) -> int:
    """Bytes of the tensors of a header, which must follow one another, each as long as its shape says.

    Raises SedetectError naming the first that does not; KeyError, TypeError or ValueError for what is no header.
    """
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = entry["dtype"], entry["shape"]
        start, after = entry["data_offsets"]
        if dtype not in _BITS:
            raise SedetectError(f"{file}: {name} is stored as {dtype}, which is not known; download it again")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise SedetectError(f"{file}: {name} has the shape {shape}; download it again")
        if start != end or 8 * (after - start) != math.prod(shape) * _BITS[dtype]:
            raise SedetectError(
                f"{file}: {name} ({dtype}, {shape}) is said to lie at bytes {start} to {after}, where it cannot; "
                "download it again"
            )
        end = after
    return end
