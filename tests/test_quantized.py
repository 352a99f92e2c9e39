"""Experts and linears stored in FP8 and packed FP4: measured as the same model with dequantized weights."""

import copy

import pytest
import torch
from models import random_model, snapshot
from test_profile import assert_logits_close, token_ids
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear

import sedetect
from sedetect.errors import SedetectError
from sedetect.quantized import dequantize

FP8 = torch.float8_e4m3fn
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def quantize(weight, block):
    """(stored, scales, the weight they stand for), block by block."""
    stored, back = torch.empty_like(weight, dtype=FP8), torch.empty_like(weight)
    scales = torch.empty(*(-(-n // b) for n, b in zip(weight.shape, block)))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[at].abs().max() / 448
            stored[at] = (weight[at] / scales[i, j]).to(FP8)
            back[at] = stored[at].float() * scales[i, j]
    return stored, scales, back


def test_packed_fp4_value_by_value():
    packed = torch.randint(-128, 128, (6, 48), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    result = dequantize(packed, scale, (128, 128), torch.float32)
    for row in range(6):
        for column in range(96):
            byte = int(packed[row, column // 2]) % 256
            value = E2M1[byte // 16 if column % 2 else byte % 16]
            assert float(result[row, column]) == pytest.approx(value * float(scale[row, column // 32]), rel=1e-6)


def fp8_twins(block, dtype):
    """A model with experts, shared experts and dense MLPs in FP8, and the same with what these stand for."""
    plain = random_model("qwen2_moe", dtype)
    stored = copy.deepcopy(plain)
    for (path, twin), module in zip(plain.named_modules(), stored.modules()):
        if path.endswith("experts"):
            experts = FP8Experts(module.config, block_size=block)
            for name in ("gate_up_proj", "down_proj"):
                for e, weight in enumerate(getattr(twin, name).data):
                    parts = quantize(weight.float(), block)
                    getattr(experts, name).data[e], getattr(experts, f"{name}_scale_inv").data[e] = parts[:2]
                    weight.copy_(parts[2])
            stored.get_submodule(path.rpartition(".")[0]).experts = experts
        elif isinstance(module, nn.Linear) and "mlp" in path and "gate." not in path + ".":
            linear = FP8Linear(module.in_features, module.out_features, block_size=block)
            linear.weight.data, linear.weight_scale_inv.data, back = quantize(twin.weight.data.float(), block)
            twin.weight.data.copy_(back)
            parent, _, name = path.rpartition(".")
            setattr(stored.get_submodule(parent), name, linear)
    return plain, stored.eval()


@pytest.mark.parametrize("block", [(128, 128), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_measured_as_what_it_stands_for(block, dtype):
    plain, stored = fp8_twins(block, dtype)
    ids, runs, before = token_ids(), [], snapshot(stored)
    seen = set()
    for layer in (stored.model.layers[0], stored.model.layers[2]):
        layer.mlp.experts.register_forward_pre_hook(lambda m, _: seen.add((m.gate_up_proj.dtype, m.down_proj.dtype)))
    for model in (plain, stored):
        with sedetect.profile(model, source="text") as prof:
            prof.batch(sequence_ids=torch.arange(len(ids)))
            logits = model(input_ids=ids).logits
        runs.append((prof.stats, logits))
    assert snapshot(stored) == before
    assert seen == {(FP8, FP8)}
    exact = dtype == torch.float32
    assert_logits_close(runs[1][1], runs[0][1], 1e-5 if exact else 0.1)
    assert list(runs[0][0].banks) == list(runs[1][0].banks)
    assert any("FP8 linears computed with dequantized weights" in note for note in runs[1][0].header.notes)
    for bank, state in runs[0][0].banks.items():
        other = runs[1][0].banks[bank]
        assert runs[1][0].header.banks[str(bank)].backends == ["cpu"]
        if exact:
            assert torch.equal(state.counts, other.counts)
        hit = (state.rows == other.rows) & (state.rows > 0)
        assert hit.float().mean() > 0.5
        assert torch.allclose(state.out_max[hit], other.out_max[hit], rtol=1e-5 if exact else 0.1), bank
        assert torch.allclose(state.norm_sum[hit], other.norm_sum[hit], rtol=1e-5 if exact else 0.05), bank


def test_mxfp4_is_refused_with_what_to_load_instead():
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    model = random_model("gpt_oss")
    model.model.layers[1].mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(SedetectError, match=r"layers.1.mlp.experts .*Mxfp4Config\(dequantize=True\)"):
        sedetect.profile(model)


def test_the_triton_backend_leaves_quantized_experts_to_others():
    _, stored = fp8_twins((128, 128), torch.float32)
    with sedetect.profile(stored, backend="triton") as prof:
        stored(input_ids=token_ids())
    assert prof.stats.header.banks["decoder.0.routed"].backends == ["cpu"]
    why = "backend triton does not serve torch.float32 on cpu: the weights are quantized"
    assert f"decoder.0.routed: {why}" in prof.stats.header.notes
