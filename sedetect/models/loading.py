"""Opening a checkpoint: its model and tokenizer, and what of them is refused. Nothing is unpickled."""

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file

from sedetect.adapters.registry import serve_quantized
from sedetect.calibration.windows import prefix_ids
from sedetect.checkpoints.files import adapter_in, check_checkpoint, read_config, source_name
from sedetect.checkpoints.layout import NUMBER_OF_EXPERTS
from sedetect.checkpoints.memory import choose_device, choose_dtype
from sedetect.checkpoints.options import Loading
from sedetect.checkpoints.prefetch import Prefetched, prefetch
from sedetect.errors import Argument, SedetectError, WeightsError, shorten
from sedetect.files import check_readable
from sedetect.kernels.dequantize import dequantize
from sedetect.models.banks import Bank, find_banks
from sedetect.models.modalities import placeholders
from sedetect.models.wrappers import unwrap
from sedetect.stats.note import Note

if TYPE_CHECKING:
    from transformers import ProcessorMixin
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

# What training code wraps a model or its layers in, as it stands in the names that are then saved.
_WRAPPER = re.compile(
    r"(^module\.|^base_model\.model\.|_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|forward_module)\.(module\.)?)+"
)
_VOCABULARY = r"tokenizer.*|vocab.*|merges.*|.*\.model|.*\.tiktoken"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_IMAGES = {"Pillow": "PIL", "torchvision": "torchvision"}  # what processors of images are made of, by package
_QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_connection_errors": False,
}
_OWN_CODE = " to run the model code it brings"
_MULTIMODAL = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
# Tried in this order: a text-only class leaves the vision tower of a multimodal checkpoint out.
_AUTO_CLASSES = (
    AutoModelForCausalLM,
    *_MULTIMODAL,
    AutoModelForSeq2SeqLM,
    AutoModel,
)

# Where a config names their class: reward models and the like, and models without any head.
_OTHER_HEADS = (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
    AutoModel,
)


# A weight of experts, by number or of all: the path of the set, and the number.
_EXPERT = re.compile(r"(.*?\bexperts?)\.(?:(\d+)\.)?\w")


def load_model(path_or_name: str | os.PathLike[str], loading: Loading = Loading()) -> PreTrainedModel:
    """Load a checkpoint folder, or a model of the hub, in eval mode. check_checkpoint verifies a folder's files.

    A Prefetched folder gives the weights that are on their way already; they are used up.
    Weights in the checkpoint that the model has no place for are warned about (UserWarning, one line).
    Raises SedetectError for a model type that the installed transformers does not know, for weights that are missing
    or of another shape, and where transformers cannot load the model.
    """
    model, notes = load_with_notes(path_or_name, loading)
    for note in notes:
        warnings.warn(str(note), stacklevel=2)
    return model


def load_with_notes(
    path_or_name: str | os.PathLike[str], loading: Loading = Loading()
) -> tuple[PreTrainedModel, list[Note]]:
    """load_model, with notes of what it would warn about."""
    name = source_name(path_or_name)
    if Path(name).is_dir():
        _check_config(Path(name), loading.trust_remote_code)
    device, dtype = choose_device(loading.device), choose_dtype(loading.dtype)
    options = loading.source
    with _one_line_errors(name):
        config = AutoConfig.from_pretrained(name, **options)
    method = _quantization(config)
    auto_class = _auto_class(name, config, loading.trust_remote_code, loading.multimodal)
    if loading.attn is not None:
        options["attn_implementation"] = loading.attn
    if device.type != "cpu" and importlib.util.find_spec("accelerate"):
        options["device_map"] = {"": device}  # straight to the device; without accelerate by way of host memory
    with (
        _one_line_errors(name),
        _captured_report() as report,
        _captured_unexpected() as unexpected,
        _prefetched_weights(path_or_name),
        ragged_blocks(),
    ):
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
            _refuse_unconverted(name, report, method)
            raise
        if not Path(name).is_dir():
            _check_snapshot(name, loading)
        own_code = bool(getattr(config, "auto_map", None)) and not loading.trust_remote_code
        notes = _check_loaded(name, type(model).__name__, loaded, method, own_code)
        notes += unmeasured_experts(name, unexpected)
        if "device_map" not in options and not any(p.is_meta for p in model.parameters()):  # see streamed.py
            model = model.to(device)
    if method == "mxfp4" and _quantization(model.config) is None:
        text = (
            f"{name}: transformers dequantized its MXFP4 experts, as it does without a GPU or the package kernels: the "
            "same numbers in four times the memory; where that is too much, pip install kernels on a GPU"
        )
        notes.append(Note("dequantized_experts", text))
    serve_quantized(model)  # for good: without kernels its own forwards would raise
    return model.eval(), notes


@contextmanager
def _prefetched_weights(source: object) -> Iterator[None]:
    """Let from_pretrained take the tensors of a Prefetched folder, instead of opening its files."""
    if not isinstance(source, Prefetched) or source.used:
        yield
        return
    original = PreTrainedModel._load_pretrained_model
    with source.weights() as tensors:

        def load(model: PreTrainedModel, state_dict: object, *args: Any, **kwargs: Any) -> Any:
            return original(model, tensors, *args, **kwargs)

        with replaced_method(PreTrainedModel, "_load_pretrained_model", staticmethod(load)):
            yield


@contextmanager
def replaced_method(owner: type | ModuleType, name: str, method: Any) -> Iterator[None]:
    """A class with another method, or a module with another function, while the context lasts."""
    original = vars(owner)[name]
    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def ragged_blocks() -> Iterator[None]:
    """Let transformers dequantize FP8 matrices that their blocks do not divide, as DeepSeek-V3's are.

    It refuses them, or where the number of scales happens to divide them, takes smaller blocks than the stored ones.
    """
    original = Fp8Dequantize._dequantize_one

    def dequantize_one(
        op: Fp8Dequantize, weight: torch.Tensor, scale: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        block = op.hf_quantizer.quantization_config.weight_block_size
        ragged = weight.dtype.is_floating_point and any(n % side for n, side in zip(weight.shape[-2:], block or ()))
        if not ragged or scale.numel() == 1:
            return original(op, weight, scale, output_dtype)
        wide = scale.dtype if scale.dtype.is_floating_point and scale.dtype.itemsize > 1 else torch.bfloat16
        return dequantize(weight, scale, block, output_dtype or wide)

    with replaced_method(Fp8Dequantize, "_dequantize_one", dequantize_one):
        yield


class OpenModel(NamedTuple):
    """A model and its tokenizer, notes on how it loaded, and its banks."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    notes: list[Note]
    banks: list[Bank]


class PreparedModel:
    """A checkpoint that was verified, or a loaded model, with its tokenizer; weights are read by load alone."""

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        loading: Loading,
        load: Callable[[str | os.PathLike[str], Loading], tuple[PreTrainedModel, list[Note]]],
    ):
        self.tokenizer = tokenizer
        self._model, self._loading, self._load = model, loading, load
        self._notes: list[Note] = []

    @cached_property
    def empty(self) -> PreTrainedModel:
        """The model to refuse by: on the meta device, where a checkpoint is not loaded yet.

        Code that a checkpoint brings may not run there: its model is loaded at once.
        """
        if not isinstance(self._model, (str, os.PathLike)):
            return self._model
        name = source_name(self._model)
        with _one_line_errors(name):
            config = AutoConfig.from_pretrained(name, **self._loading.source)
        if self._loading.trust_remote_code and hasattr(config, "auto_map"):
            return self.load().model
        return without_weights(name, config, self._loading.multimodal)

    def load(self) -> OpenModel:
        """Read the weights of a checkpoint. Raises SedetectError for what load_model and find_banks refuse."""
        if isinstance(self._model, (str, os.PathLike)):
            resident = self._load is load_with_notes
            ahead = prefetch(self._model, self._loading.device, self._loading.dtype) if resident else None
            try:
                with warnings.catch_warnings(action="ignore"):
                    self._model, said = self._load(ahead or self._model, self._loading)
            finally:
                if ahead is not None:
                    ahead.close()
            self._notes = [note for note in said if note.code in ("unused_weights", "unmeasured_experts")]
        banks, notes, tokenizer = find_banks(self._model), [*self._notes], self.tokenizer
        if not prefix_ids(tokenizer) and tokenizer.bos_token is not None:
            text = (
                f"the tokenizer has a {tokenizer.bos_token} but puts nothing before a text; "
                "if the model was trained with it, super experts stay silent without it"
            )
            notes.append(Note("no_prefix", text))
        return OpenModel(self._model, tokenizer, notes, banks)


def prepare_model(
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loading: Loading = Loading(),
    *,
    load: Callable[[str | os.PathLike[str], Loading], tuple[PreTrainedModel, list[Note]]] = load_with_notes,
) -> PreparedModel:
    """A MoE model with its tokenizer; a checkpoint is verified, to be loaded by load.

    Raises SedetectError for what check_checkpoint, load_tokenizer and find_banks refuse, and for a loaded model without
    tokenizer.
    """
    if isinstance(model, (str, os.PathLike)):
        if Path(model).is_dir():
            check_checkpoint(model)
            _check_config(Path(model), loading.trust_remote_code)  # before its tokenizer, which would fail too
        tokenizer = tokenizer or load_tokenizer(model, **loading.source)
    elif tokenizer is None:
        unwrap(model)  # refuse what is not a model
        raise SedetectError(f"{type(model).__name__}: a loaded model needs its tokenizer; pass tokenizer=")
    prepared = PreparedModel(model, tokenizer, loading, load)
    find_banks(prepared.empty)  # refuse what is no MoE before anything is asked of it
    return prepared


def open_model(
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    loading: Loading = Loading(),
) -> OpenModel:
    """prepare_model, and load."""
    return prepare_model(model, tokenizer, loading).load()


def empty_model(folder: str | Path, config: str | Path | None = None) -> PreTrainedModel:
    """The model of a checkpoint folder without its weights, on the meta device.

    config is a folder to take config.json from instead. Raises SedetectError where transformers cannot build it.
    """
    _check_config(Path(config or folder), False)
    with _one_line_errors(str(folder)):
        read = AutoConfig.from_pretrained(str(config or folder))
        read._name_or_path = str(folder)
    return without_weights(str(folder), read)


def without_weights(name: str, config: PreTrainedConfig, multimodal: bool = False) -> PreTrainedModel:
    """The model that transformers makes of a config, on the meta device."""
    with _one_line_errors(name), torch.device("meta"):
        return _auto_class(name, config, False, multimodal).from_config(config).eval()


def load_tokenizer(
    path_or_name: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder or hub model. Raises SedetectError where there is none."""
    name = source_name(path_or_name)
    for file in _vocabulary(Path(name)):
        check_readable(file)
    with _one_line_errors(name, "tokenizer "):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    # without any tokenizer file transformers makes an empty one, which turns every text into no tokens
    if not tokenizer("a 1", add_special_tokens=False)["input_ids"]:
        raise SedetectError(f"{name}: no tokenizer in it; add the model's tokenizer.json and tokenizer_config.json")
    return tokenizer


def load_processor(model: str | os.PathLike[str], loading: Loading = Loading()) -> "ProcessorMixin | None":
    """The processor of a checkpoint whose model takes images or sound; None where either is not so.

    Raises SedetectError where there is one that cannot be loaded.
    """
    name = source_name(model)
    with _one_line_errors(name):
        config = AutoConfig.from_pretrained(name, **loading.source)
    if not placeholders(config):
        return None
    with quiet():
        try:
            from transformers import AutoProcessor, ProcessorMixin  # which takes a while

            if not any(cached_file(name, file, revision=loading.revision, **_QUIETLY) for file in _PROCESSORS):
                return None
            found = AutoProcessor.from_pretrained(name, **loading.source)
        except Exception as error:  # of a library that is not installed, a damaged file, another version
            missing = [package for package, module in _IMAGES.items() if importlib.util.find_spec(module) is None]
            if missing and re.search("pillow|torchvision", str(error), re.IGNORECASE):
                raise SedetectError(
                    f"{name}: its processor cannot be loaded without {' and '.join(missing)}; pip install "
                    "'sedetect[images]', from the index that torch is from"
                ) from error
            raise SedetectError(
                f"{name}: its processor cannot be loaded ({shorten(error)}); pip install 'sedetect[images]', or check "
                "its files"
            ) from error
    return found if isinstance(found, ProcessorMixin) else None


def _vocabulary(folder: Path) -> list[Path]:
    """The files that a tokenizer is read from; tokenizer.json makes the others superfluous."""
    if not folder.is_dir():
        return []
    pattern = r"tokenizer(_config)?\.json" if (folder / "tokenizer.json").is_file() else _VOCABULARY
    return [file for file in sorted(folder.iterdir()) if file.is_file() and re.fullmatch(pattern, file.name)]


def _check_config(folder: Path, trust_remote_code: bool) -> None:
    """Raise SedetectError for what transformers does not know, or would not notice, in the config.json of a folder."""
    config = read_config(folder)
    if (what := adapter_in(folder)) and importlib.util.find_spec("peft") is None:
        raise SedetectError(f"{what}, or pip install peft, which loads it into the model")
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in config):
        remote = (", or pass ", Argument("trust_remote_code", True), _OWN_CODE)
        raise SedetectError(
            f"{folder / 'config.json'}: model_type {model_type!r} is unknown to transformers "
            f"{transformers.__version__}; install a newer transformers",
            *(remote if "auto_map" in config else ()),
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise SedetectError(
            f"{folder / 'config.json'}: quant_method {method!r} is unknown to transformers {transformers.__version__}, "
            "which would take the weights for plain ones; install a newer transformers"
        )
    text = config.get("text_config") or config
    experts, chosen = (
        next((text[key] for key in keys if isinstance(text.get(key), int)), None)
        for keys in (NUMBER_OF_EXPERTS, ("num_experts_per_tok", "moe_topk", "moe_k", "top_k"))
    )
    if experts and chosen is not None and not 1 <= chosen <= experts:
        raise SedetectError(
            f"{folder / 'config.json'}: {chosen} of {experts} experts per token; give the checkpoint's own config"
        )


def _auto_class(
    name: str, config: PreTrainedConfig, trust_remote_code: bool, multimodal: bool = False
) -> "type[_BaseAutoModelClass]":
    remote = getattr(config, "auto_map", {}) if trust_remote_code else {}
    for with_head in () if remote else _OTHER_HEADS:
        named = getattr(with_head._model_mapping.get(type(config), None), "__name__", None)
        if named is not None and named in (config.architectures or ()):
            return with_head
    for auto_class in (*(_MULTIMODAL if multimodal else ()), *_AUTO_CLASSES):
        if auto_class.__name__ in remote or type(config) in auto_class._model_mapping:
            return auto_class
    raise SedetectError(f"{name}: transformers has no language model for {type(config).__name__}; give one that has")


def _check_snapshot(name: str, loading: Loading) -> None:
    """check_checkpoint of what was downloaded of a hub model."""
    config = cached_file(name, "config.json", revision=loading.revision, local_files_only=True)
    folder = Path(config or "").parent
    if any(folder.glob("model*.safetensors")):  # else they are of another revision, which converts pickled weights
        check_checkpoint(folder)


def _check_loaded(
    name: str, model: str, loaded: dict[str, Any], method: str | None, own_code: bool = False
) -> list[Note]:
    """Judge what from_pretrained says of the weights: missing and mismatched are errors, unexpected a note.

    own_code: the checkpoint brings code of its own, which was not run.
    """
    unexpected = sorted(loaded["unexpected_keys"])
    if missing := sorted(loaded["missing_keys"]):
        if method is not None and (experts := [weight for weight in missing if "experts" in weight]):
            raise WeightsError(
                f"{name}: transformers does not put weights quantized by {method} into the experts of {model}, first "
                f"{experts[0]}; give the unquantized checkpoint, or one in FP8, MXFP4 or compressed-tensors"
            )
        line = f"{name}: {len(missing)} weights of {model} are missing, first {missing[0]}"
        if not unexpected:
            raise WeightsError(f"{line}; give a complete checkpoint")
        line += f", and {len(unexpected)} of the checkpoint are none of its weights, first {unexpected[0]}"
        if own_code:
            raise SedetectError(f"{line}; pass ", Argument("trust_remote_code", True), _OWN_CODE)
        if wrapper := next(filter(None, map(_WRAPPER.search, unexpected)), None):
            raise WeightsError(
                f"{line}; save the model without its wrapper (unwrap_model), or take {wrapper[0]!r} out of the names"
            )
        raise WeightsError(f"{line}; give a checkpoint with the names that this model has in transformers")
    if mismatched := sorted(loaded["mismatched_keys"]):
        weight, stored, wanted = mismatched[0]
        raise WeightsError(
            f"{name}: {len(mismatched)} weights do not fit {model}, first {weight}: {tuple(stored)} in the checkpoint, "
            f"{tuple(wanted)} by its config.json; give a complete checkpoint with its own config"
        )
    if not unexpected:
        return []
    text = f"{name}: {len(unexpected)} weights are not used by {model}, first {unexpected[0]}"
    return [Note("unused_weights", text, count=len(unexpected))]


def unmeasured_experts(name: str, unexpected: Collection[str]) -> list[Note]:
    """A note for every set of experts among the weights of a checkpoint that the model has no place for."""
    found: dict[str, set[str]] = {}
    for weight in sorted(unexpected):
        if (match := _EXPERT.match(weight)) is not None and "shared" not in match[1]:
            found.setdefault(match[1], set()).add(match[2] or "all")
    notes = []
    for path, numbers in found.items():
        several = "its experts" if "all" in numbers else f"{len(numbers)} experts"
        text = f"{name}: {several} of {path} are in the checkpoint and not measured: transformers does not load them"
        notes.append(Note("unmeasured_experts", text, count=None if "all" in numbers else len(numbers)))
    return notes


@contextmanager
def _captured_unexpected() -> Iterator[set[str]]:
    """Collect the weights that the model has no place for, those too that its class says to ignore."""
    unexpected: set[str] = set()
    original = PreTrainedModel._adjust_missing_and_unexpected_keys

    def adjust(model: PreTrainedModel, info: Any) -> None:
        unexpected.update(info.unexpected_keys)
        original(model, info)

    with replaced_method(PreTrainedModel, "_adjust_missing_and_unexpected_keys", adjust):
        yield unexpected


def _quantization(config: PreTrainedConfig) -> str | None:
    """Name of the method that a config says the weights are quantized by."""
    given = getattr(config, "quantization_config", None)
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    return getattr(method, "value", method)


def _refuse_unconverted(name: str, report: list[str], method: str | None) -> None:
    """Name the first weight that transformers could not fuse (experts of unequal shapes); its exception does not."""
    if weights := re.findall(r"^(\S.*?) *\|.*CONVERSION", "\n".join(report), re.MULTILINE):
        raise WeightsError(
            f"{name}: {len(weights)} weights cannot be put together from the checkpoint's, first {weights[0]}; "
            "give a complete checkpoint with its own config"
            + (f", whose experts of a layer are all quantized by {method}" if method is not None else "")
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
    """Whatever transformers raises inside becomes one line; a damaged config can make a model raise anything.

    What it warns of on the way is not for users: what they must know is refused or noted.
    """
    try:
        with quiet():
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
            what, failure = "", f"is not a local folder, and its {what or 'model '}cannot be loaded from the hub"
            way_out = "check the name and the connection, or give a folder"
        raise SedetectError(f"{name}: {what}{failure} ({shorten(error)}); {way_out}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that transformers warns of is printed."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
