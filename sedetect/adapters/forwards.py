"""Temporarily replace a module's forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

_BEFORE = "_sedetect_before"  # of a module: what stood in the attributes that are replaced, the earliest first


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """What the module computes now, without accelerate's hooks (of device_map)."""
    return getattr(module, _slot(module))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let a module compute forward, inside its hooks. Returns what gives it back its own, or that of its class."""
    return replace_method(module, _slot(module), forward)


def replace_method(module: nn.Module, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Let a module have another method, and copies of it in memory or in files its own. Returns what undoes it."""
    own = vars(module)
    before = own.setdefault(_BEFORE, {})
    before.setdefault(name, []).append({name: own[name]} if name in own else {})
    own[name] = method
    own["__reduce_ex__"] = partial(_reduce_without, module)
    return partial(_put_back, module, name)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """replace_forward while the context lasts."""
    undo = replace_forward(module, forward)
    try:
        yield
    finally:
        undo()


def _put_back(module: nn.Module, name: str) -> None:
    own = vars(module)
    before = own[_BEFORE]
    del own[name]
    own.update(before[name].pop())
    if not before[name]:
        del before[name]
    if not before:
        del own[_BEFORE], own["__reduce_ex__"]


def _reduce_without(module: nn.Module, protocol: Any) -> Any:
    """What copy and pickle ask of a module, as if nothing were replaced."""
    reduced: Any = type(module).__reduce_ex__(module, protocol)  # typed as if it might be a string
    function, args, state, *rest = reduced
    before = vars(module)[_BEFORE]
    state = {name: value for name, value in state.items() if name not in (*before, _BEFORE, "__reduce_ex__")}
    for earliest, *_ in before.values():
        state.update(earliest)
    return function, args, state, *rest


def _slot(module: nn.Module) -> str:
    """The attribute to replace. Hooks wrap forward: they bring inputs and offloaded weights to a device, and then call
    what stands in the other one.
    """
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"
