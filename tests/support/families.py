"""Every Mixture-of-Experts architecture of transformers as a tiny random model: one table, and what builds from it.

An entry says what a family's tiny config needs beyond COMMON, and which banks its layers have. The banks are written
by hand from the modeling files, so that they are an independent statement of what a profile must find.
"""

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn

MODELS = Path(transformers.__file__).parent / "models"
DECORATOR = "use_experts_implementation"
VOCAB, LAYERS, EXPERTS = 96, 3, 8

# What a config gets where it has a field of that name; sub-configs too.
COMMON = {
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "initializer_range": 0.3,
    "swiglu_limit": 1.0,  # low enough that a clamp left out shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # towers of multimodal models, which no test runs
    "depth": 1,
    "num_heads": 4,
    "out_hidden_size": 32,
    "position_embedding_size": 16,
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    layers   the banks of its layers, one word each: R routed, V routed_vision, S shared, D dense, - none. A dictionary
             by stack where that is not the decoder alone.
    config   what its config needs beyond COMMON; nested for sub-configs
    model    the class to build, where it is not the last ForConditionalGeneration or ForCausalLM of the file
    top_k    experts per token
    passes   layer -> how often one forward goes through it, where that is not once
    skips    some slots are no expert's: skip experts, identity experts, dropped tokens
    inputs   what the model is called with, given ids (B, L); input_ids alone by default
    refused  part of the line that refuses it, where it is not served
    adjust   changes the random model before it is run
    notes    patterns of the notes that its profile is right to make
    not_in_float32  names of what its class keeps in float32 in a model of 16 bits, and is not kept so here
    """

    layers: str | dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    top_k: int = 2
    passes: dict[int, int] = field(default_factory=dict)
    skips: bool = False
    inputs: Callable[[torch.Tensor], dict[str, Any]] | None = None
    refused: str | None = None
    adjust: Callable[[nn.Module], None] | None = None
    notes: tuple[str, ...] = ()
    not_in_float32: tuple[str, ...] = ()


# Backend -> what it is right to leave to another backend, as the note of the bank says it.
FALLBACKS: dict[str, tuple[str, ...]] = {
    "cuda": ("transposed", "biases", "interleaved", "multiples of 8", "not contiguous"),  # the last: dbrx's down
}

SMALL_STACK = {"layers": 2, "ffn_dim": 40, "attention_heads": 4, "sparse_step": 2}


def both_stacks(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def with_image(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """One image of 2 x 2 patches, which become one token."""
    ids = ids.clone()
    ids[0, 3] = VOCAB - 1
    pixels = torch.randn(4, 3 * 14 * 14, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2, 2]])}


def with_embeddings(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    embeddings = torch.randn(*ids.shape, COMMON["hidden_size"], generator=torch.Generator().manual_seed(1))
    return {"inputs_embeds": embeddings, "attention_mask": torch.ones_like(ids)}


def choose_skip_experts(model: nn.Module) -> None:
    """Let zaya's routers, undecided ones, sometimes choose their last class, which is no expert."""
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "router_mlp" in path:
            tensor *= 0.6
        if path.endswith("balancing_biases"):
            tensor.zero_()
            tensor[-1] = 0.3


def hash_tokens(model: nn.Module) -> None:
    """Fill deepseek_v4's tables from token to experts, all zero in a new model."""
    for path, tensor in model.named_buffers():
        if path.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(1)[:, : tensor.shape[1]])


def give_image_outputs(model: nn.Module) -> None:
    model.language_model.register_forward_hook(lambda module, args, output: setattr(output, "image_outputs", None))


def fill(model: nn.Module) -> None:
    """Random matrices, for a class that leaves some as they were in memory."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=COMMON["initializer_range"])


ALL_ROUTED = Family("R R R")
FIRST_DENSE = Family("D RS RS")
ALL_SHARED = Family("RS RS RS")

DEEPSEEK_V4_NORMS = ("q_a_norm", "kv_norm", "input_layernorm", "post_attention_layernorm", "norm")

FAMILIES: dict[str, Family] = {
    "afmoe": Family("D RS RS", {"num_dense_layers": 1}),
    "aria": Family("RS RS RS", {"vision_config": {"model_type": "idefics3_vision"}}),
    "axk1": FIRST_DENSE,
    "axk2": FIRST_DENSE,
    "bailing_hybrid": Family("D RS RS"),
    "beam": Family("D R R", {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "cohere2_moe": ALL_SHARED,
    "deepseek_ocr2": Family(
        "D RS RS",
        {
            "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
            "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
        },
    ),
    "deepseek_v2": FIRST_DENSE,
    "deepseek_v3": FIRST_DENSE,
    "deepseek_v32": FIRST_DENSE,
    "deepseek_v4": Family(
        "RS RS RS",
        {
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "o_groups": 4,
            "o_lora_rank": 8,
            "index_n_heads": 4,
            "index_head_dim": 8,
        },
        adjust=hash_tokens,
        # A norm of 5.17 returns its weight's float32, which its next nn.Linear refuses: so a model of 16 bits does not
        # run there as it is loaded, with a profile or without, on no device.
        not_in_float32=DEEPSEEK_V4_NORMS if Version(transformers.__version__) <= Version("5.17") else (),
    ),
    "diffusion_gemma": Family(
        {"encoder": "RS RS RS", "decoder": "RS RS RS"},
        {"text_config": {"top_k_experts": 2}, "vision_config": {"model_type": "gemma4_vision"}, "canvas_length": 12},
        inputs=both_stacks,
        notes=("those of the encoder stack",),
    ),
    "dots1": FIRST_DENSE,
    "dots3_note": Family(
        {"decoder": "D RS RS", "vision": "D R"},
        {
            "text_config": {"index_n_heads": 4, "index_head_dim": 8, "use_sliding_window": False, "head_dim": 16},
            "vision_config": {
                "num_hidden_layers": 2,
                "pyramid_num_routed": [-1, 8],
                "adapter_in_dim": 32,
                "adapter_out_dim": 32,
            },
            "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "num_hidden_layers": 1},
            "image_token_id": VOCAB - 1,
        },
        inputs=with_image,
    ),
    "ernie4_5_moe": Family("D RS RS"),
    "ernie4_5_vl_moe": Family(
        "D RVS RVS",
        {
            "text_config": {
                "moe_intermediate_size": [24, 16],
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            }
        },
        inputs=lambda ids: {"input_ids": ids, "moe_mm_token_type_ids": (ids % 3 == 0).int()},
    ),
    "exaone_moe": FIRST_DENSE,
    "flex_olmo": ALL_ROUTED,
    "flint": Family("D RS RS", {"mlp_only_layers": [0]}),
    "gemma4": Family(
        "RS RS RS",
        {
            "text_config": {
                "enable_moe_block": True,
                "top_k_experts": 2,
                "hidden_size_per_layer_input": 0,
                "global_head_dim": 8,
            },
            "vision_config": None,
            "audio_config": None,
        },
    ),
    "glm4_moe": FIRST_DENSE,
    "glm4_moe_lite": FIRST_DENSE,
    "glm4v_moe": Family(
        "D RS RS",
        {
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 1.0,
                    "mrope_section": [2, 1, 1],
                }
            }
        },
    ),
    "glm5_next": Family(
        "D RS RS",
        {
            "text_config": {
                "qk_rope_head_dim": 0,
                "head_dim": 0,
                "linear_head_dim": 8,
                "linear_num_heads": 4,
                "index_n_heads": 4,
                "index_head_dim": 8,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
            }
        },
    ),
    "glm_moe_dsa": FIRST_DENSE,
    "gpt_oss": ALL_ROUTED,
    "granitemoe": ALL_ROUTED,
    "granitemoe_swa": ALL_SHARED,
    "granitemoehybrid": Family("RS RS RS", {"mamba_n_heads": 4, "layer_types": ["mamba", "attention", "mamba"]}),
    "granitemoeshared": ALL_SHARED,
    "hunyuan_v1_moe": ALL_SHARED,
    "hy_v3": FIRST_DENSE,
    "hy_v4": FIRST_DENSE,
    "hy_v4_vl": Family(
        "D RS RS",
        {
            "text_config": {
                "index_n_heads": 4,
                "index_head_dim": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            }
        },
    ),
    "inkling": Family(
        "D RS RS",
        {"text_config": {"dense_mlp_idx": 1}, "vision_config": {"n_layers": 4}},
    ),
    "inkling2": Family("R R R", {"vision_config": {"text_hidden_size": 32}}),
    "inkling2_loop": Family(
        "R R R",
        {
            "text_config": {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2},
            "vision_config": {"model_type": "inkling2_vision", "text_hidden_size": 32},
        },
        passes={1: 3},
    ),
    "jamba": Family("D R D", {"attn_layer_period": 3, "attn_layer_offset": 2}),
    "kimi_linear": Family("D RS RS", {"linear_head_dim": 8, "linear_num_heads": 4}),
    "kolibri1": ALL_SHARED,
    "laguna": FIRST_DENSE,
    "lara_mini": ALL_SHARED,
    "lfm2_moe": Family("D R R", {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}),
    "mellum": ALL_ROUTED,
    "mimo_v2_flash": Family("D R R", {"head_dim": 24, "num_attention_heads": 8}),
    "minimax": ALL_ROUTED,
    "minimax_m2": ALL_ROUTED,
    "minimax_m3_vl": Family(
        "RS RS RS",
        {
            "text_config": {"model_type": "minimax_m3_vl_text"},
            "vision_config": {"model_type": "minimax_m3_vl_vision"},
        },
    ),
    "mistral4": FIRST_DENSE,
    "mistral_large4": Family("D RS RS", {"vision_config": {"model_type": "pixtral"}}),
    "mixtral": ALL_ROUTED,
    "muse_spark": Family(
        "D R R",
        {
            "text_config": {"moe_hidden_size": 28, "mlp_layer_types": ["dense", "sparse", "sparse"]},
            "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8]},
        },
    ),
    "nemotron_h": Family(
        "- RS D",
        {
            "layers_block_type": ["linear_attention", "moe", "mlp"],
            "moe_latent_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
    ),
    "olmoe": ALL_ROUTED,
    "openai_privacy_filter": ALL_ROUTED,
    "phimoe": ALL_ROUTED,
    "qwen2_moe": ALL_SHARED,
    "qwen3_5_moe": ALL_SHARED,
    "qwen3_moe": ALL_ROUTED,
    "qwen3_next": ALL_SHARED,
    "qwen3_omni_moe": Family("R R R", model="Qwen3OmniMoeThinkerForConditionalGeneration"),
    "qwen3_omni_moe:talker": Family(
        "RS RS RS",
        {"text_config": {"shared_expert_intermediate_size": 16}, "spatial_merge_size": 2},
        model="Qwen3OmniMoeTalkerForConditionalGeneration",
        inputs=with_embeddings,
        adjust=fill,
    ),
    "qwen3_vl_moe": ALL_ROUTED,
    "qwen4_exp": ALL_SHARED,
    "solar_open": ALL_SHARED,
    "unlimited_ocr": Family("D RS RS"),
    "zaya": Family("R R R", {"num_experts_per_tok": 1}, top_k=1, skips=True, adjust=choose_skip_experts),
    # Outside the interface.
    "llama4": Family(
        "RS D RS",
        {"text_config": {"moe_layers": [0, 2], "intermediate_size_mlp": 40, "num_experts_per_tok": 1}},
        top_k=1,
        # From 5.24 on its forward reads image_outputs of what its text model returned, which has none: it fails, with a
        # profile or without.
        adjust=give_image_outputs if Version(transformers.__version__) >= Version("5.24") else None,
    ),
    "llama4:two": Family("RS RS RS", {"moe_layers": [0, 1, 2], "num_experts_per_tok": 2}, model="Llama4ForCausalLM"),
    "dbrx": Family(
        "R R R",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": LAYERS,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
        },
    ),
    "doge": Family("- - -", {"is_moe": True, "num_experts": 16}, refused="DogeCDMoE"),
    "jetmoe": Family("R R R", {"kv_channels": 8}),
    "longcat_flash": Family(
        "RST RST RST",
        {
            "num_layers": LAYERS,
            "moe_topk": 2,
            "zero_expert_num": 4,
            "expert_ffn_hidden_size": 24,
            "ffn_hidden_size": 40,
        },
        skips=True,
    ),
    "nllb_moe": Family(
        {"encoder": "D R", "decoder": "D R"},
        {
            **{f"{stack}_{name}": n for stack in ("encoder", "decoder") for name, n in SMALL_STACK.items()},
            "d_model": 32,
            "moe_eval_capacity_token_fraction": 0.1,
        },
        skips=True,
        inputs=both_stacks,
        notes=("those of the encoder stack",),
        adjust=fill,
    ),
    "step3p7": Family(
        "D RS RS",
        {
            "text_config": {
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "share_expert_dim": 16,
                "sliding_window": 8,
                "swiglu_limits": [0.0, 0.5, 0.0],
                "swiglu_limits_shared": [0.0, 0.0, 0.5],
            },
        },
    ),
    "switch_transformers": Family(
        {"encoder": "D R D", "decoder": "D R D"},
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": LAYERS,
            "num_decoder_layers": LAYERS,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 2,
        },
        top_k=1,
        skips=Version(transformers.__version__) > Version("5.17"),  # which drops none, whatever the capacity
        inputs=both_stacks,
        notes=("those of the encoder stack",),
        adjust=fill,
    ),
}


@cache
def _classes() -> dict[str, list[ast.ClassDef]]:
    """model -> the classes of its modeling file, from the source, where it speaks of experts."""
    sources = {path.parent.name: path.read_text() for path in sorted(MODELS.glob("*/modeling_*.py"))}
    parsed = {name: ast.parse(text) for name, text in sources.items() if "Expert" in text}
    return {name: [n for n in tree.body if isinstance(n, ast.ClassDef)] for name, tree in parsed.items()}


@cache
def discover() -> dict[str, list[str]]:
    """From the installed transformers, by its sources: model -> its classes behind the experts interface."""
    found = {
        model: [c.name for c in classes if any(DECORATOR in ast.unparse(d) for d in c.decorator_list)]
        for model, classes in _classes().items()
    }
    return {model: names for model, names in found.items() if names}


def named_like_experts() -> dict[str, list[str]]:
    """model -> its classes named like experts."""
    found = {model: [c.name for c in classes if "Expert" in c.name] for model, classes in _classes().items()}
    return {model: names for model, names in found.items() if names}


def tiny_config(config_class: type, given: dict[str, Any]) -> transformers.PreTrainedConfig:
    """A config with COMMON where it has the field, and with what is given; sub-configs likewise."""
    known = {f.name for f in fields(config_class)} | set(config_class.attribute_map)
    alias = config_class.attribute_map
    arguments = {name: value for name, value in COMMON.items() if name in known and alias.get(name) not in given}
    for name, sub in config_class.sub_configs.items():
        own = given.get(name, {})
        if own is not None and "model_type" in own:
            sub = transformers.CONFIG_MAPPING[own["model_type"]]
        if own is not None and is_dataclass(sub) and getattr(sub, "model_type", None) is not None:
            arguments[name] = tiny_config(sub, {n: v for n, v in own.items() if n != "model_type"})
    own = {n: v for n, v in given.items() if n not in config_class.sub_configs or v is None}
    try:
        config = config_class(**arguments | own)
    except TypeError:  # qwen3_omni_moe of 5.17 takes dictionaries alone
        arguments = {
            n: v.to_dict() if isinstance(v, transformers.PreTrainedConfig) else v for n, v in arguments.items()
        }
        config = config_class(**arguments | own)
    for name, value in own.items():
        if not hasattr(config, name):  # dbrx drops the rope_theta that its attention reads
            setattr(config, name, value)
    return config


def model_class(name: str, wanted: str | None) -> type:
    name = name.partition(":")[0]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    for suffix in (
        [wanted]
        if wanted
        else ("ForConditionalGeneration", "ForBlockDiffusion", "ForCausalLM", "ForTokenClassification")
    ):
        found = [c for c in classes if c.__name__.endswith(suffix)]
        if found:
            return found[-1]
    raise LookupError(f"{name}: no model class")


def tiny_model(name: str, family: Family, seed: int = 0) -> nn.Module:
    """A random model with weights large enough that its experts differ."""
    cls = model_class(name, family.model)
    config = tiny_config(cls.config_class, family.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in cls._from_config(config, dtype=torch.float32).parameters())
    assert size < 2**25, f"{name}: {size:,} parameters; say in FAMILIES what makes it small"
    torch.manual_seed(seed)
    model = cls._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # Zero by default, where something left out would not show.
            if "bias" in path and tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor)
            elif tensor.dim() > 1 and tensor.is_floating_point() and not tensor.any():
                tensor.normal_(std=COMMON["initializer_range"])
        if family.adjust is not None:
            family.adjust(model)
    return model
