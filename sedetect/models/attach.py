"""The plug-in point: Hugging Face MoE modules whose experts we compute, or step into.

transformers 5 sends every experts module through an experts interface, looked up by name in the module's config at
every call. We register one name when a model is attached first, and attach by giving each experts module its own copy
of its config that carries that name and the function to call: the model's config, and any other model built from it,
never change. The down_proj of a shared expert or dense MLP is substituted by a module that holds the same parameters.
attach returns what restores every object that was there. Experts outside the interface have adapters
(sedetect.adapters.registry) that are attached in the same way.
"""

import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from sedetect.adapters.quantized import fp8_layers
from sedetect.adapters.stacked import Adapter
from sedetect.errors import SedetectError
from sedetect.models.banks import Bank
from sedetect.models.wrappers import unwrap

NAME = "sedetect"


def experts_forward(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """The registered experts implementation: x (T, H), routing (T, k) twice -> (T, H), by what attach was given."""
    config: Any = module.config  # one that attach made
    return config.sedetect_call(module, *args)


class SubstitutedDown(nn.Module):
    """Stands in for a down_proj module with its parameters under their names: forward(x) is call(original, x)."""

    def __init__(self, original: nn.Module, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.__dict__["original"] = original  # not a submodule: state_dict() keeps its keys
        self.__dict__["call"] = call
        self._parameters, self._buffers, self._modules = original._parameters, original._buffers, original._modules
        self.training = original.training

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced_to(self.original, protocol)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.original, x)


def attach(
    model: nn.Module,
    calls: Sequence[tuple[Bank, Callable[..., torch.Tensor]]],
    *,
    computes: bool = False,
    innermost: bool = False,
) -> Callable[[], None]:
    """Let each bank's module be computed by its call. Returns the function that restores what was there.

    A routed bank's call gets (module, x, top_k_index, top_k_weights), another's (down_proj module, x). A call may
    step in before what was attached earlier (an ablation inside a profile): see run_inner. computes says that the calls
    do not let it run, but compute by themselves (a profile). With innermost, the call of a routed bank steps in after
    all that pass on, and sees the routing that ablations leave. Raises SedetectError where a call would see the experts
    of one rank alone.
    """
    shared = next((bank for bank, _ in calls if bank.here is not None and not computes), None)
    if shared is not None:
        raise SedetectError(f"{shared.path}: expert-parallel models are profiled, nothing else; load it on one device")
    from transformers.integrations.moe import ExpertsInterface

    fp8 = fp8_layers()
    for interface in (ExpertsInterface, *([] if fp8 is None else [fp8.FP8ExpertsInterface])):
        interface.register(NAME, experts_forward)
    model = unwrap(model)
    with ExitStack() as undo:
        for bank, call in calls:
            if bank.routed:
                owner, name = bank.module, "config"
                while innermost and not getattr(getattr(owner, name), "sedetect_computes", True):
                    owner, name = getattr(owner, name), "sedetect_inner"
                config = getattr(owner, name)
                kind: Any = type(config)
                own = kind.__new__(kind)  # copy.copy asks the config itself, which may be one of ours
                own.__dict__.update(config.__dict__)
                own._experts_implementation_internal = NAME
                own.sedetect_call = call if computes else torch.compiler.disable(call)
                own.sedetect_inner = config
                own.sedetect_computes = computes
                own.__dict__["__reduce_ex__"] = partial(_reduced_to, config)
                undo.callback(setattr, owner, name, config)
                setattr(owner, name, own)
                if isinstance(bank.module, Adapter):
                    undo.callback(bank.module.redirect())
            else:
                path, _, name = bank.path.rpartition(".")
                parent = model.get_submodule(path)
                original = getattr(parent, name)
                undo.callback(setattr, parent, name, original)
                own_call = call if computes else torch.compiler.disable(call)
                setattr(parent, name, SubstitutedDown(original, own_call))
        return undo.pop_all().close


def run_inner(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """Compute an experts module by what was there before the current attach."""
    own: Any = module.config  # one that attach made
    module.config = own.sedetect_inner
    try:
        return module(*args)
    finally:
        module.config = own


def _reduced_to(original: Any, protocol: Any) -> Any:
    """What copy and pickle ask of an object whose copies, in memory or in files, are those of the original."""
    return operator.getitem, ((original,), 0)


def is_attached(bank: Bank) -> bool:
    """Whether some call of ours computes this bank now."""
    return hasattr(bank.module.config, "sedetect_call") if bank.routed else isinstance(bank.module, SubstitutedDown)
