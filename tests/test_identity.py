"""Which model it is: one digest however a model is opened, another one for other weights."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import put_model, put_tokenizer, to_fp8
from support.families import FAMILIES
from support.models import CONFIGS, TINY, random_model
from transformers import AutoModelForCausalLM, Llama4Config, Llama4ForConditionalGeneration, Qwen3MoeModel

import sedetect
from sedetect import SedetectError
from sedetect.compression.pruning import check_folder
from sedetect.models.identity import (
    Weight,
    check_statistics,
    checksum,
    digest_notes,
    model_digest,
    model_dtype,
    model_id,
    model_name,
    named_weights,
)  # fmt: skip
from sedetect.models.loading import open_model
from sedetect.stats.model import Header, ModelStats, same_model

SHORT = {"text": sedetect.Text(tokens=256, seq_len=64)}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def word_sum(tensor: torch.Tensor) -> int | None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(tensor, requires_grad=False)
    return checksum([Weight("weight", module, "weight")])


def test_one_digest_for_all_paths_to_a_folder(tmp_path, monkeypatch):
    """Hub names, snapshot folders, relative paths, and a relative path that means nothing any more."""
    hub = tmp_path / "hub" / "models--lab--moe"
    snapshot = put_model(hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    other = put_model(hub / "snapshots" / ("b" * 40), seed=1)
    (hub / "refs" / "v2").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named, second = (load("lab/moe", cache_dir=tmp_path / "hub", revision=name) for name in ("main", "v2"))
    monkeypatch.chdir(tmp_path / "hub")
    relative = load("models--lab--moe/snapshots/" + "a" * 40)
    monkeypatch.chdir("/")
    models = [named, relative, load(snapshot)]
    assert {model_digest(model) for model in models} == {model_digest(named)}
    assert model_name(models[2]) == model_name(named) == "lab/moe"
    assert model_id(second) == model_id(named) and not same_model(model_digest(second), model_digest(named))
    assert model_digest(second) == model_digest(load(other))


def test_every_changed_weight_is_another_model():
    model = random_model("deepseek_v3")
    seen = {model_digest(model)}
    weights = named_weights(model)
    assert any(name.endswith("e_score_correction_bias") for name in weights), "a buffer that is stored"
    for weight in weights.values():
        flat = weight.tensor.data.view(-1)
        flat[len(flat) // 2] += 1e-3
        seen.add(model_digest(model))
    assert len(seen) == len(weights) + 1
    down = model.model.layers[1].mlp.experts.down_proj.data
    down[[0, 1]] = down[[1, 0]]
    assert model_digest(model) not in seen, "experts that change places"


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 3, 5), (2, 70_001), (3, 2, 40_000)])
def test_the_checksum_is_of_values(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = word_sum(values)
    assert total == word_sum(values.float())
    assert word_sum(values.half()) == word_sum(values.half().float())
    if values.dim() > 1:
        assert total == word_sum(values.mT.contiguous().mT)
        assert total != word_sum(values.flip(0))
        assert total != word_sum(values.flip(-1))
    for place in (0, -1):
        changed = values.float().view(-1)
        changed[place] = torch.nextafter(changed[place], torch.tensor(9.0))
        assert word_sum(changed.view(shape)) != total


def test_dtype_and_tied_weights_and_token_ids(tmp_path):
    folder = put_model(tmp_path / "tied", tie_word_embeddings=True)
    model = load(folder)
    digest = model_digest(model)
    model.config.pad_token_id, model.config.use_cache = 5, False
    assert model_digest(model) == digest
    assert model_digest(load(TINY)) == model_digest(load(TINY, dtype=torch.float32)) != digest
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1
    assert model_digest(model) != digest


def test_streamed_and_resumed_profiles_have_the_digest_of_resident_ones(tmp_path):
    folder = put_model(tmp_path / "model")
    whole = sedetect.profile_model(folder, **SHORT).stats
    streamed = sedetect.profile_model(folder, **SHORT, stream=True, resume=tmp_path / "kept").stats
    resumed = sedetect.profile_model(folder, **SHORT, stream=True, resume=tmp_path / "kept").stats
    assert whole.header.digest == streamed.header.digest == resumed.header.digest == model_digest(load(folder))


def test_a_text_model_inside_a_multimodal_one(tmp_path):
    text = {
        "hidden_size": 32, "intermediate_size": 16, "intermediate_size_mlp": 16, "num_hidden_layers": 2,
        "vocab_size": 4096, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
        "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    }  # fmt: skip
    whole = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    put_tokenizer(tmp_path)
    opened, tokenizer = open_model(tmp_path)[:2]
    if FAMILIES["llama4"].adjust is not None and hasattr(opened, "language_model"):
        FAMILIES["llama4"].adjust(opened)
    stats = sedetect.profile_model(opened, tokenizer=tokenizer, **SHORT).stats
    assert stats.header.digest == model_digest(whole)
    check_folder(tmp_path, stats)
    with torch.no_grad():
        whole.language_model.model.norm.weight[0] += 1
    check_statistics(Header(digest=stats.header.digest, dtype="float32"), load(tmp_path), "stats")
    with pytest.raises(SedetectError, match="with other weights"):
        check_statistics(stats.header, whole, "stats")


def test_prune_refuses_statistics_of_edited_weights(tmp_path):
    folder = put_model(tmp_path / "model")
    model = load(folder)

    def profiled():
        with sedetect.profile(model, source="text") as prof:
            model(input_ids=torch.arange(5, 40)[None])
        return prof.stats

    check_folder(folder, profiled())
    with torch.no_grad():
        model.model.layers[2].mlp.experts.gate_up_proj[3, 2, 1] += 0.01
    edited = profiled()
    with pytest.raises(SedetectError, match="another revision, or edited or adapted ones; profile this folder"):
        check_folder(folder, edited)
    with pytest.raises(SedetectError, match="another model"):
        check_folder(TINY, edited)
    with pytest.raises(SedetectError, match="differ in the digest of their weights"):
        edited.merge(sedetect.profile_model(folder, **SHORT).stats)


def test_another_precision_is_named(tmp_path):
    folder = put_model(tmp_path / "model")
    half = load(folder, dtype=torch.bfloat16)
    header = Header(digest=model_digest(half), dtype="bfloat16", model="model")
    check_folder(folder, ModelStats({}, header))
    with pytest.raises(SedetectError, match="run in float32, and ran in bfloat16 then; give dtype bfloat16"):
        check_statistics(header, load(folder, dtype=torch.float32), "stats")


def test_older_files_are_read_and_say_that_they_do_not_know_the_weights(tmp_path):
    model = random_model("qwen3_moe")
    header = Header(digest="0123456789abcdef", model="moe", dtype="float32")
    with pytest.raises(SedetectError, match="an earlier sedetect wrote these statistics of moe"):
        check_statistics(header, model, "stats")
    path = tmp_path / "old.safetensors"
    metadata = {"format": "sedetect-stats", "version": "1", "header": header.to_json()}
    save_file({}, path, metadata)
    old = ModelStats.load(path)
    assert old.header == header and old.header.merge(header).digest == header.digest
    assert same_model(header.digest, header.digest) and not same_model(header.digest, model_digest(model))


def test_weights_that_are_nowhere_are_noted():
    model = random_model("qwen3_moe").to("meta")
    digest = model_digest(model)
    assert digest == f"{model_id(random_model('qwen3_moe'))}-unchecked"
    assert [note.code for note in digest_notes(model, digest)] == ["unchecked_weights"]


def test_quantized_and_dequantized_weights_share_the_id(tmp_path):
    folder = put_model(tmp_path / "model")
    plain = load(folder)
    shutil.copytree(folder, tmp_path / "fp8")
    to_fp8(tmp_path / "fp8")
    dequantized = load(tmp_path / "fp8")
    assert model_id(dequantized) == model_id(plain) and model_digest(dequantized) != model_digest(plain)
    stored = random_model("qwen3_moe")
    stored.lm_head.weight = torch.nn.Parameter(stored.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert model_dtype(stored) == "float32 (float8_e4m3fn weights)"


def test_a_bare_base_model_has_an_id_of_its_own():
    assert model_id(Qwen3MoeModel(CONFIGS["qwen3_moe"]())) != model_id(random_model("qwen3_moe"))


def test_a_lora_adapter_is_another_model():
    peft = pytest.importorskip("peft")
    model = random_model("qwen3_moe")
    before = model_digest(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert model_digest(adapted.base_model.model) != before
    merged = adapted.merge_and_unload()
    assert model_id(merged) == before.partition("-")[0] and model_digest(merged) != before
