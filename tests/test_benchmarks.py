"""The benchmarks of large models and several processes, in sizes that run anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import TINY
from transformers import AutoModelForCausalLM

import sedetect
from sedetect.stats.model import ModelStats

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))


def printed(name: str, *arguments: object) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / name, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def last_line(name: str, *arguments: object) -> dict:
    return json.loads(printed(name, "--small", *arguments).splitlines()[-1])


def test_streaming_and_ranks(tmp_path):
    folder = tmp_path / "checkpoint"
    streaming = last_line("bench_streaming.py", folder, "--layers", 2, "--device", "cpu", "--keep")
    assert streaming["equal"] and streaming["failures"] == []
    seconds, size = streaming["seconds"], streaming["bytes"]
    assert [len(seconds[name]) for name in ("read", "copy", "load", "compute", "streamed")] == [2, 2, 2, 2, 1]
    assert all(value > 0 for name in ("read", "copy", "load", "compute", "streamed") for value in seconds[name])
    assert size["limit"] == 3 * size["layer"] + size["outside"] + size["hidden"] and size["layers"] == 2 * size["layer"]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0 < stored - size["layers"] - size["outside"] < 50_000  # headers

    ranks = last_line("bench_ranks.py", "--ranks", 2, "--device", "cpu", "--rounds", 1, "--checkpoint", folder)
    (result,) = ranks["results"]
    assert ranks["equal"] and result["ranks"] == 2 and result["differences"] == []
    assert result["streamed"]["differences"] == [] and result["streamed"]["checkpoint_bytes"] == stored


@pytest.mark.slow
def test_locate_a_published_shape(tmp_path):
    """A planted expert is found over HTTP (which the script asserts), within a twentieth of the bytes and 8 GB."""
    result = json.loads(printed("bench_locate.py", "deepseek-r1", tmp_path / "m", "--layers", 2))
    assert result["layers"] == result["of"] == 2
    assert sum(result["wanted"]) < result["read"] < result["stored"] / 20
    assert result["peak"] < 8e9 and result["processor"]["reading"] > 0


@pytest.mark.slow
def test_what_a_state_costs():
    small = ["--layers", 2, "--hidden", 64, "--experts", 4, "--sequences", 1, "--code", 0.1, "--steps", 30]
    step, state, share = (line.split() for line in printed("bench_monitor.py", *small).splitlines()[-3:])
    assert step[:2] == ["a", "step"] and float(step[2]) > 0
    assert state[:2] == ["a", "state"] and state[-2:] == ["1", "states)"] and share[:2] == ["every", "100"]


def test_a_bit_that_differs_is_noticed(tmp_path):
    from shapes import differences

    stats = sedetect.profile_model(
        TINY, text=sedetect.Text(tokens=256, seq_len=64), loading=sedetect.Loading(device="cpu")
    ).stats
    stats.save(tmp_path / "stats.safetensors")
    for field, change in {"counts": 1, "outliers": 1, "sums": 1.0}.items():
        other = ModelStats.load(tmp_path / "stats.safetensors")
        assert differences({"text": other}, {"text": stats}) == []
        bank = list(other.banks)[-1]
        getattr(other.banks[bank], field)[0] += torch.tensor(change).to(getattr(other.banks[bank], field).dtype)
        assert differences({"text": other}, {"text": stats}) == [f"text: {bank}"]
    assert differences({"text": stats}, {"other": stats}) != []


def test_truth_and_calibration_of_a_proof():
    """In plain transformers: the super expert is worth something at the first token, its neighbours nothing."""
    text = BENCHMARKS.parent / "sedetect/calibration/corpus/english.txt"
    some = (TINY, "L1E28", "--text", text, "--windows", 12, "--length", 48)
    plain, alone, *controls = json.loads(printed("truth.py", *some))["runs"]
    assert plain["windows"] == 12 and alone["off"] == "L1E28 alone" and len(controls) == 3
    assert alone["rise"] > 3 * alone["error"] and alone["largest"] < plain["largest"] / 2
    assert all(abs(one["rise"]) < 0.01 for one in controls)
    (row,) = json.loads(printed("calibrate_proof.py", *some, "--documents", 8, "--draws", 200))["rows"]
    assert row["documents"] == 8 and row["called"] < 0.15 and 0 <= row["power"] <= 1


def test_a_gguf_holds_every_tensor(tmp_path):
    """By its name in llama.cpp, with the experts of a layer in order."""
    import gguf
    from bench_quantizers import write_gguf

    write_gguf(TINY, tmp_path / "model.gguf")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert sum(one.numel() for one in found.values()) == sum(one.numel() for one in weights.parameters())
    layer = weights.model.layers[1]
    for name, matrix in (
        ("token_embd", weights.model.embed_tokens.weight),
        ("output_norm", weights.model.norm.weight),
        ("blk.1.attn_output", layer.self_attn.o_proj.weight),
        ("blk.1.ffn_norm", layer.post_attention_layernorm.weight),
        ("blk.1.ffn_gate_inp", layer.mlp.gate.weight),
        ("blk.1.ffn_gate_exps", layer.mlp.experts.gate_up_proj[:, :48]),
        ("blk.1.ffn_up_exps", layer.mlp.experts.gate_up_proj[:, 48:]),
        ("blk.1.ffn_down_exps", layer.mlp.experts.down_proj),
    ):
        assert torch.equal(found[f"{name}.weight"], matrix), name
