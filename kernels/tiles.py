"""Tiles: every block shape of the Triton kernels, chosen in one place from sizes the host knows.

No choice depends on a value on the device, so a launch never waits for one, and none is timed at run time. The classes
are by r = S / E, the average rows per expert:

    r       rows of a tile  bound by                            what it is for
    <= 8    16              weight traffic                      decode: each hit expert's weights are read once
    <= 32   32              weight traffic
    < 96    64              weight traffic and padding of tails
    larger  128             tensor cores                        prefill, calibration

Routing is skewed in practice, so a class must also hold when one expert takes half of the rows: a hot expert in small
tiles re-reads its weights from L2, while large tiles for all would compute mostly padding.

How to choose: change an entry, run benchmarks/bench_moe.py --kernels, and keep it where the median wins by more than
the spread, with --skew 5 too. m * n bounds the float32 accumulators (128 registers a thread at 128 x 256 with 8
warps); stages * (m + n) * k elements must fit the shared memory beside the epilogue's scratch, and fit() cuts the
stages to the device's limit. tests/compile_triton.py --resources tells registers and spills without a GPU.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

GROUP = 16  # row tiles that pass over a weight block together, while it is in L2
SLOTS = 256  # slots that one program of plan sorts, comparing all with PAIRED of them at a time
PAIRED = 32
UPDATE_ROWS = 128  # sorted rows of one expert that one program of update reduces
NEW_RECORDS = 16  # rows that are merged into a list together
ROW_ELEMENTS = 2048  # of a program of combine and row_parts


@dataclass(frozen=True)
class Tile:
    """One program's share of a grouped GEMM: (m, n) outputs, k at a time.

    flatten  fuse the loops over tiles and over k, so that a tile's first loads overlap the last tile's epilogue
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    flatten: bool = False


# GEMM -> rows of a tile -> the tile of 16-bit types.
GATE_UP, DOWN, QUANTIZED = "gate_up", "down", "quantized"  # the last: either with quantized weights
_TILES = {
    GATE_UP: {
        16: Tile(16, 64, 128, 4, 4),
        32: Tile(32, 128, 64, 4, 4),
        64: Tile(64, 256, 64, 8, 4),
        128: Tile(128, 256, 64, 8, 3, flatten=True),
    },
    DOWN: {
        16: Tile(16, 64, 128, 4, 4),
        32: Tile(32, 128, 64, 4, 4),
        64: Tile(64, 256, 64, 8, 4),
        128: Tile(128, 256, 64, 8, 3, flatten=True),
    },
}
# A weight to be dequantized leaves shared memory a step before it is multiplied: a stage more.
_TILES[QUANTIZED] = {rows: replace(tile, stages=tile.stages + 1) for rows, tile in _TILES[GATE_UP].items()}


def cdiv(total: int, size: int) -> int:
    """triton.cdiv for the host, where that takes 3 us a call."""
    return -(-total // size)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def tile_rows(slots: int, experts: int) -> int:
    """Rows of a tile for S slots over E experts; the same for both GEMMs, which share one schedule.

    At most 128, which csrc/cuda/update.cu takes. The cuda backend takes them earlier, for its own GEMMs.
    """
    average = slots / experts
    return 16 if average <= 8 else 32 if average <= 32 else 64 if average < 96 else 128


def max_tiles(slots: int, experts: int, rows: int) -> int:
    """The most tiles of so many rows that S slots can need: every expert may end in a part of one."""
    return min(slots, experts) + slots // rows


@lru_cache(maxsize=1024)
def choose(
    gemm: str,
    rows: int,
    dtype: torch.dtype,
    width: int,
    device: torch.device,
    weight_bytes: float | None = None,
    scratch_bytes: int | None = None,
) -> Tile:
    """The tile of a GEMM whose output is width wide.

    weight_bytes: of a weight as stored; scratch_bytes: of an output in the epilogue; if they are not the dtype's.
    """
    tile = _TILES[gemm][rows]
    if dtype == torch.float32:  # multiplied without tensor cores, from registers
        tile = replace(tile, n=64, k=16, warps=8, stages=2, flatten=False)
    elif limits(device).major < 9:  # both operands pass through registers
        tile = replace(tile, n=min(tile.n, 128), k=32, flatten=False)
    narrow = 1 << max(width - 1, 15).bit_length()
    sizes = (dtype.itemsize, weight_bytes or dtype.itemsize, scratch_bytes or dtype.itemsize)
    return fit(replace(tile, n=min(tile.n, narrow)), device, *sizes)


def fit(tile: Tile, device: torch.device, row_bytes: int, weight_bytes: float, scratch_bytes: int) -> Tile:
    """The tile with as many stages as the device's shared memory holds; bytes of one element each."""
    stage = int((tile.m * row_bytes + tile.n * weight_bytes) * tile.k)
    # A flattened loop keeps its stages while the epilogue converts the output's layout in shared memory.
    scratch = 1024 + (tile.m * tile.n * scratch_bytes if tile.flatten else 0)
    return replace(tile, stages=max(1, min(tile.stages, (limits(device).shared - scratch) // stage)))


class Device(NamedTuple):
    processors: int
    shared: int  # bytes of shared memory a program may use
    major: int  # of its compute capability; from 9 on there is a tensor copy engine (TMA)


@lru_cache
def limits(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(4, 227 * 1024, 9)  # the interpreter: enough programs that every loop over tiles repeats
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub leaves it out
    return Device(properties.multi_processor_count, shared, properties.major)


def programs(tile: Tile, dtype: torch.dtype, tiles: int, device: torch.device) -> int:
    """The grid of a persistent GEMM: what the device runs at once, or fewer where there are fewer tiles."""
    used = tile.stages * (tile.m + tile.n) * tile.k * dtype.itemsize + 1024
    at_once = min(limits(device).shared // used, 16 // tile.warps, 2 if tile.m >= 64 else 4)
    return min(tiles, limits(device).processors * max(1, at_once))


def row_block(width: int, whole: bool) -> tuple[int, int]:
    """(rows, columns) that one program of a row-wise kernel takes; all columns if whole."""
    columns = next_power_of_2(width)
    if not whole:
        columns = min(columns, ROW_ELEMENTS)
    return min(32, max(1, ROW_ELEMENTS // columns)), columns


def row_warps(elements: int, whole: bool = True) -> int:
    """Warps for a program that holds so many elements in registers: 16 a thread, 64 where whole rows are reduced.

    What is done once a row costs every thread, so there are fewer of them.
    """
    return max(1, min(16, elements // (2048 if whole else 512)))


def part(columns: int, dtype: torch.dtype) -> int:
    """Columns of a row that a thread loads at once, of a block of so many."""
    return min(columns, 16 // dtype.itemsize)
