"""The plug-in point: Hugging Face MoE modules whose experts we compute, or step into.

transformers 5 sends every experts module through an experts interface, looked up by name in the module's config at
every call. We register one name, and attach by giving each experts module its own copy of its config that carries that
name and the function to call: the model's config, and any other model built from it, never change. The down_proj of a
shared expert or dense MLP is substituted by a module that holds the same parameters. attach returns what restores every
object that was there. Experts outside the interface have adapters (sedetect.adapters) that are attached in the same
way.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from sedetect import compiled, ops
from sedetect.adapters import NOT_MLPS, REFUSED, adapt
from sedetect.errors import SedetectError
from sedetect.forwards import forward_of, replaced_forward
from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.kernels.gate import Gate, candidate_gates, probe_gate
from sedetect.kernels.update import Rows
from sedetect.listed import DOWN_NAMES, EXPERT_DOWN_NAMES, ListedExperts, is_linear
from sedetect.stacked import Adapter
from sedetect.stats import BankId, BankStats

NAME = "sedetect"
# At least one of them stands beside an MLP's output projection; a router that projects down has none.
_UP_NAMES = ("up_proj", "gate_up_proj", "w1", "input_linear", "fc1", "wi", "wi_0")
_LAYER = re.compile(r"(.*?)\.(\d+)(?=\.|$)")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Bank:
    """One bank of a live model.

    rows_of: asks the profile which token each of T rows is. state is made on the device of the first row it sees, or
    before, where the weights are. number: its name in compiled graphs. here, group: where the ranks of an
    expert-parallel model share the experts, those of this rank, which alone state is of, and the ranks.
    """

    id: BankId
    path: str
    module: nn.Module
    experts: int
    hidden: int
    intermediate: int
    rows_of: Callable[["Bank", int, torch.device], Rows] | None = None
    backend: str | None = None
    channels: bool = False
    coactivation: bool = False
    first_rows: bool = False
    gate: Gate | Callable[[torch.Tensor], torch.Tensor] | None = None
    top_k: int = 1
    here: range | None = None
    group: ProcessGroup | None = None
    state: BankStats | None = None
    served: set[str] = field(default_factory=set)
    fallbacks: set[str] = field(default_factory=set)
    number: int = -1

    @property
    def routed(self) -> bool:
        """Whether it is called with a routing; so are shared experts that are stored together."""
        return self.id.kind.startswith("routed") or isinstance(self.module, Adapter)

    @property
    def stored_in(self) -> nn.Module:
        """The module of the model that has the weights."""
        return self.module.module if isinstance(self.module, Adapter) else self.module

    def note(self, backend: str, why: str | None) -> None:
        """Remember which backend served a call, and why it was not the one asked for."""
        self.served.add(backend)
        if why is not None:
            self.fallbacks.add(why)

    def empty(self, device: torch.device | str, experts: int | None = None) -> BankStats:
        """A state that has seen nothing, of all experts or so many."""
        channels = (self.hidden, self.intermediate) if self.channels else None
        coactivation = self.coactivation and self.experts > 1
        first_rows = self.first_rows and self.id.kind.startswith("routed")
        return BankStats.empty(experts or self.experts, device, channels, coactivation, first_rows)

    def prepare(self, device: torch.device) -> BankStats:
        """The state on this device."""
        if self.state is None or (self.state.counts.device != device and not self.served):
            self.state = self.empty(device, self.experts if self.here is None else len(self.here))
        return self.state

    def compute(self, state: BankStats, rows: Rows, *inputs: torch.Tensor) -> torch.Tensor:
        """The module's result, from (x, top_k_index, top_k_weights) where it is routed, else from (x,)."""
        compute = _compute_experts if self.routed else _compute_down
        return compute(self, state, rows, *inputs)

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the result of an x of this dtype."""
        return dtype if self.routed or not _is_plain_linear(self.module) else self.module.weight.dtype


def experts_forward(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """The registered experts implementation: x (T, H), routing (T, k) twice -> (T, H), by what attach was given."""
    return module.config.sedetect_call(module, *args)


ExpertsInterface.register(NAME, experts_forward)
FP8ExpertsInterface.register(NAME, experts_forward)


class SubstitutedDown(nn.Module):
    """Stands in for a down_proj module with its parameters under their names: forward(x) is call(original, x)."""

    def __init__(self, original: nn.Module, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.__dict__["original"] = original  # not a submodule: state_dict() keeps its keys
        self.__dict__["call"] = call
        self._parameters, self._buffers, self._modules = original._parameters, original._buffers, original._modules
        self.training = original.training

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.original, x)


def measure(bank: Bank) -> Callable[..., torch.Tensor]:
    """The call for attach that computes a bank by our ops and updates its state."""
    if bank.routed and getattr(bank.module, "fusable", True):
        bank.gate = gate_of(bank)
    weight = bank.module.down_proj if bank.routed else getattr(bank.module, "weight", None)
    # A graph that made the state would have to be compiled again where it finds one.
    if isinstance(weight, torch.Tensor) and not weight.is_meta:
        bank.prepare(weight.device)
    return partial(_measure, bank)


def _measure(bank: Bank, module: nn.Module, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    tokens = len(routing[0]) if routing else x.shape[:-1].numel()
    state, rows = bank.prepare(x.device), bank.rows_of(bank, tokens, x.device)
    if torch.compiler.is_compiling():
        return compiled.measure(bank, rows, x, *routing)
    return bank.compute(state, rows, x, *routing)


def _compute_experts(
    bank: Bank,
    state: BankStats,
    rows: Rows,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    module, bank.top_k = bank.module, top_k_index.shape[-1]
    how = {"rows": rows, "backend": bank.backend, "served": bank.note}
    if isinstance(module, Adapter):
        how |= {"gate": bank.gate} if module.fusable else {}
        return module.compute(hidden_states, top_k_index, top_k_weights, state, **how)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    up = "gate_up_proj" if module.has_gate else "up_proj"
    out = ops.moe_mlp(
        x,
        top_k_index,
        top_k_weights,
        getattr(module, up),
        module.down_proj,
        bank.gate,
        state,
        gate_up_bias=getattr(module, f"{up}_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        transposed=module.is_transposed,
        post_norm=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
        **how,
    )
    return out.reshape(hidden_states.shape)


def _compute_down(bank: Bank, state: BankStats, rows: Rows, x: torch.Tensor) -> torch.Tensor:
    """A plain nn.Linear is computed by our op; anything else (quantized, split) computes itself and is read."""
    original, flat = bank.module, x.reshape(-1, x.shape[-1])
    how = {"rows": rows, "backend": bank.backend, "served": bank.note}
    if _is_plain_linear(original):

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = ops.linear_stats(x.reshape(-1, x.shape[-1]), original.weight, original.bias, state, **how)
            return y.reshape(*x.shape[:-1], y.shape[-1])

        if not hasattr(original, "_hf_hook"):
            return forward(x)
        with replaced_forward(original, forward):  # the same kernel, inside the hooks that bring an offloaded weight
            return original(x)
    y = original(x)
    weight = getattr(original, "weight", None)
    if isinstance(weight, DTensor) and any(p.is_shard(1) for p in weight.placements):
        # Split by tensor parallelism: y is whole, but this rank has a part of every row of x.
        flat = _gathered(flat, weight.device_mesh.get_group())
    ops.output_stats(y.reshape(-1, y.shape[-1]), flat.to(y.dtype), state, **how)
    return y


def find_banks(model: nn.Module) -> list[Bank]:
    """Every bank of a model, in layer order: routed experts, and the shared experts and dense MLPs of their stacks.

    Raises SedetectError, naming module and class, for a model without experts and for experts that cannot be measured.
    """
    routed = [(path, experts) for path, module in model.named_modules() for experts in _experts(model, path, module)]
    known = [p for p, _ in routed] + [p for p, m in model.named_modules() if type(m).__name__ in NOT_MLPS]
    for path, module in model.named_modules():
        _refuse_unreachable(path, module, known)
    for path, experts in routed:
        _refuse_weights(model, path, experts)
    if not routed:
        raise SedetectError(f"{type(model).__name__}: no MoE layer found; give a Mixture-of-Experts model")
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

    def add(path: str, module: nn.Module, kind: str, sizes: tuple[int, int, int]) -> None:
        prefix, layer = _layer(path)
        stack = stacks[prefix]
        number = taken[stack, layer, kind]
        taken[stack, layer, kind] += 1
        if number:
            kind += "_vision" if ".vision" in path and number == 1 else f"_{number}"
        banks.append(Bank(BankId(stack, layer, kind), path, module, *sizes))

    for path, module in routed:
        experts, *matrix = module.down_proj.shape
        hidden, intermediate = reversed(matrix) if module.is_transposed else matrix
        inner = getattr(module, "inner_path", "")
        add(path + inner, module, getattr(module, "kind", "routed"), (experts, hidden, intermediate))
        if isinstance(module.down_proj, DTensor):
            mesh, own = module.down_proj.device_mesh, len(module.down_proj.to_local())
            first = own * mesh.get_local_rank()
            banks[-1].here, banks[-1].group = range(first, first + own), mesh.get_group()
    for path, module in mlps:
        # A dense MLP beside routed experts (gemma4) counts as a shared expert; its path tells.
        kind = "shared" if "shared" in path or _layer(path) in layers else "dense"
        add(path, module, kind, (1, module.out_features, module.in_features))
    return sorted(banks, key=lambda bank: bank.id)


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
        banks.append(Bank(bank, path, module, 1, module.out_features, module.in_features))
    return sorted(banks, key=lambda bank: bank.id)


def layer_path(bank: Bank) -> str:
    """Module path of the layer that a bank is in."""
    prefix, layer = _layer(bank.path)
    return f"{prefix}.{layer}"


def attach(
    model: nn.Module,
    calls: list[tuple[Bank, Callable[..., torch.Tensor]]],
    *,
    computes: bool = False,
    innermost: bool = False,
) -> Callable[[], None]:
    """Let each bank's module be computed by its call. Returns the function that restores what was there.

    A routed bank's call gets (module, x, top_k_index, top_k_weights), another's (down_proj module, x). A call may
    step in before what was attached earlier (an ablation inside a profile): see run_inner. computes says that the calls
    do not let it run, but compute by themselves (a profile). With innermost, the call of a routed bank steps in after
    all that pass on, and sees the routing that ablations leave. Raises SedetectError where a call would see the experts
    of one rank alone.
    """
    shared = next((bank for bank, _ in calls if bank.here is not None and not computes), None)
    if shared is not None:
        raise SedetectError(f"{shared.path}: expert-parallel models are profiled, nothing else; load it on one device")
    with ExitStack() as undo:
        for bank, call in calls:
            if bank.routed:
                owner, name = bank.module, "config"
                while innermost and not getattr(getattr(owner, name), "sedetect_computes", True):
                    owner, name = getattr(owner, name), "sedetect_inner"
                config = getattr(owner, name)
                own = copy.copy(config)
                own._experts_implementation_internal = NAME
                own.sedetect_call = call if computes else torch.compiler.disable(call)
                own.sedetect_inner = config
                own.sedetect_computes = computes
                undo.callback(setattr, owner, name, config)
                setattr(owner, name, own)
                if isinstance(bank.module, Adapter):
                    undo.callback(bank.module.redirect())
            else:
                path, _, name = bank.path.rpartition(".")
                parent = model.get_submodule(path)
                original = getattr(parent, name)
                undo.callback(setattr, parent, name, original)
                own_call = call if computes else torch.compiler.disable(call)
                setattr(parent, name, SubstitutedDown(original, own_call))
        return undo.pop_all().close


def run_inner(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """Compute an experts module by what was there before the current attach."""
    own = module.config
    module.config = own.sedetect_inner
    try:
        return module(*args)
    finally:
        module.config = own


def is_attached(bank: Bank) -> bool:
    """Whether some call of ours computes this bank now."""
    return hasattr(bank.module.config, "sedetect_call") if bank.routed else isinstance(bank.module, SubstitutedDown)


def layers_per_stack(model: nn.Module, banks: list[Bank]) -> dict[str, int]:
    """Decoder layers (dense ones counted) of every stack that has a bank."""
    return {bank.id.stack: len(model.get_submodule(_layer(bank.path)[0])) for bank in banks}


def gate_of(bank: Bank) -> Gate | Callable[[torch.Tensor], torch.Tensor]:
    """The module's gate as a Gate that a kernel can fuse, where one agrees with it; else its own function."""
    module, holder = bank.module, bank.stored_in
    own = module._apply_gate if module.has_gate else module.act_fn
    config = {name: value for name, value in vars(getattr(holder, "config", module.config)).items() if "limit" in name}
    limits = [value for value in (*vars(holder).values(), *config.values()) if isinstance(value, float) and value > 0]
    weight = module.down_proj
    device = "cpu" if weight.is_meta else weight.device
    # The type of the activations is not known before they come where weights are quantized: 16 bits is the strictest.
    quantized = isinstance(weight, QuantizedWeights) or weight.dtype is None  # as a list of modules says it
    dtype = torch.bfloat16 if quantized else weight.dtype
    return probe_gate(own, bank.intermediate, candidate_gates(module.has_gate, limits), dtype, device) or own


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


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether it computes what nn.Linear does, within accelerate's hooks or without."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    if hasattr(module, "_hf_hook") and getattr(module.forward, "__wrapped__", None) is not module._old_forward:
        return False  # replaced after the hooks had wrapped it
    own = getattr(forward_of(module), "__func__", None)
    return own is nn.Linear.forward and module.weight.dtype in _FLOATS


def _refuse_weights(model: nn.Module, path: str, experts: nn.Module) -> None:
    """Raise for experts whose down_proj is stored in a way that cannot be measured."""
    module = experts.module if isinstance(experts, Adapter) else experts
    name, weight = type(module).__name__, experts.down_proj
    placements = weight.placements if isinstance(weight, DTensor) else ()
    if any(p.is_shard() and p.dim != 0 for p in placements):
        raise SedetectError(
            f"{path} ({name}): down_proj is split by tensor parallelism, so each rank sees partial sums; "
            "load the model with its expert-parallel plan instead"
        )
    parallel = getattr(model.config, "distributed_config", None)
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
    if weight.dtype not in _FLOATS and not isinstance(experts, ListedExperts):  # which compute themselves
        raise SedetectError(
            f"{path} ({name}): experts stored as {weight.dtype} are not supported yet; "
            "load the model dequantized (for example FineGrainedFP8Config(dequantize=True))"
        )


def _gathered(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The whole of rows that are split over ranks: (T, I / ranks) -> (T, I)."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _refuse_unreachable(path: str, module: nn.Module, known: list[str]) -> None:
    """Raise for experts whose outputs no backend of ours would see."""
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
