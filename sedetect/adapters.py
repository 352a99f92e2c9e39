"""Which adapter serves which experts outside transformers' experts interface, and what no adapter serves."""

import weakref

import torch
from torch import nn

from sedetect.listed import ListedBlock, NllbMoeExperts, SwitchTransformersExperts, has_down
from sedetect.stacked import (
    Adapter,
    AriaExperts,
    DbrxExperts,
    FP8Experts,
    InklingSharedExperts,
    JetMoeExperts,
    Llama4Experts,
    LongcatFlashExperts,
    Step3p7Experts,
)

# Classes whose experts cannot be measured at all.
REFUSED = {
    "DogeCDMoE": "its experts are rows of an embedding and have no down_proj matrix",
    "Mxfp4GptOssExperts": "experts stored in MXFP4 are not supported yet; load it with Mxfp4Config(dequantize=True)",
}
# Experts that are no MLPs, and have no down_proj to speak of: attention experts.
NOT_MLPS = {"JetMoeMoA"}

_known: "weakref.WeakKeyDictionary[nn.Module, Adapter]" = weakref.WeakKeyDictionary()

ADAPTERS: dict[str, type[Adapter]] = {
    "Llama4TextExperts": Llama4Experts,
    "DbrxExperts": DbrxExperts,
    "JetMoeMoE": JetMoeExperts,
    "LongcatFlashExperts": LongcatFlashExperts,
    "AriaExperts": AriaExperts,
    "Step3p7Experts": Step3p7Experts,
    "InklingSharedExperts": InklingSharedExperts,
    "SwitchTransformersExperts": SwitchTransformersExperts,
    "NllbMoeExperts": NllbMoeExperts,
    "FP8Experts": FP8Experts,
}


def adapt(path: str, module: nn.Module, parent: nn.Module) -> Adapter | None:
    """The adapter of an experts module outside the interface, the same one every time; None for any other module.

    Raises SedetectError for a block of experts that is not understood.
    """
    adapter = ADAPTERS.get(type(module).__name__)
    if adapter is None and _is_list_of_experts(path, module, parent):
        adapter = ListedBlock
    if adapter is None:
        return None
    if module not in _known:
        _known[module] = adapter(module, parent)
    return _known[module]


def _is_list_of_experts(path: str, module: nn.Module, parent: nn.Module) -> bool:
    """A list of MLPs that is named for experts, or stands beside a router with one row for each of them."""
    if type(module) is not nn.ModuleList or len(module) < 2 or not all(has_down(child) for child in module):
        return False
    shapes = [getattr(child, "weight", None) for child in parent.children()]
    routed = any(isinstance(w, torch.Tensor) and w.dim() == 2 and len(w) == len(module) for w in shapes)
    return routed or "expert" in path.rpartition(".")[2].lower()
