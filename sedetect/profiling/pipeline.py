"""profile_model: the whole calibration, from a checkpoint and texts to merged statistics."""

import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sedetect.calibration.windows import Calibration, Windows, batches, calibration_windows, prefix_ids
from sedetect.checkpoints.memory import too_large
from sedetect.errors import SedetectError, shorten
from sedetect.experiments.residual_stream import Residual, observe_residual
from sedetect.models.layers import run_tokens
from sedetect.models.loading import OpenModel, load_model, open_model
from sedetect.models.streamed import StreamedModel, open_streamed
from sedetect.profiling.profiler import SourcesProfile
from sedetect.profiling.streaming import Streamed, stream_profile
from sedetect.ranking.rule import rank
from sedetect.stats.model import ModelStats, merge_all

ROUND_WINDOWS = 2  # of each domain per round: some thousand tokens, so that a round means much the same in every run


@dataclass
class ModelProfile:
    """What profile_model measured.

    stats         of all domains together
    domains       per domain; they merge to stats
    seconds       in the model's forwards and the statistics, without loading
    device        name of what the model ran on
    asked         tokens asked for; stats.header.tokens were used
    interrupted   stop() ended it early
    residual      what was seen of the residual stream, where it was asked for and nothing interrupted the profile
    windows       the windows of each domain that there were to run; see sedetect.experiments.super_weights
    streamed      how streaming the model layer by layer went, where it was streamed
    rounds        after each round, the tokens so far and the super experts (verdict "super"), largest first; empty
                  where profiling was not in rounds
    stable_after  tokens after which the final set first stood, where as many rounds as asked for (one, if none were)
                  left it unchanged; None if they never did
    shards        the statistics of each round alone, with keep_rounds: disjoint parts of the calibration text
    """

    stats: ModelStats
    domains: dict[str, ModelStats] = field(default_factory=dict)
    seconds: float = 0.0
    device: str = ""
    asked: int = 0
    interrupted: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    residual: Residual | None = None
    windows: dict[str, Windows] = field(default_factory=dict)
    streamed: Streamed | None = None
    rounds: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    stable_after: int | None = None
    shards: list[ModelStats] = field(default_factory=list)


def profile_model(
    model: str | os.PathLike | PreTrainedModel,
    texts: str | os.PathLike | dict[str, list[str]] | None = None,
    *,
    tokens: int = 32768,
    seq_len: int = 512,
    batch_size: int = 8,
    seed: int | None = None,
    chat_template: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
    backend: str | None = None,
    channels: bool = False,
    coactivation: bool = False,
    first_rows: bool = False,
    residual: int | None = None,
    until_stable: int | None = None,
    keep_rounds: bool = False,
    stream: bool | None = None,
    resume: str | os.PathLike | None = None,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[str, int, int | None], None] = lambda domain, done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> ModelProfile:
    """Profile a model on calibration text. Domains never share a batch.

    Args:
        model: a checkpoint folder, a hub name, or a loaded model (then tokenizer is needed).
        texts: None for the embedded corpus, a path or hub data set as load_texts takes them, or domain -> documents.
        tokens, seq_len, seed, chat_template: as in make_windows.
        batch_size: windows per forward.
        device, dtype, revision, attn, trust_remote_code: as in load_model.
        backend, channels, coactivation, first_rows: as in profile.
        residual: afterwards observe the residual stream and the attention sinks of this many windows, as
            observe_residual does; rank takes what it saw.
        until_stable: take the windows in rounds, of each domain one batch of batch_size but at most ROUND_WINDOWS
            windows, and stop once this many rounds in a row have left the set of super experts as it was.
        keep_rounds: profile in rounds and keep the statistics of each; without until_stable, to the last window.
        stream: run the decoder layers of a checkpoint one after another, each read from disk while the one before
            computes; the result is the same. None streams what does not fit the device's free memory (with a
            UserWarning). Not with residual and rounds, which need the whole model.
        resume: a folder for what a streamed profile that was ended early needs to go on: the same call continues after
            the last finished layer, and another one is refused. It stays afterwards; delete it when the result is safe.
        part: (i, n) runs of the batches of all domains every n-th from the i-th on; the n parts merge to the whole.
        progress: called with (domain, tokens done, tokens in all) after every batch, while streaming with ("layer 3 of
            48", tokens done in it, tokens in all); once with ("residual", 0, None) when the residual stream is observed.
        stop: asked before every batch; once it is true, what was measured so far is returned: of a streamed profile,
            nothing but what resume keeps.
    Raises:
        SedetectError: for bad input, before anything is measured. Where only the residual stream cannot be observed,
            the statistics' header notes why.
    """
    for option, number in {"--until-stable": until_stable, "--residual": residual}.items():
        if number is not None and number < 1:
            raise SedetectError(f"{option} {number}: must be at least 1")
    in_rounds = until_stable is not None or keep_rounds
    streaming = _must_stream(model, stream, device, dtype)
    if residual is not None or in_rounds:
        option = "--residual" if residual is not None else "--until-stable"
        if streaming:
            raise SedetectError(
                f"{option}: needs the whole model, and this one is streamed layer by layer; leave it out"
            )
        if part[1] > 1:
            raise SedetectError(f"{option}: needs the whole text, and every rank has a part of it; leave it out")
    options = {"device": device, "dtype": dtype, "revision": revision, "attn": attn}
    options["trust_remote_code"] = trust_remote_code
    streamed: list[StreamedModel] = []

    def load(name: str | Path, **options: Any) -> PreTrainedModel:
        streamed.append(open_streamed(name, **options, first=part[0] / part[1]))
        return streamed[0].model

    opened = open_model(model, tokenizer, **options, load=load if streaming else load_model)
    model, tokenizer, notes, banks = opened
    cut = {"tokens": tokens, "seq_len": seq_len, "seed": seed, "chat_template": chat_template}
    calibration = calibration_windows(model, tokenizer, texts, **cut)
    windows = calibration.domains
    calibration.domains = _part(windows, batch_size, *part)
    settings = {"backend": backend, "channels": channels, "coactivation": coactivation, "first_rows": first_rows}
    settings["prefix"] = next(iter(prefix_ids(tokenizer)), None)
    result = ModelProfile(ModelStats.empty(), asked=tokens, tokenizer=tokenizer, windows=windows)
    result.device = _device_name(streamed[0].device if streaming else model.device)
    if streaming:
        result.domains, result.streamed = stream_profile(
            streamed[0],
            banks,
            calibration.domains,
            batch_size,
            settings,
            resume=None if resume is None else Path(resume),
            report=lambda layer, done: progress(layer, done, calibration.used),
            stop=stop,
        )
        result.interrupted, result.seconds = not result.domains, result.streamed.compute
        done = calibration.used
    else:
        until = {"until_stable": until_stable, "keep_rounds": keep_rounds}
        done = _measure(result, opened, calibration, batch_size, settings, **until, progress=progress, stop=stop)
    planned = [] if result.interrupted else calibration.notes
    if done < calibration.used and not result.interrupted:
        # What the budget would have bought is not what was used.
        planned = [note for note in planned if not note.startswith(f"{tokens} tokens asked")]
        planned.append(f"stopped early: the super experts stayed the same for {until_stable} rounds")
    for stats in result.domains.values():
        stats.header.notes = sorted({*stats.header.notes, *planned, *notes})
    result.stats = merge_all(result.domains.values())
    if residual is not None and not result.interrupted:
        progress("residual", 0, None)
        prefix = len(prefix_ids(tokenizer))
        try:
            result.residual = observe_residual(
                model, calibration.domains, prefix=prefix, sequences=residual, progress=partial(_check, stop)
            )
        except _Stopped:
            result.interrupted = True
        except Exception as error:  # the profile is done, and is not lost for whatever fails here
            why = f"the residual stream was not observed: {shorten(error)}"
            result.stats.header.notes = sorted({*result.stats.header.notes, why})
    return result


def _part(domains: dict[str, Windows], batch_size: int, first: int, step: int) -> dict[str, Windows]:
    """Of the batches of all domains, every step-th from the first on, as windows that give the same batches again."""
    if step == 1:
        return domains
    taken, number = {}, 0
    for domain, windows in domains.items():
        runs = list(batches(windows, batch_size))
        mine = [run for place, run in enumerate(runs, number) if place % step == first]
        number += len(runs)
        if mine:
            ids, numbers = map(torch.cat, zip(*mine))
            taken[domain] = replace(windows, ids=ids, numbers=numbers)
    if number < step:
        raise SedetectError(f"{number} batches do not make {step} parts; give more --tokens or a smaller --batch-size")
    return taken


def _must_stream(model: Any, stream: bool | None, device: str | None, dtype: str) -> bool:
    """What stream comes to: the caller's word, or whether a checkpoint folder is too large for the device."""
    if not isinstance(model, (str, os.PathLike)):
        if stream:
            raise SedetectError(f"{type(model).__name__}: a loaded model is not streamed; give the checkpoint's folder")
        return False
    why = too_large(model, device, dtype) if stream is None and Path(model).is_dir() else None
    if why is not None:
        warnings.warn(f"{model}: {why}", stacklevel=3)
    return bool(stream) or why is not None


def _measure(
    result: ModelProfile,
    opened: OpenModel,
    calibration: Calibration,
    batch_size: int,
    settings: dict[str, Any],
    *,
    until_stable: int | None,
    keep_rounds: bool,
    progress: Callable[[str, int, int | None], None],
    stop: Callable[[], bool],
) -> int:
    """Run the windows through a loaded model, into result; returns how many tokens were run."""
    in_rounds = until_stable is not None or keep_rounds
    if in_rounds:
        batch_size = min(batch_size, ROUND_WINDOWS)
    done, start = 0, time.perf_counter()
    with SourcesProfile(opened.model, opened.banks, **settings) as prof:
        result.seconds += time.perf_counter() - start
        for part in _rounds(calibration.domains, batch_size) if in_rounds else [calibration.domains]:
            measured: dict[str, ModelStats] = {}
            for domain, windows in part.items():
                start = time.perf_counter()
                prof.begin(windows.source, windows.info)
                for ids, numbers in batches(windows, batch_size):
                    result.interrupted = stop()
                    if result.interrupted:
                        break
                    prof.batch(sequence_ids=numbers)
                    run_tokens(opened.model, ids)
                    done += ids.numel()
                    progress(domain, done, calibration.used)
                stats = prof.take()
                result.seconds += time.perf_counter() - start
                if stats.header.tokens:
                    measured[domain] = stats
                if result.interrupted:
                    break
            for domain, stats in measured.items():
                result.domains[domain] = result.domains.get(domain, ModelStats.empty()).merge(stats)
            if result.interrupted:
                break
            if in_rounds:
                result.rounds.append((done, _super_experts(merge_all(result.domains.values()))))
                result.stable_after = _stable_after(result.rounds, until_stable or 1)
                if keep_rounds:
                    result.shards.append(merge_all(measured.values()))
                if until_stable is not None and result.stable_after is not None:
                    break
    return done


class _Stopped(Exception):
    pass


def _check(stop: Callable[[], bool], tokens: int) -> None:
    if stop():
        raise _Stopped


def _device_name(device: torch.device) -> str:
    """A GPU's name, or the kind of the device and the machine's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _rounds(domains: dict[str, Windows], count: int) -> list[dict[str, Windows]]:
    """The windows of every domain in parts of count; the last rounds hold only the domains that have windows left."""
    parts = {
        domain: [replace(windows, ids=ids, numbers=numbers) for ids, numbers in batches(windows, count)]
        for domain, windows in domains.items()
    }
    longest = max(map(len, parts.values()))
    return [{domain: mine[i] for domain, mine in parts.items() if i < len(mine)} for i in range(longest)]


def _super_experts(stats: ModelStats) -> tuple[str, ...]:
    return tuple(str(expert) for expert in rank(stats).found)


def _stable_after(rounds: list[tuple[int, tuple[str, ...]]], unchanged: int) -> int | None:
    """Tokens after which the last set first stood, if at least unchanged rounds followed that had it too."""
    first = len(rounds) - 1
    while first and set(rounds[first - 1][1]) == set(rounds[-1][1]):
        first -= 1
    return rounds[first][0] if len(rounds) - 1 - first >= unchanged else None
