"""Train a small MoE model from scratch and watch whether a super expert forms; see docs/formation.md.

    python examples/train_tiny_moe.py out --steps 3000
    python examples/train_tiny_moe.py out --arch qwen3_next --off gate
    sedetect timeline out/experts
    sedetect profile out/model --prove

10 layers of 32 experts, top-4, hidden size 256: 15 million parameters, on the Python sources of the installed packages
and what --text adds, each file as often as all sources together. One GPU, or a CPU and patience. Runs with the same
--seed see the same text in the same order, whatever else differs.

--off freezes what takes the place of attention sinks: the output gate of qwen3_next at 0.5, gpt_oss's learned sinks at
a logit of -1000. --no-bos leaves out the first token that all sequences share.
"""

import argparse
import json
import lzma
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from sedetect import Text
from sedetect.training import ExpertMonitor

TOKENIZER = Path(__file__).parents[1] / "tests/data/tiny-moe"
LENGTH, WARMUP, COOLDOWN = 512, 200, 0.25  # tokens; steps; share of the steps
SINKS_OFF = -1000.0


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    shared = {
        "vocab_size": len(tokenizer), "hidden_size": args.hidden, "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 64, "head_dim": 64,
        "max_position_embeddings": 2048, "num_experts_per_tok": args.top_k, "tie_word_embeddings": True,
        "output_router_logits": True, "router_aux_loss_coef": args.balance, "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
    }  # fmt: skip
    full = {"layer_types": ["full_attention"] * args.layers}
    partial = {"rope_parameters": {**shared["rope_parameters"], "partial_rotary_factor": 0.25}}
    experts, inner = args.experts, args.intermediate
    config = {
        "qwen3": lambda: Qwen3MoeConfig(**shared, num_experts=experts, moe_intermediate_size=inner),
        "mixtral": lambda: MixtralConfig(**shared, num_local_experts=experts, intermediate_size=inner),
        "gpt_oss": lambda: GptOssConfig(**shared, **full, num_local_experts=experts, intermediate_size=inner),
        "qwen3_next": lambda: Qwen3NextConfig(
            **{**shared, **full, **partial}, num_experts=experts, moe_intermediate_size=inner,
            shared_expert_intermediate_size=inner,
        ),
    }[args.arch]()  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=args.dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj.weight" in name or ("down_proj" in name and "bias" not in name):  # they write the residual
                weight /= math.sqrt(2 * args.layers)
            if args.off == "sinks" and name.endswith("sinks"):
                weight.fill_(SINKS_OFF)
                weight.requires_grad_(False)
            if args.off == "gate" and name.endswith("q_proj.weight"):
                gate_of(weight).zero_()
                weight.register_hook(without_gate)
    return model


def gate_of(weight: torch.Tensor) -> torch.Tensor:
    """The rows of qwen3_next's q_proj that make the output gate: the second half of each head's 128."""
    return weight.view(-1, 2, 64, weight.shape[1])[:, 1]


def without_gate(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gate_of(gradient).zero_()
    return gradient


def make_domains(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """A stream of token ids per file of --text, and one of the Python sources."""
    if args.ids is not None and args.ids.exists():
        return torch.load(args.ids)
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    files += sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    random.Random(0).shuffle(files)
    sources, size = [], 0
    for file in dict.fromkeys(files):
        if size > args.code * 1e6:
            break
        sources.append(file.read_text(encoding="utf-8", errors="ignore"))
        size += len(sources[-1])
    texts = [sources] + [[(lzma.open if one.suffix == ".xz" else open)(one, "rt").read()] for one in args.text]
    streams = []
    for pieces in texts:
        cut = [text[at : at + 100_000] for text in pieces for at in range(0, len(text), 100_000)]
        found = tokenizer(cut, add_special_tokens=False, verbose=False)["input_ids"]
        streams.append(torch.tensor([token for ids in found for token in [*ids, tokenizer.eos_token_id]]))
    if args.ids is not None:
        torch.save(streams, args.ids)
    return streams


def batches(domains: list[torch.Tensor], args: argparse.Namespace, bos: int):
    """(sequences, LENGTH) ids, for ever; each domain gives as many sequences as every other."""
    order = torch.Generator().manual_seed(args.seed)
    while True:
        rows = []
        for number in range(args.sequences):
            stream = domains[number % len(domains)]
            start = int(torch.randint(len(stream) - LENGTH, (), generator=order))
            row = stream[start : start + LENGTH].clone()
            if not args.no_bos:
                row = torch.cat([torch.tensor([bos]), row[:-1]])
            rows.append(row)
        yield torch.stack(rows)


def make_optimizers(weights: dict[str, torch.Tensor], args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = {name: weight for name, weight in weights.items() if weight.dim() > 1 and "bias" not in name}
    vectors = [weight for name, weight in weights.items() if name not in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if args.muon:
        chosen = [name for name, weight in matrices.items() if weight.dim() == 2 and "_proj." in name]
        by_muon = [matrices.pop(name) for name in chosen]
        optimizers.append(
            torch.optim.Muon(by_muon, lr=args.lr, weight_decay=args.decay, adjust_lr_fn="match_rms_adamw")
        )
    groups = [{"params": [*matrices.values()], "weight_decay": args.decay}, {"params": vectors, "weight_decay": 0.0}]
    return [*optimizers, torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", choices=["qwen3", "qwen3_next", "gpt_oss", "mixtral"], default="qwen3")
    parser.add_argument("--off", choices=["gate", "sinks"])
    parser.add_argument("--no-bos", action="store_true")
    parser.add_argument("--muon", action="store_true", help="for the attention matrices")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help=".txt or .xz, a domain each")
    parser.add_argument("--ids", type=Path, help="a file of the text's token ids for several runs, made if missing")
    parser.add_argument("--code", type=float, default=100, help="MB of Python sources")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=int, help="steps between checkpoints in OUT/checkpoints (default: none)")
    for name, value in {"steps": 3000, "sequences": 64, "every": 100, "layers": 10, "hidden": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"experts": 32, "top-k": 4, "intermediate": 48}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"lr": 3e-3, "decay": 0.1, "balance": 0.003}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(args.seed)
    model = make_model(args, tokenizer).to(device).train()
    if device == "cuda":
        for layer in model.model.layers:
            layer.compile()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    masters = {name: weight.detach().float().clone() for name, weight in trained.items()}  # what the optimizers update
    optimizers = make_optimizers(masters, args)
    monitor = ExpertMonitor(args.out / "experts", tokenizer=tokenizer, text=Text(4096, LENGTH), every=args.every)
    data = batches(make_domains(args, tokenizer), args, tokenizer.bos_token_id)
    args.out.mkdir(parents=True, exist_ok=True)
    start, log = time.perf_counter(), (args.out / "loss.jsonl").open("w")
    for step in range(args.steps):
        monitor.step(model, step)
        if args.save and step % args.save == 0:
            model.save_pretrained(args.out / f"checkpoints/checkpoint-{step}")
            tokenizer.save_pretrained(args.out / f"checkpoints/checkpoint-{step}")
        rate = min(1.0, (step + 1) / WARMUP, max(0.03, (args.steps - step) / (COOLDOWN * args.steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * rate
        ids = next(data).to(device, non_blocking=True)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for name, weight in trained.items():
            masters[name].grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(masters[name])
        model.zero_grad()
        if step % args.every == 0:
            seconds = time.perf_counter() - start
            log.write(json.dumps({"step": step, "loss": loss.item(), "seconds": seconds}) + "\n")
            log.flush()
    monitor.measure(model, args.steps)
    model.to(torch.bfloat16).save_pretrained(args.out / "model", max_shard_size="15MB")
    tokenizer.save_pretrained(args.out / "model")
    print(f"{args.steps} steps, {time.perf_counter() - start:.0f} s: {args.out / 'model'}")


if __name__ == "__main__":
    main()
