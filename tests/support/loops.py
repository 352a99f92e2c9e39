"""What experts classes outside the experts interface compute, as plain loops over (row, expert).

LOOPS[class name](module, *its forward's arguments) yields (row, expert, routing weight, h, y), by the formulas of the
modeling files; it shares no code with the adapters. DOWN[class name](module, expert) is the down_proj matrix.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

Row = tuple[int, int, float, torch.Tensor, torch.Tensor]


def glu(act, z: torch.Tensor) -> torch.Tensor:
    gate, up = z.split(len(z) // 2)
    return act(gate) * up


def slots(index: torch.Tensor, weights: torch.Tensor) -> Iterator[tuple[int, int, float]]:
    for row, (experts, gates) in enumerate(zip(index.tolist(), weights.tolist())):
        yield from ((row, expert, gate) for expert, gate in zip(experts, gates) if gate)


def llama4(module: nn.Module, routed_in: torch.Tensor) -> Iterator[Row]:
    by_expert = routed_in.view(len(module.down_proj), -1, routed_in.shape[-1])
    for expert, row in by_expert.any(-1).nonzero().tolist():
        h = glu(module.act_fn, by_expert[expert, row] @ module.gate_up_proj[expert])
        yield row, expert, 1.0, h, h @ module.down_proj[expert]


def dbrx(module: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Iterator[Row]:
    x, mlp = x.flatten(0, -2), module.mlp
    for row, expert, gate in slots(index, weights):
        w1, v1, w2 = (w.chunk(module.num_experts)[expert] for w in (mlp.w1, mlp.v1, mlp.w2))
        h = mlp.activation_fn(w1 @ x[row]) * (v1 @ x[row])
        yield row, expert, gate, h, h @ w2


def jetmoe(module: nn.Module, x: torch.Tensor) -> Iterator[Row]:
    x = x.flatten(0, -2)
    logits, index = (x @ module.router.layer.weight.T).topk(module.router.top_k)
    for row, expert, gate in slots(index, logits.softmax(-1)):
        h = glu(module.activation, module.input_linear.weight[expert] @ x[row])
        yield row, expert, gate, h, module.output_linear.weight[expert] @ h


def stacked(module: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Iterator[Row]:
    apply = getattr(module, "_apply_gate", lambda z: glu(module.act_fn, z[0])[None])
    for row, expert, gate in slots(index, weights):
        if expert < len(module.down_proj):
            h = apply((module.gate_up_proj[expert] @ x[row])[None])[0]
            yield row, expert, gate, h, module.down_proj[expert] @ h


def aria(module: nn.Module, x: torch.Tensor, logits: torch.Tensor) -> Iterator[Row]:
    top, index = logits.topk(module.config.moe_topk)
    for row, expert, gate in slots(index, top.softmax(-1)):
        h = glu(F.silu, x[row] @ module.fc1.weight[expert])
        yield row, expert, gate, h, h @ module.fc2.weight[expert]


def inkling_shared(module: nn.Module, x: torch.Tensor, gammas: torch.Tensor) -> Iterator[Row]:
    x, gammas = x.flatten(0, -2), gammas.reshape(-1, len(module.down_proj))
    for row in range(len(x)):
        for expert in range(len(module.down_proj)):
            h = module.act_fn(module.gate_proj[expert] @ x[row]) * (module.up_proj[expert] @ x[row])
            h = h * gammas[row, expert]
            yield row, expert, 1.0, h, module.down_proj[expert] @ h


def switch(module: nn.Module, x: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> Iterator[Row]:
    for row, _, expert in mask.nonzero().tolist():
        mlp = module[f"expert_{expert}"]
        h = mlp.act(mlp.wi.weight @ x[row])
        yield row, expert, float(weights[row, 0]), h, mlp.wo.weight @ h


def nllb(module: nn.Module, x: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> Iterator[Row]:
    # The mask's entries are read as expert numbers there: 0 or 1 (one_hot(router_mask) in the modeling file).
    for row, expert, gate in slots(mask, weights):
        mlp = module[f"expert_{expert}"]
        h = mlp.act(mlp.fc1.weight @ x[row] + mlp.fc1.bias)
        yield row, expert, gate, h, mlp.fc2.weight @ h + mlp.fc2.bias


LOOPS = {
    "Llama4TextExperts": llama4,
    "DbrxExperts": dbrx,
    "JetMoeMoE": jetmoe,
    "LongcatFlashExperts": stacked,
    "Step3p7Experts": stacked,
    "AriaExperts": aria,
    "InklingSharedExperts": inkling_shared,
    "SwitchTransformersExperts": switch,
    "NllbMoeExperts": nllb,
}
DOWN = {
    "DbrxExperts": lambda module, expert: module.mlp.w2.chunk(module.num_experts)[expert],
    "JetMoeParallelExperts": lambda module, expert: module.weight[expert],
    "AriaExperts": lambda module, expert: module.fc2.weight[expert],
    "SwitchTransformersExperts": lambda module, expert: module[f"expert_{expert}"].wo.weight,
    "NllbMoeExperts": lambda module, expert: module[f"expert_{expert}"].fc2.weight,
}
