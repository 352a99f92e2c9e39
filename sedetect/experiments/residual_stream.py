"""The residual stream of a model, layer by layer: where massive activations form, which experts write them, which
layers carry them, and the strength of the attention sinks.

Decoder layers, and the attention blocks directly in them, are observed by forward hooks; experts and MLPs are stepped
into where sedetect.models.attach attaches. Attention weights exist only under eager attention, which is switched on for
the run. x is the output of a decoder layer before any final norm, one (L, H) per sequence; every norm, threshold and
median is in the units of x.

Massive activation: |x| > 100 and at least min_ratio times the median |x| of that layer in that sequence. Sun et al.
(arXiv 2402.17762) use about 1000 times; tests/data/tiny-moe reaches 574 after the layer that writes it, 242 before
the last (the median grows, the activation does not), and 20 without its super expert. Hence the default of 100.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from sedetect.calibration.windows import Windows
from sedetect.errors import Argument, SedetectError
from sedetect.experiments.expert_calls import ExpertCalls, Written
from sedetect.models.attach import attach
from sedetect.models.banks import check_eval, find_banks
from sedetect.models.identity import model_digest, model_name
from sedetect.models.layers import (
    attention_blocks,
    attention_weights,
    decoder_layers,
    eager_attention,
    refuse_encoder_decoder,
    run_tokens,
    sink_substitutes,
)
from sedetect.models.wrappers import unwrap
from sedetect.stats.residual import Formation, LayerResidual, Residual, Writer, sink_decay, sink_queries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Formation", "LayerResidual", "Residual", "Writer", "observe_residual", "sink_decay"]

MIN_VALUE = 100.0
MIN_RATIO = 100.0
_TOP_WRITERS = 3
_PER_LAYER = 16  # formations kept of one layer and sequence, the largest


@torch.no_grad()
def observe_residual(
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    *,
    prefix: int,
    sequences: int = 8,
    min_value: float = MIN_VALUE,
    min_ratio: float = MIN_RATIO,
    digest: str | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Residual:
    """Run up to this many sequences, one at a time, and record the residual stream and the attention sinks.

    Args:
        model: a Hugging Face MoE model in eval mode, possibly under sedetect.experiments.ablation.ablate: an expert
            that is switched off writes nothing (a single weight that is off still counts in its expert's share).
            Attention is eager during the run; hooks and attention implementations are restored on exit, also after an
            exception.
        domains: as calibration_windows gives them; the first windows of each, in turn, are observed.
        prefix: number of tokens of each window that are the tokenizer's prefix.
        sequences: largest number of windows in all.
        digest: the model's, if known; that of the unchanged model under an ablation.
        progress: called with the number of tokens after every sequence.
    Raises:
        SedetectError: for a model in training mode, with an encoder, without a decoder with experts, or with layers
            that do not give one residual stream.
    """
    if sequences < 1:
        raise SedetectError(Argument("sequences"), f" {sequences}: must be at least 1")
    if min_ratio < 0 or min_value < 0:
        raise SedetectError(Argument("min_ratio"), f" {min_ratio:g}, least value {min_value:g}: must be at least 0")
    model = unwrap(model)
    check_eval(model)
    refuse_encoder_decoder(model, "the residual stream")
    chosen = _spread(domains, sequences)
    with _Observer(model, prefix, min_value, min_ratio) as observer:
        for domain, number, ids in chosen:
            observer.begin(domain, number, ids)
            run_tokens(model, ids[None])
            progress(len(ids))
    counts = {domain: sum(d == domain for d, *_ in chosen) for domain in domains}
    layers = [seen.result(number) for number, seen in enumerate(observer.layers)]
    return Residual(
        model=model_name(model),
        digest=digest or model_digest(model),
        sequences={domain: count for domain, count in counts.items() if count},
        seq_len=max(len(ids) for *_, ids in chosen),
        prefix=prefix,
        min_value=min_value,
        min_ratio=min_ratio,
        layers=layers,
        formations=observer.formations,
        found=observer.found,
        notes=_notes(layers, observer.formations, observer.found),
        instead=sink_substitutes(chain.from_iterable(observer.blocks)),
    )


def _notes(layers: list[LayerResidual], formations: list[Formation], found: int) -> list[str]:
    notes = []
    blind = [layer.layer for layer in layers if layer.sinks is None]
    if blind:
        notes.append(f"no attention weights, and so no sinks, in layers {', '.join(map(str, blind))}")
    if any(layer.nonfinite for layer in layers):
        first = next(layer.layer for layer in layers if layer.nonfinite)
        notes.append(f"NaN or Inf in the residual stream, first after layer {first}; counted as 0")
    if found > len(formations):
        notes.append(f"{found} formations; of each layer and sequence the {_PER_LAYER} largest are kept")
    if any(abs(one.explained - 1) > 0.05 for one in formations):
        notes.append(
            "attention and experts do not add up to every jump (norms or factors after them): shares are rough"
        )
    return notes


def _spread(domains: dict[str, Windows], sequences: int) -> list[tuple[str, int, torch.Tensor]]:
    """(domain, number, ids) of the first windows of each domain in turn, sequences in all, domain by domain."""
    turns = zip_longest(*([(d, int(n), ids) for n, ids in zip(w.numbers, w.ids)] for d, w in domains.items()))
    taken = [window for turn in turns for window in turn if window is not None][:sequences]
    if not taken:
        raise SedetectError("no windows to observe; give text that fills at least one")
    return sorted(taken, key=lambda window: list(domains).index(window[0]))


@dataclass
class Seen:
    """One layer while it is observed."""

    best: LayerResidual | None = None
    medians: list[float] = field(default_factory=list)
    massive: int = 0
    nonfinite: int = 0
    sinks: list[torch.Tensor] = field(default_factory=list)  # (heads,) per sequence

    def result(self, number: int) -> LayerResidual:
        if self.best is None:
            raise SedetectError(f"layer {number} never ran; the residual stream cannot be observed")
        median = sum(self.medians) / len(self.medians)
        ratio = self.best.maximum / median if median else math.inf
        return replace(
            self.best,
            median=median,
            ratio=ratio if math.isfinite(ratio) else None,
            massive=self.massive,
            nonfinite=self.nonfinite,
            sinks=torch.stack(self.sinks).mean(0).tolist() if self.sinks else None,
        )


class SequenceWatch:
    """The residual stream over a series of sequences, layer by layer: begin(), then see() for every layer.

    layers, formations: what was seen of all sequences; several watches may add to the same. found counts all
    formations, kept or not. written: as ExpertCalls.written, of rows of the sequence.
    """

    def __init__(
        self,
        layers: list[Seen],
        formations: list[Formation],
        written: Callable[[int, tuple[int, int], int, int], Iterator[Written]],
        min_value: float = MIN_VALUE,
        min_ratio: float = MIN_RATIO,
    ):
        self.layers, self.formations, self.found = layers, formations, 0
        self._written, self._min_value, self._min_ratio = written, min_value, min_ratio

    def begin(self, domain: str, number: int, ids: torch.Tensor) -> None:
        self._domain, self._sequence, self.ids = domain, number, ids.tolist()
        self._open: list[int] = []  # indices of formations that every layer so far has carried
        self._standing: list[int] = []  # and of those that no layer has taken half of away
        self.attended: list[torch.Tensor] = []  # outputs (L, H) of the attention blocks of the layer under way

    def see(self, number: int, given: torch.Tensor, out: torch.Tensor) -> None:
        """Record that layer number mapped its input (L, H) to out (L, H)."""
        before, after = (torch.nan_to_num(x.float(), 0, 0, 0) for x in (given, out))
        size = after.abs()
        median = float(size.median())
        massive = (size > self._min_value) & (size >= self._min_ratio * median)
        self._record(number, size, median, massive, int((~out.isfinite()).sum()))
        for f in list(self._open):
            kept = self.formations[f]
            if massive[kept.position, kept.channel]:
                self.formations[f] = replace(kept, carried_to=number)
            else:
                self.formations[f] = replace(kept, vanishes=number)
                self._open.remove(f)
        for f in list(self._standing):
            kept = self.formations[f]
            old, new = float(before[kept.position, kept.channel]), float(after[kept.position, kept.channel])
            if abs(new) <= abs(old) / 2:
                undoer = self._undoer(number, kept, old, (len(after), after.shape[1]))
                self.formations[f] = replace(kept, undone_in=number, undone_by=undoer)
                self._standing.remove(f)
        jump = after - before
        formed = massive & (before.abs() < size / 2)
        added = (jump.abs() > self._min_value) & (jump.abs() >= self._min_ratio * median) & (size > before.abs())
        places = (formed | massive & added).nonzero()
        self.found += len(places)
        largest = size[places[:, 0], places[:, 1]].argsort(descending=True, stable=True)[:_PER_LAYER]
        for token, channel in places[largest].tolist():
            kind = "formed" if formed[token, channel] else "enlarged"
            self._open.append(len(self.formations))
            self._standing.append(len(self.formations))
            self.formations.append(self._formation(kind, number, token, channel, before, after))
        self.attended.clear()

    def _undoer(self, number: int, kept: Formation, carried: float, shape: tuple[int, int]) -> Writer | None:
        """The expert of a layer that writes most against the carried activation."""
        written = list(self._written(number, shape, kept.position, kept.channel))
        against = [Writer(w.expert, -w.amount / carried, w.gate) for w in written if w.amount * carried < 0]
        return max(against, key=lambda writer: writer.share, default=None)

    def _record(self, number: int, size: torch.Tensor, median: float, massive: torch.Tensor, nonfinite: int) -> None:
        seen = self.layers[number]
        seen.medians.append(median)
        seen.massive += int(massive.sum())
        seen.nonfinite += nonfinite
        token, channel = divmod(int(size.argmax()), size.shape[1])
        maximum = float(size[token, channel])
        if seen.best is None or maximum > seen.best.maximum:
            place = (channel, token, self.ids[token], self._sequence, self._domain)
            seen.best = LayerResidual(number, maximum, *place, median, None, 0, 0, None)

    def _formation(
        self, kind: str, number: int, token: int, channel: int, before: torch.Tensor, after: torch.Tensor
    ) -> Formation:
        old, new = float(before[token, channel]), float(after[token, channel])
        jump = new - old
        written = list(self._written(number, (len(after), after.shape[1]), token, channel))
        writers = [Writer(w.expert, w.amount / jump, w.gate) for w in written]
        attention = sum(float(a[token, channel]) for a in self.attended) / jump if self.attended else None
        return Formation(
            kind=kind,
            layer=number,
            channel=channel,
            domain=self._domain,
            sequence=self._sequence,
            position=token,
            token_id=self.ids[token],
            before=old,
            after=new,
            jump=jump,
            attention=attention,
            writers=sorted(writers, key=lambda w: -abs(w.share))[:_TOP_WRITERS],
            explained=(attention or 0.0) + sum(w.share for w in writers),
            carried_to=number,
            vanishes=None,
        )


class _Observer(SequenceWatch):
    """Context manager: the hooks of a run, and what they saw. begin() before each sequence."""

    def __init__(self, model: "PreTrainedModel", prefix: int, min_value: float, min_ratio: float):
        self.prefix = prefix
        self.model = model
        self.banks = [bank for bank in find_banks(self.model) if bank.id.stack == "decoder"]
        self.modules = decoder_layers(self.model, self.banks)
        self.experts = ExpertCalls(self.model, self.banks)
        paths = {id(module): path for path, module in self.model.named_modules()}
        self.blocks = [attention_blocks(layer, paths[id(layer)], self.banks) for layer in self.modules]
        super().__init__([Seen() for _ in self.modules], [], self.experts.written, min_value, min_ratio)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(eager_attention(self.model))
            stack.callback(attach(self.model, self.experts.calls, innermost=True))
            for number, layer in enumerate(self.modules):
                for block in self.blocks[number]:
                    stack.callback(block.register_forward_hook(partial(self._attention, number)).remove)
                stack.callback(layer.register_forward_hook(partial(self._layer, number), with_kwargs=True).remove)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def _attention(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        length = len(self.ids)
        out = output[0] if isinstance(output, tuple) else output
        self.attended.append(out.reshape(length, -1))
        weights = attention_weights(output, length)
        if weights is not None:
            queries = sink_queries(self.prefix, length)
            self.layers[number].sinks.append(weights[0, :, queries.start :, 0].double().mean(1).cpu())

    def _layer(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        out = output[0] if isinstance(output, tuple) else output
        given: Any = args[0] if args else kwargs.get("hidden_states")
        shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in (given, out)]
        if shapes[0] != shapes[1] or len(shapes[0]) != 3:
            raise SedetectError(
                f"layer {number} ({type(module).__name__}): maps {shapes[0]} to {shapes[1]}, which is not one residual "
                "stream; this architecture cannot be observed"
            )
        self.see(number, given[0], out[0])
        self.experts.forget(number)
