"""Update: row statistics of one experts call, merged into the bank's state.

Rows that do not count (padding, sentinels, a routing weight of exactly 0) are left out of everything.
"""

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.launch import launch
from sedetect.kernels.plan import Plan
from sedetect.kernels.records import COLUMN, COUNTS, INF_BITS, NAN_BITS, RECORD, SUMS, float_bits, sort_records
from sedetect.kernels.row_scan import read_peak, row_counts, some_to_count, stored_parts
from sedetect.kernels.row_stats import RowParts, RowStats
from sedetect.kernels.rows import Rows

_LAST_SOURCE = tl.constexpr(2**31 - 1)
_INF, _NAN, _COLUMNS = tl.constexpr(INF_BITS), tl.constexpr(NAN_BITS), tl.constexpr(len(RECORD))
_VALUE, _SIGN, _CHANNEL, _SOURCE, _SEQUENCE, _POSITION, _TOKEN, _GATE, _IN_VALUE, _IN_CHANNEL = (
    tl.constexpr(COLUMN[name]) for name in RECORD
)
_COUNTS, _SUMS = tl.constexpr(len(COUNTS)), tl.constexpr(len(SUMS))
_ROWS, _FIRST_ROWS, _NONFINITE, _OVER_FP16, _OVER_FP8 = (tl.constexpr(i) for i in range(len(COUNTS)))
_GATE_SUM, _GATE_FIRST_SUM, _NORM_SUM, _SQNORM_SUM, _GATE_NORM_SUM = (tl.constexpr(i) for i in range(len(SUMS)))


def update_torch(state, stats: RowStats, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
    """Merge one call into state, in place.

    Args:
        state: sedetect.stats.bank.BankStats of E experts.
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
    columns: dict[str, torch.Tensor | int] = {
        "source": rows.source,
        "sequence": rows.sequence[token],
        "position": rows.position[token],
        "token_id": rows.token_id[token],
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


@triton.jit
def _block_of(Offsets, block, NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first sorted row, end) of the block-th block of ROWS rows of one expert; expert is E past the last."""
    bins = tl.arange(0, BINS)
    first = tl.load(Offsets + bins, mask=bins < NUM_EXPERTS, other=0)
    end = tl.load(Offsets + bins + 1, mask=bins < NUM_EXPERTS, other=0)
    blocks = (end - first + ROWS - 1) // ROWS
    after = tl.cumsum(blocks, 0)
    expert = tl.sum(((after <= block) & (bins < NUM_EXPERTS)).to(tl.int32), 0)
    mine = bins == expert
    start = tl.sum(tl.where(mine, first + (block - (after - blocks)) * ROWS, 0), 0)
    return expert, start, tl.minimum(start + ROWS, tl.sum(tl.where(mine, end, 0), 0))


@triton.jit
def _value_bits(x):
    """Bits of |x|; every NaN becomes NAN_BITS."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits > _INF, _NAN, bits)


@triton.jit
def _y_peak(
    row, mask, Best, Part, Y,  # rows (N,), and of RowParts
    H: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(peak, channel) of rows, as RowStats has them."""
    best = tl.load(Best + row, mask=mask, other=0).to(tl.int32, bitcast=True)
    return read_peak(Y, row, mask, best, tl.load(Part + row, mask=mask, other=0), H, PART)


@triton.jit
def _h_peak(
    row, mask, InParts, X, slots,  # rows (N,), and of RowParts
    WIDTH: tl.constexpr, IN_PARTS: tl.constexpr, IN_PART: tl.constexpr,
):  # fmt: skip
    """(in_peak, in_channel) of rows, as RowStats has them."""
    best, part = stored_parts(InParts, row, mask, slots, IN_PARTS)
    return read_peak(X, row, mask, best, part, WIDTH, IN_PART)


@triton.jit
def _record_key(row, mask, value, channel, source, Order, Sequence, Position, TOP_K: tl.constexpr):
    """(value and source, sequence, position, channel) of rows, which order records; the first descending."""
    token = tl.load(Order + row, mask=mask, other=0) // TOP_K
    return (
        (tl.where(mask, value.to(tl.int64), -1) << 32) | (-source + _LAST_SOURCE),
        tl.load(Sequence + token, mask=mask, other=0),
        tl.load(Position + token, mask=mask, other=0),
        tl.where(mask, channel, 0).to(tl.int64),
    )


@triton.jit
def _kept_key(Record, mask):
    """The same of records that are kept; that of an empty one where not mask."""
    value = tl.load(Record + _VALUE, mask=mask, other=-1)
    return (
        (value << 32) | (-tl.load(Record + _SOURCE, mask=mask, other=0) + _LAST_SOURCE),
        tl.load(Record + _SEQUENCE, mask=mask, other=0),
        tl.load(Record + _POSITION, mask=mask, other=0),
        tl.load(Record + _CHANNEL, mask=mask, other=0),
    )


@triton.jit
def _precedes(value, sequence, position, channel, value2, sequence2, position2, channel2):
    """Whether the first record stands before the second."""
    result = (position < position2) | ((position == position2) & (channel < channel2))
    result = (sequence < sequence2) | ((sequence == sequence2) & result)
    return (value > value2) | ((value == value2) & result)


@triton.jit
def _offer(
    row, value, part, taken,  # rows of a block, bits of their |peak|, its part, and the rows that the list is for
    Last,  # the last record that the list keeps
    source, X, Order, Sequence, Position,  # X: y or h
    Heads, Numbers, Offers,  # of this block: largest value offered, -1 for none; how many; rows (ROWS,) - output
    ONE: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Offer the rows that stand before the last record of a list; if it keeps ONE, only those of the largest value."""
    least = tl.load(Last + _VALUE).to(tl.int32)
    enters = taken & (value > least)
    # Equals are rare, except in experts that give the same everywhere, such as zero: those must not enter every time.
    equals = taken & (value == least)
    if tl.max(equals.to(tl.int32), 0) > 0:
        _, channel = read_peak(X, row, equals, value, part, WIDTH, PART)
        key, sequence, position, channel = _record_key(
            row, equals, value, channel, source, Order, Sequence, Position, TOP_K
        )
        last, last_sequence, last_position, last_channel = _kept_key(Last, True)
        enters |= equals & _precedes(key, sequence, position, channel, last, last_sequence, last_position, last_channel)
    head = tl.max(tl.where(enters, value, -1), 0)
    if ONE:
        enters = enters & (value == head)
    number = enters.to(tl.int32)
    tl.store(Heads, head)
    tl.store(Numbers, tl.sum(number, 0))
    tl.store(Offers + tl.cumsum(number, 0) - 1, row.to(tl.int32), mask=enters)


@triton.jit(do_not_specialize=["slots", "blocks", "source"])
def _update_blocks(
    Best, Part, Sqnorm, InParts, Y, X,  # RowParts
    Order,  # (S,) int64
    Offsets,  # (E + 1,) int64
    Gates,  # (T, k)
    Counted, First, Sequence, Position,  # Rows, (T,) each
    Outliers, FirstOutliers, InMax,  # (E, K, 10) int64
    Counts,  # (_COUNTS, blocks) int64 - output
    Sums,  # (_SUMS, blocks) float64 - output
    Heads, Numbers,  # (3, blocks) int32 - output; as in _offer, for each list
    Offers,  # (3, blocks, ROWS) int32 - output
    slots, blocks, source,
    NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr,
    KEPT: tl.constexpr, FIRST_KEPT: tl.constexpr, IN_KEPT: tl.constexpr,
    H: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, IN_PARTS: tl.constexpr, IN_PART: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    expert, start, end = _block_of(Offsets, block, NUM_EXPERTS, BINS, ROWS)
    if expert < NUM_EXPERTS:
        row = start + tl.arange(0, ROWS)
        inside = row < end
        slot = tl.load(Order + row, mask=inside, other=0)
        token = slot // TOP_K
        gate = tl.load(Gates + slot, mask=inside, other=0).to(tl.float32)
        # Rows are read whether they count or not, so that no load waits to hear of it.
        counted = inside & (gate != 0) & (tl.load(Counted + token, mask=inside, other=0) != 0)
        first = counted & (tl.load(First + token, mask=inside, other=0) != 0)
        squares = tl.load(Sqnorm + row, mask=inside, other=0)
        peak = _value_bits(tl.load(Best + row, mask=inside, other=0))
        part = tl.load(Part + row, mask=inside, other=0)
        in_peak, in_part = stored_parts(InParts, row, inside, slots, IN_PARTS)
        in_peak = tl.where(in_peak > _INF, _NAN, in_peak)
        nonfinite = tl.zeros((ROWS,), tl.int32)
        over_fp16 = tl.zeros((ROWS,), tl.int32)
        over_fp8 = tl.zeros((ROWS,), tl.int32)
        # Hardly any row has something to count: those that do are read again.
        some = counted & some_to_count(peak)
        if tl.max(some.to(tl.int32), 0) > 0:
            for first_column in range(0, H, 32):
                column = first_column + tl.arange(0, 32)[None, :]
                read = (column < H) & some[:, None]
                more = row_counts(tl.load(Y + row[:, None] * H + column, mask=read, other=0))
                nonfinite += more[0]
                over_fp16 += more[1]
                over_fp8 += more[2]
        at = Counts + block
        tl.store(at + _ROWS * blocks, tl.sum(counted.to(tl.int64), 0))
        tl.store(at + _FIRST_ROWS * blocks, tl.sum(first.to(tl.int64), 0))
        tl.store(at + _NONFINITE * blocks, tl.sum(nonfinite.to(tl.int64), 0))
        tl.store(at + _OVER_FP16 * blocks, tl.sum(over_fp16.to(tl.int64), 0))
        tl.store(at + _OVER_FP8 * blocks, tl.sum(over_fp8.to(tl.int64), 0))

        summed = counted & (nonfinite == 0) & (_value_bits(gate) < _INF)
        squares = tl.where(summed, squares, 0.0)
        gate64 = tl.where(summed, gate, 0.0).to(tl.float64)
        norm = tl.sqrt_rn(squares).to(tl.float64)
        at = Sums + block
        tl.store(at + _GATE_SUM * blocks, tl.sum(gate64, 0))
        tl.store(at + _GATE_FIRST_SUM * blocks, tl.sum(tl.where(first, gate64, 0.0), 0))
        tl.store(at + _NORM_SUM * blocks, tl.sum(norm, 0))
        tl.store(at + _SQNORM_SUM * blocks, tl.sum(squares.to(tl.float64), 0))
        tl.store(at + _GATE_NORM_SUM * blocks, tl.sum(gate64 * norm, 0))

        _offer(
            row, peak, part, counted & (first == 0), Outliers + (expert * KEPT + KEPT - 1) * _COLUMNS,
            source, Y, Order, Sequence, Position,
            Heads + block, Numbers + block, Offers + block * ROWS, KEPT == 1, TOP_K, H, PART,
        )  # fmt: skip
        block += blocks
        _offer(
            row, peak, part, first, FirstOutliers + (expert * FIRST_KEPT + FIRST_KEPT - 1) * _COLUMNS,
            source, Y, Order, Sequence, Position,
            Heads + block, Numbers + block, Offers + block * ROWS, FIRST_KEPT == 1, TOP_K, H, PART,
        )  # fmt: skip
        block += blocks
        _offer(
            row, in_peak, in_part, counted, InMax + (expert * IN_KEPT + IN_KEPT - 1) * _COLUMNS,
            source, X, Order, Sequence, Position,
            Heads + block, Numbers + block, Offers + block * ROWS, IN_KEPT == 1, TOP_K, WIDTH, IN_PART,
        )  # fmt: skip


@triton.jit
def _pick(values, rank, SLOTS: tl.constexpr):
    """The values at ranks 0 to SLOTS - 1, in order; 0 for a rank that none has."""
    slot = tl.arange(0, SLOTS)
    return tl.sum(tl.where(rank[None, :] == slot[:, None], values[None, :], 0), 1)


@triton.jit
def _total(Table, blocks, first_block, end_block, BLOCKS: tl.constexpr):
    """Sum over an expert's blocks, in a fixed order."""
    total = tl.zeros((BLOCKS,), Table.dtype.element_ty)
    for start in range(first_block, end_block, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        total += tl.load(Table + block, mask=block < end_block, other=0)
    return tl.sum(total, 0)


@triton.jit
def _sign_bit(x):
    """2^31 where x is negative or -0; 0 for NaN."""
    sign = (x.to(tl.int32, bitcast=True).to(tl.int64) >> 31) & 1
    return tl.where(_value_bits(x) > _INF, 0, sign << 31)


@triton.jit
def _enter(
    Best, Part, InParts, Y, X, Order, Gates, Sequence, Position, Token,  # as _update_experts
    Heads, Numbers, Offers,  # of the list
    Outliers, FirstOutliers, InMax,
    first_block, end_block, slots, source, expert, which,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, TOP_K: tl.constexpr,
    KEPT: tl.constexpr, FIRST_KEPT: tl.constexpr, IN_KEPT: tl.constexpr, SLOTS: tl.constexpr, NEW: tl.constexpr,
    H: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, IN_PARTS: tl.constexpr, IN_PART: tl.constexpr,
):  # fmt: skip
    """Merge what an expert's blocks offer into one of its lists."""
    kept = tl.where(which == 0, KEPT, tl.where(which == 1, FIRST_KEPT, IN_KEPT))
    Records = tl.where(which == 0, Outliers, tl.where(which == 1, FirstOutliers, InMax)) + expert * kept * _COLUMNS
    slot = tl.arange(0, SLOTS)
    value, sequence, position, channel = _kept_key(Records + slot * _COLUMNS, slot < kept)
    # What each slot will hold: a sorted row, or the record of slot -1 - origin.
    origin = -1 - slot.to(tl.int64)
    entered = 0
    least = tl.load(Records + (kept - 1) * _COLUMNS + _VALUE)
    for start in range(first_block, end_block, BLOCKS):
        some = start + tl.arange(0, BLOCKS)
        heads = tl.load(Heads + some, mask=some < end_block, other=-1)
        numbers = tl.load(Numbers + some, mask=(heads >= 0) & (heads >= least), other=0)
        after = tl.cumsum(numbers, 0)
        total = tl.sum(numbers, 0)
        # What the blocks offer, one after another: mostly few rows of several blocks.
        for first_offer in range(0, total, NEW):
            at = first_offer + tl.arange(0, NEW)
            offered = at < total
            block = tl.minimum(tl.sum((after[None, :] <= at[:, None]).to(tl.int32), 1), BLOCKS - 1)
            offer = (start + block) * ROWS + at - tl.gather(after - numbers, block, 0)
            row = tl.load(Offers + offer, mask=offered, other=0).to(tl.int64)
            if which == 2:
                peak, channel_of_peak = _h_peak(row, offered, InParts, X, slots, WIDTH, IN_PARTS, IN_PART)
            else:
                peak, channel_of_peak = _y_peak(row, offered, Best, Part, Y, H, PART)
            new_value, new_sequence, new_position, new_channel = _record_key(
                row, offered, _value_bits(peak), channel_of_peak, source, Order, Sequence, Position, TOP_K
            )
            if (tl.max(new_value, 0) >> 32) >= least:
                # Of equals the kept one stays, then the row that came first: offers are in row order.
                before_kept = _precedes(
                    new_value[None, :], new_sequence[None, :], new_position[None, :], new_channel[None, :],
                    value[:, None], sequence[:, None], position[:, None], channel[:, None],
                )  # fmt: skip
                place = (new_channel << 32) | at
                before_new = _precedes(
                    new_value[:, None], new_sequence[:, None], new_position[:, None], place[:, None],
                    new_value[None, :], new_sequence[None, :], new_position[None, :], place[None, :],
                )  # fmt: skip
                rank = slot + tl.sum(before_kept.to(tl.int32), 1)
                new_rank = tl.sum((before_kept == 0).to(tl.int32), 0) + tl.sum(before_new.to(tl.int32), 0)
                stays = slot < kept
                origin = _pick(origin, rank, SLOTS) + _pick(row, new_rank, SLOTS)
                # Slots beyond those of the list hold empty records.
                value = tl.where(stays, _pick(value, rank, SLOTS) + _pick(new_value, new_rank, SLOTS), -1 << 32)
                sequence = _pick(sequence, rank, SLOTS) + _pick(new_sequence, new_rank, SLOTS)
                position = _pick(position, rank, SLOTS) + _pick(new_position, new_rank, SLOTS)
                channel = _pick(channel, rank, SLOTS) + _pick(new_channel, new_rank, SLOTS)
                least = tl.min(tl.where(stays, value, 2**62), 0) >> 32
                entered = 1
    if entered > 0:
        stays = slot < kept
        old, new = stays & (origin < 0), stays & (origin >= 0)
        From = Records + tl.where(old, -1 - origin, 0) * _COLUMNS
        row = tl.where(new, origin, 0)
        routed = tl.load(Order + row, mask=new, other=0)
        token = routed // TOP_K
        gate = tl.load(Gates + routed, mask=new, other=0).to(tl.float32)
        in_peak, in_channel = _h_peak(row, new, InParts, X, slots, WIDTH, IN_PARTS, IN_PART)
        if which == 2:
            peak = in_peak
        else:
            peak, _ = _y_peak(row, new, Best, Part, Y, H, PART)
        negative = (peak < 0).to(tl.int64)
        sign = tl.where(old, tl.load(From + _SIGN, mask=old, other=0), negative)
        token_id = tl.load(Token + token, mask=new, other=0)
        token_id = tl.where(old, tl.load(From + _TOKEN, mask=old, other=0), token_id)
        gate_bits = _value_bits(gate).to(tl.int64) | _sign_bit(gate)
        gate_bits = tl.where(old, tl.load(From + _GATE, mask=old, other=0), gate_bits)
        in_bits = _value_bits(in_peak).to(tl.int64) | _sign_bit(in_peak)
        in_bits = tl.where(old, tl.load(From + _IN_VALUE, mask=old, other=0), in_bits)
        in_channel = tl.where(old, tl.load(From + _IN_CHANNEL, mask=old, other=0), in_channel.to(tl.int64))
        # Every thread has read the old records before any writes a new one.
        tl.debug_barrier()
        To = Records + slot * _COLUMNS
        tl.store(To + _VALUE, value >> 32, mask=stays)
        tl.store(To + _SIGN, sign, mask=stays)
        tl.store(To + _CHANNEL, channel, mask=stays)
        tl.store(To + _SOURCE, -(value & _LAST_SOURCE) + _LAST_SOURCE, mask=stays)
        tl.store(To + _SEQUENCE, sequence, mask=stays)
        tl.store(To + _POSITION, position, mask=stays)
        tl.store(To + _TOKEN, token_id, mask=stays)
        tl.store(To + _GATE, gate_bits, mask=stays)
        tl.store(To + _IN_VALUE, in_bits, mask=stays)
        tl.store(To + _IN_CHANNEL, in_channel, mask=stays)


@triton.jit(do_not_specialize=["slots", "blocks", "source"])
def _update_experts(
    Best, Part, InParts, Y, X,  # of RowParts
    Order,  # (S,) int64
    Offsets,  # (E + 1,) int64
    Gates,  # (T, k)
    Sequence, Position, Token,  # of Rows, (T,) each
    Counts, Sums, Heads, Numbers, Offers,  # as _update_blocks left them
    StateCounts, StateSums, Outliers, FirstOutliers, InMax,  # BankStats - in place
    slots, blocks, source,
    NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TOP_K: tl.constexpr,
    KEPT: tl.constexpr, FIRST_KEPT: tl.constexpr, IN_KEPT: tl.constexpr, SLOTS: tl.constexpr, NEW: tl.constexpr,
    H: tl.constexpr, PART: tl.constexpr, WIDTH: tl.constexpr, IN_PARTS: tl.constexpr, IN_PART: tl.constexpr,
):  # fmt: skip
    expert, which = tl.program_id(0), tl.program_id(1)
    bins = tl.arange(0, BINS)
    first = tl.load(Offsets + bins, mask=bins < NUM_EXPERTS, other=0)
    end = tl.load(Offsets + bins + 1, mask=bins < NUM_EXPERTS, other=0)
    needed = (end - first + ROWS - 1) // ROWS
    first_block = tl.sum(tl.where(bins < expert, needed, 0), 0).to(tl.int32)
    end_block = first_block + tl.sum(tl.where(bins == expert, needed, 0), 0).to(tl.int32)
    # Loops that are not unrolled: by the time a layer is called again, code must be fetched anew.
    if (which == 0) & (first_block < end_block):
        for i in range(_COUNTS):
            count = _total(Counts + i * blocks, blocks, first_block, end_block, BLOCKS)
            tl.store(StateCounts + expert * _COUNTS + i, tl.load(StateCounts + expert * _COUNTS + i) + count)
    if (which == 1) & (first_block < end_block):
        for i in range(_SUMS):
            total = _total(Sums + i * blocks, blocks, first_block, end_block, BLOCKS)
            tl.store(StateSums + expert * _SUMS + i, tl.load(StateSums + expert * _SUMS + i) + total)

    # The list of this program: outliers, first_outliers or in_max.
    Heads += which * blocks
    offered = -1
    for start in range(first_block, end_block, BLOCKS):
        some = start + tl.arange(0, BLOCKS)
        offered = tl.maximum(offered, tl.max(tl.load(Heads + some, mask=some < end_block, other=-1), 0))
    # In a settled state hardly any block offers anything.
    if offered >= 0:
        _enter(
            Best, Part, InParts, Y, X, Order, Gates, Sequence, Position, Token,
            Heads, Numbers + which * blocks, Offers + which * blocks * ROWS, Outliers, FirstOutliers, InMax,
            first_block, end_block, slots, source, expert, which,
            ROWS, BLOCKS, TOP_K, KEPT, FIRST_KEPT, IN_KEPT, SLOTS, NEW, H, PART, WIDTH, IN_PARTS, IN_PART,
        )  # fmt: skip


def update(state, found: RowParts, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
    """update_torch on the device, in place and in a fixed order: blocks of rows of one expert, then its blocks.

    A block offers only rows that stand before the last record kept, so in a settled state there is nothing to merge.
    """
    slots, experts, device = plan.slots, plan.num_experts, plan.order.device
    if slots == 0:
        return
    blocks = tiles.max_tiles(slots, experts, tiles.UPDATE_ROWS)
    records = (state.outliers, state.first_outliers, state.in_max)
    kept = [table.shape[1] for table in records]
    counts = torch.empty(len(COUNTS), blocks, dtype=torch.int64, device=device)
    sums = torch.empty(len(SUMS), blocks, dtype=torch.float64, device=device)
    heads = torch.empty(3, blocks, dtype=torch.int32, device=device)
    numbers = torch.empty_like(heads)
    offers = torch.empty(3, blocks, tiles.UPDATE_ROWS, dtype=torch.int32, device=device)
    gates = gates.contiguous()
    constants = {
        "NUM_EXPERTS": experts, "BINS": tiles.next_power_of_2(experts), "ROWS": tiles.UPDATE_ROWS,
        "TOP_K": plan.top_k, "KEPT": kept[0], "FIRST_KEPT": kept[1], "IN_KEPT": kept[2],
        "H": found.y.shape[1], "PART": found.y_part_width,
        "WIDTH": found.h.shape[1], "IN_PARTS": len(found.in_parts), "IN_PART": found.h_part_width,
    }  # fmt: skip
    launch(
        _update_blocks,
        (blocks, 1, 1),
        (
            found.best, found.part, found.sqnorm, found.in_parts, found.y, found.h, plan.order, plan.offsets, gates,
            rows.counted, rows.first, rows.sequence, rows.position,
            *records,
            counts, sums, heads, numbers, offers,
            slots, blocks, rows.source,
        ),
        constants,
    )  # fmt: skip
    launch(
        _update_experts,
        (experts, len(records), 1),
        (
            found.best, found.part, found.in_parts, found.y, found.h, plan.order, plan.offsets, gates,
            rows.sequence, rows.position, rows.token_id,
            counts, sums, heads, numbers, offers,
            state.counts, state.sums, *records,
            slots, blocks, rows.source,
        ),
        constants | {"BLOCKS": 64, "SLOTS": tiles.next_power_of_2(max(kept)), "NEW": tiles.NEW_RECORDS},
        # So that the programs of all experts run at once; what spills is needed only where there is much to merge.
        maxnreg=128,
    )  # fmt: skip
