"""Measure the time from the command to the result, compared with transformers' time to import, load and run the same
batches.

    python benchmarks/bench_start.py /tmp/slice           16 layers of Qwen3-30B-A3B's shape, 20 GB, made if missing

Whole processes, alternated, --runs of each after one that warms the page cache: the median wall time of each, and of
transformers the seconds of import, from_pretrained and forwards. The ratio is that of each pair, since a machine can
become a third slower or faster within minutes; the last line is the same as JSON.

    sedetect       sedetect profile FOLDER --tokens 120000 --seq-len 2048 -o OUT
    transformers   import torch and transformers, from_pretrained, the forwards of the same batches (cut beforehand)

--cold drops the page cache before each run (as root on Linux), which needs a disk for the weights to come from.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

TINY = Path(__file__).parents[1] / "tests/data/tiny-moe"
RIVAL = """
import sys, time, json
start = time.perf_counter()
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
imported = time.perf_counter()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", device_map={"": device}).eval()
loaded = time.perf_counter()
with torch.inference_mode():
    for _, ids in sorted(load_file(sys.argv[2]).items()):
        model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1)
if device == "cuda":
    torch.cuda.synchronize()
ran = time.perf_counter()
print(json.dumps({"import": imported - start, "load": loaded - imported, "forwards": ran - loaded}))
"""


def make_checkpoint(folder: Path, layers: int) -> None:
    """Random weights of Qwen3-30B-A3B's shape, with the tokenizer of tiny-moe."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        norm_topk_prob=True, max_position_embeddings=40960, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)


def cut_batches(folder: Path, tokens: int, seq_len: int, batch_size: int, file: Path) -> None:
    """Write the batches that the profile runs."""
    from safetensors.torch import save_file

    from sedetect.calibration.texts import load_texts
    from sedetect.calibration.windows import batches, make_windows
    from sedetect.models.loading import load_tokenizer

    domains = make_windows(load_tokenizer(folder), load_texts(None), tokens=tokens, seq_len=seq_len).domains
    cut = [ids for windows in domains.values() for ids, _ in batches(windows, batch_size)]
    save_file({f"{number:05}": ids for number, ids in enumerate(cut)}, file)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=120000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    args = parser.parse_args()
    batch_file, out = args.folder / "batches.st", args.folder / "out"
    if not (args.folder / "config.json").is_file():
        subprocess.run(
            [sys.executable, "-c", "import sys; from pathlib import Path; import bench_start; "
             "bench_start.make_checkpoint(Path(sys.argv[1]), int(sys.argv[2]))", args.folder, str(args.layers)],
            check=True, cwd=Path(__file__).parent,
        )  # fmt: skip
    cut_batches(args.folder, args.tokens, args.seq_len, 8, batch_file)
    text = ["--tokens", str(args.tokens), "--seq-len", str(args.seq_len)]
    commands = {
        "sedetect": [sys.executable, "-m", "sedetect", "profile", args.folder, *text, "-o", out],
        "transformers": [sys.executable, "-c", RIVAL, args.folder, batch_file],
    }
    walls: dict[str, list[float]] = {name: [] for name in commands}
    parts: list[dict[str, float]] = []
    for number in range(args.runs + (not args.cold)):
        for name, command in commands.items():
            if args.cold:
                drop_caches()
            start = time.perf_counter()
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            wall = time.perf_counter() - start
            print(f"{name:13} {wall:6.2f} s", file=sys.stderr, flush=True)
            if number or args.cold:
                walls[name].append(wall)
                if name == "transformers":
                    parts.append(json.loads(done.stdout.splitlines()[-1]))
    rival = {part: statistics.median(run[part] for run in parts) for part in parts[0]}
    medians = {name: statistics.median(times) for name, times in walls.items()}
    for name, times in walls.items():
        print(f"{name:13} {medians[name]:6.2f} s   ({min(times):.2f} to {max(times):.2f})")
    print("transformers: " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in rival.items()))
    pairs = [ours / sum(run.values()) for ours, run in zip(walls["sedetect"], parts, strict=True)]
    ratio = statistics.median(pairs)
    print(f"sedetect / (import + load + forwards): {ratio:.3f}   ({min(pairs):.3f} to {max(pairs):.3f})")
    print(json.dumps({"walls": walls, "parts": parts, "ratio": ratio, "cold": args.cold}))


if __name__ == "__main__":
    main()
