"""Measure the speed of one MoE layer with its statistics, compared with transformers, hooks, and the hardware's limits.

    python benchmarks/bench_moe.py                              all shapes, T = 1 to 32768 (CUDA)
    python benchmarks/bench_moe.py --shapes qwen3 --tokens 8192 --kernels
    python benchmarks/bench_moe.py --device cpu --rounds 2      a small layer, to see that it runs

One experts call in bfloat16 on random data; prints a table, and the last line is the same as JSON. Variants:

    eager, grouped_mm     transformers' experts implementations
    hooks                 transformers' eager loop with abs-max and argmax of every expert's input and output
    lean                  grouped_mm without transformers around it, compiled
    lean+statistics       the same with per-expert abs-max, sums of norms and of gate-weighted norms, and the largest
                          rows, returned (a compiler deletes what is not)
    vllm, liger           fused_experts of vLLM (0.22) and Liger's fused MoE (0.8.5), where they are installed
    triton-off, cuda-off  ours without statistics
    triton, cuda          ours with every default statistic, and the state updated
    cpu                   ours on the CPU

floor = the larger of FLOPs over the matmul rate and bytes over the copy bandwidth, both measured in this run; bytes are
the weights of the experts that are hit, the input and the output.

Timed by CUDA events with an empty L2 before each variant, without waiting for the device between them (timing.py).
Variants that took more than 20 ms take part in every third round. Up to 256 tokens a variant runs 8 calls with routings
of their own, so that weights do not stay in the L2, and is replayed as a CUDA graph where it can be captured (eager and
hooks wait for the device; a graph's memory was taken before, so it shows as none). Kernels are those of ours in a graph
of the whole call, with an empty L2 before it: the median launch of each. With --calls nothing is captured: every
variant is called as a layer calls it (ours by sedetect.ops.moe_mlp), eight times in a row, so that what the host takes
counts.

Why combine takes the statistics of the rows, and not the epilogue of down, which had them as partials for each of its
column tiles: on an H100, qwen3 at T = 32768, down took 1802 us with them and 1400 without, combine 653 and 414; at
T = 8192, 496 and 398, 166 and 110. An epilogue keeps the tensor cores waiting, while combine waits for memory. (Those
of combine have become cheaper since.)
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench_model import hooked_experts
from rich.console import Console
from rich.table import Table
from timing import FLUSH, interleaved, machine
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from sedetect import ops
from sedetect.kernels.gate import Gate
from sedetect.kernels.rows import Rows
from sedetect.ops.cuda import CudaBackend
from sedetect.ops.triton import TritonBackend
from sedetect.stats.bank import BankStats


class Shape(NamedTuple):
    experts: int
    hidden: int
    intermediate: int
    top_k: int


SHAPES = {
    "qwen3": Shape(128, 2048, 768, 8),  # Qwen3-30B-A3B
    "olmoe": Shape(64, 2048, 1024, 8),
    "mixtral": Shape(8, 4096, 14336, 2),
    "deepseek": Shape(256, 7168, 2048, 8),  # V3
}
TOKENS = (1, 16, 256, 2048, 8192, 32768)
OURS = {backend.name: backend for backend in (TritonBackend(), CudaBackend())}
ENGINES = {"vllm": "vllm", "liger": "liger_kernel"}
RIVALS = ("eager", "hooks", "grouped_mm", "lean", "lean+statistics", *ENGINES)
VARIANTS = (*RIVALS, *(name + off for name in OURS for off in ("-off", "")))
ROUTINGS = 8  # that take turns where tokens are few
KEPT = 256  # rows that lean+statistics keeps


class Call(NamedTuple):
    x: torch.Tensor  # (T, H)
    index: torch.Tensor  # (T, k)
    weights: torch.Tensor  # (T, k)


class Ceilings(NamedTuple):
    flops: float
    bandwidth: float

    def floor(self, shape: Shape, calls: list[Call]) -> float:
        """The hardware's lower bound on the mean seconds per call."""
        tokens, size = len(calls[0].x), calls[0].x.element_size()
        flops = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
        hit = sum(len(call.index.unique()) for call in calls) / len(calls)
        # weights of the hit experts + input + output
        nbytes = size * (3 * hit * shape.hidden * shape.intermediate + 2 * tokens * shape.hidden)
        return max(flops / self.flops, nbytes / self.bandwidth)


def measure_ceilings(device: str, rounds: int) -> Ceilings:
    n, m = (8192, 2**31) if device == "cuda" else (512, 2**24)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(m, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    seconds = interleaved({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, max(rounds, 9), device)
    return Ceilings(2 * n**3 / seconds["matmul"]["median"], 2 * m / seconds["copy"]["median"])


def make_layer(shape: Shape, device: str) -> nn.Module:
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )  # fmt: skip
    with torch.device(device):
        layer = Qwen3MoeExperts(config).to(torch.bfloat16)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=0.02)
    return layer.requires_grad_(False)


def make_calls(shape: Shape, tokens: int, device: str, skew: float, eager: bool = False) -> list[Call]:
    calls = []
    for seed in range(ROUTINGS if tokens <= 256 or eager else 1):
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(tokens, shape.experts, device=device, generator=generator)
        logits[:, 0] += skew
        weights, index = logits.softmax(-1).topk(shape.top_k)
        x = torch.randn(tokens, shape.hidden, device=device, generator=generator).bfloat16()
        calls.append(Call(x, index, (weights / weights.sum(-1, keepdim=True)).bfloat16()))
    return calls


def lean(x, index, weights, gate_up_weight, down_weight, statistics: bool):
    """A hand-written layer on torch's grouped_mm."""
    tokens, k = index.shape
    experts = gate_up_weight.shape[0]
    expert, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(experts, device=x.device), right=True, out_int32=True)
    g, u = torch._grouped_mm(x[order // k], gate_up_weight.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = torch._grouped_mm(F.silu(g) * u, down_weight.transpose(1, 2), offs=ends)
    by_slot = torch.empty_like(y).index_copy(0, order, y).view(tokens, k, -1)
    out = (by_slot.float() * weights[..., None].float()).sum(1).to(x.dtype)
    if not statistics:
        return out
    largest = y.abs().amax(1).float()
    norm = y.float().square().sum(1).sqrt()
    zeros = norm.new_zeros(experts)
    peak = zeros.index_reduce(0, expert, largest, "amax")
    norms = zeros.index_add(0, expert, norm)
    weighted = zeros.index_add(0, expert, norm * weights.flatten()[order].float())
    return out, peak, norms, weighted, largest.topk(min(KEPT, len(largest)))


def make_variants(
    layer: nn.Module, shape: Shape, calls: list[Call], device: str, wanted: set[str], eager: bool = False
) -> dict[str, Callable[[], object]]:
    """The variants to time: each runs all calls once, as a graph if calls are few and small and eager is False."""
    weights = (layer.gate_up_proj, layer.down_proj)
    experts = ops.ExpertWeights(*weights, Gate())

    def transformers(implementation: str) -> Callable[[], object]:
        def run() -> None:
            layer.config._experts_implementation = implementation
            layer.hooked = {}
            for call in calls:
                layer(*call)

        return run

    def hooks() -> None:
        layer.hooked = {}
        for call in calls:
            hooked_experts(layer, *call)

    def by_hand(statistics: bool) -> Callable[[], object]:
        function = torch.compile(lean, dynamic=False) if device == "cuda" else lean
        return lambda: [function(*call, *weights, statistics) for call in calls]

    state, rows = BankStats.empty(shape.experts, device), Rows.unmapped(len(calls[0].x), device)

    def ours(name: str, statistics: bool) -> Callable[[], object]:
        backend = OURS[name]

        def run() -> None:
            for x, index, gates in calls:
                routing = backend.plan(index, shape.experts)
                _, found = backend.experts(x, routing, experts, gates, statistics=statistics)
                if found is not None:
                    backend.update(state, found, routing, gates, rows)

        return run

    def called(backend: str) -> Callable[[], object]:
        def run() -> None:
            for x, index, gates in calls:
                ops.moe_mlp(x, index, gates, experts, state, rows=rows, backend=backend)

        return run

    variants = {
        "eager": transformers("eager"),
        "hooks": hooks,
        "grouped_mm": transformers("grouped_mm"),
        "lean": by_hand(False),
        "lean+statistics": by_hand(True),
    }
    if "vllm" in wanted:
        variants["vllm"] = vllm_experts(calls, weights)
    if "liger" in wanted:
        variants["liger"] = liger_experts(calls, weights)
    if device == "cpu":
        variants["cpu"] = called("cpu")
    else:
        variants |= {name + off: ours(name, not off) for name in OURS for off in ("-off", "")}
        variants |= {name: called(name) for name in OURS if eager}
    variants = {name: run for name, run in variants.items() if name in wanted}
    if device == "cuda" and len(calls) > 1 and not eager:
        variants |= {name: captured(run) for name, run in variants.items() if name not in ("eager", "hooks")}
    return variants


def vllm_experts(calls: list[Call], weights: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], object]:
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    routed = [(call.x, *weights, call.weights.float(), call.index.int()) for call in calls]  # as its router gives them
    return lambda: [fused_experts(*one) for one in routed]


def liger_experts(calls: list[Call], weights: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], object]:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    routed = [(call.x, *weights, call.index.int(), call.weights.float()) for call in calls]
    return lambda: [LigerFusedMoEFunction.apply(*one) for one in routed]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):  # compiles
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kernel_times(replay: Callable[[], object], rounds: int) -> dict[str, float]:
    """Microseconds of every kernel in a graph: of its median launch, times how often a replay launches it."""
    flushed = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            flushed.zero_()
            replay()
        torch.cuda.synchronize()
    launches = defaultdict(list)
    for event in profile.events():
        # The graphs fill nothing: what does empties the L2.
        if event.device_type == torch.autograd.DeviceType.CUDA and not re.search("fill|memset", event.name, re.I):
            launches[re.search(r"(\w+(<[^>(]*>)?)(\(|$)", event.name)[1]].append(event.device_time)
    return {name: median(times) * len(times) / rounds for name, times in launches.items()}


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Peak memory of one run beyond the memory allocated before, in bytes; None if unknown."""
    if device != "cuda":
        return None
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--skew", type=float, default=0.0, help="added to the logit of expert 0")
    parser.add_argument("--calls", action="store_true", help="no graphs: the cost of a call, including the host")
    parser.add_argument("--kernels", action="store_true", help="also the time of each sedetect kernel (CUDA)")
    args = parser.parse_args()
    shapes, tokens_list, names = {name: SHAPES[name] for name in args.shapes}, args.tokens, args.variants
    if args.device == "cpu":
        shapes, tokens_list, names = {"small": Shape(8, 64, 32, 2)}, [min(args.tokens), 300], [*RIVALS, "cpu"]
    missing = {name for name, package in ENGINES.items() if args.device == "cpu" or find_spec(package) is None}

    console = Console(width=210)
    for name in sorted(missing & {*names}):
        console.print(f"without {name}: not installed, or no GPU")
    names = [name for name in names if name not in missing]
    ceilings = measure_ceilings(args.device, args.rounds)
    refusals = {n: b.refusal(torch.device(args.device, 0), torch.bfloat16) for n, b in OURS.items()}
    for name, reason in refusals.items():
        if reason is not None and args.device == "cuda":
            console.print(f"without {name}: {reason}")
            names = [n for n in names if n.removesuffix("-off") != name]
    console.print(f"ceilings: {ceilings.flops / 1e12:.1f} TFLOP/s, {ceilings.bandwidth / 1e9:.0f} GB/s")
    results = []
    for name, shape in shapes.items():
        layer = make_layer(shape, args.device)
        table = Table(title=f"{name}: ms (x floor) +- half the interquartile range, extra MB")
        for column in ("T", "floor", *names):
            table.add_column(column, justify="right")
        for tokens in tokens_list:
            calls = make_calls(shape, tokens, args.device, args.skew, args.calls)
            floor = ceilings.floor(shape, calls)
            with torch.no_grad():
                variants = make_variants(layer, shape, calls, args.device, set(names), args.calls)
                memory = {n: peak_bytes(run, args.device) for n, run in variants.items()}
                seconds = interleaved(variants, args.rounds, args.device)
                kernels = {}
                if args.kernels and args.device == "cuda":
                    for n in (n for n in variants if n.removesuffix("-off") in OURS):
                        replay = variants[n] if len(calls) > 1 and not args.calls else captured(variants[n])
                        times = kernel_times(replay, args.rounds)
                        kernels[n] = {kernel: t / len(calls) for kernel, t in times.items()}
            for s in seconds.values():
                s |= {k: s[k] / len(calls) for k in ("median", "low", "high")}
            pairs = [(n, f"{n}-off") for n in OURS if {n, f"{n}-off"} <= set(seconds)]
            shares = {on: seconds[on]["median"] / seconds[off]["median"] - 1 for on, off in pairs}
            cells = [str(tokens), f"{floor * 1e3:.3f}"]
            for n in names:
                s, mb = seconds[n], "" if memory[n] is None else f" {memory[n] / 2**20:.0f}"
                spread = (s["high"] - s["low"]) / 2
                cells.append(f"{s['median'] * 1e3:.3f} ({s['median'] / floor:.2f}x) +-{spread * 1e3:.3f}{mb}")
            table.add_row(*cells)
            results.append({
                "shape": name, **shape._asdict(), "tokens": tokens, "floor": floor, "seconds": seconds,
                "of_floor": {n: s["median"] / floor for n, s in seconds.items()}, "peak_bytes": memory,
                "statistics_share": shares,
                "kernels": kernels,
            })  # fmt: skip
            fewer = {n: s["rounds"] for n, s in seconds.items() if s["rounds"] < args.rounds}
            notes = [f"statistics of {n} {share:+.1%}" for n, share in shares.items()]
            notes += [f"{n} {rounds} rounds of {args.rounds}" for n, rounds in fewer.items()]
            if notes:
                console.print(f"{name} T={tokens}: {', '.join(notes)}")
            for n, times in kernels.items():
                each = ", ".join(f"{kernel} {t:.1f}" for kernel, t in times.items())
                console.print(f"{name} T={tokens} {n}, us: {each}")
            del variants
            if args.device == "cuda":
                torch.cuda.empty_cache()
        console.print(table)
        del layer
    ceiling = {"flops": ceilings.flops, "bandwidth": ceilings.bandwidth}
    report = {"benchmark": "moe", "machine": machine(args.device), "ceilings": ceiling, "skew": args.skew}
    print(json.dumps(report | {"results": results}))


if __name__ == "__main__":
    main()
