"""Parts of a model or config under other names than are known: found by what they are, or refused, or noted."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from support.checkpoints import put_model
from support.models import random_model, token_ids
from support.remote_code import NAMES, MixtralBlock, as_remote_code
from torch import nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

import sedetect
from sedetect.adapters.quantized import linear_weight
from sedetect.adapters.registry import ADAPTERS, adapt
from sedetect.analysis.matrices import expert_matrices, gate_states, is_interleaved
from sedetect.calibration.windows import Windows
from sedetect.compression.pruning import check_prunable, prune_checkpoint
from sedetect.errors import SedetectError
from sedetect.experiments.residual_stream import observe_residual
from sedetect.models.banks import find_banks
from sedetect.models.experts import expert_hidden, expert_output
from sedetect.models.loading import empty_model


def rename(module, old, new):
    """The same part under another name."""
    for table in (module._parameters, module._modules):
        if old in table:
            table[new] = table.pop(old)


def windows(ids):
    return {"text": Windows(ids, torch.arange(len(ids)), "text", {})}


def routed(model):
    return next(bank for bank in find_banks(model) if bank.id.routed)


@pytest.mark.parametrize("names", [("fc1", "fc3", "fc2"), ("w1", "v1", "w2"), ("gate", "up", "down_proj")])
def test_gate_and_up_of_listed_experts(monkeypatch, names):
    """One at a time they run by their own code; their matrices are read by names that are known alone."""
    stacked = random_model("qwen3_moe")
    monkeypatch.setitem(NAMES, "other", names)
    listed = as_remote_code(stacked, MixtralBlock, "other")
    bank, other = routed(stacked), routed(listed)
    x = torch.randn(5, bank.hidden)
    for compute in (expert_hidden, expert_output):
        assert torch.allclose(compute(bank.module, x, 3), compute(other.module, x, 3), rtol=1e-4, atol=1e-5)
    for read in (lambda: expert_matrices(nn.Module(), other), lambda: gate_states(other, x)):
        with pytest.raises(SedetectError, match=f"of {', '.join(sorted(names))} gate and up cannot be identified"):
            read()


def test_activation_of_listed_experts():
    model = as_remote_code(random_model("qwen3_moe"), MixtralBlock, "proj")
    bank = routed(model)
    for expert in bank.module.experts:
        rename(expert, "act_fn", "nonlinearity")
    assert expert_matrices(model, bank)["gate"].shape == (8, 24, 32)
    with pytest.raises(SedetectError, match=r"\(Expert\): its activation is unknown"):
        gate_states(bank, torch.randn(5, bank.hidden))


class OtherGate(Qwen2MoeSparseMoeBlock):
    """The gate of its shared expert is called otherwise."""

    def forward(self, hidden_states):
        self.__dict__["shared_expert_gate"] = self.weigh_shared
        try:
            return super().forward(hidden_states)
        finally:
            del self.__dict__["shared_expert_gate"]


def test_gate_of_a_shared_expert():
    model = random_model("qwen2_moe")
    renamed = copy.deepcopy(model)
    for layer in renamed.model.layers:
        if isinstance(layer.mlp, Qwen2MoeSparseMoeBlock):
            layer.mlp.__class__ = OtherGate
            rename(layer.mlp, "shared_expert_gate", "weigh_shared")
    seen = [
        observe_residual(one, windows(token_ids()), prefix=1, min_value=0, min_ratio=2).formations
        for one in (model, renamed)
    ]
    assert seen[0] == seen[1] and any("shared" in str(w.expert) for one in seen[0] for w in one.writers)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_layout_of_gate_and_up(name):
    bank = routed(random_model(name))
    assert is_interleaved(bank) == (name == "gpt_oss")
    own = expert_matrices(nn.Module(), bank)
    vars(bank.module).pop("is_concatenated", None)
    found = expert_matrices(nn.Module(), bank)
    assert all(torch.equal(own[matrix], found[matrix]) for matrix in own)
    bank.module._apply_gate = lambda z: z[..., 1:].unfold(-1, bank.intermediate, 1).prod(-2)
    with pytest.raises(SedetectError, match="the gate's half of its gate_up_proj is unknown"):
        expert_matrices(nn.Module(), bank)


class Mean(nn.Module):
    def forward(self, x):
        return x - x.mean(-1, keepdim=True)


def test_parts_of_experts_behind_the_interface():
    model = random_model("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    experts.output_norm = Mean()
    with pytest.raises(SedetectError, match="the effect of its output_norm on the experts' outputs is unknown"):
        find_banks(model)
    own = experts._apply_gate
    experts._apply_gate = lambda z: experts.output_norm(own(z))  # where our computation calls it too
    find_banks(model)
    experts.down_shift = nn.Parameter(torch.zeros(8, 32))
    with pytest.raises(SedetectError, match="the effect of its down_shift"):
        sedetect.profile(model).__enter__()
    experts.down_shift = nn.Parameter(torch.zeros(()))
    find_banks(model)


@pytest.mark.parametrize(
    ("name", "has", "missing"),
    [
        ("Llama4TextExperts", {"down_proj": 1, "gate_up_proj": 1, "act_fn": 1}, "parent.top_k"),
        ("LongcatFlashExperts", {"down_proj": [1], "gate_up_proj": [1]}, "module.act_fn"),
        ("AriaExperts", {"fc1": SimpleNamespace(weight=1), "fc2": SimpleNamespace(matrix=1)}, "down_proj"),
        ("InklingSharedExperts", {"down_proj": 1, "up_proj": 1}, "stored_gate_up"),
    ],
)
def test_what_an_adapter_reads(name, has, missing):
    assert name in ADAPTERS
    double = type(name, (nn.Module,), {})()
    vars(double).update(has)
    with pytest.raises(SedetectError, match=rf"^mlp.experts \({name}\): transformers .* its {missing} in an unknown"):
        adapt("mlp.experts", double, nn.Module())


class Adds(nn.Module):
    """Shows the weight of another linear, as PEFT's layers do, and computes more."""

    def __init__(self, base):
        super().__init__()
        self.inner = base

    @property
    def weight(self):
        return self.inner.weight


def test_weights_of_a_layer_around_a_linear():
    linear = nn.Linear(3, 4)
    assert linear_weight(linear) is linear.weight and linear_weight(Adds(linear)) is None


class Router(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.project = gate

    def forward(self, x):
        return self.project(x)


def test_a_list_of_experts_and_its_router():
    """In a list of another name, beside a router whose matrix is deeper inside."""
    model = as_remote_code(random_model("qwen3_moe"), MixtralBlock, "proj")
    known = [bank.id for bank in find_banks(model)]
    for layer in model.model.layers:
        block = layer.mlp.block
        block.gate = Router(block.gate)
        block.mlps = block._modules.pop("experts")
        type(block).experts = property(lambda self: self.mlps)
    try:
        assert [bank.id for bank in find_banks(model)] == known
    finally:
        del MixtralBlock.experts


class Keyword(Qwen3MoeDecoderLayer):
    """What it is given is called otherwise."""

    def __call__(self, hidden_states, **others):
        return super().__call__(stream=hidden_states, **others)

    def forward(self, stream, **others):
        return super().forward(stream, **others)


def test_input_of_a_layer():
    model, ids = random_model("qwen3_moe"), token_ids()
    model.model.layers[1].__class__ = Keyword
    with pytest.raises(SedetectError, match=r"layer 1 \(Keyword\): maps NoneType to \(1, 24, 32\)"):
        observe_residual(model, windows(ids), prefix=1, sequences=1)


def test_gate_of_a_shared_mlp():
    model = random_model("qwen2_moe")
    bank = next(bank for bank in find_banks(model) if bank.id.kind == "shared")
    mlp = model.get_submodule(bank.path.rpartition(".")[0])
    assert expert_matrices(model, bank).keys() == {"gate", "up", "down"}
    rename(mlp, "gate_proj", "switch_proj")
    with pytest.raises(SedetectError, match=r"up_proj, switch_proj beside it is not a known input projection"):
        expert_matrices(model, bank)


def test_numbers_of_a_config(tmp_path):
    folder, number = put_model(tmp_path / "model"), 8
    config = json.loads((folder / "config.json").read_text())
    kept = {bank.id: [0] for bank in find_banks(empty_model(folder)) if bank.id.routed}

    def prune(**changes):
        text = {key: value for key, value in (config | changes).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(text))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return prune_checkpoint(folder, tmp_path / "out", kept)

    with pytest.raises(SedetectError, match="1 experts to keep, and every token takes 2; keep more"):
        prune()
    with pytest.raises(SedetectError, match="1 experts to keep, and every token takes 2"):
        prune(num_experts_per_tok=None, moe_k=2)
    with pytest.raises(SedetectError, match="leaves 1 of 8 experts, and every token takes 2"):
        check_prunable(folder, 1 - 1 / number)
    with pytest.raises(SedetectError, match=r"takes 1 groups of experts \(topk_group\), and no n_group"):
        prune(num_experts_per_tok=1, topk_group=1, num_expert_group=2)


class Shifted(nn.Linear):
    """What it adds is called otherwise than a bias."""

    shift = 4.0

    def forward(self, x):
        return super().forward(x) + self.shift


def test_what_is_added_to_an_output():
    model, ids = random_model("qwen2_moe"), token_ids()
    for layer in model.model.layers:
        if isinstance(layer.mlp, Qwen2MoeSparseMoeBlock):
            layer.mlp.shared_expert.down_proj.__class__ = Shifted
    with sedetect.profile(model, source="text") as prof:
        prof.batch(sequence_ids=torch.arange(len(ids)))
        model(input_ids=ids)
    ranking = sedetect.rank(prof.stats, percentile=0, fraction=0.01, layers=1.0)
    shared = [one for one in ranking.super_experts if "shared" in str(one)]
    with pytest.raises(SedetectError, match="its weights add up to .* what else is added to it is not known"):
        sedetect.find_super_weights(model, shared[:1], windows(ids))
