"""Measure the cost of pruning: by saliency, with super experts protected, merged instead of dropped, by a global
budget.

    python benchmarks/bench_pruning.py

Prunes a checkpoint at 12.5, 25 and 50 % by several saliencies and at random, merges by each method, loads each result
with AutoModelForCausalLM, and prints its perplexity on text that the saliencies were not taken from; the last line is
the same as JSON. The global budget is simulated, as no class loads layers of different size: the original runs without
those experts. The first half of each domain's windows is profiled, the second half evaluated; --text evaluates another
folder of texts instead.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import sedetect
from sedetect.calibration.held_out import held_out
from sedetect.calibration.windows import calibration_windows, prefix_ids
from sedetect.compression.merging import METHODS, align_neurons, expert_distances, group_nearest, group_ream
from sedetect.compression.pruning import choose_kept, prune_checkpoint
from sedetect.experiments.ablation import ablate
from sedetect.experiments.evaluation import perplexity
from sedetect.experiments.targets import routed_experts
from sedetect.models.banks import find_banks
from sedetect.ranking.rule import rank
from sedetect.ranking.saliencies import found_places

TINY = Path(__file__).parents[1] / "tests/data/tiny-moe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=TINY)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=32768, help="half to profile, half to evaluate")
    parser.add_argument("--text", help="evaluate on this text (as --data of the command line)")
    parser.add_argument("--by", nargs="+", default=["frequency", "ean-sum", "man", "reap"])
    parser.add_argument("--draws", type=int, default=3, help="random prunings")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    half = sedetect.Text(tokens=args.tokens // 2)
    stats = sedetect.profile_model(model, text=half, tokenizer=tokenizer).stats
    cut = sedetect.Text(tokens=args.tokens)
    windows = held_out(calibration_windows(model, tokenizer, args.text, cut).domains, stats)
    prefix = len(prefix_ids(tokenizer))
    found = found_places(rank(stats))
    banks = [bank for bank in find_banks(model) if bank.id.routed]
    near = expert_distances(model, banks, calibration_windows(model, tokenizer, None, half).domains)
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, dict[str, float]] = {}

    def evaluate(kept=None, groups=None, simulated=False) -> dict[str, float]:
        gone = [place for place in routed_experts(model) if kept and place.number not in kept[place.bank]]
        key = str((gone, groups))
        if key in seen:
            return seen[key]
        with tempfile.TemporaryDirectory() as folder:
            if kept and not simulated:
                prune_checkpoint(args.model, Path(folder) / "pruned", kept, groups=groups)
                left = AutoModelForCausalLM.from_pretrained(Path(folder) / "pruned", dtype=dtype).eval()
            else:
                left = model
            with ablate(model, gone, how="remove") if simulated else nullcontext():
                values = {domain: p.value for domain, p in perplexity(left, windows, prefix=prefix).items()}
        return seen.setdefault(key, values)

    def at_random(kept):
        """The same number of random experts per layer, with the protected ones among them."""
        drawn = {}
        for bank, mine in kept.items():
            order = torch.randperm(stats.banks[bank].num_experts, generator=generator).tolist()
            safe = [place.number for place in found if place.bank == bank]
            drawn[bank] = sorted([*safe, *(e for e in order if e not in safe)][: len(mine)])
        return drawn

    base = evaluate()
    results = []
    table = Table(title=f"{Path(args.model).name}, {args.dtype}: perplexity, and its mean change")
    for column in ("pruned", "by", "protected", *base, "change"):
        table.add_column(column, justify="left" if column in ("by", "protected") else "right")
    table.add_row("0%", "", "", *(f"{value:.2f}" for value in base.values()), "")

    def add(ratio: float, by: str, safe, values: dict[str, float]) -> None:
        change = statistics.fmean(values[d] / base[d] - 1 for d in base)
        names = ", ".join(map(str, safe)) or "none"
        results.append({"ratio": ratio, "by": by, "protected": names, "perplexity": values, "change": change})
        table.add_row(f"{ratio:.1%}", by, names, *(f"{value:.2f}" for value in values.values()), f"{change:+.1%}")
        print(json.dumps(results[-1]), flush=True)

    for ratio in (0.125, 0.25, 0.5):
        for by in args.by:
            for safe in ([], found):
                add(ratio, by, safe, evaluate(choose_kept(stats, by, ratio, safe)))
        kept = choose_kept(stats, "reap", ratio, found)
        for number in range(args.draws):
            add(ratio, f"random {number + 1}", found, evaluate(at_random(kept)))
        for method in METHODS:
            if method == "nearest":
                groups = group_nearest(args.model, stats, kept, found)
            else:
                groups = align_neurons(model, banks, group_ream(near, stats, "reap", kept, found))
            add(ratio, f"reap, merged by {method}", found, evaluate(kept, groups))
        for by in ("frequency", "reap"):
            uneven = choose_kept(stats, by, ratio, found, budget="global")
            add(ratio, f"{by}, global", found, evaluate(uneven, simulated=True))
    Console(width=110).print(table)
    tokens = sum(one.ids.numel() for one in windows.values())
    print(json.dumps({"benchmark": "pruning", "tokens": tokens, "baseline": base, "results": results}))


if __name__ == "__main__":
    main()
