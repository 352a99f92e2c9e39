"""profile_model: the whole calibration, from a checkpoint and texts to merged statistics."""

import inspect
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sedetect.calibration import (
    Calibration,
    Document,
    batches,
    check_vocabulary,
    load_texts,
    make_windows,
    prefix_ids,
)
from sedetect.checkpoint import check_checkpoint, load_model, load_tokenizer
from sedetect.errors import SedetectError
from sedetect.hf import find_banks
from sedetect.profiler import profile
from sedetect.stats import ModelStats, merge_all


@dataclass
class ModelProfile:
    """What profile_model measured.

    stats         of all domains together
    domains       per domain; they merge to stats
    seconds       in the model's forwards and the statistics, without loading
    asked         tokens asked for; stats.header.tokens were used
    interrupted   stop() ended it early
    """

    stats: ModelStats
    domains: dict[str, ModelStats] = field(default_factory=dict)
    seconds: float = 0.0
    asked: int = 0
    interrupted: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None


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
    progress: Callable[[str, int, int], None] = lambda domain, done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> ModelProfile:
    """Profile a model on calibration text. Domains never share a batch.

    Args:
        model: a checkpoint folder, a hub name, or a loaded model (then tokenizer is needed).
        texts: None for the embedded corpus, a path or hub data set as load_texts takes them, or domain -> documents.
        tokens, seq_len, seed, chat_template: as in make_windows.
        batch_size: windows per forward.
        device, dtype, revision, attn, trust_remote_code: as in load_model.
        backend, channels, coactivation: as in profile.
        progress: called with (domain, tokens done, tokens in all) after every batch.
        stop: asked before every batch; once it is true, what was measured so far is returned.
    Raises:
        SedetectError: for bad input, before anything is measured.
    """
    options = {"device": device, "dtype": dtype, "revision": revision, "attn": attn}
    model, tokenizer, notes = open_model(model, tokenizer, **options, trust_remote_code=trust_remote_code)
    cut = {"tokens": tokens, "seq_len": seq_len, "seed": seed, "chat_template": chat_template}
    calibration = calibration_windows(model, tokenizer, texts, **cut)
    prefix = next(iter(prefix_ids(tokenizer)), None)
    total, done, seconds, interrupted = calibration.used, 0, 0.0, False
    domains: dict[str, ModelStats] = {}
    for domain, windows in calibration.domains.items():
        if interrupted:
            break
        settings = {"backend": backend, "channels": channels, "coactivation": coactivation}
        start = time.perf_counter()
        with profile(model, source=windows.source, info=windows.info, prefix=prefix, **settings) as prof:
            for ids, numbers in batches(windows, batch_size):
                interrupted = stop()
                if interrupted:
                    break
                prof.batch(sequence_ids=numbers)
                model(input_ids=ids.to(model.device), **_lean(model))
                done += ids.numel()
                progress(domain, done, total)
        stats = prof.stats
        seconds += time.perf_counter() - start
        if stats.header.tokens:
            domains[domain] = stats
    for stats in domains.values():
        planned = [] if interrupted else calibration.notes
        stats.header.notes = sorted({*stats.header.notes, *planned, *notes})
    return ModelProfile(merge_all(domains.values()), domains, seconds, tokens, interrupted, tokenizer)


def open_model(
    model: str | os.PathLike | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A MoE model with its tokenizer, and notes on how it loaded; a checkpoint is loaded, a loaded model passed on.

    Raises SedetectError for what load_model, load_tokenizer and find_banks refuse, and for a loaded model without
    tokenizer.
    """
    notes: list[str] = []
    if isinstance(model, (str, os.PathLike)):
        if Path(model).is_dir():
            check_checkpoint(model, trust_remote_code=trust_remote_code)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = tokenizer or load_tokenizer(model, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            model = load_model(model, device=device, dtype=dtype, attn=attn, **options)
        notes = [str(warning.message) for warning in caught if "weights are not used" in str(warning.message)]
    elif tokenizer is None:
        raise SedetectError(f"{type(model).__name__}: a loaded model needs its tokenizer; pass tokenizer=")
    find_banks(model)  # refuse what is no MoE before anything is asked of it
    if not prefix_ids(tokenizer) and tokenizer.bos_token is not None:
        notes.append(
            f"the tokenizer has a {tokenizer.bos_token} but puts nothing before a text; "
            "if the model was trained with it, super experts stay silent without it"
        )
    return model, tokenizer, notes


def calibration_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | os.PathLike | dict[str, list[Document]] | None,
    **settings: Any,
) -> Calibration:
    """make_windows of texts (as profile_model takes them), checked against the model's vocabulary and positions."""
    named = "embedded" if texts is None else "texts" if isinstance(texts, dict) else str(texts)
    if isinstance(texts, dict):
        for domain, documents in texts.items():
            if not isinstance(documents, (list, tuple)):
                raise SedetectError(f"texts[{domain!r}]: is a {type(documents).__name__}; give a list of documents")
    elif texts is None or isinstance(texts, (str, os.PathLike)):
        texts = load_texts(texts)
    else:
        raise SedetectError(f"texts: is a {type(texts).__name__}; give a path, or a dictionary of lists of documents")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    calibration = make_windows(tokenizer, texts, **settings, corpus=named, max_positions=positions)
    for windows in calibration.domains.values():
        check_vocabulary(tokenizer, windows, model.get_input_embeddings().weight.shape[0])
    return calibration


def _lean(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that spare what calibration never reads: the cache, and all logits but the last."""
    wanted = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in inspect.signature(model.forward).parameters}
