"""The drop-in: the model computes what it did, every bank is measured, and nothing stays behind."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.compare import assert_equal, assert_logits_close
from support.models import CONFIGS, TINY, random_model, snapshot, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

import sedetect
from sedetect.errors import SedetectError
from sedetect.kernels.row_stats import row_stats_torch
from sedetect.kernels.update import update_torch
from sedetect.models.attach import SubstitutedDown
from sedetect.ops.choose import BACKENDS
from sedetect.ops.cpu import CpuBackend
from sedetect.stats.bank import BankStats
from sedetect.stats.model import ModelStats, merge_all
from sedetect.stats.place import BankId

BANKS = {
    "qwen3_moe": [(0, "routed"), (1, "routed"), (2, "routed")],
    "qwen2_moe": [(0, "routed"), (0, "shared"), (1, "dense"), (2, "routed"), (2, "shared")],
    "deepseek_v3": [(0, "dense"), (1, "routed"), (1, "shared"), (2, "routed"), (2, "shared")],
    "gpt_oss": [(0, "routed"), (1, "routed"), (2, "routed")],
}


def eager_logits(model, ids, **kwargs):
    before = model.config._experts_implementation
    model.set_experts_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=ids, **kwargs).logits
    model.set_experts_implementation(before)
    return logits


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_banks(name, backend):
    model, ids = random_model(name), token_ids()
    reference = eager_logits(model, ids)
    with sedetect.profile(model, backend=backend) as prof:
        logits = model(input_ids=ids).logits
    assert_logits_close(logits, reference, 1e-4)
    stats = prof.stats
    assert list(stats.banks) == [BankId("decoder", *bank) for bank in BANKS[name]]
    assert stats.header.layers == {"decoder": 3}
    for bank, state in stats.banks.items():
        described = stats.header.banks[str(bank)]
        assert described.backends == [backend]
        assert state.rows.sum() == ids.numel() * described.top_k
        assert described.top_k == (2 if bank.kind == "routed" else 1)
        assert model.get_submodule(described.module) is not None
    assert not stats.header.notes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model, ids = random_model("qwen2_moe", dtype), token_ids()
    reference = eager_logits(model, ids)
    with sedetect.profile(model) as prof:
        logits = model(input_ids=ids).logits
    assert_logits_close(logits, reference, {torch.bfloat16: 0.2, torch.float16: 0.03, torch.float64: 1e-12}[dtype])
    served = {b for bank in prof.stats.header.banks.values() for b in bank.backends}
    assert served == ({"torch"} if dtype == torch.float64 else {"cpu"})


def test_a_backend_that_cannot_serve_says_why_and_falls_back():
    model = random_model("qwen3_moe", torch.float64)
    with sedetect.profile(model, backend="cpu") as prof:
        model(input_ids=token_ids())
    assert prof.stats.header.banks["decoder.0.routed"].backends == ["torch"]
    assert any("backend cpu does not serve torch.float64" in str(note) for note in prof.stats.header.notes)
    with pytest.raises(SedetectError, match="backend 'abacus' does not exist"):
        sedetect.profile(model, backend="abacus")


class Recorder:
    """A plain experts loop that shares no code with the backends, and writes down what it sees."""

    def __init__(self, model):
        self.seen = {}
        self.layers = {}
        for layer, block in enumerate(model.model.layers):
            self.layers[id(block.mlp.experts)] = layer

    def __call__(self, module, x, index, weights):
        out = torch.zeros_like(x)
        for token, (experts, gates) in enumerate(zip(index.tolist(), weights)):
            for e, g in zip(experts, gates):
                z = module.gate_up_proj[e] @ x[token]
                gate, up = z[: len(z) // 2], z[len(z) // 2 :]
                h = gate * torch.sigmoid(gate) * up
                y = module.down_proj[e] @ h
                out[token] += g * y
                entry = self.seen.setdefault((self.layers[id(module)], e), [0, 0.0, 0.0, 0.0, 0.0])
                entry[0] += 1
                entry[1] = max(entry[1], float(y.abs().max()))
                entry[2] = max(entry[2], float(h.abs().max()))
                entry[3] += float(g * y.norm())
                entry[4] += float(y.norm())
        return out


def test_statistics_equal_those_of_an_independent_loop():
    from transformers.integrations.moe import ExpertsInterface

    model, ids = random_model("qwen3_moe"), token_ids(2, 16)
    recorder = Recorder(model)
    ExpertsInterface.register("recorder", recorder)
    model.set_experts_implementation("recorder")
    with torch.no_grad():
        model(input_ids=ids)
    model.set_experts_implementation("grouped_mm")
    with sedetect.profile(model) as prof:
        model(input_ids=ids)
    for layer, state in enumerate(prof.stats.banks.values()):
        in_max = state.in_max[:, 0, 0].clamp(min=0).to(torch.int32).view(torch.float32)
        for e in range(8):
            rows, out_max, h_max, gate_norm, norm = recorder.seen.get((layer, e), [0, 0, 0, 0, 0])
            assert state.rows[e] == rows
            measured = (state.out_max[e], in_max[e], state.gate_norm_sum[e], state.norm_sum[e])
            for mine, reference in zip(measured, (out_max, h_max, gate_norm, norm)):
                assert float(mine) == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_statistics_are_bit_for_bit_those_of_the_backends_own_output(name, monkeypatch):
    """Record every down_proj output the cpu backend hands out during a forward, and recompute the state from it."""
    model, ids = random_model(name), token_ids()
    with sedetect.profile(model) as fused:
        model(input_ids=ids)
    backend, outputs, calls = BACKENDS["cpu"], [], {}
    down, update = backend.down, backend.update

    def recording_down(h, *args):
        y, stats = down(h, *args)
        outputs.append((y.clone(), h.to(y.dtype)))
        return y, stats

    def recording_update(state, stats, *args):
        calls[id(state)] = (*outputs[-1], *args)
        update(state, stats, *args)

    monkeypatch.setattr(backend, "down", recording_down)
    monkeypatch.setattr(backend, "update", recording_update)
    with sedetect.profile(model, channels=True) as prof:  # channels: the path that hands its output out
        model(input_ids=ids)
    for one in prof._measured:
        bank = one.bank
        y, h, *rest = calls[id(one.state)]
        expected = BankStats.empty(bank.experts)
        update_torch(expected, row_stats_torch(y, h), *rest)
        measured = replace(one.state, channel_max=None, in_channel_max=None, in_channel_sq=None)
        assert measured.rows.sum() > 0 and measured.equal(expected, sums_rtol=1e-5), bank.id
        assert fused.stats.banks[bank.id].equal(measured), bank.id


def test_nothing_stays_behind():
    model, ids = random_model("qwen2_moe"), token_ids()
    before = snapshot(model)
    keys = list(model.state_dict())
    with sedetect.profile(model) as prof:
        model(input_ids=ids)
        assert list(model.state_dict()) == keys
        assert [id(p) for p in model.parameters()] == [p for _, p in before["parameters"]]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert any(isinstance(module, SubstitutedDown) for module in model.modules())
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="mine"), sedetect.profile(model) as prof:
        model(input_ids=ids)
        raise RuntimeError("mine")
    assert snapshot(model) == before
    assert prof.stats.header.tokens == ids.numel()
    with pytest.raises(IndexError), sedetect.profile(model) as prof:
        model(input_ids=torch.tensor([[10_000]]))
    assert snapshot(model) == before
    assert any("failed before its end" in str(note) for note in prof.stats.header.notes)


def test_no_grad_inside():
    model = random_model("qwen3_moe")
    with sedetect.profile(model):
        assert not model(input_ids=token_ids()).logits.requires_grad
    assert model(input_ids=token_ids()).logits.requires_grad


def test_another_model_of_the_same_config_is_untouched():
    model = random_model("qwen3_moe")
    twin = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config is model.config
    ids = token_ids()
    with torch.no_grad():
        reference = twin(input_ids=ids).logits
    with sedetect.profile(model) as prof:
        with torch.no_grad():
            assert torch.equal(twin(input_ids=ids).logits, reference)
        assert twin.get_experts_implementation() == {"": "grouped_mm"}
        assert twin.model.layers[0].mlp.experts.config is twin.config
    assert prof.stats.header.tokens == 0
    assert all("never ran" in str(note) for note in prof.stats.header.notes)


def test_a_compiled_model():
    model, ids = random_model("qwen2_moe"), token_ids()
    compiled = torch.compile(model, backend="eager")
    runs = []
    for form in (model, compiled):
        with sedetect.profile(form, source="text") as prof:
            for number in range(2):
                prof.batch(sequence_ids=torch.arange(4) + 4 * number)
                logits = form(input_ids=ids).logits
        runs.append((prof.stats, logits))
    assert torch.equal(runs[0][1], runs[1][1])
    assert_equal(runs[1][0], runs[0][0])
    with torch.no_grad():
        assert_logits_close(compiled(input_ids=ids).logits, runs[0][1], 1e-4)


def test_two_profiles_of_one_model_do_not_nest():
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        with pytest.raises(SedetectError, match="sedetect is attached already"), sedetect.profile(model):
            pass
        model(input_ids=token_ids())
    assert prof.stats.header.tokens == token_ids().numel()
    assert not hasattr(model.model.layers[0].mlp.experts.config, "sedetect_call")


def test_refused_models():
    model = random_model("qwen3_moe")
    with pytest.raises(SedetectError, match="training mode"):
        sedetect.profile(model.train())
    dense = AutoModelForCausalLM.from_config(Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )).eval()  # fmt: skip
    with pytest.raises(SedetectError, match="Qwen3ForCausalLM: no MoE layer"):
        sedetect.profile(dense)
    mlp = dense.model.layers[0].mlp
    mlp.experts = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(SedetectError, match=r"model.layers.0.mlp.experts \(Linear\)"):
        sedetect.profile(dense)
    model = random_model("qwen3_moe")
    model.model.layers[1].mlp.experts.down_proj = nn.Parameter(torch.zeros(8, 32, 24, dtype=torch.int8), False)
    with pytest.raises(SedetectError, match="stored as torch.int8"):
        sedetect.profile(model)


@pytest.fixture(scope="module")
def separate_runs():
    """Five forwards profiled together, and each alone."""
    model = random_model("qwen2_moe")
    batches = [token_ids(3, 20, seed) for seed in range(5)]

    def run(numbers):
        with sedetect.profile(model, source="text", channels=True, coactivation=True) as prof:
            for number in numbers:
                prof.batch(sequence_ids=torch.arange(3) + 3 * number)
                model(input_ids=batches[number])
        return prof.stats

    return run(range(5)), [run([number]) for number in range(5)]


def test_merging_is_exact_in_every_order_and_grouping(separate_runs):
    together, alone = separate_runs
    for order in itertools.permutations(range(5)):
        merged = merge_all(alone[i] for i in order)
        assert_equal(merged, together)
    left = alone[0].merge(alone[1]).merge(alone[2].merge(alone[3])).merge(alone[4])
    right = alone[4].merge(alone[3]).merge(alone[1].merge(alone[0].merge(alone[2])))
    assert_equal(left, together)
    assert_equal(right, together)
    assert together.merge(ModelStats.empty()) is together and ModelStats.empty().merge(together) is together


def test_a_run_never_merges_with_itself(separate_runs):
    together, alone = separate_runs
    with pytest.raises(SedetectError, match="sequences 0 to 2 are in both runs"):
        together.merge(alone[0])


def test_other_batch_compositions_agree_within_tolerance():
    """bf16 GEMMs round differently at other batch sizes: maxima move by rounding, and near ties routing flips."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, 4096, (8, 64), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    runs = []
    for size in (1, 3, 8):
        with sedetect.profile(model, source="text") as prof:
            for number in range(0, 8, size):
                part = ids[number : number + size]
                prof.batch(sequence_ids=torch.arange(number, number + len(part)))
                model(input_ids=part)
        runs.append(prof.stats)
    slots = ids.numel() * 4
    for run in runs[1:]:
        for bank, state in run.banks.items():
            reference = runs[0].banks[bank]
            flips = int((state.rows - reference.rows).abs().sum()) / 2
            assert state.rows.sum() == slots and flips <= 0.02 * slots, f"{bank}: {flips} routing flips of {slots}"
            # Where the largest row stayed, it moved by rounding alone.
            same = (state.peak()[:, 4:6] == reference.peak()[:, 4:6]).all(1) & (reference.rows > 0)
            assert same.float().mean() > 0.6
            worst = ((state.out_max - reference.out_max).abs() / reference.out_max.clamp(min=1e-6))[same].max()
            assert worst <= 0.08, f"{bank}: {worst}"
        assert [str(e) for e in sedetect.rank(run).super_experts] == ["L1E28"]


def test_an_extension_that_is_not_built_is_noted(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu", CpuBackend(None))
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=token_ids(1, 4))  # few: Triton's interpreter serves them where there is no GPU
    served = {backend for bank in prof.stats.header.banks.values() for backend in bank.backends}
    (note,) = [str(note) for note in prof.stats.header.notes if note.code == "slow"]
    assert "cpu" not in served and note.startswith("the cpu backend served nothing: sedetect._C is not built")
