"""The files of a checkpoint: identified and verified by their headers, before any weight is read."""

import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from sedetect.errors import SedetectError, WeightsError
from sedetect.files import check_readable

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
ADAPTER = "adapter_config.json"
_MERGE = "merge_and_unload and save_pretrained of peft"
_SOURCE = "give the checkpoint that it was made from"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
# Files of one rank each, by the names of Grok 2, of vLLM's sharded_state, of DeepSeek's convert.py, of Megatron.
_OF_A_RANK = r".*-TP-\w+\.safetensors|model-rank-\d+-part-\d+\.safetensors|model\d+-mp\d+\.safetensors|[mt]p_rank_\d+.*"
_RANKS = (
    "weights that are split for tensor parallelism, a part for each rank",
    "give a checkpoint with whole tensors, or join the parts with the program that split them",
)
# Things mistaken for a checkpoint: names of files and folders, what they are, and the way out.
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
    (_OF_A_RANK, *_RANKS),
    (r".*\.onnx(_data)?", "ONNX weights", _SOURCE),
    (r".*\.npz", "weights of MLX", _SOURCE),
    (
        r"consolidated.*|params\.json|original",
        "weights in the publisher's own format",
        "give the folder with config.json and model*.safetensors, in transformers' form",
    ),
    (r".*\.(h5|msgpack)", "weights of TensorFlow or Flax", "convert them to safetensors"),
    (
        r"(?!training_args|optimizer|scheduler|rng_state).*\.(bin|pt|pth|ckpt)(\.index\.json)?",
        "pickled weights are not read because they can run code",
        "convert the checkpoint with save_pretrained of transformers, which writes safetensors",
    ),
)
# Of the safetensors format: bits per value.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}
_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= dict.fromkeys(("U16", "I16", "F16", "BF16"), 16) | dict.fromkeys(("U32", "I32", "F32"), 32)
_BITS |= dict.fromkeys(("U64", "I64", "F64"), 64)
_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def checked_path(value: object, what: str) -> Path:
    """Return a path. Raises SedetectError for anything else, such as a loaded model. what: the thing at the path."""
    if not isinstance(value, (str, os.PathLike)):
        raise SedetectError(f"{type(value).__name__}: is not a path; give that of {what}")
    return Path(value)


def source_name(path_or_name: str | os.PathLike[str]) -> str:
    """The name to give to transformers: an existing folder, or a possible hub name.

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
    that the index names is absent, a safetensors header cannot be read, a file is not as long as its header says,
    matrices are stored as integers though the config names no quantization, a tensor is in two files with different
    values, or an expert is left out.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise SedetectError(f"{path}: {what}; give the folder of a checkpoint (config.json and *.safetensors)")
    config = read_config(folder)
    plain = "quantization_config" not in config
    found: dict[str, _Stored] = {}
    for shard in shards_of(folder):
        header = read_header(shard)
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            matrix = name.endswith((".weight", "_proj")) and len(entry["shape"]) > 1
            if plain and matrix and entry["dtype"] in _INTEGERS:
                raise SedetectError(
                    f"{shard}: {name} is stored as {entry['dtype']}, and config.json has no quantization_config to "
                    f"interpret them; give the checkpoint with its own config"
                )
            start, end = entry["data_offsets"]
            stored = _Stored(shard, 8 + len(header) + start, end - start, (entry["dtype"], entry["shape"]))
            if _differ(found.setdefault(name, stored), stored):
                raise SedetectError(
                    f"{shard}: {name} is in {found[name].file.name} too, with other values; give the files of one save"
                )
    last = (config.get("text_config") or config).get("num_hidden_layers")
    loaded = [name for name in found if not is_beyond(name, last)]
    _check_experts(folder, loaded, plain)


class _Stored(NamedTuple):
    """The place of a tensor in a file: first byte and size."""

    file: Path
    start: int
    length: int
    form: tuple[str, list[int]]  # dtype and shape


def _differ(one: _Stored, other: _Stored) -> bool:
    """Whether two tensors of one name differ in their values; equal duplicates are harmless."""
    if one is other:
        return False
    if one.form != other.form:
        return True
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        lengths = (min(2**24, one.length - done) for done in range(0, one.length, 2**24))
        return any(first.read(length) != second.read(length) for length in lengths)


def is_beyond(name: str, layers: Any) -> bool:
    """Whether a tensor belongs to a multi-token prediction head, which transformers does not load."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return name.startswith("mtp.") or (isinstance(layers, int) and layer is not None and int(layer[1]) >= layers)


def _check_experts(folder: Path, names: Iterable[str], alike: bool) -> None:
    """Raise for a gap in the expert numbers, which transformers would close by renumbering the experts after it.

    alike: also refuse an expert without a tensor that most of its layer have (some may be quantized, others not).
    """
    layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := _EXPERT.fullmatch(name):
            layers[match[1]][int(match[2])].add(match[3])
    for path, experts in layers.items():
        missing = next((number for number in range(max(experts)) if number not in experts), None)
        if missing is not None:
            raise WeightsError(
                f"{folder}: {path}.{missing} is missing, and the experts go on to {max(experts)}; give a complete "
                "checkpoint, or one whose experts were numbered anew with their router"
            )
        counts = Counter(tensor for own in experts.values() for tensor in own) if alike else {}
        usual = {tensor for tensor, count in counts.items() if 2 * count > len(experts)}
        for number, own in sorted(experts.items()):
            # The last ones may lack it together: experts that compute nothing (LongCat's) have parts of matrices alone.
            behind = (theirs for other, theirs in experts.items() if other > number)
            if (lacking := usual - own) and (absent := min(lacking.intersection(set().union(*behind)), default=None)):
                raise WeightsError(
                    f"{folder}: {path}.{number}.{absent} is missing, which most experts of the layer have; give a "
                    "complete checkpoint"
                )


def weights_digest(path: str | Path) -> str | None:
    """16 hexadecimal digits that tell checkpoints apart: over the names and headers of all safetensors files, and over
    4096 samples of 4 KiB of each file's weights (two fine-tunes of one model have equal headers).

    None where path is not a checkpoint folder. Raises SedetectError as check_checkpoint does.
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
        raise SedetectError(f"{file}: {_missing(file)}; give the folder of a complete checkpoint")
    check_readable(file)
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SedetectError(f"{file}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(document, dict):
        raise SedetectError(f"{file}: a JSON {type(document).__name__}, not an object; copy or download it again")
    return document


def _missing(file: Path) -> str:
    return f"a link to {os.readlink(file)}, which does not exist" if file.is_symlink() else "missing"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Without one, raises SedetectError saying what the folder holds instead."""
    file = folder / "config.json"
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise SedetectError(f"{folder}: cannot be read (Permission denied); give a folder that can")
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
    """The refusal of an adapter beside the weights of a checkpoint folder; None without one.

    transformers loads it into the model, where peft is installed.
    """
    file = Path(folder) / ADAPTER
    if not file.is_file():
        return None
    return f"{file}: an adapter beside the weights; merge it into them ({_MERGE}), or move the adapter's files away"


def _foreign(folder: Path, names: list[str]) -> str | None:
    """A description of a folder that holds these files and folders but no usable weights, and the way out."""
    if ADAPTER in names:
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        return f"{folder}: an adapter without its model ({base}); merge it into that ({_MERGE}) and give the result"
    for pattern, what, remedy in _FOREIGN:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return f"{folder / found[0]}: {what}; {remedy}"
    inside = [name for name in names if (folder / name / "config.json").is_file()]
    if inside:
        return (
            f"{folder}: not a checkpoint, but {len(inside)} of its folders are; give one of them, such as {inside[-1]}"
        )
    return None


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted; the ones transformers would read. All of them exist."""
    named = read_config(folder).get("transformers_weights")
    names = [named] if named else ["model.safetensors", "model.safetensors.index.json"]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    entries = sorted(os.listdir(folder))
    numbered = [name for name in entries if _SHARD.fullmatch(name)]
    if found is None:
        if numbered:
            raise SedetectError(
                f"{folder / numbered[0]}: {len(numbered)} shards without {names[-1]}, the index of their tensors; "
                f"copy or download it"
            )
        if what := _foreign(folder, entries):
            raise SedetectError(what)
        if others := [name for name in entries if name.endswith(".safetensors")]:
            raise SedetectError(f"{folder / others[0]}: is not read under this name; name the weights {names[0]}")
        raise SedetectError(f"{folder}: no {' or '.join(names)} in it; download the weights")
    if found.suffix != ".json":
        if numbered and not named:
            raise SedetectError(
                f"{found}: {len(numbered)} shards lie beside it, first {numbered[0]}, and programs differ in which "
                f"they read; move away the files that are not the model"
            )
        return [found]
    shards = [folder / name for name in shards_named(found)]
    if parts := [shard for shard in shards if re.fullmatch(_OF_A_RANK, shard.name)]:
        raise SedetectError(f"{parts[0]}: {'; '.join(_RANKS)}")
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        line = f"{missing[0]}: {_missing(missing[0])} ({len(missing)} of {len(shards)} shards)"
        if others := [name for name in numbered if folder / name not in shards]:
            raise SedetectError(
                f"{line}, and {found.name} does not name {len(others)} shards that are here, first {others[0]}: it is "
                "of another save; download the one that belongs to them"
            )
        raise SedetectError(f"{line}; download it")
    return shards


def shards_named(index: Path) -> list[str]:
    """The names of the weight files in an index, sorted."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise SedetectError(f"{index}: names no weights (weight_map); copy or download it again")
    return sorted(set(weight_map.values()))


def read_header(file: Path) -> bytes:
    """The header of a safetensors file. Raises SedetectError where it is damaged or the file has another size."""
    check_readable(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > MAX_HEADER:
            raise SedetectError(
                f"{file}: not a safetensors file ({size} bytes, header length {length}); download it again"
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

    Raises SedetectError naming the first that does not; KeyError, TypeError or ValueError for a malformed header.
    """
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = entry["dtype"], entry["shape"]
        start, after = entry["data_offsets"]
        if dtype not in _BITS:
            raise SedetectError(f"{file}: {name} is stored as {dtype}, an unknown type; download it again")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise SedetectError(f"{file}: {name} has the shape {shape}; download it again")
        if start != end or 8 * (after - start) != math.prod(shape) * _BITS[dtype]:
            raise SedetectError(
                f"{file}: {name} ({dtype}, {shape}) is said to lie at bytes {start} to {after}, where it cannot; "
                "download it again"
            )
        end = after
    return end
