"""The cost of switching experts off, in plain transformers: the ground truth for verdicts.

    python benchmarks/truth.py FOLDER L1E28,L9E7 --text a.txt b.txt --windows 12

Shares no code with the package. Outputs are switched off at the first token of each window (the tokenizer's BOS) by
setting their routing weights to 0 there: of each expert alone, of all together, of all but one, and of as many others
that the first token visits in the same layers (--controls draws). Per run: the relative change of perplexity, mean and
standard error over windows, the mean attention on the first token (queries of the last three quarters) and the largest
activation of the residual stream between the first layer and the last. Everything in float32. Prints JSON.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Switch:
    """Sets the routing weights of chosen experts to 0 at the first token of each window, and records the experts
    visited."""

    def __init__(self, model: torch.nn.Module):
        self.off: set[tuple[int, int]] = set()
        self.visited: dict[int, set[int]] = {}
        self.windows = 1
        for number, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_pre_hook(self.hook(number), with_kwargs=True)

    def hook(self, layer: int):
        def before(module, args, kwargs):
            inputs = [*args, *kwargs.values()]
            index = next(one for one in inputs if one.dtype == torch.int64)
            (place,) = [n for n, one in enumerate(inputs) if one.is_floating_point() and one.shape == index.shape]
            weights = inputs[place].clone()
            first = torch.arange(0, len(index), len(index) // self.windows)
            self.visited.setdefault(layer, set()).update(index[first].flatten().tolist())
            for one in first.tolist():
                for k, expert in enumerate(index[one].tolist()):
                    if (layer, expert) in self.off:
                        weights[one, k] = 0
            inputs[place] = weights
            return tuple(inputs[: len(args)]), dict(zip(kwargs, inputs[len(args) :]))

        return before


@torch.no_grad()
def measure(model, switch: Switch, windows: torch.Tensor, off: set[tuple[int, int]]):
    """(N,) losses, mean attention on the first token, largest inner activation."""
    switch.off = off
    losses, sinks, largest = [], [], 0.0
    for ids in windows.split(4):
        switch.windows = len(ids)
        out = model(input_ids=ids, output_attentions=True, output_hidden_states=True, use_cache=False)
        logits = out.logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        losses += loss.mean(1).tolist()
        sinks.append(torch.stack([one[:, :, ids.shape[1] // 4 :, 0].mean() for one in out.attentions]).mean().item())
        largest = max(largest, *(one.abs().max().item() for one in out.hidden_states[2:-2]))
    return torch.tensor(losses, dtype=torch.float64), sum(sinks) / len(sinks), largest


def cut_windows(tokenizer, files: list[Path], most: int, length: int) -> torch.Tensor:
    """(N, length) ids: of each text the first windows, the tokenizer's BOS before each."""
    cut, body = [], length - 1
    for file in files:
        ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, min(len(ids) // body, most) * body, body):
            cut.append([tokenizer.bos_token_id, *ids[start : start + body]])
    return torch.tensor(cut)


def parser_of(description: str) -> argparse.ArgumentParser:
    """The arguments of both scripts: a checkpoint, experts, and windows of text."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("experts", type=experts_of, help="L1E28,L9E7")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=12, help="windows of each text")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    return parser


def experts_of(names: str) -> list[tuple[int, int]]:
    return [tuple(map(int, re.fullmatch(r"L(\d+)E(\d+)", name).groups())) for name in names.split(",")]


def opened(args: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model in float32, and the windows (N, length)."""
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, attn_implementation="eager")
    windows = cut_windows(AutoTokenizer.from_pretrained(args.folder), args.text, args.windows, args.length)
    return model.eval().to(args.device), windows.to(args.device)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--controls", type=int, default=3)
    args = parser.parse_args()
    experts = args.experts
    model, windows = opened(args)
    switch = Switch(model)
    base, sink, largest = measure(model, switch, windows, set())
    names = {one: f"L{one[0]}E{one[1]}" for one in experts}
    runs = {f"{names[one]} alone": {one} for one in experts}
    if len(experts) > 1:
        runs["all"] = set(experts)
    if len(experts) > 2:
        runs |= {f"all but {names[one]}": set(experts) - {one} for one in experts}
    draw = random.Random(0)
    others = {layer: sorted(switch.visited[layer] - {e for at, e in experts if at == layer}) for layer, _ in experts}
    for number in range(args.controls):
        chosen = {
            (layer, expert)
            for layer, left in others.items()
            for expert in draw.sample(left, min(len(left), sum(at == layer for at, _ in experts)))
        }
        runs[f"control {number + 1}: {', '.join(f'L{at}E{e}' for at, e in sorted(chosen))}"] = chosen
    rows = [{"off": "none", "sink": sink, "largest": largest, "windows": len(windows)}]
    for label, off in runs.items():
        losses, sink, largest = measure(model, switch, windows, off)
        change = losses - base
        error = change.std().item() / len(change) ** 0.5
        rows.append(
            {"off": label, "rise": change.mean().expm1().item(), "error": error, "sink": sink, "largest": largest}
        )
    print(json.dumps({"model": args.folder.name, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
