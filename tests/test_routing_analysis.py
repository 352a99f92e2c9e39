"""analyze routing: loads, co-activation, entropies and choices against loops over what routers themselves gave."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from support.analysis import PLACES, random_ids, text_of, windows_of
from support.conformance import available
from support.dense_reference import listen
from support.families import FAMILIES, tiny_model
from support.models import TINY, snapshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from sedetect.analysis.common import Analysis, read_texts
from sedetect.analysis.routing import analyze_routing, chosen_slots, distance, effective, lift, standings
from sedetect.calibration.windows import Text, calibration_windows
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import find_banks
from sedetect.models.layers import run_tokens
from sedetect.models.routers import RouterWatch
from sedetect.stats.place import BankId

# whose routers do not choose by the size of their logits, and why; biases that correct the choice are set to 0 below
OTHER_CHOICES = {
    "deepseek_v4": "layer 0 by token id",
    "inkling": "the last row is a shared expert's, always chosen",
    "zaya": "a skipped token is expert 0's, with weight 0",
    "nllb_moe": "its mask is read as indices",
    "switch_transformers": "tokens beyond the capacity are dropped",
}


def check_layer(arrays, heard, experts):
    """heard: the layer on each of two windows, which are domains, and on a text."""
    loads, pairs, weight = [Counter(), Counter()], Counter(), Counter()
    for domain, one in enumerate(heard[:2]):
        for row, gates in zip(one.index.tolist(), one.weights.tolist()):
            mine = [e for e, gate in zip(row, gates) if gate and e < experts]
            loads[domain].update(mine)
            pairs.update(combinations(sorted(mine), 2))
            weight.update({e: gate for e, gate in zip(row, gates) if e in mine})
    total = loads[0] + loads[1]
    assert arrays["load"].tolist() == [[load[e] for e in range(experts)] for load in loads]
    for i in range(experts):
        for j in range(experts):
            assert int(arrays["coactivation"][i, j]) == (total[i] if i == j else pairs[min(i, j), max(i, j)])
        if total[i]:
            assert float(arrays["weight"][i]) == pytest.approx(weight[i] / total[i], rel=1e-5)
        else:
            assert math.isnan(float(arrays["weight"][i]))
    for domain, one in enumerate(heard[:2]):
        logits = one.logits().double().numpy()
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert float(arrays["entropy"][domain]) == pytest.approx(float(-(p * np.log(p)).sum(1).mean()), rel=1e-4)
    if len(heard) > 2:
        assert torch.equal(arrays["text.index"], heard[2].index)
        torch.testing.assert_close(arrays["text.weight"], heard[2].weights.float())


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral", "dbrx", "gemma4", "step3p7"]
)
def test_against_loops(family):
    block, name, router, _ = PLACES[family]
    model = tiny_model(family, FAMILIES[family])
    ids, text = random_ids(), random_ids(5, 1)[0]
    banks = [bank for bank in find_banks(model) if bank.id.kind == "routed"]
    blocks = {bank.id: block.format(bank.id.layer) for bank in banks}
    paths = {f"{path}.{name}": [] for path in blocks.values()}
    routers = {f"{path}.{name}": f"{path}.{router}" for path in blocks.values()}
    heard = [listen(model, row[None], paths, routers) for row in (*ids, text)]
    before = snapshot(model)
    result = analyze_routing(model, windows_of(ids), texts=[text_of(text)], batch_size=1)
    assert snapshot(model) == before and not result.notes
    assert result.settings["domains"] == {"one": 9, "two": 9}
    for bank, path in blocks.items():
        assert result.layers[bank].arrays["tokens"].tolist() == [9, 9]
        check_layer(result.layers[bank].arrays, [one[f"{path}.{name}"] for one in heard], 8)


@pytest.mark.parametrize("family", [name for name in available() if FAMILIES[name].refused is None])
def test_logits_of_every_architecture(family):
    """What is taken for the router's logits is what it chooses by."""
    if family == "qwen3_omni_moe:talker":
        pytest.skip("takes embeddings, and no token ids")
    model = tiny_model(family, FAMILIES[family])
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "bias" in path and 8 <= tensor.numel() <= 16:
            tensor.data.zero_()
    banks = [bank for bank in find_banks(model) if bank.id.routed and bank.id.stack != "vision"]
    agreed = {}

    def call(bank, module, x, index, weights):
        logits = watch.take(bank, len(index))
        top = logits.topk(index.shape[1]).indices.sort(1).values
        agreed[bank.id] = bool((top == index.sort(1).values).all())
        return run_inner(module, x, index, weights)

    with RouterWatch(model, banks) as watch:
        undo = attach(model, [(bank, lambda *a, bank=bank: call(bank, *a)) for bank in banks])
        with torch.no_grad():
            run_tokens(model, random_ids(12))
        undo()
    assert agreed.keys() >= {bank.id for bank in banks if bank.id.kind == "routed"}
    if family not in OTHER_CHOICES:
        assert all(agreed.values()), agreed
    analyzed = analyze_routing(model, windows_of(random_ids(12)), texts=[text_of(random_ids(12)[0])])
    for bank in banks:
        arrays = analyzed.layers[bank.id].arrays
        assert torch.equal(arrays["coactivation"].diagonal(), arrays["load"].sum(0))
        assert arrays["load"].sum() <= arrays["tokens"].sum() * max(FAMILIES[family].top_k, 2)
        assert len(arrays.get("text.index", ())) in (0, 12)


@pytest.fixture(scope="module")
def tiny():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    cut = Text(tokens=256, seq_len=64)
    return model, tokenizer, calibration_windows(model, tokenizer, None, cut).domains


def test_tiny_moe(tiny, tmp_path):
    model, tokenizer, domains = tiny
    texts = read_texts(tokenizer, ["As an open source alternative to", "two"])
    result = analyze_routing(model, domains, texts=texts)
    paths = {f"model.layers.{layer}.mlp.experts": [] for layer in range(10)}
    routers = {path: path.replace("experts", "gate") for path in paths}
    two = dict(list(domains.items())[:2])
    heard = [listen(model, windows.ids, paths, routers) for windows in two.values()]
    part = analyze_routing(model, two)
    for layer in range(10):
        bank = BankId("decoder", layer, "routed")
        check_layer(part.layers[bank].arrays, [one[f"model.layers.{layer}.mlp.experts"] for one in heard], 32)
        arrays = result.layers[bank].arrays
        assert len(arrays["text.index"]) == sum(len(text.ids) for text in texts)
        assert arrays["load"].shape == (4, 32) and int(arrays["load"].sum()) == 256 * 4
    first = result.layers[BankId("decoder", 1, "routed")].arrays["text.index"]
    assert 28 in first[0] and 28 in first[len(texts[0].ids)]  # the super expert, on BOS
    assert standings(result.layers[BankId("decoder", 1, "routed")], 28)["mean routing weight"].value > 0
    again = Analysis.load(result.save(tmp_path), "routing")
    assert again.settings == result.settings and again.settings["texts"][1]["tokens"][0] == "<|bos|>"


def test_slots_that_are_nobodys():
    index, weights = torch.tensor([[0, 5], [2, 1], [-1, 3]]), torch.tensor([[0.5, 0.5], [0.0, 1.0], [1.0, 0.2]])
    assert chosen_slots(index, weights, 4).tolist() == [[0, 4], [4, 1], [4, 3]]


def test_numbers():
    assert effective(torch.tensor([5, 5, 0, 0])) == pytest.approx(2)
    assert effective(torch.ones(7)) == pytest.approx(7) and effective(torch.tensor([9, 0])) == pytest.approx(1)
    assert distance(torch.tensor([[4, 0], [0, 4]])).tolist() == pytest.approx([0.5, 0.5])
    assert distance(torch.tensor([[3, 1], [6, 2]])).tolist() == pytest.approx([0, 0])
    # chosen by 6 and 4 of 12 tokens, by 2 together where 2 are expected
    found = lift(torch.tensor([[6, 2, 0], [2, 4, 0], [0, 0, 0]]), 12)
    assert float(found[0, 1]) == 1 and found[2].isnan().all() and found.diagonal().isnan().all()
