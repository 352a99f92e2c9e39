"""Small random models of different layouts, and what the tests share about them."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DeepseekV3Config,
    GptOssConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

TINY = Path(__file__).parents[1] / "data" / "tiny-moe"

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, num_experts=8, moe_intermediate_size=24, head_dim=8),
    # shared experts in every sparse layer, layer 1 dense
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **COMMON, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=20, mlp_only_layers=[1]
    ),
    # layer 0 dense, a sigmoid router, shared experts
    "deepseek_v3": lambda: DeepseekV3Config(
        **COMMON | {"num_key_value_heads": 4},
        n_routed_experts=8,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    # interleaved clamped gate, biases, transposed weights
    "gpt_oss": lambda: GptOssConfig(**COMMON | {"intermediate_size": 24}, num_local_experts=8, head_dim=8),
}


def random_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random model with outputs of the size a trained one has."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
    return model


def small_cache() -> ContinuousBatchingConfig:
    """For generate_batch(), whose cache otherwise takes nine tenths of the machine's memory: two at once are killed."""
    return ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)


def snapshot(model):
    """Every object that a profile might replace, to compare before and after."""
    return {
        "modules": [
            (path, id(module), id(module.__dict__.get("config")), "forward" in module.__dict__)
            for path, module in model.named_modules()
        ],
        "parameters": [(path, id(parameter)) for path, parameter in model.named_parameters()],
        "attributes": sorted(model.__dict__),
        "implementation": model.get_experts_implementation(),
        "config": model.config.to_json_string(),
        "grad": torch.is_grad_enabled(),
    }


def token_ids(batch=4, length=24, seed=0):
    ids = torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids
