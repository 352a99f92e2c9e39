"""Row statistics: the contribution of one routed row, from the down_proj output as the layer stores it."""

from dataclasses import dataclass

import torch

from sedetect.kernels import tiles
from sedetect.kernels.records import INF_BITS, float_bits

FP16_MAX = 65504.0  # largest finite float16
FP8_MAX = 448.0  # largest finite float8_e4m3fn
_TYPES = (torch.float32, torch.int32, torch.float32, *3 * (torch.int32,), torch.float32, torch.int32)


@dataclass
class RowStats:
    """Per sorted row r, y = its down_proj output (H), h = its input (I).

    peak        (S,) float32: the element of y with the largest |y|, signed; the lowest channel of equals. NaN counts as
                larger than Inf and is always the same positive NaN.
    channel     (S,) int32: its channel
    sqnorm      (S,) float32: sum of y^2
    nonfinite, over_fp16, over_fp8  (S,) int32: elements that are NaN or Inf; finite beyond 65504; finite beyond 448
    in_peak, in_channel: peak and channel of h
    """

    peak: torch.Tensor
    channel: torch.Tensor
    sqnorm: torch.Tensor
    nonfinite: torch.Tensor
    over_fp16: torch.Tensor
    over_fp8: torch.Tensor
    in_peak: torch.Tensor
    in_channel: torch.Tensor

    @classmethod
    def empty(cls, rows: int) -> "RowStats":
        """Uninitialized, on the CPU, for csrc/ to fill."""
        return cls(*(torch.empty(rows, dtype=dtype) for dtype in _TYPES))

    def tensors(self) -> list[torch.Tensor]:
        return list(vars(self).values())

    @property
    def best(self) -> torch.Tensor:
        """(S,) float32: largest |y|."""
        return self.peak.abs()


@dataclass
class RowParts:
    """The GPU kernels' statistics of every row, instead of RowStats: the magnitude of its largest elements, and the
    part of the row that has them. Their update looks up where in the part, and counts what is NaN or too large, only
    for the few rows that enter a list of kept records or have something to count. Until then y and h must stay as they
    are.

    best      (S,) float32: largest |y| of a row; NaN if it has one
    part      (S,) int32: the first part of y with it; parts are y_part_width columns wide
    sqnorm    (S,) float32: as in RowStats
    in_parts  (P, S) float32: largest |h| of every part of a row; parts are h_part_width columns wide
    y         (S, H), h (S, I): the rows themselves
    """

    best: torch.Tensor
    part: torch.Tensor
    sqnorm: torch.Tensor
    in_parts: torch.Tensor
    y: torch.Tensor
    h: torch.Tensor

    @classmethod
    def empty(cls, y: torch.Tensor, h: torch.Tensor, in_parts: torch.Tensor) -> "RowParts":
        """best, part and sqnorm uninitialized, for a kernel to fill."""
        rows, dtypes = y.shape[0], (torch.float32, torch.int32, torch.float32)
        best, part, sqnorm = (y.new_empty(rows, dtype=dtype) for dtype in dtypes)
        return cls(best, part, sqnorm, in_parts, y, h)

    @property
    def y_part_width(self) -> int:
        return tiles.part(tiles.next_power_of_2(self.y.shape[1]), self.y.dtype)

    @property
    def h_part_width(self) -> int:
        return tiles.next_power_of_2(tiles.cdiv(self.h.shape[1], self.in_parts.shape[0]))


def row_stats_torch(y: torch.Tensor, h: torch.Tensor) -> RowStats:
    """The definition of RowStats for y (S, H) and h (S, I)."""
    peak, channel = _peak(y)
    in_peak, in_channel = _peak(h)
    magnitude = y.float().abs()
    finite = magnitude.isfinite()
    return RowStats(
        peak,
        channel,
        magnitude.square().sum(1),
        (~finite).sum(1, dtype=torch.int32),
        (finite & (magnitude > FP16_MAX)).sum(1, dtype=torch.int32),
        (finite & (magnitude > FP8_MAX)).sum(1, dtype=torch.int32),
        in_peak,
        in_channel,
    )


def _peak(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(peak, channel) of each row. argmax on integer bits takes NaN first and the lowest of equals."""
    x = x.float()
    bits = float_bits(x.abs())
    best = bits.amax(1, keepdim=True)
    channels = torch.arange(x.shape[1], device=x.device)
    channel = torch.where(bits == best, channels, x.shape[1]).amin(1)
    value = x.gather(1, channel[:, None])[:, 0]
    value = torch.where(best[:, 0] > INF_BITS, torch.nan, value)
    return value, channel.to(torch.int32)
