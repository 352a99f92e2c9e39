"""One state of a model on a fixed text, in one forward per batch: its experts, residual stream, sinks and loss.

The model is restored: the mode of each module, random state, gradients, attention implementation, and compiled graphs.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from sedetect.calibration.windows import Windows, batches, calibration_windows, prefix_ids
from sedetect.errors import SedetectError
from sedetect.experiments.evaluation import predictions, window_losses
from sedetect.models.banks import Bank
from sedetect.models.identity import join_digest, model_digest, model_id
from sedetect.models.layers import (
    attention_blocks,
    attention_weights,
    decoder_layers,
    eager_attention,
    refuse_encoder_decoder,
    refuse_without_logits,
)
from sedetect.profiling.profiler import SourcesProfile
from sedetect.stats.model import ModelStats, digest
from sedetect.stats.residual import sink_queries, uniform_sinks
from sedetect.training.series import State

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sedetect.calibration.records import Document
    from sedetect.calibration.windows import Text


@dataclass(frozen=True)
class FixedText:
    """The windows (N, L) that every state of a series is measured on.

    prefix: the tokenizer's, as ids; batch_size: windows per forward.
    """

    windows: Windows
    prefix: list[int]
    batch_size: int


def fixed_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: "str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Document]] | None",
    text: "Text",
) -> FixedText:
    """The windows of all domains as one source, in the order of the domains."""
    domains = calibration_windows(model, tokenizer, texts, text).domains
    ids = torch.cat([windows.ids for windows in domains.values()])
    sources = [[windows.source, windows.numbers.tolist()] for windows in domains.values()]
    info = {"domain": ", ".join(domains), "window": ids.shape[1], "chat_template": text.chat_template}
    windows = Windows(ids, torch.arange(len(ids)), digest(str(sources)), info)
    return FixedText(windows, prefix_ids(tokenizer), text.batch_size)


class StateMeter:
    """Measures states of a model on a text, in whatever mode the model is.

    Raises SedetectError for a model that gives no logits of next tokens, and for one with an encoder.
    """

    def __init__(self, model: "PreTrainedModel", banks: list[Bank], text: FixedText):
        refuse_encoder_decoder(model, "a series")
        refuse_without_logits(model, "a series")
        self.model, self._text, self._unchecked = model, text, join_digest(model_id(model), None)
        self._watch = _Watch(model, banks, len(text.prefix))
        with undisturbed(model):
            self._prof = SourcesProfile(model, banks, self._unchecked, prefix=next(iter(text.prefix), None))

    def measure(self, step: int, name: str = "", *, checked: bool = True) -> tuple[State, ModelStats]:
        """step, name: as State has them. checked: compute the weights' checksum, which on a GPU takes most of the
        time.
        """
        start = time.perf_counter()
        windows, prefix = self._text.windows, len(self._text.prefix)
        loss = 0.0
        with undisturbed(self.model), eager_attention(self.model), self._watch, self._prof:
            self._prof.begin(windows.source, windows.info, model_digest(self.model) if checked else self._unchecked)
            for ids, numbers in batches(windows, self._text.batch_size):
                self._prof.batch(sequence_ids=numbers)
                self._watch.length = ids.shape[1]
                loss += sum(window_losses(self.model, ids, prefix))
            stats = self._prof.take()
        loss /= len(windows.ids) * predictions(windows.ids, prefix)
        uniform = uniform_sinks(prefix, windows.ids.shape[1])
        known = (step, name, windows.source, stats.header.digest, uniform, loss)
        return State(*known, *self._watch.result(), time.perf_counter() - start), stats


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context manager: the model in eval mode, without compiled graphs; restores its modes and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(d for d in devices if d is not None)))
        if "torch._dynamo" in sys.modules:  # without it nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


class _Watch:
    """Context manager: hooks that keep the largest |x| after each layer, and the attention on the first token.

    length: of the windows under way.
    """

    def __init__(self, model: "PreTrainedModel", banks: list[Bank], prefix: int):
        paths = {id(module): path for path, module in model.named_modules()}
        self._layers = decoder_layers(model, banks)
        self._blocks = [attention_blocks(layer, paths[id(layer)], banks) for layer in self._layers]
        self._prefix = prefix
        self.length = 0

    def __enter__(self) -> Self:
        self._peaks: list[list[torch.Tensor]] = [[] for _ in self._layers]  # () each
        self._sinks: list[list[torch.Tensor]] = [[] for _ in self._layers]  # (B, heads) each
        with ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                for block in self._blocks[number]:
                    stack.callback(block.register_forward_hook(partial(self._attention, number)).remove)
                stack.callback(layer.register_forward_hook(partial(self._layer, number)).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def _attention(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        weights = attention_weights(output, self.length)
        if weights is not None:
            queries = sink_queries(self._prefix, self.length)
            self._sinks[number].append(weights[:, :, queries.start :, 0].float().mean(2))

    def _layer(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        self._peaks[number].append(torch.nan_to_num(out.float(), 0, 0, 0).abs().amax())

    def result(self) -> tuple[float | None, float | None, float]:
        """sink_mean, best_head and residual_max of State."""
        never = next((number for number, peaks in enumerate(self._peaks) if not peaks), None)
        if never is not None:
            raise SedetectError(f"layer {never} never ran; the residual stream cannot be observed")
        peaks = torch.stack([torch.stack(peaks).amax().cpu() for peaks in self._peaks]).tolist()
        heads = [torch.cat(sinks).mean(0).cpu() for sinks in self._sinks if sinks]  # (heads,) per layer
        largest = max(peaks[1:-1] or peaks)
        if not heads:
            return None, None, largest
        mean = sum(float(layer.double().mean()) for layer in heads) / len(heads)
        return mean, max(float(layer.max()) for layer in heads), largest
