"""How a derived checkpoint stores the weights of its original, read from the headers of their files.

A weight that a quantizer took keeps its place under other names: ...down_proj.weight becomes ...down_proj.weight_packed
with ...down_proj.weight_scale (compressed-tensors) or ...down_proj.qweight with ...down_proj.scales (GPTQ, AWQ), or
keeps its name, in FP8, with ...weight_scale_inv beside it; a fused ...experts.down_proj becomes ...down_proj_blocks
with ...down_proj_scales (MXFP4). Where the two checkpoints name a weight differently, or one stores the experts of a
layer one by one and the other together, the files alone do not show it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sedetect.checkpoints.files import is_beyond, read_config, shards_of
from sedetect.checkpoints.staging import DTYPES, StoredTensor, named_tensors, read_bytes

EQUAL, CHANGED, QUANTIZED = "equal", "changed", "quantized"
_STATES = (EQUAL, CHANGED, QUANTIZED)  # the class of an expert is the last class among its tensors
_PLAIN = {"F64", "F32", "F16", "BF16"}
_EXPERT = re.compile(r"((?:.*\.)?layers\.(\d+)\.(?:.*\.)?(experts|shared_experts?|shared_mlp))\.(?:(\d+)\.)?\w.*")
_INTEGERS = ("qweight", "qzeros", "scales", "g_idx")  # of GPTQ and AWQ, instead of weight
_BESIDE = re.compile(r".*_(scale|scales|scale_inv|global_scale|zero_point|shape)")  # of a base that is quantized itself
_WORD = {"I32": 32, "U8": 8}  # bits of what packed values are stored in
_CHUNK = 2**24  # bytes compared at once


class Scheme(NamedTuple):
    """The quantization that a config declares: bits, and the rows and columns that share a scale (None: all)."""

    bits: int
    rows: int | None
    columns: int | None


class Counterpart:
    """The tensors of a checkpoint, looked up by their names in the original.

    method: quantization method of its config ("compressed-tensors", "fp8", ...); None without one.
    """

    def __init__(self, base: Path, made: Path):
        settings = read_config(made).get("quantization_config") or {}
        self.method: str | None = settings.get("quant_method")
        self._config = read_config(base)
        self._base, self._made = named_tensors(shards_of(base)), named_tensors(shards_of(made))
        self._schemes = list(_schemes(settings))
        self._by_module: dict[str, list[str]] = defaultdict(list)
        for name in self._made:
            self._by_module[name.rpartition(".")[0]].append(name)

    def missing(self) -> list[str] | None:
        """The tensors of the base without a counterpart; None where most have other names here.

        Optional tensors are left out: heads that predict further tokens, a tied output embedding,
        what lies beside weights that the base has quantized, and experts that are stored in the other form (one by one,
        or together).
        """
        forms = {_form(name) for name in self._made}
        layers = (self._config.get("text_config") or self._config).get("num_hidden_layers")
        tied = "lm_head.weight" if self._config.get("tie_word_embeddings") else None
        needed = [
            name
            for name in self._base
            if _form(name) in forms and not is_beyond(name, layers) and name != tied and not _BESIDE.fullmatch(name)
        ]
        absent = [name for name in needed if not self._parts(name)]
        return absent if 2 * len(absent) <= len(needed) else None

    def expert(self, layer: int, expert: int | None, experts: int) -> str | None:
        """How the weights of one expert of a decoder layer (None: its shared expert) are stored, of so many experts.

        "equal": byte for byte as in the base; "equal, rounded to BF16": the same values in another floating-point
        type; "changed": floating point, with other values; "quantized (I32)", by the type that holds the values; None
        where the files do not show it.
        """
        states = []
        for name, tensor in self._base.items():
            match = _EXPERT.fullmatch(name)
            if match is None or int(match[2]) != layer or (match[3] == "experts") != (expert is not None):
                continue
            if _BESIDE.fullmatch(name) and name not in self._made:
                continue
            if expert is None or match[4] is not None:
                if expert is None or int(match[4]) == expert:
                    states.append(self._state(name, tensor, None))
            else:
                states.append(self._state(name, tensor, expert) if tensor.shape[:1] == (experts,) else None)
        known = [state for state in states if state is not None]
        if not known or len(known) < len(states):
            return None
        return max(known, key=lambda state: _STATES.index(re.split("[ ,]", state)[0]))

    def wrong_shapes(self) -> list[str]:
        """The scales and packed values whose shape is not the one that the config declares, with both shapes.

        Only of weights that the base has in floating point, and of schemes that are the same for all layers.
        """
        lines = []
        for name, tensor in self._base.items() if self._schemes else ():
            if len(tensor.shape) < 2 or tensor.dtype not in _PLAIN:
                continue
            parts = self._parts(name)
            for key, part in parts.items():
                wanted = [shape for scheme in self._schemes for shape in _shapes(name, tensor, key, part, scheme)]
                if wanted and part.shape not in wanted:
                    lines.append(
                        f"{key}: its shape is {list(part.shape)}, and {list(wanted[0])} by the scheme, of a weight "
                        f"{list(tensor.shape)}"
                    )
        return lines

    def _parts(self, name: str) -> dict[str, StoredTensor]:
        """The counterparts of a tensor of the base; empty where its name is unknown here."""
        stem = name.removesuffix(".weight")
        beside = [*self._by_module[stem], *self._by_module[name.rpartition(".")[0]], *self._by_module[name]]
        names = {one for one in beside if one.startswith((f"{name}_", f"{name}.")) and one not in self._base}
        names |= {name, *(f"{stem}.{tail}" for tail in _INTEGERS if stem != name)}
        return {one: self._made[one] for one in sorted(names) if one in self._made}

    def _state(self, name: str, tensor: StoredTensor, row: int | None) -> str | None:
        """expert() for one tensor, or for one row of it."""
        parts = self._parts(name)
        other = parts.get(name)
        if other is None or (other.dtype != tensor.dtype and not {tensor.dtype, other.dtype} <= _PLAIN):
            held = {part.dtype for key, part in parts.items() if not re.search("scale|shape|zero|g_idx", key)}
            return f"{QUANTIZED} ({', '.join(sorted(held))})" if parts else None
        if other.shape != tensor.shape or tensor.dtype not in DTYPES:
            return None
        if row is not None:
            tensor, other = tensor.rows(row, 1), other.rows(row, 1)
        if tensor.dtype == other.dtype:
            return EQUAL if _same_bytes(tensor, other) else CHANGED
        rounded = tensor[...].to(DTYPES[other.dtype])
        return f"{EQUAL}, rounded to {other.dtype}" if torch.equal(rounded, other[...]) else CHANGED


def _form(name: str) -> str | None:
    """The set of experts that a tensor belongs to, and whether that set is stored one by one; None for other
    tensors.
    """
    match = _EXPERT.fullmatch(name)
    return None if match is None or match[3] != "experts" else f"{match[1]} {match[4] is None}"


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    for done in range(0, one.nbytes, _CHUNK):
        pair = [torch.empty(min(_CHUNK, one.nbytes - done), dtype=torch.uint8) for _ in range(2)]
        for tensor, buffer in zip((one, other), pair):
            read_bytes(tensor.file, tensor.start + done, buffer)
        if not torch.equal(*pair):
            return False
    return True


def _schemes(settings: Mapping[str, Any]) -> Iterator[Scheme]:
    """The schemes of a quantization_config; empty for an unknown method, or one with exceptions by layer."""
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        for group in (settings.get("config_groups") or {}).values():
            weights: dict[str, Any] | None = group.get("weights")
            if weights is None:  # of activations alone
                continue
            strategy, bits = weights.get("strategy"), weights["num_bits"]
            if strategy in ("group", "tensor_group"):
                yield Scheme(bits, 1, weights["group_size"])
            elif strategy == "block":
                yield Scheme(bits, *weights["block_structure"])
            elif strategy in ("channel", "tensor"):
                yield Scheme(bits, 1 if strategy == "channel" else None, None)
    elif method == "fp8":
        yield Scheme(8, *(settings.get("weight_block_size") or (None, None)))
    elif method in ("gptq", "awq") and {"bits", "group_size"} <= settings.keys() and not settings.get("dynamic"):
        yield Scheme(settings["bits"], 1, None if settings["group_size"] == -1 else settings["group_size"])


def _shapes(name: str, tensor: StoredTensor, key: str, part: StoredTensor, scheme: Scheme) -> list[tuple[int, ...]]:
    """The shapes that a part of a weight (..., M, K) may have under a scheme; empty for an unknown part."""
    *outer, rows, columns = tensor.shape
    high = 1 if scheme.rows is None else math.ceil(rows / scheme.rows)
    wide = 1 if scheme.columns is None else math.ceil(columns / scheme.columns)
    if key in (f"{name}_scale", f"{name}_scale_inv"):
        flat = [] if wide > 1 else [(*outer, high)] if high > 1 else [(*outer, 1), tuple(outer)]
        return [(*outer, high, wide), *flat]
    if key == f"{name}_packed" and part.dtype in _WORD:
        word = _WORD[part.dtype]
        counts = (math.ceil(columns * scheme.bits / word), math.ceil(columns / (word // scheme.bits)))
        return [(*outer, rows, count) for count in counts]
    return [(wide, rows)] if key == f"{name.removesuffix('.weight')}.scales" else []
