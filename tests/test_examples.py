"""The examples: a toy quantizer, published experts over a hub of stand-ins, and a model trained from nothing."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import put_tokenizer
from support.servers import serving
from transformers import AutoModelForCausalLM, DeepseekV2Config, MixtralConfig, Qwen3MoeConfig

import sedetect

TINY = Path(__file__).parent / "data" / "tiny-moe"
SCRIPT = Path(__file__).parents[1] / "examples" / "keep_in_high_precision.py"
CANDIDATES = {(1, 28), (9, 7)}  # of tiny-moe
EXPERTS = 320


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def stats(model):
    # 64 tokens after BOS: enough for the candidates, few enough that some experts see nothing.
    ids = torch.randint(2, 4096, (1, 64), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = 0
    with sedetect.profile(model) as prof:
        model(input_ids=ids)
    return prof.stats


def places(experts):
    return {(bank.layer, e) for bank, e in experts}


def run(*args) -> str:
    command = [sys.executable, str(SCRIPT), str(TINY), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


@pytest.mark.parametrize("from_file", [False, True])
def test_script(stats, tmp_path, from_file):
    options = ["--tokens", 2048, "--bits", 3]
    if from_file:
        stats.save(tmp_path / "stats.safetensors")
        options += ["--stats", tmp_path / "stats.safetensors", "--out-max", 60]
    kept, perplexities = [], []
    for line in run(*options).splitlines():
        first, value = line.split()[:2]
        assert first in ("keep", "perplexity"), line
        (kept if first == "keep" else perplexities).append(value)
    candidates = ["L1E28:", "L9E7:"]
    assert set(kept) > set(candidates) if from_file else kept == candidates
    before, protected, unprotected = map(float, perplexities)
    assert before < protected < unprotected


def test_choose(script, stats):
    keep, rest = script.choose(stats, out_max=float("inf"), min_rows=0)
    assert places(keep) == CANDIDATES and len(rest) == EXPERTS - 2 and not keep.keys() & rest
    assert all(why.startswith("candidate, |y| 1") for why in keep.values())
    keep, _ = script.choose(stats, out_max=60, min_rows=0)
    large = {(bank.layer, e) for bank, state in stats.banks.items() for e in range(32) if state.out_max[e] > 60}
    assert places(keep) == large > CANDIDATES
    keep, rest = script.choose(stats, out_max=float("inf"), min_rows=1)
    unseen = {(bank.layer, e) for bank, state in stats.banks.items() for e in range(32) if state.rows[e] == 0}
    assert unseen and places(keep) == unseen | CANDIDATES and len(rest) == EXPERTS - len(keep)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_changes_all_but_the_kept(script, stats, bits):
    model = AutoModelForCausalLM.from_pretrained(TINY).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, rest = script.choose(stats, out_max=500, min_rows=0)
    script.quantize(model, stats, rest, bits)
    for name, after in model.named_parameters():
        if not name.endswith("experts.down_proj"):
            assert torch.equal(after, before[name]), name
            continue
        layer = int(name.split(".")[2])
        for e in range(len(after)):
            unchanged = torch.equal(after[e], before[name][e])
            assert unchanged == ((layer, e) in CANDIDATES), (name, e)
            if not unchanged:  # half a step, and the rounding of the weight's own bfloat16
                top = before[name][e].float().abs().amax(1, keepdim=True)
                error = (after[e].float() - before[name][e].float()).abs()
                assert (error <= top / (2 ** (bits - 1) - 1) / 2 + top / 256).all()
                assert max(len(row.unique()) for row in after[e]) <= 2**bits - 1


SMALL = {
    "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 8, "vocab_size": 4096,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
STAND_INS = {
    "Qwen/Qwen3-30B-A3B": (
        Qwen3MoeConfig(**SMALL, num_experts=128, num_experts_per_tok=8, head_dim=16), [(1, 68), (2, 92), (3, 82)]
    ),
    "mistralai/Mixtral-8x7B-v0.1": (MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2), [(1, 3)]),
    "deepseek-ai/DeepSeek-V2-Lite": (
        DeepseekV2Config(
            **SMALL | {"num_key_value_heads": 4} | LATENT, n_routed_experts=64, num_experts_per_tok=6,
            n_shared_experts=2, first_k_dense_replace=1, topk_method="greedy", n_group=1, topk_group=1,
        ),
        [(3, 54), (4, 38)],
    ),
}  # fmt: skip


@torch.no_grad()
def put_stand_in(folder: Path, config, planted: list[tuple[int, int]]) -> Path:
    """A model whose first token is ones that nothing changes but these experts, which all write into channel 1."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name or "embed_tokens" in name else 0.0)
    for place, (layer, expert) in enumerate(planted):
        block = model.model.layers[layer].mlp
        read, weight = (1, 4.0) if place else (0, 30.0)  # once written, channel 1 is 8 after a norm, and others are 0
        block.gate.weight[expert, read] = 5.0
        inner = block.experts.down_proj.shape[2]
        block.experts.gate_up_proj[expert, 3, read] = block.experts.gate_up_proj[expert, inner + 3, read] = weight
        block.experts.down_proj[expert, 1, 3] = 1.0
    model.save_pretrained(folder, max_shard_size="300KB")
    return put_tokenizer(folder)


def test_published_super_experts_from_a_hub(tmp_path):
    """Over the loopback interface, with small stand-ins of the three models."""
    models = {name: put_stand_in(tmp_path / name, *how) for name, how in STAND_INS.items()}
    script = SCRIPT.with_name("reproduce_published.py")
    with serving(models) as server:
        hub = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, env=os.environ | hub, timeout=300
        )
    assert done.returncode == 0, done.stdout + done.stderr
    for experts in (": found", "Qwen/Qwen3-30B-A3B: 3 candidates: ", "DeepSeek-V2-Lite: 2 candidates: "):
        assert experts in done.stdout
    assert done.stdout.count(": found") == 3


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "off"), [("qwen3_next", "gate"), ("gpt_oss", "sinks")])
def test_training(tmp_path, arch, off):
    """A few steps from nothing: what is frozen stays so, what is not moves, and the series is read."""
    script = SCRIPT.with_name("train_tiny_moe.py")
    small = ["--layers", 2, "--hidden", 128, "--experts", 8, "--sequences", 2, "--code", 0.2, "--every", 2]
    command = [sys.executable, script, tmp_path, "--arch", arch, "--off", off, "--steps", 3, "--muon", *small]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    attention = model.model.layers[0].self_attn
    if off == "gate":
        gates = attention.q_proj.weight.view(-1, 2, 64, 128)
        assert not gates[:, 1].any() and gates[:, 0].any()
    else:
        assert (attention.sinks == -1000).all()
    line = sedetect.timeline(tmp_path / "experts")
    assert [state.step for state in line.states] == [0, 2, 3]
    assert line.states[-1].loss < line.states[0].loss
