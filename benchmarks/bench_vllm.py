"""Tokens per second of a vLLM engine: without the worker extension, with it, and with a profile under way.

    python benchmarks/bench_vllm.py --layers 12 [--eager]                  # Qwen3-30B-A3B's shape, dummy weights
    python benchmarks/bench_vllm.py --model tests/data/tiny-moe --eager    # any checkpoint, also on a CPU

Run it with the Python of an environment that has vLLM and sedetect. Two engines, without the extension and with it, are
processes that start at the same time, share the device's memory, and then take turns: one generates while the other
waits. A line of JSON per round as soon as it is over, then the ratios to the plain engine: medians over the rounds,
prompt and generated tokens together. Prompts are random tokens, no two alike, and the prefix cache is off.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
EXTENSION = "sedetect.engines.vllm.Worker"


def serve(args: argparse.Namespace) -> None:
    """One engine: for each line of the input, "profile" or another word, the tokens per second of one round."""
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
            gpu_memory_utilization=0.45,  # beside the other engine
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

    tokens = args.prompts * (args.length + args.generate)
    generate()  # warm
    print("RESULT", json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "tokens": tokens}), flush=True)
    for asked in sys.stdin:
        if asked.strip() == "profile":
            with sedetect.profile(llm) as prof:
                seconds = generate()
            computed = prof.stats.header.tokens
            assert computed == tokens - args.prompts, (computed, tokens)
        else:
            seconds = generate()
        print("RESULT", json.dumps(round(tokens / seconds, 1)), flush=True)


def answer(engine: subprocess.Popen[str]) -> Any:
    """The next result that an engine prints. Raises SystemExit if it ends first."""
    assert engine.stdout is not None
    for line in engine.stdout:
        if line.startswith("RESULT"):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit("an engine ended; its error is above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint (default: dummy weights of Qwen3-30B-A3B's shape)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the dummy weights")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--gpus", type=int, default=1, help="number of expert-parallel ranks")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--generate", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", choices=["plain", "measured"], help="only this variant, in this process")
    args = parser.parse_args()
    if args.engine is not None:
        serve(args)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--engine"]
    pipe = subprocess.PIPE
    plain, measured = (
        subprocess.Popen([*command, name], stdin=pipe, stdout=pipe, text=True) for name in ("plain", "measured")
    )
    runs = {"plain": plain, "extension": measured, "profile": measured}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for engine in (plain, measured):
            print(json.dumps(answer(engine)), flush=True)
        for _ in range(args.rounds):
            for name, engine in runs.items():
                print(name, file=engine.stdin, flush=True)
                rates[name].append(answer(engine))
            print(json.dumps({name: each[-1] for name, each in rates.items()}), flush=True)
    finally:
        for engine in (plain, measured):
            engine.communicate()  # closes its input, after which it ends
    for name, each in rates.items():
        print(f"{name:10} {median(each):12,.1f} tokens/s  {median(each) / median(rates['plain']):.3f} of plain")


if __name__ == "__main__":
    main()
