"""Models with another head than a language model's, or none, and experts in a list of a class of its own."""

import pytest
import torch
from support.checkpoints import put_tokenizer
from support.models import CONFIGS, random_model, token_ids
from support.remote_code import Expert
from torch import nn
from transformers import (
    AutoModel,
    DeepseekV3Model,
    Qwen2MoeForTokenClassification,
    Qwen3MoeForQuestionAnswering,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeModel,
)

import sedetect
from sedetect import SedetectError
from sedetect.calibration.windows import calibration_windows
from sedetect.compression.pruning import choose_kept, prune_checkpoint
from sedetect.experiments.evaluation import perplexity
from sedetect.models.loading import open_model

SHORT = {"text": sedetect.Text(tokens=512, seq_len=32)}
CLASSES = {
    Qwen3MoeForSequenceClassification: "qwen3_moe",
    Qwen3MoeForQuestionAnswering: "qwen3_moe",
    Qwen2MoeForTokenClassification: "qwen2_moe",
    Qwen3MoeModel: "qwen3_moe",
    DeepseekV3Model: "deepseek_v3",
}


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("pad", [0, None])
def test_the_class_that_the_config_names(model_class, pad, tmp_path):
    config = CONFIGS[CLASSES[model_class]]()
    config.vocab_size, config.pad_token_id = 4096, pad
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path)
    put_tokenizer(tmp_path)
    opened = open_model(tmp_path)
    assert type(opened.model) is model_class and not opened.notes
    result = sedetect.profile_model(tmp_path, **SHORT)
    assert opened.model.config.pad_token_id == pad
    streamed = sedetect.profile_model(tmp_path, **SHORT, stream=True).stats
    assert streamed.header == result.stats.header
    assert all(state.equal(streamed.banks[bank]) for bank, state in result.stats.banks.items())
    domains = calibration_windows(opened.model, opened.tokenizer, None, SHORT["text"]).domains
    with pytest.raises(SedetectError, match="no output over the vocabulary; perplexity takes a language model"):
        perplexity(opened.model, domains, prefix=0)


def test_a_bare_model_is_pruned(tmp_path):
    config = CONFIGS["qwen3_moe"]()
    config.vocab_size = 4096
    Qwen3MoeModel(config).save_pretrained(tmp_path / "model")
    put_tokenizer(tmp_path / "model")
    stats = sedetect.profile_model(tmp_path / "model", **SHORT).stats
    prune_checkpoint(tmp_path / "model", tmp_path / "out", choose_kept(stats, "reap", 0.25))
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_experts == 6


class Linearized(nn.ModuleList):
    """Experts taken apart by a quantizer's calibration, behind the block's own router."""

    def __init__(self, experts):
        count, hidden, intermediate = experts.down_proj.shape
        super().__init__(Expert(hidden, intermediate, ("gate_proj", "up_proj", "down_proj")) for _ in range(count))
        with torch.no_grad():
            for expert, both, down in zip(self, experts.gate_up_proj, experts.down_proj):
                gate, up = both.chunk(2)
                for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                    getattr(expert, name).weight.copy_(weight)


class Called(Linearized):
    """The same, called by the block as stacked experts are; every expert sees all tokens if it is calibrating."""

    all_tokens = False

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, slots = torch.where(top_k_index == number)
            values = expert(hidden_states)[tokens] if self.all_tokens else expert(hidden_states[tokens])
            output.index_add_(0, tokens, values * top_k_weights[tokens, slots, None])
        return output


@pytest.mark.parametrize("all_tokens", [False, True])
def test_experts_in_a_list_of_a_class_of_its_own(all_tokens):
    def profiled(model):
        with sedetect.profile(model, source="text") as prof:
            prof.batch(sequence_ids=range(4))
            output = model(input_ids=token_ids()).logits
        return output, prof.stats.banks

    model = random_model("qwen3_moe")
    expected, banks = profiled(model)
    for layer in model.model.layers:
        layer.mlp.experts = Called(layer.mlp.experts)
        layer.mlp.experts.all_tokens = all_tokens
    output, found = profiled(model)
    assert torch.allclose(output, expected, atol=1e-4)
    assert found.keys() == banks.keys()
    for bank, state in found.items():
        assert state.rows.equal(banks[bank].rows)
        assert torch.allclose(state.out_max, banks[bank].out_max, rtol=1e-4, atol=1e-4)


def test_a_list_that_is_not_called_itself():
    from support.remote_code import MixtralBlock, as_remote_code

    model = as_remote_code(random_model("qwen3_moe"), MixtralBlock, "proj")
    with sedetect.profile(model, source="text") as prof:
        model(input_ids=token_ids())
    plain = prof.stats
    for layer in model.model.layers:
        layer.mlp.block.experts.__class__ = type("SequentialExperts", (nn.ModuleList,), {})
    with sedetect.profile(model, source="text") as prof:
        model(input_ids=token_ids())
    for bank, state in prof.stats.banks.items():
        assert state.rows.equal(plain.banks[bank].rows) and state.rows.sum()
