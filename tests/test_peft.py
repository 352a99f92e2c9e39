"""Models with LoRA adapters of PEFT: the statistics hold the adapter's part, under the names of the checkpoint."""

import pytest
import torch
from support.compare import assert_equal, assert_logits_close
from support.models import TINY, random_model, token_ids
from support.remote_code import MixtralBlock, as_remote_code
from transformers import AutoModelForCausalLM

import sedetect
from sedetect.compression.protect import export, protect_list
from sedetect.errors import SedetectError
from sedetect.experiments.ablation import ablate
from sedetect.models.banks import find_banks

peft = pytest.importorskip("peft")

FORMS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "down alone": {"target_parameters": ["mlp.experts.down_proj"]},
    "shared experts": {"target_modules": ["gate_proj", "down_proj"]},
    "all linears": {"target_modules": "all-linear"},
    "experts in a list": {"target_modules": r".*experts\.\d+\.(gate|up|down)_proj"},
    "all linears of a list": {"target_modules": "all-linear"},
}


def listed():
    model = as_remote_code(random_model("qwen3_moe"), MixtralBlock, "proj")
    model.config.model_type = "remote"  # or PEFT takes its targets for those of stacked experts
    return model


def with_lora(model, options):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config).eval()


def run(model):
    """Statistics and logits of a batch that is padded on the left, and of a generation from it."""
    ids, mask = token_ids(), torch.ones(4, 24, dtype=torch.int64)
    mask[:2, :5] = 0
    with sedetect.profile(model, source="text") as prof:
        prof.batch(sequence_ids=torch.arange(4))
        logits = model(input_ids=ids, attention_mask=mask).logits
        prof.batch(sequence_ids=torch.arange(4, 8))
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    return prof.stats, logits


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_measured_as_the_weights_it_stands_for(form):
    """Against the same model with the adapter merged into plain weights."""
    options = FORMS[form]

    wrapped, merged = (with_lora(listed() if "list" in form else random_model("qwen2_moe"), options) for _ in range(2))
    merged = merged.merge_and_unload()
    (stats, logits), (reference, wanted) = run(wrapped), run(merged)
    assert_logits_close(logits, wanted, 1e-4)
    assert not stats.header.notes and stats.header.tokens == reference.header.tokens == 86 + 86 + 2 * 4
    for bank, state in reference.banks.items():
        assert torch.equal(state.counts, stats.banks[bank].counts), bank
        assert torch.allclose(state.out_max, stats.banks[bank].out_max, rtol=1e-3)
        assert torch.allclose(state.sums, stats.banks[bank].sums, rtol=1e-3, atol=1e-5)
        assert stats.header.banks[str(bank)].module == reference.header.banks[str(bank)].module


def test_protect_lists_name_modules_of_the_checkpoint():
    model, ids = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval(), token_ids(2, 16)
    ids[:, 0] = 0
    lists = []
    for one in (
        model,
        with_lora(model, {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]}),
    ):
        with sedetect.profile(one, prefix=0) as prof:
            one(input_ids=ids)
        tools = ("llm-compressor", "auto-round")
        lists.append([export(prof.stats, protect_list(prof.stats), tool, model=one) for tool in tools])
    assert lists[0] == lists[1] and lists[0][1][0]["ignore_layers"].endswith(
        ",lm_head,model.layers.1.mlp.experts.28,model.layers.9.mlp.experts.7"
    )


def test_experts_that_are_kept_twice_are_refused():
    wrapped = with_lora(random_model("qwen2_moe"), {"target_modules": ["q_proj"], "modules_to_save": ["experts"]})
    with pytest.raises(SedetectError, match=r"^model.layers.0.mlp.experts: PEFT keeps .* merge_and_unload"):
        sedetect.profile(wrapped)


def test_matrices_that_an_adapter_adds_to_are_not_read():
    wrapped = with_lora(listed(), FORMS["experts in a list"])
    with pytest.raises(SedetectError, match="cannot be read; load the model unquantized, with adapters merged"):
        find_banks(wrapped)[0].module.down_proj[0]


def test_adapters_that_are_off_and_ablations():
    model = random_model("qwen2_moe")
    reference, _ = run(model)
    wrapped = with_lora(model, {"target_modules": ["q_proj"]})
    with wrapped.disable_adapter():
        off, _ = run(wrapped)
    assert off.header.digest != reference.header.digest  # of a model with other modules, whether or not they act
    off.header.digest = reference.header.digest
    assert_equal(off, reference)
    on, _ = run(wrapped)
    bank = next(iter(on.banks))
    assert not torch.equal(on.banks[bank].sums, reference.banks[bank].sums)
    with torch.no_grad(), ablate(wrapped, ["L0E1"]):
        inside = wrapped(input_ids=token_ids()).logits
    with torch.no_grad():
        assert not torch.equal(wrapped(input_ids=token_ids()).logits, inside)
    with sedetect.profile(wrapped) as prof, ablate(wrapped, ["L0E1"]):
        wrapped(input_ids=token_ids())
    assert int(prof.stats.banks[bank].rows[1]) == 0
