"""Simulated formats against plain loops; the budget against a model whose weights are edited by hand."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from support.command import refused, run
from support.families import FAMILIES, tiny_model
from support.models import TINY, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sedetect
import sedetect.compression.budget as budget_module
from sedetect.calibration.held_out import held_out
from sedetect.calibration.windows import calibration_windows
from sedetect.compression.budget import Compressions, conclusion, make_budget
from sedetect.compression.pruning import choose_kept
from sedetect.compression.simulated import expert_sizes, fake_quantize, quantized_experts, stored_bits
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.experiments.evaluation import perplexity
from sedetect.stats.place import Place, Weight

SUPER = Place("decoder", 1, "routed", 28)


def by_loop(row, name, group):
    """One output channel (list of floats) through a format, number by number."""
    out = []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        largest = max(abs(w) for w in part)
        if name == "fp8":
            scale = largest / 448
            rounded = [float(torch.tensor(w / scale).to(torch.float8_e4m3fn)) for w in part]
        else:
            scale = largest / (2 ** (int(name[3:]) - 1) - 1)
            rounded = [round(w / scale) for w in part]  # Python's round: halves to even
        out += [scale * r for r in rounded]
    return out


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "fp8"])
@pytest.mark.parametrize("inputs, group", [(48, 128), (20, 8), (16, 16)])
def test_formats(name, inputs, group):
    weight = torch.randn(3, 5, inputs, generator=torch.Generator().manual_seed(0))
    found = fake_quantize(weight, name, group=group)
    wanted = torch.tensor([[by_loop(row.tolist(), name, group) for row in matrix] for matrix in weight])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(fake_quantize(weight.mT, name, dim=1, group=group), found.mT), "transposed experts"
    step = weight.abs().max() * {"int8": 1 / 127, "int4": 1 / 7, "int3": 1 / 3, "int2": 1, "fp8": 1 / 14}[name]
    assert 0 < (found - weight).abs().max() <= step / 2 + 1e-6
    if name != "fp8":
        levels = 2 ** int(name[3:]) - 1
        assert all(len(part.unique()) <= levels for row in found.flatten(0, 1) for part in row.split(group))


def test_formats_of_special_weights():
    assert torch.equal(fake_quantize(torch.zeros(2, 4), "int4"), torch.zeros(2, 4))
    assert fake_quantize(torch.randn(2, 4, dtype=torch.bfloat16), "fp8").dtype == torch.bfloat16
    assert (stored_bits("int4", 256), stored_bits("int4", 48), stored_bits("fp8", 300)) == (4.125, 4 + 16 / 48, 8.16)
    for name in ("int9", "int1", "nf4"):
        with pytest.raises(SedetectError, match=f"format {name}: is not known"):
            fake_quantize(torch.zeros(2, 2), name)


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_quantized_experts_compute_with_the_rounded_weights(name):
    """As a model whose parameters are replaced, but for the kept expert; afterwards every parameter is as it was."""
    model, edited = random_model(name), random_model(name)
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    layer = 2
    with torch.no_grad():
        for path, module in edited.named_modules():
            for weight in ("gate_up_proj", "down_proj") if path.endswith(".experts") else ():
                parameter = getattr(module, weight)
                for e in range(len(parameter)):
                    if (int(path.split(".")[2]), e) != (layer, 3):
                        rows = parameter[e].T if name == "gpt_oss" else parameter[e]
                        rows = torch.tensor([by_loop(row.tolist(), "int4", 16) for row in rows])
                        parameter[e] = rows.T if name == "gpt_oss" else rows
        before = {key: p.clone() for key, p in model.named_parameters()}
        plain = model(input_ids=ids).logits
        with quantized_experts(model, "int4", [Place("decoder", layer, "routed", 3)], group=16):
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, edited(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert (found - plain).abs().max() > 0.1
        with pytest.raises(ZeroDivisionError), quantized_experts(model, "int3"):
            raise ZeroDivisionError
        module = model.model.layers[layer].mlp.experts
        with pytest.raises(RuntimeError), quantized_experts(model, "int3"):
            module(torch.zeros(2, 7), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2))
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


@pytest.fixture(scope="module")
def subject():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    stats = sedetect.profile_model(model, text=sedetect.Text(tokens=2048, seq_len=256), tokenizer=tokenizer).stats
    domains = calibration_windows(model, tokenizer, None, sedetect.Text(tokens=4096, seq_len=256)).domains
    return model, stats, domains


@pytest.fixture(scope="module")
def budget(subject):
    model, stats, domains = subject
    return make_budget(
        model, held_out(domains, stats), stats, [SUPER], Compressions("frequency", (0.25, 0.95), ("int8", "int3")),
        prefix=1, controls=2,
    )  # fmt: skip


def test_held_out_windows_were_not_seen(subject):
    _, stats, domains = subject
    left = held_out(domains, stats)
    assert list(left) == list(domains)
    for domain, windows in left.items():
        ((start, end),) = stats.header.sources[windows.source].ranges
        assert (start, end) == (0, 2) and windows.numbers.tolist() == [2, 3]
        assert torch.equal(windows.ids, domains[domain].ids[2:])
    with pytest.raises(SedetectError, match="include all of the evaluation text; give more tokens than"):
        held_out({d: replace(w, ids=w.ids[:2], numbers=w.numbers[:2]) for d, w in domains.items()}, stats)


def test_rows_against_edited_weights_and_removed_experts(subject, budget):
    """int3 with and without L1E28, by editing a copy of the weights; pruning, by switching the experts off."""
    model, stats, domains = subject
    domains = held_out(domains, stats)
    edited = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    originals = {}
    with torch.no_grad():
        for layer, block in enumerate(edited.model.layers):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(block.mlp.experts, name)
                originals[layer, name] = weight.clone()
                for group in weight.split(128, dim=2):
                    scale = group.abs().amax(2, keepdim=True) / 3
                    group.copy_((group / scale).round() * scale)
        bare = {d: p.value for d, p in perplexity(edited, domains, prefix=1).items()}
        for name in ("gate_up_proj", "down_proj"):
            getattr(edited.model.layers[1].mlp.experts, name)[28] = originals[1, name][28]
        kept = {d: p.value for d, p in perplexity(edited, domains, prefix=1).items()}
    rows = {row.name: row for row in budget.rows}
    assert list(rows) == ["prune 25%", "int8", "int3"]
    assert rows["int3"].bare.perplexity == pytest.approx(bare, rel=1e-5)
    assert rows["int3"].kept.perplexity == pytest.approx(kept, rel=1e-5)
    base = {d: p.value for d, p in perplexity(model, domains, prefix=1).items()}
    assert budget.baseline.perplexity == base
    for domain, value in rows["int3"].kept.change.items():
        assert value == pytest.approx(kept[domain] / base[domain] - 1, abs=1e-5)
    assert rows["int3"].kept.mean_change == pytest.approx(sum(rows["int3"].kept.change.values()) / 4)

    for cost, safe in ((rows["prune 25%"].bare, []), (rows["prune 25%"].kept, [SUPER])):
        left = choose_kept(stats, "frequency", 0.25, safe)
        gone = [Place(*bank, e) for bank, mine in left.items() for e in range(32) if e not in mine]
        with ablate(model, gone, how="remove"):
            expected = {d: p.value for d, p in perplexity(model, domains, prefix=1).items()}
        assert cost.perplexity == pytest.approx(expected, rel=1e-6)
    assert rows["prune 25%"].kept.mean_change < rows["prune 25%"].bare.mean_change


def test_random_controls_and_sizes(budget):
    rows = {row.name: row for row in budget.rows}
    for row in rows.values():
        assert row.bare.kept == [] and row.kept.kept == ["L1E28"]
        assert all(len(c.kept) == 1 and c.kept[0].startswith("L1E") and c.kept != ["L1E28"] for c in row.random)
    assert rows["prune 25%"].bare.size == rows["prune 25%"].kept.size == 0.75
    # float32; gate_up: 96 x 256 in two groups, down: 256 x 48 in one
    weights = 96 * 256 + 256 * 48
    bits = 3 * weights + 16 * (96 * 2 + 256)
    assert rows["int3"].bare.size == pytest.approx(bits / (32 * weights))
    assert rows["int3"].kept.size == pytest.approx(1 / 320 + 319 / 320 * bits / (32 * weights))
    assert budget.notes == ["left out: ratio 0.95: leaves 2 of 32 experts, and every token takes 4; give at most 0.875"]


def test_the_document_and_what_it_concludes(budget):
    document = budget.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["format"], document["version"], document["kept"]) == ("sedetect-budget", "1", ["L1E28"])
    said = conclusion(budget)
    assert (
        said[0].startswith("keeping L1E28 beats every random choice in ")
        and " of the 3 rows that it changes" in said[0]
    )
    assert "it buys most at prune 25%: +" in said[0]
    within = [row.name for row in budget.rows if row.bare.mean_change <= 0.05]
    assert said[1] == f"within 5% of the unchanged perplexity, nothing kept: {', '.join(within)}" and "int8" in within


def test_without_experts_to_keep(subject):
    model, stats, domains = subject
    few = {"english": held_out(domains, stats)["english"]}
    shared = Place("decoder", 1, "shared", "shared")
    others = [shared, Weight(SUPER, 101, 14)]
    budget = make_budget(model, few, stats, others, Compressions(ratios=(), formats=("int4",)), prefix=1)
    assert budget.notes == [f"{name} is not compressed by itself in any row" for name in ("L1shared", "L1E28[101,14]")]
    assert budget.kept == [] and budget.rows[0].kept is None and budget.rows[0].random == []
    assert len(conclusion(budget)) == 1
    assert json.loads(json.dumps(budget.to_dict())) == budget.to_dict()
    for name in ((1, 32), (12, 0)):
        with pytest.raises(SedetectError, match="Qwen3MoeForCausalLM has no such expert"):
            make_budget(model, few, stats, [Place("decoder", name[0], "routed", name[1])], prefix=1)


def test_command(tmp_path):
    options = ("--tokens", 2048, "--seq-len", 128, "--ratio", 0.25, "--format", "int3", "--controls", 1)
    code, out, err = run("budget", TINY, *options, "--by", "frequency", "-o", tmp_path)
    assert code == 0 and err == ""
    assert out.startswith("2 candidates: L1E28") and "keeping L1E28, L9E7 beats" in out
    for name in ("prune 25%", "int3"):
        (line,) = [line for line in out.splitlines() if line.strip().startswith(name)]
        assert len(re.findall(r"[\d.]+%", line.partition(name)[2])) == 6 and len(line) <= 80
    assert "1,024 tokens that are not among the calibrated windows" in out
    document = json.loads((tmp_path / "budget.json").read_text())
    assert document["dtype"] == "bfloat16" and sum(document["tokens"].values()) == 1024
    assert document["rows"][1]["bare"]["size"] == pytest.approx(3 / 16 + (96 * 2 + 256) / (96 * 256 + 256 * 48))


@pytest.mark.parametrize("name", ["llama4", "dbrx", "longcat_flash"])
def test_experts_stored_in_other_ways_are_refused_before_any_run(name):
    with pytest.raises(SedetectError, match="has no simulated compression"):
        expert_sizes(tiny_model(name, FAMILIES[name]))


def test_a_router_that_cannot_be_masked_leaves_the_formats(subject, monkeypatch):
    model, stats, domains = subject
    few = {"english": held_out(domains, stats)["english"]}

    def refuse(*args, **options):
        raise SedetectError("model.layers.0.mlp.experts: the logits of its router cannot be masked; use how='skip'")

    monkeypatch.setattr(budget_module, "ablate", refuse)
    made = make_budget(model, few, stats, [], Compressions(ratios=(0.25,), formats=("int8",)), prefix=1)
    assert [row.name for row in made.rows] == ["int8"] and "left out: model.layers.0" in made.notes[0]


def test_infinite_perplexity_is_written(budget):
    cost = replace(budget.rows[0].bare, perplexity={"english": math.inf}, mean_change=math.inf)
    document = replace(budget, rows=[replace(budget.rows[0], bare=cost)]).to_dict()
    assert json.loads(json.dumps(document, allow_nan=False))["rows"][0]["bare"]["mean_change"] == "inf"


def test_statistics_of_other_windows_are_noted(tmp_path):
    assert run("profile", TINY, "-o", tmp_path, "--tokens", 512, "--seq-len", 128).code == 0
    options = ("--tokens", 256, "--seq-len", 64, "--ratio", 0.25, "--format", "int8", "--controls", 0)
    code, out, _ = run("budget", TINY, "--stats", tmp_path, *options)
    assert code == 0 and "note: the statistics come from other windows" in out
    short = refused(run("budget", TINY, "--tokens", 256, "--seq-len", 64))
    assert "cannot be both profiled and evaluated" in short


def test_command_refuses(tmp_path):
    for options, said in (
        (("--format", "nf4"), "--format nf4: is not known"),
        (("--ratio", 1.5), "--ratio 1.5: must be above 0 and below 1"),
        (("--group", 0), "'--group': 0 should be greater than or equal to 1"),
        (("--by", "best"), "'best' is not one of 'frequency'"),
        (("--controls", -1), "'--controls': -1 should be greater than or equal to 0"),
    ):
        assert said in refused(run("budget", TINY, *options, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=torch.randint(3, 96, (1, 8)))
    prof.stats.save(tmp_path / "other.safetensors")
    assert "statistics of another model" in refused(run("budget", TINY, "--stats", tmp_path / "other.safetensors"))
