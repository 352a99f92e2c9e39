"""The stages against their torch references, on every backend that runs here."""

import pytest
import torch
from support.kernels import (
    GATES,
    SHAPES,
    TOLERANCES,
    assert_close,
    clamped_swiglu,
    loop_over_slots,
    make_call,
    make_rows,
    moe_mlp,
    swiglu,
    weights_of,
)

from sedetect import ops
from sedetect.kernels.combine import combine_torch
from sedetect.kernels.gate import ACTIVATIONS, Gate, gate_torch
from sedetect.kernels.gate_up import gate_up_torch
from sedetect.kernels.grouped import grouped_linear_torch
from sedetect.kernels.plan import plan_torch, single_plan
from sedetect.kernels.records import COUNTS, RECORD, SUMS, column
from sedetect.kernels.row_stats import row_stats_torch
from sedetect.kernels.rows import Rows
from sedetect.kernels.update import update_torch
from sedetect.models.gate import candidate_gates, probe_gate
from sedetect.ops.choose import BACKENDS as ALL_BACKENDS
from sedetect.ops.choose import choose_backend
from sedetect.ops.cpu import CpuBackend
from sedetect.ops.triton import TritonBackend
from sedetect.stats.bank import BankStats

BACKENDS = [name for name in ALL_BACKENDS if name not in ("triton", "cuda")]  # tests/test_triton.py, test_cuda.py
FAST = [name for name in BACKENDS if name != "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "variant",
    [{}, {"transposed": True, "bias": True}, {"skew": True, "sentinels": True}],
    ids=["plain", "transposed-bias", "skew-sentinels"],
)
def test_moe_mlp(backend, dtype, shape, variant):
    call = make_call(shape, dtype, seed=sum(shape), **variant)
    state = BankStats.empty(shape[2])
    out = moe_mlp(call, state=state, rows=make_rows(shape[0], 1), backend=backend)
    assert out.dtype == dtype
    assert_close(f"moe_mlp {shape=} {dtype=}", out, loop_over_slots(call), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_fused_gates(backend, dtype, gate):
    """Fused, and as an opaque function through the general path: both against float64."""
    call = make_call((70, 2, 4, 48, 20), dtype, 11, bias=True)
    if not gate.gated:
        call |= {"gate_up": call["gate_up"][:, :20], "gate_up_bias": call["gate_up_bias"][:, :20]}
    call["gate_up"] = call["gate_up"] * 6  # far enough to reach the clamps
    reference = loop_over_slots(call, GATES[gate])
    for form in (gate, GATES[gate]):
        out = moe_mlp(call | {"gate": form}, state=BankStats.empty(4), backend=backend)
        assert_close(f"{gate} {type(form)}", out, reference, dtype)


def test_probe_recognises_every_gate_and_no_other():
    for gate, own in GATES.items():
        for dtype in TOLERANCES:
            assert probe_gate(own, 24, candidate_gates(gate.gated, [7.0, 10.0]), dtype) == gate

    def in_float32(z):
        return swiglu(z.float()).to(z.dtype)

    assert probe_gate(in_float32, 24, candidate_gates(True, [])) == Gate()
    assert probe_gate(in_float32, 24, candidate_gates(True, []), torch.bfloat16) is None
    # A clamp whose limit is not among the candidates must not pass for the plain gate.
    assert probe_gate(clamped_swiglu, 24, candidate_gates(True, [])) is None
    assert probe_gate(lambda z: swiglu(z) * 1.001, 24, candidate_gates(True, [7.0])) is None


def test_gates_differ_from_each_other():
    z = torch.linspace(-12, 12, 64)[None]
    outputs = [gate_torch(gate, z) for gate in candidate_gates(True, [7.0, 10.0])]
    for i, a in enumerate(outputs):
        assert not any(torch.allclose(a, b) for b in outputs[:i])
    assert len(outputs) == len(ACTIVATIONS) + 2 + 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("skew", [False, True])
def test_statistics_are_those_of_the_stored_output(backend, dtype, shape, skew):
    """Bit for bit: recompute every statistic from the backend's own down_proj output with plain loops."""
    call = make_call(shape, dtype, seed=7 + sum(shape), skew=skew, sentinels=True)
    tokens, _, experts, _, _ = shape
    rows = make_rows(tokens, 2)
    plan = plan_torch(call["top_k_index"], experts)
    h = swiglu(gate_up_torch(call["x"], plan, call["gate_up"]))
    state = BankStats.empty(experts)
    gates = call["top_k_weights"]
    y = ops.down_stats(h, plan, weights_of(call), gates, state, rows=rows, backend=backend)
    routed = int(plan.offsets[-1])
    if routed:
        reference = grouped_linear_torch(h.double(), plan, call["down"].double())
        assert_close(f"down {shape=}", y[:routed], reference[:routed], dtype)

    for e in range(experts):
        lists = {"outliers": [], "first_outliers": [], "in_max": []}
        count = dict.fromkeys(("rows", "first_rows", "nonfinite", "over_fp16", "over_fp8"), 0)
        for r in range(plan.offsets[e], plan.offsets[e + 1]):
            slot = int(plan.order[r])
            t = slot // plan.top_k
            gate = gates.reshape(-1)[slot].float()
            if not rows.counted[t] or gate == 0:
                continue
            values, inputs = y[r].float(), h[r].float()
            channel, in_channel = int(values.abs().argmax()), int(inputs.abs().argmax())
            key = (3, int(rows.sequence[t]), int(rows.position[t]))
            entry = (-float(values.abs()[channel]), *key, channel, float(values[channel]) < 0, int(rows.token_id[t]),
                     float(gate), float(inputs[in_channel]), in_channel)  # fmt: skip
            lists["first_outliers" if rows.first[t] else "outliers"].append(entry)
            lists["in_max"].append((-float(inputs.abs()[in_channel]), *key, in_channel, float(inputs[in_channel]) < 0,
                                    *entry[6:]))  # fmt: skip
            count["rows"] += 1
            count["first_rows"] += bool(rows.first[t])
            count["over_fp16"] += int((values.abs() > 65504).sum())
            count["over_fp8"] += int((values.abs() > 448).sum())
        for name, expected in count.items():
            assert getattr(state, name)[e] == expected, f"{name} of expert {e}"
        for name, entries in lists.items():
            assert_records(getattr(state, name)[e], sorted(entries), f"{name} of expert {e}")


def assert_records(records, expected, name):
    order = ("value", "source", "sequence", "position", "channel", "sign", "token_id", "gate", "in_value", "in_channel")
    columns = {part: column(records, part).tolist() for part in order}
    kept = sum(value != -1 for value in columns["value"])
    assert kept == min(len(records), len(expected)), name
    for i, entry in enumerate(expected[:kept]):
        assert (-columns["value"][i], *(columns[part][i] for part in list(columns)[1:])) == entry, f"{name}, slot {i}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_fused_and_general_path_give_the_same_statistics(backend, dtype):
    call = make_call((300, 4, 8, 130, 70), dtype, 4)
    fused, general = BankStats.empty(8), BankStats.empty(8)
    rows = make_rows(300, 4)
    moe_mlp(call, state=fused, rows=rows, backend=backend)
    moe_mlp(call | {"gate": swiglu}, state=general, rows=rows, backend=backend)
    if dtype == torch.float32 or backend == "torch":
        assert fused.rows.sum() > 0 and fused.equal(general)
    else:  # the fused path rounds the number of rows of a GEMM up, and the library rounds with it
        assert torch.equal(fused.counts[:, :2], general.counts[:, :2])
        assert torch.allclose(fused.out_max, general.out_max, rtol=0.02)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_update_equals_reference_over_several_calls(backend, dtype):
    chosen = ALL_BACKENDS[backend]
    mine, reference = BankStats.empty(5), BankStats.empty(5)
    for seed, tokens in enumerate((40, 1, 200, 64)):
        call = make_call((tokens, 3, 5, 40, 24), dtype, seed)
        plan = plan_torch(call["top_k_index"], 5)
        h = swiglu(gate_up_torch(call["x"], plan, call["gate_up"]))
        y, stats = chosen.down(h, plan, weights_of(call))
        rows = make_rows(tokens, seed)
        rows.sequence = rows.sequence.flip(0)  # ids that do not ascend with the rows
        chosen.update(mine, stats, plan, call["top_k_weights"], rows)
        update_torch(reference, row_stats_torch(y, h), plan, call["top_k_weights"], rows)
    assert mine.rows.sum() > 0
    assert mine.equal(reference, sums_rtol=1e-5)  # a row's float32 sum of squares is added in another order


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 128, 1000])
def test_row_stats_bit_for_bit(backend, dtype, width):
    """Ties, zeros, infinities, NaNs of every payload, subnormals and the limits of narrower types."""
    generator = torch.Generator().manual_seed(width)
    y = (torch.randn(64, width, generator=generator) * 10 ** torch.linspace(-8, 5, 64)[:, None]).to(dtype)
    y[1] = 0
    y[2] = -0.0
    y[3] = y[3].abs().amax()  # all equal: the first channel
    for row, special in enumerate((torch.inf, -torch.inf, torch.nan, 448.0, -449.0, 65504.0, 1e-40), start=4):
        y[row, torch.randint(width, (2,), generator=generator)] = special
    y[12].view(torch.int32 if dtype == torch.float32 else torch.int16).fill_(-1)  # NaN, all bits set
    y[13, 0], y[13, -1] = -torch.inf, torch.nan
    expected, stats = row_stats_torch(y, y), ALL_BACKENDS[backend].row_stats(y, y)
    for name in ("peak", "channel", "nonfinite", "over_fp16", "over_fp8", "in_peak", "in_channel"):
        mine, reference = getattr(stats, name), getattr(expected, name)
        if mine.dtype == torch.float32:
            mine, reference = mine.view(torch.int32), reference.view(torch.int32)
        assert torch.equal(mine, reference), name
    finite = expected.nonfinite == 0
    assert torch.allclose(stats.sqnorm[finite], expected.sqnorm[finite], rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_plan_equals_reference(backend):
    for shape in SHAPES:
        index = make_call(shape, torch.float32, 3, sentinels=True)["top_k_index"]
        mine, reference = ALL_BACKENDS[backend].plan(index, shape[2]), plan_torch(index, shape[2])
        assert torch.equal(mine.order, reference.order) and torch.equal(mine.offsets, reference.offsets)


def test_plan_example():
    plan = plan_torch(torch.tensor([[2, 0], [2, 3], [0, 2]]), 3)
    assert plan.order.tolist() == [1, 4, 0, 2, 5, 3]
    assert plan.offsets.tolist() == [0, 2, 2, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_may_choose_an_expert_twice(backend):
    call = make_call((200, 4, 2, 64, 32), torch.float32, 5)
    call["top_k_index"] = torch.randint(0, 2, (200, 4), generator=torch.Generator().manual_seed(0))
    call["top_k_weights"] = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
    out = moe_mlp(call, state=BankStats.empty(2), backend=backend)
    assert_close("duplicates", out, loop_over_slots(call), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    call = make_call((1, 2, 4, 16, 8), torch.float32, 0)
    call |= {name: call[name][:0] for name in ("x", "top_k_index", "top_k_weights")}
    state = BankStats.empty(4)
    assert moe_mlp(call, state=state, backend=backend).shape == (0, 16)
    assert state.equal(BankStats.empty(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nonfinite_rows_are_counted_and_kept_out_of_sums(backend):
    y = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    y[1, 3], y[2, 4] = torch.nan, -torch.inf
    state = BankStats.empty(1)
    ops.output_stats(y, y.clone(), state, backend=backend)
    assert state.rows.tolist() == [6] and state.nonfinite.tolist() == [2]
    assert state.out_max.isnan().all()
    assert state.outliers[0, :3, 2].tolist()[:2] == [3, 4]
    good = y[[0, 3, 4, 5]].double()
    assert torch.allclose(state.sqnorm_sum, good.square().sum()[None], rtol=1e-6)
    assert torch.allclose(state.gate_sum, torch.tensor([4.0], dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_statistics(backend):
    call = make_call((90, 2, 4, 20, 12), torch.float32, 9)
    rows = make_rows(90, 3)
    state = BankStats.empty(4, channels=(20, 12), coactivation=True)
    out = moe_mlp(call, state=state, rows=rows, backend=backend)
    assert_close("with channels", out, loop_over_slots(call), torch.float32)
    plan = plan_torch(call["top_k_index"], 4)
    h = swiglu(gate_up_torch(call["x"], plan, call["gate_up"]))
    y = grouped_linear_torch(h, plan, call["down"])
    together = torch.zeros(4, 4, dtype=torch.int64)
    for t in range(90):
        used = [e for e, g in zip(call["top_k_index"][t].tolist(), call["top_k_weights"][t].tolist())
                if g != 0 and rows.counted[t]]  # fmt: skip
        for a in used:
            for b in used:
                together[a, b] += 1
    assert torch.equal(state.coactivation, together)
    assert torch.equal(together.diagonal(), state.rows)
    assert torch.allclose(state.channel_max.amax(1), state.out_max)
    for e in range(4):
        slots = {r: int(plan.order[r]) for r in range(plan.offsets[e], plan.offsets[e + 1])}
        gates = call["top_k_weights"].reshape(-1)
        taken = [r for r, slot in slots.items() if rows.counted[slot // 2] and gates[slot] != 0]
        assert torch.allclose(state.channel_max[e], y[taken].abs().amax(0), rtol=1e-5)
        assert torch.allclose(state.in_channel_max[e], h[taken].abs().amax(0), rtol=1e-5)
        assert torch.allclose(state.in_channel_sq[e], h[taken].double().square().sum(0), rtol=1e-5)


def test_combine_reference_is_the_weighted_sum():
    index = torch.tensor([[1, 0], [0, 2]])  # 2 is a sentinel
    plan = plan_torch(index, 2)
    y = torch.arange(12.0).reshape(4, 3)
    gates = torch.tensor([[0.5, 2.0], [1.0, 9.0]])
    expected = torch.stack([0.5 * y[2] + 2.0 * y[0], y[1]])
    assert torch.equal(combine_torch(y, plan, gates), expected)


def test_single_plan():
    plan = single_plan(3, torch.device("cpu"))
    assert plan.order.tolist() == [0, 1, 2] and plan.offsets.tolist() == [0, 3] and plan.num_experts == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_that_do_not_fit_are_refused(backend):
    call = make_call((6, 2, 4, 16, 8), torch.float32, 0)
    wrong = [
        (call, BankStats.empty(3), None),
        (call, BankStats.empty(4), make_rows(5, 0)),
        (call | {"top_k_weights": call["top_k_weights"][:, :1]}, BankStats.empty(4), None),
        (call | {"top_k_index": call["top_k_index"][:5], "top_k_weights": call["top_k_weights"][:5]},
         BankStats.empty(4), None),
    ]  # fmt: skip
    for arguments, state, rows in wrong:
        with pytest.raises(ValueError, match="experts|do not fit"):
            moe_mlp(arguments, state=state, rows=rows, backend=backend)
    with pytest.raises(ValueError, match="do not fit"):
        ops.output_stats(torch.zeros(6, 4), torch.zeros(2, 4), BankStats.empty(1), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_and_sums_of_extreme_rows(backend):
    """Values beyond fp8 and fp16, rows that do not count, NaN, and an infinite routing weight, against plain loops."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(40, 6, generator=generator) * 10 ** torch.linspace(0, 5, 40)[:, None]
    h[3], h[5, 0], h[7, 2] = torch.nan, torch.inf, torch.nan
    weight = torch.randn(1, 9, 6, generator=generator)
    gates = torch.rand(40, 1, generator=generator)
    gates[10], gates[11] = torch.inf, torch.nan
    ids = torch.arange(40)
    rows = Rows((ids != 5) & (ids != 39), ids % 8 == 0, ids // 8, ids % 8, ids)
    state = BankStats.empty(1, channels=(9, 6))
    weights = ops.ExpertWeights(None, weight)
    y = ops.down_stats(h, single_plan(40, h.device), weights, gates, state, rows=rows, backend=backend)
    counts, sums, squares = [0] * 5, [0.0] * 5, torch.zeros(6, dtype=torch.float64)
    for t in range(40):
        if not rows.counted[t]:
            continue
        finite, size = y[t].isfinite(), y[t].abs()
        counts[0] += 1
        counts[1] += bool(rows.first[t])
        counts[2] += int((~finite).sum())
        counts[3] += int((finite & (size > 65504)).sum())
        counts[4] += int((finite & (size > 448)).sum())
        if finite.all() and gates[t].isfinite():
            g, norm = float(gates[t]), float(y[t].double().norm())
            for i, term in enumerate((g, g * bool(rows.first[t]), norm, norm**2, g * norm)):
                sums[i] += term
            squares += h[t].double() ** 2
    assert counts[3] > 0 and counts[4] > counts[3] and counts[2] >= 18
    assert state.counts[0].tolist() == counts
    assert state.sums[0].tolist() == pytest.approx(sums, rel=1e-5)
    assert state.in_channel_sq[0].tolist() == pytest.approx(squares.tolist(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [True, False])
def test_parts_are_what_calls_of_their_own_would_keep(backend, fused):
    """Every further state is updated with its own rows, and neither the result nor the first state knows of it."""
    call, rows = make_call((60, 3, 8, 64, 32), torch.float32, 4), make_rows(60, 2)
    half = torch.arange(60) % 2 == 0
    own = [Rows(rows.counted & mask, rows.first ^ mask, *rows.tensors()[2:], source=3) for mask in (half, ~half)]
    channels = None if fused else (64, 32)
    state, alone, plain = (BankStats.empty(8, channels=channels) for _ in range(3))
    parts = [(BankStats.empty(8), one) for one in own]
    out = moe_mlp(call, state=state, rows=rows, parts=parts, backend=backend)
    assert torch.equal(out, moe_mlp(call, state=alone, rows=rows, backend=backend))
    assert state.equal(alone, 0) and not state.equal(plain, 0)
    for part, one in parts:
        apart = BankStats.empty(8)
        moe_mlp(call, state=apart, rows=one, backend=backend)
        assert part.equal(apart, 0) and int(part.rows.sum()) > 0
    with pytest.raises(ValueError, match="state is of 4 experts"):
        moe_mlp(call, state=state, rows=rows, parts=[(BankStats.empty(4), own[0])], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_does_not_matter(backend):
    """Many scripts set it to load a model; buffers and counts must stay what they are."""
    call, rows = make_call((300, 4, 8, 64, 32), torch.bfloat16, 3), make_rows(300, 1)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            state = BankStats.empty(8, channels=(64, 32), coactivation=True, published=True)
            plain = BankStats.empty(8)
            out = [moe_mlp(call, state=one, rows=rows, backend=backend) for one in (state, plain)]
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((state, plain, out))
    (state, plain, out), (other_state, other_plain, other_out) = results
    assert state.equal(other_state, 0) and plain.equal(other_plain, 0)
    assert all(torch.equal(a, b) for a, b in zip(out, other_out))


def test_tensors_that_kernels_could_not_read():
    call = make_call((4, 2, 4, 16, 8), torch.float32, 0)
    rows = make_rows(8, 1)
    sliced = Rows(*(t[::2] for t in rows.tensors()))
    with pytest.raises(ValueError, match="contiguous"):
        moe_mlp(call, state=BankStats.empty(4), rows=sliced)
    with pytest.raises(ValueError, match="state is on meta, x on cpu"):
        moe_mlp(call, state=BankStats.empty(4, "meta"))
    deep = call | {"x": call["x"][:, None].expand(4, 3, 16)}
    with pytest.raises(ValueError, match="an input for every slot"):
        moe_mlp(deep, state=BankStats.empty(4))


def test_every_expert_of_no_tokens():
    call = make_call((4, 2, 4, 16, 8), torch.float32, 0)
    y = ops.every_expert(call["x"][:0], weights_of(call))
    assert y.shape == (4, 0, 16)


def test_an_activation_that_a_backend_does_not_know_goes_to_one_that_does(monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, "tanh", torch.tanh)
    call = make_call((30, 2, 4, 16, 8), torch.float32, 6) | {"gate": Gate("tanh")}
    served, state = [], BankStats.empty(4)
    out = moe_mlp(call, state=state, backend="cpu", served=lambda *note: served.append(note))
    reason = "it has no kernel for the activation tanh"
    assert served == [("torch", f"backend cpu does not serve torch.float32 on cpu: {reason}")]

    def tanh_gate(z):
        gate, up = z.chunk(2, dim=-1)
        return gate.tanh() * up

    assert_close("tanh", out, loop_over_slots(call, tanh_gate), torch.float32)
    for backend, device in ((CpuBackend(), "cpu"), (TritonBackend(), "cuda")):
        assert backend.activations <= set(ACTIVATIONS)
        assert backend.refusal(torch.device(device), torch.float32, 4, weights_of(call)) == reason
        assert backend.refusal(torch.device(device), torch.float32, 4, weights_of(call | {"gate": tanh_gate})) is None


def test_experts_without_a_gate_are_refused():
    call = make_call((4, 2, 4, 16, 8), torch.float32, 0) | {"gate": None}
    with pytest.raises(ValueError, match="gate: None"):
        moe_mlp(call, state=BankStats.empty(4))


def test_without_the_extension_torch_serves(monkeypatch):
    without = CpuBackend(None)
    reason = without.refusal(torch.device("cpu"), torch.float32)
    assert reason.startswith("sedetect._C is not built; ")
    monkeypatch.setitem(ALL_BACKENDS, "cpu", without)
    monkeypatch.delitem(ALL_BACKENDS, "triton")  # which serves the CPU where it is interpreted
    assert choose_backend(torch.device("cpu"), torch.float32)[0].name == "torch"
    chosen, why = choose_backend(torch.device("cpu"), torch.float32, "cpu")
    assert chosen.name == "torch" and why.endswith(reason)


def test_columns_are_those_of_the_extension():
    from sedetect import _C

    assert (len(COUNTS), len(SUMS), len(RECORD)) == (_C.COUNTS, _C.SUMS, _C.COLUMNS)
