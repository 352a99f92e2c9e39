"""How a checkpoint stores its experts: the owner of each tensor, by its name and shape.

Experts stand in the MoE block of a decoder layer, model.layers.N.<mlp, block_sparse_moe, feed_forward or mixer>, either
one by one (experts.E.down_proj.weight) or together, with the expert as the first dimension (experts.down_proj; in
Granite's models input_linear.weight). Beside them stand the router, of which weights and biases have a row per expert,
and shared experts, which stay as they are. Any other tensor in a block is refused by name, because it may have a
dimension of experts too.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from sedetect.checkpoints.files import shards_of
from sedetect.errors import SedetectError

_BLOCK = r"((?:.*\.)?layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward|mixer))"
_ONE = re.compile(_BLOCK + r"\.experts\.(\d+)\.(.+)")
_TOGETHER = re.compile(_BLOCK + r"\.(?:experts\.\w+(?:\.\w+)?|(?:input|output)_linear\.weight)")
_IN_BLOCK = re.compile(_BLOCK + r"\.(.+)")
_BESIDE = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.*\brouter\b.*)")  # of a layer, not of its block
_SHARED = ("shared_expert.", "shared_experts.", "shared_expert_gate.", "shared_mlp.")
# Name in the block -> dimension that counts experts.
_ROUTER = {
    "gate.weight": 0,
    "gate.bias": 0,
    "gate.e_score_correction_bias": 0,
    "gate.wg.weight": 0,
    "router.weight": 0,
    "router.bias": 0,
    "router.gate.weight": 0,
    "router.layer.weight": 0,
    "e_score_correction_bias": 0,
    "expert_bias": 0,
    "moe_statics.e_score_correction_bias": 1,
    "moe.router.expert_bias": 0,  # beside the block
}
# Names of the gate or up projection of experts, and of the down projection.
_UP = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "input_linear")
_DOWN = ("down_proj", "w2", "fc2", "output_linear")
# Config keys for the number of experts; a list of numbers per layer is not among them.
NUMBER_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Config keys for the experts per token.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
# Multi-token prediction heads: transformers does not load them, so few statistics cover their experts.
_PREDICTORS = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers")


class Tensor(NamedTuple):
    """One tensor of a checkpoint. layer and expert, or layer and dimension: its owner; neither: no expert's or layer's.

    expert: it belongs to this expert alone; dimension: the one that counts the layer's experts.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    layer: int | None = None
    expert: int | None = None
    dimension: int | None = None


@dataclass(frozen=True)
class Layout:
    """The tensors of a checkpoint by name, in file order, without dropped predictor heads.

    experts: per layer that has them. dropped: number of tensors left out.
    """

    tensors: dict[str, Tensor]
    experts: dict[int, int]
    dropped: int


def read_layout(folder: Path, config: dict[str, Any], heads: bool = False) -> Layout:
    """The owner of every tensor of a checkpoint folder, from the headers of its files alone.

    config is its config.json; heads keeps the multi-token prediction layers after the last decoder layer. Raises
    SedetectError, naming the tensor, where that cannot be told.
    """
    found: dict[str, Tensor] = {}
    for file in shards_of(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no mapping
                part = opened.get_slice(name)
                found[name] = Tensor(file, tuple(part.get_shape()), part.get_dtype())
    layers = (config.get("text_config") or config).get("num_hidden_layers")
    blocks_in = (_ONE.fullmatch(name) or _TOGETHER.fullmatch(name) for name in found)
    roots = {match[1].rpartition("layers.")[0] for match in blocks_in if match}
    after = None if heads else layers
    kept = {name: tensor for name, tensor in found.items() if not _is_predictor(name, roots, after)}
    experts: dict[int, int] = {}
    blocks: dict[int, str] = {}
    for name, tensor in kept.items():
        one, together = _ONE.fullmatch(name), _TOGETHER.fullmatch(name)
        match = one or together
        if match is None:
            if "experts." in name and "shared" not in name:
                raise SedetectError(f"{folder}: {name}: unknown layout of experts; it cannot be pruned yet")
            continue
        layer = int(match[2])
        if blocks.setdefault(layer, match[1]) != match[1]:
            raise SedetectError(f"{folder}: {name}: a second set of experts in layer {layer}; it cannot be pruned yet")
        number = int(one[3]) + 1 if one else tensor.shape[0] if tensor.shape else 0
        experts[layer] = max(experts.get(layer, 0), number)
    if not experts:
        raise SedetectError(f"{folder}: no experts found in its tensors; give the checkpoint of a MoE model")
    tensors = {name: _owned(folder, name, tensor, blocks, experts) for name, tensor in kept.items()}
    return Layout(tensors, experts, len(found) - len(kept))


def renamed(name: str, expert: int) -> str:
    """The name of an expert's own tensor under another number."""
    match = _ONE.fullmatch(name)
    assert match is not None
    return f"{match[1]}.experts.{expert}.{match[4]}"


def is_expert_weight(name: str) -> bool:
    """Whether a tensor holds weights of one or all experts; a router's does not."""
    within = _ONE.fullmatch(name) or _TOGETHER.fullmatch(name)
    return within is not None and not name.endswith("e_score_correction_bias")  # Laguna's stands among the experts


def router_matrix(folder: Path, layout: Layout, layer: int) -> str:
    """The name of the tensor (E, D) of a layer's router. Raises SedetectError where not one is found."""
    found = [
        name
        for name, tensor in layout.tensors.items()
        if (tensor.layer, tensor.dimension, len(tensor.shape)) == (layer, 0, 2) and not is_expert_weight(name)
    ]
    if len(found) != 1:
        raise SedetectError(
            f"{folder}: layer {layer}: its router was not found among the tensors; merge by ream, or prune"
        )
    return found[0]


def neuron_dimension(name: str, shape: tuple[int, ...], neurons: int) -> int | None:
    """The dimension of one expert's tensor that counts its neurons, once or as gate and up; None if none does.

    shape is that of the expert alone. Raises SedetectError where that cannot be told.
    """
    parts = [part.removesuffix("_bias") for part in name.split(".")]
    down, up = (any(part in names for part in parts) for names in (_DOWN, _UP))
    bias = name.endswith("bias")
    if down != up and len(shape) == (1 if bias else 2):
        if down and bias:
            return None
        sizes = (neurons,) if down else (neurons, 2 * neurons)
        # One by one they are linears (out, in); together they may be transposed.
        places = [int(down and not bias)] if _ONE.fullmatch(name) else range(len(shape))
        found = [place for place in places if shape[place] in sizes]
        if len(found) == 1:
            return found[0]
    raise SedetectError(f"{name}: which of its dimensions counts neurons is not known; merge by nearest, or prune")


def with_fewer_experts(config: dict[str, Any], experts: int, kept: dict[int, int], dropped: bool) -> dict[str, Any]:
    """A config.json for a checkpoint with kept of so many experts, by layer, and without predictor heads where dropped.

    Where layers keep different numbers, per_layer_config holds them; few model classes read it.
    Raises SedetectError where the config does not state its number of experts, or names experts by number.
    """
    parts = [config] + ([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])
    changed = {id(part): dict(part) for part in parts}
    named = [(new, key) for new in changed.values() for key in NUMBER_OF_EXPERTS if new.get(key) == experts]
    if not named:
        raise SedetectError(
            f"config.json: {experts} experts in the weights, but none of {', '.join(NUMBER_OF_EXPERTS)} says so; "
            "this architecture cannot be pruned yet"
        )
    for new, key in named:
        new[key] = max(kept.values())
        if len(set(kept.values())) > 1 and "num_hidden_layers" in new:
            own = {int(layer): settings for layer, settings in (new.get("per_layer_config") or {}).items()}
            new["per_layer_config"] = {
                str(layer): own.get(layer, {}) | ({key: kept[layer]} if layer in kept else {})
                for layer in sorted({*own, *kept})
            }
    for new in changed.values():
        for key in _PREDICTORS if dropped else ():
            if key in new:
                new[key] = 0
    document = changed[id(config)]
    if len(parts) > 1:
        document["text_config"] = changed[id(parts[1])]
    if numbered := re.search(r"[\w.]*experts\.\d+[\w.]*", str(document)):
        raise SedetectError(
            f"config.json: names an expert by number ({numbered[0]}), which pruning would renumber; prune before "
            f"quantizing"
        )
    return document


def _is_predictor(name: str, roots: set[str], layers: int | None) -> bool:
    """Whether a tensor belongs to a prediction head: a separate stack, or layers after the last one of a stack with
    experts.
    """
    match = re.match(r"((?:.*\.)?)layers\.(\d+)\.", name)
    after = match is not None and match[1] in roots and layers is not None and int(match[2]) >= layers
    return after or name.startswith("mtp.")


def _owned(folder: Path, name: str, tensor: Tensor, blocks: dict[int, str], experts: dict[int, int]) -> Tensor:
    """tensor with its owner. Raises SedetectError for an unknown tensor of a MoE block."""
    match, beside = _IN_BLOCK.fullmatch(name), _BESIDE.fullmatch(name)
    if match is not None and blocks.get(int(match[2])) == match[1]:
        layer, inside = int(match[2]), match[3]
    elif beside is not None and int(beside[1]) in blocks:
        layer, inside = int(beside[1]), beside[2]
    else:
        return tensor
    if inside.startswith(_SHARED):
        return tensor
    if one := _ONE.fullmatch(name):
        return tensor._replace(layer=layer, expert=int(one[3]))
    dimension = 0 if _TOGETHER.fullmatch(name) else _ROUTER.get(inside)
    if dimension is None:
        raise SedetectError(f"{folder}: {name}: unknown tensor in the MoE block; the checkpoint cannot be pruned yet")
    if len(tensor.shape) <= dimension or tensor.shape[dimension] != experts[layer]:
        raise SedetectError(
            f"{folder}: {name}: shape {tensor.shape} where dimension {dimension} should count the {experts[layer]} "
            f"experts of layer {layer}; it cannot be pruned yet"
        )
    return tensor._replace(layer=layer, dimension=dimension)
