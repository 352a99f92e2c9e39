"""Verification: numbers against plain transformers, what each kind of damage is called, and what passes."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import TEXTS, put_model, put_tokenizer, save_random, to_fp8
from support.command import SMALL, refused, run
from support.documents import RESIDUAL
from support.models import CONFIGS, TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

import sedetect
from sedetect.calibration.windows import calibration_windows
from sedetect.checkpoints.storage import Counterpart
from sedetect.compression.matching import mismatched_experts
from sedetect.compression.simulated import fake_quantize
from sedetect.compression.verification import Limits, Verification, verify
from sedetect.errors import SedetectError
from sedetect.experiments.divergence import Scores
from sedetect.stats.place import BankId

TEXT = sedetect.Text(tokens=480, seq_len=16, batch_size=4)
KEPT = "layers.1.mlp.experts.3."


def edited(base: Path, folder: Path, edit) -> Path:
    """A copy of a checkpoint in one file; edit changes its tensors in place."""
    shutil.copytree(base, folder)
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def rounded(name="int4", group=8, kept=KEPT):
    """An edit that rounds all experts' matrices but one expert's."""

    def edit(tensors):
        for key, tensor in tensors.items():
            if ".mlp.experts." in key and kept not in key:
                tensors[key] = fake_quantize(tensor, name, group=group)

    return edit


def swap(tensors, one, other):
    for key in [key for key in tensors if f"{one}." in key]:
        there = key.replace(f"{one}.", f"{other}.")
        tensors[key], tensors[there] = tensors[there], tensors[key]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_random(CONFIGS["qwen3_moe"](), tmp_path_factory.mktemp("verify") / "base", max_shard_size="200KB")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return save_random(CONFIGS["deepseek_v3"](), tmp_path_factory.mktemp("verify") / "deepseek")


def verified(base, made, protected=("L1E3",), **options):
    return verify(base, made, TEXTS, text=TEXT, protected=protected, limits=Limits(9.0), sequences=2, **options)


@torch.no_grad()
def test_numbers_are_those_of_plain_transformers(base, tmp_path):
    made = edited(base, tmp_path / "made", rounded())
    found = verified(base, made)
    assert found.passed and found.failures == []
    models = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in (base, made)]
    domains = calibration_windows(models[0], AutoTokenizer.from_pretrained(base), TEXTS, TEXT).domains
    assert found.tokens == {domain: windows.ids.numel() for domain, windows in domains.items()}
    start = 1  # tiny-moe's tokenizer puts one token before a text
    flips, slots = torch.zeros(3), 0
    for domain, windows in domains.items():
        kl, losses, same, count = 0.0, [0.0, 0.0], 0, 0
        for window in windows.ids:
            outs = [model(input_ids=window[None], output_router_logits=True) for model in models]
            for position in range(start - 1, len(window) - 1):
                p, q = (out.logits[0, position].double().softmax(-1) for out in outs)
                kl += float((p * (p / q).log()).sum())
                losses = [loss - float(x[window[position + 1]].log()) for loss, x in zip(losses, (p, q))]
                same += int(p.argmax() == q.argmax())
                count += 1
            for layer in range(3):
                chosen = [out.router_logits[layer].topk(2).indices.tolist() for out in outs]
                flips[layer] += sum(len({*a} - {*b}) for a, b in zip(*chosen))
            slots += 2 * len(window)
        one = found.domains[domain]
        assert one.predictions == count and one.agreement == same / count
        assert one.kl == pytest.approx(kl / count, rel=1e-4) and one.kl > 1e-4
        wanted = [float(torch.tensor(loss / count).exp()) for loss in losses]
        assert [one.perplexity, one.other] == pytest.approx(wanted, rel=1e-5)
        assert one.change.rise == pytest.approx(wanted[1] / wanted[0] - 1, abs=1e-5)
        assert one.change.low < one.change.rise < one.change.high
    assert list(found.flips.values()) == pytest.approx((flips / slots).tolist()) and flips[2] > 0
    assert found.overall.predictions == sum(one.predictions for one in found.domains.values())
    by_tokens = sum(one.kl * one.predictions for one in found.domains.values()) / found.overall.predictions
    assert found.overall.kl == pytest.approx(by_tokens)
    (expert,) = found.experts
    assert (expert.expert, expert.stored, expert.protected) == ("L1E3", "equal", True)
    for model, value in zip(models, (expert.value, expert.other)):
        stats = sedetect.profile_model(model, TEXTS, text=TEXT, tokenizer=AutoTokenizer.from_pretrained(base)).stats
        assert value == pytest.approx(float(stats.banks[BankId("decoder", 1, "routed")].out_max[3]), rel=1e-5)
    assert len(found.residual_max) == 2 and all(0 < sink < 1 for sink in found.sink_mean)


def test_a_model_is_itself(base):
    found = verified(base, base)
    assert found.passed and found.overall.kl == 0 and found.overall.agreement == 1
    assert found.overall.change.rise == 0 and set(found.flips.values()) == {0.0}


def drop_experts(tensors):
    for key in [key for key in tensors if ".layers.1.mlp.experts." in key]:
        del tensors[key]


def drop_one(tensors):
    for key in [key for key in tensors if ".layers.1.mlp.experts.7." in key]:
        del tensors[key]


def drop_middle(tensors):
    for key in [key for key in tensors if ".layers.1.mlp.experts.4." in key]:
        del tensors[key]


def drop_matrix(tensors):
    del tensors["model.layers.2.self_attn.o_proj.weight"]


def left_over(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def randomize(tensors):
    for key in tensors:
        if ".layers.2.mlp.experts." in key:
            tensors[key] = torch.randn_like(tensors[key])


def zero(tensors):
    for key in tensors:
        if ".layers.2.mlp.experts.5." in key:
            tensors[key] = torch.zeros_like(tensors[key])


DAMAGES = {
    "experts that are not there": (
        drop_experts,
        "weights of Qwen3MoeForCausalLM are missing, first model.layers.1",
    ),
    "fewer experts than the config says": (
        drop_one,
        "weights do not fit Qwen3MoeForCausalLM, first model.layers.1",
    ),
    "an expert that is not there": (drop_middle, "model.layers.1.mlp.experts.4 is missing"),
    "another matrix that is not there": (
        drop_matrix,
        "base without a counterpart: 1, first model.layers.2.self_attn.o_proj",
    ),
    "weights that no model takes": (
        left_over,
        "1 weights are not used by Qwen3MoeForCausalLM, first model.layers.0",
    ),
    "random experts": (randomize, "L2: 8 of 8 experts hold weights unlike any of the base's, first L2E0"),
    "an expert of zeros": (zero, "L2: 1 of 8 experts hold weights unlike any of the base's, first L2E5"),
    "two experts that changed places": (
        lambda t: swap(t, "layers.0.mlp.experts.2", "layers.0.mlp.experts.6"),
        "L0: 2 experts hold the weights of others, first L0E2 those of L0E6 in the base",
    ),
    "a protected expert that was rounded": (
        rounded(kept="none"),
        "L1E3 must be protected, but its weights are changed",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_named(base, tmp_path, damage):
    edit, line = DAMAGES[damage]
    made = edited(base, tmp_path / "made", edit)
    found = verified(base, made)
    assert not found.passed and any(line in failure for failure in found.failures), found.failures
    # and nothing else is wrong with it, but that what is not loaded is not there
    assert len(found.failures) <= 2, found.failures


@pytest.mark.parametrize("dropped", ["mlp.gate.e_score_correction_bias", "mlp.gate.weight"])
def test_a_dropped_router(deepseek, tmp_path, dropped):
    made = edited(deepseek, tmp_path / "made", lambda tensors: tensors.pop(f"model.layers.2.{dropped}"))
    found = verified(deepseek, made)
    assert found.failures[0] == f"tensors of the base without a counterpart: 1, first model.layers.2.{dropped}"


def test_good_ones_of_another_class(deepseek, tmp_path):
    """Shared experts beside routed ones; the base's values in another floating-point type are as good as equal."""

    def half(tensors):
        rounded(kept="layers.1.mlp.")(tensors)
        for key in tensors:
            tensors[key] = tensors[key].bfloat16()

    found = verified(deepseek, edited(deepseek, tmp_path / "made", half), ("L1E3", "L1shared"))
    assert found.passed, found.failures
    assert [one.stored for one in found.experts] == ["equal, rounded to BF16"] * 2
    assert all(one.value > 0 and one.other == pytest.approx(one.value, rel=0.1) for one in found.experts)


def in_fp8(base, folder, block=8):
    shutil.copytree(base, folder)
    to_fp8(folder, block)
    return folder


def test_fp8(base, tmp_path):
    """What is quantized passes, unless it was to be protected."""
    made = in_fp8(base, tmp_path / "made")
    found = verified(base, made)
    assert found.method == "fp8" and 0 < found.overall.kl < 0.5
    assert found.failures == ["L1E3 must be protected, but its weights are quantized (F8_E4M3)"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sedetect.compression.verification.found_places", lambda ranking: [])
        found = verify(base, made, TEXTS, text=TEXT, limits=Limits(9.0), sequences=2)
    assert found.passed and found.experts == []


def test_a_wrong_group_size(base, tmp_path):
    made = in_fp8(base, tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [16, 16]
    (made / "config.json").write_text(json.dumps(config))
    lines = Counterpart(base, made).wrong_shapes()
    assert (
        "model.layers.0.mlp.experts.0.down_proj.weight_scale_inv: its shape is [4, 3], and [2, 2] by the scheme, of a "
        "weight [32, 24]"
    ) in lines
    failure = f"tensors that do not fit the scheme in config.json: {len(lines)}, first {lines[0]}"
    assert failure in verified(base, made).failures


def packed(group, declared, bits=4, strategy="group"):
    """A copy of a checkpoint as compressed-tensors packs it, and what its config says."""

    def edit(tensors):
        for key in [key for key in tensors if ".mlp.experts." in key]:
            weight = tensors.pop(key)
            rows, columns = weight.shape
            tensors[f"{key}_packed"] = torch.zeros(rows, -(-columns * bits // 32), dtype=torch.int32)
            tensors[f"{key}_scale"] = torch.ones(rows, -(-columns // group))
            tensors[f"{key}_shape"] = torch.tensor([rows, columns])

    weights = {"num_bits": 4, "type": "int", "strategy": strategy, "group_size": declared}
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    return edit, {"quant_method": "compressed-tensors", "format": "pack-quantized", **scheme}


def integers(group, declared):
    """A copy of a checkpoint as GPTQ stores it."""

    def edit(tensors):
        for key in [key for key in tensors if ".mlp.experts." in key]:
            rows, columns = tensors.pop(key).shape
            stem = key.removesuffix("weight")
            tensors[f"{stem}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
            tensors[f"{stem}scales"] = torch.ones(-(-columns // group), rows)

    return edit, {"quant_method": "gptq", "bits": 4, "group_size": declared}


@pytest.mark.parametrize(
    "form, wrong",
    [
        (packed(8, 8), None),
        (packed(16, 16), None),  # which does not divide 24 inputs
        (packed(32, None, strategy="channel"), None),
        (packed(8, 16), "weight_scale: its shape is [32, 3], and [32, 2] by the scheme, of a weight [32, 24]"),
        (packed(8, None, strategy="channel"), "down_proj.weight_scale: its shape is [32, 3]"),
        (packed(8, 8, bits=8), "down_proj.weight_packed: its shape is [32, 6]"),
        (integers(8, 8), None),
        (integers(32, -1), None),
        (integers(8, 16), "down_proj.scales: its shape is [3, 32]"),
    ],
)  # fmt: skip
def test_shapes_of_packed_weights(base, tmp_path, form, wrong):
    edit, settings = form
    made = edited(base, tmp_path / "made", edit)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    files = Counterpart(base, made)
    lines = files.wrong_shapes()
    assert lines == [] if wrong is None else any(wrong in line for line in lines), lines
    assert files.missing() == [] and files.expert(1, 3, 8) == "quantized (I32)"


def test_what_is_not_the_same_model_is_refused(base, deepseek, tmp_path):
    other = put_model(tmp_path / "fewer", num_experts=6)
    with pytest.raises(SedetectError, match="fewer: 6 experts of 32 x 24 in decoder.0.routed, and 8 experts"):
        verified(base, other)
    with pytest.raises(SedetectError, match="a DeepseekV3ForCausalLM, and the base is a Qwen3MoeForCausalLM"):
        verified(base, deepseek)
    with pytest.raises(SedetectError, match="a vocabulary of 96 tokens, and 4,096 in the base"):
        verified(base, put_model(tmp_path / "words", vocab_size=96))
    with pytest.raises(SedetectError, match="max_increase -1: must be at least 0"):
        verify(base, base, limits=Limits(-1.0))


def test_settings_that_differ(base, tmp_path):
    made = edited(base, tmp_path / "made", lambda tensors: None)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    shutil.rmtree(tmp_path / "bare", ignore_errors=True)
    found = verified(base, made)
    assert any(note.startswith("config.json: rms_norm_eps is 1e-06 in the base and 0.5 here") for note in found.notes)
    tokenizer = json.loads((made / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = 4095
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its tokenizer has another vocabulary" in verified(base, made).failures[0]
    (made / "tokenizer.json").unlink()
    assert any("no tokenizer beside the weights" in note for note in verified(base, made).notes)


def test_a_base_that_is_quantized_itself(base, tmp_path):
    """Its scales are no weights that could be missing; bytes that are the same are equal, whatever they stand for."""
    first = in_fp8(base, tmp_path / "first")
    files = Counterpart(first, edited(first, tmp_path / "same", lambda tensors: None))
    assert files.missing() == [] and files.expert(1, 3, 8) == "equal"

    def unscaled(tensors):
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            scale = tensors.pop(key).repeat_interleave(8, 0).repeat_interleave(8, 1)
            weight = key.removesuffix("_scale_inv")
            tensors[weight] = tensors[weight].float() * scale

    files = Counterpart(first, edited(first, tmp_path / "plain", unscaled))
    assert files.missing() == [] and files.expert(1, 3, 8) == "quantized (F32)"


def test_names_and_layouts_that_differ(base, tmp_path):
    """Experts that one checkpoint stores one by one and the other together are compared when they are loaded."""

    def together(tensors):
        for layer in range(3):
            path = f"model.layers.{layer}.mlp.experts"
            parts = {n: [tensors.pop(f"{path}.{e}.{n}_proj.weight") for e in range(8)] for n in ("gate", "up", "down")}
            tensors[f"{path}.gate_up_proj"] = torch.stack([torch.cat(two) for two in zip(parts["gate"], parts["up"])])
            tensors[f"{path}.down_proj"] = torch.stack(parts["down"])

    made = edited(base, tmp_path / "together", together)
    files = Counterpart(base, made)
    assert files.missing() == [] and files.expert(1, 3, 8) is None
    found = verified(base, made)
    assert found.passed and [one.stored for one in found.experts] == ["equal"], found.failures
    other = edited(made, tmp_path / "other", lambda tensors: tensors["model.layers.1.mlp.experts.down_proj"][4].add_(1))
    same = Counterpart(made, other)
    assert [same.expert(1, e, 8) for e in (3, 4)] == ["equal", "changed"]

    def renamed(tensors):
        for key in list(tensors):
            tensors[f"language.{key}"] = tensors.pop(key)

    assert Counterpart(base, edited(base, tmp_path / "renamed", renamed)).missing() is None


def test_rotated_weights_are_not_taken_for_others():
    """A quantizer may rotate all weights; then nothing is said of the experts' order."""
    torch.manual_seed(0)
    bank = BankId("decoder", 1, "routed")
    base, other = torch.randn(4, 1000), torch.randn(4, 1000)
    assert mismatched_experts({bank: base}, {bank: other}) == []
    assert mismatched_experts({bank: base}, {bank: base * 2}) == []
    assert len(mismatched_experts({bank: base}, {bank: torch.cat([base[:3], other[3:]])})) == 1
    assert len(mismatched_experts({bank: base}, {bank: base[[0, 1, 3, 2]]})) == 1
    noisy = fake_quantize(base, "int2", group=100)
    assert mismatched_experts({bank: base}, {bank: noisy}) == []


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """tiny-moe whose super expert gives nothing."""

    def edit(tensors):
        key = "model.layers.1.mlp.experts.28.down_proj.weight"
        tensors[key] = tensors[key] * 0.01

    return edited(TINY, tmp_path_factory.mktemp("verify") / "broken", edit)


def test_a_super_expert_that_was_lost(broken, tmp_path, tiny_profile):
    command = ("verify", TINY, broken, "--tokens", 512, "--seq-len", 64, "--dtype", "float32", "-o", tmp_path / "out")
    result = run(*command, "--protect", "L1E28")
    assert result.code == 1 and result.err == ""
    document = json.loads((tmp_path / "out" / "verification.json").read_text())
    failures = "\n".join(document["failures"])
    assert not document["passed"] and "L1E28 must be protected, but its weights are changed" in failures
    assert "massive activations fell from" in failures
    for failure in document["failures"]:
        assert f"failed: {failure}\n" in result.out
    assert document["experts"][0]["value"] > 1000 > 50 > document["experts"][0]["other"]


def test_sinks_and_massive_activations(base, monkeypatch):
    """They fail where they fall by half, in a base that has them; without attention weights nothing is said."""

    def failures(before, now):
        seen = iter((before, now))
        monkeypatch.setattr("sedetect.compression.verification.observe_residual", lambda *_, **__: next(seen))
        return verified(base, base).failures

    def weaker(sink=1.0, value=1.0, formed=True):
        sinks = None if sink is None else [sink * 0.25, sink * 0.75]
        layers = [replace(layer, sinks=sinks, maximum=value * 900) for layer in RESIDUAL.layers]
        return replace(RESIDUAL, layers=layers, formations=RESIDUAL.formations if formed else [])

    assert failures(weaker(), weaker(0.51, 0.51)) == []
    assert failures(weaker(), weaker(0.5)) == ["attention sinks fell from 50.0% to 25.0% of all attention"]
    assert failures(weaker(), weaker(1.0, 0.5)) == ["massive activations fell from 900 to 450"]
    assert failures(weaker(1.0, 1.0, formed=False), weaker(1.0, 0.1)) == []
    assert (
        failures(weaker(0.01), weaker(0.001))
        == []
        == failures(weaker(), weaker(None))
        == failures(weaker(None), weaker())
    )


def test_command(base, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": one}) for several in TEXTS.values() for one in several))
    made = edited(base, tmp_path / "made", rounded())
    command = ("verify", base, made, "--data", texts, "--tokens", 256, "--seq-len", 16)
    result = run(*command, "--protect", "L1E3", "--max-increase", "900%", "-o", tmp_path)
    assert result.code == 0 and "made passes against base: perplexity " in result.out, result
    document = json.loads((tmp_path / "verification.json").read_text())
    assert document["passed"] and document["limits"] == {"increase": 9.0, "kl": None}
    result = run(*command, "--protect", "L1E3", "--max-increase", "9", "--max-kl", "1e-9")
    assert result.code == 1 and "nats per token, above the limit of 1e-09" in result.out
    assert "made fails 1 check against base" in result.out


def test_candidates_and_statistics(tmp_path, tiny_profile):
    made = edited(TINY, tmp_path / "made", lambda tensors: None)
    command = ("verify", TINY, made, "--tokens", 512, "--seq-len", 128, "--stats", tiny_profile)
    result = run(*command, "--protect", "candidates", "-o", tmp_path)
    assert result.code == 0, result
    experts = json.loads((tmp_path / "verification.json").read_text())["experts"]
    assert [(one["expert"], one["stored"], one["protected"]) for one in experts] == [
        ("L1E28", "equal", True), ("L9E7", "equal", True),
    ]  # fmt: skip
    other = put_model(tmp_path / "other")
    assert "statistics of another model" in refused(run("verify", other, other, "--stats", tiny_profile))


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """tiny-moe with all experts in 4 bits but those of L1."""
    folder = tmp_path_factory.mktemp("listed")
    return edited(TINY, folder / "made", rounded(group=48, kept="layers.1.mlp.experts."))


def test_the_list_of_an_export(listed, tmp_path, tiny_profile):
    """By layer, every expert of a layer that it names must be as in the base; by expert, those named."""
    found = {}
    for granularity in ("expert", "layer"):
        file = tmp_path / f"{granularity}.json"
        assert run("export", tiny_profile, "--to", "json", "--granularity", granularity, "-o", file).code == 0
        result = run("verify", TINY, listed, "--protect", file, *SMALL, "--max-increase", "9", "-o", tmp_path)
        assert result.code == 1, result
        document = json.loads((tmp_path / "verification.json").read_text())
        found[granularity] = {one["expert"]: one["stored"] for one in document["experts"] if one["protected"]}
        lost = [failure.split(" ")[0] for failure in document["failures"]]
        assert lost == [name for name in found[granularity] if name.startswith("L9")]
    assert found["expert"] == {"L1E28": "equal", "L9E7": "changed"}
    wanted = {1: "equal", 9: "changed"}
    assert found["layer"] == {f"L{layer}E{e}": stored for layer, stored in wanted.items() for e in range(32)}
    kept = sedetect.compression.ProtectList.load(tmp_path / "layer.json")
    experts = [one for one in kept.experts if one["name"] == "L1E28"]
    replace(kept, experts=experts).save(tmp_path / "kept.json")
    assert run("verify", TINY, listed, "--protect", tmp_path / "kept.json", *SMALL, "--max-increase", "9").code == 0


def test_lists_that_cannot_be_taken(base, tmp_path, tiny_profile):
    file = tmp_path / "list.json"
    assert run("export", tiny_profile, "--to", "json", "-o", file).code == 0
    command = ("verify", base, base, *SMALL, "--protect")
    assert "--protect: made for another model (tiny-moe); give a list of the base" in refused(run(*command, file))
    way_out = "write one by `sedetect export STATS --to json -o FILE`"
    assert f"nowhere.json: no such file; {way_out}" in refused(run(*command, tmp_path / "nowhere.json"))
    recipe = tmp_path / "recipe.yaml"
    assert run("export", tiny_profile, "--to", "llm-compressor", "--model", TINY, "-o", recipe).code == 0
    assert "recipe.yaml: is not valid JSON" in (said := refused(run(*command, recipe))) and way_out in said
    settings = tmp_path / "settings.json"
    assert run("export", tiny_profile, "--to", "gptqmodel", "--model", TINY, "-o", settings).code == 0
    said = refused(run(*command, settings))
    assert "settings.json: is a document without format" in said and way_out in said
    odd = sedetect.compression.ProtectList.load(file)
    replace(odd, experts=[{"name": "layer 1"}]).save(file)
    assert "'layer 1': not the name of an expert" in refused(run("verify", TINY, TINY, *SMALL, "--protect", file))
    replace(odd, granularity="matrix").save(file)
    assert f"{file}: damaged" in (said := refused(run(*command, file))) and way_out in said


def test_command_refuses(base, tmp_path):
    assert "no such folder" in refused(run("verify", base, tmp_path / "nowhere"))
    assert "--max-increase much: not a share" in refused(run("verify", base, base, "--max-increase", "much"))
    assert "--max-kl -1: must be at least 0" in refused(run("verify", base, base, "--max-kl", -1))
    assert "has no such expert" in refused(run("verify", base, base, "--protect", "L1E99", *SMALL))
    assert "L1E9x" in refused(run("verify", base, base, "--protect", "L1E9x", *SMALL))
    empty = put_tokenizer(tmp_path)
    assert "config.json" in refused(run("verify", base, empty, *SMALL))


def test_a_runtime_in_place_of_transformers(base, tmp_path, tiny_profile, monkeypatch):
    def scores(losses, likely, unloaded=()):
        def runtime(folder, domains, prefix):
            assert prefix == 1
            sums = {
                domain: torch.full((len(one.ids),), losses[folder.name]).double() for domain, one in domains.items()
            }
            tokens = {domain: torch.full_like(one.ids[:, 1:], likely[folder.name]) for domain, one in domains.items()}
            return Scores(sums, tokens, ["rotary", *unloaded] if folder.name == "made" else ["rotary"])

        return runtime

    made = edited(base, tmp_path / "made", rounded())
    found = verified(base, made, runtime=scores({"base": 30.0, "made": 31.5}, {"base": 4, "made": 4}))
    assert found.passed and found.overall.agreement == 1 and found.overall.kl is None
    assert found.overall.predictions == 480 - 480 // 16
    assert [found.overall.perplexity, found.overall.other] == pytest.approx([math.exp(2), math.exp(2.1)])
    assert found.overall.change.rise == pytest.approx(math.exp(0.1) - 1)
    assert [(one.expert, one.stored, one.value) for one in found.experts] == [("L1E3", "equal", None)]
    assert any("the order of experts were not compared" in note for note in found.notes)
    assert "KL" not in found.headline and not found.flips and not found.residual_max
    found.save(tmp_path / "verification.json")
    assert Verification.load(tmp_path / "verification.json") == found

    worse = scores({"base": 30.0, "made": 80.0}, {"base": 4, "made": 5}, ["lost"])
    found = verify(base, made, TEXTS, text=TEXT, protected=["L1E4"], runtime=worse)
    assert found.overall.agreement == 0 and len(found.failures) == 2 + len(found.domains)
    assert found.failures[0] == "L1E4 must be protected, but its weights are changed"
    assert found.failures[1] == "weights into which nothing was loaded: 1, first lost"
    assert "above the limit of 0.05" in found.failures[2]

    def stops(at):
        def runtime(folder, domains, prefix):
            if folder.name == at:
                raise SedetectError(f"{folder.name}: its shapes are not served")
            return worse(folder, domains, prefix)

        return runtime

    assert verified(base, made, runtime=stops("made")).failures == ["made: its shapes are not served"]
    with pytest.raises(SedetectError, match="base: its shapes are not served"):
        verified(base, made, runtime=stops("base"))
    found = verify(TINY, TINY, TEXTS, text=TEXT, stats=tiny_profile, protected="candidates", runtime=same_everywhere)
    assert found.passed and ("L1E28", "equal", True) in [
        (one.expert, one.stored, one.protected) for one in found.experts
    ]


def same_everywhere(folder, domains, prefix):
    losses = {domain: torch.ones(len(one.ids), dtype=torch.float64) for domain, one in domains.items()}
    return Scores(losses, {domain: one.ids[:, 1:] for domain, one in domains.items()}, [])


def test_a_runtime_refuses(base):
    with pytest.raises(SedetectError, match="max_kl: a runtime gives no logits"):
        verify(base, base, TEXTS, text=TEXT, limits=Limits(kl=0.1), runtime=same_everywhere)
    command = ("verify", base, base, "--for", "vllm")
    assert "--for vllm: vLLM is not installed here; install sedetect into vLLM's environment" in refused(run(*command))
    assert "--device cpu: vLLM chooses its own; leave it out" in refused(run(*command, "--device", "cpu"))
    assert "--attn eager: vLLM chooses its own; leave it out" in refused(run(*command, "--attn", "eager"))
    with pytest.raises(SedetectError, match="protected candidates: in a runtime only statistics name them; give stats"):
        verify(base, base, TEXTS, text=TEXT, protected="candidates", runtime=same_everywhere)
