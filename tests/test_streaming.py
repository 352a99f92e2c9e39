"""Streamed profiles: layer by layer from disk, and bit for bit what the resident model gives."""

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import OPTIONAL, SHORT, TEXTS, save_random, to_fp8
from support.compare import assert_same_profile
from support.models import COMMON, CONFIGS, TINY
from transformers import AutoModelForCausalLM, Gemma4TextConfig, GlmMoeDsaConfig, PreTrainedModel, Qwen3MoeConfig, utils
from transformers.utils import logging as transformers_logging

import sedetect
from sedetect import SedetectError
from sedetect.checkpoints import memory, staging
from sedetect.checkpoints.memory import dequantized_here, free_memory, too_large, weight_bytes
from sedetect.checkpoints.staging import StoredTensor
from sedetect.models import compiled
from sedetect.models.loading import load_model
from sedetect.models.streamed import StreamedModel, open_streamed
from sedetect.profiling import profiler
from sedetect.profiling.streaming import check_layers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a random checkpoint in several shards, by layout."""
    root, made = tmp_path_factory.mktemp("layouts"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_random(CONFIGS[name](), root / name, max_shard_size="200KB")
        return made[name]

    return make


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tiny_moe(dtype):
    settings = {"text": sedetect.Text(1024, 128), "loading": sedetect.Loading(dtype=dtype), **OPTIONAL}
    streamed = sedetect.profile_model(TINY, stream=True, **settings)
    assert_same_profile(streamed, sedetect.profile_model(TINY, stream=False, **settings))
    assert (streamed.streamed.layers, streamed.streamed.resumed, streamed.streamed.write) == (10, 0, 0)
    assert streamed.streamed.read > 0 and streamed.seconds == streamed.streamed.compute > 0
    assert [str(expert) for expert in sedetect.rank(streamed.stats).super_experts] == ["L1E28"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_in_shards_and_domains(checkpoint, name):
    assert len(list(checkpoint(name).glob("*.safetensors"))) > 2
    resident = sedetect.profile_model(checkpoint(name), TEXTS, **SHORT, **OPTIONAL)
    assert resident.streamed is None and list(resident.domains) == list(TEXTS)
    seen = []
    streamed = sedetect.profile_model(
        checkpoint(name), TEXTS, **SHORT, **OPTIONAL, stream=True, progress=lambda *step: seen.append(step)
    )
    assert_same_profile(streamed, resident)
    total = resident.stats.header.tokens
    assert [step for step in seen if step[1] == total] == [(f"layer {i} of 3", total, total) for i in (1, 2, 3)]


def test_another_precision_and_eager_attention(checkpoint):
    settings = SHORT | {"loading": sedetect.Loading(dtype="bfloat16", attn="eager")}
    resident = sedetect.profile_model(checkpoint("qwen2_moe"), TEXTS, **settings)
    assert resident.stats.header.dtype == "bfloat16"
    assert_same_profile(sedetect.profile_model(checkpoint("qwen2_moe"), TEXTS, **settings, stream=True), resident)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_fp8(tmp_path, name, device):
    """What transformers makes of such a checkpoint: without a GPU, weights in bfloat16."""
    folder = save_random(CONFIGS[name](), tmp_path, dtype=torch.bfloat16)
    as_stored, weights = (
        sedetect.profile_model(folder, TEXTS, **SHORT, loading=sedetect.Loading(device=device)),
        weight_bytes(folder),
    )
    to_fp8(folder)
    resident = sedetect.profile_model(folder, TEXTS, **SHORT, loading=sedetect.Loading(device=device))
    streamed = sedetect.profile_model(folder, TEXTS, **SHORT, loading=sedetect.Loading(device=device), stream=True)
    for bank, state in streamed.stats.banks.items():
        assert state.equal(resident.stats.banks[bank], sums_rtol=1e-12 if device == "cuda" else 0.0), bank
    headers = weight_bytes(folder), weight_bytes(folder, dequantized={"fp8"})
    assert headers[0] < headers[1] and abs(headers[1] - weights) < 0.05 * weights  # scales are left over
    names = {
        key
        for layer in open_streamed(folder, loading=sedetect.Loading(device="cpu"), weights=False).stored
        for key in layer
    }
    assert sum(key.endswith("_scale_inv") for key in names) > 40
    assert any(  # eight bits are not sixteen
        not torch.equal(state.out_max, as_stored.stats.banks[bank].out_max)
        for bank, state in resident.stats.banks.items()
    )


def test_hidden_states_on_disk_alone(checkpoint, tmp_path, monkeypatch):
    expected = sedetect.profile_model(checkpoint("qwen2_moe"), TEXTS, stream=True, **SHORT)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(SedetectError, match=r"hidden states of \d+ tokens take .*resume"):
        sedetect.profile_model(checkpoint("qwen2_moe"), TEXTS, stream=True, **SHORT)
    found = sedetect.profile_model(checkpoint("qwen2_moe"), TEXTS, stream=True, resume=tmp_path / "r", **SHORT)
    assert_same_profile(found, expected)
    assert found.streamed.write > 0


def test_chosen_where_the_weights_do_not_fit(checkpoint, monkeypatch):
    folder = checkpoint("gpt_oss")
    needed = sum(p.nbytes for p in load_model(folder).parameters())
    for free, dtype, streamed in [(needed, "auto", True), (2 * needed, "auto", False), (2 * needed, "float64", True)]:
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert (too_large(folder, "cpu", dtype) is not None) == streamed
    monkeypatch.setattr(memory, "free_memory", lambda device: needed)
    with pytest.warns(UserWarning, match="of weights do not fit the .* free on cpu: streaming them layer by layer"):
        assert (
            sedetect.profile_model(folder, TEXTS, loading=sedetect.Loading(device="cpu"), **SHORT).streamed.layers == 3
        )
    assert (
        sedetect.profile_model(folder, TEXTS, loading=sedetect.Loading(device="cpu"), stream=False, **SHORT).streamed
        is None
    )


def test_packed_weights_take_what_they_stand_for(tmp_path, monkeypatch):
    """FP4 and MXFP4: two values to a byte, sixteen bits each where transformers dequantizes them."""
    scale = torch.zeros(8, 1, dtype=torch.uint8)
    stored = {
        "a.weight": torch.zeros(8, 16, dtype=torch.int8), "a.scale": scale.view(torch.float8_e8m0fnu),
        "b.down_proj_blocks": torch.zeros(8, 1, 16, dtype=torch.uint8), "b.down_proj_scales": scale.clone(),
        "c.weight": torch.zeros(8, 16, dtype=torch.int8), "c.weight_scale": torch.ones(8, 1),  # INT8
    }  # fmt: skip
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    as_stored = sum(tensor.nbytes for tensor in stored.values())
    assert weight_bytes(tmp_path) == as_stored
    assert weight_bytes(tmp_path, dequantized={"fp8"}) == as_stored + 3 * 128 + 8
    assert weight_bytes(tmp_path, dequantized={"mxfp4"}) == as_stored + 3 * 128
    assert weight_bytes(tmp_path, "float32", {"mxfp4"}) == weight_bytes(tmp_path, "float32") + 7 * 128
    both = weight_bytes(tmp_path, dequantized={"fp8", "mxfp4"})
    monkeypatch.setattr(memory, "dequantized_here", lambda: {"fp8", "mxfp4"})
    for free, fits in ((both, False), (2 * both, True)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert (too_large(tmp_path, "cpu") is None) == fits


@pytest.mark.parametrize(
    ("capability", "kernels", "expected"),
    [(None, False, {"fp8", "mxfp4"}), ((8, 6), True, {"fp8"}), ((8, 9), False, {"mxfp4"}), ((9, 0), True, set())],
)
def test_what_transformers_dequantizes(monkeypatch, capability, kernels, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(utils, "is_kernels_available", lambda: kernels)
    assert dequantized_here() == expected


def test_free_memory_in_a_container(tmp_path, monkeypatch):
    """What the limit leaves, cached files not counted as used."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    everything = free_memory(torch.device("cpu"))
    for name, text in {"max": "1000000", "current": "900000"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    assert free_memory(torch.device("cpu")) == 100_000
    (tmp_path / "memory.stat").write_text("anon 70\nfile 5000\ninactive_file 3000\nactive_file 1500\n")
    assert free_memory(torch.device("cpu")) == 104_500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > everything / 2


def test_one_layer_has_weights_at_a_time(checkpoint):
    """Weights as from_pretrained loads them; before and after, none that a checkpoint holds."""
    resident, streamed = load_model(checkpoint("deepseek_v3")), open_streamed(checkpoint("deepseek_v3"))
    weights = resident.state_dict()
    outside = {name for name in weights if not name.startswith("model.layers.")} - {"lm_head.weight"}
    for number in (None, 0, 1, 2):
        if number is not None:
            streamed.load(number)
        loaded = {name: tensor for name, tensor in streamed.model.state_dict().items() if not tensor.is_meta}
        assert loaded.keys() == outside | {name for name in weights if name.startswith(f"model.layers.{number}.")}
        assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())
        if number is not None:
            streamed.free(number)
    stored = [tensor for part in (*streamed.stored, streamed.rest) for tensor in part.values()]
    assert sum(tensor.nbytes for tensor in stored) == sum(tensor.nbytes for tensor in weights.values())
    assert any(name.endswith("inv_freq") for name, _ in resident.named_buffers())
    for (name, here), (_, there) in zip(streamed.model.named_buffers(), resident.named_buffers(), strict=True):
        assert torch.equal(here, there) if name not in weights else here.is_meta, name


def test_the_next_layer_is_read_meanwhile(checkpoint, monkeypatch):
    """Its reading begins before the first batch of a layer is done, and no more than the two have weights."""
    begun = [threading.Event() for _ in range(4)]
    begun[3].set()
    original = StreamedModel.load

    def load(self, number: int) -> float:
        assert all(parameter.is_meta for parameter in self.layers[number].parameters())
        begun[number].set()
        held.append(self)
        return original(self, number)

    def progress(layer: str, done: int, total: int) -> None:
        number = int(layer.split()[1])  # from 1: the number, from 0, of the next
        assert begun[number].wait(20)
        assert not number < 2 or not begun[number + 1].is_set()
        for place, other in enumerate(held[0].layers):
            if place not in (number - 1, number):
                assert all(parameter.is_meta for parameter in other.parameters())

    held = []
    monkeypatch.setattr(StreamedModel, "load", load)
    sedetect.profile_model(checkpoint("qwen3_moe"), TEXTS, stream=True, **SHORT, progress=progress)
    assert len(held) == 3


def test_layers_beyond_the_config_are_left_out(checkpoint, tmp_path):
    """As checkpoints with layers for multi-token prediction have them."""
    folder = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    resident = sedetect.profile_model(folder, TEXTS, stream=False, **SHORT)
    assert resident.stats.header.layers == {"decoder": 2}
    assert any("weights are not used by Qwen3MoeForCausalLM" in str(note) for note in resident.stats.header.notes)
    assert_same_profile(sedetect.profile_model(folder, TEXTS, stream=True, **SHORT), resident)


@pytest.mark.parametrize("start", [0, 8, 64, 1003])
def test_a_tensor_anywhere_in_a_file(tmp_path, start):
    values = torch.randn(5, 7)
    (tmp_path / "f").write_bytes(bytes(start) + values.numpy().tobytes() + b"rest")
    stored = StoredTensor(tmp_path / "f", start, (5, 7), "F32")
    assert torch.equal(stored[...], values) and torch.equal(stored[1:3], values[1:3])
    assert start % 4 or stored[...].data_ptr() % 64 == start % 64
    assert StoredTensor(tmp_path / "f", start, (0, 7), "BF16")[...].shape == (0, 7)
    with pytest.raises(SedetectError, match="ends early, so it changed during the run"):
        StoredTensor(tmp_path / "f", start + 8, (5, 7), "F32")[...]


def test_damage_is_found_before_a_weight_is_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "read_bytes", lambda *_: pytest.fail("read"))
    folder = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())

    def refusal(**changes) -> str:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(SedetectError) as caught:
            sedetect.profile_model(folder, TEXTS, text=sedetect.Text(seq_len=64), stream=True)
        return str(caught.value)

    assert "weights do not fit Qwen3MoeForCausalLM, first lm_head.weight" in refusal(vocab_size=4095)
    assert "are missing, first model.layers.3" in refusal(num_hidden_layers=4)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    weights = load_file(shard)
    save_file(weights | {name: weights[name][:-1].contiguous()}, shard, {"format": "pt"})
    assert "cannot be put together from the checkpoint's, first model.layers.2" in refusal()


@pytest.mark.parametrize(
    ("config", "own", "why"),
    [
        (
            GlmMoeDsaConfig,
            {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
             "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
             "first_k_dense_replace": 1},
            "its layers hand on more than hidden states",
        ),
        (
            Gemma4TextConfig,
            {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "head_dim": 8, "global_head_dim": 8,
             "moe_intermediate_size": 24, "hidden_size_per_layer_input": 0},
            "shared_kv_states of layer 0 is a ",
        ),
    ],
)  # fmt: skip
def test_state_that_crosses_layers_is_refused(tmp_path, monkeypatch, config, own, why):
    folder = save_random(config(**COMMON | own), tmp_path)
    assert sedetect.profile_model(folder, TEXTS, stream=False, **SHORT).stats.banks
    monkeypatch.setattr(StreamedModel, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SedetectError, match=f"{why}.*so its layers cannot be run one after another; load it whole"):
        sedetect.profile_model(folder, TEXTS, stream=True, resume=tmp_path / "resume", **SHORT)
    assert not (tmp_path / "resume").exists()


def test_arguments_made_of_earlier_layers_are_refused(checkpoint):
    """A model that lets what it makes of the hidden states between two layers into the second one's arguments."""
    streamed = open_streamed(checkpoint("qwen3_moe"))
    ids = torch.arange(4)[None]

    def changed(module, args, kwargs):
        return args, kwargs | {"position_ids": kwargs["position_ids"] + args[0].isfinite().all()}

    hook = streamed.layers[1].register_forward_pre_hook(changed, with_kwargs=True)
    with pytest.raises(SedetectError, match="position_ids of layer 1 depends on what earlier layers gave"):
        check_layers(streamed, ids)
    hook.remove()
    assert check_layers(streamed, ids)(7) == 7


def test_layers_that_write_to_a_shared_table_are_refused(checkpoint):
    """Such a table cannot be told from one that is only read until the layer runs."""
    folder = checkpoint("qwen3_moe")
    layer = type(load_model(folder).model.layers[0])
    own = layer.forward

    def writing(self, *args, **kwargs):
        kwargs.pop("table", {})["new"] = 1
        return own(self, *args, **kwargs)

    def calling(self, *args, **kwargs):
        return torch.nn.Module.__call__(self, *args, **kwargs, table={"old": 0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", writing)
        patch.setattr(layer, "__call__", calling, raising=False)
        with pytest.raises(SedetectError, match="layer 0 writes to its table, so its layers cannot be run one after"):
            sedetect.profile_model(folder, TEXTS, stream=True, **SHORT)
    assert sedetect.profile_model(folder, TEXTS, stream=True, **SHORT).stats.banks


def test_the_process_is_left_as_it_was(checkpoint):
    """Environment, transformers' methods and progress bar, the numbers of compiled graphs."""

    def state():
        methods = vars(PreTrainedModel)["_load_pretrained_model"], vars(PreTrainedModel)["_finalize_model_loading"]
        shown, numbers = transformers_logging.is_progress_bar_enabled(), dict(compiled._attached)
        return dict(os.environ), methods, shown, numbers, torch.is_grad_enabled()

    before, during = state(), []
    sedetect.profile_model(
        checkpoint("qwen3_moe"), TEXTS, **SHORT, stream=True, progress=lambda *_: during.append(state())
    )
    assert state() == before and any(one != before for one in during)


def test_layers_are_attached_once(checkpoint, monkeypatch):
    calls, original = [], profiler.attach
    monkeypatch.setattr(profiler, "attach", lambda *args, **how: calls.append(args) or original(*args, **how))
    result = sedetect.profile_model(checkpoint("qwen3_moe"), TEXTS, **SHORT, stream=True)
    assert len(calls) == 3 and len(result.domains) == 3


def test_what_needs_the_whole_model_is_refused(checkpoint):
    folder = checkpoint("qwen3_moe")
    for option in ("residual", "until_stable"):
        with pytest.raises(SedetectError, match=f"{option}: needs the whole model"):
            sedetect.profile_model(folder, TEXTS, stream=True, **{option: 2})
    with pytest.raises(SedetectError, match="a loaded model is not streamed"):
        sedetect.profile_model(load_model(folder), TEXTS, stream=True)


# Peak of the resident set, files mapped into it counted, from after a first small profile to the end.
PEAK = """
import ctypes, sys, warnings
import sedetect
import torch
from pathlib import Path
from sedetect.checkpoints.staging import Staging
from sedetect.models.streamed import StreamedModel

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

def init(self, *args, **kwargs):
    original(self, *args, **kwargs)
    self.staging = Staging(torch.device("cpu"), None, threads=2, size=2**20)

tiny, folder, how = sys.argv[1:]
if how == "staged":
    original, StreamedModel.__init__ = StreamedModel.__init__, init
    # No tensor of a layer stays in the heap (mallopt's M_MMAP_THRESHOLD): on a GPU it would not either.
    ctypes.CDLL(None).mallopt(-3, 2**18)
texts = {"text": ["a b c d e f g h " * 100]}
sedetect.profile_model(tiny, texts, text=sedetect.Text(64, 32), stream=True)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
sedetect.profile_model(folder, texts, text=sedetect.Text(128, 32, batch_size=2), stream=True)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("how", ["read", "staged"])
def test_memory_is_that_of_three_layers(tmp_path, how):
    """A checkpoint of 0.4 GB: it takes less than embeddings, three of six layers, and hidden states."""
    sizes = {
        "hidden_size": 512,
        "moe_intermediate_size": 320,
        "num_experts": 32,
        "num_hidden_layers": 6,
        "head_dim": 64,
    }
    config = Qwen3MoeConfig(**COMMON | sizes)
    save_random(config, tmp_path, max_shard_size="120MB")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    assert layer > 60e6
    limit = 4096 * 512 * 4 + 3 * layer + 128 * 512 * 4
    command = [sys.executable, "-c", PEAK, TINY, tmp_path, how]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert layer < int(done.stdout) < limit


def test_a_converter_is_copied_for_each_weight_not_for_each_tensor(monkeypatch):
    """Of 10 layers with two stacked weights, made of 960 tensors."""
    copied, original = [], copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", lambda one, *rest: copied.append(type(one).__name__) or original(one, *rest))
    model = open_streamed(TINY, sedetect.Loading("cpu"))
    assert copied.count("WeightConverter") in range(20, 23)
    copied.clear()
    model.load(1)
    assert copied.count("WeightConverter") in range(2, 5)
    expected = load_model(TINY).model.layers[1].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.layers[1].state_dict().items())
