"""Another forward for a module, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """What the module computes now, without accelerate's hooks (of device_map)."""
    return getattr(module, _slot(module))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let a module compute forward, inside its hooks. Returns what gives it back its own, or that of its class."""
    slot = _slot(module)
    previous = vars(module).get(slot)
    setattr(module, slot, forward)
    return partial(delattr, module, slot) if previous is None else partial(setattr, module, slot, previous)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """replace_forward while the context lasts."""
    undo = replace_forward(module, forward)
    try:
        yield
    finally:
        undo()


def _slot(module: nn.Module) -> str:
    """The attribute to replace. Hooks wrap forward: they bring inputs and offloaded weights to a device, and then call
    what stands in the other one.
    """
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"
