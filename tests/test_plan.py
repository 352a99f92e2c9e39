"""sedetect plan: a checkpoint by numbers, against counting the loaded model."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import INDEX, put_model, save_random, to_fp8
from support.command import refused, run
from support.models import CONFIGS, TINY

from sedetect.checkpoints import memory, staging
from sedetect.models.loading import load_model
from sedetect.profiling import estimate
from sedetect.profiling.estimate import Plan, make_plan, measure_read


def plan_without_reading(folder) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "read_bytes", lambda *_: pytest.fail("read a weight"))
        return make_plan(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_counted_from_headers_alone(tmp_path, name):
    plan = plan_without_reading(save_random(CONFIGS[name](), tmp_path, max_shard_size="200KB"))
    model = load_model(tmp_path)
    sizes = {path: parameter.numel() for path, parameter in model.named_parameters()}

    def total(pattern: str) -> int:
        return sum(size for path, size in sizes.items() if re.search(pattern, path))

    assert (plan.model, plan.files) == (type(model).__name__, len(list(tmp_path.glob("*.safetensors"))))
    assert (plan.layers, plan.top_k, plan.width, plan.dtype) == (3, 2, 32, torch.float32)
    assert plan.routed == total(r"\.experts\.(gate_up_proj|down_proj)") > 0
    assert plan.shared == total(r"\.shared_experts?\.")
    assert plan.parameters == sum(sizes.values())
    layers = {"qwen2_moe": [0, 2], "deepseek_v3": [1, 2]}.get(name, [0, 1, 2])
    assert plan.experts == dict.fromkeys(layers, 6 if name == "qwen2_moe" else 8)
    assert plan.layer_parameters == [total(rf"^model\.layers\.{i}\.") for i in range(3)]
    stored = {path: tensor.nbytes for path, tensor in model.state_dict().items()}
    of_layers = [sum(n for path, n in stored.items() if path.startswith(f"model.layers.{i}.")) for i in range(3)]
    assert plan.layer_bytes == of_layers and plan.stored == sum(stored.values())
    assert plan.rest_bytes == plan.stored - sum(of_layers)
    assert plan.weights(torch.bfloat16) == 2 * plan.parameters
    assert plan.streamed(torch.float32) == 4 * (total(r"^(?!model\.layers)") + 3 * max(plan.layer_parameters))
    one = next(p.numel() // len(p) for path, p in model.named_parameters() if path.endswith("down_proj"))
    experts = plan.experts[layers[-1]]
    assert plan.active == plan.parameters - plan.routed * (experts - 2) // experts and one < plan.active


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_fp8_as_a_gpu_holds_it(tmp_path, monkeypatch, name):
    """With or without one: what is stored in 8 bits stays so, its scales beside it."""
    plain = plan_without_reading(save_random(CONFIGS[name](), tmp_path, dtype=torch.bfloat16))
    assert (plain.dtype, plain.held) == (torch.bfloat16, torch.bfloat16)
    # A router that is kept in float32 takes the bytes that it has.
    assert plain.weights(torch.bfloat16) == sum(p.nbytes for p in load_model(tmp_path).parameters())
    to_fp8(tmp_path)
    plan = plan_without_reading(tmp_path)
    assert (plan.dtype, plan.held) == (torch.bfloat16, torch.float8_e4m3fn)
    scales = plan.parameters - plain.parameters
    assert 0 < scales < plain.parameters / 32 and 0 < plan.routed - plain.routed <= scales
    (stored,) = (load_file(file) for file in tmp_path.glob("*.safetensors"))
    # Bytes of a layer's correction bias, which is no parameter.
    buffers = sum(t.nbytes for path, t in stored.items() if re.search(r"\.1\..*correction_bias$", path))
    assert bool(buffers) == (name == "deepseek_v3")
    assert [count + buffers for count in plan.layer_memory[1:]] == plan.layer_bytes[1:]
    assert plan.layer_bytes[2] < 0.7 * plain.layer_bytes[2] and plan.rest_memory == plan.rest_bytes
    assert plan.weights(plan.held) == plan.rest_bytes + sum(plan.layer_memory)
    assert plan.streamed(plan.held) == plan.rest_bytes + 3 * max(plan.layer_memory)
    assert plan.weights(torch.bfloat16) == 2 * plan.parameters
    size = r" +\S+ [kM]?B" * 2
    for dequantized, rows in (
        (set(), (rf"float8_e4m3fn \(default\){size} +fits", rf"bfloat16{size} +fits")),
        ({"fp8"}, (rf"float8_e4m3fn{size} +-", rf"bfloat16 \(default\){size} +fits")),  # no GPU that takes it
    ):
        monkeypatch.setattr(memory, "dequantized_here", lambda dequantized=dequantized: dequantized)
        shown = run("plan", tmp_path)
        assert shown.code == 0 and re.search(rf"{rows[0]} *\n {rows[1]} *\n float32 ", shown.out), shown.out


def test_bandwidth_is_measured_on_a_bounded_sample():
    speed, count = measure_read(TINY, 10_000_000)
    assert count == 10_000_000 and 1e6 < speed < 1e12
    assert measure_read(TINY)[1] == max(file.stat().st_size for file in TINY.glob("*.safetensors"))


def test_shards_in_a_folder_of_their_own(tmp_path):
    model = put_model(tmp_path / "model")
    index = json.loads((model / INDEX).read_text())
    (model / "weights").mkdir()
    for name in set(index["weight_map"].values()):
        (model / name).rename(model / "weights" / name)
    index["weight_map"] = {weight: f"weights/{name}" for weight, name in index["weight_map"].items()}
    index["weight_map"]["left.over"] = "more.safetensors"
    save_file({"left.over": torch.ones(3)}, model / "more.safetensors")
    (model / INDEX).write_text(json.dumps(index))
    result = run("plan", model)
    assert result.code == 0 and "in 5 files" in result.out
    assert f"note: {model}: 1 weights are not used by Qwen3MoeForCausalLM, first left.over\n" in result.out
    assert result.err == ""


def test_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "free_memory", lambda device: 50_000_000)
    monkeypatch.setattr(estimate, "measure_read", lambda folder: (1e9, 31_000_000))
    shown = run("plan", TINY, "--tokens", 1000)
    assert shown.code == 0 and shown.err == ""
    assert shown.out.startswith("Qwen3MoeForCausalLM: 15.6M parameters, 31.1 MB in 3 files\n")
    assert "320 routed experts in 10 of 10 layers (32 each, top-4): 11.8M parameters; shared experts 0" in shown.out
    assert re.search(r"precision +weights +streamed +on (cpu|cuda), 50 MB free", shown.out)
    assert re.search(r"bfloat16 \(default\) +31.1 MB +\d\S+ MB +fits", shown.out)
    assert re.search(r"float32 +62.2 MB +\d\S+ MB +streamed", shown.out)
    largest, every = re.search(r"at most (\S+) MB a layer; at 1 GB/s.*?, (\S+) ms a layer", shown.out).groups()
    assert largest == every  # 1 GB/s is 1 MB/ms
    assert "hidden states of 1,000 tokens take 512 kB" in shown.out
    assert "nobody/nothing: the hub cannot be reached (OfflineMode" in refused(run("plan", "nobody/nothing"))
    assert "config.json: missing" in refused(run("plan", tmp_path))
