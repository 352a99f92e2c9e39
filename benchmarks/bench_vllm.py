"""Tokens per second of a vLLM engine: without the worker extension, with it, and with a profile under way.

    python benchmarks/bench_vllm.py --layers 12 [--eager]                  # Qwen3-30B-A3B's shape, dummy weights
    python benchmarks/bench_vllm.py --model tests/data/tiny-moe --eager    # any checkpoint, also on a CPU

Run it with the Python of an environment that has vLLM and sedetect. Each engine is a process of its own; with and
without a profile, rounds take turns in one engine. A line of JSON per engine, then the ratios to the plain one: medians
over the rounds, prompt and generated tokens together. Prompts are random tokens, no two alike, and the prefix cache is
off.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
EXTENSION = "sedetect.engines.vllm.Worker"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One engine: seconds of each round, by what was under way."""
    import torch
    import vllm

    import sedetect

    measured = args.engine == "measured"
    options: dict[str, Any] = {"load_format": "dummy"} if args.model is None else {}
    with TemporaryDirectory() as folder:
        model = args.model or folder
        if args.model is None:
            from shapes import QWEN3
            from transformers import Qwen3MoeConfig

            config = Qwen3MoeConfig(
                **QWEN3, num_hidden_layers=args.layers, dtype="bfloat16", max_position_embeddings=40960
            )
            config.architectures = ["Qwen3MoeForCausalLM"]
            config.save_pretrained(folder)
        llm = vllm.LLM(
            model,
            skip_tokenizer_init=True,
            dtype=args.dtype,
            enforce_eager=args.eager,
            max_model_len=args.length + args.generate + 1,
            max_num_seqs=args.prompts,
            tensor_parallel_size=args.gpus,
            enable_expert_parallel=args.gpus > 1,
            enable_prefix_caching=False,
            worker_extension_cls=EXTENSION if measured else "",
            **options,
        )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    draw = torch.Generator().manual_seed(0)

    def generate() -> float:
        ids = torch.randint(3, vocabulary, (args.prompts, args.length), generator=draw).tolist()
        prompts = [{"prompt_token_ids": prompt} for prompt in ids]
        settings = vllm.SamplingParams(max_tokens=args.generate, temperature=0, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate(prompts, settings, use_tqdm=False)
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {}
    generate()  # warm
    for _ in range(args.rounds):
        seconds.setdefault("extension" if measured else "plain", []).append(generate())
        if measured:
            with sedetect.profile(llm) as prof:
                seconds.setdefault("profile", []).append(generate())
    tokens = args.prompts * (args.length + args.generate)
    if measured:
        computed = prof.stats.header.tokens
        assert computed == tokens - args.prompts, (computed, tokens)
    rates = {name: [round(tokens / one, 1) for one in each] for name, each in seconds.items()}
    return {"vllm": vllm.__version__, "torch": torch.__version__, "tokens": tokens, "tokens_per_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint (default: dummy weights of Qwen3-30B-A3B's shape)")
    parser.add_argument("--layers", type=int, default=12, help="of the dummy weights")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--gpus", type=int, default=1, help="expert parallel over so many")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", choices=["plain", "measured"], help="only this one, in this process")
    args = parser.parse_args()
    if args.engine is not None:
        print("RESULT", json.dumps(run(args)))
        return
    rates: dict[str, list[float]] = {}
    for engine in ("plain", "measured"):
        command = [sys.executable, Path(__file__), *sys.argv[1:], "--engine", engine]
        ran = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
        line = next(line for line in ran.stdout.splitlines() if line.startswith("RESULT")).removeprefix("RESULT ")
        print(line, flush=True)
        rates |= json.loads(line)["tokens_per_second"]
    for name, each in rates.items():
        print(f"{name:10} {median(each):12,.1f} tokens/s  {median(each) / median(rates['plain']):.3f} of plain")


if __name__ == "__main__":
    main()
