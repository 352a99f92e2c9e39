"""Exports: what each form selects, by the matching rule of its tool; tests/check_exports.py runs the tools."""

import json
import re
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product

import gguf
import pytest
import torch
import yaml
from safetensors.torch import save_file
from support.command import refused, run
from support.models import CONFIGS, TINY, random_model
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

import sedetect
from sedetect import BankId, ModelStats
from sedetect.compression.channels import write_imatrix
from sedetect.compression.protect import (
    GRANULARITIES,
    SHAPED,
    TOOLS,
    export,
    extra_sizes,
    protect_list,
    protected_names,
)
from sedetect.compression.runtimes import LOADS, REASONS, RUNTIMES, check_names, read_linears
from sedetect.errors import SedetectError

# What the quantizers see: one linear module per matrix of an expert, after they have taken the fused ones apart.
LINEARS = {
    f"{prefix}model.layers.{layer}.mlp.experts.{e}.{name}_proj": (layer, e)
    for prefix in ("", "model.language_")
    for layer in range(12)
    for e in range(32)
    for name in ("gate", "up", "down")
}
KEPT = ["lm_head", *(f"model.layers.{n}.self_attn.{m}_proj" for n in (0, 9) for m in "qkvo"), "model.layers.1.mlp.gate"]
EXPERT, LAYER = {(1, 28), (9, 7)}, {(layer, e) for layer in (1, 9) for e in range(32)}


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    stats = sedetect.profile_model(
        TINY, text=sedetect.Text(tokens=2048, seq_len=128), measuring=sedetect.Measuring(channels=True)
    ).stats
    stats.save(tmp_path_factory.getbasetemp() / "export" / "stats.safetensors")
    return stats


@pytest.fixture(scope="module")
def folder(stats, tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "export"


def selected(match, names=LINEARS):
    """The places that a rule takes, and a check that it takes all matrices of each and nothing else."""
    taken = [name for name in names if match(name)]
    places = {LINEARS[name] for name in taken}
    assert len(taken) == sum(place in places for name, place in LINEARS.items() if name in names)
    assert not match("model.layers.11.mlp.experts_norm")
    return places


def test_the_list(stats):
    """The candidates, then the routed experts with the next largest |y|."""
    assert [(str(p.place), p.why) for p in protect_list(stats)] == [("L1E28", "candidate"), ("L9E7", "candidate")]
    protected = protect_list(stats, neighbours=2)
    values = sorted(
        ((float(v), f"L{bank.layer}E{e}") for bank, s in stats.banks.items() for e, v in enumerate(s.out_max)),
        reverse=True,
    )
    assert [str(p.place) for p in protected] == [name for _, name in values[:4]]
    assert [p.value for p in protected] == [value for value, _ in values[:4]]
    assert (protected[0].channel, protected[0].intermediate) == (101, 14), "the super weight"
    assert protected[0].module == "model.layers.1.mlp.experts"


@pytest.mark.parametrize("granularity, wanted", [("expert", EXPERT), ("layer", LAYER)])
def test_forms(stats, granularity, wanted):
    def made(tool):
        document, _ = export(stats, protect_list(stats), tool, granularity, model=TINY)
        if isinstance(document, str):
            return yaml.safe_load(document)
        assert json.loads(json.dumps(document)) == document
        return document

    (modifier,) = made("llm-compressor")["quant_stage"]["quant_modifiers"].values()
    patterns = [target.removeprefix("re:") for target in modifier["ignore"] if target.startswith("re:")]
    assert selected(lambda name: any(re.match(pattern, name) for pattern in patterns)) == wanted
    assert all(any(re.match(p, name) for p in patterns) for name in KEPT)
    (group,) = modifier["config_groups"].values()
    assert (group["targets"], group["weights"]["num_bits"], group["weights"]["group_size"]) == (["Linear"], 4, 16)
    if granularity == "layer":
        assert any(re.match(pattern, "model.layers.1.mlp.experts") for pattern in patterns), "a fused layer's own name"

    document = made("gptqmodel")
    dynamic = document["dynamic"]
    assert (document["bits"], document["group_size"]) == (4, 16)
    assert all(any(re.match(key[2:], name) for key in dynamic) for name in KEPT)
    assert all(value == {} and key.startswith("-:") for key, value in dynamic.items())
    assert selected(lambda name: any(re.match(key[2:], name) for key in dynamic)) == wanted

    own = [name for name in LINEARS if name.startswith("model.layers")]  # names, not patterns
    document = made("auto-round")
    ignored = document["ignore_layers"].split(",")
    assert (document["scheme"], document["group_size"]) == ("W4A16", 16)
    assert all(any(part in name for part in ignored) for name in KEPT)
    ignored = [name + "." if name[-1].isdigit() else name for name in ignored]  # as AutoRound does
    assert selected(lambda name: any(part in name for part in ignored), own) == wanted

    nothing, experts, *entries = made("modelopt")["quantize"]["quant_cfg"]
    assert nothing == {"quantizer_name": "*", "enable": False}, "all that is not named below stays as it is"
    assert experts["cfg"] == {"num_bits": 4, "block_sizes": {-1: 16, "type": "static"}}
    for name in ("experts.gate_up_proj_weight_quantizers.3", "experts.3.up_proj.weight_quantizer"):
        assert fnmatch(f"model.layers.1.mlp.{name}", experts["quantizer_name"])
    assert not fnmatch("model.layers.1.self_attn.q_proj.weight_quantizer", experts["quantizer_name"])
    assert not fnmatch("model.layers.1.mlp.experts.gate_up_proj_input_quantizer", experts["quantizer_name"])
    assert all(entry["enable"] is False for entry in entries)
    rules = [entry["quantizer_name"] for entry in entries]
    assert selected(lambda name: any(fnmatch(f"{name}.weight_quantizer", rule) for rule in rules)) == wanted
    for layer in (1, 9, 11):
        for e in (2, 7, 8, 28):
            for matrix in ("gate_up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{matrix}_weight_quantizers.{e}"
                assert any(fnmatch(name, rule) for rule in rules) == ((layer, e) in wanted)

    skip = made("bitsandbytes")["llm_int8_skip_modules"]
    assert selected(lambda name: not should_convert_module(name, skip), own) == wanted
    for name in ("lm_head", "model.layers.1.mlp.gate", "model.layers.1.block_sparse_moe.router.layer"):
        assert not should_convert_module(name, skip)
    assert should_convert_module("model.layers.1.self_attn.o_proj", skip)

    document = made("json")
    assert (document["format"], document["version"]) == ("sedetect-protect-list", "1")
    assert [expert["name"] for expert in document["experts"]] == ["L1E28", "L9E7"]
    assert [expert["why"] for expert in document["experts"]] == ["candidate", "candidate"]
    suffixes = (".28", ".7") if granularity == "expert" else ("", "")
    assert document["modules"] == [f"model.layers.{n}.mlp.experts{s}" for n, s in zip((1, 9), suffixes, strict=True)]


@pytest.mark.parametrize(
    ("tool", "granularity"), [one for one in product(TOOLS, GRANULARITIES) if one != ("llama.cpp", "expert")]
)
def test_names_are_those_of_the_documents(stats, tool, granularity):
    """What protected_names gives is in the document, and all that the document has more than one of another expert."""

    def written(experts):
        document, _ = export(stats, experts, tool, granularity, model=TINY)
        text = document if isinstance(document, str) else json.dumps(document).replace("\\\\", "\\")
        return protected_names(experts, tool, granularity), text

    first, second = protect_list(stats)
    names, text = written([first, second])
    one, other = written([second])
    assert names and set(one) < set(names) and all(name in text for name in names)
    assert not any(name in other for name in set(names) - set(one))


@pytest.mark.parametrize(("granularity", "kept"), [("expert", 2), ("layer", 64)])
def test_what_keeping_costs(stats, granularity, kept):
    """Two of 320 experts of 3 x 256 x 48 weights in 2 bytes, where all others have half a byte."""
    (one,) = [one for one in extra_sizes(stats, protect_list(stats), TINY) if one.granularity == granularity]
    assert (one.kept, one.experts, one.nbytes) == (kept, 320, kept * 3 * 256 * 48 * 1.5)
    assert one.share == pytest.approx(kept * 1.5 / (320 * 0.5))
    assert replace(one, nbytes=None) in extra_sizes(stats, protect_list(stats))


def test_what_keeping_costs_is_of_this_model(stats, qwen3):
    with pytest.raises(SedetectError, match=r"the statistics are of another model \(tiny-moe\)"):
        extra_sizes(stats, protect_list(stats), qwen3[0])


def test_llama_cpp(stats):
    """One `name=type` per line, the name a regular expression searched in the lower-cased tensor name."""
    text, _ = export(stats, protect_list(stats), "llama.cpp", "layer")
    rules = [line.split("=") for line in text.splitlines()]
    assert [kind for _, kind in rules] == ["bf16", "bf16"] and all(rule == rule.lower() for rule, _ in rules)
    found = {
        (layer, name)
        for layer in range(20)
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_inp", "attn_v", "ffn_down_shexp")
        if any(re.search(rule, f"blk.{layer}.{name}.weight") for rule, _ in rules)
    }
    assert found == {(layer, f"ffn_{name}_exps") for layer in (1, 9) for name in ("gate", "up", "down")}
    with pytest.raises(SedetectError, match="stores a layer's experts as one tensor; give granularity='layer'"):
        export(stats, protect_list(stats), "llama.cpp")


def test_shared_experts_and_other_stacks():
    """A shared candidate is named by its own module, in both granularities; its layer's routed experts are not."""
    model, stats = shaped("qwen2_moe")
    shared = stats.banks[BankId("decoder", 0, "shared")]
    shared.outliers[0, 0, 0] = torch.tensor(1e4).view(torch.int32).long()
    shared.first_outliers[0, 0, 0] = torch.tensor(2e4).view(torch.int32).long()
    assert [str(p.place) for p in protect_list(stats)] == ["L0shared"]
    for granularity in ("expert", "layer"):
        document, _ = export(stats, protect_list(stats), "json", granularity)
        assert document["modules"] == ["model.layers.0.mlp.shared_expert"]
        rule = [*export(stats, protect_list(stats), "gptqmodel", granularity, model=model)[0]["dynamic"]][-1]
        assert re.match(rule[2:], "model.layers.0.mlp.shared_expert.down_proj")
        assert not re.match(rule[2:], "model.layers.0.mlp.shared_expert_gate")
        assert not re.match(rule[2:], "model.layers.0.mlp.experts.0.down_proj")
    assert "_shexp" in export(stats, protect_list(stats), "llama.cpp", "layer")[0]


def test_modules_that_no_list_can_name(stats):
    """Experts that are no experts.<number>, and stacks that GGUF does not know."""
    found, _ = protect_list(stats)
    header = stats.header
    other = ModelStats(stats.banks, replace(header, banks=header.banks | {
        "decoder.1.routed": replace(header.banks["decoder.1.routed"], module="model.layers.1.mlp.output_linear")
    }))  # fmt: skip
    with pytest.raises(
        SedetectError, match="L1E28: model.layers.1.mlp.output_linear does not hold its experts by number"
    ):
        protect_list(other)
    vision = replace(found, place=replace(found.place, kind="routed_vision"))
    with pytest.raises(SedetectError, match="tool llama.cpp: L1E28_vision: GGUF has no name for it"):
        export(stats, [vision], "llama.cpp", "layer")


def test_nothing_to_protect():
    model = random_model("qwen3_moe")
    with sedetect.profile(model) as prof:
        model(input_ids=torch.randint(3, 96, (2, 20)))
    with pytest.raises(SedetectError, match="nothing to protect: no candidate"):
        protect_list(prof.stats)


def test_imatrix(stats, tmp_path):
    assert write_imatrix(stats, tmp_path / "imatrix.gguf") == 10
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 20
    for bank, state in stats.banks.items():
        sums = tensors[f"blk.{bank.layer}.ffn_down_exps.weight.in_sum2"]
        counts = tensors[f"blk.{bank.layer}.ffn_down_exps.weight.counts"]
        assert sums.shape.tolist() == [48, 32] and counts.shape.tolist() == [1, 32], "llama.cpp's order"
        assert torch.equal(torch.tensor(sums.data), state.in_channel_sq.float())
        assert torch.equal(torch.tensor(counts.data)[:, 0], state.rows.float())
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    assert fields == {
        "general.architecture": "imatrix", "general.type": "imatrix", "imatrix.chunk_count": 16,
        "imatrix.chunk_size": 128, "imatrix.datasets": [s.info["domain"] for s in stats.header.sources.values()],
    }  # fmt: skip


def test_sums_of_squares_are_those_of_the_inputs(tmp_path):
    """Against the inputs of every down_proj, computed by hand, shared and dense ones too."""
    model = random_model("qwen2_moe")
    seen, calls = {}, {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0]))
        for path, module in model.named_modules()
        if path.endswith("down_proj")
    ]
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    experts = {path: module for path, module in model.named_modules() if path.endswith(".experts")}
    hooks += [
        module.register_forward_pre_hook(lambda _, args, path=path: calls.__setitem__(path, args))
        for path, module in experts.items()
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    with sedetect.profile(model, channels=True) as prof:
        model(input_ids=ids)
    write_imatrix(prof.stats, tmp_path / "imatrix.gguf")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(
        tensors["blk.1.ffn_down.weight.in_sum2"][0],
        seen["model.layers.1.mlp.down_proj"].reshape(-1, 40).square().sum(0),
        **close,
    )
    shared = seen["model.layers.0.mlp.shared_expert.down_proj"]
    torch.testing.assert_close(
        tensors["blk.0.ffn_down_shexp.weight.in_sum2"][0], shared.reshape(-1, 20).square().sum(0), **close
    )
    x, index, _ = calls["model.layers.2.mlp.experts"]
    module = experts["model.layers.2.mlp.experts"]
    for e in range(CONFIGS["qwen2_moe"]().num_experts):
        gate, up = (x[(index == e).any(1)] @ module.gate_up_proj[e].T).chunk(2, dim=-1)
        h = gate * torch.sigmoid(gate) * up
        torch.testing.assert_close(tensors["blk.2.ffn_down_exps.weight.in_sum2"][e], h.square().sum(0), **close)
        assert tensors["blk.2.ffn_down_exps.weight.counts"][e, 0] == len(h)


def shaped(name):
    """A model of a class, 64 and 32 inputs in its experts, and statistics of it."""
    config = CONFIGS[name]()
    config.update({"hidden_size": 64, "moe_intermediate_size": 32})
    model = AutoModelForCausalLM.from_config(config).eval()
    with sedetect.profile(model) as prof:
        model(input_ids=torch.randint(3, 96, (2, 20)))
    return model, prof.stats


@pytest.fixture(scope="module")
def qwen3():
    return shaped("qwen3_moe")


def test_groups_divide_the_inputs_of_every_expert(stats, qwen3):
    """The largest that does, of those that the runtime takes; tiny-moe has 256 and 48 inputs."""
    model, other = qwen3
    assert [read_linears(model, other, "llm-compressor", runtime).group for runtime in (None, "vllm")] == [32, 32]
    assert read_linears(TINY, stats, "modelopt", None).group == 16
    for tool, runtime in (("llm-compressor", "vllm"), ("auto-round", "transformers")):
        line = f"48 and 256 inputs, which no group of 128, 64, 32 divides; {runtime} cannot take them in 4 bits"
        with pytest.raises(SedetectError, match=line):
            read_linears(TINY, stats, tool, runtime)
    odd = random_model("qwen2_moe")
    with sedetect.profile(odd) as prof:
        odd(input_ids=torch.randint(3, 96, (2, 20)))
    with pytest.raises(SedetectError, match="24 and 32 inputs, which no group of 128, 64, 32, 16 divides; modelopt"):
        read_linears(odd, prof.stats, "modelopt", None)
    with pytest.raises(SedetectError, match=r"the statistics are of another model \(tiny-moe\)"):
        read_linears(model, stats, "modelopt", None)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_all_but_routed_experts_is_named(stats, name):
    """Shared experts, dense layers and latent attention too: the recipe ignores each, and names its inputs."""
    model, other = shaped(name)
    text, _ = export(other, protect_list(stats)[:1], "llm-compressor", model=model)
    (modifier,) = yaml.safe_load(text)["quant_stage"]["quant_modifiers"].values()
    patterns = [one.removeprefix("re:") for one in modifier["ignore"]]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears and all(any(re.match(pattern, n) for pattern in patterns) for n in linears)
    assert any("shared_expert" in n for n in linears) and any(".mlp.gate_proj" in n for n in linears)
    assert not any(re.match(pattern, "model.layers.2.mlp.experts.0.up_proj") for pattern in patterns)
    inputs = {m.in_features for n, m in linears.items() if not n.endswith("shared_expert_gate")}
    assert {int(size) for size in re.findall(r"# \d+ of (\d+) inputs", text)} == inputs


@pytest.mark.parametrize("tool", [*SHAPED, "bitsandbytes"])
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("granularity", ["expert", "layer"])
def test_runtimes(stats, qwen3, tool, runtime, granularity):
    """Written is what was seen to load; else one line says why, and names a combination that was."""
    model, other = qwen3
    if granularity in LOADS.get((tool, runtime), ()):
        document, notes = export(other, protect_list(stats), tool, granularity, runtime, model)
        assert document and not any("no runtime named" in note for note in notes)
        return
    with pytest.raises(SedetectError) as raised:
        export(other, protect_list(stats), tool, granularity, runtime, model)
    line = str(raised.value)
    assert line.startswith(f"runtime {runtime}: ")
    assert REASONS.get((tool, runtime, granularity), "were not seen to load there") in line
    seen = {pair for pair, loads in LOADS.items() if tool in pair or runtime in pair}
    assert any(name in line for pair in seen for name in pair if name not in (tool, runtime)) or (
        "give granularity='" in line if (tool, runtime) in LOADS else "leave out runtime" in line and not seen
    )


def test_names_that_the_files_do_not_have(stats, tmp_path):
    """auto-round reads the tensors of the files by their names: Mixtral's are not those of its modules."""
    check_names(TINY, ["model.layers.1.mlp.experts.28"])
    (tmp_path / "config.json").write_text("{}")
    other = {"model.layers.1.block_sparse_moe.experts.0.w1.weight": torch.zeros(2, 2)}
    save_file(other, tmp_path / "model.safetensors")
    with pytest.raises(SedetectError, match=r"no tensor is named model.layers.1.mlp.experts.\*, so that auto-round"):
        check_names(tmp_path, ["model.layers.1.mlp.experts"])


def test_command(folder, tmp_path):
    code, out, err = run("export", folder, "--to", "gptqmodel", "--model", TINY)
    assert code == 0 and list(json.loads(out)["dynamic"])[-2:] == [
        rf"-:(.*\.)?layers\.{layer}\.mlp\.experts\.{e}(\.|$)" for layer, e in ((1, 28), (9, 7))
    ]
    assert "protected: L1E28 (candidate), L9E7 (candidate), by expert" in err
    assert "note: no runtime named (--for); checkpoints of gptqmodel were seen to load in: none yet" in err
    weights = 96 * 256 + 256 * 48  # of one expert; 12 bits more each
    assert f"expert: 2 of 320 routed experts, +{2 * weights * 12 // 8:,} bytes (+1.88%)" in err
    assert f"layer: 64 of 320 routed experts, +{64 * weights * 12 // 8:,} bytes (+60.00%)" in err
    file = tmp_path / "types.txt"
    code, out, err = run("export", folder, "--to", "llama.cpp", "--granularity", "layer", "-o", file)
    assert (
        code == 0
        and err == ""
        and "protected: L1E28 (candidate), L9E7 (candidate), by layer" in out
        and "expert: 2 of 320 routed experts, +1.88%" in out
    )
    lines = [rf"^blk\.{layer}\.ffn_(gate|up|gate_up|down)_exps\.weight=bf16" for layer in (1, 9)]
    assert file.read_text().splitlines() == lines
    code, out, err = run("export", folder, "--to", "imatrix", "-o", tmp_path / "imatrix")
    assert code == 0 and "10 entries, of the inputs of down_proj" in out
    assert (tmp_path / "imatrix").stat().st_size > 1000


def test_experts_without_rows_are_named(tmp_path):
    """By every target: a list leaves them out, an imatrix has counts of 0 and scales are 1, all of it unmeasured."""
    stats = sedetect.profile_model(
        TINY, text=sedetect.Text(tokens=2048, seq_len=128), measuring=sedetect.Measuring(channels=True)
    ).stats
    for layer, expert in ((3, 5), (7, 0)):
        stats.banks[BankId("decoder", layer, "routed")].counts[expert] = 0
    stats.save(tmp_path / "stats.safetensors")
    line = "note: 2 routed experts saw no row, so that nothing was measured (L3E5, L7E0); profile at least 21,846 more"
    for to in ("json", "llm-compressor", "gptqmodel", "imatrix"):
        result = run("export", tmp_path, "--to", to, "--model", TINY, "-o", tmp_path / to)
        assert result.code == 0 and line in result.out
    assert len(gguf.GGUFReader(tmp_path / "imatrix").tensors) == 20


def test_command_refuses(folder, stats, tmp_path):
    out = ("-o", tmp_path / "out")
    assert "'torch' is not one of 'llm-compressor'" in refused(run("export", folder, "--to", "torch", *out))
    assert "--neighbours -1: must be at least 0" in refused(
        run("export", folder, "--to", "json", "--neighbours", -1, *out)
    )
    assert "'row' is not one of 'expert', 'layer'" in refused(
        run("export", folder, "--to", "json", "--granularity", "row", *out)
    )
    assert "one tensor; give --granularity layer" in refused(run("export", folder, "--to", "llama.cpp", *out))
    assert "give it a name with -o" in refused(run("export", folder, "--to", "imatrix"))
    said = refused(run("export", folder, "--to", "llm-compressor", *out))
    assert "--to llm-compressor: the model's shapes choose its groups; give --model too" in said
    said = refused(run("export", folder, "--to", "llm-compressor", "--for", "vllm", "--model", TINY, *out))
    assert "--for vllm: vLLM 0.32.0 gives all experts of a layer one scheme" in said
    assert said.rstrip().endswith("; give --granularity layer")
    for to, last in (("auto-round", "transformers (expert or layer)"), ("gptqmodel", "of your own leave out --for")):
        said = refused(run("export", folder, "--to", to, "--for", "sglang", "--model", TINY, *out))
        assert f"--for sglang: {to}'s checkpoints were not seen to load there" in said and said.rstrip().endswith(last)
    for to in ("json", "llama.cpp", "imatrix"):
        said = refused(run("export", folder, "--to", to, "--granularity", "layer", "--for", "vllm", *out))
        assert "leave it out" in said
    bare = sedetect.profile_model(TINY, text=sedetect.Text(tokens=256, seq_len=16)).stats
    bare.save(tmp_path / "bare.safetensors")
    said = refused(run("export", tmp_path / "bare.safetensors", "--to", "imatrix", *out))
    assert "hold no channels; profile again with --channels" in said
    random_model("qwen3_moe").save_pretrained(tmp_path / "other")
    said = refused(run("export", folder, "--to", "json", "--model", tmp_path / "other"))
    assert "the statistics are of another model (tiny-moe)" in said
    assert not (tmp_path / "out").exists()
