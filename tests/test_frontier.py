"""Formats by expert and layer: costs against plain loops, the optimizer against all choices, points against edited
weights.
"""

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.checkpoints import save_random
from support.command import refused, run
from support.documents import SAMPLES
from support.models import CONFIGS, TINY, random_model
from transformers import AutoModelForCausalLM

import sedetect
from sedetect.calibration.windows import Windows
from sedetect.compression.allocations import KEPT, PRUNED, Costs, choose, deal
from sedetect.compression.frontier import Curve, Frontier, Point, conclusion, make_frontier, measure, size_at
from sedetect.compression.plans import export_plan
from sedetect.compression.runtimes import LOADS, MIXED
from sedetect.compression.simulated import fake_quantize, mixed_experts, stored_bits
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.experiments.evaluation import perplexity
from sedetect.results import Results
from sedetect.stats.place import BankId, Place, Weight
from sedetect.stats.proof import Effect

SUPER = Place("decoder", 1, "routed", 3)


def windows(count, length=12, seed=0, vocabulary=96):
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, torch.arange(count), "s", {})


def edit(model, formats, group):
    """Every named expert's weights through its format, in place."""
    with torch.no_grad():
        for place, name in formats.items():
            experts = model.model.layers[place.layer].mlp.experts
            for weight in (experts.gate_up_proj, experts.down_proj):
                matrix = weight[place.expert]
                rows = matrix.T if experts.is_transposed else matrix
                rows = fake_quantize(rows, name, group=group)
                weight[place.expert] = rows.T if experts.is_transposed else rows


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_each_expert_in_its_own_format(name):
    model, edited = random_model(name), random_model(name)
    ids = windows(2).ids
    formats = {
        Place("decoder", layer, "routed", e): f for layer in (0, 2) for e, f in ((1, "int4"), (3, "int2"), (4, "fp8"))
    }
    edit(edited, formats, 16)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with mixed_experts(model, formats, group=16):
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, edited(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert (found - plain).abs().max() > 0.1 and torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_costs_against_plain_loops(name):
    """A layer costs the divergence of a model whose weights are edited; an expert its part of the squared errors."""
    model, text, group = random_model(name), windows(3), 16
    costs, layers = measure(model, {"text": text}, ["int4", "int2"], group, 0, 2, [], lambda *_: None)
    assert costs.levels == [KEPT, "int4", "int2", PRUNED] and costs.most == [6, 6, 6]
    experts = 8

    def divergence(changed):
        p, q = ((m(input_ids=text.ids).logits[:, :-1].double().log_softmax(-1)) for m in (model, changed))
        return float((p.exp() * (p - q)).sum(-1).mean())

    with torch.no_grad():
        for layer, column, level in ((0, 1, "int4"), (2, 2, "int2")):
            edited = random_model(name)
            edit(edited, {Place("decoder", layer, "routed", e): level for e in range(experts)}, group)
            assert layers[layer, column] == pytest.approx(divergence(edited), rel=1e-3)

        block = model.model.layers[1].mlp
        heard = []
        hook = block.experts.register_forward_pre_hook(lambda _, args: heard.append(args))
        model(input_ids=text.ids)
        hook.remove()
        x, index, gates = heard[0]
        wanted = torch.zeros(3, experts, dtype=torch.float64)
        copies = [block.experts, *(random_model(name).model.layers[1].mlp.experts for _ in range(2))]
        for copy, level in zip(copies[1:], ("int4", "int2")):
            for weight in (copy.gate_up_proj, copy.down_proj):
                weight.copy_(fake_quantize(weight, level, dim=1 if copy.is_transposed else 2, group=group))
        for token, (chosen, weights) in enumerate(zip(index.tolist(), gates.tolist())):
            for e, gate in zip(chosen, weights):
                # alone, with weight 1: its output
                alone = [copy(x[token : token + 1], torch.tensor([[e]]), torch.ones(1, 1))[0] for copy in copies]
                wanted[0, e] += gate**2 * (alone[1] - alone[0]).square().sum()
                wanted[1, e] += gate**2 * (alone[2] - alone[0]).square().sum()
                wanted[2, e] += gate**2 * alone[0].square().sum()
    mine = costs.cost[costs.banks == 1]
    for column in (1, 2):
        part = (wanted[column - 1] / wanted[column - 1].sum()).numpy()
        np.testing.assert_allclose(mine[:, column], layers[1, column] * part, rtol=1e-3)
    least = wanted[2].argsort()[: experts // 2]
    np.testing.assert_allclose(mine[:, 3], layers[1, 3] * (wanted[2] / wanted[2][least].sum()).numpy(), rtol=1e-3)
    with ablate(model, [Place("decoder", 1, "routed", e) for e in least.tolist()], how="remove"), torch.no_grad():
        pruned = model(input_ids=text.ids).logits[:, :-1].double().log_softmax(-1)
    with torch.no_grad():
        p = model(input_ids=text.ids).logits[:, :-1].double().log_softmax(-1)
    assert layers[1, 3] == pytest.approx(float((p.exp() * (p - pruned)).sum(-1).mean()), rel=1e-3)
    assert (costs.cost[:, 0] == 0).all() and (costs.size[:, 3] == 0).all()
    gate_up, down = 48 * 32, 32 * 24
    stored = [gate_up * stored_bits(name, 32, 16) + down * stored_bits(name, 24, 16) for name in ("int4", "int2")]
    assert costs.size[0].tolist() == [16 * (gate_up + down), *stored, 0]


def hand_costs(seed, banks=2, experts=3, prunes=True):
    generator = np.random.default_rng(seed)
    levels = [KEPT, "int8", "int2", *([PRUNED] if prunes else [])]
    number = banks * experts
    cost = np.sort(generator.random((number, len(levels))) ** 4, axis=1)
    cost[:, 0] = 0
    size = (
        np.array([[16.0, 8.5, 2.5, 0.0][: len(levels)]] * number) * np.repeat([1, 3] * (banks // 2), experts)[:, None]
    )
    number_of = np.repeat(np.arange(banks), experts)
    layers = np.stack([cost[number_of == bank].sum(0) * (1 + generator.random()) for bank in range(banks)])
    places = [Place("decoder", b, "routed", e) for b in range(banks) for e in range(experts)]
    return Costs(levels, places, number_of, cost, size, layers, [1] * banks)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by", ["expert", "layer"])
@pytest.mark.parametrize("kept", [[], [1]])
def test_the_optimizer_finds_the_best_of_all_choices(seed, by, kept):
    costs = hand_costs(seed)
    safe = np.isin(np.arange(6), kept)
    for limit in (150.0, 90.0, 60.0, 37.0, 25.0):
        best = None
        for choice in itertools.product(range(4), repeat=6 if by == "expert" else 2):
            every = np.array(choice if by == "expert" else np.repeat(choice, 3))
            if by == "layer" and (3 in choice or (kept and choice[0])):
                continue
            gone = (every == 3).reshape(2, 3).sum(1).max()
            size = costs.size[np.arange(6), every].sum()
            if size > limit or gone > 1 or every[kept].any():
                continue
            cost = costs.cost[np.arange(6), every].sum() if by == "expert" else costs.layers[[0, 1], list(choice)].sum()
            best = cost if best is None else min(best, cost)
        found = choose(costs, by, limit, safe)
        if best is None:
            assert found is None
            continue
        choice, gap = found
        every = np.array(choice)
        cost = costs.cost[np.arange(6), every].sum() if by == "expert" else costs.layers[[0, 1], every[::3]].sum()
        assert costs.size[np.arange(6), every].sum() <= limit * (1 + 1e-6) and not every[kept].any()
        assert (every == 3).reshape(2, 3).sum(1).max() <= (1 if by == "expert" else 0)
        assert cost <= best * (1 + 1e-3) + 1e-9 and gap <= 1e-4


def test_dealing_keeps_formats_sizes_and_what_a_router_needs():
    costs = hand_costs(0, banks=4, experts=4)
    costs = replace(costs, size=np.tile([16.0, 8.5, 2.5, 0.0], (16, 1)))
    choice = (3, 0, 1, 2, 3, 2, 2, 2, 3, 0, 0, 1, 1, 1, 1, 1)
    deals = {deal(costs, "expert", choice, np.random.default_rng(seed)) for seed in range(8)}
    assert len(deals) > 4
    for dealt in deals:
        assert sorted(dealt) == sorted(choice)
        assert all(dealt[start : start + 4].count(3) <= 1 for start in range(0, 16, 4))
    full = replace(costs, most=[0] * 4)
    assert deal(full, "expert", choice, np.random.default_rng(0)) is None
    by_layer = (0,) * 4 + (1,) * 4 + (2,) * 4 + (2,) * 4
    deals = {deal(costs, "layer", by_layer, np.random.default_rng(seed)) for seed in range(8)}
    assert len(deals) > 2
    assert all(sorted(d) == sorted(by_layer) and all(len(set(d[i : i + 4])) == 1 for i in (0, 4, 8, 12)) for d in deals)
    mixed = replace(costs, size=costs.size * np.repeat([1, 1, 3, 3], 4)[:, None])
    dealt = deal(mixed, "expert", choice, np.random.default_rng(1))
    assert sorted(dealt[:8]) == sorted(choice[:8]) and sorted(dealt[8:]) == sorted(choice[8:])


@pytest.fixture(scope="module")
def subject():
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=windows(1).ids)
    domains = {"english": windows(4, seed=1), "code": windows(12, seed=2)}
    made = make_frontier(
        model, domains, prof.stats, [SUPER], ("int2", "int8"), prefix=1, group=16, seeds=1, batch_size=3
    )
    return model, prof.stats, domains, made


def test_points_against_edited_weights(subject):
    model, _, domains, made = subject
    held = {d: replace(w, ids=w.ids[::2], numbers=w.numbers[::2]) for d, w in domains.items()}
    assert made.tokens == {d: w.ids.numel() for d, w in held.items()} and made.sensitivity_tokens == (2 + 6) * 12
    assert made.baseline == pytest.approx({d: p.value for d, p in perplexity(model, held, prefix=1).items()})
    kinds = [(c.by, c.protected, c.seed) for c in made.curves]
    assert kinds[:2] == [("model", False, None), ("model", True, None)]
    assert kinds[2:] == [
        (by, *kind) for by in ("layer", "expert") for kind in ((False, None), (True, None), (False, 0))
    ]
    weights = 48 * 32 + 32 * 24
    bits = {KEPT: 16 * weights, PRUNED: 0}
    bits |= {f: n * weights + 16 * (48 * 2 + 32 * 2) for f, n in (("int8", 8), ("int2", 2))}
    assert made.whole == 24 * 2 * weights
    for curve in made.curves:
        for point in curve.points:
            levels = [level for one in point.plan.values() for level in one]
            assert len(levels) == 24 and point.size == pytest.approx(sum(bits[level] for level in levels) / 8)
            assert point.size <= point.limit * (1 + 1e-6) or (curve.by, curve.protected) == ("model", True)
            if curve.protected:
                assert point.plan["decoder.1.routed"][3] == KEPT and point.beside is not None
            if curve.by == "layer":
                assert all(len(set(one)) == 1 and PRUNED not in one for one in point.plan.values())
            assert all(one.count(PRUNED) <= 6 for one in point.plan.values())
    point = made.curve("expert").points[-1]
    plan = {Place(*BankId.parse(b), e): f for b, one in point.plan.items() for e, f in enumerate(one)}
    gone = [place for place, level in plan.items() if level == PRUNED]
    assert 0 < len(gone) < 24
    edited = random_model("qwen3_moe")
    edit(edited, {p: f for p, f in plan.items() if f in ("int8", "int2")}, 16)
    with ablate(edited, gone, how="remove"):
        wanted = {d: p.value for d, p in perplexity(edited, held, prefix=1).items()}
    assert point.perplexity == pytest.approx(wanted, rel=1e-4)
    logs = [math.log(wanted[d] / made.baseline[d]) for d in wanted]
    assert point.change.rise == pytest.approx(math.expm1((2 * logs[0] + 6 * logs[1]) / 8), rel=1e-3)
    assert point.change.documents == 8 and point.change.low < point.change.rise < point.change.high
    bare, kept = (made.curve("expert", safe).points[1] for safe in (False, True))
    logs = [math.log(kept.perplexity[d] / bare.perplexity[d]) for d in wanted]
    assert kept.beside.rise == pytest.approx(math.expm1((2 * logs[0] + 6 * logs[1]) / 8), abs=1e-9)
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False)) == made.to_dict()


def curve(by, protected, points, beside=None):
    effects = [(size, Effect(rise, rise - 0.001, rise + 0.001, 9)) for size, rise in points]
    given = [
        Point(size, size, {"decoder.1.routed": [KEPT, "int4"]}, 0.1, 0.0, {}, one, beside) for size, one in effects
    ]
    return Curve(by, protected, None, given)


def test_sizes_at_equal_perplexity_and_what_they_say():
    base = replace(SAMPLES[Frontier], whole=100.0, protected=["L1E0"])
    made = curve("expert", False, [(50, 0.004), (30, 0.02), (20, 0.08)])
    assert size_at(base, made, 0.01) == pytest.approx(50 - 20 * 0.006 / 0.016)
    assert size_at(base, made, 0.05) == pytest.approx(30 - 10 * 0.03 / 0.06)
    assert size_at(base, made, 0.5) == 20 and size_at(base, made, -0.1) is None and size_at(base, None, 0.1) is None
    assert size_at(base, curve("layer", False, [(50, 0.5), (20, math.inf)]), 0.05) == pytest.approx(100 - 50 * 0.1)
    better, worse, same = Effect(-0.1, -0.2, -0.05, 9), Effect(0.1, 0.05, 0.2, 9), Effect(0.0, -0.1, 0.1, 9)
    for points, beside, said in (
        ([(40, 0.004), (20, 0.02)], better, "of the size at +1%"),
        ([(40, 0.004), (20, 0.02)], same, "better at 0 of 2 sizes, worse at 0: no more than noise"),
        ([(60, 0.004), (40, 0.02), (30, 0.08)], same, "better at 0 of 3 sizes, worse at 0: it buys nothing"),
        ([(60, 0.004), (40, 0.02), (30, 0.08)], worse, "buys nothing at equal perplexity"),
    ):
        lines = conclusion(replace(base, curves=[made, curve("expert", True, points, beside)]))
        assert said in lines[2], lines[2]
        assert lines[0].startswith("size at +1%: by expert 4") and "layer none, with protection none" in lines[0]
        assert lines[-1] == "without protection L1E0 gets, over 3 sizes by expert: kept 3 times"
    assert len(conclusion(replace(base, curves=[made], protected=[]))) == 2
    few = conclusion(replace(base, curves=[curve("expert", False, [(50, 0.004), (40, 0.006)])], protected=[]))
    assert few[0].startswith("size at +1%: by expert at most 4e-05 MB (6.40 bits); by layer none")


@pytest.fixture(scope="module")
def planned():
    """A model whose shapes the tools take, statistics of it, and a frontier of two plans by expert and by layer."""
    config = CONFIGS["qwen3_moe"]()
    config.update({"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 24})  # 2 begins 20
    model = AutoModelForCausalLM.from_config(config).eval()
    with sedetect.profile(model) as prof:
        model(input_ids=windows(2).ids)
    banks = [f"decoder.{layer}.routed" for layer in range(3)]
    by_layer = dict(zip(banks, ([KEPT] * 24, ["int4"] * 24, ["int2"] * 24)))
    fours = dict(zip(banks, ([KEPT] * 24, ["int4"] * 24, ["int4"] * 24)))
    mixed = ["int8", KEPT, "int2", *["int4"] * 20, "int8"]
    by_expert = dict(zip(banks, (mixed, ["int4"] * 24, mixed[::-1])))
    pruned = by_expert | {banks[1]: ["int4"] * 23 + [PRUNED]}

    def points(*plans):
        sizes = zip((40.0, 30.0, 20.0), (0.004, 0.02, 0.2), plans)
        return [Point(size, size, plan, 0.1, 0.0, {}, Effect(rise, rise, rise, 9)) for size, rise, plan in sizes]

    curves = [
        Curve("layer", True, None, points(fours, by_layer)),
        Curve("expert", True, None, points(by_expert, pruned)),
    ]
    digest = prof.stats.header.digest
    return model, prof.stats, replace(SAMPLES[Frontier], digest=digest, whole=100.0, curves=curves)


def by_names(document, name, loads):
    """Bits of a module by auto-round's file: its quantizer escapes the dots of an expression, its loader does not."""
    ignored = [part + "." * part[-1].isdigit() for part in document["ignore_layers"].split(",")]
    if any(part in name for part in ignored):
        return 16
    found = 4
    for part, settings in document["layer_config"].items():
        if not loads:
            part = part.replace(".", r"\.") if re.search(r"[(|]", part) else re.escape(part)
        if re.search(part, name):
            found = settings["bits"]
    return found


def test_plans_are_exported_as_they_are(planned):
    model, stats, frontier = planned
    for granularity, point in (("layer", 1), ("expert", 0)):
        document, (note,) = export_plan(frontier, stats, "auto-round", "transformers", granularity, model)
        plan = frontier.curve(granularity, True).points[point].plan
        for layer in range(3):
            for e in range(24):
                level = plan[f"decoder.{layer}.routed"][e]
                name = f"model.layers.{layer}.mlp.experts.{e}.up_proj"
                for loads in (False, True):
                    assert by_names(document, name, loads) == (16 if level == KEPT else int(level[3:]))
        assert by_names(document, "model.layers.1.self_attn.q_proj", False) == 16
        assert note.startswith(f"{(40, 30)[point]} bytes of experts, of 100 at 16 bits; perplexity +")
    text, _ = export_plan(frontier, stats, "llm-compressor", "vllm", "layer", model)
    assert r"layers\.0\.mlp\.experts(" in text and r"layers\.1\.mlp" not in text and "num_bits: 4" in text


def test_plans_that_do_not_load_are_refused(planned):
    model, stats, frontier = planned
    for (tool, runtime, granularity), increase, said in (
        (("llm-compressor", "vllm", "expert"), 0.05, "stops at the first matrix left out; give granularity='layer'"),
        (("llm-compressor", "transformers", "layer"), 0.05, "fills the layers left out with random weights"),
        (("gptqmodel", "vllm", "layer"), 0.05, "gptqmodel's checkpoints were not seen to load there"),
        (("llm-compressor", "vllm", "layer"), 0.001, "no plan by layer is of int4 alone, with which llm-compressor's"),
        (("auto-round", "transformers", "expert"), 0.001, "--format int8 --format int4 --format int2"),
    ):
        with pytest.raises(SedetectError, match=re.escape(said)):
            export_plan(frontier, stats, tool, runtime, granularity, model, increase)
    with pytest.raises(SedetectError, match="the statistics are of another model"):
        export_plan(replace(frontier, digest="other"), stats, "auto-round", "transformers", "layer", model)
    assert {(tool, runtime, g) for (tool, runtime), loads in LOADS.items() for g in loads} >= set(MIXED)


def test_export_command(planned, tmp_path):
    model, stats, frontier = planned
    stats.save(tmp_path / "stats.safetensors")
    frontier.save(tmp_path / "frontier.json")
    model.save_pretrained(tmp_path / "model")
    given = (
        "export",
        tmp_path,
        "--to",
        "auto-round",
        "--plan",
        tmp_path / "frontier.json",
        "--model",
        tmp_path / "model",
    )
    code, out, err = run(*given, "--for", "transformers", "-o", tmp_path / "ar.json", "--granularity", "layer")
    assert code == 0 and err == "" and "note: 30 bytes of experts" in out
    assert json.loads((tmp_path / "ar.json").read_text())["layer_config"] == {
        "model.layers.2.mlp.experts.": {"bits": 2}
    }
    assert "--plan: a plan needs a runtime that is tested to load it" in refused(run(*given))
    assert "no plan by expert is of" in refused(run(*given, "--for", "transformers", "--increase", 0.001))
    for option in (["--with-feeders"], ["--neighbours", 2]):
        assert f"{' '.join(map(str, option))}: a plan already sets the format of every expert" in refused(
            run(*given, *option)
        )
    alone = run("export", tmp_path, "--to", "json", "--increase", 0.1)
    assert "--increase 0.1: chooses among plans; give --plan" in refused(alone)


def test_models_and_text_that_it_refuses(subject):
    model, stats, domains, _ = subject
    with pytest.raises(SedetectError, match="code: one window cannot serve both sensitivity and evaluation"):
        make_frontier(model, domains | {"code": windows(1)}, stats, [], prefix=1)
    with pytest.raises(SedetectError, match="L1E8: Qwen3MoeForCausalLM has no such expert"):
        make_frontier(model, domains, stats, [Place("decoder", 1, "routed", 8)], prefix=1)
    with pytest.raises(SedetectError, match="formats: none"):
        make_frontier(model, domains, stats, [], (), prefix=1)
    with pytest.raises(SedetectError, match="format nf4: is not known"):
        make_frontier(model, domains, stats, [], ("nf4",), prefix=1)


def test_a_router_of_groups_prunes_nothing():
    model = random_model("deepseek_v3")
    with sedetect.profile(model) as prof:
        model(input_ids=windows(1).ids)
    others = [Place("decoder", 1, "shared", "shared"), Weight(SUPER, 1, 2)]
    made = make_frontier(model, {"text": windows(4)}, prof.stats, others, ("int4", "int2"), prefix=0, group=16, seeds=0)
    assert made.notes[:2] == [f"{name} is not compressed by itself at any size" for name in ("L1shared", "L1E3[1,2]")]
    assert made.notes[-1] == "nothing is pruned: the router chooses groups of experts first"
    assert not any(PRUNED in one for c in made.curves for p in c.points for one in p.plan.values())
    assert [c.by for c in made.curves] == ["model", "layer", "expert"] and len(conclusion(made)) == 2


def test_command(tmp_path):
    model = save_random(CONFIGS["qwen3_moe"](), tmp_path / "model")
    options = ("--experts", "L1E3", "--tokens", 1024, "--seq-len", 64, "--format", "int8", "--format", "int2")
    code, out, err = run("budget", model, "--frontier", *options, "--controls", 1, "-o", tmp_path)
    assert code == 0 and err == ""
    assert "\nsize at +1%: by expert " in out and "by layer, protecting L1E3" in out
    (head,) = [line for line in out.splitlines() if line.strip().startswith("bits ")]
    assert head.split() == ["bits", "one", "one+", "layer", "random", "layer+", "expert", "random", "expert+"]
    rows = [line for line in out.splitlines() if re.match(r" *\d+\.\d\d ", line)]
    assert len(rows) >= 4 and all(len(line) <= 80 and "…" not in line for line in rows)
    made = Frontier.load(Results(tmp_path).frontier_path)
    assert made.dtype == "float32" and not (tmp_path / "budget.json").exists()
    assert sum(made.tokens.values()) == made.sensitivity_tokens == 256
    said = conclusion(made)
    assert said[0].startswith("size at +1%: by expert ") and ", dealt out at random " in said[0]
    assert [line.split(",")[0] for line in said[2:5]] == ["by expert", "by layer", "with one format for all"]
    counted = re.findall(r"(\d+) times", said[5])
    assert said[5].startswith("without protection L1E3 gets") and sum(map(int, counted)) == 4
    chosen, dealt = made.curve("expert"), next(c for c in made.curves if c.by == "expert" and c.seed == 0)
    pairs = [(a.predicted, b.predicted) for a, b in zip(chosen.points, dealt.points, strict=True)]
    assert all(a <= b for a, b in pairs) and pairs[-1][0] < pairs[-1][1]


def test_command_refuses(tmp_path):
    for options, said in (
        (("--ratio", 0.25), "--ratio: --frontier prunes by measured sensitivity"),
        (("--by", "reap"), "--by: --frontier prunes by measured sensitivity"),
        (("--tokens", 256, "--seq-len", 32), "one window cannot serve both sensitivity and evaluation"),
    ):
        assert said in refused(run("budget", TINY, "--frontier", *options, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
