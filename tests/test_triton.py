"""The Triton kernels against their torch references: on a GPU where there is one, else smaller and interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.interpreter import DEVICE, INTERPRETED
from support.kernels import (
    GATES,
    PLACE,
    SHAPES,
    TOLERANCES,
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
    moe_mlp,
    random_rows,
    special_rows,
    swiglu,
    weights_of,
)

from sedetect import ops
from sedetect.kernels import tiles
from sedetect.kernels.combine import combine, combine_torch
from sedetect.kernels.down import down
from sedetect.kernels.gate import Gate
from sedetect.kernels.gate_up import gate_up, gate_up_torch
from sedetect.kernels.plan import Plan, plan, plan_torch, scheduled, single_plan
from sedetect.kernels.row_scan import row_parts
from sedetect.kernels.row_stats import row_stats_torch
from sedetect.kernels.rows import Rows
from sedetect.kernels.sort_rows import sort_rows, sort_rows_torch
from sedetect.kernels.update import update, update_torch
from sedetect.ops import triton as triton_backend
from sedetect.ops.choose import BACKENDS
from sedetect.ops.triton import TritonBackend
from sedetect.stats.bank import BankStats

if INTERPRETED:
    SHAPES = [
        (1, 1, 1, 8, 8),
        (1, 4, 16, 64, 32),  # decode: most experts empty
        (7, 2, 3, 33, 17),  # dimensions that divide nothing: no copy engine
        (36, 4, 4, 72, 40),  # tiles of 64 rows, a tail in every dimension
        (200, 1, 1, 40, 24),  # tiles of 128 rows
    ]
    DTYPES = [torch.float32, torch.bfloat16]  # whole calls in float16 are left to GPUs, its stages are run here too
else:
    SHAPES = [*SHAPES, (515, 8, 16, 520, 264), (600, 8, 16, 512, 256)]
    DTYPES = list(TOLERANCES)


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """The backend under test by name, and NaN in all memory that no kernel wrote."""
    assert triton_backend.INTERPRETED == INTERPRETED, "import support.interpreter before triton"
    monkeypatch.setitem(BACKENDS, "triton", TritonBackend())
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def on_device(call: dict) -> dict:
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in call.items()}


@pytest.mark.parametrize("shape", [*SHAPES, (25, 2, 5, 8, 8), (50, 2, 5, 8, 8), (300, 4, 70, 8, 8)], ids=str)
@pytest.mark.parametrize("skew", [False, True])
def test_plan(shape, skew):
    index = make_call(shape, torch.float32, 3, skew=skew, sentinels=True)["top_k_index"].to(DEVICE)
    index[0, 0] = -1  # as much a sentinel as E
    mine, reference = plan(index, shape[2]), plan_torch(index, shape[2])
    assert torch.equal(mine.order, reference.order) and torch.equal(mine.offsets, reference.offsets)
    for routing in (mine, scheduled(reference)):
        assert_schedule(routing)


def test_schedule_example():
    index = torch.tensor([[2, 0], [2, 3], [0, 2]], device=DEVICE)
    schedule = plan(index, 3).schedule
    assert schedule.row.tolist() == [2, 0, 3, 5, 1, 4]
    assert schedule.tiles.tolist() == [[0, 0, 2, 0], [2, 2, 5, 0], [-1, 0, 0, 0]] and schedule.rows == 16
    assert schedule.count.tolist() == [2] and schedule.arrived.tolist() == 3 * [[0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "variant",
    [{}, {"transposed": True, "bias": True}, {"skew": True, "sentinels": True}],
    ids=["plain", "transposed-bias", "skew-sentinels"],
)
def test_moe_mlp(dtype, shape, variant):
    call = make_call(shape, dtype, seed=sum(shape), **variant)
    state = BankStats.empty(shape[2], DEVICE)
    rows = make_rows(shape[0], 1).to(DEVICE)
    out = moe_mlp(on_device(call), state=state, rows=rows, backend="triton")
    assert out.dtype == dtype
    assert_close(f"moe_mlp {shape=} {dtype=}", out.cpu(), loop_over_slots(call), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_fused_gates(dtype, gate, transposed):
    call = make_call((18, 2, 4, 48, 24), dtype, 11, bias=True, transposed=transposed)
    if not gate.gated:
        half = call["gate_up"][..., :24] if transposed else call["gate_up"][:, :24]
        call |= {"gate_up": half.contiguous(), "gate_up_bias": call["gate_up_bias"][:, :24]}
    call["gate_up"] = call["gate_up"] * 6  # far enough to reach the clamps
    state = BankStats.empty(4, DEVICE)
    out = moe_mlp(on_device(call | {"gate": gate}), state=state, backend="triton")
    assert_close(f"{gate}", out.cpu(), loop_over_slots(call, GATES[gate]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_those_of_the_stored_output(dtype, shape):
    """Bit for bit those of the h and y that the same kernels store."""
    call = on_device(make_call(shape, dtype, seed=7 + sum(shape), sentinels=True))
    call["x"][30:31, 0] = torch.inf  # h and y with NaN
    routing = plan(call["top_k_index"], shape[2])
    weights, gates = weights_of(call), call["top_k_weights"]
    out, stats = TritonBackend().experts(call["x"], routing, weights, gates)
    h, _ = gate_up(call["x"], routing, call["gate_up"], gate=call["gate"])
    y = down(h, routing, call["down"])
    routed = int(routing.offsets[-1])
    assert_parts_of(stats, y, h, routed)
    check_update(TritonBackend().update, stats, y, h, routing, gates)
    general, general_stats = TritonBackend().down(h, routing, weights)
    assert_equal_bits("y", general[:routed], y[:routed])
    assert_parts_of(general_stats, y, h, routed)
    again, unmeasured = TritonBackend().experts(call["x"], routing, weights, gates, statistics=False)
    assert_equal_bits("out", again, out)
    assert unmeasured is None


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_gate_up_without_a_gate(dtype, shape, transposed):
    call = on_device(make_call(shape, dtype, 5, bias=True, transposed=transposed))
    routing = plan_torch(call["top_k_index"], shape[2])
    z, parts = gate_up(call["x"], routing, call["gate_up"], call["gate_up_bias"], transposed)
    wide = [call[name].double() for name in ("x", "gate_up", "gate_up_bias")]
    assert parts is None
    assert_close("gate_up", z, gate_up_torch(wide[0], routing, wide[1], wide[2], transposed), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [1, 15, 65, 300])
def test_row_parts(dtype, width):
    generator = torch.Generator().manual_seed(width)
    y, h = (special_rows(n, dtype, generator).to(DEVICE) for n in (width, 341 - width))
    assert_parts_of(row_parts(y, h), y, h, len(y))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2, 4, 2100, 8)], ids=str)
def test_sort_rows(dtype, shape):
    call = on_device(make_call(shape, dtype, 4, sentinels=True))
    routing = plan(call["top_k_index"], shape[2])
    routed = int(routing.offsets[-1])
    mine, reference = sort_rows(call["x"], routing)[:routed], sort_rows_torch(call["x"], routing)[:routed]
    assert torch.equal(mine.view(torch.uint8), reference.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine(dtype, shape):
    _, _, experts, hidden, _ = shape
    call = on_device(make_call(shape, dtype, 6, sentinels=True))
    routing = plan(call["top_k_index"], experts)
    y = torch.randn(len(routing.order), hidden, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    reference = combine_torch(y.double(), routing, call["top_k_weights"])
    y[int(routing.offsets[-1]) :] = torch.nan  # rows of no expert
    for result in (torch.float32, dtype):
        out, _ = combine(y, routing, call["top_k_weights"], result)
        assert out.dtype == result
        assert_close("combine", out, reference, result)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("width", [1, 15, 65, 300])
def test_combine_takes_the_statistics_of_its_rows(dtype, k, width):
    generator = torch.Generator().manual_seed(width)
    y, h = (special_rows(n, dtype, generator).to(DEVICE) for n in (width, 40))
    tokens = len(y) // k
    index = torch.randint(6, (tokens, k), generator=generator).to(DEVICE)  # 5 is no expert
    parts = torch.stack([part.float().abs().amax(1) for part in h.split(16, 1)])
    out, found = combine(y, plan(index, 5), torch.ones(tokens, k, device=DEVICE), torch.float32, h, parts)
    assert_parts_of(found, y, h, int((index < 5).sum()))
    assert out.shape == (tokens, width)


@pytest.mark.parametrize(
    "experts,block,values",
    # Interpreted, each takes 15 s: every block, with ties among few values.
    [
        (experts, block, values)
        for experts, block in ((1, tiles.UPDATE_ROWS), (3, tiles.UPDATE_ROWS), (1, 4))
        for values in (1, 3, 1000)
        if not INTERPRETED or values == 3
    ],
)
def test_update_keeps_the_best_in_order(monkeypatch, experts, block, values):
    """Several blocks of one expert, and so many that they are looked through in parts; ties everywhere, ids that do not
    ascend, several sources: the reference's bits."""
    monkeypatch.setattr(tiles, "UPDATE_ROWS", block)
    generator = torch.Generator().manual_seed(values)
    mine, reference = BankStats.empty(experts, DEVICE), BankStats.empty(experts)
    for call, tokens in enumerate((30, 300, 1, 170)):
        k = min(2, experts)
        index = torch.rand(tokens, experts, generator=generator).topk(k).indices
        index[torch.rand(tokens, k, generator=generator) < 0.1] = experts
        gates = torch.rand(tokens, k, generator=generator)
        gates[torch.rand(tokens, k, generator=generator) < 0.1] = 0
        gates[::29, 0] = torch.inf
        y, h = random_rows(tokens * k, generator, values)
        sequence, position, token = (torch.randint(n, (tokens,), generator=generator) for n in (5, 4, 1000))
        counted = torch.rand(tokens, generator=generator) < 0.9
        first = counted & (torch.rand(tokens, generator=generator) < 0.2)
        rows = Rows(counted, first, sequence, position, token, source=(3, 1, 3, 0)[call])
        routing = plan_torch(index, experts)
        update_torch(reference, row_stats_torch(y, h), routing, gates, rows)
        moved = Plan(routing.order.to(DEVICE), routing.offsets.to(DEVICE), k)
        update(mine, row_parts(y.to(DEVICE), h.to(DEVICE)), moved, gates.to(DEVICE), rows.to(DEVICE))
        assert_same_state(mine, reference)
    assert mine.rows.sum() > tiles.UPDATE_ROWS


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [1, 15, 65, 300])
def test_update_looks_places_up_and_counts(dtype, width):
    """Every row becomes a record of its expert: its place, its signs, its largest |h| and what it counts."""
    check_update_of_special_rows(update, DEVICE, dtype, width)


def test_general_path_and_a_bank_of_one_expert():
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    state, reference = BankStats.empty(1, DEVICE), BankStats.empty(1, DEVICE)
    y = ops.linear_stats(x, weight, weight[:, 0], state, backend="triton")
    assert_close("linear", y, x.double() @ weight.double().T + weight[:, 0].double(), torch.float32)
    ops.output_stats(y, x, reference, backend="triton")
    assert_same_state(state, reference)
    call = on_device(make_call((20, 2, 4, 32, 16), torch.float32, 8))
    routed = BankStats.empty(4, DEVICE, channels=(32, 16), coactivation=True)
    out = moe_mlp(call | {"gate": swiglu}, state=routed, rows=make_rows(20, 1).to(DEVICE), backend="triton")
    assert_close("general", out, moe_mlp(call, state=BankStats.empty(4, DEVICE), backend="torch"), out.dtype)
    assert torch.allclose(routed.channel_max.amax(1), routed.out_max)


@pytest.mark.parametrize("gate", [swiglu, Gate()], ids=["general", "fused"])
def test_first_rows_and_a_norm_in_place(gate):
    """What reads the row statistics after the kernels, and what changes the rows after they were measured."""
    call = on_device(make_call((40, 2, 4, 32, 16), torch.float32, 8)) | {"gate": gate}
    for norm in (None, lambda y: y.mul_(0.5)):
        states = {name: BankStats.empty(4, DEVICE, published=True) for name in ("triton", "torch")}
        for name, state in states.items():
            moe_mlp(call, post_norm=norm, state=state, rows=make_rows(40, 1).to(DEVICE), backend=name)
        mine, reference = states.values()
        assert torch.allclose(mine.published_max, reference.published_max, rtol=1e-5) and mine.published_max.all()
        assert torch.equal(mine.outliers[:, :4, PLACE], reference.outliers[:, :4, PLACE])


def test_no_tokens():
    call = on_device(make_call((1, 2, 4, 16, 8), torch.float32, 0))
    call |= {name: call[name][:0] for name in ("x", "top_k_index", "top_k_weights")}
    for gate in (call["gate"], swiglu):
        state = BankStats.empty(4, DEVICE)
        assert moe_mlp(call | {"gate": gate}, state=state, backend="triton").shape == (0, 16)
        assert state.equal(BankStats.empty(4, DEVICE))
    assert scheduled(single_plan(0, DEVICE)).schedule.rows == 16


def test_duplicates():
    call = make_call((30, 4, 2, 64, 32), torch.float32, 5)
    call["top_k_index"] = torch.randint(0, 2, (30, 4), generator=torch.Generator().manual_seed(0))
    call["top_k_weights"] = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    out = moe_mlp(on_device(call), state=BankStats.empty(2, DEVICE), backend="triton")
    assert_close("duplicates", out.cpu(), loop_over_slots(call), torch.float32)


def test_refusals_name_the_reason():
    backend = TritonBackend()
    assert "float64" in backend.refusal(DEVICE, torch.float64)
    assert backend.refusal(DEVICE, torch.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_no_synchronisation_and_graph_replay(dtype):
    """The same bits eagerly, under the synchronization check, and replayed as a CUDA graph on new inputs."""
    call = on_device(make_call((600, 8, 16, 512, 256), dtype, 1))
    rows = make_rows(600, 1).to(DEVICE)
    eager, replayed = BankStats.empty(16, DEVICE), BankStats.empty(16, DEVICE)
    expected = moe_mlp(call, state=eager, rows=rows, backend="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe_mlp(call, state=BankStats.empty(16, DEVICE), rows=rows, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    inputs = {name: torch.zeros_like(call[name]) for name in ("x", "top_k_index", "top_k_weights")}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_mlp(call | inputs, state=replayed, rows=rows, backend="triton")
    for name, tensor in inputs.items():
        tensor.copy_(call[name])
    graph.replay()
    assert_equal_bits("out", out, expected)
    assert_same_state(replayed, eager)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for(capability):
    script = Path(__file__).with_name("compile_triton.py")
    run = subprocess.run(
        [sys.executable, script, str(capability)],
        env=os.environ | {"TRITON_INTERPRET": "0"}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    names = {line.split()[1] for line in run.stdout.splitlines()}
    plan_kernels = {"_count", "_scan", "_sort", "_schedule"}
    others = {"_sort_rows", "_gate_up", "_down", "_combine", "_row_parts", "_update_blocks", "_update_experts"}
    assert plan_kernels | others <= names
