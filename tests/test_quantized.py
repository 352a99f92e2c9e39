"""Checkpoints stored in FP8, packed FP4 and MXFP4: measured as the same model with the weights these stand for.

The modules are built as transformers' quantizers build them, and filled here: on a CPU its loader would dequantize
them.
"""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import save_random, to_fp8
from support.compare import assert_logits_close
from support.interpreter import DEVICE, INTERPRETED
from support.models import CONFIGS, random_model, snapshot, token_ids
from support.quantized import fp4, fp8, in_fp8, listed_twins, packed, store, twins
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen2MoeConfig
from transformers.integrations.finegrained_fp8 import (
    FP8Experts,
    FP8GroupedLinear,
    FP8Linear,
)
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import sedetect
from sedetect.adapters.quantized import has_kernel, linear_weight, serve_linears
from sedetect.adapters.registry import serve_quantized
from sedetect.analysis.matrices import expert_matrices
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.kernels.dequantize import QuantizedWeights, dequantize
from sedetect.kernels.gate import Gate
from sedetect.kernels.rows import Rows
from sedetect.models.banks import find_banks
from sedetect.models.identity import model_digest, model_id
from sedetect.models.loading import load_model
from sedetect.models.measure import Measurement, measure
from sedetect.models.streamed import folder_digest, open_streamed
from sedetect.ops.choose import BACKENDS, choose_backend
from sedetect.ops.contract import ExpertWeights
from sedetect.ops.triton import TritonBackend
from sedetect.stats.note import Note
from sedetect.stats.place import Place, Weight

KINDS = {"fp8": torch.float8_e4m3fn, "fp8-ue8m0": torch.float8_e4m3fn, "fp4": torch.int8, "mxfp4": torch.uint8}
HOW = ((None, torch.float32), (None, torch.bfloat16), ("torch", torch.float32))
CASES = [(kind, *how) for kind in KINDS for how in HOW]
if INTERPRETED:  # slowly
    CASES += [("fp8", "triton", torch.bfloat16), ("mxfp4", "triton", torch.bfloat16)]
else:
    CASES += [(kind, "triton", dtype) for kind in KINDS for dtype in (torch.float32, torch.bfloat16)]


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setitem(BACKENDS, "triton", TritonBackend())


def stored_dtypes(model, seen):
    """Note at each forward what the experts of the model are stored as."""

    def note(block, _):
        for weight in (block.experts.gate_up_proj, block.experts.down_proj):
            seen.add(weight.dtype if isinstance(weight, torch.Tensor) else weight.storage.data.dtype)

    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.register_forward_pre_hook(note)


def profiled(model, backend):
    ids = token_ids(2, 4 if backend == "triton" and INTERPRETED else 8).to(DEVICE)
    with sedetect.profile(model, source="text", backend=backend) as prof:
        prof.batch(sequence_ids=torch.arange(len(ids)))
        logits = model(input_ids=ids).logits
    return prof.stats, logits


@pytest.mark.parametrize(("kind", "backend", "dtype"), CASES, ids=str)
def test_measured_as_what_it_stands_for(kind, backend, dtype):
    plain, stored = twins(kind, dtype)
    before, seen = snapshot(stored), set()
    stored_dtypes(stored, seen)
    runs = [profiled(model, backend) for model in (plain, stored)]
    assert snapshot(stored) == before
    assert seen == {KINDS[kind]}
    exact = dtype == torch.float32
    assert_logits_close(runs[1][1], runs[0][1], 1e-4 if exact else 0.1)
    assert list(runs[0][0].banks) == list(runs[1][0].banks)
    linears = sum(isinstance(m, FP8Linear) for m in stored.modules())
    assert (linears == 0) == (kind == "mxfp4")
    note = f"{linears} FP8 linears computed with dequantized weights: no kernel here"
    assert runs[1][0].header.notes.count(Note("dequantized", note, count=linears)) == (
        linears > 0 and not has_kernel(DEVICE.type)
    )
    # What stands in a linear is measured on its output, which any backend takes.
    chosen = {"routed": "cpu" if DEVICE.type == "cpu" else "triton"}
    for bank, state in runs[0][0].banks.items():
        other = runs[1][0].banks[bank]
        served = runs[1][0].header.banks[str(bank)].backends
        assert served == [backend or chosen.get(bank.kind, choose_backend(DEVICE, dtype)[0].name)]
        if exact:
            assert torch.equal(state.rows, other.rows)
        assert (state.rows == other.rows).float().mean() > 0.5
        hit = (state.rows == other.rows) & (state.rows > 0)
        assert torch.allclose(state.out_max[hit], other.out_max[hit], rtol=1e-4 if exact else 0.1), bank
        assert torch.allclose(state.norm_sum[hit], other.norm_sum[hit], rtol=1e-4 if exact else 0.05), bank


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_is_fused(kind):
    plain, stored = twins(kind)
    for model in (plain, stored):
        for bank in (b for b in find_banks(model) if b.id.kind == "routed"):
            one = Measurement(bank, Rows.unmapped)
            measure(one)
            gpt_oss = Gate(interleaved=True, limit=7.0, slope=1.702, shift=1.0)
            assert one.gate == (gpt_oss if kind == "mxfp4" else Gate())


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_matrices_for_analyses(kind):
    plain, stored = twins(kind)
    for one, other in zip(find_banks(plain), find_banks(stored), strict=True):
        mine, theirs = expert_matrices(stored, other), expert_matrices(plain, one)
        assert set(mine) == {"gate", "up", "down"} == set(theirs)
        for name in mine:
            assert torch.allclose(mine[name].float(), theirs[name].float(), rtol=1e-2), (other.id, name)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_ablation_inside_a_profile(kind):
    plain, stored = twins(kind)
    place = Place("decoder", 0, "routed", 3)
    outputs = []
    for model in (plain, stored):
        with sedetect.profile(model) as prof, ablate(model, [place]):
            outputs.append(model(input_ids=token_ids().to(DEVICE)).logits)
        state = prof.stats.banks[("decoder", 0, "routed")]
        assert state.rows[3] == 0 and state.rows.sum() > 0
    assert_logits_close(outputs[1], outputs[0], 1e-4)


def test_per_tensor_scales():
    """One scale for a matrix; gate and up, which are stored together, keep one each."""
    plain, stored = twins("fp8")
    for layer, twin in zip(stored.model.layers, plain.model.layers):
        if isinstance(layer.mlp.experts if hasattr(layer.mlp, "experts") else None, FP8Experts):
            experts = layer.mlp.experts
            experts.block_size = None
            with torch.no_grad():
                for name, halves in (("gate_up_proj", 2), ("down_proj", 1)):
                    weight, values = getattr(twin.mlp.experts, name), getattr(experts, name).float()
                    scale = torch.rand(len(values), halves, 1, device=DEVICE) + 0.5
                    parts = [part * scale[:, i, None] for i, part in enumerate(values.chunk(halves, 1))]
                    weight.copy_(torch.cat(parts, 1))
                    experts._parameters[f"{name}_scale_inv"] = nn.Parameter(scale)
    (_, expected), (_, logits) = profiled(plain, None), profiled(stored, None)
    assert_logits_close(logits, expected, 1e-4)


def test_single_weights_of_shared_experts_are_those_multiplied():
    """Switched off, or divided among: what the stored 8 bits stand for, not the bits."""
    plain, stored = twins("fp8")
    weight = Weight(Place("decoder", 0, "shared", "shared"), 5, 7)
    outputs = []
    for model in (plain, stored):
        restore, _ = serve_quantized(model)
        with torch.no_grad(), ablate(model, [weight]):
            outputs.append(model(input_ids=token_ids().to(DEVICE)).logits)
        restore()
    assert_logits_close(outputs[1], outputs[0], 1e-4)
    down = [model.model.layers[0].mlp.shared_expert.down_proj for model in (plain, stored)]
    assert torch.equal(linear_weight(down[0]), linear_weight(down[1])) and linear_weight(nn.Identity()) is None


def test_served_for_good_and_in_a_profile():
    """As load_model serves a model where its kernels are missing: it runs by itself, and a profile leaves it so."""
    plain, stored = twins("fp8")
    restore, served = serve_quantized(stored)
    ids, before = token_ids().to(DEVICE), snapshot(stored)
    with torch.no_grad():
        expected, logits = plain(input_ids=ids).logits, stored(input_ids=ids).logits
    assert_logits_close(logits, expected, 1e-4)
    assert served and any(f"{served} FP8 linears" in str(note) for note in profiled(stored, None)[0].header.notes)
    assert snapshot(stored) == before
    with torch.no_grad():
        assert torch.equal(stored(input_ids=ids).logits, logits)
    restore()
    assert not any("forward" in module.__dict__ for module in stored.modules())


def test_grouped_linears():
    """Block-diagonal: each group of rows has its own part of the input."""
    linear = FP8GroupedLinear(24, 32, 4, block_size=(8, 8))
    weight = nn.Parameter(torch.randn(32, 24, generator=torch.Generator().manual_seed(0)))
    store(linear, "weight", weight, (8, 8), torch.float32)
    x = torch.randn(2, 5, 4, 24, generator=torch.Generator().manual_seed(1))
    restore, served = serve_linears(nn.ModuleList([linear]))
    assert served == 1
    y = linear(x)
    restore()
    assert "forward" not in linear.__dict__
    for group in range(4):
        own = x[:, :, group] @ weight[8 * group : 8 * (group + 1)].T
        assert torch.allclose(y[:, :, group], own, atol=1e-5)


def test_mxfp4_that_was_not_loaded_and_in_an_order_that_is_not_known():
    model = random_model("gpt_oss")
    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(SedetectError, match="has no scales; load the model with from_pretrained"):
        sedetect.profile(model)
    _, model = twins("mxfp4")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj.storage.data = experts.down_proj.storage.data[:, :-1]
    with pytest.raises(SedetectError, match=r"Mxfp4Config\(dequantize=True\)"), sedetect.profile(model):
        model(input_ids=token_ids().to(DEVICE))


def test_what_has_no_kernel_is_refused_and_served_by_another():
    weights = torch.empty(4, 16, 16, dtype=torch.float8_e5m2)
    experts = QuantizedWeights(weights, torch.ones(4, 1, 1), None, torch.float32)
    reason = TritonBackend().refusal(DEVICE, torch.float32, 4, ExpertWeights(None, experts))
    assert reason == "it has no kernel for this quantization of the weights"
    _, stored = twins("fp8")
    for layer in stored.model.layers:
        if isinstance(getattr(layer.mlp, "experts", None), FP8Experts):
            layer.mlp.experts.down_proj.data = layer.mlp.experts.down_proj.float().to(torch.float8_e5m2)
    stats, _ = profiled(stored, "triton")
    assert stats.header.banks["decoder.0.routed"].backends == ["cpu" if DEVICE.type == "cpu" else "torch"]
    assert any(f"backend triton does not serve torch.float32 on {DEVICE.type}" in str(n) for n in stats.header.notes)


@pytest.mark.parametrize("kind", [packed, in_fp8])
def test_quantized_linears_in_a_list_of_experts(kind):
    """Remote code whose experts' linears a quantizer replaced: each expert computes itself, and its output is read."""
    plain, stored = listed_twins(kind)
    before = snapshot(stored)
    (expected, logits), (stats, own) = profiled(plain, None), profiled(stored, None)
    assert snapshot(stored) == before
    assert_logits_close(own, logits, 1e-4)
    assert list(stats.banks) == list(expected.banks)
    for bank, state in expected.banks.items():
        assert torch.equal(stats.banks[bank].rows, state.rows)
        assert torch.allclose(stats.banks[bank].out_max, state.out_max, rtol=1e-4)
        assert torch.allclose(stats.banks[bank].norm_sum, state.norm_sum, rtol=1e-4)
    weight = Weight(Place("decoder", 0, "routed", 1), 5, 7)
    if kind is packed:
        refused = pytest.raises(SedetectError, match="PackedLinear: weights in this format cannot be read")
        with refused, torch.no_grad(), ablate(stored, [weight]):
            stored(input_ids=token_ids().to(DEVICE))


@pytest.fixture
def checkpoint(tmp_path, request):
    """A tiny checkpoint as its kind ships, and one of what its weights stand for."""
    kind = request.param
    size = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 64}
    common = CONFIGS["gpt_oss" if kind == "mxfp4" else "qwen2_moe"]().to_dict() | size
    if kind == "fp8":
        common |= {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "layer_types": None}
        config = Qwen2MoeConfig(**common)
    else:
        config = GptOssConfig(**common | {"layer_types": ["sliding_attention", "full_attention"]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    folders = tmp_path / kind, tmp_path / "plain"
    for folder in folders:
        model.save_pretrained(folder)
    weights = load_file(folders[0] / "model.safetensors")
    stored, plain = (fp8_file if kind == "fp8" else mxfp4_file)(weights)
    for folder, tensors in zip(folders, (stored, plain)):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "mxfp4"}
    if kind == "fp8":
        how = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
        how |= {"modules_to_not_convert": ["lm_head", "shared_expert_gate"]}
    file = folders[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
    return folders


def fp8_file(weights):
    """Every linear but the head and the gates in FP8."""
    stored, plain = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            (value,), (scale,) = fp8(weight[None].float())
            stored |= {name: value, f"{name}_scale_inv": scale}
            plain[name] = dequantize(value, scale, (128, 128), weight.dtype)
    return stored, plain


def mxfp4_file(weights):
    """The experts in blocks of 32 values, two to a byte, with the bytes of their exponents."""
    stored, plain = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            value, scale = fp4(weight.float().transpose(1, 2))
            stored |= {f"{name}_blocks": value.unflatten(-1, (-1, 16)), f"{name}_scales": scale}
            del stored[name]
            back = torch.stack([dequantize(v, s, None, weight.dtype) for v, s in zip(value, scale)])
            plain[name] = back.transpose(1, 2).contiguous()
    return stored, plain


@pytest.mark.parametrize("checkpoint", ["fp8", "mxfp4"], indirect=True)
def test_one_digest_however_it_is_opened(checkpoint):
    """Dequantized by transformers or not: statistics are of the model that analyses and ablations then open."""
    folder, plain = checkpoint
    opened = [load_model(folder), open_streamed(folder, weights=False).model, open_streamed(folder).model]
    assert len({model_id(model) for model in opened}) == 1
    digests = [model_digest(opened[0]), folder_digest(folder, str(opened[0].dtype).removeprefix("torch."))]
    assert digests[0] == digests[1] and model_digest(load_model(plain)).partition("-")[0] == model_id(opened[0])
    assert folder_digest(folder, "bfloat16 (float8_e4m3fn weights)").endswith("unchecked")


@pytest.mark.parametrize("block", [12, 7])  # transformers refuses 32 by either, and would cut 16 by 8 and 24 by 6
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_blocks_that_do_not_divide_a_matrix(tmp_path, name, block):
    """As of DeepSeek-V3 and R1, whose key-value projection has 576 rows: whole and layer by layer."""
    folder = save_random(CONFIGS[name](), tmp_path, dtype=torch.bfloat16)
    to_fp8(folder, block)
    stored = load_file(folder / "model.safetensors")
    loaded, streamed = load_model(folder), open_streamed(folder)
    layers = dict(zip(streamed.paths, streamed.layers))
    ragged = 0
    for key, value in stored.items():
        if f"{key}_scale_inv" not in stored or ".experts." in key:
            continue
        scale, (rows, columns) = stored[f"{key}_scale_inv"], value.shape
        row, column = torch.arange(rows) // block, torch.arange(columns) // block
        expected = (value.float() * scale[row[:, None], column]).bfloat16()
        assert torch.equal(loaded.get_parameter(key), expected), key
        ragged += bool(rows % block or columns % block)
    assert ragged
    for number, (path, layer) in enumerate(layers.items()):
        streamed.load(number)
        for key, value in layer.state_dict().items():
            assert torch.equal(value, loaded.get_submodule(path).state_dict()[key]), (path, key)


@pytest.mark.parametrize("checkpoint", ["fp8", "mxfp4"], indirect=True)
def test_checkpoints_as_they_ship(checkpoint):
    """On a GPU FP8 stays FP8; transformers dequantizes it elsewhere, and MXFP4 where the package kernels is not."""
    kind = checkpoint[0].name
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        models = [load_model(folder, loading=sedetect.Loading(device=DEVICE)) for folder in reversed(checkpoint)]
    said = [str(one.message) for one in said if "transformers dequantized its MXFP4 experts" in str(one.message)]
    assert len(said) == (kind == "mxfp4") and all("pip install kernels" in one for one in said)
    experts = models[1].model.layers[0].mlp.experts
    kept = kind == "fp8" and DEVICE.type == "cuda"
    assert experts.down_proj.dtype == (torch.float8_e4m3fn if kept else torch.bfloat16)
    (expected, logits), (stats, own) = (profiled(model, None) for model in models)
    assert_logits_close(own, logits, 0.1)
    for bank, state in expected.banks.items():
        assert (state.rows == stats.banks[bank].rows).float().mean() > 0.5
        hit = (state.rows == stats.banks[bank].rows) & (state.rows > 0)
        assert torch.allclose(stats.banks[bank].out_max[hit], state.out_max[hit], rtol=0.1), bank
    with torch.no_grad():  # without a profile too
        assert_logits_close(models[1](input_ids=token_ids(2, 8).to(DEVICE)).logits, logits, 0.1)
