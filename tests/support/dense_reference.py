"""Every expert on every token, as plain loops: what the eager model's experts are given, and what each would give.

GIVES[class name](module, expert, x (H,)) is the output of one expert, by the formula of its modeling file; modules
behind transformers' experts interface use their own gate, as in conformance.py.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from support.conformance import hooks
from support.loops import glu


def interface(module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    wide, narrow = getattr(module, up)[expert], module.down_proj[expert]
    wide, narrow = (wide.T, narrow.T) if module.is_transposed else (wide, narrow)
    z = wide @ x + (getattr(module, f"{up}_bias")[expert] if module.has_bias else 0)
    h = (module._apply_gate if module.has_gate else module.act_fn)(z[None])[0]
    return narrow @ h + (module.down_proj_bias[expert] if module.has_bias else 0)


def dbrx(module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    w1, v1, w2 = (w.chunk(module.num_experts)[expert] for w in (module.mlp.w1, module.mlp.v1, module.mlp.w2))
    return (module.mlp.activation_fn(w1 @ x) * (v1 @ x)) @ w2


def jetmoe(module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    h = glu(module.activation, module.input_linear.weight[expert] @ x)
    return module.output_linear.weight[expert] @ h


def stacked(module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    apply = getattr(module, "_apply_gate", lambda z: glu(module.act_fn, z[0])[None])
    return module.down_proj[expert] @ apply((module.gate_up_proj[expert] @ x)[None])[0]


def nllb(module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    mlp = module[f"expert_{expert}"]
    return mlp.fc2.weight @ mlp.act(mlp.fc1.weight @ x + mlp.fc1.bias) + mlp.fc2.bias


def switch(module: nn.Module, expert: int, x: torch.Tensor) -> torch.Tensor:
    mlp = module[f"expert_{expert}"]
    return mlp.wo.weight @ mlp.act(mlp.wi.weight @ x)


GIVES = {
    "DbrxExperts": dbrx,
    "JetMoeMoE": jetmoe,
    "LongcatFlashExperts": stacked,
    "Step3p7Experts": stacked,
    "NllbMoeExperts": nllb,
    "SwitchTransformersExperts": switch,
}


@dataclass
class Heard:
    """One layer of an eager forward: inputs of its experts (T, H), their routing where they are given it, outputs of
    shared MLPs by module path (T, H), and the input and the weight of its router."""

    module: nn.Module
    x: torch.Tensor
    index: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    router: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        x, weight, bias = self.router
        return torch.stack([weight @ row + (0 if bias is None else bias) for row in x])

    @torch.no_grad()
    def outputs(self, experts: int) -> torch.Tensor:
        """(E, T, H) float64, one expert and one token at a time."""
        give = GIVES.get(type(self.module).__name__, interface)
        return torch.stack([torch.stack([give(self.module, e, x) for x in self.x]) for e in range(experts)]).double()


@torch.no_grad()
def listen(
    model: nn.Module, ids: torch.Tensor, paths: dict[str, list[str]], routers: dict[str, str]
) -> dict[str, Heard]:
    """By path of an experts module; paths: to those of the down projections of its shared experts; routers: to the path
    of the module with the router's matrix."""
    heard: dict[str, Heard] = {}
    early: dict[str, torch.Tensor] = {}  # shared experts and routers may come before the experts, or after them
    with hooks() as add:

        def given(path, module, args, kwargs):
            values = [*args, *kwargs.values()]
            routing = values[1:3] if len(values) > 2 and values[1].dim() == 2 else ()  # not where it is a mask
            heard[path] = Heard(module, values[0].reshape(-1, values[0].shape[-1]), *routing)

        def keep(path, value):
            early[path] = value.reshape(-1, value.shape[-1]).clone()

        for path, others in paths.items():
            add(
                model.get_submodule(path).register_forward_pre_hook(
                    lambda m, a, k, path=path: given(path, m, a, k), with_kwargs=True
                )
            )
            for other in others:
                add(model.get_submodule(other).register_forward_hook(lambda m, a, y, path=other: keep(path, y)))
            router = routers[path]
            add(model.get_submodule(router).register_forward_pre_hook(lambda m, a, path=router: keep(path, a[0])))
        before = model.get_experts_implementation()
        model.set_experts_implementation("eager")
        inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        model(input_ids=ids, use_cache=False, **inputs)
        model.set_experts_implementation(before)
    for path, one in heard.items():
        one.shared = {other: early[other] for other in paths[path]}
        owner = model.get_submodule(routers[path])
        bias = getattr(owner, "bias", None)
        one.router = (early[routers[path]], owner.weight, bias if isinstance(bias, torch.Tensor) else None)
    return heard
