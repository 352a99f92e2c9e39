"""Merging: pruned experts are averaged into kept ones instead of being dropped.

A merged expert is W = sum w_i W_i over the kept expert and those that go into it, with weights w_i of sum 1, its biases
likewise. The router keeps the row of the kept expert, as a pruned one does.

    nearest   a baseline: each expert goes into the kept one whose router row has the largest cosine with its own;
              w_i is proportional to its number of rows, neurons stay in their order
    ream      arXiv 2604.04356, as SamsungSAILMontreal/ream at 84a3030 computes it. The kept experts, most salient
              first, each take the 15 nearest (GROUP - 1) that none has taken yet, so that few take any. Near is

                  d_ij = 1 - (s_ij + t_ij) / 2
                  s_ij = (1 + cos(m_i, m_j)) / 2      m_i = mean of p_i y_i over all tokens, routed to i or not
                  t_ij = 1 - g_ij / max g             g_ij = || l_i / ||l_i|| - l_j / ||l_j|| ||

              with l_i the router's logits of i for all tokens, p their softmax over the experts, and y_i outputs before
              the routing weight.
              w_i is proportional to the saliency; neurons of i are put in the order in which the sum of their cosines
              with those of the kept expert is largest, each with its gate, up and down weights as one vector.

Where this "ream" differs from the published code: distances are of the unmerged model, in one pass for every ratio, and
not measured again behind each merged layer; the saliency is that of the profile; neurons are compared by their weights,
all of them, and not by activations and principal components too; an expert that saw no row is dropped.

Exempt experts (the protected ones, their feeders, and experts that gave a NaN or Inf) are neither merged nor merged
into.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from sedetect.adapters.listed import ListedExperts
from sedetect.analysis.matrices import expert_matrices, is_interleaved
from sedetect.calibration.windows import Windows, batches
from sedetect.checkpoints.files import read_config
from sedetect.checkpoints.layout import neuron_dimension, read_layout, router_matrix
from sedetect.errors import SedetectError
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank, check_eval
from sedetect.models.layers import run_tokens
from sedetect.models.measure import gate_of
from sedetect.models.routers import RouterWatch
from sedetect.ops.contract import ExpertWeights
from sedetect.ops.functions import every_expert
from sedetect.ranking.saliencies import saliency
from sedetect.stats.model import ModelStats
from sedetect.stats.place import PREDICTORS, BankId, Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("nearest", "ream")
GROUP = 16
_CHUNK = 2**22  # elements of all experts' outputs at a time


@dataclass(frozen=True)
class Group:
    """A merged expert.

    weights      expert -> its weight, of the kept one first; their sum is 1
    orders       expert -> (I,) int64: its neurons, in the order of those of the kept expert; as they are without
    interleaved  gate and up take turns in the matrix that holds both
    """

    weights: dict[int, float]
    orders: dict[int, torch.Tensor] = field(default_factory=dict)
    interleaved: bool = False

    def merged(self, name: str, of: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """A tensor of the merged expert, name as in its checkpoint; of gives that of one expert.

        Raises SedetectError where it is not known which of its dimensions counts neurons.
        """
        total, like = torch.zeros(()), None
        for expert, weight in self.weights.items():
            values = of(expert)
            like = values if like is None else like
            total = total + weight * self._ordered(name, expert, values).double()
        assert like is not None  # the kept expert is one of them
        return total.to(like.dtype)

    def _ordered(self, name: str, expert: int, values: torch.Tensor) -> torch.Tensor:
        order = self.orders.get(expert)
        dimension = None if order is None else neuron_dimension(name, tuple(values.shape), len(order))
        if order is None or dimension is None:
            return values
        if values.shape[dimension] == 2 * len(order):
            pairs = torch.stack((2 * order, 2 * order + 1), 1) if self.interleaved else None
            order = torch.cat((order, order + len(order))) if pairs is None else pairs.flatten()
        return values.index_select(dimension, order)


Groups = dict[BankId, dict[int, Group]]
"""Per bank: kept expert -> its Merge; kept experts without one are left out."""


def group_nearest(
    folder: str | Path, stats: ModelStats, kept: dict[BankId, list[int]], exempt: Iterable[Place] = ()
) -> Groups:
    """The groups of "nearest" for a checkpoint folder, from its routers and statistics of it.

    Raises SedetectError where the router of a layer is not found in the files.
    """
    folder = Path(folder)
    heads = any(bank.stack == PREDICTORS for bank in kept)
    layout = read_layout(folder, read_config(folder), heads)
    exempt, groups = set(exempt), {}
    for bank, stay in kept.items():
        state = stats.banks[bank]
        name = router_matrix(folder, layout, bank.layer)
        with safe_open(layout.tensors[name].file, framework="pt") as opened:
            rows = opened.get_tensor(name).double()
        units = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        taken: dict[int, list[int]] = {}
        into, away = _free(bank, stay, exempt, state.nonfinite)
        for expert in away if into else ():
            nearest = into[int((units[into] @ units[expert]).argmax())]
            taken.setdefault(nearest, []).append(expert)
        groups[bank] = _weighted(taken, state.rows.double())
    return groups


def group_ream(
    distances: Mapping[BankId, torch.Tensor],
    stats: ModelStats,
    by: str,
    kept: dict[BankId, list[int]],
    exempt: Iterable[Place] = (),
) -> Groups:
    """The groups of "ream" by expert_distances, neurons in their own order; see align_neurons.

    Raises SedetectError for statistics of a head that predicts further tokens, of whose experts there are no distances.
    """
    head = next((bank for bank in stats.banks if bank.stack == PREDICTORS), None)
    if head is not None:
        raise SedetectError(
            f"{head}: the model does not run this head, which ream cannot compare; merge by nearest, or prune"
        )
    exempt, groups = set(exempt), {}
    for bank, values in saliency(stats, by).items():
        near = distances[bank]
        unknown = stats.banks[bank].nonfinite + near.isnan().all(1).to(near.device)
        into, away = _free(bank, kept[bank], exempt, unknown)
        taken: dict[int, list[int]] = {}
        for centroid in values.argsort(descending=True, stable=True).tolist():
            if centroid in into and away:
                nearest = near[centroid].argsort(stable=True).tolist()
                taken[centroid] = [e for e in nearest if e in away][: GROUP - 1]
                away = [e for e in away if e not in taken[centroid]]
        groups[bank] = _weighted(taken, values)
    return groups


def align_neurons(model: "PreTrainedModel", banks: Iterable[Bank], groups: Groups) -> Groups:
    """groups with the orders of neurons that the model's weights give. Raises SedetectError for weights that cannot be
    read."""
    found: Groups = {}
    for bank in banks:
        mine = groups.get(bank.id, {})
        if not mine:
            continue
        neurons = torch.cat(list(expert_matrices(model, bank).values()), 2).float()
        neurons = neurons / neurons.norm(dim=2, keepdim=True).clamp(min=1e-30)
        turns = bool(bank.module.has_gate) and is_interleaved(bank)
        found[bank.id] = {
            kept: Group(
                group.weights,
                {expert: _order(neurons[kept], neurons[expert]) for expert in group.weights if expert != kept},
                turns,
            )
            for kept, group in mine.items()
        }
    return found


@torch.no_grad()
def expert_distances(
    model: "PreTrainedModel",
    banks: list[Bank],
    domains: dict[str, Windows],
    *,
    batch_size: int = 8,
    progress: Callable[[str, int], None] = lambda domain, tokens: None,
) -> dict[BankId, torch.Tensor]:
    """d of "ream" (module docstring) between the experts of each bank, (E, E) float64; every expert on every token.

    Raises SedetectError for a bank beside which no router is found, and one that no token reached.
    """
    check_eval(model)
    with ExitStack() as stack:
        watch = stack.enter_context(RouterWatch(model, banks))
        sums = {bank.id: _Sums(bank, watch) for bank in banks}
        stack.callback(attach(model, [(bank, sums[bank.id].call) for bank in banks]))
        for domain, windows in domains.items():
            for ids, _ in batches(windows, batch_size):
                run_tokens(model, ids)
                progress(domain, ids.numel())
    return {bank: one.distances() for bank, one in sums.items()}


class _Sums:
    """Of one bank: outputs (E, H) weighted by the softmax of the logits, and products of logits (E, E)."""

    def __init__(self, bank: Bank, watch: RouterWatch):
        if watch.routers[bank.id] is None:
            raise SedetectError(f"{bank.path}: no router found beside it; merge by nearest")
        self._bank, self._watch = bank, watch
        self._gate = None if isinstance(bank.module, ListedExperts) else gate_of(bank)
        self._outputs: torch.Tensor | float = 0.0
        self._products: torch.Tensor | float = 0.0

    def call(self, module: nn.Module, x: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        bank = self._bank
        flat = x[:, 0] if x.dim() == 3 and len(x) == len(index) else x.reshape(-1, x.shape[-1])
        logits = self._watch.take(bank, len(flat))
        if logits is None:
            raise SedetectError(f"{bank.path}: its router's logits do not match its tokens; merge by nearest")
        logits = logits[:, : bank.experts].double()
        chances = logits.softmax(-1)
        step = max(1, _CHUNK // (bank.experts * bank.hidden))
        parts = [slice(start, start + step) for start in range(0, len(flat), step)]
        outputs = sum(torch.einsum("te,eth->eh", chances[part], self._every(flat[part]).double()) for part in parts)
        self._outputs, self._products = self._outputs + outputs, self._products + logits.T @ logits
        return run_inner(module, x, index, gates)

    def _every(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self._bank.module
        if self._gate is None:
            return torch.stack([module.run_expert(module.experts, e, x)[1] for e in range(self._bank.experts)])
        return every_expert(x, ExpertWeights.of(module, self._gate))

    def distances(self) -> torch.Tensor:
        if isinstance(self._outputs, float) or isinstance(self._products, float):
            raise SedetectError(f"{self._bank.path}: no token of the text reached it; merge by nearest")
        alike = (1 + _cosines(self._outputs @ self._outputs.T)) / 2
        apart = (2 - 2 * _cosines(self._products)).clamp(min=0).sqrt()
        return (1 - (alike + 1 - apart / apart.nan_to_num().max().clamp(min=1e-30)) / 2).cpu()


def _order(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(I,): neuron of the second that stands for each of the first, unit vectors (I, N) both."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment((first @ second.T).cpu().numpy(), maximize=True)[1])


def _cosines(products: torch.Tensor) -> torch.Tensor:
    norms = products.diagonal().sqrt().clamp(min=1e-30)
    return products / norms[:, None] / norms


def _free(bank: BankId, stay: list[int], exempt: set[Place], unknown: torch.Tensor) -> tuple[list[int], list[int]]:
    """The experts that may be merged into, and those that may be merged."""
    free = [e for e in range(len(unknown)) if Place(*bank, e) not in exempt and not unknown[e]]
    return [e for e in free if e in stay], [e for e in free if e not in stay]


def _weighted(taken: dict[int, list[int]], of: torch.Tensor) -> dict[int, Group]:
    """Groups with weights in proportion to the values of (E,); experts of value 0 are left out."""
    groups = {}
    for kept, members in taken.items():
        parts = {kept: float(of[kept])} | {e: float(of[e]) for e in members if of[e] > 0}
        if len(parts) > 1:
            groups[kept] = Group({e: part / sum(parts.values()) for e, part in parts.items()})
    return groups
