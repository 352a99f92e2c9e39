"""Plan: which routed rows belong to which expert, as one sort and one prefix sum.

T tokens, k experts per token, S = T*k slots, E experts. Slot s is the (s % k)-th choice of token s // k.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sedetect.kernels import tiles
from sedetect.kernels.launch import launch


@dataclass(frozen=True)
class Schedule:
    """Data that the stages need on a GPU beside order and offsets; all of it on the device, the same for every backend.

    row      (S,) int32: sorted row of each slot, the inverse of order
    rows     sorted rows of a tile; a tile belongs to one expert
    tiles    (max_tiles, 4) int32: expert, first sorted row, end of the expert's rows, and which of the expert's tiles
             it is, in the order of the experts; the expert of a tile that is not in use is -1
    count    (1,) int32: how many tiles are in use
    arrived  (E, 3) int32: zeros, counters of the cuda backend's update, which leaves them so

    Example: that of Plan with 2 rows to a tile
        row      [2, 0, 3, 5, 1, 4]
        tiles    [[0, 0, 2, 0], [2, 2, 5, 0], [2, 4, 5, 1], [-1, ...], ...]
        count    [3]
    """

    row: torch.Tensor
    rows: int
    tiles: torch.Tensor
    count: torch.Tensor
    arrived: torch.Tensor

    @property
    def most(self) -> int:
        """max_tiles."""
        return self.tiles.shape[0]

    @classmethod
    def empty(cls, slots: int, experts: int, rows: int, device: torch.device) -> "Schedule":
        """Uninitialized, for a kernel to fill."""
        most = tiles.max_tiles(slots, experts, rows)
        sizes = ((slots,), (most, 4), (1,), (experts, 3))
        row, table, count, arrived = (torch.empty(size, dtype=torch.int32, device=device) for size in sizes)
        return cls(row, rows, table, count, arrived)


@dataclass(frozen=True)
class Plan:
    """Routing of one experts call, sorted by expert.

    order    (S,) int64: slot of each sorted row; stable, so an expert's rows stand in token order
    offsets  (E + 1,) int64: expert e owns sorted rows offsets[e] .. offsets[e + 1] - 1
    top_k    k

    Slots whose index is outside [0, E) (expert-parallel sentinels) sort to the tail, beyond offsets[E].

    Example: E = 3, k = 2, top_k_index = [[2, 0], [2, 3], [0, 2]] (3 is a sentinel)
        slots    0->2  1->0  2->2  3->3  4->0  5->2
        order    [1, 4, 0, 2, 5, 3]
        offsets  [0, 2, 2, 5]
    """

    order: torch.Tensor
    offsets: torch.Tensor
    top_k: int

    # Of shapes: len() of a tensor takes three times as long, and every stage asks.
    @property
    def slots(self) -> int:
        return self.order.shape[0]

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0] - 1


@dataclass(frozen=True)
class ScheduledPlan(Plan):
    """A plan with its schedule: what plan() makes on a GPU; scheduled() gives one to plans made elsewhere."""

    schedule: Schedule


def plan_torch(top_k_index: torch.Tensor, num_experts: int) -> Plan:
    """Sort the routing (T, k) int by expert. Runs without host synchronization."""
    experts = top_k_index.reshape(-1).to(torch.int64)
    experts = torch.where((experts >= 0) & (experts < num_experts), experts, num_experts)
    order = experts.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    offsets[1:] = counts[:-1].cumsum(0)
    return Plan(order, offsets, top_k_index.shape[1])


def single_plan(tokens: int, device: torch.device) -> Plan:
    """The plan of a bank with one expert that every token visits (shared experts, dense MLPs)."""
    # No tensor made from host values, which would wait for the device.
    return Plan(torch.arange(tokens, device=device), torch.arange(2, device=device) * tokens, 1)


def every_plan(tokens: int, experts: int, device: torch.device) -> Plan:
    """The plan of a bank whose every expert every token visits: row e * T + t is token t's at expert e."""
    slots = torch.arange(tokens * experts, device=device).view(tokens, experts)
    return Plan(slots.t().flatten(), torch.arange(experts + 1, device=device) * tokens, experts)


@triton.jit
def _load_experts(Index, first, slots, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    slot = first + tl.arange(0, BLOCK)
    expert = tl.load(Index + slot, mask=slot < slots, other=NUM_EXPERTS)
    return slot, tl.where((expert >= 0) & (expert < NUM_EXPERTS), expert, NUM_EXPERTS).to(tl.int32)


@triton.jit(do_not_specialize=["slots", "blocks"])
def _count(
    Index,  # (S,) int
    Counts,  # (E + 1, blocks) int32 - output; slots of each expert in each block
    slots, blocks,
    NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    _, expert = _load_experts(Index, tl.program_id(0) * BLOCK, slots, NUM_EXPERTS, BLOCK)
    bins = tl.arange(0, BINS)
    tl.store(Counts + bins * blocks + tl.program_id(0), tl.histogram(expert, BINS), mask=bins <= NUM_EXPERTS)


@triton.jit(do_not_specialize=["blocks"])
def _scan(
    Counts,  # (E + 1, blocks) int32 - in place: those of the blocks before
    Totals,  # (E + 1,) int32 - output
    blocks,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((), tl.int32)
    row = Counts + tl.program_id(0) * blocks
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        count = tl.load(row + block, mask=block < blocks, other=0)
        tl.store(row + block, total + tl.cumsum(count, 0) - count, mask=block < blocks)
        total += tl.sum(count, 0)
    tl.store(Totals + tl.program_id(0), total)


@triton.jit
def _write_tiles(
    first, count,  # (BINS,) int32: first sorted row and rows of each expert; 0 rows beyond the last
    Tiles, TileCount, Arrived, max_tiles,
    NUM_EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    needed = (count + ROWS - 1) // ROWS
    end = tl.cumsum(needed, 0)
    total = tl.sum(needed, 0)
    tile = tl.program_id(0) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    expert = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), 1)
    at = tl.minimum(expert, BINS - 1)
    row = tl.gather(first, at, 0)
    number = tile - tl.gather(end - needed, at, 0)
    used, there = tile < total, tile < max_tiles
    tl.store(Tiles + 4 * tile, tl.where(used, expert, -1), mask=there)
    tl.store(Tiles + 4 * tile + 1, tl.where(used, row + number * ROWS, 0), mask=there)
    tl.store(Tiles + 4 * tile + 2, tl.where(used, row + tl.gather(count, at, 0), 0), mask=there)
    tl.store(Tiles + 4 * tile + 3, tl.where(used, number, 0), mask=there)
    if tl.program_id(0) == 0:
        tl.store(TileCount, total)
        counter = tl.arange(0, 4 * BINS)
        tl.store(Arrived + counter, tl.zeros((4 * BINS,), tl.int32), mask=counter < 3 * NUM_EXPERTS)


@triton.jit(do_not_specialize=["slots", "blocks", "max_tiles"])
def _sort(
    Index,  # (S,) int
    Counts,  # (E + 1, blocks) int32, None where there is one block
    Totals,  # (E + 1,) int32, or None
    Order,  # (S,) int64 - output
    Offsets,  # (E + 1,) int64 - output
    Row,  # (S,) int32 - output
    Tiles,  # (max_tiles, 4) int32 - output
    TileCount,  # (1,) int32 - output
    Arrived,  # (E, 3) int32 - output
    slots, blocks, max_tiles,
    NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr,
    PAIRED: tl.constexpr,
):  # fmt: skip
    slot, expert = _load_experts(Index, tl.program_id(0) * BLOCK, slots, NUM_EXPERTS, BLOCK)
    bins = tl.arange(0, BINS)
    if Counts is None:
        _, everything = _load_experts(Index, 0, slots, NUM_EXPERTS, BLOCK)
        total = tl.histogram(everything, BINS)
    else:
        total = tl.load(Totals + bins, mask=bins <= NUM_EXPERTS, other=0)
    first = tl.cumsum(total, 0) - total
    row = tl.gather(first, expert, 0)
    if Counts is not None:
        row += tl.load(Counts + expert * blocks + tl.program_id(0), mask=slot < slots, other=0)
    # Equals before me in this block, by comparing all pairs: neither a sort nor atomics, whose order is not fixed.
    for start in range(0, BLOCK, PAIRED):
        other, other_expert = _load_experts(Index, tl.program_id(0) * BLOCK + start, slots, NUM_EXPERTS, PAIRED)
        before = (other_expert[None, :] == expert[:, None]) & (other[None, :] < slot[:, None])
        row += tl.sum(before.to(tl.int32), 1)
    tl.store(Order + row, slot.to(tl.int64), mask=slot < slots)
    tl.store(Row + slot, row, mask=slot < slots)
    if tl.program_id(0) == 0:
        tl.store(Offsets + bins, first.to(tl.int64), mask=bins <= NUM_EXPERTS)
    count = tl.where(bins < NUM_EXPERTS, total, 0)
    _write_tiles(first, count, Tiles, TileCount, Arrived, max_tiles, NUM_EXPERTS, BINS, ROWS, PER_PROGRAM)


@triton.jit(do_not_specialize=["slots", "max_tiles"])
def _schedule(
    Order,  # (S,) int64
    Offsets,  # (E + 1,) int64
    Row,  # (S,) int32 - output
    Tiles,  # (max_tiles, 4) int32 - output
    TileCount,  # (1,) int32 - output
    Arrived,  # (E, 3) int32 - output
    slots, max_tiles,
    NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    sorted_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(Order + sorted_row, mask=sorted_row < slots, other=0)
    tl.store(Row + slot, sorted_row, mask=sorted_row < slots)
    bins = tl.arange(0, BINS)
    first = tl.load(Offsets + bins, mask=bins < NUM_EXPERTS, other=0).to(tl.int32)
    end = tl.load(Offsets + bins + 1, mask=bins < NUM_EXPERTS, other=0).to(tl.int32)
    _write_tiles(first, end - first, Tiles, TileCount, Arrived, max_tiles, NUM_EXPERTS, BINS, ROWS, PER_PROGRAM)


def _shape(schedule: Schedule, slots: int, experts: int) -> tuple[int, dict[str, int]]:
    """(programs, constants) of the kernels that write a schedule: every program writes some of its tiles."""
    bins = tiles.next_power_of_2(experts + 1)
    block = min(tiles.SLOTS, max(tiles.PAIRED, tiles.next_power_of_2(slots)))  # one token compares few pairs
    grid = tiles.cdiv(slots, block)
    per_program = tiles.next_power_of_2(tiles.cdiv(schedule.most, grid))
    if per_program > 64:
        per_program, grid = 64, max(grid, tiles.cdiv(schedule.most, 64))
    constants = {"NUM_EXPERTS": experts, "BLOCK": block, "BINS": bins, "ROWS": schedule.rows}
    return grid, constants | {"PER_PROGRAM": per_program}


def plan(top_k_index: torch.Tensor, num_experts: int) -> ScheduledPlan:
    """plan_torch as a counting sort: one launch for up to tiles.SLOTS slots, three for more. Repeatable and stable."""
    index = top_k_index.contiguous()
    slots, device = index.numel(), index.device
    order = torch.empty(slots, dtype=torch.int64, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
    schedule = Schedule.empty(slots, num_experts, tiles.tile_rows(slots, num_experts), device)
    if slots == 0:
        return ScheduledPlan(order, offsets.zero_(), top_k_index.shape[1], schedule)
    grid, constants = _shape(schedule, slots, num_experts)
    blocks = tiles.cdiv(slots, constants["BLOCK"])
    counts = totals = None
    if blocks > 1:
        counts = torch.empty((num_experts + 1, blocks), dtype=torch.int32, device=device)
        totals = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
        count = {name: constants[name] for name in ("NUM_EXPERTS", "BLOCK", "BINS")}
        launch(_count, (blocks, 1, 1), (index, counts, slots, blocks), count)
        launch(_scan, (num_experts + 1, 1, 1), (counts, totals, blocks), {"BLOCK": 1024})
    launch(
        _sort,
        (grid, 1, 1),
        (
            index, counts, totals,
            order, offsets, schedule.row, schedule.tiles, schedule.count, schedule.arrived,
            slots, blocks, schedule.most,
        ),
        constants | {"PAIRED": tiles.PAIRED},
        num_warps=8,
    )  # fmt: skip
    return ScheduledPlan(order, offsets, top_k_index.shape[1], schedule)


def scheduled(plan: Plan) -> ScheduledPlan:
    """The plan with a schedule, made here where there is none: plans of single_plan, every_plan, plan_torch."""
    if isinstance(plan, ScheduledPlan):
        return plan
    slots = plan.slots
    rows = tiles.tile_rows(slots, plan.num_experts)
    schedule = Schedule.empty(slots, plan.num_experts, rows, plan.order.device)
    if slots:
        grid, constants = _shape(schedule, slots, plan.num_experts)
        launch(
            _schedule,
            (grid, 1, 1),
            (
                plan.order, plan.offsets, schedule.row, schedule.tiles, schedule.count, schedule.arrived,
                slots, schedule.most,
            ),
            constants,
            num_warps=8,
        )  # fmt: skip
    return ScheduledPlan(plan.order, plan.offsets, plan.top_k, schedule)
