"""Where the analyzed models keep experts, gates and routers, and texts of random tokens."""

import torch

from sedetect.analysis.common import Text
from sedetect.calibration.windows import Windows

# experts and their gates; router, and down projections of shared experts, in the layer's MoE block
PLACES = {
    "qwen3_moe": ("model.layers.{}.mlp", "experts", "gate", ()),
    "qwen2_moe": ("model.layers.{}.mlp", "experts", "gate", ("shared_expert.down_proj",)),
    "deepseek_v3": ("model.layers.{}.mlp", "experts", "gate", ("shared_experts.down_proj",)),
    "gpt_oss": ("model.layers.{}.mlp", "experts", "router", ()),
    "mixtral": ("model.layers.{}.mlp", "experts", "gate", ()),
    "gemma4": ("model.language_model.layers.{}", "experts", "router.proj", ("mlp.down_proj",)),
    "dbrx": ("transformer.blocks.{}.ffn", "experts", "router.layer", ()),
    "jetmoe": ("model.layers.{}.mlp", "", "router.layer", ()),
    "step3p7": ("model.language_model.layers.{}.mlp", "experts", "gate", ("shared_experts.down_proj",)),
    "nllb_moe": ("model.decoder.layers.{}.ffn", "experts", "router.classifier", ()),
    "switch_transformers": ("decoder.block.{}.layer.2.mlp", "experts", "router.classifier", ()),
}


def windows_of(ids: torch.Tensor) -> dict[str, Windows]:
    return {"one": Windows(ids[:1], torch.arange(1), "one", {}), "two": Windows(ids[1:], torch.arange(1), "two", {})}


def random_ids(length: int = 9, number: int = 2) -> torch.Tensor:
    ids = torch.randint(3, 90, (number, length), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 1
    return ids


def text_of(ids: torch.Tensor) -> Text:
    return Text("text", ids, [str(i) for i in ids.tolist()])
