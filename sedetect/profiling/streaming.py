"""A streamed profile: only one decoder layer at a time has weights, and every batch passes it before the next one.

For each layer and batch the model's own forward is called, on the batch's token ids. The layers before pass on what
they are given, the layer itself runs on the hidden states kept from the layer before, and there the forward ends:
masks, position embeddings, the row context and whatever else a model prepares are its own at every layer, and nothing
of them is kept. What is computed twice are the embeddings, some thousandth of a layer.

    layer 0   read    batches 0 1 2 ...
    layer 1     read              batches 0 1 2 ...        while a layer computes, a thread reads the next
    layer 2                         read          batches
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sedetect.adapters.forwards import replace_forward
from sedetect.calibration.windows import Windows, batches
from sedetect.checkpoints.files import weights_digest
from sedetect.checkpoints.memory import place_of_hidden, size
from sedetect.checkpoints.staging import use_device
from sedetect.errors import Argument, SedetectError, shorten
from sedetect.models.banks import Bank
from sedetect.models.identity import add_digests, join_digest, model_id, model_name
from sedetect.models.layers import run_tokens
from sedetect.models.measure import Measuring
from sedetect.models.streamed import StreamedModel
from sedetect.profiling.profiler import SourcesProfile
from sedetect.profiling.resume import HiddenStates, Progress
from sedetect.stats.model import ModelStats, digest, join_banks
from sedetect.version import __version__

_TRIAL_TOKENS = 8
_APART = "its layers cannot be run one after another; "
_WHOLE = ("load it whole (", Argument("stream", False), ")")


@dataclass
class Streamed:
    """Statistics on the progress of a streamed profile.

    layers were run here, resumed were found finished. Seconds: read and convert weights (in a thread), compute batches
    (of resumed layers too), wait for weights, write what a resumed run needs.
    """

    layers: int = 0
    resumed: int = 0
    read: float = 0.0
    compute: float = 0.0
    wait: float = 0.0
    write: float = 0.0


class _Reached(Exception):
    """Ends a forward of the model after the layer that was to run."""


def stream_profile(
    streamed: StreamedModel,
    banks: list[Bank],
    domains: dict[str, Windows],
    batch_size: int,
    prefix: int | None,
    measuring: Measuring,
    *,
    resume: Path | None,
    report: Callable[[str, int], None],
    stop: Callable[[], bool],
) -> tuple[dict[str, ModelStats], Streamed]:
    """Statistics of every domain, equal to those of a resident model over the same batches; none if stop() ended it.

    Args:
        banks: of the whole model, as find_banks gives them.
        prefix: as in sedetect.profile.
        resume: a folder to continue from, and to keep what continuing takes; see sedetect.profiling.resume.
        report: called with ("layer 3 of 48", tokens done in it) after every batch.
        stop: called before every batch.
    Raises:
        SedetectError: before any layer is read, for a model whose layers hand on more than hidden states, for a folder
            with another run, and without resume for hidden states that do not fit the memory.
    """
    model, layers, count = streamed.model, streamed.layers, len(streamed.layers)
    runs = {domain: list(batches(windows, batch_size)) for domain, windows in domains.items()}
    place = _place(streamed, domains, resume)
    wrap = check_layers(streamed, next(iter(domains.values())).ids[:1, :_TRIAL_TOKENS])
    progress = None if resume is None else Progress(resume, _identity(streamed, domains, batch_size, prefix, measuring))
    hidden, took = HiddenStates(place, progress), Streamed()
    known = model_id(model)
    parts = [] if progress is None else progress.statistics(len(domains))
    if progress is not None:
        took.resumed, took.compute = progress.layers, progress.computed
    reading = ThreadPoolExecutor(1, "weights", use_device, (streamed.device,))
    with ending_early(model), reading as reader, closing(hidden), torch.no_grad():
        loading = reader.submit(_load, streamed, len(parts)) if len(parts) < count else None
        for layer in range(len(parts), count):
            start = time.perf_counter()
            assert loading is not None  # begun before the loop, or with the layer before
            seconds, total = loading.result()
            took.read += seconds
            took.wait += time.perf_counter() - start
            if layer + 1 < count:
                loading = reader.submit(_load, streamed, layer + 1)
            measured, done, batch = [], 0, 0
            start, waited = time.perf_counter(), 0.0 if progress is None else progress.waited
            here = [bank for bank in banks if bank.path.startswith(f"{streamed.paths[layer]}.")]
            with SourcesProfile(model, here, join_digest(known, total), prefix=prefix, measuring=measuring) as prof:
                for domain, windows in domains.items():
                    prof.begin(windows.source, windows.info)
                    for ids, numbers in runs[domain]:
                        if stop():
                            return {}, took
                        prof.batch(sequence_ids=numbers)
                        with only_layer(layers, layer, wrap, *_kept(hidden, layer, count, batch)):
                            run_tokens(model, ids)
                        batch, done = batch + 1, done + ids.numel()
                        report(f"layer {layer + 1} of {count}", done)
                    measured.append(prof.take())
            seconds = time.perf_counter() - start
            streamed.free(layer)
            if progress is not None:
                seconds -= progress.waited - waited
                progress.finish(layer, measured, seconds, last=layer + 1 == count)
                took.write = progress.seconds
            took.compute += seconds
            parts.append(measured)
            took.layers += 1
    joined = {domain: join_banks([part[i] for part in parts]) for i, domain in enumerate(domains)}
    for stats in joined.values():
        stats.header.digest = add_digests(part[0].header.digest for part in parts)
    return joined, took


def _kept(
    hidden: HiddenStates, layer: int, count: int, batch: int
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor, torch.Tensor], None]]:
    """What only_layer is given, for a batch whose hidden states are kept from layer to layer."""

    def entering(given: torch.Tensor) -> torch.Tensor:
        return hidden.read(layer, batch, given.device) if layer else given

    def keep(into: torch.Tensor, left: torch.Tensor) -> None:
        if layer + 1 < count:
            hidden.write(layer + 1, batch, left)

    return entering, keep


def _load(streamed: StreamedModel, layer: int) -> tuple[float, int | None]:
    """Load a layer: the seconds it took, and its part of the model's checksum; what is outside goes with the first."""
    seconds = streamed.load(layer)
    start = time.perf_counter()
    parts = [streamed.checksum(layer), *([] if layer else [streamed.rest_checksum()])]
    total = None if None in parts else sum(part for part in parts if part is not None)
    return seconds + time.perf_counter() - start, total


def _identity(
    streamed: StreamedModel,
    domains: dict[str, Windows],
    batch_size: int,
    prefix: int | None,
    measuring: Measuring,
) -> dict[str, Any]:
    """The settings that must be equal for two runs to give the same bits."""
    model = streamed.model
    return {
        "model": model_name(model),
        "weights": weights_digest(streamed.files[0].parent),
        "config": model_id(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": streamed.device.type,
        "attention": getattr(model.config, "_attn_implementation", None),
        "batch size": batch_size,
        **asdict(measuring),
        "prefix": prefix,
        "domains": list(domains),
        "window": [windows.ids.shape[1] for windows in domains.values()],
        "windows": [len(windows.ids) for windows in domains.values()],
        "text": [[windows.source, digest(str(windows.numbers.tolist()))] for windows in domains.values()],
        "sedetect": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _place(streamed: StreamedModel, domains: dict[str, Windows], resume: Path | None) -> torch.device | None:
    """The storage of the hidden states of all batches."""
    tokens = sum(windows.ids.numel() for windows in domains.values())
    width = streamed.model.get_input_embeddings().get_parameter("weight").shape[1]
    needed = tokens * width * streamed.model.dtype.itemsize
    place = place_of_hidden(streamed.device, needed)
    if place is None and resume is None:
        raise SedetectError(
            f"hidden states of {tokens} tokens take {size(needed)}, more than half the free memory; give a folder "
            "that keeps them (",
            Argument("resume"),
            ") or fewer ",
            Argument("tokens"),
        )
    return place


@contextmanager
def ending_early(model: nn.Module) -> Iterator[None]:
    """Let a layer end the model's forward, which then returns None: see only_layer."""
    original = model.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except _Reached:
            return None

    with _forwards([forward], [model]):
        yield


@contextmanager
def only_layer(
    layers: Sequence[nn.Module],
    number: int,
    wrap: Callable[[Any], Any],
    entering: Callable[[torch.Tensor], torch.Tensor],
    keep: Callable[[torch.Tensor, torch.Tensor], None],
) -> Iterator[None]:
    """A forward of the model, within ending_early, runs one layer alone.

    entering gives the hidden states that go into it, of those that the model would give its first layer; keep is called
    with them and with those that it makes.
    """
    own = layers[number].forward

    def run(*args: Any, **kwargs: Any) -> Any:
        given, args, kwargs = _split(args, kwargs)
        into = entering(given)
        tables = [(name, value, dict(value)) for name, value in kwargs.items() if isinstance(value, dict)]
        left = own(into, *args, **kwargs)
        for name, value, before in tables:
            if value.keys() != before.keys() or any(value[key] is not before[key] for key in before):
                raise SedetectError(f"layer {number} writes to its {name}, so ", _APART, *_WHOLE)
        keep(into, left[0] if isinstance(left, tuple) else left)
        raise _Reached

    with _forwards([*[partial(_pass_on, wrap)] * number, run], layers):
        yield


@contextmanager
def _forwards(forwards: Iterable[Callable[..., Any]], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Temporarily replace the forwards of these modules."""
    with ExitStack() as undo:
        for module, forward in zip(modules, forwards):
            undo.callback(replace_forward(module, forward))
        yield


def _pass_on(wrap: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Any:
    return wrap(_split(args, kwargs)[0])


def _split(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple, dict[str, Any]]:
    """The hidden states of a layer's arguments, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def check_layers(
    streamed: StreamedModel, ids: torch.Tensor, remedy: Sequence[str | Argument] = _WHOLE
) -> Callable[[Any], Any]:
    """How a layer of the model gives its hidden states: as they are, or in a tuple.

    The model's forward is tried on a few tokens with layers that compute nothing. Raises SedetectError, which ends with
    the remedy, where it hands the layers something that earlier ones made or could change.
    """
    why: Exception = ValueError("it has no layers")
    for wrap in (lambda hidden: hidden, lambda hidden: (hidden,)):
        try:
            as_given = _trial(streamed, ids, wrap, lambda hidden: hidden.clone(), remedy)
            other = _trial(streamed, ids, wrap, lambda hidden: torch.full_like(hidden, torch.nan), remedy)
        except SedetectError:
            raise
        except Exception as error:  # whatever the model's own code makes of the other form
            why = error
            continue
        for layer, (one, two) in enumerate(zip(as_given, other, strict=True)):
            for (name, a), (_, b) in zip(one, two, strict=True):
                if isinstance(a, torch.Tensor) and not torch.equal(a.nan_to_num(), b.nan_to_num()):
                    raise _unstreamed(streamed, f"{name} of layer {layer} depends on what earlier layers gave", remedy)
        return wrap
    raise _unstreamed(streamed, f"its layers hand on more than hidden states ({shorten(why)})", remedy)


def layer_arguments(
    streamed: StreamedModel, ids: torch.Tensor, wrap: Callable[[Any], Any]
) -> list[list[tuple[str, Any]]]:
    """The arguments of every layer but hidden states, flat, of a model that check_layers has tried."""
    return _trial(streamed, ids, wrap, lambda hidden: hidden.clone(), _WHOLE)


def _trial(
    streamed: StreamedModel,
    ids: torch.Tensor,
    wrap: Callable[[Any], Any],
    gives: Callable[[Any], Any],
    remedy: Sequence[str | Argument],
) -> list[list[tuple[str, Any]]]:
    """The arguments of every layer but hidden states, flat, in a forward whose layers give gives(hidden states)."""
    calls: list[list[tuple[str, Any]]] = []
    last = None

    def call(number: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal last
        given, args, kwargs = _split(args, kwargs)
        if number != len(calls) or (number and given is not last):
            raise ValueError(f"layer {number} is not given what the layer before it gave")
        named = {**{f"argument {place}": value for place, value in enumerate(args, 1)}, **kwargs}
        calls.append([leaf for name, value in named.items() for leaf in _leaves(streamed, number, name, value, remedy)])
        if number + 1 == len(streamed.layers):
            raise _Reached
        last = gives(given)
        return wrap(last)

    forwards = [partial(call, number) for number in range(len(streamed.layers))]
    with ending_early(streamed.model), _forwards(forwards, streamed.layers), torch.no_grad():
        run_tokens(streamed.model, ids)
    if len(calls) < len(streamed.layers):
        raise ValueError(f"{len(calls)} of {len(streamed.layers)} layers are run")
    return calls


def _leaves(
    streamed: StreamedModel, layer: int, name: str, value: Any, remedy: Sequence[str | Argument]
) -> Iterator[tuple[str, Any]]:
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(streamed, layer, name, part, remedy)
    elif type(value) is dict and value:  # by layer type, say; that no layer writes to it is seen when they run
        yield from _leaves(streamed, layer, name, tuple(value.values()), remedy)
    elif value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):
        yield name, value
    else:
        raise _unstreamed(
            streamed, f"{name} of layer {layer} is a {type(value).__name__}, in which layers can keep state", remedy
        )


def _unstreamed(streamed: StreamedModel, why: str, remedy: Sequence[str | Argument]) -> SedetectError:
    name = type(streamed.model).__name__
    return SedetectError(f"{name}: {why}, so ", _APART, *remedy)
