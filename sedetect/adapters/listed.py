"""Adapters of experts that are modules in a list: those of transformers, and those of remote code.

A ModuleList of experts, as remote code has it, is adapted with the block that owns it (ListedBlock), and only after a
probe has shown that the block is understood. Every later call is compared with what the block does with its experts.
"""

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor

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
_Routing = Callable[[list[Any]], tuple[torch.Tensor, torch.Tensor]]  # output of the routers -> (index, weights), (T, k)
# Of its input projections: the gate first, where there are two.
_UP_NAMES = (("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("wi",), ("fc1",))
_SIGNS = 16  # channels of a block's output that tell experts apart
_COLUMNS = 16  # channels of its input that tell rows apart
_dual = RLock()  # torch has one level of forward derivatives for the whole process


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
            raise SedetectError(
                f"{name}: weights in this format cannot be read; load the model unquantized, with adapters merged"
            )
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

    def __init__(self, path: str, module: nn.Module, parent: nn.Module):
        super().__init__(path, module, parent)
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
        first = self.experts[0]
        linears = {name for name, child in first.named_children() if is_linear(child)}
        if linears != {*self.up_names, self.down_name}:
            raise SedetectError(
                f"{self.path} ({type(first).__name__}): of {', '.join(sorted(linears))} gate and up cannot be "
                f"identified, so that the experts cannot be read one by one"
            )
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
        first = self.experts[0]
        own = next((getattr(first, name) for name in names if hasattr(first, name)), None)
        if own is None:
            raise SedetectError(f"{self.path} ({type(first).__name__}): its activation is unknown")
        return own(x)

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

    reads = ("module.moe_token_dropout",)

    def translate(self, own_forward, hidden_states, router_mask, router_probs):
        index = router_mask.masked_fill(router_probs == 0, len(self.experts))
        return self(hidden_states, index, router_probs) * (1 - self.module.moe_token_dropout)


@dataclass
class _Watched:
    """A record of one call of a block whose experts return zeros.

    output    its result, (..., H) or a tuple that begins with it
    routed    what its routers returned
    experts   number of the expert, rows, of each call of one; keys (rows, columns) of the rows it was given
    combined  (T, channels) what the block makes of signs that stand for its experts: the sum over a token's experts of
              the weight times the expert's signs
    """

    output: Any = None
    routed: list[Any] = field(default_factory=list)
    experts: list[tuple[int, int]] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)
    combined: torch.Tensor | None = None


class ListedBlock(ListedExperts):
    """A ModuleList of experts in a block of unknown code, whose forward runs with experts that give zeros.

    That leaves everything else the block does (shared experts, router logits, the form of its result); the experts then
    add what the block's router asked for. A probe finds which of the routings below the block uses. A second
    gate, a capacity or a scale may act later, so every call is checked: each expert must be given the rows that the
    routing names, and the block must weight its results as the routing does. The weights are the derivatives of its
    output by its experts' results, which forward-mode differentiation gives beside the zeros.
    """

    def __init__(self, path: str, module: nn.Module, parent: nn.Module):
        super().__init__(path, module, parent)
        self._routers = [c for c in parent.children() if c is not module and not has_down(c)]
        self._route: _Routing | None = None
        self._gives_all = False  # every expert is given every row, and weights choose
        draw = torch.randint(0, 2, (len(self.experts), _SIGNS), generator=torch.Generator().manual_seed(0))
        self._signs = 2.0 * draw - 1
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

    def translate(self, own_forward, *args, **kwargs):
        assert self._route is not None  # _probe
        hidden_states = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        self._signs = self._signs.to(hidden_states.device)
        watched = self._watch(own_forward, *args, **kwargs)
        index, weights = self._route(watched.routed)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        differs = self._difference(x, watched, index, weights)
        if differs is not None:
            self.failure = SedetectError(
                f"{self.path} ({type(self.parent).__name__}): {differs} (a second gate, an expert capacity or a scale "
                "may act here), so that its experts cannot be measured"
            )
            raise self.failure
        output, added = watched.output, self(x, index, weights).view(hidden_states.shape)
        if isinstance(output, tuple):
            return (output[0] + added.view(output[0].shape), *output[1:])
        return output + added.view(output.shape)

    def _watch(self, own_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> _Watched:
        """Run the block with experts that give zeros."""
        watched, signs = _Watched(), self._signs

        def listen(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            watched.routed.append(own(*args, **kwargs))
            return watched.routed[-1]

        def nothing(expert: int, x: torch.Tensor) -> torch.Tensor:
            keys, marks = _keys(x.reshape(-1, x.shape[-1])), torch.zeros_like(x)
            watched.experts.append((expert, len(keys)))
            watched.keys.append(keys)
            marks[..., :_SIGNS] = signs[expert, : x.shape[-1]]
            return forward_ad.make_dual(torch.zeros_like(x), marks)

        if torch.is_inference_mode_enabled():  # which has no derivatives
            args, kwargs = tuple(map(_cloned, args)), {name: _cloned(value) for name, value in kwargs.items()}
        with ExitStack() as stack:
            for context in (torch.inference_mode(False), torch.no_grad(), _dual, forward_ad.dual_level()):
                stack.enter_context(context)
            for number, expert in enumerate(self.experts):
                stack.enter_context(replaced_forward(expert, partial(nothing, number)))
            for router in self._routers:
                stack.enter_context(replaced_forward(router, partial(listen, forward_of(router))))
            result = own_forward(*args, **kwargs)
            output, combined = forward_ad.unpack_dual(_first(result))
            watched.output = (output, *result[1:]) if isinstance(result, tuple) else output
            if combined is not None:
                watched.combined = combined.reshape(-1, combined.shape[-1])[:, :_SIGNS].float()
        return watched

    def _difference(self, x: torch.Tensor, watched: _Watched, index: torch.Tensor, weights: torch.Tensor) -> str | None:
        """How the block deviated from this routing (T, k) twice of x (T, H); None if it did not."""
        experts, keys = len(self.experts), _keys(x)
        index = torch.where((index >= 0) & (index < experts), index, experts)
        by_expert = keys.new_zeros(experts + 1, keys.shape[1])
        numbers, rows = torch.tensor([*watched.experts, (experts, 0)]).T
        numbers = numbers.repeat_interleave(rows).to(x.device)
        given = by_expert.index_add(0, numbers, torch.cat([keys[:0], *watched.keys]))
        if self._gives_all:
            routed = keys.sum(0).expand(experts, -1)
        else:
            routed = by_expert.index_add(0, index.reshape(-1), keys.repeat_interleave(index.shape[1], 0))[:-1]
        if not torch.equal(given[:-1], routed):
            return "this block gives its experts rows that its router did not choose"
        signs = nn.functional.pad(self._signs, (0, 0, 0, 1))[:, : x.shape[-1]]  # none for no expert
        combined = torch.einsum("tk,tkp->tp", weights.float(), signs[index])
        theirs = torch.zeros_like(combined) if watched.combined is None else watched.combined
        # Up to the rounding of a sum over k in the block's type.
        tolerance = max(1e-4, (index.shape[1] + 8) * torch.finfo(x.dtype).eps / 2)
        size = weights.float().abs().sum(1, keepdim=True)
        if torch.isclose(theirs / size, combined / size, rtol=0, atol=tolerance, equal_nan=True).all():
            return None
        return "this block weights its experts differently from its router"

    @torch.no_grad()
    def _probe(self) -> None:
        block, down = self.parent, self.down_proj
        if any(isinstance(weight, DTensor) for weight in block.parameters()):
            raise SedetectError(
                f"{self.path} ({type(block).__name__}): a list of experts whose weights ranks share (fully_shard, "
                "tensor parallelism) cannot be measured; load it whole"
            )
        x = torch.randn(1, 256, down.shape[1], generator=torch.Generator().manual_seed(0))
        # That of the router, where the experts' own does not tell what they are given.
        others = (p.dtype for router in self._routers for p in router.parameters() if p.dtype in _FLOATS)
        dtype = down.dtype or next(others, torch.bfloat16)
        x = x.to(down.device, dtype) if not down.is_meta else x
        tolerance = 1e-4 if dtype in (torch.float32, torch.float64) and down.dtype else 2e-2
        restore, _ = serve_linears(block)
        try:
            if self._understands(block, x) and self._agrees(block, x[:, :16], tolerance):
                return
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            pass  # code of a form that is not understood either: refused below
        finally:
            restore()
        raise SedetectError(
            f"{self.path}: {type(block).__name__} ({type(self.experts[0]).__name__}): the routing of this block is "
            f"not understood, so its experts cannot be measured"
        )

    def _understands(self, block: nn.Module, x: torch.Tensor) -> bool:
        """Find the routing that says what the block does with the rows of x (1, T, H)."""
        routings: list[_Routing] = [_given]
        for dtype in (torch.float32, None):
            routings += [partial(_softmax, self.top_k, dtype, normalized) for normalized in (False, True)]
        self._signs = self._signs.to(x.device)
        watched, rows = self._watch(block.forward, x), x[0]
        counts = torch.zeros(len(self.experts), dtype=torch.int64)
        for expert, given in watched.experts:
            counts[expert] += given
        self._gives_all = bool((counts == len(rows)).all())
        for routing in routings:
            try:
                index, weights = routing(watched.routed)
            except _Unlike:
                continue
            if self._difference(rows, watched, index, weights) is None:
                self._route = routing
                return True
        return False

    def _agrees(self, block: nn.Module, x: torch.Tensor, tolerance: float) -> bool:
        """Whether the block's result for x (1, T, H) comes out of this adapter."""
        own, mine = _first(block(x)), _first(self.translate(block.forward, x))
        return float((mine - own).abs().max() / own.abs().max()) <= tolerance


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


def _softmax(
    top_k: int | None, dtype: torch.dtype | None, normalized: bool, heard: list[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k of the softmax in dtype, or in their own, over the router's logits (T, E); normalized: sum 1."""
    logits = next((r for r in heard if isinstance(r, torch.Tensor)), None)
    if logits is None or top_k is None:
        raise _Unlike
    weights, index = logits.reshape(-1, logits.shape[-1]).softmax(-1, dtype=dtype).topk(top_k)
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


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _keys(x: torch.Tensor) -> torch.Tensor:
    """(N, columns) int64 whose sums tell rows apart: a one, and the bits of some channels of x (N, H)."""
    some = x[:, :: max(1, x.shape[1] // _COLUMNS)].contiguous()
    bits = some.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).to(torch.int64)
    return torch.cat((torch.ones_like(bits[:, :1]), bits), 1)
