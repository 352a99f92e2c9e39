"""The decoder layers of a live model: their paths, their attention outputs, and running text through them.

Layers and the attention blocks directly in them may be hooked; experts and MLPs are stepped into where
attach.py attaches.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sedetect.errors import SedetectError
from sedetect.models.banks import Bank, layer_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Children of a decoder layer that mix tokens, unless they hold experts.
ATTENTION_NAMES = ("self_attn", "attn", "attention", "linear_attn", "mamba", "conv", "mixer")
_GATED = re.compile(r"output\S* \* (torch\.sigmoid\(|\w*gate)|sigmoid\(.*\) \* attn_output")


def decoder_layers(model: nn.Module, banks: list[Bank]) -> nn.ModuleList:
    """The layers of the decoder stack, dense ones too. Raises SedetectError where no expert is in the decoder."""
    paths = Counter(b.path.partition(f".{b.id.layer}.")[0] for b in banks if b.id.stack == "decoder")
    if not paths:
        raise SedetectError(f"{type(model).__name__}: no experts in its decoder; the residual stream there is observed")
    return layer_list(model, paths.most_common(1)[0][0])


def attention_blocks(layer: nn.Module, path: str, banks: list[Bank]) -> list[nn.Module]:
    """The attention blocks (or state-space, convolution blocks) directly in a decoder layer at path."""
    with_experts = {bank.path.removeprefix(f"{path}.").partition(".")[0] for bank in banks if bank.routed}
    found = [child for name, child in layer.named_children() if name in ATTENTION_NAMES and name not in with_experts]
    return [block for child in found for block in (child if isinstance(child, nn.ModuleList) else [child])]


def sink_substitutes(blocks: Iterable[nn.Module]) -> list[str]:
    """Mechanisms of attention blocks that replace attention sinks: "learned sinks", "output gates".

    Learned sinks are a parameter of that name in transformers; a gate is read off the source of the block's forward.
    """
    found = set()
    for block in blocks:
        if isinstance(getattr(block, "sinks", None), nn.Parameter):
            found.add("learned sinks")
        try:
            source = inspect.getsource(type(block).forward)
        except (OSError, TypeError):
            continue
        if _GATED.search(source):
            found.add("output gates")
    return sorted(found)


def attention_weights(output: object, length: int) -> torch.Tensor | None:
    """The attention probabilities (B, heads, L, L) in an attention block's output; None without them."""
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if not isinstance(weights, torch.Tensor) or weights.dim() != 4 or weights.shape[2:] != (length, length):
        return None
    last = weights[:, :, -1].float()
    # A linear attention's state may have that shape; it is not a distribution. With a learned sink the sum is below 1.
    return weights if bool(((last >= 0).all(-1) & (last.sum(-1) < 1.01)).all()) else None


def has_encoder(model: nn.Module) -> bool:
    """Whether a decoder has ids of its own beside those of an encoder; diffusion_gemma's config does not say so."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def run_tokens(model: "PreTrainedModel", ids: torch.Tensor) -> None:
    """run_inputs of text: one forward over ids (B, L). An encoder and its decoder read the same text."""
    inputs = {"input_ids": ids}
    if has_encoder(model):
        inputs["decoder_input_ids"] = ids
    run_inputs(model, inputs)


def run_inputs(model: "PreTrainedModel", inputs: dict[str, Any]) -> None:
    """One forward, without a cache, and without all logits but the last, where the model can do so.

    inputs: its arguments, pixels and sound in any type; what it does not name is dropped where it is no tensor.
    """
    known = inspect.signature(model.forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())  # which passes it on
    wanted: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    if "use_cache" in known or anything:
        wanted["use_cache"] = False
    for name, given in inputs.items():
        if not isinstance(given, torch.Tensor):
            if name in known:  # how many crops each image has
                wanted[name] = given
            continue
        if not (name in known or anything):
            continue
        if model.device.type != "meta":  # of offloaded embeddings, whose hooks move the ids
            # without waiting for the forward before
            given = given.to(model.device, non_blocking=model.device.type == "cuda")
        wanted[name] = given.to(model.dtype) if given.is_floating_point() else given
    text = model.config.get_text_config()
    unpadded = "SequenceClassification" in type(model).__name__ and text.pad_token_id is None
    if unpadded:
        text.pad_token_id = -1  # it finds the last token by it, and takes no batch without
    try:
        model(**wanted)
    finally:
        if unpadded:
            text.pad_token_id = None


def refuse_encoder_decoder(model: "PreTrainedModel", what: str) -> None:
    """Raise SedetectError for a model whose decoder does not read the text alone."""
    if has_encoder(model):
        raise SedetectError(f"{type(model).__name__}: has an encoder and a decoder; {what} takes a decoder-only model")


def refuse_without_logits(model: "PreTrainedModel", what: str) -> None:
    """Raise SedetectError for a model that gives no logits of next tokens."""
    name = type(model).__name__
    if model.base_model is model or re.search("Classification|QuestionAnswering", name):
        raise SedetectError(f"{name}: has no output over the vocabulary; {what} takes a language model (lm_head)")


@contextmanager
def eager_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Context manager: attention that returns its weights. A model that cannot switch keeps its implementation."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
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
