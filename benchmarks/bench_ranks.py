"""Measure the speedup of several GPUs, and check that their results equal those of one.

    python benchmarks/bench_ranks.py --ranks 2 4            one run of torchrun for each number
    python benchmarks/bench_ranks.py --ranks 2 --small      two processes on a CPU

Every run builds a random model of Qwen3-30B-A3B's shape with 4 layers on each GPU, and profiles the same batches on the
first GPU alone and on all of them, in turns. Speed-up is of the seconds in forwards and statistics, the slowest rank's;
merging comes after, and is in the other column. Counts, maxima and kept rows must be equal to the bit, sums to 1e-12:
else the exit code is 1. --checkpoint FOLDER (one that bench_streaming.py --keep left) is profiled with --stream as
well, from a cold page cache, to see how often the host reads a byte. Every run is told on stderr as soon as it is
done, and each number of ranks on a line of JSON; the last line is all of it.

A text is tokenized once for all runs: at a million tokens that takes the CPU longer than the forwards take a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from shapes import QWEN3, SMALL, TOKENIZER, differences, drop_cache, from_disk, texts
from timing import machine
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen3MoeConfig

import sedetect
from sedetect.calibration import windows
from sedetect.models.loading import load_tokenizer
from sedetect.profiling.processes import Ranks, join

BEGUN = time.perf_counter()


def random_model(small: bool, device: str) -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SMALL if small else QWEN3, num_hidden_layers=4)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def tokenised_once() -> AbstractContextManager:
    """Within the context, tokenize repeated texts only once."""
    tokenise, known = windows._tokenise, {}

    def remember(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> list[list[int]]:
        key = (tokenizer.name_or_path, *documents)
        if key not in known:
            known[key] = tokenise(tokenizer, documents)
        return known[key]

    return patch.object(windows, "_tokenise", remember)


def tell(ranks: Ranks, what: str) -> None:
    if ranks.rank == 0:
        print(f"{ranks.count} ranks, {time.perf_counter() - BEGUN:.0f} s: {what}", file=sys.stderr, flush=True)


def worker(options: argparse.Namespace) -> None:
    """The work of every rank; the first prints its result as JSON."""
    with join() as ranks, tokenised_once():
        tell(ranks, "together")
        device = ranks.device(options.device)
        model, tokenizer = random_model(options.small, device), load_tokenizer(TOKENIZER)
        tell(ranks, "model made")
        length, batch = (32, 4) if options.small else (2048, 4)
        settings = {"tokenizer": tokenizer, "measuring": sedetect.Measuring(options.backend)}
        measure = partial(sedetect.profile_model, model, texts(options.sequences * length), **settings)
        text = sedetect.Text(options.sequences * length, length, batch)
        measure(text=replace(text, tokens=2 * batch * length))  # whatever is made at first use
        tell(ranks, "warmed up")
        one, several, wall, found = [], [], {"one": [], "all": []}, []
        for number in range(options.rounds):
            dist.barrier()
            start = time.perf_counter()
            alone = measure(text=text) if ranks.rank == 0 else None
            wall["one"].append(time.perf_counter() - start)
            dist.barrier()
            start = time.perf_counter()
            together = ranks.run(lambda: measure(text=text, part=ranks.part))
            wall["all"].append(time.perf_counter() - start)
            if together is not None:
                one.append(alone.seconds)
                several.append(together.seconds)
                differing = differences(together.domains, alone.domains)
                found += differing
                took = f"{one[-1]:.3f} s alone, {several[-1]:.3f} s together"
                tell(ranks, f"round {number + 1}: {took}, {len(differing)} banks differ")
        result = {"ranks": ranks.count, "one": one, "all": several, "wall": wall, "differences": found}
        result["machine"] = machine("cuda" if device.startswith("cuda") else "cpu")
        if options.checkpoint is not None:
            del model, measure
            result["streamed"] = streamed(options, ranks, device)
        if ranks.rank == 0:
            print(json.dumps(result), flush=True)


def streamed(options: argparse.Namespace, ranks: Ranks, device: str) -> dict:
    """A streamed profile by one rank and by all, each from a cold page cache."""
    seq_len = 32 if options.small else 512
    tokens, seconds, fetched, results = 128 * seq_len, {}, {}, {}
    measure = partial(
        sedetect.profile_model, options.checkpoint, texts(tokens), text=sedetect.Text(tokens, seq_len, batch_size=4),
        loading=sedetect.Loading(device), measuring=sedetect.Measuring(options.backend), stream=True,
    )  # fmt: skip
    for name, group in {"one": Ranks(), "all": ranks}.items():
        if ranks.rank == 0:
            drop_cache(options.checkpoint)
        dist.barrier()
        before, result = from_disk(), None
        if ranks.rank < group.count:
            result = group.run(partial(measure, part=group.part))
        each: list = [None] * ranks.count
        took = None if result is None else result.streamed.compute + result.streamed.wait
        dist.all_gather_object(each, (from_disk() - before, took))
        fetched[name], seconds[name], results[name] = sum(count for count, _ in each), each[0][1], result
        tell(ranks, f"streamed by {name}: {each[0][1]:.3f} s, {fetched[name] / 1e9:.3g} GB from disk")
    stored = sum(file.stat().st_size for file in options.checkpoint.glob("*.safetensors"))
    found = [] if ranks.rank else differences(results["all"].domains, results["one"].domains)
    return {"seconds": seconds, "from_disk": fetched, "checkpoint_bytes": stored, "differences": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend")
    parser.add_argument("--sequences", type=int, default=64, help="number of windows of 2048 tokens (small: 32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, help="also stream this checkpoint")
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        worker(options)
        return 0
    if min(options.ranks) < 2:
        parser.error("--ranks: at least 2 each; one rank is measured beside them")
    results = []
    for count in options.ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        done = subprocess.run([*command, __file__, *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{count} ranks: exit code {done.returncode}", file=sys.stderr)
            return 1
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)

    table = Table(title=f"{options.sequences} windows, median of {options.rounds} rounds: seconds")
    for column in ("ranks", "one", "all", "speed-up", "with merging", "streamed: speed-up", "bytes read / stored"):
        table.add_column(column, justify="right")
    for result in results:
        middle = {name: statistics.median(result[name]) for name in ("one", "all")}
        whole = {name: statistics.median(result["wall"][name]) for name in ("one", "all")}
        result["speed_up"] = middle["one"] / middle["all"]
        cells = [f"{middle['one']:.3f}", f"{middle['all']:.3f}", f"{result['speed_up']:.2f}"]
        cells.append(f"{whole['one'] / whole['all']:.2f}")
        if layerwise := result.get("streamed"):
            cells.append(f"{layerwise['seconds']['one'] / layerwise['seconds']['all']:.2f}")
            read = [layerwise["from_disk"][name] / layerwise["checkpoint_bytes"] for name in ("one", "all")]
            cells.append(f"{read[0]:.2f}, {read[1]:.2f}")
        table.add_row(str(result["ranks"]), *cells)
    Console(width=120).print(table)
    wrong = [
        f"{r['ranks']} ranks: {d}" for r in results for d in r["differences"] + r.get("streamed", r)["differences"]
    ]
    for where in wrong:
        print(f"FAILED: {where} differs from one rank's", file=sys.stderr)
    print(json.dumps({"benchmark": "ranks", "sequences": options.sequences, "equal": not wrong, "results": results}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
