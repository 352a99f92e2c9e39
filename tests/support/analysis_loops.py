"""The analyses of arXiv 2406.18219 as plain numpy loops, over the tensors of a checkpoint by their names in it.

Nothing here knows sedetect's layouts: BLOCKS and read_experts say by hand how each family's checkpoint is written.
"""

from pathlib import Path

import numpy as np
from safetensors.torch import load_file

Experts = dict[str, list[np.ndarray]]  # "gate", "up", "down" -> of each expert, (I, H), a row per neuron

# family -> where its MoE block stands, and its router in it
BLOCKS = {
    "qwen3_moe": ("model.layers.{}.mlp", "gate"),
    "qwen2_moe": ("model.layers.{}.mlp", "gate"),
    "deepseek_v3": ("model.layers.{}.mlp", "gate"),
    "gpt_oss": ("model.layers.{}.mlp", "router"),
    "mixtral": ("model.layers.{}.block_sparse_moe", "gate"),
    "granitemoe": ("model.layers.{}.block_sparse_moe", "router.layer"),
    "jetmoe": ("model.layers.{}.mlp", "router.layer"),
    "dbrx": ("transformer.blocks.{}.ffn", "router.layer"),
    "nemotron_h": ("backbone.layers.{}.mixer", "gate"),
}


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint folder, in float64."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor.double().numpy() for file in files for name, tensor in load_file(file).items()}


def read_experts(family: str, tensors: dict[str, np.ndarray], layer: int) -> tuple[Experts, dict | None, np.ndarray]:
    """(routed experts, shared expert or None, gate embeddings) of one layer."""
    block, router = BLOCKS[family]
    prefix = block.format(layer) + "."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    assert own, f"{family}: nothing named {prefix}"
    embeddings = own[f"{router}.weight"]
    return _routed(family, own, len(embeddings)), _shared(own), embeddings


def _routed(family: str, own: dict[str, np.ndarray], number: int) -> Experts:
    if family == "gpt_oss":  # (E, H, 2I), gate and up in turns; down (E, I, H)
        both = own["experts.gate_up_proj"].transpose(0, 2, 1)
        return {"gate": list(both[:, ::2]), "up": list(both[:, 1::2]), "down": list(own["experts.down_proj"])}
    if family == "dbrx":  # (E * I, H) each
        parts = (np.split(own[f"experts.mlp.{name}"], number) for name in ("w1", "v1", "w2"))
        return dict(zip(("gate", "up", "down"), parts))
    if family in ("granitemoe", "jetmoe"):  # (E, 2I, H), the gate first; down (E, H, I)
        gate, up = np.split(own["input_linear.weight"], 2, axis=1)
        return {"gate": list(gate), "up": list(up), "down": [matrix.T for matrix in own["output_linear.weight"]]}
    names = (
        {"gate": "w1", "up": "w3", "down": "w2"}
        if family == "mixtral"
        else {n: f"{n}_proj" for n in ("gate", "up", "down")}
    )
    found = {
        n: [own[f"experts.{e}.{s}.weight"] for e in range(number) if f"experts.{e}.{s}.weight" in own]
        for n, s in names.items()
    }
    return {n: [m.T for m in matrices] if n == "down" else matrices for n, matrices in found.items() if matrices}


def _shared(own: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    for name in ("shared_expert", "shared_experts"):
        if f"{name}.down_proj.weight" in own:
            parts = {p: own.get(f"{name}.{p}_proj.weight") for p in ("gate", "up", "down")}
            return {p: m.T if p == "down" else m for p, m in parts.items() if m is not None}
    return None


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def table(items: list, value) -> np.ndarray:
    """value(a, b) of every pair; NaN for what has not the shape of the first."""
    shape = items[0].shape
    return np.array([[value(a, b) if a.shape == b.shape == shape else np.nan for b in items] for a in items])


def standardized(rows: np.ndarray) -> np.ndarray:
    return (rows - rows.mean(0)) / rows.std(0, ddof=1)


def components(rows: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, shares of variance) by a singular value decomposition."""
    u, s, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return (u * s)[:, :number], (s**2 / (s**2).sum())[:number]


def lower(matrix: np.ndarray) -> np.ndarray:
    return np.array([matrix[i, j] for i in range(len(matrix)) for j in range(i)])
