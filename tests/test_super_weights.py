"""Super weights: the products behind an outlier, against the model's own weights and against switching one off."""

import json
from dataclasses import replace

import pytest
import torch
from support.command import run
from support.models import TINY, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sedetect
from sedetect.calibration.windows import Windows
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.experiments.super_weights import find_super_weights
from sedetect.stats.place import Weight


@pytest.fixture(scope="module")
def tiny():
    """tiny-moe in float32, its profile, and the result."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    result = sedetect.profile_model(
        model, text=sedetect.Text(tokens=2048, seq_len=128), tokenizer=AutoTokenizer.from_pretrained(TINY)
    )
    return model, result, find_super_weights(model, sedetect.rank(result.stats), result.windows)


def test_the_super_weight_of_tiny_moe(tiny):
    found, late = tiny[2]
    assert str(late.expert) == "L9E7" and late.channel == 159
    assert str(found) == "L1E28[101,14]" and (found.channel, found.intermediate) == (101, 14)
    assert found.value == pytest.approx(-1262.1, rel=1e-4) and found.profiled == pytest.approx(1262.1, rel=1e-4)
    assert found.share == pytest.approx(0.443, abs=0.002)
    assert found.weight == 1.4140625 and found.weight * found.hidden == pytest.approx(found.share * found.value)
    assert [part.intermediate for part in found.top] == [14, 27, 34]
    assert [part.share for part in found.top] == sorted((part.share for part in found.top), reverse=True)
    assert found.top[-1].cumulative == pytest.approx(sum(part.share for part in found.top))
    assert found.top[-1].cumulative == pytest.approx(1, abs=0.01)
    assert (found.position, found.token_id) == (0, 0) and found.gate == pytest.approx(0.961, abs=0.002)


def test_against_the_weights_by_hand(tiny):
    model, result, (found, _) = tiny
    mlp, rows = model.model.layers[1].mlp, []
    hook = mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    (windows,) = [w for w in result.windows.values() if w.source == found.source]
    with torch.no_grad():
        model(input_ids=windows.ids[windows.numbers == found.sequence_id])
        x = rows[0].reshape(-1, 256)[found.position].double()
        gate, up = (mlp.experts.gate_up_proj[28].double() @ x).chunk(2)
        products = mlp.experts.down_proj[28, 101].double() * gate * torch.sigmoid(gate) * up
    hook.remove()
    assert float(products.sum()) == pytest.approx(found.value, rel=1e-5)
    shares = (products / products.sum()).sort(descending=True)
    assert shares.indices[:3].tolist() == [part.intermediate for part in found.top]
    assert shares.values[:3].tolist() == pytest.approx([part.share for part in found.top], rel=1e-4)


def test_switching_it_off_takes_its_share_of_the_outlier(tiny):
    """Only that weight: the layer's output in that channel loses gate x share x outlier, and nothing else."""
    model, result, (found, _) = tiny
    ids = next(iter(result.windows.values())).ids[:1]
    seen = []
    hook = model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=ids)
        with ablate(model, [Weight(found.expert, found.channel, found.intermediate)]):
            model(input_ids=ids)
        with ablate(model, [Weight(found.expert, found.channel, part.intermediate) for part in found.top]):
            model(input_ids=ids)
    hook.remove()
    whole, without, without_top = (out.reshape(-1, 256) for out in seen)
    lost = (whole - without)[0, 101] / found.gate
    assert float(lost) == pytest.approx(found.share * found.value, rel=1e-4)
    assert float((whole - without_top)[0, 101] / found.gate) == pytest.approx(
        found.top[-1].cumulative * found.value, rel=1e-4
    )
    others = (whole - without)[0].clone()
    others[101] = 0
    assert others.abs().max() <= 1e-3 * lost.abs()


def is_visited(model, expert, windows: Windows) -> bool:
    """Whether its token comes to it in an unprofiled run, too."""
    try:
        find_super_weights(model, [expert], [windows])
    except SedetectError as error:
        assert "does not visit it in this run" in str(error)
        return False
    return True


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout(name, dtype):
    """Biases, transposed weights, shared experts: the sum is the value the profile recorded, at any token."""
    model = random_model(name, dtype)
    ids = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(1))
    windows = Windows(ids, torch.tensor([4, 5, 9]), "text", {})
    with sedetect.profile(model, source="text") as prof:
        for row, number in zip(ids, windows.numbers, strict=True):
            prof.batch(sequence_ids=number[None])
            model(input_ids=row[None])
    ranking = sedetect.rank(prof.stats, layers=1.0, percentile=0, fraction=0.001, min_value=0, min_ratio=0)
    experts = ranking.super_experts
    assert ("shared" in {expert.kind for expert in experts}) == (name in ("qwen2_moe", "deepseek_v3"))
    if dtype == torch.bfloat16:  # on some machines a choice of the random router turns on a rounding
        visited = [expert for expert in experts if is_visited(model, expert, windows)]
        assert len(visited) > 0.7 * len(experts)
        experts = visited
    assert len({expert.position for expert in experts}) > 3
    before = model.config.to_json_string()
    found = find_super_weights(model, experts, [windows], top=100)
    assert [str(one.expert) for one in found] == [str(expert) for expert in experts]
    for one, expert in zip(found, experts, strict=True):
        assert abs(one.value) == pytest.approx(expert.value, rel=1e-4 if dtype == torch.float32 else 0.05)
        assert (one.value < 0) == (expert.sign < 0)
        assert one.gate == pytest.approx(expert.gate, abs=1e-4 if dtype == torch.float32 else 0.02)
        if name != "gpt_oss":
            assert one.top[-1].cumulative == pytest.approx(1)
    assert model.config.to_json_string() == before
    assert not hasattr(model.model.layers[1].mlp, "experts") or not hasattr(
        model.model.layers[1].mlp.experts.config, "sedetect_call"
    )


def test_it_can_run_under_an_ablation(tiny):
    model, result, _ = tiny
    with ablate(model, ["L0E0"]):
        inside, _ = find_super_weights(model, sedetect.rank(result.stats), result.windows)
        assert model.model.layers[0].mlp.experts.config.sedetect_call
    assert inside.intermediate == 14


def test_refusals(tiny):
    model, result, _ = tiny
    ranking = sedetect.rank(result.stats)
    (expert,) = ranking.super_experts

    def refused(experts, windows=None, match="", **options):
        with pytest.raises(SedetectError, match=match):
            find_super_weights(model, experts, result.windows if windows is None else windows, **options)

    refused(ranking, {}, "L1E28: sequence 0 of source .* is not among the windows")
    refused([replace(expert, layer=11)], match="L11E28: Qwen3MoeForCausalLM has no such expert")
    refused([replace(expert, expert=32)], match="L1E32: Qwen3MoeForCausalLM has no such expert")
    refused([replace(expert, position=-1)], match="the token of its largest output is not known")
    refused([replace(expert, position=500)], match="position 500 is outside its window of 128")
    refused([replace(expert, expert=27)], match="L1E27: token 0 of sequence 0 does not visit it in this run")
    refused(ranking, top=0, match="top 0: must be at least 1")
    assert find_super_weights(model, [], result.windows) == []
    assert not hasattr(model.model.layers[1].mlp.experts.config, "sedetect_call"), "restored after an error"


def test_command_line(tmp_path):
    options = ("--tokens", 1024, "--seq-len", 128, "--dtype", "float32")
    code, out, err = run("super-weights", TINY, *options, "--json", tmp_path / "sw.json")
    assert code == 0 and err == "" and out.startswith("2 candidates: L1E28 (|y| 1262")
    assert "101, 14" in out and "44.3%" in out and max(map(len, out.splitlines())) <= 100
    document = json.loads((tmp_path / "sw.json").read_text())
    found, late = document["super_weights"]
    assert (late["name"], late["channel"]) == ("L9E7", 159)
    assert (found["name"], found["channel"], found["intermediate"]) == ("L1E28", 101, 14)
    assert found["share"] == pytest.approx(0.443, abs=0.002) and len(found["top"]) == 3
    assert run("super-weights", tmp_path).code == 2
