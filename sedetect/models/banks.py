"""The banks of a Hugging Face MoE model: the places and sizes of its experts.

Experts behind transformers' experts interface are found by what they hold, others by their adapters
(sedetect.adapters.registry); the down_proj of the shared experts and dense MLPs beside them are banks too.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from sedetect.adapters.forwards import forward_of
from sedetect.adapters.listed import DOWN_NAMES, EXPERT_DOWN_NAMES, ListedExperts, is_linear, linear_sizes
from sedetect.adapters.registry import NOT_MLPS, REFUSED, adapt
from sedetect.adapters.stacked import Adapter, as_experts
from sedetect.checkpoints.layout import NUMBER_OF_EXPERTS
from sedetect.errors import Argument, SedetectError
from sedetect.models.wrappers import checkpoint_name, is_sharded, unwrap
from sedetect.stats.place import BankId

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# At least one of them stands beside an MLP's output projection; a router that projects down has none.
_UP_NAMES = ("up_proj", "gate_up_proj", "w1", "input_linear", "fc1", "wi", "wi_0")
_LAYER = re.compile(r"(.*?)\.(\d+)(?=\.|$)")
# Of an experts module behind the interface: what is computed with.
_PARTS = {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias", "act_fn"}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Bank:
    """One bank of a live model; path is that of its module there.

    here, group: in an expert-parallel model, the experts of this rank, and the group of ranks.
    """

    id: BankId
    path: str
    module: nn.Module
    experts: int
    hidden: int
    intermediate: int
    here: range | None = None
    group: ProcessGroup | None = None

    @property
    def name(self) -> str:
        """The module's path as the checkpoint has it."""
        return checkpoint_name(self.path)

    @property
    def routed(self) -> bool:
        """Whether it is called with a routing; so are shared experts that are stored together."""
        return self.id.routed or isinstance(self.module, Adapter)

    @property
    def stored_in(self) -> nn.Module:
        """The module of the model that has the weights."""
        return self.module.module if isinstance(self.module, Adapter) else self.module


def check_eval(model: nn.Module) -> None:
    """Raise SedetectError for what is not a model, and for one in training mode, whose forwards draw at random."""
    model = unwrap(model)
    if model.training:
        raise SedetectError(f"{type(model).__name__}: is in training mode; call model.eval() first")


def find_banks(model: nn.Module) -> list[Bank]:
    """Every bank of a model, in layer order: routed experts, and the shared experts and dense MLPs of their stacks.

    Paths are of the model inside wrappers. Raises SedetectError, naming module and class, for what is no model, for one
    without experts, and for experts that cannot be measured.
    """
    model = unwrap(model)
    sharded = is_sharded(model)
    routed = [(path, experts) for path, module in model.named_modules() for experts in _experts(model, path, module)]
    known = [p for p, _ in routed] + [p for p, m in model.named_modules() if type(m).__name__ in NOT_MLPS]
    for path, module in model.named_modules():
        _refuse_unreachable(path, module, known)
    for path, experts in routed:
        _refuse_weights(model, path, experts, sharded)
    if not routed:
        raise _without_experts(model)
    inside = tuple(f"{path}." for path, _ in routed)
    stacks = _stacks([path for path, _ in routed])
    expert_classes = {type(e) for _, listed in routed if isinstance(listed, ListedExperts) for e in listed.experts}
    mlps = [
        (path, child)
        for path, child in _mlps(model, expert_classes)
        if not path.startswith(inside) and _layer(path)[0] in stacks
    ]
    layers = {_layer(path) for path, _ in routed}
    taken: dict[tuple[str, int, str], int] = defaultdict(int)
    banks = []

    def add(
        path: str,
        module: nn.Module,
        kind: str,
        sizes: tuple[int, int, int],
        here: range | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        prefix, layer = _layer(path)
        stack = stacks[prefix]
        number = taken[stack, layer, kind]
        taken[stack, layer, kind] += 1
        if number:
            kind += "_vision" if ".vision" in path and number == 1 else f"_{number}"
        banks.append(Bank(BankId(stack, layer, kind), path, module, *sizes, here, group))

    for path, module in routed:
        down, here, group = as_experts(module).down_proj, None, None
        count, *matrix = down.shape
        hidden, intermediate = reversed(matrix) if as_experts(module).is_transposed else matrix
        if isinstance(down, DTensor) and not sharded:
            mesh, own = down.device_mesh, len(down.to_local())
            first = own * mesh.get_local_rank()
            here, group = range(first, first + own), mesh.get_group()
        inner, kind = getattr(module, "inner_path", ""), getattr(module, "kind", "routed")
        add(path + inner, module, kind, (count, hidden, intermediate), here, group)
    for path, module in mlps:
        # A dense MLP beside routed experts (gemma4) counts as a shared expert; its path tells.
        kind = "shared" if "shared" in path or _layer(path) in layers else "dense"
        add(path, module, kind, (1, *linear_sizes(module)))
    twice = next((bank for bank in banks if "modules_to_save" in bank.path.split(".")), None)
    if twice is not None:
        raise _kept_twice(twice.path.partition(".modules_to_save")[0])
    return sorted(banks, key=lambda bank: bank.id)


def _kept_twice(path: str) -> SedetectError:
    return SedetectError(f"{path}: PEFT keeps it twice (modules_to_save); call merge_and_unload() on the model first")


def _without_experts(model: "PreTrainedModel") -> SedetectError:
    """The refusal of a model without a bank: a dense checkpoint, or one whose class lacks its experts."""
    name, config = type(model).__name__, model.config.get_text_config()
    counts = {key: getattr(config, key, None) for key in NUMBER_OF_EXPERTS}
    key = next((key for key, count in counts.items() if isinstance(count, int) and count > 1), None)
    if key is None:
        return SedetectError(f"{name}: no MoE layer found; give a Mixture-of-Experts model")
    line = f"{name}: no MoE layer found, though its config has {key} {counts[key]}"
    if getattr(model.config, "auto_map", None) and type(model).__module__.startswith("transformers."):
        return SedetectError(f"{line}; pass ", Argument("trust_remote_code", True), " to run the model code it brings")
    return SedetectError(f"{line}; give a model whose class in transformers has the experts")


def find_dense(model: nn.Module) -> list[Bank]:
    """The MLPs of a model without experts, in layer order. Raises SedetectError where it has none."""
    mlps = [(path, child) for path, child in _mlps(model) if _layer(path)[1] >= 0]
    if not mlps:
        raise SedetectError(f"{type(model).__name__}: no MLP with a down projection found; give a dense language model")
    stacks = _stacks([path for path, _ in mlps])
    banks = []
    for path, module in mlps:
        prefix, layer = _layer(path)
        bank = BankId(stacks[prefix], layer, "dense")
        banks.append(Bank(bank, path, module, 1, *linear_sizes(module)))
    return sorted(banks, key=lambda bank: bank.id)


def layer_path(bank: Bank) -> str:
    """Module path of the layer that a bank is in."""
    prefix, layer = _layer(bank.path)
    return f"{prefix}.{layer}"


def layers_per_stack(model: nn.Module, banks: list[Bank]) -> dict[str, int]:
    """Decoder layers (dense ones counted) of every stack that has a bank."""
    return {bank.id.stack: len(layer_list(unwrap(model), _layer(bank.path)[0])) for bank in banks}


def layer_list(model: nn.Module, path: str) -> nn.ModuleList:
    """The list of layers at path."""
    return cast(nn.ModuleList, model.get_submodule(path))  # remote code may have another sequence of modules


def _mlps(model: nn.Module, expert_classes: Collection[type] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The down projections of MLPs, by path; expert_classes: of modules that are also an expert's."""
    for path, module in model.named_modules():
        names = EXPERT_DOWN_NAMES if type(module) in expert_classes else DOWN_NAMES
        if any(hasattr(module, up) for up in _UP_NAMES):
            for name, child in module.named_children():
                if name in names and is_linear(child):
                    yield f"{path}.{name}" if path else name, child


def _layer(path: str) -> tuple[str, int]:
    """(path of the list of layers, number in it) of a module: the first number in its path; ("", -1) without one."""
    match = _LAYER.match(path)
    return ("", -1) if match is None else (match.group(1), int(match.group(2)))


def _stacks(paths: list[str]) -> dict[str, str]:
    """Name of every list of layers that holds one of these experts modules.

    "decoder", unless a part of its path says "encoder", "vision" or "audio". Of two that would share a name, the later
    goes by the first part of its path that the other has not: "talker" beside the thinker's "decoder".
    """
    names: dict[str, str] = {}
    for path in paths:
        prefix, layer = _layer(path)
        if layer < 0:
            raise SedetectError(f"{path}: not inside a numbered layer; this architecture is not supported")
        if prefix in names:
            continue
        name = "decoder"
        for part in prefix.split("."):
            if part == "encoder":
                name = "encoder"
            elif part.startswith(("vision", "visual", "audio")):
                name = part.split("_")[0]
        other = next((known for known, taken in names.items() if taken == name), None)
        if other is not None:
            name = next(part for part in prefix.split(".") if part not in other.split("."))
        names[prefix] = name
    return names


def _experts(model: nn.Module, path: str, module: nn.Module) -> Iterator[nn.Module]:
    """The module itself behind the interface, or its adapter; nothing for any other module."""
    interface = hasattr(module, "is_transposed") and isinstance(getattr(module, "down_proj", None), nn.Parameter)
    if interface and module.down_proj.dtype in _FLOATS:
        yield module
        return
    adapter = adapt(path, module, model.get_submodule(path.rpartition(".")[0]))
    if adapter is not None or interface:
        yield adapter or module


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it computes what nn.Linear does, within accelerate's hooks or without."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    if hasattr(module, "_hf_hook") and getattr(module.forward, "__wrapped__", None) is not module._old_forward:
        return False  # replaced after the hooks had wrapped it
    own = getattr(forward_of(module), "__func__", None)
    return own is nn.Linear.forward and module.weight.dtype in _FLOATS and _is_plain(module.weight)


def _is_plain(weight: torch.Tensor) -> bool:
    """Whether kernels may read it where it lies: no subclass, which holds its values in other tensors or nowhere."""
    return type(weight) in (torch.Tensor, nn.Parameter) and not torch._is_functional_tensor(weight)


def _refuse_weights(model: nn.Module, path: str, experts: nn.Module, sharded: bool) -> None:
    """Raise for experts whose down_proj is stored in a way that cannot be measured; sharded: as is_sharded says."""
    module = experts.module if isinstance(experts, Adapter) else experts
    name, weight = type(module).__name__, as_experts(experts).down_proj
    placements = weight.placements if isinstance(weight, DTensor) and not sharded else ()
    if any(p.is_shard() and not p.is_shard(0) for p in placements):
        raise SedetectError(
            f"{path} ({name}): down_proj is split by tensor parallelism, so each rank sees partial sums; "
            "load the model with its expert-parallel plan instead"
        )
    parallel: Any = getattr(model.config, "distributed_config", None)
    shared = getattr(parallel, "enable_expert_parallel", False)
    if placements or shared:
        whole = shared and len(placements) == 1  # whole experts, whose numbers their place tells
        same = whole and getattr(parallel, "ep_size", parallel.tp_size) == parallel.tp_size  # rows on every rank
        if not same or getattr(parallel, "ep_implementation", "auto") not in ("auto", "all_reduce"):
            raise SedetectError(
                f"{path} ({name}): its ranks send each other rows, or hold experts in a form (quantized, for example) "
                "that does not tell which; load the model unquantized with DistributedConfig(tp_size=N, ep_size=N), or "
                "on one device"
            )
    for stored in (weight, getattr(module, "gate_up_proj", None)):
        if isinstance(stored, torch.Tensor) and not isinstance(stored, DTensor) and not _is_plain(stored):
            raise SedetectError(
                f"{path} ({name}): weights in a {type(stored).__name__} are not read by the kernels; load the model "
                "without it (unquantized, with values)"
            )
    if type(module).__name__ == "ModulesToSaveWrapper":
        raise _kept_twice(path)
    unknown = None if isinstance(experts, Adapter) else _unknown_part(module)
    if unknown is not None:
        raise SedetectError(
            f"{path} ({name}): the effect of its {unknown} on the experts' outputs is unknown; install an older "
            "transformers, or a newer sedetect"
        )
    if sharded and isinstance(experts, Adapter):
        raise SedetectError(f"{path} ({name}): experts of this form are not measured under fully_shard; load it whole")
    if weight.dtype not in _FLOATS and not isinstance(experts, ListedExperts):  # which compute themselves
        raise SedetectError(
            f"{path} ({name}): experts stored as {weight.dtype} are not supported yet; "
            "load the model dequantized (for example FineGrainedFP8Config(dequantize=True))"
        )


def _unknown_part(module: nn.Module) -> str | None:
    """What an experts module holds per expert, or calls outside its gate, that our computation of it leaves out."""
    own = as_experts(module)
    known = {*_PARTS, "post_expert_norm"} if getattr(module, "has_post_expert_norm", False) else _PARTS
    held = [name for name, part in module.named_parameters(recurse=False) if part.shape[:1] == own.down_proj.shape[:1]]
    silent = {name: child for name, child in module.named_children() if name not in known}
    if silent:
        width = own.down_proj.shape[1 if own.is_transposed else 2]
        z = own.down_proj.new_zeros(1, (1 + own.has_gate) * width)

        def hear(name: str, *call: Any) -> None:
            silent.pop(name, None)

        with ExitStack() as stack:
            for name, child in [*silent.items()]:
                stack.callback(child.register_forward_pre_hook(partial(hear, name)).remove)
            (own._apply_gate if own.has_gate else own.act_fn)(z)
    return next((name for name in (*held, *silent) if name not in known), None)


def _refuse_unreachable(path: str, module: nn.Module, known: list[str]) -> None:
    """Raise for experts whose outputs none of the backends would see."""
    name = type(module).__name__
    if name in REFUSED:
        raise SedetectError(f"{path} ({name}): {REFUSED[name]}; this model cannot be profiled")
    if any(path == one or path.startswith(f"{one}.") for one in known):
        return
    first = next(module.children(), None)
    inside = any(one.startswith(f"{path}.") for one in known)
    listed = "expert" in path.rpartition(".")[2] and isinstance(module, (nn.ModuleList, nn.ModuleDict)) and first
    named = path.rpartition(".")[2] == "experts" and first is not None
    stored = "xperts" in name and any(p.dim() == 3 for p in module.parameters(recurse=False))
    if (listed or named or stored) and not inside:
        what = type(first).__name__ if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else name
        raise SedetectError(
            f"{path} ({what}): experts outside transformers' experts interface are not supported yet; "
            "this model cannot be profiled now"
        )
