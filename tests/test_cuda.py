"""The CUDA kernels against the torch references on a Hopper GPU; what of them shows without one, everywhere."""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.kernels import (
    GATES,
    assert_close,
    assert_equal_bits,
    assert_parts_of,
    assert_same_state,
    assert_schedule,
    check_update,
    check_update_of_special_rows,
    loop_over_slots,
    make_call,
    make_rows,
    random_rows,
    swiglu,
    weights_of,
)
from support.kernels import moe_mlp as any_moe_mlp
from support.quantized import FP8, fp4, fp8

from sedetect import ops
from sedetect.adapters.quantized import QuantizedWeights
from sedetect.kernels import tiles
from sedetect.kernels.gate import ACTIVATIONS, Gate
from sedetect.kernels.gate_up import gate_up_torch
from sedetect.kernels.plan import Plan, plan_torch
from sedetect.kernels.records import COUNTS, RECORD, SUMS
from sedetect.kernels.row_scan import row_parts
from sedetect.kernels.row_stats import row_stats_torch
from sedetect.kernels.rows import Rows
from sedetect.kernels.update import update_torch
from sedetect.ops import cuda
from sedetect.ops.choose import BACKENDS, choose_backend
from sedetect.ops.contract import ExpertWeights
from sedetect.ops.cuda import CudaBackend
from sedetect.stats.bank import BankStats

DEVICE = torch.device("cuda", 0)
# the reason also where the module is not built: a GPU machine that means to run these tests must see it
REFUSAL = CudaBackend().refusal(DEVICE, torch.bfloat16) if torch.cuda.is_available() else None
DTYPES = [torch.bfloat16, torch.float16]

# T, k, E, H, I
SHAPES = [
    (1, 1, 1, 8, 8),
    (1, 4, 16, 64, 32),  # most experts empty
    (64, 8, 128, 96, 48),
    (300, 4, 8, 136, 72),  # a tail in every dimension
    (515, 1, 2, 264, 64),  # several tiles of one expert
    (515, 8, 16, 520, 264),
    (600, 10, 16, 512, 256),
    (700, 8, 16, 1032, 520),  # more tiles than blocks: epilogues run while the next tile is multiplied
    (30, 2, 2, 4160, 2056),  # large matrices: three stages
    (200, 2, 8, 136, 72),  # as chosen, tiles of 64 rows
    (300, 2, 4, 72, 4104),  # so many columns that rows are sorted before gate_up
]


# T, k, E, H, I; 4-bit values take multiples of 32.
QUANTIZED_SHAPES = [
    (1, 1, 1, 32, 32),
    (3, 4, 16, 64, 96),  # most experts empty
    (300, 4, 8, 224, 160),  # a tail in every dimension
    (515, 1, 2, 544, 288),  # several tiles of one expert
    (2000, 8, 16, 320, 1056),  # more tiles than blocks
    (300, 2, 4, 96, 4128),  # so many columns that rows are sorted before gate_up
]

# name -> weights (E, M, K) in this format; per channel: one scale for each row
QUANTIZED = {
    "block": lambda w: (*fp8(w), (128, 128)),
    "tensor": lambda w: (*fp8(w, w.shape[1:]), None),
    "channel": lambda w: (*fp8(w, (1, w.shape[2])), None),
    "mxfp4": lambda w: (*fp4(w), None),
}


def quantized(name: str, weight: torch.Tensor, dtype: torch.dtype) -> tuple[QuantizedWeights, torch.Tensor]:
    """Weights in a format, and what they stand for."""
    stored, scale, block = QUANTIZED[name](weight.float())
    weights = QuantizedWeights(stored.to(DEVICE), scale.to(DEVICE), block, dtype)
    return weights, torch.stack([weights[e] for e in range(len(weights))])


# With its own GEMMs for every call, and as users meet it: tiles of few rows go to Triton's.
OWN_GEMMS, AS_CHOSEN = 128, None
MIXED = pytest.mark.parametrize("gemm", ["few", "some", "many", "most"])
BOTH = pytest.mark.parametrize("backend", [OWN_GEMMS, AS_CHOSEN], indirect=True, ids=["own-gemms", "as-chosen"])


def on_hopper(test):
    return pytest.mark.gpu(pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))(test))


@pytest.fixture
def backend(request, monkeypatch):
    """The backend under test, and NaN in all memory that no kernel wrote."""
    rows = getattr(request, "param", OWN_GEMMS)
    if rows is not None:
        monkeypatch.setattr(tiles, "tile_rows", lambda slots, experts: rows)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield CudaBackend()
    torch.use_deterministic_algorithms(False)


def multiply_quantized_by(gemm: str, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "choose_gemm", lambda plan, weights: gemm if weights.storage else "grouped")


def on_device(call: dict) -> dict:
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def moe_mlp(call: dict, state: BankStats, rows: Rows | None = None, by: str = "cuda") -> torch.Tensor:
    """ops.moe_mlp with backend cuda, served by the backend that is meant."""
    served = []
    rows = None if rows is None else rows.to(DEVICE)
    out = any_moe_mlp(
        on_device(call), state=state, rows=rows, backend="cuda", served=lambda name, why: served.append((name, why))
    )
    assert [name for name, _ in served] == [by], served
    return out


@pytest.mark.skipif(shutil.which("nvcc") is None and not os.path.exists("/usr/local/cuda/bin/nvcc"), reason="no nvcc")
@pytest.mark.skipif("TORCH_CUDA_ARCH_LIST" in os.environ, reason="architectures were chosen")
def test_the_module_is_built_where_nvcc_is():
    assert importlib.util.find_spec("sedetect._cuda") is not None


def test_the_module_loads_without_a_driver():
    if importlib.util.find_spec("sedetect._cuda") is None:
        pytest.skip("sedetect._cuda is not built")
    code = (
        "from sedetect import _cuda as c; print(c.TILE_ROWS, c.column_tiles(768, True), c.column_tiles(257, False), "
        "c.COUNTS, c.SUMS, c.COLUMNS)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    columns = [str(len(names)) for names in (COUNTS, SUMS, RECORD)]
    assert run.stdout.split() == ["128", "6", "2", *columns], run.stderr[-2000:]


def test_the_host_is_refused():
    assert "CUDA tensors" in CudaBackend().refusal(torch.device("cpu"), torch.bfloat16)
    chosen, why = choose_backend(torch.device("cpu"), torch.bfloat16, "cuda")
    assert chosen.name == "cpu" and why.startswith("backend cuda does not serve torch.bfloat16 on cpu: ")


def test_it_is_preferred_to_triton():
    assert list(BACKENDS) == ["cpu", "cuda", "triton", "torch"]


@on_hopper
@pytest.mark.parametrize("tokens", [1, 8 * 8, 8 * 32 - 1, 8 * 33, 8 * 96, 8 * 400])
def test_its_gemms_serve_where_experts_have_rows_enough(monkeypatch, tokens):
    """Chosen by itself for few rows, too, but then without its own GEMMs."""
    called, served = [], []
    for name in ("gate_up", "down", "update"):
        its = getattr(cuda._cuda, name)
        monkeypatch.setattr(cuda._cuda, name, lambda *a, n=name, f=its: (called.append(n), f(*a)))
    call = on_device(make_call((tokens, 1, 8, 64, 32), torch.bfloat16, 1))
    any_moe_mlp(call, state=BankStats.empty(8, DEVICE), served=lambda *note: served.append(note))
    assert served == [("cuda", None)]
    assert called == (["gate_up", "down", "update"] if tokens >= 8 * 32 else ["update"])


@pytest.mark.parametrize(
    "slots,experts,fp8,mxfp4",
    [
        (63, 128, "triton", "triton"),
        (64, 128, "few", "few"),
        (4 * 10, 4, "triton", "triton"),
        (8 * 10, 8, "few", "few"),
        (8 * 10 + 1, 8, "some", "few"),
        (4 * 20 + 1, 4, "some", "some"),
        (4 * 56, 4, "some", "some"),
        (4 * 56 + 1, 4, "many", "many"),
        (8 * 136, 8, "many", "many"),
        (8 * 136 + 1, 8, "most", "most"),
    ],
)
def test_quantized_weights_are_multiplied_by_rows_of_an_expert(slots, experts, fp8, mxfp4):
    plan = Plan(torch.arange(slots), torch.zeros(experts + 1), 1)
    for name, expected in (("block", fp8), ("mxfp4", mxfp4)):
        stored, scale, block = QUANTIZED[name](torch.randn(1, 128, 128))
        weight = QuantizedWeights(stored, scale, block, torch.bfloat16)
        assert cuda.choose_gemm(plan, ExpertWeights(weight, weight)) == expected


@on_hopper
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize(
    "slots,experts",
    [
        (31, 3),
        (257, 1),
        (1024, 8),
        (1024, 128),
        (1025, 128),
        (2000, 100),
        (5000, 100),
        (20_000, 60),
        (65_536, 128),
        (300_000, 1500),
    ],
)
@pytest.mark.parametrize("backend", [AS_CHOSEN], indirect=True)
def test_plan(backend, slots, experts, skew, dtype):
    generator = torch.Generator().manual_seed(slots)
    index = torch.randint(-1, experts + 1, (slots, 1), generator=generator).to(dtype)  # with sentinels of both kinds
    if skew:
        index[torch.rand(slots, generator=generator) < 0.9] = experts // 2
    mine, reference = backend.plan(index.to(DEVICE), experts), plan_torch(index, experts)
    assert torch.equal(mine.order.cpu(), reference.order) and torch.equal(mine.offsets.cpu(), reference.offsets)
    assert_schedule(mine)


@on_hopper
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", [{}, {"skew": True, "sentinels": True}], ids=["plain", "skew-sentinels"])
def test_moe_mlp(backend, dtype, shape, variant):
    call = make_call(shape, dtype, seed=sum(shape), **variant)
    out = moe_mlp(call, BankStats.empty(shape[2], DEVICE), make_rows(shape[0], 1))
    assert out.dtype == dtype
    assert_close(f"moe_mlp {shape=} {dtype=}", out.cpu(), loop_over_slots(call), dtype)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_input_of_another_type_than_the_weights(backend, dtype):
    call = make_call((90, 2, 4, 48, 24), torch.bfloat16, 3)
    out = moe_mlp(call | {"x": call["x"].to(dtype)}, BankStats.empty(4, DEVICE))
    assert out.dtype == dtype
    assert_close(f"{dtype}", out.cpu(), loop_over_slots(call), torch.bfloat16)


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [gate for gate in GATES if not gate.interleaved], ids=str)
def test_fused_gates(backend, dtype, gate):
    call = make_call((90, 2, 4, 48, 24), dtype, 11)
    if not gate.gated:
        call["gate_up"] = call["gate_up"][:, :24].contiguous()
    call["gate_up"] = call["gate_up"] * 6  # far enough to reach the clamps
    out = moe_mlp(call | {"gate": gate}, BankStats.empty(4, DEVICE))
    assert_close(f"{gate}", out.cpu(), loop_over_slots(call, GATES[gate]), dtype)


@on_hopper
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_those_of_the_stored_output(backend, dtype, gated, shape):
    """Bit for bit those of the h and y that the same kernels store, infinities and NaN among them."""
    call = make_call(shape, dtype, seed=7 + sum(shape), sentinels=True)
    call["x"][::7] *= 30  # beyond float8
    call["x"][3::50, 0], call["x"][4::50, 1] = torch.inf, torch.nan
    gate = call["gate"]
    if not gated:
        gate, call["gate_up"] = next(g for g in GATES if not g.gated), call["gate_up"][:, : shape[4]].contiguous()
    call = on_device(call)
    plan = backend.plan(call["top_k_index"], shape[2])
    weights, gates = weights_of(call | {"gate": gate}), call["top_k_weights"]
    out, stats = backend.experts(call["x"], plan, weights, gates)
    h, _ = backend._gate_up(call["x"], plan, weights, gate)
    y = backend._down(h, plan, weights)
    routed = int(plan.offsets[-1])
    reference = row_stats_torch(y, h)
    assert_parts_of(stats, y, h, routed)
    check_update(backend.update, stats, y, h, plan, gates)
    assert (plan.schedule.arrived == 0).all()
    general, general_stats = backend.down(h, plan, weights)
    assert_equal_bits("y", general[:routed].view(torch.int16), y[:routed].view(torch.int16))
    assert_parts_of(general_stats, y, h, routed)
    again, unmeasured = backend.experts(call["x"], plan, weights, gates, statistics=False)
    assert_equal_bits("out", again.view(torch.int16), out.view(torch.int16))
    assert unmeasured is None
    if shape[0] > 50:
        assert reference.nonfinite[:routed].any() and reference.over_fp8[:routed].any()


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_rows_sorted_before_give_the_same(backend, monkeypatch, dtype, shape, gated):
    call = on_device(make_call(shape, dtype, 9, sentinels=True))
    plan = backend.plan(call["top_k_index"], shape[2])
    gate = call["gate"] if gated else next(g for g in GATES if not g.gated)
    found = []
    for columns in (0, 2**31):
        monkeypatch.setattr(cuda, "SORTED_COLUMNS", columns)
        found.append(backend._gate_up(call["x"], plan, weights_of(call), gate, parts=True))
    routed = int(plan.offsets[-1])
    (h, parts), (same, same_parts) = found
    assert_equal_bits("h", h[:routed].view(torch.int16), same[:routed].view(torch.int16))
    assert_equal_bits("parts", parts[:, :routed].contiguous(), same_parts[:, :routed].contiguous())


@on_hopper
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_up_without_a_gate(backend, dtype, shape):
    call = on_device(make_call(shape, dtype, 5))
    plan = backend.plan(call["top_k_index"], shape[2])
    z = backend.gate_up(call["x"], plan, weights_of(call))
    assert_close("gate_up", z, gate_up_torch(call["x"].double(), plan, call["gate_up"].double()), dtype)


def random_call(
    generator: torch.Generator, tokens: int, experts: int, hot: bool
) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """(routing, gates, rows) with sentinels, gates of 0 and infinity, and rows that do not count."""
    k = min(2, experts)
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, 0] += hot  # half of all rows
    index = scores.topk(k).indices
    index[torch.rand(tokens, k, generator=generator) < 0.1] = experts
    gates = torch.rand(tokens, k, generator=generator)
    gates[torch.rand(tokens, k, generator=generator) < 0.1] = 0
    gates[::29, 0], gates[::31, 0] = torch.inf, torch.nan
    sequence, position, token = (torch.randint(n, (tokens,), generator=generator) for n in (5, 4, 1000))
    counted = torch.rand(tokens, generator=generator) < 0.9
    first = counted & (torch.rand(tokens, generator=generator) < 0.2)
    return index, gates, Rows(counted, first, sequence, position, token)


@on_hopper
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("experts", [1, 3, 200])
@pytest.mark.parametrize("values", [1, 3, 200])
@pytest.mark.parametrize("hot", [False, True])
def test_update_keeps_the_best_in_order(backend, experts, values, hot, dtype):
    """Several tiles of one expert, ties everywhere, ids that do not ascend, several sources: the reference's bits."""
    generator = torch.Generator().manual_seed(values)
    mine, reference = BankStats.empty(experts, DEVICE), BankStats.empty(experts)
    for call, tokens in enumerate((30, 5000, 1, 1700)):
        index, gates, rows = random_call(generator, tokens, experts, hot)
        rows = replace(rows, source=(3, 1, 3, 0)[call])
        if call == 3:
            rows = Rows.unmapped(tokens, "cpu")
        plan = plan_torch(index, experts)
        y, h = random_rows(index.numel(), generator, values, dtype)
        update_torch(reference, row_stats_torch(y, h), plan, gates, rows)
        moved = Plan(plan.order.to(DEVICE), plan.offsets.to(DEVICE), plan.top_k)
        backend.update(mine, row_parts(y.to(DEVICE), h.to(DEVICE)), moved, gates.to(DEVICE), rows.to(DEVICE))
        assert_same_state(mine, reference)


@on_hopper
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("width", [1, 15, 65, 300])
def test_update_looks_places_up_and_counts(backend, dtype, width):
    check_update_of_special_rows(backend.update, DEVICE, dtype, width)


@on_hopper
def test_update_of_many_rows_of_distinct_values(backend):
    """One expert with 58,000 rows, in ascending order: every tile has rows that enter. Sums are the same bits twice."""
    generator = torch.Generator().manual_seed(0)
    tokens = 58_000
    index, gates, rows = random_call(generator, tokens, 1, False)
    plan = plan_torch(index, 1)
    y, h = torch.zeros(tokens, 20), torch.zeros(tokens, 300)
    row = torch.arange(tokens)
    y[row, row % 20] = row - 12_000.0  # norms are exact, as in random_rows
    h[row, 7 * row % 300] = 12_000.0 - row
    reference, states = BankStats.empty(1), []
    update_torch(reference, row_stats_torch(y, h), plan, gates, rows)
    found = row_parts(y.to(DEVICE), h.to(DEVICE))
    for _ in range(2):
        states.append(BankStats.empty(1, DEVICE))
        moved = Plan(plan.order.to(DEVICE), plan.offsets.to(DEVICE), 1)
        backend.update(states[-1], found, moved, gates.to(DEVICE), rows.to(DEVICE))
    assert_same_state(states[0], reference)
    assert torch.equal(states[0].sums.view(torch.int64), states[1].sums.view(torch.int64))


@on_hopper
@MIXED
@pytest.mark.parametrize("name,dtype", [(name, dtype) for name in QUANTIZED for dtype in DTYPES][:-1], ids=str)
@pytest.mark.parametrize("shape", QUANTIZED_SHAPES, ids=str)
@pytest.mark.parametrize("skew", [False, True])
def test_quantized_weights_give_the_bits_of_what_they_stand_for(backend, monkeypatch, gemm, name, dtype, shape, skew):
    """Outputs and statistics, of the fused and the general path, infinities and NaN among the rows."""
    multiply_quantized_by(gemm, monkeypatch)
    call = make_call(shape, dtype, 3, skew, sentinels=shape[0] > 3)
    call["x"][3::50, 0], call["x"][4::50, 1] = torch.inf, torch.nan
    (up, plain_up), (down, plain_down) = (quantized(name, call[key], dtype) for key in ("gate_up", "down"))
    call = on_device(call)
    called, its = [], cuda._cuda.mixed
    monkeypatch.setattr(cuda._cuda, "mixed", lambda *a: (called.append(a), its(*a)))
    for gate in (*(gate for gate in GATES if not gate.interleaved), swiglu):
        rows = slice(None) if getattr(gate, "gated", True) else slice(shape[4])
        if rows.stop:
            half, plain_half = quantized(name, plain_up[:, rows].cpu(), dtype)
        else:
            half, plain_half = up, plain_up
        rows, called[:] = make_rows(shape[0], 1), []
        found = []
        for weights in ({"gate_up": half, "down": down}, {"gate_up": plain_half, "down": plain_down}):
            state = BankStats.empty(shape[2], DEVICE)
            out = moe_mlp(call | weights | {"gate": gate}, state, rows)
            found.append((out, state))
        (out, state), (same, same_state) = found
        assert len(called) == 2
        assert_equal_bits(f"{gate}", out.nan_to_num(7.0), same.nan_to_num(7.0))
        assert_same_state(state, same_state)


@on_hopper
@MIXED
@pytest.mark.parametrize("name", ["block", "mxfp4"])
def test_every_stored_value_under_every_scale(backend, monkeypatch, gemm, name):
    """Token t is the t-th unit vector, so that z is the weight itself."""
    multiply_quantized_by(gemm, monkeypatch)
    size = 256
    weights, _ = quantized(name, torch.ones(1, size, size), torch.bfloat16)
    row, column = (torch.arange(n, device=DEVICE, dtype=torch.int32) for n in weights.stored.shape[1:])
    values = (row[:, None] + column).to(torch.uint8)
    if name == "mxfp4":
        weights.scale[0] = (row[:, None] + 32 * torch.arange(size // 32, device=DEVICE)).to(torch.uint8)
    else:
        values[1:][values[1:] & 127 == 127] = 0  # NaN in the first row only
        weights.scale[0] = torch.tensor([[1.0, 3.1e-5], [7e35, 2.3e-40]], device=DEVICE)
    weights.stored.view(torch.uint8)[0] = values
    plan = backend.plan(torch.zeros(size, 1, dtype=torch.int64, device=DEVICE), 1)
    x = torch.eye(size, dtype=torch.bfloat16, device=DEVICE)
    z = backend.gate_up(x, plan, ExpertWeights(weights, weights)).T
    finite = weights[0].isfinite().all(1)
    assert finite.sum() == (232 if name == "mxfp4" else 255)
    assert torch.equal(z[finite], weights[0][finite])
    assert z[~finite].isfinite().logical_not().all()  # NaN and Inf times zero are NaN


@on_hopper
@MIXED
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", QUANTIZED_SHAPES, ids=str)
def test_quantized_weights_with_biases_and_gates_in_turns(backend, monkeypatch, gemm, name, shape):
    multiply_quantized_by(gemm, monkeypatch)
    call = make_call(shape, torch.bfloat16, 4, bias=True)
    weights, plain = {}, {}
    for key in ("gate_up", "down"):
        weights[key], plain[key] = quantized(name, call[key], torch.bfloat16)
    gate = next(gate for gate in GATES if gate.interleaved)
    out = moe_mlp(call | weights | {"gate": gate}, BankStats.empty(shape[2], DEVICE))
    reference = call | {key: weight.cpu() for key, weight in plain.items()}
    assert_close(f"{gate}", out.cpu(), loop_over_slots(reference, GATES[gate]), torch.bfloat16)


@on_hopper
def test_what_it_cannot_serve_goes_to_triton_with_the_reason(backend):
    plain = make_call((40, 2, 4, 64, 32), torch.bfloat16, 2)
    biased = make_call((40, 2, 4, 64, 32), torch.bfloat16, 2, bias=True)
    interleaved = next(gate for gate in GATES if gate.interleaved)
    crooked = torch.zeros(plain["down"].numel() + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view_as(plain["down"])
    cases = {
        "biases": biased,
        "transposed": make_call((40, 2, 4, 64, 32), torch.bfloat16, 2, transposed=True),
        "interleaved": plain | {"gate": interleaved},
        "multiples of 8": make_call((40, 2, 4, 60, 32), torch.bfloat16, 2),
        "no kernel for torch.float32": make_call((40, 2, 4, 64, 32), torch.float32, 2),
        "not contiguous": plain | {"down": plain["down"].transpose(1, 2).contiguous().transpose(1, 2)},
        "16-byte": plain | {"down": crooked},
    }
    for reason, call in cases.items():
        served = []
        note = lambda *what, served=served: served.append(what)  # noqa: E731
        any_moe_mlp(on_device(call), state=BankStats.empty(4, DEVICE), backend="cuda", served=note)
        ((name, why),) = served
        assert name == "triton" and reason in why
    for reason, weight in {
        "float32 and a power of two": QuantizedWeights(
            torch.ones(4, 64, 96).to(FP8), torch.ones(4, 4, 4), (16, 24), torch.bfloat16
        ),
        "16 bytes long": QuantizedWeights(torch.ones(4, 64, 24).to(FP8), torch.ones(4, 1, 1), None, torch.bfloat16),
        "of torch.float16 and": QuantizedWeights(
            torch.ones(4, 64, 32).to(FP8), torch.ones(4, 1, 1), None, torch.float16
        ),
        "32 columns for": QuantizedWeights(*fp4(torch.ones(4, 64, 64), torch.float32), None, torch.bfloat16),
        "some are not": plain["down"],
    }.items():
        whole = QuantizedWeights(torch.ones(4, 64, 32).to(FP8), torch.ones(4, 1, 1), None, torch.bfloat16)
        assert reason in backend.refusal(DEVICE, torch.bfloat16, 4, ExpertWeights(weight, whole))
    assert "2000 experts" in backend.refusal(DEVICE, torch.bfloat16, 2000)


@on_hopper
def test_an_activation_that_it_does_not_know_goes_to_torch(backend, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "tanh", torch.tanh)
    call = make_call((40, 2, 4, 64, 32), torch.bfloat16, 2) | {"gate": Gate("tanh")}
    served = []
    note = lambda *what: served.append(what)  # noqa: E731
    any_moe_mlp(on_device(call), state=BankStats.empty(4, DEVICE), backend="cuda", served=note)
    ((name, why),) = served
    assert name == "torch" and why.endswith("it has no kernel for the activation tanh")


@on_hopper
@BOTH
def test_general_path_and_banks_of_one_expert(backend):
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    state, reference, served = BankStats.empty(1, DEVICE), BankStats.empty(1, DEVICE), []
    how = {"backend": "cuda", "served": lambda *note: served.append(note)}
    y = ops.linear_stats(x, weight, None, state, **how)
    assert_close("linear", y, x.double() @ weight.double().T, torch.bfloat16)
    ops.output_stats(y, x, reference, **how)
    assert served == 2 * [("cuda", None)]
    assert_same_state(state, reference)
    call = make_call((50, 2, 4, 32, 16), torch.bfloat16, 8)
    routed = BankStats.empty(4, DEVICE, channels=(32, 16), coactivation=True, published=True)
    out = moe_mlp(call | {"gate": swiglu}, routed, make_rows(50, 1))
    assert_close("general", out.cpu(), loop_over_slots(call), torch.bfloat16)
    assert torch.allclose(routed.channel_max.amax(1), routed.out_max)
    fused = BankStats.empty(4, DEVICE, published=True)
    moe_mlp(call, fused, make_rows(50, 1))
    assert torch.allclose(fused.published_max, routed.published_max, rtol=0.02) and fused.published_max.all()


@on_hopper
@pytest.mark.parametrize("backend", [AS_CHOSEN], indirect=True)
def test_no_tokens(backend):
    call = make_call((1, 2, 4, 16, 8), torch.bfloat16, 0)
    call |= {name: call[name][:0] for name in ("x", "top_k_index", "top_k_weights")}
    for gate in (call["gate"], swiglu):
        state = BankStats.empty(4, DEVICE)
        assert moe_mlp(call | {"gate": gate}, state).shape == (0, 16)
        assert state.equal(BankStats.empty(4, DEVICE))


@on_hopper
@BOTH
def test_duplicates(backend):
    call = make_call((30, 4, 2, 64, 32), torch.bfloat16, 5)
    call["top_k_index"] = torch.randint(0, 2, (30, 4), generator=torch.Generator().manual_seed(0))
    call["top_k_weights"] = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    out = moe_mlp(call, BankStats.empty(2, DEVICE))
    assert_close("duplicates", out.cpu(), loop_over_slots(call), torch.bfloat16)


@on_hopper
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(600, 8, 16, 512, 256), (20, 8, 16, 64, 32), (100, 8, 16, 64, 32), (300, 2, 4, 72, 4104)], ids=str
)
def test_no_synchronization_and_graph_replay(backend, dtype, shape):
    check_replay(on_device(make_call(shape, dtype, 1)), shape)


@on_hopper
@MIXED
@pytest.mark.parametrize("name", QUANTIZED)
def test_no_synchronization_and_graph_replay_of_quantized_weights(backend, monkeypatch, gemm, name):
    multiply_quantized_by(gemm, monkeypatch)
    shape = (600, 8, 16, 512, 256)
    call = make_call(shape, torch.bfloat16, 1)
    weights = {key: quantized(name, call[key], torch.bfloat16)[0] for key in ("gate_up", "down")}
    check_replay(on_device(call | weights), shape)


def check_replay(call: dict, shape: tuple[int, ...]) -> None:
    """The same bits eagerly, under the synchronization check, and replayed as a CUDA graph on new inputs."""
    tokens, _, experts, *_ = shape
    rows = make_rows(tokens, 1).to(DEVICE)
    eager, replayed = BankStats.empty(experts, DEVICE), BankStats.empty(experts, DEVICE)
    expected = moe_mlp(call, eager, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_mlp(call, BankStats.empty(experts, DEVICE), rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    inputs = {name: torch.zeros_like(call[name]) for name in ("x", "top_k_index", "top_k_weights")}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_mlp(call | inputs, replayed, rows)
    for name, tensor in inputs.items():
        tensor.copy_(call[name])
    graph.replay()
    assert_equal_bits("out", out.view(torch.int16), expected.view(torch.int16))
    assert_same_state(replayed, eager)
