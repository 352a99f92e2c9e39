"""The functions of the kernel layer: expert computations that update a BankStats while they run.

T tokens, k experts per token, S = T*k routed rows, E experts, H hidden, I intermediate. All functions run under
torch.no_grad; none changes its inputs except state.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from sedetect.kernels.dequantize import QuantizedWeights
from sedetect.kernels.optional import update_channels_torch, update_coactivation_torch, update_published_torch
from sedetect.kernels.plan import Plan, every_plan, single_plan
from sedetect.kernels.rows import Rows
from sedetect.ops.choose import choose_backend
from sedetect.ops.contract import Backend, ExpertWeights, Found, Halves
from sedetect.stats.bank import BankStats

Served = Callable[[str, str | None], None]
Parts = Sequence[tuple[BankStats, Rows]]  # further states, each updated with its own rows


@torch.no_grad()
def moe_mlp(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    weights: ExpertWeights,
    state: BankStats,
    *,
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rows: Rows | None = None,
    parts: Parts = (),
    backend: str | None = None,
    served: Served | None = None,
) -> torch.Tensor:
    """The routed experts of one layer: out[t] = sum_j g[t, j] * down_e(gate(gate_up_e(x[t]))), e = top_k_index[t, j].

    Args:
        x: (T, H); or (T, k, H), an input of its own for every slot.
        top_k_index: (T, k) int; indices outside [0, E) are ignored. top_k_weights: (T, k), the g.
        weights: matrices, biases and gate of the E experts.
        state: updated in place with the statistics of every counted row (see BankStats).
        post_norm: applied to each row of the down_proj output before its routing weight; not part of the statistics.
        rows: the token of each row; None counts every row, without a position.
        parts: further states, each updated with its own rows; without the optional statistics.
        backend: name, or None for the fastest that supports this device and these weights.
        served: called with the name of the backend used, and the reason if it is not the requested one (else None).
    Returns:
        (T, H) in x's dtype.
    """
    chosen = _choose(x.device, weights.dtype, weights.experts, weights, backend, served)
    tokens = x.shape[0]
    rows = Rows.unmapped(tokens, x.device) if rows is None else rows
    _check(x.device, state, weights.experts, tokens, rows, top_k_index.shape, top_k_weights.shape, parts)
    if x.dim() == 3 and x.shape[1] != top_k_index.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}, the routing {tuple(top_k_index.shape)}: give an input for every slot")
    plan = chosen.plan(top_k_index, weights.experts)
    stacked = isinstance(weights.gate_up, (torch.Tensor, QuantizedWeights))
    fused = weights.fused_gate is not None and stacked and x.dim() == 2
    if fused and post_norm is None and state.channel_max is None:
        out, found = chosen.experts(x, plan, weights, top_k_weights)
        _update(chosen, state, found, plan, top_k_weights, rows, parts)
    else:
        h = _hidden(chosen, x, plan, weights)
        y, found = chosen.down(h, plan, weights)
        _finish(chosen, state, y, h, found, plan, top_k_weights, rows, parts)  # the norm may work in place
        out = chosen.combine(y if post_norm is None else post_norm(y), plan, top_k_weights)
    if state.coactivation is not None:
        update_coactivation_torch(state, top_k_index, top_k_weights, rows)
    return out.to(x.dtype)


def _hidden(chosen: Backend[Any], x: torch.Tensor, plan: Plan, weights: ExpertWeights) -> torch.Tensor:
    """The input of down (S, I), sorted by expert."""
    if x.dim() == 3:
        x, by_slot = x.flatten(0, 1), replace(plan, top_k=1)
    else:
        by_slot = plan
    gate_up = weights.gate_up
    if gate_up is None:
        return x[plan.order]
    if isinstance(gate_up, Halves):
        halves = (replace(weights, gate_up=half) for half in (gate_up.gate, gate_up.up))
        z = torch.cat([chosen.gate_up(x, by_slot, half) for half in halves], dim=-1)
    else:
        z = chosen.gate_up(x, by_slot, weights)
    return weights.apply_gate(z)


@torch.no_grad()
def every_expert(x: torch.Tensor, weights: ExpertWeights, *, backend: str | None = None) -> torch.Tensor:
    """The output of every expert for every token, by the stages of moe_mlp: x (T, H) -> y (E, T, H) in the weights'
    dtype.

    No routing, and no statistics are kept.
    """
    chosen = _choose(x.device, weights.dtype, weights.experts, weights, backend, None)
    plan = every_plan(len(x), weights.experts, x.device)
    y, _ = chosen.down(_hidden(chosen, x, plan, weights), plan, weights)
    return y.view(weights.experts, len(x), y.shape[1])


@torch.no_grad()
def moe_modules(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    run: Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    sizes: tuple[int, int, torch.dtype],
    state: BankStats,
    *,
    rows: Rows | None = None,
    parts: Parts = (),
    backend: str | None = None,
    served: Served | None = None,
) -> torch.Tensor:
    """moe_mlp for experts that are modules with their own forward. Synchronizes with the host, to loop over them.

    Args:
        x, top_k_index, top_k_weights, state, rows, parts, backend, served: as in moe_mlp, x (T, H).
        run: expert number and its rows (N, H) -> (their result (N, H), y (N, H), its input h (N, I)).
        sizes: number of experts, I, and the dtype of y.
    """
    experts, intermediate, dtype = sizes
    chosen = _choose(x.device, dtype, experts, None, backend, served)
    rows = Rows.unmapped(len(x), x.device) if rows is None else rows
    _check(x.device, state, experts, len(x), rows, top_k_index.shape, top_k_weights.shape, parts)
    plan = chosen.plan(top_k_index, experts)
    gathered = x[plan.order // plan.top_k]
    result, y = (x.new_zeros(gathered.shape, dtype=dtype) for _ in range(2))
    h = x.new_zeros(len(gathered), intermediate, dtype=dtype)
    offsets = plan.offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            result[start:end], y[start:end], h[start:end] = run(expert, gathered[start:end])
    out = chosen.combine(result, plan, top_k_weights)
    _finish(chosen, state, y, h, chosen.row_stats(y, h), plan, top_k_weights, rows, parts)
    if state.coactivation is not None:
        update_coactivation_torch(state, top_k_index, top_k_weights, rows)
    return out.to(x.dtype)


@torch.no_grad()
def down_stats(
    h: torch.Tensor,
    plan: Plan,
    weights: ExpertWeights,
    gates: torch.Tensor,
    state: BankStats,
    *,
    rows: Rows | None = None,
    parts: Parts = (),
    backend: str | None = None,
    served: Served | None = None,
) -> torch.Tensor:
    """The grouped down projection alone, with its statistics.

    Args:
        h: (S, I), sorted by expert as plan says. weights: only down and its bias are used.
        gates: (T, k) routing weights. state, rows, parts, backend, served: as in moe_mlp.
    Returns:
        y (S, H) in the weights' dtype, sorted by expert: exactly the values that the statistics cover.
    """
    chosen = _choose(h.device, weights.dtype, weights.experts, weights, backend, served)
    rows = Rows.unmapped(len(gates), h.device) if rows is None else rows
    _check(h.device, state, weights.experts, len(gates), rows, gates.shape, (len(h) // plan.top_k, plan.top_k), parts)
    y, found = chosen.down(h, plan, weights)
    _finish(chosen, state, y, h, found, plan, gates, rows, parts)
    return y


@torch.no_grad()
def linear_stats(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: BankStats,
    *,
    rows: Rows | None = None,
    parts: Parts = (),
    backend: str | None = None,
    served: Served | None = None,
) -> torch.Tensor:
    """A down_proj with one expert and routing weight 1: x (T, I), weight (H, I), bias (H) -> (T, H)."""
    plan, gates = single_plan(len(x), x.device), torch.ones(len(x), 1, device=x.device)
    weights = ExpertWeights(None, weight[None], down_bias=None if bias is None else bias[None])
    return down_stats(x, plan, weights, gates, state, rows=rows, parts=parts, backend=backend, served=served)


@torch.no_grad()
def output_stats(
    y: torch.Tensor,
    x: torch.Tensor,
    state: BankStats,
    *,
    rows: Rows | None = None,
    parts: Parts = (),
    backend: str | None = None,
    served: Served | None = None,
) -> None:
    """Statistics of a down_proj output y (T, H) computed elsewhere from x (T, I): one expert, routing weight 1."""
    chosen = _choose(y.device, y.dtype, 1, None, backend, served)
    rows = Rows.unmapped(len(y), y.device) if rows is None else rows
    _check(y.device, state, 1, len(y), rows, y.shape[:1], x.shape[:1], parts)
    plan, gates = single_plan(len(y), y.device), torch.ones(len(y), 1, device=y.device)
    _finish(chosen, state, y, x, chosen.row_stats(y, x), plan, gates, rows, parts)


def _choose(
    device: torch.device,
    dtype: torch.dtype,
    experts: int,
    weights: ExpertWeights | None,
    wanted: str | None,
    served: Served | None,
) -> Backend[Any]:
    chosen, why = choose_backend(device, dtype, wanted, experts, weights)
    if served is not None:
        served(chosen.name, why)
    return chosen


def _check(
    device: torch.device,
    state: BankStats,
    experts: int,
    tokens: int,
    rows: Rows,
    routing: Sequence[int],
    other: Sequence[int],
    parts: Parts = (),
) -> None:
    """Raise ValueError for inconsistent shapes, devices or layouts, because kernels read by pointer."""
    for one, own in parts:
        _check(device, one, experts, tokens, own, routing, other)
    if state.num_experts != experts:
        raise ValueError(f"state is of {state.num_experts} experts, the weights are of {experts}")
    for name, tensor in (("state", state.counts), ("rows", rows.counted)):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}; move it there with .to({str(device)!r})")
    for tensor in rows.tensors():
        if not tensor.is_contiguous():
            raise ValueError("rows: its tensors must be contiguous; build it from .contiguous() ones")
    if tuple(routing) != tuple(other) or routing[0] != tokens or rows.counted.shape[0] != tokens:
        shapes = f"{tuple(routing)} and {tuple(other)}"
        raise ValueError(
            f"{tokens} tokens, {len(rows.counted)} rows of context and shapes {shapes} do not fit together"
        )


def _finish(
    chosen: Backend[Found],
    state: BankStats,
    y: torch.Tensor,
    h: torch.Tensor,
    found: Found,
    plan: Plan,
    gates: torch.Tensor,
    rows: Rows,
    parts: Parts,
) -> None:
    if state.channel_max is not None:
        update_channels_torch(state, y, h, plan, gates, rows)
    _update(chosen, state, found, plan, gates, rows, parts)


def _update(
    chosen: Backend[Any], state: BankStats, found: Any, plan: Plan, gates: torch.Tensor, rows: Rows, parts: Parts
) -> None:
    for one, own in ((state, rows), *parts):
        chosen.update(one, found, plan, gates, own)
    if state.published_max is not None:
        update_published_torch(state, found.best, plan, gates, rows)
