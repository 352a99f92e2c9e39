"""Pruned checkpoints: what they compute is what the original computes with those experts removed from its router."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import put_model, put_tokenizer
from support.command import refused, run
from support.conformance import available
from support.families import FAMILIES, tiny_model
from support.models import CONFIGS, TINY, random_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import sedetect
from sedetect import BankId, ModelStats
from sedetect.compression import pruning
from sedetect.compression.pruning import Pruning, choose_kept, prune_checkpoint
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.models.banks import find_banks
from sedetect.ranking.saliencies import SALIENCIES, saliency
from sedetect.stats.place import Place


@pytest.fixture(scope="module")
def stats_file(tiny_stats, tmp_path_factory):
    file = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    tiny_stats.save(file)
    return file


def text_ids(count=60):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return torch.tensor(
        [tokenizer("The quick brown fox jumps over the lazy dog, said Alice. " * 8)["input_ids"][:count]]
    )


def removed(kept, sizes):
    return [Place(*bank, e) for bank, mine in kept.items() for e in range(sizes) if e not in mine]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "ratio, by, protect", [(0.125, "reap", True), (0.5, "frequency", True), (0.25, "frequency", False)]
)
def test_the_pruned_checkpoint_computes_what_is_left(tiny_stats, tmp_path, ratio, by, protect):
    """tiny-moe in float32: logits of the pruned checkpoint equal those of the original without the same experts."""
    kept = choose_kept(tiny_stats, by, ratio, [Place("decoder", 1, "routed", 28)] if protect else [])
    assert (28 in kept[BankId("decoder", 1, "routed")]) == protect
    assert {len(mine) for mine in kept.values()} == {round(32 * (1 - ratio))}
    prune_checkpoint(TINY, tmp_path / "out", kept)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert pruned.config.num_local_experts == round(32 * (1 - ratio))
    original = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    ids = text_ids()
    with ablate(original, removed(kept, 32), how="remove"):
        expected = logits(original, ids)
    torch.testing.assert_close(logits(pruned, ids), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(original, ids)).abs().max() > 0.1, "the experts removed mattered"


_SMALL = CONFIGS["qwen3_moe"]().to_dict() | {
    "num_local_experts": 8,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
}
BIASED = ("deepseek_v3", "gpt_oss", "minimax_m2", "lfm2_moe", "afmoe", "ernie4_5_moe")
# Router tensors of every name that the layout knows, in addition to the models that all tests share.
OTHERS = {
    "mixtral": {},
    "granitemoe": {},
    "minimax_m2": {},
    "jamba": {"num_experts": 8, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
              "expert_layer_offset": 0, "use_mamba_kernels": False},
    "lfm2_moe": {"num_experts": 8, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
    "afmoe": {"num_experts": 8, "num_dense_layers": 1, "sliding_window": 64},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
}  # fmt: skip


def family(name, folder):
    """A small random checkpoint of a family as save_pretrained writes it, and its statistics."""
    if name in CONFIGS:
        model = random_model(name)
    else:
        settings = {key: value for key, value in _SMALL.items() if key not in ("model_type", "layer_types")}
        torch.manual_seed(0)
        config = CONFIG_MAPPING[name](**settings | OTHERS[name])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in OTHERS or "bias" in key:
                tensor.copy_(torch.randn_like(tensor) * (0.3 if tensor.dim() > 1 or "bias" in key else 1.0))
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with sedetect.profile(model) as prof:
        model(input_ids=torch.randint(3, 96, (4, 30), generator=torch.Generator().manual_seed(0)))
    return model, prof.stats


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_every_layout(name, tmp_path):
    """Experts one by one and together, router biases, groups, shared experts, dense layers."""
    model, stats = family(name, tmp_path / "source")
    groups = 2 if name == "deepseek_v3" else 1
    kept = choose_kept(stats, "reap", 0.34 if name == "qwen2_moe" else 0.25, groups=groups)
    prune_checkpoint(tmp_path / "source", tmp_path / "out", kept)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    with ablate(model, removed(kept, 6 if name == "qwen2_moe" else 8), how="remove"):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(pruned, ids), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(model, ids)).abs().max() > 0.1
    if groups == 2:
        for mine in kept.values():
            assert sum(e < 4 for e in mine) == sum(e >= 4 for e in mine) == 3
    source, written = (load_file(tmp_path / part / "model.safetensors") for part in ("source", "out"))
    biases = [key for key in source if "bias" in key and ".experts." not in key and source[key].shape[-1] == 8]
    assert bool(biases) == (name in BIASED) and all(source[key].any() for key in biases)
    for key in biases:
        layer = int(key.split("layers.")[1].split(".")[0])
        assert torch.equal(written[key], source[key][..., kept[BankId("decoder", layer, "routed")]])


# Their layouts are refused by name.
REFUSED = {
    "bailing_hybrid", "dbrx", "deepseek_v4", "diffusion_gemma", "doge", "dots3_note", "ernie4_5_vl_moe", "gemma4",
    "inkling", "jetmoe", "kimi_linear", "longcat_flash", "mistral_large4", "muse_spark", "nemotron_h", "nllb_moe",
    "qwen3_omni_moe:talker", "step3p7", "switch_transformers", "zaya",
}  # fmt: skip


@pytest.mark.parametrize("name", available())
def test_every_family_loads_or_is_refused(name, tmp_path):
    """Every tensor of the pruned checkpoint has its place and its shape in the model that transformers builds."""
    model = tiny_model(name, FAMILIES[name])
    model.save_pretrained(tmp_path / "source")
    try:
        banks = [bank for bank in find_banks(model) if (bank.id.stack, bank.id.kind) == ("decoder", "routed")]
        prune_checkpoint(tmp_path / "source", tmp_path / "out", {bank.id: [1, 2, 4, 5, 6, 7] for bank in banks})
    except SedetectError:
        assert name in REFUSED and os.listdir(tmp_path) == ["source"]
        return
    assert name not in REFUSED
    pruned, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    sizes = {bank.experts for bank in find_banks(pruned) if bank.id.stack == "decoder" and bank.id.kind == "routed"}
    assert sizes == {6}


def test_predictor_heads_are_left_out(tmp_path):
    """DeepSeek-V3: the extra layer of a published checkpoint, which predicts further tokens, and its neighbours."""
    _, stats = family("deepseek_v3", tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    names = {layer: f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}
    for name in names.values():
        tensors[name] = torch.rand(8)
    extra = {name.replace(".2.", ".3."): t.clone() for name, t in tensors.items() if ".layers.2.mlp." in name}
    tower = {"vision_tower.layers.9.mlp.gate_proj.weight": torch.rand(8, 4)}  # more layers than the decoder
    save_file(tensors | extra | tower, file, {"format": "pt"})
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    kept = choose_kept(stats, "reap", 0.5, groups=2)
    (note,) = prune_checkpoint(tmp_path / "source", tmp_path / "out", kept)
    assert note.startswith(f"{len(extra)} tensors of heads that predict further tokens left out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for layer, name in names.items():
        assert torch.equal(written[name], tensors[name][kept[BankId("decoder", layer, "routed")]])
    assert not any(".layers.3." in name for name in written)
    (name,) = tower
    assert torch.equal(written[name], tower[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_routed_experts"], config["num_nextn_predict_layers"]) == (4, 0)


def test_files_are_split_and_every_tensor_is_the_right_one(tiny_stats, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "MAX_FILE", "5MB")
    kept = choose_kept(tiny_stats, "man", 0.25)
    steps = []
    prune_checkpoint(TINY, tmp_path / "out", kept, facts={"by": "man"}, progress=lambda *step: steps.append(step))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 6 and steps[-1] == (index["metadata"]["total_size"],) * 2
    source = {}
    for file in TINY.glob("*.safetensors"):
        source |= load_file(file)
    written = {}
    for file in files:
        assert (tmp_path / "out" / file).stat().st_size < 5.1e6
        written |= load_file(tmp_path / "out" / file)
    assert written.keys() == index["weight_map"].keys()
    for name, tensor in written.items():
        parts = name.split(".")
        if ".experts." in name:
            old = kept[BankId("decoder", int(parts[2]), "routed")][int(parts[5])]
            assert torch.equal(tensor, source[".".join([*parts[:5], str(old), *parts[6:]])])
        elif name.endswith("mlp.gate.weight"):
            assert torch.equal(tensor, source[name][kept[BankId("decoder", int(parts[2]), "routed")]])
        else:
            assert torch.equal(tensor, source[name])
    assert len(written) == len(source) - 10 * 8 * 3
    assert {f.name for f in (tmp_path / "out").iterdir()} - set(files) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "pruning.json",
        "model.safetensors.index.json",
    }  # fmt: skip
    document = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert (document["format"], document["version"], document["by"]) == ("sedetect-pruning", "1", "man")
    assert document["kept"] == {str(bank): mine for bank, mine in kept.items()}
    with safe_open(tmp_path / "out" / files[0], "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_choosing(tiny_stats):
    """The kept are those of highest saliency; a protected expert takes the place of the lowest kept one."""
    bank = BankId("decoder", 1, "routed")
    values = saliency(tiny_stats, "frequency")[bank].tolist()
    order = sorted(range(32), key=lambda e: (values[e], e))
    assert order.index(28) < 8, "pruned by frequency at 25 %"
    assert choose_kept(tiny_stats, "frequency", 0.25)[bank] == sorted(order[8:])
    protected = choose_kept(tiny_stats, "frequency", 0.25, [Place("decoder", 1, "routed", 28)])[bank]
    assert protected == sorted([28, *order[9:]]), "the next expert goes in its place"
    assert len(choose_kept(tiny_stats, "reap", 0.29)[bank]) == 32 - 9
    assert len(choose_kept(tiny_stats, "reap", 0.9)[bank]) == 4, "top_k of them are enough"
    for by in SALIENCIES:
        assert 28 in choose_kept(tiny_stats, by, 0.5, [Place("decoder", 1, "routed", 28)])[bank]


@pytest.mark.parametrize(
    "ratio, options, said",
    [
        (0, {}, "ratio 0: must be above 0 and below 1"),
        (1, {}, "ratio 1: must be"),
        (0.01, {}, "ratio 0.01: prunes none of 32 experts; give at least 0.03125"),
        (0.95, {}, "ratio 0.95: leaves 2 of 32 experts, and every token takes 4; give at most 0.875"),
        (0.1, {"groups": 4}, "prunes 3 of 32 experts, which does not divide by the 4 groups .* give 0 or 0.125"),
        (0.5, {"protected": [Place("decoder", 1, "routed", e) for e in range(20)]}, "20 of 32 experts are protected"),
    ],
)
def test_choosing_refuses(tiny_stats, ratio, options, said):
    with pytest.raises(SedetectError, match=said):
        choose_kept(tiny_stats, "reap", ratio, **options)


def test_a_model_that_takes_all_of_its_experts(tmp_path):
    model = put_model(tmp_path / "model", num_experts_per_tok=8)
    said = refused(run("prune", model, "-o", tmp_path / "out"))
    assert "every token takes all 8 experts, so that none can go" in said


def copy_of(folder, edit=lambda tensors, config: None):
    """A small checkpoint with its config and tensors edited."""
    model = random_model("qwen3_moe")
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    edit(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _unknown_tensor(tensors, config):
    tensors["model.layers.1.mlp.gate.tid2eid"] = torch.zeros(96, 2)


def _odd_shape(tensors, config):
    tensors["model.layers.1.mlp.gate.weight"] = torch.zeros(7, 32)


def _other_layout(tensors, config):
    tensors["model.layers.1.mlp.text_moe.experts.0.down_proj.weight"] = torch.zeros(2, 2)


def _second_set(tensors, config):
    tensors["talker.layers.1.mlp.experts.0.down_proj.weight"] = torch.zeros(2, 2)


def _no_number(tensors, config):
    config["num_local_experts"] = 9


def _numbered(tensors, config):
    config["quantization_config"] = {"ignore": ["model.layers.0.mlp.experts.3.down_proj"]}


@pytest.mark.parametrize(
    "edit, said",
    [
        (_unknown_tensor, "model.layers.1.mlp.gate.tid2eid: its part in the MoE block is not known"),
        (_odd_shape, r"mlp.gate.weight: shape \(7, 32\) where dimension 0 should count the 8 experts of layer 1"),
        (_other_layout, "text_moe.experts.0.down_proj.weight: this layout of experts is not known"),
        (_second_set, "talker.layers.1.mlp.experts.0.down_proj.weight: a second set of experts in layer 1"),
        (_no_number, "8 experts in the weights, but none of num_experts, .* says so"),
        (_numbered, r"names an expert by number \(model.layers.0.mlp.experts.3.down_proj\)"),
    ],
)
def test_refusals_name_the_tensor_and_leave_nothing(tmp_path, edit, said):
    source = copy_of(tmp_path / "source", edit)
    with pytest.raises(SedetectError, match=said):
        prune_checkpoint(
            source, tmp_path / "out", {BankId("decoder", layer, "routed"): [0, 1, 2] for layer in range(3)}
        )
    assert os.listdir(tmp_path) == ["source"]


def test_an_error_while_writing_leaves_nothing(tiny_stats, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pruning, "save_file", full)
    with pytest.raises(SedetectError, match="out: cannot be written .No space left on device"):
        prune_checkpoint(TINY, tmp_path / "out", choose_kept(tiny_stats, "reap", 0.25))
    assert os.listdir(tmp_path) == []
    with pytest.raises(SedetectError, match="layer 9 has experts in the checkpoint alone"):
        kept = {bank: mine for bank, mine in choose_kept(tiny_stats, "reap", 0.25).items() if bank.layer != 9}
        prune_checkpoint(TINY, tmp_path / "out", kept)


def test_command(stats_file, tmp_path):
    options = ("--ratio", 0.25, "--by", "frequency", "--stats", stats_file)
    code, out, err = run("prune", TINY, *options, "-o", tmp_path / "safe")
    assert code == 0 and err == ""
    assert "24 of 32 experts in each of 10 layers, by frequency" in out
    assert "protected: L1E28 (candidate), L9E7 (candidate); frequency alone would prune L1E28" in out
    code, out, _ = run("prune", TINY, *options, "--protect", "none", "-o", tmp_path / "damaged")
    assert code == 0 and "not protected: L1E28 (candidate), L9E7 (candidate); pruned of them: L1E28" in out
    kept = [json.loads((tmp_path / name / "pruning.json").read_text()) for name in ("safe", "damaged")]
    assert [28 in document["kept"]["decoder.1.routed"] for document in kept] == [True, False]
    assert [document["protected"] for document in kept] == [True, False]
    result = sedetect.profile_model(tmp_path / "safe", text=sedetect.Text(tokens=1024, seq_len=128))
    (expert,) = sedetect.rank(result.stats).super_experts
    assert (expert.layer, expert.verdict) == (1, "candidate")
    assert kept[0]["kept"]["decoder.1.routed"][expert.expert] == 28, "it is still there, under its new number"
    assert "exists already" in refused(run("prune", TINY, *options, "-o", tmp_path / "safe"))


def test_pruned_experts_without_rows_are_named(stats_file, tmp_path):
    """Their saliency of 0 is no measurement; those that are kept are not told of."""
    stats = ModelStats.load(stats_file)
    for layer, expert in ((3, 5), (7, 0), (1, 28)):  # the last is protected below
        stats.banks[BankId("decoder", layer, "routed")].counts[expert] = 0
    stats.save(tmp_path / "stats.safetensors")
    options = ("--stats", tmp_path / "stats.safetensors", "--by", "frequency")
    code, out, _ = run("prune", TINY, *options, "-o", tmp_path / "out")
    assert code == 0 and "note: 2 pruned experts saw no row, so that nothing was measured (L3E5, L7E0); profile" in out
    assert Pruning.load(tmp_path / "out").facts["unseen"] == ["L3E5", "L7E0"]
    code, out, _ = run("prune", TINY, "--stats", stats_file, "-o", tmp_path / "seen")
    assert code == 0 and "saw no row" not in out and Pruning.load(tmp_path / "seen").facts["unseen"] == []


def test_command_profiles_first(tmp_path):
    code, out, _ = run("prune", TINY, "--tokens", 1024, "--seq-len", 128, "-o", tmp_path / "out")
    assert code == 0 and "24 of 32 experts in each of 10 layers, by reap" in out
    assert "protected: L1E28 (candidate), L9E7 (candidate); reap alone would prune none of them" in out
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["tokens"] == 1024


def test_command_refuses(stats_file, tmp_path):
    out = tmp_path / "out"
    assert "'best' is not one of 'frequency'" in refused(run("prune", TINY, "--by", "best", "-o", out))
    assert "'all' is not one of 'candidates', 'none'" in refused(run("prune", TINY, "--protect", "all", "-o", out))
    assert "leaves 3 of 32 experts" in refused(run("prune", TINY, "--ratio", 0.92, "-o", out))
    assert "no such folder" in refused(run("prune", tmp_path / "nowhere", "-o", out))
    other = put_tokenizer(copy_of(tmp_path / "other"))
    said = refused(run("prune", other, "--stats", stats_file, "-o", out))
    assert "statistics of another model (tiny-moe, " in said and "profile this folder" in said
    assert not out.exists()
    copied = shutil.copytree(TINY, tmp_path / "copied")
    assert run("prune", copied, "--stats", stats_file, "-o", out).code == 0, "the same model at another place"
    assert ModelStats.load(stats_file).header.digest == json.loads((out / "pruning.json").read_text())["digest"]
