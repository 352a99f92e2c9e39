"""How alike the outputs of a layer's experts are, and whether routers choose large ones: every expert on every token.

One forward of the model per batch: where a layer's experts are called, all of them are also computed on all of its
tokens; the layer's own result is unchanged. y is a down_proj output before the routing weight, as in the statistics.
Nothing of size (experts, tokens, width) is kept: tokens pass in chunks, of which only sums remain.

Shared experts take part if their outputs have the same tokens and width. Where a model scales the input of an
expert by its routing weight (Llama 4), every expert is given a token as its first choice is given it.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sedetect.adapters.listed import ListedExperts
from sedetect.adapters.quantized import serve_linears
from sedetect.analysis.common import (
    Analysis,
    Group,
    LayerArrays,
    Standing,
    Text,
    groups_of,
    new_analysis,
    off_diagonal,
    standing,
    text_settings,
    to_others,
    without,
)
from sedetect.analysis.dense import DENSE, DenseMlp, DenseModel
from sedetect.analysis.matrices import gate_states
from sedetect.analysis.routing import REPEATED, chosen_slots
from sedetect.calibration.windows import Windows, batches
from sedetect.checkpoints.options import Loading
from sedetect.errors import SedetectError
from sedetect.models.attach import attach, run_inner
from sedetect.models.banks import Bank, check_eval, find_banks
from sedetect.models.layers import run_tokens
from sedetect.models.measure import gate_of
from sedetect.models.routers import RouterWatch
from sedetect.ops.choose import check_backend
from sedetect.ops.contract import ExpertWeights
from sedetect.ops.functions import every_expert

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = {"cuda": 2**28, "cpu": 2**24}  # elements of the experts' outputs at a time


@torch.no_grad()
def analyze_outputs(
    model: "PreTrainedModel",
    domains: dict[str, Windows],
    *,
    texts: Sequence[Text] = (),
    against: str | Path | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    backend: str | None = None,
    progress: Callable[[str, int], None] = lambda label, tokens: None,
) -> Analysis:
    """The outputs of all experts of a model on all tokens of text.

    Args:
        as in analyze_routing. backend: of sedetect.ops.functions, by name; None for the fastest.
        against: a dense model; the MLP of its layer of the same number is given the same tokens, and takes part under
            the name "F". All of its MLPs that do are on the model's device.
    Returns:
        an Analysis of the kind "outputs"; of a layer with E routed experts and N members, float32 unless it says
        otherwise, over all tokens of the domains:
        cosine, angular (N, N): means over the tokens of the cosine of y_i and y_j, and of 1 - arccos(cosine) / pi
        norm_mean, norm_max (N,): of ||y||; tokens (1,) int64: of which all outputs were finite
        ranked (1,) int64: tokens whose norms are not all equal; of these
        chosen_ranks (E,) int64: chosen experts by the rank of their norm among those of the token; 0 is the smallest
        rank_counts (E, E) int64: experts by (rank of their router logit, rank of their norm) for the same token, where
        the logits are not all equal either
        and of every token of the texts, one after another, T in all, the first time they pass through the layer:
        text.cosine (T, N, N), text.norm (T, N)
        text.score (T, E): softmax of the router's logits; text.index (T, k) int64, text.weight (T, k): its choice
        text.states (T, E, I): act(W_gate x), before the product with W_up x; (T, E + 1, I) with those of F
        rank_counts and text.score are missing where no router is found, text.states where weights cannot be read.
    Raises:
        SedetectError: for a layer without experts, a model in training mode, what find_banks refuses, and a dense model
            whose MLPs have another width.
    """
    check_backend(backend)
    check_eval(model)
    groups = groups_of(find_banks(model), layers)
    dense = None if against is None else DenseModel(against, Loading(model.device))
    if dense is not None:
        dense.check(groups)
    result = new_analysis("outputs", model)
    result.settings = text_settings(domains, texts) | {"against": None if dense is None else dense.name}
    with ExitStack() as stack:
        stack.callback(serve_linears(model)[0])
        watch = stack.enter_context(RouterWatch(model, [group.routed for group in groups]))
        mlps = [None if dense is None else dense.mlp(group.routed, model.device) for group in groups]
        observers = [_Observer(group, watch, backend, mlp) for group, mlp in zip(groups, mlps)]
        stack.callback(attach(model, [call for one in observers for call in one.calls()]))
        for domain, windows in domains.items():
            for ids, _ in batches(windows, batch_size):
                _run(model, observers, ids, False)
                progress(domain, ids.numel())
        for text in texts:
            _run(model, observers, text.ids[None], True)
    for one in observers:
        result.layers[one.group.routed.id] = one.result()
        result.notes += one.notes(bool(texts))
        if dense is not None and one.dense is None:
            result.notes.append(dense.lacking(one.group.routed))
    return result


def _run(model: "PreTrainedModel", observers: list["_Observer"], ids: torch.Tensor, keep: bool) -> None:
    for one in observers:
        one.begin(ids.numel(), keep)
    run_tokens(model, ids)
    for one in observers:
        one.end()


class _Observer:
    """Steps into the banks of one group; computes when all of them have been called. dense: stands beside them."""

    def __init__(self, group: Group, watch: RouterWatch, backend: str | None, dense: DenseMlp | None):
        self.dense = dense
        self._others = 0 if dense is None else 1
        self.group, self._watch, self._backend = group, watch, backend
        self._shared = [bank for bank in group.shared if bank.hidden == group.routed.hidden]
        self._gate = None if isinstance(group.routed.module, ListedExperts) else gate_of(group.routed)
        self._sums: OutputSums | None = None
        self._kept: list[dict[str, torch.Tensor]] = []
        self._left_out = {bank.id.kind: "of another width" for bank in group.shared if bank not in self._shared}
        self._routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._given: dict[int, torch.Tensor] = {}
        self._logits: torch.Tensor | None = None
        self._members: list[str] = Group(group.routed).members
        self._length, self._keep, self._lost, self._uneven = 0, False, False, False
        self._computed = self._repeated = False
        self._stateless: str | None = None
        self._dense_stateless = ""

    def calls(self) -> list[tuple[Bank, Callable[..., torch.Tensor]]]:
        shared = [
            (bank, partial(self._shared_experts if bank.routed else self._shared_down, number))
            for number, bank in enumerate(self._shared)
        ]
        return [(self.group.routed, self._routed), *shared]

    def begin(self, length: int, keep: bool) -> None:
        self._length, self._keep, self._computed = length, keep, False

    def end(self) -> None:
        """The forward is over: no further calls will come."""
        if self._routing is not None:
            self._compute(*self._routing)
        self._given.clear()

    def _routed(self, module: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        flat = x[:, 0] if x.dim() == 3 and len(x) == len(index) else x.reshape(-1, x.shape[-1])
        self._routing = (flat, index, weights)
        self._logits = self._watch.take(self.group.routed, len(index))
        self._compute_if_complete()
        return run_inner(module, x, index, weights)

    def _shared_experts(self, number: int, module: nn.Module, x: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """Shared experts in one module, whose x (T, n, I) is the input of their down projections."""
        self._given[number] = torch.einsum("tei,ehi->eth", x, module.down_proj)
        self._compute_if_complete()
        return run_inner(module, x, *routing)

    def _shared_down(self, number: int, original: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = original(x)
        self._given[number] = y.reshape(1, -1, y.shape[-1])
        self._compute_if_complete()
        return y

    def _compute_if_complete(self) -> None:
        if self._routing is not None and len(self._given) == len(self._shared):
            self._compute(*self._routing)

    def _compute(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> None:
        self._routing = None
        given, self._given = self._given, {}
        bank = self.group.routed
        fits = {n: y for n, y in given.items() if y.shape[1:] == (len(x), bank.hidden)}
        for number, other in enumerate(self._shared):
            if number not in fits:
                self._left_out[other.id.kind] = "not called with the tokens of the routed experts"
        if not len(x):
            return
        if self._sums is None:
            self._members = Group(bank, [other for n, other in enumerate(self._shared) if n in fits]).members
            self._members += [DENSE] * self._others
            self._sums = OutputSums(len(self._members), bank.experts, x.device)
        if self._sums.members != bank.experts + sum(map(len, fits.values())) + self._others:
            self._uneven = True
            return
        if self._keep and len(x) != self._length:
            self._lost = True
            return
        if self._keep and self._computed:
            self._repeated = True
            return
        self._computed = True
        step = chunk_tokens(len(self._members), bank.hidden, bank.intermediate, x.device)
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            y = self._outputs(x[part]).float()
            others = [fits[n][:, part].float() for n in sorted(fits)]
            if self.dense is not None:
                others.append(self.dense(x[part])[None])
            if others:
                y = torch.cat([y, *others])
            logits = None if self._logits is None else self._logits[part]
            chosen = chosen_slots(index[part], weights[part], bank.experts)
            if self._keep:
                self._keep_tokens(x[part], y, chosen, weights[part], logits)
            else:
                self._sums.add(y, chosen, None if logits is None else logits[:, : bank.experts])

    def _outputs(self, x: torch.Tensor) -> torch.Tensor:
        """(E, T, H) of the routed experts."""
        module: Any = self.group.routed.module
        if self._gate is None:  # modules in a list
            experts = module.experts
            return torch.stack([module.run_expert(experts, e, x)[1] for e in range(len(experts))])
        return every_expert(x, ExpertWeights.of(module, self._gate), backend=self._backend)

    def _keep_tokens(
        self, x: torch.Tensor, y: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor | None
    ) -> None:
        products, norms = _products(y)
        found = {"cosine": _cosines(products, norms), "norm": norms, "index": chosen, "weight": weights.float()}
        try:
            found["states"] = gate_states(self.group.routed, x).transpose(0, 1)
            if self.dense is not None:
                found["states"] = self._with_dense(self.dense, x, found["states"])
        except SedetectError as error:  # nothing else here reads the weights of modules in a list
            self._stateless = str(error)
        if logits is not None:
            found["score"] = logits.softmax(-1)[:, : self.group.routed.experts]
        self._kept.append({f"text.{name}": array.cpu() for name, array in found.items()})

    def _with_dense(self, dense: DenseMlp, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """(T, E + 1, I), where the states of the dense MLP are known and as many."""
        self._dense_stateless = dense.stateless
        if not dense.stateless and dense.neurons != states.shape[-1]:
            self._dense_stateless = f"it has {dense.neurons} neurons, and the experts {states.shape[-1]}"
        return states if self._dense_stateless else torch.cat((states, dense.states(x)[:, None]), 1)

    def result(self) -> LayerArrays:
        bank = self.group.routed
        arrays = {} if self._sums is None else self._sums.arrays()
        for name in self._kept[0] if self._kept else ():
            arrays[name] = torch.cat([one[name] for one in self._kept if name in one]).contiguous()
        return LayerArrays(bank.experts, self._members, arrays)

    def notes(self, texts: bool) -> list[str]:
        bank = self.group.routed
        found = [f"{bank.id}: its {kind} expert takes no part, {why}" for kind, why in self._left_out.items()]
        if self._watch.routers[bank.id] is None:
            found.append(f"{bank.id}: no router found beside its experts, so their scores are not known")
        if texts and self._lost:
            found.append(f"{bank.id}: regroups its tokens; those of the texts are not told apart")
        if self._repeated:
            found.append(REPEATED.format(bank.id))
        if self._stateless is not None:
            found.append(f"{bank.id}: intermediate states of the texts are not known: {self._stateless}")
        if self._dense_stateless:
            found.append(f"{bank.id}: {DENSE} is not among the intermediate states: {self._dense_stateless}")
        if self._uneven:
            found.append(f"{bank.id}: calls with other shared experts than the first one are left out")
        if self._sums is None:
            found.append(f"{bank.id}: never ran")
        elif lost := self._sums.left_out():
            found.append(f"{bank.id}: an expert gives NaN or Inf on {lost:,} of {self._sums.seen:,} tokens, left out")
        if self._sums is not None and (unranked := self._sums.unranked()):
            found.append(
                f"{bank.id}: on {unranked:,} of {self._sums.seen:,} tokens the outputs of all experts have one norm, "
                "so none is the largest; not ranked"
            )
        return found


def chunk_tokens(members: int, hidden: int, intermediate: int, device: torch.device) -> int:
    """The number of tokens whose outputs of all experts are in memory at a time."""
    return max(1, _CHUNK.get(device.type, _CHUNK["cpu"]) // (members * max(hidden, 2 * intermediate)))


class OutputSums:
    """Running sums over tokens of N experts' outputs, the first E of them routed, on the device."""

    def __init__(self, members: int, experts: int, device: torch.device):
        self.members, self.experts = members, experts

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._cosine, self._angular = zeros(members, members), zeros(members, members)
        self._norm, self._largest = zeros(members), zeros(members, dtype=torch.float32)
        self._tokens, self._scored, self.seen = zeros(1, dtype=torch.int64), False, 0
        self._ranked = zeros(1, dtype=torch.int64)
        self._chosen = zeros(experts + 1, dtype=torch.int64)
        self._ranks = zeros(experts * experts, dtype=torch.int64)

    def add(self, y: torch.Tensor, chosen: torch.Tensor, logits: torch.Tensor | None) -> None:
        """y (N, T, H) float32 of T tokens; chosen (T, k) int64, E for slots without an expert; logits (T, E).

        Tokens with a NaN or Inf in an output are left out. Does not wait for the device.
        """
        self.seen += y.shape[1]
        products, norms = _products(y)
        finite = products.isfinite().flatten(1).all(1)
        products = torch.where(finite[:, None, None], products, 0)
        norms = torch.where(finite[:, None], norms, 0)
        cosine = _cosines(products, norms)
        angular = 1 - cosine.arccos() / math.pi
        kept = finite.to(cosine.dtype)
        self._cosine += torch.einsum("t,tij->ij", kept, cosine).double()
        self._angular += torch.einsum("t,tij->ij", kept, angular).double()
        self._norm += norms.double().sum(0)
        self._largest = torch.maximum(self._largest, norms.amax(0))
        self._tokens += finite.sum()
        ranked = finite & _differ(norms[:, : self.experts])
        self._ranked += ranked.sum()
        rank = _ranks(norms[:, : self.experts])  # (T, E)
        nobody = torch.full_like(rank[:, :1], self.experts)
        of_slot = torch.cat((rank, nobody), 1).gather(1, chosen)
        of_slot = of_slot.masked_fill(~ranked[:, None], self.experts)
        self._chosen.index_add_(0, of_slot.flatten(), torch.ones_like(of_slot.flatten()))
        if logits is not None:
            self._scored = True
            pair = _ranks(logits) * self.experts + rank
            counted = (ranked & _differ(logits))[:, None].expand(pair.shape).long()
            self._ranks.index_add_(0, pair.flatten(), counted.flatten())

    def left_out(self) -> int:
        """The number of seen tokens that are left out."""
        return self.seen - int(self._tokens)

    def unranked(self) -> int:
        """The number of counted tokens without a largest output."""
        return int(self._tokens - self._ranked)

    def arrays(self) -> dict[str, torch.Tensor]:
        """As analyze_outputs returns them."""
        tokens = self._tokens.double()
        found = {"cosine": self._cosine / tokens, "angular": self._angular / tokens, "norm_mean": self._norm / tokens}
        found = {name: array.float() for name, array in found.items()}
        found |= {"norm_max": self._largest, "tokens": self._tokens, "ranked": self._ranked}
        found["chosen_ranks"] = self._chosen[:-1]
        if self._scored:
            found["rank_counts"] = self._ranks.view(self.experts, self.experts)
        return {name: array.cpu() for name, array in found.items()}


def _products(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of y (N, T, H) float32: inner products of each token's outputs (T, N, N), and their norms (T, N)."""
    by_token = y.transpose(0, 1)
    products = torch.bmm(by_token, by_token.transpose(1, 2))
    return products, products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def _cosines(products: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """(T, N, N); 0 beside an output of zeros, and 1 on the diagonal elsewhere."""
    tiny = torch.finfo(norms.dtype).tiny
    cosine = (products / norms[:, :, None].clamp(min=tiny) / norms[:, None].clamp(min=tiny)).clamp(-1, 1)
    cosine.diagonal(dim1=1, dim2=2).copy_((norms > 0).to(cosine.dtype))
    return cosine


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """(T, E) int64: each value's place in its row from below; of equals the first is lower."""
    order = values.argsort(dim=1, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _differ(values: torch.Tensor) -> torch.Tensor:
    """(T,) bool: rows of (T, E) that have an order; one value has."""
    return (values != values[:, :1]).any(1) | (values.shape[1] == 1)


def known(layer: LayerArrays, name: str) -> torch.Tensor:
    """ "cosine" or "angular" (N, N), NaN beside members that give zeros for every token."""
    return without(layer.arrays[name], layer.arrays["norm_max"] == 0)


def summarize(layer: LayerArrays) -> dict[str, float]:
    """A summary of a layer's arrays.

    cosine, angular     mean over the pairs of routed experts, without those that give nothing but zeros
    chosen, by_chance   share of the chosen experts that are among as many with the largest norms; if chosen at random
    top                 share of tokens whose expert with the largest logit also has the largest norm
    correlation         of the ranks of logit and norm (Spearman's, mean over tokens)
    shared, dense       mean cosine of the first shared expert, of F, with the routed ones
    Unknown values are left out.
    """
    arrays, experts = layer.arrays, layer.experts
    if not arrays or not int(arrays["tokens"]):
        return {}
    tokens, chosen = int(arrays.get("ranked", arrays["tokens"])), arrays["chosen_ranks"].double()  # files of 0.1.0
    found = {name: float(off_diagonal(known(layer, name), experts).double().mean()) for name in ("cosine", "angular")}
    if chosen.sum():
        k = max(1, round(float(chosen.sum()) / tokens))
        found |= {"chosen": float(chosen[-k:].sum() / chosen.sum()), "by_chance": k / experts}
    if "rank_counts" in arrays and arrays["rank_counts"].any():
        counts = arrays["rank_counts"].double()
        tokens = int(counts[0].sum())
        found["top"] = float(counts[-1, -1] / tokens)
        places = torch.arange(experts, dtype=torch.float64)
        squares = (places[:, None] - places).square()
        if experts > 1:
            found["correlation"] = 1 - 6 * float((counts * squares).sum()) / tokens / (experts * (experts**2 - 1))
    for number, name in reversed(list(enumerate(layer.members[experts:], experts))):
        mean = float(known(layer, "cosine")[number, :experts].double().nanmean())
        found["dense" if name == DENSE else "shared"] = mean
    return found


def standings(layer: LayerArrays, expert: int) -> dict[str, Standing]:
    """The Standing of one routed expert in its layer: by the norms of its outputs on all tokens, and by their
    similarity to the others'.
    """
    if not layer.arrays:
        return {}
    arrays, experts = layer.arrays, layer.experts
    return {
        "mean norm": standing(arrays["norm_mean"][:experts], expert),
        "largest norm": standing(arrays["norm_max"][:experts].masked_fill(arrays["tokens"] == 0, torch.nan), expert),
        "cosine to others": standing(to_others(known(layer, "cosine"), experts), expert),
    }
