"""Small checkpoints with a head that predicts a further token (MTP)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from support.checkpoints import put_tokenizer

LAYERS, EXPERT = 3, 5


def put_head(folder: Path, config) -> tuple[Path, torch.nn.Module]:
    """A random checkpoint of 3 layers and a head, and the model of 4 layers whose last is the head's; an expert of the
    head has its output scaled up."""
    config.vocab_size, config.num_hidden_layers = 4096, LAYERS + 1
    torch.manual_seed(0)
    longer = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in longer.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
        longer.model.layers[LAYERS].mlp.experts.down_proj[EXPERT] *= 300
    longer.save_pretrained(folder)
    file, size, before = folder / "model.safetensors", config.hidden_size, f"model.layers.{LAYERS}"
    extra = {
        f"{before}.enorm.weight": torch.rand(size) + 0.5,
        f"{before}.hnorm.weight": torch.rand(size) + 0.5,
        f"{before}.eh_proj.weight": torch.randn(size, 2 * size) * 0.3,
        f"{before}.shared_head.norm.weight": torch.ones(size),
    }
    save_file(load_file(file) | extra, file, {"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    document |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    document.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(json.dumps(document))
    return put_tokenizer(folder), longer
