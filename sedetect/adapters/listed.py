"""Adapters of experts that are modules in a list: those of transformers, and those of remote code.

A ModuleList of experts, as remote code has it, is adapted with the block that owns it (ListedBlock), and only after a
probe has shown that the block is understood.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from sedetect.adapters.forwards import forward_of, replaced_forward
from sedetect.adapters.quantized import linear_weight, serve_linears
from sedetect.adapters.stacked import Adapter
from sedetect.errors import SedetectError
from sedetect.ops.functions import moe_modules

# Names of an MLP's output projection, down_proj by far the most common. The names in EXPERT_DOWN_NAMES are those of
# other things as well, and count only in a class that is also an expert's.
DOWN_NAMES = ("down_proj", "w2", "output_linear")
EXPERT_DOWN_NAMES = (*DOWN_NAMES, "wo", "fc2")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_Routing = Callable[[list[Any]], tuple[torch.Tensor, torch.Tensor]]  # what routers gave -> (index, weights), (T, k)
# Of its input projections: the gate first, where there are two.
_UP_NAMES = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("wi",), ("fc1",))


class _Listed:
    """The matrices of a list of experts, one at a time: matrices[e] is what a stacked weight would have there.

    dtype is None where the linears are quantized: it is then that of the activations.
    """

    def __init__(self, linears: list[list[nn.Module]]):
        self._linears, first = linears, linears[0]
        held = next(itertools.chain(first[0].parameters(), first[0].buffers()))
        self.dtype = held.dtype if held is getattr(first[0], "weight", None) and held.dtype in _FLOATS else None
        self.device, self.is_meta = held.device, held.is_meta
        sizes = [linear_sizes(one) for one in first]
        self.shape = torch.Size((len(linears), sum(out for out, _ in sizes), sizes[0][1]))

    def __len__(self) -> int:
        return len(self._linears)

    def __getitem__(self, expert: int) -> torch.Tensor:
        linears = self._linears[expert]
        parts = [part for part in map(linear_weight, linears) if part is not None]
        if len(parts) < len(linears):
            name = type(linears[0]).__name__
            raise SedetectError(f"{name}: weights in this form cannot be read; load the model unquantized")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _ListedBiases:
    """Their biases, likewise; zeros for a linear without one."""

    def __init__(self, linears: list[list[nn.Module]]):
        self._linears, like = linears, _Listed(linears)
        self._dtype, self._device = like.dtype or torch.float32, like.device

    def __getitem__(self, expert: int) -> torch.Tensor:
        return torch.cat([self._bias(linear) for linear in self._linears[expert]])

    def _bias(self, linear: nn.Module) -> torch.Tensor:
        bias = getattr(linear, "bias", None)
        return torch.zeros(linear_sizes(linear)[0], dtype=self._dtype, device=self._device) if bias is None else bias


class ListedExperts(Adapter):
    """A list or dictionary of expert MLPs. Each runs its own forward, and its down_proj is listened to."""

    fusable = False

    def __init__(self, module: nn.Module, parent: nn.Module):
        super().__init__(module, parent)
        first = self.experts[0]
        self.down_name = next(name for name in EXPERT_DOWN_NAMES if is_linear(getattr(first, name, None)))
        self.up_names = next((names for names in _UP_NAMES if all(hasattr(first, n) for n in names)), ())
        self.has_gate = len(self.up_names) == 2
        linears = (getattr(first, name) for name in (*self.up_names, self.down_name))
        self.has_bias = any(getattr(linear, "bias", None) is not None for linear in linears)

    @property
    def experts(self) -> list[nn.Module]:
        return [child for child in self.module.children() if has_down(child)]

    @property
    def gate_up_proj(self):
        return _Listed(self._linears(*self.up_names))

    @property
    def gate_up_proj_bias(self):
        return _ListedBiases(self._linears(*self.up_names))

    up_proj, up_proj_bias = gate_up_proj, gate_up_proj_bias

    @property
    def down_proj(self):
        return _Listed(self._linears(self.down_name))

    @property
    def down_proj_bias(self):
        return _ListedBiases(self._linears(self.down_name))

    def _linears(self, *names: str) -> list[list[nn.Module]]:
        return [[getattr(expert, name) for name in names] for expert in self.experts]

    def act_fn(self, x):
        names = ("act_fn", "act", "activation_fn", "activation")
        return next(getattr(self.experts[0], name) for name in names if hasattr(self.experts[0], name))(x)

    def compute(self, x, top_k_index, top_k_weights, state, **how):
        down, run = self.down_proj, partial(self.run_expert, self.experts)
        sizes = (down.shape[0], down.shape[2], down.dtype or x.dtype)
        return moe_modules(x, top_k_index, top_k_weights, run, sizes, state, **how)

    def run_expert(
        self, experts: list[nn.Module], expert: int, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One of these experts on x (N, H): its result, and the output (N, H) and input (N, I) of its down_proj."""
        linear, heard = getattr(experts[expert], self.down_name), []
        own = forward_of(linear)

        def forward(h: torch.Tensor) -> torch.Tensor:
            heard.append((own(h), h))
            return heard[0][0]

        with replaced_forward(linear, forward):
            out = experts[expert](x)
        return (out, *heard[0])


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
        self._routers = [c for c in parent.children() if c is not module and not has_down(c)]
        self._route: _Routing | None = None
        self._probe()

    @property
    def redirected(self):
        return self.parent

    @property
    def top_k(self) -> int | None:
        block = self.parent
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
                stack.enter_context(replaced_forward(expert, torch.zeros_like))
            for router in self._routers:
                stack.enter_context(replaced_forward(router, partial(listen, forward_of(router))))
            return own_forward(*args, **kwargs), heard

    @torch.no_grad()
    def _probe(self) -> None:
        block, down = self.parent, self.down_proj
        x = torch.randn(1, 16, down.shape[1], generator=torch.Generator().manual_seed(0))
        # That of the router, where the experts' own does not tell what they are given.
        others = (p.dtype for router in self._routers for p in router.parameters() if p.dtype in _FLOATS)
        dtype = down.dtype or next(others, torch.bfloat16)
        x = x.to(down.device, dtype) if not down.is_meta else x
        tolerance = 1e-4 if dtype in (torch.float32, torch.float64) and down.dtype else 2e-2
        errors: dict[_Routing, float] = {}
        restore, _ = serve_linears(block)
        try:
            own = _first(block(x))
            routings: list[_Routing] = [_given]
            routings += [partial(_softmax, self.top_k, normalized) for normalized in (False, True)]
            for routing in routings:
                self._route = routing
                try:
                    mine = _first(self.translate(block.forward, x))
                except _Unlike:
                    continue
                errors[routing] = float((mine - own).abs().max() / own.abs().max())
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            pass  # code of a form that is not understood either: refused below
        finally:
            restore()
        self._route = min(errors, key=errors.__getitem__, default=None)
        if self._route is not None and errors[self._route] <= tolerance:
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


def has_down(module: nn.Module) -> bool:
    """Whether it is an MLP with an output projection."""
    return any(is_linear(getattr(module, name, None)) for name in EXPERT_DOWN_NAMES)


def is_linear(module: Any) -> bool:
    """nn.Linear, or a quantized one of any kind."""
    return isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of what is_linear tells."""
    linear: Any = module  # quantized ones share no class
    return linear.out_features, linear.in_features


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
