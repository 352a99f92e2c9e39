"""Checkpoints of published shapes in FP8 whose files are holes, but for what makes one expert fire on the first token.

Headers and sizes are those of the published files; no disk is used by holes. The residual stream is 1 in every channel,
attention adds nothing, and the planted expert writes 1000 into one channel.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save

from support.checkpoints import put_tokenizer

_COMMON = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "moe_intermediate_size": 2048, "intermediate_size": 18432, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_theta": 10000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}  # fmt: skip
DEEPSEEK_R1 = _COMMON | {
    "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "first_k_dense_replace": 3, "n_routed_experts": 256,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_group": 8, "topk_group": 4, "vocab_size": 129280,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
KIMI_K2 = _COMMON | {
    "num_hidden_layers": 61, "num_nextn_predict_layers": 0, "first_k_dense_replace": 1, "n_routed_experts": 384,
    "num_attention_heads": 64, "num_key_value_heads": 64, "n_group": 1, "topk_group": 1, "vocab_size": 163840,
    "routed_scaling_factor": 2.827,
}  # fmt: skip
_SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
_BLOCK = 128
CHANNEL, INNER = 4242, 77  # of the planted outlier: the super weight


def put_sparse(folder: Path, config: dict, layer: int, expert: int, shard: float = 4.3e9) -> Path:
    """Write a checkpoint in which this expert is planted, in shards of about so many bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    put_tokenizer(folder)
    shards, total = [{}], 0
    for name, (dtype, shape) in _tensors(config).items():
        length = _SIZES[dtype]
        for size in shape:
            length *= size
        if total + length > shard:
            shards.append({})
            total = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [total, total + length]}
        total += length
    weight_map = {}
    planted = _planted(config, layer, expert)
    for number, entries in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):06}.safetensors"
        weight_map |= dict.fromkeys(entries, file.name)
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with file.open("wb") as opened:
            opened.write(len(header).to_bytes(8, "little") + header)
            opened.truncate(8 + len(header) + max(entry["data_offsets"][1] for entry in entries.values()))
            for name, entry in entries.items():
                for byte, content in planted(name, entry["shape"]):
                    opened.seek(8 + len(header) + entry["data_offsets"][0] + byte)
                    opened.write(content)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _tensors(config: dict) -> dict[str, tuple[str, list[int]]]:
    """name -> type and shape, as the published files have them."""
    hidden, heads, vocabulary = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    found: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [vocabulary, hidden])}

    def matrix(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = ("F8_E4M3", [rows, columns])
        found[f"{name}.weight_scale_inv"] = ("F32", [-(-rows // _BLOCK), -(-columns // _BLOCK)])

    def mlp(name: str, inner: int) -> None:
        for projection in ("gate_proj", "up_proj"):
            matrix(f"{name}.{projection}", inner, hidden)
        matrix(f"{name}.down_proj", hidden, inner)

    layers = config["num_hidden_layers"]
    for number in range(layers + config["num_nextn_predict_layers"]):
        path = f"model.layers.{number}"
        if number >= layers:  # predicts further tokens
            found[f"{path}.embed_tokens.weight"] = ("BF16", [vocabulary, hidden])
            found[f"{path}.eh_proj.weight"] = ("BF16", [hidden, 2 * hidden])
            found |= {f"{path}.{name}.weight": ("BF16", [hidden]) for name in ("enorm", "hnorm", "shared_head.norm")}
            found[f"{path}.shared_head.head.weight"] = ("BF16", [vocabulary, hidden])
        matrix(f"{path}.self_attn.q_a_proj", query, hidden)
        matrix(f"{path}.self_attn.q_b_proj", heads * (nope + rope), query)
        matrix(f"{path}.self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
        matrix(f"{path}.self_attn.kv_b_proj", heads * (nope + value), latent)
        matrix(f"{path}.self_attn.o_proj", hidden, heads * value)
        found[f"{path}.self_attn.q_a_layernorm.weight"] = ("BF16", [query])
        found[f"{path}.self_attn.kv_a_layernorm.weight"] = ("BF16", [latent])
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{path}.{name}.weight"] = ("BF16", [hidden])
        if number < config["first_k_dense_replace"]:
            mlp(f"{path}.mlp", config["intermediate_size"])
            continue
        found[f"{path}.mlp.gate.weight"] = ("BF16", [config["n_routed_experts"], hidden])
        found[f"{path}.mlp.gate.e_score_correction_bias"] = ("F32", [config["n_routed_experts"]])
        for expert in range(config["n_routed_experts"]):
            mlp(f"{path}.mlp.experts.{expert}", config["moe_intermediate_size"])
        mlp(f"{path}.mlp.shared_experts", config["moe_intermediate_size"])
    return found | {"model.norm.weight": ("BF16", [hidden]), "lm_head.weight": ("BF16", [vocabulary, hidden])}


def _planted(config: dict, layer: int, expert: int):
    """What a tensor holds that is not 0: (byte, content) of a name and shape."""
    mine = f"model.layers.{layer}.mlp.experts.{expert}."
    hidden = config["hidden_size"]

    def bytes_of(values: list[float], dtype: torch.dtype) -> bytes:
        raw = save({"x": torch.tensor(values).to(dtype)})
        return raw[8 + int.from_bytes(raw[:8], "little") :]

    def planted(name: str, shape: list[int]):
        if name == "model.embed_tokens.weight":
            yield 0, bytes_of([1.0] * hidden, torch.bfloat16)  # of token 0, which begins a text
        elif name.endswith("norm.weight"):
            yield 0, bytes_of([1.0] * shape[0], torch.bfloat16)
        elif name == f"model.layers.{layer}.mlp.gate.weight":
            yield expert * hidden * 2, bytes_of([1.0] * hidden, torch.bfloat16)
        elif name.startswith(mine):
            row, column = (CHANNEL, INNER) if "down" in name else (INNER, 5)
            if name.endswith("scale_inv"):
                yield (row // _BLOCK * shape[1] + column // _BLOCK) * 4, bytes_of([1.0], torch.float32)
            else:
                yield row * shape[1] + column, bytes_of([10.0], torch.float8_e4m3fn)

    return planted
