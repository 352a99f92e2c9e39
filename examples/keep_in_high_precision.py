"""A toy weight quantizer that keeps the experts a profile says to protect.

The down_proj of every other routed expert is rounded to nearest (sedetect.compression.simulated), in place. The
statistics come from the quantizer's own calibration loop, or from a file that `sedetect profile` wrote. `sedetect
budget` does the like for whole experts, in several formats, beside random experts kept.
"""

import argparse
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sedetect
from sedetect.calibration.texts import load_texts
from sedetect.calibration.windows import make_windows
from sedetect.compression.simulated import fake_quantize
from sedetect.models.identity import model_digest


def choose(stats: sedetect.ModelStats, out_max: float, min_rows: int) -> tuple[dict[tuple, str], set[tuple]]:
    """The routed experts (bank, number) to keep, with the reason, and the rest."""
    verdicts = {(expert.bank, expert.number): expert.verdict for expert in sedetect.rank(stats).found}
    keep, rest = {}, set()
    for bank, state in stats.banks.items():
        for e in range(state.num_experts) if bank.routed else ():
            value, rows, verdict = state.out_max[e].item(), state.rows[e].item(), verdicts.get((bank, e))
            if verdict or not value <= out_max or rows < min_rows:  # not <=, so that NaN is kept too
                keep[bank, e] = f"{f'{verdict}, ' if verdict else ''}|y| {value:.5g} over {rows} rows"
            else:
                rest.add((bank, e))
    return keep, rest


@torch.no_grad()
def quantize(model: PreTrainedModel, stats: sedetect.ModelStats, experts: set[tuple], bits: int) -> None:
    for bank, e in experts:
        module = model.get_submodule(stats.header.banks[str(bank)].module)
        weight = module.down_proj[e]  # (H, I), or (I, H) when transposed
        weight.copy_(fake_quantize(weight, f"int{bits}", dim=0 if module.is_transposed else 1))


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: tuple[torch.Tensor, ...]) -> float:
    return torch.stack([model(input_ids=ids, labels=ids).loss for ids in batches]).mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--stats", help="a statistics file of this model (default: profile here)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--out-max", type=float, default=math.inf, help="also keep experts whose |y| exceeds this")
    parser.add_argument("--min-rows", type=int, default=0, help="also keep experts that saw fewer rows")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="half for calibration, half for the test; at least 2048"
    )
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = make_windows(tokenizer, load_texts(), tokens=args.tokens, seq_len=256).domains.values()
    seen, held_out = zip(*(domain.ids.chunk(2) for domain in windows))
    with sedetect.profile(model) as prof:
        for ids in () if args.stats else seen:
            model(input_ids=ids)  # the quantizer's own calibration
    stats = sedetect.ModelStats.load(args.stats) if args.stats else prof.stats
    if stats.header.digest != model_digest(model):
        parser.error(f"{args.stats}: statistics of another model ({stats.header.model})")

    keep, rest = choose(stats, args.out_max, args.min_rows)
    for (bank, e), why in keep.items():
        print(f"keep L{bank.layer}E{e}: {why}")
    print(f"perplexity {perplexity(model, held_out):.3f}")
    quantize(model, stats, rest, args.bits)
    print(f"perplexity {perplexity(model, held_out):.3f} with {len(rest)} experts at {args.bits} bit, {len(keep)} kept")
    quantize(model, stats, set(keep), args.bits)
    print(f"perplexity {perplexity(model, held_out):.3f} with none kept")


if __name__ == "__main__":
    main()
