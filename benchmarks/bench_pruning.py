"""What does pruning cost, with and without the super experts protected?

    python benchmarks/bench_pruning.py

Prunes a checkpoint at 12.5, 25 and 50 % by several saliencies, loads each result with AutoModelForCausalLM, and prints
its perplexity on text that the saliencies were not taken from; the last line is the same as JSON. The first half of
each domain's windows is profiled, the second half evaluated; --text evaluates another folder of texts instead.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import sedetect
from sedetect.calibration.windows import calibration_windows, prefix_ids
from sedetect.compression.budget import held_out
from sedetect.compression.pruning import choose_kept, prune_checkpoint
from sedetect.experiments.evaluation import perplexity
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
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    stats = sedetect.profile_model(model, text=sedetect.Text(tokens=args.tokens // 2), tokenizer=tokenizer).stats
    cut = sedetect.Text(tokens=args.tokens)
    windows = held_out(calibration_windows(model, tokenizer, args.text, cut).domains, stats)
    prefix = len(prefix_ids(tokenizer))
    found = found_places(rank(stats))

    def evaluate(folder: str | Path) -> dict[str, float]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return {domain: p.value for domain, p in perplexity(model, windows, prefix=prefix).items()}

    base = evaluate(args.model)
    results = []
    table = Table(title=f"{Path(args.model).name}, {args.dtype}: perplexity, and its mean change")
    for column in ("pruned", "by", "protected", *base, "change"):
        table.add_column(column, justify="left" if column in ("by", "protected") else "right")
    table.add_row("0 %", "", "", *(f"{value:.2f}" for value in base.values()), "")
    for ratio in (0.125, 0.25, 0.5):
        for by in args.by:
            for safe in ([], found):
                kept = choose_kept(stats, by, ratio, safe)
                with tempfile.TemporaryDirectory() as folder:
                    prune_checkpoint(args.model, Path(folder) / "pruned", kept)
                    values = evaluate(Path(folder) / "pruned")
                change = statistics.fmean(values[d] / base[d] - 1 for d in base)
                names = ", ".join(map(str, safe)) or "none"
                results.append({"ratio": ratio, "by": by, "protected": names, "perplexity": values, "change": change})
                cells = (f"{value:.2f}" for value in values.values())
                table.add_row(f"{ratio:.1%}", by, names, *cells, f"{change:+.1%}")
    Console(width=110).print(table)
    tokens = sum(one.ids.numel() for one in windows.values())
    print(json.dumps({"benchmark": "pruning", "tokens": tokens, "baseline": base, "results": results}))


if __name__ == "__main__":
    main()
