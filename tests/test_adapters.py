"""Experts outside the experts interface: a ModuleList of them, as in remote code, is measured as stacked ones are."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_equal, assert_logits_close
from support.models import random_model, snapshot, token_ids
from support.remote_code import NAMES, DeepseekBlock, Expert, MixtralBlock, as_remote_code
from torch import nn

import sedetect
from sedetect.analysis.matrices import gate_states
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.models.banks import find_banks
from sedetect.models.experts import expert_output


class UnnormalizedBlock(MixtralBlock):
    normalized = False


@pytest.mark.parametrize("biased", [["gate_proj"], ["gate_proj", "up_proj"], ["down_proj"]])
def test_biases_of_some_of_the_linears(biased):
    model = as_remote_code(random_model("qwen3_moe"), MixtralBlock, "proj")
    for expert in (module for module in model.modules() if isinstance(module, Expert)):
        for linear in (getattr(expert, name) for name in biased):
            linear.bias = nn.Parameter(torch.randn(linear.out_features))
    bank = find_banks(model)[0]
    experts, x = model.model.layers[0].mlp.block.experts, torch.randn(5, bank.hidden)
    with torch.no_grad():
        states = gate_states(bank, x)
        for number in (0, len(experts) - 1):
            own = experts[number]
            torch.testing.assert_close(expert_output(bank.module, x, number), own(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(states[number], F.silu(own.gate_proj(x)), rtol=1e-4, atol=1e-5)


def test_an_adapter_stays_with_its_module():
    """The same one every time; no submodule, and none of a copy, of which files do not hold one either."""
    model = as_remote_code(random_model("qwen3_moe"), MixtralBlock, "proj")
    keys, modules = list(model.state_dict()), len(list(model.modules()))
    adapter = find_banks(model)[0].module
    assert find_banks(model)[0].module is adapter
    assert list(model.state_dict()) == keys and len(list(model.modules())) == modules
    other = copy.deepcopy(model)
    assert find_banks(other)[0].module.module is other.model.layers[0].mlp.block.experts
    model.model.layers[0].mlp.block.experts = shallow = copy.copy(adapter.module)  # which shares the attribute
    assert find_banks(model)[0].module.module is shallow
    assert b"sedetect" not in pickle.dumps(shallow).replace(b"_sedetect_adapter", b"")


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("block", [MixtralBlock, UnnormalizedBlock, DeepseekBlock])
def test_a_list_of_experts_is_measured_as_the_stacked_ones(block, names):
    stacked, ids = random_model("qwen3_moe"), token_ids()
    for layer in stacked.model.layers:
        layer.mlp.gate.norm_topk_prob = getattr(block, "normalized", True)
        inner = layer.mlp.forward
        layer.mlp.forward = lambda x, inner=inner: inner(x) + 0.1 * x
    listed = as_remote_code(stacked, block, names)
    before = snapshot(listed)
    with torch.no_grad():
        own = listed(input_ids=ids).logits
    runs = []
    for model in (stacked, listed):
        with sedetect.profile(model, source="text") as prof:
            prof.batch(sequence_ids=torch.arange(len(ids)))
            logits = model(input_ids=ids).logits
        assert_logits_close(logits, own, 1e-5)
        runs.append(prof.stats)
    assert snapshot(listed) == before
    assert not runs[1].header.notes
    for bank, state in runs[0].banks.items():
        other = runs[1].banks[bank]
        assert torch.equal(state.counts, other.counts)
        assert torch.allclose(state.sums, other.sums, rtol=1e-4)
        assert torch.allclose(state.out_max, other.out_max, rtol=1e-4)
        where = slice(2, 7)  # channel, source, sequence, position, token
        assert torch.equal(state.peak()[:, where], other.peak()[:, where])


@pytest.mark.parametrize("block", [MixtralBlock, UnnormalizedBlock, DeepseekBlock])
def test_a_list_of_experts_in_bfloat16(block):
    model, ids = (
        as_remote_code(random_model("qwen3_moe", torch.bfloat16), block, "proj").to(torch.bfloat16),
        token_ids(),
    )
    with torch.no_grad():
        own = model(input_ids=ids).logits
    with sedetect.profile(model) as prof:
        logits = model(input_ids=ids).logits
    # Near ties the routing flips: most logits agree, not all.
    errors = (logits.double() - own.double()).abs() / own.double().square().mean().sqrt()
    assert errors.median() < 0.02
    for state in prof.stats.banks.values():
        assert state.rows.sum() == 2 * ids.numel()
        total = float(state.gate_sum.sum()) / ids.numel()
        assert total < 0.97 if block is UnnormalizedBlock else total == pytest.approx(1, abs=0.01)


def test_an_ablation_inside_a_profile_of_a_list_of_experts():
    stacked, ids = random_model("qwen3_moe"), token_ids()
    listed = as_remote_code(stacked, DeepseekBlock, "proj")
    for layer in listed.model.layers:
        layer.mlp.block.shared_experts.scale.data.zero_()
    for layer in stacked.model.layers:
        layer.mlp.gate.norm_topk_prob = True
    place, rows = "L1E3", []
    for model in (stacked, listed):
        with sedetect.profile(model, source="text") as prof, ablate(model, [place]):
            prof.batch(sequence_ids=torch.arange(len(ids)))
            logits = model(input_ids=ids).logits
        rows.append((prof.stats, logits))
    assert_logits_close(rows[1][1], rows[0][1], 1e-5)
    for stats, _ in rows:
        assert int(stats.banks[("decoder", 1, "routed")].rows[3]) == 0
    assert torch.equal(*(s.banks[("decoder", 2, "routed")].rows for s, _ in rows))


class OddGate(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return F.linear(x, self.weight).tanh()


class OddBlock(DeepseekBlock):
    """Weights that no routing we know gives."""

    def __init__(self, experts, gate, top_k, shared):
        super().__init__(experts, gate, top_k, shared)
        self.gate = OddGate(gate.weight)

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        scores = self.gate(x)
        return sum(e(x) * scores[:, n, None] for n, e in enumerate(self.experts)).view(hidden_states.shape), None


class ExpertChoiceBlock(MixtralBlock):
    """Every expert takes the tokens that want it most, the same number each."""

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        scores = self.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weights, token = scores[:, number].topk(max(1, len(x) * self.top_k // len(self.experts)))
            out.index_add_(0, token, expert(x[token]) * weights[:, None])
        return out.view(hidden_states.shape), scores


class DenseBlock(MixtralBlock):
    """Every expert computes every token; the weights of all but the top are 0."""

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        scores = self.gate(x).softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        given = torch.zeros_like(scores).scatter(1, chosen, weights / weights.sum(-1, keepdim=True))
        out = sum(expert(x) * given[:, number, None] for number, expert in enumerate(self.experts))
        return (out + self.shared_expert(x)).view(hidden_states.shape), scores


class HalfSoftmaxBlock(MixtralBlock):
    """The softmax in the type of the logits, where 16 bits make many ties."""

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return (out + self.shared_expert(x)).view(hidden_states.shape), None


class LateBlock(MixtralBlock):
    """What a test changes after the probe: each of its methods does nothing yet."""

    image = None  # (T,) bool

    def routing(self, x, weights, chosen):
        return weights, chosen

    def rows(self, x, token):
        return x[token]

    def combined(self, result, weights):
        return result * weights

    def forward(self, hidden_states):
        x = hidden_states.view(-1, hidden_states.shape[-1])
        weights, chosen = self.gate(x).softmax(-1, dtype=torch.float).topk(self.top_k, dim=-1)
        weights, chosen = self.routing(x, weights.to(x.dtype), chosen)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            out.index_add_(0, token, self.combined(expert(self.rows(x, token)), weights[token, slot, None]))
        return (out + self.shared_expert(x)).view(hidden_states.shape), None


class SecondGate(LateBlock):
    def routing(self, x, weights, chosen):
        return (weights, chosen) if self.image is None else (weights, chosen.where(~self.image[:, None], chosen ^ 1))


class Capacity(LateBlock):
    limit = 150

    def routing(self, x, weights, chosen):
        place = F.one_hot(chosen, len(self.experts)).flatten(0, 1).cumsum(0).view(*chosen.shape, -1)
        return weights, chosen.where(place.gather(2, chosen[..., None])[..., 0] <= self.limit, -1)


class ZeroedWeights(LateBlock):
    def routing(self, x, weights, chosen):
        return (weights, chosen) if self.image is None else (weights * ~self.image[:, None], chosen)


class Scaled(LateBlock):
    def combined(self, result, weights):
        return result * weights if self.image is None else 1.1 * result * weights


class Swapped(LateBlock):
    """The same rows at every expert, and each token's weights in the other order."""

    def routing(self, x, weights, chosen):
        return (weights, chosen) if self.image is None else (weights.flip(1), chosen)


class Jitter(LateBlock):
    def rows(self, x, token):
        return x[token] if self.image is None else x[token] * 1.01


class Twice(LateBlock):
    def rows(self, x, token):
        return x[token] if self.image is None else torch.cat((x[token], x[token]))

    def combined(self, result, weights):
        return result[: len(weights)] * weights


@pytest.mark.parametrize(
    ("block", "what"),
    [
        (SecondGate, "did not choose"),
        (Capacity, "did not choose"),
        (ZeroedWeights, "weights its experts differently"),
        (Scaled, "weights its experts differently"),
        (Swapped, "weights its experts differently"),
        (Jitter, "did not choose"),
        (Twice, "did not choose"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_does_something_else_in_a_late_batch_ends_the_profile(block, what, dtype):
    block.normalized = False
    model, ids = as_remote_code(random_model("qwen3_moe", dtype), block, "proj").to(dtype), token_ids()
    blocks = [layer.mlp.block for layer in model.model.layers]
    prof = sedetect.profile(model)
    with prof:
        for _ in range(3):
            model(input_ids=ids)
        assert prof.stats.header.tokens == 3 * ids.numel()
        late = ids if block is not Capacity else token_ids(4, 250)
        blocks[1].image = torch.arange(late.numel()) % 5 == 0
        with pytest.raises(SedetectError, match=rf"^model.layers.\d.mlp.block.experts \({block.__name__}\): .*{what}"):
            model(input_ids=late)
        with pytest.raises(SedetectError, match=what):
            prof.stats  # noqa: B018
    with pytest.raises(SedetectError, match=what):
        prof.stats  # noqa: B018
    blocks[1].image = None
    with sedetect.profile(model) as again:
        model(input_ids=ids)
    assert again.stats.header.tokens == ids.numel()
    with pytest.raises(SedetectError, match=what):
        prof.stats  # noqa: B018
    with pytest.raises(SedetectError, match=what), ablate(model, ["L1E3"]):
        blocks[1].image = torch.arange(late.numel()) % 5 == 0
        model(input_ids=late)


def test_forms_that_agree_are_measured():
    """Every expert on every token; a softmax in 16 bits; an image gate that is there and does not act; keywords."""
    ids = token_ids(4, 250)
    for block, dtype in ((DenseBlock, torch.float32), (HalfSoftmaxBlock, torch.bfloat16), (SecondGate, torch.float32)):
        model = as_remote_code(random_model("qwen3_moe", dtype), block, "proj").to(dtype)
        with torch.no_grad():
            own = model(input_ids=ids).logits
        runs = []
        for grad in (torch.no_grad, torch.inference_mode):
            with sedetect.profile(model, source="text") as prof, grad():
                logits = model(input_ids=ids).logits
            runs.append(prof.stats)
        error = (logits - own).abs().double() / own.double().square().mean().sqrt()
        assert error.median() < (1e-5 if dtype is torch.float32 else 0.02)
        assert_equal(*runs)
        assert all(state.rows.sum() == 2 * ids.numel() for state in prof.stats.banks.values())
    block = model.model.layers[0].mlp.block
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        own = block(hidden_states=x)[0]
    with sedetect.profile(model):
        torch.testing.assert_close(block(hidden_states=x)[0], own, rtol=1e-4, atol=1e-4)


def test_a_block_whose_experts_choose_is_refused():
    model = as_remote_code(random_model("qwen3_moe"), ExpertChoiceBlock, "proj")
    with pytest.raises(SedetectError, match=r"ExpertChoiceBlock \(Expert\): the routing of this block"):
        sedetect.profile(model)


def test_a_block_that_is_not_understood_is_refused_before_any_forward():
    model = as_remote_code(random_model("qwen3_moe"), OddBlock, "proj")
    with pytest.raises(SedetectError, match=r"OddBlock \(Expert\): the routing of this block"):
        sedetect.profile(model)
    for layer in model.model.layers:  # a list by another name
        layer.mlp.block.pool = layer.mlp.block.experts
        del layer.mlp.block.experts
    with pytest.raises(SedetectError, match=r"OddBlock \(Expert\): the routing of this block"):
        sedetect.profile(model)


def test_lists_of_experts_keep_their_optional_statistics():
    listed, ids = as_remote_code(random_model("qwen3_moe"), MixtralBlock, "w"), token_ids()
    runs = []
    for _ in range(2):
        with sedetect.profile(listed, source="text", channels=True, coactivation=True, first_rows=True) as prof:
            prof.batch(sequence_ids=torch.arange(len(ids)))
            listed(input_ids=ids)
        runs.append(prof.stats)
    assert_equal(runs[0], runs[1])
    for state in runs[0].banks.values():
        assert torch.equal(state.channel_max.max(1).values, state.out_max)
        assert torch.equal(state.coactivation.diagonal(), state.rows)
        assert (state.published_max <= state.out_max).all() and state.published_max.any()
