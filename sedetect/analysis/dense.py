"""The MLPs of a dense model, which stand beside the experts of a layer of the same number under the name "F"."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sedetect.adapters.quantized import serve_linears
from sedetect.analysis.common import Group
from sedetect.analysis.matrices import expert_matrices
from sedetect.checkpoints.files import check_checkpoint, checked_path
from sedetect.checkpoints.options import Loading
from sedetect.errors import Argument, SedetectError
from sedetect.models.banks import Bank, find_dense, layer_path
from sedetect.models.identity import model_name

if TYPE_CHECKING:
    from sedetect.models.streamed import StreamedModel

DENSE = "F"
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")


def open_layers(
    path: str | Path, loading: Loading, layers_of: Callable[[nn.Module], dict[str, nn.Module]]
) -> "StreamedModel":
    """A checkpoint from which only these modules are loaded, one at a time."""
    if checked_path(path, "a checkpoint").is_dir():
        check_checkpoint(path)
    from sedetect.models.streamed import open_streamed

    return open_streamed(path, loading, weights=False, layers_of=layers_of)


class DenseModel:
    """A dense checkpoint; only one layer at a time has weights in memory."""

    def __init__(self, path: str | Path, loading: Loading):
        self._streamed = open_layers(path, loading, _dense_layers)
        self._banks = {bank.id.layer: bank for bank in find_dense(self._streamed.model)}
        self.name = model_name(self._streamed.model)

    def check(self, groups: Sequence[Group]) -> None:
        """Raise SedetectError if an MLP and the experts beside it differ in output channels."""
        for like in (group.routed for group in groups):
            bank = self._banks.get(like.id.layer)
            if bank is not None and bank.hidden != like.hidden:
                raise SedetectError(
                    Argument("against"),
                    f" {self.name}: {bank.path} writes {bank.hidden} channels, the experts of {like.path} "
                    f"{like.hidden}; give a dense model of the same width",
                )

    def lacking(self, bank: Bank) -> str:
        """The note on a layer that it does not have."""
        return f"{bank.id}: {self.name} has no MLP in a layer of this number, so {DENSE} takes no part"

    def matrices(self, like: Bank, device: torch.device) -> dict[str, torch.Tensor] | None:
        """The matrices of the MLP in that bank's layer; None if the model has fewer layers."""
        with self._loaded(like) as bank:
            if bank is None:
                return None
            return {name: m.to(device) for name, m in expert_matrices(self._streamed.model, bank).items()}

    def mlp(self, like: Bank, device: torch.device) -> "DenseMlp | None":
        """The MLP in the layer of that bank, likewise."""
        with self._loaded(like) as bank:
            if bank is None:
                return None
            module = copy.deepcopy(self._streamed.model.get_submodule(bank.path.rpartition(".")[0]))
            matrices = expert_matrices(self._streamed.model, bank)
            return DenseMlp(bank, module.to(device), {name: m[0].to(device) for name, m in matrices.items()})

    @contextmanager
    def _loaded(self, like: Bank) -> Iterator[Bank | None]:
        bank = self._banks.get(like.id.layer)
        if bank is None:
            yield None
            return
        number = self._streamed.paths.index(layer_path(bank))
        self._streamed.load(number)
        try:
            yield bank
        finally:
            self._streamed.free(number)


class DenseMlp:
    """An MLP of a dense model: x (T, H) -> (T, H). matrices: gate where it has one, up and down, (I, H) each.

    stateless: the reason why its intermediate states are unknown; None if they are known.
    """

    def __init__(self, bank: Bank, module: nn.Module, matrices: dict[str, torch.Tensor]):
        self.neurons, self.stateless = bank.intermediate, ""
        self._path, self._module, self._matrices = bank.path, module, matrices
        serve_linears(module)
        x = torch.randn(16, bank.hidden, generator=torch.Generator().manual_seed(0)).to(matrices["down"].device)
        y = self(x)
        if y.shape != x.shape:
            raise SedetectError(
                Argument("against"), f" {bank.path}: maps {tuple(x.shape)} to {tuple(y.shape)}; give another model"
            )
        self._act: Any = next((getattr(module, n) for n in _ACTIVATIONS if callable(getattr(module, n, None))), None)
        if self._act is None or not self._adds_up(x, y):
            self.stateless = f"the activation of {bank.path} is not known"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32, computed in the precision of its weights."""
        y: torch.Tensor = self._module(x.to(self._matrices["down"].dtype))
        return y.float()

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """act(W_gate x), before the product with up (T, I) float32; without a gate, act(W_up x)."""
        gate = self._matrices.get("gate", self._matrices["up"])
        found: torch.Tensor = self._act(nn.functional.linear(x.to(gate.dtype), gate))
        return found.float()

    def _adds_up(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether these states reproduce the MLP's own result y."""
        h, down = self.states(x), self._matrices["down"]
        if "gate" in self._matrices:
            up = self._matrices["up"]
            h = h * nn.functional.linear(x.to(up.dtype), up).float()
        made = h @ down.float()
        return float((made - y).norm() / y.norm()) < (1e-4 if down.dtype == torch.float32 else 2e-2)


def _dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: model.get_submodule(path) for path in map(layer_path, find_dense(model))}
