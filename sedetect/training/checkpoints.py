"""A series of checkpoints, measured one after another on the same text."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sedetect.calibration.records import Document
from sedetect.calibration.windows import Text
from sedetect.checkpoints.options import Loading
from sedetect.errors import Argument, SedetectError
from sedetect.models.identity import model_id
from sedetect.models.loading import prepare_model
from sedetect.training.monitor import SMALL
from sedetect.training.series import Series
from sedetect.training.states import StateMeter, fixed_text

_STEP = re.compile(r"step[-_]?(\d+)|(\d+)\D*$", re.IGNORECASE)


def follow(
    models: list[str],
    folder: str | os.PathLike[str],
    *,
    revisions: list[str] | None = None,
    texts: str | os.PathLike[str] | dict[str, list[str]] | dict[str, list[Document]] | None = None,
    text: Text = SMALL,
    loading: Loading = Loading(),
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Series:
    """Measure checkpoints of one model, by their steps, into the series of a folder.

    The step of a checkpoint is the number in its name ("checkpoint-1200", "step1000-tokens4B"), or its place where a
    name has none, or two have the same. What the series holds already, on this text, is not measured again.

    Args:
        models: folders or hub names; one folder may hold the checkpoints, each in a folder of its own.
        folder: of the series.
        revisions: of the one model given, in place of several models.
        progress: called with the name, and how many of how many are done.
    Raises:
        SedetectError: for what profile_model refuses, for checkpoints of different models or tokenizers, and for a
            step that is another checkpoint's in the series.
    """
    if revisions and len(models) != 1:
        raise SedetectError(f"{len(models)} models: ", Argument("revisions"), " are of one; give one model")
    names = revisions or _expanded(models)
    series = Series(folder)
    known = {state.step: state.name for state in series.states()}
    steps = _steps(names)
    for number, (step, name) in enumerate(sorted(zip(steps, names, strict=True))):
        progress(name, number, len(names))
        chosen = replace(loading, revision=name) if revisions else loading
        prepared = prepare_model(models[0] if revisions else name, None, chosen)
        fixed = fixed_text(prepared.empty, prepared.tokenizer, texts, text)
        series.check(fixed.windows.source, model_id(prepared.empty))
        if Path(name).name in known.values():
            continue
        if step in known:
            raise SedetectError(
                f"{series.path}: step {step} is that of {known[step] or 'a training run'}, not of {name}; give all "
                "checkpoints of a series at once, or a new folder"
            )
        opened = prepared.load()
        series.append(*StateMeter(opened.model, opened.banks, fixed).measure(step, Path(name).name))
        del opened, prepared  # before the next is loaded
    progress("", len(names), len(names))
    return series


def _expanded(models: list[str]) -> list[str]:
    """The checkpoints in a folder that is not a checkpoint itself."""
    if len(models) == 1 and Path(models[0]).is_dir() and not (Path(models[0]) / "config.json").exists():
        found = sorted(str(file.parent) for file in Path(models[0]).glob("*/config.json"))
        if not found:
            raise SedetectError(
                f"{models[0]}: is neither a checkpoint nor a series nor a folder of checkpoints; give one of these"
            )
        return found
    return models


def _steps(names: list[str]) -> list[int]:
    """The number in each name if these are distinct, else places."""
    found = [_STEP.search(Path(name).name) for name in names]
    steps = [int(next(filter(None, one.groups()))) for one in found if one is not None]
    return steps if len(set(steps)) == len(names) else list(range(len(names)))
