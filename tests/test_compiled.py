"""torch.compile(fullgraph=True) of models under a profile: the same logits and statistics, and one graph."""

from dataclasses import fields

import pytest
import torch
from support.models import random_model
from torch._dynamo import reset
from torch._dynamo.utils import counters

import sedetect
from sedetect.kernels.rows import Rows
from sedetect.stats.model import ModelStats

BATCHES = [torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.fixture(autouse=True)
def fresh():
    reset()
    counters.clear()
    yield
    reset()


def run(called, profiled, batches=BATCHES, **options) -> tuple[list[torch.Tensor], ModelStats]:
    with sedetect.profile(profiled, source="text", **options) as prof:
        logits = [called(input_ids=ids, use_cache=False).logits.clone() for ids in batches]
    return logits, prof.stats


def assert_same(mine: tuple[list[torch.Tensor], ModelStats], reference: tuple[list[torch.Tensor], ModelStats]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(mine[0], reference[0], strict=True))
    assert mine[1].header.notes == reference[1].header.notes == []
    assert mine[1].header.banks == reference[1].header.banks
    for bank, expected in reference[1].banks.items():
        for field in fields(expected):
            a, b = getattr(mine[1].banks[bank], field.name), getattr(expected, field.name)
            assert (a is None and b is None) or torch.equal(a, b), (bank, field.name)


@pytest.mark.parametrize(
    ("name", "graph", "backend", "before", "options"),
    [
        ("qwen3_moe", "eager", "torch", False, {}),
        ("qwen3_moe", "aot_eager", "cpu", True, {"channels": True, "coactivation": True, "first_rows": True}),
        ("qwen2_moe", "aot_eager", "cpu", False, {}),  # shared experts, a dense layer
        ("deepseek_v3", "eager", "cpu", True, {}),
        ("gpt_oss", "aot_eager", "torch", False, {}),
    ],
)
def test_one_graph_with_the_same_statistics(name, graph, backend, before, options):
    """Compiled inside the profile; or before it, called without one too, and profiled as what compile returned."""
    model = random_model(name)
    reference = run(model, model, backend=backend, **options)
    called = torch.compile(model, backend=graph, fullgraph=True)
    if before:
        with torch.no_grad():
            plain = called(input_ids=BATCHES[0], use_cache=False).logits
    assert_same(run(called, called if before else model, backend=backend, **options), reference)
    # The next profile finds the same graph.
    assert_same(run(called, model, backend=backend, **options), reference)
    assert counters["stats"]["unique_graphs"] == 1 + before
    assert not counters["graph_break"]
    if before:
        with torch.no_grad():
            assert torch.equal(called(input_ids=BATCHES[0], use_cache=False).logits, plain)
        assert counters["stats"]["unique_graphs"] == 2


def test_batches_of_other_sizes():
    model = random_model("qwen3_moe")
    batches = [*BATCHES, *(ids[:1, :n] for ids, n in zip(BATCHES, (9, 12, 5)))]
    reference = run(model, model, batches)
    called = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(run(called, model, batches), reference)


def test_the_op_is_what_it_says():
    model = random_model("deepseek_v3")
    with sedetect.profile(model, source="text") as prof:
        for kind in ("routed", "dense"):
            one = next(one for one in prof._measured if one.bank.id.kind == kind)
            bank = one.bank
            rows = Rows.unmapped(6, "cpu")
            inputs = [torch.randn(6, bank.hidden if kind == "routed" else bank.intermediate)]
            if kind == "routed":
                routing = torch.rand(6, bank.experts).topk(2)
                inputs += [routing.indices, routing.values]
            arguments = (inputs, one.state.kept(), rows.tensors(), rows.source, one.number)
            torch.library.opcheck(torch.ops.sedetect.measure.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor_on_a_gpu(mode):
    model = random_model("qwen3_moe").cuda()
    batches = [ids.cuda() for ids in BATCHES]
    reference = run(model, model, batches)
    called = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(2):
        mine = run(called, model, batches)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(mine[0], reference[0], strict=True))
        for bank, expected in reference[1].banks.items():
            assert int(mine[1].banks[bank].rows.sum()) == int(expected.rows.sum())
            assert torch.allclose(mine[1].banks[bank].out_max, expected.out_max, rtol=1e-2)
    assert all(bank.backends == ["triton"] for bank in mine[1].header.banks.values())
    assert counters["stats"]["unique_graphs"] == 1
