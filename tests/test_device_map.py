"""Models that accelerate spreads over several devices, or offloads: profiled in place, as whole ones are."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_execution_device_hook
from support.checkpoints import OPTIONAL, SHORT, TEXTS, save_random
from support.conformance import inputs_of, run
from support.conformance import profile as profile_of
from support.families import FAMILIES, tiny_model
from support.interpreter import INTERPRETED
from support.models import CONFIGS, TINY, random_model, token_ids
from support.remote_code import DeepseekBlock, MixtralBlock, as_remote_code
from transformers import AutoModelForCausalLM, AutoTokenizer

import sedetect
from sedetect import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.stats.place import Place

FORWARDS = ("forward", "_old_forward")
OUTSIDE = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
# Behind the interface with shared experts, and one of each kind of adapter whose own code runs offloaded.
NAMES = ("qwen2_moe", "deepseek_v3", "llama4", "step3p7", "inkling", "switch_transformers", "nllb_moe")


def assert_equal(stats: sedetect.ModelStats, expected: sedetect.ModelStats) -> None:
    """Counts, maxima and kept rows to the bit; a GPU adds up sums in any order."""
    assert stats.banks.keys() == expected.banks.keys()
    for bank, state in stats.banks.items():
        assert state.equal(expected.banks[bank], sums_rtol=1e-12), bank


def forwards(model) -> list:
    """What every module computes by, inside and outside its hooks."""
    return [(path, [vars(module).get(name) for name in FORWARDS]) for path, module in model.named_modules()]


@pytest.mark.parametrize("name", [name for name in NAMES if name in FAMILIES])
def test_offloaded(name):
    """Every weight is on the meta device but while the module that has it runs."""
    family = FAMILIES[name]
    model, offloaded = tiny_model(name, family), tiny_model(name, family)
    inputs = inputs_of(family, model)
    expected = profile_of(model, inputs, None)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    before = forwards(offloaded)
    stats = profile_of(offloaded, inputs, None)
    assert forwards(offloaded) == before and all(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(stats.output, expected.output)
    assert_equal(stats, expected)


def test_offloaded_weights_that_no_hook_brings():
    """JetMoE's stacked weights are those of modules inside the block, which we do not call."""
    family = FAMILIES["jetmoe"]
    model = tiny_model("jetmoe", family)
    cpu_offload(model, execution_device=torch.device("cpu"))
    moe = model.model.layers[0].mlp
    with sedetect.profile(model), pytest.raises(SedetectError, match="JetMoeMoE: its weights are offloaded.*--stream"):
        moe(torch.ones(1, 2, moe.input_size))


@pytest.mark.parametrize("block", [MixtralBlock, DeepseekBlock])
def test_a_list_of_experts_whose_layers_have_hooks(block):
    """As on several devices: hooks, with the weights in their places."""
    model = as_remote_code(random_model("qwen3_moe"), block, "proj")
    runs = []
    for hooked in (False, True):
        if hooked:
            hook_all(model)
        with sedetect.profile(model, source="text") as prof:
            prof.batch(sequence_ids=torch.arange(len(token_ids())))
            logits = model(input_ids=token_ids()).logits
        runs.append((logits, prof.stats))
    assert torch.equal(runs[0][0], runs[1][0])
    assert_equal(runs[1][1], runs[0][1])


def test_a_down_proj_that_was_replaced_after_its_hooks_came():
    """What runs is what is measured, though the hooks still hold nn.Linear's own forward."""
    family = FAMILIES["qwen2_moe"]
    model = tiny_model("qwen2_moe", family)
    inputs = inputs_of(family, model)
    attach_execution_device_hook(model, "cpu")
    down = model.model.layers[0].mlp.shared_expert.down_proj
    down.forward = lambda x: 2 * torch.nn.functional.linear(x, down.weight)
    doubled = profile_of(model, inputs, None)
    expected = profile_of(tiny_model("qwen2_moe", family), inputs, None)
    bank = ("decoder", 0, "shared")
    assert torch.equal(doubled.banks[bank].out_max, 2 * expected.banks[bank].out_max)
    assert torch.equal(doubled.banks[bank].rows, expected.banks[bank].rows)


def hook_all(model) -> None:
    attach_execution_device_hook(model, "cpu")
    assert sum(hasattr(module, "_hf_hook") for module in model.modules()) > 60


def test_an_ablation_inside_a_profile_of_an_offloaded_model():
    name = "llama4" if "llama4" in FAMILIES else "qwen2_moe"
    family = FAMILIES[name]
    model, offloaded = tiny_model(name, family), tiny_model(name, family)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    inputs, runs = inputs_of(family, model), []
    bank = next(iter(profile_of(model, inputs, None).banks))
    for each in (model, offloaded):
        with sedetect.profile(each, source="text") as prof, ablate(each, [Place(*bank, 1)]):
            output = run(each, inputs)
        runs.append((output, prof.stats))
    assert torch.equal(runs[0][0], runs[1][0])
    assert_equal(runs[1][1], runs[0][1])
    assert int(runs[0][1].banks[bank].rows[1]) == 0


@pytest.mark.parametrize("name", list(CONFIGS)[:1] if INTERPRETED else CONFIGS)
def test_hooks_leave_the_kernels_as_they_are(name):
    """Those of Triton round otherwise than a module's own forward does. A minute per model where it is interpreted."""
    device = torch.device("cpu" if INTERPRETED else "cuda")
    model, hooked = (random_model(name).to(device) for _ in range(2))
    cpu_offload(hooked, execution_device=device)
    runs, inputs = [], {"input_ids": token_ids(1, 6).to(device)}
    for each in (model, hooked):
        stats = profile_of(each, inputs, "triton")
        assert all(bank.backends == ["triton"] for bank in stats.header.banks.values())
        runs.append(stats)
    assert torch.equal(runs[1].output, runs[0].output)
    assert_equal(runs[1], runs[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("places", ["layers on disk", "all on disk"])
def test_profile_model(tmp_path, name, places):
    folder = save_random(CONFIGS[name](), tmp_path / "m")
    parts = dict.fromkeys((*OUTSIDE, "model.layers.0"), "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    device_map = parts if places == "layers on disk" else {"": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.device.type == ("meta" if places == "all on disk" else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    stats = sedetect.profile_model(model.eval(), TEXTS, tokenizer=tokenizer, **SHORT, **OPTIONAL).stats
    assert_equal(
        stats, sedetect.profile_model(folder, TEXTS, **SHORT, **OPTIONAL, loading=sedetect.Loading(device="cpu")).stats
    )


@pytest.mark.gpu(number=2)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("offload", [False, True])
def test_two_gpus(tmp_path, name, offload):
    """Embeddings and the first layer on one, the rest on the other, or one layer in main memory."""
    folder = save_random(CONFIGS[name](), tmp_path)
    parts = dict.fromkeys((*OUTSIDE, "model.layers.0"), 0)
    parts |= {"model.layers.1": "cpu" if offload else 1, "model.layers.2": 1}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=parts).eval()
    ids = token_ids()
    whole = AutoModelForCausalLM.from_pretrained(folder).to("cuda:0").eval()
    runs = []
    for each in (whole, model):
        with sedetect.profile(each, source="text") as prof:
            prof.batch(sequence_ids=torch.arange(len(ids)))
            runs.append(each(input_ids=ids.to("cuda:0")).logits)
            devices = {str(one.state.out_max.device) for one in prof._measured}
        runs.append(prof.stats)
        generated = each.generate(ids[:1].to("cuda:0"), max_new_tokens=4, do_sample=False)
        runs.append(generated.cpu())
    assert devices == ({"cuda:0", "cuda:1"})
    assert torch.equal(runs[0].to("cuda:0"), runs[3].to("cuda:0")) and torch.equal(runs[2], runs[5])
    assert_equal(runs[4], runs[1])
