"""Opening a checkpoint: every file is verified before any weight is read, and nothing is unpickled."""

import hashlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sedetect.adapters import serve_quantized
from sedetect.errors import SedetectError, shorten

# Tried in this order: a text-only class leaves the vision tower of a multimodal checkpoint out.
_AUTO_CLASSES = (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModel,
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


def check_checkpoint(path: str | Path, *, trust_remote_code: bool = False) -> None:
    """Verify a checkpoint folder without reading its weights.

    Raises SedetectError where the folder or its config.json is missing or not valid, the model type is unknown to the
    installed transformers, the weights are pickled, a shard that the index names is absent, a safetensors header
    cannot be read, or a file is not as long as its header says.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise SedetectError(f"{path}: {what}; give the folder of a checkpoint (config.json and *.safetensors)")
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in config):
        remote = ", or pass --trust-remote-code to run the model code it brings" if "auto_map" in config else ""
        raise SedetectError(
            f"{folder / 'config.json'}: model_type {model_type!r} is unknown to transformers "
            f"{transformers.__version__}; install a newer transformers{remote}"
        )
    for shard in shards_of(folder):
        read_header(shard)


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


def load_model(
    path_or_name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint folder, verified first, or a model of the hub, in eval mode.

    Args:
        device: where it goes; None is cuda if there is one, else cpu.
        dtype: "auto" is the checkpoint's own; otherwise a torch floating-point type or its name.
        revision: branch, tag or commit of a hub model.
        attn: attention implementation of transformers ("eager", "sdpa", ...); None leaves the choice to it.
        trust_remote_code: run model code that comes with the checkpoint.

    Weights in the checkpoint that the model has no place for are warned about (UserWarning, one line).
    Raises SedetectError for what check_checkpoint refuses, for weights that are missing or of another shape, and
    where transformers cannot load the model.
    """
    name = _resolve(path_or_name)
    if Path(name).is_dir():
        check_checkpoint(name, trust_remote_code=trust_remote_code)
    device, dtype = choose_device(device), choose_dtype(dtype)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _one_line_errors(name):
        config = AutoConfig.from_pretrained(name, **options)
    method = _quantization(config)
    auto_class = _auto_class(name, config, trust_remote_code)
    if attn is not None:
        options["attn_implementation"] = attn
    if device.type != "cpu" and importlib.util.find_spec("accelerate"):
        options["device_map"] = {"": device}  # straight to the device; without accelerate by way of host memory
    with _one_line_errors(name), _captured_report() as report:
        try:
            model, loaded = auto_class.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
        except RuntimeError:
            _refuse_unconverted(name, report)
            raise
        _check_loaded(name, type(model).__name__, loaded, method)
        if "device_map" not in options and not any(p.is_meta for p in model.parameters()):  # see streaming_weights
            model = model.to(device)
    if method == "mxfp4" and _quantization(model.config) is None:
        warnings.warn(
            f"{name}: transformers dequantized its MXFP4 experts, as it does without a GPU or the package kernels: the "
            "same numbers in four times the memory; where that is too much, pip install kernels on a GPU",
            stacklevel=2,
        )
    serve_quantized(model)  # for good: without kernels its own forwards would raise
    return model.eval()


def empty_model(folder: str | Path, config: str | Path | None = None) -> PreTrainedModel:
    """The model of a checkpoint folder without its weights, on the meta device.

    config is a folder to take config.json from instead. Raises SedetectError where transformers cannot build it.
    """
    with _one_line_errors(str(folder)):
        read = AutoConfig.from_pretrained(str(config or folder))
        read._name_or_path = str(folder)
        with torch.device("meta"):
            return _auto_class(str(folder), read, False).from_config(read).eval()


def load_tokenizer(
    path_or_name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder or hub model. Raises SedetectError where there is none."""
    name = _resolve(path_or_name)
    with _one_line_errors(name, "tokenizer "):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    # without any tokenizer file transformers makes an empty one, which turns every text into no tokens
    if not tokenizer("a 1", add_special_tokens=False)["input_ids"]:
        raise SedetectError(f"{name}: no tokenizer in it; add the model's tokenizer.json and tokenizer_config.json")
    return tokenizer


def _resolve(path_or_name: str | Path) -> str:
    """The name to give to transformers: an existing folder, or what can only be a hub name."""
    name = str(path_or_name)
    if Path(name).is_file():
        raise SedetectError(f"{name}: is a file; give the folder of the checkpoint")
    if not Path(name).is_dir() and not _HUB_NAME.fullmatch(name):
        raise SedetectError(f"{name}: no such folder; give a checkpoint folder or a hub name (owner/name)")
    return name


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise SedetectError(f"{file}: missing; give the folder of a complete checkpoint")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SedetectError(f"{file}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(document, dict):
        raise SedetectError(f"{file}: a JSON {type(document).__name__}, not an object; copy or download it again")
    return document


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted; the ones transformers would read. All of them exist."""
    named = _read_json(folder / "config.json").get("transformers_weights")
    names = [named] if named else ["model.safetensors", "model.safetensors.index.json"]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise SedetectError(
                f"{folder / pickles[0]}: pickled weights are not read, they can run code; "
                "convert the checkpoint with save_pretrained of transformers, which writes safetensors"
            )
        raise SedetectError(f"{folder}: no {' or '.join(names)} in it; download the weights")
    if found.suffix != ".json":
        return [found]
    weight_map = _read_json(found).get("weight_map")
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
            expected += max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise SedetectError(f"{file}: its header of {length} bytes cannot be read; download it again") from None
    if size != expected:
        least = "at least " if len(header) < length else ""
        raise SedetectError(f"{file}: {size} bytes where its header says {least}{expected}; download or copy it again")
    return header


def choose_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SedetectError(f"--device {device}: cannot be used ({shorten(error)}); use cpu or leave it out") from None
    return device


def choose_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise SedetectError(f"--dtype {dtype}: no floating-point type of torch; use auto, bfloat16, float16 or float32")
    return "auto" if dtype == "auto" else found


def _auto_class(name: str, config: PreTrainedConfig, trust_remote_code: bool) -> type:
    remote = getattr(config, "auto_map", {}) if trust_remote_code else {}
    for auto_class in _AUTO_CLASSES:
        if auto_class.__name__ in remote or type(config) in auto_class._model_mapping:
            return auto_class
    raise SedetectError(f"{name}: transformers has no language model for {type(config).__name__}; give one that has")


def _check_loaded(name: str, model: str, loaded: dict[str, Any], method: str | None) -> None:
    """Judge what from_pretrained says of the weights: missing and mismatched are errors, unexpected a warning."""
    if missing := sorted(loaded["missing_keys"]):
        if method is not None and (experts := [weight for weight in missing if "experts" in weight]):
            raise SedetectError(
                f"{name}: transformers does not put weights quantized by {method} into the experts of {model}, first "
                f"{experts[0]}; give the unquantized checkpoint, or one in FP8, MXFP4 or compressed-tensors"
            )
        raise SedetectError(
            f"{name}: {len(missing)} weights of {model} are missing, first {missing[0]}; give a complete checkpoint"
        )
    if mismatched := sorted(loaded["mismatched_keys"]):
        weight, stored, wanted = mismatched[0]
        raise SedetectError(
            f"{name}: {len(mismatched)} weights do not fit {model}, first {weight}: {tuple(stored)} in the checkpoint, "
            f"{tuple(wanted)} by its config.json; give a complete checkpoint with its own config"
        )
    if unexpected := sorted(loaded["unexpected_keys"]):
        warnings.warn(f"{name}: {len(unexpected)} weights are not used by {model}, first {unexpected[0]}", stacklevel=3)


def _quantization(config: PreTrainedConfig) -> str | None:
    """Name of the method that a config says the weights are quantized by."""
    given = getattr(config, "quantization_config", None)
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    return getattr(method, "value", method)


def _refuse_unconverted(name: str, report: list[str]) -> None:
    """Name the first weight that transformers could not fuse (experts of unequal shapes); its exception does not."""
    if weights := re.findall(r"^(\S+) *\|.*CONVERSION", "\n".join(report), re.MULTILINE):
        raise SedetectError(
            f"{name}: {len(weights)} weights cannot be put together from the checkpoint's, first {weights[0]}; "
            "give a complete checkpoint with its own config"
        ) from None


@contextmanager
def _captured_report() -> Iterator[list[str]]:
    """Collect the table of missing and unexpected weights that transformers logs, instead of printing it."""
    report: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")
    own, level = logger.level, logger.getEffectiveLevel()

    def divert(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return record.levelno >= level
        report.append(message)
        return False

    logger.addFilter(divert)
    logger.setLevel(min(level, logging.WARNING))  # the report is a warning, which may be switched off
    try:
        yield report
    finally:
        logger.setLevel(own)
        logger.removeFilter(divert)


@contextmanager
def _one_line_errors(name: str, what: str = "") -> Iterator[None]:
    """Whatever transformers raises inside becomes one line; a damaged config can make a model raise anything."""
    try:
        yield
    except SedetectError:
        raise
    except Exception as error:
        if Path(name).is_dir():
            failure, way_out = (
                "cannot be loaded",
                "check its files and the options given, or try another version of transformers",
            )
        else:
            what, failure = "", f"is no local folder, and its {what or 'model '}cannot be loaded from the hub"
            way_out = "check the name and the connection, or give a folder"
        raise SedetectError(f"{name}: {what}{failure} ({shorten(error)}); {way_out}") from error
