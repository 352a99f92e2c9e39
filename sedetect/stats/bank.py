"""The state: the statistics of every expert from one calibration pass, as a mergeable value.

A bank is the routed experts of one layer, one shared expert, or one dense MLP. BankStats is its state, a commutative
monoid under merge: counts, maxima and kept rows merge to the same bits in every grouping and order; the float64 sums
agree to 1e-12 relative. The kernels mutate a BankStats on the device; files (sedetect.stats.model) hold one on the CPU.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from sedetect.errors import SedetectError
from sedetect.kernels.records import (
    COLUMN,
    COUNTS,
    EMPTY,
    RECORD,
    SUMS,
    Record,
    column,
    decode,
    empty_records,
    float_bits,
    merge_records,
)

RECORDS = {"outliers": 32, "first_outliers": 8, "in_max": 1}
OPTIONAL = ("channel_max", "in_channel_max", "in_channel_sq", "coactivation", "published_max")
_FILE_DTYPE = {
    "value": torch.float32,
    "sign": torch.int8,
    "channel": torch.int32,
    "source": torch.int32,
    "gate": torch.float32,
    "in_value": torch.float32,
    "in_channel": torch.int32,
}
_FILE_NAME = {"token_id": "token"}  # where it is not the column's


@dataclass
class BankStats:
    """State of one bank; E experts, H output channels, I intermediate channels.

    y is the down_proj output of a counted row (after bias, before the routing weight), h its input, g its routing
    weight (1 for shared and dense banks). Rows of padding, and rows whose routing weight is exactly 0, do not count.

    counts (E, 5) int64, one column per name in COUNTS
        rows          counted rows
        first_rows    of them, first tokens of sequences
        nonfinite     elements of y that are NaN or Inf
        over_fp16     finite elements with |y| > 65504
        over_fp8      finite elements with |y| > 448
    sums (E, 5) float64, one column per name in SUMS; rows with a NaN or Inf in y or g are left out
        gate_sum, gate_first_sum           sum of g; over first tokens
        norm_sum, sqnorm_sum               sum of ||y||_2, of ||y||_2^2
        gate_norm_sum                      sum of g ||y||_2 (REAP, arXiv 2510.13999)
    outliers (E, 32, 10), first_outliers (E, 8, 10), in_max (E, 1, 10) int64: records (sedetect.kernels.records)
        the rows with the largest max|y|, first tokens left out; the same over first tokens; the row with the largest
        max|h| over all of them (value, sign and channel are h's there)
    channel_max (E, H) float32, in_channel_max (E, I) float32, in_channel_sq (E, I) float64, coactivation (E, E) int64:
        optional; max|y| and max|h| per channel, sum of h^2 over finite rows, tokens routed to both experts
    published_max (E,) float32: optional, routed banks only; max|y| over the rows that the published tool reads, see
        sedetect.kernels.optional.update_published_torch; 0 for an expert that saw none
    """

    counts: torch.Tensor
    sums: torch.Tensor
    outliers: torch.Tensor
    first_outliers: torch.Tensor
    in_max: torch.Tensor
    channel_max: torch.Tensor | None = None
    in_channel_max: torch.Tensor | None = None
    in_channel_sq: torch.Tensor | None = None
    coactivation: torch.Tensor | None = None
    published_max: torch.Tensor | None = None

    # The columns of counts and sums, properties that are set below.
    rows: ClassVar[torch.Tensor]
    first_rows: ClassVar[torch.Tensor]
    nonfinite: ClassVar[torch.Tensor]
    over_fp16: ClassVar[torch.Tensor]
    over_fp8: ClassVar[torch.Tensor]
    gate_sum: ClassVar[torch.Tensor]
    gate_first_sum: ClassVar[torch.Tensor]
    norm_sum: ClassVar[torch.Tensor]
    sqnorm_sum: ClassVar[torch.Tensor]
    gate_norm_sum: ClassVar[torch.Tensor]

    def __repr__(self) -> str:
        kept = "".join(f", {name}" for name in OPTIONAL if getattr(self, name) is not None)
        return f"BankStats({self.num_experts} experts, {int(self.rows.sum()):,} rows{kept})"

    @classmethod
    def empty(
        cls,
        num_experts: int,
        device: torch.device | str = "cpu",
        channels: tuple[int, int] | None = None,
        coactivation: bool = False,
        published: bool = False,
    ) -> "BankStats":
        """The empty state. channels is (H, I) to keep the per-channel statistics, published keeps
        published_max."""
        e = num_experts
        state = cls(
            counts=torch.zeros(e, len(COUNTS), dtype=torch.int64, device=device),
            sums=torch.zeros(e, len(SUMS), dtype=torch.float64, device=device),
            **{name: empty_records(e, k, device) for name, k in RECORDS.items()},
        )
        if channels is not None:
            hidden, intermediate = channels
            state.channel_max = torch.zeros(e, hidden, dtype=torch.float32, device=device)
            state.in_channel_max = torch.zeros(e, intermediate, dtype=torch.float32, device=device)
            state.in_channel_sq = torch.zeros(e, intermediate, dtype=torch.float64, device=device)
        if coactivation:
            state.coactivation = torch.zeros(e, e, dtype=torch.int64, device=device)
        if published:
            state.published_max = torch.zeros(e, dtype=torch.float32, device=device)
        return state

    def kept(self) -> list[torch.Tensor]:
        """The fields that are set, in order."""
        # By name: torch 2.11 cannot compile a loop over all attributes.
        return [tensor for tensor in [getattr(self, name) for name in _FIELDS] if tensor is not None]

    def replaced(self, tensors: list[torch.Tensor]) -> "BankStats":
        """The same fields with other tensors, in the order of kept()."""
        names = [name for name in _FIELDS if getattr(self, name) is not None]
        return BankStats(**dict(zip(names, tensors)))

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @property
    def first_max(self) -> torch.Tensor:
        """(E,) float32: largest |y| on first tokens of sequences; 0 where there was none."""
        return column(self.first_outliers, "value")[:, 0].clamp(min=0)

    @property
    def rest_max(self) -> torch.Tensor:
        """(E,) float32: largest |y| on all other counted rows; 0 where there was none."""
        return column(self.outliers, "value")[:, 0].clamp(min=0)

    @property
    def out_max(self) -> torch.Tensor:
        """(E,) float32: largest |y| over all counted rows; 0 for an expert without rows, NaN where a NaN occurred."""
        return torch.maximum(self.first_max, self.rest_max)

    def peak(self) -> torch.Tensor:
        """(E, 10) int64: the record behind out_max; its value is empty for an expert without rows."""
        return merge_records(self.first_outliers[:, :1], self.outliers[:, :1])[:, 0]

    def peak_of(self, expert: int) -> Record | None:
        """The record behind one expert's out_max; None for an expert without rows."""
        (record,) = decode(self.peak()[expert, None])
        return record

    def kept_rows(self, expert: int, first: bool) -> list[Record]:
        """An expert's kept rows on first tokens of sequences, or those on all others, by value, descending."""
        records = self.first_outliers if first else self.outliers
        return [record for record in decode(records[expert]) if record is not None]

    def strongest(self, expert: int, count: int) -> list[tuple[Record, bool]]:
        """The count strongest of an expert's kept rows on first tokens and the count strongest on others, by value,
        descending, each with whether its token is a first one. Rows with a NaN value are left out.
        """
        rows = [(record, first) for first in (True, False) for record in self.kept_rows(expert, first)[:count]]
        return sorted((row for row in rows if not math.isnan(row[0].value)), key=lambda row: -row[0].value)

    def to(self, device: torch.device | str) -> "BankStats":
        """A copy on another device (always a copy)."""
        return self.replaced([tensor.detach().to(device, copy=True) for tensor in self.kept()])

    def among(self, first: int, num_experts: int) -> "BankStats":
        """The state of num_experts experts: these are those from first on, and the others are empty. Coactivation is
        dropped: it needs all experts.
        """
        channels = None
        if self.channel_max is not None and self.in_channel_max is not None:
            channels = (self.channel_max.shape[1], self.in_channel_max.shape[1])
        whole = BankStats.empty(num_experts, self.counts.device, channels, published=self.published_max is not None)
        for f in fields(self):
            if (own := getattr(self, f.name)) is not None and f.name != "coactivation":
                getattr(whole, f.name)[first : first + self.num_experts] = own
        return whole

    def merge(self, other: "BankStats") -> "BankStats":
        """The state of both. Source numbers must mean the same in both (ModelStats.merge ensures it).

        Raises SedetectError where the numbers of experts or channels or the optional statistics differ.
        """
        merged = []
        for name in _FIELDS:
            a, b = getattr(self, name), getattr(other, name)
            if (a is None) != (b is None) or (a is not None and a.shape != b.shape):
                shapes = [None if t is None else tuple(t.shape) for t in (a, b)]
                raise SedetectError(
                    f"{name}: shapes {shapes[0]} and {shapes[1]} do not merge; profile both with the same statistics"
                )
            if a is None:
                continue
            if name in RECORDS:
                merged.append(merge_records(a, b))
            elif name.endswith("_max"):
                merged.append(torch.maximum(a, b))
            else:
                merged.append(a + b)
        return self.replaced(merged)

    def equal(self, other: "BankStats", sums_rtol: float = 1e-12) -> bool:
        """Whether counts, maxima and kept rows are equal bit for bit, and sums within sums_rtol."""
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if a is None or b is None:
                same = a is None and b is None
            elif a.dtype == torch.float64:
                same = a.shape == b.shape and torch.allclose(a, b, rtol=sums_rtol, atol=0, equal_nan=True)
            else:
                same = a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
            if not same:
                return False
        return True

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields as they stand in a file: one tensor per statistic, in natural types."""
        out = {name: self.counts[:, i].contiguous() for i, name in enumerate(COUNTS)}
        out |= {name: self.sums[:, i].contiguous() for i, name in enumerate(SUMS)}
        for name in RECORDS:
            for part in RECORD:
                values = column(getattr(self, name), part)
                out[f"{name}.{_FILE_NAME.get(part, part)}"] = values.to(_FILE_DTYPE.get(part, torch.int64)).contiguous()
        return out | {name: getattr(self, name) for name in OPTIONAL if getattr(self, name) is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "BankStats":
        """The inverse of tensors(). Raises KeyError for a missing statistic, TypeError for one of another type."""
        for names, dtype in ((COUNTS, torch.int64), (SUMS, torch.float64)):
            for name in names:
                if tensors[name].dtype != dtype:
                    raise TypeError(f"{name} is {tensors[name].dtype}")
        parts = {
            "counts": torch.stack([tensors[name] for name in COUNTS], dim=1),
            "sums": torch.stack([tensors[name] for name in SUMS], dim=1),
        }
        for name, k in RECORDS.items():
            records = empty_records(parts["counts"].shape[0], k)
            for part in RECORD:
                values = tensors[f"{name}.{_FILE_NAME.get(part, part)}"]
                bits = float_bits(values) if values.dtype == torch.float32 else values.to(torch.int64)
                if part == "value":
                    bits = torch.where(values == EMPTY, EMPTY, bits)
                records[..., COLUMN[part]] = bits
            parts[name] = records
        return cls(**parts, **{name: tensors[name] for name in OPTIONAL if name in tensors})


_FIELDS = tuple(f.name for f in fields(BankStats))


def _named_column(table: str, index: int, name: str) -> property:
    return property(lambda self: getattr(self, table)[:, index], doc=f"(E,) column {name!r} of {table}.")


for _table, _names in (("counts", COUNTS), ("sums", SUMS)):
    for _index, _name in enumerate(_names):
        setattr(BankStats, _name, _named_column(_table, _index, _name))
