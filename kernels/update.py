"""Update: row statistics of one experts call, merged into the bank's state.

Rows that do not count (padding, sentinels, a routing weight of exactly 0) are left out of everything.
"""

from dataclasses import dataclass

import torch

from sedetect.kernels.plan import Plan
from sedetect.kernels.records import COLUMN, RECORD, float_bits, sort_records
from sedetect.kernels.row_stats import RowStats


@dataclass
class Rows:
    """Which row of the model's forward is which token; T tokens in the order the experts see them.

    counted   (T,) bool: not padding, not after the end of its sequence
    first     (T,) bool: first counted token of its sequence
    sequence, position, token  (T,) int64; -1 where unknown
    source    number of the calibration source
    """

    counted: torch.Tensor
    first: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    source: int = 0

    @classmethod
    def unmapped(cls, tokens: int, device: torch.device | str) -> "Rows":
        """Rows of which nothing is known: all count, none is first."""
        unknown = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        everything = torch.ones(tokens, dtype=torch.bool, device=device)
        return cls(everything, ~everything, unknown, unknown, unknown)

    def tensors(self) -> list[torch.Tensor]:
        return [self.counted, self.first, self.sequence, self.position, self.token]

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(t.to(device, non_blocking=True) for t in self.tensors()), self.source)


def update_torch(state, stats: RowStats, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
    """Merge one call into state, in place.

    Args:
        state: sedetect.stats.BankStats of E experts.
        stats: of the S sorted rows.
        gates: (T, k) routing weights.
        rows: of the T tokens.
    """
    slots = plan.order
    token = slots // plan.top_k
    row = torch.arange(len(slots), device=slots.device)
    expert = torch.searchsorted(plan.offsets[1:].contiguous(), row, right=True)  # E for sentinels
    gate = gates.reshape(-1)[slots].float()
    counted = rows.counted[token] & (gate != 0) & (expert < plan.num_experts)
    first = counted & rows.first[token]
    summed = counted & (stats.nonfinite == 0) & gate.isfinite()

    def per_expert(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        total = torch.zeros(plan.num_experts + 1, dtype=dtype, device=values.device)
        return total.index_add_(0, expert, values.to(dtype))[:-1]

    counts = (counted, first, stats.nonfinite * counted, stats.over_fp16 * counted, stats.over_fp8 * counted)
    state.counts += torch.stack([per_expert(c, torch.int64) for c in counts], dim=1)
    norm = stats.sqnorm.sqrt().double()
    gate64 = gate.double()
    sums = (gate64, torch.where(first, gate64, 0), norm, stats.sqnorm, gate64 * norm)
    state.sums += torch.stack([per_expert(torch.where(summed, s, 0), torch.float64) for s in sums], dim=1)

    record = torch.zeros(len(slots), len(RECORD), dtype=torch.int64, device=slots.device)
    columns = {
        "source": rows.source,
        "sequence": rows.sequence[token],
        "position": rows.position[token],
        "token": rows.token[token],
        "gate": float_bits(gate),
        "in_value": float_bits(stats.in_peak),
        "in_channel": stats.in_channel,
    }
    for name, values in columns.items():
        record[:, COLUMN[name]] = values

    def keep(records: torch.Tensor, peak: torch.Tensor, channel: torch.Tensor, taken: torch.Tensor) -> None:
        record[:, COLUMN["value"]] = float_bits(peak.abs())
        record[:, COLUMN["sign"]] = (peak < 0).to(torch.int64)
        record[:, COLUMN["channel"]] = channel
        for e in expert[taken].unique().tolist():
            candidates = torch.cat((records[e], record[taken & (expert == e)]))
            records[e] = sort_records(candidates[None], records.shape[1])[0]

    keep(state.outliers, stats.peak, stats.channel, counted & ~first)
    keep(state.first_outliers, stats.peak, stats.channel, first)
    keep(state.in_max, stats.in_peak, stats.in_channel, counted)
