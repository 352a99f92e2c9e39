"""Rows: which token each row of an experts call is, and whether it counts."""

from dataclasses import KW_ONLY, dataclass

import torch


@dataclass
class Rows:
    """Which row of the model's forward is which token; T tokens in the order the experts see them.

    counted   (T,) bool: not padding, not after the end of its sequence
    first     (T,) bool: first counted token of its sequence
    sequence, position, token_id  (T,) int64; -1 where unknown
    source    number of the calibration source
    """

    counted: torch.Tensor
    first: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    token_id: torch.Tensor
    _: KW_ONLY
    source: int = 0

    @classmethod
    def unmapped(cls, tokens: int, device: torch.device | str) -> "Rows":
        """Rows of which nothing is known: all count, none is first."""
        unknown = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        everything = torch.ones(tokens, dtype=torch.bool, device=device)
        return cls(everything, ~everything, unknown, unknown, unknown)

    def tensors(self) -> list[torch.Tensor]:
        return [self.counted, self.first, self.sequence, self.position, self.token_id]

    def to(self, device: torch.device) -> "Rows":
        # The host would read a copy to it that nobody waits for before it is made.
        return Rows(*(t.to(device, non_blocking=device.type == "cuda") for t in self.tensors()), source=self.source)
