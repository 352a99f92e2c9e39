"""Random checkpoints on disk, with tiny-moe's tokenizer, and short texts to run them on."""

import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sedetect
from support.models import CONFIGS, TINY

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


WORDS = {"greek": "alpha beta gamma delta", "numbers": "one two three four five", "colours": "red green blue"}
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


def to_fp8(folder: Path, block: int = 8) -> None:
    """Store the matrices of a checkpoint's layers as published FP8 ones are: with a scale per block."""
    for shard in folder.glob("*.safetensors"):
        stored = {}
        for name, weight in load_file(shard).items():
            stored[name] = weight
            if weight.dim() == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
                rows, columns = (size // block for size in weight.shape)
                blocks = weight.float().view(rows, block, columns, block)
                scale = blocks.abs().amax((1, 3), keepdim=True) / 448
                stored[name] = (blocks / scale).to(torch.float8_e4m3fn).view(weight.shape)
                stored[f"{name}_scale_inv"] = scale.view(rows, columns)
        save_file(stored, shard, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
