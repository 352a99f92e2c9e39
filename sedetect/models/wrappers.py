"""Wrappers around a model or its modules: torch.compile's, PEFT's, DDP's, or the user's."""

import sys
from typing import TYPE_CHECKING

from torch import nn

from sedetect.errors import SedetectError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parts of a module's path that a checkpoint does not have: torch.compile's, and those of PEFT's layers.
_WRAPPERS = {"_orig_mod", "base_layer"}


def unwrap(model: nn.Module) -> "PreTrainedModel":
    """The transformers model itself, or the one inside other modules (PEFT, DDP, torch.compile, the user's).

    Raises SedetectError where there is none, or more than one, for wrappers that run copies or parts of it, and for
    what is not a module, such as the path of a model.
    """
    if not isinstance(model, nn.Module):
        raise SedetectError(
            f"{model!r}: is a {type(model).__name__}; give a loaded model (AutoModelForCausalLM.from_pretrained), or a "
            "checkpoint's folder or hub name to profile_model"
        )
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model
    name = type(model).__name__
    found: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise SedetectError(
                f"{name}: DataParallel runs a copy of the model on each of {len(module.device_ids)} devices, which are "
                "not followed; profile its .module"
            )
        if _is_fsdp(module, "FullyShardedDataParallel"):
            raise SedetectError(
                f"{name}: FullyShardedDataParallel flattens the weights; shard with fully_shard (FSDP2)"
            )
        if isinstance(module, PreTrainedModel) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    if len(found) > 1:
        raise SedetectError(f"{name}: holds {len(found)} models ({', '.join(found)}); give the one to profile")
    if not found:
        raise SedetectError(f"{name}: not a transformers model, and none is inside; give one")
    return next(iter(found.values()))


def checkpoint_name(path: str) -> str:
    """A module's path in a model as its checkpoint names it, without the wrappers of modules inside."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard (FSDP2) keeps a part of its weights on each rank, and brings the others for a forward."""
    return any(_is_fsdp(module, "FSDPModule") for module in model.modules())


def _is_fsdp(module: nn.Module, name: str) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # which nothing has imported where no model is wrapped by it
    return fsdp is not None and isinstance(module, getattr(fsdp, name))
