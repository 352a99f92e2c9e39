"""profile_model: the whole calibration, from a checkpoint and texts to merged statistics."""

import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sedetect.calibration.chats import Chats
from sedetect.calibration.records import Document
from sedetect.calibration.windows import (
    Calibration,
    Text,
    Windows,
    batches,
    calibration_windows,
    check_text,
    corpus_name,
    prefix_ids,
)
from sedetect.checkpoints.memory import too_large
from sedetect.checkpoints.options import Loading
from sedetect.documents import short_repr
from sedetect.errors import Argument, SedetectError, check_type, shorten
from sedetect.experiments.proof import check_numbers
from sedetect.experiments.residual_stream import Residual, observe_residual
from sedetect.models.layers import run_inputs, run_tokens
from sedetect.models.loading import OpenModel, PreparedModel, prepare_model
from sedetect.models.measure import Measuring
from sedetect.models.predictors import check_predictor, load_predictor
from sedetect.ops.choose import check_backend
from sedetect.ops.triton import prepare_launches
from sedetect.profiling.heads import HeadProfile
from sedetect.profiling.pictured import find_pictured
from sedetect.profiling.profiler import SourcesProfile, modalities_of
from sedetect.profiling.proving import Proving, prove_profile
from sedetect.ranking.rule import rank
from sedetect.stats.model import ModelStats, join_domains, merge_all
from sedetect.stats.note import Note, sorted_notes
from sedetect.stats.proof import Proof

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from sedetect.models.streamed import StreamedModel
    from sedetect.profiling.streaming import Streamed

ROUND_WINDOWS = 2  # of each domain per round: some thousand tokens, so that a round means much the same in every run


@dataclass
class ModelProfile:
    """The result of profile_model.

    stats         of all domains together
    domains       per domain; they merge to stats
    modalities    of the tokens of text, images and sound alone, where they were told apart (Profile.modalities)
    seconds       in the model's forwards and the statistics, without loading
    device        name of the model's device
    asked         tokens asked for; stats.header.tokens were used
    interrupted   stop() ended it early
    residual      the observed residual stream, if requested and the profile was not interrupted
    proof         the proof of the candidates, likewise; None without candidates
    windows       the windows of each domain that there were to run; see sedetect.experiments.super_weights
    chats         likewise the chats with images or sound
    streamed      statistics on streaming the model, if it was streamed
    rounds        after each round, the tokens so far and the experts to protect (Ranking.found), largest first; empty
                  where profiling was not in rounds
    stable_after  tokens after which the final set first stood, where as many rounds as asked for (one, if none were)
                  left it unchanged; None if they never did
    shards        the statistics of each round alone, with keep_rounds: disjoint parts of the calibration text
    """

    stats: ModelStats
    domains: dict[str, ModelStats] = field(default_factory=dict)
    modalities: dict[str, ModelStats] = field(default_factory=dict)
    seconds: float = 0.0
    device: str = ""
    asked: int = 0
    interrupted: bool = False
    tokenizer: "PreTrainedTokenizerBase | None" = None
    residual: Residual | None = None
    proof: Proof | None = None
    windows: dict[str, Windows] = field(default_factory=dict)
    chats: dict[str, Chats] = field(default_factory=dict)
    streamed: "Streamed | None" = None
    rounds: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    stable_after: int | None = None
    shards: list[ModelStats] = field(default_factory=list)

    __repr__ = short_repr


def profile_model(
    model: "str | os.PathLike[str] | PreTrainedModel",
    texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Document]] | None = None,
    *,
    text: Text = Text(),
    loading: Loading = Loading(),
    measuring: Measuring = Measuring(),
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    processor: "ProcessorMixin | None" = None,
    residual: int | None = None,
    proving: Proving | None = None,
    until_stable: int | None = None,
    keep_rounds: bool = False,
    stream: bool | None = None,
    resume: str | os.PathLike[str] | None = None,
    part: tuple[int, int] = (0, 1),
    mtp: bool = False,
    progress: Callable[[str, int, int | None], None] = lambda domain, done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> ModelProfile:
    """Profile a model on calibration text, and on chats with images or sound. Domains never share a batch.

    A domain whose first chats hold images or sound goes through the model's own processor; each chat is a sequence.
    Tokens of text, images and sound are then told apart. text.tokens are bought of text, and as many of such chats.

    Args:
        model: a checkpoint folder, a hub name, or a loaded model (then tokenizer is needed).
        texts: None for the embedded corpus, a path or hub dataset as load_texts takes them, or domain -> documents.
        text: the amount taken, and how it is cut and run.
        loading: how a checkpoint is loaded.
        measuring: the statistics to keep, and the backend.
        processor: of a loaded model that is to see images or hear sound; a checkpoint brings its own.
        residual: afterwards observe the residual stream and the attention sinks of this many windows, as
            observe_residual does; rank takes what it saw.
        proving: afterwards prove the candidates, as prove_profile does; rank takes what it found.
        until_stable: take the windows in rounds, of each domain one batch of batch_size but at most ROUND_WINDOWS
            windows, and stop once this many rounds in a row have left the candidates as they were.
        keep_rounds: profile in rounds and keep the statistics of each; without until_stable, to the last window.
        stream: run the decoder layers of a checkpoint one after another, each read from disk while the one before
            computes; the result is the same. None streams what does not fit the device's free memory (with a
            UserWarning). Not with residual, proving and rounds, which need the whole model.
        resume: a folder for what a streamed profile that was ended early needs to go on: the same call continues after
            the last finished layer, and another one is refused. It stays afterwards; delete it when the result is safe.
        part: (i, n) runs of the batches of all domains every n-th from the i-th on; the n parts merge to the whole.
        mtp: also measure the experts of the checkpoint's head that predicts a further token, in the stack "mtp".
        progress: called with (domain, tokens done, tokens in all) after every batch, while streaming with ("layer 3 of
            48", tokens done in it, tokens in all); once with ("residual", 0, None) before the residual stream is
            observed, and with each run of a proof ("L1E28 alone (about 20 s in all)", runs done, runs in all).
        stop: asked before every batch; once it is true, what was measured so far is returned: of a streamed profile,
            nothing but what resume keeps.
    Raises:
        SedetectError: for bad input, before anything is measured. Where only the residual stream cannot be observed,
            or only the proof not be made, the statistics' header notes why.
    """
    rounds = _Rounds(until_stable, keep_rounds)
    for name, number in {"until_stable": until_stable, "residual": residual}.items():
        if number is not None and number < 1:
            raise SedetectError(Argument(name), f" {number}: must be at least 1")
    for name, given, kind in (("text", text, Text), ("loading", loading, Loading), ("measuring", measuring, Measuring)):
        check_type(name, given, kind)
    if proving is not None:
        check_type("proving", proving, Proving)
    documents = check_text(texts, text)  # before weights are read
    check_backend(measuring.backend)
    streaming = _must_stream(model, stream, loading)
    if mtp and (streaming or not isinstance(model, (str, os.PathLike))):
        what = "this one is streamed layer by layer" if streaming else "a loaded model is without its head"
        raise SedetectError(
            Argument("mtp", True), f": needs a checkpoint that is loaded whole, and {what}; leave it out"
        )
    whole = {"proving": proving, "residual": residual, "until_stable": rounds or None}
    if asked := next((name for name, given in whole.items() if given is not None), None):
        _refuse_parts(asked, streaming, part)
    if proving is not None:
        check_numbers(proving.smallest, proving.level)
    text_alone: dict[str | Argument, object] = {
        "a model that is streamed layer by layer": streaming,
        Argument("until_stable"): rounds,
        Argument("mtp", True): mtp,
    }
    unfit = tuple(what for what, given in text_alone.items() if given)[:1]
    pictured = find_pictured(model, documents, text, loading, processor, embedded=texts is None, unfit=unfit)
    if pictured.domains:
        loading, measuring = replace(loading, multimodal=True), replace(measuring, modalities=True)
    if measuring.modalities and streaming:
        raise SedetectError(Argument("modalities"), ": are not told apart where a model is streamed; leave it out")
    for name, wanted in (("residual", residual), ("proving", proving)):
        if wanted is not None and not documents.keys() - pictured.domains.keys():
            raise SedetectError(Argument(name), ": reads text, and there are chats with images or sound alone")
    if torch.cuda.is_available():
        prepare_launches()
    prepared, made = _prepare(model, tokenizer, loading, part if streaming else None)
    if mtp:
        check_predictor(prepared.empty, model)
    if measuring.modalities:
        modalities_of(prepared.empty)
    calibration = calibration_windows(prepared.empty, prepared.tokenizer, texts, text, without=pictured.domains)
    chats, said = pictured.chats(prepared.empty, text, corpus_name(texts))
    calibration.notes += said
    if pictured.domains and not (chats or calibration.domains):
        raise SedetectError(f"{corpus_name(texts)}: no chat that the model's positions hold; give shorter ones")
    opened = prepared.load()
    streamed = next(iter(made), None)
    result = ModelProfile(
        ModelStats.empty(), asked=text.tokens, tokenizer=opened.tokenizer, windows=calibration.domains, chats=chats
    )
    result.device = _device_name(opened.model.device if streamed is None else streamed.device)
    calibration.domains, chats = _part(calibration.domains, chats, text.batch_size, *part)
    total = calibration.used + sum(one.tokens for one in chats.values())
    prefix = prefix_ids(opened.tokenizer)
    first = next(iter(prefix), None)
    if streamed is not None:
        from sedetect.profiling.streaming import stream_profile

        result.domains, result.streamed = stream_profile(
            streamed,
            opened.banks,
            calibration.domains,
            text.batch_size,
            first,
            measuring,
            resume=None if resume is None else Path(resume),
            report=lambda layer, done: progress(layer, done, calibration.used),
            stop=stop,
        )
        result.interrupted, result.seconds = not result.domains, result.streamed.compute
        done = total
    else:
        start = time.perf_counter()
        with (
            SourcesProfile(opened.model, opened.banks, prefix=first, measuring=measuring) as prof,
            ExitStack() as stack,
        ):
            heads = None
            if mtp:
                head = load_predictor(opened.model, model, loading)
                heads = stack.enter_context(HeadProfile(opened.model, head, measuring))
            result.seconds = time.perf_counter() - start
            run = _Resident(result, opened.model, prof, total, progress, stop, heads)
            done = run.windows(calibration.domains, chats, text.batch_size, rounds)
    unmeasured = {"unused_weights", "unmeasured_experts"} if mtp else set()
    notes = [
        *(note for note in opened.notes if note.code not in unmeasured),
        *_planned(result, calibration, done == total, rounds),
    ]
    for stats in (*result.domains.values(), *result.modalities.values()):
        stats.header.notes = sorted_notes([*stats.header.notes, *notes])
    result.stats = join_domains(result.domains.values())
    if residual is not None and not result.interrupted:
        progress("residual", 0, None)
        _observe(result, opened.model, calibration.domains, len(prefix), residual, stop)
    if proving is not None and not result.interrupted:
        _prove(result, opened, texts, text, proving, progress, stop)
    return result


@dataclass(frozen=True)
class _Rounds:
    """Whether the windows are taken in rounds, until the set has stood for so many, and each round's kept."""

    until_stable: int | None
    keep: bool

    def __bool__(self) -> bool:
        return self.until_stable is not None or self.keep


def _refuse_parts(name: str, streaming: bool, part: tuple[int, int]) -> None:
    """Raise SedetectError where only a part of the model or of the text is there."""
    if streaming:
        raise SedetectError(
            Argument(name), ": needs the whole model, and this one is streamed layer by layer; leave it out"
        )
    if part[1] > 1:
        raise SedetectError(Argument(name), ": needs the whole text, and every rank has a part of it; leave it out")


def _prepare(
    model: "str | os.PathLike[str] | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    loading: Loading,
    streamed_part: tuple[int, int] | None,
) -> "tuple[PreparedModel, list[StreamedModel]]":
    """The model to load, and a list that its load fills with what is streamed, where that is asked for."""
    made: list[StreamedModel] = []
    if streamed_part is None:
        return prepare_model(model, tokenizer, loading), made
    from sedetect.models.streamed import open_streamed

    first, count = streamed_part

    def load(name: str | os.PathLike[str], loading: Loading) -> tuple["PreTrainedModel", list[Note]]:
        made.append(open_streamed(name, loading, first=first / count))
        return made[0].model, made[0].notes

    return prepare_model(model, tokenizer, loading, load=load), made


def _planned(result: ModelProfile, calibration: Calibration, whole: bool, rounds: _Rounds) -> list[Note]:
    """Notes on the text that was run, whole or in part."""
    if result.interrupted:
        return []
    if whole:
        return calibration.notes
    # What the budget would have bought is not what was used.
    text = f"stopped early: the candidates stayed the same for {rounds.until_stable} rounds"
    stopped = Note("stopped_early", text, count=rounds.until_stable)
    return [*(note for note in calibration.notes if note.code != "tokens_used"), stopped]


def _observe(
    result: ModelProfile,
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    prefix: int,
    sequences: int,
    stop: Callable[[], bool],
) -> None:
    """Observe the residual stream, into result; a note where that fails."""
    progress = partial(_raise_stopped, stop)
    try:
        result.residual = observe_residual(model, domains, prefix=prefix, sequences=sequences, progress=progress)
    except _Stopped:
        result.interrupted = True
    except Exception as error:  # the profile is done and must not be lost by a failure here
        why = Note("no_residual", f"the residual stream was not observed: {shorten(error)}")
        result.stats.header.notes = sorted_notes([*result.stats.header.notes, why])


def _prove(
    result: ModelProfile,
    opened: OpenModel,
    texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Document]] | None,
    text: Text,
    proving: Proving,
    progress: Callable[[str, int, int | None], None],
    stop: Callable[[], bool],
) -> None:
    """Prove the candidates, into result; a note where that fails."""

    def tell(label: str, done: int, total: int, seconds: float) -> None:
        if stop():
            raise _Stopped
        progress(f"{label} (about {seconds:.0f} s in all)", done, total)

    try:
        result.proof = prove_profile(
            opened.model, opened.tokenizer, texts, text, result.stats, proving, residual=result.residual, progress=tell
        )
    except _Stopped:
        result.interrupted = True
    except Exception as error:  # the profile is done and must not be lost by a failure here
        why = Note("no_proof", f"nothing was proved: {shorten(error)}")
        result.stats.header.notes = sorted_notes([*result.stats.header.notes, why])


def _part(
    domains: dict[str, Windows], chats: dict[str, Chats], batch_size: int, first: int, step: int
) -> tuple[dict[str, Windows], dict[str, Chats]]:
    """Of the batches of all domains, every step-th from the first on, as windows and chats that give the same batches
    again."""
    if step == 1:
        return domains, chats
    taken, held, number = {}, {}, 0
    for domain, windows in domains.items():
        runs = list(batches(windows, batch_size))
        mine = [run for place, run in enumerate(runs, number) if place % step == first]
        number += len(runs)
        if mine:
            ids, numbers = map(torch.cat, zip(*mine))
            taken[domain] = replace(windows, ids=ids, numbers=numbers)
    for domain, all_chats in chats.items():
        parts = all_chats.batches(batch_size)
        own = [part for place, part in enumerate(parts, number) if place % step == first]
        number += len(parts)
        if own:
            held[domain] = all_chats.among(torch.cat([part.numbers for part in own]))
    if number < step:
        raise SedetectError(
            f"{number} batches do not make {step} parts; give more ",
            Argument("tokens"),
            " or a smaller ",
            Argument("batch_size"),
        )
    return taken, held


def _must_stream(model: Any, stream: bool | None, loading: Loading) -> bool:
    """The effective value of stream: the caller's choice, or whether a checkpoint folder is too large for the
    device.
    """
    if not isinstance(model, (str, os.PathLike)):
        if stream:
            raise SedetectError(f"{type(model).__name__}: a loaded model is not streamed; give the checkpoint's folder")
        return False
    why = too_large(model, loading.device, loading.dtype) if stream is None and Path(model).is_dir() else None
    if why is not None:
        warnings.warn(f"{model}: {why}", stacklevel=3)
    return bool(stream) or why is not None


@dataclass
class _Resident:
    """A running profile of a loaded model.

    total: tokens there are to run; done: tokens that were run.
    """

    result: ModelProfile
    model: "PreTrainedModel"
    prof: SourcesProfile
    total: int
    progress: Callable[[str, int, int | None], None]
    stop: Callable[[], bool]
    heads: HeadProfile | None = None
    done: int = 0

    def windows(self, domains: dict[str, Windows], chats: dict[str, Chats], batch_size: int, rounds: _Rounds) -> int:
        """Run the windows and chats, into result; returns how many tokens were run."""
        if rounds:
            batch_size = min(batch_size, ROUND_WINDOWS)
        parts: list[dict[str, Any]] = _parts(domains, batch_size) if rounds else [{**domains, **chats}]
        for part in parts:
            measured = self._part(part, batch_size)
            for domain, stats in measured.items():
                self.result.domains[domain] = self.result.domains.get(domain, ModelStats.empty()).merge(stats)
            if self.result.interrupted or (rounds and self._round(measured, rounds)):
                break
        return self.done

    def _part(self, domains: dict[str, Windows | Chats], batch_size: int) -> dict[str, ModelStats]:
        """The statistics of each domain; of a domain that stop() left without any, none.

        Raises SedetectError for a domain of which no token was counted.
        """
        result, measured = self.result, {}
        for domain, held in domains.items():
            start = time.perf_counter()
            self.prof.begin(held.source, held.info)
            if self.heads is not None:
                self.heads.begin(held.source, held.info)
            before = self.done
            for tokens in self._run(held, batch_size):
                self.done += tokens
                self.progress(domain, self.done, self.total)
            stats = self.prof.take()
            for modality, part in self.prof.modalities.items():
                result.modalities[modality] = result.modalities.get(modality, ModelStats.empty()).merge(part)
            if self.heads is not None:
                stats = self.heads.join(stats)
            result.seconds += time.perf_counter() - start
            if stats.header.tokens:
                measured[domain] = stats
            elif self.done > before:
                ran = f"{type(self.model).__name__} ran its {self.done - before} tokens, and none could be counted"
                why = "; ".join(map(str, stats.header.notes))
                raise SedetectError(f"{domain}: {ran} ({why}); run it inside sedetect.profile(model) yourself")
            if result.interrupted:
                break
        return measured

    def _run(self, held: Windows | Chats, batch_size: int) -> Iterator[int]:
        """Run the batches of a domain until stop() says so; yields the tokens of each."""
        parts = held.batches(batch_size) if isinstance(held, Chats) else batches(held, batch_size)
        for part in parts:
            self.result.interrupted = self.stop()
            if self.result.interrupted:
                return
            if isinstance(part, Chats):
                self.prof.batch(sequence_ids=part.numbers)
                run_inputs(self.model, part.inputs())
                yield part.tokens
                continue
            ids, numbers = part
            self.prof.batch(sequence_ids=numbers)
            run_tokens(self.model, ids)
            if self.heads is not None:
                self.heads.run(ids, numbers)
            yield ids.numel()

    def _round(self, measured: dict[str, ModelStats], rounds: _Rounds) -> bool:
        """Record a round's result, and return whether it was the last one needed."""
        result = self.result
        result.rounds.append((self.done, _candidates(merge_all(result.domains.values()))))
        result.stable_after = _stable_after(result.rounds, rounds.until_stable or 1)
        if rounds.keep:
            result.shards.append(merge_all(measured.values()))
        return rounds.until_stable is not None and result.stable_after is not None


class _Stopped(Exception):
    pass


def _raise_stopped(stop: Callable[[], bool], tokens: int) -> None:
    if stop():
        raise _Stopped


def _device_name(device: torch.device) -> str:
    """A GPU's name, or the kind of the device and the machine's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _parts(domains: dict[str, Windows], count: int) -> list[dict[str, Windows]]:
    """The windows of every domain in parts of count; the last rounds hold only the domains that have windows left."""
    parts = {
        domain: [replace(windows, ids=ids, numbers=numbers) for ids, numbers in batches(windows, count)]
        for domain, windows in domains.items()
    }
    longest = max(map(len, parts.values()))
    return [{domain: mine[i] for domain, mine in parts.items() if i < len(mine)} for i in range(longest)]


def _candidates(stats: ModelStats) -> tuple[str, ...]:
    return tuple(str(expert) for expert in rank(stats).found)


def _stable_after(rounds: list[tuple[int, tuple[str, ...]]], unchanged: int) -> int | None:
    """Tokens after which the last set first stood, if at least unchanged rounds followed that had it too."""
    first = len(rounds) - 1
    while first and set(rounds[first - 1][1]) == set(rounds[-1][1]):
        first -= 1
    return rounds[first][0] if len(rounds) - 1 - first >= unchanged else None
