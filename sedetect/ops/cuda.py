"""The CUDA backend: the kernels of csrc/cuda, for Hopper GPUs.

It has its own plan, GEMMs and update of the statistics. The row kernels (combine and row statistics), which are bound
by memory, are Triton's. So are plans of few slots, and the GEMMs where experts have few rows: weight traffic dominates
there, and Triton's tiles are smaller. sedetect._cuda gets addresses and does not use torch; each stage is one call,
because at small T the host takes most of the time.
"""

import importlib.util
import math
from functools import lru_cache
from typing import Any

import torch

from sedetect.kernels import tiles
from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.kernels.gate import Gate
from sedetect.kernels.plan import Plan, Schedule, ScheduledPlan, scheduled
from sedetect.kernels.row_stats import RowParts
from sedetect.kernels.rows import Rows
from sedetect.kernels.sort_rows import sort_rows
from sedetect.ops.contract import ExpertWeights, Matrices, gate_refusal
from sedetect.ops.triton import TritonBackend, on
from sedetect.stats.bank import BankStats

_cuda: Any = None
if importlib.util.find_spec("sedetect._cuda") is not None:
    _cuda = importlib.import_module("sedetect._cuda")

# Number of gate_up columns from which its rows are sorted first, so that the copy engine can load them: sorting
# takes as long as 2000 to 8000 columns gain by it (docs/performance-notes.md).
SORTED_COLUMNS = 8192

# The average rows of an expert from which on 16-bit weights are multiplied here, in tiles of 128 rows.
GROUPED_ROWS = 32

# Quantized weights of fewer slots are Triton's. Of more, the form of the GEMM follows the average rows of an expert, up
# to those named here; 4 bits, which take most instructions to dequantize, are with the form of the fewest for longer.
MIXED_SLOTS = 64
FEW_ROWS = {torch.float8_e4m3fn: 10, torch.uint8: 20}
SOME_ROWS, MANY_ROWS = 56, 136

# csrc/cuda/stages.h, grouped_gemm.h and mixed_gemm.h
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ACTIVATIONS = {"silu": 1, "gelu": 2, "gelu_tanh": 3, "relu2": 4}
_NO_GATE = (0, False, math.inf, 1.0, 0.0)
_FORMATS = {torch.float8_e4m3fn: 0, torch.uint8: 1}
_FORMS = {"few": 0, "some": 1, "many": 2, "most": 3}


class CudaBackend(TritonBackend):
    """No stage synchronizes with the host; rows of no expert are left undefined."""

    name = "cuda"
    activations = frozenset(_ACTIVATIONS)

    def refusal(
        self, device: torch.device, dtype: torch.dtype, experts: int = 1, weights: ExpertWeights | None = None
    ) -> str | None:
        if device.type != "cuda":
            return f"it serves CUDA tensors, these are on {device}"
        if _cuda is None:
            return (
                "sedetect._cuda is not built; install sedetect again where nvcc of CUDA 12.5 or later is found, and "
                "with 9.0 in TORCH_CUDA_ARCH_LIST if that is set"
            )
        if _capability(device) != (9, 0):
            return "it is for GPUs of compute capability 9.0, this one has {}.{}".format(*_capability(device))
        if dtype not in (torch.bfloat16, torch.float16):
            return f"it has no kernel for {dtype}"
        most = _cuda.MAX_MIXED_EXPERTS if weights is not None and weights.storage else _cuda.MAX_EXPERTS
        if experts > most:
            return f"there are {experts} experts, it takes {most}"
        if weights is None:
            return None
        return _weights_refusal(weights, dtype) or gate_refusal(weights, self.activations)

    def plan(self, top_k_index: torch.Tensor, num_experts: int) -> Plan:
        if top_k_index.numel() <= tiles.SLOTS:  # Triton's is one launch then, and no cooperative one
            return super().plan(top_k_index, num_experts)
        index = top_k_index.contiguous()
        if index.dtype not in (torch.int64, torch.int32):
            index = index.to(torch.int64)
        slots, device = index.numel(), index.device
        order = torch.empty(slots, dtype=torch.int64, device=device)
        offsets = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
        rows = _cuda.TILE_ROWS if slots >= GROUPED_ROWS * num_experts else tiles.tile_rows(slots, num_experts)
        schedule = Schedule.empty(slots, num_experts, rows, device)
        processors = tiles.limits(device).processors
        blocks = _cuda.plan_blocks(slots, processors)
        counts = torch.empty(blocks * (num_experts + 1), dtype=torch.int32, device=device)
        with on(device):
            _cuda.plan(
                index.data_ptr(), index.dtype == torch.int32, order.data_ptr(), offsets.data_ptr(),
                _addresses(schedule), counts.data_ptr(), slots, num_experts, processors, _stream(device),
            )  # fmt: skip
        return ScheduledPlan(order, offsets, top_k_index.shape[1], schedule)

    def update(self, state: BankStats, found: RowParts, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
        slots, device = plan.slots, plan.order.device
        if slots == 0:
            return
        with on(device):
            schedule, gates = scheduled(plan).schedule, _gates(gates)
            records = (state.outliers, state.first_outliers, state.in_max)
            size = _cuda.update_scratch(schedule.most, schedule.rows)
            scratch = torch.empty(size, dtype=torch.uint8, device=device)
            _cuda.update(
                _row_parts(found), plan.order.data_ptr(), _addresses(schedule),
                gates.data_ptr(), _TYPES[gates.dtype], [t.data_ptr() for t in rows.tensors()],
                state.counts.data_ptr(), state.sums.data_ptr(),
                [t.data_ptr() for t in records], [t.shape[1] for t in records],
                scratch.data_ptr(), slots, plan.top_k, rows.source, _stream(device),
            )  # fmt: skip

    def _gate_up(
        self,
        x: torch.Tensor,
        plan: ScheduledPlan,
        weights: ExpertWeights,
        gate: Gate | None = None,
        parts: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gemm = choose_gemm(plan, weights)
        if gemm == "triton":
            return super()._gate_up(x, plan, weights, gate, parts)
        weight = weights.stacked
        x = x.to(weight.dtype)
        if isinstance(weight, QuantizedWeights):
            return _mixed("gate_up", gemm, sort_rows(x, plan), plan, weight, weights.gate_up_bias, gate, parts)
        x = _aligned(x)
        experts, columns, hidden = weight.shape
        _check_sizes("gate_up", x, weight, hidden, plan)
        slots, gated = plan.slots, gate is not None and gate.gated
        width = columns // 2 if gated else columns
        h, found, found_at = x.new_empty(slots, width), None, 0
        if parts:
            found = x.new_empty(_cuda.column_tiles(width, gated), slots, dtype=torch.float32)
            found_at = found.data_ptr()
        schedule, order = plan.schedule, plan.order.data_ptr()
        if columns >= SORTED_COLUMNS:
            x, order = sort_rows(x, plan), 0
        _cuda.gate_up(
            x.data_ptr(), weight.data_ptr(), order,
            schedule.tiles.data_ptr(), schedule.count.data_ptr(), h.data_ptr(), found_at,
            _gate(gate), _TYPES[x.dtype], slots, plan.top_k, experts, hidden, width,
            tiles.limits(x.device).processors, _stream(x.device),
        )  # fmt: skip
        return h, found

    def _down(self, h: torch.Tensor, plan: ScheduledPlan, weights: ExpertWeights) -> torch.Tensor:
        gemm = choose_gemm(plan, weights)
        if gemm == "triton":
            return super()._down(h, plan, weights)
        weight = weights.down
        h = h.to(weight.dtype)
        if isinstance(weight, QuantizedWeights):
            return _mixed("down", gemm, h, plan, weight, weights.down_bias)[0]
        h = _aligned(h)
        experts, hidden, width = weight.shape
        _check_sizes("down", h, weight, width, plan)
        slots, schedule = plan.slots, plan.schedule
        y = h.new_empty(slots, hidden)
        _cuda.down(
            h.data_ptr(), weight.data_ptr(), schedule.tiles.data_ptr(),
            schedule.count.data_ptr(), y.data_ptr(), _TYPES[h.dtype], slots, experts, hidden, width,
            tiles.limits(h.device).processors, _stream(h.device),
        )  # fmt: skip
        return y


def choose_gemm(plan: ScheduledPlan, weights: ExpertWeights) -> str:
    """triton, grouped (grouped_gemm.h), or a form of mixed_gemm.h's."""
    slots, average = plan.slots, plan.slots / plan.num_experts
    if not weights.storage:
        return "grouped" if plan.schedule.rows == _cuda.TILE_ROWS else "triton"
    if slots < MIXED_SLOTS:
        return "triton"
    most = (("few", min(FEW_ROWS[storage] for storage in weights.storage)), ("some", SOME_ROWS), ("many", MANY_ROWS))
    return next((form for form, rows in most if average <= rows), "most")


def _mixed(
    name: str,
    gemm: str,
    x: torch.Tensor,
    plan: ScheduledPlan,
    weight: QuantizedWeights,
    bias: torch.Tensor | None,
    gate: Gate | None = None,
    parts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (S, K), sorted by expert, with quantized weights: what _gate_up returns."""
    x, bias = _aligned(x), None if bias is None else bias.contiguous()
    experts, columns, inner = weight.shape
    _check_sizes(name, x, weight, inner, plan)
    slots, gated = plan.slots, gate is not None and gate.gated
    width = columns // 2 if gated else columns
    result, found, found_at = x.new_empty(slots, width), None, 0
    if parts:
        found = x.new_empty(_cuda.mixed_column_tiles(width, gated), slots, dtype=torch.float32)
        found_at = found.data_ptr()
    quantized = (_FORMATS[weight.storage], *weight.scale.shape[1:], *weight.block)
    following = torch.empty(1, dtype=torch.int32, device=x.device)
    _cuda.mixed(
        x.data_ptr(), weight.stored.data_ptr(), weight.scale.data_ptr(), 0 if bias is None else bias.data_ptr(),
        plan.offsets.data_ptr(), following.data_ptr(), result.data_ptr(), found_at,
        quantized, _gate(gate), gate is not None and gate.interleaved, _TYPES[x.dtype], _FORMS[gemm],
        slots, experts, inner, width, tiles.limits(x.device).processors, _stream(x.device),
    )  # fmt: skip
    return result, found


def _check_sizes(name: str, x: torch.Tensor, weight: torch.Tensor | QuantizedWeights, width: int, plan: Plan) -> None:
    """The kernels take their sizes from the weight alone."""
    if x.shape[1] != width or len(weight) != plan.num_experts:
        raise ValueError(
            f"{name}: rows of {x.shape[1]} and a weight {tuple(weight.shape)} do not fit a plan of {plan.num_experts} "
            "experts"
        )


def _weights_refusal(weights: ExpertWeights, dtype: torch.dtype) -> str | None:
    if weights.storage:
        return next(filter(None, (_quantized_refusal(m, weights, dtype) for m in weights.matrices)), None)
    if weights.transposed:
        return "the weights are transposed"
    if weights.gate_up_bias is not None or weights.down_bias is not None:
        return "the experts have biases"
    if weights.fused_gate is not None and weights.fused_gate.interleaved:
        return "gate and up are interleaved"
    for weight in weights.matrices:
        size = tuple(weight.shape)
        if weight.dtype != dtype:
            return f"the weights are of {weight.dtype} and {dtype}"
        if size[1] % 8 or size[2] % 8:
            return f"the weights are {size}, their dimensions must be multiples of 8"
        assert isinstance(weight, torch.Tensor)  # none is quantized
        if not weight.is_contiguous() or weight.data_ptr() % 16:
            return "the weights are not contiguous, on 16-byte boundaries"
    return None


def _quantized_refusal(weight: Matrices, weights: ExpertWeights, dtype: torch.dtype) -> str | None:
    if not isinstance(weight, QuantizedWeights):
        return "some of the weights are quantized and some are not"
    rows, (high, wide) = weight.shape[1], weight.block
    scale = (weight.scale.dtype, weight.scale.shape[2])
    what = f"the weights are quantized as {weight.storage} with {scale[0]} scales of {high} x {wide}"
    if weight.dtype != dtype:
        return f"the weights are of {weight.dtype} and {dtype}"
    if weight.storage == torch.float8_e4m3fn:
        shared = scale[1] == 1 or (wide >= 64 and wide & (wide - 1) == 0)
        if scale[0] != torch.float32 or not shared:
            return f"{what}, it takes float32 and a power of two from 64 columns on"
    elif weight.storage != torch.uint8 or scale[0] != torch.uint8 or wide != 32 or dtype != torch.bfloat16:
        return f"{what} for {dtype}, of 4 bits it takes uint8 and 32 columns for bfloat16"
    if rows % 8 or weight.stored.shape[2] % 16:
        return (
            f"the weights are {tuple(weight.shape)}, their rows must be multiples of 8 in number and of 16 bytes long"
        )
    if weight.scale.numel() >= 2**31:
        return f"there are {weight.scale.numel()} scales"
    if any(not t.is_contiguous() for t in (weight.stored, weight.scale)) or weight.stored.data_ptr() % 16:
        return "the weights are not contiguous, on 16-byte boundaries"
    if any(bias is not None and bias.dtype != dtype for bias in (weights.gate_up_bias, weights.down_bias)):
        return f"the biases are not of {dtype}"
    return None


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def _gate(gate: Gate | None) -> tuple[int, bool, float, float, float]:
    if gate is None:
        return _NO_GATE
    limit = math.inf if gate.limit is None else gate.limit
    return _ACTIVATIONS[gate.activation], gate.gated, limit, gate.slope, gate.shift


def _aligned(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _gates(gates: torch.Tensor) -> torch.Tensor:
    return (gates if gates.dtype in _TYPES else gates.float()).contiguous()


def _addresses(schedule: Schedule) -> tuple[int, ...]:
    tensors = (schedule.row, schedule.tiles, schedule.count, schedule.arrived)
    return *(t.data_ptr() for t in tensors), schedule.rows, schedule.most


def _row_parts(found: RowParts) -> tuple[list[int], list[int]]:
    y, h = found.y, found.h
    tensors = (found.best, found.part, found.sqnorm, found.in_parts, y, h)
    widths = (y.shape[1], h.shape[1], found.y_part_width, found.h_part_width, found.in_parts.shape[0])
    return [t.data_ptr() for t in tensors], [_TYPES[y.dtype], _TYPES[h.dtype], *widths]


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)
