"""Models inside other modules, copies of a model inside a profile, forwards in threads, tensors that are not plain."""

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from support.compare import assert_equal
from support.models import random_model, snapshot, token_ids
from support.remote_code import MixtralBlock, as_remote_code
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sedetect
from sedetect.calibration.windows import Windows
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.experiments.residual_stream import observe_residual
from sedetect.experiments.traces import trace_experts
from sedetect.models.attach import SubstitutedDown
from sedetect.stats.place import parse_place


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.fixture(scope="module")
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(model, called, **options):
    """Statistics of two batches, the second padded on the left."""
    ids, mask = token_ids(), torch.ones(4, 24, dtype=torch.int64)
    mask[:2, :5] = 0
    with sedetect.profile(model, source="text", **options) as prof:
        for number, padding in enumerate((torch.ones_like(mask), mask)):
            prof.batch(sequence_ids=torch.arange(4) + 4 * number)
            called(input_ids=ids, attention_mask=padding)
    return prof.stats


def assert_same(stats, reference):
    assert_equal(stats, reference)
    assert stats.header.banks == reference.header.banks
    assert stats.header.notes == reference.header.notes and stats.header.tokens == reference.header.tokens


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "Holder": Holder,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "holder of a compiled DDP": lambda model: Holder(
        torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_the_model(wrap, one_process):
    model = random_model("qwen2_moe")
    reference = run(model, model)
    wrapped = wrap(model).eval()
    before = snapshot(model)
    assert_same(run(wrapped, wrapped), reference)
    assert snapshot(model) == before
    with torch.no_grad(), ablate(wrapped, ["L0E1"]):
        inside = model(input_ids=token_ids()).logits
    with torch.no_grad(), ablate(model, ["L0E1"]):
        assert torch.allclose(model(input_ids=token_ids()).logits, inside)


def test_layers_that_are_wrapped_go_by_their_own_names():
    model = random_model("qwen2_moe")
    reference = run(model, model)
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    assert_same(run(model, model), reference)


def test_wrappers_that_cannot_be_followed(one_process):
    model = random_model("qwen3_moe")
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = [0, 1]
    with pytest.raises(SedetectError, match="DataParallel runs a copy of the model on each of 2 devices"):
        sedetect.profile(wrapped.eval())
    with pytest.raises(SedetectError, match=r"ModuleList: holds 2 models \(0, 1\); give the one to profile"):
        sedetect.profile(nn.ModuleList([model, random_model("qwen2_moe")]).eval())
    with pytest.raises(SedetectError, match="Linear: not a transformers model, and none is inside"):
        sedetect.profile(nn.Linear(2, 2).eval())
    with pytest.raises(SedetectError, match="Qwen3MoeForCausalLM: is in training mode"):
        sedetect.profile(Holder(model.train()))


@pytest.mark.parametrize("wrap", [Holder, WRAPPERS["compiled"]])
def test_other_studies_look_inside(wrap):
    """The residual stream, traces and ablation of a wrapped model are those of the model."""
    model = random_model("qwen3_moe")
    windows = {"text": Windows(token_ids(), torch.arange(4), "text", {})}
    place = parse_place("L1E3")

    def studied(model):
        residual = observe_residual(model, windows, prefix=1, sequences=2)
        with ablate(model, [place]):
            without = observe_residual(model, windows, prefix=1, sequences=2)
        return residual, without, trace_experts(model, windows, [place])

    assert studied(wrap(model)) == studied(model)


def test_fully_shard(one_process):
    from torch.distributed.fsdp import fully_shard

    for name in ("qwen2_moe", "gpt_oss"):
        model = random_model(name)
        reference = run(model, model)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        stats = run(model, model)
        assert stats.header.model == f"FSDP{reference.header.model}"  # its class, as it has no name
        stats.header.model = reference.header.model
        assert_same(stats, reference)
    listed = fully_shard(as_remote_code(random_model("qwen3_moe"), MixtralBlock, "proj"))
    with pytest.raises(SedetectError, match="fully_shard"):
        sedetect.profile(listed)


def remote(name):
    return as_remote_code(random_model(name), MixtralBlock, "proj")


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "remote"])
def test_a_copy_inside_the_block_is_a_plain_model(name):
    model = remote("qwen3_moe") if name == "remote" else random_model(name)
    ids = token_ids()
    with torch.no_grad():
        own = model(input_ids=ids).logits
    reference = run(model, model)
    attributes = [set(vars(module)) for module in model.modules()]  # with adapters

    def through_a_file(save, load):
        file = io.BytesIO()
        save(model, file)
        file.seek(0)
        assert b"sedetect_call" not in file.getvalue() and b"sedetect.models" not in file.getvalue()
        return load(file)

    with sedetect.profile(model) as prof, ablate(model, ["L0E1"]):
        copies = [
            copy.deepcopy(model),
            through_a_file(torch.save, lambda file: torch.load(file, weights_only=False)),
            through_a_file(pickle.dump, pickle.load),
            copy.deepcopy(Holder(model)).inner,
        ]
        layer = copy.deepcopy(model.model.layers[0])
        ablated = model(input_ids=ids).logits
    assert not any(isinstance(module, SubstitutedDown) for module in layer.modules())
    for twin in copies:
        assert [set(vars(module)) for module in twin.modules()] == attributes
        assert not any(hasattr(getattr(module, "config", None), "sedetect_call") for module in twin.modules())
        with torch.no_grad():
            assert torch.equal(twin(input_ids=ids).logits, own)
        assert prof.stats.header.tokens == ids.numel()
        assert_same(run(twin, twin), reference)
    assert not torch.equal(ablated, own)


def test_a_model_saved_inside_the_block(tmp_path):
    model = random_model("qwen2_moe")
    with sedetect.profile(model):
        model.save_pretrained(tmp_path / "inside")
        state = model.state_dict()
    model.save_pretrained(tmp_path / "outside")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "inside" / name).read_bytes() == (tmp_path / "outside" / name).read_bytes()
    assert list(state) == list(model.state_dict())


def in_threads(*calls):
    errors = []

    def guarded(call):
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_layers_in_threads(backend):
    """Without the model around them: no position is known, and no row is lost."""
    model, generator = random_model("qwen3_moe"), torch.Generator().manual_seed(0)
    parts = [[torch.randn(1, 4, 32, generator=generator) for _ in range(40)] for _ in range(4)]

    def work(part):
        with torch.no_grad():
            for x in part:
                model.model.layers[0].mlp(x)

    runs, switch = [], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for calls in ([lambda part=part: work(part) for part in parts], [lambda: [work(part) for part in parts]]):
            with sedetect.profile(model, backend=backend) as prof:
                assert not in_threads(*calls)
            runs.append(prof.stats)
    finally:
        sys.setswitchinterval(switch)
    states = [one.banks[sedetect.BankId("decoder", 0, "routed")] for one in runs]
    assert int(states[0].rows.sum()) == 4 * 40 * 4 * 2 and torch.equal(states[0].counts, states[1].counts)
    assert torch.equal(states[0].outliers[..., 0], states[1].outliers[..., 0])  # the values' bits
    assert any("layers ran outside a forward" in str(note) for note in runs[0].header.notes)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_before_the_forward(layout):
    model, ids = random_model("qwen3_moe"), token_ids(2, 8)
    nested = torch.nested.nested_tensor([ids[0], ids[1, :5]], layout=layout)
    embeds = torch.nested.nested_tensor([torch.randn(8, 32), torch.randn(5, 32)], layout=layout)
    for call, name in (
        (lambda: model(nested), "input_ids: is a nested"),
        (lambda: model(input_ids=ids.to_sparse()), "input_ids: is a sparse"),
        (lambda: model(inputs_embeds=embeds), "inputs_embeds: is a nested"),
        (lambda: model(input_ids=ids, attention_mask=nested), "attention_mask: is a nested"),
        (lambda: model(input_ids=ids, position_ids=nested), "position_ids: is a nested"),
        (lambda: model.generate(nested, max_new_tokens=2), "input_ids: is a nested"),
        (lambda: model.generate(ids, attention_mask=nested), "attention_mask: is a nested"),
        (lambda: prof.batch(mask=nested), "prof.batch: mask: is a nested"),
        (lambda: prof.batch(sequence_ids=nested), "prof.batch: sequence_ids: is a nested"),
    ):
        with sedetect.profile(model) as prof, pytest.raises(SedetectError, match=f"{name} tensor; give a padded one"):
            call()
        assert not any("failed" in note.code for note in prof.stats.header.notes)


def test_forwards_in_threads():
    """Without gradients, one after another: rows of one text do not become those of another."""
    model = random_model("qwen2_moe")
    batches = [token_ids(2, 8 + number % 2, number) for number in range(8)]
    alone = []
    for ids in batches:
        with sedetect.profile(model) as prof:
            model.generate(ids, max_new_tokens=3, eos_token_id=None)
            model(input_ids=ids)
        alone.append(prof.stats)
    outputs = []

    def work(ids):
        model.generate(ids, max_new_tokens=3, eos_token_id=None)
        outputs.append(model(input_ids=ids).logits)

    with sedetect.profile(model) as prof:
        assert not in_threads(*(lambda ids=ids: work(ids) for ids in batches))
    assert not any(logits.requires_grad for logits in outputs) and len(outputs) == 8
    assert not prof.stats.header.notes and prof.stats.header.sequences == 32
    for bank, state in prof.stats.banks.items():
        for name in ("rows", "first_rows"):
            assert torch.equal(getattr(state, name), sum(getattr(one.banks[bank], name) for one in alone))
        assert torch.equal(state.out_max, torch.stack([one.banks[bank].out_max for one in alone]).amax(0))


def test_a_layer_in_another_thread_during_a_forward_is_refused():
    model, ids = random_model("qwen3_moe"), token_ids()
    errors = []

    def hook(module, args):
        errors.extend(in_threads(lambda: model.model.layers[0].mlp(torch.randn(4, 24, 32))))

    handle = model.model.layers[1].register_forward_pre_hook(hook)
    with sedetect.profile(model):
        model(input_ids=ids)
    handle.remove()
    assert [str(error) for error in errors] == [
        "model.layers.0.mlp.experts: ran in a thread of its own during a forward of another; call the whole model in "
        "each thread, or its layers in one alone"
    ]


def test_inference_mode_and_plain_forwards_in_any_order():
    model, ids = random_model("qwen2_moe"), token_ids()

    def work(contexts):
        with sedetect.profile(model, source="text", channels=True, coactivation=True, first_rows=True) as prof:
            for context in contexts:
                with context():
                    inputs = ids.clone()
                    model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
                    model.generate(inputs, max_new_tokens=3, do_sample=False)
                model(input_ids=inputs)
        with contexts[-1]():
            return prof.stats

    reference = work([torch.no_grad] * 3)
    for contexts in ([torch.inference_mode, torch.no_grad] * 2, [torch.enable_grad, torch.inference_mode] * 2):
        stats = work(contexts[:3])
        assert_equal(stats, reference)
        assert stats.header.notes == reference.header.notes
        assert stats.merge(stats.empty()) is stats
    with torch.inference_mode():
        inside = work([torch.no_grad] * 3)
    assert_equal(inside, reference)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_of_32_bits(dtype):
    model, ids = random_model("qwen2_moe"), token_ids().to(dtype)
    with sedetect.profile(model, source="text") as prof:
        prof.batch(sequence_ids=torch.arange(4))
        positions = torch.arange(24, dtype=dtype)[None]
        model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)
    reference = random_model("qwen2_moe")
    with sedetect.profile(reference, source="text") as wanted:
        wanted.batch(sequence_ids=torch.arange(4))
        reference(input_ids=token_ids())
    assert_equal(prof.stats, wanted.stats)


class Subclass(torch.Tensor):
    pass


def test_weights_that_kernels_cannot_read():
    model = random_model("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        own = getattr(experts, name)
        setattr(experts, name, nn.Parameter(own.detach().as_subclass(Subclass)))
        with pytest.raises(SedetectError, match=r"^model.layers.1.mlp.experts \(.*weights in a Subclass are not read"):
            sedetect.profile(model)
        setattr(experts, name, own)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = random_model("qwen3_moe")
    with pytest.raises(SedetectError, match="weights in a FakeTensor are not read"):
        sedetect.profile(fake)
    with pytest.raises(SedetectError, match="model.embed_tokens.weight: on the meta device, without values"):
        sedetect.profile(model.to("meta"))


def test_a_linear_with_other_weights_computes_itself():
    model = random_model("qwen2_moe")
    reference = run(model, model)
    for layer in (model.model.layers[0].mlp.shared_expert, model.model.layers[1].mlp):
        layer.down_proj.weight = nn.Parameter(layer.down_proj.weight.detach().as_subclass(Subclass))
    stats = run(model, model)
    for bank, state in reference.banks.items():
        assert torch.equal(state.rows, stats.banks[bank].rows)
        assert torch.allclose(state.out_max, stats.banks[bank].out_max, rtol=1e-5)


def test_weights_that_are_not_contiguous():
    model = random_model("qwen2_moe")
    reference = run(model, model)
    for layer in model.model.layers:
        mlp = layer.mlp
        holders = [(mlp.experts, "down_proj"), (mlp.experts, "gate_up_proj")] if hasattr(mlp, "experts") else []
        shared = mlp.shared_expert if hasattr(mlp, "experts") else mlp
        for module, name in [*holders, (shared.down_proj, "weight")]:
            weight = getattr(module, name).detach()
            setattr(module, name, nn.Parameter(weight.transpose(-1, -2).contiguous().transpose(-1, -2)))
    stats = run(model, model)
    for bank, state in reference.banks.items():
        assert torch.equal(state.rows, stats.banks[bank].rows)
        assert torch.allclose(state.out_max, stats.banks[bank].out_max, rtol=1e-5)
