"""Opening checkpoints: the real one loads, every kind of damage is one line that names the file."""

import io
import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from support.checkpoints import put_model, put_tokenizer
from support.command import SMALL, refused, spawn

import sedetect
from sedetect.analysis import analyze_weights
from sedetect.checkpoints.files import check_checkpoint, weights_digest
from sedetect.checkpoints.options import Loading
from sedetect.compression.pruning import prunable_config
from sedetect.errors import SedetectError
from sedetect.models.loading import _check_loaded, empty_model, load_model, load_tokenizer
from sedetect.profiling.estimate import make_plan

TINY = Path(__file__).parent / "data" / "tiny-moe"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path):
    """A copy of tiny-moe that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "copy"))


def refusal(function, *args, **kwargs) -> str:
    """The message of the SedetectError that the call raises, checked to be one line."""
    with pytest.raises(SedetectError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and ";" in message  # what is wrong; the way out
    return message


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_shard(folder: Path, edit) -> None:
    """Rewrite one shard and the index with edit(tensors) applied."""
    tensors = load_file(folder / SHARD)
    before = set(tensors)
    edit(tensors)
    save_file(tensors, folder / SHARD, {"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    for name in before - set(tensors):
        del index["weight_map"][name]
    for name in set(tensors) - before:
        index["weight_map"][name] = SHARD
    (folder / INDEX).write_text(json.dumps(index))


def test_loads_as_it_was_saved():
    model = load_model(TINY, loading=Loading(device="cpu"))
    assert not model.training and model.dtype == torch.bfloat16
    stored = load_file(TINY / "model-00001-of-00003.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])
    down = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj[3], stored[down])


def test_dtype_and_attention():
    model = load_model(TINY, loading=Loading(device="cpu", dtype="float32", attn="eager"))
    assert model.dtype == torch.float32 and model.config._attn_implementation == "eager"


def test_digest_follows_headers_and_values(copy):
    digest = weights_digest(TINY)
    assert len(digest) == 16 and digest == weights_digest(copy)
    edit_shard(copy, lambda tensors: [tensor.mul_(1.5) for tensor in tensors.values()])  # as a fine-tune would
    tuned = weights_digest(copy)
    assert tuned != digest
    edit_shard(copy, lambda tensors: tensors.pop("model.layers.5.input_layernorm.weight"))
    assert weights_digest(copy) not in (digest, tuned)
    assert weights_digest("") is None
    assert weights_digest("Qwen/Qwen3-30B-A3B") is None


def test_truncated_shard(copy):
    size = (copy / SHARD).stat().st_size
    with (copy / SHARD).open("rb+") as file:
        file.truncate(size - 1000)
    message = refusal(check_checkpoint, copy)
    assert SHARD in message and str(size) in message and str(size - 1000) in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 14566520\n",
        (1000).to_bytes(8, "little") + b"{",  # cut inside the header
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": {}}',
        (1).to_bytes(8, "little") + b"{",
    ],
    ids=["empty", "git-lfs pointer", "cut header", "not an object", "no offsets", "not JSON"],
)
def test_unreadable_header(copy, content):
    (copy / SHARD).write_bytes(content)
    assert SHARD in refusal(check_checkpoint, copy)
    assert SHARD in refusal(weights_digest, copy)


def test_trailing_bytes(copy):
    with (copy / SHARD).open("ab") as file:
        file.write(b"x")
    assert SHARD in refusal(check_checkpoint, copy)


def test_missing_shard(copy):
    (copy / SHARD).unlink()
    message = refusal(check_checkpoint, copy)
    assert SHARD in message and "1 of 3" in message


def opened_by_all(folder: Path, line: str) -> None:
    """Every way in refuses the folder with this line."""
    for open_it in (check_checkpoint, sedetect.profile_model, prunable_config, make_plan, analyze_weights):
        assert line in refusal(open_it, folder), open_it
    assert line in refusal(sedetect.profile_model, folder, stream=True)


def digest_of(folder: Path) -> str:
    return sedetect.profile_model(folder, text=sedetect.Text(tokens=64, seq_len=16)).stats.header.digest


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all numbered shards."""
    return {name: tensor for file in folder.glob("model-*") for name, tensor in load_file(file).items()}


def put_single(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put one file of weights in the place of all."""
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_one_file_beside_shards(tmp_path):
    """transformers reads the file and other programs what the index names: of a 4-bit file beside bfloat16, say."""
    model = put_model(tmp_path / "model")
    digest, tensors = digest_of(model), read_all(model)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    opened_by_all(model, "model.safetensors: 4 shards lie beside it, first model-00001-of-00004.safetensors")
    index = (model / INDEX).read_text()
    put_single(model, tensors)
    (model / INDEX).write_text(index)  # left over, and names nothing that is there
    assert digest_of(model) == digest


def test_shards_of_another_save(tmp_path):
    """What the index does not name is not read; an index that names other shards is told apart from a lost shard."""
    model = put_model(tmp_path / "model")
    digest = digest_of(model)
    shutil.copy(model / "model-00001-of-00004.safetensors", model / "model-00001-of-00002.safetensors")
    assert digest_of(model) == digest
    for number in (3, 4):
        (model / f"model-0000{number}-of-00004.safetensors").unlink()
    opened_by_all(model, "does not name 1 shards that are here, first model-00001-of-00002.safetensors")


def test_a_tensor_in_two_files(tmp_path):
    model = put_model(tmp_path / "model")
    digest = digest_of(model)
    first, last = model / "model-00003-of-00004.safetensors", model / "model-00004-of-00004.safetensors"
    twice = load_file(first) | load_file(last)
    save_file(twice, last, {"format": "pt"})
    assert digest_of(model) == digest  # equal values do no harm
    name = next(name for name in load_file(first) if "experts" in name)
    save_file(twice | {name: twice[name].half()}, last, {"format": "pt"})
    opened_by_all(model, f"{name} is in {first.name} too, with other values")
    twice[name][-1, -1] += 1  # its last bytes
    save_file(twice, last, {"format": "pt"})
    opened_by_all(model, f"{name} is in {first.name} too, with other values")


def test_an_index_of_slices_for_ranks(tmp_path):
    model = put_model(tmp_path / "model")
    tensors = read_all(model)
    put_single(model, tensors)
    (model / "model.safetensors").rename(model / "pytorch_model-00001-TP-000.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "pytorch_model-00001-TP-000.safetensors")}
    (model / INDEX).write_text(json.dumps(index))
    opened_by_all(model, "TP-000.safetensors: weights that are split for tensor parallelism")


def test_a_link_to_nothing(tmp_path):
    """A snapshot of the hub's cache, copied without the blobs it points to."""
    model = put_model(tmp_path / "model")
    (model / "config.json").rename(tmp_path / "blob")
    (model / "config.json").symlink_to("../blobs/5f3a")
    opened_by_all(model, "config.json: a link to ../blobs/5f3a, which does not exist")
    (model / "config.json").unlink()
    (tmp_path / "blob").rename(model / "config.json")
    shard = model / "model-00002-of-00004.safetensors"
    shard.unlink()
    shard.symlink_to("../blobs/77aa")
    opened_by_all(model, "a link to ../blobs/77aa, which does not exist (1 of 4 shards)")


def test_experts_that_are_left_out(tmp_path):
    """With a config to match, transformers numbers those behind a gap anew, and a list would name others."""

    def keep(kept: list[int]) -> Path:
        model = put_model(tmp_path / str(len(list(tmp_path.iterdir()))))
        tensors = {name: t for name, t in read_all(model).items() if ".experts." not in name}
        for name, tensor in read_all(model).items():
            if name.endswith("mlp.gate.weight"):
                tensors[name] = tensor[kept].clone()
            elif ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) in kept:
                tensors[name] = tensor
        put_single(model, tensors)
        edit_config(model, num_experts=len(kept), num_local_experts=len(kept))
        return model

    assert digest_of(keep([0, 1, 2, 3, 4])) != digest_of(keep([0, 1, 2, 3]))
    opened_by_all(keep([0, 1, 3, 4, 5]), "mlp.experts.2 is missing, and the experts go on to 5")
    opened_by_all(keep([4, 5, 6, 7]), "mlp.experts.0 is missing, and the experts go on to 7")  # of one rank


def test_what_a_hub_name_stands_for_is_checked_too(tmp_path):
    hub = tmp_path / "models--lab--moe"
    snapshot = put_model(hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    arguments = ("profile", "lab/moe", "-o", tmp_path / "out", *SMALL)
    assert spawn(*arguments, HF_HUB_CACHE=str(tmp_path)).code == 0
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    weights = read_all(snapshot)
    for number in (3, 4):
        file = snapshot / f"model-0000{number}-of-00004.safetensors"
        save_file(weights | {name: weights[name] + number}, file, {"format": "pt"})
    assert "in model-00003-of-00004.safetensors too" in refused(spawn(*arguments, HF_HUB_CACHE=str(tmp_path)))


def test_a_matrix_of_an_expert_that_is_left_out(tmp_path):
    model = put_model(tmp_path / "model")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = read_all(model)
    del tensors[name]
    put_single(model, tensors)
    opened_by_all(model, f"{name} is missing, which most experts of the layer have")
    assert "cannot be put together" in refusal(load_model, model)
    tensors = tensors | {name: torch.zeros(24, 32), name.replace("weight", "weight_scale"): torch.ones(1)}
    put_single(model, tensors)
    assert any("1 weights are not used" in str(note) for note in make_plan(model).notes)  # what one alone has is left


NAMES = {
    "another block": (lambda name: name.replace(".mlp.", ".block_sparse_moe."), "model.layers.0.block_sparse_moe."),
    "another matrix": (lambda name: name.replace("down_proj", "w2"), "model.layers.0.mlp.experts.0.w2.weight"),
    "inside a multimodal model": (lambda name: f"language_model.{name}", "first language_model.lm_head.weight"),
    "DDP": (lambda name: f"module.{name}", "take 'module.' out of the names"),
    "compiled": (lambda name: f"_orig_mod.{name}", "take '_orig_mod.' out of the names"),
    "compiled DDP": (lambda name: f"_orig_mod.module.{name}", "take '_orig_mod.module.' out of the names"),
    "FSDP": (lambda name: f"_fsdp_wrapped_module.{name}", "take '_fsdp_wrapped_module.' out of the names"),
    "compiled layers": (
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
        "take '_orig_mod.' out of the names",
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_weights_under_other_names(kind, tmp_path):
    """transformers would go on with random weights in their place."""
    rename, told = NAMES[kind]
    model = put_model(tmp_path / "model")
    put_single(model, {rename(name): tensor for name, tensor in read_all(model).items()})
    profile = partial(sedetect.profile_model, text=sedetect.Text(128, 64))
    for open_it in (load_model, profile, make_plan, analyze_weights):
        message = refusal(open_it, model)
        assert " of Qwen3MoeForCausalLM are missing, first " in message and told in message, open_it
    assert told in refusal(profile, model, stream=True)


def test_experts_that_transformers_own_class_lacks(tmp_path):
    """nomic-embed-text-v2-moe has the model_type of a dense model, and code of its own with the experts."""
    config = transformers.NomicBertConfig(
        vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    transformers.NomicBertModel(config).save_pretrained(tmp_path)
    put_tokenizer(tmp_path)
    assert "NomicBertModel: no MoE layer found; give" in refusal(sedetect.profile_model, tmp_path)
    edit_config(tmp_path, num_experts=8)
    assert "its config has num_experts 8; give a model whose" in refusal(sedetect.profile_model, tmp_path)
    edit_config(tmp_path, auto_map={"AutoModel": "modeling_nomic.NomicBertModel"})
    tensors = load_file(tmp_path / "model.safetensors")
    for open_it in (sedetect.profile_model, make_plan):
        assert "its config has num_experts 8; pass trust_remote_code=True" in refusal(open_it, tmp_path)
    tensors = {name: tensor for name, tensor in tensors.items() if ".1.mlp." not in name}
    put_single(tmp_path, tensors | {"encoder.layers.1.mlp.experts.mlp.w1": torch.ones(8 * 48, 32)})
    message = refusal(load_model, tmp_path)
    assert "first layers.1.mlp.experts.mlp.w1; pass trust_remote_code=True" in message
    assert "no MoE layer found, though" in refusal(sedetect.profile_model, tmp_path, stream=True)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 14566520\n"


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, "tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer(copy, name):
    (copy / name).write_text(POINTER)
    line = f"{name}: a git-lfs pointer and not the file itself; run `git lfs pull` in its folder"
    assert line in refusal(sedetect.profile_model, copy)
    assert line in refusal(prunable_config, copy)


READERS = dict.fromkeys(("config.json", INDEX, SHARD), (sedetect.profile_model, make_plan, prunable_config))
READERS |= {"tokenizer.json": (sedetect.profile_model, prunable_config), "generation_config.json": (prunable_config,)}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_cannot_be_read(copy, name):
    """As those of another user are; this one, also for whoever may read all files."""
    (copy / name).unlink()
    (copy / name).symlink_to("/proc/self/mem")
    for open_it in READERS[name]:
        assert f"{name}: cannot be read (Input/output error); give a file that can" in refusal(open_it, copy)


def test_a_folder_that_cannot_be_read(copy, monkeypatch):
    monkeypatch.setattr("sedetect.checkpoints.files.os.access", lambda path, mode: False)
    opened_by_all(copy, f"{copy}: cannot be read (Permission denied)")


def test_git_lfs_pointers_that_nothing_would_notice(copy):
    """A vocabulary of three words, and a file that a pruned checkpoint would have copied."""
    (copy / "generation_config.json").write_text(POINTER)
    assert "generation_config.json: a git-lfs pointer" in refusal(prunable_config, copy)
    (copy / "generation_config.json").unlink()
    (copy / "tokenizer.model").write_text(POINTER)
    load_tokenizer(copy)  # from tokenizer.json
    (copy / "tokenizer.model").unlink()
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (copy / "vocab.txt").write_text(POINTER)
    assert "vocab.txt: a git-lfs pointer" in refusal(load_tokenizer, copy)


def test_pickle_only(copy):
    for file in copy.glob("model*"):
        file.unlink()
    assert "no model.safetensors" in refusal(check_checkpoint, copy)
    torch.save({}, copy / "pytorch_model.bin")
    message = refusal(check_checkpoint, copy)
    assert "pytorch_model.bin" in message and "save_pretrained" in message


OTHERS = {
    "gguf": (["moe-Q4_K_M.gguf"], "moe-Q4_K_M.gguf: GGUF weights"),
    "adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "an adapter without its model (lab/moe); merge it",
    ),
    "unindexed": (["config.json", "model-00001-of-00002.safetensors"], "1 shards without model.safetensors.index.json"),
    "fsdp": (["config.json", "__0_0.distcp", ".metadata"], "__0_0.distcp: a part of a sharded checkpoint"),
    "fsdp folder": (["pytorch_model_fsdp_0/"], "accelerate merge-weights"),
    "deepspeed": (["config.json", "global_step10/", "zero_to_fp32.py"], "zero_to_fp32.py FOLDER OUT"),
    "pickle": (["config.json", "pytorch_model-00001-of-00002.bin"], "can run code; convert"),
    "pickle index": (["config.json", "pytorch_model.bin.index.json"], "can run code; convert"),
    "grok 2": (
        ["config.json", "pytorch_model-00000-TP-common.safetensors", "pytorch_model-00001-TP-000.safetensors"],
        "TP-common.safetensors: weights that are split for tensor parallelism",
    ),
    "vllm sharded state": (["config.json", "model-rank-0-part-0.safetensors"], "split for tensor parallelism"),
    "deepseek inference": (["config.json", "model0-mp8.safetensors"], "join the parts"),
    "megatron": (["config.json", "mp_rank_00/"], "mp_rank_00: weights that are split"),
    "onnx": (["config.json", "model.onnx", "model.onnx_data"], "model.onnx: ONNX weights"),
    "mlx": (["config.json", "weights.npz"], "weights of MLX"),
    "meta": (["params.json", "consolidated.00.pth"], "in the publisher's own form"),
    "original": (["config.json", "original/"], "in the publisher's own form"),
    "other name": (["config.json", "weights.safetensors", "training_args.bin"], "name the weights model.safetensors"),
    "trainer": (["checkpoint-100/config.json", "checkpoint-200/config.json"], "such as"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_else_is_taken_for_a_checkpoint(kind, tmp_path):
    """Each is named, with a way out of its own, by every way in."""
    names, line = OTHERS[kind]
    for name in names:
        file = tmp_path / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            content = (TINY / "config.json").read_text() if "config" in name and "adapter" not in name else "{}"
            file.write_text('{"base_model_name_or_path": "lab/moe"}' if name == "adapter_config.json" else content)
    for open_it in (check_checkpoint, sedetect.profile_model, prunable_config, make_plan, analyze_weights):
        message = refusal(open_it, tmp_path)
        assert line in message and "\n" not in message, open_it
    assert line in refusal(sedetect.profile_model, tmp_path, stream=True)


def test_a_gguf_file_and_mlx_quantization(copy):
    assert "GGUF weights" in refusal(load_model, "some/model-Q4_K_M.gguf")
    edit_config(copy, quantization={"group_size": 64, "bits": 4})
    for open_it in (load_model, check_checkpoint, make_plan):
        assert "quantized by MLX (4 bits)" in refusal(open_it, copy)


def test_an_adapter_beside_the_weights(copy, monkeypatch):
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for open_it in (prunable_config, make_plan, analyze_weights):
        assert "adapter_config.json: an adapter beside the weights; merge it" in refusal(open_it, copy)
    assert "an adapter beside the weights" in refusal(sedetect.profile_model, copy, stream=True)
    monkeypatch.setattr("sedetect.models.loading.importlib.util.find_spec", lambda name: None)
    assert "or pip install peft" in refusal(load_model, copy)


def test_an_adapter_beside_the_weights_is_loaded(copy):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(load_model(TINY), config).save_pretrained(copy)
    short = sedetect.Text(tokens=512, seq_len=128)
    adapted, plain = (sedetect.profile_model(folder, text=short).stats for folder in (copy, TINY))
    assert adapted.header.digest != plain.header.digest
    assert any(not a.equal(b) for a, b in zip(adapted.banks.values(), plain.banks.values()))


def test_no_warnings_of_transformers(tmp_path):
    untied = put_model(tmp_path / "model")
    edit_config(untied, tie_word_embeddings=True)
    logger, stream = logging.getLogger("transformers"), io.StringIO()
    handler, level = logging.StreamHandler(stream), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        load_model(TINY)
        load_tokenizer(TINY)
        empty_model(TINY)
        sedetect.profile_model(untied, text=sedetect.Text(tokens=64, seq_len=16), stream=True)
        assert logger.level == logging.WARNING
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert not stream.getvalue()


@pytest.mark.parametrize("content", ["{", "[]", "", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}'])
def test_bad_index(copy, content):
    (copy / INDEX).write_text(content)
    assert INDEX in refusal(check_checkpoint, copy)


def test_bad_config(copy):
    for content in (b"{", b"[]", b"\xff\xfe"):
        (copy / "config.json").write_bytes(content)
        assert "config.json" in refusal(load_model, copy)
    (copy / "config.json").unlink()
    assert "config.json: missing" in refusal(load_model, copy)


def test_config_of_bad_values(copy):
    edit_config(copy, hidden_size="x")
    assert "hidden_size" in refusal(load_model, copy)
    edit_config(copy, hidden_size=256, num_attention_heads=0)
    assert str(copy) in refusal(load_model, copy)


def test_unknown_architecture(copy):
    edit_config(copy, model_type="zork")
    message = refusal(load_model, copy)
    assert "'zork'" in message and transformers.__version__ in message and "trust_remote_code" not in message
    edit_config(copy, auto_map={"AutoModelForCausalLM": "modeling_zork.Zork"})
    assert "pass trust_remote_code=True to run" in refusal(load_model, copy)
    edit_config(copy, model_type=None)
    assert "model_type None" in refusal(load_model, copy)


def test_remote_code_is_run_only_when_asked(copy):
    flag = copy / "ran"
    (copy / "modeling_zork.py").write_text(f"open({str(flag)!r}, 'w').close()\nclass ZorkConfig: pass\n")
    edit_config(copy, model_type="zork", auto_map={"AutoConfig": "modeling_zork.ZorkConfig"})
    refusal(load_model, copy)
    assert not flag.exists()
    refusal(load_model, copy, Loading(trust_remote_code=True))  # it is not a model; but it ran
    assert flag.exists()


def test_missing_weights_are_refused(copy):
    names = ["model.layers.5.input_layernorm.weight", "model.layers.5.self_attn.q_norm.weight"]
    edit_shard(copy, lambda tensors: [tensors.pop(name) for name in names])
    message = refusal(load_model, copy)
    assert "2 weights" in message and names[0] in message


def test_missing_expert_is_refused(copy):
    """transformers stacks the 31 that are left, which would renumber the experts behind the missing one."""
    edit_shard(copy, lambda tensors: tensors.pop("model.layers.5.mlp.experts.3.down_proj.weight"))
    message = refusal(load_model, copy)
    assert (
        "model.layers.5.mlp.experts.down_proj" in message and "(31, 256, 48)" in message and "(32, 256, 48)" in message
    )


def test_weights_of_another_shape_are_refused(copy, caplog):
    def shorten(name):
        return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})

    edit_shard(copy, shorten("model.layers.5.self_attn.q_proj.weight"))
    message = refusal(load_model, copy)
    assert "model.layers.5.self_attn.q_proj.weight" in message and "(255, 256)" in message
    edit_shard(copy, shorten("model.layers.5.mlp.experts.3.down_proj.weight"))
    assert "model.layers.5.mlp.experts.down_proj" in refusal(load_model, copy)
    assert "LOAD REPORT" not in caplog.text


def test_unexpected_weights_are_warned_about(copy):
    edit_shard(copy, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    with pytest.warns(UserWarning, match="1 weights are not used by Qwen3MoeForCausalLM, first model.extra.weight"):
        load_model(copy, loading=Loading(device="cpu"))


def test_bad_arguments():
    assert "dtype int8: " in refusal(load_model, TINY, Loading(dtype="int8"))
    assert "dtype zork: " in refusal(load_model, TINY, Loading(dtype="zork"))
    assert "device zork: " in refusal(load_model, TINY, Loading(device="zork"))
    assert "nosuch" in refusal(load_model, TINY, Loading(attn="nosuch"))


def test_experts_quantized_in_a_form_that_is_not_loaded():
    """GPTQ and AWQ name their weights so that stacked experts stay empty; their packages are not installed here."""
    loaded = {"missing_keys": {"lm_head.weight", "model.layers.0.mlp.experts.down_proj"}, "unexpected_keys": set()}
    message = refusal(_check_loaded, "folder", "Qwen3MoeForCausalLM", loaded, "gptq")
    assert "quantized by gptq into the experts of Qwen3MoeForCausalLM, first model.layers.0.mlp.experts" in message
    assert "lm_head.weight; give a complete checkpoint" in refusal(_check_loaded, "folder", "Model", loaded, None)


def test_a_quantization_whose_package_is_missing(copy):
    edit_config(copy, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    assert "AWQ" in refusal(load_model, copy, Loading(device="cpu"))


def test_missing_path(tmp_path):
    for path in (tmp_path / "none", "./none", "a/b/c"):
        assert f"{path}: no such folder" in refusal(load_model, path)
        assert f"{path}: no such folder" in refusal(load_tokenizer, path)
        assert f"{path}: no such folder" in refusal(check_checkpoint, path)
    assert "is a file" in refusal(load_model, TINY / "config.json")
    assert "is a file" in refusal(check_checkpoint, TINY / "config.json")


def test_hub_name_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer):
        message = refusal(load, "nosuch/model")
        assert message.startswith("nosuch/model: ") and "hub" in message


def test_tokenizer(copy):
    assert load_tokenizer(TINY)("hello")["input_ids"][0] == 0
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(load_tokenizer, copy)
    (copy / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(load_tokenizer, copy)
    (copy / "tokenizer_config.json").unlink()  # transformers makes an empty one
    assert "no tokenizer" in refusal(load_tokenizer, copy)


def test_multimodal_checkpoint(tmp_path):
    """A config that only image-text classes serve; the text of such a model is profiled like any other's."""
    text = {
        "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "num_experts": 4,
        "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    transformers.Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load_model(tmp_path, loading=Loading(device="cpu"))
    assert isinstance(model, transformers.Qwen3VLMoeForConditionalGeneration)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)
