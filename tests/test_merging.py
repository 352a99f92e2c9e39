"""Merged experts: a checkpoint that holds them computes what the original does with its weights averaged by hand."""

import json
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import save_family, save_random, to_fp8
from support.command import refused, run
from support.conformance import available
from support.families import FAMILIES, tiny_model
from support.models import CONFIGS, TINY, random_model, token_ids
from transformers import AutoModelForCausalLM

from sedetect import BankId
from sedetect.analysis.matrices import expert_matrices, is_interleaved
from sedetect.calibration.windows import Windows
from sedetect.compression import merging
from sedetect.compression.merging import Group, align_neurons, expert_distances, group_nearest, group_ream
from sedetect.compression.pruning import Pruning, choose_kept, prune_checkpoint
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.models.banks import find_banks
from sedetect.ranking.saliencies import saliency
from sedetect.stats.place import Place

IDS = token_ids()


def windows(ids=IDS):
    return {"text": Windows(ids, torch.arange(len(ids)), "source", {})}


def routed(model):
    return [bank for bank in find_banks(model) if bank.id.kind == "routed"]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def removed(kept, number):
    return [Place(*bank, e) for bank, mine in kept.items() for e in range(number) if e not in mine]


def merge_by_hand(model, groups, width):
    """Average the experts of a live model, neuron by neuron."""
    for bank in routed(model):
        own = bank.module
        for kept, group in groups[bank.id].items():
            for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
                tensor = getattr(own, name, None)
                if tensor is None:
                    continue
                if own.is_transposed and tensor.dim() == 3:
                    tensor = tensor.transpose(1, 2)
                new = torch.zeros_like(tensor[kept])
                for expert, weight in group.weights.items():
                    order = group.orders.get(expert, torch.arange(width)).tolist()
                    for place, neuron in enumerate(order):
                        if name == "down_proj":
                            new[:, place] += weight * tensor[expert][:, neuron]
                        elif name != "down_proj_bias":
                            for half in range(2):
                                rows = (2 * place + half, 2 * neuron + half)
                                if own.is_concatenated:
                                    rows = (place + half * width, neuron + half * width)
                                new[rows[0]] += weight * tensor[expert][rows[1]]
                    if name == "down_proj_bias":
                        new += weight * tensor[expert]
                tensor.data[kept] = new


@pytest.mark.parametrize("method", ["nearest", "ream"])
@pytest.mark.parametrize("name", [*CONFIGS, "mixtral", "granitemoe", "minimax_m2", "jamba", "lfm2_moe", "ernie4_5_moe"])
def test_the_merged_checkpoint_is_the_simulated_model(name, method, tmp_path):
    model, stats = save_family(name, tmp_path / "source")
    number = 6 if name == "qwen2_moe" else 8
    kept = choose_kept(stats, "reap", 0.5, groups=2 if name == "deepseek_v3" else 1)
    if method == "nearest":
        groups = group_nearest(tmp_path / "source", stats, kept)
    else:
        banks = routed(model)
        groups = align_neurons(model, banks, group_ream(expert_distances(model, banks, windows()), stats, "reap", kept))
        orders = [order for mine in groups.values() for group in mine.values() for order in group.orders.values()]
        assert any(order.tolist() != sorted(order.tolist()) for order in orders)
    assert sum(len(group.weights) - 1 for mine in groups.values() for group in mine.values()) >= len(groups)
    prune_checkpoint(tmp_path / "source", tmp_path / "out", kept, groups=groups)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with ablate(model, removed(kept, number), how="remove"):
        pruned = logits(model, IDS)
        merge_by_hand(model, groups, routed(model)[0].intermediate)
        expected = logits(model, IDS)
    torch.testing.assert_close(logits(merged, IDS), expected, rtol=1e-4, atol=1e-4)
    assert (expected - pruned).abs().max() > 0.1, "merging changed what is left"
    written = json.loads((tmp_path / "out" / "pruning.json").read_text())["merged"]
    for bank, mine in groups.items():
        for expert, group in mine.items():
            assert sum(group.weights.values()) == pytest.approx(1) and next(iter(group.weights)) == expert
            assert written[str(bank)][str(expert)] == [e for e in group.weights if e != expert]


def test_distances_by_a_loop_over_tokens():
    model = random_model("qwen3_moe")
    seen = {bank.id: [] for bank in routed(model)}
    for bank in routed(model):
        model.get_submodule(bank.path.rpartition(".")[0]).register_forward_pre_hook(
            lambda module, args, key=bank.id: seen[key].append((module, args[0].flatten(0, 1)))
        )
    found = expert_distances(model, routed(model), windows(), batch_size=3)
    for bank in routed(model):
        tokens = [(block, x) for block, part in seen[bank.id] for x in part]
        assert len(tokens) == IDS.numel()
        scores, means = torch.zeros(len(tokens), 8, dtype=torch.float64), torch.zeros(8, 32, dtype=torch.float64)
        for n, (block, x) in enumerate(tokens):
            scores[n] = block.gate.weight.double() @ x.double()
            for e, chance in enumerate(scores[n].softmax(0)):
                gate, up = (block.experts.gate_up_proj[e].double() @ x.double()).chunk(2)
                means[e] += chance * (block.experts.down_proj[e].double() @ (F.silu(gate) * up)) / len(tokens)
        apart = torch.zeros(8, 8, dtype=torch.float64)
        for i, j in product(range(8), repeat=2):
            apart[i, j] = (scores[:, i] / scores[:, i].norm() - scores[:, j] / scores[:, j].norm()).norm()
        for i, j in product(range(8), repeat=2):
            alike = (1 + F.cosine_similarity(means[i], means[j], dim=0)) / 2
            expected = 1 - (alike + 1 - apart[i, j] / apart.max()) / 2
            assert found[bank.id][i, j].item() == pytest.approx(expected.item(), abs=1e-5)


def test_groups_of_nearest_by_a_loop(tmp_path):
    _, stats = save_family("qwen3_moe", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    kept = choose_kept(stats, "frequency", 0.5)
    exempt = [Place("decoder", 0, "routed", kept[BankId("decoder", 0, "routed")][0])]
    groups = group_nearest(tmp_path, stats, kept, exempt)
    for bank, stay in kept.items():
        rows, counts = model.model.layers[bank.layer].mlp.gate.weight, stats.banks[bank].rows.tolist()
        expected = {}
        for e in set(range(8)) - set(stay):
            free = [k for k in stay if Place(*bank, k) not in exempt]
            nearest = max(free, key=lambda k: F.cosine_similarity(rows[k], rows[e], dim=0).item())
            if counts[e]:
                expected.setdefault(nearest, {nearest: counts[nearest]})[e] = counts[e]
        found = {k: group.weights for k, group in groups[bank].items()}
        assert {k: sorted(of) for k, of in found.items()} == {k: sorted(of) for k, of in expected.items()}
        for k, of in found.items():
            for e, weight in of.items():
                assert weight == pytest.approx(expected[k][e] / sum(expected[k].values()))


def test_groups_of_ream(tiny_stats, monkeypatch):
    """The most salient take their share of the nearest, the exempt none; weights are the saliencies'."""
    monkeypatch.setattr(merging, "GROUP", 6)
    torch.manual_seed(0)
    near = {bank: torch.rand(32, 32, dtype=torch.float64) for bank in tiny_stats.banks}
    safe = [Place("decoder", 1, "routed", 28), Place("decoder", 9, "routed", 7)]
    kept = choose_kept(tiny_stats, "reap", 0.25, safe)
    exempt = [
        *safe,
        Place("decoder", 3, "routed", next(e for e in range(32) if e not in kept[BankId("decoder", 3, "routed")])),
    ]
    groups = group_ream(near, tiny_stats, "reap", kept, exempt)
    for bank, values in saliency(tiny_stats, "reap").items():
        free = [e for e in range(32) if Place(*bank, e) not in exempt]
        away = [e for e in free if e not in kept[bank]]
        first, second = sorted((e for e in free if e in kept[bank]), key=lambda e: -values[e])[:2]
        taken = sorted(away, key=lambda e: near[bank][first, e])[:5]
        assert list(groups[bank]) == [first, second] and list(groups[bank][first].weights) == [first, *taken]
        rest = sorted(set(away) - set(taken), key=lambda e: near[bank][second, e])
        assert list(groups[bank][second].weights) == [second, *rest]
        weights = groups[bank][first].weights
        total = sum(values[e] for e in weights)
        assert weights == {e: pytest.approx(float(values[e] / total)) for e in weights}
    assert len(exempt) == 3 and not any(
        place.number in group.weights for place in exempt for group in groups[place.bank].values()
    )


def test_experts_with_nan_or_without_rows_are_not_averaged(tmp_path):
    model, stats = save_family("qwen3_moe", tmp_path)
    bank = BankId("decoder", 1, "routed")
    kept = {one: [0, 1, 2, 3] for one in stats.banks}
    stats.banks[bank].nonfinite[1], stats.banks[bank].nonfinite[6] = 1, 1
    stats.banks[bank].counts[5] = 0
    stats.banks[bank].gate_norm_sum[5] = 0
    distances = expert_distances(model, routed(model), windows())
    for groups in (group_nearest(tmp_path, stats, kept), group_ream(distances, stats, "reap", kept)):
        weights = {e: w for group in groups[bank].values() for e, w in group.weights.items()}
        assert not {1, 5, 6} & weights.keys()
        assert {4, 7} <= weights.keys()
    distances[bank][:] = torch.nan
    assert group_ream(distances, stats, "reap", kept)[bank] == {}


def test_refusals(tmp_path):
    _, stats = save_family("qwen3_moe", tmp_path / "source")
    kept = {bank: [0, 1, 2, 3] for bank in stats.banks}
    bank = BankId("decoder", 1, "routed")
    for weights, said in (
        ({0: {0: 0.5, 4: 0.5}, 1: {1: 0.5, 4: 0.5}}, "an expert is merged twice"),
        ({0: {0: 0.5, 2: 0.5}}, "or one that stays into another"),
        ({4: {4: 0.5, 5: 0.5}}, "or one that stays into another"),
    ):
        groups = {bank: {expert: Group(one) for expert, one in weights.items()}}
        with pytest.raises(SedetectError, match=f"layer 1: .*{said}"):
            prune_checkpoint(tmp_path / "source", tmp_path / "out", kept, groups=groups)
    with pytest.raises(SedetectError, match=r"\.experts\.0\.\w+\.weight: which of its dimensions counts neurons"):
        groups = {bank: {0: Group({0: 0.5, 4: 0.5}, {4: torch.arange(23)})}}
        prune_checkpoint(tmp_path / "source", tmp_path / "out", kept, groups=groups)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("method", ["nearest", "ream"])
def test_command(method, tiny_stats, tmp_path):
    """Protected experts keep their weights; the plans of several ratios are those without merging."""
    tiny_stats.save(tmp_path / "stats.safetensors")
    options = ("--stats", tmp_path / "stats.safetensors", "--tokens", 1024, "--seq-len", 128, "--ratio", 0.25)
    code, out, err = run("prune", TINY, *options, "--merge", method, "-o", tmp_path / "out")
    assert code == 0 and err == ""
    assert f"merged by {method}: 80 of 80 pruned experts, into " in out
    document = Pruning.load(tmp_path / "out" / "pruning.json")
    assert document.kept == choose_kept(tiny_stats, "reap", 0.25, [Place("decoder", 1, "routed", 28)])
    assert document.facts["merge"] == method
    one = document.kept[BankId("decoder", 1, "routed")].index(28)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (TINY, tmp_path / "out")]
    experts = [model.model.layers[1].mlp.experts for model in models]
    assert torch.equal(experts[0].down_proj[28], experts[1].down_proj[one])
    assert "28" not in document.facts["merged"]["decoder.1.routed"]
    same = [torch.equal(experts[0].down_proj[old], experts[1].down_proj[new])
            for new, old in enumerate(document.kept[BankId("decoder", 1, "routed")])]  # fmt: skip
    assert same.count(False) == len(document.facts["merged"]["decoder.1.routed"]) > 0


def test_command_refuses_quantized_experts(tmp_path):
    save_random(CONFIGS["qwen3_moe"](), tmp_path / "source", torch.bfloat16)
    to_fp8(tmp_path / "source")
    said = refused(run("prune", tmp_path / "source", "--merge", "nearest", "-o", tmp_path / "out"))
    assert "stored as fp8; quantized experts are not averaged" in said and "or prune without merging" in said


@pytest.mark.parametrize("name", available())
def test_neurons_of_every_family(name, tmp_path):
    """What is averaged in the file is what is averaged in the model: one matrix with the neurons of another order."""
    model = tiny_model(name, FAMILIES[name])
    model.save_pretrained(tmp_path / "source")
    try:
        banks = [bank for bank in routed(model) if bank.id.stack == "decoder"]
        prune_checkpoint(tmp_path / "source", tmp_path / "pruned", {bank.id: list(range(6)) for bank in banks})
    except SedetectError:
        return  # which tests of pruning expect
    groups = {}
    for bank in banks:
        order = torch.randperm(bank.intermediate, generator=torch.Generator().manual_seed(bank.id.layer))
        turns = bank.module.has_gate and is_interleaved(bank)
        groups[bank.id] = {2: Group({2: 0.75, 7: 0.25}, {7: order}, turns)}
    kept = {bank.id: list(range(6)) for bank in banks}
    if name.startswith("inkling2"):  # gate and up take turns in the file, and are halves in the model
        with pytest.raises(
            SedetectError, match="experts.w13_weight: which of its dimensions counts neurons is not known"
        ):
            prune_checkpoint(tmp_path / "source", tmp_path / "out", kept, groups=groups)
        return
    prune_checkpoint(tmp_path / "source", tmp_path / "out", kept, groups=groups)
    pruned, merged = (type(model).from_pretrained(tmp_path / part) for part in ("pruned", "out"))
    after = {bank.id: bank for bank in routed(merged)}
    for bank in banks:
        (group,) = groups[bank.id].values()
        source, found = expert_matrices(model, bank), expert_matrices(merged, after[bank.id])
        for kind, matrix in source.items():
            expected = 0.75 * matrix[2] + 0.25 * matrix[7][group.orders[7]]
            torch.testing.assert_close(found[kind][2], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(found[kind][3], matrix[3])
    left = pruned.state_dict()
    changed = {key for key, tensor in merged.state_dict().items() if not torch.equal(tensor, left[key])}
    own = {bank.path if bank.stored_in is bank.module else bank.path.rpartition(".")[0] for bank in banks}
    assert changed and all(key.startswith(tuple(own)) for key in changed)
    assert not any("router" in key or key.endswith("e_score_correction_bias") for key in changed)
