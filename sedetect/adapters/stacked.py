"""Adapter, and those of experts whose weights are stacked, in classes that transformers' experts interface misses.

An Adapter stands beside the module it adapts and holds none of its weights: what it shows are the same parameters, or
views of them. It is called as an experts module is, x (T, H) and routing (T, k) twice -> (T, H); while it is attached,
the forward of its module goes through it.
"""

import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from sedetect.adapters.forwards import forward_of, replace_forward
from sedetect.errors import SedetectError
from sedetect.ops.contract import ExpertWeights, Function, Halves, Matrices
from sedetect.ops.functions import moe_mlp
from sedetect.stats.bank import BankStats


class ExpertsModule(Protocol):
    """The attributes read from a transformers experts module and from an adapter.

    Experts without a gate have up_proj in the place of gate_up_proj. The biases are there where has_bias says so, and
    post_expert_norm where has_post_expert_norm is there and says so.
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    post_expert_norm: Function

    @property
    def gate_up_proj(self) -> Matrices | Halves | None: ...

    @property
    def down_proj(self) -> Matrices: ...

    @property
    def down_proj_bias(self) -> torch.Tensor: ...

    @property
    def act_fn(self) -> Function: ...

    def _apply_gate(self, z: torch.Tensor) -> torch.Tensor: ...


def as_experts(module: nn.Module) -> ExpertsModule:
    """Cast to an experts module: torch types the attributes of an nn.Module as tensors or modules."""
    return cast(ExpertsModule, module)


class Adapter(nn.Module):
    """Base: the attributes of a transformers experts module, over the weights of the module it adapts."""

    kind = "routed"
    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
    fusable = True  # a kernel may compute the gate
    inner_path = ""  # of the down projections, below the module
    reads: tuple[str, ...] = ()  # what else it reads of its module and parent in a forward

    def __init__(self, path: str, module: nn.Module, parent: nn.Module):
        super().__init__()
        self.path = path
        self.failure: SedetectError | None = None  # faults since it was attached that make statistics wrong
        self.config = SimpleNamespace()
        self._module, self._parent = weakref.ref(module), weakref.ref(parent)
        self._attached = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module, in memory or in a file, begins without an adapter."""
        return type(None), ()

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None  # which holds its adapter
        return module

    def adapts(self, module: nn.Module) -> bool:
        """Whether it is the adapter of this module, and not of one that it was copied from."""
        return self._module() is module

    @property
    def parent(self) -> nn.Module:
        """The module that owns the adapted one."""
        parent = self._parent()
        assert parent is not None
        return parent

    @property
    def redirected(self) -> nn.Module:
        """The module whose forward goes through this adapter while it is attached."""
        return self.module

    @property
    def gate_up_proj(self) -> Matrices | Halves | None:
        return as_experts(self.module).gate_up_proj

    @property
    def stored_gate_up(self) -> Matrices | Halves | None:
        """The projections as they are stored, where gate_up_proj does not show them."""
        return self.gate_up_proj

    @property
    def down_proj(self) -> Matrices:
        return as_experts(self.module).down_proj

    def act_fn(self, x: torch.Tensor) -> torch.Tensor:
        return as_experts(self.module).act_fn(x)

    def _apply_gate(self, z: torch.Tensor) -> torch.Tensor:
        gate, up = z.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        call = getattr(self.config, "sedetect_call", None)
        if call is not None:
            return call(self, x, top_k_index, top_k_weights)
        return self.compute(x, top_k_index, top_k_weights, BankStats.empty(len(self.down_proj), x.device))

    def compute(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, state: BankStats, **how):
        """The experts by our ops; see ops.moe_mlp."""
        if self.down_proj.is_meta:  # of a module inside, whose own hook would bring them if it were called
            raise SedetectError(
                f"{type(self.module).__name__}: its weights are offloaded, so they cannot be measured; load the "
                f"model on "
                "devices that hold them, or stream it (sedetect profile --stream)"
            )
        weights = ExpertWeights.of(self, how.pop("gate", self._apply_gate))
        return moe_mlp(x, top_k_index, top_k_weights, weights, state, **how)

    def translate(self, own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The redirected forward: takes the module's arguments and returns its result, computed by self."""
        return self(*args, **kwargs)

    def redirect(self) -> Callable[[], None]:
        """Send the module's forward through this adapter. Returns what undoes it; attachments nest."""
        if self._attached == 0:
            self.failure = None
            forward = torch.compiler.disable(partial(self.translate, forward_of(self.redirected)))
            self._undo = replace_forward(self.redirected, forward)
        self._attached += 1
        return self._leave

    def _leave(self) -> None:
        self._attached -= 1
        if self._attached == 0:
            self._undo()


class Llama4Experts(Adapter):
    """Every expert is given every token, scaled by its routing weight, which is 0 for most.

    So y is of the scaled input, and the g of a row is 1.
    """

    is_transposed = True
    reads = ("gate_up_proj", "module.act_fn", "parent.top_k")

    def translate(self, own_forward, hidden_states):
        experts, hidden = len(self.down_proj), hidden_states.shape[-1]
        scaled = hidden_states.view(experts, -1, hidden)
        size, index = scaled.abs().amax(-1).t().topk(self.parent.top_k)
        x = scaled[index, torch.arange(len(index), device=index.device)[:, None]]
        out = torch.zeros_like(scaled)
        out[0] = self(x, index, (size != 0).to(x.dtype))  # the caller sums over the experts
        return out.view(-1, hidden)


class DbrxExperts(Adapter):
    """Gate, up and down stored apart, each as one matrix of all experts; down is transposed."""

    reads = ("gate_up_proj", "module.mlp.activation_fn")

    @property
    def gate_up_proj(self):
        return Halves(self._split(self.module.mlp.w1), self._split(self.module.mlp.v1))

    @property
    def down_proj(self):
        return self._split(self.module.mlp.w2).transpose(1, 2)

    def _split(self, weight: torch.Tensor) -> torch.Tensor:
        module: Any = self.module  # the sizes are numbers
        return weight.view(module.num_experts, module.ffn_hidden_size, module.hidden_size)

    def act_fn(self, x):
        return self.module.mlp.activation_fn(x)

    def translate(self, own_forward, hidden_states, top_k_index, top_k_weights):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self(flat, top_k_index, top_k_weights).view(len(hidden_states), -1, hidden_states.shape[-1])


class JetMoeExperts(Adapter):
    """The whole block: its router hands out rows sorted by expert."""

    inner_path = ".output_linear"
    reads = ("gate_up_proj", "module.activation", "module.router", "module.bias")

    @property
    def gate_up_proj(self):
        return self.module.input_linear.weight

    @property
    def down_proj(self):
        return self.module.output_linear.weight

    def act_fn(self, x):
        return self.module.activation(x)

    def translate(self, own_forward, layer_input):
        x = layer_input.reshape(-1, layer_input.shape[-1])
        order, _, sorted_weights, sizes, _ = self.module.router(x)
        index, weights = torch.empty_like(order), torch.empty_like(sorted_weights)
        experts = torch.arange(len(sizes), device=order.device)
        index[order] = experts.repeat_interleave(torch.tensor(sizes, device=order.device))
        weights[order] = sorted_weights
        out = self(x, index.view(len(x), -1), weights.view(len(x), -1))
        return out.view(layer_input.shape) + self.module.bias


class LongcatFlashExperts(Adapter):
    """Indices beyond the experts that have weights stand for the identity."""

    reads = ("gate_up_proj", "module.act_fn")

    @property
    def gate_up_proj(self):
        return self.module.gate_up_proj[: len(self.down_proj)]

    def translate(self, own_forward, hidden_states, top_k_index, top_k_weights):
        identity = top_k_weights.masked_fill(top_k_index < len(self.down_proj), 0).sum(1, keepdim=True)
        out = self(hidden_states, top_k_index, top_k_weights)
        return out + (hidden_states * identity).to(out.dtype)


class AriaExperts(Adapter):
    """Two grouped matrices, and a router whose logits the experts choose by (transformers before the interface)."""

    is_transposed = True
    reads = ("gate_up_proj", "module.route_tokens_to_experts")

    @property
    def gate_up_proj(self):
        return self.module.fc1.weight

    @property
    def down_proj(self):
        return self.module.fc2.weight

    def act_fn(self, x):
        return F.silu(x)

    def translate(self, own_forward, hidden_states, router_logits):
        return self(hidden_states, *self.module.route_tokens_to_experts(router_logits))


class Step3p7Experts(Adapter):
    """As the interface would have it, but for the gate, which clamps after the activation."""

    reads = ("gate_up_proj", "module._apply_gate")

    def _apply_gate(self, z):
        return self.module._apply_gate(z)


class InklingSharedExperts(Adapter):
    """Several shared experts in one module. Their h carries the router's factor for the token, so g is 1."""

    kind = "shared"
    fusable = False
    reads = ("stored_gate_up", "module.act_fn")

    @property
    def gate_up_proj(self):
        return None  # x is h: the factor stands between the gate and down_proj

    @property
    def stored_gate_up(self):
        return Halves(self.module.gate_proj, self.module.up_proj)

    def translate(self, own_forward, hidden_states, gammas):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        gate, up = (torch.einsum("th,eih->tei", x, w) for w in (self.module.gate_proj, self.module.up_proj))
        h = self.act_fn(gate) * up * gammas.reshape(len(x), -1, 1)
        index = torch.arange(h.shape[1], device=x.device).expand(len(x), -1)
        return self(h, index, torch.ones_like(index, dtype=h.dtype)).view(hidden_states.shape)
