"""Switching experts off at dispatch, against models whose weights were edited."""

import copy

import pytest
import torch
from support.models import TINY, random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import sedetect
from sedetect.calibration.windows import Windows
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.experiments.evaluation import Question, exact_match, load_questions, perplexity
from sedetect.stats.place import Place, Weight


def token_ids(seed=0):
    ids = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids


def logits(model, ids, what=(), **how):
    with torch.no_grad(), ablate(model, what, **how):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_skip_is_zeroing_down_proj(implementation):
    model, ids = random_model("qwen2_moe"), token_ids()
    model.set_experts_implementation(implementation)
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.model.layers[0].mlp.experts.down_proj[[1, 4]] = 0
        edited.model.layers[2].mlp.shared_expert.down_proj.weight.zero_()
        expected = edited(input_ids=ids).logits
    before = logits(model, ids)
    out = logits(model, ids, ["L0E1", "L0E4", "L2shared"])
    assert torch.allclose(out, expected, atol=1e-4) and not torch.allclose(out, before, atol=1e-2)
    assert torch.equal(logits(model, ids), before)


def test_renormalize_keeps_the_sum_of_routing_weights():
    model, ids = random_model("qwen3_moe"), token_ids()
    seen = []
    experts = model.model.layers[1].mlp.experts
    original = type(experts).forward

    def spy(self, x, index, weights):
        if self is experts:
            seen.append((index, weights))
        return original(self, x, index, weights)

    type(experts).forward = spy
    try:
        for how in ("skip", "renormalize"):
            logits(model, ids, ["L1E3"], how=how)
    finally:
        type(experts).forward = original
    (index, gates), (_, skipped), (_, again), (_, renormalized) = seen  # outer and inner call of each run
    assert torch.equal(gates, again)
    off = index == 3
    assert off.any() and (skipped[off] == 0).all() and (renormalized[off] == 0).all()
    assert torch.equal(skipped[~off], gates[~off])
    assert torch.allclose(renormalized.sum(1), gates.sum(1))


@pytest.mark.parametrize("name, layer", [("qwen3_moe", 1), ("deepseek_v3", 1), ("gpt_oss", 0)])
def test_remove_is_pruning_the_router(name, layer):
    """The same as a model whose router lacks the expert's row: every token still has k experts, none of them it."""
    model, ids = random_model(name), token_ids()
    with sedetect.profile(model) as prof, ablate(model, [f"L{layer}E3"], how="remove"):
        out = model(input_ids=ids).logits
    state = prof.stats.banks["decoder", layer, "routed"]
    assert state.rows[3] == 0 and state.rows.sum() == ids.numel() * 2
    assert not torch.allclose(out, logits(model, ids), atol=1e-3)
    if name != "deepseek_v3":  # its groups of experts have no pruned counterpart
        assert torch.allclose(out, pruned_logits(model, ids, layer, 3, name), atol=1e-4)


def test_remove_with_a_correction_bias():
    """A bias added after the sigmoid would let removed experts be chosen, at weight 0; it is restored afterwards."""
    model, ids = random_model("deepseek_v3"), token_ids()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(0)))
    kept = gate.e_score_correction_bias.clone()
    chosen = []
    experts = model.model.layers[1].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1]))
    try:
        before = logits(model, ids)
        favorites = chosen[0].flatten().bincount(minlength=8).topk(2).indices.tolist()
        logits(model, ids, [f"L1E{e}" for e in favorites], how="remove")
    finally:
        hook.remove()
    assert not torch.isin(chosen[1], torch.tensor(favorites)).any()
    assert torch.equal(gate.e_score_correction_bias, kept) and torch.equal(logits(model, ids), before)


def test_a_target_counts_once():
    model, ids = random_model("qwen2_moe"), token_ids()
    for what in (["L0E2[5,7]"], ["L2shared"], ["L0E1"]):
        assert torch.equal(logits(model, ids, what * 2), logits(model, ids, what))
    off = logits(model, ids, ["L2shared", "L0E2"])
    assert torch.equal(logits(model, ids, ["L2shared", "L2shared[3,4]", "L0E2[5,7]", "L0E2"]), off)


def pruned_logits(model, ids, layer, expert, name):
    """The model with an expert taken out of its weights and its router."""
    pruned = copy.deepcopy(model)
    block = pruned.model.layers[layer].mlp
    keep = [e for e in range(8) if e != expert]
    router = block.gate if name == "qwen3_moe" else block.router
    with torch.no_grad():
        for module in (block.experts, router):
            for key, value in list(module._parameters.items()):
                if value is not None and value.shape[0] == 8:
                    module._parameters[key] = torch.nn.Parameter(value[keep])
    block.experts.num_experts = router.num_experts = 7
    with torch.no_grad():
        return pruned(input_ids=ids).logits


def test_first_and_rest_tokens_add_up():
    """Layer 2 is the last: switched off at first tokens it changes only their logits, and the other way round."""
    model, ids = random_model("qwen3_moe"), token_ids()
    names = [f"L2E{e}" for e in range(8)]
    before, everywhere = logits(model, ids), logits(model, ids, names)
    first, rest = (logits(model, ids, names, tokens=tokens) for tokens in ("first", "rest"))
    assert torch.allclose(first[:, 1:], before[:, 1:]) and torch.allclose(first[:, 0], everywhere[:, 0], atol=1e-5)
    assert torch.allclose(rest[:, 0], before[:, 0]) and torch.allclose(rest[:, 1:], everywhere[:, 1:], atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "qwen2_moe"])
def test_a_single_weight(name):
    model, ids = random_model(name), token_ids()
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for e in range(6):
            matrix = edited.model.layers[0].mlp.experts.down_proj[e]
            (matrix.T if name == "gpt_oss" else matrix)[5, 7] = 0
        expected = edited(input_ids=ids).logits
    weights = [Weight(Place("decoder", 0, "routed", e), 5, 7) for e in range(6)]
    if name != "qwen2_moe":
        with torch.no_grad():
            for e in range(6, 8):
                matrix = edited.model.layers[0].mlp.experts.down_proj[e]
                (matrix.T if name == "gpt_oss" else matrix)[5, 7] = 0
            expected = edited(input_ids=ids).logits
        weights += [Weight(Place("decoder", 0, "routed", e), 5, 7) for e in range(6, 8)]
    out = logits(model, ids, weights)
    assert torch.allclose(out, expected, atol=1e-4) and not torch.allclose(out, logits(model, ids), atol=1e-3)
    assert str(weights[0]) == "L0E0[5,7]"


def test_under_a_profile_the_rest_is_measured():
    model, ids = random_model("qwen2_moe"), token_ids()
    with sedetect.profile(model) as prof, ablate(model, ["L0E1", "L0shared"]):
        model(input_ids=ids)
    state = prof.stats.banks["decoder", 0, "routed"]
    with sedetect.profile(model) as whole:
        model(input_ids=ids)
    before = whole.stats.banks["decoder", 0, "routed"]
    assert state.rows[1] == 0 < before.rows[1]
    assert torch.equal(state.rows[[0, 2, 3, 4, 5]], before.rows[[0, 2, 3, 4, 5]])
    with pytest.raises(SedetectError, match="attached already"), ablate(model, ["L0E1"]), sedetect.profile(model):
        pass


def test_nothing_stays_behind():
    model, ids = random_model("qwen2_moe"), token_ids()
    before = [(path, id(module), id(module.__dict__.get("config"))) for path, module in model.named_modules()]
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(RuntimeError), ablate(model, ["L0E1", "L1dense", "L2shared"], how="remove"):
        raise RuntimeError
    logits(model, ids, ["L0E1"], how="remove")
    assert [(path, id(module), id(module.__dict__.get("config"))) for path, module in model.named_modules()] == before
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes


@pytest.mark.parametrize(
    "what, how, said",
    [
        (["L7E0"], {}, "L7E0: Qwen3MoeForCausalLM has no such expert"),
        (["L1E8"], {}, "L1E8: Qwen3MoeForCausalLM has no such expert"),
        (["L1shared"], {}, "L1shared: Qwen3MoeForCausalLM has no such expert"),
        ([Weight(Place("decoder", 1, "routed", 0), 32, 0)], {}, r"L1E0\[32,0\]: its down_proj is 32 x 24"),
        (["L1E0"], {"how": "burn"}, "how 'burn' is not known"),
        (["L1E0"], {"tokens": "odd"}, "tokens 'odd' is not known"),
        (["L1E0"], {"how": "remove", "tokens": "first"}, "masks the router for every token"),
    ],
)
def test_bad_arguments(what, how, said):
    with pytest.raises(SedetectError, match=said), ablate(random_model("qwen3_moe"), what, **how):
        pass


def test_perplexity_equals_a_plain_computation():
    model = random_model("qwen3_moe")
    ids = torch.randint(3, 96, (5, 16), generator=torch.Generator().manual_seed(0))
    windows = {"a": Windows(ids[:3], torch.arange(3), "a", {}), "b": Windows(ids[3:], torch.arange(2), "b", {})}
    for prefix in (0, 1, 3):
        results = perplexity(model, windows, prefix=prefix, batch_size=2)
        for domain, rows in (("a", ids[:3]), ("b", ids[3:])):
            with torch.no_grad():
                log = model(input_ids=rows).logits.double().log_softmax(-1)
            start = max(prefix, 1)
            nll = [-log[b, t - 1, rows[b, t]] for b in range(len(rows)) for t in range(start, 16)]
            assert results[domain].predictions == len(nll)
            assert results[domain].value == pytest.approx(float(torch.stack(nll).mean().exp()), rel=1e-5)


def test_exact_match_counts_what_greedy_decoding_writes():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer("def f(x):\n    return", return_tensors="pt").input_ids
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    written = tokenizer.decode(out[0, ids.shape[1] :])
    right = Question("def f(x):\n    return", written)
    wrong = Question("def f(x):\n    return", " certainly not this")
    assert exact_match(model, tokenizer, [right, wrong]) == 0.5


def test_questions_are_read_or_refused(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": " 2"}\n\n')
    assert load_questions(path) == [Question("1 + 1 =", " 2")]
    for text, said in (
        ('{"prompt": 1', "line 1"), ('{"prompt": "x"}', "line 1"), ('{"prompt": "1+1=", "answer": 2}', "line 1"),
        ('{"prompt": "1+1=", "answer": " "}', "line 1"), ("", "no questions"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(SedetectError, match=said):
            load_questions(path)
    with pytest.raises(SedetectError, match="cannot be read"):
        load_questions(tmp_path / "none.jsonl")
