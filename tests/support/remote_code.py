"""MoE blocks as remote code has them: experts in a ModuleList, behind no interface."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

NAMES = {"w": ("w1", "w3", "w2"), "proj": ("gate_proj", "up_proj", "down_proj")}


class Expert(nn.Module):
    def __init__(self, hidden, intermediate, names):
        super().__init__()
        self.names = names
        for name, shape in zip(names, ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))):
            setattr(self, name, nn.Linear(*shape, bias=False))
        self.act_fn = nn.SiLU()

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


class MixtralBlock(nn.Module):
    """The routing of the first Mixtral code: softmax over all logits, top-k, one loop over the experts."""

    normalized = True

    def __init__(self, experts, gate, top_k, shared):
        super().__init__()
        self.experts, self.gate, self.top_k, self.shared_expert = experts, gate, top_k, shared

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(x)
        weights, chosen = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        final = torch.zeros_like(x)
        mask = F.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(mask[number])
            final.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return (final + self.shared_expert(x)).view(hidden_states.shape), logits


class Gate(nn.Module):
    def __init__(self, weight, top_k):
        super().__init__()
        self.weight, self.top_k = weight, top_k

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        weights, index = torch.topk(F.linear(x, self.weight).softmax(-1), self.top_k, dim=-1)
        return index, weights / weights.sum(-1, keepdim=True)


class DeepseekBlock(nn.Module):
    """The routing of the first DeepSeek code: a gate that chooses, tokens sorted by expert."""

    def __init__(self, experts, gate, top_k, shared):
        super().__init__()
        self.experts, self.gate, self.shared_experts = experts, Gate(gate.weight, top_k), shared

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        index, weights = self.gate(hidden_states)
        order = index.view(-1).argsort()
        counts = index.view(-1).bincount(minlength=len(self.experts)).tolist()
        parts = x[order // index.shape[1]].split(counts)
        outs = torch.cat([expert(part) for expert, part in zip(self.experts, parts) if len(part)])
        by_slot = torch.empty_like(outs)
        by_slot[order] = outs
        final = (by_slot.view(*index.shape, -1) * weights[..., None]).sum(1)
        return final.view(hidden_states.shape) + self.shared_experts(hidden_states), None


class Unpacked(nn.Module):
    """What a decoder layer of this transformers expects of its block: the hidden states alone."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states):
        return self.block(hidden_states)[0]


def as_remote_code(model, block_class, names):
    """The same model with its experts in lists."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        if not hasattr(layer.mlp, "experts"):
            continue
        stacked, hidden, intermediate = layer.mlp.experts, *layer.mlp.experts.down_proj.shape[1:]
        experts = nn.ModuleList(Expert(hidden, intermediate, NAMES[names]) for _ in stacked.down_proj)
        for number, expert in enumerate(experts):
            gate, up = stacked.gate_up_proj[number].detach().chunk(2)
            for name, weight in zip(NAMES[names], (gate, up, stacked.down_proj[number].detach())):
                getattr(expert, name).weight = nn.Parameter(weight.clone())
        router = nn.Linear(hidden, len(experts), bias=False)
        router.weight = layer.mlp.gate.weight
        layer.mlp = Unpacked(block_class(experts, router, layer.mlp.gate.top_k, NoShared(hidden)))
    return model.eval()


class NoShared(nn.Module):
    """A shared expert with an output, of no bank: it has no down_proj."""

    def __init__(self, hidden):
        super().__init__()
        self.scale = nn.Parameter(torch.full((hidden,), 0.1))

    def forward(self, x):
        return x * self.scale
