"""Experts that transformers' experts interface does not reach, given the shape of those that it does.

An Adapter stands beside the module it adapts and holds none of its weights: what it shows are the same parameters, or
views of them. It is called as an experts module is, x (T, H) and routing (T, k) twice -> (T, H); while it is attached,
the forward of its module goes through it. ADAPTERS names the classes of transformers; a ModuleList of experts, as
remote code has it, is adapted with the block that owns it (ListedBlock), and only after a probe has shown that the block
is understood.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sedetect import ops
from sedetect.errors import SedetectError
from sedetect.quantized import QuantizedWeights
from sedetect.stats import BankStats

# Names of an MLP's output projection, down_proj by far the most common. The names in EXPERT_DOWN_NAMES are those of
# other things as well, and count only in a class that is also an expert's.
DOWN_NAMES = ("down_proj", "w2", "output_linear")
EXPERT_DOWN_NAMES = (*DOWN_NAMES, "wo", "fc2")
# Of its input projections: the gate first, where there are two.
_UP_NAMES = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("wi",), ("fc1",))
# Classes whose experts cannot be measured at all.
REFUSED = {
    "DogeCDMoE": "its experts are rows of an embedding and have no down_proj matrix",
    "Mxfp4GptOssExperts": "experts stored in MXFP4 are not supported yet; load it with Mxfp4Config(dequantize=True)",
}
# Experts that are no MLPs, and have no down_proj to speak of: attention experts.
NOT_MLPS = {"JetMoeMoA"}

_known: "weakref.WeakKeyDictionary[nn.Module, Adapter]" = weakref.WeakKeyDictionary()


class Adapter(nn.Module):
    """Base: the attributes of a transformers experts module, over the weights of the module it adapts."""

    kind = "routed"
    has_gate, has_bias, is_transposed = True, False, False
    fusable = True  # a kernel may compute the gate
    inner_path = ""  # of the down projections, below the module

    def __init__(self, module: nn.Module, parent: nn.Module):
        super().__init__()
        self.config = SimpleNamespace()
        self._module, self._parent = weakref.ref(module), weakref.ref(parent)
        self._attached = 0

    @property
    def module(self) -> nn.Module:
        return self._module()

    @property
    def redirected(self) -> nn.Module:
        """The module whose forward goes through this adapter while it is attached."""
        return self.module

    @property
    def gate_up_proj(self) -> torch.Tensor | ops.Halves | None:
        return self.module.gate_up_proj

    @property
    def down_proj(self) -> torch.Tensor:
        return self.module.down_proj

    def act_fn(self, x: torch.Tensor) -> torch.Tensor:
        return self.module.act_fn(x)

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
        weights = (self.gate_up_proj, self.down_proj, how.pop("gate", self._apply_gate))
        return ops.moe_mlp(x, top_k_index, top_k_weights, *weights, state, transposed=self.is_transposed, **how)

    def translate(self, own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the redirected forward does: the module's own arguments and result, computed by self."""
        return self(*args, **kwargs)

    def redirect(self) -> Callable[[], None]:
        """Send the module's forward through this adapter. Returns what undoes it; attachments nest."""
        if self._attached == 0:
            module = self.redirected
            self._previous = module.__dict__.get("forward")
            module.forward = torch.compiler.disable(partial(self.translate, module.forward))
        self._attached += 1
        return self._leave

    def _leave(self) -> None:
        self._attached -= 1
        if self._attached == 0:
            _restore(self.redirected, self._previous)


class Llama4Experts(Adapter):
    """Every expert is given every token, scaled by its routing weight, which is 0 for most.

    So y is of the scaled input, and the g of a row is 1.
    """

    is_transposed = True

    def translate(self, own_forward, hidden_states):
        experts, hidden = len(self.down_proj), hidden_states.shape[-1]
        scaled = hidden_states.view(experts, -1, hidden)
        size, index = scaled.abs().amax(-1).t().topk(self._parent().top_k)
        x = scaled[index, torch.arange(len(index), device=index.device)[:, None]]
        out = torch.zeros_like(scaled)
        out[0] = self(x, index, (size != 0).to(x.dtype))  # the caller sums over the experts
        return out.view(-1, hidden)


class DbrxExperts(Adapter):
    """Gate, up and down stored apart, each as one matrix of all experts; down is transposed."""

    @property
    def gate_up_proj(self):
        return ops.Halves(self._split(self.module.mlp.w1), self._split(self.module.mlp.v1))

    @property
    def down_proj(self):
        return self._split(self.module.mlp.w2).transpose(1, 2)

    def _split(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.view(self.module.num_experts, self.module.ffn_hidden_size, self.module.hidden_size)

    def act_fn(self, x):
        return self.module.mlp.activation_fn(x)

    def translate(self, own_forward, hidden_states, top_k_index, top_k_weights):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self(flat, top_k_index, top_k_weights).view(len(hidden_states), -1, hidden_states.shape[-1])


class JetMoeExperts(Adapter):
    """The whole block: its router hands out rows sorted by expert."""

    inner_path = ".output_linear"

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

    def _apply_gate(self, z):
        return self.module._apply_gate(z)


class InklingSharedExperts(Adapter):
    """Several shared experts in one module. Their h carries the router's factor for the token, so g is 1."""

    kind = "shared"
    fusable = False

    @property
    def gate_up_proj(self):
        return None  # x is h: the factor stands between the gate and down_proj

    def translate(self, own_forward, hidden_states, gammas):
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        gate, up = (torch.einsum("th,eih->tei", x, w) for w in (self.module.gate_proj, self.module.up_proj))
        h = self.act_fn(gate) * up * gammas.reshape(len(x), -1, 1)
        index = torch.arange(h.shape[1], device=x.device).expand(len(x), -1)
        return self(h, index, torch.ones_like(index, dtype=h.dtype)).view(hidden_states.shape)


class FP8Experts(Adapter):
    """Experts stored in FP8, or in packed FP4, with a scale per block; see sedetect.quantized."""

    fusable = False
    dtype = torch.bfloat16  # the activations', known when they come

    @property
    def gate_up_proj(self):
        return self._weights("gate_up_proj" if self.has_gate else "up_proj")

    @property
    def down_proj(self):
        return self._weights("down_proj")

    @property
    def has_gate(self):
        return self.module.has_gate

    def _weights(self, name: str) -> QuantizedWeights:
        stored, scale = getattr(self.module, name), getattr(self.module, f"{name}_scale_inv")
        return QuantizedWeights(stored, scale, self.module.block_size, self.dtype)

    def _apply_gate(self, z):
        return self.module._apply_gate(z) if self.has_gate else self.act_fn(z)

    def translate(self, own_forward, hidden_states, top_k_index, top_k_weights):
        self.dtype = hidden_states.dtype
        return self(hidden_states, top_k_index, top_k_weights)


class _Listed:
    """The matrices of a list of experts, one at a time: matrices[e] is what a stacked weight would have there."""

    def __init__(self, parts: list[list[torch.Tensor]]):
        self._parts = parts
        self.dtype, self.device, self.is_meta = parts[0][0].dtype, parts[0][0].device, parts[0][0].is_meta
        self.shape = torch.Size((len(parts), sum(len(p) for p in parts[0]), *parts[0][0].shape[1:]))

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, expert: int) -> torch.Tensor:
        parts = self._parts[expert]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class ListedExperts(Adapter):
    """A list or dictionary of expert MLPs. Each runs its own forward, and its down_proj is listened to."""

    fusable = False

    def __init__(self, module: nn.Module, parent: nn.Module):
        super().__init__(module, parent)
        first = self.experts[0]
        self.down_name = next(name for name in EXPERT_DOWN_NAMES if _is_linear(getattr(first, name, None)))
        self.up_names = next((names for names in _UP_NAMES if all(hasattr(first, n) for n in names)), ())
        self.has_gate = len(self.up_names) == 2
        self.has_bias = getattr(getattr(first, self.down_name), "bias", None) is not None

    @property
    def experts(self) -> list[nn.Module]:
        return [child for child in self.module.children() if _has_down(child)]

    @property
    def gate_up_proj(self):
        return _Listed([[getattr(e, name).weight for name in self.up_names] for e in self.experts])

    @property
    def gate_up_proj_bias(self):
        return _Listed([[getattr(e, name).bias for name in self.up_names] for e in self.experts])

    up_proj, up_proj_bias = gate_up_proj, gate_up_proj_bias

    @property
    def down_proj(self):
        return _Listed([[getattr(e, self.down_name).weight] for e in self.experts])

    @property
    def down_proj_bias(self):
        return _Listed([[getattr(e, self.down_name).bias] for e in self.experts])

    def act_fn(self, x):
        names = ("act_fn", "act", "activation_fn", "activation")
        return next(getattr(self.experts[0], name) for name in names if hasattr(self.experts[0], name))(x)

    def compute(self, x, top_k_index, top_k_weights, state, rows=None, backend=None, **how):
        experts, dtype = self.experts, self.down_proj.dtype

        def run(expert: int, rows_of_expert: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            down, heard = getattr(experts[expert], self.down_name), []
            own = down.forward

            def forward(h: torch.Tensor) -> torch.Tensor:
                heard.append((own(h), h))
                return heard[0][0]

            with _forward(down, forward):
                out = experts[expert](rows_of_expert)
            return (out, *heard[0])

        sizes = (self.down_proj.shape[0], self.down_proj.shape[2], dtype)
        return ops.moe_modules(x, top_k_index, top_k_weights, run, sizes, state, rows=rows, backend=backend)


class SwitchTransformersExperts(ListedExperts):
    """Routing as a mask; tokens beyond an expert's capacity go to none."""

    def translate(self, own_forward, hidden_states, selected_experts, routing_weights):
        index = selected_experts.argmax(-1).masked_fill(~selected_experts.any(-1), len(self.experts))
        return self(hidden_states, index, routing_weights)


class NllbMoeExperts(ListedExperts):
    """One slot per expert and token: the mask names the expert, and most weights are 0."""

    def translate(self, own_forward, hidden_states, router_mask, router_probs):
        index = router_mask.masked_fill(router_probs == 0, len(self.experts))
        return self(hidden_states, index, router_probs) * (1 - self.module.moe_token_dropout)


class ListedBlock(ListedExperts):
    """A ModuleList of experts in a block of unknown code, whose forward runs with experts that give zeros.

    That leaves everything else the block does (shared experts, router logits, the form of its result); the experts then
    add what the block's router asked for. Which of the routings below the block means is found by a probe.
    """

    def __init__(self, module: nn.Module, parent: nn.Module):
        super().__init__(module, parent)
        self._routers = [c for c in parent.children() if c is not module and not _has_down(c)]
        self._route = None
        self._probe()

    @property
    def redirected(self):
        return self._parent()

    @property
    def top_k(self) -> int | None:
        block = self._parent()
        names = ("top_k", "num_experts_per_tok", "num_selected_experts")
        holders = (block, getattr(block, "config", None))
        return next((getattr(h, n) for h in holders for n in names if isinstance(getattr(h, n, None), int)), None)

    def translate(self, own_forward, hidden_states, *args, **kwargs):
        output, routed = self._without_experts(own_forward, hidden_states, *args, **kwargs)
        index, weights = self._route(routed)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        added = self(x, index, weights).view(hidden_states.shape)
        if isinstance(output, tuple):
            return (output[0] + added.view(output[0].shape), *output[1:])
        return output + added.view(output.shape)

    def _without_experts(self, own_forward, *args, **kwargs) -> tuple[Any, list[Any]]:
        """The block's result with experts that give zeros, and what its router gave."""
        heard: list[Any] = []

        def listen(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            heard.append(own(*args, **kwargs))
            return heard[-1]

        with ExitStack() as stack:
            for expert in self.experts:
                stack.enter_context(_forward(expert, torch.zeros_like))
            for router in self._routers:
                stack.enter_context(_forward(router, partial(listen, router.forward)))
            return own_forward(*args, **kwargs), heard

    @torch.no_grad()
    def _probe(self) -> None:
        block, weight = self._parent(), self.down_proj[0]
        x = torch.randn(1, 16, weight.shape[0], generator=torch.Generator().manual_seed(0))
        x = x.to(weight.device, weight.dtype) if not weight.is_meta else x
        tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
        errors: dict[Callable[..., Any], float] = {}
        try:
            own = _first(block(x))
            for routing in (_given, partial(_softmax, self.top_k, False), partial(_softmax, self.top_k, True)):
                self._route = routing
                try:
                    mine = _first(self.translate(block.forward, x))
                except _Unlike:
                    continue
                errors[routing] = float((mine - own).abs().max() / own.abs().max())
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            pass
        self._route = min(errors, key=errors.get, default=None)
        if errors.get(self._route, torch.inf) <= tolerance:
            return
        raise SedetectError(
            f"{type(block).__name__} ({type(self.experts[0]).__name__}): how this block routes to its experts is not "
            "understood, so that they cannot be measured"
        )


class _Unlike(Exception):
    """What a router gave has not the form of a routing."""


def _given(heard: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(index, weights), both (T, k), among what the router returned."""
    for result in heard:
        tensors = [t for t in result if isinstance(t, torch.Tensor)] if isinstance(result, (tuple, list)) else []
        index = next((t for t in tensors if t.dtype in (torch.int64, torch.int32)), None)
        if index is not None:
            weights = next((t for t in tensors if t.is_floating_point() and t.shape == index.shape), None)
            if weights is not None:
                return index.reshape(-1, index.shape[-1]), weights.reshape(-1, index.shape[-1])
    raise _Unlike


def _softmax(top_k: int | None, normalized: bool, heard: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k of the softmax over the router's logits (T, E); normalized: their sum is made 1."""
    logits = next((r for r in heard if isinstance(r, torch.Tensor)), None)
    if logits is None or top_k is None:
        raise _Unlike
    weights, index = logits.reshape(-1, logits.shape[-1]).softmax(-1, dtype=torch.float32).topk(top_k)
    return index, weights / weights.sum(-1, keepdim=True) if normalized else weights


ADAPTERS: dict[str, type[Adapter]] = {
    "Llama4TextExperts": Llama4Experts,
    "DbrxExperts": DbrxExperts,
    "JetMoeMoE": JetMoeExperts,
    "LongcatFlashExperts": LongcatFlashExperts,
    "AriaExperts": AriaExperts,
    "Step3p7Experts": Step3p7Experts,
    "InklingSharedExperts": InklingSharedExperts,
    "SwitchTransformersExperts": SwitchTransformersExperts,
    "NllbMoeExperts": NllbMoeExperts,
    "FP8Experts": FP8Experts,
}


def adapt(path: str, module: nn.Module, parent: nn.Module) -> Adapter | None:
    """The adapter of an experts module outside the interface, the same one every time; None for any other module.

    Raises SedetectError for a block of experts that is not understood.
    """
    adapter = ADAPTERS.get(type(module).__name__)
    if adapter is None and _is_list_of_experts(path, module, parent):
        adapter = ListedBlock
    if adapter is None:
        return None
    if module not in _known:
        _known[module] = adapter(module, parent)
    return _known[module]


def _is_list_of_experts(path: str, module: nn.Module, parent: nn.Module) -> bool:
    """A list of MLPs that is named for experts, or stands beside a router with one row for each of them."""
    if type(module) is not nn.ModuleList or len(module) < 2 or not all(_has_down(child) for child in module):
        return False
    shapes = [getattr(child, "weight", None) for child in parent.children()]
    routed = any(isinstance(w, torch.Tensor) and w.dim() == 2 and len(w) == len(module) for w in shapes)
    return routed or "expert" in path.rpartition(".")[2].lower()


def _has_down(module: nn.Module) -> bool:
    return any(_is_linear(getattr(module, name, None)) for name in EXPERT_DOWN_NAMES)


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a module while the context lasts."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        _restore(module, previous)


def _restore(module: nn.Module, previous: Callable[..., Any] | None) -> None:
    if previous is None:
        del module.forward
    else:
        module.forward = previous
