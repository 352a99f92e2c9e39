"""The adapters by class of experts outside transformers' experts interface, and the classes without one."""

from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from operator import attrgetter

from torch import nn

from sedetect.adapters.listed import ListedBlock, NllbMoeExperts, SwitchTransformersExperts, has_down
from sedetect.adapters.quantized import FP8Experts, Mxfp4GptOssExperts, has_kernel, serve_linears
from sedetect.adapters.stacked import (
    Adapter,
    AriaExperts,
    DbrxExperts,
    InklingSharedExperts,
    JetMoeExperts,
    Llama4Experts,
    LongcatFlashExperts,
    Step3p7Experts,
)
from sedetect.errors import SedetectError

# Classes whose experts cannot be measured at all.
REFUSED = {"DogeCDMoE": "its experts are rows of an embedding and have no down_proj matrix"}
# Experts that are not MLPs and have no down_proj: attention experts.
NOT_MLPS = {"JetMoeMoA"}
_KEPT = "_sedetect_adapter"  # the attribute of a module that holds its adapter

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
    "Mxfp4GptOssExperts": Mxfp4GptOssExperts,
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
    kept = vars(module)  # not as a submodule: the model keeps its parameters and state_dict
    if kept.get(_KEPT) is None or not kept[_KEPT].adapts(module):  # of the module it is a copy of
        made = adapter(path, module, parent)
        for name in ("down_proj", *made.reads):
            try:
                attrgetter(name)(made)
            except AttributeError:
                raise SedetectError(
                    f"{path} ({type(module).__name__}): transformers {version('transformers')} has its {name} in an "
                    f"unknown form; install an older one, or a newer sedetect"
                ) from None
        kept[_KEPT] = made
    return kept[_KEPT]


def serve_quantized(model: nn.Module) -> tuple[Callable[[], None], int]:
    """Let the FP8 experts and linears of a model compute with dequantized weights where no kernel of theirs runs.

    Returns what puts them back, and how many linears are served so.
    """
    with ExitStack() as undo:
        restore, served = serve_linears(model)
        undo.callback(restore)
        for path, module in model.named_modules():
            if type(module).__name__ == "FP8Experts" and not has_kernel(module.down_proj.device.type):
                adapter = adapt(path, module, model.get_submodule(path.rpartition(".")[0]))
                assert adapter is not None
                undo.callback(adapter.redirect())
        return undo.pop_all().close, served


def _is_list_of_experts(path: str, module: nn.Module, parent: nn.Module) -> bool:
    """A list of MLPs that is named for experts, or stands beside a router with one row for each of them."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or not all(has_down(child) for child in module):
        return False
    beside = [weight for child in parent.children() if child is not module for weight in child.parameters()]
    routed = any(weight.dim() == 2 and len(weight) == len(module) for weight in beside)
    return routed or "expert" in path.rpartition(".")[2].lower()
