"""locate: a walk of one-token sequences through a checkpoint, reading only the weights that these tokens use.

Super experts write their outlier on the first token of a sequence, and in a causal model the first token's rows do not
depend on what follows. So one token, run by the model's own modules, shows them, and takes of each layer what is not
experts and the few experts that the token visits:

    layer 0   read what is not experts -> run to the router -> read the chosen experts -> run on -> measure, free
    layer 1     read what is not experts, meanwhile
"""

import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from sedetect.calibration.windows import prefix_ids
from sedetect.checkpoints.files import checked_path
from sedetect.checkpoints.options import Loading
from sedetect.checkpoints.source import Source, open_source
from sedetect.errors import Argument, SedetectError, check_type
from sedetect.experiments.expert_calls import ExpertCalls, Written
from sedetect.experiments.residual_stream import MIN_VALUE as MASSIVE_VALUE
from sedetect.experiments.residual_stream import Seen, SequenceWatch
from sedetect.experiments.super_weights import products_of
from sedetect.models.attach import attach
from sedetect.models.banks import Bank, find_banks
from sedetect.models.chosen import ChosenWeights
from sedetect.models.experts import expert_output
from sedetect.models.identity import join_digest, model_id, model_name
from sedetect.models.layers import attention_blocks, eager_attention, has_encoder, run_tokens
from sedetect.models.loading import load_tokenizer
from sedetect.models.measure import Measuring
from sedetect.models.streamed import StreamedModel, open_streamed
from sedetect.profiling.estimate import layers_of_rule, top_k_of
from sedetect.profiling.located import Located, LocatedExpert, blind_spots
from sedetect.profiling.profiler import SourcesProfile
from sedetect.profiling.streaming import check_layers, ending_early, layer_arguments, only_layer
from sedetect.ranking.evidence import FRACTION, MIN_VALUE, BankView, is_candidate, layer_medians, stands_out
from sedetect.stats.bank import BankStats
from sedetect.stats.model import ModelStats, digest, join_banks
from sedetect.stats.note import sorted_notes
from sedetect.stats.place import BankId, Place, place_of
from sedetect.stats.residual import Formation, Residual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a massive activation, over the median |x| of its own token: the writer raises that as well, so half of what a
# profile asks for, which takes the median of all tokens. docs/locate.md has the margins of trained checkpoints.
MASSIVE_RATIO = 50.0
_DOMAIN = "first tokens"
# Beginnings of texts: letters, digits, a newline, Chinese, code.
_BEGINNINGS = (
    "The",
    "I",
    "1",
    "\n",
    "中",
    "def",
    "#",
    "A",
    "a",
    "import",
    "我",
    "0",
    "In",
    "<",
    "What",
    "这",
    "{",
    '"',
)


class Reading(NamedTuple):
    """Bytes of tensors that a walk reads: exactly what is not experts, and of experts at most."""

    common: int
    experts: int
    layers: int
    of: int


def locate(
    model: str | os.PathLike[str],
    *,
    first_tokens: int | Sequence[int | str] = 0,
    text: str | None = None,
    all_layers: bool = False,
    cache: str | os.PathLike[str] | None = None,
    loading: Loading = Loading(),
    told: Callable[[Reading], None] = lambda reading: None,
    found: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int, int], None] = lambda layer, done, total: None,
) -> Located:
    """Candidates for super experts, from the first token of a text alone, reading what that token uses.

    Args:
        model: a checkpoint folder, a hub name, or the http(s) address of a folder with the checkpoint's files.
        first_tokens: other tokens that texts begin with, each a sequence of its own: so many, or these (ids, or texts
            of one token). The first sequence is always what the tokenizer puts before a text.
        text: a short prompt to walk instead, after what the tokenizer puts before it.
        all_layers: go on behind the layers of the published rule, the first 75%.
        cache: a folder that keeps what is read of a remote checkpoint; a second run reads it there.
        loading: as in profile_model; the device is always the CPU.
        told: called once, before a weight is read, with the bytes to read.
        found: called with a line on each expert that stands out, as soon as its layer has run.
        progress: called with (layer, bytes read, bytes to read at most) as bytes arrive.
    Raises:
        SedetectError: before a layer is read, for what find_banks and streaming refuse, for models whose first token
            depends on what follows, and for tokens that are none.
    """
    checked_path(model, "a checkpoint, a hub name or an address")
    check_type("loading", loading, Loading)
    if text is not None:
        check_type("text", text, str)
    if isinstance(first_tokens, str) or not isinstance(first_tokens, (int, Sequence)):
        raise SedetectError(
            Argument("first_tokens"), f" {first_tokens!r}: is not a list of tokens; give a list or a number"
        )
    if loading.device not in (None, "cpu"):
        raise SedetectError(Argument("device"), f" {loading.device}: locate computes on the CPU; leave it out")
    if text is not None and first_tokens:
        raise SedetectError(Argument("text"), ": does not go with ", Argument("first_tokens"), "; leave one out")
    start = time.perf_counter()
    with open_source(model, revision=loading.revision, cache=cache, code=loading.trust_remote_code) as source:
        tokenizer = load_tokenizer(source.folder, trust_remote_code=loading.trust_remote_code)
        sequences = _sequences(tokenizer, first_tokens, text)
        with warnings.catch_warnings(action="ignore"):  # they are notes of the result
            streamed = open_streamed(source.folder, replace(loading, device="cpu", revision=None), outside=False)
        streamed.notes = [replace(note, text=source.named(note.text)) for note in streamed.notes]
        _refuse(streamed)
        rows = streamed.model.get_input_embeddings().get_parameter("weight").shape[0]
        if (largest := int(sequences.max())) >= rows:
            raise SedetectError(
                f"token {largest}: the model's embedding has {rows} rows; use the tokenizer that was saved with it"
            )
        walk = _Walk(streamed, source, sequences, all_layers, tokenizer)
        with closing(walk.weights), torch.no_grad():
            walk.check()
            told(walk.reading)
            walk.run(found, progress)
        return walk.result(str(model), text is not None, time.perf_counter() - start)


def _sequences(
    tokenizer: "PreTrainedTokenizerBase", first_tokens: int | Sequence[int | str], text: str | None
) -> torch.Tensor:
    """(N, L) token ids: N sequences of one token, or the text alone."""
    before = prefix_ids(tokenizer)
    if not before and tokenizer.chat_template:
        turn = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        before = _ids_of(tokenizer, str(turn))[:1]
    if text is not None:
        return torch.tensor([[*before, *_ids_of(tokenizer, text)]])
    if isinstance(first_tokens, int):
        if first_tokens < 0:
            raise SedetectError(Argument("first_tokens"), f" {first_tokens}: must be at least 0")
        known = [ids[0] for ids in (_ids_of(tokenizer, one) for one in _BEGINNINGS) if ids]
        others = [one for one in dict.fromkeys(known) if one not in before[:1]][:first_tokens]
        if len(others) < first_tokens:
            raise SedetectError(
                Argument("first_tokens"), f" {first_tokens}: {len(others)} are known; give a list of tokens instead"
            )
    else:
        others = [one if isinstance(one, int) else _single(tokenizer, one) for one in first_tokens]
    chosen = list(dict.fromkeys([*before[:1], *others]))
    if not chosen:
        raise SedetectError(
            f"tokenizer {tokenizer.name_or_path}: puts nothing before a text and has no chat template; give ",
            Argument("first_tokens"),
            ", tokens that texts begin with",
        )
    return torch.tensor(chosen)[:, None]


def _ids_of(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _single(tokenizer: "PreTrainedTokenizerBase", text: str) -> int:
    ids = _ids_of(tokenizer, text)
    if len(ids) != 1:
        raise SedetectError(Argument("first_tokens"), f" {text!r}: is {len(ids)} tokens ({ids}); give one, or its id")
    return ids[0]


def _refuse(streamed: StreamedModel) -> None:
    """Raise SedetectError for a model whose first token alone differs from the same token in a text."""
    model = streamed.model
    name, config = type(model).__name__, model.config.get_text_config()
    if has_encoder(model):
        raise SedetectError(
            f"{name}: has an encoder, which reads the whole text; profile it instead (sedetect profile)"
        )
    if (capacity := next((key for key in vars(config) if "capacity" in key), None)) is not None:
        raise SedetectError(
            f"{name}: its experts have a capacity ({capacity}), so that a token's experts depend on the others; "
            "profile it instead (sedetect profile)"
        )


def _not_causal(name: str, where: str) -> SedetectError:
    return SedetectError(
        f"{name}: attention is not causal ({where}), so that the first token depends on what follows; profile it "
        "instead (sedetect profile)"
    )


def _entering(kept: torch.Tensor | None, given: torch.Tensor) -> torch.Tensor:
    """The input of a layer: the output of the one before, or for the first, the input from the model."""
    return given if kept is None else kept


class _Walk:
    """One walk: check(), then run(), then result()."""

    def __init__(
        self,
        streamed: StreamedModel,
        source: Source,
        sequences: torch.Tensor,
        all_layers: bool,
        tokenizer: "PreTrainedTokenizerBase",
    ):
        self.streamed, self.source, self.ids, self.tokenizer = streamed, source, sequences, tokenizer
        self.model, self.banks = streamed.model, find_banks(streamed.model)
        self.of = len(streamed.layers)
        self.limit = layers_of_rule(self.of)
        self.count = self.of if all_layers else self.limit
        self.weights = ChosenWeights(streamed, self.banks, source)
        self.experts = ExpertCalls(self.model, self.banks)
        self.inputs: dict[BankId, tuple[nn.Module, torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self.seen, self.formations = [Seen() for _ in range(self.count)], list[Formation]()
        total, length = sequences.numel(), sequences.shape[1]
        self.watches = [
            SequenceWatch(
                self.seen, self.formations, partial(self._written, n * length, total), min_ratio=MASSIVE_RATIO
            )
            for n in range(len(sequences))
        ]
        for number, watch in enumerate(self.watches):
            watch.begin(_DOMAIN, number, sequences[number])
        self.unobserved: str | None = None  # why the residual stream is not
        self.values: dict[int, list[float]] = {}  # by layer, the largest |y| of every expert that ran
        self.outstanding: list[LocatedExpert] = []  # as far as their layers tell, while they are loaded
        self.parts: list[ModelStats] = []

    @property
    def reading(self) -> Reading:
        chosen = (top_k_of(self.model.config.get_text_config()) or 8) * self.ids.numel()
        return Reading(*self.weights.bytes_of(self.count, chosen), self.count, self.of)

    def check(self) -> None:
        """Raise SedetectError where layers cannot be run one after another, or the first token sees the next."""
        self.weights.load_rest()
        trial = self.ids[:1] if self.ids.shape[1] > 1 else self.ids[:1].repeat(1, 2)
        remedy = ("profile it whole instead (", Argument("stream", False), ")")
        with ending_early(self.model):
            self.wrap = check_layers(self.streamed, trial, remedy)
        within = tuple(f"{path}." for path in self.streamed.paths)
        for path, module in self.model.named_modules():
            # Without projections it attends, in Inkling 2, to what several layers left of the same token.
            projects = any(isinstance(child, nn.Linear) for child in module.children())
            if path.startswith(within) and projects and getattr(module, "is_causal", True) is False:
                raise _not_causal(type(self.model).__name__, path)
        with eager_attention(self.model):  # which is given a mask
            arguments = layer_arguments(self.streamed, trial, self.wrap)
        for layer, named in enumerate(arguments):
            for name, value in named:
                mask = isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[-2:] == trial.shape[1:] * 2
                if mask and bool((value[..., 0, 1] if value.dtype == torch.bool else value[..., 0, 1] == 0).any()):
                    raise _not_causal(type(self.model).__name__, f"{name} of layer {layer}")

    def run(self, found: Callable[[str], None], progress: Callable[[int, int, int], None]) -> None:
        known, limit = model_id(self.model), sum(self.reading[:2])
        source_id = digest(json.dumps([_DOMAIN, self.ids.tolist()]))
        info = {"domain": _DOMAIN, "corpus": _DOMAIN, "window": self.ids.shape[1], "chat_template": False}
        calls = [(bank, partial(self._step_in, bank, call)) for bank, call in self.experts.calls]
        hidden: torch.Tensor | None = None
        layer, before = 0, self.source.meter.total
        self.source.meter.told = lambda _: progress(layer, self.source.meter.total - before, limit)

        def keep(into: torch.Tensor, left: torch.Tensor) -> None:
            nonlocal hidden
            hidden = left
            self._observe(layer, into, left)

        with ending_early(self.model), ThreadPoolExecutor(1, "weights") as reader:
            coming = reader.submit(self.weights.read, 0)
            for layer in range(self.count):
                tensors = coming.result()
                if layer + 1 < self.count:
                    coming = reader.submit(self.weights.read, layer + 1)
                self.weights.load(layer, tensors)
                del tensors
                path = f"{self.streamed.paths[layer]}."
                here = [bank for bank in self.banks if bank.path.startswith(path)]
                inside = [(bank, call) for bank, call in calls if bank in here]
                entering = partial(_entering, hidden)
                with SourcesProfile(self.model, here, join_digest(known, None), measuring=Measuring()) as prof:
                    prof.begin(source_id, info)
                    prof.batch(sequence_ids=torch.arange(len(self.ids)))
                    undo = attach(self.model, inside)
                    hooks = self._watch_attention(layer)
                    try:
                        with only_layer(self.streamed.layers, layer, self.wrap, entering, keep):
                            run_tokens(self.model, self.ids)
                    finally:
                        undo()
                        for hook in hooks:
                            hook.remove()
                    self.parts.append(prof.take())
                for bank in here:
                    for one in self._outstanding(bank, self.parts[-1].banks[bank.id]):
                        self.outstanding.append(one)
                        if one.value >= MIN_VALUE:
                            found(self._line(one))
                self.inputs.clear()
                self.experts.forget(layer)
                self.weights.free(layer)

    def _step_in(self, bank: Bank, call: Callable[..., torch.Tensor], module: nn.Module, *given: torch.Tensor) -> Any:
        """Load the experts that a bank is about to run, keep what it is given, and let it run."""
        x, *routing = given
        if bank.routed:
            self.weights.choose(self._layer_of(bank), bank.id, routing[0].unique().tolist())
        self.inputs[bank.id] = (module, x.reshape(-1, x.shape[-1]), tuple(routing))
        return call(module, *given)

    def _layer_of(self, bank: Bank) -> int:
        return next(n for n, path in enumerate(self.streamed.paths) if bank.path.startswith(f"{path}."))

    def _watch_attention(self, layer: int) -> list[Any]:
        def heard(module: nn.Module, args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            if isinstance(out, torch.Tensor) and out.shape[:-1].numel() == self.ids.numel():
                parts = out.reshape(*self.ids.shape, -1)
                for watch, part in zip(self.watches, parts):
                    watch.attended.append(part)

        blocks = attention_blocks(self.streamed.layers[layer], self.streamed.paths[layer], self.banks)
        return [block.register_forward_hook(heard) for block in blocks]

    def _observe(self, layer: int, into: torch.Tensor, left: torch.Tensor) -> None:
        if left.dim() != 3 or into.shape != left.shape:
            self.unobserved = self.unobserved or (
                f"layer {layer} maps {tuple(into.shape)} to {tuple(left.shape)}, which is not one residual stream: "
                "what later layers carry is not known"
            )
            return
        if self.unobserved is None:
            for watch, before, after in zip(self.watches, into, left):
                watch.see(layer, before, after)

    def _written(
        self, first: int, total: int, layer: int, shape: tuple[int, int], token: int, channel: int
    ) -> Iterator[Written]:
        """ExpertCalls.written of a sequence whose first row is number first of so many."""
        return self.experts.written(layer, (total, shape[1]), first + token, channel)

    def _outstanding(self, bank: Bank, state: BankStats) -> Iterator[LocatedExpert]:
        """The experts of a bank that may be candidates by what all layers so far show, with what is inside them."""
        if bank.id.base == "dense":
            return
        values = state.out_max
        ran = [e for e in range(bank.experts) if state.rows[e] and torch.isfinite(values[e])]
        self.values.setdefault(bank.id.layer, []).extend(float(values[e]) for e in ran)
        for e in ran:
            peak = state.peak_of(e)
            assert peak is not None  # it saw a row
            one = LocatedExpert(
                *bank.id,
                place_of(bank.id, e, bank.experts).expert,
                value=float(values[e]),
                sign=peak.sign,
                channel=peak.channel,
                token_id=peak.token_id,
                position=peak.position,
                gate=peak.gate,
                ratio=None,
                fires=(),
                signature=None,
                carried=None,
                weight=None,
                share=None,
            )
            writes = any(f.layer == one.layer and f.share_of(one.place) >= 0.5 for f in self.formations)
            if self._judged(one, True if writes else None) is not None:
                yield self._look_inside(bank, one)

    def _judged(self, one: LocatedExpert, carried: bool | None) -> LocatedExpert | None:
        """The expert as a candidate by all layers so far, with ratio and signature; None if it is not one."""
        stats = next(part for part in self.parts if one.bank in part.banks)
        views = {key: BankView(key, state, stats.header, "all") for key, state in stats.banks.items()}
        view = views[one.bank]
        first = view if one.bank.routed else views.get(one.bank._replace(kind="routed"), view)
        of_rule = [value for layer in self.values if layer < self.limit for value in self.values[layer]]
        large = max(of_rule or self._all_values()) / (1 / FRACTION)
        _, signature = view.signature(one.number, first, large)
        median, of_layer = statistics.median(self._all_values()), layer_medians(views)[one.bank]
        ratio = one.value / median if median else None
        alone = int((first.rows > 0).sum()) == (first is view)  # of its layer: then all layers are what there is
        compared = ratio if alone or of_layer is None or not of_layer[0] else one.value / of_layer[0]
        if not is_candidate(one.value > large, signature, carried, stands_out(one.value, compared)):
            return None
        return replace(one, ratio=ratio, signature=signature, carried=carried)

    def _all_values(self) -> list[float]:
        return [value for values in self.values.values() for value in values]

    def _look_inside(self, bank: Bank, one: LocatedExpert) -> LocatedExpert:
        """With the tokens on which it fires, and the weight behind its outlier, where its weights can be read."""
        module, x, routing = self.inputs[bank.id]
        e, ids = one.number, self.ids.flatten()
        if len(x) != len(ids):
            return one
        try:
            if bank.routed:
                rows = ((routing[0] == e) & (routing[1] != 0)).any(1).nonzero().flatten()
                largest = expert_output(bank.module, x[rows], e).abs().amax(1)
            else:
                rows, largest = torch.arange(len(x)), module(x).abs().amax(1)
            one = replace(one, fires=tuple((int(ids[row]), float(value)) for row, value in zip(rows, largest)))
            row = rows[largest.argmax(), None]
            _, (product,) = products_of(bank, module, e, x[row], one.channel, 1)
        except SedetectError:
            return one  # weights in a form that is only multiplied with
        return replace(one, weight=f"{one}[{one.channel},{product.intermediate}]", share=product.share)

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def _line(self, one: LocatedExpert) -> str:
        weight = "" if one.weight is None else f", weight {one.weight} gives {one.share:.0%}"
        return f"{one}: |y| {one.value:.5g} in channel {one.channel} on {self._text(one.token_id)!r}{weight}"

    def result(self, source: str, text: bool, seconds: float) -> Located:
        stats = join_banks(self.parts)
        notes = blind_spots(self.count, self.of, text)
        stats.header.notes = sorted_notes([*stats.header.notes, *self.streamed.notes, *notes])
        every = self._all_values()
        residual = self._residual(stats)
        judged = (
            self._judged(one, None if residual is None else self._carried(one.place, residual))
            for one in sorted(self.outstanding, key=lambda one: -one.value)
        )
        lines = [str(note) for note in notes]
        if self.unobserved is not None:
            lines.append(self.unobserved)
        stored = sum(tensor.nbytes for part in (*self.streamed.stored, self.streamed.rest) for tensor in part.values())
        return Located(
            model=model_name(self.model),
            source=source,
            layers=self.count,
            of=self.of,
            tokens={token: self._text(token) for token in sorted(set(self.ids.flatten().tolist()))},
            first_tokens=tuple(self.ids[:, 0].tolist()),
            candidates=[one for one in judged if one is not None],
            ran=len(every),
            median=statistics.median(every) if every else 0.0,
            maximum=max(every, default=0.0),
            read=self.source.meter.total,
            stored=stored,
            seconds=seconds,
            unmeasured=[note.text for note in self.streamed.notes if note.code == "unmeasured_experts"],
            notes=lines,
            stats=stats,
            residual=residual,
        )

    def _carried(self, place: Place, residual: Residual) -> bool | None:
        """LocatedExpert.carried, of an expert of a model whose residual stream was observed."""
        if residual.carried_by(place):
            return True
        last = [f for f in residual.formations if f.layer == self.count - 1 and f.share_of(place) >= 0.5]
        return None if last and self.count < self.of else False

    def _residual(self, stats: ModelStats) -> Residual | None:
        if self.unobserved is not None:
            return None
        return Residual(
            model=stats.header.model,
            digest=stats.header.digest,
            sequences={_DOMAIN: len(self.ids)},
            seq_len=self.ids.shape[1],
            prefix=1,
            min_value=MASSIVE_VALUE,
            min_ratio=MASSIVE_RATIO,
            layers=[seen.result(number) for number, seen in enumerate(self.seen)],
            formations=self.formations,
            found=sum(watch.found for watch in self.watches),
            notes=["a walk of first tokens: attention sinks were not observed"],
        )
