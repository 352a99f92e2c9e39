"""Do the tools themselves select what the protect lists mean? Run by hand; the tests hold each rule as documented.

    python tests/check_exports.py [STATS]

Needs compressed_tensors, llmcompressor, gptqmodel, auto_round and modelopt importable (their releases stand in
sedetect/compression/protect.py), which the tests do not install; a tool that is missing is named and left out. STATS is
the profile of tests/data/tiny-moe, made here if it is not given. Prints one line per tool and granularity.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import sedetect
from sedetect.compression.protect import GRANULARITIES, export, protect_list

TINY = Path(__file__).parent / "data" / "tiny-moe"


def tiny() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".experts." in name]


def llm_compressor(document: str) -> set[str]:
    """Its own recipe parser, and compressed_tensors' matcher on the model as it takes the experts apart."""
    from compressed_tensors.utils.match import match_named_modules
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.recipe import Recipe

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(document)
        (modifier,) = Recipe.create_instance(str(file)).modifiers
    model = linearize_moe(tiny())
    (group,) = modifier.config_groups.values()
    taken = {name for name, _ in match_named_modules(model, group.targets, modifier.ignore)}
    assert all(".experts." in name for name in taken), sorted(taken)[:3]
    return set(linears(model)) - taken


def unfused() -> nn.Module:
    """tiny-moe with a module per expert, under the names of its checkpoint."""
    model = tiny()
    for layer in model.model.layers:
        experts = [nn.ModuleDict({f"{n}_proj": nn.Linear(2, 2) for n in ("gate", "up", "down")}) for _ in range(32)]
        layer.mlp.experts = nn.ModuleList(experts)
    return model


def gptqmodel(document: dict) -> set[str]:
    from gptqmodel.quantization.config import dynamic_get

    return {name for name in linears(unfused()) if dynamic_get(document["dynamic"], name) is False}


def auto_round(document: dict) -> set[str]:
    """Its resolver adds a dot to names that end in a digit, and then asks this."""
    from auto_round.compressors.layer_config_resolver import get_fp_layer_names

    model = unfused()
    names = [name for name, _ in model.named_modules()]
    ignored = [
        part + "." if part[-1].isdigit() and any(part + "." in name for name in names) else part
        for part in document["ignore_layers"].split(",")
    ]
    return set(get_fp_layer_names(model, ignored)) & set(linears(model))


def modelopt(document: str) -> set[str]:
    """Weight quantizers of its fused experts that its recipe switches off, under the names of the linear modules."""
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg
    from modelopt.torch.quantization.nn import TensorQuantizer

    model = tiny()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(document)
        recipe = load_recipe(file)
    mtq.replace_quant_module(model)
    set_quantizer_by_cfg(model, recipe.quantize.quant_cfg)
    off = set()
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and "_weight_quantizers." in name and not module.is_enabled:
            path, number = name.replace("_weight_quantizers", "").rsplit(".", 1)
            path, matrix = path.rsplit(".", 1)
            off |= {
                f"{path}.{number}.{part}" for part in {"gate_up_proj": ("gate_proj", "up_proj")}.get(matrix, [matrix])
            }
    return off


TOOLS: dict[str, Callable[[Any], set[str]]] = {
    "llm-compressor": llm_compressor, "gptqmodel": gptqmodel, "auto-round": auto_round, "modelopt": modelopt
}  # fmt: skip


def main() -> None:
    stats = sedetect.ModelStats.load(sys.argv[1]) if len(sys.argv) > 1 else sedetect.profile_model(TINY).stats
    protected = protect_list(stats, 1)
    wrong = False
    for tool, select in TOOLS.items():
        for granularity in GRANULARITIES:
            document, _ = export(stats, protected, tool, granularity, model=TINY)
            wanted = {
                f"model.layers.{layer}.mlp.experts.{number}.{name}_proj"
                for layer, e in ((one.place.layer, one.place.expert) for one in protected)
                for number in ([e] if granularity == "expert" else range(32))
                for name in ("gate", "up", "down")
            }
            try:
                found = select(document)
            except ModuleNotFoundError as error:
                print(f"{tool}, {granularity}: not installed ({error.name})")
                continue
            wrong |= found != wanted
            said = "as meant" if found == wanted else f"WRONG, differs in {sorted(found ^ wanted)[:3]}"
            print(f"{tool}, {granularity}: {len(found)} linear modules left alone, {said}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
