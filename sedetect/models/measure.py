"""What computes a bank in place of its module, by our ops, and measures it."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from sedetect.adapters.forwards import replaced_forward
from sedetect.adapters.stacked import Adapter, as_experts
from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.kernels.gate import Gate
from sedetect.kernels.rows import Rows
from sedetect.models import compiled
from sedetect.models.banks import Bank, is_plain_linear
from sedetect.models.gate import candidate_gates, probe_gate
from sedetect.ops.contract import ExpertWeights
from sedetect.ops.functions import Parts, linear_stats, moe_mlp, output_stats
from sedetect.stats.bank import BankStats


@dataclass(frozen=True)
class Measuring:
    """What is measured of every bank, and by what.

    backend       "cpu", "cuda", "triton" or "torch"; the fastest that serves each call by default
    channels      keep the per-channel maxima and squares (BankStats.channel_max, in_channel_max, in_channel_sq)
    coactivation  count the tokens routed to each pair of experts (BankStats.coactivation)
    first_rows    keep what the published tool reads of each routed expert (BankStats.published_max)
    modalities    also keep the statistics of each modality alone (Profile.modalities)
    """

    backend: str | None = None
    channels: bool = False
    coactivation: bool = False
    first_rows: bool = False
    modalities: bool = False


@dataclass(eq=False)
class Measurement:
    """What measures one bank, and what it has seen.

    rows_of: asks the profile which token each of T rows of a bank is. state is made on the device of the first row it
    sees, or before, where the weights are. here: the experts that state is of where ranks share them, as Bank.here;
    None once the ranks have joined theirs. number: its name in compiled graphs. parts: for each of so many modalities,
    the state of its rows alone, without the optional statistics.
    """

    bank: Bank
    rows_of: Callable[[Bank, int, torch.device], Rows]
    measuring: Measuring = Measuring()
    gate: Gate | Callable[[torch.Tensor], torch.Tensor] | None = None
    number: int = -1
    modalities: int = 0
    here: range | None = field(init=False)
    state: BankStats | None = field(init=False)
    parts: list[BankStats] = field(init=False)
    top_k: int = field(init=False)
    served: set[str] = field(init=False)
    fallbacks: set[str] = field(init=False)
    lock: Any = field(init=False, default_factory=threading.RLock)  # layers may run in several threads

    def __post_init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.here, self.state, self.parts, self.top_k = self.bank.here, None, [], 1
        self.served, self.fallbacks = set(), set()

    def note(self, backend: str, why: str | None) -> None:
        """Remember which backend served a call, and why it was not the one asked for."""
        self.served.add(backend)
        if why is not None:
            self.fallbacks.add(why)

    def empty(self, device: torch.device | str, experts: int | None = None) -> BankStats:
        """A state that has seen nothing, of all experts or so many."""
        channels = (self.bank.hidden, self.bank.intermediate) if self.measuring.channels else None
        coactivation = self.measuring.coactivation and self.bank.experts > 1
        published = self.measuring.first_rows and self.bank.id.routed
        return BankStats.empty(experts or self.bank.experts, device, channels, coactivation, published)

    def prepare(self, device: torch.device) -> BankStats:
        """The state on this device."""
        if self.state is None or (self.state.counts.device != device and not self.served):
            with torch.inference_mode(False):  # it is changed in forwards outside of it too
                experts = self.bank.experts if self.here is None else len(self.here)
                self.state = self.empty(device, experts)
                self.parts = [BankStats.empty(experts, device) for _ in range(self.modalities)]
        return self.state

    @property
    def states(self) -> list[BankStats]:
        """Those that a call updates: of all rows, and of each modality's."""
        assert self.state is not None  # prepare
        return [self.state, *self.parts]

    def prepare_where_the_weights_are(self) -> None:
        """The state before the first row comes: a graph that made it would be compiled again where it finds one."""
        module = self.bank.module
        weight = module.down_proj if self.bank.routed else getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and not weight.is_meta:
            self.prepare(weight.device)

    def whole(self) -> BankStats:
        """What was seen, of all experts, on the CPU."""
        return self.empty("cpu") if self.state is None else self._whole(self.state)

    def whole_parts(self) -> list[BankStats]:
        """The same of each modality."""
        if self.state is None:
            return [BankStats.empty(self.bank.experts) for _ in range(self.modalities)]
        return [self._whole(part) for part in self.parts]

    def _whole(self, state: BankStats) -> BankStats:
        state = state.to("cpu")
        return state if self.here is None else state.among(self.here.start, self.bank.experts)

    def compute(self, seen: Sequence[tuple[BankStats, Rows]], *inputs: torch.Tensor) -> torch.Tensor:
        """The module's result, from (x, top_k_index, top_k_weights) where it is routed, else from (x,).

        seen: the state of all rows and these, then those of each modality.
        """
        compute = _compute_experts if self.bank.routed else _compute_down
        (state, rows), *parts = seen
        return compute(self, state, rows, parts, *inputs)

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the result of an x of this dtype."""
        bank = self.bank
        return dtype if bank.routed or not is_plain_linear(bank.module) else bank.module.weight.dtype


def measure(measurement: Measurement) -> Callable[..., torch.Tensor]:
    """The call for attach that computes a bank by our ops and updates its state."""
    bank = measurement.bank
    if measurement.gate is None and bank.routed and getattr(bank.module, "fusable", True):
        measurement.gate = gate_of(bank)
    measurement.prepare_where_the_weights_are()
    return partial(_measure, measurement)


def _measure(measurement: Measurement, module: nn.Module, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    tokens = len(routing[0]) if routing else x.shape[:-1].numel()
    rows = measurement.rows_of(measurement.bank, tokens, x.device)
    measurement.prepare(x.device)
    if torch.compiler.is_compiling():
        return compiled.measure(measurement, rows, x, *routing)
    with measurement.lock:
        return measurement.compute(list(zip(measurement.states, (rows, *rows.parts))), x, *routing)


def _compute_experts(
    measurement: Measurement,
    state: BankStats,
    rows: Rows,
    parts: Parts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    module, measurement.top_k = measurement.bank.module, top_k_index.shape[-1]
    gate = measurement.gate
    how = _how(measurement, rows, parts)
    if isinstance(module, Adapter):
        compute = partial(module.compute, gate=gate) if module.fusable else module.compute
        return compute(hidden_states, top_k_index, top_k_weights, state, **how)
    assert gate is not None  # measure
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    norm = as_experts(module).post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    weights = ExpertWeights.of(module, gate)
    out = moe_mlp(x, top_k_index, top_k_weights, weights, state, post_norm=norm, **how)
    return out.reshape(hidden_states.shape)


def _compute_down(
    measurement: Measurement, state: BankStats, rows: Rows, parts: Parts, x: torch.Tensor
) -> torch.Tensor:
    """A plain nn.Linear is computed by our op; anything else (quantized, split) computes itself and is read."""
    original, flat = measurement.bank.module, x.reshape(-1, x.shape[-1])
    how = _how(measurement, rows, parts)
    if is_plain_linear(original):

        def forward(x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1])
            y = linear_stats(flat, original.weight, original.bias, state, **how)
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
    output_stats(y.reshape(-1, y.shape[-1]), flat.to(y.dtype), state, **how)
    return y


def _how(measurement: Measurement, rows: Rows, parts: Parts) -> dict[str, Any]:
    """What every op is told beside its inputs and the state."""
    return {"rows": rows, "parts": parts, "backend": measurement.measuring.backend, "served": measurement.note}


def gate_of(bank: Bank) -> Gate | Callable[[torch.Tensor], torch.Tensor]:
    """The module's gate as a Gate that a kernel can fuse, where one agrees with it; else its own function."""
    module, holder = bank.module, bank.stored_in
    experts = as_experts(module)
    own = experts._apply_gate if experts.has_gate else experts.act_fn
    config = {name: value for name, value in vars(getattr(holder, "config", module.config)).items() if "limit" in name}
    limits = [value for value in (*vars(holder).values(), *config.values()) if isinstance(value, float) and value > 0]
    weight = experts.down_proj
    device = "cpu" if weight.is_meta else weight.device
    # The type of the activations is not known before they come where weights are quantized: 16 bits is the strictest.
    quantized = isinstance(weight, QuantizedWeights) or weight.dtype is None  # as a list of modules says it
    dtype = torch.bfloat16 if quantized else weight.dtype
    return probe_gate(own, bank.intermediate, candidate_gates(experts.has_gate, limits), dtype, device) or own


def _gathered(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The whole of rows that are split over ranks: (T, I / ranks) -> (T, I)."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
