"""The example: its kept list, and that exactly the other experts' weights change."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sedetect

TINY = Path(__file__).parent / "data" / "tiny-moe"
SCRIPT = Path(__file__).parents[1] / "examples" / "keep_in_high_precision.py"
SUPER, LATE = (1, 28), (9, 7)  # the super expert and the late outlier of tiny-moe
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
    # 64 tokens after BOS: enough for the super expert, few enough that some experts see nothing.
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
        options += ["--stats", tmp_path / "stats.safetensors", "--out-max", 500]
    kept, perplexities = [], []
    for line in run(*options).splitlines():
        first, value = line.split()[:2]
        assert first in ("keep", "perplexity"), line
        (kept if first == "keep" else perplexities).append(value)
    assert kept == (["L1E28:", "L9E7:"] if from_file else ["L1E28:"])
    before, protected, unprotected = map(float, perplexities)
    assert before < protected < unprotected


def test_choose(script, stats):
    keep, rest = script.choose(stats, out_max=float("inf"), min_rows=0)
    assert places(keep) == {SUPER} and len(rest) == EXPERTS - 1 and not keep.keys() & rest
    keep, _ = script.choose(stats, out_max=500, min_rows=0)
    assert places(keep) == {SUPER, LATE}
    keep, rest = script.choose(stats, out_max=float("inf"), min_rows=1)
    unseen = {(bank.layer, e) for bank, state in stats.banks.items() for e in range(32) if state.rows[e] == 0}
    assert unseen and places(keep) == unseen | {SUPER} and len(rest) == EXPERTS - len(keep)


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
            assert unchanged == ((layer, e) in {SUPER, LATE}), (name, e)
            if not unchanged:  # half a step, and the rounding of the weight's own bfloat16
                top = before[name][e].float().abs().amax(1, keepdim=True)
                error = (after[e].float() - before[name][e].float()).abs()
                assert (error <= top / (2 ** (bits - 1) - 1) / 2 + top / 256).all()
                assert max(len(row.unique()) for row in after[e]) <= 2**bits - 1
