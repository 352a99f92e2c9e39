"""Random checkpoints on disk, with tiny-moe's tokenizer, and short texts to run them on."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import sedetect
from support.models import CONFIGS, TINY, random_model
from support.quantized import fp4, fp8

INDEX = "model.safetensors.index.json"


def put_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def put_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A random Qwen3-MoE checkpoint of 3 layers and 8 experts in several shards, with tiny-moe's tokenizer."""
    config = CONFIGS["qwen3_moe"]()
    for name, value in ({"vocab_size": 4096} | changes).items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="200KB")
    return put_tokenizer(folder)


WORDS = {"greek": "alpha beta gamma delta", "numbers": "one two three four five", "colors": "red green blue"}
TEXTS = {domain: [" ".join(f"{words} {n}" for n in range(60))] for domain, words in WORDS.items()}
SHORT = {"text": sedetect.Text(tokens=400, seq_len=16, batch_size=3)}
OPTIONAL = {"measuring": sedetect.Measuring(channels=True, coactivation=True, first_rows=True)}


def save_random(config, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """A random checkpoint with outputs of the size a trained one has, and tiny-moe's tokenizer."""
    torch.manual_seed(0)
    config.vocab_size = 4096
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
    model.save_pretrained(folder, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


_SMALL = CONFIGS["qwen3_moe"]().to_dict() | {
    "num_local_experts": 8,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
}
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


def save_family(name, folder):
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


def to_fp8(folder: Path, block: int = 8) -> None:
    """Store the matrices of a checkpoint's layers as published FP8 ones are: with a scale per block, which need not
    divide them."""
    for shard in folder.glob("*.safetensors"):
        stored = {}
        for name, weight in load_file(shard).items():
            stored[name] = weight
            if weight.dim() == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
                (stored[name],), (stored[f"{name}_scale_inv"],) = fp8(weight[None].float(), (block, block))
        save_file(stored, shard, {"format": "pt"})
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    _say_quantized(folder, settings)


def to_mxfp4(folder: Path) -> None:
    """Store the experts of a GPT-OSS checkpoint of one shard as it ships: blocks of 32 values, two to a byte, with the
    bytes of their exponents."""
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            value, scale = fp4(weight.float().transpose(1, 2))
            stored |= {f"{name}_blocks": value.unflatten(-1, (-1, 16)), f"{name}_scales": scale}
        else:
            stored[name] = weight
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    _say_quantized(folder, {"quant_method": "mxfp4"})


def _say_quantized(folder: Path, how: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
