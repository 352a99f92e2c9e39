"""Measure the speed of one MoE layer with its statistics and weights stored in 8 or 4 bits, compared with bf16.

    python benchmarks/bench_quantized.py                        DeepSeek-V3's layer, T = 16, 256 and 8192 (CUDA)
    python benchmarks/bench_quantized.py --backends triton cuda     one beside the other
    python benchmarks/bench_quantized.py --device cpu --rounds 2    a small layer, to see that it runs

One experts call in bfloat16 with every default statistic, by the cuda backend or those that --backends names; prints a
table, and the last line is the same as JSON. The weights: fp8 (e4m3 with a float32 scale per 128 x 128), mxfp4 (two to
a byte, a scale per 32 columns), and bf16, which are the fp8 ones dequantized. difference is between the outputs of fp8
and bf16, RMS over RMS: the kernels multiply the same numbers. Floors and timing are those of bench_moe.py, with the
bytes that are stored.
"""

import argparse
import json

import torch
from bench_moe import SHAPES, Call, Ceilings, Shape, captured, make_calls, measure_ceilings, peak_bytes
from rich.console import Console
from rich.table import Table
from timing import interleaved, machine

from sedetect import ops
from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.stats.bank import BankStats

BYTES = {"bf16": 2, "fp8": 1, "mxfp4": 0.5 + 1 / 32}  # per weight; fp8's scales are less than a thousandth
Weights = torch.Tensor | QuantizedWeights


def make_weights(shape: Shape, device: str) -> dict[str, ops.ExpertWeights]:
    """Weights in each format, with the magnitude of trained weights."""
    generator = torch.Generator(device).manual_seed(0)
    made: dict[str, list[Weights]] = {name: [] for name in BYTES}
    for rows, columns in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
        stored = torch.empty(shape.experts, rows, columns, dtype=torch.float8_e4m3fn, device=device)
        for expert in stored:
            expert.copy_((torch.randn(rows, columns, device=device, generator=generator) * 100).clamp(-448, 448))
        blocks = (shape.experts, -(-rows // 128), -(-columns // 128))
        scale = torch.rand(blocks, device=device, generator=generator) * 2e-4 + 1e-4
        fp8 = QuantizedWeights(stored, scale, (128, 128), torch.bfloat16)
        made["fp8"].append(fp8)
        plain = torch.empty(shape.experts, rows, columns, dtype=torch.bfloat16, device=device)
        for number in range(shape.experts):
            plain[number] = fp8[number]
        made["bf16"].append(plain)
        packed = torch.empty(shape.experts, rows, columns // 2, dtype=torch.uint8, device=device)
        packed.random_(generator=generator)
        exponent = torch.full((shape.experts, rows, columns // 32), 120, dtype=torch.uint8, device=device)
        made["mxfp4"].append(QuantizedWeights(packed, exponent, (1, 32), torch.bfloat16))
    return {name: ops.ExpertWeights(*pair, ops.Gate()) for name, pair in made.items()}


def floor(ceilings: Ceilings, shape: Shape, calls: list[Call], name: str) -> float:
    """bench_moe's, with the weights' bytes as stored."""
    hit = sum(len(call.index.unique()) for call in calls) / len(calls)
    tokens = len(calls[0].x)
    nbytes = 3 * hit * shape.hidden * shape.intermediate * BYTES[name] + 4 * tokens * shape.hidden
    flops = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
    return max(flops / ceilings.flops, nbytes / ceilings.bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="deepseek")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 256, 8192])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backends", nargs="+", choices=["cuda", "triton"], default=["cuda"])
    args = parser.parse_args()
    shape, backends = SHAPES[args.shape], args.backends
    if args.device == "cpu":
        shape, args.tokens, backends = Shape(8, 256, 128, 2), [16], ["cpu"]
    names = [(name, backend) for name in BYTES for backend in backends]

    console = Console(width=160)
    ceilings = measure_ceilings(args.device, args.rounds)
    console.print(f"ceilings: {ceilings.flops / 1e12:.1f} TFLOP/s, {ceilings.bandwidth / 1e9:.0f} GB/s")
    weights = make_weights(shape, args.device)
    table = Table(title=f"{args.shape} {tuple(shape)}: ms (x its floor) +- half the interquartile range, extra MB")
    for column in ("T", *(" ".join(one) for one in names), "difference"):
        table.add_column(column, justify="right")
    results = []
    for tokens in args.tokens:
        calls = make_calls(shape, tokens, args.device, 0.0)
        state = BankStats.empty(shape.experts, args.device)

        def run(name: str, backend: str, calls: list[Call] = calls, state: BankStats = state) -> torch.Tensor:
            for x, index, gates in calls:
                out = ops.moe_mlp(x, index, gates, weights[name], state, backend=backend)
            return out

        outputs = {name: run(name, backends[-1]).float() for name in ("bf16", "fp8")}
        difference = float((outputs["fp8"] - outputs["bf16"]).norm() / outputs["bf16"].norm())
        variants = {" ".join(one): lambda one=one: run(*one) for one in names}
        memory = {name: peak_bytes(one, args.device) for name, one in variants.items()}
        if args.device == "cuda" and len(calls) > 1:
            variants = {name: captured(one) for name, one in variants.items()}
        seconds = interleaved(variants, args.rounds, args.device)
        for s in seconds.values():
            s |= {key: s[key] / len(calls) for key in ("median", "low", "high")}
        floors = {name: floor(ceilings, shape, calls, name) for name in BYTES}
        cells = [str(tokens)]
        for name, s in seconds.items():
            mb = "" if memory[name] is None else f" {memory[name] / 2**20:.0f}"
            spread = (s["high"] - s["low"]) / 2 * 1e3
            times = s["median"] / floors[name.split()[0]]
            cells.append(f"{s['median'] * 1e3:.3f} ({times:.2f}x) +-{spread:.3f}{mb}")
        table.add_row(*cells, f"{difference:.1e}")
        results.append({"tokens": tokens, "floors": floors, "seconds": seconds, "peak_bytes": memory,
                        "difference": difference})  # fmt: skip
    console.print(table)
    report = {"benchmark": "quantized", "machine": machine(args.device), "shape": shape._asdict(), "backends": backends,
              "results": results}  # fmt: skip
    print(json.dumps(report | {"ceilings": ceilings._asdict()}))


if __name__ == "__main__":
    main()
