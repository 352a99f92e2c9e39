"""analyze weights: every array against numpy loops over the tensors of the checkpoint."""

import shutil
from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from support.analysis_loops import BLOCKS, components, cosine, lower, read, read_experts, standardized, table
from support.conformance import available
from support.families import FAMILIES, tiny_model
from support.models import TINY
from transformers import MistralConfig, MistralForCausalLM

from sedetect.analysis.common import Analysis, parse_layers
from sedetect.analysis.matrices import expert_matrices, gate_states
from sedetect.analysis.weights import (
    analyze_group,
    analyze_weights,
    kept_neurons,
    match_neurons,
    project_matrices,
    project_neurons,
    regress,
    standings,
    stray,
)
from sedetect.checkpoints.options import Loading
from sedetect.errors import SedetectError
from sedetect.models.banks import find_banks
from sedetect.models.routers import find_router
from sedetect.stats.place import BankId

FAMILIES_HERE = [name for name in BLOCKS if name != "qwen3_moe"]
TOLERANCE = 2e-6  # of cosines, which float32 products give


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a family's tiny model."""
    root = tmp_path_factory.mktemp("families")

    def make(name):
        if not (root / name).exists():
            tiny_model(name, FAMILIES[name]).save_pretrained(root / name, max_shard_size="100KB")
        return root / name

    return make


@pytest.fixture(scope="module")
def tiny():
    return analyze_weights(TINY, pairs=3)


def close(mine, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(mine, dtype=np.float64), expected, rtol=1e-5, atol=tolerance, equal_nan=True)


def close_up_to_sign(mine, expected, tolerance=1e-4):
    """Components of the same spread, each of either sign; in units of the largest score."""
    mine, scale = np.asarray(mine, dtype=np.float64), np.abs(expected).max()
    for column in range(expected.shape[1]):
        a, b = mine[:, column], expected[:, column]
        assert min(np.abs(a - b).max(), np.abs(a + b).max()) <= tolerance * scale, f"component {column}"


def check_layer(family, tensors, result, bank):
    found, layer = result.layers[bank].arrays, result.layers[bank]
    routed, shared, router = read_experts(family, tensors, bank.layer)
    experts = len(router)
    assert layer.members == [f"L{bank.layer}E{e}" for e in range(experts)] + (
        [f"L{bank.layer}shared"] if shared is not None else []
    )
    close(found["router.similarity"], table(list(router), cosine))
    for name, matrices in routed.items():
        every = matrices + ([] if shared is None else [shared[name]])
        means = [matrix.mean(0) for matrix in every]
        close(found[f"{name}.similarity"], table(every, cosine))
        close(found[f"{name}.neuron_similarity"], table(means, cosine))
        close(found[f"{name}.norm"], [np.sqrt((m**2).sum()) for m in every])
        close(found[f"{name}.peak"], [np.abs(m).max() for m in every])
        x, y = lower(table(means[:experts], cosine)), lower(table(list(router), cosine))
        close(found[f"{name}.r2"], [np.corrcoef(x, y)[0, 1] ** 2], 1e-5)

        whole = [m for m in every if m.shape == every[0].shape]
        scores, shares = components(standardized(np.stack([m.ravel() for m in whole])), 3)
        close_up_to_sign(found[f"{name}.scores"][: len(whole), :2], scores[:, :2])
        close(found[f"{name}.explained"], shares, 1e-5)
        assert found[f"{name}.scores"][len(whole) :].isnan().all()

        wide = [m for m in every if m.shape[1] == every[0].shape[1]]
        scores, shares = components(standardized(np.concatenate(wide)), 2)
        starts = np.cumsum([0, *(len(m) for m in wide)])
        mine = found[f"{name}.neuron_scores"]
        kept = [kept_neurons(len(m)).numpy() for m in wide]
        close_up_to_sign(
            np.concatenate([mine[i, : len(k), :2] for i, k in enumerate(kept)]),
            np.concatenate([scores[start + k] for start, k in zip(starts, kept)]),
        )
        close(found[f"{name}.neuron_explained"][:2], shares, 1e-5)

        for (i, j), matched, unmatched, tau in zip(
            found["pairs"].tolist(), *(found[f"{name}.{array}"] for array in ("matched", "unmatched", "tau"))
        ):
            check_matching(every[i], every[j], float(matched), float(unmatched), float(tau))


def test_a_matrix_that_an_expert_does_not_have():
    """A dense MLP without a gate beside experts with one: nothing is known of its gate, which is none of zeros."""
    routed = {name: torch.randn(3, 8, 4) for name in ("gate", "up", "down")}
    dense = {name: torch.randn(1, 8, 4) for name in ("up", "down")}
    found = analyze_group([routed, dense], None, [])
    for name in routed:
        known = torch.tensor([True] * 3 + [name in dense])
        for what in ("norm", "peak"):
            assert torch.equal(found[f"{name}.{what}"].isfinite(), known), (name, what)
    close(found["up.norm"][3], dense["up"].norm())


def check_matching(a, b, matched, unmatched, tau):
    """The assignment is not told here: that it is the best is tested by trying all; its numbers are, from the order."""
    one = match_neurons(torch.from_numpy(a), torch.from_numpy(b))
    assert sorted(one.order.tolist()) == list(range(len(a)))
    units = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in (a, b)]
    assert (units[0] * units[1][one.order]).sum() >= (units[0] * units[1]).sum()
    assert matched == pytest.approx(cosine(a, b[one.order]), abs=TOLERANCE)
    assert unmatched == pytest.approx(cosine(a, b), abs=TOLERANCE)
    ranks = [np.sign(one.order[j] - one.order[i]) for i in range(len(a)) for j in range(i + 1, len(a))]
    assert tau == pytest.approx(sum(ranks) / len(ranks), abs=1e-6)


def test_tiny_moe(tiny):
    tensors = read(TINY)
    assert list(tiny.layers) == [BankId("decoder", layer, "routed") for layer in range(10)]
    for layer in (0, 1, 9):
        check_layer("qwen3_moe", tensors, tiny, BankId("decoder", layer, "routed"))
    assert (tiny.model, tiny.dtype, tiny.notes) == ("tiny-moe", "bfloat16", [])


def test_the_largest_weight_of_down_tells_the_two_outlier_experts(tiny):
    """What docs/look-inside.md says: far above their layers in it, and in no norm."""
    ratios = {}
    for layer in tiny.layers.values():
        for expert, name in enumerate(layer.members):
            found = standings(layer, expert)
            ratios[name] = found["largest of down"].value / found["largest of down"].median
            assert all(found[f"|{m}|"].value < 1.5 * found[f"|{m}|"].median for m in ("gate", "up", "down"))
    first, second, third = sorted(ratios, key=ratios.get, reverse=True)[:3]
    assert (first, second) == ("L1E28", "L9E7")
    assert ratios[first] == pytest.approx(3.63, abs=0.02) and ratios[second] == pytest.approx(3.19, abs=0.02)
    assert ratios[third] < 2


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_layouts(checkpoint, family):
    folder = checkpoint(family)
    result = analyze_weights(folder, pairs=4)
    tensors = read(folder)
    banks = [bank.id for bank in find_banks(tiny_model(family, FAMILIES[family])) if bank.id.kind == "routed"]
    assert list(result.layers) == banks
    for bank in banks:
        check_layer(family, tensors, result, bank)
    told = [note.partition(":")[0] for note in result.notes]
    assert told == {"qwen2_moe": ["shared"], "nemotron_h": ["shared"]}.get(family, [])


@pytest.mark.parametrize("family", ["switch_transformers", "ernie4_5_vl_moe", "llama4", "gemma4", "longcat_flash"])
def test_stacks_and_blocks_that_are_not_run_layer_by_layer(checkpoint, family):
    """Encoders, two sets of experts in a layer, key-value states shared by layers: weights are read all the same."""
    model = tiny_model(family, FAMILIES[family])
    result = analyze_weights(checkpoint(family), pairs=1)
    banks = find_banks(model)
    assert list(result.layers) == [bank.id for bank in banks if bank.id.routed]
    for bank in banks:
        if bank.id in result.layers:
            mine = result.layers[bank.id].arrays
            for name, matrices in expert_matrices(model, bank).items():
                close(mine[f"{name}.norm"][: bank.experts], matrices.double().flatten(1).norm(dim=1).numpy(), 1e-5)
            assert mine["router.similarity"].shape == (bank.experts, bank.experts)


@pytest.mark.parametrize("family", [name for name in available() if FAMILIES[name].refused is None])
def test_matrices_of_every_architecture(family):
    """gate, up and down are what the module itself multiplies by: its outputs come out of them."""
    model = tiny_model(family, FAMILIES[family])
    for bank in find_banks(model):
        found = expert_matrices(model, bank)
        assert {m.shape for m in found.values()} == {(bank.experts, bank.intermediate, bank.hidden)}
        if not bank.id.routed:
            continue
        router = find_router(model, bank)
        assert router is not None and len(router.weight) >= bank.experts
        module, x = bank.module, torch.randn(2, bank.hidden)
        states = gate_states(bank, x)
        with torch.no_grad():
            for expert in (0, bank.experts - 1):
                up = "gate_up_proj" if module.has_gate else "up_proj"
                bias = getattr(module, f"{up}_bias")[expert] if module.has_bias else 0
                stored = getattr(module, up)[expert]
                z = x @ (stored if module.is_transposed else stored.T) + bias
                if not module.has_gate:
                    own = x @ found["up"][expert].T
                    torch.testing.assert_close(states[expert], module.act_fn(own + bias), rtol=1e-4, atol=1e-5)
                    continue
                # which columns of z are the gate's: those in which the output is not affine
                half = torch.cat([x @ found[name][expert].T for name in ("gate", "up")], dim=1)
                halves = half + (split_bias(module, bias) if module.has_bias else 0)
                joined = join(module, halves)
                torch.testing.assert_close(joined, z, rtol=1e-4, atol=1e-5)
                check_gate(module, halves, states[expert], bank.intermediate)


def join(module, halves):
    """(T, 2I) as the module has it, from its gate half and its up half."""
    gate, up = halves.chunk(2, dim=1)
    if getattr(module, "is_concatenated", True):
        return halves
    return torch.stack((gate, up), dim=2).flatten(1)


def split_bias(module, bias):
    return bias if getattr(module, "is_concatenated", True) else torch.cat((bias[::2], bias[1::2]))


def check_gate(module, halves, states, neurons):
    """The up half acts by a factor: output(up + step) - output(up) = step * act(gate) while no clamp is met."""
    gate, up = halves.chunk(2, dim=1)
    small = torch.full_like(up, 1 / 8)
    of = [module._apply_gate(join(module, torch.cat((gate, u), dim=1))) for u in (small, -small)]
    torch.testing.assert_close((of[0] - of[1]) * 4, states, rtol=1e-3, atol=1e-4)
    # and the gate half does not
    of = [module._apply_gate(join(module, torch.cat((g, small), dim=1))) for g in (gate, -gate)]
    assert not torch.allclose(of[0], -of[1], rtol=1e-2)


def test_against_a_dense_model(checkpoint, tmp_path):
    config = MistralConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96,
    )  # fmt: skip
    dense = MistralForCausalLM(config)
    dense.save_pretrained(tmp_path / "dense")
    result = analyze_weights(checkpoint("mixtral"), against=tmp_path / "dense", pairs=2)
    tensors = read(checkpoint("mixtral"))
    for layer in (0, 1):
        found = result.layers[BankId("decoder", layer, "routed")]
        assert found.members[-1] == "F" and len(found.members) == 9
        matrices, _, _ = read_experts("mixtral", tensors, layer)
        mlp = dense.model.layers[layer].mlp
        own = {"gate": mlp.gate_proj.weight, "up": mlp.up_proj.weight, "down": mlp.down_proj.weight.T}
        for name, other in own.items():
            every = matrices[name] + [other.detach().double().numpy()]
            close(found.arrays[f"{name}.similarity"], table(every, cosine))
            close(found.arrays[f"{name}.neuron_similarity"], table([m.mean(0) for m in every], cosine))
    assert "F" not in result.layers[BankId("decoder", 2, "routed")].members
    assert "decoder.2.routed: dense has no MLP in a layer of this number, so F takes no part" in result.notes
    config.hidden_size = 64
    MistralForCausalLM(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(SedetectError, match="against wide: .* writes 64 channels, the experts of .* 32"):
        analyze_weights(checkpoint("mixtral"), against=tmp_path / "wide")


def test_a_layer_at_a_time(checkpoint, monkeypatch):
    """Nothing but the layer under way has weights, and no forward is run."""
    from sedetect.models.streamed import StreamedModel

    held, own = [], StreamedModel.load

    def load(self, layer):
        assert all(p.is_meta for p in self.model.parameters())
        held.append(self)
        return own(self, layer)

    def forward(*args, **kwargs):
        raise AssertionError("a forward")

    monkeypatch.setattr(StreamedModel, "load", load)
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    seen = []
    result = analyze_weights(checkpoint("deepseek_v3"), layers=[2], pairs=0, progress=lambda *step: seen.append(step))
    assert list(result.layers) == [BankId("decoder", 2, "routed")] and len(held) == 1
    assert seen[0] == ("model.layers.2: reading", 0, 1)
    assert all(p.is_meta for p in held[0].model.parameters())
    with pytest.raises(SedetectError, match="layers 0: has no routed experts; choose of 1, 2"):
        analyze_weights(checkpoint("deepseek_v3"), layers=[0])


def test_matching_is_the_best_of_all_orders():
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        a, b = (torch.randn(5, 7, generator=generator) for _ in range(2))
        units = [m / m.norm(dim=1, keepdim=True) for m in (a, b)]
        best = max(float((units[0] * units[1][list(order)]).sum()) for order in permutations(range(5)))
        one = match_neurons(a, b)
        assert float((units[0] * units[1][one.order]).sum()) == pytest.approx(best, rel=1e-6)
    order = torch.randperm(40, generator=generator)
    a = torch.randn(40, 64, generator=generator)
    found = match_neurons(a, a[order])
    assert found.similarity == pytest.approx(1) and order[found.order].tolist() == list(range(40))


def test_projections_are_sklearns():
    generator = torch.Generator().manual_seed(4)
    matrices = torch.randn(9, 6, 5, generator=generator) * torch.arange(1, 10)[:, None, None]
    rows = standardized(matrices.flatten(1).double().numpy())
    pca = PCA(3, svd_solver="full")
    found = project_matrices([matrices[:4], matrices[4:]])
    close_up_to_sign(found.scores, pca.fit_transform(rows))
    close(found.explained, pca.explained_variance_ratio_, 1e-5)
    neurons = standardized(matrices.flatten(0, 1).double().numpy())
    found = project_neurons([matrices], keep=6)
    close_up_to_sign(found.scores.flatten(0, 1), pca.fit_transform(neurons))
    close(found.explained, pca.explained_variance_ratio_, 1e-5)
    matrices[:, 0, 0] = 3.0  # no spread: left out, not a division by zero
    assert project_matrices([matrices]).scores.isfinite().all()
    assert project_neurons([matrices]).scores.nan_to_num(nan=0).isfinite().all()


def test_experts_far_from_all_others_are_stray():
    scores = torch.randn(40, 3, generator=torch.Generator().manual_seed(5))
    scores[7] = torch.tensor([60.0, 0, 0])
    assert stray(scores).nonzero().flatten().tolist() == [7]
    assert stray(scores * 1000).nonzero().flatten().tolist() == [7]
    assert not stray(scores[:4]).any()
    assert not stray(torch.zeros(8, 3)).any()


def test_regression():
    x = torch.linspace(-1, 1, 20)
    line = regress(x, 3 * x + 2)
    assert (line.r2, line.slope, line.intercept) == pytest.approx((1, 3, 2))
    assert np.isnan(regress(x[:1], x[:1]).r2) and np.isnan(regress(torch.ones(5), x[:5]).r2)


def test_the_file(tiny, tmp_path):
    path = tiny.save(tmp_path)
    again = Analysis.load(path, "weights")
    assert (again.model, again.digest, again.settings) == (tiny.model, tiny.digest, tiny.settings)
    for bank, layer in tiny.layers.items():
        assert again.layers[bank].members == layer.members
        assert again.layers[bank].arrays.keys() == layer.arrays.keys()
        for name, array in layer.arrays.items():
            assert torch.equal(again.layers[bank].arrays[name].nan_to_num(), array.nan_to_num())
    with pytest.raises(SedetectError, match="is sedetect-weights version 1, not sedetect-outputs"):
        Analysis.load(path, "outputs")
    shutil.copy(TINY / "config.json", path)
    with pytest.raises(SedetectError, match="weights-analysis.safetensors: cannot be read"):
        Analysis.load(path, "weights")


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_not_finite(tmp_path, value):
    model = tiny_model("qwen3_moe", FAMILIES["qwen3_moe"])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(SedetectError, match=r"layers\.1: down of L1E3 holds NaN or Inf.*\(layers\)"):
        analyze_weights(tmp_path, pairs=0, loading=Loading(device="cpu"))
    assert len(analyze_weights(tmp_path, pairs=0, loading=Loading(device="cpu"), layers=[0, 2]).layers) == 2


def test_layers_option():
    assert parse_layers(None) is None and parse_layers("3, 0,5-7") == [0, 3, 5, 6, 7]
    for text in ("", "a", "3-1", "1-", "-2"):
        with pytest.raises(SedetectError, match="layers .*is not a layer"):
            parse_layers(text)
