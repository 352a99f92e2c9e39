"""Rows: the token of each row of an experts call, and whether it counts."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch


@dataclass
class Rows:
    """The token of each row of the model's forward; T tokens in the order in which the experts see them.

    counted   (T,) bool: not padding, not after the end of its sequence
    first     (T,) bool: first counted token of its sequence
    sequence, position, token_id  (T,) int64; -1 where unknown
    source    number of the calibration source
    parts     the same T rows once for each modality, where they are told apart: counted are those of the modality, and
              first are the first tokens of its spans (of a text's sequence, of an image)
    """

    counted: torch.Tensor
    first: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    token_id: torch.Tensor
    _: KW_ONLY
    source: int = 0
    parts: tuple["Rows", ...] = ()

    @classmethod
    def unmapped(cls, tokens: int, device: torch.device | str) -> "Rows":
        """Rows without known tokens: all count, none is first."""
        unknown = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        everything = torch.ones(tokens, dtype=torch.bool, device=device)
        return cls(everything, ~everything, unknown, unknown, unknown)

    def tensors(self) -> list[torch.Tensor]:
        return [self.counted, self.first, self.sequence, self.position, self.token_id]

    def to(self, device: torch.device) -> "Rows":
        # Without a wait, the host would read an asynchronous copy before it is made.
        return self._mapped(lambda t: t.to(device, non_blocking=device.type == "cuda"))

    def take(self, index: torch.Tensor) -> "Rows":
        """The rows of these numbers (N,) int64."""
        return self._mapped(lambda t: t.index_select(0, index))

    def _mapped(self, of: Callable[[torch.Tensor], torch.Tensor]) -> "Rows":
        parts = tuple(part._mapped(of) for part in self.parts)
        return Rows(*map(of, self.tensors()), source=self.source, parts=parts)
