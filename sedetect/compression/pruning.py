"""Pruning: a checkpoint with fewer experts in every layer, those with the lowest saliency gone.

    kept = choose_kept(stats, "reap", 0.25, found_places(rank(stats)))
    prune_checkpoint("model", "model-pruned", kept)

Every layer loses the same number, because a config has one number of experts for all layers. The router's rows and
biases, and the config, follow. Where a router chooses groups of experts first (n_group), every group loses the same
number, so that its groups stay what they were. The model that is left routes as the original does with those experts
removed (sedetect.experiments.ablation, how="remove").

The global budget ranks the experts of all layers together, for classes that read a number per layer. It takes
saliencies as they are: a reap is the mean length of what an expert adds to the residual stream, in one unit for all
layers. Divided by each layer's mean, of which one super expert may be the most, it was worse in most runs
(docs/performance-notes.md).

Files are streamed: memory holds one output file, at most MAX_FILE, and one tensor at a time.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file

from sedetect.checkpoints.files import adapter_in, check_checkpoint, checked_path
from sedetect.checkpoints.layout import (
    TOP_K,
    Layout,
    Tensor,
    is_expert_weight,
    neuron_dimension,
    read_layout,
    renamed,
    with_fewer_experts,
)
from sedetect.compression.merging import Group, Groups
from sedetect.documents import Document, short_repr
from sedetect.errors import Argument, SedetectError
from sedetect.files import check_readable, new_folder, write_json
from sedetect.models.banks import find_banks
from sedetect.models.identity import join_digest, model_id, other_model
from sedetect.models.loading import empty_model
from sedetect.models.streamed import folder_digest
from sedetect.ranking.saliencies import ascending, saliency
from sedetect.stats.model import UNCHECKED, ModelStats, opened, same_model
from sedetect.stats.place import PREDICTORS, BankId, Place

MAX_FILE = "2GB"
BUDGETS = ("even", "global")
# of sedetect prune
_FACTS = (
    "model",
    "digest",
    "by",
    "ratio",
    "budget",
    "tokens",
    "super_experts",
    "unproved",
    "protected",
    "unseen",
    "merge",
    "merged",
)
_AVERAGED = ("F64", "F32", "F16", "BF16")
_INSTEAD = "merge the checkpoint it was made from, or prune without merging"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


@dataclass(frozen=True)
class Pruning(Document):
    """The document pruning.json: the experts kept per bank, and facts from the caller."""

    FORMAT = "sedetect-pruning"
    FILE = "pruning.json"

    facts: dict[str, Any]
    kept: dict[BankId, list[int]]

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """format, version, the facts, and kept by the names of the banks."""
        return super().to_dict() | self.facts | {"kept": {str(bank): one for bank, one in self.kept.items()}}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "Pruning":
        facts = {name: document[name] for name in _FACTS if name in document}
        return cls(facts, {BankId.parse(bank): [int(e) for e in one] for bank, one in document["kept"].items()})


def choose_kept(
    stats: ModelStats | str | os.PathLike[str],
    by: str,
    ratio: float,
    protected: Iterable[Place] = (),
    *,
    groups: int = 1,
    budget: str = "even",
    floor: int | None = None,
) -> dict[BankId, list[int]]:
    """The experts to keep, ascending, per routed bank: all but the floor(ratio * E) of lowest saliency.

    budget "even" takes so many from every layer. "global" takes that share of all experts, the lowest of all layers,
    and leaves a layer floor experts, by default and at least top_k. A larger ratio prunes a superset of a smaller one.

    protected experts are kept whatever their saliency, and others go in their place. One that saw no row has a saliency
    of 0 and goes first (sedetect prune names those). groups is the router's n_group:
    consecutive groups of E / groups experts, each of which loses the same number.
    Raises SedetectError for an unknown saliency, a ratio that is not between 0 and 1 or prunes nothing, fewer experts
    left than top_k, layers of different size, a number that does not divide by groups, and more protected experts than
    places.
    """
    protected, stats = set(protected), opened(stats)
    values_of = saliency(stats, by)
    if not values_of:
        raise SedetectError("the statistics hold no routed experts; profile a Mixture-of-Experts model")
    check_budget(budget, floor)
    if budget == "global":
        top_k = max(stats.header.banks[str(bank)].top_k for bank in values_of)
        gone = _number_gone_globally([len(values) for values in values_of.values()], ratio, top_k, groups, floor)
        return _choose_globally(values_of, gone, protected, floor or top_k)
    kept: dict[BankId, list[int]] = {}
    for bank, values in values_of.items():
        experts = len(values)
        gone = _number_gone(experts, ratio, stats.header.banks[str(bank)].top_k, groups)
        safe = {p.number for p in protected if p.bank == bank}
        kept[bank] = []
        size = experts // groups
        for group in range(groups):
            members = range(group * size, (group + 1) * size)
            order = [e for e in ascending(values) if e in members and e not in safe]
            if len(order) < gone // groups:
                raise SedetectError(
                    f"{bank}: {size - len(order)} of {size} experts are protected and {gone // groups} are to go; "
                    "choose a smaller ",
                    Argument("ratio"),
                )
            kept[bank] += sorted(set(members) - set(order[: gone // groups]))
    if len({(stats.banks[bank].num_experts, len(one)) for bank, one in kept.items()}) > 1:
        sizes = sorted({stats.banks[bank].num_experts for bank in kept})
        raise SedetectError(f"layers of {sizes} experts: a config has one number for all; this model cannot be pruned")
    return kept


def _choose_globally(
    values_of: dict[BankId, torch.Tensor], gone: int, protected: set[Place], floor: int
) -> dict[BankId, list[int]]:
    kept = {bank: list(range(len(values))) for bank, values in values_of.items()}
    places = [Place(*bank, expert) for bank in kept for expert in kept[bank]]
    left = gone
    for number in ascending(torch.cat(list(values_of.values()))):
        place = places[number]
        if left and place not in protected and len(kept[place.bank]) > floor:
            kept[place.bank].remove(place.number)
            left -= 1
    if left:
        raise SedetectError(
            f"{gone} of {len(places)} experts are to go, and {gone - left} can: every layer keeps {floor}, and the "
            f"{len(protected)} protected ones stay; choose a smaller ",
            Argument("ratio"),
        )
    return kept


def router_groups(config: dict[str, Any]) -> int:
    """Number of groups that the router of a config.json chooses among before it chooses experts; 1 without groups.

    Raises SedetectError where it chooses groups and does not say of how many.
    """
    text = config.get("text_config") or config
    if text.get("topk_group") and "n_group" not in text:
        raise SedetectError(
            f"config.json: its router takes {text['topk_group']} groups of experts (topk_group), and no n_group says "
            "of how many; this architecture cannot be pruned yet"
        )
    return text.get("n_group") or 1


def experts_per_token(config: dict[str, Any]) -> int | None:
    """The experts per token by a config.json; None if it has none of the known keys."""
    text = config.get("text_config") or config
    return next((text[name] for name in TOP_K if isinstance(text.get(name), int)), None)


def check_ratio(ratio: float) -> None:
    number = isinstance(ratio, (int, float))
    if not number or not 0 < ratio < 1:
        raise SedetectError(
            Argument("ratio"),
            f" {f'{ratio:g}' if number else repr(ratio)}: must be above 0 and below 1, ",
            "the share of the experts to prune",
        )


def check_budget(budget: str, floor: int | None) -> None:
    if budget not in BUDGETS:
        raise SedetectError(Argument("budget"), f" {budget}: is not known; use one of {', '.join(BUDGETS)}")
    if floor is not None and budget != "global":
        raise SedetectError(Argument("floor"), f" {floor}: goes with ", Argument("budget", "global"), " only")


def check_prunable(source: str | Path, ratio: float, *, budget: str = "even", floor: int | None = None) -> None:
    """Raise the errors of prune_checkpoint and choose_kept that need no statistics."""
    check_budget(budget, floor)
    config = prunable_config(source)
    layout = read_layout(Path(source), config)
    top_k = experts_per_token(config) or 1
    if budget == "global":
        numbers = list(layout.experts.values())
        _number_gone_globally(numbers, ratio, top_k, router_groups(config), floor)
        uneven = {layer: experts - (place == 0) for place, (layer, experts) in enumerate(layout.experts.items())}
        with tempfile.TemporaryDirectory() as folder:
            new_config = with_fewer_experts(config, max(numbers), uneven, layout.dropped > 0)
            write_json(Path(folder) / "config.json", new_config, allow_nan=True)
            _check_architecture(Path(source), Path(folder), uneven)
        return
    for experts in layout.experts.values():
        gone = _number_gone(experts, ratio, top_k, router_groups(config))
        with_fewer_experts(config, experts, {0: experts - gone}, layout.dropped > 0)
        _check_groups(config, experts - gone)


def prunable_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder that is verified (check_checkpoint)."""
    check_checkpoint(folder)
    if what := adapter_in(folder):
        raise SedetectError(f"{what}: a pruned checkpoint would be without it")
    for file in _beside_weights(Path(folder)):
        check_readable(file)
    config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config


def check_folder(folder: str | Path, stats: ModelStats) -> None:
    """Raise SedetectError where stats are not of the model in folder, whose weights are read for it layer by layer."""
    header = stats.header
    empty = empty_model(folder)
    found = join_digest(model_id(empty), None)
    if same_model(header.digest, found) and not header.digest.endswith(UNCHECKED):
        found = folder_digest(folder, header.dtype)
    if not same_model(header.digest, found):
        raise other_model(header, found, str(folder), "profile this folder", header.dtype)


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    kept: dict[BankId, list[int]],
    *,
    groups: Groups | None = None,
    facts: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write a copy of a checkpoint folder that has only the kept experts, renumbered in their order.

    The tokenizer and other files beside the weights are copied, except README.md and folders. pruning.json lists the
    kept experts: number i of a layer was number kept[i].

    Args:
        source: a folder with config.json and safetensors files.
        out: a new or empty folder; it appears only once everything is written.
        kept: as choose_kept gives it; every layer with experts, the same number in each unless the model's class reads
            a number per layer.
        groups: what experts to keep are merged from (sedetect.compression.merging); the others are dropped.
        facts: further fields of pruning.json.
        progress: called with bytes written, and in all.
    Returns:
        notes: facts that the reader must know.
    Raises:
        SedetectError: for a layout that is not known, naming the tensor, before anything is written.
    """
    source, out = checked_path(source, "a checkpoint"), checked_path(out, "a new folder")
    config = prunable_config(source)
    layout = read_layout(source, config, heads=any(bank.stack == PREDICTORS for bank in kept))
    by_layer = _by_layer(kept, layout, source)
    numbers = {layer: len(one) for layer, one in by_layer.items()}
    least, top_k = min(numbers.values()), experts_per_token(config)
    if top_k is not None and least < top_k:
        raise SedetectError(f"{source}: {least} experts to keep, and every token takes {top_k}; keep more")
    new_config = with_fewer_experts(config, max(layout.experts.values()), numbers, layout.dropped > 0)
    _check_groups(config, least)
    merged = _merged_by_layer(source, config, groups or {}, by_layer, layout)
    pieces = _pieces(layout, by_layer)
    size = sum(math.prod(shape) * _dtype(tensor).itemsize for _, tensor, shape in pieces.values())
    with new_folder(out) as folder:
        free = shutil.disk_usage(folder).free
        if free < size:
            raise SedetectError(
                f"{out}: {size:,} bytes to write and {free:,} free; free space or choose another folder"
            )
        write_json(folder / "config.json", new_config, allow_nan=True)  # some configs have "Infinity" in them
        _check_architecture(source, folder, numbers)
        for file in _beside_weights(source):
            shutil.copy(file, folder)
        _write_weights(folder, layout, pieces, by_layer, merged, size, progress)
        said = {"merged": _said(groups)} if groups is not None else {}
        Pruning((facts or {}) | said, kept).save(folder / "pruning.json")
    notes = []
    if layout.dropped:
        notes.append(
            f"{layout.dropped} tensors of multi-token prediction heads left out: the statistics do not cover their "
            f"experts (sedetect profile --mtp measures known ones)"
        )
    if top_k is None:
        notes.append(f"config.json has no known key for the experts per token; check that {least} are enough")
    return notes


def _beside_weights(source: Path) -> list[Path]:
    """The files that a pruned checkpoint keeps as they are."""
    # README.md is the card of another model, which may name experts by numbers that changed.
    own = ("config.json", "README.md")
    files = [file for file in sorted(source.iterdir()) if file.is_file() and file.name not in own]
    return [file for file in files if not file.name.endswith(_WEIGHTS)]


def _number_gone(experts: int, ratio: float, top_k: int, groups: int) -> int:
    """The number of a layer's experts that a ratio prunes. Raises SedetectError for an impossible number."""
    check_ratio(ratio)
    gone = math.floor(round(ratio * experts, 9))  # 0.29 * 100 is 28.999...
    if not gone:
        raise SedetectError(
            Argument("ratio"), f" {ratio:g}: prunes none of {experts} experts; give at least {1 / experts:.4g}"
        )
    if experts <= top_k:
        raise SedetectError(f"every token takes all {experts} experts, so that none can go; prune another model")
    if experts - gone < top_k:
        raise SedetectError(
            Argument("ratio"),
            f" {ratio:g}: leaves {experts - gone} of {experts} experts, and every token takes {top_k}; "
            f"give at most {(experts - top_k) / experts:.4g}",
        )
    if gone % groups:
        below, above = gone // groups * groups / experts, -(-gone // groups) * groups / experts
        raise SedetectError(
            Argument("ratio"),
            f" {ratio:g}: prunes {gone} of {experts} experts, which does not divide by the {groups} groups of "
            f"the router (n_group); give {below:.4g} or {above:.4g}",
        )
    return gone


def _of_expert(files: dict[Path, Any], layout: Layout, name: str, expert: int) -> torch.Tensor:
    """The tensor of another expert that corresponds to this one's tensor of that name."""
    other = renamed(name, expert)
    values: torch.Tensor = files[layout.tensors[other].file].get_tensor(other)
    return values


def _number_gone_globally(sizes: list[int], ratio: float, top_k: int, groups: int, floor: int | None) -> int:
    """The number of all layers' experts that a ratio prunes. Raises SedetectError for an impossible number."""
    check_ratio(ratio)
    if groups > 1:
        raise SedetectError(
            f"the router chooses among {groups} groups of experts, which stay equal where every layer loses the same; "
            "use ",
            Argument("budget", "even"),
        )
    if floor is not None and not top_k <= floor < max(sizes, default=0):
        raise SedetectError(
            Argument("floor"),
            f" {floor}: must be at least {top_k}, as every token takes so many, and below {max(sizes)}",
        )
    total, least = sum(sizes), sum(min(floor or top_k, size) for size in sizes)
    gone = math.floor(round(ratio * total, 9))
    if not gone:
        raise SedetectError(
            Argument("ratio"), f" {ratio:g}: prunes none of {total} experts; give at least {1 / total:.4g}"
        )
    if total - gone < least:
        raise SedetectError(
            Argument("ratio"),
            f" {ratio:g}: leaves {total - gone} of {total} experts, and all layers keep {least}; give at most "
            f"{(total - least) / total:.4g}",
        )
    return gone


def _check_groups(config: dict[str, Any], number: int) -> None:
    """Raise if the remaining groups are too small for the router's choice within a group."""
    text = config.get("text_config") or config
    groups, chosen, top_k = router_groups(config), text.get("topk_group") or 1, experts_per_token(config) or 1
    size = number // groups
    if groups > 1 and (size < 2 or size * chosen < top_k):
        raise SedetectError(
            f"{groups} groups of {size} experts are left; the router takes {top_k} experts from {chosen} of them and "
            "rates a group by its best two; choose a smaller ",
            Argument("ratio"),
        )


def _by_layer(kept: dict[BankId, list[int]], layout: Layout, source: Path) -> dict[int, list[int]]:
    other = [bank for bank in kept if bank.stack not in ("decoder", PREDICTORS) or bank.kind != "routed"]
    if other:
        raise SedetectError(f"{source}: {other[0]}: only one set of experts per decoder layer can be pruned yet")
    by_layer = {bank.layer: one for bank, one in kept.items()}
    if by_layer.keys() != layout.experts.keys():
        odd = min(by_layer.keys() ^ layout.experts.keys())
        raise SedetectError(
            f"{source}: layer {odd} has experts in the {'statistics' if odd in by_layer else 'checkpoint'} alone; "
            "profile this checkpoint"
        )
    for layer, one in by_layer.items():
        if not one or max(one) >= layout.experts[layer]:
            raise SedetectError(
                f"{source}: layer {layer} has {layout.experts[layer]} experts, not those to keep: {one}"
            )
    return by_layer


def _pieces(layout: Layout, kept: dict[int, list[int]]) -> dict[str, tuple[str, Tensor, tuple[int, ...]]]:
    """New name -> name in the source, tensor there, new shape."""
    pieces = {}
    for name, tensor in layout.tensors.items():
        shape, new = tensor.shape, name
        of_layer = [] if tensor.layer is None else kept[tensor.layer]
        if tensor.expert is not None:
            if tensor.expert not in of_layer:
                continue
            new = renamed(name, of_layer.index(tensor.expert))
        elif tensor.dimension is not None:
            sizes = list(shape)
            sizes[tensor.dimension] = len(of_layer)
            shape = tuple(sizes)
        pieces[new] = (name, tensor, shape)
    return pieces


def _merged_by_layer(
    source: Path, config: dict[str, Any], groups: Groups, kept: dict[int, list[int]], layout: Layout
) -> dict[int, dict[int, Group]]:
    """groups by layer, where they can be merged. Raises SedetectError where they cannot."""
    by_layer = {bank.layer: mine for bank, mine in groups.items() if mine}
    if by_layer:
        refuse_quantized(source, config)
    for layer, mine in by_layer.items():
        members = [expert for group in mine.values() for expert in group.weights]
        stay = [expert for expert in members if expert in kept[layer]]
        if sorted(stay) != sorted(mine) or len(set(members)) < len(members):
            raise SedetectError(
                f"{source}: layer {layer}: an expert is merged twice, or one that stays into another; group those that "
                "go, each once"
            )
        for name, tensor in layout.tensors.items():
            if tensor.layer == layer and is_expert_weight(name) and tensor.dtype not in _AVERAGED:
                raise SedetectError(f"{source}: {name}: stored as {tensor.dtype}, which cannot be averaged; {_INSTEAD}")
            if tensor.layer == layer and is_expert_weight(name):
                for group in mine.values():
                    one = tensor.shape if tensor.expert is not None else tensor.shape[1:]
                    for order in group.orders.values():
                        neuron_dimension(name, one, len(order))
    return by_layer


def refuse_quantized(source: str | Path, config: dict[str, Any]) -> None:
    """Raise SedetectError for a checkpoint whose experts cannot be averaged as they are stored."""
    how = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if how:
        method = how.get("quant_method", "a quantized format")
        raise SedetectError(f"{source}: stored as {method}; quantized experts are not averaged; {_INSTEAD}")


def _said(groups: Groups) -> dict[str, dict[str, list[int]]]:
    """For pruning.json: bank -> kept expert -> those merged into it."""
    return {
        str(bank): {str(kept): [e for e in group.weights if e != kept] for kept, group in mine.items()}
        for bank, mine in groups.items()
    }


def _write_weights(
    folder: Path,
    layout: Layout,
    pieces: dict[str, tuple[str, Tensor, tuple[int, ...]]],
    kept: dict[int, list[int]],
    merged: dict[int, dict[int, Group]],
    size: int,
    progress: Callable[[int, int], None],
) -> None:
    plan = {new: torch.empty(shape, dtype=_dtype(t), device="meta") for new, (_, t, shape) in pieces.items()}
    split = split_torch_state_dict_into_shards(plan, max_shard_size=MAX_FILE)
    done = 0
    with ExitStack() as stack:
        files = {
            f: stack.enter_context(safe_open(f, framework="pt")) for f in {t.file for t in layout.tensors.values()}
        }
        for file_name, names in split.filename_to_tensors.items():
            tensors = {}
            for new in names:
                name, tensor, _ = pieces[new]
                groups = merged.get(tensor.layer, {}) if tensor.layer is not None and is_expert_weight(name) else {}
                values = files[tensor.file].get_tensor(name)
                if tensor.expert in groups:
                    values = groups[tensor.expert].merged(name, partial(_of_expert, files, layout, name))
                elif tensor.layer is not None and tensor.dimension is not None:
                    stay, every = kept[tensor.layer], values
                    values = every.index_select(tensor.dimension, torch.tensor(stay))
                    for expert, group in groups.items():
                        values[stay.index(expert)] = group.merged(name, every.__getitem__)
                tensors[new] = values
                done += values.nbytes
                progress(done, size)
            save_file(tensors, folder / file_name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": size}, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _check_architecture(source: Path, folder: Path, numbers: dict[int, int]) -> None:
    """Build the pruned model without weights: every layer must have its number of experts by the new config."""
    uneven = len(set(numbers.values())) > 1
    try:
        banks = [bank for bank in find_banks(empty_model(source, folder)) if bank.routed]
    except SedetectError:
        if not uneven:
            raise
        banks = []
    most = max(numbers.values())
    other = [bank for bank in banks if bank.experts != numbers.get(bank.id.layer, most)]
    if uneven and (other or not banks):
        raise SedetectError(
            f"{source}: transformers builds this class with one number of experts for all layers, and could not load "
            "other layers; use ",
            Argument("budget", "even"),
        )
    for bank in other:
        raise SedetectError(
            f"{source}: with {most} experts in its config, {bank.path} still has {bank.experts}; "
            "this architecture cannot be pruned yet"
        )


def _dtype(tensor: Tensor) -> torch.dtype:
    if tensor.dtype not in _TORCH:
        raise SedetectError(f"{tensor.file}: weights stored as {tensor.dtype}; prune before quantizing")
    return _TORCH[tensor.dtype]
