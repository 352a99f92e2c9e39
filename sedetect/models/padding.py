"""Padding that no attention mask hides: left out where its token id is given, noticed where it is not."""

from collections.abc import Iterator
from typing import Any

import torch

from sedetect.stats.note import Note

# A run of one token is taken for padding where so many sequences, and such a share of all, begin or end with it.
_RUNS, _RUNS_SHARE = 2, 0.05


class Padding:
    """What padding has been seen in new sequences; everything stays on the device until notes().

    Args:
        pad: the token id of padding, or None.
        begins, ends: token ids that begin or end a sequence.
        vocabulary: number of token ids, None where it is not known: then nothing is noticed.
    """

    def __init__(self, pad: int | None, begins: set[int | None], ends: set[int], vocabulary: int | None):
        self._pad, self._begins, self._ends, self._vocabulary = pad, begins, ends, vocabulary
        self._runs: dict[torch.device, torch.Tensor] = {}

    def left_out(self, tokens: torch.Tensor, counted: torch.Tensor, new: Any) -> torch.Tensor:
        """counted (B, L) without the runs of the padding token at one end of tokens (B, L).

        new: whether the sequences begin here, a Python or a () tensor bool.
        """
        if self._pad is None:
            self._notice(tokens, counted, new)
            return counted
        # Hidden tokens do not end a run; of a run that also is a beginning or an end, the token beside the text stays.
        is_pad = counted & (tokens == self._pad)
        left, right = (_run(is_pad | ~counted, end) & is_pad for end in ("left", "right"))
        if self._pad in self._begins:
            left = left & (left.flip(1).cumsum(1).flip(1) > 1)
            right = right & (counted.cumsum(1) > 1)
        if self._pad in self._ends:
            right = right & (right.cumsum(1) > 1)
        side = torch.where(right.sum() >= left.sum(), right, left)
        return counted & ~(side & new)

    def notes(self, sequences: int) -> Iterator[Note]:
        """A note of each end at which so many of all sequences have a run of one token. Synchronizes."""
        for runs in self._runs.values():
            for end, counts in zip(("begin", "end"), runs.cpu(), strict=True):
                count, token = (int(most) for most in counts.max(0))
                if count >= max(_RUNS, _RUNS_SHARE * sequences):
                    text = (
                        f"{count} of {sequences} sequences {end} with a run of token {token} that no mask hides: if it "
                        f"is padding, it was counted; give profile(pad_token_id={token}), or an attention_mask"
                    )
                    yield Note("padding", text, count=count)

    def _notice(self, tokens: torch.Tensor, counted: torch.Tensor, new: Any) -> None:
        """Count the sequences of a batch without padding in its mask that begin or end with a run of one token."""
        length, width = tokens.shape[1], self._vocabulary
        if width is None:
            return
        runs = self._runs.setdefault(tokens.device, torch.zeros(2, width, dtype=torch.int64, device=tokens.device))
        for end, ids in (("left", tokens[:, 0]), ("right", tokens[:, -1])):
            long = _run(tokens == ids[:, None], end).sum(1)
            # Another row of the batch shows how much of it is no padding (two BOS in front of every text).
            same = ids[:, None] == ids
            least = torch.where(same, long[None], 0).amin(1)
            found = (long > 1) & (long < length) & ((long > least) | (end == "right"))
            found = found & counted.all() & new & (ids >= 0) & (ids < width)
            runs[0 if end == "left" else 1].index_add_(0, ids.clamp(0, width - 1), found.to(torch.int64))


def _run(same: torch.Tensor, end: str) -> torch.Tensor:
    """(B, L) bool: the unbroken run of same (B, L) at one end of each row."""
    return same.cumprod(1) != 0 if end == "left" else same.flip(1).cumprod(1).flip(1) != 0
