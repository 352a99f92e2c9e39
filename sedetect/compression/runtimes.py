"""Tested pairs of quantizer and runtime, and the properties of a model's linear modules that quantizers need.

docs/quantizers.md has the releases, the checkpoints and the perplexities behind LOADS and REASONS.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import nn

from sedetect.checkpoints.files import shards_of
from sedetect.errors import Argument, SedetectError
from sedetect.models.wrappers import checkpoint_name, unwrap
from sedetect.stats.model import ModelStats, same_model

RUNTIMES = ("vllm", "sglang", "transformers")
GROUPS = (128, 64, 32, 16)
SERVED_GROUPS = (128, 64, 32)  # group sizes that runtimes load: vLLM's kernels, auto-round's in transformers

# (tool, runtime) -> granularities tested to load with every protected matrix in 16 bits.
LOADS: dict[tuple[str, str], tuple[str, ...]] = {
    ("llm-compressor", "vllm"): ("layer",),
    ("auto-round", "transformers"): ("expert", "layer"),
    ("bitsandbytes", "transformers"): ("expert", "layer"),
}

# (tool, runtime, granularity) -> formats beside 16 bits tested to load in one checkpoint.
MIXED: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("llm-compressor", "vllm", "layer"): ("int4",),
    # Rounding to nearest leaves modules of 3 bits in 16 without a word.
    ("auto-round", "transformers", "expert"): ("int8", "int4", "int2"),
    ("auto-round", "transformers", "layer"): ("int8", "int4", "int2"),
}

# (tool, runtime, granularity) -> what happens instead.
REASONS: dict[tuple[str, str, str], str] = {
    ("llm-compressor", "vllm", "expert"): (
        "vLLM 0.32.0 gives all experts of a layer one scheme and stops at the first matrix left out"
    ),
    ("auto-round", "vllm", "layer"): "vLLM 0.32.0 finds no place for its packed experts and stops",
    ("llm-compressor", "transformers", "expert"): (
        "transformers 5.17 to 5.24 stacks a layer's experts and stops where one is left out"
    ),
    ("llm-compressor", "transformers", "layer"): (
        "transformers 5.17 fills the layers left out with random weights and goes on, 5.23 and 5.24 stop"
    ),
}


def check_runtime(tool: str, runtime: str, granularity: str) -> None:
    """Raise SedetectError, naming a combination tested to load, unless this one was tested."""
    if runtime not in RUNTIMES:
        raise SedetectError(Argument("runtime"), f" {runtime}: is not known; use one of {', '.join(RUNTIMES)}")
    loads = LOADS.get((tool, runtime), ())
    if granularity in loads:
        return
    reason = REASONS.get((tool, runtime, granularity), f"{tool}'s checkpoints were not seen to load there")
    refusal = (Argument("runtime"), f" {runtime}: {reason}; ")
    if loads:
        raise SedetectError(*refusal, "give ", Argument("granularity", loads[0]))
    there = [f"{other} ({' or '.join(seen)})" for (other, where), seen in LOADS.items() if where == runtime]
    if there:
        raise SedetectError(*refusal, "seen to load there: ", Argument("tool"), f" {', '.join(there)}")
    elsewhere = [f"{where} ({' or '.join(seen)})" for (other, where), seen in LOADS.items() if other == tool]
    if elsewhere:
        raise SedetectError(*refusal, "seen to load: ", Argument("runtime"), f" {', '.join(elsewhere)}")
    raise SedetectError(*refusal, "nor elsewhere; for a trial of your own leave out ", Argument("runtime"))


def seen_in(tool: str) -> str:
    """One line for calls without a runtime: the runtimes tested to load this tool's checkpoints."""
    seen = [f"{runtime} by {' or '.join(loads)}" for (other, runtime), loads in LOADS.items() if other == tool]
    return f"no runtime named (--for); checkpoints of {tool} were seen to load in: {', '.join(seen) or 'none yet'}"


@dataclass(frozen=True)
class Linears:
    """The properties of a model's linear modules on which settings depend.

    group       inputs per scale: the largest of GROUPS that divides the inputs of every routed expert's matrix
    others      modules outside the routed experts, from their layer on ("layers.*.self_attn.q_proj", "lm_head"), with
                their number and their inputs; routers apart
    """

    group: int
    others: dict[str, tuple[int, int]]


ROUTERS = (r"(.*\.)?(gate|router)(\..*)?$", r".*shared_expert_gate$")


def read_linears(model: nn.Module | str | Path, stats: ModelStats, tool: str, runtime: str | None) -> Linears:
    """The linear modules of the model that stats are of: a live one, or a checkpoint folder, whose weights stay unread.

    Raises SedetectError for another model, and where no group divides the experts' inputs.
    """
    # Here, since most forms need no model, and so no transformers.
    from sedetect.models.banks import find_banks
    from sedetect.models.identity import join_digest, model_id
    from sedetect.models.loading import empty_model

    live = unwrap(model) if isinstance(model, nn.Module) else empty_model(model)
    if not same_model(stats.header.digest, join_digest(model_id(live), None)):  # only shapes are read
        raise SedetectError(
            Argument("model"), f" {model}: the statistics are of another model ({stats.header.model}); give that one"
        )
    routed = [bank for bank in find_banks(live) if bank.id.routed]
    inputs = sorted({size for bank in routed for size in (bank.hidden, bank.intermediate)})
    groups = GROUPS if runtime is None else SERVED_GROUPS
    group = next((group for group in groups if all(size % group == 0 for size in inputs)), None)
    if group is None:
        raise SedetectError(
            Argument("model"),
            f" {stats.header.model}: its experts have matrices of {' and '.join(map(str, inputs))} inputs, which no "
            f"group of {', '.join(map(str, groups))} divides; {runtime or tool} cannot take them in 4 bits",
        )
    others: Counter[tuple[str, int]] = Counter()
    for path, module in live.named_modules():
        if isinstance(module, nn.Linear) and not any(path.startswith(f"{bank.path}.") for bank in routed):
            name = re.sub(r"\.\d+(?=\.)", ".*", checkpoint_name(path))
            if not any(re.match(router, name) for router in ROUTERS):
                others[re.sub(r"^.*?([^.]+\.\*\.)", r"\1", name), module.in_features] += 1
    return Linears(group, {name: (count, size) for (name, size), count in others.items()})


def check_names(folder: str | Path, units: list[str]) -> None:
    """Raise SedetectError unless a folder's tensors are named by the modules of a list, as auto-round reads them."""
    names: set[str] = set()
    for file in shards_of(Path(folder)):
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    for unit in units:
        if not any(name.startswith(f"{unit}.") for name in names):
            raise SedetectError(
                f"{folder}: no tensor is named {unit}.*, so that auto-round would quantize it; use ",
                Argument("tool"),
                " llm-compressor, which names modules",
            )
