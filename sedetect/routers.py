"""Where the router of a bank is: the matrix with one row, the gate embedding, per expert."""

from typing import NamedTuple

import torch
from torch import nn

from sedetect import hf

_NAMES = {"gate", "router"}  # what transformers calls them; remote code may not


class Router(NamedTuple):
    """path: of the module that owns the matrix, below the block that owns the experts; name: of the matrix in it."""

    block: nn.Module
    path: str
    name: str

    @property
    def owner(self) -> nn.Module:
        """The module whose input is multiplied by the matrix."""
        return self.block.get_submodule(self.path)

    @property
    def weight(self) -> torch.Tensor:
        """(E or more, D): rows beyond the experts stand for skip, identity or shared experts."""
        return getattr(self.owner, self.name)

    @property
    def bias(self) -> torch.Tensor | None:
        """(E or more,), what is added to the product; not a bias that only corrects the choice."""
        found = getattr(self.owner, "bias", None)
        return found if isinstance(found, torch.Tensor) and found.shape == self.weight.shape[:1] else None


def find_router(model: nn.Module, bank: hf.Bank) -> Router | None:
    """The router of a bank of routed experts; None where there is none beside them."""
    parent, _, experts = bank.path.rpartition(".")
    block = model.get_submodule(parent)
    found = []
    for path, weight in block.named_parameters():
        module, _, name = path.rpartition(".")
        if weight.dim() != 2 or len(weight) < bank.experts or path.startswith(f"{experts}."):
            continue
        named = bool(_NAMES & set(path.split(".")))
        if named or len(weight) == bank.experts:
            found.append(((not named, len(weight)), Router(block, module, name)))
    return min(found, key=lambda one: one[0], default=(None, None))[1]
