"""What --experts and --ablate choose: candidates, names, random:N, top-frequency:N."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sedetect.cli.shared import console, progress_bar
from sedetect.errors import Argument, SedetectError
from sedetect.results import Results

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sedetect.calibration.windows import Text
    from sedetect.experiments.targets import Target
    from sedetect.stats.model import ModelStats


def check_choices(option: str, spec: str, model: PreTrainedModel, stats: Path | None = None) -> None:
    """Raise the errors that choose would raise, using the model without its weights."""
    from sedetect.experiments.targets import check_choice, needs_statistics
    from sedetect.models.identity import check_statistics

    with _spelled(option):
        check_choice(spec, model)
    if stats is not None and needs_statistics(spec):
        check_statistics(Results(stats).stats().header, model, str(stats))


def choose(
    option: str,
    spec: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | None,
    text: Text,
    *,
    stats: Path | None = None,
    draw: int = 0,
) -> list[Target]:
    """The experts that an option names. Where that takes statistics: from stats, or else from a profile of this text.

    draw is the seed of random:N. Where "candidates" finds none, the headline is printed and the list is empty.
    """
    from sedetect.experiments.targets import choose_experts, needs_statistics
    from sedetect.models.identity import check_statistics
    from sedetect.ranking.rule import rank

    state, residual, proof = None, None, None
    with _spelled(option):
        if needs_statistics(spec):
            if stats is None:
                state = _profile(model, tokenizer, data, text)
            else:
                state = Results(stats).stats()
                check_statistics(state.header, model, str(stats))
                residual, proof = Results(stats).residual(), Results(stats).proof()
        chosen = choose_experts(spec, model, state, draw, residual, proof)
    if not chosen and state is not None:  # only a choice by statistics can be empty
        found = rank(state, residual=residual, proof=proof).headline
        console.print(f"{option} {spec}: {found}", markup=False, highlight=False, soft_wrap=True)
    return chosen


@contextmanager
def _spelled(option: str) -> Iterator[None]:
    """Errors raised inside name the option."""
    try:
        yield
    except SedetectError as error:
        raise SedetectError(*(option if part == Argument("spec") else part for part in error.args)) from None


def _profile(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: str | None, text: Text) -> ModelStats:
    from sedetect.profiling.pipeline import profile_model

    with progress_bar() as bar:
        task = bar.add_task("profile", total=None)
        return profile_model(
            model,
            data,
            tokenizer=tokenizer,
            progress=lambda domain, done, total: bar.update(task, completed=done, total=total),
            text=text,
        ).stats
