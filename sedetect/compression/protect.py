"""Protect lists: proved and candidate super experts, in the config format of each quantizer.

    experts = protect_list(stats, neighbours=2)
    document, notes = export(stats, experts, "gptqmodel")

A list protects whole experts (every matrix of the expert), or with granularity "layer" all experts of their layers:
engines that run a layer's experts as one operation want one scheme for all of them, and a GGUF file stores them as one
tensor. No tool here takes single channels; the json form names them (the output and the intermediate channel of each
expert's largest output, whose weight is the super weight in the published models).

Of the first four, the routed experts are quantized to 4 bits and everything else stays as it is; each form says so. By
the release whose sources were read; `checked` says what the test or tests/check_exports.py runs:

    llm-compressor  0.14.0.1  a recipe (YAML)                      checked: its parser, compressed_tensors' matcher
    gptqmodel       7.7.0     QuantizeConfig(...)                  checked: its dynamic_get
    auto-round      0.16.1    AutoRound(model, ...)                checked: its get_fp_layer_names
    modelopt        0.47.0    a recipe (YAML)                      checked: its parser and quantizer matcher
    bitsandbytes    0.50.2    BitsAndBytesConfig(...) of transformers   checked: should_convert_module of transformers
    llama.cpp                 llama-quantize --tensor-type-file    by its documentation
    json                      everything that is known             this package's own form
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sedetect.adapters.listed import DOWN_NAMES
from sedetect.compression.runtimes import (
    ROUTERS,
    Linears,
    check_names,
    check_runtime,
    read_linears,
    seen_in,
)
from sedetect.documents import Document, short_repr
from sedetect.errors import Argument, SedetectError, check_type
from sedetect.models.wrappers import unwrap
from sedetect.ranking.coverage import unseen, unseen_note
from sedetect.ranking.result import Ranking
from sedetect.ranking.rule import rank
from sedetect.ranking.saliencies import found_places
from sedetect.stats.model import ModelStats, opened, same_model
from sedetect.stats.place import BankId, Place, parse_place
from sedetect.stats.proof import Proof

GRANULARITIES = ("expert", "layer")


@dataclass(frozen=True)
class Protected:
    """One expert of a protect list.

    module          path of its layer's experts module, or of the shared expert itself
    value           its largest |y|; why: its verdict ("proved", "candidate", "undecided"), or
                    "neighbour" or "feeder"
    channel         output channel of that value, intermediate: channel of the largest |h| of the same row (-1: unseen)
    """

    place: Place
    module: str
    value: float
    why: str
    channel: int
    intermediate: int

    @property
    def tail(self) -> str:
        """module from its layer on, without the prefix: "layers.1.mlp.experts"."""
        match = re.search(r"[^.]+\.\d+\..*", self.module)
        return match[0] if match else self.module

    @property
    def routed(self) -> bool:
        return self.place.bank.routed


@dataclass(frozen=True)
class ProtectList(Document):
    """A protect list in this package's own format: the modules to skip, and all data on the experts."""

    FORMAT = "sedetect-protect-list"
    REMEDY = "write one by `sedetect export STATS --to json -o FILE`"

    model: str
    digest: str
    tokens: int
    granularity: str
    modules: list[str]
    experts: list[dict[str, Any]]

    __repr__ = short_repr

    def to_dict(self) -> dict[str, Any]:
        """format, version and every field, for JSON."""
        return super().to_dict() | vars(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> "ProtectList":
        """The inverse of to_dict."""
        made = cls(**{name: document[name] for name in cls.__dataclass_fields__})
        if made.granularity not in GRANULARITIES or not all(isinstance(one["name"], str) for one in made.experts):
            raise ValueError(f"granularity {made.granularity}, experts {made.experts}")
        return made

    def places(self, sizes: dict[BankId, int]) -> list[Place]:
        """The experts protected in a model with these bank sizes; by layer, all routed experts of their banks."""
        named = [parse_place(expert["name"]) for expert in self.experts]
        if self.granularity == "expert":
            return named
        banks = dict.fromkeys(place.bank for place in named if place.bank.routed)
        return list(dict.fromkeys([*named, *(Place(*bank, e) for bank in banks for e in range(sizes.get(bank, 0)))]))


def protect_list(
    stats: ModelStats | str | os.PathLike[str],
    neighbours: int = 0,
    ranking: Ranking | None = None,
    feeders: Proof | None = None,
) -> list[Protected]:
    """Proved super experts, candidates that nothing refutes, and the routed experts with the next largest |y|, as many
    as neighbours.

    stats may be the path of a statistics file, or of a folder of results. ranking is rank(stats) where it is not given.
    With the proof of a chain as feeders, also the experts that feed the protected ones.
    Raises SedetectError if there is nothing to protect, and for a proof without a chain.
    """
    if neighbours < 0:
        raise SedetectError(Argument("neighbours"), f" {neighbours}: must be at least 0")
    for name, given, kind in (("ranking", ranking, Ranking), ("feeders", feeders, Proof)):
        if given is not None:
            check_type(name, given, kind)
    ranking = ranking or rank(stats)
    stats = opened(stats)
    found = found_places(ranking)
    if not found:
        raise SedetectError(f"nothing to protect: {ranking.headline}; profile more text, or another model")
    maxima = [
        (float(value), Place(*bank, e))
        for bank, state in sorted(stats.banks.items())
        if bank.routed
        for e, (value, rows) in enumerate(zip(state.out_max.tolist(), state.rows.tolist()))
        if rows and math.isfinite(value)
    ]
    fed_by = [] if feeders is None else _feeders(feeders, found)
    others = sorted((one for one in maxima if one[1] not in {*found, *fed_by}), key=lambda one: -one[0])[:neighbours]
    chosen = [(expert.place, str(expert.verdict)) for expert in ranking.found]
    chosen += [(place, "feeder") for place in fed_by] + [(place, "neighbour") for _, place in others]
    return [as_protected(stats, place, why) for place, why in chosen]


def _feeders(proof: Proof, found: list[Place]) -> list[Place]:
    """The feeders of the experts found, without these. Raises SedetectError for a proof that did not look for
    feeders.
    """
    verdicts = [verdict for verdict in proof.verdicts if parse_place(verdict.expert) in found]
    if all(verdict.feeders is None for verdict in verdicts):
        raise SedetectError(
            f"the proof of {proof.model} did not look for feeders; run `sedetect prove MODEL --chain -o DIR`"
        )
    named = dict.fromkeys(one.expert for verdict in verdicts for one in verdict.feeders or ())
    return [place for place in map(parse_place, named) if place not in found]


def export(
    stats: ModelStats | str | os.PathLike[str],
    experts: list[Protected],
    tool: str,
    granularity: str = "expert",
    runtime: str | None = None,
    model: nn.Module | str | Path | None = None,
) -> tuple[dict[str, Any] | str, list[str]]:
    """The protect list experts of stats in a tool's form (a JSON document, or text), and what the reader must know.

    runtime: the one that will load the quantized checkpoint (RUNTIMES); only settings tested to load there are written.
    model: the one that stats are of, or its checkpoint folder, by whose shapes the tools of SHAPED choose groups.
    Raises SedetectError for an unknown tool, granularity or runtime, for what the tool cannot express or the runtime
    does not load, and where a model is needed and missing, another one, or of shapes that no group divides.
    """
    if tool not in TOOLS:
        raise SedetectError(Argument("tool"), f" {tool}: is not known; use one of {', '.join(TOOLS)}")
    if granularity not in GRANULARITIES:
        raise SedetectError(Argument("granularity"), f" {granularity}: is not known; use expert or layer")
    if tool == "llama.cpp" and granularity == "expert":
        raise SedetectError(
            Argument("tool"),
            " llama.cpp: GGUF stores a layer's experts as one tensor; give ",
            Argument("granularity", "layer"),
        )
    if runtime is not None:
        if tool in WITHOUT_RUNTIME:
            raise SedetectError(Argument("runtime"), f" {runtime}: {tool} is for no other runtime; leave it out")
        check_runtime(tool, runtime, granularity)
    stats = opened(stats)
    if isinstance(experts, (str, os.PathLike)) or not all(isinstance(one, Protected) for one in experts):
        raise SedetectError(f"experts: is a {type(experts).__name__}, not of Protected; give that of protect_list")
    linears = None
    if tool in SHAPED:
        if model is None:
            raise SedetectError(
                Argument("tool"), f" {tool}: the model's shapes choose its groups; give ", Argument("model"), " too"
            )
        linears = read_linears(model, stats, tool, runtime)
        if tool == "auto-round" and not isinstance(model, nn.Module):
            check_names(model, _names(experts, granularity))
    document = TOOLS[tool](experts, granularity, linears)
    if tool == "json" and isinstance(document, dict):
        header = stats.header
        document = ProtectList(header.model, header.digest, header.tokens, **document).to_dict()
    notes = list(NOTES.get(tool, []))
    if linears is not None:
        notes.append(f"4 bits for the routed experts, groups of {linears.group} inputs; {_KEPT}")
    if runtime is None and tool not in WITHOUT_RUNTIME:
        notes.append(seen_in(tool))
    if unknown := unseen(stats):
        notes.append(unseen_note(unknown, "routed", stats.header.tokens))
    return document, notes


def kept_experts(stats: ModelStats, experts: list[Protected], granularity: str) -> dict[BankId, int]:
    """The number of routed experts of each bank that a list protects."""
    kept = Counter(e.place.bank for e in experts if e.routed)
    return {bank: stats.banks[bank].num_experts if granularity == "layer" else count for bank, count in kept.items()}


@dataclass(frozen=True)
class Extra:
    """The size of a list at one granularity: kept of the experts (all routed ones) in 16 bits, the others in 4.

    share of the size of all of them in 4 bits; nbytes: None where the shapes are not known
    """

    granularity: str
    kept: int
    experts: int
    share: float
    nbytes: float | None


def extra_sizes(
    stats: ModelStats, experts: list[Protected], model: nn.Module | str | Path | None = None
) -> list[Extra]:
    """Per granularity, the size of a protect list of stats.

    model: the one that stats are of, or its checkpoint folder, for its shapes; without it every routed expert counts
    the same. Raises SedetectError for another model.
    """
    total = sum(state.num_experts for bank, state in stats.banks.items() if bank.routed)
    sizes = None
    if model is not None:
        from sedetect.compression.simulated import expert_sizes
        from sedetect.models.identity import join_digest, model_id
        from sedetect.models.loading import empty_model

        live = unwrap(model) if isinstance(model, nn.Module) else empty_model(model)
        if not same_model(stats.header.digest, join_digest(model_id(live), None)):  # only sizes are read
            raise SedetectError(
                Argument("model"),
                f" {model}: the statistics are of another model ({stats.header.model}); give the folder of that one",
            )
        sizes = expert_sizes(live)
    found = []
    for granularity in GRANULARITIES:
        kept = kept_experts(stats, experts, granularity)
        count, nbytes = sum(kept.values()), None
        share = 12 / 4 * count / total if total else 0.0
        if sizes is not None:
            nbytes = sum(sizes[bank][0] * number for bank, number in kept.items()) * 12 / 8
            share = nbytes / (sum(one * number for one, number in sizes.values()) * 4 / 8)
        found.append(Extra(granularity, count, total, share, nbytes))
    return found


def protected_names(experts: list[Protected], tool: str, granularity: str) -> list[str]:
    """The names or patterns by which each tool's document skips the experts."""
    return list(dict.fromkeys(NAMES[tool](experts, granularity)))


def as_protected(stats: ModelStats, place: Place, why: str) -> Protected:
    peak = stats.banks[place.bank].peak_of(place.number)
    module = stats.header.banks[str(place.bank)].module
    path, _, name = module.rpartition(".")
    if place.bank.routed and name != "experts":
        raise SedetectError(
            f"{place}: {module} does not hold its experts by number, so no list can name them; protect the layer by "
            f"hand"
        )
    if name in DOWN_NAMES:
        module = path  # of a shared expert, whose bank is its down_proj
    value, channel, intermediate = (0.0, -1, -1) if peak is None else (peak.value, peak.channel, peak.in_channel)
    return Protected(place, module, value, why, channel, intermediate)


def _regexes(experts: list[Protected], granularity: str) -> list[str]:
    """One per expert or layer, for re.match on a module's full name, whatever stands before its layer."""
    return list(dict.fromkeys(rf"(.*\.)?{re.escape(_unit(e.tail, e, granularity))}(\.|$)" for e in experts))


def _names(experts: list[Protected], granularity: str) -> list[str]:
    return list(dict.fromkeys(_unit(expert.module, expert, granularity) for expert in experts))


def _unit(path: str, expert: Protected, granularity: str) -> str:
    return f"{path}.{expert.place.expert}" if expert.routed and granularity == "expert" else path


def _pattern(name: str) -> str:
    """A name of Linears.others as a regular expression for re.match on a module's full name."""
    return r"(.*\.)?" + re.escape(name).replace(r"\.\*", r"\.\d+")


def _described(experts: list[Protected]) -> str:
    return ", ".join(f"{expert.place} ({expert.why})" for expert in experts)


def _llm_compressor(experts: list[Protected], granularity: str, linears: Linears | None) -> str:
    assert linears is not None
    lines = [
        "# oneshot(model=MODEL, recipe=THIS_FILE, output_dir=OUT)",
        "quant_stage:",
        "  quant_modifiers:",
        "    QuantizationModifier:",
        "      config_groups:",
        "        group_0:",
        "          targets: [Linear]",
        f"          # {linears.group} divides the inputs of every routed expert's matrix.",
        f"          weights: {{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: {linears.group}}}",
        "      ignore:",
        "        # Routers choose the experts; keep them.",
        *(f"        - 're:{router}'" for router in ROUTERS),
        "        # Everything else but routed experts. To quantize some, delete their line, if the group divides their",
        "        # inputs.",
        *(
            f"        - 're:{_pattern(name)}$'  # {count} of {size} inputs"
            for name, (count, size) in linears.others.items()
        ),
        f"        # Protected, by {granularity}: {_described(experts)}.",
        *(f"        - '{name}'" for name in protected_names(experts, "llm-compressor", granularity)),
    ]
    return "\n".join(lines) + "\n"


def _gptqmodel(experts: list[Protected], granularity: str, linears: Linears | None) -> dict[str, Any]:
    assert linears is not None
    others = [f"-:{regex}" for regex in (*ROUTERS, *(f"{_pattern(name)}$" for name in linears.others))]
    kept = [*others, *protected_names(experts, "gptqmodel", granularity)]
    return {"bits": 4, "group_size": linears.group, "sym": True, "dynamic": {name: {} for name in kept}}


def _auto_round(experts: list[Protected], granularity: str, linears: Linears | None) -> dict[str, Any]:
    assert linears is not None
    # Parts of names; a router's ends where a name of its layer's experts goes on.
    others = [name.rpartition(".*.")[2] for name in linears.others]
    kept = dict.fromkeys(["mlp.gate", "router", "shared_expert_gate", *others, *_names(experts, granularity)])
    return {"scheme": "W4A16", "group_size": linears.group, "ignore_layers": ",".join(kept)}


def _modelopt(experts: list[Protected], granularity: str, linears: Linears | None) -> str:
    assert linears is not None
    names = protected_names(experts, "modelopt", granularity)
    lines = [
        "# load_recipe(THIS_FILE).quantize is the config of mtq.quantize.",
        "metadata:",
        "  recipe_type: ptq",
        "  description: Routed experts in 4 bits but for the protected ones.",
        "quantize:",
        "  algorithm: max",
        "  quant_cfg:",
        f"    # {_KEPT[0].upper()}{_KEPT[1:]}.",
        "    - {quantizer_name: '*', enable: false}",
        f"    # {linears.group} divides the inputs of every routed expert's matrix.",
        "    - quantizer_name: '*.experts.*weight_quantizer*'",
        f"      cfg: {{num_bits: 4, block_sizes: {{-1: {linears.group}, type: static}}}}",
        f"    # Protected, by {granularity}: {_described(experts)}.",
        *(f"    - {{quantizer_name: '{name}', enable: false}}" for name in names),
    ]
    return "\n".join(lines) + "\n"


def _bitsandbytes(experts: list[Protected], granularity: str, _: Linears | None) -> dict[str, Any]:
    # A list replaces the default, which is the output embedding. The others are ends of routers' names.
    return {
        "load_in_4bit": True,
        "llm_int8_skip_modules": ["lm_head", "gate", "router", "router.layer", *_names(experts, granularity)],
    }


def _llama_cpp(experts: list[Protected], granularity: str, _: Linears | None) -> str:
    return "\n".join(protected_names(experts, "llama.cpp", granularity)) + "\n"


def _modelopt_names(experts: list[Protected], granularity: str) -> list[str]:
    names = []
    for expert in experts:
        if expert.routed and granularity == "expert":
            # Fused experts: a list of weight quantizers per matrix. Experts that are modules: quantizers inside.
            names += [f"*{expert.tail}.*_weight_quantizers.{expert.place.expert}"]
        names += [f"*{_unit(expert.tail, expert, granularity)}.*"]
    return names


def _gguf_names(experts: list[Protected], _: str) -> list[str]:
    odd = [e.place for e in experts if e.place.stack != "decoder" or e.place.kind not in ("routed", "shared")]
    if odd:
        raise SedetectError(Argument("tool"), f" llama.cpp: {odd[0]}: GGUF has no name for it; protect it by hand")
    return [
        rf"^blk\.{e.place.layer}\.ffn_(gate|up|gate_up|down)_{'exps' if e.routed else 'shexp'}\.weight=bf16"
        for e in experts
    ]


def _json(experts: list[Protected], granularity: str, _: Linears | None) -> dict[str, Any]:
    listed = [
        {"name": str(e.place), "layer": e.place.layer, "kind": e.place.kind, "expert": e.place.expert, "why": e.why,
         "module": e.module, "value": e.value, "channel": e.channel, "intermediate": e.intermediate}
        for e in experts
    ]  # fmt: skip
    return {"granularity": granularity, "modules": _names(experts, granularity), "experts": listed}


TOOLS: dict[str, Callable[[list[Protected], str, Linears | None], dict[str, Any] | str]] = {
    "llm-compressor": _llm_compressor,
    "gptqmodel": _gptqmodel,
    "auto-round": _auto_round,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "llama.cpp": _llama_cpp,
    "json": _json,
}
NAMES: dict[str, Callable[[list[Protected], str], list[str]]] = {
    "llm-compressor": lambda experts, granularity: [f"re:{regex}" for regex in _regexes(experts, granularity)],
    "gptqmodel": lambda experts, granularity: [f"-:{regex}" for regex in _regexes(experts, granularity)],
    "auto-round": _names,
    "modelopt": _modelopt_names,
    "bitsandbytes": _names,
    "llama.cpp": _gguf_names,
    "json": _names,
}
SHAPED = ("llm-compressor", "gptqmodel", "auto-round", "modelopt")
WITHOUT_RUNTIME = ("llama.cpp", "json")
_KEPT = "attention, output head, routers, shared experts and dense MLPs stay as they are"
_LINEAR_ONLY = (
    "transformers >= 5 gives bitsandbytes nn.Linear modules only: experts kept in one parameter per layer stay as they "
    "are without any list, and attention is what is quantized; it acts on shared experts, and on models whose experts "
    "are modules"
)
_SHARED_INPUT = (
    "fused experts share their input quantizer: with quantized activations only their weights stay as they are"
)
NOTES: dict[str, list[str]] = {
    "modelopt": [_SHARED_INPUT],
    "bitsandbytes": [_LINEAR_ONLY],
    "llama.cpp": ["for llama-quantize --tensor-type-file FILE; llama.cpp loads tensors of mixed types"],
}
