"""Switch off expert outputs at chosen tokens of known text, computing the layers below only once.

Text is known window by window: N windows of L tokens. Which tokens an expert is switched off at is decided on the
unchanged model, so that it stays the same tokens when something else is off as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sedetect.adapters.forwards import replace_forward
from sedetect.errors import SedetectError
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank
from sedetect.stats.place import BankId

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Off = Mapping[BankId, torch.Tensor]
"""Per bank (N, L, m) int64: the experts switched off at each token of each window, -1 for none."""


class WindowWatch:
    """Context manager that identifies, inside a forward of the model, the windows of its input.

    Args:
        windows: (N, L) ids of all text that may occur; windows with equal ids are one.
    """

    def __init__(self, model: "PreTrainedModel", windows: torch.Tensor):
        self._model = model
        self._places = {row.numpy().tobytes(): n for n, row in enumerate(windows)}
        self.numbers = torch.empty(0, dtype=torch.int64)

    def __enter__(self) -> "WindowWatch":
        self._handle = self._model.register_forward_pre_hook(self._read, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"].cpu()
        self.numbers = torch.tensor([self._places[row.numpy().tobytes()] for row in ids])


@contextmanager
def switched_off(model: nn.Module, banks: Sequence[Bank], watch: WindowWatch, off: Off) -> Iterator[None]:
    """Run the model without the outputs named in off while the context lasts; routing weights of others stay.

    Raises SedetectError, in the forward, for a module that regroups its tokens.
    """
    calls = [
        (bank, partial(_without if bank.routed else _without_down, bank, watch, off[bank.id]))
        for bank in banks
        if bank.id in off
    ]
    undo = attach(model, calls)
    try:
        yield
    finally:
        undo()


def _here(bank: Bank, watch: WindowWatch, off: torch.Tensor, tokens: int, device: torch.device) -> torch.Tensor:
    """(T, m): what is off at the T tokens of this call."""
    here = off[watch.numbers].flatten(0, 1)
    if len(here) != tokens:
        raise SedetectError(f"{bank.id} ({bank.path}): regroups its tokens, so they cannot be identified")
    return here.to(device)


def _without(
    bank: Bank,
    watch: WindowWatch,
    off: torch.Tensor,
    module: nn.Module,
    x: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
) -> torch.Tensor:
    here = _here(bank, watch, off, len(index), index.device)
    dropped = (index[:, :, None] == here[:, None]).any(-1)
    return run_inner(module, x, index, gates.masked_fill(dropped, 0))


def _without_down(
    bank: Bank, watch: WindowWatch, off: torch.Tensor, original: nn.Module, x: torch.Tensor
) -> torch.Tensor:
    y: torch.Tensor = original(x)
    flat = y.reshape(-1, y.shape[-1])
    here = _here(bank, watch, off, len(flat), y.device)
    return flat.masked_fill((here == 0).any(1, keepdim=True), 0).view(y.shape)


class Below:
    """The decoder layers below some layer, whose outputs are kept in one run over all windows and used in others.

    record() surrounds the first run, replay() the others: layers below give what is kept and compute nothing. A model
    whose layers hand on more than one hidden state may not allow that: compare one batch before relying on it.
    """

    def __init__(self, layers: nn.ModuleList, number: int, watch: WindowWatch):
        self._layers, self._watch = list(layers)[:number], watch
        self.share = 1 - number / len(layers)  # fraction of the layers that still run
        self._kept: dict[int, torch.Tensor] = {}
        self.usable = number > 0

    @contextmanager
    def record(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.usable:
                stack.callback(self._layers[-1].register_forward_hook(self._keep).remove)
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self._layers if self.usable else ():
                given = partial(self._give, layer is self._layers[-1])
                stack.callback(replace_forward(layer, given))
            yield

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            self.usable = False
            return
        for number, hidden in zip(self._watch.numbers.tolist(), output):
            self._kept[number] = hidden.clone()

    def _give(self, last: bool, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not last:
            hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
            return hidden
        return torch.stack([self._kept[number] for number in self._watch.numbers.tolist()])
