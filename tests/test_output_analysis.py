"""analyze outputs: every array against loops over experts and tokens; the model computes what it would without."""

import numpy as np
import pytest
import torch
from support.analysis import PLACES, random_ids, text_of, windows_of
from support.command import refused, run
from support.conformance import available
from support.dense_reference import listen
from support.families import FAMILIES, tiny_model
from support.models import TINY, random_model, snapshot
from support.quantized import in_fp8, listed_twins, packed, twins
from support.remote_code import DeepseekBlock, MixtralBlock, as_remote_code
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

import sedetect
from sedetect import ops
from sedetect.adapters.stacked import Adapter
from sedetect.analysis import outputs
from sedetect.analysis.common import Analysis, LayerArrays, read_texts
from sedetect.analysis.matrices import expert_matrices
from sedetect.analysis.outputs import OutputSums, analyze_outputs, standings, summarize
from sedetect.analysis.routing import analyze_routing
from sedetect.analysis.tables import layers_table
from sedetect.calibration.windows import Windows, calibration_windows
from sedetect.errors import SedetectError
from sedetect.kernels.gate import Gate
from sedetect.models.attach import is_attached
from sedetect.models.banks import find_banks
from sedetect.models.layers import run_tokens
from sedetect.models.loading import PreparedModel
from sedetect.report.pictures import pictures_of
from sedetect.stats.place import BankId


def loops(y: np.ndarray) -> dict[str, np.ndarray]:
    """cosine, angular (T, N, N) and norm (T, N) of y (N, T, H), pair by pair."""
    members, tokens, _ = y.shape
    cosine = np.ones((tokens, members, members))
    for t in range(tokens):
        for i in range(members):
            for j in range(members):
                a, b = y[i, t], y[j, t]
                cosine[t, i, j] = 1 if i == j else (a @ b) / np.sqrt((a @ a) * (b @ b))
    return {
        "cosine": cosine,
        "angular": 1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi,
        "norm": np.array([[np.sqrt(y[i, t] @ y[i, t]) for i in range(members)] for t in range(tokens)]),
    }


def close(mine, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(mine, dtype=np.float64), expected, rtol=1e-4, atol=tolerance)


def check_layer(arrays, heard, experts, short):
    """The arrays of one layer: heard on two windows; short: on a text."""
    y = [
        np.concatenate([h.outputs(experts).numpy(), *(s[None].double().numpy() for s in h.shared.values())])
        for h in heard
    ]
    every = loops(np.concatenate(y, axis=1))
    tokens = every["norm"].shape[0]
    assert int(arrays["tokens"]) == tokens
    close(arrays["cosine"], every["cosine"].mean(0))
    close(arrays["angular"], every["angular"].mean(0))
    close(arrays["norm_mean"], every["norm"].mean(0))
    close(arrays["norm_max"], every["norm"].max(0))
    counts, chosen = np.zeros((experts, experts), int), np.zeros(experts, int)
    logits = torch.cat([h.logits() for h in heard])[:, :experts].double().numpy()
    index = torch.cat([h.index for h in heard]).tolist() if heard[0].index is not None else [[]] * tokens
    weights = torch.cat([h.weights for h in heard]).tolist() if heard[0].index is not None else [[]] * tokens
    for t in range(tokens):
        score_rank, norm_rank = (np.argsort(np.argsort(v[:experts])) for v in (logits[t], every["norm"][t]))
        for e in range(experts):
            counts[score_rank[e], norm_rank[e]] += 1
        for e, weight in zip(index[t], weights[t]):
            if weight and e < experts:
                chosen[norm_rank[e]] += 1
    assert (arrays["rank_counts"].numpy() == counts).all()
    if heard[0].index is not None:
        assert (arrays["chosen_ranks"].numpy() == chosen).all()
    one = loops(
        np.concatenate([short.outputs(experts).numpy(), *(s[None].double().numpy() for s in short.shared.values())])
    )
    close(arrays["text.cosine"], one["cosine"])
    close(arrays["text.norm"], one["norm"])
    scores = np.exp(short.logits().double().numpy())
    close(arrays["text.score"], (scores / scores.sum(1, keepdims=True))[:, :experts])


def check_states(model, bank, arrays, x):
    """act(W_gate x) by the matrices, for gates that are a product with the up half."""
    matrices, module = expert_matrices(model, bank), bank.module
    act = module.act_fn if hasattr(module, "act_fn") else torch.nn.functional.silu
    with torch.no_grad():
        for t, row in enumerate(x):
            for e in range(bank.experts):
                close(arrays["text.states"][t, e], act(matrices["gate"][e] @ row).numpy(), 1e-4)


@pytest.mark.parametrize("family", PLACES)
def test_against_loops(family):
    block, experts_name, router, shared = PLACES[family]
    model = tiny_model(family, FAMILIES[family])
    ids, text = random_ids(), random_ids(5, 1)[0]
    banks = [b for b in find_banks(model) if b.id.kind == "routed" and b.id.stack == "decoder"]
    blocks = {bank.id: block.format(bank.id.layer) for bank in banks}
    of = {bank: ".".join(filter(None, (path, experts_name))) for bank, path in blocks.items()}
    paths = {of[bank]: [f"{path}.{name}" for name in shared] for bank, path in blocks.items()}
    routers = {of[bank]: f"{path}.{router}" for bank, path in blocks.items()}
    heard = [listen(model, row[None], paths, routers) for row in (*ids, text)]
    before = snapshot(model)
    result = analyze_outputs(model, windows_of(ids), texts=[text_of(text)], batch_size=1)
    assert snapshot(model) == before
    for bank in banks:
        *long, short = (one[of[bank.id]] for one in heard)
        arrays = result.layers[bank.id].arrays
        check_layer(arrays, long, bank.experts, short)
        assert arrays["text.states"].shape == (len(text), bank.experts, bank.intermediate)
        if family in ("qwen3_moe", "qwen2_moe", "mixtral", "gemma4"):
            check_states(model, bank, arrays, short.x)
        assert len(result.layers[bank.id].members) == len(arrays["norm_mean"]) == bank.experts + len(shared)
    if family != "nllb_moe" and family != "switch_transformers":
        assert not result.notes


@pytest.mark.parametrize("family", [name for name in available() if FAMILIES[name].refused is None])
def test_every_architecture(family):
    """It runs, the model's answer is the same (behind the experts interface, to the bit), the numbers hang together."""
    if family == "qwen3_omni_moe:talker":
        pytest.skip("takes embeddings, and no token ids")
    model = tiny_model(family, FAMILIES[family])
    ids, answers = random_ids(12), []
    hook = model.register_forward_hook(lambda m, a, out: answers.append(out[0]))
    torch.manual_seed(0)  # one family draws in its forward
    with torch.no_grad():
        run_tokens(model, ids)
    torch.manual_seed(0)
    windows = {"both": Windows(ids, torch.arange(2), "both", {})}
    result = analyze_outputs(model, windows, texts=[text_of(ids[0])])
    hook.remove()
    if any(isinstance(bank.module, Adapter) for bank in find_banks(model)):
        torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(answers[1], answers[0])
    ran = 0
    for bank in find_banks(model):
        arrays = result.layers[bank.id].arrays if bank.id in result.layers else {}
        if arrays and int(arrays["tokens"]):
            ran += 1
            tokens, members = int(arrays["tokens"]), len(result.layers[bank.id].members)
            assert arrays["cosine"].shape == (members, members)
            assert arrays["cosine"].diagonal().allclose(torch.ones(1), atol=1e-6)
            assert arrays["cosine"].abs().max() <= 1 and (arrays["norm_max"] >= arrays["norm_mean"]).all()
            counts = arrays["rank_counts"]
            assert (counts.sum(0) == tokens).all() and (counts.sum(1) == tokens).all()
            found = summarize(result.layers[bank.id])
            assert -1 <= found["correlation"] <= 1 and 0 <= found["top"] <= 1
            if "text.norm" in arrays:
                assert len(arrays["text.norm"]) == 12 == len(arrays["text.states"])
                passes = FAMILIES[family].passes.get(bank.id.layer, 1)
                assert any("more than once" in note and str(bank.id) in note for note in result.notes) == (passes > 1)
    assert ran


def put_dense(folder, intermediate, **changes):
    config = MistralConfig(**{
        "hidden_size": 32, "intermediate_size": intermediate, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, **changes,
    })  # fmt: skip
    dense = MistralForCausalLM(config).eval()
    dense.save_pretrained(folder)
    return dense


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_against_a_dense_model(family, tmp_path):
    """Its MLP of the same number is given what the experts are given, and stands beside them as F."""
    block, experts_name, router, shared = PLACES[family]
    model = tiny_model(family, FAMILIES[family])
    ids, text = random_ids(), random_ids(5, 1)[0]
    bank = next(b for b in find_banks(model) if b.id.routed and b.id.layer < 2)
    dense = put_dense(tmp_path / "dense", bank.intermediate)
    path = block.format(bank.id.layer)
    of = f"{path}.{experts_name}"
    heard = [listen(model, row[None], {of: [f"{path}.{n}" for n in shared]}, {of: f"{path}.{router}"})[of]
             for row in (*ids, text)]  # fmt: skip
    result = analyze_outputs(
        model, windows_of(ids), texts=[text_of(text)], against=tmp_path / "dense", backend="torch", batch_size=1
    )
    assert result.settings["against"] == "dense"
    layer, mlp = result.layers[bank.id], dense.model.layers[bank.id.layer].mlp
    assert layer.members[-1] == "F" and len(layer.members) == bank.experts + len(shared) + 1
    for one in heard:
        with torch.no_grad():
            one.shared["F"] = mlp(one.x)
    *long, short = heard
    check_layer(layer.arrays, long, bank.experts, short)
    with torch.no_grad():
        states = torch.nn.functional.silu(mlp.gate_proj(short.x))
    assert layer.arrays["text.states"].shape == (5, bank.experts + 1, bank.intermediate)
    close(layer.arrays["text.states"][:, -1], states.numpy())
    found = summarize(layer)
    assert found["dense"] == pytest.approx(float(layer.arrays["cosine"][-1, : bank.experts].mean()), abs=1e-6)
    assert ("shared" in found) == bool(shared)
    if shared:
        assert found["shared"] == pytest.approx(float(layer.arrays["cosine"][-2, : bank.experts].mean()), abs=1e-6)
    assert "dense: that of F, the MLP of dense." in layers_table(result).text
    names = {picture.name for picture in pictures_of(result, {}, page=False)}
    assert any(name.endswith("-token-0-states") for name in names)
    lacking = [f"{b.id}: dense has no MLP in a layer of this number, so F takes no part"
               for b in find_banks(model) if b.id.routed and b.id.layer == 2]  # fmt: skip
    assert result.notes == lacking and "F" not in result.layers[BankId("decoder", 2, "routed")].members


def test_dense_models_of_other_sizes(monkeypatch, tmp_path):
    model, ids = random_model("qwen3_moe"), random_ids()
    put_dense(tmp_path / "more", 40)
    result = analyze_outputs(model, windows_of(ids), texts=[text_of(ids[0])], layers=[0], against=tmp_path / "more")
    (layer,) = result.layers.values()
    assert layer.arrays["text.states"].shape[1] == 8 and layer.arrays["text.cosine"].shape[1:] == (9, 9)
    assert result.notes == [
        "decoder.0.routed: F is not among the intermediate states: it has 40 neurons, and the experts 24"
    ]
    put_dense(tmp_path / "wide", 24, hidden_size=64)
    with pytest.raises(SedetectError, match="against wide: .* writes 64 channels, the experts of .* 32"):
        analyze_outputs(model, windows_of(ids), against=tmp_path / "wide")
    with pytest.raises(SedetectError, match="no such folder|is not a local folder"):
        analyze_outputs(model, windows_of(ids), against="none/none")
    monkeypatch.setattr(PreparedModel, "load", lambda self: pytest.fail("weights are read"))
    line = refused(run("analyze", "outputs", TINY, "--against", tmp_path / "wide"))
    assert "--against wide: model.layers.0.mlp.down_proj writes 64 channels, the experts of" in line


@pytest.fixture(scope="module")
def tiny():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    cut = sedetect.Text(tokens=256, seq_len=64)
    return model, tokenizer, calibration_windows(model, tokenizer, None, cut).domains


def test_tiny_moe(tiny):
    model, tokenizer, domains = tiny
    (text,) = read_texts(tokenizer, ["As an open source alternative to"])
    assert text.tokens[0] == "<|bos|>" and len(text.ids) == len(text.tokens) > 5
    steps = []
    result = analyze_outputs(model, domains, texts=[text], layers=[1, 9], progress=lambda *step: steps.append(step))
    assert steps == [(domain, 64) for domain in domains]
    assert list(result.layers) == [BankId("decoder", layer, "routed") for layer in (1, 9)]
    paths = {f"model.layers.{layer}.mlp.experts": [] for layer in (1, 9)}
    routers = {path: path.replace("experts", "gate") for path in paths}
    every = [*(row for windows in domains.values() for row in windows.ids), text.ids]
    heard = [listen(model, row[None], paths, routers) for row in every]
    for bank, layer in result.layers.items():
        *long, short = (one[f"model.layers.{bank.layer}.mlp.experts"] for one in heard)
        check_layer(layer.arrays, long, 32, short)
    found = result.layers[BankId("decoder", 1, "routed")]
    assert int(found.arrays["text.norm"][0].argmax()) == 28  # the super expert, on BOS
    assert standings(found, 28)["largest norm"].place == 1
    assert found.arrays["text.index"][0].tolist()[0] == 28


def test_chunks_are_added_up(tiny, monkeypatch):
    model, _, domains = tiny
    whole = analyze_outputs(model, domains, layers=[3], batch_size=2)
    monkeypatch.setattr(outputs, "_CHUNK", {"cpu": 32 * 256 * 5})
    parts = analyze_outputs(model, domains, layers=[3], batch_size=2)
    bank = BankId("decoder", 3, "routed")
    for name, array in whole.layers[bank].arrays.items():
        torch.testing.assert_close(parts.layers[bank].arrays[name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_expert(backend, transposed):
    """The stages of each backend, with every expert chosen, against one linear after another."""
    generator = torch.Generator().manual_seed(6)
    experts, tokens, hidden, inner = 5, 7, 32, 48
    x = torch.randn(tokens, hidden, generator=generator)
    up, down = (torch.randn(experts, *s, generator=generator) * 0.2 for s in ((2 * inner, hidden), (hidden, inner)))
    up_bias, down_bias = (
        torch.randn(experts, 2 * inner, generator=generator),
        torch.randn(experts, hidden, generator=generator),
    )
    given = [w.transpose(1, 2).contiguous() if transposed else w for w in (up, down)]
    weights = ops.ExpertWeights(*given, Gate(), gate_up_bias=up_bias, down_bias=down_bias, transposed=transposed)
    y = ops.every_expert(x, weights, backend=backend)
    assert y.shape == (experts, tokens, hidden)
    for e in range(experts):
        gate, value = (x @ up[e].T + up_bias[e]).chunk(2, dim=1)
        expected = torch.nn.functional.silu(gate) * value @ down[e].T + down_bias[e]
        torch.testing.assert_close(y[e], expected, rtol=1e-4, atol=1e-4)


def test_tokens_that_are_not_finite_count_nowhere():
    y = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(7))
    chosen, logits = torch.tensor([[0], [1], [2], [3]]), torch.randn(4, 3)
    clean, broken = OutputSums(3, 3, torch.device("cpu")), OutputSums(3, 3, torch.device("cpu"))
    kept = torch.tensor([0, 2, 3])
    clean.add(y[:, kept], chosen[kept], logits[kept])
    y[1, 1, 2] = torch.inf
    broken.add(y, chosen, logits)
    for name, array in clean.arrays().items():
        torch.testing.assert_close(broken.arrays()[name], array)
    assert (clean.left_out(), broken.left_out()) == (0, 1)
    assert int(broken.arrays()["tokens"]) == 3 and int(broken.arrays()["chosen_ranks"].sum()) == 2
    zero = OutputSums(3, 3, torch.device("cpu"))
    zero.add(torch.zeros(3, 2, 5), chosen[:2], None)
    assert (zero.arrays()["cosine"] == 0).all() and "rank_counts" not in zero.arrays()


def test_of_a_layer_whose_scores_follow_norms():
    """summarize says so: the correlation is 1 and every chosen expert has a large norm."""
    size = torch.tensor([1.0, 2, 3, 4])
    y = size[:, None, None] * torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(8)).sign()
    sums = OutputSums(4, 4, torch.device("cpu"))
    sums.add(y, torch.tensor([[3, 2]] * 50), size.repeat(50, 1))
    found = summarize(LayerArrays(4, list("abcd"), sums.arrays()))
    assert found["correlation"] == found["top"] == found["chosen"] == 1 and found["by_chance"] == 0.5


@pytest.mark.parametrize("block", [MixtralBlock, DeepseekBlock])
def test_remote_code_as_the_stacked_experts(block):
    stacked = random_model("qwen3_moe")
    for layer in stacked.model.layers:
        layer.mlp.gate.norm_topk_prob = True
        inner = layer.mlp.forward
        layer.mlp.forward = lambda x, inner=inner: inner(x) + 0.1 * x
    listed = as_remote_code(stacked, block, "w")
    same_arrays(*(analyze_outputs(model, windows_of(random_ids())) for model in (stacked, listed)))


def test_quantized_experts_as_what_they_stand_for():
    plain, stored = twins("fp8")
    given = windows_of(random_ids()), [text_of(random_ids()[0])]
    for backend in (None, "triton"):
        same_arrays(*(analyze_outputs(m, given[0], texts=given[1], backend=backend) for m in (plain, stored)))
    same_arrays(*(analyze_routing(m, given[0], texts=given[1]) for m in (plain, stored)))
    for ours, bank in zip(find_banks(stored), find_banks(plain), strict=True):
        for name, matrix in expert_matrices(plain, bank).items():
            close(expert_matrices(stored, ours)[name].float().cpu(), matrix.float().cpu().numpy(), 1e-2)


@pytest.mark.parametrize("kind", [packed, in_fp8])
def test_quantized_experts_in_a_list(kind):
    """They run by themselves: only the states ask for weights, and are left out where these cannot be read."""
    plain, stored = listed_twins(kind)
    plain, stored = (analyze_outputs(m, windows_of(random_ids()), texts=[text_of(random_ids()[0])])
                     for m in (plain, stored))  # fmt: skip
    same_arrays(stored, plain)
    for bank, layer in stored.layers.items():
        missing = {"text.states"} if kind is packed else set()
        assert plain.layers[bank].arrays.keys() - layer.arrays.keys() == missing
        noted = [note for note in stored.notes if f"{bank}: intermediate states" in note]
        assert len(noted) == len(missing) and all("PackedLinear: weights in this form" in note for note in noted)
    assert pictures_of(stored, {}, page=False)


def same_arrays(one: Analysis, other: Analysis) -> None:
    assert one.layers.keys() == other.layers.keys()
    for bank, layer in one.layers.items():
        assert layer.members == other.layers[bank].members
        for name, array in layer.arrays.items():
            found = other.layers[bank].arrays[name]
            if array.is_floating_point():
                torch.testing.assert_close(found, array, rtol=1e-3, atol=1e-4, equal_nan=True)
            else:
                assert (found != array).float().mean() < 0.05, f"{bank} {name}"  # ranks flip between near equals


def test_refused_and_file(tiny, tmp_path):
    model, tokenizer, domains = tiny
    with pytest.raises(SedetectError, match="layers 12: has no routed experts"):
        analyze_outputs(model, domains, layers=[12])
    with pytest.raises(SedetectError, match="texts '': gives no token"):
        read_texts(tokenizer, [""])
    assert not any(is_attached(bank) for bank in find_banks(model))
    for analyze in (analyze_outputs, analyze_routing):
        with pytest.raises(SedetectError, match="is in training mode"):
            analyze(random_model("qwen3_moe").train(), domains)
    result = analyze_outputs(model, domains, layers=[0])
    again = Analysis.load(result.save(tmp_path), "outputs")
    bank = BankId("decoder", 0, "routed")
    assert again.settings == result.settings and again.layers[bank].arrays.keys() == result.layers[bank].arrays.keys()


def test_restored_after_an_error():
    model = random_model("qwen2_moe")
    before = snapshot(model)
    hook = model.model.layers[2].register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        analyze_outputs(model, windows_of(random_ids()))
    hook.remove()
    assert snapshot(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
