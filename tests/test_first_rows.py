"""published_max: what the published tool reads of each expert, against a loop and against the tool's own way."""

import pytest
import torch
from support.command import run
from support.models import TINY, random_model
from torch import nn

import sedetect
from sedetect import ops
from sedetect.errors import SedetectError
from sedetect.kernels.rows import Rows
from sedetect.stats.bank import BankStats
from sedetect.stats.model import ModelStats

EXPERTS = 5


def call(seed: int, tokens: int = 96, k: int = 3):
    """Routing with sentinels and zero weights, over 5 interleaved sequences, some tokens not counted."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, EXPERTS + 2, generator=generator).topk(k).indices  # 5 and 6 are no experts
    index[index == 2] = 3  # expert 2 sees nothing; some tokens have expert 3 twice
    gates = torch.rand(tokens, k, generator=generator)
    gates[torch.rand(tokens, k, generator=generator) < 0.2] = 0
    x = torch.randn(tokens, 8, generator=generator)
    down = torch.randn(EXPERTS, 12, 8, generator=generator)
    sequence = torch.randint(0, 5, (tokens,), generator=generator)
    rows = Rows.unmapped(tokens, "cpu")
    rows.sequence, rows.counted = sequence, torch.rand(tokens, generator=generator) < 0.8
    return x, index, gates, down, rows


def by_loop(x, index, gates, down, rows) -> torch.Tensor:
    """The rows of each expert and sequence, collected slot by slot; the first of each counts."""
    largest = torch.zeros(EXPERTS)
    for sequence in rows.sequence.unique().tolist():
        for e in range(EXPERTS):
            mine = [
                t
                for slot in range(index.shape[1])
                for t in range(len(x))
                if index[t, slot] == e and gates[t, slot] != 0 and rows.counted[t] and rows.sequence[t] == sequence
            ]
            if mine:
                y = down[e] @ x[mine[0]].clamp(min=0).square()
                largest[e] = max(largest[e], y.abs().max())
    return largest


def measure(x, index, gates, down, rows, backend=None, state=None) -> BankStats:
    state = BankStats.empty(EXPERTS, published=True) if state is None else state
    gate = ops.Gate("relu2", gated=False)
    up = torch.eye(8).repeat(EXPERTS, 1, 1)
    ops.moe_mlp(x, index, gates, ops.ExpertWeights(up, down, gate), state, rows=rows, backend=backend)
    return state


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_an_independent_loop(seed, backend):
    arguments = call(seed)
    state, expected = measure(*arguments, backend=backend), by_loop(*arguments)
    assert torch.allclose(state.published_max, expected, rtol=1e-5)
    assert expected[2] == 0 and (expected[[0, 1, 3, 4]] > 0).all()
    assert (state.published_max <= state.out_max).all() and (state.published_max < state.out_max).any()


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_call_of_unmapped_rows_is_one_sequence(backend):
    x, index, gates, down, _ = call(7)
    rows = Rows.unmapped(len(x), "cpu")
    whole = Rows.unmapped(len(x), "cpu")
    whole.sequence = torch.zeros(len(x), dtype=torch.int64)
    state = measure(x, index, gates, down, rows, backend)
    assert torch.allclose(state.published_max, by_loop(x, index, gates, down, whole), rtol=1e-5)


def test_calls_merge_as_maxima():
    one, other = call(1), call(2)
    together = measure(*other, state=measure(*one))
    merged = measure(*one).merge(measure(*other))
    assert torch.equal(together.published_max, merged.published_max)
    assert merged.published_max.equal(torch.maximum(by_loop(*one), by_loop(*other))) or torch.allclose(
        merged.published_max, torch.maximum(by_loop(*one), by_loop(*other)), rtol=1e-5
    )
    with pytest.raises(SedetectError, match="published_max: shapes"):
        merged.merge(BankStats.empty(EXPERTS))


def test_nothing_and_nan():
    x, index, gates, down, rows = call(3)
    nothing = measure(x[:0], index[:0], gates[:0], down, Rows.unmapped(0, "cpu"))
    assert torch.equal(nothing.published_max, torch.zeros(EXPERTS))
    rows.counted[:] = False
    assert torch.equal(measure(x, index, gates, down, rows).published_max, torch.zeros(EXPERTS))
    rows.counted[:] = True
    x[:] = torch.nan
    assert measure(x, index, gates, down, rows).published_max.isnan().tolist() == [True, True, False, True, True]


class Published:
    """The published tool's reading: experts one by one over their rows as transformers 4.51 gathers them, output[0]."""

    def __init__(self, model: nn.Module):
        self.layer = {id(block.mlp.experts): i for i, block in enumerate(model.model.layers)}
        self.values: dict[tuple[int, int], float] = {}

    def __call__(self, module, x, index, weights):
        out = torch.zeros_like(x)
        mask = nn.functional.one_hot(index, module.num_experts).permute(2, 1, 0)  # (E, k, T)
        for e in range(module.num_experts):
            slot, token = torch.where(mask[e])
            if len(token):
                gate, up = (x[token] @ module.gate_up_proj[e].T).chunk(2, dim=-1)
                output = (nn.functional.silu(gate) * up) @ module.down_proj[e].T
                key = (self.layer[id(module)], e)
                self.values[key] = max(self.values.get(key, 0.0), float(output[0].abs().max()))
                out.index_add_(0, token, output * weights[token, slot, None])
        return out


def test_reproduces_the_published_tool():
    """One sequence per forward there, all in one batch here."""
    from transformers.integrations.moe import ExpertsInterface

    model = random_model("qwen3_moe")
    ids = torch.randint(3, 96, (6, 40), generator=torch.Generator().manual_seed(0))
    published = Published(model)
    ExpertsInterface.register("published", published)
    before = model.config._experts_implementation
    model.set_experts_implementation("published")
    with torch.no_grad():
        for row in ids:
            model(input_ids=row[None])
    model.set_experts_implementation(before)
    with sedetect.profile(model, first_rows=True) as prof:
        model(input_ids=ids)
    differ = 0
    for bank, state in prof.stats.banks.items():
        for e in range(8):
            expected = published.values.get((bank.layer, e), 0.0)
            assert float(state.published_max[e]) == pytest.approx(expected, rel=1e-4), (bank, e)
            differ += float(state.out_max[e]) > 1.01 * expected
    assert differ > 12, "the tool underestimates most experts"


def test_shared_and_dense_banks_have_none_and_rank_by_out_max():
    model = random_model("qwen2_moe")
    ids = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    with sedetect.profile(model, first_rows=True) as prof:
        model(input_ids=ids)
    stats = prof.stats
    for bank, state in stats.banks.items():
        assert (state.published_max is not None) == (bank.kind == "routed")
    ranking = sedetect.rank(stats, rows="first", layers=1.0, percentile=0, fraction=0.01, min_value=0, min_ratio=0)
    assert ranking.criteria["rows"] == "first"
    shared = [expert for expert in ranking.super_experts if expert.kind == "shared"]
    routed = [expert for expert in ranking.super_experts if expert.kind == "routed"]
    assert shared and routed
    for expert in shared + routed:
        state = stats.banks[expert.bank]
        values = state.out_max if expert.kind == "shared" else state.published_max
        assert expert.value == float(values[expert.number])


def test_rank_refuses_statistics_without_first_rows():
    result = sedetect.profile_model(TINY, text=sedetect.Text(tokens=256, seq_len=32))
    with pytest.raises(SedetectError, match="decoder.0.routed: the statistics lack the first rows; profile again with"):
        sedetect.rank(result.stats, rows="first")
    with pytest.raises(SedetectError, match="rows 'second' is not known"):
        sedetect.rank(result.stats, rows="second")


def test_a_bank_that_never_ran_still_merges():
    model = random_model("qwen3_moe")
    with sedetect.profile(model, source="z", first_rows=True, channels=True) as idle:
        pass
    with sedetect.profile(model, source="a", first_rows=True, channels=True) as busy:
        model(input_ids=torch.ones(1, 8, dtype=torch.int64))
    merged = idle.stats.merge(busy.stats)
    assert all(state.equal(busy.stats.banks[bank]) for bank, state in merged.banks.items())


def test_command_line(tmp_path):
    """On tiny-moe the tool's reading finds the same super expert, and less of everyone else."""
    assert run("profile", TINY, "-o", tmp_path, "--tokens", 4096, "--first-rows").code == 0
    stats = ModelStats.load(tmp_path)
    share = torch.cat([state.published_max / state.out_max for state in stats.banks.values()])
    assert 0.5 < share.median() < 0.9 and share.max() == 1
    assert stats.banks[("decoder", 1, "routed")].published_max[28] == stats.banks[("decoder", 1, "routed")].out_max[28]
    code, out, _ = run("rank", tmp_path, "--rows", "first")
    assert code == 0 and out.startswith("2 candidates: L1E28 (|y| 1256")
    assert run("rank", tmp_path).out != out
