"""The router of a bank: the matrix with one row, the gate embedding, per expert, and its logits in a forward."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from sedetect.models.banks import Bank
from sedetect.stats.place import BankId

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


def find_router(model: nn.Module, bank: Bank) -> Router | None:
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


class RouterWatch:
    """Context manager that computes, beside every router of these banks, its logits from its own input.

    They are W x (+ bias), one number per gate embedding, before whatever the model's router makes of them.
    """

    def __init__(self, model: nn.Module, banks: Iterable[Bank]):
        self.routers = {bank.id: find_router(model, bank) for bank in banks}
        self._logits: dict[BankId, torch.Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "RouterWatch":
        for bank, router in self.routers.items():
            if router is None:
                continue
            # Some routers read the matrix of a module inside them and never call it: every module down to the owner is
            # listened to, and of those that are called the innermost speaks last.
            parts = router.path.split(".")
            for depth in range(1, len(parts) + 1):
                module = router.block.get_submodule(".".join(parts[:depth]))
                hook = partial(self._heard, bank, router)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self, bank: Bank, tokens: int) -> torch.Tensor | None:
        """The logits (T, E or more) float32 of the call under way, once; None where they are not of so many tokens."""
        logits = self._logits.pop(bank.id, None)
        return logits if logits is not None and len(logits) == tokens else None

    def _heard(
        self, bank: BankId, router: Router, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if x.shape[-1] == router.weight.shape[1]:
            bias = None if router.bias is None else router.bias.float()
            x = x.reshape(-1, x.shape[-1])
            self._logits[bank] = nn.functional.linear(x.float(), router.weight.float(), bias)
