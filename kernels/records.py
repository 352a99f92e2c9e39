"""Records: the kept rows of an expert, as integers that order and merge exactly; and the columns of every table.

COUNTS and SUMS are the columns of the int64 and float64 tables beside them: sedetect.stats.bank.BankStats says what
each is, and csrc/columns.h repeats the three lists.

A record says which routed row produced an extreme value, and where. Records are stored as int64 of shape
(E, K, 10), one column per name in RECORD, so that the order of two records is an order of integers: no
rounding, NaN above Inf, the same on every device.

    value     bits of |y| as float32; -1 in an empty slot; every NaN has the bits NAN_BITS
    sign      1 if y is negative, else 0
    channel   output channel of the value (of h for in_max)
    source    number of the calibration source, in the sorted order of the sources' names
    sequence  sequence id within the source; -1 where rows could not be mapped
    position  position of the token in its sequence; -1 where rows could not be mapped
    token_id  -1 for inputs_embeds and where rows could not be mapped
    gate      bits of the routing weight as float32
    in_value  bits of the largest |h| of that row as float32, with h's sign in bit 31
    in_channel  its channel

Records sort by value, descending, then by (source, sequence, position, channel), ascending. Slots are
sorted; empty ones come last. Keeping the first K of a union is commutative and associative.
"""

from typing import NamedTuple

import torch

COUNTS = ("rows", "first_rows", "nonfinite", "over_fp16", "over_fp8")
SUMS = ("gate_sum", "gate_first_sum", "norm_sum", "sqnorm_sum", "gate_norm_sum")


class Record(NamedTuple):
    """A record as numbers: as the columns above, but value, gate and in_value are floats, and sign is 1 or -1."""

    value: float
    sign: int
    channel: int
    source: int
    sequence: int
    position: int
    token_id: int
    gate: float
    in_value: float
    in_channel: int


RECORD = Record._fields
COLUMN = {name: i for i, name in enumerate(RECORD)}
TIE_ORDER = ("source", "sequence", "position", "channel")
NAN_BITS = 0x7FC00000
INF_BITS = 0x7F800000
EMPTY = -1


def empty_records(num_experts: int, k: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Records of experts without rows: (E, K, 10) int64, every value -1 and everything else 0."""
    records = torch.zeros(num_experts, k, len(RECORD), dtype=torch.int64, device=device)
    records[:, :, COLUMN["value"]] = EMPTY
    return records


def float_bits(x: torch.Tensor) -> torch.Tensor:
    """Bits of x as float32, as int64 in [0, 2^32); every NaN becomes NAN_BITS."""
    x = x.to(torch.float32)
    bits = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return torch.where(x.isnan(), NAN_BITS, bits)


def bits_float(bits: torch.Tensor) -> torch.Tensor:
    """The float32 whose bits are the low 32 of each int64."""
    low = bits & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).view(torch.float32)


def column(records: torch.Tensor, name: str) -> torch.Tensor:
    """One column of records (..., 10) in its own type.

    value is float32, -1 where the slot is empty; gate and in_value are float32; the rest stay int64.
    """
    raw = records[..., COLUMN[name]]
    if name == "value":
        return torch.where(raw == EMPTY, -1.0, bits_float(raw))
    return bits_float(raw) if name in ("gate", "in_value") else raw


def decode(records: torch.Tensor) -> list[Record | None]:
    """Records (N, 10) as numbers; None for an empty slot."""
    columns = {name: column(records, name).tolist() for name in RECORD}
    columns["sign"] = [-1 if negative else 1 for negative in columns["sign"]]
    return [None if record.value == EMPTY else record for record in map(Record, *columns.values())]


def sort_records(records: torch.Tensor, k: int) -> torch.Tensor:
    """The first k of each expert's records (E, N, 10), N >= k, in the order of the module's docstring."""
    order = torch.arange(records.shape[1], device=records.device).expand(records.shape[:2])
    # Successive stable sorts, least significant key first.
    for name in reversed(TIE_ORDER):
        key = records[..., COLUMN[name]].gather(1, order)
        order = order.gather(1, key.argsort(dim=1, stable=True))
    key = records[..., COLUMN["value"]].gather(1, order)
    order = order.gather(1, key.argsort(dim=1, descending=True, stable=True))[:, :k]
    return records.gather(1, order[..., None].expand(-1, -1, records.shape[2]))


def merge_records(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The best K of two record tables (E, K, 10)."""
    return sort_records(torch.cat((a, b), dim=1), a.shape[1])
