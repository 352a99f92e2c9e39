"""Measure the speed of a profiled forward, compared with the model's own forwards and with hooks.

    python benchmarks/bench_model.py                   CUDA
    python benchmarks/bench_model.py --device cpu
    python benchmarks/bench_model.py --models qwen3 --backend triton

Runs whole forwards and prints a table; the last line is the same as JSON. Models: tests/data/tiny-moe, and with random
weights on CUDA a slice of Qwen3-30B-A3B (--layers, 4 by default) in bfloat16, on the CPU a small Qwen3-MoE. Variants:

    eager, grouped_mm, batched_mm   transformers' experts implementations, unprofiled
    hooks                           transformers' eager loop with abs-max and argmax of every expert's down_proj input
                                    and output, kept on the device: what a tool that hooks every expert does, at best
    sedetect                        under sedetect.profile, every default statistic, by the fastest backend or --backend

batched_mm copies the weights of every routed row; above 1 GB per layer it is left out (it was 13 to 24 times slower).
On CUDA the forwards are those of the decoder without its head (which would hold 20 GB of logits), and seconds per layer
are those of a forward over the layers, so the embedding is in them; variants that take over 20 ms run in every third
round (timing.py).
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import interleaved, machine
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.integrations.moe import ExpertsInterface

import sedetect

TINY = Path(__file__).parents[1] / "tests/data/tiny-moe"
BATCHED_LIMIT = 1e9  # bytes
MODELS = ("tiny-moe", "qwen3")


def hooked_experts(module: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """transformers' eager experts loop, with the records of a hook on each expert's down_proj."""
    out = torch.zeros_like(x)
    mask = nn.functional.one_hot(index, num_classes=module.num_experts).permute(2, 1, 0)
    for e in mask.sum(dim=(-1, -2)).gt(0).nonzero()[:, 0]:
        slot, token = torch.where(mask[e])
        gate, up = nn.functional.linear(x[token], module.gate_up_proj[e]).chunk(2, dim=-1)
        h = module.act_fn(gate) * up
        y = nn.functional.linear(h, module.down_proj[e])
        for name, value in (("input", h), ("output", y)):
            top, where = value.abs().flatten().max(dim=0)
            best, _ = module.hooked.setdefault((name, e), (top, where))
            module.hooked[name, e] = (torch.maximum(best, top), where)
        out.index_add_(0, token, y * weights[token, slot, None])
    return out


ExpertsInterface.register("hooked", hooked_experts)


def trained_model(dtype: torch.dtype, device: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype).to(device).eval()


def random_model(dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_hidden_layers=4, hidden_size=1024, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=512,
        num_attention_heads=8, num_key_value_heads=4, head_dim=128, vocab_size=8192, intermediate_size=2048,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def qwen3_slice(layers: int, device: str) -> nn.Module:
    """Qwen3-30B-A3B with fewer layers."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_hidden_layers=layers, hidden_size=2048, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, intermediate_size=6144,
        norm_topk_prob=True,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def bench(name: str, make: Callable[[], nn.Module], batch: int, length: int, args: argparse.Namespace) -> dict:
    device = args.device
    model, measured = make(), make()  # two copies: one stays under its profile, as in a calibration
    if device == "cuda":
        model, measured = model.model, measured.model
    config = model.config
    ids = torch.randint(0, config.vocab_size, (batch, length), device=device)
    ids[:, 0] = config.bos_token_id or 0
    rows = ids.numel() * config.num_experts_per_tok
    copied = 3 * rows * config.hidden_size * config.moe_intermediate_size * model.dtype.itemsize

    def plain(implementation: str):
        def run() -> None:
            model.set_experts_implementation(implementation)
            for module in model.modules():
                module.hooked = {}
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)

        return run

    variants = {n: plain(n) for n in ("eager", "grouped_mm", "batched_mm")} | {"hooks": plain("hooked")}
    if copied > BATCHED_LIMIT:
        del variants["batched_mm"]
    with sedetect.profile(measured, backend=args.backend) as prof:
        variants["sedetect"] = lambda: measured(input_ids=ids, use_cache=False)
        seconds = interleaved(variants, args.rounds, device)
    backends = {b for bank in prof.stats.header.banks.values() for b in bank.backends}
    fastest = min(s["median"] for n, s in seconds.items() if n not in ("hooks", "sedetect"))
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": ids.numel(),
        "backend": sorted(backends),
        "batched_mm_bytes": copied,
        "seconds": seconds,
        "of_fastest_unprofiled": {n: s["median"] / fastest for n, s in seconds.items()},
        "seconds_per_layer": {n: s["median"] / config.num_hidden_layers for n, s in seconds.items()},
        "tokens_per_second": {n: ids.numel() / s["median"] for n, s in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backend")
    parser.add_argument("--layers", type=int, default=4, help="layers of the slice of Qwen3-30B-A3B (CUDA)")
    args = parser.parse_args()
    results, dtypes = [], (torch.float32, torch.bfloat16)
    if "tiny-moe" in args.models:
        for dtype in dtypes:
            for batch, length in ((8, 512), (1, 64)):
                results.append(bench("tiny-moe", partial(trained_model, dtype, args.device), batch, length, args))
    if "qwen3" in args.models and args.device == "cpu":
        for dtype in dtypes:
            for batch, length in ((4, 512), (1, 64)):
                make = partial(random_model, dtype, args.device)
                results.append(bench("qwen3-moe-4x1024x64", make, batch, length, args))
    elif "qwen3" in args.models:
        make = partial(qwen3_slice, args.layers, args.device)
        results.append(bench(f"qwen3-30b-a3b, {args.layers} layers", make, 32, 2048, args))

    table = Table(title=f"whole forwards, {args.device}: median seconds (x fastest unprofiled)")
    names = ("eager", "grouped_mm", "batched_mm", "hooks", "sedetect")
    for column in ("model", "dtype", "tokens", *names):
        table.add_column(column, justify="right")
    for result in results:
        cells = []
        for n in names:
            s = result["seconds"].get(n)
            cells.append("-" if s is None else f"{s['median']:.4f} ({result['of_fastest_unprofiled'][n]:.2f}x)")
        table.add_row(result["model"], result["dtype"], str(result["tokens"]), *cells)
    console = Console(width=150)
    console.print(table)
    for result in results:
        layer, speed = result["seconds_per_layer"], result["tokens_per_second"]
        each = ", ".join(f"{n} {layer[n] * 1e3:.2f} ms, {speed[n]:,.0f} tokens/s" for n in layer)
        name = f"{result['model']} {result['dtype']}, {result['tokens']} tokens, backend {'+'.join(result['backend'])}"
        console.print(f"{name}: a layer and its share of the embedding takes {each}")
    print(json.dumps({"benchmark": "model", "machine": machine(args.device), "results": results}))


if __name__ == "__main__":
    main()
