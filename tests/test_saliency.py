"""Saliencies against a plain loop over the routed tokens, from the inputs that a hook on the experts sees."""

import json
from itertools import pairwise

import pytest
import torch
from support.command import refused, run
from support.models import CONFIGS, random_model
from transformers import AutoModelForCausalLM

import sedetect
from sedetect import BankId, ModelStats
from sedetect.errors import SedetectError
from sedetect.ranking.saliencies import SALIENCIES, ascending, saliency, saliency_document

NORMS = ("ean-sum", "ean-mean", "man", "msan", "reap", "max")


def expert_output(module, x, e):
    """down_proj output (H,) of expert e for one token x (H,), in float64, from the modeling code's formulas."""
    up, down = module.gate_up_proj[e].double(), module.down_proj[e].double()
    if hasattr(module, "gate_up_proj_bias"):  # gpt-oss: transposed, interleaved, clamped
        z = x @ up + module.gate_up_proj_bias[e].double()
        gate, linear = z[::2].clamp(max=7), z[1::2].clamp(-7, 7)
        return (linear + 1) * gate * torch.sigmoid(1.702 * gate) @ down + module.down_proj_bias[e].double()
    gate, linear = (up @ x).chunk(2)
    return down @ (gate * torch.sigmoid(gate) * linear)


@torch.no_grad()
def recompute(module, calls):
    """name -> (E,) float64 from the captured (x, index, weights) of each call."""
    count = module.down_proj.shape[0]
    n, gates, norms, squares, weighted, peak = torch.zeros(6, count, dtype=torch.float64)
    for x, index, weights in calls:
        for row, chosen, weight in zip(x.reshape(-1, x.shape[-1]), index, weights, strict=True):
            for e, g in zip(chosen.tolist(), weight.double().tolist(), strict=True):
                y = expert_output(module, row.double(), e)
                norm = float(y.square().sum().sqrt())
                n[e] += 1
                gates[e] += g
                norms[e] += norm
                squares[e] += norm**2
                weighted[e] += g * norm
                peak[e] = max(peak[e], float(y.abs().max()))
    mean = n.clamp(min=1)
    return {
        "frequency": n, "gate-sum": gates, "ean-sum": norms, "ean-mean": norms / mean, "man": norms / mean,
        "msan": squares / mean, "reap": weighted / mean, "max": peak,
    }  # fmt: skip


@pytest.mark.parametrize("normalized", [True, False])
def test_one_expert_per_token(normalized):
    """Renormalized, the only weight is 1, whatever the router says; the signature is then one of visits alone."""
    config = CONFIGS["qwen3_moe"]()
    config.num_experts_per_tok, config.norm_topk_prob = 1, normalized
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with sedetect.profile(model) as prof:
        model(input_ids=torch.randint(3, 96, (4, 20)))
    for one, other in (("gate-sum", "frequency"), ("reap", "man"), ("reap", "ean-mean")):
        values = zip(saliency(prof.stats, one).values(), saliency(prof.stats, other).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in values) == normalized
    for bank in prof.stats.banks.values():
        assert torch.equal(bank.gate_first_sum, bank.first_rows.double()) == normalized


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_equal_to_a_loop_over_routed_tokens(name):
    """float32 outputs against float64 ones: 1e-5 relative; counts exactly, sums of routing weights to 1e-6."""
    model, calls = random_model(name), {}
    ids = torch.randint(3, 96, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    with sedetect.profile(model) as prof:
        hooks = [
            module.register_forward_pre_hook(lambda _, args, path=path: calls.setdefault(path, []).append(args))
            for path, module in model.named_modules()
            if path.endswith(".experts")
        ]
        for batch in ids:
            model(input_ids=batch)
        for hook in hooks:
            hook.remove()
    assert len(calls) == {"qwen3_moe": 3, "gpt_oss": 3}.get(name, 2)
    found = {by: saliency(prof.stats, by) for by in SALIENCIES}
    for path, seen in calls.items():
        bank = BankId("decoder", int(path.split(".")[2]), "routed")
        wanted = recompute(model.get_submodule(path), seen)
        assert wanted.keys() == SALIENCIES.keys() and (wanted["frequency"] == 0).sum() <= 2
        for by, values in wanted.items():
            rtol = 1e-5 if by in NORMS else 1e-6
            torch.testing.assert_close(found[by][bank], values, rtol=rtol, atol=0, msg=lambda m, by=by: f"{by}: {m}")


def test_states_of_domains_add_up():
    """The saliency of merged statistics is that of one run over both texts."""
    model = random_model("qwen3_moe")
    ids = torch.randint(3, 96, (2, 3, 12), generator=torch.Generator().manual_seed(0))
    parts = []
    for number, batches in enumerate((ids[:1], ids[1:], ids)):
        with sedetect.profile(model, source=f"text {number}") as prof:
            for batch in batches:
                model(input_ids=batch)
        parts.append(prof.stats)
    merged = parts[0].merge(parts[1])
    for by in SALIENCIES:
        for bank, values in saliency(parts[2], by).items():
            torch.testing.assert_close(saliency(merged, by)[bank], values, rtol=1e-12, atol=0)
            assert not torch.equal(saliency(parts[0], by)[bank], values)


def test_unseen_is_zero_and_unknown_is_last():
    with sedetect.profile(model := random_model("qwen3_moe")) as prof:
        model(input_ids=torch.randint(3, 96, (8, 30)))
    stats = prof.stats
    state = next(iter(stats.banks.values()))
    state.counts[3] = 0
    state.sums[3] = 0
    state.nonfinite[5] = 1
    for by in set(SALIENCIES) - {"max"}:
        values = next(iter(saliency(stats, by).values()))
        assert values[3] == 0 and values[5].isnan() and ascending(values)[0] == 3 and ascending(values)[-1] == 5
    assert ascending(torch.tensor([2.0, 1.0, 2.0, 1.0])) == [1, 3, 0, 2]
    layer = saliency_document(stats, "reap", sedetect.rank(stats)).layers[0]
    assert layer["values"][5] is None and layer["ascending"][-1] == 5
    with pytest.raises(SedetectError, match="^by best: is not a saliency; use one of frequency, "):
        saliency(stats, "best")


@pytest.fixture(scope="module")
def profiled(tiny_stats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    tiny_stats.save(folder / "stats.safetensors")
    return folder


def test_rank_by(profiled, tmp_path):
    code, out, err = run("rank", profiled, "--by", "reap", "-o", tmp_path / "reap.json")
    assert code == 0 and err == ""
    assert max(len(line) for line in out.splitlines() if line.startswith(" L")) <= 80
    assert out.startswith(
        "tiny-moe by reap; to protect, in their layers: L1E28 (candidate; 32 of 32 from below), L9E7 ("
    )
    document = json.loads((tmp_path / "reap.json").read_text())
    assert (document["format"], document["version"], document["by"]) == ("sedetect-saliency", "1", "reap")
    stats = ModelStats.load(profiled)
    assert (document["digest"], document["tokens"]) == (stats.header.digest, 4096)
    assert len(document["layers"]) == 10
    layer = document["layers"][1]
    assert (layer["bank"], layer["module"], layer["top_k"]) == ("decoder.1.routed", "model.layers.1.mlp.experts", 4)
    state = stats.banks[BankId("decoder", 1, "routed")]
    assert layer["values"] == (state.gate_norm_sum / state.rows.clamp(min=1)).tolist()
    assert layer["rows"] == state.rows.tolist() and sorted(layer["ascending"]) == list(range(32))
    ordered = [layer["values"][e] for e in layer["ascending"]]
    assert all(a <= b for a, b in pairwise(ordered)) and layer["ascending"][-1] == 28
    (line,) = [line for line in out.splitlines() if line.strip().startswith("L1 ")]
    shown = line.replace("\u00a0", " ")
    assert f"E{layer['ascending'][0]} {ordered[0]:.4g}" in shown and f"E28 {ordered[-1]:.4g}" in shown


def test_rank_by_refuses(profiled, tmp_path):
    assert "'nothing' is not one of 'frequency'" in refused(
        run("rank", profiled, "--by", "nothing", "-o", tmp_path / "x")
    )
    assert list(tmp_path.iterdir()) == []
