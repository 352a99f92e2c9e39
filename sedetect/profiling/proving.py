"""Proof of the candidates of statistics, on held-out text."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sedetect.calibration.held_out import held_out, refuse_other_windows
from sedetect.calibration.records import Document
from sedetect.calibration.windows import Text, calibration_windows, prefix_ids
from sedetect.experiments.proof import SMALLEST, candidates_of, prove
from sedetect.experiments.residual_stream import observe_residual
from sedetect.stats.model import ModelStats
from sedetect.stats.proof import Proof
from sedetect.stats.residual import Residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Proving:
    """The settings of a proof.

    experts     names, separated by commas; None: the candidates of the statistics (candidates_of)
    tokens      of text for the proof, all of windows that the statistics did not see
    smallest, level, chain      as prove takes them
    """

    experts: str | None = None
    tokens: int = 32768
    smallest: float = SMALLEST
    level: float = 0.05
    chain: bool = False


def prove_profile(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Document]] | None,
    text: Text,
    stats: ModelStats,
    proving: Proving = Proving(),
    *,
    residual: Residual | None = None,
    progress: Callable[[str, int, int, float], None] = lambda label, done, total, seconds: None,
) -> Proof | None:
    """prove for the candidates of this model's statistics; None without candidates.

    Args:
        texts, text: those of the profile, of which other windows are taken.
        residual: what was seen of the model's residual stream; observed here where it is not given.
    Raises:
        SedetectError: for what prove and candidates_of refuse, for windows of another length than those of the
            statistics, and where they saw all of the text.
    """
    more = replace(text, tokens=proving.tokens + stats.header.tokens)
    domains = calibration_windows(model, tokenizer, texts, more).domains
    refuse_other_windows(domains, stats, text.seq_len)
    windows = held_out(domains, stats, proving.tokens)
    prefix = len(prefix_ids(tokenizer))
    if residual is None:
        residual = observe_residual(model, windows, prefix=prefix)
    chosen = candidates_of(stats, residual, proving.experts)
    if not chosen:
        return None
    return prove(
        model,
        windows,
        chosen,
        prefix=prefix,
        smallest=proving.smallest,
        level=proving.level,
        chain=proving.chain,
        seed=text.seed or 0,
        batch_size=text.batch_size,
        progress=progress,
    )
