"""Held-out text: the calibration windows left for evaluation and proof."""

from dataclasses import replace

import torch

from sedetect.calibration.windows import Windows, share_windows
from sedetect.errors import Argument, SedetectError
from sedetect.stats.model import ModelStats


def held_out(domains: dict[str, Windows], stats: ModelStats, tokens: int | None = None) -> dict[str, Windows]:
    """The windows that are not in stats, identified by source and number; a domain without any is left out.

    tokens: take only the first windows up to this budget, shared as in make_windows.

    A profile with windows of another length has other sources, and is not recognized.
    Raises SedetectError where no window is left.
    """
    left = {}
    for domain, windows in domains.items():
        source = stats.header.sources.get(windows.source)
        seen = torch.zeros(len(windows.numbers), dtype=torch.bool)
        for start, end in source.ranges if source else ():
            seen |= (windows.numbers >= start) & (windows.numbers < end)
        if not seen.all():
            left[domain] = replace(windows, ids=windows.ids[~seen], numbers=windows.numbers[~seen])
    if not left:
        raise SedetectError(
            "the statistics include all of the evaluation text; give more ",
            Argument("tokens"),
            " than were profiled, or other ",
            Argument("data"),
        )
    if tokens is not None:
        size = next(iter(left.values())).ids.shape[1]
        given = share_windows(tokens // size, {domain: len(windows.ids) for domain, windows in left.items()})
        left = {d: replace(w, ids=w.ids[: given[d]], numbers=w.numbers[: given[d]]) for d, w in left.items()}
    return left


def refuse_other_windows(domains: dict[str, Windows], stats: ModelStats, seq_len: int) -> None:
    """Raise SedetectError where stats hold the same text in windows of another length, which cannot be matched."""
    if any(windows.source in stats.header.sources for windows in domains.values()):
        return
    corpora = {windows.info["corpus"] for windows in domains.values()}
    for source in stats.header.sources.values():
        if source.info.get("corpus") in corpora:
            raise SedetectError(
                Argument("seq_len"),
                f" {seq_len}: the statistics are of the same text in windows of {source.info.get('window')}; give that "
                "length, or other ",
                Argument("data"),
            )
