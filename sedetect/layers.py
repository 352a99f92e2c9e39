"""The decoder layers of a live model: where they are, what their attention gives, and what each expert adds.

Layers and the attention blocks directly in them may be hooked; experts and MLPs are stepped into where
sedetect.attach attaches.
"""

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from sedetect.ablation import expert_hidden
from sedetect.attach import run_inner
from sedetect.banks import Bank
from sedetect.errors import SedetectError
from sedetect.kernels.grouped import expert_linear
from sedetect.place import Place

# Children of a decoder layer that mix tokens, unless they hold experts.
ATTENTION_NAMES = ("self_attn", "attn", "attention", "linear_attn", "mamba", "conv", "mixer")


def decoder_layers(model: nn.Module, banks: list[Bank]) -> nn.ModuleList:
    """The layers of the decoder stack, dense ones too. Raises SedetectError for a model whose decoder has no experts."""
    paths = Counter(b.path.partition(f".{b.id.layer}.")[0] for b in banks if b.id.stack == "decoder")
    if not paths:
        raise SedetectError(f"{type(model).__name__}: no experts in its decoder; the residual stream there is observed")
    return model.get_submodule(paths.most_common(1)[0][0])


def attention_blocks(layer: nn.Module, path: str, banks: list[Bank]) -> list[nn.Module]:
    """The attention blocks (or state-space, convolution blocks) directly in a decoder layer at path."""
    with_experts = {bank.path.removeprefix(f"{path}.").partition(".")[0] for bank in banks if bank.routed}
    found = [child for name, child in layer.named_children() if name in ATTENTION_NAMES and name not in with_experts]
    return [block for child in found for block in (child if isinstance(child, nn.ModuleList) else [child])]


def attention_weights(output: object, length: int) -> torch.Tensor | None:
    """The attention probabilities (heads, L, L) in an attention block's output for one sequence; None without them."""
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if not isinstance(weights, torch.Tensor) or weights.dim() != 4 or weights.shape[2:] != (length, length):
        return None
    last = weights[0, :, -1].float()
    # A linear attention's state may have that shape; it is no distribution. With a learned sink the sum is below 1.
    return weights[0] if bool((last >= 0).all() and (last.sum(-1) < 1.01).all()) else None


def run_tokens(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """One forward over ids (B, L), without a cache, and without all logits but the last, where the model can do so.

    An encoder and its decoder read the same text.
    """
    known = inspect.signature(model.forward).parameters
    wanted = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    if "use_cache" in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):  # which passes it on
        wanted["use_cache"] = False
    if model.device.type != "meta":  # of offloaded embeddings, whose hooks move the ids
        ids = ids.to(model.device, non_blocking=model.device.type == "cuda")  # without waiting for the forward before
    if model.config.is_encoder_decoder:
        wanted["decoder_input_ids"] = ids
    model(input_ids=ids, **wanted)


def refuse_encoder_decoder(model: PreTrainedModel, what: str) -> None:
    """Raise SedetectError for a model whose decoder does not read the text alone."""
    if model.config.is_encoder_decoder:
        raise SedetectError(f"{type(model).__name__}: has an encoder and a decoder; {what} takes a decoder-only model")


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention that returns its weights, while the context lasts. A model that cannot switch keeps what it has."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in list(configs.values()):
        nested = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
        configs.update({id(c): c for c in nested if c is not None})
    known = [c for c in configs.values() if "_attn_implementation_internal" in vars(c)]
    before = [(config, config._attn_implementation_internal) for config in known]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for config, implementation in before:
            # Not by set_attn_implementation, which gives one name to every part of a composite model.
            config._attn_implementation_internal = implementation


class Written(NamedTuple):
    """What one expert adds to one element: routing weight x down_proj output. gate is the routing weight."""

    expert: Place
    gate: float
    amount: float


class ExpertCalls:
    """Remembers, layer by layer, what the experts of a one-sequence forward were called with.

    calls lets attach step into every bank; written() tells what each expert added to one element, by the module's
    own weights at that one token; forget() lets go of a layer.
    """

    def __init__(self, model: nn.Module, banks: list[Bank]):
        self.calls = [(bank, partial(self._experts if bank.routed else self._down, bank)) for bank in banks]
        self._model = model
        self._routed: dict[int, list[tuple[Bank, tuple[torch.Tensor, ...]]]] = defaultdict(list)
        self._single: dict[int, list[tuple[Bank, torch.Tensor]]] = defaultdict(list)

    def written(self, layer: int, shape: tuple[int, int], token: int, channel: int) -> Iterator[Written]:
        """Everything the token visited, of a residual stream of shape (L, H).

        A bank whose call did not have L rows regroups its tokens, one of another width than H does not write into the
        residual stream's channels: both are left out.
        """
        length, width = shape
        routed = [(bank, call) for bank, call in self._routed[layer] if len(call[0]) == length]
        for bank, (x, index, gates) in routed:
            for expert, gate in zip(index[token].tolist(), gates[token].tolist()):
                if 0 <= expert < bank.experts and gate and bank.hidden == width:
                    y = expert_output(bank.module, x[token : token + 1], expert)
                    if getattr(bank.module, "has_post_expert_norm", False):
                        y = bank.module.post_expert_norm(y)
                    yield Written(Place(*bank.id, expert), gate, gate * float(y[0, channel]))
        for bank, y in self._single[layer]:
            if y.shape == shape:
                gate = self._shared_gate(bank, routed[0][1][0][token]) if routed else 1.0
                yield Written(Place(*bank.id, bank.id.base), gate, gate * float(y[token, channel]))

    def forget(self, layer: int) -> None:
        self._routed.pop(layer, None)
        self._single.pop(layer, None)

    def _experts(
        self, bank: Bank, module: nn.Module, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor
    ) -> torch.Tensor:
        self._routed[bank.id.layer].append((bank, (x.reshape(-1, x.shape[-1]), index, gates)))
        return run_inner(module, x, index, gates)

    def _down(self, bank: Bank, original: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = original(x)
        self._single[bank.id.layer].append((bank, y.reshape(-1, y.shape[-1])))
        return y

    def _shared_gate(self, bank: Bank, x: torch.Tensor) -> float:
        """What the MLP block multiplies its shared expert by: sigmoid(shared_expert_gate(x)) in Qwen's models, else 1."""
        block = self._model.get_submodule(bank.path.rpartition(".")[0].rpartition(".")[0])
        gate = getattr(block, "shared_expert_gate", None)
        return 1.0 if gate is None or bank.id.base != "shared" else float(torch.sigmoid(gate(x)))


def expert_output(module: nn.Module, x: torch.Tensor, expert: int) -> torch.Tensor:
    """down_proj output of one expert as the layer stores it: x (N, H) -> (N, H), before post norm and routing weight."""
    bias = module.down_proj_bias[expert] if module.has_bias else None
    return expert_linear(expert_hidden(module, x, expert), module.down_proj[expert], bias, module.is_transposed)
