"""The benchmarks of large models and several processes, in sizes that run anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from support.models import TINY

import sedetect
from sedetect.stats.model import ModelStats

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))


def last_line(name: str, *arguments: object) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / name, "--small", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_streaming_and_ranks(tmp_path):
    folder = tmp_path / "checkpoint"
    streaming = last_line("bench_streaming.py", folder, "--layers", 4, "--device", "cpu", "--keep")
    assert streaming["equal"] and streaming["failures"] == []
    seconds, size = streaming["seconds"], streaming["bytes"]
    assert [len(seconds[name]) for name in ("read", "copy", "load", "compute", "streamed")] == [4, 4, 4, 4, 3]
    assert all(value > 0 for name in ("read", "copy", "load", "compute", "streamed") for value in seconds[name])
    assert size["limit"] == 3 * size["layer"] + size["outside"] + size["hidden"] and size["layers"] == 4 * size["layer"]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert 0 < stored - size["layers"] - size["outside"] < 50_000  # headers

    ranks = last_line("bench_ranks.py", "--ranks", 2, "--device", "cpu", "--rounds", 1, "--checkpoint", folder)
    (result,) = ranks["results"]
    assert ranks["equal"] and result["ranks"] == 2 and result["differences"] == []
    assert result["streamed"]["differences"] == [] and result["streamed"]["checkpoint_bytes"] == stored


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
