"""Pruned checkpoints: what they compute is what the original computes with those experts removed from its router."""

import json
import os
import re
import shutil
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import OTHERS, put_model, put_tokenizer, save_family, save_random, to_fp8, to_mxfp4
from support.command import refused, run
from support.conformance import available
from support.families import FAMILIES, tiny_model
from support.models import CONFIGS, TINY, random_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeForCausalLM

import sedetect
from sedetect import BankId, ModelStats
from sedetect.compression import pruning
from sedetect.compression.merging import Group
from sedetect.compression.pruning import Pruning, choose_kept, prune_checkpoint
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.models.banks import find_banks
from sedetect.models.loading import load_model
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


BIASED = ("deepseek_v3", "gpt_oss", "minimax_m2", "lfm2_moe", "afmoe", "ernie4_5_moe")


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_every_layout(name, tmp_path):
    """Experts one by one and together, router biases, groups, shared experts, dense layers."""
    model, stats = save_family(name, tmp_path / "source")
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


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_quantized_checkpoints_keep_their_bytes(kind, tmp_path):
    """Of experts that stay, with the scales of their blocks; logits are those of the original without the others."""
    config = CONFIGS["qwen3_moe" if kind == "fp8" else "gpt_oss"]()
    config.intermediate_size = 32  # of blocks of 32
    save_random(config, tmp_path / "source", torch.bfloat16)
    (to_fp8 if kind == "fp8" else to_mxfp4)(tmp_path / "source")
    kept = {BankId("decoder", layer, "routed"): [0, 2, 3, 5, 6, 7] for layer in range(config.num_hidden_layers)}
    pruning.check_prunable(tmp_path / "source", 0.25)
    prune_checkpoint(tmp_path / "source", tmp_path / "out", kept)
    source, written = (load_file(tmp_path / part / "model.safetensors") for part in ("source", "out"))
    seen = set()
    for name, tensor in written.items():
        match = re.match(r"(.*\.experts\.)(\d+)(\..*)", name)
        old = f"{match[1]}{kept[BankId('decoder', 0, 'routed')][int(match[2])]}{match[3]}" if match else name
        whole = source[old]
        if whole.shape != tensor.shape:
            whole = whole[kept[BankId("decoder", 0, "routed")]]
        assert tensor.dtype == whole.dtype and torch.equal(tensor.view(torch.uint8), whole.view(torch.uint8)), name
        seen.add(tensor.dtype)
    assert (torch.float8_e4m3fn if kind == "fp8" else torch.uint8) in seen
    models = [load_model(tmp_path / part) for part in ("source", "out")]
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    with ablate(models[0], removed(kept, 8), how="remove"):
        expected = logits(models[0], ids)
    torch.testing.assert_close(logits(models[1], ids), expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(SedetectError, match=f"source: stored as {kind}; quantized experts are not averaged; merge the"):
        groups = {BankId("decoder", 0, "routed"): {0: Group({0: 0.5, 1: 0.5})}}
        prune_checkpoint(tmp_path / "source", tmp_path / "merged", kept, groups=groups)


def test_predictor_heads_are_left_out(tmp_path):
    """DeepSeek-V3: the extra layer of a published checkpoint, which predicts further tokens, and its neighbours."""
    _, stats = save_family("deepseek_v3", tmp_path / "source")
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
    assert note.startswith(f"{len(extra)} tensors of multi-token prediction heads left out")
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


def test_choosing_globally(tiny_stats):
    """A plain loop: the lowest of all experts; protected ones stay, and the last of a layer."""
    safe = [Place("decoder", 1, "routed", 28), Place("decoder", 9, "routed", 7)]
    values = {bank: one.tolist() for bank, one in saliency(tiny_stats, "reap").items()}
    order = sorted((values[bank][e], bank, e) for bank in values for e in range(32))
    before = None
    for ratio, floor in ((0.125, 4), (0.5, 4), (0.85, 4), (0.7, 9)):
        expected = {bank: set(range(32)) for bank in values}
        for _, bank, e in order:
            left = sum(map(len, expected.values())) > 320 - int(320 * ratio)
            if left and len(expected[bank]) > floor and Place(*bank, e) not in safe:
                expected[bank].remove(e)
        kept = choose_kept(tiny_stats, "reap", ratio, safe, budget="global", floor=None if floor == 4 else floor)
        assert kept == {bank: sorted(one) for bank, one in expected.items()}
        assert len(set(map(len, kept.values()))) > 1 and sum(map(len, kept.values())) == 320 - int(320 * ratio)
        assert min(map(len, kept.values())) >= floor
        if before is not None and floor == 4:
            assert all(set(kept[bank]) <= set(before[bank]) for bank in kept), "plans are nested"
        before = kept
    assert 9 in map(len, before.values()), "a floor that is reached"
    frequency = choose_kept(tiny_stats, "frequency", 0.3, budget="global")
    assert 28 not in frequency[BankId("decoder", 1, "routed")]


@pytest.mark.parametrize(
    "ratio, options, said",
    [
        (0.001, {}, "ratio 0.001: prunes none of 320 experts; give at least 0.003125"),
        (0.9, {}, "ratio 0.9: leaves 32 of 320 experts, and all layers keep 40; give at most 0.875"),
        (0.5, {"floor": 20}, "leaves 160 of 320 experts, and all layers keep 200; give at most 0.375"),
        (0.5, {"floor": 3}, "floor 3: must be at least 4, as every token takes so many, and below 32"),
        (0.5, {"floor": 32}, "floor 32: must be at least 4"),
        (0.5, {"groups": 4}, "the router chooses among 4 groups of experts, .* use budget='even'"),
        (0.875, {"protected": [Place("decoder", 1, "routed", e) for e in range(20)]},
         "280 of 320 experts are to go, and 264 can: every layer keeps 4, and the 20 protected ones stay"),
        (0.5, {"budget": "even", "floor": 8}, "floor 8: goes with budget='global' only"),
        (0.5, {"budget": "uneven"}, "budget uneven: is not known; use one of even, global"),
    ],
)  # fmt: skip
def test_choosing_globally_refuses(tiny_stats, ratio, options, said):
    with pytest.raises(SedetectError, match=said):
        choose_kept(tiny_stats, "reap", ratio, **{"budget": "global"} | options)


class UnevenConfig(Qwen3MoeConfig):
    model_type = "uneven_moe"


class UnevenLayer(Qwen3MoeDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config.per_layer_config[layer_idx], layer_idx)


class UnevenModel(Qwen3MoeForCausalLM):
    """A class that reads the number of experts of each layer, as Dots3-Note reads other settings."""

    config_class = UnevenConfig

    def __init__(self, config):
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config)
        layers = [UnevenLayer(config, number) for number in range(config.num_hidden_layers)]
        self.model.layers = torch.nn.ModuleList(layers)


@pytest.fixture
def uneven(monkeypatch):
    monkeypatch.setattr("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer", UnevenLayer)
    AutoConfig.register("uneven_moe", UnevenConfig, exist_ok=True)
    AutoModelForCausalLM.register(UnevenConfig, UnevenModel, exist_ok=True)


def test_layers_of_different_size(uneven, tmp_path):
    """Where a class reads a number per layer, the logits are those of the original without the same experts."""
    config = UnevenConfig(**{k: v for k, v in CONFIGS["qwen3_moe"]().to_dict().items() if k != "model_type"})
    torch.manual_seed(0)
    model = UnevenModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
    model.save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    ids = torch.randint(3, 96, (4, 30), generator=torch.Generator().manual_seed(0))
    with sedetect.profile(model) as prof:
        model(input_ids=ids)
    kept = choose_kept(prof.stats, "reap", 0.3, budget="global", floor=3)
    sizes = [len(one) for one in kept.values()]
    assert len(set(sizes)) > 1 and sum(sizes) == 24 - 7
    pruning.check_prunable(tmp_path / "source", 0.3, budget="global")
    prune_checkpoint(tmp_path / "source", tmp_path / "out", kept)
    pruned, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and [bank.experts for bank in find_banks(pruned)] == sizes
    with ablate(model, removed(kept, 8), how="remove"):
        expected = logits(model, ids)
    torch.testing.assert_close(logits(pruned.eval(), ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral", "hunyuan_v1_moe"])
def test_classes_of_one_number_refuse_other_layers(name, tmp_path):
    """By one line that names the way out, before a text is read, and from Python before anything is written."""
    save_family(name, tmp_path / "source")
    put_tokenizer(tmp_path / "source")
    said = refused(run("prune", tmp_path / "source", "--budget", "global", "-o", tmp_path / "out"))
    assert "transformers builds this class with one number of experts for all layers" in said
    assert said.rstrip().endswith("use --budget even")
    with pytest.raises(SedetectError, match="use budget='even'"):
        number = 3 if name in CONFIGS else 2
        kept = {BankId("decoder", n, "routed"): list(range(4 + n % 2)) for n in range(number)}
        prune_checkpoint(tmp_path / "source", tmp_path / "out", kept)
    assert os.listdir(tmp_path) == ["source"]


def test_several_ratios_of_one_run(stats_file, tmp_path):
    """A folder each; what a smaller ratio prunes, a larger one does too; all are checked before one is written."""
    ratios = ("--ratio", 0.5, "--ratio", 0.125, "--ratio", 0.25)
    code, out, _ = run("prune", TINY, *ratios, "--stats", stats_file, "--by", "frequency", "-o", tmp_path / "out")
    assert code == 0 and sorted(os.listdir(tmp_path / "out")) == ["0.125", "0.25", "0.5"]
    assert [f"{left} of 32 experts" in out for left in (28, 24, 16)] == [True] * 3
    plans = [Pruning.load(tmp_path / "out" / name / "pruning.json") for name in ("0.125", "0.25", "0.5")]
    assert [plan.facts["ratio"] for plan in plans] == [0.125, 0.25, 0.5]
    for less, more in pairwise(plans):
        assert all(set(more.kept[bank]) < set(less.kept[bank]) for bank in less.kept)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "0.5", dtype=torch.float32)
    assert pruned.config.num_local_experts == 16
    said = refused(run("prune", TINY, "--ratio", 0.25, "--ratio", 0.95, "--stats", stats_file, "-o", tmp_path / "no"))
    assert "leaves 2 of 32 experts" in said and not (tmp_path / "no").exists()


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
        (_unknown_tensor, "model.layers.1.mlp.gate.tid2eid: unknown tensor in the MoE block"),
        (_odd_shape, r"mlp.gate.weight: shape \(7, 32\) where dimension 0 should count the 8 experts of layer 1"),
        (_other_layout, "text_moe.experts.0.down_proj.weight: unknown layout of experts"),
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
