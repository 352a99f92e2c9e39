"""Ablation: a model without chosen experts, switched off at dispatch. No weight is edited.

Three interventions answer different questions (arXiv 2507.23279 zeroes down_proj, which for experts without a bias
is "skip"):

    skip         the expert's output does not count; the routing weights of the others stay as they are
    renormalize  the others take over its routing weight, in proportion, so that their sum stays what it was
    remove       the router cannot choose it: its logit is -inf before top-k, so another expert takes the slot, as in a
                 checkpoint from which the expert was pruned

A single weight of an expert's down_proj can be switched off as well (a super weight): its product is taken out of the
expert's output.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sedetect.adapters.forwards import forward_of, replace_forward
from sedetect.adapters.quantized import linear_weight
from sedetect.adapters.stacked import as_experts
from sedetect.errors import SedetectError
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank, find_banks
from sedetect.models.experts import expert_hidden
from sedetect.models.routers import find_router
from sedetect.models.tracking import TrackedModel
from sedetect.models.wrappers import unwrap
from sedetect.stats.place import BankId, Place, Weight, parse_target

HOW = ("skip", "renormalize", "remove")
TOKENS = ("all", "first", "rest")


@dataclass
class _Off:
    """The experts and weights switched off in one bank."""

    experts: list[int] = field(default_factory=list)
    weights: list[tuple[int, int, int]] = field(default_factory=list)  # expert, channel, intermediate


def resolve(model: nn.Module, what: Iterable[Place | Weight | str]) -> dict[Place | Weight, Bank]:
    """The targets with their banks, each once, in order. Raises SedetectError for a target that the model does not
    have.
    """
    banks = {bank.id: bank for bank in find_banks(model)}
    found = {}
    for one in what:
        one = parse_target(one) if isinstance(one, str) else one
        place = one.expert if isinstance(one, Weight) else one
        bank = banks.get(place.bank)
        if bank is None or place.number >= bank.experts:
            raise SedetectError(f"{one}: {type(model).__name__} has no such expert; layers and experts count from 0")
        if isinstance(one, Weight) and (one.channel >= bank.hidden or one.intermediate >= bank.intermediate):
            raise SedetectError(f"{one}: its down_proj is {bank.hidden} x {bank.intermediate}; name a weight inside")
        found[one] = bank
    return found


@contextmanager
def ablate(
    model: nn.Module, what: Iterable[Place | Weight | str], *, how: str = "skip", tokens: str = "all"
) -> Iterator[None]:
    """Context manager: run the model without these experts (names or Places) or single weights.

    Args:
        model: a Hugging Face MoE model. It may be under a profile, which then measures the other experts.
        how: "skip", "renormalize" or "remove" (module docstring). Shared experts and weights support only "skip".
        tokens: "all", or only at "first" tokens of sequences, or only at the "rest".
    Raises:
        SedetectError: for an expert that the model does not have; for "remove" with a router that cannot be masked, or
            with tokens other than "all".
    """
    if how not in HOW:
        raise SedetectError(f"how {how!r} is not known; use one of {', '.join(HOW)}")
    if tokens not in TOKENS:
        raise SedetectError(f"tokens {tokens!r} is not known; use one of {', '.join(TOKENS)}")
    if how == "remove" and tokens != "all":
        raise SedetectError(f"how 'remove' masks the router for every token; tokens {tokens!r} goes with skip only")
    model = unwrap(model)
    chosen: dict[BankId, _Off] = defaultdict(_Off)
    found = {}
    for target, bank in resolve(model, what).items():
        found[bank.id] = bank
        place = target.expert if isinstance(target, Weight) else target
        if isinstance(target, Weight):
            chosen[bank.id].weights.append((place.number, target.channel, target.intermediate))
        else:
            chosen[bank.id].experts.append(place.number)
    for off in chosen.values():  # an expert that is off has no weight left to take out
        off.weights = [weight for weight in off.weights if weight[0] not in off.experts]
    with ExitStack() as stack:
        tracked = stack.enter_context(TrackedModel(model)) if tokens != "all" else None
        calls = []
        for key, off in chosen.items():
            bank = found[key]
            selected = partial(_selected, tracked, tokens, bank)
            if not bank.routed:
                calls.append((bank, partial(_without_down, off, selected)))
                continue
            calls.append((bank, partial(_without_experts, bank, off, selected, how)))
            if how == "remove" and off.experts:
                stack.callback(_mask_router(model, bank, off.experts))
        stack.callback(attach(model, calls))
        yield


def _selected(tracked: TrackedModel | None, tokens: str, bank: Bank, count: int, device: torch.device) -> torch.Tensor:
    """(T,) bool: the rows of this call to which the ablation applies."""
    if tracked is None:
        return torch.ones(count, dtype=torch.bool, device=device)
    first = tracked.rows_of(bank, count, device).first
    return first if tokens == "first" else ~first


def _without_experts(
    bank: Bank,
    off: _Off,
    selected: Callable[[int, torch.device], torch.Tensor],
    how: str,
    module: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
) -> torch.Tensor:
    rows = selected(len(index), x.device)[:, None]
    kept = gates
    if off.experts:
        dropped = rows & torch.isin(index, torch.tensor(off.experts, device=index.device))
        if how == "remove" and bank.experts - len(off.experts) >= index.shape[-1] and bool(dropped.any()):
            raise SedetectError(f"{bank.path}: its router still chooses removed experts; use how='skip'")
        kept = gates.masked_fill(dropped, 0)
        if how == "renormalize":
            total, rest = gates.sum(1, keepdim=True), kept.sum(1, keepdim=True)
            kept = torch.where(rest != 0, kept * (total / rest), kept)
    out = run_inner(module, x, index, kept)
    for expert, channel, intermediate in off.weights:
        # One product taken out of the sum; the expert's intermediate state is computed once more for that.
        h = expert_hidden(module, x.reshape(-1, x.shape[-1]), expert)[:, intermediate]
        experts = as_experts(module)
        weight = experts.down_proj[expert]
        weight = weight[intermediate, channel] if experts.is_transposed else weight[channel, intermediate]
        gate = (kept * (rows & (index == expert))).sum(1)
        out = out.clone()
        out.view(-1, out.shape[-1])[:, channel] -= (gate * h * weight).to(out.dtype)
    return out


def _without_down(
    off: _Off, selected: Callable[..., torch.Tensor], original: nn.Module, x: torch.Tensor
) -> torch.Tensor:
    y: torch.Tensor = original(x)
    flat = y.reshape(-1, y.shape[-1])
    rows = selected(len(flat), x.device)
    if off.experts:
        flat = flat.masked_fill(rows[:, None], 0)
    if off.weights:
        weight = linear_weight(original)
        if weight is None:
            raise SedetectError(f"{type(original).__name__}: single weights of it cannot be read; load it unquantized")
        for _, channel, intermediate in off.weights:
            flat = flat.clone()
            h = x.reshape(-1, x.shape[-1])[:, intermediate]
            flat[:, channel] -= (rows * h * weight[channel, intermediate]).to(flat.dtype)
    return flat.view(y.shape)


class _MaskedLogits(TorchFunctionMode):
    """Sets the columns of removed experts to -inf in the linear map that gives one column per expert."""

    def __init__(self, num_experts: int, removed: list[int]):
        super().__init__()
        self.num_experts, self.removed, self.hits = num_experts, removed, 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        linear = function in (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
        if linear and out.shape[-1] == self.num_experts:
            self.hits += 1
            out = out.clone()
            out[..., self.removed] = -torch.inf
        return out


def _mask_router(model: nn.Module, bank: Bank, removed: list[int]) -> Callable[[], None]:
    """Wrap the forward of the bank's router, and let its correction biases stand at -inf; returns what undoes both."""
    found = find_router(model, bank)
    if found is None:
        raise SedetectError(f"{bank.path}: no router found beside it; use how='skip'")
    router = found.block.get_submodule(found.path.partition(".")[0])
    original = forward_of(router)

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _MaskedLogits(bank.experts, removed) as mode:
            out = original(*args, **kwargs)
        if not mode.hits:
            raise SedetectError(
                f"{bank.path}: the logits of its router ({type(router).__name__}) cannot be masked; use how='skip'"
            )
        return out

    restore = replace_forward(router, forward)
    # A bias added to the scores after the sigmoid (e_score_correction_bias) would let a logit of -inf be chosen.
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for module in {id(m): m for m in (found.block, *router.modules())}.values():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in tables:
            for name, bias in own.items():
                if bias is not None and bias.numel() == bias.shape[-1] == bank.experts and bias.is_floating_point():
                    masked = bias.detach().clone()
                    masked[..., removed] = -torch.inf
                    swapped.append((own, name, bias))
                    own[name] = nn.Parameter(masked, False) if own is module._parameters else masked

    def undo() -> None:
        for own, name, bias in swapped:
            own[name] = bias
        restore()

    return undo
