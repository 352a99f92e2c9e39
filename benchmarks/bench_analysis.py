"""Measure the cost of the analyses of one MoE layer, compared with the loops they replace.

    python benchmarks/bench_analysis.py                  Qwen3-30B-A3B's layer (E 128, H 2048, I 768), bfloat16, CUDA
    python benchmarks/bench_analysis.py --device cpu     a small layer, to see that it runs

Prints two tables, and the last line is the same as JSON. Weights of one layer:

    loop       every pair of experts by torch.nn.functional.cosine_similarity in the weights' precision, as the
               published notebooks have it (whose similarities are off by that precision, and which bring each to the
               host by itself)
    gemm       all pairs in one product of float32 rows, as one would write it with care
    sedetect   one Gram matrix per matrix (S1), mean neurons (S2), and also the router's regression on them (S5)

Outputs of all experts on all tokens, with mean cosines, norms, and the counts of router rank by norm rank:

    loop       one expert after another over all tokens, all outputs kept; every pair by cosine_similarity
    loop+bmm   the same outputs, all pairs of a token in one product, as one would write it with care
    torch, ...  sedetect.analysis.outputs: tokens in chunks, by the stages of that backend; angular similarities too

memory is what a run takes at most beyond the layer itself. The variants' results are compared: difference is the
largest from a cosine of the loop (outputs: a mean cosine).
"""

import argparse
import json
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import interleaved, machine

from sedetect import ops
from sedetect.analysis.common import off_diagonal
from sedetect.analysis.outputs import OutputSums, chunk_tokens
from sedetect.analysis.weights import matrix_similarity, neuron_means, regress, vector_similarity
from sedetect.kernels.gate import Gate
from sedetect.ops.choose import BACKENDS


class Layer(NamedTuple):
    gate_up: torch.Tensor  # (E, 2I, H)
    down: torch.Tensor  # (E, H, I)
    router: torch.Tensor  # (E, H)
    x: torch.Tensor  # (T, H)
    top_k: int

    def matrices(self) -> dict[str, torch.Tensor]:
        gate, up = self.gate_up.chunk(2, dim=1)
        return {"gate": gate, "up": up, "down": self.down.transpose(1, 2)}


def make_layer(experts: int, hidden: int, intermediate: int, tokens: int, top_k: int, device: str) -> Layer:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * std).bfloat16()

    gate_up, down = random(experts, 2 * intermediate, hidden, std=0.02), random(experts, hidden, intermediate, std=0.02)
    return Layer(gate_up, down, random(experts, hidden, std=0.02), random(tokens, hidden, std=1), top_k)


def weights_plain(layer: Layer, together: bool) -> dict[str, torch.Tensor]:
    found = {}
    for name, stack in layer.matrices().items():
        for field in ("similarity", "neurons"):
            if together:
                unit = F.normalize(stack.flatten(1).float() if field == "similarity" else stack.float().mean(1), dim=1)
                found[f"{name}.{field}"] = unit @ unit.t()
                continue
            vectors = [m.flatten() if field == "similarity" else m.mean(0) for m in stack]
            table = torch.ones(len(stack), len(stack), device=stack.device)
            for i in range(len(stack)):
                for j in range(i):
                    table[i, j] = table[j, i] = F.cosine_similarity(vectors[i], vectors[j], dim=0)
            found[f"{name}.{field}"] = table
    return found


def weights_sedetect(layer: Layer) -> dict[str, torch.Tensor]:
    found, router = {}, vector_similarity(layer.router)
    for name, stack in layer.matrices().items():
        found[f"{name}.similarity"] = matrix_similarity([stack])
        found[f"{name}.neurons"] = vector_similarity(neuron_means([stack]))
        experts = len(stack)
        regress(off_diagonal(found[f"{name}.neurons"], experts), off_diagonal(router, experts))
    return found


def outputs_plain(layer: Layer, together: bool) -> torch.Tensor:
    """(E, E) mean cosines; norms and rank counts are taken too."""
    experts = len(layer.down)
    y = layer.x.new_empty(experts, *layer.x.shape)  # (E, T, H)
    for expert, (up, down) in enumerate(zip(layer.gate_up, layer.down)):
        gate, value = F.linear(layer.x, up).chunk(2, dim=-1)
        y[expert] = F.linear(F.silu(gate) * value, down)
    norms = torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32).t()
    count_ranks(F.linear(layer.x, layer.router).float(), norms)
    if together:
        found = torch.zeros(experts, experts, device=y.device)
        for part in range(0, len(layer.x), 256):  # all tokens at once in float32 would not fit
            unit = F.normalize(y[:, part : part + 256].float(), dim=-1).transpose(0, 1)
            found += (unit @ unit.transpose(1, 2)).sum(0)
        return found / len(layer.x)
    table = torch.ones(experts, experts, device=y.device)
    for i in range(experts):
        for j in range(i):
            table[i, j] = table[j, i] = F.cosine_similarity(y[i].float(), y[j].float(), dim=-1).mean()
    return table


def count_ranks(logits: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    experts = logits.shape[1]
    score, norm = (values.argsort(1).argsort(1) for values in (logits, norms))
    return torch.bincount((score * experts + norm).flatten(), minlength=experts * experts)


def outputs_sedetect(layer: Layer, backend: str) -> torch.Tensor:
    experts, _, hidden = layer.gate_up.shape
    sums = OutputSums(experts, experts, layer.x.device)
    step = chunk_tokens(experts, hidden, layer.down.shape[2], layer.x.device)
    for part in layer.x.split(step):
        y = ops.every_expert(part, ops.ExpertWeights(layer.gate_up, layer.down, Gate()), backend=backend).float()
        logits = F.linear(part.float(), layer.router.float())
        sums.add(y, logits.topk(layer.top_k).indices, logits)
    return sums.arrays()["cosine"]


def peak(run: Callable[[], object], device: str) -> tuple[object, int | None]:
    """The result of run, and its peak memory in bytes; None if unknown."""
    if device != "cuda":
        return run(), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    return result, torch.cuda.max_memory_allocated() - before


def compare(
    title: str, variants: dict[str, Callable[[], object]], rounds: int, device: str, console: Console
) -> list[dict]:
    own = {name: peak(run, device) for name, run in variants.items()}
    seconds = interleaved(variants, rounds, device)
    first = next(iter(variants))
    table = Table(title=title)
    for column in ("variant", "median ms", "quartiles", f"of {first}", "memory MB", "difference"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    results = []
    for name, took in seconds.items():
        result, memory = own[name]
        differs = difference(own[first][0], result)
        ms = [took[key] * 1e3 for key in ("median", "low", "high")]
        used = "-" if memory is None else f"{memory / 1e6:.0f}"
        relative = took["median"] / seconds[first]["median"]
        table.add_row(name, f"{ms[0]:.1f}", f"{ms[1]:.1f} to {ms[2]:.1f}", f"{relative:.3f}", used, f"{differs:.1e}")
        results.append({"variant": name, "seconds": took, "memory": memory, "difference": differs})
    console.print(table)
    return results


def difference(a: object, b: object) -> float:
    if isinstance(a, dict):
        return max(difference(a[name], b[name]) for name in a)
    worst = float((a.double().cpu() - b.double().cpu()).abs().max())
    return worst if math.isfinite(worst) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="default: 4096 on a GPU")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    shape = (128, 2048, 768, args.tokens or 4096, 8) if gpu else (16, 64, 48, args.tokens or 256, 4)
    layer = make_layer(*shape, args.device)
    console = Console(width=120)
    names = dict(zip(("experts", "hidden", "intermediate", "tokens", "top_k"), shape))
    weights = {
        "loop": lambda: weights_plain(layer, together=False),
        "gemm": lambda: weights_plain(layer, together=True),
        "sedetect": lambda: weights_sedetect(layer),
    }
    outputs: dict[str, Callable[[], object]] = {
        "loop": lambda: outputs_plain(layer, together=False),
        "loop+bmm": lambda: outputs_plain(layer, together=True),
    }
    for backend in ("torch", "triton", "cuda", "cpu"):
        if backend in BACKENDS and BACKENDS[backend].refusal(layer.x.device, layer.x.dtype) is None:
            outputs[backend] = lambda backend=backend: outputs_sedetect(layer, backend)
    report = {"benchmark": "analysis", "machine": machine(args.device), "shape": names}
    said = ", ".join(f"{name} {value}" for name, value in names.items())
    report["weights"] = compare(
        f"weights of one layer, {args.device}: {said}", weights, args.rounds, args.device, console
    )
    report["outputs"] = compare("outputs of all experts on all tokens", outputs, args.rounds, args.device, console)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
