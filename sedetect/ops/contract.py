"""The contract between the ops and the backends: the weights of a call, and the stages that a backend implements.

T tokens, k experts per token, S = T*k routed rows, E experts, H hidden, I intermediate.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch

from sedetect.kernels.dequantize import QuantizedWeights as QuantizedWeights
from sedetect.kernels.gate import Gate as Gate
from sedetect.kernels.gate import gate_torch
from sedetect.kernels.plan import Plan
from sedetect.kernels.rows import Rows
from sedetect.stats.bank import BankStats

Matrices = torch.Tensor | QuantizedWeights
Function = Callable[[torch.Tensor], torch.Tensor]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Halves:
    """Gate and up projections stored separately, (E, I, H) each, instead of a gate_up (E, 2I, H)."""

    gate: torch.Tensor
    up: torch.Tensor

    def __getitem__(self, expert: int) -> torch.Tensor:
        return torch.cat((self.gate[expert], self.up[expert]))


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of the experts of one layer: down(gate(gate_up(x))) for each of the E experts.

    gate_up       (E, 2I, H), or (E, H, 2I) when transposed; (E, I, H) for experts without a gate; None where x is the
                  input of down already
    down          (E, H, I), or (E, I, H) when transposed
    gate          a Gate, which is fused; or any function (S, 2I) -> (S, I), such as the module's own; None without
                  gate_up
    gate_up_bias  (E, 2I), down_bias (E, H), or None
    transposed    both matrices are; QuantizedWeights never are
    """

    gate_up: Matrices | Halves | None
    down: Matrices
    gate: Gate | Function | None = None
    _: KW_ONLY
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    transposed: bool = False

    @classmethod
    def of(cls, module: Any, gate: Gate | Function) -> "ExpertWeights":
        """The weights of an experts module of transformers, or of an adapter, which has the same attributes."""
        up = "gate_up_proj" if module.has_gate else "up_proj"
        biases = {}
        if module.has_bias:
            biases = {"gate_up_bias": getattr(module, f"{up}_bias"), "down_bias": module.down_proj_bias}
        return cls(getattr(module, up), module.down_proj, gate, transposed=module.is_transposed, **biases)

    @property
    def stacked(self) -> Matrices:
        """gate_up as one stack of matrices, as in every call of a backend."""
        assert self.gate_up is not None and not isinstance(self.gate_up, Halves)
        return self.gate_up

    @property
    def experts(self) -> int:
        return self.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products and results; QuantizedWeights are stored in another dtype."""
        return self.down.dtype

    @property
    def hidden(self) -> int:
        return self.down.shape[2 if self.transposed else 1]

    @cached_property
    def matrices(self) -> list[Matrices]:
        """The matrices that exist, up to three."""
        up = [self.gate_up.gate, self.gate_up.up] if isinstance(self.gate_up, Halves) else [self.gate_up]
        return [matrices for matrices in (*up, self.down) if matrices is not None]

    @cached_property
    def storage(self) -> set[torch.dtype]:
        """The storage types of the QuantizedWeights among them; empty for plain tensors."""
        return {matrices.storage for matrices in self.matrices if isinstance(matrices, QuantizedWeights)}

    @property
    def fused_gate(self) -> Gate | None:
        """The gate if a kernel can compute it, else None."""
        return self.gate if isinstance(self.gate, Gate) else None

    def apply_gate(self, z: torch.Tensor) -> torch.Tensor:
        """z (S, 2I) -> h (S, I), by torch. Raises ValueError where there is no gate."""
        if self.gate is None:
            raise ValueError("gate: None; experts with gate_up need one")
        return gate_torch(self.gate, z) if isinstance(self.gate, Gate) else self.gate(z)


class Backend(Protocol[Found]):
    """The stages of an experts call, on the device where the tensors are.

    Found holds a backend's row statistics (RowStats, RowParts). Only its own update reads it, except found.best, (S,)
    float32, the largest |y| of each row. Rows without an expert are undefined, in tensors and in Found.

    Every stage may assume that refusal returned None for the device, the weights' dtype, their number of experts and
    the weights themselves; that shapes belong together and plan is of these experts (sedetect.ops.functions checks);
    and that it runs under torch.no_grad. None changes its inputs, but for update.
    """

    name: str

    def refusal(
        self, device: torch.device, dtype: torch.dtype, experts: int = 1, weights: ExpertWeights | None = None
    ) -> str | None:
        """The reason why this backend cannot serve layers of this device and weight dtype, or a call; None if it can.

        weights: those of the call, None for statistics of rows computed elsewhere. A gate with an unknown activation is
        a reason: another backend then takes the call.
        """

    def plan(self, top_k_index: torch.Tensor, num_experts: int) -> Plan:
        """The routing (T, k) int, sorted by expert; indices outside [0, E) are ignored."""

    def gate_up(self, x: torch.Tensor, plan: Plan, weights: ExpertWeights) -> torch.Tensor:
        """z (S, 2I) before the gate, sorted by expert, of x (T, H). weights.gate_up is one stack of matrices."""

    def down(self, h: torch.Tensor, plan: Plan, weights: ExpertWeights) -> tuple[torch.Tensor, Found]:
        """(y (S, H) in the weights' dtype, statistics of its rows) of h (S, I), sorted by expert."""

    def experts(
        self, x: torch.Tensor, plan: Plan, weights: ExpertWeights, gates: torch.Tensor
    ) -> tuple[torch.Tensor, Found]:
        """(out (T, H) float32 or in x's dtype, statistics of its down_proj rows) of x (T, H), gates (T, k).

        weights.gate is a Gate, and weights.gate_up one stack of matrices.
        """

    def row_stats(self, y: torch.Tensor, h: torch.Tensor) -> Found:
        """Statistics of rows computed elsewhere: y (S, H), h (S, I)."""

    def combine(self, y: torch.Tensor, plan: Plan, gates: torch.Tensor) -> torch.Tensor:
        """(T, H) float32: the sum over a token's slots of gates (T, k) times y (S, H), without rows that have no
        expert.
        """

    def update(self, state: BankStats, found: Found, plan: Plan, gates: torch.Tensor, rows: Rows) -> None:
        """Merge the statistics of one call into the tables that every state has, in place. gates (T, k); rows of T
        tokens.
        """


def by_stages(
    backend: Backend[Found], x: torch.Tensor, plan: Plan, weights: ExpertWeights, gates: torch.Tensor
) -> tuple[torch.Tensor, Found]:
    """Backend.experts from the other stages, for a backend that fuses nothing."""
    h = weights.apply_gate(backend.gate_up(x, plan, weights))
    y, found = backend.down(h, plan, weights)
    return backend.combine(y, plan, gates), found


def gate_refusal(weights: ExpertWeights, known: frozenset[str]) -> str | None:
    """The reason why a backend with these activations cannot serve the weights; None if it can."""
    gate = weights.fused_gate
    if gate is None or gate.activation in known:
        return None
    return f"it has no kernel for the activation {gate.activation}"
